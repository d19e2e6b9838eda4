"""The processes of a container as the machine sees them, and how to end those of one command.

A command's programs may leave its session, fork twice, ignore signals or go on forking: what is certain is that they are
in the container's control group and were not there before. So a command ends by freezing the group, killing what came
since it began, and thawing. What belongs to others is spared: children of processes that were there before (a service
that an earlier command left in the background) and of programs that somebody has at his keyboard.
Neighbours: `golem.exeunit.runtimes.vm.runtime`; `meter` finds the group's files.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from golem.exeunit.runtimes.vm.meter import MeterError, group_file

ROUNDS = 50  # of killing, where the group cannot be frozen
FREEZE_S = 1.0
Process = tuple[int, int]  # process id, and when it started in clock ticks since boot: no two are ever equal


class ContainerProcesses:
    """What runs in one container."""

    def __init__(self, init_pid: int) -> None:
        """`init_pid`: its first process, as the machine numbers it. Raises MeterError."""
        self._init_pid = init_pid
        members = group_file(init_pid, "pids", ("cgroup.procs",), ("cgroup.procs",))
        if members is None:
            raise MeterError(f"no control group of process {init_pid}")
        self._members = members
        self._state = group_file(init_pid, "freezer", ("freezer.state",), ("cgroup.freeze",))

    def running(self) -> frozenset[Process]:
        """Return the processes that run now."""
        return frozenset((pid, ticks) for pid, (_, ticks) in self._read().items())

    def kill_since(self, before: Iterable[Process], spared: Iterable[int] = ()) -> int:
        """Kill what has come since `before` was `running`, with all its children; returns how many were killed.

        `spared`: process ids of programs that stay, with their children.
        """
        known, killed = frozenset(before), 0
        with self._frozen() as frozen:
            for _ in range(1 if frozen else ROUNDS):
                found = self._read()
                doomed = [pid for pid in found if not self._stays(pid, found, known, frozenset(spared))]
                for pid in doomed:
                    with suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL)
                        killed += 1
                if not doomed:
                    break
        return killed

    def kill_tree(self, pid: int) -> int:
        """Kill a program and its children, as far as they have not detached themselves; returns how many were killed."""
        killed = 0
        with self._frozen():
            found = self._read()
            for one in found:
                above = one
                while above in found and above not in (pid, self._init_pid):
                    above = found[above][0]
                if above == pid:
                    with suppress(ProcessLookupError, PermissionError):
                        os.kill(one, signal.SIGKILL)
                        killed += 1
        return killed

    def _stays(self, pid: int, found: dict[int, tuple[int, int]], known: frozenset[Process], spared: frozenset[int]) -> bool:
        """Judge a process by the first of its ancestors in the container that is known; orphans are the first's."""
        if pid == self._init_pid:
            return True
        while pid in found and pid != self._init_pid:
            parent, ticks = found[pid]
            if (pid, ticks) in known or pid in spared:
                return True
            pid = parent
        return False

    def _read(self) -> dict[int, tuple[int, int]]:
        """Return the parent and the start of each process."""
        found = {}
        with suppress(OSError):
            for word in self._members.read_text().split():
                with suppress(OSError, IndexError):
                    fields = Path(f"/proc/{word}/stat").read_text().rsplit(")", 1)[1].split()
                    if fields[0] not in "ZX":
                        found[int(word)] = int(fields[1]), int(fields[19])
        return found

    @contextmanager
    def _frozen(self) -> Iterator[bool]:
        """Hold all processes still, where that is possible; whether it is. They go on at the end of the block."""
        if self._state is None:
            yield False
            return
        halt, go_on = ("FROZEN", "THAWED") if self._state.name == "freezer.state" else ("1", "0")
        try:
            self._state.write_text(halt)
        except OSError:
            yield False
            return
        try:
            yield self._await_frozen()
        finally:
            with suppress(OSError):
                self._state.write_text(go_on)

    def _await_frozen(self) -> bool:
        assert self._state is not None
        second = self._state.name == "cgroup.freeze"
        deadline = time.monotonic() + FREEZE_S
        with suppress(OSError):
            while time.monotonic() < deadline:
                if second and "frozen 1" in self._state.with_name("cgroup.events").read_text():
                    return True
                if not second and self._state.read_text().strip() == "FROZEN":
                    return True
                time.sleep(0.001)
        return False
