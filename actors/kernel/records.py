"""What is written into a journal and read out of it, and what may be wrong with that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import msgspec

from actors.kernel.lineage import Lower, Position, Relink

SEAL_BYTES = 4


class JournalError(Exception):
    """The journal cannot be opened or written; the process must end rather than forget."""


class JournalClosed(JournalError):
    """The journal's process has ended, or is about to."""


def sealed(actor: str, key: str, body: bytes) -> bytes:
    """Return a row as it is stored: with a checksum over it and its place, so that a flipped bit is not read as a row."""
    return body + _checksum(actor, key, body)


def unsealed(actor: str, key: str, stored: bytes) -> bytes:
    """Return the row out of what is stored. Raises `RowDamaged`."""
    body = stored[:-SEAL_BYTES]
    if _checksum(actor, key, body) != stored[-SEAL_BYTES:]:
        raise RowDamaged(actor, key, "its checksum is wrong")
    return body


def _checksum(actor: str, key: str, body: bytes) -> bytes:
    return crc32(body, crc32(f"{actor}\0{key}\0".encode())).to_bytes(SEAL_BYTES, "big")  # no copy: each message has one


class RowDamaged(Exception):
    """A stored row cannot be read: our own disk's fault, or a newer version's row, and never the sender's.

    Nothing is dropped for it: whatever needs the row waits until it can be read, and the row is named.
    """

    def __init__(self, actor: str, key: str, reason: str, again: Callable[[Any], object] | None = None) -> None:
        super().__init__(f"row {key} of {actor} cannot be read: {reason}")
        self.actor, self.key, self.reason = actor, key, reason
        self.again = again  # reads a journal for what is no machine's row


class MessageDamaged(RowDamaged):
    """A message of the outbox cannot be read: it is given up, and its sender told that it was lost."""

    def __init__(self, actor: str, recipient: str, seq: int, reason: str) -> None:
        super().__init__(actor, f"(message {seq} to {recipient})", reason, lambda journal: journal.posted(actor, recipient, seq))
        self.recipient, self.seq = recipient, seq


class Posted(msgspec.Struct, frozen=True, gc=False):
    """A message in the outbox."""

    seq: int
    deadline: float
    trace: str
    body: bytes


class Timer(msgspec.Struct, frozen=True, gc=False):
    """A durable timer of an actor."""

    actor: str
    key: str
    at: float
    trace: str
    body: bytes


class Fresh(msgspec.Struct, frozen=True):
    """Timers (actor, key) and messages of the outbox (actor, recipient, number) that were set lately."""

    timers: tuple[tuple[str, str], ...]
    sends: tuple[tuple[str, str, int], ...]


class Event(msgspec.Struct, frozen=True, gc=False):
    """An entry of a feed. `seq` counts from 1; `at` (seconds since the epoch) rises strictly inside a feed."""

    seq: int
    at: float
    body: bytes


@dataclass(frozen=True, slots=True)
class SetAside:
    """A message in quarantine: it crashed its actor again and again. Its sender was told, or will be."""

    at: float
    sender: str
    epoch: str
    seq: int
    trace: str
    error: str
    body: bytes
    local: bool  # from this node itself
    actor: str = ""
    number: int = 0


class Commit(msgspec.Struct, eq=False):
    """What one actor wants written at once."""

    actor: str
    rows: dict[str, bytes | None] = msgspec.field(default_factory=dict)
    inbox: dict[str, Position] = msgspec.field(default_factory=dict)
    outbox: list[tuple[str, Posted]] = msgspec.field(default_factory=list)
    expired: list[tuple[str, int]] = msgspec.field(default_factory=list)
    deferred: list[tuple[str, int, float]] = msgspec.field(default_factory=list)  # deadlines that come again later
    events: list[tuple[str, Event]] = msgspec.field(default_factory=list)
    dropped_feeds: list[str] = msgspec.field(default_factory=list)
    taken: list[tuple[str, int]] = msgspec.field(default_factory=list)
    timers: dict[str, Timer | None] = msgspec.field(default_factory=dict)
    quarantined: list[SetAside] = msgspec.field(default_factory=list)
    released: list[int] = msgspec.field(default_factory=list)  # numbers of messages that left the quarantine
    relinked: list[Relink | Lower] = msgspec.field(default_factory=list)
    at: float = 0.0  # by the journal's clock, when it is written

    def move(self, step: float) -> None:
        """Move timers and deadlines by `step` seconds: the clock was set before they are written."""
        self.timers = {key: timer and msgspec.structs.replace(timer, at=timer.at + step) for key, timer in self.timers.items()}
        self.outbox = [(to, msgspec.structs.replace(posted, deadline=posted.deadline + step)) for to, posted in self.outbox]
        self.deferred = [(to, seq, deadline + step) for to, seq, deadline in self.deferred]

    def __bool__(self) -> bool:
        return bool(
            self.rows or self.inbox or self.outbox or self.expired or self.events or self.dropped_feeds or self.taken
            or self.timers or self.quarantined or self.deferred or self.released or self.relinked
        )  # fmt: skip
