#!/usr/bin/env python3
"""What users wait for, measured on a whole market of real processes: two nodes, an agent, the dev chain, on loopback.

    python benchmarks/scenario.py [--rounds 5] [--json FILE]

Prints median and worst of each step, beside raw py-libp2p and raw Trio TCP from the same run (`bench_net.py`), and the
aim of each figure. Machines differ: compare ratios, not seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import trio

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "rest")]

from requestor import ACTIVITY, MARKET, PAYMENT, Requestor, published  # noqa: E402

from golem.lab.localnet import LocalNet, LocalNode, open_localnet  # noqa: E402

HELLO = ROOT / "examples" / "hello" / "hello.wasm"
FILE_BYTES = 64 * 1024 * 1024
AIMS = {
    "start to REST ready [s]": 1.5, "demand to first proposal [s]": 0.3, "draft to approved agreement [s]": 0.25,
    "demand to first result [s]": 3.0, "gftp download, 64 MiB [MiB/s]": 60.0, "idle node [MB]": 150.0,
}  # fmt: skip

Samples = dict[str, list[float]]


async def start_times(net: LocalNet, rounds: int, samples: Samples) -> None:
    """Start a node on its old data several times."""
    node = await net.start_node("starter")
    await node.process.stop()
    for _ in range(rounds):
        begin = time.perf_counter()
        node.process.start()
        await node.wait_ready()
        samples["start to REST ready [s]"].append(time.perf_counter() - begin)
        await node.process.stop()


async def one_walk(net: LocalNet, node: LocalNode, samples: Samples, execs: int) -> None:
    """One requestor's walk, each step timed."""
    async with node.client() as client, published(HELLO, node.environment) as package:
        requestor = Requestor(client, net.name)
        since = datetime.now(UTC).isoformat()
        allocation = await requestor.allocate()
        begin = time.perf_counter()
        demand, body = await requestor.demand(allocation, package)
        initial = await requestor.proposal(demand, "Initial")
        samples["demand to first proposal [s]"].append(time.perf_counter() - begin)
        draft = await requestor.negotiate(demand, body, initial)
        step = time.perf_counter()
        agreement = await requestor.agree(draft)
        samples["draft to approved agreement [s]"].append(time.perf_counter() - step)
        step = time.perf_counter()
        activity = await requestor.create_activity(agreement)
        samples["create to Initialized [s]"].append(time.perf_counter() - step)
        run = {"run": {"entry_point": "hello", "args": ["you"], "capture": {"stdout": {"atEnd": {}}}}}
        results = await requestor.run(activity, {"deploy": {}}, {"start": {}}, run)
        assert results[-1]["stdout"], results
        samples["demand to first result [s]"].append(time.perf_counter() - begin)
        for _ in range(execs):
            step = time.perf_counter()
            await requestor.run(activity, run)
            samples["exec round trip, hello [s]"].append(time.perf_counter() - step)
        await requestor.destroy_activity(activity)
        await requestor.call("DELETE", f"{MARKET}/demands/{demand}")
        step = time.perf_counter()
        await requestor.terminate(agreement)
        invoice = await requestor.invoice(agreement, since)
        samples["terminate to invoice [s]"].append(time.perf_counter() - step)
        step = time.perf_counter()
        await requestor.accept(invoice, allocation)
        await requestor.wait_settled(invoice["invoiceId"])
        samples["accept to SETTLED [s]"].append(time.perf_counter() - step)
        await requestor.call("DELETE", f"{PAYMENT}/allocations/{allocation['allocationId']}")
        assert ACTIVITY


async def gftp_speed(net: LocalNet, publisher: LocalNode, reader: LocalNode, samples: Samples, rounds: int) -> None:
    """Download a file from one node through the other."""
    source, target = net.folder / "source.bin", net.folder / "target.bin"
    source.write_bytes(os.urandom(FILE_BYTES))
    digest = hashlib.sha3_256(source.read_bytes()).hexdigest()
    async with published(source, publisher.environment) as package:
        url = package.split(":", 3)[3]
        for _ in range(rounds):
            target.unlink(missing_ok=True)
            begin = time.perf_counter()
            line = ["gftp", "download", url, str(target)]
            environment = {**os.environ, **reader.environment}
            path = str(Path(sys.executable).parent / "gftp")
            await trio.run_process([path, *line[1:]], env=environment, capture_stdout=True)
            seconds = time.perf_counter() - begin
            assert hashlib.sha3_256(target.read_bytes()).hexdigest() == digest
            samples["gftp download, 64 MiB [MiB/s]"].append(FILE_BYTES / 2**20 / seconds)


async def measure(rounds: int, execs: int) -> Samples:
    samples: Samples = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="golem-bench-") as folder:
        async with open_localnet(Path(folder)) as net:
            await start_times(net, rounds, samples)
            requestor, provider = await net.start_node("requestor"), await net.start_node("provider")
            await requestor.command("payment", "fund")
            await trio.sleep(3)
            for node in (requestor, provider):
                assert node.process.running
                samples["idle node [MB]"].append(psutil.Process(node.process.running.pid).memory_info().rss / 1e6)
            net.start_agent(provider, subnet=net.name)
            await one_walk(net, requestor, defaultdict(list), 1)  # a warm-up: compile cache, first dial
            for _ in range(rounds):
                await one_walk(net, requestor, samples, execs)
            await gftp_speed(net, requestor, provider, samples, max(rounds // 2, 2))
    return samples


def baselines() -> dict[str, Any]:
    """Raw figures of the same machine at the same time: `bench_net.py` as a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        result = subprocess.run(
            [sys.executable, str(ROOT / "benchmarks" / "bench_net.py"), "--json", file.name],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        print(result.stdout or result.stderr)
        return json.loads(Path(file.name).read_text() or "{}") if result.returncode == 0 else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--execs", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-baselines", action="store_true")
    options = parser.parse_args()
    samples = trio.run(measure, options.rounds, options.execs)
    print(f"{'step':34} {'median':>9} {'worst':>9} {'aim':>8}   n")
    for name, values in samples.items():
        worst = min(values) if "MiB/s" in name else max(values)
        print(f"{name:34} {statistics.median(values):9.3f} {worst:9.3f} {AIMS.get(name, ''):>8}   {len(values)}")
    raw = {} if options.no_baselines else baselines()
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"samples": samples, "aims": AIMS, "raw": raw}, indent=1))


if __name__ == "__main__":
    main()
