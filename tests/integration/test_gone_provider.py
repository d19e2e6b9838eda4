"""A provider that is gone is noticed: unmodified yapapi and golem-js take another one. One that is only away loses nothing.

All three jobs run at once, since each of them waits. The limits here are those of the product, and not scaled.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from worlds.patience import patience, within
from worlds.support import trio_test

from golem.lab.localnet import LocalNet, LocalNode, open_localnet

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
YAPAPI_PYTHON = ROOT / ".venv-yapapi" / "bin" / "python"
JS = ROOT / "examples" / "js"
sys.path.insert(0, str(ROOT / "tests" / "exeunit"))

from wat_modules import package, program, say  # noqa: E402

PROMISED_S = 120.0  # from the end of a provider to the end of the task elsewhere
PARTITION_S, NAP_S = 45.0, 60

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not YAPAPI_PYTHON.exists(), reason="the yapapi environment is missing (make test makes it)"),
    pytest.mark.skipif(shutil.which("node") is None, reason="no node on this machine (Debian: apt-get install nodejs npm)"),
    pytest.mark.skipif(not (JS / "node_modules/@golem-sdk").exists(), reason="no golem-js (Debian: apt-get install npm)"),
]


def sleeper(seconds: int, then: str) -> bytes:
    """A module that waits by a clock, prints and ends."""
    body = f"""(i32.store8 (i32.const 72) (i32.const 0)) (i32.store (i32.const 80) (i32.const 1))
               (i64.store (i32.const 88) (i64.const {seconds}000000000))
               (drop (call $poll_oneoff (i32.const 64) (i32.const 128) (i32.const 1) (i32.const 200)))
               (drop (call $print (i32.const 1) (i32.const 1024) (i32.const {len(then)})))"""
    return program(body, data=then)


async def provider(net: LocalNet, name: str, subnet: str) -> LocalNode:
    node = await net.start_node(name)
    node.environment |= {"YA_RT_STORAGE": "1", "YA_RT_CORES": "1", "MAX_SIMULTANEOUS_AGREEMENTS": "2", "YA_RT_MEM": "1"}
    net.start_agent(node, subnet=subnet, arguments=("--runtime", "wasmtime"))
    return node


async def states(node: LocalNode) -> list[str]:
    """Return how the activities of a node stand, as its agent hears it."""
    async with node.client() as client:
        found = []
        for activity in (await client.get("/activity-api/v1/activity")).json():
            answer = (await client.get(f"/activity-api/v1/activity/{activity}/state")).json()
            found.append(answer["state"][0] if "state" in answer else answer["message"])
        return found


async def until(holds: Callable[[], Awaitable[bool]], timeout_s: float = 60.0) -> None:
    with within(timeout_s):
        while not await holds():
            await trio.sleep(0.2)


class Jobs:
    """Programs in front of one requestor, and what each of them printed."""

    def __init__(self, net: LocalNet, node: LocalNode) -> None:
        self.net, self.node = net, node
        self.done: dict[str, dict[str, Any]] = {}
        self.ended_at: dict[str, float] = {}

    async def run(self, name: str, line: list[str], subnet: str) -> None:
        node, errors = self.node, self.net.folder / f"{name}.err"
        environment = {**os.environ, **node.environment, "YAGNA_SUBNET": subnet, "HOME": str(self.net.folder)}
        with errors.open("wb") as stderr, within(PROMISED_S):
            result = await trio.run_process(line, env=environment, capture_stdout=True, stderr=stderr, check=False)
        self.ended_at[name] = time.monotonic()
        assert result.stdout, errors.read_text()[-3000:]
        self.done[name] = json.loads(result.stdout)
        assert self.done[name]["ok"], (self.done[name], errors.read_text()[-3000:])

    def yapapi(self, name: str, pack: Path, subnet: str, *commands: str) -> list[str]:
        line = [str(YAPAPI_PYTHON), str(HERE / "patient_task.py"), "--package", str(pack), "--subnet", subnet]
        return [*line, "--log", str(self.net.folder / f"{name}.log"), *(f"--command={one}" for one in commands)]


async def kill_all(net: LocalNet, node: LocalNode) -> float:
    """Kill node, agent and exe-units of a provider; return when."""
    pids = net.pids(lambda line: str(node.data_dir) in line)
    assert len(pids) >= 4, "a node, its agent and two exe-units"
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return time.monotonic()


@trio_test
async def test_a_task_goes_to_another_provider_when_its_own_is_gone_and_stays_while_it_is_only_away(tmp_path: Path) -> None:
    pack = tmp_path / "patience.zip"
    pack.write_bytes(package({"long.wasm": sleeper(3600, "?"), "nap.wasm": sleeper(NAP_S, "slept"), "short.wasm": say("here")}))
    async with open_localnet(tmp_path / "net") as net, trio.open_nursery() as nursery:
        requestor = await net.start_node("requestor")
        await requestor.command("payment", "fund")
        jobs, busy, away = Jobs(net, requestor), f"{net.name}-busy", f"{net.name}-away"
        first, dozer = await provider(net, "first", busy), await provider(net, "dozer", away)
        choice = ("first=long", "second=short")
        nursery.start_soon(jobs.run, "yapapi", jobs.yapapi("yapapi", pack, busy, *choice), busy)
        nursery.start_soon(
            jobs.run, "golem-js", ["node", str(HERE / "patient_task.cjs"), str(JS), str(pack), busy, *choice], busy
        )
        nursery.start_soon(jobs.run, "dozer", jobs.yapapi("dozer", pack, away, "dozer=nap"), away)

        async def at_work() -> bool:
            return await states(first) == ["Ready"] * 2 and await states(dozer) == ["Ready"]

        await until(at_work)
        await provider(net, "second", busy)
        killed_at = await kill_all(net, first)
        assert dozer.process.running is not None
        dozer.process.running.send_signal(signal.SIGSTOP)
        try:
            await trio.sleep(PARTITION_S)
            shown = await states(requestor)
        finally:
            dozer.process.running.send_signal(signal.SIGCONT)
        assert shown == ["Unresponsive"] * 3
        with trio.move_on_after(patience(PROMISED_S)):
            while len(jobs.done) < 3:
                await trio.sleep(0.1)
        assert jobs.done.keys() == {"yapapi", "golem-js", "dozer"}
    for name in ("yapapi", "golem-js"):
        done, took_s = jobs.done[name], jobs.ended_at[name] - killed_at
        print(f"{name}: done elsewhere {took_s:.1f} s after the end of its provider")
        assert (done["provider"], done["stdout"], done["agreements"]) == ("second", "here", ["first", "second"])
        assert took_s < PROMISED_S
    assert (jobs.done["dozer"]["stdout"], jobs.done["dozer"]["agreements"]) == ("slept", ["dozer"])
