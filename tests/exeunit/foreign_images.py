"""Images as strangers make them, well or badly, built by hand: tars, Docker archives, OCI layouts, squashfs and GVMI."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import platform
import shutil
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import zstandard

from golem.exeunit.unpack import child as unpack

MACHINE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
COMPRESSORS = ("gzip", "lzo", "xz", "lz4", "zstd")
LIMITS = {
    "unpacked_bytes": 64 << 20,
    "members": 20_000,
    "layers": 125,
    "ratio": 50,
    "free_bytes": 4 << 20,
    "cpu_s": 60,
    "memory_bytes": 512 << 20,
}

Layer = dict[str, tuple[tarfile.TarInfo, bytes]]
Entry = tuple[str, bytes | None, dict[str, Any]]


def entry(name: str, content: bytes | None = None, **fields: Any) -> Entry:
    """Return a member for `tar`: a file of `content`, or what the fields of a TarInfo say."""
    return name, content, fields


def tar(*entries: Entry, form: int = tarfile.GNU_FORMAT) -> bytes:
    """Build a tar of members in this order."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, content, fields in entries:
            member = tarfile.TarInfo(name)
            member.mode = 0o755
            for key, value in fields.items():
                setattr(member, key, value)
            if content is not None and "size" not in fields:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content or b""))
    return out.getvalue()


def raw_header(name: bytes, flag: bytes = b"0", size: bytes = b"%011o\0" % 0, link: bytes = b"") -> bytes:
    """Return a header block with fields as given and a right checksum."""
    block = b"".join(
        [name.ljust(100, b"\0"), b"0000755\0", b"0000000\0" * 2, size, b"%011o\0" % 0, b" " * 8, flag,
         link.ljust(100, b"\0"), b"ustar\x0000"]
    ).ljust(512, b"\0")  # fmt: skip
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def image_json(layers: Sequence[bytes], config: Mapping[str, Any] | None = None, **more: Any) -> bytes:
    """Return a configuration as Docker writes it for plain layers."""
    ids = [f"sha256:{sha256(layer)}" for layer in layers]
    return json.dumps(
        {
            "architecture": MACHINE, "os": "linux", "config": dict(config or {}), "history": [{"created_by": "x"}],
            "rootfs": {"type": "layers", "diff_ids": ids}, **more,
        }
    ).encode()  # fmt: skip


def docker_archive(
    layers: Sequence[bytes],
    config: bytes | None = None,
    *,
    files: Mapping[str, bytes] | None = None,
    extra: Sequence[Entry] = (),
    manifest: Any = None,
) -> bytes:
    """Build what `docker save` of Engine 20.10 writes. `files` replaces members by name."""
    raw = config if config is not None else image_json(layers)
    members = {f"{number:064x}/layer.tar": layer for number, layer in enumerate(layers)}
    entries = [{"Config": f"{sha256(raw)}.json", "RepoTags": ["attacker/name:latest"], "Layers": list(members)}]
    members[f"{sha256(raw)}.json"] = raw
    members["manifest.json"] = json.dumps(entries if manifest is None else manifest).encode()
    members["repositories"] = b'{"attacker/name":{"latest":"x"}}'
    members.update(files or {})
    return tar(*(entry(name, content) for name, content in members.items()), *extra)


def oci_layout(
    layers: Sequence[bytes],
    config: bytes | None = None,
    *,
    packed: Callable[[bytes], bytes] = gzip.compress,
    files: Mapping[str, bytes] | None = None,
    platforms: Sequence[Mapping[str, str] | None] = (None,),
    nested: int = 0,
    missing: bool = False,
) -> bytes:
    """Build an OCI layout in a tar. `platforms`: a manifest for each; `nested`: so many indexes around them."""
    blobs: dict[str, bytes] = {}

    def blob(data: bytes, media: str) -> dict[str, Any]:
        blobs[f"blobs/sha256/{sha256(data)}"] = data
        return {"mediaType": media, "digest": f"sha256:{sha256(data)}", "size": len(data)}

    raw = config if config is not None else image_json(layers)
    manifest = {
        "schemaVersion": 2,
        "config": blob(raw, "application/vnd.oci.image.config.v1+json"),
        "layers": [blob(packed(layer), "application/vnd.oci.image.layer.v1.tar") for layer in layers],
    }
    listed = []
    for number, where in enumerate(platforms):
        text = json.dumps({**manifest, "annotations": {"n": str(number)}}).encode()
        one = blob(text, "application/vnd.oci.image.manifest.v1+json")
        listed.append({**one, **({"platform": where} if where else {})})
    for _ in range(nested):
        inner = blob(json.dumps({"schemaVersion": 2, "manifests": listed}).encode(), "application/vnd.oci.image.index.v1+json")
        listed = [inner]
    if missing:
        del blobs[next(name for name in blobs if blobs[name] == packed(layers[0]))]
    members = {**blobs, "oci-layout": b'{"imageLayoutVersion":"1.0.0"}'}
    members["index.json"] = json.dumps({"schemaVersion": 2, "manifests": listed}).encode()
    members.update(files or {})
    return tar(*(entry(name, content) for name, content in members.items()))


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(data)


def mksquashfs(folder: Path, target: Path, comp: str = "gzip", *flags: str) -> bytes:
    """Pack a folder, or skip the test where that is not possible."""
    if shutil.which("mksquashfs") is None:
        pytest.skip("no mksquashfs on this machine (Debian: apt-get install squashfs-tools)")
    made = subprocess.run(
        ["mksquashfs", folder, target, "-comp", comp, "-noappend", "-no-progress", "-processors", "1", *flags],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip(f"this mksquashfs does not do {comp}: {made.stdout[-200:]}{made.stderr[-200:]}")
    return target.read_bytes()


def gvmi(squashfs: bytes, config: Any) -> bytes:
    """Put a configuration behind a squashfs, as gvmkit-build does."""
    text = json.dumps(config).encode()
    return squashfs + struct.pack("<I", zlib.crc32(text)) + text + b"%08d" % len(text)


def convert(data: bytes, format: str, folder: Path, **limits: int) -> tuple[dict[str, Any], list[Layer]]:
    """Convert a package in this very process; returns the configuration and each layer's members by name.

    Errors: BadImage. The sandbox is not there: what else is raised is a bug.
    """
    package, written, inflated = folder / "package", folder / "written", folder / "inflated"
    package.write_bytes(data)
    bounds = {key: value for key, value in {**LIMITS, **limits}.items() if key not in ("cpu_s", "memory_bytes")}
    with package.open("rb") as source, written.open("w+b") as target, inflated.open("w+b") as scratch:
        spec = {
            "package": source.fileno(), "archive": target.fileno(), "inflated": scratch.fileno(), "machine": MACHINE,
            "limits": bounds, "room": 1 << 30, "tag": "golem/x:latest", "format": format,
        }  # fmt: skip
        unpack.convert(spec, report=lambda line: None)
    with tarfile.open(written) as archive:
        (manifest,) = json.load(archive.extractfile("manifest.json"))  # type: ignore[arg-type]
        config = json.load(archive.extractfile(manifest["Config"]))  # type: ignore[arg-type]
        layers = []
        for name, diff_id in zip(manifest["Layers"], config["rootfs"]["diff_ids"], strict=True):
            content = archive.extractfile(name).read()  # type: ignore[union-attr]
            assert diff_id == f"sha256:{sha256(content)}"
            layers.append(members(content))
    return config, layers


def members(content: bytes) -> Layer:
    """Read a tar with the standard library: its members and their contents by name."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        found = {}
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            found[os.path.normpath(member.name)] = (member, file.read() if file else b"")
        return found
