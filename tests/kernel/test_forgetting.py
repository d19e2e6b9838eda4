"""Links that have been silent for long are forgotten, nothing comes twice for it, and a file gives its room back."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest
import trio
from test_older_disks import Cable, Say, copy_of, disk, heard, node, say, settled, told
from worlds.patience import within
from worlds.support import mock_trio_test, trio_test

from actors.kernel import tables as tables_module
from actors.kernel.journal import Journal
from actors.kernel.machine import MAX_DEADLINE_S
from actors.kernel.records import Commit, Event
from actors.kernel.tables import DAY_S, INBOX_KEPT_S, LEFT_PAGES, MIGRATIONS, SENT_KEPT_S
from protocol.types import Undelivered


def link_rows(db: sqlite3.Connection) -> dict[str, int]:
    """Return how many rows of links a disk holds, by table."""
    return {name: db.execute(f"select count(*) from {name}").fetchone()[0] for name in ("inbox", "sent", "mark")}


@mock_trio_test
async def test_a_silent_link_is_forgotten_on_both_sides_and_goes_on_without_an_alarm() -> None:
    cable, here, there = Cable(), disk(), disk()
    async with node("B", there, cable) as b, node("A", here, cable) as a:
        await say(a, "1", "2", "3")
        await settled(a)
        for days in (SENT_KEPT_S / DAY_S - 1, 2):
            await trio.sleep(days * DAY_S)
            for system in (a, b):
                await system.forget_links()
        assert link_rows(here) == {"inbox": 0, "sent": 0, "mark": 0}, "nothing waits: the sender forgets first"
        assert link_rows(there)["inbox"] == 1
        await say(a, "4", "5")
        await settled(a)
        assert heard(b) == ["1", "2", "3", "4", "5"], "in the same start, and the recipient remembers the first numbering"
        await trio.sleep(INBOX_KEPT_S + DAY_S)
        for system in (b, a):  # whoever comes first
            await system.forget_links()
        assert link_rows(there) == link_rows(here) == {"inbox": 0, "sent": 0, "mark": 0}
        await say(a, "6")
        await settled(a)
        assert heard(b)[-1] == "6"
        assert told(a) == told(b) == [], "nobody went back in time"
        assert a.troubles() == []


@mock_trio_test
async def test_a_node_that_was_off_for_long_begins_anew_before_it_sends() -> None:
    cable, here = Cable(), disk()
    async with node("B", disk(), cable) as b:
        async with node("A", here, cable) as a:
            await say(a, "1", "2", "3")
            await settled(a)
        await trio.sleep(INBOX_KEPT_S + DAY_S)
        await b.forget_links()
        async with node("A", here, cable) as a:
            a.peer_up("B")
            b.peer_up("A")
            await say(a, "4")
            await settled(a)
            assert heard(b) == ["1", "2", "3", "4"]
            assert told(a) == []


@mock_trio_test
async def test_a_link_in_use_or_with_something_to_say_is_kept() -> None:
    cable, here = Cable(), disk()
    async with node("A", here, cable) as a:
        await say(a, "1")  # to nobody who is there
        await trio.sleep(DAY_S)
        kept = link_rows(here)
        assert kept == {"inbox": 0, "sent": 1, "mark": 1}
        assert await a.journal.forget_links(a.now() + 10 * INBOX_KEPT_S) == [], "a message waits"
        assert link_rows(here) == kept
        async with node("B", disk(), cable) as b:
            await settled(a)
            assert await a.journal.forget_links(a.now()) == [], "it was used a day ago"
            assert heard(b) == ["1"]


@mock_trio_test
async def test_who_slept_for_months_sends_nothing_that_its_recipient_may_have_forgotten() -> None:
    """The acknowledgement of a first message is lost, the recipient forgets, and only then the sender wakes up."""
    cable, here = Cable(), disk()
    async with node("B", disk(), cable) as b:
        async with node("A", here, cable) as a:
            cable.cut = True
            await a.ask("talk", Say(("once",), 1e9))
            older = copy_of(here)
            cable.cut = False
            await settled(a)
            assert heard(b) == ["once"]
        (deadline,) = older.execute("select deadline from outbox").fetchone()
        assert deadline <= b.now() + MAX_DEADLINE_S, "no message waits longer, whatever its sender wanted"
        await trio.sleep(INBOX_KEPT_S + DAY_S)
        await b.forget_links()
        async with node("A", older, cable) as a:
            await settled(a)
            await say(a, "later")
            await settled(a)
            assert heard(b) == ["once", "later"]
            assert [type(one) for one in told(a)] == [Undelivered]


def fill(journal: Journal, events: int) -> None:
    """Write events of 4 KiB."""
    body = b"x" * 4096
    journal._tables.write([Commit("a", events=[("f", Event(n, float(n), body)) for n in range(1, events + 1)])], {})


@trio_test
async def test_a_file_gives_its_room_back_in_small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "node.db"
    journal = Journal(str(path), lambda: "e" * 16)
    fill(journal, 8000)
    pieces: list[int] = []
    give_back = journal._tables.give_back

    def counted() -> bool:
        before = journal._writer.execute("pragma freelist_count").fetchone()[0]
        more = give_back()
        pieces.append(before - journal._writer.execute("pragma freelist_count").fetchone()[0])
        return more

    monkeypatch.setattr(journal._tables, "give_back", counted)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(journal.run)
        with within(10):
            assert await journal.prune(1e9) == 8000
            journal._writer.execute("pragma wal_checkpoint(truncate)")
            big = os.path.getsize(path)
            await journal.give_back()
            journal._writer.execute("pragma wal_checkpoint(truncate)")
        assert big > 8000 * 4096
        assert os.path.getsize(path) < 2 * LEFT_PAGES * 4096, "what a file keeps is for what comes next"
        assert len(pieces) > 10
        assert max(pieces) <= tables_module.GIVEN_BACK_AT_ONCE, "a commit waits for one piece"
        assert min(pieces[:-1]) == tables_module.GIVEN_BACK_AT_ONCE, "each piece is a transaction, and costs its fsync"
        nursery.cancel_scope.cancel()
    journal.close()


def test_a_file_from_before_is_brought_up_and_gives_its_room_back_as_well(tmp_path: Path) -> None:
    path = str(tmp_path / "node.db")
    old = sqlite3.connect(path, isolation_level=None)
    old.create_function("sealed", 3, tables_module.sealed)
    for script in MIGRATIONS[:4]:
        old.executescript(script)
    old.execute("pragma user_version=4")
    old.execute("insert into inbox values ('a', 'B/b', 'e', 3, '', '')")
    old.execute("insert into sent values ('a', 'B/b', 3, 'e', 3)")
    old.close()
    journal = Journal(path, lambda: "e" * 16)
    assert journal._writer.execute("pragma auto_vacuum").fetchone()[0] == 2
    assert journal._tables.forget_links(journal.clock()) == ([], False), "their time begins now"
    assert journal.position("a", "B/b").seq == journal.outgoing("a", "B/b").acked == 3
    journal.close()
