"""What a container uses, read from the kernel's own files: CPU time and peak memory of its control group, and what it
wrote over its image.

These figures are what is billed, whatever the runtime or the guest claims. Control groups of version 1 and 2 and both
side by side (hybrid) are read; a group is found by a process of the container, so it does not matter whether Docker,
podman or systemd named it. A group vanishes with its container: `read` answers with the last values then, so read
before the end. One read takes some 50 microseconds.
Neighbours: `golem.exeunit.runtimes.vm.runtime` reads once a second and before it removes a container; `golem.exeunit.usage`.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import trio

from golem.exeunit.runtime import RuntimeFault
from golem.exeunit.usage import measure_tree

MAX_LAYER_FILES = 200_000


class MeterError(Exception):
    """This machine does not say what a process's control group uses; the text says why."""


class Meter:
    """Usage of the control group that a process belongs to; no value ever goes down."""

    def __init__(self, pid: int, proc: Path = Path("/proc")) -> None:
        """`pid`: a live process of the container, as the machine numbers it. Raises MeterError."""
        self._cpu = group_file(pid, "cpuacct", ("cpuacct.usage",), ("cpu.stat",), proc)
        self._memory = group_file(pid, "memory", ("memory.max_usage_in_bytes",), ("memory.peak", "memory.current"), proc)
        # Of version 1, where the memory does not hold them, and a limit of their own holds back nobody who has many sockets.
        self._sockets = group_file(pid, "memory", ("memory.kmem.tcp.max_usage_in_bytes",), (), proc)
        if self._cpu is None or self._memory is None:
            raise MeterError(f"no figures for the control group of process {pid}")
        self._cpu_s, self._peak_bytes = 0.0, 0
        self.read()

    def read(self) -> tuple[float, int]:
        """Return CPU seconds and peak memory in bytes so far; the last values once the group is gone."""
        assert self._cpu is not None
        assert self._memory is not None
        try:
            self._cpu_s = max(self._cpu_s, _cpu_s(self._cpu))
            sockets_bytes = int(self._sockets.read_text()) if self._sockets is not None else 0
            self._peak_bytes = max(self._peak_bytes, int(self._memory.read_text()) + sockets_bytes)
        except (OSError, ValueError, IndexError):
            pass  # the group went away, or is about to
        return self._cpu_s, self._peak_bytes


class Layer:
    """What a container wrote over its image, where nothing but this measure limits that; made by `open_layer`."""

    def __init__(self, folder: Path, max_files: int = MAX_LAYER_FILES) -> None:
        """`folder`: where the layer is on this machine."""
        self._folder, self._max_files = folder, max_files
        self._image_bytes = self._image_files = 0
        self.used_bytes = 0
        self.complete = True  # False: more files than are ever counted

    async def take_as_image(self) -> None:
        """What is there now came with the image."""
        size = await trio.to_thread.run_sync(measure_tree, self._folder)
        self._image_bytes, self._image_files = size.size_bytes, size.entries

    async def measure(self) -> int:
        """Look again, with bounded work, and return the bytes; once the layer is gone the last figure stays."""
        if await trio.to_thread.run_sync(self._folder.is_dir):
            size = await trio.to_thread.run_sync(measure_tree, self._folder, self._image_files + self._max_files)
            self.used_bytes, self.complete = max(0, size.size_bytes - self._image_bytes), size.complete
        return self.used_bytes


class LayerByEngine(Layer):
    """A layer that is out of our reach (without root's rights): the Engine's own measure of it."""

    def __init__(self, ask: Callable[[], Awaitable[int]]) -> None:
        """`ask`: the bytes, or RuntimeFault."""
        super().__init__(Path("/"))
        self._ask = ask

    async def measure(self) -> int:
        """Ask again; when there is no answer the last figure stays."""
        with suppress(RuntimeFault):
            self.used_bytes = await self._ask()
        return self.used_bytes


async def open_layer(pid: int, told: Path | None, ask: Callable[[], Awaitable[int]]) -> Layer:
    """Find the layer of a running container that has done nothing yet.

    `pid`: a process in it; `told`: the layer's directory, if the Engine says it; `ask`: the Engine's measure of it.
    """
    upper = told or upper_dir_of(pid)
    if upper is not None and await trio.to_thread.run_sync(os.access, upper, os.R_OK | os.X_OK):
        return Layer(upper)
    folder = await trio.to_thread.run_sync(_whole_root, pid)  # drivers that copy the image: vfs, btrfs
    if folder is None:
        return LayerByEngine(ask)
    layer = Layer(folder)
    await layer.take_as_image()
    return layer


def _whole_root(pid: int) -> Path | None:
    """Return the directory of this machine that a process has as its root."""
    try:
        inside = Path(f"/proc/{pid}/root").stat()
        for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
            fields = line.split()
            if fields[4] == "/":
                for here in Path("/proc/self/mountinfo").read_text().splitlines():
                    own = here.split()
                    if own[2] == fields[2] and Path(fields[3]).is_relative_to(own[3]):
                        found = Path(own[4]) / Path(fields[3]).relative_to(own[3])
                        if found.is_dir() and found.stat().st_ino == inside.st_ino:
                            return found
    except OSError:
        pass
    return None


def upper_dir(inspected: dict[str, object]) -> Path | None:
    """Return where the Engine keeps a container's own layer, from its `inspect`; None where it does not tell."""
    driver = inspected.get("GraphDriver")
    data = driver.get("Data") if isinstance(driver, dict) else None
    path = data.get("UpperDir") if isinstance(data, dict) else None
    return Path(path) if isinstance(path, str) and path.startswith("/") else None


def upper_dir_of(pid: int, proc: Path = Path("/proc")) -> Path | None:
    """Return where the layer of a running container is, from a process in it: also where the Engine does not tell."""
    try:
        lines = (proc / str(pid) / "mountinfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        fields, _, tail = line.partition(" - ")
        if fields.split()[4] == "/" and tail.startswith("overlay "):
            for option in tail.split()[-1].split(","):
                if option.startswith("upperdir=/"):
                    return Path(option.removeprefix("upperdir="))
    return None


def _cpu_s(path: Path) -> float:
    if path.name == "cpuacct.usage":
        return int(path.read_text()) / 1e9
    fields = dict(line.split(maxsplit=1) for line in path.read_text().splitlines())
    return int(fields.get("usage_usec", "0")) / 1e6


def _groups(text: str) -> dict[str, str]:
    """Return the path of a process's group by controller, "" for version 2."""
    found = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            found[controller] = path
    return found


def _mounts(text: str) -> dict[str, tuple[Path, str]]:
    """Return where each controller's tree is mounted, and which part of the tree, "" for version 2."""
    found: dict[str, tuple[Path, str]] = {}
    for line in text.splitlines():
        fields, _, tail = line.partition(" - ")
        words, (kind, _, options) = fields.split(), tail.split(maxsplit=2)
        if kind == "cgroup2":
            found.setdefault("", (Path(words[4]), words[3]))
        elif kind == "cgroup":
            for option in options.split(","):
                found.setdefault(option, (Path(words[4]), words[3]))
    return found


def group_file(
    pid: int,
    controller: str,
    first_version: tuple[str, ...],
    second_version: tuple[str, ...],
    proc: Path = Path("/proc"),
) -> Path | None:
    """Return a file of the control group that a process is in: the first that is there, of the tree of its controller
    in version 1, else of the one tree of version 2. Raises MeterError if the process is gone.
    """
    try:
        groups = _groups((proc / str(pid) / "cgroup").read_text())
        mounts = _mounts((proc / "self" / "mountinfo").read_text())
    except OSError as error:
        raise MeterError(f"no control group of process {pid}: {error}") from None
    for name, files in ((controller, first_version), ("", second_version)):
        if name not in groups or name not in mounts:
            continue
        point, part = mounts[name]
        inside = groups[name].removeprefix(part.rstrip("/")).lstrip("/")
        for file in files:
            if (path := point / inside / file).is_file():
                return path
    return None
