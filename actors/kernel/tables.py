"""The journal's tables: how a file is opened and brought up, what one transaction writes, and how room is given back.

The rows of a link (`inbox` at its recipient; `sent` and `mark` at its sender) are forgotten when it has been silent for
long. No message is taken twice for that, and none is lost:

- No message waits longer than `MAX_DEADLINE_S` (the kernel shortens whatever deadline is longer), and a courier carries
  none whose deadline has passed. So no former message of a link that has been silent that long is ever sent again.
- A sender forgets a link of which nothing waits after `SENT_KEPT_S`. What it says next is a new numbering, under a name
  that no numbering ever had (`Writer.numbering` changes with every forgetting and every start), and is taken from 1 on,
  whatever the recipient remembers.
- A recipient forgets after `INBOX_KEPT_S`, which is twice as long: by then the sender has forgotten, too. Should it not
  have (its clock stands still), it finds that the recipient has gone back and begins anew with words, as after a restore.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

from actors.kernel.lineage import Relink, start_number
from actors.kernel.machine import MAX_DEADLINE_S
from actors.kernel.records import Commit, Fresh, JournalError, sealed

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
    """
    alter table sent add column used real not null default 0;
    alter table inbox add column used real not null default 0;
    update sent set used=cast(strftime('%s', 'now') as real);
    update inbox set used=cast(strftime('%s', 'now') as real);
    """,
    "update outbox set body=sealed(actor, recipient, body);",
)

DAY_S = 86400.0
SENT_KEPT_S = MAX_DEADLINE_S + 10 * DAY_S
INBOX_KEPT_S = 2 * SENT_KEPT_S
PRUNED_AT_ONCE = 5000  # events
FORGOTTEN_AT_ONCE = 500  # links
GIVEN_BACK_AT_ONCE = 128  # pages: commits wait for them, some 3 ms
LEFT_PAGES = 1024  # free pages that a file keeps: it will need them again
MOST_LOG_BYTES = 16 << 20  # of the write-ahead log's file when it begins anew
KEPT_QUARANTINED = 1000  # from this node, and as many from others
KNOWN_MARKS = 4096  # links of which it is remembered that this start has a mark on them

FORGET_MARKS = """
    delete from mark where exists (
        select 1 from mark later join sent using (actor, recipient)
        where later.actor=mark.actor and later.recipient=mark.recipient and later.first>mark.first and later.first<=sent.acked)
"""  # of starts whose messages are all acknowledged, and the last of them not the newest
Acks = dict[tuple[str, str], tuple[str, int]]  # (actor, recipient) -> epoch, and acknowledged up to


def open_file(path: str, synchronous: str) -> sqlite3.Connection:
    """Open a journal's file, or make it. Raises `JournalError`."""
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
        if path != ":memory:":
            os.chmod(path, 0o600)
        db.execute("pragma auto_vacuum=incremental")  # of a new file: before anything is written into it
        mode = db.execute("pragma journal_mode=wal").fetchone()[0]
        if path != ":memory:" and mode != "wal":
            raise JournalError(f"cannot open the journal {path}: its file system allows no write-ahead log ({mode})")
        db.execute(f"pragma synchronous={synchronous}")
        db.execute("pragma wal_autocheckpoint=2000")
        db.execute(f"pragma journal_size_limit={MOST_LOG_BYTES}")
    except (sqlite3.Error, OSError) as error:
        raise JournalError(f"cannot open the journal {path}: {error}") from error
    return db


def bring_up(db: sqlite3.Connection, new_epoch: Callable[[], str]) -> None:
    """Make or migrate the tables, and begin a start of the process. Raises `JournalError`."""
    try:
        _migrate(db)
        db.execute("begin immediate")
        db.execute("insert or ignore into meta values ('epoch', ?)", (new_epoch(),))
        before = db.execute("select value from meta where key='boot'").fetchone()
        for key, value in db.execute("select key, value from meta").fetchall():
            if not isinstance(value, str):
                raise JournalError(f"the journal is damaged: {key} is {value!r}")
        boot = f"{start_number(before[0]) + 1 if before else 1}-{new_epoch()[:16]}"
        db.execute("replace into meta values ('boot', ?)", (boot,))
        db.execute(FORGET_MARKS)
        db.execute("commit")
    except sqlite3.Error as error:
        raise JournalError(f"cannot write the journal: {error}") from error


def _migrate(db: sqlite3.Connection) -> None:
    db.execute("pragma auto_vacuum=incremental")  # takes effect where there is no table yet
    db.create_function("sealed", 3, sealed)
    version = db.execute("pragma user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise JournalError(f"the journal was written by a newer version (schema {version}, known {len(MIGRATIONS)})")
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        db.executescript(f"begin immediate; {script} pragma user_version={number}; commit;")
    if db.execute("pragma auto_vacuum").fetchone()[0] != 2:  # an older file: once, and before anything runs
        db.execute("vacuum")


class Writer:
    """Writes transactions on one connection, in whatever thread, one at a time. `boot` names this start."""

    def __init__(self, db: sqlite3.Connection, boot: str) -> None:
        self._db, self._boot = db, boot
        self.numbering = boot  # the epoch of links that begin
        self._forgettings = 0
        self._marked: set[tuple[str, str]] = set()  # links that have a mark of this start
        self._clock: str | None = None  # what was written of it last

    def move(self, step: float, fresh: Fresh | None, clock: str) -> None:
        """Move timers and deadlines by `step` seconds: all, or those named; and remember the clock. Raises `sqlite3.Error`."""
        db = self._db
        db.execute("begin immediate")
        try:
            if fresh is None:
                db.execute("update timer set at=at+?", (step,))
                db.execute("update outbox set deadline=deadline+?", (step,))
            else:
                update = "update timer set at=at+? where actor=? and key=?"
                self._each(update, [(step, *timer) for timer in fresh.timers])
                update = "update outbox set deadline=deadline+? where actor=? and recipient=? and seq=?"
                self._each(update, [(step, *send) for send in fresh.sends])
            db.execute("replace into meta values ('clock', ?)", (clock,))
            db.execute("commit")
        except BaseException:
            if db.in_transaction:
                db.execute("rollback")
            raise

    def write(self, commits: list[Commit], acks: Acks, clock: str | None = None) -> None:
        """Write one transaction, and what is to be remembered of the clock. `sqlite3.Error`: nothing of it is there."""
        db = self._db
        db.execute("begin immediate")
        try:
            if clock is not None and clock != self._clock:
                db.execute("replace into meta values ('clock', ?)", (clock,))
            for link, (epoch, seq) in acks.items():  # before the commits, which may take what they say back
                known = "update sent set acked=max(acked, ?) where actor=? and recipient=? and epoch=?"
                if db.execute(known, (seq, *link, epoch)).rowcount:  # else the link has begun a new numbering since
                    db.execute("delete from outbox where actor=? and recipient=? and seq<=?", (*link, seq))
            for commit in commits:
                self._apply(commit)
            db.execute("commit")
            self._clock = clock
        except BaseException:
            self._marked.clear()
            if db.in_transaction:
                db.execute("rollback")
            raise

    def probe(self) -> None:
        """See whether the disk takes a transaction. Raises `sqlite3.Error`."""
        db = self._db
        db.execute("begin immediate")
        try:
            db.execute("replace into meta values ('probe', hex(randomblob(8)))")
            db.execute("commit")
        except BaseException:
            if db.in_transaction:
                db.execute("rollback")
            raise

    def prune(self, before: float) -> tuple[int, bool]:
        """Delete some feed events older than `before`; return how many, and whether there may be more.

        A feed without events is forgotten: its numbers may start again.
        """
        query = "delete from feed where (name, seq) in (select name, seq from feed where at<? limit ?)"
        found = int(self._db.execute(query, (before, PRUNED_AT_ONCE)).rowcount)
        if found < PRUNED_AT_ONCE:
            self._db.execute("delete from feed_head where at<?", (before,))
        return found, found == PRUNED_AT_ONCE

    def forget_links(self, now: float) -> tuple[list[tuple[str, str]], bool]:
        """Forget some links that have been silent for long (see above).

        Return (actor, recipient) of those that had been numbered here, and whether there may be more to forget.
        """
        db = self._db
        silent = """
            select actor, recipient from sent where used<? and not exists (
                select 1 from outbox where outbox.actor=sent.actor and outbox.recipient=sent.recipient) limit ?
        """
        old = "select actor, sender from inbox where used<? limit ?"
        db.execute("begin immediate")
        try:
            sent = db.execute(silent, (now - SENT_KEPT_S, FORGOTTEN_AT_ONCE)).fetchall()
            taken = db.execute(old, (now - INBOX_KEPT_S, FORGOTTEN_AT_ONCE)).fetchall()
            for table in ("sent", "mark"):
                db.executemany(f"delete from {table} where actor=? and recipient=?", sent)
            db.executemany("delete from inbox where actor=? and sender=?", taken)
            db.execute("commit")
        except BaseException:
            if db.in_transaction:
                db.execute("rollback")
            raise
        if sent:
            self._marked.clear()
            self._forgettings += 1
            self.numbering = f"{self._boot}.again{self._forgettings}"
        return sent, max(len(sent), len(taken)) == FORGOTTEN_AT_ONCE

    def give_back(self) -> bool:
        """Give some free pages back to the file system; return whether there are more than a file may keep."""
        free = int(self._db.execute("pragma freelist_count").fetchone()[0])
        if free <= LEFT_PAGES:
            return False
        # a script: `execute` takes the first step of this statement alone, which frees one page
        self._db.executescript(f"pragma incremental_vacuum({min(free - LEFT_PAGES, GIVEN_BACK_AT_ONCE)})")
        return free - LEFT_PAGES > GIVEN_BACK_AT_ONCE

    def _each(self, statement: str, values: Sequence[tuple[Any, ...]]) -> None:
        """Run a statement for each of some values: often for none, and then nothing is done."""
        if len(values) == 1:
            self._db.execute(statement, values[0])
        elif values:
            self._db.executemany(statement, values)

    def _post(self, c: Commit) -> None:
        """Put messages into the outbox, numbered by this start."""
        self._mark(c)
        waiting = [(c.actor, to, p.seq, p.deadline, p.trace, sealed(c.actor, to, p.body)) for to, p in c.outbox]
        self._each("insert into outbox values (?,?,?,?,?,?)", waiting)
        last = {recipient: p.seq for recipient, p in c.outbox}
        sent = """
            insert into sent (actor, recipient, seq, epoch, used) values (?,?,?,?,?)
            on conflict do update set seq=excluded.seq, used=excluded.used
        """
        self._each(sent, [(c.actor, recipient, seq, self.numbering, c.at) for recipient, seq in last.items()])

    def _mark(self, c: Commit) -> None:
        """Note from which message on this start numbers a link."""
        for recipient, p in c.outbox:
            if (link := (c.actor, recipient)) not in self._marked:
                if len(self._marked) >= KNOWN_MARKS:
                    self._marked.clear()
                self._db.execute("insert or ignore into mark values (?,?,?,?)", (*link, self._boot, p.seq))
                self._marked.add(link)

    def _apply(self, c: Commit) -> None:
        db, actor = self._db, c.actor
        if c.rows:
            gone = [(actor, key) for key, body in c.rows.items() if body is None]
            self._each("delete from row where actor=? and key=?", gone)
            kept = [(actor, key, sealed(actor, key, body)) for key, body in c.rows.items() if body is not None]
            self._each("replace into row values (?,?,?)", kept)
        for sender, p in c.inbox.items():
            position = (actor, sender, p.epoch, p.seq, " ".join(p.retired), " ".join(p.boots), c.at)
            db.execute("replace into inbox values (?,?,?,?,?,?,?)", position)
        if c.outbox:
            self._post(c)
        self._each("delete from outbox where actor=? and recipient=? and seq=?", [(actor, *link) for link in c.expired])
        for mend in c.relinked:
            if isinstance(mend, Relink):
                _relink(db, actor, mend, self._boot, c.at)
            else:
                link = (actor, mend.recipient)
                db.execute("update sent set acked=? where actor=? and recipient=?", (mend.acked, *link))
                if mend.boot:
                    lower = "insert into mark values (?,?,?,?) on conflict do update set first=min(first, excluded.first)"
                    db.execute(lower, (*link, mend.boot, mend.acked))
        for name in c.dropped_feeds:
            db.execute("delete from feed where name=?", (name,))
            db.execute("delete from feed_head where name=?", (name,))
        self._each("insert into feed values (?,?,?,?)", [(name, e.seq, e.at, e.body) for name, e in c.events])
        heads = {name: (e.seq, e.at) for name, e in c.events}
        self._each("replace into feed_head values (?,?,?)", [(name, *head) for name, head in heads.items()])
        self._each("delete from feed where name=? and seq=?", c.taken)
        for key, timer in c.timers.items():
            if timer is None:
                db.execute("delete from timer where actor=? and key=?", (actor, key))
            else:
                db.execute("replace into timer values (?,?,?,?,?)", (actor, key, timer.at, timer.trace, timer.body))
        later = [(deadline, actor, recipient, seq) for recipient, seq, deadline in c.deferred]
        self._each("update outbox set deadline=? where actor=? and recipient=? and seq=?", later)
        insert = "insert into quarantine (at, actor, sender, epoch, seq, trace, error, body, local) values (?,?,?,?,?,?,?,?,?)"
        for q in c.quarantined:
            db.execute(insert, (q.at, actor, q.sender, q.epoch, q.seq, q.trace, q.error, q.body, q.local))
        for local in {q.local for q in c.quarantined}:  # apart: what strangers send pushes out nothing of our own
            newest = "select id from quarantine where local=? order by id desc limit 1 offset ?"
            if bound := db.execute(newest, (local, KEPT_QUARANTINED)).fetchone():
                db.execute("delete from quarantine where local=? and id<=?", (local, bound[0]))
        self._each("delete from quarantine where id=?", [(number,) for number in c.released])


def _relink(db: sqlite3.Connection, actor: str, relink: Relink, boot: str, now: float) -> None:
    """Number what waits on a link anew, all of it by this start."""
    link = (actor, relink.recipient)
    db.execute("delete from outbox where actor=? and recipient=? and seq<=?", (*link, relink.agreed))
    waiting = db.execute("select seq from outbox where actor=? and recipient=? order by seq", link).fetchall()
    update = "update outbox set seq=? where actor=? and recipient=? and seq=?"
    db.executemany(update, [(number, *link, seq) for number, (seq,) in enumerate(waiting, 1)])
    db.execute("replace into sent values (?,?,?,?,0,?)", (*link, len(waiting), relink.epoch, now))
    db.execute("delete from mark where actor=? and recipient=?", link)
    db.execute("insert into mark values (?,?,?,1)", (*link, boot))
