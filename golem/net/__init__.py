"""The peer-to-peer network: requests, bulk streams, gossip and discovery between nodes, over libp2p.

Cheap to import: py-libp2p itself is loaded in a thread by `open_network`.
"""

from golem.net.network import Network, check_network, open_network
from golem.net.types import (
    Busy,
    ListenError,
    NetConfig,
    NetError,
    NetRefusal,
    PeerStream,
    RemoteError,
    Session,
    Timing,
    Unreachable,
)

__all__ = [
    "Busy",
    "ListenError",
    "NetConfig",
    "NetError",
    "NetRefusal",
    "Network",
    "PeerStream",
    "RemoteError",
    "Session",
    "Timing",
    "Unreachable",
    "check_network",
    "open_network",
]
