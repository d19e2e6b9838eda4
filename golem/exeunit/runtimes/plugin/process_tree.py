"""Processes of a runtime that is a program of its own: started, listened to, metered and ended with all they started.

The exe-unit becomes their subreaper, so that a process whose parent has gone is a child of the exe-unit and is still
found, counted and killed; a process that calls setsid() or forks twice gets away from nothing. Each also dies when the
exe-unit does (`setpriv --pdeathsig`, for the direct children), and is marked in its environment, by which `sweep` finds
what a killed exe-unit left. None of this is a wall against hostile code: it is for programs the provider trusts.
Neighbour: `external`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from golem.exeunit.runtime import Side
from golem.exeunit.sandbox.lockdown import unlimit_memory
from golem.exeunit.supervisor import is_dead, own_mark
from golem.exeunit.usage import process_cpu_s

MARK = "GOLEM_SUPERVISOR"  # variable with the mark of the exe-unit
CHUNK_BYTES = 1 << 16
DRAIN_S = 0.1  # a pipe that stays empty that long after the end of its program, because others hold it open, is done
DRAIN_BYTES = 1 << 20  # at most what a pipe can hold
GIVE_UP_S = 1.0
KILL_S = 2.0
_PR_SET_CHILD_SUBREAPER = 36
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class ProgramEnd:
    """How a program ended: exit code, or the signal that killed it; `killed_for` is our own reason."""

    code: int | None
    signal: signal.Signals | None
    killed_for: str | None


@dataclass(frozen=True)
class _Stat:
    state: str
    session: int
    ticks: int
    rss_bytes: int


def _stat(pid: int) -> _Stat | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return _Stat(fields[0], int(fields[3]), int(fields[19]), int(fields[21]) * _PAGE_BYTES)


def _children(pid: int) -> list[int]:
    """Return the children of all threads of a process."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found


def _environ(pid: int) -> dict[str, str]:
    try:
        words = os.fsdecode(Path(f"/proc/{pid}/environ").read_bytes()).split("\0")
    except OSError:
        return {}
    return {name: value for name, separator, value in (word.partition("=") for word in words) if separator}


def sweep_processes(work_root: Path) -> list[str]:
    """Kill processes that dead exe-units with a working directory below `work_root` left; return a line for each."""
    said = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        environ = _environ(int(name))
        work = Path(environ.get("TMPDIR", "/"))
        if is_dead(environ.get(MARK, "")) and work.is_relative_to(work_root.resolve()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(name), signal.SIGKILL)
                said.append(f"process {name} of a runtime whose exe-unit is gone: killed")
    return said


class Tree:
    """Everything that the processes started here have started. What ran below this process before is left alone."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._foreign = {(pid, found.ticks) for pid in _children(os.getpid()) if (found := _stat(pid))}
        self._commands: dict[int, RunningProgram] = {}
        self._serial = 0
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        self._began_cpu_s = used.ru_utime + used.ru_stime
        self._seen: dict[tuple[int, int], float] = {}  # CPU seconds by process id and start
        self._vanished_cpu_s = 0.0
        self._cpu_s, self._peak_bytes = 0.0, 0

    def start(self, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, cpus: int, stdin: bool = False) -> RunningProgram:
        """Start a program in a session of its own, on at most `cpus` processors.

        Errors: OSError.
        """
        self._serial += 1
        marks = {MARK: own_mark(), "GOLEM_COMMAND": str(self._serial)}
        guard = shutil.which("setpriv")
        words = [guard, "--pdeathsig", "KILL", "--", *argv] if guard else list(argv)
        command = RunningProgram(self, words, {**env, **marks}, cwd, str(self._serial), stdin)
        self._commands[command.pid] = command
        allowed = sorted(os.sched_getaffinity(0))
        chosen = {allowed[(command.pid + n) % len(allowed)] for n in range(max(1, cpus))}
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(command.pid, chosen)
        return command

    def members(self, root: int | None = None) -> Iterator[int]:
        """All living processes below `root`, or below this process."""
        waiting = [root] if root is not None else [pid for pid in _children(os.getpid()) if not self._is_foreign(pid)]
        seen: set[int] = set()
        while waiting:
            pid = waiting.pop()
            if pid not in seen:
                seen.add(pid)
                yield pid
                waiting += _children(pid)

    def _is_foreign(self, pid: int) -> bool:
        found = _stat(pid)
        return found is None or (pid, found.ticks) in self._foreign

    def usage(self) -> tuple[float, int]:
        """CPU seconds and peak of resident bytes of all members together, so far.

        Two counts are kept, of which the larger holds: what the kernel says of children that were waited for, and what was
        seen of each process while it lived (a parent that ignores SIGCHLD has its children's time forgotten).
        """
        self._reap()
        alive: dict[tuple[int, int], float] = {}
        resident, unreaped_s = 0, 0.0
        for pid in self.members():
            if (found := _stat(pid)) is not None:
                key = (pid, found.ticks)
                alive[key] = max(process_cpu_s(pid), self._seen.get(key, 0.0))
                unreaped_s += alive[key]
                resident += found.rss_bytes
        self._vanished_cpu_s += sum(cpu_s for key, cpu_s in self._seen.items() if key not in alive)
        self._seen = alive
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        by_kernel = used.ru_utime + used.ru_stime - self._began_cpu_s + unreaped_s
        self._cpu_s = max(self._cpu_s, by_kernel, self._vanished_cpu_s + unreaped_s)
        self._peak_bytes = max(self._peak_bytes, resident)
        return self._cpu_s, self._peak_bytes

    def note_peak(self, peak_bytes: int) -> None:
        """Count what the kernel says of one process that has ended."""
        self._peak_bytes = max(self._peak_bytes, peak_bytes)

    def forget(self, pid: int) -> None:
        self._commands.pop(pid, None)

    def _reap(self) -> None:
        """Collect orphans that have ended; our own commands collect themselves."""
        for pid in _children(os.getpid()):
            if pid not in self._commands and not self._is_foreign(pid):
                with contextlib.suppress(ChildProcessError):
                    _, _, used = os.wait4(pid, os.WNOHANG)
                    self.note_peak(used.ru_maxrss * 1024)

    def kill(self, command: RunningProgram) -> int:
        """Kill what a command is and what it started, also what has left its session or lost its parent.

        Returns how many were still there: until there are none, one of them may have started another meanwhile. To be
        called before the command is collected: after that its number may be another's.
        """
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(command.pid, signal.SIGKILL)
        mine, count = set(self.members(command.pid)), 0
        for pid in self.members():
            found = _stat(pid)
            if found is None or found.state in "ZX":
                continue
            if pid in mine or found.session == command.pid or _environ(pid).get("GOLEM_COMMAND") == command.mark:
                _kill(pid)
                count += 1
        return count

    async def kill_fully(self, command: RunningProgram) -> None:
        """Kill a command until nothing of it is left; gives up after KILL_S."""
        with trio.move_on_after(KILL_S, shield=True):
            while self.kill(command):
                await trio.sleep(0.005)

    async def kill_all(self) -> None:
        """Kill every member, and those that they start meanwhile; gives up after KILL_S."""
        with trio.move_on_after(KILL_S):
            while True:
                self.usage()
                members = [pid for pid in self.members() if (found := _stat(pid)) and found.state not in "ZX"]
                if not members:
                    return
                for pid in members:
                    _kill(pid)
                await trio.sleep(0.005)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


class RunningProgram:
    """A running program; made by `Tree.start`, and to be closed."""

    def __init__(self, tree: Tree, argv: Sequence[str], env: Mapping[str, str], cwd: Path, mark: str, stdin: bool) -> None:
        # Not through trio's process support: it starts in a worker thread, at whose end the kernel would kill.
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(env),
            cwd=cwd,
            start_new_session=True,
        )
        self._tree, self.mark, self.pid = tree, mark, self._process.pid
        unlimit_memory(self.pid)
        self._pidfd = os.pidfd_open(self.pid)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._out = trio.lowlevel.FdStream(os.dup(self._process.stdout.fileno()))
        self._err = trio.lowlevel.FdStream(os.dup(self._process.stderr.fileno()))
        self._process.stdout.close()
        self._process.stderr.close()
        self.input: trio.lowlevel.FdStream | None = None
        if self._process.stdin is not None:
            self.input = trio.lowlevel.FdStream(os.dup(self._process.stdin.fileno()))
            self._process.stdin.close()
        self._killed_for: str | None = None
        self._killed = trio.Event()
        self._status: int | None = None
        self._gone = False
        self._waiting: set[trio.CancelScope] = set()

    def kill(self, reason: str) -> None:
        """SIGKILL for all of it; the first reason given is the one that is told."""
        if self._status is None:
            self._killed_for = self._killed_for or reason
            self._killed.set()
            self._tree.usage()
            self._tree.kill(self)

    async def chunks(self, side: Side) -> bytes:
        """Return the next output of one side, empty at its end."""
        stream = self._out if side == "stdout" else self._err
        while not self._gone:
            with trio.CancelScope() as scope:
                self._waiting.add(scope)
                try:
                    return bytes(await stream.receive_some(CHUNK_BYTES))
                finally:
                    self._waiting.discard(scope)
        with trio.move_on_after(DRAIN_S):  # others may hold the pipe open
            return bytes(await stream.receive_some(CHUNK_BYTES))
        return b""

    async def gone(self) -> None:
        """Wait for the end of the program itself; any number of tasks may."""
        handle = os.dup(self._pidfd)
        try:
            await trio.lowlevel.wait_readable(handle)
        finally:
            os.close(handle)
        self._gone = True
        for scope in self._waiting:
            scope.cancel()

    async def wait(
        self,
        output: Callable[[Side, bytes], Awaitable[None]],
        *,
        max_output_bytes: int,
        time_limit_s: float | None = None,
    ) -> ProgramEnd:
        """Hand on output until the program has ended; a slow `output` slows it."""
        total = 0

        async def pump(side: Side) -> None:
            nonlocal total
            left = DRAIN_BYTES
            while left > 0 and (chunk := await self.chunks(side)):
                room = max(0, max_output_bytes - total)
                total += len(chunk)
                left -= len(chunk) if self._gone else 0
                if chunk[:room]:
                    await output(side, chunk[:room])
                if total > max_output_bytes:
                    self.kill(f"output limit of {max_output_bytes} bytes reached")
                    return

        async def time_out(limit_s: float) -> None:
            await trio.sleep(limit_s)
            self.kill(f"time limit of {limit_s:g} s reached")

        async def give_up_after_kill(scope: trio.CancelScope) -> None:
            """Whoever takes the output may be why it had to be killed: do not wait for them for ever."""
            await self._killed.wait()
            await trio.sleep(GIVE_UP_S)
            scope.cancel()

        async with trio.open_nursery() as clock:
            if time_limit_s is not None:
                clock.start_soon(time_out, time_limit_s)
            async with trio.open_nursery() as pumps:
                clock.start_soon(give_up_after_kill, pumps.cancel_scope)
                pumps.start_soon(pump, "stdout")
                pumps.start_soon(pump, "stderr")
                await self.gone()
            clock.cancel_scope.cancel()
        if not self._gone:
            await self.gone()
        if self._killed_for is not None:
            await self._tree.kill_fully(self)
        self._reap()
        assert self._status is not None
        if os.WIFSIGNALED(self._status):
            return ProgramEnd(None, signal.Signals(os.WTERMSIG(self._status)), self._killed_for)
        return ProgramEnd(os.waitstatus_to_exitcode(self._status), None, self._killed_for)

    def _reap(self) -> None:
        if self._status is None:
            self._tree.usage()
            _, self._status, used = os.wait4(self.pid, 0)
            self._process.returncode = os.waitstatus_to_exitcode(self._status)
            self._tree.note_peak(used.ru_maxrss * 1024)
            self._tree.forget(self.pid)

    async def close(self) -> None:
        """Kill what is left of it, collect it, let go of its pipes. Not cancellable, and quick."""
        with trio.CancelScope(shield=True):
            if self._status is None:
                self.kill("cancelled")
                await self.gone()
                await self._tree.kill_fully(self)
                self._reap()
            for stream in (self._out, self._err, self.input):
                if stream is not None:
                    await stream.aclose()
        os.close(self._pidfd)
