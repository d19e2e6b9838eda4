"""Nodes of a LAN: machines (network namespaces on one bridge) that know of each other by mDNS alone.

One test tells a day of such a LAN, since each part needs what the part before built: nodes meet (one of them before it
has an address), a market forms, a late comer catches up, then a cable is pulled, a machine freezes and another moves to
a new address (all at once: the watchdogs run side by side).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from worlds.patience import patience
from worlds.support import trio_test

from golem.bus.client import open_client
from golem.lab.localnet import LocalNode, Process

pytestmark = [
    pytest.mark.integration, pytest.mark.root,
    pytest.mark.skipif(shutil.which("ip") is None, reason="needs the program ip (Debian: apt-get install iproute2)"),
]  # fmt: skip

MARKET = "/market-api/v1"
NOBODY = "http://127.0.0.1:9"  # no chain is needed here: the nodes are told of one where nothing listens
CALL = """
import sys, urllib.error, urllib.request
method, url, key, body = sys.argv[1:]
headers = {"Authorization": "Bearer " + key, "Content-Type": "application/json"}
request = urllib.request.Request(url, body.encode() or None, headers, method=method)
try:
    answer = urllib.request.urlopen(request, timeout=300)
except urllib.error.HTTPError as error:
    sys.exit(f"{method} {url}: {error.code} {error.read().decode()}")
sys.stdout.write(answer.read().decode())
"""


def ip(*arguments: str) -> None:
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if result.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {result.stderr.strip()}")


class Lan:
    """A bridge in a namespace of its own, and machines that are plugged into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tag = f"golem-{os.getpid()}"
        self.switch = f"{self.tag}-switch"
        self.name = f"lan-{secrets.token_hex(4)}"
        self.namespaces: list[str] = []
        self.nodes: dict[str, LocalNode] = {}

    def build(self) -> None:
        """Raises `OSError` where namespaces cannot be made."""
        self._namespace(self.switch)
        ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.switch, "link", "set", "bridge", "up")

    def plug_in(self, machine: str, address: str | None = None) -> str:
        """Make a machine's namespace with an interface of the LAN ("": without an address yet); return the namespace."""
        namespace = f"{self.tag}-{machine}"
        self._namespace(namespace)
        address = f"10.77.0.{len(self.namespaces)}/24" if address is None else address
        ip("-n", self.switch, "link", "add", machine, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        ip("-n", self.switch, "link", "set", machine, "master", "bridge", "up")
        if address:
            ip("-n", namespace, "address", "add", address, "brd", "+", "dev", "eth0")
        ip("-n", namespace, "link", "set", "eth0", "up")
        ip("-n", namespace, "link", "set", "lo", "up")
        return namespace

    def _namespace(self, name: str) -> None:
        ip("netns", "add", name)
        self.namespaces.append(name)

    def cable(self, machine: str, state: str) -> None:
        ip("-n", f"{self.tag}-{machine}", "link", "set", "eth0", state)

    def readdress(self, machine: str, address: str) -> None:
        """Give a machine another address, as a DHCP server does."""
        ip("-n", f"{self.tag}-{machine}", "address", "flush", "dev", "eth0")
        ip("-n", f"{self.tag}-{machine}", "address", "add", address, "brd", "+", "dev", "eth0")

    async def start_node(self, machine: str, address: str | None = None) -> LocalNode:
        """Start a node on a machine; it is told nothing but the network's name."""
        namespace, data_dir, key = self.plug_in(machine, address), self.folder / machine, secrets.token_hex(16)
        line = ["ip", "netns", "exec", namespace, sys.executable, "-m", "golem.cli", "--data-dir", str(data_dir), "run",
                "--plain-key", "--network-name", self.name, "--chain-dir", str(self.folder / "chain")]  # fmt: skip
        environment = {"YAGNA_AUTOCONF_APPKEY": key, "GOLEM_CHAIN_URL": NOBODY}
        process = Process(machine, line, environment, self.folder / f"{machine}.log")
        node = self.nodes[machine] = LocalNode(machine, data_dir, key, process)
        process.start()
        await node.wait_ready()
        return node

    async def rest(self, node: LocalNode, method: str, path: str, body: Any = None) -> Any:
        """Call a node's REST API from its own machine."""
        text = "" if body is None else json.dumps(body)
        line = ["ip", "netns", "exec", f"{self.tag}-{node.name}", sys.executable, "-ISc", CALL]
        result = await trio.run_process(
            [*line, method, node.api_url + path, node.app_key, text], capture_stdout=True, capture_stderr=True, check=False
        )
        assert result.returncode == 0, result.stderr.decode()
        return json.loads(result.stdout or b"null")

    async def remove(self) -> None:
        """End the nodes and take the LAN down."""
        for node in self.nodes.values():
            if node.process.alive and node.process.running is not None:
                node.process.running.send_signal(signal.SIGCONT)
        async with trio.open_nursery() as nursery:
            for node in self.nodes.values():
                nursery.start_soon(node.process.stop)
        for namespace in reversed(self.namespaces):
            await trio.run_process(["ip", "netns", "delete", namespace], capture_stderr=True, check=False)


@asynccontextmanager
async def open_lan(folder: Path) -> AsyncIterator[Lan]:
    lan = Lan(folder)
    try:
        try:
            lan.build()
        except OSError as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield lan
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + patience(20)):
            await lan.remove()


async def ask(node: LocalNode, command: str, **arguments: Any) -> Any:
    """Ask as `golem` does, over the bus: a file, so it works from every namespace."""
    async with open_client(node.data_dir / "bus.sock", f"cli:{command}", "cli") as client:
        return json.loads(await client.call("", f"cli:{command}", json.dumps(arguments).encode(), 10))


async def is_up(node: LocalNode) -> bool:
    """Whether the host runs. There is no chain in this test, which is the other thing that `status` has to say."""
    return "peer-to-peer host" not in ((await ask(node, "status"))["problem"] or "")


async def peers(node: LocalNode) -> set[str]:
    return {session["nodeId"] for session in await ask(node, "net_sessions")}


async def until(what: str, lan: Lan, holds: Callable[[], Awaitable[bool]], timeout_s: float) -> None:
    """Return when it holds; fail with the nodes' logs past the timeout."""
    started = time.monotonic()
    with trio.move_on_after(patience(timeout_s)):
        while not await holds():
            await trio.sleep(0.1)
        print(f"{what}: after {time.monotonic() - started:.1f} s")
        return
    logs = "\n".join(f"--- {node.name} ({node.node_id})\n{node.process.tail(25)}" for node in lan.nodes.values())
    raise AssertionError(f"not within {timeout_s:g} s: {what}\n{logs}")


async def publish_offer(lan: Lan, node: LocalNode, name: str) -> str:
    offer = {"properties": {"golem.node.id.name": name}, "constraints": "(golem.srv.comp.expiration>0)"}
    return str(await lan.rest(node, "POST", f"{MARKET}/offers", offer))


async def publish_demand(lan: Lan, node: LocalNode) -> str:
    expires_ms = int((time.time() + 1800) * 1000)
    demand = {"properties": {"golem.srv.comp.expiration": expires_ms}, "constraints": "(golem.node.id.name=*)"}
    return str(await lan.rest(node, "POST", f"{MARKET}/demands", demand))


async def proposals(lan: Lan, node: LocalNode, kind: str, subscription: str, count: int, timeout_s: float = 10) -> list[Any]:
    """Return the next `count` proposals of a subscription (`demands` or `offers`)."""
    found: list[Any] = []
    with trio.move_on_after(patience(timeout_s)):
        while len(found) < count:
            events = await lan.rest(node, "GET", f"{MARKET}/{kind}/{subscription}/events?timeout=3&maxEvents=10")
            found += [event["proposal"] for event in events if event["eventType"] == "ProposalEvent"]
        return found
    raise AssertionError(f"{len(found)} of {count} proposals for {node.name}'s {kind} within {timeout_s:g} s:\n"
                         + "\n".join(one.process.tail(15) for one in lan.nodes.values()))  # fmt: skip


@trio_test
async def test_a_lan(tmp_path: Path) -> None:
    async with open_lan(tmp_path) as lan:
        alice, bob = await lan.start_node("alice"), await lan.start_node("bob", address="")
        await until("bob's host runs on loopback alone", lan, lambda: is_up(bob), 10)
        lan.readdress("bob", "10.77.0.42/24")  # the DHCP server was slow
        await two_meet(lan, alice, bob)
        offer = await bobs_offer_is_seen(lan, alice, bob)
        carol = await a_late_comer_sees_it_too(lan, alice, bob)
        await mail_waits_for_lost_machines(lan, alice, bob, carol, offer)


async def two_meet(lan: Lan, alice: LocalNode, bob: LocalNode) -> None:
    async def met() -> bool:
        return await peers(alice) == {bob.node_id} and await peers(bob) == {alice.node_id}

    await until("two nodes find each other", lan, met, 10)
    addresses = [session["address"] for session in await ask(alice, "net_sessions")]
    assert all(address.startswith("/ip4/10.77.0.") for address in addresses), addresses


async def bobs_offer_is_seen(lan: Lan, alice: LocalNode, bob: LocalNode) -> str:
    """The demand is there first: the offer has to come by itself."""
    demand = await publish_demand(lan, alice)
    offer = await publish_offer(lan, bob, "bob")
    found = await proposals(lan, alice, "demands", demand, 1, 5)
    assert (found[0]["issuerId"], found[0]["properties"]["golem.node.id.name"]) == (bob.node_id, "bob")
    await lan.rest(alice, "DELETE", f"{MARKET}/demands/{demand}")
    return offer


async def a_late_comer_sees_it_too(lan: Lan, alice: LocalNode, bob: LocalNode) -> LocalNode:
    carol = await lan.start_node("carol")

    async def met() -> bool:
        return await peers(carol) == {alice.node_id, bob.node_id}

    await until("a third node finds both", lan, met, 10)
    demand = await publish_demand(lan, carol)
    found = await proposals(lan, carol, "demands", demand, 1, 5)
    assert found[0]["issuerId"] == bob.node_id
    await lan.rest(carol, "DELETE", f"{MARKET}/demands/{demand}")
    return carol


async def mail_waits_for_lost_machines(lan: Lan, alice: LocalNode, bob: LocalNode, carol: LocalNode, bobs_offer: str) -> None:
    """What Alice tells Bob (moved), Carol (frozen) and Dave (no cable) is accepted at once and arrives when they are back."""
    dave = await lan.start_node("dave")
    offers = {bob: bobs_offer, carol: await publish_offer(lan, carol, "carol"), dave: await publish_offer(lan, dave, "dave")}
    others = {node.node_id for node in offers}
    demand = await publish_demand(lan, alice)
    found = await proposals(lan, alice, "demands", demand, 3)
    assert {one["issuerId"] for one in found} == others

    lan.cable("bob", "down")
    lan.cable("dave", "down")
    assert carol.process.running is not None
    carol.process.running.send_signal(signal.SIGSTOP)
    for one in found:
        properties = {"golem.srv.comp.expiration": int((time.time() + 1800) * 1000)}
        counter = {"properties": properties, "constraints": "()"}
        await lan.rest(alice, "POST", f"{MARKET}/demands/{demand}/proposals/{one['proposalId']}", counter)

    async def alone() -> bool:
        return not await peers(alice)

    async def together() -> bool:
        return await peers(alice) == others and alice.node_id in await peers(bob) & await peers(carol) & await peers(dave)

    await until("lost and frozen peers are noticed", lan, alone, 30)
    lan.readdress("bob", "10.77.0.99/24")
    lan.cable("bob", "up")
    lan.cable("dave", "up")
    carol.process.running.send_signal(signal.SIGCONT)
    for node, offer in offers.items():
        arrived = await proposals(lan, node, "offers", offer, 1, 20)
        assert arrived[0]["issuerId"] == alice.node_id

    async def moved() -> bool:
        return any("/ip4/10.77.0.99/" in address for address in (await ask(bob, "net_status"))["addresses"])

    await until("bob listens on his new address", lan, moved, 10)
    await until("all are connected again", lan, together, 20)
