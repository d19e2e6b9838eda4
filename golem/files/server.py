"""Files that a node publishes for others (`gftp://<node>/<name>`), and slots that others upload into.

Other nodes, and processes of this machine through the bus, read and write over byte streams named `gftp`; the conversation
is in `protocol/gftp.py`, the receiving side of uploads in `golem/files/uploads.py`. What is published is a `Source` or a
`Sink` (`golem/files/on_disk.py`). The `gftp` tool tells of files over the bus; they are withdrawn when its connection ends.
Whoever knows a name may use it. That of a file is the hash of its content and a code of this node's secret over it: the
same content has the same name, whoever fetches it can check it, and nobody can guess it who guesses the content. Names of
slots are random. Images of the registry are public (`golem/images/store.py`).
"""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import string
from pathlib import Path
from typing import Any

import msgspec
import trio

from golem.bus.router import Router
from golem.bus.server import BusPeer
from golem.files.on_disk import MAX_UPLOAD_BYTES, FileSink, FileSource, Filled, Sink, Source
from golem.files.outgoing import FileIdentity
from golem.files.uploads import Upload
from golem.files.wire import BROKEN, Reader, read_header, send, send_header
from golem.net.types import RemoteError
from protocol.gftp import BLOCK_BYTES, NOT_HERE, STREAM, FileFault

log = logging.getLogger("golem.files.server")

SLOT_NAME_LENGTH = 65
CODE_CHARS = 32
MAX_PUBLISHED = 100_000
KEEP_S = 300.0  # an upload that broke off, for its sender to come back
DRAIN_S = 2.0  # for a sender to notice that we said no
STALL_S = 120.0  # without a byte a stream is given up
_SHA3_256 = re.compile(r"[0-9a-f]{64}\Z")
_ALPHANUMERICS = string.ascii_letters + string.digits


class _Publish(msgspec.Struct, frozen=True, array_like=True):
    path: str
    sha3_256: str
    identity: FileIdentity | None = None  # of the file that was hashed


class _Receive(msgspec.Struct, frozen=True, array_like=True):
    path: str
    name: str = ""  # of a slot that a node before this one gave out
    max_bytes: int = MAX_UPLOAD_BYTES


class _Close(msgspec.Struct, frozen=True, array_like=True):
    name: str


class FileServer:
    """All that this node publishes, by name. One name may have several owners; it is served until the last is gone."""

    def __init__(self, router: Router, secret: bytes) -> None:
        """`secret` makes the names of files; the same one gives the same names after a restart."""
        self._secret = secret
        self._entries: dict[str, dict[Any, Source | Sink]] = {}
        self._uploads: dict[str, Upload] = {}  # under way, or kept for their sender to come back
        self._filled: dict[str, Filled] = {}  # slots that have what they waited for
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

    def name_of(self, sha3_256: str) -> str:
        """Return the name of a file with this content."""
        return f"{sha3_256}-{hmac.digest(self._secret, sha3_256.encode(), 'sha256').hex()[:CODE_CHARS]}"

    def withdraw(self, name: str, owner: object) -> bool:
        """Take back what `owner` published under `name`; returns whether there was something."""
        owners = self._entries.get(name, {})
        found = owners.pop(owner, None) is not None
        if not owners:
            self._entries.pop(name, None)
            self._filled.pop(name, None)
            if (upload := self._uploads.get(name)) is not None and upload.over.is_set():
                upload.settled.set()  # nobody waits for the rest
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
        if not _SHA3_256.match(request.sha3_256):
            raise RemoteError("expected a SHA3-256 hash in hex")
        name = self.name_of(request.sha3_256)
        try:
            source = await trio.to_thread.run_sync(FileSource, _absolute(request.path), request.identity)
            self.offer(name, source, client)
        except FileFault as fault:
            raise RemoteError(str(fault)) from None
        return name.encode()

    async def _receive(self, client: BusPeer, payload: bytes) -> bytes:
        request = _decode(payload, _Receive)
        name = request.name or "".join(secrets.choice(_ALPHANUMERICS) for _ in range(SLOT_NAME_LENGTH))
        if len(name) != SLOT_NAME_LENGTH or not set(name) <= set(_ALPHANUMERICS):
            raise RemoteError("not the name of a slot")
        try:
            sink = FileSink(_absolute(request.path), name, request.max_bytes)
            self.offer(name, sink, client)
        except FileFault as fault:
            raise RemoteError(str(fault)) from None
        if request.name and name not in self._filled and (filled := sink.filled()) is not None:
            self._filled[name] = filled
        return name.encode()

    async def _close(self, client: BusPeer, payload: bytes) -> bytes:
        name = _decode(payload, _Close).name
        for sink in self._entries.get(name, {}).values():
            if isinstance(sink, FileSink) and name not in self._uploads:
                await sink.abort()
        return b"ok" if self.withdraw(name, client) else b"error"

    # -- readers and writers
    async def serve(self, sender: str, stream: Any) -> None:
        """Serve one byte stream of node `sender`: requests one after another until it ends."""
        reader = Reader(stream, STALL_S)
        name = None  # of the upload that this stream began last
        try:
            while (request := await read_header(reader, STALL_S)) is not None:
                if request[0:1] == ["put"]:
                    name = request[1] if len(request) > 1 and isinstance(request[1], str) else None
                try:
                    await self._request(sender, request, reader, stream)
                except FileFault as fault:
                    await send_header(stream, ["error", fault.variant, str(fault)])
                    with trio.move_on_after(DRAIN_S):  # closing at once could overtake our word
                        await reader.drop()
                    return
        except (FileFault, *BROKEN) as fault:
            log.debug("gftp stream of %s: %s", sender, fault)
        finally:
            with trio.CancelScope(shield=True):
                await stream.aclose()
            if name is not None:
                await self._keep(name)

    async def _request(self, sender: str, request: list[Any], reader: Reader, stream: Any) -> None:
        match request:
            case ["stat", str() as name]:
                await send_header(stream, ["ok", await self._source(name).size()])
            case ["get", str() as name, int() as offset, int() as size] if offset >= 0 and size >= 0:
                await self._send(self._source(name), offset, size, stream)
            case ["put", str() as name, int() as size] if 0 <= size <= MAX_UPLOAD_BYTES:
                if isinstance(sink := self._sink(name), FileSink):
                    sink.check(size)
                await self._take(Upload(sender, self._sink(name), size), name, reader, stream)
            case ["join", str() as key]:
                found = [one for one in self._uploads.values() if (one.key, one.sender) == (key, sender)]
                if not found:
                    raise FileFault("WriteError", "no such upload is under way")
                await found[0].join(reader, stream)
            case _:
                raise FileFault("InternalError", "not a request for a file")

    def _find(self, name: str) -> Any:
        for what in self._entries.get(name, {}).values():
            return what
        raise FileFault("InternalError", NOT_HERE)

    def _source(self, name: str) -> Source:
        found: Source = self._find(name)
        if hasattr(found, "begin"):
            raise FileFault("ReadError", "an upload slot cannot be read")
        return found

    def _sink(self, name: str) -> Sink:
        found: Sink = self._find(name)
        if not hasattr(found, "begin"):
            raise FileFault("WriteError", "not an upload slot")
        return found

    async def _send(self, source: Source, offset: int, size: int, stream: Any) -> None:
        """Send a header and bytes, reading ahead. After the header a failure is told by ending early."""
        total = await source.size()
        end = min(offset + size, total)
        first = await source.read(offset, min(BLOCK_BYTES, end - offset)) if offset < end else b""
        await send_header(stream, ["ok", total])
        give, take = trio.open_memory_channel[bytes](1)
        fault: FileFault | None = None

        async def read(at: int, data: bytes) -> None:
            nonlocal fault
            with give:
                try:
                    while at < end:
                        if not data:
                            raise FileFault("ReadError", "the source ended early")
                        await give.send(data)
                        at += len(data)
                        data = await source.read(at, min(BLOCK_BYTES, end - at)) if at < end else b""
                except FileFault as failed:
                    fault = failed

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, offset, first)
            async for data in take:
                try:
                    await send(stream, data)
                except FileFault as failed:
                    fault = failed
                    nursery.cancel_scope.cancel()
                    break
        if fault is not None:
            log.info("gftp: sending ended early: %s", fault)
            raise trio.BrokenResourceError from None

    async def _take(self, upload: Upload, name: str, reader: Reader, stream: Any) -> None:
        """Bring an upload into its slot, from where a former attempt ended."""
        while (former := self._uploads.get(name)) is not None and not former.over.is_set():
            former.stop()  # its sender has come back: what broke off does not hold the slot
            await former.over.wait()
        if (filled := self._filled.get(name)) is not None:
            await _once_more(filled, upload.size, reader, stream)
            return
        former = self._uploads.pop(name, None)
        self._uploads[name] = upload
        try:
            await self._take_up(upload, former)
            await upload.run(reader, stream)
        except FileFault:
            if upload.lost:
                await upload.sink.abort()
            raise
        finally:
            upload.over.set()
        if isinstance(upload.sink, FileSink) and name in self._entries:
            self._filled[name] = Filled(upload.size, upload.hash_name, upload.hash.hexdigest())
        self._uploads.pop(name, None)
        await send_header(stream, ["ok", upload.size])

    async def _take_up(self, upload: Upload, former: Upload | None) -> None:
        """Let an upload begin with what was kept."""
        if former is None:
            left = await upload.sink.left() if isinstance(upload.sink, FileSink) else None
            if left is not None and left[0] <= upload.size:
                upload.written, upload.hash = left
            return
        former.settled.set()
        if former.sink is not upload.sink:
            await former.sink.abort()
        elif not former.lost and former.sender == upload.sender and former.written <= upload.size:
            upload.written, upload.hash = former.written, former.hash

    async def _keep(self, name: str) -> None:
        """Wait for the sender of an upload that broke off, and then forget it."""
        upload = self._uploads.get(name)
        if upload is None or not upload.over.is_set():
            return
        if upload.written and not upload.lost and name in self._entries:
            if isinstance(upload.sink, FileSink):
                upload.sink.release()  # room is for who sends
            with trio.move_on_after(KEEP_S):
                await upload.settled.wait()
        if self._uploads.get(name) is upload:
            del self._uploads[name]
            await upload.sink.abort()


async def _once_more(filled: Filled, size: int, reader: Reader, stream: Any) -> None:
    """Answer the sender of what a slot has already, whose first answer was lost; and nobody else. Raises `FileFault`."""
    if size == filled.size:
        await send_header(stream, ["ok", filled.size, filled.digest, filled.hash_name, secrets.token_hex(16)])
        match await read_header(reader):
            case ["from", int() as start] if start == size and not (await reader.block())[1]:
                if await reader.exactly(64) == filled.digest.encode():
                    await send_header(stream, ["ok", size])
                    return
            case None:
                raise FileFault("ReadError", "the stream ended early", passing=True)
    raise FileFault("WriteError", "this slot has taken a file already, and takes no other one")


def _decode(payload: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.DecodeError, ValueError) as error:
        raise RemoteError(f"malformed request: {error}") from None


def _absolute(path: str) -> Path:
    if not path.startswith("/") or "\0" in path:
        raise RemoteError(f"not an absolute path: {path[:200]!r}")
    return Path(path)
