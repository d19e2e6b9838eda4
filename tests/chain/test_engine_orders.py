"""The engine's file keeps an order to one batch that may pay: what a restored journal asks for again is refused."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from chain_support import GLM, Lab, address_of, devchain, payer
from worlds.support import trio_test

from golem.chain.rows import TransferBatch
from golem.chain.store import OrdersTaken, Store
from golem.node.backup import hold_payments
from protocol.wallet import TransferConfirmed, TransferDelayed

A, B = "0x" + "aa" * 20, "0x" + "bb" * 20


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "chain.db", "chain/account")


def end(store: Store, batch_id: str, state: str) -> None:
    store._sql.execute("update batch set state=? where id=?", (state, batch_id))


FIRST = TransferBatch("first", ((A, 30), (B, 5)), (("o1", "o2"), ("o3",)))


@pytest.mark.parametrize("state", ["queued", "assigned", "confirmed"])
def test_an_order_that_is_paid_or_may_be_stays_where_it_is(store: Store, state: str) -> None:
    assert store.add_batch(FIRST)
    end(store, "first", state)
    with pytest.raises(OrdersTaken) as taken:
        store.add_batch(TransferBatch("second", ((A, 7), (B, 9)), (("o2",), ("o4",))))
    assert taken.value.batches == (FIRST,)
    assert store.batch("second") is None
    assert not store.add_batch(FIRST), "a repeat is none"
    assert store.add_batch(TransferBatch("third", ((B, 9),), (("o4",),))), "nothing was noted of what was refused"


@pytest.mark.parametrize("state", ["failed", "nonce_lost"])
def test_an_order_of_a_batch_that_paid_nothing_is_free(store: Store, state: str) -> None:
    store.add_batch(FIRST)
    end(store, "first", state)
    assert store.add_batch(TransferBatch("second", ((A, 30),), (("o1", "o2"),)))
    with pytest.raises(OrdersTaken):
        store.add_batch(TransferBatch("third", ((A, 10),), (("o1",),)))


def test_orders_of_other_accounts_are_other_orders(store: Store, tmp_path: Path) -> None:
    store.add_batch(FIRST)
    assert Store(tmp_path / "chain.db", "chain/another").add_batch(TransferBatch("x", ((A, 30),), (("o1",),)))


# -- a restored file
@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with devchain(tmp_path_factory.mktemp("chain")) as url:
        yield Lab(url, "devchain")


def restored(db: Path, folder: Path) -> Path:
    """Return a copy of the engine's file as a restore leaves it."""
    folder.mkdir()
    with closing(sqlite3.connect(db)) as one, closing(sqlite3.connect(folder / "chain.db")) as other:
        one.backup(other)
    hold_payments(folder, "this node was restored from a backup of noon")
    return folder / "chain.db"


@trio_test
async def test_a_restored_file_pays_nothing_while_it_may_have_been_paid(lab: Lab, tmp_path: Path) -> None:
    key, payee = lab.rich("restored"), address_of("restored payee")
    async with payer(lab, key, tmp_path / "chain.db") as wallet:
        await wallet.pay("before", (payee, GLM))
        await wallet.until(TransferConfirmed)
        db = restored(tmp_path / "chain.db", tmp_path / "later")
        await wallet.pay("since", (payee, 3 * GLM))
        await wallet.until(TransferConfirmed, number=2)
    async with payer(lab, key, db) as wallet:
        await wallet.pay("again?", (payee, 3 * GLM))  # the journal does not know that it was paid, nor does this file
        for _ in range(10):
            await wallet.engine.step()
            lab.mine()
        assert lab.tokens(payee) == 4 * GLM
        (problem,) = wallet.engine.problems()
        assert problem.kind == "CantSign"
        assert "1 transactions have left its account since" in problem.detail
        assert wallet.told(TransferDelayed)
        wallet.engine.resume()
        for _ in range(10):
            await wallet.engine.step()
            lab.mine()
        assert lab.tokens(payee) == 4 * GLM, "this payee has got something since"
        (problem,) = wallet.engine.problems()
        assert "may be paid by that already" in problem.detail
        wallet.engine.resume()  # a person knows that this was not paid
        await wallet.until(TransferConfirmed)
        assert lab.tokens(payee) == 7 * GLM


@trio_test
async def test_a_restored_file_goes_on_where_nothing_was_sent_since(lab: Lab, tmp_path: Path) -> None:
    key, payee = lab.rich("unchanged"), address_of("unchanged payee")
    async with payer(lab, key, tmp_path / "chain.db") as wallet:
        await wallet.pay("before", (payee, GLM))
        await wallet.until(TransferConfirmed)
    async with payer(lab, key, restored(tmp_path / "chain.db", tmp_path / "later")) as wallet:
        assert wallet.engine.store.held()
        await wallet.pay("after", (payee, GLM))
        await wallet.until(TransferConfirmed)
        assert wallet.engine.store.held() == ""
    assert lab.tokens(payee) == 2 * GLM


# -- a copied file that runs as well
def copied(db: Path, folder: Path) -> Path:
    """Return a copy of the engine's file that nobody told of."""
    folder.mkdir()
    with closing(sqlite3.connect(db)) as one, closing(sqlite3.connect(folder / "chain.db")) as other:
        one.backup(other)
    return folder / "chain.db"


@trio_test
async def test_what_a_copy_of_the_file_has_paid_is_not_paid_again(lab: Lab, tmp_path: Path) -> None:
    key, payee, other = lab.rich("copied"), address_of("copied payee"), address_of("another payee")
    async with payer(lab, key, tmp_path / "chain.db") as wallet:
        await wallet.pay("before", (payee, GLM))
        await wallet.until(TransferConfirmed)
        db = copied(tmp_path / "chain.db", tmp_path / "copy")
        await wallet.pay("since", (payee, 3 * GLM))
        await wallet.until(TransferConfirmed, number=2)
    async with payer(lab, key, db) as wallet:
        await wallet.pay("to another", (other, GLM))
        await wallet.pay("since", (payee, 3 * GLM))  # it was ordered before the copy was made
        await wallet.until(TransferConfirmed)
        for _ in range(10):
            await wallet.engine.step()
            lab.mine()
        assert (lab.tokens(payee), lab.tokens(other)) == (4 * GLM, GLM)
        (problem,) = wallet.engine.problems()
        assert problem.kind == "CantSign"
        assert "golem payment resume" in problem.detail
        wallet.engine.resume()  # a person knows that this was not paid
        await wallet.until(TransferConfirmed, number=2)
        assert lab.tokens(payee) == 7 * GLM
        await wallet.pay("later", (payee, GLM))
        await wallet.until(TransferConfirmed, number=3)
