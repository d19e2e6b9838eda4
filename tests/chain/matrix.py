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
from typing import Any

from blind import FAULTS, HOSTS, Blind
from chain_support import GLM, GWEI, Lab, Payer, Refused, address_of, payer
from eth_hash.auto import keccak

from golem.chain.rows import TransferBatch
from golem.chain.signer import Key
from golem.chain.store import OrdersTaken
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
        self.strange: list[bytes] = []  # transactions of the key that are not the engine's
        self.deadly = ""
        self.told: list[str] = []
        self.life = AsyncExitStack()
        self.row: dict[str, Any] = {"depth": DEPTH}
        self.last_fault, self.clear_steps = 0, CLEAR_STEPS
        self.wallet: Payer

    async def weather(self, step: int) -> None:
        """What else happens to the chain before a step."""

    def is_over(self) -> bool:
        return len(self.settled) == len(self.owed)

    async def live(self) -> None:
        """A new process on the old disk."""
        await self.life.aclose()
        self.life = AsyncExitStack()
        urls = tuple(f"http://{host}/" for host in HOSTS[: self.case.size])
        now = self.wallet.clock.now if hasattr(self, "wallet") else 1_000_000.0
        self.wallet = await self.life.enter_async_context(
            payer(self.lab, self.key, self.db, checkpoint=self._die, transport=self.wire, rpc_urls=urls, **self.row)
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
            while steps < max(onset + BLIND_STEPS, self.last_fault):
                await self.weather(steps)
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
        for _ in range(self.clear_steps):
            if self.is_over():
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
        orders = tuple((f"{debt} {i}",) for i in range(len(self.owed[debt])))
        try:
            await self.wallet.engine.submit(TransferBatch(batch_id, self.owed[debt], orders))
        except OrdersTaken as taken:  # as the wallet does: those batches are asked for again
            for batch in taken.batches:
                await self.wallet.engine.submit(batch)

    def foreign(self) -> None:
        signed = self.lab.sign(self.key, address_of("elsewhere"), value=1, gas=21_000, fee=90 * GWEI)
        self.strange.append(signed.raw)
        with suppress(Refused):
            self.lab.call("eth_sendRawTransaction", "0x" + signed.raw.hex())

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
                assert self.batches[event.batch_id] not in self.settled, f"{self.case}: {event} was told to be paid; {self.told}"
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


MOST_LOST = 14  # blocks, from the highest there ever was


class Torn(History):
    """A case in which the chain loses blocks for good as well, deeper than `depth`, once or twice.

    What was in them is dropped, or comes back to the mempool, or a stranger sends at some moment all that was ever signed.
    Against strangers only depth helps: then what has failed is repeated when it is deeper than what is lost.
    """

    def __init__(self, lab: Lab, other_url: str, case: Case, directory: Path) -> None:
        super().__init__(lab, other_url, case, directory)
        dice = self.sky = random.Random(f"torn {case.seed}")
        first = dice.randint(0, 9)
        self.losses = [(first, first + dice.randint(DEPTH + 1, 11))]
        if dice.random() < 0.5:
            again = self.losses[0][1] + dice.randint(0, 4)
            self.losses.append((again, again + dice.randint(DEPTH + 1, 8)))
        self.stranger = {dice.randint(first, self.losses[-1][1] + 3) for _ in range(3)} if dice.random() < 0.4 else set()
        if self.stranger:
            self.row["repeat_depth"] = MOST_LOST + 2
        self.last_fault = max(self.losses[-1][1], *self.stranger, 0) + 1
        self.clear_steps = 4 * CLEAR_STEPS
        self.snapshot, self.kept, self.highest = "", 0, 0

    def head(self) -> int:
        return self.lab.number("eth_blockNumber")

    async def weather(self, step: int) -> None:
        for take, lose in self.losses:
            if step == take:
                self.snapshot, self.kept = self.lab.call("evm_snapshot"), self.head()
            if step == lose and max(self.highest, self.head()) - self.kept <= MOST_LOST:
                self.lose()
        if step in self.stranger:
            self.send(self.signed())

    def lose(self) -> None:
        self.highest = max(self.highest, self.head())
        lost = [tx for tx in self.strange if self.mined(tx)]
        lost += [raw for raw in self.signed() if self.mined(raw)]
        after = self.sky.choice(["dropped", "kept", "returned"])
        self.told.append(f"lost {self.head() - self.kept} blocks, {after}")
        assert self.lab.call("evm_revert", self.snapshot)
        if after != "kept":
            self.lab.call("anvil_dropAllTransactions")
        if after == "returned":
            self.send(lost)
        self.lab.mine(self.sky.choice([0, 0, 1, 3, 6]))

    def mined(self, raw: bytes) -> bool:
        receipt = self.lab.call("eth_getTransactionReceipt", "0x" + keccak(raw).hex())
        return receipt is not None and int(receipt["blockNumber"], 16) > self.kept

    def signed(self) -> list[bytes]:
        """All that the engine ever signed."""
        store = self.wallet.engine.store
        txs = [tx for batch_id in self.batches for tx in store.txs_of_batch(batch_id)]
        return [attempt.raw for tx in txs for attempt in store.attempts(tx.id)]

    def send(self, raws: list[bytes]) -> None:
        self.sky.shuffle(raws)
        for raw in raws:
            with suppress(Refused):
                self.lab.call("eth_sendRawTransaction", "0x" + raw.hex())

    def is_over(self) -> bool:
        engine = self.wallet.engine
        stuck = [problem for problem in engine.problems() if problem.kind != "RpcError"]  # what RPCs said is told for a while
        open_left = engine.store.open() or engine.store.queued() or stuck
        return (
            super().is_over()
            and not open_left
            and all(self.lab.tokens(payee) == wei for payees in self.owed.values() for payee, wei in payees)
        )
