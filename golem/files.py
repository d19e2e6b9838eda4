"""Files that a node publishes for others (`gftp://<node>/<name>`), and slots that others upload into.

Other nodes, and processes of this machine through the bus, read and write over byte streams named `gftp`; the conversation
is in `golem/gftp_wire.py`. What is published is a `Source` or a `Sink`: here files of this machine, told by the `gftp`
tool over the bus and withdrawn when its connection ends.
Whoever knows a name may use it: names are hashes of content or random.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import stat
import string
from pathlib import Path
from typing import Any, Protocol

import msgspec
import trio

from golem.bus import BusPeer
from golem.gftp_wire import BROKEN, CHUNK_BYTES, STREAM, FileFault, Reader, read_header, send_header
from golem.net.types import RemoteError
from golem.router import Router

log = logging.getLogger("golem.files")

SLOT_NAME_LENGTH = 65
MAX_PUBLISHED = 100_000
MAX_UPLOAD_BYTES = 1 << 40
READ_AHEAD_CHUNKS = 2
STALL_S = 120.0  # without a byte either way a stream is given up
_ALPHANUMERICS = string.ascii_letters + string.digits


class Source(Protocol):
    """Something to download. Failures are `FileFault`."""

    async def size(self) -> int:
        """Size in bytes."""

    async def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`; fewer only at the end."""


class Sink(Protocol):
    """Somewhere to upload to, by one sender at a time. Failures are `FileFault`."""

    async def begin(self) -> None:
        """A new upload starts at offset 0; what an unfinished one left is void."""

    async def write(self, offset: int, content: bytes) -> None:
        """The next bytes, in order."""

    async def finish(self, sha3_256: str) -> None:
        """All is there; its hash in lower-case hex."""

    async def abort(self) -> None:
        """The upload broke off."""


class FileSource:
    """A regular file, read lazily: a change of size or time after publishing is an error, not other content."""

    def __init__(self, path: Path) -> None:
        """Raises `FileFault` unless it is a regular file that we can read."""
        self.path = path
        descriptor = self._open()
        try:
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        self._identity = (status.st_size, status.st_mtime_ns)
        self._size = status.st_size

    def _open(self) -> int:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise FileFault("ReadError", f"cannot read {self.path}: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise FileFault("ReadError", f"not a regular file: {self.path}")
        return descriptor

    async def size(self) -> int:
        return self._size

    async def read(self, offset: int, size: int) -> bytes:
        return await trio.to_thread.run_sync(self._read, offset, size)

    def _read(self, offset: int, size: int) -> bytes:
        descriptor = self._open()
        try:
            data = os.pread(descriptor, size, offset)
            status = os.fstat(descriptor)
        except OSError as error:
            raise FileFault("ReadError", f"cannot read {self.path}: {error.strerror}") from None
        finally:
            os.close(descriptor)
        if (status.st_size, status.st_mtime_ns) != self._identity:
            raise FileFault("ReadError", f"{self.path} changed after it was published")
        return data


class FileSink:
    """A slot: bytes go to a file beside the target, which takes its place once the hash is right."""

    def __init__(self, path: Path) -> None:
        """Raises `FileFault` if there is no such directory, or something other than a file is there."""
        if not path.parent.is_dir():
            raise FileFault("WriteError", f"no such directory: {path.parent}")
        if path.exists() and not path.is_file():
            raise FileFault("WriteError", f"not a regular file: {path}")
        self.path = path
        self._part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.part")
        self._descriptor = -1
        self._written = 0
        self._hash = hashlib.sha3_256()

    async def begin(self) -> None:
        await self.abort()
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(self._part, flags, 0o666)
        except OSError as error:
            raise FileFault("WriteError", f"cannot write {self.path}: {error.strerror}") from None
        self._written, self._hash = 0, hashlib.sha3_256()

    async def write(self, offset: int, content: bytes) -> None:
        if offset != self._written:
            raise FileFault("WriteError", f"expected offset {self._written}, got {offset}")
        await trio.to_thread.run_sync(self._write, content)

    def _write(self, content: bytes) -> None:
        self._hash.update(content)
        view = memoryview(content)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            raise FileFault("WriteError", f"cannot write {self.path}: {error.strerror}") from None
        self._written += len(content)

    async def finish(self, sha3_256: str) -> None:
        if self._hash.hexdigest() != sha3_256:
            raise FileFault("IntegrityError", "the hash of the upload is another")
        try:
            os.close(self._descriptor)
            self._descriptor = -1
            os.replace(self._part, self.path)
        except OSError as error:
            raise FileFault("WriteError", f"cannot write {self.path}: {error.strerror}") from None

    async def abort(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._part.unlink(missing_ok=True)


class _Publish(msgspec.Struct, frozen=True, array_like=True):
    path: str
    sha3_256: str


class _Receive(msgspec.Struct, frozen=True, array_like=True):
    path: str
    name: str = ""  # of a slot that a node before this one gave out


class _Close(msgspec.Struct, frozen=True, array_like=True):
    name: str


class FileServer:
    """All that this node publishes, by name. One name may have several owners; it is served until the last is gone."""

    def __init__(self, router: Router) -> None:
        self._entries: dict[str, dict[Any, Source | Sink]] = {}
        self._uploading: dict[str, tuple[trio.CancelScope, trio.Event]] = {}
        router.serve_stream(STREAM, self.serve)
        router.serve_local("gftp:publish", self._publish)
        router.serve_local("gftp:receive", self._receive)
        router.serve_local("gftp:close", self._close)
        router.on_leave(self.withdraw_all)

    # -- for edges
    def offer(self, name: str, what: Source | Sink, owner: object) -> None:
        """Publish under `name` for `owner`. Raises `FileFault` when there are too many names."""
        if name not in self._entries and len(self._entries) >= MAX_PUBLISHED:
            raise FileFault("InternalError", f"more than {MAX_PUBLISHED} published files")
        self._entries.setdefault(name, {})[owner] = what

    def withdraw(self, name: str, owner: object) -> bool:
        """Take back what `owner` published under `name`; returns whether there was something."""
        owners = self._entries.get(name, {})
        found = owners.pop(owner, None) is not None
        if not owners:
            self._entries.pop(name, None)
        return found

    def withdraw_all(self, owner: object) -> None:
        """Take back all that `owner` published."""
        for name in [name for name, owners in self._entries.items() if owner in owners]:
            self.withdraw(name, owner)

    def published(self) -> list[str]:
        """Return the names that are published."""
        return list(self._entries)

    # -- the gftp tool, over the bus
    async def _publish(self, client: BusPeer, payload: bytes) -> bytes:
        request = _decode(payload, _Publish)
        if len(request.sha3_256) != 64:
            raise RemoteError("expected a SHA3-256 hash in hex")
        try:
            source = await trio.to_thread.run_sync(FileSource, _absolute(request.path))
            self.offer(request.sha3_256, source, client)
        except FileFault as fault:
            raise RemoteError(str(fault)) from None
        return request.sha3_256.encode()

    async def _receive(self, client: BusPeer, payload: bytes) -> bytes:
        request = _decode(payload, _Receive)
        name = request.name or "".join(secrets.choice(_ALPHANUMERICS) for _ in range(SLOT_NAME_LENGTH))
        if len(name) != SLOT_NAME_LENGTH or not set(name) <= set(_ALPHANUMERICS):
            raise RemoteError("not the name of a slot")
        try:
            self.offer(name, FileSink(_absolute(request.path)), client)
        except FileFault as fault:
            raise RemoteError(str(fault)) from None
        return name.encode()

    async def _close(self, client: BusPeer, payload: bytes) -> bytes:
        name = _decode(payload, _Close).name
        for sink in self._entries.get(name, {}).values():
            if isinstance(sink, FileSink) and name not in self._uploading:
                await sink.abort()
        return b"ok" if self.withdraw(name, client) else b"error"

    # -- readers and writers
    async def serve(self, sender: str, stream: Any) -> None:
        """Serve one byte stream of node `sender`: requests one after another until it ends."""
        reader = Reader(stream, STALL_S)
        try:
            while (request := await read_header(reader)) is not None:
                try:
                    if not await self._request(request, reader, stream):
                        return
                except FileFault as fault:
                    await send_header(stream, ["error", fault.variant, str(fault)])
                    return
        except (FileFault, *BROKEN) as fault:
            log.debug("gftp stream of %s: %s", sender, fault)
        finally:
            with trio.CancelScope(shield=True):
                await stream.aclose()

    async def _request(self, request: list[Any], reader: Reader, stream: Any) -> bool:
        """Serve one request; returns whether the stream can take another."""
        match request:
            case ["stat", str() as name]:
                await send_header(stream, ["ok", await self._source(name).size()])
            case ["get", str() as name, int() as offset] if offset >= 0:
                return await self._send(self._source(name), offset, stream)
            case ["put", str() as name]:
                await self._take(name, reader, stream)
            case _:
                raise FileFault("InternalError", "not a request for a file")
        return True

    def _find(self, name: str) -> Any:
        for what in self._entries.get(name, {}).values():
            return what
        raise FileFault("InternalError", "no such file is published here")

    def _source(self, name: str) -> Source:
        found = self._find(name)
        if hasattr(found, "begin"):
            raise FileFault("ReadError", "an upload slot cannot be read")
        return found

    async def _send(self, source: Source, offset: int, stream: Any) -> bool:
        """Send a header and bytes. After the header a failure is told by ending early: returns False."""
        size = await source.size()
        data = await source.read(offset, CHUNK_BYTES) if offset < size else b""
        await send_header(stream, ["ok", size])
        while data:
            with trio.move_on_after(STALL_S) as scope:
                await stream.send_all(data)
            if scope.cancelled_caught:
                log.warning("gftp: the reader stalled")
                return False
            offset += len(data)
            try:
                data = await source.read(offset, CHUNK_BYTES) if offset < size else b""
            except FileFault as fault:
                log.warning("gftp: %s", fault)
                return False
        return offset >= size

    async def _take(self, name: str, reader: Reader, stream: Any) -> None:
        sink = self._find(name)
        if isinstance(sink, FileSource) or not hasattr(sink, "begin"):
            raise FileFault("WriteError", "not an upload slot")
        while name in self._uploading:  # its sender has come back: what broke off does not hold the slot
            former, done = self._uploading[name]
            former.cancel()
            await done.wait()
        with trio.CancelScope() as scope:
            self._uploading[name] = (scope, trio.Event())
            finished = False
            try:
                size = await self._fill(sink, reader, stream)
                finished = True
            finally:
                if not finished:
                    with trio.CancelScope(shield=True):
                        await sink.abort()
                self._uploading.pop(name)[1].set()
        if scope.cancelled_caught:
            raise FileFault("WriteError", "another upload to this slot began")
        await send_header(stream, ["ok", size])

    async def _fill(self, sink: Any, reader: Reader, stream: Any) -> int:
        """Bring an upload into its slot, reading ahead of the disk; returns its size."""
        await sink.begin()
        await send_header(stream, ["ok", 0])
        chunks_in, chunks_out = trio.open_memory_channel[bytes](READ_AHEAD_CHUNKS)
        size = 0
        failure: FileFault | None = None

        async def read() -> None:
            nonlocal failure
            with chunks_in:
                try:
                    while chunk := await reader.chunk():
                        await chunks_in.send(chunk)
                except FileFault as fault:
                    failure = fault
                except trio.BrokenResourceError:
                    pass  # the writer has failed, and says so

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            with chunks_out:
                async for chunk in chunks_out:
                    try:
                        if size + len(chunk) > MAX_UPLOAD_BYTES:
                            raise FileFault("WriteError", "the upload is too large")
                        await sink.write(size, chunk)
                    except FileFault as fault:
                        failure = fault
                        nursery.cancel_scope.cancel()
                        break
                    size += len(chunk)
        if failure is not None:
            raise failure
        await sink.finish((await reader.exactly(64)).decode("ascii", "replace"))
        return size


def _decode(payload: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.DecodeError, ValueError) as error:
        raise RemoteError(f"malformed request: {error}") from None


def _absolute(path: str) -> Path:
    if not path.startswith("/") or "\0" in path:
        raise RemoteError(f"not an absolute path: {path[:200]!r}")
    return Path(path)


__all__ = ["FileFault", "FileServer", "FileSink", "FileSource", "Sink", "Source"]
