"""The RPC pool: failover, chain-id check, head lag, bounds; over an httpx transport that answers from a script."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
import trio
from chain_support import credential
from worlds.support import mock_trio_test, trio_test

from golem.chain import pool as pool_module
from golem.chain.networks import local_rows
from golem.chain.rpc import Pool, Rpc, RpcError

Answer = Callable[[str], Any]


class Node:
    """A JSON-RPC node with a chain id and a head; `fault` raises or returns a whole response."""

    def __init__(self, chain_id: int = 1337, head: int = 100) -> None:
        self.chain_id, self.head, self.asked = chain_id, head, 0
        self.fault: Callable[[], httpx.Response] | None = None
        self.error: dict[str, Any] | None = None

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.asked += 1
        if self.fault is not None:
            return self.fault()
        call = json.loads(request.content)
        method = call["method"]
        known = {"eth_chainId": hex(self.chain_id), "eth_blockNumber": hex(self.head)}.get(method) or credential(call)
        if self.error is not None and known is None:
            return httpx.Response(200, json={"jsonrpc": "2.0", "id": 1, "error": self.error})
        value = known or self.head
        return httpx.Response(200, json={"jsonrpc": "2.0", "id": 1, "result": value})


def pool_of(*nodes: Node) -> Pool:
    by_host = {f"node{i}": node for i, node in enumerate(nodes)}
    row = replace(local_rows("http://unused")[0], rpc_urls=tuple(f"http://{host}/secret-key" for host in by_host))
    transport = httpx.MockTransport(lambda request: by_host[request.url.host].answer(request))
    return Pool(row, transport=transport)


def refuse() -> httpx.Response:
    raise httpx.ConnectError("refused")


@mock_trio_test
async def test_the_first_endpoint_serves_and_the_next_steps_in() -> None:
    first, second = Node(head=100), Node(head=101)
    pool = pool_of(first, second)
    assert await pool.call("x") == 100
    first.fault = refuse
    assert await pool.call("x") == 101
    asked = first.asked
    assert await pool.call("x") == 101
    assert first.asked == asked, "it rests for a while"


@mock_trio_test
async def test_all_down_is_one_clear_error_without_secrets() -> None:
    nodes = Node(), Node()
    for node in nodes:
        node.fault = refuse
    with pytest.raises(RpcError, match=r"local: node0.*node1") as caught:
        await pool_of(*nodes).call("x")
    assert caught.value.kind == "down"
    assert "secret" not in str(caught.value)


@mock_trio_test
async def test_an_endpoint_on_another_chain_is_never_used() -> None:
    wrong, right = Node(chain_id=1, head=7), Node(head=100)
    assert await pool_of(wrong, right).call("x") == 100
    with pytest.raises(RpcError, match="serves chain id 1, expected 1337") as caught:
        await pool_of(wrong).call("x")
    assert caught.value.kind == "chain_id"


WRONG = {
    "no contract": ({"eth_getCode": "0x"}, "no contract at"),
    "no token": ({"0x313ce567": "0x", "0x95d89b41": "0x"}, "no ERC20 token"),
    "no symbol": ({"0x95d89b41": "0x"}, "no symbol()"),
    "decimals": ({"0x313ce567": f"0x{6:064x}"}, "6 decimals"),
    "symbol": ({"0x95d89b41": f"0x{32:064x}{3:064x}" + b"DAI".hex().ljust(64, "0")}, "the token 'DAI'"),
    "old symbol": ({"0x95d89b41": "0x" + b"MKR".hex().ljust(64, "0")}, "the token 'MKR'"),
}


@pytest.mark.parametrize("name", WRONG)
@mock_trio_test
async def test_an_endpoint_without_the_networks_contracts_is_never_used(name: str) -> None:
    plan, words = dict(WRONG[name][0]), WRONG[name][1]

    class Stranger(Node):
        """A node of another chain that has taken this one's id."""

        def answer(self, request: httpx.Request) -> httpx.Response:
            call = json.loads(request.content)
            key = call["params"][0]["data"] if call["method"] == "eth_call" else call["method"]
            if key in plan:
                return httpx.Response(200, json={"jsonrpc": "2.0", "id": 1, "result": plan[key]})
            return super().answer(request)

    wrong = pool_of(Stranger())
    with pytest.raises(RpcError, match=re.escape(words)) as caught:
        await wrong.call("x")
    assert caught.value.kind == "token"
    assert [fault.kind for fault in wrong.faults()] == ["token"]
    pool = pool_of(Stranger(head=7), Node(head=100))
    assert not await pool.check()
    assert await pool.call("x") == 100
    assert await pool.call("eth_sendRawTransaction") == 100
    assert [fault.words.split()[0] for fault in pool.faults()] == ["node0"]
    plan.clear()
    assert await pool.check()
    assert pool.faults() == []


@mock_trio_test
async def test_an_endpoint_that_lags_comes_last() -> None:
    behind, ahead = Node(head=80), Node(head=100)
    pool = pool_of(behind, ahead)
    assert await pool.call("x") == 100
    ahead.fault = refuse
    assert await pool.call("x") == 80, "better than nothing"


@mock_trio_test
async def test_what_one_refuses_is_asked_of_the_others_and_the_contradiction_is_told() -> None:
    first, second = Node(head=100), Node(head=101)
    pool = pool_of(first, second)
    first.error = {"code": -32005, "message": "limit"}
    assert await pool.call("x") == 101
    assert pool.contradictions() == [], "a rate limit says nothing about the question"
    first.error = {"code": -32000, "message": "insufficient funds", "data": "0x"}
    pool = pool_of(first, second)
    assert await pool.call("x") == 101
    (told,) = pool.contradictions()
    assert "node0 refuses x: insufficient funds" in told
    assert "node1 took it" in told
    await trio.sleep(pool_module.CONTRADICTION_S + 1)
    assert pool.contradictions() == []


@mock_trio_test
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("error", [
    {"code": -32005, "message": "limit"}, {"code": 429, "message": "slow down"},
    {"code": -32000, "message": "Too Many Requests, retry in 10s"}, {"code": -32016, "message": "over rate limit"},
])  # fmt: skip
async def test_a_rate_limit_is_no_answer_even_where_nobody_else_can_be_asked(nodes: int, error: dict[str, Any]) -> None:
    """An answer to an estimate says that the token refuses a payee, who would be given up after some."""
    crowd = [Node() for _ in range(nodes)]
    for node in crowd:
        node.error = error
    with pytest.raises(RpcError) as caught:
        await pool_of(*crowd).call("eth_estimateGas")
    assert caught.value.kind == "down"


@mock_trio_test
async def test_what_all_refuse_is_refused_with_the_words_of_each() -> None:
    first, second = Node(), Node()
    first.error = second.error = {"code": -32000, "message": "nonce too low", "data": "0x"}
    pool = pool_of(first, second)
    with pytest.raises(RpcError, match=r"^nonce too low$") as caught:
        await pool.call("x")
    assert (caught.value.kind, caught.value.code) == ("answer", -32000)
    second.error = {"code": -32000, "message": "insufficient funds"}
    with pytest.raises(RpcError, match="node0: nonce too low; node1: insufficient funds") as caught:
        await pool.send(b"raw")
    assert caught.value.refusals == ("nonce too low", "insufficient funds")
    assert pool.contradictions() == []


@mock_trio_test
async def test_a_transaction_goes_to_every_endpoint_and_one_that_takes_it_is_enough() -> None:
    class Taker(Node):
        """A node that takes every transaction."""

        def __init__(self) -> None:
            super().__init__()
            self.sent: list[str] = []

        def answer(self, request: httpx.Request) -> httpx.Response:
            call = json.loads(request.content)
            if self.fault is None and self.error is None and call["method"] == "eth_sendRawTransaction":
                self.sent += call["params"]
                return httpx.Response(200, json={"jsonrpc": "2.0", "id": 1, "result": "0x" + "ab" * 32})
            return super().answer(request)

    first, second, third = Taker(), Taker(), Taker()
    pool = pool_of(first, second, third)
    await pool.send(b"\1\2")
    assert first.sent == second.sent == third.sent == ["0x0102"], "the first may never pass it on"
    for words in ("nonce too low", "insufficient funds for gas * price + value", "anything at all"):
        first.error, second.fault = {"code": -32000, "message": words}, refuse
        await pool.send(b"\1\2")
        (told,) = pool.contradictions()
        assert all(each in told for each in (words, "node0", "node2"))
    third.error = {"code": -32000, "message": "already known"}
    await pool.send(b"\1\2")
    third.fault = refuse
    with pytest.raises(RpcError, match="anything at all") as caught:
        await pool.send(b"\1\2")
    assert caught.value.kind == "answer"
    first.fault = refuse
    with pytest.raises(RpcError) as caught:
        await pool.send(b"\1\2")
    assert caught.value.kind == "down"


@mock_trio_test
async def test_nonsense_is_a_dead_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "ANSWER_LIMIT", 1000)
    for response in (
        httpx.Response(502, text="bad gateway"), httpx.Response(200, text="<html>"), httpx.Response(200, text="[]"),
        httpx.Response(200, text="{}"), httpx.Response(200, json={"result": "x" * 2000}),
    ):  # fmt: skip
        node = Node()
        node.fault = lambda response=response: response
        with pytest.raises(RpcError) as caught:
            await pool_of(node).call("x")
        assert caught.value.kind == "down"


@mock_trio_test
async def test_a_pinned_task_hears_one_endpoint_only() -> None:
    first, second = Node(head=100), Node(head=101)
    pool = pool_of(first, second)
    with pool.pinned():
        assert await pool.call("x") == 100
        first.fault = refuse
        with pytest.raises(RpcError):
            await pool.call("x")
    assert await pool.call("x") == 101


@mock_trio_test
async def test_repointing_takes_effect_at_once() -> None:
    node = Node()
    pool = pool_of(node)
    before = pool.endpoints
    pool.repoint(tuple(endpoint.url for endpoint in before))
    assert pool.endpoints is before
    pool.repoint(("http://node0/elsewhere",))
    assert await pool.call("x") == 100
    assert [endpoint.url for endpoint in pool.endpoints] == ["http://node0/elsewhere"]


@trio_test
async def test_senseless_answers_never_are_more_than_an_rpc_error() -> None:
    who, tx_hash = "0x" + "12" * 20, "0x" + "34" * 32
    answers = ["nonsense", "0x", 7, [], {}, None, True, {"number": "0x1"}, {"blockNumber": "0x1", "logs": 5}, "0xzz", -1]
    asked = wrong = 0
    for answer in answers:

        def node(request: httpx.Request, answer: Any = answer) -> httpx.Response:
            known = credential(json.loads(request.content))
            return httpx.Response(200, json={"jsonrpc": "2.0", "id": 1, "result": answer if known is None else known})

        async with Rpc(local_rows("http://node")[0], transport=httpx.MockTransport(node)) as rpc:
            questions: list[Callable[[], Any]] = [
                rpc.genesis_hash, rpc.head, lambda rpc=rpc: rpc.block_hash(5), lambda rpc=rpc: rpc.balance(who),
                lambda rpc=rpc: rpc.transaction_count(who), lambda rpc=rpc: rpc.call(who, b""),
                lambda rpc=rpc: rpc.estimate_gas(who, who, b""), rpc.priority_fee,
                lambda rpc=rpc: rpc.send_raw(b"12"), lambda rpc=rpc: rpc.knows(tx_hash),
                lambda rpc=rpc: rpc.receipt(tx_hash),
            ]  # fmt: skip
            for question in questions:
                asked += 1
                try:
                    await question()
                except RpcError:
                    wrong += 1
    assert asked == len(answers) * 11
    assert wrong > asked // 2


@mock_trio_test
async def test_an_endpoint_that_does_not_answer_for_minutes_is_named() -> None:
    nodes = Node(), Node()
    pool = pool_of(*nodes)
    nodes[1].fault = refuse
    assert not await pool.check()
    ((words, trouble),) = pool.silent()
    assert words == "node1 has not answered since this node started"
    assert "refused" in trouble
    nodes[1].fault = None
    assert await pool.check()
    assert pool.silent() == []
    nodes[1].fault = refuse
    await pool.check()
    assert pool.troubled()
    await trio.sleep(1000)
    assert pool.silent() == [], "nobody asked it meanwhile: it may be well again"
    await pool.check()
    ((words, _),) = pool.silent()
    assert words == "node1 has not answered for 17 minutes"
    nodes[1].fault = None
    await pool.check()
    assert (pool.silent(), pool.troubled()) == ([], False)
