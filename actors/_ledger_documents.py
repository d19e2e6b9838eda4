"""Debit notes and invoices: the part of the ledger that writes, sends, receives, accepts, rejects and cancels them.

The payee issues and signs; the payer accepts and signs. Accepting is one step: document, sums, allocation and payment
order together. A document can be ordered once, for the order bears its id. Where cancelling and accepting cross on the
wire, the acceptance wins on both nodes, for the money is committed.

The payer's address in the demand must be the requestor's own: else anybody could claim a stranger's transfers as his.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

from msgspec.structs import replace

from actors._ledger_allocations import amount_of, charge, usable
from actors._ledger_rows import (
    ACCEPTED,
    CANCELLED,
    FEEDS,
    ISSUED,
    PAYEE,
    PAYER,
    RECEIVED,
    REJECTED,
    SETTLED,
    Activity,
    Agreement,
    Open,
    Order,
    PaymentDocument,
    acceptance_of,
    minus,
    total_of,
)
from actors._money_draft import Declined, MoneyDraft
from protocol.activity import ActivityKnown
from protocol.ledger import (
    DEBIT_NOTE,
    INVOICE,
    MAX_ACTIVITIES,
    MAX_ID_CHARS,
    MAX_USAGE_COUNTERS,
    AcceptanceBody,
    AcceptDocument,
    CancelInvoice,
    DebitNoteBody,
    DocumentAccepted,
    DocumentEvent,
    DocumentReceived,
    DocumentRefused,
    DocumentSent,
    Done,
    InvoiceBody,
    InvoiceCancelled,
    InvoiceCancelRequested,
    InvoiceRejected,
    IssueDebitNote,
    IssueInvoice,
    RejectInvoice,
    SendDocument,
    decode_body,
    encode_body,
)
from protocol.negotiation import AgreementApproved, AgreementEnded
from protocol.signing import Document, verify
from protocol.types import Violation, address, amount, amount_text, node_id, node_of, timestamp, timestamp_text
from protocol.wallet import PayOut

MAX_DOCUMENTS = 50_000  # from the payee of one agreement
MAX_REJECTION_CHARS = 4096
NOBODY = "0x" + 40 * "0"  # tokens refuse to go there
_ID = re.compile(rf"[0-9A-Za-z_-]{{1,{MAX_ID_CHARS}}}\Z")


# -- facts from other actors
def agreement_approved(draft: MoneyDraft, me: str, fact: AgreementApproved) -> None:
    """Learn the payment terms of an agreement."""
    key = f"agreement/{fact.agreement_id}"
    if draft.row(Agreement, key):
        return
    demand, offer = json.loads(fact.demand_properties), json.loads(fact.offer_properties)
    platform = str(demand.get("golem.com.payment.chosen-platform") or "")
    payer_addr = str(demand.get(f"golem.com.payment.platform.{platform}.address") or fact.requestor)
    payee_addr = str(offer.get(f"golem.com.payment.platform.{platform}.address") or fact.provider)
    provides = fact.role == "Provider"
    draft.put(
        key,
        Agreement(
            agreement_id=fact.agreement_id,
            role=PAYEE if provides else PAYER,
            peer=fact.requestor if provides else fact.provider,
            platform=platform,
            payee_addr=payee_addr,
            payer_addr=payer_addr,
            approved_at=fact.approved_at,
            app_session_id=fact.app_session_id,
            fault=_fault(fact, platform, payer_addr, payee_addr),
        ),
    )


def _fault(fact: AgreementApproved, platform: str, payer_addr: str, payee_addr: str) -> str:
    if not platform:
        return "the demand has no golem.com.payment.chosen-platform"
    if fact.requestor == fact.provider:
        return "both sides of the agreement are one node"
    if payer_addr.lower() != fact.requestor:
        return f"the demand would pay from {payer_addr[:64]}, which is not the requestor's own account"
    try:
        payable = node_id(payee_addr) != NOBODY
    except ValueError:
        payable = False
    return "" if payable else f"the offer's payment address is none: {payee_addr[:64]}"


def agreement_ended(draft: MoneyDraft, me: str, fact: AgreementEnded) -> None:
    """Note it; what is owed stays owed."""
    row = draft.row(Agreement, f"agreement/{fact.agreement_id}")
    if row is not None:
        draft.put(f"agreement/{fact.agreement_id}", replace(row, ended=True))


def activity_known(draft: MoneyDraft, me: str, fact: ActivityKnown) -> None:
    """Learn which agreement an activity is billed to."""
    row = draft.row(Activity, f"activity/{fact.activity_id}")
    if row is None:
        draft.put(f"activity/{fact.activity_id}", Activity(fact.activity_id, fact.agreement_id))


# -- the payee's commands
def issue_debit_note(draft: MoneyDraft, me: str, command: IssueDebitNote) -> None:
    """Write a debit note over the running total of an activity."""
    key = f"debit-note/{command.debit_note_id}"
    if draft.row(PaymentDocument, key):
        draft.reply(Done())
        return
    activity = draft.row(Activity, f"activity/{command.activity_id}")
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
        issuer_id=me,
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
    _add(draft, DEBIT_NOTE, command.debit_note_id, PAYEE, agreement, activity.activity_id, total, encode_body(body))
    note = replace(activity, due=amount_text(total), last_debit_note_id=command.debit_note_id)
    draft.put(f"activity/{activity.activity_id}", note)
    draft.reply(Done())


def issue_invoice(draft: MoneyDraft, me: str, command: IssueInvoice) -> None:
    """Write an invoice over the total of an agreement."""
    key = f"invoice/{command.invoice_id}"
    if draft.row(PaymentDocument, key):
        draft.reply(Done())
        return
    agreement = _billable(draft, command.agreement_id)
    total = amount_of(command.amount)
    if len(command.activity_ids) > MAX_ACTIVITIES:
        raise Declined("bad_request", f"an invoice covers at most {MAX_ACTIVITIES} activities")
    for activity_id in command.activity_ids:
        activity = draft.row(Activity, f"activity/{activity_id}")
        if activity is None or activity.agreement_id != agreement.agreement_id:
            raise Declined("bad_request", f"activity {activity_id} is not one of the agreement")
    if total < _invoice_floor(draft, agreement):
        raise Declined("bad_request", "totals never decrease: more than this was invoiced or accepted already")
    body = InvoiceBody(
        invoice_id=command.invoice_id,
        issuer_id=me,
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
    _add(draft, INVOICE, command.invoice_id, PAYEE, agreement, "", total, encode_body(body))
    draft.put(f"agreement/{agreement.agreement_id}", replace(agreement, invoice_id=command.invoice_id))
    draft.reply(Done())


def send_document(draft: MoneyDraft, me: str, command: SendDocument) -> None:
    """Send an issued document to the payer. Its status changes when the receipt comes."""
    row = _document(draft, command.kind, command.document_id, PAYEE)
    if row.status == CANCELLED:
        raise Declined("bad_request", f"the {row.kind} is cancelled")
    if row.status == ISSUED:
        if command.document.body != row.body:
            raise Declined("bad_request", "what was signed is not the document")
        verify(command.document, row.kind, me)
        agreement = _agreement_of(draft, row)
        _put(draft, row, signature=command.document.signature, refused=False, waiting="sent; no receipt yet")
        draft.send(address(agreement.peer, "ledger"), DocumentSent(command.document), command.timeout_s)
    draft.reply(Done())


def cancel_invoice(draft: MoneyDraft, me: str, command: CancelInvoice) -> None:
    """Withdraw an invoice: at once if it never left, else the payer is asked (an acceptance under way wins)."""
    row = _document(draft, INVOICE, command.invoice_id, PAYEE)
    if row.status in (ACCEPTED, SETTLED):
        raise Declined("conflict", f"the invoice is {row.status.lower()} already")
    if row.status == ISSUED and not row.signature:
        _cancelled(draft, row)
    elif row.status in (ISSUED, RECEIVED):
        _put(draft, row, waiting="cancelling: the payer has not answered yet")
        draft.send(address(_agreement_of(draft, row).peer, "ledger"), InvoiceCancelRequested(row.document_id))
    draft.reply(Done())


# -- the payer's commands
def accept(draft: MoneyDraft, me: str, command: AcceptDocument) -> None:
    """Owe what a document adds to the debt: charge the allocation, order the payment, tell the payee."""
    row = _document(draft, command.kind, command.document_id, PAYER)
    agreement = _agreement_of(draft, row)
    if amount_of(command.amount) != Decimal(row.amount):
        raise Declined("bad_request", f"Invalid amount accepted: {command.amount}, the {row.kind} says {row.amount}")
    if row.status in (ACCEPTED, SETTLED) or (row.kind == DEBIT_NOTE and agreement.invoice_accepted):
        draft.reply(Done())
        return
    if row.status != RECEIVED:
        raise Declined("bad_request", f"the {row.kind} is {row.status.lower()}")
    if row.kind == INVOICE and Decimal(row.amount) < Decimal(agreement.accepted):
        raise Declined("bad_request", f"{agreement.accepted} was accepted for this agreement already")
    if command.acceptance.body != acceptance_of(row):
        raise Declined("bad_request", "what was signed is not the acceptance of this document")
    verify(command.acceptance, "acceptance", me)
    allocation = usable(draft, command.allocation_id, agreement.payer_addr, agreement.platform)
    added = _owe(draft, row)
    charge(draft, allocation, added)
    if added > 0:
        _order(draft, row, agreement, allocation.allocation_id, added)
    waiting = "accepted; payment ordered" if added > 0 else "accepted; earlier payment orders cover it"
    row = _put(draft, row, status=ACCEPTED, waiting=waiting, acceptance=command.acceptance.signature)
    draft.put(f"open/{row.agreement_id}/{row.kind}/{row.document_id}", Open(row.kind, row.document_id))
    draft.send(address(agreement.peer, "ledger"), DocumentAccepted(command.acceptance))
    _event(draft, row, ACCEPTED)
    settle(draft, row.agreement_id)
    draft.reply(Done())


def reject_invoice(draft: MoneyDraft, me: str, command: RejectInvoice) -> None:
    """Refuse to pay an invoice that is not accepted."""
    row = _document(draft, INVOICE, command.invoice_id, PAYER)
    if row.status in (ACCEPTED, SETTLED, CANCELLED):
        raise Declined("bad_request", f"the invoice is {row.status.lower()}")
    if len(command.rejection) > MAX_REJECTION_CHARS:
        raise Declined("bad_request", f"a rejection has at most {MAX_REJECTION_CHARS} characters")
    if row.status == RECEIVED:
        _rejected(draft, row, command.rejection)
        peer = _agreement_of(draft, row).peer
        draft.send(address(peer, "ledger"), InvoiceRejected(row.document_id, command.rejection))
    draft.reply(Done())


# -- from the payee
def document_sent(draft: MoneyDraft, me: str, message: DocumentSent) -> None:
    """Take a document in, or say why not; the receipt is repeated as often as the document comes."""
    sender, document = node_of(draft.meta.sender), message.document
    if document.kind not in (DEBIT_NOTE, INVOICE):
        raise Violation(f"a {document.kind[:32]!r} is no debit note and no invoice")
    verify(document, document.kind, sender)
    body: DebitNoteBody | InvoiceBody
    if document.kind == DEBIT_NOTE:
        body = decode_body(DebitNoteBody, document.body)
        own_id, activity_id, total = body.debit_note_id, body.activity_id, _peer_amount(body.total_amount_due)
        if len(body.usage_counter_vector or ()) > MAX_USAGE_COUNTERS or not _ID.match(activity_id):
            raise Violation("a debit note with a bad activity id or too many counters")
    else:
        body = decode_body(InvoiceBody, document.body)
        own_id, activity_id, total = body.invoice_id, "", _peer_amount(body.amount)
        if len(body.activity_ids) > MAX_ACTIVITIES:
            raise Violation("an invoice over too many activities")
    if not (_ID.match(own_id) and _ID.match(body.agreement_id)) or (body.issuer_id, body.recipient_id) != (sender, me):
        raise Violation(f"a {document.kind} with bad ids or parties")
    try:
        timestamp(body.timestamp)
        timestamp(body.payment_due_date or body.timestamp)
    except ValueError as error:
        raise Violation(str(error)) from None
    receipt = address(sender, "ledger"), DocumentReceived(document.kind, own_id)
    known = draft.row(PaymentDocument, f"{document.kind}/{own_id}")
    if known is not None:
        if known.body != document.body:
            raise Violation(f"another {document.kind} with the id {own_id} exists")
        draft.send(*receipt)
        return
    agreement = draft.row(Agreement, f"agreement/{body.agreement_id}")
    if agreement is not None and (agreement.peer, agreement.role) != (sender, PAYER):
        raise Violation(f"{sender} is not the provider of agreement {body.agreement_id}")
    if reason := _objection(draft, agreement, body, activity_id, total):
        draft.send(address(sender, "ledger"), DocumentRefused(document.kind, own_id, reason))
        return
    assert agreement is not None
    _receive(draft, document, own_id, agreement, activity_id, total)
    draft.send(*receipt)


def _objection(
    draft: MoneyDraft, agreement: Agreement | None, body: DebitNoteBody | InvoiceBody, activity_id: str, total: Decimal
) -> str:
    """Why a well-formed document of the right peer is not taken; "" if it is."""
    if agreement is None:
        return f"agreement {body.agreement_id} is not known here"
    if agreement.fault:
        return agreement.fault
    terms = (agreement.platform, agreement.payee_addr, agreement.payer_addr)
    if (body.payment_platform, body.payee_addr, body.payer_addr) != terms:
        return "platform or addresses are not those of the agreement"
    if agreement.documents >= MAX_DOCUMENTS:
        return f"the agreement has {MAX_DOCUMENTS} documents already"
    if isinstance(body, InvoiceBody):
        return "totals never decrease" if total < _invoice_floor(draft, agreement) else ""
    activity = draft.row(Activity, f"activity/{activity_id}")
    if activity is not None and activity.agreement_id != agreement.agreement_id:
        return "the activity is not one of the agreement"
    return "totals never decrease" if activity is not None and total < Decimal(activity.due) else ""


def _receive(
    draft: MoneyDraft, document: Document, own_id: str, agreement: Agreement, activity_id: str, total: Decimal
) -> None:
    if document.kind == DEBIT_NOTE:
        activity = draft.row(Activity, f"activity/{activity_id}") or Activity(activity_id, agreement.agreement_id)
        draft.put(
            f"activity/{activity_id}", replace(activity, due=amount_text(total), last_debit_note_id=own_id)
        )
    else:
        agreement = replace(agreement, invoice_id=own_id)
    draft.put(f"agreement/{agreement.agreement_id}", replace(agreement, documents=agreement.documents + 1))
    row = _add(draft, document.kind, own_id, PAYER, agreement, activity_id, total, document.body)
    row = _put(draft, row, status=RECEIVED, signature=document.signature, waiting="waiting for the requestor to accept")
    _event(draft, row, RECEIVED)


def cancel_requested(draft: MoneyDraft, me: str, message: InvoiceCancelRequested) -> None:
    """Agree, unless the invoice is accepted: the payee learns that from the acceptance."""
    row = draft.row(PaymentDocument, f"invoice/{message.invoice_id}")
    if row is None:  # it never arrived
        draft.send(draft.meta.sender, InvoiceCancelled(message.invoice_id))
        return
    _check_sender(draft, row, PAYER)
    if row.status == RECEIVED:
        _cancelled(draft, row)
    if row.status in (RECEIVED, CANCELLED, REJECTED):
        draft.send(draft.meta.sender, InvoiceCancelled(message.invoice_id))


# -- from the payer
def document_received(draft: MoneyDraft, me: str, message: DocumentReceived) -> None:
    """The payer has it."""
    row = _from_payer(draft, message.kind, message.document_id)
    if row.status == ISSUED:
        _event(draft, _put(draft, row, status=RECEIVED, waiting="waiting for the requestor to accept"), RECEIVED)


def document_refused(draft: MoneyDraft, me: str, message: DocumentRefused) -> None:
    """The payer would not take it: it stays issued, with the reason."""
    row = _from_payer(draft, message.kind, message.document_id)
    if row.status == ISSUED:
        row = _put(draft, row, refused=True, waiting=f"the requestor refused it: {message.reason[:500]}")
        _event(draft, row, "REFUSED")


def document_accepted(draft: MoneyDraft, me: str, message: DocumentAccepted) -> None:
    """The payer owes it."""
    body = decode_body(AcceptanceBody, message.acceptance.body)
    row = _from_payer(draft, body.kind, body.document_id)
    verify(message.acceptance, "acceptance", _agreement_of(draft, row).peer)
    if message.acceptance.body != acceptance_of(row):
        raise Violation(f"an acceptance of {body.document_id} that does not fit the document")
    if row.status in (ACCEPTED, SETTLED):
        return
    _owe(draft, row)
    row = _put(
        draft, row, status=ACCEPTED, waiting="accepted; waiting for payment", acceptance=message.acceptance.signature
    )
    draft.put(f"open/{row.agreement_id}/{row.kind}/{row.document_id}", Open(row.kind, row.document_id))
    _event(draft, row, ACCEPTED)
    settle(draft, row.agreement_id)


def invoice_rejected(draft: MoneyDraft, me: str, message: InvoiceRejected) -> None:
    """The payer will not pay."""
    row = _from_payer(draft, INVOICE, message.invoice_id)
    if len(message.rejection) > MAX_REJECTION_CHARS:
        raise Violation("a rejection that is too long")
    if row.status in (ISSUED, RECEIVED):
        _rejected(draft, row, message.rejection)


def invoice_cancelled(draft: MoneyDraft, me: str, message: InvoiceCancelled) -> None:
    """The payer agrees to the withdrawal."""
    row = _from_payer(draft, INVOICE, message.invoice_id)
    if row.status in (ISSUED, RECEIVED):
        _cancelled(draft, row)


# -- settling, also used when money moves
def settle(draft: MoneyDraft, agreement_id: str) -> None:
    """Settle the accepted documents of an agreement that payments cover by now."""
    for key, row in list(draft.prefix(f"open/{agreement_id}/")):
        document = draft.row(PaymentDocument, f"{row.kind}/{row.document_id}")
        assert document is not None, key
        sums: Agreement | Activity | None
        if document.kind == DEBIT_NOTE:
            sums = draft.row(Activity, f"activity/{document.activity_id}")
        else:
            sums = draft.row(Agreement, f"agreement/{agreement_id}")
        assert sums is not None, key
        if Decimal(sums.paid) >= Decimal(document.amount):
            draft.put(key, None)
            _event(draft, _put(draft, document, status=SETTLED, waiting=""), SETTLED)


def undelivered(draft: MoneyDraft, document: Document, reason: str) -> None:
    """A document did not reach the payer: it stays issued and says why."""
    if document.kind == DEBIT_NOTE:
        own_id = decode_body(DebitNoteBody, document.body).debit_note_id
    else:
        own_id = decode_body(InvoiceBody, document.body).invoice_id
    row = draft.row(PaymentDocument, f"{document.kind}/{own_id}")
    if row is not None and row.status == ISSUED:
        _put(draft, row, waiting=f"not delivered: {reason[:300]}")


def explain(draft: MoneyDraft, kind: str, document_id: str, waiting: str) -> None:
    """Say why an accepted document is not settled yet."""
    row = draft.row(PaymentDocument, f"{kind}/{document_id}")
    if row is not None and row.status == ACCEPTED and row.waiting != waiting:
        _put(draft, row, waiting=waiting)


# -- pieces
def _billable(draft: MoneyDraft, agreement_id: str) -> Agreement:
    agreement = draft.row(Agreement, f"agreement/{agreement_id}")
    if agreement is None:
        raise Declined("bad_request", f"there is no agreement {agreement_id}")
    if agreement.role != PAYEE:
        raise Declined("forbidden", "only the provider of an agreement bills it")
    if agreement.fault:
        raise Declined("bad_request", agreement.fault)
    return agreement


def _invoice_floor(draft: MoneyDraft, agreement: Agreement) -> Decimal:
    """What an invoice must at least amount to."""
    last = draft.row(PaymentDocument, f"invoice/{agreement.invoice_id}")
    invoiced = last.amount if last is not None and last.status not in (REJECTED, CANCELLED) else "0"
    return max(Decimal(agreement.accepted), Decimal(invoiced))


def _owe(draft: MoneyDraft, row: PaymentDocument) -> Decimal:
    """Book what accepting `row` adds to the debt, and return it."""
    agreement = _agreement_of(draft, row)
    if row.kind == DEBIT_NOTE:
        activity = draft.row(Activity, f"activity/{row.activity_id}")
        assert activity is not None, row
        added = Decimal(0) if agreement.invoice_accepted else max(minus(row.amount, activity.accepted), Decimal(0))
        accepted = amount_text(total_of((activity.accepted, added)))
        draft.put(f"activity/{row.activity_id}", replace(activity, accepted=accepted))
    else:
        added = max(minus(row.amount, agreement.accepted), Decimal(0))
        agreement = replace(agreement, invoice_accepted=True)
    accepted = amount_text(total_of((agreement.accepted, added)))
    draft.put(f"agreement/{row.agreement_id}", replace(agreement, accepted=accepted))
    return added


def _order(draft: MoneyDraft, row: PaymentDocument, agreement: Agreement, allocation_id: str, added: Decimal) -> None:
    order_id = f"{row.kind}:{row.document_id}"
    assert draft.row(Order, f"order/{order_id}") is None, f"{order_id} is ordered twice"
    order = Order(
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
    draft.put(f"order/{order_id}", order)
    draft.send("wallet", PayOut(order_id, order.platform, order.payer_addr, order.payee_addr, order.amount))


def _add(
    draft: MoneyDraft,
    kind: str,
    document_id: str,
    role: str,
    agreement: Agreement,
    activity_id: str,
    total: Decimal,
    body: bytes,
) -> PaymentDocument:
    row = PaymentDocument(
        kind=kind,
        document_id=document_id,
        role=role,
        agreement_id=agreement.agreement_id,
        activity_id=activity_id,
        amount=amount_text(total),
        status=ISSUED,
        body=body,
        signature=b"",
        issued_at=draft.now,
        changed_at=draft.now,
        waiting="not sent yet",
    )
    draft.put(f"{kind}/{document_id}", row)
    return row


def _put(draft: MoneyDraft, row: PaymentDocument, **changes: Any) -> PaymentDocument:
    row = replace(row, changed_at=draft.now, **changes)
    draft.put(f"{row.kind}/{row.document_id}", row)
    return row


def _event(draft: MoneyDraft, row: PaymentDocument, what: str) -> None:
    session = _agreement_of(draft, row).app_session_id
    draft.emit(FEEDS[row.kind], DocumentEvent(row.document_id, what, row.role, session, row.rejection))


def _cancelled(draft: MoneyDraft, row: PaymentDocument) -> None:
    _event(draft, _put(draft, row, status=CANCELLED, waiting=""), CANCELLED)


def _rejected(draft: MoneyDraft, row: PaymentDocument, rejection: str) -> None:
    _event(draft, _put(draft, row, status=REJECTED, waiting="", rejection=rejection), REJECTED)


def _document(draft: MoneyDraft, kind: str, document_id: str, role: str) -> PaymentDocument:
    row = draft.row(PaymentDocument, f"{kind}/{document_id}") if kind in FEEDS else None
    if row is None:
        raise Declined("unknown", f"there is no {kind} {document_id}")
    if row.role != role:
        raise Declined("forbidden", f"only the {role} of a {kind} may do this")
    return row


def _from_payer(draft: MoneyDraft, kind: str, document_id: str) -> PaymentDocument:
    row = draft.row(PaymentDocument, f"{kind}/{document_id}") if kind in FEEDS else None
    if row is None:
        raise Violation(f"about a {kind[:32]} that does not exist")
    _check_sender(draft, row, PAYEE)
    return row


def _check_sender(draft: MoneyDraft, row: PaymentDocument, role: str) -> None:
    """Raise `Violation` unless we have this role in the document and the sender the other."""
    if row.role != role or _agreement_of(draft, row).peer != node_of(draft.meta.sender):
        raise Violation(f"{draft.meta.sender} has no say about {row.kind} {row.document_id}")


def _agreement_of(draft: MoneyDraft, row: PaymentDocument) -> Agreement:
    agreement = draft.row(Agreement, f"agreement/{row.agreement_id}")
    assert agreement is not None, row
    return agreement


def _peer_amount(text: str) -> Decimal:
    try:
        return amount(text)
    except ValueError as error:
        raise Violation(str(error)) from None
