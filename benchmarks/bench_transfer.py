#!/usr/bin/env python3
"""How fast files move between nodes: exe-unit and `gftp` through both nodes, beside a raw stream of stock py-libp2p.

Every figure is of one file, from its first byte asked for to its hash checked and its name taken, over loopback:

    gftp process or exe-unit - bus - node - libp2p - node - bus or file - gftp process

Rounds of all kinds take turns, so that what else the machine does hits them alike. Run:

    python benchmarks/bench_transfer.py [--mb 200] [--rounds 3] [--json FILE]
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
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import trio  # noqa: E402
from bench_net import KEYS, serve_stock, stock  # noqa: E402

from golem.lab.localnet import LocalNode, open_localnet  # noqa: E402

RAW = {"py-libp2p, 64 KiB writes": 1 << 16, "py-libp2p, 1 MiB writes": 1 << 20}
AIM = 0.8  # of the raw stream
MB = 10**6
Move = Callable[[], Awaitable[None]]


class Helper:
    """A process that does what a line says and answers with a line."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    async def ask(self, request: Any) -> Any:
        """Send a JSON line and return the answer's."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        answer = json.loads(await self.line() or "null")
        if not isinstance(answer, dict) or "error" in answer:
            raise RuntimeError(f"{request}: {answer}")
        return answer["result"]

    async def line(self) -> str:
        """Return the next line that the process writes."""
        assert self._process.stdout is not None
        return (await trio.to_thread.run_sync(self._process.stdout.readline)).decode().strip()

    async def gftp(self, method: str, **params: Any) -> Any:
        """Ask a `gftp server`."""
        return await self.ask({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@asynccontextmanager
async def helper(command: list[str], environment: dict[str, str]) -> AsyncIterator[Helper]:
    made = Helper(command, environment)
    try:
        yield made
    finally:
        made.close()


def gftp_server(node: LocalNode) -> Any:
    """The `gftp` of an agent in front of a node."""
    return helper([sys.executable, "-m", "golem.files.tool", "server"], node.environment)


# the exe-unit's side: its own transfers, in a process of their own


async def serve_unit(bus: Path, volume: Path) -> None:
    """Carry out the transfers that lines of stdin name, as an exe-unit does."""
    from golem.exeunit.process import BusGftp
    from golem.exeunit.runtime import Volume
    from golem.exeunit.transfer.spool import TransferPolicy
    from golem.exeunit.transfer.transfers import Transfers

    transfers = Transfers(TransferPolicy.local(), BusGftp(bus))
    while line := await trio.to_thread.run_sync(sys.stdin.readline):
        source, target = json.loads(line)
        size = await transfers.transfer(source, target, (Volume("/v", volume),))
        print(json.dumps({"result": size}), flush=True)


# a raw stream of stock py-libp2p, from memory to memory


async def raw_sender(address: str, stack: AsyncExitStack) -> Callable[[int, int], Awaitable[None]]:
    """Return what sends so many bytes in writes of a size, until the other process has them."""
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from multiaddr import Multiaddr

    target = info_from_p2p_addr(Multiaddr(address))
    host = await stack.enter_async_context(stock(KEYS[1]))
    await host.get_network().dial_addr(target.addrs[0], target.peer_id)
    stream = await host.new_stream(target.peer_id, ["/sink"])

    async def send(size: int, block: int) -> None:
        data = bytes(block)
        await stream.write(size.to_bytes(8, "big"))
        left = size
        while left:
            await stream.write(data[: min(block, left)])
            left -= min(block, left)
        await stream.read(1)

    return send


async def serve_raw_sender(address: str) -> None:
    """The sending process: it is told sizes on stdin."""
    async with AsyncExitStack() as stack:
        send = await raw_sender(address, stack)
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            size, block = json.loads(line)
            await send(size, block)
            print('{"result": null}', flush=True)


# the run


async def timed(move: Move, size: int) -> float:
    """MB/s of one move."""
    start = time.perf_counter()
    await move()
    return size / MB / (time.perf_counter() - start)


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha3_256").hexdigest()


async def measure(size: int, rounds: int) -> dict[str, list[float]]:
    """MB/s of each round by kind."""
    with tempfile.TemporaryDirectory(prefix="golem-bench-") as name:
        folder = Path(name)
        source = folder / "source.bin"
        source.write_bytes(os.urandom(size))
        wanted = await trio.to_thread.run_sync(digest_of, source)
        async with open_localnet(folder / "net") as net, AsyncExitStack() as stack:
            requestor, provider = await net.start_node("requestor"), await net.start_node("provider")
            publisher = await stack.enter_async_context(gftp_server(requestor))
            other = await stack.enter_async_context(gftp_server(provider))
            (folder / "volume").mkdir()
            unit_command = [sys.executable, __file__, "--unit", str(provider.data_dir / "bus.sock"), str(folder / "volume")]
            unit = await stack.enter_async_context(helper(unit_command, provider.environment))
            sink = await stack.enter_async_context(helper([sys.executable, __file__, "--raw-sink"], {}))
            address = await sink.line()
            raw = await stack.enter_async_context(helper([sys.executable, __file__, "--raw-sender", address], {}))
            [published] = await publisher.gftp("publish", files=[str(source)])
            slot = await publisher.gftp("receive", output_file=str(folder / "received"))

            moves: dict[str, tuple[Move, Path | None]] = {}
            for label, block in RAW.items():
                moves[label] = (lambda block=block: raw.ask([size, block])), None  # type: ignore[misc]
            moves["exe-unit download"] = (
                lambda: unit.ask([published["url"], "container:/v/file"]), folder / "volume" / "file")  # fmt: skip
            moves["exe-unit upload"] = (
                lambda: unit.ask(["container:/v/file", slot["url"]]), folder / "received")  # fmt: skip
            moves["gftp download"] = (
                lambda: other.gftp("download", url=published["url"], output_file=str(folder / "got")), folder / "got",
            )  # fmt: skip
            moves["gftp upload"] = (
                lambda: other.gftp("upload", url=slot["url"], file=str(source)), folder / "received")  # fmt: skip
            found: dict[str, list[float]] = {label: [] for label in moves}
            for number in range(rounds + 1):  # the first one warms up: dials, page cache
                for label, (move, result) in moves.items():
                    if result is not None:
                        result.unlink(missing_ok=True)  # else its removal is measured as well
                    if label.endswith("upload"):  # a slot takes one file
                        slot |= await publisher.gftp("receive", output_file=str(folder / "received"))
                    rate = await timed(move, size)
                    if result is not None and await trio.to_thread.run_sync(digest_of, result) != wanted:
                        raise RuntimeError(f"{label}: another content")
                    if number:
                        found[label].append(rate)
            return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--mb", type=int, default=200, help="size of the file in MB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--unit", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--raw-sink", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--raw-sender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.unit:
        trio.run(serve_unit, *options.unit)
    elif options.raw_sink:
        trio.run(serve_stock)
    elif options.raw_sender:
        trio.run(serve_raw_sender, options.raw_sender)
    else:
        report(options)


def report(options: argparse.Namespace) -> None:
    """Measure, print, and write the figures if asked to."""
    found = trio.run(measure, options.mb * MB, options.rounds)
    raw = {label: statistics.median(found[label]) for label in RAW}
    print(f"a file of {options.mb} MB, MB/s; aim: {AIM:g} of py-libp2p")
    print(f"{'':26} {'median':>8} {'worst':>8}" + "".join(f"   of {label.partition(', ')[2]}" for label in RAW))
    for label, rates in found.items():
        median = statistics.median(rates)
        shares = "".join(f"{median / rate:{6 + len(name.partition(', ')[2])}.2f}" for name, rate in raw.items())
        print(f"{label:26} {median:8.0f} {min(rates):8.0f}{shares}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {"mb": options.mb, "mb_per_s": found, "raw_mb_per_s": raw, "aim": AIM, "load": os.getloadavg()[0]}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
