"""What a run of an actor's loop gathers until its commit."""

from __future__ import annotations

import msgspec
import trio

from actors.kernel.machine import Publish, Step
from actors.kernel.mail import BATCH_BYTES, Ask, LinkBatch, Release
from actors.kernel.records import Commit


class Batch(msgspec.Struct, eq=False):
    """What a run of the loop gathers until its commit, and lets go after it."""

    commit: Commit
    until: float  # by the monotonic clock: then it is committed
    asks: list[Ask] = msgspec.field(default_factory=list)
    links: list[LinkBatch] = msgspec.field(default_factory=list)
    releases: list[Release] = msgspec.field(default_factory=list)
    published: list[Publish] = msgspec.field(default_factory=list)
    sent: dict[str, int] = msgspec.field(default_factory=dict)
    answers: list[tuple[str, int, int]] = msgspec.field(default_factory=list)  # to who asked: recipient, number, size
    posted_bytes: int = 0
    heads: dict[str, tuple[int, float]] = msgspec.field(default_factory=dict)  # of feeds: number and time of the last event

    @property
    def over(self) -> bool:
        """Return whether the batch has taken its time, or has enough to send."""
        return self.posted_bytes >= BATCH_BYTES or trio.current_time() >= self.until


class Decided(msgspec.Struct, frozen=True):
    """A step with its rows and messages encoded."""

    step: Step
    rows: dict[str, bytes | None]
    bodies: list[bytes]
