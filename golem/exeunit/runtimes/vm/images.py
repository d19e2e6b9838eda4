"""Task packages inside a Docker Engine: brought in once, found again by digest, evicted when they have not been used.

A package is read by a sandboxed child alone (`unpack`), which checks all of it and writes it anew as one Docker archive
into an unnamed file; only then does the Engine hear of it, and of nothing that the child did not write. An image in the
Engine is named by its package's digest, `golem/<hex>:latest`; names inside the package mean nothing.

Several exe-units share the Engine. Each digest has a lock file in the cache folder (`flock`, so it ends with its
process): whoever uses the image holds it shared until `EngineImage.close`, whoever brings it in or evicts it
exclusively. The file's modification time is the image's last use.
Neighbours: `admin.Admin` (the Engine), `golem.exeunit.transfer.packages` (where the package comes from), `runtimes.vm`.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import trio

from golem.exeunit.runtime import ImageFormat, RuntimeFault, Side
from golem.exeunit.runtimes.vm.admin import Admin
from golem.exeunit.sandbox.process import ChildEnd, open_child
from golem.exeunit.unpack.archives import COST_LABEL, MEMBERS_LABEL, NAME_BYTES, is_own

Notice = Callable[[str], None]

REPOSITORY = "golem"
FORMATS = frozenset({ImageFormat.DOCKER_ARCHIVE, ImageFormat.OCI_ARCHIVE, ImageFormat.ROOTFS_ARCHIVE, ImageFormat.GVMI})
CHUNK_BYTES = 1 << 20
LOCK_POLL_S = 0.1
RESERVE_BYTES = 256 << 20  # of the disk, never filled by images
RESERVE_INODES = 50_000
MAX_IMAGES = 1000
MIN_NOTICE_GAP_S = 0.5
NOTICE_STEP_PERCENT = 10
UNPACK_UID = 1_879_048_191  # a user that no distribution hands out
_PACKAGE_ROOT = Path(__file__).resolve().parents[4]
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm"}  # as images name them
_LIBRARIES = ("zstandard", "lz4", "lzallright")


@dataclass(frozen=True)
class ImageLimits:
    """What one package may take. Sizes in bytes."""

    unpacked_bytes: int = 16 << 30  # all layers together, as tar files
    members: int = 500_000  # files, directories and links of all layers together
    layers: int = 125  # as many as an Engine takes
    ratio: int = 200  # of unpacked to packed size, once more than `free_bytes` have been unpacked
    free_bytes: int = 256 << 20
    cpu_s: int = 900
    wall_s: float = 1800.0
    memory_bytes: int = 768 << 20  # of the child that reads it


@dataclass
class EngineImage:
    """An image in the Engine, not evicted before `close` (or the end of its `with` block)."""

    id: str
    tag: str
    entrypoint: tuple[str, ...]
    cmd: tuple[str, ...]
    env: Mapping[str, str]
    workdir: str  # absolute
    user: str  # "", or a name or number, with a group after ":" or without
    volumes: tuple[str, ...]  # absolute paths
    ports: tuple[str, ...]  # "80/tcp"
    size_bytes: int
    cached: bool
    unpack_cpu_s: float  # what reading the package took, 0 when it was there
    _lock: int

    def close(self) -> None:
        """Let go of the image: from now on it may be evicted, unless a container uses it. May be repeated."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> EngineImage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def image_tag(digest: str) -> str:
    """Return the name in the Engine of the package with this SHA3 digest (hex)."""
    if not re.fullmatch(r"[0-9a-f]{56,128}", digest):
        raise ValueError(f"not a digest: {digest[:200]!r}")
    return f"{REPOSITORY}/{digest}:latest"


async def obtain_image(
    admin: Admin,
    path: Path,
    digest: str,
    format: ImageFormat,
    *,
    folder: Path,
    notice: Notice | None = None,
    limits: ImageLimits | None = None,
    max_bytes: int | None = None,
    spent: Callable[[float], None] = lambda cpu_s: None,
) -> EngineImage:
    """Return the image of a package, brought into the Engine if it is not there yet.

    `path`: the package, whose `digest` (hex) has been checked. `folder`: for locks and unnamed scratch files, shared by
    all exe-units of an Engine. `notice`: told what goes on. `max_bytes`: evict other images above this sum afterwards.
    `spent`: told the CPU seconds that the reading of a package took which failed.
    Errors: RuntimeFault, whose text names what is wrong with the package.
    """
    limits, told = limits or ImageLimits(), notice or _silent
    tag, path_of_lock = image_tag(digest), folder / f"{digest}.lock"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    cpu_s, loaded = 0.0, False
    while True:
        lock = await _shared(path_of_lock, told)
        try:
            found = await admin.inspect_image(tag)
            if found is not None:
                os.utime(lock)
                image = _engine_image(found, tag, not loaded, cpu_s, lock)
                lock = -1  # the image's from now on
                return image
        finally:
            if lock >= 0:
                os.close(lock)
        if loaded:
            raise RuntimeFault(f"the Docker Engine lost the image {tag} at once")
        alone = _try_lock(path_of_lock, fcntl.LOCK_EX)
        if alone is None:  # another one looks as well, or brings it in
            await trio.sleep(LOCK_POLL_S)
            continue
        try:
            if await admin.inspect_image(tag) is None:
                cpu_s = await _bring(admin, path, tag, format, folder, told, limits, spent)
                loaded = True
        except BaseException:  # no image, no lock; whoever waits for it makes a new one
            path_of_lock.unlink(missing_ok=True)
            raise
        finally:
            os.close(alone)
        if loaded and max_bytes is not None:
            await evict(admin, folder, max_bytes, spare=frozenset({tag}))


async def evict(
    admin: Admin,
    folder: Path,
    max_bytes: int,
    spare: frozenset[str] = frozenset(),
    *,
    at_least_bytes: int = 0,
    at_least_members: int = 0,
    max_images: int = MAX_IMAGES,
) -> list[str]:
    """Remove the least recently used images until the rest fits into `max_bytes` and is no more than `max_images`; returns
    the names removed.

    An image counts with what it costs, names and all. `at_least_bytes`, `at_least_members`: so much has to go in any case.
    Images that an exe-unit holds, that a container uses or that `spare` names stay, even if they are too much.
    """
    images = []
    for entry in await admin.list_images(f"{REPOSITORY}/*"):
        for tag in entry.get("RepoTags") or ():
            digest = _digest_of(tag)
            if digest is not None:
                size = max(int(entry["Size"]), _label(entry, COST_LABEL))
                last = _last_use(folder / f"{digest}.lock")
                images.append((last, tag, digest, str(entry["Id"]), size, _label(entry, MEMBERS_LABEL)))
    total = sum(size for *_, size, _ in images)
    max_bytes, left = min(max_bytes, total - at_least_bytes), len(images)
    if total <= max_bytes and left <= max_images and at_least_members <= 0:
        return []
    in_use, removed = await admin.image_ids_in_use(), []
    for _, tag, digest, image_id, size, members in sorted(images):
        if total <= max_bytes and left <= max_images and at_least_members <= 0:
            break
        if image_tag(digest) in spare or image_id in in_use:
            continue
        path = folder / f"{digest}.lock"
        lock = _try_lock(path, fcntl.LOCK_EX)
        if lock is None:
            continue
        try:
            if await admin.remove_image(tag):
                path.unlink(missing_ok=True)
                total, left, at_least_members = total - size, left - 1, at_least_members - members
                removed.append(tag)
        finally:
            os.close(lock)
    return removed


def _label(image: Mapping[str, Any], name: str) -> int:
    """Return a number that the reader of a package has noted, 0 where there is none."""
    text = str((image.get("Labels") or {}).get(name, ""))
    return int(text) if re.fullmatch(r"[0-9]{1,15}", text) else 0


# -- locks


async def _shared(path: Path, notice: Notice) -> int:
    """Return a descriptor with a shared lock; the wait for it can be cancelled."""
    waited = False
    while (descriptor := _try_lock(path, fcntl.LOCK_SH)) is None:
        if not waited:
            notice("Waiting for the image: another activity is bringing it in")
            waited = True
        await trio.sleep(LOCK_POLL_S)
    return descriptor


def _try_lock(path: Path, how: int) -> int | None:
    """Return a descriptor with the lock, None while another process has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:  # else evicted between open and lock
            return descriptor
    except BlockingIOError:
        pass
    os.close(descriptor)
    return None


def _last_use(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _digest_of(tag: str) -> str | None:
    """Return the digest of a name that `image_tag` made; podman puts its own host name in front."""
    match = re.fullmatch(r"(?:[a-z0-9.-]+/)?golem/([0-9a-f]{56,128}):latest", tag)
    return match[1] if match else None


# -- into the Engine


async def _bring(
    admin: Admin,
    path: Path,
    tag: str,
    format: ImageFormat,
    folder: Path,
    notice: Notice,
    limits: ImageLimits,
    spent: Callable[[float], None],
) -> float:
    """Unpack, check and load a package; returns the CPU seconds that its reading took."""
    if format not in FORMATS:
        raise RuntimeFault(f"the task package is {format.value}: no image for a container")
    room = _free(folder) - RESERVE_BYTES
    if room <= path.stat().st_size:
        raise RuntimeFault(f"this provider has not enough disk space to unpack the image: {max(0, room) >> 20} MiB free")
    with tempfile.TemporaryFile(dir=folder) as archive, tempfile.TemporaryFile(dir=folder) as inflated:
        with path.open("rb") as package:
            spec = {
                "parent": os.getpid(),
                "uid": UNPACK_UID,
                "format": format.name,
                "tag": tag,
                "machine": _MACHINES.get(platform.machine(), platform.machine()),
                "package": package.fileno(),
                "archive": archive.fileno(),
                "inflated": inflated.fileno(),
                "room": room,
                "limits": asdict(limits),
            }
            files = (package.fileno(), archive.fileno(), inflated.fileno())
            cpu_s, layers, members = await _unpack(spec, files, notice, limits, spent)
        inflated.truncate(0)
        size = archive.seek(0, os.SEEK_END)
        if not is_own(archive.fileno(), size, tag, len(layers)):
            raise RuntimeFault("the image cannot be used: what was made of it is not what it should be")
        await _make_room(admin, folder, size, members)
        await _load(admin, archive.fileno(), size, notice)
    image = await admin.inspect_image(tag)
    if image is None or image.get("RootFS", {}).get("Layers", layers) != layers:
        raise RuntimeFault("the Docker Engine did not take the image as it was given")
    return cpu_s


async def _make_room(admin: Admin, folder: Path, size: int, members: int) -> None:
    """See to it that the Engine has the disk space for an archive, which it holds twice while it loads it, and the inodes."""
    root = await admin.root_dir()
    if root is None:
        return
    try:
        for _ in range(2):
            missing = 2 * size + members * NAME_BYTES + RESERVE_BYTES - _free(root)
            names = members + RESERVE_INODES - _free_inodes(root)
            if missing <= 0 and names <= 0:
                return
            await evict(admin, folder, sys.maxsize, at_least_bytes=missing, at_least_members=names)
    except OSError:  # it is not for us to see; then it is the Engine who finds out
        return
    what = f"{size >> 20} MiB and {members} files"
    raise RuntimeFault(f"this provider's Docker Engine has not enough disk space for an image of {what}")


def _free(path: Path) -> int:
    return shutil.disk_usage(path).free


def _free_inodes(path: Path) -> int:
    """Return how many files may still be made; where a file system does not count them there is no end."""
    found = os.statvfs(path)
    return found.f_favail if found.f_files else sys.maxsize


async def _load(admin: Admin, descriptor: int, size: int, notice: Notice) -> None:
    sent, stopped = 0, threading.Event()

    def chunks() -> Iterator[bytes]:
        """Called in the thread that talks to the Engine."""
        nonlocal sent
        while sent < size:
            if stopped.is_set():
                raise InterruptedError("the load was cancelled")
            chunk = os.pread(descriptor, CHUNK_BYTES, sent)
            sent += len(chunk)
            yield chunk

    async def watch() -> None:
        teller = _Teller("Loading image", notice)
        while True:
            teller.tell(100 * sent // max(1, size))
            await trio.sleep(LOCK_POLL_S)

    fault: RuntimeFault | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        nursery.start_soon(_set_when_cancelled, stopped)
        try:
            await admin.load_image(chunks())
        except (RuntimeFault, InterruptedError) as error:  # told after the nursery, which would make a group of it
            await trio.lowlevel.checkpoint_if_cancelled()  # then this is why the load broke off
            fault = error if isinstance(error, RuntimeFault) else RuntimeFault(str(error))
        nursery.cancel_scope.cancel()
    if fault is not None:
        raise fault


async def _set_when_cancelled(event: threading.Event) -> None:
    try:
        await trio.sleep_forever()
    finally:
        event.set()


def digest_of(image: Path) -> str:
    """Return the digest that a cached package is named by, else the SHA3-224 of the file."""
    match = re.fullmatch(r"sha3-\d{3}-([0-9a-f]{56,128})", image.name)
    if match is not None:
        return match[1]
    with image.open("rb") as file:
        return hashlib.file_digest(file, "sha3_224").hexdigest()


# -- the child


async def _unpack(
    spec: dict[str, Any], files: Sequence[int], notice: Notice, limits: ImageLimits, spent: Callable[[float], None]
) -> tuple[float, list[str], int]:
    """Have a sandboxed child write the checked archive; returns its CPU seconds, the layers' digests and how many files
    there are. `spent` is told the seconds where it fails.
    """
    teller, rest = _Teller("Unpacking image", notice), bytearray()
    stderr = bytearray()

    async def output(side: Side, chunk: bytes) -> None:
        if side == "stderr":
            stderr.extend(chunk[: 4096 - len(stderr)])
            return
        rest.extend(chunk)
        *lines, last = bytes(rest).split(b"\n")
        rest[:] = last[-8:]
        if lines and lines[-1].isdigit():
            teller.tell(min(100, int(lines[-1][:3])))

    teller.tell(0)
    try:
        async with open_child(_command_line, json.dumps(spec).encode(), files) as child:
            try:
                ended = await child.wait(output, max_output_bytes=1 << 16, time_limit_s=limits.wall_s)
            except BaseException:  # cancelled: it is killed, and what it took is taken
                spent(child.cpu_s())
                raise
            cpu_s = child.cpu_s()
    except OSError as error:
        raise RuntimeFault(f"the sandbox for unpacking cannot be started: {error}") from None
    report = _report(ended)
    if "layers" not in report:
        spent(cpu_s)
        raise RuntimeFault(f"the image cannot be used: {report.get('problem') or _death(ended, limits, bytes(stderr))}")
    return cpu_s, list(report["layers"]), max(0, int(report.get("members") or 0))


def _report(ended: ChildEnd) -> dict[str, Any]:
    try:
        report = json.loads(ended.report)
    except ValueError:
        return {}
    return report if isinstance(report, dict) else {}


def _death(ended: ChildEnd, limits: ImageLimits, stderr: bytes) -> str:
    if ended.killed_for is not None:
        return f"unpacking was stopped: {ended.killed_for}"
    if ended.signal == signal.SIGXCPU:
        return f"unpacking took more than {limits.cpu_s} s of CPU time"
    if ended.signal is not None:
        return f"unpacking was ended by {ended.signal.name}, most likely out of memory"
    last = stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
    return f"unpacking failed: {last[:300] or f'exit code {ended.code}'}"


class _Teller:
    """Notices of progress: every ten per cent, and not many a second."""

    def __init__(self, what: str, notice: Notice) -> None:
        self._what, self._notice = what, notice
        self._last, self._last_s = -1, -MIN_NOTICE_GAP_S

    def tell(self, percent: int) -> None:
        step = percent // NOTICE_STEP_PERCENT * NOTICE_STEP_PERCENT
        now_s = trio.current_time()
        if step > self._last and now_s >= self._last_s + MIN_NOTICE_GAP_S:
            self._last, self._last_s = step, now_s
            self._notice(f"{self._what} {step} %" if step else self._what)


def _command_line(spec_fd: int, report_fd: int) -> list[str]:
    """Python without site, user or environment influence, that sees this package and the decompressors alone."""
    found = [importlib.util.find_spec(name) for name in _LIBRARIES]
    folders = {str(Path(one.origin).parents[1]) for one in found if one is not None and one.origin is not None}
    paths = [str(_PACKAGE_ROOT), *sorted(folders)]
    boot = f"import sys; sys.path[:0] = {paths!r}\nfrom golem.exeunit.unpack.child import main\nmain()"
    return [sys.executable, "-I", "-S", "-X", "utf8", "-c", boot, str(spec_fd), str(report_fd)]


# -- what the Engine says of an image


def _engine_image(found: Mapping[str, Any], tag: str, cached: bool, cpu_s: float, lock: int) -> EngineImage:
    config = found.get("Config") or {}
    pairs = (entry.partition("=") for entry in config.get("Env") or ())
    return EngineImage(
        id=str(found["Id"]),
        tag=tag,
        entrypoint=tuple(config.get("Entrypoint") or ()),
        cmd=tuple(config.get("Cmd") or ()),
        env={name: value for name, _, value in pairs},
        workdir=config.get("WorkingDir") or "/",
        user=config.get("User") or "",
        volumes=tuple(sorted(config.get("Volumes") or ())),
        ports=tuple(sorted(config.get("ExposedPorts") or ())),
        size_bytes=int(found.get("Size") or 0),
        cached=cached,
        unpack_cpu_s=cpu_s,
        _lock=lock,
    )


def _silent(text: str) -> None:
    """Notices nobody asked for."""
