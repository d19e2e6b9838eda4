"""Activity API, what stays open: runtime events of a batch and the provider's monitor, as server-sent events.

A stream is never closed by us while its client stays, since SDKs take the end for an error; but where the exe-unit is gone
and results are missing, that is what it is, and who comes again is told so. Events come from the exe-unit's
live log, from the beginning or behind `Last-Event-ID`; where the exe-unit is gone, the ends of commands come from the
results that this node has.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import msgspec
import trio
from quart import Response

from actors.activity.rows import ActivityRow, BatchRow, ResultRow, batch_key, result_key
from golem.net.types import NetError
from golem.rest.edge import until
from protocol.live import FollowBatch, LiveEvent, decode_followed
from protocol.states import Role
from protocol.types import Violation, timestamp_text

if TYPE_CHECKING:
    from golem.node.node import Node

log = logging.getLogger("golem.rest")

PING_S = 15.0
FOLLOW_S = 7.5  # how long the exe-unit holds a question
FOLLOW_MARGIN_S = 5.0
AWAY_S = 2.0  # between attempts while the exe-unit cannot be reached
MONITOR_S = 1.0
PING = ":ping\n\n"


def _sse(chunks: AsyncIterator[str]) -> Response:
    response = Response(chunks, content_type="text/event-stream")
    response.timeout = None
    response.headers["Cache-Control"] = "no-cache"
    return response


def stream_events(node: Node, row: ActivityRow, batch_id: str, last_event_id: str) -> Response:
    """Return the runtime events of a batch behind `last_event_id` ("" is the beginning), replayed and live."""
    after = int(last_event_id) if last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) < 16 else -1
    return _sse(_Stream(node, row, batch_id, after).chunks())


class _Stream:
    """One client's stream of one batch."""

    def __init__(self, node: Node, row: ActivityRow, batch_id: str, after: int) -> None:
        self._node, self._row, self._batch_id, self._after = node, row, batch_id, after
        self._finished: set[int] = set()  # commands whose end was told
        self._key = batch_key(row.activity_id, batch_id)

    async def chunks(self) -> AsyncIterator[str]:
        yield PING  # the client sees that it is open
        sent_at = trio.current_time()
        while not self._node.system.feeds.closed and not self._is_lost():
            chunks = await self._more()
            for chunk in chunks:
                yield chunk
            if chunks:
                sent_at = trio.current_time()
            elif trio.current_time() - sent_at >= PING_S:
                yield PING
                sent_at = trio.current_time()

    async def _more(self) -> list[str]:
        """Return what has happened, waiting for it for a while."""
        batch = self._batch()
        if batch is None or (batch.finished and len(self._finished) >= batch.have):
            # nothing more will happen; the feed wakes us when the node stops
            await until(self._node, [f"activity/{self._row.activity_id}"], lambda: None, PING_S)
            return []
        events = await self._follow()
        if events:
            return [self._render(event) for event in events]
        if events is not None:
            return self._stored() if batch.finished else []
        stored = self._stored()
        if not stored:
            have = batch.have
            news = [f"batch/{self._batch_id}", f"activity/{self._row.activity_id}"]
            await until(self._node, news, lambda: None if self._have() == have else True, AWAY_S)
            stored = self._stored()
        return stored

    def _is_lost(self) -> bool:
        row, batch = self._node.activity(self._row.activity_id), self._batch()
        return row is not None and row.is_gone and batch is not None and not batch.finished

    def _batch(self) -> BatchRow | None:
        found: BatchRow | None = self._node.system.rows("activity").get(self._key)
        return found

    def _have(self) -> int:
        batch = self._batch()
        return batch.have if batch else 0

    async def _follow(self) -> list[LiveEvent] | None:
        """Ask the exe-unit, for as long as the node runs; None if it cannot be asked."""
        events: list[LiveEvent] | None = None

        async def stop() -> None:
            await self._node.stopping.wait()
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop)
            events = await self._ask_exeunit()
            nursery.cancel_scope.cancel()
        return events

    async def _ask_exeunit(self) -> list[LiveEvent] | None:
        batch = self._batch()
        wait_s = 0.0 if batch is not None and batch.finished else FOLLOW_S
        question = FollowBatch(self._batch_id, self._after, wait_s)
        try:
            return decode_followed(await self._node.ask_exeunit(self._row, question, wait_s + FOLLOW_MARGIN_S))
        except NetError as error:
            log.debug("live events of %s: %s", self._row.activity_id, error)
        except Violation:
            log.warning("the exe-unit of %s answers nonsense", self._row.activity_id)
        return None

    def _render(self, event: LiveEvent) -> str:
        self._after = max(self._after, event.id)
        try:
            kind = msgspec.json.decode(event.kind)
        except (msgspec.DecodeError, RecursionError):
            kind = {"stderr": "(malformed event)"}
        if isinstance(kind, dict) and "finished" in kind:
            self._finished.add(event.index)
        return self._text(event.id, event.index, event.at, kind)

    def _stored(self) -> list[str]:
        """Return the ends of commands that were not told, from the results that are here."""
        rows = self._node.system.rows("activity")
        chunks = []
        for index in range(self._have()):
            result: ResultRow | None = rows.get(result_key(self._batch_id, index))
            if result is None or index in self._finished:
                continue
            self._finished.add(index)
            self._after += 1
            kind = {"finished": {"return_code": 0 if result.ok else 1, "message": result.message}}
            chunks.append(self._text(self._after, index, result.at, kind))
        return chunks

    def _text(self, number: int, index: int, at: float, kind: Any) -> str:
        when = timestamp_text(at if 0 < at < 1e11 else self._node.clock())[:-1]  # naive, as SDKs know it
        data = {"batch_id": self._batch_id, "index": index, "timestamp": when, "kind": kind}
        return f"event: runtime\ndata: {json.dumps(data)}\nid: {number}\n\n"


def monitor(node: Node) -> Response:
    """Return the provider's activities once a second."""
    return _sse(_monitor(node))


async def _monitor(node: Node) -> AsyncIterator[str]:
    while not node.system.feeds.closed:
        rows = node.system.rows("activity")
        shown = []
        for _, row in node.system.listed("activity", "activity/")[0]:
            if row.role != Role.PROVIDER or row.ended:
                continue
            agreement = rows.get(f"agreement/{row.agreement_id}")
            entry = {
                "id": row.activity_id,
                "state": row.state,
                "exeUnit": agreement.exe_unit if agreement else "",
                "agreementId": row.agreement_id,
            }
            shown.append(entry if row.usage is None else {**entry, "usage": row.usage})
        yield f"data: {json.dumps({'ts': timestamp_text(node.clock()), 'activities': shown})}\r\n\r\n"
        with trio.move_on_after(MONITOR_S):
            await node.stopping.wait()
