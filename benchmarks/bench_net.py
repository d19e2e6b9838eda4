"""How fast nodes talk: our Network beside a raw stream of stock py-libp2p and raw Trio TCP, in one run.

Two processes on loopback. Figures: round trip of a 32-byte request (p50, p95), requests a second one after another and
32 at a time, bulk MB/s in 64 KiB writes, and the latency of gossip. Run:

    python benchmarks/bench_net.py [--seconds 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import trio

from golem.net import NetConfig, PeerNetwork, PeerStream, open_network

KEYS = (b"\x31" * 32, b"\x32" * 32)
PAYLOAD = bytes(32)
BLOCK = bytes(65536)
AT_ONCE = 32
Request = Callable[[], Awaitable[object]]
Send = Callable[[int], Awaitable[object]]  # send so many bytes, return when the other end has them


async def latencies(request: Request, seconds: float) -> list[float]:
    """Seconds each of requests made one after another."""
    for _ in range(50):
        await request()
    found, end = [], time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        await request()
        found.append(time.perf_counter() - start)
    return sorted(found)


async def throughput(request: Request, seconds: float, at_once: int) -> float:
    """Requests a second with so many in flight."""
    done, end = 0, time.perf_counter() + seconds

    async def worker() -> None:
        nonlocal done
        while time.perf_counter() < end:
            await request()
            done += 1

    start = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(at_once):
            nursery.start_soon(worker)
    return done / (time.perf_counter() - start)


async def bulk(send: Send, seconds: float) -> float:
    """MB/s, in a transfer that takes about the given time."""
    size = 16 << 20
    await send(size)
    start = time.perf_counter()
    await send(size)
    size = max(size, int(size * seconds / (time.perf_counter() - start)) >> 16 << 16)
    start = time.perf_counter()
    await send(size)
    return size / (time.perf_counter() - start) / 1e6


# our Network


async def _echo(sender: str, payload: bytes) -> bytes:
    return payload


async def _sink(sender: str, stream: PeerStream) -> None:
    """Reads "8 bytes of size, so many bytes" for ever, and answers each with one byte."""
    await _serve_sink(stream.receive_some, stream.send_all)


async def _serve_sink(receive: Callable[[int], Awaitable[bytes]], send: Callable[[bytes], Awaitable[None]]) -> None:
    buffer = bytearray()
    while True:
        while len(buffer) < 8:
            if not (data := await receive(65536)):
                return
            buffer += data
        (size,) = struct.unpack_from(">Q", buffer)
        got = len(buffer) - 8
        buffer.clear()
        while got < size:
            if not (data := await receive(1 << 18)):
                return
            got += len(data)
        await send(b"k")


def _sender(send: Callable[[bytes], Awaitable[None]], receive: Callable[[int], Awaitable[bytes]]) -> Send:
    async def transfer(size: int) -> None:
        await send(struct.pack(">Q", size))
        for _ in range(size // len(BLOCK)):
            await send(BLOCK)
        assert await receive(1) == b"k"

    return transfer


async def serve_ours(path: Path) -> None:
    async with open_network(KEYS[0], NetConfig(path, ("127.0.0.1:0",), mdns=False)) as network:
        network.serve("echo", _echo)
        network.serve_stream("sink", _sink)

        async def back(origin: str, payload: bytes) -> bool:
            network.publish("pong", payload)
            return True

        network.subscribe("ping", back)

        async def ignore(origin: str, payload: bytes) -> bool:
            return True

        network.subscribe("pong", ignore)
        await network.wait_up()
        print(network.addresses[0], flush=True)
        await trio.sleep_forever()


async def gossip_latency(network: PeerNetwork, rounds: int) -> list[float]:
    """Seconds one way: half of there and back."""
    waiting: dict[bytes, trio.Event] = {}

    async def hear(origin: str, payload: bytes) -> bool:
        if payload in waiting:
            waiting[payload].set()
        return True

    async def ignore(origin: str, payload: bytes) -> bool:
        return True

    network.subscribe("pong", hear)
    network.subscribe("ping", ignore)
    found: list[float] = []
    for number in range(rounds + 20):
        payload = number.to_bytes(4, "big") * 128
        waiting[payload] = trio.Event()
        start = time.perf_counter()
        network.publish("ping", payload)
        with trio.move_on_after(1):
            await waiting[payload].wait()
            if number >= 20:
                found.append((time.perf_counter() - start) / 2)
        await trio.sleep(0.05)
    return sorted(found)


async def measure_ours(address: str, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config = NetConfig(Path(folder), ("127.0.0.1:0",), mdns=False)
        async with open_network(KEYS[1], config) as network:
            await network.wait_up()
            start = time.perf_counter()
            node_id = await network.connect(address)
            connect_s = time.perf_counter() - start

            async def request() -> None:
                await network.request(node_id, "echo", PAYLOAD)

            stream = await network.open_stream(node_id, "sink")
            row = await measure(request, _sender(stream.send_all, stream.receive_some), seconds)
            gossip = await gossip_latency(network, 60)
            return {**row, "connect_ms": connect_s * 1e3, "gossip_p50_ms": at(gossip, 0.5), "gossip_p95_ms": at(gossip, 0.95)}


# a raw stream of stock py-libp2p: Noise, Yamux, no guard; frames of fixed size


@asynccontextmanager
async def stock(key: bytes) -> AsyncIterator[Any]:
    import coincurve
    from libp2p import new_host
    from libp2p.crypto.keys import KeyPair
    from libp2p.crypto.secp256k1 import Secp256k1PrivateKey
    from libp2p.crypto.x25519 import create_new_key_pair
    from libp2p.network.config import ConnectionConfig
    from libp2p.security.noise.transport import PROTOCOL_ID, Transport
    from multiaddr import Multiaddr

    private = Secp256k1PrivateKey(coincurve.PrivateKey(key))
    pair = KeyPair(private, private.get_public_key())
    host: Any = new_host(
        key_pair=pair,
        sec_opt={PROTOCOL_ID: Transport(pair, noise_privkey=create_new_key_pair().private_key)},
        connection_config=ConnectionConfig(min_connections=0, low_watermark=0),
    )
    async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        yield host


async def serve_stock() -> None:
    async def echo(stream: Any) -> None:
        try:
            while data := await stream.read(65536):
                await stream.write(data)
        except Exception:  # the library raises a dozen types at the end of a stream, and dies of any that escapes
            return

    async def sink(stream: Any) -> None:
        try:
            await _serve_sink(stream.read, stream.write)
        except Exception:  # as above
            return

    async with stock(KEYS[0]) as host:
        host.set_stream_handler("/echo", echo)
        host.set_stream_handler("/sink", sink)
        print(host.get_addrs()[0], flush=True)
        await trio.sleep_forever()


async def measure_stock(address: str, seconds: float) -> dict[str, Any]:
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from multiaddr import Multiaddr

    target = info_from_p2p_addr(Multiaddr(address))
    async with stock(KEYS[1]) as host:
        start = time.perf_counter()
        await host.get_network().dial_addr(target.addrs[0], target.peer_id)
        stream = await host.new_stream(target.peer_id, ["/echo"])
        connect_s = time.perf_counter() - start
        sink = await host.new_stream(target.peer_id, ["/sink"])

        async def request() -> None:
            await stream.write(PAYLOAD)
            got = 0
            while got < len(PAYLOAD):
                got += len(await stream.read(len(PAYLOAD) - got))

        row = await measure(request, _sender(sink.write, sink.read), seconds, at_once=False)
        return {**row, "connect_ms": connect_s * 1e3}


# raw Trio TCP: the upper bound, neither encrypted nor multiplexed


async def serve_tcp() -> None:
    async def handle(stream: trio.SocketStream) -> None:
        kind = await stream.receive_some(1)
        try:
            if kind == b"s":
                await _serve_sink(stream.receive_some, stream.send_all)
            async for data in stream:
                await stream.send_all(data)
        except trio.BrokenResourceError:
            return

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    print(listener.socket.getsockname()[1], flush=True)
    await trio.serve_listeners(handle, [listener])


async def measure_tcp(address: str, seconds: float) -> dict[str, Any]:
    start = time.perf_counter()
    stream = await trio.open_tcp_stream("127.0.0.1", int(address))
    connect_s = time.perf_counter() - start
    await stream.send_all(b"e")
    sink = await trio.open_tcp_stream("127.0.0.1", int(address))
    await sink.send_all(b"s")

    async def request() -> None:
        await stream.send_all(PAYLOAD)
        got = 0
        while got < len(PAYLOAD):
            got += len(await stream.receive_some(len(PAYLOAD) - got))

    row = await measure(request, _sender(sink.send_all, sink.receive_some), seconds, at_once=False)
    return {**row, "connect_ms": connect_s * 1e3}


# the run


def at(values: list[float], share: float) -> float | None:
    """A percentile in ms."""
    return values[min(len(values) - 1, int(share * len(values)))] * 1e3 if values else None


async def measure(request: Request, send: Send, seconds: float, at_once: bool = True) -> dict[str, Any]:
    found = await latencies(request, seconds)
    return {
        "rtt_p50_ms": at(found, 0.5),
        "rtt_p95_ms": at(found, 0.95),
        "requests_per_s": len(found) / sum(found),
        "requests_per_s_32": await throughput(request, seconds, AT_ONCE) if at_once else None,
        "bulk_mb_per_s": await bulk(send, seconds),
    }


STACKS: dict[str, Callable[[str, float], Awaitable[dict[str, Any]]]] = {
    "golem.net": measure_ours,
    "py-libp2p stream": measure_stock,
    "trio TCP": measure_tcp,
}
COLUMNS = {
    "connect_ms": "connect ms",
    "rtt_p50_ms": "RTT p50 ms",
    "rtt_p95_ms": "p95 ms",
    "requests_per_s": "req/s",
    "requests_per_s_32": "req/s, 32 at once",
    "bulk_mb_per_s": "bulk MB/s",
    "gossip_p50_ms": "gossip p50 ms",
    "gossip_p95_ms": "p95 ms",
}


def serve(stack: str) -> None:
    """The other process: serves one stack until it is killed."""
    if stack == "golem.net":
        with tempfile.TemporaryDirectory() as folder:
            trio.run(serve_ours, Path(folder))
    else:
        trio.run(serve_stock if stack == "py-libp2p stream" else serve_tcp)


def run(stack: str, seconds: float) -> dict[str, Any]:
    """Measure one stack against a process of its own."""
    command = [sys.executable, __file__, "--serve", stack]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            return trio.run(STACKS[stack], server.stdout.readline().strip(), seconds)
        finally:
            server.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--serve", choices=STACKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    rows = {stack: run(stack, options.seconds) for stack in STACKS}
    print("| stack | " + " | ".join(COLUMNS.values()) + " |")
    print("|" + "---|" * (len(COLUMNS) + 1))
    for stack, row in rows.items():
        cells = ["-" if row.get(key) is None else f"{row[key]:.4g}" for key in COLUMNS]
        print(f"| {stack} | " + " | ".join(cells) + " |")
    if options.json:
        load = os.getloadavg()[0]
        options.json.write_text(json.dumps({"stacks": rows, "load": load, "cpus": os.cpu_count()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
