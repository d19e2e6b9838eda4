"""Histories of blind RPCs: which of a pool are blind, in which way, from when to when, and what else happens meanwhile.

Each is drawn from a seed. The payee's balance on the true chain is the judge, at every step: never more than is owed; and
all of it within a bounded number of steps after the last fault.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from blind import FAULTS, HOSTS, Blind
from chain_support import GLM, GWEI, Lab, Payer, Refused, address_of, payer

from golem.chain.signer import Key
from golem.chain.store import TransferBatch
from protocol.wallet import TransferConfirmed, TransferFailed

BLIND_STEPS = 9  # with the fault; a nonce was given up after three looks once
CLEAR_STEPS = 40  # after the last fault, until all must be settled
DEPTH = 2


class PaidTwice(AssertionError):
    """A payee holds more than he was owed."""


class NotPaid(AssertionError):
    """A debt is open long after the last fault."""


@dataclass(frozen=True)
class Case:
    """`blind`: the fault of each blind RPC, by its place in a pool of `size`."""

    size: int
    blind: tuple[tuple[int, str], ...]
    seed: int

    def __str__(self) -> str:
        return f"{self.size} RPCs, " + ", ".join(f"{HOSTS[i]} {fault}" for i, fault in self.blind) + f", seed {self.seed}"


def subsets(size: int) -> Iterator[tuple[int, ...]]:
    for count in range(1, size + 1):
        yield from itertools.combinations(range(size), count)


def cases(size: int, seed: int) -> list[Case]:
    """Every subset of a pool, with every fault: alike on all that are blind; and as often a mixture. But for a fork on all
    of them: then nobody is left who knows better."""
    dice = random.Random(seed)
    found = []
    for subset in subsets(size):
        for fault in FAULTS:
            found.append(Case(size, tuple((place, fault) for place in subset), dice.randrange(10**9)))
            if len(subset) > 1:
                mixture = tuple((place, dice.choice(FAULTS)) for place in subset)
                found.append(Case(size, mixture, dice.randrange(10**9)))
    return [case for case in found if [fault for _, fault in case.blind] != ["fork"] * size]


class Dies(Exception):
    """The process is gone; what was on disk remains."""


class History:
    """One case, run on a chain that others use as well."""

    def __init__(self, lab: Lab, other_url: str, case: Case, directory: Path) -> None:
        self.lab, self.case, self.dice = lab, case, random.Random(case.seed)
        self.name = f"{case} {directory.name}"
        self.key: Key = lab.rich(self.name)
        self.db = directory / f"{case.seed}.db"
        self.wire = Blind(lab.url, self.key, case.seed, other_url)
        self.owed: dict[str, tuple[tuple[str, int], ...]] = {}
        self.batches: dict[str, str] = {}
        self.settled: set[str] = set()
        self.deadly = ""
        self.told: list[str] = []
        self.life = AsyncExitStack()
        self.wallet: Payer

    async def live(self) -> None:
        """A new process on the old disk."""
        await self.life.aclose()
        self.life = AsyncExitStack()
        urls = tuple(f"http://{host}/" for host in HOSTS[: self.case.size])
        now = self.wallet.clock.now if hasattr(self, "wallet") else 1_000_000.0
        self.wallet = await self.life.enter_async_context(
            payer(self.lab, self.key, self.db, checkpoint=self._die, transport=self.wire, rpc_urls=urls, depth=DEPTH)
        )
        self.wallet.clock.now = now

    def _die(self, point: str) -> None:
        if point == self.deadly:
            self.deadly = ""
            raise Dies

    async def run(self) -> None:
        await self.live()
        try:
            onset, steps = self.dice.randint(0, 3), 0
            deaths = {self.dice.randrange(BLIND_STEPS) for _ in range(2)}
            foreign = self.dice.randrange(BLIND_STEPS * 4)
            await self.owe(1)
            while steps < onset + BLIND_STEPS:
                if steps == onset:
                    for place, fault in self.case.blind:
                        await self.wire.set(HOSTS[place], fault)
                if steps == onset + 1:
                    await self.owe(self.dice.choice([1, 1, 2]))
                if steps in deaths:
                    self.deadly = self.dice.choice(["signed", "stored", "sent", "mined"])
                if steps == foreign:
                    self.foreign()
                await self.step()
                steps += 1
            for place, _ in self.case.blind:
                await self.wire.set(HOSTS[place], "")
            self.deadly = ""
            await self.settle()
        finally:
            await self.life.aclose()

    async def settle(self) -> None:
        for _ in range(CLEAR_STEPS):
            if len(self.settled) == len(self.owed):
                self.judge(exactly=True)
                return
            await self.step()
        store, left = self.wallet.engine.store, set(self.owed) - self.settled
        raise NotPaid(f"{self.case}: {left} open; {self.wallet.engine.problems()}, {store.open()}, {store.queued()}; {self.told}")

    async def owe(self, payees: int) -> None:
        debt = f"debt {len(self.owed)}"
        self.owed[debt] = tuple((address_of(f"{self.name} {debt} {i}"), GLM + i) for i in range(payees))
        await self.submit(debt)

    async def submit(self, debt: str) -> None:
        batch_id = f"{debt} #{sum(owner == debt for owner in self.batches.values())}"
        self.batches[batch_id] = debt
        await self.wallet.engine.submit(TransferBatch(batch_id, self.owed[debt]))

    def foreign(self) -> None:
        with suppress(Refused):
            self.lab.send(self.key, address_of("elsewhere"), value=1, gas=21_000, fee=90 * GWEI)

    async def step(self) -> None:
        try:
            await self.wallet.engine.step()
        except Dies:
            self.told.append("died")
            await self.live()
        self.lab.mine()
        self.wallet.clock.now += 0.15
        events, self.wallet.events[:] = list(self.wallet.events), []
        for event in events:
            self.told.append(type(event).__name__)
            if isinstance(event, TransferConfirmed):
                self.settled.add(self.batches[event.batch_id])
            elif isinstance(event, TransferFailed):
                await self.submit(self.batches[event.batch_id])
        self.judge()

    def judge(self, exactly: bool = False) -> None:
        for debt, payees in self.owed.items():
            for payee, amount_wei in payees:
                held = self.lab.tokens(payee)
                if held > amount_wei:
                    raise PaidTwice(f"{self.case}: {debt} of {amount_wei} wei, paid {held}; {self.told}")
                if exactly and held != amount_wei:
                    raise NotPaid(f"{self.case}: {debt} is called paid, and its payee holds {held} of {amount_wei} wei")
