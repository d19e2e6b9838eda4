"""A real Docker Engine for tests, one a test session, and images for it that come from no registry.

Use the fixtures `engine` (user ids remapped) and `plain_engine` of `tests/conftest.py`; both skip with the reason where no
Engine can be started. Images are root file systems as tar files, made from what this machine has.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import docker
import pytest
from worlds.patience import patience

from golem.lab.engine import LocalEngine, missing, open_engine

BUSYBOX = Path("/bin/busybox")


@contextmanager
def engine_for_tests(folder: Path, userns: bool) -> Iterator[LocalEngine]:
    """Run an Engine, or skip the test that asked for it."""
    if problem := missing():
        hint = "" if "apt-get" in problem or shutil.which("dockerd") else " (Debian: apt-get install docker.io)"
        pytest.skip(problem + hint)
    folder.parent.chmod(0o711)  # remapped users pass through to what is theirs
    with open_engine(folder, userns) as engine:
        yield engine


def admin(engine: LocalEngine) -> docker.APIClient:
    """Return the SDK's client of an Engine."""
    return docker.APIClient(base_url=engine.host, version="auto", timeout=patience(60))


def busybox_tar(extra: Mapping[str, bytes] | None = None) -> bytes:
    """Return a root file system with busybox and a link for each of its programs. `extra`: more files by path."""
    if not BUSYBOX.exists():
        pytest.skip("no /bin/busybox on this machine (Debian: apt-get install busybox-static)")
    links = subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True).stdout.split()
    files = {
        "bin/busybox": BUSYBOX.read_bytes(),
        "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\nguest:x:1000:1000::/:/bin/sh\n",
        "etc/group": b"root:x:0:\nguest:x:1000:\n",
        **(extra or {}),
    }
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("bin", "etc", "proc", "sys", "dev", "tmp", "root", "var"):
            _add(archive, name, b"", tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755)
        for name, content in files.items():
            _add(archive, name, content, tarfile.REGTYPE, 0o755)
        for name in links:
            if name != "busybox":
                _add(archive, f"bin/{name}", b"", tarfile.SYMTYPE, 0o777, "busybox")
    return out.getvalue()


def python_tar() -> bytes:
    """Return a root file system with busybox and this very Python (without site-packages), found by `/opt/py/bin/python3`."""
    base = Path(sys.base_prefix)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = Path(sysconfig.get_paths()["stdlib"])
    binary = Path(os.path.realpath(base / "bin" / version))
    out = io.BytesIO(busybox_tar())
    skipped = {"test", "site-packages", "dist-packages", "ensurepip", "idlelib", "tkinter", "lib2to3", "__pycache__"}

    def keep(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        member.uid = member.gid = 0
        name = Path(member.name).name
        return None if name in skipped or name.startswith("config-") else member

    with tarfile.open(fileobj=out, mode="a") as archive:
        archive.add(binary, "opt/py/bin/python3", filter=keep)
        archive.add(library, f"opt/py/lib/{version}", filter=keep)
        for path in _libraries([binary, *library.glob("lib-dynload/*.so")]):
            archive.add(os.path.realpath(path), path.lstrip("/"), filter=keep)
    return out.getvalue()


def _libraries(programs: Sequence[Path]) -> list[str]:
    """Return the shared libraries that programs are linked with, by absolute path."""
    if shutil.which("ldd") is None:
        pytest.skip("no ldd on this machine")
    said = subprocess.run(["ldd", *map(str, programs)], check=False, capture_output=True, text=True).stdout
    words = (line.split() for line in said.splitlines())
    return sorted({word for line in words for word in line if word.startswith("/") and not word.endswith(":")})


def import_image(engine: LocalEngine, tar: bytes, tag: str, changes: Sequence[str] = ("ENV PATH=/bin",)) -> str:
    """Import a root file system into an Engine as `tag`; returns the image's id. `changes`: Dockerfile lines."""
    client = admin(engine)
    try:
        client.import_image_from_data(tar, repository=tag, changes=list(changes))
        return str(client.inspect_image(tag)["Id"])
    finally:
        client.close()


def _add(archive: tarfile.TarFile, name: str, content: bytes, kind: bytes, mode: int, link: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.mode, member.linkname, member.size = kind, mode, link, len(content)
    archive.addfile(member, io.BytesIO(content))
