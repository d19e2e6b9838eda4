"""Why an amount is what it is: how the requestor's node comes to the highest bill that it takes, and what it refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quart import Blueprint, Response

from actors.ledger.ceiling import age_s, calculation, most_for_agreement
from actors.ledger.machine import PaymentDocumentRow
from golem.rest.edge import ApiError, respond_json
from protocol.ledger import DebitNoteBody, decode_body
from protocol.states import DocumentKind, DocumentStatus
from protocol.types import amount_text, timestamp_text

if TYPE_CHECKING:
    from golem.node.node import Node


def register(api: Blueprint, node: Node) -> None:
    """Add the endpoint that explains a debit note, an invoice or an agreement by its id."""

    @api.get("/explain/<wanted>")
    async def explain(wanted: str) -> Response:
        rows = node.system.rows("ledger")
        document = rows.get(f"debit-note/{wanted}") or rows.get(f"invoice/{wanted}")
        agreement_id = document.agreement_id if document else wanted.lower()
        agreement = rows.get(f"agreement/{agreement_id}")
        if agreement is None:
            raise ApiError(404, f"no debit note, invoice or agreement {wanted[:80]} is known here")
        found: dict[str, Any] = {"agreementId": agreement_id, "role": agreement.role}
        if document is not None:
            found |= {"amount": document.amount, "status": document.status, "waiting": waiting(rows, document)}
        found |= {"accepted": agreement.accepted, "paid": agreement.paid, "fault": agreement.fault}
        return respond_json({**found, **calculated(rows, agreement_id, document, node.clock())})


def waiting(rows: Any, document: PaymentDocumentRow) -> str:
    """What a document waits for, in words: a note that nobody accepted is paid with the invoice, and keeps its status."""
    agreement = rows.get(f"agreement/{document.agreement_id}")
    invoice = rows.get(f"invoice/{agreement.invoice_id}") if agreement is not None else None
    if (
        document.kind != DocumentKind.DEBIT_NOTE
        or document.status != DocumentStatus.RECEIVED
        or invoice is None
        or invoice.status not in (DocumentStatus.ACCEPTED, DocumentStatus.SETTLED)
    ):
        return str(document.waiting)
    return f"nothing: its amount is part of invoice {invoice.document_id}, which is {invoice.status}; not paid by itself"


def calculated(rows: Any, agreement_id: str, document: PaymentDocumentRow | None, now: float) -> dict[str, Any]:
    """Return what price, activities and time of an agreement explain by now; nothing where no prices are known."""
    refused = rows.get(f"refused/{agreement_id}")
    found: dict[str, Any] = {
        "refused": [
            {"at": timestamp_text(one.at), "kind": one.kind, "id": one.document_id, "amount": one.amount, "reason": one.reason}
            for one in (refused.documents if refused else ())
        ]
    }
    pricing = rows.get(f"pricing/{agreement_id}")
    if pricing is None:
        return found
    activities = [rows[f"activity/{key.rpartition('/')[2]}"] for key, _ in rows.prefix(f"in/{agreement_id}/")]
    ages = {one.activity_id: age_s(rows, one, now) for one in activities}
    if document is not None and document.activity_id in ages:
        usage = decode_body(DebitNoteBody, document.body).usage_counter_vector
        return {"calculation": calculation(pricing, usage, ages[document.activity_id]), **found}
    most = most_for_agreement(pricing, [(one, ages[one.activity_id]) for one in activities])
    each = {one: calculation(pricing, None, age) for one, age in ages.items()}
    return {"calculation": {"highestAmount": amount_text(most), "activities": each}, **found}
