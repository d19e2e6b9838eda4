"""The wall clock beside one that nobody sets: the ledger hears of it whenever the first was set.

What a provider may bill is measured by this node's clock. Where that is set back (by NTP, or by hand) an honest bill would
look like one for time that never passed.
"""

from __future__ import annotations

import logging

import trio

from actors.kernel.machine import Send
from actors.kernel.system import System
from golem.base.boot import boot_id, boot_time
from protocol.ledger import ClockSeen

log = logging.getLogger("golem.node")

LOOK_S = 1.0
STEP_S = 2.0  # within the margin of the ledger, which is 5 s


async def watch_clock(system: System) -> None:
    """Tell the ledger of the clocks now, and whenever the wall clock was set.

    The system's time follows a step of the wall clock seconds later (`actors/kernel/clock.py`).
    """
    name, ahead = boot_id(), None
    while True:
        wall_s, boot_s = system.now(), boot_time()
        seen = wall_s - boot_s
        if ahead is None or abs(seen - ahead) > STEP_S:
            if ahead is not None:
                log.info("the clock of this machine is off its course by %+.1f s", seen - ahead)
            await system.post("clock", [Send("ledger", ClockSeen(name, boot_s, wall_s))])
            ahead = seen
        await trio.sleep(LOOK_S)
