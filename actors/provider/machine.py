"""The provider agent: what to offer, whom to serve, what to run and what to charge. Pure; runs in the agent's own process.

Polls of the node's REST API (golem/provider/polls.py) bring proposals, agreements and events; port `rest` does what is
decided at the node, port `processes` runs the exe-units. Everything open is in rows: an agent that was killed takes up its
offers, agreements, activities and bills again when it starts (`AgentStarted`).

    agreement   Approving -> Approved -> Terminating -> Ended, then invoice Issuing -> Sending -> Sent -> Accepted -> Settled
    activity    (Waiting ->) Starting -> Running -> Stopping -> Exited -> Billing -> Closed

Parts: `offers`, `negotiation` (with the rules in `rules`), `agreements`,
`billing`; rows in `rows`; messages in `protocol/provider.py`. The session id is made once and kept: it
names this agent at the node through restarts, which the process id would not.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from msgspec.structs import replace

from actors.kernel.grammar import EDGE, ITSELF, Looked, On, Table, TableMachine
from actors.kernel.machine import Meta, Reply, Rows
from actors.provider import agreements, billing, credit, negotiation, offers
from actors.provider.rows import (
    ALIVE,
    AgentRow,
    BillState,
    CapacityRow,
    CursorRow,
    DealState,
    EndCode,
    ProviderActivityRow,
    ProviderAgreementRow,
    ProviderRow,
    ServedRow,
    UnitState,
)
from actors.provider.turn import ProviderConfig, Turn
from protocol.provider import (
    ActivityClosed,
    AgentStarted,
    AgreementArrived,
    ApprovalEnded,
    CloseActivity,
    CreditDue,
    DeadlineDue,
    EventArrived,
    ExpirationDue,
    FindUnit,
    ForgetDue,
    FundsKnown,
    HoldUnit,
    IdleDue,
    InvoiceIssued,
    InvoiceSent,
    NoteDue,
    NoteIssued,
    NoteRead,
    NoteSent,
    OfferLost,
    OfferPublished,
    OffersChanged,
    PatienceDue,
    ProposalArrived,
    RulesChanged,
    SendInvoice,
    SessionNamed,
    StopAgent,
    StopUnit,
    TaskEnded,
    TerminationEnded,
    Timer,
    UnitExited,
    UnitRunning,
    UsageRead,
)
from protocol.types import Undelivered

EARLY_TIMER_S = 1.0
#: Several ports bring news of the node; all are of this process, as everybody who has an address here.
_PORTS = Looked("its ports", here=True)


def _timer_key(message: Timer) -> str:
    match message:
        case IdleDue(agreement_id):
            return f"idle/{agreement_id}"
        case CreditDue(requestor):
            return f"credit/{requestor}"
        case ExpirationDue(agreement_id):
            return f"expire/{agreement_id}"
        case NoteDue(activity_id):
            return f"note/{activity_id}"
        case DeadlineDue(activity_id, number, deadline):
            return f"{deadline}/{activity_id}/{number}"
        case PatienceDue(proposal_id):
            return f"patience/{proposal_id}"
        case ForgetDue(agreement_id):
            return f"forget/{agreement_id}"


# -- start and stop
def _started(turn: Turn, message: AgentStarted) -> None:
    before: AgentRow | None = turn.sound("agent")
    if before is None and "agent" in turn.left_out:
        before = AgentRow("", 0.0, "")  # the session's name is lost with the row: without one, all events are heard
    elif before is None:
        before = AgentRow(message.session_id, turn.now, "")
    agent = replace(before, instance=turn.config.instance, stopping=False)
    turn.put("agent", agent)
    turn.put("capacity", CapacityRow(message.capacity))
    turn.put("served", None)  # the settings of this run say whom
    turn.do(Reply(SessionNamed(agent.session_id)))
    for _, row in list(turn.readable("agreement/")):
        turn.spare(partial(_resume_agreement, turn, row))
    offers.reconcile(turn, message.offers, again=True)
    for _, task in list(turn.readable("task/")):
        if task.instance != turn.config.instance:
            turn.rest(task.message)


def _task_ended(turn: Turn, message: TaskEnded) -> None:
    turn.put(f"task/{message.key}", None)


def _resume_agreement(turn: Turn, row: ProviderAgreementRow) -> None:
    """Do again whatever was under way for an agreement when the last run of the agent ended."""
    if row.state == DealState.APPROVING:
        negotiation.ask_approval(turn, row)
    elif row.state == DealState.TERMINATING:
        agreements.terminate(turn, row)
    for activity in turn.activities(row):
        _resume_activity(turn, row, activity)
    busy = any(one.state in (UnitState.WAITING, *ALIVE) for one in turn.activities(row))
    if row.state == DealState.APPROVED and not busy:
        agreements.rest_idle_again(turn, row)
    if row.invoice == BillState.ISSUING:
        billing.issue_invoice(turn, row)
    elif row.invoice == BillState.SENDING:
        turn.rest(SendInvoice(row.agreement_id, row.invoice_id))


def _resume_activity(turn: Turn, row: ProviderAgreementRow, activity: ProviderActivityRow) -> None:
    if activity.state == UnitState.STARTING:
        agreements.start_unit(turn, row, activity)
    elif activity.state in ALIVE:
        activity = replace(activity, billed_at=turn.now)  # that nobody billed it meanwhile was our own fault
        turn.save(activity)
        turn.processes(FindUnit(activity.activity_id, activity.pid, activity.started_ticks))
        if activity.held:
            turn.processes(HoldUnit(activity.activity_id, activity.agreement_id, True))
        if activity.destroyed and activity.pid:
            turn.processes(StopUnit(activity.activity_id, activity.pid, activity.started_ticks))
    elif activity.state == UnitState.EXITED:
        turn.rest(CloseActivity(activity.activity_id, activity.reason, activity.error_message))
    for _, note in list(turn.prefix(f"note/{activity.activity_id}/")):
        if note.state == BillState.ISSUING:
            billing.issue_note(turn, row, note)
        elif note.state == BillState.SENDING:
            billing.send_note(turn, row, note)


def _offers_changed(turn: Turn, message: OffersChanged) -> None:
    if turn.get("capacity") != CapacityRow(message.capacity):
        turn.put("capacity", CapacityRow(message.capacity))
        turn.vacated = True  # there may be room now for what was rejected
    offers.reconcile(turn, message.offers, again=False)


def _rules_changed(turn: Turn, message: RulesChanged) -> None:
    turn.put("served", ServedRow(message.blacklist, message.allow_only))
    turn.vacated = True  # who was rejected may be welcome now


def _stop(turn: Turn, message: StopAgent) -> None:
    turn.put("agent", replace(turn.agent, stopping=True))
    offers.withdraw_all(turn)
    active = [key for key, _ in turn.readable("active/")]
    for key in (*active, *[key for key in turn.left_out if key.startswith("active/")]):
        row = turn.sound(f"agreement/{key.removeprefix('active/')}")
        if row is not None:
            turn.spare(partial(agreements.end_agreement, turn, row, EndCode.SHUTDOWN))


# -- events of the node's feeds
def _event(turn: Turn, event: EventArrived) -> None:
    cursor: CursorRow | None = turn.sound(f"cursor/{event.feed}")  # a damaged one is written anew: no event waits for it
    if cursor is not None and event.at <= cursor.at:
        return
    turn.put(f"cursor/{event.feed}", CursorRow(event.at))
    match event.feed, event.kind:
        case "agreements", _:
            agreements.agreement_event(turn, event)
            billing.bill_if_done(turn, event.subject)
        case "activities", "CreateActivity":
            agreements.create_activity(turn, event)
        case "activities", "DestroyActivity":
            agreements.destroy_activity(turn, event)
        case "debit-notes" | "invoices", _:
            billing.document_event(turn, event)


def _termination_ended(turn: Turn, message: TerminationEnded) -> None:
    row = turn.agreement(message.agreement_id)
    if row is not None and row.state in (DealState.TERMINATING, DealState.ENDED):
        agreements.ended(turn, row)
        billing.bill_if_done(turn, message.agreement_id)


def _undelivered(turn: Turn, message: Undelivered) -> None:
    """Ports are of this process; they are reached or the agent is not there."""


class Provider(TableMachine):
    """The machine `provider`; see the module's docstring. `node` names the process's own kernel, not the node's."""

    name = "provider"
    rows = ProviderRow
    table = Table(
        On(AgentStarted, EDGE, _started),
        On(OffersChanged, EDGE, _offers_changed),
        On(RulesChanged, EDGE, _rules_changed),
        On(StopAgent, EDGE, _stop),
        On(ProposalArrived, EDGE, negotiation.proposal_arrived),
        On(AgreementArrived, EDGE, negotiation.agreement_arrived),
        On(ApprovalEnded, _PORTS, negotiation.approval_ended),
        On(EventArrived, EDGE, _event),
        On(OfferPublished, _PORTS, offers.published),
        On(OfferLost, _PORTS, offers.lost),
        On(TerminationEnded, _PORTS, _termination_ended),
        On(TaskEnded, _PORTS, _task_ended),
        On(UnitRunning, "processes", agreements.unit_running),
        On(UnitExited, "processes", agreements.unit_exited),
        On(IdleDue, ITSELF, agreements.idle_due),
        On(CreditDue, ITSELF, agreements.credit_due),
        On(FundsKnown, _PORTS, credit.funds_known),
        On(ExpirationDue, ITSELF, agreements.expiration_due),
        On(ActivityClosed, _PORTS, billing.activity_closed),
        On(UsageRead, _PORTS, billing.usage_read),
        On(NoteDue, ITSELF, billing.note_due),
        On(NoteIssued, _PORTS, billing.note_issued),
        On(NoteSent, _PORTS, billing.note_sent),
        On(NoteRead, _PORTS, billing.note_read),
        On(DeadlineDue, ITSELF, billing.deadline_due),
        On(PatienceDue, ITSELF, negotiation.patience_due),
        On(InvoiceIssued, _PORTS, billing.invoice_issued),
        On(InvoiceSent, _PORTS, billing.invoice_sent),
        On(ForgetDue, ITSELF, billing.forget),
        On(Undelivered, ITSELF, _undelivered),
    )

    def __init__(self, node: str, config: ProviderConfig) -> None:
        super().__init__(node)
        self.config = config

    def draft(self, rows: Rows, meta: Meta) -> Turn:
        """Return the step to be."""
        return Turn(rows, meta, self.node, self.config)

    def carry_out(self, turn: Turn, message: Any) -> None:
        """Decide. Raises `Violation` for what the node cannot have meant."""
        if isinstance(message, Timer) and turn.agent.instance != self.config.instance:
            # due while the agent was away: not before it has taken up its work and heard what happened meanwhile
            turn.wake(_timer_key(message), turn.now + EARLY_TIMER_S, message)
            return
        super().carry_out(turn, message)
        if turn.vacated:
            negotiation.renegotiate(turn)
