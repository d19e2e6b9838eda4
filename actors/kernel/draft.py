"""A step in the making, and how to decline.

An expected no is raised as `Declined` and takes the whole step back, unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from actors.kernel.machine import DEFAULT_DEADLINE_S, Effect, Emit, Meta, Reply, Rows, Send, Step, Wake
from actors.kernel.records import RowDamaged
from protocol.types import Message, Refused

R = TypeVar("R")


class Declined(Exception):
    """An expected no: `code` is one of `protocol.types.REFUSALS`. `keep`: what the draft holds by then stays."""

    def __init__(self, code: str, message: str, *, keep: bool = False) -> None:
        super().__init__(message)
        self.refusal, self.keep = Refused(code, message), keep


class Draft:
    """Collects rows and effects of one step; reads see what was put before. `me` is our node."""

    def __init__(self, rows: Rows, meta: Meta, me: str) -> None:
        self.meta, self.now, self.me = meta, meta.now, me
        self._rows = rows
        self._changed: dict[str, Message | None] = {}
        self._effects: list[Effect] = []
        self.left_out: list[str] = []

    # -- rows
    def get(self, key: str) -> Any:
        """Return the row, or None."""
        return self._changed[key] if key in self._changed else self._rows.get(key)

    def row(self, kind: type[R], key: str) -> R | None:
        """Return the row at `key`, which is of this type, or None."""
        row = self.get(key)
        assert row is None or isinstance(row, kind), f"{key} holds {type(row).__name__}, not {kind.__name__}"
        return row

    def prefix(self, prefix: str) -> Iterator[tuple[str, Any]]:
        """Yield (key, row) of the keys that start with `prefix`: first the stored ones in order, then those put new."""
        return self._over(self._rows.prefix(prefix), prefix)

    def readable(self, prefix: str, after: str = "") -> Iterator[tuple[str, Any]]:
        """Yield as `prefix` does, without rows that are damaged; `left_out` has their keys. Only keys behind `after`."""
        readable = getattr(self._rows, "readable", None)  # rows that were never on a disk have no damage
        stored = readable(prefix, self.left_out, after) if readable else self._rows.prefix(prefix)
        return ((key, row) for key, row in self._over(stored, prefix) if key > after)

    def sound(self, key: str) -> Any:
        """Return the row, or None where there is none, or where it is damaged (then `left_out` has its key)."""
        return next((row for found, row in self.readable(key) if found == key), None)

    def spare(self, part: Callable[[], None]) -> None:
        """Do a part of the step; a damaged row costs that part alone, of which nothing stays."""
        before = dict(self._changed), list(self._effects)
        try:
            part()
        except RowDamaged as error:
            self._changed, self._effects = before
            self.left_out.append(error.key)
            getattr(self._rows, "damage", []).append(error)

    def _over(self, stored: Iterator[tuple[str, Any]], prefix: str) -> Iterator[tuple[str, Any]]:
        changed = {key: row for key, row in self._changed.items() if key.startswith(prefix)}
        for key, row in stored:
            current = changed.pop(key, row)
            if current is not None:
                yield key, current
        for key, row in changed.items():
            if row is not None:
                yield key, row

    def put(self, key: str, row: Message | None) -> None:
        """Write a row; None deletes it."""
        self._changed[key] = row

    # -- effects
    def do(self, *effects: Effect) -> None:
        """Add effects, in order."""
        self._effects.extend(effects)

    def send(self, to: str, message: Message, deadline_s: float = DEFAULT_DEADLINE_S) -> None:
        self.do(Send(to, message, deadline_s))

    def emit(self, feed: str, message: Message) -> None:
        self.do(Emit(feed, message))

    def wake(self, key: str, at: float | None, message: Message | None = None, *, keep: bool = False) -> None:
        self.do(Wake(key, at, message, keep))

    def reply(self, message: Message) -> None:
        self.do(Reply(message))

    def step(self) -> Step:
        """Return what was collected."""
        return Step(self._changed, self._effects)
