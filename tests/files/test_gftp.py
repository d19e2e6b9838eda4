"""gftp: the command over a bus, files between nodes, and what goes wrong with them."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from worlds.patience import within
from worlds.support import trio_test
from worlds.wire import A, two_nodes

import golem.files.tool
from golem.files.client import GftpPeer
from golem.files.on_disk import FileSource
from golem.files.outgoing import OutgoingFile
from golem.files.server import FileServer
from golem.files.tool import CallError, Gftp, StdioServer, _sha3_of
from protocol.gftp import FileFault


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@asynccontextmanager
async def session(tmp_path: Path) -> AsyncIterator[tuple[Gftp, GftpPeer, FileServer, trio.Nursery]]:
    """A gftp session on node A, and a reader on node B."""
    async with two_nodes(tmp_path) as (a, b, nursery):
        files = FileServer(a.router, b"secret")
        FileServer(b.router, b"secret")
        gftp = Gftp(tmp_path / "a.sock")
        await nursery.start(gftp.run)
        yield gftp, GftpPeer(tmp_path / "b.sock"), files, nursery


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if "part" in path.name]


async def until(condition: Callable[[], bool]) -> None:
    with within(5):
        while not condition():
            await trio.testing.wait_all_tasks_blocked(0.001)


async def fetch(peer: GftpPeer, url: str, offset: int = 0) -> bytes:
    got = bytearray()

    async def write(data: bytes) -> None:
        got.extend(data)

    await peer.download(url, offset, write)
    return bytes(got)


async def send(peer: GftpPeer, url: str, data: bytes) -> int:
    """Upload; returns how much was there already."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        outgoing = OutgoingFile(file.fileno(), len(data))
        await peer.upload(url, outgoing)
        return outgoing.kept


@trio_test
async def test_publish_download_close(tmp_path: Path) -> None:
    for number, size in enumerate((0, 1, 2_500_000)):
        (tmp_path / f"in{number}").write_bytes(content(size))
    (tmp_path / "twin").write_bytes(content(1))
    async with session(tmp_path) as (gftp, peer, _, _):
        paths = [str(tmp_path / name) for name in ("in0", "in1", "in2", "twin")]
        done = await gftp.publish(paths)
        assert [entry["file"] for entry in done] == paths
        sha3 = hashlib.sha3_256(content(1)).hexdigest()
        assert done[1]["url"] == done[3]["url"]
        assert re.fullmatch(rf"gftp://{A}/{sha3}-[0-9a-f]{{32}}", done[1]["url"])
        for entry, size in zip(done, (0, 1, 2_500_000), strict=False):
            assert await peer.size(entry["url"]) == size
            assert await fetch(peer, entry["url"]) == content(size)
        assert await fetch(peer, done[2]["url"], 2_499_990) == content(2_500_000)[-10:]
        await gftp.download(done[2]["url"], str(tmp_path / "own"))  # its own node serves it as well
        assert (tmp_path / "own").read_bytes() == content(2_500_000)
        assert await gftp.close([done[1]["url"], done[1]["url"], "nonsense"]) == ["ok", "error", "error"]
        with pytest.raises(FileFault, match="no such file"):
            await fetch(peer, done[1]["url"])


@trio_test
async def test_who_guesses_the_content_of_a_file_does_not_know_its_name(tmp_path: Path) -> None:
    """A stranger asked for the two files that it could be, and knew which one it was."""
    (tmp_path / "pin").write_bytes(b"PIN=4711")
    async with session(tmp_path) as (gftp, peer, files, _):
        [entry] = await gftp.publish([str(tmp_path / "pin")])
        guessed = hashlib.sha3_256(b"PIN=4711").hexdigest()
        other_code = hmac.digest(b"another secret", guessed.encode(), "sha256").hex()[:32]
        for name in (guessed, f"{guessed}-", f"{guessed}-{'0' * 32}", f"{guessed}-{other_code}"):
            with pytest.raises(FileFault, match="no such file"):
                await peer.size(f"gftp://{A}/{name}")
        assert await fetch(peer, entry["url"]) == b"PIN=4711"
        assert files.published() == [files.name_of(guessed)], "the same name after a restart"
        for bad in ("a" * 63, "A" * 64, "../" + "a" * 61):
            with pytest.raises(CallError, match="expected a SHA3-256"):
                await gftp._call("gftp:publish", str(tmp_path / "pin"), bad)


@trio_test
async def test_receive_and_upload(tmp_path: Path) -> None:
    async with session(tmp_path) as (gftp, peer, _, _):
        slot = await gftp.receive(str(tmp_path / "out"))
        name = slot["url"].rpartition("/")[2]
        assert len(name) == 65
        assert name.isalnum()
        await send(peer, slot["url"], content(300_000))
        assert (tmp_path / "out").read_bytes() == content(300_000)
        await send(peer, slot["url"], content(300_000))  # whose answer was lost asks again
        with pytest.raises(FileFault, match="has taken a file already"):
            await send(peer, slot["url"], b"")
        assert (tmp_path / "out").read_bytes() == content(300_000)
        with pytest.raises(FileFault, match="cannot be read"):
            await fetch(peer, slot["url"])
        assert leftovers(tmp_path) == []


@trio_test
async def test_only_regular_readable_unchanged_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "changes").write_bytes(b"one")
    (tmp_path / "forged").write_bytes(b"forged")
    async with session(tmp_path) as (gftp, peer, files, _):
        for bad in (tmp_path / "fifo", tmp_path, tmp_path / "missing", Path("/dev/zero")):
            with pytest.raises(CallError):
                await gftp.publish([str(bad)])
        [entry] = await gftp.publish([str(tmp_path / "changes")])
        (tmp_path / "changes").write_bytes(b"three")
        with pytest.raises(FileFault, match="changed after"):
            await fetch(peer, entry["url"])
        from golem.files.on_disk import FileSource

        files.offer("a" * 64, FileSource(tmp_path / "forged"), "test")
        with pytest.raises(CallError, match="another hash"):
            await gftp.download(f"gftp://{A}/{'a' * 64}", str(tmp_path / "got"))
        assert not (tmp_path / "got").exists()
        assert leftovers(tmp_path) == []
        with pytest.raises(CallError, match="no such directory"):
            await gftp.receive(str(tmp_path / "none" / "out"))


class Breaking:
    """A source whose stream ends early, once."""

    def __init__(self, data: bytes) -> None:
        self.data, self.broken = data, False

    async def size(self) -> int:
        return len(self.data)

    async def read(self, offset: int, size: int) -> bytes:
        if offset >= len(self.data) // 2 and not self.broken:
            self.broken = True
            raise FileFault("ReadError", "away")
        return self.data[offset : offset + min(size, 10_000)]


@trio_test
async def test_a_download_resumes_and_checks_the_whole_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golem.files.tool, "RETRY_DELAYS_S", (0.0, 0.0))
    data = content(100_000)
    name = hashlib.sha3_256(data).hexdigest()
    async with session(tmp_path) as (gftp, _, files, _):
        files.offer(name, Breaking(data), "test")
        await gftp.download(f"gftp://{A}/{name}", str(tmp_path / "got"))
        assert (tmp_path / "got").read_bytes() == data
        files.offer("b" * 64, Breaking(data), "test")
        with pytest.raises(CallError, match="IntegrityError"):
            await gftp.download(f"gftp://{A}/{'b' * 64}", str(tmp_path / "bad"))
        files.offer(f"{'b' * 64}-{'c' * 32}", Breaking(data), "test")
        with pytest.raises(CallError, match="IntegrityError"):
            await gftp.download(f"gftp://{A}/{'b' * 64}-{'c' * 32}", str(tmp_path / "bad"))
        assert not (tmp_path / "bad").exists()


@trio_test
async def test_published_files_end_with_the_session_and_survive_the_node(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"x")
    async with two_nodes(tmp_path) as (a, _, nursery), trio.open_nursery() as inner:
        files = FileServer(a.router, b"secret")
        gftp = Gftp(tmp_path / "a.sock")
        await inner.start(gftp.run)
        [entry] = await gftp.publish([str(tmp_path / "in")])
        slot = await gftp.receive(str(tmp_path / "out"))
        [first] = a.bus.peers()
        first.connection.close()  # as if the node had gone
        await until(lambda: a.bus.peers() not in ([], [first]) and len(files.published()) == 2)
        reader = GftpPeer(tmp_path / "a.sock")
        assert await fetch(reader, entry["url"]) == b"x"
        await send(reader, slot["url"], b"y")
        inner.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await until(lambda: not files.published())
        nursery.cancel_scope.cancel()


@trio_test
async def test_json_rpc(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"x")
    async with session(tmp_path) as (gftp, _, _, _):
        lines: list[bytes] = []
        server = StdioServer(gftp, lines.append)

        async def ask(request: Any) -> dict[str, Any]:
            await server.line(request if isinstance(request, bytes) else json.dumps(request).encode())
            assert len(lines) == 1
            assert lines[0].endswith(b"\r\n")
            return json.loads(lines.pop())

        big = 2**63 - 25
        reply = await ask({"jsonrpc": "2.0", "method": "version", "id": big})
        assert reply["id"] == big
        assert reply["result"].split()[0].count(".") == 2
        reply = await ask({"jsonrpc": "2.0", "method": "publish", "params": {"files": [str(tmp_path / "in")]}, "id": "u"})
        url = reply["result"][0]["url"]
        assert reply == {"jsonrpc": "2.0", "id": "u", "result": [{"file": str(tmp_path / "in"), "url": url}]}
        reply = await ask({"method": "download", "params": {"url": url, "output_file": str(tmp_path / "o")}, "id": 1})
        assert reply["result"] == {"file": str(tmp_path / "o"), "url": url}
        assert (await ask({"method": "close", "params": {"urls": [url]}, "id": 1}))["result"] == ["ok"]
        for request, code in (
            (b"{", -32700),
            ([], -32600),
            ({"id": 1}, -32600),
            ({"method": "fly", "id": 1}, -32601),
            ({"method": "publish", "id": 1}, -32602),
            ({"method": "publish", "params": {"files": [1]}, "id": 1}, -32602),
            ({"method": "publish", "params": {"files": ["/missing"]}, "id": 1}, -32000),
            ({"method": "download", "params": {"url": "x", "output_file": "/tmp/x"}, "id": 1}, -32000),
        ):
            assert (await ask(request))["error"]["code"] == code
        await server.line(b'{"jsonrpc":"2.0","method":"version"}')
        assert lines == []
        assert (await ask({"method": "shutdown", "id": 3}))["result"] == "ok"
        assert server.stopped


@pytest.mark.integration
@trio_test
async def test_the_command_as_an_agent_uses_it(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"hello")
    async with two_nodes(tmp_path) as (a, _, nursery):
        FileServer(a.router, b"secret")
        env = {**os.environ, "GSB_URL": f"unix:{tmp_path / 'a.sock'}"}
        command = [sys.executable, "-m", "golem.files.tool", "server"]
        process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        assert process.stdin
        assert process.stdout
        with within(20):
            for method, params in (("version", {}), ("publish", {"files": [str(tmp_path / "in")]}), ("shutdown", {})):
                request = {"jsonrpc": "2.0", "method": method, "params": params, "id": method}
                await process.stdin.send_all(json.dumps(request).encode() + b"\n")
                reply = json.loads(await process.stdout.receive_some(65536))
                assert reply["id"] == method
                assert "result" in reply
            assert await process.wait() == 0
        nursery.cancel_scope.cancel()


@trio_test
async def test_speed(tmp_path: Path) -> None:
    """Two Unix sockets, one splice, two hashes: far above what the link between nodes will be."""
    data = bytes(32 << 20)
    (tmp_path / "in").write_bytes(data)
    async with session(tmp_path) as (gftp, peer, _, _):
        [entry] = await gftp.publish([str(tmp_path / "in")])
        size = 0

        async def write(chunk: bytes) -> None:
            nonlocal size
            size += len(chunk)

        began = time.perf_counter()
        await peer.download(entry["url"], 0, write)
        rate = size / (time.perf_counter() - began) / 1e6
        print(f"{rate:.0f} MB/s")
        assert size == len(data)
        assert rate > 20


SECRET = b"what is ours alone\n"


@pytest.mark.parametrize("trick", ["link", "folder", "rename", "hardlink", "same-times", "fifo"])
def test_what_others_put_into_the_place_of_a_published_file_is_not_read(tmp_path: Path, trick: str) -> None:
    """The folder is one that others write: whatever is there now, the file that was hashed is published or nothing."""
    shared, private = tmp_path / "shared", tmp_path / "private"
    shared.mkdir(), private.mkdir()
    file, secret = shared / "file", private / "file"
    file.write_bytes(b"x" * len(SECRET)), secret.write_bytes(SECRET)
    digest, identity = _sha3_of(file)
    assert trio.run(FileSource(file, identity).read, 0, 100) == b"x" * len(SECRET)

    def swap() -> None:
        if trick == "folder":
            shared.rename(tmp_path / "away")
            shared.symlink_to(private)
            return
        times = file.stat()
        file.rename(tmp_path / "old")
        match trick:
            case "link":
                file.symlink_to(secret)
            case "hardlink":
                os.link(secret, file)
            case "fifo":
                os.mkfifo(file)
            case _:
                file.write_bytes(SECRET)
                os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    published = FileSource(file, identity)
    swap()
    for opened in (lambda: FileSource(file, identity), lambda: trio.run(published.read, 0, 100)):
        with pytest.raises(FileFault):
            opened()
    assert digest != _sha3_of(secret)[0]


def test_a_file_that_is_reached_by_a_link_is_published(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert trio.run(FileSource(tmp_path / "link").read, 0, 100) == b"content"
    with pytest.raises(CallError):
        _sha3_of(tmp_path / "link")
