"""What strangers can take from one another: each history of a cheat, and a search for more.

The figures: a stranger takes at most one credit of unpaid work; a place that nobody pays for is held for seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import pytest
from cheat_world import ACCEPT, ADDRESS, DAY_S, INTERVAL, SECOND, TIMEOUT, Cheat, CheatWorld

from actors._provider_negotiators import Terms
from protocol import ledger as money
from protocol import negotiation as talk
from protocol.negotiation import agreement_body
from protocol.signing import sign
from protocol.types import Message

SDK = {INTERVAL: 120, ACCEPT: 120, TIMEOUT: 43200}  # golem-js; yapapi's are alike


def test_an_honest_stranger_is_served_for_hours_and_pays_all() -> None:
    world = CheatWorld()
    one = world.stranger(**SDK)
    world.run(6 * 3600)
    assert one.agreements == 1, one.rejections
    assert world.worked(one) > SECOND * 6 * 3600 * Decimal("0.99")
    assert world.exposure(one) < SECOND * 130
    one.again = False
    world.strangers[one.id].plays["negotiation"].ask(talk.TerminateAgreement(one.agreement_id, '{"message":"done"}'))
    world.run(60)
    assert world.exposure(one) == 0
    assert not world.violations


# -- work that is never paid
def test_a_payer_that_is_somebody_else_is_rejected_for_good() -> None:
    world = CheatWorld()
    one = world.stranger(**SDK, **{ADDRESS: "0x" + "7" * 40})
    world.run(DAY_S)
    assert world.worked(one) == 0
    assert one.agreements == 0
    assert any("not the requestor's own account" in reason for reason in one.rejections)


class Redated(Cheat):
    """Dates its agreements as it likes."""

    def __init__(self, off_s: float) -> None:
        self.off_s = off_s

    def says(self, world: CheatWorld, to: str, message: Message) -> Iterable[tuple[float, Message]]:
        if isinstance(message, talk.AgreementProposed):
            body = json.loads(message.agreement.body)
            _, raw = agreement_body(
                body["proposalId"], body["created"] + self.off_s, body["validTo"], body["demand"], body["offer"]
            )
            key = next(one.key for one in world.strangers.values() if one.cheat is self)
            message = talk.AgreementProposed(sign(key, "agreement", raw))
        yield 0.0, message


@pytest.mark.parametrize("off_s", [400.0, 1e8, 9e10, -1e8])
def test_an_agreement_of_another_date_is_refused(off_s: float) -> None:
    world = CheatWorld()
    one = world.stranger(Redated(off_s), **SDK)
    world.run(3 * 3600)
    assert world.worked(one) == 0


class NoReceipt(Cheat):
    """Accepts at once, acknowledges nothing, pays nothing."""

    def says(self, world: CheatWorld, to: str, message: Message) -> Iterable[tuple[float, Message]]:
        if not isinstance(message, money.DocumentReceived):
            yield 0.0, message


@pytest.mark.parametrize("timeout", [120, 600])
def test_acceptance_without_a_receipt_and_no_payment_ends_at_the_deadline(timeout: int) -> None:
    world = CheatWorld()
    one = world.stranger(NoReceipt(), **{INTERVAL: 60, ACCEPT: 60, TIMEOUT: timeout})
    one.pays = False
    world.run(10 * 3600)
    assert world.worked(one) <= credit({INTERVAL: 60, ACCEPT: 60}), "debts stay with the debtor, across agreements"
    assert any("You owe" in reason for reason in one.rejections)


class NoCommit(Cheat):
    """Takes approvals and commits to none."""

    def says(self, world: CheatWorld, to: str, message: Message) -> Iterable[tuple[float, Message]]:
        if not isinstance(message, talk.AgreementCommitted):
            yield 0.0, message


def test_an_approval_that_is_never_committed_holds_a_place_for_seconds() -> None:
    world = CheatWorld(Terms(max_agreements=1))
    one = world.stranger(NoCommit(), **SDK)
    one.again = False
    world.run(20)
    assert world.held() == 1
    world.run(15)
    assert world.held() == 0
    honest = world.stranger(**SDK)
    world.run(300)
    assert honest.agreements == 1


class LateCommit(Cheat):
    """Commits long after."""

    def says(self, world: CheatWorld, to: str, message: Message) -> Iterable[tuple[float, Message]]:
        yield (3000.0 if isinstance(message, talk.AgreementCommitted) else 0.0), message


def test_a_late_commit_is_answered_with_a_termination() -> None:
    world = CheatWorld()
    one = world.stranger(LateCommit(), **SDK)
    one.again = False
    world.run(2 * 3600)
    assert world.worked(one) == 0
    assert world.held() == 0
    states = [row.state for _, row in one.plays["negotiation"].rows.prefix("agreement/")]
    assert states == ["Terminated"]


# -- credit in money
PACE_S = Terms().pay_pace_s


def credit(terms: dict[str, Any] = SDK) -> Decimal:
    """What a stranger with one agreement on these terms may leave unpaid."""
    open_s = min(terms[INTERVAL], 300) + terms[ACCEPT] + PACE_S
    return max(Decimal("0.01"), Decimal("1.5") * SECOND * Decimal(open_s))


@pytest.mark.parametrize("terms", [SDK, {INTERVAL: 300, ACCEPT: 240, TIMEOUT: 86400}, {INTERVAL: 5, ACCEPT: 5, TIMEOUT: 1}])
@pytest.mark.parametrize("accepts", [True, False])
def test_terms_of_his_choice_give_a_stranger_no_more_than_one_credit(terms: dict[str, Any], accepts: bool) -> None:
    world = CheatWorld()
    one = world.stranger(**terms)
    one.pays, one.accepts = False, accepts
    for _ in range(6):
        world.run(1800)
        assert world.exposure(one) <= credit(terms) + SECOND
    assert world.worked(one) > 0


def test_a_stranger_without_notes_at_all_gets_no_more_either() -> None:
    """No interval, no time to accept, no payment timeout: half an hour at most, by contract, and one credit."""
    world = CheatWorld()
    one = world.stranger(rent_s=1700)
    one.pays = one.accepts = False
    world.run(4 * 3600)
    assert 0 < world.exposure(one) <= credit({INTERVAL: 120, ACCEPT: 240}) + SECOND


def test_identities_that_come_and_go_take_one_pool_a_day() -> None:
    places = 3
    world = CheatWorld(Terms(max_agreements=places))
    for _ in range(12):
        one = world.stranger(again=False, **SDK)
        one.pays = False
        world.run(1200)
    assert sum((world.exposure(one) for one in world.strangers.values()), Decimal(0)) <= places * (credit() + SECOND)
    assert any("never paid here" in reason for reason in world.refusals())
    world.run(DAY_S)
    late = world.stranger(**SDK)
    world.run(7200)
    assert late.agreements == 1, "the pool refills"


def test_who_has_paid_before_is_never_held_back_by_strangers() -> None:
    world = CheatWorld(Terms(max_agreements=2))
    regular = world.stranger(rent_s=3600.0, again=False, **SDK)
    world.run(4000)
    assert world.exposure(regular) == 0
    for _ in range(12):
        one = world.stranger(again=False, **SDK)
        one.pays = False
        world.run(1000)
    regular.start()
    world.run(1800)
    assert regular.agreements == 2
    assert world.exposure(regular) <= credit()


@pytest.mark.parametrize("pace_s", [1.0, 60.0, 300.0])
@pytest.mark.parametrize("terms", [SDK, {INTERVAL: 120, ACCEPT: 240, TIMEOUT: 18000}, {}])
def test_the_honest_are_not_hurt(pace_s: float, terms: dict[str, Any]) -> None:
    """Hours of yapapi and golem-js at each pace of payments; a demand without terms lasts half an hour."""
    world = CheatWorld()
    one = world.stranger(pace_s=pace_s, rent_s=10.5 * 3600 if terms else 1700, again=False, **terms)
    world.run(10 * 3600 if terms else 1600)
    assert (one.agreements, one.rejections) == (1, []), world.refusals()
    assert world.worked(one) > SECOND * (35000 if terms else 1500)


def figures(world: CheatWorld) -> list[tuple[Any, Decimal]]:
    return [(one.id[:8], world.exposure(one)) for one in world.strangers.values()]
