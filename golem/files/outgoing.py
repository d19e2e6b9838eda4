"""A file on its way out: read, and hashed on the way, block by block, by however many attempts an upload takes.

Neighbours: `golem/files/client.py` and the exe-unit's transfers, which send it.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

from protocol.gftp import BLOCK_BYTES, FileFault

CHECKPOINT_BYTES = 64 << 20


FileIdentity = tuple[int, int, int, int, int]


def identity_of(status: os.stat_result) -> FileIdentity:
    """Return what tells a file, as it is now, from every other one."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class OutgoingFile:
    """An open file on its way out, `size` bytes of it: its blocks in order, and the hash of all before.

    One object serves all attempts of an upload: hashes at some offsets are kept, so that a later attempt need not read it all.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor, self.size = descriptor, size
        self.offset = 0
        self.kept = 0  # bytes that the other side had when the last attempt began
        self._hash_name = ""
        self._hash: Any = None
        self._known: dict[int, Any] = {}  # hashes by offset
        self._last_known = 0

    def next_block(self) -> bytes:
        """Read and hash the next block, b"" at the end; for a thread. Raises `FileFault`."""
        return self._advance(self.size)

    def _advance(self, end: int) -> bytes:
        wanted = min(BLOCK_BYTES, end - self.offset)
        try:
            block = os.pread(self.descriptor, wanted, self.offset)
        except OSError as error:
            raise FileFault("ReadError", f"cannot read the file: {error.strerror}") from None
        if len(block) < wanted:
            raise FileFault("ReadError", "the file became shorter while it was sent")
        self._hash.update(block)
        self.offset += len(block)
        if self.offset >= self._last_known + CHECKPOINT_BYTES:
            self._last_known = self.offset
            self._known[self.offset] = self._hash.copy()
        return block

    def rewind(self, offset: int, hash_name: str) -> str:
        """Go to an offset and return the digest of all before; for a thread. Raises `FileFault`."""
        if hash_name != self._hash_name:
            self._hash_name, self._known, self._last_known, self.offset = hash_name, {0: hashlib.new(hash_name)}, 0, -1
        near = max(known for known in self._known if known <= offset)
        if not near <= self.offset <= offset:
            self.offset, self._hash = near, self._known[near].copy()
        while self.offset < offset:
            self._advance(offset)
        return self.digest

    @property
    def digest(self) -> str:
        """In hex, of all before the offset."""
        return str(self._hash.hexdigest())
