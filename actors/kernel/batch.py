"""What a run of an actor's loop gathers until its commit."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import trio

from actors.kernel.machine import Publish, Step
from actors.kernel.mail import BATCH_BYTES, Ask, Delivery, LinkBatch, Release
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


class BatchTurns:
    """Whose turn it is in a batch: alarms, then deliveries by rank; but who got none in the last batch comes first."""

    def __init__(self) -> None:
        self._passed_over: set[int] = set()

    def take(self, ranks: list[list[Delivery]], batch: Batch) -> Iterator[list[Delivery]]:
        """Yield deliveries, an empty list for alarms, until the time of the batch is over: somebody has a turn at least."""
        turns: list[tuple[int, list[Delivery]]] = [(0, []), *enumerate(ranks, 1)]
        turns.sort(key=lambda turn: turn[0] not in self._passed_over)
        self._passed_over, began = set(), False
        for number, deliveries in turns:
            if began and batch.over:
                self._passed_over.add(number)
            elif deliveries or number == 0:
                began = True
                yield deliveries
