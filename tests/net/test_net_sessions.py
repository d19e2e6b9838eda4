"""Sessions between whole nodes: meeting, requests, streams, dying and frozen peers, restarts, discovery."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from net_helpers import FAST, IMPATIENT, KEYS, config, echo, eventually, nodes
from worlds.patience import patience, within
from worlds.support import trio_test

from golem.net import LinkBusy, NetError, NetRefusal, PeerStream, RemoteError, Unreachable, open_network
from golem.net.peerid import sign_record
from golem.net.sessions import _origin
from golem.net.types import MAX_REQUEST_BYTES

REPO = Path(__file__).resolve().parents[2]


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@contextmanager
def process(path: Path, number: int, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A node in another process and its address."""
    env = {**os.environ, "PYTHONPATH": f"{REPO}:{REPO}/tests:{REPO}/tests/net"}
    command = [sys.executable, str(REPO / "tests/net/net_peer.py"), str(path), str(number), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as child:
        try:
            assert child.stdout is not None
            yield child, child.stdout.readline().strip()
        finally:
            child.kill()


@trio_test
async def test_an_address_told_while_another_is_tried_is_tried_too(tmp_path: Path) -> None:
    impatient = replace(FAST, dial_timeout_s=1)  # one dial is to fail
    async with nodes(tmp_path, timing=impatient) as (one, two), trio.open_nursery() as nursery:
        (mute,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        heard = trio.Event()

        async def stay_mute(stream: trio.SocketStream) -> None:
            heard.set()
            await trio.sleep_forever()

        async def try_in_vain() -> None:
            with contextlib.suppress(Unreachable):
                await one.connect(f"/ip4/127.0.0.1/tcp/{mute.socket.getsockname()[1]}/p2p/{two.addresses[0].rpartition('/')[2]}")

        nursery.start_soon(trio.serve_listeners, stay_mute, [mute])
        nursery.start_soon(try_in_vain)
        await heard.wait()
        assert await one.connect(two.addresses[0]) == two.node_id
        nursery.cancel_scope.cancel()


@trio_test
async def test_requests_both_ways_over_one_connection(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (one, two):
        one.serve("echo", echo)
        two.serve("echo", echo)
        told: list[tuple[str, bool]] = []
        one.on_peer(lambda node_id, up: told.append((node_id, up)))
        assert await two.connect(one.addresses[0]) == one.node_id
        assert await two.request(one.node_id, "echo", b"ping") == b"ping"
        assert await one.request(two.node_id, "echo", b"pong") == b"pong"
        assert await one.request(two.node_id.upper().replace("0X", "0x"), "echo", b"case") == b"case"
        assert told == [(two.node_id, True)]
        (session,) = one.sessions()
        assert session.node_id == two.node_id
        assert session.type == "p2p"
        assert session.bytes_in > 100
        assert session.bytes_out > 100
        assert session.duration_s >= 0
        assert 0 < await one.ping(two.node_id) < 1000
        await two.disconnect(one.node_id)
        await eventually(lambda: (two.node_id, False) in told)
        assert two.sessions() == []


@trio_test
async def test_large_requests_pass_and_too_large_ones_are_refused(tmp_path: Path) -> None:
    async def grow(sender: str, payload: bytes) -> bytes:
        return bytes(MAX_REQUEST_BYTES + 1)

    async with nodes(tmp_path) as (one, two):
        one.serve("echo", echo)
        one.serve("grow", grow)
        await two.connect(one.addresses[0])
        big = os.urandom(1 << 20) * 4
        assert await two.request(one.node_id, "echo", big) == big
        with pytest.raises(NetError, match="the limit is"):
            await two.request(one.node_id, "echo", big + b"x")
        with pytest.raises(RemoteError, match="internal error"):
            await two.request(one.node_id, "grow", b"")


@trio_test
async def test_refusals_bugs_and_unknown_services(tmp_path: Path) -> None:
    async def refuse(sender: str, payload: bytes) -> bytes:
        raise NetRefusal(f"not you, {sender}")

    async def crash(sender: str, payload: bytes) -> bytes:
        raise KeyError("bug")

    async with nodes(tmp_path) as (one, two):
        one.serve("refuse", refuse)
        one.serve("crash", crash)
        await two.connect(one.addresses[0])
        one.serve("late", echo)
        with pytest.raises(RemoteError, match=f"not you, {two.node_id}"):
            await two.request(one.node_id, "refuse", b"")
        with pytest.raises(RemoteError, match=r"^internal error$"):
            await two.request(one.node_id, "crash", b"")
        with pytest.raises(RemoteError, match="unknown service"):
            await two.request(one.node_id, "nothing", b"")
        with pytest.raises(RemoteError, match=f"not you, {one.node_id}"):
            await one.request(one.node_id, "refuse", b"")  # to itself: no wire, the same ends
        with pytest.raises(RemoteError, match=r"^internal error$"):
            await one.request(one.node_id, "crash", b"")
        assert await one.request(one.node_id, "late", b"x") == b"x"
        assert await two.request(one.node_id, "late", b"x") == b"x"


@trio_test
async def test_time_outs_and_cancels_leave_the_link_working(tmp_path: Path) -> None:
    async def never(sender: str, payload: bytes) -> bytes:
        await trio.sleep_forever()
        return b""

    async with nodes(tmp_path) as (one, two):
        one.serve("never", never)
        one.serve("echo", echo)
        await two.connect(one.addresses[0])
        with pytest.raises(Unreachable, match=r"within 0\.1 s"):
            await two.request(one.node_id, "never", b"", timeout_s=0.1)
        for _ in range(50):
            with trio.move_on_after(0.0005):
                await two.request(one.node_id, "echo", bytes(200_000))
        assert await two.request(one.node_id, "echo", b"x") == b"x"
        assert len(two.sessions()) == 1


@trio_test
async def test_too_many_requests_are_refused_not_queued(tmp_path: Path) -> None:
    gate = trio.Event()

    async def wait(sender: str, payload: bytes) -> bytes:
        await gate.wait()
        return b"done"

    async with nodes(tmp_path) as (one, two):
        one.serve("wait", wait)
        await two.connect(one.addresses[0])
        await trio.sleep(0.1)  # the node asks things of its own at first
        outcomes: list[str] = []

        async def ask() -> None:
            try:
                outcomes.append((await two.request(one.node_id, "wait", b"")).decode())
            except LinkBusy:
                outcomes.append("busy")

        async with trio.open_nursery() as nursery:
            for _ in range(300):
                nursery.start_soon(ask)
            await eventually(lambda: len(outcomes) >= 300 - 256)
            assert set(outcomes) == {"busy"}
            await trio.sleep(3 * FAST.keepalive_s)  # a busy link is not a dead one
            assert set(outcomes) == {"busy"}
            assert len(two.sessions()) == 1
            gate.set()
        assert outcomes.count("done") >= 250


@trio_test
async def test_nobody_there(tmp_path: Path) -> None:
    async with nodes(tmp_path, 1) as (one,):
        with pytest.raises(ValueError, match="to announce"):
            async with open_network(KEYS[1], config(tmp_path / "1", announce=("1.2.3.4:5",))):
                pass
        async with open_network(KEYS[1], config(tmp_path / "1", announce=("/ip4/1.2.3.4/tcp/5",))) as two:
            assert two.addresses[0] == f"/ip4/1.2.3.4/tcp/5/p2p/{two.peer_id}"
            assert two._record().addresses[0] == "/ip4/1.2.3.4/tcp/5"
        with pytest.raises(Unreachable, match="no address"):
            await one.request("0x" + "ab" * 20, "echo", b"")
        with pytest.raises(ValueError, match="not a node id"):
            await one.request("bob", "echo", b"")
        with pytest.raises(ValueError, match="expected /ip4"):
            await one.connect("/ip4/1.2.3.4/udp/5")
        with pytest.raises(ValueError, match="our own"):
            await one.connect(one.addresses[0])


@trio_test
async def test_requests_before_the_host_is_up_wait(tmp_path: Path) -> None:
    async with open_network(KEYS[0], config(tmp_path / "0")) as one, open_network(KEYS[1], config(tmp_path / "1")) as two:
        one.serve("echo", echo)
        assert two.sessions() == []
        with pytest.raises(Unreachable):
            await two.connect(one.addresses[0], timeout_s=0)
        await one.wait_up()
        await two.connect(one.addresses[0])
        assert await two.request(one.node_id, "echo", b"x") == b"x"


@trio_test
async def test_both_dial_at_once(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (one, two):
        one.serve("echo", echo)
        two.serve("echo", echo)
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.connect, two.addresses[0])
                nursery.start_soon(two.connect, one.addresses[0])
            await trio.sleep(0.3)
            assert await two.request(one.node_id, "echo", b"x") == b"x"
            assert await one.request(two.node_id, "echo", b"y") == b"y"
            assert len(one.sessions()) == len(two.sessions()) == 1
            await one.disconnect(two.node_id)
            await two.disconnect(one.node_id)


@trio_test
async def test_bulk_streams(tmp_path: Path) -> None:
    received: list[int] = []

    async def sink(sender: str, stream: PeerStream) -> None:
        total = 0
        while data := await stream.receive_some(1 << 16):
            total += len(data)
        received.append(total)
        await stream.send_all(total.to_bytes(8, "big"))
        await stream.aclose()

    async def crash(sender: str, stream: PeerStream) -> None:
        raise KeyError("bug")

    async with nodes(tmp_path) as (one, two):
        one.serve_stream("sink", sink)
        one.serve_stream("crash", crash)
        one.serve("echo", echo)
        await two.connect(one.addresses[0])
        stream = await two.open_stream(one.node_id, "sink")
        for _ in range(64):
            await stream.send_all(bytes(65536))
        await stream.send_eof()
        assert int.from_bytes(await stream.receive_some(8), "big") == 64 * 65536 == received[0]
        assert await stream.receive_some() == b""
        await stream.aclose()
        with pytest.raises(RemoteError, match="unknown stream"):
            await two.open_stream(one.node_id, "nothing")
        broken = await two.open_stream(one.node_id, "crash")
        with pytest.raises(Unreachable):
            await broken.receive_some()
        assert await two.request(one.node_id, "echo", b"x") == b"x"
        sessions = two._sessions
        assert sessions is not None
        peer = sessions._peers[one.node_id]
        assert len(peer.conns) == 2  # links on one, bulk on the other
        assert sessions._bulk_conn(peer) is not None
        (other,) = one._sessions._peers.values()  # type: ignore[union-attr]
        await eventually(lambda: all(not conn.streams or len(conn.streams) < 6 for conn in other.conns))


@trio_test
async def test_streams_of_a_peer_are_bounded(tmp_path: Path) -> None:
    async def hold(sender: str, stream: PeerStream) -> None:
        await stream.receive_some()

    async with nodes(tmp_path) as (one, two):
        one.serve_stream("hold", hold)
        await two.connect(one.addresses[0])
        streams: list[PeerStream] = []
        for _ in range(128):
            streams.append(await two.open_stream(one.node_id, "hold"))
        with pytest.raises(Unreachable, match="too many streams"):
            await two.open_stream(one.node_id, "hold")
        for stream in streams:
            await stream.aclose()
        with within(5):  # the other side hears of each of these ends
            while True:
                with contextlib.suppress(Unreachable):
                    await (await two.open_stream(one.node_id, "hold")).aclose()
                    break
                await trio.sleep(0.01)


def test_a_killed_peer_is_noticed_and_met_again(tmp_path: Path) -> None:
    async def body() -> None:
        async with open_network(KEYS[0], config(tmp_path / "0")) as one:
            with process(tmp_path / "1", 1) as (child, address):
                node_id = await one.connect(address)
                one.keep(node_id)
                child.kill()
                await eventually(lambda: not one.sessions(), 1)
                with pytest.raises(Unreachable):
                    await one.request(node_id, "echo", b"x", timeout_s=1)
            port = int(address.split("/")[4])
            with process(tmp_path / "1", 1, port):
                await eventually(one.sessions)  # by itself
                assert await one.request(node_id, "echo", b"x") == b"x"

    trio.run(body)


def test_a_frozen_peer_is_noticed(tmp_path: Path) -> None:
    """F10: with the stock library never. Here 1 s of silence is too much; by default 20 s."""

    async def body() -> None:
        async with open_network(KEYS[0], config(tmp_path / "0", timing=IMPATIENT)) as one:
            with process(tmp_path / "1", 1) as (child, address):
                node_id = await one.connect(address)
                one.keep(node_id)
                child.send_signal(signal.SIGSTOP)
                start = trio.current_time()
                await eventually(lambda: not one.sessions(), 3)
                assert trio.current_time() - start < patience(2.5)
                child.send_signal(signal.SIGCONT)
                await eventually(one.sessions)
                assert await one.request(node_id, "echo", b"x") == b"x"

    trio.run(body)


@trio_test
async def test_the_host_is_restarted_when_it_crashes(tmp_path: Path) -> None:
    async def boom() -> None:
        raise RuntimeError("a bug deep in the library")

    async with nodes(tmp_path) as (one, two):
        one.serve("echo", echo)
        heard: list[bytes] = []

        async def hear(origin: str, payload: bytes) -> bool:
            heard.append(payload)
            return True

        one.subscribe("news", hear)
        two.subscribe("news", hear)
        await two.connect(one.addresses[0])
        address, sessions = one.addresses[0], one._sessions
        assert sessions is not None
        sessions._host.swarm.manager.run_task(boom)
        await eventually(lambda: one.is_up and one._sessions is not sessions)
        assert one.addresses[0] == address
        await eventually(lambda: len(two.sessions()) == 1)
        assert await two.request(one.node_id, "echo", b"x") == b"x"
        with within(5):
            while b"after" not in heard:
                two.publish("news", b"after")
                await trio.sleep(0.2)


@trio_test
async def test_peers_are_found_again_after_a_restart(tmp_path: Path) -> None:
    async with open_network(KEYS[0], config(tmp_path / "0")) as one:
        async with open_network(KEYS[1], config(tmp_path / "1")) as two:
            await two.connect(one.addresses[0])
        await eventually(lambda: not one.sessions())
        one.serve("echo", echo)
        async with open_network(KEYS[1], config(tmp_path / "1")) as two:
            assert one.node_id in two.known_peers()
            assert await two.request(one.node_id, "echo", b"x") == b"x"
            await eventually(one.sessions)


@trio_test
async def test_bootstrap_is_retried_until_it_is_there(tmp_path: Path) -> None:
    async with open_network(KEYS[0], config(tmp_path / "0")) as one:
        address = one.addresses[0]
        port = address.split("/")[4]
    async with open_network(KEYS[1], config(tmp_path / "1", bootstrap=(address,))) as two:
        await trio.sleep(0.5)
        assert two.sessions() == []
        async with open_network(KEYS[0], config(tmp_path / "0", listen=(f"127.0.0.1:{port}",))):
            await eventually(two.sessions)


@trio_test
async def test_peers_of_peers_become_dialable(tmp_path: Path) -> None:
    async with nodes(tmp_path, 3, target_sessions=0) as (hub, one, two):
        two.serve("echo", echo)
        await two.connect(hub.addresses[0])
        await one.connect(hub.addresses[0])
        await eventually(lambda: two.node_id in one.known_peers())
        assert await one.request(two.node_id, "echo", b"x") == b"x"


@trio_test
async def test_two_networks_never_mix(tmp_path: Path) -> None:
    async with (
        open_network(KEYS[0], config(tmp_path / "0")) as one,
        open_network(KEYS[1], config(tmp_path / "1", network_name="other")) as two,
    ):
        with pytest.raises(Unreachable, match="does not speak"):
            await two.connect(one.addresses[0])
        assert one.sessions() == two.sessions() == []


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6 loopback")
@trio_test
async def test_ipv6(tmp_path: Path) -> None:
    async with nodes(tmp_path, listen=("[::1]:0",)) as (one, two):
        one.serve("echo", echo)
        assert one.addresses[0].startswith("/ip6/::1/tcp/")
        await two.connect(one.addresses[0])
        assert await two.request(one.node_id, "echo", b"x") == b"x"
        assert two.sessions()[0].address.startswith("/ip6/::1/tcp/")


@trio_test
async def test_mdns_finds_the_nodes_of_the_lan(tmp_path: Path) -> None:
    async with nodes(tmp_path, 2, mdns=True, network_name="mdns-test") as (one, two):
        await eventually(lambda: one.sessions() and two.sessions(), 10)


@trio_test
async def test_shutdown_is_quick_and_leaves_no_task(tmp_path: Path) -> None:
    before = trio.lowlevel.current_statistics().tasks_living

    async def hold(sender: str, stream: PeerStream) -> None:
        await trio.sleep_forever()

    async def run() -> None:
        async with nodes(tmp_path, 2, mdns=True, network_name="stop-test") as (one, two):
            one.serve("echo", echo)
            await two.connect(one.addresses[0])
            one.serve_stream("hold", hold)
            stream = await two.open_stream(one.node_id, "hold")
            ready.set()
            await stream.receive_some()

    ready = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        with within(10):
            await ready.wait()
        nursery.cancel_scope.cancel()
        start = trio.current_time()
    assert trio.current_time() - start < patience(1.9)
    await eventually(lambda: trio.lowlevel.current_statistics().tasks_living <= before)


def test_importing_the_package_does_not_load_libp2p() -> None:
    code = "import sys, golem.net; sys.exit('libp2p' in sys.modules or 'zeroconf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0


@pytest.mark.parametrize(
    ("remote", "origin"),
    [
        (("198.51.100.7", 7465), "198.51.100.7"),
        (("2001:db8:1:2:3:4:5:6", 7465), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 7465), "fe80::/64"),
        (("::ffff:198.51.100.7", 7465), "198.51.100.7"),
        (None, ""),
    ],
)
def test_a_machine_with_a_thousand_addresses_comes_by_one(remote: tuple[str, int] | None, origin: str) -> None:
    class Conn:
        def get_remote_address(self) -> tuple[str, int] | None:
            return remote

    assert _origin(Conn()) == origin  # type: ignore[arg-type]


@trio_test
async def test_the_address_of_a_session_is_told(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (one, two):
        assert one.origin(two.node_id) == ""
        await one.connect(two.addresses[0])
        await eventually(lambda: two.origin(one.node_id) == one.origin(two.node_id) == "127.0.0.1")


@pytest.mark.parametrize("dialler", [0, 1])
@trio_test
async def test_clocks_that_differ_are_told_on_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, dialler: int
) -> None:
    async with nodes(tmp_path, timing=IMPATIENT) as (ahead, other):
        sessions = ahead._sessions
        assert sessions is not None

        def of_tomorrow() -> object:
            return sign_record(KEYS[0], "golem", [], int(time.time()) + 3600)

        monkeypatch.setattr(sessions, "_record", of_tomorrow)
        first, second = (ahead, other) if dialler == 0 else (other, ahead)
        with pytest.raises(Unreachable, match=f"the clock of {ahead.node_id} is (3600|3599) s ahead of the clock here"):
            await first.connect(second.addresses[0])
        assert list(other.clocks()) == [ahead.node_id]
        assert "ahead of the clock here" in other.clocks()[ahead.node_id]
        assert f"there is no session with {ahead.node_id}: the clock of" in caplog.text
        await eventually(lambda: "it says: " in ahead.clocks().get(other.node_id, ""))
        monkeypatch.undo()
        assert await other.connect(ahead.addresses[0]) == ahead.node_id
        assert not other.clocks(), "who is met again is forgotten"
