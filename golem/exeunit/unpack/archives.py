"""Packages of four formats, read with suspicion and written anew as one plain Docker archive.

Docker archives (`docker save`) and OCI layouts keep their layers; a root file system or the squashfs of a GVMI becomes
the one layer of its image. Digests are checked as they are declared: of an OCI layout's blobs, of a Docker archive's
configuration, of every layer as the configuration names it. The archive written holds `<n>.tar`, `config.json` and
`manifest.json` (last), all in our own words: of the image's configuration what `config` keeps, of its layers what
`tarball` does. So the digests in it are new ones, the same for the same package.

Runs in the sandboxed child of `images`, called by `unpack`. Neighbours: `blobs`, `tarball`, `inflate`, `squashfs`, `config`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from golem.exeunit.runtimes.vm.accounts import Accounts
from golem.exeunit.unpack.blobs import Blob, Blobs, docker_manifest, hash_of, hex_of, oci_manifest
from golem.exeunit.unpack.config import check_platform, image_config, read_json, text_of
from golem.exeunit.unpack.inflate import (
    BZIP2_MAGIC,
    CHUNK_BYTES,
    GZIP_MAGIC,
    XZ_MAGIC,
    BadImage,
    ByteSource,
    Part,
    Ratio,
    inflated,
)
from golem.exeunit.unpack.squashfs import Squashfs, read_metadata
from golem.exeunit.unpack.tarball import BLOCK_BYTES, Kind, Member, Names, TarReader, TarWriter, header, shown, write_all

COST_LABEL, MEMBERS_LABEL = "golem.cost", "golem.members"
NAME_BYTES = 4096  # of a disk, that a file, directory or link takes beside its content
OWN_CONFIG, OWN_MANIFEST = "config.json", "manifest.json"


@dataclass(frozen=True)
class ArchiveLimits:
    """Bounds of one package; see `images.ImageLimits`. `room`: bytes of disk that may be written."""

    unpacked_bytes: int
    members: int
    layers: int
    ratio: int
    free_bytes: int
    room: int

    @property
    def bomb(self) -> Ratio:
        """What tells a bomb."""
        return Ratio(self.ratio, self.free_bytes)


@dataclass(frozen=True)
class Package:
    """An open file that holds one: `size` bytes, for a `machine` (amd64, arm64 ...).

    `inflated_to`: an empty file for a compressed archive of blobs. `progress` is told the share of it that is done.
    """

    descriptor: int
    size: int
    inflated_to: int
    machine: str
    limits: ArchiveLimits
    progress: Callable[[float], None]


class Budget:
    """What all layers together may still bring."""

    def __init__(self, limits: ArchiveLimits) -> None:
        self._limits = limits
        self._bytes = self.members = 0
        self.kept = 0  # names that the image has in the end, so that an image that is saved and read again costs the same
        self.kept_bytes = 0

    def take(self, member: Member) -> None:
        """Errors: BadImage, before a byte of the member is read."""
        self._bytes += member.size + 2 * BLOCK_BYTES
        self.name(1)
        if self._bytes > self._limits.unpacked_bytes:
            raise BadImage(f"it unpacks to more than {self._limits.unpacked_bytes} bytes ({shown(member.name)})")
        if self._bytes > self._limits.room:
            raise BadImage(f"it unpacks to more than the {self._limits.room} bytes of disk space left here")

    def name(self, count: int) -> None:
        """Take names: of members, and of directories that are there because something is in them. Errors: BadImage."""
        self.members += count
        if self.members > self._limits.members:
            raise BadImage(f"more than {self._limits.members} files, directories and links")

    def keep(self, size: int, names: int = 1) -> None:
        """Count what the image gets."""
        self.kept += names
        self.kept_bytes += size

    @property
    def cost_bytes(self) -> int:
        """What the image takes of the Engine's disk: each name a block, whatever its size."""
        return self.kept_bytes + self.kept * NAME_BYTES

    @property
    def unpacked(self) -> int:
        """Bytes taken so far."""
        return self._bytes


class ArchiveOutput:
    """The archive being written."""

    def __init__(self, descriptor: int, tag: str) -> None:
        self._descriptor, self._tag = descriptor, tag
        self.diff_ids: list[str] = []
        self.members = 0

    def add_layer(self, fill: Callable[[TarWriter], None]) -> None:
        """Write one layer with `fill`; its size goes into its header afterwards."""
        start = os.lseek(self._descriptor, 0, os.SEEK_CUR)
        os.lseek(self._descriptor, BLOCK_BYTES, os.SEEK_CUR)
        layer = TarWriter(self._descriptor)
        fill(layer)
        layer.finish()
        name = f"{len(self.diff_ids)}.tar"
        os.pwrite(self._descriptor, _own_header(name, layer.size), start)
        self.diff_ids.append(f"sha256:{layer.hash.hexdigest()}")

    def finish(self, config: dict[str, Any], budget: Budget) -> None:
        """Write the configuration and the list of what is there; what it all costs is a label of the image."""
        self.members = budget.kept
        config["config"]["Labels"] = {COST_LABEL: str(budget.cost_bytes), MEMBERS_LABEL: str(budget.kept)}
        config = {**config, "rootfs": {"type": "layers", "diff_ids": self.diff_ids}}
        manifest = _own_manifest(self._tag, len(self.diff_ids))
        for name, data in ((OWN_CONFIG, json.dumps(config).encode()), (OWN_MANIFEST, manifest)):
            write_all(self._descriptor, _own_header(name, len(data)))
            write_all(self._descriptor, data + bytes(-len(data) % BLOCK_BYTES))
        write_all(self._descriptor, bytes(2 * BLOCK_BYTES))


def _own_manifest(tag: str, layers: int) -> bytes:
    names = [f"{number}.tar" for number in range(layers)]
    return json.dumps([{"Config": OWN_CONFIG, "RepoTags": [tag], "Layers": names}]).encode()


def _own_header(name: str, size: int) -> bytes:
    return header(Member(name.encode(), Kind.FILE, 0o644, size=size))


def is_own(descriptor: int, size: int, tag: str, layers: int) -> bool:
    """Whether a file is an archive as `ArchiveOutput` writes it, with this tag and no other.

    For the one who gave the package to the sandboxed child: a child that a package has taken over could otherwise have
    the Engine give other names, those of other packages, to images of its choice.
    """
    at = 0
    for name in (*(f"{number}.tar" for number in range(layers)), OWN_CONFIG, OWN_MANIFEST):
        block = os.pread(descriptor, BLOCK_BYTES, at)
        octal = re.fullmatch(rb"[0-7]{11}", block[124:135])
        length = int(octal[0], 8) if octal is not None else int.from_bytes(block[125:136], "big")
        if block != _own_header(name, length):
            return False
        at += BLOCK_BYTES + length + -length % BLOCK_BYTES
    manifest = _own_manifest(tag, layers)
    start = at - len(manifest) - -len(manifest) % BLOCK_BYTES
    whole = os.pread(descriptor, len(manifest), start) == manifest and length == len(manifest)
    return whole and size == at + 2 * BLOCK_BYTES and not any(os.pread(descriptor, 2 * BLOCK_BYTES, at))


def copy_layer(source: ByteSource, what: str, names: Names, layer: TarWriter, budget: Budget, accounts: Accounts) -> None:
    """Copy the members of a tar into a layer. Errors: BadImage."""
    accounts.next_layer()
    reader = TarReader(source, what)
    while (member := reader.next()) is not None:
        budget.take(member)
        implied = names.implied
        plain = names.admit(member)
        budget.name(names.implied - implied)
        budget.keep(0, names.implied - implied)
        if plain is None:
            continue
        budget.keep(plain.size)
        accounts.see(plain)
        layer.add(plain)
        if plain.size:
            while chunk := reader.read(CHUNK_BYTES):
                layer.write(chunk)
            layer.end_file(plain.size)
    if not reader.position:
        raise BadImage(f"{what}: it is empty")


# -- root file systems and GVMI: one layer


def convert_rootfs(package: Package, output: ArchiveOutput) -> None:
    """Convert a tar of a root file system, plain or compressed; it has no configuration. Errors: BadImage."""
    part = Part(package.descriptor, 0, package.size, _counting(package.size, package.progress))
    source = inflated(part, "the archive", package.limits.bomb)
    names, budget, accounts = Names("the archive", whiteouts=False), Budget(package.limits), Accounts()
    output.add_layer(lambda layer: copy_layer(source, "the archive", names, layer, budget, accounts))
    accounts.check()
    output.finish(image_config({}, package.machine), budget)


def convert_gvmi(package: Package, output: ArchiveOutput) -> None:
    """Convert squashfs with the configuration behind it. Errors: BadImage."""
    given, squashfs_bytes = read_metadata(package.descriptor, package.size)
    config = image_config(given, package.machine)
    files = Squashfs(package.descriptor, squashfs_bytes, package.limits.members)
    names, budget, bomb = Names("the squashfs", whiteouts=False), Budget(package.limits), package.limits.bomb
    accounts = Accounts()

    def fill(layer: TarWriter) -> None:
        for number, (member, content) in enumerate(files.members()):
            budget.take(member)
            bomb.check(squashfs_bytes, budget.unpacked)
            package.progress(min(1.0, number / max(1, files.inodes)))
            plain = names.admit(member)
            if plain is None:
                continue
            budget.keep(plain.size)
            accounts.see(plain)
            layer.add(plain)
            for chunk in content():
                layer.write(chunk)
            layer.end_file(plain.size)

    output.add_layer(fill)
    accounts.check()
    output.finish(config, budget)


# -- Docker archives and OCI layouts: blobs in a tar


def convert_blobs(package: Package, output: ArchiveOutput) -> None:
    """Convert a Docker archive or an OCI layout, itself plain or compressed. Errors: BadImage.

    New Engines save both in one; then it is read as a Docker archive.
    """
    descriptor, size, limits, begun = package.descriptor, package.size, package.limits, 0.0
    if os.pread(descriptor, len(XZ_MAGIC), 0).startswith((GZIP_MAGIC, XZ_MAGIC, BZIP2_MAGIC)):
        begun = 0.5
        descriptor, size = package.inflated_to, _inflate(package, begun)
    blobs = Blobs(descriptor, size)
    raw, layers = oci_manifest(blobs, package.machine) if blobs.oci_alone else docker_manifest(blobs)
    image = read_json(raw, "the image's configuration")
    if not isinstance(image, dict):
        raise BadImage("the image's configuration is not an object")
    check_platform(image, package.machine)
    config = image_config(image.get("config") or {}, package.machine)
    rootfs = image.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not 0 < len(layers) <= limits.layers:
        raise BadImage(f"the image has {len(layers)} layers, it must have 1 to {limits.layers}")
    if not isinstance(diff_ids, list) or len(diff_ids) != len(layers):
        raise BadImage("the image's configuration does not name as many layers as there are")
    total = sum(blobs.find(layer.name)[1] for layer in layers)
    count = _counting(total, lambda share: package.progress(begun + share * (1 - begun)))
    budget, accounts = Budget(limits), Accounts()
    for number, (layer, diff_id) in enumerate(zip(layers, diff_ids, strict=True), 1):
        what = f"layer {number}"
        source = _Layer(blobs, layer, what, text_of(diff_id, f"{what}: digest"), limits, count)
        names = Names(what, whiteouts=True)
        output.add_layer(lambda writer: copy_layer(source, what, names, writer, budget, accounts))  # noqa: B023 (called at once)
        source.check()
    accounts.check()
    output.finish(config, budget)


class _Layer:
    """The plain stream of one layer, whose digests are right when `check` says nothing."""

    def __init__(
        self, blobs: Blobs, blob: Blob, what: str, diff_id: str, limits: ArchiveLimits, count: Callable[[bytes], None]
    ) -> None:
        self._blob, self._what, self._diff_id, self._count = blob, what, diff_id, count
        self._packed = hash_of(blob.digest, what) if blob.digest is not None else None
        self._plain = hash_of(diff_id, what)
        self._part = blobs.part(blob.name, self._seen)
        self._source = inflated(self._part, what, limits.bomb)
        self._left = limits.unpacked_bytes + limits.free_bytes  # with what may follow the end of the tar

    def _seen(self, chunk: bytes) -> None:
        self._count(chunk)
        if self._packed is not None:
            self._packed.update(chunk)

    def read(self, most: int) -> bytes:
        """Errors: BadImage."""
        chunk = self._source.read(most)
        self._left -= len(chunk)
        if self._left < 0:
            raise BadImage(f"{self._what}: it unpacks to too much")
        self._plain.update(chunk)
        return chunk

    def check(self) -> None:
        """Read to the end and compare digests. Errors: BadImage."""
        while self.read(CHUNK_BYTES):
            pass
        self._part.drain()
        if self._packed is not None and self._packed.hexdigest() != hex_of(str(self._blob.digest)):
            raise BadImage(f"{self._what} is damaged or another: its digest is not {self._blob.digest}, as the manifest says")
        if self._plain.hexdigest() != hex_of(self._diff_id):
            raise BadImage(f"{self._what} is damaged or another: its digest is not {self._diff_id}, as the configuration says")


def _inflate(package: Package, share: float) -> int:
    """Inflate the whole archive into a file, because its parts are needed in another order; returns its size."""
    limits = package.limits
    part = Part(package.descriptor, 0, package.size, _counting(package.size, lambda done: package.progress(done * share)))
    source, written = inflated(part, "the archive", limits.bomb), 0
    most = min(limits.unpacked_bytes, limits.room // 2)
    while chunk := source.read(CHUNK_BYTES):
        written += len(chunk)
        if written > most:
            raise BadImage(f"the archive inflates to more than {most} bytes")
        write_all(package.inflated_to, chunk)
    return written


def _counting(total: int, progress: Callable[[float], None]) -> Callable[[bytes], None]:
    done = 0

    def seen(chunk: bytes) -> None:
        nonlocal done
        done += len(chunk)
        progress(min(1.0, done / max(1, total)))

    return seen
