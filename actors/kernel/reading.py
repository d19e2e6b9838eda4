"""What is read of a journal: on the event loop, of committed state, and never of another kind than was written.

SQLite lets any value stand in any column, so a flipped bit turns bytes into a text, a number into NULL. Bodies are read as
bytes whatever stands there: rows and messages have a checksum. A link's counters that are no numbers raise `RowDamaged`.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import trio

from actors.kernel.lineage import Marks, Outgoing, Position
from actors.kernel.records import Event, JournalError, MessageDamaged, Posted, RowDamaged, SetAside, Timer, unsealed
from actors.kernel.tables import Acks

ALARMS_AT_ONCE = 256  # of an actor that are due
READ_FIRST, READ_AT_ONCE = 32, 256  # rows of a prefix read by the first query, twice as many by each further one, up to this
ASKED_LINKS = 64  # to one node; those to the processes of activities live no longer than their journals
EMPTY = "x''"
BODY = "coalesce(cast(body as blob), x'')"
POSTED = f"cast(seq as integer), coalesce(cast(deadline as real), 0.0), coalesce(cast(trace as text), ''), {BODY}"
TIMER = f"actor, key, coalesce(cast(at as real), 0.0), coalesce(cast(trace as text), ''), {BODY}"
EVENT = f"cast(seq as integer), coalesce(cast(at as real), 0.0), {BODY}"
ASIDE = (
    "coalesce(cast(at as real), 0.0), coalesce(cast(sender as text), ''), coalesce(cast(epoch as text), ''),"
    " coalesce(cast(seq as integer), 0), coalesce(cast(trace as text), ''), coalesce(cast(error as text), ''),"
    " {}, local, actor, id"
)


def _lenient(raw: bytes) -> str:
    return raw.decode(errors="replace")


def _typed(values: Any, kinds: tuple[type, ...], damaged: Callable[[str], RowDamaged]) -> Any:
    """Return a row's values, which are of these kinds. Raises `RowDamaged`."""
    for value, kind in zip(values, kinds, strict=True):
        if type(value) is not kind:
            raise damaged(f"{type(value).__name__} stands where {kind.__name__} belongs")
    return values


def _unnumbered(actor: str, recipient: str) -> Callable[[str], RowDamaged]:
    return partial(RowDamaged, actor, f"(link to {recipient})", again=lambda journal: journal.numbering(actor, recipient))


def _marks(found: Iterable[tuple[Any, Any]], actor: str, recipient: str) -> Marks:
    damaged = _unnumbered(actor, recipient)
    return tuple(f"{first}:{boot}" for first, boot in (_typed(mark, (int, str), damaged) for mark in found))


def _posted(actor: str, recipient: str, seq: int, deadline: float, trace: str, stored: bytes) -> Posted:
    try:
        return Posted(seq, deadline, trace, unsealed(actor, recipient, stored))
    except RowDamaged as error:
        raise MessageDamaged(actor, recipient, seq, error.reason) from None


class Look(trio.abc.Instrument):
    """Ends a read transaction when the task that began it comes to a checkpoint."""

    def __init__(self, reader: sqlite3.Connection) -> None:
        self._reader = reader

    def after_task_step(self, task: Any) -> None:
        """The look is over."""
        trio.lowlevel.remove_instrument(self)
        if self._reader.in_transaction:
            self._reader.execute("commit")


class JournalReader:
    """The part of the journal that reads."""

    _reader: sqlite3.Connection
    _looks: bool  # reads between two checkpoints may be one transaction
    _look: Look
    _acks: Acks  # written with a commit
    _acks_under_way: Acks

    def _all(self, query: str, values: tuple[Any, ...] = ()) -> list[Any]:
        """Return all that a query finds. Raises `JournalError` where the file cannot be read."""
        try:
            try:
                return self._reader.execute(query, values).fetchall()
            except sqlite3.OperationalError as error:
                if "decode" not in str(error):  # else a text is none any more: it is nobody's name then
                    raise
                self._reader.text_factory = _lenient
                try:
                    return self._reader.execute(query, values).fetchall()
                finally:
                    self._reader.text_factory = str
        except sqlite3.Error as error:
            raise JournalError(f"cannot read the journal: {error}") from error

    def _one(self, query: str, values: tuple[Any, ...] = ()) -> Any:
        found = self._all(query, values)
        return found[0] if found else None

    def look(self) -> None:
        """From here to the next checkpoint of this task all reads see one state, while the writer goes on.

        For who reads what others write. An actor's own rows change by its own commits alone: it needs no such look.
        """
        if self._looks and not self._reader.in_transaction:
            self._all("begin")
            trio.lowlevel.add_instrument(self._look)  # for this step alone: every step of every task would pay for it

    def row(self, actor: str, key: str) -> bytes | None:
        """Return a row as it is stored (see `sealed`)."""
        found = self._one(f"select {BODY} from row where actor=? and key=?", (actor, key))
        return found[0] if found else None

    def rows(self, actor: str, prefix: str, behind: str = "") -> Iterator[tuple[str, bytes]]:
        """Yield (key, as stored) of the actor's rows whose key starts with `prefix`, in key order; those behind a key."""
        # Read piece by piece, each to its end: a statement left open by a caller that stopped half-way would hold the
        # connection to an old snapshot, for everybody.
        query = f"select key, {BODY} from row where actor=? and key>=? and key<? order by key limit ?"
        after, end = max(prefix, behind + "\0" if behind else ""), prefix + "\U0010ffff"
        limit = min(READ_FIRST, READ_AT_ONCE)
        while True:
            found = self._all(query, (actor, after, end, limit))
            yield from found
            if len(found) < limit:
                return
            limit = min(2 * limit, READ_AT_ONCE)
            before, after = after, found[-1][0] + "\0"
            if after <= before:
                raise RowDamaged(actor, before, "its key is no text")

    def position(self, actor: str, sender: str) -> Position:
        """Return how far a link is read. Raises `RowDamaged`."""
        found = self._one("select epoch, seq, retired, boots from inbox where actor=? and sender=?", (actor, sender))
        if found is None:
            return Position()
        damaged = partial(RowDamaged, actor, f"(link from {sender})", again=lambda journal: journal.position(actor, sender))
        epoch, seq, retired, boots = _typed(found, (str, int, str, str), damaged)
        return Position(epoch, seq, tuple(retired.split()), tuple(boots.split()))

    def outgoing(self, actor: str, recipient: str) -> Outgoing:
        """Return how a link is numbered. Raises `RowDamaged`."""
        found = self._one("select epoch, seq, acked from sent where actor=? and recipient=?", (actor, recipient))
        return Outgoing(*_typed(found, (str, int, int), _unnumbered(actor, recipient))) if found else Outgoing()

    def numbering(self, actor: str, recipient: str) -> None:
        """Read all that is known of a link. Raises `RowDamaged`."""
        self.outgoing(actor, recipient), self.standing(actor, recipient)

    def standing(self, actor: str, recipient: str) -> tuple[str, int, Marks]:
        """Return the epoch of a link's numbering, up to where it is known to be acknowledged, and its marks (see `marks`).

        Raises `RowDamaged`.
        """
        query = """
            select epoch, acked, first, boot from sent left join mark using (actor, recipient)
            where actor=? and recipient=? order by first
        """
        found = self._all(query, (actor, recipient))
        if not found:
            return "", 0, ()
        epoch, acked = _typed(found[0][:2], (str, int), _unnumbered(actor, recipient))
        marks = _marks(((first, boot) for _, _, first, boot in found if boot is not None), actor, recipient)
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
        return _marks(self._all(query, (actor, recipient)), actor, recipient)

    def pending(self, actor: str, recipient: str, after: int, limit: int) -> tuple[list[Posted], MessageDamaged | None]:
        """Return at most `limit` unacknowledged messages of a link behind sequence number `after`.

        They end before a damaged one, which is returned, too.
        """
        query = f"select {POSTED} from outbox where actor=? and recipient=? and seq>? order by seq limit ?"
        whole: list[Posted] = []
        for found in self._all(query, (actor, recipient, after, limit)):
            try:
                whole.append(_posted(actor, recipient, *found))
            except MessageDamaged as error:
                return whole, error
        return whole, None

    def waits(self, actor: str, recipient: str, after: int) -> bool:
        """Return whether a link has unacknowledged messages behind sequence number `after`."""
        query = "select 1 from outbox where actor=? and recipient=? and seq>? limit 1"
        return self._one(query, (actor, recipient, after)) is not None

    def posted(self, actor: str, recipient: str, seq: int) -> Posted | None:
        """Return a message of the outbox. Raises `MessageDamaged`."""
        query = f"select {POSTED} from outbox where actor=? and recipient=? and seq=?"
        found = self._one(query, (actor, recipient, seq))
        return _posted(actor, recipient, *found) if found else None

    def links(self) -> list[tuple[str, str]]:
        """Return (actor, recipient) of all links with something to deliver."""
        return self._all("select distinct actor, recipient from outbox")

    def waiting_bytes(self) -> int:
        """Return the size of all messages that nobody has acknowledged yet."""
        return int(self._one("select coalesce(sum(length(body)), 0) from outbox")[0])

    def links_to(self, node: str) -> list[tuple[str, str]]:
        """Return (actor, recipient) of links to the actors of a node, of which something was acknowledged."""
        query = "select actor, recipient from sent where recipient>? and recipient<? and acked>0 and recipient not like ? limit ?"
        return self._all(query, (f"{node}/", f"{node}/\U0010ffff", f"{node}/%:%", ASKED_LINKS))

    def overdue(self, actor: str, now: float, limit: int = ALARMS_AT_ONCE) -> list[tuple[str, int, str]]:
        """Return (recipient, seq, epoch) of an actor's messages whose deadline has passed and that nobody acknowledged."""
        # one query: between two, a link may be numbered anew, and a number be another message's
        query = """
            select recipient, cast(outbox.seq as integer), coalesce(cast(epoch as text), ''), cast(acked as integer)
            from outbox join sent using (actor, recipient)
            where actor=? and deadline<=? order by deadline, recipient, outbox.seq limit ?
        """
        found = self._all(query, (actor, now, limit))
        return [(to, seq, epoch) for to, seq, epoch, acked in found if self._acked(actor, to, epoch, acked or 0) < seq]

    def due(self, actor: str, now: float, limit: int = ALARMS_AT_ONCE) -> list[Timer]:
        """Return an actor's timers whose time has come, earliest first."""
        query = f"select {TIMER} from timer where actor=? and at<=? order by at, key limit ?"
        return [Timer(*found) for found in self._all(query, (actor, now, limit))]

    def actors_due(self, now: float) -> list[str]:
        """Return the actors that have a timer or a deadline whose time has come."""
        query = "select actor from timer where at<=? union select actor from outbox where deadline<=? order by 1"
        return [actor for (actor,) in self._all(query, (now, now))]

    def timer(self, actor: str, key: str) -> Timer | None:
        found = self._one(f"select {TIMER} from timer where actor=? and key=?", (actor, key))
        return Timer(*found) if found else None

    def next_alarm(self, after: float = -math.inf) -> float | None:
        """Return the time of the earliest timer or deadline behind `after`, `None` if there is none."""
        first = self._one("select min(at) from timer where at>?", (after,))[0]
        second = self._one("select min(deadline) from outbox where deadline>?", (after,))[0]
        return min((at for at in (first, second) if isinstance(at, float)), default=None)

    def feed_head(self, feed: str) -> tuple[int, float]:
        """Return the number and the time of a feed's last event."""
        head = self._one("select seq, at from feed_head where name=?", (feed,)) or (0, 0.0)
        if type(head[0]) is not int or type(head[1]) is not float:  # its events tell as much
            query = "select coalesce(max(cast(seq as integer)), 0), coalesce(max(cast(at as real)), 0.0) from feed where name=?"
            head = self._one(query, (feed,))
        return head[0], head[1]

    def events(self, feed: str, after_seq: int, limit: int) -> list[Event]:
        query = f"select {EVENT} from feed where name=? and seq>? order by seq limit ?"
        return [Event(*found) for found in self._all(query, (feed, after_seq, limit))]

    def events_after(self, feed: str, after_at: float, limit: int) -> list[Event]:
        query = f"select {EVENT} from feed where name=? and at>? order by seq limit ?"
        return [Event(*found) for found in self._all(query, (feed, after_at, limit))]

    def quarantined(self) -> list[SetAside]:
        """Return the messages that were set aside, oldest first, without their bodies."""
        query = f"select {ASIDE.format(EMPTY)} from quarantine order by id"
        return [SetAside(*found) for found in self._all(query)]

    def set_aside(self, number: int) -> SetAside | None:
        """Return one message of the quarantine, whole."""
        found = self._one(f"select {ASIDE.format(BODY)} from quarantine where id=?", (number,))
        return SetAside(*found) if found else None

    def senders_set_aside(self, actor: str) -> list[str]:
        """Return whose messages to an actor are in quarantine."""
        query = "select distinct sender from quarantine where actor=?"
        return [sender for (sender,) in self._all(query, (actor,))]

    def refused(self, actor: str, sender: str, epoch: str, first: int, last: int) -> tuple[int, ...]:
        """Return which messages of a part of a link are in quarantine."""
        query = "select seq from quarantine where actor=? and sender=? and epoch=? and seq between ? and ? order by seq"
        return tuple(seq for (seq,) in self._all(query, (actor, sender, epoch, first, last)))

    def acked(self, actor: str, recipient: str) -> int:
        """Return up to where a link is known to be acknowledged."""
        known = self.outgoing(actor, recipient)
        return self._acked(actor, recipient, known.epoch, known.acked)
