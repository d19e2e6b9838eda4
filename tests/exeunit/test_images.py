"""The package cache: hits, locks, eviction, formats."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import trio
import wat_modules as wat
from worlds.patience import patience, within
from worlds.support import trio_test

from golem.exeunit.runtime import ImageFormat
from golem.exeunit.runtimes.wasm.cache import CompiledCache
from golem.exeunit.transfer.packages import CACHE_HIT, MIN_FREE_BYTES, NOTE, ImageStore, detect_format
from golem.exeunit.transfer.spool import Spool
from golem.exeunit.transfer.transfers import TransferError, TransferPolicy, Transfers

ALL = frozenset(ImageFormat)


class SlowWeb:
    """Serves one content after an event; counts downloads."""

    def __init__(self, content: bytes) -> None:
        self.content, self.downloads, self.go = content, 0, trio.Event()

    async def download(self, url: str, spool: Spool) -> None:
        self.downloads += 1
        await self.go.wait()
        await spool.write(self.content)

    async def upload(self, url: str, descriptor: int, size: int, progress: object) -> None:
        raise AssertionError("nothing is uploaded here")


def package(path: Path, content: bytes, bits: int = 224) -> str:
    path.write_bytes(content)
    return f"hash:sha3:{hashlib.new(f'sha3_{bits}', content).hexdigest()}:file://{path}"


def store(tmp_path: Path, max_bytes: int = 1 << 20, max_image_bytes: int = 1 << 20) -> ImageStore:
    policy = TransferPolicy(file_roots=(tmp_path,))
    return ImageStore(tmp_path / "cache", Transfers(policy), max_bytes, max_image_bytes)


@trio_test
async def test_second_time_comes_from_the_cache(tmp_path: Path) -> None:
    images, notices = store(tmp_path), list[str]()
    reference = package(tmp_path / "m", wat.TRAP)
    with await images.obtain(reference, ALL, notice=notices.append) as image:
        assert (image.cached, image.format, image.size_bytes) == (False, ImageFormat.WASM_MODULE, len(wat.TRAP))
        assert image.path.read_bytes() == wat.TRAP
    os.unlink(tmp_path / "m")
    with await images.obtain(reference, ALL, notice=notices.append) as image:
        assert image.cached
    assert notices == [CACHE_HIT]


@trio_test
async def test_what_is_not_as_promised_is_not_kept(tmp_path: Path) -> None:
    images = store(tmp_path, max_image_bytes=100)
    reference = package(tmp_path / "m", b"\0asm" + b"x" * 50)
    (tmp_path / "m").write_bytes(b"\0asm" + b"y" * 50)
    with pytest.raises(TransferError, match="hash mismatch"):
        await images.obtain(reference, ALL)
    with pytest.raises(TransferError, match="too large"):
        await images.obtain(package(tmp_path / "big", b"x" * 101), ALL)
    with pytest.raises(TransferError, match="Missing hash"):
        await images.obtain(f"file://{tmp_path}/m", ALL)
    assert list((tmp_path / "cache").iterdir()) == []


@trio_test
async def test_file_packages_stay_below_the_allowed_directories(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    images = ImageStore(tmp_path / "cache", Transfers(TransferPolicy(file_roots=(tmp_path / "open",))), 1 << 20, 1 << 20)
    (tmp_path / "open/link").symlink_to(tmp_path / "m")
    hidden = package(tmp_path / "m", wat.TRAP)
    for reference in (hidden, hidden.replace("/m", "/open/../m"), hidden.replace("/m", "/open/link")):
        with pytest.raises(TransferError, match=r"not below|cannot read"):
            await images.obtain(reference, ALL)


@pytest.mark.parametrize("from_cache", [False, True])
@trio_test
async def test_least_recently_used_goes_but_not_what_is_in_use(tmp_path: Path, from_cache: bool) -> None:
    images = store(tmp_path, max_bytes=250)
    contents = [b"\0asm" + bytes([n]) * 96 for n in range(4)]
    references = [package(tmp_path / str(n), content) for n, content in enumerate(contents)]
    held = await images.obtain(references[0], ALL)
    if from_cache:  # a second user, while the first is still there
        first, held = held, await images.obtain(references[0], ALL)
        assert held.cached
        first.close()
    for n in (1, 2):
        (await images.obtain(references[n], ALL)).close()
        for age, path in enumerate(sorted((tmp_path / "cache").iterdir(), key=os.path.getmtime)):
            os.utime(path, (1000 + age, 1000 + age))
    assert not (await images.obtain(references[3], ALL)).cached
    present = {path.name.rpartition("-")[2] for path in (tmp_path / "cache").iterdir()}
    assert present == {hashlib.sha3_224(contents[n]).hexdigest() for n in (0, 3)}
    assert held.path.exists()
    held.close()


@trio_test
async def test_two_at_once_download_once(tmp_path: Path) -> None:
    web = SlowWeb(wat.TRAP)
    reference = f"hash:sha3:{hashlib.sha3_256(wat.TRAP).hexdigest()}:http://h/x"
    found, notices = list[bool](), list[str]()

    async def obtain() -> None:
        # Two stores over one directory are what two exe-unit processes are.
        images = ImageStore(tmp_path / "cache", Transfers(TransferPolicy(), web=web), 1 << 20, 1 << 20)
        with await images.obtain(reference, ALL, notice=notices.append) as image:
            found.append(image.cached)

    with within(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(obtain)
            nursery.start_soon(obtain)
            await trio.testing.wait_all_tasks_blocked(0.05)
            web.go.set()
    assert web.downloads == 1
    assert len(found) == 2
    assert notices == ["Waiting for the image: another activity is downloading it"]


class ManySources:
    """What each URL does: `slow` sends a byte and no more, `steady` some each moment until `go`, `good` all at once."""

    def __init__(self, content: bytes) -> None:
        self.content, self.go, self.asked = content, trio.Event(), list[str]()
        self.sent = trio.Event()

    async def download(self, url: str, spool: Spool) -> None:
        self.asked.append(url)
        if "good" in url:
            await spool.write(self.content[spool.size :])
            return
        await spool.write(self.content[spool.size : spool.size + 1])
        await spool.flush()
        self.sent.set()
        if "slow" in url:
            await self.go.wait()
        while not self.go.is_set():
            await spool.write(self.content[spool.size : spool.size + 1])
            await spool.flush()
            await trio.sleep(0.02)
        await spool.write(self.content[spool.size :])

    async def upload(self, *args: object) -> None:
        raise AssertionError("nothing is uploaded here")


SHARED = wat.TRAP + b"\0\x02\x01x" * 300  # WebAssembly with sections that nobody reads


def shared_store(tmp_path: Path, web: ManySources) -> ImageStore:
    return ImageStore(tmp_path / "cache", Transfers(TransferPolicy(), web=web), 1 << 20, 1 << 20)


def at(url: str) -> str:
    return f"hash:sha3:{hashlib.sha3_256(SHARED).hexdigest()}:{url}"


@pytest.mark.parametrize("first", ["http://slow/x", "http://steady/x"])
@trio_test
async def test_a_slow_source_blocks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    monkeypatch.setattr("golem.exeunit.transfer.packages.WAIT_S", 0.2)
    web, notices = ManySources(SHARED), list[str]()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shared_store(tmp_path, web).obtain, at(first), ALL)
        await web.sent.wait()
        with within(10):
            image = await shared_store(tmp_path, web).obtain(at("http://good/x"), ALL, notice=notices.append)
            with image:
                assert image.path.read_bytes() == SHARED
                assert not web.go.is_set()
        assert notices[-1] == "The other download is slow: getting the image here, too"
        with within(10):  # and whoever comes now has it at once
            again = await shared_store(tmp_path, web).obtain(at("http://slow/another"), ALL)
            assert again.cached
            again.close()
        web.go.set()  # the first one ends as well, and uses what is there
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"sha3-256-{hashlib.sha3_256(SHARED).hexdigest()}"]


@trio_test
async def test_the_first_right_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("golem.exeunit.transfer.packages.WAIT_S", 0.2)
    web, done = ManySources(SHARED), 0

    async def obtain(url: str) -> None:
        nonlocal done
        with await shared_store(tmp_path, web).obtain(at(url), ALL) as image:
            assert image.path.read_bytes() == SHARED
            done += 1

    class Late(ManySources):
        async def download(self, url: str, spool: Spool) -> None:
            self.asked.append(url)
            await trio.sleep_forever()

    late = Late(SHARED)
    with within(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(obtain, "http://slow/x")
            await web.sent.wait()
            nursery.start_soon(shared_store(tmp_path, late).obtain, at("http://never/x"), ALL)
            while not late.asked:
                await trio.sleep(0.02)
            web.go.set()  # it was slow, and is the first all the same: the one that never ends takes its file
    assert (done, late.asked) == (1, ["http://never/x"])
    assert len(list((tmp_path / "cache").iterdir())) == 1


@trio_test
async def test_the_same_source_is_asked_once_as_long_as_it_sends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("golem.exeunit.transfer.packages.WAIT_S", 1.0)
    monkeypatch.setattr("golem.exeunit.transfer.packages.DOWNLOAD_POLL_S", 0.02)
    web = ManySources(SHARED)
    with within(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(shared_store(tmp_path, web).obtain, at("http://steady/x"), ALL)
            await web.sent.wait()
            for _ in range(3):
                nursery.start_soon(shared_store(tmp_path, web).obtain, at("http://steady/x"), ALL)
            await trio.sleep(2.5)
            assert web.asked == ["http://steady/x"]
            web.go.set()


FULL = """
import hashlib, os, subprocess, sys, trio
sys.path.insert(0, sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", sys.argv[2]], check=True)
from pathlib import Path
from golem.exeunit.transfer import packages as images
from golem.exeunit.runtime import ImageFormat
from golem.exeunit.transfer.spool import TransferError, TransferPolicy
from golem.exeunit.transfer.transfers import Transfers
images.MIN_FREE_BYTES = SPARE = 16 << 20
SIZE, lowest, told, have = 9 << 20, 1 << 60, [], []

class Web:
    async def download(self, url, spool):
        content = int(url[-3:]).to_bytes(2, "big") * (SIZE // 2)
        if sys.argv[3] == "told":
            spool.expect(SIZE)
        while spool.size < SIZE:
            await spool.write(content[spool.size : spool.size + (1 << 20)])
            await trio.sleep(0.001)

async def obtain(number):
    global lowest
    digest = hashlib.sha3_256(number.to_bytes(2, "big") * (SIZE // 2)).hexdigest()
    store = images.ImageStore(Path(sys.argv[2]) / "c", Transfers(TransferPolicy(), web=Web()), 1 << 30, 1 << 30)
    try:
        have.append(await store.obtain(f"hash:sha3:{digest}:http://h/{number:03}", frozenset(ImageFormat)))
    except TransferError as error:
        told.append(str(error))

async def watch():
    global lowest
    while True:
        found = os.statvfs(sys.argv[2])
        lowest = min(lowest, found.f_bavail * found.f_frsize)
        await trio.sleep(0.001)

async def main():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        async with trio.open_nursery() as many:
            for number in range(40):
                if sys.argv[4] == "at once":
                    many.start_soon(obtain, number)
                else:
                    await obtain(number)
                    have[-1].close()
        nursery.cancel_scope.cancel()

trio.run(main)
assert lowest >= SPARE, lowest
assert len(have) + len(told) == 40
assert all("do not fit" in one or "too large" in one for one in told), set(told)
print(len(have))
"""


def on_a_small_disk(tmp_path: Path, length: str, how: str) -> subprocess.CompletedProcess[str]:
    """Run `FULL`: 40 downloads, "at once" or "in turn", of a `length` that is "told" or "unknown"."""
    (tmp_path / "disk").mkdir()
    line = ["unshare", "-m", sys.executable, "-c", FULL, str(Path(__file__).parents[2]), str(tmp_path / "disk"), length, how]
    return subprocess.run(line, capture_output=True, text=True, timeout=patience(30))


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
@pytest.mark.parametrize("length", ["told", "unknown"])
def test_many_downloads_at_once_leave_what_is_to_stay_free(tmp_path: Path, length: str) -> None:
    done = on_a_small_disk(tmp_path, length, "at once")
    assert done.returncode == 0, done.stderr
    if length == "told":
        assert 3 <= int(done.stdout) <= 5, "48 MiB are there to be taken, 9 MiB each"


@trio_test
async def test_wrong_format_names_what_is_taken(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match=r"is GVMI image \(squashfs\); this runtime takes: WebAssembly module"):
        await store(tmp_path).obtain(package(tmp_path / "m", b"hsqs...."), frozenset({ImageFormat.WASM_MODULE}))
    with pytest.raises(TransferError, match="of an unknown format"):
        await store(tmp_path).obtain(package(tmp_path / "m", b"#!/bin/sh"), ALL - {ImageFormat.OTHER})
    with await store(tmp_path).obtain(package(tmp_path / "m", b"#!/bin/sh"), ALL) as image:
        assert image.format is ImageFormat.OTHER


class BrokenWeb:
    """Serves a content and breaks off at a place."""

    def __init__(self, content: bytes, end: int) -> None:
        self.content, self.end, self.starts = content, end, list[int]()

    async def download(self, url: str, spool: Spool) -> None:
        self.starts.append(spool.size)
        await spool.write(self.content[spool.size : self.end])
        if spool.size < len(self.content):
            raise TransferError("the line is cut", passing=True)

    async def upload(self, *args: object) -> None:
        raise AssertionError("nothing is uploaded here")


async def no_sleep(delay_s: float) -> None:
    await trio.lowlevel.checkpoint()


@trio_test
async def test_half_a_download_is_gone_on_with(tmp_path: Path) -> None:
    content = b"\0asm" + bytes(range(256)) * (12 << 10)
    reference = f"hash:sha3:{hashlib.sha3_224(content).hexdigest()}:http://h/x"
    first, second = BrokenWeb(content, 2 << 20), BrokenWeb(content, len(content))
    stores = [
        ImageStore(tmp_path / "c", Transfers(TransferPolicy(), web=web, sleep=no_sleep), 9 << 20, 9 << 20)
        for web in (first, second)
    ]
    with pytest.raises(TransferError, match="the line is cut"):
        await stores[0].obtain(reference, ALL)
    (part,) = (tmp_path / "c").iterdir()
    assert part.suffix == ".part"
    assert part.read_bytes() == content[: 2 << 20]
    with await stores[1].obtain(reference, ALL) as image:
        assert image.path.read_bytes() == content
    assert second.starts == [2 << 20]


@pytest.mark.parametrize("reached", [0, 100])
@trio_test
async def test_a_cancelled_download_keeps_what_it_has(tmp_path: Path, reached: int) -> None:
    content = b"\0asm" + bytes(2 << 20)

    class Web(BrokenWeb):
        async def download(self, url: str, spool: Spool) -> None:
            if reached:
                await spool.write(content[: reached << 10])
                await spool.flush()
            scope.cancel()
            await trio.sleep_forever()

    reference = f"hash:sha3:{hashlib.sha3_224(content).hexdigest()}:http://h/x"
    images = ImageStore(tmp_path / "c", Transfers(TransferPolicy(), web=Web(content, 0)), 9 << 20, 9 << 20)
    with trio.CancelScope() as scope:
        await images.obtain(reference, ALL)
    assert [part.stat().st_size for part in (tmp_path / "c").iterdir()] == ([reached << 10] if reached else [])


def change(path: Path, when: int | None = None) -> None:
    """Damage a file; `when`: its modification time afterwards, as a failing disk would leave it."""
    status = path.stat()
    path.write_bytes(bytes(reversed(path.read_bytes())))
    if when is not None:
        os.utime(path, ns=(status.st_atime_ns, when))


@trio_test
async def test_a_damaged_file_is_found_out_and_fetched_anew(tmp_path: Path) -> None:
    now, notices = [1e9], list[str]()
    images = ImageStore(
        tmp_path / "cache", Transfers(TransferPolicy(file_roots=(tmp_path,))), 1 << 20, 1 << 20, clock=lambda: now[0]
    )
    reference = package(tmp_path / "m", wat.TRAP)

    async def obtain() -> bool:
        with await images.obtain(reference, ALL, notice=notices.append) as image:
            assert image.path.read_bytes() == wat.TRAP
            assert detect_format(image.path) is ImageFormat.WASM_MODULE
            return image.cached

    assert not await obtain()
    (cached,) = (tmp_path / "cache").iterdir()
    change(cached)  # by hand: its time tells
    assert not await obtain()
    assert notices == ["The cached image is damaged: getting it anew"]
    change(cached, cached.stat().st_mtime_ns)  # behind everybody's back
    assert not await obtain()
    cached.write_bytes(wat.TRAP)  # a new time and the right content
    assert await obtain()
    assert await obtain()


@trio_test
async def test_a_checked_file_is_not_hashed_at_every_deploy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, reference = store(tmp_path), package(tmp_path / "m", wat.TRAP)
    (await images.obtain(reference, ALL)).close()
    (cached,) = (tmp_path / "cache").iterdir()
    try:
        os.getxattr(cached, NOTE)
    except OSError:
        pytest.skip("the file system of temporary files has no extended attributes")
    monkeypatch.setattr("golem.exeunit.transfer.packages._hash_some", None)
    assert (await images.obtain(reference, ALL)).cached


def test_no_flipped_bit_of_a_compiled_module_is_run(tmp_path: Path) -> None:
    cache = CompiledCache(tmp_path, "engine-1", 1 << 20)
    code = bytes(range(256)) * 40
    key = cache.key(io.BytesIO(wat.TRAP))

    def keep() -> Path:
        with cache.new_file() as file:
            file.write(code)
            cache.keep(key, file)
        (path,) = tmp_path.glob("*.cwasm")
        return path

    assert cache.open(key) is None
    for bit in (0, 7, 40_961, 8 * len(code) - 1):
        path = keep()
        status = path.stat()
        found = cache.open(key)
        assert found is not None
        assert os.read(found, len(code) + 1) == code, "read from its start"
        os.close(found)
        flipped = bytearray(code)
        flipped[bit // 8] ^= 1 << bit % 8
        path.chmod(0o600)
        path.write_bytes(flipped)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert cache.open(key) is None
        assert not list(tmp_path.glob("*.cwasm"))


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
@pytest.mark.parametrize("length", ["told", "unknown"])
def test_images_that_nobody_uses_make_room_for_any_number_of_others(tmp_path: Path, length: str) -> None:
    done = on_a_small_disk(tmp_path, length, "in turn")
    assert (done.returncode, done.stdout) == (0, "40\n"), done.stderr


@trio_test
async def test_the_disk_is_not_filled(tmp_path: Path) -> None:
    free = [MIN_FREE_BYTES + 60]
    images = ImageStore(
        tmp_path / "cache", Transfers(TransferPolicy(file_roots=(tmp_path,))), 9999, 9999, free_bytes=lambda path: free[0]
    )
    (await images.obtain(package(tmp_path / "a", b"\0asm" + b"a" * 50), ALL)).close()
    free[0] = MIN_FREE_BYTES + 10
    with await images.obtain(package(tmp_path / "b", b"\0asm" + b"b" * 50), ALL):  # what nobody uses makes room for it
        assert len(list((tmp_path / "cache").iterdir())) == 1
        with pytest.raises(TransferError, match=r"too large.*disk space for 10 bytes"):
            await images.obtain(package(tmp_path / "c", b"\0asm" + b"c" * 50), ALL)
        free[0] = MIN_FREE_BYTES - 20
        with pytest.raises(TransferError, match=r"disk space for 0 bytes"):
            await images.obtain(package(tmp_path / "c", b"\0asm" + b"c" * 50), ALL)
        assert len(list((tmp_path / "cache").iterdir())) == 1


def test_compressed_archives_are_told_by_their_first_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("golem.exeunit.transfer.packages.MAX_INFLATED_BYTES", 4096)
    for name, form in (("blobs/sha256/x", ImageFormat.DOCKER_ARCHIVE), ("etc/x", ImageFormat.ROOTFS_ARCHIVE)):
        (tmp_path / "x").write_bytes(tar([name, "y", "manifest.json"], "w:gz", 9000))
        assert detect_format(tmp_path / "x") is form


def tar(names: list[str], mode: str = "w", size: int = 3) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = size
            archive.addfile(member, io.BytesIO(b"x" * size))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "form"),
    [
        (wat.TRAP, ImageFormat.WASM_MODULE),
        (wat.package({"a.wasm": wat.TRAP}), ImageFormat.WASI_PACKAGE),
        (b"hsqs" + b"\0" * 100, ImageFormat.GVMI),
        (tar(["x/layer.tar", "manifest.json"], size=2000), ImageFormat.DOCKER_ARCHIVE),
        (tar(["manifest.json", "index.json"], "w:gz"), ImageFormat.DOCKER_ARCHIVE),
        (tar(["blobs/x", "index.json", "oci-layout"], "w:gz", 3000), ImageFormat.OCI_ARCHIVE),
        (tar(["./etc/passwd", "etc/manifest.json"]), ImageFormat.ROOTFS_ARCHIVE),
        (b"", None),
        (b"\0" * 2000, None),
        (b"\x1f\x8bgarbage", None),
        (b"x" * 5000, None),
    ],
)
def test_formats(tmp_path: Path, content: bytes, form: ImageFormat | None) -> None:
    (tmp_path / "x").write_bytes(content)
    assert detect_format(tmp_path / "x") is form
