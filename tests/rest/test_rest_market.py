"""The market API of two real nodes: requestor and provider agents through REST, codes and forms to the letter."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from worlds.market_world import DEMAND_CONSTRAINTS, DEMAND_PROPERTIES, OFFER_CONSTRAINTS, OFFER_PROPERTIES
from worlds.node_in_test import HEADERS, node_in_test
from worlds.patience import patience, within
from worlds.support import trio_test

from golem.node.node import Node
from golem.rest.app import create_app
from protocol.types import timestamp, timestamp_text

STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z\Z")
MAX_EVENTS_TEXT = "Invalid maxEvents '200', should be between 1 and 100."
UNKNOWN = "a" * 32 + "-" + "b" * 64
OFFER = {"properties": OFFER_PROPERTIES, "constraints": OFFER_CONSTRAINTS}
DEMAND = {"properties": DEMAND_PROPERTIES, "constraints": DEMAND_CONSTRAINTS}


class Agent:
    """Calls the market API of one node as an agent does."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.client = create_app(node).test_client()

    async def call(self, method: str, path: str, body: Any = ..., **headers: str) -> tuple[int, Any]:
        """Return status and JSON body (None if there is none)."""
        data = None if body is ... else body if isinstance(body, bytes) else json.dumps(body)
        with within(20):
            response = await self.client.open(f"/market-api/v1{path}", method=method, data=data, headers={**HEADERS, **headers})
            raw = await response.get_data()
        if not raw:
            assert "json" not in response.headers["Content-Type"], "JavaScript clients would try to parse the empty body"
            return response.status_code, None
        assert response.headers["Content-Type"].startswith("application/json")
        return response.status_code, json.loads(raw)

    async def get(self, path: str) -> tuple[int, Any]:
        return await self.call("GET", path)

    async def post(self, path: str, body: Any = ...) -> tuple[int, Any]:
        return await self.call("POST", path, body)

    async def made(self, path: str, body: Any = ..., status: int = 200) -> Any:
        """POST that must succeed; return the body."""
        code, value = await self.post(path, body)
        assert code == status, value
        return value

    async def events(self, path: str, timeout_s: float = 10.0) -> list[dict[str, Any]]:
        code, found = await self.get(f"{path}/events?timeout={patience(timeout_s)}&maxEvents=10")
        assert code == 200, found
        return found  # type: ignore[no-any-return]

    async def stream(self, path: str, enough: Callable[[bytes], bool]) -> bytes:
        """Read a stream of server-sent events until there is enough, then hang up (straight through ASGI)."""
        text, done, sent_request = b"", trio.Event(), False
        headers = [(b"host", b"x"), (b"authorization", HEADERS["Authorization"].encode()), (b"accept", b"text/event-stream")]
        full = f"/market-api/v1{path}"
        scope = {
            "type": "http", "http_version": "1.1", "asgi": {"version": "3.0"}, "method": "GET", "scheme": "http",
            "path": full, "raw_path": full.encode(), "query_string": b"", "root_path": "", "headers": headers,
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "extensions": {},
        }  # fmt: skip

        async def receive() -> dict[str, Any]:
            nonlocal sent_request
            if not sent_request:
                sent_request = True
                return {"type": "http.request", "body": b"", "more_body": False}
            await done.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            nonlocal text
            if message["type"] == "http.response.start":
                assert (message["status"], dict(message["headers"])[b"content-type"]) == (200, b"text/event-stream")
            text += message.get("body", b"")
            if enough(text):
                done.set()

        with within(20):
            await self.client.app(scope, receive, send)
        return text


@asynccontextmanager
async def one(tmp_path: Path, **flags: Any) -> AsyncIterator[Agent]:
    async with node_in_test(tmp_path / "one", **flags) as node:
        yield Agent(node)


@asynccontextmanager
async def two(tmp_path: Path) -> AsyncIterator[tuple[Agent, Agent]]:
    """A requestor's and a provider's node with a session between them."""
    async with node_in_test(tmp_path / "r") as requestor, node_in_test(tmp_path / "p") as provider:
        with within(20):
            while not (provider.network.is_up and requestor.network.is_up and provider.network.addresses):
                await trio.sleep(0.02)
            await requestor.network.connect(provider.network.addresses[0])
        yield Agent(requestor), Agent(provider)


class Deal:
    """The usual way from a demand and an offer to an agreement."""

    def __init__(self, r: Agent, p: Agent) -> None:
        self.r, self.p = r, p

    async def begin(self) -> str:
        """Publish both; return the id of the Initial proposal."""
        self.offer_id = await self.p.made("/offers", OFFER, 201)
        self.demand_id = await self.r.made("/demands", DEMAND, 201)
        self.demand, self.offer = f"/demands/{self.demand_id}", f"/offers/{self.offer_id}"
        (self.first_event,) = await self.r.events(self.demand)
        return str(self.first_event["proposal"]["proposalId"])

    async def draft(self) -> str:
        """Negotiate to the provider's Draft; return its id."""
        initial = await self.begin()
        self.countered = await self.r.made(f"{self.demand}/proposals/{initial}", DEMAND)
        (self.at_provider,) = await self.p.events(self.offer)
        self.answer = await self.p.made(f"{self.offer}/proposals/{self.at_provider['proposal']['proposalId']}", OFFER)
        (self.draft_event,) = await self.r.events(self.demand)
        return str(self.draft_event["proposal"]["proposalId"])

    async def pending(self, valid_s: float = 600.0) -> str:
        """Negotiate to an agreement that the provider has; return its id."""
        valid_to = timestamp_text(self.r.node.clock() + valid_s).replace("Z", "+00:00")
        self.valid_to = valid_to
        agreement_id: str = await self.r.made("/agreements", {"proposalId": await self.draft(), "validTo": valid_to})
        assert await self.r.post(f"/agreements/{agreement_id}/confirm?appSessionId=r-1") == (204, None)
        (self.agreement_event,) = await self.p.events(self.offer)
        return agreement_id

    async def approved(self) -> str:
        agreement_id = await self.pending()
        assert await self.p.post(f"/agreements/{agreement_id}/approve?appSessionId=p-1&timeout={patience(10):g}") == (204, None)
        assert await self.r.post(f"/agreements/{agreement_id}/wait?timeout={patience(10):g}") == (204, None)
        return agreement_id


# -- offers and demands


@trio_test
async def test_publish_list_and_withdraw(tmp_path: Path) -> None:
    async with one(tmp_path) as agent:
        nested = {"golem": {"node": {"id": {"name": "x"}}, "empty": {}}, "price": 0.0, "count": 1, "list": [0.0, {"a": 1}]}
        for kind, id_name, owner in (("offers", "offerId", "providerId"), ("demands", "demandId", "requestorId")):
            new_id = await agent.made(f"/{kind}", {"properties": nested, "constraints": "(not a constraint", "x": 1}, 201)
            assert re.fullmatch(r"[0-9a-f]{32}-[0-9a-f]{64}", new_id)
            status, (found,) = await agent.get(f"/{kind}")
            assert status == 200
            assert set(found) == {"properties", "constraints", id_name, owner, "timestamp"}
            assert json.dumps(found["properties"]) == json.dumps(
                {"golem.node.id.name": "x", "golem.empty": {}, "price": 0.0, "count": 1, "list": [0.0, {"a": 1}]}
            )
            assert (found[id_name], found[owner]) == (new_id, agent.node.node_id)
            assert STAMP.match(found["timestamp"])
            assert await agent.call("DELETE", f"/{kind}/{new_id.upper()}") == (204, None)
            assert await agent.get(f"/{kind}") == (200, [])
            again, message = await agent.call("DELETE", f"/{kind}/{new_id}")
            assert again == (410 if kind == "offers" else 404), message
            assert (await agent.call("DELETE", f"/{kind}/{UNKNOWN}"))[0] == 404
            assert (await agent.get(f"/{kind}/{new_id}/events?timeout=0"))[0] == 404


@trio_test
async def test_a_poll_holds_its_time_and_ends_with_the_subscription(tmp_path: Path) -> None:
    async with one(tmp_path) as agent:
        demand_id = await agent.made("/demands", DEMAND, 201)
        before = trio.current_time()
        assert await agent.get(f"/demands/{demand_id}/events?timeout=0.4") == (200, [])
        assert 0.4 <= trio.current_time() - before < patience(2)
        results: list[tuple[int, Any]] = []

        async def poll() -> None:
            results.append(await agent.get(f"/demands/{demand_id}/events?timeout=15"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(poll)
            await trio.testing.wait_all_tasks_blocked(0.05)
            await agent.call("DELETE", f"/demands/{demand_id}")
        assert results[0][0] == 404


@trio_test
async def test_bad_requests_say_what_is_wrong(tmp_path: Path) -> None:
    async with one(tmp_path) as agent:
        demand_id = await agent.made("/demands", DEMAND, 201)
        far, soon = timestamp_text(agent.node.clock() + 60), timestamp_text(agent.node.clock() - 60)
        for method, path, body, status, text in [
            ("POST", "/offers", b"{", 400, "JSON"),
            ("POST", "/offers", {"properties": {}}, 400, "constraints"),
            ("POST", "/offers", {"properties": {"a": 1, "a.b": {"c": "x" * 140_000}}, "constraints": "()"}, 400, "limit"),
            ("POST", "/demands", {"properties": {"a": {"b": 1}, "a.b": 2}, "constraints": "()"}, 400, "two values"),
            ("GET", f"/demands/{demand_id}/events?maxEvents=200", ..., 400, MAX_EVENTS_TEXT),
            ("GET", f"/demands/{demand_id}/events?maxEvents=0", ..., 400, "between 1 and 100"),
            ("GET", "/demands/xyz/events", ..., 400, "Invalid subscription id"),
            ("GET", f"/demands/{UNKNOWN}/events", ..., 404, "not found"),
            ("GET", f"/offers/{demand_id}/events", ..., 404, "not found"),
            ("DELETE", f"/offers/{demand_id}", ..., 404, "not found"),
            ("GET", f"/demands/{demand_id}/proposals/R-{'0' * 64}", ..., 404, "not found"),
            ("GET", f"/demands/{demand_id}/proposals/P-{'0' * 64}", ..., 404, "not found"),
            ("GET", f"/demands/{demand_id}/proposals/{'0' * 64}", ..., 400, "Invalid proposal id"),
            ("POST", f"/demands/{demand_id}/proposals/R-{'0' * 64}", DEMAND, 404, "not found"),
            ("POST", f"/demands/{UNKNOWN}/proposals/R-{'0' * 64}", DEMAND, 400, "not found"),
            ("POST", f"/demands/{demand_id}/proposals/R-{'0' * 64}/reject", {"message": "x"}, 404, "not found"),
            ("POST", f"/demands/{demand_id}/proposals/R-{'0' * 64}/reject", ..., 400, "JSON body"),
            ("POST", f"/demands/{demand_id}/proposals/R-{'0' * 64}/reject", {"message": 1}, 400, "message"),
            ("POST", "/agreements", {"proposalId": "R-" + "0" * 64, "validTo": far}, 400, "not found"),
            ("POST", "/agreements", {"proposalId": "P-" + "0" * 64, "validTo": far}, 400, "Invalid proposal id"),
            ("POST", "/agreements", {"proposalId": "R-" + "0" * 64, "validTo": "soon"}, 400, "validTo"),
            ("POST", "/agreements", {"proposalId": "R-" + "0" * 64, "validTo": soon}, 400, "not found"),
            ("POST", "/agreements", {"proposalId": 4, "validTo": far}, 400, "proposalId"),
            ("GET", "/agreements/zz", ..., 400, "Invalid agreement id"),
            ("GET", f"/agreements/{'0' * 64}", ..., 404, "not found"),
            ("GET", "/agreements?state=Good", ..., 400, "expected one of"),
            ("GET", "/agreements?afterDate=yesterday", ..., 400, "afterDate"),
            ("GET", f"/agreements/{'0' * 64}/terminate/reason", ..., 404, "not found"),
            *[
                ("POST", f"/agreements/{'0' * 64}/{word}", ..., 404, "not found")
                for word in ("confirm", "wait", "cancel", "approve", "reject", "terminate")
            ],
            ("GET", "/agreementEvents?maxEvents=101", ..., 400, "between 1 and 100"),
            ("GET", "/agreementEvents?timeout=soon", ..., 400, "timeout"),
            ("POST", "/scan", {"type": "lies"}, 400, "type"),
            ("POST", "/scan", {"type": "offer", "constraints": "(("}, 400, "do not parse"),
            ("GET", "/scan/77/events", ..., 404, "not found"),
            ("DELETE", "/scan/77", ..., 404, "not found"),
            ("GET", f"/explain?demand={demand_id}", ..., 400, "offer"),
            ("GET", f"/demands/{UNKNOWN}/explain", ..., 404, "not found"),
        ]:
            found, answer = await agent.call(method, path, body)
            assert found == status, (method, path, answer)
            assert text in answer["message"], (method, path, answer)


@trio_test
async def test_offers_survive_a_restart(tmp_path: Path) -> None:
    async with one(tmp_path) as agent:
        offer_id = await agent.made("/offers", OFFER, 201)
        demand_id = await agent.made("/demands", DEMAND, 201)
        before = await agent.get("/offers")
    async with one(tmp_path) as agent:
        assert await agent.get("/offers") == before
        assert await agent.get(f"/offers/{offer_id}/events?timeout=0") == (200, [])
        assert await agent.get(f"/demands/{demand_id}/events?timeout=0") == (200, [])
        assert await agent.call("DELETE", f"/offers/{offer_id}") == (204, None)


@trio_test
async def test_negotiations_and_agreements_survive_restarts(tmp_path: Path) -> None:
    """Both nodes are stopped after each stage: what was said stands, and the talks go on where they were."""
    async with two(tmp_path) as (r, p):
        deal = Deal(r, p)
        draft = await deal.draft()
        path = f"{deal.demand}/proposals/{draft}"
        theirs = f"{deal.offer}/proposals/{deal.at_provider['proposal']['proposalId']}"
        before = await r.get(path), await p.get(theirs)
        assert [status for status, _ in before] == [200, 200]
    async with two(tmp_path) as (r, p):
        assert (await r.get(path), await p.get(theirs)) == before
        valid_to = timestamp_text(r.node.clock() + 600)
        agreement = await r.made("/agreements", {"proposalId": draft, "validTo": valid_to})
        assert await r.post(f"/agreements/{agreement}/confirm") == (204, None)
        (event,) = await p.events(deal.offer)
        assert event["agreement"]["agreementId"] == agreement
    async with two(tmp_path) as (r, p):
        assert (await p.get(f"/agreements/{agreement}"))[1]["state"] == "Pending"
        assert await p.post(f"/agreements/{agreement}/approve?timeout={patience(10):g}") == (204, None)
        assert await r.post(f"/agreements/{agreement}/wait?timeout={patience(10):g}") == (204, None)
    async with two(tmp_path) as (r, p):
        found = [(await side.get(f"/agreements/{agreement}"))[1] for side in (r, p)]
        assert [one["state"] for one in found] == ["Approved", "Approved"]
        assert await p.post(f"/agreements/{agreement}/terminate", {"message": "enough"}) == (200, None)
    async with two(tmp_path) as (r, p):
        with within(20):  # the news may have waited for the restart
            while (await r.get(f"/agreements/{agreement}"))[1]["state"] != "Terminated":
                await trio.sleep(0.05)
        status, reason = await r.get(f"/agreements/{agreement}/terminate/reason")
        assert (status, reason["terminator"], reason["reason"]) == (200, "Provider", {"message": "enough"})


# -- two nodes


@trio_test
async def test_a_node_that_joins_later_finds_the_offer_within_two_seconds(tmp_path: Path) -> None:
    async with node_in_test(tmp_path / "r") as requestor, node_in_test(tmp_path / "p") as provider:
        r, p = Agent(requestor), Agent(provider)
        await p.made("/offers", OFFER, 201)
        demand_id = await r.made("/demands", DEMAND, 201)
        with within(20):
            while not (provider.network.is_up and requestor.network.is_up and provider.network.addresses):
                await trio.sleep(0.02)
        await requestor.network.connect(provider.network.addresses[0])
        (event,) = await r.events(f"/demands/{demand_id}", timeout_s=2.0)
        assert event["proposal"]["issuerId"] == provider.node_id


@trio_test
async def test_negotiation_between_two_nodes(tmp_path: Path) -> None:
    async with two(tmp_path) as (r, p):
        deal = Deal(r, p)
        draft = await deal.draft()
        initial = deal.first_event["proposal"]
        assert set(deal.first_event) == {"eventType", "eventDate", "proposal"}
        assert set(initial) == {"properties", "constraints", "proposalId", "issuerId", "state", "timestamp"}
        assert (initial["state"], initial["issuerId"]) == ("Initial", p.node.node_id)
        assert json.dumps(initial["properties"]) == json.dumps(OFFER_PROPERTIES)  # floats stay floats
        assert deal.countered.startswith("R-")
        at_provider = deal.at_provider["proposal"]
        assert at_provider["proposalId"] == "P-" + deal.countered[2:]
        assert at_provider["origin"] == "127.0.0.1", "the agent may tell a crowd of identities from many people"
        assert (at_provider["state"], at_provider["issuerId"]) == ("Draft", r.node.node_id)
        status, previous = await p.get(f"{deal.offer}/proposals/{at_provider['prevProposalId']}")
        assert (status, previous["issuerId"], previous["state"]) == (200, p.node.node_id, "Initial")
        assert previous["properties"] == OFFER_PROPERTIES
        final = deal.draft_event["proposal"]
        assert (final["prevProposalId"], final["state"]) == (deal.countered, "Draft")
        assert draft == "R-" + deal.answer[2:]
        status, own = await r.get(f"{deal.demand}/proposals/{deal.countered}")
        assert (status, own["issuerId"], own["properties"]) == (200, r.node.node_id, DEMAND_PROPERTIES)
        assert await r.get(f"{deal.demand}/events?timeout=0") == (200, [])  # each event once
        assert (await r.post(f"{deal.demand}/proposals/{deal.countered}", DEMAND))[0] == 400  # own
        assert (await r.post(f"{deal.demand}/proposals/{initial['proposalId']}", DEMAND))[0] == 410  # countered
        status, answer = await r.post(f"{deal.demand}/proposals/{draft}", {**DEMAND, "constraints": "(golem.inf.mem.gib>99)"})
        assert status == 400
        assert "golem.inf.mem.gib>99" in answer["message"]
        status, answer = await r.post("/agreements", {"proposalId": initial["proposalId"], "validTo": "2100-01-01T00:00:00Z"})
        assert (status, "No negotiation with Provider took place" in answer["message"]) == (400, True)
        assert await r.post(f"{deal.demand}/proposals/{draft}/reject", {"message": "too dear", "why": [1.0]}) == (204, None)
        (event,) = await p.events(deal.offer)
        assert event["eventType"] == "ProposalRejectedEvent"
        assert event["proposalId"] == deal.answer
        assert event["reason"] == {"message": "too dear", "why": [1.0]}


@trio_test
async def test_an_agreement_from_create_to_terminate(tmp_path: Path) -> None:
    async with two(tmp_path) as (r, p):
        deal = Deal(r, p)
        agreement_id = await deal.pending()
        path = f"/agreements/{agreement_id}"
        status, agreement = await r.get(path)
        assert status == 200
        assert (agreement["demand"]["demandId"], agreement["offer"]["offerId"]) == (deal.demand_id, deal.offer_id)
        assert (agreement["demand"]["requestorId"], agreement["offer"]["providerId"]) == (r.node.node_id, p.node.node_id)
        assert agreement["demand"]["timestamp"] == agreement["offer"]["timestamp"] == agreement["timestamp"]
        assert timestamp(agreement["validTo"]) == timestamp(deal.valid_to)
        assert (agreement["state"], agreement["appSessionId"]) == ("Pending", "r-1")
        assert "approvedDate" not in agreement
        assert deal.agreement_event["eventType"] == "AgreementEvent"
        assert deal.agreement_event["agreement"]["agreementId"] == agreement_id
        assert deal.agreement_event["agreement"]["state"] == "Pending"
        status, answer = await r.post(f"{path}/confirm")
        assert (status, answer["message"]) == (
            410, f"Agreement [{agreement_id}]. Error: Can't update Agreement state from Pending to Pending."
        )  # fmt: skip
        assert (await r.post(f"{path}/wait?timeout=0.05"))[0] == 408
        assert (await r.post(f"{path}/terminate", {"message": "x"}))[0] == 410
        assert (await r.get(f"{path}/terminate/reason"))[0] == 400
        events: list[Any] = []

        async def wait_for_events() -> None:
            events.append(await r.get("/agreementEvents?timeout=15&maxEvents=100&appSessionId=r-1"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for_events)
            assert await p.post(f"/agreements/P-{agreement_id}/approve?appSessionId=p-1&timeout={patience(10):g}") == (204, None)
            assert await r.post(f"{path}/wait?timeout={patience(10):g}") == (204, None)
            assert f"agreement/{agreement_id}" in r.node.system.rows("activity")  # an activity can be asked for at once
        ((status, (event,)),) = events
        assert (status, event["eventType"], set(event)) == (
            200, "AgreementApprovedEvent", {"eventDate", "agreementId", "eventType"},
        )  # fmt: skip
        assert STAMP.match(event["eventDate"])
        assert (await p.post(f"{path}/approve"))[0] == 410
        for agent, role in ((r, "Requestor"), (p, "Provider")):
            _, approved = await agent.get(path)
            assert approved["state"] == "Approved"
            assert all(len(approved[f"{word}Signature"]) == 130 for word in ("proposed", "approved", "committed"))
            status, (line,) = await agent.get("/agreements?state=Approved&afterDate=2016-11-11T15:12:00Z")
            assert line == {
                "id": agreement_id, "timestamp": approved["timestamp"], "approvedDate": approved["approvedDate"], "role": role,
                "state": "Approved", "peerId": line["peerId"], "runtime": line["runtime"], "validTo": approved["validTo"],
            }  # fmt: skip
            peer = approved["offer"]["providerId"] if role == "Requestor" else approved["demand"]["requestorId"]
            assert (line["peerId"], line["runtime"]) == (peer, approved["offer"]["properties"].get("golem.runtime.name", ""))
        reason = {"message": "Finished", "golem.requestor.code": "Success"}
        assert await r.post(f"{path}/terminate", reason) == (200, None)
        assert (await r.post(f"{path}/terminate", reason))[0] == 410
        assert (await r.post(f"{path}/wait?timeout=1"))[0] == 400
        _, (first, *_) = await p.get("/agreementEvents?appSessionId=p-1")
        assert first["eventType"] == "AgreementApprovedEvent"
        since = first["eventDate"]
        status, (ended,) = await p.get(f"/agreementEvents?timeout={patience(10):g}&afterTimestamp={since}&appSessionId=p-1")
        assert ended == {
            "eventDate": ended["eventDate"], "agreementId": agreement_id, "eventType": "AgreementTerminatedEvent",
            "terminator": "Requestor", "signature": "", "reason": reason,
        }  # fmt: skip
        status, told = await p.get(f"{path}/terminate/reason")
        assert (status, {**told, "eventDate": ""}) == (200, {**ended, "eventDate": ""})
        after = ended["eventDate"].replace("Z", "%2B00:00")
        assert await p.get(f"/agreementEvents?timeout=0.2&afterTimestamp={after}") == (200, [])
        assert await p.get("/agreementEvents?timeout=0.2&appSessionId=other") == (200, [])
        (fresh,) = await r.events(deal.demand)  # both subscriptions live: the pair may negotiate again
        assert (fresh["eventType"], fresh["proposal"]["state"]) == ("ProposalEvent", "Initial")


@trio_test
async def test_reject_cancel_and_bad_order(tmp_path: Path) -> None:
    async with two(tmp_path) as (r, p):
        deal = Deal(r, p)
        agreement_id = await deal.pending()
        path = f"/agreements/{agreement_id}"
        assert (await p.post(f"{path}/cancel"))[0] == 404  # only the requestor may
        assert (await r.post(f"{path}/approve"))[0] == 404  # only the provider may
        assert await p.post(f"{path}/reject", {"message": "busy"}) == (200, None)
        status, answer = await r.post(f"{path}/wait?timeout={patience(10):g}")
        assert (status, answer) == (410, {"message": "Rejected"})
        _, (event,) = await r.get(f"/agreementEvents?timeout={patience(10):g}")
        assert (event["eventType"], event["reason"]) == ("AgreementRejectedEvent", {"message": "busy"})
        assert (await p.post(f"{path}/approve"))[0] == 410

        assert await p.call("DELETE", deal.offer) == (204, None)
        with within(20):
            while f"offer/{deal.offer_id}" in r.node.system.rows("market"):  # gossip tells of the withdrawal
                await trio.sleep(0.02)
        again = Deal(r, p)
        second = await again.pending()
        path = f"/agreements/{second}"
        assert await r.post(f"{path}/cancel", None) == (200, None)
        assert (await r.post(f"{path}/cancel"))[0] == 410
        assert await r.post(f"{path}/wait") == (410, {"message": "Cancelled"})
        _, (first,) = await p.get("/agreementEvents?maxEvents=1")
        assert first["eventType"] == "AgreementRejectedEvent"
        _, (event,) = await p.get(f"/agreementEvents?timeout={patience(10):g}&afterTimestamp={first['eventDate']}")
        assert event["eventType"] == "AgreementCancelledEvent"
        assert event["reason"]["message"]
        assert await p.post(f"{path}/approve") == (410, {"message": "Cancelled"})


@trio_test
async def test_a_rejection_for_now_lets_the_pair_negotiate_again(tmp_path: Path) -> None:
    async with two(tmp_path) as (r, p):
        deal = Deal(r, p)
        agreement_id = await deal.pending()
        reason = {"golem.proposal.rejection.is-final": False, "message": "another requestor was faster"}
        assert await p.post(f"/agreements/{agreement_id}/reject", reason) == (200, None)
        assert await r.post(f"/agreements/{agreement_id}/wait?timeout={patience(10):g}") == (410, {"message": "Rejected"})
        (fresh,) = await r.events(deal.demand)
        assert (fresh["eventType"], fresh["proposal"]["state"]) == ("ProposalEvent", "Initial")
        assert "prevProposalId" not in fresh["proposal"]
        await r.made(f"{deal.demand}/proposals/{fresh['proposal']['proposalId']}", DEMAND)
        (event,) = await p.events(deal.offer)
        assert event["proposal"]["state"] == "Draft"


@trio_test
async def test_unconfirmed_agreements(tmp_path: Path) -> None:
    async with two(tmp_path) as (r, p):
        deal = Deal(r, p)
        draft = await deal.draft()
        body = {"proposalId": draft, "validTo": timestamp_text(r.node.clock() + 1.0)}
        agreement_id = await r.made("/agreements", body)
        assert (await r.post("/agreements", body))[0] == 409
        assert (await r.post(f"/agreements/{agreement_id}/wait"))[0] == 400
        assert (await r.post(f"/agreements/{agreement_id}/terminate"))[0] == 409
        assert (await r.get(f"/agreements/{agreement_id}"))[1]["state"] == "Proposal"
        while r.node.clock() < timestamp(body["validTo"]):
            await trio.sleep(0.05)
        assert (await r.get(f"/agreements/{agreement_id}"))[1]["state"] == "Expired"
        assert (await r.post(f"/agreements/{agreement_id}/wait?timeout=1")) == (410, {"message": "Expired"})
        assert (await r.post(f"/agreements/{agreement_id}/confirm"))[0] == 410


# -- scans and explanations


@trio_test
async def test_scan_by_poll_and_by_stream(tmp_path: Path) -> None:
    async with two(tmp_path) as (r, p):
        scan_id = await r.made("/scan", {"type": "offer", "constraints": "(golem.runtime.name=vm)", "properties": {}}, 201)
        assert scan_id.isdecimal()
        assert await r.get(f"/scan/{scan_id}/events?timeout=0.1") == (200, [])
        offer_id = await p.made("/offers", OFFER, 201)
        await p.made("/offers", {**OFFER, "properties": {"golem.runtime.name": "wasmtime"}}, 201)
        status, (found,) = await r.get(f"/scan/{scan_id}/events?timeout={patience(10):g}&maxEvents=500")
        assert (status, found["offerId"], found["providerId"]) == (200, offer_id, p.node.node_id)
        assert await r.get(f"/scan/{scan_id}/events?timeout=0") == (200, [])
        status, (same,) = await r.get(f"/scan/{scan_id}/events?peerId={p.node.node_id.upper().replace('0X', '0x')}")
        assert same == found
        assert await r.call("DELETE", f"/scan/{scan_id}") == (204, None)
        assert (await r.get(f"/scan/{scan_id}/events"))[0] == 404

        scan_id = await r.made("/scan", {"type": "offer"}, 201)
        text = await r.stream(f"/scan/{scan_id}/events", lambda text: text.count(b"event: offer") == 2)
        data = [json.loads(line[6:]) for line in text.decode().splitlines() if line.startswith("data: ")]
        assert offer_id in [offer["offerId"] for offer in data]


@trio_test
async def test_what_providers_of_matching_offers_said_is_explained(tmp_path: Path) -> None:
    async with two(tmp_path) as (r, p):
        deal = Deal(r, p)

        async def answer() -> tuple[str, str]:
            _, overview = await r.get(f"/demands/{deal.demand_id}/explain")
            (found,) = overview["answers"]
            assert (found["offerId"], found["providerId"]) == (deal.offer_id, p.node.node_id)
            return found["state"], found["message"]

        initial = await deal.begin()
        assert await answer() == ("Initial", "waits for the agent of this node")
        await r.made(f"{deal.demand}/proposals/{initial}", DEMAND)
        assert await answer() == ("Draft", "waits for the provider")
        (event,) = await p.events(deal.offer)
        path = f"{deal.offer}/proposals/{event['proposal']['proposalId']}/reject"
        assert await p.post(path, {"message": "You owe 0.01 GLM here"}) == (204, None)
        await r.events(deal.demand)
        assert await answer() == ("Rejected by the provider", "You owe 0.01 GLM here")


@trio_test
async def test_every_pair_that_does_not_match_can_be_explained(tmp_path: Path) -> None:
    async with two(tmp_path) as (r, p):
        offer_id = await p.made("/offers", OFFER, 201)
        demand_id = await r.made("/demands", {**DEMAND, "constraints": "(&(golem.inf.mem.gib>=64)(golem.inf.gpu=*))"}, 201)
        path = f"/explain?demand={demand_id}&offer={offer_id}"
        with within(20):
            while len((answer := (await r.get(path))[1])["reasons"]) != 2:
                assert re.search("not been heard of|not sent it yet", answer["reasons"][0]["message"])
                await trio.sleep(0.05)
        assert answer["matches"] is False
        assert answer["reasons"][0] == {
            "side": "demand", "clause": "(golem.inf.mem.gib>=64)", "property": "golem.inf.mem.gib", "found": 4.0,
            "message": "demand wants golem.inf.mem.gib>=64 but the offer has 4.0",
        }  # fmt: skip
        assert answer["reasons"][1]["found"] is None
        status, overview = await r.get(f"/demands/{demand_id}/explain")
        assert status == 200
        assert overview["offers"] == {"known": 1, "own": 0, "matching": 0, "notMatching": 1}
        assert overview["nearest"][0]["reasons"] == answer["reasons"]
        assert overview["failingClauses"][0]["offers"] == 1
        good_id = await r.made("/demands", DEMAND, 201)
        assert (await r.get(f"/explain?demand={good_id}&offer={offer_id}")) == (200, {"matches": True, "reasons": []})
        status, answer = await p.get(f"/explain?demand={good_id}&offer={offer_id}")
        assert "demand" in answer["reasons"][0]["message"]


@pytest.mark.parametrize("ends", ["offer", "demand"])
def test_a_withdrawn_subscription_ends_its_negotiation(tmp_path: Path, ends: str) -> None:
    async def body() -> None:
        async with two(tmp_path) as (r, p):
            deal = Deal(r, p)
            draft = await deal.draft()
            if ends == "demand":
                assert await r.call("DELETE", deal.demand) == (204, None)
                status, answer = await r.post(f"{deal.demand}/proposals/{draft}", DEMAND)
                assert status in (400, 410), answer
                return
            assert await p.call("DELETE", deal.offer) == (204, None)
            assert (await p.call("DELETE", deal.offer))[0] == 410
            countered = await r.made(f"{deal.demand}/proposals/{draft}", DEMAND)
            (event,) = await r.events(deal.demand)
            assert (event["eventType"], event["proposalId"]) == ("ProposalRejectedEvent", countered)
            assert "withdrawn" in event["reason"]["message"]

    trio.run(body)
