"""Small helpers that every test module may use."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

import trio
import trio.testing


def trio_test(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test under Trio with the real clock."""

    @functools.wraps(test)
    def run(**kwargs: Any) -> None:
        trio.run(functools.partial(test, **kwargs))

    return run


def mock_trio_test(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test under Trio with a clock that jumps whenever every task waits (no thread may run)."""

    @functools.wraps(test)
    def run(**kwargs: Any) -> None:
        trio.run(functools.partial(test, **kwargs), clock=trio.testing.MockClock(autojump_threshold=0))

    return run
