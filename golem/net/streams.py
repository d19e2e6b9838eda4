"""Bulk byte streams between nodes (files, VPN packets, live output), on a connection of their own when there is one.

On the wire: one length byte and the stream's name, answered by one byte, 0 for welcome; then the bytes of the two ends.
Neighbour: `sessions.py` says on which connection to open.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable

import trio
from libp2p.stream_muxer.exceptions import MuxedStreamEOF

from golem.net.links import BROKEN
from golem.net.muxed_stream import MuxStream
from golem.net.types import PeerStream, RemoteError, Timing, Unreachable

log = logging.getLogger(__name__)

WELCOME, UNKNOWN, FULL = b"\0", b"\1", b"\2"
MAX_PER_PEER = 128  # inbound streams being served for one peer
StreamHandler = Callable[[str, PeerStream], Awaitable[None]]


class BulkStream(PeerStream):
    """A `PeerStream` on a stream of the multiplexer."""

    def __init__(self, peer: str, stream: MuxStream) -> None:
        self.peer = peer
        self._stream = stream

    async def receive_some(self, n: int = 65536) -> bytes:
        try:
            return await self._stream.read(n)
        except MuxedStreamEOF:
            return b""
        except BROKEN as error:
            raise Unreachable(f"stream with {self.peer} broke: {error}") from error

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        try:
            await self._stream.write(data)
        except BROKEN as error:
            raise Unreachable(f"stream with {self.peer} broke: {error}") from error

    async def send_eof(self) -> None:
        self._stream.finish()
        await trio.lowlevel.checkpoint_if_cancelled()

    async def aclose(self) -> None:
        self._stream.release()
        await trio.lowlevel.checkpoint_if_cancelled()


async def ask_for(peer: str, stream: MuxStream, name: str, timeout_s: float) -> PeerStream:
    """Name the stream that we want. RemoteError when the peer does not serve it, Unreachable when it is silent."""
    raw = name.encode()
    if not 1 <= len(raw) <= 255:
        raise ValueError(f"a stream's name has 1 to 255 bytes, not {len(raw)}")
    welcome = b""
    try:
        with trio.fail_after(timeout_s):
            await stream.write(bytes((len(raw),)) + raw)
            welcome = await stream.read(1)
    except BROKEN as error:
        raise Unreachable(f"no stream with {peer}: {error or 'too slow'}") from error
    finally:
        if welcome != WELCOME:
            stream.abort()
    if welcome == FULL:
        raise Unreachable(f"{peer} serves too many streams of ours already")
    if welcome != WELCOME:
        raise RemoteError(f"unknown stream {name!r}")
    return BulkStream(peer, stream)


class StreamServer:
    """Serves the inbound bulk streams of all peers."""

    def __init__(self, handlers: dict[str, StreamHandler], timing: Timing) -> None:
        self._handlers = handlers
        self._timing = timing
        self._open: Counter[str] = Counter()

    async def serve(self, sender: str, stream: MuxStream) -> None:
        """Until the stream's handler is done. Refuses unknown names, and peers with too many streams."""
        with trio.fail_after(self._timing.open_timeout_s):
            size = (await stream.read(1))[0]
            raw = b""
            while len(raw) < size:
                raw += await stream.read(size - len(raw))
        handler = self._handlers.get(raw.decode(errors="replace"))
        if handler is None or self._open[sender] >= MAX_PER_PEER:
            await stream.write(UNKNOWN if handler is None else FULL)
            return
        await stream.write(WELCOME)
        self._open[sender] += 1
        try:
            await handler(sender, BulkStream(sender, stream))
        except Unreachable as error:
            log.debug("stream %r of %s: %s", raw, sender, error)
        finally:
            self._open[sender] -= 1
            if not self._open[sender]:
                del self._open[sender]
