"""The requestor's side of an activity: what agents ask for, and what the provider's node and the exe-unit tell."""

from __future__ import annotations

from msgspec.structs import replace

from actors.activity.moves import (
    CREATE_MARGIN_S,
    MAX_ACTIVITIES,
    NAME,
    REPORT_S,
    REQUEST_DEADLINE_S,
    ActivityDraft,
    ask_to_end,
    bounded_timeout,
    end,
    sane,
    set_state,
    store,
)
from actors.activity.rows import GONE, HEARD, QUIET, ActivityRow, BatchRow, batch_key
from actors.kernel.draft import Declined
from protocol.activity import (
    Accepted,
    ActivityChanged,
    ActivityKnown,
    ActivityRequested,
    CommandResult,
    CreateActivity,
    CreateExpired,
    DestroyActivity,
    DestroyRequested,
    Exec,
    StateChanged,
    UsageChanged,
    check_usage,
)
from protocol.exeunit import RunBatch, ScriptError, exeunit_name, parse_script
from protocol.states import ActivityEnd, ActivityState, Role
from protocol.types import Violation, address

MAX_UNFINISHED = 64  # batches of one activity
LIVE_STATES = (ActivityState.INITIALIZED, ActivityState.DEPLOYED, ActivityState.READY)


# -- what agents ask for
def create(draft: ActivityDraft, message: CreateActivity) -> None:
    """Ask the provider for an activity."""
    agreement = draft.agreement(message.agreement_id)
    if agreement is None:
        raise Declined("bad_request", f"agreement {message.agreement_id} is not approved")
    if agreement.role != Role.REQUESTOR:
        raise Declined("forbidden", f"not the requestor of agreement {message.agreement_id}")
    if agreement.ended:
        raise Declined("bad_request", f"agreement {message.agreement_id} is not approved: it is terminated")
    if agreement.provider == draft.me:
        raise Declined("conflict", "a node cannot be its own provider")
    draft.reply(Accepted(message.activity_id))
    if draft.activity(message.activity_id) is not None:
        return
    if len(agreement.activities) >= MAX_ACTIVITIES:
        raise Declined("conflict", f"agreement {message.agreement_id} has had {MAX_ACTIVITIES} activities")
    timeout_s = bounded_timeout(message.timeout_s)
    row = ActivityRow(
        message.activity_id, agreement.agreement_id, Role.REQUESTOR, agreement.requestor, agreement.provider, draft.now
    )
    draft.save(row)
    draft.put(f"agreement/{row.agreement_id}", replace(agreement, activities=(*agreement.activities, row.activity_id)))
    draft.send("ledger", ActivityKnown(row.activity_id, row.agreement_id, draft.now))
    request = ActivityRequested(row.activity_id, row.agreement_id, timeout_s)
    draft.send(address(row.provider, NAME), request, timeout_s + CREATE_MARGIN_S)
    draft.wake(f"create/{row.activity_id}", draft.now + timeout_s + 2 * CREATE_MARGIN_S, CreateExpired(row.activity_id))
    draft.emit(f"activity/{row.activity_id}", ActivityChanged(ActivityState.NEW))


def destroy(draft: ActivityDraft, message: DestroyActivity) -> None:
    """Ask the provider to end an activity; where it is gone, nobody waits for its word."""
    row = _own(draft, message.activity_id)
    ask_to_end(draft, message.activity_id)
    if row.is_gone:
        _give_up(draft, row)
    draft.reply(Accepted(message.activity_id))


def run(draft: ActivityDraft, message: Exec) -> None:
    """Send a script to the exe-unit."""
    row = _own(draft, message.activity_id)
    if draft.batch(message.activity_id, message.batch_id) is not None:
        draft.reply(Accepted(message.batch_id))
        return
    if row.ended:
        raise Declined("unreachable", f"activity {message.activity_id} is terminated")
    if row.is_gone:
        raise Declined("unreachable", f"activity {message.activity_id}: {row.error_message}")
    if len(row.unfinished) >= MAX_UNFINISHED:
        raise Declined("busy", f"activity {message.activity_id} has {MAX_UNFINISHED} unfinished batches")
    try:
        size = len(parse_script(message.script))
    except ScriptError as error:
        raise Declined("bad_request", f"Bad request: {error}") from None
    draft.save(replace(row, unfinished=(*row.unfinished, message.batch_id)))
    batch = BatchRow(message.batch_id, row.activity_id, size, begun_at=draft.now)
    draft.put(batch_key(message.activity_id, message.batch_id), batch)
    draft.reply(Accepted(message.batch_id))
    batch_to_run = RunBatch(message.activity_id, message.batch_id, message.script)
    draft.send(address(row.provider, exeunit_name(row.activity_id)), batch_to_run, REQUEST_DEADLINE_S)


def _own(draft: ActivityDraft, activity_id: str) -> ActivityRow:
    """Return an activity of which we are the requestor. Raises `Declined`."""
    row = draft.activity(activity_id)
    if row is None:
        raise Declined("unknown", f"no such activity: {activity_id}")
    if row.role != Role.REQUESTOR:
        raise Declined("forbidden", f"not the requestor of activity {activity_id}")
    return row


# -- what the other side tells
def state_changed(draft: ActivityDraft, message: StateChanged) -> None:
    """Take over what the provider's node says, unless the exe-unit has told more already."""
    row = _peers_activity(draft, message.activity_id)
    if row is None or (row.ended and message.state == ActivityState.TERMINATED):
        return
    if message.state in LIVE_STATES:
        row = _heard(draft, row)
    if not row.ended and (message.state == ActivityState.TERMINATED or message.at >= row.state_at):
        set_state(draft, row, message)


def usage_changed(draft: ActivityDraft, message: UsageChanged) -> None:
    """Take over the counters."""
    row = _peers_activity(draft, message.activity_id)
    if row is not None and not (row := _heard(draft, row)).ended:
        draft.save(replace(row, usage=check_usage(message.usage), usage_at=sane(message.at, draft.now)))


def _peers_activity(draft: ActivityDraft, activity_id: str) -> ActivityRow | None:
    """Return the row if the sender is the provider's activity actor; None if there is no such row. Raises `Violation`."""
    row = draft.activity(activity_id)
    if row is not None and (row.role != Role.REQUESTOR or draft.meta.sender != address(row.provider, NAME)):
        raise Violation(f"{draft.meta.sender} is not the provider of activity {activity_id}")
    return row


def result(draft: ActivityDraft, message: CommandResult) -> None:
    """Keep a result of the exe-unit, each once and in order."""
    row, batch = draft.activity(message.activity_id), draft.batch(message.activity_id, message.batch_id)
    if row is None or batch is None:
        return  # long over, and forgotten
    if row.role != Role.REQUESTOR or draft.meta.sender != address(row.provider, exeunit_name(row.activity_id)):
        raise Violation(f"{draft.meta.sender} is not the exe-unit of activity {row.activity_id}")
    if batch.finished or message.index < batch.have:
        return
    if message.index != batch.have or message.index >= batch.size:
        raise Violation(f"result {message.index} of a batch that has {batch.have} of {batch.size} results")
    row, at = _heard(draft, row), sane(message.at, draft.now)
    if message.state in LIVE_STATES and not row.ended and at >= row.state_at:
        row = replace(row, state=message.state, pending=None, state_at=at)
        draft.save(row)
        draft.emit(f"activity/{row.activity_id}", ActivityChanged(row.state))
    store(draft, row, batch, message)


# -- what it does not tell
def _heard(draft: ActivityDraft, row: ActivityRow) -> ActivityRow:
    """Return the row after a word of the exe-unit, which undoes its silence; it may be for an activity that has ended."""
    if row.ended:
        draft.ask(row.provider, DestroyRequested(row.activity_id))  # over here, and not there: nobody shall pay for that
        return row
    draft.listen(row.activity_id, draft.unresponsive_s)
    if row.silence == HEARD:
        return row
    row = replace(row, state=row.silent_from or row.state, silent_from="", silence=HEARD, error_message=None)
    draft.save(row)
    draft.emit(f"activity/{row.activity_id}", ActivityChanged(row.state))
    return row


def silent(draft: ActivityDraft, row: ActivityRow) -> None:
    """Say that nothing is heard of the exe-unit any more, and end the activity when that lasts.

    A report that is due every ten seconds is missed up to ten seconds after the link broke. So much later than a silent
    exe-unit is ended on its own node, agents hear that it is gone: a partition that the provider sits out ends nothing here.
    """
    gone_s = draft.inactivity_s + REPORT_S
    if row.silence == GONE or (row.silence == QUIET and row.destroying):
        _give_up(draft, row)
        return
    if row.silence == HEARD:
        silence, time_s, next_s = QUIET, draft.unresponsive_s, gone_s
    else:
        silence, time_s, next_s = GONE, gone_s, draft.give_up_s
    if row.state in LIVE_STATES:
        row = replace(row, state=ActivityState.UNRESPONSIVE, silent_from=row.state)
    text = f"nothing was heard of the exe-unit for {time_s:g} s"
    draft.save(replace(row, silence=silence, error_message=text))
    draft.emit(f"activity/{row.activity_id}", ActivityChanged(ActivityState.UNRESPONSIVE))
    draft.listen(row.activity_id, next_s - time_s)


def _give_up(draft: ActivityDraft, row: ActivityRow) -> None:
    """End an activity of which nothing is heard; if it still runs, its node hears of it when it is back."""
    draft.ask(row.provider, DestroyRequested(row.activity_id))
    why = row.error_message if row.destroying else f"nothing was heard of the exe-unit for {draft.give_up_s:g} s"
    end(draft, draft.activity(row.activity_id) or row, ActivityEnd.UNREACHABLE, why or "")
