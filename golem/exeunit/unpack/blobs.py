"""Docker archives and OCI layouts as the blobs that they are: members of a tar by name, and the manifests that name them.

Digests are checked where they are declared. Neighbours: `archives` writes the layers anew; `tarball` reads the tar.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from golem.exeunit.unpack.config import read_json, text_of
from golem.exeunit.unpack.inflate import BadImage, Part
from golem.exeunit.unpack.tarball import Kind, Names, TarReader, shown

MAX_BLOBS = 10_000
MAX_JSON_BYTES = 4 << 20
MAX_INDEX_DEPTH = 3
MAX_LINKS = 5
_DIGEST = re.compile(r"sha(256|512):([0-9a-f]{64}|[0-9a-f]{128})")


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


def docker_manifest(blobs: Blobs) -> tuple[bytes, list[Blob]]:
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


def oci_manifest(blobs: Blobs, machine: str) -> tuple[bytes, list[Blob]]:
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
    raw, found = blobs.small(blob.name), hash_of(str(blob.digest), what)
    found.update(raw)
    if found.hexdigest() != hex_of(str(blob.digest)):
        raise BadImage(f"{what} is damaged or another: its digest is not {blob.digest}")
    return raw


def hash_of(digest: str, what: str) -> Any:
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


def hex_of(digest: str) -> str:
    return digest.partition(":")[2]


def _quoted(name: str) -> str:
    return shown(name.encode("utf-8", "backslashreplace"))
