"""Nothing that a peer sends holds the event loop for long, on any channel: the largest lawful frames, and garbled ones.

The hostile peer is a real node of the network in a thread with a loop of its own, so that only what the victim does is
measured. The victim has a demand and an offer whose terms are large as well. The limit is scaled as in `tests/rest`.
"""

from __future__ import annotations

import gc
import json
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from net_helpers import config
from worlds.loop import slowness, watched
from worlds.market_world import KEYS, subscription
from worlds.node_in_test import node_in_test
from worlds.patience import within
from worlds.support import trio_test

from golem.base.loop_watch import HELD_S
from golem.net import NetError, PeerNetwork, open_network
from golem.net.links import PING, REPLY, REQUEST
from golem.node.node import Node
from protocol.activity import CommandResult, StateChanged
from protocol.codec import MAX_BODY_BYTES, Envelope, encode, encode_batch
from protocol.ledger import AgreementPayment, DocumentSent, InvoiceBody, PaymentBody, PaymentSent, Recalled, encode_body
from protocol.market import GetOffers, Offers, OffersAnnounced, PublishDemand, PublishOffer, canonical, read_subscription
from protocol.negotiation import AgreementProposed, AgreementTerminated, ProposalOpened, ProposalRejected, proposal_id
from protocol.signing import Document, node_id_of, sign
from protocol.states import ActivityState

KEY = KEYS[4]
ME = node_id_of(KEY)
A_DATE = "2031-01-01T00:00:00Z"
Attack = Callable[["Hostile"], Awaitable[None]]


class Hostile:
    """A peer that says what it likes."""

    def __init__(self, network: PeerNetwork, victim: str, offer_id: str) -> None:
        self.network, self.victim, self.offer_id = network, victim, offer_id
        self._seq: dict[str, int] = {}

    async def ask(self, service: str, payload: bytes) -> None:
        with suppress(NetError):  # it says no
            await self.network.request(self.victim, service, payload, 20)

    async def mail(self, actor: str, *bodies: bytes) -> None:
        """Send messages to the victim's actor, in one frame."""
        before = self._seq.get(actor, 0)
        envelopes = [
            Envelope(f"{ME}/{actor}", f"{self.victim}/{actor}", "e", before + n + 1, before + n, "t", body)
            for n, body in enumerate(bodies)
        ]
        self._seq[actor] = before + len(bodies)
        await self.ask("mail", encode_batch(envelopes))

    async def stream(self, name: str, data: bytes) -> None:
        with suppress(NetError):
            async with await self.network.open_stream(self.victim, name) as stream:
                await stream.send_all(data)
                await stream.send_eof()
                with trio.move_on_after(1):
                    while await stream.receive_some():
                        pass

    async def frames(self, count: int, kind: int, service: str, payload: bytes) -> None:
        """Send frames on our link, as many as the victim can have in its buffer at once."""
        link = await (await self.network._ready()).link(self.victim)
        for number in range(count):
            link._channel.send(1 << 40 | number, kind, service, payload)
        with trio.move_on_after(2), suppress(NetError):  # the victim may have ended the link
            await link.ping(2)


def now() -> float:
    return round(time.time(), 3)


def offer_of(number: int, properties: dict[str, Any], constraints: str = "()") -> tuple[str, Document]:
    return subscription("offer", KEY, properties, constraints, now(), number)


LISTS = {"l": [{"a": 1}] * 4000}
FLOATS = {"l": [1e10 / 7] * 5000}
MANY = {f"p.{n}": n / 7 for n in range(2500)}
CLAUSES = "(&" + f"({'n' * 50}=1)" * 1000 + ")"
WILD = "(|" + f"(t={'a*' * 500}b)" * 60 + ")"


async def announced(peer: Hostile, offers: list[tuple[str, Document]]) -> None:
    """Offers that the victim asks for; they come however it asks."""
    ids = [offer_id for offer_id, _ in offers]
    for at in range(0, len(ids), 100):
        await peer.mail("market", encode(OffersAnnounced(tuple(ids[at : at + 100]))))
    for at in range(0, len(offers), 7):
        await peer.mail("market", encode(Offers(tuple(document for _, document in offers[at : at + 7]))))
    for offer in offers:
        await peer.mail("market", encode(Offers((offer[1],))))


def proposal(peer: Hostile, properties: dict[str, Any], constraints: str) -> bytes:
    demand_id, demand = subscription("demand", KEY, {**properties, "x": ME}, constraints, now())
    content = read_subscription(demand.body)
    text, created = canonical(content.properties).decode(), now()
    named = proposal_id(demand_id, peer.offer_id, "a" * 64, ME, text, constraints, created)
    return encode(ProposalOpened(named, "a" * 64, peer.offer_id, demand, text, constraints, created))


def invoice(activities: int) -> Document:
    ids = tuple(f"{n:032x}" for n in range(activities))
    body = InvoiceBody("i" * 32, ME, ME, ME, ME, "p", A_DATE, "g" * 64, ids, "1", A_DATE)
    return sign(KEY, "invoice", encode_body(body))


def payment(parts: int) -> Document:
    paid = tuple(AgreementPayment("g" * 40, "0.123456789123456789") for _ in range(parts))
    body = PaymentBody("p" * 32, ME, ME, ME, ME, "p", "1", A_DATE, paid, (), "x")
    return sign(KEY, "payment", encode_body(body))


def empties(count: int) -> bytes:
    """A result whose output is a million empty arrays."""
    whole = encode(CommandResult("a" * 32, "b" * 32, 0, True, None, None, None, 1.0, True))
    head, tail = whole.split(b"\xc0\xc0\xc0", 1)
    return head + b"\xdd" + count.to_bytes(4, "big") + b"\x90" * count + b"\xc0\xc0" + tail


def garbled(whole: bytes, seed: int) -> bytes:
    rng, made = random.Random(seed), bytearray(whole)
    for _ in range(20):
        made[rng.randrange(len(made))] = rng.randrange(256)
    return bytes(made)


async def _nothing(_: Hostile) -> None:
    pass


async def gossip(peer: Hostile, *payloads: bytes) -> None:
    for payload in payloads:
        peer.network.publish("offers", payload)
    await trio.sleep(1)


def of(actor: str, *bodies: Callable[[Hostile], bytes]) -> Attack:
    async def attack(peer: Hostile) -> None:
        for made in bodies:
            await peer.mail(actor, made(peer))

    return attack


def says(text: str) -> bytes:
    return encode(AgreementTerminated("g" * 64, "Requestor", text))


FULL = MAX_BODY_BYTES - 200
HOSTILE: dict[str, Attack] = {
    "a million ids": of("market", lambda _: encode(OffersAnnounced(("",) * FULL))),
    "a question with a million ids": of("market", lambda _: encode(GetOffers(("",) * FULL))),
    "as many ids as are taken": of("market", *[lambda _, n=n: encode(OffersAnnounced(tuple(
        f"{n:030x}{i:02x}-{n:064x}" for i in range(100)))) for n in range(8)]),
    "a million documents": of("market", lambda _: encode(Offers((Document("", b"", b""),) * (FULL // 7)))),
    "offers with lists": lambda peer: announced(peer, [offer_of(n, LISTS) for n in range(24)]),
    "offers with fractions": lambda peer: announced(peer, [offer_of(n, FLOATS) for n in range(12)]),
    "offers with everything": lambda peer: announced(peer, [offer_of(n, MANY, CLAUSES) for n in range(12)]),
    "offers with patterns": lambda peer: announced(peer, [offer_of(n, {"t": "ab" * 10_000}, WILD) for n in range(8)]),
    "small offers": lambda peer: announced(peer, [offer_of(n, {"a": n}) for n in range(300)]),
    "offers nobody asked for": of("market", lambda _: encode(Offers(tuple(offer_of(n, LISTS)[1] for n in range(20))))),
    "a proposal of everything": of("negotiation", lambda peer: proposal(peer, MANY, CLAUSES)),
    "a proposal of lists": of("negotiation", lambda peer: proposal(peer, LISTS, CLAUSES)),
    "a proposal of patterns": of("negotiation", lambda peer: proposal(peer, {"t": "ab" * 10_000}, WILD)),
    "agreements": of("negotiation", lambda _: encode(AgreementProposed(sign(KEY, "agreement", canonical(MANY) + b" " * 80_000)))),
    "agreements of numbers": of("negotiation", lambda _: encode(AgreementProposed(
        sign(KEY, "agreement", b'{"agreementId":[' + b"1.5," * 200_000 + b"1]}")))),
    "reasons": of("negotiation", lambda _: says('{"message":"' + "x" * 1_000_000 + '"}'), lambda _: says("[" * 1_000_000),
                  lambda _: says('{"message":"a","l":[' + "1," * 8000 + "1]}"),
                  lambda _: encode(ProposalRejected("a" * 64, "{" * 1_000_000))),
    "outputs": of("activity", lambda _: empties(FULL)),
    "usage": of("activity", lambda _: encode(StateChanged("a" * 32, ActivityState.READY, usage=[1] * FULL))),
    "invoices": of("ledger", *[lambda _: encode(DocumentSent(invoice(1000)))] * 3,
                   lambda _: encode(DocumentSent(invoice(20_000)))),
    "payments": of("ledger", *[lambda _: encode(PaymentSent(payment(3000)))] * 3,
                   lambda _: encode(PaymentSent(payment(12_000)))),
    "recalled": of("ledger", lambda _: encode(Recalled(payment(3000))), lambda _: encode(Recalled(invoice(1000)))),
    "a frame of 64 messages": lambda peer: peer.mail("ledger", *[encode(DocumentSent(invoice(1000)))] * 64),
    "no frame": lambda peer: peer.ask("mail", b"\xdd\x00\x00\x00\x01\x9a" + b"\x90" * ((4 << 20) - 100)),
    "frames of nothing": lambda peer: peer.ask("mail", b"\x91\xdd\x00\x3f\xff\x00" + b"\x90" * 4_000_000),
    "calls": lambda peer: peer.ask("call", encode(["exeunit:x", 1.0, b"x" * 4_000_000])),
    "calls of nothing": lambda peer: peer.ask("call", b"\xdd\x00\x3d\x09\x00" + b"\x90" * 4_000_000),
    "pings": lambda peer: peer.frames(12_000, PING, "", b""),
    "requests of unknown services": lambda peer: peer.frames(8_000, REQUEST, "x", b""),
    "small mail": lambda peer: peer.frames(8_000, REQUEST, "mail", b"\x90"),
    "replies on the wrong way": lambda peer: peer.frames(10_000, REPLY, "", b""),
    "gftp headers": lambda peer: peer.stream("gftp", (b"\x00\x00\x00\x07" + encode(["stat", "x"])) * 60_000),
    "garbled gftp": lambda peer: peer.stream("gftp", b"\x00\x00\x0f\xff" + b"\x91" * 4095),
    "interaction": lambda peer: peer.stream("exeunit", b"\x00\x04\x00\x00" + b"\xdd\x00\x03\xff\x00" + b"\x90" * 261_888),
    "interaction back": lambda peer: peer.stream("exeunit-back", b"\x00\x04\x00\x00\xdd\x00\x03\xff\x00" + b"\x90" * 261_888),
    "gossip of ids": lambda peer: gossip(peer, *[encode(OffersAnnounced(tuple(
        f"{n:030x}{i:02x}-{n:064x}" for i in range(100)))) for n in range(20)]),
    "gossip of many ids": lambda peer: gossip(peer, *[encode(OffersAnnounced(("",) * 65_000))] * 4),
    "garbled mail": of("negotiation", *[lambda peer, n=n: garbled(proposal(peer, MANY, CLAUSES), n) for n in range(20)]),
}  # fmt: skip


async def published(node: Node) -> str:
    """A demand and an offer of the victim's, large as well; returns the offer's id."""
    own_key = node.identity.secret()
    terms = {"t": "ab" * 10_000, "l": [str(n) for n in range(1000)]}
    for number in range(10):
        _, demand = subscription("demand", own_key, {**terms, "n": number}, "(|(p.1=*)(t=*)(l=*)(a=*))", now(), number)
        await node.system.ask("market", PublishDemand(demand))
    offer_id, offer = subscription("offer", own_key, terms, "()", now(), 1)
    await node.system.ask("market", PublishOffer(offer))
    return offer_id


@pytest.mark.parametrize("what", HOSTILE)
@trio_test
async def test_nothing_that_a_peer_sends_holds_the_loop(tmp_path: Path, what: str) -> None:
    async with node_in_test(tmp_path, profile="testnet") as node:
        await node.network.wait_up()
        offer_id = await published(node)

        async def attack(name: str, made: Attack) -> None:
            async with open_network(KEY, config(tmp_path / name, network_name="in-test")) as network:
                await network.wait_up()
                await network.connect(node.network.addresses[0], 20)
                await made(Hostile(network, node.node_id, offer_id))
                await trio.sleep(0.2)

        await trio.to_thread.run_sync(trio.run, attack, "first", _nothing)  # what is imported is no fault of it
        await trio.testing.wait_all_tasks_blocked(0.2)
        gc.collect()
        gc.freeze()  # as a node does
        with watched() as watch, within(60):
            await trio.to_thread.run_sync(trio.run, attack, "second", HOSTILE[what])
            await trio.testing.wait_all_tasks_blocked(0.05)
        print(json.dumps({"what": what, "ms": round(1000 * watch.longest_s, 1), "task": watch.longest_task}))
        limit_s = HELD_S * slowness()
        assert watch.longest_s < limit_s, f"{what} holds the loop for {1000 * watch.longest_s:.0f} ms in {watch.longest_task}"
