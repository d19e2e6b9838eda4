"""Reading a WASI package: a zip with `manifest.json` at its root and WebAssembly modules beside it.

The file comes from a stranger: sizes are capped before and while inflating, only stored and deflated entries are read,
and nothing is ever unpacked under a name of the package's choosing. Neighbour: `wasm`, which lays out the mounts.
"""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from golem.exeunit.runtime import RuntimeFault, guest_path

MAX_MANIFEST_BYTES = 1 << 20
MAX_ENTRIES = 10_000
MAX_DIRECTORY_BYTES = 4 << 20
MAX_ENTRY_POINTS = 256
MAX_MOUNTS = 64

_END_RECORD_BYTES = 22
_END_SIGNATURE = b"PK\x05\x06"
_ZIP64_LOCATOR = b"PK\x06\x07"
_ENCRYPTED = 1

MountKind = Literal["ro", "rw", "wo", "private"]


@dataclass(frozen=True)
class Mount:
    """A mount point: guest path and who may write. `wo` is rw; `private` is rw and takes no transfers."""

    kind: MountKind
    path: str


@dataclass(frozen=True)
class WasmPackage:
    """`entry_points`: entry id -> path of its module inside the zip; that path is also the command's argv[0]."""

    id: str
    name: str
    entry_points: Mapping[str, str]
    mounts: tuple[Mount, ...]


def read_package(path: Path) -> WasmPackage:
    """Read and check the manifest.

    Errors: RuntimeFault with a text for the requestor.
    """
    with _open(path) as archive:
        raw = b"".join(_inflate(archive, "manifest.json", MAX_MANIFEST_BYTES))
        try:
            manifest = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise RuntimeFault(f"manifest.json is not valid JSON: {error}") from None
        package = _parse(manifest)
        names = set(archive.namelist())
    for entry, module in package.entry_points.items():
        if module not in names:
            raise RuntimeFault(f"entry point {entry!r}: {module!r} is not in the package")
    return package


def copy_module(path: Path, module: str, target: BinaryIO, max_bytes: int) -> None:
    """Inflate one module of the package into an open file.

    Errors: RuntimeFault when it is larger than `max_bytes` or damaged.
    """
    with _open(path) as archive:
        for chunk in _inflate(archive, module, max_bytes):
            target.write(chunk)


def _open(path: Path) -> zipfile.ZipFile:
    """Open a zip whose central directory is of sane size (it is read into memory whole)."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 65536 - _END_RECORD_BYTES - 20))
        end = file.read()
    at = end.rfind(_END_SIGNATURE)
    if at < 0 or len(end) - at < _END_RECORD_BYTES:
        raise RuntimeFault("the package is not a complete zip file")
    if _ZIP64_LOCATOR in end[max(0, at - 20) : at]:
        raise RuntimeFault("zip64 packages are not accepted")
    entries, directory_bytes = struct.unpack_from("<HI", end, at + 10)
    if entries > MAX_ENTRIES or directory_bytes > MAX_DIRECTORY_BYTES:
        raise RuntimeFault(f"the package has too many entries: at most {MAX_ENTRIES}")
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise RuntimeFault(f"the package is not a valid zip file: {error}") from None


def _inflate(archive: zipfile.ZipFile, name: str, max_bytes: int) -> list[bytes]:
    """Content of an entry in chunks; the declared size is checked first, the true one as it comes."""
    try:
        entry = archive.getinfo(name)
    except KeyError:
        raise RuntimeFault(f"the package has no {name}") from None
    if entry.flag_bits & _ENCRYPTED or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise RuntimeFault(f"{name}: only stored or deflated entries are accepted")
    if entry.file_size > max_bytes:
        raise RuntimeFault(f"{name} is too large: {entry.file_size} bytes, at most {max_bytes}")
    chunks, total = [], 0
    try:
        with archive.open(entry) as file:
            while chunk := file.read(1 << 20):
                total += len(chunk)
                if total > max_bytes:
                    raise RuntimeFault(f"{name} is too large: more than {max_bytes} bytes")
                chunks.append(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        raise RuntimeFault(f"{name} is damaged: {error}") from None
    return chunks


def _parse(manifest: object) -> WasmPackage:
    if not isinstance(manifest, Mapping):
        raise RuntimeFault("manifest.json must hold an object")
    runtime = manifest.get("runtime", "wasi")
    if runtime != "wasi":
        raise RuntimeFault(f"the package is for runtime {runtime!r}; only wasi packages run here")
    entries = _objects(manifest, "entry-points", MAX_ENTRY_POINTS)
    if not entries:
        raise RuntimeFault("manifest.json has no entry-points")
    points: dict[str, str] = {}
    for entry in entries:
        module = _text(entry, "wasm-path")
        if module.startswith("/") or "\\" in module or ".." in module.split("/"):
            raise RuntimeFault(f"wasm-path {module!r} leads out of the package")
        points.setdefault(_text(entry, "id"), module)  # the first of a name counts
    mounts = [_mount(entry) for entry in _objects(manifest, "mount-points", MAX_MOUNTS)]
    if len({mount.path for mount in mounts}) != len(mounts):
        raise RuntimeFault("manifest.json names a mount point twice")
    return WasmPackage(_text(manifest, "id"), _text(manifest, "name"), points, tuple(mounts))


def _mount(entry: Mapping[str, object]) -> Mount:
    if len(entry) != 1:
        raise RuntimeFault("a mount point has one key: ro, rw, wo or private")
    ((kind, path),) = entry.items()
    if kind not in ("ro", "rw", "wo", "private"):
        raise RuntimeFault(f"unknown mount point kind {kind!r}: expected ro, rw, wo or private")
    return Mount(kind, guest_path(path))  # type: ignore[arg-type]


def _objects(manifest: Mapping[str, object], key: str, most: int) -> list[Mapping[str, object]]:
    items = manifest.get(key) or []
    if not isinstance(items, list) or len(items) > most or not all(isinstance(item, Mapping) for item in items):
        raise RuntimeFault(f"manifest.json: {key} must be a list of at most {most} objects")
    return items


def _text(entry: Mapping[str, object], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise RuntimeFault(f"manifest.json: {key} must be a text")
    return value
