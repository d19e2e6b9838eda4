"""A stream of a connection that many share, by the rules of /yamux/1.0.0: windows, half-closing, resets.

Calls never touch the socket: they move bytes between the stream's buffer and the one outgoing queue of its `MuxLine`, without an
await in between, so they may be cancelled at any time. Neighbour: `yamux.py` is that line.
"""

from __future__ import annotations

import struct
from abc import abstractmethod
from types import TracebackType

import trio
from libp2p.abc import IMuxedConn, IMuxedStream
from libp2p.stream_muxer.exceptions import MuxedStreamClosed, MuxedStreamEOF, MuxedStreamReset

from golem.net.types import Timing

HEADER = struct.Struct("!BBHII")  # version, type, flags, stream id, length
DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
INITIAL_WINDOW = 256 << 10  # by the specification
FULL_WINDOW = 1 << 20  # a stream that is being read may buffer so much
MAX_PACKET = 65535 - 16  # plain bytes in one Noise packet
MAX_FRAME = MAX_PACKET // 2 - HEADER.size  # so that two fill a packet
OUT_LIMIT = 256 << 10  # outgoing bytes that data may fill


class MuxFault(Exception):
    """The connection must end; the text says why."""


class MuxLine(IMuxedConn):
    """What a stream needs of its connection."""

    timing: Timing
    out_bytes: int  # that wait for the socket
    room: trio.lowlevel.ParkingLot  # of who waits until there are fewer

    @abstractmethod
    def queue(self, frame: bytes) -> None:
        """Send a frame when its turn comes."""

    @abstractmethod
    def control(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        """Queue a frame without content."""

    @abstractmethod
    def grow(self, size: int) -> int:
        """Grant up to so many bytes to a receive window, of what the connection has left for that."""

    @abstractmethod
    def forget(self, stream: MuxStream) -> None:
        """Drop a stream that has ended."""

    @abstractmethod
    def forget_if_done(self, stream: MuxStream) -> None:
        """Drop a stream if both sides have said that they write no more."""

    @abstractmethod
    def get_remote_address(self) -> tuple[str, int] | None:
        """(host, port) of the other end."""


class MuxStream(IMuxedStream):
    """One stream. All methods may be cancelled at any time; a cancelled `write` may have sent a part of its data."""

    def __init__(self, conn: MuxLine, stream_id: int, outbound: bool) -> None:
        self.muxed_conn = conn
        self.stream_id = stream_id
        self.outbound = outbound
        self.bytes_in = self.bytes_out = 0
        self.conn = conn
        self._buffer = bytearray()
        self._send_window = INITIAL_WINDOW
        self._recv_window = INITIAL_WINDOW  # what the peer may still send
        self.growth = 0
        self._consumed = 0
        self._eof = self._reset = self._fin_sent = self._discard = False
        self._readable = trio.lowlevel.ParkingLot()
        self._writable = trio.lowlevel.ParkingLot()

    # reading

    async def read(self, n: int | None = -1) -> bytes:
        """Up to n bytes (all there are for None or -1). MuxedStreamEOF or MuxedStreamReset at the end."""
        while not self._buffer:
            if self._eof or self._discard:
                raise MuxedStreamEOF("stream is at its end")
            if self._reset:
                raise MuxedStreamReset("stream was reset")
            await self._readable.park()
        await trio.lowlevel.checkpoint_if_cancelled()
        return self._take(len(self._buffer) if n is None or n < 0 else min(n, len(self._buffer)))

    def _take(self, size: int) -> bytes:
        data = bytes(memoryview(self._buffer)[:size])
        del self._buffer[:size]
        self._consumed += size
        if not self.growth and not self._eof and not self._reset:
            self.growth = self.conn.grow(FULL_WINDOW - INITIAL_WINDOW)
            self._consumed += self.growth
        if self._consumed >= (INITIAL_WINDOW + self.growth) // 2 and not self._eof and not self._reset:
            self._recv_window += self._consumed
            self.conn.control(WINDOW_UPDATE, 0, self.stream_id, self._consumed)
            self._consumed = 0
        return data

    # writing

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """All of the data, waiting while the peer does not read. MuxedStreamReset, MuxedStreamClosed."""
        view = memoryview(data)
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            self._check_writable()
            view = view[self._push(view) :]
            if not view:
                return
            if self._send_window <= 0:
                with trio.move_on_after(self.conn.timing.stall_s) as scope:
                    await self._writable.park()
                if scope.cancelled_caught and self._send_window <= 0:
                    self.abort()
                    raise MuxedStreamReset("the peer does not read")
            else:
                await self.conn.room.park()

    def write_nowait(self, data: bytes) -> bool:
        """Queue all of the data now, or nothing: False when it does not fit at once."""
        self._check_writable()
        if len(data) > self._send_window or self.conn.out_bytes + len(data) > OUT_LIMIT or self._writable:
            return False
        self._push(memoryview(data))
        return True

    def _check_writable(self) -> None:
        if self._reset:
            raise MuxedStreamReset("stream was reset")
        if self._fin_sent:
            raise MuxedStreamClosed("stream is closed for writing")

    def _push(self, view: memoryview) -> int:
        sent = 0
        while sent < len(view) and self._send_window > 0 and self.conn.out_bytes < OUT_LIMIT:
            size = min(len(view) - sent, self._send_window, MAX_FRAME)
            self._send_window -= size
            self.conn.queue(HEADER.pack(0, DATA, 0, self.stream_id, size) + view[sent : sent + size])
            sent += size
        self.bytes_out += sent
        return sent

    # ending

    def finish(self) -> None:
        """Say that we write no more; what was written still arrives."""
        if not self._fin_sent and not self._reset:
            self._fin_sent = True
            self.conn.control(WINDOW_UPDATE, FIN, self.stream_id, 0)
            self.conn.forget_if_done(self)
            self._wake()

    def release(self) -> None:
        """We neither write nor read any more: finish, drop what is unread, and reset should the peer send on."""
        self.finish()
        if not self._discard and not self._reset:
            self._discard = True
            if self._buffer:
                self.abort()

    def abort(self) -> None:
        """End both directions at once."""
        if not self._reset:
            if not (self._eof and self._fin_sent):
                self.conn.control(WINDOW_UPDATE, RST, self.stream_id, 0)
            self.on_reset()
            self._buffer.clear()
            self.conn.forget(self)

    async def close(self) -> None:
        """As `finish`: half-close, in the manner of libp2p."""
        self.finish()
        await trio.lowlevel.checkpoint_if_cancelled()

    async def reset(self) -> None:
        """As `abort`."""
        self.abort()
        await trio.lowlevel.checkpoint_if_cancelled()

    @property
    def is_closed(self) -> bool:
        """Whether nothing can be sent or received any more."""
        return self._reset or (self._eof and self._fin_sent and not self._buffer)

    @property
    def is_done(self) -> bool:
        """Whether both sides have said that they write no more."""
        return self._eof and self._fin_sent

    def set_deadline(self, ttl: int) -> None:
        """Nothing: deadlines belong to whoever waits for an answer."""

    def get_remote_address(self) -> tuple[str, int] | None:
        """(host, port) of the other end."""
        return self.conn.get_remote_address()

    async def __aenter__(self) -> MuxStream:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.finish()

    # what the connection tells us

    def on_data(self, payload: memoryview) -> None:
        if len(payload) > self._recv_window:
            raise MuxFault("the peer overran its receive window")
        self._recv_window -= len(payload)
        self.bytes_in += len(payload)
        if self._discard:
            self.abort()
        elif not self._eof and not self._reset:
            self._buffer += payload
            self._readable.unpark_all()

    def on_credit(self, size: int) -> None:
        self._send_window += size
        if self._send_window > 1 << 31:
            raise MuxFault("the peer granted an absurd window")
        self._writable.unpark_all()

    def on_fin(self) -> None:
        self._eof = True
        self._readable.unpark_all()
        self.conn.forget_if_done(self)

    def on_reset(self) -> None:
        self._reset = True  # what had arrived can still be read
        self._wake()

    def _wake(self) -> None:
        self._readable.unpark_all()
        self._writable.unpark_all()
