"""Proposals: the first half of the machine `negotiation`.

A negotiation is a chain of proposals, each in answer to the last one of the other side. A proposal is committed here
before the agent hears of its id, and the durable link brings it to the peer: what the peer has against it comes back as
a rejection with its reason, and so does the news that the peer cannot be reached.

A subscription has room for `MAX_PROPOSALS`. When it is full, the oldest negotiation of the node that has most of them is
forgotten, unless there is an agreement; once no node stands out, of the network address that has most, whatever the nodes.
Who comes with many identities pushes out himself first, and closes nothing.
"""

from __future__ import annotations

from msgspec.structs import replace

from actors.kernel.crowd import Occupant, by_crowd
from actors.kernel.draft import Declined, Draft
from actors.kernel.machine import DropFeed, Emit, Reply, Send, Wake
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
    PROVIDER,
    REQUESTOR,
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
from protocol.signing import Document
from protocol.types import Done, Message, Violation, address, digest, node_of, timestamp_text

DELIVERY_S = 60.0  # how long a proposal may take to the peer before its issuer hears that it did not arrive
LAST_WORD_S = 10.0  # for an agent to answer what it had read before it withdrew its offer
KEEP_ENDED_S = 3600.0  # proposals can be read this long after their subscription
MAX_PROPOSALS_PER_PAIR = 100
MAX_PROPOSALS = 20_000  # of one subscription
MAX_OPENED_PER_NODE = 500  # negotiations about one offer: nobody uses it up for the others
FORGET_AT_ONCE = 500
ROOM_AT_ONCE = 60  # proposals that are forgotten together where there is no room
STANDS_OUT = MAX_PROPOSALS_PER_PAIR  # proposals of a node

IS_FINAL = "golem.proposal.rejection.is-final"  # in a reason: false where a later answer may be another
INITIAL, DRAFT, REJECTED, ACCEPTED = "Initial", "Draft", "Rejected", "Accepted"


class SubscriptionRow(Message, frozen=True, tag="subscription"):
    """An offer or demand of ours. `ended` says why it is over, or nothing."""

    document: Document
    expires: float
    proposals: int = 0
    ended: str = ""


class Pair(Message, frozen=True, tag="pair"):
    """How much a demand and an offer have negotiated."""

    proposals: int


class Opened(Message, frozen=True, tag="opened"):
    """How many negotiations a node has opened about an offer of ours."""

    negotiations: int


class Belongs(Message, frozen=True, tag="belongs"):
    """Index: a proposal of a subscription (`of/`), an agreement that waits for the agent of its offer (`waiting/`)."""


class Talk(Message, frozen=True, tag="talk"):
    """Index `talk/<subscription>/<node>/<since>/<its first proposal>`: a negotiation, and how many proposals it has."""

    proposals: int
    origin: str = ""


class Proposal(Message, frozen=True, tag="proposal"):
    """A proposal as this node sees it. `previous_id` is the one it answers, `answer_id` the one that answers it."""

    proposal_id: str
    role: str  # ours
    demand_id: str
    offer_id: str
    requestor: str
    provider: str
    issuer: str
    state: str
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
        return f"demand/{self.demand_id}" if self.role == REQUESTOR else f"offer/{self.offer_id}"

    @property
    def own_subscription(self) -> str:
        return self.demand_id if self.role == REQUESTOR else self.offer_id

    @property
    def counterpart(self) -> str:
        """The node on the other side."""
        return self.provider if self.role == REQUESTOR else self.requestor


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
                draft.put(_talk_key(proposal), None)
    draft.put(f"subscription/{subscription_id}", None)
    if row:
        draft.do(DropFeed(f"{row.document.kind}/{subscription_id}"))


def why_over(draft: Draft, proposal: Proposal) -> str:
    """Return why there can be no more proposals in this negotiation, or nothing."""
    row = draft.get(f"subscription/{proposal.own_subscription}")
    if not row:
        return "the subscription is not known any more"
    if row.ended or row.expires <= draft.now:
        return f"the subscription is {row.ended or 'expired'}"
    return "the proposal has expired" if proposal.expires <= draft.now else ""


def _no_room(draft: Draft, proposal: Proposal) -> str:
    """Return which limit a further proposal would break, or nothing."""
    pair = draft.get(f"pair/{proposal.demand_id}/{proposal.offer_id}")
    if pair and pair.proposals >= MAX_PROPOSALS_PER_PAIR:
        return f"this demand and this offer have had {MAX_PROPOSALS_PER_PAIR} proposals, and no more are taken"
    row = draft.get(f"subscription/{proposal.own_subscription}")
    if row and row.proposals >= MAX_PROPOSALS and not _make_room(draft, proposal):
        return f"the subscription has {MAX_PROPOSALS} proposals with agreements, and no more are taken"
    return ""


def _first(draft: Draft, proposal: Proposal) -> Proposal:
    """Return the Initial proposal of a negotiation."""
    while proposal.previous_id and (previous := draft.get(f"proposal/{proposal.previous_id}")) is not None:
        proposal = previous
    return proposal


def _talk_key(first: Proposal) -> str:
    return f"talk/{first.own_subscription}/{first.counterpart}/{first.created * 1000:015.0f}/{first.proposal_id}"


def _make_room(draft: Draft, besides: Proposal) -> bool:
    """Forget the oldest negotiations of who has most proposals of a subscription; return whether any was.

    One with an agreement stays, and that of `besides`.
    """
    subscription_id, own, freed = besides.own_subscription, _talk_key(_first(draft, besides)), 0
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
    chain: list[Proposal] = []
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
        left = (draft.get(pair_key) or Pair(0)).proposals - len(chain)
        draft.put(pair_key, Pair(left) if left > 0 else None)
        opened_key = f"opened/{proposal.offer_id}/{proposal.requestor}"
        opened = draft.get(opened_key)
        if opened is not None:
            draft.put(opened_key, Opened(opened.negotiations - 1) if opened.negotiations > 1 else None)
    return len(chain)


def _taken(draft: Draft, proposal: Proposal) -> bool:
    """Return whether a proposal has an agreement that was or may yet be made; after one that was not, talks may go on."""
    agreement = draft.get(f"agreement/{proposal.agreement_id}") if proposal.agreement_id else None
    if agreement is None or agreement.state in ("Rejected", "Cancelled", "Expired"):
        return False
    return agreement.state not in ("Proposal", "Pending") or bool(agreement.valid_to > draft.now)


def _add(draft: Draft, proposal: Proposal) -> None:
    """Write a new proposal, and count it."""
    draft.put(f"proposal/{proposal.proposal_id}", proposal)
    draft.put(f"of/{proposal.own_subscription}/{proposal.proposal_id}", Belongs())
    pair_key, row_key = f"pair/{proposal.demand_id}/{proposal.offer_id}", f"subscription/{proposal.own_subscription}"
    pair, row = draft.get(pair_key) or Pair(0), draft.get(row_key)
    draft.put(pair_key, Pair(pair.proposals + 1))
    draft.put(row_key, replace(row, proposals=row.proposals + 1))
    talk_key = _talk_key(_first(draft, proposal))
    talk = draft.get(talk_key) or Talk(0, proposal.origin)
    draft.put(talk_key, Talk(talk.proposals + 1, talk.origin))


def mismatch(proposal: Proposal, other: Proposal) -> str:
    """Return why two proposals of a negotiation, one of each side, do not match; nothing if they do."""
    demand, offer = (proposal, other) if proposal.issuer == proposal.requestor else (other, proposal)
    return mismatch_text((demand.properties, demand.constraints), (offer.properties, offer.constraints))


def _properties(content: Subscription) -> str:
    return canonical(content.properties).decode()


# -- what the market found
def matched(draft: Draft, message: Matched) -> None:
    """Make the provider's offer the Initial proposal of a negotiation, and show it to the requestor."""
    demand, offer = read_subscription(message.demand.body), read_subscription(message.offer.body)
    initial = Proposal(
        proposal_id=digest("initial", REQUESTOR, message.demand_id, message.offer_id, timestamp_text(draft.now)),
        role=REQUESTOR,
        demand_id=message.demand_id,
        offer_id=message.offer_id,
        requestor=draft.me,
        provider=offer.owner,
        issuer=offer.owner,
        state=INITIAL,
        properties=_properties(offer),
        constraints=offer.constraints,
        created=draft.now,
        expires=min(offer.expires, demand.expires),
        origin=message.origin,
    )
    if why_over(draft, initial) or _no_room(draft, initial) or draft.get(f"proposal/{initial.proposal_id}"):
        return
    _add(draft, initial)
    draft.do(Emit(initial.own_feed, ProposalEvent(initial.proposal_id)))


# -- what our agent says
def _find(draft: Draft, subscription_id: str, wanted_id: str) -> Proposal | None:
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
    if full := _no_room(draft, previous):
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
    if previous.state == INITIAL or not previous.previous_id:
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


def _answer(previous: Proposal, issuer: str, known_id: str, properties: str, constraints: str, created: float) -> Proposal:
    """Return the proposal that answers `previous`. Raises `Violation` if its id is not `known_id` (where one is given)."""
    wire_id = previous.wire_id or previous.proposal_id
    created = round(created, 6)
    new_id = proposal_id(previous.demand_id, previous.offer_id, wire_id, issuer, properties, constraints, created)
    if known_id not in ("", new_id):
        raise Violation("the proposal's id does not name its content")
    return replace(
        previous, proposal_id=new_id, issuer=issuer, state=DRAFT, properties=properties, constraints=constraints,
        created=created, previous_id=previous.proposal_id, answer_id="", agreement_id="", reason="", wire_id="",
    )  # fmt: skip


def _link(draft: Draft, previous: Proposal, proposal: Proposal) -> None:
    """Write a proposal and that it answers another, which is open again if it was rejected."""
    state = ACCEPTED if previous.agreement_id else DRAFT if previous.previous_id else INITIAL
    draft.put(f"proposal/{previous.proposal_id}", replace(previous, answer_id=proposal.proposal_id, state=state, reason=""))
    _add(draft, proposal)


def reject(draft: Draft, message: RejectProposal) -> None:
    """Say no to a proposal of the other side; the Initial one only to ourselves, for it is our own node's making."""
    proposal = _find(draft, message.subscription_id, message.proposal_id)
    if not proposal:
        raise Declined("unknown", f"Proposal [{message.proposal_id}] not found for this subscription.")
    label = f"Proposal [{proposal.role[0]}-{proposal.proposal_id}]"
    if proposal.issuer == draft.me:
        raise Declined("bad_request", f"{label} is your own: it cannot be rejected.")
    if proposal.answer_id or proposal.state not in (INITIAL, DRAFT):
        state = "countered" if proposal.answer_id else proposal.state
        raise Declined("bad_request", f"{label} cannot be rejected: it is {state}.")
    reason = check_reason(message.reason)
    draft.put(f"proposal/{proposal.proposal_id}", replace(proposal, state=REJECTED, reason=reason))
    draft.do(Reply(Done()))
    if proposal.state == DRAFT:
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
    if not row or row.document.kind != "offer":
        return _send_back(draft, draft.meta.sender, message.proposal_id, "the offer is not known here")
    try:
        demand = verify_subscription(message.demand, "demand", draft.now)
    except Violation as error:
        return _send_back(draft, draft.meta.sender, message.proposal_id, str(error))
    if demand.owner != node_of(draft.meta.sender):
        raise Violation(f"the demand belongs to {demand.owner}, not to who negotiates with it")
    offer = read_subscription(row.document.body)
    _check_terms(message)
    initial = Proposal(
        proposal_id=digest("initial", PROVIDER, demand.subscription_id, message.offer_id, message.initial_id),
        role=PROVIDER,
        demand_id=demand.subscription_id,
        offer_id=message.offer_id,
        requestor=demand.owner,
        provider=draft.me,
        issuer=draft.me,
        state=INITIAL,
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
    count = (draft.get(opened_key) or Opened(0)).negotiations
    full = f"there were {count} negotiations about this offer" if count >= MAX_OPENED_PER_NODE else ""
    why = why_over(draft, initial) or full or _no_room(draft, initial) or mismatch(proposal, initial)
    if why:
        return _send_back(draft, draft.meta.sender, message.proposal_id, why)
    draft.put(opened_key, Opened(count + 1))
    _add(draft, initial)
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
    why = taken or why_over(draft, previous) or _no_room(draft, previous) or mismatch(proposal, previous)
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
    if proposal and proposal.state == DRAFT and not proposal.answer_id:
        other = PROVIDER if proposal.role == REQUESTOR else REQUESTOR
        text = f"{other} {proposal.counterpart} could not be reached: {why}"
        _mark_rejected(draft, proposal, reason_text(text, **{IS_FINAL: False}))
        if proposal.role == REQUESTOR:
            draft.do(Send("market", Rematch(proposal.demand_id, proposal.offer_id)))


def _mark_rejected(draft: Draft, proposal: Proposal, reason: str) -> None:
    if proposal.state == DRAFT and not proposal.answer_id and not proposal.agreement_id:
        draft.put(f"proposal/{proposal.proposal_id}", replace(proposal, state=REJECTED, reason=reason))
        draft.do(Emit(proposal.own_feed, ProposalRejectedEvent(proposal.proposal_id, reason)))
