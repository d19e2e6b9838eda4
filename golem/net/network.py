"""The facade of the network layer: one `PeerNetwork` a node. It exists at once; the host comes up behind it.

The supervisor imports py-libp2p in a thread (0.6 s, the REST API must not wait for it), runs the host, and restarts it
when it crashes; handlers, topics, the address book and what waits to be published outlive a restart.
Neighbours: `host.py` (transport), `sessions.py` (peers), `gossip.py`, `discovery.py`, `book.py`.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import psutil
import trio

from golem.net.book import Book
from golem.net.peerid import NodeRecord, is_tcp_address, node_id_of, peer_id_of, public_key, sign_record, split_address
from golem.net.types import (
    MAX_GOSSIP_BYTES,
    ListenError,
    NetConfig,
    NetError,
    NetRefusal,
    PeerStream,
    RemoteError,
    Session,
    Unreachable,
)

if TYPE_CHECKING:
    from golem.net.gossip import Gossip, Outbox
    from golem.net.host import Libp2pHost
    from golem.net.sessions import Sessions

log = logging.getLogger(__name__)

RECORD_REFRESH_S = 3600
Handler = Callable[[str, bytes], Awaitable[bytes]]
StreamHandler = Callable[[str, PeerStream], Awaitable[None]]
TopicHandler = Callable[[str, bytes], Awaitable[bool]]


class PeerNetwork:
    """Everything the node says to other nodes goes through here. Make one with `open_network`."""

    def __init__(self, key: bytes, config: NetConfig, listen: list[tuple[str, int]]) -> None:
        self._key = key
        self._config = config
        self._listen = listen
        self.node_id = node_id_of(public_key(key))
        self.peer_id = peer_id_of(public_key(key))
        self._book = Book(config.data_dir / "peers.db", config.network_name)
        self._services: dict[str, Handler] = {}
        self._stream_handlers: dict[str, StreamHandler] = {}
        self._topics: dict[str, TopicHandler] = {}
        self._callbacks: list[Callable[[str, bool], None]] = []
        self._kept: set[str] = set()
        self._outgoing: list[tuple[str, bytes]] = []
        self._outbox: Outbox | None = None
        self._own_record: NodeRecord | None = None
        self._own_record_at = 0.0
        self._up = trio.Event()
        self._sessions: Sessions | None = None
        self._gossip: Gossip | None = None
        self._nursery: trio.Nursery | None = None
        self._moved = False  # the host ended for new addresses of this machine
        for address in config.announce:
            if not is_tcp_address(address):
                raise ValueError(f"an address to announce is /ip4/<address>/tcp/<port>, got {address!r}")
        for multiaddr in config.bootstrap:
            address, peer_id = split_address(multiaddr)
            node_id = self._book.add_hint(peer_id, address)
            if node_id != self.node_id:
                self._kept.add(node_id)

    @property
    def addresses(self) -> list[str]:
        """Where we can be dialled, as multiaddrs with our peer id."""
        return [f"{address}/p2p/{self.peer_id}" for address in self._bare_addresses()]

    @property
    def is_up(self) -> bool:
        """Whether the host runs at this moment."""
        return self._sessions is not None

    async def wait_up(self) -> None:
        """Until the host listens."""
        await self._ready()

    def serve(self, service: str, handler: Callable[[str, bytes], Awaitable[bytes]]) -> None:
        """Answer requests for a service: `handler(sender node id, payload)` gives the reply or raises NetRefusal."""
        self._services[service] = handler
        if self._sessions is not None:
            self._sessions.add_service(service, handler)

    async def request(self, node_id: str, service: str, payload: bytes, timeout_s: float = 10) -> bytes:
        """The peer's reply (at most 4 MiB, as the payload). Unreachable, RemoteError (the peer's refusal), NetError."""
        if _node_id(node_id) == self.node_id:
            return await self._request_self(service, payload, timeout_s)
        deadline = trio.current_time() + timeout_s
        with trio.move_on_after(timeout_s):
            link = await (await self._ready()).link(_node_id(node_id))
            return await link.request(service, payload, max(0.0, deadline - trio.current_time()))
        raise Unreachable(f"{node_id} did not answer within {timeout_s:g} s")

    def serve_stream(self, name: str, handler: Callable[[str, PeerStream], Awaitable[None]]) -> None:
        """Serve inbound bulk streams of a name: `handler(sender node id, stream)`; the stream ends with it."""
        self._stream_handlers[name] = handler

    async def open_stream(self, node_id: str, name: str, timeout_s: float = 10) -> PeerStream:
        """A bulk stream to a peer. Unreachable, or RemoteError when it does not serve the name."""
        if _node_id(node_id) == self.node_id:
            raise Unreachable("a node opens no stream to itself")
        with trio.move_on_after(timeout_s):
            return await (await self._ready()).open_stream(_node_id(node_id), name)
        raise Unreachable(f"{node_id} did not open the stream within {timeout_s:g} s")

    def subscribe(self, topic: str, handler: Callable[[str, bytes], Awaitable[bool]]) -> None:
        """Hear a topic: `handler(origin node id, payload)` runs in a task of its own; False: invalid, do not forward."""
        self._topics[topic] = handler
        if self._gossip is not None and self._nursery is not None:
            self._nursery.start_soon(self._gossip.join, topic)

    def publish(self, topic: str, payload: bytes) -> None:
        """Tell all nodes that hear the topic. Best effort, never waits. NetError above 64 KiB."""
        if len(payload) > MAX_GOSSIP_BYTES:
            raise NetError(f"a gossip payload of {len(payload)} bytes; the limit is {MAX_GOSSIP_BYTES}")
        if self._outbox is not None:
            self._outbox.put(topic, payload)
        elif len(self._outgoing) < 1024:
            self._outgoing.append((topic, payload))

    def origin(self, node_id: str) -> str:
        """The address a peer's session comes by, of IPv6 its /64, which one machine has to itself; "" without a session."""
        return self._sessions.origin(node_id) if self._sessions is not None else ""

    def clocks(self) -> dict[str, str]:
        """Peers that there is no session with, since their clocks and ours differ: how much, in words."""
        return dict(self._sessions.clocks) if self._sessions is not None else {}

    def sessions(self) -> list[Session]:
        """The sessions that are up."""
        return self._sessions.list() if self._sessions is not None else []

    async def ping(self, node_id: str, timeout_s: float = 5) -> float:
        """Round trip in ms. Unreachable."""
        with trio.move_on_after(timeout_s):
            return await (await self._ready()).ping(_node_id(node_id), timeout_s)
        raise Unreachable(f"{node_id} did not answer within {timeout_s:g} s")

    async def connect(self, target: str, timeout_s: float = 10) -> str:
        """Meet a peer by multiaddr (/ip4/../tcp/../p2p/..) or node id; gives its node id. Unreachable, ValueError."""
        if target.startswith("/"):
            address, peer_id = split_address(target)
            node_id = self._book.add_hint(peer_id, address)
        else:
            node_id = _node_id(target)
        if node_id == self.node_id:
            raise ValueError("this is our own node id")
        with trio.move_on_after(timeout_s):
            await (await self._ready()).link(node_id, at_once=True)
            return node_id
        raise Unreachable(f"{node_id} did not answer within {timeout_s:g} s")

    async def disconnect(self, node_id: str) -> None:
        """End all connections with a peer; it is not dialled again until asked for."""
        self._kept.discard(_node_id(node_id))
        if self._sessions is not None:
            await self._sessions.disconnect(_node_id(node_id))

    def keep(self, node_id: str, wanted: bool = True) -> None:
        """Stay connected with a peer: reconnect with back-off whenever the session breaks."""
        (self._kept.add if wanted else self._kept.discard)(_node_id(node_id))
        if self._sessions is not None:
            self._sessions.keep(_node_id(node_id), wanted)

    def on_peer(self, callback: Callable[[str, bool], None]) -> None:
        """`callback(node id, up)` runs in the Trio thread whenever a session comes up or goes down."""
        self._callbacks.append(callback)

    def known_peers(self) -> list[str]:
        """Node ids in the address book, the last met first."""
        return [entry.node_id for entry in self._book.recent() if entry.node_id != self.node_id]

    def known_addresses(self, node_id: str) -> list[str]:
        """Multiaddrs at which a peer may be met, the one that answered last first; empty for a peer never heard of."""
        return self._book.addresses(node_id)

    # supervision

    async def supervise(self, begin: trio.Event | None = None) -> None:
        """Run the host until cancelled; restart it with back-off when it crashes."""
        timing = self._config.timing
        if begin is not None:
            await begin.wait()
        await trio.to_thread.run_sync(_import_libp2p, abandon_on_cancel=True)
        delay_s = timing.restart_min_s
        while True:
            started_at = trio.current_time()
            self._moved = False
            try:
                await self._run_host()
            except Exception:
                # py-libp2p must be treated as crashable: whatever it was, the node lives on and the host is rebuilt.
                log.exception("the network host crashed; restarting in %.1f s", delay_s)
            else:
                if self._moved:
                    self._listen = _listen_again(self._listen)
                    self._own_record = None
                    continue
                log.error("the network host stopped by itself; restarting in %.1f s", delay_s)
            if trio.current_time() - started_at > 60:
                delay_s = timing.restart_min_s
            await trio.sleep(delay_s)
            delay_s = min(2 * delay_s, timing.restart_max_s)

    async def _run_host(self) -> None:
        from golem.net.discovery import Mdns
        from golem.net.gossip import Gossip, Outbox
        from golem.net.host import Libp2pHost
        from golem.net.sessions import Sessions

        config = self._config
        host: Libp2pHost = Libp2pHost(self._key, config.timing)
        if self._outbox is None:
            self._outbox = Outbox()
            for topic, payload in self._outgoing:
                self._outbox.put(topic, payload)
            self._outgoing.clear()
        sessions = Sessions(host, self._book, config, self._services, self._stream_handlers, self._record, self._tell)
        gossip = Gossip(host, config.network_name, self._outbox, self._topics, self._record, self._book.add_record)

        def found(peer_id: str, addresses: list[str]) -> None:
            for address in addresses:
                sessions.discovered(self._book.add_hint(peer_id, address))

        try:
            async with host.run(self._listen), trio.open_nursery() as nursery:
                nursery.start_soon(sessions.run)
                nursery.start_soon(gossip.run)
                await trio.lowlevel.checkpoint()
                for node_id in self._kept:
                    sessions.keep(node_id)
                if config.mdns:
                    mdns = Mdns(config.network_name, self.peer_id, self._bare_addresses(), found)
                    nursery.start_soon(mdns.run)
                if not config.listen:
                    nursery.start_soon(self._watch_interfaces, nursery.cancel_scope)
                self._sessions, self._gossip, self._nursery = sessions, gossip, nursery
                self._up.set()
                log.info("node %s listens on %s", self.node_id, ", ".join(self.addresses))
        finally:
            self._sessions = self._gossip = self._nursery = None
            self._up = trio.Event()

    async def _watch_interfaces(self, host: trio.CancelScope) -> None:
        """End the host when the machine has got an address (another network, a cable plugged in late) that stays.

        The next host listens there too, and its mDNS speaks there; links go on when their peers are met again.
        """
        before: set[str] = set()
        while True:
            await trio.sleep(self._config.timing.interfaces_s)
            new = set(_interface_ips()) - {ip for ip, _ in self._listen}
            if new & before:
                log.info("this machine has got the address %s", ", ".join(sorted(new)))
                self._moved = True
                host.cancel()
            before = new

    async def _request_self(self, service: str, payload: bytes, timeout_s: float) -> bytes:
        """A request to our own node id takes no wire, and ends in the same ways."""
        handler = self._services.get(service)
        if handler is None:
            raise RemoteError(f"unknown service {service!r}")
        try:
            with trio.move_on_after(timeout_s):
                return await handler(self.node_id, payload)
        except NetRefusal as refusal:
            raise RemoteError(str(refusal)) from refusal
        except Exception as error:
            # As for a request of a peer: our own bug in a handler, of which the caller is told no more.
            log.exception("service %s failed on a request of our own", service)
            raise RemoteError("internal error") from error
        raise Unreachable(f"{service} did not answer within {timeout_s:g} s")

    async def _ready(self) -> Sessions:
        while self._sessions is None:
            await self._up.wait()
        return self._sessions

    def _tell(self, node_id: str, up: bool) -> None:
        for callback in self._callbacks:
            try:
                callback(node_id, up)
            except Exception:
                # A listener's bug; it must not break the session that it is told of.
                log.exception("listener of peers")

    def _bare_addresses(self) -> list[str]:
        listening = [f"/{'ip6' if ':' in ip else 'ip4'}/{ip}/tcp/{port}" for ip, port in self._listen]
        return [*self._config.announce, *listening]

    def _record(self) -> NodeRecord:
        """Our own signed record, renewed each hour."""
        age_s = (
            time.time() - self._own_record_at
        )  # below 0: the clock was set back, and peers would refuse what is from the future
        if self._own_record is None or not 0 <= age_s <= RECORD_REFRESH_S:
            self._own_record_at = time.time()
            self._own_record = sign_record(self._key, self._config.network_name, self._bare_addresses())
            self._book.add_record(self._own_record)
        return self._own_record

    def close(self) -> None:
        """Close the address book."""
        self._book.close()


@asynccontextmanager
async def open_network(key: bytes, config: NetConfig, begin: trio.Event | None = None) -> AsyncIterator[PeerNetwork]:
    """A network node with a 32-byte private key, which comes up once `begin` is set, if given. ListenError when a listen
    address is taken or not ours."""
    if len(key) != 32:
        raise ValueError(f"a private key has 32 bytes, not {len(key)}")
    network = PeerNetwork(key, config, _listen_addresses(config.listen))
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(network.supervise, begin)
            yield network
            nursery.cancel_scope.cancel()
    finally:
        network.close()


def check_network(config: NetConfig) -> None:
    """Raise what `open_network` would raise for these settings: asked before a node makes its key."""
    for multiaddr in config.bootstrap:
        split_address(multiaddr)
    _listen_addresses(config.listen)


def _import_libp2p() -> None:
    import golem.net.discovery
    import golem.net.gossip
    import golem.net.sessions  # noqa: F401


def _node_id(text: str) -> str:
    node_id = text.lower()
    if len(node_id) != 42 or not node_id.startswith("0x") or not all(c in "0123456789abcdef" for c in node_id[2:]):
        raise ValueError(f"not a node id: {text[:80]!r}")
    return node_id


def _listen_addresses(listen: tuple[str, ...]) -> list[tuple[str, int]]:
    """Concrete (ip, port) pairs; each was free for us alone a moment ago. ListenError, ValueError."""
    wanted: list[tuple[str, int]] = []
    for item in listen:
        host, colon, port = item.rpartition(":")
        host = host.strip("[]")
        if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535 or not host:
            raise ValueError(f'a listen address is "host:port", got {item!r}')
        if host in ("0.0.0.0", "::", "*"):
            wanted += [(ip, int(port)) for ip in _interface_ips()]
        else:
            wanted.append((host, int(port)))
    if not listen:
        wanted = [(ip, 0) for ip in _interface_ips()]
    free: list[tuple[str, int]] = []
    for host, number in dict.fromkeys(wanted):
        free.append(_free_address(host, number))
    return free


def _interface_ips() -> list[str]:
    """Every concrete IPv4 address of this machine, loopback last."""
    found = {
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET
    }
    return sorted(found, key=lambda ip: (ip.startswith("127."), ip))


def _listen_again(listened: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The addresses the machine has now; those it had keep their ports where these are still free."""
    ports, found = dict(listened), []
    for ip in _interface_ips():
        for port in dict.fromkeys((ports.get(ip, 0), 0)):
            try:
                found.append(_free_address(ip, port))
                break
            except ListenError as error:  # taken meanwhile, or the address went as it came
                log.info("%s", error)
    return found or listened


def _free_address(host: str, port: int) -> tuple[str, int]:
    """Make sure that an address is ours and its port free: py-libp2p would share a taken port with its owner."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            raise ListenError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
        name = probe.getsockname()
    return str(name[0]), int(name[1])
