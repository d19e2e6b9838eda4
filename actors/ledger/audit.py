"""Is what is about to be paid owed? Orders are held against the documents that both sides signed, before money moves.

Rows are ours alone and carry checksums; a signature is the one thing that a fault of ours cannot make. So the last look,
before a transaction is signed, reads amounts and addresses out of signed bytes: the payee's document, our acceptance.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal

from actors.kernel.machine import Rows
from actors.ledger.rows import OpenRow, OrderRow, PaymentDocumentRow
from protocol.amounts import total_of
from protocol.ledger import AcceptanceBody, DebitNoteBody, InvoiceBody, decode_body, encode_body
from protocol.signing import Document, verify
from protocol.states import DocumentKind, DocumentStatus, Party
from protocol.types import Violation, amount, amount_text, digest


def unlike_signed(row: PaymentDocumentRow, peer: str) -> str:
    """Say how a document's row differs from what `peer` signed; "" if it does not."""
    try:
        verify(Document(row.kind, row.body, row.signature), row.kind, peer)
        total = signed_total(row)
    except (Violation, ValueError) as error:
        return f"{row.kind} {row.document_id} is not what {peer} signed: {error}"
    if total != Decimal(row.amount):
        return f"{row.kind} {row.document_id} is signed for {amount_text(total)}, and noted here with {row.amount}"
    return ""


def objection(rows: Rows, me: str, order_id: str) -> str:
    """Say why an order of the ledger must not be paid; "" if signed documents bear it out."""
    order = rows.get(f"order/{order_id}")
    if not isinstance(order, OrderRow):
        return f"the ledger has no order {order_id}"
    if order.covered:
        return f"order {order_id} was paid before by payment {order.payment_id}, which this node's journal had forgotten"
    document = rows.get(f"{order.kind}/{order.document_id}")
    if (
        not isinstance(document, PaymentDocumentRow)
        or document.role != Party.PAYER
        or document.status not in (DocumentStatus.ACCEPTED, DocumentStatus.SETTLED)
    ):
        return f"order {order_id}: its {order.kind} is not accepted here"
    if fault := unlike_signed(document, order.peer) or _unlike_accepted(document, me):
        return fault
    body = body_of(document)
    terms = (body.agreement_id, body.payment_platform, body.payee_addr.lower(), body.payer_addr.lower())
    if terms != (order.agreement_id, order.platform, order.payee_addr, order.payer_addr):
        return f"order {order_id} differs from the signed {order.kind} in agreement, platform or address"
    ordered = total_of(each.amount for each in _orders(rows, order.agreement_id))
    owed = _owed(rows, me, order)
    if isinstance(owed, str):
        return owed
    if ordered > owed:
        told = f"{amount_text(ordered)} is ordered and {amount_text(owed)} signed and accepted"
        return f"order {order_id}: of agreement {order.agreement_id}, {told}"
    return ""


def signed_total(row: PaymentDocumentRow) -> Decimal:
    """Return the amount in a document's signed bytes. Raises `Violation` or `ValueError`."""
    body = body_of(row)
    return amount(body.total_amount_due if isinstance(body, DebitNoteBody) else body.amount)


def body_of(row: PaymentDocumentRow) -> DebitNoteBody | InvoiceBody:
    """Return what the issuer signed. Raises `Violation`, if the row is damaged."""
    return decode_body(DebitNoteBody, row.body) if row.kind == DocumentKind.DEBIT_NOTE else decode_body(InvoiceBody, row.body)


def _unlike_accepted(row: PaymentDocumentRow, me: str) -> str:
    body = AcceptanceBody(row.kind, row.document_id, digest(row.body), amount_text(signed_total(row)))
    try:
        verify(Document(DocumentKind.ACCEPTANCE, encode_body(body), row.acceptance), DocumentKind.ACCEPTANCE, me)
    except Violation as error:
        return f"{row.kind} {row.document_id} is not what this node accepted: {error}"
    return ""


def _orders(rows: Rows, agreement_id: str) -> Iterator[OrderRow]:
    for _, index in rows.prefix(f"ordered/{agreement_id}/"):
        assert isinstance(index, OpenRow)
        order = rows.get(f"order/{index.kind}:{index.document_id}")
        if isinstance(order, OrderRow):
            yield order


def _owed(rows: Rows, me: str, order: OrderRow) -> Decimal | str:
    """What the accepted documents of an order's agreement come to, or why that cannot be said: the highest invoice, or
    where it is more the highest debit notes of its activities (accepted before an invoice that says less came)."""
    highest: dict[str, PaymentDocumentRow] = {}  # by activity, "" for the invoice
    for each in _orders(rows, order.agreement_id):
        document = rows.get(f"{each.kind}/{each.document_id}")
        if not isinstance(document, PaymentDocumentRow) or document.status not in (
            DocumentStatus.ACCEPTED,
            DocumentStatus.SETTLED,
        ):
            return f"order {each.kind}:{each.document_id}: its document is not accepted here"
        best = highest.get(document.activity_id)
        if best is None or Decimal(document.amount) > Decimal(best.amount):
            highest[document.activity_id] = document
    for document in highest.values():
        if fault := unlike_signed(document, order.peer) or _unlike_accepted(document, me):
            return fault
    invoice = highest.pop("", None)
    notes = total_of(signed_total(document) for document in highest.values())
    return notes if invoice is None else max(notes, signed_total(invoice))
