"""How much unpaid work a requestor gets: limits in money, so that no terms of its choice make work free.

A requestor's *debt* is what it was served and has not paid on chain, over all its agreements; it stays through restarts
and new agreements. Its *credit* is what the terms of its agreements can leave open at an honest payer, and half of that
again, at least a floor; it grows with what it really paid. At its credit the agreements end. Who has never paid draws on
a pool that all such strangers share: one credit for each place within a day, so that identities that come and go take no
more than that, and who has paid before is never held back by them.

    credit = max(floor, factor x price x threads x (interval + time to accept + pace of payments)) + growth x paid
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import ROUND_UP, Decimal
from typing import Any

from msgspec.structs import replace

from actors.provider.rows import (
    ALIVE,
    BillState,
    DealState,
    DebtRow,
    FundsRow,
    PayerRow,
    ProviderActivityRow,
    ProviderAgreementRow,
    StrangerRow,
    UnitState,
)
from actors.provider.rules import MAX_PRICE, Terms, TurnedDown, whole_number
from actors.provider.turn import DAY_S, Turn
from protocol.payment_terms import DAILY_S, PAID_DAILY
from protocol.properties import expiration_s
from protocol.property_names import (
    ACCEPT_TIMEOUT,
    CHOSEN_PLATFORM,
    COEFFS,
    CPU_THREADS,
    INTERVAL,
    PAYMENT_TIMEOUT,
    USAGE_CPU,
    USAGE_DURATION,
    VECTOR,
)
from protocol.provider import AskFunds, CreditDue, FundsKnown, HoldUnit
from protocol.types import amount_text

MICRO = Decimal("0.000001")
LONGEST_INTERVAL_S = 300  # of notes: a demand may ask for more, but gets no credit for it
LEAST_SHARE = Decimal("0.1")  # of a stranger's credit: with less left in the pool it is not worth to begin
MAX_GROWTH = 10  # credits: paying much does not make it endless
LEAST_WAKE_S = 1.0
HOLD_S = 120.0  # of work before the credit is used up, but not more than half of it
FUNDS_S = 60.0  # what the chain said of an account counts for so long
MAX_FUNDS = 1000  # accounts that are remembered


@dataclass(frozen=True, slots=True)
class Credit:
    """How a requestor stands: what it owes, the credit of its agreements (`raw`: without floor and pool), what it paid.

    `others`: what other strangers draw from the pool; None for who has paid before and needs none.
    """

    debt: Decimal = Decimal(0)
    granted: Decimal = Decimal(0)
    raw: Decimal = Decimal(0)
    paid: Decimal = Decimal(0)
    others: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Grant:
    """What an agreement adds to a credit: `added` in all, `raw` of its terms, `unproven` once the payer has `needed`."""

    added: Decimal = Decimal(0)
    raw: Decimal = Decimal(0)
    unproven: Decimal = Decimal(0)
    needed: Decimal = Decimal(0)


# -- what an agreement may leave open
def rate_of(offer: Mapping[str, Any]) -> float:
    """Return the most that a second of an offer can cost: price of time, and of all its threads."""
    coeffs, vector = offer.get(COEFFS), offer.get(VECTOR)
    if not isinstance(coeffs, list) or not isinstance(vector, list):
        return 0.0
    threads = whole_number(offer.get(CPU_THREADS)) or 1
    rate = 0.0
    for counter, price in zip(vector, coeffs, strict=False):
        if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price <= MAX_PRICE:
            continue
        name = str(counter).replace("-", "_")
        rate += price * {USAGE_DURATION: 1, USAGE_CPU: threads}.get(name, 0)
    return rate


def open_s(terms: Terms, offer: Mapping[str, Any], platform: str) -> float:
    """Return how long work for an honest payer may be unpaid."""
    interval = min(whole_number(offer.get(INTERVAL)) or terms.interval_s, LONGEST_INTERVAL_S)
    accept = min(whole_number(offer.get(ACCEPT_TIMEOUT)) or terms.accept_timeout_s, terms.accept_timeout_s)
    return interval + accept + (DAILY_S if platform in PAID_DAILY else terms.pay_pace_s)


def raw_credit(terms: Terms, offer: Mapping[str, Any], platform: str) -> Decimal:
    """Return the credit that the terms of one agreement come to, without the floor."""
    return _money(terms.credit_factor * rate_of(offer) * open_s(terms, offer, platform))


def stranger_credit(terms: Terms, offer: Mapping[str, Any], platform: str) -> Decimal:
    """Return the credit of a stranger with one agreement."""
    return max(Decimal(repr(terms.credit_floor)), raw_credit(terms, offer, platform))


def grant(terms: Terms, credit: Credit, offer: Mapping[str, Any], platform: str, raw: Decimal) -> Decimal:
    """Return what one more agreement, whose terms come to `raw`, adds to a requestor's credit."""
    whole = max(Decimal(repr(terms.credit_floor)), credit.raw + raw)
    added = max(Decimal(0), whole - credit.granted)
    if credit.others is None:
        return added
    pool = terms.max_agreements * stranger_credit(terms, offer, platform)
    return min(added, max(Decimal(0), pool - credit.others - credit.granted))


def offered_credit(terms: Terms, offer: Mapping[str, Any], platforms: Iterable[str]) -> float:
    """Return the credit that an offer states: a stranger's with one agreement on its terms, on the platform that has least."""
    return float(min((stranger_credit(terms, offer, one) for one in platforms), default=Decimal(0)))


def needed_funds(terms: Terms, demand: Mapping[str, Any], offer: Mapping[str, Any], now: float) -> Decimal:
    """Return what a payer must have on the chain: for the time until its first payment is due, at most two credits."""
    platform = str(demand.get(CHOSEN_PLATFORM))
    lasts_s = max(0.0, (expiration_s(demand) or now) - now)
    pays_s = whole_number(offer.get(PAYMENT_TIMEOUT)) or 0
    interval = min(whole_number(offer.get(INTERVAL)) or terms.interval_s, LONGEST_INTERVAL_S)
    accept = min(whole_number(offer.get(ACCEPT_TIMEOUT)) or terms.accept_timeout_s, terms.accept_timeout_s)
    return min(_money(rate_of(offer) * min(lasts_s, interval + accept + pays_s)), 2 * stranger_credit(terms, offer, platform))


def _money(value: float) -> Decimal:
    return Decimal(repr(value)).quantize(MICRO, ROUND_UP)


# -- what is open
def debt_of(turn: Turn, row: ProviderAgreementRow) -> Decimal:
    """Return what was served under an agreement and is not paid; what runs counts as if it were busy on all threads."""
    worked, paid = Decimal(0), Decimal(0)
    for activity in turn.activities(row):
        amount = Decimal(activity.amount)
        if activity.state in (*ALIVE, UnitState.EXITED, UnitState.BILLING):
            start = Decimal(repr(row.coeffs[-1])) if row.coeffs else Decimal(0)
            unbilled_s = max(0.0, turn.now - activity.counted_at)
            amount = max(amount, start) + Decimal(repr(row.rate * unbilled_s))
        worked += amount
        paid += Decimal(activity.paid)
    if row.invoice == BillState.SETTLED:
        return Decimal(0)
    return max(Decimal(0), worked - paid)


def bound_funds(turn: Turn, requestor: str, platform: str, besides: str = "") -> Decimal:
    """Return what of a payer's account is for agreements with us already, but that of id `besides`: it pays but one."""
    total = Decimal(0)
    for _, row in _debts(turn, requestor):
        if row.platform == platform and row.agreement_id != besides:
            may_need = Decimal(row.credit if row.unproven else row.needed) if is_live(row) else Decimal(0)
            total += max(debt_of(turn, row), may_need)
    return total


def _debts(turn: Turn, requestor: str = "") -> Iterator[tuple[DebtRow, ProviderAgreementRow]]:
    prefix = f"debt/{requestor}/" if requestor else "debt/"
    for _, debt in list(turn.prefix(prefix)):
        row = turn.agreement(debt.agreement_id)
        if row is not None:
            yield debt, row


def has_paid(turn: Turn, requestor: str) -> bool:
    """Return whether a requestor has ever paid here."""
    return turn.get(f"agent/payer/{requestor}") is not None


def is_live(row: ProviderAgreementRow) -> bool:
    return row.state in (DealState.APPROVING, DealState.APPROVED)


def credit_situation(turn: Turn, requestor: str) -> Credit:
    """Return how a requestor stands here."""
    payer: PayerRow = turn.get(f"agent/payer/{requestor}") or PayerRow()
    debt, granted, raw = Decimal(0), Decimal(0), Decimal(0)
    for _, row in _debts(turn, requestor):
        debt += debt_of(turn, row)
        if is_live(row):
            granted += Decimal(row.credit)
            raw += Decimal(row.raw_credit)
    paid = Decimal(payer.paid)
    return Credit(debt, granted, raw, paid, None if paid > 0 else _others(turn, requestor))


def _others(turn: Turn, requestor: str) -> Decimal:
    """Return what other strangers took of the pool within a day, or may take under their agreements."""
    total = Decimal(0)
    for key, _ in list(turn.prefix("stranger/")):
        other = key.removeprefix("stranger/")
        if other == requestor:
            continue
        counts, open_, granted = False, Decimal(0), Decimal(0)
        for debt, row in _debts(turn, other):
            if is_live(row) or turn.now - debt.at < DAY_S:
                counts = True
                open_ += debt_of(turn, row)
                granted += Decimal(row.credit) if is_live(row) else Decimal(0)
        if not counts:
            turn.put(key, None)  # its day is over
        total += max(open_, granted)
    return total


def limit_of(turn: Turn, credit: Credit) -> Decimal:
    """Return the debt at which a requestor's agreements end."""
    grown = min(credit.paid * Decimal(repr(turn.config.terms.credit_growth)), MAX_GROWTH * credit.granted)
    return credit.granted + grown


def judge(turn: Turn, requestor: str, demand: Mapping[str, Any], offer: Mapping[str, Any]) -> TurnedDown | Grant:
    """Return what one more agreement on this offer adds to a requestor's credit, or why there is none."""
    terms, platform = turn.config.terms, str(demand.get(CHOSEN_PLATFORM))
    if rate_of(offer) <= 0:
        return Grant()
    credit, needed = credit_situation(turn, requestor), needed_funds(terms, demand, offer, turn.now)
    whole, funds = stranger_credit(terms, offer, platform), funds_of(turn, requestor, platform)
    if funds is not None and funds < needed + (bound := bound_funds(turn, requestor, platform)):
        held = f"Your account holds {_text(funds)} GLM on {platform}, and this agreement takes {_text(needed)} GLM there"
        besides = f", beside {_text(bound)} GLM for what is open here" if bound > 0 else ""
        return TurnedDown(f"{held}{besides}; the credit of who has it is {_text(whole)} GLM.", False)
    raw = raw_credit(terms, offer, platform)
    proven = raw if funds is not None else Decimal(0)
    most = grant(terms, credit, offer, platform, raw)  # that the chain has not answered yet is no reason to refuse
    limit = limit_of(turn, replace_granted(credit, credit.granted + most))
    if credit.debt >= limit and credit.debt > 0:
        said = f"You owe {_text(credit.debt)} GLM here, and your credit is {_text(limit)} GLM"
        return TurnedDown(f"{said}; it grows with what you pay.", False)
    if credit.granted + most < whole * LEAST_SHARE:
        pool = _text(terms.max_agreements * whole)
        said = f"Requestors that never paid here share {pool} GLM of credit a day, which is used up for now"
        return TurnedDown(f"{said}; the credit of one is {_text(whole)} GLM.", False)
    added = grant(terms, credit, offer, platform, proven)
    return Grant(added, proven, Decimal(0) if funds is not None else raw, needed)


def replace_granted(credit: Credit, granted: Decimal) -> Credit:
    return Credit(credit.debt, granted, credit.raw, credit.paid, credit.others)


# -- the payer's account
def ask_funds(turn: Turn, requestor: str, platform: str) -> None:
    """Have the chain asked for a payer's account, unless that was done a short while ago."""
    row: FundsRow | None = turn.get(f"funds/{requestor}")
    if row is not None and row.platform == platform and turn.now - row.at < FUNDS_S:
        return
    turn.put(f"funds/{requestor}", FundsRow(platform, None, turn.now))
    turn.rest(AskFunds(requestor, platform))
    kept = sorted((one.at, key) for key, one in turn.prefix("funds/"))
    for _, key in kept[: max(0, len(kept) - MAX_FUNDS)]:
        turn.put(key, None)


def funds_of(turn: Turn, requestor: str, platform: str) -> Decimal | None:
    """Return what the chain said of a payer's account a short while ago, None where it has not."""
    row: FundsRow | None = turn.get(f"funds/{requestor}")
    if row is None or row.platform != platform or row.amount is None or turn.now - row.at >= FUNDS_S:
        return None
    return Decimal(row.amount)


def funds_known(turn: Turn, message: FundsKnown) -> None:
    """Agreements that had the least credit, for nobody could say, have theirs from now on if the payer has what it takes."""
    row: FundsRow | None = turn.get(f"funds/{message.requestor}")
    if row is None or row.platform != message.platform:
        return
    turn.put(f"funds/{message.requestor}", FundsRow(message.platform, message.amount, turn.now))
    if message.amount is None:
        return
    for _, one in _debts(turn, message.requestor):
        if not (one.unproven and one.platform == message.platform and is_live(one)):
            continue
        bound = bound_funds(turn, message.requestor, one.platform, one.agreement_id)
        if Decimal(message.amount) >= Decimal(one.needed) + bound:
            credit, terms = credit_situation(turn, message.requestor), turn.config.terms
            whole = max(Decimal(repr(terms.credit_floor)), credit.raw + Decimal(one.unproven))
            added = max(Decimal(0), whole - credit.granted)
            if credit.others is not None:
                pool = terms.max_agreements * max(Decimal(repr(terms.credit_floor)), Decimal(one.unproven))
                added = min(added, max(Decimal(0), pool - credit.others - credit.granted))
            sum_ = amount_text(Decimal(one.credit) + added)
            turn.save(replace(one, credit=sum_, raw_credit=one.unproven, unproven=""))
    watch(turn, message.requestor)


def prove(turn: Turn, row: ProviderAgreementRow) -> None:
    """Ask again for a payer whose account nobody could tell."""
    if row.unproven and row.state == DealState.APPROVED:
        ask_funds(turn, row.requestor, row.platform)


# -- what happens
def begin(turn: Turn, row: ProviderAgreementRow) -> None:
    """From now on this agreement may leave something open."""
    turn.put(f"debt/{row.requestor}/{row.agreement_id}", DebtRow(row.agreement_id, turn.now))
    if not has_paid(turn, row.requestor):
        turn.put(f"stranger/{row.requestor}", StrangerRow())


def over(turn: Turn, row: ProviderAgreementRow) -> None:
    """The agreement is over: its place in the pool is what it leaves open, which is nothing where nobody worked."""
    key = f"debt/{row.requestor}/{row.agreement_id}"
    if turn.get(key) is not None:
        turn.put(key, DebtRow(row.agreement_id, turn.now) if row.activities else None)


def watch(turn: Turn, requestor: str) -> None:
    """Hold a requestor's activities back, or let them go on, and look again when its debt can have come to the next limit."""
    credit = credit_situation(turn, requestor)
    limit = limit_of(turn, credit)
    rate, alive = 0.0, []
    for _, row in _debts(turn, requestor):
        found = [one for one in turn.activities(row) if one.state in ALIVE]
        rate += row.rate * len(found)
        alive += found
    hold = limit - min(limit / 2, _money(rate * HOLD_S))
    held = credit.debt >= hold
    for activity in alive:
        hold_unit(turn, activity, held)
    if rate > 0:
        left_s = float((limit if held else hold) - credit.debt) / rate
        turn.wake(f"credit/{requestor}", turn.now + max(left_s, LEAST_WAKE_S), CreditDue(requestor))


def hold_unit(turn: Turn, activity: ProviderActivityRow, held: bool) -> None:
    if activity.held != held:
        turn.save(replace(activity, held=held))
        turn.processes(HoldUnit(activity.activity_id, activity.agreement_id, held))


def exhausted(turn: Turn, requestor: str) -> tuple[list[ProviderAgreementRow], str]:
    """Return the agreements that end because a requestor's debt has reached its credit, and why; else look again later."""
    credit = credit_situation(turn, requestor)
    limit = limit_of(turn, credit)
    live = [row for _, row in _debts(turn, requestor) if row.state == DealState.APPROVED]
    if not live or credit.debt < limit:
        watch(turn, requestor)
        return [], ""
    return live, f"Unpaid work of {_text(credit.debt)} GLM has reached the credit of this requestor, {_text(limit)} GLM."


def settled(turn: Turn, row: ProviderAgreementRow, activity: ProviderActivityRow | None, total: str) -> None:
    """A note of an activity (or the invoice) was paid up to `total`: the payer is known from now on."""
    if activity is not None:
        added = max(Decimal(0), Decimal(total) - Decimal(activity.paid))
        turn.save(replace(activity, paid=amount_text(Decimal(activity.paid) + added)))
    else:
        added = max(Decimal(0), Decimal(total) - sum((Decimal(one.paid) for one in turn.activities(row)), Decimal(0)))
        turn.put(f"debt/{row.requestor}/{row.agreement_id}", None)
    if added > 0:
        payer: PayerRow = turn.get(f"agent/payer/{row.requestor}") or PayerRow()
        turn.put(f"agent/payer/{row.requestor}", PayerRow(amount_text(Decimal(payer.paid) + added)))
        if turn.get(f"stranger/{row.requestor}") is not None:
            turn.put(f"stranger/{row.requestor}", None)
        watch(turn, row.requestor)


def _text(value: Decimal) -> str:
    return amount_text(value.quantize(MICRO, ROUND_UP))
