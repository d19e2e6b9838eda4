"""The journal: one SQLite file that holds everything a process must not forget.

Rows, inbox positions, outbox, feeds and timers of a step are written in one transaction; several actors' steps that are
ready together share one (`Journal.commit`). Nothing leaves the process before its transaction is on disk.
"""

from __future__ import annotations

import math
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import trio

from actors.kernel.lineage import Lower, Marks, Outgoing, Position, Relink, start_number

MIGRATIONS = (
    """
    create table meta (key text primary key, value text not null) without rowid;
    create table row (actor text, key text, body blob not null, primary key (actor, key)) without rowid;
    create table inbox (actor text, sender text, epoch text not null, seq int not null, retired text not null,
                        primary key (actor, sender)) without rowid;
    create table sent (actor text, recipient text, seq int not null, primary key (actor, recipient)) without rowid;
    create table outbox (actor text, recipient text, seq int, deadline real not null, trace text not null,
                         body blob not null, primary key (actor, recipient, seq)) without rowid;
    create index outbox_deadline on outbox (deadline);
    create table feed (name text, seq int, at real not null, body blob not null, primary key (name, seq)) without rowid;
    create index feed_at on feed (name, at);
    create table feed_head (name text primary key, seq int not null, at real not null) without rowid;
    create table timer (actor text, key text, at real not null, trace text not null, body blob not null,
                        primary key (actor, key)) without rowid;
    create index timer_at on timer (at);
    create table quarantine (id integer primary key, at real not null, actor text not null, sender text not null,
                             trace text not null, error text not null, body blob not null);
    """,
    """
    alter table sent add column epoch text not null default '';
    alter table sent add column acked int not null default 0;
    alter table inbox add column boots text not null default '';
    create table mark (actor text, recipient text, boot text, first int not null,
                       primary key (actor, recipient, boot)) without rowid;
    """,
    "update row set body=sealed(actor, key, body);",
    """
    alter table quarantine add column epoch text not null default '';
    alter table quarantine add column seq int not null default 0;
    alter table quarantine add column local int not null default 0;
    create index quarantine_link on quarantine (actor, sender, epoch, seq);
    create index timer_due on timer (actor, at, key);
    create index outbox_overdue on outbox (actor, deadline, recipient, seq);
    """,
)


ALARMS_AT_ONCE = 256  # of an actor that are due
READ_AT_ONCE = 256  # rows of a prefix read by one query
MERGED_COMMITS = 256  # commits in one transaction
PRUNED_AT_ONCE = 5000  # events
ACK_FLUSH_S = 0.05  # how long acknowledgements wait for a commit to go with: losing them costs a repetition, no more
KEPT_QUARANTINED = 1000  # from this node, and as many from others
SEAL_BYTES = 4
ASKED_LINKS = 64  # to one node; those to the processes of activities live no longer than their journals
KNOWN_MARKS = 4096  # links of which it is remembered that this start has a mark on them
FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)  # of the disk: the file, or the index of its log


FORGET_MARKS = """
    delete from mark where exists (
        select 1 from mark later join sent using (actor, recipient)
        where later.actor=mark.actor and later.recipient=mark.recipient and later.first>mark.first and later.first<=sent.acked)
"""  # of starts whose messages are all acknowledged, and the last of them not the newest
Acks = dict[tuple[str, str], tuple[str, int]]  # (actor, recipient) -> epoch, and acknowledged up to


class JournalError(Exception):
    """The journal cannot be opened or written; the process must end rather than forget."""


class JournalClosed(JournalError):
    """The journal's process has ended, or is about to."""


def sealed(actor: str, key: str, body: bytes) -> bytes:
    """Return a row as it is stored: with a checksum over it and its place, so that a flipped bit is not read as a row."""
    return body + crc32(f"{actor}\0{key}\0".encode() + body).to_bytes(SEAL_BYTES, "big")


def unsealed(actor: str, key: str, stored: bytes) -> bytes:
    """Return the row out of what is stored. Raises `RowDamaged`."""
    body = stored[:-SEAL_BYTES]
    if sealed(actor, key, body) != stored:
        raise RowDamaged(actor, key, "its checksum is wrong")
    return body


class RowDamaged(Exception):
    """A stored row cannot be read: our own disk's fault, or a newer version's row, and never the sender's.

    Nothing is dropped for it: whatever needs the row waits until it can be read, and the row is named.
    """

    def __init__(self, actor: str, key: str, reason: str) -> None:
        super().__init__(f"row {key} of {actor} cannot be read: {reason}")
        self.actor, self.key, self.reason = actor, key, reason


@dataclass(frozen=True, slots=True)
class Posted:
    """A message in the outbox."""

    seq: int
    deadline: float
    trace: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Timer:
    """A durable timer of an actor."""

    actor: str
    key: str
    at: float
    trace: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Event:
    """An entry of a feed. `seq` counts from 1; `at` (seconds since the epoch) rises strictly inside a feed."""

    seq: int
    at: float
    body: bytes


@dataclass(frozen=True, slots=True)
class SetAside:
    """A message in quarantine: it crashed its actor again and again. Its sender was told, or will be."""

    at: float
    sender: str
    epoch: str
    seq: int
    trace: str
    error: str
    body: bytes
    local: bool  # from this node itself
    actor: str = ""
    number: int = 0


@dataclass(slots=True)
class Commit:
    """What one actor wants written at once."""

    actor: str
    rows: dict[str, bytes | None] = field(default_factory=dict)
    inbox: dict[str, Position] = field(default_factory=dict)
    outbox: list[tuple[str, Posted]] = field(default_factory=list)
    expired: list[tuple[str, int]] = field(default_factory=list)
    deferred: list[tuple[str, int, float]] = field(default_factory=list)  # deadlines that come again later
    events: list[tuple[str, Event]] = field(default_factory=list)
    dropped_feeds: list[str] = field(default_factory=list)
    taken: list[tuple[str, int]] = field(default_factory=list)
    timers: dict[str, Timer | None] = field(default_factory=dict)
    quarantined: list[SetAside] = field(default_factory=list)
    released: list[int] = field(default_factory=list)  # numbers of messages that left the quarantine
    relinked: list[Relink | Lower] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(
            self.rows or self.inbox or self.outbox or self.expired or self.events or self.dropped_feeds or self.taken
            or self.timers or self.quarantined or self.deferred or self.released or self.relinked
        )  # fmt: skip


@dataclass(slots=True, eq=False)
class Waiting:
    """A commit in the queue; `written` tells how it ended once `done` is set."""

    commit: Commit
    done: trio.Event = field(default_factory=trio.Event)
    written: bool = False


class Journal(trio.abc.Instrument):
    """Opens the file, reads committed state, writes commits, in the order of the calls, while `run` runs.

    `path=":memory:"` or `threads=False` writes inline on one connection (simulation); otherwise a worker thread writes
    on a connection of its own, so that an fsync never stops the event loop. `make_room`, where
    it is set, is called (in any thread) when the disk is full; if it returns True the transaction is tried once more.
    """

    make_room: Callable[[], bool] | None = None
    ack_flush_s = ACK_FLUSH_S

    def __init__(self, path: str, new_epoch: Callable[[], str], *, threads: bool = True, synchronous: str = "FULL") -> None:
        self._threads = threads and path != ":memory:"
        self._writer = self._open(path, synchronous)
        self._migrate(new_epoch)
        self._reader = self._open(path, synchronous) if self._threads else self._writer
        self._begin()

    @classmethod
    def over(cls, connection: sqlite3.Connection, new_epoch: Callable[[], str]) -> Journal:
        """A journal over a connection that outlives it: the disk of a simulated machine."""
        journal = cls.__new__(cls)
        journal._threads = False
        journal._writer = journal._reader = connection
        connection.isolation_level = None
        journal._migrate(new_epoch)
        journal._begin()
        return journal

    def _begin(self) -> None:
        self._limiter = trio.CapacityLimiter(1)
        self._queue: list[Waiting] = []
        self._wake = trio.Event()
        self._started = trio.Event()
        self._looks = False  # reads between two checkpoints are one transaction
        self.ended = False  # `run` is over: nothing is written any more
        self._acks: Acks = {}  # written with a commit
        self._acks_under_way: Acks = {}
        self._marked: set[tuple[str, str]] = set()  # links that have a mark of this start (used by the writer alone)
        self._relinks = 0
        self.commits = 0  # transactions so far, for benchmarks and metrics
        read = "select value from meta where key=?"
        self.epoch: str = self._reader.execute(read, ("epoch",)).fetchone()[0]
        self.boot: str = self._reader.execute(read, ("boot",)).fetchone()[0]  # names this start: see `lineage.py`

    @staticmethod
    def _open(path: str, synchronous: str) -> sqlite3.Connection:
        try:
            db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
            if path != ":memory:":
                os.chmod(path, 0o600)
            mode = db.execute("pragma journal_mode=wal").fetchone()[0]
            if path != ":memory:" and mode != "wal":
                raise JournalError(f"cannot open the journal {path}: its file system allows no write-ahead log ({mode})")
            db.execute(f"pragma synchronous={synchronous}")
            db.execute("pragma wal_autocheckpoint=2000")
        except (sqlite3.Error, OSError) as error:
            raise JournalError(f"cannot open the journal {path}: {error}") from error
        return db

    def _migrate(self, new_epoch: Callable[[], str]) -> None:
        db = self._writer
        try:
            self._bring_up(db, new_epoch)
        except sqlite3.Error as error:
            raise JournalError(f"cannot write the journal: {error}") from error

    @staticmethod
    def _bring_up(db: sqlite3.Connection, new_epoch: Callable[[], str]) -> None:
        db.create_function("sealed", 3, sealed)
        version = db.execute("pragma user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise JournalError(f"the journal was written by a newer version (schema {version}, known {len(MIGRATIONS)})")
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            db.executescript(f"begin immediate; {script} pragma user_version={number}; commit;")
        db.execute("begin immediate")
        db.execute("insert or ignore into meta values ('epoch', ?)", (new_epoch(),))
        before = db.execute("select value from meta where key='boot'").fetchone()
        boot = f"{start_number(before[0]) + 1 if before else 1}-{new_epoch()[:16]}"
        db.execute("replace into meta values ('boot', ?)", (boot,))
        db.execute(FORGET_MARKS)
        db.execute("commit")

    def close(self) -> None:
        """Close the file. Everything committed is on disk."""
        if self._reader is not self._writer:
            self._reader.close()
        self._writer.close()

    # -- reading committed state (event loop)
    def _read(self, query: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """Read. All reads of a task between two of its checkpoints see the same state, while the writer goes on."""
        try:
            if self._looks and not self._reader.in_transaction:
                self._reader.execute("begin")
            return self._reader.execute(query, values)
        except sqlite3.Error as error:
            raise JournalError(f"cannot read the journal: {error}") from error

    def after_task_step(self, task: Any) -> None:
        """A task (of whatever part of the process) has come to a checkpoint: what it read belongs together."""
        if self._reader.in_transaction:
            self._reader.execute("commit")

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

    def links_to(self, node: str) -> list[tuple[str, str]]:
        """Return (actor, recipient) of links to the actors of a node, of which something was acknowledged."""
        query = "select actor, recipient from sent where recipient>? and recipient<? and acked>0 and recipient not like ? limit ?"
        return self._read(query, (f"{node}/", f"{node}/\U0010ffff", f"{node}/%:%", ASKED_LINKS)).fetchall()

    def overdue(self, actor: str, now: float, limit: int = ALARMS_AT_ONCE) -> list[tuple[str, int]]:
        """Return (recipient, seq) of an actor's messages whose deadline has passed and that nobody acknowledged."""
        query = "select recipient, seq from outbox where actor=? and deadline<=? order by deadline, recipient, seq limit ?"
        found = self._read(query, (actor, now, limit))
        return [(recipient, seq) for recipient, seq in found if self.acked(actor, recipient) < seq]

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
        link, known = (actor, recipient), self.outgoing(actor, recipient)
        found = [acks[link] for acks in (self._acks, self._acks_under_way) if link in acks]
        return max([known.acked, *(seq for epoch, seq in found if epoch == known.epoch)])

    # -- writing
    def acknowledge(self, actor: str, recipient: str, seq: int) -> None:
        """Let the outbox forget a link's messages up to `seq`, with the next transaction or soon."""
        link, epoch = (actor, recipient), self.outgoing(actor, recipient).epoch
        before = self._acks.get(link)
        self._acks[link] = (epoch, max(seq, before[1]) if before and before[0] == epoch else seq)
        self._wake.set()

    async def commit(self, commit: Commit) -> None:
        """Return when `commit` is on disk. Raises `JournalError`; then it may or may not be, and the process ends.

        Cancellation does not part a caller from a commit that is under way: what follows a commit follows it surely,
        unless the whole process ends.
        """
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
        if self._threads:
            trio.lowlevel.add_instrument(self)
            self._looks = True
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
            if self._looks:
                self._looks = False
                trio.lowlevel.remove_instrument(self)
                self.after_task_step(None)
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
                self._transact(commits, acks)
            except sqlite3.OperationalError as error:
                # nothing of a transaction that met a full disk is there: SQLite has rolled it back, or we have
                if error.sqlite_errorcode not in FULL or self.make_room is None or not self.make_room():
                    raise
                self._transact(commits, acks)
        except sqlite3.Error as error:
            raise JournalError(f"cannot write the journal: {error}") from error
        self.commits += 1

    def _transact(self, commits: list[Commit], acks: Acks) -> None:
        db = self._writer
        db.execute("begin immediate")
        try:
            for link, (epoch, seq) in acks.items():  # before the commits, which may take what they say back
                known = "update sent set acked=max(acked, ?) where actor=? and recipient=? and epoch=?"
                if db.execute(known, (seq, *link, epoch)).rowcount:  # else the link has begun a new numbering since
                    db.execute("delete from outbox where actor=? and recipient=? and seq<=?", (*link, seq))
            for commit in commits:
                self._mark(db, commit)
                _apply(db, commit, self.boot)
            db.execute("commit")
        except BaseException:
            self._marked.clear()
            if db.in_transaction:
                db.execute("rollback")
            raise

    async def prune(self, before: float) -> int:
        """Delete feed events older than `before`, between commits; return how many. Raises `JournalError`."""
        deleted = 0
        while True:  # in pieces: commits wait for each of them
            if self._threads:
                found = await trio.to_thread.run_sync(self._prune, before, limiter=self._limiter)
            else:
                await trio.lowlevel.checkpoint()
                found = self._prune(before)
            deleted += found
            if found < PRUNED_AT_ONCE:
                return deleted  # a feed without events is forgotten, too: its numbers may start again

    def _prune(self, before: float) -> int:
        query = "delete from feed where (name, seq) in (select name, seq from feed where at<? limit ?)"
        try:
            found = int(self._writer.execute(query, (before, PRUNED_AT_ONCE)).rowcount)
            if found < PRUNED_AT_ONCE:
                self._writer.execute("delete from feed_head where at<?", (before,))
            return found
        except sqlite3.Error as error:
            raise JournalError(f"cannot write the journal: {error}") from error


    def _mark(self, db: sqlite3.Connection, c: Commit) -> None:
        """Note from which message on this start numbers a link."""
        for recipient, p in c.outbox:
            if (link := (c.actor, recipient)) not in self._marked:
                if len(self._marked) >= KNOWN_MARKS:
                    self._marked.clear()
                db.execute("insert or ignore into mark values (?,?,?,?)", (*link, self.boot, p.seq))
                self._marked.add(link)


def _relink(db: sqlite3.Connection, actor: str, relink: Relink, boot: str) -> None:
    """Number what waits on a link anew, all of it by this start."""
    link = (actor, relink.recipient)
    db.execute("delete from outbox where actor=? and recipient=? and seq<=?", (*link, relink.agreed))
    waiting = db.execute("select seq from outbox where actor=? and recipient=? order by seq", link).fetchall()
    update = "update outbox set seq=? where actor=? and recipient=? and seq=?"
    db.executemany(update, [(number, *link, seq) for number, (seq,) in enumerate(waiting, 1)])
    db.execute("replace into sent values (?,?,?,?,0)", (*link, len(waiting), relink.epoch))
    db.execute("delete from mark where actor=? and recipient=?", link)
    db.execute("insert into mark values (?,?,?,1)", (*link, boot))


def _apply(db: sqlite3.Connection, c: Commit, boot: str) -> None:
    actor = c.actor
    db.executemany("delete from row where actor=? and key=?", [(actor, k) for k, body in c.rows.items() if body is None])
    kept = [(actor, key, sealed(actor, key, body)) for key, body in c.rows.items() if body is not None]
    db.executemany("replace into row values (?,?,?)", kept)
    positions = [(actor, sender, p.epoch, p.seq, " ".join(p.retired), " ".join(p.boots)) for sender, p in c.inbox.items()]
    db.executemany("replace into inbox values (?,?,?,?,?,?)", positions)
    for recipient, p in c.outbox:
        db.execute("insert into outbox values (?,?,?,?,?,?)", (actor, recipient, p.seq, p.deadline, p.trace, p.body))
    last = {recipient: p.seq for recipient, p in c.outbox}
    sent = "insert into sent (actor, recipient, seq, epoch) values (?,?,?,?) on conflict do update set seq=excluded.seq"
    db.executemany(sent, [(actor, recipient, seq, boot) for recipient, seq in last.items()])
    db.executemany("delete from outbox where actor=? and recipient=? and seq=?", [(actor, *link) for link in c.expired])
    for mend in c.relinked:
        if isinstance(mend, Relink):
            _relink(db, actor, mend, boot)
        else:
            link = (actor, mend.recipient)
            db.execute("update sent set acked=? where actor=? and recipient=?", (mend.acked, *link))
            if mend.boot:
                db.execute("insert or ignore into mark values (?,?,?,?)", (*link, mend.boot, mend.acked))
    for name in c.dropped_feeds:
        db.execute("delete from feed where name=?", (name,))
        db.execute("delete from feed_head where name=?", (name,))
    db.executemany("insert into feed values (?,?,?,?)", [(name, e.seq, e.at, e.body) for name, e in c.events])
    heads = {name: (e.seq, e.at) for name, e in c.events}
    db.executemany("replace into feed_head values (?,?,?)", [(name, *head) for name, head in heads.items()])
    db.executemany("delete from feed where name=? and seq=?", c.taken)
    for key, timer in c.timers.items():
        if timer is None:
            db.execute("delete from timer where actor=? and key=?", (actor, key))
        else:
            db.execute("replace into timer values (?,?,?,?,?)", (actor, key, timer.at, timer.trace, timer.body))
    later = [(deadline, actor, recipient, seq) for recipient, seq, deadline in c.deferred]
    db.executemany("update outbox set deadline=? where actor=? and recipient=? and seq=?", later)
    insert = "insert into quarantine (at, actor, sender, epoch, seq, trace, error, body, local) values (?,?,?,?,?,?,?,?,?)"
    for q in c.quarantined:
        db.execute(insert, (q.at, actor, q.sender, q.epoch, q.seq, q.trace, q.error, q.body, q.local))
    for local in {q.local for q in c.quarantined}:  # apart: what strangers send pushes out nothing of our own
        newest = "select id from quarantine where local=? order by id desc limit 1 offset ?"
        if bound := db.execute(newest, (local, KEPT_QUARANTINED)).fetchone():
            db.execute("delete from quarantine where local=? and id<=?", (local, bound[0]))
    db.executemany("delete from quarantine where id=?", [(number,) for number in c.released])
