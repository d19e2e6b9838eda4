"""A chain process, accounts and engines for the tests of the chain layer; the same for our dev chain and for anvil."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import trio
from eth_hash.auto import keccak
from worlds.patience import patience

from golem.base.plain_http import trust_nobody
from golem.chain import token
from golem.chain.credentials import DECIMALS_CALL, SYMBOL_CALL
from golem.chain.devchain import INFO_NAME, LOG_NAME, ensure_devchain, genesis, stop_devchain
from golem.chain.engine import Engine
from golem.chain.networks import Network, local_rows
from golem.chain.rows import TransferBatch
from golem.chain.rpc import Rpc
from golem.chain.signer import Key, Signed, Transaction, sign
from golem.chain.vouch import Vouch, vouch_nothing
from protocol.wallet import TransferNews

GLM = 10**18
GWEI = 10**9
OURS: list[Path] = []  # directories of dev chains started here
ROOT = Path(__file__).resolve().parents[2]


def find_anvil() -> str | None:
    """anvil by the variable ANVIL, on the PATH, or from the npm package @foundry-rs/anvil at the root of the tree."""
    package = ROOT / "node_modules/@foundry-rs/anvil-linux-amd64/bin/anvil"
    for path in (os.environ.get("ANVIL"), shutil.which("anvil"), str(package)):
        if path and Path(path).exists():
            return path
    return None


def key_of(name: str) -> Key:
    return Key(keccak(b"test account " + name.encode()))


def address_of(name: str) -> str:
    return key_of(name).address


@contextmanager
def devchain(directory: Path, *arguments: str) -> Iterator[str]:
    """A dev chain of the test's own; yields its URL."""
    url = trio.run(ensure_devchain, directory, *arguments)
    OURS.append(directory)
    try:
        yield url
    finally:
        trio.run(stop_devchain, directory)


def spawn_devchain(directory: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """The process itself, to be killed."""
    command = [sys.executable, "-W", "ignore", "-m", "golem.chain.devchain", "--data-dir", str(directory), *arguments]
    directory.mkdir(parents=True, exist_ok=True)
    OURS.append(directory)
    with (directory / LOG_NAME).open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


@contextmanager
def anvil(path: str) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [path, "--port", str(port), "--chain-id", str(genesis.CHAIN_ID), "--quiet"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    client = Client(f"http://127.0.0.1:{port}")
    try:
        client.wait()
        client.call("anvil_setBalance", genesis.DEPLOYER_ADDRESS, hex(10**24))
        for signed in genesis.deploy_transactions():
            client.call("eth_sendRawTransaction", "0x" + signed.raw.hex())
        yield client.url
    finally:
        child.terminate()
        child.wait(patience(10))


def credential(call: dict[str, Any]) -> str | None:
    """What the dev chain says to a question of `golem.chain.credentials`, for endpoints that only tests have."""
    if call["method"] == "eth_call":
        symbol = f"{32:064x}{4:064x}" + b"tGLM".hex().ljust(64, "0")
        return {DECIMALS_CALL: f"0x{18:064x}", SYMBOL_CALL: "0x" + symbol}.get(call["params"][0].get("data"))
    return {"eth_chainId": hex(genesis.CHAIN_ID), "eth_getCode": "0x60"}.get(call["method"])


def authority(url: str) -> dict[str, str]:
    """The header that makes a caller the developer of one of our dev chains."""
    for directory in reversed(OURS):
        with suppress(OSError, ValueError, KeyError):
            info = json.loads((directory / INFO_NAME).read_text())
            if url.endswith(f":{info['port']}"):
                return {"Authorization": f"Bearer {info['token']}"}
    return {}


class Refused(Exception):
    """A JSON-RPC error."""


class Client:
    """Blocking JSON-RPC, for setting scenes."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._http = httpx.Client(timeout=patience(30), trust_env=False, verify=trust_nobody())

    def call(self, method: str, *params: Any) -> Any:
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": list(params)}
        answer = self._http.post(self.url, json=body, headers=authority(self.url)).json()
        if "error" in answer:
            raise Refused(answer["error"]["message"])
        return answer["result"]

    def wait(self, deadline_s: float = 20.0) -> None:
        end = time.monotonic() + patience(deadline_s)
        while True:
            try:
                self.call("eth_chainId")
                return
            except httpx.TransportError:
                assert time.monotonic() < end, "the chain does not answer"
                time.sleep(0.02)

    def number(self, method: str, *params: Any) -> int:
        return int(self.call(method, *params), 16)


class Lab(Client):
    """A chain under manual mining, with money for whom the test names."""

    def __init__(self, url: str, kind: str) -> None:
        super().__init__(url)
        self.kind = kind
        row = local_rows(url)[0]
        self.network: Network = replace(row, poll_s=0.02, stuck_s=0.2, dev_faucet=kind == "devchain")
        self.call("evm_setAutomine", False)

    def mine(self, blocks: int = 1) -> None:
        for _ in range(blocks):
            self.call("evm_mine")

    def base_fee(self, wei: int) -> None:
        """Mine one block with this base fee; the next one's is about an eighth lower."""
        self.call("anvil_setNextBlockBaseFeePerGas", hex(wei))
        self.mine()

    def nonce(self, address: str) -> int:
        return self.number("eth_getTransactionCount", address, "latest")

    def tokens(self, address: str, contract: str | None = None) -> int:
        data = token.BALANCE_OF + bytes(12) + bytes.fromhex(address[2:])
        return self.number("eth_call", {"to": contract or self.network.token, "data": "0x" + data.hex()}, "latest")

    def sign(
        self,
        key: Key,
        to: str | None,
        data: bytes = b"",
        *,
        nonce: int | None = None,
        value: int = 0,
        gas: int = 300_000,
        fee: int = 50 * GWEI,
    ) -> Signed:
        count = self.nonce(key.address) if nonce is None else nonce
        return sign(key, Transaction(genesis.CHAIN_ID, count, gas, fee, 2 * GWEI, to, data, value))

    def send(self, key: Key, to: str | None, data: bytes = b"", **how: Any) -> str:
        """Broadcast without mining; returns the hash."""
        return str(self.call("eth_sendRawTransaction", "0x" + self.sign(key, to, data, **how).raw.hex()))

    def do(self, key: Key, to: str | None, data: bytes = b"", **how: Any) -> dict[str, Any]:
        """Send and mine; returns the receipt."""
        tx_hash = self.send(key, to, data, **how)
        self.mine()
        receipt = self.call("eth_getTransactionReceipt", tx_hash)
        assert receipt is not None
        return dict(receipt)

    def gas_money(self, address: str) -> None:
        if self.kind == "anvil":
            self.call("anvil_setBalance", address, hex(10**19))
        else:
            self.call("dev_faucet", address)
            self.mine()

    def rich(self, name: str) -> Key:
        """An account with 10 ether and 1000 tGLM."""
        key = key_of(name)
        self.gas_money(key.address)
        self.do(key, self.network.token, token.CREATE)
        assert self.tokens(key.address) == 1000 * GLM
        return key


class Faulty(httpx.AsyncHTTPTransport):
    """The wire as it can be: `plan` maps a method (or "*") to "refuse", "lose-reply" or "null"."""

    def __init__(self) -> None:
        super().__init__(verify=trust_nobody())
        self.plan: dict[str, str] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        method = json.loads(request.content)["method"]
        fault = self.plan.get(method) or self.plan.get("*")
        if fault == "null":
            return httpx.Response(200, json={"jsonrpc": "2.0", "id": 1, "result": None})
        if fault == "refuse":
            raise httpx.ConnectError("refused")
        response = await super().handle_async_request(request)
        if fault == "lose-reply":
            await response.aread()
            raise httpx.ReadTimeout("the node took it, its reply was lost")
        return response


class Clock:
    """Time that passes only when told."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Payer:
    """An engine, what it said, and its clock."""

    def __init__(self, engine: Engine, events: list[TransferNews], clock: Clock, lab: Lab) -> None:
        self.engine, self.events, self.clock, self.lab = engine, events, clock, lab

    async def pay(self, batch_id: str, *payees: tuple[str, int]) -> None:
        await self.engine.submit(TransferBatch(batch_id, payees))

    async def until(self, *wanted: type, steps: int = 30, number: int = 1) -> Any:
        """Step and mine until so many events of a wanted type are told; returns the last of them."""
        for _ in range(steps):
            await self.engine.step()
            found = [event for event in self.events if isinstance(event, wanted)]
            if len(found) >= number:
                return found[number - 1]
            self.lab.mine()
            self.clock.now += 0.01
        raise AssertionError(f"no {wanted} within {steps} steps: {self.events}, {self.engine.problems()}")

    def told(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def problems(self) -> list[str]:
        return [problem.kind for problem in self.engine.problems()]


@asynccontextmanager
async def payer(
    lab: Lab,
    key: Key,
    db: Path,
    *,
    checkpoint: Callable[[str], None] | None = None,
    transport: Any = None,
    vouch: Vouch = vouch_nothing,
    now: float = 1_000_000.0,
    **row: Any,
) -> AsyncIterator[Payer]:
    """An engine over `lab`, stepped by hand; fields of the network row may be replaced."""
    network = replace(lab.network, **row)
    events: list[TransferNews] = []

    async def notify(event: TransferNews) -> None:
        events.append(event)

    clock = Clock(now)
    async with Rpc(network, timeout_s=10, transport=transport) as rpc:
        engine = Engine(network, rpc, key, db, notify, clock=clock, checkpoint=checkpoint or (lambda point: None), vouch=vouch)
        try:
            yield Payer(engine, events, clock, lab)
        finally:
            engine.store.close()
