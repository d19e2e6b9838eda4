"""What strangers can take from one another: each history of a cheat, and a search for more.

The figures: a stranger takes at most one credit of unpaid work; a place that nobody pays for is held for seconds.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import pytest
from cheat_world import ACCEPT, ADDRESS, DAY_S, INTERVAL, SECOND, TIMEOUT, Cheat, CheatWorld
from msgspec.structs import replace
from sim_seeds import share
from worlds.money import PLATFORM

from actors.provider import credit as _provider_credit
from actors.provider.machine import Provider
from actors.provider.rules import Terms
from protocol import activity as act
from protocol import ledger as money
from protocol import negotiation as talk
from protocol.negotiation import agreement_body
from protocol.provider import CreditDue
from protocol.signing import Document, sign
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


# -- places
def test_agreements_without_an_activity_hold_a_place_ever_more_rarely() -> None:
    world = CheatWorld(Terms(max_agreements=1))
    one = world.stranger(**SDK)
    one.rents = False
    held = 0
    for _ in range(360):
        world.run(10)
        held += world.held()
    assert held * 10 < 7 * 100, "of an hour, some six times a minute and a half"
    assert any("left unused" in reason for reason in world.refusals())
    honest = world.stranger(again=False, **SDK)
    world.run(300)
    assert honest.agreements == 1


def test_never_committed_agreements_hold_a_place_ever_more_rarely() -> None:
    world = CheatWorld(Terms(max_agreements=1))
    world.stranger(NoCommit(), **SDK)
    held = 0
    for _ in range(360):
        world.run(10)
        held += world.held()
    assert held * 10 < 6 * 60


def test_one_requestor_has_at_most_half_of_the_places_while_others_ask() -> None:
    world = CheatWorld(Terms(max_agreements=4))
    many = world.stranger(**SDK)
    for _ in range(5):
        world.run(20)
        many.start()
    world.run(60)
    assert world.held() == 4, "as long as nobody else asks"
    other = world.stranger(**SDK)
    world.run(60)
    assert other.agreements == 0
    many.plays["negotiation"].ask(talk.TerminateAgreement(many.agreement_id, '{"message":"done"}'))
    world.run(60)
    assert other.agreements == 1, "the place goes to who waits"


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


def test_whoever_comes_and_goes_takes_one_pool_in_any_day() -> None:
    """A new identity every two hours, for three days: what they take within any 24 hours is bounded by places x one credit."""
    places = 2
    world = CheatWorld(Terms(max_agreements=places))
    taken = [Decimal(0)]
    for _ in range(36):
        one = world.stranger(again=False, **{INTERVAL: 300, ACCEPT: 240, TIMEOUT: 86400})
        one.pays = False
        world.run(7200)
        taken.append(sum((world.exposure(one) for one in world.strangers.values()), Decimal(0)))
    pool = places * (credit({INTERVAL: 300, ACCEPT: 240}) + SECOND)
    for start, before in enumerate(taken[:-12]):
        assert taken[start + 12] - before <= pool, start
    assert taken[-1] > 2 * pool, "the pool refills"


@pytest.mark.parametrize("length_s", [5, 35, 65, 125, 300, 1500])
@pytest.mark.parametrize("terms", [SDK, {INTERVAL: 60, ACCEPT: 30, TIMEOUT: 18000}, {ACCEPT: 240}, {}])
def test_no_job_is_ended_by_an_sdk_for_notes_that_come_too_fast(length_s: float, terms: dict[str, Any]) -> None:
    """As yapapi judges notes: `n` of them take (n - 1) x interval, less 30 s; and one with a due date needs a payment timeout."""
    world = CheatWorld()
    one = world.stranger(rent_s=1700, again=False, **terms)
    world.run(3 + length_s)
    activity_id = one.activity_id
    one.plays["activity"].ask(act.DestroyActivity(activity_id))
    world.run(120)
    rows = one.plays["ledger"].rows
    began = rows[f"activity/{activity_id}"].created_at
    notes = sorted((row for _, row in rows.prefix("debit-note/")), key=lambda row: row.issued_at)
    assert notes, world.refusals()
    for number, note in enumerate(notes):
        assert note.issued_at - began + 30 >= number * terms.get(INTERVAL, 0), (number, len(notes))
        assert TIMEOUT in terms or not json.loads(note.body).get("paymentDueDate")


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


def test_who_pays_once_a_day_is_not_hurt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ethereum's mainnet, where a payer's node gathers for a day: the credit is that of a day."""
    monkeypatch.setattr(_provider_credit, "PAID_DAILY", frozenset({PLATFORM}))
    world = CheatWorld()
    one = world.stranger(pace_s=23 * 3600.0, rent_s=31 * 3600.0, again=False, **{INTERVAL: 120, ACCEPT: 120, TIMEOUT: 86400})
    world.run(30 * 3600)
    assert (one.agreements, one.rejections) == (1, []), world.refusals()
    assert world.paid(one) > SECOND * 6 * 3600
    assert not world.ever_held


@pytest.mark.parametrize("pace_s", [1.0, 60.0, 300.0])
def test_a_service_of_three_hours_is_not_hurt(pace_s: float) -> None:
    """yapapi sends neither an interval nor a payment timeout below five hours, and ends agreements on a due date."""
    world = CheatWorld()
    one = world.stranger(pace_s=pace_s, rent_s=3 * 3600, again=False, **{ACCEPT: 240})
    world.run(3 * 3600 - 60)
    assert (one.agreements, one.rejections) == (1, []), world.refusals()
    assert world.worked(one) > SECOND * 10_500
    assert not world.ever_held
    notes = [row for _, row in world.agent.rows.prefix("note/")]
    assert notes
    assert all(note.due_at is None for note in notes)


def test_from_five_hours_on_a_payment_timeout_is_asked_for() -> None:
    world = CheatWorld()
    one = world.stranger(rent_s=5 * 3600 + 10, again=False, **{ACCEPT: 240})
    world.run(60)
    assert one.agreements == 0
    assert any("payment-timeout" in reason for reason in one.rejections)


def test_who_pays_only_the_invoice_gets_one_credit() -> None:
    """Terms that let notes be unaccepted last half an hour at most; at full load the credit is over before that."""
    world = CheatWorld()
    one = world.stranger(rent_s=1700, again=False)
    one.accepts = False
    world.run(1800)
    assert SECOND * 900 < world.exposure(one) <= credit({INTERVAL: 120, ACCEPT: 240}) + SECOND
    assert any("has reached the credit" in reason for reason in one.rejections)


# -- near the credit
def test_near_the_credit_no_new_command_starts_for_two_minutes() -> None:
    world = CheatWorld()
    one = world.stranger(again=False, **{INTERVAL: 300, ACCEPT: 240, TIMEOUT: 86400})
    one.pays = False
    held = 0
    for _ in range(1500):
        world.run(1)
        held += bool(world.held_units)
    assert 115 <= held <= 125
    assert "has reached the credit" in one.rejections[0]


def test_a_payment_that_comes_late_lets_commands_go_on() -> None:
    world = CheatWorld()
    one = world.stranger(pace_s=950.0, again=False, **{INTERVAL: 300, ACCEPT: 240, TIMEOUT: 86400})
    world.run(1245)
    assert world.held_units
    world.run(30)
    assert world.paid(one) > 0
    assert not world.held_units
    assert not one.rejections


def test_a_stranger_gets_its_first_note_after_half_a_minute() -> None:
    """Unless its demand names an interval: SDKs end agreements whose notes come faster."""
    world = CheatWorld()
    one = world.stranger(rent_s=1700, again=False)
    other = CheatWorld()
    other.stranger(again=False, **SDK)
    for each, seconds in ((world, 30), (other, 120)):
        each.run(seconds - 2)
        assert not list(each.agent.rows.prefix("note/"))
        each.run(4)
        assert len(list(each.agent.rows.prefix("note/"))) == 1
    world.run(600)
    assert world.paid(one) > 0


def test_an_interval_of_a_day_is_refused() -> None:
    world = CheatWorld()
    one = world.stranger(again=False, **{INTERVAL: 86400, ACCEPT: 240, TIMEOUT: 86400})
    world.run(60)
    assert one.agreements == 0
    assert any("from 1 to 300" in reason for reason in one.rejections)


# -- what a payer has
def test_who_has_nothing_to_pay_with_gets_nothing() -> None:
    world = CheatWorld()
    one = world.stranger(again=False, **SDK)
    one.funds = "0.001"
    world.run(120)
    assert world.worked(one) == 0
    assert any("holds 0.001 GLM" in reason for reason in one.rejections)


def test_where_nobody_knows_what_a_payer_has_the_credit_is_the_least() -> None:
    world = CheatWorld()
    one = world.stranger(again=False, **SDK)
    one.funds, one.pays = None, False
    world.run(1800)
    assert SECOND * 100 < world.exposure(one) <= Decimal("0.01") + SECOND


def test_an_answer_of_the_chain_that_comes_late_gives_the_whole_credit() -> None:
    world = CheatWorld()
    world.chain_s = 20.0
    one = world.stranger(again=False, **SDK)
    one.pays = False
    world.run(1800)
    assert SECOND * 800 < world.exposure(one) <= credit() + SECOND
    assert world.asked_funds <= 1800 / 60


def test_an_account_counts_once_for_all_agreements_with_its_payer() -> None:
    """What is bound by one agreement is not there for the next."""
    world = CheatWorld(Terms(max_agreements=3))
    one = world.stranger(rent_s=1800.0, **SDK)
    one.funds = str(3 * credit())  # two credits are what an agreement takes
    world.run(60)
    one.start()
    world.run(240)
    assert world.held() == 1
    assert any("beside" in reason for reason in one.rejections), one.rejections
    world.run(1800)
    assert one.agreements >= 2, "what is over and paid binds nothing"


def test_an_account_that_is_told_late_counts_once_as_well() -> None:
    world = CheatWorld(Terms(max_agreements=3))
    world.chain_s = 30.0
    one = world.stranger(again=False, **SDK)
    one.funds, one.pays = str(3 * credit()), False
    world.run(5)
    one.start()
    world.run(15)
    assert world.held() == 2
    world.run(3600)
    assert credit() / 2 < world.exposure(one) <= credit() + 2 * SECOND, "one credit, and not two"


# -- the search
SEEDS = int(os.environ.get("CHEAT_SEEDS", "100"))
CHUNKS = 5


class Anything(Cheat):
    """Does anything to any message: omits, delays (and so reorders), repeats, changes a field, a date, an amount."""

    def __init__(self, rng: random.Random, evil: float) -> None:
        self.rng, self.evil = rng, evil

    def hears(self, world: CheatWorld, message: Message) -> bool:
        return self.rng.random() > self.evil / 10

    def says(self, world: CheatWorld, to: str, message: Message) -> Iterable[tuple[float, Message]]:
        rng = self.rng
        if rng.random() > self.evil:
            yield 0.0, message
            return
        match rng.randrange(4):
            case 0:
                return
            case 1:
                yield rng.choice((0.5, 5.0, 40.0, 200.0, 4000.0)), message
            case 2:
                for _ in range(rng.randint(2, 4)):
                    yield rng.choice((0.0, 1.0, 100.0)), message
            case 3:
                yield 0.0, self.changed(world, message)

    def changed(self, world: CheatWorld, message: Message) -> Message:
        name = self.rng.choice(message.__struct_fields__)
        value = getattr(message, name)
        if isinstance(value, Document):
            one = next(one for one in world.strangers.values() if one.cheat is self)
            body = json.loads(value.body)
            key = self.rng.choice(sorted(body))
            body[key] = self.other(body[key])
            raw = json.dumps(body, separators=(",", ":")).encode()
            return replace(message, **{name: sign(one.key, value.kind, raw)})
        return replace(message, **{name: self.other(value)})

    def other(self, value: Any) -> Any:
        rng = self.rng
        if isinstance(value, bool):
            return not value
        if isinstance(value, int | float):
            return type(value)(rng.choice((0, 1, value * 2, value + 1e6, value - 1e6, 9e10)))
        if isinstance(value, str) and value.replace(".", "").isdigit():
            return rng.choice(("0", "0.000001", "1000000", str(Decimal(value) * 2), str(Decimal(value) / 2)))
        if isinstance(value, str):
            return rng.choice(("", "0" * len(value), value[::-1], "2099-01-01T00:00:00Z", "1999-01-01T00:00:00Z"))
        if isinstance(value, list | tuple):
            return type(value)(value[:-1])
        return value


def search(seed: int) -> None:
    """Some strangers, each with its own kind of malice, at a provider of a few places. The two figures hold all the time."""
    rng = random.Random(seed)
    places = rng.choice((1, 2, 4))
    world = CheatWorld(Terms(max_agreements=places))
    terms: dict[str, dict[str, Any]] = {}
    for _ in range(rng.randint(1, 4)):
        chosen = {
            INTERVAL: rng.choice((5, 30, 120, 300)), ACCEPT: rng.choice((5, 60, 120, 240)), TIMEOUT: rng.choice((1, 120, 43200)),
        }  # fmt: skip
        rent_s = rng.choice((600.0, 1700.0, 7200.0))
        if rent_s < 1800 and rng.random() < 0.3:
            chosen = {key: value for key, value in chosen.items() if rng.random() < 0.5}
        one = world.stranger(Anything(rng, rng.choice((0.0, 0.05, 0.3))), rng.choice((1.0, 60.0)), rent_s, **chosen)
        one.pays, one.accepts, one.rents = rng.random() < 0.4, rng.random() < 0.8, rng.random() < 0.9
        terms[one.id] = {INTERVAL: 120, ACCEPT: 240, **chosen}
        world.run(rng.choice((1.0, 100.0, 900.0)))
    for _ in range(30):
        world.run(120)
        strangers = Decimal(0)
        for one in world.strangers.values():
            limit = credit(terms[one.id]) * places + min(world.paid(one), 10 * credit(terms[one.id]) * places) / 10
            assert world.exposure(one) <= limit + SECOND * 2, (seed, one.id, world.exposure(one), limit)
            strangers += world.exposure(one) if world.paid(one) == 0 else 0
        assert strangers <= places * (max(map(credit, terms.values())) + SECOND * 2), (seed, strangers)
        assert world.held() <= places, seed


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.timeout(1200)
def test_no_message_of_a_stranger_takes_more_than_the_figures(chunk: int) -> None:
    only = os.environ.get("SIM_SEED")
    for seed in [int(only)] * (chunk == 0) if only else share(range(chunk, SEEDS, CHUNKS)):
        try:
            search(seed)
        except BaseException:
            print(f"seed {seed} fails (replay: SIM_SEED={seed} pytest {__file__})")
            raise


# -- mutants: a fault that the search does not find would be a hole in it
def nothing(*args: Any, **kwargs: Any) -> Any:
    """Do nothing."""


MUTANTS: dict[str, Any] = {
    "nobody looks at the credit": lambda m: (
        m.setitem(Provider.table.handlers, CreditDue, nothing),
        m.setattr(_provider_credit, "judge", lambda *args: _provider_credit.Grant(Decimal(1000))),
    ),
    "debts are forgotten with their agreement": lambda m: m.setattr(
        _provider_credit, "over", lambda turn, row: turn.put(f"debt/{row.requestor}/{row.agreement_id}", None)
    ),
}


@pytest.mark.parametrize("name", share(list(MUTANTS)))
def test_a_fault_is_found_by_the_search(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)
    assert any(fails(seed) for seed in range(40)), f"nobody found out that {name}"


def fails(seed: int) -> bool:
    try:
        search(seed)
    except AssertionError:
        return True
    return False
