"""How near a peer is: on this machine, on a network that this machine is on, or neither.

Told by the address of the session with it, which is bound to the peer's key. What listens on loopback or behind the edge of
a network trusts its neighbours, so exe-units ask before they let a requestor's URLs lead there (`golem/exeunit/transfer/web.py`).
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from golem.bus.server import BusPeer
from golem.exeunit.transfer.nearby import is_neighbour, is_own

if TYPE_CHECKING:
    from golem.node.node import Node

MACHINE, NETWORK, FAR = "machine", "network", "far"
TARGET = "unit:nearness"  # by the bus, of exe-units: a node id in, one of the three words out


def nearness(address: str) -> str:
    """Return how near the other end of a session is, by its multiaddr; what cannot be read is far."""
    parts = address.split("/")
    try:
        ip = ipaddress.ip_address(parts[2].partition("%")[0])
    except (IndexError, ValueError):
        return FAR
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if ip.is_loopback or is_own(ip):
        return MACHINE
    return NETWORK if is_neighbour(ip) else FAR


def serve_nearness(node: Node) -> None:
    """Answer exe-units of this node."""

    async def answer(client: BusPeer, payload: bytes) -> bytes:
        wanted = payload.decode("ascii", "replace").lower()
        if wanted == node.node_id:
            return MACHINE.encode()
        found = [one.address for one in node.network.sessions() if one.node_id == wanted]
        return (nearness(found[0]) if found else FAR).encode()

    node.router.serve_local(TARGET, answer)
