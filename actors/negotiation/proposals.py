"""Proposals: the first half of the machine `negotiation`.

A negotiation is a chain of proposals, each in answer to the last one of the other side. A proposal is committed here
before the agent hears of its id, and the durable link brings it to the peer: what the peer has against it comes back as
a rejection with its reason, and so does the news that the peer cannot be reached.
"""

from __future__ import annotations

from msgspec.structs import replace

from actors.kernel.draft import Declined, Draft
from actors.kernel.machine import DropFeed, Emit, Reply, Send, Wake
from actors.negotiation.room import add, no_room, talk_key
from actors.negotiation.rows import OpenedRow, ProposalRow, SubscriptionRow
from protocol.market import (
    Matched,
    Rematch,
    Subscription,
    SubscriptionEnded,
    SubscriptionOpened,
    canonical,
    read_subscription,
    verify_subscription,
)
from protocol.negotiation import (
    AgreementDue,
    CounterProposal,
    Created,
    ForgetProposals,
    ProposalCountered,
    ProposalEvent,
    ProposalOpened,
    ProposalRejected,
    ProposalRejectedEvent,
    RejectProposal,
    check_constraints,
    check_hash,
    check_reason,
    mismatch_text,
    proposal_id,
    read_properties,
    reason_text,
)
from protocol.states import AgreementState, DocumentKind, ProposalState, Role
from protocol.types import Done, Violation, address, digest, node_of, timestamp_text

DELIVERY_S = 60.0  # how long a proposal may take to the peer before its issuer hears that it did not arrive
LAST_WORD_S = 10.0  # for an agent to answer what it had read before it withdrew its offer
KEEP_ENDED_S = 3600.0  # proposals can be read this long after their subscription
MAX_OPENED_PER_NODE = 500  # negotiations about one offer: nobody uses it up for the others
FORGET_AT_ONCE = 500

IS_FINAL = "golem.proposal.rejection.is-final"  # in a reason: false where a later answer may be another


# -- subscriptions
def opened(draft: Draft, message: SubscriptionOpened) -> None:
    """Remember an offer or demand of ours."""
    key = f"subscription/{message.subscription_id}"
    if not draft.get(key):
        expires = read_subscription(message.document.body).expires
        draft.put(key, SubscriptionRow(message.document, expires))


def ended(draft: Draft, message: SubscriptionEnded) -> None:
    """No proposals any more; wake whoever polls the subscription's events."""
    key = f"subscription/{message.subscription_id}"
    row = draft.get(key)
    if row and not row.ended:
        draft.put(key, replace(row, ended=message.reason))
        draft.do(Emit(f"{row.document.kind}/{message.subscription_id}", message))
        draft.do(Wake(f"forget/{message.subscription_id}", draft.now + KEEP_ENDED_S, ForgetProposals(message.subscription_id)))
        for waiting, _ in draft.prefix(f"waiting/{message.subscription_id}/"):  # agents that withdraw an offer read it no more
            agreement_id = waiting.rpartition("/")[2]
            draft.do(Wake(f"due/{agreement_id}", draft.now + LAST_WORD_S, AgreementDue(agreement_id)))


def forget(draft: Draft, message: ForgetProposals) -> None:
    """Delete a subscription that is long over, and its proposals, in steps of bounded size."""
    subscription_id = message.subscription_id
    row = draft.get(f"subscription/{subscription_id}")
    for count, (key, _) in enumerate(draft.prefix(f"of/{subscription_id}/")):
        if count == FORGET_AT_ONCE:
            draft.do(Wake(f"forget/{subscription_id}", draft.now, ForgetProposals(subscription_id)))
            return
        proposal = draft.get("proposal/" + key.rpartition("/")[2])
        draft.put(key, None)
        if proposal:
            draft.put(f"proposal/{proposal.proposal_id}", None)
            draft.put(f"pair/{proposal.demand_id}/{proposal.offer_id}", None)
            draft.put(f"opened/{subscription_id}/{proposal.requestor}", None)
            if not proposal.previous_id:
                draft.put(talk_key(proposal), None)
    draft.put(f"subscription/{subscription_id}", None)
    if row:
        draft.do(DropFeed(f"{row.document.kind}/{subscription_id}"))


def why_over(draft: Draft, proposal: ProposalRow) -> str:
    """Return why there can be no more proposals in this negotiation, or nothing."""
    row = draft.get(f"subscription/{proposal.own_subscription}")
    if not row:
        return "the subscription is not known any more"
    if row.ended or row.expires <= draft.now:
        return f"the subscription is {row.ended or 'expired'}"
    return "the proposal has expired" if proposal.expires <= draft.now else ""


def _taken(draft: Draft, proposal: ProposalRow) -> bool:
    """Return whether a proposal has an agreement that was or may yet be made; after one that was not, talks may go on."""
    agreement = draft.get(f"agreement/{proposal.agreement_id}") if proposal.agreement_id else None
    if agreement is None or agreement.state in (AgreementState.REJECTED, AgreementState.CANCELLED, AgreementState.EXPIRED):
        return False
    return agreement.state not in (AgreementState.PROPOSAL, AgreementState.PENDING) or bool(agreement.valid_to > draft.now)


def mismatch(proposal: ProposalRow, other: ProposalRow) -> str:
    """Return why two proposals of a negotiation, one of each side, do not match; nothing if they do."""
    demand, offer = (proposal, other) if proposal.issuer == proposal.requestor else (other, proposal)
    return mismatch_text((demand.properties, demand.constraints), (offer.properties, offer.constraints))


def _properties(content: Subscription) -> str:
    return canonical(content.properties).decode()


# -- what the market found
def matched(draft: Draft, message: Matched) -> None:
    """Make the provider's offer the Initial proposal of a negotiation, and show it to the requestor."""
    demand, offer = read_subscription(message.demand.body), read_subscription(message.offer.body)
    initial = ProposalRow(
        proposal_id=digest("initial", Role.REQUESTOR, message.demand_id, message.offer_id, timestamp_text(draft.now)),
        role=Role.REQUESTOR,
        demand_id=message.demand_id,
        offer_id=message.offer_id,
        requestor=draft.me,
        provider=offer.owner,
        issuer=offer.owner,
        state=ProposalState.INITIAL,
        properties=_properties(offer),
        constraints=offer.constraints,
        created=draft.now,
        expires=min(offer.expires, demand.expires),
        origin=message.origin,
    )
    if why_over(draft, initial) or no_room(draft, initial) or draft.get(f"proposal/{initial.proposal_id}"):
        return
    add(draft, initial)
    draft.do(Emit(initial.own_feed, ProposalEvent(initial.proposal_id)))


# -- what our agent says
def _find(draft: Draft, subscription_id: str, wanted_id: str) -> ProposalRow | None:
    proposal = draft.get(f"proposal/{wanted_id}")
    return proposal if proposal and proposal.own_subscription == subscription_id else None


def counter(draft: Draft, message: CounterProposal) -> None:
    """Answer the other side's last proposal; one that we had rejected is thereby open again."""
    previous = _find(draft, message.subscription_id, message.proposal_id)
    if not draft.get(f"subscription/{message.subscription_id}"):
        raise Declined("bad_request", f"Subscription [{message.subscription_id}] not found.")
    if not previous:
        raise Declined("unknown", f"Proposal [{message.proposal_id}] not found for this subscription.")
    label = f"Proposal [{previous.role[0]}-{previous.proposal_id}]"
    if previous.issuer == draft.me:
        raise Declined("bad_request", f"{label} is your own: it cannot be countered.")
    if over := why_over(draft, previous):
        raise Declined("gone", f"{label} cannot be countered: {over}.")
    if previous.answer_id:
        raise Declined("gone", f"{label} was already countered.")
    if _taken(draft, previous):
        raise Declined("bad_request", f"{label} was accepted: it has an agreement.")
    if full := no_room(draft, previous):
        raise Declined("busy", f"{label} cannot be countered: {full}.")
    try:
        read_properties(message.properties)
        check_constraints(message.constraints)
    except Violation as error:
        raise Declined("bad_request", str(error)) from None
    proposal = _answer(previous, draft.me, "", message.properties, message.constraints, draft.now)
    if why := mismatch(proposal, previous):
        prefix = f"Proposal properties [{message.proposal_id}] doesn't match previous Proposal [{previous.proposal_id}]."
        raise Declined("bad_request", f"{prefix} {why}")
    _link(draft, previous, proposal)
    draft.do(Reply(Created(proposal.proposal_id)))
    wire: ProposalOpened | ProposalCountered
    if previous.state == ProposalState.INITIAL or not previous.previous_id:
        demand = draft.get(f"subscription/{previous.demand_id}").document
        wire = ProposalOpened(
            proposal.proposal_id, previous.proposal_id, previous.offer_id, demand,
            message.properties, message.constraints, proposal.created,
        )  # fmt: skip
    else:
        wire = ProposalCountered(
            proposal.proposal_id, previous.proposal_id, message.properties, message.constraints, proposal.created
        )
    deadline_s = max(1.0, min(DELIVERY_S, previous.expires - draft.now))
    draft.do(Send(address(previous.counterpart, "negotiation"), wire, deadline_s))
    return


def _answer(previous: ProposalRow, issuer: str, known_id: str, properties: str, constraints: str, created: float) -> ProposalRow:
    """Return the proposal that answers `previous`. Raises `Violation` if its id is not `known_id` (where one is given)."""
    wire_id = previous.wire_id or previous.proposal_id
    created = round(created, 6)
    new_id = proposal_id(previous.demand_id, previous.offer_id, wire_id, issuer, properties, constraints, created)
    if known_id not in ("", new_id):
        raise Violation("the proposal's id does not name its content")
    return replace(
        previous, proposal_id=new_id, issuer=issuer, state=ProposalState.DRAFT, properties=properties, constraints=constraints,
        created=created, previous_id=previous.proposal_id, answer_id="", agreement_id="", reason="", wire_id="",
    )  # fmt: skip


def _link(draft: Draft, previous: ProposalRow, proposal: ProposalRow) -> None:
    """Write a proposal and that it answers another, which is open again if it was rejected."""
    state = (
        ProposalState.ACCEPTED
        if previous.agreement_id
        else ProposalState.DRAFT
        if previous.previous_id
        else ProposalState.INITIAL
    )
    draft.put(f"proposal/{previous.proposal_id}", replace(previous, answer_id=proposal.proposal_id, state=state, reason=""))
    add(draft, proposal)


def reject(draft: Draft, message: RejectProposal) -> None:
    """Say no to a proposal of the other side; the Initial one only to ourselves, for it is our own node's making."""
    proposal = _find(draft, message.subscription_id, message.proposal_id)
    if not proposal:
        raise Declined("unknown", f"Proposal [{message.proposal_id}] not found for this subscription.")
    label = f"Proposal [{proposal.role[0]}-{proposal.proposal_id}]"
    if proposal.issuer == draft.me:
        raise Declined("bad_request", f"{label} is your own: it cannot be rejected.")
    if proposal.answer_id or proposal.state not in (ProposalState.INITIAL, ProposalState.DRAFT):
        state = "countered" if proposal.answer_id else proposal.state
        raise Declined("bad_request", f"{label} cannot be rejected: it is {state}.")
    reason = check_reason(message.reason)
    draft.put(f"proposal/{proposal.proposal_id}", replace(proposal, state=ProposalState.REJECTED, reason=reason))
    draft.do(Reply(Done()))
    if proposal.state == ProposalState.DRAFT:
        to = address(proposal.counterpart, "negotiation")
        draft.do(Send(to, ProposalRejected(proposal.proposal_id, reason), max(DELIVERY_S, 1.0)))
    return


# -- what the other side says
def received_first(draft: Draft, message: ProposalOpened) -> None:
    """A requestor opens a negotiation about an offer of ours. Raises `Violation`."""
    check_hash(message.proposal_id)
    check_hash(message.initial_id)
    if draft.get(f"proposal/{message.proposal_id}"):
        return None
    row = draft.get(f"subscription/{message.offer_id}")
    if not row or row.document.kind != DocumentKind.OFFER:
        return _send_back(draft, draft.meta.sender, message.proposal_id, "the offer is not known here")
    try:
        demand = verify_subscription(message.demand, DocumentKind.DEMAND, draft.now)
    except Violation as error:
        return _send_back(draft, draft.meta.sender, message.proposal_id, str(error))
    if demand.owner != node_of(draft.meta.sender):
        raise Violation(f"the demand belongs to {demand.owner}, not to who negotiates with it")
    offer = read_subscription(row.document.body)
    _check_terms(message)
    initial = ProposalRow(
        proposal_id=digest("initial", Role.PROVIDER, demand.subscription_id, message.offer_id, message.initial_id),
        role=Role.PROVIDER,
        demand_id=demand.subscription_id,
        offer_id=message.offer_id,
        requestor=demand.owner,
        provider=draft.me,
        issuer=draft.me,
        state=ProposalState.INITIAL,
        properties=_properties(offer),
        constraints=offer.constraints,
        created=draft.now,
        expires=min(offer.expires, demand.expires),
        wire_id=message.initial_id,
        origin=draft.meta.origin,
    )
    proposal = _answer(initial, demand.owner, message.proposal_id, message.properties, message.constraints, message.created)
    if draft.get(f"proposal/{initial.proposal_id}"):
        raise Violation("the proposal was already countered")
    opened_key = f"opened/{message.offer_id}/{demand.owner}"
    count = (draft.get(opened_key) or OpenedRow(0)).negotiations
    full = f"there were {count} negotiations about this offer" if count >= MAX_OPENED_PER_NODE else ""
    why = why_over(draft, initial) or full or no_room(draft, initial) or mismatch(proposal, initial)
    if why:
        return _send_back(draft, draft.meta.sender, message.proposal_id, why)
    draft.put(opened_key, OpenedRow(count + 1))
    add(draft, initial)
    _link(draft, initial, proposal)
    draft.do(Emit(proposal.own_feed, ProposalEvent(proposal.proposal_id)))
    return None


def received(draft: Draft, message: ProposalCountered) -> None:
    """The other side counters our proposal. Raises `Violation`."""
    check_hash(message.proposal_id)
    previous = draft.get(f"proposal/{message.previous_id}")
    if not previous:
        return _send_back(draft, draft.meta.sender, message.proposal_id, "the proposal that it answers is not known here")
    sender = node_of(draft.meta.sender)
    if previous.issuer != draft.me or previous.counterpart != sender or not previous.previous_id:
        raise Violation("only the other side's proposal can be countered")
    if previous.answer_id == message.proposal_id:
        return None
    if previous.answer_id:
        raise Violation("the proposal was already countered")
    _check_terms(message)
    proposal = _answer(previous, sender, message.proposal_id, message.properties, message.constraints, message.created)
    taken = "it was accepted: it has an agreement" if _taken(draft, previous) else ""
    why = taken or why_over(draft, previous) or no_room(draft, previous) or mismatch(proposal, previous)
    if why:
        return _send_back(draft, draft.meta.sender, message.proposal_id, why)
    _link(draft, previous, proposal)
    draft.do(Emit(proposal.own_feed, ProposalEvent(proposal.proposal_id)))
    return None


def _check_terms(message: ProposalOpened | ProposalCountered) -> None:
    read_properties(message.properties)
    check_constraints(message.constraints)
    if not 0 <= message.created < 1e11:
        raise Violation("the time of the proposal is not in seconds since the epoch")


def _send_back(draft: Draft, to: str, rejected_id: str, why: str) -> None:
    """Reject a proposal that we do not even keep."""
    draft.do(Send(to, ProposalRejected(rejected_id, reason_text(f"Proposal not taken: {why}.")), DELIVERY_S))


def rejected(draft: Draft, message: ProposalRejected) -> None:
    """The other side says no to a proposal of ours. Raises `Violation`."""
    proposal = draft.get(f"proposal/{message.proposal_id}")
    if not proposal:
        return
    if proposal.issuer != draft.me or proposal.counterpart != node_of(draft.meta.sender):
        raise Violation("only the other side's proposal can be rejected")
    _mark_rejected(draft, proposal, check_reason(message.reason))


def undelivered(draft: Draft, message: ProposalOpened | ProposalCountered, why: str) -> None:
    """A proposal of ours did not arrive; its issuer hears of it as of a rejection that is not final.

    A requestor gets a fresh Initial proposal as well, while demand and offer live: the provider may come back.
    """
    proposal = draft.get(f"proposal/{message.proposal_id}")
    if proposal and proposal.state == ProposalState.DRAFT and not proposal.answer_id:
        other = Role.PROVIDER if proposal.role == Role.REQUESTOR else Role.REQUESTOR
        text = f"{other} {proposal.counterpart} could not be reached: {why}"
        _mark_rejected(draft, proposal, reason_text(text, **{IS_FINAL: False}))
        if proposal.role == Role.REQUESTOR:
            draft.do(Send("market", Rematch(proposal.demand_id, proposal.offer_id)))


def _mark_rejected(draft: Draft, proposal: ProposalRow, reason: str) -> None:
    if proposal.state == ProposalState.DRAFT and not proposal.answer_id and not proposal.agreement_id:
        draft.put(f"proposal/{proposal.proposal_id}", replace(proposal, state=ProposalState.REJECTED, reason=reason))
        draft.do(Emit(proposal.own_feed, ProposalRejectedEvent(proposal.proposal_id, reason)))
