"""The clock of the machine is set, forward and back, at any moment: what was to happen happens on time, or seconds later.

A failing seed is printed; CLOCK_SEED=N replays it.
"""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import Callable
from itertools import count

import pytest
import trio
from worlds.support import mock_trio_test

from actors.kernel.clock import SETTLE_S, ClockMark, MachineClock, Steady, read_mark
from actors.kernel.draft import Draft
from actors.kernel.grammar import EDGE, ITSELF, On, Table, TableMachine
from actors.kernel.journal import Journal
from actors.kernel.machine import LinkDown
from actors.kernel.system import System
from protocol.types import Done, Message, Undelivered

EPOCH_S, HOUR_S = 1_700_000_000.0, 3600.0
SECONDS = 2 * SETTLE_S + 5.0  # what a step may cost
SEEDS = [int(os.environ["CLOCK_SEED"])] if "CLOCK_SEED" in os.environ else range(40)


class SetAlarm(Message, frozen=True):
    key: str
    after_s: float


class Ring(Message, frozen=True):
    key: str


class Row(Message, frozen=True):
    pass


class Letter(Message, frozen=True):
    key: str


class Machine:
    """A machine with a wall clock that may be set, one that nobody sets, and a disk."""

    def __init__(self) -> None:
        self.fast_s, self.boots = 0.0, 1
        self.disk = sqlite3.connect(":memory:", check_same_thread=False)
        self.rang: dict[str, float] = {}
        self.numbers = count()

    def wall(self) -> float:
        return EPOCH_S + trio.current_time() + self.fast_s

    def system(self) -> System:
        """Start a process."""
        journal = Journal.over(self.disk, lambda: f"e{next(self.numbers)}")
        system = System(
            "A", journal, Nowhere(), clock=self.wall, new_trace=lambda: f"t{next(self.numbers)}",
            steady=Steady(lambda: trio.current_time() - 1e5 * self.boots, f"boot-{self.boots}"),
        )  # fmt: skip
        system.add(Clockwork("A", self.rang))
        return system


class Nowhere:
    async def exchange(self, node: str, frame: bytes) -> bytes:
        await trio.sleep(1)
        raise LinkDown("nobody is there")


class Clockwork(TableMachine):
    """Sets alarms, and notes when they ring; a letter to nobody comes back at its deadline."""

    name = "clockwork"
    rows = Row

    def __init__(self, node: str, rang: dict[str, float]) -> None:
        super().__init__(node)
        self.rang = rang

    table = Table(
        On(SetAlarm, EDGE, lambda draft, message: set_alarm(draft, message)),
        On(Ring, ITSELF, lambda draft, message: draft.rang.__setitem__(message.key, trio.current_time())),
        On(Undelivered, ITSELF, lambda draft, message: draft.rang.__setitem__("letter", trio.current_time())),
    )

    def draft(self, rows: object, meta: object) -> Draft:  # type: ignore[override]
        draft = Draft(rows, meta, self.node)  # type: ignore[arg-type]
        draft.rang = self.rang  # type: ignore[attr-defined]
        return draft


def set_alarm(draft: Draft, message: SetAlarm) -> None:
    if message.key == "letter":
        draft.send("B/clockwork", Letter("x"), message.after_s)
    else:
        draft.wake(message.key, draft.now + message.after_s, Ring(message.key))
    draft.reply(Done())


async def drift(machine: Machine, steps: list[tuple[float, float]]) -> None:
    """Set the clock: (when, how fast it is from then on)."""
    for at, fast_s in steps:
        await trio.sleep_until(at)
        machine.fast_s = fast_s


#: Steps of the clock, from second 0 on.
STORIES: dict[str, list[tuple[float, float]]] = {
    "an hour ahead for 5 s": [(50, HOUR_S), (55, 0)],
    "an hour behind for 5 s": [(50, -HOUR_S), (55, 0)],
    "an hour ahead for good": [(50, HOUR_S)],
    "an hour behind for good": [(50, -HOUR_S)],
    "an hour ahead at the start, for 5 s": [(0, HOUR_S), (5, 0)],
    "an hour ahead at the start, for 20 s": [(0, HOUR_S), (20, 0)],
    "the start of time, then right": [(0, -EPOCH_S), (30, 0)],
    "ahead for a minute": [(50, HOUR_S), (110, 0)],
    "to and fro": [(50, HOUR_S), (53, -HOUR_S), (56, 20), (59, 0), (80, -7), (99, 0)],
}  # fmt: skip


@pytest.mark.parametrize("story", STORIES)
@mock_trio_test
async def test_a_step_of_the_clock_costs_seconds(story: str) -> None:
    """Alarms that were set at any moment, before, in and after the step, ring neither early nor late, by a steady clock."""
    machine = Machine()
    due: dict[str, float] = {}
    machine.fast_s = STORIES[story][0][1] if STORIES[story][0][0] == 0 else 0.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(drift, machine, STORIES[story])
        system = machine.system()
        await nursery.start(system.run)
        for number in range(60):
            for after_s in (3.0, 45.0, 200.0):
                key = f"{number}-{after_s:g}"
                await system.ask("clockwork", SetAlarm(key, after_s))
                due[key] = trio.current_time() + after_s
            if number == 20:
                await system.ask("clockwork", SetAlarm("letter", 60.0))
                due["letter"] = trio.current_time() + 60.0
            await trio.sleep(3)
        await trio.sleep(300)
        assert abs(system.now() - machine.wall()) < 0.01
        nursery.cancel_scope.cancel()
    assert machine.rang.keys() == due.keys()
    off = {key: machine.rang[key] - at for key, at in due.items()}
    assert {key: late for key, late in off.items() if not -2.5 <= late <= 5} == {}


@pytest.mark.parametrize("seed", SEEDS)
@mock_trio_test
async def test_steps_kills_and_starts_of_the_machine_at_any_moment(seed: int) -> None:
    rng, machine, due = random.Random(seed), Machine(), dict[str, float]()
    steps = [(rng.uniform(0, 250), rng.choice((0, 0, HOUR_S, -HOUR_S, 8 * HOUR_S, -1.0, 60))) for _ in range(6)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(drift, machine, [*sorted(steps), (260, 0.0)])
        for run in range(8):
            async with trio.open_nursery() as process:
                system = machine.system()
                await process.start(system.run)
                until = trio.current_time() + rng.uniform(1, 60)
                while trio.current_time() < until:
                    key, after_s = f"{run}-{trio.current_time():.3f}", rng.choice((2.0, 20.0, 120.0, 400.0))
                    await system.ask("clockwork", SetAlarm(key, after_s))
                    due[key] = trio.current_time() + after_s
                    await trio.sleep(rng.uniform(0.1, 9))
                process.cancel_scope.cancel()
        system = machine.system()
        await nursery.start(system.run)
        await trio.sleep(1000)
        nursery.cancel_scope.cancel()
    off = {key: machine.rang[key] - at for key, at in due.items()}
    assert {key: late for key, late in off.items() if not -4.0 <= late <= SECONDS} == {}, f"CLOCK_SEED={seed}"


@pytest.mark.parametrize("fast_s", [0.0, HOUR_S])
@mock_trio_test
async def test_after_a_start_of_the_machine_former_alarms_wait_until_the_clock_has_proved_right(fast_s: float) -> None:
    machine = Machine()
    async with trio.open_nursery() as nursery:
        system = machine.system()
        await nursery.start(system.run)
        await system.ask("clockwork", SetAlarm("soon", 30.0))
        await system.ask("clockwork", SetAlarm("later", 1800.0))
        await trio.sleep(20)
        nursery.cancel_scope.cancel()
    await trio.sleep(100)  # it is off
    machine.boots += 1
    async with trio.open_nursery() as nursery:
        machine.fast_s = fast_s
        system, begun = machine.system(), trio.current_time()
        await nursery.start(system.run)
        await system.ask("clockwork", SetAlarm("fresh", 60.0))
        await trio.sleep(5)
        machine.fast_s = 0.0
        await trio.sleep(2000)
        nursery.cancel_scope.cancel()
    assert begun + SETTLE_S - 1 <= machine.rang["soon"] <= begun + SECONDS
    assert 0 <= machine.rang["later"] - 1800 <= SECONDS
    assert -2 <= machine.rang["fresh"] - begun - 60 <= SECONDS


@mock_trio_test
async def test_small_differences_are_followed_at_once_and_time_does_not_go_back() -> None:
    wall = [0.0]
    clock = MachineClock(lambda: wall[0] + trio.current_time(), Steady(trio.current_time, "b"))
    seen = []
    for off in (0.0, 0.5, -0.7, 1.9, 0.0, -1.5):
        wall[0] = off
        assert clock.look() is None
        seen.append(clock.now())
        await trio.sleep(1)
    assert seen == sorted(seen)
    wall[0] = 0.0
    clock.look()
    await trio.sleep(2)
    assert clock.now() == pytest.approx(trio.current_time())


@pytest.mark.parametrize("text", [None, "", "x", "a b c", "boot nan 1.0", "boot inf 1.0", "boot 1.0", "a 1 2", "a 1 2 3 4"])
def test_a_mark_that_cannot_be_read_is_none(text: str | None) -> None:
    assert read_mark(text) is None


def test_a_mark_is_read_as_it_was_written() -> None:
    mark = ClockMark("0-1", -1.25, 1e9 + 0.1, True)
    assert read_mark(mark.text()) == mark
    wall: Callable[[], float] = lambda: 5.0  # noqa: E731
    assert MachineClock(wall).now() == MachineClock(wall, Steady(lambda: 2.0, "b")).now() == 5.0
