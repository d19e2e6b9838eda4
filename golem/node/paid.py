"""Payments of an agreement, on either side, and which of them a chain has lost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from actors.ledger.rows import LedgerActivityRow, PaymentRow
from protocol.ledger import PaymentBody, decode_body
from protocol.types import Violation

if TYPE_CHECKING:
    from golem.node.node import Node


def payments_of(node: Node, agreement_id: str, payments: Iterable[PaymentRow]) -> list[PaymentRow]:
    """Return of these payments those that hold a part for an agreement or one of its activities, oldest first."""
    rows = node.system.rows("ledger")

    def belongs(activity_id: str) -> bool:
        activity: LedgerActivityRow | None = rows.get(f"activity/{activity_id}")
        return activity is not None and activity.agreement_id == agreement_id

    found = []
    for row in payments:
        if row.instead:
            continue  # another one tells of the same transfer
        try:
            body = decode_body(PaymentBody, row.body)
        except Violation:
            continue  # damaged: the list of payments names it
        by_agreement = any(part.agreement_id == agreement_id for part in body.agreement_payments)
        if by_agreement or any(belongs(part.activity_id) for part in body.activity_payments):
            found.append(row)
    return sorted(found, key=lambda row: row.recorded_at)


def lost_of(node: Node, payments: Iterable[PaymentRow]) -> dict[str, str]:
    """Return of these payments the transactions whose blocks the chain has lost, and what is done about it."""
    hashes: dict[str, set[str]] = {}
    for row in payments:
        hashes.setdefault(row.platform, set()).add(row.tx_hash)
    served = node.chain.networks.platforms
    return {
        tx_hash: words
        for platform in hashes if platform in served
        for tx_hash, words in node.chain.lost(platform).items() if tx_hash in hashes[platform]
    }  # fmt: skip
