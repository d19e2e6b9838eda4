"""Sign EIP-1559 (type 2) transactions with eth-keys and rlp alone: light to import, byte-identical to eth-account.

Keys are raw 32-byte secrets, kept inside `Key` whose repr shows the address only.
"""

from __future__ import annotations

from dataclasses import dataclass

import rlp  # type: ignore[import-untyped]
from eth_hash.auto import keccak
from eth_keys import keys  # type: ignore[attr-defined]


class Key:
    """A secp256k1 private key that never shows itself. `address` is lower-case hex with 0x."""

    __slots__ = ("_key", "address")

    def __init__(self, secret: bytes) -> None:
        self._key = keys.PrivateKey(secret)  # ValidationError when it is not 32 bytes in range
        self.address: str = self._key.public_key.to_address()

    def __repr__(self) -> str:
        return f"Key({self.address})"

    def sign_hash(self, digest: bytes) -> tuple[int, int, int]:
        """(y parity, r, s) over a 32-byte digest."""
        signature = self._key.sign_msg_hash(digest)
        return signature.v, signature.r, signature.s


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
    signature = key.sign_hash(keccak(b"\x02" + rlp.encode(body)))
    raw = b"\x02" + rlp.encode([*body, *map(_big_endian, signature)])
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
