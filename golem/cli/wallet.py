"""`golem wallet`: where this node is paid; its key, and whether a backup of it is whole."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from golem.cli.client import ask_node, config_of
from golem.cli.output import fail, say, table, text, value, wants_json


@click.group()
def wallet() -> None:
    """Where this node is paid, and its key."""


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


def _password(file: Path | None, *, twice: bool) -> str:
    config = config_of()
    path = file or (Path(config.password_file) if config.password_file else None)
    if file is None and config.password:
        return config.password
    if path is None:
        return str(click.prompt("Password of the key", hide_input=True, confirmation_prompt=twice, err=True))
    try:
        return path.read_text().split("\n")[0].rstrip("\r")
    except (OSError, UnicodeDecodeError) as error:
        raise fail(f"cannot read {path}: {error}") from None


def _new_password(file: Path | None) -> str:
    from golem.node.identity import MIN_PASSWORD_CHARS

    password = _password(file, twice=True)
    if len(password) < MIN_PASSWORD_CHARS:
        raise fail(f"a password has at least {MIN_PASSWORD_CHARS} characters")
    return password


_password_file = click.option(
    "--password-file", type=click.Path(path_type=Path), help="Its first line is the password. [asked for]"
)


@wallet.command("export")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@_password_file
def export(file: Path, password_file: Path | None) -> None:
    """Write the node's key to FILE, encrypted.

    FILE is what Ethereum wallets import (keystore JSON), readable by its owner alone. Whoever has it and the password has
    the node's money. It holds neither what is owed nor what was paid: that is in the file of golem backup.
    """
    from golem.node.identity import IdentityError
    from golem.node.keyfile import export_key

    try:
        node_id, same = export_key(config_of().data_dir, file.expanduser().absolute(), lambda: _new_password(password_file))
    except IdentityError as error:
        raise fail(str(error)) from None
    if wants_json():
        value({"address": node_id, "path": str(file)})
        return
    text(f"{file}: the key of {node_id}, under {'the password of this node' if same else 'the password given now'}.")


@wallet.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_password_file
def import_(file: Path, password_file: Path | None) -> None:
    """Make a wallet's key that of a new node.

    FILE is the keystore JSON of an Ethereum wallet. The data directory must not be that of a node yet; its password is then
    that of FILE. To have a node back with all it was owed, golem restore takes the file of golem backup.
    """
    from golem.config import ConfigError
    from golem.node.data_dir import lock_data_dir
    from golem.node.identity import IdentityError
    from golem.node.keyfile import import_key

    data_dir = config_of().data_dir
    with ExitStack() as stack:
        try:
            lock_data_dir(data_dir, stack)
            node_id = import_key(data_dir, file.expanduser().absolute(), lambda: _password(password_file, twice=False))
        except (IdentityError, ConfigError, OSError) as error:
            raise fail(str(error)) from None
    if wants_json():
        value({"address": node_id, "dataDir": str(data_dir)})
        return
    text(f"{data_dir} is that of {node_id} now; golem run starts it, and asks for the password.")
    say("No other node may use this key: two nodes with one key pay over one another.")


@wallet.command("backup-check")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def backup_check(file: Path) -> None:
    """Say whether a backup is whole, and whose.

    FILE is that of golem backup. It is unpacked and looked at as golem restore does, and nothing is put back.
    """
    from golem.node.backup import BackupError, check

    try:
        found = check(file.expanduser().absolute())
    except BackupError as error:
        raise fail(str(error)) from None
    if wants_json():
        value({"address": found["owner"], "at": found["at"], "files": sorted(found["files"])})
        return
    text(f"{file} is whole: {', '.join(sorted(found['files']))} of {found['owner'] or 'a node that it does not name'}, "
         f"as of {found['at']}.")  # fmt: skip
    say("What was signed after that is told again by peers, for 60 days: make one anew now and then.")


def register(main: click.Group) -> None:
    main.add_command(wallet)
