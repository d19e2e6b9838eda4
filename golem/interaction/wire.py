"""What is said on a byte stream to an exe-unit: the shell and the services of a running activity.

The requestor's node opens a stream named `exeunit` at the provider's node; that one checks who asks, has the exe-unit
dial back over the bus (stream `exeunit-back`, with a token that counts once) and joins the two. Frames are MessagePack
arrays behind their length (four bytes, big-endian):

    requestor's node                              the exe-unit (or, before it is reached, the provider's node)
    ["open", activity id], then one of
    ["terminal", argv, env, tty, rows, cols]  ->  ["ok"]
        ["input", bytes]                              ["taken", bytes of input that the program has got]
        ["end"]              no more input            ["output", 1 stdout or 2 stderr, bytes]
        ["taken", bytes of output dealt with]         ["exit", status, reason or nil], and the stream ends
        ["resize", rows, cols]
    ["connect", port]                         ->  ["ok"]
        as above, without "resize"                    as above; ["end"] before "exit" where the service ends its way first
                                                  ["error", code, text] instead of any of these, and the stream ends

Port 0 is the one port that the image exposes, or 80. A requestor that leaves (its side of the stream ends) has hung up:
the program is killed. So that this is seen at once, and that a user may stop reading for an hour, both sides always read
frames: each keeps at most `WINDOW_BYTES` on the way that the other has not taken yet.
Neighbours: `golem/interaction/broker.py` (nodes), `golem/exeunit/interaction.py`, `golem/rest/interaction.py`.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import trio

from golem.net.types import Unreachable
from protocol.codec import length_prefixed

STREAM, BACK = "exeunit", "exeunit-back"
STDOUT, STDERR = 1, 2
WINDOW_BYTES = 256 << 10
ACK_BYTES = 64 << 10  # less than this need not be told to be taken
DATA_BYTES = 32 << 10  # of input or output in one frame
MAX_FRAME_BYTES = 256 << 10
MAX_WINDOW_SIDE = 4096  # rows or columns
OPEN_S = 10.0  # for each step of opening
FAREWELL_S = 2.0  # for the last words to be read
READ_BYTES = 1 << 16
BROKEN = (Unreachable, trio.BrokenResourceError, trio.ClosedResourceError)


class InteractionFault(Exception):
    """An interaction was refused or broke; the text is for the requestor.

    `code`: bad_request, forbidden, unsupported, conflict (not started), gone (ended), busy, refused (by the service or
    the runtime), unreachable (the provider), lost (broke off).
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class OpenTerminal(msgspec.Struct, frozen=True, array_like=True, tag="terminal"):
    """Run a program with live input; an empty `argv` is the image's shell."""

    argv: list[str]
    env: dict[str, str] = {}
    tty: bool = False
    rows: int = 24
    cols: int = 80


class Connect(msgspec.Struct, frozen=True, array_like=True, tag="connect"):
    """Open a TCP connection to a service on the activity's loopback address."""

    port: int


Request = OpenTerminal | Connect


def check_request(raw: Any) -> Request:
    """Return a request from its frame. Raises `InteractionFault`."""
    try:
        request: Request = msgspec.convert(raw, Request)
    except (msgspec.ValidationError, RecursionError) as error:
        raise InteractionFault("bad_request", f"malformed request: {str(error)[:200]}") from None
    match request:
        case OpenTerminal(rows=rows, cols=cols):
            check_window(rows, cols)
        case Connect(port) if not 0 <= port <= 65535:
            raise InteractionFault("bad_request", f"not a port: {port}")
    return request


def check_window(rows: int, cols: int) -> None:
    """Raise `InteractionFault` where a terminal cannot have this size."""
    if not (1 <= rows <= MAX_WINDOW_SIDE and 1 <= cols <= MAX_WINDOW_SIDE):
        raise InteractionFault("bad_request", f"a window has 1 to {MAX_WINDOW_SIDE} rows and columns, not {rows} x {cols}")


class Channel:
    """Frames on a byte stream, of a bus or between nodes; they may be written by several tasks.

    `receive_some` and the other methods of a stream are for nodes that join two of them; they fail as the stream does.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self._held = stream, bytearray()
        self._writing = trio.Lock()

    # -- frames
    async def read(self, timeout_s: float = math.inf) -> list[Any] | None:
        """Return the next frame, None where the stream ends before it; may be cancelled. Raises `InteractionFault`."""
        with trio.move_on_after(timeout_s):
            if not await self._hold(4):
                return None
            size = int.from_bytes(self._held[:4], "big")
            if not 0 < size <= MAX_FRAME_BYTES:
                raise InteractionFault("bad_request", f"a frame of {size} bytes is out of bounds")
            await self._hold(4 + size)
            body = bytes(self._held[4 : 4 + size])
            del self._held[: 4 + size]
            try:
                return msgspec.msgpack.decode(body, type=list[Any])
            except (msgspec.DecodeError, ValueError, RecursionError):
                raise InteractionFault("bad_request", "malformed frame") from None
        raise InteractionFault("lost", f"no answer within {timeout_s:g} s")

    async def write(self, *parts: Any, timeout_s: float = math.inf) -> None:
        """Send a frame. Raises `InteractionFault`."""
        frame = length_prefixed(msgspec.msgpack.encode(parts))
        with trio.move_on_after(timeout_s):
            async with self._writing:
                try:
                    await self._stream.send_all(frame)
                    return
                except BROKEN as error:
                    raise InteractionFault("lost", f"the stream broke: {error}") from None
        raise InteractionFault("lost", f"the other side takes nothing for {timeout_s:g} s")

    async def _hold(self, size: int) -> bool:
        """Read on until so many bytes are held; returns False where the stream ended before any."""
        while len(self._held) < size:
            try:
                data = await self._stream.receive_some(READ_BYTES)
            except BROKEN as error:
                raise InteractionFault("lost", f"the stream broke: {error}") from None
            if not data:
                if not self._held:
                    return False
                raise InteractionFault("lost", "the stream ended in the middle of a frame")
            self._held += data
        return True

    # -- bytes
    async def receive_some(self, n: int = READ_BYTES) -> bytes:
        if self._held:
            found = bytes(self._held[:n])
            del self._held[:n]
            return found
        return bytes(await self._stream.receive_some(n))

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def finish(self, timeout_s: float) -> None:
        """End our way and wait for the end of the other: a stream closed at once may take with it what was just sent."""
        with trio.move_on_after(timeout_s):
            try:
                await self.send_eof()
                while await self.receive_some():
                    pass
            except BROKEN:
                pass  # nobody is there any more

    async def aclose(self) -> None:
        await self._stream.aclose()
