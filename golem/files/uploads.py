"""One upload on its way into a sink: blocks of one stream or several, put in order, hashed, checked at the end.

An upload whose streams broke is kept for a while with what it has, and taken up by the next attempt of the same sender.
Neighbours: `golem/files/server.py` finds the sink and keeps the uploads by name; `protocol/gftp.py` has the conversation.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Any, Protocol, runtime_checkable

import trio

from golem.files.wire import Assembly, Reader, read_header, send_header
from protocol.gftp import BLOCK_BYTES, FileFault

AHEAD_BYTES = 4 << 20  # of blocks that wait for their turn, or for the disk
MAX_STREAMS = 16  # that bring one upload


@runtime_checkable
class Reserving(Protocol):
    """A sink with a disk behind it."""

    async def reserve(self, size: int) -> None:
        """Set room aside for all of an upload that has begun. Failures are `FileFault`."""


class Upload:
    """What `sender` sends into `sink`: a file of `size` bytes, of which `written` are there, with the digest of `hash`."""

    def __init__(self, sender: str, sink: Any, size: int) -> None:
        self.sender, self.sink, self.size = sender, sink, size
        self.key = secrets.token_hex(16)
        self.written = 0
        self.hash_name: str = getattr(sink, "hash_name", "sha3_256")
        self.hash = hashlib.new(self.hash_name)
        self.lost = False  # the sink failed, or has content that is not wanted: nothing can follow
        self.over = trio.Event()  # this attempt has ended
        self.settled = trio.Event()  # taken up, finished or withdrawn: nobody need keep it any more
        self._started = trio.Event()
        self._start_at = 0
        self._blocks = Assembly(0, AHEAD_BYTES)
        self._opening = trio.CancelScope()
        self._readers = 0
        self._fault: FileFault | None = None

    def stop(self) -> None:
        """End the attempt, because another one begins; `over` is set soon, when the sink is done with what it has."""
        self._fail(FileFault("WriteError", "another upload to this slot began"))
        self._opening.cancel()

    async def run(self, reader: Reader, stream: Any) -> None:
        """Talk with the sender on its first stream until the file is there. Raises `FileFault`."""
        try:
            with self._opening:
                await self._open(reader, stream)
            if self._fault is None:
                await self._receive(reader)
            if self._fault is not None:
                raise self._fault
        finally:
            self._blocks.close()
            self._started.set()
            self.over.set()

    async def _open(self, reader: Reader, stream: Any) -> None:
        await send_header(stream, ["ok", self.written, self.hash.hexdigest(), self.hash_name, self.key])
        match await read_header(reader):
            case ["from", int() as start] if start in (0, self.written):
                self._start_at = start
            case None:
                raise FileFault("ReadError", "the stream ended early", passing=True)
            case _:
                raise FileFault("InternalError", "not a place to go on from")
        if start == 0:
            self.written, self.hash = 0, hashlib.new(self.hash_name)
            self.lost = True  # unless it goes well
            await self.sink.begin()
            self.lost = False
        if isinstance(self.sink, Reserving):
            await self.sink.reserve(self.size)
        self._blocks = Assembly(start, AHEAD_BYTES)
        self._started.set()

    async def _receive(self, reader: Reader) -> None:
        promised = b""

        async def read() -> None:
            nonlocal promised
            await self.bring(reader)
            if self._fault is None:
                try:
                    promised = await reader.exactly(64)
                except FileFault as fault:
                    self._fail(fault)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            try:
                while self.written < self.size and (block := await self._blocks.take()):
                    await self._store(block)
            except FileFault as fault:
                self._fail(fault)
            if self.written < self.size or self._fault is not None:
                nursery.cancel_scope.cancel()
        if self._fault is not None:
            return
        if self.written < self.size:
            raise FileFault("ReadError", "the upload ended early", passing=True)
        self.lost = True
        if promised != self.hash.hexdigest().encode():
            raise FileFault("IntegrityError", "the hash of the upload is another")
        await self.sink.finish(self.hash.hexdigest())

    async def _store(self, block: bytes) -> None:
        self.lost = True
        await trio.to_thread.run_sync(self.hash.update, block)
        await self.sink.write(self.written, block)
        self.written += len(block)
        self.lost = False

    async def join(self, reader: Reader, stream: Any) -> None:
        """Bring the blocks of another stream, and tell the sender when all have their place."""
        await self._started.wait()
        await self.bring(reader)
        if self._fault is not None:
            raise self._fault
        await send_header(stream, ["ok", 0])

    async def bring(self, reader: Reader) -> None:
        """Put the blocks of one stream into their places until its end mark; a failure is the upload's."""
        if self._readers >= MAX_STREAMS:
            raise FileFault("InternalError", "too many streams for one upload")
        self._readers += 1
        try:
            while True:
                at, block = await reader.block()
                if not block:
                    return
                if (at - self._start_at) % BLOCK_BYTES or len(block) != min(BLOCK_BYTES, self.size - at):
                    raise FileFault("InternalError", f"a block of {len(block)} bytes at {at} is out of place")
                if not await self._blocks.room(at):
                    return
                self._blocks.put(at, block)
        except FileFault as fault:
            self._fail(fault)
        finally:
            self._readers -= 1
            if not self._readers:
                self._blocks.close()  # nobody brings more

    def _fail(self, fault: FileFault) -> None:
        self._fault = self._fault or fault
        self._blocks.close()
