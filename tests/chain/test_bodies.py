"""Transactions of block bodies prove themselves, or do not."""

from __future__ import annotations

from typing import Any

import pytest
from chain_support import address_of, key_of
from eth_account import Account
from eth_hash.auto import keccak
from hypothesis import given, settings
from hypothesis import strategies as st

from golem.chain.bodies import read_body

SECRET = keccak(b"test account body")
COMMON = {"nonce": 7, "gas": 60_000, "to": "0x" + "22" * 20, "value": 5, "data": "0xa9059cbb" + "00" * 64}
LEGACY = {**COMMON, "gasPrice": 10**9}
ACCESS = [{"address": "0x" + "11" * 20, "storageKeys": ["0x" + "01" * 32]}]
KINDS: dict[str, dict[str, Any]] = {
    "before EIP-155": LEGACY,
    "legacy": {**LEGACY, "chainId": 1337},
    "access list": {**LEGACY, "chainId": 1337, "type": 1, "accessList": ACCESS},
    "dynamic fee": {**COMMON, "chainId": 1337, "type": 2, "maxFeePerGas": 9, "maxPriorityFeePerGas": 1, "accessList": ACCESS},
}


def in_body(fields: dict[str, Any]) -> dict[str, Any]:
    """As a node shows it."""
    signed = Account.sign_transaction(fields, SECRET)
    numbers = ("nonce", "gas", "value", "gasPrice", "chainId", "type", "maxFeePerGas", "maxPriorityFeePerGas")
    shown = {name: hex(fields[name]) for name in numbers if name in fields}
    return {
        "type": "0x0", **shown, "hash": "0x" + signed.hash.hex().removeprefix("0x"), "from": address_of("body"),
        "to": fields["to"], "input": fields["data"], "accessList": fields.get("accessList", []),
        "v": hex(signed.v), "r": hex(signed.r), "s": hex(signed.s),
    }  # fmt: skip


def read(tx: dict[str, Any]) -> Any:
    (found,) = read_body({"hash": "0xAB", "transactions": [tx]})[1]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_what_our_key_signed_is_proven(kind: str) -> None:
    found = read(in_body(KINDS[kind]))
    assert found.proven
    assert (found.sender, found.nonce, found.to, found.value_wei) == (key_of("body").address, 7, "0x" + "22" * 20, 5)
    assert found.pays("0x" + "22" * 20, bytes.fromhex(COMMON["data"][2:]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["hash", "nonce", "to", "value", "input", "gas", "r", "s", "from"])
def test_whatever_is_changed_proves_nothing(kind: str, name: str) -> None:
    tx = in_body(KINDS[kind])
    last = tx[name][-1]
    tx[name] = tx[name][:-1] + ("1" if last != "1" else "2")
    assert not read(tx).proven


def test_another_type_is_read_and_proves_nothing() -> None:
    found = read({**in_body(KINDS["dynamic fee"]), "type": "0x71"})
    assert (found.proven, found.nonce) == (False, 7)


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.one_of(st.none(), st.text(max_size=8), st.integers(), st.lists(st.integers(), max_size=2))
            for name in ("type", "v", "yParity", "r", "s", "gasPrice", "chainId", "gas", "accessList")
        },
    )
)
def test_nonsense_in_the_signature_is_no_proof_and_no_crash(changes: dict[str, Any]) -> None:
    unread = {"gasPrice", "yParity"}  # of a transaction of this type
    assert read({**in_body(KINDS["dynamic fee"]), **changes}).proven is (changes.keys() <= unread)


@pytest.mark.parametrize("name", ["nonce", "value", "gas"])
def test_numbers_below_nothing_prove_nothing(name: str) -> None:
    assert not read({**in_body(KINDS["dynamic fee"]), name: "-0x1"}).proven
