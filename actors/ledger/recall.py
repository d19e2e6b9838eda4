"""What the ledger does when a disk went back in time: both sides tell each other again what they have signed.

Each side keeps the other's signed documents, and its own word on them. So whoever lost some hears them again: a payee
gives the payer its own acceptances and payments back (`Recalled`), a payer the payee's notes and invoices, and each
repeats its own word. What is known is passed over, so that this may be done at any time. A signature of ours binds us
whether or not we remember it: an acceptance is owed again, and only what no payment covers is ordered.
"""

from __future__ import annotations

from collections.abc import Container
from decimal import Decimal

from msgspec.structs import replace

from actors.kernel.draft import Draft
from actors.ledger.documents import add, agreement_of, event, owe, put, settle
from actors.ledger.forgotten import book_forgotten
from actors.ledger.parts import known_parts
from actors.ledger.payer import order
from actors.ledger.payments import book_rest, made, payment_event, payments_of, take_back, tx_hash_of
from actors.ledger.rows import (
    ForgottenRow,
    InRow,
    LedgerActivityRow,
    LedgerAgreementRow,
    OpenRow,
    OrderRow,
    PaymentDocumentRow,
    PaymentRow,
    PaymentState,
    ToldRow,
    acceptance_of,
)
from protocol.amounts import minus, total_of
from protocol.ledger import (
    AcceptanceBody,
    AskAgain,
    DebitNoteBody,
    DocumentAccepted,
    DocumentReceived,
    DocumentSent,
    InvoiceBody,
    InvoiceRejected,
    PaymentBody,
    PaymentSent,
    Recall,
    Recalled,
    TellAgain,
    decode_body,
)
from protocol.signing import Document, verify
from protocol.states import DocumentKind, DocumentStatus, Party
from protocol.types import Done, PeerLost, Violation, address, amount, amount_text, node_of

NO_ALLOCATION = ""  # the debt stands whatever our agent sets aside now: no peer may spend of that
TELL_EVERY_S = 600.0  # one peer
TOLD_BACK_S = 60 * 24 * 3600.0  # what changed since is told again: older backups are not meant to be put back


# -- telling
def peer_lost(draft: Draft, fact: PeerLost) -> None:
    """One of the two disks went back in time: tell what we know, and ask for what the peer knows."""
    peer = node_of(fact.to)
    if peer != draft.me and _may_tell(draft, peer):
        draft.send(address(peer, "ledger"), AskAgain())
        _tell(draft, peer)


def ask_again(draft: Draft, message: AskAgain) -> None:
    """A peer forgot something."""
    peer = node_of(draft.meta.sender)
    if _may_tell(draft, peer):
        _tell(draft, peer)


def tell_again(draft: Draft, timer: TellAgain) -> None:
    """A peer had to wait."""
    if _may_tell(draft, timer.peer):
        _tell(draft, timer.peer)


def recall(draft: Draft, command: Recall) -> None:
    """This node was restored from a backup: ask everybody we had to do with."""
    for peer in [key.partition("/")[2] for key in (*[key for key, _ in draft.readable("told/")], *draft.left_out)]:
        draft.put(f"told/{peer}", ToldRow(draft.now))
        draft.send(address(peer, "ledger"), AskAgain())
        _tell(draft, peer)
    draft.reply(Done())


def _may_tell(draft: Draft, peer: str) -> bool:
    """Return whether it is long enough since the peer was told everything; else it is told later, a stranger never."""
    told = draft.row(ToldRow, f"told/{peer}")
    if told is None:
        return False
    if draft.now - told.at < TELL_EVERY_S:
        draft.wake(f"told/{peer}", told.at + TELL_EVERY_S, TellAgain(peer))
        return False
    draft.put(f"told/{peer}", ToldRow(draft.now))
    return True


def _tell(draft: Draft, peer: str) -> None:
    """The payee's word on payments comes first: an acceptance that they cover is not ordered again. The payer's comes last:
    what it pays was accepted before. What cannot be read is not told: the rest is."""
    to, since = address(peer, "ledger"), draft.now - TOLD_BACK_S
    agreements = {row.agreement_id: row for _, row in draft.readable("agreement/") if row.peer == peer}
    if not agreements:
        return
    payments = [row for _, row in draft.readable("payment/") if row.peer == peer and row.recorded_at >= since and row.signature]
    for row in payments:
        if row.role == Party.PAYEE and row.state == PaymentState.VERIFIED:
            draft.send(to, Recalled(Document(DocumentKind.PAYMENT, row.body, row.signature)))
    notes = [row.last_debit_note_id for _, row in draft.readable("activity/") if row.agreement_id in agreements]
    keys = list(
        dict.fromkeys(f"{DocumentKind.DEBIT_NOTE}/{note}" for note in (*_accepted_notes(draft, agreements), *notes) if note)
    )
    keys += [f"{DocumentKind.INVOICE}/{row.invoice_id}" for row in agreements.values() if row.invoice_id]
    for key in keys:
        row = draft.sound(key)
        if isinstance(row, PaymentDocumentRow) and row.changed_at >= since and row.signature and not row.refused:
            _tell_document(draft, to, row)
    for payment in payments:
        if payment.role == Party.PAYER and not payment.instead:
            draft.send(to, PaymentSent(Document(DocumentKind.PAYMENT, payment.body, payment.signature)))


def _accepted_notes(draft: Draft, agreements: Container[str]) -> list[str]:
    """The highest accepted note of each activity: it is owed, although a later one may not be."""
    highest: dict[str, PaymentDocumentRow] = {}
    for _, row in draft.readable(f"{DocumentKind.DEBIT_NOTE}/"):
        if row.acceptance and row.agreement_id in agreements:
            other = highest.get(row.activity_id)
            if other is None or Decimal(row.amount) > Decimal(other.amount):
                highest[row.activity_id] = row
    return [row.document_id for row in highest.values()]


def _tell_document(draft: Draft, to: str, row: PaymentDocumentRow) -> None:
    document = Document(row.kind, row.body, row.signature)
    acceptance = Document(DocumentKind.ACCEPTANCE, acceptance_of(row), row.acceptance) if row.acceptance else None
    if row.role == Party.PAYEE:
        draft.send(to, DocumentSent(document))
        if acceptance is not None:
            draft.send(to, Recalled(acceptance))
        return
    draft.send(to, Recalled(document))
    draft.send(to, DocumentReceived(row.kind, row.document_id))
    if acceptance is not None:
        draft.send(to, DocumentAccepted(acceptance))
    elif row.status == DocumentStatus.REJECTED:
        draft.send(to, InvoiceRejected(row.document_id, row.rejection))


# -- hearing
def recalled(draft: Draft, message: Recalled) -> None:
    """The peer gives us back what we signed."""
    document, sender = message.document, node_of(draft.meta.sender)
    if document.kind not in (DocumentKind.DEBIT_NOTE, DocumentKind.INVOICE, DocumentKind.ACCEPTANCE, DocumentKind.PAYMENT):
        raise Violation(f"a {document.kind[:32]!r} is nothing that a ledger signs")
    verify(document, document.kind, draft.me)
    if document.kind == DocumentKind.ACCEPTANCE:
        _acceptance(draft, document, sender)
    elif document.kind == DocumentKind.PAYMENT:
        _payment(draft, document, sender)
    else:
        _own_document(draft, document, sender)


def _acceptance(draft: Draft, document: Document, sender: str) -> None:
    body = decode_body(AcceptanceBody, document.body)
    row = (
        draft.row(PaymentDocumentRow, f"{body.kind}/{body.document_id}")
        if body.kind in (DocumentKind.DEBIT_NOTE, DocumentKind.INVOICE)
        else None
    )
    if row is None or row.role != Party.PAYER or row.status in (DocumentStatus.ACCEPTED, DocumentStatus.SETTLED):
        return
    agreement = agreement_of(draft, row)
    if agreement.peer != sender or acceptance_of(row) != document.body:
        raise Violation(f"an acceptance of {body.document_id} that does not fit the document")
    added = owe(draft, row)
    unpaid = min(added, _not_paid(draft, row.agreement_id))
    waiting = "accepted before this node's disk went back in time; paid by what was paid since"
    if unpaid > 0:
        order(draft, row, agreement, NO_ALLOCATION, unpaid)
        waiting = "accepted before this node's disk went back in time; payment ordered"
    row = put(draft, row, status=DocumentStatus.ACCEPTED, waiting=waiting, acceptance=document.signature)
    draft.put(f"open/{row.agreement_id}/{row.kind}/{row.document_id}", OpenRow(row.kind, row.document_id))
    event(draft, row, DocumentStatus.ACCEPTED)
    settle(draft, row.agreement_id)


def _not_paid(draft: Draft, agreement_id: str) -> Decimal:
    """Return what is owed for an agreement, and neither paid nor ordered. An order that cannot be read may be for all of it:
    then `RowDamaged` is raised, and the peer's word waits."""
    agreement = draft.row(LedgerAgreementRow, f"agreement/{agreement_id}")
    assert agreement is not None, agreement_id
    orders = [row for _, row in draft.prefix("order/") if isinstance(row, OrderRow) and row.agreement_id == agreement_id]
    under_way = total_of(row.amount for row in orders if not row.payment_id)
    return max(minus(agreement.accepted, amount_text(total_of((agreement.paid, amount_text(under_way))))), Decimal(0))


def _payment(draft: Draft, document: Document, sender: str) -> None:
    body = decode_body(PaymentBody, document.body)
    if body.payee_id != sender:
        raise Violation("a payment that was made to somebody else")
    known = draft.row(PaymentRow, f"payment/{body.payment_id}")
    if known is not None:
        if known.role == Party.PAYER and known.body == document.body and known.state in (PaymentState.SENT, PaymentState.REFUSED):
            known = replace(known, state=PaymentState.ACKNOWLEDGED, reason="")
            draft.put(f"payment/{body.payment_id}", known)
            draft.wake(f"resend/{body.payment_id}", None)
        if known.role == Party.PAYER and known.body == document.body:
            book_rest(draft, known, book_forgotten)
        return
    _booked_again(draft, document, body)


def _booked_again(draft: Draft, document: Document, body: PaymentBody) -> None:
    """Book a payment of our own that we had forgotten; its payee, who gives it back, has verified it on chain."""
    known, unbooked = known_parts(draft, body, Party.PAYER, body.payee_id)
    if not known.agreement_payments and not known.activity_payments:
        return  # what it was for was forgotten as well, and cannot be paid again either
    tx_hash = tx_hash_of(body.details)
    others = payments_of(draft, tx_hash, body.payee_id, body.payee_addr)
    counts = not others or total_of(other.amount for other in others) <= Decimal(body.amount)
    row = PaymentRow(
        payment_id=body.payment_id,
        role=Party.PAYER,
        peer=body.payee_id,
        state=PaymentState.ACKNOWLEDGED,
        body=document.body,
        signature=document.signature,
        tx_hash=tx_hash,
        platform=body.payment_platform,
        amount=body.amount,
        recorded_at=draft.now,
        order_ids=tuple(order_id for other in others for order_id in other.order_ids) if counts else (),
        recalled=True,
        instead="" if counts else others[0].payment_id,
        unbooked=unbooked if counts else (),
    )
    draft.put(f"payment/{row.payment_id}", row)
    made(draft, tx_hash, row.peer, body.payee_addr, row.payment_id)
    if not counts:
        return
    for other in others:
        _supersede(draft, other, row)
    book_forgotten(draft, known)
    draft.emit("payments", payment_event(draft, row))


def _supersede(draft: Draft, row: PaymentRow, by: PaymentRow) -> None:
    """The wallet told of this transfer before the payee did, and of less: the payment that the payee has verified counts."""
    take_back(draft, decode_body(PaymentBody, row.body))
    reason = f"payment {by.payment_id}, which the payee has given back, tells of the same transfer"
    draft.put(
        f"payment/{row.payment_id}",
        replace(row, state=PaymentState.ACKNOWLEDGED, reason=reason, order_ids=(), instead=by.payment_id),
    )
    draft.wake(f"resend/{row.payment_id}", None)
    for order_id in row.order_ids:
        order = draft.row(OrderRow, f"order/{order_id}")
        assert order is not None, order_id
        draft.put(f"order/{order_id}", replace(order, payment_id=by.payment_id))


def _own_document(draft: Draft, document: Document, sender: str) -> None:
    body: DebitNoteBody | InvoiceBody
    if document.kind == DocumentKind.DEBIT_NOTE:
        body = decode_body(DebitNoteBody, document.body)
        own_id, activity_id, total = body.debit_note_id, body.activity_id, body.total_amount_due
    else:
        body = decode_body(InvoiceBody, document.body)
        own_id, activity_id, total = body.invoice_id, "", body.amount
    agreement = draft.row(LedgerAgreementRow, f"agreement/{body.agreement_id}")
    if agreement is None and body.recipient_id == sender:
        draft.put(f"forgotten/{document.kind}/{own_id}", ForgottenRow(body.agreement_id, sender))
    if agreement is None or (agreement.role, agreement.peer) != (Party.PAYEE, sender) or body.recipient_id != sender:
        return
    if draft.row(PaymentDocumentRow, f"{document.kind}/{own_id}") is not None:
        return
    if document.kind == DocumentKind.DEBIT_NOTE:
        activity = draft.row(LedgerActivityRow, f"activity/{activity_id}") or LedgerActivityRow(
            activity_id, agreement.agreement_id
        )
        if activity.agreement_id != agreement.agreement_id:
            return
        draft.put(f"in/{agreement.agreement_id}/{activity_id}", InRow())
        if amount(total) >= Decimal(activity.due):
            draft.put(f"activity/{activity_id}", replace(activity, due=total, last_debit_note_id=own_id))
    else:
        draft.put(f"agreement/{agreement.agreement_id}", replace(agreement, invoice_id=own_id))
    row = add(draft, DocumentKind(document.kind), own_id, Party.PAYEE, agreement, activity_id, amount(total), document.body)
    put(
        draft,
        row,
        status=DocumentStatus.ISSUED,
        signature=document.signature,
        waiting="issued before this node's disk went back in time",
    )
