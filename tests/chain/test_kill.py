"""SIGKILL: of the paying process at every point of a payment, and of the chain itself under load."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from chain_support import GLM, ROOT, Client, Lab, address_of, devchain, spawn_devchain
from worlds.patience import patience

from golem.chain import token
from golem.chain.devchain.genesis import FAUCET_SECRET, TOKEN_ADDRESS
from golem.chain.signer import Key

pytestmark = pytest.mark.integration

BATCHES = 4


def test_a_payer_killed_at_every_point_pays_each_batch_once(tmp_path: Path) -> None:
    with devchain(tmp_path / "chain", "--block-time", "0.1") as url:
        lab = Lab(url, "devchain")
        key = lab.rich("killed")
        lab.call("evm_setAutomine", True)
        child = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("payer_child.py"))]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])}
        deaths = [("stored", 1), ("sent", 2), ("mined", 2), ("never", 1)]
        for point, nth in deaths:
            command = [*child, url, str(tmp_path / "chain.db"), "killed", str(BATCHES), point, str(nth)]
            ended = subprocess.run(command, env=env, timeout=patience(60), capture_output=True, text=True)
            assert ended.returncode == (0 if point == "never" else -signal.SIGKILL), (point, ended.stderr)
        assert [lab.tokens(address_of(f"killed {i}")) for i in range(BATCHES)] == [GLM] * BATCHES
        assert lab.tokens(address_of("killed all")) == BATCHES // 2 * GLM
        assert lab.nonce(key.address) == 2 + BATCHES, "create, approve, one transaction a batch"


def test_a_killed_chain_has_lost_no_acknowledged_transaction(tmp_path: Path) -> None:
    dice = random.Random(20)
    process = spawn_devchain(tmp_path)
    client, key, payee = Client(""), Key(FAUCET_SECRET), address_of("killed chain")
    acknowledged: list[str] = []
    try:
        for life in range(4):
            client = _connect(tmp_path, process)
            lab = Lab(client.url, "devchain")
            lab.call("evm_setAutomine", life % 2 == 0)  # every other life leaves all in the mempool
            assert [h for h in acknowledged if lab.call("eth_getTransactionByHash", h) is None] == []
            if life == 3:
                break
            if life == 0:
                acknowledged.append(lab.send(key, TOKEN_ADDRESS, token.CREATE))
            killer = threading.Timer(dice.uniform(0.05, 0.4), process.kill)
            killer.start()
            try:
                nonce = lab.number("eth_getTransactionCount", key.address, "pending")
                while True:
                    call = token.transfer_call(payee, 1)
                    acknowledged.append(lab.send(key, TOKEN_ADDRESS, call, nonce=nonce, gas=100_000, fee=10**10))
                    nonce += 1
            except httpx.TransportError:
                pass
            finally:
                killer.cancel()
            process.wait(patience(10))
            process = spawn_devchain(tmp_path)
        lab.call("evm_setAutomine", True)
        while lab.number("eth_getTransactionCount", key.address, "latest") != lab.number(
            "eth_getTransactionCount", key.address, "pending"
        ):
            lab.mine()
        blocks = lab.number("eth_blockNumber")
        mined = [h for n in range(2, blocks + 1) for h in lab.call("eth_getBlockByNumber", hex(n), False)["transactions"]]
        logs = lab.call("eth_getLogs", {"fromBlock": "0x2", "address": TOKEN_ADDRESS})
        assert set(acknowledged) <= set(mined)
        assert len(mined) == len(set(mined)) == len(logs) == lab.nonce(key.address) == lab.tokens(payee) + 1
        assert all(lab.call("eth_getTransactionReceipt", h)["status"] == "0x1" for h in mined)
        assert len(acknowledged) > 10
    finally:
        process.kill()
        process.wait(patience(10))


def _connect(directory: Path, process: subprocess.Popen[bytes]) -> Client:
    """Wait for the chain of this very process."""
    end = time.monotonic() + patience(20)
    while time.monotonic() < end:
        assert process.poll() is None
        info = directory / "chain.json"
        if info.exists() and json.loads(info.read_text())["pid"] == process.pid:
            client = Client(f"http://127.0.0.1:{json.loads(info.read_text())['port']}")
            client.wait()
            return client
        time.sleep(0.02)
    raise AssertionError("the chain did not start")
