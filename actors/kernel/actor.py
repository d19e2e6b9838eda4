"""An actor: a bounded mailbox and a loop around one machine.

The loop awaits two things only, its mailbox and its journal, so a cycle of full mailboxes cannot deadlock; couriers block
instead. It takes a batch, steps the machine through it on top of its committed rows, commits once, and only then lets
acknowledgements, replies and sends leave.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import get_args

import msgspec
import trio

from actors.kernel.batch import Batch, BatchTurns, Decided
from actors.kernel.feed import next_head
from actors.kernel.host import Host
from actors.kernel.lineage import Lower, Position
from actors.kernel.machine import (
    MAX_DEADLINE_S,
    ActorFailed,
    DropFeed,
    Effect,
    Emit,
    JournalWaits,
    Machine,
    Meta,
    Publish,
    Reply,
    Send,
    Wake,
    check_step,
)
from actors.kernel.mail import (
    BATCH,
    BATCH_S,
    CAPACITY,
    RETIRED,
    Alarm,
    AlarmKey,
    AlarmRings,
    Ask,
    Crashes,
    DeadlinePassed,
    Delivery,
    LinkBatch,
    LinkBroken,
    Outcome,
    Release,
    TimerDue,
    by_rank,
    fresh,
    key_of,
)
from actors.kernel.mailbox import Mailbox
from actors.kernel.records import Commit, Event, JournalError, MessageDamaged, Posted, RowDamaged, Timer
from actors.kernel.row_view import MAX_ROW_BYTES, RowView, row_decoder
from protocol.codec import MAX_BODY_BYTES, Envelope, encode
from protocol.types import Message, PeerLost, Undelivered, Violation, node_of

CACHED_LINKS = 4096
ON_FEEDS = (Emit, DropFeed)


class Actor(Mailbox):
    """Runs one machine on one journal."""

    def __init__(self, system: Host, machine: Machine, capacity: int = CAPACITY) -> None:
        super().__init__(system, machine, capacity)
        self.machine = machine
        self._row_types = frozenset(get_args(machine.rows) or (machine.rows,))
        self._hears_lost = PeerLost in get_args(machine.local)
        self._alarms: dict[AlarmKey, Alarm] = {}  # those that wait
        self._failing = Crashes()  # alarms, which are never given up
        self._backlog: list[Delivery] = []  # out of the mailbox, and not taken yet
        self._cut_short = ""  # the node whose turn ended with the time of a batch
        self._turns = BatchTurns()
        self.forget()

    def forget(self) -> None:
        """Begin again with what is committed."""
        self.ringing = bool(self._alarms)  # there are alarms that are not through yet
        self.rows = RowView(self.system.journal, self.name, row_decoder(self.machine.rows))
        self._positions: dict[str, Position] = {}
        self._strangers: OrderedDict[str, Position] = OrderedDict()
        self._sent: dict[str, int] = {}

    # -- the mailbox
    def offer_alarm(self, alarm: Alarm) -> None:
        """Put an alarm behind those that wait, once. Over `CAPACITY` it comes again with the next look at the clock."""
        identity = key_of(alarm)
        if identity in self._alarms or len(self._alarms) >= CAPACITY:
            return
        if not self._alarms:
            try:
                self.post.send_nowait(AlarmRings())
            except trio.WouldBlock:
                pass  # a full mailbox wakes the actor as well
        self._alarms[identity] = alarm
        self.ringing = True

    def position(self, sender: str) -> Position:
        """Return how far a link is read; where only violations came, that is in memory alone."""
        return self._strangers.get(sender) or super().position(sender)

    # -- the loop
    async def run(self) -> None:
        """Serve the mailbox. A message that crashes the machine stops its link alone; whatever else fails is raised."""
        while True:
            if self.system.journal.trouble:  # nothing is decided that could not be kept
                await self.system.journal.well()
            if not self._backlog and not self._alarms:
                self._backlog.append(await self._mailbox.receive())
            while len(self._backlog) < BATCH:
                try:
                    self._backlog.append(self._mailbox.receive_nowait())
                except trio.WouldBlock:
                    break
            batch = Batch(Commit(self.name), trio.current_time() + BATCH_S)
            try:
                rang = False
                for some in self._turns.take(by_rank(self._backlog, self.system.node, self._cut_short), batch):
                    if some:
                        self._take_some(some, batch)
                    else:
                        rang = self._take_alarms(batch)
                await self._finish(batch)
            except JournalWaits as error:  # everything is again as before the batch: what is committed is all that there is
                self._abandon(batch, error)
                self.forget()
                continue
            except Exception as error:
                self._abandon(batch, error)
                raise
            if rang and not self._alarms:
                self.ringing = False
                self.system.alarms.taken(self.name)

    def _take_alarms(self, batch: Batch) -> bool:
        """Take alarms that wait, at least one; return whether there were any."""
        rang = False
        while self._alarms and not (rang and batch.over):
            rang = True
            try:
                self._take_alarm(self._alarms.pop(next(iter(self._alarms))), batch)
            except RowDamaged as error:  # of the link that it is about: it comes again with the next look at the clock
                self.system.log_damaged(self.name, Meta(self.address, self.system.now(), self.system.new_trace()), error)
        return rang

    def _take_some(self, deliveries: list[Delivery], batch: Batch) -> None:
        """Take deliveries until the time of the batch is over, at least a message; the others stay in the backlog."""
        for number, delivery in enumerate(deliveries):
            if number and batch.over:
                return
            self._backlog.remove(delivery)
            match delivery:
                case LinkBatch():
                    if delivery.envelopes:
                        self._take_link(delivery, batch)
                case Ask():
                    self._take_ask(delivery, batch)
                case Release():
                    self._take_release(delivery, batch)
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
                self._alarm(batch, alarm, timer.trace, lambda: self._decode_local(timer.body))
            case DeadlinePassed(recipient, seq, _, reason):
                try:
                    posted = journal.posted(self.name, recipient, seq)
                except MessageDamaged as error:
                    self._take_lost(alarm, error, batch)
                    return
                if posted is None or journal.acked(self.name, recipient) >= seq:
                    return
                if alarm.epoch != journal.outgoing(self.name, recipient).epoch:
                    return  # the number is another message's by now
                body = posted.body
                self._alarm(batch, alarm, posted.trace, lambda: Undelivered(recipient, body, reason))
            case LinkBroken():
                self._take_broken(alarm, batch)

    def _take_broken(self, alarm: LinkBroken, batch: Batch) -> None:
        """Mend the numbering of a link, and tell the machine what was lost, in one step."""
        to, mend = alarm.lost.to, alarm.mend
        known = self.system.journal.outgoing(self.name, to)
        done = known.epoch != alarm.epoch or (isinstance(mend, Lower) and known.acked <= mend.acked)
        if done or any(other.recipient == to for other in batch.commit.relinked):
            return
        if not self._hears_lost:
            batch.commit.relinked.append(mend)
        elif not self.system.alarms.is_waiting(self.name, key_of(alarm)[0]):
            self._alarm(batch, alarm, self.system.new_trace(), lambda: alarm.lost)

    def _take_lost(self, alarm: DeadlinePassed, error: MessageDamaged, batch: Batch) -> None:
        """Give up a message that nobody can read any more; the machine hears that its peer does not get it."""
        if (error.recipient, error.seq) in batch.commit.expired:
            return
        lost = PeerLost(error.recipient, error.seq, error.seq, here=True)
        trace = self.system.new_trace()
        self.system.log_damaged(self.name, Meta(self.address, self.system.now(), trace), error)
        self.system.log_broken(self.name, lost)
        if self._hears_lost:
            self._alarm(batch, alarm, trace, lambda: lost)
        else:
            batch.commit.expired.append((error.recipient, error.seq))

    def _alarm(self, batch: Batch, alarm: Alarm, trace: str, read: Callable[[], Message]) -> None:
        """Step the machine with a message of its own. One that cannot be handled is never given up: it comes again."""
        meta = Meta(self.address, self.system.now(), trace)
        what, _ = key_of(alarm)
        try:
            message = read()
            step = self._decide(message, meta)
        except JournalError:  # our disk's fault, and no message's
            raise
        except Exception as error:  # whatever a bug raises, the other messages go on
            if isinstance(error, RowDamaged):
                self.system.log_damaged(self.name, meta, error)
            else:
                self.system.log_crash(self.name, meta, error)
            times = self._failing.count((what, "", 0), meta.now, 0.0)
            self._defer(alarm, self.system.alarms.failed(self.name, what, error, times), batch.commit)
            return
        self._failing.forget((what, "", 0))
        self.system.alarms.handled(self.name, what)
        match alarm:
            case TimerDue(timer):
                batch.commit.timers[timer.key] = None
            case DeadlinePassed(recipient, seq):
                batch.commit.expired.append((recipient, seq))
            case LinkBroken(mend=mend):
                batch.commit.relinked.append(mend)
        self._apply(step, meta, batch, None, type(message).__name__)

    def _defer(self, alarm: Alarm, again: float, commit: Commit) -> None:
        match alarm:
            case TimerDue(timer):
                commit.timers[timer.key] = msgspec.structs.replace(timer, at=again)
            case DeadlinePassed(recipient, seq):
                commit.deferred.append((recipient, seq, again))
            case LinkBroken():
                pass  # its courier reminds of it

    def _take_release(self, release: Release, batch: Batch) -> None:
        """Handle a message of the quarantine: once more, and no more if it fails again."""
        batch.releases.append(release)
        if (found := self.release(release)) is None:
            return
        one, message = found
        meta = Meta(one.sender, self.system.now(), one.trace)
        try:
            step = self._decide(message, meta)
        except JournalError:
            raise
        except Exception as error:
            self.failed_again(release, error)
            return
        batch.commit.released.append(release.number)
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
        except JournalError:  # our disk's fault, and no message's
            raise
        except Exception as error:  # an edge's message is tried once: the edge hears of it
            self.system.log_crash(self.name, meta, error)
            ask.error = ActorFailed(f"{self.name} failed (trace {ask.trace})")
            return
        self._apply(step, meta, batch, ask, type(ask.message).__name__)

    def _take_link(self, link: LinkBatch, batch: Batch) -> None:
        """Take what is new of a link, in order; stop at a gap or a crash."""
        try:
            position = self._strangers.get(link.sender) or self._position(link.sender, batch)
        except RowDamaged as error:  # which of its messages are new is not known: it waits, and nothing of it is acknowledged
            self.system.log_damaged(self.name, Meta(link.sender, self.system.now(), link.envelopes[0].trace), error)
            link.note = "damaged row"
            link.done.set()
            return
        batch.links.append(link)
        if position.is_retired(link.epoch):
            link.note = RETIRED
            link.stand(position)
            return
        stranger = link.sender in self._strangers or not position.epoch
        position = position.under(link.epoch)
        node = node_of(link.sender)
        for e, behind in fresh(link, position):
            if node != self.system.node and self.system.answers.is_full(node, batch.answers):
                link.note = "busy"  # until it has taken what it asked for before
                break
            outcome = self._take_envelope(e, batch)
            if outcome is Outcome.CRASH or outcome is Outcome.WAITS:
                link.note = "crash" if outcome is Outcome.CRASH else "damaged row"
                break
            position = behind
            if outcome is Outcome.VIOLATION and stranger:
                self._estrange(e.sender, position)
            else:
                stranger = False
                if self._strangers:
                    self._strangers.pop(e.sender, None)
                batch.commit.inbox[e.sender] = position
            if batch.over and e is not link.envelopes[-1]:
                batch.links.remove(link)  # it is not answered before its rest was taken as well
                self._backlog.append(link)
                self._cut_short = node
                break
        link.stand(position)

    def _estrange(self, sender: str, position: Position) -> None:
        """Remember, in memory only, a link that has brought nothing but violations: names are free, and rows are not."""
        self._strangers[sender] = position
        self._strangers.move_to_end(sender)
        if len(self._strangers) > CACHED_LINKS:
            self._strangers.popitem(last=False)  # should it go on, it begins anew

    def _take_envelope(self, e: Envelope, batch: Batch) -> Outcome:
        """Step the machine with a message of a link; at a crash the link may not go on behind it."""
        node = node_of(e.sender)
        origin = self.system.origin(node) if node != self.system.node else ""
        meta = Meta(e.sender, self.system.now(), e.trace, origin)
        if self.held(e):
            return Outcome.CRASH
        try:
            message = self.decode(e.sender, e.body)
            tag = type(message).__name__
            step = self._decide(message, meta)
        except Violation as violation:
            self.system.log_violation(self.name, meta, violation)
            return Outcome.VIOLATION
        except RowDamaged as error:
            self.system.log_damaged(self.name, meta, error)
            return Outcome.WAITS
        except JournalError:  # our disk's fault, and no message's
            raise
        except Exception as error:  # our bug: isolate the message, let the link go on behind it
            self.system.log_crash(self.name, meta, error)
            return Outcome.TAKEN if self.quarantined(batch.commit, e, error, meta.now) else Outcome.CRASH
        self._apply(step, meta, batch, None, tag)
        return Outcome.TAKEN

    # -- a step's changes
    def _decide(self, message: Message, meta: Meta) -> Decided:
        """Run the machine and encode what it wants, so that whatever can fail fails before anything is changed."""
        step = self.machine.handle(self.rows, message, meta)
        while self.rows.damage:
            self.system.log_damaged(self.name, meta, self.rows.damage.pop())
        check_step(step)
        rows: dict[str, bytes | None] = {}
        for key, row in step.rows.items():
            if row is None:
                rows[key] = None
                continue
            if type(row) not in self._row_types:
                raise TypeError(f"row {key[:80]} is a {type(row).__name__}, which {self.name} could not read again")
            rows[key] = body = encode(row)
            if len(body) > MAX_ROW_BYTES:
                raise ValueError(f"row {key[:80]} is over the limit of {MAX_ROW_BYTES} bytes")
        bodies = []
        for effect in step.effects:
            body = encode(getattr(effect, "message", None))
            if len(body) > MAX_BODY_BYTES:
                raise ValueError(f"{type(effect).__name__} of {len(body)} bytes is over the limit of {MAX_BODY_BYTES}")
            bodies.append(body)
            if isinstance(effect, Send):
                self._last_sent(effect.to if "/" in effect.to else f"{self.system.node}/{effect.to}")
            if isinstance(effect, ON_FEEDS):
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
                last = batch.sent[recipient] if recipient in batch.sent else self._last_sent(recipient)
                seq = batch.sent[recipient] = last + 1
                commit.outbox.append((recipient, Posted(seq, meta.now + min(deadline_s, MAX_DEADLINE_S), meta.trace, body)))
                batch.posted_bytes += len(body)
                if ask is None and node_of(recipient) == node_of(meta.sender) != self.system.node:
                    batch.answers.append((recipient, seq, len(body)))
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
            case Wake(key, at, _, keep):
                if keep and self._is_set(key, commit):
                    return
                commit.timers[key] = None if at is None else Timer(self.name, key, at, meta.trace, body)
            case Publish():
                batch.published.append(effect)

    def _is_set(self, key: str, commit: Commit) -> bool:
        timer = commit.timers[key] if key in commit.timers else self.system.journal.timer(self.name, key)
        return timer is not None

    def _position(self, sender: str, batch: Batch) -> Position:
        if sender in batch.commit.inbox:
            return batch.commit.inbox[sender]
        if sender not in self._positions:
            if len(self._positions) >= CACHED_LINKS:  # what is committed can be read again
                self._positions.clear()
            self._positions[sender] = self.system.journal.position(self.name, sender)
        return self._positions[sender]

    def _last_sent(self, recipient: str) -> int:
        """Return the number of the last committed message to a recipient. Raises `RowDamaged`."""
        if recipient not in self._sent:
            if len(self._sent) >= CACHED_LINKS:
                self._sent.clear()
            self._sent[recipient] = self.system.journal.last_sent(self.name, recipient)
        return self._sent[recipient]

    async def _finish(self, batch: Batch) -> None:
        """Commit, then let everything leave that waited for it."""
        commit = batch.commit
        if not commit and (self._backlog or self._alarms):
            await trio.lowlevel.checkpoint()  # as with a commit: nobody keeps the others from running
        if commit:
            self.system.crash_point(self.name, "before commit")
            await self.system.journal.commit(commit)
            self.system.crash_point(self.name, "after commit")
            self.rows.committed(commit.rows)
            self._positions.update(commit.inbox)
            self._sent.update(batch.sent)
            for recipient, seq, size in batch.answers:
                self.system.answers.add(self.name, recipient, seq, size)
            for relink in commit.relinked:
                self._sent.pop(relink.recipient, None)
        for link in batch.links:
            self.answer(link)
        for ask in batch.asks:
            ask.done.set()
        for release in batch.releases:
            release.done.set()
        self.system.released(self.name, commit, batch.published)

    def _abandon(self, batch: Batch, error: Exception) -> None:
        """Nothing of the batch is committed: say so to everybody who waits for it."""
        self.rows.changed = {}
        for link in batch.links:
            link.note = "busy" if isinstance(error, JournalWaits) else "crash"
            with suppress(RowDamaged):
                link.stand(self.system.journal.position(self.name, link.sender))
            self.answer(link)
        for ask in batch.asks:
            failed = ActorFailed(f"{self.name} failed (trace {ask.trace}): {type(error).__name__}")
            ask.error = ask.error or (error if isinstance(error, JournalWaits) else failed)
            ask.reply = None
            ask.done.set()
        for release in batch.releases:
            release.error = release.error or error
            release.done.set()
