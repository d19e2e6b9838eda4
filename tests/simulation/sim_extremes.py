"""Worlds at their edges: a disk that runs on two machines at once, and kernels whose caches and pages are tiny."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import sim_checks
import trio

from actors.kernel import actor, alarms, courier, journal, reading, row_view, system, tables
from protocol.codec import MAX_BODY_BYTES

if TYPE_CHECKING:
    from sim_world import World

BIG_MEMO = MAX_BODY_BYTES - 200  # of a message that just fits
#: Bounds that must not matter to what is lost, doubled or disordered.
TINY: tuple[tuple[Any, str, int], ...] = (
    (actor, "CACHED_LINKS", 1), (actor, "BATCH", 2), (row_view, "CACHED_ROWS", 2), (row_view, "CACHED_ROW_BYTES", 48),
    (reading, "READ_AT_ONCE", 2), (journal, "MERGED_COMMITS", 1), (tables, "KNOWN_MARKS", 1), (courier, "FRAME_BYTES", 60),
    (courier, "WINDOW", 3), (alarms, "KEPT_REFUSALS", 1), (system, "KEPT_OLDER", 1), (system, "LINGERING", 0),
)  # fmt: skip


@contextmanager
def bounds(world: World) -> Iterator[None]:
    """Run the kernel at its bounds, where the seed wants that."""
    before = [(module, name, getattr(module, name)) for module, name, _ in TINY]
    if world.faults.tiny:
        for module, name, size in TINY:
            setattr(module, name, size)
        world.reached["tiny bounds"] += 1
    try:
        yield
    finally:
        for module, name, size in before:
            setattr(module, name, size)


async def run_twice(world: World, name: str) -> None:
    """Now and then a copy of a node's data directory runs on another machine, beside the node. Then one is stopped.

    As the words say that people are shown ("stop it, then start this one again"), the node starts anew after that.
    """
    from sim_world import Host

    host = world.hosts[name]
    while world.faults.copied and not world.calm:
        await trio.sleep(world.rng.uniform(5, 20))
        if world.calm or host.nursery is None or host.next_disk is not None:
            continue
        world.copies += 1
        twin = Host(world, name)
        twin.db, twin.disks = host.new_disk(host.db), 1000 * world.copies
        world.repeats.update(sim_checks.waiting_answers(twin.db))
        world.twin = twin
        with trio.move_on_after(world.rng.uniform(5, 40)):
            await twin.keep_running()
        world.twin = None
        world.reached["copied disk"] += 1
        host.disks += 1
        if host.nursery is not None:
            host.nursery.start_soon(world.die)
