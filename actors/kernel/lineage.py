"""Which start of a process wrote which messages of a link: how a disk that went back in time, or runs twice, is noticed.

Each start of a process has a name of its own (`Journal.boot`: a number that rises and something unique). A message bears
the name of the start that numbered it, and no two processes ever number under one name, copies of a disk included. So if
sender and recipient name the same start for a number, they mean the same message, and agree on all before it, too.

A link's starts are kept as marks `first:boot`, rising: `boot` numbered messages from `first` on, until the next mark.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass

import msgspec

from protocol.codec import MAX_MARKS, Envelope

RETIRED_EPOCHS = 8
FORK = "fork"  # what a sender is told that numbers anew what was numbered before
Marks = tuple[str, ...]
_NUMBERED = re.compile(r"(\d+)")


def first_of(mark: str) -> int:
    """Return the number of the first message under a mark."""
    return int(mark.partition(":")[0])


def boot_at(marks: Marks, seq: int) -> str:
    """Return the start that numbered message `seq`, "" where that is not known (or `seq` is 0: no message)."""
    if not (marks and seq):
        return ""
    first, _, boot = marks[-1].partition(":")
    if int(first) <= seq:  # as of nearly every message
        return boot
    place = bisect_right(marks, seq, key=first_of)
    return marks[place - 1].partition(":")[2] if place else ""


def marked(marks: Marks, seq: int, boot: str) -> Marks:
    """Return the marks with message `seq`, which follows all that they tell of."""
    if marks and marks[-1].partition(":")[2] == boot:
        return marks
    return (*marks, f"{seq}:{boot}")[-MAX_MARKS:]


def agreed(ours: Marks, theirs: Marks, low: int, high: int) -> int:
    """Return the last number in `low`..`high` that both sides give to the same message; `low` if there is none above."""
    seq = high
    while seq > low:
        if boot_at(ours, seq) == boot_at(theirs, seq):
            return seq
        begins = [first_of(marks[place - 1]) for marks in (ours, theirs) if (place := bisect_right(marks, seq, key=first_of))]
        seq = max(begins, default=1) - 1
    return low


def start_number(boot: str) -> int:
    """Return the number in a start's name, 0 if it has none."""
    found = _NUMBERED.match(boot)
    return int(found[1][:18]) if found else 0


class Position(msgspec.Struct, frozen=True):
    """How far an actor has read a link: `seq` in `epoch`, numbered by the starts that `boots` tells.

    `retired` are former epochs of the sender, each with how far it was read: its frames may come late, and a disk that
    was put back sends in it. The first frame of an epoch must not come after one of the next: a node takes longer to
    start on an empty disk than a frame outlives its process.
    """

    epoch: str = ""
    seq: int = 0
    retired: tuple[str, ...] = ()
    boots: Marks = ()

    def under(self, epoch: str) -> Position:
        """Return the position from which messages of `epoch` count: the start of it if the sender began a new one."""
        if epoch == self.epoch:
            return self
        sealed = f"{self.epoch}/{self.seq}/{','.join(self.boots)}"
        return Position(epoch, 0, (*self.retired, sealed)[-RETIRED_EPOCHS:] if self.epoch else ())

    def of(self, epoch: str) -> Position:
        """Return what may be acknowledged to a sender in `epoch`."""
        if epoch == self.epoch:
            return self
        for sealed in self.retired:
            name, _, rest = sealed.partition("/")
            if name == epoch:
                seq, _, boots = rest.partition("/")
                return Position(epoch, int(seq or 0), (), tuple(boots.split(",")) if boots else ())
        return Position()

    def is_retired(self, epoch: str) -> bool:
        """Return whether the sender has left `epoch`."""
        return epoch != self.epoch and any(sealed.partition("/")[0] == epoch for sealed in self.retired)

    def objection(self, e: Envelope) -> str:
        """Return why an envelope that is not known yet cannot be taken here, "" if it can or is the last one again.

        A gap may be one in our memory: whoever went back in time stands lower than the sender knows it to. A fork is a
        sender who numbers anew what was numbered before: it went back, or there are two of it.
        """
        if e.seq == self.seq:
            return "" if e.boot == boot_at(self.boots, self.seq) else FORK
        if e.after != self.seq:
            return "gap"
        return "" if e.after_boot == boot_at(self.boots, self.seq) else FORK

    def behind(self, e: Envelope) -> Position:
        """Return the position behind an envelope that was taken here."""
        return Position(self.epoch, e.seq, self.retired, marked(self.boots, e.seq, e.boot))


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A link's numbering: its `epoch`, the last number given, and the last one known to be committed at the recipient."""

    epoch: str = ""
    sent: int = 0
    acked: int = 0


@dataclass(frozen=True, slots=True)
class Relink:
    """A link begins a new numbering: what both sides know (up to `agreed`) is done, the rest is numbered from 1."""

    recipient: str
    epoch: str
    agreed: int


@dataclass(frozen=True, slots=True)
class Lower:
    """A recipient went back in time: it stands at message `acked` again, which start `boot` numbered.

    The numbering goes on: should the recipient's newer disk return, it still knows which messages it has had.
    """

    recipient: str
    acked: int
    boot: str
