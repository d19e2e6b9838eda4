"""The one identity of a node: a secp256k1 key, seen as an Ethereum address (node id) and as a libp2p peer id.

A secp256k1 peer id contains the compressed public key, so either is derived from the peer id alone, without asking.
Also signs and checks node records: who can be dialled where, said by the node itself.
"""

from __future__ import annotations

import functools
import hashlib
import time
from dataclasses import dataclass

import coincurve
import msgpack

from protocol.signing import address_of
from protocol.types import MAX_CLOCK_SKEW_S

RECORD_LIFE_S = 3 * 24 * 3600
MAX_RECORD_BYTES = 2048
MAX_ADDRESSES = 16
MAX_ADDRESS_CHARS = 160
_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_PEER_ID_PREFIX = bytes((0x00, 0x25, 0x08, 0x02, 0x12, 0x21))  # identity hash of protobuf {type secp256k1, 33 bytes}


class ClockDiffers(ValueError):
    """A peer's record is from the future: its clock is ahead of ours, or ours is behind."""

    def __init__(self, node_id: str, ahead_s: float) -> None:
        super().__init__(
            f"the clock of {node_id} is {ahead_s:.0f} s ahead of the clock here, and {MAX_CLOCK_SKEW_S:.0f} s are tolerated: "
            f"one of the two is wrong (timedatectl)"
        )
        self.node_id, self.ahead_s = node_id, ahead_s


def public_key(key: bytes) -> bytes:
    """The compressed public key (33 bytes) of a private key (32 bytes)."""
    return coincurve.PrivateKey(key).public_key.format(compressed=True)


@functools.lru_cache(4096)
def node_id_of(pubkey: bytes) -> str:
    """The node id ("0x" + 40 lower-case hex digits) of a compressed public key. ValueError when it is no key."""
    return address_of(pubkey)


def peer_id_of(pubkey: bytes) -> str:
    """The base58 libp2p peer id of a compressed public key."""
    raw = _PEER_ID_PREFIX + pubkey
    number, digits = int.from_bytes(raw, "big"), ""
    while number:
        number, rest = divmod(number, 58)
        digits = _ALPHABET[rest] + digits
    return "1" * (len(raw) - len(raw.lstrip(b"\0"))) + digits


@functools.lru_cache(4096)
def pubkey_of(peer_id: str) -> bytes:
    """The compressed public key in a base58 peer id. ValueError when the peer is not a secp256k1 one."""
    if not 50 <= len(peer_id) <= 60:
        raise ValueError(f"not the peer id of a secp256k1 key: {peer_id[:64]!r}")
    number = 0
    for char in peer_id:
        digit = _ALPHABET.find(char)
        if digit < 0:
            raise ValueError(f"not base58: {peer_id!r}")
        number = number * 58 + digit
    size = len(_PEER_ID_PREFIX) + 33
    if number.bit_length() > size * 8:
        raise ValueError(f"not the peer id of a secp256k1 key: {peer_id!r}")
    raw = number.to_bytes(size, "big")
    if not raw.startswith(_PEER_ID_PREFIX) or peer_id_of(raw[6:]) != peer_id:
        raise ValueError(f"not the peer id of a secp256k1 key: {peer_id!r}")
    node_id_of(raw[6:])
    return raw[6:]


def split_address(multiaddr: str) -> tuple[str, str]:
    """("/ip4/../tcp/..", peer id) of a full multiaddr. ValueError when it is not a TCP address with a /p2p/ part."""
    address, found, peer_id = multiaddr.strip().rpartition("/p2p/")
    if not found or not is_tcp_address(address):
        raise ValueError(f"expected /ip4/<address>/tcp/<port>/p2p/<peer id>, got {multiaddr[:200]!r}")
    pubkey_of(peer_id)
    return address, peer_id


def is_tcp_address(address: str) -> bool:
    """Whether the text is /ip4|ip6|dns../host/tcp/port and nothing more."""
    parts = address.split("/")
    return (
        len(address) <= MAX_ADDRESS_CHARS
        and len(parts) == 5
        and parts[0] == ""
        and parts[1] in ("ip4", "ip6", "dns", "dns4", "dns6")
        and parts[2] != ""
        and parts[3] == "tcp"
        and parts[4].isascii()
        and parts[4].isdigit()
        and 0 < int(parts[4]) < 65536
    )


@dataclass(frozen=True)
class NodeRecord:
    """Where a node can be dialled, as signed by its own key."""

    network: str
    peer_id: str
    node_id: str
    addresses: tuple[str, ...]
    issued_at: int  # seconds since the epoch
    raw: bytes  # the signed form, to pass on


def sign_record(key: bytes, network: str, addresses: list[str], now_s: float | None = None) -> NodeRecord:
    """Our own record; at most 16 addresses go in."""
    issued_at = int(time.time() if now_s is None else now_s)
    pubkey = public_key(key)
    body = msgpack.packb([network, pubkey, addresses[:MAX_ADDRESSES], issued_at])
    signature = coincurve.PrivateKey(key).sign(hashlib.sha256(b"golem-node-record:" + body).digest(), hasher=None)
    raw = msgpack.packb([body, signature])
    return NodeRecord(network, peer_id_of(pubkey), node_id_of(pubkey), tuple(addresses[:MAX_ADDRESSES]), issued_at, raw)


def read_record(raw: object, network: str, now_s: float | None = None) -> NodeRecord:
    """Check a record that came from outside. ValueError says what is wrong with it."""
    if not isinstance(raw, bytes) or len(raw) > MAX_RECORD_BYTES:
        raise ValueError("a node record is at most 2048 bytes")
    record = _verify_record(raw)
    now = time.time() if now_s is None else now_s
    if record.network != network:
        raise ValueError("a node record of another network")
    if record.issued_at > now + MAX_CLOCK_SKEW_S:
        raise ClockDiffers(record.node_id, record.issued_at - now)
    if record.issued_at < now - RECORD_LIFE_S:
        raise ValueError("a node record that is too old")
    return record


@functools.lru_cache(1024)
def _verify_record(raw: bytes) -> NodeRecord:
    try:
        body, signature = msgpack.unpackb(raw, max_array_len=2)
        network, pubkey, addresses, issued_at = msgpack.unpackb(body, max_array_len=MAX_ADDRESSES)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError("a malformed node record") from error
    if not (
        isinstance(network, str)
        and isinstance(pubkey, bytes)
        and isinstance(signature, bytes)
        and isinstance(issued_at, int)
        and isinstance(addresses, list)
        and all(isinstance(address, str) and is_tcp_address(address) for address in addresses)
    ):
        raise ValueError("a malformed node record")
    digest = hashlib.sha256(b"golem-node-record:" + body).digest()
    try:
        genuine = coincurve.PublicKey(pubkey).verify(signature, digest, hasher=None)
    except ValueError as error:
        raise ValueError("a node record with a malformed key or signature") from error
    if not genuine:
        raise ValueError("a node record with a wrong signature")
    return NodeRecord(network, peer_id_of(pubkey), node_id_of(pubkey), tuple(addresses), issued_at, raw)
