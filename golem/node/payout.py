"""Where a node is paid: at its own address, or at one of its operator's, which no key on this machine can spend from.

`golem wallet payout XPUB` takes the operator's extended public key (BIP 32, as wallets export it for an account) and gives
each node an address of its own: `0/INDEX` below that key, where INDEX is made of the node's id unless a person names one.
So nobody claims a transfer to one node as paid to another. A plain address is taken as well, and may be shared; that is
said at each start. The choice is in `payout.json` of the node's data directory.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import coincurve

from golem.base.settings_file import read_json
from golem.private_files import write_private
from protocol.market import read_subscription
from protocol.property_names import PLATFORM_ADDRESS, PLATFORM_PREFIX
from protocol.signing import Document, address_of
from protocol.types import Violation, node_id

log = logging.getLogger("golem.node.payout")

PAYOUT = "payout.json"
HARDENED = 1 << 31
PUBLIC = bytes.fromhex("0488b21e")  # the version bytes of `xpub`
_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141

OLD_KEY = "an old key"
GIVEN_KEY = "a key that was given to it (YAGNA_AUTOCONF_ID_SECRET), which may be an old one"


@dataclass(frozen=True, slots=True)
class Payout:
    """An address to be paid at. `path` is that below the operator's key, "" where a plain address was given."""

    address: str
    path: str = ""
    key: str = ""


def payout_of(target: str, own_id: str, index: int | None = None) -> Payout:
    """Return where a node is paid by an extended public key or an address. Raises `ValueError`."""
    if target.startswith("0x"):
        if index is not None:
            raise ValueError("an index belongs to an extended public key, not to an address")
        return Payout(node_id(target))
    number = int(own_id[2:10], 16) % HARDENED if index is None else index
    if not 0 <= number < HARDENED:
        raise ValueError(f"an index is a number from 0 to {HARDENED - 1}")
    public, code = _read(target)
    for step in (0, number):
        public, code = _child(public, code, step)
    return Payout(address_of(public), f"0/{number}", target)


def _read(xpub: str) -> tuple[bytes, bytes]:
    """Return public key and chain code of an extended public key. Raises `ValueError`."""
    number = 0
    for char in xpub[:200]:
        digit = _ALPHABET.find(char)
        if digit < 0:
            raise ValueError("not an extended public key: it begins with xpub and is base58")
        number = number * 58 + digit
    if number.bit_length() > 82 * 8:
        raise ValueError("not an extended public key: it is too long")
    raw = number.to_bytes(82, "big")
    body, check = raw[:78], raw[78:]
    if hashlib.sha256(hashlib.sha256(body).digest()).digest()[:4] != check:
        raise ValueError("not an extended public key: its checksum is wrong")
    if body[:4] != PUBLIC:
        raise ValueError("not an extended public key (xpub); a private one has no place on a node")
    return coincurve.PublicKey(body[45:]).format(), body[13:45]


def _child(public: bytes, code: bytes, index: int) -> tuple[bytes, bytes]:
    """Return a child's public key and chain code (BIP 32, CKDpub). Raises `ValueError`."""
    found = hmac.digest(code, public + index.to_bytes(4, "big"), "sha512")
    if int.from_bytes(found[:32], "big") >= _ORDER:
        raise ValueError("this index has no key; take the next one")
    return coincurve.PublicKey(public).add(found[:32]).format(), found[32:]


_MEMBERS = {one.name for one in fields(Payout)}


def read_payout(data_dir: Path) -> Payout | None:
    """Return what was chosen, None for the node's own address. Raises `ValueError`."""
    try:
        found = read_json(data_dir / PAYOUT)
        if found is None:
            return None
        if not isinstance(found, dict) or set(found) != _MEMBERS or not all(isinstance(one, str) for one in found.values()):
            raise ValueError(f"expected an object with the texts {', '.join(sorted(_MEMBERS))}")
        return Payout(node_id(found["address"]), found["path"], found["key"])
    except ValueError as error:
        raise ValueError(f"cannot use {data_dir / PAYOUT}: {error}") from None


def write_payout(data_dir: Path, payout: Payout | None) -> None:
    """Keep a choice."""
    if payout is None:
        (data_dir / PAYOUT).unlink(missing_ok=True)
    else:
        write_private(data_dir / PAYOUT, json.dumps(asdict(payout)) + "\n")


# -- what a start has to say
def warn(payout: Payout | None, own_id: str, offers: Iterable[tuple[str, Any]], new_journal: str) -> list[str]:
    """Return what may have old transfers taken for new ones. `offers`: the market's rows.

    `new_journal`: under which key it is new (`OLD_KEY`, `GIVEN_KEY`), "" where it is not.
    """
    found = []
    address = payout.address if payout else own_id
    if new_journal:
        found.append(
            f"this node has a new journal under {new_journal}: what was paid to it before is known to the chain alone; "
            "transfers that are older than an agreement are not taken for its payment"
        )
    if payout is not None and not payout.path:
        found.append(
            f"this node is paid at {address}, which may be shared: a transfer to another node there cannot be told from one to "
            "this node (`golem wallet payout XPUB` gives each node an address of its own)"
        )
    named = (row for _, row in offers if row.owner != own_id and address.encode() in row.document.body.lower())
    others = sorted({row.owner for row in named if address in _addresses(row.document)})
    if others:
        found.append(f"{', '.join(others[:5])} offers to be paid at {address} as well: each node needs an address of its own")
    return found


def _addresses(document: Document) -> set[str]:
    try:
        properties = read_subscription(document.body).properties
    except (Violation, ValueError):
        return set()
    return {
        str(value).lower()
        for key, value in properties.items()
        if key.startswith(PLATFORM_PREFIX) and key.endswith(PLATFORM_ADDRESS)
    }
