"""What is said on the bus: frames, hello, requests and answers; both ends share it."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import trio

from actors.kernel.machine import LinkDown
from golem.base.printing import sayable
from golem.net.types import RemoteError, Unreachable
from protocol import gftp, interaction
from protocol.codec import MAX_FRAME_BYTES, Framer, encode
from protocol.types import Violation

log = logging.getLogger("golem.bus")

VERSION = 1
UNIT_STREAMS = (gftp.STREAM, interaction.BACK)  # files, and what a requestor has in an activity
MAX_BUS_FRAME_BYTES = MAX_FRAME_BYTES + (1 << 16)
MAX_IN_FLIGHT = 256  # requests of one side of a connection
OUTGOING_FRAMES = 64  # that wait to be written; then requests wait
HELLO_TIMEOUT_S = 5.0
READ_BYTES = 1 << 16
_MAX_SOCKET_PATH_BYTES = 107
Replier = Callable[[str, list[Any]], Awaitable[bytes]]


class BusError(Exception):
    """The bus cannot be opened or joined; the text says why."""


@contextmanager
def short_path(path: Path) -> Any:
    """Yield a name of `path` that fits a socket address: a long directory is reached through a descriptor."""
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH_BYTES:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


async def connect(path: Path) -> trio.SocketStream:
    """Open a connection to a bus. Raises `BusError`."""
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with short_path(path) as name:
            await sock.connect(name)
    except OSError as error:
        sock.close()
        raise BusError(f"no node at {path}: {error.strerror or error}") from None
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)


class Connection:
    """One established connection: requests out, requests in. `run` it; `answer(kind, args)` serves the other side.

    `answer` raises `Unreachable` or `LinkDown` (code down), or `RemoteError` or `Violation` (code refused).
    """

    def __init__(self, stream: trio.abc.Stream, framer: Framer, answer: Replier) -> None:
        self._stream, self._framer, self._answer = stream, framer, answer
        self._out_send, self._out_receive = trio.open_memory_channel[bytes](OUTGOING_FRAMES)
        self._waiting: dict[int, tuple[trio.Event, list[Any]]] = {}
        self._last_id = 0
        self._serving = 0
        self.closed = trio.Event()

    async def request(self, kind: str, *args: Any, timeout_s: float = math.inf) -> bytes:
        """Ask the other side. Raises `Unreachable` (also when the connection ends) and `RemoteError`."""
        if self.closed.is_set():
            raise Unreachable("the bus connection is closed")
        if len(self._waiting) >= MAX_IN_FLIGHT:
            raise Unreachable("too many requests under way on the bus connection")
        self._last_id = number = self._last_id + 1
        answered = trio.Event()
        answer: list[Any] = []
        self._waiting[number] = (answered, answer)
        try:
            with trio.move_on_after(timeout_s):
                await self._out_send.send(frame_of(kind, number, *args))
                await answered.wait()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise Unreachable("the bus connection is closed") from None
        finally:
            self._waiting.pop(number, None)
        match answer:
            case []:
                raise Unreachable("no answer in time" if not self.closed.is_set() else "the bus connection is closed")
            case ["reply", bytes() as payload]:
                return payload
            case ["error", "refused", str() as text]:
                raise RemoteError(text)
            case _:
                raise Unreachable(str(answer[-1])[:500])

    async def run(self) -> None:
        """Serve until either side closes. The other side's nonsense ends the connection."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, nursery.cancel_scope)
                await self._read(nursery)
                nursery.cancel_scope.cancel()
        finally:
            self.closed.set()
            self._out_receive.close()
            for answered, _ in self._waiting.values():
                answered.set()
            await trio.aclose_forcefully(self._stream)

    def close(self) -> None:
        """End the connection; `run` returns soon."""
        self._out_send.close()

    async def _write(self, scope: trio.CancelScope) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for frame in self._out_receive:
                await self._stream.send_all(frame)
        scope.cancel()

    async def _read(self, nursery: trio.Nursery) -> None:
        try:
            while data := await self._stream.receive_some(READ_BYTES):
                for frame in self._framer.feed(data):
                    self._take(frame, nursery)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except Violation as error:
            log.warning("bus connection ended: %s", error)

    def _take(self, frame: Any, nursery: trio.Nursery) -> None:
        match frame:
            case ["reply" | "error" as kind, int() as number, *rest]:
                if waiting := self._waiting.get(number):
                    waiting[1][:] = [kind, *rest]
                    waiting[0].set()
            case ["mail" | "call" as kind, int() as number, *args]:
                nursery.start_soon(self._serve, kind, number, args)
            case _:
                raise Violation("not a bus frame")

    async def _serve(self, kind: str, number: int, args: list[Any]) -> None:
        if self._serving >= MAX_IN_FLIGHT:
            reply = frame_of("error", number, "down", "busy")
        else:
            self._serving += 1
            try:
                reply = frame_of("reply", number, await self._answer(kind, args))
            except (RemoteError, Violation) as error:
                reply = frame_of("error", number, "refused", sayable(error, 2000))
            except (Unreachable, LinkDown) as error:
                reply = frame_of("error", number, "down", sayable(error, 2000))
            except Exception:
                # a bug in a handler of ours must not end the connection with everything else on it
                log.exception("bus request %s failed", kind)
                reply = frame_of("error", number, "refused", "internal error")
            finally:
                self._serving -= 1
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._out_send.send(reply)


def frame_of(*parts: Any) -> bytes:
    """Return the frame of these parts. Raises `RemoteError` where it is too large."""
    frame = encode(parts)
    if len(frame) > MAX_BUS_FRAME_BYTES:
        raise RemoteError(f"a bus frame of {len(frame)} bytes is over the limit of {MAX_BUS_FRAME_BYTES}")
    return frame


async def first_frame(stream: trio.abc.Stream, framer: Framer) -> list[Any]:
    """Return the first frame of a connection; it comes alone. Raises `Violation`."""
    with trio.move_on_after(HELLO_TIMEOUT_S):
        while data := await stream.receive_some(READ_BYTES):
            frames = list(framer.feed(data))
            if len(frames) > 1 or (frames and not isinstance(frames[0], list)):
                raise Violation("a connection begins with one frame, and waits")
            if frames:
                return frames[0]  # type: ignore[no-any-return]
    raise Violation("no hello")
