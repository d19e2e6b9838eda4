"""Packages of four formats, read with suspicion and written anew as one plain Docker archive.

Docker archives (`docker save`) and OCI layouts keep their layers; a root file system or the squashfs of a GVMI becomes
the one layer of its image. Digests are checked as they are declared: of an OCI layout's blobs, of a Docker archive's
configuration, of every layer as the configuration names it. The archive written holds `<n>.tar`, `config.json` and
`manifest.json` (last), all in our own words: of the image's configuration what `config` keeps, of its layers what
`tarball` does. So the digests in it are new ones, the same for the same package.

Runs in the sandboxed child of `images`, called by `unpack`. Neighbours: `tarball`, `inflate`, `squashfs`, `config`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from golem.exeunit.runtimes.vm.accounts import Accounts
from golem.exeunit.unpack.config import check_platform, image_config, read_json, text_of
from golem.exeunit.unpack.inflate import CHUNK_BYTES, GZIP_MAGIC, BadImage, ByteSource, Part, Ratio, inflated
from golem.exeunit.unpack.squashfs import Squashfs, read_metadata
from golem.exeunit.unpack.tarball import BLOCK_BYTES, Kind, Member, Names, TarReader, TarWriter, header, shown, write_all

COST_LABEL, MEMBERS_LABEL = "golem.cost", "golem.members"
NAME_BYTES = 4096  # of a disk, that a file, directory or link takes beside its content
MAX_BLOBS = 10_000
MAX_JSON_BYTES = 4 << 20
MAX_INDEX_DEPTH = 3
MAX_LINKS = 5
OWN_CONFIG, OWN_MANIFEST = "config.json", "manifest.json"
_DIGEST = re.compile(r"sha(256|512):([0-9a-f]{64}|[0-9a-f]{128})")


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


class Blobs:
    """The files of an outer tar by name; Docker links a layer that occurs twice."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._files: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        file, names = _Skipping(descriptor, size), Names("the archive", whiteouts=True)
        reader = TarReader(file, "the archive", file.skip)
        count = 0
        while (member := reader.next()) is not None:
            count += 1
            plain = names.admit(member)
            if count > MAX_BLOBS:
                raise BadImage(f"the archive: more than {MAX_BLOBS} members")
            if plain is None or plain.kind is Kind.DIRECTORY:
                continue
            name = plain.name.decode("utf-8", "surrogateescape")
            if plain.kind is Kind.HARD_LINK:
                raise BadImage(f"the archive: {shown(plain.name)} is a hard link")
            if name in self._files or name in self._links:
                raise BadImage(f"the archive: {shown(plain.name)} is there twice")
            if plain.kind is Kind.SYMLINK:
                self._links[name] = plain.link.decode("utf-8", "surrogateescape")
            else:
                if reader.position + plain.size > size:
                    raise BadImage("the archive: it ends too early")
                self._files[name] = (reader.position, plain.size)

    @property
    def oci_alone(self) -> bool:
        """Whether this is an OCI layout and no Docker archive as well."""
        return "index.json" in self._files and "manifest.json" not in self._files

    def find(self, name: str) -> tuple[int, int]:
        """Return where a file begins and its size. Errors: BadImage."""
        wanted = name
        for _ in range(MAX_LINKS):
            if wanted in self._files:
                return self._files[wanted]
            if wanted not in self._links:
                break
            parts = wanted.split("/")[:-1]
            for part in self._links[wanted].split("/"):
                if part == "..":
                    if not parts:
                        raise BadImage(f"the archive: {_quoted(name)} is a link that leads out of it")
                    parts.pop()
                elif part not in ("", "."):
                    parts.append(part)
            if self._links[wanted].startswith("/"):
                raise BadImage(f"the archive: {_quoted(name)} is a link that leads out of it")
            wanted = "/".join(parts)
        raise BadImage(f"the archive has no {_quoted(name)}")

    def small(self, name: str) -> bytes:
        """Return the content of a file that is to be parsed. Errors: BadImage, also where it is too large."""
        offset, size = self.find(name)
        if size > MAX_JSON_BYTES:
            raise BadImage(f"{_quoted(name)} has {size} bytes, at most {MAX_JSON_BYTES}")
        return os.pread(self._descriptor, size, offset)

    def part(self, name: str, seen: Callable[[bytes], None]) -> Part:
        """Return the content of a file as a stream."""
        return Part(self._descriptor, *self.find(name), seen)


class _Skipping:
    """A file read by position, where passing over content costs nothing."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor, self._at, self._size = descriptor, 0, size

    def read(self, most: int) -> bytes:
        chunk = os.pread(self._descriptor, max(0, min(most, self._size - self._at)), self._at)
        self._at += len(chunk)
        return chunk

    def skip(self, size: int) -> None:
        """Pass over content."""
        self._at += size


@dataclass(frozen=True)
class Blob:
    """A layer: its name in the archive, and its digest and size where they are declared."""

    name: str
    digest: str | None = None
    size: int | None = None


def convert_blobs(package: Package, output: ArchiveOutput) -> None:
    """Convert a Docker archive or an OCI layout, itself plain or gzip. Errors: BadImage.

    New Engines save both in one; then it is read as a Docker archive.
    """
    descriptor, size, limits, begun = package.descriptor, package.size, package.limits, 0.0
    if os.pread(descriptor, len(GZIP_MAGIC), 0) == GZIP_MAGIC:
        begun = 0.5
        descriptor, size = package.inflated_to, _inflate(package, begun)
    blobs = Blobs(descriptor, size)
    raw, layers = _oci_manifest(blobs, package.machine) if blobs.oci_alone else _docker_manifest(blobs)
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
        self._packed = _hash_of(blob.digest, what) if blob.digest is not None else None
        self._plain = _hash_of(diff_id, what)
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
        if self._packed is not None and self._packed.hexdigest() != _hex(str(self._blob.digest)):
            raise BadImage(f"{self._what} is damaged or another: its digest is not {self._blob.digest}, as the manifest says")
        if self._plain.hexdigest() != _hex(self._diff_id):
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


def _docker_manifest(blobs: Blobs) -> tuple[bytes, list[Blob]]:
    """Return the configuration's text and the layers of a Docker archive."""
    entries = read_json(blobs.small("manifest.json"), "manifest.json")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise BadImage("manifest.json must be a list of images")
    if len(entries) != 1:
        raise BadImage(f"the archive holds {len(entries)} images: save one alone")
    name = text_of(entries[0].get("Config"), "manifest.json: Config")
    layers = entries[0].get("Layers")
    if not isinstance(layers, list):
        raise BadImage("manifest.json: Layers must be a list")
    raw = blobs.small(_inside(name))
    match = re.fullmatch(r"(?:blobs/sha256/)?([0-9a-f]{64})(?:\.json)?", name)
    if match is not None and hashlib.sha256(raw).hexdigest() != match[1]:
        raise BadImage("the image's configuration is damaged or another: its digest is not the one in its name")
    found = [Blob(_inside(text_of(layer, "manifest.json: a layer"))) for layer in layers]
    return raw, found


def _oci_manifest(blobs: Blobs, machine: str) -> tuple[bytes, list[Blob]]:
    """Return the configuration's text and the layers of an OCI layout's image for this machine."""
    manifest = _pick(blobs, read_json(blobs.small("index.json"), "index.json"), machine, 0)
    raw = _read_blob(blobs, manifest.get("config"), "the image's configuration")
    layers = manifest.get("layers")
    if not isinstance(layers, list):
        raise BadImage("the manifest has no list of layers")
    return raw, [_descriptor(layer, f"layer {number}") for number, layer in enumerate(layers, 1)]


def _pick(blobs: Blobs, index: Any, machine: str, depth: int) -> dict[str, Any]:
    """Return the manifest for this machine, also from an index within an index."""
    entries = index.get("manifests") if isinstance(index, dict) else None
    if not isinstance(entries, list) or len(entries) > MAX_BLOBS or not all(isinstance(one, dict) for one in entries):
        raise BadImage("index.json must have a list of manifests")
    seen = []
    for entry in entries:
        platform = entry.get("platform")
        platform = platform if isinstance(platform, dict) else {}
        name = f"{platform.get('os', 'linux')}/{platform.get('architecture', machine)}"
        if name != f"linux/{machine}":
            seen.append(name)
            continue
        found = read_json(_read_blob(blobs, entry, "a manifest"), "a manifest")
        if not isinstance(found, dict):
            raise BadImage("a manifest is not an object")
        if "manifests" not in found:
            return found
        if depth + 1 >= MAX_INDEX_DEPTH:
            raise BadImage(f"indexes within indexes, more than {MAX_INDEX_DEPTH} deep")
        return _pick(blobs, found, machine, depth + 1)
    there = ", ".join(dict.fromkeys(seen))[:200] or "none at all"
    raise BadImage(f"no image for linux/{machine}, which this provider is; there is {there}")


def _descriptor(entry: Any, what: str) -> Blob:
    """Return a blob that an OCI descriptor names."""
    if not isinstance(entry, dict):
        raise BadImage(f"{what}: its descriptor is not an object")
    digest, size = text_of(entry.get("digest"), f"{what}: digest"), entry.get("size")
    if _DIGEST.fullmatch(digest) is None:
        raise BadImage(f"{what}: {digest[:100]!r} is no digest")
    if not isinstance(size, int) or size < 0:
        raise BadImage(f"{what}: its size is not given")
    return Blob(f"blobs/{digest.replace(':', '/')}", digest, size)


def _read_blob(blobs: Blobs, entry: Any, what: str) -> bytes:
    blob = _descriptor(entry, what)
    raw, found = blobs.small(blob.name), _hash_of(str(blob.digest), what)
    found.update(raw)
    if found.hexdigest() != _hex(str(blob.digest)):
        raise BadImage(f"{what} is damaged or another: its digest is not {blob.digest}")
    return raw


def _hash_of(digest: str, what: str) -> Any:
    """Return a fresh hash of a digest's kind."""
    match = _DIGEST.fullmatch(digest)
    if match is None or len(match[2]) * 4 != int(match[1]):
        raise BadImage(f"{what}: {digest[:100]!r} is no digest")
    return hashlib.new(f"sha{match[1]}")


def _inside(name: str) -> str:
    """Return a name of the manifest as the members of the archive have it."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts:
        raise BadImage(f"manifest.json: {_quoted(name)} leads out of the archive")
    return "/".join(parts)


def _hex(digest: str) -> str:
    return digest.partition(":")[2]


def _quoted(name: str) -> str:
    return shown(name.encode("utf-8", "backslashreplace"))


def _counting(total: int, progress: Callable[[float], None]) -> Callable[[bytes], None]:
    done = 0

    def seen(chunk: bytes) -> None:
        nonlocal done
        done += len(chunk)
        progress(min(1.0, done / max(1, total)))

    return seen
