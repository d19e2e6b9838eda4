"""Alarms: timers that are due, and messages of the outbox that nobody took, brought to the actors they belong to.

An alarm leaves the journal with the step that it caused, never before: one that cannot be handled comes again, with
growing pauses, and people are shown it. Each actor gets a page at a time, so that no actor waits for another's alarms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from actors.kernel.host import Host
from actors.kernel.mail import DeadlinePassed, TimerDue
from actors.kernel.reading import ALARMS_AT_ONCE
from actors.kernel.records import Commit

CLOCK_LOOK_S = 1.0  # how long an alarm may wait that found no room
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

    async def run(self) -> None:
        """Bring due timers and passed deadlines to their actors."""
        system, journal = self._system, self._system.journal
        while True:
            self._changed = trio.Event()
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
        times = [posted.deadline for _, posted in commit.outbox]
        if commit.timers:
            times += [timer.at for timer in commit.timers.values() if timer]
        if times and (self._next is None or min(times) < self._next):
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
