"""`golem image` against a real node and a real Docker Engine; and archives that have one hash an image."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import json
import os
import signal
import socketserver
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from click.testing import CliRunner
from worlds.engine import admin, busybox_tar, import_image
from worlds.patience import patience

from golem.cli import main
from golem.images.docker_archive import ArchiveError, image_config, layer_tar, normalise, write_archive
from golem.lab.engine import LocalEngine
from golem.lab.localnet import LocalNet, LocalNode

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOWHERE = "unix:///nowhere/docker.sock"
integration = pytest.mark.integration


@pytest.fixture(scope="module")
def node_of_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalNode]:
    net = LocalNet(tmp_path_factory.mktemp("images"))
    try:
        yield trio.run(net.start_node, "alice")
    finally:
        trio.run(net.stop)


@pytest.fixture
def node(node_of_all: LocalNode) -> Iterator[LocalNode]:
    """The node of this file; however a test ends, the next one finds no image there."""
    try:
        yield node_of_all
    finally:
        for tag in {row["tag"] for row in answer(node_of_all, "list")} - {""}:
            answer(node_of_all, "remove", tag)
        answer(node_of_all, "remove", "--untagged")
        assert answer(node_of_all, "list") == []


def golem(node: LocalNode, *arguments: str, host: str = NOWHERE) -> Any:
    """Run a command in this process, as the script `golem` does, and return click's result."""
    return CliRunner().invoke(main, ["--data-dir", str(node.data_dir), *arguments], env={"DOCKER_HOST": host})


def answer(node: LocalNode, *arguments: str, host: str = NOWHERE) -> Any:
    result = golem(node, "--json", "image", *arguments, host=host)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(node: LocalNode, *arguments: str, host: str = NOWHERE) -> str:
    result = golem(node, "image", *arguments, host=host)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr
    return result.stderr


def parts(folder: Path) -> list[str]:
    """Return what is on its way into a node's store, or was left on it."""
    return [name for name in os.listdir(folder) if name.endswith(".part")]


def until(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + patience(60)
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def archive_of(*layers: bytes) -> bytes:
    digests = [hashlib.sha256(layer).hexdigest() for layer in layers]
    out = io.BytesIO()
    config = image_config(["/bin/sh"], digests, "amd64")
    write_archive(out, config, [(digest, io.BytesIO(layer), len(layer)) for digest, layer in zip(digests, layers, strict=True)])
    return out.getvalue()


LAYER = layer_tar([("bin/hello", b"hello", 0o755)], [("bin", 0o755)])


# -- files
@integration
def test_a_file_is_pushed_listed_shown_and_removed(node: LocalNode, tmp_path: Path) -> None:
    archive = tmp_path / "image.tar"
    archive.write_bytes(archive_of(LAYER))
    sha3 = hashlib.sha3_224(archive.read_bytes()).hexdigest()
    found = answer(node, "push", str(archive), "--tag", "hello:1", "--tag", "hello", "--alias", "AB" * 28)
    assert (found["sha3"], found["size"], found["tags"]) == (sha3, archive.stat().st_size, ["hello:1", "hello:latest"])
    assert found["task_package"] == f"hash:sha3:{sha3}:gftp://{node.node_id}/image-{sha3}"
    assert found["yapapi"] == f'vm.repo(image_tag="hello:1", repository_url="{node.api_url}")'
    assert found["golem-js"] == f'GOLEM_REGISTRY_URL={node.api_url}  imageTag: "hello:1"'
    assert (found["format"], found["source"]) == ("Docker archive (tar with manifest.json)", "image.tar")
    assert httpx.get(found["link"]).content == archive.read_bytes()
    rows = answer(node, "list")
    assert [list(row) for row in rows] == [["tag", "sha3", "size [MiB]", "format", "created"]] * 2
    assert {(row["tag"], row["sha3"]) for row in rows} == {("hello:1", sha3), ("hello:latest", sha3)}
    for name in ("hello:1", "hello", sha3, sha3[:10], "ab" * 28):
        assert answer(node, "show", name)["sha3"] == sha3
    text = golem(node, "image", "show", "hello").stdout
    assert f"sha3: {sha3}" in text
    assert "vm.repo(image_tag=" in text
    assert answer(node, "remove", "hello:1", "hello") == [sha3, sha3]
    assert answer(node, "list") == []
    assert "No images" in golem(node, "image", "list").stdout
    assert httpx.get(found["link"]).status_code == 404


@integration
def test_other_formats_and_untagged_images(node: LocalNode, tmp_path: Path) -> None:
    module = answer(node, "push", str(EXAMPLES / "hello" / "hello.wasm"))
    assert (module["format"], module["tags"], "yapapi" in module) == ("WebAssembly module", [], False)
    rootfs = tmp_path / "rootfs.tar"
    rootfs.write_bytes(busybox_tar())
    found = answer(node, "push", str(rootfs))
    assert found["format"] == "root file system (tar)"
    assert found["yapapi"] == f'vm.repo(image_hash="{found["sha3"]}", repository_url="{node.api_url}")'
    (tmp_path / "strange").write_bytes(b"what is this")
    strange = answer(node, "push", str(tmp_path / "strange"), "--any-format", "--tag", "strange")
    assert strange["format"] == "a file of another format"
    assert sorted(answer(node, "remove", "--untagged")) == sorted([module["sha3"], found["sha3"]])
    assert [row["tag"] for row in answer(node, "list")] == ["strange:latest"]
    assert "strange removed" in golem(node, "image", "remove", "strange").stdout.replace(f"({strange['sha3'][:12]}…) ", "")


@integration
def test_pushes_that_cannot_be_say_why(node: LocalNode, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no image")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    good = tmp_path / "good.tar"
    good.write_bytes(archive_of(LAYER))
    assert "unknown format; known: " in refused(node, "push", str(tmp_path / "text"))
    assert "unknown format" in refused(node, "push", str(tmp_path / "empty"))
    assert "is empty" in refused(node, "push", str(tmp_path / "empty"), "--any-format")
    assert "not a regular file" in refused(node, "push", str(tmp_path / "pipe"))
    assert "is a directory; pack it: tar -C" in refused(node, "push", str(tmp_path))
    assert "No such file" in refused(node, "push", "./gone.tar")
    assert "not an image tag: 'a b'" in refused(node, "push", str(good), "--tag", "a b")
    assert "not a hash" in refused(node, "push", str(good), "--alias", "xyz")
    assert f"no Docker Engine answers at {NOWHERE}" in refused(node, "push", "alpine:3.20")
    assert "expected the socket of an Engine on this machine" in refused(node, "push", "alpine", host="tcp://127.0.0.1:1")
    assert "no image 'gone'" in refused(node, "show", "gone")
    assert "no image 'gone'" in refused(node, "remove", "gone")
    assert golem(node, "image", "remove").exit_code == 2
    assert os.listdir(node.data_dir / "images") in ([], ["index.json"])


@integration
def test_an_interrupted_push_leaves_nothing(node: LocalNode, tmp_path: Path) -> None:
    large = tmp_path / "large.tar"
    with large.open("wb") as file:
        file.write(archive_of(LAYER))
        file.truncate(2 << 30)  # zeros behind the end of the archive
    line = [sys.executable, "-m", "golem.cli", "--data-dir", str(node.data_dir), "image", "push", str(large)]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    folder = node.data_dir / "images"
    until(lambda: parts(folder) or process.poll() is not None)
    process.send_signal(signal.SIGINT)  # one is enough, wherever it comes
    text = process.communicate(timeout=patience(20))[1]
    assert "called off" in text, process.returncode
    assert process.returncode != 0
    until(lambda: not parts(folder))
    assert answer(node, "list") == []


def test_without_a_node(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "golem.cli", "--data-dir", str(tmp_path), "image", "push", "alpine"]
    result = subprocess.run(line, capture_output=True, text=True, timeout=patience(30))
    assert result.returncode == 1
    assert result.stderr.startswith(f"Error: no node is running on {tmp_path}")


# -- tags of an Engine
@integration
@pytest.mark.root
def test_a_docker_tag_has_one_hash(node: LocalNode, engine: LocalEngine, tmp_path: Path) -> None:
    tag = "team/busybox-to-push:1"
    image_id = import_image(engine, busybox_tar({"data": b"here"}), tag)
    client = admin(engine)
    try:
        client.tag(tag, "another-name-of-it", "2")
        found = answer(node, "push", tag, host=engine.host)
        assert found["tags"] == [tag]
        assert found["aliases"] == [image_id.removeprefix("sha256:")]
        second = answer(node, "push", "another-name-of-it:2", host=engine.host)
        assert (second["sha3"], second["tags"]) == (found["sha3"], [tag, "another-name-of-it:2"])
        by_id = answer(node, "push", image_id, host=engine.host)
        assert (by_id["sha3"], by_id["tags"]) == (found["sha3"], second["tags"])
        archive = httpx.get(found["link"]).content
        assert hashlib.sha3_224(archive).hexdigest() == found["sha3"]
        client.remove_image(image_id, force=True)
        client.load_image(archive)
        assert client.inspect_image(image_id)["Config"]["Env"] == ["PATH=/bin"]
        assert "docker pull team/gone?" in refused(node, "push", "team/gone", host=engine.host)
        assert parts(node.data_dir / "images") == []
    finally:
        client.remove_image(image_id, force=True)
        client.close()
    answer(node, "remove", tag, "another-name-of-it:2")


class BrokenEngine(http.server.BaseHTTPRequestHandler):
    """Answers like an Engine until the image is to come: then with half of one, or with an error."""

    protocol_version = "HTTP/1.1"
    refuses = False

    def do_GET(self) -> None:
        if self.path.endswith("/version"):
            self._answer(200, {"ApiVersion": "1.41", "Version": "20.10.24"})
        elif self.path.endswith("/json"):
            self._answer(200, {"Id": "sha256:" + "ab" * 32, "Size": 5000, "RepoTags": ["broken:1"]})
        elif self.refuses:
            self._answer(500, {"message": "layer does not exist"})
        else:
            self.send_response(200)
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(b"x" * 100)
            self.close_connection = True

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:
        pass


@integration
@pytest.mark.parametrize(("refuses", "words"), [(True, "refused: layer does not exist"), (False, "broke off while it gave")])
def test_an_engine_that_breaks_off(node: LocalNode, tmp_path: Path, refuses: bool, words: str) -> None:
    handler = type("Handler", (BrokenEngine,), {"refuses": refuses})
    with socketserver.ThreadingUnixStreamServer(str(tmp_path / "s"), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            assert words in refused(node, "push", "broken:1", host=f"unix://{tmp_path / 's'}")
        finally:
            server.shutdown()
    assert parts(node.data_dir / "images") == []


# -- archives
def saved(folder: Path, members: dict[str, bytes | str], mtime: int = 0) -> Path:
    """A tar with files; a text is a link's target."""
    path = folder / "saved.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.mtime = mtime
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def normalised(path: Path) -> bytes:
    out = io.BytesIO()
    normalise(path, out)
    return out.getvalue()


def test_every_way_of_saving_gives_one_archive(tmp_path: Path) -> None:
    other = layer_tar([("etc/x", b"x", 0o644)])
    layers = [LAYER, other, LAYER]
    config = image_config(["/bin/sh"], [hashlib.sha256(layer).hexdigest() for layer in layers], "amd64")
    name = hashlib.sha256(config).hexdigest()

    def manifest(config_name: str, *names: str) -> bytes:
        return json.dumps([{"Config": config_name, "RepoTags": ["a:b"], "Layers": names}]).encode()

    old = saved(tmp_path, {
        "1/VERSION": b"1.0", "1/layer.tar": LAYER, "2/layer.tar": other, "3/layer.tar": "../1/layer.tar", f"{name}.json": config,
        "manifest.json": manifest(f"{name}.json", "1/layer.tar", "2/layer.tar", "3/layer.tar"), "repositories": b"{}",
    }, mtime=12345)  # fmt: skip
    from_old = normalised(old)
    new = saved(tmp_path, {
        "manifest.json": manifest(f"blobs/sha256/{name}", "blobs/sha256/l1", "blobs/sha256/l2", "blobs/sha256/l1"),
        f"blobs/sha256/{name}": config, "blobs/sha256/l1": gzip.compress(LAYER), "blobs/sha256/l2": gzip.compress(other, 1),
    })  # fmt: skip
    assert normalised(new) == from_old
    again = tmp_path / "again.tar"
    again.write_bytes(from_old)
    assert normalised(again) == from_old
    assert sorted(os.listdir(tmp_path)) == ["again.tar", "saved.tar"], "unpacked layers do not stay"


def test_archives_that_are_none(tmp_path: Path) -> None:
    digest = hashlib.sha256(LAYER).hexdigest()
    config = image_config([], [digest], "amd64")

    def entry(**changes: Any) -> bytes:
        return json.dumps([{"Config": "c", "Layers": ["l"], **changes}]).encode()

    for members, words in (
        ({"x": b""}, "no file 'manifest.json'"),
        ({"manifest.json": b"{"}, "not JSON"),
        ({"manifest.json": b"{}"}, "not a list"),
        ({"manifest.json": b"[{},{}]"}, "2 images"),
        ({"manifest.json": b"[{}]"}, "no file 'None'"),
        ({"manifest.json": entry(), "c": b"{}"}, "names no layers"),
        ({"manifest.json": entry(), "c": b'{"rootfs":{"diff_ids":["x"]}}'}, "not SHA-256"),
        ({"manifest.json": entry(Layers=[]), "c": config}, "not the same number"),
        ({"manifest.json": entry(), "c": config}, "no file 'l'"),
        ({"manifest.json": entry(), "c": config, "l": "/etc/passwd"}, "no file 'l'"),
        ({"manifest.json": entry(), "c": config, "l": LAYER + b"more"}, "a layer has the digest"),
        ({"manifest.json": entry(), "c": config, "l": gzip.compress(LAYER)[:-20]}, "not a Docker archive"),
        ({"manifest.json": entry(), "c": bytes(5 << 20)}, "too large"),
    ):
        with pytest.raises(ArchiveError, match=words):
            normalised(saved(tmp_path, members))
    (tmp_path / "saved.tar").write_bytes(b"nothing like a tar")
    with pytest.raises(ArchiveError, match="not a Docker archive"):
        normalised(tmp_path / "saved.tar")
