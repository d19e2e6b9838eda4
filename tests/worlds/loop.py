"""How long the event loop is held, measured in processor time, and how much of it this machine needs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from golem.base.loop_watch import LoopWatch

USUAL_S = 0.012  # what the piece of work takes on the machine that the limit was made for


def slowness() -> float:
    """How many times slower than that machine this one is now, at least 1."""
    best = 9e9
    for _ in range(3):
        begun = time.thread_time()
        json.dumps(json.loads("[" + ",".join(f'{{"a{n}":{n}.5}}' for n in range(15_000)) + "]"))
        best = min(best, time.thread_time() - begun)
    return max(1.0, best / USUAL_S)


@contextmanager
def watched() -> Iterator[LoopWatch]:
    watch = LoopWatch()
    trio.lowlevel.add_instrument(watch)
    try:
        yield watch
    finally:
        trio.lowlevel.remove_instrument(watch)
