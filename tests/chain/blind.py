"""RPCs in front of a true chain, each blind or lying in its own way: what a load balancer, a lagging index, a pruned
database, a fork or a wrong URL make of one.

`Blind` is the wire of an engine: the host of a URL names the RPC, `faults` what is wrong with it now. What is not said to
be wrong is the true chain's own answer.
"""

from __future__ import annotations

import json
import random
from typing import Any

import httpx

from golem.base.plain_http import trust_nobody
from golem.chain.signer import Key, Transaction, checksum, sign

HOSTS = ("rpc-a", "rpc-b", "rpc-c")

FAULTS = (
    "null-receipts",  # an index that lags, receipts that were pruned
    "null-transactions",
    "null-both",
    "stale-counts",  # a cache in front of it
    "stale-head",  # everything as it was when the fault began
    "empty-bodies",  # block bodies without the transactions
    "blank",  # the same, and no receipts nor transactions
    "forged-bodies",  # another transaction of the same key in the place of ours, and ours unknown
    "fork",  # the same, and no log of ours either: believed alone, it proves that nothing was paid
    "other-chain",  # the same id, another genesis
    "other-id",
    "no-blocks",  # refuses blocks by number: historical ones are not part of the plan
    "other-hashes",  # the same blocks under other hashes
    "counts-and-no-receipts",  # stale counts, and no receipts nor transactions
    "few-logs",  # refuses more than a few blocks of logs
    "refused-sends",  # each send gets an error and goes nowhere
    "lost-replies",  # each send is taken, and answered with an error
    "down",
    "flapping",  # another fault, or none, with each call
)

NO_INDEX = ("null-both", "blank", "forged-bodies", "fork", "counts-and-no-receipts")
STALE_COUNTS = ("stale-counts", "counts-and-no-receipts")
FLAPS = tuple(fault for fault in FAULTS if fault not in ("fork", "flapping"))
SEND_ERRORS = ("nonce too low", "insufficient funds for gas * price + value", "internal error", "already known")
EMPTY_NAMES = ("eth_getTransactionReceipt", "eth_getTransactionByHash")


class Blind(httpx.AsyncHTTPTransport):
    """See the module. `key` is the payer's: whoever forges a fork has a transaction that was truly signed."""

    def __init__(self, url: str, key: Key, seed: int = 0, other_url: str = "") -> None:
        super().__init__(verify=trust_nobody())
        self.url, self.other_url, self.key, self.dice = url, other_url, key, random.Random(seed)
        self.faults: dict[str, str] = {}
        self.since: dict[str, int] = {}  # host -> head of the chain when its fault began

    async def head(self) -> int:
        return int(await self.true("eth_blockNumber", []), 16)

    async def set(self, host: str, fault: str) -> None:
        """From now on `host` has this fault; "" mends it."""
        self.faults[host], self.since[host] = fault, await self.head()

    async def true(self, method: str, params: list[Any], url: str = "") -> Any:
        answer = await self._ask(url or self.url, method, params)
        return answer.get("result")

    async def _ask(self, url: str, method: str, params: list[Any]) -> dict[str, Any]:
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
        request = httpx.Request("POST", url, content=body, headers={"content-type": "application/json"})
        response = await super().handle_async_request(request)
        return dict(json.loads(await response.aread()))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        call = json.loads(request.content)
        host, method, params = request.url.host, call["method"], call["params"]
        fault = self.faults.get(host, "")
        if fault == "flapping":
            fault = self.dice.choice((*FLAPS, "", "", "", ""))
        if fault == "down":
            raise httpx.ConnectError("refused")
        answer = await self._answer(fault, method, params, self.since.get(host, 0))
        return httpx.Response(200, json={**answer, "jsonrpc": "2.0", "id": call["id"]})

    async def _answer(self, fault: str, method: str, params: list[Any], since: int) -> dict[str, Any]:
        receipts, transactions = EMPTY_NAMES
        hidden = {"null-receipts": [receipts], "null-transactions": [transactions]}.get(fault, [])
        if method in hidden or (fault in NO_INDEX and method in EMPTY_NAMES):
            return {"result": None}
        if method == "eth_sendRawTransaction" and fault in ("refused-sends", "lost-replies"):
            if fault == "lost-replies":
                await self._ask(self.url, method, params)
            return {"error": {"code": -32000, "message": self.dice.choice(SEND_ERRORS)}}
        if fault == "other-id" and method == "eth_chainId":
            return {"result": hex(424242)}
        if fault == "other-chain" and self.other_url:
            return await self._ask(self.other_url, method, params)
        if fault == "stale-head" or (fault in STALE_COUNTS and method == "eth_getTransactionCount"):
            return await self._stale(method, params, since)
        if fault == "no-blocks" and method == "eth_getBlockByNumber" and params[0] not in ("latest", "0x0"):
            return {"error": {"code": -32000, "message": "historical blocks are not part of your plan"}}
        if method == "eth_getLogs" and fault == "few-logs" and _width(params[0]) > 7:
            return {"error": {"code": -32005, "message": "query exceeds max block range 8"}}
        answer = await self._ask(self.url, method, params)
        if fault == "other-hashes" and method == "eth_getBlockByNumber" and params[0] != "0x0" and answer.get("result"):
            answer["result"]["hash"] = "0x" + "ab" * 32
        if method == "eth_getBlockByNumber" and len(params) > 1 and params[1] and answer.get("result"):
            if fault in ("empty-bodies", "blank"):
                answer["result"]["transactions"] = []
            elif fault in ("forged-bodies", "fork"):
                answer["result"]["transactions"] = [self._forged(tx) for tx in answer["result"]["transactions"]]
        if method == "eth_getLogs" and fault == "fork" and answer.get("result"):
            answer["result"] = [log for log in answer["result"] if log["topics"][1][-40:] != self.key.address[2:]]
        return answer

    async def _stale(self, method: str, params: list[Any], since: int) -> dict[str, Any]:
        def old(block: Any) -> Any:
            if block in ("latest", "pending", "safe", "finalized"):
                return hex(since)
            return hex(min(int(block, 16), since)) if method != "eth_getBlockByNumber" else block

        if method == "eth_blockNumber":
            return {"result": hex(since)}
        place = {"eth_getBlockByNumber": 0, "eth_getTransactionCount": 1, "eth_call": 1, "eth_getBalance": 1}.get(method)
        if place is not None:
            params = [*params[:place], old(params[place]), *params[place + 1 :]]
            if method == "eth_getBlockByNumber" and int(params[0], 16) > since:
                return {"result": None}
        if method == "eth_getLogs":
            params = [{**params[0], "toBlock": old(params[0].get("toBlock", "latest"))}]
        answer = await self._ask(self.url, method, params)
        found = answer.get("result")
        if method in EMPTY_NAMES and found and int(found.get("blockNumber") or "0x0", 16) > since:
            return {"result": None}
        return answer

    def _forged(self, tx: dict[str, Any]) -> dict[str, Any]:
        """The same nonce of the same key, spent on something else: signed in earnest."""
        if tx["from"].lower() != self.key.address:
            return tx
        number = {name: int(tx[name], 16) for name in ("nonce", "gas", "chainId")}
        other = Transaction(number["chainId"], number["nonce"], 21_000, 10**11, 10**9, self.key.address)
        signed = sign(self.key, other)
        y_parity, r, s = _signature(signed.raw)
        return {
            **tx, "hash": signed.hash, "to": checksum(self.key.address), "input": "0x", "value": "0x0", "gas": hex(21_000),
            "maxFeePerGas": hex(10**11), "maxPriorityFeePerGas": hex(10**9), "type": "0x2", "accessList": [],
            "v": hex(y_parity), "yParity": hex(y_parity), "r": hex(r), "s": hex(s),
        }  # fmt: skip


def _width(wanted: dict[str, str]) -> int:
    return int(wanted["toBlock"], 16) - int(wanted["fromBlock"], 16)


def _signature(raw: bytes) -> tuple[int, int, int]:
    import rlp

    fields = rlp.decode(raw[1:])
    y_parity, r, s = (int.from_bytes(field, "big") for field in fields[-3:])
    return y_parity, r, s
