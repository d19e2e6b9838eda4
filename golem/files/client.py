"""The client of gftp: reads and writes files of any node, through the bus of this machine's node.

Both ways go over one stream, or over several where a round trip is long. A failure that may pass leaves the caller able to go
on where it was: a download is asked for from an offset; an upload is offered again, and the other side says what it kept.
Neighbours: `protocol/gftp.py` (the conversation), `golem/files/tool.py` and the exe-unit (the callers).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from golem.bus.client import open_stream
from golem.files.outgoing import OutgoingFile
from golem.files.wire import Assembly, Reader, read_header, send, send_block, send_header
from golem.net.types import RemoteError, Unreachable
from protocol.gftp import BLOCK_BYTES, END, HASHES, NOT_HERE, STREAM, FileFault, parse_url

log = logging.getLogger("golem.files.tool")

MAX_STREAMS = 8
STREAM_RTT_S = 0.01  # a window of 1 MiB a round trip: further streams from here on
AHEAD_BYTES = 16 << 20  # of a download, in memory
READ_AHEAD_BLOCKS = 2  # of an upload
FINISH_S = 600.0  # for the other side to store and check the end of an upload
MAX_MET = 1024
Write = Callable[[bytes], Awaitable[None]]
Progress = Callable[[int, int], None]


class GftpPeer:
    """Reads and writes files of any node through the bus at `bus_path`. All failures are `FileFault`."""

    def __init__(self, bus_path: Path, streams: int | None = None) -> None:
        """`streams`: how many to use, instead of what the round trip suggests."""
        self._bus_path, self._streams = bus_path, streams
        self._met: dict[str, None] = {}  # URLs that were there, the last MAX_MET

    @contextmanager
    def _patience(self, url: str) -> Iterator[None]:
        """What was there may come back: a node that has started again hears of its files within seconds."""
        try:
            yield
        except FileFault as fault:
            fault.passing |= str(fault) == NOT_HERE and url in self._met
            raise

    def _meet(self, url: str) -> None:
        self._met[url] = None
        while len(self._met) > MAX_MET:
            del self._met[next(iter(self._met))]

    async def _open(self, node: str) -> trio.SocketStream:
        try:
            return await open_stream(self._bus_path, node, STREAM)
        except (Unreachable, RemoteError) as error:
            raise FileFault("InternalError", str(error), passing=True) from None

    def _streams_for(self, round_trip_s: float, size: int) -> int:
        wanted = self._streams or 1 + int(round_trip_s / STREAM_RTT_S)
        return max(1, min(wanted, MAX_STREAMS, size // BLOCK_BYTES))

    async def size(self, url: str) -> int:
        """Return the size of a published file."""
        node, name = parse_url(url)
        with self._patience(url):
            async with await self._open(node) as stream:
                size = await _stat(stream, Reader(stream), name)
        self._meet(url)
        return size

    async def download(self, url: str, offset: int, write: Write) -> int:
        """Hand the bytes from `offset` to the end to `write`, in order; returns the size of the file.

        Nothing is checked but the size: whoever knows a hash checks it.
        """
        node, name = parse_url(url)
        with self._patience(url):
            async with await self._open(node) as stream:
                reader = Reader(stream)
                began = trio.current_time()
                size = await _stat(stream, reader, name)
                self._meet(url)
                streams = self._streams_for(trio.current_time() - began, size - offset)
                if offset < size:
                    await _Download(name, offset, size, write).run(stream, reader, streams, lambda: self._open(node))
        return size

    async def upload(self, url: str, file: OutgoingFile, progress: Progress | None = None) -> int:
        """Send a file; returns its size. `progress(sent, size)` hears of every block."""
        node, name = parse_url(url)
        with self._patience(url):
            async with await self._open(node) as stream:
                reader = Reader(stream)
                began = trio.current_time()
                await send_header(stream, ["put", name, file.size])
                match await read_header(reader):
                    case ["ok", int() as kept, str() as digest, str() as hash_name, str() as key] if (
                        0 <= kept <= file.size and hash_name in HASHES
                    ):
                        round_trip_s = trio.current_time() - began
                        self._meet(url)
                    case reply:
                        raise _fault(reply)
                # in threads that may be left behind: it may be a long file
                if await trio.to_thread.run_sync(file.rewind, kept, hash_name, abandon_on_cancel=True) != digest:
                    await trio.to_thread.run_sync(file.rewind, 0, hash_name)
                file.kept = file.offset
                await send_header(stream, ["from", file.offset])
                streams = self._streams_for(round_trip_s, file.size - file.offset)
                await _Upload(file, key, progress).run(stream, reader, streams, lambda: self._open(node))
        return file.size


Open = Callable[[], Awaitable[trio.SocketStream]]


class _Download:
    """One attempt to bring the bytes from `start` to `size`."""

    def __init__(self, name: str, start: int, size: int, write: Write) -> None:
        self._name, self._size, self._write = name, size, write
        self._asked = start  # what comes before has been asked for
        self._blocks = Assembly(start, AHEAD_BYTES)
        self._fault: FileFault | None = None

    async def run(self, stream: Any, reader: Reader, streams: int, open_another: Open) -> None:
        """Read over one stream, or with others in turns of a block each. Raises `FileFault`."""
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            if streams == 1:
                nursery.start_soon(self._guarded, partial(self._read_all, stream, reader))
            else:
                nursery.start_soon(self._guarded, partial(self._read_turns, stream, reader))
                for _ in range(streams - 1):
                    nursery.start_soon(self._guarded, partial(self._read_another, open_another))
            while self._blocks.next < self._size:
                block = await self._blocks.take()
                if block is None:
                    break
                try:
                    await self._write(block)
                except Exception as error:
                    failure = error  # whatever the caller's function raised leaves as itself, not in our nursery's group
                    break
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if self._blocks.next < self._size:
            raise self._fault or FileFault("ReadError", "the streams ended early", passing=True)

    async def _guarded(self, read: Callable[[], Awaitable[None]]) -> None:
        """A failure closes the assembly: what came in order before is still written."""
        try:
            await read()
        except FileFault as fault:
            self._fault = self._fault or fault
            self._blocks.close()

    async def _read_all(self, stream: Any, reader: Reader) -> None:
        at = self._asked
        await send_header(stream, ["get", self._name, at, self._size - at])
        await self._granted(reader)
        while at < self._size and await self._blocks.room(at):
            block = await reader.exactly(min(BLOCK_BYTES, self._size - at))
            self._blocks.put(at, block)
            at += len(block)

    async def _read_another(self, open_another: Open) -> None:
        if (stream := await _further(open_another)) is not None:
            async with stream:
                await self._read_turns(stream, Reader(stream))

    async def _read_turns(self, stream: Any, reader: Reader) -> None:
        """Ask for the block whose turn it is; two are on their way at a time."""
        turns: deque[int] = deque()
        while True:
            while len(turns) < 2 and self._asked < self._size and self._blocks.has_room(self._asked):
                turns.append(self._asked)
                self._asked += BLOCK_BYTES
                await send_header(stream, ["get", self._name, turns[-1], min(BLOCK_BYTES, self._size - turns[-1])])
            if turns:
                at = turns.popleft()
                await self._granted(reader)
                self._blocks.put(at, await reader.exactly(min(BLOCK_BYTES, self._size - at)))
            elif self._asked >= self._size or not await self._blocks.room(self._asked):
                return

    async def _granted(self, reader: Reader) -> None:
        if _ok(await read_header(reader)) != self._size:
            raise FileFault("ReadError", "the file changed its size")


class _Upload:
    """One attempt to send a file from its offset on."""

    def __init__(self, file: OutgoingFile, key: str, progress: Progress | None) -> None:
        self._file, self._key, self._progress = file, key, progress
        self._sent = file.offset
        self._fault: FileFault | None = None
        self._give, self._take = trio.open_memory_channel[tuple[int, bytes]](READ_AHEAD_BLOCKS)

    async def run(self, stream: Any, reader: Reader, streams: int, open_another: Open) -> None:
        """Send over one stream or several, and hear the answer. Raises `FileFault`; the other side's word comes first."""
        finished = False
        async with trio.open_nursery() as nursery:

            async def stop_on_fault(work: Callable[[], Awaitable[None]]) -> None:
                try:
                    await work()
                except FileFault as fault:
                    self._fault = self._fault or fault
                    if fault.passing:  # the other side may have said why before it closed: leave its answer time to come
                        await trio.sleep(1)
                    nursery.cancel_scope.cancel()

            async def send_all() -> None:
                async with trio.open_nursery() as senders:
                    senders.start_soon(stop_on_fault, self._read)
                    senders.start_soon(stop_on_fault, partial(self._send_blocks, stream))
                    for _ in range(streams - 1):
                        senders.start_soon(stop_on_fault, partial(self._send_over_another, open_another))
                await send(stream, END + self._file.digest.encode())
                await trio.sleep(FINISH_S)
                raise FileFault("ReadError", f"no answer to the end for {FINISH_S:g} s", passing=True)

            nursery.start_soon(stop_on_fault, send_all)
            try:
                # while all is well this is silent until the end
                if _ok(await read_header(reader, float("inf"))) != self._file.size:
                    raise FileFault("InternalError", "the other side has another size")
                finished = True
            except FileFault as fault:
                if self._fault is None or not fault.passing:
                    self._fault = fault
            nursery.cancel_scope.cancel()
        if not finished:
            raise self._fault or FileFault("WriteError", "the upload was not finished", passing=True)

    async def _read(self) -> None:
        with self._give:
            while True:
                at = self._file.offset
                block = await trio.to_thread.run_sync(self._file.next_block)
                if not block:
                    return
                await self._give.send((at, block))

    async def _send_blocks(self, stream: Any) -> None:
        async for at, block in self._take.clone():
            await send_block(stream, at, block)
            self._sent += len(block)
            if self._progress is not None:
                self._progress(self._sent, self._file.size)

    async def _send_over_another(self, open_another: Open) -> None:
        if (stream := await _further(open_another)) is not None:
            async with stream:
                await send_header(stream, ["join", self._key])
                await self._send_blocks(stream)
                await send(stream, END)
                _ok(await read_header(Reader(stream), FINISH_S))


async def _further(open_another: Open) -> trio.SocketStream | None:
    """Open one more stream, or do without it."""
    try:
        return await open_another()
    except FileFault as fault:
        log.debug("no further stream: %s", fault)
        return None


async def _stat(stream: Any, reader: Reader, name: str) -> int:
    await send_header(stream, ["stat", name])
    return _ok(await read_header(reader))


def _ok(reply: list[Any] | None) -> int:
    match reply:
        case ["ok", int() as value] if value >= 0:
            return value
    raise _fault(reply)


def _fault(reply: list[Any] | None) -> FileFault:
    """Return what an answer that is not the expected one says."""
    match reply:
        case ["error", str() as variant, str() as text]:
            return FileFault(variant[:40], text[:1000])
        case None:
            return FileFault("ReadError", "the stream ended early", passing=True)
    return FileFault("InternalError", "not a gftp answer")
