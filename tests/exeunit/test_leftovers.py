"""What an exe-unit leaves behind when it is killed, and that a sweep finds all of it and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio
from worlds.engine import admin, busybox_tar
from worlds.patience import patience, within
from worlds.support import trio_test

from golem.exeunit.runtime import RuntimeFault
from golem.exeunit.runtimes.vm.admin import Admin, socket_path
from golem.exeunit.runtimes.vm.leftovers import SUPERVISOR_LABEL, sweep
from golem.exeunit.runtimes.vm.runtime import VmRuntime
from golem.exeunit.storage import MARK_FILE, PROCESS_FILE, unmount
from golem.exeunit.supervisor import is_dead, own_mark
from golem.lab.engine import LocalEngine

# An exe-unit's runtime with all kinds of volumes and a command that runs; and then nothing more is heard of it.
SUPERVISOR = """
import os, sys, trio
from pathlib import Path
from golem.exeunit.runtimes import make_runtime
from golem.exeunit.runtime import DeployOptions, Limits, VolumeRequest

async def main(host, folder, package, activity):
    os.environ["DOCKER_HOST"] = host
    runtime = make_runtime("vm", Path(package).parent / "cache")
    volumes = VolumeRequest("/a"), VolumeRequest("/b", "ram", 1 << 20), VolumeRequest("/c", "storage", 4 << 20)
    limits = Limits(mem_gib=1 / 16, storage_gib=1 / 32)
    await runtime.deploy(Path(package), DeployOptions(Path(folder), limits, volumes=volumes, activity_id=activity))
    await runtime.start([])

    async def started(side, chunk):
        print(chunk.decode(), end="", flush=True)

    await runtime.run("/bin/sh", ["-c", "echo x > /a/file; echo x > /file; SCRIPT"], started)
    await runtime.run("/bin/true", [], started)

trio.run(main, *sys.argv[1:])
"""
STUCK = "rm /etc/passwd; mkfifo /etc/passwd; echo up"  # where whoever starts a program in the container looks, and waits


@contextmanager
def supervisor(
    engine: LocalEngine, package: Path, folder: Path, activity: str, script: str = "echo up; sleep 1000"
) -> Iterator[subprocess.Popen[str]]:
    """Run one until the block ends, and be sure that its container is up."""
    folder.mkdir(parents=True)
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR.replace("SCRIPT", script), engine.host, folder, package, activity],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def traces(engine: LocalEngine, root: Path) -> dict[str, list[str]]:
    """Return everything on this machine that comes from activities below `root` or bears our label."""
    client = admin(engine)
    try:
        filters = {"label": SUPERVISOR_LABEL}
        containers = [entry["Names"][0] for entry in client.containers(all=True, filters=filters)]
        volumes = client.volumes()["Volumes"] or []
    finally:
        client.close()
    data = engine.folder / "data"
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    losetup = subprocess.run(["losetup", "--list", "-n", "-O", "BACK-FILE"], capture_output=True, text=True).stdout
    found = {
        "containers": containers,
        "volumes": [entry["Name"] for entry in volumes],
        "mounts": [point for point in mounts if point.startswith((f"{root}/", f"{data}/")) and "/overlay2/" not in point],
        "layers": [point for point in mounts if point.startswith(f"{data}/") and "/overlay2/" in point],
        "loops": [line for line in losetup.splitlines() if line.startswith(f"{root}/")],
        "files": [str(path) for path in root.rglob("*") if path.is_file() and path.name not in ("init", "run")],
    }
    return {what: sorted(names) for what, names in found.items()}


@pytest.fixture
def work_root(tmp_path: Path) -> Iterator[Path]:
    """Where activities work; what a failed test leaves mounted there goes, lest it outlives the tests."""
    folder = tmp_path / "work"
    folder.mkdir()
    yield folder
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        if (point := Path(line.split()[4])).is_relative_to(folder):
            unmount(point)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    path = tmp_path / "busybox.tar"
    path.write_bytes(busybox_tar())
    return path


@pytest.mark.root
@pytest.mark.integration
def test_nothing_is_left_of_a_killed_unit(engine: LocalEngine, work_root: Path, package: Path) -> None:
    dead_name, living_name = uuid.uuid4().hex, uuid.uuid4().hex
    clean = traces(engine, work_root)
    control = Admin(socket_path(engine.host))
    with supervisor(engine, package, work_root / "b" / "2", living_name) as living:
        before = traces(engine, work_root)
        with supervisor(engine, package, work_root / "a" / "1", dead_name) as dead:
            both = traces(engine, work_root)
            assert all(len(both[what]) > len(before[what]) for what in both), both
            assert trio.run(sweep, control, work_root) == [], "both live"
            dead.send_signal(signal.SIGKILL)
            dead.wait()
            removed = trio.run(sweep, control, work_root)
        assert traces(engine, work_root) == before
        assert any(dead_name in line for line in removed)
        assert not any(living_name in line for line in removed)
        assert not (work_root / "a" / "1" / "storage").exists()
        living.kill()
        living.wait()
        trio.run(sweep, control, work_root)
    assert traces(engine, work_root) == clean


@pytest.mark.root
@pytest.mark.integration
def test_a_guest_in_the_engines_way_is_swept_and_offers_stay(
    engine: LocalEngine, work_root: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Engine waits in the container for good, and nobody looks after it: neither self-test nor sweep wait with it."""
    monkeypatch.setenv("DOCKER_HOST", engine.host)
    clean = traces(engine, work_root)
    with supervisor(engine, package, work_root / "a" / "1", uuid.uuid4().hex, STUCK) as dead:
        _await_stuck(int((work_root / "a" / "1" / "storage" / PROCESS_FILE).read_text().split(":")[0]))
        dead.kill()
        dead.wait()
        began = time.monotonic()
        assert trio.run(VmRuntime(work_root / "cache").self_test) is None
        removed = trio.run(sweep, Admin(socket_path(engine.host)), work_root)
        assert time.monotonic() - began < patience(10)
        assert any("killed the container" in line for line in removed), removed
    assert traces(engine, work_root) == clean


def _await_stuck(init_pid: int) -> None:
    """Wait until the Engine's own program is in the container, between its start and that of what it was to begin."""
    inside, deadline = os.stat(f"/proc/{init_pid}/ns/pid").st_ino, time.monotonic() + patience(5)
    while time.monotonic() < deadline:
        for name in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError):
                of_ours = os.stat(f"/proc/{name}/ns/pid").st_ino == inside
                if of_ours and Path(f"/proc/{name}/wchan").read_text() in ("wait_for_partner", "fifo_open"):
                    return
        time.sleep(0.02)
    raise AssertionError("the Engine's program has gone on")


@pytest.mark.root
@pytest.mark.integration
def test_sweep_on_the_command_line(engine: LocalEngine, work_root: Path, package: Path) -> None:
    name = uuid.uuid4().hex
    clean = traces(engine, work_root)
    with supervisor(engine, package, work_root / "a" / "1", name) as dead:
        dead.kill()
    command = [sys.executable, "-m", "golem.exeunit", "sweep", "--runtime", "vm", "--work-root", work_root]
    environment = {**os.environ, "DOCKER_HOST": engine.host}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=patience(60))
    assert ended.returncode == 0, ended.stderr
    assert f"removed container golem-{name}" in ended.stdout
    assert traces(engine, work_root) == clean


@trio_test
async def test_without_an_engine_files_go_and_the_fault_is_told(tmp_path: Path) -> None:
    dead, living, other = (tmp_path / name / "storage" for name in ("dead", "living", "other"))
    for folder, mark in ((dead, "999999999:1:" + own_mark().split(":")[2]), (living, own_mark()), (other, "7:7:7")):
        (folder / "storage" / "0").mkdir(parents=True)
        (folder / "storage" / "0" / MARK_FILE).write_text("a guest may write this, too")
        (folder / MARK_FILE).write_text(mark)
    with pytest.raises(RuntimeFault, match="does not answer"):
        await sweep(Admin(tmp_path / "no.sock"), tmp_path)
    assert not dead.exists()
    assert living.exists()
    assert other.exists(), "a process of another pid namespace cannot be judged from here"


def test_marks() -> None:
    pid, ticks, namespace = own_mark().split(":")
    assert not is_dead(own_mark())
    assert is_dead(f"{pid}:{int(ticks) + 1}:{namespace}"), "the number was given to another process"
    assert not is_dead(f"{pid}:{int(ticks) + 1}:1")
    for malformed in ("", "1:2", "x:y:z", "1:2:3:4", "-1:2:3"):
        assert not is_dead(malformed)


def dead_mark() -> str:
    return "999999999:1:" + own_mark().split(":")[2]


@trio_test
async def test_marks_that_guests_write_count_for_nothing(tmp_path: Path) -> None:
    root, others = tmp_path / "work", tmp_path / "others"
    volume = root / "agreement" / "activity" / "deployment-1" / "volumes" / "0"
    (volume / "storage").mkdir(parents=True)
    others.mkdir()
    (others / "file").touch()
    (others / MARK_FILE).write_text(dead_mark())
    (volume / MARK_FILE).write_text(dead_mark())
    (volume / "storage" / MARK_FILE).write_text(dead_mark())
    with pytest.raises(RuntimeFault, match="does not answer"):
        await sweep(Admin(tmp_path / "no.sock"), root)
    assert (volume / "storage" / MARK_FILE).exists()
    assert (others / "file").exists()


@trio_test
async def test_a_folder_that_becomes_a_link_meanwhile_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, others = tmp_path / "work", tmp_path / "others"
    swapped = root / "activity" / "storage"
    swapped.mkdir(parents=True)
    others.mkdir()
    (others / "file").touch()
    (swapped / MARK_FILE).write_text(dead_mark())

    def swap(mark: str) -> bool:
        if swapped.is_symlink():
            return True
        (swapped / MARK_FILE).unlink()
        swapped.rmdir()
        swapped.symlink_to(others)
        return True

    monkeypatch.setattr("golem.exeunit.stranded.is_dead", swap)
    with pytest.raises(RuntimeFault):
        await sweep(Admin(tmp_path / "no.sock"), root)
    assert (others / "file").exists()


@trio_test
async def test_a_mark_without_an_end_is_none(tmp_path: Path) -> None:
    for name, target in (("endless", "/dev/zero"), ("waiting", None)):
        folder = tmp_path / name / "storage"
        folder.mkdir(parents=True)
        if target is None:
            os.mkfifo(folder / MARK_FILE)
        else:
            (folder / MARK_FILE).symlink_to(target)
    with within(5), pytest.raises(RuntimeFault, match="does not answer"):
        await sweep(Admin(tmp_path / "no.sock"), tmp_path)
