"""Clearing up after exe-units that died without doing it: containers, volumes, mounts, files of volumes.

Everything an exe-unit makes outside its own memory bears its mark (`supervisor`): a label of the container, a file in
the storage folder. What bears the mark of a process that is gone is removed, in the order in which it holds on to each
other; what a living one uses is not touched, nor is anything without a mark. Where Engine and mounts of a machine serve
several nodes, each may sweep.
Neighbours: `golem.exeunit.runtimes.vm.runtime` calls this; `storage` made the folders; the agent runs it at its start and after
an exe-unit that died.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import trio

from golem.exeunit.runtime import RuntimeFault
from golem.exeunit.runtimes.vm.admin import Admin
from golem.exeunit.runtimes.vm.storage import FOLDER, MARK_FILE, PROCESS_FILE, remove_folder, unmount_all
from golem.exeunit.supervisor import is_dead, kill_marked

log = logging.getLogger("golem.exeunit")

SUPERVISOR_LABEL = "golem.supervisor"
MAX_DEPTH = 4  # of a storage folder below the work root: agreement, activity, deployment, itself; guests write deeper
MAX_MARK_BYTES = 200
MAX_FOLDERS = 10_000
ENGINE_S = 10.0  # for each thing that the Engine is to remove


async def sweep(admin: Admin, work_root: Path) -> list[str]:
    """Remove what dead exe-units left behind; returns a line for each thing removed.

    Mounts and files are looked for below `work_root`. Raises RuntimeFault, when all else is done, if the Engine does not
    answer or something cannot be removed.
    """
    removed: list[str] = []
    problems: list[str] = []
    # An Engine that waits for something in a container can remove it only when nothing runs there any more.
    await trio.to_thread.run_sync(_kill_containers, work_root.resolve(), removed)
    try:
        await _sweep_engine(admin, removed, problems)
    except RuntimeFault as fault:
        problems.append(str(fault))
    await trio.to_thread.run_sync(_sweep_storage, work_root.resolve(), removed, problems)
    for line in removed:
        log.info("%s", line)
    if problems:
        raise RuntimeFault("; ".join(removed + problems))
    return removed


async def _sweep_engine(admin: Admin, removed: list[str], problems: list[str]) -> None:
    for entry in await admin.containers(SUPERVISOR_LABEL):
        name = str((entry.get("Names") or [entry["Id"]])[0]).lstrip("/")
        if is_dead(entry["Labels"][SUPERVISOR_LABEL]):
            try:
                with trio.fail_after(ENGINE_S):
                    await admin.remove_container(entry["Id"])
                removed.append(f"removed container {name}")
            except (RuntimeFault, trio.TooSlowError) as fault:
                problems.append(f"container {name}: {str(fault) or 'no answer in time'}")
    for entry in await admin.volumes(SUPERVISOR_LABEL):
        name = str(entry["Name"])
        if is_dead((entry.get("Labels") or {}).get(SUPERVISOR_LABEL, "")):
            try:
                with trio.fail_after(ENGINE_S):
                    await admin.remove_volume(name)
                removed.append(f"removed volume {name}")
            except (RuntimeFault, trio.TooSlowError) as fault:
                problems.append(f"volume {name}: {str(fault) or 'no answer in time'}")


def _kill_containers(work_root: Path, removed: list[str]) -> None:
    """Kill the first process, and so all, of each container whose exe-unit is gone."""
    for folder in list(_dead_folders(work_root)):
        if kill_marked(_read(folder / PROCESS_FILE)):
            removed.append(f"killed the container of {folder}")


def _sweep_storage(work_root: Path, removed: list[str], problems: list[str]) -> None:
    for folder in list(_dead_folders(work_root)):
        try:
            removed += [f"unmounted {point}" for point in unmount_all(folder)]
            remove_folder(folder)
            removed.append(f"removed {folder}")
        except OSError as error:
            problems.append(f"{folder}: {error}")


def _dead_folders(work_root: Path) -> Iterator[Path]:
    """Yield the storage folders below `work_root` whose exe-unit is gone.

    What a guest wrote is never looked into, of whatever runtime: it could bear a mark, too, and become a link meanwhile.
    """
    waiting, seen = [(work_root, 0)], 0
    while waiting and seen < MAX_FOLDERS:
        folder, depth = waiting.pop()
        seen += 1
        if folder.name == FOLDER and depth:
            if is_dead(_read(folder / MARK_FILE)):
                yield folder
        elif depth < MAX_DEPTH:
            waiting += [(inner, depth + 1) for inner in _folders(folder)]


def _read(path: Path) -> str:
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
