"""Nothing that an agent sends holds the event loop for long: each step is measured in processor time.

The limit is the product's, scaled by how long a fixed piece of work takes here: a slow machine is no fault.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio.testing
from worlds.loop import slowness, watched
from worlds.node_in_test import HEADERS, rest_in_test
from worlds.patience import within
from worlds.support import trio_test

from golem.base.loop_watch import HELD_S

MARKET, PAYMENT, ACTIVITY = "/market-api/v1", "/payment-api/v1", "/activity-api/v1"


def terms(properties: str, constraints: str = "()") -> str:
    return f'{{"properties":{properties},"constraints":{json.dumps(constraints)}}}'


def members(count: int, value: str = "1") -> str:
    return "{" + ",".join(f'"p{n}":{value}' for n in range(count)) + "}"


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


#: What -> (method, path, body). Each is as large as it may be, or larger.
HOSTILE: dict[str, tuple[str, Callable[[], str]]] = {
    "150,000 properties": (f"{MARKET}/demands", lambda: terms(members(150_000))),
    "as many values as are read": (f"{MARKET}/demands", lambda: terms(members(20_000))),
    "as many properties as are taken": (f"{MARKET}/demands", lambda: terms(members(4000))),
    "a list of many": (f"{MARKET}/demands", lambda: terms('{"l":[' + "1," * 20_000 + "1]}")),
    "deep": (f"{MARKET}/demands", lambda: terms(nested(5000))),
    "a long text": (f"{MARKET}/demands", lambda: terms('{"t":"' + "x" * 3_900_000 + '"}')),
    "a text of escapes": (f"{MARKET}/demands", lambda: terms('{"t":"' + "\\u0041" * 600_000 + '"}')),
    "a name of many points": (f"{MARKET}/demands", lambda: terms('{"' + "a." * 1_000_000 + 'b":1}')),
    "long numbers": (f"{MARKET}/demands", lambda: terms('{"n":[' + ",".join(["9" * 80] * 20_000) + "]}")),
    "one long number": (f"{MARKET}/demands", lambda: terms('{"n":' + "9" * 3_000_000 + "}")),
    "a long fraction": (f"{PAYMENT}/allocations", lambda: '{"totalAmount":1.' + "3" * 3_000_000 + "}"),
    "a long amount": (f"{PAYMENT}/allocations", lambda: '{"totalAmount":"1.' + "3" * 3_000_000 + '"}'),
    "many constraints": (f"{MARKET}/demands", lambda: terms("{}", "(&" + "(a=1)" * 200_000 + ")")),
    "deep constraints": (f"{MARKET}/demands", lambda: terms("{}", "(!" * 200_000 + "(a=1)" + ")" * 200_000)),
    "a wild constraint": (f"{MARKET}/demands", lambda: terms("{}", "(a=" + "*x" * 500_000 + ")")),
    "a script of many commands": (f"{ACTIVITY}/activity/{'0' * 32}/exec", lambda: json.dumps({"text": '[{"s":{}},' * 50_000})),
    "many activities": (f"{PAYMENT}/invoices", lambda: '{"agreementId":"x","amount":"1","paymentDueDate":"2031-01-01T00:00:00Z",'
                        '"activityIds":[' + '"a",' * 20_000 + '"a"]}'),
    "a long usage": (f"{PAYMENT}/debitNotes", lambda: '{"activityId":"x","totalAmountDue":"1","usageCounterVector":['
                     + "1.5," * 20_000 + "1]}"),
    "a long reason": (f"{MARKET}/agreements/{'0' * 64}/terminate", lambda: '{"message":"' + "x" * 3_900_000 + '"}'),
    "no JSON": (f"{MARKET}/demands", lambda: "{" * 4_000_000),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
@trio_test
async def test_nothing_that_is_sent_holds_the_loop(tmp_path: Path, what: str) -> None:
    path, made = HOSTILE[what]
    body = made().encode()
    async with rest_in_test(tmp_path, profile="testnet") as (_, client):
        await client.get("/me", headers=HEADERS)  # what is imported with the first request is no fault of it
        worst: list[tuple[float, str]] = []
        for _ in range(2):
            with watched() as watch, within(30):
                answer = await client.post(path, data=body, headers={**HEADERS, "Content-Type": "application/json"})
                raw: Any = await answer.get_data()
                await trio.testing.wait_all_tasks_blocked(0.05)
            worst.append((watch.longest_s, watch.longest_task))
        held_s, task = min(worst)
        print(f"{what}: {answer.status_code}, {1000 * held_s:.1f} ms in {task}")
        assert held_s < HELD_S * slowness(), f"{what} holds the loop for {1000 * held_s:.0f} ms in {task}: {raw[:200]}"
