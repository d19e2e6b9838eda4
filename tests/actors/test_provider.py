"""The provider agent's machine: negotiation by tables, the life of an agreement, bills, and being killed in between."""

from __future__ import annotations

import itertools
import json
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from worlds.playbook import Playbook, playbook

from actors.provider.machine import Provider
from actors.provider.negotiation import MAX_REJECTED
from actors.provider.rules import Agreed, Situation, Terms, TurnedDown, negotiate, share_of
from actors.provider.turn import ProviderConfig
from golem.exeunit.terms import read_terms
from protocol.amounts import cost
from protocol.property_names import ACCEPT_TIMEOUT, CHOSEN_PLATFORM, COEFFS, EXPIRATION, INTERVAL, LOCAL_CHAIN, PAYMENT_TIMEOUT
from protocol.provider import (
    AcceptAgreement,
    ActivityClosed,
    AgentStarted,
    AgreementArrived,
    AnswerProposal,
    ApprovalEnded,
    AskFunds,
    Capacity,
    CloseActivity,
    EndAgreement,
    EventArrived,
    FindUnit,
    FundsKnown,
    InvoiceIssued,
    InvoiceSent,
    IssueNote,
    NoteIssued,
    NoteRead,
    NoteSent,
    OfferLost,
    OfferPublished,
    OffersChanged,
    OfferSpec,
    PlaceOffer,
    ProposalArrived,
    ReadNote,
    ReadUsage,
    RefuseAgreement,
    RefuseProposal,
    RulesChanged,
    SendInvoice,
    SendNote,
    SessionNamed,
    StartUnit,
    StopAgent,
    StopUnit,
    TerminationEnded,
    UnitExited,
    UnitRunning,
    UsageRead,
    WatchOffer,
    WithdrawOffer,
    WriteInvoice,
)
from protocol.types import timestamp_text

REQUESTOR = "0x" + "1" * 40
OTHER = "0x" + "2" * 40
NOW = 1_800_000_000.0
OFFER = {
    "golem.com.payment.platform.erc20-local-tglm.address": "0x" + "9" * 40,
    "golem.com.usage.vector": ["golem.usage.cpu_sec", "golem.usage.duration_sec"],
    "golem.runtime.name": "wasmtime",
    COEFFS: [0.0001, 0.00005, 0.0],
    ACCEPT_TIMEOUT: 240,
    INTERVAL: 120,
    PAYMENT_TIMEOUT: 120,
}
DEMAND = {
    CHOSEN_PLATFORM: "erc20-local-tglm",
    EXPIRATION: int((NOW + 1000) * 1000),
    ACCEPT_TIMEOUT: 240,
    INTERVAL: 120,
    PAYMENT_TIMEOUT: 120,
    "golem.srv.caps.multi-activity": True,
}
SPEC = OfferSpec("wasmtime", "wasmtime", json.dumps(OFFER), "public")
PAYER = "golem.com.payment.platform.erc20-local-tglm.address"
REJECT, KEEP = "reject", "keep"
GONE = object()


# -- the rules
@pytest.mark.parametrize(
    ("demand", "offer", "outcome"),
    [
        ({}, {}, KEEP),
        ({CHOSEN_PLATFORM: GONE}, {}, (REJECT, False)),
        ({CHOSEN_PLATFORM: "erc20-mainnet-glm"}, {}, (REJECT, False)),
        ({CHOSEN_PLATFORM: 7}, {}, (REJECT, False)),
        ({PAYER: REQUESTOR}, {}, KEEP),
        ({PAYER: "0x" + "1" * 40}, {}, KEEP),
        ({PAYER: OTHER}, {}, (REJECT, True)),
        ({PAYER: "0x" + "0" * 40}, {}, (REJECT, True)),
        ({PAYER: ["0x" + "1" * 40]}, {}, (REJECT, True)),
        ({PAYER: REQUESTOR + "0"}, {}, (REJECT, True)),
        ({EXPIRATION: GONE}, {}, (REJECT, True)),
        ({EXPIRATION: float((NOW + 1000) * 1000)}, {}, (REJECT, True)),
        ({EXPIRATION: True}, {}, (REJECT, True)),
        ({EXPIRATION: int((NOW + 299) * 1000)}, {}, (REJECT, True)),
        ({EXPIRATION: int((NOW + 301) * 1000)}, {}, KEEP),
        ({EXPIRATION: int((NOW + 1801) * 1000), ACCEPT_TIMEOUT: GONE}, {}, (REJECT, False)),
        ({EXPIRATION: int((NOW + 1801) * 1000)}, {}, KEEP),
        ({EXPIRATION: int((NOW + 200 * 366 * 86400) * 1000)}, {}, (REJECT, False)),
        ({ACCEPT_TIMEOUT: 241}, {}, (REJECT, True)),
        ({ACCEPT_TIMEOUT: 4}, {}, (REJECT, True)),
        ({ACCEPT_TIMEOUT: "240"}, {}, (REJECT, True)),
        ({ACCEPT_TIMEOUT: 5}, {}, {ACCEPT_TIMEOUT: 5}),
        ({ACCEPT_TIMEOUT: 120.0}, {}, {ACCEPT_TIMEOUT: 120}),
        ({ACCEPT_TIMEOUT: GONE}, {}, {ACCEPT_TIMEOUT: GONE}),
        ({ACCEPT_TIMEOUT: GONE}, {ACCEPT_TIMEOUT: GONE}, KEEP),
        ({ACCEPT_TIMEOUT: 120}, {ACCEPT_TIMEOUT: 120}, KEEP),
        ({ACCEPT_TIMEOUT: 120}, {ACCEPT_TIMEOUT: GONE}, {ACCEPT_TIMEOUT: 120}),
        ({INTERVAL: 0}, {}, (REJECT, True)),
        ({INTERVAL: 1}, {}, {INTERVAL: 1}),
        ({INTERVAL: 301}, {}, (REJECT, True)),
        ({INTERVAL: GONE}, {}, {INTERVAL: GONE}),
        ({PAYMENT_TIMEOUT: 86400}, {}, {PAYMENT_TIMEOUT: 86400}),
        ({PAYMENT_TIMEOUT: 86401}, {}, (REJECT, True)),
        ({PAYMENT_TIMEOUT: GONE}, {}, {PAYMENT_TIMEOUT: GONE}),
        ({PAYMENT_TIMEOUT: GONE, EXPIRATION: int((NOW + 18000) * 1000)}, {}, (REJECT, True)),
        ({PAYMENT_TIMEOUT: GONE, EXPIRATION: int((NOW + 17999) * 1000)}, {}, {PAYMENT_TIMEOUT: GONE}),
        ({COEFFS: [0.0001, 0.00005, 0.0]}, {}, KEEP),
        ({COEFFS: [0.0002, 0.00005, 1]}, {}, {COEFFS: [0.0002, 0.00005, 1.0]}),
        ({COEFFS: [0.00009, 0.00005, 0.0]}, {}, (REJECT, True)),
        ({COEFFS: [0.0001, 0.00005]}, {}, (REJECT, True)),
        ({COEFFS: [0.0001, float("nan"), 0.0]}, {}, (REJECT, True)),
        ({COEFFS: "free"}, {}, (REJECT, True)),
        ({"golem.srv.comp.payload": "e30="}, {}, (REJECT, True)),
        ({"golem.srv.comp.payload": "e30="}, {"golem.srv.caps.payload-manifest": True}, KEEP),
    ],
)
def test_rules(demand: dict[str, Any], offer: dict[str, Any], outcome: Any) -> None:
    wanted = {key: value for key, value in {**DEMAND, **demand}.items() if value is not GONE}
    ours = {key: value for key, value in {**OFFER, **offer}.items() if value is not GONE}
    found = negotiate(Terms(), Situation(REQUESTOR, NOW, 0), wanted, ours)
    if isinstance(outcome, tuple):
        assert isinstance(found, TurnedDown)
        assert found.final is outcome[1], found.message
        return
    assert isinstance(found, Agreed), found
    changes = {} if outcome == KEEP else outcome
    assert found.offer == {key: value for key, value in {**ours, **changes}.items() if value is not GONE}
    assert found.changed is bool(changes)


@pytest.mark.parametrize(
    ("terms", "situation", "final"),
    [
        (Terms(max_agreements=2), Situation(REQUESTOR, NOW, 2), False),
        (Terms(blacklist=frozenset({REQUESTOR})), Situation(REQUESTOR, NOW, 0), True),
        (Terms(allow_only=frozenset({OTHER})), Situation(REQUESTOR, NOW, 0), True),
        (Terms(), Situation(REQUESTOR, NOW, 0, stopping=True), False),
    ],
)
def test_rules_about_the_situation(terms: Terms, situation: Situation, final: bool) -> None:
    found = negotiate(terms, situation, DEMAND, OFFER)
    assert isinstance(found, TurnedDown)
    assert found.final is final


def test_adjustments_settle_after_one_round() -> None:
    demand = {**DEMAND, ACCEPT_TIMEOUT: 100, INTERVAL: 60}
    del demand[PAYMENT_TIMEOUT]
    first = negotiate(Terms(), Situation(REQUESTOR, NOW, 0), demand, OFFER)
    assert isinstance(first, Agreed)
    assert first.changed
    again = negotiate(Terms(), Situation(REQUESTOR, NOW, 0), demand, first.offer)
    assert again == Agreed(first.offer, False)
    assert all(isinstance(price, float) for price in first.offer[COEFFS]), "a float stays a float"


def test_cost_is_exact_and_never_above_the_product() -> None:
    assert cost((0.1, 0.2, 0.3), (3.0, 7.0)) == "2"
    assert cost((6.9e-06, 1.4e-06, 0.0), (12.5, 120.3)) == "0.00025467"
    assert cost((0.0,), ()) == "0"
    third = 0.3333333333333333
    assert cost((third, 0.0), (third,)) == "0.111111111111111088", "cut at a wei, not rounded up"
    with pytest.raises(ValueError, match="do not fit"):
        cost((0.1, 0.2), (1.0, 2.0))


def test_hostile_demands_are_answered_whatever_they_hold() -> None:
    rng = random.Random(7)
    values = [None, True, -1, 0, 1, 10**400, -(10**30), 1e308, float("nan"), float("inf"), "", "x" * 9999, [], {}, [[]], [1e400]]
    names = [CHOSEN_PLATFORM, EXPIRATION, ACCEPT_TIMEOUT, INTERVAL, PAYMENT_TIMEOUT, COEFFS, "golem.srv.comp.payload", "x"]
    for _ in range(5000):
        demand = {**DEMAND, **{rng.choice(names): rng.choice(values) for _ in range(rng.randint(1, 4))}}
        if rng.random() < 0.2:
            demand[COEFFS] = [rng.choice(values) for _ in range(3)]
        found = negotiate(Terms(), Situation(REQUESTOR, NOW, 0), demand, OFFER)
        if isinstance(found, Agreed):
            assert all(isinstance(one, float) and one < 1e16 for one in found.offer[COEFFS])
            assert found.offer["golem.runtime.name"] == "wasmtime"
        else:
            assert len(found.message) < 500


# -- the agent
class Agent:
    """A machine with its ports played by the test."""

    def __init__(self, **config: Any) -> None:
        self.config = config
        self.play: Playbook = playbook(Provider("agent", self._config("run-1")), now=NOW)
        self.offer_id = "offer-1"

    def _config(self, instance: str) -> ProviderConfig:
        terms = Terms(max_agreements=self.config.get("max_agreements", 1))
        return ProviderConfig(instance, terms)

    def tell(self, message: Any) -> None:
        self.play.tell(message)

    def rest(self, kind: type) -> list[Any]:
        """Take what port `rest`, or `proposals`, was told of this kind."""
        return self._take("rest", kind) + self._take("proposals", kind)

    def processes(self, kind: type) -> list[Any]:
        return self._take("processes", kind)

    def _take(self, port: str, kind: type) -> list[Any]:
        found = [send for send in self.play.sends if send.to == port and isinstance(send.message, kind)]
        self.play.sends = [send for send in self.play.sends if send not in found]
        return [send.message for send in found]

    def begin(self) -> Agent:
        answer = self.play.ask(AgentStarted("prov-abcd", (SPEC,)))
        assert answer == SessionNamed("prov-abcd")
        (publish,) = self.rest(PlaceOffer)
        self.tell(OfferPublished("wasmtime", publish.serial, self.offer_id))
        assert self.rest(WatchOffer) == [WatchOffer("wasmtime", self.offer_id)]
        return self

    def crash(self) -> None:
        """Another run of the agent on the same rows and timers; what was on its way to the ports is lost with it."""
        self.play.machine = Provider("agent", self._config("run-2"))
        self.play.sends.clear()
        self.play.ask(AgentStarted("prov-other", (SPEC,)))

    def propose(self, proposal_id: str = "P-1", requestor: str = REQUESTOR, origin: str = "", **changes: Any) -> None:
        demand, ours = json.dumps({**DEMAND, **changes}), json.dumps(OFFER)
        self.tell(ProposalArrived("wasmtime", self.offer_id, proposal_id, requestor, demand, ours, "(&)", origin))
        self._fund()

    def _fund(self) -> None:
        """The chain says that whoever asks has enough."""
        for asked in self.rest(AskFunds):
            self.tell(FundsKnown(asked.requestor, asked.platform, "1000"))

    def offered_agreement(self, agreement_id: str = "a1", demand: Any = None, offer: Any = None) -> None:
        agreement = {
            "agreementId": agreement_id,
            "timestamp": timestamp_text(self.play.now),
            "demand": {"requestorId": REQUESTOR, "properties": {**DEMAND, **(demand or {})}},
            "offer": {"providerId": OTHER, "properties": {**OFFER, **(offer or {})}},
        }
        self.tell(AgreementArrived("wasmtime", self.offer_id, json.dumps(agreement)))
        self._fund()

    def approved(self, agreement_id: str = "a1", **terms: Any) -> Agent:
        self.offered_agreement(agreement_id, **terms)
        (approve,) = self.rest(AcceptAgreement)
        assert approve.session_id == "prov-abcd"
        self.tell(ApprovalEnded(agreement_id, True))
        return self

    def event(self, feed: str, kind: str, subject: str, related: str = "", text: str = "") -> EventArrived:
        self.play.now += 0.001
        event = EventArrived(feed, self.play.now, kind, subject, related, text)
        self.tell(event)
        return event

    def started(self, activity_id: str = "x1", agreement_id: str = "a1", pid: int = 100) -> Agent:
        self.event("activities", "CreateActivity", activity_id, agreement_id)
        assert [one.activity_id for one in self.processes(StartUnit)] == [activity_id]
        self.tell(UnitRunning(activity_id, pid, 5000 + pid))
        return self

    def exited(self, activity_id: str = "x1", usage: list[float] | None = None, code: int | None = 0) -> CloseActivity:
        self.tell(UnitExited(activity_id, code))
        (close,) = self.rest(CloseActivity)
        self.tell(ActivityClosed(activity_id, usage))
        return close  # type: ignore[no-any-return]

    def issue(self) -> IssueNote:
        """Let the last debit note be issued and sent."""
        (note,) = self.rest(IssueNote)
        self.tell(NoteIssued(note.activity_id, note.number, f"note-{note.activity_id}-{note.number}"))
        (send,) = self.rest(SendNote)
        self.tell(NoteSent(send.activity_id, send.number, True))
        return note  # type: ignore[no-any-return]

    def state(self, agreement_id: str = "a1") -> str:
        return self.play.rows[f"agreement/{agreement_id}"].state  # type: ignore[no-any-return]


def test_a_proposal_is_countered_or_rejected() -> None:
    agent = Agent().begin()
    agent.propose(**{ACCEPT_TIMEOUT: 60})
    (counter,) = agent.rest(AnswerProposal)
    properties = json.loads(counter.properties)
    assert (counter.proposal_id, properties[ACCEPT_TIMEOUT], properties[COEFFS]) == ("P-1", 60, [0.0001, 5e-05, 0.0])
    agent.propose("P-2", **{ACCEPT_TIMEOUT: 999})
    (reject,) = agent.rest(RefuseProposal)
    reason = json.loads(reject.reason)
    assert reason["golem.proposal.rejection.is-final"] is True
    assert "accept-timeout" in reason["message"]
    assert [one.reason for one in agent.play.rows["refusals"].refusals] == [reason["message"]]


@pytest.mark.parametrize(("theirs", "agrees"), [("00aa", True), ("00ab", False), (None, False)])
def test_who_is_on_another_dev_chain_or_names_none_gets_no_agreement(theirs: str | None, agrees: bool) -> None:
    agent = Agent().begin()
    demand = json.dumps({**DEMAND, **({LOCAL_CHAIN: theirs} if theirs else {})})
    ours = json.dumps({**OFFER, LOCAL_CHAIN: "00aa"})
    agent.tell(ProposalArrived("wasmtime", agent.offer_id, "P-1", REQUESTOR, demand, ours, "(&)"))
    assert bool(agent.rest(AnswerProposal)) is agrees
    rejected = [json.loads(one.reason)["message"] for one in agent.rest(RefuseProposal)]
    assert agrees or "paid on the dev chain 00aa; golem.com.payment.local-chain of the demand is" in rejected[0]


def test_refusals_are_bounded() -> None:
    agent = Agent().begin()
    for number in range(30):
        agent.propose(f"P-{number}", **{INTERVAL: 10_000_000 + number})
    refusals = agent.play.rows["refusals"].refusals
    assert len(refusals) == 20
    assert refusals[-1].reason.endswith("10000029.")


def test_a_proposal_that_there_is_no_room_for_waits_a_moment() -> None:
    agent = Agent().begin().approved()
    agent.propose("P-again", OTHER)  # came before the news that the agreement has ended
    assert agent.rest(RefuseProposal) == []
    agent.event("agreements", "AgreementTerminatedEvent", "a1", "Requestor", "done")
    assert [one.proposal_id for one in agent.rest(AnswerProposal)] == ["P-again"]
    agent.play.at(+60)
    assert agent.rest(RefuseProposal) == agent.rest(AnswerProposal) == []
    assert not list(agent.play.rows.prefix("rejected/"))


def test_a_proposal_does_not_wait_for_long() -> None:
    agent = Agent().begin().approved()
    agent.propose("P-busy", OTHER)
    agent.crash()
    agent.play.at(+ProviderConfig("").patience_s)
    (reject,) = agent.rest(RefuseProposal)
    assert (reject.proposal_id, "Agreements limit: 1" in reject.reason) == ("P-busy", True)
    assert json.loads(reject.reason)["golem.proposal.rejection.is-final"] is False


def test_of_many_that_wait_the_oldest_is_rejected() -> None:
    agent = Agent().begin().approved()
    for number in range(MAX_REJECTED + 1):
        agent.propose(f"P-{number}", OTHER)
    assert [one.proposal_id for one in agent.rest(RefuseProposal)] == ["P-0"]
    assert len(list(agent.play.rows.prefix("rejected/"))) == MAX_REJECTED


def test_who_asks_for_much_pushes_out_nobody_who_waits() -> None:
    agent = Agent().begin().approved()
    agent.propose("P-other", "0x" + "7" * 40)
    for number in range(MAX_REJECTED + 50):
        agent.propose(f"P-{number}", OTHER)
    assert "P-other" not in [one.proposal_id for one in agent.rest(RefuseProposal)]
    assert agent.play.rows["rejected/P-other"].waits


def test_many_identities_of_one_address_push_out_nobody_who_waits() -> None:
    agent = Agent().begin().approved()
    agent.propose("P-other", "0x" + "7" * 40, "198.51.100.1")
    for number in range(MAX_REJECTED + 50):
        agent.propose(f"P-{number}", f"0x{number:040x}", "203.0.113.9")
    assert "P-other" not in [one.proposal_id for one in agent.rest(RefuseProposal)]
    assert agent.play.rows["rejected/P-other"].waits


def test_what_was_rejected_for_lack_of_room_is_taken_up_when_there_is_room() -> None:
    agent = Agent().begin().approved()
    agent.propose("P-later", OTHER)
    agent.play.at(+ProviderConfig("").patience_s)
    assert len(agent.rest(RefuseProposal)) == 1
    agent.event("agreements", "AgreementTerminatedEvent", "a1", "Requestor", "done")
    assert [one.proposal_id for one in agent.rest(AnswerProposal)] == ["P-later"]
    assert not list(agent.play.rows.prefix("rejected/"))


def test_an_agreement_must_be_what_was_negotiated() -> None:
    agent = Agent().begin()
    agent.offered_agreement(demand={INTERVAL: 60})
    (reject,) = agent.rest(RefuseAgreement)
    assert json.loads(reject.reason)["message"] == "Negotiations aren't finished."
    agent.offered_agreement("a2", offer={"golem.com.usage.vector": ["golem.usage.cpu_sec"]})
    assert len(agent.rest(RefuseAgreement)) == 1
    assert not list(agent.play.rows.prefix("active/"))


def test_the_limit_counts_from_the_approval_on() -> None:
    agent = Agent(max_agreements=2).begin()
    for name in ("a1", "a2", "a3"):
        agent.offered_agreement(name)
    assert [one.agreement_id for one in agent.rest(AcceptAgreement)] == ["a1", "a2"]
    assert [one.agreement_id for one in agent.rest(RefuseAgreement)] == ["a3"]
    agent.tell(ApprovalEnded("a1", False, "410: Cancelled"))
    agent.offered_agreement("a4")
    assert [one.agreement_id for one in agent.rest(AcceptAgreement)] == ["a4"]


def test_life_of_an_agreement_with_notes_and_an_invoice() -> None:
    agent = Agent().begin().approved().started()
    agent.play.at(130)
    assert agent.rest(ReadUsage) == [ReadUsage("x1")]
    agent.tell(UsageRead("x1", [100.0, 119.5]))
    first = agent.issue()
    assert (first.amount, first.number, first.previous_id) == ("0.015975", 1, "")
    assert first.due_at == agent.play.now + 120, "the first note after a payment timeout is payable"
    agent.event("debit-notes", "DebitNoteAcceptedEvent", "note-x1-1")
    agent.event("debit-notes", "DebitNoteSettledEvent", "note-x1-1")
    agent.event("activities", "DestroyActivity", "x1", "a1")
    assert agent.processes(StopUnit) == [StopUnit("x1", 100, 5100)]
    agent.event("agreements", "AgreementTerminatedEvent", "a1", "Requestor", "done")
    assert not agent.rest(WriteInvoice), "not before the last debit note"
    assert agent.exited(usage=[110.0, 140.0]).reason == "destroyed"
    last = agent.issue()
    assert (last.amount, last.number, last.previous_id, last.usage) == ("0.018", 2, "note-x1-1", [110.0, 140.0])
    (invoice,) = agent.rest(WriteInvoice)
    assert (invoice.amount, invoice.activity_ids, invoice.due_at) == ("0.018", ("x1",), agent.play.now + 120)
    agent.tell(InvoiceIssued("a1", "inv-1"))
    assert agent.rest(SendInvoice) == [SendInvoice("a1", "inv-1")]
    agent.tell(InvoiceSent("a1"))
    agent.event("invoices", "InvoiceAcceptedEvent", "inv-1")
    agent.event("invoices", "InvoiceSettledEvent", "inv-1")
    assert agent.play.rows["agreement/a1"].invoice == "Settled"
    assert not agent.rest(EndAgreement), "the requestor did"
    agent.play.at(8 * 86400)
    left = [key for key in agent.play.rows if not key.startswith(("agent", "capacity", "cursor", "offer"))]
    assert left == []


def test_totals_never_decrease() -> None:
    agent = Agent().begin().approved().started()
    agent.play.at(125)
    agent.rest(ReadUsage)
    agent.tell(UsageRead("x1", [50.0, 100.0]))
    first = agent.issue()
    agent.exited(usage=[10.0, 130.0], code=137)
    last = agent.issue()
    assert last.usage == [50.0, 130.0]
    assert Decimal(last.amount) > Decimal(first.amount)
    assert last.amount == cost((0.0001, 0.00005, 0.0), last.usage)


def test_activities_run_one_after_another() -> None:
    agent = Agent().begin().approved().started()
    agent.event("activities", "CreateActivity", "x2", "a1")
    assert [one.activity_id for one in agent.rest(CloseActivity)] == ["x2"], "only one at a time"
    agent.event("activities", "DestroyActivity", "x1", "a1")
    agent.event("activities", "CreateActivity", "x3", "a1")
    assert not agent.processes(StartUnit), "it waits for the process before it"
    agent.exited("x1", [1.0, 2.0])
    assert [one.activity_id for one in agent.processes(StartUnit)] == ["x3"]
    agent.issue()
    agent.tell(UnitRunning("x3", 101, 1))
    agent.event("agreements", "AgreementTerminatedEvent", "a1", "Requestor")
    agent.exited("x3", [3.0, 4.0])
    agent.issue()
    (invoice,) = agent.rest(WriteInvoice)
    assert invoice.activity_ids == ("x1", "x3")
    assert invoice.amount == "0.0007"


def test_a_destroyed_activity_that_was_only_starting_never_stays() -> None:
    agent = Agent().begin().approved()
    agent.event("activities", "CreateActivity", "x1", "a1")
    agent.event("activities", "DestroyActivity", "x1", "a1")
    agent.tell(UnitRunning("x1", 100, 7))
    assert agent.processes(StopUnit) == [StopUnit("x1", 100, 7)]
    assert agent.exited("x1").reason == "destroyed"


def test_without_multi_activity_the_agreement_ends_with_its_first_activity() -> None:
    agent = Agent().begin().approved(demand={"golem.srv.caps.multi-activity": False}).started()
    agent.exited(usage=[1.0, 1.0])
    (terminate,) = agent.rest(EndAgreement)
    assert json.loads(terminate.reason)["golem.provider.code"] == "Success"


def test_an_idle_agreement_is_ended() -> None:
    agent = Agent().begin().approved()
    agent.play.at(89)
    assert agent.state() == "Approved"
    agent.started()
    agent.play.at(100)
    assert agent.state() == "Approved", "an activity runs"
    agent.exited(usage=[1.0, 1.0])
    agent.play.at(91)
    (terminate,) = agent.rest(EndAgreement)
    assert json.loads(terminate.reason)["golem.provider.code"] == "NoActivity"
    agent.issue()
    agent.tell(TerminationEnded("a1"))
    assert len(agent.rest(WriteInvoice)) == 1


@pytest.mark.parametrize("every_s", [3, 20, 60])
def test_an_agent_that_starts_again_and_again_does_not_begin_the_idle_time_anew(every_s: int) -> None:
    agent = Agent().begin().approved()
    begun = agent.play.now
    agent.play.at(every_s)
    while not agent.rest(EndAgreement) and agent.play.now < begun + 1000:
        agent.crash()
        agent.play.at(every_s)
    assert 90 <= agent.play.now - begun <= 180 + 2 * every_s


def test_what_a_requestor_asked_while_the_agent_was_away_is_read_before_the_agreement_is_idle() -> None:
    agent = Agent().begin().approved()
    agent.play.now += 100  # nobody was there to end it
    agent.crash()
    agent.play.at(1)
    assert agent.state() == "Approved"
    agent.started()
    agent.play.at(100)
    assert agent.state() == "Approved"


def test_room_is_free_when_the_last_process_is_gone() -> None:
    agent = Agent().begin().approved().started()
    agent.play.at(1001)  # expired: terminated, but the exe-unit is still there
    agent.propose("P-2", **{EXPIRATION: int((agent.play.now + 1000) * 1000)})
    assert not agent.rest(AnswerProposal)
    agent.exited(usage=[1.0, 1.0])
    assert [one.proposal_id for one in agent.rest(AnswerProposal)] == ["P-2"], "whenever the node hears of the end"


def test_an_agreement_expires() -> None:
    agent = Agent().begin().approved(demand={EXPIRATION: int((NOW + 320) * 1000)}).started()
    agent.play.at(321)
    (terminate,) = agent.rest(EndAgreement)
    assert json.loads(terminate.reason)["golem.provider.code"] == "Expired"
    assert agent.processes(StopUnit) == [StopUnit("x1", 100, 5100)]


def noted(**terms: Any) -> Agent:
    """An agreement whose first debit note is with the requestor."""
    agent = Agent().begin().approved(**terms).started()
    agent.play.at(121)
    agent.rest(ReadUsage)
    agent.tell(UsageRead("x1", [1.0, 120.0]))
    agent.issue()
    return agent


@pytest.mark.parametrize(
    ("wait_s", "deadline", "status", "code"),
    [
        (60, "accept", "RECEIVED", "DebitNotesDeadline"),
        (121, "pay", "ACCEPTED", "DebitNoteNotPaid"),
        (60, "accept", "ACCEPTED", ""),
    ],
)
def test_deadlines_of_debit_notes(wait_s: float, deadline: str, status: str, code: str) -> None:
    short = {ACCEPT_TIMEOUT: 60} if deadline == "accept" else {}
    agent = noted(demand=short, offer=short)
    if deadline == "pay":
        agent.event("debit-notes", "DebitNoteAcceptedEvent", "note-x1-1")
    agent.play.at(wait_s)
    assert agent.rest(ReadNote) == [ReadNote("x1", 1, "note-x1-1", deadline)], "the node is asked before anything is done"
    agent.tell(NoteRead("x1", 1, deadline, status))
    codes = [json.loads(one.reason)["golem.provider.code"] for one in agent.rest(EndAgreement)]
    assert codes == ([code] if code else [])


@pytest.mark.parametrize(
    ("kind", "code"),
    [("DebitNoteRejectedEvent", "DebitNoteRejected"), ("DebitNoteCancelledEvent", "DebitNoteCancelled")],
)
def test_a_refused_debit_note_ends_the_agreement(kind: str, code: str) -> None:
    agent = noted()
    agent.event("debit-notes", kind, "note-x1-1")
    assert [json.loads(one.reason)["golem.provider.code"] for one in agent.rest(EndAgreement)] == [code]


def test_a_requestor_that_takes_no_debit_note_is_unreachable() -> None:
    agent = Agent().begin().approved().started()
    agent.play.at(121)
    agent.rest(ReadUsage)
    agent.tell(UsageRead("x1", [1.0, 120.0]))
    agent.tell(NoteIssued("x1", 1, "n1"))
    (send,) = agent.rest(SendNote)
    assert send.give_up_at == agent.play.now + 240
    agent.tell(NoteSent("x1", 1, False, "504"))
    assert [json.loads(one.reason)["golem.provider.code"] for one in agent.rest(EndAgreement)] == ["RequestorUnreachable"]


def test_payable_notes_keep_their_distance() -> None:
    short = {INTERVAL: 50, PAYMENT_TIMEOUT: 120}
    agent = Agent().begin().approved(demand=short, offer=short).started()
    due = []
    for _ in range(6):
        agent.play.at(50)
        assert len(agent.rest(ReadUsage)) == 1, "each interval"
        agent.tell(UsageRead("x1", [1.0, 1.0]))
        note = agent.issue()
        agent.event("debit-notes", "DebitNoteSettledEvent", f"note-x1-{note.number}")
        due.append(note.due_at is not None)
    assert due == [False, False, True, False, False, True]
    agent.exited(usage=[2.0, 2.0])
    assert agent.issue().due_at is not None, "the last one is payable"


def test_no_due_dates_without_a_payment_timeout() -> None:
    agent = Agent().begin()
    agreement = {
        "agreementId": "a1",
        "timestamp": timestamp_text(NOW),
        "demand": {"requestorId": REQUESTOR, "properties": {k: v for k, v in DEMAND.items() if k != PAYMENT_TIMEOUT}},
        "offer": {"providerId": OTHER, "properties": {k: v for k, v in OFFER.items() if k != PAYMENT_TIMEOUT}},
    }
    agent.tell(AgreementArrived("wasmtime", agent.offer_id, json.dumps(agreement)))
    agent.rest(AcceptAgreement)
    agent.tell(ApprovalEnded("a1", True))
    agent.started().exited(usage=[1.0, 1.0])
    assert agent.issue().due_at is None


def test_events_are_handled_once() -> None:
    agent = Agent().begin().approved()
    event = agent.event("activities", "CreateActivity", "x1", "a1")
    assert len(agent.processes(StartUnit)) == 1
    agent.tell(event)
    assert not agent.processes(StartUnit)
    assert agent.play.rows["cursor/activities"].at == event.at


def test_what_comes_twice_counts_once() -> None:
    agent = Agent().begin()
    event = agent.event("activities", "CreateActivity", "x9", "nothing")
    agent.tell(event)
    assert len(agent.rest(CloseActivity)) == 1
    agent.offered_agreement()
    agent.offered_agreement()
    assert len(agent.rest(AcceptAgreement)) == 1
    assert not agent.rest(RefuseAgreement)
    agent.tell(ApprovalEnded("a1", True))
    agent.started()
    agent.event("activities", "CreateActivity", "x1", "a1")
    assert not agent.processes(StartUnit)
    assert not agent.rest(CloseActivity), "the activity that runs is not ended by a repetition"
    agent.event("agreements", "AgreementTerminatedEvent", "a1", "Requestor")
    agent.exited(usage=[1.0, 1.0])
    agent.issue()
    agent.event("agreements", "AgreementTerminatedEvent", "a1", "Requestor")
    agent.tell(TerminationEnded("a1"))
    assert len(agent.rest(WriteInvoice)) == 1


def test_one_note_of_an_activity_is_issued_at_a_time() -> None:
    agent = Agent().begin().approved().started()
    agent.play.at(121)
    agent.rest(ReadUsage)
    agent.tell(UsageRead("x1", [1.0, 120.0]))
    (first,) = agent.rest(IssueNote)
    agent.play.at(120)
    assert not agent.rest(ReadUsage), "the node has not taken the first one yet"
    agent.exited(usage=[2.0, 240.0])
    assert not agent.rest(IssueNote), "nor may the last one pass it"
    agent.tell(NoteIssued("x1", first.number, "n1"))
    agent.rest(SendNote)
    last = agent.issue()
    assert (last.number, last.previous_id, last.usage) == (2, "n1", [2.0, 240.0])


def test_an_accepted_note_has_no_accept_deadline() -> None:
    short = {ACCEPT_TIMEOUT: 60}
    agent = noted(demand=short, offer=short)
    deadline = agent.play.timers["accept/x1/1"][1]
    agent.event("debit-notes", "DebitNoteAcceptedEvent", "note-x1-1")
    assert "accept/x1/1" not in agent.play.timers
    agent.play.tell(deadline)  # it fired just before
    assert not agent.rest(ReadNote)


def test_a_waiting_activity_may_be_destroyed() -> None:
    agent = Agent().begin().approved().started()
    agent.event("activities", "DestroyActivity", "x1", "a1")
    agent.event("activities", "CreateActivity", "x2", "a1")
    agent.event("activities", "CreateActivity", "x3", "a1")
    agent.event("activities", "DestroyActivity", "x2", "a1")
    assert [one.activity_id for one in agent.rest(CloseActivity)] == ["x2"]
    assert not agent.processes(StartUnit), "x1 is still there"
    agent.exited("x1", [1.0, 1.0])
    assert [one.activity_id for one in agent.processes(StartUnit)] == ["x3"]


def test_a_stale_offer_is_withdrawn() -> None:
    agent = Agent()
    agent.play.ask(AgentStarted("prov-abcd", (SPEC,)))
    (first,) = agent.rest(PlaceOffer)
    agent.play.at(1)
    agent.crash()
    (second,) = agent.rest(PlaceOffer)
    agent.tell(OfferPublished("wasmtime", first.serial, "offer-old"))
    agent.tell(OfferPublished("wasmtime", second.serial, "offer-new"))
    assert agent.rest(WithdrawOffer) == [WithdrawOffer("offer-old")]
    assert agent.rest(WatchOffer) == [WatchOffer("wasmtime", "offer-new")]


def test_changed_presets_replace_offers() -> None:
    agent = Agent().begin()
    dearer = OfferSpec("wasmtime", "wasmtime", json.dumps({**OFFER, COEFFS: [1.0, 1.0, 0.0]}), "public")
    other = OfferSpec("vm", "vm", json.dumps(OFFER), "public")
    agent.tell(OffersChanged((dearer, other)))
    assert agent.rest(WithdrawOffer) == [WithdrawOffer("offer-1")]
    assert sorted(one.preset for one in agent.rest(PlaceOffer)) == ["vm", "wasmtime"]
    agent.tell(OffersChanged((dearer, other)))
    assert not agent.rest(PlaceOffer)


def test_changed_rules_count_at_once() -> None:
    agent = Agent().begin()
    agent.tell(RulesChanged((), ()))
    agent.propose("P-1")
    assert [one.proposal_id for one in agent.rest(RefuseProposal)] == ["P-1"]
    agent.offered_agreement("a1")
    assert agent.rest(RefuseAgreement), "what was agreed to before is looked at again"
    agent.tell(RulesChanged((), (REQUESTOR,)))
    agent.propose("P-2")
    assert not agent.rest(RefuseProposal)
    agent.tell(RulesChanged((REQUESTOR,), None))
    agent.propose("P-3")
    assert [one.proposal_id for one in agent.rest(RefuseProposal)] == ["P-3"]
    agent.play.ask(AgentStarted("prov-abcd", (SPEC,)))
    agent.propose("P-4")
    assert not agent.rest(RefuseProposal), "a new run has its own"


def test_an_activity_may_be_faster_than_the_answer_to_the_approval() -> None:
    agent = Agent().begin()
    agent.offered_agreement()
    agent.event("activities", "CreateActivity", "x1", "a1")
    assert len(agent.processes(StartUnit)) == 1
    agent.tell(ApprovalEnded("a1", True))
    assert agent.state() == "Approved"


def test_an_activity_without_an_agreement_is_closed() -> None:
    agent = Agent().begin()
    agent.event("activities", "CreateActivity", "x9", "nothing")
    (close,) = agent.rest(CloseActivity)
    assert close.reason == "creation failed"
    agent.tell(ActivityClosed("x9", None))


def test_an_exe_unit_that_cannot_start_is_reported() -> None:
    agent = Agent().begin().approved()
    agent.event("activities", "CreateActivity", "x1", "a1")
    agent.tell(UnitExited("x1", None, "cannot start the exe-unit: no such file"))
    (close,) = agent.rest(CloseActivity)
    assert (close.reason, close.error_message) == ("creation failed", "cannot start the exe-unit: no such file")


# -- offers
def test_offers_follow_presets_and_the_node() -> None:
    agent = Agent().begin()
    agent.tell(OfferLost("wasmtime", "offer-0"))
    assert not agent.rest(PlaceOffer), "that one is long gone"
    agent.tell(OfferLost("wasmtime", "offer-1"))
    (again,) = agent.rest(PlaceOffer)
    agent.tell(StopAgent())
    agent.tell(OfferPublished("wasmtime", again.serial, "offer-2"))
    assert agent.rest(WithdrawOffer) == [WithdrawOffer("offer-2")], "withdrawn while it was being published"


# -- stop and crash
def test_stopping_withdraws_ends_and_bills() -> None:
    agent = Agent().begin().approved().started()
    agent.tell(StopAgent())
    assert agent.rest(WithdrawOffer) == [WithdrawOffer("offer-1")]
    (terminate,) = agent.rest(EndAgreement)
    assert json.loads(terminate.reason)["golem.provider.code"] == "Shutdown"
    assert len(agent.processes(StopUnit)) == 1
    agent.propose("P-5")
    (reject,) = agent.rest(RefuseProposal)
    assert "shutting down" in reject.reason
    agent.exited(usage=[1.0, 1.0])
    agent.issue()
    agent.tell(TerminationEnded("a1"))
    assert len(agent.rest(WriteInvoice)) == 1


def test_killed_while_running_everything_is_taken_up_again() -> None:
    agent = noted()
    agent.crash()
    assert agent.play.rows["agent"].session_id == "prov-abcd", "the session outlives the process"
    assert agent.rest(WatchOffer) == [WatchOffer("wasmtime", "offer-1")]
    assert agent.processes(FindUnit) == [FindUnit("x1", 100, 5100)]
    agent.tell(UnitExited("x1", None))
    (close,) = agent.rest(CloseActivity)
    assert (close.reason, close.error_message) == ("execution aborted", "the process was lost")
    agent.tell(ActivityClosed("x1", None))
    last = agent.issue()
    assert (last.instance, last.previous_id, last.usage) == ("run-2", "note-x1-1", [1.0, 120.0])


@pytest.mark.parametrize(
    ("steps", "kind", "check"),
    [
        ("approve", AcceptAgreement, lambda one: one.session_id == "prov-abcd"),
        ("start", StartUnit, lambda one: one.activity_id == "x1"),
        ("close", CloseActivity, lambda one: one.reason == "finished"),
        ("issue", IssueNote, lambda one: (one.number, one.instance, one.amount) == (1, "run-2", "0.00015")),
        ("send", SendNote, lambda one: one.note_id == "n1"),
        ("invoice", WriteInvoice, lambda one: (one.instance, one.amount) == ("run-2", "0.00015")),
        ("send invoice", SendInvoice, lambda one: one.invoice_id == "inv-1"),
        ("terminate", EndAgreement, lambda one: json.loads(one.reason)["golem.provider.code"] == "NoActivity"),
    ],
)
def test_killed_at_any_step_the_step_is_repeated(steps: str, kind: type, check: Any) -> None:
    agent = Agent().begin()
    for name, step in _steps(agent):
        step()
        if name == steps:
            break
    agent.crash()
    port = agent.processes if kind is StartUnit else agent.rest
    (again,) = port(kind)
    assert check(again)


def _steps(agent: Agent) -> list[tuple[str, Any]]:
    """The life of an agreement; each step leaves one thing open with a port."""
    return [
        ("approve", agent.offered_agreement),
        ("", lambda: agent.tell(ApprovalEnded("a1", True))),
        ("start", lambda: agent.event("activities", "CreateActivity", "x1", "a1")),
        ("", lambda: agent.tell(UnitRunning("x1", 100, 5100))),
        ("close", lambda: agent.tell(UnitExited("x1", 0))),
        ("issue", lambda: agent.tell(ActivityClosed("x1", [1.0, 1.0]))),
        ("send", lambda: agent.tell(NoteIssued("x1", 1, "n1"))),
        ("", lambda: agent.tell(NoteSent("x1", 1, True))),
        ("terminate", lambda: agent.play.at(91)),
        ("invoice", lambda: agent.tell(TerminationEnded("a1"))),
        ("send invoice", lambda: agent.tell(InvoiceIssued("a1", "inv-1"))),
    ]


def test_an_invoice_the_node_refuses_leaves_no_open_business() -> None:
    agent = Agent().begin()
    for name, step in _steps(agent):
        step()
        if name == "invoice":
            break
    agent.tell(InvoiceIssued("a1", "", "400: unknown agreement"))
    assert agent.play.rows["agreement/a1"].invoice == "Failed"
    agent.crash()
    assert not agent.rest(WriteInvoice)


def test_timers_wait_until_the_agent_has_taken_up_its_work() -> None:
    agent = Agent().begin().approved()
    agent.play.machine = Provider("agent", agent._config("run-2"))
    agent.play.at(95)
    assert agent.state() == "Approved", "the requestor may have asked for an activity while the agent was away"
    agent.play.ask(AgentStarted("prov-other", (SPEC,)))
    agent.play.at(9)
    assert agent.state() == "Approved"
    agent.play.at(2)
    assert agent.state() == "Terminating"


def test_an_approval_that_failed_leaves_nothing() -> None:
    agent = Agent().begin()
    agent.offered_agreement()
    agent.tell(ApprovalEnded("a1", False, "410: Cancelled"))
    assert not list(agent.play.rows.prefix("agreement/"))
    assert not list(agent.play.rows.prefix("active/"))
    assert "Cancelled" in agent.play.rows["refusals"].refusals[-1].reason


# -- hardware
def sized(cpu: int, mem: float, storage: float) -> dict[str, Any]:
    return {"golem.inf.cpu.threads": cpu, "golem.inf.mem.gib": mem, "golem.inf.storage.gib": storage}


def test_an_agreement_takes_what_its_offer_says() -> None:
    assert share_of(sized(2, 1.5, 10.0)) == Capacity(2, 1.5, 10.0)
    assert share_of({"golem.inf.cpu.threads": True, "golem.inf.mem.gib": "much", "golem.inf.storage.gib": -1.0}) == Capacity()
    assert share_of({"golem.inf.mem.gib": float("nan"), "golem.inf.storage.gib": float("inf")}) == Capacity()


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (sized(2, 1.0, 10.0), None),
        (sized(3, 1.0, 10.0), "2 threads left, this offer takes 3"),
        (sized(2, 1.001, 10.0), "1 GiB of memory left, this offer takes 1.001"),
        (sized(1, 0.5, 11.0), "10 GiB of storage left, this offer takes 11"),
    ],
)
def test_agreements_of_all_presets_share_one_machine(second: dict[str, Any], reason: str | None) -> None:
    agent = Agent(max_agreements=9).begin()
    vm = OfferSpec("vm", "vm", json.dumps({**OFFER, "golem.runtime.name": "vm"}), "public")
    agent.tell(OffersChanged((SPEC, vm), Capacity(4, 2.0, 20.0)))
    agent.approved("a1", offer=sized(2, 1.0, 10.0))
    agreement = {
        "agreementId": "a2",
        "timestamp": timestamp_text(agent.play.now),
        "demand": {"requestorId": OTHER, "properties": DEMAND},
        "offer": {"providerId": OTHER, "properties": {**OFFER, "golem.runtime.name": "vm", **second}},
    }
    agent.tell(AgreementArrived("vm", "offer-vm", json.dumps(agreement)))
    if reason is None:
        assert [one.agreement_id for one in agent.rest(AcceptAgreement)] == ["a2"]
        agent.tell(OffersChanged((SPEC, vm), Capacity(2, 1.0, 10.0)))  # the profile shrinks below what is in force
        agent.offered_agreement("a3", offer=sized(1, 0.1, 0.1))
        assert "0 threads left" in agent.rest(RefuseAgreement)[0].reason
        return
    (reject,) = agent.rest(RefuseAgreement)
    assert reason in json.loads(reject.reason)["message"]
    assert json.loads(reject.reason)["golem.proposal.rejection.is-final"] is False
    agent.event("agreements", "AgreementTerminatedEvent", "a1", "Requestor", "done")
    agent.tell(AgreementArrived("vm", "offer-vm", json.dumps({**agreement, "agreementId": "a3"})))
    assert [one.agreement_id for one in agent.rest(AcceptAgreement)] == ["a3"], "what is given back is sold again"


def test_room_that_a_larger_profile_makes_is_offered_to_who_was_rejected() -> None:
    agent = Agent(max_agreements=9).begin()
    agent.tell(OffersChanged((SPEC,), Capacity(1, 1.0, 1.0)))
    large = {**OFFER, **sized(2, 1.0, 1.0)}
    agent.tell(ProposalArrived("wasmtime", agent.offer_id, "P-1", REQUESTOR, json.dumps(DEMAND), json.dumps(large), "(&)"))
    agent.play.at(+10)
    assert "1 threads left" in agent.rest(RefuseProposal)[0].reason
    agent.tell(OffersChanged((SPEC,), Capacity(2, 1.0, 1.0)))
    assert [one.proposal_id for one in agent.rest(AnswerProposal)] == ["P-1"]


def test_whatever_happens_what_is_promised_stays_within_what_there_is() -> None:
    """Agreements of changing offers and sizes come, fail, end and outlive crashes; profiles grow and shrink."""
    rng = random.Random(11)
    refused = accepted = overlapping = 0
    for _ in range(40):
        agent = Agent(max_agreements=4).begin()
        capacity, serial = Capacity(4, 4.0, 40.0), 0
        agent.tell(OffersChanged((SPEC,), capacity))
        for _ in range(60):
            active = {row.agreement_id: row.share for _, row in agent.play.rows.prefix("active/")}
            match rng.randrange(6):
                case 0 | 1:
                    serial += 1
                    share = Capacity(rng.randint(1, 3), rng.choice((0.5, 1.0, 3.0)), rng.choice((1.0, 10.0, 30.0)))
                    fits = all(
                        sum(getattr(one, name) for one in (*active.values(), share)) <= getattr(capacity, name) + 1e-6
                        for name in ("cpu_threads", "mem_gib", "storage_gib")
                    )
                    offer = sized(share.cpu_threads, share.mem_gib, share.storage_gib)
                    ends = {EXPIRATION: int((agent.play.now + 1000) * 1000)}
                    agent.offered_agreement(f"a{serial}", demand=ends, offer=offer)
                    approved = bool(agent.rest(AcceptAgreement))
                    assert approved is (fits and len(active) < 4)
                    accepted, refused = accepted + approved, refused + (not approved)
                    if approved:
                        agent.tell(ApprovalEnded(f"a{serial}", rng.random() < 0.9))
                case 2 if active:
                    agent.event("agreements", "AgreementTerminatedEvent", rng.choice(sorted(active)), "Requestor", "done")
                case 3 if active:
                    agreement_id = rng.choice(sorted(active))
                    agent.event("activities", "CreateActivity", f"x{serial}-{rng.random()}", agreement_id)
                    for started in agent.processes(StartUnit):
                        agent.tell(UnitRunning(started.activity_id, 100, 1))
                case 4:
                    capacity = Capacity(rng.randint(1, 4), rng.choice((1.0, 2.0, 4.0)), 40.0)
                    agent.tell(OffersChanged((SPEC,), capacity))
                case 5:
                    agent.play.machine = Provider("agent", agent._config("run-2"))
                    agent.play.sends.clear()
                    agent.play.ask(AgentStarted("prov-other", (SPEC,), capacity))
            alive: dict[str, int] = {}
            for _, row in agent.play.rows.prefix("activity/"):
                if row.state in ("Starting", "Running", "Stopping"):
                    alive[row.agreement_id] = alive.get(row.agreement_id, 0) + 1
            held = {row.agreement_id for _, row in agent.play.rows.prefix("active/")}
            assert set(alive) <= held, "what still runs is still counted"
            assert all(count == 1 for count in alive.values()), "an agreement's share is one activity's at a time"
            overlapping += len(alive) > 1
    assert min(accepted, refused, overlapping) > 50, "the test has met what it is about"


def test_a_second_activity_of_an_agreement_is_refused_with_the_reason() -> None:
    agent = Agent().begin().approved(offer=sized(1, 1.0, 1.0)).started()
    agent.event("activities", "CreateActivity", "x2", "a1")
    (close,) = agent.rest(CloseActivity)
    assert (close.activity_id, close.reason) == ("x2", "creation failed")
    assert "Only single Activity allowed" in close.error_message
    assert not agent.processes(StartUnit)


def test_the_exe_unit_is_bound_to_what_the_agreement_says(tmp_path: Path) -> None:
    agent = Agent().begin().approved(offer=sized(3, 1.25, 7.5))
    agent.event("activities", "CreateActivity", "x1", "a1")
    (start,) = agent.processes(StartUnit)
    (tmp_path / "agreement.json").write_text(start.agreement)  # as the port does
    limits = read_terms(tmp_path / "agreement.json").limits
    assert (limits.cpu_threads, limits.mem_gib, limits.storage_gib) == (3, 1.25, 7.5)


# -- work that is never paid
def code_of(terminate: Any) -> str:
    return str(json.loads(terminate.reason)["golem.provider.code"])


def test_an_agreement_whose_note_cannot_be_issued_ends() -> None:
    agent = Agent().begin().approved().started()
    agent.play.at(130)
    agent.tell(UsageRead("x1", [1.0, 1.0]))
    (note,) = agent.rest(IssueNote)
    agent.tell(NoteIssued("x1", note.number, "", "400: the demand would pay from another account"))
    assert [code_of(one) for one in agent.rest(EndAgreement)] == ["DebitNoteNotIssued"]
    assert agent.processes(StopUnit)


@pytest.mark.parametrize("usage", [None, [], [1.0], [1.0] * 9, "silence", "never issued"])
def test_work_that_is_not_billed_for_any_reason_ends(usage: Any) -> None:
    agent = Agent().begin().approved().started()
    for _ in range(6):
        agent.play.at(100)
        for read in agent.rest(ReadUsage):
            if usage == "never issued":
                agent.tell(UsageRead(read.activity_id, [1.0, 1.0]))
            elif usage == []:
                agent.tell(UsageRead(read.activity_id, [2.0]))
            elif usage != "silence":
                agent.tell(UsageRead(read.activity_id, usage))
    assert [code_of(one) for one in agent.rest(EndAgreement)] == ["DebitNoteNotIssued"]


def test_the_agreements_dates_are_our_own() -> None:
    """Whatever a requestor's node says of its time, notes are due an interval after the approval."""
    for off_s in (-1e8, 1e10, 99_999_999_999.0 - NOW):
        agent = Agent().begin()
        agreement = {
            "agreementId": "a1", "timestamp": timestamp_text(NOW + off_s), "approvedDate": timestamp_text(NOW + off_s),
            "demand": {"requestorId": REQUESTOR, "properties": DEMAND}, "offer": {"providerId": OTHER, "properties": OFFER},
        }  # fmt: skip
        agent.tell(AgreementArrived("wasmtime", agent.offer_id, json.dumps(agreement)))
        agent._fund()
        agent.play.at(7)
        agent.tell(ApprovalEnded("a1", True))
        agent.started().play.at(119)
        assert agent.rest(ReadUsage) == []
        agent.play.at(1)
        assert agent.rest(ReadUsage) == [ReadUsage("x1")]


STEPS = ("sent", "not sent", "accepted", "settled", "crash")


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_payable_note_is_paid_in_time_or_the_agreement_ends_in_every_order(length: int) -> None:
    """Receipt, acceptance, settlement and our own crash may come in every order; only the settlement ends the wait."""
    for order in itertools.permutations(STEPS, length):
        if "not sent" in order and "sent" in order:
            continue
        agent = Agent().begin().approved().started()
        agent.play.at(125)
        agent.tell(UsageRead("x1", [100.0, 120.0]))
        (note,) = agent.rest(IssueNote)
        assert note.due_at is not None
        agent.tell(NoteIssued("x1", 1, "note-1"))
        status = "RECEIVED"
        for step in order:
            agent.play.now += 1
            if step == "crash":
                agent.crash()
            elif step in ("sent", "not sent"):
                agent.tell(NoteSent("x1", 1, step == "sent"))
            else:
                status = "SETTLED" if "SETTLED" in (status, step.upper()) else "ACCEPTED"
                agent.event("debit-notes", f"DebitNote{step.capitalize()}Event", "note-1")
        agent.play.at(note.due_at - agent.play.now + 1)
        for read in agent.rest(ReadNote):
            agent.tell(NoteRead("x1", 1, read.deadline, status))
        ended = [code_of(one) for one in agent.rest(EndAgreement)]
        away = "not sent" in order and not {"accepted", "settled"} & set(order[: order.index("not sent")])
        assert bool(ended) is (away or status != "SETTLED"), order


def test_a_note_whose_receipt_never_comes_is_accepted_in_time_or_the_agreement_ends() -> None:
    patient = {PAYMENT_TIMEOUT: 86400}
    agent = Agent().begin().approved(demand=patient, offer=patient).started()
    agent.exited(usage=[1.0, 1.0])  # its last note may be under way for a week
    (note,) = agent.rest(IssueNote)
    agent.tell(NoteIssued("x1", note.number, "note-1"))
    for _ in range(4):
        agent.event("activities", "CreateActivity", f"y{_}", "a1")  # and work goes on meanwhile
        agent.tell(UnitRunning(f"y{_}", 7, 7))
        agent.play.at(80)
        agent.event("activities", "DestroyActivity", f"y{_}", "a1")
        agent.tell(UnitExited(f"y{_}", 0))
    for read in agent.rest(ReadNote):
        agent.tell(NoteRead("x1", 1, read.deadline, "ISSUED"))
    assert code_of(agent.rest(EndAgreement)[0]) == "DebitNotesDeadline"


def test_a_note_that_the_requestors_node_refuses_is_corrected_once() -> None:
    agent = Agent().begin().approved().started()
    agent.play.at(130)
    agent.tell(UsageRead("x1", [500.0, 119.5]))
    (first,) = agent.rest(IssueNote)
    agent.tell(NoteIssued("x1", 1, "note-1"))
    agent.tell(NoteSent("x1", 1, False, "400: the requestor refused it", "0.012"))
    (again,) = agent.rest(IssueNote)
    assert (again.amount, again.number, again.previous_id, again.due_at) == ("0.012", 2, "note-1", first.due_at)
    assert agent.rest(EndAgreement) == []
    agent.tell(NoteIssued("x1", 2, "note-2"))
    agent.tell(NoteSent("x1", 2, False, "400: the requestor refused it", "0.001"))
    assert [code_of(one) for one in agent.rest(EndAgreement)] == ["DebitNoteRejected"]
    agent.event("agreements", "AgreementTerminatedEvent", "a1", "Provider")
    agent.tell(UnitExited("x1", 0))
    assert agent.play.rows["activity/x1"].amount == "0.012"


def test_an_invoice_that_the_requestors_node_refuses_is_corrected_once() -> None:
    for answers, last in ((["0.012", "0.011"], "Failed"), (["0.012", ""], "Sent"), (["9"], "Failed"), (["0.02"], "Failed")):
        agent = Agent().begin().approved().started()
        agent.exited(usage=[110.0, 140.0])
        agent.issue()
        agent.event("agreements", "AgreementTerminatedEvent", "a1", "Requestor", "done")
        issued = []
        for number, most in enumerate(answers):
            (invoice,) = agent.rest(WriteInvoice)
            issued.append((invoice.amount, invoice.refused_id))
            agent.tell(InvoiceIssued("a1", f"inv-{number}"))
            agent.tell(InvoiceSent("a1", "400: refused" if most else "", most))
        assert agent.play.rows["agreement/a1"].invoice == last
        assert issued == [("0.018", ""), ("0.012", "inv-0")][: len(answers)]
        assert agent.rest(WriteInvoice) == []
        agent.play.at(8 * 86400)
        assert list(agent.play.rows.prefix("agreement/")), "what is not paid is not forgotten so soon"
        agent.play.at(91 * 86400)
        assert not list(agent.play.rows.prefix("document/"))
        assert not list(agent.play.rows.prefix("debt/"))


def test_a_payable_note_over_dust_need_not_be_paid() -> None:
    for amount, code in (("0.0000009", []), ("0.000001", ["DebitNoteNotPaid"])):
        cheap = {COEFFS: [float(amount) / 100, 0.0, 0.0]}
        agent = Agent().begin().approved(offer=cheap, demand=cheap).started()
        agent.play.at(125)
        agent.tell(UsageRead("x1", [100.0, 120.0]))
        note = agent.issue()
        agent.event("debit-notes", "DebitNoteAcceptedEvent", "note-x1-1")
        agent.play.at(note.due_at - agent.play.now + 1)
        for read in agent.rest(ReadNote):
            agent.tell(NoteRead("x1", 1, read.deadline, "ACCEPTED"))
        assert [code_of(one) for one in agent.rest(EndAgreement)] == code
