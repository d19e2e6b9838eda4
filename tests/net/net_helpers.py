"""What the tests of the network layer share: real nodes on loopback, short intervals, a stock libp2p host to attack with."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import coincurve
import trio
from libp2p import new_host
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.secp256k1 import Secp256k1PrivateKey
from libp2p.crypto.x25519 import create_new_key_pair as new_x25519_pair
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from multiaddr import Multiaddr
from worlds.patience import within

from golem.net import NetConfig, PeerNetwork, Timing, open_network
from golem.net.host import Libp2pHost

FAST = Timing(
    dial_timeout_s=15,  # both ends of a dial share this machine with all that else runs there
    dial_stagger_s=0.1,
    open_timeout_s=15,
    mux_ping_s=0.2,
    mux_dead_s=15,
    keepalive_s=0.3,
    keepalive_timeout_s=15,
    backoff_min_s=0.1,
    backoff_max_s=0.5,
    maintenance_s=0.05,
    gossip_heartbeat_s=0.2,
    restart_min_s=0.05,
)
IMPATIENT = replace(
    FAST, open_timeout_s=4, mux_dead_s=1.0, keepalive_timeout_s=0.7
)  # for tests in which a peer is to fall silent
KEYS = [bytes([number]) * 32 for number in range(1, 20)]


def config(path: Path, **changes: Any) -> NetConfig:
    settings: dict[str, Any] = {"listen": ("127.0.0.1:0",), "mdns": False, "timing": FAST}
    return NetConfig(data_dir=path, **{**settings, **changes})


@asynccontextmanager
async def nodes(path: Path, count: int = 2, **changes: Any) -> AsyncIterator[list[PeerNetwork]]:
    """Some nodes that do not know each other."""
    async with AsyncExitStack() as stack:
        networks = [
            await stack.enter_async_context(open_network(KEYS[number], config(path / str(number), **changes)))
            for number in range(count)
        ]
        for network in networks:
            await network.wait_up()
        yield networks


@asynccontextmanager
async def hosts(count: int = 2, timing: Timing = FAST) -> AsyncIterator[list[Libp2pHost]]:
    """Some bare guarded hosts."""
    async with AsyncExitStack() as stack:
        found = [Libp2pHost(KEYS[number], timing) for number in range(count)]
        for host in found:
            await stack.enter_async_context(host.run([("127.0.0.1", 0)]))
        yield found


async def eventually(check: Callable[[], object], within_s: float = 5) -> None:
    """Wait until something is true."""
    with within(within_s):
        while not check():
            await trio.sleep(0.01)


async def echo(node_id: str, payload: bytes) -> bytes:
    return payload


async def echo_stream(node_id: str, stream: Any) -> None:
    """For a bare host's `serve_streams`."""
    while True:
        await stream.write(await stream.read())


def key_pair(key: bytes) -> KeyPair:
    private = Secp256k1PrivateKey(coincurve.PrivateKey(key))
    return KeyPair(private, private.get_public_key())


@asynccontextmanager
async def stock_host(key: bytes, security: dict[Any, Any] | None = None) -> AsyncIterator[Any]:
    """An unguarded libp2p host, which does whatever it is told to."""
    pair = key_pair(key)
    noise = {NOISE: Noise(pair, noise_privkey=new_x25519_pair().private_key)}
    host: Any = new_host(key_pair=pair, sec_opt=security or noise)
    async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        yield host


async def dial_stock(attacker: Any, host: Libp2pHost) -> Any:
    """Connect a stock host to a guarded one; gives its unguarded Yamux."""
    conn = await attacker.get_network().dial_addr(Multiaddr(host.addresses()[0]), ID.from_base58(host.peer_id))
    return conn.muxed_conn


def frame(kind: int, flags: int, stream_id: int, length: int, payload: bytes = b"") -> bytes:
    """A raw yamux frame."""
    return struct.pack("!BBHII", 0, kind, flags, stream_id, length) + payload


async def is_serving(host: Libp2pHost, other: Libp2pHost) -> bool:
    """Whether a host answers a well-behaved peer (it must serve /echo)."""
    with within(5):
        conn = await other.dial(host.peer_id, host.addresses())
        stream = await other.open_stream(conn, "/echo")
        await stream.write(b"alive")
        answer = await stream.read()
        stream.abort()
        conn.kill("done")
        return answer == b"alive"
