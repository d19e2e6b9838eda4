"""Couriers carry committed messages from outboxes to mailboxes, here and on other nodes.

One courier serves one link (an actor's messages to one recipient). A window of messages is under way in a few frames at
once; acknowledgements are cumulative; on silence, a gap or a full mailbox the courier backs off and goes back to the
first message that is not acknowledged. A courier whose link has nothing left lingers for the next message; those that have
lingered longest end where there are too many.

An acknowledgement is believed only if the recipient names the start of this process, or a former one, that numbered the
message (`lineage.py`). Else a disk went back in time, and the link begins a new numbering; or there are two of us.
"""

from __future__ import annotations

import trio

from actors.kernel.host import Host
from actors.kernel.lineage import Lower, Marks, Relink, agreed, boot_at, first_of
from actors.kernel.machine import LinkDown, Meta
from actors.kernel.mail import RETIRED, LinkBroken
from actors.kernel.records import MessageDamaged, RowDamaged
from protocol.codec import MAX_BATCH, MAX_UNDER_WAY, Ack, Envelope, decode_ack, encode_batch
from protocol.types import PeerLost, Violation, node_of

WINDOW = MAX_UNDER_WAY - MAX_BATCH  # messages of a link under way
FRAMES = 4  # frames of a link under way
FRAME_BYTES = 1 << 20
EXCHANGE_TIMEOUT_S = 10.0
FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.1, 5.0
SET_ASIDE = "the recipient set it aside: it crashed there"
BROKEN_LOOK_S = 1.0  # until the sender of a broken link is reminded of it
TWICE = "refused: another process with this node's key and a copy of its journal is at work (stop it, then start this one again)"


class Courier:
    """Delivers the messages of one link."""

    def __init__(self, system: Host, actor: str, recipient: str) -> None:
        self.system, self.actor, self.recipient = system, actor, recipient
        self._node, self._sender = node_of(recipient), f"{system.node}/{actor}"
        self.trouble = ""  # why the link does not move, for people
        self._broken: LinkBroken | None = None
        self._lost: MessageDamaged | None = None
        self._stopped = False  # where the link stands cannot be read, or another process goes on with it
        self._begin()
        self._asks = False  # where the recipient stands, though there may be nothing to deliver
        self._frames = 0
        self._backoff_s = FIRST_BACKOFF_S
        self._not_before = 0.0
        self._over = False  # it ends when nothing waits
        self._news = trio.Event()

    def _begin(self) -> None:
        """Look where the link stands."""
        found: tuple[str, int, Marks] = "", 0, ()
        try:
            found = self.system.journal.standing(self.actor, self.recipient)
        except RowDamaged as error:
            self._stop(error)
        self._epoch, self.acked, self._known_marks = found  # the recipient has committed up to `acked`
        self._next = self._highest = self.acked  # sent up to here, and before the last return to `acked`
        self._all_marks = False  # that of this start is among them
        self._dry = False  # nothing waited behind `_next` at the last look

    @property
    def was_nudged(self) -> bool:
        """Return whether there may be news since the courier looked last."""
        return self._news.is_set()

    def nudge(self) -> None:
        """There may be more to deliver, or the peer may be back."""
        self._dry = False
        self._news.set()

    def end(self) -> None:
        """There is no room to linger: end when nothing waits."""
        self._over = True
        self._news.set()

    def hurry(self) -> None:
        """The peer is back: do not wait out the back-off."""
        self._not_before, self._backoff_s = 0.0, FIRST_BACKOFF_S
        self._news.set()

    def ask(self) -> None:
        """Ask the recipient where it stands: its disk may have gone back in time while nobody had anything to say."""
        self._asks = self.acked > 0 and self._may_go
        self._news.set()

    @property
    def is_broken(self) -> bool:
        """Return whether the link waits for a new numbering."""
        return self._broken is not None

    def restart(self) -> None:
        """The link is mended."""
        self._broken, self.trouble = None, ""
        self._begin()
        self._back_off()  # a peer that says so again and again must not keep us busy
        self._news.set()

    async def run(self) -> None:
        """Deliver until nothing is pending."""
        async with trio.open_nursery() as nursery:
            while True:
                self._news = trio.Event()
                now = trio.current_time()
                if self._broken is not None and not self._frames:
                    await self.system.link_broken(self.actor, self._broken)
                    with trio.move_on_after(BROKEN_LOOK_S):
                        await self._news.wait()
                    continue
                if now < self._not_before:
                    with trio.move_on_at(self._not_before):
                        await self._news.wait()
                    continue
                if self._lost is not None:
                    damage, self._lost = self._lost, None
                    await self.system.message_lost(damage, self._epoch)
                    with trio.move_on_after(BROKEN_LOOK_S):
                        await self._news.wait()
                    continue
                gathers = self._may_go and not self._dry and self._frames < FRAMES and self._next - self.acked < WINDOW
                if gathers and (batch := self._gather()):
                    self._frames += 1
                    self._next = batch[-1].seq
                    self._highest = max(self._highest, self._next)
                    nursery.start_soon(self._exchange, batch)
                elif self._asks and self._may_go and not self._frames:
                    self._frames += 1
                    nursery.start_soon(self._exchange, self._question())
                elif self._lost is not None:
                    continue
                elif not self._frames and (self._dry or not self.system.journal.waits(self.actor, self.recipient, self.acked)):
                    if self._over or self.trouble or not self._may_go:
                        return
                    self.system.lingers(self)  # on a link where messages go one by one, a new courier costs more than the rest
                    await self._news.wait()
                else:
                    await self._news.wait()

    @property
    def _may_go(self) -> bool:
        return self._broken is None and not self._stopped

    def _marks(self) -> Marks:
        """Return which starts numbered the link's messages. Once this one is among them, nothing is added."""
        if not self._all_marks:
            ours = f":{self.system.journal.boot}"
            if not self._known_marks or not self._known_marks[-1].endswith(ours):
                self._known_marks = self.system.journal.marks(self.actor, self.recipient)
            self._all_marks = bool(self._known_marks) and self._known_marks[-1].endswith(ours)
        return self._known_marks

    def _gather(self) -> list[Envelope]:
        """Return the next envelopes of the window, linked by sequence number."""
        room = min(MAX_BATCH, WINDOW - (self._next - self.acked))
        batch: list[Envelope] = []
        size = 0
        now = self.system.now()
        waiting, damage = self.system.journal.pending(self.actor, self.recipient, max(self._next, self.acked), room)
        self._dry = len(waiting) < room and damage is None
        if damage is not None and not waiting:
            self._lost, self.trouble = damage, str(damage)
        # The first message that is not acknowledged comes behind the last one that is: those between were given up.
        # Marks are read behind messages: a transaction that lands in between may have numbered no message we have.
        marks, before = self._marks(), self._next
        after_boot = boot_at(marks, before)
        settled = bool(marks) and first_of(marks[-1]) <= before  # the last start numbered all that comes
        for posted in waiting:
            if posted.deadline <= now:
                self._dry = False
                break  # its sender is about to hear that it is given up; what follows may not pass it
            size += len(posted.body)
            if batch and size > FRAME_BYTES:
                self._dry = False
                break
            boot = after_boot if settled else boot_at(marks, posted.seq)
            batch.append(
                Envelope(
                    self._sender, self.recipient, self._epoch, posted.seq, before, posted.trace, posted.body, boot, after_boot
                )
            )
            before, after_boot = posted.seq, boot
        return batch

    def _question(self) -> list[Envelope]:
        """Return an envelope without a message: it is not taken, but it is acknowledged."""
        marks, seq = self._marks(), self.acked + 1
        boots = boot_at(marks, seq), boot_at(marks, self.acked)
        return [Envelope(self._sender, self.recipient, self._epoch, seq, self.acked, self.system.new_trace(), b"", *boots)]

    async def _exchange(self, batch: list[Envelope]) -> None:
        acked_before = self.acked
        ack: Ack | None = None
        try:
            if self._node == self.system.node and self.system.has_actor(self.recipient):
                ack = await self.system.deliver_local(batch)
            else:
                with trio.move_on_after(EXCHANGE_TIMEOUT_S):
                    raw = await self.system.transport.exchange(self._node, encode_batch(batch))
                    ack = decode_ack(raw)
                if ack is None:
                    self.trouble = "no acknowledgement in time"
        except LinkDown as error:
            self.trouble = str(error)
            self._asks = False  # it is asked when it comes back
        except Violation as error:
            self.trouble = f"bad acknowledgement: {error}"
        self._frames -= 1
        try:
            self._judge(ack, batch, acked_before)
        except RowDamaged as error:
            self._stop(error)
        self._news.set()

    def _judge(self, ack: Ack | None, batch: list[Envelope], acked_before: int) -> None:
        """Move the window by an acknowledgement, or go back."""
        last = batch[-1].seq if batch[-1].body else batch[-1].after
        if not self._may_go:
            return
        self._asks = self._asks and ack is None
        if ack is not None and self._is_doubtful(ack, acked_before):
            self._next, self._dry = self.acked, False
        elif ack is not None:
            have = self._have(ack)
            if have > self.acked:
                self.acked = have
                self.system.acknowledged(self.actor, self.recipient, have, self._epoch)
                self.system.heard(self.actor, self.recipient)
                self._next = max(self._next, have)
                self._backoff_s = FIRST_BACKOFF_S
            self.trouble = "" if have >= last else SET_ASIDE if have < ack.have else ack.note or "no progress"
            if have >= last:
                return
        self._next, self._dry = self.acked, False
        if ack is not None and ack.note == "gap" and self.acked > acked_before:
            return  # frames overtook one another, but the link moves: no reason to wait
        self._back_off()

    def _stop(self, error: RowDamaged) -> None:
        """Where the link stands cannot be read: nothing moves on it before the next start."""
        self.trouble, self._stopped = str(error), True
        self.system.log_damaged(self.actor, Meta(self._sender, self.system.now(), self.system.new_trace()), error)

    def _back_off(self) -> None:
        self._not_before = trio.current_time() + self._backoff_s * self.system.jitter()
        self._backoff_s = min(self._backoff_s * 2, LAST_BACKOFF_S)

    def _have(self, ack: Ack) -> int:
        """Return up to where the outbox may forget. What the recipient set aside stays until its sender was told."""
        if not ack.refused or self.system.machine(self.actor) is None:
            return ack.have  # a port or an edge hears nothing of it
        posted = self.system.journal.posted
        owed = [seq for seq in ack.refused if self.acked < seq <= ack.have and posted(self.actor, self.recipient, seq)]
        if not owed:
            return ack.have
        self.system.alarms.refused(self.actor, self.recipient, self._epoch, owed, SET_ASIDE)
        return min(owed) - 1

    def _is_doubtful(self, ack: Ack, acked_before: int) -> bool:
        """Return whether the peer remembers this link otherwise than we do. Then the link stops, and says why."""
        marks, sent = self._marks(), self._highest
        if ack.have > sent:  # a courier before this one may have sent more
            sent = self.system.journal.last_sent(self.actor, self.recipient)
        is_ours = ack.have <= sent and (ack.have < self.acked or boot_at(marks, ack.have) == boot_at(ack.boots, ack.have))
        if ack.note == RETIRED or not is_ours:
            both = agreed(marks, ack.boots, self.acked, min(ack.have, sent))
            lost = PeerLost(self.recipient, both + 1, max(ack.have, both + 1), here=True)
            if self.system.was_heard(self.actor, self.recipient):  # in this life: it is not we who went back
                self.trouble, self._stopped = TWICE, True
                self.system.log_twice(self.recipient)
                return True
            self._broken = LinkBroken(self._epoch, Relink(self.recipient, self.system.journal.new_epoch(), both), lost)
        elif ack.have < acked_before:
            lost = PeerLost(self.recipient, ack.have + 1, self.acked)
            boot = "" if boot_at(marks, ack.have) else boot_at(ack.boots, ack.have)  # else the mark is there
            self._broken = LinkBroken(self._epoch, Lower(self.recipient, ack.have, boot), lost)
        else:
            return False
        self.trouble = f"messages {lost.first} to {lost.last} are forgotten {'here' if lost.here else 'there'}: a new beginning"
        self.system.log_broken(self.actor, lost)
        return True
