"""A whole market on one machine: nodes, provider agents and a dev chain as real processes, for demo, tests, benchmarks.

Everything lives below one folder and under one network name, talks over loopback, and is gone when the block ends,
whatever happened to it: processes are ended by their own pids, the leftovers of killed ones by what they were started on.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import trio

from golem.base.plain_http import trust_nobody

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0
PROGRAM = ("-m", "golem.cli")
BIN = Path(sys.executable).parent


class LocalNetError(Exception):
    """A process of the market did not do what it was started for; the text names its log."""


@dataclass(eq=False)
class Process:
    """A started program: its arguments, its log, and the process of the moment."""

    name: str
    arguments: list[str]
    environment: dict[str, str]
    log: Path
    running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start (again), in a session of its own, appending to the log."""
        with self.log.open("ab") as log:
            self.running = subprocess.Popen(
                self.arguments, env={**os.environ, **self.environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    @property
    def alive(self) -> bool:
        return self.running is not None and self.running.poll() is None

    async def stop(self, sign: int = signal.SIGTERM, timeout_s: float = STOP_TIMEOUT_S) -> int | None:
        """Signal and wait; kill past the timeout. Return the exit status."""
        if self.running is None:
            return None
        if self.running.poll() is None:
            self.running.send_signal(sign)
            with trio.move_on_after(timeout_s):
                while self.running.poll() is None:
                    await trio.sleep(0.02)
            if self.running.poll() is None:
                self.running.kill()
        return await trio.to_thread.run_sync(self.running.wait)

    def tail(self, lines: int = 15) -> str:
        """Return the end of the log, for error messages."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return "(no log)"


@dataclass(eq=False)
class LocalNode:
    """A node of the market: its process, REST address and app-key."""

    name: str
    data_dir: Path
    app_key: str
    process: Process
    api_url: str = ""
    node_id: str = ""
    environment: dict[str, str] = field(default_factory=dict)  # for agents and tools in front of this node

    def client(self, timeout_s: float = 70.0) -> httpx.AsyncClient:
        """Return an HTTP client with this node's app-key."""
        headers = {"Authorization": f"Bearer {self.app_key}"}
        return httpx.AsyncClient(
            base_url=self.api_url, headers=headers, timeout=timeout_s, trust_env=False, verify=trust_nobody()
        )

    async def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Return when the running process serves REST. Raises `LocalNetError`."""
        status = self.data_dir / "node.json"

        def served() -> bool:
            with suppress(OSError, ValueError):
                found = json.loads(status.read_text())
                if self.process.running and found["pid"] == self.process.running.pid:
                    self.api_url, self.node_id = found["apiUrl"], found["nodeId"]
                    self.environment |= {"YAGNA_API_URL": self.api_url}
                    return True
            return False

        with trio.move_on_after(timeout_s):
            while not served():
                if not self.process.alive:
                    raise LocalNetError(f"{self.name} ended at once:\n{self.process.tail()}")
                await trio.sleep(0.02)
            return
        raise LocalNetError(f"{self.name} was not ready within {timeout_s:g} s:\n{self.process.tail()}")

    async def command(self, *arguments: str, timeout_s: float = 120.0) -> Any:
        """Run `golem --json ARGUMENTS` for this node and return its answer. Raises `LocalNetError`."""
        line = [sys.executable, "-m", "golem.cli", "--json", "--data-dir", str(self.data_dir), *arguments]
        with trio.move_on_after(timeout_s):
            result = await trio.run_process(line, capture_stdout=True, capture_stderr=True, check=False)
            if result.returncode:
                raise LocalNetError(f"golem {' '.join(arguments)}: {result.stderr.decode(errors='replace').strip()}")
            return json.loads(result.stdout or b"null")
        raise LocalNetError(f"golem {' '.join(arguments)} took longer than {timeout_s:g} s")


class LocalNet:
    """The market's processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"localnet-{secrets.token_hex(4)}"
        self.chain_dir = folder / "chain"
        self.chain_dirs = {self.chain_dir}
        self.nodes: dict[str, LocalNode] = {}
        self.agents: dict[str, Process] = {}

    async def start_node(
        self, name: str, *, wait: bool = True, extra: Mapping[str, str] = {}, chain_dir: Path | None = None,
        program: Sequence[str] = PROGRAM,
    ) -> LocalNode:  # fmt: skip
        """Start a node named `name` on loopback and free ports, on the market's chain or one of its own (`chain_dir`).

        `program`: what Python is to run instead of `golem`.
        """
        data_dir = self.folder / name
        chain_dir = chain_dir or self.chain_dir
        self.chain_dirs.add(chain_dir)
        data_dir.mkdir(parents=True, exist_ok=True)
        app_key = secrets.token_hex(16)
        arguments = [
            sys.executable, *program, "--data-dir", str(data_dir), "run", "--plain-key",
            "--api-url", "http://127.0.0.1:0", "--listen", "127.0.0.1:0", "--network-name", self.name,
            "--chain-dir", str(chain_dir),
        ]  # fmt: skip
        process = Process(name, arguments, {"YAGNA_AUTOCONF_APPKEY": app_key, **extra}, self.folder / f"{name}.log")
        path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
        node = LocalNode(name, data_dir, app_key, process, environment={
            "YAGNA_APPKEY": app_key, "GOLEM_DATA_DIR": str(data_dir), "PATH": path,
            "YA_RT_STORAGE": "4",  # GiB, set aside for each activity: several providers share this machine's disk
        })  # fmt: skip
        self.nodes[name] = node
        process.start()
        if wait:
            await node.wait_ready()
        return node

    def start_agent(
        self, node: LocalNode, *, subnet: str, arguments: tuple[str, ...] = (), program: Sequence[str] = PROGRAM
    ) -> Process:
        """Start a provider agent in front of a node."""
        name = f"{node.name}-agent"
        line = [
            sys.executable, *program, "--data-dir", str(node.data_dir), "provider", "run",
            "--name", node.name, "--subnet", subnet, *arguments,
        ]  # fmt: skip
        process = Process(name, line, dict(node.environment), self.folder / f"{name}.log")
        self.agents[name] = process
        process.start()
        return process

    async def restart_node(self, node: LocalNode) -> None:
        """Start a node that was stopped or killed once more, on its old data."""
        node.process.start()
        await node.wait_ready()

    def pids(self, wanted: Callable[[str], bool]) -> list[int]:
        """Return processes of this market (their command lines name its folder) whose command line is `wanted`."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with suppress(OSError):
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if str(self.folder) in line and wanted(line):
                        found.append(int(entry.name))
        return sorted(found)

    async def stop(self) -> None:
        """End everything: agents first (they end agreements and send invoices), then nodes, the chain, leftovers."""
        async with trio.open_nursery() as nursery:
            for agent in self.agents.values():
                nursery.start_soon(agent.stop)
        async with trio.open_nursery() as nursery:
            for node in self.nodes.values():
                nursery.start_soon(node.process.stop)
        from golem.chain.devchain import stop_devchain

        for chain_dir in self.chain_dirs:
            await stop_devchain(chain_dir)
        for pid in self.pids(lambda line: "golem" in line):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@asynccontextmanager
async def open_localnet(folder: Path) -> AsyncIterator[LocalNet]:
    """A market below `folder` for the length of the block; its processes are ended afterwards, also on Ctrl-C."""
    folder.mkdir(parents=True, exist_ok=True)
    net = LocalNet(folder)
    try:
        yield net
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 60):
            await net.stop()
