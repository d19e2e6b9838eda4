#!/usr/bin/env python3
"""Make a small Docker image without Docker: this machine's static busybox, a shell and its tools, and a volume for files.

    python make_image.py hello.tar          then: golem image push hello.tar --tag hello-docker

Needs busybox (Debian and Ubuntu: apt-get install busybox-static). Runs with the node's Python.
"""

from __future__ import annotations

import hashlib
import io
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from golem.images.docker_archive import image_config, write_archive

VOLUME = "golem/work"
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


def make_layer(busybox: Path) -> bytes:
    """Return the image's only layer: busybox, a link for each of its programs, and the folders that programs expect."""
    programs = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True).stdout.split()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as layer:
        for folder in ("bin", "tmp", "golem", VOLUME):
            member = tarfile.TarInfo(folder)
            member.type, member.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
            layer.addfile(member)
        content = busybox.read_bytes()
        member = tarfile.TarInfo("bin/busybox")
        member.mode, member.size = 0o755, len(content)
        layer.addfile(member, io.BytesIO(content))
        for program in sorted(set(programs) - {"busybox"}):
            member = tarfile.TarInfo(f"bin/{program}")
            member.type, member.linkname = tarfile.SYMTYPE, "busybox"
            layer.addfile(member)
    return out.getvalue()


def main(target: Path) -> None:
    busybox, machine = shutil.which("busybox"), MACHINES.get(platform.machine())
    if busybox is None or machine is None:
        sys.exit("make_image: needs busybox on an x86-64 or ARM64 machine (Debian, Ubuntu: apt-get install busybox-static)")
    layer = make_layer(Path(busybox))
    digest = hashlib.sha256(layer).hexdigest()
    config = image_config(["/bin/sh"], [digest], machine, Env=["PATH=/bin"], WorkingDir=f"/{VOLUME}", Volumes={f"/{VOLUME}": {}})
    with target.open("wb") as out:
        write_archive(out, config, [(digest, io.BytesIO(layer), len(layer))])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} ARCHIVE")
    main(Path(sys.argv[1]))
