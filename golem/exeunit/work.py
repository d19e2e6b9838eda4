"""Port `runtime` of the exe-unit's machine: carries out commands with a runtime, transfers and captures.

One command runs at a time, in a task of its own, so that a cancellation gets through; its end is posted to the machine.
A command that the kernel brings a second time (after a crash of an actor) is not run a second time.
Neighbours: `actors/exeunit.py` decides what runs; `live.py` hears of everything; `runtimes`, `transfer`, `images`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import trio

from actors.kernel.machine import Meta, Send
from golem.exeunit.capture import Collector, Output, fit_sides
from golem.exeunit.live import LiveLog
from golem.exeunit.places import hidden
from golem.exeunit.runtime import (
    GIB,
    Deployment,
    DeployOptions,
    ImageFormat,
    Runtime,
    RuntimeFault,
    Side,
    Usage,
    Volume,
    parse_volumes,
)
from golem.exeunit.storage import SPARE_BYTES
from golem.exeunit.supervisor import HOLD
from golem.exeunit.terms import AgreedTerms
from golem.exeunit.transfer.packages import Image, ImageStore
from golem.exeunit.transfer.transfers import TransferError, Transfers
from golem.exeunit.usage import Counters, room_left
from protocol.activity import MAX_TEXT, output_size
from protocol.exeunit import (
    CancelCommand,
    Capture,
    Command,
    CommandFinished,
    CopyFile,
    Deploy,
    Execute,
    Progress,
    Run,
    Start,
    Terminate,
    parse_command,
)
from protocol.property_names import TASK_PACKAGE

log = logging.getLogger("golem.exeunit")

STOPPED = "stopped by a terminate command"
DEFAULT_PROGRESS_S = 1.0
MAX_WAITING_BYTES = 16 << 20  # of results that the requestor has not taken: there is no next command before it has
WAITING_POLL_S = 0.2
HOLD_LOOK_S = 0.5
HELD = "held back: unpaid work has come near the credit of the requestor; it goes on as soon as a payment arrives"
_INTERVAL = re.compile(r"\s*(\d{1,6}(?:\.\d{1,6})?)\s*(ms|s|m)\s*\Z")
Post = Callable[[Sequence[Send]], Awaitable[None]]


class Failed(Exception):
    """A command failed; the text is for the requestor."""


class RuntimePort:
    """The port of one activity. `unit` is the machine's name, `exeunit:` and the activity's id."""

    name = "runtime"
    local = Execute | CancelCommand
    peer = type(None)

    def __init__(
        self,
        unit: str,
        terms: AgreedTerms,
        work_dir: Path,
        runtime: Runtime,
        transfers: Transfers,
        images: ImageStore,
        live: LiveLog,
        journal_bytes: Callable[[], int] = lambda: 0,
        waiting_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        """`journal_bytes`: what the unit's own journal takes, which is storage of the activity; `waiting_bytes`: of it, what
        waits for the requestor.
        """
        self._journal_bytes, self._waiting_bytes = journal_bytes, waiting_bytes
        self._unit, self._terms, self._work_dir = unit, terms, work_dir
        self._activity_id = unit.partition(":")[2]
        self._runtime, self._transfers, self._images, self._live = runtime, transfers, images, live
        self._counters = Counters(self._usage_with_journal, time.monotonic())
        self._deployment: Deployment | None = None
        self._image: Image | None = None
        self._deployments = 0
        self._seen: set[tuple[str, int]] = set()
        self._running: tuple[str, int, str, trio.CancelScope] | None = None
        self._nursery: trio.Nursery | None = None
        self._lost = False
        self._post: Post | None = None
        self._on_failure: Callable[[str], None] = lambda text: None
        self._watch: trio.CancelScope | None = None  # of the task that waits for the deployment's death
        self._why_stopped = STOPPED

    def attach(self, nursery: trio.Nursery, post: Post, on_failure: Callable[[str], None], *, lost: bool = False) -> None:
        """Give the port its tasks' nursery and its ways out, before the system runs.

        `on_failure` is told when the runtime dies by itself. `lost` says that a process before this one had the
        commands: they may come again, and none is run twice.
        """
        self._nursery, self._post, self._on_failure, self._lost = nursery, post, on_failure, lost

    # -- what others ask
    def runtime_usage(self) -> Usage:
        """What the runtime has used in all."""
        return self._runtime.usage()

    def _usage_with_journal(self) -> Usage:
        used, most = self._runtime.usage(), self._terms.limits.storage_gib
        stored = min(used.storage_gib + self._journal_bytes() / GIB, max(most, used.storage_gib))
        return Usage(used.cpu_sec, used.gib, stored)

    def usage(self) -> list[float]:
        """Counters in the order of the agreement's usage vector."""
        return self._counters.vector(self._terms.usage_vector, time.monotonic())

    def exposed_ports(self) -> tuple[int, ...]:
        """The ports that the deployed image exposes."""
        return self._deployment.ports if self._deployment else ()

    def running(self) -> str | None:
        """The JSON text of the command that runs."""
        return self._running[2] if self._running else None

    async def stop(self, why: str) -> None:
        """Kill whatever runs and let go of everything; `why` is what the command at work is told to have ended by."""
        self._why_stopped = why
        if self._running:
            self._running[3].cancel()
        await self._clear()

    # -- the port
    async def handle(self, message: Execute | CancelCommand, meta: Meta) -> Sequence[Send]:
        """Begin a command in a task of its own, or cancel one."""
        if isinstance(message, CancelCommand):
            if self._running and self._running[:2] == (message.batch_id, message.index):
                self._running[3].cancel()
            return []
        if (message.batch_id, message.index) not in self._seen and not self._lost:
            self._seen.add((message.batch_id, message.index))
            assert self._nursery is not None
            self._nursery.start_soon(self._execute, message)
        return []

    async def _execute(self, message: Execute) -> None:
        command = parse_command(message.command)
        self.tell(message, {"started": {"command": json.loads(command.text)}})
        outputs: dict[Side, Output | None] = {"stdout": None, "stderr": None}
        text: str | None = message.refusal
        ok = False
        code = 1
        with trio.CancelScope() as scope:
            if text is None:
                self._running = (message.batch_id, message.index, command.text, scope)
                try:
                    if not isinstance(command.args, Terminate):
                        await self._until_taken(message)
                    await self._wait_while_held(message, command)
                    text, code = await self._perform(message, command, outputs)
                    ok = code == 0
                except (Failed, RuntimeFault, TransferError) as error:
                    text = str(error)
                except Exception as error:
                    # a bug of ours or of a runtime fails the command and is told; the activity goes on
                    log.exception("command %s failed", command.kind)
                    text = f"internal error of the exe-unit: {type(error).__name__}"
                finally:
                    self._running = None
        if scope.cancelled_caught:
            text = self._why_stopped
        text = text and hidden(text)
        self.tell(message, {"finished": {"return_code": 0 if ok else code or 1, "message": text}})
        finished = CommandFinished(
            message.batch_id, message.index, ok, outputs["stdout"], outputs["stderr"], text and text[:MAX_TEXT],
            round(time.time(), 6), self.usage(),
        )  # fmt: skip
        assert self._post is not None
        await self._post([Send(self._unit, finished)])

    async def _until_taken(self, message: Execute) -> None:
        """Wait while too much of what there was is not taken: it would pile up on this machine's disk."""
        told = False
        while self._waiting_bytes() > MAX_WAITING_BYTES:
            if not told:
                told = True
                log.warning("the next command waits: its requestor has not taken the results of those before")
                text = "waits until results of earlier commands are taken"
                event = {"step": [0, 1], "message": text, "progress": [0, None], "unit": "Bytes"}
                self.tell(message, {"progress": event}, asked=False)
            await trio.sleep(WAITING_POLL_S)

    async def _wait_while_held(self, message: Execute, command: Command) -> None:
        """Begin nothing new while the provider's agent says so; what ends work may always begin."""
        mark = self._work_dir / HOLD
        if not mark.exists() or isinstance(command.args, Terminate):
            return
        log.info("command %s is held back", command.kind)
        self.tell(message, {"progress": {"step": [0, 1], "message": HELD, "progress": [0, None], "unit": "Bytes"}}, asked=False)
        while mark.exists():
            await trio.sleep(HOLD_LOOK_S)

    async def _perform(self, message: Execute, command: Command, outputs: dict[Side, Output | None]) -> tuple[str | None, int]:
        """Carry out a command; returns its message and return code."""
        match command.args:
            case Deploy() as deploy:
                await self._deploy(message, deploy)
            case Start(args):
                await self._runtime.start(args or [])
            case Run() as run:
                return await self._run(message, run, outputs)
            case CopyFile() as transfer:
                await self._transfer(message, transfer)
            case Terminate():
                await self._clear()
            case _:
                raise Failed(f"{command.kind} is not supported")
        return None, 0

    def tell(self, message: Execute, kind: dict[str, Any], *, asked: bool = True) -> None:
        """Put an event of a command into the live log; one that its script did not ask for is for watchers alone."""
        self._live.add(message.batch_id, message.index, time.time(), kind, asked=asked)

    # -- commands
    async def _deploy(self, message: Execute, deploy: Deploy) -> None:
        if deploy.net:
            raise Failed("`net`: virtual networks are not there yet, so none of this deploy is done; leave `net` out")
        progress = _Progress(self, message, deploy.progress)
        image = await self._obtain(progress)
        try:
            self._deployments += 1
            folder = self._work_dir / f"deployment-{self._deployments}"
            folder.mkdir(mode=0o711)
            options = DeployOptions(
                work_dir=folder,
                limits=self._terms.limits,
                env=deploy.env or {},
                volumes=parse_volumes(deploy.volumes),
                hostname=deploy.hostname,
                hosts=deploy.hosts or {},
                activity_id=self._activity_id,
                notice=progress.notice,
            )
            await self._images.make_room(self._terms.limits.storage_bytes + SPARE_BYTES, folder)
            self._deployment = await self._runtime.deploy(image.path if image else Path(os.devnull), options)
        except BaseException:
            if image is not None:
                image.close()
            await self._clear()
            raise
        self._image = image
        self._watch = trio.CancelScope()
        assert self._nursery is not None
        self._nursery.start_soon(self._watch_failure, self._watch)

    async def _obtain(self, progress: _Progress) -> Image | None:
        """Return the task package, None where there is none and the runtime needs none."""
        if self._terms.task_package is not None:
            return await self._images.obtain(
                self._terms.task_package, self._runtime.formats, progress=progress.bytes, notice=progress.notice
            )
        if ImageFormat.NOTHING not in self._runtime.formats:
            raise Failed(f"the agreement names no task package ({TASK_PACKAGE})")
        return None

    async def _watch_failure(self, scope: trio.CancelScope) -> None:
        with scope:
            text = await self._runtime.failure()
            log.error("the runtime died: %s", text)
            self._on_failure(hidden(text))

    async def _run(self, message: Execute, run: Run, outputs: dict[Side, Output | None]) -> tuple[str | None, int]:
        capture = run.capture or Capture()
        try:
            collectors: dict[Side, Collector] = {
                "stdout": Collector(capture.stdout),
                "stderr": Collector(capture.stderr),
            }
        except ValueError as error:
            raise Failed(str(error)) from None

        async def output(side: Side, chunk: bytes) -> None:
            if (live := collectors[side].feed(chunk)) is not None:
                self.tell(message, {side: _json(live)})

        try:
            status = await self._runtime.run(run.entry_point, run.args or [], output, run.env)
        finally:
            for side, collector in collectors.items():
                if (live := collector.finish()) is not None:
                    self.tell(message, {side: _json(live)})
            outputs["stdout"], outputs["stderr"] = fit_sides(collectors["stdout"], collectors["stderr"])
        notes = [f"{side} cut to what a result takes" for side, one in collectors.items() if _is_cut(one, outputs[side])]
        if not status.ok:
            notes.insert(0, f"ExeScript command exited with code {status.code}")
            notes += [status.reason] if status.reason else []
        return "; ".join(notes) or None, 0 if status.ok else status.code or 1

    async def _transfer(self, message: Execute, transfer: CopyFile) -> None:
        progress = _Progress(self, message, transfer.progress)
        volumes: Sequence[Volume] = self._deployment.volumes if self._deployment else ()
        room = await trio.to_thread.run_sync(room_left, volumes, self._terms.limits)
        await self._transfers.transfer(
            transfer.source, transfer.to, volumes, progress=progress.bytes, notice=progress.notice, max_bytes=room
        )

    async def _clear(self) -> None:
        """Stop the runtime; the next deploy starts anew. What was used stays counted."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        with trio.CancelScope(shield=True):
            await self._runtime.stop()
        self._deployment = None
        if self._image is not None:
            self._image.close()
            self._image = None


class _Progress:
    """Tells of the progress of one command, not more often than it asked for; watchers hear of it unasked."""

    def __init__(self, port: RuntimePort, message: Execute, wanted: Progress | None) -> None:
        self._port, self._message = port, message
        self._asked = wanted is not None
        self._interval_s = _interval(wanted.update_interval if wanted else None)
        self._next = 0.0
        self._last: tuple[int, int | None] = (0, None)

    def bytes(self, done: int, total: int | None) -> None:
        """So many bytes of so many are there."""
        self._last = (done, total)
        if time.monotonic() < self._next and done != total:
            return
        self._next = time.monotonic() + self._interval_s
        self._tell(None)

    def notice(self, text: str) -> None:
        """Something worth saying."""
        self._tell(hidden(text))

    def _tell(self, text: str | None) -> None:
        event = {"step": [0, 1], "message": text, "progress": list(self._last), "unit": "Bytes"}
        self._port.tell(self._message, {"progress": event}, asked=self._asked)


def _is_cut(collector: Collector, output: Output | None) -> bool:
    return collector.truncated or output_size(output) < collector.size()


def _interval(text: str | None) -> float:
    match = _INTERVAL.match(text or "")
    if match is None:
        return DEFAULT_PROGRESS_S
    return max(0.05, float(match[1]) * {"ms": 0.001, "s": 1.0, "m": 60.0}[match[2]])


def _json(output: Output) -> str | list[int]:
    """Binary output is a list of numbers in JSON."""
    return list(output) if isinstance(output, bytes) else output
