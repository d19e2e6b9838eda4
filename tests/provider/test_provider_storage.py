"""Storage for sale follows what the disk can really give: the rule, the look at the disk, and the offers."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
import trio.testing
from worlds.support import mock_trio_test, trio_test

from golem.provider.client import NodeClient
from golem.provider.hardware import load_profile
from golem.provider.offering import LOOK_S, Offering
from golem.provider.runtimes import ExeUnits, Template
from golem.provider.settings import Settings, SettingsError
from golem.provider.storage import (
    CLEANED_S,
    LOOK_DISK_S,
    MARGIN_BYTES,
    Disk,
    storage_for_sale,
    taken_bytes,
)
from protocol.property_names import VECTOR
from protocol.provider import Capacity, OffersChanged

GIB = 1 << 30
ACCOUNT = {"platform": "erc20-local-tglm", "address": "0x" + "9" * 40, "network": "local"}
NOTICED_S = LOOK_DISK_S + 3 * LOOK_S


# -- the rule
@pytest.mark.parametrize(
    ("profile", "room", "offered", "found"),
    [
        (61.0, 76.0, None, 61.0),
        (61.0, 61.0, None, 61.0),  # just enough is enough
        (61.0, 20.0, None, 18.0),
        (61.0, 0.01, None, 0.0),
        (61.0, -3.0, None, 0.0),
        (61.0, 62.0, 61.0, 61.0),
        (61.0, 60.9, 61.0, 54.81),  # the smallest lack makes a deploy fail
        (61.0, 60.9, 54.81, 54.81),
        (61.0, 66.0, 54.81, 54.81),
        (61.0, 68.0, 54.81, 61.0),  # the whole, though it is not much more
        (61.0, 55.0, 54.81, 54.81),
        (61.0, 20.0, 17.0, 17.0),  # not worth it
        (61.0, 22.0, 17.0, 19.8),
        (61.0, 16.9, 17.0, 15.21),
        (61.0, 0.05, 17.0, 0.0),
        (61.0, 0.07, 0.0, 0.0),
        (61.0, 0.08, 0.0, 0.072),
        (61.0, 90.0, 0.0, 61.0),
    ],
)
def test_how_much_is_for_sale(profile: float, room: float, offered: float | None, found: float) -> None:
    assert storage_for_sale(profile, room, offered) == pytest.approx(found, abs=0.002)


def test_offers_never_pass_the_room_and_do_not_flap() -> None:
    offered, changes = None, 0
    for step in range(2000):
        room = 50.0 + 2.0 * (step % 2) - 20.0 * (step >= 1000)  # swings by 4 and 6 %, and once by a lot
        fresh = storage_for_sale(61.0, room, offered)
        assert fresh <= room
        changes += fresh != offered
        offered = fresh
    assert changes == 2


# -- the disk
def activity(data_dir: Path, name: str, size_bytes: int) -> Path:
    """Make what a deploy makes: a file whose blocks are set aside. Returns the deployment's directory."""
    folder = data_dir / "exe-unit" / "work" / "agreement" / name / "deployment-1"
    (folder / "storage").mkdir(parents=True)
    (folder / "storage" / "storage.ext4").write_bytes(b"\1" * size_bytes)
    return folder


@trio_test
async def test_what_live_activities_take_up_counts_as_room(tmp_path: Path) -> None:
    live = {"one", "two"}
    disk = Disk(tmp_path, lambda path: MARGIN_BYTES + 5 * GIB, lambda name: name in live)
    assert await disk.room_gib() == 5.0
    activity(tmp_path, "one", 1 << 20)
    folder = activity(tmp_path, "two", 1 << 20)
    (folder / "elsewhere").symlink_to("/usr")
    os.link(folder / "storage" / "storage.ext4", folder / "again")
    assert await disk.room_gib() == pytest.approx(5 + 2 / 1024, abs=0.2 / 1024)


@trio_test
async def test_images_that_nobody_uses_are_room(tmp_path: Path) -> None:
    disk = Disk(tmp_path, lambda path: MARGIN_BYTES + 5 * GIB, lambda name: False)
    cache = tmp_path / "exe-unit" / "cache" / "images"
    cache.mkdir(parents=True)
    for name in ("sha3-224-a", "sha3-224-b"):
        (cache / name).write_bytes(bytes(8 << 20))
    assert await disk.room_gib() == pytest.approx(5 + 16 / 1024, abs=0.1 / 1024)
    with (cache / "sha3-224-a").open("rb") as used:
        fcntl.flock(used, fcntl.LOCK_SH)  # as an exe-unit does
        assert await disk.room_gib() == pytest.approx(5 + 8 / 1024, abs=0.1 / 1024)


def test_what_dead_ones_take_up_counts_only_while_it_is_removed(tmp_path: Path) -> None:
    live = {"one"}
    disk = Disk(tmp_path, lambda path: MARGIN_BYTES + 5 * GIB, lambda name: name in live)
    activity(tmp_path, "one", 1 << 20)

    async def body() -> None:
        first = await disk.room_gib()
        live.clear()
        assert await disk.room_gib() == first > 5
        clock.jump(CLEANED_S + 1)
        assert await disk.room_gib() == 5.0, "it does not go away"
        live.add("one")
        assert await disk.room_gib() == first

    clock = trio.testing.MockClock()
    trio.run(body, clock=clock)


def test_what_is_mounted_does_not_count(tmp_path: Path) -> None:
    if not Path("/dev/shm").is_mount():
        pytest.skip("nothing is mounted at /dev/shm")
    (tmp_path / "some").write_bytes(b"\1" * 8192)
    inner = Path("/dev/shm") / f"golem-{os.getpid()}"
    inner.mkdir()
    try:
        (inner / "big").write_bytes(b"\1" * (1 << 20))
        assert taken_bytes([Path("/dev")]) < 1 << 20 <= taken_bytes([inner])
    finally:
        (inner / "big").unlink()
        inner.rmdir()
    assert 8192 <= taken_bytes([tmp_path, tmp_path / "gone"]) < 1 << 16


# -- the offers
class Free:
    """A disk without activities, and how often it was looked at."""

    def __init__(self, gib: float) -> None:
        self.gib, self.looks = gib, 0
        self.broken = False

    def __call__(self, path: Path) -> int:
        self.looks += 1
        if self.broken:
            raise OSError("no such device")
        return MARGIN_BYTES + int(self.gib * GIB)


class Told:
    """The machine's side: storage of each offer, and the capacity."""

    def __init__(self) -> None:
        self.offers: list[list[float]] = []
        self.capacity = Capacity()

    def take(self, message: OffersChanged) -> None:
        self.offers.append([json.loads(spec.properties)["golem.inf.storage.gib"] for spec in message.offers])
        self.capacity = message.capacity

    async def ask(self, actor: str, message: OffersChanged) -> None:
        self.take(message)


async def works(runtime: str, units: ExeUnits) -> Template | str:
    return Template(runtime, {VECTOR: ["golem.usage.duration_sec", "golem.usage.cpu_sec"]})


def write_hardware(data_dir: Path, storage_gib: float) -> None:
    data_dir.mkdir(parents=True, exist_ok=True)
    profile = {"cpu_threads": 1, "mem_gib": 0.25, "storage_gib": storage_gib}
    (data_dir / "hardware.json").write_text(json.dumps({"active": "x", "profiles": {"x": profile}}))


@asynccontextmanager
async def offering(tmp_path: Path, free: Free, **changes: Any) -> AsyncIterator[tuple[Offering, Told]]:
    write_hardware(tmp_path, 61.0)
    settings = Settings(tmp_path, tmp_path / "node.json", "", "key", "prov", runtimes=("vm",), **changes)
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=[ACCOUNT]))
    async with NodeClient(lambda: "http://node", "key", transport) as client, trio.open_nursery() as nursery:
        made, told = Offering(settings, client, works, Disk(tmp_path, free)), Told()
        told.take(OffersChanged(await made.current(), made.capacity))
        nursery.start_soon(made.watch, told)
        await trio.sleep(LOOK_S / 2)  # it has begun
        yield made, told
        nursery.cancel_scope.cancel()


@mock_trio_test
async def test_offers_shrink_with_the_disk_and_grow_again(tmp_path: Path) -> None:
    free = Free(76.0)
    async with offering(tmp_path, free, max_agreements=2) as (made, told):
        assert told.offers == [[30.5]]
        free.gib = 20.0  # another agent's activity has set its share aside
        await trio.sleep(NOTICED_S)
        assert told.offers[1:] == [[9.0]]
        assert told.capacity == Capacity(2, 0.25, 18.0), "proposals on what is still out there are held to that, too"
        assert made.report()[1]["offered"] is True
        free.gib = 19.0
        await trio.sleep(NOTICED_S)
        assert len(told.offers) == 2, "no flapping"
        free.gib = 76.0
        await trio.sleep(NOTICED_S)
        assert told.offers[2:] == [[30.5]]


@mock_trio_test
async def test_offers_are_withdrawn_where_there_is_no_room_and_say_why(tmp_path: Path) -> None:
    free = Free(-0.5)
    async with offering(tmp_path, free) as (made, told):
        assert told.offers == [[]]
        rows = {one["name"]: (one["works"], one["offered"], one["reason"]) for one in made.report()}
        assert rows["vm"] == (True, False, "the disk has room for 0 GiB of storage, at least 0.0625 GiB are needed")
        assert rows["wasmtime"][2] == "no active preset sells it"
        free.gib = 10.0
        await trio.sleep(NOTICED_S)
        assert told.offers[1:] == [[9.0]]
        assert {one["name"]: (one["offered"], one["reason"]) for one in made.report()}["vm"] == (True, "")
        free.gib = 0.01
        await trio.sleep(NOTICED_S)
        assert told.offers[2:] == [[]]
        assert told.capacity.storage_gib == 0.0


@mock_trio_test
async def test_what_the_owner_says_stays_the_upper_bound(tmp_path: Path) -> None:
    free = Free(500.0)
    async with offering(tmp_path, free, most=(9, 9, 40.0)) as (_, told):
        assert told.offers == [[40.0]]
        write_hardware(tmp_path, 30.0)
        await trio.sleep(2 * LOOK_S)
        assert told.offers[1:] == [[30.0]]
        free.gib = 20.0
        await trio.sleep(NOTICED_S)
        assert told.offers[2:] == [[18.0]]
        write_hardware(tmp_path, 19.0)
        await trio.sleep(2 * LOOK_S)
        assert told.offers[3:] == [[19.0]], "another promise is looked at afresh"
        write_hardware(tmp_path, 200.0)
        free.gib = 500.0
        await trio.sleep(2 * LOOK_S)
        assert told.offers[4:] == [[40.0]]


@mock_trio_test
async def test_an_exe_unit_that_ended_badly_has_the_disk_looked_at_soon(tmp_path: Path) -> None:
    free = Free(76.0)
    async with offering(tmp_path, free) as (made, told):
        await trio.sleep(2 * LOOK_S)
        free.gib = 20.0
        made.doubt("vm")
        await trio.sleep(2 * LOOK_S)
        assert told.offers[1:] == [[18.0]]


@mock_trio_test
async def test_room_that_is_missing_for_a_moment_changes_nothing(tmp_path: Path) -> None:
    free = Free(76.0)
    async with offering(tmp_path, free) as (_, told):
        looks = free.looks
        free.gib = 20.0
        while free.looks == looks:
            await trio.sleep(LOOK_S / 4)
        free.gib = 76.0
        await trio.sleep(2 * LOOK_DISK_S)
        assert len(told.offers) == 1
        assert free.looks - looks <= 4, "the disk is looked at now and then"


@mock_trio_test
async def test_a_disk_that_cannot_be_looked_at_changes_nothing(tmp_path: Path) -> None:
    free = Free(20.0)
    free.broken = True
    async with offering(tmp_path, free) as (_, told):
        assert told.offers == [[61.0]]
        free.broken = False
        await trio.sleep(NOTICED_S)
        assert told.offers[1:] == [[18.0]]
        free.broken = True
        await trio.sleep(NOTICED_S)
        assert len(told.offers) == 2


def test_a_full_disk_makes_no_profile_that_would_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": GIB // 20})
    with monkeypatch.context() as patch:
        patch.setattr("golem.provider.hardware.shutil.disk_usage", lambda path: usage)
        with pytest.raises(SettingsError, match=r"0\.049 GiB of disk are free"):
            load_profile(tmp_path)
    assert load_profile(tmp_path).storage_gib > 0.0625
