"""The whole market as real processes: an unmodified yapapi script is served and paid; any process may be killed."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import trio
from worlds.patience import within
from worlds.support import trio_test

from golem.lab.localnet import LocalNet, LocalNetError, LocalNode, open_localnet

ROOT = Path(__file__).resolve().parents[2]
YAPAPI_PYTHON = ROOT / ".venv-yapapi" / "bin" / "python"
HELLO = ROOT / "examples" / "hello"
sys.path.insert(0, str(ROOT / "examples" / "rest"))

from requestor import MARKET, PAYMENT, Requestor, WalkError, published  # noqa: E402

pytestmark = [pytest.mark.integration]
needs_yapapi = pytest.mark.skipif(not YAPAPI_PYTHON.exists(), reason="the yapapi environment is missing (make test makes it)")


async def market(net: LocalNet) -> tuple[LocalNode, LocalNode]:
    """Start a funded requestor node and a provider node with its agent."""
    requestor, provider = await net.start_node("requestor", wait=False), await net.start_node("provider", wait=False)
    await requestor.wait_ready()
    await provider.wait_ready()
    net.start_agent(provider, subnet=net.name)
    await requestor.command("payment", "fund")
    return requestor, provider


async def invoice_status(node: LocalNode, invoice: str) -> str:
    async with node.client() as client:
        return str((await client.get(f"{PAYMENT}/invoices/{invoice}")).json().get("status"))


async def until_settled(nodes: tuple[LocalNode, ...], invoice: str, timeout_s: float = 60) -> None:
    with within(timeout_s):
        while [await invoice_status(node, invoice) for node in nodes] != ["SETTLED"] * len(nodes):
            await trio.sleep(0.1)


async def balance(node: LocalNode) -> Decimal:
    """Return what the chain says now; one that was killed takes a moment, and nodes tell the last known balance until then."""
    with within(30):
        while True:
            with suppress(LocalNetError):
                status = await node.command("payment", "status")
                if "balance_datetime" not in status:
                    return Decimal(status["amount"])
            await trio.sleep(0.2)


@needs_yapapi
@trio_test
async def test_unmodified_yapapi_is_served_and_paid(tmp_path: Path) -> None:
    async with open_localnet(tmp_path) as net:
        requestor, provider = await market(net)
        before = await balance(requestor), await balance(provider)
        line = [str(YAPAPI_PYTHON), str(HELLO / "hello.py"), "market", "--subnet", net.name, "--log", str(tmp_path / "y.log")]
        with within(120):
            result = await trio.run_process(
                line, env={**os.environ, **requestor.environment}, capture_stdout=True, capture_stderr=True, check=False
            )
        assert result.returncode == 0, (result.stderr.decode()[-2000:], net.agents["provider-agent"].tail(40))
        found = json.loads(result.stdout)
        assert found["ok"], found
        assert "market" in found["stdout"]
        assert found["provider_id"] == provider.node_id
        await until_settled((requestor, provider), found["invoice_id"])
        paid = Decimal(found["amount"])
        assert paid > 0
        assert (await balance(requestor), await balance(provider)) == (before[0] - paid, before[1] + paid)


class Work:
    """A requestor that goes on through the death of any process, and knows what it asked for."""

    def __init__(self, net: LocalNet, node: LocalNode) -> None:
        self.net, self.node = net, node
        self.outputs: list[str] = []
        self.reasons: list[str] = []
        self.invoices: dict[str, str] = {}

    async def run(self, tasks: int, package: str) -> None:
        """Run `tasks` greetings, one agreement each, trying each at most five times."""
        async with self.node.client() as client:
            since = datetime.now(UTC).isoformat()
            requestor = Requestor(client, self.net.name)
            allocation = await self.patiently(requestor.allocate)
            for number in range(tasks):
                for _ in range(5):
                    client.base_url = self.node.api_url
                    try:
                        self.outputs.append(await self.one(requestor, allocation, package, f"task-{number}"))
                        break
                    except (WalkError, OSError, trio.TooSlowError, *HTTP_ERRORS) as error:
                        self.reasons.append(f"{type(error).__name__}: {error}")
                        await trio.sleep(0.5)
                        await self.give_back(requestor)
            await self.pay_everything(requestor, allocation, since)

    async def patiently(self, step: Any, *arguments: Any) -> Any:
        """Repeat a step while the node is away."""
        with within(60):
            while True:
                requestor_url = self.node.api_url
                try:
                    return await step(*arguments)
                except HTTP_ERRORS:
                    await trio.sleep(0.1)
                    assert self.node.api_url == requestor_url  # a restarted node takes its port again

    async def one(self, requestor: Requestor, allocation: dict[str, Any], package: str, word: str) -> str:
        demand, body = await requestor.demand(allocation, package)
        try:
            draft = await requestor.negotiate(demand, body, await requestor.proposal(demand, "Initial", 20))
            agreement = await requestor.agree(draft)
            self.invoices[agreement] = ""
            try:
                activity = await requestor.create_activity(agreement)
                run = {"run": {"entry_point": "hello", "args": [word], "capture": {"stdout": {"atEnd": {}}}}}
                results = await requestor.run(activity, {"deploy": {}}, {"start": {}}, run, timeout_s=30)
                await requestor.destroy_activity(activity)
                return str(results[-1]["stdout"])
            finally:
                with suppress(WalkError):
                    await self.patiently(requestor.terminate, agreement)
        finally:
            with suppress(WalkError):
                await self.patiently(requestor.call, "DELETE", f"{MARKET}/demands/{demand}")

    async def give_back(self, requestor: Requestor) -> None:
        """End what was agreed while nobody heard it: the node died between the provider's word and our answer."""
        for found in await self.patiently(requestor.call, "GET", f"{MARKET}/agreements?state=Approved"):
            if found["id"] not in self.invoices:
                self.invoices[found["id"]] = ""
                with suppress(WalkError):
                    await self.patiently(requestor.terminate, found["id"])

    async def pay_everything(self, requestor: Requestor, allocation: dict[str, Any], since: str) -> None:
        """Accept the invoice of every agreement that sends one within a while."""
        with trio.move_on_after(40):
            while "" in self.invoices.values():
                for event in await self.patiently(self.events, requestor, since):
                    since = event["eventDate"]
                    found = await self.patiently(requestor.call, "GET", f"{PAYMENT}/invoices/{event['invoiceId']}")
                    for _ in range(2):  # twice on purpose: the second changes nothing
                        await self.patiently(requestor.accept, found, allocation)
                    self.invoices[found["agreementId"]] = found["invoiceId"]

    async def events(self, requestor: Requestor, since: str) -> Any:
        return await requestor.call("GET", f"{PAYMENT}/invoiceEvents", timeout=5, afterTimestamp=since)


import httpx  # noqa: E402

HTTP_ERRORS = (httpx.HTTPError,)
VICTIMS = ("requestor", "provider", "agent", "exe-unit", "chain")


async def kill(net: LocalNet, victim: str) -> None:
    """SIGKILL one process of the market and start again what a supervisor would start again."""
    if victim in ("requestor", "provider"):
        node = net.nodes[victim]
        await node.process.stop(signal.SIGKILL)
        node.process.arguments = [part if part != "http://127.0.0.1:0" else node.api_url for part in node.process.arguments]
        await net.restart_node(node)
    elif victim == "agent":
        await net.agents["provider-agent"].stop(signal.SIGKILL)
        net.agents["provider-agent"].start()
    else:
        pattern = "golem.exeunit" if victim == "exe-unit" else "golem.chain.devchain"
        for pid in net.pids(lambda line: pattern in line)[:1]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("victim", VICTIMS)
@trio_test
async def test_a_killed_process_loses_neither_work_nor_money(tmp_path: Path, victim: str) -> None:
    seed = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(10**6)))
    print(f"KILL_SEED={seed}")
    moment_s = random.Random(f"{seed}-{victim}").uniform(0.3, 5.0)
    async with open_localnet(tmp_path) as net:
        requestor, provider = await market(net)
        before = await balance(requestor), await balance(provider)
        work = Work(net, requestor)
        async with published(HELLO / "hello.wasm", requestor.environment) as package, trio.open_nursery() as nursery:

            async def assassin() -> None:
                await trio.sleep(moment_s)
                await kill(net, victim)

            nursery.start_soon(assassin)
            with within(200):
                await work.run(4, package)
        assert len(work.outputs) + len(work.reasons) >= 4, work.reasons
        assert len(work.outputs) == 4, (seed, moment_s, work.reasons)
        paid = Decimal(0)
        for invoice in filter(None, work.invoices.values()):
            await until_settled((requestor, provider), invoice)
            async with requestor.client() as client:
                paid += Decimal((await client.get(f"{PAYMENT}/invoices/{invoice}")).json()["amount"])
        after = await balance(requestor), await balance(provider)
        assert (before[0] - after[0], after[1] - before[1]) == (paid, paid), (seed, moment_s, work.invoices)
