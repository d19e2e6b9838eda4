"""SQLite lets any value stand in any column: one of another kind ends no node and no actor, and what needs it is named."""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from typing import Any

import pytest
import trio
from test_kernel_limits import Do, Doer, Text, disk, frame, running, system_on
from worlds.support import mock_trio_test

from actors.kernel.journal import Journal
from actors.kernel.machine import NOTHING, ActorFailed, Emit, Meta, Rows, Send, Step, Wake
from actors.kernel.records import Commit, JournalError, SetAside
from protocol.codec import Ack, decode_ack, decode_batch, encode, encode_ack
from protocol.types import PeerLost, Undelivered

VALUES: dict[str, Any] = {
    "text": "boom", "no text": b"\xff\xfe", "blob": b"\x93\xa4Boom", "integer": 7, "real": 0.5, "null": None, "bad text": "cast",
}  # fmt: skip
COLUMNS = [
    ("row", "body"), ("inbox", "epoch"), ("inbox", "seq"), ("inbox", "retired"), ("inbox", "boots"), ("inbox", "used"),
    ("sent", "seq"), ("sent", "epoch"), ("sent", "acked"), ("sent", "used"), ("mark", "first"),
    ("outbox", "deadline"), ("outbox", "trace"), ("outbox", "body"), ("feed", "at"), ("feed", "body"),
    ("feed_head", "seq"), ("feed_head", "at"), ("timer", "at"), ("timer", "trace"), ("timer", "body"),
    ("quarantine", "at"), ("quarantine", "sender"), ("quarantine", "trace"), ("quarantine", "error"), ("quarantine", "body"),
    ("quarantine", "epoch"), ("quarantine", "seq"), ("quarantine", "local"),
]  # fmt: skip


class Peer(Doer):
    """Hears what was lost."""

    local = Do | Undelivered | PeerLost  # type: ignore[assignment]

    def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
        if isinstance(message, PeerLost):
            return Step({}, [Emit("lost", message)])
        return super().handle(rows, message, meta)


def doer() -> Peer:
    return Peer(
        keep=lambda rows, meta: Step({"base": Text("base")}),
        look=lambda rows, meta: Step({"looked": rows.get("base") or Text("none")}),
        say=lambda rows, meta: Step({}, [Send("B/doer", Text("hello"), 60.0)]),
        wake=lambda rows, meta: Step({}, [Wake("w", meta.now + 30, Do("ring"))]),
        ring=lambda rows, meta: Step({}, [Emit("rings", Text("x"))]),
        nothing=lambda rows, meta: NOTHING,
    )


class Ears:
    """The other node: says that it has all, and keeps what it heard; or, `deaf`, nothing."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.deaf = True

    async def exchange(self, node: str, frame: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        if self.deaf:
            await trio.sleep_forever()
        batch = decode_batch(frame)
        self.heard += [e.body for e in batch if e.body]
        return encode_ack(Ack(batch[-1].seq if batch[-1].body else batch[-1].after, "", (f"1:{batch[-1].boot}",)))


async def lived() -> sqlite3.Connection:
    """Return the disk of a node that has a row, a link each way, a message under way, a timer, a feed and a quarantine."""
    db = disk()
    async with running(system_on(db, doer(), transport=Ears())) as system:
        for deed in ("keep", "wake", "say", "say"):
            await system.ask("doer", Do(deed))
        await system.deliver(frame(1), "B")
        aside = SetAside(1.0, "A/market", "e", 1, "t", "boom", encode(Text("x")), True)
        await system.journal.commit(Commit("doer", quarantined=[aside]))
    return db


def spoil(db: sqlite3.Connection, table: str, column: str, value: Any) -> None:
    """Put a value where the schema allows none, as a flipped bit does."""
    db.execute("pragma writable_schema=1")
    db.execute("update sqlite_master set sql=replace(sql, ' not null', '') where name=?", (table,))
    db.execute("pragma writable_schema=reset")
    what = "cast(x'fffe41' as text)" if value == "cast" else "?"
    assert db.execute(f"update {table} set {column}={what}", () if value == "cast" else (value,)).rowcount


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize(("table", "column"), COLUMNS)
def test_a_value_of_another_kind_ends_nobody(table: str, column: str, kind: str) -> None:
    @mock_trio_test
    async def run() -> None:
        db = await lived()
        spoil(db, table, column, VALUES[kind])
        ears = Ears()
        async with running(system_on(db, doer(), transport=ears)) as system:
            ears.deaf = False
            for seq in (1, 2, 3):
                with trio.move_on_after(5):
                    await system.deliver(frame(seq), "B")
            for deed in ("look", "say", "keep"):
                with trio.move_on_after(5):
                    with suppress(ActorFailed):  # which names the row
                        await system.ask("doer", Do(deed))
            await trio.sleep(120)
            system.feeds.read("got"), system.feeds.read_after("got", 0.0), system.quarantined(), system.journal.set_aside(1)
            system.troubles(), system.damaged(), system.alarms.failing()
            assert await system.ask("doer", Do("nothing")) is None
        assert not [one for one in system.quarantined() if one.number != 1]

    run()


@mock_trio_test
async def test_a_link_whose_position_cannot_be_read_waits_and_is_named() -> None:
    db = await lived()
    spoil(db, "inbox", "seq", None)
    async with running(system_on(db, doer())) as system:
        ack = decode_ack(await system.deliver(frame(2), "B"))
        assert (ack.have, ack.note) == (0, "damaged row")
        assert system.damaged() == [("doer", "(link from B/doer)", "NoneType stands where int belongs")]
        db.execute("update inbox set seq=1")
        assert system.damaged() == []
        assert decode_ack(await system.deliver(frame(1), "B")).have == 1
        assert not system.violations


@mock_trio_test
async def test_a_link_whose_numbering_cannot_be_read_waits_and_is_named() -> None:
    db = await lived()
    spoil(db, "sent", "seq", "boom")
    ears = Ears()
    ears.deaf = False
    async with running(system_on(db, doer(), transport=ears)) as system:
        with pytest.raises(Exception, match=r"row \(link to B/doer\) of doer cannot be read: str stands where int belongs"):
            await system.ask("doer", Do("say"))
        assert [row[:2] for row in system.damaged()] == [("doer", "(link to B/doer)")]
        assert await system.ask("doer", Do("keep")) is None


@mock_trio_test
async def test_a_message_that_cannot_be_read_is_never_sent_and_its_sender_hears_of_it() -> None:
    for body in (None, "boom", b"", 7, "flip"):
        db = await lived()
        first = "actor='doer' and seq=1"
        if body == "flip":
            (stored,) = db.execute(f"select body from outbox where {first}").fetchone()
            body = bytes([stored[0] ^ 4]) + stored[1:]
        spoil(db, "outbox", "trace", "t")  # the column's "not null" goes
        db.execute(f"update outbox set body=? where {first}", (body,))
        ears = Ears()
        ears.deaf = False
        async with running(system_on(db, doer(), transport=ears)) as system:
            await trio.sleep(20)
            assert ears.heard == [encode(Text("hello"))], "the other one came, and nothing else"
            assert [e.body for e in system.feeds.read("lost")] == [encode(PeerLost("B/doer", 1, 1, here=True))]
            assert [(peer, what) for peer, (_, what) in system.went_back.items()] == [
                ("B", "this node forgot what it said to it (doer: messages 1 to 1)")
            ]
            assert system.troubles() == []
            assert not system.feeds.read("undelivered")


def test_damaged_names_of_the_journal_are_a_refusal_that_names_them() -> None:
    db = disk()
    Journal.over(db, lambda: "e" * 16)
    db.execute("update meta set value=x'01' where key='boot'")
    with pytest.raises(JournalError, match="the journal is damaged: boot is b"):
        Journal.over(db, lambda: "e" * 16)
