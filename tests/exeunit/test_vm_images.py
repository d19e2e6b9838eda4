"""Images of every format: what of them arrives, and how an Engine gets them, keeps them and lets go of them."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import foreign_images as foreign
import pytest
import trio
from foreign_images import entry
from worlds.engine import admin as sdk_client
from worlds.engine import busybox_tar
from worlds.support import trio_test

from golem.exeunit.runtime import ImageFormat, RuntimeFault
from golem.exeunit.runtimes.vm.admin import Admin
from golem.exeunit.runtimes.vm.images import EngineImage, evict, image_tag, obtain_image
from golem.exeunit.transfer.packages import detect_format
from golem.exeunit.unpack.config import image_config
from golem.lab.engine import LocalEngine

CONFIG = {
    "Entrypoint": ["/bin/sh", "-c"],
    "Cmd": ["echo hello"],
    "Env": ["PATH=/bin", "A=b=c", "EMPTY="],
    "WorkingDir": "/golem/work",
    "User": "guest",
    "Volumes": {"/golem/output": {}, "/golem/work": {}},
    "ExposedPorts": {"80/tcp": {}},
    "Labels": {"golem.activity": "of another"},
    "Healthcheck": {"Test": ["CMD", "true"]},
    "OnBuild": ["RUN evil"],
}


def tree(folder: Path) -> Path:
    """Make a folder with what makes readers of file systems stumble."""
    root = folder / "tree"
    (root / "many").mkdir(parents=True)
    for number in range(700):
        (root / f"many/{number:04d}-{'x' * 40}").write_bytes(str(number).encode() * (number % 7))
    for name, size in {"empty": 0, "one": 1, "block": 131072, "over": 131073, "two": 262144, "odd": 300001}.items():
        (root / name).write_bytes((name.encode() * (size // len(name) + 1))[:size])
    with (root / "sparse").open("wb") as file:
        file.truncate(500_000)
        file.seek(400_000)
        file.write(b"in the middle")
    (root / "sparse-end").write_bytes(b"")
    os.truncate(root / "sparse-end", 140_000)
    (root / "random").write_bytes(b"".join(hashlib.sha512(bytes([n % 256, n // 256])).digest() for n in range(5000)))
    os.link(root / "one", root / "one-again")
    (root / "link").symlink_to("../../etc/passwd")
    deep = root.joinpath(*("d" * 20 for _ in range(12)))
    deep.mkdir(parents=True)
    (deep / "bottom").write_text("here")
    (root / "tool").write_bytes(b"#!")
    (root / "tool").chmod(0o4755)
    (root / "n\u00e4me").write_text("umlaut")
    return root


@pytest.mark.parametrize(
    ("comp", "flags"),
    [
        *((comp, ()) for comp in foreign.COMPRESSORS), ("lzo", ("-b", "1M")), ("zstd", ("-b", "4096")),
        ("gzip", ("-no-fragments",)), ("gzip", ("-noI", "-noD", "-noF")), ("gzip", ("-b", "8192", "-always-use-fragments")),
    ],
)  # fmt: skip
def test_squashfs_is_read_as_it_was_packed(tmp_path: Path, comp: str, flags: tuple[str, ...]) -> None:
    root = tree(tmp_path)
    squashfs = foreign.mksquashfs(root, tmp_path / "s", comp, "-all-root", *flags)
    _, (layer,) = foreign.convert(foreign.gvmi(squashfs, CONFIG), "GVMI", tmp_path)
    found = set(layer) - {"."}
    assert found == {str(path.relative_to(root)) for path in root.rglob("*")}
    linked = {name for name, (member, _) in layer.items() if member.islnk()}
    assert linked in ({"one"}, {"one-again"})
    for name in sorted(found - linked):
        member, content = layer[name]
        path = root / name
        assert member.uid == member.gid == 0
        assert member.mtime == int(path.lstat().st_mtime)
        if path.is_symlink():
            assert member.linkname == os.readlink(path)
        else:
            assert member.mode == path.stat().st_mode & 0o7777
            assert member.isdir() == path.is_dir()
            assert path.is_dir() or content == path.read_bytes()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_kind_are_read_alike(tmp_path: Path, form: int) -> None:
    # as deep and as large as the oldest of the three can say
    long = "d" * 90 + "/" + "f" * 60
    data = foreign.tar(
        entry("./", type=tarfile.DIRTYPE),
        entry("./etc", type=tarfile.DIRTYPE, mode=0o700, uid=7, gid=8),
        entry("etc/passwd", b"root", mtime=1_000_000),
        entry("etc//./shadow", b"x" * 1000, mode=0o4750, uid=1000),
        entry("bin", type=tarfile.SYMTYPE, linkname="/usr/bin"),
        entry("up", type=tarfile.SYMTYPE, linkname="../../../etc"),
        entry("again", type=tarfile.LNKTYPE, linkname="./etc/passwd"),
        entry(long, b"deep"),
        entry("old", b"v7", type=tarfile.AREGTYPE),
        form=form,
    )
    config, (layer,) = foreign.convert(data, "ROOTFS_ARCHIVE", tmp_path)
    kinds = {name: (member.type, member.mode, member.uid, content) for name, (member, content) in layer.items()}
    assert kinds == {
        ".": (tarfile.DIRTYPE, 0o755, 0, b""),
        "etc": (tarfile.DIRTYPE, 0o700, 7, b""),
        "etc/passwd": (tarfile.REGTYPE, 0o755, 0, b"root"),
        "etc/shadow": (tarfile.REGTYPE, 0o4750, 1000, b"x" * 1000),
        "bin": (tarfile.SYMTYPE, 0o755, 0, b""),
        "up": (tarfile.SYMTYPE, 0o755, 0, b""),
        "again": (tarfile.LNKTYPE, 0o755, 0, b""),
        long: (tarfile.REGTYPE, 0o755, 0, b"deep"),
        "old": (tarfile.REGTYPE, 0o755, 0, b"v7"),
    }
    assert layer["etc/passwd"][0].mtime == 1_000_000
    assert (layer["bin"][0].linkname, layer["up"][0].linkname) == ("/usr/bin", "../../../etc")
    kept = len(kinds) + sum(bool(part) for part in Path(long).parent.parts)  # and the directories that `long` implies
    labels = {"golem.members": str(kept), "golem.cost": str(kept * 4096 + 1010)}
    assert config["config"] == {"WorkingDir": "/", "Labels": labels}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_large_owners(tmp_path: Path, form: int) -> None:
    name, target = "/".join(["long" * 20] * 20), "t" * 3000
    data = foreign.tar(
        entry(name, b"1", uid=3_000_000, mtime=1.75),
        entry("link", type=tarfile.SYMTYPE, linkname=target),
        entry("hard", type=tarfile.LNKTYPE, linkname=name),
        entry("umlaut-\u00e4", b"2", pax_headers={"SCHILY.xattr.user.x": "y", "comment": "z"}),
        form=form,
    )
    _, (layer,) = foreign.convert(data, "ROOTFS_ARCHIVE", tmp_path)
    assert (layer[name][0].uid, layer[name][0].mtime, layer[name][1]) == (3_000_000, 1, b"1")
    assert (layer["link"][0].linkname, layer["hard"][0].linkname) == (target, name)
    assert layer["umlaut-\u00e4"][1] == b"2"
    assert not any(member.pax_headers for member, _ in layer.values())


LAYERS = [
    foreign.tar(entry("bin", type=tarfile.DIRTYPE), entry("bin/a", b"a"), entry("old/b", b"b")),
    foreign.tar(entry("bin/.wh.a", b""), entry("old/.wh..wh..opq", b""), entry(".wh..wh.plnk", b""), entry("c", b"c")),
]


def legacy_with_linked_layer(layers: list[bytes]) -> bytes:
    """Docker writes a layer that occurs twice as a symbolic link to the first."""
    twice = [layers[0], layers[1], layers[0]]
    raw = foreign.image_json(twice)
    names = ["aa/layer.tar", "bb/layer.tar", "cc/layer.tar"]
    return foreign.tar(
        *(entry(name, layer) for name, layer in zip(names[:2], layers, strict=True)),
        entry("cc/layer.tar", type=tarfile.SYMTYPE, linkname="../aa/layer.tar"),
        entry("x.json", raw),
        entry("manifest.json", json.dumps([{"Config": "x.json", "RepoTags": None, "Layers": names}]).encode()),
    )


@pytest.mark.parametrize(
    ("data", "format", "count"),
    [
        (foreign.docker_archive(LAYERS), "DOCKER_ARCHIVE", 2),
        (gzip.compress(foreign.docker_archive(LAYERS)), "DOCKER_ARCHIVE", 2),
        (legacy_with_linked_layer(LAYERS), "DOCKER_ARCHIVE", 3),
        (foreign.oci_layout(LAYERS), "OCI_ARCHIVE", 2),
        (foreign.oci_layout(LAYERS, packed=foreign.zstd), "OCI_ARCHIVE", 2),
        (foreign.oci_layout(LAYERS, packed=lambda layer: layer, nested=1), "OCI_ARCHIVE", 2),
        (
            foreign.oci_layout(
                LAYERS,
                platforms=[
                    {"os": "linux", "architecture": "s390x"},
                    {"os": "unknown", "architecture": "unknown"},
                    {"os": "linux", "architecture": foreign.MACHINE},
                ],
            ),
            "OCI_ARCHIVE",
            2,
        ),
        (gzip.compress(foreign.oci_layout(LAYERS)), "OCI_ARCHIVE", 2),
        (lzma.compress(foreign.docker_archive(LAYERS)), "DOCKER_ARCHIVE", 2),
        (bz2.compress(foreign.docker_archive(LAYERS)), "DOCKER_ARCHIVE", 2),
        (foreign.oci_layout(LAYERS, packed=lzma.compress), "OCI_ARCHIVE", 2),
        (foreign.oci_layout(LAYERS, packed=bz2.compress), "OCI_ARCHIVE", 2),
    ],
    ids=[
        "docker",
        "docker-gzip",
        "docker-linked",
        "oci",
        "oci-zstd",
        "oci-plain-nested",
        "oci-platforms",
        "oci-gzip",
        "docker-xz",
        "docker-bzip2",
        "oci-xz-layers",
        "oci-bzip2-layers",
    ],
)
def test_layers_stay_layers(tmp_path: Path, data: bytes, format: str, count: int) -> None:
    (tmp_path / "x").write_bytes(data)
    found = detect_format(tmp_path / "x")
    assert found is ImageFormat[format] or (data[:2] == b"\x1f\x8b" and found is ImageFormat.DOCKER_ARCHIVE)
    assert found is not None
    config, layers = foreign.convert(data, found.name, tmp_path)
    assert len(layers) == count
    assert set(layers[0]) == {"bin", "bin/a", "old/b"}
    assert set(layers[1]) == {"bin/.wh.a", "old/.wh..wh..opq", "c"}
    assert layers[0]["old/b"][1] == b"b"
    assert (config["architecture"], config["os"]) == (foreign.MACHINE, "linux")


def test_a_compressed_layer_may_be_several_gzip_members_with_padding(tmp_path: Path) -> None:
    def pigz(layer: bytes) -> bytes:
        return gzip.compress(layer[:700]) + gzip.compress(layer[700:]) + bytes(100)

    _, layers = foreign.convert(foreign.oci_layout(LAYERS, packed=pigz), "OCI_ARCHIVE", tmp_path)
    assert len(layers) == 2


@pytest.mark.parametrize("pack", [lzma.compress, bz2.compress, gzip.compress])
def test_a_compressed_root_file_system_is_one(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    """As `tar cJf` and `tar cjf` make them; several streams with padding between them are one (pxz, pbzip2)."""
    rootfs = foreign.tar(entry("bin/a", b"content" * 1000), entry("etc/x", bytes(300_000)))
    (tmp_path / "x").write_bytes(data := pack(rootfs[:5000]) + pack(rootfs[5000:]) + bytes(64))
    assert detect_format(tmp_path / "x") is ImageFormat.ROOTFS_ARCHIVE
    _, (layer,) = foreign.convert(data, "ROOTFS_ARCHIVE", tmp_path)
    assert (layer["bin/a"][1], layer["etc/x"][1]) == (b"content" * 1000, bytes(300_000))


@pytest.mark.parametrize("data", [lzma.compress(b"x" * 4096), bz2.compress(b"x" * 4096), b"BZh9", b"\xfd7zXZ\0", b"\x1f\x8b"])
def test_what_is_packed_and_no_archive_is_nothing(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    assert detect_format(tmp_path / "x") is None


def test_configuration_keeps_what_concerns_a_command(tmp_path: Path) -> None:
    raw = foreign.image_json(LAYERS, CONFIG)
    config, _ = foreign.convert(foreign.docker_archive(LAYERS, raw), "DOCKER_ARCHIVE", tmp_path)
    kept = ("Entrypoint", "Cmd", "Env", "WorkingDir", "User", "Volumes", "ExposedPorts")
    cost = config["config"].pop("Labels")
    assert cost.keys() == {"golem.cost", "golem.members"}
    assert config["config"] == {key: CONFIG[key] for key in kept}
    bare = {"Entrypoint": None, "Cmd": "date", "Env": None, "WorkingDir": "", "User": "1000:1000", "Volumes": None}
    config, _ = foreign.convert(foreign.docker_archive(LAYERS, foreign.image_json(LAYERS, bare)), "DOCKER_ARCHIVE", tmp_path)
    assert config["config"] == {"Cmd": ["date"], "WorkingDir": "/", "User": "1000:1000", "Labels": cost}


# -- with an Engine


def package(folder: Path, data: bytes) -> tuple[Path, str]:
    digest = hashlib.sha3_224(data).hexdigest()
    path = folder / f"sha3-224-{digest}"
    path.write_bytes(data)
    return path, digest


async def obtain(admin: Admin, folder: Path, data: bytes, **more: Any) -> EngineImage:
    path, digest = package(folder, data)
    form = detect_format(path)
    assert form is not None
    return await obtain_image(admin, path, digest, form, folder=folder / "locks", **more)


def unique(folder: Path) -> bytes:
    """Root file system of this test alone: the Engine is shared by the session."""
    return busybox_tar({"etc/of": str(folder).encode(), "hello": b"#!/bin/sh\necho hello $(id -u) $A $(pwd) $(cat /etc/of)\n"})


def run(engine: LocalEngine, image: EngineImage) -> str:
    """Run an image as it is and return what it says."""
    client = sdk_client(engine)
    try:
        made = client.create_container(image.id, host_config=client.create_host_config(network_mode="none"))
        try:
            client.start(made)
            assert client.wait(made)["StatusCode"] == 0
            return client.logs(made).decode()
        finally:
            client.remove_container(made, v=True, force=True)
    finally:
        client.close()


def as_gvmi(rootfs: bytes, folder: Path) -> bytes:
    root = folder / "root"
    root.mkdir()
    (folder / "rootfs.tar").write_bytes(rootfs)
    with tarfile.open(folder / "rootfs.tar") as archive:
        archive.extractall(root)  # our own archive: Debian 12's Python has no filters
    return foreign.gvmi(foreign.mksquashfs(root, folder / "s", "lzo", "-all-root"), RUNNABLE)


RUNNABLE = {"Cmd": ["/hello"], "Env": ["PATH=/bin", "A=b"], "WorkingDir": "/tmp", "User": "1000", "Volumes": {"/out": {}}}
FORMS: dict[str, Callable[[bytes, Path], bytes]] = {
    "docker": lambda rootfs, _: foreign.docker_archive([rootfs], foreign.image_json([rootfs], RUNNABLE)),
    "oci": lambda rootfs, _: foreign.oci_layout([rootfs], foreign.image_json([rootfs], RUNNABLE), packed=foreign.zstd),
    "gvmi": as_gvmi,
}


@pytest.mark.parametrize("form", FORMS)
@trio_test
async def test_every_format_runs(engine: LocalEngine, tmp_path: Path, form: str) -> None:
    notices: list[str] = []
    data = FORMS[form](unique(tmp_path), tmp_path)
    with await obtain(Admin(engine.socket), tmp_path, data, notice=notices.append) as image:
        assert (image.cached, image.cmd, image.entrypoint, image.workdir, image.user) == (False, ("/hello",), (), "/tmp", "1000")
        assert (image.env, image.volumes) == ({"PATH": "/bin", "A": "b"}, ("/out",))
        assert image.unpack_cpu_s > 0
        assert run(engine, image) == f"hello 1000 b /tmp {tmp_path}\n"
        with sdk_client(engine) as client:
            assert client.inspect_image(image.id)["RepoTags"] == [image.tag]  # and none that the archive asked for
    assert notices[0] == "Unpacking image"
    assert "Loading image" in notices


@trio_test
async def test_what_docker_saves_comes_back_as_the_same_image(engine: LocalEngine, tmp_path: Path) -> None:
    admin = Admin(engine.socket)
    given = docker_archive_of(unique(tmp_path))
    with await obtain(admin, tmp_path, given) as image, sdk_client(engine) as client:
        saved = b"".join(client.get_image(image.tag))
        for data in (saved, gzip.compress(saved, 1)):
            with await obtain(admin, tmp_path, data) as again:
                assert (again.id, again.cached, again.tag == image.tag) == (image.id, False, False)


def docker_archive_of(rootfs: bytes) -> bytes:
    return foreign.docker_archive([rootfs, LAYERS[1]], foreign.image_json([rootfs, LAYERS[1]], RUNNABLE))


@trio_test
async def test_a_root_file_system_has_no_configuration(engine: LocalEngine, tmp_path: Path) -> None:
    admin, data = Admin(engine.socket), gzip.compress(unique(tmp_path))
    with await obtain(admin, tmp_path, data) as image:
        assert (image.cmd, image.env, image.workdir, image.cached) == ((), {}, "/", False)
    with await obtain(admin, tmp_path, data) as again:
        assert (again.id, again.cached, again.unpack_cpu_s) == (image.id, True, 0)
    assert list((tmp_path / "locks").iterdir()) == [tmp_path / f"locks/{image.tag[6:-7]}.lock"]


@trio_test
async def test_two_at_once_load_once(engine: LocalEngine, tmp_path: Path) -> None:
    data, found, notices = unique(tmp_path), list[EngineImage](), list[str]()

    async def one() -> None:
        # Two administrators over one folder are what two exe-unit processes are.
        found.append(await obtain(Admin(engine.socket), tmp_path, data, notice=notices.append))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one)
        nursery.start_soon(one)
    assert sorted(image.cached for image in found) == [False, True]
    assert notices.count("Unpacking image") == 1
    for image in found:
        image.close()


@trio_test
async def test_eviction_takes_the_least_recently_used_and_spares_what_is_in_use(engine: LocalEngine, tmp_path: Path) -> None:
    admin = Admin(engine.socket)
    rootfs = unique(tmp_path)
    layers = [foreign.tar(entry("number", bytes([number]))) for number in range(4)]
    images = [await obtain(admin, tmp_path, foreign.docker_archive([rootfs, layer])) for layer in layers]
    oldest, held, used, newest = images
    for age, image in enumerate(images):
        os.utime(tmp_path / f"locks/{image.tag[6:-7]}.lock", (1000 + age, 1000 + age))
    for image in (oldest, used, newest):
        image.close()
    with sdk_client(engine) as client:
        made = client.create_container(used.id, "/hello")
        try:
            there = {tag for one in await admin.list_images("golem/*") for tag in one["RepoTags"]}
            others = there - {image.tag for image in images}
            removed = await evict(admin, tmp_path / "locks", 0, spare=frozenset(others | {newest.tag}))
            assert removed == [oldest.tag]
            assert not (tmp_path / f"locks/{oldest.tag[6:-7]}.lock").exists()
        finally:
            client.remove_container(made)
    held.close()
    assert await evict(admin, tmp_path / "locks", 0, spare=frozenset(others)) == [held.tag, used.tag, newest.tag]


@trio_test
async def test_a_load_that_is_cancelled_leaves_nothing(engine: LocalEngine, tmp_path: Path) -> None:
    admin, data = Admin(engine.socket), unique(tmp_path)
    with trio.CancelScope() as scope:
        await obtain(admin, tmp_path, data, notice=lambda text: scope.cancel() if text.startswith("Loading") else None)
    assert scope.cancelled_caught
    assert await admin.inspect_image(image_tag(package(tmp_path, data)[1])) is None
    with await obtain(admin, tmp_path, data) as image:
        assert not image.cached


class Full:
    """An Engine that has no room, and an old image."""

    def __init__(self) -> None:
        self.removed: list[str] = []

    async def inspect_image(self, name: str) -> None:
        return None

    async def root_dir(self) -> Path:
        return Path("/")

    async def list_images(self, reference: str) -> list[dict[str, Any]]:
        return [] if self.removed else [{"RepoTags": [image_tag("0" * 56)], "Id": "x", "Size": 1000}]

    async def image_ids_in_use(self) -> frozenset[str]:
        return frozenset()

    async def remove_image(self, name: str) -> bool:
        self.removed.append(name)
        return True


@trio_test
async def test_a_full_disk_is_told_before_the_engine_fills_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, digest = package(tmp_path, foreign.docker_archive(LAYERS))
    folder, engine = tmp_path / "f", Full()
    for place, text in ((folder, "not enough disk space to unpack"), (Path("/"), "Docker Engine has not")):
        assert engine.removed == []
        free = {str(place): 0}
        monkeypatch.setattr("golem.exeunit.runtimes.vm.images._free", lambda path, free=free: free.get(str(path), 1 << 40))
        with pytest.raises(RuntimeFault, match=text):
            await obtain_image(cast("Admin", engine), path, digest, ImageFormat.DOCKER_ARCHIVE, folder=folder)
    assert engine.removed == [image_tag("0" * 56)]  # which was not enough


@trio_test
async def test_an_engine_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFault, match="Docker Engine"):
        await obtain(Admin(tmp_path / "nothing.sock"), tmp_path, foreign.docker_archive(LAYERS))


@pytest.mark.parametrize(("given", "kept"), [
    ({"Env": ["A=b", "NOTHING", "=x", "", "B=", "C==d"]}, {"Env": ["A=b", "B=", "C==d"]}),
    ({"ExposedPorts": {"80/tcp": {}, "x/tcp": {}, "all": {}, "53/udp": {}}}, {"ExposedPorts": {"80/tcp": {}, "53/udp": {}}}),
    ({"WorkingDir": "/srv/../app/./x//"}, {"WorkingDir": "/app/x"}), ({"WorkingDir": "app/../.."}, {"WorkingDir": "/"}),
    ({"WorkingDir": "//x"}, {"WorkingDir": "/x"}), ({"Volumes": {"/data/../out/": {}}}, {"Volumes": {"/out": {}}}),
])  # fmt: skip
def test_what_docker_takes_is_taken(given: dict[str, object], kept: dict[str, object]) -> None:
    found = image_config(given, "amd64")["config"]
    assert {key: found.get(key) for key in kept} == kept
