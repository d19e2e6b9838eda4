"""The node's key as the encrypted file of Ethereum wallets: taken out of a data directory, or put into an empty one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from golem.base.settings_file import is_there
from golem.node.identity import (
    KEYSTORE,
    PLAIN_KEY,
    IdentityError,
    decrypt,
    plain_key,
    read_secret,
    save_encrypted,
    stored_node_id,
)
from golem.private_files import write_private
from protocol.signing import node_id_of


def export_key(data_dir: Path, target: Path, password: Callable[[], str]) -> tuple[str, bool]:
    """Write the key to a file that is not there yet, readable by its owner alone; return whose it is, and whether its password
    is the node's own. A key that the node keeps unencrypted is encrypted with `password()`. Raises `IdentityError`."""
    if target.exists() or target.is_symlink():
        raise IdentityError(f"{target} exists already: name another file")
    keystore, plain = data_dir / KEYSTORE, data_dir / PLAIN_KEY
    try:
        if is_there(plain):
            key = plain_key(plain)
            save_encrypted(target, key, password())
            return node_id_of(key), False
        if is_there(keystore):
            if not (node_id := stored_node_id(data_dir)):
                raise IdentityError(f"{keystore} is damaged: it is no keystore")
            write_private(target, read_secret(keystore))
            return node_id, True
    except OSError as error:
        raise IdentityError(f"cannot write {target}: {error.strerror}") from None
    raise IdentityError(f"there is no key in {data_dir} (a key given as YAGNA_AUTOCONF_ID_SECRET is not kept on disk)")


def import_key(data_dir: Path, source: Path, password: Callable[[], str]) -> str:
    """Make a wallet's key that of a data directory without a node, and return whose it is. The password stays that of the file.

    Raises `IdentityError`, and then changes nothing: a directory that has been used belongs to its own key.
    """
    if there := stored_node_id(data_dir):
        raise IdentityError(f"{data_dir} is of the node {there}: name an empty one (golem --data-dir DIR wallet import ...)")
    for name in (KEYSTORE, PLAIN_KEY, "node.db", "chain.db"):
        if is_there(data_dir / name):
            raise IdentityError(
                f"{data_dir} has been used by a node ({name} is there): name an empty one with golem --data-dir DIR"
            )
    secret = password()
    key = decrypt(source, secret)
    save_encrypted(data_dir / KEYSTORE, key, secret)
    return node_id_of(key)
