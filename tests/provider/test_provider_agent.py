"""The provider agent as a process in front of a real node, with real exe-units and a real requestor node."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
from provider_requestor import Requestor, eventually
from worlds.patience import within
from worlds.support import trio_test

from golem.lab.localnet import LocalNet, LocalNode, Process, open_localnet
from golem.provider.client import NodeClient
from golem.provider.port import RestPort
from protocol.provider import InvoiceIssued, IssueNote, NoteIssued, WriteInvoice

pytestmark = [pytest.mark.integration]
T = TypeVar("T")
INTERVAL = "golem.com.scheme.payu.debit-note.interval-sec?"


async def call(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Run a blocking step of the requestor."""
    return await trio.to_thread.run_sync(partial(function, *args, **kwargs))


@asynccontextmanager
async def market(folder: Path, *arguments: str) -> AsyncIterator[tuple[LocalNet, Requestor, LocalNode, Process]]:
    """A requestor at its funded node, and a provider node with its agent."""
    async with open_localnet(folder) as net:
        buyer, seller = await net.start_node("requestor", wait=False), await net.start_node("provider", wait=False)
        await buyer.wait_ready()
        await seller.wait_ready()
        agent = net.start_agent(seller, subnet=net.name, arguments=arguments)
        await buyer.command("payment", "fund")
        requestor = await call(Requestor, buyer.api_url, buyer.app_key)
        yield net, requestor, seller, agent


def units(net: LocalNet) -> list[int]:
    return net.pids(lambda line: "golem.exeunit" in line and "--activity" in line)


async def issued_again_it_is_the_same(seller: LocalNode, agreement: str, activity: str) -> None:
    """What a later run of the agent would issue again, not knowing that it is there, the node has already."""
    async with seller.client() as http, NodeClient(lambda: seller.api_url, seller.app_key) as client:
        notes = [one for one in (await http.get("/payment-api/v1/debitNotes")).json() if one["activityId"] == activity]
        before = {one["debitNoteId"]: one.get("previousDebitNoteId") or "" for one in notes}
        port = RestPort(client, None, "a later run")  # type: ignore[arg-type]
        for number, (note_id, previous_id) in enumerate(before.items(), 1):
            note = IssueNote(activity, number, "9", [], None, previous_id, time.time() - 600, "an earlier run")
            assert await port._issue_note(note) == NoteIssued(activity, number, note_id)
        invoice = WriteInvoice(agreement, (activity,), "9", time.time(), time.time() - 600, "an earlier run")
        (found,) = [one for one in (await http.get("/payment-api/v1/invoices")).json() if one["agreementId"] == agreement]
        assert await port._issue_invoice(invoice) == InvoiceIssued(agreement, found["invoiceId"])
        assert len((await http.get("/payment-api/v1/debitNotes")).json()) == len(before)


@trio_test
async def test_killed_in_the_middle_the_agent_goes_on_and_bills_once(tmp_path: Path) -> None:
    async with market(tmp_path) as (net, requestor, seller, agent):
        agreement = await call(requestor.hire, subnet=net.name, **{INTERVAL: 2})
        activity = await call(requestor.start, agreement)
        (unit,) = units(net)
        await call(eventually, lambda: requestor.documents("debitNotes", agreement))
        await agent.stop(signal.SIGKILL)
        assert units(net) == [unit], "the exe-unit lives on"
        assert (await seller.command("provider", "status"))["state"] == "not running"
        agent.start()
        before = len(requestor.documents("debitNotes", agreement))
        await call(eventually, lambda: len(requestor.documents("debitNotes", agreement)) > before)
        with within(10):  # the status is written once a second
            while (status := await seller.command("provider", "status"))["state"] != "running" or not status["activities"]:
                await trio.sleep(0.1)
        assert [(one["activity"], one["state"], one["pid"]) for one in status["activities"]] == [(activity, "Running", unit)]
        await call(requestor.destroy, activity)
        assert requestor.state(activity) == "Terminated"
        await call(requestor.terminate, agreement)
        (invoice,) = await call(eventually, lambda: requestor.documents("invoices", agreement))
        notes = sorted(Decimal(one["totalAmountDue"]) for one in requestor.documents("debitNotes", agreement))
        assert len(set(notes)) == len(notes) >= 3, "no note twice, totals rise"
        await call(eventually, lambda: Decimal(requestor.documents("invoices", agreement)[0]["amount"]) == notes[-1])
        await call(requestor.accept, "invoices", invoice)
        await call(eventually, lambda: requestor.documents("invoices", agreement)[0]["status"] == "SETTLED", 60)
        assert len(requestor.documents("invoices", agreement)) == 1
        assert not units(net)
        with within(20):  # notes that nobody accepted are paid with their invoice
            while (await seller.command("provider", "status"))["unpaid"]:
                await trio.sleep(0.2)
        await issued_again_it_is_the_same(seller, agreement, activity)


@trio_test
async def test_an_exe_unit_that_dies_with_the_agent_away_is_reported(tmp_path: Path) -> None:
    async with market(tmp_path) as (net, requestor, _, agent):
        agreement = await call(requestor.hire, subnet=net.name)
        activity = await call(requestor.start, agreement)
        await agent.stop(signal.SIGKILL)
        os.kill(units(net)[0], signal.SIGKILL)
        agent.start()
        await call(eventually, lambda: requestor.state(activity) == "Terminated", 40)
        again = await call(requestor.start, agreement)
        assert requestor.state(again) == "Initialized", "the agreement is still good"
        assert await agent.stop(signal.SIGTERM) == 0
        assert requestor.state(again) == "Terminated"
        reason = requestor.call("GET", f"/market-api/v1/agreements/{agreement}/terminate/reason")
        assert reason["reason"]["golem.provider.code"] == "Shutdown"
        (invoice,) = requestor.documents("invoices", agreement)
        assert sorted(invoice["activityIds"]) == sorted([activity, again])
        assert not units(net)


@trio_test
async def test_the_node_may_be_restarted_under_the_agent(tmp_path: Path) -> None:
    async with market(tmp_path) as (net, requestor, seller, _):
        agreement = await call(requestor.hire, subnet=net.name)
        activity = await call(requestor.start, agreement)
        old_url = seller.api_url
        await seller.process.stop(signal.SIGKILL)
        await net.restart_node(seller)
        assert seller.api_url != old_url, "the point of it: another port"
        await call(eventually, lambda: requestor.http.delete(f"/activity-api/v1/activity/{activity}").is_success, 60)
        await call(requestor.terminate, agreement)
        (invoice,) = await call(eventually, lambda: requestor.documents("invoices", agreement), 60)
        assert invoice["activityIds"] == [activity]


@trio_test
async def test_negotiation_limits_and_idle_agreements(tmp_path: Path) -> None:
    async with market(tmp_path, "--max-agreements", "1", "--idle-timeout", "5") as (net, requestor, seller, _):
        other = await call(Requestor, net.nodes["requestor"].api_url, net.nodes["requestor"].app_key)
        agreement = await call(requestor.hire, subnet=net.name)
        await call(other.set_out, subnet=net.name)
        refused = await call(other.negotiate)
        assert refused["eventType"] == "ProposalRejectedEvent"
        assert refused["reason"]["golem.proposal.rejection.is-final"] is False
        with within(5):  # the status is written once a second
            while not (found := (await seller.command("provider", "status"))["refused"]):
                await trio.sleep(0.1)
        assert "Agreements limit" in found[-1]["reason"]
        state = await call(
            eventually, lambda: requestor.call("GET", f"/market-api/v1/agreements/{agreement}")["state"] == "Terminated"
        )
        assert state
        reason = requestor.call("GET", f"/market-api/v1/agreements/{agreement}/terminate/reason")
        assert reason["reason"]["golem.provider.code"] == "NoActivity"
        draft = await call(other.next_event, lambda event: event["eventType"] == "ProposalEvent")
        assert draft["proposal"]["state"] == "Draft", "what was rejected for lack of room is taken up again"
        agreement = await call(other.agree, draft["proposal"]["proposalId"])
        for _ in range(2):  # who hires again at once, while the last exe-unit is still on its way out, is not rejected
            await call(other.start, agreement)
            await call(other.terminate, agreement)
            answer = await call(other.negotiate)
            assert answer["eventType"] == "ProposalEvent", answer
            agreement = await call(other.agree, answer["proposal"]["proposalId"])
