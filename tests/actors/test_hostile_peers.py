"""No peer can crash a machine, and no stranger can change what others have with it.

Messages are made from their types (limits of each type, nonsense, and pieces of what was really said), mixed with real
ones: replays, right ids with wrong senders, valid signatures over nonsense. They meet every machine in the states of a
whole life. Each must end in a step that the kernel could commit, or in a `Violation`.
HOSTILE_SEED=N replays one seed, HOSTILE_ROUNDS=N makes each longer.
"""

from __future__ import annotations

import json
import os
import random
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import msgspec
import pytest
from worlds.market_world import KEYS
from worlds.playbook import START, TableRows
from worlds.whole_life import Life, demand_of, live, offer_of

from actors.kernel.machine import DropFeed, Emit, Machine, Meta, Send, Step
from actors.ledger.rows import PaymentDocumentRow, PaymentRow
from actors.market.rows import OfferRow
from actors.negotiation import room
from actors.negotiation.proposals import MAX_OPENED_PER_NODE
from actors.negotiation.rows import AgreementRow, ProposalRow
from golem.node.market_forms import agreement_event_form, agreement_form, agreement_summary, proposal_form, subscription_form
from golem.rest import payment_documents
from protocol.codec import MAX_ADDRESS_CHARS, MAX_BODY_BYTES, Decoder, encode
from protocol.ledger import DocumentEvent, PaymentBody, Recalled, decode_body, json_form
from protocol.market import MAX_IDS, GetOffers, OffersAnnounced
from protocol.negotiation import AgreementEvents, ProposalOpened, proposal_id
from protocol.signing import KINDS, Document, node_id_of, sign, verify
from protocol.types import Message, Violation, actor_of, node_of

ROUNDS = int(os.environ.get("HOSTILE_ROUNDS", "4"))  # messages of each type against each state
STRANGER_KEY = KEYS[4]
STRANGER = node_id_of(STRANGER_KEY)
MACHINES = ("market", "negotiation", "activity", "ledger", "exeunit")

# What one message of a peer may cost us.
MAX_ROWS_CHANGED = 3 * MAX_IDS + 10  # 100 offers, each with the note that it was asked for and the node's sums
MAX_ROW_GROWTH, ROW_GROWTH_PER_BYTE = 160 * 1024, 3  # our own offer is copied into the first proposal of a negotiation
MAX_ROW_BYTES = {"stats": 32 * 1024, "owner": 200, "held": 1024, "open": 1024}  # others: one message
MAX_SENT_BYTES, SENT_PER_BYTE = 2200 * 1024, 3  # answers full of offers

TEXTS = (
    "", " ", "0", "-1", "1e400", "1e-19", "NaN", "٣", "x" * 81, "x" * 5000, "\0", "é" * 64, "\U0001f600", "../x", "%s%n", "{}",
    "[]", "null", '{"message":1}', '{"message":"\\ud800"}', "[" * 985 + "]" * 985, "[" * 200_000,
    '{"a":' * 990 + "1" + "}" * 990, "0x" + "0" * 40, "0x" + "F" * 40,
    "a" * 32, "a" * 64, "A" * 64, "\u2028", "1" * 41, "0." + "1" * 19, "Terminated", "Requestor", "(", "(" * 3000,
    "(a=*)", "9" * 5000, "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59", "not json",
    '{"rejectionReason":"BAD_SERVICE","totalAmountAccepted":"0","zz":1e400}',
)  # fmt: skip
#: Where a field's usual values are found: the keys of the victim's rows, or these words.
FIELDS: dict[str, str | tuple[str, ...]] = {
    "agreement_id": "agreement/", "proposal_id": "proposal/", "previous_id": "proposal/", "initial_id": "proposal/",
    "offer_id": "subscription/", "offer_ids": "offer/", "withdrawn_ids": "offer/", "activity_id": "activity/",
    "batch_id": "batch/", "invoice_id": "invoice/", "document_id": "invoice/", "payment_id": "payment/",
    "state": ("Cancelled", "Expired", "Rejected", "Ready", "Initialized", "Terminated"), "kind": ("invoice", "debit-note"),
    "terminator": ("Requestor", "Provider"), "reason": ("", "{}", '{"message":"no"}', '{"message":1,"x":[{}]}'),
}  # fmt: skip
INTS = (-(2**63), -1, 0, 1, 2, 3, 63, 64, 1000, 2**31, 2**53, 2**63 - 1, 2**64 - 1)
FLOATS = (float("nan"), float("inf"), float("-inf"), -1.0, -0.0, 0.0, 1e-300, 1.5, START, START + 1e9, 1e11, 1e22, 1e308, -1e308)
BYTES = (b"", b"\0", b"{}", b"[]", b"null", b"\xff\xfe", b"x" * 65, b"x" * 200_000, b'{"a":"\\ud800"}', b"[" * 990 + b"]" * 990)
STRANGE_MEMBERS = (
    b',"zz":1e400}', b',"zz":' + b"9" * 400 + b"}", b',"zz":[{"a":-1e999}]}', b',"status":"SETTLED"}', b',"message":1e400}',
)  # fmt: skip


@cache
def life() -> Life:
    return live(KEYS[:3])


@dataclass
class Words:
    """What a hostile peer has overheard."""

    texts: list[str]
    raw: list[bytes]
    documents: list[Document]
    said: dict[type, list[Message]]


@cache
def words() -> Words:
    found = Words([], [], [], {})

    def walk(value: Any) -> None:
        match value:
            case Document():
                found.documents.append(value)
                found.raw += [value.body, value.signature]
            case msgspec.Struct():
                for name in value.__struct_fields__:
                    walk(getattr(value, name))
            case str():
                found.texts.append(value)
            case bytes():
                found.raw.append(value)
            case tuple() | list():
                for one in value:
                    walk(one)

    for _, _, message in life().said:
        walk(message)
        found.said.setdefault(type(message), []).append(message)
    for states in life().states.values():
        for row in states[-1].values():
            walk(row)
    found.texts = sorted(set(found.texts))
    found.raw = sorted(set(found.raw))
    return found


class Maker:
    """Makes values of any type that a message may have."""

    def __init__(self, rng: random.Random, key: bytes, victim: Victim) -> None:
        self.rng, self.key, self.victim = rng, key, victim
        self.depth = 0
        peer, to = node_id_of(key), victim.address
        self.own = [message for sender, other, message in life().said if (node_of(sender), other) == (peer, to)]

    def field(self, name: str, kind: Any) -> Any:
        """Return a value for a field: often an id that the victim knows, or a word that it waits for."""
        rng, prefix = self.rng, FIELDS.get(name)
        if rng.random() < 0.3 or prefix is None or kind not in (str, tuple[str, ...]):
            return self.value(kind)
        if isinstance(prefix, tuple):
            return rng.choice(prefix)
        known = [key.partition("/")[2].rpartition("/")[2] for key in self.victim.rows if key.startswith(prefix)]
        if kind is str:
            return rng.choice(known) if known else self.value(str)
        new = [f"{rng.getrandbits(128):032x}-{rng.getrandbits(256):064x}" for _ in range(rng.choice((1, 3, 100)))]
        return tuple(rng.sample(known, min(len(known), 3)) if rng.random() < 0.5 else new)

    def value(self, kind: Any) -> Any:
        rng = self.rng
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if origin is typing.Annotated:
            return self.value(args[0])
        if origin in (typing.Union, types.UnionType):
            return self.value(rng.choice(args))
        if origin in (tuple, list):
            if origin is tuple and args[-1] is not Ellipsis:
                return tuple(self.value(one) for one in args)
            size = rng.choice((0, 1, 2, 3, 64, 65, 100, 101, 1001) if not self.depth else (0, 1, 2, 3))
            self.depth += 1  # tuples of tuples of tuples would fill the memory of the test
            one = self.value(args[0])
            made = origin(one if rng.random() < 0.5 else self.value(args[0]) for _ in range(size))
            self.depth -= 1
            return made
        if kind in (None, types.NoneType):
            return None
        if kind is bool:
            return rng.random() < 0.5
        if kind is int:
            return rng.choice(INTS)
        if kind is float:
            return rng.choice(FLOATS)
        if kind is str:
            return rng.choice(TEXTS) if rng.random() < 0.4 else rng.choice(words().texts)
        if isinstance(kind, type) and issubclass(kind, StrEnum):
            return rng.choice((*kind, *kind, *TEXTS))
        if kind is bytes:
            return rng.choice(BYTES) if rng.random() < 0.4 else rng.choice(words().raw)
        if kind is Document:
            return self.document()
        if kind in (Any, msgspec.Raw):
            extension = msgspec.msgpack.Ext(1, b"")
            return rng.choice((None, "x", "é" * 600_000, b"\0" * 999_999, [1], {"a": [b""]}, 1, 1.5, "\0", extension))
        return self.message(kind)

    def document(self) -> Document:
        rng = self.rng
        real = rng.choice(words().documents)
        mine = [value for message in self.own for value in parts(message) if isinstance(value, Document)]
        if mine and rng.random() < 0.8:  # well signed, by the right node, and bent
            real = rng.choice(mine)
            body = self.bent(real.body) if rng.random() < 0.8 else real.body
            return sign(self.key, real.kind, body)
        kind = real.kind if rng.random() < 0.7 else rng.choice((*KINDS, "", "x" * 900_000))
        body = real.body
        match rng.randrange(5):
            case 0:
                body = rng.choice(BYTES)
            case 1 | 2:
                body = self.bent(body)
        signature = real.signature
        match rng.randrange(4):
            case 0:
                r, s = signature[:32], signature[32:64]
                signature = rng.choice((b"", b"\0" * 65, b"\xff" * 65, r + s + b"\4", r + s, r + b"\xff" * 33))
            case 1 | 2:
                signature = sign(self.key, kind, body).signature if kind in KINDS else signature
        return Document(kind, body, signature)

    def bent(self, body: bytes) -> bytes:
        """Return JSON with one value changed (or a key gone, or more of them)."""
        rng = self.rng
        try:
            value = json.loads(body)
            name = rng.choice(list(value))
        except (ValueError, IndexError, TypeError, KeyError):
            return body
        new = rng.choice((
            None, True, 0, -1, 1.5, 1e300, 10**30, "", "x", "\ud800", [], {}, [[]], {"a": {"b": 1}}, "é" * 300, "\0" * 64, "1e5",
            START, START + 100.0, STRANGER, "9999-12-31T23:59:59-23:59", *rng.sample(words().texts, 5),
        ))  # fmt: skip
        if isinstance(value[name], dict) and value[name] and rng.random() < 0.7:
            value[name][rng.choice(list(value[name]))] = new
        elif isinstance(value[name], list) and rng.random() < 0.5:
            value[name] = value[name] * rng.choice((2, 1200)) or [new]
        else:
            value[name] = new
        made = json.dumps(value, separators=(",", ":"), ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        return made[:-1] + rng.choice(STRANGE_MEMBERS) if rng.random() < 0.2 else made

    def message(self, kind: type) -> Any:
        """Return a message of a type: made up, or a real one with some of its fields made up, or a real one."""
        real = words().said.get(kind, [])
        mine = [message for message in self.own if isinstance(message, kind)]
        if mine and self.rng.random() < 0.7:
            real = mine
        fields = msgspec.structs.fields(kind)
        if real and self.rng.random() < 0.8:
            message: Any = self.rng.choice(real)
            count = self.rng.choice((0, 1, 1, 2, len(fields)))
            changed = self.rng.sample(fields, min(count, len(fields)))
            return msgspec.structs.replace(message, **{one.name: self.field(one.name, one.type) for one in changed})
        return kind(*(self.field(one.name, one.type) for one in fields))


def parts(message: Any) -> Iterator[Any]:
    """Yield the fields of a message, and what is in its tuples."""
    for name in message.__struct_fields__:
        value = getattr(message, name)
        yield from value if isinstance(value, tuple) else (value,)


class StrictRows(TableRows):
    """Rows that take the keys that the journal takes."""

    def get(self, key: str, default: Any = None) -> Any:
        key.encode()
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        key.encode()
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        str(key).encode()
        return super().__contains__(key)


class Victim:
    """A machine in one of its states."""

    def __init__(self, address: str, machine: Machine, rows: dict[str, Any], now: float) -> None:
        self.address, self.machine, self.now = address, machine, now
        self.rows = StrictRows(rows)
        self._peer = Decoder[Any](machine.peer | type(None))
        self._local = Decoder[Any](machine.local | machine.peer | type(None))

    def hit(self, body: bytes, sender: str, origin: str = "") -> Step | None:
        """Take a message as the kernel does; return the step, None for a violation. Whatever else is raised is a bug."""
        remote = node_of(sender) != node_of(self.address)
        try:
            message = (self._peer if remote else self._local)(body)
            if message is None:
                return None
            step = self.machine.handle(self.rows, message, Meta(sender, self.now, "trace", origin))
        except Violation as violation:
            str(violation).encode("utf-8", "replace")
            return None
        for key, row in step.rows.items():
            key.encode()
            assert row is None or len(encode(row)) <= MAX_ROW_BYTES.get(key.partition("/")[0], MAX_BODY_BYTES + 1024), key
        for effect in step.effects:
            assert len(encode(getattr(effect, "message", None))) <= MAX_BODY_BYTES, type(effect)
            if isinstance(effect, Send):
                assert len(effect.to.encode()) <= MAX_ADDRESS_CHARS
                assert effect.deadline_s > 0
            if isinstance(effect, Emit | DropFeed):
                effect.feed.encode()
        return step

    def apply(self, step: Step) -> None:
        for key, row in step.rows.items():
            if row is None:
                self.rows.pop(key, None)
            else:
                self.rows[key] = row


def victims(name: str) -> Iterator[Victim]:
    """Yield the machines of this name in the states they had, the empty one included."""
    for address, play in life().plays.items():
        if actor_of(address).partition(":")[0] == name:
            yield Victim(address, play.machine, {}, START)
            for rows in life().states[address]:
                yield Victim(address, play.machine, rows, START + 10)


def kinds_of(union: Any) -> tuple[type, ...]:
    return typing.get_args(union) or (union,)


def check_cost(victim: Victim, step: Step, body: bytes) -> None:
    """Look at what one message made of rows and of mail."""
    assert len(step.rows) <= MAX_ROWS_CHANGED, len(step.rows)
    before = sum(len(encode(victim.rows[key])) for key in step.rows if key in victim.rows)
    after = sum(len(encode(row)) for row in step.rows.values() if row is not None)
    assert after - before <= MAX_ROW_GROWTH + ROW_GROWTH_PER_BYTE * len(body), (before, after, len(body))
    sent = sum(len(encode(effect.message)) for effect in step.effects if isinstance(effect, Send | Emit))
    assert sent <= MAX_SENT_BYTES + SENT_PER_BYTE * len(body), (sent, len(body))


def check_shown(step: Step, now: float) -> None:
    """Whatever a peer made us keep, agents can be shown: each list and each feed stays whole."""
    for row in step.rows.values():
        if shown := forms(row, now):
            json.dumps(shown, ensure_ascii=False, allow_nan=False).encode()
    for effect in step.effects:
        if isinstance(effect, Emit) and isinstance(effect.message, DocumentEvent):
            kind = {"debit-notes": payment_documents.NOTE, "invoices": payment_documents.INVOICE}[effect.feed]
            form = payment_documents.event_form(kind, effect.message, now)
            json.dumps(form, ensure_ascii=False, allow_nan=False).encode()
        elif isinstance(effect, Emit) and isinstance(effect.message, AgreementEvents):
            json.dumps(agreement_event_form(now, effect.message), ensure_ascii=False, allow_nan=False).encode()


def forms(row: Any, now: float) -> list[Any]:
    """Return what REST says of a row."""
    match row:
        case PaymentDocumentRow():
            return [payment_documents.render(row)]
        case PaymentRow():
            return [json_form(decode_body(PaymentBody, row.body))]
        case ProposalRow():
            return [proposal_form(row)]
        case AgreementRow():
            return [agreement_form(row, now), *([agreement_summary(row, now)] if row.body else [])]
        case OfferRow():
            return [subscription_form(row.document)]
    return []


_NODE = re.compile(r"0x[0-9a-f]{40}(?![0-9a-f])")


def parties(victim: Victim, key: str, row: Any) -> set[str]:
    """Return the nodes besides ours that a row is about, by way of the agreements and activities that it names."""
    text = key + repr(row)
    nodes = set(_NODE.findall(text))
    for other, about in victim.rows.items():
        kind, _, name = other.partition("/")
        if kind == "proposal" and key == f"pair/{about.demand_id}/{about.offer_id}":
            nodes |= {about.requestor, about.provider}
        if kind in ("agreement", "activity") and name in text:
            nodes |= set(_NODE.findall(repr(about)))
            if kind == "activity" and (agreement := victim.rows.get(f"agreement/{about.agreement_id}")):
                nodes |= set(_NODE.findall(repr(agreement)))
    return nodes - {node_of(victim.address)}


def check_others(victim: Victim, step: Step, sender: str, message: Message) -> None:
    """Rows about others stay as they are; of what is nobody's, only counters move."""
    me, peer = node_of(victim.address), node_of(sender)
    if actor_of(victim.address).startswith("exeunit"):
        assert not step.rows or sender == victim.machine.requestor, f"{sender} changed rows"  # type: ignore[attr-defined]
        return
    for key, row in step.rows.items():
        old = victim.rows.get(key)
        if old is None or row == old:
            continue
        if key in ("stats", "own"):
            continue
        if key.startswith("owed/") and isinstance(message, Recalled):  # our own signature says that we owe it: see below
            continue
        if key.startswith("opened/") and key.endswith(peer):
            continue
        if key.startswith("subscription/"):  # how many proposals it has had
            assert msgspec.structs.replace(row, proposals=0) == msgspec.structs.replace(old, proposals=0)
            continue
        if key.startswith("asked/"):  # whoever tells of an offer is asked for it
            continue
        if key.startswith("held/") and peer in key + repr(old):
            continue
        if key.startswith("owner/") and (peer in key or any(one.startswith(("offer/", "asked/")) for one in step.rows)):
            continue  # counts what we asked for and got; anybody may bring what its owner signed
        about = parties(victim, key, old)
        assert not about or peer in about, f"{peer} changed {key}, which is about {about}"
        assert about, f"{peer} changed {key} of {me}"
    if actor_of(victim.address) == "ledger":
        mine = [key for key in step.rows if key.startswith(("allocation/", "order/"))]
        if isinstance(message, Recalled) and message.document.kind == "acceptance":  # our own, given back: we owe it
            verify(message.document, "acceptance", me)
            mine = [key for key in mine if not key.startswith("order/") or key in victim.rows]
        if isinstance(message, Recalled) and message.document.kind == "payment":  # our own, given back: it is paid, for less
            verify(message.document, "payment", me)
            mine = [key for key in mine if not (key in victim.rows and getattr(step.rows[key], "covered", False))]
        assert not mine, f"a peer changed {mine}"


def attack(name: str, seed: int) -> int:
    """Send made-up messages to the machines of a name; return how many of them had an effect."""
    rng, effective = random.Random(f"{name} {seed}"), 0
    nodes = list(life().keys)
    for victim in victims(name):
        me, trade = node_of(victim.address), actor_of(victim.address)
        for kind in kinds_of(victim.machine.peer):
            for _ in range(ROUNDS):
                peer = rng.choice((STRANGER, *[node for node in nodes if node != me] * 3))
                maker = Maker(rng, {**life().keys, STRANGER: STRANGER_KEY}[peer], victim)
                others = ("activity", "edge", "ledger", "x" * 150, "exeunit:" + "a" * 32)
                actor = trade if rng.random() < 0.8 else rng.choice(others)
                if trade.startswith("exeunit") and actor == trade:
                    actor = "activity"
                if kind.__name__ == "CommandResult" and rng.random() < 0.8:
                    actor = rng.choice([actor_of(address) for address in life().plays if "exeunit" in address])
                sender, message = f"{peer}/{actor}", maker.message(kind)
                try:
                    body = encode(message)
                    if len(body) > MAX_BODY_BYTES:
                        continue
                    step = victim.hit(body, sender)
                    if step is not None:
                        check_cost(victim, step, body)
                        check_others(victim, step, sender, message)
                        check_shown(step, victim.now)
                        effective += bool(step.rows or step.effects)
                        victim.apply(step)
                except BaseException as error:
                    error.add_note(f"HOSTILE_SEED={seed}: {sender} says to {victim.address}: {repr(message)[:3000]}")
                    raise
    return effective


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("seed", [int(os.environ["HOSTILE_SEED"])] if "HOSTILE_SEED" in os.environ else range(4))
def test_whatever_a_peer_says_is_a_step_or_a_violation(name: str, seed: int) -> None:
    assert attack(name, seed) > 0 or name == "exeunit"


@pytest.mark.parametrize("name", MACHINES)
def test_what_was_said_before_may_come_again_and_from_anybody(name: str) -> None:
    """All that peers ever said, again, in every state: from who said it and from everybody else."""
    for victim in victims(name):
        for sender, _, message in life().said:
            for peer in (node_of(sender), STRANGER, *life().keys):
                if peer != node_of(victim.address) and isinstance(message, kinds_of(victim.machine.peer)):
                    body, whole = encode(message), f"{peer}/{actor_of(sender)}"
                    step = victim.hit(body, whole)
                    if step is not None:
                        check_cost(victim, step, body)
                        check_others(victim, step, whole, message)


def test_a_stranger_changes_nothing_of_ours() -> None:
    """With real messages of others, a stranger changes no row but its own notes."""
    for name in MACHINES:
        for victim in victims(name):
            for sender, _, message in life().said:
                if not isinstance(message, kinds_of(victim.machine.peer)):
                    continue
                step = victim.hit(encode(message), f"{STRANGER}/{actor_of(sender)}")
                for key, row in (step.rows if step else {}).items():
                    mine = key == "stats" or STRANGER in key + repr(row)
                    offer_id = key.rpartition("/")[2]  # of an offer that we asked for: it counts whoever brings it
                    came = key.startswith(("offer/", "of/0x")) and f"asked/{offer_id}" in victim.rows
                    relayed = key.startswith(("owner/", "asked/")) or came
                    assert mine or relayed or row == victim.rows.get(key), (name, key, row)


def test_the_bus_of_our_node_lets_nobody_speak_for_others() -> None:
    """An exe-unit has an address here; it reports on its own activity and says nothing else."""
    rng = random.Random(7)
    for name in ("market", "negotiation", "activity", "ledger", "wallet", "exeunit"):
        for victim in victims(name):
            unit = f"{node_of(victim.address)}/exeunit:{'e' * 32}"
            maker = Maker(rng, STRANGER_KEY, victim)
            kinds = (*kinds_of(victim.machine.local), *(kinds_of(victim.machine.peer) if victim.machine.peer else ()))
            for kind in kinds:
                for message in (maker.message(kind), *words().said.get(kind, [])[:3]):
                    body = encode(message)
                    if len(body) <= MAX_BODY_BYTES:
                        step = victim.hit(body, unit)
                        did = step and (step.rows or [e for e in step.effects if isinstance(e, Send | Emit)])
                        assert not did, (name, kind, did)


def test_an_offer_is_told_to_peers_with_their_own_limits() -> None:
    """A market full of large offers answers one question with a bounded answer."""
    market = next(victim for victim in victims("market") if not victim.rows)
    ids = []
    for number in range(40):
        offer_id, document = offer_of(KEYS[1], START, number)
        ids.append(offer_id)
        row = next(row for key, row in life().play(node_id_of(KEYS[1]), "market").rows.items() if key.startswith("offer/"))
        big = Document("offer", document.body + b" " * 100_000, document.signature)
        market.rows[f"offer/{offer_id}"] = msgspec.structs.replace(row, document=big, expires=START + 1000)
    body = encode(GetOffers(tuple(ids)))
    step = market.hit(body, f"{STRANGER}/market")
    assert step is not None
    check_cost(market, step, body)
    assert market.hit(encode(OffersAnnounced(("x",))), f"{STRANGER}/market") is None


class Offered:
    """A provider's negotiation machine with one offer, and whoever opens negotiations about it."""

    def __init__(self) -> None:
        provider = node_id_of(KEYS[1])
        states = life().states[f"{provider}/negotiation"]
        rows = next(one for one in states if any(getattr(row, "state", "") == "Approved" for row in one.values()))
        self.victim = Victim(f"{provider}/negotiation", life().play(provider, "negotiation").machine, rows, START)
        self.offer_id = next(key.partition("/")[2] for key in rows if key.startswith("subscription/"))

    def opened(self, key: bytes, number: int, origin: str = "") -> str:
        """Let a node open a negotiation; return its proposal's id where it was taken."""
        demand_id, document = demand_of(key, START, number)
        properties = json.dumps(json.loads(document.body)["properties"], separators=(",", ":"))
        constraints, initial = json.loads(document.body)["constraints"], f"{number:064x}"
        named = proposal_id(demand_id, self.offer_id, initial, node_id_of(key), properties, constraints, START)
        message = ProposalOpened(named, initial, self.offer_id, document, properties, constraints, START)
        self.victim.now += 0.01
        step = self.victim.hit(encode(message), f"{node_id_of(key)}/negotiation", origin)
        if step is None:
            return ""
        self.victim.apply(step)
        return named if step.rows.get(f"proposal/{named}") is not None else ""

    def of(self, key: bytes) -> int:
        return len(list(self.victim.rows.prefix(f"talk/{self.offer_id}/{node_id_of(key)}/")))


def test_a_stranger_cannot_use_up_what_an_offer_may_negotiate() -> None:
    """One node that opens negotiation after negotiation leaves room for others."""
    offered = Offered()
    kept = sum(bool(offered.opened(STRANGER_KEY, number)) for number in range(MAX_OPENED_PER_NODE + 50))
    assert kept == MAX_OPENED_PER_NODE
    assert offered.opened(KEYS[0], 1)


def test_many_free_identities_close_no_offer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an offer is full, the oldest of who has most is forgotten; not who has an agreement, nor who has little."""
    monkeypatch.setattr(room, "MAX_PROPOSALS", 400)
    monkeypatch.setattr(room, "ROOM_AT_ONCE", 20)
    offered = Offered()
    rows = offered.victim.rows
    agreed = {key for key, row in rows.prefix("proposal/") if row.agreement_id}
    honest = offered.opened(KEYS[2], 1)
    first = ""
    for number in range(60):
        for identity in range(14):
            found = offered.opened(bytes([40 + identity]) * 32, number)
            assert found, (identity, number)
            first = first or found
    assert f"proposal/{honest}" in rows
    assert agreed
    assert all(key in rows for key in agreed)
    assert f"proposal/{first}" not in rows
    counts = [offered.of(bytes([40 + identity]) * 32) for identity in range(14)]
    assert max(counts) - min(counts) <= 20
    row = rows[f"subscription/{offered.offer_id}"]
    assert row.proposals == len(list(rows.prefix(f"of/{offered.offer_id}/"))) <= 420
    assert sum(found.proposals for _, found in rows.prefix(f"talk/{offered.offer_id}/")) == row.proposals
    assert {key.rpartition("/")[2] for key, _ in rows.prefix(f"of/{offered.offer_id}/")} == {
        found.proposal_id for _, found in rows.prefix("proposal/") if found.offer_id == offered.offer_id
    }
    assert offered.opened(KEYS[0], 9), "the offer is open to whoever comes"


def test_as_many_identities_as_proposals_close_no_offer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no node stands out, those behind one network address make room for one another, not the few of elsewhere."""
    monkeypatch.setattr(room, "MAX_PROPOSALS", 200)
    monkeypatch.setattr(room, "ROOM_AT_ONCE", 20)
    offered = Offered()
    honest = [offered.opened(key, 1, f"198.51.100.{place}") for place, key in enumerate((KEYS[0], KEYS[2]))]
    assert all(honest), "they came first, and have as many as each of the others"
    for number in range(300):
        assert offered.opened(bytes([60, 1 + number % 200, 1 + number // 200, 7]) * 8, 1, "203.0.113.9"), number
    assert [f"proposal/{one}" in offered.victim.rows for one in honest] == [True, True]
    assert {row.origin for _, row in offered.victim.rows.prefix("talk/")} >= {"198.51.100.0", "203.0.113.9"}


def test_the_words_are_there() -> None:
    """The overheard life has every message that peers say, but those of refusals."""
    rare = {
        "ProposalRejected", "AgreementRejected", "AgreementClosed", "InvoiceCancelRequested", "InvoiceRejected",
        "InvoiceCancelled", "DocumentRefused", "DestroyRequested", "OffersAnnounced",
    }  # fmt: skip
    said = {kind.__name__ for kind in words().said}
    kinds = {kind.__name__ for name in MACHINES for victim in victims(name) for kind in kinds_of(victim.machine.peer)}
    assert kinds - said <= rare, kinds - said - rare
    assert Message in Document.__mro__ or len(words().documents) > 20
