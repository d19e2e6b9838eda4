"""The kernel on one node and on two: asks, durable sends, timers, deadlines, feeds, crashes, restarts."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio
from worlds.support import mock_trio_test, trio_test

from actors.kernel.journal import Journal
from actors.kernel.machine import NOTHING, ActorFailed, Emit, LinkDown, Meta, Reply, Rows, Send, Step, Wake
from actors.kernel.system import System
from protocol.types import Message, Refused, Undelivered, Violation


class Put(Message, frozen=True):
    key: str
    value: str


class Forward(Message, frozen=True):
    to: str
    value: str
    deadline_s: float = 3600.0


class Note(Message, frozen=True):
    value: str


class Remind(Message, frozen=True):
    at: float
    value: str


class Boom(Message, frozen=True):
    pass


class Item(Message, frozen=True):
    value: str


class Keeper:
    """Keeps what it is told, forwards, reminds, and crashes on command."""

    name = "keeper"
    local = Put | Forward | Remind | Boom | Undelivered
    peer = Note | Boom
    rows = Item | Refused

    def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
        match message:
            case Put(key, value):
                return Step({key: Item(value)}, [Reply(Item(value)), Emit("changes", message)])
            case Forward(to, value, deadline_s):
                return Step({}, [Send(to, Note(value), deadline_s), Reply(Item("sent"))])
            case Note(value):
                number = sum(1 for _ in rows.prefix("note/"))
                return Step({f"note/{number:06}": Item(value)}, [Emit("notes", message)])
            case Remind(at, value):
                return Step({}, [Wake("reminder", at, Put("reminded", value)), Reply(Item("ok"))])
            case Undelivered(to):
                return Step({"undelivered": Item(to)}, [Emit("notes", message)])
            case Boom():
                raise RuntimeError("boom")
        return NOTHING


class Wire:
    """Nodes of one test, connected by calls; a node may be down."""

    def __init__(self) -> None:
        self.systems: dict[str, System] = {}

    async def exchange(self, node: str, frame: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        if node not in self.systems:
            raise LinkDown(f"{node} is down")
        return await self.systems[node].deliver(frame, "A" if node == "B" else "B")


@asynccontextmanager
async def running(
    node: str, disk: sqlite3.Connection, wire: Wire, keeper: Keeper | None = None, origin: Callable[[str], str] = lambda node: ""
) -> AsyncIterator[System]:
    numbers = count()
    journal = Journal.over(disk, lambda: f"epoch-{node}-{id(disk)}")
    system = System(node, journal, wire, clock=trio.current_time, new_trace=lambda: f"t{next(numbers)}", origin=origin)
    system.add(keeper or Keeper())
    async with trio.open_nursery() as nursery:
        await nursery.start(system.run)
        wire.systems[node] = system
        yield system
        del wire.systems[node]
        nursery.cancel_scope.cancel()


def disk() -> sqlite3.Connection:
    return sqlite3.connect(":memory:", isolation_level=None)


@mock_trio_test
async def test_ask_commits_before_it_replies() -> None:
    storage = disk()
    async with running("A", storage, Wire()) as a:
        assert await a.ask("keeper", Put("x", "1")) == Item("1")
        assert a.rows("keeper")["x"] == Item("1")
        assert len(a.feeds.read("changes")) == 1
    async with running("A", storage, Wire()) as again:
        assert again.rows("keeper")["x"] == Item("1")


@mock_trio_test
async def test_many_messages_arrive_in_order_once_across_a_restart_of_the_receiver() -> None:
    wire, storage = Wire(), disk()
    async with running("A", disk(), wire) as a:
        for i in range(300):
            await a.ask("keeper", Forward("B/keeper", str(i)))
        async with running("B", storage, wire) as b:
            await b.feeds.wait("notes", 99, 60)
        await trio.sleep(1)
        async with running("B", storage, wire) as b:
            assert await b.feeds.wait("notes", 299, 60)
            assert [row.value for _, row in b.rows("keeper").prefix("note/")] == [str(i) for i in range(300)]


@mock_trio_test
async def test_a_machine_hears_by_which_address_a_peer_comes() -> None:
    heard: list[tuple[str, str]] = []

    class Hears(Keeper):
        def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
            heard.append((type(message).__name__, meta.origin))
            return super().handle(rows, message, meta)

    wire = Wire()
    async with running("A", disk(), wire) as a, running("B", disk(), wire, Hears(), lambda node: f"address of {node}") as b:
        await a.ask("keeper", Forward("B/keeper", "x"))
        await b.feeds.wait("notes", 0, 60)
        await b.ask("keeper", Put("x", "1"))
    assert heard == [("Note", "address of A"), ("Put", "")]


@mock_trio_test
async def test_a_deadline_passes_while_the_peer_is_down() -> None:
    async with running("A", disk(), Wire()) as a:
        await a.ask("keeper", Forward("B/keeper", "late", 5.0))
        assert await a.feeds.wait("notes", 0, 30)
        assert a.rows("keeper")["undelivered"] == Item("B/keeper")
        assert a.journal.links() == []


@mock_trio_test
async def test_a_timer_fires_once_and_survives_a_restart() -> None:
    storage = disk()
    async with running("A", storage, Wire()) as a:
        await a.ask("keeper", Remind(100.0, "now"))
    async with running("A", storage, Wire()) as a:
        assert a.rows("keeper").get("reminded") is None
        await trio.sleep_until(200)
        assert a.rows("keeper")["reminded"] == Item("now")
        assert len(a.feeds.read("changes")) == 1


@mock_trio_test
async def test_a_message_that_crashes_the_machine_is_set_aside_and_the_link_goes_on() -> None:
    class Bomber(Keeper):
        local = Keeper.local | Note

        def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
            if isinstance(message, Forward) and message.value == "boom":
                return Step({}, [Send(message.to, Boom()), Reply(Item("sent"))])
            return super().handle(rows, message, meta)

    wire = Wire()
    numbers = count()
    a = System("A", Journal.over(disk(), lambda: "a"), wire, clock=trio.current_time, new_trace=lambda: f"t{next(numbers)}")
    a.add(Bomber())
    async with trio.open_nursery() as nursery, running("B", disk(), wire) as b:
        await nursery.start(a.run)
        wire.systems["A"] = a
        for value in ("one", "boom", "two"):
            await a.ask("keeper", Forward("B/keeper", value))
        assert await b.feeds.wait("notes", 1, 60)
        assert [row.value for _, row in b.rows("keeper").prefix("note/")] == ["one", "two"]
        assert len(b.journal.quarantined()) == 1
        nursery.cancel_scope.cancel()


@mock_trio_test
async def test_an_edge_hears_of_a_crash_and_the_actor_goes_on() -> None:
    async with running("A", disk(), Wire()) as a:
        with pytest.raises(ActorFailed):
            await a.ask("keeper", Boom())
        assert await a.ask("keeper", Put("x", "2")) == Item("2")


@mock_trio_test
async def test_a_peer_may_not_send_what_only_this_node_may() -> None:
    wire = Wire()

    class Liar(Keeper):
        def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
            return Step({}, [Send("B/keeper", Put("stolen", "1")), Send("B/keeper", Note("fine")), Reply(Item("sent"))])

    a = System("A", Journal.over(disk(), lambda: "a"), wire, clock=trio.current_time, new_trace=lambda: "t")
    a.add(Liar())
    async with trio.open_nursery() as nursery, running("B", disk(), wire) as b:
        await nursery.start(a.run)
        await a.ask("keeper", Put("x", "1"))
        assert await b.feeds.wait("notes", 0, 30)
        assert b.rows("keeper").get("stolen") is None
        assert len(b.violations) == 1
        with pytest.raises(Violation):
            await b.deliver(b"\xc1garbage", "A")
        nursery.cancel_scope.cancel()


@mock_trio_test
async def test_taking_hands_out_each_event_once() -> None:
    async with running("A", disk(), Wire()) as a:
        for i in range(5):
            await a.ask("keeper", Put("k", str(i)))
        got: list[int] = []

        async def reader() -> None:
            got.extend(event.seq for event in await a.feeds.take("changes", 3))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(reader)
        assert sorted(got) == [1, 2, 3, 4, 5]


@trio_test
async def test_threads_write_the_same_journal(tmp_path: Path) -> None:
    journal = Journal(f"{tmp_path}/node.db", lambda: "e")
    system = System("A", journal, Wire(), clock=trio.current_time, new_trace=lambda: "t")
    system.add(Keeper())
    async with trio.open_nursery() as nursery:
        await nursery.start(system.run)

        async def put(i: int) -> None:
            assert await system.ask("keeper", Put(f"k{i}", str(i))) == Item(str(i))

        async with trio.open_nursery() as inner:
            for i in range(50):
                inner.start_soon(put, i)
        await system.ask("keeper", Forward("A/keeper", "to myself"))
        assert await system.feeds.wait("notes", 0, 10)
        nursery.cancel_scope.cancel()
    assert journal.commits < 50  # fsyncs were merged
    journal.close()
    again = Journal(f"{tmp_path}/node.db", lambda: "other")
    assert again.epoch == "e"
    assert again.row("keeper", "k49") is not None
    again.close()
