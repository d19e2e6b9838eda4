"""Debit notes and invoices at who pays them: take in, accept, reject, agree to a cancellation."""

from __future__ import annotations

import re
from decimal import Decimal

from msgspec.structs import replace

from actors.kernel.draft import Declined, Draft
from actors.ledger.allocations import amount_of, charge, usable
from actors.ledger.audit import unlike_signed
from actors.ledger.ceiling import age_s, most_for, most_for_agreement, over
from actors.ledger.documents import (
    add,
    agreement_of,
    cancelled,
    check_sender,
    document_of,
    event,
    invoice_floor,
    keep,
    no_room,
    owe,
    put,
    rejected,
    settle,
)
from actors.ledger.rows import (
    LedgerActivityRow,
    LedgerAgreementRow,
    OpenRow,
    OrderRow,
    OwedRow,
    PaymentDocumentRow,
    PricingRow,
    RefusedDocument,
    RefusedDocumentsRow,
    acceptance_of,
)
from protocol.amounts import total_of
from protocol.ledger import (
    MAX_ID_CHARS,
    AcceptDocument,
    DebitNoteBody,
    DocumentAccepted,
    DocumentReceived,
    DocumentRefused,
    DocumentSent,
    InvoiceBody,
    InvoiceCancelled,
    InvoiceCancelRequested,
    InvoiceRejected,
    RejectInvoice,
    RejectionBody,
    decode_body,
)
from protocol.signing import Document, verify
from protocol.states import DocumentKind, DocumentStatus, Party
from protocol.types import Done, Violation, address, amount, amount_text, node_of
from protocol.wallet import PayOut

MAX_DOCUMENTS = 50_000  # from the payee of one agreement
MAX_DOCUMENTS_BYTES = 64 * 1024 * 1024  # and of all of them together: nobody fills another's disk
MAX_NOTE_BYTES = 8 * 1024
MAX_REFUSED = 10  # documents of an agreement that were not taken are remembered
ANSWER_S = 24 * 3600.0  # to bring our word about what we do not keep
_ID = re.compile(rf"[0-9A-Za-z_-]{{1,{MAX_ID_CHARS}}}\Z")


# -- the payer's commands
def accept(draft: Draft, command: AcceptDocument) -> None:
    """Owe what a document adds to the debt: charge the allocation, order the payment, tell the payee."""
    row = document_of(draft, command.kind, command.document_id, Party.PAYER)
    agreement = agreement_of(draft, row)
    if fault := unlike_signed(row, agreement.peer):
        raise Declined("bad_request", fault)
    if amount_of(command.amount) != Decimal(row.amount):
        raise Declined("bad_request", f"Invalid amount accepted: {command.amount}, the {row.kind} says {row.amount}")
    if row.status in (DocumentStatus.ACCEPTED, DocumentStatus.SETTLED) or (
        row.kind == DocumentKind.DEBIT_NOTE and agreement.invoice_accepted
    ):
        draft.reply(Done())
        return
    if row.status != DocumentStatus.RECEIVED:
        raise Declined("bad_request", f"the {row.kind} is {row.status.lower()}")
    if row.kind == DocumentKind.INVOICE and Decimal(row.amount) < Decimal(agreement.accepted):
        raise Declined("bad_request", f"{agreement.accepted} was accepted for this agreement already")
    if command.acceptance.body != acceptance_of(row):
        raise Declined("bad_request", "what was signed is not the acceptance of this document")
    verify(command.acceptance, DocumentKind.ACCEPTANCE, draft.me)
    allocation = usable(draft, command.allocation_id, agreement.payer_addr, agreement.platform)
    added = owe(draft, row)
    charge(draft, allocation, added)
    if added > 0:
        order(draft, row, agreement, allocation.allocation_id, added)
    waiting = "accepted; payment ordered" if added > 0 else "accepted; earlier payment orders cover it"
    row = put(draft, row, status=DocumentStatus.ACCEPTED, waiting=waiting, acceptance=command.acceptance.signature)
    draft.put(f"open/{row.agreement_id}/{row.kind}/{row.document_id}", OpenRow(row.kind, row.document_id))
    draft.send(address(agreement.peer, "ledger"), DocumentAccepted(command.acceptance))
    event(draft, row, DocumentStatus.ACCEPTED)
    settle(draft, row.agreement_id)
    draft.reply(Done())


def reject_invoice(draft: Draft, command: RejectInvoice) -> None:
    """Refuse to pay an invoice that is not accepted."""
    row = document_of(draft, DocumentKind.INVOICE, command.invoice_id, Party.PAYER)
    if row.status in (DocumentStatus.ACCEPTED, DocumentStatus.SETTLED, DocumentStatus.CANCELLED):
        raise Declined("bad_request", f"the invoice is {row.status.lower()}")
    try:
        decode_body(RejectionBody, command.rejection.encode())
    except (Violation, ValueError) as error:
        raise Declined("bad_request", str(error)) from None
    if row.status == DocumentStatus.RECEIVED:
        rejected(draft, row, command.rejection)
        peer = agreement_of(draft, row).peer
        draft.send(address(peer, "ledger"), InvoiceRejected(row.document_id, command.rejection))
    draft.reply(Done())


# -- from the payee
def document_sent(draft: Draft, message: DocumentSent) -> None:
    """Take a document in, or say why not; the receipt is repeated as often as the document comes."""
    sender, document = node_of(draft.meta.sender), message.document
    if document.kind not in (DocumentKind.DEBIT_NOTE, DocumentKind.INVOICE):
        raise Violation(f"a {document.kind[:32]!r} is no debit note and no invoice")
    verify(document, document.kind, sender)
    body: DebitNoteBody | InvoiceBody
    if document.kind == DocumentKind.DEBIT_NOTE:
        if len(document.body) > MAX_NOTE_BYTES:
            raise Violation(f"a debit note of {len(document.body)} bytes is over the limit of {MAX_NOTE_BYTES}")
        body = decode_body(DebitNoteBody, document.body)
        own_id, activity_id, total = body.debit_note_id, body.activity_id, amount(body.total_amount_due)
    else:
        body = decode_body(InvoiceBody, document.body)
        own_id, activity_id, total = body.invoice_id, "", amount(body.amount)
    if (body.issuer_id, body.recipient_id) != (sender, draft.me):
        raise Violation(f"a {document.kind} of other parties")
    receipt = address(sender, "ledger"), DocumentReceived(document.kind, own_id)
    known = draft.row(PaymentDocumentRow, f"{document.kind}/{own_id}")
    if known is not None:
        if known.body != document.body:
            raise Violation(f"another {document.kind} with the id {own_id} exists")
        draft.send(*receipt)
        return
    agreement = draft.row(LedgerAgreementRow, f"agreement/{body.agreement_id}")
    if agreement is not None and (agreement.peer, agreement.role) != (sender, Party.PAYER):
        raise Violation(f"{sender} is not the provider of agreement {body.agreement_id}")
    reason, most = _objection(draft, agreement, body, activity_id, total, len(document.body))
    if reason:
        _refused(
            draft, body.agreement_id, RefusedDocument(draft.now, DocumentKind(document.kind), own_id, amount_text(total), reason)
        )
        draft.send(address(sender, "ledger"), DocumentRefused(document.kind, own_id, reason, most), ANSWER_S)
        return
    assert agreement is not None
    _receive(draft, document, own_id, agreement, activity_id, total)
    draft.send(*receipt)


def _refused(draft: Draft, agreement_id: str, refused: RefusedDocument) -> None:
    """Remember for people what was not taken, if it is about an agreement of ours."""
    if draft.row(LedgerAgreementRow, f"agreement/{agreement_id}") is not None:
        row = draft.row(RefusedDocumentsRow, f"refused/{agreement_id}") or RefusedDocumentsRow()
        others = [one for one in row.documents if one.document_id != refused.document_id]
        draft.put(f"refused/{agreement_id}", RefusedDocumentsRow((*others, refused)[-MAX_REFUSED:]))


def _objection(
    draft: Draft,
    agreement: LedgerAgreementRow | None,
    body: DebitNoteBody | InvoiceBody,
    activity_id: str,
    total: Decimal,
    size: int,
) -> tuple[str, str]:
    """Why a well-formed document of the right peer is not taken, "" if it is; and the highest amount that would be."""
    if agreement is None:
        return f"agreement {body.agreement_id} is not known here", ""
    if agreement.fault:
        return agreement.fault, ""
    terms = (agreement.platform, agreement.payee_addr, agreement.payer_addr)
    if (body.payment_platform, body.payee_addr, body.payer_addr) != terms:
        return "platform or addresses are not those of the agreement", ""
    if agreement.documents >= MAX_DOCUMENTS:
        return f"the agreement has {MAX_DOCUMENTS} documents already", ""
    if full := no_room(draft, agreement.peer, size):
        return full, ""
    if agreement.document_bytes >= MAX_DOCUMENTS_BYTES:
        return f"the agreement has {agreement.document_bytes} bytes of documents already", ""
    if isinstance(body, InvoiceBody):
        return _against_invoice(draft, agreement, body, total)
    return _against_note(draft, agreement, body, activity_id, total)


def _against_note(
    draft: Draft, agreement: LedgerAgreementRow, body: DebitNoteBody, activity_id: str, total: Decimal
) -> tuple[str, str]:
    activity = draft.row(LedgerActivityRow, f"activity/{activity_id}")
    if activity is None or activity.agreement_id != agreement.agreement_id:
        return f"this node has created no activity {activity_id} under the agreement", ""
    if total < Decimal(activity.due):
        return "totals never decrease", ""
    pricing = draft.row(PricingRow, f"pricing/{agreement.agreement_id}")
    if pricing is None:
        return "", ""
    age = age_s(draft, activity, draft.now)
    most = max(most_for(pricing, body.usage_counter_vector, age), Decimal(activity.due))
    reason = over(pricing, total, most, f"an activity of {age:.1f} s on {pricing.threads:g} threads")
    return reason, amount_text(most) if reason else ""


def _against_invoice(draft: Draft, agreement: LedgerAgreementRow, body: InvoiceBody, total: Decimal) -> tuple[str, str]:
    ids = [key.rpartition("/")[2] for key, _ in draft.prefix(f"in/{agreement.agreement_id}/")]
    if strange := set(body.activity_ids) - set(ids):
        return f"this node has created no activity {min(strange)[:80]} under the agreement", ""
    if total < invoice_floor(draft, agreement):
        return "totals never decrease", ""
    pricing = draft.row(PricingRow, f"pricing/{agreement.agreement_id}")
    if pricing is None:
        return "", ""
    standing = draft.row(PaymentDocumentRow, f"invoice/{agreement.invoice_id}")
    if standing is not None and standing.status in (DocumentStatus.RECEIVED, DocumentStatus.ACCEPTED):
        return f"the agreement has an invoice already: {standing.document_id}", ""
    rows = [draft.row(LedgerActivityRow, f"activity/{one}") for one in ids]
    activities = [(row, age_s(draft, row, draft.now)) for row in rows if row is not None]
    most = max(most_for_agreement(pricing, activities), Decimal(agreement.accepted))
    time_s = sum(age for _, age in activities)
    reason = over(pricing, total, most, f"{len(activities)} activities of {time_s:.1f} s in all")
    return reason, amount_text(most) if reason else ""


def _receive(
    draft: Draft, document: Document, own_id: str, agreement: LedgerAgreementRow, activity_id: str, total: Decimal
) -> None:
    if document.kind == DocumentKind.DEBIT_NOTE:
        activity = draft.row(LedgerActivityRow, f"activity/{activity_id}")
        assert activity is not None, activity_id
        draft.put(f"activity/{activity_id}", replace(activity, due=amount_text(total), last_debit_note_id=own_id))
    else:
        agreement = replace(agreement, invoice_id=own_id)
    draft.put(f"agreement/{agreement.agreement_id}", replace(
        agreement, documents=agreement.documents + 1, document_bytes=agreement.document_bytes + len(document.body)
    ))  # fmt: skip
    keep(draft, agreement.peer, len(document.body))
    row = add(draft, DocumentKind(document.kind), own_id, Party.PAYER, agreement, activity_id, total, document.body)
    row = put(
        draft, row, status=DocumentStatus.RECEIVED, signature=document.signature, waiting="waiting for the requestor to accept"
    )
    event(draft, row, DocumentStatus.RECEIVED)


def cancel_requested(draft: Draft, message: InvoiceCancelRequested) -> None:
    """Agree, unless the invoice is accepted: the payee learns that from the acceptance."""
    if not _ID.match(message.invoice_id):
        raise Violation("no id of an invoice")
    row = draft.row(PaymentDocumentRow, f"invoice/{message.invoice_id}")
    if row is None:  # it never arrived
        draft.send(draft.meta.sender, InvoiceCancelled(message.invoice_id), ANSWER_S)
        return
    check_sender(draft, row, Party.PAYER)
    if row.status == DocumentStatus.RECEIVED:
        cancelled(draft, row)
    if row.status in (DocumentStatus.RECEIVED, DocumentStatus.CANCELLED, DocumentStatus.REJECTED):
        draft.send(draft.meta.sender, InvoiceCancelled(message.invoice_id))


def order(draft: Draft, row: PaymentDocumentRow, agreement: LedgerAgreementRow, allocation_id: str, added: Decimal) -> None:
    """Order the payment of what accepting a document added to the debt."""
    order_id = f"{row.kind}:{row.document_id}"
    assert draft.row(OrderRow, f"order/{order_id}") is None, f"{order_id} is ordered twice"
    new = OrderRow(
        kind=row.kind,
        document_id=row.document_id,
        agreement_id=row.agreement_id,
        activity_id=row.activity_id,
        allocation_id=allocation_id,
        platform=agreement.platform,
        peer=agreement.peer,
        payer_addr=agreement.payer_addr.lower(),
        payee_addr=agreement.payee_addr.lower(),
        amount=amount_text(added),
        ordered_at=draft.now,
    )
    draft.put(f"order/{order_id}", new)
    draft.put(f"ordered/{new.agreement_id}/{order_id}", OpenRow(row.kind, row.document_id))
    debt = draft.row(OwedRow, f"owed/{new.platform}") or OwedRow()
    draft.put(f"owed/{new.platform}", OwedRow(amount_text(total_of((debt.amount, added)))))
    draft.send("wallet", PayOut(order_id, new.platform, new.payer_addr, new.payee_addr, new.amount))
