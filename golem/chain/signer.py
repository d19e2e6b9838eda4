"""Sign EIP-1559 (type 2) transactions with coincurve and a page of RLP: byte-identical to eth-account.

The usual packages for it cost a node 0.15 s of its start; the tests compare with them.

Keys are raw 32-byte secrets, kept inside `Key` whose repr shows the address only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import coincurve
from Crypto.Hash import keccak as _keccak

from protocol.signing import address_of


def keccak(data: bytes) -> bytes:
    """The 32-byte hash of Ethereum."""
    return _keccak.new(digest_bits=256, data=data).digest()


def rlp(item: bytes | Sequence[bytes | Sequence[bytes]]) -> bytes:
    """Recursive length prefix encoding of a byte string or a list."""
    if isinstance(item, bytes):
        if len(item) == 1 and item[0] < 0x80:
            return item
        body, short = item, 0x80
    else:
        body, short = b"".join(map(rlp, item)), 0xC0
    if len(body) < 56:
        return bytes([short + len(body)]) + body
    length = _big_endian(len(body))
    return bytes([short + 55 + len(length)]) + length + body


class Key:
    """A secp256k1 private key that never shows itself. `address` is lower-case hex with 0x."""

    __slots__ = ("_key", "address")

    def __init__(self, secret: bytes) -> None:
        if len(secret) != 32:
            raise ValueError(f"a private key has 32 bytes, not {len(secret)}")
        self._key = coincurve.PrivateKey(secret)  # ValueError when it is not in range
        self.address: str = address_of(self._key.public_key.format())

    def __repr__(self) -> str:
        return f"Key({self.address})"

    def sign_hash(self, digest: bytes) -> tuple[int, int, int]:
        """(y parity, r, s) over a 32-byte digest."""
        raw = self._key.sign_recoverable(digest, hasher=None)
        return raw[64], int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:64], "big")


@dataclass(frozen=True, slots=True)
class Transaction:
    """A type-2 transaction before signing. Fees in wei per gas, `value_wei` in wei, `to` None creates a contract."""

    chain_id: int
    nonce: int
    gas: int
    max_fee: int
    priority_fee: int
    to: str | None
    data: bytes = b""
    value_wei: int = 0


@dataclass(frozen=True, slots=True)
class Signed:
    """`raw` is what eth_sendRawTransaction takes, `hash` is 0x-hex."""

    raw: bytes
    hash: str


def _big_endian(number: int) -> bytes:
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


def sign(key: Key, tx: Transaction) -> Signed:
    """Sign `tx`. Deterministic (RFC 6979): the same key and fields give the same bytes."""
    if min(tx.nonce, tx.gas, tx.max_fee, tx.priority_fee, tx.value_wei) < 0:
        raise ValueError("a transaction field is negative")
    if tx.priority_fee > tx.max_fee:
        raise ValueError("priority fee above the maximum fee")
    numbers = (tx.chain_id, tx.nonce, tx.priority_fee, tx.max_fee, tx.gas)
    to = address_bytes(tx.to) if tx.to else b""
    body: list[bytes | list[bytes]] = [*map(_big_endian, numbers), to, _big_endian(tx.value_wei), tx.data, []]
    signature = key.sign_hash(keccak(b"\x02" + rlp(body)))
    raw = b"\x02" + rlp([*body, *map(_big_endian, signature)])
    return Signed(raw, "0x" + keccak(raw).hex())


def address_bytes(address: str) -> bytes:
    """The 20 bytes of a 0x address; ValueError when it is none."""
    if len(address) != 42 or not address.startswith("0x"):
        raise ValueError(f"not an address: {address[:50]!r}")
    return bytes.fromhex(address[2:])


def checksum(address: str) -> str:
    """The EIP-55 mixed-case form of an address."""
    lower = address_bytes(address).hex()
    digest = keccak(lower.encode()).hex()
    return "0x" + "".join(c.upper() if int(d, 16) >= 8 else c for c, d in zip(lower, digest, strict=False))
