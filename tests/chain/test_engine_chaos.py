"""Faults drawn from a seed while payments go on; then the faults stop, and each payee must have been paid exactly once.

The dice choose among: pay, mine, drop from the mempool, reorganise (less deep than final), raise the base fee, refuse or
lose replies, let the engine die at a checkpoint, and send from the payer's own key behind the engine's back.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from chain_support import GLM, GWEI, Faulty, Lab, Payer, Refused, address_of, devchain, payer
from worlds.support import trio_test

from golem.chain.rows import TransferBatch
from golem.chain.signer import Key
from protocol.wallet import TransferConfirmed, TransferFailed

DEPTH = 4
MOVES = 60
SEEDS = int(os.environ.get("CHAOS_SEEDS", "3"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with devchain(tmp_path_factory.mktemp("chain")) as url:
        yield Lab(url, "devchain")


class Dies(Exception):
    """The process is gone; what was on disk remains."""


class Storm:
    """One seed's run: the true debts, the engine of the moment, and the dice."""

    def __init__(self, lab: Lab, key: Key, db: Path, seed: int) -> None:
        self.lab, self.key, self.db, self.dice, self.name = lab, key, db, random.Random(seed), f"storm {seed}"
        self.wire = Faulty()
        self.deadly = ""
        self.owed: dict[str, tuple[tuple[str, int], ...]] = {}  # debt -> what it pays
        self.batches: dict[str, str] = {}  # batch id -> debt
        self.settled: dict[str, str] = {}  # debt -> the batch that confirmed it
        self.ended: dict[str, type] = {}
        self.wallet: Payer
        self.life = AsyncExitStack()

    async def live(self) -> None:
        """A new engine on the old disk; nothing in memory survives."""
        await self.life.aclose()
        self.life = AsyncExitStack()
        self.wallet = await self.life.enter_async_context(
            payer(self.lab, self.key, self.db, checkpoint=self.checkpoint, transport=self.wire, depth=DEPTH)
        )

    def checkpoint(self, point: str) -> None:
        if point == self.deadly:
            self.deadly = ""
            raise Dies

    async def step(self) -> None:
        try:
            await self.wallet.engine.step()
        except Dies:
            await self.live()
        self.wallet.clock.now += 0.15
        await self.hear()

    async def hear(self) -> None:
        events, self.wallet.events[:] = list(self.wallet.events), []
        for event in events:
            if isinstance(event, TransferConfirmed | TransferFailed):
                known = self.ended.setdefault(event.batch_id, type(event))
                assert known is type(event), f"{event.batch_id} ended as {known}, then as {event}"
            if isinstance(event, TransferConfirmed):
                debt = self.batches[event.batch_id]
                assert self.settled.setdefault(debt, event.batch_id) == event.batch_id, f"{debt} is paid twice"
            elif isinstance(event, TransferFailed) and self.batches[event.batch_id] not in self.settled:
                await self.submit(self.batches[event.batch_id])

    async def submit(self, debt: str) -> None:
        batch_id = f"{debt} #{sum(owner == debt for owner in self.batches.values())}"
        self.batches[batch_id] = debt
        await self.wallet.engine.submit(TransferBatch(batch_id, self.owed[debt]))

    async def move(self) -> None:
        """One throw of the dice."""
        what = self.dice.choices(
            ["pay", "mine", "drop", "reorg", "spike", "wire", "die", "foreign", "step"], [4, 6, 2, 2, 2, 2, 2, 1, 4]
        )[0]
        if what == "pay":
            debt = f"{self.name} debt {len(self.owed)}"
            payees = range(self.dice.choice([1, 1, 2, 5]))
            self.owed[debt] = tuple((address_of(f"{self.name} {i}"), GLM + self.dice.randrange(1000)) for i in payees)
            await self.submit(debt)
        elif what == "mine":
            self.lab.mine(self.dice.randint(1, 3))
        elif what == "drop":
            self.lab.call("anvil_dropAllTransactions")
        elif what == "reorg":
            self.lab.call("anvil_reorg", self.dice.randint(1, DEPTH - 1), [])
        elif what == "spike":
            self.lab.base_fee(self.dice.choice([1, 5, 20]) * GWEI)
        elif what == "wire":
            self.wire.plan = self.dice.choice([{}, {"*": "refuse"}, {"eth_sendRawTransaction": "lose-reply"}])
        elif what == "die":
            self.deadly = self.dice.choice(["signed", "stored", "sent", "mined"])
        elif what == "foreign":
            self.foreign()
        await self.step()

    def foreign(self) -> None:
        with suppress(Refused):  # the mempool may hold a better one with that nonce, or this very one
            self.lab.send(self.key, address_of("elsewhere"), value=1, gas=21_000, fee=self.dice.choice([3, 90]) * GWEI)

    async def settle(self) -> None:
        """The faults stop: everything must converge."""
        self.wire.plan, self.deadly = {}, ""
        self.lab.base_fee(GWEI)
        for _ in range(300):
            await self.step()
            self.lab.mine()
            if len(self.settled) == len(self.owed):
                break
        else:
            left = set(self.owed) - set(self.settled)
            raise AssertionError(f"not settled: {left}, {self.wallet.engine.problems()}, {self.wallet.engine.store.open()}")
        self.lab.mine(DEPTH)
        due: dict[str, int] = {}
        for payees in self.owed.values():
            for payee, amount_wei in payees:
                due[payee] = due.get(payee, 0) + amount_wei
        assert {payee: self.lab.tokens(payee) for payee in due} == due


@pytest.mark.parametrize("seed", range(SEEDS))
def test_each_debt_is_paid_once_whatever_happens(lab: Lab, tmp_path: Path, seed: int) -> None:
    @trio_test
    async def body(**_: Any) -> None:
        lab.call("anvil_dropAllTransactions")
        lab.base_fee(GWEI)
        storm = Storm(lab, lab.rich(f"storm {seed}"), tmp_path / "chain.db", seed)
        lab.mine(DEPTH)  # no reorganisation takes its money away
        await storm.live()
        try:
            for _ in range(MOVES):
                await storm.move()
            await storm.settle()
        finally:
            await storm.life.aclose()

    body()
