"""Each mutant breaks one promise of the kernel; the simulation must notice. A survivor is a hole in the simulator.

`test_simulation.py` runs the same seeds on the kernel as it is, and finds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import islice
from typing import Any

import pytest
import trio
from msgspec import structs
from sim_disk import SimJournal
from sim_seeds import share
from sim_world import Broken, World, simulate
from test_simulation import first_cause

from actors.kernel import courier as courier_module
from actors.kernel import lineage as lineage_module
from actors.kernel import mailbox, port
from actors.kernel.actor import Actor, Batch
from actors.kernel.alarms import Alarms
from actors.kernel.courier import Courier
from actors.kernel.journal import Journal
from actors.kernel.lineage import Position, marked
from actors.kernel.machine import JournalWaits
from actors.kernel.mail import LinkBatch, TimerDue
from actors.kernel.records import Commit
from actors.kernel.system import System
from protocol.codec import Ack, Envelope

MOST_SEEDS = 40
Patch = pytest.MonkeyPatch


def no_dedupe(patch: Patch) -> None:
    """Takes what it has already taken."""
    take = Actor._take_link

    def repeated(self: Actor, link: LinkBatch, batch: Batch) -> None:
        first = link.envelopes[0]
        position = self._position(first.sender, batch)
        if first.epoch == position.epoch and first.seq <= position.seq:
            before = marked((), first.seq - 1, first.after_boot)
            batch.commit.inbox[first.sender] = Position(position.epoch, first.seq - 1, position.retired, before)
        take(self, link, batch)

    patch.setattr(Actor, "_take_link", repeated)


def acknowledges_before_commit(patch: Patch) -> None:
    take = Actor._take_link

    def early(self: Actor, link: LinkBatch, batch: Batch) -> None:
        take(self, link, batch)
        link.done.set()

    patch.setattr(Actor, "_take_link", early)


def inbox_not_advanced(patch: Patch) -> None:
    """The position is kept in memory alone."""
    commit = Journal.commit

    async def forgetful(self: Journal, changes: Commit) -> None:
        changes.inbox = {}
        await commit(self, changes)

    checked = SimJournal.commit

    async def both(self: SimJournal, changes: Commit) -> None:
        kept, changes.inbox = changes.inbox, {}
        if changes:
            await checked(self, changes)
        changes.inbox = kept

    patch.setattr(Journal, "commit", forgetful)
    patch.setattr(SimJournal, "commit", both)


def no_gap_check(patch: Patch) -> None:
    patch.setattr(Position, "objection", lambda self, e: "")


def timer_stays(patch: Patch) -> None:
    """A timer that rang is not taken away."""
    take = Actor._take_alarm

    def again(self: Actor, alarm: Any, batch: Batch) -> None:
        take(self, alarm, batch)
        if isinstance(alarm, TimerDue) and batch.commit.timers.get(alarm.timer.key, alarm) is None:
            del batch.commit.timers[alarm.timer.key]

    patch.setattr(Actor, "_take_alarm", again)


def outbox_released_before_commit(patch: Patch) -> None:
    """Messages leave for their recipients while their step is on its way to the disk."""
    finish = Actor._finish

    async def early(self: Actor, batch: Batch) -> None:
        for recipient, posted in batch.commit.outbox:
            envelope = Envelope(
                self.address, recipient, self.system.journal.boot, posted.seq, posted.seq - 1, posted.trace, posted.body,
                self.system.journal.boot, self.system.journal.boot,
            )  # fmt: skip
            if not self.system.has_actor(recipient):
                trio.lowlevel.spawn_system_task(_leave, Courier(self.system, self.name, recipient), [envelope])
        await finish(self, batch)

    async def _leave(courier: Courier, batch: list[Envelope]) -> None:
        from actors.kernel.machine import LinkDown
        from protocol.codec import encode_batch
        from protocol.types import node_of

        try:
            with trio.move_on_after(10):
                await courier.system.transport.exchange(node_of(courier.recipient), encode_batch(batch))
        except LinkDown:
            pass

    patch.setattr(Actor, "_finish", early)


def epoch_ignored(patch: Patch) -> None:
    """A node that lost its disk is taken for a repetition of itself."""
    patch.setattr(Position, "under", lambda self, epoch: Position(epoch, self.seq, self.retired, self.boots))


def retired_epoch_accepted(patch: Patch) -> None:
    patch.setattr(Position, "under", lambda self, epoch: self if epoch == self.epoch else Position(epoch, 0, ()))


def have_is_believed(patch: Patch) -> None:
    """An acknowledgement counts whoever numbered the messages."""

    def doubt(self: Courier, ack: Ack, acked_before: int) -> bool:
        return ack.have > self.system.journal.last_sent(self.actor, self.recipient)

    patch.setattr(Courier, "_is_doubtful", doubt)


def numbers_meet(patch: Patch) -> None:
    """Sender and recipient compare numbers alone: who numbered a message is all the same."""
    for module in (courier_module, lineage_module):
        patch.setattr(module, "boot_at", lambda marks, seq: "")


def hole_in_silence(patch: Patch) -> None:
    """The first message of a window comes behind nothing: a recipient that went back takes it."""
    gather = Courier._gather

    def early(self: Courier) -> list[Envelope]:
        batch = gather(self)
        if batch and batch[0].after == self.acked:
            first = structs.replace(batch[0], after=0, after_boot="")
            return [first, *batch[1:]]
        return batch

    objection = Position.objection
    patch.setattr(Courier, "_gather", early)
    patch.setattr(Position, "objection", lambda self, e: "" if e.after == 0 and e.seq > self.seq else objection(self, e))


def deadline_ignored(patch: Patch) -> None:
    patch.setattr(Journal, "overdue", lambda self, actor, now, limit=256: [])


def gives_up_what_is_acknowledged(patch: Patch) -> None:
    """Forgets, at a deadline, acknowledgements that are not on disk yet."""
    patch.setattr(Journal, "acked", lambda self, actor, recipient: self.outgoing(actor, recipient).acked)


def event_without_its_step(patch: Patch) -> None:
    """Events are written before the step they belong to."""
    finish = Actor._finish

    async def early(self: Actor, batch: Batch) -> None:
        if batch.commit.events:
            await self.system.journal.commit(Commit(self.name, events=batch.commit.events))
            batch.commit.events = []
        await finish(self, batch)

    patch.setattr(Actor, "_finish", early)


def replies_before_commit(patch: Patch) -> None:
    finish = Actor._finish

    async def early(self: Actor, batch: Batch) -> None:
        for ask in batch.asks:
            ask.done.set()
        await finish(self, batch)

    patch.setattr(Actor, "_finish", early)


def quarantine_blocks_the_link(patch: Patch) -> None:
    """A message that crashes its machine is tried for ever."""
    patch.setattr(mailbox, "CRASHES_BEFORE_QUARANTINE", 1 << 30)


def courier_forgets_news(patch: Patch) -> None:
    """A message posted while its link's courier ends is not noticed."""

    async def carry(self: System, courier: Courier) -> None:
        await courier.run()
        await trio.sleep(1)
        del self._couriers[courier.actor, courier.recipient]

    patch.setattr(System, "_carry", carry)


def port_answers_before_commit(patch: Patch) -> None:
    """A port's answer and its position are written apart."""
    commit = Journal.commit

    async def parted(self: Any, changes: Commit) -> None:
        if changes.inbox and changes.outbox and changes.actor == "chain":
            await commit(self, Commit(changes.actor, outbox=changes.outbox))
            await commit(self, Commit(changes.actor, inbox=changes.inbox))
        else:
            await commit(self, changes)

    patch.setattr(SimJournal, "commit", parted)


def take_without_deleting(patch: Patch) -> None:
    from actors.kernel.feed import Feeds

    async def take(self: Feeds, feed: str, limit: int = 100) -> list[Any]:
        await trio.lowlevel.checkpoint()
        events = self.read(feed, 0, limit)
        await self._journal.commit(Commit("", taken=[(feed, event.seq) for event in events[:1]]))
        return events

    patch.setattr(Feeds, "take", take)


def number_used_twice(patch: Patch) -> None:
    """Two posts of a port that are under way together get the same number, or swap."""
    commit = Journal.commit

    async def late(self: Any, changes: Commit) -> None:
        if changes.actor == "chain" and not changes.inbox:
            await trio.sleep(self.host.world.rng.uniform(0, 1))
        await commit(self, changes)

    patch.setattr(SimJournal, "commit", late)


def quarantine_at_the_first_failure(patch: Patch) -> None:
    patch.setattr(mailbox, "CRASHES_BEFORE_QUARANTINE", 1)


def whims_are_poison(patch: Patch) -> None:
    """A port's trouble with the outside world counts as a crash, and three in a moment are enough."""
    patch.setattr(port, "WHIMS", ())
    patch.setattr(port.PortActor, "first_pause_s", 0.05)


def sender_is_not_told(patch: Patch) -> None:
    """What was set aside is acknowledged like all else."""
    patch.setattr(Journal, "refused", lambda self, actor, sender, epoch, first, last: ())


def alarm_given_up(patch: Patch) -> None:
    """A timer that could not be handled does not come again."""
    defer = Actor._defer

    def give_up(self: Actor, alarm: Any, again: float, commit: Commit) -> None:
        defer(self, alarm, again, commit)
        if isinstance(alarm, TimerDue):
            commit.timers[alarm.timer.key] = None

    patch.setattr(Actor, "_defer", give_up)


def half_of_a_step(patch: Patch) -> None:
    """Who reads what others write does not read it of one moment."""
    patch.setattr(Journal, "look", lambda self: None)


def silent_notify(patch: Patch) -> None:
    from actors.kernel.feed import Feeds

    patch.setattr(Feeds, "notify", lambda self, feed: None)


def alarm_unchanged(patch: Patch) -> None:
    """The clock is not told of alarms that come before the one it waits for."""
    patch.setattr(Alarms, "committed", lambda self, commit: None)


def keeps_what_was_refused(patch: Patch) -> None:
    """Goes on with the rows of a batch that the disk did not take."""
    forget = Actor.forget

    def kept(self: Actor) -> None:
        if not hasattr(self, "rows"):
            forget(self)

    patch.setattr(Actor, "forget", kept)


def takes_refused_for_written(patch: Patch) -> None:
    """Answers for a batch that the disk did not take."""
    commit = Journal.commit

    async def lie(self: Journal, what: Commit, **how: Any) -> None:
        with suppress(JournalWaits):
            await commit(self, what, **how)

    patch.setattr(Journal, "commit", lie)


MUTANTS = (
    keeps_what_was_refused, takes_refused_for_written,
    quarantine_at_the_first_failure, whims_are_poison, sender_is_not_told, alarm_given_up, silent_notify, alarm_unchanged,
    no_dedupe, acknowledges_before_commit, inbox_not_advanced, no_gap_check, timer_stays, outbox_released_before_commit,
    epoch_ignored, retired_epoch_accepted, deadline_ignored, gives_up_what_is_acknowledged, event_without_its_step,
    replies_before_commit, quarantine_blocks_the_link, courier_forgets_news, port_answers_before_commit,
    take_without_deleting, number_used_twice, have_is_believed, numbers_meet, hole_in_silence, half_of_a_step,
)  # fmt: skip


LOSE_A_DISK = (epoch_ignored, retired_epoch_accepted, have_is_believed, numbers_meet, hole_in_silence)


WORDS = {gives_up_what_is_acknowledged: "which was acknowledged"}  # of whoever catches a mutant, where others may as well


def caught(seeds: Iterable[int]) -> str | None:
    """Return what an observer, or the kernel itself, says of the first of `seeds` that fails; None if none does."""
    for seed in seeds:
        try:
            simulate(seed)
        except (Exception, BaseExceptionGroup, Broken) as error:
            return first_cause(error)
    return None


@pytest.mark.parametrize("mutant", share(MUTANTS), ids=lambda mutant: mutant.__name__)
def test_mutant_is_caught(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    seeds = (seed for seed in range(500) if mutant not in LOSE_A_DISK or World(seed).faults.lose_disk)
    says = caught(islice(seeds, MOST_SEEDS))
    assert says is not None, f"{mutant.__name__} survives {MOST_SEEDS} seeds"
    assert WORDS.get(mutant, "") in says, says
