"""chain.db on a bad disk: a value of another kind, a lock, a full disk. Nothing ends, nothing is signed by it, and it is said."""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from chain_support import key_of
from worlds.patience import within
from worlds.support import trio_test

from golem.chain.claims import Claim, Claims
from golem.chain.engine import Engine
from golem.chain.networks import load
from golem.chain.purse import Purses
from golem.chain.rows import Attempt, TransferBatch, TxRow
from golem.chain.rpc import Rpc
from golem.chain.schema import StoreDamaged
from golem.chain.store import Store
from golem.chain.token import Balances

PAYEE = "0x" + "aa" * 20
VALUES: dict[str, Any] = {"text": "boom", "no text": b"\xff", "integer": 7, "real": 0.5, "null": None, "bad text": "cast"}
COLUMNS = [
    *[("batch", name) for name in ("payees", "state", "reason", "announced", "refused")],
    *[("tx", name) for name in ("nonce", "kind", "batch", "recipient", "data", "gas", "total_wei", "state", "block", "winner",
                                "gas_used", "fee_wei", "reopened", "void", "sure")],
    *[("attempt", name) for name in ("raw", "max_fee", "priority_fee", "created", "head", "sends", "empty")],
    *[("claim", name) for name in ("platform", "amount_wei", "created", "not_before", "checksum")],
    *[("purse", name) for name in ("gas_wei", "token_wei", "at")],
    ("hold", "reason"), ("chain", "genesis"), ("ordered", "payee"),
]  # fmt: skip


def engine_on(path: Path) -> Engine:
    row = load("local", dev_url="http://127.0.0.1:9")
    network = next(iter(row))

    async def notify(news: Any) -> None:
        await trio.lowlevel.checkpoint()

    return Engine(network, Rpc(network), key_of("payer"), path, notify)


def lived(path: Path) -> str:
    """Leave a file with a batch that is queued, one under way, a claim and a purse; return the engine's account."""
    engine = engine_on(path)
    store = engine.store
    for name in ("first", "second"):
        store.add_batch(TransferBatch(name, ((PAYEE, 7),), ((f"order-{name}",),)))
    tx = TxRow(0, 0, "pay", "first", PAYEE, b"data", 21000, 7, "signed", 0, "", "", 0, 0)
    store.add_tx(tx, Attempt("0x" + "11" * 32, 0, b"raw", 5, 1, 1.0, 3, 0))
    store.release()
    store.bind_genesis("chain", "0xabc")
    engine.close()
    claims, purses = Claims(path), Purses(path)
    claims.add(Claim("c", "erc20-local-tglm", "0x22", PAYEE, PAYEE, 7, 0, 5.0))
    purses.note("chain", PAYEE, Balances(1, 2), 5.0)
    claims.close(), purses.close()
    return store.account


def spoil(path: Path, table: str, column: str, value: Any) -> None:
    db = sqlite3.connect(path, isolation_level=None)
    what = "cast(x'fffe' as text)" if value == "cast" else "?"
    db.execute("pragma writable_schema=1")
    db.execute("update sqlite_master set sql=replace(sql, ' not null', '') where name=?", (table,))
    db.execute("pragma writable_schema=reset")
    db.execute(f"update {table} set {column}={what}", () if value == "cast" else (value,))
    db.close()


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize(("table", "column"), COLUMNS)
@trio_test
async def test_a_value_of_another_kind_ends_no_payments_and_is_named(tmp_path: Path, table: str, column: str, kind: str) -> None:
    lived(path := tmp_path / "chain.db")
    spoil(path, table, column, VALUES[kind])
    engine = engine_on(path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        with within(20):
            while not engine.problems():  # nobody answers on the chain, at the least
                await trio.sleep(0.01)
        for name in ("first", "second", "third"):
            with suppress(sqlite3.Error):  # which makes the wallet's link wait, and say why: see `is_whim`
                await engine.submit(TransferBatch(name, ((PAYEE, 7),), ((f"order-{name}",),)))
        claims, purses = Claims(path), Purses(path)
        claims.all()
        claims.add(Claim("c", "erc20-local-tglm", "0x22", PAYEE, PAYEE, 7, 0, 5.0))
        purses.last("chain", PAYEE)
        claims.close(), purses.close()
        nursery.cancel_scope.cancel()
    engine.close()


def test_a_damaged_batch_holds_up_no_other_and_is_named(tmp_path: Path) -> None:
    account = lived(path := tmp_path / "chain.db")
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("update batch set payees='[[1' where id='second'")
    store = Store(path, account)
    store.add_batch(TransferBatch("third", ((PAYEE, 7),)))
    assert [row.batch.batch_id for row in store.queued()] == ["third"]
    assert store.damaged == {"second": "batch second in chain.db cannot be read: its payees are '[[1'"}
    with pytest.raises(StoreDamaged, match=r"batch second in chain\.db cannot be read"):
        store.batch("second")
    db.execute("update tx set total_wei='7x'")
    with pytest.raises(StoreDamaged, match=r"transaction 1 in chain\.db cannot be read: '7x' is no amount"):
        store.open()
    store.close(), db.close()


@trio_test
async def test_a_locked_file_is_waited_for_and_said(tmp_path: Path) -> None:
    lived(path := tmp_path / "chain.db")
    engine = engine_on(path)
    assert engine.store._sql.execute("pragma busy_timeout").fetchone() == (50,), "the event loop waits no longer"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("update tx set state='confirmed'")
    other.execute("update batch set state='confirmed', announced=0 where id='first'")  # news that the engine is to note as told
    other.execute("begin exclusive")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        with within(20):
            while "database is locked" not in engine.disk_trouble:
                await trio.sleep(0.01)
        assert any("database is locked" in problem.detail for problem in engine.problems())
        other.execute("commit")
        with within(60):
            while engine.disk_trouble:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    engine.close()
    other.close()
