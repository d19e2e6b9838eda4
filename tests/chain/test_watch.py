"""Final payments whose blocks a chain loses while nobody does anything: both sides notice, and people are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from chain_support import GLM, Clock, Lab, address_of, payer
from worlds.patience import patience
from worlds.support import trio_test

from golem.chain import engine as engine_module
from golem.chain import token, watch
from golem.chain.claims import Claim
from golem.chain.rpc import Rpc
from golem.chain.verify import Verified, verify_transfer
from golem.chain.watch import Received, Vigil
from protocol.wallet import TransferConfirmed

pytestmark = pytest.mark.usefixtures("calm")


@trio_test
async def test_an_idle_payer_notices_lost_blocks_and_pays_again(lab: Lab, db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "WATCH_S", 0.05)
    key, payee = lab.rich("idle"), address_of("idle payee")
    before = lab.call("evm_snapshot")
    async with payer(lab, key, db) as wallet, trio.open_nursery() as nursery:
        await wallet.pay("b1", (payee, GLM))
        await wallet.until(TransferConfirmed)
        await wallet.engine.step()
        assert wallet.problems == []
        nursery.start_soon(wallet.engine.run)
        lab.call("evm_revert", before)
        lab.call("anvil_dropAllTransactions")
        with trio.fail_after(patience(20)):
            while "has lost blocks" not in " ".join(problem.detail for problem in wallet.engine.problems()):
                await trio.sleep(0.01)
            while lab.tokens(payee) < GLM or wallet.problems:
                lab.mine()
                await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
    assert lab.tokens(payee) == GLM


@trio_test
async def test_an_idle_payer_leaves_the_chain_alone_once_its_payment_is_deep(
    lab: Lab, db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "WATCH_S", 0.0)
    key, payee = lab.rich("deep"), address_of("deep payee")
    async with payer(lab, key, db) as wallet:
        await wallet.pay("b1", (payee, GLM))
        await wallet.until(TransferConfirmed)
        looks: list[int] = []
        views = wallet.engine.evidence.views

        async def counted() -> Any:
            looks.append(1)
            return await views()

        monkeypatch.setattr(wallet.engine.evidence, "views", counted)
        await wallet.engine.step()
        await wallet.engine.step()
        assert len(looks) == 2, "it is young"
        lab.mine(engine_module.WATCH_BLOCKS)
        await wallet.engine.step()
        await wallet.engine.step()
        assert len(looks) == 3


class Scene:
    """A payment that was verified, watched by its payee."""

    def __init__(self, lab: Lab, db: Path, name: str) -> None:
        self.lab, self.name, self.clock = lab, name, Clock(1_000_000.0)
        self.key, self.payee = lab.rich(name), address_of(f"{name} payee")
        self.before = lab.call("evm_snapshot")
        self.raw = lab.sign(self.key, lab.network.token, token.transfer_call(self.payee, GLM))
        self.watch = Vigil(db, self.clock)
        self.claim = Claim("p1", lab.network.platform, self.raw.hash, self.key.address, self.payee, GLM, 0, self.clock.now)

    def pay(self) -> None:
        self.lab.call("eth_sendRawTransaction", "0x" + self.raw.raw.hex())
        self.lab.mine(3)

    async def verify(self, rpc: Rpc) -> None:
        found = await verify_transfer(rpc, self.lab.network, self.raw.hash, self.key.address, self.payee, GLM)
        assert isinstance(found, Verified)
        self.watch.add(self.claim, found)

    def lose(self) -> None:
        self.lab.call("evm_revert", self.before)
        self.lab.call("anvil_dropAllTransactions")
        self.lab.mine(5)
        self.before = self.lab.call("evm_snapshot")

    async def looks(self, rpc: Rpc, count: int) -> str:
        for _ in range(count):
            await self.watch.look(self.lab.network, rpc)
        return " ".join(problem.detail for problem in self.watch.problems(self.lab.network))


@trio_test
async def test_a_payee_is_told_of_a_payment_that_the_chain_has_lost_and_when_it_is_back(lab: Lab, db: Path) -> None:
    scene = Scene(lab, db, "told")
    async with Rpc(lab.network) as rpc:
        scene.pay()
        await scene.verify(rpc)
        assert await scene.looks(rpc, 4) == ""
        scene.lose()
        assert await scene.looks(rpc, 2) == "", "two looks may be a moment's confusion"
        told = await scene.looks(rpc, 1)
        for word in (
            "p1",
            "1 tGLM",
            scene.key.address,
            scene.raw.hash,
            "has lost",
            "SETTLED",
            "golem payment decide p1 --unpaid",
        ):
            assert word in told, told
        scene.watch.close()
        scene.watch = Vigil(db, scene.clock)
        assert await scene.looks(rpc, 1) == told, "a start forgets nothing"
        scene.pay()
        assert await scene.looks(rpc, 1) == ""
        (row,) = scene.watch._rows()
        assert row.block == lab.number("eth_blockNumber") - 2
    scene.watch.close()


@trio_test
async def test_what_a_person_knows_is_not_named_any_more(lab: Lab, db: Path) -> None:
    scene = Scene(lab, db, "known")
    async with Rpc(lab.network) as rpc:
        scene.pay()
        await scene.verify(rpc)
        assert scene.watch.forget("p1") is None, "it is there"
        scene.lose()
        assert await scene.looks(rpc, 3)
        assert scene.watch.forget("p2") is None
        found = scene.watch.forget("p1")
        assert isinstance(found, Received)
        assert await scene.looks(rpc, 3) == ""
    scene.watch.close()


@trio_test
async def test_what_is_deep_is_left_alone_until_one_after_it_is_lost(lab: Lab, db: Path) -> None:
    scene = Scene(lab, db, "rests")
    shallow = replace(lab.network, repeat_depth=3)
    async with Rpc(lab.network) as rpc:
        scene.pay()
        await scene.verify(rpc)
        lab.mine(watch.WATCH_BLOCKS)
        await scene.watch.look(shallow, rpc)
        assert scene.watch._rows("deep=0") == []
        assert await scene.looks(rpc, 1) == "", "the newest is looked at all the same"
        scene.lose()
        assert "p1" in await scene.looks(rpc, 3)
    scene.watch.close()


@trio_test
async def test_silence_and_one_who_knows_better_are_no_loss(lab: Lab, db: Path) -> None:
    scene = Scene(lab, db, "silence")
    async with Rpc(lab.network) as rpc:
        scene.pay()
        await scene.verify(rpc)
        here = rpc.block
        other = ("0x" + "12" * 32, 0)
        answers: list[Any] = []

        async def said(number: int) -> Any:
            return answers.pop() if answers else await here(number)

        rpc.block = said  # type: ignore[method-assign]
        answers[:] = [None] * 3
        assert await scene.looks(rpc, 3) == ""
        answers[:] = [other, other]
        assert await scene.looks(rpc, 3) == "", "it was found again at the third look"
        answers[:] = [other] * 2
        assert await scene.looks(rpc, 2) == ""
    scene.watch.close()
