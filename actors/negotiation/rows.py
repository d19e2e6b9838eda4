"""Subscriptions, proposals and agreements as rows, and the state of an agreement at a given time. Edges read them, too."""

from __future__ import annotations

from protocol.signing import Document
from protocol.states import AgreementState, ProposalState, Role
from protocol.types import Message

OPEN = (AgreementState.PROPOSAL, AgreementState.PENDING, AgreementState.APPROVING)


class SubscriptionRow(Message, frozen=True, tag="subscription"):
    """An offer or demand of ours. `ended` says why it is over, or nothing."""

    document: Document
    expires: float
    proposals: int = 0
    ended: str = ""


class PairRow(Message, frozen=True, tag="pair"):
    """How much a demand and an offer have negotiated."""

    proposals: int


class OpenedRow(Message, frozen=True, tag="opened"):
    """How many negotiations a node has opened about an offer of ours."""

    negotiations: int


class BelongsRow(Message, frozen=True, tag="belongs"):
    """Index: a proposal of a subscription (`of/`), an agreement that waits for the agent of its offer (`waiting/`)."""


class TalkRow(Message, frozen=True, tag="talk"):
    """Index `talk/<subscription>/<node>/<since>/<its first proposal>`: a negotiation, and how many proposals it has."""

    proposals: int
    origin: str = ""


class ProposalRow(Message, frozen=True, tag="proposal"):
    """A proposal as this node sees it. `previous_id` is the one it answers, `answer_id` the one that answers it."""

    proposal_id: str
    role: Role  # ours
    demand_id: str
    offer_id: str
    requestor: str
    provider: str
    issuer: str
    state: ProposalState
    properties: str
    constraints: str
    created: float
    expires: float
    previous_id: str = ""
    answer_id: str = ""
    agreement_id: str = ""
    reason: str = ""  # of its rejection
    wire_id: str = ""  # an Initial proposal's id on the requestor's node
    origin: str = ""  # the network address by which the other side opened the negotiation

    @property
    def own_feed(self) -> str:
        """The feed of our own subscription."""
        return f"demand/{self.demand_id}" if self.role == Role.REQUESTOR else f"offer/{self.offer_id}"

    @property
    def own_subscription(self) -> str:
        return self.demand_id if self.role == Role.REQUESTOR else self.offer_id

    @property
    def counterpart(self) -> str:
        """The node on the other side."""
        return self.provider if self.role == Role.REQUESTOR else self.requestor


class AgreementRow(Message, frozen=True, tag="agreement"):
    """An agreement as this node sees it. `body` is what both sign; signatures are hex, "" as long as there is none."""

    agreement_id: str
    role: Role  # ours
    requestor: str
    provider: str
    proposal_id: str
    demand_id: str
    offer_id: str
    body: bytes
    state: AgreementState
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
        return self.provider if self.role == Role.REQUESTOR else self.requestor


def lapsed(agreement: AgreementRow, now: float) -> bool:
    """Return whether the agreement's time is over, whatever its row says."""
    return agreement.state in OPEN and ends_at(agreement) <= now


def ends_at(agreement: AgreementRow) -> float:
    """Return when an open agreement ends by itself: at `validTo`, or with the provider's approval."""
    return agreement.approval_until if agreement.state == AgreementState.APPROVING else agreement.valid_to


def state_at(agreement: AgreementRow, now: float) -> str:
    """Return the state that an agent is shown: the end of the time is seen at once, `Approving` as `Pending`."""
    state = agreement.state
    if lapsed(agreement, now):
        return AgreementState.REJECTED if state == AgreementState.APPROVING else AgreementState.EXPIRED
    return AgreementState.PENDING if state == AgreementState.APPROVING else state


def state_error(agreement: AgreementRow, new: str, now: float) -> str:
    """Return the text that agents know for a step that the state does not allow."""
    state = agreement.state if not lapsed(agreement, now) else state_at(agreement, now)
    return f"Agreement [{agreement.agreement_id}]. Error: Can't update Agreement state from {state} to {new}."
