"""The line after a run with skips: what to install to run the rest, and how many tests that is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from skips import what_to_install

ROOT = Path(__file__).resolve().parents[2]
SQUASH = "no mksquashfs on this machine (Debian: apt-get install squashfs-tools)"


@pytest.mark.parametrize(
    ("reasons", "line"),
    [
        ([], None),
        ([SQUASH, SQUASH], "2 tests were skipped; 2 of them run with apt-get install squashfs-tools"),
        (["Skipped: needs root (namespaces, setuid)"], "1 tests were skipped; 1 of them run with root"),
        (
            [SQUASH, "an Engine needs root (Debian: apt-get install docker.io iptables)", "this machine has no IPv6 loopback"],
            "3 tests were skipped; 2 of them run with root and apt-get install docker.io iptables squashfs-tools; "
            "1 others say why above",
        ),
        (["no anvil (Debian: apt-get install npm)"], "1 tests were skipped; 1 of them run with apt-get install npm"),
        (["this machine has no IPv6 loopback"], "1 tests were skipped; their reasons stand above"),
    ],
)
def test_the_line_names_what_is_missing(reasons: list[str], line: str | None) -> None:
    assert what_to_install(reasons) == line


@pytest.mark.integration
def test_a_run_with_skips_ends_with_it(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/render/test_render_image.py"]
    ran = subprocess.run(line, cwd=ROOT, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    said = ran.stdout.splitlines()
    assert said[-2].endswith("tests were skipped; " + said[-2].split()[0] + " of them run with apt-get install gcc libc6-dev")
    assert "skipped in" in said[-1], "pytest's own summary is the last line"
