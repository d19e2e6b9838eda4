"""The set-up of a clone, `.ci/setup`: which Pythons it takes, and that it needs no compiler, no root and no package manager."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = str(Path(sys._base_executable).resolve())  # type: ignore[attr-defined]
FORBIDDEN = ("cc", "gcc", "g++", "c++", "clang", "make", "cmake", "cargo", "apt-get", "apt", "sudo", "su")


def script(path: Path, text: str) -> Path:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def setup(folder: Path, *names: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [folder / ".ci/setup", *names], env=kept | {"PYTHON": PYTHON} | variables,
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What the set-up reads, elsewhere."""
    folder = tmp_path / "clone"
    shutil.copytree(ROOT, folder, ignore=lambda at, names: names if Path(at) == ROOT else [])
    for name in (".ci", "protocol", "actors", "golem"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("requirements.lock", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "examples/requirements-yapapi.lock"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.parametrize(
    ("version", "taken"),
    [((3, 10, 14), False), ((3, 11, 1), False), ((3, 11, 2), True), ((3, 12, 0), True), ((3, 13, 9), True), ((3, 14, 0), False)],
)
def test_a_python_out_of_the_range_is_refused(tmp_path: Path, version: tuple[int, int, int], taken: bool) -> None:
    said = "Python " + ".".join(map(str, version))
    pretend = f'exec {PYTHON} -c "import sys; sys.version_info = {version}; $2"'
    other = script(tmp_path / "python", f'[ "$1" = --version ] && echo {said} && exit\n[ "$1" = -c ] && {pretend}\n')
    done = setup(ROOT, "no-such-environment", PYTHON=str(other))
    assert done.returncode == 1
    if taken:
        assert done.stderr == "setup: unknown environment 'no-such-environment'\n"
    else:
        assert done.stderr.startswith(f"setup: {other} is {said}; 3.11.2 to 3.13 is needed")


@pytest.mark.integration
@pytest.mark.timeout(1800)
def test_the_node_is_set_up_where_compilers_fail_and_nothing_may_be_installed(tmp_path: Path, clone: Path) -> None:
    if shutil.which("cc") is None:  # where none is, what runs this test was set up without
        pytest.skip("no C compiler on this machine (Debian: apt-get install gcc libc6-dev)")
    traps, called = tmp_path / "traps", tmp_path / "called"
    traps.mkdir()
    for name in FORBIDDEN:
        script(traps / name, f'echo "$0 $*" >>{called}; exit 1\n')
    trap = (traps / "apt-get").read_text().removeprefix("#!/bin/sh\n")  # Debian's pip may be fetched; nothing may be installed
    script(traps / "apt-get", f'[ "$4" = download ] && exec /usr/bin/apt-get "$@"\n{trap}')
    done = setup(clone, "node", CC="/bin/false", CXX="/bin/false", PATH=f"{traps}:/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "setup: making .venv (a few minutes the first time)\n"
    assert not called.exists(), called.read_text()
    program = "import golem.net, fastecdsa.keys; from libp2p.crypto.ecc import create_new_key_pair; create_new_key_pair('P-256')"
    subprocess.run([clone / ".venv/bin/python", "-c", program], check=True, cwd=clone)
    again = setup(clone, "node", PATH=f"{traps}:/usr/bin:/bin")
    assert (again.returncode, again.stderr) == (0, ""), "nothing is left to do"


@pytest.mark.integration
@pytest.mark.timeout(900)
@pytest.mark.parametrize("pip", [True, False])
def test_debians_python_without_ensurepip(tmp_path: Path, clone: Path, pip: bool) -> None:
    """A pip that is there serves; without any, one sentence says what to install."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ("ensurepip",) if pip else ("ensurepip", "pip"):
        (hidden / f"{name}.py").write_text("raise ImportError('hidden by a test')")
    traps = tmp_path / "traps"
    traps.mkdir()
    script(traps / "apt-get", "echo 'E: no network' >&2; exit 1\n")
    if pip and subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("this Python has no pip of its own: apt-get install python3-pip")
    done = setup(clone, "vyper", PYTHONPATH=str(hidden), PATH=f"{traps}:{os.environ['PATH']}")
    if pip:
        assert (done.returncode, done.stderr) == (0, "setup: making .venv-vyper (a few minutes the first time)\n")
    else:
        assert done.returncode == 1
        assert done.stderr.endswith("(E: no network); type: sudo apt-get install python3-venv\n")
        assert not (clone / ".venv-vyper/.made-from").exists()


@pytest.mark.integration
@pytest.mark.timeout(900)
def test_a_package_of_another_hash_is_refused(clone: Path) -> None:
    node = "requirements.lock"
    locks = (".ci/tools.lock", node, "examples/requirements-yapapi.lock", f"golem/chain/contracts/{node}")
    for name in locks:
        assert {"--require-hashes", "--only-binary :all:"} <= set((ROOT / name).read_text().splitlines())
    lock = clone / locks[0]
    lock.write_text(re.sub("sha256:[0-9a-f]{64}", f"sha256:{'0' * 64}", lock.read_text()))
    done = setup(clone, "vyper")
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert not (clone / ".venv-vyper/.made-from").exists()
