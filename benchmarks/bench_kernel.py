"""The kernel in figures: asks, durable hops between two nodes, merged fsyncs, and the cost of hostile frames.

Two systems in one process, each with a journal on disk, joined by a transport that calls the other. Run:

    python benchmarks/bench_kernel.py [--messages 2000] [--synchronous FULL] [--dir DIR] [--json FILE]

Rates are per second, latencies in milliseconds, on whatever machine and disk runs it (`--dir` chooses the disk).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from actors.kernel.journal import Journal
from actors.kernel.machine import NOTHING, Emit, Meta, Reply, Rows, Send, Step
from actors.kernel.system import System
from protocol.codec import Envelope, decode_batch, encode
from protocol.types import Message, Undelivered, Violation, node_of

Figures = dict[str, float]


class Put(Message, frozen=True):
    key: str
    value: str


class Get(Message, frozen=True):
    key: str


class Burst(Message, frozen=True):
    to: str
    first: int
    messages: int


class Bounce(Message, frozen=True):
    to: str
    hops: int


class Item(Message, frozen=True):
    value: str


class Ball(Message, frozen=True):
    hops: int


class Bench:
    """Keeps items, sends bursts, plays ball with its like on another node, and notes when the ball came."""

    name = "bench"
    local = Put | Get | Burst | Bounce | Undelivered
    peer = Item | Ball
    rows = Item | None

    def __init__(self) -> None:
        self.received = 0
        self.ball_at: list[float] = []

    def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
        """One row or one event a message: the least that a real step does."""
        match message:
            case Put(key, value):
                return Step({key: Item(value)}, [Reply(Item(value))])
            case Get(key):
                return Step({}, [Reply(rows.get(key, Item("")))])
            case Burst(to, first, messages):
                return Step({}, [*(Send(to, Item(str(first + i))) for i in range(messages)), Reply(Item("sent"))])
            case Bounce(to, hops):
                return Step({}, [Send(to, Ball(hops)), Reply(Item("served"))])
            case Item(value):
                self.received += 1
                return Step({f"got/{value}": message})
            case Ball(hops):
                self.ball_at.append(time.perf_counter())
                if not hops:
                    return Step({}, [Emit("over", message)])
                return Step({"ball": Item(str(hops))}, [Send(meta.sender, Ball(hops - 1))])
        return NOTHING


class Direct:
    """A transport that calls the other node."""

    def __init__(self, source: str, systems: dict[str, System]) -> None:
        self.source, self.systems = source, systems

    async def exchange(self, node: str, frame: bytes) -> bytes:
        """Deliver at once."""
        return await self.systems[node].deliver(frame, self.source)


def latency(prefix: str, seconds: list[float]) -> Figures:
    """Return median and 99th percentile in milliseconds."""
    ordered = sorted(seconds)
    return {
        f"{prefix}_p50_ms": statistics.median(ordered) * 1e3,
        f"{prefix}_p99_ms": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e3,
    }


async def asks(system: System, make: Callable[[int], Message], messages: int, clients: int) -> list[float]:
    """Ask `messages` times from `clients` at once; return the latencies (seconds)."""
    numbers, took = count(), list[float]()

    async def client() -> None:
        while (number := next(numbers)) < messages:
            start = time.perf_counter()
            await system.ask("bench", make(number), timeout_s=60)
            took.append(time.perf_counter() - start)

    async with trio.open_nursery() as nursery:
        for _ in range(clients):
            nursery.start_soon(client)
    return took


async def timed(figures: Figures, name: str, work: Awaitable[list[float]], messages: int) -> None:
    start = time.perf_counter()
    took = await work
    figures[f"{name}_per_s"] = messages / (time.perf_counter() - start)
    figures.update(latency(name, took))


async def measure(folder: Path, messages: int, synchronous: str) -> Figures:
    """Run all measurements on fresh journals in `folder`."""
    systems: dict[str, System] = {}
    machines = {"A": Bench(), "B": Bench()}
    figures: Figures = {}
    for node, machine in machines.items():
        numbers = count()
        journal = Journal(f"{folder}/{node}.db", lambda node=node: f"epoch-{node}", synchronous=synchronous)  # type: ignore[misc]
        new_trace = lambda numbers=numbers: f"t{next(numbers)}"  # noqa: E731
        systems[node] = System(node, journal, Direct(node, systems), clock=time.time, new_trace=new_trace)
        systems[node].add(machine)
    a = systems["A"]
    async with trio.open_nursery() as nursery:
        for system in systems.values():
            await nursery.start(system.run)
        put: Callable[[int], Message] = lambda i: Put(f"k{i % 997}", str(i))  # noqa: E731
        await timed(figures, "get_1_client", asks(a, lambda i: Get(f"k{i % 997}"), messages, 1), messages)
        await timed(figures, "put_1_client", asks(a, put, messages // 4, 1), messages // 4)
        before = a.journal.commits
        await timed(figures, "put_32_clients", asks(a, put, messages, 32), messages)
        figures["put_32_clients_asks_per_fsync"] = messages / max(a.journal.commits - before, 1)
        figures.update(await hops(systems, machines, messages))
        figures.update(await ball(systems, machines, messages // 4))
        nursery.cancel_scope.cancel()
    for system in systems.values():
        assert node_of(f"{system.node}/bench") == system.node
        system.journal.close()
    return figures


async def hops(systems: dict[str, System], machines: dict[str, Bench], messages: int) -> Figures:
    """Send `messages` durable messages from A to B, in bursts of 10, until B has committed the last."""
    a, b = systems["A"], systems["B"]
    before = a.journal.commits + b.journal.commits
    start = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for first in range(0, messages, 10):
            nursery.start_soon(a.ask, "bench", Burst("B/bench", first, 10), 60)
            if first % 1000 == 0:
                await trio.lowlevel.checkpoint()
    while f"got/{messages - 1}" not in b.rows("bench") or a.journal.links():
        await trio.sleep(0.002)
    took = time.perf_counter() - start
    assert machines["B"].received == messages
    fsyncs = a.journal.commits + b.journal.commits - before
    return {"hop_burst_per_s": messages / took, "hop_burst_hops_per_fsync": messages / fsyncs}


async def ball(systems: dict[str, System], machines: dict[str, Bench], hops: int) -> Figures:
    """Let one message bounce between A and B: the latency of a durable hop on an idle node."""
    await systems["A"].ask("bench", Bounce("B/bench", hops))
    over = hops % 2 == 0
    await systems["B" if over else "A"].feeds.wait("over", 0, 300)
    times = sorted(machines["A"].ball_at + machines["B"].ball_at)
    took = [later - earlier for earlier, later in pairwise(times)]
    return {"hop_ball_per_s": len(took) / (times[-1] - times[0]), **latency("hop_ball", took)}


def hostile() -> Figures:
    """Time the refusal of frames that claim or nest too much (informative; the tests bound the memory)."""
    one = encode(Envelope("", "", "", 1, 0, "", b""))
    frames = {
        "claim": b"\x91\xdd\xff\xff\xff\xff",
        "deep": b"\x91" * 1_000_000,
        "many": b"\xdd" + (400_000).to_bytes(4, "big") + one * 400_000,
    }
    figures: Figures = {}
    for name, frame in frames.items():
        start = time.perf_counter()
        try:
            decode_batch(frame)
        except Violation:
            figures[f"hostile_{name}_refused_ms"] = (time.perf_counter() - start) * 1e3
    slow = [name for name, took_ms in figures.items() if took_ms > 10]
    if slow or len(figures) != len(frames):
        print(f"warning: hostile frames are refused slowly or not at all: {slow or figures}", file=sys.stderr)
    return figures


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--messages", type=int, default=2000)
    parser.add_argument("--synchronous", choices=("FULL", "NORMAL", "OFF"), default="FULL")
    parser.add_argument("--dir", type=Path, default=None, help="where the journals go (default: the temporary directory)")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        figures = trio.run(measure, Path(folder), max(args.messages, 100) // 10 * 10, args.synchronous)
    figures.update(hostile())
    print(f"{'figure':36} {'value':>12}   (synchronous={args.synchronous})")
    for name, value in figures.items():
        print(f"{name:36} {value:12.3f}")
    if args.json:
        args.json.write_text(json.dumps({"synchronous": args.synchronous, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
