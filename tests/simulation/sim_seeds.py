"""Which seeds and mutants of a simulation a run takes: all, or its share where the suite runs more than once (CI runs it twice).

They ask nothing of the machine. SIM_SHARE=1/2 is every other one from the first on, SIM_SHARE=2/2 those between: both
together are all of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def share(seeds: Sequence[T], which: str | None = None) -> Sequence[T]:
    """Return this run's share of some seeds or mutants."""
    number, _, of = (which or os.environ.get("SIM_SHARE", "1/1")).partition("/")
    return seeds[int(number) - 1 :: int(of)]
