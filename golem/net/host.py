"""The one place where py-libp2p 0.8.1 is used: a host that a hostile or dying peer cannot hang or crash.

What is guarded, and why (each has a regression test in tests/net/test_net_guards.py):

- security is Noise only: the stock host also accepts /plaintext/2.0.0, with which anybody is anybody;
- the multiplexer is ours (`yamux.py`);
- an exception out of a stream handler or of pubsub's message path would cancel the whole swarm: both are fenced;
- the slot of an inbound connection is given back when the connection ends, not when the node does;
- the auto-connector, which dials every peer ever heard of, identify, and gossipsub's peer exchange are off;
- its limit of new connections a second counts all strangers as one peer, so that one can lock out all others: it is
  replaced by limits per IP address;
- gossip is limited per neighbour, before any signature is checked;
- addresses are dialled one by one by us (`dial_addr`, which knows no negative cache): the swarm's own dial tries the
  first only, then blocks the peer for a minute;
- listeners do without SO_REUSEPORT, with which a taken port is silently shared with its owner;
- gossip starts its sequence numbers at the clock's nanoseconds, else a restarted node is mute for a while.

All patches but one sit on the instance of one host; they touch private names, so the version is asserted at import.
Neighbours: `gossip.py` runs on `pubsub`, `sessions.py` on dials and streams. Importing this module takes 0.6 s.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import coincurve
import trio
from libp2p import new_host
from libp2p.abc import INotifee
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.secp256k1 import Secp256k1PrivateKey
from libp2p.crypto.x25519 import create_new_key_pair as new_x25519_pair
from libp2p.custom_types import TProtocol
from libp2p.identity.identify_push.identify_push import ID_PUSH as IDENTIFY_PUSH
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.rcmgr.connection_limits import ConnectionLimits
from libp2p.rcmgr.manager import ResourceLimits, new_resource_manager
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from libp2p.stream_muxer.exceptions import MuxedConnError, MuxedStreamError
from libp2p.tools.anyio_service import background_trio_service
from libp2p.transport.tcp import tcp
from multiaddr import Multiaddr

from golem.net.muxed_stream import MuxStream
from golem.net.peerid import node_id_of, pubkey_of, public_key
from golem.net.types import ListenError, Timing, Unreachable
from golem.net.yamux import Mux

PINNED = "0.8.1"
if importlib.metadata.version("libp2p") != PINNED:
    raise ImportError(
        f"golem.net guards libp2p {PINNED} by its private names; installed is {importlib.metadata.version('libp2p')}"
    )

log = logging.getLogger(__name__)


def _reuse_address_only(sock: trio.socket.SocketType) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


tcp._set_reuse_flags = _reuse_address_only  # upstream adds SO_REUSEPORT, for hole punching, which we do not do
if "LIBP2P_DEBUG" not in os.environ:
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)  # any stranger could fill our log with its warnings

MAX_CONNECTIONS = 1000
MAX_CONNECTIONS_PER_PEER = 8  # two of each side when both dial at once, and some still closing
MAX_HANDSHAKES_PER_IP = 32  # at a time; one that stalls is given up after 10 s
MAX_INBOUND_PER_IP = 256
MAX_MESSAGES_PER_S = 200  # gossip that one neighbour may forward to us
StreamHandler = Callable[[str, MuxStream], Awaitable[None]]


class Libp2pHost:
    """A running host. Peers are named by node id; `Mux` is a connection, `MuxStream` a stream."""

    def __init__(self, key: bytes, timing: Timing) -> None:
        self.timing = timing
        self.node_id = node_id_of(public_key(key))
        self.on_connected: Callable[[str, Mux], None] = lambda node_id, conn: None
        self.on_dead: Callable[[Mux], None] = lambda conn: None
        self._shaking: Counter[str] = Counter()  # inbound connections in the handshake, by IP address
        self._inbound_of: Counter[str] = Counter()
        self.inner: Any = _build(key)
        self.swarm: Any = self.inner.get_network()
        self.peer_id = str(self.inner.get_id())
        self._guard()
        router = GossipSub(
            [PROTOCOL_ID_V11],
            degree=6,
            degree_low=4,
            degree_high=12,
            heartbeat_interval=timing.gossip_heartbeat_s,  # type: ignore[arg-type]  # any number serves
            spam_protection_enabled=False,  # 10 messages a second and forwarder: it would punish honest forwarders
        )
        self.pubsub: Any = Pubsub(self.inner, router, seen_ttl=330, max_concurrent_validator_count=64)
        self.pubsub.counter = time.time_ns()
        self._router = router
        self._guard_pubsub()

    @asynccontextmanager
    async def run(self, listen: list[tuple[str, int]]) -> AsyncIterator[None]:
        """Listen on concrete addresses and serve. ListenError when one cannot be bound."""
        addresses = [Multiaddr(f"/{'ip6' if ':' in ip else 'ip4'}/{ip}/tcp/{port}") for ip, port in listen]
        async with self.inner.run(addresses):
            missing = [str(address) for address in addresses if str(address) not in self.swarm.listeners]
            if missing:
                raise ListenError(f"cannot listen on {', '.join(missing)}")
            async with background_trio_service(self.pubsub), background_trio_service(self._router):
                await self.pubsub.wait_until_ready()
                try:
                    yield
                finally:
                    await self._stop()

    async def _stop(self) -> None:
        """Upstream closes its listeners in a cancelled scope, so it leaves them open: do it before."""
        for scope in self.inner._identify_tasks:
            scope.cancel()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            for listener in list(self.swarm.listeners.values()):
                await listener.close()
            for conns in list(self.swarm.connections.values()):
                for conn in list(conns):
                    conn.muxed_conn.kill("the host stops")

    def addresses(self) -> list[str]:
        """Our listen addresses as multiaddrs without the /p2p/ part."""
        found = [str(address) for address in self.inner.get_transport_addrs()]
        return [address.split("/p2p/")[0] for address in found]

    def serve_streams(self, protocol: str, handler: StreamHandler) -> None:
        """Let `handler(node_id, stream)` run for each inbound stream of a protocol; the stream ends with it."""

        async def fenced(net_stream: Any) -> None:
            stream: MuxStream = net_stream.muxed_stream
            try:
                await handler(node_of(net_stream.muxed_conn), stream)
            except (MuxedStreamError, MuxedConnError, trio.TooSlowError):
                stream.abort()
            except Exception:
                # Our own bug, or input nobody foresaw; out of here it would take the whole swarm down.
                log.exception("handler of %s", protocol)
                stream.abort()
            finally:
                stream.release()

        self.inner.set_stream_handler(TProtocol(protocol), fenced)

    async def dial(self, peer_id: str, addresses: list[str]) -> Mux:
        """Connect to a peer, each address with a small head start over the next. Unreachable with what went wrong."""
        if not addresses:
            raise Unreachable(f"no address of {peer_id} is known")
        target = ID.from_base58(peer_id)
        errors: list[str] = []
        won: list[Mux] = []

        async def attempt(address: str, lost: trio.Event) -> None:
            try:
                with trio.fail_after(self.timing.dial_timeout_s):
                    conn = await self.swarm.dial_addr(Multiaddr(address), target)
                won.append(conn.muxed_conn)
                nursery.cancel_scope.cancel()
            except Exception as error:
                # Whatever sits at the address may answer anything; what its bytes raise must not leave the dial.
                errors.append(f"{address}: {_reason(error)}")
            finally:
                lost.set()

        async with trio.open_nursery() as nursery:
            for address in addresses:
                lost = trio.Event()
                nursery.start_soon(attempt, address, lost)
                with trio.move_on_after(self.timing.dial_stagger_s):
                    await lost.wait()
        if not won:
            raise Unreachable(f"{node_id_of(pubkey_of(peer_id))} does not answer ({'; '.join(errors)})"[:600])
        return won[0]

    async def open_stream(self, conn: Mux, protocol: str) -> MuxStream:
        """A stream of one protocol on a connection. Unreachable when the peer does not speak it or is gone."""
        try:
            stream = await conn.open_stream()
        except (MuxedStreamError, MuxedConnError) as error:
            raise Unreachable(str(error)) from error
        negotiated = False
        try:
            with trio.fail_after(self.timing.open_timeout_s):
                await self.inner.multiselect_client.select_one_of([TProtocol(protocol)], MultiselectCommunicator(stream), 3600)
            negotiated = True
        except trio.TooSlowError as error:
            raise Unreachable(f"the peer took too long to answer for {protocol}") from error
        except Exception as error:
            # As in `dial`: the negotiation parses what the peer sends.
            raise Unreachable(f"the peer does not speak {protocol}: {error}") from error
        finally:
            if not negotiated:
                stream.abort()
        return stream

    # guards

    def _guard(self) -> None:
        swarm = self.swarm

        async def no_auto_connect() -> None:
            await trio.lowlevel.checkpoint()

        swarm.auto_connector.maybe_connect = no_auto_connect
        # Identify runs unfenced in system tasks, and its push lets anybody write our peerstore: nothing of ours needs it.
        self.inner._schedule_identify = lambda peer_id, *, reason: None
        self.inner.remove_stream_handler(IDENTIFY_PUSH)
        swarm._do_handle_inbound_connection = self._inbound
        stock_handler = self.inner._swarm_stream_handler

        async def fenced_stream(net_stream: Any) -> None:
            try:
                await stock_handler(net_stream)
            except Exception as error:
                # Raised by what a peer sent (identify, ping, pubsub, negotiation); it must not reach the swarm.
                log.debug("stream of %s: %r", net_stream.muxed_conn.peer_id, error)
                net_stream.muxed_stream.abort()
            finally:
                net_stream.muxed_stream.release()

        swarm.set_stream_handler(fenced_stream)
        muxers = swarm.upgrader.muxer_multistream

        async def new_conn(conn: Any, peer_id: Any) -> Mux:
            await muxers._selector.select(conn, conn.is_initiator, muxers.negotiate_timeout)
            pubkey_of(str(peer_id))  # ValueError for a peer without a secp256k1 key: no node id, no connection
            return Mux(conn, peer_id, self.timing, self._conn_died)

        muxers.new_conn = new_conn
        swarm.register_notifee(_Notifee(self))

    async def _inbound(self, stream: Any, listen_address: Any, failure_event: Any) -> None:
        """As upstream, but over when the connection is: the caller's slot is then free for another peer."""
        raw = RawConnection(stream, False)
        ip = _remote_ip(stream)
        self._shaking[ip] += 1
        self._inbound_of[ip] += 1
        try:
            try:
                if self._shaking[ip] > MAX_HANDSHAKES_PER_IP or self._inbound_of[ip] > MAX_INBOUND_PER_IP:
                    raise ConnectionRefusedError(f"too many connections of {ip}")
                conn = await self.swarm.upgrade_inbound_raw_conn(raw, listen_address)
            finally:
                _subtract(self._shaking, ip)
            await conn.event_closed.wait()
        except Exception as error:
            # Garbage, half handshakes and refused limits end here, in as many types as there are layers.
            log.debug("inbound connection failed: %r", error)
        finally:
            _subtract(self._inbound_of, ip)
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                try:
                    await raw.close()
                except OSError as error:
                    log.debug("closing an inbound socket: %r", error)

    def _conn_died(self, conn: Mux) -> None:
        """Upstream lets a peer's gossip stream die unnoticed when another connection is, or comes, up."""
        stream = self.pubsub.peers.get(conn.peer_id)
        if stream is not None and stream.muxed_conn is conn:
            self.pubsub._handle_dead_peer(conn.peer_id)
        self.on_dead(conn)

    def _guard_pubsub(self) -> None:
        stock_dead, stock_new = self.pubsub._handle_dead_peer, self.pubsub._handle_new_peer
        opening: set[Any] = set()

        async def new_peer(peer_id: Any) -> None:
            # Called for each connection of a peer at once; the loser's sending task would be left behind for ever.
            if peer_id in opening:
                return
            opening.add(peer_id)
            try:
                await stock_new(peer_id)
            except Exception as error:
                # A stream that was reset, a garbled negotiation: upstream retries after this exception type alone.
                raise SwarmException(f"no gossip stream: {error!r}") from error
            finally:
                opening.discard(peer_id)

        self.pubsub._handle_new_peer = new_peer

        def dead_peer(peer_id: Any) -> None:
            # A peer says what it is subscribed to once: while it is connected that must not be forgotten.
            topics = [topic for topic, peers in self.pubsub.peer_topics.items() if peer_id in peers]
            stock_dead(peer_id)
            if self.pubsub._peer_is_connected(peer_id):
                for topic in topics:
                    self.pubsub.peer_topics.setdefault(topic, set()).add(peer_id)
                self.pubsub._peer_subscription_count[peer_id] = len(topics)

        self.pubsub._handle_dead_peer = dead_peer
        stock_push = self.pubsub.push_msg
        me = self.pubsub.my_id
        counts: Counter[Any] = Counter()
        second = 0

        async def fenced_push(forwarder: Any, message: Any) -> None:
            nonlocal second
            if forwarder == me:
                await stock_push(forwarder, message)
                return
            if second != int(trio.current_time()):
                second = int(trio.current_time())
                counts.clear()
            counts[forwarder] += 1
            if counts[forwarder] > MAX_MESSAGES_PER_S:
                return  # before the signature is checked: a flood must stay cheap
            try:
                await stock_push(forwarder, message)
            except Exception as error:
                # A malformed key, origin or protobuf in a message; upstream lets it end the process.
                log.debug("gossip from %s: %r", forwarder, error)

        async def no_exchange(px_peers: Any) -> None:
            await trio.lowlevel.checkpoint()

        self.pubsub.push_msg = fenced_push
        self._router._do_px = no_exchange  # type: ignore[method-assign]  # a prune would tell us whom to dial


class _Notifee(INotifee):
    """Tells the host of new connections; their end is told by the connection itself."""

    def __init__(self, host: Libp2pHost) -> None:
        self._host = host

    async def connected(self, network: Any, conn: Any) -> None:
        self._host.on_connected(node_of(conn.muxed_conn), conn.muxed_conn)
        await trio.lowlevel.checkpoint()

    async def disconnected(self, network: Any, conn: Any) -> None:
        await trio.lowlevel.checkpoint()

    async def opened_stream(self, network: Any, stream: Any) -> None:
        await trio.lowlevel.checkpoint()

    async def closed_stream(self, network: Any, stream: Any) -> None:
        await trio.lowlevel.checkpoint()

    async def listen(self, network: Any, multiaddr: Any) -> None:
        await trio.lowlevel.checkpoint()

    async def listen_close(self, network: Any, multiaddr: Any) -> None:
        await trio.lowlevel.checkpoint()


def _remote_ip(stream: Any) -> str:
    try:
        return str(stream.stream.socket.getpeername()[0])  # upstream's own method knows no IPv6
    except OSError:
        return ""  # gone already


def _reason(error: BaseException) -> str:
    """What was at the bottom of a failed dial, in a few words: py-libp2p wraps it in a tale of its layers."""
    if isinstance(error, trio.TooSlowError):
        return "timed out"
    while True:
        inner = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__
        if inner is None:
            if isinstance(error, OSError) and error.errno:
                return os.strerror(error.errno)
            return str(error) or type(error).__name__
        error = inner


def _subtract(counts: Counter[str], key: str) -> None:
    counts[key] -= 1
    if counts[key] <= 0:
        del counts[key]


def node_of(conn: Any) -> str:
    """The node id of a connection's authenticated peer."""
    return node_id_of(pubkey_of(str(conn.peer_id)))


def _build(key: bytes) -> Any:
    private = Secp256k1PrivateKey(coincurve.PrivateKey(key))
    pair = KeyPair(private, private.get_public_key())
    limits = ConnectionLimits(
        max_established_per_peer=MAX_CONNECTIONS_PER_PEER,
        max_established_inbound=MAX_CONNECTIONS,
        max_established_outbound=MAX_CONNECTIONS,
        max_established_total=2 * MAX_CONNECTIONS,
    )
    manager = new_resource_manager(
        limits=ResourceLimits(max_connections=sys.maxsize),  # this count forgets releases; the others hold
        connection_limits=limits,
        enable_memory_limits=False,
        enable_circuit_breaker=False,
        enable_graceful_degradation=False,
    )
    manager.connection_rate_limiter = None
    config = ConnectionConfig(
        min_connections=0,
        low_watermark=0,
        high_watermark=MAX_CONNECTIONS,
        max_connections=MAX_CONNECTIONS,
        max_connections_per_peer=MAX_CONNECTIONS_PER_PEER,
    )
    host: Any = new_host(
        key_pair=pair,
        sec_opt={NOISE: Noise(pair, noise_privkey=new_x25519_pair().private_key)},
        listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")],
        connection_config=config,
        resource_manager=manager,
        disable_identify_address_discovery=True,
    )
    host.get_network().retry_config = RetryConfig(max_retries=0)
    return host
