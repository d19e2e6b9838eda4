"""The system: all actors of one process on one journal, with their couriers, clock and supervision.

Edges (REST, CLI, tests) `ask` with a deadline and read committed rows and feeds; actors only tell. Transports bring
frames from other nodes to `deliver`.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import trio

from actors.kernel.actor import Actor
from actors.kernel.alarms import Alarms
from actors.kernel.answers import Answers
from actors.kernel.clock import MachineClock, Steady, read_mark
from actors.kernel.complaints import Complaints, Violators
from actors.kernel.courier import Courier
from actors.kernel.damage import DamagedRows
from actors.kernel.feed import Feeds
from actors.kernel.journal import Journal
from actors.kernel.lineage import FORK, Marks
from actors.kernel.machine import (
    MAX_DEADLINE_S,
    AskTimeout,
    Busy,
    JournalWaits,
    Machine,
    Meta,
    Port,
    Publish,
    PublishHook,
    Send,
    Step,
    Transport,
    check_send,
)
from actors.kernel.mail import CAPACITY, RETIRED, Ask, DeadlinePassed, LinkBatch, LinkBroken, Release, key_of
from actors.kernel.port import PortActor
from actors.kernel.records import Commit, MessageDamaged, Posted, RowDamaged, SetAside
from actors.kernel.row_view import RowView
from actors.kernel.supervision import supervise
from actors.kernel.trace import Line, StepLog, step_line
from protocol.codec import MAX_BODY_BYTES, MAX_TRACE_CHARS, Ack, Envelope, decode_batch, encode, encode_ack
from protocol.types import Message, PeerLost, Violation, actor_of, node_of

log = logging.getLogger("golem.kernel")

PEER_FRAMES = 16  # frames of one node that wait for one actor
TAKEN_BYTES = 64 << 20  # of frames that wait, all in all
KEPT_HEARD = 65536  # links
LINGERING = 256  # couriers with nothing to do
KEPT_OLDER = 64  # peers that spoke from older or copied journals


class System:
    """All actors of one process.

    `clock` gives seconds since the epoch, `steady` goes on evenly (`clock.py`), `new_trace` short unique ids, `jitter` factors
    around 1 for back-offs, `origin` the network address by which a node has its session;
    `crash_point` lets a simulation stop the process between any two moments that matter.
    """

    def __init__(
        self,
        node: str,
        journal: Journal,
        transport: Transport,
        *,
        clock: Callable[[], float],
        steady: Steady | None = None,
        new_trace: Callable[[], str],
        jitter: Callable[[], float] = lambda: 1.0,
        publish: PublishHook = lambda topic, message: None,
        origin: Callable[[str], str] = lambda node: "",
        step_log: StepLog | None = None,
        crash_point: Callable[[str, str], None] = lambda actor, moment: None,
        observe: Callable[[str, float, str, Step], None] = lambda actor, now, tag, step: None,
    ) -> None:
        self.node, self.journal, self.transport = node, journal, transport
        self.new_trace, self.jitter, self.crash_point, self.origin = new_trace, jitter, crash_point, origin
        self.feeds, self.clock = Feeds(journal), MachineClock(clock, steady, read_mark(journal.clock_mark()))
        journal.clock = self.now
        self._publish, self._step_log, self._observe = publish, step_log, observe
        self._sent: dict[tuple[str, str], int] = {}  # by ports and edges, not on disk yet; actors count their own
        self._taking: dict[tuple[str, str], int] = {}  # (node, actor) -> frames being taken
        self._taking_bytes = 0
        self._actors: dict[str, Actor | PortActor] = {}
        self._couriers: dict[tuple[str, str], Courier] = {}
        self._lingering: OrderedDict[Courier, None] = OrderedDict()  # in the order in which they fell idle
        self.older: OrderedDict[str, str] = OrderedDict()  # peers that spoke from older or copied journals -> what was amiss
        self._heard: set[tuple[str, str]] = set()  # links on which the recipient has acknowledged something to this process
        self._new_links: set[tuple[str, str]] = set()
        self._ask: set[tuple[str, str]] = set()  # links whose recipients are to be asked where they stand
        self._links_changed = trio.Event()
        self.alarms, self.answers = Alarms(self), Answers()
        self.violations: deque[Line] = deque(maxlen=256)
        self.counts: Counter[str] = Counter()  # violations, crashes, and restarts by actor, since the start
        self._complaints, self.violators = Complaints(), Violators()
        self.went_back: OrderedDict[str, tuple[float, str]] = OrderedDict()  # peers that remember otherwise: when, and what
        self._damaged = DamagedRows()

    # -- wiring
    def add(self, machine: Machine, capacity: int = CAPACITY) -> None:
        """Give a machine an actor. Before `run`."""
        self._actors[machine.name] = Actor(self, machine, capacity)

    def add_port(self, port: Port) -> None:
        """Give a port an address. Before `run`."""
        self._actors[port.name] = PortActor(self, port)

    def machine(self, name: str) -> Actor | None:
        """Return the actor of a machine of this process; None where it is a port, or nothing (any more)."""
        return found if isinstance(found := self._actors.get(name), Actor) else None

    def has_actor(self, address: str) -> bool:
        """Return whether `address` is an actor of this process."""
        return node_of(address) == self.node and actor_of(address) in self._actors

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled. Raises `NodeFailed` when an actor keeps crashing, `JournalError` when the disk fails."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.alarms.follow_clock)
            nursery.start_soon(self.journal.run)
            for actor in self._actors.values():
                nursery.start_soon(supervise, actor, self.counts)
            with suppress(JournalWaits):
                await self.forget_links()  # before anything is sent: a link that was silent for long begins anew
            nursery.start_soon(self.alarms.run)
            self._new_links.update(self.journal.links())
            task_status.started()
            while True:
                self._links_changed = trio.Event()
                for link in sorted(self._new_links):
                    courier = self._couriers[link] = Courier(self, *link)
                    if link in self._ask:
                        self._ask.discard(link)
                        courier.ask()
                    nursery.start_soon(self._carry, courier)
                self._new_links.clear()
                await self._links_changed.wait()

    # -- edges
    def now(self) -> float:
        """Return the time in seconds since the epoch; it goes back with steps of the machine's clock alone (see `clock.py`)."""
        return self.clock.now()

    def rows(self, actor: str) -> RowView:
        """Return the committed rows of an actor, for reading at once (not across an await)."""
        found = self._actors[actor]
        assert isinstance(found, Actor)
        return found.rows.again()

    def listed(self, actor: str, prefix: str) -> tuple[list[tuple[str, Any]], list[str]]:
        """Return (key, row) of an actor's rows whose key starts with `prefix`, and the keys of those that cannot be read.

        For lists: one damaged row does not hide the others. It is named in the log and in what waits (`damaged`). Sums are
        another matter: what is missing makes them wrong, so they read with `RowView.prefix`, which raises `RowDamaged`.
        """
        view, left_out = self.rows(actor), list[str]()
        found = list(view.readable(prefix, left_out))
        for error in view.damage:
            self.log_damaged(actor, Meta(f"{self.node}/edge", self.now(), self.new_trace()), error)
        return found, left_out

    def sound(self, actor: str, key: str) -> Any:
        """Return a row, or None where there is none or where it cannot be read (then it is named, as by `listed`)."""
        try:
            return self.rows(actor).get(key)
        except RowDamaged as error:
            self.log_damaged(actor, Meta(f"{self.node}/edge", self.now(), self.new_trace()), error)
            return None

    async def ask(self, actor: str, message: Message, timeout_s: float = 10.0, trace: str | None = None) -> Message | None:
        """Give `message` to an actor of this process and return its reply, after what it changed is on disk.

        Raises `Busy` (mailbox full, or `JournalWaits`), `AskTimeout` (the message may still be handled), `ActorFailed` (our
        bug) and `Violation` (the machine would not have such a message at all).
        """
        found = self._actors[actor]
        if self.journal.trouble:
            raise JournalWaits(self.journal.trouble)
        ask = Ask(message, self._trace(trace))
        found.offer(ask)
        with trio.move_on_after(timeout_s):
            await ask.done.wait()
        if not ask.done.is_set():
            raise AskTimeout(f"{actor} did not answer within {timeout_s:g} s (trace {ask.trace})")
        if ask.error is not None:
            raise ask.error
        return ask.reply

    def _trace(self, wanted: str | None) -> str:
        return wanted[:MAX_TRACE_CHARS] if wanted and wanted.isascii() else self.new_trace()

    async def post(self, sender: str, sends: Sequence[Send], trace: str | None = None) -> None:
        """Send durably from the address of a port (or of an edge that must not wait): news that answers nothing."""
        self.fill(commit := Commit(sender), sends, self._trace(trace))
        await self._write(commit)

    async def _write(self, commit: Commit) -> None:
        """Write what nobody can take back; it waits for a disk that takes nothing."""
        await self.journal.commit(commit, patient=True)
        self.released(commit.actor, commit, [])

    def fill(self, commit: Commit, sends: Sequence[Send], trace: str) -> None:
        """Number messages of a port and put them into a commit."""
        now = self.now()
        for send in sends:
            check_send(send)
            recipient = send.to if "/" in send.to else f"{self.node}/{send.to}"
            body = encode(send.message)
            if len(body) > MAX_BODY_BYTES:
                raise ValueError(f"a message of {len(body)} bytes is over the limit of {MAX_BODY_BYTES}")
            seq = self._advance(commit.actor, recipient)
            commit.outbox.append((recipient, Posted(seq, now + min(send.deadline_s, MAX_DEADLINE_S), trace, body)))

    def _advance(self, sender: str, recipient: str) -> int:
        if (sender, recipient) not in self._sent:
            self._sent[sender, recipient] = self.journal.last_sent(sender, recipient)
        self._sent[sender, recipient] += 1
        return self._sent[sender, recipient]

    # -- frames from other processes
    async def deliver(self, frame: bytes, peer: str) -> bytes:
        """Take a batch from the authenticated node `peer`; return the acknowledgement once it is committed.

        `peer` may also be a full address (an exe-unit on this node's bus). Raises `Violation`.
        """
        batch = decode_batch(frame)
        first = batch[0]
        if first.sender != peer and (node_of(first.sender) != peer or peer == self.node):
            raise Violation(f"{peer} sends in the name of {first.sender}")
        if node_of(first.to) != self.node:
            raise Violation(f"not for this node: {first.to}")
        actor = self._actors.get(actor_of(first.to))
        if actor is None:
            raise Violation(f"no such actor: {actor_of(first.to)[:80]}")
        if node_of(first.sender) != self.node and not actor.takes_peers:  # here, where it leaves no row behind
            raise Violation(f"{actor.name} takes no mail from other nodes")
        link, quota = LinkBatch(batch), (node_of(peer), actor.name)
        crowded = (
            bool(self.journal.trouble)
            or self._taking.get(quota, 0) >= PEER_FRAMES
            or self._taking_bytes + len(frame) > TAKEN_BYTES
        )
        if crowded or self.answers.is_full(quota[0]) or self._is_violator(quota[0]):
            return await self._busy(actor.name, link)
        try:
            actor.offer(link)
        except Busy:
            return await self._busy(actor.name, link)
        self._taking[quota] = self._taking.get(quota, 0) + 1
        self._taking_bytes += len(frame)
        try:
            await link.done.wait()
        finally:
            link.envelopes = []  # whoever left before they were taken sends them again
            self._taking_bytes -= len(frame)
            self._taking[quota] -= 1
            if not self._taking[quota]:
                del self._taking[quota]
        if link.note in (RETIRED, FORK):
            self.log_older(link.sender, batch[-1].boot, link.boots)
        return encode_ack(Ack(link.have, link.note, link.boots, link.refused))

    def _is_violator(self, node: str) -> bool:
        return node in self.violators and self.violators.waits(node, self.now())

    async def _busy(self, actor: str, link: LinkBatch) -> bytes:
        await trio.lowlevel.checkpoint()  # whoever comes again at once must not keep the others from running
        try:
            link.stand(self._actors[actor].position(link.sender))
            self._actors[actor].name_refused(link)
        except RowDamaged:
            pass  # what could not be taken is not acknowledged
        return encode_ack(Ack(link.have, "busy", link.boots, link.refused))

    async def deliver_local(self, batch: list[Envelope]) -> Ack:
        """Take a batch from an actor of this process; waits for room in the mailbox (couriers may block, actors not)."""
        link = LinkBatch(batch)
        await self._actors[actor_of(batch[0].to)].post.send(link)
        await link.done.wait()
        return Ack(link.have, link.note, link.boots, link.refused)

    def peer_up(self, node: str) -> None:
        """A session with `node` came up: whatever waits for it goes now, and it is asked where it stands."""
        for link in self.journal.links_to(node):
            if link not in self._couriers:
                self._new_links.add(link)
                self._links_changed.set()
            self._ask.add(link)
        for link, courier in self._couriers.items():
            if node_of(link[1]) == node:
                courier.hurry()
                if link in self._ask:
                    self._ask.discard(link)
                    courier.ask()

    def troubles(self) -> list[tuple[str, str, str]]:
        """Return (actor, recipient, why) of links that do not move."""
        return sorted((*link, one.trouble) for link, one in self._couriers.items() if one.trouble)

    # -- what actors and couriers report
    def released(self, actor: str, commit: Commit, published: Sequence[Publish]) -> None:
        """A commit is on disk: wake couriers, clock and readers; gossip."""
        for recipient, seq in {recipient: posted.seq for recipient, posted in commit.outbox}.items():
            if self._sent.get((actor, recipient)) == seq:  # nothing behind it is under way: the journal knows the number
                del self._sent[actor, recipient]
            if courier := self._couriers.get((actor, recipient)):
                courier.nudge()
            else:
                self._new_links.add((actor, recipient))
                self._links_changed.set()
        self.alarms.committed(commit)
        if commit.expired or commit.deferred:
            for recipient, seq in commit.expired:
                self.answers.expired(actor, recipient, seq)
            for recipient in {r for r, _ in commit.expired} | {r for r, _, _ in commit.deferred}:
                if courier := self._couriers.get((actor, recipient)):
                    courier.nudge()
        for mend in commit.relinked:
            self.answers.renumbered(actor, mend.recipient)
            if courier := self._couriers.get((actor, mend.recipient)):
                courier.restart()
        if commit.events or commit.dropped_feeds:
            for feed in {name for name, _ in commit.events}.union(commit.dropped_feeds):
                self.feeds.notify(feed)
        for gossip in published:
            self._publish(gossip.topic, gossip.message)

    def acknowledged(self, actor: str, recipient: str, seq: int, epoch: str) -> None:
        """A recipient has committed a link up to `seq`; the outbox forgets it with the next transaction."""
        self.answers.done(actor, recipient, seq)
        self.journal.acknowledge(actor, recipient, seq, epoch)

    def heard(self, actor: str, recipient: str) -> None:
        """A recipient knows this process."""
        if len(self._heard) >= KEPT_HEARD:
            self._heard.clear()
        self._heard.add((actor, recipient))

    def was_heard(self, actor: str, recipient: str) -> bool:
        """Return whether a recipient has acknowledged something to this process."""
        return (actor, recipient) in self._heard

    def queues(self) -> list[tuple[str, int, int]]:
        """Return (actor, messages in its mailbox, restarts since the start) of all actors."""
        return [(name, one.waiting(), self.counts[f"restarts/{name}"]) for name, one in sorted(self._actors.items())]

    def log_step(self, actor: str, meta: Meta, tag: str, step: Step) -> None:
        self._observe(actor, meta.now, tag, step)
        if self._step_log:
            self._step_log(step_line(actor, meta, tag, step))

    def log_violation(self, actor: str, meta: Meta, violation: Violation) -> None:
        line = Line(meta.now, meta.trace, actor, meta.sender, "", (str(violation)[:300],), "violation")
        self.violations.append(line)
        self.counts["violations"] += 1
        if node_of(meta.sender) != self.node:
            self.violators.broke(node_of(meta.sender), f"with {actor}: {violation}", meta.now)
        held = self._complaints.held_back(node_of(meta.sender), meta.now)
        if held is None:
            return
        more = f" (and {held} times before)" if held else ""
        log.warning("%s broke the protocol with %s: %s%s", meta.sender, actor, str(violation)[:300], more)
        if self._step_log:
            self._step_log(line)

    def log_crash(self, actor: str, meta: Meta, error: Exception) -> None:
        self.counts["crashes"] += 1
        log.error("%s crashed on a message from %s (trace %s)", actor, meta.sender, meta.trace, exc_info=error)
        if self._step_log:
            self._step_log(Line(meta.now, meta.trace, actor, meta.sender, "", (repr(error)[:300],), "crash"))

    def log_damaged(self, actor: str, meta: Meta, error: RowDamaged) -> None:
        """A row cannot be read: whatever needs it waits. Each row is logged once."""
        if self._damaged.is_news(error):
            log.error("%s; what needs it waits (a message from %s, trace %s)", error, meta.sender, meta.trace)
        if self._step_log:
            self._step_log(Line(meta.now, meta.trace, actor, meta.sender, "", (str(error)[:300],), "damaged"))

    def damaged(self) -> list[tuple[str, str, str]]:
        """Return (actor, key, why) of rows that something needed and that still cannot be read."""
        return self._damaged.still(lambda row: row.again(self.journal) if row.again else self.rows(row.actor).get(row.key))

    def quarantined(self) -> list[SetAside]:
        """Return the messages that crashed their actor and were set aside, without their bodies."""
        return self.journal.quarantined()

    async def release(self, number: int, timeout_s: float = 10.0) -> None:
        """Have a message of the quarantine handled after all; it leaves the quarantine if that works.

        Raises `LookupError` (no such number), `Busy`, `AskTimeout`, `Violation`, and `ActorFailed` when it fails again.
        """
        one = self.journal.set_aside(number)
        if one is None or one.actor not in self._actors:
            raise LookupError(f"no message with number {number} is in quarantine" if one is None else f"no actor {one.actor}")
        release = Release(number)
        self._actors[one.actor].offer(release)
        with trio.move_on_after(timeout_s):
            await release.done.wait()
        if not release.done.is_set():
            raise AskTimeout(f"{one.actor} did not answer within {timeout_s:g} s")
        if release.error is not None:
            raise release.error

    async def discard(self, number: int) -> None:
        """Forget a message of the quarantine. Raises `LookupError`."""
        one = self.journal.set_aside(number)
        if one is None:
            raise LookupError(f"no message with number {number} is in quarantine")
        await self.journal.commit(Commit(one.actor, released=[number]))

    def log_older(self, sender: str, boot: str, known: Marks) -> None:
        """A peer speaks from an older state of its journal, or from a copy of it: nothing of that is taken. Logged once."""
        latest = known[-1].partition(":")[2] if known else "another one"
        words = f"its start {boot} numbers messages that its start {latest} numbered before: an older or copied journal"
        if self.older.get(sender) != words:
            self.older[sender] = words
            self.older.move_to_end(sender)
            if len(self.older) > KEPT_OLDER:
                self.older.popitem(last=False)
            log.warning("%s is refused: %s", sender, words)

    def log_twice(self, recipient: str) -> None:
        log.error("%s hears another process that speaks as this node, from a copy of its journal", recipient)

    def log_broken(self, actor: str, lost: PeerLost) -> None:
        words = "this node's journal is older than what it said to %s" if lost.here else "the journal of %s went back in time"
        log.error(words + ": messages %d to %d of %s are forgotten", lost.to, lost.first, lost.last, actor)
        who = "this node forgot what it said to it" if lost.here else "it forgot what this node said to it"
        self.went_back.pop(peer := node_of(lost.to), None)
        self.went_back[peer] = self.now(), f"{who} ({actor}: messages {lost.first} to {lost.last})"
        if len(self.went_back) > KEPT_OLDER:
            self.went_back.popitem(last=False)

    async def link_broken(self, actor: str, broken: LinkBroken) -> None:
        """The sides of a link remember different things: have its sender told, and the link mended."""
        if isinstance(found := self._actors.get(actor), Actor):
            found.offer_alarm(broken)
            return
        await self._write(Commit(actor, relinked=[broken.mend]))

    async def message_lost(self, damage: MessageDamaged, epoch: str) -> None:
        """A message of the outbox cannot be read: it is given up, its sender is told, and the link goes on behind it."""
        lost = PeerLost(damage.recipient, damage.seq, damage.seq, here=True)
        if isinstance(found := self._actors.get(damage.actor), Actor):
            alarm = DeadlinePassed(damage.recipient, damage.seq, epoch)
            if not self.alarms.is_waiting(damage.actor, key_of(alarm)[0]):
                found.offer_alarm(alarm)
            return
        self.log_broken(damage.actor, lost)
        await self._write(Commit(damage.actor, expired=[(damage.recipient, damage.seq)]))

    def is_broken(self, actor: str, recipient: str) -> bool:
        """Return whether a link waits for a new numbering."""
        return (actor, recipient) in self._couriers and self._couriers[actor, recipient].is_broken

    def lingers(self, courier: Courier) -> None:
        """A courier has nothing to do: it stays for what comes next, while it is not one of too many."""
        self._lingering[courier] = None
        self._lingering.move_to_end(courier)
        if len(self._lingering) > LINGERING:
            self._lingering.popitem(last=False)[0].end()

    async def forget_links(self) -> None:
        """Forget links that have been silent for long."""
        while self._lingering:  # none of them may number or send by what it knew of a link that is forgotten
            self._lingering.popitem()[0].end()
        for link in await self.journal.forget_links(self.now()):
            if courier := self._couriers.get(link):
                courier.restart()  # nothing waits on it; whatever comes is numbered anew

    # -- tasks
    async def _carry(self, courier: Courier) -> None:
        link = (courier.actor, courier.recipient)
        try:
            await courier.run()
        finally:
            del self._couriers[link]
            self._lingering.pop(courier, None)
        if courier.was_nudged and self.journal.waits(*link, courier.acked):  # posted between the last look and now
            self._new_links.add(link)
            self._links_changed.set()
