"""What of a cache of task packages can be removed: files that nobody holds by a lock.

Neighbours: `packages` keeps the cache; `golem.provider.storage` counts what can be removed as room.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

MIN_FREE_BYTES = 1 << 30  # of the disk, left free by the cache


def evictable_bytes(directory: Path) -> int:
    """Return how much a cache holds that nobody uses: it makes room when somebody needs it."""
    total = 0
    for path in directory.glob("sha3-*"):
        with suppress(OSError):  # another exe-unit evicts as well
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                total += os.fstat(descriptor).st_blocks * 512 if lock_now(descriptor, path) else 0
            finally:
                os.close(descriptor)
    return total


def lock_now(descriptor: int, path: Path) -> bool:
    """Return whether an exclusive lock could be had, and the file still has its name."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False
