"""An exe-unit with a running container is killed on a whole market: nothing stays on the provider's machine."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from worlds.engine import admin, busybox_tar
from worlds.patience import within
from worlds.support import trio_test

from golem.lab.engine import LocalEngine
from golem.lab.localnet import LocalNet, LocalNode, open_localnet

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "rest"))

from requestor import Requestor, published  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.root]


def running(engine: LocalEngine, activity: str) -> list[str]:
    """Return the Engine's containers and volumes of an activity."""
    client = admin(engine)
    try:
        filters = {"label": f"golem.activity={activity}"}
        containers = [entry["Names"][0] for entry in client.containers(all=True, filters=filters)]
        return containers + [entry["Name"] for entry in client.volumes(filters)["Volumes"] or ()]
    finally:
        client.close()


def mounts(folder: Path) -> list[str]:
    points = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return [point for point in points if point.startswith(f"{folder}/")]


async def until(what: Callable[[], bool], timeout_s: float) -> None:
    with within(timeout_s):
        while not await trio.to_thread.run_sync(what):
            await trio.sleep(0.1)


async def begin(requestor: Requestor, package: str) -> str:
    """Return an activity whose container runs a command that does not end."""
    demand, body = await requestor.demand(await requestor.allocate(), package, runtime="vm")
    agreement = await requestor.agree(await requestor.negotiate(demand, body, await requestor.proposal(demand, "Initial")))
    activity = await requestor.create_activity(agreement)
    volumes = {"/data": {"host": {}}, "/ram": {"ram": {"size": "1m"}}}
    run = {"run": {"entry_point": "/bin/sh", "args": ["-c", "echo x > /data/x; sleep 1000 & echo left"]}}
    await requestor.run(activity, {"deploy": {"volumes": volumes}}, {"start": {}}, run)
    return activity


async def start(net: LocalNet, engine: LocalEngine) -> LocalNode:
    """Start a funded requestor's node, and a provider's with an agent that has the Engine."""
    requestor, provider = await net.start_node("requestor"), await net.start_node("provider")
    await requestor.command("payment", "fund")
    provider.environment["DOCKER_HOST"] = engine.host
    net.start_agent(provider, subnet=net.name)
    return requestor


@trio_test
async def test_nothing_is_left_of_a_killed_exe_unit(tmp_path: Path, engine: LocalEngine) -> None:
    tmp_path.chmod(0o711)
    image = tmp_path / "busybox.tar"
    image.write_bytes(busybox_tar())
    async with open_localnet(tmp_path / "net") as net:
        node = await start(net, engine)
        async with node.client() as client, published(image, node.environment) as package:
            activity = await begin(Requestor(client, net.name), package)
            assert len(running(engine, activity)) == 3
            assert len(mounts(net.folder)) == 2
            (unit,) = net.pids(lambda line: f"--activity {activity}" in line)
            os.kill(unit, signal.SIGKILL)
            await until(lambda: not running(engine, activity), 10)
            await until(lambda: not mounts(net.folder), 10)
            await until(lambda: not list(net.folder.rglob(f"exe-unit/work/*/{activity}")), 10)
