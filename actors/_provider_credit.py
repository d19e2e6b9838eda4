"""How much unpaid work a requestor gets: limits in money, so that no terms of its choice make work free.

A requestor's *debt* is what it was served and has not paid on chain, over all its agreements; it stays through restarts
and new agreements. Its *credit* is what the terms of its agreements can leave open at an honest payer, and half of that
again, at least a floor; it grows with what it really paid. At its credit the agreements end. Who has never paid draws on
a pool that all such strangers share: one credit for each place within a day, so that identities that come and go take no
more than that, and who has paid before is never held back by them.

    credit = max(floor, factor x price x threads x (interval + time to accept + pace of payments)) + growth x paid
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import ROUND_UP, Decimal
from typing import Any

from msgspec.structs import replace

from actors._provider_negotiators import (
    ACCEPT_TIMEOUT,
    COEFFS,
    INTERVAL,
    MAX_PRICE,
    VECTOR,
    Rejected,
    Terms,
    whole_number,
)
from actors._provider_rows import (
    ALIVE,
    APPROVED,
    APPROVING,
    BILLING,
    EXITED,
    SETTLED,
    ActivityRow,
    AgreementRow,
    DebtRow,
    PayerRow,
)
from actors._provider_turn import DAY_S, Turn
from protocol.payment_terms import CHOSEN_PLATFORM, DAILY_S, PAID_DAILY
from protocol.provider import CreditDue
from protocol.types import amount_text

MICRO = Decimal("0.000001")
LONGEST_INTERVAL_S = 300  # of notes: a demand may ask for more, but gets no credit for it
LEAST_SHARE = Decimal("0.1")  # of a stranger's credit: with less left in the pool it is not worth to begin
MAX_GROWTH = 10  # credits: paying much does not make it endless
LEAST_WAKE_S = 1.0


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


# -- what an agreement may leave open
def rate_of(offer: Mapping[str, Any]) -> float:
    """Return the most that a second of an offer can cost: price of time, and of all its threads."""
    coeffs, vector = offer.get(COEFFS), offer.get(VECTOR)
    if not isinstance(coeffs, list) or not isinstance(vector, list):
        return 0.0
    threads = whole_number(offer.get("golem.inf.cpu.threads")) or 1
    rate = 0.0
    for counter, price in zip(vector, coeffs, strict=False):
        if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price <= MAX_PRICE:
            continue
        name = str(counter).replace("-", "_")
        rate += price * {"golem.usage.duration_sec": 1, "golem.usage.cpu_sec": threads}.get(name, 0)
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


def grant(terms: Terms, credit: Credit, offer: Mapping[str, Any], platform: str) -> Decimal:
    """Return what one more agreement adds to a requestor's credit."""
    whole = max(Decimal(repr(terms.credit_floor)), credit.raw + raw_credit(terms, offer, platform))
    added = max(Decimal(0), whole - credit.granted)
    if credit.others is None:
        return added
    pool = terms.max_agreements * stranger_credit(terms, offer, platform)
    return min(added, max(Decimal(0), pool - credit.others - credit.granted))


def _money(value: float) -> Decimal:
    return Decimal(repr(value)).quantize(MICRO, ROUND_UP)


# -- what is open
def debt_of(turn: Turn, row: AgreementRow) -> Decimal:
    """Return what was served under an agreement and is not paid; what runs counts as if it were busy on all threads."""
    worked, paid = Decimal(0), Decimal(0)
    for activity in turn.activities(row):
        amount = Decimal(activity.amount)
        if activity.state in (*ALIVE, EXITED, BILLING):
            start = Decimal(repr(row.coeffs[-1])) if row.coeffs else Decimal(0)
            unbilled_s = max(0.0, turn.now - activity.counted_at)
            amount = max(amount, start) + Decimal(repr(row.rate * unbilled_s))
        worked += amount
        paid += Decimal(activity.paid)
    if row.invoice == SETTLED:
        return Decimal(0)
    return max(Decimal(0), worked - paid)


def _debts(turn: Turn, requestor: str = "") -> Iterator[tuple[DebtRow, AgreementRow]]:
    prefix = f"debt/{requestor}/" if requestor else "debt/"
    for _, debt in list(turn.prefix(prefix)):
        row = turn.agreement(debt.agreement_id)
        if row is not None:
            yield debt, row


def is_live(row: AgreementRow) -> bool:
    return row.state in (APPROVING, APPROVED)


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
    taken: dict[str, tuple[Decimal, Decimal]] = {}
    for debt, row in _debts(turn):
        payer: PayerRow | None = turn.get(f"agent/payer/{row.requestor}")
        if row.requestor == requestor or payer is not None or not (is_live(row) or turn.now - debt.at < DAY_S):
            continue
        open_, granted = taken.get(row.requestor, (Decimal(0), Decimal(0)))
        taken[row.requestor] = open_ + debt_of(turn, row), granted + (Decimal(row.credit) if is_live(row) else Decimal(0))
    return sum((max(pair) for pair in taken.values()), Decimal(0))


def limit_of(turn: Turn, credit: Credit) -> Decimal:
    """Return the debt at which a requestor's agreements end."""
    grown = min(credit.paid * Decimal(repr(turn.config.terms.credit_growth)), MAX_GROWTH * credit.granted)
    return credit.granted + grown


def judge(turn: Turn, requestor: str, demand: Mapping[str, Any], offer: Mapping[str, Any]) -> Rejected | Decimal:
    """Return what one more agreement on this offer adds to a requestor's credit, or why there is none."""
    terms, platform = turn.config.terms, str(demand.get(CHOSEN_PLATFORM))
    if rate_of(offer) <= 0:
        return Decimal(0)
    credit = credit_situation(turn, requestor)
    whole = stranger_credit(terms, offer, platform)
    added, least = grant(terms, credit, offer, platform), whole * LEAST_SHARE
    limit = limit_of(turn, replace_granted(credit, credit.granted + added))
    if credit.debt >= limit and credit.debt > 0:
        said = f"You owe {_text(credit.debt)} GLM here, and your credit is {_text(limit)} GLM"
        return Rejected(f"{said}; it grows with what you pay.", False)
    if credit.granted + added < least:
        pool = _text(terms.max_agreements * whole)
        return Rejected(f"Requestors that never paid here share {pool} GLM of credit a day, which is used up for now.", False)
    return added


def replace_granted(credit: Credit, granted: Decimal) -> Credit:
    return Credit(credit.debt, granted, credit.raw, credit.paid, credit.others)


# -- what happens
def begin(turn: Turn, row: AgreementRow) -> None:
    """From now on this agreement may leave something open."""
    turn.put(f"debt/{row.requestor}/{row.agreement_id}", DebtRow(row.agreement_id, turn.now))


def over(turn: Turn, row: AgreementRow) -> None:
    """The agreement is over: its place in the pool is what it leaves open, which is nothing where nobody worked."""
    key = f"debt/{row.requestor}/{row.agreement_id}"
    if turn.get(key) is not None:
        turn.put(key, DebtRow(row.agreement_id, turn.now) if row.activities else None)


def watch(turn: Turn, requestor: str) -> None:
    """Look again when the debt of a requestor can have reached its credit."""
    credit = credit_situation(turn, requestor)
    rate = sum(
        row.rate * sum(one.state in ALIVE for one in turn.activities(row)) for _, row in _debts(turn, requestor)
    )
    if rate > 0:
        left_s = float(limit_of(turn, credit) - credit.debt) / rate
        turn.wake(f"credit/{requestor}", turn.now + max(left_s, LEAST_WAKE_S), CreditDue(requestor))


def exhausted(turn: Turn, requestor: str) -> tuple[list[AgreementRow], str]:
    """Return the agreements that end because a requestor's debt has reached its credit, and why; else look again later."""
    credit = credit_situation(turn, requestor)
    limit = limit_of(turn, credit)
    live = [row for _, row in _debts(turn, requestor) if row.state == APPROVED]
    if not live or credit.debt < limit:
        watch(turn, requestor)
        return [], ""
    return live, f"Unpaid work of {_text(credit.debt)} GLM has reached the credit of this requestor, {_text(limit)} GLM."


def settled(turn: Turn, row: AgreementRow, activity: ActivityRow | None, total: str) -> None:
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
        watch(turn, row.requestor)


def _text(value: Decimal) -> str:
    return amount_text(value.quantize(MICRO, ROUND_UP))
