"""An actor: a bounded mailbox and a loop around one machine.

The loop awaits two things only, its mailbox and its journal, so a cycle of full mailboxes cannot deadlock; couriers block
instead. It takes a batch, steps the machine through it on top of its committed rows, commits once, and only then lets
acknowledgements, replies and sends leave.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Union, get_args

import trio

from actors.kernel.feed import next_head
from actors.kernel.journal import Commit, Event, Posted, RowDamaged, Timer
from actors.kernel.lineage import Lower, Position, Relink
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
from actors.kernel.mailbox import (
    BATCH,
    CAPACITY,
    RETIRED,
    Alarm,
    AlarmRings,
    Ask,
    CrashedOn,
    Crashes,
    DeadlinePassed,
    Delivery,
    LinkBatch,
    LinkBroken,
    Outcome,
    TimerDue,
    in_order,
)
from actors.kernel.row_view import RowView, row_decoder
from protocol.codec import MAX_BODY_BYTES, Decoder, Envelope, encode
from protocol.types import Message, PeerLost, Undelivered, Violation, node_of

if TYPE_CHECKING:
    from actors.kernel.system import System

CACHED_LINKS = 4096


@dataclass(slots=True)
class Batch:
    """What a run of the loop gathers until its commit, and lets go after it."""

    commit: Commit
    asks: list[Ask] = field(default_factory=list)
    links: list[LinkBatch] = field(default_factory=list)
    published: list[Publish] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    heads: dict[str, tuple[int, float]] = field(default_factory=dict)  # of feeds: number and time of the last event
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
        self.takes_peers = machine.peer is not None
        self._hears_lost = PeerLost in get_args(machine.local)
        self._decode_local: Callable[[bytes], Message] = Decoder(Union[machine.local, machine.peer, None])  # noqa: UP007
        self._decode_peer: Callable[[bytes], Message] = Decoder(Union[machine.peer, None])  # noqa: UP007
        self.rows = RowView(system.journal, self.name, row_decoder(machine.rows))
        self._positions: dict[str, Position] = {}
        self._strangers: OrderedDict[str, Position] = OrderedDict()
        self._sent: dict[str, int] = {}
        self._crashes = Crashes()
        self._alarms: dict[tuple[str, float], Alarm] = {}  # those that wait, by key and time or recipient and number

    # -- the mailbox
    def offer(self, delivery: Delivery) -> None:
        """Put a delivery into the mailbox now. Raises `Busy` when it is full."""
        try:
            self.post.send_nowait(delivery)
        except trio.WouldBlock:
            raise Busy(f"the mailbox of {self.name} is full") from None

    def offer_alarm(self, alarm: Alarm) -> None:
        """Put an alarm behind those that wait, once. Over `CAPACITY` it comes again with the next look at the clock."""
        match alarm:
            case TimerDue(timer):
                identity = (timer.key, timer.at)
            case DeadlinePassed(recipient, seq):
                identity = (recipient, seq)
            case LinkBroken(lost=lost):
                identity = (lost.to, 0)
        if identity in self._alarms or len(self._alarms) >= CAPACITY:
            return
        if not self._alarms:
            try:
                self.post.send_nowait(AlarmRings())
            except trio.WouldBlock:
                pass  # a full mailbox wakes the actor as well
        self._alarms[identity] = alarm

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
                for delivery in in_order(deliveries):
                    self._take(delivery, batch)
                alarms, self._alarms = self._alarms, {}
                for alarm in alarms.values():
                    self._take_alarm(alarm, batch)
                await self._finish(batch)
            except Exception as error:
                self._abandon(batch, error)
                raise
            if batch.failure:
                raise batch.failure

    def _take(self, delivery: Delivery, batch: Batch) -> None:
        match delivery:
            case LinkBatch():
                if delivery.envelopes:
                    self._take_link(delivery, batch)
            case Ask():
                self._take_ask(delivery, batch)
            case AlarmRings():
                pass

    def _take_alarm(self, alarm: Alarm, batch: Batch) -> None:
        """Take what became due, unless a message before it replaced the timer or an acknowledgement came."""
        journal, commit = self.system.journal, batch.commit
        match alarm:
            case TimerDue(timer):
                known = timer.key in commit.timers
                if (commit.timers[timer.key] if known else journal.timer(self.name, timer.key)) != timer:
                    return
                self._alarm(batch, timer.key, timer.trace, timer.body, lambda: commit.timers.__setitem__(timer.key, None))
            case DeadlinePassed(recipient, seq):
                posted = journal.posted(self.name, recipient, seq)
                if posted is None or posted.deadline > self.system.now() or journal.acked(self.name, recipient) >= seq:
                    return
                body = encode(Undelivered(recipient, posted.body))
                self._alarm(batch, f"{recipient}#{seq}", posted.trace, body, lambda: commit.expired.append((recipient, seq)))
            case LinkBroken(epoch, mend, lost):
                self._take_broken(epoch, mend, lost, batch)

    def _take_broken(self, epoch: str, mend: Relink | Lower, lost: PeerLost, batch: Batch) -> None:
        """Mend the numbering of a link, and tell the machine what was lost, in one step."""
        known = self.system.journal.outgoing(self.name, lost.to)
        done = known.epoch != epoch or (isinstance(mend, Lower) and known.acked <= mend.acked)
        if done or any(other.recipient == lost.to for other in batch.commit.relinked):
            return
        if self._hears_lost:
            trace = self.system.new_trace()
            self._alarm(batch, f"{lost.to}#lost", trace, encode(lost), lambda: batch.commit.relinked.append(mend))
        else:
            batch.commit.relinked.append(mend)

    def _alarm(self, batch: Batch, key: str, trace: str, body: bytes, accept: Callable[[], None]) -> None:
        """Step the machine with a message of its own."""
        meta = Meta(self.address, self.system.now(), trace)
        try:
            message = self._decode_local(body)
            step = self._decide(message, meta)
        except RowDamaged as error:  # it is due for as long as the row cannot be read
            self.system.log_damaged(self.name, meta, error)
            return
        except Exception as error:  # whatever a bug raises, the other messages go on
            if self._crashed(batch, (self.address, key, 0), error, meta, body):
                accept()
            return
        accept()
        self._apply(step, meta, batch, None, type(message).__name__)

    def _take_ask(self, ask: Ask, batch: Batch) -> None:
        meta = Meta(f"{self.system.node}/edge", self.system.now(), ask.trace)
        batch.asks.append(ask)
        try:
            step = self._decide(ask.message, meta)
        except Violation as violation:
            self.system.log_violation(self.name, meta, violation)
            ask.error = violation
            return
        except RowDamaged as error:
            self.system.log_damaged(self.name, meta, error)
            ask.error = ActorFailed(f"{error} (trace {ask.trace})")
            return
        except Exception as error:  # an edge's message is tried once: the edge hears of it
            self.system.log_crash(self.name, meta, error)
            ask.error = ActorFailed(f"{self.name} failed (trace {ask.trace})")
            return
        self._apply(step, meta, batch, ask, type(ask.message).__name__)

    def _take_link(self, link: LinkBatch, batch: Batch) -> None:
        """Take what is new of a link, in order; stop at a gap or a crash."""
        batch.links.append(link)
        position = self._strangers.get(link.sender) or self._position(link.sender, batch)
        if position.is_retired(link.epoch):
            link.note = RETIRED
            link.stand(position)
            return
        stranger = link.sender in self._strangers or not position.epoch
        position = position.under(link.epoch)
        for e in link.envelopes:
            if e.seq < position.seq:
                continue  # a duplicate: committed before
            if note := position.objection(e):
                link.note = note
                break
            if e.seq == position.seq or not e.body:  # known already; or a question where we stand
                continue
            outcome = self._take_envelope(e, batch)
            if outcome in (Outcome.CRASH, Outcome.WAITS):
                link.note = "crash" if outcome is Outcome.CRASH else "damaged row"
                break
            position = position.behind(e)
            if outcome is Outcome.VIOLATION and stranger:
                self._estrange(e.sender, position)
            else:
                stranger = False
                self._strangers.pop(e.sender, None)
                batch.commit.inbox[e.sender] = position
        link.stand(position)

    def _estrange(self, sender: str, position: Position) -> None:
        """Remember, in memory only, a link that has brought nothing but violations: names are free, and rows are not."""
        self._strangers[sender] = position
        self._strangers.move_to_end(sender)
        if len(self._strangers) > CACHED_LINKS:
            self._strangers.popitem(last=False)  # should it go on, it begins anew

    def _take_envelope(self, e: Envelope, batch: Batch) -> Outcome:
        """Step the machine with a message of a link; at a crash the link may not go on behind it."""
        meta = Meta(e.sender, self.system.now(), e.trace)
        remote = node_of(e.sender) != self.system.node
        try:
            message = (self._decode_peer if remote else self._decode_local)(e.body)
            tag = type(message).__name__
            step = self._decide(message, meta)
        except Violation as violation:
            self.system.log_violation(self.name, meta, violation)
            return Outcome.VIOLATION
        except RowDamaged as error:
            self.system.log_damaged(self.name, meta, error)
            return Outcome.WAITS
        except Exception as error:  # our bug: isolate the message, let the link go on behind it
            quarantined = self._crashed(batch, (e.sender, e.epoch, e.seq), error, meta, e.body, remote=remote)
            return Outcome.TAKEN if quarantined else Outcome.CRASH
        self._apply(step, meta, batch, None, tag)
        return Outcome.TAKEN

    def _crashed(
        self, batch: Batch, key: tuple[str, str, int], error: Exception, meta: Meta, body: bytes, *, remote: bool = False
    ) -> bool:
        """Count a crash; return True when the message is quarantined and may be left behind."""
        self.system.log_crash(self.name, meta, error)
        if not self._crashes.count(key):
            batch.failure = batch.failure or CrashedOn(error, remote)
            return False
        batch.commit.quarantined.append((meta.now, meta.sender, meta.trace, repr(error)[:1000], body))
        return True

    # -- a step's changes
    def _decide(self, message: Message, meta: Meta) -> Decided:
        """Run the machine and encode what it wants, so that whatever can fail fails before anything is changed."""
        step = self.machine.handle(self.rows, message, meta)
        rows = {key: None if row is None else encode(row) for key, row in step.rows.items()}
        bodies = [encode(getattr(effect, "message", None)) for effect in step.effects]
        for effect, body in zip(step.effects, bodies, strict=True):
            if len(body) > MAX_BODY_BYTES:
                raise ValueError(f"{type(effect).__name__} of {len(body)} bytes is over the limit of {MAX_BODY_BYTES}")
            if isinstance(effect, Emit | DropFeed):
                self.system.feeds.claim(self.name, effect.feed)
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
                head = batch.heads[feed] if feed in batch.heads else self.system.journal.feed_head(feed)
                batch.heads[feed] = seq, at = next_head(head, meta.now)
                commit.events.append((feed, Event(seq, at, body)))
            case DropFeed(feed):
                commit.events = [(name, event) for name, event in commit.events if name != feed]
                commit.dropped_feeds.append(feed)
                batch.heads[feed] = (0, 0.0)  # its numbers start again at 1
            case Wake(key, at, _):
                commit.timers[key] = None if at is None else Timer(self.name, key, at, meta.trace, body)
            case Publish():
                batch.published.append(effect)

    def _position(self, sender: str, batch: Batch) -> Position:
        if sender in batch.commit.inbox:
            return batch.commit.inbox[sender]
        if sender not in self._positions:
            if len(self._positions) >= CACHED_LINKS:  # what is committed can be read again
                self._positions.clear()
            self._positions[sender] = self.system.journal.position(self.name, sender)
        return self._positions[sender]

    def _last_sent(self, recipient: str, batch: Batch) -> int:
        if recipient in batch.sent:
            return batch.sent[recipient]
        if recipient not in self._sent:
            if len(self._sent) >= CACHED_LINKS:
                self._sent.clear()
            self._sent[recipient] = self.system.journal.last_sent(self.name, recipient)
        return self._sent[recipient]

    async def _finish(self, batch: Batch) -> None:
        """Commit, then let everything leave that waited for it."""
        commit = batch.commit
        if commit:
            self.system.crash_point(self.name, "before commit")
            await self.system.journal.commit(commit)
            self.system.crash_point(self.name, "after commit")
            self.rows.committed(commit.rows)
            self._positions.update(commit.inbox)
            self._sent.update(batch.sent)
            for relink in commit.relinked:
                self._sent.pop(relink.recipient, None)
        for link in batch.links:
            link.done.set()
        for ask in batch.asks:
            ask.done.set()
        self.system.released(self.name, commit, batch.published)

    def _abandon(self, batch: Batch, error: Exception) -> None:
        """Nothing of the batch is committed: say so to everybody who waits for it."""
        self.rows.changed = {}
        for link in batch.links:
            link.note = "crash"
            link.stand(self.system.journal.position(self.name, link.sender))
            link.done.set()
        for ask in batch.asks:
            ask.error = ask.error or ActorFailed(f"{self.name} failed (trace {ask.trace}): {type(error).__name__}")
            ask.done.set()
