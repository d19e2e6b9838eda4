"""Squashfs 4.0 and GVMI, read without the kernel's help.

A GVMI is a squashfs, then the CRC32 of a JSON text (u32, little endian), that text (a Docker container configuration)
and its length as 8 ASCII digits. Every offset and length of the file system comes from a stranger: tables are bounded
before they are read, blocks inflate to at most what their kind may hold, directories are walked without recursion and
none twice. The decompressors are libraries; the walk is our own, because the ones there are read whole trees and tables
into memory before anybody can say stop.

Runs in the sandboxed child of `images`. Format: https://dr-emann.github.io/squashfs/. Neighbour: `archives`.
"""

from __future__ import annotations

import lzma
import os
import re
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from golem.exeunit.unpack.config import read_json
from golem.exeunit.unpack.inflate import BadImage
from golem.exeunit.unpack.tarball import MAX_NAME_BYTES, MAX_PATH_BYTES, Kind, Member, shown

MAGIC = b"hsqs"
MAX_METADATA_BYTES = 1 << 20
META_BYTES = 8192
MIN_BLOCK_BYTES, MAX_BLOCK_BYTES = 1 << 12, 1 << 20
MAX_IDS = 1 << 16
MAX_LZMA_BYTES = 64 << 20
MAX_ZSTD_WINDOW_BYTES = 8 << 20
_LIBRARIES = ("lzallright", "lz4.block", "zstandard")
_SUPERBLOCK = struct.Struct("<4sIIIIHHHHHHQQQQQQQQ")
_INODE = struct.Struct("<HHHHII")
_NO_FRAGMENT = 0xFFFFFFFF
_STORED_BLOCK, _STORED_META = 1 << 24, 1 << 15
_META_CACHE, _FRAGMENT_CACHE = 256, 8
_BASIC_DIR, _BASIC_FILE, _BASIC_SYMLINK, _EXT_DIR, _EXT_FILE, _EXT_SYMLINK = 1, 2, 3, 8, 9, 10
_REFUSED = {4: "a block device", 5: "a character device", 6: "a FIFO", 7: "a socket"}

Content = Callable[[], Iterator[bytes]]


def read_metadata(descriptor: int, size: int) -> tuple[dict[str, Any], int]:
    """Return the configuration of a GVMI and how many bytes of the file may be squashfs. Errors: BadImage."""
    digits = os.pread(descriptor, 8, max(0, size - 8))
    if size < _SUPERBLOCK.size + 12 or not re.fullmatch(rb"\d{8}", digits):
        raise BadImage("the GVMI has no configuration at its end: is it a bare squashfs?")
    length = int(digits)
    if length > min(MAX_METADATA_BYTES, size - 12 - _SUPERBLOCK.size):
        raise BadImage(f"the GVMI's configuration has {length} bytes, at most {MAX_METADATA_BYTES}")
    end = size - 12 - length
    block = os.pread(descriptor, 4 + length, end)
    if zlib.crc32(block[4:]) != int.from_bytes(block[:4], "little"):
        raise BadImage("the GVMI's configuration has a wrong CRC32")
    config = read_json(block[4:], "the GVMI's configuration")
    if not isinstance(config, dict):
        raise BadImage("the GVMI's configuration is not an object")
    return config, end


def load_libraries() -> None:
    """Import the decompressors, while this process may still open files."""
    for name in _LIBRARIES:
        import_module(name)


def _inflater(compression: int) -> tuple[Callable[[bytes, int], bytes], tuple[type[Exception], ...]]:
    """Return how a block inflates and what that raises: a function (data, most), whose result may be too long."""
    if compression == 1:
        return lambda data, most: zlib.decompressobj().decompress(data, most + 1), (zlib.error,)
    if compression == 3:
        lzo = import_module("lzallright")
        inflate = lzo.LZOCompressor().decompress
        return lambda data, most: bytes(inflate(data, most)), (lzo.LZOError,)
    if compression == 4:
        xz = lzma.LZMADecompressor
        return lambda data, most: xz(lzma.FORMAT_XZ, MAX_LZMA_BYTES).decompress(data, most + 1), (lzma.LZMAError, EOFError)
    if compression == 5:
        lz4 = import_module("lz4.block")
        return lambda data, most: bytes(lz4.decompress(data, uncompressed_size=most)), (lz4.LZ4BlockError, ValueError)
    if compression == 6:
        zstandard = import_module("zstandard")
        zstd = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW_BYTES)
        return lambda data, most: zstd.stream_reader(data).read(most + 1), (zstandard.ZstdError,)
    name = {2: "lzma"}.get(compression, str(compression))
    raise BadImage(f"the squashfs is compressed with {name}; gzip, lzo, xz, lz4 and zstd are known here")


@dataclass(frozen=True)
class _Inode:
    kind: int
    mode: int
    uid: int
    gid: int
    mtime: int
    start: int = 0  # of a file's data or a directory's listing
    offset: int = 0  # in the fragment or the listing's first block
    size: int = 0
    fragment: int = _NO_FRAGMENT
    at: tuple[int, int] = (0, 0)  # where the list of block sizes begins
    link: bytes = b""


class Squashfs:
    """A squashfs in the first `size` bytes of an open file."""

    def __init__(self, descriptor: int, size: int, max_members: int) -> None:
        """Errors: BadImage."""
        self._descriptor, self._max_members = descriptor, max_members
        raw = os.pread(descriptor, _SUPERBLOCK.size, 0)
        if len(raw) < _SUPERBLOCK.size:
            raise BadImage("the squashfs: it ends too early")
        (magic, self.inodes, _, self._block_bytes, self._fragments, compression, block_log, _, ids, major, minor, self._root,
         self._end, self._id_table, _, self._inode_table, self._directory_table, self._fragment_table, _,
         ) = _SUPERBLOCK.unpack(raw)  # fmt: skip
        if magic != MAGIC or (major, minor) != (4, 0):
            raise self._bad("only version 4.0 is known here")
        if not MIN_BLOCK_BYTES <= self._block_bytes <= MAX_BLOCK_BYTES or self._block_bytes != 1 << block_log:
            raise self._bad(f"a block size of {self._block_bytes} bytes")
        if not _SUPERBLOCK.size <= self._end <= size:
            raise self._bad("it is longer than the file")
        if self.inodes > max_members:
            raise BadImage(f"more than {max_members} files, directories and links")
        if self._fragments > self.inodes or ids > MAX_IDS:
            raise self._bad("tables larger than its files need")
        self._inflate, self._damage = _inflater(compression)
        self._meta: OrderedDict[int, tuple[bytes, int]] = OrderedDict()
        self._tails: OrderedDict[int, bytes] = OrderedDict()
        self._ids = struct.unpack(f"<{ids}I", self._table(self._id_table, ids * 4))

    def members(self) -> Iterator[tuple[Member, Content]]:
        """Walk the tree, parents first; the second of each pair gives a file's bytes.

        A file that has several names comes once, then as hard links. Errors: BadImage.
        """
        files: dict[int, bytes] = {}
        directories: set[int] = set()
        pending = [(b"", self._root)]
        count = 0
        while pending:
            name, reference = pending.pop()
            count += 1
            if count > self._max_members:
                raise BadImage(f"more than {self._max_members} files, directories and links")
            inode = self._inode(reference, name)
            if inode.kind == _BASIC_DIR:
                if reference in directories:
                    raise self._bad(f"the directory {shown(name)} is there twice")
                directories.add(reference)
                yield self._member(name or b".", Kind.DIRECTORY, inode), _nothing
                entries = list(self._entries(inode, name))
                pending.extend(reversed([(name + b"/" + base if name else base, at) for base, at in entries]))
                if len(pending) + count > self._max_members:
                    raise BadImage(f"more than {self._max_members} files, directories and links")
            elif not name:
                raise self._bad("its root is no directory")
            elif inode.kind == _BASIC_SYMLINK:
                yield self._member(name, Kind.SYMLINK, inode, link=inode.link), _nothing
            elif reference in files:
                yield self._member(name, Kind.HARD_LINK, inode, link=files[reference]), _nothing
            else:
                files[reference] = name
                yield self._member(name, Kind.FILE, inode, inode.size), partial(self._content, inode, name)

    def _member(self, name: bytes, kind: Kind, inode: _Inode, size: int = 0, link: bytes = b"") -> Member:
        return Member(name, kind, inode.mode & 0o7777, inode.uid, inode.gid, size, inode.mtime, link)

    # -- inodes and directories
    def _inode(self, reference: int, name: bytes) -> _Inode:
        block, offset = self._inode_table + (reference >> 16), reference & 0xFFFF
        reader = _Meta(self, block, offset, self._directory_table)
        kind, mode, uid, gid, mtime, _ = _INODE.unpack(reader.read(_INODE.size))
        basic = kind - 7 if kind > 7 else kind
        if basic in _REFUSED:
            raise self._bad(f"{shown(name)} is {_REFUSED[basic]}: an image has files, directories and links only")
        if uid >= len(self._ids) or gid >= len(self._ids):
            raise self._bad(f"{shown(name)} has an owner that is in no table")
        owner = (mode, self._ids[uid], self._ids[gid], mtime)
        if kind == _BASIC_DIR:
            start, _, size, offset, _ = struct.unpack("<IIHHI", reader.read(16))
            return _Inode(_BASIC_DIR, *owner, start, offset, size)
        if kind == _EXT_DIR:
            _, size, start, _, _, offset, _ = struct.unpack("<IIIIHHI", reader.read(24))
            return _Inode(_BASIC_DIR, *owner, start, offset, size)
        if kind == _BASIC_FILE:
            start, fragment, offset, size = struct.unpack("<IIII", reader.read(16))
            return _Inode(_BASIC_FILE, *owner, start, offset, size, fragment, reader.at)
        if kind == _EXT_FILE:
            start, size, _, _, fragment, offset, _ = struct.unpack("<QQQIIII", reader.read(40))
            return _Inode(_BASIC_FILE, *owner, start, offset, size, fragment, reader.at)
        if kind in (_BASIC_SYMLINK, _EXT_SYMLINK):
            _, length = struct.unpack("<II", reader.read(8))
            if length > MAX_PATH_BYTES:
                raise self._bad(f"{shown(name)} is a symbolic link of {length} bytes")
            return _Inode(_BASIC_SYMLINK, *owner, link=reader.read(length))
        raise self._bad(f"{shown(name)} is of unknown type {kind}")

    def _entries(self, inode: _Inode, name: bytes) -> Iterator[tuple[bytes, int]]:
        """Names in a directory and references of their inodes. A listing's size counts 3 bytes that are not there."""
        left = inode.size - 3
        reader = _Meta(self, self._directory_table + inode.start, inode.offset, self._end)
        while left > 0:
            count, start, _ = struct.unpack("<III", reader.read(12))
            left -= 12
            if count >= 256:
                raise self._bad(f"a directory header with {count + 1} names in {shown(name)}")
            for _ in range(count + 1):
                offset, _, _, length = struct.unpack("<HhHH", reader.read(8))
                if length >= MAX_NAME_BYTES + 1:
                    raise self._bad(f"a name of {length + 1} bytes in {shown(name)}")
                base = reader.read(length + 1)
                left -= 9 + length
                if base in (b".", b"..") or b"/" in base or b"\0" in base:
                    raise self._bad(f"the name {shown(base)} in {shown(name)}")
                yield base, start << 16 | offset
        if left < 0:
            raise self._bad(f"the directory {shown(name)} does not end where it should")

    # -- data
    def _content(self, inode: _Inode, name: bytes) -> Iterator[bytes]:
        full, rest = divmod(inode.size, self._block_bytes)
        tail = inode.fragment != _NO_FRAGMENT
        blocks = full if tail or not rest else full + 1
        sizes, start = _Meta(self, *inode.at, self._directory_table), inode.start
        left = inode.size
        for _ in range(blocks):
            size = int.from_bytes(sizes.read(4), "little")
            wanted = min(self._block_bytes, left)
            if size:
                chunk = self._block(start, size, name)
                if len(chunk) != wanted:
                    raise self._bad(f"{shown(name)} has a block of {len(chunk)} bytes, not {wanted}")
                start += size & (_STORED_BLOCK - 1)
                yield chunk
            else:
                yield bytes(wanted)
            left -= wanted
        if tail and rest:
            whole = self._fragment(inode.fragment, name)
            if inode.offset + rest > len(whole):
                raise self._bad(f"{shown(name)} ends outside its fragment")
            yield whole[inode.offset : inode.offset + rest]

    def _block(self, start: int, size: int, name: bytes) -> bytes:
        stored, packed = bool(size & _STORED_BLOCK), size & (_STORED_BLOCK - 1)
        if size > 2 * _STORED_BLOCK - 1 or packed > self._block_bytes:
            raise self._bad(f"{shown(name)} has a block of {packed} bytes")
        data = self._pread(start, packed)
        return data if stored else self._inflated(data, self._block_bytes)

    def _fragment(self, number: int, name: bytes) -> bytes:
        if number >= self._fragments:
            raise self._bad(f"{shown(name)} has a fragment that is in no table")
        if number not in self._tails:
            pointer = int.from_bytes(self._pread(self._fragment_table + number // 512 * 8, 8), "little")
            block, _ = self._meta_block(pointer, self._end)
            at = number % 512 * 16
            if at + 16 > len(block):
                raise self._bad("its table of fragments is cut")
            start, size, _ = struct.unpack_from("<QII", block, at)
            self._tails[number] = self._block(start, size, name)
            if len(self._tails) > _FRAGMENT_CACHE:
                self._tails.popitem(last=False)
        return self._tails[number]

    def _table(self, start: int, size: int) -> bytes:
        """Return a table: pointers to blocks of metadata."""
        table = b""
        for number in range(-(-size // META_BYTES)):
            pointer = int.from_bytes(self._pread(start + 8 * number, 8), "little")
            table += self._meta_block(pointer, self._end)[0]
        if len(table) < size:
            raise self._bad("a table is cut")
        return table[:size]

    def _meta_block(self, start: int, end: int) -> tuple[bytes, int]:
        """Return a block of metadata and where the next begins."""
        found = self._meta.get(start)
        if found is None:
            head = int.from_bytes(self._pread(start, 2), "little")
            size = head & (_STORED_META - 1)
            if not size or size > META_BYTES or start + 2 + size > end:
                raise self._bad("a block of metadata lies outside its table")
            data = self._pread(start + 2, size)
            plain = data if head & _STORED_META else self._inflated(data, META_BYTES)
            found = self._meta[start] = (plain, start + 2 + size)
            if len(self._meta) > _META_CACHE:
                self._meta.popitem(last=False)
        return found

    def _inflated(self, data: bytes, most: int) -> bytes:
        try:
            plain = self._inflate(data, most)
        except self._damage as error:
            raise self._bad(f"a damaged block: {error}") from None
        if len(plain) > most:
            raise self._bad(f"a compression bomb: a block of {len(data)} bytes holds more than {most}")
        return plain

    def _pread(self, start: int, size: int) -> bytes:
        if start + size > self._end:
            raise self._bad("it points behind its own end")
        return os.pread(self._descriptor, size, start)

    def _bad(self, why: str) -> BadImage:
        return BadImage(f"the squashfs: {why}")


class _Meta:
    """A stream of metadata from a place on; `at` is the present place."""

    def __init__(self, squashfs: Squashfs, block: int, offset: int, end: int) -> None:
        self._squashfs, self._end = squashfs, end
        self.at = (block, offset)

    def read(self, size: int) -> bytes:
        """Return exactly `size` bytes. Errors: BadImage."""
        parts, missing = [], size
        start, offset = self.at
        while missing:
            block, following = self._squashfs._meta_block(start, self._end)
            if offset > len(block):
                raise self._squashfs._bad("a place outside its block of metadata")
            parts.append(block[offset : offset + missing])
            missing -= len(parts[-1])
            start, offset = (following, 0) if missing else (start, offset + len(parts[-1]))
        self.at = (start, offset)
        return b"".join(parts)


def _nothing() -> Iterator[bytes]:
    return iter(())
