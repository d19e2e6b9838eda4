"""Transfers by the URLs of strangers: what a redirection's body may cost, and which public addresses are too near."""

from __future__ import annotations

import gzip
import ipaddress
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpcore
import psutil
import pytest
import trio
import trio.lowlevel
from worlds.patience import within as fail_after
from worlds.support import trio_test

from golem.exeunit.runtimes.plugin.process_tree import Tree
from golem.exeunit.sandbox.lockdown import limit_memory
from golem.exeunit.transfer.nearby import is_neighbour, is_own, links
from golem.exeunit.transfer.spool import Spool, TransferError, TransferPolicy
from golem.exeunit.transfer.transfers import Transfers, parse_location
from golem.exeunit.transfer.web import Web, _CheckedBackend, refusal
from golem.files.outgoing import OutgoingFile
from golem.node.nearness import nearness

BOMB = gzip.compress(b"\0" * (8 << 20)) * 200  # 1.6 GB of nothing
LOCAL = TransferPolicy.local()


class Redirector:
    """Sends clients on with a body that nobody needs, to a file in the end."""

    def __init__(self, turns: int) -> None:
        self.turns, self.sent, self.url = turns, 0, ""

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            data = b""
            while b"\r\n\r\n" not in data:
                if not (more := await stream.receive_some()):
                    return
                data += more
            left = int(data.split(b" ")[1].strip(b"/") or 0)
            if not left:
                await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\nfile")
                return
            head = f"HTTP/1.1 302 Found\r\nLocation: {self.url}/{left - 1}\r\nContent-Encoding: gzip\r\n"
            await stream.send_all(f"{head}Content-Length: {len(BOMB)}\r\n\r\n".encode())
            try:
                for at in range(0, len(BOMB), 1 << 16):
                    await stream.send_all(BOMB[at : at + (1 << 16)])
                    self.sent += 1 << 16
            except trio.BrokenResourceError:
                pass


async def download(tmp_path: Path, turns: int) -> tuple[bytes, Redirector]:
    server = Redirector(turns)
    with (tmp_path / "file").open("w+b") as file:
        async with trio.open_nursery() as nursery:
            listeners: list[Any] = await nursery.start(trio.serve_tcp, server.serve, 0)
            server.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
            spool = Spool(file.fileno(), 1 << 20, None, None)
            try:
                await Web(LOCAL).download(f"{server.url}/{turns}", spool)
                await spool.finish()
            finally:
                nursery.cancel_scope.cancel()
        return (tmp_path / "file").read_bytes(), server


@trio_test
async def test_bodies_of_redirections_are_not_read(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    content, _ = await download(tmp_path, 5)
    assert content == b"file"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "in KiB; one body alone inflates to 1.6 GB"


@trio_test
async def test_redirections_end(tmp_path: Path) -> None:
    with pytest.raises((TransferError, BaseExceptionGroup)) as caught:
        await download(tmp_path, LOCAL.max_redirects + 1)
    assert "redirections" in repr(caught.value)


@trio_test
async def test_what_is_only_passed_on_lies_on_the_activitys_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Far:
        async def download(self, url: str, spool: Spool) -> None:
            await spool.write(b"content")
            seen.extend(os.readlink(f"/proc/self/fd/{spool._descriptor}") for _ in (1,))

        async def upload(self, url: str, file: Any, progress: Any) -> None:
            assert os.pread(file.descriptor, 100, 0) == b"content"

    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    await Transfers(LOCAL, web=Far(), spool_dir=tmp_path).transfer("http://a/x", "http://b/y", ())  # type: ignore[arg-type]
    assert seen[0].startswith(str(tmp_path))


def test_the_exe_units_own_memory_is_bounded() -> None:
    code = (
        "from golem.exeunit.sandbox.lockdown import limit_memory\nlimit_memory(1 << 28)\n"
        "try:\n    bytearray(1 << 30)\nexcept MemoryError:\n    print('bounded')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "bounded\n"


@trio_test
async def test_programs_of_plug_ins_are_not_bounded_by_it(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        limit_memory(1 << 30)
        command = Tree().start(["/bin/sleep", "60"], env={"PATH": os.environ["PATH"]}, cwd=tmp_path, cpus=1, stdin=False)
        assert resource.prlimit(command.pid, resource.RLIMIT_DATA) == (hard, hard)
        os.kill(command.pid, 9)
        await command.gone()
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


# -- near addresses
INSIDE = """
import json, subprocess, sys
for line in ("link set lo up", "addr add 198.41.0.4/32 dev lo",
             "link add d0 type veth peer name d1", "link set d0 up", "link set d1 up",
             "addr add 9.9.9.9/24 dev d0", "addr add 2a00:1450::5/64 dev d0 nodad", "route add local 8.8.4.0/24 dev lo"):
    done = subprocess.run(["ip", *line.split()], capture_output=True, text=True)
    if done.returncode: print(json.dumps({"skip": f"ip {line}: {done.stderr}"})); sys.exit()
from golem.exeunit.transfer.spool import TransferPolicy
from golem.exeunit.transfer.web import refusal
found = {}
for policy in ("public", "local"):
    chosen = TransferPolicy() if policy == "public" else TransferPolicy.local()
    found[policy] = {one: refusal(one, chosen) for one in sys.argv[1:]}
print(json.dumps(found))
"""


@pytest.mark.skipif(os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("unshare")), reason="needs root, ip, unshare")
def test_public_addresses_of_this_machine_and_its_neighbours_are_not_far_away() -> None:
    own = ["198.41.0.4", "9.9.9.9", "2a00:1450::5", "8.8.4.77", "::ffff:9.9.9.9", "64:ff9b::909:909"]
    near = ["9.9.9.10", "9.9.9.254", "2a00:1450::6", "2a00:1450::ffff:1", "::ffff:9.9.9.10"]
    far = ["9.9.8.9", "2a00:1450:1::5", "1.1.1.1", "8.8.8.8"]
    line = ["unshare", "-n", sys.executable, "-c", INSIDE, *own, *near, *far]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if "skip" in found:
        pytest.skip(found["skip"])
    for one in own:
        assert found["public"][one] == "an address of this machine", one
    for one in near:
        assert found["public"][one] == "an address of this machine's own network", one
    for one in far:
        assert found["public"][one] is None, one
    assert set(found["local"].values()) == {None}


@trio_test
async def test_both_ends_of_a_connection_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address may become one of ours after the look at it: nothing is sent into such a connection."""
    came: list[bytes] = []

    async def serve(stream: trio.SocketStream) -> None:
        came.append(await stream.receive_some())

    monkeypatch.setattr("golem.exeunit.transfer.web.refusal", lambda address, policy: None)
    async with trio.open_nursery() as nursery:
        listeners: list[Any] = await nursery.start(trio.serve_tcp, serve, 0)
        port = listeners[0].socket.getsockname()[1]
        with (tmp_path / "file").open("w+b") as file, pytest.raises(TransferError, match="an address of this machine"):
            await Web(TransferPolicy()).download(f"http://127.0.0.1:{port}/", Spool(file.fileno(), 1 << 20, None, None))
        with fail_after(20):
            while not came:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert came == [b""]


@trio_test
async def test_a_connection_to_itself(tmp_path: Path) -> None:
    """TCP meets itself where both ends choose the same port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    backend = _CheckedBackend(LOCAL)

    class Itself:
        async def connect_tcp(self, *_: Any) -> httpcore.AsyncNetworkStream:
            options = [(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)]
            bound = trio.socket.socket()
            for option in options:
                bound.setsockopt(*option)
            await bound.bind(("127.0.0.1", port))
            await bound.connect(("127.0.0.1", port))
            return Stream(trio.SocketStream(bound))

    class Stream(httpcore.AsyncNetworkStream):
        def __init__(self, inner: trio.SocketStream) -> None:
            self.inner = inner

        def get_extra_info(self, info: str) -> Any:
            return self.inner.socket.getsockname() if info == "client_addr" else self.inner.socket.getpeername()

        async def aclose(self) -> None:
            await self.inner.aclose()

    backend._inner = Itself()  # type: ignore[assignment]
    with pytest.raises(TransferError, match="the other end of its connection"):
        await backend.connect_tcp("127.0.0.1", port)


@pytest.mark.parametrize(("nearness", "reached"), [("machine", True), ("network", False), ("far", False), ("anything", False)])
@trio_test
async def test_loopback_is_for_requestors_of_this_machine(tmp_path: Path, nearness: str, reached: bool) -> None:
    asked = 0

    async def near() -> str:
        nonlocal asked
        asked += 1
        return nearness

    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\nfile")
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        listeners: list[Any] = await nursery.start(trio.serve_tcp, serve, 0)
        url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/"
        for policy, works in ((LOCAL, reached), (TransferPolicy(), False)):
            transfers = Transfers(policy, nearness=near)
            with (tmp_path / "file").open("w+b") as file:
                refused = nullcontext() if works else pytest.raises(TransferError, match="a loopback address")
                with refused:
                    assert await transfers.fetch(parse_location(url), file.fileno(), max_bytes=100) == 4
        nursery.cancel_scope.cancel()
    assert asked == 1, "only the policy that could let it through asks"


def test_what_the_local_policy_gives_to_whom() -> None:
    found = {word: LOCAL.for_requestor(word) for word in ("machine", "network", "far", "")}
    assert [(one.allow_loopback, one.allow_private) for one in found.values()] == [
        (True, True), (False, True), (False, False), (False, False),
    ]  # fmt: skip
    assert not TransferPolicy().for_requestor("machine").allow_private


def test_how_near_a_session_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("golem.node.nearness.is_neighbour", lambda ip: ip in ipaddress.ip_network("198.51.100.0/24"))
    assert nearness("/ip4/198.51.100.7/tcp/1") == nearness("/ip6/::ffff:198.51.100.7/tcp/1") == "network"
    assert nearness("/ip4/127.0.0.1/tcp/1") == nearness("/ip6/::1/tcp/1") == nearness("/ip6/::ffff:127.0.0.1/tcp/1") == "machine"
    own = next(entry.address for entries in psutil.net_if_addrs().values() for entry in entries if entry.family == socket.AF_INET)
    assert nearness(f"/ip4/{own}/tcp/1") == "machine"
    for far in ("/ip4/203.0.113.9/tcp/1", "/ip4/10.255.255.1/tcp/1", "", "nonsense", "/dns4/localhost/tcp/1"):
        assert nearness(far) == "far", far


@trio_test
async def test_a_body_that_drips_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a server that sends a byte now and then, and of one that takes no more, in either direction."""
    monkeypatch.setattr("golem.exeunit.transfer.web.PACE_S", 0.5)

    async def drip(stream: trio.SocketStream) -> None:
        head = await stream.receive_some()
        try:
            if head.startswith(b"PUT"):
                while True:
                    await stream.receive_some(1)
                    await trio.sleep(0.05)
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while True:
                await stream.send_all(b"x")
                await trio.sleep(0.05)
        except trio.BrokenResourceError:
            pass

    async with trio.open_nursery() as nursery:
        listeners: list[Any] = await nursery.start(trio.serve_tcp, drip, 0)
        url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/x"
        with (tmp_path / "file").open("w+b") as file, fail_after(30):
            with pytest.raises(TransferError, match=r"too slow: \d+ bytes in 0.5 s, at least 65536 are expected") as caught:
                await Web(LOCAL).download(url, Spool(file.fileno(), 1 << 20, None, None))
            assert caught.value.passing
            file.truncate(64 << 20)
            with pytest.raises(TransferError, match="too slow"):
                await Web(LOCAL).upload(url, OutgoingFile(file.fileno(), 64 << 20), None)
            monkeypatch.setattr("golem.exeunit.transfer.web.HEAD_S", 0.3)
            silent: list[Any] = await nursery.start(trio.serve_tcp, drip_head, 0)
            url = f"http://127.0.0.1:{silent[0].socket.getsockname()[1]}/x"
            with pytest.raises(TransferError, match=r"no answer within 0.3 s"):
                await Web(LOCAL).download(url, Spool(file.fileno(), 1 << 20, None, None))
        nursery.cancel_scope.cancel()


async def drip_head(stream: trio.SocketStream) -> None:
    try:
        await stream.send_all(b"HTTP/1.1 200 OK\r\n")
        while True:
            await stream.send_all(b"X: y\r\n")
            await trio.sleep(0.05)
    except trio.BrokenResourceError:
        pass


def test_what_is_ours_is_known_without_asking_anybody() -> None:
    assert is_own(ipaddress.ip_address("127.0.0.1"))
    assert is_neighbour(ipaddress.ip_address("127.0.0.2"))
    assert links()
    assert not is_own(ipaddress.ip_address("198.51.100.7"))
    assert refusal("127.0.0.1", TransferPolicy()) == "a loopback address"
