"""A runtime for tests whose guest is this very machine: real pseudo-terminals, pipes and TCP, and no walls at all."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from golem.exeunit.runtime import (
    Deployment,
    DeployOptions,
    ExitStatus,
    ImageFormat,
    Interaction,
    OutputSink,
    RuntimeFault,
    Side,
    Usage,
)


class HostTerminal:
    """A process of this machine behind a pseudo-terminal or three pipes."""

    def __init__(self, process: trio.Process, master: int | None) -> None:
        self.process, self._master = process, master
        self._out_send, self._out = trio.open_memory_channel[tuple[Side, bytes]](0)
        self._stdin: trio.abc.SendStream | None = trio.lowlevel.FdStream(os.dup(master)) if master is not None else process.stdin

    async def pump(self) -> None:
        """Bring output; to be run beside."""
        sources: list[tuple[Side, Any]] = [("stdout", self.process.stdout), ("stderr", self.process.stderr)]
        if self._master is not None:
            sources = [("stdout", trio.lowlevel.FdStream(self._master))]

        async def read(side: Side, stream: Any) -> None:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError, OSError):  # EIO: the last slave has closed
                while data := await stream.receive_some(65536):
                    await self._out_send.send((side, bytes(data)))

        async with self._out_send, trio.open_nursery() as nursery:
            for side, stream in sources:
                nursery.start_soon(read, side, stream)

    async def send(self, data: bytes) -> None:
        if self._stdin is not None:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self._stdin.send_all(data)

    async def receive(self) -> tuple[Side, bytes] | None:
        try:
            return await self._out.receive()
        except trio.EndOfChannel:
            return None
        except trio.ClosedResourceError:
            raise RuntimeFault("the runtime is gone") from None

    async def resize(self, rows: int, cols: int) -> None:
        if self._master is not None:
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    async def end_input(self) -> None:
        if self._master is not None:
            await self.send(b"\x04")
        elif self._stdin is not None:
            await self._stdin.aclose()

    async def wait(self) -> ExitStatus:
        code = await self.process.wait()
        return ExitStatus(code if code >= 0 else 128 - code)

    async def aclose(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self._out.close()
        await self.process.wait()


class HostRuntime:
    """Give it a nursery before use. `terminals` are all that were opened."""

    name, version = "host", "1"
    formats = frozenset(ImageFormat)

    def __init__(self, nursery: trio.Nursery, interactions: Sequence[Interaction] = ("shell", "proxy-http")) -> None:
        self._nursery = nursery
        self.interactions: frozenset[Interaction] = frozenset(interactions)
        self.terminals: list[HostTerminal] = []
        self.ports: tuple[int, ...] = ()

    async def self_test(self) -> str | None:
        return None

    def offer_properties(self) -> dict[str, Any]:
        return {}

    async def deploy(self, image: Path, options: DeployOptions) -> Deployment:
        return Deployment((), ports=self.ports)

    async def start(self, args: Sequence[str]) -> None:
        pass

    async def run(self, entry_point: str, args: Sequence[str], output: OutputSink, env: Any = None) -> ExitStatus:
        result = await trio.run_process([entry_point, *args], capture_stdout=True, check=False)
        await output("stdout", result.stdout)
        return ExitStatus(result.returncode)

    async def stop(self) -> None:
        for terminal in self.terminals:
            await terminal.aclose()

    def usage(self) -> Usage:
        return Usage()

    async def failure(self) -> str:
        await trio.sleep_forever()
        raise AssertionError

    async def open_terminal(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None, tty: bool, rows: int, cols: int
    ) -> HostTerminal:
        environment = {"PATH": os.environ["PATH"], "PS1": "guest$ ", "TERM": "dumb", **(env or {})}
        master = None
        streams: Any = subprocess.PIPE
        if tty:
            master, streams = pty.openpty()
            fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
        try:
            process = await trio.lowlevel.open_process(
                list(argv) or ["/bin/sh"], stdin=streams, stdout=streams, stderr=streams, env=environment,
                start_new_session=True, preexec_fn=(lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)) if tty else None,
            )  # fmt: skip
        except OSError as error:
            raise RuntimeFault(f"cannot run {argv[0]}: {error.strerror}") from None
        finally:
            if tty:
                os.close(streams)
        terminal = HostTerminal(process, master)
        self.terminals.append(terminal)
        self._nursery.start_soon(terminal.pump)
        return terminal

    async def connect(self, port: int) -> trio.abc.HalfCloseableStream:
        try:
            return await trio.open_tcp_stream("127.0.0.1", port)
        except OSError as error:
            raise RuntimeFault(f"nothing answers: {error.strerror or error}") from None

    async def sweep(self, work_root: Path) -> list[str]:
        return []
