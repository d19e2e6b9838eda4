"""Keys, offers and demands for tests of the market and the negotiation."""

from __future__ import annotations

import hashlib
from typing import Any

from protocol.market import subscription_body
from protocol.signing import Document, node_id_of, sign

KEYS = [bytes([n]) * 32 for n in range(1, 7)]
REQUESTOR_KEY, PROVIDER_KEY, OTHER_KEY = KEYS[:3]
REQUESTOR_ID, PROVIDER_ID, OTHER_ID = (node_id_of(key) for key in KEYS[:3])

OFFER_PROPERTIES: dict[str, Any] = {
    "golem.node.debug.subnet": "public",
    "golem.inf.mem.gib": 4.0,
    "golem.com.pricing.model.linear.coeffs": [0.0, 0.001, 0.0],
    "golem.runtime.name": "vm",
}
OFFER_CONSTRAINTS = "(&(golem.srv.comp.expiration>1)(golem.node.debug.subnet=public))"
DEMAND_PROPERTIES: dict[str, Any] = {"golem.srv.comp.expiration": 1_800_003_600_000, "golem.node.debug.subnet": "public"}
DEMAND_CONSTRAINTS = "(&(golem.inf.mem.gib>=0.5)(golem.runtime.name=vm))"


def subscription(
    kind: str, key: bytes, properties: dict[str, Any], constraints: str, now: float, number: int = 0, lifetime_s: float = 3600.0
) -> tuple[str, Document]:
    """Return the id and the signed document of an offer or demand."""
    nonce = hashlib.sha256(f"{kind} {number} {key.hex()}".encode()).hexdigest()[:32]
    body_id, body = subscription_body(nonce, node_id_of(key), properties, constraints, now, now + lifetime_s)
    return body_id, sign(key, kind, body)


def offer(
    now: float, key: bytes = PROVIDER_KEY, number: int = 0, lifetime_s: float = 3600.0, **changed: Any
) -> tuple[str, Document]:
    """Return an ordinary offer; keywords with `__` for `.` change its properties, `constraints` its constraints."""
    constraints = changed.pop("constraints", OFFER_CONSTRAINTS)
    properties = {**OFFER_PROPERTIES, **{name.replace("__", "."): value for name, value in changed.items()}}
    return subscription("offer", key, properties, constraints, now, number, lifetime_s)


def demand(
    now: float, key: bytes = REQUESTOR_KEY, number: int = 0, lifetime_s: float = 3600.0, **changed: Any
) -> tuple[str, Document]:
    """Return an ordinary demand."""
    constraints = changed.pop("constraints", DEMAND_CONSTRAINTS)
    properties = {**DEMAND_PROPERTIES, **{name.replace("__", "."): value for name, value in changed.items()}}
    return subscription("demand", key, properties, constraints, now, number, lifetime_s)
