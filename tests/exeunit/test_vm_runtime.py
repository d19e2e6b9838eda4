"""The runtime `vm` on real Docker Engines: commands, volumes, ends of every kind, terminals, connections, a whole unit."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from foreign_images import docker_archive, entry, image_json, tar
from test_exeunit_process import ACTIVITY, REQUESTOR, World
from worlds.engine import admin, busybox_tar, engine_for_tests
from worlds.patience import patience, within
from worlds.support import trio_test
from worlds.wire import two_nodes

from golem.exeunit.runtime import (
    Deployment,
    DeployOptions,
    ExitStatus,
    Limits,
    Runtime,
    RuntimeFault,
    Side,
    Terminal,
    VolumeRequest,
)
from golem.exeunit.runtimes.vm import watch
from golem.exeunit.runtimes.vm.runtime import VmRuntime
from golem.exeunit.runtimes.vm.watch import ENGINE_GONE
from golem.files.on_disk import FileSink, FileSource
from golem.lab.engine import LocalEngine
from protocol.activity import DestroyActivity

pytestmark = [pytest.mark.root, pytest.mark.integration]

LIMITS = Limits(cpu_threads=1, mem_gib=0.125, storage_gib=1 / 32, run_time_s=30)


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Docker archive with everything that an image may say of itself."""
    root = busybox_tar({"bin/entry": b'#!/bin/sh\necho entry: "$@"\n'})
    seeded = tar(
        entry("data", type=b"5", uid=1000, gid=1000, mode=0o750),
        entry("data/seed", b"from the image\n", uid=1000, gid=1000, mode=0o640),
        entry("srv", type=b"5"),
    )
    config = {
        "Entrypoint": ["/bin/entry", "always"],
        "Cmd": ["by default"],
        "Env": ["PATH=/bin", "GREETING=hello", "KEPT=image"],
        "WorkingDir": "/srv/work",
        "User": "1000:1000",
        "Volumes": {"/data": {}},
        "ExposedPorts": {"8080/tcp": {}, "53/udp": {}},
        "Healthcheck": {"Test": ["CMD", "/bin/false"]},
    }
    path = tmp_path_factory.mktemp("packages") / "image.tar"
    path.write_bytes(docker_archive([root, seeded], image_json([root, seeded], config)))
    return path


@pytest.fixture(scope="session")
def plain_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system that says nothing of itself: root, /, and what is in /bin."""
    path = tmp_path_factory.mktemp("packages") / "plain.tar"
    path.write_bytes(busybox_tar())
    return path


class Guest:
    """One activity."""

    def __init__(self, runtime: VmRuntime, activity: str) -> None:
        self.runtime, self.activity = runtime, activity
        self.deployment = Deployment(())
        self.failures: list[str] = []
        self.failed = trio.Event()

    async def run(self, *argv: str, env: Mapping[str, str] | None = None) -> tuple[ExitStatus, str, str]:
        """Run a program; its end, stdout and stderr."""
        heard: dict[Side, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}

        async def keep(side: Side, chunk: bytes) -> None:
            heard[side] += chunk

        status = await self.runtime.run(argv[0], argv[1:], keep, env)
        return status, heard["stdout"].decode(), heard["stderr"].decode()

    async def says(self, script: str) -> str:
        """Run a line of shell that must succeed, and return what it printed."""
        status, out, err = await self.run("/bin/sh", "-c", script)
        assert status.ok, (status, out, err)
        return out.strip()

    async def until(self, script: str) -> None:
        with within(10):
            while not (await self.run("/bin/sh", "-c", script))[0].ok:
                await trio.sleep(0.05)

    async def container(self) -> str:
        return str((await self.runtime._admin.containers(f"golem.activity={self.activity}"))[0]["Id"])


@asynccontextmanager
async def open_guest(
    engine: LocalEngine, package: Path, limits: Limits = LIMITS, start: Sequence[str] = (), **options: Any
) -> AsyncIterator[Guest]:
    """Deploy and start an activity, and check that nothing of it is left at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="vm-") as name:
        Path(name).chmod(0o711)
        guest = Guest(VmRuntime(engine.folder / "cache", engine.host), uuid.uuid4().hex)
        try:
            given = DeployOptions(Path(name), limits, activity_id=guest.activity, **options)
            guest.deployment = await guest.runtime.deploy(package, given)
            await guest.runtime.start(start)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_watch, guest)
                yield guest
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await guest.runtime.stop()
            assert name not in Path("/proc/self/mountinfo").read_text()
            assert [path.name for path in Path(name).iterdir()] == []
        if engine._process is not None:
            label = f"golem.activity={guest.activity}"
            assert await guest.runtime._admin.containers(label) == []
            assert await guest.runtime._admin.volumes(label) == []


async def _watch(guest: Guest) -> None:
    """As an exe-unit does from deploy on."""
    guest.failures.append(await guest.runtime.failure())
    guest.failed.set()


# -- what the image says, and what the requestor says


@trio_test
async def test_an_image_runs_as_it_says_itself(engine: LocalEngine, package: Path) -> None:
    options: dict[str, Any] = {
        "env": {"KEPT": "deploy", "ADDED": "a=b c"},
        "hostname": "worker-7",
        "hosts": {"friend.example": "192.168.7.9"},
        "volumes": (VolumeRequest("/out"), VolumeRequest("/ram", "ram", 1 << 20), VolumeRequest("/disk", "storage", 4 << 20)),
    }
    async with open_guest(engine, package, **options) as guest:
        assert isinstance(guest.runtime, Runtime)
        assert guest.deployment.ports == (8080,)
        assert guest.deployment.start_mode == "blocking"
        assert await guest.says("id -u; id -g; pwd; hostname") == "1000\n1000\n/srv/work\nworker-7"
        assert await guest.says('echo "$GREETING $KEPT $ADDED"') == "hello deploy a=b c"
        status, out, _ = await guest.run("/bin/sh", "-c", 'echo "$GREETING $MORE"', env={"GREETING": "bye", "MORE": "x"})
        assert (status.ok, out) == (True, "bye x\n")
        assert "192.168.7.9\tfriend.example" in await guest.says("cat /etc/hosts")
        assert await guest.run("") == (ExitStatus(0), "entry: always by default\n", "")
        assert await guest.run("", "and", "this") == (ExitStatus(0), "entry: always and this\n", "")
        assert await guest.run("echo", "by PATH") == (ExitStatus(0), "by PATH\n", "")
        # volumes: the image's own begins as the image has it, the others belong to whoever comes
        assert await guest.says("cat /data/seed; stat -c '%u %g %a' /data /data/seed") == (
            "from the image\n1000 1000 750\n1000 1000 640"
        )
        by_path = {volume.container_path: volume.host_dir for volume in guest.deployment.volumes}
        assert sorted(by_path) == ["/data", "/disk", "/out", "/ram"]
        for path, directory in by_path.items():
            await guest.says(f"echo in {path} > {path}/written")
            assert (directory / "written").read_text() == f"in {path}\n"
        # nothing of the image runs by itself
        assert (await guest.says("ps -o pid,args | grep -v -e ps -e PID -e grep")).split() == ["1", "/.golem/init"]


@trio_test
async def test_output_of_both_sides_live_in_order_and_whole(engine: LocalEngine, package: Path) -> None:
    async with open_guest(engine, package) as guest:
        assert await guest.run("/bin/sh", "-c", "echo out; echo err >&2; exit 9") == (ExitStatus(9), "out\n", "err\n")
        parts: list[tuple[Side, bytes, float]] = []

        async def keep(side: Side, chunk: bytes) -> None:
            parts.append((side, chunk, time.monotonic()))

        script = "for n in 1 2 3; do echo $n; echo e$n >&2; sleep 0.2; done"
        assert (await guest.runtime.run("/bin/sh", ["-c", script], keep)).ok
        assert b"".join(chunk for side, chunk, _ in parts if side == "stdout") == b"1\n2\n3\n"
        assert b"".join(chunk for side, chunk, _ in parts if side == "stderr") == b"e1\ne2\ne3\n"
        assert parts[-1][2] - parts[0][2] > 0.3
        status, out, _ = await guest.run("/bin/sh", "-c", "seq 200000; printf '\\377\\0 end' | od -An -c")
        assert status.ok
        assert out.startswith("1\n2\n")
        assert out.count("\n") == 200_001
        # both sides closed by a program that runs on: its end counts
        began = time.monotonic()
        status, _, _ = await guest.run("/bin/sh", "-c", "exec >&- 2>&-; sleep 0.5; exit 3")
        assert status == ExitStatus(3)
        assert time.monotonic() - began > 0.5


@trio_test
async def test_programs_that_cannot_be_started(engine: LocalEngine, package: Path) -> None:
    async with open_guest(engine, package) as guest:
        status, out, _ = await guest.run("nope")
        assert (status.code, out) == (127, "")
        assert "executable file not found" in (status.reason or "")
        status, _, _ = await guest.run("/etc")
        assert status.code == 126
        assert "permission denied" in (status.reason or "")
        for words in (["a\0b"], ["x"] * 5000):
            with pytest.raises(RuntimeFault):
                await guest.run("echo", *words)
        with pytest.raises(RuntimeFault, match="environment variable"):
            await guest.run("true", env={"A=B": "c"})
        with pytest.raises(RuntimeFault, match="already"):
            await guest.runtime.start([])
        with pytest.raises(RuntimeFault, match="already"):
            await guest.runtime.deploy(package, DeployOptions(Path("/none")))


@trio_test
async def test_bad_wishes_at_deploy_leave_nothing(engine: LocalEngine, package: Path) -> None:
    for options, text in (
        ({"hostname": "no/host"}, "host name"),
        ({"hosts": {"a": "1.2.3"}}, "not an address"),
        ({"hosts": {"a b": "1.2.3.4"}}, "host name"),
        ({"env": {"": "x"}}, "environment"),
        ({"volumes": (VolumeRequest("/proc/x"),)}, "cannot be at"),
        ({"volumes": (VolumeRequest("/"),)}, "cannot be at"),
        ({"volumes": (VolumeRequest("/v", "storage", 1 << 40),)}, "more than"),
    ):
        with pytest.raises(RuntimeFault, match=text):
            async with open_guest(engine, package, **options):
                pass


# -- processes


@trio_test
async def test_what_a_command_leaves_in_the_background_lives_on(engine: LocalEngine, package: Path) -> None:
    async with open_guest(engine, package, start=["service"]) as guest:
        began = time.monotonic()
        loop = "(while true; do echo x >> /data/ticks; echo x; sleep 0.1; done) & echo left"
        status, out, _ = await guest.run("/bin/sh", "-c", loop)
        assert status.ok
        assert "left\n" in out
        assert time.monotonic() - began < patience(10)  # although the loop holds our output
        await guest.says("(sleep 1000 </dev/null >/dev/null 2>&1 &)")
        # a command that is stopped takes what it started with it, however it hid, and nothing else
        script = "setsid sh -c 'sleep 2001 & setsid sleep 2002 & sleep 2003' & (setsid sleep 2004 &) ; exec sleep 2005"
        with trio.move_on_after(1):
            await guest.run("/bin/sh", "-c", script)
        assert await guest.says("ps -o args | grep -c '[s]leep 200[1-5]' || true") == "0"
        assert await guest.says("ps -o args | grep -c '[s]leep 1000'") == "1"
        ticks = int(await guest.says("wc -l < /data/ticks"))
        await guest.until(f"test $(wc -l < /data/ticks) -gt {ticks + 2}")
        # no zombies: process 1 reaps what falls to it
        await guest.says("for n in 1 2 3 4 5; do (sh -c 'sleep 0.05 &' &); done; sleep 0.3")
        assert await guest.says("ps -o stat | grep -c Z || true") == "0"
        # and the guest cannot end it
        await guest.run("/bin/sh", "-c", "kill -TERM 1; kill -KILL 1; kill -INT 1")
        assert await guest.says("echo there") == "there"


@trio_test
async def test_start_with_arguments_starts_the_entrypoint(engine: LocalEngine, tmp_path: Path) -> None:
    root = busybox_tar({"bin/serve": b'#!/bin/sh\necho "$@" > /state\nexec sleep 3000\n'})
    config = {"Entrypoint": ["/bin/serve"], "Env": ["PATH=/bin"]}
    (tmp_path / "image.tar").write_bytes(docker_archive([root], image_json([root], config)))
    async with open_guest(engine, tmp_path / "image.tar", start=["one", "two"]) as guest:
        await guest.until("test -s /state")
        assert await guest.says("cat /state; ps -o args | grep -c '[s]leep 3000'") == "one two\n1"


@trio_test
async def test_limits_of_one_command(engine: LocalEngine, package: Path) -> None:
    async with open_guest(engine, package, Limits(1, 0.0625, 1 / 32, run_time_s=1.0)) as guest:
        began = time.monotonic()
        status, out, _ = await guest.run("/bin/sh", "-c", "echo begun; sleep 60")
        assert (status, out) == (ExitStatus(137, "time limit of 1 s reached"), "begun\n")
        assert time.monotonic() - began < patience(4)
    async with open_guest(engine, package, Limits(1, 0.0625, 1 / 32, cpu_time_s=0.4, output_bytes=100_000)) as guest:
        status, out, _ = await guest.run("yes")
        assert status == ExitStatus(137, "output limit of 100000 bytes reached")
        assert 0 < len(out) <= 100_000
        status, _, _ = await guest.run("/bin/sh", "-c", "while :; do :; done")
        assert status == ExitStatus(137, "CPU time limit of 0.4 s reached")
        status, _, _ = await guest.run("/bin/sh", "-c", "exec tail -c 200000000 /dev/zero")
        assert (status.code, "memory limit of 0.0625 GiB" in (status.reason or "")) == (137, True)
        assert await guest.says("ps -o args | grep -c -e '[t]ail' -e '[y]es' || true") == "0"
        used = guest.runtime.usage()
        assert used.cpu_sec > 0.4
        assert 0.05 < used.gib < 0.0626


@trio_test
async def test_a_slow_reader_slows_the_guest(engine: LocalEngine, package: Path) -> None:
    async with open_guest(engine, package) as guest:
        released, began = trio.Event(), trio.Event()

        async def slow(side: Side, chunk: bytes) -> None:
            began.set()
            await released.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.runtime.run, "/bin/sh", ["-c", "dd if=/dev/zero bs=64k count=400; echo > /data/done"], slow)
            await began.wait()
            await trio.sleep(0.3)
            assert (await guest.run("test", "-e", "/data/done"))[0] == ExitStatus(1)
            released.set()


# -- death


@pytest.mark.parametrize("how", ["killed", "removed"])
def test_a_container_that_dies_is_told(engine: LocalEngine, package: Path, how: str) -> None:
    async def body() -> None:
        async with open_guest(engine, package) as guest:
            container = await guest.container()
            with within(10):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_die_soon, engine, container, how)
                    with pytest.raises(RuntimeFault, match="from outside") as caught:
                        await guest.run("sleep", "60")
                await guest.failed.wait()
            assert guest.failures == [str(caught.value)]
            with pytest.raises(RuntimeFault, match="from outside"):
                await guest.run("true")

    trio.run(body)


async def _die_soon(engine: LocalEngine, container: str, how: str) -> None:
    await trio.sleep(0.3)
    client = admin(engine)
    if how == "killed":
        client.kill(container)
    else:
        client.remove_container(container, force=True)
    client.close()


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_stops_is_told_and_nothing_runs_on(
    package: Path, sign: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "AWAY_S", 3.0)  # it is waited for no longer than that here

    async def body(engine: LocalEngine) -> None:
        process = engine._process
        assert process is not None
        told: list[str] = []

        async def command(guest: Guest) -> None:
            try:
                await guest.run("sleep", "60")
            except RuntimeFault as fault:
                told.append(str(fault))

        async with open_guest(engine, package) as guest:
            pid = guest.runtime._inside.pid  # type: ignore[union-attr]
            with within(40):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(command, guest)
                    await trio.sleep(0.3)
                    process.send_signal(sign)
                    await guest.failed.wait()
                    await trio.sleep(0.1)
                    nursery.cancel_scope.cancel()  # as a unit does
            [text] = guest.failures
            assert text == ENGINE_GONE or (sign == signal.SIGTERM and "from outside" in text)
            assert told == ([] if sign == signal.SIGSTOP else [text])
            engine._process, began = None, time.monotonic()  # no more questions to it
        engine._process = process
        assert time.monotonic() - began < patience(5)
        with within(5):
            while os.path.exists(f"/proc/{pid}"):
                await trio.sleep(0.02)
        process.send_signal(signal.SIGCONT)
        volumes = str(engine.folder / "data" / "100000.100000" / "volumes")
        assert [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if volumes in line] == []

    with tempfile.TemporaryDirectory(prefix="engine-") as folder, engine_for_tests(Path(folder) / "e", userns=True) as engine:
        trio.run(body, engine)


def test_an_engine_that_is_restarted_is_cleaned_up(package: Path) -> None:
    async def body(engine: LocalEngine) -> None:
        async with open_guest(engine, package) as guest:
            pid = guest.runtime._inside.pid  # type: ignore[union-attr]
            await trio.to_thread.run_sync(engine.stop)
            await trio.to_thread.run_sync(engine.start)
            with within(10):
                await guest.failed.wait()
            with pytest.raises(RuntimeFault):
                await guest.run("true")
        # open_guest finds no container, volume, mount or file; and the Engine may have lost sight of the process
        with within(5):
            while os.path.exists(f"/proc/{pid}"):
                await trio.sleep(0.02)

    with tempfile.TemporaryDirectory(prefix="engine-") as folder, engine_for_tests(Path(folder) / "e", userns=True) as engine:
        trio.run(body, engine)


# -- interaction


async def heard(terminal: Terminal, until: bytes) -> bytes:
    """Read a terminal until something has come."""
    found = b""
    with within(10):
        while until not in found:
            part = await terminal.receive()
            assert part is not None, found
            found += part[1]
    return found


@trio_test
async def test_a_terminal(engine: LocalEngine, package: Path) -> None:
    async with open_guest(engine, package) as guest:
        terminal = await guest.runtime.open_terminal((), env={"X": "y"}, tty=True, rows=30, cols=100)
        await terminal.send(b"stty size; echo $X$TERM; id -u\n")
        text = await heard(terminal, b"1000\r\n")
        assert b"30 100" in text
        assert b"yxterm" in text
        await terminal.resize(11, 22)
        await terminal.send(b"stty size\n")
        await heard(terminal, b"11 22")
        await terminal.send(b"sleep 100\n")
        await heard(terminal, b"sleep 100\r\n")
        await guest.until("ps -o args | grep -q '[s]leep 100'")
        await terminal.send(b"\x03")
        await terminal.send(b"exit 7\n")
        with within(10):
            while await terminal.receive() is not None:
                pass
            assert await terminal.wait() == ExitStatus(7)
        await terminal.send(b"too late")
        await terminal.aclose()


@trio_test
async def test_a_program_with_input_and_one_that_is_hung_up(engine: LocalEngine, package: Path) -> None:
    async with open_guest(engine, package) as guest:
        terminal = await guest.runtime.open_terminal(["sh", "-c", "wc -c; echo e >&2"], env=None, tty=False, rows=0, cols=0)
        await terminal.send(b"x" * 100_000)
        await terminal.end_input()
        parts = []
        with within(10):
            while (part := await terminal.receive()) is not None:
                parts.append(part)
            assert await terminal.wait() == ExitStatus(0)
        await terminal.aclose()
        assert sorted(parts) == [("stderr", b"e\n"), ("stdout", b"100000\n")]
        terminal = await guest.runtime.open_terminal(["sh", "-c", "sleep 400 & sleep 401"], env=None, tty=True, rows=9, cols=9)
        await guest.until("test $(ps -o args | grep -c '[s]leep 40[01]') = 2")
        # a command that is stopped meanwhile spares it
        with trio.move_on_after(0.3):
            await guest.run("sleep", "402")
        assert await guest.says("ps -o args | grep -c '[s]leep 40'") == "2"
        await terminal.aclose()
        await guest.until("! ps -o args | grep -q '[s]leep 40'")
        await terminal.aclose()
        terminal = await guest.runtime.open_terminal(["nope"], env=None, tty=False, rows=0, cols=0)
        assert await terminal.receive() is None
        status = await terminal.wait()
        assert "not found" in (status.reason or "")


@trio_test
async def test_connections_to_a_service_inside(engine: LocalEngine, plain_package: Path) -> None:
    async with open_guest(engine, plain_package) as guest:
        await guest.says("mkdir /www; echo page > /www/index.html")
        await guest.says("httpd -p 127.0.0.1:8080 -h /www")
        with within(10):
            stream = await guest.runtime.connect(8080)
            await stream.send_all(b"GET /index.html HTTP/1.0\r\n\r\n")
            assert b"page\n" in b"".join([chunk async for chunk in stream])
        for port, problem in ((8082, "nothing listens"), (0, "not a port"), (70000, "not a port")):
            with pytest.raises(RuntimeFault, match=problem):
                await guest.runtime.connect(port)


# -- Engines


@trio_test
async def test_self_test_and_what_an_engine_without_remapped_ids_does(plain_engine: LocalEngine, package: Path) -> None:
    assert await VmRuntime(plain_engine.folder / "cache", plain_engine.host).self_test() is None
    async with open_guest(plain_engine, package) as guest:
        assert await guest.says("id -u; cat /data/seed; cat /proc/self/uid_map") == (
            "1000\nfrom the image\n         0          0 4294967295"
        )
        assert await guest.says("grep -e CapEff -e CapBnd -e NoNewPrivs -e Seccomp: /proc/self/status") == (
            "CapEff:\t0000000000000000\nCapBnd:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2"
        )


@trio_test
async def test_self_test_says_why_not(engine: LocalEngine, tmp_path: Path) -> None:
    assert await VmRuntime(tmp_path, engine.host).self_test() is None
    client = admin(engine)
    assert client.images("golem-self-test", all=True) == []
    assert client.containers(all=True, filters={"name": "golem-self-test"}) == []
    client.close()
    nowhere = await VmRuntime(tmp_path, f"unix://{tmp_path}/docker.sock").self_test()
    assert nowhere == f"the Docker Engine at {tmp_path}/docker.sock does not answer: No such file or directory"
    with pytest.raises(ValueError, match="unix://"):
        VmRuntime(tmp_path, "tcp://127.0.0.1:2375")


@trio_test
async def test_self_test_notices_an_open_door(engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "archMap": [], "syscalls": []})
    monkeypatch.setattr("golem.exeunit.runtimes.vm.container.profile", lambda inotify: everything)
    problem = await VmRuntime(tmp_path, engine.host).self_test()
    assert problem is not None
    assert "AF_VSOCK" in problem or "io_uring" in problem or "i386" in problem


# -- the whole exe-unit


@trio_test
async def test_a_unit_process_with_a_container(engine: LocalEngine, package: Path, tmp_path: Path) -> None:
    async with two_nodes(tmp_path) as (a, b, nursery):
        w = World(tmp_path, a, b, nursery)
        await w.begin(package)
        (tmp_path / "in").write_bytes(os.urandom(3 << 20))
        w.files.offer("in", FileSource(tmp_path / "in"), "test")
        w.files.offer("slot", FileSink(tmp_path / "out"), "test")
        began = time.monotonic()
        process = await w.start("vm", engine.host)
        await w.state("Initialized")
        print(f"Initialized after {time.monotonic() - began:.2f} s")
        results = w.results(await w.exec(
            {"deploy": {"volumes": {"/out": {"host": {}}}, "env": {"A": "b"}}},
            {"start": {}},
            {"transfer": {"from": f"gftp://{REQUESTOR}/in", "to": "container:/data/in"}},
            {"run": {"entry_point": "/bin/sh", "args": ["-c", "sha256sum < /data/in; cp /data/in /out/copy; echo $A >&2"],
                     "capture": {"stdout": {"atEnd": {}}, "stderr": {"stream": {}}}}},
            {"transfer": {"from": "container:/out/copy", "to": f"gftp://{REQUESTOR}/slot"}},
        ))  # fmt: skip
        assert [(row.ok, row.message) for row in results] == [(True, None)] * 5
        digest = hashlib.sha256((tmp_path / "in").read_bytes()).hexdigest()
        assert (results[3].stdout, results[3].stderr) == (f"{digest}  -\n", "b\n")
        assert hashlib.sha256((tmp_path / "out").read_bytes()).hexdigest() == digest
        hanging = await w.exec({"run": {"entry_point": "sleep", "args": ["60"]}}, wait=False)
        await trio.sleep(0.3)
        client = admin(engine)
        [found] = client.containers(filters={"label": f"golem.activity={ACTIVITY}"})
        began = time.monotonic()
        client.kill(found["Id"])
        await w.state("Terminated")
        assert time.monotonic() - began < patience(10)
        row = w.row(w.requestor)
        assert row.reason == "Runtime lost"
        assert row.error_message == "the container was ended from outside (exit code 137)"
        await w.until(lambda: w.batch(hanging).finished)
        assert row.error_message in (w.results(hanging)[-1].message or "")
        with within(10):
            assert await process.wait() == 1
        assert client.containers(all=True, filters={"label": f"golem.activity={ACTIVITY}"}) == []
        client.close()
        assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
        nursery.cancel_scope.cancel()


@trio_test
async def test_a_unit_process_that_was_killed_is_swept(engine: LocalEngine, package: Path, tmp_path: Path) -> None:
    async with two_nodes(tmp_path) as (a, b, nursery):
        w = World(tmp_path, a, b, nursery)
        await w.begin(package)
        process = await w.start("vm", engine.host)
        await w.exec({"deploy": {}}, {"start": {}})
        process.kill()
        await process.wait()
        client, label = admin(engine), {"label": f"golem.activity={ACTIVITY}"}
        assert len(client.containers(filters=label)) == 1
        await VmRuntime(tmp_path / "cache", engine.host).sweep(tmp_path / "work")
        assert client.containers(all=True, filters=label) == []
        assert (client.volumes(label)["Volumes"] or []) == []
        client.close()
        assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
        nursery.cancel_scope.cancel()


@trio_test
async def test_destroyed_from_the_requestor_in_the_middle(engine: LocalEngine, package: Path, tmp_path: Path) -> None:
    async with two_nodes(tmp_path) as (a, b, nursery):
        w = World(tmp_path, a, b, nursery)
        await w.begin(package)
        process = await w.start("vm", engine.host)
        await w.exec({"deploy": {}}, {"start": {}})
        sleeping = await w.exec({"run": {"entry_point": "sleep", "args": ["60"]}}, wait=False)
        await w.exec({"terminate": {}})
        await w.until(lambda: w.batch(sleeping).finished)
        assert w.results(sleeping)[-1].message == "stopped by a terminate command"
        await w.state("Initialized")
        again = await w.exec({"deploy": {}}, {"start": {}}, {"run": {"entry_point": "true"}})
        assert [(row.ok, row.message) for row in w.results(again)] == [(True, None)] * 3
        await w.exec({"run": {"entry_point": "sleep", "args": ["60"]}}, wait=False)
        await w.requestor.ask("activity", DestroyActivity(ACTIVITY))
        process.send_signal(signal.SIGTERM)
        with within(5):
            assert await process.wait() == 0
        client = admin(engine)
        assert client.containers(all=True, filters={"label": f"golem.activity={ACTIVITY}"}) == []
        client.close()
        nursery.cancel_scope.cancel()
