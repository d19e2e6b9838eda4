"""Starting, feeding on and ending one sandboxed child.

The child gets /dev/null as stdin, pipes as stdout and stderr, a pipe for its report, and nothing else but what is
passed on purpose. Its end is awaited through a pidfd and its CPU time taken from wait4, so no other child is ever
disturbed.
Neighbours: `lockdown` (what the child does to itself), `runtimes.wasm`, which uses this.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from golem.exeunit.runtime import Side
from golem.exeunit.usage import peak_from_status, process_cpu_s, process_peak_bytes

CHUNK_BYTES = 1 << 16
MAX_REPORT_BYTES = 1 << 16
DRAIN_AFTER_KILL_S = 1.0
SAMPLE_S = 0.25


@dataclass(frozen=True)
class ChildEnd:
    """How a child ended. Exactly one of `code` and `signal` is set; `killed_for` is the keeper's own reason."""

    code: int | None
    signal: signal.Signals | None
    killed_for: str | None
    report: bytes


class Child:
    """A running child; made by `open_child`."""

    def __init__(self, argv: Sequence[str], pass_fds: Sequence[int], report_fd: int) -> None:
        # Not through trio's process support: it forks in a worker thread, whose end would fire PR_SET_PDEATHSIG.
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=pass_fds,
            env={},
            cwd="/",
            start_new_session=True,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        self._stdout, self._stderr = self._process.stdout, self._process.stderr
        self._report_fd = report_fd
        self._killed = trio.Event()
        self._killed_for: str | None = None
        self._status: int | None = None
        self._cpu_s = 0.0
        self._peak_bytes = 0

    def kill(self, reason: str) -> None:
        """SIGKILL; the first reason given is the one that is told."""
        if self._status is None:
            self.peak_bytes()
            self._killed_for = self._killed_for or reason
            self._killed.set()
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def cpu_s(self) -> float:
        """CPU seconds so far, exact once the child has ended."""
        return self._cpu_s if self._status is not None else process_cpu_s(self.pid)

    def peak_bytes(self) -> int:
        """Peak resident memory so far."""
        if self._status is None:
            self._peak_bytes = max(self._peak_bytes, process_peak_bytes(self.pid))
        return self._peak_bytes

    async def wait(
        self,
        output: Callable[[Side, bytes], Awaitable[None]],
        *,
        max_output_bytes: int,
        time_limit_s: float | None = None,
    ) -> ChildEnd:
        """Hand on output until the child has ended and its pipes are dry; a slow `output` slows the child."""
        report = bytearray()
        total = 0

        async def pump(side: Side, stream: trio.lowlevel.FdStream) -> None:
            nonlocal total
            while chunk := await stream.receive_some(CHUNK_BYTES):
                room = max(0, max_output_bytes - total)
                total += len(chunk)
                if chunk[:room]:
                    await output(side, chunk[:room])
                if total > max_output_bytes:
                    self.kill(f"output limit of {max_output_bytes} bytes reached")
                    return

        async def pump_report(stream: trio.lowlevel.FdStream) -> None:
            while chunk := await stream.receive_some(CHUNK_BYTES):
                report.extend(chunk[: MAX_REPORT_BYTES - len(report)])

        async def time_out(limit_s: float) -> None:
            await trio.sleep(limit_s)
            self.kill(f"time limit of {limit_s:g} s reached")

        async def sample_memory() -> None:
            """A child that the kernel ends (limits on CPU time or memory) can no longer tell its peak itself."""
            while True:
                self.peak_bytes()
                await trio.sleep(SAMPLE_S)

        async def give_up_after_kill(scope: trio.CancelScope) -> None:
            """Whoever takes the output may be why the child had to be killed: do not wait for them for ever."""
            await self._killed.wait()
            await trio.sleep(DRAIN_AFTER_KILL_S)
            scope.cancel()

        async with trio.open_nursery() as clock:
            clock.start_soon(sample_memory)
            if time_limit_s is not None:
                clock.start_soon(time_out, time_limit_s)
            async with (
                trio.lowlevel.FdStream(os.dup(self._stdout.fileno())) as out,
                trio.lowlevel.FdStream(os.dup(self._stderr.fileno())) as err,
                trio.lowlevel.FdStream(os.dup(self._report_fd)) as rep,
                trio.open_nursery() as pumps,
            ):
                pumps.start_soon(pump, "stdout", out)
                pumps.start_soon(pump, "stderr", err)
                pumps.start_soon(pump_report, rep)
                clock.start_soon(give_up_after_kill, pumps.cancel_scope)
                await trio.lowlevel.wait_readable(self._pidfd)
            clock.cancel_scope.cancel()
        self._peak_bytes = max(self._peak_bytes, _reported_peak(bytes(report)))
        return self._ended(bytes(report))

    def _ended(self, report: bytes) -> ChildEnd:
        self.reap()
        assert self._status is not None
        if os.WIFSIGNALED(self._status):
            return ChildEnd(None, signal.Signals(os.WTERMSIG(self._status)), self._killed_for, report)
        return ChildEnd(os.waitstatus_to_exitcode(self._status), None, self._killed_for, report)

    def reap(self) -> None:
        """Collect the ended child; blocks if it has not ended."""
        if self._status is None:
            _, self._status, used = os.wait4(self.pid, 0)
            self._cpu_s = used.ru_utime + used.ru_stime
            self._process.returncode = os.waitstatus_to_exitcode(self._status)

    async def end(self) -> None:
        """Kill if still alive, reap, close everything. Not cancellable, and quick."""
        with trio.CancelScope(shield=True):
            self.kill("cancelled")
            if self._status is None:
                await trio.lowlevel.wait_readable(self._pidfd)
                self.reap()
        self._stdout.close()
        self._stderr.close()
        os.close(self._pidfd)


def _reported_peak(report: bytes) -> int:
    """The child sends the text of its /proc/self/status after a NUL; its own figure outlives the process."""
    return peak_from_status(report.partition(b"\0")[2])


@asynccontextmanager
async def open_child(argv: Callable[[int, int], Sequence[str]], spec: bytes, files: Sequence[int] = ()) -> AsyncIterator[Child]:
    """Start a child and see it to its end.

    `argv(spec_fd, report_fd)` gives its command line; `spec` is what it can read from the first, `files` are further
    descriptors it inherits under the same numbers.
    Errors: OSError when it cannot be started.
    """
    spec_fd = os.memfd_create("spec", os.MFD_CLOEXEC)
    report_read, report_write = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            os.write(spec_fd, spec)
            os.lseek(spec_fd, 0, os.SEEK_SET)
            child = Child(argv(spec_fd, report_write), (spec_fd, report_write, *files), report_read)
        finally:
            os.close(spec_fd)
            os.close(report_write)
        try:
            yield child
        finally:
            await child.end()
    finally:
        os.close(report_read)
