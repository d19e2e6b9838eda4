"""A program in a container while somebody attends to it: its output, its end, and its terminal.

An Engine closes a program's streams when it has ended and nobody else holds them; a service that the program left in the
background may hold them for ever. So a program is over when the Engine says that its process is, and what it wrote is
complete when nothing has come for a moment after that.
Neighbours: `client` (the streams); `golem.exeunit.runtimes.vm.runtime` starts programs and kills them.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from golem.exeunit.runtime import ExitStatus, RuntimeFault, Side
from golem.exeunit.runtimes.vm.client import EngineClient, ExecState, ExecStream

FIRST_LOOK_S, SLOWEST_LOOK_S = 0.1, 1.0  # between questions to the Engine
QUIET_S = 0.3  # of silence after the end of a program whose streams another one holds
DRAIN_S = 3.0  # no longer than that, even if the other one goes on writing
START_TIMEOUT_S = 10.0  # an Engine that has begun no program by then waits for what the guest has put in its way
_NOT_STARTED = b"OCI runtime exec failed: "  # how Engines say, as output, that there is no program
_MISSING = ("executable file not found", "no such file or directory")
_NO_PROGRAM = re.compile(
    rb"exec [^\n]{1,4200}: (exec format error|permission denied|argument list too long)\n\Z"
)  # the same of runc
NOT_FOUND, CANNOT_RUN = 127, 126  # as shells tell them


class NeverBegun(RuntimeFault):
    """The Engine was told to start a program, and after a long while there is none: the container is as good as dead."""

    def __init__(self) -> None:
        super().__init__(f"the container begins no programs any more (none within {START_TIMEOUT_S:g} s)")


class Program:
    """A started program. One task at a time may call it."""

    def __init__(self, client: EngineClient, stream: ExecStream, on_left: Callable[[], None] | None = None) -> None:
        """`on_left` is called when the program has ended and another one still holds its streams."""
        self.id = stream.id
        self._client, self._stream, self._on_left = client, stream, on_left
        self._look_s = FIRST_LOOK_S
        self._look_at = trio.current_time() + FIRST_LOOK_S
        self._begins_until: float | None = trio.current_time() + START_TIMEOUT_S  # None: it has begun
        self._ended: ExecState | None = None
        self._deadline = float("inf")  # to drain until, once it has ended
        self._first = True
        self._doubt: bytes | None = None  # the only output so far, which may be runc's and not a program's
        self.problem: str | None = None  # why there is no program

    async def receive(self) -> tuple[Side, bytes] | None:
        """Return the next output, None when there will be no more. Errors: RuntimeFault."""
        while True:
            now_s = trio.current_time()
            if self._ended is None and now_s >= self._look_at:
                await self._look()
                continue
            deadline = self._look_at if self._ended is None else min(now_s + QUIET_S, self._deadline)
            with trio.CancelScope(deadline=deadline) as scope:
                part = await self._stream.receive()
                if part is not None and self._first:
                    self._first = False
                    if part[1].startswith(_NOT_STARTED):
                        self.problem = part[1][len(_NOT_STARTED) :].decode(errors="replace").strip()
                        continue
                    match = _NO_PROGRAM.match(part[1])
                    self._doubt = match[1] if match is not None else None
                elif part is not None:
                    self._doubt = None
                return part
            if scope.cancelled_caught and self._ended is not None:
                return None

    async def _look(self) -> None:
        state = await self._state()
        self._look_s = min(SLOWEST_LOOK_S, 2 * self._look_s)
        self._look_at = trio.current_time() + self._look_s
        if not state.running and state.exit_code is not None:
            self._ended = state
            self._deadline = trio.current_time() + DRAIN_S
            if self._on_left is not None:
                self._on_left()

    async def _state(self) -> ExecState:
        """Ask how it is. Errors: NeverBegun, as of all that asks."""
        state = await self._client.inspect_exec(self.id)
        if state.pid or state.exit_code is not None:
            self._begins_until = None
        elif self._begins_until is not None and trio.current_time() > self._begins_until:
            raise NeverBegun
        return state

    async def exit_code(self) -> int:
        """Wait for the end of the process; to be called when there is no more output. Errors: RuntimeFault."""
        pause_s = 0.0
        while self._ended is None:
            state = await self._state()
            if not state.running and state.exit_code is not None:
                self._ended = state
            else:
                await trio.sleep(pause_s)
                pause_s = min(0.5, pause_s + 0.01)
        assert self._ended.exit_code is not None
        if self.problem is None and self._doubt is not None and self._ended.exit_code in (1, 255):
            self.problem = self._doubt.decode()
        if self.problem is not None:
            return NOT_FOUND if any(text in self.problem for text in _MISSING) else CANNOT_RUN
        return self._ended.exit_code

    @property
    def ended(self) -> bool:
        """Whether its process is known to be over."""
        return self._ended is not None


class EngineTerminal:
    """`base.Terminal` on a program in a container."""

    def __init__(
        self,
        client: EngineClient,
        stream: ExecStream,
        tty: bool,
        kill: Callable[[EngineTerminal], Awaitable[None]],
        died: Callable[[RuntimeFault], Awaitable[RuntimeFault]],
    ) -> None:
        """`kill` ends the program; `died` tells why the Engine failed."""
        self.id = stream.id
        self._client, self._stream, self._tty, self._kill, self._died = client, stream, tty, kill, died
        self._program = Program(client, stream)
        self._over, self._closed = trio.Event(), False
        self.pid: int | None = None  # the machine's number of its process

    async def send(self, data: bytes) -> None:
        await self._stream.send(data)

    async def receive(self) -> tuple[Side, bytes] | None:
        try:
            part = await self._program.receive()
        except RuntimeFault as fault:
            raise await self._died(fault) from None
        if part is None:
            self._over.set()
        return part

    async def resize(self, rows: int, cols: int) -> None:
        if self._tty and not self._over.is_set():
            with suppress(RuntimeFault):  # it has just ended, or not quite begun: then it is asked again
                await self._client.resize_exec(self.id, rows, cols)

    async def begin(self, rows: int, cols: int) -> None:
        """Wait until the program is there (or has ended), and set the size of its terminal. Errors: RuntimeFault."""
        while self.pid is None:
            state = await self._program._state()
            self.pid = state.pid or None
            if state.exit_code is not None:
                break
            await trio.sleep(0.005)
        await self.resize(rows, cols)

    async def drop(self) -> None:
        """Let go: the whole container goes away."""
        self._closed = True
        await self._stream.aclose()
        self._over.set()

    async def end_input(self) -> None:
        if self._tty:
            await self._stream.send(b"\x04")
        else:
            await self._stream.end_input()

    async def wait(self) -> ExitStatus:
        await self._over.wait()
        try:
            code = await self._program.exit_code()
            return ExitStatus(code, self._program.problem)
        except RuntimeFault as fault:
            raise await self._died(fault) from None

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        with trio.CancelScope(shield=True):
            if not self._program.ended:
                await self._kill(self)
            await self._stream.aclose()
        self._over.set()
