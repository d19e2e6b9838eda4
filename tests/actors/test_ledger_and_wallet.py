"""Ledger and wallet of several nodes together, under repeats, reordering, failed transfers and forgotten questions."""

from __future__ import annotations

import random
from decimal import Decimal

import pytest
from worlds.money import Done, Node, World

from actors.ledger.machine import LedgerAgreementRow, OrderRow, PaymentDocumentRow, PaymentRow, total_of
from protocol.ledger import CancelInvoice, RejectInvoice, ReleaseAllocation
from protocol.types import Refused
from protocol.wallet import RunCycle


def settle_everything(world: World) -> None:
    """Faults stop; given-up orders are run by hand; all must converge."""
    world.faults = False
    world.down.clear()
    world.run()
    for node in world.nodes:
        world.ask(node, RunCycle("erc20-local-tglm"), "wallet")
    world.run()


def check_settled(world: World) -> None:
    paid: dict[tuple[str, str], Decimal] = {}
    for _, payer, payee, amount in world.transfers:
        paid[payer, payee] = total_of((paid.get((payer, payee), Decimal(0)), amount))
    owed: dict[tuple[str, str], Decimal] = {}
    for node in world.nodes:
        for order in node.all(OrderRow, "order/"):
            pair = (order.payer_addr, order.payee_addr)
            owed[pair] = total_of((owed.get(pair, Decimal(0)), order.amount))
        for agreement in node.all(LedgerAgreementRow, "agreement/"):
            other = world.by_id[agreement.peer].rows["ledger"][f"agreement/{agreement.agreement_id}"]
            assert agreement.accepted == agreement.paid == other.accepted == other.paid
        for kind in ("debit-note", "invoice"):
            for row in node.all(PaymentDocumentRow, f"{kind}/"):
                assert row.status != "ACCEPTED", row
        for payment in node.all(PaymentRow, "payment/"):
            assert payment.state in ("ACKNOWLEDGED", "VERIFIED"), payment
    assert paid == owed
    assert not world.violations


class Life:
    """Random commands over a few agreements; everybody may repeat anything."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.world = World(3, self.rng)
        self.payer, self.other, self.both = self.world.nodes
        self.count = 0
        shared = self.other.id  # two providers with one purse: their orders share a transfer
        self.terms = [
            ("a0", self.payer, self.other, ("act0", "act1"), ""),
            ("a1", self.payer, self.both, ("act2",), shared),
            ("a2", self.both, self.other, ("act3",), ""),
        ]
        for agreement_id, payer, payee, activities, purse in self.terms:
            self.world.agree(payer, payee, agreement_id, activities, purse)
        self.allocations = [
            (node, f"al{index}{number}") for index, node in enumerate((self.payer, self.both)) for number in range(2)
        ]
        for node, allocation_id in self.allocations:
            assert self.world.allocate(node, allocation_id, self.rng.choice(("5", "50"))) == Done()

    def command(self) -> None:
        rng, world = self.rng, self.world
        agreement_id, payer, payee, activities, _ = rng.choice(self.terms)
        allocation = rng.choice([each for node, each in self.allocations if node is payer])
        what = rng.random()
        if what < 0.3:
            self.count += 1
            world.note(payee, f"n{self.count}", rng.choice(activities), f"{rng.randint(0, 300) / 100}")
        elif what < 0.4:
            self.count += 1
            world.invoice(payee, f"i{self.count}", agreement_id, f"{rng.randint(0, 800) / 100}", activities)
        elif what < 0.6:
            if row := self._any(payee, agreement_id):
                world.send(payee, row.kind, row.document_id)
        elif what < 0.92:
            if row := self._any(payer, agreement_id):
                for _ in range(rng.choice((1, 1, 2))):
                    world.accept(payer, row.kind, row.document_id, allocation)
        elif what < 0.95:
            if (row := self._any(payee, agreement_id)) and row.kind == "invoice":
                world.ask(payee, CancelInvoice(row.document_id))
        elif what < 0.98:
            if (row := self._any(payer, agreement_id)) and row.kind == "invoice":
                world.ask(payer, RejectInvoice(row.document_id, '{"rejectionReason":"BAD_SERVICE"}'))
        else:
            world.ask(payer, ReleaseAllocation(allocation))

    def _any(self, node: Node, agreement_id: str) -> PaymentDocumentRow | None:
        rows = [*node.all(PaymentDocumentRow, "debit-note/"), *node.all(PaymentDocumentRow, "invoice/")]
        rows = [row for row in rows if row.agreement_id == agreement_id]
        return self.rng.choice(rows) if rows else None


@pytest.mark.parametrize("part", range(10))
def test_what_is_accepted_is_paid_exactly_once(part: int) -> None:
    settled = 0
    for seed in range(part * 50, part * 50 + 50):
        life = Life(seed)
        try:
            for _ in range(60):
                life.command()
                for _ in range(life.rng.randint(0, 6)):
                    life.world.step()
            settle_everything(life.world)
            check_settled(life.world)
        except Exception:
            print(f"seed {seed}")
            raise
        settled += sum(row.status == "SETTLED" for row in life.payer.all(PaymentDocumentRow, "debit-note/"))
    assert settled > 50, "the lives are too dull to prove anything"


def test_whatever_was_said_may_be_said_again() -> None:
    world = World(2)
    payer, payee = world.nodes
    world.agree(payer, payee, "a1", ("act",))
    world.allocate(payer, "al", "10")
    world.note(payee, "n1", "act", "0.4")
    world.invoice(payee, "i1", "a1", "1", ("act",))
    for kind, document_id in (("debit-note", "n1"), ("invoice", "i1")):
        world.send(payee, kind, document_id)
        world.run()
        world.accept(payer, kind, document_id, "al")
    world.run()

    def state() -> object:
        rows = {
            (node.id, actor, key): rows[key]
            for node in world.nodes for actor, rows in node.rows.items() for key in rows.raw if key[:5] != "cycle"
        }  # fmt: skip
        return rows, world.transfers, [{feed: list(events) for feed, events in node.feeds.items()} for node in world.nodes]

    before = state()
    for _ in range(2):
        world.say_again()
        world.run()
        assert state() == before
    check_settled(world)


def test_two_providers_with_one_purse_settle_from_one_transfer() -> None:
    world = World(3)
    payer, first, second = world.nodes
    world.agree(payer, first, "a1", payee_addr=first.id)
    world.agree(payer, second, "a2", payee_addr=first.id)
    world.allocate(payer, "al", "10")
    for node, agreement_id, invoice_id in ((first, "a1", "i1"), (second, "a2", "i2")):
        world.invoice(node, invoice_id, agreement_id, "1.5")
        world.send(node, "invoice", invoice_id)
    world.run()
    for invoice_id in ("i1", "i2"):
        assert world.accept(payer, "invoice", invoice_id, "al") == Done()
    world.run()
    assert [(payee, amount) for _, _, payee, amount in world.transfers] == [(first.id, Decimal("3.0"))]
    check_settled(world)


def test_nothing_more_than_allocated_can_be_accepted() -> None:
    world = World(2)
    payer, payee = world.nodes
    world.agree(payer, payee, "a1", ("act",))
    world.allocate(payer, "al", "1")
    world.note(payee, "n1", "act", "0.6")
    world.invoice(payee, "i1", "a1", "1.1", ("act",))
    world.send(payee, "debit-note", "n1")
    world.send(payee, "invoice", "i1")
    world.run()
    assert world.accept(payer, "debit-note", "n1", "al") == Done()
    answer = world.accept(payer, "invoice", "i1", "al")
    assert answer == Refused("unfunded", "Not enough funds. Allocated: 0.4 Needed: 0.5")
    world.run()
    assert [str(amount) for *_, amount in world.transfers] == ["0.6"]
    assert world.document(payer, "invoice", "i1").status == "RECEIVED"
