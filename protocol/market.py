"""What is said about offers and demands. Handled by `actors/market.py`.

An offer or demand is a signed document whose body is JSON:
`{"id", "owner", "properties": {flat}, "constraints", "created", "expires"}` (times in seconds).
The id is 32 hex digits, `-`, and the sha3-256 of the rest of the document, so nobody can change what an id names.
"""

from __future__ import annotations

from protocol.signing import Document
from protocol.types import Message


# -- between nodes
class OffersAnnounced(Message, frozen=True):
    """These offers live on the sender's node (gossip topic `offers`, and directly to a peer that just came up)."""

    offer_ids: tuple[str, ...]
    withdrawn_ids: tuple[str, ...] = ()


class GetOffers(Message, frozen=True):
    """Please send these offers."""

    offer_ids: tuple[str, ...]


class Offers(Message, frozen=True):
    """The offers asked for, as their owners signed them; unknown ones are left out."""

    documents: tuple[Document, ...]


# -- to other actors of the node
class Matched(Message, frozen=True):
    """market -> negotiation: a demand of ours and an offer accept each other's terms."""

    demand_id: str
    offer_id: str
    demand: Document
    offer: Document


class SubscriptionEnded(Message, frozen=True):
    """market -> negotiation: an own offer or demand was withdrawn or has expired."""

    subscription_id: str
    reason: str
