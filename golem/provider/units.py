"""Exe-units as processes of this machine: how they are told, and found again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from golem.base.children import child_environment
from golem.exeunit.runtimes.plugin.descriptors import SEARCH
from golem.exeunit.supervisor import start_ticks

if TYPE_CHECKING:
    pass


def unit_environment(places: str | None = None) -> dict[str, str]:
    """Return the environment of exe-units: ours without anything secret. `places`: where descriptors are."""
    return child_environment() | ({} if places is None else {SEARCH: places})


def is_unit(pid: int, activity_id: str) -> bool:
    """Return whether a process is the exe-unit of an activity, by its command line.

    Others may call themselves so, guests in containers above all: it is of our user and in our pid namespace, too.
    """
    try:
        if os.stat(f"/proc/{pid}/ns/pid").st_ino != os.stat("/proc/self/ns/pid").st_ino:
            return False
        if os.stat(f"/proc/{pid}").st_uid != os.geteuid():
            return False
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"golem.exeunit" in words and activity_id.encode() in words


def runtime_of(pid: int) -> str | None:
    """Return the runtime that a process's command line names."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return words[words.index(b"--runtime") + 1].decode()
    except (OSError, ValueError, IndexError):
        return None


def find_unit(activity_id: str) -> int:
    """Return the process id of an activity's exe-unit; 0 if there is none."""
    pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    return next((pid for pid in pids if is_unit(pid, activity_id) and start_ticks(pid)), 0)
