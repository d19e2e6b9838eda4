"""Byte streams from a requestor to the exe-unit of its activity, at both nodes.

At the requestor's: `open_terminal` and `connect`. At the provider's: who asks must be the activity's requestor; the
exe-unit is asked by a live call to dial back, with a token that counts once, and the two streams are joined. What may be
asked of it the exe-unit says. Neighbours: `protocol/interaction.py` says what goes over the streams.
"""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
import trio

from actors.activity.rows import ActivityRow
from golem.bus.router import Router, splice
from golem.interaction.wire import FAREWELL_S, OPEN_S, Channel
from golem.net.types import RemoteError, Unreachable
from protocol.codec import encode
from protocol.exeunit import exeunit_name
from protocol.interaction import (
    ACK_BYTES,
    BACK,
    DATA_BYTES,
    STDERR,
    STDOUT,
    STREAM,
    WINDOW_BYTES,
    Connect,
    InteractionFault,
    OpenTerminal,
    Request,
    check_request,
    check_window,
)
from protocol.live import Dial, NotDialling, decode_dialled
from protocol.states import Role
from protocol.types import Violation

log = logging.getLogger("golem.interaction.broker")

ENDED = "the activity has ended"
MAX_DIALLING = 64  # streams that wait for their exe-units to come
DIALLING_EACH = 8  # of these, of one activity; more wait for their turn
MAX_WAITING = 64  # of one activity, all in all


@dataclass
class _Dialling:
    """A stream that waits for its exe-unit, and for as long as it has it."""

    activity_id: str
    channel: Channel | None = None
    there: trio.Event = field(default_factory=trio.Event)
    over: trio.Event = field(default_factory=trio.Event)


@dataclass
class _Share:
    """An activity's share of the streams that wait: an exe-unit that is stuck takes no other's."""

    turns: trio.Semaphore = field(default_factory=lambda: trio.Semaphore(DIALLING_EACH))
    users: int = 0


class Interactions:
    """The streams of one node. `row_of(activity id)` is the node's row of an activity, None if it knows none."""

    def __init__(self, me: str, router: Router, row_of: Callable[[str], ActivityRow | None]) -> None:
        self._me, self._router, self._row_of = me, router, row_of
        self._dialling: dict[str, _Dialling] = {}
        self._shares: dict[str, _Share] = {}  # by activity, while it has streams that wait
        router.serve_stream(STREAM, self._serve)
        router.serve_stream(BACK, self._take)

    # -- at the requestor's node
    async def open_terminal(self, row: ActivityRow, request: OpenTerminal) -> TerminalClient:
        """Start a program in an activity. Raises `InteractionFault`."""
        return TerminalClient(await self._open(row, request))

    async def connect(self, row: ActivityRow, port: int) -> ServiceStream:
        """Open a TCP connection to a service of an activity. Raises `InteractionFault`."""
        return ServiceStream(await self._open(row, Connect(port)))

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
        if row is None or row.role != Role.PROVIDER or row.requestor != sender:
            raise InteractionFault("forbidden", "not an activity of this requestor")
        if row.ended:
            raise InteractionFault("gone", ENDED)
        dialling = _Dialling(activity_id)
        try:
            async with self._turn(activity_id):
                if len(self._dialling) >= MAX_DIALLING:
                    raise InteractionFault("busy", "too many streams wait for their exe-units")
                token = secrets.token_hex(16)
                self._dialling[token] = dialling
                try:
                    await self._dial(activity_id, token, dialling)
                finally:
                    self._dialling.pop(token, None)  # it counts once
            assert dialling.channel is not None
            await splice(near, dialling.channel, linger_s=2 * FAREWELL_S)  # a requestor need not hang up by itself
        finally:
            dialling.over.set()

    @asynccontextmanager
    async def _turn(self, activity_id: str) -> AsyncIterator[None]:
        """Wait until a stream may ask its exe-unit to come, and hold its place of the activity's share."""
        share = self._shares.setdefault(activity_id, _Share())
        if share.users >= MAX_WAITING:
            raise InteractionFault("busy", "too many streams wait for this exe-unit")
        share.users += 1
        try:
            with trio.move_on_after(OPEN_S) as patience:
                await share.turns.acquire()
            if patience.cancelled_caught:
                raise InteractionFault("busy", "this exe-unit does not come to the streams that wait for it")
            try:
                yield
            finally:
                share.turns.release()
        finally:
            share.users -= 1
            if not share.users:
                del self._shares[activity_id]

    async def _dial(self, activity_id: str, token: str, dialling: _Dialling) -> None:
        """Ask the exe-unit to come, and wait for it."""
        try:
            answer = await self._router.calls.local(self._me, exeunit_name(activity_id), encode(Dial(token)), OPEN_S)
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
        """Serve the other half of a stream, that of an exe-unit on our bus (and of nobody in the network)."""
        if sender != self._me:
            return
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
        if dialling is None or dialling.activity_id != activity_id or dialling.channel is not None:
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
        found = decode_dialled(answer)
    except Violation:
        return InteractionFault("lost", "the exe-unit answers nonsense")
    return InteractionFault(found.code, found.text) if isinstance(found, NotDialling) else None


def _raise_error(frame: list[Any]) -> None:
    match frame:
        case ["error", str() as code, str() as text]:
            raise InteractionFault(code[:40], text[:2000])


async def _tell(channel: Channel, fault: InteractionFault) -> None:
    with suppress(InteractionFault):  # nobody is there to hear it
        await channel.write("error", fault.code, str(fault)[:2000], timeout_s=FAREWELL_S)
        await channel.finish(FAREWELL_S)


@dataclass(frozen=True, slots=True)
class Output:
    """Bytes that the program wrote, to standard output or standard error."""

    side: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Taken:
    """So many bytes of input have reached the program."""

    size: int


@dataclass(frozen=True, slots=True)
class End:
    """No more output comes, though input may still be taken."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How the program ended."""

    code: int
    reason: str | None


class _Client:
    """The requestor's end of a session. What it may have on the way is bounded on both ways, and so is what is held here."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._untaken = 0  # bytes of input on the way
        self._taken = 0  # bytes of output dealt with that the exe-unit was not told of
        self._events: deque[Output | End | Exit] = deque()  # output has a byte at least, the others come once
        self._held = 0  # bytes of output among them
        self._reached = 0  # bytes of input that were taken, and nobody was told of yet
        self._over: set[str] = set()  # which of the others came
        self._fault: InteractionFault | None = None
        self._reading = False
        self._news = trio.Event()

    async def send(self, data: bytes) -> None:
        """Hand input on; waits while what was sent is not taken. Raises `InteractionFault`."""
        for at in range(0, len(data), DATA_BYTES):
            piece = data[at : at + DATA_BYTES]
            while self._untaken + len(piece) > WINDOW_BYTES:
                await self._progress()
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

    async def next_event(self) -> Output | Taken | End | Exit:
        """Return what happened next. Raises `InteractionFault`."""
        while not self._events and not self._reached:
            await self._progress()
        if self._reached:
            size, self._reached = self._reached, 0
            return Taken(size)
        event = self._events.popleft()
        if isinstance(event, Output):
            self._held -= len(event.data)
        return event

    async def aclose(self) -> None:
        """Hang up."""
        await self._channel.aclose()

    async def _progress(self) -> None:
        """Return when a frame has come: the first who waits reads it for all. Raises `InteractionFault`."""
        if self._fault is not None:
            raise self._fault
        if self._reading:
            await self._news.wait()
            return
        self._reading = True
        try:
            self._take(await self._channel.read())
        except InteractionFault as fault:
            self._fault = fault
            raise
        finally:
            self._reading = False
            self._news.set()
            self._news = trio.Event()

    def _take(self, frame: list[Any] | None) -> None:
        if frame is None:
            raise InteractionFault("lost", "the exe-unit went away")
        _raise_error(frame)
        match frame:
            case ["output", (1 | 2) as side, bytes() as data] if data:
                self._held += len(data)
                if self._held > WINDOW_BYTES:
                    raise InteractionFault("lost", "the exe-unit sends more than may be on the way")
                self._events.append(Output(STDOUT if side == STDOUT else STDERR, data))
            case ["taken", int() as size] if size > 0:
                self._untaken = max(0, self._untaken - size)
                self._reached += size
            case ["end"] if not self._over:
                self._over.add("end")
                self._events.append(End())
            case ["exit", int() as code, (str() | None) as reason] if "exit" not in self._over:
                self._over.add("exit")
                self._events.append(Exit(code, reason))
            case _:
                raise InteractionFault("lost", "the exe-unit answers nonsense")


class TerminalClient(_Client):
    """A program in an activity. Closing it kills the program. One task may send while another one receives."""

    async def resize(self, rows: int, cols: int) -> None:
        """Give the terminal another size. Raises `InteractionFault`."""
        check_window(rows, cols)
        await self._channel.write("resize", rows, cols)

    async def receive(self) -> Output | Taken | Exit:
        """Return what happens next; `Exit` is the last. Raises `InteractionFault`.

        Output has to be answered with `taken`, or it soon ceases.
        """
        while isinstance(event := await self.next_event(), End):
            pass
        return event


class ServiceStream(_Client):
    """A TCP connection into an activity. All methods raise `InteractionFault` when it is broken."""

    _ended = False

    async def receive_some(self) -> bytes:
        """Return some bytes as soon as there are any, b"" where the service ended its way."""
        while not self._ended:
            match await self.next_event():
                case Output(_, data) if data:
                    await self.taken(len(data))
                    return data
                case End() | Exit():
                    self._ended = True
        return b""

    async def send_all(self, data: bytes) -> None:
        """Send all, waiting while the service does not read."""
        await self.send(data)

    async def send_eof(self) -> None:
        """End our way; the service may still send."""
        await self.end_input()
