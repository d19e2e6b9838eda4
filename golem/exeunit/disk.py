"""The provider's disk under an activity's working directory: whether it is full, and room kept for the last report.

Others write to the same disk. A journal that cannot be written ends the process without a word, so some of the disk is
set aside from the start: when a write finds no room the reserve is given up for it, and the activity ends in good order.
Neighbours: `process.py` looks here each second; the journal asks for the reserve; `storage.py` reserves what
guests write, which therefore does not depend on this.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

log = logging.getLogger("golem.exeunit")

RESERVE_BYTES = 8 << 20  # the journal's last transactions, results of commands among them
FLOOR_BYTES = 16 << 20  # free beside the reserve; below it the next thing that needs the disk may fail
LOW_LOOKS = 3  # in a row: another program's short-lived file ends no activity
NAME = "reserve"


def free_bytes(folder: Path) -> int:
    """Return what a user without privileges may still write. Raises OSError."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


class DiskWatch:
    """The disk of one working directory, which must exist. The reserve may be given up from any thread."""

    def __init__(self, folder: Path, free: Callable[[Path], int] = free_bytes) -> None:
        self._folder, self._free = folder, free
        self._path = folder / NAME
        self._lock = threading.Lock()
        self._held = self._reserve()
        self._found_full = not self._held
        self._low = 0

    def _reserve(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
            finally:
                os.close(descriptor)
        except OSError as error:
            log.error("no room for the reserve of %d bytes: %s", RESERVE_BYTES, error)
            with suppress(OSError):
                self._path.unlink()
            return False
        return True

    def make_room(self) -> bool:
        """Give up the reserve because a write found no room; return whether there was one (another try may succeed)."""
        self._found_full = True
        return self.release()

    def release(self) -> bool:
        """Give up the reserve; return whether there was one."""
        with self._lock:
            held, self._held = self._held, False
            if held:
                with suppress(OSError):
                    self._path.unlink()
            return held

    def look(self) -> str | None:
        """Return why the activity cannot go on, None while there is room. To be called again and again."""
        try:
            free = self._free(self._folder)
        except OSError as error:
            return f"the provider's disk cannot be read: {error.strerror}"
        self._low = self._low + 1 if free < FLOOR_BYTES else 0
        if not self._found_full and self._low < LOW_LOOKS:
            return None
        return f"the provider's disk is full: {free / (1 << 20):.1f} MiB are free where the activity works"
