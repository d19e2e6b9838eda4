"""The market machine: publishing, telling, asking, keeping, matching, ending."""

from __future__ import annotations

import time
from typing import Any

import pytest
from worlds.market_world import OTHER_ID, OTHER_KEY, PROVIDER_ID, PROVIDER_KEY, REQUESTOR_ID, REQUESTOR_KEY, demand, offer
from worlds.playbook import START, Nodes, Playbook, playbook

from actors.market import machine as market
from actors.market import matching
from actors.market.machine import Market
from actors.market.rows import OfferRow
from protocol.codec import encode
from protocol.market import (
    Announced,
    CloseScan,
    GetOffers,
    Matched,
    Offers,
    OffersAnnounced,
    OfferSeen,
    OpenScan,
    PeerUp,
    PublishDemand,
    Published,
    PublishOffer,
    Rematch,
    ScanEnded,
    SubscriptionEnded,
    SubscriptionOpened,
    TouchScan,
    Withdraw,
    read_subscription,
)
from protocol.signing import Document, node_id_of, sign
from protocol.types import Done, Refused, Undelivered, Violation

PROVIDER_MARKET, REQUESTOR_MARKET = f"{PROVIDER_ID}/market", f"{REQUESTOR_ID}/market"


@pytest.fixture
def provider() -> Playbook:
    return playbook(Market(PROVIDER_ID))


@pytest.fixture
def requestor() -> Playbook:
    return playbook(Market(REQUESTOR_ID))


def feed_offer(play: Playbook, offer_id: str, document: Document, origin: str = PROVIDER_ID) -> None:
    """Let an offer arrive the whole way: gossip, question, answer."""
    play.tell(Announced(origin, OffersAnnounced((offer_id,))))
    play.tell(Offers((document,)), origin)


def test_an_offer_published_is_told_and_answered(provider: Playbook) -> None:
    offer_id, document = offer(START)
    assert provider.ask(PublishOffer(document)) == Published(offer_id)
    assert [effect.message for effect in provider.published] == [OffersAnnounced((offer_id,))]
    assert provider.sent("negotiation") == [SubscriptionOpened(offer_id, document)]
    assert provider.ask(PublishOffer(document)) == Published(offer_id)  # a repetition changes nothing
    assert len(provider.published) == 1
    provider.tell(GetOffers((offer_id, "0" * 32 + "-" + "0" * 64)), REQUESTOR_ID)
    assert provider.sent(REQUESTOR_MARKET) == [Offers((document,))]


def test_offers_are_told_again_while_they_live(provider: Playbook) -> None:
    ids = []
    for number in range(205):
        offer_id, document = offer(START, number=number)
        provider.ask(PublishOffer(document))
        ids.append(offer_id)
    provider.published.clear()
    provider.at(60)
    parts = [effect.message.offer_ids for effect in provider.published]  # type: ignore[attr-defined]
    assert [len(part) for part in parts] == [100, 100, 5]
    assert sum(parts, ()) == tuple(ids)
    provider.at(3600)
    provider.published.clear()
    provider.at(600)
    assert provider.published == []  # all have expired: silence


def test_gossip_leads_to_a_match(provider: Playbook, requestor: Playbook) -> None:
    nodes = Nodes(provider, requestor)
    offer_id, offer_document = offer(START)
    demand_id, demand_document = demand(START)
    requestor.ask(PublishDemand(demand_document))
    provider.ask(PublishOffer(offer_document))
    requestor.tell(Announced(PROVIDER_ID, OffersAnnounced((offer_id,))))
    nodes.settle()
    found = [send.message for send in nodes.unlinked if isinstance(send.message, Matched)]
    assert found == [Matched(demand_id, offer_id, demand_document, offer_document)]


def test_a_demand_finds_offers_that_are_known_already(requestor: Playbook) -> None:
    offer_id, document = offer(START)
    feed_offer(requestor, offer_id, document)
    other_id, other = offer(START, number=2, golem__runtime__name="wasmtime")
    feed_offer(requestor, other_id, other)
    _, demand_document = demand(START)
    requestor.ask(PublishDemand(demand_document))
    assert [message.offer_id for message in requestor.sent("negotiation") if isinstance(message, Matched)] == [offer_id]


@pytest.mark.parametrize(
    ("changes", "constraints"),
    [
        ({"golem__inf__mem__gib": 0.25}, None),  # the demand says no
        ({}, "(golem.srv.comp.expiration>1900000000000)"),  # the offer says no
        ({}, "(golem.missing=1)"),  # undefined is no match
        ({}, "(golem.node.debug.subnet"),  # does not parse: never a match, and no error for whoever publishes
    ],
)
def test_no_match(requestor: Playbook, changes: dict[str, Any], constraints: str | None) -> None:
    requestor.ask(PublishDemand(demand(START)[1]))
    feed_offer(requestor, *offer(START, **changes, **({"constraints": constraints} if constraints else {})))
    assert not [message for message in requestor.sent("negotiation") if isinstance(message, Matched)]


def test_our_own_offer_never_matches_our_own_demand(requestor: Playbook) -> None:
    _, document = offer(START, REQUESTOR_KEY)
    assert isinstance(requestor.ask(PublishOffer(document)), Published)
    requestor.ask(PublishDemand(demand(START)[1]))
    requestor.ask(PublishOffer(offer(START, REQUESTOR_KEY, number=1)[1]))
    assert not [message for message in requestor.sent("negotiation") if isinstance(message, Matched)]


def test_a_peer_that_comes_up_hears_of_our_offers_at_once(provider: Playbook, requestor: Playbook) -> None:
    nodes = Nodes(provider, requestor)
    offer_id, document = offer(START)
    provider.ask(PublishOffer(document))
    requestor.ask(PublishDemand(demand(START)[1]))
    provider.tell(PeerUp(REQUESTOR_ID))
    nodes.settle()
    assert any(isinstance(send.message, Matched) for send in nodes.unlinked)
    assert f"offer/{offer_id}" in requestor.rows


def test_an_offer_is_asked_for_once_while_the_answer_is_due(requestor: Playbook) -> None:
    offer_id, document = offer(START)
    for origin in (PROVIDER_ID, PROVIDER_ID, OTHER_ID):
        requestor.tell(Announced(origin, OffersAnnounced((offer_id,))))
    assert requestor.take_sent(PROVIDER_MARKET) == [GetOffers((offer_id,))]
    assert requestor.sent(f"{OTHER_ID}/market") == [GetOffers((offer_id,))]  # anybody may tell of it, and answer
    assert requestor.rows["stats"].asked == 1
    requestor.at(market.ASKED_FOR_S)
    assert not list(requestor.rows.prefix("asked/"))
    requestor.tell(Announced(PROVIDER_ID, OffersAnnounced((offer_id,))))
    assert requestor.sent(PROVIDER_MARKET) == [GetOffers((offer_id,))]
    requestor.tell(Offers((document,)), OTHER_ID)
    assert requestor.rows[f"offer/{offer_id}"].owner == PROVIDER_ID
    requestor.tell(Announced(OTHER_ID, OffersAnnounced((offer_id,))))
    assert len(requestor.sent(f"{OTHER_ID}/market")) == 1


def test_who_tells_of_offers_and_does_not_give_them_keeps_nobody_from_them(requestor: Playbook) -> None:
    offer_id, document = offer(START)
    requestor.tell(Announced(OTHER_ID, OffersAnnounced((offer_id,))))
    requestor.tell(Announced(PROVIDER_ID, OffersAnnounced((offer_id,))))
    assert requestor.sent(PROVIDER_MARKET) == [GetOffers((offer_id,))]
    requestor.tell(Offers((document,)), PROVIDER_ID)
    assert requestor.rows[f"offer/{offer_id}"].owner == PROVIDER_ID
    assert requestor.rows["stats"].asked == 0


def test_a_question_that_did_not_arrive_may_be_asked_again(requestor: Playbook) -> None:
    offer_id, _ = offer(START)
    requestor.tell(Announced(PROVIDER_ID, OffersAnnounced((offer_id,))))
    requestor.tell(Undelivered(PROVIDER_MARKET, encode(GetOffers((offer_id,)))), REQUESTOR_MARKET)
    assert requestor.rows["stats"].asked == 0
    requestor.tell(Announced(PROVIDER_ID, OffersAnnounced((offer_id,))))
    assert len(requestor.sent(PROVIDER_MARKET)) == 2


def test_what_nobody_asked_for_is_not_kept(requestor: Playbook) -> None:
    offer_id, document = offer(START)
    requestor.tell(Offers((document,)), PROVIDER_ID)
    assert f"offer/{offer_id}" not in requestor.rows


def test_forged_offers_are_not_kept_and_the_reason_is(requestor: Playbook) -> None:
    offer_id, document = offer(START)
    bad = [
        (sign(OTHER_KEY, "offer", document.body), "signed by"),
        (sign(PROVIDER_KEY, "demand", document.body), "expected a signed offer"),
        (Document("offer", document.body.replace(b"4.0", b"8.0"), document.signature), "does not name this content"),
        (Document("offer", document.body + b" ", document.signature), "canonical"),
        (Document("offer", b"[1]", document.signature), "not an offer or demand"),
        (offer(START, number=3, lifetime_s=3 * 3600)[1], "2 hours"),
        (offer(START - 7200, number=4)[1], "expired"),
        (offer(START + 1000, number=5)[1], "clocks"),
    ]
    for forged, reason in bad:
        requestor.tell(Announced(PROVIDER_ID, OffersAnnounced((offer_id,))))
        requestor.tell(Offers((forged,)), PROVIDER_ID)
        assert reason in requestor.rows["stats"].refused[-1].reason
    assert not list(requestor.rows.prefix("offer/"))
    requestor.tell(Offers((document,)), PROVIDER_ID)  # the true one is still welcome
    assert f"offer/{offer_id}" in requestor.rows


def test_limits_per_node_and_in_total(requestor: Playbook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(market, "MAX_OFFERS_PER_OWNER", 2)
    monkeypatch.setattr(market, "MAX_OFFERS", 3)
    for number in range(3):
        feed_offer(requestor, *offer(START, number=number))
    assert "of one node" in requestor.rows["stats"].refused[-1].reason
    feed_offer(requestor, *offer(START, OTHER_KEY, number=8), OTHER_ID)
    feed_offer(requestor, *offer(START, OTHER_KEY, number=9), OTHER_ID)
    assert requestor.rows["stats"].offers == len(list(requestor.rows.prefix("offer/"))) <= 3
    assert {row.owner for _, row in requestor.rows.prefix("offer/")} == {OTHER_ID}, "who had most makes room"


def kept_by(play: Playbook) -> list[str]:
    return [row.owner for _, row in play.rows.prefix("offer/")]


def crowd_offer(play: Playbook, number: int, origin: str = "203.0.113.9") -> str:
    """An offer of one more identity, by one network address."""
    key = bytes([40, 1 + number % 200, 1 + number // 200, 7]) * 8
    offer_id, document = offer(START, key, number=number)
    node = node_id_of(key)
    play.tell(Announced(node, OffersAnnounced((offer_id,))))
    play.tell(Offers((document,)), node, origin)
    return node


def test_many_free_identities_close_no_market(requestor: Playbook, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where as many offers are known as we keep, those behind one address make room for one another."""
    monkeypatch.setattr(market, "MAX_OFFERS", 50)
    monkeypatch.setattr(market, "ROOM_AT_ONCE", 5)
    offer_id, document = offer(START)
    requestor.tell(Announced(PROVIDER_ID, OffersAnnounced((offer_id,))))
    requestor.tell(Offers((document,)), PROVIDER_ID, "198.51.100.1")
    nodes = [crowd_offer(requestor, number) for number in range(120)]
    assert nodes[-1] in kept_by(requestor)
    assert nodes[0] not in kept_by(requestor)
    assert PROVIDER_ID in kept_by(requestor), "it was the first, and has as many as each of the others"
    assert requestor.rows["stats"].offers == len(kept_by(requestor)) == len(list(requestor.rows.prefix("of/"))) <= 50
    late_id, late = offer(START, OTHER_KEY, number=9)
    requestor.tell(Announced(OTHER_ID, OffersAnnounced((late_id,))))
    requestor.tell(Offers((late,)), OTHER_ID, "198.51.100.2")
    assert f"offer/{late_id}" in requestor.rows, "the market is open to whoever comes"


def test_offers_that_never_come_keep_nobody_from_being_asked(requestor: Playbook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(market, "MAX_ASKED", 40)
    monkeypatch.setattr(market, "MAX_ASKED_PER_NODE", 20)
    for identity in range(4):
        ids = tuple(offer(START, number=100 * identity + number)[0] for number in range(20))
        requestor.tell(Announced(f"0x{identity:040x}", OffersAnnounced(ids)))
    offer_id, document = offer(START, OTHER_KEY, number=9)
    feed_offer(requestor, offer_id, document, OTHER_ID)
    assert f"offer/{offer_id}" in requestor.rows
    asked = [row.node for _, row in requestor.rows.prefix("asked/")]
    assert requestor.rows["stats"].asked == len(asked) == 39
    assert {asked.count(f"0x{identity:040x}") for identity in range(4)} == {9, 10}


def test_a_node_that_tells_of_too_much_is_asked_for_little(requestor: Playbook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(market, "MAX_ASKED_PER_NODE", 3)
    ids = tuple(offer(START, number=number)[0] for number in range(6))
    requestor.tell(Announced(PROVIDER_ID, OffersAnnounced(ids)))
    assert requestor.sent(PROVIDER_MARKET) == [GetOffers(ids[:3])]
    assert "more offers than we ask for" in requestor.rows["stats"].refused[-1].reason
    with pytest.raises(Violation):
        requestor.tell(OffersAnnounced(tuple(ids[0] for _ in range(101))), PROVIDER_ID)
    with pytest.raises(Violation):
        requestor.tell(OffersAnnounced(("no id",)), PROVIDER_ID)


def test_withdrawal_reaches_peers_and_only_the_owner_may(provider: Playbook, requestor: Playbook) -> None:
    offer_id, document = offer(START)
    provider.ask(PublishOffer(document))
    feed_offer(requestor, offer_id, document)
    requestor.tell(Announced(OTHER_ID, OffersAnnounced((), (offer_id,))))
    assert f"offer/{offer_id}" in requestor.rows
    assert provider.ask(Withdraw(offer_id)) == Done()
    told = provider.published[-1].message
    assert told == OffersAnnounced((), (offer_id,))
    assert provider.sent("negotiation")[-1] == SubscriptionEnded(offer_id, "withdrawn")
    requestor.tell(Announced(PROVIDER_ID, told))
    assert f"offer/{offer_id}" not in requestor.rows
    requestor.tell(Announced(OTHER_ID, OffersAnnounced((offer_id,))))  # a late word of somebody else
    assert requestor.sent(f"{OTHER_ID}/market") == []
    provider.tell(PeerUp(OTHER_ID))
    assert provider.sent(f"{OTHER_ID}/market") == [OffersAnnounced((), (offer_id,))]
    requestor.at(3600)
    assert f"ended/{offer_id}" not in requestor.rows


def test_withdraw_twice_and_of_what_is_not_ours(provider: Playbook) -> None:
    offer_id, document = offer(START)
    provider.ask(PublishOffer(document))
    provider.ask(Withdraw(offer_id))
    again = provider.ask(Withdraw(offer_id))
    assert isinstance(again, Refused)
    assert again.code == "gone"
    assert "unsubscribed" in again.message
    foreign_id, foreign = offer(START, OTHER_KEY)
    feed_offer(provider, foreign_id, foreign, OTHER_ID)
    assert provider.ask(Withdraw(foreign_id)).code == "unknown"
    demand_id, demand_document = demand(START, PROVIDER_KEY)
    provider.ask(PublishDemand(demand_document))
    assert provider.ask(Withdraw(demand_id)) == Done()
    assert provider.ask(Withdraw(demand_id)).code == "unknown"


def test_everything_ends_with_its_lifetime(provider: Playbook, requestor: Playbook) -> None:
    offer_id, document = offer(START, lifetime_s=100)
    provider.ask(PublishOffer(document))
    feed_offer(requestor, offer_id, document)
    demand_id, demand_document = demand(START, lifetime_s=200)
    requestor.ask(PublishDemand(demand_document))
    provider.at(100)
    requestor.at(200)
    assert provider.sent("negotiation")[-1] == SubscriptionEnded(offer_id, "expired")
    assert requestor.sent("negotiation")[-1] == SubscriptionEnded(demand_id, "expired")
    assert "expired" in provider.ask(Withdraw(offer_id)).message
    assert not list(requestor.rows.prefix("offer/"))
    assert not list(requestor.rows.prefix("owner/"))
    assert requestor.rows["stats"].offers == 0
    provider.at(market.KEEP_ENDED_S)
    assert provider.ask(Withdraw(offer_id)).code == "unknown"
    assert requestor.timers == {}


def test_our_own_documents_must_be_in_order(provider: Playbook) -> None:
    for document in (offer(START, OTHER_KEY)[1], offer(START - 7200)[1], offer(START, lifetime_s=9000)[1]):
        refused = provider.ask(PublishOffer(document))
        assert isinstance(refused, Refused)
        assert refused.code == "bad_request"
    assert not list(provider.rows.prefix("offer/"))


def test_no_more_own_offers_than_the_limit(provider: Playbook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(market, "MAX_OWN", 1)
    provider.ask(PublishOffer(offer(START)[1]))
    assert provider.ask(PublishOffer(offer(START, number=1)[1])).code == "busy"
    provider.ask(Withdraw(offer(START)[0]))
    assert isinstance(provider.ask(PublishOffer(offer(START, number=1)[1])), Published)


def test_answers_stay_within_the_size_of_a_message(provider: Playbook) -> None:
    ids = []
    for number in range(12):
        offer_id, document = offer(START, number=number, filler="x" * 100_000)
        assert isinstance(provider.ask(PublishOffer(document)), Published)
        ids.append(offer_id)
    provider.tell(GetOffers(tuple(ids)), REQUESTOR_ID)
    answers = provider.sent(REQUESTOR_MARKET)
    assert [read_subscription(document.body).subscription_id for answer in answers for document in answer.documents] == ids
    assert all(len(encode(answer)) < 700_000 for answer in answers)
    too_large = provider.ask(PublishOffer(offer(START, number=99, filler="x" * 140_000)[1]))
    assert too_large.code == "bad_request"


def test_a_pair_is_matched_again_while_both_live(requestor: Playbook) -> None:
    offer_id, document = offer(START)
    demand_id, demand_document = demand(START)
    feed_offer(requestor, offer_id, document)
    requestor.ask(PublishDemand(demand_document))
    requestor.tell(Rematch(demand_id, offer_id), f"{REQUESTOR_ID}/negotiation")
    assert len([message for message in requestor.sent("negotiation") if isinstance(message, Matched)]) == 2
    requestor.ask(Withdraw(demand_id))
    requestor.tell(Rematch(demand_id, offer_id), f"{REQUESTOR_ID}/negotiation")
    assert len([message for message in requestor.sent("negotiation") if isinstance(message, Matched)]) == 2


def test_a_scan_sees_known_and_later_offers(requestor: Playbook) -> None:
    first_id, first = offer(START)
    feed_offer(requestor, first_id, first)
    scan_id = requestor.ask(OpenScan("offer", "(golem.runtime.name=vm)", 300.0)).scan_id
    other = requestor.ask(OpenScan("demand", "()", 300.0)).scan_id
    assert (scan_id, other) == ("1", "2")
    second_id, second = offer(START, number=2)
    feed_offer(requestor, second_id, second)
    feed_offer(requestor, *offer(START, number=3, golem__runtime__name="wasmtime"))
    assert requestor.take(f"scan/{scan_id}") == [OfferSeen(first_id), OfferSeen(second_id)]
    assert requestor.take(f"scan/{other}") == []
    requestor.at(200)
    assert requestor.ask(TouchScan(scan_id)) == Done()
    requestor.at(200)
    assert f"scan/{scan_id}" in requestor.rows  # it was read meanwhile
    assert f"scan/{other}" not in requestor.rows
    assert requestor.ask(CloseScan(scan_id)) == Done()
    assert requestor.feed(f"scan/{scan_id}") == [ScanEnded()]
    assert requestor.ask(TouchScan(scan_id)).code == "unknown"
    assert requestor.ask(OpenScan("offer", "(a", 300.0)).code == "bad_request"


def test_ten_thousand_offers(requestor: Playbook) -> None:
    """A large market is matched part by part, so that no step takes long, and every offer once."""
    key_count = 2000  # of 10,000: signing that many would be the test's time, and rows are all that matters here
    expected = set()
    for number in range(key_count):
        offer_id, document = offer(START, number=number, golem__inf__mem__gib=float(number % 4))
        requestor.rows[f"offer/{offer_id}"] = OfferRow(document, PROVIDER_ID, START + 3600, number + 1)
        if number % 4 >= 1:
            expected.add(offer_id)
    requestor.rows["stats"] = market.StatsRow(offers=10_000, last_offer=key_count)
    started = time.perf_counter()
    requestor.ask(PublishDemand(demand(START)[1]))
    at_once = time.perf_counter() - started
    matched = [message for message in requestor.sent("negotiation") if isinstance(message, Matched)]
    assert len(matched) <= matching.PAIRS_AT_ONCE
    new_id, new = offer(START, number=10_001)
    feed_offer(requestor, new_id, new)  # comes while the old ones are being matched
    steps = 0
    while any(key.startswith("match/") for key in requestor.timers):
        steps += 1
        requestor.at(0)
        requestor.now += 1e-6
    found = [message.offer_id for message in requestor.sent("negotiation") if isinstance(message, Matched)]
    assert len(found) == len(set(found))
    assert set(found) == expected | {new_id}
    assert at_once < 0.5
