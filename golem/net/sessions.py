"""Sessions: who is connected, on which connections, how good; dialling, greeting, keepalive, reconnecting.

A session is a working link of ours to a peer of our network. It begins when the peer has answered our hello on an
authenticated connection, and ends when that link breaks. Both ends may dial at once: each keeps its link on the
connection it likes, and the other connection serves bulk streams. One `Sessions` lives as long as one host.
Neighbours: `host.py` below, `links.py` and `streams.py` beside, `network.py` above.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgpack
import trio

from golem.base.printing import quoted
from golem.net.book import Book
from golem.net.host import Libp2pHost
from golem.net.links import Handler, Link, serve_link
from golem.net.muxed_stream import MuxLine, MuxStream
from golem.net.peerid import MAX_RECORD_BYTES, ClockDiffers, NodeRecord, read_record
from golem.net.streams import StreamHandler, StreamServer, ask_for
from golem.net.types import NetConfig, NetError, NetRefusal, PeerStream, Session, Unreachable
from golem.net.yamux import Mux

log = logging.getLogger(__name__)

HELLO, PEERS = "net/hello", "net/peers"
MAX_EXCHANGED = 64
MAX_CLOCKS = 64  # peers whose clocks differ are remembered
CLOCK_SAID_S = 60.0  # a line of the log at most each minute: anybody may come with any clock
MAX_REMEMBERED = 4096  # peers without a session of which dial times are remembered
UNASKED_AT_ONCE = 2  # dials to peers of the book in one round: its addresses are hearsay, we must not scan for others
UNASKED_PATIENCE = 60  # how much longer the back-off may grow for peers that nobody wants
FAR_PAST = float("-inf")


@dataclass
class Peer:
    """What we know of a peer while the host runs. Times are Trio's clock unless said otherwise."""

    node_id: str
    conns: list[Mux] = field(default_factory=list)
    link: Link | None = None
    link_conn: Mux | None = None
    served_conns: set[MuxLine] = field(default_factory=set)  # the peer's links to us run there
    attempt: trio.Event | None = None  # being dialled or greeted
    error: str = ""
    keep: bool = False
    used_at: float = FAR_PAST
    failed_at: float = FAR_PAST
    next_try_at: float = FAR_PAST
    backoff_s: float = 0.0
    dialled: dict[Mux, str] = field(default_factory=dict)
    up_at: float = 0.0
    seen: datetime = datetime.min
    rtt_ms: float | None = None
    past_in: int = 0  # bytes of this session's connections that ended
    past_out: int = 0
    bulk_failed_at: float = FAR_PAST
    bulk_lock: trio.Lock = field(default_factory=trio.Lock)

    @property
    def is_busy(self) -> bool:
        """Whether there is a session, or one is being made."""
        return self.link is not None or self.attempt is not None


class Sessions:
    """All peers of one running host. `run` must be running for anything to happen."""

    def __init__(
        self,
        host: Libp2pHost,
        book: Book,
        config: NetConfig,
        services: dict[str, Handler],
        stream_handlers: dict[str, StreamHandler],
        record: Callable[[], NodeRecord],
        on_peer: Callable[[str, bool], None],
    ) -> None:
        self._host = host
        self._book = book
        self._config = config
        self._timing = config.timing
        self._services = {**services, HELLO: self._on_hello, PEERS: self._on_peers}
        self._peers: dict[str, Peer] = {}
        self._record = record
        self._on_peer = on_peer
        self._link_protocol = f"/{config.network_name}/link/1"
        self._bulk_protocol = f"/{config.network_name}/bulk/1"
        self._bulk = StreamServer(stream_handlers, config.timing)
        self._nursery: trio.Nursery | None = None
        self._stopped = False
        self.clocks: dict[str, str] = {}  # by node: how a peer's clock differs from ours
        self._clock_said_at = FAR_PAST
        host.on_connected = self._connected
        host.on_dead = self._dead
        host.serve_streams(self._link_protocol, self._serve_link)
        host.serve_streams(self._bulk_protocol, self._bulk.serve)

    def add_service(self, service: str, handler: Handler) -> None:
        """Serve one more service, on links that are up as well."""
        self._services[service] = handler

    async def run(self) -> None:
        """Dial, greet and watch until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                while True:
                    self._maintain()
                    await trio.sleep(self._timing.maintenance_s)
        finally:
            self._nursery, self._stopped = None, True
            for peer in self._peers.values():
                for conn in list(peer.conns):
                    conn.kill("the host stops")
                self._down(peer)

    # for the facade

    async def link(self, node_id: str, at_once: bool = False) -> Link:
        """The link to a peer, dialling it if need be; not `at_once` when that failed a moment ago. Unreachable."""
        peer = self._peer(node_id)
        peer.used_at = trio.current_time()
        if not peer.is_busy and not peer.conns and not at_once:
            await trio.sleep_until(peer.failed_at + self._timing.backoff_min_s)
        tried = False
        while peer.link is None and not tried:
            tried = not peer.is_busy or not at_once  # an attempt under way may not know an address that we were just told
            if not peer.is_busy:
                self._try(peer)
            if peer.attempt is not None:
                await peer.attempt.wait()
        if peer.link is None:
            raise Unreachable(self.clocks.get(node_id) or peer.error or f"{node_id} is not reachable")
        return peer.link

    async def open_stream(self, node_id: str, name: str) -> PeerStream:
        """A bulk stream, on a connection without links if one can be had. Unreachable, RemoteError."""
        await self.link(node_id)
        peer = self._peer(node_id)
        async with peer.bulk_lock:
            conn = self._bulk_conn(peer)
            if conn is None and trio.current_time() - peer.bulk_failed_at > self._timing.backoff_max_s:
                try:
                    conn = await self._dial(peer)
                except Unreachable:
                    peer.bulk_failed_at = trio.current_time()  # the peer dialled us and we cannot dial it
            conn = conn or peer.link_conn
        if conn is None:
            raise Unreachable(f"{node_id} went away")
        stream = await self._host.open_stream(conn, self._bulk_protocol)
        return await ask_for(node_id, stream, name, self._timing.open_timeout_s)

    async def ping(self, node_id: str, timeout_s: float) -> float:
        """Round trip in ms, over the link. Unreachable."""
        rtt_ms = await (await self.link(node_id)).ping(timeout_s)
        self._peer(node_id).rtt_ms = rtt_ms
        return rtt_ms

    async def disconnect(self, node_id: str) -> None:
        """End all connections with a peer and forget that we wanted it."""
        peer = self._peers.get(node_id)
        if peer is None:
            return
        peer.keep, peer.used_at = False, FAR_PAST
        peer.next_try_at = trio.current_time() + self._timing.backoff_max_s
        async with trio.open_nursery() as nursery:
            for conn in list(peer.conns):
                nursery.start_soon(conn.close)

    def keep(self, node_id: str, wanted: bool = True) -> None:
        """Stay connected with a peer, whether used or not."""
        self._peer(node_id).keep = wanted

    def discovered(self, node_id: str) -> None:
        """A peer was found nearby: meet it, unless we have plenty."""
        peer = self._peer(node_id)
        idle = not peer.is_busy and trio.current_time() >= peer.next_try_at
        if idle and self.count() < self._config.max_sessions // 4:
            self._try(peer)

    def count(self) -> int:
        """Sessions that are up."""
        return sum(peer.link is not None for peer in self._peers.values())

    def list(self) -> list[Session]:
        """Every session that is up."""
        now = trio.current_time()
        return [
            Session(
                node_id=peer.node_id,
                address=_address(peer.link_conn),
                type="p2p",
                seen=peer.seen,
                duration_s=now - peer.up_at,
                rtt_ms=peer.rtt_ms,
                bytes_in=peer.past_in + sum(conn.bytes_in for conn in peer.conns),
                bytes_out=peer.past_out + sum(conn.bytes_out for conn in peer.conns),
            )
            for peer in self._peers.values()
            if peer.link is not None
        ]

    def origin(self, node_id: str) -> str:
        """The address that a peer's session comes by, of IPv6 its /64; "" without one."""
        peer = self._peers.get(node_id)
        conns = [] if peer is None else [peer.link_conn, *peer.conns]
        return next((_origin(conn) for conn in conns if conn is not None), "")

    # connections come and go

    def _peer(self, node_id: str) -> Peer:
        peer = self._peers.get(node_id)
        if peer is None:
            if len(self._peers) >= MAX_REMEMBERED:
                for other in list(self._peers.values()):
                    if not (other.conns or other.keep or other.is_busy):
                        del self._peers[other.node_id]
            peer = self._peers[node_id] = Peer(node_id)
        return peer

    def _connected(self, node_id: str, conn: Mux) -> None:
        if self._stopped or node_id == self._host.node_id or len(self._peers) >= 2 * MAX_REMEMBERED:
            conn.kill("not wanted")
            return
        peer = self._peer(node_id)
        if not peer.conns and self.count() >= self._config.max_sessions and not peer.keep:
            conn.kill("too many sessions")
            return
        if conn.death is None:
            peer.conns.append(conn)
            if not peer.is_busy and self._nursery is not None:
                self._try(peer)

    def _dead(self, conn: Mux) -> None:
        for peer in self._peers.values():
            if conn in peer.conns:
                peer.conns.remove(conn)
                peer.served_conns.discard(conn)
                peer.dialled.pop(conn, None)
                peer.past_in += conn.bytes_in
                peer.past_out += conn.bytes_out
                if conn is peer.link_conn:
                    self._down(peer)
                    if peer.conns and peer.attempt is None:
                        self._try(peer)
                return

    def _down(self, peer: Peer) -> None:
        if peer.link is None:
            return
        peer.link.broken = True
        peer.link = peer.link_conn = None
        peer.rtt_ms = None
        peer.next_try_at = trio.current_time() + (0 if peer.conns else self._timing.backoff_min_s)
        log.info("session with %s is down", peer.node_id)
        self._on_peer(peer.node_id, False)

    # dialling and greeting

    def _maintain(self) -> None:
        now = trio.current_time()
        for peer in list(self._peers.values()):
            if (peer.conns or self._wants(peer)) and not peer.is_busy and now >= peer.next_try_at:
                self._try(peer)
        missing = self._config.target_sessions - self.count()
        missing -= sum(peer.attempt is not None for peer in self._peers.values())
        if missing <= 0:
            return
        missing = min(missing, UNASKED_AT_ONCE)
        for entry in self._book.recent():
            if missing <= 0:
                break
            known = self._peers.get(entry.node_id)
            if entry.node_id == self._host.node_id or (known is not None and (known.is_busy or now < known.next_try_at)):
                continue
            self._try(self._peer(entry.node_id))
            missing -= 1

    def _wants(self, peer: Peer) -> bool:
        return peer.keep or trio.current_time() - peer.used_at < self._timing.idle_after_s

    def _try(self, peer: Peer) -> None:
        if self._nursery is None or self._stopped:
            peer.error = "the network is not up"
            return
        peer.attempt = trio.Event()
        self._nursery.start_soon(self._establish, peer)

    async def _establish(self, peer: Peer) -> None:
        """Greet the peer on the connections there are, else on a new one."""
        peer.error = ""
        try:
            for conn in [*peer.conns, None]:
                if conn is None:
                    conn = await self._dial(peer)
                if await self._greet(peer, conn):
                    peer.backoff_s = 0.0
                    return
                conn.kill("no link")
        except Unreachable as error:
            peer.error = str(error)
        finally:
            if peer.link is None:
                peer.failed_at = trio.current_time()
                longest_s = self._timing.backoff_max_s * (1 if self._wants(peer) else UNASKED_PATIENCE)
                peer.backoff_s = min(max(self._timing.backoff_min_s, 2 * peer.backoff_s), longest_s)
                peer.next_try_at = peer.failed_at + peer.backoff_s
                log.debug("%s is not reachable: %s", peer.node_id, peer.error)
            attempt, peer.attempt = peer.attempt, None
            if attempt is not None:
                attempt.set()

    async def _dial(self, peer: Peer) -> Mux:
        entry = self._book.find(peer.node_id)
        if entry is None:
            raise Unreachable(f"no address of {peer.node_id} is known")
        conn = await self._host.dial(entry.peer_id, self._book.addresses(peer.node_id))
        address = _address(conn)
        if conn.death is not None:
            raise Unreachable(f"{peer.node_id} hung up: {conn.death}")
        if conn not in peer.conns:
            peer.conns.append(conn)
        peer.dialled[conn] = address
        return conn

    async def _greet(self, peer: Peer, conn: Mux) -> bool:
        """Open our link on a connection and say hello; True when the session is up."""
        assert self._nursery is not None
        link: Link | None = None
        try:
            stream = await self._host.open_stream(conn, self._link_protocol)
            link = Link(peer.node_id, stream)
            self._nursery.start_soon(self._watch, peer, link, conn)
            start = trio.current_time()
            reply = await link.request(HELLO, self._record().raw, self._timing.open_timeout_s)
            record = read_record(reply, self._config.network_name)
            if record.node_id != peer.node_id:
                raise ValueError("the peer answered with the record of somebody else")
        except (NetError, ValueError) as error:
            peer.error = str(error)
            self._note_clock(error, peer.node_id)
            if isinstance(error, ClockDiffers):
                await trio.sleep(self._timing.open_timeout_s / 2)  # its own hello may be under way: it shall hear why
            if link is not None:
                link.stream.abort()
            return False
        self.clocks.pop(peer.node_id, None)
        if link.broken or conn.death is not None:
            peer.error = f"{peer.node_id} hung up"
            return False
        self._book.add_record(record)
        self._book.mark_met(peer.node_id, record.peer_id, peer.dialled.get(conn))
        peer.link, peer.link_conn = link, conn
        peer.up_at, peer.seen = trio.current_time(), datetime.now(UTC)
        peer.rtt_ms = (peer.up_at - start) * 1000
        peer.past_in = peer.past_out = 0
        log.info("session with %s is up", peer.node_id)
        self._nursery.start_soon(self._exchange, link)
        self._on_peer(peer.node_id, True)
        return True

    async def _watch(self, peer: Peer, link: Link, conn: Mux) -> None:
        async def keep_alive() -> None:
            while True:
                await trio.sleep(self._timing.keepalive_s)
                try:
                    peer.rtt_ms = await link.ping(self._timing.keepalive_timeout_s)
                except Unreachable as error:
                    conn.kill(str(error))
                    return
                peer.seen = datetime.now(UTC)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_alive)
            await link.run()
            nursery.cancel_scope.cancel()
        if peer.link is link:
            self._down(peer)

    def _bulk_conn(self, peer: Peer) -> Mux | None:
        for conn in peer.conns:
            if conn is not peer.link_conn and conn not in peer.served_conns and not conn.is_closed:
                return conn
        return None

    # what peers ask

    async def _serve_link(self, sender: str, stream: MuxStream) -> None:
        peer = self._peer(sender)
        conn = stream.conn
        peer.served_conns.add(conn)
        try:
            await serve_link(sender, stream, self._services, self._timing)
        finally:
            peer.served_conns.discard(conn)

    async def _on_hello(self, sender: str, payload: bytes) -> bytes:
        record = self._read(sender, payload)
        if record.node_id != sender:
            raise NetRefusal("the record of somebody else")
        self._book.add_record(record)
        await trio.lowlevel.checkpoint()
        return self._record().raw

    async def _on_peers(self, sender: str, payload: bytes) -> bytes:
        entries = [entry for entry in self._book.recent() if entry.record is not None and entry.node_id != sender]
        await trio.lowlevel.checkpoint()
        raw: bytes = msgpack.packb([entry.record.raw for entry in entries[:MAX_EXCHANGED] if entry.record])
        return raw

    def _read(self, sender: str, payload: bytes) -> NodeRecord:
        try:
            return read_record(payload, self._config.network_name)
        except ValueError as error:
            self._note_clock(error, sender)
            raise NetRefusal(str(error)) from error

    def _note_clock(self, error: Exception, peer: str) -> None:
        """Tell people of a clock that keeps nodes apart: nothing else would say why they do not meet."""
        if isinstance(error, ClockDiffers):
            words = str(error)
        elif f"the clock of {self._host.node_id} is" in str(error):
            words = f"it says: {str(error)[:300]}"
        else:
            return
        known = self.clocks.pop(peer, None)
        self.clocks[peer] = words
        while len(self.clocks) > MAX_CLOCKS:
            del self.clocks[next(iter(self.clocks))]
        if known is None and trio.current_time() >= self._clock_said_at + CLOCK_SAID_S:
            self._clock_said_at = trio.current_time()
            log.warning("there is no session with %s: %s", peer, quoted(words))

    async def _exchange(self, link: Link) -> None:
        """Learn the peers of a peer."""
        try:
            reply = await link.request(PEERS, b"", self._timing.open_timeout_s)
            records = msgpack.unpackb(reply, max_array_len=MAX_EXCHANGED, max_bin_len=MAX_RECORD_BYTES)
            for raw in records if isinstance(records, list) else ():
                record = read_record(raw, self._config.network_name)
                if record.node_id != self._host.node_id:
                    self._book.add_record(record)
        except (NetError, ValueError, msgpack.UnpackException) as error:
            log.debug("peer exchange with %s: %s", link.peer, error)


def _origin(conn: Mux) -> str:
    remote = conn.get_remote_address()
    if remote is None:
        return ""
    address = ipaddress.ip_address(remote[0].partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))


def _address(conn: Mux | None) -> str:
    remote = conn.get_remote_address() if conn is not None else None
    if remote is None:
        return ""
    return f"/{'ip6' if ':' in remote[0] else 'ip4'}/{remote[0]}/tcp/{remote[1]}"
