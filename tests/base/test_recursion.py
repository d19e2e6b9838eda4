"""No library that a node imports may raise the recursion limit: behind it, a deep JSON text crashes the process."""

from __future__ import annotations

import json
import subprocess
import sys

from worlds.patience import patience

PROGRAM = """
import sys
from golem.base.recursion import tame_imports
import golem.node, golem.rest.app, golem.net.network
tame_imports()
import golem.chain.web3_provider, eth_keyfile, golem.net.sessions
print(sys.getrecursionlimit())
import json
try:
    json.loads("[" * 1_000_000)
except RecursionError:
    print("refused")
"""


def test_the_limit_stays_where_it_protects() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=patience(60))
    assert done.stdout.split() == ["1000", "refused"], (done.returncode, done.stdout, done.stderr)


def test_in_this_process_too() -> None:
    assert sys.getrecursionlimit() == 1000
    try:
        json.loads("[" * 1_000_000)
    except RecursionError:
        return
    raise AssertionError("a million brackets were parsed")
