"""A request that is answered with an error leaves nothing behind, and whatever was taken can be listed afterwards.

Sound requests are bent, one member at a time, by values that no form foresees; after each answer of 400 and above the
journal is as before, to the byte. NOTHING_SEED=N replays one seed.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import trio
from worlds.node_in_test import HEADERS, rest_in_test
from worlds.patience import patience, within
from worlds.support import tell, trio_test

from golem.node.node import Node
from protocol.activity import ActivityKnown
from protocol.negotiation import AgreementApproved

PLATFORM = "erc20-holesky-tglm"
PEER = "0x" + "7" * 40
SEEDS = [int(os.environ["NOTHING_SEED"])] if "NOTHING_SEED" in os.environ else range(3)
ROUNDS = 150
RAW = (  # as they stand in JSON: no library writes some of them
    "null", "true", "[]", "{}", '""', "-1", "0", "1e400", "-1e999", "NaN", "9" * 400, "1.5", '"x"', '"1e400"', '"NaN"', "1e-40",
    '"9999-12-31T23:59:59-23:59"', '"0001-01-01T00:00:00+23:59"', '"1969-12-31T23:59:59Z"', '"2031-13-01T00:00:00Z"',
    '"' + "x" * 5000 + '"', '{"a":{"b":1e400}}', '[{"c":0.1}]', '"\\ud800"', "[" * 300 + "]" * 300, '{"k":1,"k":2}', '"\\u0000"',
    "18446744073709551616", "1e39", '"0x' + "f" * 40 + '"', '[1,2,3]', '["x","x"]', '[1e400]', '[' + "1," * 70_000 + '1]',
)  # fmt: skip
DUE = '"2031-01-01T00:00:00Z"'
#: Method, path, body: each with raw JSON as the values of its members.
SOUND: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("POST", "/payment-api/v1/allocations",
     {"totalAmount": '"1.5"', "paymentPlatform": f'"{PLATFORM}"', "timeout": DUE, "makeDeposit": "false", "address": "null",
      "extendTimeout": "30", "deposit": "null"}),
    ("PUT", "/payment-api/v1/allocations/{allocation}", {"totalAmount": '"2"', "timeout": DUE, "deposit": "null"}),
    ("POST", "/payment-api/v1/debitNotes",
     {"activityId": '"act"', "totalAmountDue": '"0.1"', "usageCounterVector": "[1.5,2]", "paymentDueDate": DUE}),
    ("POST", "/payment-api/v1/invoices",
     {"agreementId": '"sold"', "activityIds": '["act"]', "amount": '"0.5"', "paymentDueDate": DUE}),
    ("POST", "/payment-api/v1/invoices/{invoice}/reject?timeout=0",
     {"rejectionReason": '"BAD_SERVICE"', "totalAmountAccepted": '"0"', "message": '"no"'}),
    ("POST", "/payment-api/v1/invoices/{invoice}/accept?timeout=0",
     {"totalAmountAccepted": '"0.5"', "allocationId": '"{allocation}"'}),
    ("POST", "/payment-api/v1/batchCycle", {"platform": f'"{PLATFORM}"', "intervalSec": "60", "cron": "null",
                                            "extraPayTimeSec": "4"}),
    ("POST", "/market-api/v1/demands", {"properties": '{"golem.node.id.name":"x"}', "constraints": '"(a=b)"'}),
    ("POST", "/market-api/v1/offers", {"properties": '{"golem.runtime.name":"vm"}', "constraints": '"()"'}),
    ("POST", "/market-api/v1/agreements", {"proposalId": '"R-' + "0" * 64 + '"', "validTo": DUE}),
    ("POST", "/market-api/v1/agreements/" + "0" * 64 + "/terminate", {"message": '"x"', "golem.extra": "1"}),
    ("POST", "/activity-api/v1/activity", {"agreementId": '"' + "0" * 64 + '"', "requestorPubKey": "null"}),
    ("POST", "/activity-api/v1/activity/" + "0" * 32 + "/exec", {"text": '"[]"'}),
    ("POST", "/market-api/v1/scan", {"type": '"offer"', "timeout": "5", "constraints": '"()"'}),
    ("DELETE", "/activity-api/v1/activity/" + "0" * 32 + "?timeout=abc", {}),
)  # fmt: skip
LISTS = (
    "/payment-api/v1/allocations", "/payment-api/v1/debitNotes", "/payment-api/v1/invoices", "/payment-api/v1/payments?timeout=0",
    "/payment-api/v1/debitNoteEvents?timeout=0", "/payment-api/v1/invoiceEvents?timeout=0", "/market-api/v1/demands",
    "/market-api/v1/offers", "/market-api/v1/agreements", "/activity-api/v1/activity",
)  # fmt: skip


def kept(node: Node) -> list[tuple[Any, ...]]:
    """All that the journal holds: rows, timers, feeds, mail."""
    db = node.system.journal._writer
    found: list[tuple[Any, ...]] = []
    for table in ("row", "timer", "feed", "outbox", "quarantine"):
        found += [(table, *row) for row in db.execute(f"select * from {table}")]
    return found


async def settled(node: Node) -> list[tuple[Any, ...]]:
    """What the journal holds once nothing moves."""
    before: list[tuple[Any, ...]] = []
    with within(60):
        while (now := kept(node)) != before:
            before = now
            await trio.sleep(0.01)
    return before


async def call(client: Any, method: str, path: str, body: str = "") -> tuple[int, Any]:
    with trio.fail_after(patience(30)):
        response = await client.open(path, method=method, data=body or None, headers=HEADERS)
        raw = await response.get_data()
    return response.status_code, json.loads(raw) if raw else None


def written(members: dict[str, str]) -> str:
    return "{" + ",".join(f"{json.dumps(name)}:{raw}" for name, raw in members.items()) + "}"


@pytest.mark.parametrize("seed", SEEDS)
@trio_test
async def test_an_error_leaves_the_state_as_it_was(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    async with rest_in_test(tmp_path, profile="testnet") as (node, client):
        demand = json.dumps({"golem.com.payment.chosen-platform": PLATFORM})
        fact = AgreementApproved("sold", "Provider", PEER, node.node_id, demand, "{}", node.clock(), "session")
        await tell(node.system, "negotiation", "ledger", fact)
        await tell(node.system, "activity", "ledger", ActivityKnown("act", "sold"))
        names = {}
        for kind, (method, path, members) in (("allocation", SOUND[0]), ("invoice", SOUND[3])):
            status, made = await call(client, method, path, written(members))
            assert status == 201, made
            names[kind] = made[f"{kind}Id"]
        refused = 0
        for _ in range(ROUNDS):
            method, path, members = rng.choice(SOUND)
            bent = dict(members)
            if bent:
                bent[rng.choice([*bent, "zz"])] = rng.choice(RAW)
            body = written(bent) if bent else ""
            for kind, name in names.items():
                path, body = path.replace("{" + kind + "}", name), body.replace("{" + kind + "}", name)
            before = await settled(node)
            status, answer = await call(client, method, path, body)
            where = f"NOTHING_SEED={seed}: {method} {path} {body[:300]} -> {status} {str(answer)[:300]}"
            told = status == 500 and ("Not found" in answer["message"] or "/problems/" in answer.get("type", ""))
            assert status < 500 or told, where  # told: the reference's words for an unknown activity or account
            if status >= 400:
                refused += 1
                assert answer["message"], where
                left = [row[:4] for row in await settled(node) if row not in before]
                assert not left, f"left {left} behind: {where}"
            else:
                for each in LISTS:
                    shown, found = await call(client, "GET", each)
                    assert shown == 200, f"{each} answers {shown} {str(found)[:200]} after {where}"
        assert refused > ROUNDS // 4


@trio_test
async def test_a_number_that_cannot_be_kept_is_named(tmp_path: Path) -> None:
    async with rest_in_test(tmp_path, profile="testnet") as (_, client):
        note = "/payment-api/v1/debitNotes"
        for path, body, name in (
            ("/market-api/v1/demands", '{"properties":{"y":{"z":[0,1e400]}},"constraints":"()"}', "properties.y.z.1"),
            ("/payment-api/v1/allocations", '{"totalAmount":"1","deposit":{"a":-1e999}}', "deposit"),
            (note, '{"activityId":"a","totalAmountDue":"1","usageCounterVector":[1e400]}', "usageCounterVector"),
            ("/payment-api/v1/batchCycle", '{"platform":"x","intervalSec":' + "9" * 400 + "}", "intervalSec"),
            ("/payment-api/v1/allocations", '{"totalAmount":"1","timeout":"9999-12-31T23:59:59-23:59"}', "timeout"),
        ):  # fmt: skip
            status, answer = await call(client, "POST", path, body)
            assert (status, name in answer["message"]) == (400, True), (path, body[:80], status, answer)
