"""A whole market in one Trio run: the real machines of three nodes on the real kernel, in a world of faults.

One requestor and two providers, each with market, negotiation, activity, ledger and wallet; an exe-unit with a disk of
its own for every activity; signer, chain and runtime in memory. Network, disks and crashes are those of `sim_world`.
Agents act through the edge alone and look at what is committed. The safety phase has faults (and may end with a long
blackout, in which agents wind up), the liveness phase has none; `sim_market_checks` then says what must hold.
"""

from __future__ import annotations

import logging
import random
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from itertools import count
from typing import Any

import sim_market_checks as checks
import trio
from sim_market_agents import ProviderAgent, RequestorAgent
from sim_world import EPOCH_S, SAFETY_S, Broken, Crash, Host, SimSystem, Wire, World
from worlds.market_world import KEYS
from worlds.money import PLATFORM
from worlds.whole_life import demand_of, offer_of

from actors.activity.machine import Activity
from actors.exeunit import ExeUnit
from actors.kernel.clock import Steady
from actors.kernel.machine import ActorFailed, AskTimeout, Busy, LinkDown, Meta, Send
from actors.kernel.records import RowDamaged
from actors.ledger.machine import Ledger
from actors.market.machine import Market
from actors.negotiation.machine import Negotiation
from actors.wallet.machine import Wallet
from golem.node.signer import SignerPort
from protocol.codec import decode_batch
from protocol.exeunit import CancelCommand, CommandFinished, Execute, UnitStarted
from protocol.market import Announced, PeerUp
from protocol.signing import node_id_of, sign
from protocol.types import Message, Violation, actor_of, address, digest
from protocol.wallet import (
    KnownBatch,
    OrdersKnown,
    Transfer,
    TransferConfirmed,
    TransferDelayed,
    TransferFailed,
    TransferMined,
    TransferRejected,
    TransferSent,
    TransferVerified,
    VerifyTransfer,
)


class PortFailed(ValueError):
    """What a bug in a port may raise."""


PORT_ERRORS = (
    OSError("no space left on device"), sqlite3.OperationalError("database is locked"), trio.TooSlowError(),
    PortFailed("a bug that is gone later"),
)  # fmt: skip
CONVERGE_S = 40 * 3600.0  # a payment that was refused by mistake is offered again only hours later
LOOK_S = 30.0


class MarketSystem(SimSystem):
    """A system in which nobody is ever found at fault: all are honest, and no machine may crash."""

    def log_violation(self, actor: str, meta: Meta, violation: Violation) -> None:
        self.host.world.broken.append(f"{self.node}/{actor} finds fault with {meta.sender}: {violation}")

    def log_crash(self, actor: str, meta: Meta, error: Exception) -> None:
        if isinstance(error, PortFailed):
            self.host.world.reached["port crashed"] += 1
        else:
            self.host.world.broken.append(f"{self.node}/{actor} crashed on a message of {meta.sender}: {error!r}")

    def log_damaged(self, actor: str, meta: Meta, error: RowDamaged) -> None:
        world = self.host.world
        world.reached["damaged row met"] += 1
        if (self.host.name, error.actor, error.key) not in world.bad_rows:
            world.broken.append(f"{self.node}/{actor} finds a row damaged that is not: {error}")
        super().log_damaged(actor, meta, error)


class ChainPort:
    """The port `chain` of one process. What was submitted is the world's; claims are forgotten with the process."""

    name = "chain"
    local: Any = Transfer | VerifyTransfer
    peer: Any = None

    def __init__(self, host: MarketHost) -> None:
        self.host, self.world = host, host.world
        self.claims: dict[str, VerifyTransfer] = {}

    async def handle(self, message: Message, meta: Meta) -> Sequence[Send]:
        await self.world.pause(1)
        self.world.may_fail(self.host.name, self.name)
        if isinstance(message, Transfer):
            if known := self.world.taken(message):
                batches = tuple(KnownBatch(batch.batch_id, batch.payees, batch.orders) for batch in known)
                return [Send("wallet", OrdersKnown(message.batch_id, batches))]
            self.world.submit(self.host.name, message)
        elif isinstance(message, VerifyTransfer) and not self.world.chance(0.2):  # or it is forgotten
            self.claims[message.claim_id] = message
        return []

    async def work(self, system: MarketSystem) -> None:
        """Move the chain on for this node's transfers and claims."""
        world = self.world
        while True:
            await trio.sleep(5.0 if world.calm else world.rng.uniform(0.5, 5))
            for batch_id, transfer in list(world.submitted.get(self.host.name, {}).items()):
                outcome = world.mine_batch(transfer)
                if isinstance(outcome, TransferDelayed | TransferSent | TransferMined):
                    await system.post("chain", [Send("wallet", outcome)])
                    continue
                sends: list[Message] = [outcome]
                if world.chance(0.3):
                    sends.append(outcome)
                await system.post("chain", [Send("wallet", send) for send in sends])
                world.submitted[self.host.name].pop(batch_id, None)  # a crash before this tells the outcome again
            for claim_id, claim in list(self.claims.items()):
                moved = world.moved(claim.tx_hash, claim.payer, claim.payee)
                enough = not world.chance(0.15) and moved - Decimal(claim.already_claimed) >= Decimal(claim.amount)
                answer = TransferVerified(claim_id, claim.tx_hash) if enough else TransferRejected(claim_id, "not enough")
                await system.post("chain", [Send("ledger", answer)])
                self.claims.pop(claim_id, None)


class Runtime:
    """The port `runtime` of an exe-unit. Commands take their time; some fail. `lost`: the process before had them."""

    name = "runtime"
    local: Any = Execute | CancelCommand
    peer: Any = None

    def __init__(self, unit: UnitHost, lost: bool) -> None:
        self.unit, self.lost = unit, lost
        self.ran: set[tuple[str, int]] = set()

    async def handle(self, message: Message, meta: Meta) -> Sequence[Send]:
        world, key = self.unit.world, (message.batch_id, message.index)  # type: ignore[attr-defined]
        world.may_fail(self.unit.provider, self.name)
        if not isinstance(message, Execute) or key in self.ran or self.lost:
            return []
        self.ran.add(key)
        if (self.unit.name, *key) in world.ran:
            raise Broken(f"{self.unit.name} runs command {key} again")
        world.ran.add((self.unit.name, *key))
        await world.pause(8)
        ok = message.refusal is None and not world.chance(0.1)
        error = None if ok else message.refusal or "it did not work"
        done = CommandFinished(*key, ok, "out", None, error, EPOCH_S + trio.current_time(), [trio.current_time(), 1.0])
        return [Send(self.unit.actor, done)]


class Signer(SignerPort):
    """The node's signer, whose key may be out of reach for a while."""

    def __init__(self, host: MarketHost) -> None:
        super().__init__(host.name, lambda kind, body: sign(host.key, kind, body))
        self.host = host

    async def handle(self, message: Any, meta: Meta) -> Sequence[Send]:
        self.host.world.may_fail(self.host.name, self.name)
        return await super().handle(message, meta)


class MarketHost(Host):
    """A node."""

    world: MarketWorld
    system: MarketSystem | None

    def __init__(self, world: MarketWorld, key: bytes) -> None:
        super().__init__(world, node_id_of(key))
        self.key = key

    async def boot(self, nursery: trio.Nursery) -> None:
        """Open the disk, start the system and its ports."""
        world, numbers = self.world, count()
        journal = self.open_journal(lambda: f"{self.name[:8]}.{self.disks}")
        system = MarketSystem(
            self.name, journal, Wire(world, self.name), clock=self.clock, steady=world.steady,
            new_trace=lambda: f"{self.name[:6]}{next(numbers)}", jitter=lambda: world.rng.uniform(0.8, 1.2),
            publish=lambda topic, message: world.gossip(self.name, message),
            crash_point=lambda actor, moment: world.may_crash(),
        )  # fmt: skip
        system.host = self
        for machine in (Market, Negotiation, Activity, Ledger):
            system.add(machine(self.name), world.faults.capacity)
        system.add(Wallet(self.name, {PLATFORM: world.cycle_s}), world.faults.capacity)
        system.add_port(Signer(self))
        chain = ChainPort(self)
        system.add_port(chain)
        await nursery.start(system.run)
        self.system, self.nursery = system, nursery
        nursery.start_soon(world.kill_sometime)
        nursery.start_soon(chain.work, system)
        await system.post("network", [Send("market", PeerUp(other), 60.0) for other in world.hosts if other != self.name])

    async def _take(self, frame: bytes, source: str, answer: list[bytes], done: trio.Event) -> None:  # type: ignore[override]
        raise AssertionError("frames go through `take`")

    async def take(self, frame: bytes, source: str) -> bytes:
        """Give a frame to the process, or over its bus to an exe-unit."""
        to = decode_batch(frame)[0].to
        if self.system is None:
            await trio.lowlevel.checkpoint()
            raise LinkDown(f"{self.name} is down")
        if actor_of(to).startswith("exeunit:"):
            unit = self.world.units.get(to)
            if unit is None:
                await trio.lowlevel.checkpoint()
                raise LinkDown(f"no such exe-unit: {to}")
            return await unit.take(frame, source)
        return await take(self, frame, source)


class UnitHost(Host):
    """An exe-unit: a process with a disk of its own, on the bus of its provider's node."""

    world: MarketWorld

    def __init__(self, world: MarketWorld, activity_id: str, provider: str, requestor: str) -> None:
        self.actor = f"exeunit:{activity_id}"
        super().__init__(world, address(provider, self.actor))
        self.activity_id, self.provider, self.requestor = activity_id, provider, requestor
        self.starts = 0

    async def exchange(self, node: str, frame: bytes) -> bytes:
        """The transport: the bus, and behind it the provider's network."""
        await self.world.pause(0.1)
        host = self.world.hosts[self.provider]
        if node == self.provider:
            return await host.take(frame, self.name)
        if host.system is None:
            raise LinkDown("the node is down")
        return await Wire(self.world, self.provider).exchange(node, frame)

    async def boot(self, nursery: trio.Nursery) -> None:
        world, numbers = self.world, count()
        journal = self.open_journal(lambda: f"unit{self.activity_id[:8]}")
        system = MarketSystem(
            self.provider, journal, self, clock=world.hosts[self.provider].clock, steady=world.steady,
            new_trace=lambda: f"{self.activity_id[:6]}{next(numbers)}", jitter=lambda: world.rng.uniform(0.8, 1.2),
            crash_point=lambda actor, moment: world.may_crash(),
        )  # fmt: skip
        system.host = self
        system.add(ExeUnit(self.activity_id, self.requestor, self.provider), world.faults.capacity)
        try:
            lost = "unit" in system.rows(self.actor)
        except RowDamaged:
            await trio.sleep(1)  # also in the calm phase: what is damaged is repaired a while later
            raise Crash from None  # as the process does
        system.add_port(Runtime(self, lost))
        self.starts += 1
        await nursery.start(system.run)
        instance = f"{self.starts}"
        while True:
            try:
                await system.ask(self.actor, UnitStarted(instance))
                break
            except (AskTimeout, Busy, ActorFailed):
                await trio.sleep(1)
        self.system, self.nursery = system, nursery
        nursery.start_soon(world.kill_sometime)

    async def take(self, frame: bytes, source: str) -> bytes:
        if self.system is None:
            await trio.lowlevel.checkpoint()
            raise LinkDown(f"{self.name} is down")
        return await take(self, frame, source)


async def take(host: Host, frame: bytes, source: str) -> bytes:
    """Give a frame to a process; a crash of it leaves the other side in silence."""
    return await Host.take(_Taker(host), frame, source)  # type: ignore[arg-type]


class _Taker:
    """What `Host.take` needs of a host, with the plain way of taking."""

    def __init__(self, host: Host) -> None:
        self.world, self.name, self.system, self.nursery = host.world, host.name, host.system, host.nursery

    async def _take(self, *args: Any) -> None:
        await Host._take(self, *args)  # type: ignore[arg-type]


class MarketWorld(World):
    """Everything outside of the processes, and the history of what happened."""

    hosts: dict[str, MarketHost]  # type: ignore[assignment]

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        rng = self.rng
        self.faults = replace(
            self.faults, lose_disk=False, crash_every_s=rng.choice((0, 15, 60)), capacity=rng.choice((4, 64, 256)),
            crash_point=rng.choice((0, 0.001, 0.004)), disk_s=rng.choice((0, 0.02, 0.2)),
        )  # fmt: skip
        self.cycle_s = rng.choice((2.0, 20.0))
        self.revert = rng.choice((0, 0.3))
        self.blackout_s = rng.choice((0, 0, 100, 1000, 4000))
        self.closing, self.pace_s = False, 10.0
        self.clock_rng = random.Random(f"clocks {seed}")  # of its own: other faults of a seed stay as they are
        self.clock_steps_every_s = self.clock_rng.choice((0, 0, 30))
        self.steady = Steady(trio.current_time, "one start") if self.clock_steps_every_s else None
        self.hosts = {}
        for key in KEYS[:3]:
            host = MarketHost(self, key)
            self.hosts[host.name] = host
        self.units: dict[str, UnitHost] = {}
        self.ports_fail_every_s = rng.choice((0, 5))
        self.failing: dict[tuple[str, str], Exception] = {}  # (node, port) -> what it raises at present
        self.bad_rows: dict[tuple[str, str, str], tuple[bytes, bytes]] = {}  # (host, actor, key) -> as it is, and as it was
        self.broken: list[str] = []
        self.ran: set[tuple[str, str, int]] = set()
        self.batches: dict[str, Transfer] = {}
        self.submitted: dict[str, dict[str, Transfer]] = {}
        self.outcomes: dict[str, TransferConfirmed | TransferFailed] = {}
        self.transfers: list[tuple[str, str, str, Decimal]] = []  # hash, payer, payee, amount
        requestor, *providers = self.hosts.values()
        self.requestor = RequestorAgent(self, requestor, demand_of)
        self.providers = [ProviderAgent(self, provider, offer_of) for provider in providers]

    # -- network
    async def part(self) -> None:
        """Cut and mend connections."""
        names = list(self.hosts)
        while self.faults.partition_every_s and not self.calm:
            await trio.sleep(self.rng.expovariate(1 / self.faults.partition_every_s))
            self.cut = set() if self.calm else {frozenset(self.rng.sample(names, 2)) for _ in range(self.rng.randrange(4))}
            self.note("cut", sorted(sorted(pair) for pair in self.cut))

    # -- faults
    def may_fail(self, node: str, port: str) -> None:
        """Raise what a port of a node fails with at present, if it does."""
        if not self.calm and (error := self.failing.get((node, port))) is not None:
            self.reached[f"port raises {type(error).__name__}"] += 1
            raise error

    async def fail_port(self, port: str) -> None:
        """Have a port fail for a while: with a whim of the world, or as a bug would, longer than a message is tried."""
        while self.ports_fail_every_s and not self.calm:
            await trio.sleep(self.rng.expovariate(1 / self.ports_fail_every_s))
            place = self.rng.choice(list(self.hosts)), port
            self.failing[place] = self.rng.choice(PORT_ERRORS)
            await trio.sleep(self.rng.uniform(0.5, 80))
            del self.failing[place]

    async def damage_rows(self) -> None:
        """Flip a bit of a row, anywhere; later it is set right again, unless it was written anew."""
        while self.faults.damage_every_s and not self.calm:
            await trio.sleep(self.rng.expovariate(3 / self.faults.damage_every_s))
            host = self.rng.choice([*self.hosts.values(), *self.units.values()])
            read = "select actor, key, body from row order by actor, key"
            found = [] if host.system is None else host.db.execute(read).fetchall()
            if self.calm or not found:
                continue
            actor, key, body = self.rng.choice(found)
            bit = self.rng.randrange(8 * len(body))
            bad = bytes([*body[: bit // 8], body[bit // 8] ^ (1 << bit % 8), *body[bit // 8 + 1 :]])
            update = "update row set body=? where actor=? and key=? and body=?"
            host.db.execute(update, (bad, actor, key, body))
            self.bad_rows[host.name, actor, key] = bad, body
            self.reached["damaged row"] += 1
            if host.nursery is not None and self.rng.random() < 0.7:  # what is in memory is not read again
                host.nursery.start_soon(self.die)
            await trio.sleep(self.rng.uniform(0, 30))
            host.db.execute(update, (body, actor, key, bad))
            del self.bad_rows[host.name, actor, key]

    def gossip(self, origin: str, message: Message) -> None:
        """Best effort: to each other node, perhaps."""
        for name in self.hosts:
            if name != origin and not self.chance(self.faults.loss) and frozenset((name, origin)) not in self.cut:
                self.nursery.start_soon(self._hear, name, origin, message)

    async def _hear(self, name: str, origin: str, message: Any) -> None:
        await self.pause(self.faults.delay_s)
        system = self.hosts[name].system
        if system is not None:
            try:
                await system.ask("market", Announced(origin, message), timeout_s=5)
            except (AskTimeout, Busy, ActorFailed):
                pass

    # -- exe-units
    def start_unit(self, activity_id: str, provider: str, requestor: str) -> UnitHost:
        """Start the process of an activity, once; it starts again when it dies."""
        name = address(provider, f"exeunit:{activity_id}")
        if name not in self.units:
            self.units[name] = unit = UnitHost(self, activity_id, provider, requestor)
            self.nursery.start_soon(unit.keep_running)
        return self.units[name]

    # -- chain
    def submit(self, node: str, transfer: Transfer) -> None:
        """Take a batch; a repeat must be the same."""
        if transfer.payer != node:
            raise Broken(f"{node} would pay from {transfer.payer}")
        if self.batches.setdefault(transfer.batch_id, transfer) != transfer:
            raise Broken(f"batch {transfer.batch_id} has two contents")
        self.submitted.setdefault(node, {})[transfer.batch_id] = transfer

    def taken(self, transfer: Transfer) -> list[Transfer]:
        """Return the other batches that paid, or may pay, orders of this one."""
        orders = {order_id for ids in transfer.orders for order_id in ids}
        return [
            other for other in self.batches.values()
            if other.payer == transfer.payer and other.batch_id != transfer.batch_id
            and not isinstance(self.outcomes.get(other.batch_id), TransferFailed)
            and orders & {order_id for ids in other.orders for order_id in ids}
        ]  # fmt: skip

    def mine_batch(self, transfer: Transfer) -> Message:
        """Say how a batch fares; once mined or failed it stays so, and pays once."""
        batch_id = transfer.batch_id
        tx_hash = "0x" + digest(batch_id)
        if batch_id not in self.outcomes:
            if self.chance(0.3):
                return TransferDelayed(batch_id, "no gas")
            if self.chance(0.3):
                return TransferSent(batch_id, tx_hash)
            if self.chance(0.2):
                return TransferMined(batch_id, tx_hash, self.rng.choice((6, 7)))  # a block may be lost
            if self.chance(self.revert):
                self.outcomes[batch_id] = TransferFailed(batch_id, "reverted")
            else:
                self.outcomes[batch_id] = TransferConfirmed(batch_id, tx_hash, 7, 21000, "0.001")
                self.transfers += [(tx_hash, transfer.payer, payee, Decimal(text)) for payee, text in transfer.payees]
            self.note("mined", batch_id)
        return self.outcomes[batch_id]

    def moved(self, tx_hash: str, payer: str, payee: str) -> Decimal:
        """Return what a transaction moved between two."""
        return sum((a for h, one, other, a in self.transfers if (h, one, other) == (tx_hash, payer, payee)), Decimal(0))

    # -- the run
    async def run(self) -> None:
        """Safety phase, liveness phase, last judgement. Raises `Broken`."""
        async with trio.open_nursery() as self.nursery:
            for host in self.hosts.values():
                self.nursery.start_soon(host.keep_running)
            for agent in (self.requestor, *self.providers):
                self.nursery.start_soon(agent.run)
            self.nursery.start_soon(self.part)
            for port in ("chain", "signer", "runtime"):
                self.nursery.start_soon(self.fail_port, port)
            self.nursery.start_soon(self.damage_rows)
            self.nursery.start_soon(self.step_clocks)
            self.nursery.start_soon(self._observe)
            await trio.sleep(SAFETY_S)
            self.closing = True
            await self._blackout()
            self.calm, self.cut = True, set()
            for host in self.hosts.values():
                host.clock_s = 0.0
            end = trio.current_time() + CONVERGE_S
            while (waits := checks.unsettled(self)) and trio.current_time() < end:
                await trio.sleep(LOOK_S)
                self._complain()
            if waits:
                raise Broken(f"did not converge: {waits[:8]}")
            await trio.sleep(20 * self.pace_s)  # the agents have nothing to say any more
            if waits := checks.unsettled(self):
                raise Broken(f"did not rest: {waits[:8]}")
            checks.check_end(self)
            self._complain()
            self.nursery.cancel_scope.cancel()

    async def step_clocks(self) -> None:
        """Set clocks forward and back by up to an hour; every second step is taken back before it counts."""
        rng = self.clock_rng
        while self.clock_steps_every_s and not self.calm:
            await trio.sleep(rng.expovariate(1 / self.clock_steps_every_s))
            host, step_s = rng.choice(list(self.hosts.values())), rng.choice((-1, 1)) * rng.choice((5, 90, 3600))
            taken_back_s = rng.choice((0, rng.uniform(1, 8)))
            if self.calm:
                return
            host.clock_s += step_s
            self.reached["clock step"] += 1
            if taken_back_s:
                await trio.sleep(taken_back_s)
                host.clock_s = 0.0 if self.calm else host.clock_s - step_s

    async def _blackout(self) -> None:
        """One node is out of reach of the others for so long that messages pass their deadlines."""
        if self.blackout_s:
            self.faults = replace(self.faults, partition_every_s=0, crash_every_s=0)
            alone, *others = self.rng.sample(list(self.hosts), len(self.hosts))
            self.pace_s = self.blackout_s / 50
            self.cut = {frozenset((alone, other)) for other in others}
            await trio.sleep(self.blackout_s)
            self.pace_s = 10.0

    async def _observe(self) -> None:
        while True:
            await trio.sleep(7)
            checks.check_always(self)

    def _complain(self) -> None:
        if self.broken:
            raise Broken(self.broken[0])

    def close(self) -> None:
        self.disks.close()


def simulate_market(seed: int) -> MarketWorld:
    """Run the market of `seed`; return its world. Raises `Broken`."""
    from sim_scheduler import run_seeded

    world = MarketWorld(seed)
    logging.getLogger("golem.kernel").setLevel(logging.CRITICAL)
    run_seeded(seed, world.run)
    return world
