"""The peer-to-peer network: requests, bulk streams, gossip and discovery between nodes, over libp2p.

Cheap to import: py-libp2p itself is loaded in a thread by `open_network`, and what only a node needs when it is asked for
(commands and exe-units need the types).
"""

from typing import TYPE_CHECKING, Any

from golem.net.types import (
    LinkBusy,
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

if TYPE_CHECKING:
    from golem.net.network import PeerNetwork, check_network, open_network

__all__ = [
    "LinkBusy",
    "ListenError",
    "NetConfig",
    "NetError",
    "NetRefusal",
    "PeerNetwork",
    "PeerStream",
    "RemoteError",
    "Session",
    "Timing",
    "Unreachable",
    "check_network",
    "open_network",
]


def __getattr__(name: str) -> Any:
    if name not in ("PeerNetwork", "check_network", "open_network"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from golem.net import network

    return getattr(network, name)
