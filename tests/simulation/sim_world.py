"""A world of three nodes in one Trio run: network, disks, chain and crashes, all drawn from one seed.

Each node is a `Host`: a disk (an in-memory database that outlives the process) and, while it runs, a process (a nursery
with a `System` and the clients of that node). The safety phase has faults, the liveness phase has none; `sim_checks`
then looks at what the disks hold. Nothing here repairs anything.
"""

from __future__ import annotations

import hashlib
import logging
import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations, count
from typing import Any

import sim_checks
import sim_extremes
import trio
from sim_disk import DiskFails, Disks, SimJournal
from sim_machines import (
    FIRST_BALANCE,
    FOREVER_S,
    Balance,
    Bank,
    Bomb,
    Chain,
    Desk,
    Enquire,
    MoveAlarm,
    News,
    Order,
    Pay,
    SendBomb,
    SetAlarm,
    SetAlarms,
)

from actors.kernel.machine import ActorFailed, AskTimeout, Busy, LinkDown, Publish, Send
from actors.kernel.records import Commit, JournalClosed, RowDamaged
from actors.kernel.system import System
from protocol.codec import decode_ack
from protocol.types import Message, Violation

NODES = ("A", "B", "C")
EPOCH_S = 1_700_000_000.0
SAFETY_S = 100.0
CONVERGE_S = 3000.0
SETTLED_S = SAFETY_S + 60.0  # from now on whatever was in trouble has recovered
LATE_S = 2.0
LOSING_NODE = "C"


WHIMS = (
    OSError("the chain does not answer"), sqlite3.OperationalError("database is locked"), TimeoutError(), trio.TooSlowError(),
    ExceptionGroup("several", [OSError("no route"), sqlite3.DatabaseError("malformed")]),
)  # fmt: skip


class Crash(BaseException):
    """The process dies here and now. Not an `Exception`, so that nothing in the process can catch it."""


class Broken(BaseException):
    """An observer saw what must not be. Not an `Exception`: an actor that hears of it would only crash, and start again."""


@dataclass(slots=True)
class Faults:
    """How bad the world is."""

    loss: float
    copies: float
    delay_s: float
    refusal: float  # how often a peer in a partition is refused at once, instead of silence
    crash_point: float
    crash_every_s: float
    partition_every_s: float
    disk_s: float
    hang_up: float  # how often a session breaks while a frame is being taken
    flaky_chain: float
    flaky_alarms: float
    ack_flush_s: float
    capacity: int
    lose_disk: bool
    disk_errors: float  # how often a read or a write of the disk fails
    damage_every_s: float  # rows that cannot be read for a while
    clocks_s: float  # how far apart the nodes' clocks are
    clock_steps_every_s: float
    copied: bool  # a copy of a data directory runs on another machine
    tiny: bool  # caches, pages and windows are tiny
    big: bool  # some messages just fit
    threaded: bool  # the journal is written in a thread of its own, and read on a connection of its own

    @classmethod
    def drawn(cls, rng: random.Random) -> Faults:
        lose_disk = rng.random() < 0.4
        return cls(
            loss=rng.choice((0, 0.1, 0.3)), delay_s=rng.choice((0, 0.1, 3)),
            copies=0.6 if lose_disk else rng.choice((0, 0.1, 0.4)), refusal=rng.random(),
            crash_point=rng.choice((0, 0.01, 0.03)), crash_every_s=rng.choice((0, 15, 50)),
            partition_every_s=rng.choice((0, 20)), disk_s=rng.choice((0, 0.02, 0.8)), hang_up=rng.choice((0, 0.05)),
            flaky_chain=rng.choice((0, 0.1, 0.6)), flaky_alarms=rng.choice((0, 0.4)), ack_flush_s=rng.choice((0.05, 1)),
            capacity=rng.choice((1, 4, 256)), lose_disk=lose_disk, disk_errors=rng.choice((0, 0, 0.01)),
            damage_every_s=rng.choice((0, 30)), clocks_s=rng.choice((0, 20)), clock_steps_every_s=rng.choice((0, 25)),
            copied=lose_disk and rng.random() < 0.5, tiny=rng.random() < 0.3, big=rng.random() < 0.15,
            threaded=rng.random() < 0.4,
        )  # fmt: skip


class SimSystem(System):
    """A system whose acknowledgements an observer hears of."""

    host: Host

    def acknowledged(self, actor: str, recipient: str, seq: int, epoch: str) -> None:
        known = self.host.acked
        known[actor, recipient] = max(seq, known.get((actor, recipient), 0))
        super().acknowledged(actor, recipient, seq, epoch)

    def log_twice(self, recipient: str) -> None:
        self.host.world.reached["runs twice"] += 1
        if not self.host.world.copies:
            raise Broken(f"{self.host.name} is told by {recipient} that it runs twice, and it does not")

    def released(self, actor: str, commit: Commit, published: Sequence[Publish]) -> None:
        self.host.world.may_crash()
        super().released(actor, commit, published)


class Wire:
    """The network as one node's transport sees it."""

    def __init__(self, world: World, source: str) -> None:
        self.world, self.source = world, source

    async def exchange(self, node: str, frame: bytes) -> bytes:
        """Carry a frame and its acknowledgement through the world's faults."""
        world, faults, rng = self.world, self.world.faults, self.world.rng
        world.note("frame", self.source, node, hashlib.blake2b(frame, digest_size=4).hexdigest())
        if node not in world.hosts:
            await trio.lowlevel.checkpoint()
            raise LinkDown(f"no such node: {node}")
        if frozenset((self.source, node)) in world.cut:
            if rng.random() >= faults.refusal:
                await trio.sleep(30)
            await trio.lowlevel.checkpoint()
            raise LinkDown(f"{node} is out of reach")
        try:
            return await self._carry(node, frame)
        except LinkDown:
            world.sessions.pop(frozenset((self.source, node)), None)
            raise

    async def _carry(self, node: str, frame: bytes) -> bytes:
        world, faults = self.world, self.world.faults
        epochs = world.disks_of(self.source, node)
        await world.pause(faults.delay_s)
        if world.chance(faults.loss):
            await trio.sleep(30)
        if world.disks_of(self.source, node) != epochs:  # the connection died with the process that had it
            raise LinkDown(f"{node} hung up")
        ack = await world.machine_of(node).take(frame, self.source)
        world.reached[f"ack: {decode_ack(ack).note or 'all'}"] += 1
        if world.chance(faults.copies) and decode_ack(ack).have:
            world.nursery.start_soon(world.late_copy, self.source, node, frame)
        await world.pause(faults.delay_s)
        if world.chance(faults.loss):
            await trio.sleep(30)
        return ack


@dataclass(slots=True, eq=False)
class Client:
    """What the users of one node want and saw. It outlives the node's process."""

    commands: list[tuple[float, str, Message]]
    news_at: list[tuple[float, int]]
    promised: set[str] = field(default_factory=set)
    read: dict[str, list[tuple[int, float, bytes]]] = field(default_factory=dict)
    taken: list[bytes] = field(default_factory=list)
    unsure_takes: int = 0
    news_posted: int = 0
    news_promised: set[int] = field(default_factory=set)


class Host:
    """One node: its disk, and its process while it runs."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.disks, self.starts = 1, 0
        self.db = self.new_disk()
        self.system: SimSystem | None = None
        self.nursery: trio.Nursery | None = None
        self.acked: dict[tuple[str, str], int] = {}
        self.client = Client([], [])
        self.next_disk: sqlite3.Connection | None = None  # with which the process starts after its end
        self.backups: list[sqlite3.Connection] = []
        self.restored = 0
        self.clock_s = 0.0  # how much the clock is fast

    def clock(self) -> float:
        """Return what the machine's clock says."""
        return EPOCH_S + trio.current_time() + self.clock_s

    def new_disk(self, like: sqlite3.Connection | None = None) -> sqlite3.Connection:
        """Return an empty disk, or a copy of one as it is now."""
        disk = self.world.disks.new()
        if like is not None:
            like.backup(disk)
        return disk

    def open_journal(self, new_epoch: Callable[[], str]) -> SimJournal:
        """Begin a start of the process on the disk."""
        reader = self.world.disks.reader(self.db) if self.world.faults.threaded else None
        journal = SimJournal.over(self.db, new_epoch, reader)
        journal.host = self
        self.acked = {}
        return journal

    async def keep_running(self) -> None:
        """Start the process again whenever it dies."""
        world = self.world
        while True:
            try:
                async with trio.open_nursery() as nursery:
                    try:
                        await self.boot(nursery)
                        await trio.sleep_forever()
                    finally:
                        self.system = self.nursery = None
            except* (Crash, DiskFails):
                pass
            except* JournalClosed:  # a client was still at work when the process had died
                pass
            world.crashes += 1
            world.note("crash", self.name)
            if self.next_disk is not None:
                sim_checks.check(world, final=False)
                self.db, self.next_disk = self.next_disk, None
                self.disks += 1
                await trio.sleep(10)  # longer than a frame lives
            await world.pause(15)

    async def boot(self, nursery: trio.Nursery) -> None:
        """Open the disk, start the system, let the clients in."""
        world, numbers = self.world, count()
        disk = self.disks
        self.starts += 1
        journal = self.open_journal(lambda: f"{self.name}{disk}.{self.starts}")
        journal.ack_flush_s = world.faults.ack_flush_s
        system = SimSystem(
            self.name, journal, Wire(world, self.name), clock=self.clock,
            new_trace=lambda: f"{self.name}{next(numbers)}", jitter=lambda: world.rng.uniform(0.8, 1.2),
            crash_point=lambda actor, moment: world.may_crash(),
        )  # fmt: skip
        system.host = self
        system.add(Bank(self.name, world.hit), world.faults.capacity)
        system.add(Desk(self.name, disk), world.faults.capacity)
        system.add_port(Chain(lambda nonce, id: world.mine(self.name, nonce, id)))
        await nursery.start(system.run)
        self.system, self.nursery = system, nursery
        nursery.start_soon(world.kill_sometime)
        client = self.client
        for offset in range(2):
            nursery.start_soon(self.command, system, [c for i, c in enumerate(client.commands) if i % 2 == offset])
        nursery.start_soon(self.post_news, system, nursery)
        nursery.start_soon(self.read_by_number, system, "coins")
        nursery.start_soon(self.read_by_time, system, "rings")
        for _ in range(2):
            nursery.start_soon(self.take_jobs, system)
        nursery.start_soon(self.look_at_books, system)

    async def take(self, frame: bytes, source: str) -> bytes:
        """Give a frame to the process, if there is one; a crash of it leaves the other side in silence."""
        if self.system is None or self.nursery is None:
            await trio.lowlevel.checkpoint()
            raise LinkDown(f"{self.name} is down")
        answer: list[bytes] = []
        done = trio.Event()
        self.nursery.start_soon(self._take, self.system, frame, source, answer, done)
        await done.wait()
        if not answer:
            raise LinkDown("the session broke")
        return answer[0]

    async def _take(self, system: SimSystem, frame: bytes, source: str, answer: list[bytes], done: trio.Event) -> None:
        world = self.world
        patience_s = world.rng.uniform(0, 1) if world.chance(world.faults.hang_up) else FOREVER_S
        with trio.move_on_after(patience_s):
            try:
                answer.append(await system.deliver(frame, source))
            except Violation as violation:
                raise Broken(f"{self.name} finds fault with {source}: {violation}") from violation
        done.set()

    # -- clients of the node
    async def command(self, system: SimSystem, commands: Sequence[tuple[float, str, Message]]) -> None:
        """Give each command until it is answered, then the next."""
        world = self.world
        for at, actor, message in commands:
            name = f"{actor}/{message.id}"  # type: ignore[attr-defined]
            if name in self.client.promised:
                continue
            await trio.sleep_until(at)
            while True:
                try:
                    reply = await system.ask(actor, message, timeout_s=world.rng.choice((0.1, 10)))
                    break
                except (ActorFailed, AskTimeout, Busy) as error:  # the disk fails, a row cannot be read: all passes
                    if trio.current_time() > world.settled_s and not isinstance(error, Busy):
                        raise Broken(f"{name} is not answered in the calm phase: {error}") from error
                    await trio.sleep(1)
            world.note("answer", self.name, name, type(reply).__name__)
            self.client.promised.add(name)

    async def post_news(self, system: SimSystem, nursery: trio.Nursery) -> None:
        """Post from the chain port's address; each number once, whether or not it is known to have left."""
        client = self.client
        for at, number in client.news_at:
            if number <= client.news_posted:
                continue
            await trio.sleep_until(at)
            client.news_posted = number
            nursery.start_soon(self._post, system, number)
            if number % 3 == 0:
                await trio.lowlevel.checkpoint()

    async def _post(self, system: SimSystem, number: int) -> None:
        with trio.move_on_after(self.world.rng.choice((0.01, 10))):
            await system.post("chain", [Send("bank", News(number), FOREVER_S)])
            self.client.news_promised.add(number)

    async def read_by_number(self, system: SimSystem, feed: str) -> None:
        """Follow a feed by sequence number."""
        seen = self.client.read.setdefault(feed, [])
        while True:
            after = seen[-1][0] if seen else 0
            if await system.feeds.wait(feed, after, 60):
                news = system.feeds.read(feed, after, 3)
                for event in news:
                    self.world.on_time(event.at, f"{self.name}'s reader of {feed}")
                seen += [(e.seq, e.at, e.body) for e in news]

    async def read_by_time(self, system: SimSystem, feed: str) -> None:
        """Follow a feed by time."""
        seen = self.client.read.setdefault(feed, [])
        while True:
            await trio.sleep(10)
            after = seen[-1][1] if seen else 0.0
            seen += [(e.seq, e.at, e.body) for e in system.feeds.read_after(feed, after, 200)]

    async def look_at_books(self, system: SimSystem) -> None:
        """Look at rows and a feed at once, as REST does: what is seen is all of a step, or nothing of it."""
        while True:
            await trio.sleep(self.world.rng.uniform(0, 6))
            try:
                view = system.rows("bank")
                got, out = [row for _, row in view.prefix("in/")], [row for _, row in view.prefix("out/")]
                balance = view.get("balance", Balance()).coins
                events = len(system.feeds.read("coins", 0, 1000))
            except RowDamaged:
                continue
            ought = FIRST_BALANCE + sum(one.coins * one.times for one in got) - sum(one.coins for one in out)
            if balance != ought or events != sum(one.times for one in got):
                raise Broken(f"{self.name}'s books show half of a step: {balance} coins, {ought} by {len(got)} and {len(out)}")

    async def take_jobs(self, system: SimSystem) -> None:
        """Take events that are handed out once, with little patience."""
        while True:
            await system.feeds.wait("jobs", 0, 60)
            self.client.unsure_takes += 1  # a crash in here may lose what it deleted: the taker died with the node
            with trio.move_on_after(self.world.rng.choice((0.01, 5))):
                with suppress(Busy):  # a disk that takes nothing hands nothing out: it comes again
                    self.client.taken += [e.body for e in await system.feeds.take("jobs", 2)]
            self.client.unsure_takes -= not system.journal.ended
            await trio.sleep(1)


async def _come_up(system: SimSystem, node: str) -> None:
    """A session to `node` is there: a process of its own node, which a disk that cannot be read ends."""
    system.peer_up(node)


class World:
    """Everything outside of the nodes, and the history of what happened."""

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.faults = Faults.drawn(self.rng)
        self.disks = Disks(self.faults.threaded)
        self.calm = False
        self.settled_s = SETTLED_S
        self.cut: set[frozenset[str]] = set()
        self.sessions: dict[frozenset[str], tuple[int, ...]] = {}
        self.chain: dict[tuple[str, int], str] = {}
        self.crashes = self.copies = 0
        self.twin: Host | None = None  # a second machine with the disk of the losing node
        self.attempts: Counter[str] = Counter()  # at what crashed whoever touched it
        self.reached: Counter[str] = Counter()  # states of the kernel
        self.repeats: Counter[str] = Counter()  # answers that waited on a disk of which there was a copy -> how many
        self.history = hashlib.blake2b(digest_size=8)
        self.hosts: dict[str, Host] = {}
        for name in NODES:
            self.hosts[name] = Host(self, name)
        for name in NODES:
            self.hosts[name].client = self.draw_client(name)

    # -- drawing
    def draw_client(self, name: str) -> Client:
        rng, faults = self.rng, self.faults
        lossy = faults.lose_disk
        numbers = count()
        commands: list[tuple[float, str, Message]] = []

        def at() -> float:
            return rng.uniform(0, SAFETY_S * 0.8)

        def id(kind: str) -> str:
            return f"{name}-{kind}{next(numbers):03}"

        if not (lossy and name == LOSING_NODE):
            others = [n for n in NODES if n != name and not (lossy and n == LOSING_NODE)]
            for _ in range(rng.randrange(3, 11)):
                to = rng.choice(others) if rng.random() < 0.95 else "X"
                deadline_s = rng.choice((FOREVER_S, rng.uniform(0.1, 4), rng.uniform(0.1, 40))) if to != "X" else 20.0
                memo = rng.choice((0, sim_extremes.BIG_MEMO)) if faults.big else 0
                self.reached["big message"] += memo > 0
                commands.append((at(), "bank", Pay(id("pay"), to, rng.randrange(1, 50), deadline_s, memo)))
            commands += [(at(), "bank", Order(id("order"))) for _ in range(rng.randrange(5))]
            commands += [(at(), "bank", Order(id("poison"))) for _ in range(rng.random() < 0.3)]
            commands += [(at(), "bank", SendBomb(id("bomb"), rng.choice(others))) for _ in range(rng.randrange(2))]
            for _ in range(2):  # in the calm phase, when everything must be on time
                commands.append((SETTLED_S + at(), "bank", Pay(id("pay"), rng.choice(others), 1, FOREVER_S)))
                commands.append((SETTLED_S + at(), "bank", SetAlarm(id("alarm"), rng.uniform(0, 60))))
            if rng.random() < 0.1:  # more of them due at once than are looked at
                commands.append((at(), "bank", SetAlarms(id("alarms"), rng.randrange(300, 700), rng.uniform(0, 60))))
            for _ in range(rng.randrange(5)):
                alarm = id("alarm")
                start = at()
                commands.append((start, "bank", SetAlarm(alarm, rng.uniform(0, 60))))
                if rng.random() < 0.6:
                    after_s = rng.choice((None, rng.uniform(0, 60)))
                    commands.append((start + rng.uniform(0, 60), "bank", MoveAlarm(id("move"), alarm, after_s)))
            for _ in range(30 if faults.copied else 9 if lossy else rng.randrange(1, 4)):
                when = rng.randrange(1, 4) * 25.0 if rng.random() < 0.7 else at()  # bursts make desks busy
                to = LOSING_NODE if lossy and rng.random() < 0.7 else rng.choice(others)
                commands.append((when, "desk", Enquire(id("ask"), to)))
        commands.sort(key=lambda command: command[0])
        news_at = sorted([at()] * rng.randrange(5) + [at()] * rng.randrange(5))
        return Client(commands, [(t, number) for number, t in enumerate(news_at, 1)])

    def chance(self, probability: float) -> bool:
        return not self.calm and self.rng.random() < probability

    async def pause(self, longest_s: float) -> None:
        await trio.sleep(0 if self.calm or not longest_s else self.rng.uniform(0, longest_s))

    def note(self, *what: Any) -> None:
        self.history.update(repr((round(trio.current_time(), 6), *what)).encode())

    def disks_of(self, *names: str) -> tuple[int, ...]:
        return tuple(self.hosts[name].disks for name in names)

    def machine_of(self, node: str) -> Host:
        """Return the machine that a frame to a node comes to."""
        is_other = self.twin is not None and self.twin.name == node and self.rng.random() < 0.5
        return self.twin if is_other and self.twin is not None else self.hosts[node]

    # -- faults
    def may_crash(self) -> None:
        """Die here, sometimes."""
        if self.chance(self.faults.crash_point):
            raise Crash

    async def kill_sometime(self) -> None:
        """Die at an arbitrary await of whoever is awaiting something."""
        if not self.faults.crash_every_s or self.calm:
            return
        await trio.sleep(self.rng.expovariate(1 / self.faults.crash_every_s))
        if not self.calm:
            raise Crash

    async def keep_sessions(self) -> None:
        """Tell both sides when a session between them comes up."""
        pairs = [frozenset(pair) for pair in combinations(NODES, 2)]
        while True:
            await trio.sleep(5)
            for pair in pairs:
                hosts = [self.hosts[name] for name in sorted(pair)]
                ends = tuple(host.starts for host in hosts)
                if pair in self.cut or not all(host.system and host.nursery for host in hosts):
                    self.sessions.pop(pair, None)
                elif self.sessions.get(pair) != ends:
                    self.sessions[pair] = ends
                    for host, other in (hosts, hosts[::-1]):
                        if host.system is not None and host.nursery is not None:
                            host.nursery.start_soon(_come_up, host.system, other.name)

    async def step_clocks(self) -> None:
        """Set clocks, forward and back; in the calm phase all are right again."""
        for host in self.hosts.values():
            host.clock_s = self.rng.uniform(-1, 1) * self.faults.clocks_s
        while self.faults.clock_steps_every_s and not self.calm:
            await trio.sleep(self.rng.expovariate(1 / self.faults.clock_steps_every_s))
            if not self.calm:
                self.read_clocks()
                self.rng.choice(list(self.hosts.values())).clock_s += self.rng.uniform(-20, 20)
                self.reached["clock step"] += 1

    def read_clocks(self) -> None:
        """Note the latest time that was ever told: a process whose clock is set back stands still until it is that late."""
        told = trio.current_time() + max(host.clock_s for host in self.hosts.values())
        self.settled_s = max(self.settled_s, told + 10)

    async def damage_rows(self) -> None:
        """Make a row unreadable for a while."""
        while self.faults.damage_every_s and not (self.calm or self.faults.lose_disk):  # observers read when a disk is lost
            await trio.sleep(self.rng.expovariate(1 / self.faults.damage_every_s))
            host = self.rng.choice(list(self.hosts.values()))
            db = host.db
            found = [] if host.system is None else db.execute("select actor, key, body from row order by actor, key").fetchall()
            if self.calm or not found:
                continue
            actor, key, body = self.rng.choice(found)
            bad = body[:-1] + bytes([body[-1] ^ 1])
            update = "update row set body=? where actor=? and key=? and body=?"
            db.execute(update, (bad, actor, key, body))
            self.reached["damaged row"] += 1
            await trio.sleep(self.rng.uniform(0, 15))
            db.execute(update, (body, actor, key, bad))  # unless it was written anew

    async def part(self) -> None:
        """Cut and mend connections."""
        while self.faults.partition_every_s and not self.calm:
            await trio.sleep(self.rng.expovariate(1 / self.faults.partition_every_s))
            self.cut = set() if self.calm else {frozenset(self.rng.sample(NODES, 2)) for _ in range(self.rng.randrange(4))}
            self.note("cut", sorted(sorted(pair) for pair in self.cut))

    async def burn_disks(self) -> None:
        """Take the disk from the node that is meant to bear it, once or few times; the next one is empty, or older."""
        host = self.hosts[LOSING_NODE]
        while self.faults.lose_disk and not self.calm:
            for _ in range(3):
                await trio.sleep(self.rng.uniform(3, 13))
                host.backups.append(host.new_disk(host.db))
            if host.nursery and not self.calm:
                older = self.rng.choice((None, *host.backups))
                host.next_disk = host.new_disk(older)
                host.restored += older is not None
                self.repeats.update(sim_checks.waiting_answers(host.next_disk))
                host.nursery.start_soon(self.die)

    async def die(self) -> None:
        """End whatever process this task is of."""
        await trio.lowlevel.checkpoint()
        raise Crash

    async def late_copy(self, source: str, node: str, frame: bytes) -> None:
        """Deliver a frame that was delivered before, much later: copies overtake and are overtaken."""
        disk = self.disks_of(node)
        await trio.sleep(self.rng.expovariate(1 / 20))
        if self.disks_of(node) == disk:
            try:
                await self.hosts[node].take(frame, source)
            except LinkDown:
                pass

    async def mine(self, node: str, nonce: int, id: str) -> None:
        """The chain: a second transfer with a nonce must be the first one again."""
        await self.pause(3)
        if "poison" in id:
            self.attempts[id] += 1
            raise ValueError(f"nobody can mine {id}")
        if self.chance(self.faults.flaky_chain):
            self.reached["whim"] += 1
            raise self.rng.choice(WHIMS)
        if self.chain.setdefault((node, nonce), id) != id:
            raise Broken(f"{node} used nonce {nonce} for {self.chain[node, nonce]} and for {id}")
        await self.pause(3)

    def hit(self, message: Message) -> None:
        """Raise as a bug would: always for a bomb, now and then for an alarm."""
        if isinstance(message, Bomb):
            self.attempts[message.id] += 1
            raise RuntimeError(f"bomb {message.id}")
        if self.chance(self.faults.flaky_alarms):
            self.reached["failed alarm"] += 1
            raise RuntimeError("an alarm that fails for a while")

    def on_time(self, at: float, *what: object, now: float | None = None) -> None:
        """Nothing is late in the calm phase: `at`, in seconds since the epoch, is when it could have happened."""
        late_s = (EPOCH_S + trio.current_time() if now is None else now) - at
        if at > EPOCH_S + self.settled_s and late_s > LATE_S:
            raise Broken(f"{' '.join(map(str, what))} is {late_s:.1f} s late")

    # -- the run
    async def run(self) -> None:
        """Safety phase, liveness phase, last judgement. Raises `Broken`."""
        async with trio.open_nursery() as self.nursery:
            for host in self.hosts.values():
                self.nursery.start_soon(host.keep_running)
            self.nursery.start_soon(self.part)
            self.nursery.start_soon(self.keep_sessions)
            self.nursery.start_soon(self.burn_disks)
            self.nursery.start_soon(sim_extremes.run_twice, self, LOSING_NODE)
            self.nursery.start_soon(self.step_clocks)
            self.nursery.start_soon(self.damage_rows)
            await trio.sleep(SAFETY_S)
            self.calm, self.cut = True, set()
            self.read_clocks()
            for host in self.hosts.values():
                host.clock_s = 0.0
            end = trio.current_time() + CONVERGE_S
            while (waits := sim_checks.unsettled(self)) and trio.current_time() < end:
                await trio.sleep(20)
            if waits:
                raise Broken(f"did not converge: {waits}")
            await trio.sleep(120)  # readers catch up, late copies come
            sim_checks.check(self, final=True)
            self.nursery.cancel_scope.cancel()


def simulate(seed: int) -> World:
    """Run the world of `seed`; return it with its history. Raises `Broken`."""
    from sim_scheduler import run_seeded

    world = World(seed)
    logging.getLogger("golem.kernel").setLevel(logging.CRITICAL)
    try:
        with sim_extremes.bounds(world):
            run_seeded(seed, world.run)
    finally:
        world.disks.close()
    return world
