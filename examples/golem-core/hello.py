#!/usr/bin/env python3
"""The smallest requestor with the unmodified golem-core 0.7 (`pip install golem-core==0.7.8`, in an environment of its own).

    YAGNA_APPKEY=... python hello.py [NAME]

Publishes ../hello/hello.wasm with the node's `gftp`, hires the first provider that offers `wasmtime`, prints what the module
says, and pays the invoice. Both golem-core and this project have a package `golem`: run it outside of the checkout's top folder.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from golem.payload import Payload, constraint, prop
from golem.resources import Deploy, Run, Start

from golem.node import GolemNode

MODULE = Path(__file__).resolve().parents[1] / "hello/hello.wasm"


@dataclass
class Wasm(Payload):
    """A task for the runtime `wasmtime`: `package` is the module's hash and where providers find it."""

    package: str = prop("golem.srv.comp.task_package")
    runtime: str = constraint("golem.runtime.name", default="wasmtime")


async def hello(name: str, package: str) -> None:
    """Run the module once on the market."""
    async with GolemNode() as golem:
        allocation = await golem.create_allocation(1, network="holesky")
        demand = await golem.create_demand(Wasm(package), subnet="public", allocations=[allocation])
        terms = await demand.get_demand_data()
        terms.properties["golem.com.payment.chosen-platform"] = "erc20-holesky-tglm"
        async for proposal in demand.initial_proposals():
            draft = await (await proposal.respond(terms.properties, terms.constraints)).responses().__anext__()
            agreement = await draft.create_agreement()
            await agreement.confirm()
            if await agreement.wait_for_approval():
                break
        activity = await agreement.create_activity()
        batch = await activity.execute_commands(Deploy(), Start(), Run(["hello", name], shell=False))
        await batch.wait(300)
        print(batch.events[-1].stdout, end="")
        await activity.destroy()
        await agreement.terminate("done")
        while agreement.invoice is None:
            await asyncio.sleep(0.1)
        invoice = await agreement.invoice.get_data()
        await agreement.invoice.accept_full(allocation)
        print(f"invoice of {invoice.amount} GLM accepted")


def main() -> None:
    """Publish the module for as long as the job takes."""
    name = sys.argv[1] if len(sys.argv) > 1 else "World"
    with subprocess.Popen(["gftp", "publish", str(MODULE)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as gftp:
        assert gftp.stdout
        url = json.loads(gftp.stdout.readline())["result"][0]["url"]
        digest = hashlib.sha3_224(MODULE.read_bytes()).hexdigest()
        try:
            asyncio.run(hello(name, f"hash:sha3:{digest}:{url}"))
        finally:
            gftp.terminate()


if __name__ == "__main__":
    main()
