"""Output of services that a command left in the background: nobody hears it any more, and they are to live on.

An Engine closes the pipes of a program that has ended, and whoever still writes to them is killed by SIGPIPE at its next
word: a server that logs to its standard output would die with the command that started it. So the ends to read from are
opened once more, by way of the writers themselves, and what comes is thrown away now and then; a service that writes more
than a pipe holds in the meantime waits.
Takes root's rights. Neighbours: `golem.exeunit.runtimes.vm.runtime`; `processes` says who was left.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

MAX_PIPES = 256
PIPE_BYTES = 1 << 20  # asked for; the kernel may give less
DRAIN_BYTES = 4 << 20  # of one pipe at a time
_STDOUT, _STDERR = 1, 2
_CHUNK_BYTES = 1 << 20


class LeftPipes:
    """Ends of pipes, held until `close`."""

    def __init__(self, init_pid: int) -> None:
        """`init_pid`: the container's first process; its parent, the Engine's shim, has the other ends of all pipes."""
        self._init_pid = init_pid
        self._held: dict[int, int] = {}  # inode: descriptor
        self._fresh: set[int] = set()  # inodes that somebody may still listen to

    def adopt(self, pids: Iterable[int], spared: Iterable[int]) -> int:
        """Hold what processes write to if it leads out of the container; returns how many pipes were added.

        `spared`: programs whose output somebody reads.
        """
        outside = _pipes(_parent(self._init_pid), None)
        taken = {inode for pid in spared for inode in _pipes(pid, (_STDOUT, _STDERR))}
        before = len(self._held)
        for pid in pids:
            for inode, path in _pipes(pid, (_STDOUT, _STDERR)).items():
                if inode in outside and inode not in taken and inode not in self._held and len(self._held) < MAX_PIPES:
                    with suppress(OSError):
                        self._hold(inode, path)
        return len(self._held) - before

    def _hold(self, inode: int, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        if os.fstat(descriptor).st_ino != inode:  # it has put another file there meanwhile
            os.close(descriptor)
            return
        self._held[inode] = descriptor
        self._fresh.add(inode)
        with suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def release(self) -> None:
        """Nobody listens any more to what was adopted."""
        self._fresh.clear()

    def drain(self) -> None:
        """Throw away what has come; let go of pipes that nobody writes to any more."""
        for inode, descriptor in list(self._held.items()):
            if inode in self._fresh:
                continue
            with suppress(BlockingIOError):
                for _ in range(DRAIN_BYTES // _CHUNK_BYTES):
                    if not os.read(descriptor, _CHUNK_BYTES):
                        os.close(self._held.pop(inode))
                        break

    def close(self) -> None:
        """Let go of everything; may be repeated."""
        while self._held:
            os.close(self._held.popitem()[1])


def _pipes(pid: int, numbers: tuple[int, ...] | None) -> dict[int, Path]:
    """Return the pipes among a process's open files (all, or those of these numbers), by inode."""
    found = {}
    with suppress(OSError):
        folder = Path(f"/proc/{pid}/fd")
        for name in os.listdir(folder) if numbers is None else map(str, numbers):
            with suppress(OSError, ValueError):
                kind, _, inode = os.readlink(folder / name).partition(":")
                if kind == "pipe":
                    found[int(inode.strip("[]"))] = folder / name
    return found


def _parent(pid: int) -> int:
    with suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return 0
