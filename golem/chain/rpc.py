"""Typed questions to one network: AsyncWeb3 on Trio, over a `Pool` of endpoints.

AsyncWeb3 is imported in a thread at first use: it costs most of a second. Every failure is an `RpcError`.

Nothing of AsyncWeb3 that needs asyncio is used: no wait_for_transaction_receipt, no batch_requests, no CCIP-read.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar

import trio

from golem.base.imports import tame_imports
from golem.chain.networks import Network
from golem.chain.pool import TIMEOUT_S, Pool, RpcError
from golem.chain.signer import checksum

__all__ = ["Head", "Log", "Pool", "Receipt", "Rpc", "RpcError"]

NONSENSE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


class Head(NamedTuple):
    """The newest block. `base_fee` in wei per gas (0 on chains without)."""

    number: int
    hash: str
    base_fee: int
    timestamp: int


@dataclass(frozen=True, slots=True)
class Log:
    """One event of a transaction; address and topics in lower-case 0x-hex."""

    address: str
    topics: tuple[str, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class Receipt:
    """A mined transaction's outcome; addresses and hashes in lower-case 0x-hex, `fee_wei` all that it cost."""

    hash: str
    succeeded: bool
    block: int
    block_hash: str
    gas_used: int
    fee_wei: int
    sender: str
    to: str | None
    logs: tuple[Log, ...]


def _lower(raw: Any) -> str:
    return raw.lower() if isinstance(raw, str) else "0x" + bytes(raw).hex()


P = ParamSpec("P")
R = TypeVar("R")


def _understood(ask: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
    """A node may answer anything: what does not parse as the answer to its question is an RpcError too."""

    @functools.wraps(ask)
    async def asked(*args: P.args, **kwargs: P.kwargs) -> R:
        rpc = args[0]
        assert isinstance(rpc, Rpc)
        await rpc.web3()
        try:
            return await ask(*args, **kwargs)
        except (*NONSENSE, rpc.web3_error) as error:
            words = f"{type(error).__name__}: {str(error)[:200]}"
            raise RpcError(f"{rpc.network.name}: {ask.__name__} got a senseless answer ({words})", "down") from error

    return asked


class Rpc:
    """Typed questions to one network, asked by AsyncWeb3 through `Pool`."""

    def __init__(self, network: Network, *, timeout_s: float = TIMEOUT_S, transport: Any = None) -> None:
        self.network = network
        self.pool = Pool(network, timeout_s=timeout_s, transport=transport)
        self._web3: Any = None
        self.web3_error: type[Exception] = RpcError  # until web3 is there: its own base class
        self._importing = trio.Lock()

    async def __aenter__(self) -> Rpc:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.pool.aclose()

    async def web3(self) -> Any:
        """The AsyncWeb3 object (for anything not asked below)."""
        if self._web3 is None:
            async with self._importing:
                if self._web3 is None:
                    await trio.to_thread.run_sync(tame_imports)
                    module = await trio.to_thread.run_sync(importlib.import_module, "golem.chain.web3_provider")
                    self._web3, self.web3_error = module.make_web3(self.pool), module.Web3Exception
        return self._web3

    @_understood
    async def chain_id(self) -> int:
        return int(await (await self.web3()).eth.chain_id)

    @_understood
    async def genesis_hash(self) -> str:
        """Tells one chain from another with the same id (a dev chain that was made anew)."""
        return _lower((await (await self.web3()).eth.get_block(0))["hash"])

    @_understood
    async def head(self) -> Head:
        block = await (await self.web3()).eth.get_block("latest")
        return Head(block["number"], _lower(block["hash"]), block.get("baseFeePerGas", 0), block["timestamp"])

    @_understood
    async def block(self, number: int) -> tuple[str, int] | None:
        """Hash and time of the canonical block `number`, None when there is none (yet)."""
        web3 = await self.web3()
        try:
            block = await web3.eth.get_block(number)
        except web3.golem_not_found:
            return None
        return _lower(block["hash"]), int(block["timestamp"])

    async def block_hash(self, number: int) -> str | None:
        """Hash of the canonical block `number`, None when there is none (yet)."""
        block = await self.block(number)
        return block and block[0]

    @_understood
    async def balance(self, address: str) -> int:
        """Coins of `address` in wei."""
        return int(await (await self.web3()).eth.get_balance(checksum(address)))

    @_understood
    async def transaction_count(self, address: str, block: int | str = "latest") -> int:
        """The account's next nonce as of `block` (a number, "latest" or "pending")."""
        return int(await (await self.web3()).eth.get_transaction_count(checksum(address), block))

    @_understood
    async def call(self, to: str, data: bytes, sender: str | None = None) -> bytes:
        """eth_call at the head."""
        call = {"to": checksum(to), "data": "0x" + data.hex()} | ({"from": checksum(sender)} if sender else {})
        return bytes(await (await self.web3()).eth.call(call))

    @_understood
    async def estimate_gas(self, sender: str, to: str, data: bytes, value_wei: int = 0) -> int:
        call = {"from": checksum(sender), "to": checksum(to), "data": "0x" + data.hex(), "value": value_wei}
        return int(await (await self.web3()).eth.estimate_gas(call))

    @_understood
    async def priority_fee(self) -> int:
        """What the node proposes as priority fee, wei per gas."""
        return int(await (await self.web3()).eth.max_priority_fee)

    async def send_raw(self, raw: bytes) -> None:
        """Give a transaction to all endpoints. RpcError when none of them takes it, nor has it already."""
        await self.pool.send(raw)

    async def each(self, ask: Callable[[], Awaitable[R]]) -> list[tuple[str, R]]:
        """What each endpoint by itself answers to `ask`, by host; RpcError when none answers."""
        answers, errors = [], []
        for endpoint in self.pool.endpoints:
            with self.pool.pinned(endpoint):
                try:
                    answers.append((endpoint.host, await ask()))
                except RpcError as error:
                    errors.append(error)
        if not answers:
            raise errors[0]
        return answers

    @_understood
    async def knows(self, tx_hash: str) -> bool:
        """Is the transaction in the node's mempool or chain?"""
        web3 = await self.web3()
        try:
            await web3.eth.get_transaction(tx_hash)
        except web3.golem_not_found:
            return False
        return True

    @_understood
    async def receipt(self, tx_hash: str) -> Receipt | None:
        """None while the transaction is not in a block."""
        web3 = await self.web3()
        try:
            found = await web3.eth.get_transaction_receipt(tx_hash)
        except web3.golem_not_found:
            return None
        if found.get("blockNumber") is None:  # some nodes answer with half a receipt for a pending transaction
            return None
        fee_wei = found["gasUsed"] * found.get("effectiveGasPrice", 0) + _number(found.get("l1Fee"))
        logs = tuple(
            Log(_lower(log["address"]), tuple(_lower(topic) for topic in log["topics"]), bytes(log["data"]))
            for log in found["logs"]
        )
        return Receipt(
            _lower(found["transactionHash"]),
            found["status"] == 1,
            found["blockNumber"],
            _lower(found["blockHash"]),
            found["gasUsed"],
            fee_wei,
            _lower(found["from"]),
            _lower(found["to"]) if found.get("to") else None,
            logs,
        )

    async def dev(self, method: str, *params: Any) -> Any:
        """A dev-chain method (evm_mine, anvil_reorg, dev_faucet ...)."""
        return await self.pool.call(method, params)


def _number(value: Any) -> int:
    return int(value, 16) if isinstance(value, str) else int(value or 0)
