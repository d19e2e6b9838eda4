"""Agreements of the provider agent and their activities: from approval to the end of the last process.

An agreement ends because its requestor says so, or by `end_agreement` here with one of the codes. Its activities run one
after another, each in a process of its own; what they cost is the business of `billing`.
"""

from __future__ import annotations

from msgspec.structs import replace

from actors.provider import credit, places
from actors.provider.rows import ALIVE, DealState, EndCode, ProviderActivityRow, ProviderAgreementRow, UnitState
from actors.provider.turn import Turn, reason
from protocol.provider import (
    CloseActivity,
    CreditDue,
    EndAgreement,
    EventArrived,
    ExpirationDue,
    IdleDue,
    NoteDue,
    StartUnit,
    StopUnit,
    UnitExited,
    UnitRunning,
)
from protocol.states import Role

CODE = "golem.provider.code"


MESSAGES = {
    EndCode.SUCCESS: "Finished with success.",
    EndCode.EXPIRED: "Agreement expired.",
    EndCode.NO_ACTIVITY: "No activity within the allowed time.",
    EndCode.SHUTDOWN: "The provider is shutting down.",
    EndCode.DEADLINE: "A debit note was not accepted in time.",
    EndCode.NOT_PAID: "A debit note was not paid in time.",
    EndCode.NOTE_REJECTED: "A debit note was rejected.",
    EndCode.NOTE_CANCELLED: "A debit note was cancelled.",
    EndCode.CREDIT: "Unpaid work has reached the credit of this requestor.",
    EndCode.NOT_ISSUED: "No debit note can be issued for the work.",
    EndCode.UNREACHABLE: "The requestor cannot be reached.",
}
FIRST_NOTE_S = 30.0  # of a stranger, where the demand names no interval
READ_FIRST_S = 10.0  # after a start of the agent, for what its node has to tell
MAX_ACTIVITIES = 1000  # of one agreement
MAX_WAITING = 4  # activities of one agreement that wait for the process before them to go


# -- the agreement
def approved(turn: Turn, row: ProviderAgreementRow) -> None:
    """The agreement is in force; all its intervals count from now, by our clock, whatever dates the requestor gave it."""
    row = replace(row, state=DealState.APPROVED, at=turn.now, payable_at=turn.now)
    turn.save(row)
    turn.wake(f"expire/{row.agreement_id}", row.expires_at, ExpirationDue(row.agreement_id))
    rest_idle(turn, row)
    if turn.agent.stopping:
        end_agreement(turn, row, EndCode.SHUTDOWN)


def rest_idle(turn: Turn, row: ProviderAgreementRow) -> None:
    """Count the time without an activity from now on."""
    row = replace(row, idle_until=turn.now + turn.config.idle_s)
    turn.save(row)
    turn.wake(f"idle/{row.agreement_id}", row.idle_until, IdleDue(row.agreement_id))


def rest_idle_again(turn: Turn, row: ProviderAgreementRow) -> None:
    """Go on counting it after a start of the agent: the requestor may have asked meanwhile, and that is read first.

    Starts do not begin it anew, and who starts again and again gives nobody a moment each time.
    """
    over_s = turn.now - row.idle_until
    at = row.idle_until if over_s > turn.config.idle_s else max(row.idle_until, turn.now + READ_FIRST_S)
    turn.wake(f"idle/{row.agreement_id}", at, IdleDue(row.agreement_id))


def end_agreement(turn: Turn, row: ProviderAgreementRow, code: EndCode, why: str = "") -> None:
    """Terminate an agreement from our side (`why` beside the usual text); harmless when it is ending already."""
    if row.state != DealState.APPROVED:
        return
    row = replace(row, state=DealState.TERMINATING, ended_by=Role.PROVIDER, code=code, reason=why or MESSAGES[code])
    turn.save(row)
    credit.over(turn, row)
    turn.unwake(f"expire/{row.agreement_id}", f"idle/{row.agreement_id}")
    terminate(turn, row)
    _stop_activities(turn, row)
    vacate_if_done(turn, row.agreement_id)


def terminate(turn: Turn, row: ProviderAgreementRow) -> None:
    turn.rest(EndAgreement(row.agreement_id, reason(row.reason, **{CODE: row.code})))


def ended(turn: Turn, row: ProviderAgreementRow, by: str = Role.PROVIDER, why: str = "") -> None:
    """The agreement is not in force any more, on both sides."""
    if row.state == DealState.ENDED:
        return
    if row.state != DealState.TERMINATING:  # the requestor's word, not the echo of ours
        row = replace(row, ended_by=by, reason=why[:300])
    row = replace(row, state=DealState.ENDED)
    turn.save(row)
    credit.over(turn, row)
    turn.unwake(f"expire/{row.agreement_id}", f"idle/{row.agreement_id}")
    _stop_activities(turn, row)
    vacate_if_done(turn, row.agreement_id)


def never_made(turn: Turn, row: ProviderAgreementRow) -> None:
    """The requestor has not committed: forget the agreement."""
    places.unused(turn, row)
    turn.put(f"agreement/{row.agreement_id}", None)
    turn.put(f"debt/{row.requestor}/{row.agreement_id}", None)
    turn.vacate(row.agreement_id)


def vacate_if_done(turn: Turn, agreement_id: str) -> None:
    """Free the capacity of an agreement that is over and whose processes are gone."""
    row = turn.agreement(agreement_id)
    if row is not None and row.state in (DealState.TERMINATING, DealState.ENDED) and not turn.alive(row):
        turn.vacate(agreement_id)


def _stop_activities(turn: Turn, row: ProviderAgreementRow) -> None:
    for activity in turn.activities(row):
        stop_activity(turn, activity)


# -- activities
def create_activity(turn: Turn, event: EventArrived) -> None:
    """Start the exe-unit of a new activity, or say why not."""
    activity_id, row = event.subject, turn.agreement(event.related)
    if turn.activity(activity_id) is not None:
        return
    if row is not None and row.state == DealState.APPROVING:  # the requestor was faster than the answer to our approval
        approved(turn, row)
        row = turn.agreement(event.related)
    if row is None or row.state != DealState.APPROVED or len(row.activities) >= MAX_ACTIVITIES:
        turn.rest(CloseActivity(activity_id, "creation failed", "no agreement in force that allows it"))
        return
    others = [one for one in turn.activities(row) if one.state in (UnitState.WAITING, *ALIVE)]
    if any(one.state not in (UnitState.WAITING, UnitState.STOPPING) for one in others) or len(others) > MAX_WAITING:
        turn.rest(CloseActivity(activity_id, "creation failed", "Only single Activity allowed"))
        return
    row = replace(row, activities=(*row.activities, activity_id))
    turn.save(row)
    places.used(turn, row)
    turn.unwake(f"idle/{row.agreement_id}")
    activity = ProviderActivityRow(activity_id, row.agreement_id, UnitState.WAITING, turn.now, billed_at=turn.now)
    turn.save(activity)
    if not others:
        _start(turn, row, activity)


def _start(turn: Turn, row: ProviderAgreementRow, activity: ProviderActivityRow) -> None:
    activity = replace(activity, state=UnitState.STARTING, billed_at=turn.now, counted_at=turn.now)
    turn.save(activity)
    credit.watch(turn, row.requestor)
    start_unit(turn, row, activity)
    turn.wake(f"note/{activity.activity_id}", _first_note_at(turn, row), NoteDue(activity.activity_id))


def start_unit(turn: Turn, row: ProviderAgreementRow, activity: ProviderActivityRow) -> None:
    turn.processes(StartUnit(activity.activity_id, row.agreement_id, row.runtime, row.document))


def next_note_at(turn: Turn, row: ProviderAgreementRow) -> float:
    """Return the next time of a debit note: the approval plus whole intervals."""
    intervals = max(0, int((turn.now - row.at) // row.interval_s)) + 1
    return row.at + intervals * row.interval_s


def _first_note_at(turn: Turn, row: ProviderAgreementRow) -> float:
    """Return when the first debit note of an activity is due: for strangers soon, for who does not answer it is gone."""
    usual_at = next_note_at(turn, row)
    if row.interval_agreed or len(row.activities) > 1 or credit.has_paid(turn, row.requestor):
        return usual_at
    return min(usual_at, turn.now + FIRST_NOTE_S)


def stop_activity(turn: Turn, activity: ProviderActivityRow) -> None:
    """End an activity; what is not running yet will not."""
    match activity.state:
        case "Waiting":
            turn.save(replace(activity, destroyed=True))
            _gone(turn, replace(activity, destroyed=True), "destroyed", "")
        case "Starting":  # its process is stopped as soon as it is known
            turn.save(replace(activity, state=UnitState.STOPPING, destroyed=True))
        case "Running":
            turn.save(replace(activity, state=UnitState.STOPPING, destroyed=True))
            turn.processes(StopUnit(activity.activity_id, activity.pid, activity.started_ticks))


def destroy_activity(turn: Turn, event: EventArrived) -> None:
    """The requestor (or its node's patience) ends an activity."""
    activity = turn.activity(event.subject)
    if activity is None:
        turn.rest(CloseActivity(event.subject, "destroyed", ""))
        return
    stop_activity(turn, activity)


def unit_running(turn: Turn, message: UnitRunning) -> None:
    """The process of an activity has started."""
    activity = turn.activity(message.activity_id)
    if activity is None:
        turn.processes(StopUnit(message.activity_id, message.pid, message.started_ticks))
        return
    if activity.state not in (UnitState.STARTING, UnitState.STOPPING):
        return
    activity = replace(activity, pid=message.pid, started_ticks=message.started_ticks)
    if activity.state == UnitState.STOPPING:
        turn.save(activity)
        turn.processes(StopUnit(activity.activity_id, activity.pid, activity.started_ticks))
    else:
        turn.save(replace(activity, state=UnitState.RUNNING))


def unit_exited(turn: Turn, message: UnitExited) -> None:
    """The process of an activity is gone."""
    activity = turn.activity(message.activity_id)
    if activity is None or activity.state not in ALIVE:
        return
    if activity.destroyed:
        why, text = "destroyed", ""
    elif message.error and not activity.pid:
        why, text = "creation failed", message.error
    elif message.code == 0:
        why, text = "finished", ""
    else:
        code = "the process was lost" if message.code is None else f"exit code {message.code}"
        why, text = "execution aborted", message.error or code
    _gone(turn, activity, why, text)


def _gone(turn: Turn, activity: ProviderActivityRow, why: str, text: str) -> None:
    """No process of this activity is there (any more): report it, bill it, go on with the agreement."""
    turn.save(replace(activity, state=UnitState.EXITED, reason=why, error_message=text[:1000]))
    turn.unwake(f"note/{activity.activity_id}")
    turn.rest(CloseActivity(activity.activity_id, why, text[:1000]))
    row = turn.agreement(activity.agreement_id)
    assert row is not None, "an activity's agreement is kept as long as the activity"
    vacate_if_done(turn, row.agreement_id)
    if row.state != DealState.APPROVED:
        return
    waiting = [one for one in turn.activities(row) if one.state == UnitState.WAITING]
    if turn.alive(row):
        return
    if not row.multi_activity:
        end_agreement(turn, row, EndCode.SUCCESS)
    elif waiting:
        _start(turn, row, waiting[0])
    else:
        rest_idle(turn, row)


# -- timers
def credit_due(turn: Turn, message: CreditDue) -> None:
    """Unpaid work may have reached a requestor's credit: then its agreements end."""
    rows, why = credit.exhausted(turn, message.requestor)
    for row in rows:
        end_agreement(turn, row, EndCode.CREDIT, why)


def idle_due(turn: Turn, message: IdleDue) -> None:
    row = turn.agreement(message.agreement_id)
    if row is None or any(one.state in (UnitState.WAITING, *ALIVE) for one in turn.activities(row)):
        return
    if row.state == DealState.APPROVED:
        places.unused(turn, row)
    end_agreement(turn, row, EndCode.NO_ACTIVITY)


def expiration_due(turn: Turn, message: ExpirationDue) -> None:
    if (row := turn.agreement(message.agreement_id)) is not None:
        end_agreement(turn, row, EndCode.EXPIRED)


# -- events of the feed `agreements`
def agreement_event(turn: Turn, event: EventArrived) -> None:
    """What the node says of an agreement."""
    row = turn.agreement(event.subject)
    if row is None:
        return
    match event.kind:
        case "AgreementTerminatedEvent":
            ended(turn, row, event.related or Role.REQUESTOR, event.text)
        case "AgreementApprovedEvent" if row.state == DealState.APPROVING:
            approved(turn, row)
        case "AgreementRejectedEvent" | "AgreementCancelledEvent" if row.state == DealState.APPROVING:
            turn.refuse(row.requestor, row.preset, f"agreement {event.kind[9:18].lower()}: {event.text}"[:300], final=False)
            never_made(turn, row)


def all_closed(turn: Turn, row: ProviderAgreementRow) -> bool:
    return all(one.state == UnitState.CLOSED for one in turn.activities(row))
