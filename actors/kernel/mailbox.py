"""What comes into a mailbox: frames of links, asks of edges, alarms; and what is remembered about those that crash."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import zip_longest
from typing import TYPE_CHECKING, Union

import msgspec
import trio

from actors.kernel.lineage import Lower, Position, Relink
from actors.kernel.machine import ActorFailed, Busy, Machine, Port
from actors.kernel.records import Commit, SetAside, Timer
from actors.kernel.tables import KEPT_QUARANTINED
from protocol.codec import MAX_UNDER_WAY, Decoder, Envelope
from protocol.types import Message, PeerLost, Undelivered, Violation, node_of

if TYPE_CHECKING:
    from actors.kernel.system import System

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


class Mailbox:
    """What the actor of a machine and the actor of a port have in common: a bounded mailbox, and how it is read."""

    first_pause_s = 0.0  # a message that crashed its handler comes again when its courier does

    def __init__(self, system: System, kind: Machine | Port, capacity: int) -> None:
        self.system, self.name = system, kind.name
        self.address = f"{system.node}/{kind.name}"
        self.post, self._mailbox = trio.open_memory_channel[Delivery](capacity)
        self.takes_peers = kind.peer is not None
        self._decode_local: Callable[[bytes], Message] = Decoder(Union[kind.local, kind.peer, None])  # noqa: UP007
        self._decode_peer: Callable[[bytes], Message] = Decoder(Union[kind.peer, None])  # noqa: UP007
        self._crashes = Crashes()
        self._set_aside = set(system.journal.senders_set_aside(self.name))

    def offer(self, delivery: Delivery) -> None:
        """Put a delivery into the mailbox now. Raises `Busy` when it is full."""
        try:
            self.post.send_nowait(delivery)
        except trio.WouldBlock:
            raise Busy(f"the mailbox of {self.name} is full") from None

    def decode(self, sender: str, body: bytes) -> Message:
        """Return a message as `sender` may send it. Raises `Violation`."""
        return (self._decode_local if node_of(sender) == self.system.node else self._decode_peer)(body)

    def held(self, e: Envelope) -> bool:
        """Return whether a message that crashed its handler is to be left alone yet."""
        return bool(self._crashes) and self._crashes.waits((e.sender, e.epoch, e.seq), self.system.now())

    def quarantined(self, commit: Commit, e: Envelope, error: Exception, now: float) -> bool:
        """Count a crash; return True when the message is set aside, so that the link goes on behind it."""
        key = (e.sender, e.epoch, e.seq)
        if self._crashes.count(key, now, self.first_pause_s) < CRASHES_BEFORE_QUARANTINE:
            return False
        self._crashes.forget(key)
        local = node_of(e.sender) == self.system.node
        commit.quarantined.append(SetAside(now, e.sender, e.epoch, e.seq, e.trace, repr(error)[:1000], e.body, local))
        if len(self._set_aside) > 2 * KEPT_QUARANTINED:
            self._set_aside = set(self.system.journal.senders_set_aside(self.name))
        self._set_aside.add(e.sender)
        return True

    def position(self, sender: str) -> Position:
        """Return how far a link is read, for who gets no answer from the actor itself."""
        return self.system.journal.position(self.name, sender)

    def answer(self, link: LinkBatch) -> None:
        """Acknowledge a frame, now that all it says is committed."""
        self.name_refused(link)
        link.done.set()

    def name_refused(self, link: LinkBatch) -> None:
        """Add to an acknowledgement which messages were set aside."""
        if link.sender in self._set_aside:  # in whichever frame: an acknowledgement counts for all before it
            first = link.have - MAX_UNDER_WAY
            link.refused = self.system.journal.refused(self.name, link.sender, link.epoch, first, link.have)

    def release(self, release: Release) -> tuple[SetAside, Message] | None:
        """Return what is to be handled after all; None, with the error noted, when it is not there any more."""
        one = self.system.journal.set_aside(release.number)
        if one is None:
            release.error = LookupError(f"no message with number {release.number} is in quarantine")
            return None
        try:
            return one, self.decode(one.sender, one.body)
        except Violation as error:
            release.error = error
            return None

    def failed_again(self, release: Release, error: Exception) -> None:
        """A message of the quarantine could not be handled: it stays where it is."""
        release.error = error if isinstance(error, Violation) else ActorFailed(f"{self.name} failed on it again: {error!r}")
