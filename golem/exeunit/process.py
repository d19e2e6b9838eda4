"""The exe-unit's process: kernel, machine, runtime port and bus client put together, from start to end.

It outlives a restart of its node: messages wait in its journal and the bus client comes back. It ends by SIGTERM, when a
limit of the agreement is exceeded, when the agreement has expired, when the disk is full, or when the runtime dies by
itself; each way with a last report that holds the final usage. A second process on the same working directory finds the
runtime of the first one lost, and ends the activity.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from actors.exeunit import ExeUnit, UnitRow
from actors.kernel.clock import Steady
from actors.kernel.journal import Journal
from actors.kernel.machine import AskTimeout, Busy
from actors.kernel.records import JournalError
from actors.kernel.system import System
from golem.base.boot import boot_id, boot_time
from golem.bus.client import BusClient
from golem.exeunit.disk import DiskWatch
from golem.exeunit.interaction import UnitInteractions, allowed_interactions
from golem.exeunit.live import LiveLog
from golem.exeunit.places import remember
from golem.exeunit.runtime import Runtime
from golem.exeunit.runtimes import make_runtime
from golem.exeunit.terms import AgreedTerms, read_terms
from golem.exeunit.transfer.packages import ImageStore
from golem.exeunit.transfer.spool import TransferError, TransferPolicy
from golem.exeunit.transfer.transfers import Transfers
from golem.exeunit.work import RuntimePort
from golem.files.client import GftpPeer
from golem.files.outgoing import OutgoingFile
from golem.net.types import RemoteError, Unreachable
from protocol.codec import decode_batch, encode
from protocol.exeunit import ShutDown, UnitStarted, UsageMeasured, exeunit_name
from protocol.gftp import FileFault
from protocol.interaction import BACK
from protocol.live import (
    Answer,
    AskRunning,
    AskUsage,
    Dial,
    FollowBatch,
    Question,
    UsageNow,
    WatchAll,
    decode_question,
)
from protocol.states import ActivityEnd, ActivityState
from protocol.types import Violation

log = logging.getLogger("golem.exeunit")

LIMITS_INTERVAL_S = 1.0
USAGE_INTERVAL_S = 10.0  # between durable reports; who wants it fresher asks
MEM_OVERHEAD_GIB = 0.3  # of the runtime itself; the guest's own memory is bounded by the runtime
STOP_S = 2.0  # for the runtime to stop, and again for the last report to leave: the agent kills after 5 s
EXPIRY_MARGIN_S = 60.0  # the agent ends an expired agreement; this is for when it is gone
CACHE_BYTES = 20 << 30
IMAGE_BYTES = 8 << 30


JOURNAL = "unit.db"
SOCKETS = Path("/var/run/docker.sock"), Path(os.environ.get("DOCKER_HOST", "").removeprefix("unix://") or "/run/docker.sock")
LEAST_JOURNAL_BYTES = 64 << 20  # where less storage was sold, an honest script's results still have their place
NEARNESS = "unit:nearness"  # see golem/node/nearness.py


@dataclass(frozen=True)
class UnitSettings:
    """What the provider agent says on the command line."""

    runtime: str
    activity_id: str
    bus: Path
    agreement: Path
    work_dir: Path
    cache_dir: Path
    policy: TransferPolicy
    interaction: str | None = None  # what the provider allows of shell and proxy-http; None: all the runtime has


class BusGftp:
    """`golem.exeunit.transfer.transfers.GftpClient` through the node's bus."""

    def __init__(self, bus_path: Path) -> None:
        self._peer = GftpPeer(bus_path)

    async def size(self, url: str) -> int:
        return int(await _transfer(self._peer.size(url)))

    async def download(self, url: str, offset: int, write: Callable[[bytes], Awaitable[None]]) -> None:
        await _transfer(self._peer.download(url, offset, write))

    async def upload(self, url: str, file: OutgoingFile, progress: Callable[[int, int], None] | None) -> None:
        await _transfer(self._peer.upload(url, file, progress))


async def _transfer(work: Awaitable[int]) -> int:
    try:
        return await work
    except FileFault as fault:
        raise TransferError(f"gftp {fault.variant}: {fault}", fault.passing) from None


class Unit:
    """One activity's process."""

    def __init__(self, settings: UnitSettings, terms: AgreedTerms, runtime: Runtime, journal: Journal) -> None:
        self.settings, self.terms = settings, terms
        self.name = exeunit_name(settings.activity_id)
        self.live = LiveLog()
        remember(settings.work_dir, settings.work_dir.parent, settings.cache_dir, settings.cache_dir.parent, *SOCKETS)
        self._journal = journal
        self._disk = DiskWatch(settings.work_dir)
        journal.make_room = self._disk.make_room
        self.client = BusClient(
            settings.bus, self.name, "exeunit", on_mail=self._deliver, on_call=self._answer, on_connect=self._hurry
        )
        self.system = System(
            terms.provider, journal, self.client, clock=time.time, steady=Steady(boot_time, boot_id()),
            new_trace=lambda: secrets.token_hex(6),
            jitter=lambda: random.uniform(0.8, 1.2),
        )  # fmt: skip
        transfers = Transfers(
            settings.policy, BusGftp(settings.bus), spool_dir=settings.work_dir, nearness=self._nearness
        )  # fmt: skip
        images = ImageStore(settings.cache_dir / "images", transfers, CACHE_BYTES, IMAGE_BYTES)
        self.port = RuntimePort(
            self.name, terms, settings.work_dir, runtime, transfers, images, self.live,
            self._journal_bytes, journal.waiting_bytes,
        )  # fmt: skip
        self.system.add(ExeUnit(settings.activity_id, terms.requestor, terms.provider))
        self.system.add_port(self.port)
        self.interactions = UnitInteractions(
            settings.activity_id, runtime, allowed_interactions(settings.interaction, runtime), self._state,
            lambda: self.client.open_stream("", BACK), self.port.exposed_ports,
        )  # fmt: skip
        self._nursery: trio.Nursery | None = None
        self._ending = trio.Event()
        self._reason: tuple[str, str | None] = (ActivityEnd.DESTROYED, None)

    # -- the bus
    async def _nearness(self) -> str:
        """Ask our node how near the requestor is. Where it cannot tell, far."""
        try:
            return (await self.client.call("", NEARNESS, self.terms.requestor.encode())).decode("ascii", "replace")
        except (Unreachable, RemoteError) as error:
            log.warning("nobody says how near the requestor is: %s", error)
            return "far"

    async def _deliver(self, frame: bytes) -> bytes:
        # the node has checked that the sender is who it says
        return await self.system.deliver(frame, decode_batch(frame)[0].sender)

    async def _hurry(self) -> None:
        """The node is back: what waits goes now."""
        for node in (self.terms.provider, self.terms.requestor):
            self.system.peer_up(node)

    async def _answer(self, sender: str, target: str, payload: bytes) -> bytes:
        """Answer a live call of the requestor or of our own node."""
        if sender not in (self.terms.requestor, self.terms.provider):
            raise RemoteError("not a party of the agreement")
        try:
            question = decode_question(payload)
        except Violation as error:
            raise RemoteError(f"no such question: {error}") from None
        return encode(await self._answer_to(question, sender))

    async def _answer_to(self, question: Question, sender: str) -> Answer:
        match question:
            case AskUsage():
                return UsageNow(self.port.usage(), time.time())
            case AskRunning():
                return self.port.running()
            case FollowBatch(batch_id, after, wait_s):
                return await self.live.follow(batch_id, after, wait_s)
            case WatchAll(after, wait_s):
                return await self.live.watch(after, wait_s)
            case Dial(token) if sender == self.terms.provider and self._nursery is not None:
                return self.interactions.call(self._nursery, token)
        raise RemoteError("no such question")

    # -- life
    async def run(self) -> int:
        """Serve the activity to its end; returns the exit status (0: it was told to end, and everybody knows).

        Raises `JournalError` when the disk fails; nothing of the runtime is left then, either.
        """
        try:
            return await self._serve()
        except BaseExceptionGroup as group:
            if (failed := group.subgroup(JournalError)) is None:
                raise
            with trio.CancelScope(shield=True):
                await self.port.stop("the exe-unit cannot write to its disk")
            raise JournalError(str(_first(failed))) from None
        finally:
            self._disk.release()

    async def _serve(self) -> int:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self.port.attach(
                nursery, lambda sends: self.system.post(self.port.name, sends), lambda text: self.end(ActivityEnd.LOST, text),
                lost=self._state() != ActivityState.NEW,
            )  # fmt: skip
            nursery.start_soon(self._watch_signals)
            nursery.start_soon(self.client.run)
            await nursery.start(self.system.run)
            await self.system.ask(self.name, UnitStarted(secrets.token_hex(8)))
            if self._state() == ActivityState.TERMINATED:
                await self._flush()
                nursery.cancel_scope.cancel()
                return 1
            nursery.start_soon(self._watch_limits)
            await self._ending.wait()
            told = await self._end()
            nursery.cancel_scope.cancel()
        return 0 if told and self._reason[0] == ActivityEnd.DESTROYED else 1

    def end(self, reason: str, error_message: str | None = None) -> None:
        """Have the activity end; the first reason counts."""
        if not self._ending.is_set():
            self._reason = (reason, error_message)
            self._ending.set()

    def _journal_bytes(self) -> int:
        """Return what the journal takes of the disk."""
        found = 0
        for path in self.settings.work_dir.glob(f"{JOURNAL}*"):
            with suppress(OSError):
                found += path.stat().st_blocks * 512
        return found

    def _state(self) -> str:
        row: UnitRow | None = self.system.rows(self.name).get("unit")
        return row.state if row else ActivityState.NEW

    async def _end(self) -> bool:
        self._disk.release()  # what is still to be written has its room
        self.interactions.end("the activity has ended: " + ": ".join(filter(None, self._reason)))
        with trio.move_on_after(STOP_S) as scope:
            await self.port.stop("activity terminated: " + ": ".join(filter(None, self._reason)))
        if scope.cancelled_caught:
            log.error("the runtime did not stop within %g s", STOP_S)
        await self.system.ask(self.name, ShutDown(*self._reason, self.port.usage()))
        return await self._flush()

    async def _flush(self) -> bool:
        """Wait until everybody has what we sent, for a while; what is left then is lost with this process."""
        with trio.move_on_after(STOP_S):
            while self._journal.links():
                await trio.sleep(0.02)
            return True
        log.warning("not delivered: %s", self._journal.links())
        return False

    async def _watch_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                log.info("%s: ending", signal.Signals(number).name)
                self.end(ActivityEnd.DESTROYED)

    async def _watch_limits(self) -> None:
        reported_at = trio.current_time()
        while True:
            await trio.sleep(LIMITS_INTERVAL_S)
            limits = self.terms.limits
            if trio.current_time() - reported_at >= USAGE_INTERVAL_S and not self._ending.is_set():
                reported_at = trio.current_time()
                with suppress(Busy, AskTimeout):
                    await self.system.ask(self.name, UsageMeasured(self.port.usage()))
            used = self.port.runtime_usage()
            if used.gib > limits.mem_gib + MEM_OVERHEAD_GIB:
                self.end(ActivityEnd.LIMIT, f"memory: {used.gib:.3f} GiB used of {limits.mem_gib:g}")
            if used.storage_gib > limits.storage_gib:
                self.end(ActivityEnd.LIMIT, f"storage: {used.storage_gib:.3f} GiB used of {limits.storage_gib:g}")
            if (journal_bytes := self._journal_bytes()) > max(limits.storage_bytes, LEAST_JOURNAL_BYTES):
                self.end(ActivityEnd.LIMIT, f"storage: {journal_bytes >> 20} MiB of messages that the requestor does not take")
            if self.terms.expires_at is not None and time.time() > self.terms.expires_at + EXPIRY_MARGIN_S:
                self.end(ActivityEnd.EXPIRED)
            if (problem := self._disk.look()) is not None:
                self.end(ActivityEnd.DISK, problem)


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


def serve(settings: UnitSettings) -> int:
    """Run one activity; returns the exit status. Raises `TermsError`, `JournalError`, `ValueError`."""
    terms = read_terms(settings.agreement)
    settings.work_dir.mkdir(parents=True, exist_ok=True)
    os.chmod(settings.work_dir, 0o711)
    runtime = make_runtime(settings.runtime, settings.cache_dir)
    journal = Journal(str(settings.work_dir / JOURNAL), lambda: secrets.token_hex(8))
    try:
        return trio.run(_serve, settings, terms, runtime, journal)
    finally:
        journal.close()


async def _serve(settings: UnitSettings, terms: AgreedTerms, runtime: Runtime, journal: Journal) -> int:
    return await Unit(settings, terms, runtime, journal).run()
