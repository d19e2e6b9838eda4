"""Compressed streams of strangers, inflated within bounds: gzip, zstd, xz, bzip2 and plain, told apart by content.

Runs in the sandboxed child of `images`; nothing here imports more than it must. Neighbours: `tarball`, `archives`.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from typing import Any, Protocol, cast

CHUNK_BYTES = 1 << 20
GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
XZ_MAGIC, BZIP2_MAGIC = b"\xfd7zXZ\0", b"BZh"
_OTHER_MAGICS = {b"\x04\x22\x4d\x18": "lz4"}
_MAX_XZ_BYTES = 128 << 20  # of memory: `xz -9` asks for 65 MiB
_GZIP_FORMAT = 31
_MAX_ZSTD_WINDOW_BYTES = 128 << 20


class BadImage(Exception):
    """The package cannot become an image; the text is for the requestor."""


class ByteSource(Protocol):
    """A stream of bytes."""

    def read(self, most: int) -> bytes:
        """Return up to `most` bytes, fewer only before the end, b"" at it."""


class Part:
    """A part of an open file, read by position; `seen` hears of every chunk."""

    def __init__(self, descriptor: int, offset: int, size: int, seen: Callable[[bytes], None] | None = None) -> None:
        self._descriptor, self._offset, self._left, self._seen = descriptor, offset, size, seen

    def read(self, most: int) -> bytes:
        chunk = os.pread(self._descriptor, min(most, self._left), self._offset) if self._left else b""
        self._offset += len(chunk)
        self._left -= len(chunk)
        if self._seen is not None and chunk:
            self._seen(chunk)
        return chunk

    def drain(self) -> None:
        """Read what is left, for the sake of who hears of it."""
        while self.read(CHUNK_BYTES):
            pass


class Ratio:
    """Tells a bomb by how much comes out of how little, once `free` bytes have come out."""

    def __init__(self, most: int, free: int) -> None:
        self._most, self._free = most, free

    def check(self, packed: int, unpacked: int) -> None:
        """Errors: BadImage."""
        if unpacked > self._free and unpacked > self._most * packed:
            raise BadImage(f"a compression bomb: {packed} bytes have become {unpacked}, more than {self._most} times as much")


class _Inflated:
    """The stream that comes out of a compressed one; how is up to the two kinds below."""

    def __init__(self, source: ByteSource, what: str, ratio: Ratio) -> None:
        self._source, self._what, self._ratio = source, what, ratio
        self._packed = self._unpacked = 0

    def read(self, most: int) -> bytes:
        chunks, missing = [], most
        while missing:
            chunk = self._next(min(missing, CHUNK_BYTES))
            if not chunk:
                break
            chunks.append(chunk)
            missing -= len(chunk)
            self._unpacked += len(chunk)
            self._ratio.check(self._packed, self._unpacked)
        return b"".join(chunks)

    def _take(self, most: int) -> bytes:
        chunk = self._source.read(most)
        self._packed += len(chunk)
        return chunk

    def _next(self, most: int) -> bytes:
        raise AssertionError("for the kinds below")

    def _damaged(self, why: object) -> BadImage:
        return BadImage(f"{self._what} is damaged: {why}")


class _Gunzipped(_Inflated):
    def __init__(self, source: ByteSource, what: str, ratio: Ratio) -> None:
        super().__init__(source, what, ratio)
        self._inflate = zlib.decompressobj(_GZIP_FORMAT)
        self._members = 1
        self._input = b""
        self._ended = False

    def _next(self, most: int) -> bytes:
        while not self._ended:
            if self._inflate.eof and not self._new_member():
                break
            self._input = self._input or self._take(CHUNK_BYTES // 16)
            try:
                chunk = self._inflate.decompress(self._input, most)
            except zlib.error as error:
                raise self._damaged(error) from None
            if not chunk and not self._input and not self._inflate.eof:
                raise self._damaged("the gzip data ends too early")
            self._input = self._inflate.unconsumed_tail
            if self._inflate.eof:
                self._input = self._inflate.unused_data
            if chunk:
                return chunk
        return b""

    def _new_member(self) -> bool:
        """A gzip file may be several, one after the other (pigz); zeros behind the last are padding."""
        while not self._input.strip(b"\0"):
            self._input = self._take(CHUNK_BYTES // 16)
            if not self._input:
                self._ended = True
                return False
        if self._input[:1] != GZIP_MAGIC[:1]:
            raise self._damaged("something else follows the gzip data")
        self._inflate = zlib.decompressobj(_GZIP_FORMAT)
        return True


class _Unzstd(_Inflated):
    def __init__(self, source: ByteSource, what: str, ratio: Ratio) -> None:
        super().__init__(source, what, ratio)
        import zstandard

        self._error = zstandard.ZstdError
        outer = self

        class Counted:
            def read(self, most: int = -1) -> bytes:
                return outer._take(most if most > 0 else CHUNK_BYTES)

        plan = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW_BYTES)
        self._reader = plan.stream_reader(cast("Any", Counted()), read_size=CHUNK_BYTES // 16, read_across_frames=True)

    def _next(self, most: int) -> bytes:
        try:
            return self._reader.read(most)
        except self._error as error:
            raise self._damaged(error) from None


class _Blocks(_Inflated):
    """What xz or bzip2 have packed; a file may be several streams, one after the other."""

    def __init__(self, source: ByteSource, what: str, ratio: Ratio, name: str) -> None:
        super().__init__(source, what, ratio)
        self._name, self._input, self._ended = name, b"", False
        self._begin()

    def _begin(self) -> None:
        if self._name == "xz":
            import lzma

            self._plan: Any = lzma.LZMADecompressor(lzma.FORMAT_XZ, _MAX_XZ_BYTES)
            self._errors: tuple[type[Exception], ...] = lzma.LZMAError, EOFError
        else:
            import bz2

            self._plan, self._errors = bz2.BZ2Decompressor(), (OSError, ValueError, EOFError)

    def _next(self, most: int) -> bytes:
        while not self._ended:
            if self._plan.eof and not self._new_stream():
                break
            if self._plan.needs_input and not self._input:
                self._input = self._take(CHUNK_BYTES // 16)
                if not self._input:
                    raise self._damaged(f"the {self._name} data ends too early")
            given, self._input = self._input, b""
            try:
                chunk = bytes(self._plan.decompress(given, most))
            except self._errors as error:
                raise self._damaged(error) from None
            if chunk:
                return chunk
        return b""

    def _new_stream(self) -> bool:
        """Begin the next stream; zeros behind the last are padding."""
        self._input = self._plan.unused_data.lstrip(b"\0")
        while not self._input:
            taken = self._take(CHUNK_BYTES // 16)
            if not taken:
                self._ended = True
                return False
            self._input = taken.lstrip(b"\0")
        self._begin()
        return True


class _Unread:
    """A source whose first bytes have been looked at."""

    def __init__(self, head: bytes, source: ByteSource) -> None:
        self._head, self._source = head, source

    def read(self, most: int) -> bytes:
        if self._head:
            chunk, self._head = self._head[:most], self._head[most:]
            return chunk if len(chunk) == most else chunk + self._source.read(most - len(chunk))
        return self._source.read(most)


def inflated(source: ByteSource, what: str, ratio: Ratio) -> ByteSource:
    """Return the plain stream of a source that is plain, gzip, zstd, xz or bzip2. `what` names it in messages.

    Errors: BadImage when it is compressed in another way; reading raises it when the stream is damaged or a bomb.
    """
    head = source.read(8)
    whole = _Unread(head, source)
    if head.startswith(GZIP_MAGIC):
        return _Gunzipped(whole, what, ratio)
    if head.startswith(ZSTD_MAGIC):
        return _Unzstd(whole, what, ratio)
    for magic, name in ((XZ_MAGIC, "xz"), (BZIP2_MAGIC, "bzip2")):
        if head.startswith(magic):
            return _Blocks(whole, what, ratio, name)
    for magic, name in _OTHER_MAGICS.items():
        if head.startswith(magic):
            raise BadImage(f"{what} is compressed with {name}; gzip, zstd, xz, bzip2 and none are known here")
    return whole
