"""What is said about offers and demands. Handled by `actors/market/machine.py`.

An offer or demand is a signed document whose body is JSON:
`{"id", "owner", "properties": {flat}, "constraints", "created", "expires"}` (times in seconds).
The id is 32 hex digits, `-`, and the sha3-256 of the rest of the document, so nobody can change what an id names.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from protocol import strict_json
from protocol.properties import MAX_VALUES, TermsError, flatten
from protocol.signing import Document, verify
from protocol.states import DocumentKind, SubscriptionEnd
from protocol.terms import MAX_CONSTRAINT_BYTES, MatchResult
from protocol.terms import match as match_terms
from protocol.types import MAX_CLOCK_SKEW_S, Message, Violation, digest, node_id

MAX_DOCUMENT_BYTES = 128 * 1024  # the body of one offer or demand
REMEMBERED_BYTES = 8 * 1024  # of larger documents only the last ones are remembered: a stranger's must not fill our memory
REMEMBERED_LARGE = 4  # what one step reads several times
MAX_LIFETIME_S = 2 * 3600.0  # how far ahead an offer or demand may expire
WEIGHT_OF_VALUE = 8
MAX_IDS = 100  # in one message between nodes
Ids = Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_IDS)]
SUBSCRIPTION_ID = re.compile(r"[0-9a-f]{32}-[0-9a-f]{64}\Z")


# -- between nodes
class OffersAnnounced(Message, frozen=True):
    """These offers live on the sender's node (gossip topic `offers`, and directly to a peer that just came up)."""

    offer_ids: Ids
    withdrawn_ids: Ids = ()


class GetOffers(Message, frozen=True):
    """Please send these offers."""

    offer_ids: Ids


class Offers(Message, frozen=True):
    """The offers asked for, as their owners signed them; unknown ones are left out."""

    documents: Annotated[tuple[Document, ...], msgspec.Meta(max_length=MAX_IDS)]


# -- to other actors of the node
class Matched(Message, frozen=True):
    """market -> negotiation: a demand of ours and an offer accept each other's terms."""

    demand_id: str
    offer_id: str
    demand: Document
    offer: Document
    origin: str = ""  # the network address that the offer came by


class SubscriptionOpened(Message, frozen=True):
    """market -> negotiation: an own offer or demand was published (`document.kind` says which)."""

    subscription_id: str
    document: Document


class SubscriptionEnded(Message, frozen=True):
    """market -> negotiation: an own offer or demand was withdrawn or has expired."""

    subscription_id: str
    reason: SubscriptionEnd


class Rematch(Message, frozen=True):
    """negotiation -> market: this pair's agreement is over; match the two again if both still live."""

    demand_id: str
    offer_id: str


# -- from the network port
class PeerUp(Message, frozen=True):
    """A session with this node came up."""

    node: str


class Announced(Message, frozen=True):
    """Gossip: `origin` published this announcement."""

    origin: str
    announcement: OffersAnnounced


# -- from the edge
class PublishOffer(Message, frozen=True):
    """Make this offer known to all. Replies `Published`."""

    document: Document


class PublishDemand(Message, frozen=True):
    """Match this demand with every offer, known now or later. Replies `Published`."""

    document: Document


class Withdraw(Message, frozen=True):
    """End an own offer or demand. Replies `Done`; refuses with `unknown`, or `gone` for an offer that is over."""

    subscription_id: str


class OpenScan(Message, frozen=True):
    """Collect offers whose properties fulfil `constraints`, known now or later, into feed `scan/<id>`. Replies `ScanOpened`.

    `kind` `demand` yields nothing: demands are never published. Unread for `timeout_s`, the scan ends.
    """

    kind: DocumentKind
    constraints: str
    timeout_s: float
    owner: str = ""  # who may read it: the name of the app-key


class TouchScan(Message, frozen=True):
    """Somebody reads the scan: its time of inactivity starts again. Replies `Done`."""

    scan_id: str


class CloseScan(Message, frozen=True):
    """End a scan. Replies `Done`."""

    scan_id: str


# -- replies to the edge
class Published(Message, frozen=True):
    """The offer or demand is in the market."""

    subscription_id: str


class ScanOpened(Message, frozen=True):
    """The scan runs."""

    scan_id: str


# -- in feeds `scan/<id>`
class OfferSeen(Message, frozen=True):
    """An offer for a scan."""

    offer_id: str


class ScanEnded(Message, frozen=True):
    """The last event of a scan."""


# -- the machine's timers
class AnnounceDue(Message, frozen=True):
    """Time to tell everybody of our offers again."""


class ExpiryDue(Message, frozen=True):
    """An offer or demand reaches its end."""

    kind: DocumentKind
    subscription_id: str


class MatchDue(Message, frozen=True):
    """Go on matching where a step had done enough: a demand or scan with offers, an offer with demands and scans."""

    target: str  # "demand/<id>", "scan/<id>" or "offer/<id>"
    after: str  # the key of the row that was tried last


class AskedDue(Message, frozen=True):
    """Whatever of these offers has not come will not come."""

    offer_ids: tuple[str, ...]


class EndedDue(Message, frozen=True):
    """Forget that this offer was over."""

    subscription_id: str


class ScanDue(Message, frozen=True):
    """A scan may have been left alone for too long."""

    scan_id: str


# -- documents
@dataclass(frozen=True, slots=True)
class Subscription:
    """The content of an offer or demand. `properties` are flat and shared: do not change them."""

    subscription_id: str
    owner: str
    properties: Mapping[str, Any]
    constraints: str
    created: float
    expires: float


def canonical(value: Any) -> bytes:
    """Return JSON as it is signed: no spaces, UTF-8, keys in the order given, no NaN. Raises `ValueError`."""
    try:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise ValueError("nested too deep for JSON") from None


def subscription_body(
    nonce: str, owner: str, properties: Mapping[str, Any], constraints: str, created: float, expires: float
) -> tuple[str, bytes]:
    """Return the id and the JSON body of an offer or demand; `nonce` is 32 hex digits, `properties` are flat."""
    rest = {
        "owner": owner,
        "properties": dict(properties),
        "constraints": constraints,
        "created": round(created, 6),
        "expires": round(expires, 6),
    }
    subscription_id = f"{nonce}-{digest('subscription', nonce, canonical(rest))}"
    return subscription_id, canonical({"id": subscription_id, **rest})


def _seconds(value: Any) -> float:
    if not isinstance(value, float | int) or isinstance(value, bool) or not 0 <= value < 1e11:
        raise Violation("a time of the document is not in seconds since the epoch")
    return float(value)


def weight(body: bytes) -> int:
    """Return how much work a document is, in bytes of plain text: many small values are as much as a long text."""
    return len(body) + WEIGHT_OF_VALUE * (body.count(b",") + body.count(b"{") + body.count(b"["))


def read_subscription(body: bytes) -> Subscription:
    """Parse the body of an offer or demand and check all of its form, its id included. Raises `Violation`."""
    return (_remembered if len(body) <= REMEMBERED_BYTES else _remembered_large)(body)


def _read_subscription(body: bytes) -> Subscription:
    if len(body) > MAX_DOCUMENT_BYTES:
        raise Violation(f"a document of {len(body)} bytes is over the limit of {MAX_DOCUMENT_BYTES}")
    try:
        value = strict_json.loads(body, most=MAX_VALUES + 16)
        if not isinstance(value, dict) or list(value) != ["id", "owner", "properties", "constraints", "created", "expires"]:
            raise Violation("not an offer or demand: other keys than id, owner, properties, constraints, created, expires")
        if not isinstance(value["properties"], dict) or flatten(value["properties"]) != value["properties"]:
            raise Violation("the properties are not flat")
        if canonical(value) != body:
            raise Violation("the document is not canonical JSON")
        owner, constraints, subscription_id = value["owner"], value["constraints"], value["id"]
        if not isinstance(owner, str) or node_id(owner) != owner:
            raise Violation("the owner is no node id in lower case")
        if not isinstance(constraints, str) or len(constraints.encode()) > MAX_CONSTRAINT_BYTES:
            raise Violation("the constraints are no text, or too long")
        if not isinstance(subscription_id, str) or not SUBSCRIPTION_ID.match(subscription_id):
            raise Violation("the id is not 32 hex digits, `-`, 64 hex digits")
    except (ValueError, TermsError) as error:
        raise Violation(f"not an offer or demand: {str(error)[:200]}") from None
    created, expires = _seconds(value["created"]), _seconds(value["expires"])
    expected, _ = subscription_body(subscription_id[:32], owner, value["properties"], constraints, created, expires)
    if expected != subscription_id:
        raise Violation("the id does not name this content")
    return Subscription(subscription_id, owner, value["properties"], constraints, created, expires)


_remembered = functools.lru_cache(maxsize=2048)(_read_subscription)
_remembered_large = functools.lru_cache(maxsize=REMEMBERED_LARGE)(_read_subscription)


def verify_subscription(document: Document, kind: str, now: float) -> Subscription:
    """Return the content of a document of `kind` (`offer`, `demand`) that its owner signed and that lives. Raises `Violation`."""
    content = read_subscription(document.body)
    if content.expires <= now:
        raise Violation(f"the {kind} has expired")
    if content.expires > now + MAX_LIFETIME_S + MAX_CLOCK_SKEW_S:
        raise Violation(f"the {kind} expires more than {MAX_LIFETIME_S / 3600:g} hours from now")
    if content.created > now + MAX_CLOCK_SKEW_S:
        raise Violation(f"the {kind} was created in the future: the clocks of the nodes differ")
    verify(document, kind, content.owner)
    return content


def matches(demand: Subscription, offer: Subscription) -> MatchResult:
    """Say whether a demand and an offer accept each other's terms; two of one owner must be kept apart by the caller."""
    return match_terms(demand.properties, demand.constraints, offer.properties, offer.constraints)
