"""The room that a subscription has for proposals.

A subscription has room for `MAX_PROPOSALS`. When it is full, the oldest negotiation of the node that has most of them is
forgotten, unless there is an agreement; once no node stands out, of the network address that has most, whatever the nodes.
Who comes with many identities pushes out himself first, and closes nothing.
"""

from __future__ import annotations

from msgspec.structs import replace

from actors.kernel.crowd import Occupant, by_crowd
from actors.kernel.draft import Draft
from actors.negotiation.rows import BelongsRow, OpenedRow, PairRow, ProposalRow, TalkRow

MAX_PROPOSALS_PER_PAIR = 100
MAX_PROPOSALS = 20_000  # of one subscription
ROOM_AT_ONCE = 60  # proposals that are forgotten together where there is no room
STANDS_OUT = MAX_PROPOSALS_PER_PAIR  # proposals of a node


def no_room(draft: Draft, proposal: ProposalRow) -> str:
    """Return which limit a further proposal would break, or nothing."""
    pair = draft.get(f"pair/{proposal.demand_id}/{proposal.offer_id}")
    if pair and pair.proposals >= MAX_PROPOSALS_PER_PAIR:
        return f"this demand and this offer have had {MAX_PROPOSALS_PER_PAIR} proposals, and no more are taken"
    row = draft.get(f"subscription/{proposal.own_subscription}")
    if row and row.proposals >= MAX_PROPOSALS and not _make_room(draft, proposal):
        return f"the subscription has {MAX_PROPOSALS} proposals with agreements, and no more are taken"
    return ""


def _first(draft: Draft, proposal: ProposalRow) -> ProposalRow:
    """Return the Initial proposal of a negotiation."""
    while proposal.previous_id and (previous := draft.get(f"proposal/{proposal.previous_id}")) is not None:
        proposal = previous
    return proposal


def talk_key(first: ProposalRow) -> str:
    """Return the key of the index entry of a negotiation, by its Initial proposal."""
    return f"talk/{first.own_subscription}/{first.counterpart}/{first.created * 1000:015.0f}/{first.proposal_id}"


def _make_room(draft: Draft, besides: ProposalRow) -> bool:
    """Forget the oldest negotiations of who has most proposals of a subscription; return whether any was.

    One with an agreement stays, and that of `besides`.
    """
    subscription_id, own, freed = besides.own_subscription, talk_key(_first(draft, besides)), 0
    talks = ((key, key.split("/"), row) for key, row in draft.prefix(f"talk/{subscription_id}/") if key != own)
    entries = (Occupant(float(part[3]), key, part[2], row.origin, row.proposals) for key, part, row in talks)
    for entry in by_crowd(entries, STANDS_OUT):
        freed += _forget_talk(draft, entry.key)
        if freed >= ROOM_AT_ONCE:
            break
    row = draft.get(f"subscription/{subscription_id}")
    draft.put(f"subscription/{subscription_id}", replace(row, proposals=max(0, row.proposals - freed)))
    return freed > 0


def _forget_talk(draft: Draft, key: str) -> int:
    """Forget a negotiation and return how many proposals it had; 0 where it has an agreement and stays."""
    chain: list[ProposalRow] = []
    following = key.rpartition("/")[2]
    while following and (proposal := draft.get(f"proposal/{following}")) is not None:
        if proposal.agreement_id:
            return 0
        chain.append(proposal)
        following = proposal.answer_id
    draft.put(key, None)
    for proposal in chain:
        draft.put(f"proposal/{proposal.proposal_id}", None)
        draft.put(f"of/{proposal.own_subscription}/{proposal.proposal_id}", None)
    for proposal in chain[:1]:
        pair_key = f"pair/{proposal.demand_id}/{proposal.offer_id}"
        left = (draft.get(pair_key) or PairRow(0)).proposals - len(chain)
        draft.put(pair_key, PairRow(left) if left > 0 else None)
        opened_key = f"opened/{proposal.offer_id}/{proposal.requestor}"
        opened = draft.get(opened_key)
        if opened is not None:
            draft.put(opened_key, OpenedRow(opened.negotiations - 1) if opened.negotiations > 1 else None)
    return len(chain)


def add(draft: Draft, proposal: ProposalRow) -> None:
    """Write a new proposal, and count it."""
    draft.put(f"proposal/{proposal.proposal_id}", proposal)
    draft.put(f"of/{proposal.own_subscription}/{proposal.proposal_id}", BelongsRow())
    pair_key, row_key = f"pair/{proposal.demand_id}/{proposal.offer_id}", f"subscription/{proposal.own_subscription}"
    pair, row = draft.get(pair_key) or PairRow(0), draft.get(row_key)
    draft.put(pair_key, PairRow(pair.proposals + 1))
    draft.put(row_key, replace(row, proposals=row.proposals + 1))
    key = talk_key(_first(draft, proposal))
    talk = draft.get(key) or TalkRow(0, proposal.origin)
    draft.put(key, TalkRow(talk.proposals + 1, talk.origin))
