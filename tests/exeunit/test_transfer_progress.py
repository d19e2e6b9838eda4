"""Progress of transfers, as the requestor hears of it: both ways, at the interval it asked for."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
from test_exeunit_process import REQUESTOR, world
from worlds.support import trio_test

from golem.files.on_disk import FileSink, FileSource

SIZE = 40_000_000

pytestmark = pytest.mark.integration


@trio_test
async def test_progress_of_transfers_both_ways(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(os.urandom(SIZE))
    async with world(tmp_path) as (w, _):
        w.files.offer("in", FileSource(tmp_path / "in"), "test")
        w.files.offer("slot", FileSink(tmp_path / "out"), "test")
        asked = {"progress": {"updateInterval": "50ms"}}
        batch = await w.exec(
            {"deploy": {}}, {"start": {}},
            {"transfer": {"from": f"gftp://{REQUESTOR}/in", "to": "container:/in", **asked}},
            {"transfer": {"from": "container:/in", "to": f"gftp://{REQUESTOR}/slot", **asked}},
            {"transfer": {"from": "container:/in", "to": "container:/copy"}},
        )  # fmt: skip
        assert [(row.ok, row.message) for row in w.results(batch)] == [(True, None)] * 5
        assert (tmp_path / "out").read_bytes() == (tmp_path / "in").read_bytes()
        events = [(index, at, json.loads(kind)) for _, index, at, kind in await w.live("follow", batch, -1, 0)]
        for command in (2, 3):
            told = [(at, kind["progress"]) for index, at, kind in events if index == command and "progress" in kind]
            assert all(one["unit"] == "Bytes" and one["step"] == [0, 1] and one["message"] is None for _, one in told)
            done = [one["progress"][0] for _, one in told]
            assert done == sorted(done)
            assert told[-1][1]["progress"] == [SIZE, SIZE]
            assert len(told) > 1
            times = [at for at, _ in told[:-1]]  # the last one comes when it is due
            assert all(later - sooner > 0.045 for sooner, later in itertools.pairwise(times))
        assert not [kind for index, _, kind in events if index == 4 and "progress" in kind]
