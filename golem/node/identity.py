"""The node's identity: one secp256k1 key, kept in a keystore file or given by the environment; and the app-keys.

The keystore is the standard encrypted JSON of Ethereum wallets. The unencrypted mode has to be asked for: a file with the
bare key, readable by its owner only. Keys leave this module as signatures, never as text.
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
from collections.abc import Callable
from pathlib import Path

import coincurve

from golem.base.imports import tame_imports
from golem.base.settings_file import BadSettingsFile, is_there, read_json, read_text
from golem.config import Config
from golem.private_files import check_ours, is_open_to_others, write_private
from protocol.signing import Document, node_id_of, sign

log = logging.getLogger("golem.node")

KEYSTORE, PLAIN_KEY, APP_KEYS = "keystore.json", "identity.key", "app-keys.json"
SCRYPT_N = 1 << 18  # the usual cost of Ethereum keystores: about a second
MIN_PASSWORD_CHARS = 8
MAX_PASSWORD_BYTES = 4096
AskPassword = Callable[[str, bool], str]  # (prompt, ask twice) -> password


class IdentityError(Exception):
    """The identity cannot be opened or made; the text says what to do."""


class Identity:
    """The key of this node."""

    def __init__(self, key: bytes, *, encrypted: bool) -> None:
        self._key = key
        self.node_id = node_id_of(key)
        self.encrypted = encrypted

    def __repr__(self) -> str:
        return f"Identity({self.node_id})"

    def sign(self, kind: str, body: bytes) -> Document:
        """Return `body` as a signed document of `kind` (see `protocol.signing`)."""
        return sign(self._key, kind, body)

    @property
    def public_key(self) -> bytes:
        """Return the public key, 64 bytes (x and y)."""
        return bytes(coincurve.PrivateKey(self._key).public_key.format(compressed=False)[1:])

    def sign_message(self, message: bytes) -> bytes:
        """Return the signature (65 bytes: r, s, v) of `message` under the heading of EIP-191, as wallets sign texts of people."""
        tame_imports()
        from eth_account import Account
        from eth_account.messages import encode_defunct

        return bytes(Account.sign_message(encode_defunct(message), self._key).signature)

    def derived(self, purpose: str) -> bytes:
        """Return a secret of this node (32 bytes) for one purpose; it is the same at each start and says nothing of the key."""
        return hmac.digest(self._key, f"golem: {purpose}".encode(), "sha256")

    def secret(self) -> bytes:
        """Return the key (32 bytes), for the two places that need it: the peer host and the transaction signer."""
        return self._key


def parse_key(text: str) -> bytes:
    """Return the 32 bytes of a hex private key. Raises `IdentityError` (which does not repeat the text)."""
    digits = text.strip().removeprefix("0x")
    try:
        key = bytes.fromhex(digits)
        if len(key) != 32:
            raise ValueError
        node_id_of(key)
    except ValueError:
        raise IdentityError("a private key is 64 hex digits of a number in the range of secp256k1") from None
    return key


def plain_text(key: bytes) -> str:
    """Return what the file of an unencrypted key holds: the key, and whose it is, so that a flipped bit is no other node."""
    return f"{key.hex()} {node_id_of(key)}\n"


def plain_key(path: Path, *, complete: bool = False) -> bytes:
    """Return the key of such a file. One of an older version names no node: `complete` writes it there.

    Raises `IdentityError`.
    """
    words = read_secret(path).split()
    try:
        key = parse_key(words[0] if words else "")
    except IdentityError as error:
        raise IdentityError(f"cannot use {path}: {error}") from None
    if len(words) > 2 or (len(words) == 2 and words[1].lower() != node_id_of(key)):
        raise IdentityError(
            f"{path} is damaged: the key in it is that of {node_id_of(key)}, and it is said to be that of {words[1][:60]}"
            " (golem restore puts a backup back)"
        )
    if len(words) == 1 and complete:
        write_private(path, plain_text(key))
    return key


def open_identity(config: Config, ask_password: AskPassword | None = None) -> Identity:
    """Return the node's identity, making one at the first start.

    `ask_password` asks at a terminal; `None` where there is none. Raises `IdentityError`.
    """
    if config.autoconf_id_secret:
        try:
            return Identity(parse_key(config.autoconf_id_secret), encrypted=False)
        except IdentityError as error:
            raise IdentityError(f"YAGNA_AUTOCONF_ID_SECRET: {error}") from None
    keystore, plain = config.data_dir / KEYSTORE, config.data_dir / PLAIN_KEY
    for path in filter(is_there, (keystore, plain)):
        try:
            check_ours(path)
        except (ValueError, OSError) as error:
            raise IdentityError(f"cannot use {path}: {error}") from None
    if is_there(plain) and (config.password or config.password_file):
        return _encrypted(config, plain, keystore)
    if is_there(plain):
        return Identity(plain_key(plain, complete=True), encrypted=False)
    if is_there(keystore):
        key = decrypt(keystore, _password(config, ask_password, twice=False))
        if (said := stored_node_id(config.data_dir)) and said != node_id_of(key):
            holds = f"it is said to hold the key of {said}, and holds that of {node_id_of(key)}"
            raise IdentityError(f"{keystore} is damaged: {holds}")
        return Identity(key, encrypted=True)
    if config.plain_key:
        key = secrets.token_bytes(32)
        write_private(plain, plain_text(key))
        return Identity(key, encrypted=False)
    password = _password(config, ask_password, twice=True)
    key = secrets.token_bytes(32)
    save_encrypted(keystore, key, password)
    return Identity(key, encrypted=True)


def _encrypted(config: Config, plain: Path, keystore: Path) -> Identity:
    """Encrypt a plain key with the password that is given now; nobody gives one to have it ignored."""
    if config.plain_key:
        raise IdentityError("a password and --plain-key contradict each other: name one of them")
    key = plain_key(plain)
    if is_there(keystore):  # from an attempt that was cut short, or of another key
        if decrypt(keystore, _password(config, None, twice=False)) != key:
            raise IdentityError(f"{plain} and {keystore} hold two keys: remove the one that is not this node's")
    else:
        save_encrypted(keystore, key, _password(config, None, twice=True))
    plain.unlink()
    return Identity(key, encrypted=True)


def stored_node_id(data_dir: Path) -> str:
    """Return whose key a data directory holds, as far as that can be read without a password; "" where it cannot."""
    try:
        if is_there(data_dir / PLAIN_KEY):
            return node_id_of(plain_key(data_dir / PLAIN_KEY))
        return "0x" + str(read_json(data_dir / KEYSTORE)["address"]).lower().removeprefix("0x")
    except (IdentityError, ValueError, KeyError, TypeError):
        return ""


def save_encrypted(path: Path, key: bytes, password: str) -> None:
    """Write `key` as standard encrypted keystore JSON."""
    tame_imports()
    import eth_keyfile

    write_private(path, json.dumps(eth_keyfile.create_keyfile_json(key, password.encode(), kdf="scrypt", iterations=SCRYPT_N)))


def decrypt(path: Path, password: str) -> bytes:
    """Return the key of a keystore file. Raises `IdentityError`."""
    tame_imports()
    import eth_keyfile

    try:
        keystore = read_json(path)
        keystore["crypto"]["mac"]
    except BadSettingsFile as fault:
        raise IdentityError(f"{path} is damaged: {fault}") from None
    except (KeyError, TypeError):
        raise IdentityError(f"{path} is damaged: it is no keystore") from None
    try:
        return bytes(eth_keyfile.decode_keyfile_json(keystore, password.encode()))
    except (ValueError, KeyError, TypeError):
        raise IdentityError(f"wrong password for {path}") from None


def read_secret(path: Path) -> str:
    """Return the text of a file of this node alone. Raises `IdentityError`."""
    try:
        text = read_text(path)
    except BadSettingsFile as fault:
        raise IdentityError(str(fault)) from None
    if text is None:
        raise IdentityError(f"there is no {path}")
    return text


def _first_line(path: Path) -> str:
    """Return what a password file holds, which a shell may give as a pipe. Raises `IdentityError`."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_PASSWORD_BYTES).decode().rstrip("\r\n")
    except OSError as error:
        raise IdentityError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise IdentityError(f"{path} is no text in UTF-8") from None


def _password(config: Config, ask_password: AskPassword | None, *, twice: bool) -> str:
    """Return the password; `twice`: for a new key."""
    password = _given_password(config, ask_password, twice=twice)
    if twice and len(password) < MIN_PASSWORD_CHARS:
        raise IdentityError(f"a password has at least {MIN_PASSWORD_CHARS} characters")
    return password


def _given_password(config: Config, ask_password: AskPassword | None, *, twice: bool) -> str:
    if config.password_file:
        password = _first_line(config.password_file)
        if is_open_to_others(config.password_file):
            log.warning("other users may read the password file %s (chmod 600 it)", config.password_file)
        if not password:
            raise IdentityError(f"the password file {config.password_file} is empty")
        return password
    if config.password:
        return config.password
    if ask_password:
        return ask_password("Choose a password for this node's new key" if twice else "Password of this node's key", twice)
    raise IdentityError(
        "the key of this node needs a password: --password-file FILE, or GOLEM_PASSWORD in the environment"
        + (", or --plain-key to keep it unencrypted (for automation)" if twice else "")
    )
