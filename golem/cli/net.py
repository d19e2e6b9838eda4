"""`golem net`: peers and sessions."""

from __future__ import annotations

import click

from golem.cli.client import ask_node
from golem.cli.output import done, table, text, value, wants_json

NO_SESSIONS = "No sessions. Nodes on a LAN find each other; beyond it: golem net connect MULTIADDR"


@click.group()
def net() -> None:
    """Peers and sessions."""


@net.command("status")
def net_status() -> None:
    """Addresses, number of sessions, traffic."""
    value(ask_node("net_status"))


@net.command("sessions")
def net_sessions() -> None:
    """Live sessions with round-trip time and traffic."""
    keys = ("nodeId", "address", "type", "seen", "time", "ping", "in", "out")
    rows = [[session[key] for key in keys] for session in ask_node("net_sessions")]
    note = "" if rows else NO_SESSIONS
    table(["nodeId", "address", "type", "seen", "time", "ping", "in [MiB]", "out [MiB]"], rows, note)


@net.command("ping")
@click.argument("node_id", required=False)
def net_ping(node_id: str | None) -> None:
    """Round-trip time to one node, or to all with a session."""
    found = ask_node("net_ping", id=node_id)
    rows = [[one["nodeId"], "", "p2p", one["ping"] if one["error"] is None else one["error"], None] for one in found]
    table(["nodeId", "alias", "p2p", "ping (tcp)", "ping (udp)"], rows, "" if rows else NO_SESSIONS)


@net.command("connect")
@click.argument("target")
@click.option("--keep-alive", is_flag=True, help="Open it again whenever it breaks, until the node stops.")
def net_connect(target: str, keep_alive: bool) -> None:
    """Open a session with a node id or a multiaddr."""
    node = ask_node("net_connect", target=target, keep=keep_alive)
    value({"identities": [node], "endpoints": [], "seen": None, "slot": 0, "encryption": "noise"})


@net.command("disconnect")
@click.argument("node_id")
def net_disconnect(node_id: str) -> None:
    """Close the session with a node."""
    done(f"There is no session with {ask_node('net_disconnect', id=node_id)}, and none is opened until somebody asks for it.")


@net.command("find")
@click.argument("node_id")
def net_find(node_id: str) -> None:
    """Where a node was met last."""
    value(ask_node("net_find", id=node_id))


@net.command("list-neighbors")
@click.argument("most", type=click.IntRange(0), metavar="NUMBER")
def net_list_neighbors(most: int) -> None:
    """Nodes that a session is up with, the fastest first."""
    found = ask_node("net_neighbors", most=most)
    value(found) if wants_json() else text(*(found or [NO_SESSIONS]))


@net.command("sockets")
def net_sockets() -> None:
    """Connections that sessions stand on."""
    rows = []
    for one in ask_node("net_sessions"):
        _, _, address, _, port = (*str(one["address"]).split("/"), *[""] * 5)[:5]  # /ip4/ADDRESS/tcp/PORT
        rate = [round(one[way] * 1024 / max(one["time"], 1.0), 3) for way in ("out", "in")]
        rows.append(["tcp", None, address, port, "established", *rate])
    columns = ["type", "port", "to addr", "to port", "state", "out [KiB/s]", "in [KiB/s]"]
    table(columns, rows, "" if rows else NO_SESSIONS)


def register(main: click.Group) -> None:
    main.add_command(net)
