"""A node answers REST before it imports what it needs later: each of these costs a part of its start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from worlds.patience import patience

LATER = ("eth_account", "eth_keyfile", "httpx", "libp2p", "prometheus_client", "web3")
PROGRAM = f"""
import sys
from pathlib import Path
import golem.cli, golem.daemon, golem.rest.app, hypercorn.trio
print(*[name for name in {LATER} if name in sys.modules])
"""


def test_what_is_needed_later_is_imported_later() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=patience(60), check=True)
    assert done.stdout.split() == []


AT_WORK = f"""
import os
import signal
import sys
from pathlib import Path
import trio
from golem.config import config_from
from golem.daemon import run_node

def ready(node):
    print("ready", *[name for name in {LATER} if name in sys.modules])
    os.kill(os.getpid(), signal.SIGTERM)

at = dict(api_url="http://127.0.0.1:0", listen=("127.0.0.1:0",), mdns=False)
config = config_from({{}}, data_dir=sys.argv[1] + "/node", chain_dir=sys.argv[1] + "/chain", plain_key=True, **at)
trio.run(run_node, config, None, ready)
"""


def test_agents_are_served_before_it_is_imported(tmp_path: Path) -> None:
    """In a thread it would take half of the processor from what is waited for."""
    line = [sys.executable, "-c", AT_WORK, str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=patience(60), check=True)
    assert done.stdout.split() == ["ready"], done.stderr
