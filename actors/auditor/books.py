"""The rows that an audit reads, and the books of two nodes held against each other."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from actors.auditor.report import Finding
from actors.ledger.rows import (
    AllocationRow,
    HasPrefix,
    LedgerActivityRow,
    LedgerAgreementRow,
    OrderRow,
    OwedRow,
    PaymentDocumentRow,
    PaymentRow,
    TxClaimsRow,
)
from actors.wallet.rows import PayBatchRow, PayOrderRow
from protocol.states import DocumentKind, DocumentStatus, Party

OWED = (DocumentStatus.ACCEPTED, DocumentStatus.SETTLED)
OPEN = (DocumentStatus.ISSUED, DocumentStatus.RECEIVED)


def contradictions(payer: HasPrefix, payee: HasPrefix) -> list[Finding]:
    """Hold the ledgers of two nodes against each other: what one says to owe, the other is owed.

    The payer is first with each acceptance and each payment, so the payee may lag behind, and never lead. Not for nodes
    whose disks went back in time.
    """
    found = []
    theirs = {key: row for key, row in documents_of(payee) if row.role == Party.PAYEE}
    for key, ours in documents_of(payer):
        other = theirs.get(key)
        if ours.role != Party.PAYER or other is None:
            continue
        if (other.body, other.amount) != (ours.body, ours.amount):
            found.append(Finding(name_of(ours), f"is of {ours.amount} at its payer and of {other.amount} at its payee"))
        if _rank(other) > _rank(ours):
            found.append(Finding(name_of(ours), f"is {other.status} at its payee and {ours.status} at its payer"))
    sums = {key: row for key, row in payee.prefix("agreement/") if row.role == Party.PAYEE}
    for key, row in payer.prefix("agreement/"):
        other = sums.get(key)
        if row.role != Party.PAYER or other is None:
            continue
        for what in ("accepted", "paid"):
            if Decimal(getattr(other, what)) > Decimal(getattr(row, what)):
                words = f"its payee has {getattr(other, what)} as {what}, its payer {getattr(row, what)}"
                found.append(Finding(f"agreement {row.agreement_id}", words))
    return found


def _rank(row: PaymentDocumentRow) -> int:
    return OWED.index(row.status) + 1 if row.status in OWED else 0


def name_of(row: PaymentDocumentRow | OrderRow) -> str:
    return f"{row.kind} {row.document_id}"


def documents_of(rows: HasPrefix) -> Iterator[tuple[str, PaymentDocumentRow]]:
    for kind in DocumentKind.DEBIT_NOTE, DocumentKind.INVOICE:
        for _, row in rows.prefix(f"{kind}/"):
            yield f"{row.kind}:{row.document_id}", row


class Books:
    """The rows, by what they are about."""

    def __init__(self, ledger: HasPrefix, wallet: HasPrefix) -> None:
        def named(rows: HasPrefix, prefix: str) -> dict[str, Any]:
            return {key.removeprefix(prefix): row for key, row in rows.prefix(prefix)}

        self.documents = dict(documents_of(ledger))
        self.agreements: dict[str, LedgerAgreementRow] = named(ledger, "agreement/")
        self.activities: dict[str, LedgerActivityRow] = named(ledger, "activity/")
        self.allocations: dict[str, AllocationRow] = named(ledger, "allocation/")
        self.orders: dict[str, OrderRow] = named(ledger, "order/")
        self.payments: dict[str, PaymentRow] = named(ledger, "payment/")
        self.claims: dict[str, TxClaimsRow] = named(ledger, "tx/")
        self.owed: dict[str, OwedRow] = named(ledger, "owed/")
        self.open = set(named(ledger, "open/"))
        self.ordered = set(named(ledger, "ordered/"))
        self.pay_orders: dict[str, PayOrderRow] = named(wallet, "order/")
        self.batches: dict[str, PayBatchRow] = named(wallet, "batch/")
        self.queue = set(named(wallet, "queue/"))
