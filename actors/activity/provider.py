"""The provider's side of an activity: requests of the agreement's requestor, and what the exe-unit reports."""

from __future__ import annotations

from msgspec.structs import replace

from actors.activity.moves import (
    CREATE_MARGIN_S,
    MAX_ACTIVITIES,
    NAME,
    USAGE_DEADLINE_S,
    ActivityDraft,
    ask_to_end,
    bounded_timeout,
    sane,
    set_state,
    tell_requestor,
)
from actors.activity.rows import ActivityRow, HeldRow
from actors.kernel.draft import Declined
from protocol.activity import (
    Accepted,
    ActivityChanged,
    ActivityEvent,
    ActivityKnown,
    ActivityRequested,
    CreateExpired,
    DestroyRequested,
    HeldExpired,
    StateChanged,
    StateReported,
    UsageChanged,
    UsageReported,
    check_id,
    check_usage,
)
from protocol.exeunit import exeunit_name
from protocol.states import ActivityState, Role
from protocol.types import Violation, actor_of, address, node_of

HELD_S, MAX_HELD, MAX_HELD_PER_NODE = 10.0, 64, 8


# -- what the requestor asks for
def requested(draft: ActivityDraft, message: ActivityRequested) -> None:
    """Begin an activity, if the agreement allows it. Raises `Violation`."""
    check_id(message.activity_id)
    sender = node_of(draft.meta.sender)
    row = draft.activity(message.activity_id)
    if row is not None:
        if row.role != Role.PROVIDER or row.requestor != sender or row.agreement_id != message.agreement_id:
            raise Violation(f"activity {message.activity_id} belongs to somebody else")
        return
    timeout_s = bounded_timeout(message.timeout_s)
    agreement = draft.agreement(message.agreement_id)
    if agreement is None:
        _hold(draft, HeldRow(message.activity_id, message.agreement_id, sender, timeout_s))
        return
    if agreement.role != Role.PROVIDER or agreement.requestor != sender:
        raise Violation(f"{sender} is not the requestor of agreement {message.agreement_id}")
    if agreement.ended or len(agreement.activities) >= MAX_ACTIVITIES:
        _turn_down(
            draft, message.activity_id, sender, "agreement terminated" if agreement.ended else f"over {MAX_ACTIVITIES} activities"
        )
        return
    begin(draft, message.activity_id, message.agreement_id, timeout_s)


def _hold(draft: ActivityDraft, held: HeldRow) -> None:
    """Keep a request for a moment: the news of its agreement may still be on its way inside this node."""
    key = f"held/{held.activity_id}"
    if draft.get(key) is not None or len(held.agreement_id) > 200:
        return
    waiting = [other.requestor for _, other in draft.prefix("held/")]
    if len(waiting) >= MAX_HELD or waiting.count(held.requestor) >= MAX_HELD_PER_NODE:
        _turn_down(draft, held.activity_id, held.requestor, "agreement not approved")
        return
    draft.put(key, held)
    draft.wake(key, draft.now + HELD_S, HeldExpired(held.activity_id))


def held_expired(draft: ActivityDraft, message: HeldExpired) -> None:
    """The agreement never came."""
    held = draft.row(HeldRow, f"held/{message.activity_id}")
    if held is not None:
        draft.put(f"held/{message.activity_id}", None)
        _turn_down(draft, message.activity_id, held.requestor, "agreement not approved")


def _turn_down(draft: ActivityDraft, activity_id: str, requestor: str, reason: str) -> None:
    draft.ask(requestor, StateChanged(activity_id, ActivityState.TERMINATED, reason=reason))


def begin(draft: ActivityDraft, activity_id: str, agreement_id: str, timeout_s: float) -> None:
    """Write an activity, and tell the agent to run its exe-unit."""
    agreement = draft.agreement(agreement_id)
    assert agreement is not None, agreement_id
    draft.save(ActivityRow(activity_id, agreement_id, Role.PROVIDER, agreement.requestor, agreement.provider, draft.now))
    draft.put(f"agreement/{agreement_id}", replace(agreement, activities=(*agreement.activities, activity_id)))
    draft.send("ledger", ActivityKnown(activity_id, agreement_id, draft.now))
    draft.emit("activities", ActivityEvent(activity_id, agreement_id, "CreateActivity", agreement.app_session_id))
    draft.emit(f"activity/{activity_id}", ActivityChanged(ActivityState.NEW))
    draft.wake(f"create/{activity_id}", draft.now + timeout_s + CREATE_MARGIN_S, CreateExpired(activity_id))


def destroy_requested(draft: ActivityDraft, message: DestroyRequested) -> None:
    """End an activity, or say again that it has ended. Raises `Violation`."""
    activity_id, sender = message.activity_id, node_of(draft.meta.sender)
    held = draft.row(HeldRow, f"held/{activity_id}")
    if held is not None and held.requestor == sender:
        draft.put(f"held/{activity_id}", None)
        draft.wake(f"held/{activity_id}", None)
    row = draft.activity(activity_id)
    if row is None:
        draft.ask(sender, StateChanged(check_id(activity_id), ActivityState.TERMINATED, reason="no such activity"))
        return
    if row.role != Role.PROVIDER or row.requestor != sender:
        raise Violation(f"{draft.meta.sender} is not the requestor of activity {activity_id}")
    if row.ended:
        tell_requestor(draft, row)
    else:
        ask_to_end(draft, activity_id)


# -- what the exe-unit reports
def reported(draft: ActivityDraft, message: StateReported) -> None:
    """Take over a state. Raises `Violation`."""
    row = _own(draft, message.activity_id)
    by_edge = actor_of(draft.meta.sender) == "edge"
    if by_edge:
        draft.reply(Accepted(message.activity_id))
    if not row.ended:
        set_state(draft, row, message)
        if not by_edge and message.state != ActivityState.TERMINATED:
            draft.listen(row.activity_id, draft.unresponsive_s)


def usage_reported(draft: ActivityDraft, message: UsageReported) -> None:
    """Take over the counters; a unit that was silent is back. Raises `Violation`."""
    row = _own(draft, message.activity_id)
    if row.ended:
        return
    draft.listen(row.activity_id, draft.unresponsive_s)
    if row.state == ActivityState.UNRESPONSIVE and row.silent_from:
        set_state(draft, row, StateReported(row.activity_id, ActivityState(row.silent_from), usage=message.usage, at=draft.now))
        return
    at = sane(message.at, draft.now)
    draft.save(replace(row, usage=check_usage(message.usage), usage_at=at))
    draft.send(address(row.requestor, NAME), UsageChanged(row.activity_id, message.usage, at), USAGE_DEADLINE_S)


def _own(draft: ActivityDraft, activity_id: str) -> ActivityRow:
    """Return the row if an edge or the activity's own exe-unit says something of it. Raises `Violation`, `Declined`."""
    if actor_of(draft.meta.sender) not in ("edge", exeunit_name(activity_id)):
        raise Violation(f"{draft.meta.sender} may not report on activity {activity_id}")
    row = draft.activity(activity_id)
    if row is None:
        raise Declined("unknown", f"no such activity: {activity_id}")
    if row.role != Role.PROVIDER:
        raise Declined("forbidden", f"not the provider of activity {activity_id}")
    return row


def silent(draft: ActivityDraft, row: ActivityRow) -> None:
    """Say that nothing was heard of the exe-unit, and end the activity when it lasts."""
    if row.destroying:
        return
    if row.state == ActivityState.UNRESPONSIVE:
        ask_to_end(draft, row.activity_id)
        return
    text = f"nothing was heard of the exe-unit for {draft.unresponsive_s:g} s"
    silence = StateReported(row.activity_id, ActivityState.UNRESPONSIVE, error_message=text, at=draft.now)
    set_state(draft, replace(row, silent_from=row.state), silence)
    draft.listen(row.activity_id, draft.inactivity_s - draft.unresponsive_s)
