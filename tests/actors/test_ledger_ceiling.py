"""Money for no work: the requestor's node takes no bill that price, threads and time do not explain."""

from __future__ import annotations

import random
from decimal import Decimal
from typing import Any

import pytest
from worlds.money import PLATFORM, Done, Node, World

from actors.ledger import documents as _ledger_documents
from actors.ledger import payer as _ledger_payer
from actors.ledger.rows import RefusedDocumentsRow
from protocol.activity import ActivityKnown, ActivityOver
from protocol.ledger import ClockSeen, DebitNoteBody, DocumentReceived, DocumentRefused, DocumentSent, InvoiceBody, encode_body
from protocol.property_names import COEFFS, COST_CAP, VECTOR
from protocol.states import DocumentKind
from protocol.types import Violation, amount_text, timestamp_text

DURATION, CPU = "golem.usage.duration_sec", "golem.usage.cpu_sec"
OFFER: dict[str, Any] = {
    COEFFS: [0.001, 0.002, 0.01],
    VECTOR: [DURATION, CPU],
    "golem.inf.cpu.threads": 4,
    "golem.inf.mem.gib": 2.0,
    "golem.inf.storage.gib": 10.0,
}
HOUR_S = 3600.0
WEI = Decimal(1).scaleb(-18)
FAT = tuple(1 + number / 2**50 for number in range(64))  # counters that make a note as long as one can be


class Deal:
    """An agreement whose provider writes what it likes."""

    def __init__(self, activities: tuple[str, ...] = ("act",), **changes: Any) -> None:
        self.world = World(2)
        self.payer, self.payee = self.world.nodes
        offered = {**OFFER, **changes.pop("offered", {})}
        offered = {key: value for key, value in offered.items() if value is not None}
        self.world.agree(self.payer, self.payee, "a1", activities, offered=offered, **changes)
        self.world.allocate(self.payer, "al", "1000")
        self.count = 0

    def note(self, total: str | Decimal, usage: tuple[Any, ...] | None, activity: str = "act", **changes: Any) -> Any:
        self.count += 1
        body = DebitNoteBody(
            debit_note_id=f"n{self.count}", activity_id=activity, total_amount_due=str(total), usage_counter_vector=usage,
            **{**self.common(), **changes},
        )  # fmt: skip
        return self.sent(DocumentKind.DEBIT_NOTE, body, f"n{self.count}")

    def invoice(self, total: str | Decimal, activities: tuple[str, ...] = ("act",)) -> Any:
        self.count += 1
        due = timestamp_text(self.world.now + 60)
        body = InvoiceBody(
            invoice_id=f"i{self.count}", activity_ids=activities, amount=str(total), payment_due_date=due, **self.common()
        )
        return self.sent(DocumentKind.INVOICE, body, f"i{self.count}")

    def common(self) -> dict[str, Any]:
        return {
            "issuer_id": self.payee.id, "recipient_id": self.payer.id, "payee_addr": self.payee.id,
            "payer_addr": self.payer.id, "payment_platform": PLATFORM, "timestamp": timestamp_text(self.world.now),
            "agreement_id": "a1",
        }  # fmt: skip

    def sent(self, kind: str, body: Any, document_id: str) -> Any:
        """Return what the payer's node answers."""
        document = self.payee.sign(kind, encode_body(body))
        before = f"{kind}/{document_id}" in self.payer.rows["ledger"]
        self.world.tell(self.payer, DocumentSent(document), f"{self.payee.id}/ledger")
        link = self.world.links[f"{self.payer.id}/ledger", f"{self.payee.id}/ledger"]
        answer = self.payee.decoders["ledger"][1](link.pop())
        if isinstance(answer, DocumentRefused):
            assert (f"{kind}/{document_id}" in self.payer.rows["ledger"]) is before, "a refusal leaves no document"
        return answer


def taken(answer: Any) -> bool:
    assert isinstance(answer, DocumentReceived | DocumentRefused)
    return isinstance(answer, DocumentReceived)


def honest(time_s: float, threads: float = 4) -> Decimal:
    return Decimal("0.01") + Decimal("0.001") * Decimal(str(time_s)) + Decimal("0.002") * Decimal(str(time_s * threads))


def test_the_whole_allocation_for_no_work_is_refused_with_the_highest_amount() -> None:
    deal = Deal()
    deal.world.now += 10
    answer = deal.note("999", (3.0, 1.0))
    assert isinstance(answer, DocumentRefused)
    assert answer.most == "0.015"
    assert "0.015" in answer.reason
    assert taken(deal.note(answer.most, (3.0, 1.0)))
    refused = deal.payer.rows["ledger"]["refused/a1"]
    assert isinstance(refused, RefusedDocumentsRow)
    assert [(one.document_id, one.amount) for one in refused.documents] == [("n1", "999")]


@pytest.mark.parametrize(
    ("usage", "time_s", "passes"),
    [
        ((100.0, 400.0), 100.0, True),
        ((105.0, 0.0), 100.0, True),  # clocks differ
        ((100.0 * 1.001 + 5, 4 * (100.0 * 1.001 + 5)), 100.0, True),
        ((105.2, 0.0), 100.0, False),
        ((0.0, 421.0), 100.0, False),
        ((0.0, 1e12), HOUR_S, False),
        ((1e300, 0.0), HOUR_S, False),
        ((10**40, 0), HOUR_S, False),
        ((7200.0, 0.0), HOUR_S, False),
    ],
)
def test_counters_are_bounded_by_clock_and_threads(usage: tuple[Any, ...], time_s: float, passes: bool) -> None:
    deal = Deal()
    deal.world.now += time_s
    asked = Decimal("0.01") + Decimal("0.001") * Decimal(str(usage[0])) + Decimal("0.002") * Decimal(str(usage[1]))
    asked = min(asked, Decimal("900000000")).quantize(WEI)
    answer = deal.note(asked, usage)
    assert taken(answer) is passes, answer
    if not passes:
        assert Decimal(answer.most) <= honest(time_s * 1.001 + 5)
        assert taken(deal.note(answer.most, usage))


@pytest.mark.parametrize("more", [0, 100, 101, 10**6])
def test_an_amount_is_what_price_and_usage_say(more: int) -> None:
    deal = Deal()
    deal.world.now += 100
    total = Decimal("0.01") + Decimal("0.001") * 50 + Decimal("0.002") * 7 + more * WEI
    assert taken(deal.note(total, (50.0, 7.0))) is (more <= 100)


@pytest.mark.parametrize(
    "usage",
    [(), (1.0,), (-5.0, 3.0), (1.0, 2.0, 3.0), (0.0, -1e300)],
)
def test_odd_usage_vectors_ask_for_nothing_more(usage: tuple[Any, ...]) -> None:
    deal = Deal()
    deal.world.now += 10
    assert not taken(deal.note("0.2", usage))
    assert taken(deal.note("0.01", usage))


def test_a_note_without_usage_is_bounded_all_the_same() -> None:
    deal = Deal()
    deal.world.now += 100
    assert not taken(deal.note(honest(106), None))
    assert taken(deal.note(honest(100), None))


def test_activities_of_nobody_or_of_another_provider() -> None:
    deal = Deal()
    deal.world.agree(deal.payer, deal.payee, "a2", ("other",), offered=OFFER)
    deal.world.now += HOUR_S
    for activity in ("invented", "other"):
        answer = deal.note("0.001", (1.0, 0.0), activity)
        assert isinstance(answer, DocumentRefused)
        assert "created no activity" in answer.reason
    assert not taken(deal.invoice("0", ("act", "invented")))


def test_time_stops_with_the_activity() -> None:
    deal = Deal()
    deal.world.now += 100
    deal.world.tell(deal.payer, ActivityOver("act", deal.world.now), f"{deal.payer.id}/activity")
    deal.world.now += 10 * HOUR_S
    assert taken(deal.note(honest(100), (100.0, 400.0)))
    assert not taken(deal.note(honest(107), (107.0, 428.0)))
    assert not taken(deal.invoice(honest(107)))
    assert taken(deal.invoice(honest(105)))


def test_an_invoice_over_all_activities_and_a_second_one() -> None:
    deal = Deal(("act", "act2"))
    deal.world.now += 100
    for name in ("act", "act2"):
        deal.world.tell(deal.payer, ActivityOver(name, deal.world.now), f"{deal.payer.id}/activity")
    answer = deal.invoice(2 * honest(106), ("act", "act2", "act", "act2"))
    assert isinstance(answer, DocumentRefused)
    assert taken(deal.invoice(answer.most))
    again = deal.invoice(answer.most)
    assert isinstance(again, DocumentRefused)
    assert "has an invoice already" in again.reason
    assert taken(deal.sent(DocumentKind.INVOICE, *_again(deal, "i2"))), "a repeat of the same one is acknowledged"


def _again(deal: Deal, document_id: str) -> tuple[Any, str]:
    import msgspec

    raw = deal.payer.rows["ledger"][f"invoice/{document_id}"].body
    return msgspec.json.decode(raw, type=InvoiceBody), document_id


def test_an_invoice_without_an_activity_is_for_nothing() -> None:
    deal = Deal(())
    deal.world.now += HOUR_S
    assert not taken(deal.invoice("0.01", ()))
    assert taken(deal.invoice("0", ()))


def test_a_plug_ins_own_counters_are_bounded_by_the_demand_or_the_allocation() -> None:
    offered = {VECTOR: ["my.frames", DURATION], COEFFS: [1.0, 0.0, 0.0]}
    deal = Deal(offered=offered)
    deal.world.now += 10
    assert taken(deal.note("500", (500, 10.0)))
    assert not taken(deal.note("501", (500, 10.0))), "price x usage still counts"
    assert taken(deal.invoice("500"))
    capped = Deal(offered=offered, demanded={COST_CAP: 3})
    assert not taken(capped.note("3.1", (500, 10.0)))
    assert taken(capped.note("3", (500, 10.0)))


@pytest.mark.parametrize(
    ("counter", "most"),
    [("golem.usage.gib", 2.0), ("golem.usage.storage_gib", 10.0), ("golem.usage.duration-sec", 105.0)],
)
def test_sizes_and_other_spellings(counter: str, most: float) -> None:
    deal = Deal(offered={VECTOR: [counter], COEFFS: [1.0, 0.0]})
    deal.world.now += 100
    assert taken(deal.note(amount_text(Decimal(str(most))), (most,)))
    assert not taken(deal.note(amount_text(Decimal(str(most * 1.1))), (most * 1.1,)))


@pytest.mark.parametrize(
    "offered",
    [
        {VECTOR: [DURATION]},
        {COEFFS: [0.001, 0.002]},
        {COEFFS: "much"},
        {VECTOR: {"a": 1}},
        {COEFFS: [0.001, -0.002, 0.01]},
        {COEFFS: [0.001, True, 0.01]},
        {COEFFS: [0.001, 1e300, 0.01]},
        {VECTOR: [1, 2]},
    ],
)
def test_prices_that_fit_nothing_are_not_billed(offered: dict[str, Any]) -> None:
    deal = Deal(offered=offered)
    deal.world.now += HOUR_S
    assert not taken(deal.note("0.001", (1.0, 1.0)))
    assert not taken(deal.invoice("0.001"))


def test_an_offer_of_no_threads_has_one() -> None:
    deal = Deal(offered={"golem.inf.cpu.threads": None})
    deal.world.now += 100
    assert not taken(deal.note(Decimal("0.01") + Decimal("0.002") * 200, (0.0, 200.0)))
    assert taken(deal.note(Decimal("0.01") + Decimal("0.002") * 100, (0.0, 100.0)))


def clock(world: World, node: Node, boot_s: float, boot_id: str = "b") -> None:
    world.tell(node, ClockSeen(boot_id, boot_s, world.now), f"{node.id}/clock")


def test_a_wall_clock_that_is_set_back_hurts_no_honest_provider() -> None:
    deal = Deal(())
    clock(deal.world, deal.payer, 1000.0)
    deal.world.tell(deal.payer, ActivityKnown("act", "a1", deal.world.now), f"{deal.payer.id}/activity")
    deal.world.now += 100 - 3600  # an hour back
    assert not taken(deal.note(honest(100), (100.0, 400.0)))
    clock(deal.world, deal.payer, 1100.0)
    assert taken(deal.note(honest(100), (100.0, 400.0)))
    assert not taken(deal.note(honest(107), (107.0, 428.0)))
    deal.world.now += 50
    clock(deal.world, deal.payer, 1150.0)
    assert taken(deal.note(honest(150), (150.0, 600.0)))
    clock(deal.world, deal.payer, 5.0, "another start of the machine")
    assert not taken(deal.note(honest(157), (157.0, 628.0)))
    # and one that is set forward makes time pass for nobody but a little
    deal.world.tell(deal.payer, ActivityKnown("late", "a1", deal.world.now), f"{deal.payer.id}/activity")
    assert not taken(deal.note(honest(6), (6.0, 24.0), "late"))


def test_our_own_agent_may_ask_for_less_after_a_refusal() -> None:
    """Both real ledgers: a note over the ceiling is refused with a figure, and a lower one may follow."""
    deal = Deal()
    world, payer, payee = deal.world, deal.payer, deal.payee
    world.now += 10
    assert world.note(payee, "n1", "act", "5") == Done()
    world.send(payee, "debit-note", "n1")
    world.run()
    row = world.document(payee, "debit-note", "n1")
    assert row.refused
    assert row.most
    assert row.most in row.waiting
    assert world.note(payee, "n2", "act", row.most) == Done()
    world.send(payee, "debit-note", "n2")
    world.run()
    assert world.document(payer, "debit-note", "n2").status == "RECEIVED"
    assert world.invoice(payee, "i1", "a1", "9", ("act",)) == Done()
    world.send(payee, "invoice", "i1")
    world.run()
    most = world.document(payee, "invoice", "i1").most
    assert Decimal(most) < 9
    assert world.invoice(payee, "i2", "a1", most, ("act",)) == Done()
    world.send(payee, "invoice", "i2")
    world.run()
    world.accept(payer, "invoice", "i2", "al")
    world.run()
    assert world.document(payee, "invoice", "i2").status == "SETTLED"


@pytest.mark.parametrize("block", range(5))
def test_no_documents_of_a_provider_take_more_than_price_times_threads_times_time(block: int) -> None:
    """Random notes and invoices, all accepted that the node takes: what is charged stays within what the clock explains."""
    for seed in range(block * 40, block * 40 + 40):
        rng = random.Random(seed)
        names = tuple(f"act{number}" for number in range(rng.randint(1, 3)))
        deal = Deal(names)
        ended: dict[str, float] = {}
        start = deal.world.now
        for _ in range(30):
            deal.world.now += rng.choice((0.0, 1.0, 30.0, 600.0))
            most = honest(deal.world.now - start)
            total = (most * Decimal(repr(rng.choice((0.0, 0.5, 0.99, 1.0, 1.01, 2.0, 1e6))))).quantize(WEI)
            name = rng.choice((*names, "invented"))
            usage = rng.choice((None, (), (1.0, 2.0), (1e9, 1e9), (deal.world.now - start, 4 * (deal.world.now - start))))
            if rng.random() < 0.2 and name in names and name not in ended:
                ended[name] = deal.world.now
                deal.world.tell(deal.payer, ActivityOver(name, deal.world.now), f"{deal.payer.id}/activity")
            if rng.random() < 0.7:
                answer, key = deal.note(total, usage, name), f"debit-note/n{deal.count}"
            else:
                answer = deal.invoice(total * rng.randint(1, 3), rng.choice((names, (name,), names * 2)))
                key = f"invoice/i{deal.count}"
            if taken(answer):
                deal.world.accept(deal.payer, *key.split("/"), "al")
        explained = sum((honest((ended.get(name, deal.world.now) - start) * 1.001 + 5) for name in names), Decimal(0))
        owed = Decimal(deal.payer.rows["ledger"]["agreement/a1"].accepted)
        assert owed <= explained + 10_000 * WEI, (seed, owed, explained)


def test_nobody_fills_the_payers_disk_with_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    deal = Deal()
    deal.world.now += HOUR_S
    with pytest.raises(Violation, match="over the limit"):
        deal.note("0.01", (1.0, 1.0), previous_debit_note_id="x" * _ledger_payer.MAX_NOTE_BYTES)
    monkeypatch.setattr(_ledger_payer, "MAX_DOCUMENTS_BYTES", 2000)
    answers = [taken(deal.note("0.01", FAT)) for _ in range(6)]
    assert answers == sorted(answers, reverse=True), "the first ones are taken, the rest is not"
    assert 2000 <= deal.payer.rows["ledger"]["agreement/a1"].document_bytes < 4000
    assert not answers[-1]


def test_nobody_fills_the_payers_disk_by_many_agreements_or_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a node sent counts over all its agreements; who works for years gets some of it anew each day."""
    monkeypatch.setattr(_ledger_documents, "MAX_PEER_BYTES", 3000)
    monkeypatch.setattr(_ledger_documents, "PEER_BYTES_A_DAY", 3000)
    deal = Deal()
    deal.world.now += HOUR_S
    answers = [taken(deal.note("0.01", FAT)) for _ in range(8)]
    assert answers == sorted(answers, reverse=True)
    assert not answers[-1]
    refused = deal.payer.rows["ledger"]["refused/a1"].documents[-1]
    assert "bytes are kept for" in refused.reason
    deal.world.now += 24 * HOUR_S
    assert taken(deal.note("0.01", FAT))
    kept = sum(len(row.body) for _, row in deal.payer.rows["ledger"].prefix("debit-note/"))
    assert kept <= 6000


def test_the_history_of_fifty_thousand_notes_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """50,000 notes of 250 kB were 12.5 GB: one is over the limit now, and of the largest that are taken 64 MiB are (here 0.2)."""
    assert _ledger_payer.MAX_DOCUMENTS_BYTES == 64 * 2**20
    monkeypatch.setattr(_ledger_payer, "MAX_DOCUMENTS_BYTES", 200_000)
    deal = Deal()
    deal.world.now += HOUR_S
    with pytest.raises(Violation, match="over the limit"):
        deal.note("0.01", (1.0, 1.0), previous_debit_note_id="x" * 250_000)
    most = _ledger_payer.MAX_NOTE_BYTES
    count = sum(taken(deal.note("0.01", FAT)) for _ in range(200))
    assert 80 < count < 160
    rows = deal.payer.rows["ledger"]
    assert sum(len(row.body) for _, row in rows.prefix("debit-note/")) == rows["agreement/a1"].document_bytes < 200_000 + most
