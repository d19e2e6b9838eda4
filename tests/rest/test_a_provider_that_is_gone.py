"""What agents are told when nothing is heard of an exe-unit any more: SDKs look for these words, and take another provider."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from worlds.node_in_test import HEADERS, rest_in_test
from worlds.patience import within
from worlds.support import tell, trio_test

from golem.node.node import Node
from golem.rest import activity as activity_api
from golem.rest.activity import UNREACHABLE
from protocol.activity import CommandResult, CreateActivity, StateChanged, UnitSilent
from protocol.codec import Envelope, encode, encode_batch
from protocol.negotiation import AgreementApproved
from protocol.types import Message, address

AGREEMENT, ACTIVITY, PROVIDER = "e" * 64, "a" * 32, "0x" + "b" * 40
ACTIVITIES = f"/activity-api/v1/activity/{ACTIVITY}"
SCRIPT = '[{"deploy":{}},{"start":{}},{"run":{"entry_point":"hello"}}]'


class Requestor:
    """A node whose provider exists in name only: its messages come from the test."""

    def __init__(self, node: Node, client: Any) -> None:
        self.node, self.client = node, client

    async def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body)
        with within(20):
            answer = await self.client.open(ACTIVITIES + path, method=method, data=data, headers={**HEADERS, **headers})
            return answer.status_code, json.loads(await answer.get_data())

    async def hears(self, actor: str, message: Message) -> None:
        """Have a message arrive as the first one of its link."""
        node, to = self.node, address(self.node.node_id, "activity")
        frame = encode_batch([Envelope(address(PROVIDER, actor), to, "epoch", 1, 0, "trace", encode(message), "boot", "")])
        await node.system.deliver(frame, PROVIDER)

    async def silence(self) -> None:
        """Let the time be over within which a word was expected."""
        system = self.node.system
        await tell(system, "activity", "activity", UnitSilent(ACTIVITY, system.now()))

    async def begin(self) -> None:
        node = self.node
        offer = json.dumps({"golem.runtime.name": "wasmtime"})
        news = AgreementApproved(AGREEMENT, "Requestor", node.node_id, PROVIDER, "{}", offer, time.time(), "session")
        await tell(node.system, "negotiation", "activity", news)
        await node.system.ask("activity", CreateActivity(ACTIVITY, AGREEMENT, 60.0))
        await self.hears("activity", StateChanged(ACTIVITY, "Ready", at=node.clock()))


@trio_test
async def test_agents_are_told_that_an_exe_unit_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with rest_in_test(tmp_path) as (node, client):
        agent = Requestor(node, client)
        await agent.begin()
        status, batch = await agent("POST", "/exec", {"text": SCRIPT})
        assert status == 200
        await agent.silence()
        status, shown = await agent("GET", "/state")
        assert (status, shown["state"]) == (200, ["Unresponsive", None])
        assert (await agent("GET", f"/exec/{batch}"))[1] == []

        told: list[tuple[int, Any]] = []

        async def wait_for_results() -> None:
            told.append(await agent("GET", f"/exec/{batch}?timeout=600"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for_results)
            await trio.testing.wait_all_tasks_blocked(0.1)
            await agent.silence()
        stream = {"Accept": "text/event-stream"}
        told += [await agent("GET", "/state"), await agent("GET", "/command"), await agent("POST", "/exec", {"text": SCRIPT}),
                 await agent("GET", f"/exec/{batch}", **stream), await agent("GET", f"/exec/{batch}?commandIndex=2")]  # fmt: skip
        for status, body in told:
            assert status == 500
            assert body["message"].startswith(UNREACHABLE), body
            assert "nothing was heard of the exe-unit for 70 s" in body["message"]
        monkeypatch.setattr(activity_api, "RETRIES_S", 0.0)
        status, body = await agent("GET", f"/exec/{batch}")  # golem-js would try a 500 again for five minutes
        assert (status, body["message"].startswith(UNREACHABLE)) == (410, True)
        monkeypatch.undo()
        assert (await agent("GET", "/agreement"))[0] == (await agent("GET", "/usage"))[0] == 200

        assert await agent("DELETE", "?timeout=600") == (200, None)
        status, shown = await agent("GET", "/state")
        assert (status, shown["state"], shown["reason"]) == (200, ["Terminated", None], "provider unreachable")
        status, results = await agent("GET", f"/exec/{batch}")
        assert (status, results[-1]["result"], results[-1]["isBatchFinished"]) == (200, "Error", True)


@trio_test
async def test_a_stream_ends_where_results_are_missing_and_nobody_will_bring_them(tmp_path: Path) -> None:
    async with rest_in_test(tmp_path) as (node, client):
        agent = Requestor(node, client)
        await agent.begin()
        _, batch = await agent("POST", "/exec", {"text": SCRIPT})
        done = CommandResult(ACTIVITY, batch, 0, True, None, None, None, node.clock(), False, "Deployed")
        await agent.hears(f"exeunit:{ACTIVITY}", done)
        headers = {**HEADERS, "Accept": "text/event-stream"}
        async with client.request(f"{ACTIVITIES}/exec/{batch}", method="GET", headers=headers) as stream:
            with within(20):
                text = b""
                while b'"finished"' not in text:
                    text += await stream.receive()
                await agent.silence()
                await agent.silence()

                async def read_on() -> None:
                    while True:
                        await stream.receive()

                with pytest.raises(trio.EndOfChannel):  # the end, not a ping for ever
                    await read_on()
