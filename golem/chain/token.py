"""Calls of the token and the multi-transfer contract: call data by hand (fixed-width ABI words), and what they answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from golem.chain.networks import Network
from golem.chain.rpc import Rpc, RpcError
from golem.chain.signer import address_bytes

MAX_UINT = 2**256 - 1
MAX_PACKED_WEI = 2**96 - 1  # a packed payment has 12 bytes for its amount
MAX_PAYEES = 50  # beyond that a payment saves little gas and one failure costs more

BALANCE_OF = bytes.fromhex("70a08231")
TRANSFER = bytes.fromhex("a9059cbb")
APPROVE = bytes.fromhex("095ea7b3")
ALLOWANCE = bytes.fromhex("dd62ed3e")
CREATE = bytes.fromhex("efc81a8c")
DIRECT_PACKED = bytes.fromhex("7c26640c")  # golemTransferDirectPacked(bytes32[])
L1_FEE_ORACLE = "0x420000000000000000000000000000000000000F"  # the same on every op-stack chain
GET_L1_FEE = bytes.fromhex("49948e0e")  # getL1Fee(bytes)


class Balances(NamedTuple):
    """Coins and tokens of an address, both in units of 10**-18."""

    gas_wei: int
    token_wei: int


def _word(number: int) -> bytes:
    return number.to_bytes(32, "big")


def _address(address: str) -> bytes:
    return address_bytes(address).rjust(32, b"\0")


def transfer_call(payee: str, amount_wei: int) -> bytes:
    return TRANSFER + _address(payee) + _word(amount_wei)


def approve_call(spender: str, amount_wei: int = MAX_UINT) -> bytes:
    return APPROVE + _address(spender) + _word(amount_wei)


def packed_call(payees: tuple[tuple[str, int], ...]) -> bytes:
    """golemTransferDirectPacked: one word a payment, 20 bytes of address and 12 of amount."""
    words = b"".join(address_bytes(payee) + amount_wei.to_bytes(12, "big") for payee, amount_wei in payees)
    return DIRECT_PACKED + _word(32) + _word(len(payees)) + words


def payees_of(call: bytes) -> tuple[tuple[str, int], ...]:
    """Whom a call pays how many wei: what `transfer_call` and `packed_call` make, read back. ValueError for another one."""
    selector, words = call[:4], [call[at : at + 32] for at in range(4, len(call), 32)]
    if selector == TRANSFER and len(call) == 68:
        found = [(words[0][12:], words[1])]
    elif selector == DIRECT_PACKED and len(words) > 2 and len(call) == 68 + 32 * int.from_bytes(words[1], "big"):
        found = [(word[:20], word[20:]) for word in words[2:]]
    else:
        raise ValueError("a call that is no payment")
    return tuple(("0x" + payee.hex(), int.from_bytes(wei, "big")) for payee, wei in found)


async def _number(rpc: Rpc, to: str, data: bytes) -> int:
    answer = await rpc.call(to, data)
    if len(answer) < 32:
        raise RpcError(f"no contract answers at {to} on {rpc.network.name}")
    return int.from_bytes(answer[:32], "big")


async def balances(rpc: Rpc, network: Network, address: str) -> Balances:
    """What `address` holds at the head. RpcError when nobody says."""
    return Balances(await rpc.balance(address), await _number(rpc, network.token, BALANCE_OF + _address(address)))


async def tokens(rpc: Rpc, network: Network, address: str, enough_wei: int) -> int:
    """Tokens in wei of `address`. Where one endpoint says less than `enough_wei`, the others are asked too."""
    call = BALANCE_OF + _address(address)
    return await _largest(rpc, f"the {network.symbol} of {address}", lambda: _number(rpc, network.token, call), enough_wei)


async def coins(rpc: Rpc, address: str, enough_wei: int) -> int:
    """Coins in wei of `address`, likewise."""
    return await _largest(rpc, f"the coins of {address}", lambda: rpc.balance(address), enough_wei)


async def _largest(rpc: Rpc, question: str, ask: Callable[[], Awaitable[int]], enough_wei: int) -> int:
    found = await ask()
    if found >= enough_wei or len(rpc.pool.endpoints) == 1:
        return found
    answers = await rpc.each(ask)
    (poor, low), (rich, high) = (pick(answers, key=lambda each: each[1]) for pick in (min, max))
    rpc.pool.note(question, f"{poor} says {low} wei for {question}, {rich} says {high}" if low < enough_wei <= high else None)
    return max(found, high)


async def allowance(rpc: Rpc, network: Network, owner: str, spender: str) -> int:
    """Tokens in wei that `spender` may move for `owner`."""
    return await _number(rpc, network.token, ALLOWANCE + _address(owner) + _address(spender))


async def l1_fee(rpc: Rpc, raw: bytes) -> int:
    """What an op-stack chain adds for publishing the transaction `raw` on its parent chain, in wei."""
    padded = raw.ljust(-(-len(raw) // 32) * 32, b"\0")
    return await _number(rpc, L1_FEE_ORACLE, GET_L1_FEE + _word(32) + _word(len(raw)) + padded)
