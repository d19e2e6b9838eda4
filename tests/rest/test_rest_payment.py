"""The payment API of real nodes: codes and forms to the letter, documents between two nodes, money on the dev chain."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from quart_trio import QuartTrio
from worlds.node_in_test import HEADERS, node_in_test
from worlds.patience import patience, within
from worlds.support import tell, trio_test

from golem.chain import engine, port, watch
from golem.chain.devchain import INFO_NAME, ensure_devchain, stop_devchain
from golem.control import debts as _registers_its_commands  # noqa: F401
from golem.control.command import COMMANDS
from golem.node.node import Node
from golem.node.payout import Payout
from golem.rest import app as rest_app
from golem.rest import payment
from protocol.activity import ActivityKnown
from protocol.negotiation import AgreementApproved

PLATFORM = "erc20-holesky-tglm"
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z\Z")
NOBODY = "http://127.0.0.1:9"
DUE = "2031-01-01T00:00:00+00:00"


class Agent:
    """Calls the payment API of one node as an agent does."""

    def __init__(self, node: Node) -> None:
        self.node, self.content_type = node, ""
        app = QuartTrio("golem", static_folder=None)
        app.config["RESPONSE_TIMEOUT"] = None
        rest_app._authenticate(app, node)
        rest_app._errors(app)
        app.register_blueprint(payment.blueprint(node))
        self.client = app.test_client()

    async def call(self, method: str, path: str, body: Any = ..., **headers: str) -> tuple[int, Any]:
        data = None if body is ... else body if isinstance(body, bytes) else json.dumps(body)
        with within(60):
            response = await self.client.open(f"/payment-api/v1{path}", method=method, data=data, headers={**HEADERS, **headers})
            raw = await response.get_data()
        self.content_type = response.headers["Content-Type"]
        return response.status_code, json.loads(raw)

    async def get(self, path: str, **headers: str) -> Any:
        """GET that must succeed."""
        code, value = await self.call("GET", path, **headers)
        assert code == 200, value
        return value

    async def post(self, path: str, body: Any = ...) -> tuple[int, Any]:
        return await self.call("POST", path, body)

    async def made(self, path: str, body: Any) -> Any:
        code, value = await self.post(path, body)
        assert code == 201, value
        return value

    async def allocation(self, total: Any = "10", **more: Any) -> Any:
        body = {"allocationId": "", "address": self.node.node_id, "paymentPlatform": PLATFORM, "totalAmount": total,
                "spentAmount": "", "remainingAmount": "", "timestamp": "", "makeDeposit": False}  # fmt: skip
        return await self.made("/allocations?maxItems=10", {**body, **more})

    async def event(self, kind: str, name: str, timeout_s: float = 20) -> dict[str, Any]:
        """Return the first event of this type."""
        with within(timeout_s):
            while True:
                for event in await self.get(f"/{kind}Events?timeout=5"):
                    if event["eventType"].endswith(name):
                        return dict(event)
                await trio.sleep(0.05)


@asynccontextmanager
async def one(tmp_path: Path, **flags: Any) -> AsyncIterator[Agent]:
    async with node_in_test(tmp_path / "one", **flags) as node:
        yield Agent(node)


@asynccontextmanager
async def two(tmp_path: Path, offer: dict[str, Any] | None = None, **flags: Any) -> AsyncIterator[tuple[Agent, Agent]]:
    """A requestor's and a provider's node with a session between them, and the agreement `a1` with activity `act`."""
    common = {"chain_dir": tmp_path / "chain", **flags}
    async with node_in_test(tmp_path / "r", **common) as requestor, node_in_test(tmp_path / "p", **common) as provider:
        with within(20):
            while not (provider.network.is_up and requestor.network.is_up and provider.network.addresses):
                await trio.sleep(0.02)
            await requestor.network.connect(provider.network.addresses[0])
        for node, role, session in ((requestor, "Requestor", "r-app"), (provider, "Provider", "p-app")):
            demand = {"golem.com.payment.chosen-platform": PLATFORM}
            fact = AgreementApproved(
                "a1", role, requestor.node_id, provider.node_id, json.dumps(demand), json.dumps(offer or {}), node.clock(),
                session,
            )  # fmt: skip
            await tell(node.system, "negotiation", "ledger", fact)
            await tell(node.system, "activity", "ledger", ActivityKnown("act", "a1"))
        yield Agent(requestor), Agent(provider)


# -- accounts and allocations
@trio_test
async def test_accounts_list_every_platform_of_the_profile(tmp_path: Path) -> None:
    async with one(tmp_path) as agent:
        accounts = await agent.get("/requestorAccounts")
        assert [account["platform"] for account in accounts] == [
            "erc20-local-tglm", "erc20-holesky-tglm", "erc20-hoodi-tglm",
        ]  # fmt: skip
        for account in accounts:
            assert {"driver": "erc20", "token": "tglm", "send": True, "receive": True}.items() <= account.items()
            assert account["address"] == agent.node.node_id


@trio_test
async def test_an_allocation_through_its_life(tmp_path: Path) -> None:
    async with one(tmp_path) as agent:
        made = await agent.allocation("10.50", timeout="2036-11-19T20:02:01.299259+00:00")
        assert made["totalAmount"] == made["remainingAmount"] == "10.5"
        assert made["spentAmount"] == "0"
        assert made["address"] == agent.node.node_id
        assert made["paymentPlatform"] == PLATFORM
        assert made["timeout"] == "2036-11-19T20:02:01.299259Z"
        assert made["makeDeposit"] is False
        assert all(STAMP.match(made[name]) for name in ("timestamp", "timeout", "createdTs", "updatedTs"))
        path = f"/allocations/{made['allocationId']}"
        assert await agent.get(path) == made
        assert await agent.get("/allocations") == [made]
        assert await agent.get("/allocations?afterTimestamp=2040-01-01T00:00:00Z") == []
        code, amended = await agent.call("PUT", path, {"totalAmount": "20"})
        assert (code, amended["totalAmount"], amended["timeout"]) == (200, "20", made["timeout"])
        assert await agent.call("DELETE", path) == (200, None)
        assert agent.content_type == "application/json"
        code, gone = await agent.call("DELETE", path)
        assert (code, gone["message"]) == (410, f"Allocation {made['allocationId']} has been already released")
        assert (await agent.call("GET", path))[0] == 404
        assert (await agent.call("PUT", path, {}))[0] == 404
        assert (await agent.call("DELETE", "/allocations/nothing"))[0] == 404
        assert await agent.get("/allocations") == []


@trio_test
async def test_an_allocation_in_its_shortest_forms(tmp_path: Path) -> None:
    async with one(tmp_path) as agent:
        upper = agent.node.node_id.upper().replace("0X", "0x")
        assert (await agent.allocation(0.1))["totalAmount"] == "0.1"
        plain = await agent.made("/allocations", b'{"totalAmount": 1.000000000000000001, "extendTimeout": 60}')
        assert plain["totalAmount"] == "1.000000000000000001", "a number does not pass through a float"
        assert (plain["address"], plain["paymentPlatform"]) == (agent.node.node_id, PLATFORM)
        assert plain["extendTimeout"] == 60
        assert (await agent.allocation("1", address=upper))["address"] == upper, "SDKs compare it as text"
        parts = {"driver": "erc20", "network": "hoodi"}
        assert (await agent.allocation("1", paymentPlatform=parts))["paymentPlatform"] == "erc20-hoodi-tglm"
        assert (await agent.allocation("1", paymentPlatform={"token": "tglm"}))["paymentPlatform"] == PLATFORM


@trio_test
async def test_budgets_finer_than_a_wei_are_taken(tmp_path: Path) -> None:
    """What SDKs compute of a budget: a third of an hour in Python's decimals and floats, and in JavaScript's numbers."""
    async with one(tmp_path) as agent:
        for asked, reserved in (
            (str(Decimal("0.1") / 3), "0.033333333333333334"),
            (str(Decimal(0.1)), "0.100000000000000006"),  # noqa: RUF032 - a float's 55 digits
            (0.01 / 3, "0.003333333333333334"),
            (0.1 * 1.25 / 3, "0.041666666666666664"),
            ("1e-19", "0.000000000000000001"),
            ("0", "0"),
        ):
            allocation = await agent.made("/allocations", {"paymentPlatform": PLATFORM, "totalAmount": asked})
            assert allocation["totalAmount"] == allocation["remainingAmount"] == reserved, asked


@trio_test
async def test_bills_finer_than_a_wei_are_rounded_down(tmp_path: Path) -> None:
    async with two(tmp_path) as (_, p):
        note = await p.made("/debitNotes", {"activityId": "act", "totalAmountDue": str(Decimal("0.1") / 6)})
        assert note["totalAmountDue"] == "0.016666666666666666"
        invoice = await p.made("/invoices", {"agreementId": "a1", "amount": 0.05 / 3, "paymentDueDate": DUE})
        assert invoice["amount"] == "0.016666666666666666"


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"paymentPlatform": "erc20-holesky-tGLM"}, 400, "lower case"),
        ({"paymentPlatform": "erc20"}, 400, "not a payment platform"),
        ({"paymentPlatform": {"token": "glm"}}, 500, "not registered"),
        ({"paymentPlatform": "erc20-mumbai-tglm"}, 500, "not registered"),
        ({"address": "0x" + "1" * 40}, 500, "not registered"),
        ({"totalAmount": "-1"}, 400, "not an amount"),
        ({"totalAmount": "1e-99999"}, 400, "not an amount"),
        ({"totalAmount": True}, 400, "text or a number"),
        ({"totalAmount": None}, 400, "missing field"),
        ({"timeout": "2001-01-01T00:00:00Z"}, 400, "passed"),
        ({"timeout": "tomorrow"}, 400, "timeout"),
        ({"deposit": {"id": "1", "contract": "0x"}}, 400, "deposits"),
    ],
)
def test_an_allocation_that_cannot_be(tmp_path: Path, change: dict[str, Any], status: int, words: str) -> None:
    async def body() -> None:
        async with one(tmp_path) as agent:
            asked = {"address": agent.node.node_id, "paymentPlatform": PLATFORM, "totalAmount": "1"}
            code, answer = await agent.post("/allocations", {**asked, **change})
            assert code == status
            assert words in answer["message"]
            if "Platform" in str(change) or "address" in change:
                assert agent.content_type == "application/problem+json"
                assert {"type", "detail", "instance"} <= answer.keys()

    trio.run(body)


@trio_test
async def test_decorations(tmp_path: Path) -> None:
    async with one(tmp_path, profile="testnet") as agent:
        assert await agent.get("/providerAccounts") == await agent.get("/requestorAccounts")
        a = (await agent.allocation())["allocationId"]
        b = (await agent.allocation(paymentPlatform="erc20-hoodi-tglm"))["allocationId"]
        key = f"golem.com.payment.platform.{PLATFORM}.address"
        assert await agent.get(f"/demandDecorations?allocationIds={a}") == {
            "properties": [
                {"key": key, "value": agent.node.node_id},
                {"key": "golem.com.payment.protocol.version", "value": "3"},
            ],
            "constraints": [f"({key}=*)", "(golem.com.payment.protocol.version>1)"],
        }
        both = await agent.get(f"/demandDecorations?allocationIds={a},{b}")
        assert both == await agent.get(f"/demandDecorations?allocationIds={a}&allocationIds={b}")
        assert both["constraints"][0].startswith("(|\n  (")
        assert await agent.call("GET", f"/demandDecorations?allocationIds={a},x") == (404, {"message": None})
        assert (await agent.call("GET", "/demandDecorations"))[0] == 400


@trio_test
async def test_decorations_and_accounts_name_the_dev_chain(tmp_path: Path) -> None:
    url = await ensure_devchain(tmp_path / "chain")
    try:
        async with one(tmp_path, chain_url=url) as agent:
            agent.node.payout = Payout("0x" + "7" * 40, "0/7", "xpub")  # the next agreements are paid there
            assert {row["address"] for row in await agent.get("/providerAccounts")} == {"0x" + "7" * 40}
            agent.node.payout = None
            rows = await agent.get("/providerAccounts")
            (name,) = {row.pop("chain") for row in rows}
            assert re.fullmatch("[0-9a-f]{16}", name)
            assert rows == await agent.get("/requestorAccounts")
            assert {row["simulatedBy"] for row in rows} == {f"dev chain at {url}"}
            payer = "0x" + "7" * 40
            nothing = {"address": payer, "platform": PLATFORM, "amount": "0"}
            assert await agent.get(f"/payers/{payer}/funds?platform={PLATFORM}") == nothing
            for bad in (f"/payers/0x7/funds?platform={PLATFORM}", f"/payers/{payer}/funds?platform=x", f"/payers/{payer}/funds"):
                assert (await agent.call("GET", bad))[0] == 400
            allocation = (await agent.allocation())["allocationId"]
            found = await agent.get(f"/demandDecorations?allocationIds={allocation}")
            assert found["properties"][-1] == {"key": "golem.com.payment.local-chain", "value": name}
            assert found["constraints"] == [
                f"(golem.com.payment.platform.{PLATFORM}.address=*)", "(golem.com.payment.protocol.version>1)",
                f"(golem.com.payment.local-chain={name})",
            ]  # fmt: skip
    finally:
        await stop_devchain(tmp_path / "chain")


@trio_test
async def test_a_dev_chain_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port, "NAME_WAIT_S", 0.05)
    for flags, words in (({}, "is not up: see devchain.log"), ({"chain_url": NOBODY}, f"{NOBODY} (--chain-url) does not answer")):
        async with one(tmp_path, **flags) as agent:
            allocation = (await agent.allocation())["allocationId"]
            for path in ("/providerAccounts", f"/demandDecorations?allocationIds={allocation}"):
                code, answer = await agent.call("GET", path)
                assert code == 503
                assert words in answer["message"]


@trio_test
async def test_a_chain_that_is_not_reached_at_start_shows_in_the_status_of_the_node(tmp_path: Path) -> None:
    async with one(tmp_path, chain_url=NOBODY) as agent, trio.open_nursery() as nursery:
        nursery.start_soon(agent.node.chain.connect)
        with within(20):
            while not agent.node.network.is_up:
                await trio.sleep(0.02)
            while (problem := (await COMMANDS["status"](agent.node, {}))["problem"]) is None:
                await trio.sleep(0.02)
        assert "has not answered since this node started" in problem
        assert NOBODY.removeprefix("http://") in problem
        (listed,) = (await COMMANDS["payment_status"](agent.node, {}))["problems"]
        assert NOBODY.removeprefix("http://") in listed
        assert {problem["kind"] for problem in await agent.get("/payments/status")} == {"RpcError"}
        assert NOBODY.removeprefix("http://") in (agent.node.health_problem() or "")
        nursery.cancel_scope.cancel()


@trio_test
async def test_cycles_can_be_seen_and_set(tmp_path: Path) -> None:
    async with one(tmp_path) as agent:
        cycle = await agent.get(f"/batchCycle/{PLATFORM}")
        assert cycle["intervalSec"] == 1.0
        assert len(await agent.get("/batchCycles")) == 3
        code, changed = await agent.post("/batchCycle", {"platform": PLATFORM, "intervalSec": 30, "extraPayTimeSec": 5})
        assert (code, changed["intervalSec"], changed["extraPayTimeSec"]) == (200, 30, 5)
        assert await agent.post(f"/batchCycle/{PLATFORM}/now") == (200, None)
        assert (await agent.post("/batchCycle", {"platform": PLATFORM, "intervalSec": 0}))[0] == 400
        assert (await agent.post("/batchCycle", {"platform": PLATFORM, "cron": "* * * * *"}))[0] == 400
        assert (await agent.call("GET", "/batchCycle/erc20-nowhere-glm"))[0] == 404


# -- documents
@trio_test
async def test_a_debit_note_between_two_nodes(tmp_path: Path) -> None:
    async with two(tmp_path) as (r, p):
        new = {"activityId": "act", "totalAmountDue": "0.10", "usageCounterVector": [1.5, 2], "paymentDueDate": None}
        note = await p.made("/debitNotes", new)
        note_id = note["debitNoteId"]
        assert note["status"] == "ISSUED"
        assert (note["issuerId"], note["recipientId"]) == (p.node.node_id, r.node.node_id)
        assert (note["payeeAddr"], note["payerAddr"]) == (p.node.node_id, r.node.node_id)
        assert (note["totalAmountDue"], note["usageCounterVector"], note["paymentPlatform"]) == ("0.1", [1.5, 2], PLATFORM)
        assert not {"previousDebitNoteId", "paymentDueDate"} & note.keys()
        assert STAMP.match(note["timestamp"])
        assert await p.post(f"/debitNotes/{note_id}/send") == (200, None)
        assert await p.post(f"/debitNotes/{note_id}/send") == (200, None)
        assert (await r.event("debitNote", "ReceivedEvent"))["debitNoteId"] == note_id
        received = await r.get(f"/debitNotes/{note_id}")
        assert received == await p.get(f"/debitNotes/{note_id}") == {**note, "status": "RECEIVED"}
        allocation_id = (await r.allocation())["allocationId"]
        accept = {"totalAmountAccepted": "0.1", "allocationId": allocation_id}
        for _ in range(2):
            assert await r.post(f"/debitNotes/{note_id}/accept?timeout={patience(5):g}", accept) == (200, None)
        assert (await p.event("debitNote", "AcceptedEvent"))["debitNoteId"] == note_id
        spent = await r.get(f"/allocations/{allocation_id}")
        assert (spent["spentAmount"], spent["remainingAmount"]) == ("0.1", "9.9")
        second = await p.made("/debitNotes", {"activityId": "act", "totalAmountDue": "0.2"})
        assert second["previousDebitNoteId"] == note_id
        assert [row["debitNoteId"] for row in await p.get("/debitNotes")] == [note_id, second["debitNoteId"]]
        assert (await p.post("/debitNotes", {"activityId": "act", "totalAmountDue": "0.1"}))[0] == 400
        assert (await p.post("/debitNotes", {"activityId": "none", "totalAmountDue": "1"}))[0] == 400
        assert (await r.post("/debitNotes", {"activityId": "act", "totalAmountDue": "1"}))[0] == 400
        assert await r.post(f"/debitNotes/{note_id}/reject", {}) == (501, {"message": None})
        assert (await p.post(f"/debitNotes/{note_id}/cancel"))[0] == 501
        assert (await r.call("GET", f"/debitNotes/{note_id}/payments"))[0] == 501
        explained = await r.get(f"/debitNotes/{note_id}/explain")
        assert explained["status"] == "ACCEPTED"
        assert explained["waiting"].startswith("accepted; payment ordered")
        orders = await r.get(f"/allocations/{allocation_id}/orders")
        assert [(order["documentId"], order["amount"]) for order in orders] == [(note_id, "0.1")]
        assert (await r.get("/payAgreements/a1"))["totalAmountAccepted"] == "0.1"


@trio_test
async def test_what_can_be_wrong_with_accepting(tmp_path: Path) -> None:
    async with two(tmp_path) as (r, p):
        invoice = await p.made("/invoices", {"agreementId": "a1", "amount": "2", "paymentDueDate": DUE})
        path = f"/invoices/{invoice['invoiceId']}"
        assert await p.post(f"{path}/send") == (200, None)
        small = (await r.allocation("1.5"))["allocationId"]
        other = (await r.allocation("5", paymentPlatform="erc20-hoodi-tglm"))["allocationId"]
        for amount, allocation_id, words in (
            ("2.01", small, "Invalid amount accepted"),
            ("2", small, "Not enough funds. Allocated: 1.5 Needed: 2"),
            ("2", other, "on erc20-hoodi-tglm"),
            ("2", "nothing", "not found"),
        ):
            code, answer = await r.post(f"{path}/accept", {"totalAmountAccepted": amount, "allocationId": allocation_id})
            assert code == 400
            assert words in answer["message"]
        assert (await r.post("/invoices/x/accept", {"totalAmountAccepted": "2", "allocationId": small}))[0] == 404
        assert (await r.post(f"{path}/accept", {"totalAmountAccepted": "2"}))[0] == 400
        assert (await r.get(path))["status"] == "RECEIVED"
        reject = {"rejectionReason": "BAD_SERVICE", "totalAmountAccepted": "0.00", "message": "no"}
        assert (await r.post(f"{path}/reject", {**reject, "rejectionReason": "MOOD"}))[0] == 400
        assert await r.post(f"{path}/reject", reject) == (200, None)
        event = await p.event("invoice", "RejectedEvent")
        assert event["rejection"] == {"rejectionReason": "BAD_SERVICE", "totalAmountAccepted": "0", "message": "no"}
        second = await p.made("/invoices", {"agreementId": "a1", "amount": "1", "paymentDueDate": DUE, "activityIds": ["act"]})
        path = f"/invoices/{second['invoiceId']}"
        assert second["activityIds"] == ["act"]
        await p.post(f"{path}/send")
        assert await p.post(f"{path}/cancel") == (200, None)
        assert (await r.event("invoice", "CancelledEvent"))["invoiceId"] == second["invoiceId"]
        assert (await r.post(f"{path}/accept", {"totalAmountAccepted": "1", "allocationId": small}))[0] == 400
        assert (await p.post("/invoices", {"agreementId": "a9", "amount": "1", "paymentDueDate": DUE}))[0] == 400
        assert (await p.post("/invoices", {"agreementId": "a1", "amount": "1"}))[0] == 400


@trio_test
async def test_events_are_filtered_by_role_session_and_time(tmp_path: Path) -> None:
    async with two(tmp_path) as (r, p):
        for amount in ("1", "2"):
            invoice = await p.made("/invoices", {"agreementId": "a1", "amount": amount, "paymentDueDate": DUE})
            await p.post(f"/invoices/{invoice['invoiceId']}/send")
        assert await p.get("/invoiceEvents?timeout=0") == [], "a provider does not see its own sending"
        seen = await p.get("/invoiceEvents?timeout=0", **{"X-Provider-Events": "received"})
        assert [event["eventType"] for event in seen] == ["InvoiceReceivedEvent"] * 2
        events = await r.get(f"/invoiceEvents?timeout={patience(5):g}&appSessionId=r-app")
        assert len(events) == 2
        assert (await r.get("/invoiceEvents?timeout=5&maxEvents=1")) == events[:1]
        assert await r.get("/invoiceEvents?timeout=0&appSessionId=another") == []
        first = events[0]["eventDate"].replace("Z", "%2B00:00")
        assert await r.get(f"/invoiceEvents?timeout=0&afterTimestamp={first}") == events[1:]
        started = trio.current_time()
        assert await r.get(f"/invoiceEvents?timeout=0.3&afterTimestamp={events[1]['eventDate']}") == []
        assert trio.current_time() - started >= 0.3
        assert (await r.call("GET", "/invoiceEvents", **{"X-Requestor-Events": "FOO"}))[0] == 400
        assert (await r.call("GET", "/invoiceEvents?afterTimestamp=x"))[0] == 400
        assert (await r.call("GET", "/invoiceEvents?timeout=-1"))[0] == 400


@trio_test
async def test_sending_to_who_is_not_there_is_504_and_says_so(tmp_path: Path) -> None:
    async with one(tmp_path) as p:
        stranger = "0x" + "5" * 40
        demand = json.dumps({"golem.com.payment.chosen-platform": PLATFORM})
        fact = AgreementApproved("a1", "Provider", stranger, p.node.node_id, demand, "{}", p.node.clock(), None)
        await tell(p.node.system, "negotiation", "ledger", fact)
        invoice = await p.made("/invoices", {"agreementId": "a1", "amount": "1", "paymentDueDate": DUE})
        path = f"/invoices/{invoice['invoiceId']}"
        code, answer = await p.post(f"{path}/send?timeout=0.3")
        assert (code, stranger in answer["message"]) == (504, True)
        with within(10):
            while "not delivered" not in (await p.get(f"{path}/explain"))["waiting"]:
                await trio.sleep(0.05)
        assert (await p.get(path))["status"] == "ISSUED"
        assert (await p.post(f"{path}/cancel?timeout=0.2"))[0] == 504
        assert (await p.post("/invoices/none/send"))[0] == 404


@trio_test
async def test_allocations_are_released_by_id_by_age_or_all(tmp_path: Path) -> None:
    async with node_in_test(tmp_path) as node:
        agent, release = Agent(node), COMMANDS["payment_release_allocations"]
        ids = sorted([(await agent.allocation("5"))["allocationId"] for _ in range(3)])
        for wrong in ([ids[0], "nonsense"], [""]):
            with pytest.raises(LookupError):
                await release(node, {"ids": wrong, "older_than_s": 0})
        assert await release(node, {"ids": [], "older_than_s": 3600}) == []
        assert len(await agent.get("/allocations")) == 3, "nothing is released by what is refused, or is too young"
        [freed] = await release(node, {"ids": [ids[0]], "older_than_s": 0})
        assert (freed["allocationId"], freed["amount"], freed["agent"]) == (ids[0], "5", "autoconfigured")
        assert sorted(row["allocationId"] for row in await agent.get("/allocations")) == ids[1:]
        assert len(await release(node, {})) == 2
        assert await agent.get("/allocations") == []


# -- money
@pytest.mark.integration
@trio_test
async def test_an_invoice_is_settled_on_both_nodes_by_a_real_transfer(tmp_path: Path) -> None:
    try:
        async with two(tmp_path, skip_allocation_validation=False) as (r, p), trio.open_nursery() as nursery:
            nursery.start_soon(r.node.chain.connect)
            nursery.start_soon(p.node.chain.connect)
            asked = {"totalAmount": "5", "paymentPlatform": PLATFORM}
            code, poor = await r.post("/allocations", asked)
            assert (code, r.content_type) == (400, "application/problem+json")
            assert (poor["requestedFunds"], poor["availableFunds"], poor["reservedFunds"]) == ("5", "0", "0")
            assert poor["requestBody"] == asked
            await r.node.chain.fund("holesky")
            allocation_id = (await r.allocation("5"))["allocationId"]
            code, poor = await r.post("/allocations", {"totalAmount": "996", "paymentPlatform": "erc20-hoodi-tglm"})
            assert (code, poor["availableFunds"], poor["reservedFunds"]) == (400, "995", "5"), (
                "platforms of one chain share the purse"
            )
            holds = [(held["allocationId"], held["amount"], held["agent"]) for held in poor["heldBy"]]
            assert holds == [(allocation_id, "5", "autoconfigured")]
            assert f"held: 5 by {allocation_id} of autoconfigured on {PLATFORM}" in poor["detail"]
            told = await COMMANDS["payment_status"](r.node, {"network": "hoodi"})
            assert (told["reserved"], told["heldBy"]) == ("5", poor["heldBy"]), "the twin's status names it as well"
            note = await p.made("/debitNotes", {"activityId": "act", "totalAmountDue": "0.25"})
            invoice = await p.made("/invoices", {"agreementId": "a1", "amount": "1", "paymentDueDate": DUE})
            note_id, invoice_id = note["debitNoteId"], invoice["invoiceId"]
            for path, amount in ((f"/debitNotes/{note_id}", "0.25"), (f"/invoices/{invoice_id}", "1")):
                assert await p.post(f"{path}/send") == (200, None)
                accept = {"totalAmountAccepted": amount, "allocationId": allocation_id}
                assert await r.post(f"{path}/accept", accept) == (200, None)
            assert await r.call("DELETE", f"/allocations/{allocation_id}") == (200, None), "what is owed gets paid"
            for agent in (r, p):
                with within(40):
                    while (await agent.get(f"/invoices/{invoice_id}"))["status"] != "SETTLED":
                        await trio.sleep(0.1)
                assert (await agent.get(f"/debitNotes/{note_id}"))["status"] == "SETTLED"
            assert (await p.event("invoice", "SettledEvent"))["invoiceId"] == invoice_id
            balances = await p.node.chain.balances("holesky")
            assert balances.token_wei == 10**18
            paid = await p.get("/payments")
            assert sum(Decimal(each["amount"]) for each in paid) == 1
            assert all(len(base64.b64decode(each["details"])) == 32 for each in paid)
            assert await p.get("/payments?appSessionId=p-app") == paid
            assert await p.get("/payments?network=hoodi&timeout=0") == []
            assert await p.get(f"/payments?timeout=0&afterTimestamp={paid[-1]['timestamp']}") == []
            assert await p.get(f"/invoices/{invoice_id}/payments") != []
            sent = await r.get("/payments")
            assert [each["paymentId"] for each in sent] == [each["paymentId"] for each in paid]
            parts = [*sent[0]["agreementPayments"], *sent[0]["activityPayments"]]
            assert all(part["allocationId"] == allocation_id for part in parts)
            assert (await r.get(f"/payments/{sent[0]['paymentId']}"))["details"] == sent[0]["details"]
            assert await r.get("/payments/status") == []
            batches = await r.get("/batchOrders")
            assert all(batch["state"] == "CONFIRMED" for batch in batches)
            explained = await r.get(f"/invoices/{invoice_id}/explain")
            assert {each["state"] for each in explained["payments"]} <= {"SENT", "ACKNOWLEDGED"}
            for debt in (invoice_id, batches[0]["id"]):
                told = await COMMANDS["payment_trace"](r.node, {"id": debt})
                (transaction,) = told["batches"][-1]["chain"]["transactions"]
                assert transaction["state"] == "confirmed"
                assert [seen["what"].split()[0] for seen in transaction["seen"]] == ["signed", "receipt", "confirmed"]
            batch = {"batch": told["batches"][-1]["batchId"], "paid_by": None}
            with pytest.raises(ValueError, match="nothing to decide"):
                await COMMANDS["payment_decide"](r.node, batch)
            nursery.cancel_scope.cancel()
    finally:
        await stop_devchain(tmp_path / "chain")


async def developer(folder: Path, method: str, *params: Any) -> Any:
    """A call that only the developer of a dev chain may make."""
    info = json.loads((folder / INFO_NAME).read_text())
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    async with httpx.AsyncClient(trust_env=False, headers={"Authorization": f"Bearer {info['token']}"}) as client:
        return (await client.post(f"http://127.0.0.1:{info['port']}", json=body)).json()["result"]


@pytest.mark.integration
@trio_test
async def test_both_sides_are_told_when_the_chain_loses_a_payment_until_it_is_there_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "WATCH_S", 0.1)
    monkeypatch.setattr(watch, "WATCH_S", 0.1)
    chain = tmp_path / "chain"

    async def problems(agent: Agent) -> str:
        return " ".join(each["message"] for each in await agent.get("/payments/status"))

    async def until(agent: Agent, *words: str) -> str:
        """Wait for a problem with all these words, or for none."""
        with within(40):
            while True:
                said = await problems(agent)
                if all(word in said for word in words) and bool(said) == bool(words):
                    return said
                await trio.sleep(0.05)

    try:
        async with two(tmp_path) as (r, p), trio.open_nursery() as nursery:
            payer = trio.CancelScope()

            async def pays() -> None:
                with payer:
                    await r.node.chain.connect()

            nursery.start_soon(pays)
            nursery.start_soon(p.node.chain.connect)
            await r.node.chain.fund("holesky")
            allocation_id = (await r.allocation("5"))["allocationId"]
            before = await developer(chain, "evm_snapshot")
            invoice = await p.made("/invoices", {"agreementId": "a1", "amount": "1", "paymentDueDate": DUE})
            path = f"/invoices/{invoice['invoiceId']}"
            assert await p.post(f"{path}/send") == (200, None)
            accept = {"totalAmountAccepted": "1", "allocationId": allocation_id}
            assert await r.post(f"{path}/accept", accept) == (200, None)
            with within(40):
                while (await p.get(path))["status"] != "SETTLED":
                    await trio.sleep(0.05)
            (paid,) = (await p.get(f"{path}/explain"))["payments"]
            payer.cancel()
            await developer(chain, "evm_revert", before)
            payment_id, tx_hash = paid["paymentId"], paid["transaction"]
            await until(p, "has lost that block", payment_id, tx_hash, "1 tGLM", r.node.node_id, "golem payment decide")
            explained = await p.get(f"{path}/explain")
            assert (explained["status"], "has lost that block" in explained["waiting"]) == ("SETTLED", True)
            for debt in (payment_id, tx_hash, invoice["invoiceId"]):
                (told,) = (await COMMANDS["payment_trace"](p.node, {"id": debt}))["received"]
                assert (told["paymentId"], "has lost that block" in told["lost"]) == (payment_id, True)
            (sender,) = r.node.chain._engines.values()
            await sender.step()
            await until(r, "has lost blocks")
            payer = trio.CancelScope()
            nursery.start_soon(pays)
            await until(r)
            await until(p)
            assert (await p.node.chain.balances("holesky")).token_wei == 10**18
            nursery.cancel_scope.cancel()
    finally:
        await stop_devchain(chain)


@trio_test
async def test_a_bill_that_no_clock_explains_is_refused_with_the_figure(tmp_path: Path) -> None:
    prices = {
        "golem.com.pricing.model.linear.coeffs": [0.001, 0.0],
        "golem.com.usage.vector": ["golem.usage.duration_sec"],
    }
    async with two(tmp_path, prices) as (r, p):
        body = {"activityId": "act", "totalAmountDue": "0.999", "usageCounterVector": [999.0]}
        note = await p.made("/debitNotes", body)
        code, answer = await p.post(f"/debitNotes/{note['debitNoteId']}/send")
        assert code == 400
        assert "more than" in answer["message"]
        most = answer["highestAmount"]
        assert Decimal("0.005") <= Decimal(most) < Decimal("0.1")
        assert (await r.call("GET", f"/debitNotes/{note['debitNoteId']}"))[0] == 404
        explained = await r.get("/explain/a1")
        assert [one["id"] for one in explained["refused"]] == [note["debitNoteId"]]
        second = await p.made("/debitNotes", {**body, "totalAmountDue": most})
        assert await p.post(f"/debitNotes/{second['debitNoteId']}/send") == (200, None)
        explained = await r.get(f"/explain/{second['debitNoteId']}")
        (counter,) = explained["calculation"]["counters"]
        assert counter["usageThatCounts"] == counter["ceiling"] < 999
        assert Decimal(explained["calculation"]["highestAmount"]) >= Decimal(most)
        invoice = await p.made("/invoices", {"agreementId": "a1", "amount": "5", "paymentDueDate": DUE, "activityIds": ["act"]})
        assert (await p.post(f"/invoices/{invoice['invoiceId']}/send"))[0] == 400
        assert (await r.call("GET", "/explain/nothing"))[0] == 404


@trio_test
async def test_a_note_that_was_not_accepted_is_explained_by_its_invoice(tmp_path: Path) -> None:
    prices = {"golem.com.pricing.model.linear.coeffs": [0.001, 0.0], "golem.com.usage.vector": ["golem.usage.duration_sec"]}
    async with two(tmp_path, prices) as (r, p):
        body = {"activityId": "act", "totalAmountDue": "0.0001", "usageCounterVector": [0.1]}
        note = await p.made("/debitNotes", body)
        assert await p.post(f"/debitNotes/{note['debitNoteId']}/send") == (200, None)
        explained = await r.get(f"/explain/{note['debitNoteId']}")
        assert explained["waiting"] == "waiting for the requestor to accept"
        (counter,) = explained["calculation"]["counters"]
        assert counter["usageThatCounts"] == 0.1
        (counter,) = (await r.get("/explain/a1"))["calculation"]["activities"]["act"]["counters"]
        assert sorted(counter) == ["ceiling", "counter", "price"], "a ceiling was not counted by anybody"
        invoice = await p.made("/invoices", {"agreementId": "a1", "amount": "0.0001", "paymentDueDate": DUE})
        assert await p.post(f"/invoices/{invoice['invoiceId']}/send") == (200, None)
        allocation = await r.allocation("5")
        accept = {"totalAmountAccepted": "0.0001", "allocationId": allocation["allocationId"]}
        assert await r.post(f"/invoices/{invoice['invoiceId']}/accept", accept) == (200, None)
        words = f"nothing: its amount is part of invoice {invoice['invoiceId']}, which is ACCEPTED"
        for path in (f"/explain/{note['debitNoteId']}", f"/debitNotes/{note['debitNoteId']}/explain"):
            assert (await r.get(path))["waiting"].startswith(words)
