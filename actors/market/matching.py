"""Which offers and demands match: tried in steps of bounded size, since others wait for each to end."""

from __future__ import annotations

from actors.kernel.draft import Draft
from actors.kernel.machine import Emit, Send, Wake
from actors.market.rows import DemandRow, OfferRow, ScanRow
from protocol.market import MatchDue, Matched, OfferSeen, Subscription, matches, read_subscription, weight
from protocol.signing import Document
from protocol.states import DocumentKind
from protocol.terms import compile_constraint

PAIRS_AT_ONCE, PAIRS_BYTES = 64, 256 * 1024  # pairs that are tried in one step, and the weight of their documents


class _Share:
    """What one step may spend on trying pairs: others wait for it to end."""

    def __init__(self) -> None:
        self._pairs, self._bytes = PAIRS_AT_ONCE, PAIRS_BYTES

    def spend(self, row: DemandRow | ScanRow, document: Document) -> bool:
        """Return whether one more pair may be tried."""
        asked = len(row.constraints) if isinstance(row, ScanRow) else weight(row.document.body)
        self._pairs, self._bytes = self._pairs - 1, self._bytes - asked - weight(document.body)
        return self._pairs >= 0 and (self._bytes >= 0 or self._pairs == PAIRS_AT_ONCE - 1)


def match_fresh(draft: Draft, offers: list[tuple[Document, Subscription]]) -> None:
    """Try offers that have just come against all demands and scans: at once where that is little, else part by part."""
    share = _Share()
    for document, offer in offers:
        _match_offer(draft, share, document, offer, "demand/")


def _match_offer(draft: Draft, share: _Share, document: Document, offer: Subscription, after: str) -> None:
    """Try an offer against the demands, and then the scans, whose keys come after `after`."""
    number = draft.get(f"offer/{offer.subscription_id}").number
    for prefix in ("demand/", "scan/"):
        if after > prefix + "\U0010ffff":
            continue
        for key, row in draft.readable(prefix, max(after, prefix)):
            if row.known >= number:
                continue  # it tries this offer itself
            if not share.spend(row, document):
                message = MatchDue(f"offer/{offer.subscription_id}", after)
                draft.do(Wake(f"match/offer/{offer.subscription_id}", draft.now, message))
                return
            if isinstance(row, ScanRow):
                _try_scan(draft, key, row, offer)
            else:
                attempt(draft, row, document, offer)
            after = key


def match_all(draft: Draft, target: str, after: str = "offer/") -> None:
    """Try a demand or scan against the known offers whose keys come after `after`."""
    row, share = draft.get(target), _Share()
    if not row:
        return
    for key, offer in draft.readable("offer/", after):
        if offer.number > row.known:
            continue  # it is tried as one that has just come
        if not share.spend(row, offer.document):
            draft.do(Wake(f"match/{target}", draft.now, MatchDue(target, after)))
            return
        if isinstance(row, ScanRow):
            _try_scan(draft, target, row, read_subscription(offer.document.body))
        else:
            attempt(draft, row, offer.document, read_subscription(offer.document.body))
        after = key


def match_due(draft: Draft, message: MatchDue) -> None:
    """Go on where a step had done enough."""
    if not message.target.startswith("offer/"):
        match_all(draft, message.target, message.after)
    elif offer := draft.get(message.target):
        _match_offer(draft, _Share(), offer.document, read_subscription(offer.document.body), message.after)


def attempt(draft: Draft, row: DemandRow, document: Document, offer: Subscription) -> None:
    """Hand a pair that matches to the negotiation."""
    demand = read_subscription(row.document.body)
    if offer.owner != draft.me and offer.expires > draft.now < row.expires and matches(demand, offer):
        known: OfferRow | None = draft.get(f"offer/{offer.subscription_id}")
        origin = known.origin if known else ""
        matched = Matched(demand.subscription_id, offer.subscription_id, row.document, document, origin)
        draft.do(Send("negotiation", matched))


def _try_scan(draft: Draft, key: str, scan: ScanRow, offer: Subscription) -> None:
    if scan.kind == DocumentKind.OFFER and compile_constraint(scan.constraints).evaluate(offer.properties):
        draft.do(Emit(key, OfferSeen(offer.subscription_id)))
