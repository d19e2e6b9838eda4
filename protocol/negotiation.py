"""What is said about proposals and agreements. Handled by `actors/negotiation.py`."""

from __future__ import annotations

from protocol.types import Message


# -- to other actors of the node
class AgreementApproved(Message, frozen=True):
    """negotiation -> activity, ledger: both sides have committed to an agreement."""

    agreement_id: str
    role: str  # "Requestor" | "Provider": ours
    requestor: str  # node id
    provider: str  # node id
    demand_properties: str  # JSON, flat
    offer_properties: str  # JSON, flat
    approved_at: float
    app_session_id: str | None


class AgreementEnded(Message, frozen=True):
    """negotiation -> activity, ledger: an approved agreement was terminated."""

    agreement_id: str
    terminator: str  # "Requestor" | "Provider"
    reason: str  # JSON of the Reason, "" if none was given
