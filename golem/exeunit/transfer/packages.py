"""Task packages: downloaded once into a cache by digest, kept while in use, told apart by content.

The cache directory is shared by all exe-units of a provider. Files arrive by rename after their digest is checked; half a
download is kept and gone on with where its failure may pass. Room is set aside for all of it as soon as its length is
known. Locks are `flock`s, so they end with their process: a user of an image holds a shared lock on it, a downloader an
exclusive one on the part file; eviction takes the least recently used images (by access time, which is set at every use)
that nobody holds.

A file's size, modification time and inode are noted when its digest is found right, in an extended attribute, together
with its format and a checksum that costs little. While they are the same, only that is compared at a deploy, so that no flipped
bit is run; the digest itself once a day, and where there are no such attributes at every deploy.
Neighbours: `transfer` (the download), `runtimes.base` (which formats a runtime takes).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import trio

from golem.base.reserve import give_back
from golem.exeunit.runtime import ImageFormat
from golem.exeunit.transfer.cached import MIN_FREE_BYTES, evictable_bytes, lock_now
from golem.exeunit.transfer.spool import Progress, TransferError
from golem.exeunit.transfer.transfers import Digest, Location, Notice, Transfers, parse_location
from golem.exeunit.unpack.inflate import BZIP2_MAGIC, CHUNK_BYTES, GZIP_MAGIC, XZ_MAGIC, BadImage, Part, Ratio, inflated

CACHE_HIT = "Deployed image from cache"
DOWNLOAD_POLL_S = 0.2
MAX_SCANNED_MEMBERS = 200_000
MAX_INFLATED_BYTES = 2 << 30
MAX_SLOWLY_INFLATED_BYTES = 256 << 20  # by xz and bzip2
TAR_BLOCK_BYTES = 512
CHECKED_FOR_S = 24 * 3600.0
HASHED_AT_ONCE_BYTES = 64 << 20
NOTE = "user.golem.checked"
SOURCE = "user.golem.source"  # of a part file: which URL fills it
WAIT_S = 5.0  # for a download of others that does not go on
_PART_OF_ARCHIVE = re.compile(r"blobs/sha(256|512)/|[0-9a-f]{64}/(layer\.tar|json|VERSION)\Z|oci-layout\Z")
PACKED = GZIP_MAGIC, XZ_MAGIC, BZIP2_MAGIC
_ARCHIVE_MARKS = {"manifest.json": ImageFormat.DOCKER_ARCHIVE, "index.json": ImageFormat.OCI_ARCHIVE}


@dataclass
class Image:
    """A cached package, held until `close` (or the end of its `with` block)."""

    path: Path
    digest: str
    format: ImageFormat
    size_bytes: int
    cached: bool
    _lock: int

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Image:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class ImageStore:
    """A directory of images, named `sha3-<bits>-<hex>`."""

    def __init__(
        self,
        directory: Path,
        transfers: Transfers,
        max_bytes: int,
        max_image_bytes: int,
        *,
        clock: Callable[[], float] = time.time,
        free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
    ) -> None:
        """`max_bytes` bounds the cache (images in use may exceed it), `max_image_bytes` one image."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._clock, self._free_bytes = clock, free_bytes
        self._directory = directory
        self._transfers = transfers
        self._max_bytes = max_bytes
        self._max_image_bytes = max_image_bytes

    async def obtain(
        self,
        task_package: str,
        formats: frozenset[ImageFormat],
        *,
        progress: Progress | None = None,
        notice: Notice | None = None,
    ) -> Image:
        """The image of a `hash:sha3:<hex>:<url>` reference, downloaded if it is not here yet.

        Errors: TransferError, also when the content is of a format not in `formats`.
        """
        location = parse_location(task_package)
        if location.digest is None:
            raise TransferError("Missing hash: a task package is hash:sha3:<hex>:<url>")
        if location.scheme == "container":
            raise TransferError("a task package cannot be in a container")
        name = f"sha3-{location.digest.bits}-{location.digest.hex}"
        lock = await self._hold_checked(location.digest, name, notice)
        cached = lock is not None
        if lock is None:
            lock = await self._download(location, name, progress, notice)
        if cached and notice is not None:
            notice(CACHE_HIT)
        path = self._directory / name
        try:
            found = await trio.to_thread.run_sync(detect_format, path) or ImageFormat.OTHER
            if _read_note(lock) is None:
                _write_note(lock, self._clock(), found, await _checksum(lock))
            if found not in formats:
                wanted = ", ".join(sorted(item.value for item in formats))
                what = found.value if found is not ImageFormat.OTHER else "of an unknown format"
                raise TransferError(f"the task package is {what}; this runtime takes: {wanted}")
        except BaseException:
            os.close(lock)
            raise
        return Image(path, location.digest.hex, found, os.fstat(lock).st_size, cached, lock)

    def _hold(self, name: str) -> int | None:
        """Descriptor with a shared lock on a cached image, or None if it is not here."""
        path = self._directory / name
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                return None
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # eviction holds its exclusive lock for an instant only
            status = os.fstat(descriptor)
            if status.st_nlink:
                os.utime(descriptor, ns=(time.time_ns(), status.st_mtime_ns))
                return descriptor
            os.close(descriptor)  # evicted between open and lock

    async def _hold_checked(self, digest: Digest, name: str, notice: Notice | None) -> int | None:
        """Hold a cached image whose content is what its name says; one that is damaged is removed."""
        descriptor = self._hold(name)
        if descriptor is None:
            return None
        try:
            note = _read_note(descriptor)
            if note is not None and abs(self._clock() - note.at_s) < CHECKED_FOR_S:
                if await _checksum(descriptor) == note.checksum:
                    return descriptor
            elif await _has_digest(descriptor, digest):
                if note is not None:
                    _write_note(descriptor, self._clock(), note.format, await _checksum(descriptor))
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        if notice is not None:
            notice("The cached image is damaged: getting it anew")
        path = self._directory / name
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                path.unlink()
        os.close(descriptor)
        return None

    async def _download(self, location: Location, name: str, progress: Progress | None, notice: Notice | None) -> int:
        """Fetch an image, or wait for another exe-unit that is fetching it; returns the held descriptor.

        Whose source is another one waits for `WAIT_S` only, whose is the same as long as something comes: nobody can keep
        an image from others by a slow source of his own.
        """
        part, source = self._directory / f"{name}.part", hashlib.sha256(location.rest.encode("utf-8", "replace")).digest()
        since, seen = math.inf, -1
        while True:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                if lock_now(descriptor, part):
                    held = self._hold(name)
                    if held is not None:  # the other one finished meanwhile
                        part.unlink()
                        return held
                    with suppress(OSError):  # a file system without extended attributes
                        os.setxattr(descriptor, SOURCE, source)
                    return await self._bring(location, name, part, descriptor, progress, notice)
                size = os.fstat(descriptor).st_size if _source_of(descriptor) == source else seen
            finally:
                os.close(descriptor)
            if (held := self._hold(name)) is not None:
                return held
            if since == math.inf and notice is not None:
                notice("Waiting for the image: another activity is downloading it")
            if size > seen or since == math.inf:
                seen, since = size, trio.current_time()
            if trio.current_time() - since >= WAIT_S:
                return await self._race(location, name, progress, notice)
            await trio.sleep(DOWNLOAD_POLL_S)

    async def _bring(
        self, location: Location, name: str, part: Path, descriptor: int, progress: Progress | None, notice: Notice | None
    ) -> int:
        """Download into a part file that is locked here, and have it take its place; returns the held descriptor."""
        await self._fill(location, part, descriptor, progress, notice)
        held = self._hold(name)
        if held is not None:  # another one was first
            part.unlink()
            return held
        os.rename(part, self._directory / name)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        held = os.dup(descriptor)  # the lock lives on in the copy
        self._evict()
        return held

    async def _race(self, location: Location, name: str, progress: Progress | None, notice: Notice | None) -> int:
        """Download beside another one that is slow; the first right file counts. Returns the held descriptor."""
        if notice is not None:
            notice("The other download is slow: getting the image here, too")
        part = self._directory / f"{name}.{secrets.token_hex(8)}.part"
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        held: int | None = None
        failure: TransferError | None = None

        async def watch(scope: trio.CancelScope) -> None:
            nonlocal held
            while held is None:
                await trio.sleep(DOWNLOAD_POLL_S)
                held = held if held is not None else self._hold(name)
            scope.cancel()

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, nursery.cancel_scope)
                try:
                    own = await self._bring(location, name, part, descriptor, progress, notice)
                    if held is None:
                        held = own
                    else:
                        os.close(own)
                except TransferError as error:
                    failure = error
                nursery.cancel_scope.cancel()
        finally:
            os.close(descriptor)
            part.unlink(missing_ok=True)  # nobody goes on with it
        if held is not None:
            return held
        assert failure is not None
        raise failure

    async def _fill(
        self, location: Location, part: Path, descriptor: int, progress: Progress | None, notice: Notice | None
    ) -> None:
        """Download into the part file, on from what it holds."""
        self._evict()
        status = os.fstat(descriptor)
        room = self._free_bytes(self._directory) - MIN_FREE_BYTES + max(status.st_size, status.st_blocks * 512)
        room += evictable_bytes(self._directory)
        most = min(self._max_image_bytes, max(room, 0))
        try:
            await self._transfers.fetch(
                location, descriptor, max_bytes=most, resume=True, progress=progress, notice=notice, spare_bytes=MIN_FREE_BYTES,
                make_room=self._evict,
            )  # fmt: skip
            os.fsync(descriptor)
        except BaseException as error:  # also when cancelled: the next one goes on from here
            give_back(descriptor)
            refused = isinstance(error, TransferError) and not error.passing
            if refused or not os.fstat(descriptor).st_size:
                part.unlink(missing_ok=True)
            if refused and most < self._max_image_bytes:
                raise TransferError(f"{error} (this provider has disk space for {most} bytes)") from None
            raise

    async def make_room(self, size_bytes: int, near: Path) -> None:
        """Remove images that nobody holds for so many bytes that are to be written `near`, if that is on the cache's disk."""
        if near.stat().st_dev == self._directory.stat().st_dev:
            await trio.to_thread.run_sync(self._evict, size_bytes)

    def _evict(self, needed_bytes: int = 0) -> None:
        """Remove the least recently used images and parts that nobody holds, until the rest fits and the disk has room for
        so many bytes more.
        """
        images = []
        for path in self._directory.glob("sha3-*"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another exe-unit evicts as well
                continue
            images.append((max(status.st_atime_ns, status.st_mtime_ns), status.st_size, path))
        total = sum(size for _, size, _ in images)
        most = min(self._max_bytes, total + self._free_bytes(self._directory) - MIN_FREE_BYTES - needed_bytes)
        for _, size, path in sorted(images):
            if total <= most:
                return
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
            try:
                if lock_now(descriptor, path):
                    path.unlink()
                    total -= size
            finally:
                os.close(descriptor)


def _source_of(descriptor: int) -> bytes:
    """Return the mark of the URL from which a part file is filled, b"" where there is none."""
    try:
        return os.getxattr(descriptor, SOURCE)
    except OSError:
        return b""


@dataclass(frozen=True)
class _Note:
    """What was found of a file when it was last hashed."""

    at_s: float
    format: ImageFormat
    checksum: int


def _read_note(descriptor: int) -> _Note | None:
    """Return the note on a file, None where there is none or the file has changed since."""
    status = os.fstat(descriptor)
    try:
        note = json.loads(os.getxattr(descriptor, NOTE))
        if note["file"] == [status.st_size, status.st_mtime_ns, status.st_ino]:
            return _Note(float(note["at_s"]), ImageFormat[note["format"]], int(note["checksum"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _write_note(descriptor: int, at_s: float, format: ImageFormat, checksum: int) -> None:
    status = os.fstat(descriptor)
    file = [status.st_size, status.st_mtime_ns, status.st_ino]
    note = {"file": file, "at_s": at_s, "format": format.name, "checksum": checksum}
    with suppress(OSError):  # a file system without extended attributes
        os.setxattr(descriptor, NOTE, json.dumps(note).encode())


async def _has_digest(descriptor: int, digest: Digest) -> bool:
    """Whether a file has a digest; between parts of it the question can be cancelled."""
    found, offset = digest.new(), 0
    while done := await trio.to_thread.run_sync(_hash_some, descriptor, offset, found):
        offset += done
    return found.hexdigest() == digest.hex


async def _checksum(descriptor: int) -> int:
    """Return the CRC-32 of a file; between parts of it the question can be cancelled."""
    found, offset = 0, 0
    while True:
        done, found = await trio.to_thread.run_sync(_sum_some, descriptor, offset, found)
        if not done:
            return found
        offset += done


def _sum_some(descriptor: int, offset: int, found: int) -> tuple[int, int]:
    done = 0
    while done < HASHED_AT_ONCE_BYTES and (chunk := os.pread(descriptor, 1 << 20, offset + done)):
        found = zlib.crc32(chunk, found)
        done += len(chunk)
    return done, found


def _hash_some(descriptor: int, offset: int, found: hashlib._Hash) -> int:
    done = 0
    while done < HASHED_AT_ONCE_BYTES and (chunk := os.pread(descriptor, 1 << 20, offset + done)):
        found.update(chunk)
        done += len(chunk)
    return done


def detect_format(path: Path) -> ImageFormat | None:
    """Tell what a file is from its content, or from the cache's note on it; None if it is nothing we know."""
    with path.open("rb") as file:
        note = _read_note(file.fileno())
        if note is not None:
            return note.format if note.format is not ImageFormat.OTHER else None
        head = file.read(512)
        if head[:4] == b"\0asm":
            return ImageFormat.WASM_MODULE
        if head[:4] == b"hsqs":
            return ImageFormat.GVMI
        if head[:4] == b"PK\x03\x04":
            return ImageFormat.WASI_PACKAGE
        file.seek(0)
        if head.startswith(PACKED):
            most = MAX_INFLATED_BYTES if head.startswith(GZIP_MAGIC) else MAX_SLOWLY_INFLATED_BYTES
            try:
                return _detect_tar(_Forwards(file.fileno(), most), most)
            except BadImage:
                return None
        return _detect_tar(file, None)


class _Forwards:
    """A compressed file, to be read from its beginning on."""

    def __init__(self, descriptor: int, most_bytes: int) -> None:
        part = Part(descriptor, 0, os.fstat(descriptor).st_size)
        self._source, self._at = inflated(part, "the package", Ratio(1, most_bytes + CHUNK_BYTES)), 0

    def read(self, size: int) -> bytes:
        chunk = self._source.read(size)
        self._at += len(chunk)
        return chunk

    def seek(self, position: int) -> None:
        while self._at < position and self.read(min(CHUNK_BYTES, position - self._at)):
            pass


def _detect_tar(file: BinaryIO | _Forwards, max_bytes: int | None) -> ImageFormat | None:
    """Walk the headers of a tar; `max_bytes` bounds what is read of a compressed one."""
    names: set[str] = set()
    position = 0
    for _ in range(MAX_SCANNED_MEMBERS):
        header = file.read(TAR_BLOCK_BYTES)
        if len(header) < TAR_BLOCK_BYTES or not header.strip(b"\0"):
            break
        if header[257:262] != b"ustar":
            return None
        name = header[:100].split(b"\0")[0].decode("utf-8", "replace").removeprefix("./")
        if name in _ARCHIVE_MARKS:
            names.add(name)
        if max_bytes is not None and (name in _ARCHIVE_MARKS or _PART_OF_ARCHIVE.match(name)):
            # Reading on would mean to inflate it all; whether it is both formats, or the other, its reader will see.
            return _ARCHIVE_MARKS.get(name, ImageFormat.DOCKER_ARCHIVE)
        size = _tar_number(header[124:136])
        if size is None:
            return None
        position += TAR_BLOCK_BYTES + -(-size // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
        if max_bytes is not None and position > max_bytes:
            break
        file.seek(position)
    else:
        return None
    if not position:
        return None
    for mark, form in _ARCHIVE_MARKS.items():
        if mark in names:
            return form
    return ImageFormat.ROOTFS_ARCHIVE


def _tar_number(field: bytes) -> int | None:
    """A size field: octal text, or base 256 if its first bit is set; None if it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return None
