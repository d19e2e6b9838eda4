"""Opening files in directories that a guest can write, without being led out of them or left hanging.

A guest can plant symlinks (and, in containers, device nodes and FIFOs) under any name. Every path here is resolved by
`openat2` with RESOLVE_BENEATH, NO_MAGICLINKS and NO_XDEV: links are followed as long as they stay inside, which the kernel
sees to at each step. Only regular files are opened. New files are written beside their place and take it by rename, which
replaces a link. Neighbour: `transfers`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import uuid
from pathlib import Path
from types import TracebackType

_NR_OPENAT2 = 437  # on every architecture
_RESOLVE = 0x08 | 0x02 | 0x01  # BENEATH, NO_MAGICLINKS, NO_XDEV
MAX_ABSOLUTE_LINKS = 8  # one behind the other
MAX_RACES = 64  # the kernel asks to look again when a directory was moved meanwhile
_IN_ROOT = 0x10 | 0x02  # IN_ROOT, NO_MAGICLINKS
_libc = ctypes.CDLL(None, use_errno=True)


def open_beneath(root_fd: int, path: str, flags: int, mode: int = 0) -> int:
    """Descriptor of `path` below an open directory.

    Errors: OSError; ELOOP is told as links in a circle, EXDEV as leading out of the volume.
    """
    for _ in range(MAX_RACES):
        try:
            return _openat2(root_fd, path, flags, mode, _RESOLVE)
        except BlockingIOError:  # EAGAIN
            continue
        except OSError as error:
            texts = {errno.ELOOP: "its symbolic links lead nowhere", errno.EXDEV: "the path leads out of the volume"}
            raise OSError(error.errno, texts.get(error.errno or 0, str(error.strerror))) from None
    raise OSError(errno.EAGAIN, "its directories are being moved")


def open_in_root(root_fd: int, path: str, flags: int) -> int:
    """Descriptor of `path` where an open directory is the root, for links, too. Raises OSError."""
    return _openat2(root_fd, path, flags, 0, _IN_ROOT)


def _openat2(root_fd: int, path: str, flags: int, mode: int, resolve: int) -> int:
    how = struct.pack("<QQQ", flags | os.O_CLOEXEC, mode, resolve)
    descriptor = int(_libc.syscall(_NR_OPENAT2, root_fd, os.fsencode(path), how, ctypes.c_size_t(len(how))))
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return descriptor


def _open_root(root: Path) -> int:
    return os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _behind_link(root_fd: int, path: str, guest_root: str) -> str | None:
    """Where the absolute link `path` leads inside the directory that the guest knows as `guest_root`; None if elsewhere."""
    try:
        link = open_beneath(root_fd, path, os.O_PATH | os.O_NOFOLLOW)
        try:
            target = os.readlink("", dir_fd=link)
        finally:
            os.close(link)
    except OSError:  # no link, or one on the way is absolute
        return None
    prefix = guest_root.rstrip("/") + "/"
    return target.removeprefix(prefix) if target.startswith(prefix) else None


class OpenFile:
    """A regular file below `root`, open for reading; `with` gives its descriptor.

    Links are followed that stay inside. `guest_root` is what the guest calls `root`, for links that name it.
    Errors: OSError, also when it is no regular file.
    """

    def __init__(self, root: Path, path: str, guest_root: str = "") -> None:
        root_fd = _open_root(root)
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
        try:
            for left in reversed(range(MAX_ABSOLUTE_LINKS + 1)):
                try:
                    self.descriptor = open_beneath(root_fd, path, flags)
                    break
                except OSError as error:
                    behind = _behind_link(root_fd, path, guest_root) if error.errno == errno.EXDEV and guest_root else None
                    if behind is None or not left:
                        raise
                    path = behind
        finally:
            os.close(root_fd)
        if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
            os.close(self.descriptor)
            raise OSError(errno.EINVAL, "not a regular file")

    def __enter__(self) -> int:
        return self.descriptor

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self.descriptor)


class NewFile:
    """A file being written below `root`; `commit` puts it in its place, leaving the block without it removes it.

    Parents are made. File and parents get the owner of `root`, and may be written by all whom `root` lets write, so that
    the guest's users can use them; a file that replaces another keeps its mode.
    """

    def __init__(self, root: Path, path: str) -> None:
        """Errors: OSError."""
        root_fd = _open_root(root)
        try:
            self._owner = os.fstat(root_fd)
            *parents, self._name = path.split("/")
            self._directory = self._make_parents(root_fd, parents)
        finally:
            os.close(root_fd)
        self._temporary: str | None = f".transfer-{uuid.uuid4().hex}"
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NONBLOCK
            self.descriptor = open_beneath(self._directory, self._temporary, flags, 0o600)
        except OSError:
            os.close(self._directory)
            raise

    def _make_parents(self, root_fd: int, parents: list[str]) -> int:
        current = os.dup(root_fd)
        for depth, name in enumerate(parents, 1):
            try:
                try:  # from the root: links may lead up, and stay inside
                    inner = open_beneath(root_fd, "/".join(parents[:depth]), os.O_PATH | os.O_DIRECTORY)
                except FileNotFoundError:
                    os.mkdir(name, 0o700, dir_fd=current)
                    inner = open_beneath(current, name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                    self._give(inner, 0o755)
            finally:
                os.close(current)
            current = inner
        return current

    def _give(self, descriptor: int, mode: int) -> None:
        """Hand a file or directory of ours to the guest."""
        if os.geteuid() == 0:
            os.fchown(descriptor, self._owner.st_uid, self._owner.st_gid)
        os.fchmod(descriptor, mode | (self._owner.st_mode & 0o022))

    def _former_mode(self) -> int | None:
        try:
            former = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return stat.S_IMODE(former.st_mode) & 0o777 if stat.S_ISREG(former.st_mode) else None

    def __enter__(self) -> NewFile:
        return self

    def commit(self) -> None:
        """Take the final name, replacing a file that has it.

        Errors: OSError, for one if that name is a directory.
        """
        assert self._temporary is not None
        self._give(self.descriptor, 0o644)
        if (mode := self._former_mode()) is not None:
            os.fchmod(self.descriptor, mode)
        os.rename(self._temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self._temporary = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self.descriptor)
        try:
            if self._temporary is not None:
                os.unlink(self._temporary, dir_fd=self._directory)
        except FileNotFoundError:
            pass
        finally:
            os.close(self._directory)
