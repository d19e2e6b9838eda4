"""Nothing is given up in silence: ports wait out the world's whims, what is set aside is told, shown and released."""

from __future__ import annotations

import sqlite3
from itertools import pairwise
from typing import Any

import pytest
import trio
from test_kernel_limits import Deed, Do, Doer, Nowhere, Text, boom, disk, frame, printing, running, system_on
from worlds.support import mock_trio_test

from actors.kernel.journal import Journal
from actors.kernel.machine import ActorFailed, DropFeed, Emit, LinkDown, Meta, Rows, Send, Step, Wake
from actors.kernel.system import System
from protocol.codec import MAX_BODY_BYTES, decode_ack, encode
from protocol.types import Message, Undelivered


class Lost(Message, frozen=True):
    body: bytes
    reason: str
    to: str


class Sender(Doer):
    """Keeps every `Undelivered` that it hears."""

    def __init__(self, name: str = "doer", **deeds: Deed) -> None:
        super().__init__(name, **deeds)

    def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
        if isinstance(message, Undelivered):
            assert meta.sender == f"A/{self.name}"
            return Step({}, [Emit("lost", Lost(message.body, message.reason, message.to))])
        return super().handle(rows, message, meta)


# -- ports
@pytest.mark.parametrize(
    "whim",
    [
        OSError("no space left"), sqlite3.OperationalError("database is locked"), sqlite3.DatabaseError("malformed"),
        TimeoutError("no answer"), trio.TooSlowError(), trio.BrokenResourceError(), LinkDown("away"), MemoryError(),
        ExceptionGroup("several", [OSError("one"), sqlite3.OperationalError("two")]),
    ],
    ids=lambda whim: type(whim).__name__,
)  # fmt: skip
@mock_trio_test
async def test_a_port_waits_out_the_worlds_whims_and_says_why(whim: Exception) -> None:
    async def away(value: str) -> None:
        await trio.lowlevel.checkpoint()
        if trio.current_time() < 3600:
            raise whim

    system, printer = printing(disk(), away)
    async with running(system) as a:
        await a.ask("doer", Do("print"))
        await trio.sleep(1800)
        [(actor, recipient, why)] = a.troubles()
        assert (actor, recipient) == ("doer", "A/printer")
        assert type(whim).__name__ in why
        assert 300 < len(printer.seen) < 800  # growing pauses: seldom, and without end
        assert await a.feeds.wait("printed", 1, 1900)
        await trio.sleep(1)
        assert printer.seen[-2:] == ["a", "b"]
        assert not a.quarantined()
        assert not a.troubles()


@mock_trio_test
async def test_a_port_gives_any_exception_half_a_minute() -> None:
    async def odd(value: str) -> None:
        await trio.lowlevel.checkpoint()
        if trio.current_time() < 20:
            raise KeyError("an answer of another form")

    system, _ = printing(disk(), odd)
    async with running(system) as a:
        await a.ask("doer", Do("print"))
        assert await a.feeds.wait("printed", 1, 60)
        assert not a.quarantined()


# -- senders are told
@mock_trio_test
async def test_the_sender_of_what_is_set_aside_hears_of_it_as_of_what_could_not_be_delivered() -> None:
    sender = Sender(send=lambda rows, meta: Step({}, [Send("fragile", Do("boom")), Send("fragile", Do("fine"))]))
    fragile = Doer("fragile", boom=boom, fine=lambda rows, meta: Step({}, [Emit("fine", Text("x"))]))
    db = disk()
    async with running(system_on(db, sender, fragile)) as a:
        await a.ask("doer", Do("send"))
        assert await a.feeds.wait("lost", 0, 60)
        assert await a.feeds.wait("fine", 0, 60)
        await trio.sleep(60)
        [event] = a.feeds.read("lost")
        assert event.body == encode(Lost(encode(Do("boom")), "the recipient set it aside: it crashed there", "A/fragile"))
        assert a.journal.links() == []
        assert a.troubles() == []
    async with running(system_on(db, sender, fragile)) as a:
        await trio.sleep(600)
        assert len(a.feeds.read("lost")) == 1


@mock_trio_test
async def test_a_sender_that_dies_before_it_is_told_is_told_when_it_is_back() -> None:
    class Silent(Nowhere):
        """Takes no frame of node A until it is told to."""

        def __init__(self, other: System) -> None:
            self.other, self.deaf = other, True

        async def exchange(self, node: str, raw: bytes) -> bytes:
            ack = await self.other.deliver(raw, "A")
            if self.deaf:
                raise LinkDown("the acknowledgement is lost")
            return ack

    class Fragile(Doer):
        def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
            raise RuntimeError("boom")

    far = System("B", Journal.over(disk(), lambda: "b"), Nowhere(), clock=trio.current_time, new_trace=lambda: "t")
    far.add(Fragile())
    wire = Silent(far)
    sender = Sender(send=lambda rows, meta: Step({}, [Send("B/doer", Text("x"))]))
    db = disk()
    async with running(far):
        async with running(system_on(db, sender, transport=wire)) as a:
            await a.ask("doer", Do("send"))
            await trio.sleep(60)
            assert len(far.quarantined()) == 1
            assert a.journal.links() == [("doer", "B/doer")]
        wire.deaf = False
        async with running(system_on(db, sender, transport=wire)) as a:
            assert await a.feeds.wait("lost", 0, 60)
            await trio.sleep(60)
            assert len(a.feeds.read("lost")) == 1
            assert a.journal.links() == []


@mock_trio_test
async def test_no_recipient_can_drive_its_sender_round_and_round() -> None:
    class Again(Doer):
        """Sends again at once whatever comes back."""

        def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
            if isinstance(message, Undelivered):
                return Step({}, [Send("B/doer", Text("again")), Emit("lost", Text("x"))])
            return super().handle(rows, message, meta)

    class Refuser(Nowhere):
        async def exchange(self, node: str, raw: bytes) -> bytes:
            from protocol.codec import Ack, decode_batch, encode_ack

            await trio.lowlevel.checkpoint()
            last = decode_batch(raw)[-1]
            return encode_ack(Ack(last.seq, "", (f"1:{last.boot}",), (last.seq,)))

    again = Again(send=lambda rows, meta: Step({}, [Send("B/doer", Text("x"))]))
    async with running(system_on(disk(), again, transport=Refuser())) as a:
        await a.ask("doer", Do("send"))
        await trio.sleep(3600)
        assert 3 <= len(a.feeds.read("lost")) < 25


# -- people see and release
@mock_trio_test
async def test_what_is_set_aside_can_be_released_and_is_handled_once() -> None:
    well: list[bool] = []

    def fragile(rows: Rows, meta: Meta) -> Step:
        if not well:
            raise RuntimeError("boom")
        return Step({"done": Text(meta.sender)}, [Emit("done", Text("x"))])

    sender = Sender(send=lambda rows, meta: Step({}, [Send("fragile", Do("work"))]))
    async with running(system_on(disk(), sender, Doer("fragile", work=fragile))) as a:
        await a.ask("doer", Do("send"))
        await a.feeds.wait("lost", 0, 60)
        [one] = a.quarantined()
        assert (one.actor, one.sender, one.error) == ("fragile", "A/doer", "RuntimeError('boom')")
        with pytest.raises(ActorFailed, match="boom"):
            await a.release(one.number)
        assert len(a.quarantined()) == 1
        well.append(True)
        await a.release(one.number)
        assert a.quarantined() == []
        assert a.rows("fragile")["done"] == Text("A/doer")
        with pytest.raises(LookupError):
            await a.release(one.number)
        assert len(a.feeds.read("done")) == 1


@mock_trio_test
async def test_what_a_port_set_aside_is_released_or_discarded() -> None:
    well: list[bool] = []

    async def odd(value: str) -> None:
        await trio.lowlevel.checkpoint()
        if not well:
            raise KeyError(value)

    system, _ = printing(disk(), odd)
    async with running(system) as a:
        await a.ask("doer", Do("print"))
        await trio.sleep(120)
        first, second = a.quarantined()
        with pytest.raises(ActorFailed):
            await a.release(first.number)
        well.append(True)
        await a.release(first.number)
        assert await a.feeds.wait("printed", 0, 10)
        await a.discard(second.number)
        assert a.quarantined() == []
        with pytest.raises(LookupError):
            await a.discard(second.number)
        await trio.sleep(60)
        assert len(a.feeds.read("printed")) == 1


@mock_trio_test
async def test_strangers_cannot_push_our_own_out_of_the_quarantine(monkeypatch: pytest.MonkeyPatch) -> None:
    from actors.kernel import tables as tables_module

    monkeypatch.setattr(tables_module, "KEPT_QUARANTINED", 5)

    class Fragile(Doer):
        def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
            raise RuntimeError("boom")

    async with running(system_on(disk(), Fragile())) as a:
        await a.post("edge", [Send("doer", Do("x"))])
        for number in range(30):
            while decode_ack(await a.deliver(frame(1, f"B/doer{number}"), "B")).have < 1:
                await trio.sleep(0.1)
        assert sorted(one.local for one in a.quarantined()) == [False] * 5 + [True]


# -- timers
@mock_trio_test
async def test_a_timer_is_never_given_up_and_comes_again_with_growing_pauses() -> None:
    tries: list[float] = []

    def ring(rows: Rows, meta: Meta) -> Step:
        tries.append(meta.now)
        if meta.now < 2000:
            raise RuntimeError("boom")
        return Step({}, [Emit("rings", Text("x"))])

    doer = Doer(wake=lambda rows, meta: Step({}, [Wake("w", meta.now + 10, Do("ring"))]), ring=ring)
    db = disk()
    async with running(system_on(db, doer)) as a:
        await a.ask("doer", Do("wake"))
        await trio.sleep(1000)
        assert len(tries) < 15
        pauses = [later - earlier for earlier, later in pairwise(tries)]
        assert pauses == sorted(pauses)
        [failing] = a.alarms.failing()
        assert (failing.actor, failing.what, failing.error) == ("doer", "timer w", "RuntimeError('boom')")
        assert failing.again > trio.current_time()
        assert a.journal.timer("doer", "w") is not None
        assert not a.quarantined()
    async with running(system_on(db, doer)) as a:
        assert await a.feeds.wait("rings", 0, 2000)
        assert a.alarms.failing() == []
        assert a.journal.next_alarm() is None


@mock_trio_test
async def test_word_of_a_lost_message_is_never_given_up() -> None:
    class Deaf(Doer):
        def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
            if isinstance(message, Undelivered) and meta.now < 500:
                raise RuntimeError("boom")
            return super().handle(rows, message, meta)

    async with running(system_on(disk(), Deaf(send=lambda rows, meta: Step({}, [Send("B/doer", Text("x"), 10)])))) as a:
        await a.ask("doer", Do("send"))
        await trio.sleep(400)
        assert len(a.alarms.failing()) == 1
        assert await a.feeds.wait("undelivered", 0, 1000)
        assert a.journal.links() == []


@mock_trio_test
async def test_a_timer_that_is_kept_is_set_where_none_is() -> None:
    doer = Doer(
        first=lambda rows, meta: Step({}, [Wake("w", 100.0, Do("ring"), keep=True)]),
        second=lambda rows, meta: Step({}, [Wake("w", 50.0, Do("ring"), keep=True)]),
        both=lambda rows, meta: Step({}, [Wake("w", None), Wake("w", 300.0, Do("ring"), keep=True)]),
        ring=lambda rows, meta: Step({}, [Emit("rings", Text(str(meta.now)))]),
    )
    async with running(system_on(disk(), doer)) as a:
        await a.ask("doer", Do("first"))
        await a.ask("doer", Do("second"))
        await trio.sleep_until(200)
        await a.ask("doer", Do("second"))
        await a.ask("doer", Do("both"))
        await trio.sleep_until(250)
        await a.ask("doer", Do("both"))
        await trio.sleep_until(400)
        assert [event.body for event in a.feeds.read("rings")] == [
            encode(Text("100.0")), encode(Text("200.0")), encode(Text("300.0"))
        ]  # fmt: skip


# -- what no journal can hold
@mock_trio_test
async def test_a_step_that_the_journal_cannot_hold_costs_one_message() -> None:
    nan, infinite = float("nan"), float("inf")
    deeds: dict[str, Deed] = {
        "nan": lambda rows, meta: Step({}, [Wake("w", nan, Do("x"))]),
        "infinite": lambda rows, meta: Step({}, [Wake("w", infinite, Do("x"))]),
        "huge": lambda rows, meta: Step({}, [Wake("w", 10**400, Do("x"))]),
        "deadline": lambda rows, meta: Step({}, [Send("B/doer", Text("x"), nan)]),
        "never": lambda rows, meta: Step({}, [Send("B/doer", Text("x"), infinite)]),
        "half": lambda rows, meta: Step({"\ud800": Text("x")}),
        "half timer": lambda rows, meta: Step({}, [Wake("\ud800", 1.0, Do("x"))]),
        "half recipient": lambda rows, meta: Step({}, [Send("B/\ud800", Text("x"))]),
        "half feed": lambda rows, meta: Step({}, [Emit("\ud800", Text("x"))]),
        "half drop": lambda rows, meta: Step({}, [DropFeed("\ud800")]),
        "far": lambda rows, meta: Step({}, [Send("B/" + "x" * 500, Text("x"))]),
        "long": lambda rows, meta: Step({"x" * 5000: Text("x")}),
        "foreign": lambda rows, meta: Step({"x": Do("not a row of mine")}),
        "fine": lambda rows, meta: Step({}, [Emit("fine", Text("x"))]),
    }
    async with running(system_on(disk(), Doer(**deeds))) as a:
        for number, deed in enumerate(deeds, 1):
            if deed != "fine":
                with pytest.raises(ActorFailed):
                    await a.ask("doer", Do(deed))
                await a.post("edge", [Send("doer", Do(deed))])
            await a.ask("doer", Do("fine"))
            assert len(a.feeds.read("fine")) == number
        for send in (Send("doer", Do("fine"), nan), Send("\ud800", Do("fine"))):
            with pytest.raises(ValueError, match=r"deadline|surrogates"):
                await a.post("edge", [send])
        await trio.sleep(60)
        assert len(a.quarantined()) == len(deeds) - 1
        assert a.journal.next_alarm() is None


@mock_trio_test
async def test_a_message_near_the_limit_gets_its_undelivered_too() -> None:
    text = "x" * (MAX_BODY_BYTES - 20)
    async with running(system_on(disk(), Doer(send=lambda rows, meta: Step({}, [Send("B/doer", Text(text), 10)])))) as a:
        await a.ask("doer", Do("send"))
        assert await a.feeds.wait("undelivered", 0, 60)
        assert a.alarms.failing() == []
        assert a.journal.links() == []
        assert len(a.quarantined()) == 0
