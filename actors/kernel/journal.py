"""The journal: one SQLite file that holds everything a process must not forget.

Rows, inbox positions, outbox, feeds and timers of a step are written in one transaction; several actors' steps that are
ready together share one (`Journal.commit`). Nothing leaves the process before its transaction is on disk. The tables are
in `tables.py`, reading in `reading.py`, what is written and read in `records.py`.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import trio

from actors.kernel.machine import JournalWaits
from actors.kernel.reading import JournalReader, Look
from actors.kernel.records import Commit, Fresh, JournalClosed, JournalError
from actors.kernel.tables import Acks, Writer, bring_up, open_file

log = logging.getLogger("golem.kernel")

MERGED_COMMITS = 256  # commits in one transaction
ACK_FLUSH_S = 0.05  # how long acknowledgements wait for a commit to go with: losing them costs a repetition, no more
PASSING = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)  # primary codes: another process holds the file
FIRST_PROBE_S, LAST_PROBE_S = 0.1, 2.0  # between looks whether the disk takes something again
FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)  # of the disk: the file, or the index of its log
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Waiting:
    """A commit in the queue; `written` tells how it ended once `done` is set. A `patient` one waits for the disk."""

    commit: Commit
    patient: bool = False
    refused: JournalWaits | None = None
    done: trio.Event = field(default_factory=trio.Event)
    written: bool = False


class Journal(JournalReader):
    """Opens the file, reads committed state, writes commits, in the order of the calls, while `run` runs.

    `path=":memory:"` or `threads=False` writes inline on one connection (simulation); otherwise a worker thread writes
    on a connection of its own, so that an fsync never stops the event loop. `make_room`, where
    it is set, is called (in any thread) when the disk is full; if it returns True the transaction is tried once more.

    While the disk takes nothing, and this is `lasting`: a transaction that could not be written is not there. The commits in it
    are refused with `JournalWaits`, and who asked for them takes back in memory what it had decided; patient ones (of ports,
    whose work is done in the world already) stay in the queue. Reads go on.
    """

    make_room: Callable[[], bool] | None = None
    lasting = False  # the process outlasts a disk that takes nothing for a while
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
        self.on_commit: Callable[[float], None] = lambda time_s: None  # hears how long each transaction took
        self._queue: list[Waiting] = []
        self._wake = trio.Event()
        self._started = trio.Event()
        self._looks = False
        self._look = Look(self._reader)
        self.ended = False  # `run` is over: nothing is written any more
        self._acks = {}
        self._acks_under_way = {}
        self.trouble = ""  # why nothing can be written, for people
        self._is_well = trio.Event()
        self._relinks = 0
        self.commits = 0  # transactions so far, for benchmarks and metrics
        read = "select value from meta where key=?"
        self.epoch: str = self._reader.execute(read, ("epoch",)).fetchone()[0]
        self.boot: str = self._reader.execute(read, ("boot",)).fetchone()[0]  # names this start: see `lineage.py`
        self._tables = Writer(self._writer, self.boot)
        self.clock_text: str | None = None  # what is to be remembered of the clock, with the next transaction

    def clock_mark(self) -> str | None:
        """Return what was remembered of the machine's clock (see `clock.py`)."""
        found = self._reader.execute("select value from meta where key='clock'").fetchone()
        return found[0] if found else None

    def outlast(self) -> None:
        """From here on a disk that takes nothing is waited for (see above)."""
        self.lasting = True
        self._writer.execute("pragma busy_timeout=1000")  # ms: whoever waits for an answer is told soon why there is none

    def close(self) -> None:
        """Close the file. Everything committed is on disk."""
        if self._reader is not self._writer:
            self._reader.close()
        self._writer.close()

    def new_epoch(self) -> str:
        """Return a name for a new numbering of a link, used once."""
        self._relinks += 1
        return f"{self.boot}.{self._relinks}"

    # -- writing
    def acknowledge(self, actor: str, recipient: str, seq: int, epoch: str) -> None:
        """Let the outbox forget a link's messages up to `seq` of the numbering `epoch`, with the next transaction or soon."""
        link = (actor, recipient)
        before = self._acks.get(link)
        self._acks[link] = (epoch, max(seq, before[1]) if before and before[0] == epoch else seq)
        self._wake.set()

    async def commit(self, commit: Commit, *, patient: bool = False) -> None:
        """Return when `commit` is on disk.

        Raises `JournalWaits` where the disk takes nothing just now: then nothing of it is there. A patient one waits instead.
        Raises `JournalError`; then it may or may not be there, and the process ends.

        Cancellation does not part a caller from a commit that is under way: what follows a commit follows it surely,
        unless the whole process ends.
        """
        commit.at = self.clock()
        waiting = Waiting(commit, patient)
        if self.trouble and not patient:
            await trio.lowlevel.checkpoint()
            raise JournalWaits(self.trouble)
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
        if waiting.refused is not None:
            raise waiting.refused
        if not waiting.written:
            await trio.lowlevel.checkpoint()  # whoever belongs to the ending process is cancelled here
            raise JournalClosed("the journal is closed")

    async def well(self) -> None:
        """Return when the disk takes something again, or did all the time."""
        if self.trouble:
            await self._is_well.wait()
        else:
            await trio.lowlevel.checkpoint()

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
                    begun = trio.current_time()
                    try:
                        await self._store([waiting.commit for waiting in batch], self._acks_under_way)
                    except JournalWaits as error:
                        self._take_back(batch, error)
                        batch = []
                        await self._outlast()
                        continue
                    self.on_commit(trio.current_time() - begun)
                    self._acks_under_way = {}
                    for waiting in batch:
                        waiting.written = True
                        waiting.done.set()
        finally:
            self.ended = True
            self._looks = False
            self._is_well.set()
            for waiting in (*batch, *self._queue):
                waiting.done.set()

    def _take_back(self, batch: list[Waiting], error: JournalWaits) -> None:
        """A transaction could not be written: refuse its commits, but those that are patient. Acknowledgements wait."""
        self.trouble, self._is_well = str(error), trio.Event()
        log.error("%s; what is to be written waits, or is refused, until it goes on", error)
        self._queue = batch + self._queue
        for link, (epoch, seq) in self._acks_under_way.items():
            later = self._acks.setdefault(link, (epoch, seq))
            if later[0] == epoch:
                self._acks[link] = epoch, max(later[1], seq)
        self._acks_under_way = {}
        for waiting in self._queue:
            if not waiting.patient:
                waiting.refused = JournalWaits(self.trouble)
                waiting.done.set()
        self._queue = [waiting for waiting in self._queue if waiting.patient]

    async def _outlast(self) -> None:
        """Wait until the disk takes something again."""
        pause_s = FIRST_PROBE_S
        while self.trouble:
            await trio.sleep(pause_s)
            pause_s = min(pause_s * 2, LAST_PROBE_S)
            try:
                await self._tidy(self._tables.probe)
            except JournalWaits as error:
                self.trouble = str(error)
            else:
                self.trouble = ""
        log.warning("the journal can be written again")
        self._is_well.set()

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
                self._tables.write(commits, acks, self.clock_text)
            except sqlite3.OperationalError as error:
                # nothing of a transaction that met a full disk is there: SQLite has rolled it back, or we have
                if error.sqlite_errorcode not in FULL or self.make_room is None or not self.make_room():
                    raise
                self._tables.write(commits, acks, self.clock_text)
        except sqlite3.Error as error:
            raise self._failure(error) from error
        self.commits += 1

    def _failure(self, error: sqlite3.Error) -> Exception:
        """Return what is raised for an error of a write whose transaction is rolled back."""
        words, code = f"cannot write the journal: {error}", getattr(error, "sqlite_errorcode", 0)
        passes = code in FULL or code & 0xFF in PASSING or code == sqlite3.SQLITE_IOERR_WRITE
        return JournalWaits(words) if self.lasting and passes else JournalError(words)

    async def move(self, step: float, fresh: Fresh | None, clock: str, then: Callable[[], None]) -> None:
        """Move timers and deadlines (all, or only those that are `fresh`) by `step` seconds, those under way as well.

        `clock` is remembered with it; `then` is called before anything else is written. Raises `JournalError`, `JournalWaits`.
        """

        def moved() -> None:
            self._tables.move(step, fresh, clock)

        async with self._limiter:
            try:
                if self._threads:
                    await trio.to_thread.run_sync(moved, limiter=trio.CapacityLimiter(1))
                else:
                    moved()
            except sqlite3.Error as error:
                raise self._failure(error) from error
            for waiting in self._queue:
                waiting.commit.move(step)
            self.clock_text = clock
            then()

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
            raise self._failure(error) from error
