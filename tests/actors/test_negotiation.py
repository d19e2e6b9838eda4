"""The negotiation machine: proposals and agreements, one machine alone and two in all orders of their messages."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from worlds.market_world import OTHER_ID, OTHER_KEY, PROVIDER_ID, PROVIDER_KEY, REQUESTOR_ID, REQUESTOR_KEY, demand, offer
from worlds.playbook import START, Nodes, Playbook, playbook

from actors.negotiation import moves as agreement_moves
from actors.negotiation import proposals, room
from actors.negotiation.machine import Negotiation
from actors.negotiation.rows import AgreementRow, ProposalRow, state_at
from golem.node.market_forms import agreement_form
from protocol.market import Matched, Rematch, SubscriptionEnded, SubscriptionOpened
from protocol.negotiation import (
    AgreementApproval,
    AgreementApproved,
    AgreementApprovedEvent,
    AgreementCancelledEvent,
    AgreementCommitted,
    AgreementEnded,
    AgreementEvent,
    AgreementExpired,
    AgreementProposed,
    AgreementRejectedEvent,
    AgreementTerminatedEvent,
    ApproveAgreement,
    CancelAgreement,
    ConfirmAgreement,
    CounterProposal,
    CreateAgreement,
    Created,
    ProposalCountered,
    ProposalEvent,
    ProposalOpened,
    ProposalRejectedEvent,
    RejectAgreement,
    RejectProposal,
    TerminateAgreement,
    agreement_body,
)
from protocol.properties import expiration_s
from protocol.property_names import EXPIRATION
from protocol.signing import Document, sign
from protocol.types import Done, Refused, Violation

R_ADDRESS, P_ADDRESS = f"{REQUESTOR_ID}/negotiation", f"{PROVIDER_ID}/negotiation"
DEMAND_ID, DEMAND = demand(START)
OFFER_ID, OFFER = offer(START)
REASON = '{"message":"Finished","golem.requestor.code":"Success"}'


class Pair(Nodes):
    """A requestor and a provider whose demand and offer match."""

    def __init__(self) -> None:
        self.r = playbook(Negotiation(REQUESTOR_ID))
        self.p = playbook(Negotiation(PROVIDER_ID))
        super().__init__(self.r, self.p)
        self.p.tell(SubscriptionOpened(OFFER_ID, OFFER))
        self.r.tell(SubscriptionOpened(DEMAND_ID, DEMAND))
        self.match()

    def match(self) -> str:
        """Let the market match the pair; return the id of the Initial proposal."""
        self.r.tell(Matched(DEMAND_ID, OFFER_ID, DEMAND, OFFER), f"{REQUESTOR_ID}/market")
        return str(self.r.feed(f"demand/{DEMAND_ID}")[-1].proposal_id)

    @property
    def initial(self) -> str:
        return str(self.r.feed(f"demand/{DEMAND_ID}")[0].proposal_id)

    def counter_r(self, proposal_id: str, **changes: Any) -> Any:
        """Requestor counters with its demand, changed."""
        return self.r.ask(counter(DEMAND_ID, proposal_id, demand(START, **changes)[1]))

    def counter_p(self, proposal_id: str, **changes: Any) -> Any:
        """Provider counters with its offer, changed."""
        return self.p.ask(counter(OFFER_ID, proposal_id, offer(START, **changes)[1]))

    def draft(self) -> str:
        """Negotiate to the provider's first Draft; return its id."""
        first = self.counter_r(self.initial).id
        self.settle()
        second: str = self.counter_p(first).id
        self.settle()
        return second

    def created(self, valid_s: float = 3600.0) -> str:
        """Negotiate to an agreement in state Proposal; return its id."""
        reply = self.r.ask(CreateAgreement(self.draft(), self.r.now + valid_s))
        assert isinstance(reply, Created), reply
        return reply.id

    def confirm(self, agreement_id: str) -> Any:
        document = sign(REQUESTOR_KEY, "agreement", self.r.rows[f"agreement/{agreement_id}"].body)
        return self.r.ask(ConfirmAgreement(agreement_id, document, "r-session"))

    def approve(self, agreement_id: str) -> Any:
        document = sign(PROVIDER_KEY, "approval", self.p.rows[f"agreement/{agreement_id}"].body)
        return self.p.ask(ApproveAgreement(agreement_id, document, "p-session"))

    def pending(self, valid_s: float = 3600.0) -> str:
        """Negotiate to an agreement that both sides know; return its id."""
        agreement_id = self.created(valid_s)
        assert self.confirm(agreement_id) == Done()
        self.settle()
        return agreement_id

    def approved(self) -> str:
        agreement_id = self.pending()
        assert self.approve(agreement_id) == Done()
        self.settle()
        return agreement_id

    def states(self, agreement_id: str) -> tuple[str, str]:
        return tuple(play.rows[f"agreement/{agreement_id}"].state for play in (self.r, self.p))  # type: ignore[return-value]

    def pass_time(self, seconds: float) -> None:
        self.r.at(seconds)
        self.p.at(seconds)


def counter(subscription_id: str, proposal_id: str, document: Document) -> CounterProposal:
    body = json.loads(document.body)
    properties = json.dumps(body["properties"], separators=(",", ":"))
    return CounterProposal(subscription_id, proposal_id, properties, body["constraints"])


@pytest.fixture
def pair() -> Pair:
    return Pair()


def proposal(play: Playbook, proposal_id: str) -> ProposalRow:
    row = play.rows[f"proposal/{proposal_id}"]
    assert isinstance(row, ProposalRow)
    return row


def code(reply: Any) -> str:
    assert isinstance(reply, Refused), reply
    return reply.code


def message_of(reason: str) -> str:
    return str(json.loads(reason)["message"])


# -- proposals


def test_first_event_is_the_offer_and_the_provider_sees_nothing(pair: Pair) -> None:
    row = proposal(pair.r, pair.initial)
    assert (row.state, row.issuer, row.previous_id) == ("Initial", PROVIDER_ID, "")
    assert '"golem.com.pricing.model.linear.coeffs":[0.0,0.001,0.0]' in row.properties  # floats stay floats
    assert pair.p.feed(f"offer/{OFFER_ID}") == []


def test_counters_both_ways_have_one_id_and_link_to_what_they_answer(pair: Pair) -> None:
    first = pair.counter_r(pair.initial).id
    pair.settle()
    assert pair.p.take(f"offer/{OFFER_ID}") == [ProposalEvent(first)]
    at_provider = proposal(pair.p, first)
    assert (at_provider.state, at_provider.issuer) == ("Draft", REQUESTOR_ID)
    initial_there = proposal(pair.p, at_provider.previous_id)
    assert (initial_there.state, initial_there.issuer) == ("Initial", PROVIDER_ID)
    assert initial_there.proposal_id != pair.initial  # only the Initial one differs
    second = pair.counter_p(first, golem__inf__mem__gib=2.0).id
    pair.settle()
    assert pair.r.take(f"demand/{DEMAND_ID}")[-1] == ProposalEvent(second)
    assert proposal(pair.r, second).previous_id == first
    third = pair.counter_r(second).id
    pair.settle()
    assert proposal(pair.p, third).previous_id == second
    assert not pair.r.violations
    assert not pair.p.violations


def test_counter_own_or_twice_or_unknown(pair: Pair) -> None:
    first = pair.counter_r(pair.initial).id
    assert code(pair.counter_r(first)) == "bad_request"
    assert code(pair.counter_r(pair.initial)) == "gone"
    assert code(pair.counter_r("ab" * 32)) == "unknown"
    wrong = pair.r.ask(counter(OFFER_ID, first, DEMAND))
    assert code(wrong) == "bad_request"  # no such subscription of ours
    pair.settle()
    at_provider = pair.p.rows[f"proposal/{first}"].previous_id
    assert code(pair.counter_p(at_provider)) == "bad_request"  # the Initial one is its own


def test_counter_is_matched_again_and_refused_with_the_reason(pair: Pair) -> None:
    refused = pair.counter_r(pair.initial, constraints="(golem.inf.mem.gib>=64)")
    assert code(refused) == "bad_request"
    assert "doesn't match previous Proposal" in refused.message
    assert "golem.inf.mem.gib>=64" in refused.message
    undefined = pair.counter_r(pair.initial, constraints="(golem.inf.gpu=1)")
    assert code(undefined) == "bad_request"
    broken = pair.counter_r(pair.initial, constraints="(golem")
    assert "does not parse" in broken.message
    first = pair.counter_r(pair.initial).id
    pair.settle()
    assert code(pair.counter_p(first, golem__runtime__name="wasmtime")) == "bad_request"


def test_counter_after_the_end(pair: Pair) -> None:
    pair.r.tell(SubscriptionEnded(DEMAND_ID, "withdrawn"))
    refused = pair.counter_r(pair.initial)
    assert code(refused) == "gone"
    assert "withdrawn" in refused.message
    other = Pair()
    other.r.at(3600)
    assert code(other.counter_r(other.initial)) == "gone"


def test_reject_and_open_again(pair: Pair) -> None:
    second = pair.draft()
    pair.r.take(f"demand/{DEMAND_ID}")
    reason = '{"golem.proposal.rejection.is-final":false}'
    assert pair.r.ask(RejectProposal(DEMAND_ID, second, reason)) == Done()
    assert code(pair.r.ask(RejectProposal(DEMAND_ID, second, reason))) == "bad_request"
    pair.settle()
    (event,) = [e for e in pair.p.take(f"offer/{OFFER_ID}") if isinstance(e, ProposalRejectedEvent)]
    assert event.proposal_id == second
    assert json.loads(event.reason) == {"golem.proposal.rejection.is-final": False, "message": "no reason given"}
    assert proposal(pair.p, second).state == proposal(pair.r, second).state == "Rejected"
    third = pair.counter_r(second).id  # the rejecting side may think again
    pair.settle()
    assert proposal(pair.p, second).state == "Draft"
    assert pair.p.take(f"offer/{OFFER_ID}") == [ProposalEvent(third)]
    assert not pair.p.violations


def test_rejecting_the_initial_proposal_is_local(pair: Pair) -> None:
    assert pair.r.ask(RejectProposal(DEMAND_ID, pair.initial, REASON)) == Done()
    assert pair.waiting() == []
    assert proposal(pair.r, pair.initial).state == "Rejected"
    assert isinstance(pair.counter_r(pair.initial), Created)


def test_reject_refusals(pair: Pair) -> None:
    first = pair.counter_r(pair.initial).id
    assert code(pair.r.ask(RejectProposal(DEMAND_ID, first, REASON))) == "bad_request"  # own
    assert code(pair.r.ask(RejectProposal(DEMAND_ID, pair.initial, REASON))) == "bad_request"  # countered
    assert code(pair.r.ask(RejectProposal(DEMAND_ID, "cd" * 32, REASON))) == "unknown"
    pair.settle()
    assert code(pair.p.ask(RejectProposal(OFFER_ID, first, '"text"'))) == "bad_request"  # a reason is an object
    assert proposal(pair.p, first).state == "Draft"


def test_a_counter_that_comes_too_late_is_rejected_with_the_reason(pair: Pair) -> None:
    pair.p.tell(SubscriptionEnded(OFFER_ID, "withdrawn"))
    first = pair.counter_r(pair.initial).id
    pair.settle()
    event = pair.r.take(f"demand/{DEMAND_ID}")[-1]
    assert event.proposal_id == first
    assert "withdrawn" in message_of(event.reason)
    assert proposal(pair.r, first).state == "Rejected"


def test_a_provider_that_lost_its_journal_says_so(pair: Pair) -> None:
    second = pair.draft()
    pair.p.rows.clear()
    third = pair.counter_r(second).id
    pair.settle()
    event = pair.r.take(f"demand/{DEMAND_ID}")[-1]
    assert (event.proposal_id, "not known here" in event.reason) == (third, True)


def test_a_counter_that_did_not_arrive_is_never_silent(pair: Pair) -> None:
    first = pair.counter_r(pair.initial).id
    (link,) = pair.waiting()
    pair.lose(link)
    event = pair.r.take(f"demand/{DEMAND_ID}")[-1]
    assert isinstance(event, ProposalRejectedEvent)
    assert "could not be reached" in message_of(event.reason)
    assert proposal(pair.r, first).state == "Rejected"
    pair.settle()
    assert [send.message for send in pair.unlinked if send.to == "market"] == [Rematch(DEMAND_ID, OFFER_ID)]


def test_a_counter_whose_acknowledgement_was_lost_goes_on(pair: Pair) -> None:
    first = pair.counter_r(pair.initial).id
    (link,) = pair.waiting()
    pair.lose(link, arrived=True)
    second = pair.counter_p(first).id
    pair.settle()
    assert pair.r.take(f"demand/{DEMAND_ID}")[-1] == ProposalEvent(second)
    assert proposal(pair.r, first).state == "Draft"


def test_peers_that_break_the_rules(pair: Pair) -> None:
    second = pair.draft()
    row = proposal(pair.r, second)
    forged = ProposalCountered("ef" * 32, second, row.properties, row.constraints, START)
    for message, sender, text in [
        (forged, R_ADDRESS, "does not name its content"),
        (forged, f"{OTHER_ID}/negotiation", "only the other side's"),
        (ProposalCountered("ef" * 32, row.previous_id, "{}", "()", START), R_ADDRESS, "only the other side's"),
        (ProposalCountered("ef" * 32, second, '{"a": 1}', "()", START), R_ADDRESS, "canonical"),
        (ProposalCountered("ef" * 32, second, '{"a":{"b":1}}', "()", START), R_ADDRESS, "not flat"),
        (ProposalCountered("ef" * 32, second, "{}", "(" * 70_000, START), R_ADDRESS, "limit"),
        (ProposalCountered("ef" * 32, second, "{}", "()", float("inf")), R_ADDRESS, "time"),
        (ProposalOpened("ef" * 32, "aa" * 32, OFFER_ID, demand(START, OTHER_KEY)[1], "{}", "()", START), R_ADDRESS, "belongs to"),
    ]:
        with pytest.raises(Violation, match=text):
            pair.p.tell(message, sender)


def test_the_terms_of_an_agreement_that_was_never_made_are_not_kept(pair: Pair) -> None:
    """They may be 100 kB, and 90 days long."""
    agreement_id = pair.pending()
    assert pair.p.rows[f"agreement/{agreement_id}"].body
    pair.p.ask(RejectAgreement(agreement_id, REASON))
    dead = pair.p.rows[f"agreement/{agreement_id}"]
    assert (dead.state, dead.body, dead.reason) == ("Rejected", b"", REASON)
    shown = agreement_form(dead, START)
    assert (shown["state"], shown["demand"]["requestorId"]) == ("Rejected", REQUESTOR_ID)


def test_limit_of_a_pair(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_PROPOSALS_PER_PAIR", 3)
    second = pair.draft()
    refused = pair.counter_r(second)
    assert code(refused) == "busy"
    assert "have had 3 proposals" in refused.message
    before = len(pair.r.feed(f"demand/{DEMAND_ID}"))
    pair.match()
    assert len(pair.r.feed(f"demand/{DEMAND_ID}")) == before


def test_proposals_are_forgotten_after_their_subscription(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposals, "FORGET_AT_ONCE", 1)
    pair.draft()
    pair.r.tell(SubscriptionEnded(DEMAND_ID, "withdrawn"))
    assert pair.r.feed(f"demand/{DEMAND_ID}")[-1] == SubscriptionEnded(DEMAND_ID, "withdrawn")
    pair.r.at(proposals.KEEP_ENDED_S)
    assert pair.r.rows == {}
    assert pair.r.feed(f"demand/{DEMAND_ID}") == []
    assert pair.r.timers == {}


@pytest.mark.parametrize("block", range(4))
def test_random_talks_end_alike_on_both_sides(block: int) -> None:
    """25 seeds a block: agents counter and reject what they have, in any order, messages are on their way for any time."""
    for seed in range(block * 25, block * 25 + 25):
        rng = random.Random(seed)
        pair = Pair()
        for _ in range(rng.randint(5, 40)):
            waiting = pair.waiting()
            if waiting and rng.random() < 0.4:
                pair.deliver(rng.choice(waiting))
                continue
            play, subscription_id = rng.choice([(pair.r, DEMAND_ID), (pair.p, OFFER_ID)])
            known = [row.proposal_id for _, row in play.rows.prefix("proposal/")]
            if rng.random() < 0.1:
                pair.match()
                pair.pass_time(0.001)
            elif known and rng.random() < 0.3:
                play.ask(RejectProposal(subscription_id, rng.choice(known), REASON))
            elif known:
                (pair.counter_r if play is pair.r else pair.counter_p)(rng.choice(known))
        pair.settle(rng)
        assert not pair.r.violations, seed
        assert not pair.p.violations, seed
        for key, row in pair.r.rows.prefix("proposal/"):
            there = pair.p.rows.get(key)
            if row.previous_id:
                assert (row.state, row.answer_id, row.properties) == (there.state, there.answer_id, there.properties), seed
            else:
                assert there is None, seed
        shared = [sum(1 for _, row in play.rows.prefix("proposal/") if row.previous_id) for play in (pair.r, pair.p)]
        assert shared[0] == shared[1], seed


# -- agreements


def test_the_whole_way_to_an_agreement_and_its_end(pair: Pair) -> None:
    agreement_id = pair.created()
    assert pair.waiting() == []
    row: AgreementRow = pair.r.rows[f"agreement/{agreement_id}"]
    body = json.loads(row.body)
    assert row.state == "Proposal"
    assert (body["demand"]["demandId"], body["offer"]["offerId"]) == (DEMAND_ID, OFFER_ID)
    assert body["offer"]["properties"]["golem.com.pricing.model.linear.coeffs"] == [0.0, 0.001, 0.0]
    assert proposal(pair.r, row.proposal_id).state == "Accepted"
    assert pair.confirm(agreement_id) == Done()
    assert code(pair.confirm(agreement_id)) == "gone"
    pair.settle()
    assert pair.p.take(f"offer/{OFFER_ID}")[-1] == AgreementEvent(agreement_id)
    assert pair.states(agreement_id) == ("Pending", "Pending")
    assert pair.approve(agreement_id) == Done()
    assert pair.states(agreement_id) == ("Pending", "Approving")
    assert pair.approve(agreement_id) == Done()  # asks again, sends nothing again
    pair.settle()
    assert pair.states(agreement_id) == ("Approved", "Approved")
    at_r, at_p = (play.rows[f"agreement/{agreement_id}"] for play in (pair.r, pair.p))
    for name in ("body", "approved_at", "proposed_signature", "approved_signature", "committed_signature"):
        assert getattr(at_r, name) == getattr(at_p, name) != ""
    assert (at_r.app_session_id, at_p.app_session_id) == ("r-session", "p-session")
    assert pair.r.feed("agreements") == [AgreementApprovedEvent(agreement_id, "r-session")]
    assert pair.p.feed(f"agreement/{agreement_id}") == [AgreementApprovedEvent(agreement_id, "p-session")]
    pair.pass_time(3600)  # an approved agreement does not expire with the time for its approval
    assert pair.states(agreement_id) == ("Approved", "Approved")
    assert pair.p.ask(TerminateAgreement(agreement_id, REASON)) == Done()
    pair.settle()
    assert pair.states(agreement_id) == ("Terminated", "Terminated")
    for play, session in ((pair.r, "r-session"), (pair.p, "p-session")):
        assert play.feed("agreements")[-1] == AgreementTerminatedEvent(agreement_id, session, "Provider", REASON)
    told = [send for send in pair.unlinked if isinstance(send.message, AgreementApproved | AgreementEnded)]
    assert sorted(send.to for send in told) == sorted(["activity", "ledger"] * 4)
    assert [send.message for send in pair.unlinked if send.to == "market"] == [Rematch(DEMAND_ID, OFFER_ID)]
    assert not pair.r.violations
    assert not pair.p.violations


@pytest.mark.parametrize("told", [True, False], ids=["one tells the other", "each by itself"])
def test_an_agreement_past_its_term_is_ended_on_both_nodes_with_the_reason(pair: Pair, told: bool) -> None:
    agreement_id = pair.approved()
    pair.unlinked.clear()
    pair.pass_time(3600 + agreement_moves.END_MARGIN_S - 2)
    assert pair.states(agreement_id) == ("Approved", "Approved")
    pair.r.at(4)
    if told:
        pair.settle()
    else:  # what one says to the other never arrives
        pair.p.at(4)
        pair.collect()
    assert pair.states(agreement_id) == ("Terminated", "Terminated")
    for play, who in ((pair.r, "Requestor"), (pair.p, "Requestor" if told else "Provider")):
        (event,) = (one for one in play.feed("agreements") if isinstance(one, AgreementTerminatedEvent))
        assert event.terminator == who
        assert "its term was over at 2027-01-15T09:00:00" in message_of(event.reason)
        assert json.loads(event.reason)[f"golem.{who.lower()}.code"] == "Expired"
        assert f"due/{agreement_id}" not in play.timers
    ended = [send.to for send in pair.unlinked if isinstance(send.message, AgreementEnded)]
    assert sorted(ended) == ["activity", "activity", "ledger", "ledger"]


@pytest.mark.parametrize("expiration", [None, "soon", True, -5, 2**60, 1.8e12])
def test_a_demand_without_a_readable_term_sets_no_timer(pair: Pair, expiration: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement_moves, "expiration_s", lambda demand: expiration_s({EXPIRATION: expiration}))
    agreement_id = pair.approved()
    assert f"due/{agreement_id}" not in pair.r.timers
    pair.pass_time(1e6)
    assert pair.states(agreement_id) == ("Approved", "Approved")


def test_an_agreement_on_an_offer_that_is_over_is_refused_at_once_with_the_reason(pair: Pair) -> None:
    agreement_id = pair.created()
    assert pair.confirm(agreement_id) == Done()
    pair.p.tell(SubscriptionEnded(OFFER_ID, "withdrawn"))
    pair.settle()
    assert pair.r.rows[f"agreement/{agreement_id}"].state == "Rejected"
    event = pair.r.feed("agreements")[-1]
    assert isinstance(event, AgreementRejectedEvent)
    assert message_of(event.reason) == "Agreement not taken: the subscription is withdrawn."
    assert f"agreement/{agreement_id}" not in pair.p.rows
    assert Rematch(DEMAND_ID, OFFER_ID) in [send.message for send in pair.unlinked]  # the offer may have a successor


@pytest.mark.parametrize("answers", [True, False])
def test_an_agreement_that_came_before_the_end_of_its_offer_has_a_moment(pair: Pair, answers: bool) -> None:
    agreement_id = pair.pending()
    pair.p.tell(SubscriptionEnded(OFFER_ID, "withdrawn"))
    pair.pass_time(proposals.LAST_WORD_S - 1)
    assert pair.states(agreement_id) == ("Pending", "Pending")
    if answers:  # the agent had read of it before
        assert pair.approve(agreement_id) == Done()
    pair.p.at(2)
    pair.settle()
    if answers:
        pair.pass_time(60)
        assert pair.states(agreement_id) == ("Approved", "Approved")
    else:
        assert pair.states(agreement_id) == ("Rejected", "Rejected")
        assert "not answered: the subscription is withdrawn" in message_of(pair.r.feed("agreements")[-1].reason)
    assert not any(key.startswith("waiting/") for key in pair.p.rows)


def test_a_fresh_negotiation_after_the_end(pair: Pair) -> None:
    agreement_id = pair.approved()
    pair.r.ask(TerminateAgreement(agreement_id, REASON))
    pair.settle()
    pair.pass_time(1)
    fresh = pair.match()
    assert fresh != pair.initial
    first = pair.counter_r(fresh).id
    pair.settle()
    assert pair.p.feed(f"offer/{OFFER_ID}")[-1] == ProposalEvent(first)


def test_what_cannot_become_an_agreement(pair: Pair) -> None:
    def create(proposal_id: str, valid_s: float = 100.0) -> Any:
        return pair.r.ask(CreateAgreement(proposal_id, START + valid_s))

    refused = create(pair.initial)
    assert code(refused) == "bad_request"
    assert "No negotiation with Provider took place" in refused.message
    second = pair.draft()
    first = proposal(pair.r, second).previous_id
    assert code(create(first)) == "bad_request"  # own
    assert code(create("ab" * 32)) == "bad_request"
    assert code(create(second, -1)) == "bad_request"
    assert code(pair.p.ask(CreateAgreement(first, START + 100))) == "bad_request"  # the provider cannot
    pair.r.ask(RejectProposal(DEMAND_ID, second, REASON))
    assert "rejected" in create(second).message
    third = pair.counter_r(second).id
    assert "countered" in create(second).message
    pair.settle()
    fourth = pair.counter_p(third).id
    pair.settle()
    assert isinstance(create(fourth), Created)
    assert code(create(fourth)) == "conflict"
    late = Pair()
    draft_id = late.draft()
    late.r.at(3600)
    assert code(late.r.ask(CreateAgreement(draft_id, late.r.now + 60))) == "gone"


def test_state_errors_have_the_text_that_agents_parse(pair: Pair) -> None:
    agreement_id = pair.created()

    def text(old: str, new: str) -> str:
        return f"Agreement [{agreement_id}]. Error: Can't update Agreement state from {old} to {new}."

    early = pair.r.ask(TerminateAgreement(agreement_id, REASON))
    assert (early.code, early.message) == ("conflict", text("Proposal", "Terminated"))
    pair.confirm(agreement_id)
    pair.settle()
    for play in (pair.r, pair.p):
        reply = play.ask(TerminateAgreement(agreement_id, REASON))
        assert (reply.code, reply.message) == ("gone", text("Pending", "Terminated"))
    assert pair.confirm(agreement_id).message == text("Pending", "Pending")
    pair.approve(agreement_id)
    assert pair.p.ask(TerminateAgreement(agreement_id, REASON)).message == text("Approving", "Terminated")
    assert pair.p.ask(RejectAgreement(agreement_id, REASON)).message == text("Approving", "Rejected")
    pair.settle()
    assert pair.r.ask(CancelAgreement(agreement_id, REASON)).message == text("Approved", "Cancelled")
    assert pair.approve(agreement_id).message == text("Approved", "Approved")
    assert code(pair.r.ask(RejectAgreement(agreement_id, REASON))) == "unknown"  # not the requestor's to do
    assert code(pair.p.ask(CancelAgreement(agreement_id, REASON))) == "unknown"
    assert code(pair.r.ask(TerminateAgreement("00" * 32, REASON))) == "unknown"


def test_reject_an_agreement(pair: Pair) -> None:
    agreement_id = pair.pending()
    assert pair.p.ask(RejectAgreement(agreement_id, '{"message":"busy"}')) == Done()
    pair.settle()
    assert pair.states(agreement_id) == ("Rejected", "Rejected")
    assert pair.r.feed("agreements") == [AgreementRejectedEvent(agreement_id, "r-session", '{"message":"busy"}')]
    assert code(pair.approve(agreement_id)) == "gone"


@pytest.mark.parametrize(
    ("final", "fresh"), [("false", [Rematch(DEMAND_ID, OFFER_ID)]), ("true", []), ('"no"', []), ("null", [])]
)
def test_a_fresh_negotiation_after_a_rejection_for_now(pair: Pair, final: str, fresh: list[Rematch]) -> None:
    agreement_id = pair.pending()
    pair.p.ask(RejectAgreement(agreement_id, f'{{"golem.proposal.rejection.is-final":{final},"message":"busy"}}'))
    pair.settle()
    assert pair.states(agreement_id) == ("Rejected", "Rejected")
    assert [send.message for send in pair.unlinked if send.to == "market"] == fresh


def test_talks_may_go_on_after_an_agreement_that_was_not_made(pair: Pair) -> None:
    agreement_id = pair.pending()
    last = pair.r.rows[f"agreement/{agreement_id}"].proposal_id
    assert code(pair.counter_r(last)) == "bad_request"  # it may yet be made
    pair.p.ask(RejectAgreement(agreement_id, '{"message":"busy"}'))
    pair.settle()
    third = pair.counter_r(last).id
    pair.settle()
    assert pair.p.feed(f"offer/{OFFER_ID}")[-1] == ProposalEvent(third)
    fourth = pair.counter_p(third).id
    pair.settle()
    second_agreement = pair.r.ask(CreateAgreement(fourth, pair.r.now + 600)).id
    pair.confirm(second_agreement)
    pair.settle()
    pair.approve(second_agreement)
    pair.settle()
    assert pair.states(second_agreement) == ("Approved", "Approved")
    assert code(pair.counter_r(fourth)) == "bad_request"
    assert not pair.r.violations
    assert not pair.p.violations


def test_talks_that_go_on_too_early_hear_why(pair: Pair) -> None:
    agreement_id = pair.pending(60)
    last = pair.r.rows[f"agreement/{agreement_id}"].proposal_id
    pair.r.at(60)  # expired here, not yet by the provider's clock
    third = pair.counter_r(last).id
    pair.settle()
    event = pair.r.feed(f"demand/{DEMAND_ID}")[-1]
    assert isinstance(event, ProposalRejectedEvent)
    assert (event.proposal_id, "has an agreement" in event.reason) == (third, True)


def test_cancel_before_and_after_sending(pair: Pair) -> None:
    agreement_id = pair.created()
    assert pair.r.ask(CancelAgreement(agreement_id, "")) == Done()
    assert pair.waiting() == []
    assert pair.r.feed("agreements") == [AgreementCancelledEvent(agreement_id, None, '{"message":"no reason given"}')]
    other = Pair()
    agreement_id = other.pending()
    other.r.ask(CancelAgreement(agreement_id, REASON))
    other.settle()
    assert other.states(agreement_id) == ("Cancelled", "Cancelled")
    assert other.p.feed("agreements") == [AgreementCancelledEvent(agreement_id, None, REASON)]


def test_expiry_is_lazy_and_by_timer(pair: Pair) -> None:
    agreement_id = pair.pending(60)
    pair.r.now += 60  # no timer has fired yet
    assert state_at(pair.r.rows[f"agreement/{agreement_id}"], pair.r.now) == "Expired"
    refused = pair.r.ask(CancelAgreement(agreement_id, REASON))
    assert "from Expired to Cancelled" in refused.message
    pair.p.at(60)
    assert pair.states(agreement_id) == ("Expired", "Expired")
    assert pair.r.feed("agreements") == pair.p.feed("agreements") == []  # expiry is no event ...
    assert pair.p.feed(f"agreement/{agreement_id}") == [AgreementExpired(agreement_id)]  # ... but wakes who waits
    created = Pair()
    agreement_id = created.created(60)
    created.r.at(60)
    assert "from Expired to Pending" in created.confirm(agreement_id).message


def test_an_approval_in_the_last_moment_is_refused(pair: Pair) -> None:
    agreement_id = pair.pending(60)
    pair.p.now += 59.98
    assert code(pair.approve(agreement_id)) == "gone"


def test_an_approval_after_expiry_is_answered_with_it(pair: Pair) -> None:
    agreement_id = pair.pending(60)
    pair.p.at(40)
    pair.approve(agreement_id)
    pair.r.at(61)
    pair.p.at(21)
    assert pair.states(agreement_id) == ("Expired", "Approving")  # the provider waits for the decision
    assert state_at(pair.p.rows[f"agreement/{agreement_id}"], pair.p.now) == "Pending"
    pair.settle()
    assert pair.states(agreement_id) == ("Expired", "Expired")


def test_an_approval_has_an_end_of_its_own(pair: Pair) -> None:
    """A modified requestor confirms, for ten years, and never commits."""
    agreement_id = pair.pending(10 * 365 * 86400.0)
    pair.approve(agreement_id)
    pair.p.at(agreement_moves.APPROVAL_S - 1)
    assert pair.states(agreement_id)[1] == "Approving"
    pair.p.at(1)
    assert pair.states(agreement_id)[1] == "Rejected"
    (event,) = pair.p.feed("agreements")
    assert isinstance(event, AgreementRejectedEvent)
    assert "withdrawn" in message_of(event.reason)


def test_a_commit_that_comes_late_is_answered_with_a_termination(pair: Pair) -> None:
    for late_by in (agreement_moves.APPROVAL_S, 3000.0):
        pair = Pair()
        agreement_id = pair.pending()
        pair.approve(agreement_id)
        pair.waiting()
        pair.deliver((P_ADDRESS, R_ADDRESS))
        pair.p.at(late_by)
        assert pair.states(agreement_id) == ("Approved", "Rejected")
        pair.settle()
        assert pair.states(agreement_id) == ("Terminated", "Terminated")
        told = [send.message for send in pair.unlinked if send.to in ("ledger", "activity")]
        assert not any(isinstance(one, AgreementApproved) and one.role == "Provider" for one in told)
        assert not pair.r.violations
        assert not pair.p.violations


@pytest.mark.parametrize("name", ["cancel", "late R"])
def test_a_commit_after_the_requestors_own_end_revives_nothing(pair: Pair, name: str) -> None:
    agreement_id = pair.pending(20)
    if name == "cancel":
        pair.approve(agreement_id)
        pair.r.ask(CancelAgreement(agreement_id, REASON))
    else:
        pair.r.at(21)
        pair.approve(agreement_id)
    pair.settle()
    state = pair.states(agreement_id)[1]
    assert state in ("Cancelled", "Expired")
    with pytest.raises(Violation):
        pair.p.tell(AgreementCommitted(agreement_id, START), REQUESTOR_ID)
    assert pair.states(agreement_id)[1] == state


@pytest.mark.parametrize("off_s", [-1e9, -4000.0, 301.0, 3600.0, 1e10])
def test_an_agreement_of_another_time_is_not_taken(pair: Pair, off_s: float) -> None:
    """A modified requestor dates an agreement as it likes; SDK times within the clocks' skew are no matter."""
    for shift, taken in ((off_s, False), (250.0, True), (-250.0, True), (-20.0, True)):
        pair = Pair()
        body = json.loads(pair.r.rows[f"agreement/{pair.created()}"].body)
        created = max(0.0, START + shift)
        new_id, forged = agreement_body(body["proposalId"], created, START + 3600, body["demand"], body["offer"])
        pair.p.tell(AgreementProposed(sign(REQUESTOR_KEY, "agreement", forged)), REQUESTOR_ID)
        assert (f"agreement/{new_id}" in pair.p.rows) is taken, (shift, pair.p.sends)
        if not taken:
            (answer,) = pair.p.take_sent(R_ADDRESS)
            assert "made at" in answer.reason


def test_what_the_requestor_says_of_the_approvals_time_is_within_reason(pair: Pair) -> None:
    for said, kept in ((START + 1e9, START), (0.0, START), (START + 200, START + 200)):
        pair = Pair()
        agreement_id = pair.pending()
        pair.approve(agreement_id)
        pair.p.tell(AgreementCommitted(agreement_id, said), REQUESTOR_ID)
        assert pair.p.rows[f"agreement/{agreement_id}"].approved_at == kept


def test_nothing_undelivered_is_silent(pair: Pair) -> None:
    agreement_id = pair.created()
    pair.confirm(agreement_id)
    (link,) = pair.waiting()
    pair.lose(link)
    (event,) = pair.r.feed("agreements")
    assert isinstance(event, AgreementCancelledEvent)
    assert "could not be reached" in message_of(event.reason)
    pair.settle()
    assert not pair.p.violations

    pair = Pair()
    agreement_id = pair.pending()
    pair.approve(agreement_id)
    (link,) = pair.waiting()
    pair.r.at(3600)  # the approval was under way for too long; now it is the question what became of it
    pair.lose(link)
    pair.settle()
    assert pair.states(agreement_id) == ("Expired", "Approving")  # its time is over by the requestor's clock only
    pair.p.at(agreement_moves.APPROVAL_S)
    pair.settle()
    assert pair.states(agreement_id) == ("Expired", "Expired")

    pair = Pair()
    agreement_id = pair.pending()
    pair.approve(agreement_id)
    pair.waiting()
    pair.deliver((P_ADDRESS, R_ADDRESS))
    pair.waiting()
    assert isinstance(pair.lose((R_ADDRESS, P_ADDRESS)), AgreementCommitted)
    pair.settle()
    assert pair.states(agreement_id) == ("Terminated", "Terminated")
    assert not pair.p.violations


def test_a_confirmation_whose_acknowledgement_was_lost(pair: Pair) -> None:
    agreement_id = pair.created()
    pair.confirm(agreement_id)
    (link,) = pair.waiting()
    pair.lose(link, arrived=True)
    pair.approve(agreement_id)
    pair.settle(random.Random(1))
    assert pair.states(agreement_id) == ("Cancelled", "Cancelled")
    assert not pair.r.violations
    assert not pair.p.violations


def test_signatures_are_checked(pair: Pair) -> None:
    agreement_id = pair.created()
    body = pair.r.rows[f"agreement/{agreement_id}"].body
    bad = [(OTHER_KEY, "agreement", body), (REQUESTOR_KEY, "approval", body), (REQUESTOR_KEY, "agreement", b"{}")]
    for key, kind, signed in bad:
        assert code(pair.r.ask(ConfirmAgreement(agreement_id, sign(key, kind, signed)))) == "bad_request"
    pair.confirm(agreement_id)
    pair.settle()
    bad = [(OTHER_KEY, "approval", body), (PROVIDER_KEY, "agreement", body), (PROVIDER_KEY, "approval", b"{}")]
    for key, kind, signed in bad:
        with pytest.raises(Violation):
            pair.r.tell(AgreementApproval(agreement_id, sign(key, kind, signed)), PROVIDER_ID)
        assert code(pair.p.ask(ApproveAgreement(agreement_id, sign(key, kind, signed)))) == "bad_request"
    with pytest.raises(Violation):
        pair.r.tell(AgreementApproval(agreement_id, sign(OTHER_KEY, "approval", body)), OTHER_ID)
    with pytest.raises(Violation):
        pair.p.tell(AgreementCommitted(agreement_id, START), REQUESTOR_ID)  # nobody approved
    with pytest.raises(Violation):
        pair.p.tell(AgreementProposed(sign(OTHER_KEY, "agreement", body)), REQUESTOR_ID)


def test_an_agreement_that_is_not_what_was_negotiated_is_rejected(pair: Pair) -> None:
    agreement_id = pair.created()
    body = json.loads(pair.r.rows[f"agreement/{agreement_id}"].body)
    body["offer"]["properties"]["golem.com.pricing.model.linear.coeffs"] = [0.0, 0.0, 0.0]  # for nothing
    new_id, forged = agreement_body(body["proposalId"], body["created"], body["validTo"], body["demand"], body["offer"])
    pair.p.tell(AgreementProposed(sign(REQUESTOR_KEY, "agreement", forged)), REQUESTOR_ID)
    assert f"agreement/{new_id}" not in pair.p.rows
    (answer,) = pair.p.take_sent(R_ADDRESS)
    assert "not what the last proposals say" in answer.reason
    for junk in (b"[]", b'"x"', b"{}", b'{"agreementId":1,"proposalId":2,"created":1.0,"validTo":2.0}'):
        with pytest.raises(Violation):
            pair.p.tell(AgreementProposed(sign(REQUESTOR_KEY, "agreement", junk)), REQUESTOR_ID)


# -- all orders


def crossing(pair: Pair, agreement_id: str, name: str) -> None:
    """One of the things that agents may do at the same time."""
    match name:
        case "approve":
            pair.approve(agreement_id)
        case "cancel":
            pair.r.ask(CancelAgreement(agreement_id, REASON))
        case "reject":
            pair.p.ask(RejectAgreement(agreement_id, '{"message":"no"}'))
        case "terminate R":
            pair.r.ask(TerminateAgreement(agreement_id, REASON))
        case "terminate P":
            pair.p.ask(TerminateAgreement(agreement_id, '{"message":"bye"}'))
        case "deliver R" | "deliver P":
            link = (R_ADDRESS, P_ADDRESS) if name[-1] == "P" else (P_ADDRESS, R_ADDRESS)
            if link in pair.waiting():
                pair.deliver(link)
        case "late R":
            pair.r.at(61)
        case "late P":
            pair.p.at(61)


@pytest.mark.parametrize("actions", list(itertools.combinations(["approve", "cancel", "reject", "late R", "late P"], 3)))
def test_all_orders_of_decisions_and_deliveries_converge(actions: tuple[str, ...]) -> None:
    for order in itertools.permutations([*actions, "deliver R", "deliver P"]):
        pair = Pair()
        agreement_id = pair.pending(60)
        for name in order:
            crossing(pair, agreement_id, name)
        pair.settle()
        pair.pass_time(61 + agreement_moves.APPROVAL_S)
        pair.settle()
        states = pair.states(agreement_id)
        assert states[0] == states[1], (order, states)
        assert states[0] in ("Approved", "Cancelled", "Rejected", "Expired", "Terminated"), (order, states)
        if "Terminated" in states:  # the commit came too late
            assert "late P" in order
            assert "deliver R" in order
        assert not pair.r.violations, order
        assert not pair.p.violations, order


def test_termination_from_both_sides_at_once(pair: Pair) -> None:
    for order in itertools.permutations(["terminate R", "terminate P", "deliver R", "deliver P"]):
        pair = Pair()
        agreement_id = pair.approved()
        for name in order:
            crossing(pair, agreement_id, name)
        pair.settle()
        rows = [play.rows[f"agreement/{agreement_id}"] for play in (pair.r, pair.p)]
        assert [row.state for row in rows] == ["Terminated", "Terminated"]
        assert rows[0].terminator == rows[1].terminator
        assert rows[0].reason == rows[1].reason
        ends = [send for send in pair.unlinked if isinstance(send.message, AgreementEnded)]
        assert len(ends) == 4, order  # activity and ledger of both sides, once each
        for play in (pair.r, pair.p):
            assert sum(isinstance(event, AgreementTerminatedEvent) for event in play.feed("agreements")) == 1


@pytest.mark.parametrize("block", range(10))
def test_random_schedules_converge(block: int) -> None:
    """50 seeds a block: agents act at random, messages arrive late or get lost with or without having arrived."""
    for seed in range(block * 50, block * 50 + 50):
        run_schedule(seed)


def run_schedule(seed: int) -> None:
    rng = random.Random(seed)
    pair = Pair()
    agreement_id = pair.created(60)
    pair.confirm(agreement_id)
    names = ["approve", "cancel", "reject", "terminate R", "terminate P", "late R", "late P"]
    weights = [6, 1, 1, 2, 2, 1, 1]
    for _ in range(rng.randint(1, 12)):
        waiting = pair.waiting()
        if waiting and rng.random() < 0.5:
            link = rng.choice(waiting)
            if rng.random() < 0.15:
                pair.lose(link, arrived=rng.random() < 0.5)
            else:
                pair.deliver(link)
        elif f"agreement/{agreement_id}" in pair.p.rows:
            crossing(pair, agreement_id, rng.choices(names, weights)[0])
    pair.settle(rng)
    pair.pass_time(61 + agreement_moves.APPROVAL_S)
    pair.settle(rng)
    if f"agreement/{agreement_id}" not in pair.p.rows:
        assert pair.r.rows[f"agreement/{agreement_id}"].state in ("Cancelled", "Expired", "Rejected"), seed
        return
    states = pair.states(agreement_id)
    finals = {"Approved", "Cancelled", "Rejected", "Expired", "Terminated"}
    assert set(states) <= finals, (seed, states)
    assert states[0] == states[1], (seed, states)
