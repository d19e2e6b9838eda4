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
from actors.kernel.draft import Declined, Draft
from actors.kernel.grammar import EDGE, ITSELF, PEER, On, Table, TableMachine
from actors.kernel.machine import DropFeed, Emit, Publish, Reply, Send, Wake
from actors.market.books import count, refuse, stats_of
from actors.market.matching import attempt, match_all, match_due, match_fresh
from actors.market.rows import AskedRow, DemandRow, EndedRow, OfferRow, OfOwnerRow, OwnerRow, OwnRow, ScanRow, StatsRow
from protocol.codec import Decoder
from protocol.market import (
    MAX_IDS,
    SUBSCRIPTION_ID,
    Announced,
    AnnounceDue,
    AskedDue,
    CloseScan,
    EndedDue,
    ExpiryDue,
    GetOffers,
    MatchDue,
    Offers,
    OffersAnnounced,
    OpenScan,
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
    read_subscription,
    verify_subscription,
    weight,
)
from protocol.signing import Document
from protocol.states import DocumentKind, SubscriptionEnd
from protocol.terms import ConstraintSyntaxError, compile_constraint
from protocol.types import Done, Message, Undelivered, Violation, address, digest, node_of

NAME = "market"
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
ANSWER_BYTES, ANSWERS_BYTES = 128 * 1024, 2048 * 1024  # documents in one `Offers`, and in all of one question


# -- our own offers and demands
def _publish(draft: Draft, message: PublishOffer | PublishDemand) -> None:
    kind = DocumentKind.OFFER if isinstance(message, PublishOffer) else DocumentKind.DEMAND
    try:
        content = verify_subscription(message.document, kind, draft.now)
        if content.owner != draft.me:
            raise Violation(f"the {kind} belongs to another node")
    except Violation as error:
        raise Declined("bad_request", str(error)) from None
    own, subscription_id = draft.get("own") or OwnRow(), content.subscription_id
    if draft.get(f"{kind}/{subscription_id}"):
        draft.reply(Published(subscription_id))
        return
    if (len(own.offers) if kind == DocumentKind.OFFER else own.demands) >= MAX_OWN:
        raise Declined("busy", f"this node has {MAX_OWN} {kind}s; withdraw one first")
    draft.do(
        Reply(Published(subscription_id)),
        Wake(f"expire/{subscription_id}", content.expires, ExpiryDue(kind, subscription_id)),
        Send("negotiation", SubscriptionOpened(subscription_id, message.document)),
    )
    if kind == DocumentKind.DEMAND:
        draft.put(f"demand/{subscription_id}", DemandRow(message.document, content.expires, stats_of(draft).last_offer))
        draft.put("own", OwnRow(own.offers, own.demands + 1, own.withdrawn))
        match_all(draft, f"demand/{subscription_id}")
        return
    _keep(draft, message.document, content)
    draft.put("own", OwnRow((*own.offers, subscription_id), own.demands, own.withdrawn))
    draft.do(Publish(TOPIC, OffersAnnounced((subscription_id,))))
    draft.do(Wake("announce", draft.now + ANNOUNCE_EVERY_S, AnnounceDue()))


def _withdraw(draft: Draft, message: Withdraw) -> None:
    subscription_id = message.subscription_id
    offer, ended = draft.get(f"offer/{subscription_id}"), draft.get(f"ended/{subscription_id}")
    if (offer and offer.owner == draft.me) or draft.get(f"demand/{subscription_id}"):
        _end(draft, DocumentKind.OFFER if offer else DocumentKind.DEMAND, subscription_id, SubscriptionEnd.WITHDRAWN)
        draft.reply(Done())
    elif ended and ended.owner == draft.me:
        text = "unsubscribed" if ended.reason == SubscriptionEnd.WITHDRAWN else "expired"
        raise Declined("gone", f"Offer [{subscription_id}] is already {text}.")
    else:
        raise Declined("unknown", f"Subscription [{subscription_id}] not found.")


def _expired(draft: Draft, message: ExpiryDue) -> None:
    row = draft.get(f"{message.kind}/{message.subscription_id}")
    if row and row.expires <= draft.now:
        _end(draft, message.kind, message.subscription_id, SubscriptionEnd.EXPIRED)


def _end(draft: Draft, kind: DocumentKind, subscription_id: str, reason: SubscriptionEnd) -> None:
    """Take an offer or demand off the market; tell its agent and, of an own offer withdrawn, the others."""
    row = draft.get(f"{kind}/{subscription_id}")
    draft.put(f"{kind}/{subscription_id}", None)
    draft.do(Wake(f"expire/{subscription_id}", None))
    own = draft.get("own") or OwnRow()
    mine = kind == DocumentKind.DEMAND or row.owner == draft.me
    if kind == DocumentKind.DEMAND:
        draft.put("own", OwnRow(own.offers, own.demands - 1, own.withdrawn))
        draft.do(Wake(f"match/demand/{subscription_id}", None))
    else:
        count(draft, row.owner, offers=-1)
        draft.put(_of_owner(subscription_id, row), None)
        if mine or reason == SubscriptionEnd.WITHDRAWN:
            draft.put(f"ended/{subscription_id}", EndedRow(row.owner, reason, draft.now))
            forget_at = draft.now + KEEP_ENDED_S if mine else row.expires
            draft.do(Wake(f"ended/{subscription_id}", forget_at, EndedDue(subscription_id)))
    if mine and kind == DocumentKind.OFFER:
        withdrawn = own.withdrawn
        if reason == SubscriptionEnd.WITHDRAWN:
            draft.do(Publish(TOPIC, OffersAnnounced((), (subscription_id,))))
            withdrawn = (*withdrawn, (subscription_id, row.expires))[-MAX_WITHDRAWN:]
        offers = tuple(offer_id for offer_id in own.offers if offer_id != subscription_id)
        draft.put("own", OwnRow(offers, own.demands, withdrawn))
    if mine:
        draft.do(Send("negotiation", SubscriptionEnded(subscription_id, reason)))


# -- telling the others
def _announcements(draft: Draft) -> list[OffersAnnounced]:
    own = draft.get("own") or OwnRow()
    withdrawn = tuple(offer_id for offer_id, expires in own.withdrawn if expires > draft.now)
    parts = [own.offers[at : at + MAX_IDS] for at in range(0, len(own.offers), MAX_IDS)]
    if withdrawn and not parts:
        parts = [()]
    return [OffersAnnounced(part, withdrawn if at == 0 else ()) for at, part in enumerate(parts)]


def _announce_again(draft: Draft, message: AnnounceDue) -> None:
    announcements = _announcements(draft)
    draft.do(*(Publish(TOPIC, announcement) for announcement in announcements))
    if announcements:
        draft.do(Wake("announce", draft.now + ANNOUNCE_EVERY_S, AnnounceDue()))


def _greet(draft: Draft, message: PeerUp) -> None:
    """Tell a peer that just came up what we offer: it need not wait for the next announcement."""
    if message.node != draft.me:
        to = address(message.node, NAME)
        draft.do(*(Send(to, part, ANSWER_DEADLINE_S) for part in _announcements(draft)))


# -- hearing from the others
def _announced(draft: Draft, message: Announced) -> None:
    _hear(draft, message.origin, message.announcement)


def _told(draft: Draft, message: OffersAnnounced) -> None:
    _hear(draft, node_of(draft.meta.sender), message)


def _hear(draft: Draft, origin: str, message: OffersAnnounced) -> None:
    """Ask for what is new to us, and drop what its owner withdrew."""
    if len(message.offer_ids) > MAX_IDS or len(message.withdrawn_ids) > MAX_IDS:
        raise Violation(f"an announcement has at most {MAX_IDS} ids")
    if not all(map(SUBSCRIPTION_ID.match, (*message.offer_ids, *message.withdrawn_ids))):
        raise Violation("not the id of an offer")
    if origin == draft.me:
        return
    for offer_id in message.withdrawn_ids:
        row = draft.get(f"offer/{offer_id}")
        if row and row.owner == origin:
            _end(draft, DocumentKind.OFFER, offer_id, SubscriptionEnd.WITHDRAWN)
    unknown: list[str] = []
    room = MAX_ASKED_PER_NODE - (draft.get(f"owner/{origin}") or OwnerRow()).asked
    room = min(room, _room_to_ask(draft, origin, len(message.offer_ids)))
    for offer_id in dict.fromkeys(message.offer_ids):
        asked = draft.get(f"asked/{offer_id}")
        if draft.get(f"offer/{offer_id}") or draft.get(f"ended/{offer_id}"):
            continue
        if asked and asked.until > draft.now and asked.node == origin:
            continue  # but who tells of offers and does not give them keeps nobody else from it
        if len(unknown) >= room:
            refuse(draft, offer_id, f"{origin} told of more offers than we ask for at a time")
            break
        if asked:
            count(draft, asked.node, asked=-1)
        draft.put(f"asked/{offer_id}", AskedRow(origin, draft.now + ASKED_FOR_S))
        count(draft, origin, asked=1)
        unknown.append(offer_id)
    if unknown:
        key = digest(*unknown)
        draft.do(Wake(f"asked/{key}", draft.now + ASKED_FOR_S, AskedDue(tuple(unknown))))
        draft.do(Send(address(origin, NAME), GetOffers(tuple(unknown)), ANSWER_DEADLINE_S))


def _offers(draft: Draft, message: Offers) -> None:
    """Keep the offers that we asked for and that are in order; match them with our demands and scans."""
    if len(message.documents) > MAX_IDS:
        raise Violation(f"an answer has at most {MAX_IDS} offers")
    fresh, total = [], 0
    for number, document in enumerate(message.documents):
        total += weight(document.body)
        if number and total > ANSWER_BYTES:
            refuse(draft, "", f"from {node_of(draft.meta.sender)}: too many offers at a time; they are asked for again")
            break
        try:
            content = verify_subscription(document, DocumentKind.OFFER, draft.now)
        except Violation as error:
            refuse(draft, "", f"from {node_of(draft.meta.sender)}: {error}")
            continue
        asked = draft.get(f"asked/{content.subscription_id}")
        if not asked:
            continue  # nobody asked, or it came before
        draft.put(f"asked/{content.subscription_id}", None)
        count(draft, asked.node, asked=-1)
        if reason := _no_room(draft, content):
            refuse(draft, content.subscription_id, reason)
            continue
        if not draft.get(f"offer/{content.subscription_id}"):
            sender = node_of(draft.meta.sender)
            _keep(draft, document, content, draft.meta.origin if sender == content.owner else "")
            kind, offer_id = DocumentKind.OFFER, content.subscription_id
            draft.do(Wake(f"expire/{offer_id}", content.expires, ExpiryDue(kind, offer_id)))
            fresh.append((document, content))
    match_fresh(draft, fresh)


def _no_room(draft: Draft, content: Subscription) -> str:
    """Return why an offer is not kept, or nothing."""
    if content.owner == draft.me:
        return "an offer of ours that we do not know; published before this journal began"
    if (draft.get(f"owner/{content.owner}") or OwnerRow()).offers >= MAX_OFFERS_PER_OWNER:
        return f"this node keeps {MAX_OFFERS_PER_OWNER} offers of one node and no more"
    if (stats_of(draft)).offers >= MAX_OFFERS and not _make_room(draft):
        return f"this node keeps {MAX_OFFERS} offers and no more"
    return ""


def _make_room(draft: Draft) -> bool:
    """Forget the oldest offers of who has most of them; return whether any was. They are announced again each minute."""
    found = ((key.split("/"), row.origin) for key, row in draft.prefix("of/"))
    occupants = (Occupant(float(number), offer_id, owner, origin) for (_, owner, number, offer_id), origin in found)
    ended = [one.key for one in islice(by_crowd(occupants, STANDS_OUT), ROOM_AT_ONCE)]
    for offer_id in ended:
        _end(draft, DocumentKind.OFFER, offer_id, SubscriptionEnd.PUSHED_OUT)
    return bool(ended)


def _keep(draft: Draft, document: Document, content: Subscription, origin: str = "") -> None:
    stats = stats_of(draft)
    draft.put("stats", replace(stats, last_offer=stats.last_offer + 1))
    row = OfferRow(document, content.owner, content.expires, stats.last_offer + 1, origin)
    draft.put(f"offer/{content.subscription_id}", row)
    if content.owner != draft.me:
        draft.put(_of_owner(content.subscription_id, row), OfOwnerRow(origin))
    count(draft, content.owner, offers=1)
    if content.owner == draft.me:
        match_fresh(draft, [(document, content)])  # no demand of ours, but maybe a scan


def _asked_due(draft: Draft, message: AskedDue) -> None:
    _forget_asked(draft, message.offer_ids, draft.now)


def _ended_due(draft: Draft, message: EndedDue) -> None:
    draft.put(f"ended/{message.subscription_id}", None)


def _undelivered(draft: Draft, message: Undelivered) -> None:
    if node_of(message.to) != draft.me and node_of(message.to).startswith("0x"):
        body = _peer(message.body)
        if isinstance(body, GetOffers):
            _forget_asked(draft, body.offer_ids, float("inf"))


# -- matching
def _rematch(draft: Draft, message: Rematch) -> None:
    demand, offer = draft.get(f"demand/{message.demand_id}"), draft.get(f"offer/{message.offer_id}")
    if demand and offer:
        attempt(draft, demand, offer.document, read_subscription(offer.document.body))


# -- scans
def _find_scan(draft: Draft, scan_id: str) -> ScanRow:
    scan = draft.row(ScanRow, f"scan/{scan_id}")
    if scan is None:
        raise Declined("unknown", f"Scan [{scan_id}] not found.")
    return scan


def _touch_scan(draft: Draft, message: TouchScan) -> None:
    scan, key = _find_scan(draft, message.scan_id), f"scan/{message.scan_id}"
    until = draft.now + scan.timeout_s
    draft.put(key, replace(scan, until=until))
    draft.do(Wake(key, until, ScanDue(message.scan_id)), Reply(Done()))


def _close_scan(draft: Draft, message: CloseScan) -> None:
    _find_scan(draft, message.scan_id)
    _end_scan(draft, f"scan/{message.scan_id}")
    draft.reply(Done())


def _scan_due(draft: Draft, message: ScanDue) -> None:
    key = f"scan/{message.scan_id}"
    scan = draft.row(ScanRow, key)
    if scan is not None and scan.until <= draft.now:
        _end_scan(draft, key)


def _end_scan(draft: Draft, key: str) -> None:
    stats = stats_of(draft)
    draft.put("stats", replace(stats, scans=stats.scans - 1))
    draft.put(key, None)
    draft.do(Wake(key, None), Wake(f"match/{key}", None), DropFeed(key), Emit(key, ScanEnded()))


def _open_scan(draft: Draft, message: OpenScan) -> None:
    stats = stats_of(draft)
    try:
        compile_constraint(message.constraints)
    except ConstraintSyntaxError as error:
        raise Declined("bad_request", f"the constraints do not parse: {error}") from None
    if stats.scans >= MAX_SCANS:
        raise Declined("busy", f"this node has {MAX_SCANS} scans open; close one first")
    scan_id, timeout_s = str(stats.last_scan + 1), min(message.timeout_s, MAX_SCAN_TIMEOUT_S)
    draft.put("stats", replace(stats, scans=stats.scans + 1, last_scan=stats.last_scan + 1))
    key, until = f"scan/{scan_id}", draft.now + timeout_s
    draft.put(key, ScanRow(message.kind, message.constraints, timeout_s, message.owner, until, stats.last_offer))
    draft.do(Wake(key, until, ScanDue(scan_id)), Reply(ScanOpened(scan_id)))
    match_all(draft, key)


def _answer(draft: Draft, message: GetOffers) -> None:
    """Send the offers that a peer asks for and that we know, up to a size; for the rest it asks again."""
    if len(message.offer_ids) > MAX_IDS:
        raise Violation(f"a question has at most {MAX_IDS} ids")
    part: list[Document] = []
    parts, size, total = [part], 0, 0
    for offer_id in dict.fromkeys(message.offer_ids):  # each once
        row = draft.get(f"offer/{offer_id}")
        if row and row.expires > draft.now:
            costs = weight(row.document.body)
            total += costs
            if total > ANSWERS_BYTES:
                break
            if size + costs > ANSWER_BYTES:
                part = []
                parts.append(part)
                size = 0
            part.append(row.document)
            size += costs
    draft.do(*(Send(draft.meta.sender, Offers(tuple(part)), ANSWER_DEADLINE_S) for part in parts if part))


def _of_owner(offer_id: str, row: OfferRow) -> str:
    return f"of/{row.owner}/{row.number:012}/{offer_id}"


def _room_to_ask(draft: Draft, node: str, wanted: int) -> int:
    """Return for how many more offers a node may be asked; where it is too few, who was asked for more loses its oldest."""
    room = MAX_ASKED - (stats_of(draft)).asked
    if room >= wanted:
        return room
    own = (draft.get(f"owner/{node}") or OwnerRow()).asked
    asked: dict[str, list[str]] = {}
    for key, row in sorted(draft.prefix("asked/"), key=lambda pair: -pair[1].until):
        asked.setdefault(row.node, []).append(key.partition("/")[2])
    while room < wanted and len(most := max(asked.values(), key=len, default=[])) > own:
        _forget_asked(draft, [most.pop()], float("inf"))
        room, own = room + 1, own + 1
    return room


def _forget_asked(draft: Draft, offer_ids: Iterable[str], before: float) -> None:
    """Give up what was asked for and should have come by now."""
    for offer_id in offer_ids:
        asked = draft.get(f"asked/{offer_id}")
        if asked and asked.until <= before:
            draft.put(f"asked/{offer_id}", None)
            count(draft, asked.node, asked=-1)


class Market(TableMachine):
    """The machine `market`."""

    name = NAME
    rows = OfferRow | OfOwnerRow | DemandRow | EndedRow | AskedRow | OwnerRow | ScanRow | OwnRow | StatsRow
    table = Table(
        On(PublishOffer, EDGE, _publish),
        On(PublishDemand, EDGE, _publish),
        On(Withdraw, EDGE, _withdraw),
        On(OpenScan, EDGE, _open_scan),
        On(TouchScan, EDGE, _touch_scan),
        On(CloseScan, EDGE, _close_scan),
        On(Announced, EDGE, _announced),
        On(PeerUp, "network", _greet),
        On(Rematch, "negotiation", _rematch),
        On(OffersAnnounced, PEER, _told),
        On(GetOffers, PEER, _answer),
        On(Offers, PEER, _offers),
        On(AnnounceDue, ITSELF, _announce_again),
        On(ExpiryDue, ITSELF, _expired),
        On(EndedDue, ITSELF, _ended_due),
        On(AskedDue, ITSELF, _asked_due),
        On(MatchDue, ITSELF, match_due),
        On(ScanDue, ITSELF, _scan_due),
        On(Undelivered, ITSELF, _undelivered),
    )


_peer = Decoder[Message](Market.peer)
