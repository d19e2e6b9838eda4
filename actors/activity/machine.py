"""What happens to activities: created, told to run scripts, destroyed. One machine for both roles.

Requestor's side: `CreateActivity`, `Exec` and `DestroyActivity` come from edges; the provider's node tells the state
(`StateChanged`), the exe-unit tells results (`CommandResult`). Provider's side: a request of the agreement's requestor
becomes an event for the agent in feed `activities`; the exe-unit reports states, which go on to the requestor.
An activity always ends: where the other side stays silent, a timer or an undelivered message ends it here, with a reason.
An exe-unit that falls silent makes its activity `Unresponsive`; its next word undoes that, a longer silence ends it.

Rows: `agreement/<id>`, `activity/<id>`, `batch/<activity>/<batch>`, `result/<batch>/<index>`, and `held/<activity>` for
a request that came before the news of its agreement. Feeds: `activities`, `activity/<id>`, `batch/<id>`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from actors.activity.parts import KEEP_S, bounded_timeout, forget_batch, refuse, runtime_name, sane
from actors.activity.rows import ActivityRow, AgreementRow, BatchRow, HeldRow, ResultRow, batch_key, result_key
from actors.kernel.draft import Draft
from actors.kernel.machine import NOTHING, DropFeed, Emit, Meta, Reply, Rows, Send, Step, Wake
from actors.kernel.sources import EDGE, check_source
from protocol.activity import (
    MAX_BATCH_OUTPUT_BYTES,
    MAX_OUTPUT_BYTES,
    MAX_TEXT,
    STATES,
    ActivityChanged,
    ActivityEvent,
    ActivityKnown,
    ActivityOver,
    ActivityRequested,
    AgreementForgotten,
    BatchExpired,
    CommandResult,
    CreateActivity,
    CreateExpired,
    DestroyActivity,
    DestroyExpired,
    DestroyRequested,
    Done,
    Exec,
    FeedExpired,
    HeldExpired,
    ResultArrived,
    StateChanged,
    StateReported,
    UnitSilent,
    UsageChanged,
    UsageReported,
    check_id,
    check_output,
    check_usage,
    fit_output,
    output_size,
)
from protocol.codec import Decoder
from protocol.exeunit import RunBatch, ScriptError, parse_script
from protocol.negotiation import AgreementApproved, AgreementEnded
from protocol.types import PeerLost, Refused, Undelivered, Violation, actor_of, address, node_of

REQUESTOR, PROVIDER = "Requestor", "Provider"
CREATE_MARGIN_S = 5.0  # beyond what the requestor waits for
REQUEST_DEADLINE_S = 600.0  # a silent provider ends the activity here
DESTROY_PATIENCE_S = 60.0  # from the destroy event until the activity counts as ended whatever the agent says
HELD_S, MAX_HELD, MAX_HELD_PER_NODE = 10.0, 64, 8
USAGE_DEADLINE_S = 60.0  # then there is a newer one
KEEP_AGREEMENT_S = 90 * 24 * 3600.0  # an agreement and its activities after its end
UNRESPONSIVE_S, INACTIVITY_S = 30.0, 60.0  # without a word of an exe-unit, which tells its usage every ten seconds
LATE_S = 5.0  # a timer this late: the node was away itself, and the silence says nothing
MAX_ACTIVITIES = 1000  # of one agreement
MAX_UNFINISHED = 64  # batches of one activity
UNREACHABLE = "provider unreachable"
LIVE_STATES = ("Initialized", "Deployed", "Ready")


_SENT = Decoder[Any](
    ActivityKnown | ActivityOver | ActivityRequested | DestroyRequested | RunBatch | StateChanged | UsageChanged
)  # what `Undelivered` may hold

#: Who alone on this node may say what; the rest is said by the activity actors of other nodes. Reports and results are
#: an exe-unit's, and looked at where they are used.
_SOURCES: dict[type, str] = {
    **dict.fromkeys((AgreementApproved, AgreementEnded), "negotiation"),
    **dict.fromkeys((CreateActivity, DestroyActivity, Exec), EDGE),
    **dict.fromkeys((CreateExpired, DestroyExpired, HeldExpired, BatchExpired, FeedExpired, UnitSilent), "activity"),
    **dict.fromkeys((AgreementForgotten, Undelivered, PeerLost), "activity"),
}


class Activity:
    """The machine, on either side."""

    name = "activity"
    local = (
        AgreementApproved
        | AgreementEnded
        | CreateActivity
        | DestroyActivity
        | Exec
        | StateReported
        | UsageReported
        | CreateExpired
        | DestroyExpired
        | HeldExpired
        | BatchExpired
        | FeedExpired
        | UnitSilent
        | AgreementForgotten
        | Undelivered
        | PeerLost
    )
    peer = ActivityRequested | DestroyRequested | StateChanged | UsageChanged | CommandResult
    rows = AgreementRow | ActivityRow | BatchRow | ResultRow | HeldRow
    sources = _SOURCES

    def __init__(
        self, node_id: str, unresponsive_s: float = UNRESPONSIVE_S, inactivity_s: float = INACTIVITY_S,
        keep_agreement_s: float = KEEP_AGREEMENT_S,
    ) -> None:  # fmt: skip
        self._me = node_id
        self._unresponsive_s, self._inactivity_s = unresponsive_s, max(inactivity_s, unresponsive_s)
        self._keep_agreement_s = keep_agreement_s

    def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
        """Decide on one message. Raises `Violation`."""
        if not isinstance(message, StateReported | UsageReported | CommandResult):
            check_source(message, meta, self._me, self.name, self.sources)
        changes = Draft(rows)
        match message:
            case AgreementApproved():
                return self._approved(rows, message, meta)
            case AgreementEnded():
                self._agreement_ended(changes, message, meta)
            case CreateActivity():
                return self._create(rows, message, meta)
            case DestroyActivity(activity_id):
                return self._destroy(rows, activity_id, meta)
            case Exec():
                return self._exec(rows, message, meta)
            case ActivityRequested():
                return self._requested(rows, message, meta)
            case DestroyRequested(activity_id):
                self._destroy_requested(changes, activity_id, meta)
            case StateReported():
                return self._reported(rows, message, meta)
            case UsageReported():
                return self._usage_reported(rows, message, meta)
            case StateChanged():
                self._state_changed(changes, message, meta)
            case UsageChanged():
                return self._usage_changed(rows, message, meta)
            case CommandResult():
                self._result(changes, message, meta)
            case CreateExpired(activity_id):
                self._create_expired(changes, activity_id, meta)
            case DestroyExpired(activity_id):
                self._destroy_expired(changes, activity_id, meta)
            case HeldExpired(activity_id):
                return self._held_expired(rows, activity_id)
            case BatchExpired(activity_id, batch_id):
                return forget_batch(rows, activity_id, batch_id)
            case FeedExpired(activity_id):
                return Step(effects=[DropFeed(f"activity/{activity_id}")])
            case UnitSilent(activity_id, due):
                self._silent(changes, activity_id, due, meta)
            case AgreementForgotten(agreement_id):
                self._forget(changes, agreement_id, meta)
            case Undelivered():
                self._undelivered(changes, message, meta)
            case PeerLost(to):
                self._tell_again(changes, node_of(to))
            case _:
                raise Violation(f"no message for activities: {type(message).__name__}")
        return changes.step()

    # -- agreements
    def _approved(self, rows: Rows, message: AgreementApproved, meta: Meta) -> Step:
        key = f"agreement/{message.agreement_id}"
        if key in rows:
            return NOTHING
        changes = Draft(rows)
        changes.put(key, AgreementRow(
            message.agreement_id, message.role, message.requestor, message.provider, message.app_session_id,
            exe_unit=runtime_name(message.offer_properties),
        ))  # fmt: skip
        for held_key, held in rows.prefix("held/"):
            if held.agreement_id == message.agreement_id:
                changes.put(held_key, None)
                changes.do(Wake(f"held/{held.activity_id}", None))
                if message.role == PROVIDER and held.requestor == message.requestor:
                    self._begin(changes, held.activity_id, held.agreement_id, held.timeout_s, meta)
        return changes.step()

    def _agreement_ended(self, changes: Draft, message: AgreementEnded, meta: Meta) -> None:
        key = f"agreement/{message.agreement_id}"
        agreement = changes.get(key)
        if agreement is None or agreement.ended:
            return
        changes.put(key, msgspec.structs.replace(agreement, ended=True))
        for activity_id in agreement.activities:
            self._ask_to_end(changes, activity_id, meta)
        self._keep(changes, message.agreement_id, self._keep_agreement_s, meta)

    def _keep(self, changes: Draft, agreement_id: str, time_s: float, meta: Meta) -> None:
        changes.do(Wake(f"agreement/{agreement_id}", meta.now + time_s, AgreementForgotten(agreement_id)))

    def _forget(self, changes: Draft, agreement_id: str, meta: Meta) -> None:
        """Delete an agreement that is long over, and its activities; their results went before."""
        agreement: AgreementRow | None = changes.get(f"agreement/{agreement_id}")
        if agreement is None:
            return
        activities = [changes.get(f"activity/{activity_id}") for activity_id in agreement.activities]
        if any(row is not None and not row.ended for row in activities):
            self._keep(changes, agreement_id, KEEP_S, meta)
            return
        changes.put(f"agreement/{agreement_id}", None)
        for activity_id in agreement.activities:
            changes.put(f"activity/{activity_id}", None)

    # -- the requestor's side
    def _create(self, rows: Rows, message: CreateActivity, meta: Meta) -> Step:
        agreement: AgreementRow | None = rows.get(f"agreement/{message.agreement_id}")
        if agreement is None:
            return refuse("bad_request", f"agreement {message.agreement_id} is not approved")
        if agreement.role != REQUESTOR:
            return refuse("forbidden", f"not the requestor of agreement {message.agreement_id}")
        if agreement.ended:
            return refuse("bad_request", f"agreement {message.agreement_id} is not approved: it is terminated")
        if agreement.provider == self._me:
            return refuse("conflict", "a node cannot be its own provider")
        if f"activity/{message.activity_id}" in rows:
            return Step(effects=[Reply(Done(message.activity_id))])
        if len(agreement.activities) >= MAX_ACTIVITIES:
            return refuse("conflict", f"agreement {message.agreement_id} has had {MAX_ACTIVITIES} activities")
        timeout_s = bounded_timeout(message.timeout_s)
        row = ActivityRow(
            message.activity_id, agreement.agreement_id, REQUESTOR, agreement.requestor, agreement.provider, meta.now
        )
        grown = msgspec.structs.replace(agreement, activities=(*agreement.activities, row.activity_id))
        request = ActivityRequested(row.activity_id, row.agreement_id, timeout_s)
        return Step(
            {f"activity/{row.activity_id}": row, f"agreement/{row.agreement_id}": grown},
            [
                Reply(Done(row.activity_id)),
                Send("ledger", ActivityKnown(row.activity_id, row.agreement_id, meta.now)),
                Send(address(row.provider, self.name), request, timeout_s + CREATE_MARGIN_S),
                Wake(f"create/{row.activity_id}", meta.now + timeout_s + 2 * CREATE_MARGIN_S, CreateExpired(row.activity_id)),
                Emit(f"activity/{row.activity_id}", ActivityChanged("New")),
            ],
        )

    def _destroy(self, rows: Rows, activity_id: str, meta: Meta) -> Step:
        row: ActivityRow | None = rows.get(f"activity/{activity_id}")
        if row is None:
            return refuse("unknown", f"no such activity: {activity_id}")
        if row.role != REQUESTOR:
            return refuse("forbidden", f"not the requestor of activity {activity_id}")
        changes = Draft(rows)
        self._ask_to_end(changes, activity_id, meta)
        changes.do(Reply(Done(activity_id)))
        return changes.step()

    def _exec(self, rows: Rows, message: Exec, meta: Meta) -> Step:
        row: ActivityRow | None = rows.get(f"activity/{message.activity_id}")
        if row is None:
            return refuse("unknown", f"no such activity: {message.activity_id}")
        if row.role != REQUESTOR:
            return refuse("forbidden", f"not the requestor of activity {message.activity_id}")
        key = batch_key(message.activity_id, message.batch_id)
        if key in rows:
            return Step(effects=[Reply(Done(message.batch_id))])
        if row.ended:
            return refuse("unreachable", f"activity {message.activity_id} is terminated")
        if len(row.unfinished) >= MAX_UNFINISHED:
            return refuse("busy", f"activity {message.activity_id} has {MAX_UNFINISHED} unfinished batches")
        try:
            size = len(parse_script(message.script))
        except ScriptError as error:
            return refuse("bad_request", f"Bad request: {error}")
        waiting = msgspec.structs.replace(row, unfinished=(*row.unfinished, message.batch_id))
        run = RunBatch(message.activity_id, message.batch_id, message.script)
        batch = BatchRow(message.batch_id, row.activity_id, size, begun_at=meta.now)
        return Step(
            {f"activity/{row.activity_id}": waiting, key: batch},
            [
                Reply(Done(message.batch_id)),
                Send(address(row.provider, f"exeunit:{row.activity_id}"), run, REQUEST_DEADLINE_S),
            ],
        )

    def _state_changed(self, changes: Draft, message: StateChanged, meta: Meta) -> None:
        row = self._peers_activity(changes, message.activity_id, meta)
        if row is None or row.ended:
            return
        if message.state != "Terminated" and message.at < row.state_at:
            return  # a result of the exe-unit has told more already
        self._set_state(changes, row, message, meta)

    def _usage_changed(self, rows: Rows, message: UsageChanged, meta: Meta) -> Step:
        row = self._peers_activity(Draft(rows), message.activity_id, meta)
        if row is None or row.ended:
            return NOTHING
        updated = msgspec.structs.replace(row, usage=check_usage(message.usage), usage_at=sane(message.at, meta.now))
        return Step({f"activity/{row.activity_id}": updated})

    def _peers_activity(self, changes: Draft, activity_id: str, meta: Meta) -> ActivityRow | None:
        """Return the requestor's row if the sender is the provider's activity actor; None if there is no such row."""
        row: ActivityRow | None = changes.get(f"activity/{activity_id}")
        if row is None:
            return None
        if row.role != REQUESTOR or meta.sender != address(row.provider, self.name):
            raise Violation(f"{meta.sender} is not the provider of activity {activity_id}")
        return row

    def _result(self, changes: Draft, message: CommandResult, meta: Meta) -> None:
        row: ActivityRow | None = changes.get(f"activity/{message.activity_id}")
        batch: BatchRow | None = changes.get(batch_key(message.activity_id, message.batch_id))
        if row is None or batch is None:
            return  # long over, and forgotten
        if row.role != REQUESTOR or meta.sender != address(row.provider, f"exeunit:{row.activity_id}"):
            raise Violation(f"{meta.sender} is not the exe-unit of activity {row.activity_id}")
        if batch.finished or message.index < batch.have:
            return
        if message.index != batch.have or message.index >= batch.size:
            raise Violation(f"result {message.index} of a batch that has {batch.have} of {batch.size} results")
        at = sane(message.at, meta.now)
        if message.state in LIVE_STATES and not row.ended and at >= row.state_at:
            row = msgspec.structs.replace(row, state=message.state, pending=None, state_at=at)
            changes.put(f"activity/{row.activity_id}", row)
            changes.do(Emit(f"activity/{row.activity_id}", ActivityChanged(row.state)))
        self._store(changes, row, batch, message, meta)

    def _store(self, changes: Draft, row: ActivityRow, batch: BatchRow, result: CommandResult, meta: Meta) -> None:
        finished = not result.ok or result.is_last or result.index + 1 == batch.size
        room = min(MAX_OUTPUT_BYTES, max(0, MAX_BATCH_OUTPUT_BYTES - batch.stored_bytes))
        out, err = check_output(result.stdout), check_output(result.stderr)
        stdout, stderr, text = fit_output(out, err, result.message, room)
        changes.put(
            result_key(batch.batch_id, result.index),
            ResultRow(result.index, result.ok, stdout or None, stderr or None, text, sane(result.at, meta.now), finished),
        )
        changes.put(
            batch_key(row.activity_id, batch.batch_id),
            msgspec.structs.replace(
                batch,
                have=result.index + 1,
                finished=finished,
                stored_bytes=batch.stored_bytes + output_size(stdout) + output_size(stderr),
            ),
        )
        changes.do(Emit(f"batch/{batch.batch_id}", ResultArrived(result.index, finished)))
        if finished:
            left = tuple(other for other in row.unfinished if other != batch.batch_id)
            changes.put(f"activity/{row.activity_id}", msgspec.structs.replace(row, unfinished=left))
            forget = BatchExpired(row.activity_id, batch.batch_id)
            changes.do(Wake(f"batch/{batch.batch_id}", meta.now + KEEP_S, forget))

    # -- the provider's side
    def _requested(self, rows: Rows, message: ActivityRequested, meta: Meta) -> Step:
        check_id(message.activity_id)
        sender = node_of(meta.sender)
        row: ActivityRow | None = rows.get(f"activity/{message.activity_id}")
        if row is not None:
            if row.role != PROVIDER or row.requestor != sender or row.agreement_id != message.agreement_id:
                raise Violation(f"activity {message.activity_id} belongs to somebody else")
            return NOTHING
        timeout_s = bounded_timeout(message.timeout_s)
        agreement: AgreementRow | None = rows.get(f"agreement/{message.agreement_id}")
        if agreement is None:
            return self._hold(rows, HeldRow(message.activity_id, message.agreement_id, sender, timeout_s), meta)
        if agreement.role != PROVIDER or agreement.requestor != sender:
            raise Violation(f"{sender} is not the requestor of agreement {message.agreement_id}")
        if agreement.ended or len(agreement.activities) >= MAX_ACTIVITIES:
            reason = "agreement terminated" if agreement.ended else f"over {MAX_ACTIVITIES} activities"
            return self._turn_down(message.activity_id, sender, reason)
        changes = Draft(rows)
        self._begin(changes, message.activity_id, message.agreement_id, timeout_s, meta)
        return changes.step()

    def _hold(self, rows: Rows, held: HeldRow, meta: Meta) -> Step:
        """Keep a request for a moment: the news of its agreement may still be on its way inside this node."""
        key = f"held/{held.activity_id}"
        if key in rows or len(held.agreement_id) > 200:
            return NOTHING
        waiting = [other.requestor for _, other in rows.prefix("held/")]
        if len(waiting) >= MAX_HELD or waiting.count(held.requestor) >= MAX_HELD_PER_NODE:
            return self._turn_down(held.activity_id, held.requestor, "agreement not approved")
        return Step({key: held}, [Wake(key, meta.now + HELD_S, HeldExpired(held.activity_id))])

    def _held_expired(self, rows: Rows, activity_id: str) -> Step:
        held: HeldRow | None = rows.get(f"held/{activity_id}")
        if held is None:
            return NOTHING
        refusal = self._turn_down(activity_id, held.requestor, "agreement not approved")
        return Step({f"held/{activity_id}": None}, refusal.effects)

    def _turn_down(self, activity_id: str, requestor: str, reason: str) -> Step:
        told = StateChanged(activity_id, "Terminated", reason=reason)
        return Step(effects=[Send(address(requestor, self.name), told, REQUEST_DEADLINE_S)])

    def _begin(self, changes: Draft, activity_id: str, agreement_id: str, timeout_s: float, meta: Meta) -> None:
        agreement: AgreementRow = changes.get(f"agreement/{agreement_id}")
        row = ActivityRow(activity_id, agreement_id, PROVIDER, agreement.requestor, agreement.provider, meta.now)
        changes.put(f"activity/{activity_id}", row)
        changes.put(
            f"agreement/{agreement_id}", msgspec.structs.replace(agreement, activities=(*agreement.activities, activity_id))
        )
        event = ActivityEvent(activity_id, agreement_id, "CreateActivity", agreement.app_session_id)
        changes.do(
            Send("ledger", ActivityKnown(activity_id, agreement_id, meta.now)),
            Emit("activities", event),
            Emit(f"activity/{activity_id}", ActivityChanged("New")),
            Wake(f"create/{activity_id}", meta.now + timeout_s + CREATE_MARGIN_S, CreateExpired(activity_id)),
        )

    def _destroy_requested(self, changes: Draft, activity_id: str, meta: Meta) -> None:
        held: HeldRow | None = changes.get(f"held/{activity_id}")
        if held is not None and held.requestor == node_of(meta.sender):
            changes.put(f"held/{activity_id}", None)
            changes.do(Wake(f"held/{activity_id}", None))
        row: ActivityRow | None = changes.get(f"activity/{activity_id}")
        if row is None:
            told = StateChanged(check_id(activity_id), "Terminated", reason="no such activity")
            changes.do(Send(meta.sender, told, REQUEST_DEADLINE_S))
            return
        if row.role != PROVIDER or row.requestor != node_of(meta.sender):
            raise Violation(f"{meta.sender} is not the requestor of activity {activity_id}")
        if row.ended:
            changes.do(self._tell_requestor(row))
        else:
            self._ask_to_end(changes, activity_id, meta)

    def _reported(self, rows: Rows, message: StateReported, meta: Meta) -> Step:
        row = self._own_activity(rows, message.activity_id, meta)
        by_edge = actor_of(meta.sender) == "edge"
        if isinstance(row, Refused):
            return Step(effects=[Reply(row)])
        changes = Draft(rows)
        if by_edge:
            changes.do(Reply(Done(message.activity_id)))
        if not row.ended:
            self._set_state(changes, row, message, meta)
            if not by_edge and message.state != "Terminated":
                self._listen(changes, row.activity_id, self._unresponsive_s, meta)
        return changes.step()

    def _usage_reported(self, rows: Rows, message: UsageReported, meta: Meta) -> Step:
        row = self._own_activity(rows, message.activity_id, meta)
        if isinstance(row, Refused):
            return Step(effects=[Reply(row)])
        if row.ended:
            return NOTHING
        changes = Draft(rows)
        self._listen(changes, row.activity_id, self._unresponsive_s, meta)
        if row.state == "Unresponsive":
            back = StateReported(row.activity_id, row.silent_from, usage=message.usage, at=meta.now)
            self._set_state(changes, row, back, meta)
            return changes.step()
        at = sane(message.at, meta.now)
        updated = msgspec.structs.replace(row, usage=check_usage(message.usage), usage_at=at)
        changes.put(f"activity/{row.activity_id}", updated)
        told = UsageChanged(row.activity_id, message.usage, at)
        changes.do(Send(address(row.requestor, self.name), told, USAGE_DEADLINE_S))
        return changes.step()

    def _listen(self, changes: Draft, activity_id: str, time_s: float, meta: Meta) -> None:
        """Expect a word of the exe-unit within this time."""
        due = meta.now + time_s
        changes.do(Wake(f"silence/{activity_id}", due, UnitSilent(activity_id, due)))

    def _silent(self, changes: Draft, activity_id: str, due: float, meta: Meta) -> None:
        """Nothing was heard of the exe-unit for long: say so, and end the activity when it lasts."""
        row: ActivityRow | None = changes.get(f"activity/{activity_id}")
        if row is None or row.ended or row.destroying:
            return
        if meta.now - due > LATE_S:
            self._listen(changes, activity_id, self._unresponsive_s, meta)
        elif row.state == "Unresponsive":
            self._ask_to_end(changes, activity_id, meta)
        else:
            text = f"nothing was heard of the exe-unit for {self._unresponsive_s:g} s"
            silence = StateReported(activity_id, "Unresponsive", error_message=text, at=meta.now)
            self._set_state(changes, msgspec.structs.replace(row, silent_from=row.state), silence, meta)
            self._listen(changes, activity_id, self._inactivity_s - self._unresponsive_s, meta)

    def _own_activity(self, rows: Rows, activity_id: str, meta: Meta) -> ActivityRow | Refused:
        """Return the provider's row if an edge or the activity's own exe-unit says something of it."""
        row: ActivityRow | None = rows.get(f"activity/{activity_id}")
        if actor_of(meta.sender) not in ("edge", f"exeunit:{activity_id}"):
            raise Violation(f"{meta.sender} may not report on activity {activity_id}")
        if row is None:
            return Refused("unknown", f"no such activity: {activity_id}")
        if row.role != PROVIDER:
            return Refused("forbidden", f"not the provider of activity {activity_id}")
        return row

    # -- both sides
    def _set_state(self, changes: Draft, row: ActivityRow, news: StateReported | StateChanged, meta: Meta) -> None:
        if news.state not in STATES or (news.pending is not None and news.pending not in STATES):
            raise Violation(f"not a state of an activity: {news.state[:64]!r}, {str(news.pending)[:64]!r}")
        at, was = sane(news.at, meta.now), row
        if news.usage is not None:
            usage_at = sane(news.usage_at, meta.now) if isinstance(news, StateChanged) else at
            row = msgspec.structs.replace(row, usage=check_usage(news.usage), usage_at=usage_at)
        row = msgspec.structs.replace(
            row,
            state=news.state,
            state_at=at,
            pending=news.pending,
            reason=news.reason and news.reason[:MAX_TEXT],
            error_message=news.error_message and news.error_message[:MAX_TEXT],
        )
        if row.ended and was.state == "Unresponsive":
            row = msgspec.structs.replace(row, error_message=row.error_message or was.error_message)
        changes.put(f"activity/{row.activity_id}", row)
        changes.do(Emit(f"activity/{row.activity_id}", ActivityChanged(row.state)))
        if row.state != "New":
            changes.do(Wake(f"create/{row.activity_id}", None))
        if row.role == PROVIDER:
            changes.do(self._tell_requestor(row))
        if row.ended:
            self._wind_up(changes, row, meta)

    def _wind_up(self, changes: Draft, row: ActivityRow, meta: Meta) -> None:
        """The activity is over: no timer is left, and no batch stays without its last result."""
        changes.do(Send("ledger", ActivityOver(row.activity_id, meta.now)))
        changes.do(Wake(f"destroy/{row.activity_id}", None))
        changes.do(Wake(f"silence/{row.activity_id}", None))
        changes.do(Wake(f"feed/{row.activity_id}", meta.now + KEEP_S, FeedExpired(row.activity_id)))
        why = ": ".join(text for text in (row.reason, row.error_message) if text) or "no reason given"
        for batch_id in row.unfinished:
            current: ActivityRow = changes.get(f"activity/{row.activity_id}")
            batch: BatchRow | None = changes.get(batch_key(row.activity_id, batch_id))
            if batch is None or batch.finished:
                continue
            message = f"activity terminated: {why}"
            last = CommandResult(row.activity_id, batch_id, batch.have, False, None, None, message, meta.now, is_last=True)
            self._store(changes, current, batch, last, meta)

    def _tell_requestor(self, row: ActivityRow) -> Send:
        told = StateChanged(
            row.activity_id, row.state, row.pending, row.reason, row.error_message, row.usage, row.state_at, row.usage_at
        )
        return Send(address(row.requestor, self.name), told)

    def _ask_to_end(self, changes: Draft, activity_id: str, meta: Meta) -> None:
        """Begin to end a live activity; once is enough."""
        row: ActivityRow | None = changes.get(f"activity/{activity_id}")
        if row is None or row.ended or row.destroying:
            return
        changes.put(f"activity/{activity_id}", msgspec.structs.replace(row, destroying=True))
        if row.role == REQUESTOR:
            wait_s = REQUEST_DEADLINE_S
            request = DestroyRequested(activity_id)
            changes.do(Send(address(row.provider, self.name), request, wait_s))
        else:
            wait_s = DESTROY_PATIENCE_S
            session = changes.get(f"agreement/{row.agreement_id}").app_session_id
            changes.do(Emit("activities", ActivityEvent(activity_id, row.agreement_id, "DestroyActivity", session)))
        changes.do(Wake(f"create/{activity_id}", None))
        changes.do(Wake(f"destroy/{activity_id}", meta.now + wait_s, DestroyExpired(activity_id)))

    def _create_expired(self, changes: Draft, activity_id: str, meta: Meta) -> None:
        row: ActivityRow | None = changes.get(f"activity/{activity_id}")
        if row is not None and row.state == "New":
            self._ask_to_end(changes, activity_id, meta)

    def _destroy_expired(self, changes: Draft, activity_id: str, meta: Meta) -> None:
        row: ActivityRow | None = changes.get(f"activity/{activity_id}")
        if row is None or row.ended:
            return
        silent = "the provider" if row.role == REQUESTOR else "the exe-unit and the agent"
        self._end(changes, row, "destroyed", f"{silent} did not confirm the end", meta)

    def _end(self, changes: Draft, row: ActivityRow, reason: str, error_message: str, meta: Meta) -> None:
        over = StateChanged(row.activity_id, "Terminated", reason=reason, error_message=error_message)
        self._set_state(changes, row, over, meta)

    def _undelivered(self, changes: Draft, message: Undelivered, meta: Meta) -> None:
        lost = _SENT(message.body)
        if not isinstance(lost, ActivityRequested | DestroyRequested | RunBatch):
            return
        row: ActivityRow | None = changes.get(f"activity/{lost.activity_id}")
        if row is None or row.ended or row.role != REQUESTOR:
            return
        if isinstance(lost, RunBatch | ActivityRequested):
            # it may have arrived all the same, or its exe-unit is gone while the node is there: let go of it there too
            request = DestroyRequested(row.activity_id)
            changes.do(Send(address(row.provider, self.name), request, REQUEST_DEADLINE_S))
        self._end(changes, row, UNREACHABLE, message.reason, meta)

    def _tell_again(self, changes: Draft, peer: str) -> None:
        """A disk went back in time, here or there: say again how activities stand, and which are to end."""
        for _, row in list(changes.prefix("activity/")):
            if row.role == PROVIDER and row.requestor == peer:
                changes.do(self._tell_requestor(row))
            elif row.role == REQUESTOR and row.provider == peer and row.destroying and not row.ended:
                changes.do(Send(address(peer, self.name), DestroyRequested(row.activity_id), REQUEST_DEADLINE_S))


__all__ = ["Activity", "ActivityRow", "AgreementRow", "BatchRow", "ResultRow", "batch_key", "result_key"]
