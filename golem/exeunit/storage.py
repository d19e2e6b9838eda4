"""Where an activity's volumes live: file systems of a fixed size, so that a guest meets a hard "no space left".

With root's rights an activity gets one ext4 file system in a file whose blocks are reserved at once: what is promised
to one guest is not taken by another, and a disk that cannot give it says so at deploy. Volumes are directories on it;
a volume with a size of its own is a file system in a file on it; `ram` volumes are tmpfs. The container's own layer
over its image can lie on it too (`hold_layer`), and what a guest has elsewhere counts as used here (`set_aside`), so that
one size bounds everything. Elsewhere all of them are plain directories, and `measure` is what a limit can be held by. A
supervisor that dies leaves its mounts below `folder`: `stranded` finds them there.
Neighbours: `golem.exeunit.runtimes.vm.runtime` binds the directories into the container, children of
`golem.exeunit.runtimes.wasm.runtime` open them; `golem.exeunit.transfer.beneath` opens files in them; `runtimes.vm.meter`
measures a layer that cannot be held.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import trio

from golem.exeunit.runtime import GIB, RuntimeFault
from golem.exeunit.supervisor import mark_of, own_mark
from golem.exeunit.usage import measure_tree, remove_tree

log = logging.getLogger("golem.exeunit")

MIN_BYTES = 1 << 20  # the smallest file system that mke2fs makes sense of
FOLDER = "storage"  # a storage folder's own name, by which `leftovers` looks for it
MARK_FILE = "supervisor"  # in a storage folder: whose it is
PROCESS_FILE = "process"  # beside the mark: the first process of the container
SPARE_BYTES = 64 << 20  # what a node keeps of its disk for itself
MAX_FILES = 100_000  # counted in plain directories before counting is given up
TOOL_TIMEOUT_S = 60.0
BUSY_S = 2.0  # how long an unmount waits for whoever still looks, before it is left to the kernel
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_MS_NOSUID, _MS_NODEV, _MS_BIND = 2, 4, 4096
_IMAGE, _MOUNT, _LAYER, _FILES = "storage.ext4", "storage", ".layer", ".files"
# No journal and no write barriers: nothing of this outlives the activity, and a crash ends it. mke2fs need not zero
# what a fresh file holds, and neither need the kernel behind its back (noinit_itable).
_MKFS = ("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", "-E", "nodiscard,lazy_itable_init=1")
_MOUNT_OPTIONS = "loop,nosuid,nodev,noatime,nobarrier,noinit_itable"
_libc = ctypes.CDLL(None, use_errno=True)


class Storage:
    """The volumes of one deployment; made by `open_storage`. `limited`: whether the kernel holds the size."""

    def __init__(self, folder: Path, size_bytes: int, owner_id: int, ram_bytes: int) -> None:
        self.folder, self.size_bytes, self.owner_id = folder, size_bytes, owner_id
        self.ram_left_bytes = ram_bytes
        self.limited = False
        self._empty_bytes = 0
        self._measured_bytes = self._aside_bytes = 0

    @property
    def _root(self) -> Path:
        return self.folder / _MOUNT

    async def _open(self) -> None:
        self.folder.mkdir(mode=0o711)
        (self.folder / MARK_FILE).write_text(own_mark())
        self._root.mkdir(mode=0o710)
        if can_mount():
            image = self.folder / _IMAGE
            _check_room(self.folder, self.size_bytes)
            await trio.to_thread.run_sync(_reserve, image, self.size_bytes)
            self.limited = await self._mount_image(image, self._root)
            if not self.limited:
                image.unlink()
        else:
            _check_room(self.folder, self.size_bytes)
        _give(self._root, 0, self.owner_id, 0o710)  # the guest's root passes through by its group, other users do not
        self._empty_bytes = self._filled()

    async def _mount_image(self, image: Path, point: Path) -> bool:
        """Make a file system in `image` and mount it; False where this machine cannot."""
        for command in ([*_MKFS, str(image)], ["mount", "-o", _MOUNT_OPTIONS, str(image), str(point)]):
            if (problem := await _tool(command)) is not None:
                log.warning("volumes without a hard limit: %s: %s", command[0], problem)
                return False
        return True

    def note_process(self, pid: int) -> None:
        """Note the first process of the container, so that a sweep can end it without its Engine. Raises OSError."""
        (self.folder / PROCESS_FILE).write_text(mark_of(pid))

    def directory(self, name: str) -> Path:
        """Return a fresh directory that every user of the guest may write; all of them share the size. Raises OSError."""
        return self._fresh(self._root / name)

    def file(self, name: str, content: bytes) -> Path:
        """Return a fresh file that the guest's root may write, with a start of ours; it shares the size. Raises OSError."""
        path = self._own_folder() / name
        path.write_bytes(content)
        _give(path, self.owner_id, self.owner_id, 0o644)
        return path

    def set_aside(self, name: str, size_bytes: int) -> None:
        """Count so many bytes as used: what lies elsewhere and is part of the activity's storage. Raises OSError if full."""
        if not self.limited:
            self._aside_bytes += size_bytes
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path := self._own_folder() / name, flags, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size_bytes)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(descriptor)

    def _own_folder(self) -> Path:
        """Return the place of what is not the guest's."""
        folder = self._root / _FILES
        if not folder.exists():
            folder.mkdir()
            _give(folder, 0, 0, 0o711)
        return folder

    async def sized(self, name: str, size_bytes: int) -> Path:
        """Return a directory with a size of its own, set aside of the whole and counted as used from the start.

        Raises OSError, RuntimeFault when that much is not left.
        """
        if size_bytes > self.size_bytes - self.used_bytes():
            raise RuntimeFault(f"a volume of {size_bytes} bytes is more than is left of {self.size_bytes} bytes of storage")
        if not self.limited or size_bytes < MIN_BYTES:
            return self.directory(name)
        image, point = self._root / f".{name}.ext4", self._root / f".{name}"
        point.mkdir(mode=0o710)
        await trio.to_thread.run_sync(_reserve, image, size_bytes)
        await self._mount_image(image, point)
        _give(point, 0, self.owner_id, 0o710)
        return self._fresh(point / name)

    async def ram(self, name: str, size_bytes: int) -> Path:
        """Return a directory in memory (where root may mount). What the guest writes there counts as its memory, but
        not what transfers bring: so all of them together are bounded, too. Raises OSError, RuntimeFault.
        """
        if size_bytes > self.ram_left_bytes:
            raise RuntimeFault(f"a volume in memory of {size_bytes} bytes is more than the {self.ram_left_bytes} bytes left")
        self.ram_left_bytes -= size_bytes
        point = self.folder / f"ram-{name}"
        point.mkdir(mode=0o710)
        if can_mount():
            await trio.to_thread.run_sync(_mount_tmpfs, point, max(size_bytes, os.sysconf("SC_PAGESIZE")))
        _give(point, 0, self.owner_id, 0o710)
        return self._fresh(point / name)

    async def hold_layer(self, upper_dir: Path) -> bool:
        """Have a container that was created and not started write its own layer here; False where that cannot be.

        `upper_dir`: the layer's directory, as the Engine tells it. Docker's driver overlay2 mounts what lies beside it
        (`diff`, `work`) when the container starts, so the whole folder is taken over by a bind mount. When the Engine
        removes the container it empties the folder, and takes the mount away by itself; `close` does where it could not.
        Whether it worked shows in the running container: ask `holds`.
        """
        folder, copy = upper_dir.parent, self._root / _LAYER
        if not self.limited or upper_dir.name != "diff" or not (folder / "link").is_file() or copy.exists():
            return False
        if (problem := await _tool(["cp", "-a", "--", str(folder), str(copy)])) is None:
            try:
                await trio.to_thread.run_sync(_mount, copy, folder, b"", _MS_BIND, b"")
                return True
            except OSError as error:
                problem = str(error)
        log.warning("a container's own layer without a hard limit: %s", problem)
        return False

    def holds(self, pid: int) -> bool:
        """Return whether the root of a running container (`pid`: one of its processes) is bounded by this storage."""
        try:
            inside, here = os.statvfs(f"/proc/{pid}/root"), os.statvfs(self._root)
        except OSError:
            return False
        return self.limited and (inside.f_blocks, inside.f_frsize) == (here.f_blocks, here.f_frsize)

    def _fresh(self, path: Path) -> Path:
        path.mkdir()
        _give(path, self.owner_id, self.owner_id, 0o777)
        return path

    def used_bytes(self) -> int:
        """Return what is used: exact where the kernel limits it, else what `measure` found last."""
        if self.limited:
            self._measured_bytes = max(0, self._filled() - self._empty_bytes)
        return self._measured_bytes + self._aside_bytes

    async def measure(self, max_files: int | None = None) -> int:
        """Look how much is used, with bounded work; more than the whole if there are too many files to count."""
        if not self.limited:
            size = await trio.to_thread.run_sync(measure_tree, self._root, max_files or MAX_FILES)
            self._measured_bytes = size.size_bytes if size.complete else max(size.size_bytes, self.size_bytes + 1)
        return self.used_bytes()

    def _filled(self) -> int:
        if not self.limited:
            return 0
        with suppress(OSError):
            found = os.statvfs(self._root)
            return (found.f_blocks - found.f_bfree) * found.f_frsize
        return self._measured_bytes + self._empty_bytes

    async def close(self) -> None:
        """Unmount and remove everything; may be repeated. Nothing may use it any more. Raises OSError."""
        with trio.CancelScope(shield=True):
            self.used_bytes()
            self.limited = False
            await trio.to_thread.run_sync(unmount_all, self.folder)
            await trio.to_thread.run_sync(remove_folder, self.folder)


async def open_storage(folder: Path, size_bytes: int, owner_id: int, ram_bytes: int = 0) -> Storage:
    """Make `folder` (which must not exist) the storage of one deployment.

    `size_bytes`: of all volumes together; `ram_bytes`: of those in memory together. `owner_id`: the user and group on this
    machine that the guest's root is.
    Raises RuntimeFault when this machine has no room, OSError.
    """
    storage = Storage(folder, max(size_bytes, MIN_BYTES), owner_id, ram_bytes)
    try:
        await storage._open()
    except BaseException:
        await storage.close()
        raise
    return storage


def can_mount() -> bool:
    """Whether this process may make file systems of its own."""
    return os.geteuid() == 0 and shutil.which("mkfs.ext4") is not None and shutil.which("mount") is not None


def unmount(point: Path, busy_s: float = BUSY_S) -> None:
    """Unmount, waiting a little for others to let go; then the mount is only taken out of sight. Raises OSError."""
    deadline = time.monotonic() + busy_s
    flags = _UMOUNT_NOFOLLOW
    while _libc.umount2(os.fsencode(point), flags) != 0:
        code = ctypes.get_errno()
        if code in (errno.EINVAL, errno.ENOENT):  # it is not mounted (any more)
            return
        if code != errno.EBUSY:
            raise OSError(code, os.strerror(code), str(point))
        if time.monotonic() >= deadline:
            flags |= _MNT_DETACH
        time.sleep(0.01)


def unmount_all(folder: Path) -> list[Path]:
    """Unmount what is mounted below a folder, and where else the same file systems are; returns the places.

    Elsewhere are a container's layer and the Engine's volumes, if the Engine died before it could take them down.
    Raises OSError.
    """
    folder = folder.parent.resolve() / folder.name  # itself it is never a link
    mounts = [_place(line) for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    devices = {device for device, point in mounts if folder in point.parents}
    found = [point for device, point in reversed(mounts) if device in devices]
    for point in found:
        unmount(point, BUSY_S if folder in point.parents else 0.0)
    return found


def _place(line: str) -> tuple[str, Path]:
    """Return device number and place of a line of mountinfo, whose odd characters are octal."""
    fields = line.split()
    return fields[2], Path(fields[4].encode().decode("unicode_escape").encode("latin-1").decode(errors="surrogateescape"))


def remove_folder(folder: Path) -> None:
    """Remove a storage folder in which nothing is mounted any more, its mark last. Raises OSError."""
    with suppress(FileNotFoundError):
        if folder.is_symlink():
            raise NotADirectoryError(errno.ENOTDIR, "a link is no storage folder", str(folder))
        for entry in list(folder.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                remove_tree(entry)
            elif entry.name != MARK_FILE:
                entry.unlink()
        (folder / MARK_FILE).unlink(missing_ok=True)
        folder.rmdir()


def _mount_tmpfs(point: Path, size_bytes: int) -> None:
    data = f"size={size_bytes},mode=0710,nr_inodes={MAX_FILES}".encode()
    _mount(Path("tmpfs"), point, b"tmpfs", _MS_NOSUID | _MS_NODEV, data)


def _mount(source: Path, point: Path, kind: bytes, flags: int, data: bytes) -> None:
    if _libc.mount(os.fsencode(source), os.fsencode(point), kind, flags, data) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(point))


def _reserve(path: Path, size_bytes: int) -> None:
    """Make a file of zeros whose blocks are set aside where the file system can do that. Raises RuntimeFault."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # not os.posix_fallocate: its C library writes all the zeros where the file system has no such call
        if _libc.fallocate(descriptor, 0, ctypes.c_longlong(0), ctypes.c_longlong(size_bytes)) != 0:
            if ctypes.get_errno() == errno.ENOSPC:
                raise RuntimeFault(_no_room(path.parent, size_bytes))
            os.ftruncate(descriptor, size_bytes)
    finally:
        os.close(descriptor)


def _check_room(folder: Path, size_bytes: int) -> None:
    found = os.statvfs(folder)
    if found.f_bavail * found.f_frsize < size_bytes + SPARE_BYTES:
        raise RuntimeFault(_no_room(folder, size_bytes))


def _no_room(folder: Path, size_bytes: int) -> str:
    free = os.statvfs(folder)
    free_gib = free.f_bavail * free.f_frsize / GIB
    return f"the provider's disk has no room for storage of {size_bytes / GIB:.3g} GiB: {free_gib:.3g} GiB are free"


def _give(path: Path, uid: int, gid: int, mode: int) -> None:
    if os.geteuid() == 0:
        os.chown(path, uid, gid)
    path.chmod(mode)


async def _tool(command: Sequence[str]) -> str | None:
    """Run a program of the system to its end; what it complains of if it fails."""
    with trio.CancelScope(shield=True):  # a half-done mount would be nobody's
        try:
            with trio.fail_after(TOOL_TIMEOUT_S):
                ended = await trio.run_process(
                    command, check=False, stdin=subprocess.DEVNULL, capture_stdout=True, capture_stderr=True
                )
        except (OSError, trio.TooSlowError) as error:
            return str(error) or "took too long"
    said = (ended.stderr or ended.stdout).decode(errors="replace").strip()
    return None if ended.returncode == 0 else said[:400] or f"exit status {ended.returncode}"
