"""Rows of the market."""

from __future__ import annotations

from protocol.signing import Document
from protocol.states import DocumentKind, SubscriptionEnd
from protocol.types import Message


class OfferRow(Message, frozen=True, tag="offer"):
    """A living offer, own or foreign."""

    document: Document
    owner: str
    expires: float
    number: int  # rises with each offer that we came to know
    origin: str = ""  # the network address that it came by


class OfOwnerRow(Message, frozen=True, tag="of"):
    """Index `of/<owner>/<number>/<id>`: a foreign offer, and the network address that it came by."""

    origin: str


class DemandRow(Message, frozen=True, tag="demand"):
    """A living demand of ours."""

    document: Document
    expires: float
    known: int  # `number` of the last offer that we knew when it was published


class EndedRow(Message, frozen=True, tag="ended"):
    """An offer that is over. `reason` is `withdrawn` or `expired`."""

    owner: str
    reason: SubscriptionEnd
    at: float


class AskedRow(Message, frozen=True, tag="asked"):
    """An offer that we asked `node` for."""

    node: str
    until: float


class OwnerRow(Message, frozen=True, tag="owner"):
    """What a node takes of our space: offers of its own that we keep, and answers we wait for."""

    offers: int = 0
    asked: int = 0


class ScanRow(Message, frozen=True, tag="scan"):
    """A collection of offers for somebody who looks at the market without a demand."""

    kind: DocumentKind
    constraints: str
    timeout_s: float
    owner: str
    until: float
    known: int


class OwnRow(Message, frozen=True, tag="own"):
    """Our living offers, and those lately withdrawn with the end of their lifetime."""

    offers: tuple[str, ...] = ()
    demands: int = 0
    withdrawn: tuple[tuple[str, float], ...] = ()


class OfferRefusal(Message, frozen=True, tag="refusal"):
    """An offer that a peer sent and we did not keep."""

    offer_id: str
    reason: str
    at: float


class StatsRow(Message, frozen=True, tag="stats"):
    """Counts, and what was refused lately."""

    offers: int = 0
    asked: int = 0
    scans: int = 0
    last_scan: int = 0
    last_offer: int = 0  # `number` of the offer that came last
    refused: tuple[OfferRefusal, ...] = ()
