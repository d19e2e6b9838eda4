"""Each way in which stock py-libp2p 0.8.1 dies or hangs, tried on our guarded host."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from functools import partial
from typing import Any

import pytest
import trio
import trio.lowlevel
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.pubsub.pb import rpc_pb2
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.stream_muxer.exceptions import MuxedStreamError, MuxedStreamReset
from libp2p.utils.varint import encode_varint_prefixed
from net_helpers import FAST, IMPATIENT, KEYS, dial_stock, echo_stream, eventually, frame, hosts, is_serving, key_pair, stock_host
from worlds.patience import patience, within
from worlds.support import trio_test

from golem.net import ListenError, NetConfig, Unreachable, open_network
from golem.net.host import MAX_HANDSHAKES_PER_IP, Libp2pHost
from golem.net.muxed_stream import ACK, DATA, FULL_WINDOW, PING, SYN, WINDOW_UPDATE
from golem.net.yamux import MAX_STREAMS


@trio_test
async def test_plaintext_is_refused() -> None:
    """F1: with the stock host anybody is anybody."""
    honest, mine = key_pair(KEYS[7]), key_pair(KEYS[8])

    class Forged(type(mine.private_key)):  # type: ignore[misc]
        def get_public_key(self) -> Any:
            return honest.public_key

    forged = KeyPair(Forged(mine.private_key.impl), honest.public_key)
    met: list[str] = []
    async with hosts(1) as (host,):
        host.on_connected = lambda node_id, conn: met.append(node_id)
        security = {TProtocol(PLAINTEXT_PROTOCOL_ID): InsecureTransport(forged)}
        async with stock_host(KEYS[8], security) as attacker:
            with pytest.raises(Exception, match="security"):
                await dial_stock(attacker, host)
    assert met == []


def _message(**fields: Any) -> bytes:
    return encode_varint_prefixed(rpc_pb2.RPC(publish=[rpc_pb2.Message(**fields)]).SerializeToString())


GARBAGE = {
    "garbage": b"\x05\xff\xff\xff\xff\xff",
    "bad key": _message(
        data=b"x", topicIDs=["t"], from_id=bytes([0x12, 0x20]) + b"A" * 32, seqno=b"\0" * 8, key=b"\xff\xff", signature=b"s"
    ),
    "no origin": _message(data=b"x", topicIDs=["t"], from_id=b"", seqno=b"", key=b"", signature=b"s"),
    "bad origin": _message(data=b"x", topicIDs=["t"], from_id=b"\xff" * 5, seqno=b"1", key=b"\x08\x99", signature=b"s"),
    "bad record": encode_varint_prefixed(rpc_pb2.RPC(senderRecord=b"\xff\xff\xff").SerializeToString()),
    "huge length": b"\xff\xff\xff\xff\x0f" + b"A" * 1000,
    "endless varint": b"\xff" * 30,
    "bad topic": encode_varint_prefixed(b"\x12\x04\x22\x02\xff\xfe"),
    "bad prune": encode_varint_prefixed(
        rpc_pb2.RPC(
            control=rpc_pb2.ControlMessage(
                prune=[rpc_pb2.ControlPrune(topicID="t", peers=[rpc_pb2.PeerInfo(peerID=b"\xff", signedPeerRecord=b"\xff")])]
            )
        ).SerializeToString()
    ),
}


@trio_test
async def test_garbage_on_pubsub_does_not_kill() -> None:
    """F2: six bytes end a stock process."""
    async with hosts(2) as (host, friend):
        host.serve_streams("/echo", echo_stream)
        await host.pubsub.subscribe("t")
        async with stock_host(KEYS[8]) as attacker:
            for data in GARBAGE.values():
                mux = await dial_stock(attacker, host)
                stream = await attacker.new_stream(mux.peer_id, [TProtocol("/meshsub/1.1.0")])
                await stream.write(data)
                await trio.sleep(0.05)
                await attacker.disconnect(mux.peer_id)
        assert await is_serving(host, friend)


@trio_test
async def test_a_handler_that_raises_costs_its_stream_only() -> None:
    """F3: in the stock host it ends the swarm, or leaves a connection that looks alive and is not."""

    async def bad(node_id: str, stream: Any) -> None:
        kind = await stream.read()
        if kind == b"value":
            raise ValueError("boom")
        if kind == b"group":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.Event.wait, trio.Event())
                raise RuntimeError("in a nursery")
        if kind == b"late":
            with trio.fail_after(0.01):
                await trio.sleep(1)
        await stream.read()  # MuxedStreamEOF leaks out

    async with hosts(2) as (host, friend):
        host.serve_streams("/echo", echo_stream)
        host.serve_streams("/bad", bad)
        conn = await friend.dial(host.peer_id, host.addresses())
        for kind in (b"value", b"group", b"late", b"eof"):
            stream = await friend.open_stream(conn, "/bad")
            await stream.write(kind)
            stream.finish()
            with within(2), pytest.raises(MuxedStreamError):
                await stream.read()
            echoed = await friend.open_stream(conn, "/echo")
            await echoed.write(kind)
            assert await echoed.read() == kind
        await eventually(lambda: len(conn.streams) <= 4 + 2)


@trio_test
async def test_inbound_slots_are_given_back() -> None:
    """F4: the 251st inbound connection of a stock host's life is refused."""
    async with hosts(2) as (host, friend):
        slots = host.swarm._inbound_limiter
        tasks = None
        for _ in range(120):  # more than the stock limit of new connections a second allows
            conn = await friend.dial(host.peer_id, host.addresses())
            assert slots.borrowed_tokens >= 1
            await conn.close()
            await eventually(lambda: slots.borrowed_tokens == 0)
            if tasks is None:
                await trio.sleep(0.5)
                tasks = trio.lowlevel.current_statistics().tasks_living
        await eventually(lambda: trio.lowlevel.current_statistics().tasks_living <= tasks + 3)
        await eventually(lambda: host.swarm.get_total_connections() == 0)


@trio_test
async def test_stalled_handshakes_of_one_address_do_not_take_all_slots() -> None:
    async with hosts(2) as (host, friend):
        host.serve_streams("/echo", echo_stream)
        port = int(host.addresses()[0].split("/")[4])
        stalled = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(100)]
        await eventually(lambda: host.swarm._inbound_limiter.borrowed_tokens == MAX_HANDSHAKES_PER_IP)
        for stream in stalled:
            await stream.aclose()
        await eventually(lambda: host.swarm._inbound_limiter.borrowed_tokens == 0)
        assert not host._shaking
        assert not host._inbound_of
        assert await is_serving(host, friend)


@trio_test
async def test_garbage_connections_leave_nothing_behind() -> None:
    dice = random.Random(1)
    async with hosts(2) as (host, friend):
        host.serve_streams("/echo", echo_stream)
        port = int(host.addresses()[0].split("/")[4])
        for _ in range(30):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            greeting = b"\x13/multistream/1.0.0\n\x07/noise\n" if dice.random() < 0.5 else b""
            await stream.send_all(greeting + dice.randbytes(dice.randint(1, 3000)))
            await stream.aclose()
        assert await is_serving(host, friend)
        await eventually(lambda: host.swarm._inbound_limiter.borrowed_tokens == 0)


@trio_test
async def test_cancelled_reads_and_writes_do_not_hurt_the_connection() -> None:
    """F5: in the stock host a cut write desynchronises Noise, and a cut read loses its bytes."""
    async with hosts(2) as (host, friend):
        host.serve_streams("/echo", echo_stream)
        conn = await friend.dial(host.peer_id, host.addresses())
        stream = await friend.open_stream(conn, "/echo")
        for number in range(200):
            message = b"m%04d" % number
            await stream.write(message)
            received = b""
            with within(2):
                while len(received) < len(message):
                    with trio.move_on_after(0.0001):
                        received += await stream.read(3)
            assert received == message
        for _ in range(50):
            bulk = await friend.open_stream(conn, "/echo")
            with trio.move_on_after(0.001):
                await bulk.write(bytes(8 << 20))
            bulk.abort()
        assert conn.death is None
        await stream.write(b"still here")
        assert await stream.read() == b"still here"


@trio_test
async def test_cancelled_opens_leave_no_streams() -> None:
    """F6: in the stock host 400 cancelled opens use up most of the 256 streams of a connection."""
    dice = random.Random(2)
    async with hosts(2) as (host, friend):
        host.serve_streams("/echo", echo_stream)
        conn = await friend.dial(host.peer_id, host.addresses())
        await trio.sleep(0.3)  # gossip opens its own
        before = len(conn.streams)
        for _ in range(300):
            with trio.move_on_after(dice.random() * 0.003) as scope:
                (await friend.open_stream(conn, "/echo")).abort()
            assert scope is not None
        await eventually(lambda: len(conn.streams) <= before)
        (served,) = [c.muxed_conn for conns in host.swarm.connections.values() for c in conns]
        await eventually(lambda: len(served.streams) <= before)
        assert await is_serving(host, friend)


@trio_test
async def test_the_receive_window_is_enforced() -> None:
    """F7: a stock host buffers 600 MB of one stream."""
    async with hosts(2) as (host, friend):
        host.serve_streams("/echo", echo_stream)
        buffered: list[Any] = []
        parked = trio.Event()

        async def park(node_id: str, stream: Any) -> None:
            buffered.append(stream)
            await parked.wait()

        host.serve_streams("/park", park)
        async with stock_host(KEYS[8]) as attacker:
            mux = await dial_stock(attacker, host)
            stream = await attacker.new_stream(mux.peer_id, [TProtocol("/park")])
            await eventually(lambda: buffered)
            number = stream.muxed_stream.stream_id
            with trio.move_on_after(3), contextlib.suppress(IOException):
                for _ in range(100):
                    await mux._write_frame(frame(DATA, 0, number, 65000, bytes(65000)))
            await eventually(lambda: buffered[0].conn.death)
            assert "window" in str(buffered[0].conn.death)
        parked.set()
        assert await is_serving(host, friend)


@trio_test
async def test_a_slow_reader_is_waited_for() -> None:
    """F8: a stock host resets a stream whose reader pauses for 5 s. Our limit is `stall_s` (300 s; here 60 is enough)."""
    go_on = trio.Event()
    got = 0

    async def slow(node_id: str, stream: Any) -> None:
        nonlocal got
        await go_on.wait()
        while True:
            got += len(await stream.read())

    async with hosts(2) as (host, friend):
        host.serve_streams("/slow", slow)
        conn = await friend.dial(host.peer_id, host.addresses())
        stream = await friend.open_stream(conn, "/slow")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, bytes(4 << 20))
            await trio.sleep(5.5)
            assert got == 0
            assert conn.death is None
            assert stream.bytes_out <= FULL_WINDOW + 1000
            go_on.set()
        await eventually(lambda: got == 4 << 20)


@trio_test
async def test_tiny_segments_do_not_kill_the_connection() -> None:
    """F9: stock reads give up after 100 short reads."""
    async with hosts(2) as (host, friend):
        host.serve_streams("/echo", echo_stream)
        port = int(host.addresses()[0].split("/")[4])

        async def pipe(source: trio.SocketStream, sink: trio.SocketStream) -> None:
            async for data in source:
                for start in range(0, len(data), 100):
                    await sink.send_all(data[start : start + 100])
                    await trio.lowlevel.checkpoint()
            await sink.aclose()

        async def proxy(inbound: trio.SocketStream) -> None:
            outbound = await trio.open_tcp_stream("127.0.0.1", port)
            async with trio.open_nursery() as both:
                both.start_soon(pipe, inbound, outbound)
                both.start_soon(pipe, outbound, inbound)

        async with trio.open_nursery() as nursery:
            (listener,) = await nursery.start(partial(trio.serve_tcp, host="127.0.0.1"), proxy, 0)
            proxied = listener.socket.getsockname()[1]
            conn = await friend.dial(host.peer_id, [f"/ip4/127.0.0.1/tcp/{proxied}"])
            stream = await friend.open_stream(conn, "/echo")
            async with trio.open_nursery() as transfer:
                transfer.start_soon(stream.write, bytes(512 << 10))
                got = 0
                with within(20):
                    while got < 512 << 10:
                        got += len(await stream.read())
            conn.kill("done")
            nursery.cancel_scope.cancel()


@trio_test
async def test_a_silent_connection_is_dead() -> None:
    """F10, half open: nothing is closed, nothing arrives any more. Here 1 s is too long, by default 20 s."""
    cut = False

    async def pipe(source: trio.SocketStream, sink: trio.SocketStream) -> None:
        async for data in source:
            if not cut:
                await sink.send_all(data)

    async with hosts(2, IMPATIENT) as (host, friend), trio.open_nursery() as nursery:
        port = int(host.addresses()[0].split("/")[4])

        async def proxy(inbound: trio.SocketStream) -> None:
            outbound = await trio.open_tcp_stream("127.0.0.1", port)
            nursery.start_soon(pipe, outbound, inbound)
            await pipe(inbound, outbound)

        (listener,) = await nursery.start(partial(trio.serve_tcp, host="127.0.0.1"), proxy, 0)
        conn = await friend.dial(host.peer_id, [f"/ip4/127.0.0.1/tcp/{listener.socket.getsockname()[1]}"])
        await trio.sleep(1.3)
        assert conn.death is None
        assert conn.rtt() > 0
        cut = True
        await eventually(lambda: conn.death, 2)
        assert "silent" in str(conn.death)
        await eventually(lambda: host.swarm.get_total_connections() == 0, 2)
        nursery.cancel_scope.cancel()


@trio_test
async def test_a_process_that_was_held_itself_does_not_take_its_peer_for_dead() -> None:
    """Held for longer than a silence may last (suspended, starved): what the peer sent meanwhile waits unread."""
    async with hosts(2, IMPATIENT) as (host, friend):
        host.serve_streams("/echo", echo_stream)
        conn = await friend.dial(host.peer_id, host.addresses())
        stream = await friend.open_stream(conn, "/echo")
        for _ in range(2):
            time.sleep(1.5 * IMPATIENT.mux_dead_s)  # noqa: ASYNC251  # the whole loop is held, which is the point
            await trio.sleep(IMPATIENT.mux_ping_s * 1.5)
            assert conn.death is None
        await stream.write(b"alive")
        assert await stream.read() == b"alive"


@trio_test
async def test_gossip_remembers_subscriptions_while_the_peer_is_connected() -> None:
    """A peer tells its topics once; upstream forgets them when one of its streams breaks."""
    async with hosts(2) as (host, friend):
        await host.pubsub.subscribe("t")
        await friend.pubsub.subscribe("t")
        await friend.dial(host.peer_id, host.addresses())
        peer = host.pubsub.host.get_id()
        await eventually(lambda: peer in friend.pubsub.peers and peer in friend.pubsub.peer_topics.get("t", ()))
        friend.pubsub._handle_dead_peer(peer)
        await eventually(lambda: peer in friend.pubsub.peers)
        assert peer in friend.pubsub.peer_topics["t"]


@trio_test
async def test_the_257th_stream_is_an_error_not_a_hang() -> None:
    async with hosts(2) as (host, friend):
        host.serve_streams("/echo", echo_stream)
        conn = await friend.dial(host.peer_id, host.addresses())
        opened = []
        with within(20), contextlib.suppress(Unreachable):
            while len(opened) <= MAX_STREAMS:
                opened.append(await friend.open_stream(conn, "/echo"))
        with pytest.raises(Unreachable, match="256 streams"):
            await friend.open_stream(conn, "/echo")
        assert MAX_STREAMS - 4 <= len(opened) <= MAX_STREAMS
        for stream in opened[:10]:
            stream.abort()
        again = await friend.open_stream(conn, "/echo")
        await again.write(b"x")
        assert await again.read() == b"x"


@trio_test
async def test_a_peer_cannot_open_streams_without_end() -> None:
    async with hosts(2) as (host, friend):
        host.serve_streams("/echo", echo_stream)
        async with stock_host(KEYS[8]) as attacker:
            mux = await dial_stock(attacker, host)
            with contextlib.suppress(IOException):  # it may be cut off before it has done all that
                for number in range(1001, 3001, 2):
                    await mux._write_frame(frame(WINDOW_UPDATE, SYN, number, 0))
            await trio.sleep(0.2)
            for conns in host.swarm.connections.values():
                for conn in conns:
                    assert len(conn.muxed_conn.streams) <= 2 * MAX_STREAMS
        assert await is_serving(host, friend)


@pytest.mark.parametrize(
    "attack",
    [
        frame(DATA, SYN, 2, 0),  # the wrong parity
        frame(WINDOW_UPDATE, SYN, 0, 0),
        frame(DATA, 0, 1, 1 << 31),  # an absurd length
        frame(WINDOW_UPDATE, 0, 1, (1 << 32) - 1),
        b"\xff" * 64,
        frame(9, 0, 0, 0),
        frame(WINDOW_UPDATE, ACK, 77, 5) + frame(PING, SYN, 0, 1) * 2000,
    ],
)
def test_bad_frames_cost_at_most_the_connection(attack: bytes) -> None:
    async def body() -> None:
        async with hosts(2) as (host, friend):
            host.serve_streams("/echo", echo_stream)
            async with stock_host(KEYS[8]) as attacker:
                mux = await dial_stock(attacker, host)
                await attacker.new_stream(mux.peer_id, [TProtocol("/echo")])
                await mux._write_frame(attack)
                await trio.sleep(0.1)
                assert await is_serving(host, friend)

    trio.run(body)


@trio_test
async def test_every_address_of_a_peer_is_tried() -> None:
    async with hosts(2) as (host, friend):
        with socket.socket() as closed, socket.socket() as mute:
            closed.bind(("127.0.0.1", 0))
            mute.bind(("127.0.0.1", 0))
            mute.listen(1)
            dead = [f"/ip4/127.0.0.1/tcp/{sock.getsockname()[1]}" for sock in (closed, mute)]
            with within(1.5):
                conn = await friend.dial(host.peer_id, dead + host.addresses())
            await conn.close()
            for _ in range(2):  # no negative cache
                with pytest.raises(Unreachable, match="does not answer"):
                    await friend.dial(host.peer_id, dead[:1])
            with within(1.5):
                await friend.dial(host.peer_id, host.addresses())


@trio_test
async def test_a_wrong_peer_at_the_address_is_refused() -> None:
    async with hosts(3) as (host, other, friend):
        with pytest.raises(Unreachable):
            await friend.dial(host.peer_id, other.addresses())


@trio_test
async def test_dialling_garbage_servers_is_an_error() -> None:
    dice = random.Random(3)

    async def garbage(stream: trio.SocketStream) -> None:
        greeting = b"\x13/multistream/1.0.0\n\x07/noise\n" if dice.random() < 0.7 else b""
        await stream.send_all(greeting + dice.randbytes(500))
        await stream.aclose()

    async with hosts(2) as (host, friend), trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, host="127.0.0.1"), garbage, 0)
        for _ in range(10):
            with pytest.raises(Unreachable):
                await friend.dial(host.peer_id, [f"/ip4/127.0.0.1/tcp/{listener.socket.getsockname()[1]}"])
        nursery.cancel_scope.cancel()


@trio_test
async def test_dialling_is_quick() -> None:
    """`host.connect` always takes 250 ms; we do not use it."""
    async with hosts(2) as (host, friend):
        start = trio.current_time()
        await friend.dial(host.peer_id, host.addresses())
        assert trio.current_time() - start < patience(0.2)


@trio_test
async def test_peers_heard_of_are_not_dialled_by_the_library() -> None:
    async with hosts(2) as (host, friend):
        from libp2p.peer.id import ID
        from multiaddr import Multiaddr

        friend.inner.get_peerstore().add_addrs(ID.from_base58(host.peer_id), [Multiaddr(host.addresses()[0])], 600)
        await trio.sleep(1.0)
        assert friend.swarm.get_total_connections() == 0


def test_a_taken_port_is_an_error(tmp_path: Any) -> None:
    async def body() -> None:
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            taken.bind(("127.0.0.1", 0))
            taken.listen(1)
            name = f"127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(ListenError, match=name):
                async with open_network(KEYS[0], NetConfig(tmp_path, (name,))):
                    pass
        with pytest.raises(ListenError):
            async with open_network(KEYS[0], NetConfig(tmp_path, ("203.0.113.9:4001",))):
                pass

    trio.run(body)


@trio_test
async def test_two_hosts_never_share_a_port() -> None:
    async with hosts(1) as (host,):
        port = int(host.addresses()[0].split("/")[4])
        with pytest.RaisesGroup(ListenError, flatten_subgroups=True):
            async with Libp2pHost(KEYS[1], FAST).run([("127.0.0.1", port)]):
                pass


@trio_test
async def test_a_stopped_host_leaves_no_listener_and_no_task() -> None:
    before = trio.lowlevel.current_statistics().tasks_living
    host = Libp2pHost(KEYS[0], FAST)
    with trio.move_on_after(0.3):
        async with host.run([("127.0.0.1", 0)]):
            port = int(host.addresses()[0].split("/")[4])
            await trio.sleep_forever()
    with pytest.raises(OSError, match=str(port)):
        await trio.open_tcp_stream("127.0.0.1", port)
    await eventually(lambda: trio.lowlevel.current_statistics().tasks_living <= before)


@trio_test
async def test_a_muxed_stream_says_when_it_ended() -> None:
    async with hosts(2) as (host, friend):
        host.serve_streams("/echo", echo_stream)
        conn = await friend.dial(host.peer_id, host.addresses())
        stream = await friend.open_stream(conn, "/echo")
        conn.kill("test")
        with pytest.raises(MuxedStreamReset):
            await stream.read()
        with pytest.raises(MuxedStreamReset):
            await stream.write(b"x")
        with pytest.raises(Unreachable):
            await friend.open_stream(conn, "/echo")
