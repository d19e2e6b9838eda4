"""The shell and the services of a running activity, at the exe-unit: what comes by the streams it dials back on.

Every stream carries one program with live input (`Runtime.open_terminal`) or one TCP connection into the guest
(`Runtime.connect`). A stream that ends has hung up: its program is killed. What runs here runs in the activity's own
container and is counted and limited with it. Neighbours: `protocol/interaction.py` says what goes over a stream,
`golem/interaction/broker.py` is at the other ends; `process.py` knows the state of the activity.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import trio

from golem.exeunit.places import hidden
from golem.exeunit.runtime import ExitStatus, Interaction, Runtime, RuntimeFault, Side, Terminal, check_arguments
from golem.interaction.wire import FAREWELL_S, OPEN_S, Channel
from golem.net.types import RemoteError, Unreachable
from protocol.interaction import (
    DATA_BYTES,
    STDERR,
    STDOUT,
    WINDOW_BYTES,
    Connect,
    InteractionFault,
    OpenTerminal,
    check_request,
    check_window,
)
from protocol.live import Dialling, NotDialling
from protocol.states import ActivityState

log = logging.getLogger("golem.exeunit")

KINDS: tuple[Interaction, ...] = ("shell", "proxy-http")
MAX_STREAMS = 64  # open at a time
DEFAULT_PORT = 80
_NAMES = {"shell": "shells", "proxy-http": "connections to services (proxy-http)"}


def allowed_interactions(text: str | None, runtime: Runtime) -> frozenset[Interaction]:
    """Return what of `text` ("shell,proxy-http"; "" is nothing, None is everything) this runtime has.

    Errors: ValueError for an unknown word.
    """
    if text is None:
        return runtime.interactions
    wanted = {word.strip() for word in text.split(",") if word.strip()}
    if unknown := sorted(wanted.difference(KINDS)):
        raise ValueError(f"unknown interaction {unknown[0][:40]!r}, expected some of {', '.join(KINDS)}")
    return frozenset(kind for kind in KINDS if kind in wanted and kind in runtime.interactions)


class UnitInteractions:
    """The open streams of one activity.

    `state()` is the activity's state; `dial()` opens the stream back; `ports()` are the ports the image exposes.
    """

    def __init__(
        self,
        activity_id: str,
        runtime: Runtime,
        allowed: frozenset[Interaction],
        state: Callable[[], str],
        dial: Callable[[], Awaitable[trio.abc.Stream]],
        ports: Callable[[], Sequence[int]] = tuple,
    ) -> None:
        self._activity_id, self._runtime, self._allowed = activity_id, runtime, allowed
        self._state, self._dial, self._ports = state, dial, ports
        self._open: set[trio.CancelScope] = set()
        self._ended: str | None = None  # why nothing can be opened any more

    def call(self, nursery: trio.Nursery, token: str) -> Dialling | NotDialling:
        """Answer the node's call to dial back: a task of `nursery` does it, where nothing is against it."""
        try:
            self._check_open()
        except InteractionFault as fault:
            return NotDialling(fault.code, hidden(str(fault)))
        scope = trio.CancelScope()
        self._open.add(scope)
        nursery.start_soon(self._serve, token, scope)
        return Dialling()

    def end(self, why: str) -> None:
        """End all that is open and refuse what comes, telling why."""
        self._ended = why
        for scope in self._open:
            scope.cancel()

    def _check_open(self) -> None:
        if self._ended is not None or self._state() == ActivityState.TERMINATED:
            raise InteractionFault("gone", self._ended or "the activity has ended")
        if len(self._open) >= MAX_STREAMS:
            raise InteractionFault("busy", f"the activity has {MAX_STREAMS} open shells and connections already")

    def _check(self, kind: Interaction) -> None:
        if kind not in self._runtime.interactions:
            what = "shell" if kind == "shell" else "services to connect to"
            raise InteractionFault("unsupported", f"runtime {self._runtime.name} has no {what}")
        if kind not in self._allowed:
            raise InteractionFault("forbidden", f"the provider does not allow {_NAMES[kind]}")
        if (state := self._state()) != ActivityState.READY:
            raise InteractionFault("conflict", f"the activity is not started: it is {state.lower()}, deploy and start it first")

    async def _serve(self, token: str, scope: trio.CancelScope) -> None:
        try:
            try:
                stream = await self._dial()
            except (Unreachable, RemoteError) as error:
                log.warning("cannot dial back to the node: %s", error)
                return
            channel = Channel(stream)
            try:
                with scope:
                    await self._session(token, channel)
                if scope.cancelled_caught and self._ended:
                    await _tell(channel, InteractionFault("gone", self._ended))
            finally:
                with trio.CancelScope(shield=True):
                    await trio.aclose_forcefully(stream)
        finally:
            self._open.discard(scope)

    async def _session(self, token: str, channel: Channel) -> None:
        try:
            await channel.write("token", token, self._activity_id, timeout_s=OPEN_S)
            match check_request(await channel.read(OPEN_S)):
                case OpenTerminal() as request:
                    self._check("shell")
                    await self._terminal(request, channel)
                case Connect(port):
                    self._check("proxy-http")
                    await self._connect(port, channel)
        except InteractionFault as fault:
            await _tell(channel, fault)
        except (RuntimeFault, OSError) as fault:
            await _tell(channel, InteractionFault("refused", str(fault)))
        except Exception as error:
            # a bug of ours or of a runtime ends this stream and is told; the activity goes on
            log.exception("interaction failed")
            await _tell(channel, InteractionFault("refused", f"internal error of the exe-unit: {type(error).__name__}"))

    async def _terminal(self, request: OpenTerminal, channel: Channel) -> None:
        check_arguments([*request.argv, *(f"{name}={value}" for name, value in request.env.items())])
        terminal = await self._runtime.open_terminal(
            tuple(request.argv), env=request.env, tty=request.tty, rows=request.rows, cols=request.cols
        )
        try:
            await channel.write("ok")
            await _Session(terminal, channel).run()
            await channel.finish(FAREWELL_S)
        finally:
            with trio.CancelScope(shield=True):
                await terminal.aclose()

    async def _connect(self, port: int, channel: Channel) -> None:
        if port == 0:
            exposed = self._ports()
            if len(exposed) > 1:
                listed = ", ".join(map(str, sorted(exposed)[:20]))
                raise InteractionFault("bad_request", f"the image exposes several ports ({listed}): say which one")
            port = exposed[0] if exposed else DEFAULT_PORT
        try:
            guest = await self._runtime.connect(port)
        except RuntimeFault as fault:
            raise InteractionFault("refused", f"port {port} of the activity: {fault}") from None
        try:
            await channel.write("ok")
            await _Session(_Connection(guest), channel, two_ends=True).run()
            await channel.finish(FAREWELL_S)
        finally:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(guest)


class _Connection:
    """A TCP connection to a service, looked at as a program with input and output."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self._stream = stream
        self._input_ended = trio.Event()

    async def send(self, data: bytes) -> None:
        with suppress(trio.BrokenResourceError):  # it may have answered before it stopped to listen
            await self._stream.send_all(data)

    async def receive(self) -> tuple[Side, bytes] | None:
        try:
            data = await self._stream.receive_some(DATA_BYTES)
        except trio.BrokenResourceError:
            raise RuntimeFault("the service broke the connection off") from None
        return ("stdout", bytes(data)) if data else None

    async def resize(self, rows: int, cols: int) -> None:
        raise InteractionFault("bad_request", "a connection has no window")

    async def end_input(self) -> None:
        with suppress(trio.BrokenResourceError):
            await self._stream.send_eof()
        self._input_ended.set()

    async def wait(self) -> ExitStatus:
        await self._input_ended.wait()
        return ExitStatus(0)

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._stream)


class _Session:
    """One program with live input: three tasks between its terminal and its stream.

    With `two_ends` the end of its output is told for itself: it may go on to read.
    """

    def __init__(self, terminal: Terminal, channel: Channel, *, two_ends: bool = False) -> None:
        self._terminal, self._channel, self._two_ends = terminal, channel, two_ends
        self._input, self._inputs = trio.open_memory_channel[bytes](WINDOW_BYTES)
        self._waiting = 0  # bytes of input that the program has not taken
        self._untaken = 0  # bytes of output that the requestor has not taken
        self._room = trio.Event()
        self._fault: InteractionFault | RuntimeFault | None = None

    async def run(self) -> None:
        """Until the program has ended and its status is told. Raises `InteractionFault`, `RuntimeFault`."""
        async with trio.open_nursery() as nursery:
            for task in (self._read, self._feed, self._report):
                nursery.start_soon(self._guard, task, nursery.cancel_scope)
        if self._fault is not None:
            raise self._fault

    async def _guard(self, task: Callable[[trio.CancelScope], Awaitable[None]], scope: trio.CancelScope) -> None:
        try:
            await task(scope)
        except (InteractionFault, RuntimeFault) as fault:
            self._fault = self._fault or fault
            scope.cancel()

    async def _read(self, scope: trio.CancelScope) -> None:
        """Take frames as they come; their end is a hang-up, whatever the program is doing."""
        ended = False
        while (frame := await self._channel.read()) is not None:
            match frame:
                case ["input", bytes() as data] if data and not ended:
                    self._waiting += len(data)
                    if self._waiting > WINDOW_BYTES:
                        raise InteractionFault("bad_request", f"more than {WINDOW_BYTES} bytes of input on the way")
                    self._input.send_nowait(data)  # every frame has a byte at least: it cannot be full
                case ["end"]:
                    ended = True
                    self._input.close()
                case ["taken", int() as size] if size >= 0:
                    self._untaken = max(0, self._untaken - size)
                    self._room.set()
                case ["resize", int() as rows, int() as cols]:
                    check_window(rows, cols)
                    await self._terminal.resize(rows, cols)
                case _:
                    raise InteractionFault("bad_request", "not a frame of a terminal")
        scope.cancel()

    async def _feed(self, scope: trio.CancelScope) -> None:
        async for data in self._inputs:
            await self._terminal.send(data)
            self._waiting -= len(data)
            await self._channel.write("taken", len(data))
        await self._terminal.end_input()

    async def _report(self, scope: trio.CancelScope) -> None:
        while (output := await self._terminal.receive()) is not None:
            side, data = output
            for at in range(0, len(data), DATA_BYTES):
                piece = data[at : at + DATA_BYTES]
                while self._untaken + len(piece) > WINDOW_BYTES:
                    self._room = trio.Event()
                    await self._room.wait()
                self._untaken += len(piece)
                await self._channel.write("output", STDERR if side == "stderr" else STDOUT, piece)
        if self._two_ends:
            await self._channel.write("end")
        status = await self._terminal.wait()
        await self._channel.write("exit", status.code, status.reason)
        scope.cancel()


async def _tell(channel: Channel, fault: InteractionFault) -> None:
    """Send a fault to the requestor, if it still listens."""
    with suppress(InteractionFault):
        await channel.write("error", fault.code, hidden(str(fault))[:2000], timeout_s=FAREWELL_S)
        await channel.finish(FAREWELL_S)


def capabilities(named: Any, allowed: frozenset[Interaction]) -> list[str]:
    """Return the offer's capabilities: those the runtime named itself, and what may be done beside commands."""
    found = [word for word in named if isinstance(word, str)] if isinstance(named, list) else []
    return found + [kind for kind in KINDS if kind in allowed and kind not in found]
