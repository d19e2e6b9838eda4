"""Several runtimes at one provider, on a whole market: what is offered, what is not and why, and that each runs commands."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from provider_requestor import Requestor, eventually
from test_provider_agent import call
from worlds.engine import admin, busybox_tar
from worlds.patience import patience
from worlds.support import trio_test

from golem.lab.engine import LocalEngine
from golem.lab.localnet import LocalNet, LocalNode, open_localnet

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "rest"))
from requestor import published  # noqa: E402

pytestmark = [pytest.mark.integration]
HELLO = ROOT / "examples" / "hello" / "hello.wasm"
EXAMPLE = ROOT / "examples" / "process-runtime"
STREAM = {"stdout": {"stream": {}}, "stderr": {"stream": {}}}
TASK_PACKAGE = "golem.srv.comp.task_package"
CONTAINER_NO_ENGINE = "unix:///nowhere/docker.sock"


@asynccontextmanager
async def market(
    folder: Path, *arguments: str, environment: dict[str, str] | None = None
) -> AsyncIterator[tuple[LocalNet, Requestor, LocalNode]]:
    """A requestor at its funded node, and a provider node whose agent has this environment; no Engine unless it says so."""
    async with open_localnet(folder) as net:
        buyer, seller = await net.start_node("requestor", wait=False), await net.start_node("provider", wait=False)
        await buyer.wait_ready()
        await seller.wait_ready()
        seller.environment |= {"DOCKER_HOST": CONTAINER_NO_ENGINE, "RUNTIME_TEST_INTERVAL": "1", **(environment or {})}
        net.start_agent(seller, subnet=net.name, arguments=arguments)
        await buyer.command("payment", "fund")
        yield net, await call(Requestor, buyer.api_url, buyer.app_key), seller


async def status(seller: LocalNode, wanted: Any) -> dict[str, Any]:
    """Return the agent's status as soon as it is as `wanted`; it is written once a second."""
    found: dict[str, Any] = {}
    with trio.move_on_after(patience(40)):
        while not found or not wanted(found):
            await trio.sleep(0.2)
            if (seller.data_dir / "provider" / "status.json").exists():
                found = await seller.command("provider", "status")
        return found
    raise AssertionError(f"not in time: {json.dumps(found, indent=1)}")


def published_presets(found: dict[str, Any]) -> list[str]:
    return sorted(one["preset"] for one in found["offers"] if one["offer"])


def runtime(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in found["runtimes"] if one["name"] == name)


def run(entry_point: str, *args: str) -> dict[str, Any]:
    return {"run": {"entry_point": entry_point, "args": list(args), "capture": STREAM}}


@trio_test
async def test_a_runtime_of_a_descriptor_is_offered_and_runs_a_batch(tmp_path: Path) -> None:
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "ya-broken.json").write_text("{")
    foreign = {"name": "foreign", "version": "1", "supervisor-path": "/usr/bin/exe-unit", "runtime-path": "x"}
    (folder / "ya-foreign.json").write_text(json.dumps([foreign]))
    places = {"EXE_UNIT_PATH": f"{EXAMPLE}{os.pathsep}{folder}"}
    async with market(tmp_path, "--runtime", "process", "--no-shell", environment=places) as (net, requestor, seller):
        found = await status(seller, lambda found: published_presets(found) == ["process"])
        assert runtime(found, "process")["offered"] is True
        agreement = await call(requestor.hire, subnet=net.name, runtime="process")
        offer = requestor.call("GET", f"/market-api/v1/agreements/{agreement}")["offer"]["properties"]
        assert (offer["golem.runtime.version"], offer["golem.runtime.capabilities"]) == ("0.1.0", [])
        activity = await call(requestor.start, agreement)
        body = {"agreementId": agreement}
        second = await call(requestor.http.post, "/activity-api/v1/activity", json=body, params={"timeout": 5})
        assert not second.is_success, "one live activity an agreement"
        results = await call(requestor.execute, activity, {"deploy": {}}, {"start": {}}, run("sh", "-c", "pwd; echo $((6 * 7))"))
        assert [one["result"] for one in results] == ["Ok"] * 3, results
        assert results[2]["stdout"].endswith("/runtime/root\n42\n")
        await call(requestor.destroy, activity)
        await call(requestor.terminate, agreement)
        (invoice,) = await call(eventually, lambda: requestor.documents("invoices", agreement))
        assert float(invoice["amount"]) > 0
        os.environ["EXE_UNIT_PATH"] = places["EXE_UNIT_PATH"]
        try:
            listed = await seller.command("provider", "exe-unit", "list")
        finally:
            del os.environ["EXE_UNIT_PATH"]
        assert {one["name"] for one in listed["runtimes"]} >= {"wasmtime", "process", "foreign"}
        assert "ya-broken.json is not JSON" in listed["problems"][0]


@trio_test
async def test_without_an_engine_vm_is_not_offered_and_says_why_until_there_is_one(tmp_path: Path, engine: LocalEngine) -> None:
    """The socket appears later, as when Docker is started after the agent; and it goes away again."""
    socket = tmp_path / "docker.sock"
    async with market(tmp_path, environment={"DOCKER_HOST": f"unix://{socket}"}) as (_, _, seller):
        found = await status(seller, lambda found: published_presets(found) == ["wasmtime"])
        assert "docker.sock" in runtime(found, "vm")["reason"]
        assert runtime(found, "vm")["offered"] is False
        listed = {one["name"]: one for one in await seller.command("provider", "preset", "list")}
        assert listed["wasmtime"]["offered"] == "yes"
        assert "docker.sock" in listed["vm"]["offered"]
        socket.symlink_to(engine.socket)
        found = await status(seller, lambda found: published_presets(found) == ["vm", "wasmtime"])
        assert runtime(found, "vm")["reason"] == ""
        socket.unlink()
        found = await status(seller, lambda found: published_presets(found) == ["wasmtime"])
        assert "docker.sock" in runtime(found, "vm")["reason"]


@trio_test
async def test_vm_and_wasmtime_side_by_side(tmp_path: Path, engine: LocalEngine) -> None:
    image = tmp_path / "busybox.tar"
    image.write_bytes(busybox_tar())
    places = {"DOCKER_HOST": engine.host}
    async with market(tmp_path, "--max-agreements", "2", environment=places) as (net, requestor, seller):
        found = await status(seller, lambda found: published_presets(found) == ["vm", "wasmtime"])
        assert [one["offered"] for one in found["runtimes"]] == [True, True]
        buyer = net.nodes["requestor"]
        other = await call(Requestor, buyer.api_url, buyer.app_key)
        async with published(HELLO, buyer.environment) as module, published(image, buyer.environment) as container:
            wasm = await call(requestor.hire, subnet=net.name, runtime="wasmtime", **{TASK_PACKAGE: module})
            vm = await call(other.hire, subnet=net.name, runtime="vm", **{TASK_PACKAGE: container})
            offers = [requestor.call("GET", f"/market-api/v1/agreements/{one}")["offer"]["properties"] for one in (wasm, vm)]
            profile = json.loads((seller.data_dir / "provider" / "hardware.json").read_text())["profiles"]["default"]
            for name in ("mem", "storage"):
                assert sum(offer[f"golem.inf.{name}.gib"] for offer in offers) <= profile[f"{name}_gib"]
            assert {"shell", "proxy-http"} <= set(offers[1]["golem.runtime.capabilities"])
            activities = await call(requestor.start, wasm), await call(other.start, vm)
            results = await call(requestor.execute, activities[0], {"deploy": {}}, {"start": {}}, run("hello", "World"))
            assert [(one["result"], one["message"]) for one in results if one["result"] != "Ok"] == []
            assert results[2]["stdout"] == "Hello World\n"
            shell = run("/bin/sh", "-c", "echo $((6*7))")
            results = await call(other.execute, activities[1], {"deploy": {}}, {"start": {}}, shell)
            assert [(one["result"], one["message"]) for one in results if one["result"] != "Ok"] == []
            assert results[2]["stdout"] == "42\n"
            await call(requestor.destroy, activities[0])
            await call(requestor.terminate, wasm)
            assert await call(eventually, lambda: requestor.documents("invoices", wasm))
            await what_a_crash_left_is_removed(net, seller, engine, other, activities[1])


async def what_a_crash_left_is_removed(
    net: LocalNet, seller: LocalNode, engine: LocalEngine, requestor: Requestor, activity: str
) -> None:
    """Kill the exe-unit with the agent away: its container lives on until the agent's next start."""
    docker = admin(engine)
    try:

        def containers() -> list[Any]:
            return list(docker.containers(all=True, filters={"label": f"golem.activity={activity}"}))

        assert await call(containers)
        agent = net.agents["provider-agent"]
        await agent.stop(signal.SIGKILL)
        for pid in net.pids(lambda line: "golem.exeunit" in line and "--activity" in line):
            os.kill(pid, signal.SIGKILL)
        assert await call(containers), "nobody was there to remove it"
        agent.start()
        await call(eventually, lambda: not containers(), 40)
        await call(eventually, lambda: requestor.state(activity) == "Terminated", 40)
        work = seller.data_dir / "provider" / "exe-unit" / "work"
        await call(eventually, lambda: not list(work.glob("*/*/deployment-*")), 20)
        assert "left over (vm)" in agent.tail(200)
    finally:
        docker.close()
