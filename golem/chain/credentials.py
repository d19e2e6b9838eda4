"""What an endpoint has to show before it is used: the chain id of its network, and on it the network's own contracts.

Amounts are in units of 10**-18 everywhere, so a token with other decimals would be paid wrong by powers of ten; a call
of an address without a contract succeeds and moves nothing. Both are found here, before the first question.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal, NamedTuple

from golem.chain.networks import Network

DECIMALS = 18
DECIMALS_CALL, SYMBOL_CALL = "0x313ce567", "0x95d89b41"
MAX_SYMBOL_CHARS = 40

Ask = Callable[[str, list[Any]], Awaitable[dict[str, Any]]]  # an endpoint's JSON-RPC answer to a method and its parameters


class Fault(NamedTuple):
    """Why an endpoint does not serve its network."""

    kind: Literal["chain_id", "token"]
    words: str


class NoAnswer(Exception):
    """The endpoint did not answer what was asked: nothing is known about it."""


async def fault_of(network: Network, ask: Ask) -> Fault | None:
    """What is wrong with the endpoint that `ask` asks; None if it serves `network`. Raises `NoAnswer`."""
    seen = _number(_result(await ask("eth_chainId", [])))
    if seen != network.chain_id:
        return Fault("chain_id", f"serves chain id {seen}, expected {network.chain_id}")
    for contract, address in (("token", network.token), ("multi-transfer", network.multi_transfer)):
        if address and len(_bytes(_result(await ask("eth_getCode", [address, "latest"])))) == 0:
            return Fault("token", f"has no contract at {address}, where the {contract} of {network.name} should be")
    return await _token_fault(network, ask)


async def _token_fault(network: Network, ask: Ask) -> Fault | None:
    found: list[bytes] = []
    for name, data in (("decimals", DECIMALS_CALL), ("symbol", SYMBOL_CALL)):
        answer = await ask("eth_call", [{"to": network.token, "data": data}, "latest"])
        error = answer.get("error")
        if error is not None and "revert" not in str(error).lower():
            raise NoAnswer(f"{name}() of the token: {str(error)[:200]}")
        raw = b"" if error is not None else _bytes(_result(answer))
        if len(raw) < 32:
            return Fault("token", f"has no ERC20 token at {network.token}: it has no {name}()")
        found.append(raw)
    decimals, symbol = int.from_bytes(found[0][:32], "big"), _text(found[1])
    if decimals != DECIMALS:
        return Fault("token", f"has a token with {decimals} decimals at {network.token}, {network.symbol} has {DECIMALS}")
    if symbol.lower() != network.symbol.lower():
        return Fault("token", f"has the token {symbol!r} at {network.token}, expected {network.symbol}")
    return None


def _text(raw: bytes) -> str:
    """The text of an ABI answer: a string, or 32 bytes as older tokens have it."""
    if len(raw) >= 64 and int.from_bytes(raw[:32], "big") == 32:
        raw = raw[64 : 64 + int.from_bytes(raw[32:64], "big")]
    return raw.rstrip(b"\0").decode("utf-8", "replace")[:MAX_SYMBOL_CHARS]


def _result(answer: dict[str, Any]) -> Any:
    if answer.get("error") is not None:
        raise NoAnswer(str(answer["error"])[:200])
    return answer.get("result")


def _number(value: Any) -> int:
    try:
        return int(value, 16)
    except (TypeError, ValueError):
        raise NoAnswer("a quantity was expected") from None


def _bytes(value: Any) -> bytes:
    try:
        return bytes.fromhex(value.removeprefix("0x"))
    except (AttributeError, TypeError, ValueError):
        raise NoAnswer("bytes were expected") from None
