"""Signs EIP-1559 (type 2) transactions, by eth-account.

Its import is left until something is signed, for the sake of a node's start: web3 has brought it along by then.

Keys are raw 32-byte secrets, kept inside `Key` whose repr shows the address only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import coincurve
from Crypto.Hash import keccak as _keccak

from golem.base.imports import tame_imports
from protocol.signing import address_of


def keccak(data: bytes) -> bytes:
    """The 32-byte hash of Ethereum."""
    return _keccak.new(digest_bits=256, data=data).digest()


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

    def sign(self, fields: dict[str, Any]) -> Signed:
        """Sign a transaction of these fields, as `Account.sign_transaction` names them. Raises `ValueError` for what is none."""
        tame_imports()
        from eth_account import Account
        from eth_utils.exceptions import ValidationError

        try:
            signed = Account.sign_transaction(fields, self._key.secret)
        except (TypeError, ValidationError) as error:
            raise ValueError(f"not a transaction: {str(error)[:200]}") from None
        return Signed(bytes(signed.raw_transaction), "0x" + bytes(signed.hash).hex())


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


def sign(key: Key, tx: Transaction) -> Signed:
    """Sign `tx`. Deterministic (RFC 6979): the same key and fields give the same bytes."""
    if min(tx.nonce, tx.gas, tx.max_fee, tx.priority_fee, tx.value_wei) < 0:
        raise ValueError("a transaction field is negative")
    if tx.priority_fee > tx.max_fee:
        raise ValueError("priority fee above the maximum fee")
    return key.sign({
        "type": 2,
        "chainId": tx.chain_id,
        "nonce": tx.nonce,
        "gas": tx.gas,
        "maxFeePerGas": tx.max_fee,
        "maxPriorityFeePerGas": tx.priority_fee,
        "to": address_bytes(tx.to) if tx.to else b"",
        "value": tx.value_wei,
        "data": tx.data,
    })  # fmt: skip


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
