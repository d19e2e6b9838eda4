"""What comes into a mailbox: frames of links, asks of edges, alarms; and what is remembered about those that crash."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum, auto

import trio

from actors.kernel.journal import Timer
from actors.kernel.lineage import Lower, Position, Relink
from protocol.codec import Envelope
from protocol.types import Message, PeerLost

BATCH = 64  # deliveries taken at once
CAPACITY = 256  # deliveries in a mailbox; more is `Busy` for edges and peers
CRASHES_BEFORE_QUARANTINE = 3
COUNTED_CRASHES = 1024
RETIRED = "retired epoch"  # what a sender is told that goes on where it had left off


@dataclass(slots=True, eq=False)
class LinkBatch:
    """Envelopes of one link, in order. `have` and `note` are the acknowledgement, once `done`.

    Whoever no longer waits for the acknowledgement takes the envelopes back (empties the list): they come again.
    """

    envelopes: list[Envelope]
    done: trio.Event = field(default_factory=trio.Event)
    have: int = 0
    note: str = ""
    boots: tuple[str, ...] = ()
    sender: str = ""
    epoch: str = ""

    def __post_init__(self) -> None:
        self.sender, self.epoch = self.envelopes[0].sender, self.envelopes[0].epoch

    def stand(self, position: Position) -> None:
        """Acknowledge what is committed at `position`."""
        under = position.of(self.epoch)
        self.have, self.boots = under.seq, under.boots


@dataclass(slots=True, eq=False)
class Ask:
    """An edge's message; `reply` or `error` is set before `done`."""

    message: Message
    trace: str
    done: trio.Event = field(default_factory=trio.Event)
    reply: Message | None = None
    error: Exception | None = None


@dataclass(slots=True, eq=False)
class TimerDue:
    """A durable timer whose time has come."""

    timer: Timer


@dataclass(slots=True, eq=False)
class DeadlinePassed:
    """A message of the outbox was not acknowledged in time."""

    recipient: str
    seq: int


@dataclass(slots=True, eq=False)
class LinkBroken:
    """The two sides of a link do not remember the same. `mend` is what becomes of its numbering under `epoch`."""

    epoch: str
    mend: Relink | Lower
    lost: PeerLost


@dataclass(slots=True, eq=False)
class AlarmRings:
    """There are alarms to take (they have a place of their own, so that a full mailbox cannot keep them out)."""


Alarm = TimerDue | DeadlinePassed | LinkBroken
Delivery = LinkBatch | Ask | AlarmRings


class Outcome(Enum):
    """What became of a message of a link."""

    TAKEN = auto()  # handled, or quarantined
    VIOLATION = auto()  # dropped: the sender's fault
    CRASH = auto()  # our fault: it comes again
    WAITS = auto()  # for a row that cannot be read: it comes again, and nobody is to blame


class Crashes:
    """How often which message crashed its machine."""

    def __init__(self) -> None:
        self._counts: OrderedDict[tuple[str, str, int], int] = OrderedDict()

    def count(self, key: tuple[str, str, int]) -> bool:
        """Count a crash; return whether it was one too many, and then forget the message."""
        self._counts[key] = self._counts.get(key, 0) + 1
        if self._counts[key] >= CRASHES_BEFORE_QUARANTINE:
            del self._counts[key]
            return True
        if len(self._counts) > COUNTED_CRASHES:
            self._counts.popitem(last=False)
        return False


def in_order(deliveries: list[Delivery]) -> list[Delivery]:
    """Put frames of one link that overtook one another back in order, each link's in the places it has."""
    links: dict[tuple[str, str], list[int]] = {}
    for place, delivery in enumerate(deliveries):
        if isinstance(delivery, LinkBatch) and delivery.envelopes:
            links.setdefault((delivery.sender, delivery.epoch), []).append(place)
    ordered = list(deliveries)
    for places in links.values():
        for place, origin in zip(places, sorted(places, key=lambda place: _first_seq(deliveries[place])), strict=True):
            ordered[place] = deliveries[origin]
    return ordered


def _first_seq(delivery: Delivery) -> int:
    assert isinstance(delivery, LinkBatch)
    return delivery.envelopes[0].seq


class CrashedOn(Exception):
    """The actor's machine crashed on a message; the actor restarts and meets it again."""

    def __init__(self, error: Exception, remote: bool) -> None:
        super().__init__(repr(error))
        self.error, self.remote = error, remote
