"""Activity API: create, script, watch and destroy activities (requestor); events and states of exe-units (provider).

State, agreement and results are read from rows of this node; only a running command, live usage and streamed output ask
the exe-unit. Neighbours: `actors/activity/machine.py`; `golem/rest/activity_stream.py` for what stays open.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import msgspec
import trio
from quart import Blueprint, Response, request

from actors.activity.rows import ActivityAgreementRow, ActivityRow, BatchRow, ResultRow, batch_key, result_key
from golem.net.types import NetError
from golem.rest.activity_stream import monitor, stream_events
from golem.rest.edge import (
    ApiError,
    ask,
    json_body,
    listed,
    member,
    null,
    object_body,
    query_float,
    query_int,
    query_text,
    query_time,
    respond_json,
    until,
)
from golem.rest.repeatable import fresh_id, repeatable, undone_if_unheard
from protocol.activity import (
    ActivityEvent,
    CreateActivity,
    DestroyActivity,
    Exec,
    StateReported,
)
from protocol.codec import Decoder
from protocol.live import AskRunning, AskUsage, decode_running, decode_usage
from protocol.states import ActivityEnd, ActivityState, Role
from protocol.types import Violation, timestamp_text

if TYPE_CHECKING:
    from golem.node.node import Node

DEFAULT_TIMEOUT_S = 5.0
LIVE_TIMEOUT_S = 1.0
RETRIES_S, MAX_TOLD = 20.0, 1000  # see `Patience`; batches whose agents were told
FRESH_USAGE_S = 1.0
MAX_EVENTS = 100
PAGE = 200
UNREACHABLE = "GSB error: Bad request: endpoint address not found"  # SDKs look for these words, and try again
STATES = tuple(ActivityState)
EVENT_STREAM = "text/event-stream"
_AGREEMENT_ID = re.compile(r"(?:[RP]-)?([0-9a-f]{64})\Z")
_event = Decoder[ActivityEvent](ActivityEvent)


def blueprint(node: Node) -> Blueprint:
    """Return the activity API of `node`."""
    api = Blueprint("activity", __name__, url_prefix="/activity-api/v1")
    _lifecycle(api, node)
    _scripts(api, node)
    _reads(api, node)
    _provider(api, node)
    _not_here(api)
    return api


# -- looking up
def find(node: Node, activity_id: str, role: str | None = None) -> ActivityRow:
    """Return an activity's row. Raises `ApiError`: 500 in agents' words for an unknown one, 403 on the wrong side."""
    row: ActivityRow | None = node.system.rows("activity").get(f"activity/{activity_id[:64]}")
    if row is None:
        raise ApiError(500, f"DAO error: Not found: agreement id for activity: {activity_id[:64]}")
    if role is not None and row.role != role:
        raise ApiError(403, f"only the {role.lower()} of activity {activity_id[:64]} may do this")
    return row


def find_batch(node: Node, activity_id: str, batch_id: str) -> BatchRow:
    """Return a batch's row. Raises `ApiError`."""
    find(node, activity_id, Role.REQUESTOR)
    row: BatchRow | None = node.system.rows("activity").get(batch_key(activity_id, batch_id[:64]))
    if row is None:
        raise ApiError(404, f"Not found: batch_id = {batch_id[:64]}")
    return row


def not_gone(row: ActivityRow) -> ActivityRow:
    """Return the row. Raises `ApiError` where nothing has been heard of the exe-unit for so long that agents should move on."""
    if row.is_gone:
        raise ApiError(500, f"{UNREACHABLE} ({row.error_message})")
    return row


class Patience:
    """How long agents that ask for results are told that trying again may help (500); then it is over for them (410).

    yapapi and golem-core give up after nine seconds of 500; golem-js tries a 500 again for five minutes and ends at once on 410.
    """

    def __init__(self) -> None:
        self._since: OrderedDict[str, float] = OrderedDict()

    def check(self, row: ActivityRow, batch_id: str) -> None:
        """Raise `ApiError` where the exe-unit cannot be reached."""
        try:
            not_gone(row)
        except ApiError as error:
            since = self._since.setdefault(batch_id, trio.current_time())
            if len(self._since) > MAX_TOLD:
                self._since.popitem(last=False)
            if trio.current_time() - since < RETRIES_S:
                raise
            raise ApiError(410, error.message) from None
        self._since.pop(batch_id, None)


# -- create and destroy
def _lifecycle(api: Blueprint, node: Node) -> None:
    @api.post("/activity")
    @repeatable(node)
    async def create() -> Response:
        body = await json_body()
        timeout_s = query_float("timeout", DEFAULT_TIMEOUT_S)
        as_object = isinstance(body, dict)
        named = member(body, "agreementId", str) if isinstance(body, dict) else body
        match = _AGREEMENT_ID.match(named) if isinstance(named, str) else None
        if match is None:
            raise ApiError(400, f"expected an agreement id, got {str(named)[:120]!r}")
        activity_id = fresh_id(node)

        def probe() -> ActivityRow | None:
            row = find(node, activity_id)
            return row if row.state != ActivityState.NEW else None

        undone_if_unheard("activity", DestroyActivity(activity_id), always=True)
        await ask(node, "activity", CreateActivity(activity_id, match[1], timeout_s))
        row = await until(node, [f"activity/{activity_id}"], probe, timeout_s)
        if row is None:
            await ask(node, "activity", DestroyActivity(activity_id))
            raise ApiError(408, "Timeout")
        if row.ended:
            why = ": ".join(text for text in (row.reason, row.error_message) if text)
            if row.reason == ActivityEnd.UNREACHABLE:
                raise ApiError(500, f"{UNREACHABLE} ({why})")
            raise ApiError(500, f"Activity {activity_id} was abruptly terminated: {why}")
        return respond_json({"activityId": activity_id} if as_object else activity_id)

    @api.delete("/activity/<activity_id>")
    async def destroy(activity_id: str) -> Response:
        timeout_s = query_float("timeout", DEFAULT_TIMEOUT_S)
        find(node, activity_id, Role.REQUESTOR)
        await ask(node, "activity", DestroyActivity(activity_id))

        def probe() -> bool | None:
            return find(node, activity_id).ended or None

        if not await until(node, [f"activity/{activity_id}"], probe, timeout_s):
            raise ApiError(408, "Timeout")
        return null()


# -- scripts and results
def _scripts(api: Blueprint, node: Node) -> None:
    patience = Patience()

    @api.post("/activity/<activity_id>/exec")
    async def execute(activity_id: str) -> Response:
        script = member(await object_body(), "text", str)
        find(node, activity_id, Role.REQUESTOR)
        batch_id = node.new_id()
        try:
            await ask(node, "activity", Exec(batch_id, activity_id, script))
        except ApiError as error:
            if error.status == 500:
                error = ApiError(500, f"{UNREACHABLE} ({error.message})")
            raise error from None
        return respond_json(batch_id)

    @api.get("/activity/<activity_id>/exec/<batch_id>")
    async def results(activity_id: str, batch_id: str) -> Response:
        batch = find_batch(node, activity_id, batch_id)
        if not batch.finished:
            patience.check(find(node, activity_id), batch_id)
        if request.headers.get("Accept", "").strip() == EVENT_STREAM:
            return stream_events(node, find(node, activity_id), batch_id, request.headers.get("Last-Event-ID", ""))
        timeout_s = query_float("timeout", 0.0)
        wanted = query_int("commandIndex", -1, 0, 1_000_000)

        def probe() -> BatchRow | None:
            batch = find_batch(node, activity_id, batch_id)
            if batch.finished or -1 < wanted < batch.have:
                return batch
            patience.check(find(node, activity_id), batch_id)
            return None

        found = await until(node, [f"batch/{batch_id}", f"activity/{activity_id}"], probe, timeout_s)
        if found is None and wanted >= 0:
            raise ApiError(408, "Timeout")
        return respond_json(result_list(node, find_batch(node, activity_id, batch_id), wanted))

    @api.get("/activity/<activity_id>/command")
    async def running(activity_id: str) -> Response:
        row = not_gone(find(node, activity_id, Role.REQUESTOR))
        try:
            text = decode_running(await node.ask_exeunit(row, AskRunning(), LIVE_TIMEOUT_S))
        except (NetError, Violation) as error:
            raise ApiError(500, f"{UNREACHABLE} ({error})") from None
        try:
            command = msgspec.json.decode(text, type=dict[str, Any]) if isinstance(text, str) else {}
        except (msgspec.DecodeError, RecursionError):
            command = {}
        if not command:
            raise ApiError(404, "no command is running")
        return respond_json([{"command": name[:40].capitalize()} for name in command])


def result_list(node: Node, batch: BatchRow, wanted: int = -1) -> list[dict[str, Any]]:
    """Return results 0 to `wanted` (-1: all) of a batch as agents read them; with `wanted` only that one has output."""
    rows = node.system.rows("activity")
    last = batch.have - 1 if wanted < 0 else min(wanted, batch.have - 1)
    found = []
    for index in range(last + 1):
        result: ResultRow = rows[result_key(batch.batch_id, index)]
        shown = wanted < 0 or index == wanted
        found.append(
            {
                "index": index,
                "eventDate": timestamp_text(result.at),
                "result": "Ok" if result.ok else "Error",
                "stdout": _output(result.stdout) if shown else None,
                "stderr": _output(result.stderr) if shown else None,
                "message": result.message,
                "isBatchFinished": result.batch_finished or index == wanted,
            }
        )
    return found


def _output(output: Any) -> Any:
    return list(output) if isinstance(output, bytes) else output


# -- what is known of an activity
def _reads(api: Blueprint, node: Node) -> None:
    @api.get("/activity")
    async def list_activities() -> Response:
        rows = node.system.rows("activity")
        named = query_text("agreementId")
        if named is None:
            return respond_json([row.activity_id for row in listed(node, "activity", "activity/")])
        match = _AGREEMENT_ID.match(named)
        agreement: ActivityAgreementRow | None = rows.get(f"agreement/{match[1]}") if match else None
        return respond_json(list(agreement.activities) if agreement else [])

    @api.get("/activity/<activity_id>/state")
    async def state(activity_id: str) -> Response:
        row = not_gone(find(node, activity_id))
        shown: dict[str, Any] = {"state": [row.state, row.pending]}
        if row.reason is not None:
            shown["reason"] = row.reason
        if row.error_message is not None:
            shown["errorMessage"] = row.error_message
        return respond_json(shown)

    @api.get("/activity/<activity_id>/usage")
    async def usage(activity_id: str) -> Response:
        row = find(node, activity_id)
        values, at = row.usage, row.usage_at or row.created_at
        if not row.ended and row.state != ActivityState.NEW and node.clock() - at > FRESH_USAGE_S:
            values, at = await _live_usage(node, row) or (values, at)
        shown: dict[str, Any] = {"timestamp": int(at)}
        if values is not None:
            shown["currentUsage"] = values
        return respond_json(shown)

    @api.get("/activity/<activity_id>/agreement")
    async def agreement(activity_id: str) -> Response:
        return respond_json(find(node, activity_id).agreement_id)


async def _live_usage(node: Node, row: ActivityRow) -> tuple[list[float], float] | None:
    """Return the counters now; None if the exe-unit cannot be asked."""
    try:
        usage = decode_usage(await node.ask_exeunit(row, AskUsage(), LIVE_TIMEOUT_S))
    except (NetError, Violation):
        return None
    if not 0 < usage.at < 1e11 or not all(0 <= value < 1e300 for value in usage.values):
        return None
    return usage.values, usage.at


# -- the provider's agent
def _provider(api: Blueprint, node: Node) -> None:
    @api.get("/events")
    async def events() -> Response:
        after = query_time("afterTimestamp")
        if after is None:
            raise ApiError(400, "missing query parameter `afterTimestamp`")
        session, limit = query_text("appSessionId"), query_int("maxEvents", MAX_EVENTS, 1, 1000)

        def probe() -> list[dict[str, Any]] | None:
            return _events_after(node, after, session, limit) or None

        found = await until(node, ["activities"], probe, query_float("timeout", DEFAULT_TIMEOUT_S))
        if found is None:
            raise ApiError(408, "Timeout")
        return respond_json(found)

    @api.put("/activity/<activity_id>/state")
    async def set_state(activity_id: str) -> Response:
        body = await object_body()
        pair = member(body, "state", list)
        if not 1 <= len(pair) <= 2 or pair[0] not in STATES or (len(pair) == 2 and pair[1] not in (None, *STATES)):
            raise ApiError(400, f"field `state`: expected a pair of {', '.join(STATES)} or null")
        find(node, activity_id, Role.PROVIDER)
        reported = StateReported(
            activity_id,
            ActivityState(pair[0]),
            None if pair[1:] in ([], [None]) else ActivityState(pair[1]),
            member(body, "reason", str, None),
            member(body, "errorMessage", str, None),
            at=node.clock(),
        )
        await ask(node, "activity", reported)
        return null()

    @api.get("/_monitor")
    async def watch() -> Response:
        return monitor(node)


def _events_after(node: Node, after: float, session: str | None, limit: int) -> list[dict[str, Any]]:
    """Return at most `limit` events of the agent's session (any, if None) strictly after a time."""
    found: list[dict[str, Any]] = []
    while page := node.system.feeds.read_after("activities", after, PAGE):
        for entry in page:
            after = entry.at
            event = _event(entry.body)
            if session is not None and event.app_session_id != session:
                continue
            found.append(
                {
                    "activityId": event.activity_id,
                    "agreementId": event.agreement_id,
                    "eventDate": timestamp_text(entry.at),
                    "eventType": {event.kind: {}},
                }
            )
            if len(found) == limit:
                return found
    return found


# -- what this node does not offer
def _not_here(api: Blueprint) -> None:
    @api.post("/activity/<activity_id>/encrypted")
    async def encrypted(activity_id: str) -> Response:
        raise ApiError(501, "encrypted calls need an enclave, which no runtime of this node offers")
