"""The registry: what scripts are answered, the images over HTTP and gftp, and a store that survives whatever happens."""

from __future__ import annotations

import hashlib
import json
import os
import random
import secrets
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from worlds.node_in_test import node_in_test
from worlds.patience import patience, within
from worlds.support import trio_test

from golem.daemon import serve_rest
from golem.files.client import GftpPeer
from golem.files.outgoing import identity_of
from golem.images.store import PushOrder, Registry, RegistryError, StoredImage, normal_hash, normal_tag
from golem.node.listen import bind_api
from golem.node.node import Node
from golem.rest import registry as rest_registry
from golem.rest.registry import reader_of

YAPAPI_PYTHON = Path(__file__).resolve().parents[2] / ".venv-yapapi" / "bin" / "python"
ALIAS = "9a3b5d67b0b27746283cb5f287c13eab1beaa12d92a9f536b747c7ae"
CONTENT = random.Random(7).randbytes(300_000)
SHA3 = hashlib.sha3_224(CONTENT).hexdigest()


@asynccontextmanager
async def serving(folder: Path, **flags: Any) -> AsyncIterator[tuple[Node, httpx.AsyncClient]]:
    """A node that serves REST on a real socket, and a client without a key."""
    async with node_in_test(folder, api_url="http://127.0.0.1:0", **flags) as node, trio.open_nursery() as nursery:
        await nursery.start(serve_rest, node, bind_api(node.config))
        async with httpx.AsyncClient(base_url=node.api_url, timeout=patience(20)) as client:
            yield node, client
        nursery.cancel_scope.cancel()


async def pushed(node: Node, content: bytes = CONTENT, *tags: str, aliases: tuple[str, ...] = ()) -> StoredImage:
    path = trio.Path(node.config.data_dir.parent / "image.tar")
    await path.write_bytes(content)
    node.registry.begin(PushOrder(Path(path), tags, aliases, "some format", "image.tar"), number := secrets.token_hex(8))
    push = node.registry.push(number)
    with within(20):
        await push.ended.wait()
    assert push.image is not None, push.failure
    return push.image


# -- what scripts are told
@trio_test
async def test_a_tag_a_hash_and_an_alias_lead_to_the_image(tmp_path: Path) -> None:
    async with serving(tmp_path) as (node, client):
        await pushed(node, CONTENT, "team/render:2", "alpine", aliases=(ALIAS.upper(),))
        url = f"gftp://{node.node_id}/image-{SHA3}"
        for asked in ("tag=team/render:2", "tag=alpine", "tag=alpine:latest", f"hash={SHA3}", f"hash={SHA3.upper()}",
                      f"hash={ALIAS}"):  # fmt: skip
            for statistics in ("&count=true", "&dev=true", ""):
                answer = await client.get(f"/v1/image/info?{asked}{statistics}")
                assert answer.status_code == 200, answer.text
                assert answer.headers["Content-Type"] == "application/json"
                found = answer.json()
                assert (found["sha3"], found["size"], found["http"], found["https"]) == (SHA3, len(CONTENT), url, url)
        link = await client.get(f"/image.{SHA3}.link")
        assert (link.status_code, link.text) == (200, url)
        assert (await client.get(found["link"])).content == CONTENT


@trio_test
async def test_no_answer_says_why(tmp_path: Path) -> None:
    async with serving(tmp_path) as (node, client):
        await pushed(node, CONTENT, "here", aliases=(ALIAS,))
        for asked, status, words in (
            ("/v1/image/info?tag=gone:1", 404, "no image tagged gone:1; push one with: golem image push gone:1"),
            (f"/v1/image/info?hash={'ab' * 28}", 404, "golem image push IMAGE"),
            ("/v1/image/info", 400, "one of the query parameters tag and hash"),
            ("/v1/image/info?tag=", 400, "one of the query parameters"),
            (f"/v1/image/info?tag=here&hash={SHA3}", 400, "one of the query parameters"),
            ("/v1/image/info?tag=../../etc/passwd", 400, "not an image tag"),
            ("/v1/image/info?tag=%00", 400, "not an image tag"),
            (f"/v1/image/info?tag={'x' * 300}", 400, "not an image tag"),
            (f"/v1/image/info?tag={'x' * 3000}", 400, "longer than"),
            ("/v1/image/info?hash=xyz", 400, "not a hash"),
            ("/v1/image/index.json", 404, "no image with SHA3-224"),
            ("/v1/image/..%2Fidentity.key", 404, ""),
            (f"/v1/image/{ALIAS}", 404, "no image with SHA3-224"),  # would not pass the provider's check
            (f"/image.{ALIAS}.link", 404, "no image with SHA3-224"),
        ):
            answer = await client.get(asked)
            assert answer.status_code == status, (asked, answer.text)
            assert words in answer.json()["message"]
        assert (await client.get("/me")).status_code == 401, "nothing else is open"
        assert (await client.post("/v1/image/info?tag=here")).status_code == 405


# -- the image over HTTP
@trio_test
async def test_the_image_in_parts(tmp_path: Path) -> None:
    async with serving(tmp_path) as (node, client):
        url = f"/v1/image/{(await pushed(node)).sha3}"
        size = len(CONTENT)
        head = await client.head(url)
        assert (head.status_code, head.headers["Content-Length"], head.content) == (200, str(size), b"")
        assert (head.headers["Accept-Ranges"], head.headers["ETag"]) == ("bytes", f'"{SHA3}"')
        for wanted, first, last in (("0-0", 0, 0), ("5-", 5, size - 1), ("-7", size - 7, size - 1), ("10-9999999", 10, size - 1),
                                    ("-9999999", 0, size - 1), (f"{size - 1}-", size - 1, size - 1)):  # fmt: skip
            for condition in ({}, {"If-Range": f'"{SHA3}"'}, {"If-Range": head.headers["Last-Modified"]}):
                part = await client.get(url, headers={"Range": f"bytes={wanted}", **condition})
                assert part.status_code == 206
                assert part.headers["Content-Range"] == f"bytes {first}-{last}/{size}"
                assert part.content == CONTENT[first : last + 1]
        headers = {"Range": "bytes=2-5"}
        assert (await client.head(url, headers=headers)).headers["Content-Length"] == "4"
        for ignored in ({"Range": "bytes=5-", "If-Range": '"another"'}, {"Range": "bytes=9-3"}, {"Range": "bytes=-"},
                        {"Range": "bytes=0-1,4-5"}, {"Range": "lines=1-2"}, {"Range": f"bytes={'9' * 40}-"}):  # fmt: skip
            whole = await client.get(url, headers=ignored)
            assert (whole.status_code, whole.content) == (200, CONTENT), ignored
        for beyond in (f"bytes={size}-", "bytes=-0", f"bytes={'9' * 18}-"):
            refused = await client.get(url, headers={"Range": beyond})
            assert (refused.status_code, refused.headers["Content-Range"]) == (416, f"bytes */{size}")
            assert str(size) in refused.json()["message"]
        known = await client.get(url, headers={"If-None-Match": f'"{SHA3}"'})
        assert (known.status_code, known.content) == (304, b"")


@trio_test
async def test_a_reader_that_leaves_gives_its_place_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest_registry, "MAX_DOWNLOADS", 1)
    async with serving(tmp_path) as (node, client):
        large = await pushed(node, bytes(40 << 20))  # more than sockets hold
        url = f"/v1/image/{large.sha3}"
        async with client.stream("GET", url) as answer:
            assert answer.status_code == 200
            chunks = answer.aiter_raw(1 << 16)  # who lets go of it closes the connection
            await anext(chunks)
            second = await client.get(url)
            assert (second.status_code, "already" in second.text) == (503, True)
        with within(20):
            while (await client.get(url, headers={"Range": "bytes=0-0"})).status_code != 206:
                await trio.sleep(0.02)


@trio_test
async def test_slow_readers_of_one_address_leave_room_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest_registry, "DOWNLOADS_OF_ONE", 2)
    async with serving(tmp_path) as (node, client), AsyncExitStack() as stack:
        large = await pushed(node, bytes(40 << 20))  # more than sockets hold
        url = f"/v1/image/{large.sha3}"
        for _ in range(2):
            answer = await stack.enter_async_context(client.stream("GET", url))
            assert answer.status_code == 200
        second = await client.get(url)
        assert (second.status_code, "from 127.0.0.1 already" in second.text) == (503, True)
        other = httpx.AsyncHTTPTransport(local_address="127.0.0.2")
        async with httpx.AsyncClient(base_url=node.api_url, timeout=patience(20), transport=other) as neighbour:
            assert (await neighbour.get(url, headers={"Range": "bytes=0-0"})).status_code == 206


@trio_test
async def test_readers_who_come_at_once_are_counted_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest_registry, "DOWNLOADS_OF_ONE", 2)
    async with serving(tmp_path) as (node, client), trio.open_nursery() as nursery:
        large = await pushed(node, bytes(40 << 20))
        seen: list[int] = []
        all_here = trio.Event()

        async def read() -> None:
            async with client.stream("GET", f"/v1/image/{large.sha3}") as answer:
                seen.append(answer.status_code)
                if len(seen) == 12:
                    all_here.set()
                await trio.sleep_forever()

        for _ in range(12):
            nursery.start_soon(read)
        with within(20):
            await all_here.wait()
        nursery.cancel_scope.cancel()
    assert sorted(seen) == [200] * 2 + [503] * 10


def test_who_counts_as_one_reader() -> None:
    assert reader_of("10.0.0.1") == "10.0.0.1"
    assert reader_of("::ffff:10.0.0.1") == "10.0.0.1"
    assert reader_of("2001:db8:1:2::5") == reader_of("2001:db8:1:2:ffff::6") == "2001:db8:1:2::/64"
    assert reader_of("fe80::1%eth0") == "fe80::/64"
    assert reader_of("<local>") == "<local>"


@trio_test
async def test_a_file_that_is_cut_short_ends_its_download(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path) as (node, client):
        image = await pushed(node, bytes(40 << 20))  # more than sockets hold
        url, got = f"/v1/image/{image.sha3}", 0

        async def download() -> None:
            nonlocal got
            async with client.stream("GET", url) as answer:
                async for part in answer.aiter_raw(1 << 16):
                    if not got:
                        os.truncate(node.registry.path(image), 1 << 20)
                    got += len(part)

        with within(20), pytest.raises(httpx.RemoteProtocolError):
            await download()
        assert 1 << 20 <= got < 40 << 20
        assert "was cut short while it was sent" in caplog.text
        assert (await client.get("/v1/image/info", params={"hash": image.sha3})).status_code == 200, "the node serves on"


# -- providers
async def read_by_gftp(node: Node, url: str) -> bytes:
    parts: list[bytes] = []

    async def keep(data: bytes) -> None:
        parts.append(bytes(data))

    await GftpPeer(node.config.bus_path).download(url, 0, keep)
    return b"".join(parts)


@trio_test
async def test_providers_fetch_it_by_gftp_also_after_a_restart(tmp_path: Path) -> None:
    async with serving(tmp_path) as (node, client):
        await pushed(node, CONTENT, "kept")
        url = (await client.get("/v1/image/info?tag=kept")).json()["http"]
        assert await read_by_gftp(node, url) == CONTENT
    async with serving(tmp_path) as (node, client):
        found = (await client.get("/v1/image/info?tag=kept")).json()
        assert found["http"] == url
        assert await read_by_gftp(node, url) == CONTENT
        await node.registry.remove("kept")
        assert (await client.get("/v1/image/info?tag=kept")).status_code == 404
        assert node.files.published() == []


@pytest.mark.integration
@trio_test
async def test_the_resolver_of_yapapi(tmp_path: Path) -> None:
    if not YAPAPI_PYTHON.exists():
        pytest.skip("yapapi's environment is not there (.ci/setup yapapi)")
    script = """
import asyncio, json, sys
from yapapi.payload import vm
async def main():
    for arguments in json.loads(sys.argv[1]):
        try:
            print(json.dumps(await (await vm.repo(**arguments)).resolve_url()))
        except Exception as error:
            print(json.dumps("failed: " + str(error)))
asyncio.run(main())
"""
    async with serving(tmp_path) as (node, _):
        await pushed(node, CONTENT, "render:1", aliases=(ALIAS,))
        base = {"repository_url": node.api_url}
        asked = [
            {"image_tag": "render:1"}, {"image_hash": SHA3}, {"image_hash": ALIAS},
            {"image_tag": "render:1", "image_use_https": True},
            {"image_tag": "render:1", "dev_mode": True}, {"image_hash": SHA3, "image_url": f"{node.api_url}/v1/image/{SHA3}"},
            {"image_tag": "nope"},
        ]  # fmt: skip
        line = [str(YAPAPI_PYTHON), "-c", script, json.dumps([base | one for one in asked])]
        result = await trio.run_process(line, capture_stdout=True, capture_stderr=True, check=False)
        said = [json.loads(line) for line in result.stdout.splitlines()]
        package = f"hash:sha3:{SHA3}:gftp://{node.node_id}/image-{SHA3}"
        assert said[:5] == [package] * 5, result.stderr.decode()
        assert said[5] == f"hash:sha3:{SHA3}:{node.api_url}/v1/image/{SHA3}"
        assert said[6].startswith("failed: Failed to resolve image URL: 404")
        assert "golem image push nope" in said[6]


# -- the store
class Shelf:
    """Remembers what is published."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def offer(self, name: str, what: object, owner: object) -> None:
        self.names.add(name)

    def withdraw(self, name: str, owner: object) -> bool:
        self.names.discard(name)
        return True


def opened(folder: Path, max_bytes: int = 1 << 30) -> Registry:
    return Registry(folder / "images", Shelf(), lambda: 1.0, max_bytes)


def file(folder: Path, content: bytes) -> Path:
    path = folder / hashlib.sha3_224(content).hexdigest()[:8]
    path.write_bytes(content)
    return path


def names(store: Registry) -> dict[str, tuple[str, ...]]:
    return {image.sha3: image.tags for image in store.images()}


@trio_test
async def test_tags_move_and_images_go_with_their_last_tag(tmp_path: Path) -> None:
    store = opened(tmp_path)
    first = await store.add(PushOrder(file(tmp_path, b"one"), ("a", "b")))
    second = await store.add(PushOrder(file(tmp_path, b"two"), ("b", "c"), (ALIAS,)))
    assert names(store) == {first.sha3: ("a:latest",), second.sha3: ("b:latest", "c:latest")}
    assert await store.add(PushOrder(file(tmp_path, b"two"), ("d",))) == store.by_tag("d")
    assert names(store)[second.sha3] == ("b:latest", "c:latest", "d:latest")
    assert store.named(second.sha3[:8]) == store.named(ALIAS) == store.by_tag("b")
    for name in ("b", "c:latest"):
        await store.remove(name)
    assert names(store)[second.sha3] == ("d:latest",)
    await store.remove("d")
    await store.remove(first.sha3[:12])
    assert store.images() == []
    assert sorted(os.listdir(store.folder)) == ["index.json"]
    with pytest.raises(RegistryError, match="no image 'a'"):
        await store.remove("a")


@trio_test
async def test_what_is_pushed_is_a_copy(tmp_path: Path) -> None:
    store = opened(tmp_path)
    path = file(tmp_path, b"first words")
    image = await store.add(PushOrder(path))
    path.write_bytes(b"other words")
    assert store.path(image).read_bytes() == b"first words"
    own = store.folder / ".abc.part"
    own.write_bytes(b"brought here")
    moved = await store.add(PushOrder(own))
    assert store.path(moved).read_bytes() == b"brought here"
    assert not own.exists()


@trio_test
async def test_the_store_after_a_crash(tmp_path: Path) -> None:
    store = opened(tmp_path)
    kept = await store.add(PushOrder(file(tmp_path, b"kept"), ("kept",)))
    lost = await store.add(PushOrder(file(tmp_path, b"lost"), ("lost",)))
    cut = await store.add(PushOrder(file(tmp_path, b"cut short"), ("cut",)))
    store.path(lost).unlink()
    store.path(cut).write_bytes(b"cut")
    (store.folder / ".0123.part").write_bytes(b"half of an image")
    (store.folder / ".0456.part").mkdir()
    orphan = hashlib.sha3_224(b"orphan").hexdigest()
    (store.folder / orphan).write_bytes(b"orphan")
    again = opened(tmp_path)
    assert names(again) == {kept.sha3: ("kept:latest",), orphan: ()}
    assert sorted(os.listdir(store.folder)) == sorted([kept.sha3, orphan, "index.json"])
    assert again._publisher.names == {f"image-{kept.sha3}", f"image-{orphan}"}  # type: ignore[attr-defined]
    for broken in (b"", b"{", b'{"version":1,"images":[{"sha3":"../../x","size":1,"created":1}]}', b"\xff\xfe"):
        (store.folder / "index.json").write_bytes(broken)
        assert names(opened(tmp_path)) == {kept.sha3: (), orphan: ()}, broken
        assert (store.folder / "index.json.broken").read_bytes() == broken


@trio_test
async def test_what_the_store_does_not_take(tmp_path: Path) -> None:
    store = opened(tmp_path, max_bytes=100)
    await store.add(PushOrder(file(tmp_path, b"x" * 60)))
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((file(tmp_path, b""), "empty"), (file(tmp_path, b"y" * 41), "no room"), (tmp_path, "not a regular file"),
                        (tmp_path / "pipe", "not a regular file"), (tmp_path / "gone", "No such file")):  # fmt: skip
        with pytest.raises(RegistryError, match=words):
            await store.add(PushOrder(path))
    fits = file(tmp_path, b"z")
    for order in (PushOrder(fits, ("no spaces",)), PushOrder(fits, ("",)), PushOrder(fits, (), ("12",)),
                  PushOrder(fits, tuple(map("t{}".format, range(40))))):  # fmt: skip
        with pytest.raises(RegistryError):
            await store.add(order)
    assert len(os.listdir(store.folder)) == 2, "nothing stays of what was refused"


@trio_test
async def test_pushes_are_bounded_and_can_be_given_up(tmp_path: Path) -> None:
    store = opened(tmp_path)
    slow = file(tmp_path, bytes(64 << 20))
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        numbers = [f"number-{number}" for number in range(4)]
        for number in numbers:
            store.begin(PushOrder(slow, (number,)), number)
        with pytest.raises(RegistryError, match="already"):
            store.begin(PushOrder(slow), "number-4")
        with pytest.raises(RegistryError, match="not a new push"):
            store.begin(PushOrder(slow), "number-3")
        assert all(store.cancel(number) for number in (*numbers, "unknown"))
        with within(20):
            for number in numbers:
                await store.push(number).ended.wait()
        assert {store.push(number).failure for number in numbers} == {"given up"}
        assert os.listdir(store.folder) == []
        store.begin(PushOrder(tmp_path / "gone"), "number-5")
        failing = store.push("number-5")
        await failing.ended.wait()
        assert "No such file" in failing.failure
        with pytest.raises(RegistryError, match="no such push"):
            store.push("nope")
        nursery.cancel_scope.cancel()


@pytest.mark.root
def test_a_full_disk_leaves_the_store_whole(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root (mounts a small disk)")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr.strip()}")
    try:
        trio.run(_fill, tmp_path, folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def _fill(tmp_path: Path, folder: Path) -> None:
    import golem.images.store as module

    store = opened(folder)
    with pytest.raises(RegistryError, match="the disk is full"):
        await store.add(PushOrder(file(tmp_path, bytes(100))))  # the spare room is not there
    spare, module.SPARE_BYTES = module.SPARE_BYTES, -(1 << 40)
    try:
        held = await store.add(PushOrder(file(tmp_path, b"held"), ("held",)))
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            store.begin(PushOrder(file(tmp_path, random.Random(1).randbytes(2 << 20))), "too large")
            push = store.push("too large")
            await push.ended.wait()
            assert push.failure == "the disk is full"
            nursery.cancel_scope.cancel()
        assert sorted(os.listdir(store.folder)) == sorted([held.sha3, "index.json"])
        assert names(opened(folder)) == {held.sha3: ("held:latest",)}
    finally:
        module.SPARE_BYTES = spare


def test_names() -> None:
    assert normal_tag("localhost:5000/team/render") == "localhost:5000/team/render:latest"
    assert normal_tag("golem/alpine:3.20") == "golem/alpine:3.20"
    for bad in ("", ":", "a:", "a b", "/a", "a//b", "a/", "a:b:c", "a@sha256:00", "-a", "x" * 256, "ä", "a\n"):
        with pytest.raises(RegistryError):
            normal_tag(bad)
    assert normal_hash(f"0x{SHA3.upper()}") == normal_hash(f"sha3:{SHA3}") == SHA3
    for bad in ("", "12", "g" * 56, "a" * 129):
        with pytest.raises(RegistryError):
            normal_hash(bad)


@trio_test
async def test_a_file_that_others_replaced_is_not_taken_in(tmp_path: Path) -> None:
    """In a folder that others write, what was looked at is stored, or nothing."""
    file, secret = tmp_path / "shared", tmp_path / "secret"
    file.write_bytes(b"image"), secret.write_bytes(b"what is ours")
    identity = identity_of(file.stat())
    async with serving(tmp_path / "node") as (node, _):
        for swap in (lambda: file.symlink_to(secret), lambda: os.link(secret, file), lambda: file.write_bytes(b"other")):
            file.unlink()
            swap()
            number = secrets.token_hex(8)
            node.registry.begin(PushOrder(file, identity=identity), number)
            push = node.registry.push(number)
            with within(20):
                await push.ended.wait()
            assert push.image is None
            assert "replaced or changed" in push.failure
