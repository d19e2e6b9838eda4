"""The stream multiplexer of our connections: /yamux/1.0.0 over a Noise session, written for py-libp2p 0.8.1's swarm.

It takes the place of py-libp2p's own Yamux, in which a cancel scope around any stream call can desynchronise Noise and
kill the connection, the receive window is not enforced, a slow reader is reset after 5 s, a frozen peer is never
noticed and the 257th open stream blocks for ever. Here

- application calls never touch the socket: they move bytes between a stream's buffer and one outgoing queue, without
  an await in between, so they may be cancelled at any time;
- one task reads (many Noise packets a system call), one writes (many frames a packet), one watches for silence;
- the reading task never waits for the writing one, so two nodes with full sockets cannot deadlock;
- every buffer is bounded, and a peer that oversteps a bound loses this connection and nothing else.

Neighbours: `muxed_stream.py` is one stream; `host.py` plugs it in; `links.py` and `streams.py` use its streams.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import trio
from libp2p.connection_types import ConnectionType
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamError

from golem.net.muxed_stream import (
    ACK,
    DATA,
    FIN,
    FULL_WINDOW,
    GO_AWAY,
    HEADER,
    MAX_PACKET,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    MuxFault,
    MuxLine,
    MuxStream,
)
from golem.net.types import Timing

log = logging.getLogger(__name__)

GROWTH_BUDGET = 32 << 20  # of all windows of a connection above the initial ones
MAX_STREAMS = 256  # open at a time, each direction
OUT_FLOOD = 1 << 20  # outgoing bytes at which a peer is flooding us with questions and not reading answers
WRITE_STALL_S = 30.0  # a socket that takes not one batch in so long is dead


class Mux(MuxLine):
    """A connection to one peer. The swarm runs `start` in a task of its own; it never raises an Exception."""

    def __init__(self, secured_conn: Any, peer_id: Any, timing: Timing, on_dead: Callable[[Mux], None] | None = None) -> None:
        self.secured_conn = secured_conn
        self.peer_id = peer_id
        self.timing = timing
        self.on_dead = on_dead
        self.bytes_in = self.bytes_out = 0
        self.heard_at = trio.current_time()
        self.death: str | None = None
        self.streams: dict[int, MuxStream] = {}
        self.event_started = trio.Event()
        self.event_shutting_down = trio.Event()
        self.event_closed = trio.Event()
        self.negotiated_muxer_protocol = "/yamux/1.0.0"
        self._initiator = bool(secured_conn.is_initiator)
        self._raw = secured_conn.conn.read_writer.read_write_closer
        self._remote = _remote_of(self._raw)
        self._noise = secured_conn.conn.noise_state
        self._next_id = 1 if self._initiator else 2
        self._out: deque[bytes] = deque()
        self.out_bytes = 0
        self.room = trio.lowlevel.ParkingLot()
        self._pending = trio.lowlevel.ParkingLot()
        self._flushed = trio.lowlevel.ParkingLot()
        self._growth_left = GROWTH_BUDGET
        self._rtt = 0.0
        self._ping_sent_at: float | None = None
        self._accepted, self._incoming = trio.open_memory_channel[MuxStream](MAX_STREAMS)
        self._scope = trio.CancelScope()

    # what the swarm and the host call

    async def start(self) -> None:
        """Run the connection until it ends."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write_loop)
                    nursery.start_soon(self._watch_loop)
                    self.event_started.set()
                    await self._read_loop()
        except Exception as error:
            # Whatever a peer's bytes or a dying socket do must end this connection only: an escape ends the swarm.
            log.debug("connection to %s: %r", self.peer_id, error)
            self._die(repr(error))
        finally:
            self._die("cancelled")
            self.event_started.set()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                try:
                    await self._raw.close()
                except (OSError, trio.BrokenResourceError) as error:
                    log.debug("closing the socket of %s: %r", self.peer_id, error)
            self.event_closed.set()

    async def close(self) -> None:
        """Say goodbye, give queued frames half a second to leave, and end."""
        if not self.event_shutting_down.is_set():
            self.control(GO_AWAY, 0, 0, 0)
            self.event_shutting_down.set()
            if self.event_started.is_set():
                with trio.move_on_after(0.5):
                    while self._out and self.death is None:
                        await self._flushed.park()
        self.kill("closed")
        if not self.event_started.is_set():
            await self._raw.close()
            self.event_closed.set()
        with trio.move_on_after(1):
            await self.event_closed.wait()

    def kill(self, reason: str) -> None:
        """End at once, without a word to the peer."""
        self._die(reason)
        self._scope.cancel()

    async def open_stream(self) -> MuxStream:
        """A new stream. MuxedStreamError when 256 are open already, MuxedConnUnavailable when the connection ended."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.event_shutting_down.is_set():
            raise MuxedConnUnavailable(f"connection ended: {self.death}")
        if sum(stream.outbound for stream in self.streams.values()) >= MAX_STREAMS:
            raise MuxedStreamError(f"{MAX_STREAMS} streams are open on this connection")
        stream = MuxStream(self, self._next_id, outbound=True)
        self._next_id += 2
        self.streams[stream.stream_id] = stream
        self.control(WINDOW_UPDATE, SYN, stream.stream_id, 0)
        return stream

    async def accept_stream(self) -> MuxStream:
        """The next stream that the peer opens. MuxedConnUnavailable when the connection ended."""
        try:
            return await self._incoming.receive()
        except trio.EndOfChannel:
            raise MuxedConnUnavailable(f"connection ended: {self.death}") from None

    @property
    def is_initiator(self) -> bool:
        """Whether we dialled."""
        return self._initiator

    @property
    def is_established(self) -> bool:
        """Whether streams can be opened."""
        return self.event_started.is_set() and not self.event_shutting_down.is_set()

    @property
    def is_closed(self) -> bool:
        """Whether the connection ended."""
        return self.event_shutting_down.is_set()

    def rtt(self) -> float:
        """Round trip of the last transport ping in seconds; 0 before the first."""
        return self._rtt

    def get_remote_address(self) -> tuple[str, int] | None:
        """(host, port) of the other end."""
        return self._remote

    def get_transport_addresses(self) -> list[Any]:
        """The multiaddr of the other end."""
        addresses: list[Any] = self._raw.get_transport_addresses()
        return addresses

    def get_connection_type(self) -> ConnectionType:
        """Always direct: there are no relays here."""
        return ConnectionType.DIRECT

    # outgoing

    def queue(self, frame: bytes) -> None:
        self._out.append(frame)
        self.out_bytes += len(frame)
        self._pending.unpark_all()

    def control(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        if not self.event_shutting_down.is_set():
            if self.out_bytes > OUT_FLOOD:
                self.kill("the peer floods us and does not read")
            self.queue(HEADER.pack(0, kind, flags, stream_id, length))

    async def _write_loop(self) -> None:
        while True:
            while not self._out:
                self._flushed.unpark_all()
                await self._pending.park()
            packets = bytearray()
            while self._out and len(packets) < 2 * MAX_PACKET:
                plain = bytearray()
                while self._out and len(plain) + len(self._out[0]) <= MAX_PACKET:
                    plain += self._out.popleft()
                self.out_bytes -= len(plain)
                cipher = self._noise.encrypt(bytes(plain))
                packets += len(cipher).to_bytes(2, "big") + cipher
            self.room.unpark_all()
            with trio.fail_after(WRITE_STALL_S):
                await self._raw.write(packets)
            self.bytes_out += len(packets)

    # incoming

    async def _read_loop(self) -> None:
        plain = bytearray(self.secured_conn._drain(None))  # came in the same packet as the end of the negotiation
        cipher = bytearray()
        while True:
            self._consume(plain)
            data = await self._raw.read(128 << 10)
            if not data:
                raise MuxFault("closed by the peer")
            self.heard_at = trio.current_time()
            self.bytes_in += len(data)
            cipher += data
            start = 0
            while len(cipher) - start >= 2:
                end = start + 2 + int.from_bytes(cipher[start : start + 2], "big")
                if end > len(cipher):
                    break
                plain += self._noise.decrypt(bytes(cipher[start + 2 : end]))
                start = end
            del cipher[:start]

    def _consume(self, plain: bytearray) -> None:
        position = 0
        with memoryview(plain) as view:
            while len(view) - position >= HEADER.size:
                version, kind, flags, stream_id, length = HEADER.unpack_from(view, position)
                if version != 0 or kind > GO_AWAY:
                    raise MuxFault("not a yamux frame")
                body = length if kind == DATA else 0
                if body > FULL_WINDOW:
                    raise MuxFault("an oversized frame")
                end = position + HEADER.size + body
                if end > len(view):
                    break
                with view[position + HEADER.size : end] as payload:
                    self._on_frame(kind, flags, stream_id, length, payload)
                position = end
        del plain[:position]

    def _on_frame(self, kind: int, flags: int, stream_id: int, length: int, payload: memoryview) -> None:
        if kind == PING:
            if flags & SYN:
                self.control(PING, ACK, 0, length)
            elif self._ping_sent_at is not None:
                self._rtt = trio.current_time() - self._ping_sent_at
                self._ping_sent_at = None
            return
        if kind == GO_AWAY:
            raise MuxFault(f"the peer said goodbye ({length})")
        if flags & SYN:
            self._on_syn(stream_id)
        stream = self.streams.get(stream_id)
        if stream is None:
            return  # of a stream that we ended: on its way before the peer knew
        if kind == DATA:
            if payload:
                stream.on_data(payload)
        elif length:
            stream.on_credit(length)
        if flags & RST:
            stream.on_reset()
            self.forget(stream)
        elif flags & FIN:
            stream.on_fin()

    def _on_syn(self, stream_id: int) -> None:
        if stream_id == 0 or (stream_id % 2 == 1) == self._initiator or stream_id in self.streams:
            raise MuxFault("a stream with an impossible number")
        stream = MuxStream(self, stream_id, outbound=False)
        inbound = sum(not other.outbound for other in self.streams.values())
        try:
            if inbound >= MAX_STREAMS:
                raise trio.WouldBlock
            self._accepted.send_nowait(stream)
        except trio.WouldBlock:
            self.control(WINDOW_UPDATE, RST, stream_id, 0)
            return
        self.streams[stream_id] = stream
        self.control(WINDOW_UPDATE, ACK, stream_id, 0)

    # life and death

    async def _watch_loop(self) -> None:
        while True:
            asleep = trio.current_time()
            await trio.sleep(self.timing.mux_ping_s)
            now = trio.current_time()
            # A process that was held itself (suspended, starved) has not read what came meanwhile: not the peer's silence.
            self.heard_at = min(now, self.heard_at + now - asleep - self.timing.mux_ping_s)
            silent_s = now - self.heard_at
            if silent_s >= self.timing.mux_dead_s:
                raise MuxFault(f"silent for {silent_s:.0f} s")
            if self._ping_sent_at is None or silent_s >= self.timing.mux_ping_s:
                self._ping_sent_at = trio.current_time()
                self.control(PING, SYN, 0, 0)

    def _die(self, reason: str) -> None:
        if self.death is not None:
            return
        self.death = reason
        self.event_shutting_down.set()
        for stream in list(self.streams.values()):
            stream.on_reset()
        self.streams.clear()
        self._out.clear()
        self.out_bytes = 0
        self._accepted.close()
        self.room.unpark_all()
        self._flushed.unpark_all()
        if self.on_dead is not None:
            self.on_dead(self)

    def grow(self, size: int) -> int:
        granted = min(size, self._growth_left)
        self._growth_left -= granted
        return granted

    def forget_if_done(self, stream: MuxStream) -> None:
        if stream.is_done:
            self.forget(stream)

    def forget(self, stream: MuxStream) -> None:
        if self.streams.pop(stream.stream_id, None) is not None:
            self._growth_left += stream.growth
            stream.growth = 0


def _remote_of(raw: Any) -> tuple[str, int] | None:
    try:
        name = raw.stream.stream.socket.getpeername()
    except OSError:
        return None  # gone already
    return str(name[0]), int(name[1])
