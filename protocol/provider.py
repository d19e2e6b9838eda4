"""What is said inside the provider agent: between its polls, its machine (`actors/provider/machine.py`) and its two ports.

`rest` (golem/provider/port.py) talks to the node's REST API, `processes` (golem/provider/processes.py) runs exe-units.
Both do work beside their mailbox and tell the outcome later; the machine repeats what is open when the agent starts.
`instance` names the run of the agent that asked: a port that finds another run's name looks first whether it was done.
Properties, reasons and agreements travel as JSON text, as the API has them (properties flattened).
"""

from __future__ import annotations

from protocol.types import Message


class OfferSpec(Message, frozen=True):
    """What to offer under a preset. `constraints` are those of the offer without its expiration clause."""

    preset: str
    runtime: str
    properties: str
    subnet: str


class Capacity(Message, frozen=True):
    """What all agreements together may use, or one does. Zeros: not known, nothing is held against it."""

    cpu_threads: int = 0
    mem_gib: float = 0.0
    storage_gib: float = 0.0


# -- from the agent's start, its watch over files, its signals
class AgentStarted(Message, frozen=True):
    """The agent runs (again), and this is what it should offer. Answer: `SessionNamed`."""

    session_id: str  # for a first start; later ones keep the first one's
    offers: tuple[OfferSpec, ...]
    capacity: Capacity = Capacity()


class SessionNamed(Message, frozen=True):
    """The `appSessionId` of this agent."""

    session_id: str


class OffersChanged(Message, frozen=True):
    """Presets, hardware, payment platforms or runtimes that work changed: this is now to be offered."""

    offers: tuple[OfferSpec, ...]
    capacity: Capacity = Capacity()


class RulesChanged(Message, frozen=True):
    """Whom to serve from now on: nobody of `blacklist`, and nobody but `allow_only` (None: everybody else)."""

    blacklist: tuple[str, ...]
    allow_only: tuple[str, ...] | None


class StopAgent(Message, frozen=True):
    """Withdraw the offers, end the agreements, bill."""


# -- from polls
class ProposalArrived(Message, frozen=True):
    """A requestor's proposal; `previous` are the properties of ours that it answers, `origin` its network address if known."""

    preset: str
    offer_id: str
    proposal_id: str
    issuer: str
    demand: str
    previous: str
    constraints: str
    origin: str = ""


class AgreementArrived(Message, frozen=True):
    """A requestor wants an agreement."""

    preset: str
    offer_id: str
    agreement: str


class EventArrived(Message, frozen=True):
    """An event of one of the node's durable feeds: `agreements`, `activities`, `debit-notes`, `invoices`.

    `subject` is the id of the agreement, activity or document, `related` that of its agreement (of an activity).
    """

    feed: str
    at: float
    kind: str
    subject: str
    related: str = ""
    text: str = ""


# -- to port `rest`, and its answers
class PlaceOffer(Message, frozen=True, tag="PublishOffer"):
    """Publish an offer, then say `OfferPublished`."""

    preset: str
    serial: int
    properties: str
    subnet: str


class OfferPublished(Message, frozen=True):
    """The node has the offer."""

    preset: str
    serial: int
    offer_id: str


class WatchOffer(Message, frozen=True):
    """Poll an offer's events until it is gone, then say `OfferLost`."""

    preset: str
    offer_id: str


class OfferLost(Message, frozen=True):
    """The node does not know this offer (any more)."""

    preset: str
    offer_id: str


class WithdrawOffer(Message, frozen=True):
    """Take an offer back and stop polling it."""

    offer_id: str


class AnswerProposal(Message, frozen=True, tag="CounterProposal"):
    """Answer a proposal with our properties."""

    offer_id: str
    proposal_id: str
    properties: str
    constraints: str


class RefuseProposal(Message, frozen=True, tag="RejectProposal"):
    """Refuse a proposal."""

    offer_id: str
    proposal_id: str
    reason: str


class AcceptAgreement(Message, frozen=True, tag="ApproveAgreement"):
    """Approve an agreement, then say `ApprovalEnded`. Approving again does no harm."""

    agreement_id: str
    session_id: str
    timeout_s: float


class ApprovalEnded(Message, frozen=True):
    """The approval was committed by the requestor, or not."""

    agreement_id: str
    approved: bool
    reason: str = ""


class RefuseAgreement(Message, frozen=True, tag="RejectAgreement"):
    """Refuse an agreement."""

    agreement_id: str
    reason: str


class EndAgreement(Message, frozen=True, tag="TerminateAgreement"):
    """Terminate an agreement, then say `TerminationEnded`."""

    agreement_id: str
    reason: str


class TerminationEnded(Message, frozen=True):
    """The agreement is not in force any more."""

    agreement_id: str


class CloseActivity(Message, frozen=True):
    """Report an activity as terminated, read its last usage, then say `ActivityClosed`."""

    activity_id: str
    reason: str
    error_message: str


class ActivityClosed(Message, frozen=True):
    """The node has the end of the activity. `usage` None: it was never reported."""

    activity_id: str
    usage: list[float] | None


class ReadUsage(Message, frozen=True):
    """Read the usage of a running activity, then say `UsageRead`; it is not tried twice."""

    activity_id: str


class UsageRead(Message, frozen=True):
    """The usage; None where it could not be read."""

    activity_id: str
    usage: list[float] | None


class IssueNote(Message, frozen=True):
    """Issue a debit note unless there is one after `previous_id`, then say `NoteIssued`."""

    activity_id: str
    number: int
    amount: str
    usage: list[float]
    due_at: float | None
    previous_id: str
    since: float  # no note of this activity is older
    instance: str


class NoteIssued(Message, frozen=True):
    """The node has the debit note; `error` says why it will not take it."""

    activity_id: str
    number: int
    note_id: str
    error: str = ""


class SendNote(Message, frozen=True):
    """Send a debit note to the requestor, then say `NoteSent`."""

    activity_id: str
    number: int
    note_id: str
    give_up_at: float | None  # the requestor counts as unreachable after that


class NoteSent(Message, frozen=True):
    """The requestor has the debit note, could not be reached in time, or refuses it. `most`: what it would take."""

    activity_id: str
    number: int
    sent: bool
    error: str = ""
    most: str = ""


class AskFunds(Message, frozen=True):
    """Ask the chain what a payer's account holds, then say `FundsKnown`; it is not tried twice."""

    requestor: str
    platform: str


class FundsKnown(Message, frozen=True):
    """What a requestor has to pay with on a platform, in GLM; None where nobody could say."""

    requestor: str
    platform: str
    amount: str | None


class ReadNote(Message, frozen=True):
    """Read the status of a debit note whose deadline `accept` or `pay` has come, then say `NoteRead`."""

    activity_id: str
    number: int
    note_id: str
    deadline: str


class NoteRead(Message, frozen=True):
    """`status` as the API names it."""

    activity_id: str
    number: int
    deadline: str
    status: str


class WriteInvoice(Message, frozen=True, tag="IssueInvoice"):
    """Issue the invoice of an agreement unless there is one beside the refused one, then say `InvoiceIssued`."""

    agreement_id: str
    activity_ids: tuple[str, ...]
    amount: str
    due_at: float
    since: float
    instance: str
    refused_id: str = ""


class InvoiceIssued(Message, frozen=True):
    """The node has the invoice; `error` says why it will not take it."""

    agreement_id: str
    invoice_id: str
    error: str = ""


class SendInvoice(Message, frozen=True):
    """Send an invoice to the requestor, then say `InvoiceSent`."""

    agreement_id: str
    invoice_id: str


class InvoiceSent(Message, frozen=True):
    """The requestor has the invoice; `error` says why it never will, `most` what it would take."""

    agreement_id: str
    error: str = ""
    most: str = ""


# -- to port `processes`, and its answers
class StartUnit(Message, frozen=True):
    """Start the exe-unit of an activity, or find the one that was started; then say `UnitRunning`."""

    activity_id: str
    agreement_id: str
    runtime: str
    agreement: str


class UnitRunning(Message, frozen=True):
    """The process, named by its id and the time it started (clock ticks since boot: ids are used again)."""

    activity_id: str
    pid: int
    started_ticks: int


class FindUnit(Message, frozen=True):
    """Take up a process of an earlier run of the agent; say `UnitExited` if it is gone or as soon as it is.

    `pid` 0: it was being started; if it is there, say `UnitRunning` first.
    """

    activity_id: str
    pid: int
    started_ticks: int


class StopUnit(Message, frozen=True):
    """End a process: politely, then not."""

    activity_id: str
    pid: int
    started_ticks: int


class HoldUnit(Message, frozen=True):
    """Have an activity's exe-unit start no new command (`held`), or go on."""

    activity_id: str
    agreement_id: str
    held: bool


class UnitExited(Message, frozen=True):
    """The process is gone. `code` None: it was not our child, or never started (`error` says why)."""

    activity_id: str
    code: int | None
    error: str = ""


# -- timers
class IdleDue(Message, frozen=True):
    """The agreement had no activity for too long."""

    agreement_id: str


class ExpirationDue(Message, frozen=True):
    """The agreement's term is over."""

    agreement_id: str


class CreditDue(Message, frozen=True):
    """The unpaid work for a requestor may have come near its credit by now, or have reached it."""

    requestor: str


class NoteDue(Message, frozen=True):
    """It is time for a debit note."""

    activity_id: str


class DeadlineDue(Message, frozen=True):
    """A debit note should have been accepted (`accept`) or paid (`pay`) by now."""

    activity_id: str
    number: int
    deadline: str


class PatienceDue(Message, frozen=True):
    """A proposal that waits for room has waited long enough."""

    proposal_id: str


class ForgetDue(Message, frozen=True):
    """An agreement that is over and billed need not be remembered any longer."""

    agreement_id: str


class TaskEnded(Message, frozen=True):
    """What the port was to do under this key is done, or was given up."""

    key: str


Timer = IdleDue | CreditDue | ExpirationDue | NoteDue | DeadlineDue | PatienceDue | ForgetDue
ToRest = (
    PlaceOffer
    | WatchOffer
    | WithdrawOffer
    | AnswerProposal
    | RefuseProposal
    | AcceptAgreement
    | RefuseAgreement
    | EndAgreement
    | CloseActivity
    | ReadUsage
    | IssueNote
    | SendNote
    | ReadNote
    | AskFunds
    | WriteInvoice
    | SendInvoice
)
#: Messages to the port that nothing else would bring back after a kill: the machine keeps them until `TaskEnded`.
Kept = AnswerProposal | RefuseProposal | RefuseAgreement | ReadNote
#: What anybody may cause, as often as he likes. It has a port of its own, so that no money waits behind it.
Talk = AnswerProposal | RefuseProposal | RefuseAgreement
OfStrangers = Talk | AskFunds
_IDS = ("preset", "offer_id", "proposal_id", "agreement_id", "activity_id", "number", "serial", "deadline", "note_id",
        "requestor", "platform")  # fmt: skip


def port_of(message: ToRest) -> str:
    """Return the port that a message goes to."""
    return "proposals" if isinstance(message, OfStrangers) else "rest"


def task_key(message: Message) -> str:
    """Return what a message to the port is about: its kind, ids and number."""
    return "/".join((type(message).__name__, *(str(getattr(message, name)) for name in _IDS if hasattr(message, name))))


ToProcesses = StartUnit | FindUnit | StopUnit | HoldUnit
