"""What one peer, one actor or one long look may take: bounds on bytes, on time, and on what a reader sees."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import trio
from test_kernel_limits import Do, Doer, Nowhere, Text, disk, running, system_on
from worlds.support import mock_trio_test, trio_test

from actors.kernel import reading as reading_module
from actors.kernel.answers import MAX_BYTES, MAX_MESSAGES
from actors.kernel.journal import Journal
from actors.kernel.machine import Emit, LinkDown, Meta, Reply, Rows, Send, Step, Wake
from actors.kernel.mail import BATCH_BYTES
from actors.kernel.records import Commit
from actors.kernel.system import System
from protocol.codec import Envelope, decode_ack, encode, encode_batch


class Answerer(Doer):
    """Answers each message of a peer with `size` bytes."""

    size = 900_000

    def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
        if isinstance(message, Text) and meta.sender.startswith("B/"):
            return Step({}, [Send(meta.sender, Text("x" * self.size), 30)])
        return super().handle(rows, message, meta)


def questions(first: int, count: int, sender: str = "B/doer") -> bytes:
    body, boot = encode(Text("?")), "1-b"
    numbers = range(first, first + count)
    return encode_batch([Envelope(sender, "A/doer", "b1", n, n - 1, "t", body, boot, boot if n > 1 else "") for n in numbers])


async def ask_all(a: System, most: int, sender: str = "B/doer") -> tuple[int, str]:
    """Ask like a peer that acknowledges nothing, until it gets no further; return how far it came, and why no further."""
    have, note = 0, ""
    for _ in range(200):
        ack = decode_ack(await a.deliver(questions(have + 1, 64, sender), "B"))
        if ack.have == have:
            return have, ack.note
        have, note = ack.have, ack.note
        if have >= most:
            break
    return have, note


@pytest.mark.parametrize(("size", "most"), [(900_000, 20), (100, 2 * MAX_MESSAGES)], ids=["bytes", "messages"])
@mock_trio_test
async def test_what_waits_for_a_peer_that_acknowledges_nothing_is_bounded(size: int, most: int) -> None:
    answerer = Answerer()
    answerer.size = size
    async with running(system_on(disk(), answerer)) as a:
        have, note = await ask_all(a, most)
        assert (have < most, note) == (True, "busy")
        count, waits = a.journal._writer.execute("select count(*), sum(length(body)) from outbox").fetchone()
        assert waits < MAX_BYTES + BATCH_BYTES + size
        assert count <= MAX_MESSAGES + 64
        _, note = await ask_all(a, most, "B/other")
        assert note == "busy"  # another name of the same node is the same node
        raw = encode_batch([Envelope("C/doer", "A/doer", "c", 1, 0, "t", encode(Text("x")), "1-c", "")])
        assert decode_ack(await a.deliver(raw, "C")).have == 1  # and nobody else suffers
        await trio.sleep(60)  # the answers are given up
        assert a.journal.links() == []
        assert decode_ack(await a.deliver(questions(have + 1, 1), "B")).have == have + 1


@mock_trio_test
async def test_who_takes_its_answers_gets_them_all() -> None:
    class Taker(Nowhere):
        taken = 0

        async def exchange(self, node: str, raw: bytes) -> bytes:
            from protocol.codec import Ack, decode_batch, encode_ack

            await trio.sleep(0.05)
            if node != "B":
                raise LinkDown(node)
            batch = decode_batch(raw)
            self.taken = max(self.taken, batch[-1].seq)
            return encode_ack(Ack(batch[-1].seq, "", (f"1:{batch[-1].boot}",)))

    taker = Taker()
    async with running(system_on(disk(), Answerer(), transport=taker)) as a:
        have = 0
        with trio.fail_after(600):
            while have < 100:
                have = decode_ack(await a.deliver(questions(have + 1, 20), "B")).have
                await trio.sleep(0.2)
        await trio.sleep(20)
        assert taker.taken >= 100
        assert not a.answers._links
        assert not a.answers._nodes


# -- time
class Slow(Doer):
    """Takes 2 ms for each message of a peer."""

    def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
        if isinstance(message, Text):
            time.sleep(0.002)
        return super().handle(rows, message, meta)


def texts(first: int, sender: str) -> bytes:
    boot = "1-b"
    return encode_batch(
        [Envelope(sender, "A/doer", "e", seq, seq - 1, "t", encode(Text(f"{sender}{seq}")), boot, boot if seq > 1 else "")
         for seq in range(first, first + 64)]
    )  # fmt: skip


@trio_test
async def test_edges_and_alarms_come_before_a_peers_flood() -> None:
    doer = Slow(
        ping=lambda rows, meta: Step({}, [Reply(Text("pong"))]),
        wake=lambda rows, meta: Step({}, [Wake("w", meta.now, Do("ring")), Reply(Text("set"))]),
        ring=lambda rows, meta: Step({}, [Emit("rings", Text("x"))]),
    )
    async with running(system_on(disk(), doer)) as a, trio.open_nursery() as nursery:

        async def flood(sender: str) -> None:
            have = 0
            while True:
                have = decode_ack(await a.deliver(texts(have + 1, sender), sender.partition("/")[0])).have

        for number in range(12):
            nursery.start_soon(flood, f"B/doer{number}")
        nursery.start_soon(flood, "C/doer")
        while not a.rows("doer").get("got/C/doer64"):  # the other peer has its turns
            await trio.sleep(0.01)
        worst = 0.0
        for _ in range(10):
            start = trio.current_time()
            assert await a.ask("doer", Do("ping")) == Text("pong")
            worst = max(worst, trio.current_time() - start)
        assert worst < 0.1 * SLOWNESS
        start = trio.current_time()
        await a.ask("doer", Do("wake"))
        assert await a.feeds.wait("rings", 0, 60)
        assert trio.current_time() - start < 0.2 * SLOWNESS
        nursery.cancel_scope.cancel()


SLOWNESS = 10  # of a machine that still passes; a run of the actor took 1.5 s and more in this test
TIMERS = 3000


@mock_trio_test
async def test_due_timers_of_one_actor_do_not_delay_those_of_another() -> None:
    many = Doer(
        "many",
        wake=lambda rows, meta: Step({}, [Wake(f"w{n}", meta.now + 10, Do("ring")) for n in range(TIMERS)]),
        ring=lambda rows, meta: Step({}, [Emit("rung", Text("x"))]),
    )
    one = Doer(
        "one",
        wake=lambda rows, meta: Step({}, [Wake("w", meta.now + 10.5, Do("ring"))]),
        ring=lambda rows, meta: Step({}, [Emit("rings", Text(str(meta.now)))]),
    )
    async with running(system_on(disk(), many, one)) as a:
        await a.ask("many", Do("wake"))
        await a.ask("one", Do("wake"))
        assert await a.feeds.wait("rings", 0, 60)
        assert trio.current_time() < 10.7
        assert await a.feeds.wait("rung", TIMERS - 1, 60)
        assert trio.current_time() < 11, "a full page is followed by the next at once"


@mock_trio_test
async def test_what_a_port_could_not_deliver_is_given_up_a_page_at_a_time() -> None:
    async with running(system_on(disk(), Doer())) as a:
        await a.post("edge", [Send("B/doer", Text(str(number)), 10) for number in range(600)])
        await trio.sleep(9)
        before = a.journal.commits
        await trio.sleep(10)
        assert a.journal.links() == []
        assert a.journal.commits - before <= 4


# -- looks
class Paused(Journal):
    """A journal whose writer waits, before each transaction, until it is let go."""

    def __init__(self, path: str) -> None:
        self.may_write, self.wrote = threading.Event(), threading.Event()
        self.may_write.set()
        super().__init__(path, lambda: "e")

    def _write(self, commits: list[Commit], *more: Any) -> None:
        assert self.may_write.wait(30)
        super()._write(commits, *more)
        self.wrote.set()


@trio_test
async def test_a_look_without_a_checkpoint_sees_one_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_module, "READ_AT_ONCE", 3)

    def put(value: str) -> Any:
        return lambda rows, meta: Step({f"k/{n:02}": Text(value) for n in range(20)}, [Reply(Text(value))])

    journal = Paused(f"{tmp_path}/node.db")
    system = System("A", journal, Nowhere(), clock=trio.current_time, new_trace=lambda: "t")
    system.add(Doer(old=put("old"), new=put("new")))
    async with trio.open_nursery() as nursery:
        await nursery.start(system.run)
        await system.ask("doer", Do("old"))
        journal.may_write.clear()
        journal.wrote.clear()
        nursery.start_soon(system.ask, "doer", Do("new"))
        while not journal._limiter.borrowed_tokens:  # the writer is at it
            await trio.sleep(0.001)
        look = system.rows("doer").prefix("k/")
        seen = [next(look)[1].value]
        journal.may_write.set()
        assert journal.wrote.wait(30)  # without a checkpoint of this task
        seen += [row.value for _, row in look]
        assert seen == ["old"] * 20
        assert system.rows("doer")["k/07"] == Text("old")
        await trio.lowlevel.checkpoint()
        assert system.rows("doer")["k/07"] == Text("new")
        nursery.cancel_scope.cancel()
    journal.close()
