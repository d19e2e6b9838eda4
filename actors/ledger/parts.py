"""Parts of a payment: what it pays by agreement and by activity, and which of these this node knows."""

from __future__ import annotations

from collections.abc import Collection

from msgspec.structs import replace

from actors.kernel.draft import Draft
from actors.ledger.rows import LedgerActivityRow, LedgerAgreementRow
from protocol.ledger import PaymentBody
from protocol.states import Party


def known_parts(draft: Draft, body: PaymentBody, role: Party, peer: str) -> tuple[PaymentBody, tuple[str, ...]]:
    """Return a payment without the parts of what this node does not know, and what these are for."""

    def is_known(agreement_id: str) -> bool:
        row = draft.row(LedgerAgreementRow, f"agreement/{agreement_id}")
        return row is not None and (row.role, row.peer) == (role, peer)

    unknown = [part.agreement_id for part in body.agreement_payments if not is_known(part.agreement_id)]
    for part in body.activity_payments:
        activity = draft.row(LedgerActivityRow, f"activity/{part.activity_id}")
        if activity is None or not is_known(activity.agreement_id):
            unknown.append(part.activity_id)
    return part_of(body, [each for each in ids_of(body) if each not in unknown]), tuple(unknown)


def ids_of(body: PaymentBody) -> list[str]:
    """Return the agreements and activities that a payment names."""
    return [part.agreement_id for part in body.agreement_payments] + [part.activity_id for part in body.activity_payments]


def part_of(body: PaymentBody, ids: Collection[str]) -> PaymentBody:
    """Return a payment with no more than its parts for these agreements and activities."""
    return replace(
        body,
        agreement_payments=tuple(part for part in body.agreement_payments if part.agreement_id in ids),
        activity_payments=tuple(part for part in body.activity_payments if part.activity_id in ids),
    )
