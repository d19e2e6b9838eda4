"""The terms a provider agrees to: one rule after another looks at a demand and at our offer. Pure functions on tables.

A rule keeps our offer as it is, adjusts it to the demand (negotiable properties end in `?` and must end up equal), or
rejects. A final rejection stands; one that is not may be looked at again when an agreement has ended. A proposal that is
not rejected is countered; an agreement is approved only if no rule would still adjust anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from protocol.payment_terms import address_key, payment_terms
from protocol.properties import expiration_s
from protocol.property_names import (
    ACCEPT_TIMEOUT,
    CHOSEN_PLATFORM,
    COEFFS,
    CPU_THREADS,
    EXPIRATION,
    INTERVAL,
    LOCAL_CHAIN,
    MEM_GIB,
    PAYLOAD,
    PAYLOAD_CAPABILITY,
    PAYMENT_TIMEOUT,
    STORAGE_GIB,
)
from protocol.provider import Capacity

RESOURCES = {
    "cpu_threads": (CPU_THREADS, "threads"),
    "mem_gib": (MEM_GIB, "GiB of memory"),
    "storage_gib": (STORAGE_GIB, "GiB of storage"),
}
SLACK = 1e-6  # sums of floats
DAY_S = 24 * 3600.0
MAX_PRICE = 1e15  # GLM per unit; there are 1e9 GLM

Properties = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Terms:
    """What this provider insists on. Times in seconds."""

    max_agreements: int = 1
    min_expiration_s: float = 300.0
    max_expiration_s: float = 100 * 365.25 * DAY_S
    max_expiration_without_deadline_s: float = 1800.0
    accept_timeout_s: int = 240
    min_accept_timeout_s: int = 5
    interval_s: int = 120
    min_interval_s: int = 1
    max_interval_s: int = 300
    payment_timeout_s: int = 120
    min_payment_timeout_s: int = 1
    max_payment_timeout_s: int = int(DAY_S)
    payment_timeout_required_s: float = 5 * 3600.0  # SDKs send none below
    credit_floor: float = 0.01  # GLM of unpaid work for a stranger, at least
    credit_factor: float = 1.5
    credit_growth: float = 0.1  # of what a requestor has paid
    pay_pace_s: float = 360.0  # from an acceptance to a transfer that is final
    blacklist: frozenset[str] = frozenset()
    allow_only: frozenset[str] | None = None  # None: everybody


@dataclass(frozen=True, slots=True)
class Situation:
    """Who asks, when, and what else is going on."""

    requestor: str
    now: float
    active_agreements: int
    stopping: bool = False
    room: Capacity | None = None  # what the agreements in force leave of what is for sale; None = not known


@dataclass(frozen=True, slots=True)
class Agreed:
    """Our offer, which is adjusted (`changed`) or as it was."""

    offer: dict[str, Any]
    changed: bool


@dataclass(frozen=True, slots=True)
class TurnedDown:
    """No; `final` means that asking again is of no use, `full` that there is no room at the moment."""

    message: str
    final: bool
    full: bool = False


Rule = Callable[[Terms, Situation, Properties, dict[str, Any]], TurnedDown | None]


def negotiate(terms: Terms, situation: Situation, demand: Properties, offer: Properties) -> Agreed | TurnedDown:
    """Apply every rule to a demand and our last offer; the first rejection counts, adjustments add up."""
    ours = dict(offer)
    for rule in RULES:
        if (rejected := rule(terms, situation, demand, ours)) is not None:
            return rejected
    return Agreed(ours, ours != dict(offer))


def whole_number(value: Any) -> int | None:
    """Return an integer that came as one or as an integral float, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not (math.isfinite(value) and value.is_integer()):
        return None
    return int(value)


def share_of(offer: Properties) -> Capacity:
    """Return what an agreement on this offer may use; an activity of it is bound to that."""

    def number(name: str) -> float:
        value = offer.get(RESOURCES[name][0])
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MAX_PRICE:
            return 0.0
        return float(value)

    return Capacity(math.ceil(number("cpu_threads")), number("mem_gib"), number("storage_gib"))


# -- the rules
def _running(terms: Terms, situation: Situation, demand: Properties, ours: dict[str, Any]) -> TurnedDown | None:
    return TurnedDown("The provider is shutting down.", False) if situation.stopping else None


def _requestor(terms: Terms, situation: Situation, demand: Properties, ours: dict[str, Any]) -> TurnedDown | None:
    if situation.requestor in terms.blacklist:
        return TurnedDown("Requestor is on the blacklist of this provider.", True)
    if terms.allow_only is not None and situation.requestor not in terms.allow_only:
        return TurnedDown("This provider serves chosen requestors only.", True)
    return None


def _platform(terms: Terms, situation: Situation, demand: Properties, ours: dict[str, Any]) -> TurnedDown | None:
    chosen = demand.get(CHOSEN_PLATFORM)
    if not isinstance(chosen, str):
        return TurnedDown(f"Missing required property {CHOSEN_PLATFORM}.", False)
    if address_key(chosen) not in ours:
        return TurnedDown(f"This provider is not paid on {chosen[:100]}.", False)
    if (chain := ours.get(LOCAL_CHAIN)) is not None and demand.get(LOCAL_CHAIN) != chain:
        theirs = str(demand.get(LOCAL_CHAIN, "none"))[:50]
        return TurnedDown(f"This provider is paid on the dev chain {chain}; {LOCAL_CHAIN} of the demand is {theirs}.", True)
    if fault := payment_terms(demand, ours, situation.requestor, "").fault:
        return TurnedDown(f"Nothing could be billed under such an agreement: {fault}.", True)
    return None


def _manifest(terms: Terms, situation: Situation, demand: Properties, ours: dict[str, Any]) -> TurnedDown | None:
    if PAYLOAD in demand and ours.get(PAYLOAD_CAPABILITY) is not True:
        return TurnedDown("This runtime takes no computation manifests.", True)
    return None


def _agreements(terms: Terms, situation: Situation, demand: Properties, ours: dict[str, Any]) -> TurnedDown | None:
    if situation.active_agreements >= terms.max_agreements:
        return TurnedDown(f"No capacity available. Reached Agreements limit: {terms.max_agreements}", False, full=True)
    return None


def _room(terms: Terms, situation: Situation, demand: Properties, ours: dict[str, Any]) -> TurnedDown | None:
    """All agreements together stay within what is for sale, whatever each was offered when (and by which preset)."""
    if situation.room is None:
        return None
    share = share_of(ours)
    for name, (_, unit) in RESOURCES.items():
        wanted, left = getattr(share, name), max(0, getattr(situation.room, name))
        if wanted > left + SLACK:
            return TurnedDown(f"No capacity available: {left:g} {unit} left, this offer takes {wanted:g}.", False, full=True)
    return None


def _expiration(terms: Terms, situation: Situation, demand: Properties, ours: dict[str, Any]) -> TurnedDown | None:
    ends_at = expiration_s(demand)
    if ends_at is None:
        return TurnedDown(f"Property {EXPIRATION} must be an integer, in milliseconds since the epoch.", True)
    lasts_s = ends_at - situation.now
    if lasts_s < terms.min_expiration_s:
        return TurnedDown(f"Proposal expires in {lasts_s:.0f} s; at least {terms.min_expiration_s:.0f} s are required.", True)
    if lasts_s > terms.max_expiration_s:
        return TurnedDown(f"Proposal expires in {lasts_s:.0f} s; at most {terms.max_expiration_s:.0f} s are allowed.", False)
    longest_s = terms.max_expiration_without_deadline_s
    if ACCEPT_TIMEOUT not in demand and lasts_s > longest_s:
        return TurnedDown(f"Without {ACCEPT_TIMEOUT} an agreement may last {longest_s:.0f} s, not {lasts_s:.0f} s.", False)
    return None


def _accept_timeout(terms: Terms, situation: Situation, demand: Properties, ours: dict[str, Any]) -> TurnedDown | None:
    return _adopt(ACCEPT_TIMEOUT, terms.min_accept_timeout_s, terms.accept_timeout_s, demand, ours)


def _interval(terms: Terms, situation: Situation, demand: Properties, ours: dict[str, Any]) -> TurnedDown | None:
    return _adopt(INTERVAL, terms.min_interval_s, terms.max_interval_s, demand, ours)


def _payment_timeout(terms: Terms, situation: Situation, demand: Properties, ours: dict[str, Any]) -> TurnedDown | None:
    lasts_s = (expiration_s(demand) or 0.0) - situation.now
    if lasts_s <= 0:
        return TurnedDown("Proposal has expired.", True)
    if PAYMENT_TIMEOUT not in demand and lasts_s >= terms.payment_timeout_required_s:
        text = f"An agreement of {terms.payment_timeout_required_s:.0f} s or more must have {PAYMENT_TIMEOUT}."
        return TurnedDown(text, True)
    return _adopt(PAYMENT_TIMEOUT, terms.min_payment_timeout_s, terms.max_payment_timeout_s, demand, ours)


def _adopt(name: str, low: int, high: int, demand: Properties, ours: dict[str, Any]) -> TurnedDown | None:
    """Take over the demand's value of a negotiable property within its limits; drop ours where the demand has none."""
    if name not in demand:
        ours.pop(name, None)
        return None
    value = whole_number(demand[name])
    if value is None or not low <= value <= high:
        return TurnedDown(f"Property {name} must be an integer from {low} to {high}, not {str(demand[name])[:50]}.", True)
    if value != ours.get(name):
        ours[name] = value
    return None


def _price(terms: Terms, situation: Situation, demand: Properties, ours: dict[str, Any]) -> TurnedDown | None:
    if COEFFS not in demand:
        return None
    theirs, own = demand[COEFFS], ours.get(COEFFS)
    if not isinstance(own, list) or not isinstance(theirs, list) or len(theirs) != len(own):
        return TurnedDown("Prices of the demand do not fit the usage vector of the offer.", True)
    for price, least in zip(theirs, own, strict=True):
        if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price <= MAX_PRICE:
            return TurnedDown(f"Prices of the demand must be numbers from 0 to {MAX_PRICE:g}.", True)
        if price < least:
            return TurnedDown(f"Prices of the demand are too low: {price!r} instead of {least!r}.", True)
    ours[COEFFS] = [float(price) for price in theirs]
    return None


RULES: tuple[Rule, ...] = (
    _running,
    _requestor,
    _platform,
    _manifest,
    _agreements,
    _room,
    _expiration,
    _accept_timeout,
    _interval,
    _payment_timeout,
    _price,
)
