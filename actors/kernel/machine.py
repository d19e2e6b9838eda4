"""What a machine is and what it may ask for: the vocabulary between `actors/*.py` and the kernel.

A machine is pure: no I/O, no clock, no dice. Time comes in `meta.now`; ids come in with the command or are hashes of
parents. `handle` gets its rows and one message and returns a `Step`; the kernel commits the step in one transaction and
only then lets anything leave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from protocol.codec import MAX_ADDRESS_CHARS
from protocol.types import Message

MAX_NAME_CHARS = 1000  # of a row, a timer, a feed
#: How long a `Send` waits for its acknowledgement unless it says otherwise (seconds).
DEFAULT_DEADLINE_S = 7 * 24 * 3600.0
MAX_DEADLINE_S = 30 * 24 * 3600.0  # longer ones are cut: what is older than that is never sent (see `tables.py`)


class Meta(msgspec.Struct, frozen=True, gc=False):
    """About the message at hand: sender's address, the time (seconds since the epoch) and the trace it belongs to.

    `origin`: for a message of another node the network address that its session comes by, "" where that is not known.
    """

    sender: str
    now: float
    trace: str
    origin: str = ""


class Rows(Protocol):
    """The machine's own rows: an ordered, read-only mapping from key to frozen row."""

    def __getitem__(self, key: str) -> Any: ...

    def __contains__(self, key: str) -> bool: ...

    def get(self, key: str, default: Any = None) -> Any: ...

    def prefix(self, prefix: str) -> Iterator[tuple[str, Any]]:
        """Yield (key, row) of all keys that start with `prefix`, in key order."""
        ...


@dataclass(frozen=True, slots=True)
class Send:
    """Durable, in order, exactly once, to an actor here or on a peer. Past the deadline: `Undelivered` to the sender."""

    to: str  # address "node/actor"; a bare actor name is one of this node
    message: Message
    deadline_s: float = DEFAULT_DEADLINE_S


@dataclass(frozen=True, slots=True)
class Reply:
    """To whoever asked (an edge); dropped where nobody did."""

    message: Message


@dataclass(frozen=True, slots=True)
class Emit:
    """A durable event at the end of `feed`, read by cursor."""

    feed: str
    message: Message


@dataclass(frozen=True, slots=True)
class Wake:
    """A durable timer: `message` comes back at time `at`. The same `key` replaces the timer; `at=None` takes it away.

    `keep` asks the journal first: a timer that is set stays as it is.
    """

    key: str
    at: float | None
    message: Message | None = None
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Publish:
    """Best-effort gossip, after the commit."""

    topic: str
    message: Message


@dataclass(frozen=True, slots=True)
class DropFeed:
    """Forget a feed and all its events."""

    feed: str


Effect = Send | Reply | Emit | Wake | Publish | DropFeed


@dataclass(frozen=True, slots=True)
class Step:
    """What a message changes: rows (None = delete) and effects, committed together."""

    rows: dict[str, Message | None] = field(default_factory=dict)
    effects: Sequence[Effect] = ()


NOTHING = Step()


def check_step(step: Step) -> None:
    """Refuse what the journal cannot hold, where it costs one message and not the node. Raises `ValueError`."""
    for key in step.rows:
        _check_name("a row", key)
    for effect in step.effects:
        match effect:
            case Send():
                check_send(effect)
            case Wake(key, at):
                _check_name("a timer", key)
                if at is not None and not math.isfinite(at):
                    raise ValueError(f"timer {key[:80]} is set to {at}")
            case Emit(feed) | DropFeed(feed):
                _check_name("a feed", feed)
            case _:
                pass


def check_send(send: Send) -> None:
    """Refuse a message that no link can carry. Raises `ValueError`."""
    _check_name("a recipient", send.to, MAX_ADDRESS_CHARS)
    if not math.isfinite(send.deadline_s):
        raise ValueError(f"a message to {send.to[:80]} has the deadline {send.deadline_s}")


def _check_name(what: str, name: str, longest: int = MAX_NAME_CHARS) -> None:
    name.encode()  # half of a surrogate pair, for one, is no text (and its error a `ValueError`)
    if len(name) > longest:
        raise ValueError(f"{what} has a name of {len(name)} characters")


class Machine(Protocol):
    """One subsystem's decisions.

    `local` is the union of messages that actors and edges of this node may send, `peer` the union that may come from
    another node, `rows` the union of its row types (each may be `None` for "none").
    A handler raises `Violation` where the sender broke the protocol; any other exception is our own bug.
    """

    @property
    def name(self) -> str: ...

    @property
    def local(self) -> Any: ...

    @property
    def peer(self) -> Any: ...

    @property
    def rows(self) -> Any: ...

    def handle(self, rows: Rows, message: Any, meta: Meta) -> Step: ...


class Port(Protocol):
    """An actor whose machine is the outside world: same address and mailbox, free to await.

    It may see a message again after a crash and must tolerate it. What it returns is sent and committed together with
    the acknowledgement of the message; later news goes out by `System.post`.
    """

    @property
    def name(self) -> str: ...

    @property
    def local(self) -> Any: ...

    @property
    def peer(self) -> Any: ...

    async def handle(self, message: Any, meta: Meta) -> Sequence[Send]: ...


class Transport(Protocol):
    """Carries frames to other nodes."""

    async def exchange(self, node: str, frame: bytes) -> bytes:
        """Give a batch (see `protocol.codec`) to `node`, return its acknowledgement. Raises `LinkDown`."""
        ...


class LinkDown(Exception):
    """A transport could not bring a frame to a node (now)."""


class Busy(Exception):
    """The actor's mailbox is full: try again later (REST says 503)."""


class JournalWaits(Busy):
    """The journal's disk takes nothing just now (full, or locked by another process): nothing of it was done, or kept."""


class AskTimeout(Exception):
    """No reply before the deadline; the message may still be handled."""


class ActorFailed(Exception):
    """A bug crashed the actor on this message; the log has it under the trace id."""


class NodeFailed(Exception):
    """An actor crashed too often: the process must end and say so."""


PublishHook = Callable[[str, Message], None]
