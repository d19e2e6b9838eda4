"""Clearing up the storage of exe-units that died without doing it: mounts, and files of volumes.

A storage folder bears the mark of its exe-unit's process (`supervisor`). What bears the mark of a process that is gone is
removed; what a living one uses is not touched, nor is anything without a mark.
Neighbours: `storage` made the folders; runtimes call this in their `sweep`; `runtimes.vm.leftovers` sweeps an Engine first.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from golem.exeunit.runtime import RuntimeFault
from golem.exeunit.storage import FOLDER, MARK_FILE, remove_folder, unmount_all
from golem.exeunit.supervisor import is_dead

log = logging.getLogger("golem.exeunit")

MAX_DEPTH = 4  # of a storage folder below the work root: agreement, activity, deployment, itself; guests write deeper
MAX_MARK_BYTES = 200
MAX_FOLDERS = 10_000


def told(removed: list[str], problems: list[str]) -> list[str]:
    """Log what a sweep did, and return it. Raises RuntimeFault with all of it where something could not be done."""
    for line in removed:
        log.info("%s", line)
    if problems:
        raise RuntimeFault("; ".join(removed + problems))
    return removed


def sweep_storage(work_root: Path, removed: list[str], problems: list[str]) -> None:
    """Unmount and remove what dead exe-units stored below `work_root`; adds a line to one of the lists for each thing."""
    for folder in list(dead_folders(work_root)):
        try:
            removed += [f"unmounted {point}" for point in unmount_all(folder)]
            remove_folder(folder)
            removed.append(f"removed {folder}")
        except OSError as error:
            problems.append(f"{folder}: {error}")


def dead_folders(work_root: Path) -> Iterator[Path]:
    """Yield the storage folders below `work_root` whose exe-unit is gone.

    What a guest wrote is never looked into, of whatever runtime: it could bear a mark, too, and become a link meanwhile.
    """
    waiting, seen = [(work_root, 0)], 0
    while waiting and seen < MAX_FOLDERS:
        folder, depth = waiting.pop()
        seen += 1
        if folder.name == FOLDER and depth:
            if is_dead(read_mark(folder / MARK_FILE)):
                yield folder
        elif depth < MAX_DEPTH:
            waiting += [(inner, depth + 1) for inner in _folders(folder)]


def read_mark(path: Path) -> str:
    """Return what a storage folder says of itself, "" if nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(descriptor, MAX_MARK_BYTES).decode(errors="replace")
    except OSError:
        return ""
    finally:
        os.close(descriptor)


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as listing:
            return [Path(entry) for entry in listing if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
