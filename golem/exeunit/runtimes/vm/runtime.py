"""The `vm` runtime: an image as it is, in one locked-down container of a Docker Engine for the length of an activity.

Nothing of the image starts by itself: process 1 is a program of our own that sleeps, and every command runs in the
container as the image's user, in its directory, with its environment. An empty entry point stands for the image's
ENTRYPOINT (and CMD); arguments of `start` start it in the background. What a command leaves in the background lives
until the activity ends. Volumes, the image's own and those asked for, are directories of this machine; as with Docker, a
new volume begins with what the image has at its path.

The Engine's socket is as good as root: it is reached from exe-unit processes and command-line tools alone. `DOCKER_HOST`
says where it is. Where the exe-unit is not root, a command that has to be stopped takes its container with it, and
nothing can be connected to.
Neighbours: everything in `golem.exeunit.runtimes.vm`.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio

from golem.exeunit.runtime import (
    Deployment,
    DeployOptions,
    ExitStatus,
    ImageFormat,
    Interaction,
    Limits,
    OutputSink,
    RuntimeFault,
    Terminal,
    Usage,
    Volume,
    VolumeRequest,
    check_arguments,
    environment_words,
)
from golem.exeunit.runtimes.vm import accounts, kernel_tables
from golem.exeunit.runtimes.vm.admin import Admin, EngineFacts, EngineGone, InUse, NoSuch, socket_path
from golem.exeunit.runtimes.vm.asked import command_of, path_of, tcp_ports, volume_requests
from golem.exeunit.runtimes.vm.client import EngineClient
from golem.exeunit.runtimes.vm.container import (
    ARGUMENTS,
    PROCESSES,
    Plan,
    clear_away,
    container_config,
    host_name,
    labels,
    lay_out,
    name_files,
)
from golem.exeunit.runtimes.vm.images import FORMATS, EngineImage, digest_of, obtain_image
from golem.exeunit.runtimes.vm.inside import Inside, look_inside
from golem.exeunit.runtimes.vm.leftovers import sweep
from golem.exeunit.runtimes.vm.long_arguments import DEFAULT_PATH, MOST_BY_EXEC, check_command, is_long, write_arguments
from golem.exeunit.runtimes.vm.meter import Meter, MeterError, open_layer, upper_dir
from golem.exeunit.runtimes.vm.processes import ContainerProcesses
from golem.exeunit.runtimes.vm.program import START_TIMEOUT_S, EngineTerminal, NeverBegun, Program
from golem.exeunit.runtimes.vm.tally import Tally
from golem.exeunit.runtimes.vm.watch import Watch
from golem.exeunit.storage import FOLDER, Storage, open_storage
from protocol.property_names import RUNTIME_CAPABILITIES, RUNTIME_NAME, RUNTIME_VERSION

log = logging.getLogger("golem.exeunit")

KILLED = 137
MAX_TERMINALS = 64
IMAGE_CACHE_BYTES = 20 << 30
CHECK_S = 0.5  # how often a command's own limits are looked at
SAMPLE_S = 1.0
KILL_TIMEOUT_S = 3.0
NEVER_STARTED_S = 0.5  # a program that was asked for and has not begun by then never will
MEASURE_TIMEOUT_S = 0.5
REMOVE_TIMEOUT_S = 2.0  # with what comes before and after, less than what the agent grants an exe-unit
SHELL = ("/bin/sh",)
_serials = itertools.count(1)


@dataclass
class _Deployed:
    """What `deploy` made, in the order in which it is taken down from the end."""

    options: DeployOptions
    facts: EngineFacts
    image: EngineImage | None = None
    storage: Storage | None = None
    volume_names: tuple[str, ...] = ()
    own_files: dict[str, Path] = field(default_factory=dict)  # by path inside
    name: str | None = None  # of the container
    watch: Watch | None = None
    search: str = DEFAULT_PATH  # where programs are looked for, unless a command says otherwise


class VmRuntime:
    """One activity's runtime; see `base.Runtime`."""

    name = "vm"
    version = "1.0.0"
    formats: frozenset[ImageFormat] = FORMATS

    def __init__(self, cache_dir: Path, host: str | None = None) -> None:
        """`cache_dir`: shared by activities. `host`: the Engine, else as `DOCKER_HOST` says. Raises ValueError."""
        self._cache_dir = cache_dir
        path = socket_path(host)
        self._admin, self._client = Admin(path), EngineClient(path)
        words: tuple[Interaction, ...] = ("shell", "proxy-http") if os.geteuid() == 0 else ("shell",)
        self.interactions: frozenset[Interaction] = frozenset(words)
        self._deployed: _Deployed | None = None
        self._inside: Inside | None = None  # once started
        self._tally = Tally()
        self._terminals: set[EngineTerminal] = set()

    # -- what is offered ------------------------------------------------------------------------------------------

    async def self_test(self) -> str | None:
        """Find out who the Engine is and make a container that tries what must not work; None if all is well."""
        from golem.exeunit.runtimes.vm.self_test import self_test

        return await self_test(self._admin, self._client)

    def offer_properties(self) -> dict[str, Any]:
        return {
            RUNTIME_NAME: self.name,
            RUNTIME_VERSION: self.version,
            RUNTIME_CAPABILITIES: [],  # the exe-unit adds the interactions that the provider allows
        }

    # -- life of an activity --------------------------------------------------------------------------------------

    async def deploy(self, image: Path, options: DeployOptions) -> Deployment:
        if self._deployed is not None:
            raise RuntimeFault("already deployed")
        check_arguments(environment_words(options.env))
        deployed = self._deployed = _Deployed(options, await self._admin.facts())
        self._client.api = self._admin.api or self._client.api
        try:
            deployed.image = await self._obtain(image, options)
            self._tally.spend(deployed.image.unpack_cpu_s)
            deployed.storage = await open_storage(
                options.work_dir / FOLDER,
                options.limits.storage_bytes,
                deployed.facts.root_id,
                ram_bytes=options.limits.mem_bytes,
            )
            requests = volume_requests(deployed.image, options.volumes)
            name = host_name(options.hostname, options.activity_id)
            deployed.own_files = {
                path: deployed.storage.file(path.rpartition("/")[2], content)
                for path, content in name_files(name, options.hosts).items()
            }
            volumes = [
                await self._make_volume(deployed, deployed.storage, number, request) for number, request in enumerate(requests)
            ]
            await self._create(deployed, deployed.image, volumes)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.stop()
            raise
        return Deployment(tuple(volumes), "blocking", tcp_ports(deployed.image))

    async def _obtain(self, image: Path, options: DeployOptions) -> EngineImage:
        from golem.exeunit.transfer.packages import detect_format

        digest = await trio.to_thread.run_sync(digest_of, image)
        found = await trio.to_thread.run_sync(detect_format, image)
        if found not in self.formats:
            raise RuntimeFault(f"the task package is {found.value if found else 'of an unknown format'}: no image")
        assert found is not None
        folder = self._cache_dir / "engine"
        return await obtain_image(
            self._admin, image, digest, found, folder=folder, notice=options.notice, max_bytes=IMAGE_CACHE_BYTES,
            spent=self._tally.spend,
        )  # fmt: skip

    async def _make_volume(self, deployed: _Deployed, storage: Storage, number: int, request: VolumeRequest) -> Volume:
        """Make a directory, and a volume of the Engine that is it (so the Engine fills it from the image)."""
        size = request.size_bytes
        if request.kind == "ram":
            directory = await storage.ram(str(number), size or storage.ram_left_bytes // 2)
        elif request.kind == "storage" and size is not None:
            directory = await storage.sized(str(number), size)
        else:
            directory = storage.directory(str(number))
        name = f"golem-{deployed.options.activity_id or 'none'}-{os.getpid()}-{next(_serials)}"
        deployed.volume_names += (name,)
        where = {"type": "none", "o": "bind", "device": str(directory.resolve())}
        await self._admin.create_volume(name, where, labels(deployed.options.activity_id))
        return Volume(request.path, directory)

    async def _create(self, deployed: _Deployed, image: EngineImage, volumes: Sequence[Volume]) -> None:
        options = deployed.options
        lay_out(options.work_dir, deployed.facts)
        plan = Plan(
            image=image.id,
            activity_id=options.activity_id,
            folder=options.work_dir.resolve(),
            limits=options.limits,
            env=environment_words(options.env),
            hostname=options.hostname,
            hosts=options.hosts,
            mounts=dict(zip((one.container_path for one in volumes), deployed.volume_names, strict=True)),
            own_files=deployed.own_files,
        )
        config = container_config(plan, deployed.facts)
        deployed.name = f"golem-{options.activity_id or 'none'}-{os.getpid()}-{next(_serials)}"
        deployed.watch = Watch(self._client, deployed.name, options.limits)
        await self._admin.create_container(deployed.name, config)
        upper = upper_dir(await self._client.inspect(deployed.name))
        if deployed.storage is not None and upper is not None:
            await deployed.storage.hold_layer(upper)

    async def start(self, args: Sequence[str]) -> None:
        """`args` start the image's ENTRYPOINT with them in the background; without, nothing of the image starts."""
        deployed = self._deployed
        if deployed is None or deployed.name is None or deployed.image is None:
            raise RuntimeFault("not deployed")
        if self._inside is not None:
            raise RuntimeFault("already started")
        command = [*deployed.image.entrypoint, *args]
        if args:
            check_command(command, {})
        await self._admin.start_container(deployed.name)
        try:
            inspected = await self._client.inspect(deployed.name)
            deployed.search = path_of(inspected) or DEFAULT_PATH
            pid = int(inspected["State"]["Pid"])
            self._inside = look_inside(pid)
            if int((await self._client.inspect(deployed.name))["State"]["Pid"]) != pid or not pid:
                raise RuntimeFault("the container ended at once")
            self._tally.meter = Meter(pid)
            if deployed.storage is not None:
                deployed.storage.note_process(pid)
            await kernel_tables.bound(pid, deployed.facts.root_id, deployed.options.limits.mem_bytes)
        except (OSError, MeterError) as error:
            raise RuntimeFault(f"the container cannot be measured and bounded: {error}") from None
        if deployed.image.user:
            await trio.to_thread.run_sync(_secure_accounts, pid, deployed)
        if deployed.storage is not None and not deployed.storage.holds(pid):
            self._tally.layer = await open_layer(pid, upper_dir(inspected), partial(self._client.layer_bytes, deployed.name))
        if args:
            _, command = self._passed_on(command, {})
            with trio.move_on_after(START_TIMEOUT_S) as scope:
                exec_id = await self._client.create_exec(deployed.name, command, attached=False)
                await self._client.start_exec_detached(exec_id)
            if scope.cancelled_caught:
                raise self._dead(NeverBegun())

    async def run(
        self, entry_point: str, args: Sequence[str], output: OutputSink, env: Mapping[str, str] | None = None
    ) -> ExitStatus:
        """Errors: RuntimeFault if the command cannot be started at all, or the container or its Engine has died."""
        deployed, watch, inside = self._ready()
        assert deployed.image is not None
        argv = command_of(deployed.image, entry_point, args)
        check_command(argv, env or {})
        before, ooms, forks = inside.running(), inside.oom_kills(), inside.refused_forks()

        def left() -> None:
            if inside.pipes is not None:
                inside.pipes.adopt((pid for pid, _ in inside.running() - before), self._terminal_pids())

        async def kill(exec_id: str) -> None:
            with trio.CancelScope(shield=True):
                await self._kill(exec_id, lambda processes, spared: processes.kill_since(before, spared))

        file, argv = self._passed_on(argv, env or {})
        try:
            exec_id = await self._client.create_exec(str(deployed.name), argv, env=env)
            try:
                async with await self._client.start_exec(exec_id) as stream:
                    program = Program(self._client, stream, left)
                    status = await self._attend(program, output, deployed.options.limits)
                    if not program.ended:
                        await kill(exec_id)
            except NeverBegun as fault:
                raise self._dead(fault) from None
            except BaseException:  # also when cancelled: a command that nobody waits for does not run on
                await kill(exec_id)
                raise
        except (EngineGone, NoSuch, InUse) as fault:
            raise await watch.explain(fault) from None
        finally:
            if inside.pipes is not None:
                inside.pipes.release()
            if file is not None:
                file.unlink(missing_ok=True)
        if status.code in (KILLED, 128 + signal.SIGTERM) and status.reason is None:
            if (death := await watch.diagnose(inside)) is not None:
                raise RuntimeFault(death)
            if inside.oom_kills() > ooms:
                return ExitStatus(status.code, f"memory limit of {deployed.options.limits.mem_gib:g} GiB reached")
        if not status.ok and status.reason is None and inside.refused_forks() > forks:
            return ExitStatus(status.code, f"process limit of {PROCESSES} reached")
        return status

    def _passed_on(self, argv: list[str], env: Mapping[str, str]) -> tuple[Path | None, list[str]]:
        """Return what the Engine is told of a command, and the file in which the rest of it stands, if there is one."""
        assert self._deployed is not None
        if not is_long(argv):
            return None, argv
        folder = self._deployed.options.work_dir / ARGUMENTS
        return write_arguments(folder, argv, env.get("PATH", self._deployed.search))

    async def _attend(self, program: Program, output: OutputSink, limits: Limits) -> ExitStatus:
        """Hand on what a program writes until it has ended, or a limit of the command has been reached."""
        written, began_cpu_s = 0, self._tally.cpu_s()
        why: str | None = None
        with trio.move_on_after(limits.run_time_s if limits.run_time_s is not None else float("inf")) as time_limit:
            while why is None:
                part = None
                with trio.move_on_after(CHECK_S) as check:
                    part = await program.receive()
                if part is not None:
                    written += len(part[1])
                    if written > limits.output_bytes:
                        why = f"output limit of {limits.output_bytes} bytes reached"
                    else:
                        await output(*part)
                elif not check.cancelled_caught:
                    code = await program.exit_code()  # which may find out that there was no program
                    return ExitStatus(code, program.problem)
                if limits.cpu_time_s is not None and self._tally.cpu_s() - began_cpu_s > limits.cpu_time_s:
                    why = f"CPU time limit of {limits.cpu_time_s:g} s reached"
        if time_limit.cancelled_caught:
            why = f"time limit of {limits.run_time_s:g} s reached"
        return ExitStatus(KILLED, why)

    async def stop(self) -> None:
        terminals, self._terminals = tuple(self._terminals), set()
        deployed, self._deployed = self._deployed, None
        inside, self._inside = self._inside, None
        for terminal in terminals:
            await terminal.drop()
        if deployed is None:
            return
        with trio.CancelScope(shield=True):  # nobody else would do it later
            with trio.move_on_after(MEASURE_TIMEOUT_S):
                await self._measure(deployed)
            if inside is not None:
                inside.kill()  # nothing runs on, also where the Engine has lost it, is gone, or waits for the guest
            try:
                with trio.fail_after(REMOVE_TIMEOUT_S):
                    await self._remove(deployed)
            except (RuntimeFault, trio.TooSlowError) as fault:
                log.error("container %s is left to be swept: %s", deployed.name, str(fault) or "no answer in time")
            if inside is not None:
                inside.close()
            try:
                if deployed.storage is not None:
                    await deployed.storage.close()
            finally:
                self._tally.settle()
                if deployed.image is not None:
                    deployed.image.close()
                with suppress(OSError):
                    clear_away(deployed.options.work_dir)
                self._admin.let_go()

    async def _remove(self, deployed: _Deployed) -> None:
        if deployed.name is not None:
            await self._admin.remove_container(deployed.name)
        for name in deployed.volume_names:
            await self._admin.remove_volume(name)

    # -- usage and death ----------------------------------------------------------------------------------------------------

    def usage(self) -> Usage:
        """As of now, but for storage that the kernel does not limit: that was looked at a second ago or so."""
        return self._tally.usage(self._deployed.storage if self._deployed is not None else None)

    async def _measure(self, deployed: _Deployed) -> None:
        await self._tally.measure(deployed.storage, deployed.options.limits)

    async def failure(self) -> str:
        """Also takes the samples of storage, and the output of services nobody hears, as long as it is waited for."""
        deployed = self._deployed
        if deployed is None or deployed.watch is None:
            await trio.sleep_forever()
            raise AssertionError("unreachable")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sample, deployed)
            text = await deployed.watch.failure()
            nursery.cancel_scope.cancel()
        return text

    async def _sample(self, deployed: _Deployed) -> None:
        took_s = 0.0
        while True:
            await trio.sleep(max(SAMPLE_S, 5 * took_s))  # looking takes long where there are many files
            began_s = trio.current_time()
            if self._inside is not None and self._inside.pipes is not None:
                self._inside.pipes.drain()
            await self._measure(deployed)
            took_s = trio.current_time() - began_s

    async def _kill(self, exec_id: str, how: Callable[[ContainerProcesses, list[int]], object]) -> None:
        """End a program and what it started; where its processes are out of reach, the container."""
        with trio.move_on_after(KILL_TIMEOUT_S), suppress(RuntimeFault):
            deployed, watch, inside = self._ready()
            if inside.processes is None:
                watch.death = "a command had to be stopped, and without root's rights only the whole container can be"
                await self._admin.remove_container(str(deployed.name))
                return
            begun_s = trio.current_time()
            while (state := await self._client.inspect_exec(exec_id)).exit_code is None:
                if state.pid:
                    how(inside.processes, self._terminal_pids())
                elif not state.running and trio.current_time() > begun_s + NEVER_STARTED_S:
                    return
                await trio.sleep(0.01)

    def _dead(self, fault: NeverBegun) -> NeverBegun:
        """Give up a container in whose way its Engine stands: the first process is killed, and so all of them."""
        if self._deployed is not None and self._deployed.watch is not None:
            self._deployed.watch.death = self._deployed.watch.death or str(fault)
        if self._inside is not None:
            self._inside.kill()
        return fault

    def _terminal_pids(self) -> list[int]:
        return [terminal.pid for terminal in self._terminals if terminal.pid is not None]

    # -- interaction ----------------------------------------------------------------------------------------------

    def _ready(self) -> tuple[_Deployed, Watch, Inside]:
        deployed, inside = self._deployed, self._inside
        if deployed is None or deployed.watch is None or inside is None:
            raise RuntimeFault("not started")
        if deployed.watch.death is not None:
            raise RuntimeFault(deployed.watch.death)
        return deployed, deployed.watch, inside

    async def open_terminal(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None, tty: bool, rows: int, cols: int
    ) -> Terminal:
        deployed, watch, _ = self._ready()
        if len(self._terminals) >= MAX_TERMINALS:
            raise RuntimeFault(f"{MAX_TERMINALS} terminals are open already")
        command = [*(argv or SHELL)]
        check_command(command, env or {})
        if is_long(command):
            raise RuntimeFault(f"the arguments of a program in a terminal are too long: at most {MOST_BY_EXEC} bytes")
        given = {"TERM": "xterm", **(env or {})} if tty else env
        try:
            exec_id = await self._client.create_exec(str(deployed.name), command, env=given, tty=tty, stdin=True)
            stream = await self._client.start_exec(exec_id, tty=tty)
        except (EngineGone, NoSuch, InUse) as fault:
            raise await watch.explain(fault) from None
        terminal = EngineTerminal(self._client, stream, tty, self._close_terminal, watch.explain)
        self._terminals.add(terminal)
        try:
            await terminal.begin(rows, cols)
        except NeverBegun as fault:
            self._dead(fault)
            await terminal.aclose()
            raise
        except BaseException:
            await terminal.aclose()
            raise
        return terminal

    async def _close_terminal(self, terminal: EngineTerminal) -> None:
        """Kill its program and children; what has detached itself from them lives on, as after any shell."""
        self._terminals.discard(terminal)
        if terminal.pid is not None:
            pid = terminal.pid
            await self._kill(terminal.id, lambda processes, spared: processes.kill_tree(pid))

    async def connect(self, port: int) -> trio.SocketStream:
        _, _, inside = self._ready()
        if inside.network is None:
            raise RuntimeFault("connections into a container need an exe-unit that runs as root")
        return await inside.network.connect(port)

    async def sweep(self, work_root: Path) -> list[str]:
        return await sweep(self._admin, work_root)


def _secure_accounts(pid: int, deployed: _Deployed) -> None:
    """Errors: RuntimeFault for an image whose user is root by its own files: he could put anything in their place."""
    assert deployed.image is not None
    try:
        if accounts.user_id(pid) == deployed.facts.root_id:
            raise RuntimeFault(f"the image's user {deployed.image.user!r} is root by its /etc/passwd: let it say so (USER root)")
        if os.geteuid() == 0:
            accounts.secure(pid, deployed.facts.root_id)
    except OSError as error:
        raise RuntimeFault(f"the image's /etc/passwd and /etc/group cannot be kept from its user: {error}") from None
