"""Two machines, two dev chains: their nodes never match and say why, unless one chain serves both."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from worlds.patience import within
from worlds.support import trio_test

from golem.chain.devchain import INFO_NAME
from golem.lab.localnet import Process, open_localnet

ROOT = Path(__file__).resolve().parents[2]
HELLO = ROOT / "examples" / "hello" / "hello.wasm"
sys.path.insert(0, str(ROOT / "examples" / "rest"))

from requestor import MARKET, Requestor, published, walk  # noqa: E402

pytestmark = [pytest.mark.integration]


@trio_test
async def test_nodes_on_different_chains_never_match_and_say_why(tmp_path: Path) -> None:
    async with open_localnet(tmp_path) as net:
        requestor = await net.start_node("requestor", wait=False)
        provider = await net.start_node("provider", wait=False, chain_dir=tmp_path / "other")
        await requestor.wait_ready()
        await provider.wait_ready()
        net.start_agent(provider, subnet=net.name)
        await requestor.command("payment", "fund")
        names = [(await node.command("payment", "status"))["chain"] for node in (requestor, provider)]
        assert names[0] != names[1]
        async with requestor.client() as client:
            walker = Requestor(client, net.name)
            demand, _ = await walker.demand(await walker.allocate(), "hash:sha3:none")
            found: dict[str, Any] = {"nearest": []}
            with within(40):
                while not found["nearest"]:
                    await trio.sleep(0.2)
                    found = await requestor.command("market", "explain", demand)
            clauses = {(reason["side"], reason["clause"], reason["found"]) for reason in found["nearest"][0]["reasons"]}
            assert clauses == {
                ("demand", f"(golem.com.payment.local-chain={names[0]})", names[1]),
                ("offer", f"(golem.com.payment.local-chain={names[1]})", names[0]),
                ("offer", "(golem.com.payment.local-chain=*)", names[0]),  # one that names none may look
            }
            assert await walker.call("GET", f"{MARKET}/demands/{demand}/events", timeout=2, maxEvents=10) == []


@trio_test
async def test_a_chain_that_serves_other_machines_pays_there_too(tmp_path: Path) -> None:
    """The chain is served as for a LAN: on an address besides the one where its own machine looks."""
    async with open_localnet(tmp_path) as net:
        line = [sys.executable, "-m", "golem.cli", "chain", "run", "--chain-dir", str(net.chain_dir), "--host", "127.0.0.2"]
        chain = Process("chain", line, {}, tmp_path / "chain.log")
        chain.start()
        try:
            with within(30):
                while not (net.chain_dir / INFO_NAME).exists():
                    await trio.sleep(0.05)
            url = f"http://127.0.0.2:{json.loads((net.chain_dir / INFO_NAME).read_text())['port']}"
            requestor = await net.start_node("requestor", wait=False)
            provider = await net.start_node("provider", extra={"GOLEM_CHAIN_URL": url}, chain_dir=tmp_path / "unused")
            await requestor.wait_ready()
            net.start_agent(provider, subnet=net.name)
            await requestor.command("payment", "fund")
            async with published(HELLO, requestor.environment) as package, requestor.client() as client:
                with within(80):
                    done = await walk(Requestor(client, net.name), package, "hello", ["LAN"])
            assert "LAN" in done["stdout"]
            status = await provider.command("payment", "status")
            assert (status["amount"], status["chainUrl"]) == (done["invoice"]["amount"], url)
            assert not (tmp_path / "unused").exists(), "the provider's node started no chain"
            assert "play money" not in chain.tail(), "no warning for an address of this machine alone"
        finally:
            await chain.stop()
