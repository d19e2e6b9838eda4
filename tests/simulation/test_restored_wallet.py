"""A wallet whose journal goes back in time, again and again, while the chain goes on: each order is paid once.

The chain port keeps which batch an order is in. A port that knew batches alone would pay again whatever comes together
with other orders after a restore: that mutant must be caught.
"""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import pytest
import trio
from sim_scheduler import run_seeded
from sim_seeds import share

from actors.kernel.journal import Journal
from actors.kernel.machine import NOTHING, LinkDown, Meta, Rows, Send, Step
from actors.kernel.system import System
from actors.wallet.machine import Wallet
from protocol.types import Message, Undelivered
from protocol.wallet import (
    KnownBatch,
    OrdersKnown,
    PaidOut,
    PayOut,
    PayOutDelayed,
    ResumePayments,
    Transfer,
    TransferConfirmed,
    TransferFailed,
)

SEEDS, MUTANT_SEEDS = 16, 40
HASH = "0x" + "ab" * 32
PLATFORM, PAYER, PAYEE = "erc20-local-tglm", "0x" + "1" * 40, "0x" + "2" * 40


class Ledger:
    """Hears what became of orders."""

    name = "ledger"
    local: Any = PaidOut | PayOutDelayed | Undelivered
    peer: Any = None
    rows: Any = None

    def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
        return NOTHING


class Nowhere:
    """There is no other node."""

    async def exchange(self, node: str, frame: bytes) -> bytes:
        raise LinkDown("no such node")


@asynccontextmanager
async def paying(db: sqlite3.Connection, chain: Any) -> AsyncIterator[System]:
    """Run a wallet on a disk."""
    numbers = count()
    journal = Journal.over(db, lambda: f"start{next(numbers)}")
    system = System("A", journal, Nowhere(), clock=lambda: 1e9 + trio.current_time(), new_trace=lambda: f"t{next(numbers)}")
    system.add(Wallet("A", {PLATFORM: 5.0}))
    system.add(Ledger())
    system.add_port(chain)
    async with trio.open_nursery() as nursery:
        await nursery.start(system.run)
        yield system
        nursery.cancel_scope.cancel()


def disk(like: sqlite3.Connection | None = None) -> sqlite3.Connection:
    """Return an empty disk, or a copy of one."""
    made = sqlite3.connect(":memory:", isolation_level=None)
    if like is not None:
        like.backup(made)
    return made


def order(number: int) -> PayOut:
    return PayOut(f"invoice:{number}", PLATFORM, PAYER, PAYEE, "1.5")


class Chain:
    """The chain and the file of its port: both outlive the wallet's journal."""

    name = "chain"
    local: Any = Transfer
    peer: Any = None

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.batches: dict[str, Transfer] = {}
        self.failed: set[str] = set()
        self.calm = False

    def known(self, message: Transfer) -> list[Transfer]:
        """Return the other batches that pay orders of this one."""
        orders = {one for ids in message.orders for one in ids}
        return [
            batch for batch_id, batch in self.batches.items()
            if batch_id != message.batch_id and batch_id not in self.failed and orders & {o for ids in batch.orders for o in ids}
        ]  # fmt: skip

    async def handle(self, message: Transfer, meta: Meta) -> Sequence[Send]:
        await trio.sleep(self.rng.uniform(0, 3))
        if not self.calm and self.rng.random() < 0.2:
            raise self.rng.choice((sqlite3.OperationalError("database is locked"), OSError("no route"), KeyError("a bug")))
        if known := self.known(message):
            batches = tuple(KnownBatch(batch.batch_id, batch.payees, batch.orders) for batch in known)
            return [Send("wallet", OrdersKnown(message.batch_id, batches))]
        if message.batch_id not in self.batches and not self.calm and self.rng.random() < 0.1:
            self.failed.add(message.batch_id)
        self.batches.setdefault(message.batch_id, message)
        outcome: Message = TransferConfirmed(message.batch_id, HASH, 7, 21000, "0.001")
        return [Send("wallet", TransferFailed(message.batch_id, "reverted") if message.batch_id in self.failed else outcome)]

    def paid(self) -> Counter[str]:
        """Return how often each order was paid."""
        done = [batch for batch_id, batch in self.batches.items() if batch_id not in self.failed]
        return Counter(one for batch in done for ids in batch.orders for one in ids)


async def restores(seed: int, chain: Chain) -> None:
    """Draw a life of orders, backups, crashes and restores; then all is calm."""
    rng, db = chain.rng, disk()
    backups: list[sqlite3.Connection] = []
    ordered: list[int] = []

    async def live(seconds: float) -> None:
        async with paying(db, chain) as system:
            await system.post("edge", [Send("wallet", ResumePayments())])
            for number in ordered:  # as the ledger's rows, and its peers, bring them back
                await system.post("ledger", [Send("wallet", order(number))])
            end = trio.current_time() + seconds
            while trio.current_time() < end:
                if chain.calm:
                    await trio.sleep(30)
                    if len(chain.paid()) == len(ordered):
                        end = min(end, trio.current_time() + 120)  # nothing more comes of it
                    continue
                await trio.sleep(rng.uniform(0, 10))
                ordered.append(len(ordered) + 1)
                await system.post("ledger", [Send("wallet", order(ordered[-1]))])
                if rng.random() < 0.3:
                    backups.append(disk(db))

    for _ in range(6):
        await live(rng.uniform(5, 40))
        if backups and rng.random() < 0.7:
            db.close()
            db = disk(rng.choice(backups))
    chain.calm = True
    await live(8 * 3600.0)
    for one in (db, *backups):
        one.close()
    paid = chain.paid()
    assert set(paid) == {f"invoice:{number}" for number in ordered}, f"seed {seed}: not paid"
    assert max(paid.values()) == 1, f"seed {seed}: paid twice: {paid.most_common(3)}"


def simulate_restores(seed: int) -> Chain:
    """Run one seed. Raises `AssertionError`."""
    chain = Chain(random.Random(seed))
    run_seeded(seed, restores, seed, chain)
    return chain


@pytest.mark.parametrize("first", share(range(0, SEEDS, 8)))
def test_each_order_is_paid_once_whatever_the_disk_forgets(first: int) -> None:
    asked_again = 0
    for seed in range(first, first + 8):
        chain = simulate_restores(seed)
        asked_again += len(chain.failed)
    assert asked_again, "some batches fail, and their orders are paid by others"


def test_a_key_of_batches_instead_of_orders_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chain, "known", lambda self, message: [])

    def all_seeds() -> None:
        for seed in range(MUTANT_SEEDS):
            simulate_restores(seed)

    with pytest.raises(AssertionError, match="paid twice"):
        all_seeds()
