"""The one place that touches Trio's private scheduler seed. `test_simulation.py` proves that it still works.

Trio shuffles the tasks that are ready with a random generator of its own, on purpose; a simulation that must replay
sets that generator's seed and asks Trio to sort before it shuffles (sets of tasks have no stable order).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio
import trio._core._run as trio_run
from trio.testing import MockClock


def run_seeded(seed: int, main: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    """Run `main` on a clock that jumps, with a schedule that depends on `seed` alone."""
    before, state = trio_run._ALLOW_DETERMINISTIC_SCHEDULING, trio_run._r.getstate()
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True
    trio_run._r.seed(seed)
    try:
        return trio.run(main, *args, clock=MockClock(autojump_threshold=0))
    finally:
        trio_run._ALLOW_DETERMINISTIC_SCHEDULING = before
        trio_run._r.setstate(state)
