"""A port's actor: mailbox, link position and durable answers around an async handler of the outside world."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Union

import trio

from actors.kernel.journal import Commit, JournalError
from actors.kernel.lineage import Position
from actors.kernel.machine import ActorFailed, Busy, Meta, Port
from actors.kernel.mailbox import CAPACITY, RETIRED, Ask, CrashedOn, Crashes, Delivery, LinkBatch
from protocol.codec import Decoder, Envelope
from protocol.types import Message, Violation, node_of

if TYPE_CHECKING:
    from actors.kernel.system import System


class PortActor:
    """Serves a port's mailbox one message at a time. A message may come again after a crash: ports are idempotent."""

    def __init__(self, system: System, port: Port, capacity: int = CAPACITY) -> None:
        self.system, self.port, self.name = system, port, port.name
        self.post, self._mailbox = trio.open_memory_channel[Delivery](capacity)
        self.takes_peers = port.peer is not None
        self._decode_local: Callable[[bytes], Message] = Decoder(Union[port.local, port.peer, None])  # noqa: UP007
        self._decode_peer: Callable[[bytes], Message] = Decoder(Union[port.peer, None])  # noqa: UP007
        self._crashes = Crashes()

    def offer(self, delivery: Delivery) -> None:
        """Put a delivery into the mailbox now. Raises `Busy` when it is full."""
        try:
            self.post.send_nowait(delivery)
        except trio.WouldBlock:
            raise Busy(f"the mailbox of {self.name} is full") from None

    async def run(self) -> None:
        """Serve the mailbox. Raises `CrashedOn` when the port's handler crashed."""
        while True:
            delivery = await self._mailbox.receive()
            if isinstance(delivery, LinkBatch) and delivery.envelopes:
                await self._take_link(delivery)
            elif isinstance(delivery, Ask):
                await self._take_ask(delivery)

    async def _take_ask(self, ask: Ask) -> None:
        meta = Meta(f"{self.system.node}/edge", self.system.now(), ask.trace)
        try:
            sends = await self.port.handle(ask.message, meta)
            await self.system.post(self.name, sends, ask.trace)
        except JournalError:
            raise
        except Exception as error:  # an edge's message is tried once: the edge hears of it
            self.system.log_crash(self.name, meta, error)
            ask.error = ActorFailed(f"{self.name} failed (trace {ask.trace}): {error}")
        finally:
            ask.done.set()

    async def _take_link(self, link: LinkBatch) -> None:
        position = self.system.journal.position(self.name, link.sender)
        try:
            if position.is_retired(link.epoch):
                link.note = RETIRED
                return
            position = position.under(link.epoch)
            for e in link.envelopes:
                if e.seq < position.seq:
                    continue
                if note := position.objection(e):
                    link.note = note
                    return
                if e.seq == position.seq or not e.body:  # known already; or a question where we stand
                    continue
                position = position.behind(e)
                await self._take_envelope(e, position)
        except CrashedOn:
            link.note = "crash"
            raise
        finally:
            link.stand(self.system.journal.position(self.name, link.sender))
            link.done.set()

    async def _take_envelope(self, e: Envelope, position: Position) -> None:
        meta = Meta(e.sender, self.system.now(), e.trace)
        remote = node_of(e.sender) != self.system.node
        commit = Commit(self.name, inbox={e.sender: position})
        try:
            message = (self._decode_peer if remote else self._decode_local)(e.body)
            sends = await self.port.handle(message, meta)
            self.system.fill(commit, sends, e.trace)
        except Violation as violation:
            self.system.log_violation(self.name, meta, violation)
        except Exception as error:  # our bug or the world's whim: try again, then set the message aside
            self.system.log_crash(self.name, meta, error)
            if not self._crashes.count((e.sender, e.epoch, e.seq)):
                raise CrashedOn(error, remote) from error
            commit.outbox.clear()
            commit.quarantined.append((meta.now, meta.sender, meta.trace, repr(error)[:1000], e.body))
        self.system.crash_point(self.name, "before commit")
        await self.system.journal.commit(commit)
        self.system.crash_point(self.name, "after commit")
        self.system.released(self.name, commit, [])
