"""A step in the making, for machines whose decisions take several small moves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from actors.kernel.machine import Effect, Rows, Step
from protocol.types import Message


class Draft:
    """Collects rows and effects of one step; reads see what was put before."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._changed: dict[str, Message | None] = {}
        self._effects: list[Effect] = []
        self.left_out: list[str] = []

    def get(self, key: str) -> Any:
        """Return the row, or None."""
        return self._changed[key] if key in self._changed else self._rows.get(key)

    def prefix(self, prefix: str) -> Iterator[tuple[str, Any]]:
        """Yield (key, row) of the keys that start with `prefix`: first the stored ones in order, then those put new."""
        return self._over(self._rows.prefix(prefix), prefix)

    def readable(self, prefix: str) -> Iterator[tuple[str, Any]]:
        """Yield as `prefix` does, without rows that are damaged; `left_out` has their keys."""
        readable = getattr(self._rows, "readable", None)  # rows that were never on a disk have no damage
        return self._over(readable(prefix, self.left_out) if readable else self._rows.prefix(prefix), prefix)

    def sound(self, key: str) -> Any:
        """Return the row, or None where there is none, or where it is damaged (then `left_out` has its key)."""
        return next((row for found, row in self.readable(key) if found == key), None)

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

    def do(self, *effects: Effect) -> None:
        """Add effects, in order."""
        self._effects.extend(effects)

    def step(self) -> Step:
        """Return what was collected."""
        return Step(self._changed, self._effects)
