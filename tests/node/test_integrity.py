"""Databases with damaged pages are told at start, with what to do, in bounded time."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from worlds.node_in_test import node_in_test
from worlds.support import trio_test

from golem.config import ConfigError
from golem.node import integrity
from protocol.ledger import CreateAllocation
from protocol.types import Done

PAGE = 4096


async def filled(folder: Path) -> Path:
    """Return the data directory of a node that has lived."""
    async with node_in_test(folder) as node:
        for number in range(60):
            command = CreateAllocation(f"{number:04d}" * 60, node.node_id, "erc20-local-tglm", "1", None)
            assert await node.system.ask("ledger", command) == Done()
        return node.config.data_dir


def spoil(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "no database":
        content[:PAGE] = os.urandom(PAGE)
    elif how == "cut":
        del content[len(content) // PAGE // 2 * PAGE :]
    else:  # every page but the first begins with nonsense: whichever is in use, one is met
        for start in range(PAGE, len(content), PAGE):
            content[start : start + 16] = b"\xee" * 16
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["node.db", "chain.db"])
@pytest.mark.parametrize("how", ["no database", "cut", "pages"])
@trio_test
async def test_a_damaged_database_is_refused_with_what_to_do(tmp_path: Path, name: str, how: str) -> None:
    data_dir = await filled(tmp_path)
    spoil(data_dir / name, how)
    before = (data_dir / name).read_bytes()
    with pytest.raises(ConfigError, match=rf"{name} is damaged .*golem restore"):
        async with node_in_test(tmp_path):
            pass
    assert (data_dir / name).read_bytes() == before


class Impatient:
    """A timer whose time is over all the while."""

    def __init__(self, seconds: float, interrupt: Callable[[], None]) -> None:
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.run, args=(interrupt,))
        self.start, self.cancel, self.join = self.thread.start, self.over.set, self.thread.join

    def run(self, interrupt: Callable[[], None]) -> None:
        while not self.over.is_set():
            interrupt()


def test_a_large_database_is_looked_at_for_a_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "node.db"
    with closing(sqlite3.connect(file)) as db:
        db.execute("create table row (key integer primary key, body blob)")
        db.executemany("insert into row values (?, ?)", ((number, os.urandom(3000)) for number in range(10_000)))
        db.commit()
    with file.open("r+b") as raw:
        raw.seek(5 * PAGE)  # SQLite looks at the last rows first
        raw.write(b"\xee" * PAGE)
    assert integrity._fault(file, 3600.0)
    monkeypatch.setattr(integrity, "Timer", Impatient)
    looks = (integrity._fault(file, 0.0) for _ in range(100))  # on a busy machine the thread may come too late, now and then
    assert "" in looks, "the look is never broken off before the first rows, where the damage is"
