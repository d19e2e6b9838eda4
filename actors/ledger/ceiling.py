"""What a provider may ask for at most: no more than the agreed price for time that really passed here.

The payer's ledger knows price, activities and their age. It lets through what a provider's word may decide (how busy a
processor was) only up to what a clock explains: an activity's seconds since it was created, on as many threads as were
agreed. So a provider takes at most price x threads x time, whatever it writes into its documents.

    duration     time that passed               cpu          threads x that
    gib          memory of the offer            storage_gib  storage of the offer
    others       the provider's word (a plug-in runtime's own units), within the demand's `golem.activity.cost_cap`
                 where there is one, and the allocation

Time counts from the creation of the activity to its end, both by this node, with a margin for the clocks: 0.1 % and 5 s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_DOWN, Context, Decimal
from typing import Any, Protocol

from actors.kernel.draft import Draft
from actors.ledger.rows import ClockRow, LedgerActivityRow, PricingRow
from protocol import property_names
from protocol.amounts import total_of
from protocol.ledger import ClockSeen
from protocol.property_names import (
    COEFFS,
    COST_CAP,
    CPU_CORES,
    CPU_THREADS,
    MEM_GIB,
    STORAGE_GIB,
    VECTOR,
)
from protocol.types import WEI_DIGITS, amount_text

MARGIN, MARGIN_S = 0.001, 5.0
MARGIN_WEI = Decimal(100).scaleb(-WEI_DIGITS)  # others may round another way
SIZE_MARGIN = 0.01  # of memory and storage
MAX_NUMBER = 1e15
CLOCK_STEP_S = 1.0  # a wall clock set back by more than this is made up for
_EXACT = Context(prec=200)
_WEI = Decimal(1).scaleb(-WEI_DIGITS)


# -- the price of an agreement
def pricing_of(agreement_id: str, demand: Mapping[str, Any], offer: Mapping[str, Any]) -> PricingRow | None:
    """Read the prices of an agreement; None for one that names none: then its agent alone judges the bills."""
    coeffs, vector = offer.get(COEFFS), offer.get(VECTOR)
    if coeffs is None or vector is None:
        return None
    threads = _number(offer.get(CPU_THREADS)) or _number(offer.get(CPU_CORES)) or 1.0
    fault = ""
    if not isinstance(coeffs, list) or not isinstance(vector, list) or len(coeffs) != len(vector) + 1:
        coeffs, vector, fault = [], [], "the agreement's prices do not fit its usage vector"
    elif any(_number(price) is None for price in coeffs) or not all(isinstance(name, str) for name in vector):
        coeffs, vector, fault = [], [], "the agreement's prices are no prices"
    return PricingRow(
        agreement_id,
        tuple(float(price) for price in coeffs),
        tuple(name[:100] for name in vector),
        threads,
        _number(offer.get(MEM_GIB)),
        _number(offer.get(STORAGE_GIB)),
        _number(demand.get(COST_CAP)),
        fault,
    )


def _number(value: Any) -> float | None:
    """Return a finite number from 0 to something, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_NUMBER:
        return None
    return float(value)


# -- time
def clock_seen(draft: Draft, fact: ClockSeen) -> None:
    """Compare the wall clock with one that nobody sets; what the wall clock lost is added to every running activity."""
    before = draft.row(ClockRow, "clock") or ClockRow(fact.boot_id, fact.boot_s, fact.wall_s)
    set_back_s = before.set_back_s
    if before.boot_id == fact.boot_id:
        lost_s = (fact.boot_s - before.boot_s) - (fact.wall_s - before.wall_s)
        set_back_s += lost_s if lost_s > CLOCK_STEP_S else 0.0
    draft.put("clock", ClockRow(fact.boot_id, fact.boot_s, fact.wall_s, set_back_s))


class HasRows(Protocol):
    """Committed rows or a draft of them."""

    def get(self, key: str) -> Any: ...


def set_back_s(rows: HasRows) -> float:
    """Return by how much the wall clock of this node was ever set back."""
    row: ClockRow | None = rows.get("clock")
    return row.set_back_s if row else 0.0


def age_s(rows: HasRows, activity: LedgerActivityRow, now: float) -> float:
    """Return how long an activity has been there, or was until its end."""
    if activity.ended_at is not None:
        return max(0.0, activity.ended_at - activity.created_at + activity.ended_set_back_s - activity.set_back_s)
    return max(0.0, now - activity.created_at + set_back_s(rows) - activity.set_back_s)


# -- the ceiling
def ceiling(pricing: PricingRow, counter: str, age: float) -> float | None:
    """Return the highest value that a counter can have after this time; None where no clock says so."""
    time_s = age * (1 + MARGIN) + MARGIN_S
    match counter.replace("-", "_"):
        case property_names.USAGE_DURATION:
            return time_s
        case property_names.USAGE_CPU:
            return pricing.threads * time_s
        case property_names.USAGE_MEM if pricing.mem_gib is not None:
            return pricing.mem_gib * (1 + SIZE_MARGIN)
        case property_names.USAGE_STORAGE if pricing.storage_gib is not None:
            return pricing.storage_gib * (1 + SIZE_MARGIN)
    return None


def explained(pricing: PricingRow, usage: Sequence[float] | None, age: float) -> list[tuple[str, float, float, float | None]]:
    """Return (counter, price, the usage that counts, its ceiling) of each counter.

    Without a usage vector (an invoice has none) each counter is taken at its ceiling, and at nothing where it has none.
    """
    found = []
    for index, (counter, price) in enumerate(zip(pricing.vector, pricing.coeffs, strict=False)):
        most = ceiling(pricing, counter, age)
        said = most or 0.0
        if usage is not None:
            said = usage[index] if index < len(usage) else 0.0
            said = said if 0 <= said <= MAX_NUMBER and math.isfinite(said) else 0.0
        found.append((counter, price, said if most is None else min(said, most), most))
    return found


def most_for(pricing: PricingRow, usage: Sequence[float] | None, age: float) -> Decimal:
    """Return the most that an activity may cost: the start price, and price x usage up to each counter's ceiling."""
    total = Decimal(repr(pricing.coeffs[-1])) if pricing.coeffs else Decimal(0)
    for _, price, value, _ in explained(pricing, usage, age):
        total = _EXACT.add(total, _EXACT.multiply(Decimal(repr(price)), Decimal(repr(float(value)))))
    if pricing.cost_cap is not None:
        total = min(total, Decimal(repr(pricing.cost_cap)))
    return total.quantize(_WEI, ROUND_DOWN, _EXACT)


def most_for_agreement(pricing: PricingRow, activities: Iterable[tuple[LedgerActivityRow, float]]) -> Decimal:
    """Return the most that an invoice may say: what each activity may cost, or what its last note said that was taken."""
    return total_of(max(most_for(pricing, None, age), Decimal(activity.due)) for activity, age in activities)


def over(pricing: PricingRow, total: Decimal, most: Decimal, subject: str) -> str:
    """Why an amount is not taken; "" if it is. The text names the highest amount that passes."""
    if pricing.fault:
        return pricing.fault
    if total <= most + MARGIN_WEI:
        return ""
    return f"{amount_text(total)} GLM is more than {subject} explains: at most {amount_text(most)}"


def calculation(pricing: PricingRow, usage: Sequence[float] | None, age: float) -> dict[str, Any]:
    """Return the calculation for people. Without a usage vector it has ceilings alone: nothing was counted by them."""
    return {
        "ageSec": round(age, 3),
        "threads": pricing.threads,
        "startPrice": pricing.coeffs[-1] if pricing.coeffs else 0.0,
        "counters": [
            {"counter": counter, "price": price, "ceiling": most} | ({} if usage is None else {"usageThatCounts": value})
            for counter, price, value, most in explained(pricing, usage, age)
        ],
        "costCap": pricing.cost_cap,
        "highestAmount": amount_text(most_for(pricing, usage, age)),
        **({"fault": pricing.fault} if pricing.fault else {}),
    }
