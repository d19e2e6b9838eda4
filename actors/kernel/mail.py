"""What comes into a mailbox: frames of links, asks of edges, alarms; and what is remembered about those that crash."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import zip_longest

import msgspec
import trio

from actors.kernel.lineage import Lower, Position, Relink
from actors.kernel.records import Timer
from protocol.codec import Envelope
from protocol.types import Message, PeerLost, Undelivered, node_of

BATCH = 64  # deliveries taken at once
BATCH_BYTES = 4 << 20  # of messages to be sent, after which a batch is committed
BATCH_S = 0.01  # a batch is committed after so long, and others get their turn
CAPACITY = 256  # deliveries in a mailbox; more is `Busy` for edges and peers
CRASHES_BEFORE_QUARANTINE = 3
COUNTED_CRASHES = 1024
RETIRED = "retired epoch"  # what a sender is told that goes on where it had left off


class LinkBatch(msgspec.Struct, eq=False):
    """Envelopes of one link, in order. `have` and `note` are the acknowledgement, once `done`.

    Whoever no longer waits for the acknowledgement takes the envelopes back (empties the list): they come again.
    """

    envelopes: list[Envelope]
    done: trio.Event = msgspec.field(default_factory=trio.Event)
    have: int = 0
    note: str = ""
    refused: tuple[int, ...] = ()
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
class Release:
    """A message of the quarantine is to be handled after all; `error` is set before `done` when it cannot be."""

    number: int
    done: trio.Event = field(default_factory=trio.Event)
    error: Exception | None = None


@dataclass(slots=True, eq=False)
class TimerDue:
    """A durable timer whose time has come."""

    timer: Timer


@dataclass(slots=True, eq=False)
class DeadlinePassed:
    """A message of the outbox was not acknowledged in time, or its recipient set it aside: `reason` says so."""

    recipient: str
    seq: int
    epoch: str  # the numbering of the link
    reason: str = Undelivered.__struct_defaults__[0]


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
AlarmKey = tuple[str, str]


def key_of(alarm: Alarm) -> AlarmKey:
    """Return what tells an alarm from others of its actor: its name, and which one of that name."""
    match alarm:
        case TimerDue(timer):
            return f"timer {timer.key}", repr(timer.at)
        case DeadlinePassed(recipient, seq):
            return f"message {seq} to {recipient}", ""
        case LinkBroken(lost=lost):
            return f"link to {lost.to}", ""


Delivery = LinkBatch | Ask | AlarmRings | Release


class Outcome(Enum):
    """What became of a message of a link."""

    TAKEN = auto()  # handled, or set aside
    VIOLATION = auto()  # dropped: the sender's fault
    CRASH = auto()  # our fault: it comes again
    WAITS = auto()  # for a row that cannot be read: it comes again, and nobody is to blame


class Crashes:
    """How often which message crashed its handler, and until when it is left alone."""

    def __init__(self) -> None:
        self._counts: OrderedDict[tuple[str, str, int], tuple[int, float]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._counts)

    def waits(self, key: tuple[str, str, int], now: float) -> bool:
        """Return whether a message that crashed is to be left alone yet."""
        return key in self._counts and now < self._counts[key][1]

    def count(self, key: tuple[str, str, int], now: float, first_pause_s: float) -> int:
        """Count a crash; the message is left alone for a pause that grows fivefold each time. Return how many it was."""
        crashes = self._counts.pop(key, (0, 0.0))[0] + 1
        self._counts[key] = crashes, now + first_pause_s * 5.0 ** min(crashes - 1, 9)
        if len(self._counts) > COUNTED_CRASHES:
            self._counts.popitem(last=False)
        return crashes

    def forget(self, key: tuple[str, str, int]) -> None:
        self._counts.pop(key, None)


def by_rank(deliveries: list[Delivery], node: str, last: str) -> list[list[Delivery]]:
    """Return deliveries by who waits: edges, actors of this node, other nodes; those by turns, beginning behind `last`."""
    if len(deliveries) == 1:
        return [list(deliveries)]
    edges: list[Delivery] = []
    ours: list[Delivery] = []
    peers: dict[str, list[Delivery]] = {}
    for delivery in in_order(deliveries):
        if not isinstance(delivery, LinkBatch):
            edges.append(delivery)
        elif (sender := node_of(delivery.sender)) == node:
            ours.append(delivery)
        else:
            peers.setdefault(sender, []).append(delivery)
    if last in peers:
        peers[last] = peers.pop(last)  # whose turn was cut short comes behind the others
    turns = [delivery for turn in zip_longest(*peers.values()) for delivery in turn if delivery is not None]
    return [edges, ours, turns]


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


def fresh(link: LinkBatch, position: Position) -> Iterator[tuple[Envelope, Position]]:
    """Yield what is new of a frame, each envelope with the position behind it; stop where one does not fit, and note it."""
    for e in link.envelopes:
        if e.seq < position.seq:
            continue  # a duplicate: committed before
        if note := position.objection(e):
            link.note = note
            return
        if e.seq == position.seq or not e.body:
            continue  # known already; or a question where we stand
        position = position.behind(e)
        yield e, position
