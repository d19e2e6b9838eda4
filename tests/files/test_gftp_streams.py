"""gftp over streams that break, over several at once, and with peers that do not keep to the rules."""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from worlds.patience import within
from worlds.support import trio_test
from worlds.wire import A, B, two_nodes

import golem.files.outgoing
import golem.files.server
import golem.files.tool
import golem.files.wire
from golem.files.client import GftpPeer
from golem.files.on_disk import FileSink
from golem.files.outgoing import OutgoingFile
from golem.files.server import FileServer
from golem.files.tool import CallError, Gftp
from golem.files.wire import Reader, read_header, send_block, send_header
from golem.net.types import Unreachable
from protocol.gftp import BLOCK_BYTES, END, FileFault

SIZE = 12 * BLOCK_BYTES + 12_345
CONTENT = random.Random(1).randbytes(SIZE)
NAME = hashlib.sha3_256(CONTENT).hexdigest()


class Line:
    """The wire from B to A: its streams break after so many bytes, and every piece may take its time."""

    def __init__(self, net: Any) -> None:
        self.open, net.open_stream = net.open_stream, self.open_stream
        self.cuts: list[int] = []  # bytes after which the next streams break, either way counted
        self.carried = 0  # bytes in all
        self.opened = 0
        self.most = 1000  # streams that may be opened
        self.pause: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint

    async def open_stream(self, node: str, name: str, timeout_s: float = 10) -> Any:
        self.opened += 1
        if self.opened > self.most:
            raise Unreachable("too many streams")
        return Wire(self, await self.open(node, name, timeout_s), self.cuts.pop(0) if self.cuts else 1 << 60)


class Wire:
    """One stream of a `Line`."""

    def __init__(self, line: Line, stream: Any, left: int) -> None:
        self.line, self.stream, self.left = line, stream, left

    async def _count(self, size: int) -> None:
        self.left -= size
        self.line.carried += size
        if self.left <= 0:
            await trio.aclose_forcefully(self.stream)
            raise Unreachable("cut")
        await self.line.pause()

    async def send_all(self, data: bytes) -> None:
        await self._count(len(data))
        await self.stream.send_all(data)

    async def receive_some(self, most: int) -> bytes:
        data = await self.stream.receive_some(most)
        await self._count(len(data))
        return bytes(data)

    async def send_eof(self) -> None:
        await self.stream.send_eof()

    async def aclose(self) -> None:
        await self.stream.aclose()


class Place:
    """A publisher at node A, and what node B needs to reach it."""

    def __init__(self, folder: Path, a: Any, b: Any, nursery: trio.Nursery) -> None:
        self.folder, self.a, self.b, self.nursery = folder, a, b, nursery
        self.files = FileServer(a.router, b"secret")
        self.line = Line(b.router._network)
        self.publisher = Gftp(folder / "a.sock")

    def peer(self, streams: int | None = 1) -> GftpPeer:
        return GftpPeer(self.folder / "b.sock", streams)

    async def published(self, content: bytes = CONTENT) -> str:
        (self.folder / "in").write_bytes(content)
        return str((await self.publisher.publish([str(self.folder / "in")]))[0]["url"])

    async def slot(self) -> str:
        return (await self.publisher.receive(str(self.folder / "out")))["url"]

    def parts(self) -> list[str]:
        return [path.name for path in self.folder.iterdir() if path.name.endswith(".part")]


@asynccontextmanager
async def place(folder: Path) -> AsyncIterator[Place]:
    async with two_nodes(folder) as (a, b, nursery):
        made = Place(folder, a, b, nursery)
        await nursery.start(made.publisher.run)
        with within(30):
            yield made
        nursery.cancel_scope.cancel()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other without a wait."""
    monkeypatch.setattr(golem.files.tool, "RETRY_DELAYS_S", (0.0, 0.0, 0.0))


class Got:
    """Where a download goes."""

    def __init__(self) -> None:
        self.data = bytearray()

    async def write(self, block: bytes) -> None:
        self.data += block
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def outgoing(content: bytes) -> AsyncIterator[OutgoingFile]:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        yield OutgoingFile(file.fileno(), len(content))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.testing.wait_all_tasks_blocked(0.001)


# -- several streams at once --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 1, SIZE])
@pytest.mark.parametrize("streams", [1, 3, 8])
@trio_test
async def test_any_number_of_streams_brings_the_same(tmp_path: Path, streams: int, size: int) -> None:
    chance = random.Random(streams)

    async def pause() -> None:
        for _ in range(chance.randrange(4)):
            await trio.lowlevel.checkpoint()

    async with place(tmp_path) as here, outgoing(CONTENT[:size]) as file:
        here.line.pause = pause
        got = Got()
        url = await here.published(CONTENT[:size])
        await here.peer(streams).download(url, 0, got.write)
        assert got.data == CONTENT[:size]
        assert here.line.opened == max(1, min(streams, size // BLOCK_BYTES))
        told: list[int] = []
        await here.peer(streams).upload(await here.slot(), file, lambda done, total: told.append(done))
        assert (tmp_path / "out").read_bytes() == CONTENT[:size]
        assert here.parts() == []
        assert told == sorted(told)
        assert (told or [0])[-1] == size


@trio_test
async def test_a_long_way_is_gone_on_several_streams(tmp_path: Path) -> None:
    async with place(tmp_path) as here:

        async def pause() -> None:
            await trio.sleep(0.015)

        here.line.pause = pause
        url = await here.published()
        got = Got()
        await here.peer(None).download(url, 0, got.write)
        assert got.data == CONTENT
        assert 2 <= here.line.opened <= 8


@trio_test
async def test_further_streams_are_done_without(tmp_path: Path) -> None:
    async with place(tmp_path) as here, outgoing(CONTENT) as file:
        url, slot, got = await here.published(), await here.slot(), Got()
        here.line.most = 2
        await here.peer(4).download(url, 0, got.write)
        assert got.data == CONTENT
        here.line.opened = 0
        await here.peer(4).upload(slot, file)
        assert here.line.opened > 2
        assert (tmp_path / "out").read_bytes() == CONTENT


# -- broken streams -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [1, 4])
@trio_test
async def test_a_download_goes_on_where_it_broke(tmp_path: Path, streams: int, at_once: None) -> None:
    async with place(tmp_path) as here:
        url = await here.published()
        tool = Gftp(tmp_path / "b.sock")
        tool._peer = here.peer(streams)
        # more breaks than there are attempts without progress
        share = 5 << 20 if streams == 1 else 2 << 20
        here.line.cuts = [share] * streams + [share] * streams + [3 << 20] * streams
        await tool.download(url, str(tmp_path / "got"))
        assert (tmp_path / "got").read_bytes() == CONTENT
        assert here.line.cuts == [] or streams > 1
        assert here.line.carried < SIZE + 3 * streams * 3 * BLOCK_BYTES  # what was on its way, not all over again
        assert here.parts() == []


@pytest.mark.parametrize("streams", [1, 4])
@trio_test
async def test_an_upload_goes_on_where_it_broke(tmp_path: Path, streams: int) -> None:
    async with place(tmp_path) as here, outgoing(CONTENT) as file:
        url, peer = await here.slot(), here.peer(streams)
        here.line.cuts = [(8 << 20) // streams] * streams
        with pytest.raises(FileFault) as caught:
            await peer.upload(url, file)
        assert caught.value.passing
        assert here.line.cuts == []
        await peer.upload(url, file)
        assert file.kept >= (6 << 20 if streams == 1 else 1 << 20)
        assert file.kept % BLOCK_BYTES == 0
        assert (tmp_path / "out").read_bytes() == CONTENT
        assert here.line.carried < SIZE + 7 * BLOCK_BYTES
        assert here.parts() == []
        await until(lambda: here.files._uploads == {})


@trio_test
async def test_another_content_does_not_go_on_with_the_former(tmp_path: Path) -> None:
    other = random.Random(2).randbytes(SIZE)
    async with place(tmp_path) as here, outgoing(CONTENT) as file, outgoing(other) as second, outgoing(b"short") as third:
        peer = here.peer()
        for content, next_file in ((other, second), (b"short", third)):
            url = await here.slot()
            here.line.cuts = [8 << 20]
            with pytest.raises(FileFault):
                await peer.upload(url, file)
            await peer.upload(url, next_file)
            assert next_file.kept == 0
            assert (tmp_path / "out").read_bytes() == content
        assert here.parts() == []


@trio_test
async def test_a_slot_and_its_half_upload_outlive_the_node(tmp_path: Path) -> None:
    async with place(tmp_path) as here, outgoing(CONTENT) as file:
        url = await here.slot()
        here.line.cuts = [8 << 20]
        with pytest.raises(FileFault):
            await here.peer().upload(url, file)
        await until(lambda: all(upload.over.is_set() for upload in here.files._uploads.values()))
        # a new node knows nothing but what its tools tell it again
        here.files = FileServer(here.a.router, b"secret")
        peer = here.peer()
        peer._met[url] = None
        with pytest.raises(FileFault, match="no such file") as caught:
            await peer.upload(url, file)
        assert caught.value.passing
        await here.publisher._on_connect()
        await peer.upload(url, file)
        assert file.kept >= 6 << 20
        assert (tmp_path / "out").read_bytes() == CONTENT
        assert here.parts() == []


@trio_test
async def test_what_a_slot_has_taken_stays(tmp_path: Path) -> None:
    """A sender whose answer was lost is told that all is there; the file is not written again, and no other one comes."""
    async with place(tmp_path) as at:
        url, other = await at.slot(), bytes(SIZE)
        async with outgoing(CONTENT) as file:
            await at.peer().upload(url, file)
        before = (tmp_path / "out").stat()
        carried = at.line.carried
        async with outgoing(CONTENT) as file:
            assert await at.peer().upload(url, file) == SIZE
        assert at.line.carried - carried < 2_000, "no byte of it came again"
        for life in range(2):
            for content in (other, CONTENT[:-1], CONTENT + b"x", b""):
                async with outgoing(content) as file:
                    with pytest.raises(FileFault, match="has taken a file already") as caught:
                        await at.peer().upload(url, file)
                    assert not caught.value.passing
            assert (tmp_path / "out").read_bytes() == CONTENT
            status = (tmp_path / "out").stat()
            assert (status.st_ino, status.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
            assert at.parts() == []
            if not life:  # the next node knows it, too
                at.files = FileServer(at.a.router, b"secret")
                await at.publisher._on_connect()
                async with outgoing(CONTENT) as file:
                    assert await at.peer().upload(url, file) == SIZE
        (tmp_path / "out").unlink()  # its owner took it away: that opens nothing
        async with outgoing(other) as file:
            with pytest.raises(FileFault, match="has taken a file already"):
                await at.peer().upload(url, file)


@trio_test
async def test_a_slot_takes_what_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with place(tmp_path) as at:
        url = (await at.publisher.receive(str(tmp_path / "out"), 1000))["url"]
        async with outgoing(bytes(1001)) as file:
            with pytest.raises(FileFault, match="too large: 1001 bytes, and this slot takes 1000"):
                await at.peer().upload(url, file)
        async with outgoing(bytes(1000)) as file:
            await at.peer().upload(url, file)
        monkeypatch.setattr("golem.files.on_disk.SPARE_BYTES", 1 << 60)  # there is nothing to be had
        url = await at.slot()
        async with outgoing(CONTENT) as file:
            with pytest.raises(FileFault, match="do not fit"):
                await at.peer().upload(url, file)
        await until(lambda: at.parts() == [])
        monkeypatch.undo()
        await _put_too_much(at, url, 1 << 40)  # of a length that no disk here has
        await until(lambda: at.parts() == [])


async def _put_too_much(at: Place, url: str, size: int) -> None:
    stream = await at.b.router.open_stream(A, "gftp")
    reader = Reader(stream)
    await send_header(stream, ["put", url.rpartition("/")[2], size])
    await read_header(reader)
    await send_header(stream, ["from", 0])
    answer = await read_header(reader)
    assert answer is not None
    assert answer[:2] == ["error", "WriteError"]
    assert "do not fit" in answer[2]
    await stream.aclose()


@trio_test
async def test_room_of_an_upload_is_set_aside(tmp_path: Path) -> None:
    """Of many that begin at once the next one sees what the others will need."""
    async with place(tmp_path) as at:
        url = await at.slot()
        stream = await at.b.router.open_stream(A, "gftp")
        reader = Reader(stream)
        await send_header(stream, ["put", url.rpartition("/")[2], 32 << 20])
        await read_header(reader)
        await send_header(stream, ["from", 0])
        await send_block(stream, 0, bytes(BLOCK_BYTES))
        await until(lambda: bool(at.parts()) and (tmp_path / at.parts()[0]).stat().st_size == BLOCK_BYTES)
        part = tmp_path / at.parts()[0]
        assert part.stat().st_blocks * 512 >= 32 << 20
        await stream.aclose()
        await until(lambda: part.stat().st_blocks * 512 < 2 << 20)  # who does not send holds nothing
        assert part.stat().st_size == BLOCK_BYTES


@trio_test
async def test_what_nobody_ends_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golem.files.server, "KEEP_S", 0.05)
    async with place(tmp_path) as here, outgoing(CONTENT) as file:
        url = await here.slot()
        here.line.cuts = [4 << 20]
        with pytest.raises(FileFault):
            await here.peer().upload(url, file)
        assert len(here.parts()) == 1
        await until(lambda: here.parts() == [])
        monkeypatch.setattr(golem.files.server, "KEEP_S", 300.0)
        here.line.cuts = [4 << 20]
        with pytest.raises(FileFault):
            await here.peer().upload(url, file)
        assert len(here.parts()) == 1
        assert await here.publisher.close([url]) == ["ok"]
        await until(lambda: here.parts() == [])
        assert here.files._uploads == {}


@trio_test
async def test_the_tool_leaves_no_half_uploads(tmp_path: Path) -> None:
    async with place(tmp_path) as here, outgoing(CONTENT) as file, trio.open_nursery() as nursery:
        tool = Gftp(tmp_path / "a.sock")
        await nursery.start(tool.run)
        url = (await tool.receive(str(tmp_path / "out2")))["url"]
        here.line.cuts = [4 << 20]
        with pytest.raises(FileFault):
            await here.peer().upload(url, file)
        assert len(here.parts()) == 1
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await until(lambda: here.parts() == [])


@trio_test
async def test_a_sender_that_comes_back_need_not_wait_for_its_dead_stream(tmp_path: Path) -> None:
    async with place(tmp_path) as here, outgoing(CONTENT) as file, trio.open_nursery() as nursery:
        url = await here.slot()
        stuck = trio.Event()

        async def hang() -> None:
            if here.line.carried > 6 << 20 and not stuck.is_set():
                stuck.set()
                await trio.sleep_forever()

        here.line.pause = hang

        async def first(scope: trio.CancelScope) -> None:
            with scope, pytest.raises(FileFault, match="another upload"):
                await here.peer().upload(url, file)

        scope = trio.CancelScope()
        nursery.start_soon(first, scope)
        await stuck.wait()
        async with outgoing(CONTENT) as again:  # as if the sender's machine had started again
            await here.peer().upload(url, again)
            assert again.kept >= 4 << 20
        assert (tmp_path / "out").read_bytes() == CONTENT
        scope.cancel()


class Slow:
    """A sink in memory, as websockets are: it wants SHA3-256, and takes one thing at a time."""

    def __init__(self) -> None:
        self.data, self.digest, self.begun, self.busy = bytearray(), "", 0, False
        self.fault: FileFault | None = None

    async def begin(self) -> None:
        self.begun += 1
        self.data.clear()

    async def write(self, offset: int, content: bytes) -> None:
        assert not self.busy
        self.busy = True
        assert offset == len(self.data)
        await trio.sleep(0.001)
        if self.fault is not None and offset > 3 << 20:
            raise self.fault
        self.data += content
        self.busy = False

    async def finish(self, digest: str) -> None:
        self.digest = digest

    async def abort(self) -> None:
        self.data.clear()


@trio_test
async def test_other_sinks_go_on_as_well_and_get_their_hash(tmp_path: Path) -> None:
    async with place(tmp_path) as here, outgoing(CONTENT) as file:
        sink = Slow()
        here.files.offer("sink", sink, "test")
        here.line.cuts = [3 << 20, 3 << 20]
        with pytest.raises(FileFault):
            await here.peer(2).upload(f"gftp://{A}/sink", file)
        await here.peer(2).upload(f"gftp://{A}/sink", file)
        assert file.kept
        assert sink.begun == 1
        assert sink.data == CONTENT
        assert sink.digest == NAME


@trio_test
async def test_the_sender_hears_why_its_upload_fails(tmp_path: Path) -> None:
    async with place(tmp_path) as here, outgoing(CONTENT) as file:
        sink = Slow()
        sink.fault = FileFault("WriteError", "no space left on device")
        here.files.offer("sink", sink, "test")
        with pytest.raises(FileFault, match="no space left") as caught:
            await here.peer(3).upload(f"gftp://{A}/sink", file)
        assert not caught.value.passing
        await until(lambda: here.files._uploads == {})
        assert sink.data == b""


@trio_test
async def test_a_file_that_shrinks_while_it_is_sent(tmp_path: Path) -> None:
    async with place(tmp_path) as here, outgoing(CONTENT) as file:
        file.size += 1
        with pytest.raises(FileFault, match="became shorter"):
            await here.peer().upload(await here.slot(), file)
        assert not (tmp_path / "out").exists()


@trio_test
async def test_a_caller_that_fails_fails_as_itself(tmp_path: Path) -> None:
    async with place(tmp_path) as here:
        url = await here.published()

        async def write(block: bytes) -> None:
            raise OSError(28, "No space left on device")

        with pytest.raises(OSError, match="No space"):
            await here.peer(4).download(url, 0, write)


def test_hashes_are_kept_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golem.files.outgoing, "CHECKPOINT_BYTES", 2 << 20)
    (tmp_path / "f").write_bytes(CONTENT)
    with (tmp_path / "f").open("rb") as file:
        sent = OutgoingFile(file.fileno(), SIZE)
        for offset in (0, 3 << 20, SIZE, 5_000_000, 5_000_001, 0, SIZE):
            for name in ("sha256", "sha3_256"):
                assert sent.rewind(offset, name) == hashlib.new(name, CONTENT[:offset]).hexdigest()
        sent.rewind(SIZE, "sha3_256")
        read: list[int] = []
        real = golem.files.outgoing.os.pread
        monkeypatch.setattr(golem.files.outgoing.os, "pread", lambda fd, size, at: read.append(at) or real(fd, size, at))
        assert sent.rewind(9 << 20, "sha3_256") == hashlib.sha3_256(CONTENT[: 9 << 20]).hexdigest()
        assert read == [8 << 20]


# -- publishers that lie ------------------------------------------------------------------------------------------


def frame(parts: list[Any]) -> bytes:
    body = msgspec.msgpack.encode(parts)
    return len(body).to_bytes(4, "big") + body


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize(
    ("answers", "text"),
    [
        ([frame(["ok", SIZE]), frame(["ok", SIZE]) + bytes(1000)], "ended early"),
        ([frame(["ok", SIZE]), frame(["ok", SIZE + 1]) + CONTENT], "changed its size"),
        ([frame(["ok", -1])], "not a gftp answer"),
        ([frame(["ok", SIZE]), frame(["ok", "much"])], "not a gftp answer"),
        ([frame(["ok", SIZE]), frame(["error", "ReadError", "gone"])], "gone"),
        ([b"\xff\xff\xff\xff"], "not a gftp header"),
        ([b"\0\0\0\5hello"], "malformed gftp header"),
        ([b"\0\0"], "ended early"),
        ([b""], "ended early"),
    ],
)
@trio_test
async def test_publishers_that_answer_nonsense(tmp_path: Path, streams: int, answers: list[bytes], text: str) -> None:
    async with place(tmp_path) as here:

        async def serve(sender: str, stream: Any) -> None:
            async with stream:
                if here.line.opened == 1:
                    await stream.receive_some(1000)
                    await stream.send_all(answers[0])
                if len(answers) > 1:
                    await stream.receive_some(1000)
                    with suppress(trio.BrokenResourceError), trio.move_on_after(1):
                        await stream.send_all(answers[1])

        here.a.router.serve_stream("gftp", serve)
        got = Got()
        with pytest.raises(FileFault, match=text):
            await here.peer(streams).download(f"gftp://{A}/{NAME}", 0, got.write)
        assert len(got.data) <= SIZE


@trio_test
async def test_a_publisher_without_end_gives_what_it_promised(tmp_path: Path) -> None:
    async with place(tmp_path) as here:

        async def serve(sender: str, stream: Any) -> None:
            await stream.receive_some(1000)
            await stream.send_all(frame(["ok", 100]))
            await stream.receive_some(1000)
            await stream.send_all(frame(["ok", 100]))
            with suppress(trio.BrokenResourceError):
                while True:
                    await stream.send_all(bytes(1 << 16))

        here.a.router.serve_stream("gftp", serve)
        got = Got()
        await here.peer().download(f"gftp://{A}/{NAME}", 0, got.write)
        assert len(got.data) == 100
        tool = Gftp(tmp_path / "b.sock")
        with pytest.raises(CallError, match="another hash"):
            await tool.download(f"gftp://{A}/{NAME}", str(tmp_path / "got"))


@trio_test
async def test_next_to_nothing_is_not_enough() -> None:
    near, far = trio.testing.memory_stream_pair()
    reader = Reader(near, 0.2)
    async with trio.open_nursery() as nursery:

        async def drip() -> None:
            while True:
                await far.send_all(b"x")
                await trio.sleep(0.01)

        nursery.start_soon(drip)
        with within(5), pytest.raises(FileFault, match=r"bytes in 0\.2 s") as caught:
            await reader.exactly(1 << 20)
        assert caught.value.passing
        nursery.cancel_scope.cancel()


# -- senders that do not keep to the rules ------------------------------------------------------------------------


class Sender:
    """Speaks gftp by hand."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.reader = stream, Reader(stream)

    async def ask(self, *parts: Any) -> list[Any] | None:
        await send_header(self.stream, list(parts))
        return await read_header(self.reader)


@asynccontextmanager
async def sender(here: Place) -> AsyncIterator[Sender]:
    stream = await golem.files.client.open_stream(here.folder / "b.sock", A, "gftp")
    async with stream:
        yield Sender(stream)


Act = Callable[[Sender], Awaitable[None]]


async def _too_far(one: Sender) -> None:
    await send_block(one.stream, 3 << 20, bytes(BLOCK_BYTES))  # there is no such place in the file


async def _odd_place(one: Sender) -> None:
    await send_block(one.stream, 1, bytes(BLOCK_BYTES))


async def _small_block(one: Sender) -> None:
    await send_block(one.stream, 0, bytes(10))


async def _twice(one: Sender) -> None:
    await send_block(one.stream, 0, bytes(BLOCK_BYTES))
    await send_block(one.stream, 0, bytes(BLOCK_BYTES))


async def _oversized(one: Sender) -> None:
    await one.stream.send_all(bytes(8) + (BLOCK_BYTES + 1).to_bytes(4, "big"))


async def _too_short(one: Sender) -> None:
    await send_block(one.stream, 0, bytes(BLOCK_BYTES))
    await one.stream.send_all(END + b"0" * 64)


async def _other_hash(one: Sender) -> None:
    await send_block(one.stream, 0, bytes(BLOCK_BYTES))
    await send_block(one.stream, BLOCK_BYTES, bytes(BLOCK_BYTES))
    await one.stream.send_all(END + b"0" * 64)


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (_too_far, "out of place"), (_odd_place, "out of place"), (_small_block, "out of place"), (_twice, "come twice"),
        (_oversized, "over the limit"), (_too_short, "ended early"), (_other_hash, "hash of the upload is another"),
    ],
)  # fmt: skip
@trio_test
async def test_senders_that_break_the_rules(tmp_path: Path, act: Act, text: str) -> None:
    async with place(tmp_path) as here, sender(here) as one:
        name = (await here.slot()).rpartition("/")[2]
        assert (await one.ask("put", name, 2 * BLOCK_BYTES) or [])[:2] == ["ok", 0]
        await send_header(one.stream, ["from", 0])
        await act(one)
        answer = await read_header(one.reader)
        assert answer
        assert answer[0] == "error"
        assert text in answer[2]
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "request_",
    [
        ["put", "SLOT", -1], ["put", "SLOT", 1 << 50], ["put", "SLOT"], ["put", 1, 1], ["join", "x"], [],
        ["get", "SLOT", 0, 1], ["get", NAME, -1, 1], ["get", NAME, 0, -1], ["fly"], ["put", NAME, 1],
    ],
)  # fmt: skip
@trio_test
async def test_requests_that_are_refused(tmp_path: Path, request_: list[Any]) -> None:
    async with place(tmp_path) as here, sender(here) as one:
        await here.published()
        name = (await here.slot()).rpartition("/")[2]
        answer = await one.ask(*[name if part == "SLOT" else part for part in request_])
        assert answer
        assert answer[0] == "error"
        assert here.files._uploads == {}


@trio_test
async def test_only_the_sender_itself_adds_streams(tmp_path: Path) -> None:
    async with place(tmp_path) as here, sender(here) as one:
        name = (await here.slot()).rpartition("/")[2]
        answer = await one.ask("put", name, 2 * BLOCK_BYTES)
        assert answer
        await send_header(one.stream, ["from", 0])
        async with await golem.files.client.open_stream(tmp_path / "a.sock", A, "gftp") as stream:
            refused = await Sender(stream).ask("join", answer[4])  # by node A, not by node B
            assert refused
            assert refused[0] == "error"
        await send_block(one.stream, 0, CONTENT[:BLOCK_BYTES])
        async with sender(here) as two:
            await send_header(two.stream, ["join", answer[4]])
            await send_block(two.stream, BLOCK_BYTES, CONTENT[BLOCK_BYTES : 2 * BLOCK_BYTES])
            await two.stream.send_all(END)
            assert await read_header(two.reader) == ["ok", 0]
        await one.stream.send_all(END + hashlib.sha256(CONTENT[: 2 * BLOCK_BYTES]).hexdigest().encode())
        assert await read_header(one.reader) == ["ok", 2 * BLOCK_BYTES]
        assert (tmp_path / "out").read_bytes() == CONTENT[: 2 * BLOCK_BYTES]
    assert B != A


@trio_test
async def test_blocks_from_afar_wait_outside(tmp_path: Path) -> None:
    """A sender that leaves out the first block fills no memory with the others."""
    size = 64 * BLOCK_BYTES
    async with place(tmp_path) as here, sender(here) as one:
        name = (await here.slot()).rpartition("/")[2]
        assert await one.ask("put", name, size)
        await send_header(one.stream, ["from", 0])
        with trio.move_on_after(0.3):
            for at in range(BLOCK_BYTES, size, BLOCK_BYTES):
                await send_block(one.stream, at, bytes(BLOCK_BYTES))
        [upload] = here.files._uploads.values()
        assert len(upload._blocks._blocks) <= 4


def test_only_our_own_leavings_are_taken_up(tmp_path: Path) -> None:
    async def left(sink: FileSink) -> Any:
        return await sink.left()

    (tmp_path / "elsewhere").write_bytes(b"secret")
    sink = FileSink(tmp_path / "out", "S" * 65)
    assert trio.run(left, sink) is None
    sink._part.symlink_to(tmp_path / "elsewhere")
    assert trio.run(left, sink) is None
    sink._part.unlink()
    sink._part.hardlink_to(tmp_path / "elsewhere")
    assert trio.run(left, sink) is None
    sink._part.unlink()
    sink._part.write_bytes(b"half")
    size, digest = trio.run(left, FileSink(tmp_path / "out", "S" * 65))
    assert (size, digest.hexdigest()) == (4, hashlib.sha256(b"half").hexdigest())
