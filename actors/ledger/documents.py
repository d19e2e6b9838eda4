"""Debit notes and invoices: what both sides of the ledger share. Each side's doings are in `payee`, `payer`.

The payee issues and signs; the payer accepts and signs. Accepting is one step: document, sums, allocation and payment
order together. A document can be ordered once, for the order bears its id. Where cancelling and accepting cross on the
wire, the acceptance wins on both nodes, for the money is committed.
"""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

from msgspec.structs import replace

from actors.kernel.draft import Declined, Draft
from actors.ledger.ceiling import pricing_of, set_back_s
from actors.ledger.rows import FEEDS, InRow, LedgerActivityRow, LedgerAgreementRow, PaymentDocumentRow, StoredRow, ToldRow
from protocol.activity import ActivityKnown, ActivityOver
from protocol.amounts import minus, total_of
from protocol.ledger import DocumentEvent
from protocol.negotiation import AgreementApproved, AgreementEnded
from protocol.payment_terms import payment_terms
from protocol.states import DocumentKind, DocumentStatus, Party, Role
from protocol.types import Violation, amount_text, node_of

MAX_PEER_BYTES = 256 * 1024 * 1024  # of the documents of one node, whatever their agreements
PEER_BYTES_A_DAY = 64 * 1024 * 1024  # which who works for years gets anew
DAY_S = 24 * 3600.0


# -- facts from other actors
def agreement_approved(draft: Draft, fact: AgreementApproved) -> None:
    """Learn the payment terms of an agreement."""
    key = f"agreement/{fact.agreement_id}"
    if draft.row(LedgerAgreementRow, key):
        return
    demand, offer = json.loads(fact.demand_properties), json.loads(fact.offer_properties)
    terms = payment_terms(demand, offer, fact.requestor, fact.provider)
    provides = fact.role == Role.PROVIDER
    peer = fact.requestor if provides else fact.provider
    if draft.row(ToldRow, f"told/{peer}") is None:
        draft.put(f"told/{peer}", ToldRow())
    if not provides:
        _prices(draft, fact.agreement_id, demand, offer)
    draft.put(
        key,
        LedgerAgreementRow(
            agreement_id=fact.agreement_id,
            role=Party.PAYEE if provides else Party.PAYER,
            peer=peer,
            platform=terms.platform,
            payee_addr=terms.payee_addr,
            payer_addr=terms.payer_addr,
            approved_at=fact.approved_at,
            app_session_id=fact.app_session_id,
            fault=terms.fault,
        ),
    )


def _prices(draft: Draft, agreement_id: str, demand: Any, offer: Any) -> None:
    pricing = pricing_of(agreement_id, demand, offer)
    if pricing is not None:
        draft.put(f"pricing/{agreement_id}", pricing)


def agreement_ended(draft: Draft, fact: AgreementEnded) -> None:
    """Note it; what is owed stays owed."""
    row = draft.row(LedgerAgreementRow, f"agreement/{fact.agreement_id}")
    if row is not None:
        draft.put(f"agreement/{fact.agreement_id}", replace(row, ended=True))


def activity_known(draft: Draft, fact: ActivityKnown) -> None:
    """Learn which agreement an activity is billed to."""
    if draft.row(LedgerActivityRow, f"activity/{fact.activity_id}") is None:
        row = LedgerActivityRow(
            fact.activity_id, fact.agreement_id, created_at=fact.at or draft.now, set_back_s=set_back_s(draft)
        )
        draft.put(f"activity/{fact.activity_id}", row)
        draft.put(f"in/{fact.agreement_id}/{fact.activity_id}", InRow())


def activity_over(draft: Draft, fact: ActivityOver) -> None:
    """Its time does not count any more."""
    row = draft.row(LedgerActivityRow, f"activity/{fact.activity_id}")
    if row is not None and row.ended_at is None:
        row = replace(row, ended_at=fact.at, ended_set_back_s=set_back_s(draft))
        draft.put(f"activity/{fact.activity_id}", row)


# -- settling, also used when money moves
def settle(draft: Draft, agreement_id: str) -> None:
    """Settle the accepted documents of an agreement that payments cover by now."""
    for key, row in list(draft.prefix(f"open/{agreement_id}/")):
        document = draft.row(PaymentDocumentRow, f"{row.kind}/{row.document_id}")
        assert document is not None, key
        sums: LedgerAgreementRow | LedgerActivityRow | None
        if document.kind == DocumentKind.DEBIT_NOTE:
            sums = draft.row(LedgerActivityRow, f"activity/{document.activity_id}")
        else:
            sums = draft.row(LedgerAgreementRow, f"agreement/{agreement_id}")
        assert sums is not None, key
        if Decimal(sums.paid) >= Decimal(document.amount):
            draft.put(key, None)
            event(draft, put(draft, document, status=DocumentStatus.SETTLED, waiting=""), DocumentStatus.SETTLED)


def explain(draft: Draft, kind: str, document_id: str, waiting: str) -> None:
    """Say why an accepted document is not settled yet."""
    row = draft.row(PaymentDocumentRow, f"{kind}/{document_id}")
    if row is not None and row.status == DocumentStatus.ACCEPTED and row.waiting != waiting:
        put(draft, row, waiting=waiting)


# -- what a peer may have us keep
def no_room(draft: Draft, peer: str, size: int) -> str:
    """Why nothing of this size is kept for a peer now, "" if it is."""
    if _stored(draft, peer) + size <= MAX_PEER_BYTES:
        return ""
    return f"{MAX_PEER_BYTES} bytes are kept for {peer} already; {PEER_BYTES_A_DAY} more are possible each day"


def keep(draft: Draft, peer: str, size: int) -> None:
    """Count what is kept for a peer."""
    draft.put(f"stored/{peer}", StoredRow(_stored(draft, peer) + size, draft.now))


def _stored(draft: Draft, peer: str) -> float:
    row = draft.row(StoredRow, f"stored/{peer}")
    return max(0.0, row.size - max(0.0, draft.now - row.at) * PEER_BYTES_A_DAY / DAY_S) if row else 0.0


# -- pieces
def invoice_floor(draft: Draft, agreement: LedgerAgreementRow) -> Decimal:
    """What an invoice must at least amount to."""
    last = draft.row(PaymentDocumentRow, f"invoice/{agreement.invoice_id}")
    stands = last is not None and last.status not in (DocumentStatus.REJECTED, DocumentStatus.CANCELLED) and not last.refused
    invoiced = last.amount if last is not None and stands else "0"
    return max(Decimal(agreement.accepted), Decimal(invoiced))


def owe(draft: Draft, row: PaymentDocumentRow) -> Decimal:
    """Book what accepting `row` adds to the debt, and return it."""
    agreement = agreement_of(draft, row)
    if row.kind == DocumentKind.DEBIT_NOTE:
        activity = draft.row(LedgerActivityRow, f"activity/{row.activity_id}")
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


def add(
    draft: Draft,
    kind: DocumentKind,
    document_id: str,
    role: Party,
    agreement: LedgerAgreementRow,
    activity_id: str,
    total: Decimal,
    body: bytes,
) -> PaymentDocumentRow:
    """Write a document that is new here, as issued."""
    row = PaymentDocumentRow(
        kind=kind,
        document_id=document_id,
        role=role,
        agreement_id=agreement.agreement_id,
        activity_id=activity_id,
        amount=amount_text(total),
        status=DocumentStatus.ISSUED,
        body=body,
        signature=b"",
        issued_at=draft.now,
        changed_at=draft.now,
        waiting="not sent yet",
    )
    draft.put(f"{kind}/{document_id}", row)
    return row


def put(draft: Draft, row: PaymentDocumentRow, **changes: Any) -> PaymentDocumentRow:
    """Store a document with changes, and return it."""
    row = replace(row, changed_at=draft.now, **changes)
    draft.put(f"{row.kind}/{row.document_id}", row)
    return row


def event(draft: Draft, row: PaymentDocumentRow, what: str) -> None:
    """Tell those who watch the feed what happened to a document."""
    session = agreement_of(draft, row).app_session_id
    draft.emit(FEEDS[row.kind], DocumentEvent(row.document_id, what, row.role, session, row.rejection))


def cancelled(draft: Draft, row: PaymentDocumentRow) -> None:
    """End a document that was withdrawn."""
    event(draft, put(draft, row, status=DocumentStatus.CANCELLED, waiting=""), DocumentStatus.CANCELLED)


def rejected(draft: Draft, row: PaymentDocumentRow, rejection: str) -> None:
    """End an invoice that will not be paid."""
    event(draft, put(draft, row, status=DocumentStatus.REJECTED, waiting="", rejection=rejection), DocumentStatus.REJECTED)


def document_of(draft: Draft, kind: str, document_id: str, role: str) -> PaymentDocumentRow:
    """Return the document that a command is about; declines one that is unknown or of the other role."""
    row = draft.row(PaymentDocumentRow, f"{kind}/{document_id}") if kind in FEEDS else None
    if row is None:
        raise Declined("unknown", f"there is no {kind} {document_id}")
    if row.role != role:
        raise Declined("forbidden", f"only the {role} of a {kind} may do this")
    return row


def check_sender(draft: Draft, row: PaymentDocumentRow, role: str) -> None:
    """Raise `Violation` unless we have this role in the document and the sender the other."""
    if row.role != role or agreement_of(draft, row).peer != node_of(draft.meta.sender):
        raise Violation(f"{draft.meta.sender} has no say about {row.kind} {row.document_id}")


def agreement_of(draft: Draft, row: PaymentDocumentRow) -> LedgerAgreementRow:
    """Return the agreement that a document belongs to."""
    agreement = draft.row(LedgerAgreementRow, f"agreement/{row.agreement_id}")
    assert agreement is not None, row
    return agreement
