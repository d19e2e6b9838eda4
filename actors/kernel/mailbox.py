"""A bounded mailbox, and how it is read: what the actors of machines and of ports have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Union

import trio

from actors.kernel.host import Host
from actors.kernel.lineage import Position
from actors.kernel.machine import ActorFailed, Busy, Machine, Port
from actors.kernel.mail import CRASHES_BEFORE_QUARANTINE, Crashes, Delivery, LinkBatch, Release
from actors.kernel.records import Commit, SetAside
from actors.kernel.tables import KEPT_QUARANTINED
from protocol.codec import MAX_UNDER_WAY, Decoder, Envelope
from protocol.types import Message, Violation, node_of


class Mailbox:
    """What the actor of a machine and the actor of a port have in common: a bounded mailbox, and how it is read."""

    first_pause_s = 0.0  # a message that crashed its handler comes again when its courier does

    def __init__(self, system: Host, kind: Machine | Port, capacity: int) -> None:
        self.system, self.name = system, kind.name
        self.address = f"{system.node}/{kind.name}"
        self.post, self._mailbox = trio.open_memory_channel[Delivery](capacity)
        self.takes_peers = kind.peer is not None
        self._decode_local: Callable[[bytes], Message] = Decoder(Union[kind.local, kind.peer, None])  # noqa: UP007
        self._decode_peer: Callable[[bytes], Message] = Decoder(Union[kind.peer, None])  # noqa: UP007
        self._crashes = Crashes()
        self._set_aside = set(system.journal.senders_set_aside(self.name))

    def offer(self, delivery: Delivery) -> None:
        """Put a delivery into the mailbox now. Raises `Busy` when it is full."""
        try:
            self.post.send_nowait(delivery)
        except trio.WouldBlock:
            raise Busy(f"the mailbox of {self.name} is full") from None

    def waiting(self) -> int:
        """Return how many deliveries nobody has taken yet."""
        return self.post.statistics().current_buffer_used

    def decode(self, sender: str, body: bytes) -> Message:
        """Return a message as `sender` may send it. Raises `Violation`."""
        return (self._decode_local if node_of(sender) == self.system.node else self._decode_peer)(body)

    def held(self, e: Envelope) -> bool:
        """Return whether a message that crashed its handler is to be left alone yet."""
        return bool(self._crashes) and self._crashes.waits((e.sender, e.epoch, e.seq), self.system.now())

    def quarantined(self, commit: Commit, e: Envelope, error: Exception, now: float) -> bool:
        """Count a crash; return True when the message is set aside, so that the link goes on behind it."""
        key = (e.sender, e.epoch, e.seq)
        if self._crashes.count(key, now, self.first_pause_s) < CRASHES_BEFORE_QUARANTINE:
            return False
        self._crashes.forget(key)
        local = node_of(e.sender) == self.system.node
        commit.quarantined.append(SetAside(now, e.sender, e.epoch, e.seq, e.trace, repr(error)[:1000], e.body, local))
        if len(self._set_aside) > 2 * KEPT_QUARANTINED:
            self._set_aside = set(self.system.journal.senders_set_aside(self.name))
        self._set_aside.add(e.sender)
        return True

    def position(self, sender: str) -> Position:
        """Return how far a link is read, for who gets no answer from the actor itself."""
        return self.system.journal.position(self.name, sender)

    def answer(self, link: LinkBatch) -> None:
        """Acknowledge a frame, now that all it says is committed."""
        self.name_refused(link)
        link.done.set()

    def name_refused(self, link: LinkBatch) -> None:
        """Add to an acknowledgement which messages were set aside."""
        if link.sender in self._set_aside:  # in whichever frame: an acknowledgement counts for all before it
            first = link.have - MAX_UNDER_WAY
            link.refused = self.system.journal.refused(self.name, link.sender, link.epoch, first, link.have)

    def release(self, release: Release) -> tuple[SetAside, Message] | None:
        """Return what is to be handled after all; None, with the error noted, when it is not there any more."""
        one = self.system.journal.set_aside(release.number)
        if one is None:
            release.error = LookupError(f"no message with number {release.number} is in quarantine")
            return None
        try:
            return one, self.decode(one.sender, one.body)
        except Violation as error:
            release.error = error
            return None

    def failed_again(self, release: Release, error: Exception) -> None:
        """A message of the quarantine could not be handled: it stays where it is."""
        release.error = error if isinstance(error, Violation) else ActorFailed(f"{self.name} failed on it again: {error!r}")
