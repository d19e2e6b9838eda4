"""Transactions as block bodies show them, and whether they prove themselves: hash and signature follow from the fields.

A transaction that proves itself was signed by its sender's key, whoever shows it. Types 0 to 2 can be checked; another
one (of a roll-up, with blobs) is read, and proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import coincurve

from golem.base.imports import tame_imports
from golem.chain.signer import keccak
from protocol.signing import address_of

HASH_CHARS = 66  # an RPC may call anything a hash


@dataclass(frozen=True, slots=True)
class BodyTx:
    """One transaction; addresses and hash in lower-case 0x-hex. `proven`: its sender signed exactly this."""

    hash: str
    sender: str
    nonce: int
    to: str
    data: bytes
    value_wei: int
    proven: bool

    def pays(self, recipient: str, data: bytes) -> bool:
        """Is it the same payment, in whatever form it was signed?"""
        return (self.to, self.data) == (recipient.lower(), data)


def read_body(block: dict[str, Any]) -> tuple[str, list[BodyTx]]:
    """Hash and transactions of a block with full transactions. ValueError, TypeError or LookupError when it is none."""
    return str(block["hash"]).lower()[:HASH_CHARS], [_read(tx) for tx in block["transactions"]]


def _read(tx: dict[str, Any]) -> BodyTx:
    tx_hash, sender = str(tx["hash"]).lower()[:HASH_CHARS], str(tx["from"]).lower()
    data = bytes.fromhex(str(tx.get("input", tx.get("data", "0x"))).removeprefix("0x"))
    to = str(tx["to"] or "").lower()
    value_wei = int(tx.get("value", "0x0"), 16)
    return BodyTx(tx_hash, sender, int(tx["nonce"], 16), to, data, value_wei, _signer(tx) == (tx_hash, sender))


def _signer(tx: dict[str, Any]) -> tuple[str, str] | None:
    """(hash, sender) as they follow from the fields; None where they cannot be computed."""
    tame_imports()
    import rlp  # type: ignore[import-untyped]  # late, as eth-account (`signer`)

    try:
        kind = int(tx.get("type") or "0x0", 16)
        v = int(tx.get("v", tx.get("yParity", "0x0")), 16)
        r, s = (int(tx[name], 16) for name in ("r", "s"))
        fields = _fields(tx, kind)
        signed: list[Any] = fields
        parity = v
        if kind == 0:
            parity = (v - 35) % 2 if v >= 35 else v - 27
            signed = [*fields, (v - 35) // 2, 0, 0] if v >= 35 else fields
        prefix = bytes([kind]) if kind else b""
        digest = keccak(prefix + rlp.encode(signed))
        raw = r.to_bytes(32, "big") + s.to_bytes(32, "big") + bytes([parity])
        public_key = coincurve.PublicKey.from_signature_and_message(raw, digest, hasher=None)
        tx_hash = "0x" + keccak(prefix + rlp.encode([*fields, v, r, s])).hex()
        return tx_hash, address_of(public_key.format())
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, rlp.exceptions.RLPException):
        return None
    except Exception as error:  # coincurve has exceptions of its own kind for some keys
        if type(error).__module__.startswith("coincurve"):
            return None
        raise


def _fields(tx: dict[str, Any], kind: int) -> list[Any]:
    """The fields in the order in which they are signed."""
    common = [int(tx["gas"], 16), _bytes(tx["to"] or "0x"), int(tx["value"], 16), _bytes(tx.get("input", tx.get("data", "")))]
    nonce = int(tx["nonce"], 16)
    if kind == 0:
        return [nonce, int(tx["gasPrice"], 16), *common]
    access = [[_bytes(item["address"]), [_bytes(key) for key in item["storageKeys"]]] for item in tx.get("accessList") or []]
    chain_id = int(tx["chainId"], 16)
    if kind == 1:
        return [chain_id, nonce, int(tx["gasPrice"], 16), *common, access]
    if kind == 2:
        fees = [int(tx["maxPriorityFeePerGas"], 16), int(tx["maxFeePerGas"], 16)]
        return [chain_id, nonce, *fees, *common, access]
    raise ValueError(f"transaction type {kind}")


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.removeprefix("0x"))
