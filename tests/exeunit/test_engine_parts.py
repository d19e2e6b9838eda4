"""The parts that bound, measure and watch a container: the seccomp profile as data, storage with a hard size, meters."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
from worlds.support import mock_trio_test, trio_test

from golem.exeunit.runtime import GIB, Limits, RuntimeFault
from golem.exeunit.runtimes.vm.admin import EngineGone
from golem.exeunit.runtimes.vm.meter import Layer, Meter, MeterError, upper_dir, upper_dir_of
from golem.exeunit.runtimes.vm.seccomp_profile import profile
from golem.exeunit.runtimes.vm.watch import ENGINE_GONE, Watch
from golem.exeunit.storage import Storage, open_storage

MIB = 1 << 20
OWNER = 100_000


# -- seccomp profile ------------------------------------------------------------------------------------------------


def rules_for(name: str) -> list[dict[str, Any]]:
    return [rule for rule in json.loads(profile())["syscalls"] if name in rule["names"]]


def allowed(name: str, *arguments: int) -> bool:
    """Judge a call as the kernel's filter does: 64-bit arguments, refused unless a rule allows."""

    def holds(condition: dict[str, Any]) -> bool:
        value = arguments[condition["index"]]
        if condition["op"] == "SCMP_CMP_MASKED_EQ":
            return value & int(condition["value"]) == condition["valueTwo"]
        return value == condition["value"]

    return any(rule["action"] == "SCMP_ACT_ALLOW" and all(map(holds, rule.get("args", ()))) for rule in rules_for(name))


@pytest.mark.parametrize("family", [17, 31, 38, 40, 44, (1 << 32) + 40, 1 << 32, 0xFFFFFFFF])
def test_profile_refuses_odd_socket_families(family: int) -> None:
    assert not any(allowed("socket", family, kind, 0) for kind in (1, 2, 3, 5, 6))


@pytest.mark.parametrize("arguments", [(1, 1, 0), (2, 1 | 0x80800, 6), (10, 2, 17), (2, 1, 0), (16, 3 | 0x80000, 0)])
def test_profile_allows_ordinary_sockets(arguments: tuple[int, int, int]) -> None:
    assert allowed("socket", *arguments)


@pytest.mark.parametrize("arguments", [(2, 1, 132), (2, 6, 0), (2, 1, 262), (16, 3, 12), (16, 3, 6)])
def test_profile_refuses_protocols_loaded_on_demand(arguments: tuple[int, int, int]) -> None:
    assert not allowed("socket", *arguments)


def test_profile_refuses_what_looks_outside() -> None:
    for name in (
        "io_uring_setup", "io_uring_enter", "io_uring_register", "ptrace", "process_vm_readv", "keyctl", "add_key",
        "request_key", "bpf", "userfaultfd", "perf_event_open", "unshare", "setns", "mount", "umount2", "move_mount",
        "chroot", "pivot_root", "open_by_handle_at", "init_module", "finit_module", "kexec_load", "syslog", "reboot",
        "modify_ldt", "quotactl", "fsopen", "pidfd_getfd", "kcmp", "fanotify_init",
    ):  # fmt: skip
        assert rules_for(name) == [], name


def test_profile_refuses_namespaces_and_devices() -> None:
    assert allowed("clone", 0x11)
    assert allowed("clone", 0x3D0F00)  # what a thread is made with
    for flag in (0x10000000, 0x20000000, 0x40000000, 0x08000000, 0x04000000, 0x02000000, 0x00020000):
        assert not allowed("clone", flag | 0x11)
        assert not allowed("clone", flag | 1 << 40)
    assert allowed("mknod", 0, 0o010644, 0)
    assert not allowed("mknod", 0, 0o020644, 0x103)
    assert not allowed("mknodat", 0, 0, 0o060644, 0x800)


def test_profile_names_native_architectures_alone() -> None:
    document = json.loads(profile())
    assert document["defaultAction"] == "SCMP_ACT_ERRNO"
    assert [entry["architecture"] for entry in document["archMap"]] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"]
    assert not any(entry["subArchitectures"] for entry in document["archMap"])
    assert rules_for("clone3") == [{"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS}]


# -- storage --------------------------------------------------------------------------------------------------------


def fill(path: Path, mib: int) -> int | None:
    """Write so many MiB to a file; the errno that stopped it."""
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(mib):
                file.write(bytes(MIB))
    except OSError as error:
        return error.errno
    return None


def mounts_below(folder: Path) -> list[str]:
    points = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return [point for point in points if point.startswith(f"{folder}/")]


def loops_below(folder: Path) -> list[str]:
    said = subprocess.run(["losetup", "--list", "--noheadings", "--output", "BACK-FILE"], capture_output=True, text=True)
    return [line for line in said.stdout.splitlines() if line.startswith(f"{folder}/")]


@pytest.mark.root
@trio_test
async def test_volumes_share_one_hard_size(tmp_path: Path) -> None:
    storage = await open_storage(tmp_path / "s", 24 * MIB, OWNER)
    try:
        assert storage.limited
        first, second = storage.directory("0"), storage.directory("1")
        assert storage.used_bytes() < MIB
        assert fill(first / "a", 12) is None
        assert 12 * MIB <= storage.used_bytes() < 13 * MIB
        assert fill(second / "b", 24) == errno.ENOSPC
        found = first.stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (OWNER, OWNER, 0o777)
        assert first.parent.stat().st_mode & 0o007 == 0, "other users of the machine must not get in"
    finally:
        await storage.close()
    assert storage.used_bytes() > 20 * MIB, "what was used stays known"
    assert not (tmp_path / "s").exists()
    assert mounts_below(tmp_path) == []
    assert loops_below(tmp_path) == []


@pytest.mark.root
@trio_test
async def test_volumes_with_sizes_of_their_own(tmp_path: Path) -> None:
    storage = await open_storage(tmp_path / "s", 64 * MIB, 0, ram_bytes=3 * MIB)
    try:
        sized, ram = await storage.sized("0", 8 * MIB), await storage.ram("1", 2 * MIB)
        assert fill(sized / "a", 16) == errno.ENOSPC
        assert storage.used_bytes() >= 8 * MIB
        assert fill(ram / "a", 16) == errno.ENOSPC
        assert len({path.stat().st_dev for path in (sized, ram, storage.directory("3"))}) == 3
        assert len(mounts_below(tmp_path)) == 3
        with pytest.raises(RuntimeFault, match="more than is left"):
            await storage.sized("2", 60 * MIB)
        with pytest.raises(RuntimeFault, match="in memory"):
            await storage.ram("4", 2 * MIB)
    finally:
        await storage.close()
    await storage.close()
    assert mounts_below(tmp_path) == []


@pytest.mark.root
@trio_test
async def test_layer_of_an_engine_that_is_gone(tmp_path: Path) -> None:
    layer = tmp_path / "overlay2" / "id"
    for name in ("diff", "work", "merged"):
        (layer / name).mkdir(parents=True)
    (layer / "link").write_text("ABC")
    storage = await open_storage(tmp_path / "s", 8 * MIB, 0)
    try:
        assert not await storage.hold_layer(tmp_path / "other" / "diff")
        assert await storage.hold_layer(layer / "diff")
        assert not await storage.hold_layer(layer / "diff"), "one layer a storage"
        options = f"lowerdir={tmp_path / 's'},upperdir={layer / 'diff'},workdir={layer / 'work'}"
        await trio.run_process(["mount", "-t", "overlay", "overlay", "-o", options, str(layer / "merged")])
        assert fill(layer / "merged" / "a", 16) == errno.ENOSPC
        assert storage.used_bytes() > 6 * MIB
    finally:
        await storage.close()
    assert mounts_below(tmp_path) == []
    assert loops_below(tmp_path) == []
    assert (layer / "link").read_text() == "ABC", "the Engine finds what it had made"


@pytest.mark.root
@trio_test
async def test_guest_sees_no_devices_or_setuid(tmp_path: Path) -> None:
    storage = await open_storage(tmp_path / "s", 8 * MIB, 0)
    try:
        flags = os.statvfs(storage.directory("0")).f_flag
        assert flags & os.ST_NOSUID
        assert flags & os.ST_NODEV
    finally:
        await storage.close()


@trio_test
async def test_a_disk_without_room_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFault, match=r"no room for storage of .* GiB: .* GiB are free"):
        await open_storage(tmp_path / "s", 1 << 55, 0)
    assert not (tmp_path / "s").exists()


@trio_test
async def test_without_root_volumes_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("golem.exeunit.storage.can_mount", lambda: False)
    storage = await open_storage(tmp_path / "s", 4 * MIB, os.geteuid(), ram_bytes=MIB)
    assert not storage.limited
    sized, ram = await storage.sized("0", MIB), await storage.ram("1", MIB)
    assert fill(sized / "a", 3) is None
    assert fill(ram / "a", 1) is None
    assert storage.used_bytes() == 0
    assert 3 * MIB <= await storage.measure() < 4 * MIB
    assert storage.used_bytes() == await storage.measure()
    monkeypatch.setattr("golem.exeunit.storage.MAX_FILES", 2)
    for number in range(4):
        (sized / str(number)).touch()
    assert await storage.measure() > storage.size_bytes, "too many files to count are as good as full"
    await storage.close()
    assert not (tmp_path / "s").exists()


@pytest.mark.root
@trio_test
async def test_a_machine_that_cannot_mount_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("golem.exeunit.storage._MOUNT_OPTIONS", "loop,no-such-option")
    storage: Storage = await open_storage(tmp_path / "s", 4 * MIB, 0)
    assert not storage.limited
    assert not (tmp_path / "s" / "storage.ext4").exists()
    await storage.close()


# -- meters ---------------------------------------------------------------------------------------------------------

V1 = "4:memory:/docker/abc\n2:cpuacct,cpu:/docker/abc\n0::/docker/abc\n"
V1_MOUNTS = (
    "30 25 0:27 / {root}/cpu rw - cgroup cgroup rw,cpu,cpuacct\n31 25 0:28 / {root}/memory rw - cgroup cgroup rw,memory\n"
    "32 25 0:29 / {root}/unified rw shared:9 - cgroup2 cgroup2 rw\n"
)


def tree(root: Path, group: str, mounts: str, files: dict[str, str]) -> Path:
    """A /proc with the control group of process 7, and the groups' files."""
    for name, text in {**files, "proc/7/cgroup": group, "proc/self/mountinfo": mounts.format(root=root)}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root / "proc"


def test_meter_of_version_1(tmp_path: Path) -> None:
    cpu, memory = "cpu/docker/abc/cpuacct.usage", "memory/docker/abc/memory.max_usage_in_bytes"
    meter = Meter(7, tree(tmp_path, V1, V1_MOUNTS, {cpu: "1500000000\n", memory: "4096\n"}))
    assert meter.read() == (1.5, 4096)
    (tmp_path / cpu).write_text("2000000000\n")
    assert meter.read() == (2.0, 4096)
    (tmp_path / memory).unlink()
    (tmp_path / cpu).unlink()
    assert meter.read() == (2.0, 4096), "a group that is gone has its last values"


@pytest.mark.parametrize(("file", "text"), [("memory.peak", "8192\n"), ("memory.current", "8192\n")])
def test_meter_of_version_2(tmp_path: Path, file: str, text: str) -> None:
    group = "0::/system.slice/docker-abc.scope\n"
    folder = "sys/system.slice/docker-abc.scope"
    mounts = "30 25 0:27 / {root}/sys rw - cgroup2 cgroup2 rw\n"
    files = {f"{folder}/cpu.stat": "usage_usec 250000\nuser_usec 1\n", f"{folder}/{file}": text}
    meter = Meter(7, tree(tmp_path, group, mounts, files))
    assert meter.read() == (0.25, 8192)
    (tmp_path / folder / file).write_text("1\n")
    assert meter.read() == (0.25, 8192), "a peak never goes down"


def test_meter_inside_a_container_of_the_provider(tmp_path: Path) -> None:
    """Our own view of the tree may begin at a part of it."""
    files = {"sys/inner/cpu.stat": "usage_usec 1000000\n", "sys/inner/memory.peak": "1\n"}
    proc = tree(tmp_path, "0::/outer/inner\n", "30 25 0:27 /outer {root}/sys rw - cgroup2 cgroup2 rw\n", files)
    assert Meter(7, proc).read() == (1.0, 1)


def test_meter_without_figures(tmp_path: Path) -> None:
    with pytest.raises(MeterError, match="no figures"):
        Meter(7, tree(tmp_path, "0::/x\n", "", {}))
    with pytest.raises(MeterError, match="no control group"):
        Meter(8, tmp_path / "proc")


def test_meter_of_this_machine() -> None:
    cpu_s, peak_bytes = Meter(os.getpid()).read()
    assert cpu_s > 0
    assert 0 < peak_bytes < 1024 * GIB


@trio_test
async def test_layer_is_measured_with_bounded_work(tmp_path: Path) -> None:
    upper = tmp_path / "diff"
    upper.mkdir()
    layer = Layer(upper)
    assert await layer.measure() < MIB
    fill(upper / "a", 3)
    assert 3 * MIB <= await layer.measure() < 4 * MIB
    assert layer.complete
    for number in range(10):
        (upper / str(number)).touch()
    few = Layer(upper, max_files=5)
    await few.measure()
    assert not few.complete
    shutil.rmtree(upper)
    used = layer.used_bytes
    assert await layer.measure() == used, "what was written stays known"


@trio_test
async def test_layer_that_is_a_copy_of_the_image(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    fill(tmp_path / "copy" / "image", 4)
    layer = Layer(tmp_path / "copy", max_files=3)
    await layer.take_as_image()
    assert await layer.measure() == 0
    fill(tmp_path / "copy" / "a", 2)
    assert 2 * MIB <= await layer.measure() < 3 * MIB
    assert layer.complete


def test_upper_dir_of_an_inspected_container() -> None:
    assert upper_dir({"GraphDriver": {"Name": "overlay2", "Data": {"UpperDir": "/a/diff"}}}) == Path("/a/diff")
    assert upper_dir({"GraphDriver": {"Name": "vfs", "Data": None}}) is None
    assert upper_dir({}) is None


def test_upper_dir_of_a_running_container(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    text = "22 1 0:30 / / rw - overlay overlay rw,lowerdir=/l/A:/l/B,upperdir=/data/1/diff,workdir=/data/1/work\n"
    (tmp_path / "7" / "mountinfo").write_text(text + "23 22 0:5 / /proc rw - proc proc rw\n")
    assert upper_dir_of(7, tmp_path) == Path("/data/1/diff")
    (tmp_path / "7" / "mountinfo").write_text("22 1 254:0 / / rw - ext4 /dev/vda rw\n")
    assert upper_dir_of(7, tmp_path) is None
    assert upper_dir_of(8, tmp_path) is None


# -- the life of a container ------------------------------------------------------------------------------------------


class AwayEngine:
    """An Engine that does not answer for a while; its containers live. `hangs`: it takes calls, or refuses them at once."""

    def __init__(self, away_s: float, hangs: bool) -> None:
        self.back_at, self.hangs = trio.current_time() + away_s, hangs

    async def ping(self) -> None:
        if trio.current_time() < self.back_at:
            if self.hangs:
                await trio.sleep_until(self.back_at)
            else:
                await trio.lowlevel.checkpoint()
                raise EngineGone("connection refused")

    async def inspect(self, container: str) -> dict[str, Any]:
        await self.ping()
        return {"State": {"Running": True}}

    async def wait_exit(self, container: str) -> int:
        await self.ping()
        await trio.sleep_forever()
        raise AssertionError


@pytest.mark.parametrize("hangs", [True, False])
@pytest.mark.parametrize("away_s", [6.0, 29.0, 50.0])
@mock_trio_test
async def test_an_engine_that_is_away_for_less_than_half_a_minute_ends_nothing(away_s: float, hangs: bool) -> None:
    watch = Watch(AwayEngine(away_s, hangs), "container", Limits())  # type: ignore[arg-type]
    told: list[str] = []

    async def fail_a_command() -> None:
        told.append(str(await watch.explain(EngineGone("the Engine broke off"))))

    started_s, found = trio.current_time(), ""
    with trio.move_on_after(120):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail_a_command)
            found = await watch.failure()
            took_s = trio.current_time() - started_s
    if away_s > 30:
        assert found == ENGINE_GONE
        assert took_s < 37
        assert told == [ENGINE_GONE]
    else:
        assert (found, told) == ("", ["the Engine broke off"])
