"""A runtime that is a program of its own, named by a descriptor (`golem.exeunit.runtimes.plugin.descriptors`).

The program is started for each step, with arguments in this order:

    --workdir W --task-package F [--cpu-cores N --mem-gib X --storage-gib Y] <its own arguments>
        [--volume-override JSON] [--hostname H] COMMAND

    offer-template      JSON on stdout: {"properties": {...}, "constraints": ""} (without --workdir and the rest)
    test                status 0 if it works on this machine (likewise)
    deploy --           JSON on stdout: {"valid": {"Ok": ""}, "vols": [{"name": <directory in W>, "path": <guest path>}],
                        "startMode": "empty" or "blocking"}; `valid` may be {"Err": why}
    start -- ARGS       "empty": once, status 0; "blocking": a service that speaks `api` on stdin and stdout
    run --entrypoint BIN -- ARGS      ("empty") one command: its output and status are the program's

Limits are on the command line only with the descriptor's `--cap-handoff`; they hold in any case: what the program and all
it started use is metered by the exe-unit from the kernel's figures, whatever the program says of itself, and the activity
ends when it is too much. `F` is an empty file where the agreement names no task package. The environment is a plain one;
variables that the requestor sets are not put into it (the loader of the program would heed them) but stand in
GOLEM_RUNTIME_ENV as a JSON object, for programs that know it.
Variables of one command do not reach a service: its protocol has no place for them.
Neighbours: `process_tree` (starting, metering, killing), `service` and `api` (what "blocking" speaks).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

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
    VolumeRequest,
    check_arguments,
    environment_words,
    guest_path,
)
from golem.exeunit.runtimes.plugin.descriptors import Descriptor, is_property_value
from golem.exeunit.runtimes.plugin.process_tree import ProgramEnd, RunningProgram, Tree, sweep_processes
from golem.exeunit.runtimes.plugin.service import RuntimeService
from golem.exeunit.usage import COUNTERS, measure_tree, remove_tree
from protocol.property_names import MULTI_ACTIVITY, RUNTIME_CAPABILITIES, RUNTIME_NAME, RUNTIME_VERSION, VECTOR

ENVIRONMENT = "GOLEM_RUNTIME_ENV"
MAX_ANSWER_BYTES = 64 * 1024
MAX_ERROR_BYTES = 2000
MAX_REASON = 300
MAX_VOLUMES = 64
WATCH_S = 0.5
LAST_WORDS_S = 1.0  # for what a program that has ended said on stderr; what it left running may hold that open
# Properties that a program may add to an offer; prices, addresses and the like are not its business.
_OFFERED = ("golem.runtime.", "golem.inf.", "golem.srv.caps.", "golem.activity.caps.", "golem.!exp.")
_FIXED = (RUNTIME_NAME, RUNTIME_VERSION, MULTI_ACTIVITY)


@dataclass(frozen=True)
class ExternalSettings:
    """What the provider, not the agreement, decides. Times in seconds."""

    test_s: float = 10.0
    deploy_s: float = 600.0
    start_s: float = 600.0


class ExternalRuntime:
    """One activity's runtime; see `base.Runtime`."""

    formats = frozenset(ImageFormat)  # what a task package has to be is the program's business
    interactions: frozenset[Interaction] = frozenset()

    def __init__(self, descriptor: Descriptor, settings: ExternalSettings | None = None) -> None:
        """Errors: DescriptorError where the descriptor's program cannot be run."""
        self.name, self.version = descriptor.name, descriptor.version
        self._descriptor, self._settings = descriptor, settings or ExternalSettings()
        self._program, self._handoff, self._arguments = descriptor.command()
        self._tree = Tree()
        self._options: DeployOptions | None = None
        self._image = Path(os.devnull)
        self._deployed = self._started = self._blocking = False
        self._service: RuntimeService | None = None
        self._service_command: RunningProgram | None = None
        self._storage_bytes = 0

    # -- what is offered
    async def self_test(self) -> str | None:
        try:
            await trio.to_thread.run_sync(self._ask, "test")
            await trio.to_thread.run_sync(self._template)
        except RuntimeFault as fault:
            return str(fault)
        return None

    def offer_properties(self) -> dict[str, Any]:
        """Errors: RuntimeFault where the program's template cannot be used."""
        return {
            RUNTIME_CAPABILITIES: [],
            **self._template(),
            **self._descriptor.properties,
            RUNTIME_NAME: self.name,
            RUNTIME_VERSION: self.version,
            VECTOR: [counter for counter in COUNTERS if counter in self._descriptor.priced],
        }

    def _template(self) -> dict[str, Any]:
        """Return the properties of the program's own template."""
        try:
            found = json.loads(self._ask("offer-template"))
            properties, constraints = found["properties"], found.get("constraints", "")
            pairs = [(str(name), value) for name, value in properties.items()]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RuntimeFault(f"its offer template is not in order: {error!r}"[:300]) from None
        if constraints not in ("", "()", "(&)"):
            raise RuntimeFault("its offer template has constraints; this provider makes its own alone")
        for name, value in pairs:
            if not name.startswith(_OFFERED) or name in _FIXED or not is_property_value(value):
                raise RuntimeFault(f"its offer template sets {name[:100]}, which is not for a runtime to set, or not to this")
        return dict(pairs)

    def _ask(self, question: str) -> bytes:
        """Run a short command of the program, blocking, with a home of its own; return what it says."""
        with tempfile.TemporaryDirectory(prefix="golem-ask-", ignore_cleanup_errors=True) as scratch:
            return self._said(question, Path(scratch))

    def _said(self, question: str, scratch: Path) -> bytes:
        argv = [str(self._program), *self._arguments, question]
        try:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environment(scratch),
                cwd="/", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise RuntimeFault(f"{self._program} cannot be started: {error.strerror}") from None
        assert process.stdout is not None
        assert process.stderr is not None
        late = threading.Event()
        complaint = bytearray()
        listener = threading.Thread(target=_keep_tail, args=(process.stderr, complaint), daemon=True)
        listener.start()

        def kill() -> None:
            late.set()
            _kill_group(process.pid)

        alarm = threading.Timer(self._settings.test_s, kill)
        alarm.start()
        try:
            said = process.stdout.read(MAX_ANSWER_BYTES + 1)
            if len(said) > MAX_ANSWER_BYTES:
                raise RuntimeFault(f"`{question}` said more than {MAX_ANSWER_BYTES} bytes")
            status = process.wait()
        finally:
            alarm.cancel()
            _kill_group(process.pid)
            process.wait()
            process.stdout.close()
        if late.is_set():
            raise RuntimeFault(f"no answer to `{question}` within {self._settings.test_s:g} s")
        if status:
            listener.join(LAST_WORDS_S)
            raise RuntimeFault(f"`{question}` ended with status {status}{_last_line(complaint)}")
        return said

    # -- life of an activity
    async def deploy(self, image: Path, options: DeployOptions) -> Deployment:
        if self._options is not None:
            raise RuntimeFault("already deployed")
        self._options, self._image = options, image
        self._work_dir.mkdir(mode=0o700)
        self._scratch.mkdir(mode=0o700)
        words = []
        if options.volumes:
            words += ["--volume-override", json.dumps(dict(_override(one) for one in options.volumes))]
        if options.hostname is not None:
            words += ["--hostname", options.hostname]
        said = await self._step("deploy", [*words, "deploy", "--"], self._settings.deploy_s)
        deployment = self._deployment(said)
        self._deployed = True
        return deployment

    @property
    def _work_dir(self) -> Path:
        assert self._options is not None
        return self._options.work_dir / "runtime"

    @property
    def _scratch(self) -> Path:
        assert self._options is not None
        return self._options.work_dir / "tmp"

    def _deployment(self, said: bytes) -> Deployment:
        """Read and check a DeployResult: after whatever the program logged before it; nothing at all is a success."""
        if not said.strip():
            return Deployment((), "empty")
        try:
            result = json.loads(said[max(0, said.find(b"{")) :])
            valid, volumes = result["valid"], result.get("vols", [])
            mode = result.get("startMode", "empty")
            if "Ok" not in valid:
                raise RuntimeFault(f"the runtime refused: {str(valid['Err'])[:MAX_ERROR_BYTES]}")
            if not isinstance(volumes, list) or len(volumes) > MAX_VOLUMES:
                raise ValueError(f"vols: expected a list of at most {MAX_VOLUMES}")
            found = tuple(self._volume(one) for one in volumes)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RuntimeFault(f"the runtime's answer to deploy is not in order: {error!r}"[:300]) from None
        if mode not in ("empty", "blocking"):
            raise RuntimeFault(f"the runtime wants start mode {str(mode)[:50]!r}, which this supervisor does not have")
        if len({one.container_path for one in found}) < len(found):
            raise RuntimeFault("the runtime's answer to deploy is not in order: two volumes of one path")
        self._blocking = mode == "blocking"
        return Deployment(found, "blocking" if self._blocking else "empty")

    def _volume(self, raw: Mapping[str, Any]) -> Volume:
        """Read one of `vols`: a real directory below the runtime's own working directory."""
        name = raw["name"]
        root = self._work_dir.resolve()
        folder = (root / name).resolve()
        if not isinstance(name, str) or not folder.is_relative_to(root) or folder == root or not folder.is_dir():
            raise ValueError(f"vols: {name!r} is no directory in the working directory")
        return Volume(guest_path(raw["path"]), folder)

    async def start(self, args: Sequence[str]) -> None:
        if not self._deployed:
            raise RuntimeFault("not deployed")
        if self._started:
            raise RuntimeFault("already started")
        check_arguments(args)
        if self._blocking:
            await self._start_service(["start", "--", *args])
        else:
            await self._step("start", ["start", "--", *args], self._settings.start_s)
        self._started = True

    async def _start_service(self, words: Sequence[str]) -> None:
        self._service_command = self._launch(words, {}, stdin=True)
        service = RuntimeService(self._service_command)
        try:
            await service.begin(self._settings.start_s)
        except BaseException:  # also when cancelled: half started is not started
            await self._service_command.close()
            self._service_command = None
            raise
        self._service = service

    async def run(
        self, entry_point: str, args: Sequence[str], output: OutputSink, env: Mapping[str, str] | None = None
    ) -> ExitStatus:
        """Errors: RuntimeFault if the command cannot be started at all; everything after that is an ExitStatus."""
        if not self._started or self._options is None:
            raise RuntimeFault("not started")
        check_arguments([entry_point, *args])
        limits = self._options.limits
        await self._measure()
        if self._storage_bytes >= limits.storage_bytes:
            raise RuntimeFault(f"storage limit of {limits.storage_gib:g} GiB and {limits.files} files reached")
        if self._service is not None:
            found = await self._service.run(
                entry_point, args, output, max_output_bytes=limits.output_bytes, time_limit_s=limits.run_time_s
            )
            await self._measure()
            return found
        words = ["run", "--entrypoint", entry_point, "--", *args]
        ended = await self._call(words, output, limits.output_bytes, limits.run_time_s, env or {})
        await self._measure()
        return exit_status(ended)

    async def stop(self) -> None:
        with trio.CancelScope(shield=True):
            service, self._service = self._service, None
            if service is not None:
                await service.end()
            await self._tree.kill_all()
            command, self._service_command = self._service_command, None
            if command is not None:
                await command.close()
            options, self._options = self._options, None
            self._deployed = self._started = self._blocking = False
            self._image, self._storage_bytes = Path(os.devnull), 0
            if options is not None:
                await trio.to_thread.run_sync(remove_tree, options.work_dir / "runtime")
                await trio.to_thread.run_sync(remove_tree, options.work_dir / "tmp")

    def usage(self) -> Usage:
        """From the kernel's figures; storage as last measured, by `failure` at the latest."""
        cpu_s, peak_bytes = self._tree.usage()
        return Usage(cpu_s, peak_bytes / GIB, self._storage_bytes / GIB)

    async def failure(self) -> str:
        """A service that ends by itself. Meters what runs in the background meanwhile."""
        pause_s = WATCH_S
        while True:
            await trio.sleep(pause_s)
            if self._service is not None and self._service.lost.is_set():
                return self._service.why_lost
            self._tree.usage()
            began_s = trio.current_time()
            await self._measure()
            pause_s = max(WATCH_S, 5 * (trio.current_time() - began_s))

    async def open_terminal(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None, tty: bool, rows: int, cols: int
    ) -> Terminal:
        raise RuntimeFault(f"the {self.name} runtime has no shell")

    async def connect(self, port: int) -> trio.abc.HalfCloseableStream:
        raise RuntimeFault(f"the {self.name} runtime passes no connections on")

    async def sweep(self, work_root: Path) -> list[str]:
        return await trio.to_thread.run_sync(sweep_processes, work_root)

    # -- the program
    async def _step(self, name: str, words: Sequence[str], time_limit_s: float) -> bytes:
        """Run the program once; return what it says on stdout. Errors: RuntimeFault unless it ends with status 0."""
        said: dict[Side, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}

        async def keep(side: Side, chunk: bytes) -> None:
            said[side] += chunk

        ended = await self._call(words, keep, MAX_ANSWER_BYTES, time_limit_s, {})
        status = exit_status(ended)
        if not status.ok:
            why = status.reason or f"exit code {status.code}"
            text = bytes(said["stderr"][-MAX_ERROR_BYTES:]).decode("utf-8", "replace").strip()
            raise RuntimeFault(f"{name} failed: {why}" + (f": {text}" if text else ""))
        return bytes(said["stdout"])

    async def _call(
        self, words: Sequence[str], output: OutputSink, max_output_bytes: int, time_limit_s: float | None, env: Mapping[str, str]
    ) -> ProgramEnd:
        command = self._launch(words, env)
        try:
            return await command.wait(output, max_output_bytes=max_output_bytes, time_limit_s=time_limit_s)
        finally:
            await command.close()

    def _launch(self, words: Sequence[str], env: Mapping[str, str], *, stdin: bool = False) -> RunningProgram:
        options = self._options
        assert options is not None
        variables = {**options.env, **env}
        check_arguments([*words, *environment_words(variables)])
        argv = [str(self._program), "--workdir", str(self._work_dir), "--task-package", str(self._image)]
        argv += [*self._limits(options.limits), *self._arguments, *words]
        environment = _environment(self._scratch) | {ENVIRONMENT: json.dumps(variables)}
        return self._tree.start(argv, env=environment, cwd=self._work_dir, cpus=options.limits.cpu_threads, stdin=stdin)

    def _limits(self, limits: Limits) -> list[str]:
        if not self._handoff:
            return []
        found = (("--cpu-cores", limits.cpu_threads), ("--mem-gib", limits.mem_gib), ("--storage-gib", limits.storage_gib))
        return [word for flag, value in found for word in (flag, f"{value:g}")]

    async def _measure(self) -> None:
        """Update the storage counter; where there are too many files to count, all of the storage counts as used."""
        options = self._options
        if options is not None:
            size = await trio.to_thread.run_sync(measure_tree, options.work_dir, options.limits.files)
            full = options.limits.storage_bytes + 1
            self._storage_bytes = size.size_bytes if size.complete else max(size.size_bytes, full)


def exit_status(ended: ProgramEnd) -> ExitStatus:
    """What the requestor is told of a program's end."""
    if ended.killed_for is not None:
        return ExitStatus(137, ended.killed_for)
    if ended.signal is not None:
        return ExitStatus(128 + ended.signal, f"the runtime was ended by {ended.signal.name}")
    return ExitStatus(ended.code or 0)


def _environment(scratch: Path) -> dict[str, str]:
    """What every program is given: nothing of the provider's own environment but where programs are."""
    path = os.environ.get("PATH", "/usr/local/bin:/usr/bin:/bin")
    return {"PATH": path, "HOME": str(scratch), "TMPDIR": str(scratch), "LANG": "C.UTF-8"}


def _override(one: VolumeRequest) -> tuple[str, Any]:
    size = {} if one.size_bytes is None else {"size": one.size_bytes}
    return one.path, {one.kind: size}


def _keep_tail(stream: IO[bytes], tail: bytearray) -> None:
    """Read a stream to its end, so that its writer never waits, and keep the last of it."""
    with stream:
        while chunk := os.read(stream.fileno(), 1 << 16):
            tail += chunk
            del tail[:-MAX_ERROR_BYTES]


def _last_line(said: bytearray) -> str:
    """What a program gave as its reason, as the end of a sentence of ours; a stranger's text commands no terminal."""
    lines = bytes(said).decode("utf-8", "replace").split("\n")
    text = "".join(char if char.isprintable() else " " for char in next(filter(str.strip, reversed(lines)), ""))
    return f": {text.strip()[:MAX_REASON]}" if text.strip() else ""


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
