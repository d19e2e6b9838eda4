"""Alarms: timers that are due, and messages of the outbox that nobody took, brought to the actors they belong to.

An alarm leaves the journal with the step that it caused, never before: one that cannot be handled comes again, with
growing pauses, and people are shown it. Each actor gets a page at a time, so that no actor waits for another's alarms.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import trio

from actors.kernel.host import Host
from actors.kernel.machine import JournalWaits
from actors.kernel.mail import DeadlinePassed, TimerDue
from actors.kernel.reading import ALARMS_AT_ONCE
from actors.kernel.records import Commit, Fresh

log = logging.getLogger("golem.kernel")

CLOCK_LOOK_S = 1.0  # how long an alarm may wait that found no room
FOLLOW_S = 1.0
MARK_S, MARK_EVERY_S = 0.1, 10.0  # how far the journal's word on the clock may be off
CLOCK_SLEEP_S = 60.0  # a clock that was set, or a machine that slept, is noticed this late at most
FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 300.0  # before an alarm that failed comes again
KEPT_FAILING = 256
KEPT_REFUSALS, REFUSALS_FORGOTTEN_S, LAST_REFUSAL_PAUSE_S = 4096, 3600.0, 600.0


@dataclass(frozen=True, slots=True)
class Failing:
    """A timer (or word of a lost message) that its actor could not handle so far."""

    actor: str
    what: str
    error: str
    times: int
    again: float


class Alarms:
    """Watches the clock for all actors of a system."""

    def __init__(self, system: Host) -> None:
        self._system = system
        self._changed = trio.Event()
        self._next: float | None = None  # nothing is to be done before
        self._more: set[str] = set()  # actors whose page was full
        self._failing: dict[tuple[str, str], Failing] = {}
        self._refusals: dict[tuple[str, str], tuple[int, float]] = {}  # link -> how often lately, and when last
        self._fresh_timers: set[tuple[str, str]] = set()  # set by a clock that may yet prove wrong: (actor, key)
        self._fresh_sends: set[tuple[str, str, int]] = set()  # likewise: (actor, recipient, number)

    async def run(self) -> None:
        """Bring due timers and passed deadlines to their actors."""
        system, journal = self._system, self._system.journal
        while True:
            self._changed = trio.Event()
            if system.clock.holds:
                await self._changed.wait()
                continue
            self._next = journal.next_alarm()
            wait_s = math.inf if self._next is None else self._next - system.now()
            if wait_s > 0:
                with trio.move_on_after(min(wait_s, CLOCK_SLEEP_S)):
                    await self._changed.wait()
                continue
            now = system.now()
            later = journal.next_alarm(now)
            self._next = min(now + CLOCK_LOOK_S, math.inf if later is None else later)
            for name in journal.actors_due(now):
                await self._bring(name, now)
            with trio.move_on_after(max(self._next - system.now(), 0.0)):
                await self._changed.wait()

    async def _bring(self, name: str, now: float) -> None:
        """Give an actor a page of its alarms, unless it is at one."""
        journal, actor = self._system.journal, self._system.machine(name)
        if actor is not None and not actor.ringing:
            timers, deadlines = journal.due(name, now), journal.overdue(name, now)
            if max(len(timers), len(deadlines)) == ALARMS_AT_ONCE:
                self._more.add(name)
            for timer in timers:
                actor.offer_alarm(TimerDue(timer))
            for recipient, seq, epoch in deadlines:
                actor.offer_alarm(DeadlinePassed(recipient, seq, epoch))
        elif actor is None:  # a port hears nothing of it, it repeats itself; or an actor of a former version
            keys = [timer.key for timer in journal.due(name, now)]
            overdue = [(recipient, seq) for recipient, seq, _ in journal.overdue(name, now)]
            expired = [one for one in overdue if not self._system.is_broken(name, one[0])]  # it is about to be numbered anew
            if keys or expired:
                commit = Commit(name, expired=expired, timers=dict.fromkeys(keys))
                await journal.commit(commit, patient=True)
                self._system.released(name, commit, [])
                self._changed.set()

    def committed(self, commit: Commit) -> None:
        """Look at the clock again if a commit has an alarm that is due before the next look."""
        if not self._system.clock.is_settled:
            self._fresh_timers.update((commit.actor, key) for key in commit.timers)
            self._fresh_sends.update((commit.actor, recipient, posted.seq) for recipient, posted in commit.outbox)
        times = [posted.deadline for _, posted in commit.outbox]
        if commit.timers:
            times += [timer.at for timer in commit.timers.values() if timer]
        if times and (self._next is None or min(times) < self._next):
            self._changed.set()

    # -- a clock that was set
    def _moved(self, step: float) -> None:
        """Take a step over: what the journal holds has moved with it."""
        self._system.clock.take(step)
        self._failing = {key: replace(one, again=one.again + step) for key, one in self._failing.items()}
        self._refusals = {link: (times, told_at + step) for link, (times, told_at) in self._refusals.items()}
        self._look()

    async def follow_clock(self) -> None:
        """Follow the wall clock, for ever: its steps move timers and deadlines, in memory and on disk."""
        clock, journal = self._system.clock, self._system.journal
        if not clock.is_steady:
            return
        kept = clock.mark()
        journal.clock_text = kept.text()  # with the first transaction
        while True:
            held = clock.holds
            if (step := clock.look()) is not None:
                log.warning("the clock of this machine was set by %+.1f s: timers and deadlines move with it", step)
                fresh = None if clock.is_settled else Fresh(tuple(self._fresh_timers), tuple(self._fresh_sends))
                await self._move(step, fresh)
            if clock.is_settled:
                self._fresh_timers.clear()
                self._fresh_sends.clear()
            if held and not clock.holds:
                self._look()
            mark = clock.mark()
            moved = abs(mark.offset - kept.offset) > MARK_S or mark.last - kept.last > MARK_EVERY_S
            if moved or mark.is_settled != kept.is_settled:
                journal.clock_text, kept = mark.text(), mark  # with the next transaction
            await trio.sleep(FOLLOW_S)

    async def _move(self, step: float, fresh: Fresh | None) -> None:
        """Move timers and deadlines on disk; where that takes nothing just now, they wait as all does."""
        clock, journal = self._system.clock, self._system.journal
        while True:
            try:
                return await journal.move(step, fresh, clock.mark(step).text(), partial(self._moved, step))
            except JournalWaits:
                await trio.sleep(FOLLOW_S)

    def _look(self) -> None:
        """Look at the clock again."""
        self._next = None
        self._changed.set()

    def taken(self, actor: str) -> None:
        """An actor is through with its alarms: it gets the next page at once."""
        if actor in self._more:
            self._more.remove(actor)
            self._changed.set()

    # -- what its recipient set aside
    def refused(self, actor: str, recipient: str, epoch: str, owed: Sequence[int], reason: str) -> None:
        """Messages were set aside by their recipient: tell their sender, at a pace that no recipient can drive up."""
        link, now = (actor, recipient), self._system.now()
        times, told_at = self._refusals.pop(link, (0, 0.0))
        if now - told_at > REFUSALS_FORGOTTEN_S:
            times = 0
        if times and now < told_at + min(2.0 ** min(times, 20), LAST_REFUSAL_PAUSE_S):
            self._refusals[link] = times, told_at  # the courier comes again
            return
        self._refusals[link] = times + 1, now
        if len(self._refusals) > KEPT_REFUSALS:
            del self._refusals[next(iter(self._refusals))]
        if (machine := self._system.machine(actor)) is not None:
            for seq in owed:
                machine.offer_alarm(DeadlinePassed(recipient, seq, epoch, reason))

    # -- what cannot be handled
    def failed(self, actor: str, what: str, error: Exception, times: int) -> float:
        """An alarm could not be handled; return the time at which it comes again."""
        again = self._system.now() + min(FIRST_PAUSE_S * 2.0 ** min(times - 1, 20), LAST_PAUSE_S)
        if (actor, what) in self._failing or len(self._failing) < KEPT_FAILING:
            self._failing[actor, what] = Failing(actor, what, repr(error)[:300], times, again)
        return again

    def is_waiting(self, actor: str, what: str) -> bool:
        """Return whether an alarm that could not be handled is to be left alone yet."""
        failing = self._failing.get((actor, what))
        return failing is not None and self._system.now() < failing.again

    def handled(self, actor: str, what: str) -> None:
        self._failing.pop((actor, what), None)

    def failing(self) -> list[Failing]:
        """Return the alarms that could not be handled."""
        return [self._failing[key] for key in sorted(self._failing)]
