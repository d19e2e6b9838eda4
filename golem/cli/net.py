"""`golem net`: peers and sessions."""

from __future__ import annotations

import click

from golem.cli.client import ask_node
from golem.cli.output import done, table, value

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
@click.option("--keep-alive", is_flag=True, hidden=True)
def net_connect(target: str, keep_alive: bool) -> None:
    """Open a session with a node id or a multiaddr."""
    node = ask_node("net_connect", target=target)
    value({"identities": [node], "endpoints": [], "seen": None, "slot": 0, "encryption": "noise"})


@net.command("disconnect")
@click.argument("node_id")
def net_disconnect(node_id: str) -> None:
    """Close the session with a node."""
    done(f"There is no session with {ask_node('net_disconnect', id=node_id)}, and none is opened until somebody asks for it.")


def register(main: click.Group) -> None:
    main.add_command(net)
