"""Strangers with modified nodes against real ones: what each takes, in one market of real processes.

The histories are those of `tests/simulation/test_cheats.py`; here each has one function of its own program replaced
(`cheating_node.py`), and the other side is as it is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from worlds.patience import within
from worlds.support import trio_test

from golem.lab.localnet import LocalNet, LocalNode, open_localnet

ROOT = Path(__file__).resolve().parents[2]
HELLO = ROOT / "examples" / "hello"
CHEATING = str(Path(__file__).with_name("cheating_node.py"))
sys.path.insert(0, str(ROOT / "examples" / "rest"))

from requestor import MARKET, PAYMENT, Requestor, WalkError, published, walk  # noqa: E402

pytestmark = [pytest.mark.integration]
INTERVAL, ACCEPT, TIMEOUT = (
    "golem.com.scheme.payu.debit-note.interval-sec?", "golem.com.payment.debit-notes.accept-timeout?",
    "golem.com.scheme.payu.payment-timeout-sec?",
)  # fmt: skip
OPERATOR = (  # the public half of a key that is printed in every book
    "xpub661MyMwAqRbcFW31YEwpkMuc5THy2PSt5bDMsktWQcFF8syAmRUapSCGu8ED9W6oDMSgv6Zz8idoc4a6mr8BDzTJY47LJhkJ8UB7WEGuduB"
)
FAST = {INTERVAL: 10, ACCEPT: 20, TIMEOUT: 10}


class Deal:
    """One stranger's dealings with the provider."""

    def __init__(self, net: LocalNet, provider: LocalNode, client: httpx.AsyncClient, package: str) -> None:
        self.provider, self.requestor, self.package = provider, Requestor(client, net.name), package
        self.allocation: dict[str, Any] = {}

    async def agreement(self, **properties: Any) -> str:
        """Negotiate up to an approved agreement. Raises `WalkError` where the provider will not."""
        self.allocation = await self.requestor.allocate("10")
        demand, body = await self.requestor.demand(self.allocation, self.package)
        initial = await self.requestor.proposal(demand, "Initial")
        changed = {**body, "properties": {**body["properties"], **properties}}
        return await self.requestor.agree(await self.requestor.negotiate(demand, changed, initial))

    async def until(self, agreement: str, wanted: Callable[[dict[str, Any]], bool], timeout_s: float = 90) -> dict[str, Any]:
        """Wait until the provider's agent says something of an agreement; meanwhile accept every note."""
        with within(timeout_s):
            while True:
                for row in (await self.provider.command("provider", "status"))["agreements"]:
                    if row["agreement"] == agreement and wanted(row):
                        return row  # type: ignore[no-any-return]
                await self.accept_notes()
                await trio.sleep(0.5)

    async def accept_notes(self) -> None:
        for note in await self.requestor.call("GET", f"{PAYMENT}/debitNotes"):
            if note["status"] == "RECEIVED":
                accepted = {"totalAmountAccepted": note["totalAmountDue"], "allocationId": self.allocation["allocationId"]}
                with suppress(WalkError):
                    await self.requestor.call("POST", f"{PAYMENT}/debitNotes/{note['debitNoteId']}/accept", accepted)


async def stranger(net: LocalNet, cheat: str) -> LocalNode:
    node = await net.start_node(cheat or "honest", program=(CHEATING, cheat) if cheat else ("-m", "golem.cli"))
    await node.command("payment", "fund")
    return node


@trio_test
async def test_modified_requestors_get_no_work_and_hold_no_place(tmp_path: Path) -> None:
    async with open_localnet(tmp_path) as net:
        provider, honest = await net.start_node("provider"), await stranger(net, "")
        net.start_agent(provider, subnet=net.name, arguments=("--max-agreements", "1"))
        async with published(HELLO / "hello.wasm", honest.environment) as package:
            async with honest.client() as client:
                deal = Deal(net, provider, client, package)
                other = "golem.com.payment.platform.erc20-holesky-tglm.address"
                with pytest.raises(WalkError, match="not the requestor's own account"):  # 1
                    await deal.agreement(**{other: "0x" + "7" * 40})
            dated = await stranger(net, "dated")  # 2
            async with dated.client() as client:
                with pytest.raises(WalkError, match=r"410.*Rejected"):
                    await Deal(net, provider, client, package).agreement()
            await dated.process.stop()
            silent = await stranger(net, "silent")  # 3
            async with silent.client() as client:
                deal = Deal(net, provider, client, package)
                agreement = await deal.agreement(**FAST)
                await deal.requestor.create_activity(agreement)
                row = await deal.until(agreement, lambda row: row["state"] in ("Terminating", "Ended"))
                assert row["reason"] == "A debit note was not paid in time."
            await silent.process.stop()
            uncommitted = await stranger(net, "uncommitted")  # 9
            async with uncommitted.client() as client:
                with pytest.raises(WalkError):
                    await Deal(net, provider, client, package).agreement()
                began = time.monotonic()
            async with honest.client() as client:
                with within(60):
                    while True:
                        with suppress(WalkError):
                            found = await walk(Requestor(client, net.name), package, "hello", ["again"])
                            break
                print(f"the place was free again {time.monotonic() - began:.1f} s after the agent gave up")
            assert "again" in found["stdout"]


@trio_test
async def test_a_modified_provider_is_paid_for_time_that_really_passed(tmp_path: Path) -> None:
    async with open_localnet(tmp_path) as net:
        provider, honest = await net.start_node("provider"), await stranger(net, "")
        payout = (await provider.command("wallet", "payout", OPERATOR))["address"]
        net.start_agent(provider, subnet=net.name, program=(CHEATING, "greedy"))
        async with published(HELLO / "hello.wasm", honest.environment) as package, honest.client() as client:
            began = time.monotonic()
            found = await walk(Requestor(client, net.name), package, "hello", ["market"])  # 7
            lasted_s = time.monotonic() - began
            [row] = (await provider.command("provider", "status"))["agreements"]
            agreement = await Requestor(client, net.name).call("GET", f"{MARKET}/agreements/{row['agreement']}")
            offer = agreement["offer"]["properties"]
            coeffs = dict(zip(offer["golem.com.usage.vector"], offer["golem.com.pricing.model.linear.coeffs"], strict=False))
            second = Decimal(repr(coeffs["golem.usage.duration_sec"]))
            second += Decimal(repr(coeffs["golem.usage.cpu_sec"])) * offer["golem.inf.cpu.threads"]
            paid = Decimal(found["invoice"]["amount"])
            assert found["invoice"]["payeeAddr"] == payout != provider.node_id
            async with provider.client() as own:
                await Requestor(own).wait_settled(found["invoice"]["invoiceId"])  # seen on the chain, at the operator's address
            assert 0 < paid <= second * Decimal(lasted_s * 1.001 + 5)
            explained = await honest.command("payment", "explain", row["agreement"])
            assert explained["refused"], explained


@trio_test
async def test_an_honest_stranger_with_many_notes_is_never_stopped_by_credit(tmp_path: Path) -> None:
    """Hours at the SDKs' terms (a note each 120 s, paid within 300), a hundred times as fast by documented settings."""
    price, pace_s = Decimal("0.001"), 20
    credit = Decimal("1.5") * price * (1 + 5 + pace_s)
    async with open_localnet(tmp_path) as net:
        provider, honest = await net.start_node("provider"), await stranger(net, "")
        tight = ("GOLEM_CREDIT_FLOOR=0.000001", "GOLEM_CREDIT_GROWTH=0", f"GOLEM_PAY_PACE={pace_s}")
        await provider.command("provider", "settings", "set", *tight)
        prices = ("--price", "CPU=0", "--price", f"Duration={price}")
        await provider.command("provider", "preset", "update", "wasmtime", *prices)
        net.start_agent(provider, subnet=net.name)
        async with published(HELLO / "hello.wasm", honest.environment) as package, honest.client() as client:
            deal, since = Deal(net, provider, client, package), datetime.now(UTC).isoformat()
            agreement = await deal.agreement(**{INTERVAL: 1, ACCEPT: 5, TIMEOUT: 43200})
            activity = await deal.requestor.create_activity(agreement)
            await deal.requestor.run(activity, {"deploy": {}}, {"start": {}})
            began = time.monotonic()
            while price * Decimal(time.monotonic() - began) < 2 * credit:
                await deal.accept_notes()
                await deal.requestor.run(activity, {"run": {"entry_point": "hello", "args": ["x"]}})  # none is held back
                await trio.sleep(0.2)
            [row] = (await provider.command("provider", "status"))["agreements"]
            assert (row["state"], row["reason"]) == ("Approved", "")
            notes = await deal.requestor.call("GET", f"{PAYMENT}/debitNotes")
            assert len(notes) >= 10
            assert {"RECEIVED", "ACCEPTED", "SETTLED"} >= {note["status"] for note in notes}
            assert sum(note["status"] == "SETTLED" for note in notes) > len(notes) / 2
            await deal.requestor.destroy_activity(activity)
            await deal.requestor.terminate(agreement)
            invoice = await deal.requestor.invoice(agreement, since)
            await deal.requestor.accept(invoice, deal.allocation)
            settled = await deal.requestor.wait_settled(invoice["invoiceId"])
            assert Decimal(settled["amount"]) >= 2 * credit, "which nobody is served who does not pay"
