"""How long a test waits before it gives up. Tests wait for events; a limit is the last resort and does not depend on the
machine's speed: each is written as what an idle machine needs at most, and scaled here.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

import trio

SLOWER = float(os.environ.get("TESTS_SLOWER", "12"))  # as many times as this machine, with its load, may be slower


def patience(seconds: float) -> float:
    """Return how long to wait for what an idle machine does within `seconds`."""
    return seconds * SLOWER


def within(seconds: float) -> AbstractContextManager[trio.CancelScope]:
    """Fail if the block takes longer than `patience(seconds)`."""
    return trio.fail_after(patience(seconds))
