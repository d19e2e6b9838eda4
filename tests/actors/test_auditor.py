"""The auditor finds nothing in books that add up, whatever happened, and names the document in books that do not."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from msgspec.structs import replace
from worlds.books import check_books, findings, moved_by, report_of
from worlds.money import PLATFORM, Done, Node, World

from actors.auditor.audit import audit
from actors.auditor.books import contradictions
from actors.ledger import documents, payer, payments
from actors.ledger.rows import OpenRow, PaymentDocumentRow, TxClaimsRow
from protocol.amounts import total_of
from protocol.codec import encode
from protocol.ledger import CancelInvoice, RejectInvoice, ReleaseAllocation
from protocol.types import node_of
from protocol.wallet import RunCycle


# -- whatever happens: the stateful machine has the auditor as its invariant
class Market(RuleBasedStateMachine):
    """A payer, a payee, and one who is both, under repeats, failed transfers, and (`Forgetful`) disks that go back in time."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(3)
        self.count = 0
        first, second, both = self.world.nodes
        self.terms = [
            ("a0", first, second, ("act0", "act1")),
            ("a1", first, both, ("act2",)),
            ("a2", both, second, ("act3",)),
        ]
        for agreement_id, payer_, payee_, activities in self.terms:
            self.world.agree(payer_, payee_, agreement_id, activities)
        for node in (first, both):
            for name, total in (("large", "50"), ("small", "4")):
                assert self.world.allocate(node, f"{name}-{node.id[:6]}", total) == Done()
        self.world.run()
        self.backups = {node.id: self.world.backup(node) for node in self.world.nodes}

    def document(self, node: Node, number: int) -> PaymentDocumentRow | None:
        rows = [*node.all(PaymentDocumentRow, "debit-note/"), *node.all(PaymentDocumentRow, "invoice/")]
        return rows[number % len(rows)] if rows else None

    @rule(deal=st.integers(0, 2), which=st.integers(0, 1), cents=st.integers(0, 300))
    def note(self, deal: int, which: int, cents: int) -> None:
        _, _, payee_, activities = self.terms[deal]
        self.count += 1
        self.world.note(payee_, f"n{self.count}", activities[which % len(activities)], f"{cents / 100}")

    @rule(deal=st.integers(0, 2), cents=st.integers(0, 900))
    def invoice(self, deal: int, cents: int) -> None:
        agreement_id, _, payee_, activities = self.terms[deal]
        self.count += 1
        self.world.invoice(payee_, f"i{self.count}", agreement_id, f"{cents / 100}", activities)

    @rule(deal=st.integers(0, 2), number=st.integers(0, 30))
    def send(self, deal: int, number: int) -> None:
        payee_ = self.terms[deal][2]
        if row := self.document(payee_, number):
            self.world.send(payee_, row.kind, row.document_id)

    @rule(deal=st.integers(0, 2), number=st.integers(0, 30), allocation=st.sampled_from(("large", "small")))
    def accept(self, deal: int, number: int, allocation: str) -> None:
        payer_ = self.terms[deal][1]
        if row := self.document(payer_, number):
            self.world.accept(payer_, row.kind, row.document_id, f"{allocation}-{payer_.id[:6]}")

    @rule(deal=st.integers(0, 2), cents=st.integers(1, 300), steps=st.integers(0, 40))
    def bill(self, deal: int, cents: int, steps: int) -> None:
        """The usual way, so that it is walked often: a note is issued, sent and accepted."""
        _, payer_, payee_, activities = self.terms[deal]
        due = payee_.rows["ledger"][f"activity/{activities[0]}"].due
        self.count += 1
        own_id = f"n{self.count}"
        self.world.note(payee_, own_id, activities[0], str(total_of((due, f"{cents / 100}"))))
        if own_id not in {row.document_id for row in payee_.all(PaymentDocumentRow, "debit-note/")}:
            return
        self.world.send(payee_, "debit-note", own_id)
        self.deliver(8)
        self.world.accept(payer_, "debit-note", own_id, f"large-{payer_.id[:6]}")
        self.deliver(steps)

    @rule(deal=st.integers(0, 2), number=st.integers(0, 30), cancels=st.booleans())
    def withdraw(self, deal: int, number: int, cancels: bool) -> None:
        _, payer_, payee_, _ = self.terms[deal]
        row = self.document(payee_ if cancels else payer_, number)
        if row is not None and row.kind == "invoice":
            command = CancelInvoice(row.document_id) if cancels else RejectInvoice(row.document_id, '{"rejectionReason":"BAD"}')
            self.world.ask(payee_ if cancels else payer_, command)

    @rule(deal=st.integers(0, 2))
    def release(self, deal: int) -> None:
        payer_ = self.terms[deal][1]
        self.world.ask(payer_, ReleaseAllocation(f"small-{payer_.id[:6]}"))

    @rule(steps=st.integers(1, 12))
    def deliver(self, steps: int) -> None:
        for _ in range(steps):
            self.world.step()

    @rule(number=st.integers(0, 1000))
    def repeat(self, number: int) -> None:
        """What a port has said once, it says once more."""
        ports = [one for one in self.world.history if one[2].endswith(("/chain", "/signer"))]
        if ports and not self.world.restored:
            self.world._step(*ports[number % len(ports)])

    @rule()
    def fail(self) -> None:
        """The batches that the chain port does not have yet will be reverted."""
        for node in self.world.nodes:
            for key, batch in node.rows["wallet"].prefix("batch/"):
                if batch.state == "SENDING":
                    self.world.outcomes.setdefault(key.removeprefix("batch/"), ("failed", "reverted"))

    @invariant()
    def books_add_up(self) -> None:
        check_books(self.world)

    def teardown(self) -> None:
        self.world.run()
        for node in self.world.nodes:
            self.world.ask(node, RunCycle(PLATFORM), "wallet")
        self.world.run()
        check_books(self.world)
        assert not self.world.violations or self.world.restored  # news of what was forgotten is nobody's fault


class Forgetful(Market):
    """As `Market`, with disks that go back in time, when all that was said before is heard.

    Else an order may come again for more than its transfer moved: of two notes whose payments no payee has verified yet, a
    restored payer hears of the later alone.
    """

    @rule(node=st.integers(0, 2))
    def back_up(self, node: int) -> None:
        one = self.world.nodes[node]
        self.backups[one.id] = self.world.backup(one)

    @rule(node=st.integers(0, 2))
    def restore(self, node: int) -> None:
        one = self.world.nodes[node]
        self.world.run()
        self.world.restore(one, self.backups[one.id])


QUICK = settings(
    max_examples=25,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # without shrinking, which takes minutes; the steps are printed
)


@pytest.mark.parametrize("market", [Market, Forgetful])
def test_books_add_up_whatever_happens(market: type[Market]) -> None:
    run_state_machine_as_test(market, settings=QUICK)


# -- books that were falsified: each finding names what is wrong
@pytest.fixture
def world() -> World:
    """An agreement with a paid debit note and a paid invoice, and another one whose invoice is accepted and not paid."""
    world = World(2)
    payer_, payee_ = world.nodes
    world.agree(payer_, payee_, "ag", ("act",))
    world.agree(payer_, payee_, "other")
    assert world.allocate(payer_, "al", "100") == Done()
    world.note(payee_, "note", "act", "3")
    world.invoice(payee_, "in", "ag", "10", ("act",))
    for kind, own_id in (("debit-note", "note"), ("invoice", "in")):
        world.send(payee_, kind, own_id)
        world.run()
        assert world.accept(payer_, kind, own_id, "al") == Done()
        world.run()
    world.invoice(payee_, "late", "other", "0.000000000000000007")
    world.send(payee_, "invoice", "late")
    world.run()
    assert world.accept(payer_, "invoice", "late", "al") == Done()
    check_books(world)
    return world


def set_row(node: Node, actor: str, key: str, **changes: Any) -> None:
    rows = node.rows[actor]
    rows.raw[key] = encode(replace(rows[key], **changes))


def first(node: Node, actor: str, prefix: str) -> str:
    return next(key for key, _ in node.rows[actor].prefix(prefix))


def settled_without_money(payer_: Node, payee_: Node) -> None:
    set_row(payer_, "ledger", "invoice/late", status="SETTLED")
    del payer_.rows["ledger"].raw["open/other/invoice/late"]


def counted_twice(payer_: Node, payee_: Node) -> None:
    payment = payer_.rows["ledger"][first(payer_, "ledger", "payment/")]
    payer_.rows["ledger"].raw["payment/again"] = encode(replace(payment, payment_id="again"))


def claimed_twice(payer_: Node, payee_: Node) -> None:
    key = first(payee_, "ledger", "tx/")
    claims = payee_.rows["ledger"][key].claims
    payee_.rows["ledger"].raw[key] = encode(TxClaimsRow((*claims, *claims)))


def ordered_and_lost(payer_: Node, payee_: Node) -> None:
    for key in ("order/invoice:in", "ordered/ag/invoice:in"):
        del payer_.rows["ledger"].raw[key]


def late_again(payer_: Node, payee_: Node) -> None:
    payee_.rows["ledger"].raw["open/ag/invoice/in"] = encode(OpenRow("invoice", "in"))  # type: ignore[arg-type]


def of_payer(actor: str, key: str, **changes: Any) -> Callable[[Node, Node], None]:
    return lambda payer_, payee_: set_row(payer_, actor, key if key[-1] != "/" else first(payer_, actor, key), **changes)


def of_payee(actor: str, key: str, **changes: Any) -> Callable[[Node, Node], None]:
    return lambda payer_, payee_: of_payer(actor, key, **changes)(payee_, payer_)


FALSIFIED: dict[str, tuple[Callable[[Node, Node], None], str, str]] = {
    "a document is settled without a transfer": (settled_without_money, "invoice late", "payments cover 0 of it"),
    "a document is settled and not called so": (of_payer("ledger", "invoice/in", status="ACCEPTED"), "invoice in",
                                                "cover its 10"),
    "an allocation has another sum spent": (of_payer("ledger", "allocation/al", spent="9.999999999999999999"), "allocation al",
                                            "is not its total of 100"),
    "a payment is counted twice": (of_payer("ledger", "agreement/ag", paid="20"), "invoice in", "20 is noted as paid"),
    "a payment is there twice": (counted_twice, "debit-note note", "is paid 2 times"),
    "a payment is claimed twice": (claimed_twice, "payment ", "is claimed of "),
    "a payment is of another amount": (of_payer("ledger", "payment/", amount="4"), "debit-note note", "its orders come to 3"),
    "a document is of another amount": (of_payer("ledger", "invoice/in", amount="10.000000000000000001"), "invoice in",
                                        "is signed for 10"),
    "a document of the payee is of another amount": (of_payee("ledger", "invoice/late", amount="7"), "invoice late",
                                                     "is signed for"),
    "less is noted as accepted": (of_payer("ledger", "agreement/other", accepted="0"), "invoice late", "is noted as accepted"),
    "more is noted as accepted for an activity": (of_payer("ledger", "activity/act", accepted="4"), "debit-note note",
                                                  "its accepted debit notes come to 3"),
    "an order is lost": (ordered_and_lost, "invoice in", "is paid, and was never ordered"),
    "an order is for another amount": (of_payer("ledger", "order/invoice:late", amount="7"), "invoice late",
                                       "7 is ordered for it"),
    "an order is not paid at the wallet": (of_payer("wallet", "order/invoice:in", state="BATCHED"), "invoice in",
                                           "the wallet has it as BATCHED"),
    "an order of the wallet is of another amount": (of_payer("wallet", "order/invoice:in", amount="6"), "invoice in",
                                                    "the wallet has 6"),
    "a batch pays nobody": (of_payer("wallet", "batch/", payees=()), "debit-note note", "is the transfer of no batch"),
    "a batch has another transaction": (of_payer("wallet", "batch/", tx_hash="0x" + "9" * 64), "debit-note note",
                                        "and the chain moved 0"),
    "the debt is noted wrong": (of_payer("ledger", f"owed/{PLATFORM}", amount="1"), f"platform {PLATFORM}", "is noted as owed"),
    "an acceptance lacks its signature": (of_payer("ledger", "invoice/in", acceptance=b""), "invoice in", "without the payer's"),
    "what is settled is listed as waiting": (late_again, "invoice in", "is listed as waiting for money"),
}  # fmt: skip


@pytest.mark.parametrize("name", FALSIFIED)
def test_what_was_falsified_is_named(world: World, name: str) -> None:
    falsify, subject, words = FALSIFIED[name]
    payer_, payee_ = world.nodes
    falsify(payer_, payee_)
    found = [one for node in world.nodes for one in report_of(world, node).findings]
    assert any(one.subject.startswith(subject) and words in one.words for one in found), (name, found)


def test_a_transfer_that_the_chain_does_not_show_names_its_documents(world: World) -> None:
    payer_ = world.nodes[0]
    moved = dict(moved_by(world.transfers, payer_.id))
    lost = next(key for key, amount in moved.items() if amount == 7)
    del moved[lost]
    moved["0x" + "5" * 64, world.nodes[1].id] = Decimal(1)
    found = audit(payer_.rows["ledger"], payer_.rows["wallet"], moved).findings
    assert [(one.subject, "the chain moved 0" in one.words or "no batch" in one.words) for one in found] == [
        ("invoice in", True), ("transaction 0x" + "5" * 64, True),
    ]  # fmt: skip
    assert not audit(payer_.rows["ledger"], payer_.rows["wallet"]).findings, "what nobody asked the chain is not missed"


def test_two_nodes_that_tell_different_things_are_named(world: World) -> None:
    payer_, payee_ = world.nodes
    set_row(payee_, "ledger", "invoice/late", status="SETTLED")
    set_row(payee_, "ledger", "agreement/other", paid="1")
    found = contradictions(payer_.rows["ledger"], payee_.rows["ledger"])
    assert [one.subject for one in found] == ["invoice late", "agreement other"]


def test_sums_tell_where_the_money_is(world: World) -> None:
    payer_, payee_ = world.nodes
    [sums] = report_of(world, payer_).sums
    assert (sums.issued, sums.open, sums.rejected, sums.settled) == (Decimal("10.000000000000000007"), 0, 0, 10)
    assert (sums.accepted, sums.queued, sums.in_flight) == (Decimal("10.000000000000000007"), Decimal("7E-18"), 0)
    [held] = report_of(world, payer_).allocations
    assert (held.paid, held.reserved, held.free) == (10, Decimal("7E-18"), Decimal("89.999999999999999993"))
    world.invoice(payee_, "more", "other", "1")
    [sums] = report_of(world, payee_).sums
    assert (sums.issued, sums.accepted, sums.open) == (11, 10, 1), "the acceptance is on its way yet"
    while not _batched(payer_):
        world.step()
    [sums] = report_of(world, payer_).sums
    assert (sums.queued, sums.in_flight) == (0, Decimal("7E-18"))


def _batched(node: Node) -> bool:
    row = node.rows["wallet"].get("order/invoice:late")
    return row is not None and row.state == "BATCHED"


# -- mutants of the ledger: the auditor finds each, and says at which document
def owed_whole(draft: Any, row: Any) -> Decimal:
    documents.owe(draft, row)
    return Decimal(row.amount)


def booked_twice(draft: Any, body: Any) -> None:
    _book(draft, body)
    _book(draft, body)


_book = payments.book


def ignore(*args: Any) -> None:
    """Do nothing."""


MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "documents are owed in full": (lambda m: m.setattr(payer, "owe", owed_whole), "invoice in"),
    "allocations are not charged": (lambda m: m.setattr(payer, "charge", ignore), "allocation al"),
    "a payment is booked twice": (lambda m: m.setitem(_globals(payments.paid_out), "book", booked_twice), "debit-note note"),
    "what is paid is not settled": (lambda m: m.setitem(_globals(payments.paid_out), "settle", ignore), "debit-note note"),
    "a refused claim keeps its place": (lambda m: m.setattr(payments, "mark_paid", ignore), "debit-note note"),
}


def _globals(function: Any) -> dict[str, Any]:
    found: dict[str, Any] = function.__globals__
    return found


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_of_the_ledger_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, subject = MUTANTS[name]
    monkeypatch.setattr(World, "check", ignore)
    mutate(monkeypatch)
    world = World(2)
    payer_, payee_ = world.nodes
    world.agree(payer_, payee_, "ag", ("act",))
    world.allocate(payer_, "al", "100")
    world.note(payee_, "note", "act", "3")
    world.invoice(payee_, "in", "ag", "10", ("act",))
    for kind, own_id in (("debit-note", "note"), ("invoice", "in")):
        world.send(payee_, kind, own_id)
        for _ in range(60):
            world.step()
        world.accept(payer_, kind, own_id, "al")
        for _ in range(60):
            if any(one.subject == subject for one in findings(world)):
                return
            world.step()
    pytest.fail(f"nobody found out that {name}: {findings(world)}")


# -- a payer whose disk went back in time books a transfer once, whoever tells of it first
def test_a_payment_given_back_before_the_wallet_tells_of_it_is_booked_once() -> None:
    world = World(2)
    payer_, payee_ = world.nodes
    world.agree(payer_, payee_, "ag", ("act",))
    world.allocate(payer_, "al", "100")
    world.invoice(payee_, "in", "ag", "10")
    world.send(payee_, "invoice", "in")
    world.run()
    world.accept(payer_, "invoice", "in", "al")
    while "order/invoice:in" not in payer_.rows["wallet"]:
        world.step()
    backup = world.backup(payer_)
    world.run()
    world.restore(payer_, backup)
    world.run()
    row = payer_.rows["ledger"]["agreement/ag"]
    assert (row.accepted, row.paid, len(world.transfers)) == ("10", "10", 1)
    assert payer_.rows["ledger"]["order/invoice:in"].payment_id
    assert payer_.rows["ledger"][f"owed/{PLATFORM}"].amount == "0"
    check_books(world)


def test_a_payment_given_back_after_the_wallet_told_of_a_part_is_booked_once() -> None:
    """The journal knows one of two orders that a transfer paid: the wallet tells of that one, the payee of both."""
    world = World(2)
    payer_, payee_ = world.nodes
    world.agree(payer_, payee_, "ag", ("act",))
    world.allocate(payer_, "al", "100")
    world.note(payee_, "note", "act", "3")
    world.invoice(payee_, "in", "ag", "10", ("act",))
    for kind, own_id in (("debit-note", "note"), ("invoice", "in")):
        world.send(payee_, kind, own_id)
    world.run()
    world.accept(payer_, "debit-note", "note", "al")
    while "order/debit-note:note" not in payer_.rows["wallet"]:
        world.step()
    backup = world.backup(payer_)
    world.accept(payer_, "invoice", "in", "al")
    world.run()
    assert [amount for *_, amount in world.transfers] == [10]
    world.restore(payer_, backup)
    theirs = {link: list(queue) for link, queue in world.links.items() if node_of(link[0]) == payee_.id and queue}
    for link in theirs:
        world.links[link].clear()  # on its way: the wallet is first
    while payer_.rows["ledger"]["agreement/ag"].paid == "0":
        world.step()
    assert payer_.rows["ledger"]["agreement/ag"].paid == "3"
    for link, queue in theirs.items():
        world.links[link].extend(queue)
    world.run()
    row = payer_.rows["ledger"]["agreement/ag"]
    assert (row.accepted, row.paid, len(world.transfers)) == ("10", "10", 1)
    assert payer_.rows["ledger"]["invoice/in"].status == "SETTLED"
    check_books(world)
