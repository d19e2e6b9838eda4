"""Two endpoints of one chain, the first of which says no to what is true: payments go on, and both stories are told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from chain_support import GLM, Lab, address_of, credential, devchain, payer
from worlds.support import trio_test

from protocol.wallet import TransferConfirmed

FIRST, SECOND = "http://first.example", "http://second.example"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with devchain(tmp_path_factory.mktemp("chain")) as url:
        yield Lab(url, "devchain")


class TwoFaces(httpx.AsyncHTTPTransport):
    """Two endpoints before one chain; `plan` maps host and method to the whole of an answer given in its place."""

    def __init__(self, lab: Lab) -> None:
        super().__init__()
        self.url, self.plan, self.sent = httpx.URL(lab.url), {}, []  # type: httpx.URL, dict[Any, Any], list[str]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        call, host = json.loads(request.content), request.url.host
        if call["method"] == "eth_sendRawTransaction":
            self.sent.append(host)
        answer = self.plan.get((host, call["method"]))
        if answer is not None and credential(call) is None:
            return httpx.Response(200, json={"jsonrpc": "2.0", "id": call["id"]} | answer)
        request.url = self.url
        request.headers["host"] = f"{self.url.host}:{self.url.port}"
        return await super().handle_async_request(request)


def no(words: str, code: int = -32000) -> dict[str, Any]:
    return {"error": {"code": code, "message": words}}


REFUSALS = {
    "nonce": {"eth_sendRawTransaction": no("nonce too low")},
    "funds": {"eth_sendRawTransaction": no("insufficient funds for gas * price + value")},
    "fee": {"eth_sendRawTransaction": no("transaction underpriced")},
    "words": {"eth_sendRawTransaction": no("exceeds the configured cap")},
    "estimate": {"eth_estimateGas": no("insufficient funds for transfer")},
    "reverts": {"eth_estimateGas": no("execution reverted", 3)},
    "coins": {"eth_getBalance": {"result": "0x0"}},
    "tokens": {"eth_call": {"result": "0x" + 64 * "0"}},
}


@pytest.mark.parametrize("name", REFUSALS)
@trio_test
async def test_a_payment_goes_through_the_second_and_the_contradiction_is_told(lab: Lab, tmp_path: Path, name: str) -> None:
    key, payee, wire = lab.rich(f"refused {name}"), address_of(f"refused {name} payee"), TwoFaces(lab)
    wire.plan = {("first.example", method): answer for method, answer in REFUSALS[name].items()}
    async with payer(lab, key, tmp_path / "chain.db", transport=wire, rpc_urls=(FIRST, SECOND)) as wallet:
        await wallet.pay("b1", (payee, GLM))
        await wallet.until(TransferConfirmed)
        (problem,) = wallet.engine.problems()
        assert problem.kind == "RpcError"
        assert "first.example" in problem.detail
        assert "second.example" in problem.detail
    assert lab.tokens(payee) == GLM


@trio_test
async def test_an_endpoint_that_takes_a_transaction_and_never_passes_it_on(lab: Lab, tmp_path: Path) -> None:
    key, payee, wire = lab.rich("swallowed"), address_of("swallowed payee"), TwoFaces(lab)
    wire.plan = {("first.example", "eth_sendRawTransaction"): {"result": "0x" + 64 * "1"}}
    async with payer(lab, key, tmp_path / "chain.db", transport=wire, rpc_urls=(FIRST, SECOND)) as wallet:
        await wallet.pay("b1", (payee, GLM))
        await wallet.until(TransferConfirmed)
        assert set(wire.sent) == {"first.example", "second.example"}
        assert wallet.problems == []
    assert lab.tokens(payee) == GLM


@trio_test
async def test_what_both_refuse_waits_with_the_words_of_both(lab: Lab, tmp_path: Path) -> None:
    key, payee, wire = lab.rich("both"), address_of("both payee"), TwoFaces(lab)
    wire.plan = {
        ("first.example", "eth_sendRawTransaction"): no("nonce too low"),
        ("second.example", "eth_sendRawTransaction"): no("exceeds the configured cap"),
    }
    async with payer(lab, key, tmp_path / "chain.db", transport=wire, rpc_urls=(FIRST, SECOND)) as wallet:
        await wallet.pay("b1", (payee, GLM))
        await wallet.engine.step()
        (problem,) = wallet.engine.problems()
        assert "first.example: nonce too low; second.example: exceeds the configured cap" in problem.detail
        wire.plan = {}
        await wallet.until(TransferConfirmed)
    assert lab.tokens(payee) == GLM
