"""What exe-units left behind that died without cleaning up: containers, mounts, processes, working directories.

At the agent's start whatever an earlier crash left is removed; later, what each exe-unit leaves that did not end well.
The runtimes know their own traces (`python -m golem.exeunit sweep`); directories are removed here, after that.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import trio

from golem.exeunit.usage import remove_tree
from golem.provider.runtimes import ExeUnits, exe_unit
from golem.provider.units import find_unit

log = logging.getLogger("golem.provider")

SWEEP_S = 30.0
FIRST_PAUSE_S, LAST_PAUSE_S = 5.0, 300.0  # before a runtime that could not is asked again
MAX_LINES = 200
KEPT_LOGS = 100


class Leftovers:
    """Removes them, one sweep at a time."""

    def __init__(self, data_dir: Path, units: Callable[[], ExeUnits], runtimes: Callable[[], Sequence[str]]) -> None:
        self._work = data_dir / "exe-unit" / "work"
        self._units, self._runtimes = units, runtimes
        self._one = trio.Lock()

    def find_stale(self, expected: Iterable[str]) -> list[Path]:
        """Return working directories of activities that are over: no process runs there, and none is `expected` to."""
        known = set(expected)
        found = [path for path in self._work.glob("*/*") if path.is_dir() and not path.is_symlink()]
        return [path for path in found if path.name not in known and not find_unit(path.name)]

    async def remove_stale(self, stale: Sequence[Path]) -> None:
        """Remove what an earlier run of this machine left; `stale` are the directories that `find_stale` found then."""
        if not self._work.exists():
            return
        await self.sweep(self._runtimes())
        for path in stale:
            await self.remove(path)
            log.info("removed the working directory of activity %s, which an earlier run left", path.name[:8])

    async def sweep(self, runtimes: Iterable[str]) -> bool:
        """Have runtimes remove what dead exe-units left on this machine; return whether they could."""
        able = True
        async with self._one:
            for runtime in runtimes:
                flags = ("--work-root", str(self._work))
                problem, said = await exe_unit("sweep", runtime, self._units(), SWEEP_S, *flags)
                for line in said.splitlines()[:MAX_LINES]:
                    log.info("left over (%s): %s", runtime, line[:500])
                if problem is not None:
                    log.debug("looking for what %s left over: %s", runtime, problem)
                    able = False
        return able

    async def clean(self, activity_id: str, runtime: str | None, code: int | None) -> None:
        """Remove the working directory of an activity whose exe-unit has ended with `code` (None: nobody saw it), and old logs.

        Where it did not end well, or still has mounts there, the runtimes come first: the marks by which they know them are
        in the directory. What they need may be away (an Engine that is restarted): they are asked again until it is back.
        """
        folders = list(self._work.glob(f"*/{activity_id}"))
        runtimes, able = [runtime] if runtime is not None else self._runtimes(), True
        if folders and (code != 0 or await trio.to_thread.run_sync(_mounted, folders)):
            able = await self.sweep(runtimes)
        for folder in folders:
            await self.remove(folder)
        await trio.to_thread.run_sync(self._remove_logs)
        pause_s = FIRST_PAUSE_S
        while not able and runtime is not None:
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_PAUSE_S)
            able = await self.sweep(runtimes)
            for folder in folders:
                if able and folder.exists():
                    await self.remove(folder)

    def _remove_logs(self) -> None:
        logs = sorted((self._work.parent / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime)
        for path in logs[:-KEPT_LOGS]:
            path.unlink(missing_ok=True)

    async def remove(self, folder: Path) -> None:
        """Remove a working directory, however deep a guest has made it, and that of its agreement if it was the last."""
        try:
            await trio.to_thread.run_sync(remove_tree, folder)
        except OSError as error:
            log.warning("%s cannot be removed: %s", folder, error)
            return
        parent = folder.parent
        if parent.is_dir() and not any(one.is_dir() for one in parent.iterdir()):
            shutil.rmtree(parent, ignore_errors=True)


def _mounted(folders: Sequence[Path]) -> bool:
    """Return whether anything is mounted below one of several directories."""
    try:
        points = [Path(line.split()[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return False
    return any(folder.resolve() in point.parents for folder in folders for point in points)
