"""A stored row that cannot be read is our own damage: nobody is blamed, nothing is dropped, and the row is named."""

from __future__ import annotations

import sqlite3

import pytest
import trio
from test_kernel_limits import Do, Doer, Text, disk, frame, running, system_on
from worlds.support import mock_trio_test

from actors.kernel.journal import Journal
from actors.kernel.machine import NOTHING, ActorFailed, Emit, Meta, Rows, Step, Wake
from actors.kernel.records import RowDamaged, sealed
from actors.kernel.tables import MIGRATIONS
from protocol.codec import decode_ack, encode


class Reader(Doer):
    """Needs its row "base" for everything that a peer sends."""

    def handle(self, rows: Rows, message: object, meta: Meta) -> Step:
        if isinstance(message, Text):
            rows.get("base")
        return super().handle(rows, message, meta)


def reader() -> Reader:
    return Reader(
        keep=lambda rows, meta: Step({"base": Text("base")}),
        look=lambda rows, meta: Step({"looked": rows["base"]}),
        wake=lambda rows, meta: Step({}, [Wake("w", meta.now + 1, Do("ring"))]),
        ring=lambda rows, meta: Step({"rang": rows["base"]}, [Emit("rings", Text("x"))]),
        nothing=lambda rows, meta: NOTHING,
    )


def spoil(db: sqlite3.Connection, key: str = "base") -> None:
    assert db.execute("update row set body=x'93a4426f6f6d' where key=?", (key,)).rowcount == 1


def mend(db: sqlite3.Connection, key: str = "base") -> None:
    db.execute("update row set body=? where key=?", (sealed("doer", key, encode(Text("base"))), key))


async def damaged_disk() -> sqlite3.Connection:
    db = disk()
    async with running(system_on(db, reader())) as system:
        await system.ask("doer", Do("keep"))
    spoil(db)
    return db


@mock_trio_test
async def test_a_peers_messages_wait_for_a_damaged_row_and_nobody_is_blamed() -> None:
    db = await damaged_disk()
    async with running(system_on(db, reader())) as system:
        for _ in range(5):
            ack = decode_ack(await system.deliver(frame(1), "B"))
            assert (ack.have, ack.note) == (0, "damaged row")
        assert not system.violations
        assert not system.journal.quarantined()
        assert [row[:2] for row in system.damaged()] == [("doer", "base")]
        mend(db)
        assert decode_ack(await system.deliver(frame(1), "B")).have == 1
        assert [event.body for event in system.feeds.read("got")] == [encode(Text("1"))]
        assert system.damaged() == []


@mock_trio_test
async def test_an_edge_hears_which_row_is_damaged() -> None:
    async with running(system_on(await damaged_disk(), reader())) as system:
        with pytest.raises(ActorFailed, match="row base of doer cannot be read"):
            await system.ask("doer", Do("look"))
        with pytest.raises(RowDamaged, match="row base of doer"):
            system.rows("doer").get("base")
        with pytest.raises(RowDamaged, match="row base of doer"):
            list(system.rows("doer").prefix("b"))


@mock_trio_test
async def test_a_timer_waits_for_a_damaged_row() -> None:
    db = await damaged_disk()
    async with running(system_on(db, reader())) as system:
        await system.ask("doer", Do("wake"))
        await trio.sleep(600)
        assert system.journal.timer("doer", "w") is not None
        assert not system.journal.quarantined()
        mend(db)
        assert await system.feeds.wait("rings", 0, 7200)
        assert system.journal.timer("doer", "w") is None


@mock_trio_test
async def test_no_flipped_bit_is_read_as_a_row() -> None:
    db = disk()
    async with running(system_on(db, reader())) as system:
        await system.ask("doer", Do("keep"))
    (stored,) = db.execute("select body from row where key='base'").fetchone()
    async with running(system_on(db, reader())) as system:
        for bit in range(8 * len(stored)):
            flipped = bytearray(stored)
            flipped[bit // 8] ^= 1 << bit % 8
            db.execute("update row set body=?", (bytes(flipped),))
            with pytest.raises(RowDamaged, match="row base of doer"):
                system.rows("doer").get("base")
        db.execute("update row set body=?, key='moved'", (stored,))
        with pytest.raises(RowDamaged, match="row moved of doer"):
            system.rows("doer").get("moved")


def test_a_journal_from_before_the_checksums_is_brought_up() -> None:
    db = sqlite3.connect(":memory:", isolation_level=None)
    for script in MIGRATIONS[:2]:
        db.executescript(script)
    db.execute("pragma user_version=2")
    db.execute("insert into row values ('doer', 'base', ?)", (encode(Text("base")),))
    journal = Journal.over(db, lambda: "e" * 16)
    assert journal.row("doer", "base") == sealed("doer", "base", encode(Text("base")))
