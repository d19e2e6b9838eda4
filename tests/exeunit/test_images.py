"""The package cache: hits, locks, eviction, formats."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest
import trio
import wat_modules as wat
from support import trio_test

from golem.exeunit.images import CACHE_HIT, ImageStore, detect_format
from golem.exeunit.runtimes.base import ImageFormat
from golem.exeunit.spool import Spool
from golem.exeunit.transfer import TransferError, TransferPolicy, Transfers

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
    images = ImageStore(
        tmp_path / "cache", Transfers(TransferPolicy(file_roots=(tmp_path / "open",))), 1 << 20, 1 << 20
    )
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
    found: list[bool] = []

    async def obtain() -> None:
        # Two stores over one directory are what two exe-unit processes are.
        images = ImageStore(tmp_path / "cache", Transfers(TransferPolicy(), web=web), 1 << 20, 1 << 20)
        with await images.obtain(reference, ALL) as image:
            found.append(image.cached)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(obtain)
            nursery.start_soon(obtain)
            await trio.testing.wait_all_tasks_blocked(0.05)
            web.go.set()
    assert web.downloads == 1
    assert len(found) == 2


@trio_test
async def test_wrong_format_names_what_is_taken(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match=r"is GVMI image \(squashfs\); this runtime takes: WebAssembly module"):
        await store(tmp_path).obtain(package(tmp_path / "m", b"hsqs...."), frozenset({ImageFormat.WASM_MODULE}))
    with pytest.raises(TransferError, match="of an unknown format"):
        await store(tmp_path).obtain(package(tmp_path / "m", b"#!/bin/sh"), ALL - {ImageFormat.OTHER})
    with await store(tmp_path).obtain(package(tmp_path / "m", b"#!/bin/sh"), ALL) as image:
        assert image.format is ImageFormat.OTHER


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
