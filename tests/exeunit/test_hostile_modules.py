"""Hostile modules on a whole market of real processes: each ends with a reason, and nobody else notices."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
import wat_modules as wat
from worlds.patience import patience, within
from worlds.support import trio_test

from golem.lab.localnet import LocalNet, LocalNode, open_localnet

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "rest"))

from requestor import ACTIVITY, Requestor, WalkError, published  # noqa: E402

pytestmark = [pytest.mark.integration]

HELLO = (ROOT / "examples" / "hello" / "hello.wasm").read_bytes()
PROFILE = {"cpu_threads": 2, "mem_gib": 0.375, "storage_gib": 0.375}  # of three agreements: a third of it each
#: What each module meets.
ENDS = (
    ("memory", "memory was at"),
    ("flood", "output limit"),
    ("trap", "unreachable"),
    ("stack", "stack overflow"),
    ("escape", "exited with code"),
)
FULL = (
    ("file", "exited with code"),
    ("files", r"exited with code|storage limit"),
)  # these take all the storage there is: one an activity
MODULES = {
    "memory": wat.MEMORY_BOMB, "flood": wat.FLOOD, "trap": wat.TRAP, "stack": wat.DEEP,
    "escape": wat.read_file("../../../../../../etc/passwd"), "file": wat.FILE_BOMB, "files": wat.MANY_FILES,
    "loop": wat.LOOP, "sleep": wat.SLEEP, "hello": HELLO,
}  # fmt: skip


def run(entry_point: str, *arguments: str) -> dict[str, Any]:
    return {"run": {"entry_point": entry_point, "args": list(arguments), "capture": {"stdout": {"atEnd": {}}}}}


class Deal:
    """An agreement under which activities come and go."""

    def __init__(self, requestor: Requestor, agreement: str) -> None:
        self.requestor, self.agreement = requestor, agreement

    async def ready(self) -> str:
        activity = await self.requestor.create_activity(self.agreement)
        await self.requestor.run(activity, {"deploy": {}}, {"start": {}})
        return activity

    async def greets(self, activity: str, name: str) -> None:
        (result,) = await self.requestor.run(activity, run("hello", name))
        assert result["stdout"] == f"Hello {name}\n"

    async def destroyed_while(self, activity: str, *commands: dict[str, Any]) -> dict[str, Any]:
        """Destroy an activity whose batch does not end; return the batch's last result."""
        text = json.dumps(commands)
        batch = await self.requestor.call("POST", f"{ACTIVITY}/activity/{activity}/exec", {"text": text})
        path = f"{ACTIVITY}/activity/{activity}/exec/{batch}"
        assert await self.requestor.call("GET", path, timeout=1) == []
        began = time.monotonic()
        await self.requestor.destroy_activity(activity)
        assert time.monotonic() - began < patience(10)
        found: dict[str, Any] = (await self.requestor.call("GET", path))[-1]
        return found


@asynccontextmanager
async def market(folder: Path) -> AsyncIterator[tuple[LocalNet, LocalNode, LocalNode]]:
    """A funded requestor's node, and a provider's node whose agent has little to give."""
    async with open_localnet(folder) as net:
        buyer, seller = await net.start_node("requestor", wait=False), await net.start_node("provider", wait=False)
        await buyer.wait_ready()
        await seller.wait_ready()
        (seller.data_dir / "provider").mkdir(mode=0o700)
        hardware = {"active": "default", "profiles": {"default": PROFILE}}
        (seller.data_dir / "provider" / "hardware.json").write_text(json.dumps(hardware))
        net.start_agent(seller, subnet=net.name, arguments=("--max-agreements", "3"))
        await buyer.command("payment", "fund")
        yield net, buyer, seller


async def agree(requestor: Requestor, allocation: dict[str, Any], package: str) -> Deal:
    demand, body = await requestor.demand(allocation, package)
    draft = await requestor.negotiate(demand, body, await requestor.proposal(demand, "Initial"))
    return Deal(requestor, await requestor.agree(draft))


async def slowest_answer(node: LocalNode, stop: trio.Event, found: list[float]) -> None:
    """Note how long the node's REST API takes at most, until told to stop."""
    async with node.client() as client:
        while not stop.is_set():
            began = time.monotonic()
            (await client.get("/me")).raise_for_status()
            found.append(time.monotonic() - began)
            await trio.sleep(0.05)


def sandboxes(net: LocalNet) -> list[int]:
    """Return processes of exe-units of this market, their children included."""
    units = net.pids(lambda line: "golem.exeunit" in line)
    found = list(units)
    for unit in units:
        with suppress(psutil.NoSuchProcess):  # gone meanwhile
            found += (child.pid for child in psutil.Process(unit).children(recursive=True))
    return found


@trio_test
async def test_neither_the_node_nor_the_next_activity_notices_a_hostile_module(tmp_path: Path) -> None:
    (tmp_path / "hostile.zip").write_bytes(
        wat.package({f"{name}.wasm": module for name, module in MODULES.items()}, **{"mount-points": [{"rw": "/"}]})
    )
    (tmp_path / "bomb.wasm").write_bytes(wat.compile_bomb())
    async with market(tmp_path) as (net, buyer, seller), buyer.client() as client, trio.open_nursery() as nursery:
        stop, answers = trio.Event(), list[float]()
        nursery.start_soon(slowest_answer, seller, stop, answers)
        requestor, pid = Requestor(client, net.name), seller.process.running and seller.process.running.pid
        allocation = await requestor.allocate()
        async with (
            published(tmp_path / "hostile.zip", buyer.environment) as package,
            published(tmp_path / "bomb.wasm", buyer.environment) as bomb,
        ):
            bad = await agree(requestor, allocation, package)
            activity = await bad.ready()
            for name, reason in ENDS:
                await bad.greets(activity, f"before {name}")  # the same activity goes on
                with pytest.raises(WalkError, match=reason) as error:
                    await requestor.run(activity, run(name))
                assert "root:" not in str(error.value)
            for name, reason in FULL:
                await requestor.destroy_activity(activity)
                activity = await bad.ready()
                with pytest.raises(WalkError, match=reason):
                    await requestor.run(activity, run(name))
            await requestor.destroy_activity(activity)
            good = await agree(requestor, allocation, package)  # a neighbour, while the other agreement goes on
            neighbour = await good.ready()
            for endless in ("loop", "sleep"):
                activity = await bad.ready()
                async with trio.open_nursery() as both:
                    both.start_soon(good.greets, neighbour, f"beside {endless}")
                    last = await bad.destroyed_while(activity, run(endless))
                assert (last["result"], last["message"]) == ("Error", "activity terminated: destroyed")
            activity = await bad.ready()
            await bad.greets(activity, "next")
            await requestor.destroy_activity(activity)
            await requestor.terminate(bad.agreement)
            worst = await agree(requestor, allocation, bomb)
            activity = await requestor.create_activity(worst.agreement)
            with pytest.raises(WalkError, match=r"Usage limit exceeded: memory|compiling failed"):
                await requestor.run(activity, {"deploy": {}}, {"start": {}})
            await good.greets(neighbour, "still there")
            for left in (activity, neighbour):
                await requestor.destroy_activity(left)
            work = seller.data_dir / "provider" / "exe-unit" / "work"
            with within(10):  # a process may outlive its last word for a moment
                while sandboxes(net) or list(work.glob("*/*")):
                    await trio.sleep(0.05)
        stop.set()
        assert seller.process.alive
        assert seller.process.running is not None
        assert seller.process.running.pid == pid
        assert max(answers) < patience(2), "the provider's node answers all the time"
