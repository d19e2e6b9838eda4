"""Providers that take few blocks in one request for logs: the span is halved until they answer, and remembered."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from chain_support import address_of, credential
from worlds.support import trio_test

from golem.chain.evidence import LEAST_LOG_BLOCKS, LOG_BLOCKS, MAX_LOG_REQUESTS, Evidence, Witness
from golem.chain.networks import local_rows
from golem.chain.rpc import Rpc, RpcError

Refusal = dict[str, Any]
ROW = local_rows("http://provider")[0]
PAYER, PAYEE = address_of("span payer"), address_of("span payee")
PLACES = (7, 999, 1000, 1234, 2500)  # blocks with a transfer

REFUSALS: list[tuple[int, Refusal]] = [
    (500, {"code": -32005, "message": "query returned more than 10000 results"}),
    (100, {"code": -32000, "message": "eth_getLogs is limited to 100 blocks range"}),
    (10, {"code": -32600, "message": "Under the Free tier plan, you can make requests with up to a 10 block range"}),
]


class Provider:
    def __init__(self, most: int, refusal: Refusal) -> None:
        self.most, self.refusal, self.spans = most, refusal, list[int]()

    def answer(self, request: httpx.Request) -> httpx.Response:
        call = json.loads(request.content)
        answer: dict[str, Any] = {"result": credential(call)}
        if call["method"] == "eth_getLogs":
            first, last = (int(call["params"][0][name], 16) for name in ("fromBlock", "toBlock"))
            self.spans.append(last - first + 1)
            places = [place for place in PLACES if first <= place <= last]
            found = [{"transactionHash": f"0x{place:064x}", "blockNumber": hex(place)} for place in places]
            answer = {"error": self.refusal} if self.spans[-1] > self.most else {"result": found}
        return httpx.Response(200, json={"jsonrpc": "2.0", "id": call["id"], **answer})


async def asked(provider: Provider, look: Callable[[Witness], Any]) -> None:
    async with Rpc(ROW, transport=httpx.MockTransport(provider.answer)) as rpc:
        (witness,) = Evidence(rpc, ROW, PAYER, lambda tx_hash: True).witnesses()
        await look(witness)


@trio_test
@pytest.mark.parametrize(("most", "refusal"), REFUSALS)
async def test_the_span_is_halved_until_the_provider_answers_and_remembered(most: int, refusal: Refusal) -> None:
    provider = Provider(most, refusal)

    async def look(witness: Witness) -> None:
        for _ in range(2):
            found = await witness.transfers(ROW, PAYER, [PAYEE], 0, 2600)
            assert sorted(found.values()) == list(PLACES), "no block is left out"
        refused = [span for span in provider.spans if span > most]
        assert refused == [LOG_BLOCKS // 2**step for step in range(len(refused))], "it is not asked for so much again"

    await asked(provider, look)


@trio_test
async def test_a_provider_that_refuses_logs_altogether_is_asked_a_few_times(tmp_path: Any) -> None:
    provider = Provider(0, {"code": -32601, "message": "the method eth_getLogs does not exist"})

    async def look(witness: Witness) -> None:
        with pytest.raises(RpcError, match="does not exist"):
            await witness.transfers(ROW, PAYER, [PAYEE], 0, 2600)
        assert len(provider.spans) <= 8
        assert min(provider.spans) >= LEAST_LOG_BLOCKS
        assert witness.endpoint.log_span == 0, "that says nothing of spans"

    await asked(provider, look)


@trio_test
async def test_the_number_of_requests_is_bounded() -> None:
    provider = Provider(10, {"code": -32000, "message": "too wide"})

    async def look(witness: Witness) -> None:
        with pytest.raises(RpcError, match="more than 500 requests"):
            await witness.transfers(ROW, PAYER, [PAYEE], 0, 100_000)
        assert len(provider.spans) == MAX_LOG_REQUESTS

    await asked(provider, look)


def test_a_row_may_say_how_deep_a_failed_payment_is_before_it_is_made_anew() -> None:
    assert replace(ROW, repeat_depth=7).repeat_depth == 7
