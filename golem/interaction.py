"""Byte streams from a requestor to the exe-unit of its activity, at both nodes.

At the requestor's: `open_terminal` and `connect`. At the provider's: who asks must be the activity's requestor; the
exe-unit is asked by a live call to dial back, with a token that counts once, and the two streams are joined. What may be
asked of it the exe-unit says. Neighbours: `interaction_wire.py` says what goes over the streams.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
import trio

from actors.activity import ActivityRow
from golem.interaction_wire import (
    ACK_BYTES,
    BACK,
    DATA_BYTES,
    FAREWELL_S,
    OPEN_S,
    STDERR,
    STDOUT,
    STREAM,
    WINDOW_BYTES,
    Channel,
    Connect,
    InteractionFault,
    OpenTerminal,
    Request,
    check_request,
    check_window,
)
from golem.net.types import RemoteError, Unreachable
from golem.router import EXEUNIT, Router, splice

log = logging.getLogger("golem.interaction")

ENDED = "the activity has ended"
MAX_DIALLING = 64  # streams that wait for their exe-unit


@dataclass
class _Dialling:
    """A stream that waits for its exe-unit, and for as long as it has it."""

    activity_id: str
    channel: Channel | None = None
    there: trio.Event = field(default_factory=trio.Event)
    over: trio.Event = field(default_factory=trio.Event)


class Interactions:
    """The streams of one node. `row_of(activity id)` is the node's row of an activity, None if it knows none."""

    def __init__(self, me: str, router: Router, row_of: Callable[[str], ActivityRow | None]) -> None:
        self._me, self._router, self._row_of = me, router, row_of
        self._dialling: dict[str, _Dialling] = {}
        router.serve_stream(STREAM, self._serve)
        router.serve_stream(BACK, self._take)

    # -- at the requestor's node
    async def open_terminal(self, row: ActivityRow, request: OpenTerminal) -> TerminalClient:
        """Start a program in an activity. Raises `InteractionFault`."""
        return TerminalClient(await self._open(row, request))

    async def connect(self, row: ActivityRow, port: int) -> Channel:
        """Open a TCP connection to a service of an activity. Raises `InteractionFault`."""
        return await self._open(row, Connect(port))

    async def _open(self, row: ActivityRow, request: Request) -> Channel:
        check_request(msgspec.to_builtins(request))
        if row.ended:
            raise InteractionFault("gone", ENDED)
        try:
            channel = Channel(await self._router.open_stream(row.provider, STREAM))
        except (Unreachable, RemoteError) as error:
            raise InteractionFault("unreachable", f"the provider cannot be reached: {error}") from None
        opened = False
        try:
            await channel.write("open", row.activity_id, timeout_s=OPEN_S)
            await channel.write(*msgspec.to_builtins(request), timeout_s=OPEN_S)
            answer = await channel.read(OPEN_S * 2)
            if answer is None:
                raise InteractionFault("lost", "the exe-unit went away")
            _raise_error(answer)
            if answer != ["ok"]:
                raise InteractionFault("lost", "the exe-unit answers nonsense")
            opened = True
            return channel
        finally:
            if not opened:
                with trio.CancelScope(shield=True):
                    await channel.aclose()

    # -- at the provider's node
    async def _serve(self, sender: str, stream: Any) -> None:
        near = Channel(stream)
        try:
            match await near.read(OPEN_S):
                case ["open", str() as activity_id]:
                    await self._join(sender, activity_id, near)
                case _:
                    raise InteractionFault("bad_request", "expected the id of an activity")
        except InteractionFault as fault:
            log.debug("stream of %s: %s", sender, fault)
            await _tell(near, fault)
        finally:
            with trio.CancelScope(shield=True):
                await near.aclose()

    async def _join(self, sender: str, activity_id: str, near: Channel) -> None:
        row = self._row_of(activity_id[:64])
        if row is None or row.role != "Provider" or row.requestor != sender:
            raise InteractionFault("forbidden", "not an activity of this requestor")
        if row.ended:
            raise InteractionFault("gone", ENDED)
        if len(self._dialling) >= MAX_DIALLING:
            raise InteractionFault("busy", "too many streams wait for their exe-units")
        token = secrets.token_hex(16)
        dialling = self._dialling[token] = _Dialling(activity_id)
        try:
            try:
                await self._dial(activity_id, token, dialling)
            finally:
                self._dialling.pop(token, None)  # it counts once
            assert dialling.channel is not None
            await splice(near, dialling.channel)
        finally:
            dialling.over.set()

    async def _dial(self, activity_id: str, token: str, dialling: _Dialling) -> None:
        """Ask the exe-unit to come, and wait for it."""
        target = EXEUNIT + activity_id
        try:
            answer = await self._router.calls.local(self._me, target, msgspec.msgpack.encode(("dial", token)), OPEN_S)
        except RemoteError as error:
            raise InteractionFault("refused", f"the exe-unit refuses: {error}") from None
        except Unreachable as error:
            raise InteractionFault("unreachable", f"the exe-unit cannot be reached: {error}") from None
        if problem := _problem(answer):
            raise problem
        with trio.move_on_after(OPEN_S):
            await dialling.there.wait()
            return
        raise InteractionFault("unreachable", "the exe-unit did not dial back")

    async def _take(self, sender: str, stream: Any) -> None:
        """Serve the other half of a stream, that of an exe-unit on our bus."""
        channel = Channel(stream)
        try:
            frame = await channel.read(OPEN_S)
        except InteractionFault as fault:
            log.debug("dialled back: %s", fault)
            return
        match frame:
            case ["token", str() as token, str() as activity_id]:
                dialling = self._dialling.get(token)
            case _:
                dialling = None
        if sender != self._me or dialling is None or dialling.activity_id != activity_id or dialling.channel is not None:
            log.warning("a stream came back with a token that counts for nothing")
            return
        dialling.channel = channel
        dialling.there.set()
        try:
            await dialling.over.wait()
        finally:
            with trio.CancelScope(shield=True):
                await channel.aclose()


def _problem(answer: bytes) -> InteractionFault | None:
    """Return what an exe-unit says against dialling back, None if it comes."""
    try:
        match msgspec.msgpack.decode(answer):
            case ["ok"]:
                return None
            case ["error", str() as code, str() as text]:
                return InteractionFault(code, text)
    except (msgspec.DecodeError, ValueError, RecursionError):
        pass
    return InteractionFault("lost", "the exe-unit answers nonsense")


def _raise_error(frame: list[Any]) -> None:
    match frame:
        case ["error", str() as code, str() as text]:
            raise InteractionFault(code[:40], text[:2000])


async def _tell(channel: Channel, fault: InteractionFault) -> None:
    with suppress(InteractionFault):  # nobody is there to hear it
        await channel.write("error", fault.code, str(fault)[:2000], timeout_s=FAREWELL_S)
        await channel.finish(FAREWELL_S)


@dataclass(frozen=True)
class Output:
    """Bytes that the program wrote, to standard output or standard error."""

    side: int
    data: bytes


@dataclass(frozen=True)
class Taken:
    """So many bytes of input have reached the program."""

    size: int


@dataclass(frozen=True)
class Exit:
    """How the program ended."""

    code: int
    reason: str | None


class TerminalClient:
    """A program in an activity, as the requestor's node holds it. Closing it kills the program."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._untaken = 0
        self._room = trio.Event()
        self._taken = 0  # bytes of output dealt with that the exe-unit was not told of

    async def send(self, data: bytes) -> None:
        """Hand input on; waits while the program does not take what was sent. Raises `InteractionFault`."""
        for at in range(0, len(data), DATA_BYTES):
            piece = data[at : at + DATA_BYTES]
            while self._untaken + len(piece) > WINDOW_BYTES:
                self._room = trio.Event()
                await self._room.wait()
            self._untaken += len(piece)
            await self._channel.write("input", piece)

    async def end_input(self) -> None:
        """Say that no more input comes. Raises `InteractionFault`."""
        await self._channel.write("end")

    async def taken(self, size: int) -> None:
        """Say that `size` bytes of output are dealt with, so that more may come. Raises `InteractionFault`."""
        self._taken += size
        if self._taken >= ACK_BYTES:
            told, self._taken = self._taken, 0
            await self._channel.write("taken", told)

    async def resize(self, rows: int, cols: int) -> None:
        """Give the terminal another size. Raises `InteractionFault`."""
        check_window(rows, cols)
        await self._channel.write("resize", rows, cols)

    async def receive(self) -> Output | Taken | Exit:
        """Return what happens next; `Exit` is the last. Raises `InteractionFault`.

        Output has to be answered with `taken`, or it soon ceases.
        """
        frame = await self._channel.read()
        if frame is None:
            raise InteractionFault("lost", "the exe-unit went away")
        _raise_error(frame)
        match frame:
            case ["output", (1 | 2) as side, bytes() as data]:
                return Output(STDOUT if side == STDOUT else STDERR, data)
            case ["taken", int() as size] if size >= 0:
                self._untaken = max(0, self._untaken - size)
                self._room.set()
                return Taken(size)
            case ["exit", int() as code, (str() | None) as reason]:
                return Exit(code, reason)
        raise InteractionFault("lost", "the exe-unit answers nonsense")

    async def aclose(self) -> None:
        """Hang up."""
        await self._channel.aclose()
