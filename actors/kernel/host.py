"""What actors, couriers and alarms need of the system that they run in. Tests have another one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from actors.kernel.answers import Answers
from actors.kernel.clock import MachineClock
from actors.kernel.feed import Feeds
from actors.kernel.journal import Journal
from actors.kernel.machine import Meta, Publish, Send, Step, Transport
from actors.kernel.mail import Alarm, LinkBroken
from actors.kernel.records import Commit, MessageDamaged, RowDamaged
from protocol.codec import Ack, Envelope
from protocol.types import PeerLost, Violation


class Ringer(Protocol):
    """The actor of a machine, as alarms see it."""

    ringing: bool

    def offer_alarm(self, alarm: Alarm) -> None: ...


class AlarmBoard(Protocol):
    """What actors and couriers tell about alarms."""

    def failed(self, actor: str, what: str, error: Exception, times: int) -> float: ...

    def handled(self, actor: str, what: str) -> None: ...

    def is_waiting(self, actor: str, what: str) -> bool: ...

    def taken(self, actor: str) -> None: ...

    def refused(self, actor: str, recipient: str, epoch: str, owed: Sequence[int], reason: str) -> None: ...


class Host(Protocol):
    """All actors of one process; `System` is the one that runs."""

    node: str
    journal: Journal
    transport: Transport
    feeds: Feeds
    answers: Answers
    new_trace: Callable[[], str]
    jitter: Callable[[], float]
    crash_point: Callable[[str, str], None]
    origin: Callable[[str], str]

    @property
    def alarms(self) -> AlarmBoard: ...

    clock: MachineClock

    def now(self) -> float: ...

    def machine(self, name: str) -> Ringer | None: ...

    def has_actor(self, address: str) -> bool: ...

    def is_broken(self, actor: str, recipient: str) -> bool: ...

    # -- what ports send
    async def post(self, sender: str, sends: Sequence[Send], trace: str | None = None) -> None: ...

    def fill(self, commit: Commit, sends: Sequence[Send], trace: str) -> None: ...

    async def deliver_local(self, batch: list[Envelope]) -> Ack: ...

    # -- what actors and couriers report
    def released(self, actor: str, commit: Commit, published: Sequence[Publish]) -> None: ...

    def acknowledged(self, actor: str, recipient: str, seq: int, epoch: str) -> None: ...

    def heard(self, actor: str, recipient: str) -> None: ...

    def was_heard(self, actor: str, recipient: str) -> bool: ...

    async def link_broken(self, actor: str, broken: LinkBroken) -> None: ...

    async def message_lost(self, damage: MessageDamaged, epoch: str) -> None: ...

    def lingers(self, courier: Any) -> None: ...  # a `Courier`, which knows its host by this class

    def log_step(self, actor: str, meta: Meta, tag: str, step: Step) -> None: ...

    def log_violation(self, actor: str, meta: Meta, violation: Violation) -> None: ...

    def log_crash(self, actor: str, meta: Meta, error: Exception) -> None: ...

    def log_damaged(self, actor: str, meta: Meta, error: RowDamaged) -> None: ...

    def log_twice(self, recipient: str) -> None: ...

    def log_broken(self, actor: str, lost: PeerLost) -> None: ...
