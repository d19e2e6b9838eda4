"""The requestor's side of an activity: what agents ask for, and what the provider's node and the exe-unit tell."""

from __future__ import annotations

from msgspec.structs import replace

from actors.activity.moves import (
    CREATE_MARGIN_S,
    MAX_ACTIVITIES,
    NAME,
    REQUEST_DEADLINE_S,
    ActivityDraft,
    ask_to_end,
    bounded_timeout,
    sane,
    set_state,
    store,
)
from actors.activity.rows import ActivityRow, BatchRow, batch_key
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
    Exec,
    StateChanged,
    UsageChanged,
    check_usage,
)
from protocol.exeunit import RunBatch, ScriptError, parse_script
from protocol.states import ActivityState, Role
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
    """Ask the provider to end an activity."""
    _own(draft, message.activity_id)
    ask_to_end(draft, message.activity_id)
    draft.reply(Accepted(message.activity_id))


def run(draft: ActivityDraft, message: Exec) -> None:
    """Send a script to the exe-unit."""
    row = _own(draft, message.activity_id)
    if draft.batch(message.activity_id, message.batch_id) is not None:
        draft.reply(Accepted(message.batch_id))
        return
    if row.ended:
        raise Declined("unreachable", f"activity {message.activity_id} is terminated")
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
    draft.send(address(row.provider, f"exeunit:{row.activity_id}"), batch_to_run, REQUEST_DEADLINE_S)


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
    if row is None or row.ended or (message.state != ActivityState.TERMINATED and message.at < row.state_at):
        return
    set_state(draft, row, message)


def usage_changed(draft: ActivityDraft, message: UsageChanged) -> None:
    """Take over the counters."""
    row = _peers_activity(draft, message.activity_id)
    if row is not None and not row.ended:
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
    if row.role != Role.REQUESTOR or draft.meta.sender != address(row.provider, f"exeunit:{row.activity_id}"):
        raise Violation(f"{draft.meta.sender} is not the exe-unit of activity {row.activity_id}")
    if batch.finished or message.index < batch.have:
        return
    if message.index != batch.have or message.index >= batch.size:
        raise Violation(f"result {message.index} of a batch that has {batch.have} of {batch.size} results")
    at = sane(message.at, draft.now)
    if message.state in LIVE_STATES and not row.ended and at >= row.state_at:
        row = replace(row, state=message.state, pending=None, state_at=at)
        draft.save(row)
        draft.emit(f"activity/{row.activity_id}", ActivityChanged(row.state))
    store(draft, row, batch, message)
