"""Port `processes` of the provider agent: exe-units, one process per activity.

An exe-unit is started in a session of its own and outlives the agent; a later run of the agent finds it again by process
id, start time and command line. Its working directory is removed when it is gone, its log stays a while; one that was
killed counts as gone when what it left running is gone too.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from actors.kernel.machine import Meta, Send
from actors.kernel.system import System
from golem.base.children import CWD, python_line
from golem.exeunit.supervisor import HOLD, start_ticks
from golem.private_files import write_private
from golem.provider.units import find_unit, is_unit, runtime_of, unit_environment
from protocol.provider import FindUnit, HoldUnit, StartUnit, StopUnit, ToProcesses, UnitExited, UnitRunning

if TYPE_CHECKING:
    from golem.provider.leftovers import Leftovers
    from golem.provider.runtimes import ExeUnits

log = logging.getLogger("golem.provider")

TERMINATION_S = 5.0  # from SIGTERM to SIGKILL


class Processes:
    """The port; `run` must be running.

    `bus` says where the node's bus is now, `units` how exe-units are started; `doubt` is told of runtimes whose exe-units
    end badly.
    """

    name = "processes"
    local = ToProcesses
    peer = None

    def __init__(
        self,
        system: System,
        data_dir: Path,
        bus: Callable[[], Path],
        units: Callable[[], ExeUnits],
        leftovers: Leftovers,
        doubt: Callable[[str], None] = lambda runtime: None,
    ) -> None:
        self._system, self._data_dir, self._bus = system, data_dir, bus
        self._units, self._leftovers, self._doubt = units, leftovers, doubt
        self._live: dict[str, int] = {}  # process id by activity
        self._stopping: set[str] = set()
        self._nursery: trio.Nursery | None = None
        self._up = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch processes until cancelled; they go on."""
        async with trio.open_nursery() as self._nursery:
            self._up.set()
            task_status.started()
            await trio.sleep_forever()

    async def handle(self, message: ToProcesses, meta: Meta) -> Sequence[Send]:
        """Start, find or stop an exe-unit."""
        await self._up.wait()
        match message:
            case StartUnit():
                return await self._start(message)
            case FindUnit():
                return self._find(message)
            case HoldUnit():
                self._hold(message)
            case StopUnit(activity_id, pid, ticks):
                if activity_id not in self._stopping and self._is(activity_id, pid, ticks):
                    self._stopping.add(activity_id)
                    assert self._nursery is not None
                    self._nursery.start_soon(self._stop, activity_id, pid, ticks)
        return ()

    def _hold(self, message: HoldUnit) -> None:
        """Leave a mark in the exe-unit's folder, or take it away: the exe-unit looks there before each command."""
        mark = self._data_dir / "exe-unit" / "work" / message.agreement_id / message.activity_id / HOLD
        log.info("activity %s %s", message.activity_id[:8], "starts no new command" if message.held else "goes on")
        try:
            if message.held:
                mark.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                mark.touch()
            else:
                mark.unlink(missing_ok=True)
        except OSError as error:
            log.warning("activity %s cannot be held back: %s", message.activity_id[:8], error.strerror)

    def terminate_all(self) -> None:
        """Ask every live exe-unit to end, without waiting (the agent is told to stop at once)."""
        for activity_id, pid in self._live.items():
            if is_unit(pid, activity_id):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)

    @staticmethod
    def _is(activity_id: str, pid: int, ticks: int) -> bool:
        return pid > 0 and start_ticks(pid) == ticks and is_unit(pid, activity_id)

    # -- start
    async def _start(self, message: StartUnit) -> Sequence[Send]:
        activity_id = message.activity_id
        if activity_id in self._live:
            pid = self._live[activity_id]
            return [Send("provider", UnitRunning(activity_id, pid, start_ticks(pid)))]
        if pid := find_unit(activity_id):  # the agent died between starting it and saying so
            return self._adopt(activity_id, pid)
        try:
            process = await self._spawn(message)
        except OSError as error:
            log.error("exe-unit of activity %s: %s", activity_id[:8], error)
            return [Send("provider", UnitExited(activity_id, None, f"cannot start the exe-unit: {error.strerror}"))]
        self._watch(activity_id, process.pid, process)
        log.info("activity %s: exe-unit (%s) runs as process %d", activity_id[:8], message.runtime, process.pid)
        return [Send("provider", UnitRunning(activity_id, process.pid, start_ticks(process.pid)))]

    async def _spawn(self, message: StartUnit) -> trio.Process:
        """Start the exe-unit. Raises `OSError`."""
        base = self._data_dir / "exe-unit"
        agreement_dir = base / "work" / message.agreement_id
        work, cache, logs = agreement_dir / message.activity_id, base / "cache", base / "logs"
        for folder in (work, cache, logs):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        agreement = agreement_dir / "agreement.json"
        write_private(agreement, message.agreement)
        units = self._units()
        command = python_line(
            "golem.exeunit", "--runtime", message.runtime, "--activity", message.activity_id,
            "--bus", str(self._bus()), "--agreement", str(agreement), "--work", str(work), "--cache", str(cache),
            *units.flags(),
        )  # fmt: skip
        with (logs / f"{message.activity_id}.log").open("ab") as output:
            return await trio.lowlevel.open_process(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, cwd=CWD,
                env=unit_environment(units.places),
            )  # fmt: skip

    # -- find and watch
    def _find(self, message: FindUnit) -> Sequence[Send]:
        activity_id, pid = message.activity_id, message.pid
        if activity_id in self._live:
            return ()
        if not pid and (found := find_unit(activity_id)):
            return self._adopt(activity_id, found)
        if self._is(activity_id, pid, message.started_ticks):
            self._adopt(activity_id, pid)
            return ()
        self._clean(activity_id, None, None)
        return [Send("provider", UnitExited(activity_id, None))]

    def _adopt(self, activity_id: str, pid: int) -> Sequence[Send]:
        log.info("activity %s: exe-unit found again as process %d", activity_id[:8], pid)
        ticks = start_ticks(pid)
        self._watch(activity_id, pid, None)
        return [Send("provider", UnitRunning(activity_id, pid, ticks))]

    def _watch(self, activity_id: str, pid: int, process: trio.Process | None) -> None:
        self._live[activity_id] = pid
        assert self._nursery is not None
        self._nursery.start_soon(self._wait, activity_id, pid, process)

    async def _wait(self, activity_id: str, pid: int, process: trio.Process | None) -> None:
        code: int | None = None
        runtime = runtime_of(pid)
        if process is not None:
            code = await process.wait()
        else:
            await _wait_gone(pid)
        log.info("activity %s: exe-unit %d is gone (%s)", activity_id[:8], pid, "status unknown" if code is None else code)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # whatever it left behind in its process group
        if runtime is not None and code != 0:
            self._doubt(runtime)
        if code is None or code < 0:  # it may not have ended what it ran, and that still takes up what others could use
            await self._leftovers.sweep([runtime] if runtime else [])
        self._stopping.discard(activity_id)
        del self._live[activity_id]
        self._clean(activity_id, runtime, code)
        await self._system.post(self.name, [Send("provider", UnitExited(activity_id, code))])

    async def _stop(self, activity_id: str, pid: int, ticks: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        with trio.move_on_after(TERMINATION_S):
            while self._is(activity_id, pid, ticks):
                await trio.sleep(0.05)
        if self._is(activity_id, pid, ticks):
            log.warning("activity %s: exe-unit %d did not end in %g s and is killed", activity_id[:8], pid, TERMINATION_S)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)

    def _clean(self, activity_id: str, runtime: str | None, code: int | None) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._leftovers.clean, activity_id, runtime, code)


async def _wait_gone(pid: int) -> None:
    """Return when a process that need not be a child of ours is gone."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        await trio.lowlevel.wait_readable(handle)
    finally:
        os.close(handle)
