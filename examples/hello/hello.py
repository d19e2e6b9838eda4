#!/usr/bin/env python3
"""The smallest requestor: one task on the market with the unmodified yapapi 0.13.

    YAGNA_APPKEY=... python hello.py --subnet demo World

Publishes `hello.wasm` with the node's `gftp` (or points to --image-url), hires one provider that offers the runtime
`wasmtime`, sends it a file, runs the module, which prints a greeting and writes another file, fetches that and waits
for the invoice. Progress goes to stderr; stdout gets one JSON object: greeting, file content, provider, agreement,
invoice, amount, or `"ok": false` and the error. Exit status: 0 done, 1 not, 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from yapapi import Golem, Task, WorkContext, events
from yapapi.log import log_event_repr
from yapapi.payload import Payload
from yapapi.props import inf
from yapapi.props.base import constraint, prop
from yapapi.script import Script
from yapapi.storage import gftp

MODULE = Path(__file__).resolve().with_name("hello.wasm")
LETTER = "A letter that went to the provider and came back.\n"


@dataclass
class WasmPayload(Payload):
    """Providers that run a single WASI module; `package` is hash:sha3:<SHA3-224 of the file>:<url>."""

    package: str = prop("golem.srv.comp.task_package")
    runtime: str = constraint(inf.INF_RUNTIME_NAME, default="wasmtime")


class Hello:
    """One run and what is known of it so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.result: dict[str, Any] = {"ok": False, "error": None}
        self.streamed: list[str] = []  # standard output, where results come by event stream

    async def run(self, package: str) -> None:
        options = self.options
        async with Golem(
            budget=options.budget,
            subnet_tag=options.subnet,
            payment_driver=options.driver,
            payment_network=options.network,
            event_consumer=self.on_event,
            stream_output=options.stream,
        ) as golem:
            golem.add_event_consumer(log_event_repr)
            async for task in golem.execute_tasks(
                self.work,
                [Task(data=options.name)],
                payload=WasmPayload(package=package),
                max_workers=1,
                timeout=timedelta(seconds=options.timeout),
            ):
                self.result |= task.result | {"ok": True}
        if not self.result["ok"]:
            self.result["error"] = self.result["error"] or f"no result after {options.timeout} s"

    async def work(self, ctx: WorkContext, tasks: AsyncIterator[Task[str, dict[str, Any]]]) -> AsyncIterator[Script]:
        fetched = bytearray()

        async def keep(content: bytes) -> None:
            fetched.extend(content)

        async for task in tasks:
            script = ctx.new_script(timeout=timedelta(seconds=self.options.timeout))
            script.upload_bytes(LETTER.encode(), "/golem/input/letter.txt")
            run = script.run("hello", task.data, "/golem/input/letter.txt", "/golem/output/hello.txt")
            script.download_bytes("/golem/output/hello.txt", keep)
            yield script
            stdout = (await run).stdout or "".join(self.streamed)
            provider = {"provider_id": ctx.provider_id, "provider_name": ctx.provider_name, "activity_id": ctx.id}
            task.accept_result({"stdout": stdout, "file": fetched.decode()} | provider)

    def on_event(self, event: events.Event) -> None:
        if isinstance(event, events.CommandStdOut):
            self.streamed.append(event.output)
        elif isinstance(event, events.AgreementConfirmed):
            self.result["agreement_id"] = event.agr_id
            say(f"agreement with {event.provider_info.name}")
        elif isinstance(event, events.TaskAccepted):
            say("the task is done, waiting for the invoice")
        elif isinstance(event, events.InvoiceAccepted):
            self.result |= {"invoice_id": event.invoice.invoice_id, "amount": event.amount}
            say(f"invoice accepted: {event.amount} GLM")
        elif isinstance(event, events.NoProposalsConfirmed):
            say("no provider has answered yet")
        elif isinstance(event, (events.WorkerFinished, events.ActivityCreateFailed)) and event.exception:
            self.result["error"] = f"{type(event.exception).__name__}: {event.exception}"
            say(self.result["error"])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.asynccontextmanager
async def published(digest: str, image_url: str | None) -> AsyncIterator[str]:
    """The task package of the module, published for as long as the context lasts unless its URL is given."""
    if image_url:
        yield f"hash:sha3:{digest}:{image_url}"
        return
    async with gftp.provider() as storage:
        source = await storage.upload_file(MODULE)
        yield f"hash:sha3:{digest}:{source.download_url}"
        await storage.release_source(source)


async def main(options: argparse.Namespace) -> int:
    hello, status = Hello(options), 130
    this_task = asyncio.current_task()
    assert this_task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this_task.cancel)
    started = time.monotonic()
    try:
        async with published(options.digest, options.image_url) as package:
            await hello.run(package)
        status = 0 if hello.result["ok"] else 1
    except asyncio.CancelledError:
        hello.result["error"] = "interrupted"
    except Exception as error:  # the node is not there, refuses the key, ...: the result says so
        logging.getLogger("yapapi").exception("the run failed")
        hello.result["error"] = f"{type(error).__name__}: {error}"
        status = 1
    print(json.dumps(hello.result | {"seconds": round(time.monotonic() - started, 3)}))
    return status


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Say hello from a provider of a Golem market.")
    add = parser.add_argument
    add("name", nargs="?", default="World", help="whom to greet")
    add("--subnet", default=None, help="default: YAGNA_SUBNET, else public")
    add("--driver", default="erc20", help="payment driver (default: %(default)s)")
    add("--network", default="holesky", help="payment network (default: %(default)s)")
    add("--budget", type=Decimal, default=Decimal(1), help="GLM at most (default: %(default)s)")
    add("--timeout", type=float, default=900, help="seconds (default: %(default)s)")
    add("--image-url", default=None, help="where providers find hello.wasm; without it gftp publishes the file")
    add("--stream", action="store_true", help="take results by event stream instead of polling")
    add("--log", type=Path, default=Path("hello.log"), metavar="FILE", help="yapapi's log (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.digest = hashlib.sha3_224(MODULE.read_bytes()).hexdigest()
    return options


if __name__ == "__main__":
    chosen = parse_arguments()
    logging.basicConfig(filename=chosen.log, filemode="w", level=logging.WARNING)
    logging.getLogger("yapapi").setLevel(logging.DEBUG)
    sys.exit(asyncio.run(main(chosen)))
