"""Debit notes and invoices as people keep books of them: one line a document; and who owes this node what, since when."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from actors.ledger.audit import body_of
from actors.ledger.rows import LedgerAgreementRow, PaymentDocumentRow, PaymentRow, PaymentState
from protocol.amounts import minus, total_of
from protocol.ledger import PaymentBody, decode_body
from protocol.states import DocumentKind, DocumentStatus, Party
from protocol.types import Violation, amount_text, timestamp, timestamp_text

if TYPE_CHECKING:
    from golem.node.node import Node

COLUMNS = (
    "date", "kind", "document", "agreement", "peer", "direction", "amount", "paymentPlatform", "status", "due", "transaction"
)  # fmt: skip
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a cell that begins so is one, to a spreadsheet


def bills(node: Node) -> list[dict[str, Any]]:
    """Return all documents, oldest first, with `COLUMNS` and `waiting`. `direction`: "out", this node pays; "in", it is paid."""
    agreements: dict[str, LedgerAgreementRow] = {row.agreement_id: row for row in _rows(node, "agreement/")}
    hashes = _hashes(node)
    found = []
    for row in sorted(_documents(node), key=lambda row: row.issued_at):
        agreement = agreements.get(row.agreement_id)
        found.append({
            "date": timestamp_text(row.issued_at), "kind": row.kind, "document": row.document_id, "agreement": row.agreement_id,
            "peer": agreement.peer if agreement else "", "direction": "out" if row.role == Party.PAYER else "in",
            "amount": row.amount, "paymentPlatform": agreement.platform if agreement else "", "status": row.status,
            "due": _due_text(row), "transaction": " ".join(_paid_by(row, hashes)), "waiting": row.waiting,
        })  # fmt: skip
    return found


def csv_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return bills as CSV (RFC 4180). A cell that a spreadsheet would compute is made a text by an apostrophe before it."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([harmless(str(row[column])) for column in COLUMNS])
    return out.getvalue()


def harmless(cell: str) -> str:
    """Return a cell that no spreadsheet takes for a formula."""
    return f"'{cell}" if cell.startswith(FORMULA) else cell


def debtors(node: Node) -> list[dict[str, Any]]:
    """Return who owes this node for what it accepted, the largest debt of a platform first. Seconds late: `lateS`, of the
    oldest debt whose due date has passed."""
    owing: dict[tuple[str, str], list[LedgerAgreementRow]] = defaultdict(list)
    for row in _rows(node, "agreement/"):
        if row.role == Party.PAYEE and Decimal(row.accepted) > Decimal(row.paid):
            owing[row.peer, row.platform].append(row)
    unpaid: dict[str, list[PaymentDocumentRow]] = defaultdict(list)
    for document in _documents(node):
        if document.role == Party.PAYEE and document.status == DocumentStatus.ACCEPTED:
            unpaid[document.agreement_id].append(document)
    found = [_debt(node, *who, rows, unpaid) for who, rows in owing.items()]
    return sorted(found, key=lambda one: (one["paymentPlatform"], -Decimal(one["owed"])))


def _debt(
    node: Node, peer: str, platform: str, rows: Sequence[LedgerAgreementRow], unpaid: Mapping[str, Sequence[PaymentDocumentRow]]
) -> dict[str, Any]:
    now = node.clock()
    documents = [one for row in rows for one in unpaid.get(row.agreement_id, ())]
    since = min((one.changed_at for one in documents), default=now)
    late = max((now - due for one in documents if (due := due_at(one)) is not None), default=0.0)
    owed = total_of(minus(row.accepted, row.paid) for row in rows)
    return {
        "peer": peer, "paymentPlatform": platform, "owed": amount_text(owed), "agreements": len(rows),
        "documents": len(documents), "since": timestamp_text(since), "lateS": round(max(late, 0.0)),
    }  # fmt: skip


def outstanding(node: Node, platform: str) -> dict[str, str]:
    """Return what this node has accepted to pay on a platform and what of it is not paid: `owed`, and `due`, whose date has
    passed. In GLM."""
    orders = [row for row in _rows(node, "order/") if row.platform == platform and not row.payment_id]
    ledger = node.system.rows("ledger")
    now, due = node.clock(), []
    for order in orders:
        document = ledger.get(f"{order.kind}/{order.document_id}")
        at = due_at(document) if isinstance(document, PaymentDocumentRow) else None
        if at is not None and at <= now:
            due.append(order.amount)
    return {"owed": amount_text(total_of(order.amount for order in orders)), "due": amount_text(total_of(due))}


def due_at(row: PaymentDocumentRow) -> float | None:
    """Return when a document is to be paid, in seconds of the epoch; None where it does not say."""
    try:
        text = body_of(row).payment_due_date
        return timestamp(text) if text else None
    except (Violation, ValueError):
        return None


def _due_text(row: PaymentDocumentRow) -> str:
    at = due_at(row)
    return timestamp_text(at) if at is not None else ""


def _paid_by(row: PaymentDocumentRow, hashes: Mapping[str, Sequence[str]]) -> Sequence[str]:
    """The transactions of a document that is paid: those of its own part or, where it has none, of its agreement."""
    if row.status != DocumentStatus.SETTLED:
        return ()
    own = hashes.get(row.activity_id if row.kind == DocumentKind.DEBIT_NOTE else row.agreement_id, ())
    return list(dict.fromkeys(own))


def _hashes(node: Node) -> dict[str, list[str]]:
    """Return the transactions that paid each agreement and activity."""
    of = {row.activity_id: row.agreement_id for row in _rows(node, "activity/")}
    found: dict[str, list[str]] = defaultdict(list)
    for row in sorted(_rows(node, "payment/"), key=lambda row: row.recorded_at):
        if not _counts(row):
            continue
        try:
            body = decode_body(PaymentBody, row.body)
        except Violation:
            continue  # damaged: the list of payments names it
        for agreement in body.agreement_payments:
            found[agreement.agreement_id].append(row.tx_hash)
        for part in body.activity_payments:
            found[part.activity_id].append(row.tx_hash)
            found[of.get(part.activity_id, "")].append(row.tx_hash)
    return found


def _counts(row: PaymentRow) -> bool:
    return not row.instead and (row.role == Party.PAYER or row.state == PaymentState.VERIFIED)


def _documents(node: Node) -> list[PaymentDocumentRow]:
    return [*_rows(node, f"{DocumentKind.DEBIT_NOTE}/"), *_rows(node, f"{DocumentKind.INVOICE}/")]


def _rows(node: Node, prefix: str) -> list[Any]:
    return [row for _, row in node.system.listed("ledger", prefix)[0]]


def in_flight(node: Node, platform: str) -> list[dict[str, Any]]:
    """Return this node's transfers on a platform that are not final: amount, payees, and each signed transaction's nonce,
    state, highest fee and block."""
    found = []
    for _, batch in node.system.listed("wallet", "batch/")[0]:
        if batch.platform != platform or batch.state != "SENDING":
            continue
        story = node.chain.story(platform, batch.batch_id) or {"transactions": []}
        found.append({
            "batchId": batch.batch_id, "amount": amount_text(total_of(payee.amount for payee in batch.payees)),
            "payees": len(batch.payees), "since": timestamp_text(batch.created_at), "reason": batch.reason,
            "transactions": [
                {"nonce": tx["nonce"], "state": tx["state"], "block": tx["block"],
                 "hash": tx["hash"] or (tx["attempts"][0]["hash"] if tx["attempts"] else None),
                 "maxFeeGwei": max((attempt["maxFeeGwei"] for attempt in tx["attempts"]), default=None)}
                for tx in story["transactions"]
            ],
        })  # fmt: skip
    return found
