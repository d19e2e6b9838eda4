"""The draft of a step as ledger and wallet write it: typed reads, the time, and a way to decline.

An expected no is raised as `Declined` and takes the whole step back.
"""

from __future__ import annotations

from typing import TypeVar

from actors.kernel.draft import Draft
from actors.kernel.machine import DEFAULT_DEADLINE_S, Emit, Meta, Reply, Rows, Send, Wake
from protocol.types import Message, Refused

R = TypeVar("R")


class Declined(Exception):
    """An expected no: `code` is one of `protocol.types.REFUSALS`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.refusal = Refused(code, message)


class MoneyDraft(Draft):
    """One step of a machine that handles money."""

    def __init__(self, rows: Rows, meta: Meta) -> None:
        super().__init__(rows)
        self.meta = meta
        self.now = meta.now

    def row(self, kind: type[R], key: str) -> R | None:
        """Return the row at `key`, which is of this type, or None."""
        row = self.get(key)
        assert row is None or isinstance(row, kind), f"{key} holds {type(row).__name__}, not {kind.__name__}"
        return row

    def send(self, to: str, message: Message, deadline_s: float = DEFAULT_DEADLINE_S) -> None:
        self.do(Send(to, message, deadline_s))

    def emit(self, feed: str, message: Message) -> None:
        self.do(Emit(feed, message))

    def wake(self, key: str, at: float | None, message: Message | None = None, *, keep: bool = False) -> None:
        self.do(Wake(key, at, message, keep))

    def reply(self, message: Message) -> None:
        self.do(Reply(message))
