"""Images made to harm: each is refused with a text that says what is wrong, before an Engine hears of it."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import resource
import struct
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import foreign_images as foreign
import pytest
import trio
from foreign_images import docker_archive, entry, gvmi, image_json, oci_layout, padded, raw_header, sha256, tar
from worlds.engine import busybox_tar
from worlds.patience import patience
from worlds.support import trio_test

from golem.exeunit.runtime import ImageFormat, RuntimeFault
from golem.exeunit.runtimes.vm.admin import Admin
from golem.exeunit.runtimes.vm.images import ImageLimits, evict, image_tag, obtain_image
from golem.exeunit.unpack.archives import is_own
from golem.exeunit.unpack.inflate import BadImage
from golem.lab.engine import LocalEngine

FILE = entry("a", b"content")
LAYER = tar(FILE)
ZEROS = bytes(16 << 20)
USERS = b"a\n" * (1 << 19) + b"a"
END = bytes(1024)


class Deaf:
    """An Engine that has no image and must not be told of one."""

    async def inspect_image(self, name: str) -> dict[str, Any] | None:
        return None

    async def load_image(self, chunks: Iterator[bytes]) -> None:
        raise AssertionError("a hostile image has reached the Engine")

    async def root_dir(self) -> Path | None:
        raise AssertionError("a hostile image has been found good")


def link(name: str, target: str) -> foreign.Entry:
    return entry(name, type=tarfile.SYMTYPE, linkname=target)


def hard(name: str, target: str) -> foreign.Entry:
    return entry(name, type=tarfile.LNKTYPE, linkname=target)


def pax(*records: bytes, flag: bytes = b"x") -> bytes:
    body = b"".join(records)
    return raw_header(b"pax", flag, b"%011o\0" % len(body)) + padded(body)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(line := b"%d %s=%s\n" % (length, key, value)) != length:
        length = len(line)
    return line


PLAIN = raw_header(b"a")
ROOTFS: dict[str, tuple[bytes, str]] = {
    # names
    "dotdot": (tar(entry("../evil", b"x")), r"leads out of the image: '../evil'"),
    "dotdot-inside": (tar(entry("a/b/../../../evil", b"x")), "leads out of the image"),
    "absolute": (tar(entry("/etc/passwd", b"x")), "absolute: '/etc/passwd'"),
    "symlink-parent": (tar(link("d", "/etc"), entry("d/passwd", b"x")), "'d/passwd' is below 'd', which is a symbolic link"),
    "symlink-grandparent": (tar(link("d", "../.."), entry("d/e/f", b"x")), "below 'd', which is a symbolic link"),
    "symlink-hard-linked-parent": (tar(link("d", "/"), hard("e", "d"), entry("e/x", b"x")), "is below 'e', which is"),
    "file-parent": (tar(FILE, entry("a/b", b"x")), "is below 'a', which is a file"),
    "directory-becomes-link": (tar(entry("d/x", b"x"), link("d", "/etc")), "'d' is there twice"),
    "link-becomes-directory": (tar(link("d", "/etc"), entry("d", type=tarfile.DIRTYPE)), "'d' is there twice"),
    "root-is-a-link": (tar(link("./", "/etc")), "is no name for a file or link"),
    "hard-link-out": (tar(hard("x", "../../etc/shadow")), "a hard link's target that leads out"),
    "hard-link-absolute": (tar(hard("x", "/etc/shadow")), "a hard link's target that is absolute"),
    "hard-link-to-nothing": (tar(hard("x", "y")), "'x' is a hard link to 'y', which is no file that came before"),
    "hard-link-to-itself": (tar(entry("x", b""), hard("x", "x")), "no file that came before"),
    "hard-link-to-directory": (tar(entry("d", type=tarfile.DIRTYPE), hard("x", "d")), "no file that came before"),
    "long-part": (tar(entry("n" * 300, b"x")), "a part of more than 255 bytes"),
    "long-path": (tar(entry("/".join(["n" * 200] * 30), b"x")), "a name of 60.. bytes, at most 4095"),
    "control-characters": (tar(entry("\x1b[2J/../x", b"x")), r"leads out of the image: '\\x1b\[2J/\.\./x'"),
    "deletion-mark": (tar(entry("etc/.wh.passwd", b"")), r"begin with \.wh\. for deletions"),
    "empty-link": (raw_header(b"l", b"2") + END, "a symbolic link to nothing"),
    # kinds
    "character-device": (tar(entry("dev/mem", type=tarfile.CHRTYPE, devmajor=1, devminor=1)), "'dev/mem' is a character device"),
    "block-device": (tar(entry("disk", type=tarfile.BLKTYPE, devmajor=8)), "'disk' is a block device"),
    "fifo": (tar(entry("pipe", type=tarfile.FIFOTYPE)), "'pipe' is a FIFO"),
    "sparse": (raw_header(b"s", b"S") + END, "'s' is a sparse file"),
    "sparse-pax": (pax(record(b"GNU.sparse.major", b"1"), record(b"GNU.sparse.name", b"x")) + PLAIN + END, "is a sparse file"),
    "unknown-type": (raw_header(b"v", b"V") + END, "'v' is of unknown type"),
    "directory-with-content": (raw_header(b"d", b"5", b"%011o\0" % 5) + padded(b"x") + END, "a directory or link with content"),
    # headers that do not add up
    "not-a-tar": (b"#!/bin/sh\n" * 100, "not a tar file"),
    "checksum": (PLAIN.replace(b"0000755", b"0000777") + END, "wrong checksum"),
    "cut-in-header": (PLAIN[:300], "ends too early"),
    "cut-in-content": (tar(entry("a", b"x" * 5000))[:2000], "ends too early"),
    "negative-size": (raw_header(b"a", b"0", b"\xff" * 12) + END, "negative size"),
    "size-no-number": (raw_header(b"a", b"0", b"eleven bytes") + END, "malformed number"),
    "exabytes": (raw_header(b"a", b"0", b"\x80" + (1 << 60).to_bytes(11, "big")) + END, "unpacks to more than"),
    "exabytes-pax": (pax(record(b"size", str(1 << 62).encode())) + PLAIN + END, "unpacks to more than"),
    "pax-gigabyte": (raw_header(b"p", b"x", b"%011o\0" % (1 << 30)) + END, "a pax header of 1073741824 bytes, at most"),
    "pax-malformed": (pax(b"99 path=x\n") + PLAIN + END, "malformed pax header"),
    "pax-zero-length": (pax(b"0 path=x\n") + PLAIN + END, "malformed pax header"),
    "pax-long-number": (pax(record(b"size", b"1" * 5000)) + PLAIN + END, "a pax header with size="),
    "pax-negative": (pax(record(b"uid", b"-1")) + PLAIN + END, "a pax header with uid="),
    "pax-twice": (pax(record(b"path", b"x")) * 2 + PLAIN + END, "two pax headers"),
    "pax-nul": (pax(record(b"path", b"x\0y")) + PLAIN + END, "a NUL in a name"),
    "pax-records": (pax(*(record(b"k%d" % n, b"") for n in range(10_001))) + PLAIN + END, "too many records"),
    "pax-global-name": (pax(record(b"path", b"x"), flag=b"g") + PLAIN + END, "a global pax header names a file"),
    "pax-alone": (pax(record(b"path", b"x")) + END, "belongs to no member"),
    "pax-escapes": (pax(record(b"path", b"../x")) + PLAIN + END, "leads out of the image"),
    "headers-without-end": (pax(record(b"comment", b"x"), flag=b"g") * 9 + PLAIN + END, "too many header extensions"),
    "long-name-megabyte": (raw_header(b"l", b"L", b"%011o\0" % (1 << 20)) + bytes(1 << 20) + END, "a name of 1048576 bytes"),
    "owner": (pax(record(b"gid", str(1 << 32).encode())) + PLAIN + END, "an owner out of range"),
    # what the Engine itself reads whole
    "users": (tar(entry("etc/passwd", USERS)), "/etc/passwd .* has 1048577 bytes, at most 1048576"),
    "groups-by-link": (tar(entry("x/y", USERS), link("etc/group", "../../z"), link("z", "/x/./y")), "/etc/group .'x/y'. has"),
    "users-by-folder": (tar(entry("x/passwd", USERS), link("etc", "x")), "/etc/passwd .'x/passwd'. has"),
    "users-by-hard-link": (tar(entry("x", USERS), hard("etc/passwd", "x")), "/etc/passwd .* has"),
    "users-by-both": (tar(entry("x", USERS), link("l", "/x"), hard("etc/passwd", "l")), "/etc/passwd .'x'. has"),
    # too much
    "members": (b"".join(raw_header(b"d%d" % n, b"5") for n in range(20_001)) + END, "more than 20000 files"),
    "implied-directories": (tar(*(entry(f"{n}/" + "d/" * 250 + "x", b"") for n in range(100))), "more than 20000 files"),
    "gzip-bomb": (gzip.compress(tar(entry("z", ZEROS)), 9), "a compression bomb: "),
    "gzip-cut": (gzip.compress(LAYER)[:-20], "damaged|ends too early"),
    "gzip-damaged": (gzip.compress(LAYER)[:30] + b"\xff" * 30, "is damaged"),
    "gzip-twice": (gzip.compress(gzip.compress(bytes(range(256)) * 9)), "not a tar file|ends too early"),
    "lz4": (b"\x04\x22\x4d\x18" + LAYER, "compressed with lz4; gzip, zstd, xz, bzip2 and none are known"),
    "xz-bomb": (lzma.compress(tar(entry("z", ZEROS))), "a compression bomb: "),
    "xz-cut": (lzma.compress(LAYER)[:60], "damaged|ends too early"),
    "xz-damaged": (lzma.compress(LAYER)[:30] + b"\xff" * 30, "is damaged"),
    "xz-twice": (lzma.compress(lzma.compress(bytes(range(256)) * 9)), "not a tar file|ends too early"),
    "xz-window": (
        lzma.compress(LAYER, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}]),
        "is damaged: Memory usage limit",
    ),
    "bzip2-bomb": (bz2.compress(tar(entry("z", ZEROS))), "a compression bomb: "),
    "bzip2-cut": (bz2.compress(LAYER)[:-20], "damaged|ends too early"),
    "bzip2-damaged": (bz2.compress(LAYER)[:30] + b"\xff" * 90, "is damaged"),
    "bzip2-empty": (b"BZh9", "damaged|ends too early"),
    "size": (tar(entry("z", bytes(65 << 20))), "unpacks to more than 67108864 bytes"),
}


def docker(layer: bytes = LAYER, **more: Any) -> bytes:
    return docker_archive([layer], **more)


def config(**settings: Any) -> bytes:
    return docker(config=image_json([LAYER], settings))


def named(**fields: Any) -> bytes:
    return docker(manifest=[{"Config": "c.json", "Layers": ["l"], **fields}], files={"c.json": image_json([LAYER]), "l": LAYER})


DEEP = b"[" * 200_000
DOCKER: dict[str, tuple[bytes, str]] = {
    "manifest-no-json": (docker(files={"manifest.json": b"{"}), "manifest.json is not valid JSON"),
    "manifest-deep": (docker(files={"manifest.json": DEEP}), "manifest.json is not valid JSON"),
    "manifest-large": (docker(files={"manifest.json": b" " * (5 << 20)}), "'manifest.json' has 5242880 bytes, at most"),
    "manifest-object": (docker(manifest={}), "must be a list of images"),
    "manifest-twice": (docker(extra=[entry("manifest.json", b"[]")]), "'manifest.json' is there twice"),
    "manifest-link": (docker(extra=[hard("m", "manifest.json")]), "'m' is a hard link"),
    "two-images": (docker(manifest=[{}, {}]), "holds 2 images"),
    "no-image": (docker(manifest=[]), "holds 0 images"),
    "no-config": (named(Config="gone.json"), "the archive has no 'gone.json'"),
    "config-out": (named(Config="../c.json"), "'../c.json' leads out of the archive"),
    "config-number": (named(Config=7), "Config must be a text"),
    "config-surrogate": (named(Config="\ud800"), "that UTF-8 can hold"),
    "layers-text": (named(Layers="l"), "Layers must be a list"),
    "layer-out": (named(Layers=["/etc/shadow"]), "leads out of the archive"),
    "layer-missing": (named(Layers=["gone"]), "the archive has no 'gone'"),
    "layers-more": (named(Layers=["l", "l"]), "does not name as many layers"),
    "layers-none": (docker(manifest=[{"Config": "c.json", "Layers": []}], files={"c.json": image_json([])}), "has 0 layers"),
    "layers-many": (
        docker(manifest=[{"Config": "c", "Layers": ["l"] * 126}], files={"c": image_json([LAYER] * 126), "l": LAYER}),
        "has 126 layers, it must have 1 to 125",
    ),
    "layer-link-out": (
        docker(manifest=[{"Config": "c", "Layers": ["x/l"]}], files={"c": image_json([LAYER])}, extra=[link("x/l", "../../l")]),
        "is a link that leads out",
    ),
    "layer-link-absolute": (
        docker(manifest=[{"Config": "c", "Layers": ["l"]}], files={"c": image_json([LAYER])}, extra=[link("l", "/etc/x")]),
        "is a link that leads out",
    ),
    "layer-link-loop": (
        docker(manifest=[{"Config": "c", "Layers": ["l"]}], files={"c": image_json([LAYER])}, extra=[link("l", "l")]),
        "the archive has no 'l'",
    ),
    "config-digest": (
        docker(files={f"{sha256(image_json([LAYER]))}.json": image_json([LAYER], os="Linux")}),
        "configuration is damaged",
    ),
    "layer-digest": (
        docker(config=image_json([tar(entry("a", b"other"))])),
        "layer 1 is damaged or another: its digest is not sha256:",
    ),
    "layer-digest-form": (
        docker(config=image_json([], rootfs={"diff_ids": ["sha256:../../x"]})),
        "'sha256:../../x' is no digest",
    ),
    "config-large": (docker(config=image_json([LAYER], padding="x" * (5 << 20))), "bytes, at most 4194304"),
    "config-list": (docker(config=b"[]"), "configuration is not an object"),
    "other-machine": (
        docker(config=image_json([LAYER], architecture="s390x")),
        "the image is for linux/s390x, this provider is linux/",
    ),
    "other-system": (docker(config=image_json([LAYER], os="windows")), "the image is for windows/"),
    "device-outside": (docker(extra=[entry("n", type=tarfile.CHRTYPE)]), "'n' is a character device"),
    "device-in-layer": (docker(tar(entry("n", type=tarfile.CHRTYPE))), "layer 1: 'n' is a character device"),
    "parent-deleted": (docker(tar(entry("a/.wh...", b""))), "is no proper deletion mark"),
    "self-deleted": (docker(tar(entry("a/.wh..", b""))), "is no proper deletion mark"),
    "deletion-link": (docker(tar(link(".wh.a", "/"))), "is no proper deletion mark"),
    "deletion-with-content": (docker(tar(entry(".wh.a", b"x"))), "is no proper deletion mark"),
    "layer-bomb": (docker_archive([gzip.compress(tar(entry("z", ZEROS)), 9)], image_json([LAYER])), "a compression bomb: "),
    "layer-bomb-behind-the-end": (
        docker_archive([gzip.compress(LAYER + ZEROS, 9)], image_json([LAYER + ZEROS])),
        "a compression bomb: ",
    ),
    "layers-together": (docker_archive([tar(entry("z", ZEROS + bytes([n]))) for n in range(4)]), "unpacks to more than"),
    "outer-bomb": (gzip.compress(docker(tar(entry("z", ZEROS))), 9), "a compression bomb: "),
    "outer-cut": (docker(tar(entry("z", ZEROS)))[: 1 << 20], "ends too early"),
    "members-outside": (tar(*(entry(f"{n}", b"") for n in range(10_001))), "more than 10000 members"),
    "entrypoint": (config(Entrypoint={"a": 1}), "Entrypoint must be a list"),
    "command-nul": (config(Cmd=["a\0b"]), "Cmd must be a text"),
    "command-many": (config(Cmd=["x"] * 5000), "Cmd must be a list of at most 4096"),
    "command-long": (config(Cmd=["x" * 100_000] * 11), "Cmd is longer than"),
    "environment": (config(Env=[{"A": "x"}]), "Env must be a text"),
    "directory": (config(WorkingDir="/a/\x1b[2J"), "WorkingDir: .* is no path for a container"),
    "directory-long": (config(WorkingDir="/" + "é" * 2100), "WorkingDir: .* is no path for a container"),
    "volume": (config(Volumes={"/x\ny": {}}), "Volumes: .* is no path for a container"),
    "volumes": (config(Volumes={f"/{n}": {} for n in range(65)}), "Volumes must be an object with at most 64 keys"),
    "user": (config(User="root\n"), "is no user"),
    "port": (config(ExposedPorts=["80/tcp"]), "ExposedPorts must be an object"),
    "settings-text": (docker(config=image_json([LAYER]).replace(b'"config": {}', b'"config": "x"')), "no object 'config'"),
}


def oci(digest: str, **more: Any) -> bytes:
    """Return a layout whose only layer is called by another digest."""
    raw = image_json([LAYER])
    layer = {"digest": digest, "size": 1, **more}
    manifest = json.dumps({"config": {"digest": f"sha256:{sha256(raw)}", "size": 1}, "layers": [layer]}).encode()
    index = {"manifests": [{"digest": f"sha256:{sha256(manifest)}", "size": 1}]}
    blobs = {f"blobs/sha256/{sha256(one)}": one for one in (raw, manifest)}
    return tar(*(entry(name, data) for name, data in {**blobs, "index.json": json.dumps(index).encode()}.items()))


def swapped(*, what: bytes) -> bytes:
    """Return a layout in which one blob holds something else."""
    data = oci_layout([LAYER], packed=lambda layer: layer)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        blobs = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}  # type: ignore[union-attr]
    (name,) = [name for name in blobs if name.startswith("blobs/") and what in blobs[name]]
    return tar(*(entry(key, blob + b" " * 512 if key == name else blob) for key, blob in blobs.items()))


OCI: dict[str, tuple[bytes, str]] = {
    "blob-missing": (oci_layout([LAYER], missing=True), "the archive has no 'blobs/sha256/"),
    "layer-digest": (swapped(what=b"content"), "layer 1 is damaged or another: its digest is not sha256:.*manifest says"),
    "config-digest": (swapped(what=b"rootfs"), "the image's configuration is damaged or another"),
    "manifest-digest": (swapped(what=b"schemaVersion"), "a manifest is damaged or another"),
    "diff-id": (oci_layout([LAYER], image_json([b"other"])), "layer 1 is damaged or another.*configuration says"),
    "digest-escapes": (oci("sha256:../../../etc/passwd"), "is no digest"),
    "digest-weak": (oci("md5:" + "0" * 32), "is no digest"),
    "digest-short": (oci("sha512:" + "0" * 64), "is no digest|has no"),
    "descriptor": (oci("sha256:" + "0" * 64, size=-1), "its size is not given"),
    "index-no-list": (oci_layout([LAYER], files={"index.json": b"{}"}), "index.json must have a list of manifests"),
    "index-deep": (oci_layout([LAYER], nested=3), "indexes within indexes"),
    "other-machine": (
        oci_layout([LAYER], platforms=[{"os": "linux", "architecture": "s390x"}]),
        "no image for linux/.*there is linux/s390x",
    ),
    "zstd-bomb": (oci_layout([tar(entry("z", ZEROS))], packed=foreign.zstd), "a compression bomb: "),
    "zstd-damaged": (oci_layout([LAYER], packed=lambda layer: foreign.zstd(layer)[:9] + b"\xff" * 50), "damaged"),
    "zstd-cut": (oci_layout([LAYER], packed=lambda layer: foreign.zstd(layer)[:-12]), "damaged|too early"),
    "zstd-window": (oci_layout([LAYER], packed=lambda layer: b"\x28\xb5\x2f\xfd\x00\xf8" + layer), "damaged"),
}


def refused(folder: Path, data: bytes, form: str, text: str) -> None:
    with pytest.raises(BadImage, match=text) as caught:
        foreign.convert(data, form, folder)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("attack", ROOTFS)
def test_tars(tmp_path: Path, attack: str) -> None:
    refused(tmp_path, ROOTFS[attack][0], "ROOTFS_ARCHIVE", ROOTFS[attack][1])


@pytest.mark.parametrize("attack", DOCKER)
def test_docker_archives(tmp_path: Path, attack: str) -> None:
    refused(tmp_path, DOCKER[attack][0], "DOCKER_ARCHIVE", DOCKER[attack][1])


@pytest.mark.parametrize("attack", OCI)
def test_oci_layouts(tmp_path: Path, attack: str) -> None:
    refused(tmp_path, OCI[attack][0], "OCI_ARCHIVE", OCI[attack][1])


# -- squashfs


def packed(folder: Path, *flags: str) -> bytes:
    """Pack a small tree whose tables are not compressed, so that they can be bent."""
    root = folder / "tree"
    (root / "aa").mkdir(parents=True)
    (root / "aa/inner").write_bytes(b"inside")
    (root / "file").write_bytes(bytes(range(256)) * 1024)
    (root / "link").symlink_to("aa")
    return foreign.mksquashfs(root, folder / "s", "gzip", "-noI", "-all-root", *flags)


def at(squashfs: bytes, offset: int, form: str, value: int) -> bytes:
    data = bytearray(squashfs)
    struct.pack_into(form, data, offset, value)
    return bytes(data)


def loop(squashfs: bytes) -> bytes:
    """Let the directory aa be the root again."""
    (root,) = struct.unpack_from("<Q", squashfs, 32)
    (table,) = struct.unpack_from("<Q", squashfs, 72)
    return at(squashfs, squashfs.index(b"aa", table) - 8, "<H", root & 0xFFFF)


def renamed(squashfs: bytes, to: bytes) -> bytes:
    (table,) = struct.unpack_from("<Q", squashfs, 72)
    where = squashfs.index(b"aa", table)
    return squashfs[:where] + to + squashfs[where + 2 :]


def with_bomb(squashfs: bytes) -> bytes:
    """Let the table of owners be one block of zeros that inflates to a megabyte."""
    bomb, end = zlib.compress(bytes(1 << 20), 9), len(squashfs)
    block = struct.pack("<H", len(bomb)) + bomb
    moved = at(at(squashfs, 48, "<Q", end + len(block)), 40, "<Q", end + len(block) + 8)
    return moved + block + struct.pack("<Q", end)


SQUASHFS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "bare": (lambda data: data, "no configuration at its end"),
    "crc": (lambda data: gvmi(data, {"Cmd": ["x"]}).replace(b"Cmd", b"cmd"), "wrong CRC32"),
    "length": (lambda data: gvmi(data, {})[:-8] + b"99999999", "configuration has 99999999 bytes, at most"),
    "no-json": (lambda data: _config(data, b"{"), "is not valid JSON"),
    "json-deep": (lambda data: _config(data, DEEP), "is not valid JSON"),
    "json-list": (lambda data: gvmi(data, []), "is not an object"),
    "settings": (lambda data: gvmi(data, {"User": "a b"}), "is no user"),
    "version": (lambda data: gvmi(at(data, 28, "<H", 3), {}), "only version 4.0"),
    "compression": (lambda data: gvmi(at(data, 20, "<H", 2), {}), "compressed with lzma; gzip, lzo, xz, lz4 and zstd"),
    "block-size": (lambda data: gvmi(at(data, 12, "<I", 1 << 30), {}), "a block size of"),
    "longer": (lambda data: gvmi(at(data, 40, "<Q", 1 << 60), {}), "longer than the file"),
    "inodes": (lambda data: gvmi(at(data, 4, "<I", 0xFFFFFFFF), {}), "more than 20000 files"),
    "fragments": (lambda data: gvmi(at(data, 16, "<I", 0xFFFFFFFF), {}), "tables larger than its files need"),
    "id-table": (lambda data: gvmi(at(data, 48, "<Q", 1 << 50), {}), "points behind its own end"),
    "inode-table": (lambda data: gvmi(at(data, 64, "<Q", 1 << 50), {}), "points behind its own end"),
    "directory-table": (lambda data: gvmi(at(data, 72, "<Q", 5), {}), "the squashfs: "),
    "fragment-table": (lambda data: gvmi(at(data, 80, "<Q", 1 << 50), {}), "points behind its own end"),
    "root": (lambda data: gvmi(at(data, 32, "<Q", 0xFFFF), {}), "a place outside its block"),
    "directory-loop": (lambda data: gvmi(loop(data), {}), "is there twice"),
    "name-dotdot": (lambda data: gvmi(renamed(data, b".."), {}), r"the name '\.\.'"),
    "name-slash": (lambda data: gvmi(renamed(data, b"a/"), {}), "the name 'a/'"),
    "bomb": (lambda data: gvmi(with_bomb(data), {}), "a compression bomb: a block of .* holds more than 8192"),
}


def _config(squashfs: bytes, text: bytes) -> bytes:
    return squashfs + struct.pack("<I", zlib.crc32(text)) + text + b"%08d" % len(text)


@pytest.mark.parametrize("attack", SQUASHFS)
def test_gvmi(tmp_path: Path, attack: str) -> None:
    bend, text = SQUASHFS[attack]
    refused(tmp_path, bend(packed(tmp_path)), "GVMI", text)


@pytest.mark.parametrize(
    ("pseudo", "text"),
    [
        ("null c 666 0 0 1 3", "'null' is a character device"),
        ("disk b 666 0 0 8 0", "'disk' is a block device"),
        ("pipe i 666 0 0 f", "'pipe' is a FIFO"),
        ("talk i 666 0 0 s", "'talk' is a socket"),
    ],
)
def test_gvmi_with_what_is_no_file(tmp_path: Path, pseudo: str, text: str) -> None:
    refused(tmp_path, gvmi(packed(tmp_path, "-p", pseudo), {}), "GVMI", text)


def test_gvmi_of_holes(tmp_path: Path) -> None:
    packed(tmp_path)
    with (tmp_path / "tree/holes").open("wb") as file:
        file.truncate(100 << 20)
    data = foreign.mksquashfs(tmp_path / "tree", tmp_path / "s", "gzip", "-b", "1M")
    refused(tmp_path, gvmi(data, {}), "GVMI", "unpacks to more than")


@pytest.mark.parametrize(
    ("above", "large"),
    [
        (tar(entry("etc/passwd", b"x")), False), (tar(entry("etc/.wh.passwd", b"")), False),
        (tar(entry("etc/.wh..wh..opq", b"")), False), (tar(entry(".wh.etc", b"")), False), (tar(entry(".wh.x", b"")), False),
        (tar(entry("x/.wh..wh..opq", b""), entry("x/y", USERS)), True), (tar(entry("etc/hosts", b"x")), True),
        (tar(link("etc/passwd", "group")), False), (tar(link("etc/passwd", "/x/y")), True),
    ],
)  # fmt: skip
def test_users_of_several_layers(tmp_path: Path, above: bytes, large: bool) -> None:
    """What counts is what an Engine sees when all layers lie over each other."""
    data = docker_archive([tar(entry("x/y", USERS), link("etc/passwd", "../x/y")), above])
    if large:
        refused(tmp_path, data, "DOCKER_ARCHIVE", "/etc/passwd .'x/y'. has 1048577 bytes")
    else:
        foreign.convert(data, "DOCKER_ARCHIVE", tmp_path)


def test_a_name_costs_a_block_of_the_disk(tmp_path: Path) -> None:
    """What eviction goes by: 250 deep names are 30,000 inodes for the Engine, and no bytes."""
    deep = tar(*(entry(f"{n}/" + "d/" * 100 + "x", b"") for n in range(50)))
    config, _ = foreign.convert(deep, "ROOTFS_ARCHIVE", tmp_path)
    assert int(config["config"]["Labels"]["golem.members"]) == 50 * 102
    assert int(config["config"]["Labels"]["golem.cost"]) == 50 * 102 * 4096


class Full:
    """An Engine with two images whose last use is long ago."""

    def __init__(self) -> None:
        self.images = {image_tag(digit * 56): cost for digit, cost in (("0", 4096 * 30_000), ("1", 4096))}

    async def list_images(self, reference: str) -> list[dict[str, Any]]:
        labels = {tag: {"golem.cost": str(cost), "golem.members": str(cost // 4096)} for tag, cost in self.images.items()}
        return [{"RepoTags": [tag], "Id": tag, "Size": 10, "Labels": labels[tag]} for tag in self.images]

    async def image_ids_in_use(self) -> frozenset[str]:
        return frozenset()

    async def remove_image(self, name: str) -> bool:
        del self.images[name]
        return True


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        ({"max_bytes": 1 << 30}, 2), ({"max_bytes": 1 << 20}, 1), ({"max_bytes": 1 << 30, "max_images": 1}, 1),
        ({"max_bytes": 1 << 30, "at_least_members": 1}, 1), ({"max_bytes": 1 << 30, "at_least_members": 30_001}, 0),
    ],
)  # fmt: skip
@trio_test
async def test_eviction_goes_by_cost_by_number_and_by_inodes(tmp_path: Path, asked: dict[str, int], left: int) -> None:
    full = Full()
    await evict(cast("Admin", full), tmp_path, **asked)
    assert len(full.images) == left


@trio_test
async def test_a_package_that_fails_is_paid_for(tmp_path: Path) -> None:
    """Also one that was given up, whose reader is killed."""
    data = gzip.compress(tar(*(entry(f"f{n}", os.urandom(1000)) for n in range(3000))))[:-9000]
    path, spent = tmp_path / "x", list[float]()
    path.write_bytes(data)
    bring = partial(
        obtain_image, cast("Admin", Deaf()), path, "0" * 56, ImageFormat.ROOTFS_ARCHIVE, folder=tmp_path / "f", spent=spent.append
    )
    with pytest.raises(RuntimeFault, match="the image cannot be used"):
        await bring()
    assert spent[0] > 0.01
    with trio.move_on_after(0.05):
        await bring()
    assert len(spent) == 2


# -- what no list foresees


def seeds(folder: Path) -> dict[str, bytes]:
    layer = tar(FILE, link("l", "a"), hard("h", "a"), entry("/".join("abcdefgh" * 20), b"x" * 700), form=tarfile.PAX_FORMAT)
    return {
        "ROOTFS_ARCHIVE": layer,
        "DOCKER_ARCHIVE": docker_archive([layer]),
        "OCI_ARCHIVE": oci_layout([layer], packed=foreign.zstd),
        "GVMI": gvmi(packed(folder), {"Cmd": ["a"]}),
    }


@pytest.mark.parametrize("form", ["ROOTFS_ARCHIVE", "DOCKER_ARCHIVE", "OCI_ARCHIVE", "GVMI"])
def test_bent_packages_convert_or_are_refused(tmp_path: Path, form: str) -> None:
    """Nothing but BadImage comes out of the reader, whatever goes in (within its limits of time and memory)."""
    dice, good = random.Random(f"bent {form}"), seeds(tmp_path)[form]
    counts = {"good": 0, "bad": 0}
    deadline = time.monotonic() + patience(30)
    for _ in range(400):
        data = bytearray(good)
        for _ in range(dice.choice((1, 1, 2, 5, 20))):
            where = dice.randrange(len(data)) if dice.random() < 0.5 else dice.randrange(min(len(data), 1024))
            change = dice.randrange(4)
            if change == 0:
                data[where] = dice.randrange(256)
            elif change == 1:
                data[where] ^= 1 << dice.randrange(8)
            elif change == 2:
                data[where : where + 8] = dice.choice((b"\xff" * 8, bytes(8), struct.pack("<Q", dice.randrange(len(data)))))
            else:
                cut = dice.randrange(1, 600)
                data[where : where + cut] = data[dice.randrange(len(data)) :][:cut]
        try:
            foreign.convert(bytes(data), form, tmp_path)
            counts["good"] += 1
        except BadImage:
            counts["bad"] += 1
        assert time.monotonic() < deadline
    assert counts["bad"] > 50, counts


# -- the sandbox, and a real Engine


@pytest.mark.parametrize(
    ("attacks", "attack"),
    [
        ("ROOTFS_ARCHIVE", "dotdot"), ("ROOTFS_ARCHIVE", "control-characters"), ("ROOTFS_ARCHIVE", "gzip-bomb"),
        ("ROOTFS_ARCHIVE", "exabytes"), ("ROOTFS_ARCHIVE", "pax-gigabyte"), ("ROOTFS_ARCHIVE", "fifo"),
        ("DOCKER_ARCHIVE", "manifest-deep"), ("DOCKER_ARCHIVE", "layer-digest"), ("DOCKER_ARCHIVE", "layer-link-out"),
        ("DOCKER_ARCHIVE", "outer-bomb"), ("DOCKER_ARCHIVE", "other-machine"), ("OCI_ARCHIVE", "zstd-bomb"),
        ("OCI_ARCHIVE", "zstd-damaged"), ("GVMI", "bomb"), ("GVMI", "directory-loop"),
    ],
)  # fmt: skip
@trio_test
async def test_through_the_sandbox(tmp_path: Path, attacks: str, attack: str) -> None:
    """As a provider has it: read by the child, told in its words, and neither an Engine nor a file knows of it."""
    if attacks == "GVMI":
        data, text = SQUASHFS[attack][0](packed(tmp_path)), SQUASHFS[attack][1]
    else:
        data, text = {"ROOTFS_ARCHIVE": ROOTFS, "DOCKER_ARCHIVE": DOCKER, "OCI_ARCHIVE": OCI}[attacks][attack]
    path, digest, folder = tmp_path / "package", hashlib.sha3_224(data).hexdigest(), tmp_path / "locks"
    path.write_bytes(data)
    limits = ImageLimits(**foreign.LIMITS)  # type: ignore[arg-type]
    with pytest.raises(RuntimeFault, match=f"^the image cannot be used: .*(?:{text})") as caught:
        await obtain_image(cast("Admin", Deaf()), path, digest, ImageFormat[attacks], folder=folder, limits=limits)
    assert str(caught.value).isprintable()
    assert list(folder.iterdir()) == []
    assert {one.name for one in tmp_path.iterdir()} <= {"package", "locks", "tree", "s"}


def test_a_reader_that_was_taken_over_cannot_name_other_images(tmp_path: Path) -> None:
    foreign.convert(docker_archive([LAYER, LAYER]), "DOCKER_ARCHIVE", tmp_path)
    good, tag = (tmp_path / "written").read_bytes(), "golem/x:latest"

    def own(data: bytes, tag: str = tag, layers: int = 2) -> bool:
        (tmp_path / "w").write_bytes(data)
        with (tmp_path / "w").open("rb") as file:
            return is_own(file.fileno(), len(data), tag, layers)

    assert own(good)
    manifest = good.index(b"manifest.json\0")
    more = raw_header(b"index.json", size=b"%011o\0" % 2) + padded(b"{}")
    for data in (
        good.replace(b"golem/x:latest", b"golem/y:latest"), good.replace(b'"golem/x:latest"]', b'"golem/y:l", "x"]'),
        good[:manifest] + more + good[manifest:], good[:-1024] + more + good[-1024:], good + more, good[:-512],
        good[:-1] + b"x", more + good, good.replace(b"0000644", b"0000744", 1), good.replace(b"1.tar", b"2.tar", 1), b"",
    ):  # fmt: skip
        assert not own(data)
    assert not own(good, "golem/y:latest")
    assert not own(good, layers=1)


@trio_test
async def test_a_reader_that_wants_too_much_is_ended(tmp_path: Path) -> None:
    """Limits of memory and time hold where the reader's own do not."""
    path = tmp_path / "x"
    path.write_bytes(b"".join(raw_header(b"d" * 90 + b"%d" % n, b"5") for n in range(40_000)) + END)
    small = ImageLimits(memory_bytes=16 << 20)
    short = ImageLimits(wall_s=0.01)
    for limits, text in ((small, "the image cannot be used: .*memory"), (short, r"time limit of 0\.01 s reached")):
        with pytest.raises(RuntimeFault, match=text):
            await obtain_image(
                cast("Admin", Deaf()), path, "0" * 56, ImageFormat.ROOTFS_ARCHIVE, folder=tmp_path / "f", limits=limits
            )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1 << 30


@trio_test
async def test_nothing_of_a_bad_image_is_in_the_engine(engine: LocalEngine, tmp_path: Path) -> None:
    """One that is bad at its last byte, and one that only the Engine can refuse: an owner beyond its mapped ids."""
    admin = Admin(engine.socket)
    before = {image["Id"] for image in await admin.list_images("*")} | {image["Id"] for image in await admin.list_images("*/*")}
    rootfs = busybox_tar({"of": os.fsencode(tmp_path)})
    damaged = docker_archive([rootfs], image_json([rootfs + b"\0"]))
    far = tar(entry("x", b"x", uid=4_000_000_000))
    for data, text in ((damaged, "layer 1 is damaged"), (docker_archive([far]), "Docker Engine: .*(4000000000|range|map)")):
        path, digest = tmp_path / "x", hashlib.sha3_224(data).hexdigest()
        path.write_bytes(data)
        with pytest.raises(RuntimeFault, match=text):
            await obtain_image(admin, path, digest, ImageFormat.DOCKER_ARCHIVE, folder=tmp_path / "f")
        assert await admin.inspect_image(image_tag(digest)) is None
    after = {image["Id"] for image in await admin.list_images("*")} | {image["Id"] for image in await admin.list_images("*/*")}
    assert after == before
