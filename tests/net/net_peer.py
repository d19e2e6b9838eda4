"""A node in a process of its own, for tests that freeze or kill it: prints its address, serves "echo", runs until killed.

Arguments: data directory, number of the key, port.
"""

from __future__ import annotations

import sys
from pathlib import Path

import trio
from net_helpers import KEYS, config, echo

from golem.net import open_network


async def main() -> None:
    path, number, port = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    async with open_network(KEYS[number], config(path, listen=(f"127.0.0.1:{port}",))) as network:
        network.serve("echo", echo)
        await network.wait_up()
        print(network.addresses[0], flush=True)
        await trio.sleep_forever()


trio.run(main)
