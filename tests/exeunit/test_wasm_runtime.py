"""The wasmtime runtime with real children: friendly modules work, hostile ones end in a clear error."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import wat_modules as wat
from worlds.patience import patience, within
from worlds.support import trio_test

from golem.exeunit.runtime import DeployOptions, ExitStatus, Limits, Runtime, RuntimeFault, Side, VolumeRequest
from golem.exeunit.runtimes import make_runtime, runtime_names
from golem.exeunit.runtimes.wasm import runtime as wasm
from golem.exeunit.runtimes.wasm.runtime import WasmRuntime, WasmSettings
from golem.exeunit.storage import unmount_all
from golem.exeunit.usage import room_left

MIB = 1 / 1024
SMALL = Limits(mem_gib=32 * MIB, storage_gib=4 * MIB, run_time_s=10, output_bytes=1 << 20)


@dataclass
class Ran:
    status: ExitStatus
    stdout: bytes
    stderr: bytes


@dataclass
class Bench:
    """A deployed and started runtime in a directory of its own."""

    directory: Path
    limits: Limits = SMALL
    settings: WasmSettings = field(default_factory=lambda: WasmSettings(storage_check_s=0.05))
    options: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.runtime = WasmRuntime(self.directory / "compiled", self.settings)
        self.work = self.directory / "work"
        self.work.mkdir()

    async def up(self, image: bytes) -> Bench:
        path = self.directory / "image"
        path.write_bytes(image)
        self.deployment = await self.runtime.deploy(path, DeployOptions(self.work, self.limits, **self.options))  # type: ignore[arg-type]
        await self.runtime.start([])
        return self

    async def run(self, entry: str = "main", args: Sequence[str] = (), env: dict[str, str] | None = None) -> Ran:
        got: dict[Side, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}

        async def output(side: Side, chunk: bytes) -> None:
            got[side] += chunk

        with within(30):
            status = await self.runtime.run(entry, args, output, env)
        return Ran(status, bytes(got["stdout"]), bytes(got["stderr"]))


@pytest.fixture(autouse=True)
def nothing_stays_mounted(tmp_path: Path) -> Iterator[None]:
    """Also after a test that failed."""
    yield
    unmount_all(tmp_path)


async def once(tmp_path: Path, image: bytes, limits: Limits = SMALL, **run: object) -> Ran:
    bench = await Bench(tmp_path, limits).up(image)
    try:
        return await bench.run(**run)  # type: ignore[arg-type]
    finally:
        await bench.runtime.stop()


def is_alive(pid: int) -> bool:
    """Whether a process runs; a dead one may wait for long where nobody reaps it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what another process brings about."""
    with within(10):
        while not condition():
            await trio.sleep(0.01)


def test_is_a_runtime(tmp_path: Path) -> None:
    runtime = make_runtime("wasmtime", tmp_path)
    assert isinstance(runtime, WasmRuntime)
    assert isinstance(runtime, Runtime)
    assert "wasmtime" in runtime_names()
    with pytest.raises(ValueError, match="unknown runtime 'nope'"):
        make_runtime("nope", tmp_path)
    assert runtime.offer_properties()["golem.runtime.name"] == "wasmtime"


@trio_test
async def test_self_test_finds_every_door_shut(tmp_path: Path) -> None:
    runtime = WasmRuntime(tmp_path)
    assert await runtime.self_test() is None
    assert runtime.isolation["seccomp"] is True
    assert runtime.isolation["landlock"] > 0


@trio_test
async def test_missing_landlock_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wasm, "landlock_abi", lambda: 0)
    assert "no Landlock" in str(await WasmRuntime(tmp_path).self_test())
    assert await WasmRuntime(tmp_path, WasmSettings(require_landlock=False)).self_test() is None


# -- friendly -----------------------------------------------------------------------------------------------------


@trio_test
async def test_both_outputs_arrive_apart_and_unfinished_lines_too(tmp_path: Path) -> None:
    ran = await once(tmp_path, wat.say("to stdout", stderr="to stderr"))
    assert ran == Ran(ExitStatus(0), b"to stdout", b"to stderr")


@trio_test
async def test_exit_code_is_the_guests(tmp_path: Path) -> None:
    ran = await once(tmp_path, wat.say("x", code=7))
    assert ran.status == ExitStatus(7)
    assert not ran.status.ok


@trio_test
async def test_arguments_and_environment(tmp_path: Path) -> None:
    bench = Bench(tmp_path, options={"env": {"A": "deploy", "B": "deploy"}})
    await bench.up(wat.package({"args.wasm": wat.ARGS, "env.wasm": wat.ENVIRONMENT}))
    assert (await bench.run("args", ["ein", "zwei ß"])).stdout == "args.wasm\0ein\0zwei ß\0".encode()
    assert (await bench.run("env", env={"B": "run"})).stdout == b"A=deploy\0B=run\0"
    await bench.runtime.stop()


@trio_test
async def test_bare_module_is_its_own_entry_point(tmp_path: Path) -> None:
    assert (await once(tmp_path, wat.ARGS, entry="/bin/anything", args=["x"])).stdout == b"/bin/anything\0x\0"


@trio_test
async def test_stdin_is_empty(tmp_path: Path) -> None:
    assert (await once(tmp_path, wat.READ_STDIN)).status == ExitStatus(0)


@trio_test
async def test_root_volume_keeps_files_between_runs(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.up(wat.package({"w.wasm": wat.write_file("f", "kept"), "r.wasm": wat.read_file("f")},
                               **{"mount-points": [{"rw": "/golem/out"}]}))  # fmt: skip
    assert bench.deployment.volumes[0].container_path == "/golem/out"
    assert (await bench.run("w")).status == ExitStatus(0)
    assert (bench.deployment.volumes[0].host_dir / "f").read_bytes() == b"kept"
    assert 0 < room_left(bench.deployment.volumes, SMALL) < SMALL.storage_bytes
    assert (await bench.run("r")).stdout == b"kept"
    assert bench.runtime.usage().storage_gib > 0
    await bench.runtime.stop()
    assert not list(bench.work.iterdir())


@trio_test
async def test_mounts_of_a_package(tmp_path: Path) -> None:
    mounts = [{"ro": "in"}, {"rw": "/out"}, {"private": "/tmp/cache"}]
    bench = Bench(tmp_path, options={"volumes": (VolumeRequest("/extra"),)})
    write, read, write_private = wat.write_file("f", "x", 3), wat.read_file("f", 3), wat.write_file("f", "x", 5)
    modules = {"w.wasm": write, "r.wasm": read, "p.wasm": write_private}
    await bench.up(wat.package(modules, **{"mount-points": mounts}))
    found = [(item.container_path, item.read_only, item.private) for item in bench.deployment.volumes]
    free = (False, False)
    assert found == [("/in", True, False), ("/out", *free), ("/tmp/cache", False, True), ("/extra", *free)]
    (bench.deployment.volumes[0].host_dir / "f").write_text("input")
    assert (await bench.run("w")).status.code != 0  # read-only
    assert (await bench.run("r")).stdout == b"input"
    assert (await bench.run("p")).status.ok
    await bench.runtime.stop()


@trio_test
async def test_compiled_code_is_found_again_but_not_for_another_engine(tmp_path: Path) -> None:
    bench = await Bench(tmp_path).up(wat.say("x"))
    (compiled,) = (tmp_path / "compiled").iterdir()
    assert WasmRuntime(tmp_path).version in compiled.name
    before = bench.runtime.usage().cpu_sec
    assert before > 0  # compiling is charged
    await bench.runtime.stop()
    (tmp_path / "second").mkdir()
    again = Bench(tmp_path / "second")
    again.runtime = WasmRuntime(tmp_path / "compiled")
    await again.up(wat.say("x"))
    assert again.runtime.usage().cpu_sec == 0  # nothing was started to compile
    assert (await again.run()).stdout == b"x"
    await again.runtime.stop()


@trio_test
async def test_slow_reader_slows_the_guest(tmp_path: Path) -> None:
    bench = await Bench(tmp_path, Limits(mem_gib=32 * MIB, storage_gib=4 * MIB, run_time_s=0.5)).up(wat.FLOOD)
    taken = 0

    async def output(side: Side, chunk: bytes) -> None:
        nonlocal taken
        taken += len(chunk)
        await trio.sleep(0.05)

    status = await bench.runtime.run("main", [], output)
    assert status == ExitStatus(137, "time limit of 0.5 s reached")
    assert taken < 4 << 20  # a free-running flood makes hundreds of MB in that time
    await bench.runtime.stop()


@trio_test
async def test_reader_that_never_returns_cannot_hold_the_command(tmp_path: Path) -> None:
    bench = await Bench(tmp_path, Limits(mem_gib=32 * MIB, run_time_s=0.3)).up(wat.say("x"))

    async def output(side: Side, chunk: bytes) -> None:
        await trio.sleep_forever()

    with within(10):  # the guest is done at once; what waits is the output
        status = await bench.runtime.run("main", [], output)
    assert status.reason == "time limit of 0.3 s reached"
    await bench.runtime.stop()


# -- hostile ------------------------------------------------------------------------------------------------------


@trio_test
async def test_infinite_loop_meets_the_time_limit(tmp_path: Path) -> None:
    ran = await once(tmp_path, wat.LOOP, Limits(mem_gib=32 * MIB, run_time_s=0.3))
    assert ran.status == ExitStatus(137, "time limit of 0.3 s reached")


@trio_test
async def test_infinite_loop_meets_the_cpu_limit(tmp_path: Path) -> None:
    bench = await Bench(tmp_path, Limits(mem_gib=32 * MIB, cpu_time_s=1, run_time_s=20)).up(wat.LOOP)
    ran = await bench.run()
    assert ran.status.reason == "CPU time limit of 1 s reached"
    assert 0.8 < bench.runtime.usage().cpu_sec < 3  # the kernel's limit counts in ticks
    await bench.runtime.stop()


@trio_test
async def test_sleep_is_interrupted(tmp_path: Path) -> None:
    ran = await once(tmp_path, wat.SLEEP, Limits(mem_gib=32 * MIB, run_time_s=0.3))
    assert ran.status.reason == "time limit of 0.3 s reached"


@trio_test
async def test_memory_bomb(tmp_path: Path) -> None:
    bench = await Bench(tmp_path).up(wat.MEMORY_BOMB)
    ran = await bench.run()
    assert ran.status == ExitStatus(134, "trap: unreachable (memory was at 31 of at most 32 MiB)")
    assert 32 * MIB < bench.runtime.usage().gib < 200 * MIB
    await bench.runtime.stop()


@trio_test
async def test_module_that_starts_with_too_much_memory(tmp_path: Path) -> None:
    ran = await once(tmp_path, wat.program("", pages=1024))
    assert ran.status.code == 125
    assert "memory" in str(ran.status.reason)


@trio_test
async def test_compile_bomb_meets_the_cpu_limit_and_is_charged(tmp_path: Path) -> None:
    bench = Bench(tmp_path, settings=WasmSettings(compile_cpu_s=1, compile_time_s=30))
    with pytest.raises(RuntimeFault, match="compiling failed: CPU time limit of 1 s reached"):
        await bench.up(wat.compile_bomb())
    assert 0.8 < bench.runtime.usage().cpu_sec < 3  # the kernel's limit counts in ticks
    assert bench.runtime.usage().gib > 100 * MIB
    assert not list((tmp_path / "compiled").iterdir())
    await bench.runtime.stop()


@trio_test
async def test_compile_bomb_meets_the_time_limit(tmp_path: Path) -> None:
    bench = Bench(tmp_path, settings=WasmSettings(compile_time_s=0.5))
    with pytest.raises(RuntimeFault, match=r"compiling failed: time limit of 0\.5 s reached"):
        await bench.up(wat.compile_bomb())


@trio_test
async def test_compile_bomb_meets_the_memory_limit(tmp_path: Path) -> None:
    bench = Bench(tmp_path, settings=WasmSettings(compile_mem_gib=0))  # the activity's 32 MiB and the overhead alone
    with pytest.raises(RuntimeFault, match="compiling failed: the runtime aborted, most likely out of memory"):
        await bench.up(wat.compile_bomb())
    assert bench.runtime.usage().gib < 0.4


@trio_test
async def test_output_flood(tmp_path: Path) -> None:
    ran = await once(tmp_path, wat.FLOOD)
    assert ran.status == ExitStatus(137, "output limit of 1048576 bytes reached")
    assert len(ran.stdout) == 1 << 20


EFBIG, EIO, EMFILE, ENOSPC = 22, 29, 33, 51  # as WASI tells them to a guest
EATERS = {
    "one huge file": wat.FILE_BOMB,
    "many files": wat.MANY_FILES,
    "empty files": wat.EMPTY_FILES,
    "hidden": wat.HIDDEN_FILES,
}


@pytest.mark.root
@pytest.mark.parametrize("eater", EATERS)
@trio_test
async def test_storage_is_a_file_system_of_the_size_sold(tmp_path: Path, eater: str) -> None:
    """Nothing of it can be overshot for a moment, and what is told is exact."""
    bench = await Bench(tmp_path, settings=WasmSettings(storage_check_s=60)).up(wat.package(
        {"eat.wasm": EATERS[eater], "say.wasm": wat.say("still here"), "more.wasm": wat.ARGS}, **{"mount-points": [{"rw": "/"}]}
    ))  # fmt: skip
    try:
        (root,) = [volume.host_dir for volume in bench.deployment.volumes]
        found = os.statvfs(root)
        assert found.f_blocks * found.f_frsize <= SMALL.storage_bytes
        (image,) = [path for path in bench.work.rglob("*.ext4") if path.is_file()]
        assert image.stat().st_blocks * 512 >= SMALL.storage_bytes, "nobody else gets it"
        assert (await bench.run("say")).status.ok
        status = (await bench.run("eat")).status
        assert status.code in (ENOSPC, EFBIG, EMFILE, EIO), status
        assert image.stat().st_size <= SMALL.storage_bytes
        assert bench.runtime.usage().storage_gib <= SMALL.storage_gib
        if eater == "empty files":
            next(root.iterdir()).unlink()  # its inodes are used up, not its bytes
        with suppress(OSError), (root / "rest").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1024))
        assert SMALL.storage_gib / 2 < bench.runtime.usage().storage_gib <= SMALL.storage_gib
        with pytest.raises(RuntimeFault, match=r"machine code is part of it|compiling failed: output limit|No space"):
            await bench.run("more")
        assert (await bench.run("say")).stdout == b"still here"
    finally:
        await bench.runtime.stop()
    assert not list(bench.work.iterdir())
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.parametrize("eater", EATERS)
@trio_test
async def test_storage_that_is_only_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eater: str) -> None:
    """Names cost what a disk keeps of them, and files without a name count as well."""
    monkeypatch.setattr("golem.exeunit.storage.can_mount", lambda: False)
    bench = await Bench(tmp_path).up(EATERS[eater])
    ran = await bench.run()
    if eater == "one huge file":
        assert ran.status.code in (EFBIG, 137), "told to the guest, or it was seen before"
    else:
        assert ran.status == ExitStatus(137, "storage limit of 0.00390625 GiB and 100000 files reached")
    if eater != "hidden":
        with pytest.raises(RuntimeFault, match="storage limit"):  # and no further command until there is room
            await bench.run()
    await bench.runtime.stop()
    assert not list(bench.work.iterdir())


@pytest.mark.parametrize("limited", [pytest.param(True, marks=pytest.mark.root), False])
@trio_test
async def test_deep_directories_are_stopped_and_can_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limited: bool
) -> None:
    if not limited:
        monkeypatch.setattr("golem.exeunit.storage.can_mount", lambda: False)
    bench = await Bench(tmp_path).up(wat.nested_directories(3000))
    await bench.run()
    if not limited:
        with pytest.raises(RuntimeFault, match="storage limit"):
            await bench.run()
    await bench.runtime.stop()
    assert not list(bench.work.iterdir())


@pytest.mark.parametrize(
    "path",
    ["../secret", "../../volumes/secret", "/etc/passwd", "link", "dirlink/passwd", "../../../../../etc/passwd"],
)
@trio_test
async def test_no_path_leads_out(tmp_path: Path, path: str) -> None:
    bench = await Bench(tmp_path).up(wat.read_file(path))
    (root,) = [volume.host_dir for volume in bench.deployment.volumes]
    (root.parent / "secret").write_text("secret")
    (root / "link").symlink_to("/etc/passwd")
    (root / "dirlink").symlink_to("/etc")
    ran = await bench.run()
    assert ran.status.code != 0
    assert ran.stdout == b""
    await bench.runtime.stop()


@trio_test
async def test_guest_made_symlink_leads_nowhere(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    modules = {"plant.wasm": wat.plant_symlink("../../../../../../etc/passwd", "l"), "read.wasm": wat.read_file("l")}
    await bench.up(wat.package(modules, **{"mount-points": [{"rw": "/x"}]}))
    await bench.run("plant")
    ran = await bench.run("read")
    assert ran.status.code != 0
    assert ran.stdout == b""
    await bench.runtime.stop()


@trio_test
async def test_traps_are_named(tmp_path: Path) -> None:
    ran = await once(tmp_path, wat.package({"trap.wasm": wat.TRAP, "deep.wasm": wat.DEEP}), entry="trap")
    assert ran.status == ExitStatus(134, "trap: unreachable")
    (tmp_path / "again").mkdir()
    ran = await once(tmp_path / "again", wat.DEEP)
    assert ran.status == ExitStatus(134, "trap: stack overflow")


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (wat.importing("wasi_snapshot_preview1", "proc_fork"), None),
        (wat.importing("env", "socket"), "imports what this runtime does not have: env.socket"),
        (wat.importing("wasi_unstable", "fd_write"), r"wasi_unstable \(WASI snapshot 0\), which is gone"),
        (b"\0asm\x0d\0\1\0", "components are not supported"),
        (b"\0asm\1\0\0\0garbage", "not a valid WebAssembly module"),
        (b"\0asm\1\0\0\0", "no _start"),
        (b"#!/bin/sh\n", "not a complete zip"),
        (wat.package({"a.wasm": b"\x7fELF"}), "not a WebAssembly core module"),
    ],
)  # fmt: skip
@trio_test
async def test_unusable_modules_are_refused_at_deploy_start_or_first_use(tmp_path: Path, image: bytes, text: str | None) -> None:
    if text is None:  # right namespace, unknown function: found when linking
        ran = await once(tmp_path, image)
        assert ran.status.code == 125
        assert "proc_fork" in str(ran.status.reason)
        return
    bench = Bench(tmp_path)
    with pytest.raises(RuntimeFault, match=text):
        await (await bench.up(image)).run("a")
    await bench.runtime.stop()


@trio_test
async def test_machine_code_is_made_at_first_use_and_is_storage(tmp_path: Path) -> None:
    """A small package of many modules: what they become stays open as long as the activity, past every other limit."""
    names = [f"m{number}" for number in range(60)]
    limits = Limits(mem_gib=32 * MIB, storage_gib=MIB * 0.503, run_time_s=10)
    bench = await Bench(tmp_path, limits).up(wat.package({f"{name}.wasm": wat.ARGS for name in names}))
    try:
        assert bench.runtime.usage().cpu_sec == 0.0
        assert bench.runtime.usage().storage_gib == 0.0
        done, text = 0, ""
        for name in names:
            try:
                assert (await bench.run(name)).status.ok
            except RuntimeFault as fault:
                text = str(fault)
                break
            done += 1
        assert done > 1
        assert text.endswith("reached: machine code is part of it"), text
        assert 0.0 < bench.runtime.usage().storage_gib <= limits.storage_gib
        assert (await bench.run(names[0])).status.ok
        assert len([one for one in os.listdir("/proc/self/fd") if _leads_to(one, tmp_path / "compiled")]) == done
    finally:
        await bench.runtime.stop()
    assert not [one for one in os.listdir("/proc/self/fd") if _leads_to(one, tmp_path / "compiled")]


def _leads_to(descriptor: str, folder: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"{folder}/")
    except OSError:
        return False


@trio_test
async def test_bad_calls_have_clear_errors(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with pytest.raises(RuntimeFault, match="not started"):
        await bench.run()
    await bench.up(wat.package({"a.wasm": wat.ARGS}))
    with pytest.raises(RuntimeFault, match="'b' not found: this package has a"):
        await bench.run("b")
    with pytest.raises(RuntimeFault, match="NUL"):
        await bench.run("a", ["x\0y"])
    with pytest.raises(RuntimeFault, match="Unicode"):
        await bench.run("a", ["\ud800"])
    with pytest.raises(RuntimeFault, match="environment variable"):
        await bench.run("a", env={"A=B": "x"})
    with pytest.raises(RuntimeFault, match="already"):
        await bench.runtime.start([])
    await bench.runtime.stop()


@trio_test
async def test_usage_is_told_while_a_command_runs(tmp_path: Path) -> None:
    bench = await Bench(tmp_path).up(wat.LOOP)
    before = bench.runtime.usage()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.run)
        await eventually(lambda: bench.runtime.usage().cpu_sec > before.cpu_sec + 0.3)
        assert bench.runtime.usage().gib > 10 * MIB
        await bench.runtime.stop()


@trio_test
async def test_what_a_running_child_has_left(tmp_path: Path) -> None:
    bench = await Bench(tmp_path).up(wat.UP_AND_LOOP)
    up = trio.Event()

    async def output(side: Side, chunk: bytes) -> None:
        up.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.runtime.run, "main", [], output)
        await up.wait()
        (child,) = bench.runtime._children
        lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        assert {status[name][0] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
        assert (status["NoNewPrivs"], status["Seccomp"], status["Seccomp_filters"]) == (["1"], ["2"], ["2"])
        assert len(os.sched_getaffinity(child.pid)) == 1
        if os.geteuid() == 0:
            assert len(set(status["Uid"] + status["Gid"])) == 1
            assert int(status["Uid"][0]) >= wasm.FIRST_UID
            assert status["Groups"] == []
        await bench.runtime.stop()


@trio_test
async def test_commands_leave_no_descriptors_behind(tmp_path: Path) -> None:
    bench = await Bench(tmp_path).up(wat.say("x"))
    await bench.run()
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        await bench.run()
    assert sorted(os.listdir("/proc/self/fd")) == before
    await bench.runtime.stop()


# -- ending -------------------------------------------------------------------------------------------------------


@trio_test
async def test_stop_ends_a_running_command(tmp_path: Path) -> None:
    bench = await Bench(tmp_path).up(wat.LOOP)
    ran: list[Ran] = []

    async def run() -> None:
        ran.append(await bench.run())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await eventually(lambda: bool(bench.runtime._children))
        await bench.runtime.stop()
    assert ran[0].status == ExitStatus(137, "the activity was stopped")
    await bench.runtime.stop()  # may be repeated
    used = bench.runtime.usage().cpu_sec
    await bench.up(wat.say("again"))  # as after a terminate command
    assert (await bench.run()).stdout == b"again"
    assert bench.runtime.usage().cpu_sec > used > 0
    await bench.runtime.stop()


@trio_test
async def test_cancelled_run_leaves_no_process(tmp_path: Path) -> None:
    bench = await Bench(tmp_path).up(wat.LOOP)
    pids: list[int] = []

    async def watch() -> None:
        await eventually(lambda: bool(bench.runtime._children))
        pids.extend(child.pid for child in bench.runtime._children)
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await bench.run()
    assert pids
    assert not is_alive(pids[0])
    await bench.runtime.stop()


PLAIN_USER = """
    import sys, trio
    from pathlib import Path
    from golem.exeunit.runtime import DeployOptions
    from golem.exeunit.runtimes.wasm.runtime import WasmRuntime
    async def main():
        root = Path(sys.argv[1])
        runtime = WasmRuntime(root / "compiled")
        print(await runtime.self_test())
        (root / "work").mkdir()
        await runtime.deploy(root / "image", DeployOptions(root / "work"))
        await runtime.start([])
        async def output(side, chunk):
            print(side, chunk.decode())
        print((await runtime.run("x", [], output)).ok, runtime.isolation["landlock"] > 0, runtime.isolation["own_user"])
        await runtime.stop()
    trio.run(main)
"""


@pytest.mark.root
def test_works_for_a_plain_user(tmp_path: Path) -> None:
    """In a user namespace that maps nobody: no capability counts and the user is not root, but files can be read."""
    (tmp_path / "image").write_bytes(wat.say("hello"))
    top = Path(__file__).parents[2]
    code = f"""
    import ctypes, os, sys
    if ctypes.CDLL(None).unshare(0x10000000):
        sys.exit(77)
    assert os.geteuid() != 0
    sys.path.insert(0, {str(top)!r})
    """
    code = textwrap.dedent(code) + textwrap.dedent(PLAIN_USER)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=patience(60))
    if done.returncode == 77:
        pytest.skip("no user namespace can be made here (a chroot, or a container that forbids it)")
    assert (done.stdout, done.stderr) == ("None\nstdout hello\nTrue True False\n", "")


def test_child_dies_with_its_supervisor(tmp_path: Path) -> None:
    """Kill a supervisor outright: its guest must not outlive it."""
    (tmp_path / "image").write_bytes(wat.UP_AND_LOOP)
    top = Path(__file__).parents[2]
    code = f"import sys; sys.path.insert(0, {str(top)!r})\n" + textwrap.dedent(PLAIN_USER)
    supervisor = subprocess.Popen([sys.executable, "-u", "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == b"None\n"
        assert supervisor.stdout.readline() == b"stdout up!\n"
        (child,) = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()
    finally:
        supervisor.kill()
        supervisor.communicate()
    trio.run(eventually, lambda: not is_alive(int(child)))
    trio.run(WasmRuntime(tmp_path / "cache").sweep, tmp_path)
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text(), "nor its storage stay mounted"
    assert not list(tmp_path.rglob("storage"))
