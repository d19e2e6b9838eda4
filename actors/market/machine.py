"""The market: which offers are known, which demands are ours, and which of them match.

An offer is told to everybody by its id (gossip); whoever does not know the id asks the node that told of it for the
document, checks it and tries it against its own demands. Demands never leave the node. A pair that matches goes to the
negotiation actor, together with what it must know of our own offers and demands. What a peer sends and we do not keep is
noted with its reason in the row `stats`, for whoever asks why an offer does not show up.

Rows: `offer/<id>` and `demand/<id>` (living ones only), `ended/<id>` (offers that are over, so that a late announcement
cannot bring them back and an agent learns that its offer is gone), `asked/<id>` (offers under way to us), `owner/<node>`
(how much a node takes of our space), `of/<owner>/<number>/<id>` (foreign offers in order), `scan/<id>`, `own` and `stats`.
Where there are too many offers, or too many are under way, who has most of them makes room (`actors.kernel.crowd`).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from msgspec.structs import replace

from actors.kernel.crowd import Occupant, by_crowd
from actors.kernel.draft import Draft
from actors.kernel.machine import DropFeed, Emit, Meta, Publish, Reply, Rows, Send, Step, Wake
from actors.kernel.sources import EDGE, check_source
from actors.market.rows import Asked, DemandRow, Ended, OfferRow, OfOwner, Own, Owner, Refusal, Scan, Stats
from protocol.codec import Decoder
from protocol.market import (
    MAX_IDS,
    SUBSCRIPTION_ID,
    Announced,
    AnnounceDue,
    AskedDue,
    CloseScan,
    Done,
    EndedDue,
    ExpiryDue,
    GetOffers,
    LocalMarket,
    MatchDue,
    Matched,
    Offers,
    OffersAnnounced,
    OfferSeen,
    OpenScan,
    PeerMarket,
    PeerUp,
    PublishDemand,
    Published,
    PublishOffer,
    Rematch,
    ScanDue,
    ScanEnded,
    ScanOpened,
    Subscription,
    SubscriptionEnded,
    SubscriptionOpened,
    TouchScan,
    Withdraw,
    matches,
    read_subscription,
    verify_subscription,
)
from protocol.signing import Document
from protocol.terms import ConstraintSyntaxError, compile_constraint
from protocol.types import Message, Refused, Undelivered, Violation, address, digest, node_of

TOPIC = "offers"
ANNOUNCE_EVERY_S = 60.0
ANSWER_DEADLINE_S = 30.0  # for the questions and answers between markets
ASKED_FOR_S = 45.0  # an offer that did not come within this time may be asked for again
KEEP_ENDED_S = 24 * 3600.0
MAX_OWN = 1000  # living offers, and as many demands, of this node
MAX_OFFERS = 20_000  # that we keep in all
MAX_OFFERS_PER_OWNER = 1000
MAX_ASKED = 2000  # offers under way to us, in all
MAX_ASKED_PER_NODE = 500
STANDS_OUT = 100  # offers of a node
ROOM_AT_ONCE = 60  # offers that are forgotten together where there is no room
MAX_SCANS = 64
MAX_SCAN_TIMEOUT_S = 3600.0
MAX_WITHDRAWN = 100  # told again with each announcement
MAX_REFUSALS, MAX_REASON_CHARS = 32, 300  # remembered for explanations
ANSWER_BYTES, ANSWERS_BYTES = 512 * 1024, 2048 * 1024  # documents in one `Offers`, and in all of one question
AT_ONCE = 400  # offers that a new demand is tried against in one step; more are taken part by part
_peer = Decoder[Message](PeerMarket)
#: Who alone on this node may say what; the rest is said by markets of other nodes.
_SOURCES: dict[type, str] = {
    **dict.fromkeys((PublishOffer, PublishDemand, Withdraw, OpenScan, TouchScan, CloseScan, Announced), EDGE),
    PeerUp: "network",
    Rematch: "negotiation",
    **dict.fromkeys((AnnounceDue, ExpiryDue, MatchDue, AskedDue, EndedDue, ScanDue, Undelivered), "market"),
}


class Market:
    """The machine `market`. `node_id` is ours."""

    name = "market"
    local = LocalMarket
    peer = PeerMarket
    rows = OfferRow | OfOwner | DemandRow | Ended | Asked | Owner | Scan | Own | Stats
    sources = _SOURCES

    def __init__(self, node_id: str) -> None:
        self.node = node_id

    def handle(self, rows: Rows, message: LocalMarket | PeerMarket, meta: Meta) -> Step:
        """Decide. Raises `Violation`."""
        check_source(message, meta, self.node, self.name, self.sources)
        draft = Draft(rows)
        match message:
            case PublishOffer() | PublishDemand():
                self._publish(draft, message, meta.now)
            case Withdraw(subscription_id):
                self._withdraw(draft, subscription_id, meta.now)
            case OffersAnnounced():
                self._announced(draft, node_of(meta.sender), message, meta.now)
            case Announced(origin, announcement):
                self._announced(draft, origin, announcement, meta.now)
            case GetOffers(offer_ids):
                _answer(draft, offer_ids, meta)
            case Offers(documents):
                self._offers(draft, documents, meta)
            case PeerUp(node):
                self._greet(draft, node, meta.now)
            case AnnounceDue():
                self._announce_again(draft, meta.now)
            case ExpiryDue(kind, subscription_id):
                self._expired(draft, kind, subscription_id, meta.now)
            case MatchDue(target, shard, digits):
                self._match_part(draft, target, shard, digits, meta.now)
            case Rematch(demand_id, offer_id):
                self._rematch(draft, demand_id, offer_id, meta.now)
            case AskedDue(offer_ids):
                _forget_asked(draft, offer_ids, meta.now)
            case EndedDue(subscription_id):
                draft.put(f"ended/{subscription_id}", None)
            case OpenScan() | TouchScan() | CloseScan() | ScanDue():
                self._scan(draft, message, meta.now)
            case Undelivered():
                self._undelivered(draft, message)
        return draft.step()

    # -- our own offers and demands
    def _publish(self, draft: Draft, message: PublishOffer | PublishDemand, now: float) -> None:
        kind = "offer" if isinstance(message, PublishOffer) else "demand"
        try:
            content = verify_subscription(message.document, kind, now)
            if content.owner != self.node:
                raise Violation(f"the {kind} belongs to another node")
        except Violation as error:
            draft.do(Reply(Refused("bad_request", str(error))))
            return
        own, subscription_id = draft.get("own") or Own(), content.subscription_id
        if draft.get(f"{kind}/{subscription_id}"):
            draft.do(Reply(Published(subscription_id)))
            return
        if (len(own.offers) if kind == "offer" else own.demands) >= MAX_OWN:
            draft.do(Reply(Refused("busy", f"this node has {MAX_OWN} {kind}s; withdraw one first")))
            return
        draft.do(
            Reply(Published(subscription_id)),
            Wake(f"expire/{subscription_id}", content.expires, ExpiryDue(kind, subscription_id)),
            Send("negotiation", SubscriptionOpened(subscription_id, message.document)),
        )
        if kind == "demand":
            draft.put(f"demand/{subscription_id}", DemandRow(message.document, content.expires, _stats(draft).last_offer))
            draft.put("own", Own(own.offers, own.demands + 1, own.withdrawn))
            self._match_all(draft, f"demand/{subscription_id}", now)
            return
        self._keep(draft, message.document, content, now)
        draft.put("own", Own((*own.offers, subscription_id), own.demands, own.withdrawn))
        draft.do(Publish(TOPIC, OffersAnnounced((subscription_id,))))
        draft.do(Wake("announce", now + ANNOUNCE_EVERY_S, AnnounceDue()))

    def _withdraw(self, draft: Draft, subscription_id: str, now: float) -> None:
        offer, ended = draft.get(f"offer/{subscription_id}"), draft.get(f"ended/{subscription_id}")
        if (offer and offer.owner == self.node) or draft.get(f"demand/{subscription_id}"):
            self._end(draft, "offer" if offer else "demand", subscription_id, "withdrawn", now)
            draft.do(Reply(Done()))
        elif ended and ended.owner == self.node:
            text = "unsubscribed" if ended.reason == "withdrawn" else "expired"
            draft.do(Reply(Refused("gone", f"Offer [{subscription_id}] is already {text}.")))
        else:
            draft.do(Reply(Refused("unknown", f"Subscription [{subscription_id}] not found.")))

    def _expired(self, draft: Draft, kind: str, subscription_id: str, now: float) -> None:
        row = draft.get(f"{kind}/{subscription_id}")
        if row and row.expires <= now:
            self._end(draft, kind, subscription_id, "expired", now)

    def _end(self, draft: Draft, kind: str, subscription_id: str, reason: str, now: float) -> None:
        """Take an offer or demand off the market; tell its agent and, of an own offer withdrawn, the others."""
        row = draft.get(f"{kind}/{subscription_id}")
        draft.put(f"{kind}/{subscription_id}", None)
        draft.do(Wake(f"expire/{subscription_id}", None))
        own = draft.get("own") or Own()
        mine = kind == "demand" or row.owner == self.node
        if kind == "demand":
            draft.put("own", Own(own.offers, own.demands - 1, own.withdrawn))
            draft.do(Wake(f"match/demand/{subscription_id}", None))
        else:
            _count(draft, row.owner, offers=-1)
            draft.put(_of_owner(subscription_id, row), None)
            if mine or reason == "withdrawn":
                draft.put(f"ended/{subscription_id}", Ended(row.owner, reason, now))
                forget_at = now + KEEP_ENDED_S if mine else row.expires
                draft.do(Wake(f"ended/{subscription_id}", forget_at, EndedDue(subscription_id)))
        if mine and kind == "offer":
            withdrawn = own.withdrawn
            if reason == "withdrawn":
                draft.do(Publish(TOPIC, OffersAnnounced((), (subscription_id,))))
                withdrawn = (*withdrawn, (subscription_id, row.expires))[-MAX_WITHDRAWN:]
            offers = tuple(offer_id for offer_id in own.offers if offer_id != subscription_id)
            draft.put("own", Own(offers, own.demands, withdrawn))
        if mine:
            draft.do(Send("negotiation", SubscriptionEnded(subscription_id, reason)))

    # -- telling the others
    def _announcements(self, draft: Draft, now: float) -> list[OffersAnnounced]:
        own = draft.get("own") or Own()
        withdrawn = tuple(offer_id for offer_id, expires in own.withdrawn if expires > now)
        parts = [own.offers[at : at + MAX_IDS] for at in range(0, len(own.offers), MAX_IDS)]
        if withdrawn and not parts:
            parts = [()]
        return [OffersAnnounced(part, withdrawn if at == 0 else ()) for at, part in enumerate(parts)]

    def _announce_again(self, draft: Draft, now: float) -> None:
        announcements = self._announcements(draft, now)
        draft.do(*(Publish(TOPIC, announcement) for announcement in announcements))
        if announcements:
            draft.do(Wake("announce", now + ANNOUNCE_EVERY_S, AnnounceDue()))

    def _greet(self, draft: Draft, node: str, now: float) -> None:
        """Tell a peer that just came up what we offer: it need not wait for the next announcement."""
        if node != self.node:
            to = address(node, self.name)
            draft.do(*(Send(to, part, ANSWER_DEADLINE_S) for part in self._announcements(draft, now)))

    # -- hearing from the others
    def _announced(self, draft: Draft, origin: str, message: OffersAnnounced, now: float) -> None:
        """Ask for what is new to us, and drop what its owner withdrew."""
        if len(message.offer_ids) > MAX_IDS or len(message.withdrawn_ids) > MAX_IDS:
            raise Violation(f"an announcement has at most {MAX_IDS} ids")
        if not all(map(SUBSCRIPTION_ID.match, (*message.offer_ids, *message.withdrawn_ids))):
            raise Violation("not the id of an offer")
        if origin == self.node:
            return
        for offer_id in message.withdrawn_ids:
            row = draft.get(f"offer/{offer_id}")
            if row and row.owner == origin:
                self._end(draft, "offer", offer_id, "withdrawn", now)
        unknown: list[str] = []
        room = MAX_ASKED_PER_NODE - (draft.get(f"owner/{origin}") or Owner()).asked
        room = min(room, _room_to_ask(draft, origin, len(message.offer_ids)))
        for offer_id in dict.fromkeys(message.offer_ids):
            asked = draft.get(f"asked/{offer_id}")
            if draft.get(f"offer/{offer_id}") or draft.get(f"ended/{offer_id}"):
                continue
            if asked and asked.until > now and asked.node == origin:
                continue  # but who tells of offers and does not give them keeps nobody else from it
            if len(unknown) >= room:
                _refuse(draft, offer_id, f"{origin} told of more offers than we ask for at a time", now)
                break
            if asked:
                _count(draft, asked.node, asked=-1)
            draft.put(f"asked/{offer_id}", Asked(origin, now + ASKED_FOR_S))
            _count(draft, origin, asked=1)
            unknown.append(offer_id)
        if unknown:
            key = digest(*unknown)
            draft.do(Wake(f"asked/{key}", now + ASKED_FOR_S, AskedDue(tuple(unknown))))
            draft.do(Send(address(origin, self.name), GetOffers(tuple(unknown)), ANSWER_DEADLINE_S))

    def _offers(self, draft: Draft, documents: tuple[Document, ...], meta: Meta) -> None:
        """Keep the offers that we asked for and that are in order; match them with our demands and scans."""
        sender, now = node_of(meta.sender), meta.now
        if len(documents) > MAX_IDS:
            raise Violation(f"an answer has at most {MAX_IDS} offers")
        fresh = []
        for document in documents:
            try:
                content = verify_subscription(document, "offer", now)
            except Violation as error:
                _refuse(draft, "", f"from {sender}: {error}", now)
                continue
            asked = draft.get(f"asked/{content.subscription_id}")
            if not asked:
                continue  # nobody asked, or it came before
            draft.put(f"asked/{content.subscription_id}", None)
            _count(draft, asked.node, asked=-1)
            if reason := self._no_room(draft, content, now):
                _refuse(draft, content.subscription_id, reason, now)
                continue
            if not draft.get(f"offer/{content.subscription_id}"):
                self._keep(draft, document, content, now, meta.origin if sender == content.owner else "")
                kind, offer_id = "offer", content.subscription_id
                draft.do(Wake(f"expire/{offer_id}", content.expires, ExpiryDue(kind, offer_id)))
                fresh.append((document, content))
        if fresh:
            self._match_fresh(draft, fresh, now)

    def _no_room(self, draft: Draft, content: Subscription, now: float) -> str:
        """Return why an offer is not kept, or nothing."""
        if content.owner == self.node:
            return "an offer of ours that we do not know; published before this journal began"
        if (draft.get(f"owner/{content.owner}") or Owner()).offers >= MAX_OFFERS_PER_OWNER:
            return f"this node keeps {MAX_OFFERS_PER_OWNER} offers of one node and no more"
        if (_stats(draft)).offers >= MAX_OFFERS and not self._make_room(draft, now):
            return f"this node keeps {MAX_OFFERS} offers and no more"
        return ""

    def _make_room(self, draft: Draft, now: float) -> bool:
        """Forget the oldest offers of who has most of them; return whether any was. They are announced again each minute."""
        found = ((key.split("/"), row.origin) for key, row in draft.prefix("of/"))
        occupants = (Occupant(float(number), offer_id, owner, origin) for (_, owner, number, offer_id), origin in found)
        ended = [one.key for one in islice(by_crowd(occupants, STANDS_OUT), ROOM_AT_ONCE)]
        for offer_id in ended:
            self._end(draft, "offer", offer_id, "pushed out", now)
        return bool(ended)

    def _keep(self, draft: Draft, document: Document, content: Subscription, now: float, origin: str = "") -> None:
        stats = _stats(draft)
        draft.put("stats", replace(stats, last_offer=stats.last_offer + 1))
        row = OfferRow(document, content.owner, content.expires, stats.last_offer + 1, origin)
        draft.put(f"offer/{content.subscription_id}", row)
        if content.owner != self.node:
            draft.put(_of_owner(content.subscription_id, row), OfOwner(origin))
        _count(draft, content.owner, offers=1)
        if content.owner == self.node:
            self._match_fresh(draft, [(document, content)], now)  # no demand of ours, but maybe a scan

    def _undelivered(self, draft: Draft, message: Undelivered) -> None:
        if node_of(message.to) != self.node and node_of(message.to).startswith("0x"):
            body = _peer(message.body)
            if isinstance(body, GetOffers):
                _forget_asked(draft, body.offer_ids, float("inf"))

    # -- matching
    def _match_fresh(self, draft: Draft, offers: list[tuple[Document, Subscription]], now: float) -> None:
        for _, demand in draft.readable("demand/"):
            for document, offer in offers:
                self._try(draft, demand, document, offer, now)
        for key, scan in draft.readable("scan/"):
            for _, offer in offers:
                _try_scan(draft, key, scan, offer)

    def _match_all(self, draft: Draft, target: str, now: float) -> None:
        """Try a new demand or scan against all known offers: at once where they are few, else part by part."""
        known = (_stats(draft)).offers
        if known <= AT_ONCE:
            self._match_part(draft, target, 0, 0, now)
        else:
            digits = 1 if known <= 16 * AT_ONCE else 2
            draft.do(Wake(f"match/{target}", now, MatchDue(target, 0, digits)))

    def _match_part(self, draft: Draft, target: str, shard: int, digits: int, now: float) -> None:
        row = draft.get(target)
        if not row:
            return
        prefix = f"{shard:0{digits}x}" if digits else ""
        for _, offer in draft.readable(f"offer/{prefix}"):
            if offer.number > row.known:
                continue  # tried when it came
            if isinstance(row, Scan):
                _try_scan(draft, target, row, read_subscription(offer.document.body))
            else:
                self._try(draft, row, offer.document, read_subscription(offer.document.body), now)
        if digits and shard + 1 < 16**digits:
            draft.do(Wake(f"match/{target}", now, MatchDue(target, shard + 1, digits)))

    def _try(self, draft: Draft, row: DemandRow, document: Document, offer: Subscription, now: float) -> None:
        demand = read_subscription(row.document.body)
        if offer.owner != self.node and offer.expires > now < row.expires and matches(demand, offer):
            known: OfferRow | None = draft.get(f"offer/{offer.subscription_id}")
            origin = known.origin if known else ""
            matched = Matched(demand.subscription_id, offer.subscription_id, row.document, document, origin)
            draft.do(Send("negotiation", matched))

    def _rematch(self, draft: Draft, demand_id: str, offer_id: str, now: float) -> None:
        demand, offer = draft.get(f"demand/{demand_id}"), draft.get(f"offer/{offer_id}")
        if demand and offer:
            self._try(draft, demand, offer.document, read_subscription(offer.document.body), now)

    # -- scans
    def _scan(self, draft: Draft, message: OpenScan | TouchScan | CloseScan | ScanDue, now: float) -> None:
        if isinstance(message, OpenScan):
            self._open_scan(draft, message, now)
            return
        key = f"scan/{message.scan_id}"
        scan = draft.get(key)
        if not scan:
            draft.do(Reply(Refused("unknown", f"Scan [{message.scan_id}] not found.")))
        elif isinstance(message, TouchScan):
            until = now + scan.timeout_s
            draft.put(key, replace(scan, until=until))
            draft.do(Wake(key, until, ScanDue(message.scan_id)), Reply(Done()))
        elif isinstance(message, CloseScan) or scan.until <= now:
            stats = _stats(draft)
            draft.put("stats", replace(stats, scans=stats.scans - 1))
            draft.put(key, None)
            draft.do(Wake(key, None), Wake(f"match/{key}", None), DropFeed(key), Emit(key, ScanEnded()), Reply(Done()))

    def _open_scan(self, draft: Draft, message: OpenScan, now: float) -> None:
        stats = _stats(draft)
        try:
            compile_constraint(message.constraints)
        except ConstraintSyntaxError as error:
            draft.do(Reply(Refused("bad_request", f"the constraints do not parse: {error}")))
            return
        if stats.scans >= MAX_SCANS:
            draft.do(Reply(Refused("busy", f"this node has {MAX_SCANS} scans open; close one first")))
            return
        scan_id, timeout_s = str(stats.last_scan + 1), min(message.timeout_s, MAX_SCAN_TIMEOUT_S)
        draft.put("stats", replace(stats, scans=stats.scans + 1, last_scan=stats.last_scan + 1))
        key, until = f"scan/{scan_id}", now + timeout_s
        draft.put(key, Scan(message.kind, message.constraints, timeout_s, message.owner, until, stats.last_offer))
        draft.do(Wake(key, until, ScanDue(scan_id)), Reply(ScanOpened(scan_id)))
        self._match_all(draft, key, now)


def _try_scan(draft: Draft, key: str, scan: Scan, offer: Subscription) -> None:
    if scan.kind == "offer" and compile_constraint(scan.constraints).evaluate(offer.properties):
        draft.do(Emit(key, OfferSeen(offer.subscription_id)))


def _answer(draft: Draft, offer_ids: tuple[str, ...], meta: Meta) -> None:
    """Send the offers that a peer asks for and that we know, up to a size; for the rest it asks again."""
    if len(offer_ids) > MAX_IDS:
        raise Violation(f"a question has at most {MAX_IDS} ids")
    part: list[Document] = []
    parts, size, total = [part], 0, 0
    for offer_id in dict.fromkeys(offer_ids):  # each once
        row = draft.get(f"offer/{offer_id}")
        if row and row.expires > meta.now:
            total += len(row.document.body)
            if total > ANSWERS_BYTES:
                break
            if size + len(row.document.body) > ANSWER_BYTES:
                part = []
                parts.append(part)
                size = 0
            part.append(row.document)
            size += len(row.document.body)
    draft.do(*(Send(meta.sender, Offers(tuple(part)), ANSWER_DEADLINE_S) for part in parts if part))


def _of_owner(offer_id: str, row: OfferRow) -> str:
    return f"of/{row.owner}/{row.number:012}/{offer_id}"


def _room_to_ask(draft: Draft, node: str, wanted: int) -> int:
    """Return for how many more offers a node may be asked; where it is too few, who was asked for more loses its oldest."""
    room = MAX_ASKED - (_stats(draft)).asked
    if room >= wanted:
        return room
    own = (draft.get(f"owner/{node}") or Owner()).asked
    asked: dict[str, list[str]] = {}
    for key, row in sorted(draft.prefix("asked/"), key=lambda pair: -pair[1].until):
        asked.setdefault(row.node, []).append(key.partition("/")[2])
    while room < wanted and len(most := max(asked.values(), key=len, default=[])) > own:
        _forget_asked(draft, [most.pop()], float("inf"))
        room, own = room + 1, own + 1
    return room


def _forget_asked(draft: Draft, offer_ids: Iterable[str], now: float) -> None:
    """Give up what was asked for and should have come before `now`."""
    for offer_id in offer_ids:
        asked = draft.get(f"asked/{offer_id}")
        if asked and asked.until <= now:
            draft.put(f"asked/{offer_id}", None)
            _count(draft, asked.node, asked=-1)


def _count(draft: Draft, node: str, offers: int = 0, asked: int = 0) -> None:
    """Keep the books of how much there is, of a node and in all."""
    owner, stats = draft.get(f"owner/{node}") or Owner(), _stats(draft)
    owner = Owner(owner.offers + offers, owner.asked + asked)
    draft.put(f"owner/{node}", owner if owner.offers or owner.asked else None)
    draft.put("stats", replace(stats, offers=stats.offers + offers, asked=stats.asked + asked))


def _refuse(draft: Draft, offer_id: str, reason: str, now: float) -> None:
    """Note an offer that is not kept, and why."""
    stats, refusal = _stats(draft), Refusal(offer_id, reason[:MAX_REASON_CHARS], now)
    draft.put("stats", replace(stats, refused=(*stats.refused, refusal)[-MAX_REFUSALS:]))


def _stats(draft: Draft) -> Stats:
    stats: Stats | None = draft.get("stats")
    return stats or Stats()
