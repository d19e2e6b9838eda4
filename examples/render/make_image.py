#!/usr/bin/env python3
"""Make a Docker image of the renderer without Docker: compile render.c with `cc` and pack it as an archive.

    python make_image.py render.tar         then: golem image push render.tar --tag render

The image is made from scratch: one program, linked statically where the C library can be; else with the libraries it
needs. It has /bin/render as its entry point and volumes for the scene and for the tile. Runs with the node's Python.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from golem.images.docker_archive import image_config, layer_tar, write_archive

HERE = Path(__file__).resolve().parent
VOLUMES = ("/golem/input", "/golem/output")
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-ffp-contract=off", "-s")


def compile_program(folder: Path) -> list[tuple[str, bytes, int]]:
    """Return the files of the program by path, content and mode. Raises `RuntimeError` where there is no compiler."""
    program = folder / "render"
    compiler = os.environ.get("CC", "cc")
    line = [compiler, *FLAGS, "-o", str(program), str(HERE / "render.c"), "-lm"]
    said = ""
    try:
        for extra in (["-static"], []):
            result = subprocess.run([*line, *extra], capture_output=True, text=True, check=False)
            if result.returncode == 0:
                libraries = [] if extra else shared_libraries(program)
                files = [("bin/render", program), *((path.lstrip("/"), Path(path)) for path in libraries)]
                return [(name, path.read_bytes(), 0o755) for name, path in files]
            said = result.stderr
    except FileNotFoundError:
        raise RuntimeError(f"no C compiler ({compiler}); Debian and Ubuntu: apt-get install build-essential") from None
    raise RuntimeError(f"{compiler} failed:\n{said}")


def shared_libraries(program: Path) -> list[str]:
    """Return what a program is linked with, the loader included, by the paths it is looked for at."""
    said = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    return sorted(set(re.findall(r"(/\S+) \(0x", said)))


def make_image(target: Path) -> None:
    """Write the image's archive to `target`. The same program gives the same bytes."""
    machine = MACHINES.get(platform.machine())
    if machine is None:
        raise RuntimeError(f"no name in Docker for this kind of machine: {platform.machine()}")
    with tempfile.TemporaryDirectory() as folder:
        files = compile_program(Path(folder))
    places = {parent.as_posix() for name, _, _ in files for parent in Path(name).parents if parent.name}
    places |= {parent.as_posix().lstrip("/") for path in VOLUMES for parent in (Path(path), *Path(path).parents) if parent.name}
    layer = layer_tar(files, [(place, 0o755) for place in sorted(places)])
    digest = hashlib.sha256(layer).hexdigest()
    config = image_config([], [digest], machine, Entrypoint=["/bin/render"], Volumes={path: {} for path in VOLUMES})
    with target.open("wb") as out:
        write_archive(out, config, [(digest, io.BytesIO(layer), len(layer))])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} ARCHIVE")
    try:
        make_image(Path(sys.argv[1]))
    except (RuntimeError, OSError) as error:
        sys.exit(f"make_image: {error}")
