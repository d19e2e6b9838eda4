#!/usr/bin/env python3
"""A requestor in plain HTTP: what an agent in any language sends, step by step, without a library.

    YAGNA_APPKEY=... python requestor.py module.wasm [ARGUMENTS...]

runs a WASI module on the first provider that offers `wasmtime`, prints its output and pays. `Requestor` is the walk as
methods, one a step, for programs that want to do something in between (tests and benchmarks do).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import trio

MARKET, ACTIVITY, PAYMENT = "/market-api/v1", "/activity-api/v1", "/payment-api/v1"
PLATFORM = "erc20-holesky-tglm"


class WalkError(Exception):
    """A step did not come to its end; the text says which."""


@asynccontextmanager
async def published(module: Path, environment: Mapping[str, str] = os.environ) -> AsyncIterator[str]:
    """The task package of a module (hash, and a URL of the node's `gftp`), for as long as the block lasts."""
    line = ["gftp", "publish", str(module)]
    path = shutil.which("gftp", path=environment.get("PATH"))
    async with trio.open_nursery() as nursery:
        process = await nursery.start(partial(
            trio.run_process, [path or "gftp", *line[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            env={**os.environ, **environment}, check=False,
        ))  # fmt: skip
        text = b""
        while not text.endswith(b"\n"):
            more = await process.stdout.receive_some()
            if not more:
                raise WalkError("gftp published nothing")
            text += more
        digest = hashlib.sha3_224(module.read_bytes()).hexdigest()
        yield f"hash:sha3:{digest}:{json.loads(text)['result'][0]['url']}"
        process.terminate()


class Requestor:
    """The steps of a requestor against its node."""

    def __init__(self, client: httpx.AsyncClient, subnet: str = "public", platform: str = PLATFORM) -> None:
        self.http, self.subnet, self.platform = client, subnet, platform

    async def call(self, method: str, path: str, body: Any = ..., **query: Any) -> Any:
        """Send a request, return its JSON (None for an empty answer). Raises `WalkError` for a status over 299."""
        content = None if body is ... else json.dumps(body)
        headers = {} if content is None else {"Content-Type": "application/json"}
        answer = await self.http.request(method, path, content=content, headers=headers, params=query)
        if answer.status_code > 299:
            raise WalkError(f"{method} {path}: {answer.status_code} {answer.text[:500]}")
        return answer.json() if answer.content else None

    # -- money aside, and a demand
    async def allocate(self, amount: str = "1") -> dict[str, Any]:
        body = {"totalAmount": amount, "paymentPlatform": self.platform, "makeDeposit": False}
        found: dict[str, Any] = await self.call("POST", f"{PAYMENT}/allocations", body)
        return found

    async def demand(
        self, allocation: dict[str, Any], package: str, constraints: Sequence[str] = (), runtime: str = "wasmtime"
    ) -> tuple[str, dict[str, Any]]:
        """Publish a demand; return its id and its body."""
        found = await self.call("GET", f"{PAYMENT}/demandDecorations", allocationIds=allocation["allocationId"])
        expires_ms = int((time.time() + 1800) * 1000)
        properties = {
            "golem.srv.comp.expiration": expires_ms, "golem.srv.caps.multi-activity": True,
            "golem.node.debug.subnet": self.subnet, "golem.srv.comp.task_package": package,
            **{item["key"]: item["value"] for item in found["properties"]},
        }  # fmt: skip
        clauses = [f"(golem.node.debug.subnet={self.subnet})", "(golem.com.pricing.model=linear)",
                   f"(golem.runtime.name={runtime})", *found["constraints"], *constraints]  # fmt: skip
        body = {"properties": properties, "constraints": f"(&{''.join(clauses)})"}
        return await self.call("POST", f"{MARKET}/demands", body), body

    async def proposal(self, demand: str, state: str, timeout_s: float = 30.0) -> dict[str, Any]:
        """Return the next proposal of a state (`Initial` or `Draft`)."""
        with trio.move_on_after(timeout_s):
            while True:
                for event in await self.call("GET", f"{MARKET}/demands/{demand}/events", timeout=5, maxEvents=10):
                    if event["eventType"] == "ProposalEvent" and event["proposal"]["state"] == state:
                        found: dict[str, Any] = event["proposal"]
                        return found
                    if event["eventType"] == "ProposalRejectedEvent":
                        raise WalkError(f"the provider rejected: {event['reason']['message']}")
        raise WalkError(f"no {state} proposal within {timeout_s:g} s")

    async def negotiate(self, demand: str, body: dict[str, Any], initial: dict[str, Any]) -> dict[str, Any]:
        """Counter an initial proposal; return the provider's answer."""
        properties = {**body["properties"], "golem.com.payment.chosen-platform": self.platform}
        counter = {"properties": properties, "constraints": body["constraints"]}
        await self.call("POST", f"{MARKET}/demands/{demand}/proposals/{initial['proposalId']}", counter)
        return await self.proposal(demand, "Draft")

    async def agree(self, draft: dict[str, Any]) -> str:
        """Propose an agreement, confirm it and wait for the provider; return its id."""
        valid_to = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
        agreement = await self.call("POST", f"{MARKET}/agreements", {"proposalId": draft["proposalId"], "validTo": valid_to})
        await self.call("POST", f"{MARKET}/agreements/{agreement}/confirm")
        await self.call("POST", f"{MARKET}/agreements/{agreement}/wait", timeout=15)
        return str(agreement)

    # -- work
    async def create_activity(self, agreement: str, timeout_s: float = 15) -> str:
        return str(await self.call("POST", f"{ACTIVITY}/activity", agreement, timeout=timeout_s))

    async def run(self, activity: str, *commands: dict[str, Any], timeout_s: float = 60.0) -> list[dict[str, Any]]:
        """Run a batch of commands; return their results. Raises `WalkError` when one failed."""
        batch = await self.call("POST", f"{ACTIVITY}/activity/{activity}/exec", {"text": json.dumps(commands)})
        with trio.move_on_after(timeout_s):
            while True:
                results: list[dict[str, Any]] = await self.call("GET", f"{ACTIVITY}/activity/{activity}/exec/{batch}", timeout=5)
                if results and results[-1]["result"] == "Error":
                    last = results[-1]
                    raise WalkError(f"command {last['index']} failed: {last['message']} {last['stderr'] or ''}")
                if len(results) == len(commands):
                    return results
        raise WalkError(f"the batch did not end within {timeout_s:g} s")

    async def destroy_activity(self, activity: str) -> None:
        await self.call("DELETE", f"{ACTIVITY}/activity/{activity}", timeout=15)

    # -- the end
    async def terminate(self, agreement: str) -> None:
        await self.call("POST", f"{MARKET}/agreements/{agreement}/terminate", {"message": "Finished"})

    async def invoice(self, agreement: str, since: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """Return the invoice of an agreement."""
        with trio.move_on_after(timeout_s):
            while True:
                for event in await self.call("GET", f"{PAYMENT}/invoiceEvents", timeout=5, afterTimestamp=since):
                    since = event["eventDate"]
                    found: dict[str, Any] = await self.call("GET", f"{PAYMENT}/invoices/{event['invoiceId']}")
                    if found["agreementId"] == agreement:
                        return found
        raise WalkError(f"no invoice within {timeout_s:g} s")

    async def accept(self, invoice: dict[str, Any], allocation: dict[str, Any]) -> None:
        body = {"totalAmountAccepted": invoice["amount"], "allocationId": allocation["allocationId"]}
        await self.call("POST", f"{PAYMENT}/invoices/{invoice['invoiceId']}/accept", body)

    async def wait_settled(self, invoice_id: str, timeout_s: float = 60.0) -> dict[str, Any]:
        with trio.move_on_after(timeout_s):
            while True:
                found: dict[str, Any] = await self.call("GET", f"{PAYMENT}/invoices/{invoice_id}")
                if found["status"] == "SETTLED":
                    return found
                await trio.sleep(0.1)
        raise WalkError(f"invoice {invoice_id} was not settled within {timeout_s:g} s")


async def walk(requestor: Requestor, package: str, entry_point: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a module once and pay for it; return its output and the settled invoice."""
    since = datetime.now(UTC).isoformat()
    allocation = await requestor.allocate()
    demand, body = await requestor.demand(allocation, package)
    draft = await requestor.negotiate(demand, body, await requestor.proposal(demand, "Initial"))
    agreement = await requestor.agree(draft)
    activity = await requestor.create_activity(agreement)
    capture = {"stdout": {"atEnd": {}}, "stderr": {"atEnd": {}}}
    run = {"run": {"entry_point": entry_point, "args": list(arguments), "capture": capture}}
    results = await requestor.run(activity, {"deploy": {}}, {"start": {}}, run)
    await requestor.destroy_activity(activity)
    await requestor.call("DELETE", f"{MARKET}/demands/{demand}")
    await requestor.terminate(agreement)
    invoice = await requestor.invoice(agreement, since)
    await requestor.accept(invoice, allocation)
    settled = await requestor.wait_settled(invoice["invoiceId"])
    return {"stdout": results[-1]["stdout"], "invoice": settled}


async def main(options: argparse.Namespace) -> None:
    headers = {"Authorization": f"Bearer {os.environ['YAGNA_APPKEY']}"}
    url = os.environ.get("YAGNA_API_URL", "http://127.0.0.1:7465")
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=70) as client:
        async with published(options.module) as package:
            found = await walk(Requestor(client, options.subnet), package, options.module.stem, options.arguments)
    sys.stdout.write(found["stdout"] or "")
    print(f"paid {found['invoice']['amount']} GLM, invoice {found['invoice']['invoiceId']}", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run a WASI module on a provider, by plain HTTP.")
    parser.add_argument("module", type=Path)
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--subnet", default=os.environ.get("YAGNA_SUBNET", "public"))
    trio.run(main, parser.parse_args())
