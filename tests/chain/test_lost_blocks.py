"""Chains that lose blocks which were final, while old signed bytes are still about: no order is paid by two of them.

A stranger who has kept the bytes of an old transaction sends them at the worst moment. What the payee holds is the judge.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chain_support import GLM, Lab, Payer, address_of, payer
from worlds.support import trio_test

from golem.chain import desk, token
from golem.chain.rows import TransferBatch
from golem.chain.signer import Key
from golem.chain.store import OrdersTaken
from protocol.wallet import TransferConfirmed, TransferFailed, TransferSent

pytestmark = pytest.mark.usefixtures("calm")


SUM = 300 * GLM


class Scene:
    """Payment b1 of order o1 has failed on the chain, its money was drained and is back; `before` is the chain of before.

    On that chain the bytes of b1 would succeed.
    """

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab, self.name = lab, name
        self.key, self.thief = lab.rich(name), lab.rich(f"{name} thief")
        self.payee = address_of(f"{name} payee")
        lab.do(self.key, lab.network.token, token.approve_call(self.thief.address))
        lab.mine(4)
        self.before = lab.call("evm_snapshot")

    async def fail(self, wallet: Payer) -> bytes:
        """Pay, and have it fail; the bytes that were signed."""
        await wallet.engine.submit(TransferBatch("b1", ((self.payee, SUM),), (("o1",),)))
        await wallet.engine.step()
        (attempt,) = wallet.engine.store.attempts(wallet.engine.store.open()[0].id)
        self.lab.call("anvil_dropTransaction", attempt.hash)
        self._move(self.thief, self.key.address, self.thief.address)
        await wallet.engine.step()
        await wallet.until(TransferFailed)
        self.lab.do(self.thief, self.lab.network.token, token.transfer_call(self.key.address, 900 * GLM))
        return attempt.raw

    def _move(self, who: Key, source: str, target: str) -> None:
        words = b"".join(bytes(12) + bytes.fromhex(each[2:]) for each in (source, target))
        self.lab.do(who, self.lab.network.token, bytes.fromhex("23b872dd") + words + (900 * GLM).to_bytes(32, "big"))

    def lose(self) -> None:
        self.lab.call("evm_revert", self.before)
        self.lab.call("anvil_dropAllTransactions")
        self.before = self.lab.call("evm_snapshot")

    def replay(self, raw: bytes) -> None:
        """A stranger's copy of old bytes is mined."""
        self.lab.call("eth_sendRawTransaction", "0x" + raw.hex())
        self.lab.mine()


async def steps(wallet: Payer, count: int) -> None:
    for _ in range(count):
        await wallet.engine.step()
        wallet.lab.mine()
        wallet.clock.now += 0.1


async def settled(wallet: Payer) -> None:
    """Step until nothing is open and no problem is left."""
    for _ in range(40):
        await steps(wallet, 1)
        store = wallet.engine.store
        if not store.open() and not store.queued() and not wallet.problems:
            return
    raise AssertionError(f"{wallet.engine.problems()}, {store.open()}, {store.queued()}")


@trio_test
async def test_the_old_bytes_of_a_failed_payment_are_mined_after_its_debt_was_paid_anew(lab: Lab, db: Path) -> None:
    scene = Scene(lab, "old bytes")
    async with payer(lab, scene.key, db) as wallet:
        old = await scene.fail(wallet)
        await wallet.engine.submit(TransferBatch("b2", ((scene.payee, SUM),), (("o1",),)))
        await wallet.until(TransferConfirmed)
        assert lab.tokens(scene.payee) == SUM
        scene.lose()
        scene.replay(old)
        assert lab.tokens(scene.payee) == SUM, "on this chain b1 succeeds"
    async with payer(lab, scene.key, db) as wallet:
        await settled(wallet)
        assert wallet.told(TransferFailed) == []
    assert lab.tokens(scene.payee) == SUM


@trio_test
async def test_the_old_bytes_wait_in_somebodys_mempool(lab: Lab, db: Path) -> None:
    """They are known to the chain, not mined: an empty transaction with a higher fee takes their nonce."""
    scene = Scene(lab, "mempool")
    async with payer(lab, scene.key, db) as wallet:
        old = await scene.fail(wallet)
        await wallet.engine.submit(TransferBatch("b2", ((scene.payee, SUM),), (("o1",),)))
        await wallet.until(TransferConfirmed)
        scene.lose()
        lab.call("eth_sendRawTransaction", "0x" + old.hex())
        for _ in range(5):
            await wallet.engine.submit(TransferBatch("b3", ((scene.payee, 1),), (("o3",),)))
            await wallet.engine.step()
        await settled(wallet)
    assert lab.tokens(scene.payee) == SUM + 1


@trio_test
async def test_the_repeat_is_not_sent_while_the_old_bytes_may_be_mined(lab: Lab, db: Path) -> None:
    """The repeat is signed and not final when the blocks are lost, and the old bytes come a little later."""
    scene = Scene(lab, "repeat")
    async with payer(lab, scene.key, db) as wallet:
        old = await scene.fail(wallet)
        await wallet.engine.submit(TransferBatch("b2", ((scene.payee, SUM),), (("o1",),)))
        await wallet.engine.step()
        assert len(wallet.told(TransferSent)) == 2
        scene.lose()
        await wallet.engine.step()
        scene.replay(old)
        for _ in range(40):
            await steps(wallet, 1)
            if [event for event in wallet.told(TransferFailed) if event.batch_id == "b2"]:
                break
        with pytest.raises(OrdersTaken) as taken:
            await wallet.engine.submit(TransferBatch("b3", ((scene.payee, SUM),), (("o1",),)))
        assert [batch.batch_id for batch in taken.value.batches] == ["b1"], "which paid it after all"
        await wallet.engine.submit(TransferBatch("b1", ((scene.payee, SUM),), (("o1",),)))
        assert (await wallet.until(TransferConfirmed)).batch_id == "b1"
        await settled(wallet)
    assert lab.tokens(scene.payee) == SUM


@trio_test
async def test_old_bytes_that_were_mined_without_a_lower_nonce_are_noticed_by_their_block(lab: Lab, db: Path) -> None:
    """Both are mined again at once, by a stranger who has both: the count of the account says nothing, the blocks do. It is
    too late, and a person is told exactly that."""
    scene = Scene(lab, "both")
    async with payer(lab, scene.key, db) as wallet:
        old = await scene.fail(wallet)
        await wallet.engine.submit(TransferBatch("b2", ((scene.payee, 3 * GLM),), (("o1",),)))
        await wallet.until(TransferConfirmed)
        (new,) = wallet.engine.store.attempts(wallet.engine.store.txs_of_batch("b2")[0].id)
        scene.lose()
        scene.replay(old)
        scene.replay(new.raw)
        lab.mine(30)
    async with payer(lab, scene.key, db) as wallet:
        await steps(wallet, 12)
        assert len(wallet.engine.problems()) == 1
        (problem,) = wallet.engine.problems()
        assert problem.kind == "TxStuck"
        for word in ("paid twice", "b1", "b2", scene.payee, "3 tGLM", "golem payment decide b2 --paid"):
            assert word in problem.detail
        await desk.decide(wallet.engine, "b2", new.hash)
        await steps(wallet, 1)
        assert wallet.problems == []


@trio_test
async def test_a_repeat_that_pays_more_than_what_the_old_bytes_paid_waits_for_a_person(lab: Lab, db: Path) -> None:
    scene, friend = Scene(lab, "more"), address_of("more friend")
    async with payer(lab, scene.key, db, multi_transfer=None) as wallet:
        old = await scene.fail(wallet)
        await wallet.engine.submit(TransferBatch("b2", ((scene.payee, SUM + GLM),), (("o1", "o2"),)))
        await wallet.until(TransferConfirmed)
        scene.lose()
        scene.replay(old)
        await wallet.engine.submit(TransferBatch("b3", ((friend, GLM),), (("o3",),)))
        await steps(wallet, 14)
        text = " ".join(problem.detail for problem in wallet.engine.problems())
        for word in ("b1", "b2", "o2", "golem payment decide b2"):
            assert word in text, text
        assert lab.tokens(scene.payee) == SUM
        paid_by = wallet.engine.store.txs_of_batch("b1")[0].winner
        with pytest.raises(ValueError, match="less than"):
            await desk.decide(wallet.engine, "b2", paid_by)
        assert "sent again" in await desk.decide(wallet.engine, "b2", None)
        await wallet.until(TransferConfirmed, number=2)
    assert lab.tokens(scene.payee) >= SUM + GLM, "a person said so"


def words(wallet: Payer) -> str:
    return " ".join(problem.detail for problem in wallet.engine.problems())


@trio_test
async def test_lost_blocks_name_the_debts_and_what_to_do(lab: Lab, db: Path) -> None:
    key, payee = lab.rich("named"), address_of("named payee")
    snapshot = lab.call("evm_snapshot")
    async with payer(lab, key, db) as wallet:
        await wallet.pay("b1", (payee, GLM))
        await wallet.until(TransferConfirmed)
        lab.call("evm_revert", snapshot)
    async with payer(lab, key, db) as wallet:
        await steps(wallet, 3)
        text = words(wallet)
        for word in ("has lost blocks", "b1", f"1 tGLM to {payee}", "SETTLED", "golem payment trace b1", key.address, "coins"):
            assert word in text, text
        await settled(wallet)
    assert lab.tokens(payee) == GLM


@trio_test
async def test_another_transaction_provably_took_the_nonce_of_what_was_final(lab: Lab, db: Path) -> None:
    """It was told to be paid, so it is never told to have failed: it is paid anew under its own id."""
    key, payee = lab.rich("taken after all"), address_of("taken after all payee")
    snapshot = lab.call("evm_snapshot")
    async with payer(lab, key, db) as wallet:
        await wallet.engine.submit(TransferBatch("b1", ((payee, GLM),), (("o1",),)))
        first = await wallet.until(TransferConfirmed)
        lab.call("evm_revert", snapshot)
        lab.do(key, address_of("elsewhere"), value=1, gas=21_000)
    async with payer(lab, key, db) as wallet:
        again = await wallet.until(TransferConfirmed)
        assert (again.batch_id, again.tx_hash != first.tx_hash) == ("b1", True)
        assert wallet.told(TransferFailed) == []
        told: Any = desk.story(wallet.engine, "b1")
        assert [tx["state"] for tx in told["transactions"]] == ["nonce_lost", "confirmed"]
        await settled(wallet)
    assert lab.tokens(payee) == GLM
