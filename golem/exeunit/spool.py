"""What all transfers share: the policy, expected digests, and the file that a download fills.

Neighbours: `transfer`, which drives; `web` and `transfer.GftpRemote`, which fill a `Spool`; `images`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

Progress = Callable[[int, int | None], None]
Write = Callable[[bytes], Awaitable[None]]

CHUNK_BYTES = 1 << 16


class TransferError(Exception):
    """A transfer failed; the text is for the requestor. `passing` failures are worth another try."""

    def __init__(self, text: str, passing: bool = False) -> None:
        super().__init__(text)
        self.passing = passing


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
        """For a marketplace on one machine or in one laboratory: loopback and private addresses as well."""
        return cls(allow_loopback=True, allow_private=True, file_roots=tuple(file_roots))


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
            raise TransferError(f"hash mismatch: expected sha3:{self.hex}, got sha3:{found.hexdigest()}")


def redacted(url: str) -> str:
    """The URL without user name, password, query and fragment, for messages."""
    return re.sub(r"^([^:]+://)[^/@]*@", r"\1", re.split(r"[?#]", url, maxsplit=1)[0])


class Spool:
    """An open file that a download fills; knows its length and, if asked for, its hash. A restart truncates it."""

    def __init__(self, descriptor: int, max_bytes: int, digest: Digest | None, progress: Progress | None) -> None:
        self._descriptor = descriptor
        self._max_bytes = max_bytes
        self._digest = digest
        self._progress = progress
        self._hash = digest.new() if digest else None
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
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        self.size, self._hash = 0, self._digest.new() if self._digest else None

    async def write(self, chunk: bytes) -> None:
        """Errors: TransferError above the size limit or when the disk is full."""
        if self.size + len(chunk) > self._max_bytes:
            raise TransferError(f"the file is too large: more than {self._max_bytes} bytes")
        view = memoryview(chunk)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            raise TransferError(f"cannot store the file: {error.strerror}") from None
        self.size += len(chunk)
        if self._hash is not None:
            self._hash.update(chunk)
        if self._progress is not None:
            self._progress(self.size, self.total)
        await trio.lowlevel.checkpoint()

    def check(self) -> None:
        """Errors: TransferError if the content is not the expected one."""
        if self._digest is not None and self._hash is not None:
            self._digest.check(self._hash)
