"""A disk that is full, or a journal that another process locks: the process stays up, nothing of a refused step is left,
reads go on, and all goes on by itself."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio
from test_kernel_limits import Do, Nowhere, Text, frame
from test_wrong_types import Ears
from worlds.patience import within
from worlds.support import trio_test

from actors.kernel.journal import Journal
from actors.kernel.machine import Emit, JournalWaits, Meta, Reply, Rows, Send, Step, Wake
from actors.kernel.mail import Ask
from actors.kernel.records import JournalError
from actors.kernel.system import System
from protocol.codec import decode_ack, encode
from protocol.types import Done, Undelivered

BIG = "x" * 20_000


def add(rows: Rows, meta: Meta) -> Step:
    number = sum(1 for _ in rows.prefix("row/"))
    return Step(
        {f"row/{number:04d}": Text(BIG)},
        [Emit("made", Text(str(number))), Send("B/doer", Text(str(number))), Wake("w", meta.now + 1, Do("ring")), Reply(Done())],
    )


class Port:
    """Counts what it did in the world."""

    name = "world"
    local: Any = Do
    peer: Any = None

    def __init__(self) -> None:
        self.did = 0

    async def handle(self, message: Any, meta: Meta) -> list[Send]:
        await trio.lowlevel.checkpoint()
        self.did += 1
        return [Send("doer", Do("told"))]


class Machine:
    name = "doer"
    local = Do | Undelivered | Done
    peer = Text
    rows = Text | None

    def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
        if isinstance(message, Text):
            return Step({f"got/{message.value}": Text(BIG)}, [Emit("got", message)])
        deeds = {
            "add": add,
            "ring": lambda rows, meta: Step({}, [Emit("rings", Text("x"))]),
            "order": lambda rows, meta: Step({}, [Send("world", Do("act")), Reply(Done())]),
            "told": lambda rows, meta: Step({}, [Emit("told", Text("x"))]),
        }
        return deeds[message.deed](rows, meta) if isinstance(message, Do) else Step()


@asynccontextmanager
async def running(path: Path, transport: Any = None, lasting: bool = True) -> AsyncIterator[tuple[System, Port]]:
    numbers, port = count(), Port()
    journal = Journal(str(path), lambda: "e" * 16)
    if lasting:
        journal.outlast()
    journal._writer.execute("pragma busy_timeout=20")
    system = System("A", journal, transport or Nowhere(), clock=trio.current_time, new_trace=lambda: f"t{next(numbers)}")
    system.add(Machine())
    system.add_port(port)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(system.run)
            yield system, port
            nursery.cancel_scope.cancel()
    finally:
        journal.close()


class Full:
    """The disk is full: the file may not grow."""

    def __init__(self, system: System, path: Path) -> None:
        self._writer = system.journal._writer

    def begin(self) -> None:
        (pages,) = self._writer.execute("pragma page_count").fetchone()
        self._writer.execute(f"pragma max_page_count={pages}")

    def end(self) -> None:
        self._writer.execute("pragma max_page_count=1000000")

    words = "database or disk is full"


class Locked:
    """Another process holds the file."""

    def __init__(self, system: System, path: Path) -> None:
        self._other = sqlite3.connect(path, isolation_level=None)

    def begin(self) -> None:
        self._other.execute("begin immediate")

    def end(self) -> None:
        self._other.execute("commit")

    words = "database is locked"


def state(system: System) -> Any:
    rows = [(key, row) for key, row in system.rows("doer").prefix("")]
    return rows, system.feeds.read("made"), system.feeds.read("got"), system.journal.last_sent("doer", "B/doer")


@pytest.mark.parametrize("kind", [Full, Locked])
@trio_test
async def test_what_is_refused_leaves_nothing_and_all_goes_on(tmp_path: Path, kind: Any) -> None:
    ears = Ears()
    ears.deaf = False
    async with running(tmp_path / "node.db", ears) as (system, _):
        disk = kind(system, tmp_path / "node.db")
        assert await system.ask("doer", Do("add")) == Done()
        with within(20):
            while len(ears.heard) < 1 or system.journal.waits("doer", "B/doer", 0):  # the acknowledgement is on disk as well
                await trio.sleep(0.01)
        before = state(system)
        disk.begin()
        asks = [Ask(Do("add"), "t") for _ in range(3)]
        for ask in asks:  # one batch
            system.machine("doer").offer(ask)  # type: ignore[union-attr]
        with within(20):
            for ask in asks:
                await ask.done.wait()
        assert [type(ask.error) for ask in asks] == [JournalWaits] * 3
        assert disk.words in system.journal.trouble
        with pytest.raises(JournalWaits, match=disk.words):
            await system.ask("doer", Do("add"))
        ack = decode_ack(await system.deliver(frame(1), "B"))
        assert (ack.have, ack.note) == (0, "busy")
        assert state(system) == before, "reads go on, and nothing of it is there, in memory or on disk"
        assert ears.heard == [encode(Text("0"))]
        disk.end()
        with within(20):
            await system.journal.well()
        assert state(system) == before
        assert await system.ask("doer", Do("add")) == Done()
        assert decode_ack(await system.deliver(frame(1), "B")).have == 1
        with within(20):
            while len(ears.heard) < 2:
                await trio.sleep(0.01)
        assert ears.heard == [encode(Text("0")), encode(Text("1"))]
        assert [key for key, _ in system.rows("doer").prefix("row/")] == ["row/0000", "row/0001"]
        assert not system.journal.quarantined()
    async with running(tmp_path / "node.db") as (system, _):
        assert [key for key, _ in system.rows("doer").prefix("row/")] == ["row/0000", "row/0001"]


@pytest.mark.parametrize("kind", [Full, Locked])
@trio_test
async def test_what_a_port_has_done_is_not_done_again(tmp_path: Path, kind: Any) -> None:
    async with running(tmp_path / "node.db") as (system, port):
        disk, handle = kind(system, tmp_path / "node.db"), port.handle

        async def at_work(message: Any, meta: Meta) -> list[Send]:
            disk.begin()
            sends = await handle(message, meta)
            return [*sends, *[Send("B/doer", Text(BIG)) for _ in range(20)]]

        port.handle = at_work  # type: ignore[method-assign]
        assert await system.ask("doer", Do("order")) == Done()
        with within(20):
            while not system.journal.trouble:
                await trio.sleep(0.01)
        await trio.sleep(0.3)
        assert port.did == 1
        disk.end()
        with within(20):
            while not system.feeds.read("told"):
                await trio.sleep(0.01)
        assert port.did == 1


@trio_test
async def test_timers_ring_once_after_a_full_disk(tmp_path: Path) -> None:
    async with running(tmp_path / "node.db") as (system, _):
        disk = Locked(system, tmp_path / "node.db")
        assert await system.ask("doer", Do("add")) == Done()
        disk.begin()
        with within(20):
            while not system.journal.trouble:  # it rings, and cannot be kept
                await trio.sleep(0.01)
        assert not system.feeds.read("rings")
        disk.end()
        with within(20):
            while not system.feeds.read("rings"):
                await trio.sleep(0.01)
        assert len(system.feeds.read("rings")) == 1


@trio_test
async def test_a_process_that_does_not_outlast_it_ends_as_before(tmp_path: Path) -> None:
    async def fail() -> None:
        async with running(tmp_path / "node.db", lasting=False) as (system, _):
            Full(system, tmp_path / "node.db").begin()
            await system.ask("doer", Do("add"))
            await trio.sleep(20)

    with pytest.raises(BaseExceptionGroup) as found:
        await fail()
    assert found.value.subgroup(JournalError) is not None
