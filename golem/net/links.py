"""Requests over one persistent stream a peer and direction: we ask on ours, the peer asks on its own.

A frame is a 4-byte big-endian length and MessagePack [id, kind, service, payload]. One task reads a stream, one
writes it; deadlines lie on the reply, never on stream I/O. Neighbour: `sessions.py` opens and watches links.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import msgpack
import trio
from libp2p.stream_muxer.exceptions import MuxedConnError, MuxedStreamError

from golem.base.printing import sayable
from golem.net.muxed_stream import MuxStream
from golem.net.types import MAX_REQUEST_BYTES, LinkBusy, NetError, NetRefusal, RemoteError, Timing, Unreachable

log = logging.getLogger(__name__)

REQUEST, REPLY, REFUSED, BUSY, PING, PONG = range(6)
MAX_FRAME = MAX_REQUEST_BYTES + 1024
MAX_SERVICE_CHARS = 128
MAX_IN_FLIGHT = 256  # requests of one side on a link
MAX_QUEUED_BYTES = 32 << 20  # of frames not yet written, or of requests being handled
WRITE_BATCH = 256 << 10
FRAMES_IN_A_ROW = 256  # that one task reads before others get their turn
WRITE_STALL_S = 30.0
BROKEN = (MuxedStreamError, MuxedConnError, trio.TooSlowError)
Handler = Callable[[str, bytes], Awaitable[bytes]]
Frame = tuple[int, int, str, bytes]


class BadFrame(Exception):
    """The peer sent what no honest node sends; the link ends."""


class _Channel:
    """Frames on a stream: `send` never waits, `receive` does."""

    def __init__(self, stream: MuxStream) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self._outbox: deque[bytes] = deque()
        self._wake = trio.Event()
        self.queued_bytes = 0
        self._in_a_row = 0

    def send(self, number: int, kind: int, service: str, payload: bytes) -> None:
        body: bytes = msgpack.packb((number, kind, service, payload))
        data = len(body).to_bytes(4, "big") + body
        try:
            if self.queued_bytes == 0 and self._stream.write_nowait(data):
                return  # nothing is waiting or half written: no need to wake the writer
        except BROKEN:
            return  # the reader of this stream notices and ends the link
        self._outbox.append(data)
        self.queued_bytes += len(data)
        self._wake.set()

    async def write_loop(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._outbox:
                batch = bytearray()
                while self._outbox and len(batch) < WRITE_BATCH:
                    batch += self._outbox.popleft()
                with trio.fail_after(WRITE_STALL_S):
                    await self._stream.write(batch)
                self.queued_bytes -= len(batch)

    async def receive(self) -> Frame:
        buffer = self._buffer
        self._in_a_row += 1
        if self._in_a_row >= FRAMES_IN_A_ROW:
            self._in_a_row = 0
            await trio.lowlevel.checkpoint()  # a peer's many small frames must not keep the others from running
        while len(buffer) < 4:
            buffer += await self._stream.read()
        size = int.from_bytes(buffer[:4], "big")
        if size > MAX_FRAME:
            raise BadFrame(f"a frame of {size} bytes")
        while len(buffer) < 4 + size:
            buffer += await self._stream.read()
        with memoryview(buffer) as view:
            frame = _decode(view[4 : 4 + size])
        del buffer[: 4 + size]
        return frame


def _decode(body: memoryview) -> Frame:
    try:
        frame: Any = msgpack.unpackb(
            body, max_array_len=4, max_map_len=0, max_ext_len=0, max_str_len=4096, max_bin_len=MAX_REQUEST_BYTES
        )
        number, kind, service, payload = frame
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise BadFrame(f"a malformed frame: {error}") from error
    if not (type(number) is int and type(kind) is int and isinstance(service, str) and isinstance(payload, bytes)) or not (
        0 <= number < 1 << 63 and REQUEST <= kind <= PONG and len(service) <= 1024
    ):
        raise BadFrame("a malformed frame")
    return number, kind, service, payload


class _Waiter:
    __slots__ = ("answer", "event")

    def __init__(self) -> None:
        self.event = trio.Event()
        self.answer: Frame | None = None


class Link:
    """Our side of a link: asks."""

    def __init__(self, peer: str, stream: MuxStream) -> None:
        self.peer = peer
        self.stream = stream
        self.broken = False
        self._channel = _Channel(stream)
        self._waiting: dict[int, _Waiter] = {}
        self._last_id = 0

    async def run(self) -> None:
        """Until the stream ends or the peer misbehaves; then every waiting request fails."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._channel.write_loop)
                while True:
                    frame = await self._channel.receive()
                    if frame[1] in (REQUEST, PING):
                        raise BadFrame("a request on our own link")
                    waiter = self._waiting.pop(frame[0], None)
                    if waiter is not None:
                        waiter.answer = frame
                        waiter.event.set()
        except* (BadFrame, *BROKEN) as errors:
            log.debug("link to %s ended: %r", self.peer, errors.exceptions)
        finally:
            self.broken = True
            self.stream.abort()
            for waiter in self._waiting.values():
                waiter.event.set()
            self._waiting.clear()

    async def request(self, service: str, payload: bytes, timeout_s: float) -> bytes:
        """The peer's reply. RemoteError, Busy, Unreachable (link broke, no answer in time), NetError (too big)."""
        if len(payload) > MAX_REQUEST_BYTES:
            raise NetError(f"a request of {len(payload)} bytes; the limit is {MAX_REQUEST_BYTES}")
        _, kind, text, answer = await self._ask(REQUEST, service, payload, timeout_s)
        if kind == REPLY:
            return answer
        if kind == BUSY:
            raise LinkBusy(f"{self.peer} is busy")
        raise RemoteError(text)

    async def ping(self, timeout_s: float) -> float:
        """Round trip in ms."""
        start = trio.current_time()
        await self._ask(PING, "", b"", timeout_s)
        return (trio.current_time() - start) * 1000

    async def _ask(self, kind: int, service: str, payload: bytes, timeout_s: float) -> Frame:
        if self.broken:
            raise Unreachable(f"the link to {self.peer} broke")
        if kind == REQUEST and (
            len(self._waiting) >= MAX_IN_FLIGHT or self._channel.queued_bytes > MAX_QUEUED_BYTES
        ):  # the keepalive's pings pass: a busy link is not a dead one
            raise LinkBusy(f"{len(self._waiting)} requests to {self.peer} wait for an answer")
        self._last_id += 1
        number, waiter = self._last_id, _Waiter()
        self._waiting[number] = waiter
        try:
            with trio.move_on_after(timeout_s) as scope:
                self._channel.send(number, kind, service, payload)
                await waiter.event.wait()
        finally:
            self._waiting.pop(number, None)
        if waiter.answer is not None:
            return waiter.answer
        if scope.cancelled_caught:
            raise Unreachable(f"{self.peer} did not answer within {timeout_s:g} s")
        raise Unreachable(f"the link to {self.peer} broke")


async def serve_link(sender: str, stream: MuxStream, services: dict[str, Handler], timing: Timing) -> None:
    """The peer's side of a link: answers until the stream ends. Handlers still running then are cancelled."""
    channel = _Channel(stream)
    running_bytes: dict[int, int] = {}

    async def answer(number: int, service: str, handler: Handler, payload: bytes) -> None:
        try:
            with trio.fail_after(timing.handler_timeout_s):
                result = await handler(sender, payload)
            if len(result) > MAX_REQUEST_BYTES:
                raise ValueError(f"a reply of {len(result)} bytes")
            channel.send(number, REPLY, "", result)
        except NetRefusal as refusal:
            channel.send(number, REFUSED, sayable(refusal, 1000), b"")
        except Exception:
            # Our own bug in a handler; the caller is told no more than that, and the link goes on.
            log.exception("service %s failed on a request of %s", service, sender)
            channel.send(number, REFUSED, "internal error", b"")
        finally:
            del running_bytes[number]

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.write_loop)
            while True:
                number, kind, service, payload = await channel.receive()
                if channel.queued_bytes > 2 * MAX_QUEUED_BYTES:
                    raise BadFrame("asks on and on and does not read the answers")
                if kind == PING:
                    channel.send(number, PONG, "", b"")
                elif kind != REQUEST or number in running_bytes:
                    raise BadFrame("not a request")
                elif (handler := services.get(service)) is None:
                    channel.send(number, REFUSED, f"unknown service {service[:MAX_SERVICE_CHARS]!r}", b"")
                elif (
                    len(running_bytes) >= MAX_IN_FLIGHT
                    or channel.queued_bytes + sum(running_bytes.values()) + len(payload) > MAX_QUEUED_BYTES
                ):
                    channel.send(number, BUSY, "", b"")
                else:
                    running_bytes[number] = len(payload)
                    nursery.start_soon(answer, number, service, handler, payload)
    except* (BadFrame, *BROKEN) as errors:
        log.debug("link of %s ended: %r", sender, errors.exceptions)
        stream.abort()
