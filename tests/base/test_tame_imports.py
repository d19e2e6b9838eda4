"""What a node imports does no harm: the recursion limit stays (behind it, a deep JSON text crashes the process), and tables
that nobody asked for are not computed.
"""

from __future__ import annotations

import json
import subprocess
import sys

from worlds.patience import patience

PROGRAM = """
import sys
from golem.base.imports import tame_imports
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


PAIRINGS_OF_BLS = """
from golem.base.imports import PAIRINGS, tame_imports
tame_imports()
import sys
import golem.chain.web3_provider, eth_keyfile, golem.chain.devchain.server
print(*(hasattr(sys.modules[name], "miller_loop") for name in PAIRINGS))
from py_ecc import bls12_381, optimized_bls12_381
for library in (bls12_381, optimized_bls12_381):
    one = library.pairing(library.G2, library.G1)
    print(one * library.pairing(library.neg(library.G2), library.G1) == library.FQ12.one(), one == library.FQ12.one())
print(*(hasattr(sys.modules[name], "miller_loop") for name in PAIRINGS))
"""


def test_tables_of_pairings_are_computed_when_somebody_asks_for_a_pairing() -> None:
    done = subprocess.run([sys.executable, "-c", PAIRINGS_OF_BLS], capture_output=True, text=True, timeout=patience(60))
    assert done.stdout.split("\n") == ["False False", "True False", "True False", "True True", ""], (done.stdout, done.stderr)
