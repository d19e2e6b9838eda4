"""Where the kernel says no, gives up or starts again: full mailboxes, crashes, deadlines, broken disks, strangers."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio
from worlds.patience import within
from worlds.support import mock_trio_test, trio_test

from actors.kernel import reading as reading_module
from actors.kernel import row_view as row_view_module
from actors.kernel import system as system_module
from actors.kernel import tables as tables_module
from actors.kernel.complaints import LAST_WAIT_S
from actors.kernel.feed import Feeds, next_head
from actors.kernel.journal import Journal
from actors.kernel.lineage import Position
from actors.kernel.machine import (
    NOTHING,
    ActorFailed,
    AskTimeout,
    Busy,
    DropFeed,
    Emit,
    LinkDown,
    Meta,
    NodeFailed,
    Reply,
    Rows,
    Send,
    Step,
    Wake,
)
from actors.kernel.mail import LinkBatch
from actors.kernel.records import Commit, JournalClosed, JournalError
from actors.kernel.system import System
from protocol.codec import MAX_BODY_BYTES, Ack, Envelope, decode_ack, encode, encode_ack, encode_batch
from protocol.types import Message, Undelivered, Violation


class Do(Message, frozen=True):
    """A command whose meaning the test gives by a function in `DEEDS`."""

    deed: str


class Text(Message, frozen=True):
    value: str


Deed = Callable[[Rows, Meta], Step]


class Doer:
    """Does what the test says."""

    local = Do | Undelivered
    peer = Text
    rows = Text | None

    def __init__(self, name: str = "doer", **deeds: Deed) -> None:
        self.name, self.deeds = name, deeds

    def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
        match message:
            case Do(deed):
                return self.deeds[deed](rows, meta)
            case Text(value):
                return Step({f"got/{value}": message}, [Emit("got", message)])
            case Undelivered(to):
                return Step({}, [Emit("undelivered", Text(to))])
        return NOTHING


class Nowhere:
    """A network without anybody in it."""

    async def exchange(self, node: str, frame: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        raise LinkDown(f"{node} is out of reach")


class SlowJournal(Journal):
    """A journal whose disk takes `delay_s` for each transaction."""

    delay_s = 0.0

    async def _store(self, commits: list[Commit], acks: dict[tuple[str, str], int]) -> None:
        await trio.sleep(self.delay_s)
        await super()._store(commits, acks)


def disk() -> sqlite3.Connection:
    return sqlite3.connect(":memory:", isolation_level=None)


def system_on(db: sqlite3.Connection, *machines: Any, transport: Any = None, capacity: int = 256) -> System:
    numbers = count()
    journal = SlowJournal.over(db, lambda: "epoch")
    system = System("A", journal, transport or Nowhere(), clock=trio.current_time, new_trace=lambda: f"t{next(numbers)}")
    for machine in machines:
        system.add(machine, capacity)
    return system


@asynccontextmanager
async def running(system: System) -> AsyncIterator[System]:
    async with trio.open_nursery() as nursery:
        await nursery.start(system.run)
        yield system
        nursery.cancel_scope.cancel()


def boom(rows: Rows, meta: Meta) -> Step:
    raise RuntimeError("boom")


def frame(seq: int, sender: str = "B/doer", to: str = "A/doer", epoch: str = "b1", body: bytes = b"") -> bytes:
    return encode_batch([Envelope(sender, to, epoch, seq, seq - 1, "t", body or encode(Text(str(seq))))])


# -- mailboxes
@mock_trio_test
async def test_a_full_mailbox_is_busy() -> None:
    async with running(system_on(disk(), Doer(nothing=lambda rows, meta: NOTHING), capacity=3)) as a:

        async def one(found: list[str]) -> None:
            try:
                await a.ask("doer", Do("nothing"))
                found.append("done")
            except Busy:
                found.append("busy")

        found: list[str] = []
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(one, found)
        assert found.count("done") >= 3
        assert found.count("busy") >= 1
        assert await a.ask("doer", Do("nothing")) is None  # and there is room again


@mock_trio_test
async def test_an_ask_times_out_and_is_still_handled() -> None:
    system = system_on(disk(), Doer(note=lambda rows, meta: Step({"noted": Text("x")}, [Reply(Text("ok"))])))
    system.journal.delay_s = 5  # type: ignore[attr-defined]
    async with running(system) as a:
        with pytest.raises(AskTimeout):
            await a.ask("doer", Do("note"), timeout_s=1)
        assert "noted" not in a.rows("doer")
        await trio.sleep(10)
        assert a.rows("doer")["noted"] == Text("x")


@mock_trio_test
async def test_alarms_ring_though_the_mailbox_is_full() -> None:
    wake = Doer(wake=lambda rows, meta: Step({}, [Wake("w", meta.now + 10, Do("ring"))]),
                ring=lambda rows, meta: Step({"rang": Text(str(meta.now))}))  # fmt: skip
    async with running(system_on(disk(), wake, capacity=1)) as a:
        a.journal.delay_s = 0.5  # type: ignore[attr-defined]

        async def flood(number: int) -> None:
            seq = 1
            while True:
                if decode_ack(await a.deliver(frame(seq, f"B/doer{number}"), "B")).have == seq:
                    seq += 1
                else:
                    await trio.sleep(0.01)

        await a.ask("doer", Do("wake"))
        with trio.move_on_after(60):
            async with trio.open_nursery() as nursery:
                for number in range(3):
                    nursery.start_soon(flood, number)
        assert 10 <= float(a.rows("doer")["rang"].value) < 15


@mock_trio_test
async def test_one_peer_cannot_fill_a_mailbox() -> None:
    async with running(system_on(disk(), Doer())) as a:
        a.journal.delay_s = 5  # type: ignore[attr-defined]
        notes: list[str] = []

        async def give(seq: int, sender: str) -> None:
            notes.append(sender + decode_ack(await a.deliver(frame(seq, f"{sender}/doer"), sender)).note)

        async with trio.open_nursery() as nursery:
            for seq in range(1, 101):
                nursery.start_soon(give, seq, "B")
            await trio.sleep(1)
            nursery.start_soon(give, 1, "C")
        assert notes.count("Bbusy") == 100 - system_module.PEER_FRAMES
        assert "C" in notes
        assert not a._taking
        assert a._taking_bytes == 0


# -- crashes
@mock_trio_test
async def test_a_node_ends_whose_actor_keeps_crashing_and_no_message_is_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Feeds, feed: str) -> None:
        raise RuntimeError("not a message's fault")

    emit = Doer(emit=lambda rows, meta: Step({}, [Emit("f", Text("x"))]))

    async def live() -> None:
        async with running(system_on(disk(), emit)) as a:
            monkeypatch.setattr(Feeds, "notify", broken)
            for _ in range(20):
                await a.post("edge", [Send("doer", Do("emit"))])
                await trio.sleep(1)

    with pytest.raises(BaseExceptionGroup) as caught:
        await live()
    assert caught.group_contains(NodeFailed, match="doer crashed 6 times")


@mock_trio_test
async def test_poison_of_our_own_is_isolated_and_ends_nothing() -> None:
    doer = Doer(boom=boom, fine=lambda rows, meta: Step({}, [Emit("fine", Text("x"))]))
    async with running(system_on(disk(), doer)) as a:
        for _ in range(30):
            await a.post("edge", [Send("doer", Do("boom")), Send("doer", Do("fine"))])
        assert await a.feeds.wait("fine", 29, 600)
        assert len(a.journal.quarantined()) == 30


@mock_trio_test
async def test_crashes_far_apart_end_nothing() -> None:
    async with running(system_on(disk(), Doer(boom=boom))) as a:
        for _ in range(5):
            await a.post("edge", [Send("doer", Do("boom"))])
            await trio.sleep(61)
        assert len(a.journal.quarantined()) == 5


@mock_trio_test
async def test_no_peer_can_end_the_node() -> None:
    class Fragile(Doer):
        def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
            raise RuntimeError("boom")

    async with running(system_on(disk(), Fragile())) as a:
        for seq in range(1, 31):
            while decode_ack(await a.deliver(frame(seq), "B")).have < seq:
                await trio.sleep(0.1)
        assert len(a.journal.quarantined()) == 30


@mock_trio_test
async def test_a_machine_that_wants_the_impossible_crashes_alone() -> None:
    doer = Doer(
        huge=lambda rows, meta: Step({"x": Text("1")}, [Send("B/doer", Text("x" * MAX_BODY_BYTES))]),
        theft=lambda rows, meta: Step({"x": Text("1")}, [Emit("mine", Text("stolen"))]),
        read=lambda rows, meta: Step({}, [Reply(Text(str("x" in rows)))]),
    )
    owner = Doer("owner", emit=lambda rows, meta: Step({}, [Emit("mine", Text("1"))]))
    async with running(system_on(disk(), doer, owner)) as a:
        await a.ask("owner", Do("emit"))
        for deed in ("huge", "theft"):
            with pytest.raises(ActorFailed):
                await a.ask("doer", Do(deed))
        assert await a.ask("doer", Do("read")) == Text("False")
        assert a.journal.links() == []
        assert len(a.feeds.read("mine")) == 1


# -- ports
class Printer:
    """A port that does what the test says with each message, and notes what it saw."""

    name = "printer"
    local = Text
    peer = type(None)

    def __init__(self, work: Callable[[str], Awaitable[None]]) -> None:
        self.work, self.seen = work, list[str]()

    async def handle(self, message: Text, meta: Meta) -> Sequence[Send]:
        self.seen.append(message.value)
        await self.work(message.value)
        return [Send("doer", Do(message.value))]


def printing(db: sqlite3.Connection, work: Callable[[str], Awaitable[None]]) -> tuple[System, Printer]:
    def printed(rows: Rows, meta: Meta) -> Step:
        return Step({}, [Emit("printed", Text("x"))])

    doer = Doer(a=printed, b=printed, print=lambda rows, meta: Step({}, [Send("printer", Text(v)) for v in "ab"]))
    system, printer = system_on(db, doer), Printer(work)
    system.add_port(printer)
    return system, printer


@mock_trio_test
async def test_a_port_sees_a_message_again_after_a_crash_of_the_process() -> None:
    storage = disk()

    async def stuck(value: str) -> None:
        await trio.sleep_forever()

    system, printer = printing(storage, stuck)
    async with running(system) as a:
        await a.ask("doer", Do("print"))
        await trio.sleep(1)
    assert printer.seen == ["a"]

    async def quick(value: str) -> None:
        await trio.lowlevel.checkpoint()

    system, printer = printing(storage, quick)
    async with running(system) as a:
        await a.feeds.wait("printed", 1, 60)
        assert len(a.feeds.read("printed")) == 2
    assert printer.seen == ["a", "b"]
    system, printer = printing(storage, quick)
    async with running(system):
        await trio.sleep(60)
    assert printer.seen == []


@mock_trio_test
async def test_a_port_that_fails_tries_again_and_then_sets_the_message_aside() -> None:
    failures = iter([True, True, False, True, True, True])

    async def flaky(value: str) -> None:
        await trio.lowlevel.checkpoint()
        if next(failures):
            raise RuntimeError("a bug, or the world")

    system, printer = printing(disk(), flaky)
    async with running(system) as a:
        await a.ask("doer", Do("print"))
        await trio.sleep(100)
        assert printer.seen == ["a", "a", "a", "b", "b", "b"]
        assert len(a.feeds.read("printed")) == 1
        assert len(a.journal.quarantined()) == 1


# -- timers and feeds
@mock_trio_test
async def test_a_timer_is_replaced_and_taken_away() -> None:
    def wake(key: str, after_s: float | None, deed: str = "") -> Deed:
        return lambda rows, meta: Step({}, [Wake(key, None if after_s is None else meta.now + after_s, Do(deed))])

    def ring(name: str) -> Deed:
        return lambda rows, meta: Step({}, [Emit("rings", Text(f"{name}@{meta.now:g}"))])

    doer = Doer(first=wake("k", 10, "ring1"), second=wake("k", 20, "ring2"), none=wake("k", None), other=wake("o", 5, "ring1"),
                ring1=ring("1"), ring2=ring("2"))  # fmt: skip
    async with running(system_on(disk(), doer)) as a:
        await a.ask("doer", Do("first"))
        await a.ask("doer", Do("second"))
        await trio.sleep(30)
        await a.ask("doer", Do("first"))
        await a.ask("doer", Do("none"))
        await a.ask("doer", Do("other"))
        await trio.sleep(30)
        assert a.journal.next_alarm() is None
        assert [event.body for event in a.feeds.read("rings")] == [encode(Text("2@20")), encode(Text("1@35"))]


@mock_trio_test
async def test_a_dropped_feed_starts_again() -> None:
    doer = Doer(emit=lambda rows, meta: Step({}, [Emit("f", Text("x"))]), drop=lambda rows, meta: Step({}, [DropFeed("f")]),
                both=lambda rows, meta: Step({}, [Emit("f", Text("1")), DropFeed("f"), Emit("f", Text("2"))]))  # fmt: skip
    async with running(system_on(disk(), doer)) as a:
        for _ in range(3):
            await a.ask("doer", Do("emit"))
        await a.ask("doer", Do("drop"))
        assert a.feeds.read("f") == []
        await a.ask("doer", Do("emit"))
        assert [event.seq for event in a.feeds.read("f")] == [1]
        await a.ask("doer", Do("both"))
        assert [(event.seq, event.body) for event in a.feeds.read("f")] == [(1, encode(Text("2")))]


def test_event_times_rise_strictly_and_are_whole_microseconds() -> None:
    head = (0, 0.0)
    for now in (1.7e9, 1.7e9, 1.7e9 - 5, 1.7e9 + 1e-7, 9e9, 9e9, 5.0):
        seq, at = next_head(head, now)
        assert seq == head[0] + 1
        assert at > head[1]
        assert at == round(at, 6)
        head = (seq, at)


@mock_trio_test
async def test_a_closed_feed_keeps_nobody_waiting() -> None:
    async with running(system_on(disk(), Doer())) as a, trio.open_nursery() as nursery:
        nursery.start_soon(a.feeds.wait, "f", 0, 1000)
        await trio.sleep(1)
        a.feeds.close()
        assert not await a.feeds.wait("f", 0, 1000)
        assert trio.current_time() < 10


# -- strangers
@mock_trio_test
async def test_forged_frames_are_refused() -> None:
    async with running(system_on(disk(), Doer())) as a:
        for raw, peer in (
            (frame(1, "C/doer"), "B"),  # in the name of another node
            (frame(1, "A/doer"), "B"),  # in the name of this node
            (frame(1, "A/doer"), "A"),  # nobody but this process is this node
            (frame(1, "A/exeunit:2"), "A/exeunit:1"),  # an exe-unit in the name of another
            (frame(1, to="C/doer"), "B"),
            (frame(1, to="A/nobody"), "B"),
            (b"", "B"),
        ):
            with pytest.raises(Violation):
                await a.deliver(raw, peer)
        assert decode_ack(await a.deliver(frame(1, "A/exeunit:1", body=encode(Text("x"))), "A/exeunit:1")).have == 1
        assert decode_ack(await a.deliver(frame(1), "B")) == Ack(1, boots=("1:",))
        assert len(a.feeds.read("got")) == 2


@mock_trio_test
async def test_a_new_epoch_is_never_acknowledged_with_the_old_ones_numbers() -> None:
    async with running(system_on(disk(), Doer(), capacity=1)) as a:
        for seq in range(1, 6):
            assert decode_ack(await a.deliver(frame(seq), "B")).have == seq
        link = LinkBatch([Envelope("B/doer", "A/doer", "b2", 1, 0, "", b"")])
        assert decode_ack(await a._busy("doer", link)) == Ack(0, "busy")
        assert decode_ack(await a.deliver(frame(1, epoch="b2"), "B")).have == 1
        assert decode_ack(await a.deliver(frame(6), "B")) == Ack(5, "retired epoch", ("1:",))
        assert len(a.feeds.read("got")) == 6
        assert Position("b2", 1, ("b1/5/1:",)).of("b1").seq == 5
        assert Position("b2", 1).of("b1").seq == 0


@mock_trio_test
async def test_a_frame_whose_session_broke_is_not_taken_twice() -> None:
    async with running(system_on(disk(), Doer())) as a:
        a.journal.delay_s = 2  # type: ignore[attr-defined]
        for _ in range(3):
            with trio.move_on_after(0.5):
                await a.deliver(frame(1), "B")
        assert decode_ack(await a.deliver(frame(1), "B")).have == 1
        assert len(a.feeds.read("got")) == 1


# -- the journal
@mock_trio_test
async def test_rows_are_cached_by_number_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_view_module, "CACHED_ROWS", 10)
    doer = Doer(
        fill=lambda rows, meta: Step({f"k{i}": Text(str(i)) for i in range(30)} | {"k5": Text("x" * 20_000)}),
        small=lambda rows, meta: Step({"k5": Text("5")}),
        large=lambda rows, meta: Step({"k5": Text("y" * 20_000)}),
        read=lambda rows, meta: Step({}, [Reply(Text(rows["k5"].value[0] + str(sum(1 for _ in rows.prefix("k")))))]),
    )
    async with running(system_on(disk(), doer)) as a:
        await a.ask("doer", Do("fill"))
        for deed, first in (("small", "5"), ("large", "y"), ("small", "5")):
            await a.ask("doer", Do(deed))
            assert await a.ask("doer", Do("read")) == Text(first + "30")
        assert len(a._actors["doer"].rows._cache) == 10  # type: ignore[union-attr]


@mock_trio_test
async def test_a_prefix_read_half_way_holds_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_module, "READ_AT_ONCE", 3)
    doer = Doer(fill=lambda rows, meta: Step({f"k/{i:02}": Text(str(i)) for i in range(20)}),
                drop=lambda rows, meta: Step({"k/03": None, "k/99": Text("new")}))  # fmt: skip
    async with running(system_on(disk(), doer)) as a:
        await a.ask("doer", Do("fill"))
        half = a.rows("doer").prefix("k/")
        assert next(half)[0] == "k/00"
        await a.ask("doer", Do("drop"))
        assert [key for key, _ in a.rows("doer").prefix("k/")] == [f"k/{i:02}" for i in range(20) if i != 3] + ["k/99"]


def test_a_journal_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    Journal(f"{tmp_path}/node.db", lambda: "e").close()
    with sqlite3.connect(tmp_path / "node.db") as db:
        db.execute(f"pragma user_version={len(tables_module.MIGRATIONS) + 1}")
    with pytest.raises(JournalError, match="newer version"):
        Journal(f"{tmp_path}/node.db", lambda: "e")


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "node.db").write_bytes(b"something else" * 1000)
    for path in (tmp_path / "node.db", tmp_path, tmp_path / "none" / "node.db"):
        with pytest.raises(JournalError):
            Journal(str(path), lambda: "e")


@pytest.mark.parametrize("fault", ["pragma max_page_count=1", "pragma query_only=1"], ids=["full", "read-only"])
@pytest.mark.parametrize("threads", [True, False])
def test_a_disk_that_fails_ends_the_node(tmp_path: Path, fault: str, threads: bool) -> None:
    journal = Journal(f"{tmp_path}/node.db", lambda: "e", threads=threads)
    system = System("A", journal, Nowhere(), clock=trio.current_time, new_trace=lambda: "t")
    fill = Doer(fill=lambda rows, meta: Step({"x": Text("x" * 100_000)}, [Reply(Text("kept"))]))
    system.add(fill)
    answers: list[Any] = []

    @trio_test
    async def body() -> None:
        with within(10):
            async with running(system) as a:
                journal._writer.execute(fault)
                async with trio.open_nursery() as nursery:
                    for _ in range(3):
                        nursery.start_soon(ask, a)

    async def ask(a: System) -> None:
        answers.append(await a.ask("doer", Do("fill")))

    with pytest.raises(BaseExceptionGroup) as caught:
        body()
    assert caught.group_contains(JournalError, match="cannot write")
    assert answers == []
    journal.close()


@pytest.mark.parametrize("threads", [True, False])
@trio_test
async def test_room_that_is_made_on_a_full_disk_saves_the_commit(tmp_path: Path, threads: bool) -> None:
    journal = Journal(f"{tmp_path}/node.db", lambda: "e", threads=threads)
    made: list[bool] = []

    def make_room() -> bool:
        made.append(True)
        journal._writer.execute("pragma max_page_count=100000")
        return True

    journal.make_room = make_room
    system = System("A", journal, Nowhere(), clock=trio.current_time, new_trace=lambda: "t")
    large, reply = Text("x" * 100_000), Reply(Text("kept"))
    system.add(Doer(fill=lambda rows, meta: Step({f"x{len(list(rows.prefix('x')))}": large}, [reply])))
    async with running(system) as a:
        journal._writer.execute("pragma max_page_count=1")
        assert [await a.ask("doer", Do("fill")) for _ in range(2)] == [Text("kept")] * 2
        assert [key for key, _ in a.rows("doer").prefix("x")] == ["x0", "x1"]
    assert made == [True]
    journal.close()


@trio_test
async def test_stopping_in_the_midst_of_commits_hangs_nobody(tmp_path: Path) -> None:
    journal = Journal(f"{tmp_path}/node.db", lambda: "e")
    system = System("A", journal, Nowhere(), clock=trio.current_time, new_trace=lambda: "t")
    kept: list[int] = []
    system.add(Doer())
    with within(10):
        async with trio.open_nursery() as edges:
            async with trio.open_nursery() as nursery:
                await nursery.start(system.run)

                async def post(i: int) -> None:
                    try:
                        await system.post("edge", [Send("B/doer", Text(str(i)))])
                        kept.append(i)
                    except JournalClosed:
                        pass

                for i in range(200):
                    edges.start_soon(post, i)
                while len(kept) < 5:
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
    stored = [posted.seq for posted in journal.pending("edge", "B/doer", 0, 1000)[0]]
    assert len(stored) >= len(kept)
    with pytest.raises(JournalClosed):
        await system.post("edge", [Send("B/doer", Text("late"))])
    journal.close()


@mock_trio_test
async def test_posts_keep_their_order_and_one_that_is_cancelled_before_the_start_is_not_sent() -> None:
    system = system_on(disk(), Doer())
    with trio.move_on_after(1):
        await system.post("edge", [Send("B/doer", Text("never"))])
    async with trio.open_nursery() as nursery:
        for i in range(20):
            nursery.start_soon(system.post, "edge", [Send("B/doer", Text(str(i)))])
            await trio.sleep(0.1)
        async with running(system):
            await trio.sleep(1)
    bodies = [posted.body for posted in system.journal.pending("edge", "B/doer", 0, 100)[0]]
    assert bodies == [encode(Text(str(i))) for i in range(20)]
    assert system._sent.keys() <= {("edge", "B/doer")}


@mock_trio_test
async def test_a_deadline_is_told_once_and_the_next_message_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(Nowhere):
        sent: list[bytes] = []

        async def exchange(self, node: str, raw: bytes) -> bytes:
            if trio.current_time() < 20:
                raise LinkDown("not yet")
            self.sent.append(raw)
            await trio.lowlevel.checkpoint()
            return encode_ack(Ack(2, boots=("1:1-epoch",)))

    doer = Doer(send=lambda rows, meta: Step({}, [Send("B/doer", Text("1"), 10), Send("B/doer", Text("2"), 100)]))
    wire = Later()
    async with running(system_on(disk(), doer, transport=wire)) as a:
        await a.ask("doer", Do("send"))
        await trio.sleep(200)
        assert len(a.feeds.read("undelivered")) == 1
        assert len(wire.sent) == 1
        assert a.journal.links() == []
        assert a.troubles() == []


@mock_trio_test
async def test_timers_of_actors_that_are_gone_do_not_stay() -> None:
    storage = disk()
    doer = Doer(wake=lambda rows, meta: Step({}, [Wake("w", meta.now + 10, Do("ring"))]))
    async with running(system_on(storage, doer)) as a:
        await a.ask("doer", Do("wake"))
    async with running(system_on(storage, Doer("other"))) as a:
        await trio.sleep(30)
        assert a.journal.next_alarm() is None


@pytest.mark.parametrize("threads", [True, False])
def test_old_events_are_forgotten_while_others_write(tmp_path: Path, threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables_module, "PRUNED_AT_ONCE", 3)
    now = [0.0]

    async def body() -> None:
        journal = Journal(f"{tmp_path}/node.db", lambda: "e", threads=threads)
        system = System("A", journal, Nowhere(), clock=lambda: now[0], new_trace=lambda: "t")
        system.add(Doer(emit=lambda rows, meta: Step({}, [Emit("f", Text("x"))])))
        async with trio.open_nursery() as nursery:
            await nursery.start(system.run)
            for second in range(20):
                now[0] = float(second)
                await system.ask("doer", Do("emit"))

            async def more() -> None:
                for _ in range(5):
                    await system.ask("doer", Do("emit"))

            nursery.start_soon(more)
            assert await journal.prune(11.0) == 11
            assert [event.at for event in system.feeds.read("f")][:9] == [float(second) for second in range(11, 20)]
            assert await journal.prune(11.0) == 0
            assert await system.feeds.wait("f", 24, 10)
            assert await journal.prune(1e6) == 14
            assert journal.feed_head("f") == (0, 0.0), "of an empty feed nothing stays"
            nursery.cancel_scope.cancel()
        journal.close()

    trio.run(body)


@mock_trio_test
async def test_strangers_who_only_break_the_protocol_leave_no_rows() -> None:
    db = disk()
    async with running(system_on(db, Doer())) as system:
        for number in range(50):
            raw = await system.deliver(frame(1, sender=f"B/invented-{number}", body=b"\xc1"), "B")
            assert decode_ack(raw).have == 1
            await trio.sleep(LAST_WAIT_S)  # before that it is not heard
        assert db.execute("select count(*) from inbox").fetchone() == (0,)
        raw = await system.deliver(frame(2, sender="B/invented-7", body=encode(Text("kept"))), "B")
        assert decode_ack(raw).have == 2
        assert db.execute("select sender, seq from inbox").fetchall() == [("B/invented-7", 2)]
        raw = await system.deliver(frame(3, sender="B/invented-7", body=b"\xc1"), "B")  # no stranger any more
        assert decode_ack(raw).have == 3
        assert db.execute("select seq from inbox").fetchall() == [(3,)]


@mock_trio_test
async def test_an_actor_without_peer_messages_takes_no_mail_from_other_nodes() -> None:
    class Private(Doer):
        peer = None

    db = disk()
    async with running(system_on(db, Private())) as system:
        with pytest.raises(Violation, match="takes no mail"):
            await system.deliver(frame(1, body=encode(Text("x"))), "B")
        assert db.execute("select count(*) from inbox").fetchone() == (0,)
