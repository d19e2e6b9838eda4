"""Two whole nodes, REST served over real sockets, and an exe-unit between them.

The exe-unit is in this process, and its guest is this machine; or it is a process of its own with a real runtime.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import trio
from worlds.host_runtime import HostRuntime
from worlds.node_in_test import HEADERS, node_in_test
from worlds.patience import patience, within
from worlds.support import tell

from actors.kernel.journal import Journal
from golem.daemon import serve_rest
from golem.exeunit.process import Unit, UnitSettings
from golem.exeunit.runtime import Interaction
from golem.exeunit.terms import read_terms
from golem.exeunit.transfer.spool import TransferPolicy
from golem.files.on_disk import FileSource
from golem.node.node import Node
from protocol.activity import CreateActivity, DestroyActivity, Exec
from protocol.negotiation import AgreementApproved

HELLO = Path(__file__).resolve().parents[2] / "examples" / "hello" / "hello.wasm"
AGREEMENT = "e" * 64


@dataclass
class HandWorld:
    """Requestor `r`, provider `p`, and the activity between them."""

    r: Node
    p: Node
    tmp_path: Path
    nursery: trio.Nursery
    runtime: HostRuntime
    activity_id: str = "1" * 32
    package: Path = HELLO
    unit: Unit | None = None
    process: trio.Process | None = None
    ended: trio.Event = field(default_factory=trio.Event)
    batches: list[str] = field(default_factory=list)

    @property
    def path(self) -> str:
        return f"/activity-api/v1/activity/{self.activity_id}"

    @property
    def base(self) -> str:
        return self.r.api_url + self.path

    def http(self, **options: Any) -> httpx.AsyncClient:
        """A client with the app-key; its addresses begin at the activity's `proxy-http/`."""
        return httpx.AsyncClient(base_url=f"{self.base}/proxy-http/", headers=HEADERS, timeout=patience(20), **options)

    async def create(self, interaction: str | None, engine_host: str | None) -> None:
        """Begin the activity, with its exe-unit (runtime `vm` of an Engine, if there is one)."""
        await self.r.system.ask("activity", CreateActivity(self.activity_id, AGREEMENT, 30.0))
        self.r.files.offer("package", FileSource(self.package), "test")
        package = f"hash:sha3:{hashlib.sha3_224(self.package.read_bytes()).hexdigest()}:gftp://{self.r.node_id}/package"
        agreement = {
            "agreementId": AGREEMENT,
            "demand": {"requestorId": self.r.node_id, "properties": {"golem.srv.comp.task_package": package}},
            "offer": {"providerId": self.p.node_id, "properties": {}},
        }
        path, work = self.tmp_path / "agreement.json", self.tmp_path / "work"
        path.write_text(json.dumps(agreement))
        work.mkdir()
        await self.until(lambda: self.p.activity(self.activity_id))
        if engine_host is None:
            self._start_here(interaction)
        else:
            await self._start_process(interaction, engine_host)
        await self.state("Initialized")

    async def _start_process(self, interaction: str | None, engine_host: str) -> None:
        command = [sys.executable, "-m", "golem.exeunit", "--runtime", "vm", "--activity", self.activity_id]
        command += ["--bus", str(self.p.config.bus_path)] + (["--interaction", interaction] if interaction is not None else [])
        for name in ("agreement.json", "work", "cache"):
            command += [f"--{name.partition('.')[0]}", str(self.tmp_path / name)]
        self.process = await trio.lowlevel.open_process(command, env={**os.environ, "DOCKER_HOST": engine_host})

    def _start_here(self, interaction: str | None) -> None:
        path, work, policy = self.tmp_path / "agreement.json", self.tmp_path / "work", TransferPolicy()
        settings = UnitSettings(
            "host", self.activity_id, self.p.config.bus_path, path, work, self.tmp_path / "cache", policy, interaction
        )  # fmt: skip
        self.unit = Unit(settings, read_terms(path), self.runtime, Journal(str(work / "unit.db"), lambda: secrets.token_hex(8)))

        async def run() -> None:
            assert self.unit is not None
            await self.unit.run()
            self.ended.set()

        self.nursery.start_soon(run)

    async def execute(self, *commands: dict[str, Any]) -> str:
        batch_id = secrets.token_hex(16)
        await self.r.system.ask("activity", Exec(batch_id, self.activity_id, json.dumps(commands)))
        self.batches.append(batch_id)
        return batch_id

    async def start(self) -> None:
        await self.execute({"deploy": {}}, {"start": {}})
        await self.state("Ready")

    async def destroy(self) -> None:
        await self.r.system.ask("activity", DestroyActivity(self.activity_id))
        if self.process is not None:
            self.process.terminate()
        if self.unit is not None:
            self.unit.end("destroyed")
        await self.state("Terminated")

    async def state(self, wanted: str) -> None:
        await self.until(lambda: (row := self.r.activity(self.activity_id)) and row.state == wanted)

    async def until(self, condition: Any) -> None:
        with within(20):
            while not condition():
                await trio.sleep(0.01)


@asynccontextmanager
async def hand_world(
    tmp_path: Path,
    *,
    interaction: str | None = None,
    has: Sequence[Interaction] = ("shell", "proxy-http"),
    start: bool = True,
    package: Path = HELLO,
    engine_host: str | None = None,
) -> AsyncIterator[HandWorld]:
    """`interaction`: what the provider allows. `has`: what the runtime here has. `start`: bring the activity to Ready.

    With `engine_host` the exe-unit is a process of its own with runtime `vm`, and `package` is its image.
    """
    for name in ("r", "p"):
        (tmp_path / name).mkdir()
    async with node_in_test(tmp_path / "r") as r, node_in_test(tmp_path / "p") as p, trio.open_nursery() as nursery:
        with within(30):
            while not (r.network.is_up and p.network.is_up):
                await trio.sleep(0.02)
            await r.network.connect(p.network.addresses[0])
        for node, role in ((r, "Requestor"), (p, "Provider")):
            offer = json.dumps({"golem.runtime.name": "vm" if engine_host else "host"})
            approved = AgreementApproved(AGREEMENT, role, r.node_id, p.node_id, "{}", offer, time.time(), f"session-{role}")
            await tell(node.system, "negotiation", "activity", approved)
            await nursery.start(serve_rest, node, listening())
        world = HandWorld(r, p, tmp_path, nursery, HostRuntime(nursery, has), package=package)
        try:
            await world.create(interaction, engine_host)
            if start:
                await world.start()
            yield world
        finally:
            with trio.CancelScope(shield=True):
                await world.runtime.stop()
                if world.process is not None:
                    world.process.terminate()
                    await world.process.wait()
            nursery.cancel_scope.cancel()


def listening() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(16)
    return sock
