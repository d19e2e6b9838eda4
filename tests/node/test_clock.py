"""The watch over the wall clock: the ledger hears of what the clock lost, in the time that its margin leaves."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from worlds.money import World
from worlds.support import mock_trio_test

from actors.ledger.ceiling import set_back_s
from golem.base import boot, clock
from protocol.ledger import ClockSeen


class Machine:
    """A machine whose wall clock may be set; the system's time never goes back, as the kernel's."""

    def __init__(self, world: World) -> None:
        self.world, self.offset, self.last = world, 1_000_000.0, 0.0
        self.told: list[ClockSeen] = []

    def now(self) -> float:
        self.last = max(self.last, trio.current_time() + self.offset)
        return self.last

    async def post(self, sender: str, sends: Any) -> None:
        (send,) = sends
        self.told.append(send.message)
        node = self.world.nodes[0]
        self.world.now = self.now()
        self.world.tell(node, send.message, f"{node.id}/{sender}")
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("by_s", [0.0, -3600.0, -20.0, 3600.0])
@mock_trio_test
async def test_time_that_the_wall_clock_lost_counts(monkeypatch: pytest.MonkeyPatch, by_s: float) -> None:
    monkeypatch.setattr(clock, "boot_time", lambda: trio.current_time() + 77)
    machine = Machine(World(1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(clock.watch_clock, machine)
        await trio.sleep(100)
        assert len(machine.told) == 1
        before = machine.now()
        machine.offset += by_s
        for passed in range(1, 5000, 7):
            await trio.sleep(7)
            counted = machine.now() - before + set_back_s(machine.world.nodes[0].rows["ledger"])
            assert passed + 6 - 4 <= counted, (passed, counted)
            if by_s <= 0:
                assert counted <= passed + 6 + 1
        nursery.cancel_scope.cancel()


def test_the_clock_of_this_machine() -> None:
    assert boot.boot_time() > 0
    assert len(boot.boot_id()) == 36
