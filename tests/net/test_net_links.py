"""Hostile peers on the link and bulk protocols: an authenticated node that speaks garbage, floods, or never reads."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgpack
import pytest
import trio
from libp2p.stream_muxer.exceptions import MuxedStreamError
from net_helpers import FAST, IMPATIENT, KEYS, config, echo, eventually, nodes
from worlds.patience import patience, within
from worlds.support import trio_test

from golem.net import PeerNetwork, Timing, Unreachable, open_network
from golem.net.host import Libp2pHost
from golem.net.links import MAX_QUEUED_BYTES, PING, PONG, REPLY, REQUEST, serve_link
from golem.net.muxed_stream import MuxStream
from golem.net.peerid import sign_record
from golem.net.types import MAX_REQUEST_BYTES
from golem.net.yamux import Mux


def packed(*frame: object) -> bytes:
    body: bytes = msgpack.packb(frame)
    return len(body).to_bytes(4, "big") + body


LINK, BULK = "/golem/link/1", "/golem/bulk/1"


async def _hello(sender: str, payload: bytes) -> bytes:
    return sign_record(KEYS[9], "golem", []).raw


async def _polite(node_id: str, stream: MuxStream) -> None:
    """Answers the victim's link as an honest node, so that the victim keeps the connection."""
    await serve_link(node_id, stream, {"net/hello": _hello}, FAST)


@asynccontextmanager
async def victim_and_attacker(
    path: Path, timing: Timing = FAST
) -> AsyncIterator[tuple[PeerNetwork, PeerNetwork, Libp2pHost, Mux]]:
    """A node, a friend of it, and a bare host connected to it that may open any stream."""
    async with nodes(path, 2, timing=timing) as (victim, friend):
        victim.serve("echo", echo)
        await friend.connect(victim.addresses[0])
        attacker = Libp2pHost(KEYS[9], FAST)
        attacker.serve_streams(LINK, _polite)
        async with attacker.run([("127.0.0.1", 0)]):
            conn = await attacker.dial(victim.peer_id, [victim.addresses[0].split("/p2p/")[0]])
            yield victim, friend, attacker, conn
            assert await friend.request(victim.node_id, "echo", b"alive") == b"alive"


@pytest.mark.parametrize(
    "attack",
    [
        b"\xff\xff\xff\xff",
        (MAX_REQUEST_BYTES * 2).to_bytes(4, "big"),
        b"\0\0\0\0",
        b"\0\0\0\1\xc1",
        packed(1, REQUEST, "echo"),
        packed(1, REQUEST, "echo", b"", b""),
        packed(-1, REQUEST, "echo", b""),
        packed(True, REQUEST, "echo", b""),
        packed(1, 99, "echo", b""),
        packed(1, REPLY, "", b""),
        packed(1, REQUEST, 5, b""),
        packed(1, REQUEST, "echo", "text"),
        packed(1, REQUEST, "s" * 5000, b""),
        packed(1, REQUEST, "echo", {"a": 1}),
        packed({}, [], "", b""),
        b"\0\0\0\x09" + b"\x91" * 9,
        b"\0\0\x10\0" + b"\x91" * 4096,
        b"\0\0\0\5\xdd\xff\xff\xff\xff",
    ],
)
def test_garbage_ends_the_link_and_nothing_else(tmp_path: Path, attack: bytes) -> None:
    async def body() -> None:
        async with victim_and_attacker(tmp_path) as (_, _, attacker, conn):
            stream = await attacker.open_stream(conn, LINK)
            await stream.write(attack)
            with within(3), pytest.raises(MuxedStreamError):
                await stream.read()

    trio.run(body)


def test_a_link_speaks_as_written(tmp_path: Path) -> None:
    """The wire format, byte for byte."""

    async def body() -> None:
        async with victim_and_attacker(tmp_path) as (_, _, attacker, conn):
            stream = await attacker.open_stream(conn, LINK)
            await stream.write(packed(7, PING, "", b"") + packed(8, REQUEST, "echo", b"payload"))
            data = b""
            while len(data) < len(packed(7, PONG, "", b"") + packed(8, REPLY, "", b"payload")):
                data += await stream.read()
            assert data == packed(7, PONG, "", b"") + packed(8, REPLY, "", b"payload")

    trio.run(body)


async def _flood(stream: MuxStream, data: bytes) -> None:
    try:
        while True:
            await stream.write(data)
    except MuxedStreamError:
        pass


@pytest.mark.parametrize("kind", ["ping", "echo", "unknown"])
def test_who_asks_and_never_reads_is_bounded(tmp_path: Path, kind: str) -> None:
    async def body() -> None:
        async with victim_and_attacker(tmp_path) as (victim, _, attacker, conn):
            stream = await attacker.open_stream(conn, LINK)
            size = {"ping": 0, "echo": 100_000, "unknown": 0}[kind]
            request = packed(1, PING if kind == "ping" else REQUEST, kind, bytes(size))
            if kind == "echo":
                request = b"".join(packed(number, REQUEST, kind, bytes(size)) for number in range(20))
            with trio.move_on_after(1.5):
                await _flood(stream, request * (1 if size else 1000))
            assert victim.is_up
            assert _resident_mb() - before < 400

    before = _resident_mb()
    trio.run(body)
    assert _resident_mb() - before < 4 * MAX_QUEUED_BYTES / 1e6


def _resident_mb() -> float:
    with open(f"/proc/{os.getpid()}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@trio_test
async def test_a_false_hello_is_refused(tmp_path: Path) -> None:
    async with victim_and_attacker(tmp_path) as (_, friend, attacker, conn):
        stream = await attacker.open_stream(conn, LINK)
        record = friend._record().raw
        for payload in (b"", b"junk", record):
            await stream.write(packed(1, REQUEST, "net/hello", payload))
            answer = msgpack.unpackb((await stream.read())[4:])
            assert answer[1] == 2
            assert "record" in answer[2]


@trio_test
async def test_a_peer_that_accepts_and_says_nothing_is_unreachable(tmp_path: Path) -> None:
    """It completes the handshakes, takes our link and never answers the hello."""
    async with open_network(KEYS[0], config(tmp_path / "0", timing=IMPATIENT)) as one:
        mute = Libp2pHost(KEYS[9], FAST)

        async def hold(node_id: str, stream: MuxStream) -> None:
            await trio.sleep_forever()

        mute.serve_streams(LINK, hold)
        async with mute.run([("127.0.0.1", 0)]):
            await one.wait_up()
            start = trio.current_time()
            with pytest.raises(Exception, match=r"did not answer|broke"):
                await one.connect(f"{mute.addresses()[0]}/p2p/{mute.peer_id}", timeout_s=patience(8))
            assert trio.current_time() - start < patience(5)
            assert one.sessions() == []


@trio_test
async def test_a_peer_that_answers_with_the_record_of_another_gets_no_session(tmp_path: Path) -> None:
    async def lie(sender: str, payload: bytes) -> bytes:
        return sign_record(KEYS[8], "golem", []).raw

    async def serve(node_id: str, stream: MuxStream) -> None:
        await serve_link(node_id, stream, {"net/hello": lie}, FAST)

    async with open_network(KEYS[0], config(tmp_path / "0")) as one:
        liar = Libp2pHost(KEYS[9], FAST)
        liar.serve_streams(LINK, serve)
        async with liar.run([("127.0.0.1", 0)]):
            await one.wait_up()
            with pytest.raises(Unreachable, match="record of somebody else"):
                await one.connect(f"{liar.addresses()[0]}/p2p/{liar.peer_id}")
            assert one.sessions() == []


@trio_test
async def test_half_named_bulk_streams_end(tmp_path: Path) -> None:
    async with victim_and_attacker(tmp_path, IMPATIENT) as (_, _, attacker, conn):
        for attack in (b"", b"\x05ab", b"\x00", b"\xff" * 256, b"\x01\xff"):
            stream = await attacker.open_stream(conn, BULK)
            await stream.write(attack)
            with within(4):
                try:
                    while await stream.read() in (b"\1",):
                        pass
                except MuxedStreamError:
                    continue
        await eventually(lambda: len(conn.streams) <= 8)
