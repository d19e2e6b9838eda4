"""Who starts a crashed actor again, and when that is enough."""

from __future__ import annotations

import logging
from collections import Counter, deque

import trio

from actors.kernel.actor import Actor
from actors.kernel.machine import NodeFailed
from actors.kernel.port import PortActor
from actors.kernel.records import JournalError

log = logging.getLogger("golem.kernel")

RESTARTS, RESTART_WINDOW_S = 5, 60.0
FIRST_RESTART_S, LAST_RESTART_S = 0.05, 5.0


async def supervise(actor: Actor | PortActor, counts: Counter[str]) -> None:
    """Restart an actor whose crash could not be isolated to one message; end the node when that goes on.

    `counts["restarts/<name>"]` says how often. Raises `NodeFailed`, `JournalError`.
    """
    crashes: deque[float] = deque(maxlen=RESTARTS + 1)
    while True:
        try:
            await actor.run()
        except JournalError:
            raise
        except Exception as error:
            log.error("%s crashed, and no message is to blame", actor.name, exc_info=error)
            now = trio.current_time()
            crashes.append(now)
            counts[f"restarts/{actor.name}"] += 1
            recent = sum(now - at <= RESTART_WINDOW_S for at in crashes)
            if recent > RESTARTS:
                raise NodeFailed(f"actor {actor.name} crashed {recent} times within {RESTART_WINDOW_S:g} s") from error
        actor.forget()
        await trio.sleep(min(FIRST_RESTART_S * 2 ** (recent - 1), LAST_RESTART_S))
