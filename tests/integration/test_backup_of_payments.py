"""Nodes that pay one another are backed up meanwhile, killed, restored, or run twice: the money stays exact to the wei.

Real processes on the dev chain. Each debt has an amount that is another power of four: what the chain moved from one node to
the other tells of each debt how often it was paid.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from worlds.patience import within
from worlds.support import trio_test

from golem.chain.contracts import TRANSFER_TOPIC
from golem.chain.devchain import INFO_NAME
from golem.lab.localnet import LocalNet, LocalNode, open_localnet
from protocol.types import amount_text, from_wei

MARKET, PAYMENT = "/market-api/v1", "/payment-api/v1"
PLATFORM = "erc20-holesky-tglm"
BASE = 4
MOST_DEALS = 32  # the last is over 18 GLM, within the allocation of 100
DUE = "2031-01-01T00:00:00+00:00"

pytestmark = [pytest.mark.integration]


class Refused(Exception):
    """A node does not take a call."""


class Side:
    """One node as its agent calls it, over its deaths."""

    def __init__(self, node: LocalNode) -> None:
        self.node, self.allocation = node, ""

    async def call(self, method: str, path: str, body: Any = ..., **query: Any) -> Any:
        """Return the JSON of an answer. Raises `Refused`, `httpx.TransportError`."""
        async with self.node.client() as client:
            content = None if body is ... else json.dumps(body)
            headers = {"Content-Type": "application/json"}
            answer = await client.request(method, path, content=content, headers=headers, params=query)
        if answer.status_code > 299:
            raise Refused(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
        return answer.json() if answer.content else None

    async def allocate(self) -> None:
        body = {"totalAmount": "100", "paymentPlatform": PLATFORM, "makeDeposit": False}
        self.allocation = (await self.call("POST", f"{PAYMENT}/allocations", body))["allocationId"]

    async def proposal(self, path: str, state: str) -> str:
        """Return the id of the next proposal under an offer or demand."""
        with within(60):
            while True:
                for event in await self.call("GET", f"{path}/events", timeout=5, maxEvents=10):
                    if event["eventType"] == "ProposalEvent" and event["proposal"]["state"] == state:
                        return str(event["proposal"]["proposalId"])

    async def pay(self) -> None:
        """Run a payment cycle."""
        await self.call("POST", f"{PAYMENT}/batchCycle/{PLATFORM}/now")

    async def settled(self, invoice: str) -> None:
        with within(120):
            while (await self.call("GET", f"{PAYMENT}/invoices/{invoice}"))["status"] != "SETTLED":
                await trio.sleep(0.1)


class Books:
    """Deals of two nodes, each paying and paid, and what the chain says of them."""

    def __init__(self, net: LocalNet, one: Side, two: Side) -> None:
        self.net, self.sides = net, (one, two)
        self.count = 0
        self.accepted: dict[int, tuple[Side, Side, str]] = {}  # number of a deal -> payer, payee, invoice
        self.doubtful: set[int] = set()  # accepted in the moment of a death: owed, or not

    async def owe(self, payer: Side, payee: Side) -> int:
        """Bring about an accepted invoice over `BASE ** number` wei; return its number."""
        self.count += 1
        number = self.count
        name = f"(golem.node.debug.subnet={self.net.name}-{number})"
        shared = {"golem.node.debug.subnet": f"{self.net.name}-{number}"}
        ends = 4_000_000_000_000
        offer = {"properties": shared, "constraints": f"(&{name})"}
        demand = {
            "properties": {**shared, "golem.srv.comp.expiration": ends, "golem.com.payment.chosen-platform": PLATFORM,
                           f"golem.com.payment.platform.{PLATFORM}.address": payer.node.node_id},
            "constraints": f"(&{name})",
        }  # fmt: skip
        offered = f"{MARKET}/offers/{await payee.call('POST', f'{MARKET}/offers', offer)}"
        demanded = f"{MARKET}/demands/{await payer.call('POST', f'{MARKET}/demands', demand)}"
        initial = await payer.proposal(demanded, "Initial")
        await payer.call("POST", f"{demanded}/proposals/{initial}", demand)
        at_payee = await payee.proposal(offered, "Draft")
        await payee.call("POST", f"{offered}/proposals/{at_payee}", offer)
        draft = await payer.proposal(demanded, "Draft")
        body = {"proposalId": draft, "validTo": DUE}
        agreement = await payer.call("POST", f"{MARKET}/agreements", body)
        await payer.call("POST", f"{MARKET}/agreements/{agreement}/confirm")
        with within(60):
            while True:
                with suppress(Refused):
                    await payee.call("POST", f"{MARKET}/agreements/{agreement}/approve", timeout=20)
                    break
                await trio.sleep(0.05)
        amount = amount_text(from_wei(BASE**number))
        body = {"agreementId": agreement, "amount": amount, "paymentDueDate": DUE}
        invoice = (await payee.call("POST", f"{PAYMENT}/invoices", body))["invoiceId"]
        await payee.call("POST", f"{PAYMENT}/invoices/{invoice}/send")
        body = {"totalAmountAccepted": amount, "allocationId": payer.allocation}
        self.accepted[number] = payer, payee, invoice
        self.doubtful.add(number)
        await payer.call("POST", f"{PAYMENT}/invoices/{invoice}/accept", body)
        self.doubtful.discard(number)
        return number

    async def keep_owing(self, payer: Side, payee: Side) -> None:
        """Make deals, whatever happens to the nodes."""
        while self.count < MOST_DEALS - 1:
            try:
                await self.owe(payer, payee)
            except (Refused, httpx.TransportError):
                await trio.sleep(0.5)

    async def until_settled(self, numbers: int) -> None:
        """Return when so many deals are settled at both sides."""
        done: set[int] = set()
        with within(120):
            while len(done) < numbers:
                for number, (payer, payee, invoice) in list(self.accepted.items()):
                    if number not in done:
                        with suppress(Refused, httpx.TransportError):
                            found = [await side.call("GET", f"{PAYMENT}/invoices/{invoice}") for side in (payer, payee)]
                            if all(each["status"] == "SETTLED" for each in found):
                                done.add(number)
                await trio.sleep(0.1)

    async def moved(self, payer: Side, payee: Side) -> int:
        """Return how many wei the chain has moved from one to the other."""
        info = json.loads((self.net.chain_dir / INFO_NAME).read_text())
        topics = [TRANSFER_TOPIC, *("0x" + "0" * 24 + side.node.node_id[2:] for side in (payer, payee))]
        query = {"jsonrpc": "2.0", "id": 1, "method": "eth_getLogs", "params": [{"fromBlock": "0x0", "topics": topics}]}
        async with httpx.AsyncClient(trust_env=False) as client:
            found = (await client.post(f"http://127.0.0.1:{info['port']}", json=query)).json()["result"]
        return sum(int(log["data"], 16) for log in found)

    async def times_paid(self) -> dict[int, int]:
        """Return how often each deal was paid."""
        paid = dict.fromkeys(range(1, self.count + 1), 0)
        for payer, payee in (self.sides, self.sides[::-1]):
            left = await self.moved(payer, payee)
            for number in range(self.count + 1):
                left, digit = divmod(left, BASE)
                if digit:
                    paid[number] = digit
                    assert self.accepted[number][0] is payer
            assert left == 0
        return paid

    async def moved_once(self, numbers: Iterable[int]) -> None:
        """Return when the chain says of each of these deals that it is paid, once."""
        with within(60):
            while True:
                paid = await self.times_paid()
                assert max(paid.values()) <= 1, paid
                if all(paid[number] for number in numbers):
                    return
                await trio.sleep(0.1)

    async def held(self, known: Iterable[int]) -> set[int]:
        """Deals whose payment was under way when the first node died: nobody but the chain knows that they are paid. They
        wait, and it is said why."""
        one, _ = self.sides
        with within(90):
            while True:
                paid, left = await self.times_paid(), set()
                for number in known:
                    payer, payee, invoice = self.accepted[number]
                    found = [await side.call("GET", f"{PAYMENT}/invoices/{invoice}") for side in (payer, payee)]
                    if any(each["status"] != "SETTLED" for each in found):
                        left.add(number)
                problems = " ".join((await one.node.command("payment", "status"))["problems"])
                waits = "may be paid by that already" in problems
                if not left or (waits and all(paid[number] == 1 and self.accepted[number][0] is one for number in left)):
                    return left
                assert max(paid.values()) <= 1, paid
                await trio.sleep(0.2)

    def goes_on(self, side: Side) -> None:
        """The first node is this process from now on."""
        one, two = self.sides
        self.sides = side, two
        self.accepted = {
            number: (side if payer is one else payer, side if payee is one else payee, invoice)
            for number, (payer, payee, invoice) in self.accepted.items()
        }

    async def resume(self, side: Side) -> None:
        """Once a restored node has heard its peers, do what a person does: let payments go on."""
        with within(60):
            while not (await side.node.command("status"))["wentBack"]:
                await trio.sleep(0.2)
        await side.node.command("payment", "resume")

    async def check(self, known: Iterable[int]) -> None:
        """Nothing is paid twice. What was accepted of the `known` deals is paid, and settled on both sides."""
        numbers = {*known} - self.doubtful
        numbers -= await self.held(numbers)
        for number in sorted(numbers):
            payer, payee, invoice = self.accepted[number]
            await payer.settled(invoice)
            await payee.settled(invoice)
        paid = await self.times_paid()
        assert {number: times for number, times in paid.items() if number in numbers and times != 1} == {}, paid
        assert all(times == 0 for number, times in paid.items() if number not in self.accepted), paid
        assert max(paid.values()) <= 1, paid


async def market(net: LocalNet, cycle: str) -> Books:
    """Start two nodes with money, both of which will pay."""
    extra = {"PAYMENT_CYCLE_DEFAULT_INTERVAL": cycle, "MIN_PAYMENT_AMOUNT_GLM": "0"}
    one, two = Side(await net.start_node("one", extra=extra)), Side(await net.start_node("two", extra=extra))
    for side in (one, two):
        await side.node.command("payment", "fund")
        await side.allocate()
    return Books(net, one, two)


async def put_back(books: Books, backup: Path) -> None:
    """Kill the first node, restore it, start it."""
    one, _ = books.sides
    await one.node.process.stop(signal.SIGKILL)
    told = await one.node.command("restore", str(backup))
    assert told["nodeId"] == one.node.node_id
    await books.net.restart_node(one.node)


@trio_test
async def test_a_node_restored_beside_the_payments_made_since_pays_nothing_twice(tmp_path: Path) -> None:
    async with open_localnet(tmp_path / "net") as net:
        books = await market(net, "2s")
        one, two = books.sides
        backup = tmp_path / "backup.tar"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(books.keep_owing, one, two)
            nursery.start_soon(books.keep_owing, two, one)
            await books.until_settled(4)
            known = set(books.accepted)
            await one.node.command("backup", str(backup))
            await books.until_settled(8)
            nursery.cancel_scope.cancel()
        await put_back(books, backup)
        await books.resume(one)
        await books.check(known)


@trio_test
async def test_orders_of_the_backup_that_were_paid_since_are_not_paid_again(tmp_path: Path) -> None:
    """They wait in the backup's journal; the peer's word that they were paid reaches the restored node before a cycle."""
    async with open_localnet(tmp_path / "net") as net:
        books = await market(net, "1h")
        one, two = books.sides
        backup = tmp_path / "backup.tar"
        for payer, payee in ((one, two), (two, one), (one, two)):
            await books.owe(payer, payee)
        await one.node.command("backup", str(backup))
        for payer, payee in ((one, two), (two, one)):  # under agreements that the backup does not know, paid with the others
            await books.owe(payer, payee)
        for side in (one, two):
            await side.pay()
        await books.check(range(1, 6))
        await put_back(books, backup)
        await books.resume(one)
        await one.pay()
        await books.check(range(1, 4))
        number = await books.owe(one, two)
        await one.pay()
        await one.settled(books.accepted[number][2])
        await books.check(range(1, 4))


@pytest.mark.parametrize("dies", ["copy", "original"])
@trio_test
async def test_of_two_copies_one_goes_on_when_the_other_is_dead(tmp_path: Path, dies: str) -> None:
    """The directory is copied with orders in it; both run, the original pays; one is killed, the other lives on."""
    async with open_localnet(tmp_path / "net") as net:
        books = await market(net, "1h")
        one, two = books.sides
        for payer, payee in ((one, two), (two, one), (one, two)):
            await books.owe(payer, payee)
        await one.node.process.stop()
        shutil.copytree(one.node.data_dir, net.folder / "copy")
        await net.restart_node(one.node)
        copy = Side(await net.start_node("copy", extra={"PAYMENT_CYCLE_DEFAULT_INTERVAL": "1h", "MIN_PAYMENT_AMOUNT_GLM": "0"}))
        assert copy.node.node_id == one.node.node_id
        copy.allocation = one.allocation
        for side in (one, two):
            await side.pay()
        await books.moved_once(range(1, 4))  # who of the two is heard by the peer depends on who spoke first
        await copy.pay()
        left, other = (one, copy) if dies == "copy" else (copy, one)
        await other.node.process.stop(signal.SIGKILL)
        if dies == "copy":  # the peer hears the copy by now: as `golem status` says, the other one is started again
            await left.node.process.stop()
            await net.restart_node(left.node)
        books.goes_on(left)
        await books.check(range(1, 4))  # a copy that has paid nothing hears of its peer what was paid
        if await books.held(range(1, 4)):
            assert dies == "original", "it knows what it paid"
            return  # the copy does not pay again what nobody but the chain knows of; a person who looks may say that it shall
        await left.node.command("payment", "resume")
        await books.owe(left, two)
        await left.pay()
        await books.owe(two, left)
        await two.pay()
        await books.check(range(1, 6))
