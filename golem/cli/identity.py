"""`golem id` and `golem app-key`."""

from __future__ import annotations

import base64
from typing import BinaryIO

import click

from golem.cli.client import ask_node
from golem.cli.output import done, fail, table, text, value, wants_json

MOST_SIGNED = 1 << 20  # bytes of a file


@click.group("id")
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


@identity.command("pub-key")
@click.argument("node_id", required=False)
def id_pub_key(node_id: str | None) -> None:
    """Print the public key (64 bytes, in hex)."""
    found = ask_node("id_public_key", id=node_id)
    text(f'"{found}"' if wants_json() else found)


@identity.command("sign")
@click.argument("file", type=click.File("rb"))
@click.option("--id", "node_id", hidden=True)
def id_sign(file: BinaryIO, node_id: str | None) -> None:
    """Sign a file with the node's key.

    What is signed is the file under the heading that Ethereum wallets put before a message (EIP-191), so that no file can
    pass for a payment or an agreement. Wallets and libraries call this personal_sign, and check it.
    """
    message = file.read(MOST_SIGNED + 1)
    if len(message) > MOST_SIGNED:
        raise fail(f"the file is longer than {MOST_SIGNED >> 20} MiB: sign its checksum instead")
    found = ask_node("id_sign", id=node_id, message=base64.b64encode(message).decode())
    text(f'"{found}"' if wants_json() else found)


@click.group("app-key")
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
    value(ask_node("app_key_show", name=name, id=node_id))


@app_key.command("drop")
@click.argument("name")
@click.option("--id", "node_id", hidden=True)
def app_key_drop(name: str, node_id: str | None) -> None:
    """Delete an app-key."""
    ask_node("app_key_drop", name=name, id=node_id)
    done(f"The app-key {name!r} is deleted: agents that have it are refused from now on.")


def register(main: click.Group) -> None:
    main.add_command(identity)
    main.add_command(app_key)
