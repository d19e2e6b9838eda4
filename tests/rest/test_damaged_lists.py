"""One damaged row hides no other: lists show the rest and name it; what is told to peers after a restore leaves it out."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from test_rest_payment import PLATFORM, Agent, one
from worlds.node_in_test import HEADERS, rest_in_test
from worlds.patience import within
from worlds.support import tell, trio_test

from golem.control.command import COMMANDS
from golem.node.node import Node
from protocol.activity import ActivityKnown
from protocol.ledger import Recall
from protocol.negotiation import AgreementApproved
from protocol.types import Done

PEER = "0x" + "7" * 40


async def deals(node: Node, *names: str) -> None:
    """Have the ledger know agreements, each with an activity."""
    demand = json.dumps({"golem.com.payment.chosen-platform": PLATFORM})
    for name in names:
        fact = AgreementApproved(name, "Requestor", node.node_id, PEER, demand, "{}", node.clock(), "session")
        await tell(node.system, "negotiation", "ledger", fact)
        await tell(node.system, "activity", "ledger", ActivityKnown(f"of-{name}", name))


def spoil(node: Node, actor: str, key: str) -> None:
    """Flip a bit of a stored row, which no actor remembers: as after a restart."""
    node.system.machine(actor).rows._cache.clear()  # type: ignore[union-attr]
    db = node.system.journal._writer
    (stored,) = db.execute("select body from row where actor=? and key=?", (actor, key)).fetchone()
    db.execute("update row set body=? where actor=? and key=?", (stored[:5] + bytes([stored[5] ^ 1]) + stored[6:], actor, key))


async def listed(agent: Agent, path: str) -> tuple[list[str], str]:
    """Return the ids that a list shows, and which rows it says are damaged."""
    with within(60):
        response = await agent.client.get(f"/payment-api/v1{path}", headers=HEADERS)
        assert response.status_code == 200, await response.get_data()
        rows = json.loads(await response.get_data())
    return [row.get("id") or row["allocationId"] for row in rows], response.headers.get("X-Damaged-Rows", "")


@pytest.mark.integration
@trio_test
async def test_a_list_shows_what_can_be_read_and_names_what_cannot(tmp_path: Path) -> None:
    async with one(tmp_path) as agent:
        node = agent.node
        await deals(node, "a1", "a2", "a3")
        assert await listed(agent, "/payAgreements") == (["a1", "a2", "a3"], "")
        spoil(node, "ledger", "agreement/a2")
        spoil(node, "ledger", "activity/of-a3")
        assert await listed(agent, "/payAgreements") == (["a1", "a3"], "ledger/agreement/a2")
        assert await listed(agent, "/payActivities") == (["of-a1", "of-a2"], "ledger/activity/of-a3")
        assert [row[:2] for row in node.system.damaged()] == [("ledger", "activity/of-a3"), ("ledger", "agreement/a2")]
        code, value = await agent.call("GET", "/payAgreements/a2")
        assert (code, "agreement/a2" in value["message"]) == (500, True), "who asks for it hears that it is damaged"
        waiting = (await COMMANDS["status"](node, {}))["damagedRows"]
        assert {row[1] for row in waiting} == {"agreement/a2", "activity/of-a3"}


@pytest.mark.integration
@trio_test
async def test_a_node_with_a_damaged_offer_starts_and_lists_the_others(tmp_path: Path) -> None:
    async with rest_in_test(tmp_path) as (_, client):
        bodies = [{"properties": {"number": number}, "constraints": "()"} for number in range(3)]
        ids = []
        for body in bodies:
            made = await client.post("/market-api/v1/offers", headers=HEADERS, json=body)
            ids.append(json.loads(await made.get_data()))
    db = sqlite3.connect(tmp_path / "node" / "node.db", isolation_level=None)
    db.execute("update row set body=cast(substr(body, 1, length(body) - 1) || x'00' as blob) where key=?", (f"offer/{ids[1]}",))
    db.close()
    async with rest_in_test(tmp_path) as (node, client):
        assert [row[:2] for row in node.system.damaged()] == [("market", f"offer/{ids[1]}")]
        with within(60):
            response = await client.get("/market-api/v1/offers", headers=HEADERS)
        assert response.headers["X-Damaged-Rows"] == f"market/offer/{ids[1]}"
        assert {row["offerId"] for row in json.loads(await response.get_data())} == {ids[0], ids[2]}
        assert len(await COMMANDS["market_list"](node, {"kind": "offer"})) == 2
        assert await COMMANDS["whole"](node, {"kind": "offer", "id": ids[1][:12]}) == ids[1], "what is damaged has a name"


@pytest.mark.integration
@trio_test
async def test_a_restored_node_with_a_damaged_row_tells_and_asks_for_the_rest(tmp_path: Path) -> None:
    async with one(tmp_path) as agent:
        node = agent.node
        await deals(node, "a1", "a2")
        spoil(node, "ledger", "agreement/a2")
        assert await node.system.ask("ledger", Recall()) == Done()
        assert [row[:2] for row in node.system.damaged()] == [("ledger", "agreement/a2")]
        spoil(node, "ledger", f"told/{PEER}")
        assert await node.system.ask("ledger", Recall()) == Done(), "whom to ask stands in the key"
        assert node.system.journal.last_sent("ledger", f"{PEER}/ledger") >= 2
