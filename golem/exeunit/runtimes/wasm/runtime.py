"""The `wasmtime` runtime: WebAssembly commands with WASI preview 1, each in a locked-down process of its own.

An image is one module (any entry point name; the guest's `/` is a writable volume) or a WASI package (named entry
points and mount points). A module is compiled at start, those of a package when they are first used, in a child as locked
down as the one that runs them, because compiling foreign code can take any amount of time and memory; the CPU time is
charged, and machine code counts as the activity's storage. State between commands is in volumes only; where the exe-unit
is root they lie on a file system of the size that was sold, elsewhere a command that goes beyond it is killed.

Isolation of a child, outside in: own user, network and IPC namespaces and no capabilities (where the supervisor is
root), resource limits, Landlock to the volumes, a system-call allow-list, and WASI's own directory capabilities.
Neighbours: `wasm_child` (the inside), `wasm_package`, `wasm_cache`, `golem.exeunit.sandbox.process`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import trio

from golem.exeunit.runtime import (
    GIB,
    Deployment,
    DeployOptions,
    ExitStatus,
    ImageFormat,
    Interaction,
    Limits,
    OutputSink,
    RuntimeFault,
    Side,
    Terminal,
    Usage,
    Volume,
    check_arguments,
    environment_words,
)
from golem.exeunit.runtimes.wasm.cache import CompiledCache
from golem.exeunit.runtimes.wasm.child import CONFIG_TAG
from golem.exeunit.runtimes.wasm.package import Mount, WasmPackage, copy_module, read_package
from golem.exeunit.sandbox import seccomp
from golem.exeunit.sandbox.lockdown import landlock_abi
from golem.exeunit.sandbox.process import Child, ChildEnd, open_child
from golem.exeunit.storage import FOLDER, Storage, open_storage
from golem.exeunit.stranded import sweep_storage, told
from golem.exeunit.usage import unlinked_bytes
from protocol.property_names import RUNTIME_CAPABILITIES, RUNTIME_NAME, RUNTIME_VERSION

MAGIC = b"\0asm"
CORE_MODULE = MAGIC + b"\1\0\0\0"
# Users and groups that no distribution hands out; each activity gets one by the hash of its working directory.
FIRST_UID, UIDS = 1_879_048_192, 65_536
OVERHEAD_BYTES = 256 << 20  # of Python, wasmtime and its buffers, on top of the guest's own memory
KILLED = 137
_PACKAGE_ROOT = Path(__file__).resolve().parents[4]


@dataclass(frozen=True)
class WasmSettings:
    """What the provider, not the agreement, decides."""

    require_landlock: bool = True
    compile_time_s: float = 300.0
    compile_cpu_s: float = 300.0
    compile_mem_gib: float = 1.0  # at least; the activity's own limit if that is more
    max_module_bytes: int = 256 << 20
    max_compiled_bytes: int = 2 << 30
    cache_bytes: int = 4 << 30
    storage_check_s: float = 0.1  # where the kernel does not hold the limit


@dataclass(frozen=True)
class _Entry:
    module: str | None  # of the package, and its argv[0]; None: the name the requestor used


class WasmRuntime:
    """One activity's runtime; see `base.Runtime`."""

    name = "wasmtime"
    formats = frozenset({ImageFormat.WASM_MODULE, ImageFormat.WASI_PACKAGE})
    interactions: frozenset[Interaction] = frozenset()

    def __init__(self, cache_dir: Path, settings: WasmSettings | None = None) -> None:
        """`cache_dir`: for compiled modules, shared by activities; never let a guest write there."""
        self.version = importlib.metadata.version("wasmtime")
        self.isolation: dict[str, Any] = {}
        self._settings = settings or WasmSettings()
        self._cache = CompiledCache(cache_dir, f"{self.version}-{CONFIG_TAG}", self._settings.cache_bytes)
        self._image: Path | None = None
        self._package: WasmPackage | None = None
        self._options: DeployOptions | None = None
        self._volumes: tuple[Volume, ...] = ()
        self._entries: dict[str | None, _Entry] = {}  # None stands for any name (a bare module)
        self._code: dict[str | None, int] = {}  # descriptors of machine code by module; None: of a bare one
        self._storage: Storage | None = None
        self._children: dict[Child, trio.Event] = {}  # set when the child is gone
        self._ended_cpu_s, self._peak_bytes = 0.0, 0
        self._uid = FIRST_UID

    # -- what is offered ------------------------------------------------------------------------------------------

    async def self_test(self) -> str | None:
        """Start a child that tries to break out of its lock-down; None if every attempt failed as it should."""
        if not seccomp.supported():
            return "no system-call filter for this machine: the wasmtime runtime needs Linux on x86-64"
        if self._settings.require_landlock and not landlock_abi():
            return "this kernel has no Landlock (Linux 5.13 or newer with landlock in its lsm= list)"
        spec = self._spec("probe", Limits(), module=None, memory_bytes=64 << 20, file_bytes=0, cpu_s=10)
        try:
            ended = await self._finish(spec, (), _discard, max_output_bytes=1 << 16, time_limit_s=20)
        except OSError as error:
            return f"the sandbox cannot be started: {error}"
        status = _exit_status(ended, cpu_s=10)
        if not status.ok:
            return f"the sandbox does not work here: {status.reason or f'exit code {status.code}'}"
        return None

    def offer_properties(self) -> dict[str, Any]:
        return {
            RUNTIME_NAME: self.name,
            RUNTIME_VERSION: self.version,
            RUNTIME_CAPABILITIES: [],
        }

    # -- life of an activity --------------------------------------------------------------------------------------

    async def deploy(self, image: Path, options: DeployOptions) -> Deployment:
        if self._options is not None:
            raise RuntimeFault("already deployed")
        with image.open("rb") as file:
            head = file.read(8)
        mounts: tuple[Mount, ...] = (Mount("rw", "/"),)
        if head[:4] == MAGIC:
            if head != CORE_MODULE:
                raise RuntimeFault("WebAssembly components are not supported: build a core module for WASI preview 1")
        else:
            self._package = read_package(image)
            mounts = self._package.mounts
        taken = {mount.path for mount in mounts}
        mounts += tuple(Mount("rw", volume.path) for volume in options.volumes if volume.path not in taken)
        check_arguments(environment_words(options.env))
        if os.geteuid() == 0:
            digest = hashlib.sha3_256(os.fsencode(options.work_dir.resolve())).digest()
            self._uid = FIRST_UID + int.from_bytes(digest[:4], "big") % UIDS
        self._image, self._options = image, options
        storage = self._storage = await open_storage(options.work_dir / FOLDER, options.limits.storage_bytes, self._uid)
        self._volumes = tuple(
            Volume(mount.path, storage.directory(str(number)), read_only=mount.kind == "ro", private=mount.kind == "private")
            for number, mount in enumerate(mounts)
        )
        return Deployment(self._volumes, "empty")

    async def start(self, args: Sequence[str]) -> None:
        """Compile a bare module, or find it in the cache. `args` are for service runtimes and mean nothing here."""
        if self._options is None or self._image is None:
            raise RuntimeFault("not deployed")
        if self._entries:
            raise RuntimeFault("already started")
        if self._package is None:
            await self._code_of(None)
            self._entries = {None: _Entry(None)}
        else:
            self._entries = {entry: _Entry(module) for entry, module in self._package.entry_points.items()}

    async def _code_of(self, module: str | None) -> int:
        """Return a descriptor of a module's machine code, compiled now if this is its first use."""
        assert self._options is not None
        if module not in self._code:
            assert self._image is not None
            if module is None:
                with self._image.open("rb") as file:
                    self._keep_code(module, await self._compiled(file))
            else:
                with tempfile.TemporaryFile(dir=self._options.work_dir) as file:
                    copy_module(self._image, module, file, self._settings.max_module_bytes)
                    file.flush()
                    self._keep_code(module, await self._compiled(file))
        return self._code[module]

    def _keep_code(self, module: str | None, descriptor: int) -> None:
        """Hold machine code open; errors: RuntimeFault where all of it together is more than the activity's storage."""
        if self._options is None or self._storage is None:
            os.close(descriptor)
            raise RuntimeFault("the activity was stopped")
        size = max(os.fstat(descriptor).st_blocks * 512, 1)
        try:
            if self._storage.used_bytes() + size > self._options.limits.storage_bytes:
                raise OSError("full")
            self._storage.set_aside(f"code-{len(self._code)}", size)
        except OSError:
            os.close(descriptor)
            raise RuntimeFault(f"{_storage_text(self._options.limits)}: machine code is part of it") from None
        self._code[module] = descriptor

    def _close_entries(self) -> None:
        for descriptor in self._code.values():
            os.close(descriptor)
        self._entries, self._code = {}, {}

    async def _compiled(self, module: BinaryIO) -> int:
        """Descriptor of the machine code of an open module file."""
        assert self._options is not None
        size = module.seek(0, os.SEEK_END)
        module.seek(0)
        if size > self._settings.max_module_bytes:
            raise RuntimeFault(f"the module is too large: {size} bytes, at most {self._settings.max_module_bytes}")
        if module.read(8) != CORE_MODULE:
            raise RuntimeFault("an entry point is not a WebAssembly core module")
        key = self._cache.key(module)
        found = await trio.to_thread.run_sync(self._cache.open, key)
        if found is not None:
            return found
        with self._cache.new_file() as target:
            await self._compile(module, target)
            await trio.to_thread.run_sync(self._cache.keep, key, target)
            return os.open(target.name, os.O_RDONLY | os.O_CLOEXEC)

    async def _compile(self, module: BinaryIO, target: BinaryIO) -> None:
        assert self._options is not None
        assert self._storage is not None
        settings, limits = self._settings, self._options.limits
        memory = max(limits.mem_bytes, int(settings.compile_mem_gib * GIB))
        cpu_s = min(settings.compile_cpu_s, limits.cpu_time_s or math.inf)

        full: list[OSError] = []

        async def store(side: Side, chunk: bytes) -> None:
            if side == "stdout" and not full:
                try:
                    target.write(chunk)
                except OSError as error:
                    full.append(error)

        spec = self._spec("compile", limits, module.fileno(), memory, file_bytes=0, cpu_s=cpu_s)
        room = max(0, limits.storage_bytes - self._storage.used_bytes())
        ended = await self._finish(
            spec, (module.fileno(),), store, min(settings.max_compiled_bytes, room), settings.compile_time_s
        )
        status = _exit_status(ended, cpu_s)
        if not status.ok:
            raise RuntimeFault(f"compiling failed: {status.reason or f'exit code {status.code}'}")
        if full:
            raise full[0]

    async def run(
        self, entry_point: str, args: Sequence[str], output: OutputSink, env: Mapping[str, str] | None = None
    ) -> ExitStatus:
        """Errors: RuntimeFault if the command cannot be started at all; everything after that is an ExitStatus."""
        if not self._entries or self._options is None:
            raise RuntimeFault("not started")
        entry = self._entries.get(entry_point) or self._entries.get(None)
        if entry is None:
            known = ", ".join(sorted(str(name) for name in self._entries))
            raise RuntimeFault(f"entry point {entry_point!r} not found: this package has {known}")
        argv = [entry.module or entry_point, *args]
        environment = {**self._options.env, **(env or {})}
        check_arguments([*argv, *environment_words(environment)])
        limits = self._options.limits
        used_bytes = await self._measure_storage()
        if not self._entries:
            raise RuntimeFault("the activity was stopped")
        if used_bytes >= limits.storage_bytes:
            raise RuntimeFault(_storage_text(limits))
        code = await self._code_of(entry.module)
        if not self._entries:
            raise RuntimeFault("the activity was stopped")
        spec = self._spec("run", limits, code, limits.mem_bytes, limits.storage_bytes, limits.cpu_time_s)
        spec |= {
            "argv": argv,
            "env": environment,
            "preopens": [[str(item.host_dir), item.container_path, not item.read_only] for item in self._volumes],
        }
        ended = await self._finish(spec, (code,), output, limits.output_bytes, limits.run_time_s, True)
        return _exit_status(ended, limits.cpu_time_s)

    async def stop(self) -> None:
        for child in tuple(self._children):
            child.kill("the activity was stopped")
        self._close_entries()
        for gone in tuple(self._children.values()):
            await gone.wait()
        self._options = self._image = self._package = None
        self._volumes, storage, self._storage = (), self._storage, None
        if storage is not None:
            await storage.close()

    def usage(self) -> Usage:
        """Where the kernel does not limit storage it is counted at every command and while one runs (`usage.room_left`)."""
        alive = tuple(self._children)
        return Usage(
            cpu_sec=self._ended_cpu_s + sum(child.cpu_s() for child in alive),
            gib=max([self._peak_bytes, *(child.peak_bytes() for child in alive)]) / GIB,
            storage_gib=self._storage.used_bytes() / GIB if self._storage is not None else 0.0,
        )

    async def failure(self) -> str:
        """Nothing lives between commands, so nothing can die."""
        await trio.sleep_forever()
        raise AssertionError("unreachable")

    async def open_terminal(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None, tty: bool, rows: int, cols: int
    ) -> Terminal:
        raise RuntimeFault("the wasmtime runtime has no shell")

    async def connect(self, port: int) -> trio.abc.HalfCloseableStream:
        raise RuntimeFault("programs in the wasmtime runtime have no network")

    async def sweep(self, work_root: Path) -> list[str]:
        """Children die with their exe-unit; what they stored is in its working directory. Raises RuntimeFault."""
        removed: list[str] = []
        problems: list[str] = []
        await trio.to_thread.run_sync(sweep_storage, work_root.resolve(), removed, problems)
        return told(removed, problems)

    # -- children -------------------------------------------------------------------------------------------------

    def _spec(
        self, do: str, limits: Limits, module: int | None, memory_bytes: int, file_bytes: int, cpu_s: float | None
    ) -> dict[str, Any]:
        return {
            "do": do,
            "parent": os.getpid(),
            "uid": self._uid,
            "require_landlock": self._settings.require_landlock,
            "module": module,
            "preopens": [],
            "limits": {
                "cpu_s": None if cpu_s is None else max(1, math.ceil(cpu_s)),
                "data": memory_bytes + OVERHEAD_BYTES,
                "file": file_bytes,
                "memory": memory_bytes,
                "cpus": limits.cpu_threads,
            },
        }

    async def _finish(
        self,
        spec: dict[str, Any],
        files: Sequence[int],
        output: OutputSink,
        max_output_bytes: int,
        time_limit_s: float | None,
        watch_storage: bool = False,
    ) -> ChildEnd:
        """Run one child to its end and add what it used to the totals."""
        async with self._child(json.dumps(spec).encode(), files) as child, trio.open_nursery() as nursery:
            if watch_storage and self._storage is not None and not self._storage.limited:
                nursery.start_soon(self._watch_storage, child)
            ended = await child.wait(output, max_output_bytes=max_output_bytes, time_limit_s=time_limit_s)
            nursery.cancel_scope.cancel()
        if watch_storage:
            await self._measure_storage()
        report = _report(ended)
        self.isolation = report.get("isolation") or self.isolation
        return ended

    @asynccontextmanager
    async def _child(self, spec: bytes, files: Sequence[int]) -> AsyncIterator[Child]:
        child: Child | None = None
        try:
            async with open_child(_command_line, spec, files) as child:
                self._children[child] = trio.Event()
                yield child
        finally:
            if child is not None:
                self._children.pop(child).set()
                self._ended_cpu_s += child.cpu_s()
                self._peak_bytes = max(self._peak_bytes, child.peak_bytes())

    async def _watch_storage(self, child: Child) -> None:
        """Kill a command that fills its volumes; one file alone is stopped by its own size limit."""
        assert self._options is not None
        limits, took_s = self._options.limits, 0.0
        while True:
            # Looking takes long where there are many files: then look less often.
            await trio.sleep(max(self._settings.storage_check_s, 5 * took_s))
            began_s = trio.current_time()
            if await self._measure_storage(child.pid) > limits.storage_bytes:
                child.kill(_storage_text(limits))
            took_s = trio.current_time() - began_s

    async def _measure_storage(self, pid: int | None = None) -> int:
        """Return what is used, more than the whole if there are too many files to count.

        `pid`: a child that runs; what it has open and has removed already is still on the disk.
        """
        if self._options is None or self._storage is None:  # stopped meanwhile
            return 0
        storage, code = self._storage, [os.fstat(one).st_ino for one in self._code.values()]
        hidden = unlinked_bytes(pid, code) if pid is not None and not storage.limited else 0
        return hidden + await storage.measure(self._options.limits.files)


def _storage_text(limits: Limits) -> str:
    return f"storage limit of {limits.storage_gib:g} GiB and {limits.files} files reached"


async def _discard(side: Side, chunk: bytes) -> None:
    """Output nobody asked for."""


def _command_line(spec_fd: int, report_fd: int) -> list[str]:
    """Python without site, user or environment influence, that sees this package and wasmtime alone."""
    origin = importlib.util.find_spec("wasmtime")
    assert origin is not None
    assert origin.origin is not None
    paths = [str(_PACKAGE_ROOT), str(Path(origin.origin).parents[1])]
    boot = f"import sys; sys.path[:0] = {paths!r}\nfrom golem.exeunit.runtimes.wasm.child import main\nmain()"
    return [sys.executable, "-I", "-S", "-X", "utf8", "-c", boot, str(spec_fd), str(report_fd)]


def _report(ended: ChildEnd) -> dict[str, Any]:
    try:
        report = json.loads(ended.report.partition(b"\0")[0])
    except ValueError:
        return {}
    return report if isinstance(report, dict) else {}


def _exit_status(ended: ChildEnd, cpu_s: float | None) -> ExitStatus:
    """What the requestor is told; a child that was killed has no report."""
    if ended.killed_for is not None:
        return ExitStatus(KILLED, ended.killed_for)
    if ended.signal is None:
        report = _report(ended)
        reason = report.get("reason")
        if not report:
            reason = "the runtime ended without a report"
        return ExitStatus(int(report.get("code", ended.code or 1)), reason)
    code = 128 + ended.signal
    if ended.signal == signal.SIGXCPU:
        return ExitStatus(code, f"CPU time limit of {cpu_s or 0:g} s reached")
    if ended.signal == signal.SIGABRT:
        return ExitStatus(code, "the runtime aborted, most likely out of memory")
    if ended.signal == signal.SIGKILL:
        return ExitStatus(code, "killed by the system, most likely out of memory")
    return ExitStatus(code, f"the runtime was ended by {ended.signal.name}")
