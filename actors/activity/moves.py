"""Moves of an activity that both sides, and time, have in common; and what is made of other people's numbers."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from msgspec.structs import replace

from actors.activity.rows import ActivityAgreementRow, ActivityRow, BatchRow, ResultRow, batch_key, result_key
from actors.kernel.draft import Draft
from actors.kernel.machine import DropFeed, Meta, Rows
from protocol.activity import (
    BATCH_NOTE,
    LEAST_OUTPUT_BYTES,
    MAX_BATCH_OUTPUT_BYTES,
    MAX_OUTPUT_BYTES,
    MAX_TEXT,
    ActivityChanged,
    ActivityEvent,
    ActivityOver,
    BatchExpired,
    CommandResult,
    CreateExpired,
    DestroyExpired,
    DestroyRequested,
    FeedExpired,
    ResultArrived,
    StateChanged,
    StateReported,
    UnitSilent,
    check_output,
    check_usage,
    fit_output,
    output_size,
)
from protocol.property_names import RUNTIME_NAME
from protocol.states import ActivityState, Role
from protocol.types import address

NAME = "activity"

CREATE_MARGIN_S = 5.0  # beyond what the requestor waits for
REQUEST_DEADLINE_S = 600.0  # a silent provider ends the activity here
DESTROY_PATIENCE_S = 60.0  # from the destroy event until the activity counts as ended whatever the agent says
REPORT_S = 10.0  # between the reports of an exe-unit
UNRESPONSIVE_S, INACTIVITY_S = 30.0, 60.0  # without a word of an exe-unit
GIVE_UP_S = 300.0  # the same at the requestor; then the activity ends here
USAGE_DEADLINE_S = 2.5 * REPORT_S  # then there are newer reports: while a peer is away, few of them wait
LATE_S = 5.0  # a timer this late: the node was away itself, and the silence says nothing
# why an activity ended
KEEP_AGREEMENT_S = 90 * 24 * 3600.0  # an agreement and its activities after its end
KEEP_S = 24 * 3600.0  # results after their batch, feeds after their activity
MAX_CREATE_S = 300.0
MAX_ACTIVITIES = 1000  # of one agreement


class ActivityDraft(Draft):
    """A step of the machine: its own rows, and how patient it is."""

    def __init__(self, rows: Rows, meta: Meta, me: str, patience: tuple[float, float, float, float]) -> None:
        super().__init__(rows, meta, me)
        self.unresponsive_s, self.inactivity_s, self.give_up_s, self.keep_agreement_s = patience

    def activity(self, activity_id: str) -> ActivityRow | None:
        return self.row(ActivityRow, f"activity/{activity_id}")

    def agreement(self, agreement_id: str) -> ActivityAgreementRow | None:
        return self.row(ActivityAgreementRow, f"agreement/{agreement_id}")

    def batch(self, activity_id: str, batch_id: str) -> BatchRow | None:
        return self.row(BatchRow, batch_key(activity_id, batch_id))

    def save(self, row: ActivityRow) -> None:
        self.put(f"activity/{row.activity_id}", row)

    def listen(self, activity_id: str, time_s: float) -> None:
        """Expect a word of the exe-unit within this time."""
        due = self.now + time_s
        self.wake(f"silence/{activity_id}", due, UnitSilent(activity_id, due))

    def ask(self, node: str, message: DestroyRequested | StateChanged) -> None:
        """Tell the other side what it must hear soon, or not at all."""
        self.send(address(node, NAME), message, REQUEST_DEADLINE_S)


# -- a life
def set_state(draft: ActivityDraft, row: ActivityRow, news: StateReported | StateChanged) -> None:
    """Take over a state, and tell whoever waits for it. Raises `Violation`."""
    at, was = sane(news.at, draft.now), row
    if news.usage is not None:
        usage_at = sane(news.usage_at, draft.now) if isinstance(news, StateChanged) else at
        row = replace(row, usage=check_usage(news.usage), usage_at=usage_at)
    row = replace(
        row,
        state=news.state,
        state_at=at,
        pending=news.pending,
        reason=news.reason and news.reason[:MAX_TEXT],
        error_message=news.error_message and news.error_message[:MAX_TEXT],
    )
    if row.ended and was.state == ActivityState.UNRESPONSIVE:
        row = replace(row, error_message=row.error_message or was.error_message)
    draft.save(row)
    draft.emit(f"activity/{row.activity_id}", ActivityChanged(row.state))
    if row.state != ActivityState.NEW:
        draft.wake(f"create/{row.activity_id}", None)
    if row.role == Role.PROVIDER:
        tell_requestor(draft, row)
    if row.ended:
        wind_up(draft, row)


def wind_up(draft: ActivityDraft, row: ActivityRow) -> None:
    """The activity is over: no timer is left, and no batch stays without its last result."""
    draft.send("ledger", ActivityOver(row.activity_id, draft.now))
    draft.wake(f"destroy/{row.activity_id}", None)
    draft.wake(f"silence/{row.activity_id}", None)
    draft.wake(f"feed/{row.activity_id}", draft.now + KEEP_S, FeedExpired(row.activity_id))
    why = ": ".join(text for text in (row.reason, row.error_message) if text) or "no reason given"
    for batch_id in row.unfinished:
        current, batch = draft.activity(row.activity_id), draft.batch(row.activity_id, batch_id)
        if current is None or batch is None or batch.finished:
            continue
        message = f"activity terminated: {why}"
        last = CommandResult(row.activity_id, batch_id, batch.have, False, None, None, message, draft.now, is_last=True)
        store(draft, current, batch, last)


def tell_requestor(draft: ActivityDraft, row: ActivityRow) -> None:
    """Say how an activity stands."""
    told = StateChanged(
        row.activity_id, row.state, row.pending, row.reason, row.error_message, row.usage, row.state_at, row.usage_at
    )
    draft.send(address(row.requestor, NAME), told)


def ask_to_end(draft: ActivityDraft, activity_id: str) -> None:
    """Begin to end a live activity; once is enough."""
    row = draft.activity(activity_id)
    if row is None or row.ended or row.destroying:
        return
    draft.save(replace(row, destroying=True))
    if row.role == Role.REQUESTOR:
        wait_s = REQUEST_DEADLINE_S
        draft.ask(row.provider, DestroyRequested(activity_id))
    else:
        wait_s = DESTROY_PATIENCE_S
        agreement = draft.agreement(row.agreement_id)
        assert agreement is not None, row.agreement_id
        event = ActivityEvent(activity_id, row.agreement_id, "DestroyActivity", agreement.app_session_id)
        draft.emit("activities", event)
    draft.wake(f"create/{activity_id}", None)
    draft.wake(f"destroy/{activity_id}", draft.now + wait_s, DestroyExpired(activity_id))


def create_expired(draft: ActivityDraft, message: CreateExpired) -> None:
    row = draft.activity(message.activity_id)
    if row is not None and row.state == ActivityState.NEW:
        ask_to_end(draft, message.activity_id)


def destroy_expired(draft: ActivityDraft, message: DestroyExpired) -> None:
    row = draft.activity(message.activity_id)
    if row is None or row.ended:
        return
    silent = "the provider" if row.role == Role.REQUESTOR else "the exe-unit and the agent"
    end(draft, row, "destroyed", f"{silent} did not confirm the end")


def end(draft: ActivityDraft, row: ActivityRow, reason: str, error_message: str) -> None:
    """End an activity here, whatever others say."""
    set_state(draft, row, StateChanged(row.activity_id, ActivityState.TERMINATED, reason=reason, error_message=error_message))


# -- batches
def store(draft: ActivityDraft, row: ActivityRow, batch: BatchRow, result: CommandResult) -> None:
    """Keep a result, within the bounds of its batch; with the last one the batch is finished."""
    finished = not result.ok or result.is_last or result.index + 1 == batch.size
    room = min(MAX_OUTPUT_BYTES, max(LEAST_OUTPUT_BYTES, MAX_BATCH_OUTPUT_BYTES - batch.stored_bytes))
    out, err = check_output(result.stdout), check_output(result.stderr)
    stdout, stderr, text = fit_output(out, err, result.message, room, BATCH_NOTE)
    at = sane(result.at, draft.now)
    draft.put(
        result_key(batch.batch_id, result.index),
        ResultRow(result.index, result.ok, stdout or None, stderr or None, text, at, finished),
    )
    stored_bytes = batch.stored_bytes + output_size(stdout) + output_size(stderr)
    draft.put(
        batch_key(row.activity_id, batch.batch_id),
        replace(batch, have=result.index + 1, finished=finished, stored_bytes=stored_bytes),
    )
    draft.emit(f"batch/{batch.batch_id}", ResultArrived(result.index, finished))
    if finished:
        left = tuple(other for other in row.unfinished if other != batch.batch_id)
        draft.save(replace(row, unfinished=left))
        draft.wake(f"batch/{batch.batch_id}", draft.now + KEEP_S, BatchExpired(row.activity_id, batch.batch_id))


def forget_batch(draft: ActivityDraft, message: BatchExpired) -> None:
    """Delete a batch, its results and its feed."""
    for key, _ in list(draft.prefix(f"result/{message.batch_id}/")):
        draft.put(key, None)
    draft.put(batch_key(message.activity_id, message.batch_id), None)
    draft.do(DropFeed(f"batch/{message.batch_id}"))


# -- other people's numbers
def runtime_name(offer_properties: str) -> str:
    """Return the name of the runtime in an offer's properties, "" if there is none."""
    try:
        name = msgspec.json.decode(offer_properties, type=dict[str, Any]).get(RUNTIME_NAME)
    except (msgspec.DecodeError, RecursionError):
        return ""
    return name[:100] if isinstance(name, str) else ""


def bounded_timeout(timeout_s: float) -> float:
    return min(max(timeout_s, 1.0), MAX_CREATE_S) if math.isfinite(timeout_s) else MAX_CREATE_S


def sane(at: float, now: float) -> float:
    """Return a reporter's time, or ours where its clock is far off."""
    return round(at, 6) if math.isfinite(at) and abs(at - now) < KEEP_S else now
