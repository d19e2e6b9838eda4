"""One task with the unmodified yapapi, whose command depends on the provider that gets it (run by `test_gone_provider.py`).

    python patient_task.py --package FILE --subnet NAME --command PROVIDER=ENTRY ... --log FILE

Prints a JSON object: the provider that did the task, its output, and the providers of all agreements. It does not wait
for invoices: one of the providers may never send any.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import logging
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from yapapi import Golem, Task, WorkContext, events
from yapapi.payload import Payload
from yapapi.props import inf
from yapapi.props.base import constraint, prop
from yapapi.script import Script
from yapapi.storage import gftp


@dataclass
class Package(Payload):
    """Providers that run a package of WASI modules."""

    package: str = prop("golem.srv.comp.task_package")
    runtime: str = constraint(inf.INF_RUNTIME_NAME, default="wasmtime")


async def main(options: argparse.Namespace) -> None:
    commands = dict(one.split("=") for one in options.command)
    agreements: list[str] = []

    def on_event(event: events.Event) -> None:
        if isinstance(event, events.AgreementConfirmed):
            agreements.append(event.provider_info.name)

    async def work(ctx: WorkContext, tasks: AsyncIterator[Task[None, Any]]) -> AsyncIterator[Script]:
        async for task in tasks:
            script = ctx.new_script(timeout=timedelta(minutes=30))
            run = script.run(commands[ctx.provider_name])
            yield script
            task.accept_result({"provider": ctx.provider_name, "stdout": (await run).stdout})

    async with gftp.provider() as storage:
        source = await storage.upload_file(options.package)
        digest = hashlib.sha3_224(options.package.read_bytes()).hexdigest()
        payload = Package(package=f"hash:sha3:{digest}:{source.download_url}")
        golem = Golem(budget=Decimal(1), subnet_tag=options.subnet, payment_network="holesky", event_consumer=on_event)
        await golem.start()
        async for task in golem.execute_tasks(work, [Task(data=None)], payload, max_workers=1, timeout=timedelta(minutes=40)):
            print(json.dumps({"ok": True, "agreements": agreements, **task.result}), flush=True)
            os._exit(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--package", type=Path, required=True)
    parser.add_argument("--subnet", required=True)
    parser.add_argument("--command", action="append", required=True)
    parser.add_argument("--log", type=Path, required=True)
    chosen = parser.parse_args()
    logging.basicConfig(filename=chosen.log, filemode="w", level=logging.DEBUG)
    asyncio.run(main(chosen))
    sys.exit("no result")
