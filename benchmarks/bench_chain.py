"""The chain layer in figures: `python benchmarks/bench_chain.py [--transactions N] [--payments N] [--json FILE]`.

Start of the dev chain, its transactions per second, the engine's time from submission to confirmation, gas a payment.
Times in the names' units, on whatever machine runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golem.chain import token
from golem.chain.devchain import ensure_devchain, stop_devchain, token_of
from golem.chain.devchain.genesis import CHAIN_ID
from golem.chain.engine import Engine
from golem.chain.networks import Network, local_rows
from golem.chain.rows import TransferBatch
from golem.chain.rpc import Rpc
from golem.chain.signer import Key, Transaction, sign
from protocol.wallet import TransferConfirmed, TransferNews

GLM = 10**18
Figures = dict[str, float | int]


async def develop(rpc: Rpc, directory: Path, method: str, *params: object) -> None:
    """Call a developer's method of the chain in `directory`."""
    headers = {"Authorization": f"Bearer {token_of(directory)}"}
    async with httpx.AsyncClient(headers=headers, trust_env=False) as client:
        call = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        answer = (await client.post(rpc.pool.endpoints[0].url, json=call)).json()
        assert "error" not in answer, answer


async def throughput(rpc: Rpc, key: Key, directory: Path, number: int) -> Figures:
    """Plain token transfers, each awaited (a block each), then as many at once in few blocks."""
    network = rpc.network
    nonce = await rpc.transaction_count(key.address)
    raws = [
        sign(
            key,
            Transaction(CHAIN_ID, nonce + i, 100_000, 10**10, 10**9, network.token, token.transfer_call(f"0x{i + 1:040x}", 1)),
        ).raw
        for i in range(2 * number)
    ]
    start = time.perf_counter()
    for raw in raws[:number]:
        await rpc.send_raw(raw)
    serial_s = time.perf_counter() - start
    await develop(rpc, directory, "evm_setAutomine", False)
    start = time.perf_counter()
    for raw in raws[number:]:
        await rpc.send_raw(raw)
    accepted_s = time.perf_counter() - start
    while await rpc.transaction_count(key.address) < nonce + 2 * number:
        await develop(rpc, directory, "evm_mine")
    mined_s = time.perf_counter() - start
    await develop(rpc, directory, "evm_setAutomine", True)
    return {
        "automine_tx_per_s": round(number / serial_s, 1),
        "pool_accept_tx_per_s": round(number / accepted_s, 1),
        "pooled_and_mined_tx_per_s": round(number / mined_s, 1),
    }


async def payments(network: Network, rpc: Rpc, key: Key, directory: Path, number: int) -> Figures:
    """Single payments one after another, then batches of 10 and 50: latency and gas a payment."""
    ended: dict[str, tuple[float, TransferConfirmed]] = {}
    news = trio.Event()

    async def notify(event: TransferNews) -> None:
        nonlocal news
        if isinstance(event, TransferConfirmed):
            ended[event.batch_id] = time.perf_counter(), event
            news.set()

    figures: Figures = {}
    engine = Engine(network, rpc, key, directory / "chain.db", notify)

    async def pay(batch_id: str, payees: int, first: int) -> tuple[float, TransferConfirmed]:
        nonlocal news
        start = time.perf_counter()
        whom = tuple((f"0x{first + i:040x}", GLM // 1000) for i in range(payees))
        await engine.submit(TransferBatch(batch_id, whom))
        while batch_id not in ended:
            news = trio.Event()
            await news.wait()
        at, event = ended[batch_id]
        return at - start, event

    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        taken = [await pay(f"single {i}", 1, 0x10_0000 + i) for i in range(number)]
        figures["submit_to_confirmed_median_s"] = round(statistics.median(s for s, _ in taken), 3)
        figures["submit_to_confirmed_max_s"] = round(max(s for s, _ in taken), 3)
        figures["gas_single_new_payee"] = taken[-1][1].gas_used
        _, again = await pay("single again", 1, 0x10_0000)
        figures["gas_single_known_payee"] = again.gas_used
        for size in (10, 50):
            await pay(f"approve {size}", size, 0x20_0000)
            _, new = await pay(f"new {size}", size, 0x100_0000 * size)
            _, known = await pay(f"known {size}", size, 0x100_0000 * size)
            figures[f"gas_per_payment_of_{size}_new"] = new.gas_used // size
            figures[f"gas_per_payment_of_{size}_known"] = known.gas_used // size
        start = time.perf_counter()
        for i in range(number):
            await engine.submit(TransferBatch(f"burst {i}", ((f"0x{0x40_0000 + i:040x}", 1),)))
        while not all(f"burst {i}" in ended for i in range(number)):
            news = trio.Event()
            await news.wait()
        figures["burst_batches_confirmed_per_s"] = round(number / (time.perf_counter() - start), 1)
        nursery.cancel_scope.cancel()
    engine.close()
    return figures


async def measure(transactions: int, number: int) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        start = time.perf_counter()
        url = await ensure_devchain(directory / "chain")
        figures: Figures = {"devchain_start_s": round(time.perf_counter() - start, 2)}
        try:
            network = replace(local_rows(url)[0], poll_s=0.1)
            async with Rpc(network) as rpc:
                start = time.perf_counter()
                await rpc.web3()
                figures["web3_import_s"] = round(time.perf_counter() - start, 2)
                key = Key(os.urandom(32))
                await rpc.dev("dev_faucet", key.address)
                create = Transaction(CHAIN_ID, 0, 200_000, 10**10, 10**9, network.token, token.CREATE)
                await rpc.send_raw(sign(key, create).raw)
                figures |= await throughput(rpc, key, directory / "chain", transactions)
                figures |= await payments(network, rpc, key, directory, number)
            pid = json.loads((directory / "chain" / "chain.json").read_text())["pid"]
            figures["devchain_rss_mb"] = psutil.Process(pid).memory_info().rss >> 20
            figures["devchain_disk_mb"] = round(sum(f.stat().st_size for f in (directory / "chain").iterdir()) / 1e6, 1)
        finally:
            await stop_devchain(directory / "chain")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transactions", type=int, default=200)
    parser.add_argument("--payments", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = trio.run(measure, options.transactions, options.payments)
    for name, value in figures.items():
        print(f"{name:34} {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
