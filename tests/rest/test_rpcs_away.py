"""A node whose endpoints are away or serve something else: allocations from the last known balance, faults shown at start."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from worlds.node_in_test import APP_KEY, HEADERS
from worlds.patience import within
from worlds.support import trio_test

from golem.chain import port, purse
from golem.chain.devchain import ensure_devchain, genesis, stop_devchain
from golem.config import config_from
from golem.control.command import COMMANDS
from golem.daemon import open_node
from golem.node.node import Node
from golem.rest.app import create_app

PLATFORM = "erc20-holesky-tglm"


@asynccontextmanager
async def node_on(folder: Path, *, connected: bool = True, **flags: Any) -> AsyncIterator[tuple[Node, Any]]:
    """A node that checks balances, with its chain connected, and a client of its REST application."""
    settings = {
        "data_dir": folder / "node", "plain_key": True, "mdns": False, "listen": ("127.0.0.1:0",), "network_name": "in-test",
    } | flags  # fmt: skip
    config = config_from({"YAGNA_AUTOCONF_APPKEY": APP_KEY}, **settings)
    async with open_node(config) as node, trio.open_nursery() as nursery:
        if connected:
            nursery.start_soon(node.chain.connect)
        yield node, create_app(node).test_client()
        nursery.cancel_scope.cancel()


async def allocate(client: Any, total: str) -> tuple[int, dict[str, Any]]:
    body = json.dumps({"totalAmount": total, "paymentPlatform": PLATFORM})
    response = await client.post("/payment-api/v1/allocations", data=body, headers=HEADERS)
    return response.status_code, json.loads(await response.get_data())


async def get(client: Any, path: str) -> tuple[int, Any]:
    response = await client.get(path, headers=HEADERS)
    return response.status_code, json.loads(await response.get_data())


@trio_test
async def test_allocations_are_made_from_the_last_known_balance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain_dir = tmp_path / "chain"
    url = await ensure_devchain(chain_dir)
    try:
        async with node_on(tmp_path, chain_url=url) as (node, client):
            await node.chain.fund("holesky")
            code, made = await allocate(client, "400")
            assert (code, made.get("balanceTimestamp")) == (201, None)
            await stop_devchain(chain_dir)
            code, made = await allocate(client, "500")
            assert code == 201, made
            assert "balanceTimestamp" in made
            assert "does not answer" in made["balanceNote"]
            code, poor = await allocate(client, "101")
            assert (code, poor["availableFunds"]) == (400, "100"), "what is reserved already counts"
            amended = await client.put(
                f"/payment-api/v1/allocations/{made['allocationId']}", data='{"totalAmount": "600"}', headers=HEADERS
            )
            assert amended.status_code == 200
        async with node_on(tmp_path, chain_url=url) as (node, client):
            code, poor = await allocate(client, "1")
            assert (code, poor["availableFunds"]) == (400, "0"), "it is on disk"
            status = await COMMANDS["payment_status"](node, {"network": "holesky"})
            assert (status["amount"], status["block_number"]) == ("1000", None)
            assert "balance_datetime" in status
            assert any(problem.startswith("RpcError") and "127.0.0.1" in problem for problem in status["problems"])
            monkeypatch.setattr(port, "MAX_AGE_S", -1.0)
            code, old = await allocate(client, "1")
            assert (code, old["type"].rpartition("/")[2]) == (500, "balance-unknown")
            assert "hours old" in old["detail"]
    finally:
        await stop_devchain(chain_dir)
    assert purse.MAX_AGE_S == 24 * 3600


@trio_test
async def test_an_endpoint_that_hangs_holds_up_no_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port, "PATIENCE_S", 0.3)
    chain_dir = tmp_path / "chain"
    url = await ensure_devchain(chain_dir)
    try:
        async with node_on(tmp_path, chain_url=url) as (node, client):
            await node.chain.fund("holesky")
    finally:
        await stop_devchain(chain_dir)

    async def hang(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        hung = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        nursery.start_soon(trio.serve_listeners, hang, [listener])
        async with node_on(tmp_path, chain_url=hung) as (_, client):
            code, made = await allocate(client, "10")
            assert code == 201
            assert "no endpoint answers" in made["balanceNote"]
        nursery.cancel_scope.cancel()


def rows(url: str, **hoodi: Any) -> str:
    """All networks of the profile `testnet`, from this machine: `hoodi` is on the dev chain, with changes."""
    others = [
        {"name": name, "chain_id": number, "rpc_urls": ["http://127.0.0.1:9"], "token": genesis.TOKEN_ADDRESS}
        for number, name in enumerate(("holesky", "amoy", "sepolia"), 4001)
    ]
    row = {"name": "hoodi", "chain_id": genesis.CHAIN_ID, "rpc_urls": [url], "token": genesis.TOKEN_ADDRESS, "poll_s": 0.1}
    return json.dumps([*others, row | hoodi])


FAULTS = {
    "chain id": ({"chain_id": 4242}, "InvalidChainId", "serves chain id 1337, expected 4242"),
    "token": ({"token": "0x" + "12" * 20}, "CantSign", "no contract at 0x1212"),
    "not a token": ({"token": genesis.MULTI_TRANSFER_ADDRESS}, "CantSign", "no ERC20 token at"),
    "symbol": ({"symbol": "GLM"}, "CantSign", "the token 'tGLM'"),
    "multi": ({"multi_transfer": "0x" + "34" * 20}, "CantSign", "no contract at 0x3434"),
}


@pytest.mark.parametrize("name", FAULTS)
@trio_test
async def test_a_wrong_chain_or_token_is_found_at_start_and_shown_everywhere(tmp_path: Path, name: str) -> None:
    changes, kind, words = FAULTS[name]
    chain_dir, folder = tmp_path / "chain", tmp_path / "node"
    folder.mkdir()
    try:
        url = await ensure_devchain(chain_dir)
        (folder / port.EXTRA_ROWS).write_text(rows(url, **changes))
        async with node_on(tmp_path, profile="testnet") as (node, client):
            with within(60):
                while not (node.chain.fault() and node.network.is_up):
                    await trio.sleep(0.05)
            _, problems = await get(client, "/payment-api/v1/payments/status?network=hoodi")
            assert [problem["kind"] for problem in problems] == [kind]
            assert words in problems[0]["message"]
            status = await COMMANDS["payment_status"](node, {"network": "hoodi"})
            assert status["amount"] is None
            assert any(words in problem for problem in status["problems"])
            code, health = await get(client, "/healthcheck")
            assert (code, words in health["detail"]) == (500, True)
    finally:
        await stop_devchain(chain_dir)
