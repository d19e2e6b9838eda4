"""`golem chain`: the embedded dev chain of this machine."""

from __future__ import annotations

import ipaddress
import sqlite3
from contextlib import ExitStack
from pathlib import Path

import click

from golem.cli.client import ask_node, config_of
from golem.cli.output import fail, text, value, wants_json
from golem.config import Config


@click.group()
def chain() -> None:
    """The embedded dev chain.

    It simulates an Ethereum network for the nodes of this machine. No real money is involved.
    """


@chain.command("run")
@click.option("--chain-dir", type=click.Path(path_type=Path), help="Where the chain keeps its blocks.")
@click.option(
    "--host",
    metavar="ADDR",
    default="127.0.0.1",
    show_default=True,
    help="IP address of its JSON-RPC; 0.0.0.0 serves every machine that reaches this one.",
)
@click.option("--port", type=click.IntRange(1, 65535), help="Port of its JSON-RPC. [the last one, or a free one]")
def run(chain_dir: Path | None, host: str, port: int | None) -> None:  # fmt: skip
    """Run the dev chain in the foreground.

    Nodes of the local profile start it by themselves when they need it. Started here with --host, it serves other machines
    too: their nodes use it by `golem run --chain-url http://HOST:PORT`. Whoever reaches it may use its play money.
    """
    from golem.chain.devchain.__main__ import main as serve

    config = config_of(chain_dir=chain_dir)
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise fail(f"--host {host}: expected an IP address of this machine, or 0.0.0.0 for all") from None
    try:
        ended = serve(["--data-dir", str(config.chain_dir), "--host", host, "--port", str(port or 0)])
    except (OSError, sqlite3.Error) as error:
        raise fail(f"the dev chain in {config.chain_dir} cannot run: {error}") from None
    raise SystemExit(ended)


@chain.command("stop")
@click.option("--chain-dir", type=click.Path(path_type=Path))
def stop(chain_dir: Path | None) -> None:
    """Stop the dev chain of this machine; its blocks stay.

    Running nodes that use it start it again within seconds, and what they pay meanwhile waits: stop them first to keep it down.
    """
    import trio

    from golem.chain.devchain import DevChainError, stop_devchain
    from golem.chain.port import DEVCHAIN_LOOK_S

    config = config_of(chain_dir=chain_dir)
    folder = config.chain_dir
    try:
        stopped = trio.run(stop_devchain, folder) if folder.is_dir() else False
    except (DevChainError, OSError) as error:
        raise fail(str(error)) from None
    runs = _user(config)
    if wants_json():
        value({"stopped": stopped, "chainDir": str(folder), "startedAgainBy": runs})
        return
    text(f"The dev chain in {folder} is stopped; its blocks stay." if stopped else f"No dev chain was running in {folder}.")
    if runs:
        text(f"The node on {runs} runs and starts it again within {DEVCHAIN_LOOK_S:g} s; what it pays until then waits. "
             "To keep the chain down stop the node first: golem service shutdown")  # fmt: skip
    elif stopped:
        text("A node of another data directory that uses it and runs starts it again.")


def _user(config: Config) -> str:
    """Return the data directory if a node runs there and keeps this chain, else ""."""
    from golem.config import ConfigError
    from golem.node.data_dir import lock_data_dir

    if not config.data_dir.is_dir():
        return ""
    try:
        with ExitStack() as stack:
            lock_data_dir(config.data_dir, stack)
            return ""
    except ConfigError:
        found = ask_node("status")
    return str(config.data_dir) if Path(found.get("chainDir") or "") == config.chain_dir else ""


def register(main: click.Group) -> None:
    main.add_command(chain)
