"""What is said on a byte stream named `gftp`, and the reading and writing end of it.

Headers are MessagePack arrays behind their length (four bytes, big-endian, at most 4 KiB):

    ["stat", name]         -> ["ok", size]
    ["get", name, offset]  -> ["ok", size], then the bytes from `offset` to the end; a stream that ends early is a failure
    ["put", name]          -> ["ok", 0]; then chunks behind their length, a zero length, and 64 hex digits of the
                              SHA3-256 of it all; then -> ["ok", bytes]
    any                    -> ["error", variant, text]       variant: ReadError WriteError InternalError IntegrityError

Neighbours: `golem/files.py` serves; `golem/gftp.py` and the exe-unit are clients, through the bus of their node.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import trio

from golem.bus import open_stream
from golem.net.types import RemoteError, Unreachable
from protocol.codec import length_prefixed

STREAM = "gftp"
CHUNK_BYTES = 1 << 20
UPLOAD_BYTES = 256 << 10
MAX_CHUNK_BYTES = 4 << 20
MAX_HEADER_BYTES = 4096
STALL_S = 60.0
_URL = re.compile(r"gftp://(0x[0-9a-fA-F]{40})/([A-Za-z0-9._\-]{1,200})\Z")
BROKEN = (Unreachable, trio.BrokenResourceError, trio.ClosedResourceError)


class FileFault(Exception):
    """A file could not be read or written. `passing` failures are worth another try."""

    def __init__(self, variant: str, text: str, passing: bool = False) -> None:
        super().__init__(text)
        self.variant, self.passing = variant, passing


def parse_url(url: str) -> tuple[str, str]:
    """Return node id and name of a gftp URL. Raises `FileFault`."""
    match = _URL.match(url)
    if match is None:
        raise FileFault("InternalError", f"not a gftp URL: {url[:120]!r}")
    return match[1].lower(), match[2]


class Reader:
    """Reads exact amounts from a stream; a stream that is silent for `stall_s` has failed. Failures are `FileFault`."""

    def __init__(self, stream: Any, stall_s: float = STALL_S) -> None:
        self._stream, self._stall_s, self._held = stream, stall_s, b""

    async def some(self, most: int) -> bytes:
        """Return the next bytes, b"" at the end."""
        if self._held:
            data, self._held = self._held[:most], self._held[most:]
            return data
        try:
            with trio.move_on_after(self._stall_s):
                return bytes(await self._stream.receive_some(most))
        except BROKEN as error:
            raise FileFault("ReadError", f"the stream broke: {error}", passing=True) from None
        raise FileFault("ReadError", f"no byte for {self._stall_s:g} s", passing=True)

    async def exactly(self, size: int) -> bytes:
        """Return `size` bytes."""
        parts = bytearray()
        while len(parts) < size:
            data = await self.some(size - len(parts))
            if not data:
                raise FileFault("ReadError", "the stream ended early", passing=True)
            parts += data
        return bytes(parts)

    async def chunk(self) -> bytes:
        """Return a chunk behind its length; b"" for the zero length that ends them."""
        size = int.from_bytes(await self.exactly(4), "big")
        if size > MAX_CHUNK_BYTES:
            raise FileFault("InternalError", f"a chunk of {size} bytes is over the limit")
        return await self.exactly(size)

    async def at_end(self) -> bool:
        """Return whether nothing more comes."""
        self._held = await self.some(MAX_HEADER_BYTES)
        return not self._held


async def read_header(reader: Reader) -> list[Any] | None:
    """Return the next header, None where the stream ends before it. Raises `FileFault`."""
    if await reader.at_end():
        return None
    size = int.from_bytes(await reader.exactly(4), "big")
    if not 0 < size <= MAX_HEADER_BYTES:
        raise FileFault("InternalError", "not a gftp header")
    try:
        return msgspec.msgpack.decode(await reader.exactly(size), type=list[Any])
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise FileFault("InternalError", f"malformed gftp header: {error}") from None


async def send_header(stream: Any, parts: list[Any]) -> None:
    """Send a header. Raises `FileFault` when the stream broke."""
    await _send(stream, length_prefixed(msgspec.msgpack.encode(parts)))


async def _send(stream: Any, data: bytes) -> None:
    try:
        with trio.move_on_after(STALL_S):
            await stream.send_all(data)
            return
    except BROKEN as error:
        raise FileFault("WriteError", f"the stream broke: {error}", passing=True) from None
    raise FileFault("WriteError", f"the other side takes nothing for {STALL_S:g} s", passing=True)


class GftpPeer:
    """Reads and writes files of any node through the bus at `bus_path`. All failures are `FileFault`."""

    def __init__(self, bus_path: Path) -> None:
        self._bus_path = bus_path
        self._hashes: dict[str, tuple[int, Any]] = {}  # of downloads that broke off: bytes so far, their hash

    async def _open(self, node: str) -> trio.SocketStream:
        try:
            return await open_stream(self._bus_path, node, STREAM)
        except Unreachable as error:
            raise FileFault("InternalError", str(error), passing=True) from None
        except RemoteError as error:
            raise FileFault("InternalError", str(error), passing=True) from None

    async def size(self, url: str) -> int:
        """Return the size of a published file."""
        node, name = parse_url(url)
        async with await self._open(node) as stream:
            reader = Reader(stream)
            await send_header(stream, ["stat", name])
            return _ok(await read_header(reader))

    async def download(self, url: str, offset: int, write: Callable[[bytes], Awaitable[None]]) -> int:
        """Hand the bytes from `offset` to the end to `write`; returns the size. A name that is a hash is checked."""
        node, name = parse_url(url)
        sha3 = self._hash_so_far(name, offset)
        async with await self._open(node) as stream:
            reader = Reader(stream)
            await send_header(stream, ["get", name, offset])
            size = _ok(await read_header(reader))
            while offset < size:
                data = await reader.some(min(CHUNK_BYTES, size - offset))
                if not data:
                    raise FileFault("ReadError", f"{url}: ended {size - offset} bytes early", passing=True)
                await write(data)
                offset += len(data)
                if sha3 is not None:
                    sha3.update(data)
                    self._hashes[name] = (offset, sha3)
        self._hashes.pop(name, None)
        if sha3 is not None and sha3.hexdigest() != name:
            raise FileFault("IntegrityError", f"{url}: the content has another hash")
        return size

    def _hash_so_far(self, name: str, offset: int) -> Any:
        """Return the hash over what is there, None where the name is none (or the beginning is not known)."""
        if not re.fullmatch(r"[0-9a-f]{64}", name):
            return None
        if offset == 0:
            return hashlib.sha3_256()
        known, sha3 = self._hashes.get(name, (0, None))
        return sha3 if known == offset else None

    async def upload(self, url: str, read: Callable[[int], Awaitable[bytes]]) -> int:
        """Send what `read(most_bytes)` gives until it gives b""; returns the number of bytes."""
        node, name = parse_url(url)
        async with await self._open(node) as stream:
            reader = Reader(stream)
            await send_header(stream, ["put", name])
            _ok(await read_header(reader))
            sha3, size = hashlib.sha3_256(), 0
            try:
                while data := await read(CHUNK_BYTES):
                    for at in range(0, len(data), UPLOAD_BYTES):  # smaller pieces keep both ends busy
                        piece = data[at : at + UPLOAD_BYTES]
                        sha3.update(piece)
                        await _send(stream, length_prefixed(piece))
                    size += len(data)
                await _send(stream, length_prefixed(b"") + sha3.hexdigest().encode())
            except FileFault as fault:
                if not fault.passing:
                    raise
                # the other side may have said why before it closed
                with trio.move_on_after(1):
                    _ok(await read_header(reader))
                raise
            _ok(await read_header(reader))
            return size


def _ok(reply: list[Any] | None) -> int:
    match reply:
        case ["ok", int() as value]:
            return value
        case ["error", str() as variant, str() as text]:
            raise FileFault(variant, text)
        case None:
            raise FileFault("ReadError", "the stream ended early", passing=True)
    raise FileFault("InternalError", "not a gftp answer")
