"""A port's actor: mailbox, link position and durable answers around an async handler of the outside world.

The world's whim (a disk that is full, a database that is locked, a peer that is silent) is no fault of the message: it
comes again, without end, and its link says why it waits. Any other exception may be our bug, or the world's as well:
the message gets three attempts over half a minute, and is then set aside.
"""

from __future__ import annotations

import logging
import sqlite3

import trio

from actors.kernel.host import Host
from actors.kernel.lineage import Position
from actors.kernel.machine import ActorFailed, AskTimeout, Busy, LinkDown, Meta, Port
from actors.kernel.mail import CAPACITY, RETIRED, Ask, Delivery, LinkBatch, Outcome, Release, fresh
from actors.kernel.mailbox import Mailbox
from actors.kernel.records import Commit, JournalError, RowDamaged
from protocol.codec import Envelope
from protocol.types import Violation, node_of

log = logging.getLogger("golem.kernel")

WHIMS = (
    OSError, sqlite3.Error, trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError, MemoryError,
    LinkDown, Busy, AskTimeout, RowDamaged,
)  # fmt: skip


def is_whim(error: BaseException) -> bool:
    """Return whether the outside world is to blame, and not the message."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_whim(one) for one in error.exceptions)
    return isinstance(error, WHIMS)


class PortActor(Mailbox):
    """Serves a port's mailbox one message at a time. A message may come again after a crash: ports are idempotent."""

    first_pause_s = 5.0

    def __init__(self, system: Host, port: Port, capacity: int = CAPACITY) -> None:
        super().__init__(system, port, capacity)
        self.port = port
        self._whims: dict[str, str] = {}  # sender -> what its link waits for

    def forget(self) -> None:
        """Begin again: nothing is remembered but by the journal."""

    async def run(self) -> None:
        """Serve the mailbox. Raises `JournalError` alone."""
        while True:
            delivery: Delivery = await self._mailbox.receive()
            match delivery:
                case LinkBatch() if delivery.envelopes:
                    await self._take_link(delivery)
                case Ask():
                    await self._take_ask(delivery)
                case Release():
                    await self._take_release(delivery)

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

    async def _take_release(self, release: Release) -> None:
        """Handle a message of the quarantine: once more, and no more if it fails again."""
        try:
            if (found := self.release(release)) is None:
                return
            one, message = found
            commit = Commit(self.name, released=[release.number])
            sends = await self.port.handle(message, Meta(one.sender, self.system.now(), one.trace))
            self.system.fill(commit, sends, one.trace)
            await self._commit(commit)
        except JournalError:
            raise
        except Exception as error:
            self.failed_again(release, error)
        finally:
            release.done.set()

    async def _take_link(self, link: LinkBatch) -> None:
        try:
            position = self.system.journal.position(self.name, link.sender)
        except RowDamaged as error:
            self.system.log_damaged(self.name, Meta(link.sender, self.system.now(), link.envelopes[0].trace), error)
            link.note = "damaged row"
            link.done.set()
            return
        try:
            if position.is_retired(link.epoch):
                link.note = RETIRED
                return
            for e, behind in fresh(link, position.under(link.epoch)):
                if await self._take_envelope(e, behind, link) is not Outcome.TAKEN:
                    return
        finally:
            link.stand(self.system.journal.position(self.name, link.sender))
            self.answer(link)

    async def _take_envelope(self, e: Envelope, position: Position, link: LinkBatch) -> Outcome:
        """Handle a message and commit its outcome; `link.note` says why it was not taken."""
        meta = Meta(e.sender, self.system.now(), e.trace)
        commit = Commit(self.name, inbox={e.sender: position})
        if self.held(e):
            link.note = "crash"
            return Outcome.CRASH
        try:
            message = self.decode(e.sender, e.body)
            sends = await self.port.handle(message, meta)
            self.system.fill(commit, sends, e.trace)
        except JournalError:
            raise
        except Violation as violation:
            self.system.log_violation(self.name, meta, violation)
        except Exception as error:
            commit.outbox.clear()
            if is_whim(error):
                self._waits(e, link, error)
                return Outcome.WAITS
            self.system.log_crash(self.name, meta, error)
            if not self.quarantined(commit, e, error, meta.now):
                link.note = "crash"
                return Outcome.CRASH
        if self._whims.pop(e.sender, None):
            log.info("%s goes on with the messages of %s", self.name, e.sender)
        await self._commit(commit)
        return Outcome.TAKEN

    def _waits(self, e: Envelope, link: LinkBatch, error: Exception) -> None:
        """Note what a link waits for; its courier comes again, with growing pauses."""
        words = f"{self.name} waits: {type(error).__name__}: {error}"[:300]
        if self._whims.get(e.sender) != words:
            self._whims[e.sender] = words
            log.warning("%s (a message from %s, trace %s)", words, e.sender, e.trace)
        link.note = words if node_of(e.sender) == self.system.node else "waiting"

    async def _commit(self, commit: Commit) -> None:
        self.system.crash_point(self.name, "before commit")
        await self.system.journal.commit(commit, patient=True)
        self.system.crash_point(self.name, "after commit")
        self.system.released(self.name, commit, [])
