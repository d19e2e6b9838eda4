"""A node answers REST before it imports what it needs later: each of these costs a part of its start."""

from __future__ import annotations

import subprocess
import sys

from worlds.patience import patience

LATER = ("eth_account", "eth_keyfile", "httpx", "libp2p", "prometheus_client", "web3")
PROGRAM = f"""
import sys
import golem.cli, golem.daemon, golem.rest.app, hypercorn.trio
print(*[name for name in {LATER} if name in sys.modules])
"""


def test_what_is_needed_later_is_imported_later() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=patience(60), check=True)
    assert done.stdout.split() == []
