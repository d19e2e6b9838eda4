"""What a start waits for: commands, exe-units and agents import what each of them needs, and nothing heavy besides."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

CHAIN = {"web3", "eth", "eth_account", "py_ecc"}
SERVERS = {"quart", "hypercorn", "libp2p", "asyncio", "docker"}
DRAWING = {"rich", "pygments", "httpx._main"}
PROGRAMS = {
    "golem.cli": CHAIN | SERVERS | DRAWING | {"httpx", "Crypto", "golem.net.network", "golem.daemon"},
    "golem.exeunit.process": CHAIN | SERVERS | DRAWING | {"httpx", "click", "Crypto", "golem.net.network", "wasmtime"},
    "golem.provider.agent": CHAIN | SERVERS | DRAWING | {"golem.net.network", "wasmtime"},
    "golem.daemon": {"libp2p", "docker", "wasmtime", *DRAWING},  # py-libp2p comes in a thread, when REST serves already
}


@pytest.mark.integration
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_start_imports_what_it_needs(program: str) -> None:
    script = f"import json, sys, {program}; print(json.dumps([name for name, found in sys.modules.items() if found]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert PROGRAMS[program] & set(json.loads(done.stdout)) == set()
