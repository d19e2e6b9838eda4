"""`golem backup` and `golem restore`: the node's journal, payments and keys in one file, and back."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from golem.cli.client import ask_node, config_of
from golem.cli.output import fail, say, text, value, wants_json


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
def backup(file: Path) -> None:
    """Write journal, payments and keys of the node to FILE.

    The node may run meanwhile. FILE holds the node's key (encrypted if the node keeps it so): it can be read by its owner
    alone (mode 0600), and whoever has it is the node.
    """
    path = file.expanduser().absolute()
    found = _offline(path) if _is_idle() else ask_node("backup", 600, path=str(path))
    if wants_json():
        value(found | {"path": str(path)})
        return
    text(f"{path}: {', '.join(found['files'])}, as of {found['at']}")
    say("It holds the node's key: keep it where only you can read it. golem restore --help says how to put it back.")


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def restore(file: Path) -> None:
    """Put a backup back, while the node is stopped.

    What is in the data directory now is kept in a folder beside it. At its next start the node asks its peers what was
    signed since, and signs no payment before it knows that none was made since, or `golem payment resume` says so.
    """
    from golem.config import ConfigError
    from golem.node.backup import BackupError
    from golem.node.backup import restore as put_back
    from golem.node.data_dir import lock_data_dir

    data_dir = config_of().data_dir
    with ExitStack() as stack:
        try:
            lock_data_dir(data_dir, stack)
            found = put_back(data_dir, file.expanduser().absolute())
        except (BackupError, ConfigError) as error:
            raise fail(str(error)) from None
    if wants_json():
        value(found)
        return
    text(f"Restored the node {found['nodeId']} as of {found['at']} into {data_dir}.")
    if found["kept"]:
        text(f"What was there is in {data_dir / found['kept']}; it holds keys, too.")
    say("Never run this node in two places. Start it with golem run; golem status and golem payment status say what waits.")


def _is_idle() -> bool:
    """Return whether no node runs on the data directory, which is there."""
    from golem.config import ConfigError
    from golem.node.data_dir import lock_data_dir

    data_dir = config_of().data_dir
    if not (data_dir / "node.db").exists():
        raise fail(f"there is no node in {data_dir} (name another directory with golem --data-dir DIR)")
    try:
        with ExitStack() as stack:
            lock_data_dir(data_dir, stack)
            return True
    except ConfigError:
        return False


def _offline(path: Path) -> dict[str, Any]:
    from golem.config import ConfigError
    from golem.node.backup import BackupError, write_backup
    from golem.node.data_dir import lock_data_dir

    data_dir = config_of().data_dir
    try:
        with ExitStack() as stack:
            lock_data_dir(data_dir, stack)
            return write_backup(data_dir, path, "")
    except (BackupError, ConfigError) as error:
        raise fail(str(error)) from None


def register(main: click.Group) -> None:
    main.add_command(backup)
    main.add_command(restore)
