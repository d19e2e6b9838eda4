"""`golem wallet`: where this node is paid."""

from __future__ import annotations

import click

from golem.cli.client import ask_node
from golem.cli.output import table, value, wants_json


@click.group()
def wallet() -> None:
    """Where this node is paid."""


@wallet.command("payout")
@click.argument("target", required=False, metavar="[XPUB|ADDRESS|own]")
@click.option("--index", type=click.IntRange(0, (1 << 31) - 1), help="Which address below the key. [made of the node's id]")
def payout(target: str | None, index: int | None) -> None:
    """Show or choose the address that new agreements are paid at.

    XPUB is the operator's extended public key: each node gets an address of its own below it, and no key to spend from it
    is on this machine. `own` goes back to the node's own address.
    """
    found = ask_node("wallet_payout", target=target, index=index)
    if wants_json():
        value(found)
        return
    table(["address", "path below the key", "of"], [[found["address"], found["path"], found["of"]]])


def register(main: click.Group) -> None:
    main.add_command(wallet)
