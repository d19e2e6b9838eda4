"""Feeds: durable sequences of events, written by one actor each, read by cursor, waited for without polling."""

from __future__ import annotations

import math

import trio

from actors.kernel.journal import Commit, Event, Journal

MICROSECOND = 1e-6


class Feeds:
    """All feeds of a journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._heads: dict[str, tuple[int, float]] = {}
        self._owners: dict[str, str] = {}
        self._waiting: dict[str, set[trio.Event]] = {}
        self._taking: dict[str, trio.Lock] = {}
        self.closed = False

    # -- reading
    def read(self, feed: str, after_seq: int = 0, limit: int = 100) -> list[Event]:
        """Return at most `limit` committed events behind sequence number `after_seq`."""
        return self._journal.events(feed, after_seq, limit)

    def read_after(self, feed: str, after_at: float, limit: int = 100) -> list[Event]:
        """Return at most `limit` committed events strictly later than `after_at` (seconds since the epoch)."""
        return self._journal.events_after(feed, after_at, limit)

    def watch(self, *feeds: str) -> trio.Event:
        """Return an event that is set when one of `feeds` gets news. Watch first, then read, then wait; then `unwatch`."""
        event = trio.Event()
        for feed in feeds:
            self._waiting.setdefault(feed, set()).add(event)
        return event

    def unwatch(self, event: trio.Event, *feeds: str) -> None:
        for feed in feeds:
            if waiting := self._waiting.get(feed):
                waiting.discard(event)
                if not waiting:
                    del self._waiting[feed]

    def close(self) -> None:
        """The process is stopping: long-polls end now instead of at their deadlines."""
        self.closed = True
        for waiting in self._waiting.values():
            for event in waiting:
                event.set()

    async def wait(self, feed: str, after_seq: int, timeout_s: float) -> bool:
        """Return whether `feed` has events behind `after_seq`, waiting at most `timeout_s` for one."""
        with trio.move_on_after(timeout_s):
            while True:
                event = self.watch(feed)
                try:
                    if self.read(feed, after_seq, 1):
                        return True
                    await event.wait()
                finally:
                    self.unwatch(event, feed)
        return bool(self.read(feed, after_seq, 1))

    async def take(self, feed: str, limit: int = 100) -> list[Event]:
        """Read and delete the first events of a feed, durably: each event is handed out once."""
        lock = self._taking.setdefault(feed, trio.Lock())
        try:
            async with lock:
                events = self.read(feed, 0, limit)
                if events:
                    with trio.CancelScope(shield=True):  # deleted and delivered, or neither
                        await self._journal.commit(Commit("", taken=[(feed, event.seq) for event in events]))
                return events
        finally:
            if not lock.locked():
                self._taking.pop(feed, None)

    # -- writing (the kernel)
    def advance(self, owner: str, feed: str, now: float) -> tuple[int, float]:
        """Return the sequence number and time of the feed's next event. A feed has one owner: order is commit order."""
        if self._owners.setdefault(feed, owner) != owner:
            raise RuntimeError(f"feed {feed} belongs to {self._owners[feed]}, not to {owner}")
        seq, at = self._heads.get(feed) or self._journal.feed_head(feed)
        head = (seq + 1, round(max(now, at + MICROSECOND), 6))
        if head[1] <= at:
            head = (seq + 1, round(math.nextafter(at, math.inf) + MICROSECOND, 6))
        self._heads[feed] = head
        return head

    def forget(self, feed: str) -> None:
        """The feed is dropped with the step at hand; its numbers start again at 1."""
        self._heads[feed] = (0, 0.0)
        self._owners.pop(feed, None)

    def notify(self, feed: str) -> None:
        """Wake everybody who watches `feed`."""
        for event in self._waiting.get(feed, ()):
            event.set()
