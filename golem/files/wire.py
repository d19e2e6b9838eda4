"""Headers and blocks of `protocol/gftp.py` on byte streams: what both ends share."""

from __future__ import annotations

from typing import Any

import msgspec
import trio

from golem.net.types import Unreachable
from protocol.codec import length_prefixed
from protocol.gftp import BLOCK_BYTES, MAX_HEADER_BYTES, FileFault

READ_BYTES = 1 << 18  # asked of a socket at a time
SEND_BYTES = 1 << 18  # given to a stream at a time, which takes it within STALL_S
STALL_S = 60.0
MIN_BYTES = 1 << 14  # that must come in STALL_S
HEADER_S = 120.0  # for an answer: the other side may have to read a file first
BROKEN = (Unreachable, trio.BrokenResourceError, trio.ClosedResourceError)


def part_name(file_name: str, slot: str) -> str:
    """Return the name, beside the target, of the file that an upload into a slot fills."""
    return f".{file_name[:100]}.{slot[:16]}.part"


class Reader:
    """Reads exact amounts from a stream, which has failed when next to nothing comes for `stall_s`. Failures are `FileFault`."""

    def __init__(self, stream: Any, stall_s: float = STALL_S) -> None:
        self._stream, self._stall_s, self._held = stream, stall_s, b""

    async def _some(self, most: int) -> bytes:
        """Return the next bytes, b"" at the end."""
        if self._held:
            data, self._held = self._held[:most], self._held[most:]
            return data
        try:
            return bytes(await self._stream.receive_some(most))
        except BROKEN as error:
            raise FileFault("ReadError", f"the stream broke: {error}", passing=True) from None

    async def exactly(self, size: int) -> bytes:
        """Return `size` bytes."""
        parts = []
        got = mark = 0
        with trio.CancelScope(deadline=trio.current_time() + self._stall_s) as scope:
            while got < size:
                data = await self._some(min(size - got, READ_BYTES))
                if not data:
                    raise FileFault("ReadError", "the stream ended early", passing=True)
                parts.append(data)
                got += len(data)
                if got - mark >= MIN_BYTES:
                    mark = got
                    scope.deadline = trio.current_time() + self._stall_s
            return parts[0] if len(parts) == 1 else b"".join(parts)
        raise FileFault("ReadError", f"{got - mark} bytes in {self._stall_s:g} s", passing=True)

    async def block(self) -> tuple[int, bytes]:
        """Return a block with its offset; empty for the end mark."""
        head = await self.exactly(12)
        offset, size = int.from_bytes(head[:8], "big"), int.from_bytes(head[8:], "big")
        if size > BLOCK_BYTES:
            raise FileFault("InternalError", f"a block of {size} bytes is over the limit")
        return offset, await self.exactly(size)

    async def drop(self) -> None:
        """Read to the end for nothing."""
        while await self._some(READ_BYTES):
            pass

    async def at_end(self) -> bool:
        """Return whether nothing more comes. Waits as long as it takes for something."""
        if not self._held:
            self._held = await self._some(MAX_HEADER_BYTES)
        return not self._held


async def read_header(reader: Reader, patience_s: float = HEADER_S) -> list[Any] | None:
    """Return the next header, None where the stream ends before it. Raises `FileFault`."""
    with trio.move_on_after(patience_s) as scope:
        if await reader.at_end():
            return None
        size = int.from_bytes(await reader.exactly(4), "big")
        if not 0 < size <= MAX_HEADER_BYTES:
            raise FileFault("InternalError", "not a gftp header")
        body = await reader.exactly(size)
    if scope.cancelled_caught:
        raise FileFault("ReadError", f"the other side is silent for {patience_s:g} s", passing=True)
    try:
        return msgspec.msgpack.decode(body, type=list[Any])
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise FileFault("InternalError", f"malformed gftp header: {error}") from None


async def send_header(stream: Any, parts: list[Any]) -> None:
    """Send a header. Raises `FileFault` when the stream broke."""
    await send(stream, length_prefixed(msgspec.msgpack.encode(parts)))


async def send(stream: Any, data: bytes) -> None:
    """Send bytes. Raises `FileFault` when the stream broke, or the other side takes them too slowly."""
    view = memoryview(data)
    try:
        while view:
            with trio.move_on_after(STALL_S) as scope:
                await stream.send_all(view[:SEND_BYTES])
            if scope.cancelled_caught:
                raise FileFault("WriteError", f"the other side takes nothing for {STALL_S:g} s", passing=True)
            view = view[SEND_BYTES:]
    except BROKEN as error:
        raise FileFault("WriteError", f"the stream broke: {error}", passing=True) from None


async def send_block(stream: Any, offset: int, block: bytes) -> None:
    """Send a block. Raises `FileFault`."""
    await send(stream, offset.to_bytes(8, "big") + len(block).to_bytes(4, "big"))
    await send(stream, block)


class Assembly:
    """Puts blocks that come over several streams into order, at most `ahead_bytes` before the one that is taken next."""

    def __init__(self, start: int, ahead_bytes: int) -> None:
        self.next = start  # offset of the block to be taken next
        self._ahead_bytes = ahead_bytes
        self._blocks: dict[int, bytes] = {}
        self._closed = False
        self._changed = trio.lowlevel.ParkingLot()

    def has_room(self, offset: int) -> bool:
        """Whether a block of this offset may come now."""
        return offset < self.next + self._ahead_bytes and not self._closed

    async def room(self, offset: int) -> bool:
        """Wait until a block of this offset may come; False when none is wanted any more."""
        while not self._closed and not self.has_room(offset):
            await self._changed.park()
        return not self._closed

    def put(self, offset: int, block: bytes) -> None:
        """Add a block. Raises `FileFault` for one that is there already."""
        if offset < self.next or offset in self._blocks:
            raise FileFault("InternalError", f"the bytes at {offset} come twice")
        self._blocks[offset] = block
        self._changed.unpark_all()

    async def take(self) -> bytes | None:
        """Return the next block; None when it is not there and the assembly is closed."""
        while self.next not in self._blocks:
            if self._closed:
                return None
            await self._changed.park()
        block = self._blocks.pop(self.next)
        self.next += len(block)
        self._changed.unpark_all()
        return block

    def close(self) -> None:
        """Nothing more comes; what is there in order can still be taken."""
        self._closed = True
        self._changed.unpark_all()
