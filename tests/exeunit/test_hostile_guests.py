"""Hostile guests of the runtime `vm` on real Engines: what they try is refused, what they use up is theirs alone."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from foreign_images import docker_archive, entry, image_json, tar
from hostile_guest import ATTACKS
from worlds.engine import busybox_tar, engine_for_tests, python_tar
from worlds.patience import patience, within
from worlds.support import trio_test

from golem.exeunit.runtime import Deployment, DeployOptions, ExitStatus, Limits, Runtime, RuntimeFault, Side, VolumeRequest
from golem.exeunit.runtimes import make_runtime
from golem.exeunit.runtimes.vm.container import PROCESSES, capability_mask
from golem.exeunit.transfer.transfers import TransferError, TransferPolicy, Transfers
from golem.lab.engine import LocalEngine

pytestmark = [pytest.mark.root, pytest.mark.integration]

MIB = 1 << 20
PYTHON = "/opt/py/bin/python3"
PROGRAM = Path(__file__).with_name("hostile_guest.py").read_text()
LIMITS = Limits(cpu_threads=1, mem_gib=128 / 1024, storage_gib=64 / 1024, run_time_s=20)
# Not among them: EFAULT, EINVAL and what else says that the kernel had begun to listen.
REFUSALS = {
    "EPERM", "EACCES", "EROFS", "ENOENT", "ENOSYS", "ENODATA", "ENETUNREACH", "EADDRNOTAVAIL", "ECONNREFUSED",
    "EAFNOSUPPORT", "EPROTONOSUPPORT", "SIGSYS", "alive", "few", "lo",
}  # fmt: skip


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system with Python, as a task package."""
    path = tmp_path_factory.mktemp("packages") / "python.tar"
    path.write_bytes(python_tar())
    return path


class Guest:
    """One activity with a hostile program in it."""

    def __init__(self, runtime: Runtime, deployment: Deployment) -> None:
        self.runtime, self.deployment = runtime, deployment

    async def run(self, *argv: str) -> tuple[ExitStatus, str]:
        """Run a program; its end and its output (both sides)."""
        output: list[bytes] = []

        async def keep(side: Side, chunk: bytes) -> None:
            output.append(chunk)

        status = await self.runtime.run(argv[0], argv[1:], keep)
        return status, b"".join(output).decode(errors="replace")

    async def attack(self, name: str, *arguments: str) -> tuple[ExitStatus, str]:
        """Run a function of `hostile_guest`."""
        return await self.run(PYTHON, "-I", "-S", "-c", PROGRAM, name, *arguments)

    async def works(self) -> None:
        """Check that an ordinary command still does what it should."""
        assert await self.run("/bin/echo", "hello") == (ExitStatus(0), "hello\n")


@asynccontextmanager
async def open_guest(
    engine: LocalEngine,
    package: Path,
    limits: Limits = LIMITS,
    volumes: tuple[VolumeRequest, ...] = (VolumeRequest("/vol"),),
    start: tuple[str, ...] = (),
) -> AsyncIterator[Guest]:
    """Deploy and start an activity on an Engine, and stop it at the end of the block."""
    before, os.environ["DOCKER_HOST"] = os.environ.get("DOCKER_HOST"), engine.host
    with tempfile.TemporaryDirectory(prefix="guest-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        work = folder / "work"
        work.mkdir(mode=0o711)
        runtime = make_runtime("vm", engine.folder / "cache")
        try:
            options = DeployOptions(work, limits, volumes=volumes, activity_id=uuid.uuid4().hex)
            deployment = await runtime.deploy(package, options)
            await runtime.start(start)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(runtime.failure)  # as an exe-unit does, which also takes the samples
                yield Guest(runtime, deployment)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await runtime.stop()
            if before is None:
                del os.environ["DOCKER_HOST"]
            else:
                os.environ["DOCKER_HOST"] = before


# -- what is refused --------------------------------------------------------------------------------------------------


@contextmanager
def listeners() -> Iterator[tuple[int, str]]:
    """Sockets of this machine that the guest must not reach: a TCP port and an abstract name."""
    name = f"golem-test-{uuid.uuid4().hex}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0" + name)
        abstract.listen()
        yield tcp.getsockname()[1], name


async def _attacked(engine: LocalEngine, package: Path) -> dict[str, Any]:
    with listeners() as (port, name):
        async with open_guest(engine, package) as guest:
            status, output = await guest.attack("attacks", str(port), name)
            await guest.works()  # also after an attempt to kill its first process
    assert status.ok, output
    found: dict[str, Any] = json.loads(output)
    return found


@pytest.fixture(scope="module", params=["remapped", "plain"])
def attacked(request: pytest.FixtureRequest, package: Path) -> dict[str, Any]:
    """What one guest that tries everything got, on each kind of Engine."""
    engine = request.getfixturevalue("engine" if request.param == "remapped" else "plain_engine")
    return {**trio.run(_attacked, engine, package), "remapped": request.param == "remapped"}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_is_refused(attacked: dict[str, Any], attack: str) -> None:
    assert attacked["attacks"][attack] in REFUSALS


def test_audit_is_not_there_rather_than_forbidden(attacked: dict[str, Any]) -> None:
    """useradd and groupadd end where it is forbidden, and so does every package that brings a user."""
    assert attacked["attacks"]["socket audit"] == "EPROTONOSUPPORT"


def test_guest_has_rights_over_its_own_ids_alone(attacked: dict[str, Any]) -> None:
    status = attacked["status"]
    own = capability_mask(1) if attacked["remapped"] else 0
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) & ~own == 0, name
    assert int(status["CapEff"], 16) == own
    assert own in (0, 0b11011011), "CHOWN DAC_OVERRIDE FOWNER FSETID SETGID SETUID"
    assert set(attacked["own"].values()) == {"done" if own else "EPERM"}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert (int(attacked["uid_map"][1]) > 0) == attacked["remapped"]


@trio_test
async def test_harmless_programs_run(engine: LocalEngine, package: Path) -> None:
    async with open_guest(engine, package) as guest:
        expected = "thread thread thread thread subprocess 55 over TCP alarm lo\n"
        assert await guest.attack("ordinary") == (ExitStatus(0), expected)


@trio_test
async def test_guest_does_not_change_its_image(engine: LocalEngine, package: Path) -> None:
    async with open_guest(engine, package) as guest:
        status, output = await guest.run("/bin/sh", "-c", "rm /bin/echo && echo x > /evil && ls /evil")
        assert status.ok, output
    async with open_guest(engine, package) as other:
        await other.works()
        status, _ = await other.run("/bin/ls", "/evil")
        assert not status.ok


def _with_links(links: dict[str, str]) -> bytes:
    """A root file system in which some names lead elsewhere."""
    out = io.BytesIO(busybox_tar())
    with tarfile.open(fileobj=out, mode="a") as archive:
        for name, target in links.items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            archive.addfile(link)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["remapped", "plain"])
def test_image_whose_mount_points_lead_out(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    engine = request.getfixturevalue("engine" if kind == "remapped" else "plain_engine")
    outside, name = Path(tempfile.gettempdir()) / f"golem-{uuid.uuid4().hex}", "package.tar"
    (tmp_path / name).write_bytes(_with_links({".golem": "/../../../../../tmp", "vol": f"../../../../../..{outside}"}))

    async def body() -> None:
        with suppress(RuntimeFault):  # that is a good end, too
            async with open_guest(engine, tmp_path / name) as guest:
                await guest.works()
                await guest.run("/bin/sh", "-c", f"echo x > /vol/escaped; mkdir -p {outside}; echo x > {outside}/escaped")

    trio.run(body)
    assert not outside.exists()
    assert not (Path(tempfile.gettempdir()) / "init").exists()


@pytest.mark.parametrize("descriptor", [7, 8])
def test_working_directory_that_leads_out(engine: LocalEngine, tmp_path: Path, descriptor: int) -> None:
    """Old versions of runc kept a descriptor of the machine open while they went there."""
    (tmp_path / "secret").write_text("of the machine")
    rootfs = _with_links({"work": f"/proc/self/fd/{descriptor}"})
    config = image_json([rootfs], {"WorkingDir": "/work", "Env": ["PATH=/bin"]})
    (tmp_path / "package.tar").write_bytes(docker_archive([rootfs], config))
    said: list[str] = []

    async def body() -> None:
        with suppress(RuntimeFault):
            async with open_guest(engine, tmp_path / "package.tar", volumes=()) as guest:
                _, output = await guest.run("/bin/cat", f"../../../../../../../../../..{tmp_path}/secret")
                said.append(output)

    trio.run(body)
    assert not any("of the machine" in output for output in said)


# -- what is used up --------------------------------------------------------------------------------------------------


def test_fork_bomb(engine: LocalEngine, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("golem.exeunit.runtimes.vm.container.PROCESSES", 128)  # fewer than usual are as good, and sooner there

    async def body() -> None:
        async with open_guest(engine, package) as guest:
            with within(20):
                _, output = await guest.attack("fork_bomb")
                count, error = output.split()
                assert error == "EAGAIN"
                assert 64 < int(count) < 128
                with suppress(RuntimeFault):  # what its own processes take is its own fault; but there is an answer
                    await guest.run("/bin/echo", "hello")
            began = time.monotonic()
        assert time.monotonic() - began < patience(5), "all of them die at once"

    trio.run(body)


@trio_test
async def test_a_command_that_meets_the_process_limit_says_so(engine: LocalEngine, package: Path) -> None:
    async with open_guest(engine, package) as guest:
        script = "i=0; while [ $i -lt 600 ]; do sleep 1000 & i=$((i+1)); done; wait"
        status, output = await guest.run("/bin/sh", "-c", script)
        assert not status.ok
        assert status.reason == f"process limit of {PROCESSES} reached", output[-300:]
    async with open_guest(engine, package) as guest:
        status, _ = await guest.run("/bin/false")
        assert (status.code, status.reason) == (1, None)


@pytest.mark.parametrize("where", ["command", "service"])
def test_memory_bomb(engine: LocalEngine, package: Path, where: str) -> None:
    async def body() -> None:
        bomb = (PYTHON, "-I", "-S", "-c", PROGRAM, "memory_bomb")
        async with open_guest(engine, package, start=bomb if where == "service" else ()) as guest:
            with within(20):
                if where == "command":
                    status, _ = await guest.run(*bomb)
                    assert status.code == 137
                    assert "memory" in (status.reason or "")
                else:
                    while guest.runtime.usage().gib < LIMITS.mem_gib * 0.9:
                        await trio.sleep(0.05)
                await guest.works()
            assert LIMITS.mem_gib * 0.9 < guest.runtime.usage().gib <= LIMITS.mem_gib * 1.02

    trio.run(body)


@trio_test
async def test_every_place_to_write_has_an_end(engine: LocalEngine, package: Path) -> None:
    volumes = (VolumeRequest("/vol"), VolumeRequest("/ram", "ram", 4 * MIB), VolumeRequest("/own", "storage", 8 * MIB))
    async with open_guest(engine, package, volumes=volumes) as guest:
        # /opt is on the container's own layer, which shares the storage limit with /vol
        status, output = await guest.attack("fill", "/ram", "/own", "/dev/shm", "/tmp", "/opt", "/vol")
        assert status.ok, output
        found = {folder: (int(mib), error) for folder, mib, error in map(str.split, output.splitlines())}
        assert {error for _, error in found.values()} == {"ENOSPC"}, found
        assert found["/ram"][0] == 4
        assert found["/own"][0] < 8
        assert sum(found[folder][0] for folder in ("/own", "/opt", "/vol")) <= 64
        storage_gib = guest.runtime.usage().storage_gib
        assert 0.75 * LIMITS.storage_gib < storage_gib <= LIMITS.storage_gib
        await guest.works()


NO_BYTES = {"proc", "sysfs", "devpts", "cgroup", "cgroup2", "devtmpfs", "mqueue"}  # what lies there are no files with content


@pytest.mark.parametrize("kind", ["remapped", "plain"])
def test_every_writable_mount_is_in_what_was_sold(request: pytest.FixtureRequest, package: Path, kind: str) -> None:
    """Whatever an Engine mounts into a container: it takes no bytes, is memory of the guest, or lies on its storage."""
    engine = request.getfixturevalue("engine" if kind == "remapped" else "plain_engine")

    async def body() -> None:
        async with open_guest(engine, package) as guest:
            storage = os.stat(guest.deployment.volumes[0].host_dir).st_dev
            status, output = await guest.attack("writable_mounts")
            assert status.ok, output
            found = {point: tuple(rest) for point, *rest in json.loads(output)}
            assert {"/", "/vol", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf"} <= found.keys()
            for point, (form, device, written, error) in found.items():
                if form == "tmpfs":
                    assert written <= LIMITS.mem_bytes, (point, written)
                elif form in NO_BYTES:
                    assert not written or Path(point).is_char_device(), (point, written)
                else:
                    assert error == "ENOSPC", (point, found[point])
                    assert written <= LIMITS.storage_bytes, (point, written)
                    assert form == "overlay" or device == f"{os.major(storage)}:{os.minor(storage)}", (point, found[point])
            assert guest.runtime.usage().storage_gib <= LIMITS.storage_gib
            await guest.works()

    trio.run(body)


@trio_test
async def test_names_of_the_machine_are_there(engine: LocalEngine, package: Path) -> None:
    """What is ours in place of the Engine's own: names resolve, and the files can be written."""
    with pytest.raises(RuntimeFault, match="a volume cannot be at /etc/hosts"):
        async with open_guest(engine, package, volumes=(VolumeRequest("/etc/hosts"),)):
            pass
    async with open_guest(engine, package, volumes=(VolumeRequest("/etc"),)) as guest:
        script = "hostname | cmp - /etc/hostname && grep -c localhost /etc/hosts && echo x >> /etc/hosts && cat /etc/resolv.conf"
        assert await guest.run("/bin/sh", "-c", script) == (ExitStatus(0), "2\n# no network\n")


@pytest.mark.parametrize(("attack", "folder", "least"), [("fill_hidden", "/opt", 40), ("many_files", "/vol", 1000)])
def test_storage_without_names_or_bytes(engine: LocalEngine, package: Path, attack: str, folder: str, least: int) -> None:
    async def body() -> None:
        async with open_guest(engine, package) as guest:
            _, output = await guest.attack(attack, folder)
            count, error = output.split()
            assert error == "ENOSPC"
            assert least <= int(count) < 100_000
            await guest.works()

    trio.run(body)


@pytest.mark.parametrize("reach", [True, False])
def test_storage_where_the_engine_copies_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reach: bool) -> None:
    """There is no layer that could be held: it is measured (out of `reach` by the Engine), and the exe-unit ends what goes
    beyond.
    """
    if not reach:
        monkeypatch.setattr("golem.exeunit.runtimes.vm.meter._whole_root", lambda pid: None)
    package = tmp_path / "busybox.tar"
    package.write_bytes(busybox_tar())

    async def body(engine: LocalEngine) -> None:
        async with open_guest(engine, package) as guest:
            assert guest.runtime.usage().storage_gib < 0.01
            status, output = await guest.run("/bin/dd", "if=/dev/zero", "of=/tmp/fill", "bs=1M", "count=80")
            assert status.ok, output
            with within(10):
                while guest.runtime.usage().storage_gib <= LIMITS.storage_gib:
                    await trio.sleep(0.05)

    monkeypatch.setattr("golem.lab.engine.DRIVERS", ("vfs",))
    with tempfile.TemporaryDirectory(prefix="engine-") as folder, engine_for_tests(Path(folder) / "e", userns=True) as engine:
        trio.run(body, engine)


@trio_test
async def test_cpu_is_shared_out(engine: LocalEngine, package: Path) -> None:
    async with open_guest(engine, package) as guest:
        before = guest.runtime.usage().cpu_sec
        began = time.monotonic()
        status, output = await guest.attack("spin", "6", "1.5")
        took_s = time.monotonic() - began
        assert status.ok, output
        used_s = guest.runtime.usage().cpu_sec - before
    assert used_s <= took_s * LIMITS.cpu_threads * 1.15, "six processes on one granted CPU"
    assert used_s > 0.3, "what they used is counted"


@trio_test
async def test_flood_of_output(engine: LocalEngine, package: Path) -> None:
    async with open_guest(engine, package, Limits(1, 128 / 1024, 64 / 1024, output_bytes=MIB)) as guest:
        with within(15):
            status, output = await guest.run("/bin/yes")
            assert not status.ok
            assert "output" in (status.reason or "")
            assert len(output) <= MIB
            await guest.works()
            status, _ = await guest.run("/bin/pidof", "yes")
            assert not status.ok, "it was killed"


@trio_test
async def test_nothing_survives_a_timeout(engine: LocalEngine, package: Path) -> None:
    async with open_guest(engine, package, Limits(1, 128 / 1024, 64 / 1024, run_time_s=1.5)) as guest:
        with within(15):
            status, output = await guest.attack("survivor", "/vol/beat")
            assert not status.ok
            assert output == "planted\n"
        beat = guest.deployment.volumes[0].host_dir / "beat"
        await trio.sleep(0.1)
        last = beat.read_text()
        await trio.sleep(0.3)
        assert beat.read_text() == last, "a process in a session of its own, deaf to signals, is gone, too"
        await guest.works()


@pytest.mark.parametrize("kind", ["remapped", "plain"])
@pytest.mark.parametrize("way", ["command", "terminal"])
def test_a_guest_in_the_engines_way_is_dead(
    request: pytest.FixtureRequest, package: Path, kind: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who starts a program looks into the guest's /etc/passwd, and would wait there for good: nobody waits with it."""
    engine = request.getfixturevalue("engine" if kind == "remapped" else "plain_engine")
    monkeypatch.setattr("golem.exeunit.runtimes.vm.program.START_TIMEOUT_S", 3.0)

    async def body() -> None:
        async with open_guest(engine, package) as guest, open_guest(engine, package) as other:
            status, output = await guest.run("/bin/sh", "-c", "rm /etc/passwd && mkfifo /etc/passwd")
            assert status.ok, output

            async def begin() -> None:
                if way == "command":
                    await guest.run("/bin/true")
                else:
                    await guest.runtime.open_terminal((), env=None, tty=True, rows=24, cols=80)

            with within(10), pytest.raises(RuntimeFault, match="begins no programs any more"):
                await begin()
            with within(10):
                assert "begins no programs" in await guest.runtime.failure()
            with pytest.raises(RuntimeFault, match="begins no programs any more"):
                await guest.run("/bin/true")
            await other.works()
            with within(5):
                await guest.runtime.stop()

    trio.run(body)


HELD = """
mv /etc /away && mkdir /etc; rm -f /etc/passwd; mkfifo /etc/passwd
mv -f /var/other /etc/passwd; ln -sf /dev/zero /etc/group; echo x > /etc/passwd
"""


@pytest.mark.parametrize("kind", ["remapped", "plain"])
@pytest.mark.parametrize("form", ["plain", "all his", "links", "nothing"])
def test_files_of_users_are_kept_from_the_user(request: pytest.FixtureRequest, tmp_path: Path, kind: str, form: str) -> None:
    """The Engine reads them at each command of an image with a user, whatever stands there."""
    engine = request.getfixturevalue("engine" if kind == "remapped" else "plain_engine")
    owner, both = 0 if form == "plain" else 1000, ("passwd", "group")
    changed = {
        "links": [entry(f"etc/{name}", type=tarfile.SYMTYPE, linkname=f"../var/{name}") for name in both],
        "nothing": [entry(f"etc/.wh.{name}", b"") for name in both],
    }
    own = tar(
        *(entry(name, type=tarfile.DIRTYPE, uid=owner, gid=owner, mode=0o775) for name in ("./", "etc", "var")),
        *(entry(f"var/{name}", b"guest:x:1000:1000::/:\n", uid=owner) for name in ("other", *both)),
        *changed.get(form, ()),
    )
    layers = [busybox_tar(), own]
    config = {"Env": ["PATH=/bin"], "User": "guest" if form in ("plain", "all his") else "1000"}
    (tmp_path / "package.tar").write_bytes(docker_archive(layers, image_json(layers, config)))

    async def body() -> None:
        async with open_guest(engine, tmp_path / "package.tar", volumes=()) as guest:
            _, said = await guest.run("/bin/sh", "-c", HELD)
            status, after = await guest.run("/bin/stat", "-c", "%F %u", "/etc/passwd", "/etc/group")
            kinds = ["regular empty file 0" if form == "nothing" else "regular file 0"] * 2
            assert (after.splitlines(), status.ok) == (kinds, True), said
            assert (await guest.run("/bin/id", "-u"))[1] == "1000\n"
            assert not (await guest.run("/bin/ls", "-d", "/away"))[0].ok
            if form == "all his":  # what was his folder is one to make names in, still
                assert (await guest.run("/bin/sh", "-c", "echo y > /etc/mine && rm /etc/mine"))[0].ok
            await guest.works()

    trio.run(body)


@pytest.mark.parametrize("kind", ["remapped", "plain"])
@pytest.mark.parametrize("place", ["/etc", "/link", "/etc/passwd"])
def test_a_volume_over_files_of_users_is_refused(request: pytest.FixtureRequest, tmp_path: Path, kind: str, place: str) -> None:
    """The Engine reads what lies beneath the volume, and there a link may lead to a file of the image's user."""
    engine = request.getfixturevalue("engine" if kind == "remapped" else "plain_engine")
    own = tar(
        entry("etc/passwd", type=tarfile.SYMTYPE, linkname="../home/pw"),
        entry("etc/group", type=tarfile.SYMTYPE, linkname="../home/pw"),
        entry("link", type=tarfile.SYMTYPE, linkname="/etc"),
        entry("home", type=tarfile.DIRTYPE, uid=1000, gid=1000),
        entry("home/pw", b"guest:x:1000:1000::/:\n", uid=1000),
    )
    layers = [busybox_tar(), own]
    config = {"Env": ["PATH=/bin"], "User": "guest", "Volumes": {place: {}}}
    (tmp_path / "package.tar").write_bytes(docker_archive(layers, image_json(layers, config)))

    async def body() -> None:
        async with open_guest(engine, tmp_path / "package.tar", volumes=()) as guest:
            await guest.run("/bin/sh", "-c", "rm /home/pw; mkfifo /home/pw")
            await guest.works()

    with pytest.raises(RuntimeFault, match=r"/etc|not directory|not a directory"):
        trio.run(body)


def test_a_user_who_is_root_by_his_own_files_is_refused(engine: LocalEngine, tmp_path: Path) -> None:
    layers = [busybox_tar(), tar(entry("etc/passwd", b"guest:x:0:0::/:/bin/sh\n"))]
    (tmp_path / "package.tar").write_bytes(docker_archive(layers, image_json(layers, {"User": "guest"})))

    async def body() -> None:
        async with open_guest(engine, tmp_path / "package.tar"):
            pass

    with pytest.raises(RuntimeFault, match="'guest' is root by its /etc/passwd"):
        trio.run(body)


@pytest.mark.parametrize("kind", ["remapped", "plain"])
def test_tables_of_the_kernel_are_shared_out(request: pytest.FixtureRequest, package: Path, kind: str) -> None:
    """While one guest holds all it can get, another one and this machine get what ordinary programs take."""
    engine = request.getfixturevalue("engine" if kind == "remapped" else "plain_engine")
    taken: dict[str, tuple[int, str]] = {}

    def modest_here() -> dict[str, tuple[int, str]]:
        said = subprocess.run([sys.executable, "-I", "-c", PROGRAM, "modest"], check=True, capture_output=True).stdout
        found: dict[str, tuple[int, str]] = json.loads(said)
        return found

    async def hold(guest: Guest, task_status: trio.TaskStatus[None]) -> None:
        async def keep(side: Side, chunk: bytes) -> None:
            taken.update(json.loads(chunk))
            task_status.started()

        await guest.runtime.run(PYTHON, ["-I", "-S", "-c", PROGRAM, "greedy"], keep)

    async def body() -> None:
        before = modest_here()
        async with open_guest(engine, package) as greedy, open_guest(engine, package) as other, trio.open_nursery() as nursery:
            with within(20):
                await nursery.start(hold, greedy)
            assert modest_here() == before == {"inotify": [4, None], "ptys": [4, None], "aio": [4, None], "timers": [4, None],
                                               "queues": [1, None]}  # fmt: skip
            status, output = await other.attack("modest")
            assert status.ok, output
            found = json.loads(output)
            assert found["aio"] == [0, "ENOSYS"]
            assert found["ptys"] == [4, None]
            if kind == "remapped":  # elsewhere its users are those of the machine, and the limits are of all guests together
                assert {name: found[name] for name in ("inotify", "timers", "queues")} == {
                    "inotify": [4, None], "timers": [4, None], "queues": [1, None],
                }  # fmt: skip
            await other.works()
            nursery.cancel_scope.cancel()
        assert taken["ptys"][0] <= 64, taken
        assert taken["inotify"][0] == (32 if kind == "remapped" else 0), taken
        assert (taken["timers"][0] <= 4096, taken["queues"][0] <= 1, taken["aio"][0]) == (True, True, 0), taken

    trio.run(body)


def test_users_of_a_guest_together_leave_inotify_to_others(engine: LocalEngine, package: Path) -> None:
    """Its root takes as much as there is under one user after another, all of which count as this machine's root."""
    taken: list[int] = []

    async def hold(guest: Guest, task_status: trio.TaskStatus[None]) -> None:
        async def keep(side: Side, chunk: bytes) -> None:
            taken.extend(json.loads(chunk))
            task_status.started()

        await guest.runtime.run(PYTHON, ["-I", "-S", "-c", PROGRAM, "greedy_by_users"], keep)

    async def body() -> None:
        async with open_guest(engine, package) as greedy, open_guest(engine, package) as other, trio.open_nursery() as nursery:
            with within(20):
                await nursery.start(hold, greedy)
            here = await trio.run_process([sys.executable, "-I", "-c", PROGRAM, "modest"], capture_stdout=True)
            assert json.loads(here.stdout)["inotify"] == [4, None]
            status, output = await other.attack("modest")
            assert status.ok, output
            assert json.loads(output)["inotify"] == [4, None]
            nursery.cancel_scope.cancel()

    trio.run(body)
    assert taken == [32 * 64, 64], "as many as there are users"


ORDINARY = """
set -e
mkdir -p /tmp/t && cd /tmp/t && echo one > a && chown 1000:1000 a && chmod 640 a && tar cf ../t.tar a && rm a
tar xpf ../t.tar && stat -c '%u %g %a' a
su guest -c 'id -u; cat /tmp/t/a; touch /tmp/theirs'
echo two >> /tmp/theirs && chmod 600 /tmp/theirs && cat /tmp/theirs && stat -c %u /tmp/theirs
mkdir /tmp/private && chown 1000 /tmp/private && chmod 700 /tmp/private && touch /tmp/private/x && ls /tmp/private
"""


@pytest.mark.parametrize("kind", ["remapped", "plain"])
def test_root_is_root_over_the_containers_own_files(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    engine = request.getfixturevalue("engine" if kind == "remapped" else "plain_engine")
    layers = [busybox_tar()]
    (tmp_path / "package.tar").write_bytes(docker_archive(layers, image_json(layers, {"Env": ["PATH=/bin"]})))

    async def body() -> None:
        async with open_guest(engine, tmp_path / "package.tar") as guest:
            status, said = await guest.run("/bin/sh", "-c", ORDINARY)
            if kind == "plain":  # there its ids are those of this machine's users
                assert not status.ok
                assert "not permitted" in said
                return
            assert status.ok, said
            assert said.split() == ["1000", "1000", "640", "1000", "one", "two", "1000", "x"]
            # a file of this machine that was brought in, as transfers do, is the guest's as well
            path = guest.deployment.volumes[0].host_dir / "ours"
            path.write_text("of the machine")
            path.chmod(0o600)
            status, said = await guest.run("/bin/sh", "-c", "cat /vol/ours; chown 7 /vol/ours; rm -f /vol/kept; echo $?")
            assert "of the machine" not in said, "root of the machine is nobody of the guest's"
            await guest.works()

    trio.run(body)


@pytest.mark.parametrize(("pattern", "told"), [("|/usr/lib/keeper %P %s", True), ("core", False), ("/var/core.%p", False)])
@trio_test
async def test_the_self_test_says_where_crashes_start_a_program_of_the_machine(
    engine: LocalEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    pattern: str,
    told: bool,
) -> None:
    monkeypatch.setenv("DOCKER_HOST", engine.host)
    (tmp_path / "pattern").write_text(pattern + "\n")
    monkeypatch.setattr("golem.exeunit.runtimes.vm.kernel_tables.CORE_PATTERN", tmp_path / "pattern")
    assert await make_runtime("vm", tmp_path / "cache").self_test() is None
    assert ("crashes in containers start /usr/lib/keeper on this machine" in caplog.text) == told


# -- what is planted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["remapped", "plain"])
def test_planted_traps_against_transfers(request: pytest.FixtureRequest, package: Path, kind: str) -> None:
    engine = request.getfixturevalue("engine" if kind == "remapped" else "plain_engine")
    volumes = (VolumeRequest("/vol"), VolumeRequest("/ram", "ram", MIB))
    transfers = Transfers(TransferPolicy(max_bytes=16 * MIB))

    async def body() -> None:
        async with open_guest(engine, package, volumes=volumes) as guest:
            for folder in ("/vol", "/ram"):
                status, output = await guest.attack("plant", folder)
                assert status.ok, output
                await _out_of(transfers, guest.deployment, folder)
                await _into(transfers, guest, folder)

    trio.run(body)


async def _out_of(transfers: Transfers, deployment: Deployment, folder: str) -> None:
    traps = ("link", "slash/etc/passwd", "up/vol/plain", "magic", "fifo", "folder", "socket", "inner/out/x", "../etc/passwd")
    for trap in traps:
        with pytest.raises(TransferError), within(5):
            await transfers.transfer(f"container:{folder}/{trap}", f"container:{folder}/copy", deployment.volumes)
    with pytest.raises(TransferError, match=r"large|space"), within(5):
        await transfers.transfer(f"container:{folder}/sparse", f"container:{folder}/copy", deployment.volumes)
    with within(5):
        assert await transfers.transfer(f"container:{folder}/plain", f"container:{folder}/copy", deployment.volumes) == 5


async def _into(transfers: Transfers, guest: Guest, folder: str) -> None:
    passwd = Path("/etc/passwd").read_bytes()
    volumes, source = guest.deployment.volumes, f"container:{folder}/plain"
    for trap in ("slash/tmp/golem-escaped", "up/golem-escaped", "inner/out/golem-escaped", "folder", "fifo/x", "plain/x"):
        with pytest.raises(TransferError), within(5):
            await transfers.transfer(source, f"container:{folder}/{trap}", volumes)
    for replaced in ("link", "magic", "fifo", "socket"):  # the name is taken over, what it led to stays
        with within(5):
            await transfers.transfer(source, f"container:{folder}/{replaced}", volumes)
        status, output = await guest.run("/bin/cat", f"{folder}/{replaced}")
        assert (status.ok, output) == (True, "plain")
    assert Path("/etc/passwd").read_bytes() == passwd
    assert not Path("/tmp/golem-escaped").exists()
    _, output = await guest.run("/bin/sh", "-c", "ls /golem-escaped /tmp/golem-escaped 2>/dev/null; head -n 1 /etc/passwd")
    assert output.startswith("root:")
