"""The negotiation: proposals and agreements between a demand and an offer.

The market says which demand and offer match; from there the agents of both sides talk, through their nodes, in proposals
(`actors.negotiation.proposals`) and finally about an agreement (`actors.negotiation.agreements`). Whoever deals with
activities and money hears when an agreement is made and when it is over.

Rows: `subscription/<id>` (own offers and demands), `proposal/<id>`, `of/<subscription>/<proposal>` (index),
`pair/<demand>/<offer>` and `opened/<offer>/<node>` (counts), `agreement/<id>`. All survive a restart.
Feeds: `demand/<id>` and `offer/<id>` for the agent's polls, `agreements` and `agreement/<id>` for what becomes of agreements.
"""

from __future__ import annotations

from actors.kernel.draft import Draft
from actors.kernel.machine import Meta, Reply, Rows, Step
from actors.kernel.sources import EDGE, check_source
from actors.negotiation import agreements, proposals
from actors.negotiation import recall as agreement_recall
from actors.negotiation.rows import Agreement
from protocol.codec import Decoder
from protocol.market import Matched, SubscriptionEnded, SubscriptionOpened
from protocol.negotiation import (
    AgreementApproval,
    AgreementClosed,
    AgreementCommitted,
    AgreementDue,
    AgreementProposed,
    AgreementRejected,
    AgreementTerminated,
    ApproveAgreement,
    CancelAgreement,
    ConfirmAgreement,
    CounterProposal,
    CreateAgreement,
    ForgetAgreement,
    ForgetProposals,
    LocalNegotiation,
    PeerNegotiation,
    ProposalCountered,
    ProposalOpened,
    ProposalRejected,
    RejectAgreement,
    RejectProposal,
    TerminateAgreement,
)
from protocol.types import PeerLost, Refused, Undelivered, Violation, node_of

_peer = Decoder[PeerNegotiation](PeerNegotiation)

#: Who alone on this node may say what; the rest is said by negotiations of other nodes.
_SOURCES: dict[type, str] = {
    **dict.fromkeys((CounterProposal, RejectProposal, CreateAgreement, ConfirmAgreement, CancelAgreement), EDGE),
    **dict.fromkeys((ApproveAgreement, RejectAgreement, TerminateAgreement), EDGE),
    **dict.fromkeys((Matched, SubscriptionOpened, SubscriptionEnded), "market"),
    **dict.fromkeys((AgreementDue, ForgetAgreement, ForgetProposals, Undelivered, PeerLost), "negotiation"),
}


class Negotiation:
    """The machine `negotiation`. `node_id` is ours."""

    name = "negotiation"
    local = LocalNegotiation
    peer = PeerNegotiation
    rows = (
        proposals.SubscriptionRow
        | proposals.Pair
        | proposals.Opened
        | proposals.Belongs
        | proposals.Talk
        | proposals.Proposal
        | Agreement
    )
    sources = _SOURCES

    def __init__(self, node_id: str) -> None:
        self.node = node_id

    def handle(self, rows: Rows, message: LocalNegotiation | PeerNegotiation, meta: Meta) -> Step:
        """Decide. Raises `Violation`."""
        check_source(message, meta, self.node, self.name, self.sources)
        draft = Draft(rows)
        if isinstance(message, PeerNegotiation):
            self._from_peer(draft, message, meta)
            return draft.step()
        try:
            self._from_here(draft, message, meta.now)
        except Violation as error:  # a reason or terms of our own agent that are not in order
            return Step(effects=(Reply(Refused("bad_request", str(error))),))
        return draft.step()

    def _from_here(self, draft: Draft, message: LocalNegotiation, now: float) -> None:
        match message:
            case SubscriptionOpened():
                proposals.opened(draft, message)
            case SubscriptionEnded():
                proposals.ended(draft, message, now)
            case Matched():
                proposals.matched(draft, self.node, message, now)
            case CounterProposal():
                proposals.counter(draft, self.node, message, now)
            case RejectProposal():
                proposals.reject(draft, self.node, message)
            case CreateAgreement():
                agreements.create(draft, self.node, message, now)
            case ConfirmAgreement():
                agreements.confirm(draft, self.node, message, now)
            case CancelAgreement():
                agreements.cancel(draft, message, now)
            case ApproveAgreement():
                agreements.approve(draft, self.node, message, now)
            case RejectAgreement():
                agreements.reject(draft, message, now)
            case TerminateAgreement():
                agreements.terminate(draft, message, now)
            case AgreementDue():
                agreements.due(draft, message, now)
            case ForgetAgreement():
                agreements.forget(draft, message)
            case ForgetProposals(subscription_id):
                proposals.forget(draft, subscription_id, now)
            case Undelivered():
                self._undelivered(draft, message, now)
            case PeerLost(to):
                agreement_recall.tell_again(draft, node_of(to), now)

    def _from_peer(self, draft: Draft, message: PeerNegotiation, meta: Meta) -> None:
        match message:
            case ProposalOpened():
                proposals.received_first(draft, self.node, message, meta)
            case ProposalCountered():
                proposals.received(draft, self.node, message, meta)
            case ProposalRejected():
                proposals.rejected(draft, self.node, message, meta)
            case AgreementProposed():
                agreements.proposed(draft, self.node, message, meta)
            case AgreementApproval():
                agreements.approval(draft, message, meta)
            case AgreementRejected():
                agreements.rejected(draft, message, meta)
            case AgreementCommitted():
                agreements.committed(draft, message, meta)
            case AgreementClosed():
                agreements.closed(draft, message, meta)
            case AgreementTerminated():
                agreements.terminated(draft, message, meta)

    def _undelivered(self, draft: Draft, message: Undelivered, now: float) -> None:
        """News for a peer that did not arrive; what becomes of those for our own actors is not ours to decide."""
        if node_of(message.to) in ("", self.node) or "/" not in message.to:
            return
        body: PeerNegotiation = _peer(message.body)
        if isinstance(body, ProposalOpened | ProposalCountered):
            proposals.undelivered(draft, body, message.reason)
        elif not isinstance(body, ProposalRejected):
            agreements.undelivered(draft, body, message.reason, now)
