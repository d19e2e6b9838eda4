"""A process that pays and dies: `python payer_child.py URL DB NAME BATCHES POINT NTH`.

It kills itself with SIGKILL at the NTH time that the engine reaches POINT; without ever reaching it, it ends with 0 when
all batches are confirmed. `test_kill.py` starts it.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace

import trio
from chain_support import GLM, address_of, key_of

from golem.chain.engine import Engine
from golem.chain.networks import local_rows
from golem.chain.rows import TransferBatch
from golem.chain.rpc import Rpc
from protocol.wallet import TransferConfirmed, TransferNews


async def main() -> None:
    url, db, name, batches, deadly, nth = sys.argv[1:]
    reached = 0
    left = {f"b{i}" for i in range(int(batches))}
    done = trio.Event()

    def checkpoint(point: str) -> None:
        nonlocal reached
        reached += point == deadly
        if reached == int(nth) and point == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    async def notify(event: TransferNews) -> None:
        if isinstance(event, TransferConfirmed):
            left.discard(event.batch_id)
            if not left:
                done.set()

    network = replace(local_rows(url)[0], poll_s=0.02)
    async with Rpc(network) as rpc, trio.open_nursery() as nursery:
        engine = Engine(network, rpc, key_of(name), db, notify, checkpoint=checkpoint)
        for number, batch_id in enumerate(sorted(left)):
            payees = ((address_of(f"{name} {number}"), GLM), (address_of(f"{name} all"), GLM))
            await engine.submit(TransferBatch(batch_id, payees[: 1 + number % 2]))
        nursery.start_soon(engine.run)
        await done.wait()
        nursery.cancel_scope.cancel()


trio.run(main)
