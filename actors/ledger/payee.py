"""Debit notes and invoices at their issuer: write, sign, send, cancel, and what the payer answers."""

from __future__ import annotations

from decimal import Decimal

from msgspec.structs import replace

from actors.kernel.draft import Declined, Draft
from actors.ledger.allocations import amount_of
from actors.ledger.documents import (
    add,
    agreement_of,
    cancelled,
    check_sender,
    document_of,
    event,
    invoice_floor,
    owe,
    put,
    rejected,
    settle,
)
from actors.ledger.rows import (
    FEEDS,
    ForgottenRow,
    LedgerActivityRow,
    LedgerAgreementRow,
    OpenRow,
    PaymentDocumentRow,
    acceptance_of,
)
from protocol.ledger import (
    MAX_ACTIVITIES,
    MAX_USAGE_COUNTERS,
    AcceptanceBody,
    CancelInvoice,
    DebitNoteBody,
    DocumentAccepted,
    DocumentReceived,
    DocumentRefused,
    DocumentSent,
    InvoiceBody,
    InvoiceCancelled,
    InvoiceCancelRequested,
    InvoiceRejected,
    IssueDebitNote,
    IssueInvoice,
    RejectionBody,
    SendDocument,
    TakeBackDocument,
    decode_body,
    encode_body,
)
from protocol.signing import Document, verify
from protocol.states import DocumentKind, DocumentStatus, Party
from protocol.types import Done, Violation, address, amount, amount_text, node_of, timestamp_text


# -- the payee's commands
def issue_debit_note(draft: Draft, command: IssueDebitNote) -> None:
    """Write a debit note over the running total of an activity."""
    key = f"debit-note/{command.debit_note_id}"
    if draft.row(PaymentDocumentRow, key):
        draft.reply(Done())
        return
    activity = draft.row(LedgerActivityRow, f"activity/{command.activity_id}")
    if activity is None:
        raise Declined("bad_request", f"there is no activity {command.activity_id}")
    agreement = _billable(draft, activity.agreement_id)
    total = amount_of(command.total)
    if total < Decimal(activity.due):
        raise Declined("bad_request", f"totals never decrease: the activity is at {activity.due} already")
    if command.usage is not None and len(command.usage) > MAX_USAGE_COUNTERS:
        raise Declined("bad_request", f"a usage vector has at most {MAX_USAGE_COUNTERS} counters")
    body = DebitNoteBody(
        debit_note_id=command.debit_note_id,
        issuer_id=draft.me,
        recipient_id=agreement.peer,
        payee_addr=agreement.payee_addr,
        payer_addr=agreement.payer_addr,
        payment_platform=agreement.platform,
        previous_debit_note_id=activity.last_debit_note_id,
        timestamp=timestamp_text(draft.now),
        agreement_id=agreement.agreement_id,
        activity_id=activity.activity_id,
        total_amount_due=amount_text(total),
        usage_counter_vector=command.usage,
        payment_due_date=None if command.due_at is None else timestamp_text(command.due_at),
    )
    add(
        draft,
        DocumentKind.DEBIT_NOTE,
        command.debit_note_id,
        Party.PAYEE,
        agreement,
        activity.activity_id,
        total,
        encode_body(body),
    )
    note = replace(activity, due=amount_text(total), last_debit_note_id=command.debit_note_id)
    draft.put(f"activity/{activity.activity_id}", note)
    draft.reply(Done())


def issue_invoice(draft: Draft, command: IssueInvoice) -> None:
    """Write an invoice over the total of an agreement."""
    key = f"invoice/{command.invoice_id}"
    if draft.row(PaymentDocumentRow, key):
        draft.reply(Done())
        return
    agreement = _billable(draft, command.agreement_id)
    total = amount_of(command.amount)
    if len(command.activity_ids) > MAX_ACTIVITIES:
        raise Declined("bad_request", f"an invoice covers at most {MAX_ACTIVITIES} activities")
    for activity_id in command.activity_ids:
        activity = draft.row(LedgerActivityRow, f"activity/{activity_id}")
        if activity is None or activity.agreement_id != agreement.agreement_id:
            raise Declined("bad_request", f"activity {activity_id} is not one of the agreement")
    if total < invoice_floor(draft, agreement):
        raise Declined("bad_request", "totals never decrease: more than this was invoiced or accepted already")
    body = InvoiceBody(
        invoice_id=command.invoice_id,
        issuer_id=draft.me,
        recipient_id=agreement.peer,
        payee_addr=agreement.payee_addr,
        payer_addr=agreement.payer_addr,
        payment_platform=agreement.platform,
        timestamp=timestamp_text(draft.now),
        agreement_id=agreement.agreement_id,
        activity_ids=command.activity_ids,
        amount=amount_text(total),
        payment_due_date=timestamp_text(command.due_at),
    )
    add(draft, DocumentKind.INVOICE, command.invoice_id, Party.PAYEE, agreement, "", total, encode_body(body))
    draft.put(f"agreement/{agreement.agreement_id}", replace(agreement, invoice_id=command.invoice_id))
    draft.reply(Done())


def take_back(draft: Draft, command: TakeBackDocument) -> None:
    """Undo an issued document that nobody heard of, unless it was sent."""
    draft.reply(Done())
    key = f"{command.kind}/{command.document_id}"
    row = draft.row(PaymentDocumentRow, key)
    if row is None or row.role != Party.PAYEE or row.status != DocumentStatus.ISSUED or row.signature:
        return
    agreement = agreement_of(draft, row)
    if row.kind == DocumentKind.INVOICE and agreement.invoice_id == row.document_id:
        draft.put(f"agreement/{agreement.agreement_id}", replace(agreement, invoice_id=""))
    elif row.kind == DocumentKind.DEBIT_NOTE:
        activity = draft.row(LedgerActivityRow, f"activity/{row.activity_id}")
        if activity is None or activity.last_debit_note_id != row.document_id:
            return  # a later one counts on it
        before = decode_body(DebitNoteBody, row.body).previous_debit_note_id
        last = draft.row(PaymentDocumentRow, f"debit-note/{before}") if before else None
        due = last.amount if last else "0"
        draft.put(f"activity/{row.activity_id}", replace(activity, due=due, last_debit_note_id=before))
    draft.put(key, None)


def send_document(draft: Draft, command: SendDocument) -> None:
    """Send an issued document to the payer. Its status changes when the receipt comes."""
    row = document_of(draft, command.kind, command.document_id, Party.PAYEE)
    if row.status == DocumentStatus.CANCELLED:
        raise Declined("bad_request", f"the {row.kind} is cancelled")
    if row.cancelling:
        raise Declined("conflict", f"the {row.kind} is being cancelled: the payer has not answered yet")
    if row.status == DocumentStatus.ISSUED:
        if command.document.body != row.body:
            raise Declined("bad_request", "what was signed is not the document")
        verify(command.document, row.kind, draft.me)
        agreement = agreement_of(draft, row)
        put(draft, row, signature=command.document.signature, refused=False, waiting="sent; no receipt yet")
        draft.send(address(agreement.peer, "ledger"), DocumentSent(command.document), command.timeout_s)
    draft.reply(Done())


def cancel_invoice(draft: Draft, command: CancelInvoice) -> None:
    """Withdraw an invoice: at once if it never left, else the payer is asked (an acceptance under way wins)."""
    row = document_of(draft, DocumentKind.INVOICE, command.invoice_id, Party.PAYEE)
    if row.status in (DocumentStatus.ACCEPTED, DocumentStatus.SETTLED):
        raise Declined("conflict", f"the invoice is {row.status.lower()} already")
    if row.status == DocumentStatus.ISSUED and not row.signature:
        cancelled(draft, row)
    elif row.status in (DocumentStatus.ISSUED, DocumentStatus.RECEIVED):
        put(draft, row, waiting="cancelling: the payer has not answered yet", cancelling=True)
        draft.send(address(agreement_of(draft, row).peer, "ledger"), InvoiceCancelRequested(row.document_id))
    draft.reply(Done())


# -- from the payer
def document_received(draft: Draft, message: DocumentReceived) -> None:
    """The payer has it."""
    row = _from_payer(draft, message.kind, message.document_id)
    if row is not None and row.status == DocumentStatus.ISSUED:
        event(
            draft,
            put(draft, row, status=DocumentStatus.RECEIVED, waiting="waiting for the requestor to accept"),
            DocumentStatus.RECEIVED,
        )


def document_refused(draft: Draft, message: DocumentRefused) -> None:
    """The payer would not take it: it stays issued, with the reason."""
    row = _from_payer(draft, message.kind, message.document_id)
    if row is not None and row.status == DocumentStatus.ISSUED:
        most = _most(message.most)
        row = put(draft, row, refused=True, most=most, waiting=f"the requestor refused it: {message.reason[:500]}")
        _take_back(draft, row)
        event(draft, row, "REFUSED")


def _most(text: str) -> str:
    try:
        return amount_text(amount(text)) if text else ""
    except ValueError as error:
        raise Violation(str(error)) from None


def _take_back(draft: Draft, row: PaymentDocumentRow) -> None:
    """What was refused counts for nothing: a lower note may follow."""
    activity = draft.row(LedgerActivityRow, f"activity/{row.activity_id}")
    if activity is not None and activity.due == row.amount:
        due = max(Decimal(activity.accepted), min(Decimal(row.most or "0"), Decimal(activity.due)))
        draft.put(f"activity/{row.activity_id}", replace(activity, due=amount_text(due)))


def document_accepted(draft: Draft, message: DocumentAccepted) -> None:
    """The payer owes it."""
    body = decode_body(AcceptanceBody, message.acceptance.body)
    row = _from_payer(draft, body.kind, body.document_id)
    if row is None:
        return
    verify(message.acceptance, DocumentKind.ACCEPTANCE, agreement_of(draft, row).peer)
    if message.acceptance.body != acceptance_of(row):
        raise Violation(f"an acceptance of {body.document_id} that does not fit the document")
    if row.status in (DocumentStatus.ACCEPTED, DocumentStatus.SETTLED):
        return
    owe(draft, row)
    row = put(
        draft,
        row,
        status=DocumentStatus.ACCEPTED,
        waiting="accepted; waiting for payment",
        acceptance=message.acceptance.signature,
    )
    draft.put(f"open/{row.agreement_id}/{row.kind}/{row.document_id}", OpenRow(row.kind, row.document_id))
    event(draft, row, DocumentStatus.ACCEPTED)
    settle(draft, row.agreement_id)


def invoice_rejected(draft: Draft, message: InvoiceRejected) -> None:
    """The payer will not pay."""
    row = _from_payer(draft, DocumentKind.INVOICE, message.invoice_id)
    decode_body(RejectionBody, message.rejection.encode(errors="replace"))
    if row is not None and row.status in (DocumentStatus.ISSUED, DocumentStatus.RECEIVED):
        rejected(draft, row, message.rejection)


def invoice_cancelled(draft: Draft, message: InvoiceCancelled) -> None:
    """The payer agrees to the withdrawal."""
    row = _from_payer(draft, DocumentKind.INVOICE, message.invoice_id)
    if row is not None and row.status in (DocumentStatus.ISSUED, DocumentStatus.RECEIVED):
        cancelled(draft, row)


def undelivered(draft: Draft, document: Document, reason: str) -> None:
    """A document did not reach the payer: it stays issued and says why."""
    if document.kind == DocumentKind.DEBIT_NOTE:
        own_id = decode_body(DebitNoteBody, document.body).debit_note_id
    else:
        own_id = decode_body(InvoiceBody, document.body).invoice_id
    row = draft.row(PaymentDocumentRow, f"{document.kind}/{own_id}")
    if row is not None and row.status == DocumentStatus.ISSUED and not row.cancelling:
        put(draft, row, waiting=f"not delivered: {reason[:300]}")


def _billable(draft: Draft, agreement_id: str) -> LedgerAgreementRow:
    agreement = draft.row(LedgerAgreementRow, f"agreement/{agreement_id}")
    if agreement is None:
        raise Declined("bad_request", f"there is no agreement {agreement_id}")
    if agreement.role != Party.PAYEE:
        raise Declined("forbidden", "only the provider of an agreement bills it")
    if agreement.fault:
        raise Declined("bad_request", agreement.fault)
    return agreement


def _from_payer(draft: Draft, kind: str, document_id: str) -> PaymentDocumentRow | None:
    """Return the document that the payer speaks of, None if our disk has forgotten what it was for: then it is not at fault."""
    row = draft.row(PaymentDocumentRow, f"{kind}/{document_id}") if kind in FEEDS else None
    if row is None:
        forgotten = draft.row(ForgottenRow, f"forgotten/{kind}/{document_id}") if kind in FEEDS else None
        if forgotten is not None and forgotten.peer == node_of(draft.meta.sender):
            return None
        raise Violation(f"about a {kind[:32]} that does not exist")
    check_sender(draft, row, Party.PAYEE)
    return row
