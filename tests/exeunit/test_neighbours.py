"""A real link with a provider and its neighbour: neither its own public addresses nor the neighbour's are reached."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from neighbourhood import FAR, NEAR, OWN
from worlds.patience import patience

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nsenter"))),
        reason="makes network namespaces: needs root, ip, unshare and nsenter",
    ),
]


def test_only_what_is_beyond_the_link_is_reached(tmp_path: Path) -> None:
    program = Path(__file__).with_name("neighbourhood.py")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    line = ["unshare", "-n", sys.executable, str(program), str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, env=env, timeout=patience(120))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if "skip" in found:
        pytest.skip(found["skip"])
    for way in ("get", "put"):
        for seen in ("", " unseen"):
            for host in OWN:
                assert "is an address of this machine, which this provider does not let" in found[f"{way} {host}{seen}"], host
            for host in NEAR:
                assert "is an address of this machine's own network" in found[f"{way} {host}{seen}"], host
            for host in FAR:
                assert found[f"{way} {host}{seen}"] == {"get": "secret", "put": "put"}[way], host
    for host in NEAR:
        assert found[f"local {host}"] == "secret", "it is there, for whom it is"
    told = (tmp_path / "neighbour").read_text().splitlines()
    asked = [one for one in told if one != "connected"]
    assert sorted(asked) == sorted(
        [
            *(f"{one} HTTP/1.1" for one in ("GET /get", "PUT /put") for _ in range(2 * len(FAR))),
            *["GET /local HTTP/1.1"] * len(NEAR),
        ]
    ), "connections without a byte at most"
    assert set((tmp_path / "own").read_text().splitlines()) <= {"connected"}
