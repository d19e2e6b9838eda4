"""The user's end of a program in an activity: this terminal (or these pipes) and the node's websocket, joined.

With a terminal at both ends it is raw: every key, Ctrl-C too, goes to the program; `~.` at the beginning of a line hangs
up (`~~` is a `~`). Neighbours: `golem/rest/interaction.py` says what goes over the websocket; `activity.py` begins it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import termios
import tty
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any
from urllib.parse import urlencode

import click
import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, HandshakeError, WebSocketConnection, open_websocket_url

from golem.base.printing import quoted
from golem.cli.output import say
from protocol.interaction import ACK_BYTES, WINDOW_BYTES

READ_BYTES = 32 << 10
MAX_MESSAGE_BYTES = 1 << 20
CONNECT_S, CLOSE_S = 60.0, 2.0
LOST = 255  # exit status where the program's own is not known, as ssh has it


class ProgramLost(click.ClickException):
    """A program that could not be begun, or that was lost."""

    exit_code = LOST

    def __init__(self, message: str) -> None:
        super().__init__(quoted(message))


class Escapes:
    """Finds what the user says to us among what is typed: `~.` at the beginning of a line."""

    def __init__(self) -> None:
        self._at_start, self._tilde = True, False

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """Return what goes on to the program, and whether the user hangs up."""
        out = bytearray()
        for byte in data:
            if self._tilde:
                self._tilde = False
                if byte == ord("."):
                    return bytes(out), True
                if byte != ord("~"):
                    out.append(ord("~"))
            elif self._at_start and byte == ord("~"):
                self._tilde = True
                continue
            out.append(byte)
            self._at_start = byte in b"\r\n"
        return bytes(out), False


@contextmanager
def raw_terminal(fd: int) -> Iterator[None]:
    """Have a terminal hand over every key as it is; whatever happens, it is as before afterwards."""
    saved = termios.tcgetattr(fd)
    try:
        tty.setraw(fd)
        yield
    finally:
        with suppress(termios.error):  # the terminal itself is gone
            termios.tcsetattr(fd, termios.TCSANOW, saved)


def run_program(
    access: Mapping[str, str], activity_id: str, argv: Sequence[str], env: Mapping[str, str], *, terminal: bool, stdin: bool
) -> int:
    """Run a program in an activity with this process's terminal or pipes; returns its exit status.

    `access`: REST address and key. `terminal`: give it one, ours. `stdin`: hand our input on. Raises `ProgramLost`.
    """
    size = os.get_terminal_size(sys.stdin.fileno()) if terminal else os.terminal_size((80, 24))
    query: list[tuple[str, Any]] = [("flow", 1), ("tty", int(terminal))]
    query += [("rows", max(size.lines, 1)), ("cols", max(size.columns, 1))]
    query += [("cmd", word) for word in argv] + [("env", f"{name}={value}") for name, value in env.items()]
    url = f"{access['url'].replace('http', 'ws', 1)}/activity-api/v1/activity/{activity_id}/shell?{urlencode(query)}"
    return trio.run(_connect, url, access["key"], terminal, stdin)


async def _connect(url: str, key: str, terminal: bool, stdin: bool) -> int:
    try:
        async with open_websocket_url(
            url, extra_headers=[(b"Authorization", f"Bearer {key}".encode())], max_message_size=MAX_MESSAGE_BYTES,
            connect_timeout=CONNECT_S, disconnect_timeout=CLOSE_S,
        ) as socket:  # fmt: skip
            program = _Program(socket, terminal, stdin)
            await program.run()
    except ConnectionRejected as refused:
        raise ProgramLost(_message(refused)) from None
    except (HandshakeError, OSError) as error:
        raise ProgramLost(f"the node's REST API did not answer: {str(error) or type(error).__name__}") from None
    if program.problem is not None:
        raise ProgramLost(program.problem)
    return LOST if program.status is None else program.status


def _message(refused: ConnectionRejected) -> str:
    body = (refused.body or b"").decode(errors="replace")
    try:
        return f"{json.loads(body)['message']} ({refused.status_code})"
    except (ValueError, KeyError, TypeError):
        return f"{body[:300] or 'refused'} ({refused.status_code})"


class _Program:
    """One program and its five tasks: input, output, window, signals, and the wait for the end."""

    def __init__(self, socket: WebSocketConnection, terminal: bool, stdin: bool) -> None:
        self._socket, self._terminal, self._stdin = socket, terminal, stdin
        self._untaken = 0
        self._taken = 0  # bytes of output written that the node was not told of
        self._room = trio.Event()
        self.status: int | None = None
        self.problem: str | None = None

    async def run(self) -> None:
        """Until `status` or `problem` says how it ended; neither, where the user hung up."""
        fd = sys.stdin.fileno() if self._stdin else -1
        with raw_terminal(fd) if self._terminal else nullcontext():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._signals, nursery.cancel_scope)
                nursery.start_soon(self._input, fd, nursery.cancel_scope)
                await self._output()
                nursery.cancel_scope.cancel()

    # -- to the program
    async def _input(self, fd: int, scope: trio.CancelScope) -> None:
        escapes = Escapes()
        if self._stdin:
            async for data in _read(fd):
                hung_up = False
                if self._terminal:
                    data, hung_up = escapes.feed(data)
                await self._send(data)
                if hung_up:
                    say("", end="\r\n")
                    say("Hung up.", end="\r\n")
                    scope.cancel()
                    return
        with suppress(ConnectionClosed):
            await self._socket.send_message('{"end": true}')

    async def _send(self, data: bytes) -> None:
        """Send input, never so much that the node would stop to listen to us."""
        for at in range(0, len(data), READ_BYTES):
            piece = data[at : at + READ_BYTES]
            while self._untaken + len(piece) > WINDOW_BYTES:
                self._room = trio.Event()
                await self._room.wait()
            self._untaken += len(piece)
            with suppress(ConnectionClosed):  # the other task hears why
                await self._socket.send_message(piece)

    async def _signals(self, scope: trio.CancelScope) -> None:
        wanted = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]
        with trio.open_signal_receiver(*wanted, signal.SIGWINCH) as signals:
            async for number in signals:
                if number != signal.SIGWINCH:
                    self.status = 128 + number
                    scope.cancel()  # hangs up, which kills the program
                    return
                if self._terminal:
                    size = os.get_terminal_size(sys.stdin.fileno())
                    if size.lines and size.columns:
                        with suppress(ConnectionClosed):
                            await self._socket.send_message(json.dumps({"resize": [size.lines, size.columns]}))

    # -- from the program
    async def _output(self) -> None:
        try:
            while self.status is None and self.problem is None:
                message = await self._socket.get_message()
                if isinstance(message, str):
                    self._hear(message)
                else:
                    await self._show(message)
        except ConnectionClosed as closed:
            self.problem = f"the connection to the activity was lost: {closed.reason or 'closed'}"
        except BrokenPipeError:
            self.status = 128 + signal.SIGPIPE  # nobody reads our output any more

    async def _show(self, message: bytes) -> None:
        """Write output, and have more of it come when that is done: until then nothing waits on the way."""
        if self._terminal:
            await _write(sys.stdout.fileno(), message)
        else:
            await _write((sys.stderr if message[:1] == b"\2" else sys.stdout).fileno(), message[1:])
        self._taken += len(message) - (not self._terminal)
        if self._taken >= ACK_BYTES:
            told, self._taken = self._taken, 0
            with suppress(ConnectionClosed):  # what came before it is still to be read
                await self._socket.send_message(json.dumps({"taken": told}))

    def _hear(self, message: str) -> None:
        match json.loads(message):
            case {"taken": int() as size}:
                self._untaken -= size
                self._room.set()
            case {"exit": int() as code, "reason": reason}:
                if reason:
                    say(str(reason), end="\r\n" if self._terminal else "\n")
                self.status = code if 0 <= code <= 255 else 1
            case {"error": str() as text}:
                self.problem = text


async def _read(fd: int) -> AsyncIterator[bytes]:
    """Yield what comes at a descriptor that is not ours to make non-blocking: others share it."""
    while True:
        with suppress(PermissionError):  # a file: it is always ready
            await trio.lowlevel.wait_readable(fd)
        try:
            data = os.read(fd, READ_BYTES)
        except OSError:  # a terminal that has hung up
            return
        if not data:
            return
        yield data


async def _write(fd: int, data: bytes) -> None:
    """Write all, in a thread: whoever reads it may be slow. Raises `BrokenPipeError`."""

    def write() -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    await trio.to_thread.run_sync(write, abandon_on_cancel=True)
