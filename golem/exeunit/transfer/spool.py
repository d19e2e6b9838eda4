"""What all transfers share: the policy, expected digests, and the file that a download fills.

Neighbours: `transfer`, which drives; `web` and `transfer.GftpRemote`, which fill a `Spool`; `images`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from golem.base.reserve import NoRoom, check, free_at, reserve

Progress = Callable[[int, int | None], None]
Write = Callable[[bytes], Awaitable[None]]

CHUNK_BYTES = 1 << 16
BLOCK_BYTES = 1 << 20  # what is stored and hashed at a time
_LOOKS = threading.Lock()  # two blocks that look at once would both find the room that is there for one


class TransferError(Exception):
    """A transfer failed; the text is for the requestor. `passing` failures are worth another try."""

    def __init__(self, text: str, passing: bool = False) -> None:
        super().__init__(text)
        self.passing = passing


class HashMismatch(TransferError):
    """The content is not what its hash promised."""


@dataclass(frozen=True)
class TransferPolicy:
    """What the provider lets transfers do. The default reaches public addresses only."""

    allow_loopback: bool = False
    allow_private: bool = False
    file_roots: tuple[Path, ...] = ()  # for `file:` task packages
    max_bytes: int = 64 << 30
    max_time_s: float = 6 * 3600.0
    max_redirects: int = 10

    @classmethod
    def local(cls, file_roots: Sequence[Path] = ()) -> TransferPolicy:
        """For a marketplace on one machine or in one laboratory: loopback and private addresses as well.

        Whose requestor is not there himself gets neither: see `for_requestor`.
        """
        return cls(allow_loopback=True, allow_private=True, file_roots=tuple(file_roots))

    def for_requestor(self, nearness: str) -> TransferPolicy:
        """Return what of it a requestor gets: this machine's loopback is for this machine, its networks for who is on them."""
        return replace(
            self,
            allow_loopback=self.allow_loopback and nearness == "machine",
            allow_private=self.allow_private and nearness in ("machine", "network"),
        )


@dataclass(frozen=True)
class Digest:
    """An expected SHA3 digest: 224, 256, 384 or 512 bits, lower-case hex."""

    bits: int
    hex: str

    def new(self) -> hashlib._Hash:
        return hashlib.new(f"sha3_{self.bits}")

    def check(self, found: hashlib._Hash) -> None:
        """Errors: TransferError when the content is another."""
        if found.hexdigest() != self.hex:
            raise HashMismatch(f"hash mismatch: expected sha3:{self.hex}, got sha3:{found.hexdigest()}")


def redacted(url: str) -> str:
    """The URL without user name, password, query and fragment, for messages."""
    return re.sub(r"^([^:]+://)[^/@]*@", r"\1", re.split(r"[?#]", url, maxsplit=1)[0])


class Spool:
    """An open file that a download fills, in order; knows its length and, if asked for, its hash.

    Bytes are gathered into blocks, which a thread stores and hashes. `flush` before the file is used.
    """

    def __init__(
        self,
        descriptor: int,
        max_bytes: int,
        digest: Digest | None,
        progress: Progress | None,
        spare_bytes: int = 0,
        make_room: Callable[[int], object] = lambda size: None,
    ) -> None:
        """`spare_bytes` stay free on the disk, if not 0: room is set aside once the source has said how long it is.

        `make_room` is called before, in a thread, with how much more is to come.
        """
        self._descriptor, self._spare_bytes, self._make_room = descriptor, spare_bytes, make_room
        self._reserved_for = -1  # the length for which there is room
        self._max_bytes = max_bytes
        self._progress = progress
        self._hash = digest.new() if digest else None
        self._held = bytearray()  # not yet stored
        self.digest = digest
        self.size = 0
        self.total: int | None = None
        self.validator: str | None = None  # of the remote file's version, for a resumed download

    def expect(self, total: int | None) -> None:
        """The source says how long it is.

        Errors: TransferError if that is too much.
        """
        self.total = total
        if total is not None and total > self._max_bytes:
            raise TransferError(f"the file is too large: {total} bytes, at most {self._max_bytes}")

    def restart(self) -> None:
        """Forget what came so far."""
        os.ftruncate(self._descriptor, 0)
        self._reserved_for = -1
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        self._held.clear()
        self.size, self._hash = 0, self.digest.new() if self.digest else None

    async def take_up(self) -> None:
        """Go on after what the file holds already: the beginning of a download that another process did not end."""
        self._hash = self.digest.new() if self.digest else None
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        self.size = 0
        while self.size <= self._max_bytes and (more := await trio.to_thread.run_sync(self._read_hashed)):
            self.size += more
        if self.size > self._max_bytes:
            self.restart()

    def _read_hashed(self) -> int:
        block = os.read(self._descriptor, BLOCK_BYTES)
        if self._hash is not None:
            self._hash.update(block)
        return len(block)

    async def write(self, chunk: bytes | bytearray) -> None:
        """Errors: TransferError above the size limit or when the disk is full."""
        if self.size + len(chunk) > self._max_bytes:
            raise TransferError(f"the file is too large: more than {self._max_bytes} bytes")
        if self._held or len(chunk) < BLOCK_BYTES:
            self._held += chunk
            self.size += len(chunk)
            if len(self._held) >= BLOCK_BYTES:
                await self.flush()
            else:
                await trio.lowlevel.checkpoint()
        else:
            await trio.to_thread.run_sync(self._store, chunk)
            self.size += len(chunk)
        if self._progress is not None:
            self._progress(self.size, self.total)

    async def flush(self) -> None:
        """Store what was written.

        Errors: TransferError when the disk is full.
        """
        if self._held:
            await trio.to_thread.run_sync(self._store, self._held)  # wholly or, if cancelled before, not at all
            self._held = bytearray()

    def _store(self, block: bytes | bytearray) -> None:
        view = memoryview(block)
        try:
            with _LOOKS if self._spare_bytes else contextlib.nullcontext():
                if self._spare_bytes:
                    self._have_room(len(block))
                while view:
                    view = view[os.write(self._descriptor, view) :]
        except NoRoom as error:
            raise TransferError(f"cannot store the file: {error}") from None
        except OSError as error:
            raise TransferError(f"cannot store the file: {error.strerror}") from None
        if self._hash is not None:
            self._hash.update(block)

    def _have_room(self, size: int) -> None:
        """Raises `NoRoom` where the next `size` bytes would take what is to stay free."""
        at = os.lseek(self._descriptor, 0, os.SEEK_CUR)
        if self.total is not None and at + size <= self.total:
            if self._reserved_for != self.total:
                self._make_room(self.total - at)
            if self._reserved_for != self.total and reserve(self._descriptor, self.total, self._spare_bytes):
                self._reserved_for = self.total
            if self._reserved_for == self.total:
                return
        self._make_room(size)
        check(free_at(self._descriptor), size, self._spare_bytes)

    async def finish(self) -> None:
        """All is there: store it, and check its hash.

        Errors: TransferError, of which HashMismatch if the content is not the expected one.
        """
        await self.flush()
        if self.digest is not None and self._hash is not None:
            self.digest.check(self._hash)
