"""The negotiation: proposals and agreements between a demand and an offer.

The market says which demand and offer match; from there the agents of both sides talk, through their nodes, in proposals
(`actors.negotiation.proposals`) and finally about an agreement (`actors.negotiation.agreements`). Whoever deals with
activities and money hears when an agreement is made and when it is over.

Rows: `subscription/<id>` (own offers and demands), `proposal/<id>`, `of/<subscription>/<proposal>` and
`waiting/<offer>/<agreement>` (indexes), `pair/<demand>/<offer>` and `opened/<offer>/<node>` (counts), `agreement/<id>`.
All survive a restart.
Feeds: `demand/<id>` and `offer/<id>` for the agent's polls, `agreements` and `agreement/<id>` for what becomes of agreements.
"""

from __future__ import annotations

from typing import Any

from actors.kernel.draft import Declined, Draft
from actors.kernel.grammar import EDGE, ITSELF, PEER, On, Table, TableMachine
from actors.negotiation import agreements, proposals
from actors.negotiation import recall as agreement_recall
from actors.negotiation.rows import AgreementRow, BelongsRow, OpenedRow, PairRow, ProposalRow, SubscriptionRow, TalkRow
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
    ProposalCountered,
    ProposalOpened,
    ProposalRejected,
    RejectAgreement,
    RejectProposal,
    TerminateAgreement,
)
from protocol.types import Message, PeerLost, Undelivered, Violation, node_of


def _undelivered(draft: Draft, message: Undelivered) -> None:
    """News for a peer that did not arrive; what becomes of those for our own actors is not ours to decide."""
    if node_of(message.to) in ("", draft.me) or "/" not in message.to:
        return
    body = _peer(message.body)
    if isinstance(body, ProposalOpened | ProposalCountered):
        proposals.undelivered(draft, body, message.reason)
    elif not isinstance(body, ProposalRejected):
        agreements.undelivered(draft, body, message.reason)


class Negotiation(TableMachine):
    """The machine `negotiation`."""

    name = "negotiation"
    rows = SubscriptionRow | PairRow | OpenedRow | BelongsRow | TalkRow | ProposalRow | AgreementRow
    table = Table(
        On(SubscriptionOpened, "market", proposals.opened),
        On(SubscriptionEnded, "market", proposals.ended),
        On(Matched, "market", proposals.matched),
        On(CounterProposal, EDGE, proposals.counter),
        On(RejectProposal, EDGE, proposals.reject),
        On(CreateAgreement, EDGE, agreements.create),
        On(ConfirmAgreement, EDGE, agreements.confirm),
        On(CancelAgreement, EDGE, agreements.cancel),
        On(ApproveAgreement, EDGE, agreements.approve),
        On(RejectAgreement, EDGE, agreements.reject),
        On(TerminateAgreement, EDGE, agreements.terminate),
        On(ProposalOpened, PEER, proposals.received_first),
        On(ProposalCountered, PEER, proposals.received),
        On(ProposalRejected, PEER, proposals.rejected),
        On(AgreementProposed, PEER, agreements.proposed),
        On(AgreementApproval, PEER, agreements.approval),
        On(AgreementRejected, PEER, agreements.rejected),
        On(AgreementCommitted, PEER, agreements.committed),
        On(AgreementClosed, PEER, agreements.closed),
        On(AgreementTerminated, PEER, agreements.terminated),
        On(AgreementDue, ITSELF, agreements.due),
        On(ForgetAgreement, ITSELF, agreements.forget),
        On(ForgetProposals, ITSELF, proposals.forget),
        On(Undelivered, ITSELF, _undelivered),
        On(PeerLost, ITSELF, agreement_recall.tell_again),
    )

    def carry_out(self, draft: Draft, message: Message) -> None:
        """Decide. A reason or terms of our own agent that are not in order are declined."""
        try:
            super().carry_out(draft, message)
        except Violation as error:
            if not self.table.entries[type(message)].here:
                raise
            raise Declined("bad_request", str(error)) from None


_peer = Decoder[Any](Negotiation.peer)
