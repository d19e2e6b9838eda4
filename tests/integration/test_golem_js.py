"""golem-js from npm, unmodified, in front of a whole market: files travel by its default protocol, the bus websocket."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from worlds.engine import admin, busybox_tar, import_image
from worlds.patience import patience, within
from worlds.support import trio_test

from golem.lab.engine import LocalEngine
from golem.lab.localnet import LocalNet, LocalNode, open_localnet

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "js"
SCRIPT_TIMEOUT_S = 100.0
SETTLE_TIMEOUT_S = 40.0

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("node") is None, reason="no node on this machine (Debian: apt-get install nodejs npm)"),
    pytest.mark.skipif(not (EXAMPLE / "node_modules/@golem-sdk").exists(), reason="no golem-js (Debian: apt-get install npm)"),
]


@asynccontextmanager
async def market(
    folder: Path, runtime: str, engine: LocalEngine | None = None
) -> AsyncIterator[tuple[LocalNet, LocalNode, LocalNode]]:
    """A funded requestor and one provider of a runtime, with a Docker Engine or without."""
    async with open_localnet(folder) as net:
        requestor = await net.start_node("requestor", wait=False)
        provider = await net.start_node("provider", wait=False)
        await requestor.wait_ready()
        await provider.wait_ready()
        if engine is not None:
            provider.environment["DOCKER_HOST"] = engine.host  # reaches the agent, not the nodes
        provider.environment["YA_RT_STORAGE"] = "1"  # GiB: it is set aside, and other tests want some
        net.start_agent(provider, subnet=net.name, arguments=("--runtime", runtime))
        await requestor.command("payment", "fund")
        yield net, requestor, provider


async def script(net: LocalNet, node: LocalNode, line: list[str], extra: Mapping[str, str] = {}) -> dict[str, Any]:
    """Run a JavaScript requestor for a node; returns the object that it printed."""
    reach = {"YAGNA_APPKEY": node.app_key, "YAGNA_API_URL": node.api_url, "YAGNA_SUBNET": net.name}
    environment = {"PATH": node.environment["PATH"], "HOME": str(net.folder), **reach, **extra}
    with within(SCRIPT_TIMEOUT_S):
        done = await trio.run_process(
            ["node", *line], env=environment, cwd=net.folder, capture_stdout=True, capture_stderr=True, check=False
        )
    assert done.stdout, done.stderr.decode()
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["ok"], (result, done.stderr.decode(), [agent.tail() for agent in net.agents.values()])
    return result


async def settled(requestor: LocalNode, provider: LocalNode, agreement: str) -> None:
    """Return when the agreement has ended and its invoice is settled, on both sides."""
    for node in (requestor, provider):
        async with node.client() as client:
            shown = (await client.get(f"/market-api/v1/agreements/{agreement}")).json()
            assert shown["state"] == "Terminated"
            statuses: list[str] = []
            with trio.move_on_after(patience(SETTLE_TIMEOUT_S)):
                while statuses != ["SETTLED"]:
                    await trio.sleep(0.2)
                    invoices = (await client.get("/payment-api/v1/invoices")).json()
                    statuses = [one["status"] for one in invoices if one["agreementId"] == agreement]
            assert statuses == ["SETTLED"], node.name


@trio_test
async def test_a_file_goes_there_and_back_and_the_work_is_paid(tmp_path: Path) -> None:
    letter = random.Random(20).randbytes(20_000_000)
    (tmp_path / "letter").write_bytes(letter)
    async with market(tmp_path, "wasmtime") as (net, requestor, provider):
        line = [str(EXAMPLE / "hello.mjs"), "--letter", str(tmp_path / "letter"), "--result", str(tmp_path / "result"), "Ada"]
        done = await script(net, requestor, line)
        assert done["stdout"] == "Hello Ada\n"
        assert (tmp_path / "result").read_bytes() == b"Hello Ada\n" + letter
        await settled(requestor, provider, done["agreement"])


@trio_test
async def test_a_docker_image_by_its_tag(tmp_path: Path, engine: LocalEngine) -> None:
    """A file there and back, and then (another agreement) bytes and JSON, single, in a batch and beside a stream."""
    tag = "golem-js-hello:1"
    import_image(engine, busybox_tar(), tag)
    client = admin(engine)
    with (tmp_path / "image.tar").open("wb") as file:
        file.writelines(client.get_image(tag))
    client.remove_image(tag)
    client.close()
    letter = random.Random(3).randbytes(3_000_000)
    (tmp_path / "letter").write_bytes(letter)
    async with market(tmp_path / "net", "vm", engine) as (net, requestor, provider):
        await requestor.command("image", "push", str(tmp_path / "image.tar"), "--tag", tag)
        registry = {"GOLEM_REGISTRY_URL": requestor.api_url}
        line = [str(EXAMPLE / "hello.mjs"), "--tag", tag, "--letter", str(tmp_path / "letter"),
                "--result", str(tmp_path / "result"), "Grace"]  # fmt: skip
        done = await script(net, requestor, line, registry)
        assert done["stdout"] == "Hello Grace\n"
        assert (tmp_path / "result").read_bytes() == b"Hello Grace\n" + letter
        await settled(requestor, provider, done["agreement"])
        data = await script(net, requestor, [str(Path(__file__).with_name("golem_js_data.cjs")), str(EXAMPLE), tag], registry)
        await settled(requestor, provider, data["agreement"])
