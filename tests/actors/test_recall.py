"""Ledgers whose disk went back in time: what was signed and paid since is told again, and nothing is paid twice."""

from __future__ import annotations

import random
from decimal import Decimal

import pytest
from msgspec.structs import replace
from worlds.money import PLATFORM, Done, Node, World

from actors.ledger.machine import LedgerAgreementRow, OrderRow, PaymentRow, acceptance_of, total_of
from protocol.ledger import AgreementPayment, PaymentBody, PaymentSent, Recall, Recalled, decode_body, encode_body
from protocol.types import MAX_CLOCK_SKEW_S, PeerLost, Violation
from protocol.wallet import RunCycle, Transfer, TransferConfirmed, TransferFailed, TransferMined, TransferSent


@pytest.fixture
def world() -> World:
    world = World(2)
    payer, payee = world.nodes
    world.agree(payer, payee, "ag", ("act",))
    assert world.allocate(payer, "al", "100") == Done()
    world.run()
    return world


def bill(world: World, invoice_id: str = "in", total: str = "10") -> None:
    payee = world.nodes[1]
    assert world.invoice(payee, invoice_id, "ag", total) == Done()
    assert world.send(payee, "invoice", invoice_id) == Done()
    world.run()


def paid(world: World) -> Decimal:
    return total_of(amount for _, _, _, amount in world.transfers)


def status(node: Node, document_id: str = "in", kind: str = "invoice") -> str:
    row = node.rows["ledger"].get(f"{kind}/{document_id}")
    return row.status if row else "unknown"


def test_a_payer_that_forgot_a_paid_invoice_does_not_pay_it_again(world: World) -> None:
    payer, payee = world.nodes
    backup = world.backup(payer)
    bill(world)
    world.accept(payer, "invoice", "in", "al")
    world.run()
    assert (status(payer), status(payee), paid(world)) == ("SETTLED", "SETTLED", 10)
    world.restore(payer, backup)
    world.run()
    assert (status(payer), status(payee)) == ("SETTLED", "SETTLED")
    assert world.accept(payer, "invoice", "in", "al") == Done()  # its agent was restored as well, and accepts again
    world.run()
    assert paid(world) == 10
    assert [row.state for row in payer.all(PaymentRow, "payment/")] == ["ACKNOWLEDGED"]
    assert not world.violations


def test_a_payer_that_forgot_its_acceptance_pays_it(world: World) -> None:
    payer, payee = world.nodes
    bill(world)
    backup = world.backup(payer)
    world.accept(payer, "invoice", "in", "al")
    while world.links[f"{payer.id}/ledger", f"{payee.id}/ledger"]:
        world.step()
    assert (status(payee), paid(world)) == ("ACCEPTED", 0)
    world.restore(payer, backup)
    world.run()
    assert (status(payer), status(payee), paid(world)) == ("SETTLED", "SETTLED", 10)
    assert [row.allocation_id for row in payer.all(OrderRow, "order/")] == [""]
    assert not world.violations


def test_an_acceptance_without_an_allocation_is_owed_all_the_same(world: World) -> None:
    payer, payee = world.nodes
    backup = world.backup(payer)
    assert world.allocate(payer, "more", "500") == Done()
    bill(world, total="300")
    world.accept(payer, "invoice", "in", "more")
    while world.links[f"{payer.id}/ledger", f"{payee.id}/ledger"]:
        world.step()
    world.restore(payer, backup)
    world.run()
    assert paid(world) == 300
    assert [row.allocation_id for row in payer.all(OrderRow, "order/")] == [""]


def test_notes_paid_and_forgotten_are_not_paid_with_the_invoice(world: World) -> None:
    payer, payee = world.nodes
    backup = world.backup(payer)
    for number, total in ((1, "2"), (2, "5")):
        assert world.note(payee, f"n{number}", "act", total) == Done()
        assert world.send(payee, "debit-note", f"n{number}") == Done()
        world.run()
        world.accept(payer, "debit-note", f"n{number}", "al")
        world.run()
    assert paid(world) == 5
    assert world.note(payee, "n3", "act", "6") == Done()  # on its way, not accepted
    assert world.send(payee, "debit-note", "n3") == Done()
    world.run()
    world.restore(payer, backup)
    world.run()
    assert status(payer, "n3", "debit-note") == "RECEIVED"
    world.accept(payer, "debit-note", "n3", "al")
    bill(world, total="9")
    world.accept(payer, "invoice", "in", "al")
    world.run()
    assert (status(payer), status(payee), paid(world)) == ("SETTLED", "SETTLED", 9)
    assert not world.violations


def test_a_payee_gets_its_own_invoice_back_and_what_became_of_it(world: World) -> None:
    payer, payee = world.nodes
    backup = world.backup(payee)
    assert world.note(payee, "n1", "act", "2") == Done()
    assert world.send(payee, "debit-note", "n1") == Done()
    bill(world)
    world.accept(payer, "invoice", "in", "al")
    world.run()
    assert status(payee) == "SETTLED"
    world.restore(payee, backup)
    assert status(payee) == "unknown"
    world.run()
    assert (status(payer), status(payee), paid(world)) == ("SETTLED", "SETTLED", 10)
    assert status(payee, "n1", "debit-note") == "RECEIVED"
    agreement = payee.rows["ledger"]["agreement/ag"]
    assert isinstance(agreement, LedgerAgreementRow)
    assert (agreement.accepted, agreement.paid) == ("10", "10")
    assert not world.violations


def test_nobody_signs_for_us(world: World) -> None:
    payer, payee = world.nodes
    bill(world)
    row = payer.rows["ledger"]["invoice/in"]
    forged = payee.sign("acceptance", acceptance_of(row))
    with pytest.raises(Violation):
        world.tell(payer, Recalled(forged), f"{payee.id}/ledger")
    with pytest.raises(Violation):
        world.tell(payer, Recalled(payer.sign("offer", b"{}")), f"{payee.id}/ledger")
    assert status(payer) == "RECEIVED"


def test_a_peer_is_told_again_once_in_a_while_however_often_it_asks(world: World) -> None:
    payer, payee = world.nodes
    bill(world)
    for _ in range(20):
        world.tell(payee, PeerLost(f"{payer.id}/ledger", 1, 2), f"{payee.id}/ledger")
    link = world.links[f"{payee.id}/ledger", f"{payer.id}/ledger"]
    assert len(link) == 2  # the question, and the invoice
    world.run()  # those that had to wait follow once
    assert not world.violations


def test_a_restored_node_asks_everybody(world: World) -> None:
    payer = world.nodes[0]
    backup = world.backup(payer)
    bill(world)
    world.accept(payer, "invoice", "in", "al")
    world.run()
    raw, _ = backup
    for name, rows in payer.rows.items():
        rows.raw = dict(raw[name])
    world.restored.add(payer.id)
    assert world.ask(payer, Recall()) == Done()  # and nothing was lost on a link
    world.run()
    assert (status(payer), paid(world)) == ("SETTLED", 10)


@pytest.mark.parametrize("seed", range(60))
def test_whenever_a_disk_goes_back_all_is_paid_once(seed: int) -> None:
    """Notes and invoices, accepted and paid; then either disk is put back to some former time, perhaps both in turn."""
    rng = random.Random(seed)
    world = World(2)
    payer, payee = world.nodes
    world.agree(payer, payee, "ag", ("act",))
    assert world.allocate(payer, "al", "100") == Done()
    world.run()
    backups: dict[str, list[object]] = {node.id: [world.backup(node)] for node in world.nodes}
    total = 0
    for number in range(rng.randrange(1, 4)):
        total += rng.randrange(1, 5)
        world.note(payee, f"n{number}", "act", str(total))
        world.send(payee, "debit-note", f"n{number}")
        world.run()
        for node in rng.sample(world.nodes, rng.randrange(3)):
            backups[node.id].append(world.backup(node))
        if rng.random() < 0.7:
            world.accept(payer, "debit-note", f"n{number}", "al")
            world.run()
    for node in rng.sample(world.nodes, rng.randrange(1, 3)):
        world.restore(node, rng.choice(backups[node.id]))
        world.run()
    total += rng.randrange(5)
    world.now += 3600
    world.invoice(payee, "in", "ag", str(total))
    world.send(payee, "invoice", "in")
    world.run()
    world.accept(payer, "invoice", "in", "al")
    world.run()
    assert paid(world) == total
    assert status(payer) == status(payee) == "SETTLED"
    assert not world.violations


def test_a_payee_that_forgot_what_was_paid_is_not_paid_with_the_same_money(world: World) -> None:
    payer, payee = world.nodes
    backup = world.backup(payee)
    bill(world)
    world.accept(payer, "invoice", "in", "al")
    world.run()
    ((tx_hash, *_),) = world.transfers
    forget(world, payee, backup)
    world.now += MAX_CLOCK_SKEW_S + 1
    paying = next(row for row in payer.all(PaymentRow, "payment/"))
    world.agree(payer, payee, "later")
    assert world.invoice(payee, "in-later", "later", "10") == Done()
    assert world.send(payee, "invoice", "in-later") == Done()
    world.run()
    assert world.accept(payer, "invoice", "in-later", "al") == Done()
    world.run()
    for number, parts in enumerate(
        ([AgreementPayment("later", "10")], [AgreementPayment("ag", "1"), AgreementPayment("later", "9")])
    ):
        body = replace(decode_body(PaymentBody, paying.body), payment_id=f"old{number}", agreement_payments=tuple(parts))
        world.tell(payee, PaymentSent(payer.sign("payment", encode_body(body))), f"{payer.id}/ledger")
    while world.pool:
        world.step()
    old = {row.payment_id: (row.state, row.reason) for row in payee.all(PaymentRow, "payment/") if row.tx_hash == tx_hash}
    assert {state for state, _ in old.values()} == {"REFUSED"}, old
    assert all("older than" in reason for _, reason in old.values()), old


# -- the journal went back, and the chain port's file did not
def forget(world: World, node: Node, backup: object) -> None:
    """Put the journal back, with nobody to tell the ledger what it forgot."""
    raw, wakes = backup  # type: ignore[misc]
    for name, rows in node.rows.items():
        rows.raw = dict(raw[name])
    node.wakes = dict(wakes)
    world.restored.add(node.id)
    world.pool.clear()
    world.links.clear()


def test_an_order_that_was_paid_is_not_paid_again_with_others(world: World) -> None:
    """A batch was named by the orders that came together; now others come together."""
    payer, payee = world.nodes
    world.agree(payer, payee, "ag2")
    bill(world)
    backup = world.backup(payer)
    world.accept(payer, "invoice", "in", "al")
    world.run()
    assert paid(world) == 10
    forget(world, payer, backup)
    assert world.invoice(payee, "other", "ag2", "7") == Done()
    assert world.send(payee, "invoice", "other") == Done()
    while world.links[f"{payee.id}/ledger", f"{payer.id}/ledger"]:
        world.step()
    world.accept(payer, "invoice", "other", "al")
    world.accept(payer, "invoice", "in", "al")  # both are in one batch now
    world.run()
    assert paid(world) == 17
    assert (status(payer), status(payer, "other"), status(payee, "other")) == ("SETTLED",) * 3
    assert not world.violations


def test_news_of_a_batch_that_was_forgotten_crash_nothing(world: World) -> None:
    payer, _ = world.nodes
    bill(world)
    backup = world.backup(payer)
    world.accept(payer, "invoice", "in", "al")
    world.run()
    forget(world, payer, backup)
    (batch_id,) = world.batches
    for fact in (
        TransferSent(batch_id, "0x1"),
        TransferMined(batch_id, "0x1", 7),
        TransferConfirmed(batch_id, "0x1", 7, 1, "0"),
        TransferFailed(batch_id, "x"),
    ):
        world.tell(payer, fact, f"{payer.id}/chain", "wallet")
    assert not payer.all(PaymentRow, "payment/")


def forgetful_life(seed: int) -> None:
    """Orders of several agreements come together now and then; the payer's journal goes back, the chain port's does not."""
    rng = random.Random(seed)
    world = World(3, rng)
    world.faults = False
    payer, payees = world.nodes[0], world.nodes[1:]
    assert world.allocate(payer, "al", "900") == Done()
    invoices: list[tuple[str, int]] = []
    for number in range(rng.randrange(2, 6)):
        payee = rng.choice(payees)
        world.agree(payer, payee, f"ag{number}")
        invoices.append((f"in{number}", rng.randrange(1, 100)))
        world.invoice(payee, invoices[-1][0], f"ag{number}", str(invoices[-1][1]))
        world.send(payee, "invoice", invoices[-1][0])
    world.run()
    backup = world.backup(payer)
    for life in range(2):
        rng.shuffle(invoices)
        for invoice_id, _ in invoices if life else invoices[: rng.randrange(len(invoices) + 1)]:
            world.accept(payer, "invoice", invoice_id, "al")
            for _ in range(rng.choice((0, 0, 3, 30))):
                world.step()
        if not life:
            for _ in range(rng.choice((0, 5, 100))):
                world.step()
            forget(world, payer, backup)
    world.run()
    world.ask(payer, RunCycle(PLATFORM), "wallet")
    world.run()
    assert paid(world) == sum(amount for _, amount in invoices), (paid(world), invoices)
    for invoice_id, _ in invoices:
        assert status(payer, invoice_id) == "SETTLED"
    assert not world.violations


@pytest.mark.parametrize("seed", range(60))
def test_orders_are_paid_once_whatever_the_journal_forgot(seed: int) -> None:
    forgetful_life(seed)


def test_a_batch_key_instead_of_an_order_key_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "batches_of", lambda self, m: [])
    for seed in range(40):
        try:
            forgetful_life(seed)
        except AssertionError:
            return
    pytest.fail("nobody found out that orders are paid twice")


# -- journal and chain port's file go back together, as `golem restore` puts them
def forget_all(world: World, node: Node, backup: object, batches: dict[str, Transfer]) -> None:
    """Put back a disk of when the chain port knew these batches; the peers tell what they know before anything is paid."""
    world.batches = batches
    world.restore(node, backup)
    waiting = node.wakes
    node.wakes = {}
    world.run()
    node.wakes = waiting | node.wakes


@pytest.mark.parametrize("more", [False, True], ids=["alone", "with a forgotten agreement"])
def test_an_order_in_the_backup_that_was_paid_since_is_not_paid_again(world: World, more: bool) -> None:
    payer, payee = world.nodes
    bill(world)
    world.accept(payer, "invoice", "in", "al")
    backup, batches = world.backup(payer), dict(world.batches)
    if more:
        world.agree(payer, payee, "later")
        assert world.invoice(payee, "in2", "later", "3") == Done()
        assert world.send(payee, "invoice", "in2") == Done()
        while world.links[f"{payee.id}/ledger", f"{payer.id}/ledger"]:
            world.step()
        world.accept(payer, "invoice", "in2", "al")
    world.run()
    assert (status(payee), paid(world)) == ("SETTLED", 13 if more else 10)
    forget_all(world, payer, backup, batches)
    assert status(payer) == "SETTLED"
    world.ask(payer, RunCycle(PLATFORM), "wallet")
    world.run()
    assert (status(payer), paid(world)) == ("SETTLED", 13 if more else 10)
    assert not world.violations


def test_a_payee_that_forgot_an_agreement_books_what_it_knows_and_blames_nobody(world: World) -> None:
    payer, payee = world.nodes
    bill(world)
    backup = world.backup(payee)
    world.agree(payer, payee, "later")
    assert world.invoice(payee, "in2", "later", "3") == Done()
    assert world.send(payee, "invoice", "in2") == Done()
    while world.links[f"{payee.id}/ledger", f"{payer.id}/ledger"]:
        world.step()
    world.accept(payer, "invoice", "in", "al")
    world.accept(payer, "invoice", "in2", "al")
    world.run()
    assert len(world.transfers) == 1
    world.restore(payee, backup)
    world.run()
    assert (status(payee), status(payee, "in2")) == ("SETTLED", "unknown")
    assert not world.violations
