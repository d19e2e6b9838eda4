"""Disks that go back in time, and disks that run twice: nothing is lost in silence, and nothing is done twice."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import pytest
import trio
from worlds.support import mock_trio_test

from actors.kernel.journal import Journal
from actors.kernel.lineage import agreed, boot_at, marked
from actors.kernel.machine import Emit, LinkDown, Meta, Rows, Send, Step
from actors.kernel.system import System
from protocol.codec import Ack, Decoder, decode_ack, encode_ack
from protocol.types import Message, PeerLost, Undelivered

STARTS = count(1)


class Say(Message, frozen=True):
    """A command: say these words to B."""

    words: tuple[str, ...]
    deadline_s: float = 1e6


class Word(Message, frozen=True):
    word: str


class Talker:
    """Says words and keeps those it hears; counts what it is told of losses."""

    name = "talk"
    local = Say | Undelivered | PeerLost
    peer = Word
    rows = Word

    def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
        match message:
            case Say(words, deadline_s):
                to = "A" if meta.sender.startswith("B") else "B"
                return Step({}, [Send(f"{to}/talk", Word(word), deadline_s) for word in words])
            case Word(word):
                assert f"heard/{word}" not in rows, f"{word} came twice"
                return Step({f"heard/{word}": message}, [Emit("heard", message)])
            case _:
                return Step({}, [Emit("told", message)])


class Cable:
    """Carries frames to whatever process bears the name now; `slow` names nodes whose frames take a second."""

    def __init__(self) -> None:
        self.at: dict[str, System] = {}
        self.cut = False

    async def exchange(self, source: str, node: str, frame: bytes) -> bytes:
        await trio.sleep(0.01)
        if self.cut or node not in self.at:
            raise LinkDown(f"{node} is out of reach")
        return await self.at[node].deliver(frame, source)


class Plug:
    """A node's end of the cable."""

    def __init__(self, cable: Cable, node: str) -> None:
        self.cable, self.node = cable, node

    async def exchange(self, node: str, frame: bytes) -> bytes:
        return await self.cable.exchange(self.node, node, frame)


def disk() -> sqlite3.Connection:
    return sqlite3.connect(":memory:", isolation_level=None)


def copy_of(db: sqlite3.Connection) -> sqlite3.Connection:
    """Return a disk as `db` is now: a backup, or a copied data directory."""
    copy = disk()
    db.backup(copy)
    return copy


@asynccontextmanager
async def node(name: str, db: sqlite3.Connection, cable: Cable) -> AsyncIterator[System]:
    """Run a node on a disk. The node started last is the one that the others reach."""
    numbers = count()
    journal = Journal.over(db, lambda: f"start{next(STARTS)}")
    system = System(
        name, journal, Plug(cable, name), clock=lambda: 1e9 + trio.current_time(), new_trace=lambda: f"{name}{next(numbers)}"
    )
    system.add(Talker())
    async with trio.open_nursery() as nursery:
        await nursery.start(system.run)
        cable.at[name] = system
        try:
            yield system
        finally:
            if cable.at.get(name) is system:
                del cable.at[name]
            nursery.cancel_scope.cancel()


_read: Callable[[bytes], Any] = Decoder[Any](Word | PeerLost | Undelivered)


def heard(system: System) -> list[str]:
    """Return the words a node heard, in order."""
    return [_read(event.body).word for event in system.feeds.read("heard", 0, 1000)]


def told(system: System) -> list[Any]:
    return [_read(event.body) for event in system.feeds.read("told", 0, 1000)]


async def settled(system: System) -> None:
    """Wait until everything a node has to say is said, or some time is over."""
    with trio.move_on_after(120):
        while system.journal.links():
            await trio.sleep(0.1)


async def say(system: System, *words: str) -> None:
    await system.ask("talk", Say(words))


# -- the sender went back
@mock_trio_test
async def test_a_sender_restored_from_an_older_copy_loses_nothing_that_it_says_now() -> None:
    cable, db = Cable(), disk()
    async with node("B", disk(), cable) as b:
        async with node("A", db, cable) as a:
            await say(a, "1", "2", "3")
            await settled(a)
            backup = copy_of(db)
            await say(a, "4", "5", "6", "7")
            await settled(a)
        async with node("A", backup, cable) as a:
            await say(a, "one", "two", "three", "four", "five", "six")  # their numbers meet those of 4 to 7
            await settled(a)
            assert a.journal.links() == []
            assert a.troubles() == []
            assert heard(b) == ["1", "2", "3", "4", "5", "6", "7", "one", "two", "three", "four", "five", "six"]
            assert told(a) == [PeerLost("B/talk", 4, 7, here=True)]
        async with node("A", backup, cable) as a:
            await say(a, "and on")
            await settled(a)
            assert heard(b)[-1] == "and on"


@mock_trio_test
async def test_a_sender_restored_within_one_start_finds_numbers_beyond_its_own() -> None:
    """The peer acknowledges what the restored node has not sent yet, without anything new to say."""
    cable, db = Cable(), disk()
    async with node("B", disk(), cable) as b:
        async with node("A", db, cable) as a:
            await say(a, "1", "2", "3")
            await settled(a)
            backup = copy_of(db)
            await say(a, "4", "5", "6", "7")
            await settled(a)
        async with node("A", backup, cable) as a:
            await say(a, "x")
            await settled(a)
            assert heard(b) == ["1", "2", "3", "4", "5", "6", "7", "x"]
            assert told(a) == [PeerLost("B/talk", 4, 7, here=True)]


@mock_trio_test
async def test_what_waited_in_the_backup_and_was_delivered_since_is_not_said_again() -> None:
    cable, db = Cable(), disk()
    async with node("B", disk(), cable) as b:
        async with node("A", db, cable) as a:
            cable.cut = True
            await say(a, "1", "2", "3")
            backup = copy_of(db)
            cable.cut = False
            await settled(a)
            await say(a, "4")
            await settled(a)
        cable.cut = True
        for word in ("x", "y"):  # started twice before it meets its peer again
            async with node("A", backup, cable) as a:
                await say(a, word)
        cable.cut = False
        async with node("A", backup, cable) as a:
            await say(a, "z")
            await settled(a)
            assert heard(b) == ["1", "2", "3", "4", "x", "y", "z"]
            assert told(a) == [PeerLost("B/talk", 4, 4, here=True)]


# -- the recipient went back
@mock_trio_test
async def test_a_restored_recipient_has_no_hole_in_silence() -> None:
    cable, db = Cable(), disk()
    async with node("A", disk(), cable) as a:
        async with node("B", db, cable):
            await say(a, "1", "2", "3")
            await settled(a)
            backup = copy_of(db)
            await say(a, "4", "5")
            await settled(a)
        async with node("B", backup, cable) as b:
            await say(a, "6", "7")
            await settled(a)
            assert heard(b) == ["1", "2", "3", "6", "7"]
            assert told(a) == [PeerLost("B/talk", 4, 5)]
            assert a.troubles() == []


@mock_trio_test
async def test_a_recipient_that_went_back_is_noticed_after_the_senders_restart_too() -> None:
    cable, sender, db = Cable(), disk(), disk()
    async with node("A", sender, cable) as a, node("B", db, cable):
        await say(a, "1", "2", "3")
        await settled(a)
        backup = copy_of(db)
        await say(a, "4", "5")
        await settled(a)
        await trio.sleep(1)  # acknowledgements reach the disk soon
    async with node("A", sender, cable) as a, node("B", backup, cable) as b:
        await say(a, "6")
        await settled(a)
        assert heard(b) == ["1", "2", "3", "6"]
        assert told(a) == [PeerLost("B/talk", 4, 5)]


@mock_trio_test
async def test_a_recipient_that_goes_back_again_and_further_is_followed() -> None:
    """The sender learns from it which start numbered a message long ago; the second time, an earlier one of that start."""
    cable, sender, db = Cable(), disk(), disk()
    backups = []
    async with node("A", sender, cable) as a, node("B", db, cable):
        for word in ("1", "2", "3"):
            await say(a, word)
            await settled(a)
            backups.append(copy_of(db))
        await trio.sleep(1)  # acknowledgements reach the disk soon
    async with node("A", sender, cable) as a, node("B", db, cable):
        await say(a, "4", "5")
        await settled(a)
        await trio.sleep(1)
    async with node("A", sender, cable) as a:
        for number, backup in ((6, backups[2]), (7, backups[1]), (8, backups[0])):
            async with node("B", backup, cable) as b:
                await say(a, str(number))
                await settled(a)
                assert heard(b) == [*map(str, range(1, 10 - number)), str(number)]
        assert a.troubles() == []


@mock_trio_test
async def test_a_lost_disk_is_told_as_well() -> None:
    cable, sender = Cable(), disk()
    async with node("A", sender, cable) as a:
        async with node("B", disk(), cable):
            await say(a, "1", "2")
            await settled(a)
        async with node("B", disk(), cable) as b:
            await say(a, "3")
            await settled(a)
            assert heard(b) == ["3"]
            assert told(a) == [PeerLost("B/talk", 1, 2)]
            [(peer, (_, words))] = a.went_back.items()
            assert (peer, words) == ("B", "it forgot what this node said to it (talk: messages 1 to 2)")


@mock_trio_test
async def test_messages_given_up_are_no_hole() -> None:
    """Numbers that never left are missing for good, whether or not the recipient has heard some of them."""
    cable, db = Cable(), disk()
    async with node("B", disk(), cable) as b, node("A", db, cable) as a:
        await say(a, "1")
        await settled(a)
        cable.cut = True
        await a.ask("talk", Say(("2", "3"), 5))
        await trio.sleep(20)
        cable.cut = False
        await say(a, "4")
        await settled(a)
        assert heard(b) == ["1", "4"]
        assert [type(one) for one in told(a)] == [Undelivered, Undelivered]


# -- one disk at work twice
@mock_trio_test
async def test_a_copied_data_directory_that_runs_on_two_machines_loses_nothing_of_either() -> None:
    cable, first = Cable(), disk()
    async with node("B", disk(), cable) as b:
        async with node("A", first, cable) as a:
            await say(a, "before")
            await settled(a)
        second = copy_of(first)
        async with node("A", first, cable) as a1, node("A", second, cable) as a2:
            said = {a1: ["before"], a2: ["before"]}
            for number in range(20):
                for name, twin in (("p", a1), ("q", a2)):
                    await say(twin, f"{name}{number}")
                    said[twin].append(f"{name}{number}")
                    await trio.sleep(2)
            left = {twin: [word for _, recipient in twin.journal.links() for word in waiting(twin, recipient)] for twin in said}
            assert len(left[a1]) + len(left[a2]) > 0, "one of the two is refused"
            for twin, words in said.items():
                delivered = [word for word in words if word not in left[twin]]
                assert [word for word in heard(b) if word in delivered] == delivered
                assert set(left[twin]) | set(heard(b)) >= set(words)
            refused = next(twin for twin in said if left[twin])
            assert "copied journal" in b.older["A/talk"]
            assert "refused" in refused.troubles()[0][2]
        # the other machine is switched off; this one starts again, and goes on
        disk_left = first if refused is a1 else second
        async with node("A", disk_left, cable) as a:
            await settled(a)
            assert set(heard(b)) == set(said[a1]) | set(said[a2])


def waiting(system: System, recipient: str) -> list[str]:
    return [_read(posted.body).word for posted in system.journal.pending("talk", recipient, 0, 1000)[0]]


@mock_trio_test
async def test_a_disk_that_is_put_back_has_a_way_out() -> None:
    """A node ran for a while on an empty disk; then its old disk returns."""
    cable, old = Cable(), disk()
    async with node("B", disk(), cable) as b:
        async with node("A", old, cable) as a:
            await say(a, "1", "2")
            await settled(a)
        async with node("A", disk(), cable) as a:
            await say(a, "3")
            await settled(a)
        async with node("A", old, cable) as a:
            await say(a, "4", "5")
            await settled(a)
            assert heard(b) == ["1", "2", "3", "4", "5"]
            assert [type(one) for one in told(a)] == [PeerLost]
            assert a.troubles() == []


# -- what a liar gains
@mock_trio_test
async def test_a_peer_that_acknowledges_nonsense_for_ever_costs_little() -> None:
    class Liar(Cable):
        frames = 0

        async def exchange(self, source: str, node: str, frame: bytes) -> bytes:
            self.frames += 1
            await trio.sleep(0.01)
            return encode_ack(Ack(1 << 40, "", ("1:99-evil",)))

    cable = Liar()
    async with node("A", disk(), cable) as a:
        await say(a, "1")
        await trio.sleep(600)
        assert cable.frames < 200
        assert len(a.journal.pending("talk", "B/talk", 0, 10)[0]) == 1


@mock_trio_test
async def test_a_link_between_two_actors_of_one_node_survives_a_restored_disk() -> None:
    """Both ends of it went back together: nothing is amiss."""
    db = disk()
    cable = Cable()
    async with node("A", db, cable) as a:
        for _ in range(3):
            await a.post("edge", [Send("talk", Say(("x",)))])
        backup = copy_of(db)
    async with node("A", backup, cable) as a:
        await a.post("edge", [Send("talk", Say(("y",)))])
        await trio.sleep(1)
        assert told(a) == []


def test_marks() -> None:
    marks: tuple[str, ...] = ()
    for seq, boot in ((1, "a"), (2, "a"), (5, "b"), (6, "b"), (9, "c")):
        marks = marked(marks, seq, boot)
    assert marks == ("1:a", "5:b", "9:c")
    assert [boot_at(marks, seq) for seq in (0, 1, 4, 5, 8, 9, 99)] == ["", "a", "a", "b", "b", "c", "c"]
    assert agreed(("1:a", "5:b"), ("1:a", "7:c"), 0, 9) == 4
    assert agreed(("1:a", "5:b"), ("1:a", "5:b"), 3, 9) == 9
    assert agreed(("5:b",), ("1:x", "5:c"), 2, 9) == 2
    assert agreed((), (), 0, 0) == 0
    long: tuple[str, ...] = ()
    for seq in range(1, 100):
        long = marked(long, seq, str(seq))
    assert len(long) == 8
    assert long[-1] == "99:99"


@pytest.mark.parametrize("ack", [Ack(1, "", ("x",)), Ack(1, "", ("1:a b",)), Ack(1, "", ("1:a",) * 9)])
def test_malformed_marks_are_refused(ack: Ack) -> None:
    from protocol.types import Violation

    with pytest.raises(Violation):
        decode_ack(encode_ack(ack))


# -- where nobody has anything to say
@mock_trio_test
async def test_a_restored_recipient_is_noticed_when_the_session_comes_up() -> None:
    cable, db = Cable(), disk()
    async with node("A", disk(), cable) as a:
        async with node("B", db, cable):
            await say(a, "1", "2", "3")
            await settled(a)
            backup = copy_of(db)
            await say(a, "4", "5")
            await settled(a)
        async with node("B", backup, cable) as b:
            a.peer_up("B")
            await trio.sleep(5)
            assert told(a) == [PeerLost("B/talk", 4, 5)]
            a.peer_up("B")
            await trio.sleep(5)
            assert len(told(a)) == 1
            assert heard(b) == ["1", "2", "3"]


@mock_trio_test
async def test_a_restored_sender_notices_when_the_session_comes_up() -> None:
    cable, db = Cable(), disk()
    async with node("B", disk(), cable) as b:
        async with node("A", db, cable) as a:
            await say(a, "1")
            await settled(a)
            await trio.sleep(1)
            backup = copy_of(db)
            await say(a, "2")
            await settled(a)
        async with node("A", backup, cable) as a:
            cable.cut = True
            a.peer_up("B")  # a session that breaks at once
            await trio.sleep(5)
            assert told(a) == []
            cable.cut = False
            a.peer_up("B")
            await trio.sleep(5)
            assert told(a) == [PeerLost("B/talk", 2, 2, here=True)]
            assert heard(b) == ["1", "2"]
            assert not b.violations


@mock_trio_test
async def test_a_disk_that_returns_after_an_empty_one_gets_nothing_twice() -> None:
    """What waited when the recipient lost its disk was known to the old disk, which comes back."""
    cable, db = Cable(), disk()
    async with node("A", disk(), cable) as a:
        async with node("B", db, cable):
            await say(a, "1")
            await settled(a)
        async with node("B", disk(), cable) as b:
            await say(a, "2")
            await settled(a)
            assert heard(b) == ["2"]
        async with node("B", db, cable) as b:
            await say(a, "3")
            await settled(a)
            assert heard(b) == ["1", "3"]
            assert told(a) == [PeerLost("B/talk", 1, 1), PeerLost("B/talk", 2, 2)]
