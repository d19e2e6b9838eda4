"""Feeds: durable sequences of events, written by one actor each, read by cursor, waited for without polling."""

from __future__ import annotations

import math
from collections import OrderedDict

import trio

from actors.kernel.journal import Journal
from actors.kernel.records import Commit, Event

MICROSECOND = 1e-6
REMEMBERED_OWNERS = 4096  # feeds whose owner is checked; the check finds bugs, nothing rests on it


class Feeds:
    """All feeds of a journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._owners: OrderedDict[str, str] = OrderedDict()
        self._waiting: dict[str, set[trio.Event]] = {}
        self._taking: dict[str, trio.Lock] = {}
        self.closed = False

    # -- reading
    def read(self, feed: str, after_seq: int = 0, limit: int = 100) -> list[Event]:
        """Return at most `limit` committed events behind sequence number `after_seq`."""
        self._journal.look()
        return self._journal.events(feed, after_seq, limit)

    def read_after(self, feed: str, after_at: float, limit: int = 100) -> list[Event]:
        """Return at most `limit` committed events strictly later than `after_at` (seconds since the epoch)."""
        self._journal.look()
        return self._journal.events_after(feed, after_at, limit)

    def watch(self, *feeds: str) -> trio.Event:
        """Return an event that is set when one of `feeds` gets news. Watch first, then read, then wait; then `unwatch`."""
        event = trio.Event()
        if self.closed:
            event.set()
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
                    if self._journal.events(feed, after_seq, 1):
                        return True
                    if self.closed:
                        return False
                    await event.wait()
                finally:
                    self.unwatch(event, feed)
        return bool(self._journal.events(feed, after_seq, 1))

    async def take(self, feed: str, limit: int = 100) -> list[Event]:
        """Read and delete the first events of a feed, durably: each event is handed out once."""
        lock = self._taking.setdefault(feed, trio.Lock())
        try:
            async with lock:
                events = self._journal.events(feed, 0, limit)
                if events:
                    # Deleted and delivered, or neither: a commit under way is not cancelled, and no checkpoint follows it.
                    await self._journal.commit(Commit("", taken=[(feed, event.seq) for event in events]))
                return events
        finally:
            if not lock.locked():
                self._taking.pop(feed, None)

    # -- writing (the kernel)
    def claim(self, owner: str, feed: str) -> None:
        """Check that a feed has one writer: then the order of its events is the order of commits."""
        if self._owners.setdefault(feed, owner) != owner:
            raise RuntimeError(f"feed {feed} belongs to {self._owners[feed]}, not to {owner}")
        self._owners.move_to_end(feed)
        if len(self._owners) > REMEMBERED_OWNERS:
            self._owners.popitem(last=False)

    def notify(self, feed: str) -> None:
        """Wake everybody who watches `feed`."""
        for event in self._waiting.get(feed, ()):
            event.set()


def next_head(head: tuple[int, float], now: float) -> tuple[int, float]:
    """Return sequence number and time (whole microseconds) of the event behind the one numbered and timed `head`."""
    seq, before = head
    at = round(max(now, before + MICROSECOND), 6)
    if at <= before:
        at = round(math.nextafter(before, math.inf) + MICROSECOND, 6)
    return seq + 1, at
