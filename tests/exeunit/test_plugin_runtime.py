"""A runtime that a descriptor adds: the example `process` as a whole exe-unit, and programs that lie, hang and die."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import signal
import stat
import sys
import tarfile
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from test_exeunit_process import ACTIVITY, AGREEMENT, PROVIDER, REQUESTOR, World
from worlds.patience import patience, within
from worlds.support import trio_test
from worlds.wire import two_nodes

from golem.exeunit.runtime import DeployOptions, ImageFormat, Limits, RuntimeFault, VolumeRequest
from golem.exeunit.runtimes import make_runtime, runtime_names
from golem.exeunit.runtimes.plugin.descriptors import Descriptor, DescriptorError, find_descriptors, read_descriptors
from golem.exeunit.runtimes.plugin.process_tree import sweep_processes
from golem.exeunit.runtimes.plugin.runtime import ExternalRuntime, ExternalSettings
from golem.exeunit.usage import COUNTERS
from golem.files.on_disk import FileSink, FileSource

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "process-runtime"
STREAM = {"stdout": {"stream": {}}, "stderr": {"stream": {}}}
NOTHING = Path(os.devnull)


def descriptor(**changes: Any) -> dict[str, Any]:
    one = {"name": "other", "version": "1.2.3", "supervisor-path": "exe-unit", "runtime-path": "other"}
    return {key: value for key, value in {**one, **changes}.items() if value is not None}


def written(folder: Path, *descriptors: Any, name: str = "ya-other.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(list(descriptors)))
    return folder / name


def tar_of(**files: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name.replace("__", "/"))
            member.size, member.mode = len(text.encode()), 0o755
            archive.addfile(member, io.BytesIO(text.encode()))
    return out.getvalue()


# -- descriptor files
def test_the_example_is_found_and_its_program_too() -> None:
    for place in (str(EXAMPLE), str(EXAMPLE / "ya-*.json"), str(EXAMPLE / "ya-process.json"), f"/nowhere{os.pathsep}{EXAMPLE}"):
        found = find_descriptors(place, taken=runtime_names())
        program, handoff, arguments = found.runtimes["process"].command()
        assert (program, handoff, arguments) == (EXAMPLE / "process-runtime", True, ())
        assert list(found.problems) == (["/nowhere: no such descriptor"] if "/nowhere" in place else [])
        assert set(found.runtimes["process"].priced) == set(COUNTERS)


def test_default_places_need_not_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert find_descriptors(None, tmp_path / "agent").problems == ()
    (tmp_path / "agent").mkdir()
    written(tmp_path / "agent" / "plugins", descriptor())
    assert list(find_descriptors(None, tmp_path / "agent").runtimes) == ["other"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not JSON"),
        ("[" * 20000, "not JSON"),
        ("{}", "a list"),
        ("[1]", "an object"),
        (json.dumps([descriptor()] * 33), "at most 32"),
        (json.dumps([descriptor(), descriptor()]), "two runtimes of one name"),
        ('[{"name": "a", "name": "b"}]', "twice"),
        (json.dumps([descriptor(name="../vm")]), "name"),
        (json.dumps([descriptor(name="vm\n")]), "name"),
        (json.dumps([descriptor(name=7)]), "name"),
        (json.dumps([descriptor(version=None)]), "version"),
        (json.dumps([descriptor(**{"supervisor-path": None})]), "supervisor-path"),
        (json.dumps([descriptor(**{"extra-arg": []})]), "unknown key 'extra-arg'"),
        (json.dumps([descriptor(**{"extra-args": "--cap-handoff"})]), "extra-args"),
        (json.dumps([descriptor(**{"extra-args": ["a\0b"]})]), "extra-args"),
        (json.dumps([descriptor(**{"extra-args": ["x"] * 65})]), "extra-args"),
        (json.dumps([descriptor(**{"runtime-path": "\ud800"})]), "runtime-path"),
        (json.dumps([descriptor(properties={"name": "vm"})]), "not for a descriptor"),
        (json.dumps([descriptor(properties={"a b": 1})]), "not for a descriptor"),
        (json.dumps([descriptor(properties={"x": {"y": 1}})]), "properties: x"),
        ('[{"name":"a","version":"1","supervisor-path":"e","properties":{"x":1e999}}]', "properties.x"),
        ('[{"name":"a","version":"1","supervisor-path":"e","properties":{"x":NaN}}]', "not JSON"),
        (json.dumps([descriptor(config={"counter": {}})]), "config"),
        (json.dumps([descriptor(config={"counters": {"golem.usage.gib": {"price": "yes"}}})]), "price"),
        (json.dumps([descriptor(config={"counters": {"golem.usage.gib": []}})]), "counters"),
        (" " * 70000, "larger than"),
    ],
)
def test_hostile_descriptor_files(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "ya-x.json"
    file.write_text(content)
    with pytest.raises(DescriptorError) as caught:
        read_descriptors(file)
    assert str(file) in str(caught.value)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 1000
    written(tmp_path, descriptor(), name="ya-good.json")
    found = find_descriptors(str(tmp_path))
    assert list(found.runtimes) == ["other"], "one bad file takes nothing from the others"
    assert found.problems == (str(caught.value),)


def test_what_is_not_a_file_or_not_ours_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ya-fifo.json")
    (tmp_path / "ya-folder.json").mkdir()
    (tmp_path / "ya-link.json").symlink_to("/nowhere")
    written(tmp_path, descriptor(name="anybody"), name="ya-anybody.json").chmod(0o666)
    if os.geteuid() == 0:
        os.chown(written(tmp_path, descriptor(name="stranger"), name="ya-stranger.json"), 54321, 54321)
    found = find_descriptors(str(tmp_path))
    assert not found.runtimes
    said = " ".join(found.problems)
    assert "ya-fifo.json: not a file" in said
    assert "ya-anybody.json: this file may be written by anybody" in said
    assert "ya-link.json: cannot be read" in said
    assert os.geteuid() != 0 or "belongs to user 54321" in said


def test_names_are_unique_and_built_in_ones_are_taken(tmp_path: Path) -> None:
    written(tmp_path, descriptor(name="wasmtime"), name="ya-a.json")
    written(tmp_path, descriptor(), name="ya-b.json")
    written(tmp_path, descriptor(version="9"), name="ya-c.json")
    found = find_descriptors(str(tmp_path), taken=runtime_names())
    assert [(one.name, one.version) for one in found.runtimes.values()] == [("other", "1.2.3")]
    assert ["built-in" in found.problems[0], "ya-b.json already" in found.problems[1]] == [True, True]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"supervisor-path": "/usr/lib/yagna/plugins/exe-unit"}, "this node's own supervisor"),
        ({"runtime-path": None}, "no runtime-path"),
        ({"runtime-path": "missing"}, "No such file"),
        ({"runtime-path": "."}, "not a program"),
        ({"runtime-path": "plain"}, "not a program"),
        ({"runtime-path": "anybody"}, "may be written by anybody"),
        ({"extra-args": ["--runtime-managed-image"]}, "has no '--runtime-managed-image'"),
        ({"extra-args": ["--runtime-arg"]}, "without a value"),
    ],
)
def test_what_is_not_started_and_why(
    tmp_path: Path, changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain").write_text("")
    for name, mode in (("other", 0o755), ("anybody", 0o777)):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(mode)
    monkeypatch.setenv("EXE_UNIT_PATH", str(written(tmp_path, descriptor(**changes))))
    with pytest.raises(ValueError, match=reason):
        make_runtime("other", tmp_path)


# -- the example as a whole exe-unit
class PluginWorld(World):
    """Provider's and requestor's nodes, and an exe-unit of the runtime `process`."""

    async def start_process(self, package: bytes | None, limits: Mapping[str, float]) -> trio.Process:
        demand = {}
        if package is not None:
            (self.tmp_path / "package.tar").write_bytes(package)
            self.files.offer("tar", FileSource(self.tmp_path / "package.tar"), "test")
            digest = hashlib.sha3_224(package).hexdigest()
            demand["golem.srv.comp.task_package"] = f"hash:sha3:{digest}:gftp://{REQUESTOR}/tar"
        offer = {"golem.inf.cpu.threads": 1, "golem.inf.mem.gib": 0.5, "golem.inf.storage.gib": 0.1, **limits}
        offer["golem.com.usage.vector"] = list(COUNTERS)
        agreement = {
            "agreementId": AGREEMENT,
            "demand": {"requestorId": REQUESTOR, "properties": demand},
            "offer": {"providerId": PROVIDER, "properties": offer},
        }
        (self.tmp_path / "agreement.json").write_text(json.dumps(agreement))
        command = [sys.executable, "-m", "golem.exeunit", "--runtime", "process", "--activity", ACTIVITY]
        for name in ("agreement.json", "work", "cache"):
            command += [f"--{name.partition('.')[0]}", str(self.tmp_path / name)]
        command += ["--bus", str(self.tmp_path / "a.sock")]
        return await trio.lowlevel.open_process(command, env={**os.environ, "EXE_UNIT_PATH": str(EXAMPLE), "SECRET_KEY": "x"})


@asynccontextmanager
async def world(tmp_path: Path, package: bytes | None = None, **limits: float) -> AsyncIterator[tuple[PluginWorld, trio.Process]]:
    async with two_nodes(tmp_path) as (a, b, nursery):
        made = PluginWorld(tmp_path, a, b, nursery)
        await made.begin()
        process = await made.start_process(package, {f"golem.inf.{name.replace('_', '.')}": one for name, one in limits.items()})
        try:
            await made.state("Initialized")
            yield made, process
        finally:
            if process.returncode is None:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()
        nursery.cancel_scope.cancel()


def sh(script: str) -> dict[str, Any]:
    return {"run": {"entry_point": "sh", "args": ["-c", script], "capture": STREAM}}


def left_over(tmp_path: Path) -> list[str]:
    """Command lines of processes that were started in the activity's directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if os.fsencode(tmp_path / "work") in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
    return found


@pytest.mark.integration
@trio_test
async def test_a_whole_activity_as_processes(tmp_path: Path) -> None:
    package = tar_of(bin__greet='#!/bin/sh\necho "Hello $1, $WHO"; echo oops >&2; exit 3\n', etc__motd="welcome\n")
    async with world(tmp_path, package) as (w, process):
        batch = await w.exec({"deploy": {"env": {"WHO": "you"}, "volumes": ["/data/in"]}}, {"start": {}})
        assert [(row.ok, row.message) for row in w.results(batch)] == [(True, None), (True, None)]
        (tmp_path / "in").write_bytes(b"letter" * 1000)
        w.files.offer("in", FileSource(tmp_path / "in"), "test")
        w.files.offer("slot", FileSink(tmp_path / "out"), "test")
        batch = await w.exec(
            {"transfer": {"from": f"gftp://{REQUESTOR}/in", "to": "container:/data/in/letter"}},
            sh("cat etc/motd; wc -c < data/in/letter; tr a-z A-Z < data/in/letter > data/out; env | grep -c SECRET"),
        )
        assert w.results(batch)[1].stdout == "welcome\n6000\n0\n", "and nothing of the provider's environment"
        batch = await w.exec({"transfer": {"from": "container:/data/out", "to": f"gftp://{REQUESTOR}/slot"}})
        assert w.results(batch)[0].ok
        assert (tmp_path / "out").read_bytes() == b"LETTER" * 1000
        batch = await w.exec({"run": {"entry_point": "bin/greet", "args": ["World"], "capture": STREAM}})
        (row,) = w.results(batch)
        assert (row.ok, row.stdout, row.stderr) == (False, "Hello World, you\n", "oops\n")
        assert "exited with code 3" in (row.message or "")
        await w.state("Ready")
        process.send_signal(signal.SIGTERM)
        with within(5):
            await process.wait()
        await w.state("Terminated")
    assert not left_over(tmp_path)
    assert not list((tmp_path / "work").glob("deployment-*/runtime")), "the activity's files are gone"


@pytest.mark.integration
@trio_test
async def test_without_a_package_background_processes_live_until_the_end_and_are_billed(tmp_path: Path) -> None:
    async with world(tmp_path) as (w, process):
        escape = "setsid sh -c 'env -i sh -c \"while :; do :; done\"' >/dev/null 2>&1 & echo started"
        batch = await w.exec({"deploy": {}}, {"start": {}}, sh(escape))
        assert w.results(batch)[2].stdout == "started\n", "the command ends though its child goes on"
        began = time.monotonic()
        while (await w.live("usage"))[0][1] < 1.0:
            assert time.monotonic() - began < patience(20), "CPU time of processes that got away is metered"
            await trio.sleep(0.2)
        assert (await w.live("usage"))[0][2] > 0
        process.send_signal(signal.SIGTERM)
        with within(5):
            await process.wait()
    assert not left_over(tmp_path)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("script", "reason"),
    [("x=x; while :; do x=$x$x; done", "memory"), ("while :; do head -c 1000000 /dev/zero >> big; done", "storage")],
)
@trio_test
async def test_the_agreement_limits_what_is_used(tmp_path: Path, script: str, reason: str) -> None:
    """Not with the runtime's help: this command takes its memory in a way that the runtime's own limit does not see."""
    if reason == "memory":
        code = "import mmap, time\\nm = mmap.mmap(-1, 700 << 20)\\nfor i in range(0, 700 << 20, 4096): m[i] = 1\\ntime.sleep(60)"
        script = f"printf '{code}' | {sys.executable} -"
    async with world(tmp_path, mem_gib=0.25, storage_gib=0.01) as (w, process):
        await w.exec({"deploy": {}}, {"start": {}}, sh(script), wait=False)
        with within(30):
            assert await process.wait() == 1
        await w.state("Terminated")
        assert w.row(w.requestor).reason == "Usage limit exceeded"
        assert reason in (w.row(w.requestor).error_message or "")
    assert not left_over(tmp_path)


@pytest.mark.integration
@trio_test
async def test_a_killed_exe_unit_takes_its_processes_along_and_sweep_the_rest(tmp_path: Path) -> None:
    async with world(tmp_path) as (w, process):
        await w.exec({"deploy": {}}, {"start": {}}, sh("setsid sleep 1000 >/dev/null 2>&1 & sleep 1000"), wait=False)
        await w.until(lambda: left_over(tmp_path).count("sleep 1000 ") == 2)
        process.kill()
        await process.wait()
        assert sweep_processes(tmp_path / "elsewhere") == [], "only below the directory that is meant"
        assert sweep_processes(tmp_path), "the one in a session of its own, whose parent is gone"
        await w.until(lambda: not left_over(tmp_path))


# -- programs of another mind
def program(tmp_path: Path, body: str, **changes: Any) -> ExternalRuntime:
    """A runtime whose program is `body`: Python with `command`, the rest of the line in `args`, and `answer(...)`."""
    path = tmp_path / "other"
    path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(_PRELUDE) + textwrap.dedent(body))
    path.chmod(0o755)
    file = tmp_path / "ya-other.json"
    return ExternalRuntime(
        Descriptor(file, "other", "1.0", "exe-unit", path, **changes), ExternalSettings(test_s=2.0, deploy_s=2.0, start_s=2.0)
    )


_PRELUDE = """
    import json, os, signal, sys, time
    args = sys.argv[1:]
    words = args[:args.index("--")] if "--" in args else args
    command = next((one for one in ("offer-template", "test", "deploy", "start", "run") if one in words), None)
    workdir = args[args.index("--workdir") + 1] if "--workdir" in args else ""
    def answer(**changes):
        os.makedirs(os.path.join(workdir, "v"), exist_ok=True)
        print(json.dumps({"valid": {"Ok": ""}, "vols": [{"name": "v", "path": "/v"}], **changes}))
    def template(properties={}, **more):
        print(json.dumps({"properties": properties, **more}))
"""
GOOD = """
    if command == "deploy": answer()
    if command == "offer-template": template()
"""


def options(tmp_path: Path, **changes: Any) -> DeployOptions:
    folder = tmp_path / "work"
    folder.mkdir(exist_ok=True)
    return DeployOptions(folder, **{"limits": Limits(storage_gib=0.01, run_time_s=2.0), **changes})


@trio_test
async def test_arguments_are_those_of_the_interface(tmp_path: Path) -> None:
    body = (
        GOOD
        + """
    if command == "run": print(json.dumps([args, os.environ["GOLEM_RUNTIME_ENV"]]))
    """
    )
    runtime = program(tmp_path, body, extra_args=("--cap-handoff", "--runtime-arg", "-x", "--runtime-arg=--y"))
    limits = Limits(cpu_threads=2, mem_gib=0.25, storage_gib=0.01)
    ram = VolumeRequest("/r", "ram", 1000)
    deployment = await runtime.deploy(NOTHING, options(tmp_path, limits=limits, env={"A": "1"}, volumes=(ram,), hostname="h"))
    assert [(one.container_path, one.host_dir) for one in deployment.volumes] == [("/v", tmp_path / "work/runtime/v")]
    await runtime.start([])
    said = bytearray()

    async def output(side: str, chunk: bytes) -> None:
        said.extend(chunk)

    assert (await runtime.run("bin", ["a", "--", "-b"], output, {"B": "2"})).ok
    args, env = json.loads(said)
    assert args == [
        "--workdir", str(tmp_path / "work/runtime"), "--task-package", os.devnull, "--cpu-cores", "2", "--mem-gib", "0.25",
        "--storage-gib", "0.01", "-x", "--y", "run", "--entrypoint", "bin", "--", "a", "--", "-b",
    ]  # fmt: skip
    assert json.loads(env) == {"A": "1", "B": "2"}
    with pytest.raises(RuntimeFault, match="environment variable"):
        await runtime.run("bin", [], output, {"LD_PRELOAD=x": ""})
    await runtime.stop()
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("sys.exit(4)", "`test` ended with status 4"),
        ("print('first'); print('no\\033]0;t\\007 licence \\n', file=sys.stderr); sys.exit(5)", "status 5: no ]0;t  licence"),
        ("sys.stderr.write('x' * 1000000 + '\\n' + 'last'); sys.exit(6)", "status 6: last"),
        ("no_such_name", "status 1: NameError: name 'no_such_name' is not defined"),
        ("if os.fork(): sys.exit('why')\nos.setsid(); os.close(1); time.sleep(5)", "status 1: why"),
        ("time.sleep(60)", "no answer to `test` within 2 s"),
        ("os.close(1); time.sleep(60)", "no answer to `test` within 2 s"),
        ("while True: print('x' * 1000)", "more than"),
        ("if command != 'test': print('[]')", "not in order"),
        ("if command != 'test': print('[' * 50000)", "not in order"),
        ("if command != 'test': template(constraints='(golem.inf.mem.gib>1)')", "constraints"),
        ("if command != 'test': template({'golem.com.payment.platform.x.address': '0x0'})", "not for a runtime to set"),
        ("if command != 'test': template({'golem.runtime.name': 'vm'})", "not for a runtime to set"),
        ("if command != 'test': template({'golem.runtime.x': {'y': 1}})", "not for a runtime to set"),
    ],
)
@trio_test
async def test_what_fails_the_self_test(tmp_path: Path, body: str, reason: str) -> None:
    assert reason in (await program(tmp_path, body).self_test() or "")


@trio_test
async def test_a_runtime_may_say_what_it_can_do(tmp_path: Path) -> None:
    offered = {"golem.runtime.capabilities": ["magic"], "golem.inf.gpu.model": "x"}
    runtime = program(tmp_path, f"template({offered!r})", properties={"golem.runtime.colour": "red"})
    assert await runtime.self_test() is None
    found = runtime.offer_properties()
    assert offered.items() <= found.items()
    assert (found["golem.runtime.name"], found["golem.runtime.version"]) == ("other", "1.0")
    assert found["golem.runtime.colour"] == "red"
    assert found["golem.com.usage.vector"] == ["golem.usage.duration_sec", "golem.usage.cpu_sec"]
    assert ImageFormat.NOTHING in runtime.formats


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("print('no', file=sys.stderr); sys.exit(5)", "exit code 5: no"),
        ("time.sleep(60)", "time limit of 2 s"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("while True: print('x' * 1000)", "output limit"),
        ("print('{}')", "not in order"),
        ("print('[' * 50000)", "not in order"),
        ("answer(valid={'Err': 'bad package'})", "refused: bad package"),
        ("answer(vols=[{'name': '../../..', 'path': '/'}])", "no directory in the working directory"),
        ("answer(vols=[{'name': '/etc', 'path': '/'}])", "no directory in the working directory"),
        ("answer(vols=[{'name': '.', 'path': '/'}])", "no directory in the working directory"),
        ("os.symlink('/etc', workdir + '/s'); answer(vols=[{'name': 's', 'path': '/'}])", "no directory in the working"),
        ("answer(vols=[{'name': 'v', 'path': '/a/../b'}])", "path"),
        ("answer(vols=[{'name': 'v', 'path': '/a'}] * 65)", "at most 64"),
        ("answer(vols=[{'name': 'v', 'path': '/a'}] * 2)", "two volumes"),
        ("answer(vols=[{'name': 7, 'path': '/a'}])", "not in order"),
        ("answer(startMode='magic')", "start mode"),
    ],
)
@trio_test
async def test_what_fails_a_deploy(tmp_path: Path, body: str, reason: str) -> None:
    runtime = program(tmp_path, body)
    with pytest.raises(RuntimeFault) as caught:
        await runtime.deploy(NOTHING, options(tmp_path))
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 3000
    await runtime.stop()


@trio_test
async def test_what_is_said_beside_the_answer_does_no_harm(tmp_path: Path) -> None:
    runtime = program(tmp_path, "print('unpacking', 1); print('really', file=sys.stderr); answer()")
    assert [one.container_path for one in (await runtime.deploy(NOTHING, options(tmp_path))).volumes] == ["/v"]
    await runtime.stop()
    runtime = program(tmp_path, "")
    assert (await runtime.deploy(NOTHING, options(tmp_path))).volumes == ()
    await runtime.stop()


@trio_test
async def test_a_timeout_takes_the_whole_tree(tmp_path: Path) -> None:
    body = (
        GOOD
        + """
    if command == "run":
        import subprocess
        subprocess.Popen(["setsid", "sh", "-c", "sleep 500 & sleep 500"])
        subprocess.Popen(["sleep", "500"])
        time.sleep(60)
    """
    )
    runtime = program(tmp_path, body)
    await runtime.deploy(NOTHING, options(tmp_path, limits=Limits(storage_gib=0.01, run_time_s=0.5)))
    await runtime.start([])
    began = trio.current_time()
    status = await runtime.run("x", [], _ignore)
    assert (status.code, status.reason) == (137, "time limit of 0.5 s reached")
    assert trio.current_time() - began < patience(3)
    assert not left_over(tmp_path)
    with trio.move_on_after(0.5):
        await runtime.run("x", [], _ignore)
    assert not left_over(tmp_path), "nor does a cancelled one leave anything"
    await runtime.stop()


@trio_test
async def test_usage_is_the_kernels_whatever_a_runtime_hides(tmp_path: Path) -> None:
    """A parent that ignores SIGCHLD makes the kernel forget its children's time; its output claims no use at all."""
    body = (
        GOOD
        + """
    if command == "run":
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        print('{"golem.usage.cpu_sec": 0}')
        if os.fork() == 0:
            while time.process_time() < 1.5: pass
            os._exit(0)
        try: os.wait()
        except ChildProcessError: time.sleep(0.1)
    """
    )
    runtime = program(tmp_path, body)
    await runtime.deploy(NOTHING, options(tmp_path, limits=Limits(storage_gib=0.01)))
    await runtime.start([])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(runtime.failure)  # as the exe-unit does
        assert (await runtime.run("x", [], _ignore)).ok
        nursery.cancel_scope.cancel()
    used = runtime.usage()
    assert used.cpu_sec > 0.8, "what the last sample has seen"
    assert used.gib > 0.005
    await runtime.stop()
    assert runtime.usage().cpu_sec >= used.cpu_sec


async def _ignore(side: str, chunk: bytes) -> None:
    """Output nobody asked for."""


# -- the example's package
def member(name: str, kind: bytes = tarfile.REGTYPE, linkname: str = "", *, size: int = 0, mode: int = 0o644) -> tarfile.TarInfo:
    one = tarfile.TarInfo(name)
    one.type, one.linkname, one.size, one.mode = kind, linkname, size, mode
    return one


def package(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as archive:
        for one in members:
            archive.addfile(one, io.BytesIO(b"x" * one.size) if one.isreg() else None)
    return path


def symlink(name: str, target: str) -> tarfile.TarInfo:
    return member(name, tarfile.SYMTYPE, target)


HOSTILE = {
    "upwards": [member("../out")],
    "upwards from below": [member("a/../../out")],
    "link out": [symlink("link", "/etc")],
    "link upwards": [symlink("link", "../..")],
    "through a link": [symlink("link", "/etc"), member("link/passwd-of-a-test")],
    "through a link inside": [symlink("link", "."), member("link/file")],
    "links that lead out together": [symlink("a/b/up", "../.."), symlink("out", "a/b/up/..")],
    "link to nothing": [symlink("link", "nothing")],
    "links in a ring": [symlink("a", "b"), symlink("b", "a")],
    "hard link out": [member("hard", tarfile.LNKTYPE, "/etc/passwd")],
    "hard link upwards": [member("hard", tarfile.LNKTYPE, "../../image")],
    "hard link through a link": [symlink("link", "/etc"), member("hard", tarfile.LNKTYPE, "link/passwd")],
    "device": [member("null", tarfile.CHRTYPE)],
    "pipe": [member("pipe", tarfile.FIFOTYPE)],
    "large": [member("big", size=20 << 20)],
    "file in place of a folder": [member("a"), member("a/b")],
    "folder in place of a file": [member("a/b"), member("a")],
}


@pytest.mark.parametrize("what", HOSTILE)
@trio_test
async def test_a_hostile_package_is_refused(tmp_path: Path, what: str) -> None:
    runtime = ExternalRuntime(find_descriptors(str(EXAMPLE)).runtimes["process"])
    with pytest.raises(RuntimeFault, match=r"the runtime refused: .") as caught:
        await runtime.deploy(package(tmp_path / "package.tar", *HOSTILE[what]), options(tmp_path))
    assert "Traceback" not in str(caught.value)
    await runtime.stop()
    assert sorted(one.name for one in tmp_path.rglob("*")) == ["package.tar", "work"]
    assert not Path("/etc/passwd-of-a-test").exists()


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress, bz2.compress])
@trio_test
async def test_a_package_that_is_cut_short_is_refused(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    folded = b"".join(hashlib.sha256(bytes([one])).digest() for one in range(250))
    with tarfile.open(tmp_path / "whole", "w") as archive:
        archive.addfile(member("a", size=len(folded)), io.BytesIO(folded))
    whole = pack((tmp_path / "whole").read_bytes())
    (tmp_path / "broken").write_bytes(whole[: len(whole) // 3])
    runtime = ExternalRuntime(find_descriptors(str(EXAMPLE)).runtimes["process"])
    with pytest.raises(RuntimeFault, match=r"the runtime refused: .") as caught:
        await runtime.deploy(tmp_path / "broken", options(tmp_path))
    assert "Traceback" not in str(caught.value)
    await runtime.stop()


@trio_test
async def test_an_honest_package_is_unpacked_as_it_is(tmp_path: Path) -> None:
    honest = [
        member("bin", tarfile.DIRTYPE), member("./bin/tool", size=10, mode=0o4777), member("lib/deep/data", size=3, mode=0o200),
        member("again", tarfile.LNKTYPE, "bin/tool"), symlink("tool", "bin/tool"), symlink("lib/back", "../bin"),
        symlink("chain", "lib/back/tool"), member("/tmp/absolute", size=1),
    ]  # fmt: skip
    runtime = ExternalRuntime(find_descriptors(str(EXAMPLE)).runtimes["process"])
    await runtime.deploy(package(tmp_path / "package.tar", *honest), options(tmp_path))
    root = tmp_path / "work/runtime/root"
    assert {one: (root / one).stat().st_size for one in ("bin/tool", "tool", "again", "chain", "lib/back/tool")} == dict.fromkeys(
        ("bin/tool", "tool", "again", "chain", "lib/back/tool"), 10
    )
    modes = [stat.S_IMODE((root / one).stat().st_mode) for one in ("bin/tool", "lib/deep/data", "tmp/absolute")]
    assert modes == [0o755, 0o600, 0o644], "no set-user bit; nobody else writes; the owner reads"
    await runtime.stop()


def test_the_example_names_its_interpreter_by_path() -> None:
    """`env` would take whatever stands first in the provider's PATH."""
    line = (EXAMPLE / "process-runtime").read_text().splitlines()[0]
    assert line.startswith("#!/")
    assert "env" not in line
