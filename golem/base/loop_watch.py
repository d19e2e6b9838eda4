"""How long one step of a task holds the event loop: nothing that agents or peers send may take long between two awaits.

Counted is the processor time of the loop's thread, so a slow disk, a busy machine or a debugger is not taken for it.
"""

from __future__ import annotations

import time

import trio

HELD_S = 0.05  # nobody waits for longer than this for what somebody else has sent


class LoopWatch(trio.abc.Instrument):
    """Trio's instrument that measures each step. `long`: how many took longer than `HELD_S`; `longest_s`: the longest."""

    def __init__(self) -> None:
        self.long, self.longest_s, self.longest_task = 0, 0.0, ""
        self._begun: float | None = None  # the step at work when the watch began is not measured

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._begun = time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._begun is None:
            return
        took_s = time.thread_time() - self._begun
        if took_s > self.longest_s:
            self.longest_s, self.longest_task = took_s, task.name
        if took_s > HELD_S:
            self.long += 1
