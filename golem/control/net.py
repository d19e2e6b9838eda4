"""The node's side of `golem net`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from golem.control.command import command
from golem.net import NetError
from protocol.types import node_id, timestamp_text

if TYPE_CHECKING:
    from golem.node.node import Node


def _wanted(node: Node, given: str) -> str:
    """Return the node id that a person means. Raises `LookupError`, `ValueError`."""
    from golem.control.market import peers, whole_id

    return node_id(whole_id(given, peers(node)))


# -- network
@command
async def net_status(node: Node, args: dict[str, Any]) -> Any:
    """Addresses, sessions and traffic."""
    sessions = node.network.sessions()
    mib_in, mib_out = (round(sum(one) / 2**20, 3) for one in zip(*((s.bytes_in, s.bytes_out) for s in sessions), strict=True)) \
        if sessions else (0.0, 0.0)  # fmt: skip
    uptime_s = max(time.time() - node.started_at, 1.0)
    addresses = node.network.addresses
    return {
        "nodeId": node.node_id, "listenAddress": addresses[0] if addresses else None, "publicAddress": None,
        "addresses": addresses, "sessions": len(sessions),
        "bandwidth": {"outKiBps": 0.0, "outAvgKiBps": round(mib_out * 1024 / uptime_s, 3), "outMib": mib_out,
                      "inKiBps": 0.0, "inAvgKiBps": round(mib_in * 1024 / uptime_s, 3), "inMib": mib_in},
    }  # fmt: skip


@command
async def net_sessions(node: Node, args: dict[str, Any]) -> Any:
    """Live sessions."""
    return [
        {"nodeId": one.node_id, "address": one.address, "type": one.type, "seen": timestamp_text(one.seen.timestamp()),
         "time": round(one.duration_s, 1), "ping": None if one.rtt_ms is None else round(one.rtt_ms, 3),
         "in": round(one.bytes_in / 2**20, 3), "out": round(one.bytes_out / 2**20, 3)}
        for one in node.network.sessions()
    ]  # fmt: skip


@command
async def net_ping(node: Node, args: dict[str, Any]) -> Any:
    """Round-trip times, of one peer or of all with a session."""
    targets = [_wanted(node, args["id"])] if args.get("id") else [one.node_id for one in node.network.sessions()]
    rows = []
    for target in targets:
        try:
            rows.append({"nodeId": target, "ping": round(await node.network.ping(target), 3), "error": None})
        except NetError as error:
            rows.append({"nodeId": target, "ping": None, "error": str(error)})
    return rows


@command
async def net_connect(node: Node, args: dict[str, Any]) -> Any:
    """Open a session with a node id or multiaddr."""
    from golem.control.market import peers, whole_id

    peer = await node.network.connect(whole_id(args["target"], peers(node)))
    if args.get("keep"):
        node.network.keep(peer)
    return peer


@command
async def net_disconnect(node: Node, args: dict[str, Any]) -> Any:
    """Close the session with a node."""
    wanted = _wanted(node, args["id"])
    await node.network.disconnect(wanted)
    return wanted


@command
async def net_find(node: Node, args: dict[str, Any]) -> Any:
    """Where a node was met last, by the address book; nothing is dialled."""
    wanted = _wanted(node, args["id"])
    known = node.network.known_addresses(wanted)
    if not known:
        raise LookupError(f"{wanted} was never met and nobody told of it (golem net connect {wanted} asks peers for it)")
    seen = next((one.seen for one in node.network.sessions() if one.node_id == wanted), None)
    return {"identities": [wanted], "endpoints": known, "seen": None if seen is None else timestamp_text(seen.timestamp()),
            "slot": 0, "encryption": "noise"}  # fmt: skip


@command
async def net_neighbors(node: Node, args: dict[str, Any]) -> Any:
    """Nodes that a session is up with, the fastest first."""
    known = sorted(node.network.sessions(), key=lambda one: (one.rtt_ms is None, one.rtt_ms, one.node_id))
    return [one.node_id for one in known][: max(0, int(args["most"]))]
