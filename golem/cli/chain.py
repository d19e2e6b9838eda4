"""`golem chain`: the embedded dev chain of this machine."""

from __future__ import annotations

import ipaddress
import sqlite3
from pathlib import Path

import click

from golem.cli.client import config_of
from golem.cli.output import fail


@click.group()
def chain() -> None:
    """The embedded dev chain.

    It simulates an Ethereum network for the nodes of this machine. No real money is involved.
    """


@chain.command("run")
@click.option("--chain-dir", type=click.Path(path_type=Path), help="Where the chain keeps its blocks.")
@click.option("--host", metavar="ADDR", default="127.0.0.1", show_default=True,
              help="IP address of its JSON-RPC; 0.0.0.0 serves every machine that reaches this one.")
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
    """Stop the dev chain of this machine; its blocks stay."""
    import trio

    from golem.chain.devchain import DevChainError, stop_devchain

    folder = config_of(chain_dir=chain_dir).chain_dir
    try:
        stopped = trio.run(stop_devchain, folder) if folder.is_dir() else False
    except (DevChainError, OSError) as error:
        raise fail(str(error)) from None
    click.echo("The dev chain is stopped." if stopped else "No dev chain was running.")


def register(main: click.Group) -> None:
    main.add_command(chain)
