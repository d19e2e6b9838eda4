"""A provider's disk that fills up: the activity ends in good order and names the disk; nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
import trio
from test_exeunit_process import ACTIVITY, Stub, World, run, stub_world
from worlds.engine import admin, busybox_tar
from worlds.patience import patience, within
from worlds.wire import two_nodes

from actors.kernel.records import JournalError
from golem.exeunit.disk import FLOOR_BYTES, LOW_LOOKS, NAME, RESERVE_BYTES, DiskWatch, free_bytes
from golem.exeunit.storage import unmount_all
from golem.lab.engine import LocalEngine

MIB = 1 << 20


def test_a_reserve_is_kept_and_given_up_once(tmp_path: Path) -> None:
    disk = DiskWatch(tmp_path)
    assert (tmp_path / NAME).stat().st_blocks * 512 >= RESERVE_BYTES
    assert disk.look() is None
    assert disk.make_room()
    assert not disk.make_room()
    assert list(tmp_path.iterdir()) == []
    assert "the provider's disk is full" in (disk.look() or "")


def test_a_disk_that_is_low_for_an_instant_ends_nothing(tmp_path: Path) -> None:
    free = [FLOOR_BYTES - 1] * (LOW_LOOKS - 1) + [FLOOR_BYTES] + [FLOOR_BYTES - 1] * LOW_LOOKS
    disk = DiskWatch(tmp_path, lambda folder: free.pop(0))
    said = [disk.look() for _ in range(2 * LOW_LOOKS)]
    assert said[:-1] == [None] * (2 * LOW_LOOKS - 1)
    assert said[-1] == "the provider's disk is full: 16.0 MiB are free where the activity works"
    assert disk.release()
    assert not disk.release()


def test_no_room_for_the_reserve_is_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()  # nothing can be written under that name
    assert "disk is full" in (DiskWatch(tmp_path).look() or "")


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Mount an ext4 file system of its own at `folder`/work; it is unmounted, and must not be busy, at the end."""
    if os.geteuid() != 0:
        pytest.skip("needs root (mounts a small disk)")
    image, point = folder / "disk.ext4", folder / "work"
    with image.open("wb") as file:
        file.truncate(size_bytes)
    point.mkdir()
    for command in (["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], ["mount", "-o", "loop", str(image), str(point)]):
        if (done := subprocess.run(command, capture_output=True, text=True)).returncode:
            pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    try:
        yield point
    except BaseException:
        unmount_all(folder)
        raise
    subprocess.run(["umount", str(point)], check=True)


def fill(disk: Path, left_bytes: int = 0) -> None:
    """Write until that much is left."""
    with (disk / "of others").open("ab", buffering=0) as file, suppress(OSError):
        while (room := free_bytes(disk) - left_bytes) > 0:
            os.posix_fallocate(file.fileno(), file.tell(), room)
            file.seek(0, os.SEEK_END)
    with (disk / "of others").open("ab", buffering=0) as file, suppress(OSError):
        while free_bytes(disk) > left_bytes:
            file.write(bytes(4096))


@asynccontextmanager
async def vm_world(tmp_path: Path, engine: LocalEngine) -> AsyncIterator[tuple[World, trio.Process]]:
    """An exe-unit with the runtime vm whose working directory is there already."""
    package = tmp_path / "image.tar"
    package.write_bytes(busybox_tar())
    async with two_nodes(tmp_path) as (a, b, nursery):
        w = World(tmp_path, a, b, nursery)
        await w.begin(package)
        process = await w.start("vm", engine.host)
        try:
            yield w, process
        finally:
            if process.returncode is None:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()
        nursery.cancel_scope.cancel()


def left(engine: LocalEngine, disk: Path) -> list[str]:
    """Return what there is of an activity: containers, volumes, mounts below the disk, and files that hold anything."""
    client = admin(engine)
    try:
        filters = {"label": f"golem.activity={ACTIVITY}"}
        found = [entry["Id"] for entry in client.containers(all=True, filters=filters)]
        found += [entry["Name"] for entry in client.volumes(filters)["Volumes"] or ()]
    finally:
        client.close()
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f"{disk}/" in line]
    ours = ("unit.db", "unit.db-wal", "unit.db-shm", "of others")
    return found + [str(path) for path in disk.rglob("*") if path.is_file() and path.name not in ours]


@pytest.mark.root
@pytest.mark.integration
@pytest.mark.parametrize("to_the_last_byte", [False, True], ids=["nearly", "to the last byte"])
def test_a_disk_that_fills_up_ends_the_activity(tmp_path: Path, engine: LocalEngine, to_the_last_byte: bool) -> None:
    async def body(disk: Path) -> None:
        async with vm_world(tmp_path, engine) as (w, process):
            batch = await w.exec({"deploy": {"volumes": {"/data": {"host": {}}, "/ram": {"ram": {"size": "1m"}}}}}, {"start": {}})
            assert [(row.ok, row.message) for row in w.results(batch)] == [(True, None)] * 2
            hanging = await w.exec({"run": {"entry_point": "sleep", "args": ["60"]}}, wait=False)
            assert len(left(engine, disk)) > 3
            began = time.monotonic()
            if to_the_last_byte:
                process.send_signal(signal.SIGSTOP)
                await trio.to_thread.run_sync(fill, disk)
                assert free_bytes(disk) == 0
                for _ in range(20):  # before it can look, much is to be written
                    await w.exec({"run": {"entry_point": "true", "args": ["x" * 20_000]}}, wait=False)
                process.send_signal(signal.SIGCONT)
            else:
                await trio.to_thread.run_sync(fill, disk, FLOOR_BYTES // 2)
            await w.state("Terminated")
            assert time.monotonic() - began < patience(10)
            row = w.row(w.requestor)
            assert row.reason == "Disk full"
            assert "the provider's disk is full" in (row.error_message or "")
            assert row.usage is not None
            await w.until(lambda: w.batch(hanging).finished)
            assert "Disk full: the provider's disk is full" in (w.results(hanging)[-1].message or "")
            with within(10):
                assert await process.wait() == 1
            assert time.monotonic() - began < patience(10)
            assert left(engine, disk) == []

    with small_disk(tmp_path, 320 * MIB) as disk:
        tmp_path.chmod(0o711)
        trio.run(body, disk)


@pytest.mark.root
@pytest.mark.integration
def test_a_deploy_without_room_names_the_disk_and_leaves_nothing(tmp_path: Path, engine: LocalEngine) -> None:
    async def body(disk: Path) -> None:
        async with vm_world(tmp_path, engine) as (w, process):
            await w.state("Initialized")
            await trio.to_thread.run_sync(fill, disk, 100 * MIB)
            [row] = w.results(await w.exec({"deploy": {}}))
            assert not row.ok
            assert (row.message or "").startswith("the provider's disk has no room for storage of 0.1 GiB: 0.09")
            assert left(engine, disk) == [str(disk / NAME)]
            (disk / "of others").unlink()
            assert [one.ok for one in w.results(await w.exec({"deploy": {}}, {"start": {}}))] == [True, True]
            process.send_signal(signal.SIGTERM)
            with within(10):
                await process.wait()
            assert left(engine, disk) == []

    with small_disk(tmp_path, 320 * MIB) as disk:
        tmp_path.chmod(0o711)
        trio.run(body, disk)


@pytest.mark.integration
def test_a_journal_that_finds_no_room_at_all_leaves_nothing_running(tmp_path: Path) -> None:
    stubs: list[Stub] = []

    async def body() -> None:
        async with stub_world(tmp_path) as (w, stub, unit, _, _):
            stubs.append(stub)
            await w.exec(run("hang"), wait=False)
            await w.until(lambda: stub.runs)
            unit._journal._writer.execute("pragma max_page_count=1")  # the reserve does not help
            with within(10):
                await w.exec(run("x" * 100_000))

    with pytest.raises(BaseExceptionGroup) as caught:
        trio.run(body)
    assert caught.group_contains(JournalError, match="cannot write the journal: database or disk is full")
    assert stubs[0].stops == 1
    assert not (tmp_path / "work" / NAME).exists()
