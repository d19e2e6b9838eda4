"""What can go wrong while paying, provoked and survived: on the dev chain, and on anvil wherever it is installed.

Every test ends by asking the chain itself: each payee has what it was to get, exactly once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from chain_support import GLM, GWEI, Faulty, Lab, Payer, Refused, address_of, key_of, payer
from worlds.support import trio_test

from golem.chain import token
from golem.chain.draft import Unowed
from golem.chain.rows import TransferBatch
from protocol.types import amount, to_wei
from protocol.wallet import TransferConfirmed, TransferDelayed, TransferFailed, TransferMined, TransferSent

pytestmark = pytest.mark.usefixtures("calm")


@trio_test
async def test_one_payee_is_paid_by_a_plain_transfer_and_final_only_at_depth(lab: Lab, db: Path) -> None:
    key, payee = lab.rich("plain"), address_of("plain payee")
    async with payer(lab, key, db) as wallet:
        nonce = lab.nonce(key.address)
        await wallet.pay("b1", (payee, 3 * GLM))
        await wallet.engine.step()
        assert [type(event) for event in wallet.events] == [TransferSent]
        lab.mine()
        await wallet.engine.step()
        assert lab.tokens(payee) == 3 * GLM
        assert wallet.told(TransferMined)
        lab.mine()
        await wallet.engine.step()
        assert not wallet.told(TransferConfirmed), "one block deep is not final"
        lab.mine()
        await wallet.engine.step()
        (done,) = wallet.told(TransferConfirmed)
        assert (done.batch_id, done.gas_used) == ("b1", 51_132)
        receipt = lab.call("eth_getTransactionReceipt", done.tx_hash)
        assert to_wei(amount(done.fee)) == int(receipt["gasUsed"], 16) * int(receipt["effectiveGasPrice"], 16)
        assert lab.nonce(key.address) == nonce + 1
        assert wallet.problems == []


@trio_test
async def test_many_payees_take_one_approval_and_one_packed_call(lab: Lab, db: Path) -> None:
    key = lab.rich("packed")
    payees = [(address_of(f"packed {i}"), GLM + i) for i in range(10)]
    async with payer(lab, key, db) as wallet:
        before = lab.nonce(key.address)
        await wallet.pay("b1", *payees)
        done = await wallet.until(TransferConfirmed)
        assert lab.nonce(key.address) == before + 2
        assert done.gas_used == 291_705  # 29,171 a payment to a new holder
        wallet.events.clear()
        await wallet.pay("b2", *payees)
        await wallet.until(TransferConfirmed)
        assert lab.nonce(key.address) == before + 3, "the approval is for good"
    assert [lab.tokens(payee) for payee, _ in payees] == [2 * amount for _, amount in payees]


@trio_test
async def test_a_repeated_batch_changes_nothing(lab: Lab, db: Path) -> None:
    key, payee = lab.rich("repeat"), address_of("repeat payee")
    async with payer(lab, key, db) as wallet:
        batch = TransferBatch("b1", ((payee, GLM),))
        for _ in range(3):
            await wallet.engine.submit(batch)
            await wallet.engine.step()
        first = await wallet.until(TransferConfirmed)
        await wallet.engine.submit(batch)
        await wallet.engine.step()
        assert wallet.told(TransferConfirmed) == [first, first], "its end is told again, for a listener that died"
        with pytest.raises(ValueError, match="other payees"):
            await wallet.engine.submit(TransferBatch("b1", ((payee, 2 * GLM),)))
    async with payer(lab, key, db) as wallet:
        await wallet.engine.submit(batch)
        assert await wallet.until(TransferConfirmed) == first
        lab.mine(3)
    assert lab.tokens(payee) == GLM


@trio_test
async def test_a_dropped_transaction_is_sent_again_with_the_same_bytes(lab: Lab, db: Path) -> None:
    key, payee = lab.rich("dropped"), address_of("dropped payee")
    async with payer(lab, key, db) as wallet:
        await wallet.pay("b1", (payee, GLM))
        await wallet.engine.step()
        tx_hash = wallet.told(TransferSent)[0].tx_hash
        lab.call("anvil_dropTransaction", tx_hash)
        assert lab.call("eth_getTransactionByHash", tx_hash) is None
        done = await wallet.until(TransferConfirmed)
        assert done.tx_hash == tx_hash
    assert lab.tokens(payee) == GLM


@trio_test
async def test_a_fee_spike_after_sending_is_outbid_at_the_same_nonce(lab: Lab, db: Path) -> None:
    key, payee = lab.rich("spike"), address_of("spike payee")
    async with payer(lab, key, db) as wallet:
        await wallet.pay("b1", (payee, GLM))
        nonce = lab.nonce(key.address)
        await wallet.engine.step()
        lab.base_fee(30 * GWEI)
        wallet.clock.now += 1
        await wallet.engine.step()
        assert len(wallet.told(TransferSent)) == 2
        done = await wallet.until(TransferConfirmed)
        assert done.tx_hash == wallet.told(TransferSent)[1].tx_hash
        assert lab.nonce(key.address) == nonce + 1
    assert lab.tokens(payee) == GLM


@trio_test
async def test_fees_over_the_cap_make_it_wait_and_say_so(lab: Lab, db: Path) -> None:
    key, payee = lab.rich("cap"), address_of("cap payee")
    async with payer(lab, key, db, fee_cap=5 * GWEI) as wallet:
        lab.base_fee(90 * GWEI)
        await wallet.pay("b1", (payee, GLM))
        await wallet.engine.step()
        await wallet.engine.step()
        assert wallet.problems == ["TxStuck"]
        assert len(wallet.told(TransferDelayed)) == 1, "said once"
        assert not wallet.told(TransferSent)
        lab.base_fee(3 * GWEI)
        await wallet.engine.step()
        assert wallet.told(TransferSent)
        lab.base_fee(90 * GWEI)
        wallet.clock.now += 1
        await wallet.engine.step()
        assert wallet.problems == ["TxStuck"], "in flight, at the cap"
        lab.base_fee(GWEI)
        await wallet.until(TransferConfirmed)
    assert lab.tokens(payee) == GLM


@trio_test
async def test_a_reorganisation_takes_it_out_and_it_is_sent_again(lab: Lab, db: Path) -> None:
    key, payee = lab.rich("reorg"), address_of("reorg payee")
    async with payer(lab, key, db, depth=4) as wallet:
        await wallet.pay("b1", (payee, GLM))
        await wallet.engine.step()
        lab.mine(2)
        await wallet.engine.step()
        assert wallet.told(TransferMined)
        lab.call("anvil_reorg", 2, [])
        assert lab.tokens(payee) == 0
        await wallet.engine.step()
        assert not wallet.told(TransferConfirmed)
        await wallet.until(TransferConfirmed)
        assert len(wallet.told(TransferMined)) == 2
    assert lab.tokens(payee) == GLM


@trio_test
async def test_the_node_is_down_and_then_loses_its_reply(lab: Lab, db: Path) -> None:
    key, payee, wire = lab.rich("down"), address_of("down payee"), Faulty()
    async with payer(lab, key, db, transport=wire) as wallet:
        await wallet.pay("b1", (payee, GLM))
        wire.plan = {"*": "refuse"}
        await wallet.engine.step()
        assert wallet.problems == ["RpcError"]
        wire.plan = {"eth_sendRawTransaction": "lose-reply"}
        await wallet.engine.step()
        assert wallet.problems == ["RpcError"]
        wire.plan = {}
        await wallet.until(TransferConfirmed)
        assert wallet.problems == []
    assert lab.tokens(payee) == GLM


@trio_test
async def test_no_token_and_no_gas_are_named_and_payments_resume(lab: Lab, db: Path) -> None:
    key, payee, friend = key_of("poor"), address_of("poor payee"), lab.rich("poor friend")
    async with payer(lab, key, db) as wallet:
        await wallet.pay("b1", (payee, 2 * GLM))
        await wallet.engine.step()
        (problem,) = wallet.engine.problems()
        assert (problem.kind, problem.needed_wei, problem.address) == ("InsufficientToken", 2 * GLM, key.address)
        lab.do(friend, lab.network.token, token.transfer_call(key.address, 5 * GLM))
        await wallet.engine.step()
        (problem,) = wallet.engine.problems()
        assert problem.kind == "InsufficientGas"
        assert problem.needed_wei > 0
        assert len(wallet.told(TransferDelayed)) == 2
        lab.do(friend, key.address, value=GLM, gas=21_000)
        await wallet.until(TransferConfirmed)
    assert lab.tokens(payee) == 2 * GLM


@trio_test
async def test_a_foreign_transaction_took_the_nonce(lab: Lab, db: Path) -> None:
    class Dies(Exception):
        pass

    def die(point: str) -> None:
        if point == "stored":
            raise Dies

    key, payee = lab.rich("nonce"), address_of("nonce payee")
    async with payer(lab, key, db, checkpoint=die) as wallet:
        await wallet.pay("b1", (payee, GLM))
        with pytest.raises(Dies):
            await wallet.engine.step()
    lab.do(key, address_of("elsewhere"), value=1, gas=21_000)
    async with payer(lab, key, db) as wallet:
        await wallet.engine.step()
        assert not wallet.told(TransferFailed), "the other one may yet be reorganised away"
        lost = await wallet.until(TransferFailed)
        assert (lost.batch_id, "took nonce" in lost.reason) == ("b1", True)
        assert lab.tokens(payee) == 0
        await wallet.pay("b2", (payee, GLM))
        await wallet.until(TransferConfirmed)
    assert lab.tokens(payee) == GLM


@trio_test
async def test_a_node_that_hides_a_receipt_for_a_while_makes_nobody_pay_twice(lab: Lab, db: Path) -> None:
    key, payee, wire = lab.rich("hidden"), address_of("hidden payee"), Faulty()
    async with payer(lab, key, db, transport=wire) as wallet:
        await wallet.pay("b1", (payee, GLM))
        await wallet.engine.step()
        lab.mine(5)
        wire.plan = {"eth_getTransactionReceipt": "null"}
        await wallet.engine.step()
        await wallet.engine.step()
        wire.plan = {}
        await wallet.until(TransferConfirmed)
        assert wallet.told(TransferFailed) == []
    assert lab.tokens(payee) == GLM


@trio_test
async def test_a_foreign_transaction_waits_behind_a_nonce_gap(lab: Lab, db: Path) -> None:
    key, payee, other = lab.rich("gap"), address_of("gap payee"), address_of("gap other")
    nonce = lab.nonce(key.address)
    later = lab.send(key, other, nonce=nonce + 1, value=1, gas=21_000)
    lab.mine()
    assert lab.call("eth_getTransactionReceipt", later) is None, "queued until the gap is filled"
    async with payer(lab, key, db) as wallet:
        await wallet.pay("b1", (payee, GLM))
        await wallet.until(TransferConfirmed)
    assert lab.call("eth_getTransactionReceipt", later) is not None
    assert lab.tokens(payee) == GLM


@trio_test
async def test_a_reverted_transaction_fails_with_its_cause(lab: Lab, db: Path) -> None:
    key, payee, thief = lab.rich("revert"), address_of("revert payee"), lab.rich("revert thief")
    lab.do(key, lab.network.token, token.approve_call(thief.address))
    async with payer(lab, key, db) as wallet:
        await wallet.pay("b1", (payee, 900 * GLM))
        await wallet.engine.step()
        lab.call("anvil_dropTransaction", wallet.told(TransferSent)[0].tx_hash)
        words = [key.address, thief.address]
        drain = bytes.fromhex("23b872dd") + b"".join(bytes(12) + bytes.fromhex(w[2:]) for w in words)
        lab.do(thief, lab.network.token, drain + (500 * GLM).to_bytes(32, "big"))
        failed = await wallet.until(TransferFailed)
        assert "transfer amount exceeds balance" in failed.reason
    assert lab.tokens(payee) == 0


@trio_test
async def test_a_chain_that_lost_final_blocks_gets_the_same_bytes_again(lab: Lab, db: Path) -> None:
    key, payee = lab.rich("stale"), address_of("stale payee")
    snapshot = lab.call("evm_snapshot")
    async with payer(lab, key, db) as wallet:
        await wallet.pay("b1", (payee, GLM))
        first = await wallet.until(TransferConfirmed)
        lab.call("evm_revert", snapshot)
        await wallet.engine.submit(TransferBatch("b2", ((payee, GLM),)))
        await wallet.engine.step()
        assert wallet.problems == ["TxStuck"]
        assert "has lost blocks" in wallet.engine.problems()[0].detail
        assert len(wallet.told(TransferSent)) == 1, "nothing new is sent through a node that is behind"
        while len(wallet.told(TransferConfirmed)) < 2:
            await wallet.engine.step()
            lab.mine()
        assert lab.call("eth_getTransactionReceipt", first.tx_hash)["status"] == "0x1"
        assert wallet.problems == []
    assert lab.tokens(payee) == 2 * GLM


@trio_test
async def test_a_chain_that_lost_blocks_while_nobody_looked_is_healed_at_the_next_start(lab: Lab, db: Path) -> None:
    key, payee = lab.rich("power cut"), address_of("power cut payee")
    snapshot = lab.call("evm_snapshot")
    async with payer(lab, key, db) as wallet:
        await wallet.pay("b1", (payee, GLM))
        await wallet.until(TransferConfirmed)
    lab.call("evm_revert", snapshot)
    assert lab.tokens(payee) == 0
    async with payer(lab, key, db) as wallet:
        for _ in range(12):
            await wallet.engine.step()
            lab.mine()
        assert wallet.problems == []
        assert not [event for event in wallet.events if isinstance(event, TransferConfirmed | TransferFailed)], "told already"
    assert lab.tokens(payee) == GLM


@trio_test
async def test_a_nonce_that_paid_nothing_and_is_free_again_is_used_up(lab: Lab, db: Path) -> None:
    class Dies(Exception):
        pass

    def die(point: str) -> None:
        if point == "stored":
            raise Dies

    key, payee = lab.rich("free again"), address_of("free again payee")
    snapshot = lab.call("evm_snapshot")
    async with payer(lab, key, db, checkpoint=die) as wallet:
        await wallet.pay("b1", (payee, GLM))
        with pytest.raises(Dies):
            await wallet.engine.step()
    lab.do(key, address_of("elsewhere"), value=1, gas=21_000)
    async with payer(lab, key, db) as wallet:
        await wallet.until(TransferFailed)
        await wallet.pay("b1 anew", (payee, GLM))
        await wallet.until(TransferConfirmed)
        (first,) = wallet.engine.store.attempts(wallet.engine.store.txs_of_batch("b1")[0].id)
        lab.call("evm_revert", snapshot)  # the other transaction is gone: b1 could be mined after all
    async with payer(lab, key, db) as wallet:
        for _ in range(12):
            await wallet.engine.step()
            lab.mine()
        assert wallet.problems == []
        with pytest.raises(Refused, match="nonce"):
            lab.call("eth_sendRawTransaction", "0x" + first.raw.hex())
        lab.mine()
    assert lab.tokens(payee) == GLM


@trio_test
async def test_another_chain_id_is_a_problem_and_nothing_is_sent(lab: Lab, db: Path) -> None:
    async with payer(lab, lab.rich("chain id"), db, chain_id=17000) as wallet:
        await wallet.engine.submit(TransferBatch("b1", ((address_of("x"), GLM),)))
        await wallet.engine.step()
        assert wallet.problems == ["InvalidChainId"]
        assert wallet.told(TransferSent) == []


@trio_test
async def test_dying_at_every_point_pays_once(lab: Lab, db: Path) -> None:
    class Dies(Exception):
        pass

    key, payee = lab.rich("dying"), address_of("dying payee")
    points = ["signed", "stored", "sent", "mined"]
    for number, deadly in enumerate(points):
        lives = iter([True])

        def die(point: str, deadly: str = deadly, lives: Iterator[bool] = lives) -> None:
            if point == deadly and next(lives, False):
                raise Dies

        async with payer(lab, key, db, checkpoint=die) as wallet:
            await wallet.engine.submit(TransferBatch(f"b{number}", ((payee, GLM),)))
            with pytest.raises(Dies):
                await wallet.until(TransferConfirmed)
        async with payer(lab, key, db) as wallet:
            await wallet.until(TransferConfirmed)
    assert lab.tokens(payee) == len(points) * GLM
    assert lab.nonce(key.address) == 1 + len(points)


@trio_test
async def test_what_cannot_be_a_payment_is_refused(lab: Lab, db: Path) -> None:
    good = address_of("good")
    bad: list[Any] = [(), ((good, 0),), ((good, -1),), ((good, 2**96),), (("0x12", 1),), ((good, 1),) * 51]
    async with payer(lab, key_of("refused"), db) as wallet:
        for payees in bad:
            with pytest.raises(ValueError):
                await wallet.engine.submit(TransferBatch("b1", payees))


@trio_test
async def test_zk_chains_get_the_estimate_as_it_is_and_no_tip(lab: Lab, db: Path) -> None:
    key, payee = lab.rich("zk"), address_of("zk payee")
    call = "0x" + token.transfer_call(payee, GLM).hex()
    async with payer(lab, key, db, fee_model="zk") as wallet:
        estimate = lab.number("eth_estimateGas", {"from": key.address, "to": lab.network.token, "data": call})
        await wallet.pay("b1", (payee, GLM))
        await wallet.engine.step()
        sent = lab.call("eth_getTransactionByHash", wallet.told(TransferSent)[0].tx_hash)
        assert (int(sent["gas"], 16), int(sent["maxPriorityFeePerGas"], 16)) == (estimate, 0)
        await wallet.until(TransferConfirmed)
    assert lab.tokens(payee) == GLM


@trio_test
async def test_op_chains_add_the_fee_of_their_parent_chain(lab: Lab, db: Path) -> None:
    class Oracle(httpx.AsyncHTTPTransport):
        """The node of an op-stack chain: it has the fee oracle."""

        fee_wei = 100 * 10**18

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            call = json.loads(request.content)
            if call["method"] == "eth_call" and call["params"][0]["to"] == token.L1_FEE_ORACLE:
                return httpx.Response(200, json={"jsonrpc": "2.0", "id": 1, "result": f"0x{self.fee_wei:064x}"})
            return await super().handle_async_request(request)

    key, payee, node = lab.rich("op"), address_of("op payee"), Oracle()
    async with payer(lab, key, db, fee_model="op", transport=node) as wallet:
        await wallet.pay("b1", (payee, GLM))
        await wallet.engine.step()
        (problem,) = wallet.engine.problems()
        assert problem.kind == "InsufficientGas"
        assert problem.needed_wei > 114 * 10**18, "10 ether are there, 125 are wanted"
        node.fee_wei = 10**15
        await wallet.until(TransferConfirmed)
    assert lab.tokens(payee) == GLM


@trio_test
async def test_what_is_not_owed_is_not_signed_and_holds_up_nobody_else(lab: Lab, db: Path) -> None:
    key, bad, good = lab.rich("unowed"), address_of("unowed payee"), address_of("owed payee")
    said = {"b1": "the ledger has another sum"}
    seen = []

    async def vouch(batch_id: str, payees: tuple[tuple[str, int], ...]) -> str:
        seen.append((batch_id, payees))
        return said.get(batch_id, "")

    async with payer(lab, key, db, vouch=vouch) as wallet:
        await wallet.pay("b1", (bad, GLM))
        await wallet.pay("b2", (good, 2 * GLM))
        await wallet.until(TransferConfirmed)
        (problem,) = wallet.engine.problems()
        assert (problem.kind, "the ledger has another sum" in problem.detail) == ("CantSign", True)
        assert lab.tokens(bad) == 0
        assert (("b1", ((bad, GLM),)) in seen, ("b2", ((good, 2 * GLM),)) in seen) == (True, True)
        said.clear()
        await wallet.until(TransferConfirmed, number=2)
    assert (lab.tokens(bad), lab.tokens(good)) == (GLM, 2 * GLM)


@pytest.mark.parametrize("change", ["data=cast(data||x'00' as blob)", "recipient=upper(recipient)", "gas=gas+1"])
@trio_test
async def test_a_flipped_bit_of_a_transaction_is_not_signed_with_a_higher_fee(lab: Lab, db: Path, change: str) -> None:
    key, payee = lab.rich(f"flipped {change}"), address_of(f"flipped payee {change}")
    async with payer(lab, key, db) as wallet:
        await wallet.pay("b1", (payee, GLM))
        await wallet.engine.step()
        (tx,) = wallet.engine.store.open()
        (attempt,) = wallet.engine.store.attempts(tx.id)
        with pytest.raises(Unowed, match="damaged"):
            await wallet.engine.drafts.again(dataclasses.replace(tx, nonce=tx.nonce + 1), attempt, 60 * GWEI, 2 * GWEI)
        wallet.engine.store._sql.execute(f"update tx set {change}")
        lab.call("anvil_dropAllTransactions")
        lab.base_fee(30 * GWEI)
        wallet.clock.now += 1
        await wallet.engine.step()
        assert any(problem.kind == "CantSign" and "damaged" in problem.detail for problem in wallet.engine.problems())
        assert len(wallet.told(TransferSent)) == 1


NOBODY = "0x" + "00" * 20  # the token refuses to move anything there, as others refuse those on their black list


@trio_test
async def test_a_payee_whom_the_token_refuses_is_named_and_the_others_are_paid(lab: Lab, db: Path) -> None:
    key, good = lab.rich("black list"), [address_of(f"good payee {i}") for i in range(3)]
    async with payer(lab, key, db) as wallet:
        await wallet.pay("b1", (good[0], GLM), (NOBODY, GLM), (good[1], GLM))
        failed = await wallet.until(TransferFailed)
        assert failed.refused == (NOBODY,)
        assert f"refuses a transfer to {NOBODY}" in failed.reason
        assert lab.nonce(key.address) == 2, "test money and the approval: nothing was sent that could not be paid"
        await wallet.pay("b2", (NOBODY, GLM))
        await wallet.pay("b3", (good[0], GLM), (good[1], GLM))
        await wallet.pay("b4", (good[2], GLM))
        for batch_id in ("b3", "b4"):
            while batch_id not in [event.batch_id for event in wallet.told(TransferConfirmed)]:
                await wallet.until(TransferConfirmed)
                await steps(wallet)
        assert wallet.problems == ["TxStuck"]
        assert NOBODY in wallet.engine.problems()[0].detail
        assert [event.batch_id for event in wallet.told(TransferDelayed) if NOBODY in event.reason] == ["b2"]
    assert [lab.tokens(payee) for payee in good] == [GLM] * 3


async def steps(wallet: Payer) -> None:
    for _ in range(4):
        await wallet.engine.step()
        wallet.lab.mine()
        wallet.clock.now += 0.1
