"""Payments of our own that this node's disk had forgotten: booked once more, and what they paid is not paid again."""

from __future__ import annotations

from decimal import Decimal

from msgspec.structs import replace

from actors.kernel.draft import Draft
from actors.ledger.payments import agreements_of, book, mark_paid
from actors.ledger.rows import LedgerActivityRow, LedgerAgreementRow, OrderRow, PaymentRow
from protocol.amounts import minus, total_of
from protocol.ledger import ActivityPayment, PaymentBody
from protocol.types import amount_text
from protocol.wallet import PaidBefore


def book_forgotten(draft: Draft, known: PaymentBody) -> None:
    """Add a payment to the sums, and take the orders that it covers back."""
    for part in known.activity_payments:
        _owe_what_is_paid(draft, part)
    book(draft, known)
    for agreement_id in agreements_of(draft, known):
        agreement = draft.row(LedgerAgreementRow, f"agreement/{agreement_id}")
        if agreement is None:
            continue
        if Decimal(agreement.paid) > Decimal(agreement.accepted):
            agreement = replace(agreement, accepted=agreement.paid)
            draft.put(f"agreement/{agreement_id}", agreement)
        _cover(draft, agreement, known.payment_id)


def _cover(draft: Draft, agreement: LedgerAgreementRow, payment_id: str) -> None:
    """Orders over what is still owed were paid by a payment that was forgotten: nobody pays them again."""
    rows = [draft.row(OrderRow, f"order/{key.split('/', 2)[2]}") for key, _ in draft.prefix(f"ordered/{agreement.agreement_id}/")]
    waiting = sorted((row for row in rows if row is not None and not row.payment_id), key=lambda row: row.ordered_at)
    over = minus(total_of((agreement.paid, *(row.amount for row in waiting))), agreement.accepted)
    covered: list[str] = []
    for order in waiting:
        if Decimal(order.amount) > over:
            continue
        over -= Decimal(order.amount)
        order_id = f"{order.kind}:{order.document_id}"
        mark_paid(draft, payment_id, [(order_id, replace(order, covered=True))])
        covered.append(order_id)
    if covered:
        payment = draft.row(PaymentRow, f"payment/{payment_id}")
        if payment is not None:
            draft.put(f"payment/{payment_id}", replace(payment, order_ids=(*payment.order_ids, *covered)))
        draft.send("wallet", PaidBefore(tuple(covered)))


def _owe_what_is_paid(draft: Draft, part: ActivityPayment) -> None:
    """What was paid for an activity had been accepted: nothing of it is to be owed once more."""
    activity = draft.row(LedgerActivityRow, f"activity/{part.activity_id}")
    assert activity is not None, part
    more = minus(total_of((activity.paid, part.amount)), activity.accepted)
    if more > 0:
        accepted = amount_text(total_of((activity.accepted, more)))
        draft.put(f"activity/{part.activity_id}", replace(activity, accepted=accepted))
        agreement = draft.row(LedgerAgreementRow, f"agreement/{activity.agreement_id}")
        assert agreement is not None, activity
        accepted = amount_text(total_of((agreement.accepted, more)))
        draft.put(f"agreement/{agreement.agreement_id}", replace(agreement, accepted=accepted))
