"""Clearing up after exe-units that died without doing it: containers, volumes of the Engine, and then their storage.

Everything an exe-unit makes outside its own memory bears its mark (`supervisor`): a label of the container, a file in
the storage folder. What bears the mark of a process that is gone is removed, in the order in which it holds on to each
other; what a living one uses is not touched, nor is anything without a mark. Where Engine and mounts of a machine serve
several nodes, each may sweep.
Neighbours: `golem.exeunit.runtimes.vm.runtime` calls this, `golem.exeunit.stranded` takes the storage down; the agent runs it
at its start and after an exe-unit that died.
"""

from __future__ import annotations

from pathlib import Path

import trio

from golem.exeunit.runtime import RuntimeFault
from golem.exeunit.runtimes.vm.admin import Admin
from golem.exeunit.storage import PROCESS_FILE
from golem.exeunit.stranded import dead_folders, read_mark, sweep_storage, told
from golem.exeunit.supervisor import is_dead, kill_marked

SUPERVISOR_LABEL = "golem.supervisor"
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
    await trio.to_thread.run_sync(sweep_storage, work_root.resolve(), removed, problems)
    return told(removed, problems)


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
    for folder in list(dead_folders(work_root)):
        if kill_marked(read_mark(folder / PROCESS_FILE)):
            removed.append(f"killed the container of {folder}")
