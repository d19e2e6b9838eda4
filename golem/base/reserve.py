"""Room on a disk for a file that is on its way in, set aside before its bytes come.

Many that come at once would each find the same free bytes; the blocks of one that was let in are the file system's already,
so that the next one sees what is left. Where a file system cannot set blocks aside, each write looks at what is free.
"""

from __future__ import annotations

import ctypes
import errno
import os

_KEEP_SIZE = 1  # linux/falloc.h
_libc = ctypes.CDLL(None, use_errno=True)


class NoRoom(Exception):
    """A file has no room; the text says how much there is, and how much stays free."""


def free_at(descriptor: int) -> int:
    """Return how many bytes a user without privileges may still write beside an open file. Raises `OSError`."""
    found = os.fstatvfs(descriptor)
    return found.f_bavail * found.f_frsize


def check(free_bytes: int, needed: int, spare_bytes: int) -> None:
    """Raises `NoRoom` unless `needed` more bytes leave `spare_bytes` free."""
    if free_bytes - needed < spare_bytes:
        raise NoRoom(
            f"{needed} bytes do not fit: {max(0, free_bytes)} are free on this disk, of which {spare_bytes} stay so"
        )  # fmt: skip


def reserve(descriptor: int, size: int, spare_bytes: int) -> bool:
    """Set blocks aside for an open file that is to have `size` bytes; its length stays as it is.

    Returns whether the file system can. Raises `NoRoom`, also where somebody else took the room meanwhile.
    """
    held = os.fstat(descriptor).st_blocks * 512
    check(free_at(descriptor), max(0, size - held), spare_bytes)
    if size <= 0:
        return True
    if _libc.fallocate(descriptor, _KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        number = ctypes.get_errno()
        if number in (errno.ENOSPC, errno.EDQUOT):
            give_back(descriptor)
            raise NoRoom(f"{size} bytes do not fit: {os.strerror(number)}")
        return False
    if free_at(descriptor) < spare_bytes:
        give_back(descriptor)
        check(free_at(descriptor), max(0, size - held), spare_bytes)
        raise NoRoom(f"{size} bytes do not fit: others came at the same time")
    return True


def give_back(descriptor: int) -> None:
    """Free the blocks behind the end of an open file."""
    try:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size)
    except OSError:
        pass  # whoever removes the file frees them
