"""The command line, `golem` (alias `yagna`). Commands talk to the running node over its bus; see `golem/commands.py`."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from golem.cli.client import ask_node, config_of
from golem.cli.output import console, fail, nothing, say, table, text, value, wants_json
from golem.config import VERSION

if TYPE_CHECKING:
    from golem.node import Node

HELP = {"help_option_names": ["-h", "--help"]}


@click.group(context_settings=HELP)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.option("-d", "--data-dir", "--datadir", "datadir", metavar="DIR", help="Where the node keeps its state. [GOLEM_DATA_DIR]")
@click.option("-g", "--gsb-url", hidden=True, help="Accepted for scripts; the bus is a socket in the data directory.")
@click.option("--accept-terms", is_flag=True, hidden=True)
@click.version_option(VERSION, prog_name="golem")
def main(**_: Any) -> None:
    """A node of the Golem network: buy and sell computing power.

    `golem run` starts the node; the other commands talk to it.
    """


# -- the node itself
def _run_options(function: Any) -> Any:
    for option in reversed((
        click.option("--api-url", metavar="URL", help="Where to serve REST. [YAGNA_API_URL; http://127.0.0.1:7465, or a free port]"),
        click.option("--profile", type=click.Choice(["local", "testnet", "mainnet"]), help="Which chains: the embedded one, test networks, main networks. [local]"),
        click.option("--listen", multiple=True, metavar="HOST:PORT", help="Where to listen for peers. [every interface, a free port]"),
        click.option("--bootstrap", multiple=True, metavar="MULTIADDR", help="A peer to begin with (beyond the LAN)."),
        click.option("--no-mdns", is_flag=True, help="Do not look for peers on the LAN."),
        click.option("--network-name", metavar="NAME", help="Nodes of different network names never meet. [golem]"),
        click.option("--chain-dir", type=click.Path(path_type=Path), help="Where the embedded chain of this machine lives."),
        click.option("--password-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Password of the node's key."),
        click.option("--plain-key", is_flag=True, help="Keep the node's key unencrypted (for automation)."),
        click.option("--api-allow-origin", "allow_origins", multiple=True, metavar="ORIGIN", help="CORS origin that browsers may use."),
        click.option("--debug", is_flag=True, help="Log much."),
        click.option("--max-rest-timeout", hidden=True), click.option("--log-dir", hidden=True),
        click.option("--disable-metrics-push", is_flag=True, hidden=True),
    )):  # fmt: skip
        function = option(function)
    return function


def run_command(debug: bool, no_mdns: bool, **flags: Any) -> None:
    """Run a node until it is told to stop (Ctrl-C, SIGTERM, `golem service shutdown`)."""
    import trio

    from golem.config import ConfigError

    for ignored in ("max_rest_timeout", "log_dir", "disable_metrics_push"):
        flags.pop(ignored, None)
    config = config_of(**flags, **({"mdns": False} if no_mdns else {}))
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    )
    for noisy in ("hypercorn", "httpx", "httpcore", "zeroconf", "asyncio", "web3", "urllib3", "libp2p", "trio", "root"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from actors.kernel.journal import JournalError
    from golem.identity import IdentityError
    from golem.net import NetError
    from golem.node import run_node

    ask_password = _ask_password if sys.stdin.isatty() else None
    try:
        trio.run(run_node, config, ask_password, lambda node: _say_ready(node, config.api_port, config.api_port_fixed))
    except BaseExceptionGroup as group:
        known, rest = group.split((ConfigError, IdentityError, JournalError, NetError, OSError))
        if known is None or rest is not None:
            raise
        raise fail("; ".join(str(error) for error in _flat(known))) from None
    except (ConfigError, IdentityError, JournalError, NetError, OSError) as error:
        raise fail(str(error)) from None
    except KeyboardInterrupt:
        sys.exit(130)


def _flat(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    return [leaf for error in group.exceptions for leaf in (_flat(error) if isinstance(error, BaseExceptionGroup) else [error])]


def _ask_password(prompt: str, twice: bool) -> str:
    return str(click.prompt(prompt, hide_input=True, confirmation_prompt=twice, err=True))


def _say_ready(node: Node, wanted_port: int, fixed: bool) -> None:
    port = int(node.api_url.rpartition(":")[2])
    if not fixed and port != wanted_port:
        say(f"Port {wanted_port} is taken: this node serves REST on port {port}.")
    say(f"Node {node.node_id} is ready.")
    say(f"  REST     {node.api_url}")
    say(f"  data     {node.config.data_dir}")
    simulated = " (payments run on the embedded dev chain; no real money)" if node.config.profile == "local" else ""
    say(f"  profile  {node.config.profile}{simulated}")
    if not node.app_keys.all():
        say("  next     golem app-key create requestor")


main.command("run", context_settings=HELP)(_run_options(run_command))


@main.group()
def service() -> None:
    """The daemon, by the reference's names."""


service.command("run", context_settings=HELP)(_run_options(run_command))


@service.command("shutdown")
@click.option("--gracefully", is_flag=True, hidden=True)
def service_shutdown(gracefully: bool) -> None:
    """Stop the running node."""
    ask_node("shutdown")
    nothing()


@main.command()
def status() -> None:
    """What the node is doing, and what is stuck."""
    found = ask_node("status")
    links = found.pop("links")
    value(found | {"links": links} if wants_json() else found)
    if links and not wants_json():
        table(["actor", "waits for", "why"], links)


# -- identity and app-keys
@main.group("id")
def identity() -> None:
    """The node's identity."""


@identity.command("show")
@click.argument("node_id", required=False)
def id_show(node_id: str | None) -> None:
    """Show the identity."""
    found = ask_node("id_show", id=node_id)
    encrypted = found.pop("encrypted")
    value({"Ok": found} if wants_json() else found | {"keystore": "encrypted" if encrypted else "not encrypted"})


@identity.command("list")
def id_list() -> None:
    """List the identities of the node (it has one)."""
    one = ask_node("id_show")
    columns = ["default", "locked", "delete in progress", "alias", "address"]
    table(columns, [["X", "", "", one["alias"], one["nodeId"]]])


@main.group("app-key")
def app_key() -> None:
    """Keys that let agents use this node."""


@app_key.command("create")
@click.argument("name")
@click.option("--id", "node_id")
@click.option("--allow-origins", multiple=True)
def app_key_create(name: str, node_id: str | None, allow_origins: tuple[str, ...]) -> None:
    """Make an app-key and print it."""
    key = ask_node("app_key_create", name=name, id=node_id, allow_origins=list(allow_origins))["key"]
    text(f'"{key}"' if wants_json() else key)


@app_key.command("list")
@click.option("--id", "node_id", hidden=True)
@click.option("-p", "--page", type=int, default=1, hidden=True)
@click.option("--per-page", type=int, default=1000, hidden=True)
def app_key_list(node_id: str | None, page: int, per_page: int) -> None:
    """List the app-keys."""
    keys = ask_node("app_key_list")[(page - 1) * per_page : page * per_page]
    rows = [[k["name"], k["key"], k["identity"], k["role"], k["createdDate"]] for k in keys if node_id in (None, k["identity"])]
    table(["name", "key", "id", "role", "created"], rows)


@app_key.command("show")
@click.argument("name")
@click.option("--id", "node_id", hidden=True)
def app_key_show(name: str, node_id: str | None) -> None:
    """Show an app-key."""
    value(ask_node("app_key_show", name=name))


@app_key.command("drop")
@click.argument("name")
@click.option("--id", "node_id", hidden=True)
def app_key_drop(name: str, node_id: str | None) -> None:
    """Delete an app-key."""
    ask_node("app_key_drop", name=name)
    nothing()


# -- network
@main.group()
def net() -> None:
    """Peers and sessions."""


@net.command("status")
def net_status() -> None:
    """Addresses, number of sessions, traffic."""
    value(ask_node("net_status"))


@net.command("sessions")
def net_sessions() -> None:
    """Live sessions with round-trip time and traffic."""
    rows = [[s["nodeId"], s["address"], s["type"], s["seen"], s["time"], s["ping"], s["in"], s["out"]] for s in ask_node("net_sessions")]
    note = "" if rows else "No sessions. On a LAN, peers find each other by mDNS; beyond it, `golem net connect <multiaddr>`."
    table(["nodeId", "address", "type", "seen", "time", "ping", "in [MiB]", "out [MiB]"], rows, note)


@net.command("ping")
@click.argument("node_id", required=False)
def net_ping(node_id: str | None) -> None:
    """Round-trip time to one node, or to all with a session."""
    rows = [[r["nodeId"], "", "p2p", r["ping"] if r["error"] is None else r["error"], None] for r in ask_node("net_ping", id=node_id)]
    table(["nodeId", "alias", "p2p", "ping (tcp)", "ping (udp)"], rows)


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
    ask_node("net_disconnect", id=node_id)
    nothing()


def _register() -> None:
    """Commands that live in modules of their own."""
    from golem.cli import chain, market, payment, provider, trace

    for module in (payment, market, provider, chain, trace):
        module.register(main)


@main.group()
def version() -> None:
    """The version of this program."""


@version.command("show")
def version_show() -> None:
    """Show the version."""
    value({"current": {"version": VERSION, "name": "golem-node", "seen": True}, "pending": None})


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def complete(shell: str) -> None:
    """Print the completion script of a shell: eval "$(golem complete bash)"."""
    from click.shell_completion import get_completion_class

    name = Path(sys.argv[0]).name
    found = get_completion_class(shell)
    assert found is not None
    text(found(main, {}, name, f"_{name.upper().replace('-', '_')}_COMPLETE").source())


_register()

__all__ = ["console", "main"]

if __name__ == "__main__":
    main(prog_name=os.path.basename(sys.argv[0]))
