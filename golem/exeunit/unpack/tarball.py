"""Reading a stranger's tar strictly and writing our own plainly.

What is read: ustar, GNU (long names) and pax headers, regular files, directories, symbolic and hard links. Everything
else is refused by name: device nodes, FIFOs, sparse files, headers that do not add up. Extended attributes, owners'
names and times below a second are left behind: file capabilities mean nothing in a container without privileges.
The set-user-id bit is kept: it means nothing either where no process can gain privileges, and programs are found by it.

`Names` holds one layer's members to the rules that keep every one of them inside: no absolute names, no "..", nothing
below a symbolic link or a file, hard links to what came before in the same layer.
Runs in the sandboxed child of `images`. Neighbours: `archives`, which reads and writes with this; `squashfs`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from golem.exeunit.unpack.inflate import CHUNK_BYTES, BadImage, ByteSource

BLOCK_BYTES = 512
MAX_PATH_BYTES, MAX_NAME_BYTES = 4095, 255
MAX_PAX_BYTES = 1 << 20
MAX_PAX_RECORDS = 10_000
MAX_ID = (1 << 32) - 2
MAX_HEADERS = 8  # extension headers of one member
WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
_MAX_OCTAL_11, _MAX_OCTAL_7 = 0o77777777777, 0o7777777


class Kind(Enum):
    """What a member is; the value is its type flag in a header."""

    FILE = b"0"
    HARD_LINK = b"1"
    SYMLINK = b"2"
    DIRECTORY = b"5"


_REFUSED = {b"3": "a character device", b"4": "a block device", b"6": "a FIFO", b"S": "a sparse file"}


@dataclass(frozen=True)
class Member:
    """One member. Names are bytes, as file names are; `size` counts for files alone."""

    name: bytes
    kind: Kind
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime: int = 0
    link: bytes = b""


def shown(name: bytes) -> str:
    """Return a name for messages, cut and without control characters."""
    text = repr(name.decode("utf-8", "backslashreplace"))
    return text if len(text) <= 120 else f"{text[:100]}...'"


class TarReader:
    """Members of a tar stream, one after the other."""

    def __init__(self, source: ByteSource, what: str, skip: Callable[[int], None] | None = None) -> None:
        """`what` names the stream in messages; `skip` passes over bytes of it, where that is quicker than reading."""
        self._source, self._what, self._skip_bytes = source, what, skip
        self._left = self._padding = 0  # of the present member's content
        self.position = 0

    def next(self) -> Member | None:
        """Return the next member, None at the end. What was not read of the last one is skipped.

        Errors: BadImage.
        """
        self._skip()
        pax: dict[bytes, bytes] = {}
        long: dict[bytes, bytes] = {}
        for _ in range(MAX_HEADERS):
            block = self._exactly(BLOCK_BYTES, at_end=not pax and not long)
            if not block.strip(b"\0"):
                if pax or long:
                    raise self._bad("a header extension belongs to no member")
                return None
            size, flag = self._header(block), block[156:157]
            if flag in (b"x", b"g"):
                records = self._records(size)
                if flag == b"x":
                    if pax:
                        raise self._bad("one member has two pax headers")
                    pax = records or {b"": b""}
                elif records.keys() & {b"path", b"linkpath", b"size"}:
                    raise self._bad("a global pax header names a file")
            elif flag in (b"L", b"K"):
                if flag in long:
                    raise self._bad("one member has two long names")
                if size > MAX_PATH_BYTES + 1:
                    raise self._bad(f"a name of {size} bytes, at most {MAX_PATH_BYTES}")
                long[flag] = self._content(size).rstrip(b"\0")
            else:
                return self._member(block, size, pax, long)
        raise self._bad("one member has too many header extensions")

    def read(self, most: int) -> bytes:
        """Return up to `most` bytes of the present member's content, b"" at its end. Errors: BadImage if it is cut."""
        chunk = self._exactly(min(most, self._left))
        self._left -= len(chunk)
        return chunk

    def _skip(self) -> None:
        if self._skip_bytes is not None:
            self._skip_bytes(self._left + self._padding)
            self.position += self._left + self._padding
            self._left = self._padding = 0
        while self.read(CHUNK_BYTES):
            pass
        self._exactly(self._padding)
        self._padding = 0

    def _exactly(self, size: int, at_end: bool = False) -> bytes:
        """Return `size` bytes; where the stream may end, zeros stand for nothing at all."""
        if not size:
            return b""
        chunk = self._source.read(size)
        if not chunk and at_end and self.position:
            return bytes(size)
        if len(chunk) != size:
            raise self._bad("it ends too early")
        self.position += size
        return chunk

    def _content(self, size: int) -> bytes:
        content = self._exactly(size)
        self._exactly(-size % BLOCK_BYTES)
        return content

    def _header(self, block: bytes) -> int:
        """Return the size in a header block, once its checksum is right."""
        if block[257:262] not in (b"ustar", b"\0\0\0\0\0"):
            raise self._bad("not a tar file, or one of an unknown kind")
        if self._number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * 32:
            raise self._bad("a header has a wrong checksum")
        size = self._number(block[124:136])
        if size < 0:
            raise self._bad("a member of negative size")
        return size

    def _records(self, size: int) -> dict[bytes, bytes]:
        """Return the records of a pax header: lines `<length> <key>=<value>`."""
        if size > MAX_PAX_BYTES:
            raise self._bad(f"a pax header of {size} bytes, at most {MAX_PAX_BYTES}")
        data, records, at = self._content(size), dict[bytes, bytes](), 0
        while at < len(data):
            space = data.find(b" ", at, at + 10)
            digits = data[at:space] if space > 0 else b""
            length = int(digits) if digits.isdigit() else 0
            line = data[at : at + length]
            key, equals, value = line[space - at + 1 : -1].partition(b"=")
            if len(line) != length or not length or line[-1:] != b"\n" or not equals or not key:
                raise self._bad("a malformed pax header")
            if len(records) >= MAX_PAX_RECORDS:
                raise self._bad("a pax header with too many records")
            records[key] = value
            at += length
        return records

    def _member(self, block: bytes, size: int, pax: dict[bytes, bytes], long: dict[bytes, bytes]) -> Member:
        name, link = block[:100].split(b"\0")[0], block[157:257].split(b"\0")[0]
        if block[257:263] == b"ustar\0" and block[345]:
            name = block[345:500].split(b"\0")[0] + b"/" + name
        name = pax.get(b"path", long.get(b"L", name))
        link = pax.get(b"linkpath", long.get(b"K", link))
        flag = block[156:157]
        if flag in _REFUSED or any(key.startswith(b"GNU.sparse.") for key in pax):
            what = _REFUSED.get(flag, "a sparse file")
            raise self._bad(f"{shown(name)} is {what}: an image has files, directories and links only")
        if flag in (b"\0", b"7"):
            flag = b"5" if flag == b"\0" and name.endswith(b"/") else b"0"
        try:
            kind = Kind(flag)
        except ValueError:
            raise self._bad(f"{shown(name)} is of unknown type {flag!r}") from None
        size = self._decimal(pax, b"size", size)
        if b"\0" in name + link:
            raise self._bad(f"{shown(name)}: a NUL in a name")
        if size and kind is not Kind.FILE:
            # Old tars give links the size of their target; no content follows then, and who reads otherwise is led astray.
            if kind is Kind.DIRECTORY or pax.get(b"size"):
                raise self._bad(f"{shown(name)}: a directory or link with content")
            size = 0
        self._left, self._padding = size, -size % BLOCK_BYTES
        member = Member(
            name=name,
            kind=kind,
            mode=self._number(block[100:108]) & 0o7777,
            uid=self._decimal(pax, b"uid", self._number(block[108:116])),
            gid=self._decimal(pax, b"gid", self._number(block[116:124])),
            size=size,
            mtime=self._decimal(pax, b"mtime", self._number(block[136:148]), least=None),
            link=link if kind in (Kind.HARD_LINK, Kind.SYMLINK) else b"",
        )
        if not (0 <= member.uid <= MAX_ID and 0 <= member.gid <= MAX_ID):
            raise self._bad(f"{shown(name)}: an owner out of range")
        return member

    def _decimal(self, pax: dict[bytes, bytes], key: bytes, otherwise: int, least: int | None = 0) -> int:
        """Return a whole number of a pax header; fractions of a time are cut off."""
        text = pax.get(key)
        if not text:
            return otherwise
        whole = text.partition(b".")[0] if least is None else text
        digits = whole[1:] if least is None and whole[:1] == b"-" else whole
        if not digits.isdigit() or len(digits) > 20:
            raise self._bad(f"a pax header with {key.decode()}={text[:40]!r}")
        return int(whole)

    def _number(self, field: bytes) -> int:
        """Return a header's number: octal text, or base 256 if its first bit is set."""
        if field[0] & 0x80:
            number = int.from_bytes(field, "big") - (1 << (8 * len(field) - 1))
            return number - (1 << (8 * len(field) - 1)) if field[0] & 0x40 else number
        try:
            return int(field.split(b"\0")[0].strip(b" ") or b"0", 8)
        except ValueError:
            raise self._bad("a header with a malformed number") from None

    def _bad(self, why: str) -> BadImage:
        return BadImage(f"{self._what}: {why}")


class Names:
    """What one layer has brought so far, and whether the next member may follow."""

    def __init__(self, what: str, *, whiteouts: bool) -> None:
        """`whiteouts`: whether names that begin with .wh. mean deletions, as they do in layers; elsewhere none may."""
        self._what, self._whiteouts = what, whiteouts
        self._directories: set[bytes] = {b""}
        self.implied = 0  # directories that no member is, only a part of its name: an Engine makes them all the same
        self._others: dict[bytes, Kind] = {}

    def admit(self, member: Member) -> Member | None:
        """Return the member under its plain name, None where it adds nothing (the root, a builder's own notes).

        Errors: BadImage.
        """
        name = self._plain(member.name, "a name")
        parent, _, base = name.rpartition(b"/")
        if not name:
            if member.kind is not Kind.DIRECTORY:
                raise self._bad(f"{shown(member.name)} is no name for a file or link")
            return replace(member, name=b"./")
        if base.startswith(WHITEOUT) and not self._admit_whiteout(member, base):
            return None
        self._admit_parents(parent, member.name)
        link = member.link
        if member.kind is Kind.DIRECTORY:
            if name in self._others:
                raise self._bad(f"{shown(name)} is there twice, as a directory and as something else")
            self._directories.add(name)
            return replace(member, name=name + b"/")
        if name in self._directories:
            raise self._bad(f"{shown(name)} is there twice, as a directory and as something else")
        if member.kind is Kind.HARD_LINK:
            link = self._plain(link, "a hard link's target")
            if link not in self._others or link == name:
                raise self._bad(f"{shown(name)} is a hard link to {shown(link)}, which is no file that came before it")
        elif member.kind is Kind.SYMLINK and not 0 < len(link) <= MAX_PATH_BYTES:
            raise self._bad(f"{shown(name)} is a symbolic link to nothing or to an overlong name")
        self._others[name] = member.kind
        return replace(member, name=name, link=link)

    def _plain(self, name: bytes, which: str) -> bytes:
        """Return a name without empty parts and "."."""
        if name.startswith(b"/"):
            raise self._bad(f"{which} that is absolute: {shown(name)}")
        if len(name) > MAX_PATH_BYTES:
            raise self._bad(f"{which} of {len(name)} bytes, at most {MAX_PATH_BYTES}")
        parts = [part for part in name.split(b"/") if part not in (b"", b".")]
        if b".." in parts:
            raise self._bad(f"{which} that leads out of the image: {shown(name)}")
        if any(len(part) > MAX_NAME_BYTES for part in parts):
            raise self._bad(f"{which} with a part of more than {MAX_NAME_BYTES} bytes: {shown(name)}")
        return b"/".join(parts)

    def _admit_parents(self, parent: bytes, name: bytes) -> None:
        fresh = []
        while parent not in self._directories:
            if parent in self._others:
                what = "a symbolic link" if self._others[parent] is Kind.SYMLINK else "a file"
                raise self._bad(f"{shown(name)} is below {shown(parent)}, which is {what}")
            fresh.append(parent)
            parent = parent.rpartition(b"/")[0]
        self._directories.update(fresh)
        self.implied += len(fresh)

    def _admit_whiteout(self, member: Member, base: bytes) -> bool:
        """Whether a deletion mark is one that Engines read as we do; False for marks of old builders that mean nothing."""
        if not self._whiteouts:
            raise self._bad(f"{shown(member.name)}: an Engine takes names that begin with .wh. for deletions")
        if base.startswith(WHITEOUT + WHITEOUT) and base != OPAQUE:
            return False
        if base[len(WHITEOUT) :] in (b"", b".", b"..") or member.kind is not Kind.FILE or member.size:
            raise self._bad(f"{shown(member.name)} is no proper deletion mark")
        return True

    def _bad(self, why: str) -> BadImage:
        return BadImage(f"{self._what}: {why}")


class TarWriter:
    """Writes members to an open file and hashes every byte of it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffer, self._buffered = [], 0  # type: tuple[list[bytes], int]
        self.hash = hashlib.sha256()
        self.size = 0

    def add(self, member: Member) -> None:
        """Write a header; for a file `write` follows with its content."""
        self._put(header(member))

    def write(self, chunk: bytes) -> None:
        """Write some of a file's content."""
        self._put(chunk)

    def end_file(self, size: int) -> None:
        """Pad a file of `size` bytes."""
        self._put(bytes(-size % BLOCK_BYTES))

    def finish(self) -> None:
        """Write the end of the archive."""
        self._put(bytes(2 * BLOCK_BYTES))
        self._flush()

    def _put(self, data: bytes) -> None:
        self._buffer.append(data)
        self._buffered += len(data)
        if self._buffered >= CHUNK_BYTES:
            self._flush()

    def _flush(self) -> None:
        data = b"".join(self._buffer)
        self._buffer, self._buffered = [], 0
        self.hash.update(data)
        self.size += len(data)
        write_all(self._descriptor, data)


def write_all(descriptor: int, data: bytes) -> None:
    """Write at the file's position. Errors: OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def header(member: Member) -> bytes:
    """Return the header block of a member, before it those of names that are too long for it (GNU form)."""
    blocks = b""
    for flag, text in ((b"K", member.link), (b"L", member.name)):
        if len(text) > 100:
            content = text + b"\0"
            blocks += _block(b"././@LongLink", flag, 0, 0, 0, len(content), 0, b"") + content
            blocks += bytes(-len(content) % BLOCK_BYTES)
    return blocks + _block(
        member.name, member.kind.value, member.mode, member.uid, member.gid, member.size, member.mtime, member.link
    )


def _block(name: bytes, flag: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, link: bytes) -> bytes:
    fields = [
        name[:100].ljust(100, b"\0"), b"%07o\0" % mode, _id(uid), _id(gid), _size(size),
        b"%011o\0" % min(max(mtime, 0), _MAX_OCTAL_11), b" " * 8, flag, link[:100].ljust(100, b"\0"), b"ustar  \0",
    ]  # fmt: skip
    block = b"".join(fields).ljust(BLOCK_BYTES, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _id(number: int) -> bytes:
    return b"%07o\0" % number if number <= _MAX_OCTAL_7 else b"\x80" + number.to_bytes(7, "big")


def _size(number: int) -> bytes:
    return b"%011o\0" % number if number <= _MAX_OCTAL_11 else b"\x80" + number.to_bytes(11, "big")
