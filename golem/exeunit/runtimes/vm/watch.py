"""Whether a container still lives, and why not: the Engine is asked to tell of its end, and looked after itself.

An Engine may die, hang or be restarted under a container. One that is away for longer than half a minute is given up;
one that comes back says what has become of the container. The first reason found is the one that everybody is told.
Neighbours: `client`; `golem.exeunit.runtimes.vm.runtime`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from golem.exeunit.runtime import Limits, RuntimeFault
from golem.exeunit.runtimes.vm.admin import EngineGone, NoSuch
from golem.exeunit.runtimes.vm.client import EngineClient
from golem.exeunit.runtimes.vm.inside import Inside

PING_S, PING_TIMEOUT_S = 1.0, 5.0
AWAY_S = 30.0  # as long as everybody is silent at most who is still to be waited for
LOOK_S, ENDING_S, RETRY_S = 4.0, 3.0, 0.3
ENGINE_GONE = "the provider's Docker Engine has stopped or does not answer"


class Watch:
    """The life of one container. `death`: why it is over, once that is known."""

    def __init__(self, client: EngineClient, name: str, limits: Limits) -> None:
        self._client, self._name, self._limits = client, name, limits
        self.death: str | None = None

    async def failure(self) -> str:
        """Wait for the death of the container or its Engine, and return why."""
        if self.death is None:
            async with trio.open_nursery() as nursery:

                async def first(watch: Callable[[], Awaitable[str]]) -> None:
                    text = await watch()
                    self.death = self.death or text
                    nursery.cancel_scope.cancel()

                nursery.start_soon(first, self._container_died)
                nursery.start_soon(first, self._engine_died)
        assert self.death is not None
        return self.death

    async def _container_died(self) -> str:
        while (text := await self.diagnose()) is None:
            # An end between that look and this wait is not told of by an Engine that has just come back: look again.
            with trio.move_on_after(LOOK_S):
                try:
                    await self._client.wait_exit(self._name)
                    pause_s = 0.01
                except RuntimeFault:  # if that is the Engine: `_engine_died` decides whether it is gone for good
                    pause_s = RETRY_S
                await trio.sleep(pause_s)
        return text

    async def _engine_died(self) -> str:
        seen_s = trio.current_time()
        while trio.current_time() - seen_s <= AWAY_S:
            if await self._answers():
                seen_s = trio.current_time()
                await trio.sleep(PING_S)
            else:
                await trio.sleep(PING_S / 4)
        return ENGINE_GONE

    async def _answers(self) -> bool:
        try:
            with trio.fail_after(PING_TIMEOUT_S):
                await self._client.ping()
        except (RuntimeFault, trio.TooSlowError):
            return False
        return True

    async def diagnose(self, inside: Inside | None = None) -> str | None:
        """Return why the container has died; None while it lives, or the Engine does not say.

        `inside`: wait for the Engine to say it, if the container is on its way out.
        """
        if inside is not None and inside.is_ending():
            with trio.move_on_after(ENDING_S):
                while await self.diagnose() is None:
                    await trio.sleep(0.02)
        elif self.death is None:
            try:
                found = await self._client.inspect(self._name)
            except NoSuch:
                self.death = self.death or "the container was removed from outside"
            except RuntimeFault:
                pass
            else:
                self.death = self.death or _death_text(found.get("State") or {}, self._limits)
        return self.death

    async def explain(self, fault: RuntimeFault) -> RuntimeFault:
        """Return what to tell somebody whom the Engine failed with `fault`; one that is away has its time to come back."""
        if await self.diagnose() is None and isinstance(fault, EngineGone):
            with trio.move_on_after(AWAY_S):
                while self.death is None and not await self._answers():
                    await trio.sleep(PING_S / 4)
                if await self.diagnose() is None:
                    return fault
            self.death = self.death or ENGINE_GONE
        return RuntimeFault(self.death) if self.death is not None else fault


def _death_text(state: Mapping[str, Any], limits: Limits) -> str | None:
    if state.get("Running") or state.get("Status") == "created":
        return None
    if state.get("OOMKilled"):
        return f"the container was killed: memory limit of {limits.mem_gib:g} GiB reached"
    problem = f": {state['Error']}" if state.get("Error") else ""
    return f"the container was ended from outside (exit code {state.get('ExitCode')}){problem}"
