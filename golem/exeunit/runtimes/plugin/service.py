"""A runtime that is up from start to stop and runs commands inside itself: the exe-unit's end of its protocol.

The program's stdin and stdout carry messages of `api`, its stderr goes to the exe-unit's log. A service that ends by
itself, or says what the protocol does not have, is lost, and what waits for it fails with the reason.
Neighbour: `external`, which starts it and kills it.
"""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import PurePosixPath

import trio

from golem.exeunit.runtime import ExitStatus, OutputSink, RuntimeFault, Side
from golem.exeunit.runtimes.plugin import api
from golem.exeunit.runtimes.plugin.process_tree import RunningProgram

log = logging.getLogger("golem.exeunit")

VERSION = "0.1.0"
ANSWER_S = 30.0
KILL_S = 1.0  # for a command to end after its kill; the service goes with it then
MAX_EARLY = 256  # events of a command whose number we do not have yet
MAX_LOG_BYTES = 1 << 20  # of the service's stderr
KILLED = 137


class RuntimeService:
    """One running service."""

    def __init__(self, command: RunningProgram) -> None:
        assert command.input is not None
        self._command, self._input = command, command.input
        self._serial = 0
        self._sending = trio.Lock()
        self._answers: dict[int, Callable[[api.Response], None]] = {}
        self._early: list[api.Status] = []
        self._status: tuple[int, trio.MemorySendChannel[api.Status]] | None = None
        self.lost = trio.Event()
        self.why_lost = ""
        # Not in a nursery: a service outlives the call that starts it. Neither task lets an exception out.
        trio.lowlevel.spawn_system_task(self._read)
        trio.lowlevel.spawn_system_task(self._log)
        trio.lowlevel.spawn_system_task(command.gone)  # then there is nothing more to read, whoever holds its pipes

    # -- life
    async def begin(self, timeout_s: float) -> None:
        """Greet it. Raises `RuntimeFault`."""
        answer = await self._call(lambda number: api.hello(number, VERSION), timeout_s)
        if not isinstance(answer, api.Hello):
            raise RuntimeFault(f"the runtime's service answered hello with {answer!r}"[:300])

    async def end(self) -> None:
        """Ask it to end, and give it a moment."""
        with trio.move_on_after(KILL_S), suppress(RuntimeFault):
            await self._call(api.shutdown, KILL_S)
            await self._command.gone()

    def _lose(self, why: str) -> None:
        if not self.lost.is_set():
            self.why_lost = why
            self.lost.set()

    # -- commands
    async def run(
        self, program: str, args: Sequence[str], output: OutputSink, *, max_output_bytes: int, time_limit_s: float | None
    ) -> ExitStatus:
        """Run one command to its end. Raises `RuntimeFault` where it does not start, or the service is lost."""
        send, receive = trio.open_memory_channel[api.Status](0)
        self._early.clear()
        argv = [PurePosixPath(program).name or program, *args]

        def started(response: api.Response) -> None:  # at once: the next message may be its news already
            if isinstance(response.body, api.Started):
                self._status = (response.body.pid, send)

        answer = await self._call(lambda number: api.run(number, program, argv), ANSWER_S, started)
        if not isinstance(answer, api.Started):
            raise RuntimeFault(f"the runtime's service answered run with {answer!r}"[:300])
        early = [one for one in self._early if one.pid == answer.pid]
        reason, ended, limit_s = None, None, math.inf if time_limit_s is None else time_limit_s
        try:
            with trio.move_on_after(limit_s) as scope:
                reason, ended = await self._follow(early, receive, output, max_output_bytes)
            if scope.cancelled_caught:
                reason = f"time limit of {limit_s:g} s reached"
        finally:
            if ended is None:
                with trio.CancelScope(shield=True):
                    await self._kill(answer.pid, receive)
            self._status = None
            send.close()
            receive.close()
        if self.lost.is_set() and ended is None and reason is None:
            raise RuntimeFault(self.why_lost)
        if reason is not None or ended is None:
            return ExitStatus(KILLED, reason)
        code = ended.return_code
        return ExitStatus(code if 0 <= code <= 255 else 255)

    async def _follow(
        self, early: Sequence[api.Status], receive: trio.MemoryReceiveChannel[api.Status], output: OutputSink, most_bytes: int
    ) -> tuple[str | None, api.Status | None]:
        """Hand output on until the command's end; return why it is to be killed, or its last news (neither: service lost)."""
        total = 0
        waiting = list(early)
        while True:
            news = waiting.pop(0) if waiting else await self._next(receive)
            if news is None:
                return None, None
            sides: tuple[tuple[Side, bytes], ...] = (("stdout", news.stdout), ("stderr", news.stderr))
            for side, chunk in sides:
                room = max(0, most_bytes - total)
                total += len(chunk)
                if chunk[:room]:
                    await output(side, chunk[:room])
            if total > most_bytes:
                return f"output limit of {most_bytes} bytes reached", None
            if not news.running:
                return None, news

    async def _next(self, receive: trio.MemoryReceiveChannel[api.Status]) -> api.Status | None:
        """Return the next news of the command, None when the service is lost."""
        found: api.Status | None = None
        async with trio.open_nursery() as nursery:

            async def give_up() -> None:
                await self.lost.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(give_up)
            found = await receive.receive()
            nursery.cancel_scope.cancel()
        return found

    async def _kill(self, pid: int, receive: trio.MemoryReceiveChannel[api.Status]) -> None:
        """Kill a command; a service that does not see to it is killed itself."""

        async def ask() -> None:
            with suppress(RuntimeFault):
                await self._call(lambda number: api.kill(number, pid, signal.SIGKILL), KILL_S)

        with trio.move_on_after(KILL_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)  # news may hold up the answer
                while (news := await self._next(receive)) is not None and news.running:
                    pass
                nursery.cancel_scope.cancel()
            return
        self._lose("the runtime's service did not end a command that was to be killed")
        self._command.kill(self.why_lost)

    # -- messages
    async def _call(
        self, request: Callable[[int], bytes], timeout_s: float, at_once: Callable[[api.Response], None] | None = None
    ) -> object:
        """Send a request and return the body of its answer. Raises `RuntimeFault`, also where it says no."""
        self._serial += 1
        number, answered, found = self._serial, trio.Event(), list[api.Response]()

        def take(response: api.Response) -> None:
            if at_once is not None:
                at_once(response)
            found.append(response)
            answered.set()

        self._answers[number] = take
        try:
            with trio.move_on_after(timeout_s):
                async with trio.open_nursery() as nursery:

                    async def give_up() -> None:
                        await self.lost.wait()
                        nursery.cancel_scope.cancel()

                    nursery.start_soon(give_up)
                    async with self._sending:
                        await self._input.send_all(request(number))
                    await answered.wait()
                    nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            self._lose("the runtime's service has closed its input")
        finally:
            del self._answers[number]
        if not found:
            raise RuntimeFault(self.why_lost or f"the runtime's service did not answer within {timeout_s:g} s")
        body = found[0].body
        if isinstance(body, api.ServiceFailed):
            raise RuntimeFault(f"the runtime's service refused: {body.message[:1000]}")
        return body

    async def _read(self) -> None:
        """Take in messages until the service ends."""
        frames = api.Frames()
        try:
            while chunk := await self._command.chunks("stdout"):
                for frame in frames.feed(chunk):
                    await self._take(api.read_response(frame))
            self._lose("the runtime's service has ended")
        except api.ProtocolFault as fault:
            self._lose(f"the runtime's service does not keep to the protocol: {fault}")
            self._command.kill(self.why_lost)
        except (trio.ClosedResourceError, OSError) as error:
            self._lose(f"the runtime's service cannot be read: {error!r}")

    async def _take(self, response: api.Response) -> None:
        body = response.body
        if isinstance(body, api.Status):
            if self._status is not None and body.pid == self._status[0]:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await self._status[1].send(body)
            else:
                self._early.append(body)
                if len(self._early) > MAX_EARLY:
                    raise api.ProtocolFault("news of commands that were not started")
        elif isinstance(body, api.ServiceClaim):
            log.debug("the runtime says: %s = %r", body.name[:100], body.value if isinstance(body.value, float) else "...")
        elif not response.event and (take := self._answers.get(response.id)) is not None:
            take(response)

    async def _log(self) -> None:
        left = MAX_LOG_BYTES
        with suppress(trio.ClosedResourceError, OSError):
            while chunk := await self._command.chunks("stderr"):
                if left > 0:
                    log.info("runtime: %s", chunk[:left].decode("utf-8", "replace").rstrip()[:4000])
                left -= len(chunk)
