"""A disk that cannot be read for a moment ends the process, and no message: nothing is set aside for it, nothing is lost."""

from __future__ import annotations

import sqlite3
from typing import Any

import pytest
import trio
from test_kernel_limits import Do, Doer, Text, disk, frame, running, system_on
from worlds.support import mock_trio_test

from actors.kernel.machine import Emit, Meta, Rows, Step, Wake
from actors.kernel.records import JournalError
from protocol.codec import decode_ack


class Flaky:
    """A connection that fails to read rows while `broken` is set."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db, self.broken = db, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.db, name)

    def execute(self, query: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        if self.broken and "from row" in query:
            raise sqlite3.OperationalError("disk I/O error")
        return self.db.execute(query, values)


class Reader(Doer):
    """Needs its row "base" for everything."""

    def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
        rows.get("base")
        return super().handle(rows, message, meta)


def reader() -> Reader:
    return Reader(
        wake=lambda rows, meta: Step({"base": Text("base")}, [Wake("w", meta.now + 5, Do("ring"))]),
        ring=lambda rows, meta: Step({"rang": Text("x")}, [Emit("rings", Text("x"))]),
        look=lambda rows, meta: Step({}, [Emit("looked", Text("x"))]),
    )


async def broken(db: sqlite3.Connection, what: str) -> None:
    """Run a node whose disk fails while it handles something."""
    system, flaky = system_on(db, reader()), Flaky(db)
    system.journal._reader = flaky  # type: ignore[assignment]
    flaky.broken = what == "timer"  # one that is due already is handled at once
    async with running(system):
        flaky.broken = True
        if what == "peer":
            await system.deliver(frame(1), "B")
        elif what == "ask":
            await system.ask("doer", Do("look"))
        await trio.sleep(60)


@pytest.mark.parametrize("what", ["peer", "timer", "ask"])
@pytest.mark.parametrize("times", [1, 5])
def test_a_read_error_costs_no_message(what: str, times: int) -> None:
    @mock_trio_test
    async def run() -> None:
        db = disk()
        async with running(system_on(db, reader())) as system:
            await system.ask("doer", Do("wake"))
        for _ in range(times):  # each time the process ends, and starts again
            with pytest.raises(BaseExceptionGroup) as found:
                await broken(db, what)
            assert found.value.subgroup(JournalError) is not None
        async with running(system_on(db, reader())) as system:
            ack = decode_ack(await system.deliver(frame(1), "B"))
            await trio.sleep(60)
            assert ack.have == 1
            assert [event.body for event in system.feeds.read("got")]
            assert len(system.feeds.read("rings")) == 1
            assert not system.journal.quarantined()
            assert not system.violations

    run()
