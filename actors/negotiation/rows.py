"""Agreements as rows, and what state an agreement is in at a given time. The market API reads them, too."""

from __future__ import annotations

from protocol.negotiation import REQUESTOR
from protocol.types import Message

PROPOSAL, PENDING, APPROVING, APPROVED = "Proposal", "Pending", "Approving", "Approved"
CANCELLED, REJECTED, EXPIRED, TERMINATED = "Cancelled", "Rejected", "Expired", "Terminated"
OPEN = (PROPOSAL, PENDING, APPROVING)


class AgreementRow(Message, frozen=True, tag="agreement"):
    """An agreement as this node sees it. `body` is what both sign; signatures are hex, "" as long as there is none."""

    agreement_id: str
    role: str  # ours
    requestor: str
    provider: str
    proposal_id: str
    demand_id: str
    offer_id: str
    body: bytes
    state: str
    created: float
    valid_to: float
    approved_at: float | None = None
    app_session_id: str | None = None
    proposed_signature: str = ""
    approved_signature: str = ""
    committed_signature: str = ""
    terminator: str = ""
    reason: str = ""
    ended_at: float | None = None
    approval_until: float = 0.0  # a provider's approval that is not committed by then is withdrawn

    @property
    def counterpart(self) -> str:
        """The node on the other side."""
        return self.provider if self.role == REQUESTOR else self.requestor


def lapsed(agreement: AgreementRow, now: float) -> bool:
    """Return whether the agreement's time is over, whatever its row says."""
    return agreement.state in OPEN and ends_at(agreement) <= now


def ends_at(agreement: AgreementRow) -> float:
    """Return when an open agreement ends by itself: at `validTo`, or with the provider's approval."""
    return agreement.approval_until if agreement.state == APPROVING else agreement.valid_to


def state_at(agreement: AgreementRow, now: float) -> str:
    """Return the state that an agent is shown: the end of the time is seen at once, `Approving` as `Pending`."""
    state = agreement.state
    if lapsed(agreement, now):
        return REJECTED if state == APPROVING else EXPIRED
    return PENDING if state == APPROVING else state


def state_error(agreement: AgreementRow, new: str, now: float) -> str:
    """Return the text that agents know for a step that the state does not allow."""
    state = agreement.state if not lapsed(agreement, now) else state_at(agreement, now)
    return f"Agreement [{agreement.agreement_id}]. Error: Can't update Agreement state from {state} to {new}."
