"""Rows that cannot be read: which, and why, for people."""

from __future__ import annotations

from collections.abc import Callable

from actors.kernel.records import RowDamaged

KEPT = 256  # rows that are named


class DamagedRows:
    """Remembers what something needed and could not read."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], RowDamaged] = {}  # (actor, key) -> what was found

    def is_news(self, error: RowDamaged) -> bool:
        """Remember a row; return whether it was not known yet."""
        if (error.actor, error.key) in self._rows or len(self._rows) >= KEPT:
            return False
        self._rows[error.actor, error.key] = error
        return True

    def still(self, read: Callable[[RowDamaged], object]) -> list[tuple[str, str, str]]:
        """Return (actor, key, why) of those that `read` cannot read yet; the others are forgotten."""
        for row, known in list(self._rows.items()):
            try:
                read(known)
                del self._rows[row]
            except RowDamaged as error:
                self._rows[row] = error
        return sorted((*row, error.reason) for row, error in self._rows.items())
