"""Sums of the ledger's rows for the payment status: reserved, owed by us, owed to us."""

from __future__ import annotations

from collections import defaultdict
from decimal import Decimal
from typing import Any

from actors.ledger.rows import HasPrefix, LedgerAgreementRow, reserved
from protocol.amounts import total_of
from protocol.states import DocumentKind, Party
from protocol.types import amount_text


def totals(rows: HasPrefix, platform: str) -> dict[str, Any]:
    """`{"reserved": "1.5", "outgoing": {stage: {"totalAmount", "agreementsCount"}}, "incoming": ...}` of one platform.

    Stages: requested (billed), accepted (owed), confirmed (paid, final on chain). Amounts in GLM.
    """
    billed: dict[str, Decimal] = defaultdict(Decimal)
    for _, activity in rows.prefix("activity/"):
        billed[activity.agreement_id] += Decimal(activity.due)
    invoices = {row.document_id: Decimal(row.amount) for _, row in rows.prefix(f"{DocumentKind.INVOICE}/")}
    agreements = [row for _, row in rows.prefix("agreement/") if row.platform == platform]

    def stages(role: str) -> dict[str, Any]:
        ours = [row for row in agreements if row.role == role]
        return {
            "requested": _sum([max(billed[r.agreement_id], invoices.get(r.invoice_id, Decimal(0))) for r in ours]),
            "accepted": _sum([Decimal(row.accepted) for row in ours]),
            "confirmed": _sum([_paid(row) for row in ours]),
        }

    return {"reserved": amount_text(reserved(rows, platform)), "outgoing": stages(Party.PAYER), "incoming": stages(Party.PAYEE)}


def _paid(agreement: LedgerAgreementRow) -> Decimal:
    return Decimal(agreement.paid)


def _sum(amounts: list[Decimal]) -> dict[str, Any]:
    return {"totalAmount": amount_text(total_of(amounts)), "agreementsCount": sum(1 for amount in amounts if amount)}
