"""An actor: a bounded mailbox and a loop around one machine.

The loop awaits two things only, its mailbox and its journal, so a cycle of full mailboxes cannot deadlock; couriers block
instead. It takes a batch, steps the machine through it on top of its committed rows, commits once, and only then lets
acknowledgements, replies and sends leave.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio

from actors.kernel.journal import Commit, Event, Journal, Position, Posted, Timer
from actors.kernel.machine import (
    ActorFailed,
    Busy,
    DropFeed,
    Effect,
    Emit,
    Machine,
    Meta,
    Publish,
    Reply,
    Send,
    Step,
    Wake,
)
from protocol.codec import Decoder, Envelope, encode, tag_of
from protocol.types import Message, Undelivered, Violation, node_of

if TYPE_CHECKING:
    from actors.kernel.system import System

BATCH = 64  # deliveries taken at once
CAPACITY = 256  # deliveries in a mailbox; more is `Busy` for edges and peers
CACHED_ROWS = 4096
CRASHES_BEFORE_QUARANTINE = 3
RETIRED_EPOCHS = 8


@dataclass(slots=True, eq=False)
class LinkBatch:
    """Envelopes of one link, in order. `have` and `note` are the acknowledgement, once `done`."""

    envelopes: list[Envelope]
    done: trio.Event = field(default_factory=trio.Event)
    have: int = 0
    note: str = ""


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


Delivery = LinkBatch | Ask | TimerDue | DeadlinePassed


class RowView:
    """An actor's rows: committed ones read through a bounded cache, uncommitted ones on top."""

    def __init__(self, journal: Journal, actor: str, kinds: Any) -> None:
        self._journal, self._actor = journal, actor
        self._decode: Callable[[bytes], Any] = Decoder(kinds, 1 << 26)
        self._cache: OrderedDict[str, Any] = OrderedDict()
        self.changed: dict[str, Message | None] = {}

    def get(self, key: str, default: Any = None) -> Any:
        if key in self.changed:
            row = self.changed[key]
            return default if row is None else row
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        body = self._journal.row(self._actor, key)
        return default if body is None else self._remember(key, self._decode(body))

    def __getitem__(self, key: str) -> Any:
        row = self.get(key)
        if row is None:
            raise KeyError(key)
        return row

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def prefix(self, prefix: str) -> Iterator[tuple[str, Any]]:
        changed = sorted(key for key in self.changed if key.startswith(prefix))
        at = 0
        for key, body in self._journal.rows(self._actor, prefix):
            while at < len(changed) and changed[at] < key:
                if (row := self.changed[changed[at]]) is not None:
                    yield changed[at], row
                at += 1
            if at < len(changed) and changed[at] == key:
                if (row := self.changed[key]) is not None:
                    yield key, row
                at += 1
            else:
                yield key, self._cache[key] if key in self._cache else self._remember(key, self._decode(body))
        for key in changed[at:]:
            if (row := self.changed[key]) is not None:
                yield key, row

    def committed(self, rows: dict[str, Message | None]) -> None:
        """Take over what a commit wrote."""
        for key, row in rows.items():
            if row is None:
                self._cache.pop(key, None)
            else:
                self._remember(key, row)

    def _remember(self, key: str, row: Any) -> Any:
        self._cache[key] = row
        self._cache.move_to_end(key)
        if len(self._cache) > CACHED_ROWS:
            self._cache.popitem(last=False)
        return row


@dataclass(slots=True)
class Batch:
    """What a run of the loop gathers until its commit, and lets go after it."""

    commit: Commit
    asks: list[Ask] = field(default_factory=list)
    links: list[LinkBatch] = field(default_factory=list)
    published: list[Publish] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    failure: Exception | None = None


@dataclass(frozen=True, slots=True)
class Decided:
    """A step with its rows and messages encoded."""

    step: Step
    rows: dict[str, bytes | None]
    bodies: list[bytes]


class Actor:
    """Runs one machine on one journal."""

    def __init__(self, system: System, machine: Machine, capacity: int = CAPACITY) -> None:
        self.system, self.machine, self.name = system, machine, machine.name
        self.address = f"{system.node}/{machine.name}"
        self.post, self._mailbox = trio.open_memory_channel[Delivery](capacity)
        none = type(None)
        self._decode_local: Callable[[bytes], Message] = Decoder(machine.local | machine.peer | none)
        self._decode_peer: Callable[[bytes], Message] = Decoder(machine.peer | none)
        self.rows = RowView(system.journal, self.name, machine.rows)
        self._positions: dict[str, Position] = {}
        self._sent: dict[str, int] = {}
        self._crashes: dict[tuple[str, str, int], int] = {}
        self._alarms: set[object] = set()  # timers and deadlines that wait in the mailbox

    # -- the mailbox
    def offer(self, delivery: Delivery) -> None:
        """Put a delivery into the mailbox now. Raises `Busy` when it is full."""
        try:
            self.post.send_nowait(delivery)
        except trio.WouldBlock:
            raise Busy(f"{self.name} has {CAPACITY} messages waiting") from None

    def offer_alarm(self, alarm: TimerDue | DeadlinePassed) -> None:
        """Put an alarm into the mailbox, once; when there is no room it comes again with the next look at the clock."""
        identity = (alarm.timer.key, alarm.timer.at) if isinstance(alarm, TimerDue) else (alarm.recipient, alarm.seq)
        if identity not in self._alarms:
            try:
                self.post.send_nowait(alarm)
                self._alarms.add(identity)
            except trio.WouldBlock:
                pass

    # -- the loop
    async def run(self) -> None:
        """Serve the mailbox. Raises what crashed the machine, after everything before it is committed."""
        while True:
            deliveries = [await self._mailbox.receive()]
            while len(deliveries) < BATCH:
                try:
                    deliveries.append(self._mailbox.receive_nowait())
                except trio.WouldBlock:
                    break
            batch = Batch(Commit(self.name))
            try:
                for delivery in deliveries:
                    self._take(delivery, batch)
                await self._finish(batch)
            except Exception as error:
                self._abandon(batch, error)
                raise
            if batch.failure:
                raise batch.failure

    def _take(self, delivery: Delivery, batch: Batch) -> None:
        match delivery:
            case LinkBatch():
                self._take_link(delivery, batch)
            case Ask():
                self._take_ask(delivery, batch)
            case TimerDue(timer):
                self._alarms.discard((timer.key, timer.at))
                changes = batch.commit.timers
                current = changes[timer.key] if timer.key in changes else self.system.journal.timer(self.name, timer.key)
                if current == timer:
                    self._alarm(batch, timer.key, timer.trace, timer.body, lambda: changes.__setitem__(timer.key, None))
            case DeadlinePassed(recipient, seq):
                self._alarms.discard((recipient, seq))
                posted = self.system.journal.posted(self.name, recipient, seq)
                if posted and self.system.journal.acks.get((self.name, recipient), 0) < seq:
                    body = encode(Undelivered(recipient, posted.body))
                    given_up = batch.commit.expired
                    self._alarm(batch, f"{recipient}#{seq}", posted.trace, body, lambda: given_up.append((recipient, seq)))

    def _alarm(self, batch: Batch, key: str, trace: str, body: bytes, accept: Callable[[], None]) -> None:
        """Step the machine with a message of its own."""
        meta = Meta(self.address, self.system.now(), trace)
        try:
            step = self._decide(self._decode_local(body), meta)
        except Exception as error:  # whatever a bug raises, the other messages go on
            if self._crashed(batch, (self.address, key, 0), error, meta, body):
                accept()
            return
        accept()
        self._apply(step, meta, batch, None, tag_of(body))

    def _take_ask(self, ask: Ask, batch: Batch) -> None:
        meta = Meta(f"{self.system.node}/edge", self.system.now(), ask.trace)
        batch.asks.append(ask)
        try:
            step = self._decide(ask.message, meta)
        except Exception as error:  # an edge's message is tried once: the edge hears of it
            self.system.log_crash(self.name, meta, error)
            ask.error = error if isinstance(error, Violation) else ActorFailed(f"{self.name} failed (trace {ask.trace})")
            return
        self._apply(step, meta, batch, ask, type(ask.message).__name__)

    def _take_link(self, link: LinkBatch, batch: Batch) -> None:
        """Take what is new of a link, in order; stop at a gap or a crash."""
        batch.links.append(link)
        first = link.envelopes[0]
        before = self._position(first.sender, batch)
        if first.epoch in before.retired:
            link.note = "retired epoch"
            return
        if first.epoch == before.epoch:
            position = before
        else:
            retired = (*before.retired, before.epoch)[-RETIRED_EPOCHS:] if before.epoch else before.retired
            position = Position(first.epoch, 0, retired)
        for e in link.envelopes:
            if e.seq <= position.seq:
                continue  # a duplicate: committed before
            if e.after > position.seq:
                link.note = "gap"
                break
            if not self._take_envelope(e, batch):
                link.note = "crash"
                break
            position = Position(position.epoch, e.seq, position.retired)
            batch.commit.inbox[e.sender] = position
        link.have = position.seq

    def _take_envelope(self, e: Envelope, batch: Batch) -> bool:
        """Step the machine with a message of a link; return whether the link may go on behind it."""
        meta = Meta(e.sender, self.system.now(), e.trace)
        remote = node_of(e.sender) != self.system.node
        try:
            step = self._decide((self._decode_peer if remote else self._decode_local)(e.body), meta)
        except Violation as violation:
            self.system.log_violation(self.name, meta, violation)
            return True
        except Exception as error:  # our bug: isolate the message, let the link go on behind it
            return self._crashed(batch, (e.sender, e.epoch, e.seq), error, meta, e.body, remote=remote)
        self._apply(step, meta, batch, None, tag_of(e.body))
        return True

    def _crashed(
        self, batch: Batch, key: tuple[str, str, int], error: Exception, meta: Meta, body: bytes, *, remote: bool = False
    ) -> bool:
        """Count a crash; return True when the message is quarantined and may be left behind."""
        self.system.log_crash(self.name, meta, error)
        self._crashes[key] = count = self._crashes.get(key, 0) + 1
        if count < CRASHES_BEFORE_QUARANTINE:
            batch.failure = batch.failure or CrashedOn(error, remote)
            return False
        del self._crashes[key]
        batch.commit.quarantined.append((meta.now, meta.sender, meta.trace, repr(error)[:1000], body))
        return True

    # -- a step's changes
    def _decide(self, message: Message, meta: Meta) -> Decided:
        """Run the machine and encode what it wants, so that whatever can fail fails before anything is changed."""
        step = self.machine.handle(self.rows, message, meta)
        rows = {key: None if row is None else encode(row) for key, row in step.rows.items()}
        bodies = [encode(getattr(effect, "message", None)) for effect in step.effects]
        return Decided(step, rows, bodies)

    def _apply(self, decided: Decided, meta: Meta, batch: Batch, ask: Ask | None, tag: str) -> None:
        self.rows.changed.update(decided.step.rows)
        batch.commit.rows.update(decided.rows)
        for effect, body in zip(decided.step.effects, decided.bodies, strict=True):
            self._effect(effect, body, meta, batch, ask)
        self.system.log_step(self.name, meta, tag, decided.step)

    def _effect(self, effect: Effect, body: bytes, meta: Meta, batch: Batch, ask: Ask | None) -> None:
        commit = batch.commit
        match effect:
            case Send(to, _, deadline_s):
                recipient = to if "/" in to else f"{self.system.node}/{to}"
                seq = batch.sent[recipient] = self._last_sent(recipient, batch) + 1
                commit.outbox.append((recipient, Posted(seq, meta.now + deadline_s, meta.trace, body)))
            case Reply(message):
                if ask is not None:
                    ask.reply = message
            case Emit(feed, _):
                seq, at = self.system.feeds.advance(self.name, feed, meta.now)
                commit.events.append((feed, Event(seq, at, body)))
            case DropFeed(feed):
                commit.events = [(name, event) for name, event in commit.events if name != feed]
                commit.dropped_feeds.append(feed)
                self.system.feeds.forget(feed)
            case Wake(key, at, _):
                commit.timers[key] = None if at is None else Timer(self.name, key, at, meta.trace, body)
            case Publish():
                batch.published.append(effect)

    def _position(self, sender: str, batch: Batch) -> Position:
        if sender in batch.commit.inbox:
            return batch.commit.inbox[sender]
        if sender not in self._positions:
            self._positions[sender] = self.system.journal.position(self.name, sender)
        return self._positions[sender]

    def _last_sent(self, recipient: str, batch: Batch) -> int:
        if recipient in batch.sent:
            return batch.sent[recipient]
        if recipient not in self._sent:
            self._sent[recipient] = self.system.journal.last_sent(self.name, recipient)
        return self._sent[recipient]

    async def _finish(self, batch: Batch) -> None:
        """Commit, then let everything leave that waited for it."""
        commit = batch.commit
        if commit:
            self.system.crash_point(self.name, "before commit")
            await self.system.journal.commit(commit)
            self.system.crash_point(self.name, "after commit")
            self.rows.committed(self.rows.changed)
            self.rows.changed = {}
            self._positions.update(commit.inbox)
            self._sent.update(batch.sent)
        for link in batch.links:
            link.done.set()
        for ask in batch.asks:
            ask.done.set()
        self.system.released(self.name, commit, batch.published)


    def _abandon(self, batch: Batch, error: Exception) -> None:
        """Nothing of the batch is committed: say so to everybody who waits for it."""
        self.rows.changed = {}
        for link in batch.links:
            link.have, link.note = self._position(link.envelopes[0].sender, Batch(Commit(self.name))).seq, "crash"
            link.done.set()
        for ask in batch.asks:
            ask.error = ask.error or ActorFailed(f"{self.name} failed (trace {ask.trace}): {type(error).__name__}")
            ask.done.set()


class CrashedOn(Exception):
    """The actor's machine crashed on a message; the actor restarts and meets it again."""

    def __init__(self, error: Exception, remote: bool) -> None:
        super().__init__(repr(error))
        self.error, self.remote = error, remote
