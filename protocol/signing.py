"""Identity and signatures. A node's identity is one secp256k1 key: its Ethereum address, its libp2p peer key.

Documents that carry duties (offer, agreement, debit note, invoice, acceptance, payment) are signed over their raw bytes,
under the name of their kind, so that a signature of one kind of document cannot serve as one of another.
"""

from __future__ import annotations

import hashlib

import coincurve
import msgspec
from Crypto.Hash import keccak

from protocol.states import DocumentKind
from protocol.types import Violation

KINDS = tuple(DocumentKind)

# A signature (r, s) stands as (r, n-s) too; only the lower s is taken, so that nobody can make a second one of a first.
_HALF_ORDER = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0


class Document(msgspec.Struct, frozen=True, array_like=True):
    """Signed bytes. `body` is UTF-8 JSON, kept as it was signed; `signature` is r, s, v (65 bytes)."""

    kind: str
    body: bytes
    signature: bytes


def address_of(public_key: bytes) -> str:
    """Return the Ethereum address (0x, lower case) of a 33 or 65 byte secp256k1 public key. Raises `ValueError`."""
    raw = coincurve.PublicKey(public_key).format(compressed=False)[1:]
    return "0x" + keccak.new(digest_bits=256, data=raw).digest()[-20:].hex()


def node_id_of(private_key: bytes) -> str:
    """Return the node id that a private key (32 bytes) stands for."""
    return address_of(coincurve.PrivateKey(private_key).public_key.format())


def _hash(kind: str, body: bytes) -> bytes:
    return hashlib.sha3_256(b"golem document\0" + kind.encode() + b"\0" + body).digest()


def sign(private_key: bytes, kind: str, body: bytes) -> Document:
    """Return `body` signed as a document of `kind` (one of `KINDS`) with a 32 byte key."""
    if kind not in KINDS:
        raise ValueError(f"not a kind of document: {kind!r}")
    return Document(kind, body, coincurve.PrivateKey(private_key).sign_recoverable(_hash(kind, body), hasher=None))


def signer_of(document: Document) -> str:
    """Return the node id of the key that signed. Raises `Violation` for a signature that is none."""
    if document.kind not in KINDS:
        raise Violation(f"not a kind of document: {document.kind[:64]!r}")
    if int.from_bytes(document.signature[32:64], "big") > _HALF_ORDER:
        raise Violation(f"bad signature on {document.kind}: the other of its two forms")
    try:
        public = coincurve.PublicKey.from_signature_and_message(
            document.signature, _hash(document.kind, document.body), hasher=None
        )
    except Exception as error:  # coincurve raises bare Exception on a bad recovery id
        raise Violation(f"bad signature on {document.kind}: {str(error)[:100]}") from None
    return address_of(public.format())


def verify(document: Document, kind: str, signer: str) -> None:
    """Raise `Violation` unless `document` is of `kind` and signed by node `signer`."""
    if document.kind != kind:
        raise Violation(f"expected a signed {kind}, got {document.kind[:64]!r}")
    found = signer_of(document)
    if found != signer:
        raise Violation(f"{kind} is signed by {found}, not by {signer}")
