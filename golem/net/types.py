"""What the rest of the node sees of the network: configuration, errors, session facts. No libp2p in here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

MAX_REQUEST_BYTES = 4 << 20  # one request or one reply on a link
MAX_GOSSIP_BYTES = 64 << 10  # one published payload; the transport silently drops messages near 1 MiB


class NetError(Exception):
    """Any expected failure of the network."""


class Unreachable(NetError):
    """No route to the peer, it is dead, or it did not answer in time."""


class LinkBusy(Unreachable):
    """We or the peer have too many requests in flight on the link; try again later."""


class RemoteError(NetError):
    """The peer received the request and refused it; the text is the peer's."""


class NetRefusal(NetError):
    """Raised by a service handler to refuse a request; its text reaches the caller as `RemoteError`."""


class ListenError(NetError):
    """A listen address cannot be used (port taken, address not ours)."""


@dataclass(frozen=True)
class Timing:
    """Every interval of the network layer, in seconds; tests shorten them."""

    dial_timeout_s: float = 5.0  # one address
    dial_stagger_s: float = 0.25  # head start of an address over the next one
    open_timeout_s: float = 5.0  # opening a stream, the hello
    mux_ping_s: float = 5.0  # a silent connection is pinged this often
    mux_dead_s: float = 20.0  # a connection silent for so long is dead
    keepalive_s: float = 15.0  # ping of a session, measures the round trip
    keepalive_timeout_s: float = 10.0
    backoff_min_s: float = 1.0  # reconnect
    backoff_max_s: float = 60.0
    maintenance_s: float = 1.0  # how often reconnects are considered
    idle_after_s: float = 600.0  # a peer not used for so long is not dialled again by itself
    stall_s: float = 300.0  # a stream whose reader takes nothing for so long is reset
    handler_timeout_s: float = 120.0  # a service handler that takes longer is cancelled
    gossip_heartbeat_s: float = 1.0
    interfaces_s: float = 2.0  # how often new addresses of this machine are looked for
    restart_min_s: float = 0.5  # host crashed
    restart_max_s: float = 30.0


@dataclass(frozen=True)
class NetConfig:
    """How a node takes part in the network."""

    data_dir: Path  # the address book is <data_dir>/peers.db
    listen: tuple[str, ...] = ()  # "host:port" with concrete hosts; empty: every interface address, free ports
    announce: tuple[str, ...] = ()  # more addresses to tell others, /ip4/../tcp/..: those of a port-forwarding router
    bootstrap: tuple[str, ...] = ()  # multiaddrs /ip4/../tcp/../p2p/..
    mdns: bool = True
    network_name: str = "golem"  # in protocol ids and topics: two networks never mix
    target_sessions: int = 8  # below this many sessions known peers are dialled unasked
    max_sessions: int = 256
    timing: Timing = field(default_factory=Timing)


@dataclass(frozen=True)
class Session:
    """A live session with a peer, as `golem net` and the metrics show it."""

    node_id: str
    address: str
    type: str
    seen: datetime
    duration_s: float
    rtt_ms: float | None
    bytes_in: int
    bytes_out: int


class PeerStream(ABC):
    """A byte stream to a peer with back-pressure. Calls may be cancelled; a cancelled `send_all` may have sent a part."""

    peer: str  # node id

    @abstractmethod
    async def receive_some(self, n: int = 65536) -> bytes:
        """Up to n bytes as soon as there are any; b"" at the end. Unreachable when the stream broke."""

    @abstractmethod
    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all, waiting while the peer does not read. Unreachable when the stream broke or is closed."""

    @abstractmethod
    async def send_eof(self) -> None:
        """Say that nothing more will be sent; receiving goes on."""

    @abstractmethod
    async def aclose(self) -> None:
        """End both directions; what was sent still arrives."""

    async def __aenter__(self) -> PeerStream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()
