"""Which seeds of a simulation a run takes: all, or its share of them where the suite runs more than once (CI runs it twice).

SIM_SHARE=1/2 is every other seed from the first on, SIM_SHARE=2/2 those between: both together are all of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence


def share(seeds: Sequence[int], which: str | None = None) -> Sequence[int]:
    """Return this run's share of some seeds."""
    number, _, of = (which or os.environ.get("SIM_SHARE", "1/1")).partition("/")
    return seeds[int(number) - 1 :: int(of)]
