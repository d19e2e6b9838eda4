"""JSON-RPC to a network: a pool of endpoints, and AsyncWeb3 over it on Trio.

`Pool` sends one call to the best endpoint: in the given order, those that failed lately or lag behind last, none whose
chain id is another one. `Rpc` puts AsyncWeb3 on top (imported in a thread at first use: it costs most of a second) and
gives the few typed questions that `engine` and `verify` ask. Every failure is an `RpcError`.

Nothing of AsyncWeb3 that needs asyncio is used: no wait_for_transaction_receipt, no batch_requests, no CCIP-read.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import httpx
import trio

from golem.chain.networks import Network
from golem.chain.signer import checksum
from golem.recursion import tame_imports

TIMEOUT_S = 10.0
ANSWER_LIMIT = 16 << 20  # bytes
BACKOFF_S = (0.5, 60.0)  # first and longest rest of an endpoint that failed
LAG_BLOCKS = 5
SURVEY_S = 30.0  # heads are compared this often when there are several endpoints
NONSENSE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
BUSY_CODES = (-32005, 429)  # rate limits: somebody else may answer


class RpcError(Exception):
    """A call had no result. `kind`: "down" (nobody answered), "chain_id" (wrong chain), "answer" (the node said no)."""

    def __init__(
        self, message: str, kind: Literal["down", "chain_id", "answer"] = "answer", code: int = 0, data: Any = None
    ) -> None:
        super().__init__(message)
        self.kind, self.code, self.data = kind, code, data


class Endpoint:
    """One URL and what we know of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.chain_id: int | None = None
        self.head = 0
        self.failures = 0
        self.rests_until = 0.0
        self.trouble = ""

    def failed(self, trouble: str) -> None:
        first, longest = BACKOFF_S
        self.rests_until = trio.current_time() + min(first * 2**self.failures, longest)
        self.failures = min(self.failures + 1, 20)
        self.trouble = trouble

    def worked(self) -> None:
        self.failures, self.rests_until, self.trouble = 0, 0.0, ""


class Pool:
    """Calls with failover. Close with `aclose`."""

    def __init__(self, network: Network, *, timeout_s: float = TIMEOUT_S, transport: Any = None) -> None:
        if not network.rpc_urls:
            raise ValueError(f"network {network.name} has no RPC URL")
        self.network = network
        self.endpoints = [Endpoint(url) for url in network.rpc_urls]
        local = all("//127.0.0.1" in url or "//localhost" in url for url in network.rpc_urls) or network.dev_faucet
        headers = {"content-type": "application/json"}
        self._client = httpx.AsyncClient(timeout=timeout_s, transport=transport, headers=headers, trust_env=not local)
        self._ids = itertools.count(1)
        self._surveyed = -SURVEY_S
        self._surveying = trio.Lock()
        self._pin: ContextVar[Endpoint | None] = ContextVar("pin", default=None)

    async def aclose(self) -> None:
        await self._client.aclose()

    def repoint(self, urls: tuple[str, ...]) -> None:
        """Use other URLs from now on (the dev chain came up on another port). The same ones change nothing."""
        if urls != tuple(endpoint.url for endpoint in self.endpoints):
            self.endpoints = [Endpoint(url) for url in urls]

    async def call(self, method: str, params: list[Any] | tuple[Any, ...] = ()) -> Any:
        """The result of one JSON-RPC call. RpcError otherwise."""
        if len(self.endpoints) > 1:
            await self._survey()
        troubles, kind = [], "down"  # type: list[str], Literal["down", "chain_id", "answer"]
        for endpoint in self._ranked():
            try:
                await self._check_chain(endpoint)
                answer = await self._post(endpoint, method, params)
            except RpcError as error:
                troubles.append(str(error))
                kind = error.kind if error.kind == "chain_id" else kind
                continue
            endpoint.worked()
            error_object = answer.get("error")
            if error_object is None:
                return answer.get("result")
            code, message, data = _error_parts(error_object)
            if code in BUSY_CODES and len(self.endpoints) > 1:
                endpoint.failed(message)
                troubles.append(f"{_host(endpoint.url)}: {message}")
                continue
            raise RpcError(message, "answer", code, data)
        raise RpcError(f"{self.network.name}: " + "; ".join(troubles)[:500], kind)

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Inside, the calls of this task all go to one endpoint, today's best, and fail with it.

        For conclusions from several answers: two nodes may stand at different heads.
        """
        before = self._pin.set(self._ranked()[0])
        try:
            yield
        finally:
            self._pin.reset(before)

    def _ranked(self) -> list[Endpoint]:
        if (pin := self._pin.get()) is not None:
            return [pin]
        now, best = trio.current_time(), max(endpoint.head for endpoint in self.endpoints)
        return sorted(
            self.endpoints, key=lambda each: (each.rests_until > now, bool(each.head) and each.head < best - LAG_BLOCKS)
        )

    async def _check_chain(self, endpoint: Endpoint) -> None:
        if endpoint.chain_id is None:
            answer = await self._post(endpoint, "eth_chainId", ())
            endpoint.chain_id = _quantity(answer.get("result"), endpoint)
        if endpoint.chain_id != self.network.chain_id:
            seen, endpoint.chain_id = endpoint.chain_id, None  # asked again next time: a proxy may be mended
            text = f"{_host(endpoint.url)} serves chain id {seen}, expected {self.network.chain_id}"
            endpoint.failed(text)
            raise RpcError(text, "chain_id")

    async def _survey(self) -> None:
        """Ask every endpoint for its head, so that one that fell behind comes last."""
        if self._surveying.locked() or trio.current_time() - self._surveyed < SURVEY_S:
            return
        async with self._surveying, trio.open_nursery() as nursery:
            self._surveyed = trio.current_time()
            for endpoint in self.endpoints:
                nursery.start_soon(self._look, endpoint)

    async def _look(self, endpoint: Endpoint) -> None:
        try:
            await self._check_chain(endpoint)
            answer = await self._post(endpoint, "eth_blockNumber", ())
            endpoint.head = _quantity(answer.get("result"), endpoint)
        except RpcError:
            endpoint.head = 0  # unknown; its rest ranks it last already

    async def _post(self, endpoint: Endpoint, method: str, params: Any) -> dict[str, Any]:
        body = {"jsonrpc": "2.0", "id": next(self._ids), "method": method, "params": list(params)}
        received = bytearray()
        try:
            async with self._client.stream("POST", endpoint.url, json=body) as response:
                async for chunk in response.aiter_bytes():
                    received += chunk
                    if len(received) > ANSWER_LIMIT:
                        raise ValueError("answer too large")
                if response.status_code >= 400 and not received.startswith(b"{"):
                    raise ValueError(f"HTTP status {response.status_code}")
            answer = json.loads(received)
            if not isinstance(answer, dict) or not ("result" in answer or "error" in answer):
                raise ValueError("not a JSON-RPC answer")
        except (httpx.HTTPError, ValueError, OSError) as error:
            trouble = f"{_host(endpoint.url)}: {type(error).__name__} {str(error)[:120]}".rstrip()
            endpoint.failed(trouble)
            raise RpcError(trouble, "down") from error
        return answer


def _quantity(value: Any, endpoint: Endpoint) -> int:
    try:
        return int(value, 16)
    except (TypeError, ValueError):
        trouble = f"{_host(endpoint.url)}: a quantity was expected"
        endpoint.failed(trouble)
        raise RpcError(trouble, "down") from None


def _error_parts(error: Any) -> tuple[int, str, Any]:
    if not isinstance(error, dict):
        return 0, str(error)[:500], None
    code = error.get("code")
    return code if isinstance(code, int) else 0, str(error.get("message", "error"))[:500], error.get("data")


def _host(url: str) -> str:
    """Host and port only: paths of RPC URLs carry access keys."""
    return httpx.URL(url).netloc.decode("ascii", "replace").rpartition("@")[2]


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
    async def block_hash(self, number: int) -> str | None:
        """Hash of the canonical block `number`, None when there is none (yet)."""
        web3 = await self.web3()
        try:
            return _lower((await web3.eth.get_block(number))["hash"])
        except web3.golem_not_found:
            return None

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

    @_understood
    async def send_raw(self, raw: bytes) -> str:
        return _lower(await (await self.web3()).eth.send_raw_transaction(raw))

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
