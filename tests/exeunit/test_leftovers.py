"""What an exe-unit leaves behind when it is killed, and that a sweep finds all of it and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from engine import admin, busybox_tar, import_image
from support import trio_test

from golem.exeunit.engine.admin import Admin, socket_path
from golem.exeunit.engine.leftovers import SUPERVISOR_LABEL, sweep
from golem.exeunit.engine.storage import MARK_FILE, unmount
from golem.exeunit.engine.supervisor import is_dead, own_mark
from golem.exeunit.runtimes.base import RuntimeFault
from golem.local_engine import LocalEngine

# Plays an exe-unit: a container whose layer and volume are on storage of its own, and then nothing more.
SUPERVISOR = """
import sys, time, trio
from pathlib import Path
from golem.exeunit.engine.admin import Admin, socket_path
from golem.exeunit.engine.leftovers import SUPERVISOR_LABEL
from golem.exeunit.engine.meter import upper_dir
from golem.exeunit.engine.storage import open_storage
from golem.exeunit.engine.supervisor import own_mark

async def main(host, folder, image, name):
    admin = Admin(socket_path(host))
    facts = await admin.facts()
    storage = await open_storage(Path(folder), 16 << 20, facts.root_id, 1 << 20)
    binds = [f"{storage.directory('0')}:/a", f"{await storage.ram('1', 1 << 20)}:/b", f"{await storage.sized('2', 4 << 20)}:/c"]
    labels = {SUPERVISOR_LABEL: own_mark()}
    await admin.create_volume(f"{name}-v", {}, labels)
    await admin.create_container(name, {
        "Image": image, "Cmd": ["/bin/sleep", "1000"], "Labels": labels, "Volumes": {"/anonymous": {}},
        "HostConfig": {"Binds": [*binds, f"{name}-v:/d"], "NetworkMode": "none", "Init": True},
    })
    assert await storage.hold_layer(upper_dir(await admin.inspect_container(name)))
    await admin.start_container(name)
    assert storage.holds((await admin.inspect_container(name))["State"]["Pid"])
    print("up", flush=True)
    await trio.sleep_forever()

trio.run(main, *sys.argv[1:])
"""


@contextmanager
def supervisor(engine: LocalEngine, folder: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    """Run one until the block ends, and be sure that its container is up."""
    image = import_image(engine, busybox_tar(), "leftovers:1")
    folder.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, engine.host, folder, image, name], stdout=subprocess.PIPE, text=True
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
    return {
        "containers": containers,
        "volumes": [entry["Name"] for entry in volumes],
        "mounts": [point for point in mounts if point.startswith((f"{root}/", f"{data}/")) and "/overlay2/" not in point],
        "layers": [point for point in mounts if point.startswith(f"{data}/") and "/overlay2/" in point],
        "loops": [line for line in losetup.splitlines() if line.startswith(f"{root}/")],
        "files": [str(path) for path in root.rglob("*") if path.is_file()],
    }


@pytest.fixture
def work_root(tmp_path: Path) -> Iterator[Path]:
    """Where activities work; what a failed test leaves mounted there goes, lest it outlives the tests."""
    folder = tmp_path / "work"
    folder.mkdir()
    yield folder
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        if (point := Path(line.split()[4])).is_relative_to(folder):
            unmount(point)


@pytest.mark.root
@pytest.mark.integration
def test_nothing_is_left_of_a_killed_unit(engine: LocalEngine, work_root: Path) -> None:
    dead_name, living_name = f"dead-{uuid.uuid4().hex}", f"living-{uuid.uuid4().hex}"
    clean = traces(engine, work_root)
    control = Admin(socket_path(engine.host))
    with supervisor(engine, work_root / "b" / "2" / "storage", living_name) as living:
        before = traces(engine, work_root)
        with supervisor(engine, work_root / "a" / "1" / "storage", dead_name) as dead:
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
def test_sweep_on_the_command_line(engine: LocalEngine, work_root: Path) -> None:
    name = f"dead-{uuid.uuid4().hex}"
    clean = traces(engine, work_root)
    with supervisor(engine, work_root / "a" / "1" / "storage", name) as dead:
        dead.kill()
    command = [sys.executable, "-m", "golem.exeunit", "sweep", "--runtime", "vm", "--work-root", work_root]
    environment = {**os.environ, "DOCKER_HOST": engine.host}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert f"removed container {name}" in ended.stdout
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
