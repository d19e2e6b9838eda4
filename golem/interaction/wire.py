"""Frames of `protocol/interaction.py` on byte streams, of a bus or between nodes."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import trio

from golem.net.types import Unreachable
from protocol.codec import length_prefixed
from protocol.interaction import MAX_FRAME_BYTES, InteractionFault

OPEN_S = 10.0  # for each step of opening
FAREWELL_S = 2.0  # for the last words to be read
READ_BYTES = 1 << 16
BROKEN = (Unreachable, trio.BrokenResourceError, trio.ClosedResourceError)


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
