"""Tokens that say yes and move nothing, or less than was asked: a transaction that succeeded is no payment by that alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chain_support import GLM, Lab, address_of, devchain, payer
from worlds.support import trio_test

from golem.chain import token
from golem.chain.contracts import TRANSFER_TOPIC
from golem.chain.credentials import DECIMALS_CALL, SYMBOL_CALL
from protocol.wallet import TransferConfirmed, TransferDelayed, TransferFailed, TransferSent

CALLDATALOAD, SHR, DUP1, EQ, JUMPI, JUMPDEST = "35", "1c", "80", "14", "57", "5b"
MSTORE, RETURN, CALLER, DIV, LOG3, CODECOPY = "52", "f3", "33", "04", "a3", "39"


def push(value: int, size: int = 0) -> str:
    size = size or max(1, (value.bit_length() + 7) // 8)
    return f"{0x5F + size:02x}{value:0{2 * size}x}"


def returns(*words: int) -> str:
    stored = "".join(push(word) + push(32 * at) + MSTORE for at, word in enumerate(words))
    return stored + push(32 * len(words)) + push(0) + RETURN


def contract(transfer: str) -> bytes:
    """A token whose `transfer` is this code; everybody is rich in it."""
    symbol = int.from_bytes(b"tGLM".ljust(32, b"\0"), "big")
    parts = {
        int(DECIMALS_CALL, 16): returns(18), int(SYMBOL_CALL, 16): returns(32, 4, symbol),
        int.from_bytes(token.BALANCE_OF, "big"): returns(10**30), int.from_bytes(token.TRANSFER, "big"): transfer,
    }  # fmt: skip
    head = push(0) + CALLDATALOAD + push(224) + SHR
    at, jumps = len(head) // 2 + len(parts) * 11, ""
    for selector, code in parts.items():
        jumps += DUP1 + push(selector, 4) + EQ + push(at, 2) + JUMPI
        at += 1 + len(code) // 2
    runtime = head + jumps + "".join(JUMPDEST + code for code in parts.values())
    size = push(len(runtime) // 2, 2)
    return bytes.fromhex(size + DUP1 + push(12) + push(0) + CODECOPY + push(0) + RETURN + runtime)


def moves(divisor: int) -> str:
    """Log a transfer of a part of what was asked, and say yes."""
    amount = push(divisor) + push(36) + CALLDATALOAD + DIV + push(0) + MSTORE
    return amount + push(4) + CALLDATALOAD + CALLER + push(int(TRANSFER_TOPIC, 16)) + push(32) + push(0) + LOG3 + returns(1)


TOKENS = {"moves nothing": (returns(1), 0), "says no": (returns(0), 0), "takes a fee": (moves(2), GLM)}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with devchain(tmp_path_factory.mktemp("chain")) as url:
        yield Lab(url, "devchain")


def deployed(lab: Lab, name: str, transfer: str) -> dict[str, str | None]:
    """The fields of a network row with such a token."""
    receipt = lab.do(lab.rich(f"maker of {name}"), None, contract(transfer), gas=1_000_000)
    assert receipt["status"] == "0x1"
    return {"token": receipt["contractAddress"], "multi_transfer": None}


@pytest.mark.parametrize("name", TOKENS)
@trio_test
async def test_a_transfer_that_moved_too_little_is_no_payment_and_is_not_repeated(lab: Lab, tmp_path: Path, name: str) -> None:
    transfer, moved_wei = TOKENS[name]
    key, row = lab.rich(f"payer of {name}"), deployed(lab, name, transfer)
    async with payer(lab, key, tmp_path / "chain.db", **row) as wallet:
        await wallet.pay("b1", (address_of(name), 2 * GLM))
        told = await wallet.until(TransferDelayed)
        assert f"its logs move {moved_wei} of {2 * GLM} wei to {address_of(name)}" in told.reason
        for _ in range(10):
            lab.mine()
            await wallet.engine.step()
        assert wallet.problems == ["TxStuck"]
        assert len(wallet.told(TransferSent)) == 1
        assert not wallet.told(TransferConfirmed) + wallet.told(TransferFailed)


@trio_test
async def test_a_token_that_moves_what_it_is_asked_is_taken(lab: Lab, tmp_path: Path) -> None:
    key, row = lab.rich("payer of honest"), deployed(lab, "honest", moves(1))
    async with payer(lab, key, tmp_path / "chain.db", **row) as wallet:
        await wallet.pay("b1", (address_of("honest"), 2 * GLM))
        await wallet.until(TransferConfirmed)
        assert wallet.problems == []
