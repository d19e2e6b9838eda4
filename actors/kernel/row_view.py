"""An actor's rows as its machine and the edges read them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from actors.kernel.journal import Journal
from actors.kernel.records import RowDamaged, unsealed
from protocol.codec import Decoder
from protocol.types import Message, Violation

CACHED_ROWS, CACHED_ROW_BYTES = 4096, 16384  # larger rows are read again each time: 64 MiB an actor at most
MAX_ROW_BYTES = 1 << 26


def row_decoder(rows: Any) -> Callable[[bytes], Any]:
    """Return the decoder of a machine's `rows`."""
    return Decoder(rows, MAX_ROW_BYTES)


class RowView:
    """An actor's rows: committed ones read through a bounded cache, uncommitted ones on top."""

    def __init__(self, journal: Journal, actor: str, decode: Callable[[bytes], Any], looks: bool = False) -> None:
        self._journal, self._actor, self._decode, self._looks = journal, actor, decode, looks
        self._cache: OrderedDict[str, Any] = OrderedDict()
        self.changed: dict[str, Message | None] = {}
        self.damage: list[RowDamaged] = []  # rows that a step left out

    def get(self, key: str, default: Any = None) -> Any:
        if key in self.changed:
            row = self.changed[key]
            return default if row is None else row
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        if self._looks:
            self._journal.look()
        body = self._journal.row(self._actor, key)
        return default if body is None else self._remember(key, self.read(key, body), len(body))

    def read(self, key: str, body: bytes) -> Any:
        """Return the row that is stored as `body`. Raises `RowDamaged`."""
        try:
            return self._decode(unsealed(self._actor, key, body))
        except Violation as error:  # the decoder is the wire's, but nobody else wrote this
            raise RowDamaged(self._actor, key, str(error)) from None

    def again(self) -> RowView:
        """Return a view of what is committed, for another reader: between two checkpoints it sees one state."""
        return RowView(self._journal, self._actor, self._decode, looks=True)

    def __getitem__(self, key: str) -> Any:
        row = self.get(key)
        if row is None:
            raise KeyError(key)
        return row

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def prefix(self, prefix: str) -> Iterator[tuple[str, Any]]:
        return self._scan(prefix, None)

    def readable(self, prefix: str, left_out: list[str], after: str = "") -> Iterator[tuple[str, Any]]:
        """Yield as `prefix` does, but leave out rows that are damaged, and note their keys. Only keys behind `after`."""
        return self._scan(prefix, left_out, after)

    def _scan(self, prefix: str, left_out: list[str] | None, after: str = "") -> Iterator[tuple[str, Any]]:
        changed = sorted(key for key in self.changed if key.startswith(prefix) and key > after)
        at = 0
        if self._looks:
            self._journal.look()
        for key, body in self._journal.rows(self._actor, prefix, after):
            while at < len(changed) and changed[at] < key:
                if (row := self.changed[changed[at]]) is not None:
                    yield changed[at], row
                at += 1
            if at < len(changed) and changed[at] == key:
                if (row := self.changed[key]) is not None:
                    yield key, row
                at += 1
                continue
            try:
                row = self._cache[key] if key in self._cache else self._remember(key, self.read(key, body), len(body))
            except RowDamaged as error:
                if left_out is None:
                    raise
                left_out.append(key)
                self.damage.append(error)
            else:
                yield key, row
        for key in changed[at:]:
            if (row := self.changed[key]) is not None:
                yield key, row

    def committed(self, bodies: dict[str, bytes | None]) -> None:
        """Take over what a commit wrote, encoded as `bodies`."""
        for key, row in self.changed.items():
            body = bodies[key]
            if body is None:
                self._cache.pop(key, None)
            else:
                self._remember(key, row, len(body))
        self.changed = {}

    def _remember(self, key: str, row: Any, size: int) -> Any:
        if size > CACHED_ROW_BYTES:
            self._cache.pop(key, None)
            return row
        self._cache[key] = row
        self._cache.move_to_end(key)
        if len(self._cache) > CACHED_ROWS:
            self._cache.popitem(last=False)
        return row
