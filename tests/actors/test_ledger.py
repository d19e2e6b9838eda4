"""The ledger alone and between two nodes: allocations, documents, settlement, and peers that lie."""

from __future__ import annotations

import base64
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from worlds.money import KEYS, PLATFORM, Done, Node, World

from actors.ledger.machine import (
    AllocationRow,
    LedgerActivityRow,
    LedgerAgreementRow,
    PaymentRow,
    TxClaimsRow,
    acceptance_of,
    decorations,
    owed,
    remaining,
    reserved,
)
from protocol.codec import encode
from protocol.ledger import (
    AgreementPayment,
    AmendAllocation,
    CancelInvoice,
    CreateAllocation,
    DocumentAccepted,
    DocumentEvent,
    DocumentSent,
    InvoiceBody,
    InvoiceCancelled,
    PaymentAcknowledged,
    PaymentBody,
    PaymentSent,
    RejectInvoice,
    ReleaseAllocation,
    SendDocument,
    decode_body,
    encode_body,
)
from protocol.signing import Document, sign
from protocol.types import Refused, Undelivered, Violation, digest
from protocol.wallet import PaidOut, PayOut, PayOutDelayed, TransferVerified


def agreed(total: str = "10") -> tuple[World, Node, Node]:
    """A payer with an allocation `al`, a payee, and the agreement `a1` with activity `act`."""
    world = World(2)
    payer, payee = world.nodes
    world.agree(payer, payee, "a1", ("act",))
    assert world.allocate(payer, "al", total) == Done()
    return world, payer, payee


def invoiced(total: str = "1") -> tuple[World, Node, Node]:
    world, payer, payee = agreed()
    assert world.invoice(payee, "i1", "a1", total, ("act",)) == Done()
    assert world.send(payee, "invoice", "i1") == Done()
    world.run()
    return world, payer, payee


def events(node: Node, feed: str) -> list[tuple[str, str]]:
    return [(event.document_id, event.what) for event in node.feeds[feed] if isinstance(event, DocumentEvent)]


def allocation(node: Node, allocation_id: str = "al") -> AllocationRow:
    row = node.rows["ledger"][f"allocation/{allocation_id}"]
    assert isinstance(row, AllocationRow)
    return row


def code(answer: Any) -> str:
    assert isinstance(answer, Refused), answer
    return answer.code


# -- allocations
def test_allocations_share_the_balance() -> None:
    world = World(1)
    (node,) = world.nodes
    assert world.allocate(node, "a", "6", balance="10") == Done()
    assert world.allocate(node, "a", "6", balance="10") == Done(), "a repeat is no second one"
    assert code(world.allocate(node, "b", "4.000000000000000001", balance="10")) == "unfunded"
    assert world.allocate(node, "b", "4", balance="10") == Done()
    assert world.allocate(node, "c", "99", balance=None) == Done(), "not checked"
    assert reserved(node.rows["ledger"], PLATFORM) == Decimal(109)
    assert reserved(node.rows["ledger"], "erc20-other-glm") == 0


def test_a_foreign_account_cannot_be_allocated_from() -> None:
    world = World(2)
    command = CreateAllocation("a", world.nodes[1].id, PLATFORM, "1", "10")
    assert code(world.ask(world.nodes[0], command)) == "forbidden"
    assert code(world.ask(world.nodes[0], CreateAllocation("a", "nobody", PLATFORM, "1", "10"))) == "bad_request"
    assert code(world.allocate(world.nodes[0], "a", "0.0000000000000000001")) == "bad_request"


def test_an_allocation_ends_at_its_timeout_and_not_before() -> None:
    world = World(1)
    (node,) = world.nodes
    start = world.now
    world.ask(node, CreateAllocation("al", node.id, PLATFORM, "1", "10", timeout_at=start + 100))
    world.ask(node, AmendAllocation("al", None, start + 500, "10"))
    world.run()
    assert allocation(node).released_at == world.now == start + 500
    assert remaining(allocation(node)) == 0
    assert code(world.ask(node, ReleaseAllocation("al"))) == "gone"
    assert code(world.ask(node, ReleaseAllocation("al2"))) == "unknown"
    assert code(world.ask(node, AmendAllocation("al", "2", None, "10"))) == "unknown"


def test_an_allocation_cannot_shrink_below_what_is_spent() -> None:
    world, payer, _ = invoiced("1")
    world.accept(payer, "invoice", "i1", "al")
    assert code(world.ask(payer, AmendAllocation("al", "0.5", None, "1000"))) == "bad_request"
    assert world.ask(payer, AmendAllocation("al", "1", None, "1000")) == Done()
    assert code(world.ask(payer, AmendAllocation("al", "5", None, "4.9"))) == "unfunded", "1 is owed, 4 more are wanted"
    world.run()
    assert code(world.ask(payer, AmendAllocation("al", "5", None, "3.9"))) == "unfunded"
    assert world.ask(payer, AmendAllocation("al", "5", None, "4")) == Done(), "1 is paid"


def test_decorations_of_one_and_of_two_allocations() -> None:
    def row(platform: str, owner: str) -> AllocationRow:
        return AllocationRow("x", owner, platform, "1", "0", 0, 0, 0)

    one = decorations([row("P1", "X1")])
    assert one["constraints"] == ["(golem.com.payment.platform.P1.address=*)", "(golem.com.payment.protocol.version>1)"]
    assert one["properties"] == [
        {"key": "golem.com.payment.platform.P1.address", "value": "X1"},
        {"key": "golem.com.payment.protocol.version", "value": "3"},
    ]
    two = decorations([row("P1", "X1"), row("P2", "X2"), row("P1", "X1")])
    assert two["constraints"][0] == (
        "(|\n  (golem.com.payment.platform.P1.address=*)\n  (golem.com.payment.platform.P2.address=*)\n)"
    )
    assert len(two["properties"]) == 3
    local = decorations([row("P1", "X1")], "00112233aabbccdd")
    assert local["constraints"] == [*one["constraints"], "(golem.com.payment.local-chain=00112233aabbccdd)"]
    assert local["properties"] == [*one["properties"], {"key": "golem.com.payment.local-chain", "value": "00112233aabbccdd"}]


# -- documents
def test_an_invoice_from_issue_to_settlement_on_both_nodes() -> None:
    world, payer, payee = invoiced("1.25")
    assert events(payer, "invoices") == events(payee, "invoices") == [("i1", "RECEIVED")]
    assert world.accept(payer, "invoice", "i1", "al", amount="1.250") == Done()
    assert world.accept(payer, "invoice", "i1", "al") == Done(), "accepting again changes nothing"
    assert world.document(payer, "invoice", "i1").waiting == "accepted; payment ordered"
    world.run()
    expected = [("i1", "RECEIVED"), ("i1", "ACCEPTED"), ("i1", "SETTLED")]
    assert events(payer, "invoices") == events(payee, "invoices") == expected
    assert allocation(payer).spent == "1.25"
    assert [node.feeds["invoices"][0].app_session_id for node in (payer, payee)] == ["app-Requestor", "app-Provider"]
    assert [node.feeds["payments"][0].app_session_ids for node in (payer, payee)] == [
        ("app-Requestor",),
        ("app-Provider",),
    ]
    assert world.document(payer, "invoice", "i1").waiting == ""


def test_debit_notes_are_totals_and_the_invoice_pays_the_rest() -> None:
    world, payer, payee = agreed()
    for number, total in enumerate(("0.1", "0.1", "0.4"), 1):
        assert world.note(payee, f"n{number}", "act", total) == Done()
        world.send(payee, "debit-note", f"n{number}")
        world.run()
        assert world.accept(payer, "debit-note", f"n{number}", "al") == Done()
        world.run()
        assert world.document(payee, "debit-note", f"n{number}").status == "SETTLED"
    assert code(world.note(payee, "n4", "act", "0.39")) == "bad_request"
    assert code(world.invoice(payee, "i0", "a1", "0.3")) == "bad_request"
    world.invoice(payee, "i1", "a1", "1", ("act",))
    world.send(payee, "invoice", "i1")
    world.run()
    world.accept(payer, "invoice", "i1", "al")
    world.run()
    assert [str(amount) for *_, amount in world.transfers] == ["0.1", "0.3", "0.6"]
    assert allocation(payer).spent == "1"
    second = msgspec.json.decode(world.document(payee, "debit-note", "n2").body)
    assert second["previousDebitNoteId"] == "n1"
    assert second["usageCounterVector"] == [1, 2.5]


def test_a_note_after_the_invoice_costs_nothing() -> None:
    world, payer, payee = agreed()
    world.note(payee, "n1", "act", "0.7")
    world.send(payee, "debit-note", "n1")
    world.invoice(payee, "i1", "a1", "1", ("act",))
    world.send(payee, "invoice", "i1")
    world.run()
    assert world.accept(payer, "invoice", "i1", "al") == Done()
    assert world.accept(payer, "debit-note", "n1", "al") == Done()
    world.run()
    assert allocation(payer).spent == "1"


def test_zero_is_settled_at_once() -> None:
    world, payer, payee = invoiced("0")
    world.accept(payer, "invoice", "i1", "al")
    assert world.document(payer, "invoice", "i1").status == "SETTLED"
    world.run()
    assert world.document(payee, "invoice", "i1").status == "SETTLED"
    assert world.transfers == []


def test_what_accepting_needs() -> None:
    world, payer, payee = invoiced("2")
    assert code(world.accept(payer, "invoice", "nope", "al")) == "unknown"
    assert code(world.accept(payee, "invoice", "i1", "al")) == "forbidden"
    wrong = world.accept(payer, "invoice", "i1", "al", amount="2.1")
    assert code(wrong) == "bad_request"
    assert "Invalid amount accepted" in wrong.message
    assert code(world.accept(payer, "invoice", "i1", "missing")) == "bad_request"
    world.allocate(payer, "small", "1.5")
    assert world.accept(payer, "invoice", "i1", "small").message == "Not enough funds. Allocated: 1.5 Needed: 2"
    world.ask(payer, CreateAllocation("elsewhere", payer.id, "erc20-other-glm", "9", "10"))
    assert code(world.accept(payer, "invoice", "i1", "elsewhere")) == "bad_request"
    world.ask(payer, ReleaseAllocation("al"))
    assert code(world.accept(payer, "invoice", "i1", "al")) == "bad_request"
    assert world.document(payer, "invoice", "i1").status == "RECEIVED"
    assert not world.transfers


def test_a_rejected_invoice_may_be_followed_by_a_lower_one() -> None:
    world, payer, payee = invoiced("2")
    assert code(world.invoice(payee, "i2", "a1", "1.9")) == "bad_request"
    reason = '{"rejectionReason":"INCORRECT_AMOUNT","totalAmountAccepted":"0"}'
    assert code(world.ask(payer, RejectInvoice("i1", "not json"))) == "bad_request"
    world.ask(payer, RejectInvoice("i1", reason))
    world.ask(payer, RejectInvoice("i1", reason))
    world.run()
    assert events(payee, "invoices")[-1] == ("i1", "REJECTED")
    assert payee.feeds["invoices"][-1].detail == reason
    assert code(world.accept(payer, "invoice", "i1", "al")) == "bad_request"
    assert world.invoice(payee, "i2", "a1", "1.9") == Done()


def test_cancelling_needs_the_payer_and_loses_against_an_acceptance() -> None:
    world, payer, payee = invoiced("2")
    world.ask(payee, CancelInvoice("i1"))
    assert world.document(payee, "invoice", "i1").status == "RECEIVED"
    world.accept(payer, "invoice", "i1", "al")
    world.run()
    assert world.document(payer, "invoice", "i1").status == world.document(payee, "invoice", "i1").status == "SETTLED"
    assert code(world.ask(payee, CancelInvoice("i1"))) == "conflict"
    world.invoice(payee, "i2", "a1", "3")
    world.ask(payee, CancelInvoice("i2"))
    assert world.document(payee, "invoice", "i2").status == "CANCELLED", "it never left"
    world.invoice(payee, "i3", "a1", "3")
    world.send(payee, "invoice", "i3")
    world.run()
    world.ask(payee, CancelInvoice("i3"))
    world.run()
    assert [world.document(node, "invoice", "i3").status for node in (payer, payee)] == ["CANCELLED", "CANCELLED"]
    assert code(world.accept(payer, "invoice", "i3", "al")) == "bad_request"


def test_a_document_that_cannot_be_delivered_stays_issued_and_says_why() -> None:
    world, payer, payee = agreed()
    world.down.add(payer.id)
    world.invoice(payee, "i1", "a1", "1")
    world.send(payee, "invoice", "i1")
    row = world.document(payee, "invoice", "i1")
    sent = DocumentSent(Document("invoice", row.body, row.signature))
    world.tell(payee, Undelivered(f"{payer.id}/ledger", encode(sent), "no route"), f"{payee.id}/ledger")
    assert world.document(payee, "invoice", "i1").status == "ISSUED"
    assert world.document(payee, "invoice", "i1").waiting == "not delivered: no route"
    world.down.clear()
    world.send(payee, "invoice", "i1")
    world.run()
    assert events(payer, "invoices") == [("i1", "RECEIVED")], "it came twice and is there once"


def test_nothing_is_sent_behind_a_cancellation() -> None:
    """The payer would agree to cancel what it does not have, and then receive it: it would hold an invoice that is none."""
    world, payer, payee = agreed()
    world.down.add(payer.id)
    world.invoice(payee, "i1", "a1", "1")
    world.send(payee, "invoice", "i1")
    row = world.document(payee, "invoice", "i1")
    world.ask(payee, CancelInvoice("i1"))
    sent = DocumentSent(Document("invoice", row.body, row.signature))
    world.tell(payee, Undelivered(f"{payer.id}/ledger", encode(sent), "no route"), f"{payee.id}/ledger")
    assert world.document(payee, "invoice", "i1").waiting == "cancelling: the payer has not answered yet"
    again = SendDocument("invoice", "i1", Document("invoice", row.body, row.signature), 15)
    assert code(world.ask(payee, again)) == "conflict"


def test_a_document_is_refused_by_who_does_not_know_the_agreement() -> None:
    world, payer, payee = agreed()
    payer.rows["ledger"].raw.pop("agreement/a1")
    world.invoice(payee, "i1", "a1", "1")
    world.send(payee, "invoice", "i1")
    world.run()
    row = world.document(payee, "invoice", "i1")
    assert (row.status, row.refused) == ("ISSUED", True)
    assert "agreement a1 is not known here" in row.waiting


def test_billing_needs_a_platform_and_the_requestors_own_account() -> None:
    world = World(3)
    payer, payee, stranger = world.nodes
    world.agree(payer, payee, "a1", payer_addr=stranger.id)
    world.agree(payer, payee, "a2", payee_addr="0x" + "0" * 40)
    world.agree(payer, payee, "a3", platform="")
    for agreement_id, words in (("a1", "own account"), ("a2", "payment address"), ("a3", "chosen-platform")):
        answer = world.invoice(payee, "i", agreement_id, "1")
        assert code(answer) == "bad_request"
        assert words in answer.message
    world.agree(payer, payee, "a4")
    assert code(world.invoice(payer, "i", "a4", "1")) == "forbidden"
    assert code(world.invoice(payee, "i", "a4", "1", ("act",))) == "bad_request"
    assert code(world.note(payee, "n", "act", "1")) == "bad_request"


def test_a_signature_over_something_else_is_not_sent() -> None:
    world, _, payee = agreed()
    world.invoice(payee, "i1", "a1", "1")
    command = SendDocument("invoice", "i1", payee.sign("invoice", b"{}"), 15)
    assert code(world.ask(payee, command)) == "bad_request"


# -- peers that lie
def forged(world: World, payee: Node, **changes: Any) -> bytes:
    world.invoice(payee, "i1", "a1", "1")
    body = decode_body(InvoiceBody, world.document(payee, "invoice", "i1").body)
    return encode_body(msgspec.structs.replace(body, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"issuer_id": "0x" + "1" * 40},
        {"recipient_id": "0x" + "1" * 40},
        {"amount": "-1"},
        {"amount": "1e500"},
        {"invoice_id": "a/b"},
        {"timestamp": "yesterday"},
        {"activity_ids": ("x",) * 1001},
    ],
)
def test_a_malformed_invoice_is_a_violation(changes: dict[str, Any]) -> None:
    world, payer, payee = agreed()
    sent = DocumentSent(payee.sign("invoice", forged(world, payee, **changes)))
    with pytest.raises(Violation):
        world.tell(payer, sent, f"{payee.id}/ledger")


def test_only_the_provider_of_the_agreement_sends_and_only_the_requestor_accepts() -> None:
    world, payer, payee = agreed()
    stranger = Node(KEYS[4])
    body = forged(world, payee, issuer_id=stranger.id)
    with pytest.raises(Violation, match="is not the provider"):
        world.tell(payer, DocumentSent(stranger.sign("invoice", body)), f"{stranger.id}/ledger")
    with pytest.raises(Violation, match="signed by"):
        world.tell(payer, DocumentSent(stranger.sign("invoice", forged(world, payee))), f"{payee.id}/ledger")
    world.send(payee, "invoice", "i1")
    world.run()
    world.accept(payer, "invoice", "i1", "al")
    (accepted,) = world.links[f"{payer.id}/ledger", f"{payee.id}/ledger"]
    message = payee.decoders["ledger"][1](accepted)
    assert isinstance(message, DocumentAccepted)
    with pytest.raises(Violation, match="has no say"):
        world.tell(payee, message, f"{stranger.id}/ledger")
    with pytest.raises(Violation):
        world.tell(payer, InvoiceCancelled("i1"), f"{payee.id}/ledger")


def test_platform_and_addresses_must_be_those_of_the_agreement() -> None:
    world, payer, payee = agreed()
    sent = DocumentSent(payee.sign("invoice", forged(world, payee, payee_addr="0x" + "2" * 40)))
    world.tell(payer, sent, f"{payee.id}/ledger")
    world.run()
    assert "addresses are not those" in world.document(payee, "invoice", "i1").waiting
    assert "invoice/i1" not in payer.rows["ledger"]


def test_facts_about_money_come_from_their_actors_only() -> None:
    world, payer, _ = agreed()
    theft = Undelivered(f"{payer.id}/wallet", encode(PayOut("x", PLATFORM, payer.id, "0x" + "9" * 40, "9")))
    hash_ = "0x" + "1" * 64
    for fact in (PaidOut((), PLATFORM, "a", "b", "1", hash_), TransferVerified("x", hash_), theft, ReleaseAllocation("al")):
        with pytest.raises(Violation, match="which is not the"):
            world.tell(payer, fact, f"{payer.id}/exeunit-1")


# -- payments
def payment(payer: Node, payee: Node, tx_hash: str, amount: str, payment_id: str, agreement_id: str = "a1") -> PaymentSent:
    body = PaymentBody(
        payment_id,
        payer.id,
        payee.id,
        payer.id,
        payee.id,
        PLATFORM,
        amount,
        "2026-01-01T00:00:00Z",
        (AgreementPayment(agreement_id, amount),),
        (),
        base64.b64encode(bytes.fromhex(tx_hash[2:])).decode(),
    )
    return PaymentSent(payer.sign("payment", encode_body(body)))


def accepted(world: World, payer: Node, payee: Node, invoice_id: str) -> None:
    """Bring the payer's word to the payee, and nothing else: no payment is ordered."""
    acceptance = payer.sign("acceptance", acceptance_of(world.document(payee, "invoice", invoice_id)))
    world.tell(payee, DocumentAccepted(acceptance), f"{payer.id}/ledger")


def test_one_transaction_cannot_settle_two_invoices() -> None:
    world = World(2)
    payer, payee = world.nodes
    for agreement_id in ("a1", "a2"):
        world.agree(payer, payee, agreement_id)
        world.invoice(payee, f"i-{agreement_id}", agreement_id, "1")
        world.send(payee, "invoice", f"i-{agreement_id}")
        world.run()
    world.allocate(payer, "al", "10")
    world.accept(payer, "invoice", "i-a1", "al")
    world.run()
    ((tx_hash, *_),) = world.transfers
    world.accept(payer, "invoice", "i-a2", "al")
    accepted(world, payer, payee, "i-a2")
    world.tell(payee, payment(payer, payee, tx_hash, "1", "again", "a2"), f"{payer.id}/ledger")
    world.links.clear()  # the liar tells the payee no more
    while world.pool:
        world.step()
    row = payee.rows["ledger"]["payment/again"]
    assert row.state == "REFUSED"
    assert "claimed before" in row.reason
    assert world.document(payee, "invoice", "i-a2").status == "ACCEPTED"


def test_two_claims_at_once_on_one_transaction_get_it_once() -> None:
    world, payer, payee = invoiced("1")
    tx_hash = "0x" + "7" * 64
    world.transfers.append((tx_hash, payer.id, payee.id, Decimal(1)))
    accepted(world, payer, payee, "i1")
    payer.rows["ledger"].raw.clear()  # not the honest node's doing: nothing of it is looked at
    for payment_id in ("p1", "p2"):
        world.tell(payee, payment(payer, payee, tx_hash, "1", payment_id), f"{payer.id}/ledger")
        world.tell(payee, payment(payer, payee, tx_hash, "1", payment_id), f"{payer.id}/ledger")
    world.pool.reverse()
    world.down.add(payer.id)
    world.run()
    states = [payee.rows["ledger"][f"payment/{payment_id}"].state for payment_id in ("p1", "p2")]
    assert states == ["VERIFIED", "REFUSED"]
    assert payee.rows["ledger"][f"tx/{tx_hash}/{payer.id}/{payee.id}"] == TxClaimsRow((("p1", "1"),))
    assert payee.rows["ledger"]["agreement/a1"].paid == "1"


def test_a_payment_is_refused_unless_it_fits() -> None:
    world, payer, payee = invoiced("1")
    stranger = Node(KEYS[4])
    tx_hash = "0x" + "7" * 64
    with pytest.raises(Violation):
        world.tell(payee, payment(payer, payee, tx_hash, "1", "p"), f"{stranger.id}/ledger")
    with pytest.raises(Violation, match="of zero"):
        world.tell(payee, payment(payer, payee, tx_hash, "0", "p"), f"{payer.id}/ledger")
    world.tell(payee, payment(payer, payee, tx_hash, "1", "p", "a9"), f"{payer.id}/ledger")
    answer = payer.decoders["ledger"][1](world.links[f"{payee.id}/ledger", f"{payer.id}/ledger"].pop())
    assert answer == PaymentAcknowledged("p", False, "agreement a9 is not known here")
    assert "payment/p" not in payee.rows["ledger"]
    with pytest.raises(Violation):
        world.tell(payer, PaymentAcknowledged("p", True), f"{payee.id}/ledger")


def test_a_payment_is_for_what_was_accepted_and_for_no_more() -> None:
    world, payer, payee = invoiced("1")

    def answered(payment_id: str, amount: str) -> PaymentAcknowledged:
        world.tell(payee, payment(payer, payee, "0x" + "7" * 64, amount, payment_id), f"{payer.id}/ledger")
        assert f"payment/{payment_id}" not in payee.rows["ledger"], "nobody asks the chain"
        answer = payer.decoders["ledger"][1](world.links[f"{payee.id}/ledger", f"{payer.id}/ledger"].pop())
        assert isinstance(answer, PaymentAcknowledged)
        return answer

    assert "0 GLM were accepted for agreement a1, and 1 are claimed" in answered("p", "1").reason
    world.allocate(payer, "al", "10")
    world.accept(payer, "invoice", "i1", "al")
    world.run()
    assert world.document(payee, "invoice", "i1").status == "SETTLED"
    assert "1 GLM were accepted for agreement a1, and 1.5 are claimed" in answered("p", "1.5").reason


def test_what_is_settled_has_its_payment_in_the_list_on_both_nodes() -> None:
    """Programs that hear of a settled document look for its payment: it is announced in the same step, not after a signature."""
    world, payer, payee = invoiced("1")
    world.accept(payer, "invoice", "i1", "al")
    seen = set()
    for _ in range(200):
        for node in (payer, payee):
            if world.document(node, "invoice", "i1").status == "SETTLED":
                (row,) = node.all(PaymentRow, "payment/")
                assert [event.payment_id for event in node.feeds["payments"]] == [row.payment_id], row.state
                seen.add(node.id)
        if len(seen) == 2:
            break
        world.step()
    assert len(seen) == 2


def test_a_refused_payment_is_offered_again_and_then_left() -> None:
    world, payer, payee = invoiced("1")
    world.accept(payer, "invoice", "i1", "al")
    while not payer.all(PaymentRow, "payment/") or payer.all(PaymentRow, "payment/")[0].state != "SENT":
        world.step()
    moved, world.transfers = world.transfers, []  # the payee's chain node knows nothing of it yet
    while payer.all(PaymentRow, "payment/")[0].tries < 2:
        world.step()
    (row,) = payer.all(PaymentRow, "payment/")
    assert row.state == "REFUSED"
    assert "refused the payment: 0 moved" in row.reason
    world.transfers = moved
    world.run()
    assert world.document(payee, "invoice", "i1").status == "SETTLED"
    assert payer.all(PaymentRow, "payment/")[0].state == "ACKNOWLEDGED"


def test_of_a_payment_that_is_refused_for_good_id_reason_and_digest_are_kept() -> None:
    """Claims are free: of one that is never looked at again the parts go, and a repeat of it is known by its digest."""
    world, payer, payee = invoiced("1")
    world.accept(payer, "invoice", "i1", "al")
    while not payer.all(PaymentRow, "payment/") or payer.all(PaymentRow, "payment/")[0].state != "SENT":
        world.step()
    world.transfers = []  # nothing ever moved
    world.run()
    world.now += 30 * 86400  # the last time it is offered
    world.run()
    (sent,), (dead,) = payer.all(PaymentRow, "payment/"), payee.all(PaymentRow, "payment/")
    assert (dead.payment_id, dead.state, dead.digest) == (sent.payment_id, "REFUSED", digest(sent.body))
    assert "0 moved" in dead.reason
    assert len(dead.body) < len(sent.body)
    assert b'"agreementPayments":[],"activityPayments":[]' in dead.body
    assert dead.signature == b""
    world.tell(payee, PaymentSent(Document("payment", sent.body, sent.signature)), f"{payer.id}/ledger")
    assert payee.all(PaymentRow, "payment/") == [dead], "the chain is not asked again"
    other = msgspec.json.encode(msgspec.json.decode(sent.body) | {"amount": "2"})
    with pytest.raises(Violation):
        world.tell(payee, PaymentSent(sign(payer.key, "payment", other)), f"{payer.id}/ledger")


def test_waiting_documents_say_what_for() -> None:
    world, payer, _ = invoiced("1")
    world.accept(payer, "invoice", "i1", "al")
    world.tell(payer, PayOutDelayed(("invoice:i1",), "0.1 ETH too little"), f"{payer.id}/wallet")
    assert world.document(payer, "invoice", "i1").waiting == "accepted; payment ordered: 0.1 ETH too little"


def test_the_payment_tells_agreements_from_activities() -> None:
    world, payer, payee = agreed()
    world.note(payee, "n1", "act", "0.25")
    world.send(payee, "debit-note", "n1")
    world.invoice(payee, "i1", "a1", "1", ("act",))
    world.send(payee, "invoice", "i1")
    world.run()
    world.accept(payer, "debit-note", "n1", "al")
    world.accept(payer, "invoice", "i1", "al")
    world.run()
    (row,) = payee.all(PaymentRow, "payment/")
    body = msgspec.json.decode(row.body)
    assert body["agreementPayments"] == [{"agreementId": "a1", "amount": "0.75"}]
    assert body["activityPayments"] == [{"activityId": "act", "amount": "0.25"}]
    assert body["amount"] == "1"
    for node in (payer, payee):
        assert node.all(LedgerAgreementRow, "agreement/")[0].paid == "1"
        assert node.all(LedgerActivityRow, "activity/")[0].paid == "0.25"


def test_a_signature_of_another_kind_does_not_serve() -> None:
    world, payer, payee = agreed()
    body = forged(world, payee)
    other = sign(payee.key, "offer", body)
    with pytest.raises(Violation):
        world.tell(payer, DocumentSent(Document("invoice", body, other.signature)), f"{payee.id}/ledger")


@pytest.mark.parametrize("kind", ["debit-note", "invoice", "acceptance", "payment"])
def test_what_another_key_signed_or_what_was_changed_after_signing_changes_nothing(kind: str) -> None:
    world, payer, payee = agreed()
    world.note(payee, "n1", "act", "0.25")
    world.invoice(payee, "i1", "a1", "1", ("act",))
    world.send(payee, "debit-note" if kind == "debit-note" else "invoice", "n1" if kind == "debit-note" else "i1")
    if kind in ("acceptance", "payment"):
        world.run()
        world.accept(payer, "invoice", "i1", "al")
    sender, receiver = (payee, payer) if kind in ("debit-note", "invoice") else (payer, payee)
    link = f"{sender.id}/ledger", f"{receiver.id}/ledger"
    if kind == "payment":
        while "PaymentSent" not in [type(receiver.decoders["ledger"][1](one)).__name__ for one in world.links[link]]:
            world.step()
    true = next(
        message for message in map(receiver.decoders["ledger"][1], world.links[link])
        if isinstance(message, DocumentSent | DocumentAccepted | PaymentSent) and next(iter(documents(message))).kind == kind
    )  # fmt: skip
    (document,) = documents(true)
    stranger = Node(KEYS[4])
    assert b"1" in document.body
    for lie in (stranger.sign(kind, document.body), Document(kind, document.body.replace(b"1", b"2"), document.signature)):
        before = dict(receiver.rows["ledger"].raw)
        with pytest.raises(Violation):
            world.tell(receiver, type(true)(lie), link[0])
        assert dict(receiver.rows["ledger"].raw) == before
    world.run()
    status = world.document(receiver, "debit-note" if kind == "debit-note" else "invoice", "n1" if kind == "debit-note" else "i1")
    assert status.status == ("RECEIVED" if kind in ("debit-note", "invoice") else "SETTLED"), "the true one is taken"


def documents(message: DocumentSent | DocumentAccepted | PaymentSent) -> tuple[Document, ...]:
    """Return the signed documents of a message."""
    values = (getattr(message, name) for name in message.__struct_fields__)
    return tuple(value for value in values if isinstance(value, Document))


def test_what_is_accepted_and_not_paid_yet_is_not_free() -> None:
    world, payer, payee = agreed("10")
    for name, amount in (("i1", "9"), ("i2", "10")):
        world.invoice(payee, name, "a1", amount, ("act",))
        world.send(payee, "invoice", name)
        world.run()
        if name == "i1":
            world.accept(payer, "invoice", name, "al")  # 9 of the 10 are owed; nothing has moved
            assert world.ask(payer, ReleaseAllocation("al")) == Done()
            assert owed(payer.rows["ledger"], PLATFORM) == 9
            refused = world.allocate(payer, "more", "1.1", balance="10")
            assert code(refused) == "unfunded"
            assert "available: 1," in refused.message
            assert "not paid yet: 9" in refused.message
            assert world.allocate(payer, "al2", "1", balance="10") == Done()
            assert owed(payer.rows["ledger"], PLATFORM + "2") == 0, "another platform, another debt"
    world.run()
    assert world.document(payer, "invoice", "i1").status == "SETTLED"
    assert owed(payer.rows["ledger"], PLATFORM) == 0
    assert world.allocate(payer, "al3", "1", balance="2") == Done()


def test_what_is_noted_otherwise_than_it_was_signed_is_not_accepted() -> None:
    world, payer, _ = invoiced("2")
    row = world.document(payer, "invoice", "i1")
    body = row.body.replace(b'"2"', b'"3"')
    for changes in ({"amount": "3"}, {"amount": "3", "body": body}, {"signature": bytes(65)}):
        payer.rows["ledger"].raw["invoice/i1"] = encode(msgspec.structs.replace(row, **changes))
        answer = world.accept(payer, "invoice", "i1", "al")
        assert code(answer) == "bad_request"
        assert "signed" in answer.message
    payer.rows["ledger"].raw["invoice/i1"] = encode(row)
    assert world.accept(payer, "invoice", "i1", "al") == Done()
