"""Polls of the provider agent: what the node's events become, what is looked up, what is left out."""

from __future__ import annotations

import json
from typing import Any

import httpx
import trio
from worlds.support import mock_trio_test

from golem.provider.client import NodeClient
from golem.provider.polls import ProposalCache, follow, watch_offer
from protocol.provider import AgreementArrived, EventArrived, OfferLost, ProposalArrived, WatchOffer
from protocol.types import Violation

OFFER = "/market-api/v1/offers/o1"
DRAFT = {"proposalId": "P-2", "prevProposalId": "P-1", "issuerId": "0x1", "properties": {"a": 1.0}, "constraints": "()",
         "origin": "::1"}  # fmt: skip


class Machine:
    """Stands for the kernel: takes what is asked of the machine."""

    def __init__(self, cursor: float | None = None) -> None:
        self.asked: list[Any] = []
        self.cursor = cursor
        self.refuse: set[str] = set()

    def sound(self, actor: str, key: str) -> Any:
        if self.cursor is None:
            return None
        return type("Cursor", (), {"at": self.cursor})

    async def ask(self, actor: str, message: Any) -> None:
        self.asked.append(message)
        if getattr(message, "subject", "") in self.refuse:
            raise Violation("no")


def node(answers: list[httpx.Response], calls: list[httpx.URL]) -> NodeClient:
    """A node that gives these answers in turn, then holds every poll."""

    async def handle(request: httpx.Request) -> httpx.Response:
        calls.append(request.url)
        if not answers:
            await trio.sleep_forever()
        return answers.pop(0)

    return NodeClient(lambda: "http://node", "key", httpx.MockTransport(handle))


@mock_trio_test
async def test_events_of_an_offer_reach_the_machine_until_the_offer_is_gone() -> None:
    events = [
        {"eventType": "ProposalEvent", "proposal": DRAFT},
        {"eventType": "ProposalEvent"},
        {"eventType": "SomethingNew"},
        {"eventType": "ProposalRejectedEvent", "proposalId": "P-9", "reason": {"message": "no"}},
        {"eventType": "AgreementEvent", "agreement": {"agreementId": "a1"}},
    ]
    ours = {"properties": {"b": 2.0}, "constraints": "(&(x=1))"}
    calls: list[httpx.URL] = []
    answers = [
        httpx.Response(500, text="oops"),
        httpx.Response(200, json=events),
        httpx.Response(200, json=ours),
        httpx.Response(404, json={"message": "gone"}),
    ]
    machine = Machine()
    lost = await watch_offer(node(answers, calls), machine, ProposalCache(), WatchOffer("p", "o1"))  # type: ignore[arg-type]
    assert lost == OfferLost("p", "o1")
    proposal, agreement = machine.asked
    assert proposal == ProposalArrived("p", "o1", "P-2", "0x1", '{"a": 1.0}', '{"b": 2.0}', "(&(x=1))", "::1")
    assert agreement == AgreementArrived("p", "o1", json.dumps({"agreementId": "a1"}))
    assert calls[2].path == f"{OFFER}/proposals/P-1"


@mock_trio_test
async def test_our_own_counter_is_not_looked_up() -> None:
    cache, calls, machine = ProposalCache(), list[httpx.URL](), Machine()
    cache.put("P-1", '{"b": 3.0}', "(&)")
    answers = [httpx.Response(200, json=[{"eventType": "ProposalEvent", "proposal": DRAFT}]), httpx.Response(410)]
    await watch_offer(node(answers, calls), machine, cache, WatchOffer("p", "o1"))  # type: ignore[arg-type]
    assert machine.asked[0].previous == '{"b": 3.0}'
    assert len(calls) == 2


@mock_trio_test
async def test_a_feed_goes_on_from_its_cursor_and_over_what_makes_no_sense() -> None:
    def event(second: int, activity: str, **more: Any) -> dict[str, Any]:
        at = f"2026-01-01T00:00:{second:02d}.000001Z"
        return {"eventDate": at, "activityId": activity, "agreementId": "a1", "eventType": {"CreateActivity": {}}, **more}

    nonsense = {"eventDate": "2026-01-01T00:00:03.000001Z"}
    answers = [
        httpx.Response(408, json={"message": "Timeout"}),
        httpx.Response(200, json=[event(1, "x1"), event(2, "bad"), nonsense]),
        httpx.Response(200, json=[event(4, "x2", eventType={"DestroyActivity": {}})]),
    ]
    calls: list[httpx.URL] = []
    machine = Machine(cursor=1_700_000_000.5)
    machine.refuse.add("bad")
    with trio.move_on_after(60):
        await follow(node(answers, calls), machine, "activities", "session-1", 0.0)  # type: ignore[arg-type]
    assert [(one.kind, one.subject, one.related) for one in machine.asked] == [
        ("CreateActivity", "x1", "a1"), ("CreateActivity", "bad", "a1"), ("DestroyActivity", "x2", "a1"),
    ]  # fmt: skip
    assert all(isinstance(one, EventArrived) and one.feed == "activities" for one in machine.asked)
    after = [url.params["afterTimestamp"] for url in calls]
    assert after[:2] == ["2023-11-14T22:13:20.500000Z"] * 2
    assert after[2:4] == ["2026-01-01T00:00:03.000001Z", "2026-01-01T00:00:04.000001Z"]
    assert {url.params["appSessionId"] for url in calls} == {"session-1"}
