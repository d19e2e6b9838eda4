"""Rows of the provider agent's machine, and the sums they are billed by.

`agent`; `agent/payer/<requestor>`; `agent/unused/<requestor>`; `stranger/<requestor>` (index); `funds/<requestor>`;
`served` (whom); `capacity`; `cursor/<feed>`;
`offer/<preset>`; `rejected/<proposal>` (to be looked at again); `refusals` (the last ones, for people);
`agreement/<id>`; `active/<agreement>` (index of those that take up capacity); `debt/<requestor>/<agreement>` (index of
what may be unpaid); `activity/<id>`; `note/<activity>/<number>`; `document/<id>` (from a debit note or invoice to what
it is for).
"""

from __future__ import annotations

from decimal import Context, Decimal
from enum import StrEnum

from protocol.provider import Capacity, Kept
from protocol.types import WEI_DIGITS, Message

_EXACT = Context(prec=400)
_WEI = Decimal(1).scaleb(-WEI_DIGITS)


class DealState(StrEnum):
    """Of an agreement, as the agent sees it."""

    APPROVING = "Approving"
    APPROVED = "Approved"
    TERMINATING = "Terminating"
    ENDED = "Ended"


class EndCode(StrEnum):
    """Why the agent ended an agreement."""

    SUCCESS = "Success"
    EXPIRED = "Expired"
    NO_ACTIVITY = "NoActivity"
    SHUTDOWN = "Shutdown"
    DEADLINE = "DebitNotesDeadline"
    NOT_PAID = "DebitNoteNotPaid"
    NOTE_REJECTED = "DebitNoteRejected"
    NOTE_CANCELLED = "DebitNoteCancelled"
    CREDIT = "CreditExhausted"
    NOT_ISSUED = "DebitNoteNotIssued"
    UNREACHABLE = "RequestorUnreachable"


class UnitState(StrEnum):
    """Of an activity and its process."""

    WAITING = "Waiting"
    STARTING = "Starting"
    RUNNING = "Running"
    STOPPING = "Stopping"
    EXITED = "Exited"
    BILLING = "Billing"
    CLOSED = "Closed"


class BillState(StrEnum):
    """Of a debit note or an invoice, as the agent sees it."""

    ISSUING = "Issuing"
    SENDING = "Sending"
    SENT = "Sent"
    ACCEPTED = "Accepted"
    SETTLED = "Settled"
    REJECTED = "Rejected"
    CANCELLED = "Cancelled"
    FAILED = "Failed"


ALIVE = (UnitState.STARTING, UnitState.RUNNING, UnitState.STOPPING)


class AgentRow(Message, frozen=True):
    """The agent: its session, when that began, the run of it that last started, and whether it is on its way out."""

    session_id: str
    since: float
    instance: str
    stopping: bool = False


class CursorRow(Message, frozen=True):
    """The last event of a feed that was handled."""

    at: float


class ProviderOfferRow(Message, frozen=True, tag="OfferRow"):
    """An offer of a preset. `offer_id` empty: being published under `serial`."""

    preset: str
    runtime: str
    properties: str
    subnet: str
    serial: int
    offer_id: str = ""


class RejectedRow(Message, frozen=True):
    """A proposal we rejected, but not for good; or (`waits`) hold back our rejection of, for room may be there any moment."""

    preset: str
    offer_id: str
    proposal_id: str
    issuer: str
    demand: str
    previous: str
    constraints: str
    at: float
    waits: bool = False
    origin: str = ""


class Refusal(Message, frozen=True):
    """Why a negotiation came to nothing."""

    at: float
    requestor: str
    preset: str
    reason: str
    final: bool


class RefusalsRow(Message, frozen=True):
    """The last refusals, newest last."""

    refusals: tuple[Refusal, ...] = ()


class ProviderAgreementRow(Message, frozen=True, tag="AgreementRow"):
    """An agreement, its terms and what is left to do for it. `document` is the API's JSON of it, until it is billed.

    `at`: since when it is in force, by our clock. `payable_at`: the last note with a due date, or the same.
    """

    agreement_id: str
    preset: str
    runtime: str
    requestor: str
    document: str
    state: DealState
    at: float
    expires_at: float
    multi_activity: bool
    coeffs: tuple[float, ...]
    interval_s: float
    accept_timeout_s: float | None
    payment_timeout_s: float | None
    payable_at: float
    activities: tuple[str, ...] = ()
    ended_by: str = ""
    code: str = ""  # of the reason, where we ended it
    reason: str = ""
    invoice: str = ""  # state of the invoice
    invoice_id: str = ""
    amount: str = "0"
    invoice_due_at: float = 0.0
    rate: float = 0.0  # the most that a second can cost
    credit: str = "0"  # what it adds to the credit of its requestor; `raw_credit`: what its terms come to
    raw_credit: str = "0"
    interval_agreed: bool = False  # by the demand: then notes come no faster, for SDKs end agreements over that
    platform: str = ""
    needed: str = "0"  # what the payer must have for more than the least credit; `unproven`: the credit that waits for it
    unproven: str = ""
    refused_id: str = ""  # an invoice that the requestor's node refused; it is corrected once
    idle_until: float = 0.0  # where it has no activity: then it ends


class CapacityRow(Message, frozen=True):
    """What is for sale in all."""

    capacity: Capacity


class ActiveRow(Message, frozen=True):
    """This agreement counts against the limits: it is in force, or a process of it is still there. `share`: what it may use."""

    agreement_id: str
    share: Capacity = Capacity()


class ProviderActivityRow(Message, frozen=True, tag="ActivityRow"):
    """An activity, its process and what it was billed so far. `notes`: how many debit notes there are."""

    activity_id: str
    agreement_id: str
    state: UnitState
    created_at: float
    pid: int = 0
    started_ticks: int = 0
    destroyed: bool = False
    reason: str = ""
    error_message: str = ""
    usage: tuple[float, ...] = ()
    amount: str = "0"
    notes: int = 0
    last_note_id: str = ""
    issuing: bool = False  # the last note has no id yet
    counted_at: float = 0.0  # up to when `amount` counts
    paid: str = "0"
    billed_at: float = 0.0  # when the work began, or the last note was issued
    held: bool = False  # no new command starts: unpaid work is near the credit


class NoteRow(Message, frozen=True):
    """A debit note."""

    activity_id: str
    number: int
    amount: str
    usage: tuple[float, ...]
    due_at: float | None
    state: BillState
    previous_id: str = ""
    note_id: str = ""
    issued_at: float = 0.0
    final: bool = False
    corrected: bool = False  # it stands for one that the requestor's node refused


class UnusedRow(Message, frozen=True):
    """How many agreements of a requestor took a place for nothing since its last activity, and until when it waits."""

    count: int
    until: float


class DebtRow(Message, frozen=True):
    """Index: an agreement that may leave something unpaid, and when it began or ended."""

    agreement_id: str
    at: float


class StrangerRow(Message, frozen=True):
    """Index: who has never paid and draws on the pool, or did within a day."""


class FundsRow(Message, frozen=True):
    """What the chain said of a requestor's account. `amount` None: it is asked, or did not say."""

    platform: str
    amount: str | None
    at: float


class PayerRow(Message, frozen=True):
    """What a requestor really paid here, altogether."""

    paid: str = "0"


class DocumentRow(Message, frozen=True):
    """Whose document this is: a debit note (`number`) of an activity, or the invoice (0) of an agreement."""

    owner: str
    number: int


class TaskRow(Message, frozen=True):
    """`task/<key>`: something that the port was asked to do in a run of the agent, and has not said to be over."""

    message: Kept
    instance: str


class ServedRow(Message, frozen=True):
    """Whom to serve, where that has changed since this run of the agent began."""

    blacklist: tuple[str, ...]
    allow_only: tuple[str, ...] | None


ProviderRow = (
    AgentRow
    | ServedRow
    | CursorRow
    | ProviderOfferRow
    | RejectedRow
    | RefusalsRow
    | ProviderAgreementRow
    | ActiveRow
    | CapacityRow
    | ProviderActivityRow
    | NoteRow
    | DebtRow
    | UnusedRow
    | PayerRow
    | StrangerRow
    | FundsRow
    | DocumentRow
    | TaskRow
)
