"""What is read in several steps while the journal's thread writes: a transaction may land before any of them.

Each case is tried with a transaction that lands before the first read, before the second one, and so on.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from msgspec import msgpack
from worlds.support import mock_trio_test

from actors.kernel.courier import Courier
from actors.kernel.journal import Journal
from actors.kernel.lineage import Relink
from actors.kernel.machine import LinkDown, Meta, Rows, Step
from actors.kernel.mail import DeadlinePassed
from actors.kernel.records import Commit, Posted
from actors.kernel.system import System
from protocol.types import Message, Undelivered

MOST_READS = 12


class Landing(Journal):
    """A journal whose transaction lands before the read that `countdown` says."""

    countdown = -1
    transaction: Commit | None = None

    def _read(self, query: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        self.countdown -= 1
        if self.countdown == 0 and self.transaction:
            self.land(self.transaction)
        return super()._read(query, values)

    def land(self, commit: Commit) -> None:
        """Have a commit written, as the thread does."""
        self._write([commit], {})


class Quiet:
    name, local, peer, rows = "talk", Undelivered, None, Message

    def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
        return Step()


class Nowhere:
    async def exchange(self, node: str, frame: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        raise LinkDown("nowhere")


Disk = Callable[[], sqlite3.Connection]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Connect to one file again and again."""
    found: list[sqlite3.Connection] = []

    def connect() -> sqlite3.Connection:
        found.append(db := sqlite3.connect(tmp_path / "node.db", isolation_level=None))
        db.execute("pragma journal_mode=wal")
        return db

    yield connect
    for db in found:
        db.close()


def started(disk: Disk, name: str) -> tuple[Landing, System]:
    journal = Landing.over(disk(), lambda: name, disk())
    assert isinstance(journal, Landing)
    system = System("A", journal, Nowhere(), clock=lambda: 1000.0, new_trace=lambda: "t")
    system.add(Quiet())
    return journal, system


def post(seq: int, deadline: float = 1e6) -> Commit:
    return Commit("talk", outbox=[("B/talk", Posted(seq, deadline, "t", msgpack.encode(seq)))])


@pytest.mark.parametrize("before_read", range(1, MOST_READS))
@mock_trio_test
async def test_a_message_that_lands_while_a_courier_gathers_bears_the_start_that_numbered_it(
    before_read: int, disk: Disk
) -> None:
    first, _ = started(disk, "one")
    first.land(post(1))
    journal, system = started(disk, "two")
    courier = Courier(system, "talk", "B/talk")
    journal.transaction, journal.countdown = post(2), before_read
    starts = {1: first.boot, 2: journal.boot}
    for envelope in courier._gather():
        assert envelope.boot == starts[envelope.seq]


@pytest.mark.parametrize("before_read", range(1, MOST_READS))
@mock_trio_test
async def test_a_deadline_is_not_taken_for_that_of_the_message_which_has_its_number_now(before_read: int, disk: Disk) -> None:
    journal, system = started(disk, "one")
    journal.land(post(1, deadline=900.0))
    journal.land(post(2))
    journal.transaction = Commit("talk", relinked=[Relink("B/talk", "new numbering", 1)])  # the second message is the first
    journal.countdown = before_read
    await system.alarms._bring("talk", 1000.0)
    actor = system.machine("talk")
    assert actor is not None
    journal.countdown = -1
    for alarm in actor._alarms.values():
        assert isinstance(alarm, DeadlinePassed)
        posted = journal.posted("talk", "B/talk", alarm.seq)
        is_meant = posted is not None and alarm.epoch == journal.outgoing("talk", "B/talk").epoch
        assert posted is None or not is_meant or posted.deadline <= 1000.0
