"""Files into, out of and past an activity: `transfer` commands and the download of task packages.

A transfer has a source and a target, each `container:` (a volume of the runtime), `http(s):` or `gftp:`; at deploy also
`file:` below directories the provider allows. Remote bytes go into a spool file first, are checked against the hash if
the URL names one, and take their place in a volume by rename, so a command never sees half a file or an unchecked one.
Failures that may pass are tried again, from where they were. Neighbours: `spool` (where downloads go, and the policy), `web`
(HTTP), `beneath` (paths in directories that a guest can write), `images` (the package cache); gftp comes in as a `GftpClient`.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import trio

from golem.exeunit.runtime import RuntimeFault, Volume, guest_path
from golem.exeunit.transfer import beneath
from golem.exeunit.transfer.spool import (
    BLOCK_BYTES,
    Digest,
    HashMismatch,
    Progress,
    Spool,
    TransferError,
    TransferPolicy,
    Write,
    redacted,
)
from golem.files.outgoing import OutgoingFile

__all__ = [
    "OFFERED_PROTOCOLS",
    "Digest",
    "GftpClient",
    "HashMismatch",
    "Location",
    "TransferError",
    "TransferPolicy",
    "Transfers",
    "parse_location",
]

Notice = Callable[[str], None]

RETRY_DELAYS_S = (2.0, 4.0)
MIN_PROGRESS_BYTES = 1 << 16  # that an attempt must bring in order not to count
PATIENT_DELAYS_S = (2.0, 4.0, 8.0, 16.0)  # of a transfer that had begun
SCHEMES = ("container", "gftp", "http", "https", "file")
OFFERED_PROTOCOLS = ("http", "https", "gftp")
_HASH_BITS = (224, 256, 384, 512)


class GftpClient(Protocol):
    """Access to files published by nodes. Failures are TransferError, passing unless the publisher refused."""

    async def size(self, url: str) -> int:
        """Size of the published file in bytes."""

    async def download(self, url: str, offset: int, write: Write) -> None:
        """Hand the file's bytes from `offset` to its end to `write`, in order."""

    async def upload(self, url: str, file: OutgoingFile, progress: Progress | None) -> None:
        """Send the file, from where an earlier attempt with the same `file` got to."""


@dataclass(frozen=True)
class Location:
    """A parsed URL. `rest` is the path for container and file, the whole URL for the others."""

    scheme: str
    rest: str
    digest: Digest | None = None

    @property
    def remote(self) -> bool:
        return self.scheme in ("http", "https", "gftp")

    def __str__(self) -> str:
        return redacted(self.rest) if self.remote else f"{self.scheme}:{self.rest}"


def parse_location(text: str) -> Location:
    """Read `[hash:sha3:<hex>:]<url>`; without a scheme it is a container path.

    Errors: TransferError.
    """
    digest = None
    if text[:5].lower() == "hash:":
        match = re.fullmatch(r"hash:(?://)?([a-z0-9-]+):(?:0x)?([0-9a-f]+):(.+)", text, re.IGNORECASE | re.DOTALL)
        if match is None:
            raise TransferError("malformed hash URL: expected hash:sha3:<hex>:<url>")
        bits = len(match[2]) * 4
        if match[1].lower() != "sha3" or bits not in _HASH_BITS:
            raise TransferError(f"unsupported hash {match[1]} of {bits} bits: expected sha3 of 224, 256, 384 or 512")
        digest, text = Digest(bits, match[2].lower()), match[3]
    if len(text) > 8192 or "\0" in text:
        raise TransferError("malformed URL: too long, or with a NUL byte")
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", text)
    scheme = match[1].lower() if match else "container"
    if scheme not in SCHEMES:
        raise TransferError(f"unsupported transfer protocol {scheme!r}")
    if scheme in ("container", "file"):
        rest = text[match.end() :] if match else text
        if rest.startswith("//"):
            rest = "/" + rest[2:].lstrip("/")
        return Location(scheme, unquote(rest) if scheme == "file" else rest, digest)
    try:
        host = urlsplit(text).hostname
    except ValueError:
        host = None
    if not host:
        raise TransferError(f"malformed {scheme} URL: no host")
    return Location(scheme, text, digest)


class Remote(Protocol):
    """One protocol's way to download and upload; `web.Web` and `GftpRemote` are the two."""

    async def download(self, url: str, spool: Spool) -> None:
        """Append to the spool from its present size on (or restart it) up to the end."""

    async def upload(self, url: str, file: OutgoingFile, progress: Progress | None) -> None:
        """Send the open file; attempts after a failure have the same `file`."""


class GftpRemote:
    """Fits a `GftpClient` to spools and open files."""

    def __init__(self, client: GftpClient) -> None:
        self._client = client

    async def download(self, url: str, spool: Spool) -> None:
        spool.expect(await self._client.size(url))
        if spool.total is not None and spool.size > spool.total:
            spool.restart()  # not the beginning of this file
        await self._client.download(url, spool.size, spool.write)
        if spool.size != spool.total:
            raise TransferError(f"{redacted(url)}: got {spool.size} bytes of {spool.total}", passing=True)

    async def upload(self, url: str, file: OutgoingFile, progress: Progress | None) -> None:
        await self._client.upload(url, file, progress)


class Transfers:
    """Carries out transfers under one policy."""

    def __init__(
        self,
        policy: TransferPolicy,
        gftp: GftpClient | None = None,
        sleep: Callable[[float], Awaitable[None]] = trio.sleep,
        web: Remote | None = None,
        spool_dir: Path | None = None,
        nearness: Callable[[], Awaitable[str]] | None = None,
    ) -> None:
        """`web`: the HTTP side, if not the ordinary one. `spool_dir`: for what is only passed on, where there is no volume.

        `nearness`: how near the requestor is, where the policy lets URLs lead to this machine or its networks.
        """
        self._spool_dir, self._nearness = spool_dir, nearness
        self.policy = policy
        self._web = web
        self._gftp = GftpRemote(gftp) if gftp is not None else None
        self._sleep = sleep

    async def transfer(
        self,
        source: str,
        target: str,
        volumes: Sequence[Volume],
        *,
        progress: Progress | None = None,
        notice: Notice | None = None,
        max_bytes: int | None = None,
    ) -> int:
        """Carry out a transfer command; returns the number of bytes.

        `max_bytes`: room left for what is brought in, if less than the policy allows.
        Errors: TransferError.
        """
        origin, goal = parse_location(source), parse_location(target)
        for location in (origin, goal):
            if location.scheme == "file":
                raise TransferError("file: URLs are not supported in transfers")
        if goal.digest is not None:
            raise TransferError("a hash belongs to the source of a transfer, not to its target")
        most = min(self.policy.max_bytes, max_bytes if max_bytes is not None else self.policy.max_bytes)
        with trio.move_on_after(self.policy.max_time_s) as scope:
            if goal.scheme == "container":
                return await self._into_volume(origin, goal, volumes, most, progress, notice)
            return await self._to_remote(origin, goal, volumes, most, progress, notice)
        assert scope.cancelled_caught
        raise TransferError(f"the transfer took longer than {self.policy.max_time_s:g} s")

    async def fetch(
        self,
        location: Location,
        descriptor: int,
        *,
        max_bytes: int,
        resume: bool = False,
        progress: Progress | None = None,
        notice: Notice | None = None,
        spare_bytes: int = 0,
        make_room: Callable[[int], object] = lambda size: None,
    ) -> int:
        """Bring a remote or `file:` location into an open, readable and writable file; returns its size.

        The hash is checked. `resume`: the file may hold the beginning already, from a fetch of the same location (with a
        hash) that failed or was cancelled; a beginning that turns out not to fit is fetched anew. `spare_bytes` of the disk
        stay free; `make_room` is called in a thread before so many bytes come.
        Errors: TransferError; of which HashMismatch says that the file is of no use.
        """
        spool = Spool(descriptor, min(max_bytes, self.policy.max_bytes), _digest_of(location), progress, spare_bytes, make_room)
        with trio.move_on_after(self.policy.max_time_s) as scope:
            if resume and location.digest is not None and location.scheme != "file":
                await spool.take_up()
            else:
                spool.restart()
            kept = spool.size
            await self._fill(location, spool, notice)
            try:
                await spool.finish()
            except HashMismatch:
                if not kept:
                    raise
                _say(notice, "What an earlier download left does not fit: starting over")
                spool.restart()
                await self._fill(location, spool, notice)
                await spool.finish()
        if scope.cancelled_caught:
            raise TransferError(f"the download took longer than {self.policy.max_time_s:g} s")
        return spool.size

    async def _fill(self, location: Location, spool: Spool, notice: Notice | None) -> None:
        if location.scheme == "file":
            await self._copy_file(location.rest, spool)
        else:
            remote = self._remote(location)
            await self._try(lambda: remote.download(location.rest, spool), notice, lambda: spool.size)

    async def _into_volume(
        self,
        origin: Location,
        goal: Location,
        volumes: Sequence[Volume],
        max_bytes: int,
        progress: Progress | None,
        notice: Notice | None,
    ) -> int:
        volume, path = find_volume(volumes, goal.rest)
        try:
            with beneath.NewFile(volume.host_dir, path) as new:
                if origin.remote:
                    size = await self.fetch(origin, new.descriptor, max_bytes=max_bytes, progress=progress, notice=notice)
                else:
                    spool = Spool(new.descriptor, max_bytes, origin.digest, progress)
                    with self._open_in_volume(volumes, origin.rest) as descriptor:
                        await _copy(descriptor, spool)
                    await spool.finish()
                    size = spool.size
                new.commit()
                return size
        except OSError as error:
            raise TransferError(f"cannot write container:{goal.rest}: {_os_text(error)}") from None

    async def _to_remote(
        self,
        origin: Location,
        goal: Location,
        volumes: Sequence[Volume],
        max_bytes: int,
        progress: Progress | None,
        notice: Notice | None,
    ) -> int:
        remote = self._remote(goal)
        if origin.remote:
            # on the storage that the activity has paid for, without a name
            with tempfile.TemporaryFile(dir=volumes[0].host_dir if volumes else self._spool_dir) as file:
                size = await self.fetch(origin, file.fileno(), max_bytes=max_bytes, notice=notice)
                await self._send(remote, goal.rest, OutgoingFile(file.fileno(), size), progress, notice)
                return size
        with self._open_in_volume(volumes, origin.rest) as descriptor:
            size = os.fstat(descriptor).st_size
            if size > self.policy.max_bytes:  # the room left in the volumes is no matter here
                raise TransferError(f"the file is too large: {size} bytes, at most {self.policy.max_bytes}")
            if origin.digest is not None:
                await _check_file(descriptor, origin.digest)
            await self._send(remote, goal.rest, OutgoingFile(descriptor, size), progress, notice)
            return size

    async def _send(self, remote: Remote, url: str, file: OutgoingFile, progress: Progress | None, notice: Notice | None) -> None:
        await self._try(lambda: remote.upload(url, file, progress), notice, lambda: file.kept)

    def _open_in_volume(self, volumes: Sequence[Volume], container_path: str) -> beneath.OpenFile:
        volume, path = find_volume(volumes, container_path)
        try:
            return beneath.OpenFile(volume.host_dir, path, volume.container_path)
        except OSError as error:
            raise TransferError(f"cannot read container:{container_path}: {_os_text(error)}") from None

    async def _copy_file(self, path: str, spool: Spool) -> None:
        """A `file:` package: only below the provider's directories, and not through symlinks that lead out of them."""
        for root in self.policy.file_roots:
            if Path(path).is_relative_to(root):
                try:
                    with beneath.OpenFile(root.resolve(), str(Path(path).relative_to(root))) as descriptor:
                        spool.expect(os.fstat(descriptor).st_size)
                        await _copy(descriptor, spool)
                    return
                except OSError as error:
                    raise TransferError(f"cannot read file:{path}: {_os_text(error)}") from None
        raise TransferError(f"file:{path} is not below a directory that this provider allows")

    def _remote(self, location: Location) -> Remote:
        if location.scheme in ("http", "https"):
            if self._web is None:
                from golem.exeunit.transfer.web import Web  # an HTTP client, for which most exe-units have no use

                self._web = Web(self.policy, self._nearness)
            return self._web
        if location.scheme == "gftp" and self._gftp is not None:
            return self._gftp
        raise TransferError(f"transfers of {location.scheme}: URLs are not available here")

    async def _try(self, attempt: Callable[[], Awaitable[None]], notice: Notice | None, reached: Callable[[], int]) -> None:
        """Make an attempt, and after a passing failure more with growing waits: two, or some more once it had begun.

        `reached()` tells how many bytes are over; attempts that add enough to them do not count.
        """
        delays = iter(RETRY_DELAYS_S)
        best = reached()
        while True:
            try:
                return await attempt()
            except TransferError as error:
                if error.passing and reached() >= best + MIN_PROGRESS_BYTES:
                    best = reached()
                    delays = iter(PATIENT_DELAYS_S)
                delay_s = next(delays, None) if error.passing else None
                if delay_s is None:
                    raise
                _say(notice, f"Retry in {delay_s:g}s because of error: {error}")
            await self._sleep(delay_s)


def _say(notice: Notice | None, text: str) -> None:
    if notice is not None:
        notice(text)


def _digest_of(location: Location) -> Digest | None:
    """The hash that a location's content must have: a gftp name begins with one, before the code of its publisher."""
    name = re.fullmatch(r"([0-9a-f]{64})(?:-[0-9a-f]{32})?", location.rest.rpartition("/")[2])
    if location.digest is None and location.scheme == "gftp" and name:
        return Digest(256, name[1])
    return location.digest


def find_volume(volumes: Sequence[Volume], container_path: str) -> tuple[Volume, str]:
    """The volume with the longest prefix of a container path, and the path inside it.

    Errors: TransferError if no volume holds it or it names no file.
    """
    try:
        path = guest_path(container_path)
    except RuntimeFault as error:
        raise TransferError(str(error)) from None
    best: tuple[Volume, str] | None = None
    for volume in volumes:
        prefix = volume.container_path.rstrip("/") + "/"
        if path.startswith(prefix) and (best is None or len(prefix) > len(best[0].container_path.rstrip("/")) + 1):
            best = (volume, path[len(prefix) :])
    if best is None or best[0].private:
        reached = ", ".join(volume.container_path for volume in volumes if not volume.private)[:200]
        told = f"transfers reach volumes alone, here {reached}" if reached else "transfers reach volumes, and the image has none"
        raise TransferError(f"path not found in container: {container_path} ({told})")
    if not best[1] or container_path.endswith("/"):
        raise TransferError(f"container:{container_path} names a directory, not a file")
    return best


async def _copy(descriptor: int, spool: Spool) -> None:
    while block := await trio.to_thread.run_sync(os.read, descriptor, BLOCK_BYTES):
        await spool.write(block)


async def _check_file(descriptor: int, digest: Digest) -> None:
    found, offset = digest.new(), 0
    while block := await trio.to_thread.run_sync(os.pread, descriptor, BLOCK_BYTES, offset):
        await trio.to_thread.run_sync(found.update, block)
        offset += len(block)
    digest.check(found)


def _os_text(error: OSError) -> str:
    return error.strerror or str(error)
