"""What can be downloaded and uploaded, `Source` and `Sink`, and both as files of this machine.

Neighbours: `golem/files/server.py` publishes them; `golem/files/uploads.py` fills sinks.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import trio

from golem.base.reserve import NoRoom, free_at, give_back, reserve
from golem.base.reserve import check as check_room
from golem.files.outgoing import FileIdentity, identity_of
from golem.files.wire import part_name
from protocol.gftp import BLOCK_BYTES, FileFault

MAX_UPLOAD_BYTES = 1 << 40
SPARE_BYTES = 256 << 20  # of the disk, which uploads leave free
FILLED = "user.golem.filled"  # extended attribute of what came by a slot
MAX_LEFT_BYTES = 8 << 30  # of an upload from before this node began that are hashed again, while its sender waits


class Source(Protocol):
    """Something to download. Failures are `FileFault`."""

    async def size(self) -> int:
        """Size in bytes."""

    async def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`; fewer only at the end."""


class Sink(Protocol):
    """Somewhere to upload to, by one sender at a time. Failures are `FileFault`.

    An upload that breaks off between two writes may go on with the next one, within KEEP_S.
    """

    async def begin(self) -> None:
        """A new upload starts at offset 0; what an unfinished one left is void."""

    async def write(self, offset: int, content: bytes) -> None:
        """The next bytes, in order; at most BLOCK_BYTES."""

    async def finish(self, digest: str) -> None:
        """All is there, and has this digest (lower-case hex) by the hash `hash_name` of the sink, by default sha3_256."""

    async def abort(self) -> None:
        """The upload will not go on."""


class FileSource:
    """A regular file, read lazily: another file in its place, or a change of size or time, is an error, not other content.

    Its folder may be one that others write: they must not have us read what is ours alone.
    """

    def __init__(self, path: Path, identity: FileIdentity | None = None) -> None:
        """`identity`: that of the file which was meant. Raises `FileFault` unless it is a regular file that we can read."""
        self.path = Path(os.path.realpath(path)) if identity is None else path
        descriptor = self._open()
        try:
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        self._identity = identity or identity_of(status)
        self._size = status.st_size
        self._check(status)

    def _open(self) -> int:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError as error:
            raise FileFault("ReadError", f"cannot read {self.path.name}: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise FileFault("ReadError", f"not a regular file: {self.path.name}")
        return descriptor

    async def size(self) -> int:
        return self._size

    async def read(self, offset: int, size: int) -> bytes:
        data: bytes = await trio.to_thread.run_sync(self._read, offset, size)
        return data

    def _read(self, offset: int, size: int) -> bytes:
        descriptor = self._open()
        try:
            self._check(os.fstat(descriptor))
            data = os.pread(descriptor, size, offset)
            status = os.fstat(descriptor)
        except OSError as error:
            raise FileFault("ReadError", f"cannot read {self.path.name}: {error.strerror}") from None
        finally:
            os.close(descriptor)
        self._check(status)
        return data

    def _check(self, status: os.stat_result) -> None:
        if identity_of(status) != self._identity:
            raise FileFault("ReadError", f"{self.path.name} changed after it was published")


@dataclass(frozen=True)
class Filled:
    """What a slot has taken: it takes nothing else, and this once more without a byte of it."""

    size: int
    hash_name: str
    digest: str


class FileSink:
    """A slot: bytes go to a file beside the target, which takes its place at the end."""

    hash_name = "sha256"  # several times faster than SHA-3 on today's processors, and both ends have to hash

    def __init__(self, path: Path, slot: str = "", max_bytes: int = MAX_UPLOAD_BYTES) -> None:
        """`slot` is its name, by which a file that an earlier process left is found again; `max_bytes`: of what is taken.

        Raises `FileFault` if there is no such directory, or something other than a file is there.
        """
        if not path.parent.is_dir():
            raise FileFault("WriteError", f"no such directory: {path.parent}")
        if path.exists() and not path.is_file():
            raise FileFault("WriteError", f"not a regular file: {path}")
        self.path, self._max_bytes = path, max_bytes
        self._mark = hashlib.sha256(slot.encode()).hexdigest()[:32]
        self._part = path.with_name(part_name(path.name, slot or secrets.token_hex(8)))
        self._descriptor = -1
        self._reserved = 0  # bytes for which there is room

    def check(self, size: int) -> None:
        """Raises `FileFault` for an upload that is not taken because of its size."""
        if size > self._max_bytes:
            raise FileFault("WriteError", f"too large: {size} bytes, and this slot takes {self._max_bytes}")

    async def reserve(self, size: int) -> None:
        """Set room aside for all of an upload that has begun."""
        await trio.to_thread.run_sync(self._reserve, size)

    def _reserve(self, size: int) -> None:
        try:
            self._reserved = size if reserve(self._descriptor, size, SPARE_BYTES) else 0
        except NoRoom as error:
            raise FileFault("WriteError", f"cannot write {self.path.name}: {error}") from None
        except OSError as error:
            raise FileFault("WriteError", f"cannot write {self.path.name}: {error.strerror}") from None

    async def begin(self) -> None:
        self._close()
        self._descriptor, self._reserved = self._open(os.O_CREAT | os.O_TRUNC), 0

    def _open(self, flags: int) -> int:
        try:
            return os.open(self._part, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o666)
        except OSError as error:
            raise FileFault("WriteError", f"cannot write {self.path.name}: {error.strerror}") from None

    async def left(self) -> tuple[int, Any] | None:
        """Take up what an earlier process left: its size and the hash object that has read it, or None."""
        try:
            return await trio.to_thread.run_sync(self._left, abandon_on_cancel=True)  # it may be a long file
        except (FileFault, OSError):
            return None

    def _left(self) -> tuple[int, Any] | None:
        descriptor = self._open(0)
        status = os.fstat(descriptor)
        ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1
        if not ours or status.st_size > MAX_LEFT_BYTES:
            os.close(descriptor)
            return None
        self._close()
        self._descriptor = descriptor
        found = hashlib.new(self.hash_name)
        size = 0
        while block := os.read(descriptor, BLOCK_BYTES):
            found.update(block)
            size += len(block)
        return size, found

    async def write(self, offset: int, content: bytes) -> None:
        await trio.to_thread.run_sync(self._write, offset, content)

    def _write(self, offset: int, content: bytes) -> None:
        view = memoryview(content)
        try:
            if offset + len(content) > self._reserved:
                check_room(free_at(self._descriptor), len(content), SPARE_BYTES)
            while view:
                written = os.pwrite(self._descriptor, view, offset)
                view, offset = view[written:], offset + written
        except NoRoom as error:
            raise FileFault("WriteError", f"cannot write {self.path.name}: {error}") from None
        except OSError as error:
            raise FileFault("WriteError", f"cannot write {self.path.name}: {error.strerror}") from None

    async def finish(self, digest: str) -> None:
        with suppress(OSError):  # a file system without extended attributes: then a later node knows less
            size = os.fstat(self._descriptor).st_size
            os.setxattr(self._descriptor, FILLED, json.dumps([self._mark, size, self.hash_name, digest]).encode())
        self._close()
        try:
            os.replace(self._part, self.path)
        except OSError as error:
            raise FileFault("WriteError", f"cannot write {self.path.name}: {error.strerror}") from None

    def release(self) -> None:
        """Free what is set aside for bytes that do not come for now."""
        if self._descriptor >= 0:
            self._reserved = 0
            give_back(self._descriptor)

    def filled(self) -> Filled | None:
        """Return what an upload into this slot left where it leads, None if there was none, as far as that is known."""
        try:
            mark, size, hash_name, digest = json.loads(os.getxattr(self.path, FILLED))
            return Filled(int(size), str(hash_name), str(digest)) if mark == self._mark else None
        except (OSError, ValueError, TypeError):
            return None

    async def abort(self) -> None:
        self._close()
        self._part.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
