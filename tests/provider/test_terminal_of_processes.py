"""A real node and a real agent, which peers feed with hostile texts: nothing of these commands a terminal, wherever it is said.

`tests/cli/test_terminal.py` has every text and every command one by one; here the whole way is gone, from a peer's session,
offer, demand, negotiation, agreement and program to what `golem run`, `golem provider run`, exe-units and the command line say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio
from cli.test_terminal import ESCAPES, FORGED, HOSTILE, TURNS, is_clean
from click.testing import CliRunner
from provider_requestor import Requestor, eventually
from worlds.node_in_test import node_in_test
from worlds.patience import patience, within
from worlds.support import trio_test

from golem.cli import main
from golem.lab.localnet import LocalNode, open_localnet
from golem.net import NetError
from golem.node.node import Node
from protocol.codec import Envelope, encode_batch

pytestmark = [pytest.mark.integration]

SUBNET = "hostile"
TEXT = HOSTILE.replace("\ud800", "")  # half a pair cannot be said in UTF-8
TEXTS = [one for one in (TEXT, *ESCAPES, *TURNS, *FORGED) if "\ud800" not in one]
LONG = "9" * 400
ACTORS = ("market", "negotiation", "activity", "ledger", "wallet", "signer", "nobody")


def frames(me: str, them: str) -> Iterator[tuple[str, bytes]]:
    """Return what a peer may send on its session: service and payload."""
    good = Envelope(f"{me}/market", f"{them}/market", "e", 1, 0, "t", b"")
    for text in TEXTS:
        for change in ({"sender": f"{me}/{text}"}, {"to": f"{them}/{text}"}, {"sender": text}, {"trace": text}, {"epoch": text}):
            with suppress(TypeError):  # a field of another name
                yield "mail", encode_batch([msgspec.structs.replace(good, **change)])
        for actor in ACTORS:
            for body in ([text], ["Offers", text], [text, {text: text}], {text: LONG}):
                to = msgspec.structs.replace(good, to=f"{them}/{actor}", body=msgspec.msgpack.encode(body))
                yield "mail", encode_batch([to])
        yield "call", msgspec.msgpack.encode([text, 5.0, text.encode()])
        yield "call", msgspec.msgpack.encode([f"exeunit:{text}", 5.0, b""])
        yield "call", msgspec.msgpack.encode(["recall", 5.0, msgspec.msgpack.encode([text])])
        yield "hello", text.encode()
        yield "peers", msgspec.msgpack.encode([text])
        yield text[:50], text.encode()


async def speak(evil: Node, to: str) -> None:
    for service, payload in frames(evil.node_id, to):
        with suppress(NetError, ValueError, UnicodeError):
            await evil.network.request(to, service, payload, 5)
    for text in TEXTS:
        with suppress(NetError, ValueError, UnicodeError):
            stream = await evil.network.open_stream(to, text[:50])
            await stream.aclose()
        for name in ("gftp", "exeunit"):
            with suppress(NetError):
                stream = await evil.network.open_stream(to, name)
                await stream.send_all(text.encode())
                await stream.aclose()
        for topic in list(evil.network._topics):
            evil.network.publish(topic, text.encode())


def properties(number: int) -> list[dict[str, Any]]:
    """Return what a peer's offer or demand may hold."""
    return [
        {"golem.node.id.name": TEXT, "golem.runtime.name": TEXT, f"a.{number}": TEXT, "golem.node.debug.subnet": TEXT},
        {"golem.com.usage.vector": [TEXT], "golem.com.pricing.model.linear.coeffs": [int(LONG), 10**300]},
        {"golem.inf.mem.gib": int(LONG), "golem.inf.cpu.threads": -int(LONG), "x": 1e308, "list": [TEXT, int(LONG)]},
        {TEXT: TEXT}, {"golem.runtime.name": [TEXT]}, {"golem.node.id.name": {"deep": {TEXT[:20]: TEXT}}},
    ]  # fmt: skip


def subscribe(http: httpx.Client, kind: str) -> int:
    taken = 0
    for one in properties(taken):
        for constraints in ("()", f"(a={TEXT})", f"({TEXT}=*)", f"(golem.inf.mem.gib>{LONG})"):
            body = json.dumps({"properties": one, "constraints": constraints})
            answer = http.post(f"/market-api/v1/{kind}s", content=body, headers={"Content-Type": "application/json"})
            taken += answer.status_code == 201
            is_clean(json.dumps(answer.json()), 0)
    return taken


def deal(node: LocalNode) -> None:
    """Buy as a requestor does whose every text is hostile, of the agent that sells in the subnet."""
    buyer = Requestor(node.api_url, node.app_key)
    said = {"message": TEXT, "golem.requestor.code": TEXT, TEXT: TEXT}
    package = {"golem.srv.comp.task_package": TEXT, "golem.srv.comp.vm.package_format": TEXT}
    strange = {"golem.node.id.name": TEXT, "x.y": TEXT, **package}
    buyer.set_out(subnet=SUBNET, **strange)
    first = buyer.next_event(lambda event: event["eventType"] == "ProposalEvent" and event["proposal"]["state"] == "Initial")
    path = f"/market-api/v1/demands/{buyer.demand_id}/proposals/{first['proposal']['proposalId']}"
    buyer.counter(first["proposal"]["proposalId"], **{"golem.com.scheme.payu.payment-timeout-sec?": 30, "z": TEXT})
    draft = buyer.next_event(lambda event: event["eventType"] == "ProposalRejectedEvent" or event["proposal"]["state"] == "Draft")
    assert draft["eventType"] == "ProposalEvent", draft
    agreement_id = buyer.agree(draft["proposal"]["proposalId"])
    activity_id = buyer.start(agreement_id)
    script = [{"deploy": {}}, {"run": {"entry_point": TEXT, "args": [TEXT]}}]
    results = buyer.execute(activity_id, *script)
    assert results[-1]["result"] == "Error"
    with suppress(AssertionError):
        buyer.call("POST", f"{path}/reject", said)
    buyer.call("POST", f"/market-api/v1/agreements/{agreement_id}/terminate", said)
    eventually(lambda: buyer.documents("invoices", agreement_id), 40)


def commands(node: LocalNode) -> Iterator[list[str]]:
    """Return what a person asks afterwards, with ids as they are found."""

    def found(*line: str) -> list[dict[str, Any]]:
        result = CliRunner().invoke(main, ["--json", "-d", str(node.data_dir), *line])
        value = json.loads(result.stdout or "[]")
        return value if isinstance(value, list) else []

    yield from (
        ["status"], ["id", "show"], ["net", "status"], ["net", "sessions"], ["net", "ping"], ["payment", "status"],
        ["market", "offers", "--limit", "1000"], ["market", "demands"], ["market", "agreements", "list"],
        ["activity", "list", "--all"], ["quarantine", "list"], ["provider", "preset", "list"],
    )  # fmt: skip
    if "agent" in node.environment:
        yield ["provider", "status"]
    for row in found("market", "offers", "--limit", "1000"):
        yield ["market", "show", "offer", row["id"]]
        for demand in found("market", "demands")[:2]:
            yield ["market", "explain", demand["id"], row["id"]]
    for row in found("market", "demands"):
        yield ["market", "explain", row["id"]]
    for row in found("market", "agreements", "list"):
        yield ["market", "agreements", "get", "--id", row["id"]]
        yield ["payment", "explain", row["id"]]
    for row in found("activity", "list", "--all"):
        yield ["activity", "show", row["id"]]
        yield ["activity", "watch", row["id"]]
    for row in found("quarantine", "list"):
        yield ["quarantine", "show", str(row["number"])]


def ask_everything(node: LocalNode) -> int:
    asked = 0
    for line in commands(node):
        for flags in ([], ["--json"]):
            result = CliRunner().invoke(main, [*flags, "-d", str(node.data_dir), *line])
            assert result.exception is None or isinstance(result.exception, SystemExit), (line, result.exception)
            is_clean(result.output, laid_out=True)
            asked += 1
    return asked


def logs(folder: Path) -> dict[Path, str]:
    """Return every log that the market's processes write."""
    return {path: path.read_text(errors="surrogateescape") for path in folder.rglob("*.log*") if path.is_file()}


@trio_test
async def test_what_real_processes_say_of_hostile_peers(tmp_path: Path) -> None:
    in_thread = partial(trio.to_thread.run_sync, abandon_on_cancel=True)
    with within(60):
        async with open_localnet(tmp_path / "net") as net, trio.open_nursery() as nursery:
            async with trio.open_nursery() as starting:
                for name in ("alice", "bob"):
                    starting.start_soon(net.start_node, name)
            alice, bob = net.nodes["alice"], net.nodes["bob"]
            await bob.command("payment", "fund")
            address = (await alice.command("net", "status"))["addresses"][0]
            await bob.command("net", "connect", address)
            agent = net.start_agent(alice, subnet=SUBNET)
            alice.environment["agent"] = "yes"
            async with node_in_test(tmp_path / "evil", network_name=net.name) as evil:
                await evil.network.wait_up()
                await evil.network.connect(address)
                nursery.start_soon(speak, evil, alice.node_id)
                headers = {"Authorization": f"Bearer {bob.app_key}"}
                with httpx.Client(base_url=bob.api_url, headers=headers, timeout=patience(30), trust_env=False) as http:
                    for kind in ("offer", "demand"):
                        assert await in_thread(subscribe, http, kind) > 3, "some of it is what a market takes"
                await in_thread(deal, bob)
                demand = {"Authorization": f"Bearer {alice.app_key}"}
                with httpx.Client(base_url=alice.api_url, headers=demand, timeout=patience(30), trust_env=False) as http:
                    await in_thread(subscribe, http, "demand")
                for node in (alice, bob):
                    assert await in_thread(ask_everything, node) > 20
            assert alice.process.alive
            assert bob.process.alive
            assert agent.alive
            assert await agent.stop() == 0
        found = logs(tmp_path)
        names = {path.name for path in found}
        assert {"alice.log", "bob.log", "alice-agent.log", "steps.log"} <= names, names
        for path, text in found.items():
            assert "\x1b" not in text, path
            is_clean(text)
        assert TEXT[:1] in found[tmp_path / "net" / "alice.log"]
