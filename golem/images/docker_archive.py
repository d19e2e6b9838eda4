"""Docker archives (`docker save`) whose bytes follow from the image alone, so that an image has one hash.

What an Engine saves differs with its version, with times and with the tag asked for. Here the archive is written anew:
`manifest.json`, the configuration, then the layers as plain tars, named by their digests, without times, owners and tags.
`docker load` takes it. Used by the command line (`golem image push TAG`) and by what makes images without an Engine
(the demo); providers read archives with `golem.exeunit.runtimes.vm`, which trusts none.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

MANIFEST = "manifest.json"
CHUNK_BYTES = 1 << 20
MAX_JSON_BYTES = 4 << 20
MAX_LAYERS = 127  # as the Engine has it
MAX_LAYER_BYTES = 64 << 30
GZIP_MAGIC = b"\x1f\x8b"
Progress = Callable[[int], None]


class ArchiveError(Exception):
    """An archive cannot be read; the text is for people."""


def write_archive(target: IO[bytes], config: bytes, layers: Sequence[tuple[str, IO[bytes], int]]) -> None:
    """Write an archive of a configuration and its layers, each (SHA-256 in hex, plain tar, size in bytes).

    The digests are not checked against the configuration. Raises `ArchiveError` where a layer has another one.
    """
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as archive:
        name = f"{hashlib.sha256(config).hexdigest()}.json"
        manifest = [{"Config": name, "RepoTags": None, "Layers": [f"{digest}.tar" for digest, _, _ in layers]}]
        _add(archive, MANIFEST, io.BytesIO(_json(manifest)))
        _add(archive, name, io.BytesIO(config))
        written = set()
        for digest, content, size in layers:
            if digest in written:  # an empty layer, for one, comes more than once
                continue
            hashing = _Hashing(content)
            _add(archive, f"{digest}.tar", hashing, size)
            if hashing.sha256.hexdigest() != digest:
                raise ArchiveError(f"a layer has the digest {hashing.sha256.hexdigest()}, its image says {digest}")
            written.add(digest)


def normalise(saved: Path, target: IO[bytes], progress: Progress = lambda size: None) -> None:
    """Write the one image of a saved archive to `target`. `progress` is told bytes read. Raises `ArchiveError`."""
    try:
        with ExitStack() as stack:
            archive = stack.enter_context(tarfile.open(saved, mode="r:"))
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=saved.parent))
            entry = _entry(archive)
            config = _read(archive, entry.get("Config"))
            names = entry.get("Layers")
            digests = _diff_ids(config)
            if not isinstance(names, list) or len(names) != len(digests):
                raise ArchiveError("the layers of its manifest.json and of its configuration are not the same number")
            layers = []
            for number, (name, digest) in enumerate(zip(names, digests, strict=True)):
                content = _extract(archive, name)
                plain, size = _plain(content, Path(folder) / str(number), progress)
                layers.append((digest, stack.enter_context(plain), size))
            write_archive(target, config, layers)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ArchiveError(f"not a Docker archive: {error}") from None


def image_config(command: Sequence[str], diff_ids: Iterable[str], machine: str, **config: Any) -> bytes:
    """Return the configuration of an image with layers of these digests (SHA-256 of the plain tars in hex)."""
    return _json({
        "architecture": machine, "os": "linux", "config": {"Cmd": list(command), **config},
        "created": "1970-01-01T00:00:00Z", "rootfs": {"type": "layers", "diff_ids": [f"sha256:{one}" for one in diff_ids]},
    })  # fmt: skip


def layer_tar(files: Iterable[tuple[str, bytes, int]], folders: Iterable[tuple[str, int]] = ()) -> bytes:
    """Return a layer: files (path, content, mode) and folders (path, mode), all root's, without times."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, mode in folders:
            member = tarfile.TarInfo(path)
            member.type, member.mode = tarfile.DIRTYPE, mode
            archive.addfile(member)
        for path, content, mode in files:
            _add(archive, path, io.BytesIO(content), mode=mode)
    return out.getvalue()


class _Hashing:
    """A reader that hashes what is read through it."""

    def __init__(self, inner: IO[bytes]) -> None:
        self._inner, self.sha256 = inner, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._inner.read(size)
        self.sha256.update(data)
        return data


def _add(archive: tarfile.TarFile, name: str, content: Any, size: int | None = None, mode: int = 0o644) -> None:
    member = tarfile.TarInfo(name)
    member.mode = mode
    member.size = content.seek(0, io.SEEK_END) if size is None else size
    if size is None:
        content.seek(0)
    try:
        archive.addfile(member, content)
    except OSError as error:
        if error.errno is not None:  # of the disk; without a number it is tarfile's own: the content is too short
            raise
        raise ArchiveError(f"{name} is shorter than it says") from None


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def _entry(archive: tarfile.TarFile) -> dict[str, Any]:
    try:
        entries = json.loads(_read(archive, MANIFEST))
    except ValueError:
        raise ArchiveError("its manifest.json is not JSON") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ArchiveError("its manifest.json is not a list of images")
    if len(entries) != 1:
        raise ArchiveError(f"it holds {len(entries)} images instead of one")
    entry: dict[str, Any] = entries[0]
    return entry


def _diff_ids(config: bytes) -> list[str]:
    try:
        found = json.loads(config)["rootfs"]["diff_ids"]
    except (ValueError, KeyError, TypeError):
        raise ArchiveError("its configuration names no layers (rootfs.diff_ids)") from None
    if not isinstance(found, list) or len(found) > MAX_LAYERS or not all(_is_digest(one) for one in found):
        raise ArchiveError("the layers of its configuration are not SHA-256 digests")
    return [one.removeprefix("sha256:") for one in found]


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"sha256:[0-9a-f]{64}", value) is not None


def _extract(archive: tarfile.TarFile, name: Any) -> IO[bytes]:
    """Return the content of a member, behind links inside the archive too (Engines link equal layers)."""
    try:
        content = archive.extractfile(name) if isinstance(name, str) else None
    except KeyError:
        content = None
    if content is None:
        raise ArchiveError(f"it has no file {str(name)[:100]!r}")
    return content


def _read(archive: tarfile.TarFile, name: Any) -> bytes:
    data = _extract(archive, name).read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ArchiveError(f"its file {name} is too large")
    return data


def _plain(content: IO[bytes], spool: Path, progress: Progress) -> tuple[IO[bytes], int]:
    """Return a layer as a plain tar and its size; a compressed one is unpacked to `spool`."""
    head = content.read(2)
    content.seek(0)
    if head != GZIP_MAGIC:
        size = content.seek(0, io.SEEK_END)
        content.seek(0)
        progress(size)
        return content, size
    size = 0
    with gzip.open(content) as inner, spool.open("wb") as out:
        while data := inner.read(CHUNK_BYTES):
            size += out.write(data)
            progress(len(data))
            if size > MAX_LAYER_BYTES:
                raise ArchiveError(f"a layer unpacks to more than {MAX_LAYER_BYTES} bytes")
    return spool.open("rb"), size
