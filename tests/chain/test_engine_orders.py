"""The engine's file keeps an order to one batch that may pay: what a restored journal asks for again is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from golem.chain.store import OrdersTaken, Store, TransferBatch

A, B = "0x" + "aa" * 20, "0x" + "bb" * 20


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "chain.db", "chain/account")


def end(store: Store, batch_id: str, state: str) -> None:
    store._sql.execute("update batch set state=? where id=?", (state, batch_id))


FIRST = TransferBatch("first", 0, ((A, 30), (B, 5)), (("o1", "o2"), ("o3",)))


@pytest.mark.parametrize("state", ["queued", "assigned", "confirmed"])
def test_an_order_that_is_paid_or_may_be_stays_where_it_is(store: Store, state: str) -> None:
    assert store.add_batch(FIRST)
    end(store, "first", state)
    with pytest.raises(OrdersTaken) as taken:
        store.add_batch(TransferBatch("second", 0, ((A, 7), (B, 9)), (("o2",), ("o4",))))
    assert taken.value.batches == (FIRST,)
    assert store.batch("second") is None
    assert not store.add_batch(FIRST), "a repeat is none"
    assert store.add_batch(TransferBatch("third", 1, ((B, 9),), (("o4",),))), "nothing was noted of what was refused"


@pytest.mark.parametrize("state", ["failed", "nonce_lost"])
def test_an_order_of_a_batch_that_paid_nothing_is_free(store: Store, state: str) -> None:
    store.add_batch(FIRST)
    end(store, "first", state)
    assert store.add_batch(TransferBatch("second", 1, ((A, 30),), (("o1", "o2"),)))
    with pytest.raises(OrdersTaken):
        store.add_batch(TransferBatch("third", 2, ((A, 10),), (("o1",),)))


def test_orders_of_other_accounts_are_other_orders(store: Store, tmp_path: Path) -> None:
    store.add_batch(FIRST)
    assert Store(tmp_path / "chain.db", "chain/another").add_batch(TransferBatch("x", 0, ((A, 30),), (("o1",),)))
