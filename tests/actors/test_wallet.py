"""The wallet alone: batches, cycles, repeats, and orders whose transfers fail."""

from __future__ import annotations

from typing import Any

import pytest
from worlds.money import PLATFORM, Node, World

from actors.wallet.machine import MAX_TRIES
from actors.wallet.rows import PayBatchRow, PayOrderRow
from protocol.codec import Decoder
from protocol.types import Refused, Violation
from protocol.wallet import (
    CycleDue,
    CycleSet,
    KnownBatch,
    OrdersKnown,
    PaidOut,
    PayOut,
    PayOutDelayed,
    RunCycle,
    SetCycle,
    Transfer,
    TransferConfirmed,
    TransferDelayed,
    TransferFailed,
    TransferMined,
    TransferSent,
)

HASH = "0x" + "a" * 64
to_chain = Decoder[Any](Transfer)
to_ledger = Decoder[Any](PaidOut | PayOutDelayed)


class Desk:
    """A wallet with nobody around it: what it says waits to be looked at."""

    def __init__(self, minimum: str = "0") -> None:
        self.world = World(1)
        self.node: Node = self.world.nodes[0]
        if minimum != "0":
            self.node = Node(self.node.key, minimum)
            self.world.nodes, self.world.by_id = [self.node], {self.node.id: self.node}

    def pay(self, order_id: str, payee: int, amount: str = "1") -> None:
        order = PayOut(order_id, PLATFORM, self.node.id, f"0x{payee:040x}", amount)
        self.world.tell(self.node, order, f"{self.node.id}/ledger", "wallet")

    def chain(self, fact: Any) -> None:
        self.world.tell(self.node, fact, f"{self.node.id}/chain", "wallet")

    def cycle(self) -> list[Transfer]:
        self.world.tell(self.node, CycleDue(PLATFORM), f"{self.node.id}/wallet", "wallet")
        transfers = [to_chain(body) for _, _, body in self.world.pool]
        self.world.pool.clear()
        return transfers

    def heard(self) -> list[Any]:
        link = self.world.links[f"{self.node.id}/wallet", f"{self.node.id}/ledger"]
        facts = [to_ledger(body) for body in link]
        link.clear()
        return facts

    def order(self, order_id: str) -> PayOrderRow:
        row = self.node.rows["wallet"][f"order/{order_id}"]
        assert isinstance(row, PayOrderRow)
        return row


def confirmed(batch: Transfer, tx_hash: str = HASH) -> TransferConfirmed:
    return TransferConfirmed(batch.batch_id, tx_hash, 5, 21000, "0.0001")


def test_orders_of_one_payee_are_summed_and_paid_once() -> None:
    desk = Desk()
    for order_id, payee, amount in (("a", 1, "0.1"), ("b", 2, "2"), ("c", 1, "0.2"), ("a", 1, "0.1")):
        desk.pay(order_id, payee, amount)
    (batch,) = desk.cycle()
    assert batch.payees == ((f"0x{1:040x}", "0.3"), (f"0x{2:040x}", "2"))
    desk.pay("a", 1, "0.1")
    assert desk.cycle() == [], "everything is under way"
    for _ in range(2):
        desk.chain(confirmed(batch))
    assert desk.heard() == [
        PaidOut(("a", "c"), PLATFORM, desk.node.id, f"0x{1:040x}", "0.3", HASH),
        PaidOut(("b",), PLATFORM, desk.node.id, f"0x{2:040x}", "2", HASH),
    ]
    desk.pay("a", 1, "0.1")
    assert desk.cycle() == []


def test_a_batch_has_at_most_fifty_payees_and_every_order_is_in_one() -> None:
    desk = Desk()
    for number in range(120):
        desk.pay(f"o{number}", number % 107 + 1)
    batches = desk.cycle()
    assert [len(batch.payees) for batch in batches] == [50, 50, 7]
    assert len({batch.batch_id for batch in batches}) == 3
    assert len({payee for batch in batches for payee, _ in batch.payees}) == 107
    rows = [row for _, row in desk.node.rows["wallet"].prefix("batch/")]
    assert all(isinstance(row, PayBatchRow) for row in rows)
    assert sum(len(payee.order_ids) for row in rows for payee in row.payees) == 120


def test_a_failed_transfer_frees_its_orders_for_batches_of_their_own() -> None:
    desk = Desk()
    desk.pay("a", 1)
    desk.pay("b", 2)
    (batch,) = desk.cycle()
    for _ in range(2):
        desk.chain(TransferFailed(batch.batch_id, "reverted"))
    assert desk.order("a").tries == 1
    again = desk.cycle()
    assert [batch.payees for batch in again] == [((f"0x{1:040x}", "1"),), ((f"0x{2:040x}", "1"),)]
    assert batch.batch_id not in {each.batch_id for each in again}
    desk.chain(confirmed(again[0]))
    assert (desk.order("a").state, desk.order("b").state) == ("PAID", "BATCHED")


def test_a_payee_who_cannot_be_paid_leaves_the_others_in_one_batch() -> None:
    desk = Desk()
    for name, payee in (("a", 1), ("b", 2), ("c", 3)):
        desk.pay(name, payee)
    (batch,) = desk.cycle()
    desk.chain(TransferFailed(batch.batch_id, "the token refuses 2", (f"0x{2:040x}",)))
    assert [desk.order(name).tries for name in "abc"] == [0, 1, 0]
    again = desk.cycle()
    assert sorted(len(batch.payees) for batch in again) == [1, 2]
    assert ((f"0x{2:040x}", "1"),) in [batch.payees for batch in again]


def test_an_order_is_given_up_visibly_and_taken_up_by_hand() -> None:
    desk = Desk()
    desk.pay("a", 1)
    for _ in range(MAX_TRIES):
        (batch,) = desk.cycle()
        desk.chain(TransferFailed(batch.batch_id, "reverted: no such token"))
    assert desk.cycle() == []
    assert desk.order("a").state == "GIVEN_UP"
    assert "given up" in desk.heard()[-1].reason
    answer = desk.world.ask(desk.node, RunCycle(PLATFORM), "wallet")
    assert isinstance(answer, CycleSet)
    (batch,) = desk.cycle()
    desk.chain(confirmed(batch))
    assert desk.order("a").state == "PAID"


def test_the_first_order_starts_the_cycle_and_all_before_its_end_go_together() -> None:
    desk = Desk()
    desk.pay("a", 1)
    desk.world.now += 1.5
    desk.pay("b", 2)
    ((at, _),) = desk.node.wakes.values()
    assert at == desk.world.now + 0.5
    assert len(desk.cycle()[0].payees) == 2
    assert desk.node.rows["wallet"][f"cycle/{PLATFORM}"].next_at is None


def test_the_cycle_can_be_set_and_run_now() -> None:
    desk = Desk()
    answer = desk.world.ask(desk.node, SetCycle(PLATFORM, 60.0, 5.0), "wallet")
    assert answer == CycleSet(PLATFORM, desk.world.now + 60)
    desk.pay("a", 1)
    assert [at for at, _ in desk.node.wakes.values()] == [desk.world.now + 60]
    assert desk.world.ask(desk.node, RunCycle(PLATFORM), "wallet") == CycleSet(PLATFORM, desk.world.now)
    assert isinstance(desk.world.ask(desk.node, SetCycle(PLATFORM, 0.0), "wallet"), Refused)


def test_small_sums_wait_for_more() -> None:
    desk = Desk(minimum="0.5")
    desk.pay("a", 1, "0.3")
    assert desk.cycle() == []
    desk.pay("b", 1, "0.2")
    assert desk.cycle()[0].payees == ((f"0x{1:040x}", "0.5"),)


def test_why_a_transfer_waits_is_passed_on_once() -> None:
    desk = Desk()
    desk.pay("a", 1)
    (batch,) = desk.cycle()
    for _ in range(2):
        desk.chain(TransferDelayed(batch.batch_id, "no gas"))
        desk.chain(TransferSent(batch.batch_id, HASH))
    assert [fact.reason for fact in desk.heard()][:2] == [
        "no gas",
        f"transaction {HASH} sent; waiting for its confirmation",
    ]
    for _ in range(2):
        desk.chain(TransferMined(batch.batch_id, HASH, 5))
    assert [fact.reason for fact in desk.heard()] == [f"transaction {HASH} is in block 5; waiting until that is final"]
    assert desk.order("a").state == "BATCHED", "a block may be lost"
    desk.chain(confirmed(batch))
    desk.heard()
    desk.chain(TransferDelayed(batch.batch_id, "late news"))
    assert desk.heard() == []


def test_only_the_ledger_orders_and_only_the_chain_reports() -> None:
    desk = Desk()
    order = PayOut("a", PLATFORM, desk.node.id, f"0x{1:040x}", "1")
    with pytest.raises(Violation):
        desk.world.tell(desk.node, order, f"{desk.node.id}/exeunit-1", "wallet")
    with pytest.raises(Violation):
        desk.world.tell(desk.node, TransferFailed("x", "y"), f"{desk.node.id}/ledger", "wallet")


def test_who_is_owed_much_is_paid_before_the_cycle() -> None:
    for amounts, soon in ((["0.003", "0.0019"], False), (["0.003", "0.002"], True), (["7"], True)):
        desk = Desk()
        desk.world.ask(desk.node, SetCycle(PLATFORM, 86400.0), "wallet")
        for number, amount in enumerate(amounts):
            desk.pay(f"order-{number}", 1, amount)
        (at,) = [at for at, _ in desk.node.wakes.values()]
        assert at - desk.world.now == (60 if soon else 86400), amounts


def test_dust_keeps_no_cycle_running() -> None:
    desk = Desk(minimum="0.000001")
    desk.pay("wei", 1, "0.000000000000000001")
    assert desk.cycle() == []
    assert desk.node.rows["wallet"][f"cycle/{PLATFORM}"].next_at is None
    desk.pay("more", 1, "0.000001")
    assert desk.cycle()[0].payees == ((f"0x{1:040x}", "0.000001000000000001"),)


def test_a_batch_that_the_chain_port_has_after_all_is_heard_of_though_it_was_said_to_have_failed() -> None:
    desk = Desk()
    desk.pay("o1", 1)
    (first,) = desk.cycle()
    desk.chain(TransferFailed(first.batch_id, "not served"))
    (second,) = desk.cycle()
    desk.chain(OrdersKnown(second.batch_id, (KnownBatch(first.batch_id, first.payees, first.orders),)))
    desk.chain(confirmed(first))
    assert desk.order("o1").state == "PAID"
    assert desk.cycle() == [first], "its end is asked for, and nothing else"
