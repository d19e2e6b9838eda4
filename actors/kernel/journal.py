"""The journal: one SQLite file that holds everything a process must not forget.

Rows, inbox positions, outbox, feeds and timers of a step are written in one transaction; several actors' steps that are
ready together share one (`Journal.commit`). Nothing leaves the process before its transaction is on disk. The tables are
in `tables.py`, what is written and read in `records.py`.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import trio

from actors.kernel.lineage import Marks, Outgoing, Position
from actors.kernel.records import Commit, Event, JournalClosed, JournalError, Posted, SetAside, Timer
from actors.kernel.tables import Acks, Writer, bring_up, open_file

ALARMS_AT_ONCE = 256  # of an actor that are due
READ_AT_ONCE = 256  # rows of a prefix read by one query
MERGED_COMMITS = 256  # commits in one transaction
ACK_FLUSH_S = 0.05  # how long acknowledgements wait for a commit to go with: losing them costs a repetition, no more
ASKED_LINKS = 64  # to one node; those to the processes of activities live no longer than their journals
FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)  # of the disk: the file, or the index of its log
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Waiting:
    """A commit in the queue; `written` tells how it ended once `done` is set."""

    commit: Commit
    done: trio.Event = field(default_factory=trio.Event)
    written: bool = False


class Look(trio.abc.Instrument):
    """Ends a read transaction when the task that began it comes to a checkpoint."""

    def __init__(self, reader: sqlite3.Connection) -> None:
        self._reader = reader

    def after_task_step(self, task: Any) -> None:
        """The look is over."""
        trio.lowlevel.remove_instrument(self)
        if self._reader.in_transaction:
            self._reader.execute("commit")


class Journal:
    """Opens the file, reads committed state, writes commits, in the order of the calls, while `run` runs.

    `path=":memory:"` or `threads=False` writes inline on one connection (simulation); otherwise a worker thread writes
    on a connection of its own, so that an fsync never stops the event loop. `make_room`, where
    it is set, is called (in any thread) when the disk is full; if it returns True the transaction is tried once more.
    """

    make_room: Callable[[], bool] | None = None
    ack_flush_s = ACK_FLUSH_S
    clock: Callable[[], float] = staticmethod(time.time)  # seconds since the epoch: when a link was last used

    def __init__(self, path: str, new_epoch: Callable[[], str], *, threads: bool = True, synchronous: str = "FULL") -> None:
        self._threads = threads and path != ":memory:"
        self._writer = open_file(path, synchronous)
        bring_up(self._writer, new_epoch)
        self._reader = open_file(path, synchronous) if self._threads else self._writer
        self._begin()

    @classmethod
    def over(
        cls, connection: sqlite3.Connection, new_epoch: Callable[[], str], reader: sqlite3.Connection | None = None
    ) -> Journal:
        """A journal over a connection that outlives it: the disk of a simulated machine. `reader` is a second one to it."""
        journal = cls.__new__(cls)
        journal._threads = False
        journal._writer, journal._reader = connection, reader or connection
        connection.isolation_level = None
        bring_up(connection, new_epoch)
        journal._begin()
        return journal

    def _begin(self) -> None:
        self._limiter = trio.CapacityLimiter(1)
        self._queue: list[Waiting] = []
        self._wake = trio.Event()
        self._started = trio.Event()
        self._looks = False  # reads between two checkpoints may be one transaction
        self._look = Look(self._reader)
        self.ended = False  # `run` is over: nothing is written any more
        self._acks: Acks = {}  # written with a commit
        self._acks_under_way: Acks = {}
        self._relinks = 0
        self.commits = 0  # transactions so far, for benchmarks and metrics
        read = "select value from meta where key=?"
        self.epoch: str = self._reader.execute(read, ("epoch",)).fetchone()[0]
        self.boot: str = self._reader.execute(read, ("boot",)).fetchone()[0]  # names this start: see `lineage.py`
        self._tables = Writer(self._writer, self.boot)

    def close(self) -> None:
        """Close the file. Everything committed is on disk."""
        if self._reader is not self._writer:
            self._reader.close()
        self._writer.close()

    # -- reading committed state (event loop)
    def _read(self, query: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        try:
            return self._reader.execute(query, values)
        except sqlite3.Error as error:
            raise JournalError(f"cannot read the journal: {error}") from error

    def look(self) -> None:
        """From here to the next checkpoint of this task all reads see one state, while the writer goes on.

        For who reads what others write. An actor's own rows change by its own commits alone: it needs no such look.
        """
        if self._looks and not self._reader.in_transaction:
            self._read("begin")
            trio.lowlevel.add_instrument(self._look)  # for this step alone: every step of every task would pay for it

    def row(self, actor: str, key: str) -> bytes | None:
        """Return a row as it is stored (see `sealed`)."""
        found = self._read("select body from row where actor=? and key=?", (actor, key)).fetchone()
        return found[0] if found else None

    def rows(self, actor: str, prefix: str) -> Iterator[tuple[str, bytes]]:
        """Yield (key, as stored) of the actor's rows whose key starts with `prefix`, in key order."""
        # Read piece by piece, each to its end: a statement left open by a caller that stopped half-way would hold the
        # connection to an old snapshot, for everybody.
        query = "select key, body from row where actor=? and key>=? and key<? order by key limit ?"
        after, end = prefix, prefix + "\U0010ffff"
        while True:
            found = self._read(query, (actor, after, end, READ_AT_ONCE)).fetchall()
            yield from found
            if len(found) < READ_AT_ONCE:
                return
            after = found[-1][0] + "\0"

    def position(self, actor: str, sender: str) -> Position:
        query = "select epoch, seq, retired, boots from inbox where actor=? and sender=?"
        row = self._read(query, (actor, sender)).fetchone()
        return Position(row[0], row[1], tuple(row[2].split()), tuple(row[3].split())) if row else Position()

    def outgoing(self, actor: str, recipient: str) -> Outgoing:
        query = "select epoch, seq, acked from sent where actor=? and recipient=?"
        found = self._read(query, (actor, recipient)).fetchone()
        return Outgoing(*found) if found else Outgoing()

    def standing(self, actor: str, recipient: str) -> tuple[str, int, Marks]:
        """Return the epoch of a link's numbering, up to where it is known to be acknowledged, and its marks (see `marks`)."""
        query = """
            select epoch, acked, first, boot from sent left join mark using (actor, recipient)
            where actor=? and recipient=? order by first
        """
        found = self._read(query, (actor, recipient)).fetchall()
        if not found:
            return "", 0, ()
        epoch, acked = found[0][:2]
        marks = tuple(f"{first}:{boot}" for _, _, first, boot in found if boot is not None)
        return epoch, self._acked(actor, recipient, epoch, acked), marks

    def _acked(self, actor: str, recipient: str, epoch: str, written: int) -> int:
        """Return up to where a numbering is acknowledged, with what is not written yet."""
        for acks in (self._acks, self._acks_under_way):
            told = acks.get((actor, recipient))
            if told is not None and told[0] == epoch and told[1] > written:
                written = told[1]
        return written

    def last_sent(self, actor: str, recipient: str) -> int:
        return self.outgoing(actor, recipient).sent

    def marks(self, actor: str, recipient: str) -> Marks:
        """Return which starts numbered the messages of a link; those before the last acknowledged one may be missing."""
        query = "select first, boot from mark where actor=? and recipient=? order by first"
        return tuple(f"{first}:{boot}" for first, boot in self._read(query, (actor, recipient)))

    def new_epoch(self) -> str:
        """Return a name for a new numbering of a link, used once."""
        self._relinks += 1
        return f"{self.boot}.{self._relinks}"

    def pending(self, actor: str, recipient: str, after: int, limit: int) -> list[Posted]:
        """Return at most `limit` unacknowledged messages of a link behind sequence number `after`."""
        query = "select seq, deadline, trace, body from outbox where actor=? and recipient=? and seq>? order by seq limit ?"
        return [Posted(*found) for found in self._read(query, (actor, recipient, after, limit))]

    def posted(self, actor: str, recipient: str, seq: int) -> Posted | None:
        query = "select seq, deadline, trace, body from outbox where actor=? and recipient=? and seq=?"
        found = self._read(query, (actor, recipient, seq)).fetchone()
        return Posted(*found) if found else None

    def links(self) -> list[tuple[str, str]]:
        """Return (actor, recipient) of all links with something to deliver."""
        return self._read("select distinct actor, recipient from outbox").fetchall()

    def waiting_bytes(self) -> int:
        """Return the size of all messages that nobody has acknowledged yet."""
        return int(self._read("select coalesce(sum(length(body)), 0) from outbox").fetchone()[0])

    def links_to(self, node: str) -> list[tuple[str, str]]:
        """Return (actor, recipient) of links to the actors of a node, of which something was acknowledged."""
        query = "select actor, recipient from sent where recipient>? and recipient<? and acked>0 and recipient not like ? limit ?"
        return self._read(query, (f"{node}/", f"{node}/\U0010ffff", f"{node}/%:%", ASKED_LINKS)).fetchall()

    def overdue(self, actor: str, now: float, limit: int = ALARMS_AT_ONCE) -> list[tuple[str, int, str]]:
        """Return (recipient, seq, epoch) of an actor's messages whose deadline has passed and that nobody acknowledged."""
        # one query: between two, a link may be numbered anew, and a number be another message's
        query = """
            select recipient, outbox.seq, epoch, acked from outbox join sent using (actor, recipient)
            where actor=? and deadline<=? order by deadline, recipient, outbox.seq limit ?
        """
        found = self._read(query, (actor, now, limit)).fetchall()
        return [(to, seq, epoch) for to, seq, epoch, acked in found if self._acked(actor, to, epoch, acked) < seq]

    def due(self, actor: str, now: float, limit: int = ALARMS_AT_ONCE) -> list[Timer]:
        """Return an actor's timers whose time has come, earliest first."""
        query = "select actor, key, at, trace, body from timer where actor=? and at<=? order by at, key limit ?"
        return [Timer(*found) for found in self._read(query, (actor, now, limit))]

    def actors_due(self, now: float) -> list[str]:
        """Return the actors that have a timer or a deadline whose time has come."""
        query = "select actor from timer where at<=? union select actor from outbox where deadline<=? order by 1"
        return [actor for (actor,) in self._read(query, (now, now))]

    def timer(self, actor: str, key: str) -> Timer | None:
        query = "select actor, key, at, trace, body from timer where actor=? and key=?"
        found = self._read(query, (actor, key)).fetchone()
        return Timer(*found) if found else None

    def next_alarm(self, after: float = -math.inf) -> float | None:
        """Return the time of the earliest timer or deadline behind `after`, `None` if there is none."""
        first = self._read("select min(at) from timer where at>?", (after,)).fetchone()[0]
        second = self._read("select min(deadline) from outbox where deadline>?", (after,)).fetchone()[0]
        return min((at for at in (first, second) if at is not None), default=None)

    def feed_head(self, feed: str) -> tuple[int, float]:
        found = self._read("select seq, at from feed_head where name=?", (feed,)).fetchone()
        return (found[0], found[1]) if found else (0, 0.0)

    def events(self, feed: str, after_seq: int, limit: int) -> list[Event]:
        query = "select seq, at, body from feed where name=? and seq>? order by seq limit ?"
        return [Event(*found) for found in self._read(query, (feed, after_seq, limit))]

    def events_after(self, feed: str, after_at: float, limit: int) -> list[Event]:
        query = "select seq, at, body from feed where name=? and at>? order by seq limit ?"
        return [Event(*found) for found in self._read(query, (feed, after_at, limit))]

    def quarantined(self) -> list[SetAside]:
        """Return the messages that were set aside, oldest first, without their bodies."""
        query = "select at, sender, epoch, seq, trace, error, x'', local, actor, id from quarantine order by id"
        return [SetAside(*found) for found in self._read(query)]

    def set_aside(self, number: int) -> SetAside | None:
        """Return one message of the quarantine, whole."""
        query = "select at, sender, epoch, seq, trace, error, body, local, actor, id from quarantine where id=?"
        found = self._read(query, (number,)).fetchone()
        return SetAside(*found) if found else None

    def senders_set_aside(self, actor: str) -> list[str]:
        """Return whose messages to an actor are in quarantine."""
        query = "select distinct sender from quarantine where actor=?"
        return [sender for (sender,) in self._read(query, (actor,))]

    def refused(self, actor: str, sender: str, epoch: str, first: int, last: int) -> tuple[int, ...]:
        """Return which messages of a part of a link are in quarantine."""
        query = "select seq from quarantine where actor=? and sender=? and epoch=? and seq between ? and ? order by seq"
        return tuple(seq for (seq,) in self._read(query, (actor, sender, epoch, first, last)))

    def acked(self, actor: str, recipient: str) -> int:
        """Return up to where a link is known to be acknowledged."""
        known = self.outgoing(actor, recipient)
        return self._acked(actor, recipient, known.epoch, known.acked)

    # -- writing
    def acknowledge(self, actor: str, recipient: str, seq: int, epoch: str) -> None:
        """Let the outbox forget a link's messages up to `seq` of the numbering `epoch`, with the next transaction or soon."""
        link = (actor, recipient)
        before = self._acks.get(link)
        self._acks[link] = (epoch, max(seq, before[1]) if before and before[0] == epoch else seq)
        self._wake.set()

    async def commit(self, commit: Commit) -> None:
        """Return when `commit` is on disk. Raises `JournalError`; then it may or may not be, and the process ends.

        Cancellation does not part a caller from a commit that is under way: what follows a commit follows it surely,
        unless the whole process ends.
        """
        commit.at = self.clock()
        waiting = Waiting(commit)
        if not self.ended:
            self._queue.append(waiting)
            self._wake.set()
            if not self._started.is_set():
                try:
                    await self._started.wait()
                except trio.Cancelled:
                    self._queue.remove(waiting)
                    raise
            with trio.CancelScope(shield=True):
                await waiting.done.wait()
        if not waiting.written:
            await trio.lowlevel.checkpoint()  # whoever belongs to the ending process is cancelled here
            raise JournalClosed("the journal is closed")

    async def run(self) -> None:
        """Serve commits, all that are ready in one transaction. Runs as long as the process' actors do."""
        batch: list[Waiting] = []
        self._started.set()
        self._looks = self._reader is not self._writer
        try:
            while True:
                await self._wake.wait()
                with trio.move_on_after(self.ack_flush_s):
                    while not self._queue:
                        self._wake = trio.Event()
                        await self._wake.wait()
                self._wake = trio.Event()
                while self._queue or self._acks:
                    batch, self._queue = self._queue[:MERGED_COMMITS], self._queue[MERGED_COMMITS:]
                    self._acks_under_way, self._acks = self._acks, {}
                    await self._store([waiting.commit for waiting in batch], self._acks_under_way)
                    self._acks_under_way = {}
                    for waiting in batch:
                        waiting.written = True
                        waiting.done.set()
        finally:
            self.ended = True
            self._looks = False
            for waiting in (*batch, *self._queue):
                waiting.done.set()

    @asynccontextmanager
    async def stopped(self) -> AsyncIterator[None]:
        """Write no transaction for the length of the block: commits wait (a backup is taken)."""
        async with self._limiter:
            yield

    async def _store(self, commits: list[Commit], acks: Acks) -> None:
        """Write one transaction. Once begun in its thread, it is not cancelled."""
        if self._threads:
            await trio.to_thread.run_sync(self._write, commits, acks, limiter=self._limiter)
        else:
            await trio.lowlevel.checkpoint()
            self._write(commits, acks)

    def _write(self, commits: list[Commit], acks: Acks) -> None:
        try:
            try:
                self._tables.write(commits, acks)
            except sqlite3.OperationalError as error:
                # nothing of a transaction that met a full disk is there: SQLite has rolled it back, or we have
                if error.sqlite_errorcode not in FULL or self.make_room is None or not self.make_room():
                    raise
                self._tables.write(commits, acks)
        except sqlite3.Error as error:
            raise JournalError(f"cannot write the journal: {error}") from error
        self.commits += 1

    async def prune(self, before: float) -> int:
        """Delete feed events older than `before`, between commits; return how many. Raises `JournalError`."""
        deleted, more = 0, True
        while more:  # in pieces: commits wait for each of them
            found, more = await self._tidy(self._tables.prune, before)
            deleted += found
        return deleted

    async def forget_links(self, now: float) -> list[tuple[str, str]]:
        """Forget links that have been silent for long (see `tables.py`); return (actor, recipient) of those numbered here.

        Raises `JournalError`.
        """
        forgotten: list[tuple[str, str]] = []
        more = True
        while more:
            found, more = await self._tidy(self._tables.forget_links, now)
            forgotten += found
        return forgotten

    async def give_back(self) -> None:
        """Give the room of what was deleted back to the file system, between commits. Raises `JournalError`."""
        while await self._tidy(self._tables.give_back):
            pass

    async def _tidy(self, work: Callable[..., T], *args: Any) -> T:
        """Do a piece of work on the tables, between two transactions."""
        try:
            if self._threads:
                return await trio.to_thread.run_sync(work, *args, limiter=self._limiter)
            await trio.lowlevel.checkpoint()
            return work(*args)
        except sqlite3.Error as error:
            raise JournalError(f"cannot write the journal: {error}") from error
