"""Identity and signatures: known keys, tampering with every part, and signatures that are none."""

from __future__ import annotations

import coincurve
import msgspec
import pytest
from eth_account import Account
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import Decoder, encode
from protocol.signing import KINDS, Document, address_of, node_id_of, sign, signer_of, verify
from protocol.types import Violation

KEY, OTHER_KEY = b"\x01" * 32, b"\x02" * 32
SIGNER = node_id_of(KEY)
DOCUMENT = sign(KEY, "offer", b'{"price":"1"}')
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


def test_node_id_is_the_ethereum_address() -> None:
    assert SIGNER == "0x1a642f0e3c3af545e7acbd38b07251b3990914f1"
    assert Account.from_key(KEY).address.lower() == SIGNER
    public = coincurve.PrivateKey(KEY).public_key
    assert address_of(public.format(compressed=True)) == address_of(public.format(compressed=False)) == SIGNER


@pytest.mark.parametrize("key", [b"", b"\x05" * 33, b"\x02" * 10, b"\x04" + b"\x00" * 64])
def test_bad_public_keys(key: bytes) -> None:
    with pytest.raises(ValueError):
        address_of(key)


def test_a_signature_names_its_signer() -> None:
    for kind in KINDS:
        document = sign(KEY, kind, b"body")
        assert signer_of(document) == SIGNER
        verify(document, kind, SIGNER)
        assert Decoder[Document](Document)(encode(document)) == document


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, ORDER - 1), st.sampled_from(KINDS), st.binary(max_size=200))
def test_any_key_signs_any_body(secret: int, kind: str, body: bytes) -> None:
    key = secret.to_bytes(32, "big")
    verify(sign(key, kind, body), kind, node_id_of(key))


def test_signing_is_deterministic() -> None:
    """The same document twice is the same bytes: a repeated message is a duplicate, not a second document."""
    assert sign(KEY, "invoice", b"x") == sign(KEY, "invoice", b"x")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 64), st.integers(1, 255))
def test_a_changed_signature_is_not_its_signers(at: int, flip: int) -> None:
    raw = bytearray(DOCUMENT.signature)
    raw[at] ^= flip
    with pytest.raises(Violation):
        verify(msgspec.structs.replace(DOCUMENT, signature=bytes(raw)), "offer", SIGNER)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.binary(max_size=40).filter(lambda body: body != DOCUMENT.body))
def test_another_body_is_not_signed(body: bytes) -> None:
    with pytest.raises(Violation):
        verify(msgspec.structs.replace(DOCUMENT, body=body), "offer", SIGNER)


def test_a_signature_of_one_kind_does_not_serve_as_another() -> None:
    for kind in set(KINDS) - {"offer"}:
        with pytest.raises(Violation):
            verify(DOCUMENT, kind, SIGNER)
        with pytest.raises(Violation):
            verify(msgspec.structs.replace(DOCUMENT, kind=kind), kind, SIGNER)


def test_another_signer_is_refused() -> None:
    with pytest.raises(Violation, match="signed by"):
        verify(DOCUMENT, "offer", node_id_of(OTHER_KEY))


def test_kind_and_body_are_kept_apart() -> None:
    """Moving a byte between kind and body gives another hash."""
    moved = Document("offer\0x", b"body", sign(KEY, "offer", b"x\0body").signature)
    with pytest.raises(Violation):
        verify(moved, "offer\0x", SIGNER)


@pytest.mark.parametrize(
    "signature", [b"", b"\x00" * 65, b"\xff" * 65, b"\x01" * 64, b"\x01" * 66, b"\x01" * 64 + b"\x04", b"\x01" * 64 + b"\x1b"]
)
def test_signatures_that_are_none(signature: bytes) -> None:
    with pytest.raises(Violation):
        verify(Document("offer", b"x", signature), "offer", SIGNER)


def test_the_mirrored_signature() -> None:
    """(r, n-s) with the other parity verifies in bare secp256k1: only one of the two forms may be taken."""
    raw = DOCUMENT.signature
    mirrored = (ORDER - int.from_bytes(raw[32:64], "big")).to_bytes(32, "big")
    with pytest.raises(Violation):
        verify(msgspec.structs.replace(DOCUMENT, signature=raw[:32] + mirrored + bytes([raw[64] ^ 1])), "offer", SIGNER)


def test_unknown_kinds_are_not_signed() -> None:
    with pytest.raises(ValueError):
        sign(KEY, "cheque", b"x")


def test_what_is_said_of_a_bad_document_is_short() -> None:
    """A stranger's bytes must not fill logs and rows by way of our own complaints."""
    for document in (Document("x" * 10**6, b"", b""), Document("offer", b"x" * 10**6, b"\x01" * 10**6)):
        for check in (lambda d: verify(d, "offer", SIGNER), signer_of):
            with pytest.raises(Violation) as caught:
                check(document)
            assert len(str(caught.value)) < 300
