"""The bus and the router: mail, calls and streams between a node, its clients and another node."""

from __future__ import annotations

import random
import stat
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from worlds.patience import within
from worlds.support import trio_test
from worlds.wire import A, B, Wire, two_nodes

from actors.kernel.machine import LinkDown
from golem.bus.client import BusClient, open_client
from golem.bus.router import Router
from golem.bus.server import Bus, BusPeer
from golem.bus.wire import BusError
from golem.net.types import RemoteError, Unreachable
from protocol.codec import Ack, Envelope, encode, encode_ack, encode_batch


def batch(sender: str, to: str) -> bytes:
    return encode_batch([Envelope(sender, to, "e", 1, 0, "t", b"\x90")])


async def start(nursery: trio.Nursery, client: BusClient) -> BusClient:
    await nursery.start(client.run)
    return client


@trio_test
async def test_socket_is_for_this_user_alone_and_long_paths_work(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(Bus(deep / "bus.sock", A).run)
        assert stat.S_IMODE((deep / "bus.sock").stat().st_mode) == 0o600
        async with open_client(deep / "bus.sock", "cli:1", "cli") as client:
            assert client.node_id == A
        nursery.cancel_scope.cancel()
    assert not (deep / "bus.sock").exists()


@trio_test
async def test_no_node_and_a_file_in_the_way_are_said(tmp_path: Path) -> None:
    with pytest.raises(BusError, match="no node at"):
        async with open_client(tmp_path / "bus.sock", "cli:1", "cli"):
            pass
    (tmp_path / "bus.sock").write_text("precious")
    with pytest.raises(BusError, match="not a socket"):
        await Bus(tmp_path / "bus.sock", A).run()
    assert (tmp_path / "bus.sock").read_text() == "precious"


@trio_test
async def test_mail_of_an_exe_unit_reaches_its_node_and_another(tmp_path: Path) -> None:
    async with two_nodes(tmp_path) as (a, b, nursery):
        unit = await start(nursery, BusClient(tmp_path / "a.sock", "exeunit:1", "exeunit"))
        home = batch(f"{A}/exeunit:1", f"{A}/activity")
        assert await unit.exchange(A, home) == encode_ack(Ack(1))
        assert a.delivered == [(home, f"{A}/exeunit:1")]
        away = batch(f"{A}/exeunit:1", f"{B}/activity")
        await unit.exchange(B, away)
        assert b.delivered == [(away, A)]


@trio_test
async def test_mail_in_the_name_of_another_is_refused(tmp_path: Path) -> None:
    async with two_nodes(tmp_path) as (a, b, nursery):
        unit = await start(nursery, BusClient(tmp_path / "a.sock", "exeunit:1", "exeunit"))
        other = await start(nursery, BusClient(tmp_path / "a.sock", "gftp:1", "gftp"))
        for client, sender in (
            (unit, f"{A}/ledger"),
            (unit, f"{A}/exeunit:2"),
            (unit, f"{B}/exeunit:1"),
            (other, f"{A}/gftp:1"),
        ):
            for to in (A, B):
                with pytest.raises(LinkDown, match="in the name of"):
                    await client.exchange(to, batch(sender, f"{to}/activity"))
        with pytest.raises(LinkDown, match="in the name of"):
            await a.router.exchange(B, batch(f"{B}/ledger", f"{B}/activity"))
        assert a.delivered == b.delivered == []


@trio_test
async def test_mail_for_an_exe_unit_goes_down_the_bus_or_is_link_down(tmp_path: Path) -> None:
    got = []

    async def on_mail(frame: bytes) -> bytes:
        got.append(frame)
        return b"ack"

    async with two_nodes(tmp_path) as (_, b, nursery):
        letter = batch(f"{B}/activity", f"{A}/exeunit:1")
        with pytest.raises(LinkDown, match="endpoint address not found"):
            await b.router.exchange(A, letter)
        await start(nursery, BusClient(tmp_path / "a.sock", "exeunit:1", "exeunit", on_mail=on_mail))
        assert await b.router.exchange(A, letter) == b"ack"
        assert got == [letter]


@trio_test
async def test_calls_in_every_direction(tmp_path: Path) -> None:
    async def on_call(sender: str, target: str, payload: bytes) -> bytes:
        if payload == b"no":
            raise RemoteError("never")
        return f"{sender} {target}".encode() + payload

    async def served(sender: str, payload: bytes) -> bytes:
        return sender.encode() + payload

    async def status(client: BusPeer, payload: bytes) -> bytes:
        return client.name.encode() + payload

    async with two_nodes(tmp_path) as (a, b, nursery):
        b.router.calls.serve("time", served)
        b.router.serve_local("cli:status", status)
        await start(nursery, BusClient(tmp_path / "b.sock", "exeunit:9", "exeunit", on_call=on_call))
        cli = await start(nursery, BusClient(tmp_path / "a.sock", "cli:1", "cli"))
        assert await a.router.calls.call(B, "exeunit:9", b"!") == f"{A} exeunit:9!".encode()
        assert await b.router.calls.call(B, "exeunit:9", b"!") == f"{B} exeunit:9!".encode()
        assert await cli.call(B, "time", b"?") == f"{A}?".encode()
        with pytest.raises(RemoteError, match="never"):
            await a.router.calls.call(B, "exeunit:9", b"no")
        with pytest.raises(Unreachable, match="endpoint address not found"):
            await a.router.calls.call(B, "exeunit:8", b"")
        with pytest.raises(RemoteError, match="no such call"):
            await cli.call(B, "cli:status", b"")  # local targets are not for other nodes
        near = await start(nursery, BusClient(tmp_path / "b.sock", "cli:2", "cli"))
        assert await near.call("", "cli:status", b".") == b"cli:2."
        with pytest.raises(RemoteError, match="not a node id"):
            await cli.call("0xzz", "time", b"")


@trio_test
async def test_streams_carry_bytes_to_this_and_another_node(tmp_path: Path) -> None:
    data = random.Random(3).randbytes(3_000_000)

    async def echo(sender: str, stream: Any) -> None:
        await stream.send_all(sender.encode())
        while chunk := await stream.receive_some(65536):
            await stream.send_all(chunk)
        await stream.send_eof()

    async with two_nodes(tmp_path) as (_, b, nursery):
        b.router.serve_stream("echo", echo)
        for path, node in (("a.sock", B), ("b.sock", "")):
            client = BusClient(tmp_path / path, "gftp:1", "gftp")
            back = bytearray()
            async with await client.open_stream(node, "echo") as stream, trio.open_nursery() as copying:

                async def send(stream: trio.SocketStream = stream) -> None:
                    await stream.send_all(data)
                    await stream.send_eof()

                copying.start_soon(send)
                while chunk := await stream.receive_some(65536):
                    back += chunk
            assert bytes(back) == (A if path == "a.sock" else B).encode() + data
        with pytest.raises(RemoteError, match="unknown stream"):
            await client.open_stream("", "nothing")
        nursery.cancel_scope.cancel()


@trio_test
async def test_a_client_outlives_a_restart_of_the_node(tmp_path: Path) -> None:
    async def status(client: BusPeer, payload: bytes) -> bytes:
        return payload

    async with trio.open_nursery() as nursery:
        client = BusClient(tmp_path / "a.sock", "exeunit:1", "exeunit")
        nursery.start_soon(client.run)
        for life in (b"1", b"2"):
            async with trio.open_nursery() as node:
                bus = Bus(tmp_path / "a.sock", A)
                Router(A, Wire(A, {}, node), bus).serve_local("unit:status", status)
                await node.start(bus.run)
                with within(5):
                    await client.wait_connected()
                assert await client.call("", "unit:status", life) == life
                node.cancel_scope.cancel()
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not client.connected
            with pytest.raises(Unreachable):
                await client.call("", "unit:status", b"")
        nursery.cancel_scope.cancel()


@trio_test
async def test_a_silent_callee_and_a_dead_one_end_the_call(tmp_path: Path) -> None:
    async def on_call(sender: str, target: str, payload: bytes) -> bytes:
        await trio.sleep_forever()
        return b""

    async with two_nodes(tmp_path) as (a, _, nursery):
        async with trio.open_nursery() as unit:
            client = await start(unit, BusClient(tmp_path / "a.sock", "exeunit:1", "exeunit", on_call=on_call))
            assert client.connected
            with pytest.raises(Unreachable, match="in time"):
                await a.router.calls.call(A, "exeunit:1", b"", timeout_s=0.05)

            async def die() -> None:
                await trio.sleep(0.05)
                unit.cancel_scope.cancel()

            nursery.start_soon(die)
            with within(5), pytest.raises(Unreachable, match="closed"):
                await a.router.calls.call(A, "exeunit:1", b"", timeout_s=30)


@trio_test
async def test_nonsense_on_the_socket_ends_the_connection_and_nothing_else(tmp_path: Path) -> None:
    async with two_nodes(tmp_path) as (a, _, nursery):
        good = await start(nursery, BusClient(tmp_path / "a.sock", "cli:1", "cli"))
        hello = encode(["hello", 1, "cli:2", "cli"])
        for raw in (
            b"\xc1",
            encode(17),
            encode(["hello", 1, "bad name!", "cli"]),
            encode(["hello", 2, "cli:2", "cli"]),
            hello + hello,
            *(random.Random(seed).randbytes(100_000) for seed in range(20)),
            b"\xdd\xff\xff\xff\xff" + bytes(1000),
        ):
            stream = await trio.open_unix_socket(str(tmp_path / "a.sock"))
            async with stream:
                with within(5):
                    try:
                        await stream.send_all(raw)
                        await stream.send_eof()
                        while await stream.receive_some(4096):
                            pass
                    except trio.BrokenResourceError:
                        pass
        assert [peer.name for peer in a.bus.peers()] == ["cli:1"]
        with pytest.raises(RemoteError, match="no such call"):
            await good.call("", "nothing", b"")
