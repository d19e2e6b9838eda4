"""What happens in an activity, as it happens: the source of streamed results, beside the journal.

Events of a batch count from 0. They are kept in memory, within bounds, so that a reader who comes late or comes back
goes on where it was; the oldest go first when there are too many.
"""

from __future__ import annotations

import json
from collections import deque
from itertools import islice
from typing import Any

import trio

from protocol.live import LiveEvent, WatchedEvent

MAX_KEPT_BYTES = 16 << 20
MAX_REPLY_BYTES = 512 << 10
MAX_WAIT_S = 30.0
EVENT_OVERHEAD_BYTES = 64


class LiveLog:
    """Events of all batches of one activity."""

    def __init__(self) -> None:
        self._batches: dict[str, deque[LiveEvent]] = {}
        self._next_ids: dict[str, int] = {}
        self._order: deque[tuple[WatchedEvent, bool]] = deque()  # all of it, oldest first, and whether its batch has it too
        self._next_number = 0
        self._kept_bytes = 0
        self._news = trio.Event()

    def add(self, batch_id: str, index: int, at: float, kind: dict[str, Any], *, asked: bool = True) -> None:
        """Record an event of command `index`. One that its script did not ask for is there for `watch` alone."""
        text = json.dumps(kind, separators=(",", ":"))
        if asked:
            number = self._next_ids.get(batch_id, 0)
            self._next_ids[batch_id] = number + 1
            self._batches.setdefault(batch_id, deque()).append(LiveEvent(number, index, at, text))
        self._order.append((WatchedEvent(self._next_number, batch_id, index, at, text), asked))
        self._next_number += 1
        self._kept_bytes += len(text) + EVENT_OVERHEAD_BYTES
        while self._kept_bytes > MAX_KEPT_BYTES:
            oldest, in_batch = self._order.popleft()
            self._kept_bytes -= len(oldest.kind) + EVENT_OVERHEAD_BYTES
            if in_batch:
                self._batches[oldest.batch_id].popleft()
        self._news.set()
        self._news = trio.Event()

    def read(self, batch_id: str, after: int) -> list[LiveEvent]:
        """Return events with an id above `after`, at least one if there is one, else as many as fit a reply."""
        found: list[LiveEvent] = []
        size = 0
        for event in self._batches.get(batch_id, ()):
            if event.id <= after:
                continue
            size += len(event.kind) + EVENT_OVERHEAD_BYTES
            if found and size > MAX_REPLY_BYTES:
                break
            found.append(event)
        return found

    async def follow(self, batch_id: str, after: int, wait_s: float) -> list[LiveEvent]:
        """Return events above `after`, waiting for one at most `wait_s` (at most 30)."""
        with trio.move_on_after(min(max(wait_s, 0.0), MAX_WAIT_S)):
            while not (found := self.read(batch_id, after)):
                await self._news.wait()
            return found
        return self.read(batch_id, after)

    async def watch(self, after: int, wait_s: float) -> list[WatchedEvent]:
        """Return events of all batches with a number above `after`, waiting for one at most `wait_s` (at most 30)."""
        with trio.move_on_after(min(max(wait_s, 0.0), MAX_WAIT_S)):
            while not (found := self._watched(after)):
                await self._news.wait()
            return found
        return self._watched(after)

    def _watched(self, after: int) -> list[WatchedEvent]:
        found: list[WatchedEvent] = []
        size = 0
        first = self._next_number - len(self._order)
        for event, _ in islice(self._order, max(after + 1 - first, 0), None):
            size += len(event.kind) + EVENT_OVERHEAD_BYTES
            if found and size > MAX_REPLY_BYTES:
                break
            found.append(event)
        return found
