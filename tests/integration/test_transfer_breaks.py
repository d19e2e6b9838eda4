"""Big files between two real nodes, each of which is killed and started again in the middle."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from signal import SIGKILL

import pytest
import trio
from worlds.patience import within
from worlds.support import trio_test

import golem.exeunit.transfer.transfers
from golem.exeunit.process import BusGftp
from golem.exeunit.runtime import Volume
from golem.exeunit.transfer.spool import TransferPolicy
from golem.exeunit.transfer.transfers import Transfers
from golem.files.tool import Gftp
from golem.lab.localnet import LocalNode, open_localnet

pytestmark = pytest.mark.integration

SIZE = 200_000_000


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Breaker:
    """Watches a transfer's progress; at a third of it a node is killed and started again."""

    def __init__(self, node: LocalNode, nursery: trio.Nursery) -> None:
        self.node, self.nursery = node, nursery
        self.told: list[int] = []
        self.notices: list[str] = []
        self.broken = False

    def progress(self, done: int, total: int | None) -> None:
        self.told.append(done)
        if done > SIZE // 3 and not self.broken:
            self.broken = True
            self.nursery.start_soon(self._restart)

    async def _restart(self) -> None:
        await self.node.process.stop(SIGKILL)
        self.node.process.start()
        await self.node.wait_ready()

    def lost(self) -> int:
        """Bytes that were sent a second time."""
        return max(0, *(before - after for before, after in itertools.pairwise(self.told)))


@asynccontextmanager
async def tool(node: LocalNode) -> AsyncIterator[Gftp]:
    """A `gftp` session in front of a node."""
    async with trio.open_nursery() as nursery:
        gftp = Gftp(node.data_dir / "bus.sock")
        await nursery.start(gftp.run)
        yield gftp
        nursery.cancel_scope.cancel()


@trio_test
async def test_200_mb_both_ways_through_nodes_that_die(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for delays in ("RETRY_DELAYS_S", "PATIENT_DELAYS_S"):
        monkeypatch.setattr(golem.exeunit.transfer.transfers, delays, (0.3,) * 100)
    source, volume = tmp_path / "source", tmp_path / "volume"
    source.write_bytes(random.Random(3).randbytes(SIZE))
    volume.mkdir()
    with within(100):
        async with open_localnet(tmp_path / "net") as net:
            requestor, provider = await net.start_node("requestor"), await net.start_node("provider")
            async with tool(requestor) as publisher, trio.open_nursery() as nursery:
                [published] = await publisher.publish([str(source)])
                slot = await publisher.receive(str(tmp_path / "back"))
                transfers = Transfers(TransferPolicy.local(), BusGftp(provider.data_dir / "bus.sock"))

                async def move(origin: str, goal: str, breaker: Breaker) -> None:
                    volumes = (Volume("/v", volume),)
                    size = await transfers.transfer(
                        origin, goal, volumes, progress=breaker.progress, notice=breaker.notices.append
                    )
                    assert size == SIZE
                    assert breaker.broken
                    assert breaker.told[-1] == SIZE
                    assert breaker.notices

                there = Breaker(requestor, nursery)
                await move(published["url"], "container:/v/file", there)
                assert there.lost() == 0  # every byte was written once
                back = Breaker(requestor, nursery)
                await move("container:/v/file", slot["url"], back)
                assert back.lost() < 32 << 20  # what was on its way, and not the third that had arrived
                own = Breaker(provider, nursery)
                slot = await publisher.receive(str(tmp_path / "again"))  # a slot takes one file
                await move("container:/v/file", slot["url"], own)
                assert own.lost() < 32 << 20
            assert sha256(volume / "file") == sha256(tmp_path / "back") == sha256(tmp_path / "again") == sha256(source)
            assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []
