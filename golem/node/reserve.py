"""A reserve on the disk: a file that is given up when the disk is full, so that what is under way can still be written."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

import trio

from actors.kernel.journal import Journal

log = logging.getLogger("golem.node")

RESERVE, RESERVE_BYTES = "reserve", 4 << 20
LOOK_S = 10.0


class Reserve:
    """The reserve of a data directory. At the start it is given up where the disk is full already: a node has to write then."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / RESERVE
        with suppress(OSError):
            if shutil.disk_usage(data_dir).free < RESERVE_BYTES // 2:
                self.spend()

    def spend(self) -> bool:
        """Give the room to whoever writes; return whether there was any. In any thread."""
        try:
            self._path.unlink()
        except OSError:
            return False
        log.warning("the disk of %s is full: the reserve is given up", self._path.parent)
        return True

    def fill(self) -> None:
        """Set the room aside, where there is plenty."""
        if self._path.exists() or shutil.disk_usage(self._path.parent).free < 4 * RESERVE_BYTES:
            return
        handle = os.open(part := self._path.with_suffix(".part"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(handle, 0, RESERVE_BYTES)
        finally:
            os.close(handle)
        os.rename(part, self._path)

    async def keep(self, journal: Journal) -> None:
        """Have the reserve again whenever the disk has room, until cancelled."""
        while True:
            if not journal.trouble:
                with suppress(OSError):
                    await trio.to_thread.run_sync(self.fill)
            await trio.sleep(LOOK_S)
