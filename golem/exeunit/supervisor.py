"""Who looks after a container, mount or process: the mark of an exe-unit's process, by which others see whether it still lives.

A mark is `pid:start ticks:pid namespace`. A pid alone would be taken over by the next process that gets the number, and
one of another namespace (a provider in a container, sharing an Engine) says nothing here.
Neighbours: labels of containers (`engine.container`), marks of folders (`engine.storage`), environments of processes
(`runtimes.process_tree`), and the sweeps that read them; the provider agent finds its exe-units by `start_ticks`.
"""

from __future__ import annotations

import os
import re
import signal
from contextlib import suppress
from pathlib import Path

HOLD = "hold"  # a file in the activity's folder: as long as it is there the exe-unit starts no new command
_MARK = re.compile(r"(\d{1,10}):(\d{1,20}):(\d{1,20})\s*\Z")


def own_mark() -> str:
    """Return the mark of this process."""
    return mark_of(os.getpid())


def mark_of(pid: int) -> str:
    """Return the mark of a process that is seen from here."""
    return f"{pid}:{start_ticks(pid)}:{_namespace()}"


def kill_marked(mark: str) -> bool:
    """Kill the process that bears a mark, and no other; return whether it was there."""
    match = _MARK.match(mark)
    if match is None or int(match[3]) != _namespace():
        return False
    with suppress(OSError):
        descriptor = os.pidfd_open(int(match[1]))
        try:  # the number is held now: if it is the right one, it stays so
            if start_ticks(int(match[1])) == int(match[2]) != 0:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                return True
        finally:
            os.close(descriptor)
    return False


def is_dead(mark: str) -> bool:
    """Return whether a process is certainly gone; False also where nothing can be said of it."""
    match = _MARK.match(mark)
    if match is None or int(match[3]) != _namespace():
        return False
    return start_ticks(int(match[1])) != int(match[2])


def start_ticks(pid: int) -> int:
    """Return when a process started (clock ticks since boot), 0 if it is gone or only waits to be reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def _namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino
