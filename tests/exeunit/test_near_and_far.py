"""Transfers by the URLs of strangers: what a redirection's body may cost, and which public addresses are too near."""

from __future__ import annotations

import gzip
import ipaddress
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from support import trio_test

from golem.exeunit.nearby import is_neighbour, is_own, links
from golem.exeunit.runtimes.process_tree import Tree
from golem.exeunit.sandbox.lockdown import limit_memory
from golem.exeunit.spool import Spool, TransferError, TransferPolicy
from golem.exeunit.transfer import Transfers
from golem.exeunit.web import Web, refusal

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
from golem.exeunit.spool import TransferPolicy
from golem.exeunit.web import refusal
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


def test_what_is_ours_is_known_without_asking_anybody() -> None:
    assert is_own(ipaddress.ip_address("127.0.0.1"))
    assert is_neighbour(ipaddress.ip_address("127.0.0.2"))
    assert links()
    assert not is_own(ipaddress.ip_address("198.51.100.7"))
    assert refusal("127.0.0.1", TransferPolicy()) == "a loopback address"
