"""Counters that an activity is billed by: `duration_sec`, `cpu_sec`, `gib`, `storage_gib`.

`Counters` is what the exe-unit reports from; the functions below it read /proc and directories, and runtimes use them.
Neighbours: `runtimes.base.Runtime.usage`; the exe-unit's reporting port.
"""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from golem.exeunit.runtime import Limits, Usage, Volume
from protocol.property_names import USAGE_CPU, USAGE_DURATION, USAGE_MEM, USAGE_STORAGE

COUNTERS = (USAGE_DURATION, USAGE_CPU, USAGE_MEM, USAGE_STORAGE)
MAX_DEPTH = 128
ENTRY_BYTES = 4096
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Counters:
    """Running values; none of them ever goes down."""

    def __init__(self, runtime_usage: Callable[[], Usage], now_s: float) -> None:
        """`now_s`: the monotonic clock when the activity started."""
        self._runtime_usage = runtime_usage
        self._started_s = now_s
        self._last = dict.fromkeys(COUNTERS, 0.0)

    def read(self, now_s: float) -> dict[str, float]:
        """Values by counter name at monotonic time `now_s`."""
        usage = self._runtime_usage()
        fresh = (now_s - self._started_s, usage.cpu_sec, usage.gib, usage.storage_gib)
        for name, value in zip(COUNTERS, fresh, strict=True):
            self._last[name] = max(self._last[name], value)
        return dict(self._last)

    def vector(self, names: Iterable[str], now_s: float) -> list[float]:
        """Values in the order of an offer's `golem.com.usage.vector`; a counter not known here stays 0."""
        values = self.read(now_s)
        return [values.get(name, 0.0) for name in names]


def process_cpu_s(pid: int) -> float:
    """User and system CPU seconds of a live process and all its threads; 0 once it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def process_peak_bytes(pid: int) -> int:
    """Peak resident memory (VmHWM) of a live process; 0 once it is gone."""
    try:
        return peak_from_status(Path(f"/proc/{pid}/status").read_bytes())
    except OSError:
        return 0


def peak_from_status(status: bytes) -> int:
    """VmHWM in bytes from the text of a /proc/<pid>/status file; 0 if it has none."""
    for line in status.splitlines():
        if line.startswith(b"VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


@dataclass(frozen=True)
class TreeSize:
    """Disk space and number of entries below a directory; `complete` is False if the walk had to give up."""

    size_bytes: int
    entries: int
    complete: bool = True


def measure_tree(root: Path, max_entries: int = 1_000_000, *, one_device: bool = False) -> TreeSize:
    """Walk a directory that a guest may be changing meanwhile: follows no symlink, never leaves it, is bounded.

    An entry costs its blocks, and at least `ENTRY_BYTES`: what a disk keeps of an empty one, for its name and itself.
    A tree deeper than MAX_DEPTH or with more than `max_entries` entries is reported as not complete. `one_device`: what is
    mounted below it does not count.
    """
    size = entries = 0
    device: int | None = None
    complete = True
    seen_links: set[int] = set()

    def walk(descriptor: int, depth: int) -> None:
        nonlocal size, entries, complete, device
        if one_device and device is None:
            device = os.fstat(descriptor).st_dev
        with os.scandir(descriptor) as listing:
            for entry in listing:
                entries += 1
                if entries > max_entries:
                    complete = False
                    return
                try:
                    found = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                if device is not None and found.st_dev != device:
                    continue
                if found.st_nlink > 1 and not entry.is_dir(follow_symlinks=False):
                    if found.st_ino in seen_links:
                        continue
                    seen_links.add(found.st_ino)
                size += max(found.st_blocks * 512, ENTRY_BYTES)
                if entry.is_dir(follow_symlinks=False):
                    descend(entry.name, descriptor, depth + 1)
                if not complete:
                    return

    def descend(name: str, parent: int | None, depth: int) -> None:
        nonlocal complete
        if depth > MAX_DEPTH:
            complete = False
            return
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        except OSError:
            return
        try:
            walk(descriptor, depth)
        finally:
            os.close(descriptor)

    descend(os.fspath(root), None, 0)
    return TreeSize(size, entries, complete)


def unlinked_bytes(pid: int, spared: Collection[int] = ()) -> int:
    """Return what a process holds open of files without a name, which no walk finds; `spared`: inodes that do not count."""
    found: dict[tuple[int, int], int] = {}
    with suppress(OSError):
        for name in os.listdir(folder := f"/proc/{pid}/fd"):
            with suppress(OSError):
                status = os.stat(f"{folder}/{name}")
                if stat.S_ISREG(status.st_mode) and not status.st_nlink and status.st_ino not in spared:
                    found[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(found.values())


def room_left(volumes: Iterable[Volume], limits: Limits) -> int:
    """Bytes that may still be brought into an activity's volumes; 0 also when there are too many files to count."""
    used, files = 0, 0
    for directory in {volume.host_dir for volume in volumes}:
        size = measure_tree(directory, limits.files)
        used, files = used + size.size_bytes, files + size.entries
        if not size.complete or files > limits.files:
            return 0
    return max(0, limits.storage_bytes - used)


def remove_tree(root: Path) -> None:
    """Remove a directory that a guest has filled, however deep.

    Subdirectories are first moved up beside each other, so neither path lengths nor recursion depth matter.
    Errors: OSError if something cannot be removed; a missing `root` is no error.
    """
    try:
        top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    prefix, serial = uuid.uuid4().hex, 0  # a name that the guest cannot have guessed
    try:
        waiting = _empty_directory(top, top, lambda: "")
        while waiting:
            name = waiting.pop()
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)

            def fresh() -> str:
                nonlocal serial
                serial += 1
                return f"{prefix}-{serial}"

            try:
                waiting += _empty_directory(inner, top, fresh)
            finally:
                os.close(inner)
            os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(root)


def _empty_directory(directory: int, top: int, fresh: Callable[[], str]) -> list[str]:
    """Unlink the files of a directory and move its subdirectories to `top`; returns their names there."""
    moved = []
    with os.scandir(directory) as listing:
        names = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in listing]
    for name, is_directory in names:
        if not is_directory:
            os.unlink(name, dir_fd=directory)
        elif directory == top:
            moved.append(name)
        else:
            target = fresh()
            os.rename(name, target, src_dir_fd=directory, dst_dir_fd=top)
            moved.append(target)
    return moved
