"""What becomes of agreements when a disk went back in time: each side says its last word on them again.

Whoever knows it passes over it. A provider gets its own approval back. An agreement that one side does not know at all is
not made anew: a requestor says so, which ends it; a provider turns its activities down, and the requestor's agent ends it.
"""

from __future__ import annotations

from actors.kernel.draft import Draft
from actors.negotiation.moves import tell_peer
from actors.negotiation.rows import AgreementRow
from protocol.negotiation import (
    AgreementApproval,
    AgreementClosed,
    AgreementCommitted,
    AgreementProposed,
    AgreementRejected,
    AgreementTerminated,
    reason_text,
)
from protocol.signing import Document
from protocol.states import AgreementState, DocumentKind, Role
from protocol.types import Message, PeerLost, node_of

OVER = reason_text("The agreement is over.")
TOLD_BACK_S = 60 * 24 * 3600.0  # as in `actors/ledger/recall.py`


def tell_again(draft: Draft, message: PeerLost) -> None:
    """Repeat our last word on every agreement with a node that is open, or was not long ago."""
    peer = node_of(message.to)
    for _, agreement in list(draft.readable("agreement/")):
        if agreement.counterpart == peer and (agreement.ended_at is None or agreement.ended_at > draft.now - TOLD_BACK_S):
            word = _last_word(agreement)
            if word is not None:
                tell_peer(draft, agreement, word, 24 * 3600.0)


def _last_word(agreement: AgreementRow) -> Message | None:
    agreement_id, requests = agreement.agreement_id, agreement.role == Role.REQUESTOR
    state, reason = agreement.state, agreement.reason
    if state == AgreementState.PENDING and requests:
        return AgreementProposed(Document(DocumentKind.AGREEMENT, agreement.body, bytes.fromhex(agreement.proposed_signature)))
    if state in (AgreementState.APPROVING, AgreementState.APPROVED) and agreement.approved_signature:
        approval = Document(DocumentKind.APPROVAL, agreement.body, bytes.fromhex(agreement.approved_signature))
        if requests:
            return AgreementCommitted(agreement_id, agreement.approved_at or agreement.created, approval)
        return AgreementApproval(agreement_id, approval)
    if state in (AgreementState.CANCELLED, AgreementState.EXPIRED, AgreementState.REJECTED) and agreement.proposed_signature:
        return AgreementClosed(agreement_id, state, reason) if requests else AgreementRejected(agreement_id, reason or OVER)
    if state == AgreementState.TERMINATED:
        return AgreementTerminated(agreement_id, agreement.role, reason or OVER)
    return None
