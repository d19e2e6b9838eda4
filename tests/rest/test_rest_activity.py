"""The activity API of two real nodes, with a real exe-unit between them."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from worlds.node_in_test import HEADERS, rest_in_test
from worlds.patience import patience, within
from worlds.support import tell, trio_test

from actors.kernel.machine import Send
from golem.files.on_disk import FileSink, FileSource
from golem.node.node import Node
from protocol.activity import CommandResult, StateReported
from protocol.negotiation import AgreementApproved
from protocol.states import ActivityState

HELLO = Path(__file__).resolve().parents[2] / "examples" / "hello" / "hello.wasm"
AGREEMENT = "e" * 64
BASE = "/activity-api/v1"


class Side:
    """A node's REST API as its agent sees it."""

    def __init__(self, node: Node, client: Any) -> None:
        self.node, self.client = node, client

    async def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body)
        with within(40):
            response = await self.client.open(BASE + path, method=method, data=data, headers={**HEADERS, **headers})
            raw = await response.get_data()
        return response.status_code, json.loads(raw) if raw else None


class Pair:
    """Requestor, provider, and what runs between them."""

    def __init__(self, requestor: Side, provider: Side, tmp_path: Path, nursery: trio.Nursery) -> None:
        self.r, self.p, self.tmp_path, self.nursery = requestor, provider, tmp_path, nursery
        self.processes: list[trio.Process] = []

    async def approve(self) -> None:
        r, p = self.r.node.node_id, self.p.node.node_id
        offer = json.dumps({"golem.runtime.name": "wasmtime"})
        for side, role in ((self.r, "Requestor"), (self.p, "Provider")):
            approved = AgreementApproved(AGREEMENT, role, r, p, "{}", offer, time.time(), f"session-{role}")
            await tell(side.node.system, "negotiation", "activity", approved)

    async def agent(self) -> None:
        """Answer CreateActivity with an exe-unit and DestroyActivity with SIGTERM, once each."""
        status, events = await self.p("GET", f"/events?afterTimestamp=2020-01-01T00:00:00Z&timeout={patience(20):g}")
        assert status == 200
        [event] = events
        assert event["eventType"] == {"CreateActivity": {}}
        process = await self.start(event["activityId"])
        after = event["eventDate"]
        while True:
            query = f"afterTimestamp={after}&timeout={patience(20):g}&appSessionId=session-Provider"
            status, events = await self.p("GET", f"/events?{query}")
            if status == 200:
                break
        assert events[0]["eventType"] == {"DestroyActivity": {}}
        process.send_signal(signal.SIGTERM)
        await process.wait()

    async def start(self, activity_id: str) -> trio.Process:
        package = f"hash:sha3:{hashlib.sha3_224(HELLO.read_bytes()).hexdigest()}:gftp://{self.r.node.node_id}/package"
        agreement = {
            "agreementId": AGREEMENT,
            "demand": {
                "requestorId": self.r.node.node_id,
                "properties": {"golem.srv.comp.task_package": package},
            },
            "offer": {"providerId": self.p.node.node_id, "properties": {}},
        }
        self.r.node.files.offer("package", FileSource(HELLO), "test")
        (self.tmp_path / "agreement.json").write_text(json.dumps(agreement))
        command = [sys.executable, "-m", "golem.exeunit", "--activity", activity_id]
        command += ["--bus", str(self.p.node.config.bus_path), "--agreement", str(self.tmp_path / "agreement.json")]
        command += ["--work", str(self.tmp_path / activity_id), "--cache", str(self.tmp_path / "cache")]
        process = await trio.lowlevel.open_process(command)
        self.processes.append(process)
        return process

    async def create(self) -> str:
        status, activity_id = await self.r("POST", f"/activity?timeout={patience(20):g}", AGREEMENT)
        assert status == 200, activity_id
        return activity_id

    async def run(self, activity_id: str, *commands: dict[str, Any]) -> list[dict[str, Any]]:
        status, batch_id = await self.r("POST", f"/activity/{activity_id}/exec", {"text": json.dumps(commands)})
        assert status == 200
        status, results = await self.r("GET", f"/activity/{activity_id}/exec/{batch_id}?timeout={patience(30):g}")
        assert status == 200
        return results


@asynccontextmanager
async def pair(tmp_path: Path, connect: bool = True) -> AsyncIterator[Pair]:
    for name in ("r", "p"):
        (tmp_path / name).mkdir()
    async with rest_in_test(tmp_path / "r") as r, rest_in_test(tmp_path / "p") as p, trio.open_nursery() as nursery:
        made = Pair(Side(*r), Side(*p), tmp_path, nursery)
        with within(30):
            while not (r[0].network.is_up and p[0].network.is_up):
                await trio.sleep(0.02)
            if connect:
                await r[0].network.connect(p[0].network.addresses[0])
        await made.approve()
        try:
            yield made
        finally:
            for process in made.processes:
                if process.returncode is None:
                    process.kill()
            nursery.cancel_scope.cancel()


async def until(condition: Callable[[], Any]) -> None:
    with within(20):
        while not condition():
            await trio.sleep(0.02)


def hello(*args: str, **capture: Any) -> dict[str, Any]:
    return {"run": {"entry_point": "hello", "args": list(args), "capture": capture or {"stdout": {"stream": {}}}}}


def runtime_events(text: bytes) -> list[dict[str, Any]]:
    found = []
    for block in text.decode().split("\n\n")[:-1]:
        fields = dict(line.partition(": ")[::2] for line in block.splitlines() if not line.startswith(":"))
        if "data" in fields:
            found.append({**json.loads(fields["data"]), "id": fields["id"], "event": fields["event"]})
    return found


async def sse(side: Side, path: str, enough: Callable[[list[dict[str, Any]]], bool], last_id: str = "") -> list[dict[str, Any]]:
    """Read runtime events until there are enough, then hang up (straight through ASGI)."""
    text, done, sent_request = b"", trio.Event(), False
    wanted = {**HEADERS, "Host": "x", "Accept": "text/event-stream"} | ({"Last-Event-ID": last_id} if last_id else {})
    headers = [(name.lower().encode(), value.encode()) for name, value in wanted.items()]
    full = BASE + path
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
        if enough(runtime_events(text)):
            done.set()

    with within(20):
        await side.client.app(scope, receive, send)
    return runtime_events(text)


@pytest.mark.integration
@trio_test
async def test_an_activity_from_create_to_destroy(tmp_path: Path) -> None:
    async with pair(tmp_path) as w:
        w.nursery.start_soon(w.agent)
        activity = await w.create()
        path = f"/activity/{activity}"
        assert (await w.r("GET", f"{path}/state"))[1] == {"state": ["Initialized", None]}
        assert await w.r("GET", f"{path}/agreement") == (200, AGREEMENT)
        assert await w.r("GET", f"/activity?agreementId={AGREEMENT}") == (200, [activity])
        results = await w.run(activity, {"deploy": {}}, {"start": {"args": []}})
        assert [(one["index"], one["result"], one["isBatchFinished"]) for one in results] == [
            (0, "Ok", False),
            (1, "Ok", True),
        ]
        assert (await w.r("GET", f"{path}/state"))[1] == {"state": ["Ready", None]}
        (tmp_path / "in").write_bytes(b"letter")
        w.r.node.files.offer("in", FileSource(tmp_path / "in"), "test")
        w.r.node.files.offer("slot", FileSink(tmp_path / "out"), "test")
        here = f"gftp://{w.r.node.node_id}"
        results = await w.run(
            activity,
            {"transfer": {"from": f"{here}/in", "to": "container:/in"}},
            hello("World", "/in", "/out", stdout={"atEnd": {"format": "bin"}}),
            {"transfer": {"from": "container:/out", "to": f"{here}/slot"}},
        )
        assert [one["message"] for one in results] == [None] * 3
        assert results[1]["stdout"] == list(b"Hello World\n")
        assert set(results[1]) == {"index", "eventDate", "result", "stdout", "stderr", "message", "isBatchFinished"}
        assert (tmp_path / "out").read_bytes() == b"Hello World\nletter"
        for side in (w.r, w.p):
            status, usage = await side("GET", f"{path}/usage")
            assert status == 200
            assert len(usage["currentUsage"]) == 4
            assert isinstance(usage["timestamp"], int)
        assert (await w.r("GET", f"{path}/command"))[0] == 404
        assert await w.r("DELETE", f"{path}?timeout={patience(20):g}") == (200, None)
        assert await w.r("DELETE", path) == (200, None)
        for side in (w.r, w.p):
            status, state = await side("GET", f"{path}/state")
            assert state == {"state": ["Terminated", None], "reason": "destroyed"}
            assert len((await side("GET", f"{path}/usage"))[1]["currentUsage"]) == 4
        status, body = await w.r("POST", f"{path}/exec", {"text": '[{"start":{}}]'})
        assert status == 500
        assert "GSB error" in body["message"]
        assert "endpoint address not found" in body["message"]


@pytest.mark.integration
@trio_test
async def test_results_as_they_come(tmp_path: Path) -> None:
    async with pair(tmp_path) as w:
        w.nursery.start_soon(w.agent)
        activity = await w.create()
        await w.run(activity, {"deploy": {}}, {"start": {}})
        script = json.dumps([hello("one"), hello("two"), hello("too", "many"), hello("never")])
        _, batch = await w.r("POST", f"/activity/{activity}/exec", {"text": script})
        path = f"/activity/{activity}/exec/{batch}"

        def over(events: list[dict[str, Any]]) -> bool:
            return any("finished" in event["kind"] and event["kind"]["finished"]["return_code"] for event in events)

        events = await sse(w.r, path, over)
        assert [event["id"] for event in events] == [str(number) for number in range(len(events))]
        assert {event["event"] for event in events} == {"runtime"}
        assert {event["batch_id"] for event in events} == {batch}
        assert events[0]["kind"] == {"started": {"command": hello("one")}}
        assert "".join(event["kind"].get("stdout", "") for event in events if event["index"] == 0) == "Hello one\n"
        assert events[-1]["index"] == 2
        assert events[-1]["kind"]["finished"]["message"] == "ExeScript command exited with code 2"
        assert "Z" not in events[0]["timestamp"]
        assert "+" not in events[0]["timestamp"]
        assert await sse(w.r, path, over, last_id=events[2]["id"]) == events[3:]
        began = time.monotonic()
        _, results = await w.r("GET", f"{path}?timeout=600")  # an early failure is told at once
        assert time.monotonic() - began < patience(5)
        assert [one["result"] for one in results] == ["Ok", "Ok", "Error"]
        assert results[-1]["isBatchFinished"]
        _, results = await w.r("GET", f"{path}?commandIndex=1")
        assert [(one["stdout"], one["isBatchFinished"]) for one in results] == [(None, False), ("Hello two\n", True)]
        assert await w.r("GET", f"/activity/{activity}/state", Accept="text/event-stream") == (200, {"state": ["Ready", None]})
        for process in w.processes:
            process.kill()
        gone = StateReported(activity, "Terminated", reason="execution aborted", error_message="exit code -9")
        await w.p.node.system.ask("activity", gone)
        events = await sse(w.r, path, over)  # from what this node has
        assert [(event["index"], event["kind"]["finished"]["return_code"]) for event in events] == [(0, 0), (1, 0), (2, 1)]


@trio_test
async def test_codes_and_bodies_without_an_exe_unit(tmp_path: Path) -> None:
    async with pair(tmp_path) as w:
        unknown = "0" * 32
        for method, path, body in (
            ("GET", "state", None), ("GET", "usage", None), ("GET", "agreement", None), ("DELETE", "", None),
            ("GET", "command", None), ("POST", "exec", {"text": "[]"}), ("GET", f"exec/{unknown}", None),
            ("PUT", "state", {"state": ["Ready", None]}),
        ):  # fmt: skip
            status, answer = await w.r(method, f"/activity/{unknown}/{path}".rstrip("/"), body)
            assert status == 500
            assert answer == {"message": f"DAO error: Not found: agreement id for activity: {unknown}"}
        for body, status in (("f" * 64, 400), ({"agreementId": "f" * 64}, 400), ({}, 400), (17, 400), ("", 400)):
            assert (await w.r("POST", "/activity", body))[0] == status
        assert (await w.p("POST", "/activity", AGREEMENT))[0] == 403  # the provider is not the requestor
        assert (await w.r("GET", "/events"))[0] == 400
        assert await w.p("GET", "/events?afterTimestamp=2020-01-01T00:00:00Z&timeout=0") == (408, {"message": "Timeout"})
        assert (await w.r("POST", "/activity?timeout=0.2", {"agreementId": AGREEMENT})) == (408, {"message": "Timeout"})
        await until(lambda: len(w.p.node.system.feeds.read("activities")) == 2)
        _, events = await w.p("GET", "/events?afterTimestamp=2020-01-01T00:00:00Z")
        assert [list(event["eventType"]) for event in events] == [["CreateActivity"], ["DestroyActivity"]]
        assert {event["agreementId"] for event in events} == {AGREEMENT}
        activity = events[0]["activityId"]
        after = events[0]["eventDate"]
        assert (await w.p("GET", f"/events?afterTimestamp={after}"))[1] == events[1:]
        assert (await w.p("GET", f"/events?afterTimestamp={after}&appSessionId=other&timeout=0"))[0] == 408
        state = f"/activity/{activity}/state"
        assert (await w.r("PUT", state, {"state": ["Ready", None]}))[0] == 403
        for bad in ({}, {"state": []}, {"state": ["Sleepy"]}, {"state": ["Ready", "x"]}, {"state": "Ready"}):
            assert (await w.p("PUT", state, bad))[0] == 400
        body = {"state": ["Terminated", None], "reason": "creation failed", "errorMessage": "no such runtime"}
        assert await w.p("PUT", state, body) == (200, None)
        assert await w.r("DELETE", f"/activity/{activity}?timeout={patience(20):g}") == (200, None)
        assert await w.r("GET", state) == (200, body)
        assert (await w.r("GET", f"/activity/{activity}/usage"))[1].keys() == {"timestamp"}
        assert (await w.r("GET", f"/activity/{activity}/exec/{unknown}")) == (
            404, {"message": f"Not found: batch_id = {unknown}"},
        )  # fmt: skip
        assert (await w.r("POST", f"/activity/{activity}/encrypted"))[0] == 501
        assert (await w.r("GET", f"/activity/{activity}/proxy-http/80/b"))[0] == 410


@trio_test
async def test_polling_with_results_that_come_later(tmp_path: Path) -> None:
    async with pair(tmp_path) as w:

        async def initialized() -> None:
            await until(lambda: w.p.node.system.feeds.read("activities"))
            [(key, _)] = w.p.node.system.rows("activity").prefix("activity/")
            for state in tuple(ActivityState)[1:4]:
                await w.p.node.system.ask("activity", StateReported(key.partition("/")[2], state))

        w.nursery.start_soon(initialized)
        activity = await w.create()
        _, batch = await w.r("POST", f"/activity/{activity}/exec", {"text": json.dumps([hello("a"), hello("b")])})
        path = f"/activity/{activity}/exec/{batch}"
        assert await w.r("GET", path) == (200, [])
        began = time.monotonic()
        assert await w.r("GET", f"{path}?timeout=0.3") == (200, [])
        assert await w.r("GET", f"{path}?timeout=0.3&commandIndex=0") == (408, {"message": "Timeout"})
        assert 0.6 <= time.monotonic() - began < patience(1.5)
        for text in ("[", '{"deploy":{}}', '[{"fly":{}}]', '[{"run":{}}]'):
            status, answer = await w.r("POST", f"/activity/{activity}/exec", {"text": text})
            assert status == 400
            assert answer["message"].startswith("Bad request: ")

        async def answer_soon() -> None:
            for index in (0, 1):
                await trio.sleep(0.1)
                result = CommandResult(
                    activity, batch, index, index == 0, f"out {index}", None, None, time.time(), is_last=index == 1
                )
                to = f"{w.r.node.node_id}/activity"
                await w.p.node.system.post(f"exeunit:{activity}", [Send(to, result)])

        w.nursery.start_soon(answer_soon)
        status, results = await w.r("GET", f"{path}?timeout={patience(20):g}&commandIndex=0")
        assert [one["stdout"] for one in results] == ["out 0"]
        status, results = await w.r("GET", f"{path}?timeout={patience(20):g}")
        assert [one["result"] for one in results] == ["Ok", "Error"]
        assert status == 200
        assert results[1]["stdout"] == "out 1"
