"""The time of a process: steady, and right again within seconds when the wall clock was set.

Machines count on a clock that goes on evenly. So time is a clock that nobody sets (`steady`) plus an offset, which follows
the wall clock: small differences at once, a step once it has lasted for `SETTLE_S`. One that is taken back before that
never happened. When a step is taken over, timers and deadlines move with it (`Alarms`, `Journal.move`): what was to happen
in a minute still happens in a minute, whether the clock was set forward or back. The offset is in the journal, so a new
process of the same start of the machine goes on where the last one was.

After a start of the machine nobody knows how long it was off: the wall clock is believed, but no former timer rings before
that clock has gone evenly for `SETTLE_S`. What a step moves then is only what was set since.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

SETTLE_S = 10.0
SLEW_S = 2.0  # a smaller difference is no step


@dataclass(frozen=True, slots=True)
class ClockMark:
    """What the journal remembers: in which start of the machine, how far `steady` was off, and the last time that was told.

    `is_settled`: the clock had proved right by then.
    """

    boot_id: str
    offset: float
    last: float
    is_settled: bool

    def text(self) -> str:
        return f"{self.boot_id} {self.offset!r} {self.last!r} {'settled' if self.is_settled else 'new'}"


def read_mark(text: str | None) -> ClockMark | None:
    """Return the mark of a journal; None where there is none that can be read."""
    try:
        boot_id, offset, last, state = (text or "").split(" ")
        mark = ClockMark(boot_id, float(offset), float(last), state == "settled")
    except ValueError:
        return None
    return mark if math.isfinite(mark.offset) and math.isfinite(mark.last) else None


class Steady(NamedTuple):
    """A clock that nobody sets, in seconds, and the name of the start of the machine since which it counts."""

    read: Callable[[], float]
    boot_id: str


class MachineClock:
    """Time in seconds since the epoch. Without a `steady` clock it is the wall clock, which then never goes back."""

    def __init__(self, wall: Callable[[], float], steady: Steady | None = None, known: ClockMark | None = None) -> None:
        self._wall, self.is_steady = wall, steady is not None
        self._steady, self._boot_id = steady or (wall, "")
        self._last = 0.0
        self._begun = self._steady() if self.is_steady else 0.0
        self._step: tuple[float, float] | None = None  # a difference, and since when it has been there
        same = known is not None and known.boot_id == self._boot_id and known.last <= self._begun + known.offset + SLEW_S
        self._offset = known.offset if same and known else self._wall() - self._begun if self.is_steady else 0.0
        self.is_settled = not self.is_steady or known is None or (same and known.is_settled)
        self.holds = known is not None and not self.is_settled  # former timers

    def now(self) -> float:
        """Return the time in whole microseconds; between two steps it never goes back."""
        self._last = max(self._last, round(self._steady() + self._offset, 6))
        return self._last

    def mark(self, step: float = 0.0) -> ClockMark:
        """Return what the journal is to remember, after a step."""
        return ClockMark(self._boot_id, self._offset + step, self._last + step, self.is_settled or step != 0)

    def look(self) -> float | None:
        """Compare with the wall clock; return the step that is to be taken over now."""
        steady_s = self._steady()
        difference = self._wall() - steady_s - self._offset
        if abs(difference) <= SLEW_S:
            self._offset += difference
            self._step = None
            if not self.is_settled and steady_s - self._begun >= SETTLE_S:
                self.settle()
            return None
        if self._step is None or abs(self._step[0] - difference) > SLEW_S:
            self._step = difference, steady_s
        return difference if steady_s - self._step[1] >= SETTLE_S else None

    def take(self, step: float) -> None:
        """Take a step over."""
        self._offset += step
        self._step, self._last = None, 0.0
        self.settle()

    def settle(self) -> None:
        """The clock is what it says."""
        self.is_settled, self.holds = True, False
