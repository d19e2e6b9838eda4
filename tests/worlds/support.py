"""Small helpers that every test module may use."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

import trio
import trio.testing

from actors.kernel.machine import Send
from actors.kernel.system import System
from protocol.types import Message


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


async def tell(system: System, source: str, actor: str, fact: Message) -> None:
    """Have actor `source` of a running system tell another one a fact; return when it is taken."""
    await system.post(source, [Send(actor, fact)])
    to, journal = f"{system.node}/{actor}", system.journal
    seq = journal.last_sent(source, to)
    while journal.acked(source, to) < seq and journal.posted(source, to, seq):
        await trio.sleep(0.005)
