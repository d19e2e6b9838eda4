"""A running container as this machine sees it, without asking its Engine.

What needs root's rights is None for others: the processes that can be killed one by one, the network, the pipes.
Neighbours: `processes`, `network`, `left_pipes`; `golem.exeunit.runtimes.vm.runtime` opens it when a container has started.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from golem.exeunit.runtimes.vm.left_pipes import LeftPipes
from golem.exeunit.runtimes.vm.meter import group_file
from golem.exeunit.runtimes.vm.network import GuestNetwork
from golem.exeunit.runtimes.vm.processes import ContainerProcesses, Process

_PF_EXITING = 0x4  # of the flags in /proc/<pid>/stat


@dataclass
class Inside:
    """Held until `close`. `pid`: the container's first process, as the machine numbers it."""

    pid: int
    processes: ContainerProcesses | None
    network: GuestNetwork | None
    pipes: LeftPipes | None
    _pidfd: int
    _oom_file: Path | None  # where the kernel counts what it killed for want of memory
    _forks_file: Path | None  # and how often there were to be more processes than may be

    def running(self) -> frozenset[Process]:
        """Return the processes that run now; none where they are out of reach."""
        return self.processes.running() if self.processes is not None else frozenset()

    def is_ending(self) -> bool:
        """Whether the container is on its way out: the kernel ends all others before the first process is gone."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            return True
        return fields[0] in "ZX" or bool(int(fields[6]) & _PF_EXITING)

    def oom_kills(self) -> int:
        """Return how many of its processes the kernel has killed for want of memory."""
        return _count(self._oom_file, "oom_kill")

    def refused_forks(self) -> int:
        """Return how often a process was not made since there were as many as may be."""
        return _count(self._forks_file, "max")

    def kill(self) -> None:
        """Kill the first process, and so all of them, whatever its Engine does."""
        with suppress(OSError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Let go of what is held open; once."""
        os.close(self._pidfd)
        for held in (self.network, self.pipes):
            if held is not None:
                held.close()


def _count(file: Path | None, name: str) -> int:
    with suppress(OSError, ValueError):
        for line in file.read_text().splitlines() if file is not None else ():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0


def look_inside(pid: int) -> Inside:
    """Raises OSError or MeterError when the process is gone, or this machine is not the Engine's.

    Check after this that `pid` still is the container's.
    """
    pidfd = os.pidfd_open(pid)
    network: GuestNetwork | None = None
    try:
        oom = group_file(pid, "memory", ("memory.oom_control",), ("memory.events",))
        forks = group_file(pid, "pids", ("pids.events",), ("pids.events",))
        if os.geteuid() != 0:
            return Inside(pid, None, None, None, pidfd, oom, forks)
        network = GuestNetwork(pid)
        return Inside(pid, ContainerProcesses(pid), network, LeftPipes(pid), pidfd, oom, forks)
    except BaseException:
        os.close(pidfd)
        if network is not None:
            network.close()
        raise
