"""Creations that are sent again, and creations for clients that leave: nothing is made twice, and nothing for nobody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio
from worlds.node_in_test import HEADERS, node_in_test, rest_in_test
from worlds.patience import within
from worlds.playbook import playbook
from worlds.support import tell, trio_test

from actors import creations
from actors.creations import Creations
from golem.node.node import Node
from golem.rest.app import create_app
from golem.rest.repeatable import HEADER
from protocol.activity import ActivityKnown
from protocol.creations import BeginCreation, Creation, EndCreation
from protocol.negotiation import AgreementApproved
from protocol.types import Done, Refused

PLATFORM, PEER, SOLD, BOUGHT = "erc20-holesky-tglm", "0x" + "7" * 40, "5" * 64, "6" * 64
DUE = "2031-01-01T00:00:00Z"
TERMS = {"properties": {"golem.runtime.name": "vm"}, "constraints": "()"}
CREATIONS: dict[str, tuple[str, Any]] = {
    "allocation": ("/payment-api/v1/allocations", {"totalAmount": "1.5", "paymentPlatform": PLATFORM, "timeout": DUE}),
    "debit note": ("/payment-api/v1/debitNotes", {"activityId": "act", "totalAmountDue": "0.1"}),
    "invoice": (
        "/payment-api/v1/invoices", {"agreementId": SOLD, "activityIds": ["act"], "amount": "0.5", "paymentDueDate": DUE}
    ),
    "scan": ("/market-api/v1/scan", {"type": "offer", "constraints": "(golem.runtime.name=vm)"}),
    "demand": ("/market-api/v1/demands", TERMS),
    "offer": ("/market-api/v1/offers", TERMS),
    "activity": ("/activity-api/v1/activity?timeout=600", BOUGHT),
}  # fmt: skip
LAST_STEP_S = 0.5  # a node where nothing happens takes no steps
ME = Creations("0x" + "1" * 40)


async def begin(node: Node) -> None:
    """An agreement that we sold, with an activity, and one that we bought, whose provider is never there."""
    system, demand = node.system, json.dumps({"golem.com.payment.chosen-platform": PLATFORM})
    sold = AgreementApproved(SOLD, "Provider", PEER, node.node_id, demand, "{}", node.clock(), "session")
    bought = AgreementApproved(BOUGHT, "Requestor", node.node_id, PEER, demand, "{}", node.clock(), "session")
    for fact, actor in ((sold, "ledger"), (bought, "activity")):
        await tell(system, "negotiation", actor, fact)
    await tell(system, "activity", "ledger", ActivityKnown("act", SOLD))


async def post(client: Any, kind: str, key: str | None = None, **changes: Any) -> tuple[int, Any]:
    path, body = CREATIONS[kind]
    headers = HEADERS | ({HEADER: key} if key is not None else {})
    with within(30):
        answer = await client.post(path, data=json.dumps({**body, **changes} if changes else body), headers=headers)
        return answer.status_code, json.loads(await answer.get_data())


def made(node: Node) -> dict[str, int]:
    """How many things of each kind there are that cost something or that others see."""
    ledger, market, rows = (node.system.rows(name) for name in ("ledger", "market", "activity"))
    return {
        "allocation": sum(row.released_at is None for _, row in ledger.prefix("allocation/")),
        "debit note": len(list(ledger.prefix("debit-note/"))),
        "invoice": len(list(ledger.prefix("invoice/"))),
        "scan": len(list(market.prefix("scan/"))),
        "demand": len(list(market.prefix("demand/"))),
        "offer": len(market.get("own").offers if market.get("own") else ()),
        "activity": sum(not (row.ended or row.destroying) for _, row in rows.prefix("activity/")),
    }


@pytest.mark.parametrize("kind", [one for one in CREATIONS if one not in ("activity", "scan")])
@trio_test
async def test_the_same_key_and_body_get_the_same_answer_over_a_restart(tmp_path: Path, kind: str) -> None:
    async with rest_in_test(tmp_path, profile="testnet") as (node, client):
        await begin(node)
        first = await post(client, kind, "mine")
        assert first[0] == 201, first
        assert await post(client, kind, "mine") == first
        status, refused = await post(client, kind, "mine", extra=1)
        assert (status, HEADER in refused["message"]) == (422, True), refused
        assert made(node)[kind] == 1
    async with rest_in_test(tmp_path, profile="testnet") as (node, client):
        assert await post(client, kind, "mine") == first
        assert made(node)[kind] == 1
        status, other = await post(client, kind, "another")
        assert (status, other != first[1]) == (201, True)


@pytest.mark.parametrize("kind", [one for one in CREATIONS if one not in ("activity", "scan")])
@trio_test
async def test_what_was_made_before_its_answer_was_lost_is_not_made_again(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rest_in_test(tmp_path, profile="testnet") as (node, client):
        await begin(node)
        ask = node.system.ask

        async def crash(actor: str, message: Any, *rest: Any, **more: Any) -> Any:
            if isinstance(message, EndCreation):
                raise RuntimeError("the power is cut")
            return await ask(actor, message, *rest, **more)

        monkeypatch.setattr(node.system, "ask", crash)
        assert (await post(client, kind, "mine"))[0] == 500
    async with rest_in_test(tmp_path, profile="testnet") as (node, client):
        status, answer = await post(client, kind, "mine")
        assert status == 201, answer
        assert made(node)[kind] == 1


@trio_test
async def test_a_refused_creation_keeps_no_key_and_a_bad_key_is_named(tmp_path: Path) -> None:
    async with rest_in_test(tmp_path, profile="testnet") as (node, client):
        assert (await post(client, "allocation", "k", timeout="2001-01-01T00:00:00Z"))[0] == 400
        assert (await post(client, "allocation", "k"))[0] == 201
        for bad in ("", "x" * 256, "a\tb"):
            status, answer = await post(client, "allocation", bad)
            assert (status, HEADER in answer["message"]) == (400, True)
        assert made(node)["allocation"] == 1


class Visit(trio.abc.Instrument):
    """One request of a client that leaves at the n-th step that any task takes."""

    def __init__(self, app: Any, kind: str, left: int) -> None:
        self.app, self.left, self.gone, self.status = app, left, trio.Event(), 0
        self.path, body = CREATIONS[kind]
        self.events: list[dict[str, Any]] = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.left -= 1
        if self.left == 0:
            self.gone.set()

    async def receive(self) -> dict[str, Any]:
        if self.events:
            return self.events.pop()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, event: dict[str, Any]) -> None:
        self.status = event.get("status", self.status)
        await trio.lowlevel.checkpoint()

    async def __call__(self) -> None:
        path, _, query = self.path.partition("?")
        headers = [(name.lower().encode(), value.encode()) for name, value in {**HEADERS, "Host": "127.0.0.1"}.items()]
        scope = {
            "type": "http", "http_version": "1.1", "asgi": {"spec_version": "2.3"}, "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": query.encode(), "root_path": "", "headers": headers,
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "extensions": {}, "state": {},
        }  # fmt: skip
        trio.lowlevel.add_instrument(self)
        try:
            with within(30):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.leave_in_the_end)
                    await self.app(scope, self.receive, self.send)
                    nursery.cancel_scope.cancel()
        finally:
            trio.lowlevel.remove_instrument(self)

    async def leave_in_the_end(self) -> None:
        await trio.sleep(LAST_STEP_S)
        self.gone.set()


@pytest.mark.parametrize("kind", CREATIONS)
@trio_test
async def test_nothing_is_left_of_what_was_made_for_a_client_that_leaves_at_any_await(tmp_path: Path, kind: str) -> None:
    """At each await of the first ones, then coarser; an activity waits for ever for a provider that is not there."""
    async with node_in_test(tmp_path, profile="testnet") as node:
        await begin(node)
        app, begun = create_app(node), 0
        for left in (*range(1, 60), *range(60, 300, 17)):
            before, rows = made(node)[kind], node.system.journal.commits
            visit = Visit(app, kind, left)
            await visit()
            if visit.status:  # the answer was on its way already
                if visit.left > 0:
                    break
                continue
            begun += node.system.journal.commits > rows
            assert made(node)[kind] == before, f"left at step {left}"
        assert begun > 3, "no client left in the middle"


# -- the machine
def test_an_agent_has_room_for_so_many_keys_and_pushes_out_none_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(creations, "MAX_KEYS", 3)
    play = playbook(ME)
    for owner, keys in (("a", 5), ("b", 1)):
        for number in range(keys):
            play.at(1)
            assert play.ask(BeginCreation(owner, f"{number}", "d", f"{owner}{number}")) == Creation(f"{owner}{number}", play.now)
    assert [key for key in play.rows if key.startswith("key/")] == ["key/a/2", "key/a/3", "key/a/4", "key/b/0"]
    assert play.ask(EndCreation("a", "4", 201, b"x" * (creations.MAX_ANSWER_BYTES + 1))) == Done()
    again = play.ask(BeginCreation("a", "4", "d", "other"))
    assert (again.seed, again.status) == ("a4", 0)
    assert isinstance(play.ask(BeginCreation("a", "4", "other", "s")), Refused)
    assert play.ask(EndCreation("a", "4", 0, b"")) == Done()
    play.at(creations.KEEP_S + 1)
    assert (dict(play.rows), play.timers) == ({}, {})
