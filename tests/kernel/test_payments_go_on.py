"""The real wallet on the real kernel: no payment is given up for a disk, a crash or a row that went bad."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import pytest
import trio
from test_kernel_limits import Nowhere, disk
from worlds.support import mock_trio_test, tell

from actors.kernel.journal import Journal
from actors.kernel.machine import NOTHING, Meta, Rows, Send, Step
from actors.kernel.system import System
from actors.wallet.machine import Wallet
from protocol.codec import encode
from protocol.types import Undelivered
from protocol.wallet import PaidOut, PayOut, PayOutDelayed, ResumePayments, Transfer, TransferConfirmed

PLATFORM, PAYER, PAYEE = "erc20-local-tglm", "0x" + "1" * 40, "0x" + "2" * 40


class Ledger:
    """Hears what became of orders."""

    name = "ledger"
    local: Any = PaidOut | PayOutDelayed | Undelivered
    peer: Any = None
    rows: Any = None

    def __init__(self) -> None:
        self.paid: list[str] = []

    def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
        if isinstance(message, PaidOut):
            self.paid += message.order_ids
        return NOTHING


class Chain:
    """Mines what it is given, where `trouble` lets it."""

    name = "chain"
    local: Any = Transfer
    peer: Any = None

    def __init__(self, trouble: Callable[[], None] = lambda: None) -> None:
        self.trouble, self.batches = trouble, list[Transfer]()

    async def handle(self, message: Transfer, meta: Meta) -> Sequence[Send]:
        await trio.lowlevel.checkpoint()
        self.trouble()
        self.batches.append(message)
        return [Send("wallet", TransferConfirmed(message.batch_id, "0x" + "ab" * 32, 7, 21000, "0.001"))]


@asynccontextmanager
async def paying(db: sqlite3.Connection, chain: Any, ledger: Ledger) -> AsyncIterator[System]:
    numbers = count()
    journal = Journal.over(db, lambda: "epoch")
    system = System("A", journal, Nowhere(), clock=trio.current_time, new_trace=lambda: f"t{next(numbers)}")
    system.add(Wallet("A", {PLATFORM: 1.0}))
    system.add(ledger)
    system.add_port(chain)
    async with trio.open_nursery() as nursery:
        await nursery.start(system.run)
        yield system
        nursery.cancel_scope.cancel()


def order(number: int) -> PayOut:
    return PayOut(f"invoice:{number}", PLATFORM, PAYER, PAYEE, "1.5")


async def until(what: Callable[[], object], within_s: float) -> None:
    with trio.fail_after(within_s):
        while not what():
            await trio.sleep(1)


@mock_trio_test
async def test_a_database_that_is_locked_for_an_hour_costs_no_payment() -> None:
    def locked() -> None:
        if trio.current_time() < 3600:
            raise sqlite3.OperationalError("database is locked")

    ledger, chain = Ledger(), Chain(locked)
    async with paying(disk(), chain, ledger) as system:
        await tell(system, "ledger", "wallet", order(1))
        await trio.sleep(1800)
        assert any("database is locked" in why for _, _, why in system.troubles())
        await until(lambda: ledger.paid == ["invoice:1"], 3600)
        assert len(chain.batches) == 1
        assert not system.quarantined()


@mock_trio_test
async def test_a_transfer_that_was_set_aside_is_asked_for_again() -> None:
    def broken() -> None:
        if trio.current_time() < 300:
            raise KeyError("a bug")

    ledger, chain = Ledger(), Chain(broken)
    async with paying(disk(), chain, ledger) as system:
        await tell(system, "ledger", "wallet", order(1))
        await trio.sleep(100)
        assert system.quarantined()
        [(_, batch)] = system.rows("wallet").prefix("batch/")
        assert "asked for again" in batch.reason
        await until(lambda: ledger.paid == ["invoice:1"], 1200)
        assert len({transfer.batch_id for transfer in chain.batches}) == 1


@mock_trio_test
async def test_batches_under_way_are_asked_for_again_at_start() -> None:
    class Silent(Chain):
        async def handle(self, message: Transfer, meta: Meta) -> Sequence[Send]:
            await trio.lowlevel.checkpoint()
            return []  # acknowledged, and forgotten by whatever happened next

    db, ledger = disk(), Ledger()
    async with paying(db, Silent(), ledger) as system:
        await tell(system, "ledger", "wallet", order(1))
        await trio.sleep(86400)
    async with paying(db, Chain(), ledger) as system:
        await system.post("edge", [Send("wallet", ResumePayments())])
        await until(lambda: ledger.paid == ["invoice:1"], 60)


def spoil(db: sqlite3.Connection, key: str) -> bytes:
    (body,) = db.execute("select body from row where actor='wallet' and key=?", (key,)).fetchone()
    db.execute("update row set body=? where key=?", (body[:-1] + b"\xc1", key))
    return bytes(body)


@pytest.mark.parametrize("key", [f"queue/{PLATFORM}/{PAYER}/invoice:2", "order/invoice:2"])
@mock_trio_test
async def test_a_damaged_row_costs_that_row_and_not_the_platform(key: str) -> None:
    db, ledger, chain = disk(), Ledger(), Chain()
    async with paying(db, chain, ledger) as system:
        for number in (1, 2, 3):
            await tell(system, "ledger", "wallet", order(number))
    body = spoil(db, key)
    async with paying(db, chain, ledger) as system:
        await until(lambda: sorted(ledger.paid) == ["invoice:1", "invoice:3"], 60)
        assert [row[:2] for row in system.damaged()] == [("wallet", key)]
        db.execute("update row set body=? where key=?", (body, key))
        await until(lambda: len(ledger.paid) == 3, 60)
        assert system.damaged() == []


@mock_trio_test
async def test_a_cycle_whose_timer_was_lost_runs_again() -> None:
    db, ledger, chain = disk(), Ledger(), Chain()
    async with paying(db, chain, ledger) as system:
        await tell(system, "ledger", "wallet", order(1))
    assert db.execute("delete from timer").rowcount == 1
    async with paying(db, chain, ledger) as system:
        await tell(system, "ledger", "wallet", order(2))
        await until(lambda: sorted(ledger.paid) == ["invoice:1", "invoice:2"], 60)


@mock_trio_test
async def test_a_damaged_cycle_waits_for_its_repair() -> None:
    db, ledger, chain = disk(), Ledger(), Chain()
    async with paying(db, chain, ledger) as system:
        await tell(system, "ledger", "wallet", order(1))
    key = f"cycle/{PLATFORM}"
    body = spoil(db, key)
    async with paying(db, chain, ledger) as system:
        await trio.sleep(3600)
        assert ledger.paid == []
        assert [row[:2] for row in system.damaged()] == [("wallet", key)]
        assert [failing.what for failing in system.alarms.failing()] == [f"timer {key}"]
        db.execute("update row set body=? where key=?", (body, key))
        await until(lambda: ledger.paid == ["invoice:1"], 600)
        assert encode(system.rows("wallet")[f"cycle/{PLATFORM}"]) != body
