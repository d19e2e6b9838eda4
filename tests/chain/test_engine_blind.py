"""Histories in which an RPC does not know, or does not say, what became of a payment. What the payee holds on the true
chain is the judge: never more than was owed.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import httpx
import pytest
from blind import HOSTS, Blind
from chain_support import GLM, Lab, Payer, address_of, payer
from worlds.support import trio_test

from golem.chain import desk, pool, token
from golem.chain.engine import MAX_PROBLEMS
from golem.chain.rows import TransferBatch
from golem.chain.signer import Key
from golem.chain.store import MAX_SEEN, Store
from golem.chain.vouch import Payees
from protocol.wallet import TransferConfirmed, TransferDelayed, TransferFailed, TransferSent

pytestmark = pytest.mark.usefixtures("calm")


def urls(count: int) -> tuple[str, ...]:
    return tuple(f"http://{host}/" for host in HOSTS[:count])


async def steps(wallet: Payer, count: int) -> None:
    for _ in range(count):
        await wallet.engine.step()
        wallet.lab.mine()
        wallet.clock.now += 0.1


async def again_when_lost(wallet: Payer, payee: str) -> None:
    """What the wallet does when the engine says that a batch paid nothing and never will."""
    lost = wallet.told(TransferFailed)
    if len(lost) >= len({event.batch_id for event in lost}) and lost:
        await wallet.engine.submit(TransferBatch(f"again {len(lost)}", ((payee, GLM),)))


@trio_test
@pytest.mark.parametrize("hosts", [1, 2, 3])
async def test_an_index_that_is_missing_for_good_pays_nobody_twice(lab: Lab, tmp_path: Path, hosts: int) -> None:
    key, payee = lab.rich(f"index {hosts}"), address_of(f"index payee {hosts}")
    wire = Blind(lab.url, key)
    await wire.set(HOSTS[0], "null-both")
    async with payer(lab, key, tmp_path / "chain.db", transport=wire, rpc_urls=urls(hosts)) as wallet:
        await wallet.pay("b1", (payee, GLM))
        for _ in range(25):
            await steps(wallet, 1)
            await again_when_lost(wallet, payee)
        assert lab.tokens(payee) == GLM
        assert wallet.told(TransferFailed) == []
        if hosts == 1:
            assert wallet.problems, "a payment that waits says why"
            await wire.set(HOSTS[0], "")
        await wallet.until(TransferConfirmed)
        assert wallet.problems == []
    assert lab.tokens(payee) == GLM


@trio_test
async def test_rpcs_that_contradict_one_another_stop_what_is_not_signed_and_are_named(lab: Lab, tmp_path: Path) -> None:
    key, payees = lab.rich("contradiction"), [address_of(f"contradiction payee {i}") for i in range(2)]
    wire = Blind(lab.url, key)
    async with payer(lab, key, tmp_path / "chain.db", transport=wire, rpc_urls=urls(2)) as wallet:
        await wallet.pay("b1", (payees[0], GLM))
        await steps(wallet, 1)
        await wire.set(HOSTS[0], "fork")  # says that another transaction took the nonce
        await wire.set(HOSTS[1], "null-both")  # shows ours in its blocks
        await wallet.engine.submit(TransferBatch("b2", ((payees[1], GLM),)))
        await steps(wallet, 6)
        text = " ".join(problem.detail for problem in wallet.engine.problems())
        assert "contradict" in text
        assert "LOCAL_GETH_ADDR or networks.json" in text, "what to do"
        assert all(host in text for host in HOSTS[:2])
        assert wallet.told(TransferFailed) == []
        assert [lab.tokens(payee) for payee in payees] == [GLM, 0], "nothing new is sent meanwhile"
        await wire.set(HOSTS[0], "")
        while len(wallet.told(TransferConfirmed)) < 2:
            await steps(wallet, 1)
        assert wallet.problems == []
    assert [lab.tokens(payee) for payee in payees] == [GLM, GLM]


@trio_test
async def test_what_stays_unclear_waits_for_a_person_who_is_shown_both_stories(lab: Lab, tmp_path: Path) -> None:
    key, payee = lab.rich("person"), address_of("person payee")
    wire = Blind(lab.url, key)
    async with payer(lab, key, tmp_path / "chain.db", transport=wire, rpc_urls=urls(2)) as wallet:
        await wallet.pay("b1", (payee, GLM))
        await wallet.engine.step()
        with pytest.raises(ValueError, match="nothing to decide"):
            await desk.decide(wallet.engine, "b1", None)
        tx_hash = wallet.told(TransferSent)[0].tx_hash
        for host in HOSTS[:2]:
            await wire.set(host, "blank")
        lab.mine()
        await steps(wallet, 20)
        (problem,) = wallet.engine.problems()
        assert problem.batch_id == "b1"
        assert all(f"{host}: nonce 1 is used" in problem.detail for host in HOSTS[:2])
        assert "golem payment decide" in problem.detail
        told = desk.story(wallet.engine, "b1")
        assert told is not None
        assert {seen["by"] for seen in told["transactions"][0]["seen"]} == {"this node", *HOSTS[:2]}
        with pytest.raises(ValueError, match="not a transaction hash"):
            await desk.decide(wallet.engine, "b1", "0x12")
        with pytest.raises(ValueError, match=r"does not know it.*add --unseen"):
            await desk.decide(wallet.engine, "b1", tx_hash)
        assert "counts as paid" in await desk.decide(wallet.engine, "b1", tx_hash, unseen=True)
        await wallet.engine.step()
        assert wallet.told(TransferConfirmed)[0].tx_hash == tx_hash
        assert wallet.problems == []
    assert lab.tokens(payee) == GLM


@trio_test
async def test_a_transaction_that_is_named_as_the_payment_has_to_be_one(lab: Lab, tmp_path: Path) -> None:
    """Another program with our key took the nonce, and paid the payee: a person names its transaction, and others by mistake."""
    key, payee, friend = lab.rich("named"), address_of("named payee"), address_of("named friend")
    early = lab.do(key, lab.network.token, token.transfer_call(payee, GLM))["transactionHash"]
    lab.mine(1)
    wire = Blind(lab.url, key)
    async with payer(lab, key, tmp_path / "chain.db", transport=wire, rpc_urls=urls(2)) as wallet:
        await wallet.pay("b0", (payee, GLM))
        other = (await wallet.until(TransferConfirmed)).tx_hash
        await wallet.pay("b1", (payee, GLM))
        await wallet.engine.step()
        lab.call("anvil_dropAllTransactions")
        paid = lab.do(key, lab.network.token, token.transfer_call(payee, GLM + 1))["transactionHash"]
        less = lab.do(key, lab.network.token, token.transfer_call(payee, GLM - 1))["transactionHash"]
        strange = lab.do(key, lab.network.token, token.transfer_call(friend, GLM))["transactionHash"]
        failed = lab.do(key, lab.network.token, token.transfer_call(payee, 10**6 * GLM), gas=100_000)["transactionHash"]
        await steps(wallet, 6)
        refused = {
            other: "is the transaction of payment b0", early: "older than the payment", less: f"{GLM - 1} of {GLM} wei",
            strange: f"0 of {GLM} wei", failed: "has failed", "0x" + "12" * 32: "no RPC shows",
        }  # fmt: skip
        for tx_hash, words in refused.items():
            with pytest.raises(ValueError, match=words):
                await desk.decide(wallet.engine, "b1", tx_hash)
        for tx_hash in (other, early, less, strange, failed):
            with pytest.raises(ValueError, match=r"is the transaction|did not pay"):
                await desk.decide(wallet.engine, "b1", tx_hash, unseen=True)
        await wire.set(HOSTS[0], "null-both")
        assert "in block" in await desk.decide(wallet.engine, "b1", paid), "one RPC that shows it is enough"
        assert (await wallet.until(TransferConfirmed, number=2)).tx_hash == paid
        with pytest.raises(ValueError, match="nothing to decide"):
            await desk.decide(wallet.engine, "b1", paid)
        assert wallet.problems == []


@trio_test
async def test_a_transaction_that_may_be_thrown_out_of_the_chain_is_no_payment_yet(lab: Lab, tmp_path: Path) -> None:
    key, payee = lab.rich("young"), address_of("young payee")
    wire = Blind(lab.url, key)
    async with payer(lab, key, tmp_path / "chain.db", transport=wire, rpc_urls=urls(1)) as wallet:
        await wallet.pay("b1", (payee, GLM))
        await wallet.engine.step()
        lab.call("anvil_dropAllTransactions")
        paid = lab.do(key, lab.network.token, token.transfer_call(payee, GLM + 1))["transactionHash"]
        await wire.set(HOSTS[0], "blank")
        for _ in range(4):
            await wallet.engine.step()
        await wire.set(HOSTS[0], "")
        with pytest.raises(ValueError, match="not final"):
            await desk.decide(wallet.engine, "b1", paid)
        lab.mine(5)
        assert "in block" in await desk.decide(wallet.engine, "b1", paid)


@trio_test
async def test_a_batch_that_is_not_owed_is_taken_back_by_a_person(lab: Lab, tmp_path: Path) -> None:
    """The wallet has forgotten some of its orders: nothing is signed, and `decide` is the way out."""

    async def objection(batch_id: str, payees: Payees) -> str:
        return "order o2 is not one of batch b1" if batch_id == "b1" else ""

    key, payee = lab.rich("taken back"), address_of("taken back payee")
    async with payer(lab, key, tmp_path / "chain.db", rpc_urls=(lab.url,), vouch=objection) as wallet:
        await wallet.engine.submit(TransferBatch("b1", ((payee, 2 * GLM),), (("o1", "o2"),)))
        with pytest.raises(ValueError, match="in no doubt"):
            await desk.decide(wallet.engine, "b1", None)
        await wallet.engine.step()
        (problem,) = wallet.engine.problems()
        for words in ("order o2 is not one of batch b1", "golem payment decide b1 --unpaid", "nothing was signed"):
            assert words in problem.detail
        with pytest.raises(ValueError, match="say --unpaid"):
            await desk.decide(wallet.engine, "b1", "0x" + "12" * 32)
        assert "taken back" in await desk.decide(wallet.engine, "b1", None)
        failed = await wallet.until(TransferFailed)
        assert (failed.batch_id, "a person took it back" in failed.reason) == ("b1", True)
        await wallet.engine.submit(TransferBatch("b2", ((payee, GLM),), (("o1",),)))
        await wallet.until(TransferConfirmed)
        assert wallet.problems == []
    assert lab.tokens(payee) == GLM


@trio_test
async def test_a_person_may_say_that_nothing_was_paid_but_not_while_the_nonce_is_free(lab: Lab, tmp_path: Path) -> None:
    key, payee = lab.rich("unpaid"), address_of("unpaid payee")
    wire = Blind(lab.url, key)
    async with payer(lab, key, tmp_path / "chain.db", transport=wire, rpc_urls=urls(1)) as wallet:
        await wallet.pay("b1", (payee, GLM))
        await wallet.engine.step()
        lab.call("anvil_dropAllTransactions")
        lab.do(key, address_of("elsewhere"), value=1, gas=21_000)  # it took the nonce
        await wire.set(HOSTS[0], "blank")
        await steps(wallet, 6)
        snapshot_free = wire.faults.copy()
        await wire.set(HOSTS[0], "stale-counts")
        wire.since[HOSTS[0]] = 1
        with pytest.raises(ValueError, match="nonce 1 is free"):
            await desk.decide(wallet.engine, "b1", None)
        wire.faults = snapshot_free
        assert "paid anew" in await desk.decide(wallet.engine, "b1", None)
        await wallet.engine.step()
        assert [event.batch_id for event in wallet.told(TransferFailed)] == ["b1"]
        await wire.set(HOSTS[0], "")
        await wallet.engine.submit(TransferBatch("again", ((payee, GLM),)))
        await wallet.until(TransferConfirmed)
    assert lab.tokens(payee) == GLM


@trio_test
async def test_one_rpc_that_refuses_blocks_does_not_hold_up_what_another_shows(lab: Lab, tmp_path: Path) -> None:
    """The first RPC shows receipts and its head, and refuses every block by number (no plan for old ones)."""
    key, payees = lab.rich("no blocks"), [address_of(f"no blocks payee {i}") for i in range(2)]
    wire = Blind(lab.url, key)
    async with payer(lab, key, tmp_path / "chain.db", transport=wire, rpc_urls=urls(2)) as wallet:
        await wallet.pay("b1", (payees[0], GLM))
        await wallet.engine.step()
        await wire.set(HOSTS[0], "no-blocks")
        await wallet.until(TransferConfirmed)
        await wallet.pay("b2", (payees[1], GLM))
        await wallet.until(TransferConfirmed, number=2)
    assert [lab.tokens(payee) for payee in payees] == [GLM, GLM]


@trio_test
async def test_a_person_is_warned_who_calls_unpaid_what_an_rpc_shows_in_a_block(lab: Lab, tmp_path: Path) -> None:
    """The second RPC has other blocks, so the first one's receipt is not final; it paid all the same."""
    key, payee = lab.rich("warned"), address_of("warned payee")
    wire = Blind(lab.url, key)
    async with payer(lab, key, tmp_path / "chain.db", transport=wire, rpc_urls=urls(2)) as wallet:
        await wallet.pay("b1", (payee, GLM))
        await wallet.engine.step()
        await wire.set(HOSTS[1], "other-hashes")
        await steps(wallet, 12)
        assert "golem payment decide" in wallet.engine.problems()[-1].detail or wallet.engine.unclear
        assert lab.tokens(payee) == GLM
        with pytest.raises(ValueError, match=f"{HOSTS[0]} shows"):
            await desk.decide(wallet.engine, "b1", None)
        await wire.set(HOSTS[1], "")
        await wallet.until(TransferConfirmed)
    assert lab.tokens(payee) == GLM


@trio_test
async def test_what_is_unclear_is_told_in_bounded_words(lab: Lab, tmp_path: Path) -> None:
    """Another program pays the same payee with the same key, again and again."""
    key, payee = lab.rich("other program"), address_of("other program payee")
    async with payer(lab, key, tmp_path / "chain.db", rpc_urls=(lab.url,)) as wallet:
        await wallet.pay("b1", (payee, GLM))
        await wallet.engine.step()
        lab.call("anvil_dropAllTransactions")
        for wei in range(1, 41):
            lab.do(key, lab.network.token, token.transfer_call(payee, wei))
        await steps(wallet, 6)
        (problem,) = [each for each in wallet.engine.problems() if each.batch_id == "b1"]
        assert "moved tokens to the payee" in problem.detail
        assert "and 35 more" in problem.detail
        assert len(problem.detail) < 2000
        assert wallet.told(TransferFailed) == []


@trio_test
async def test_problems_have_a_number(lab: Lab, tmp_path: Path) -> None:
    async def objection(batch_id: str, payees: Payees) -> str:
        return "damaged"

    key = lab.rich("many problems")
    async with payer(lab, key, tmp_path / "chain.db", rpc_urls=(lab.url,), vouch=objection) as wallet:
        for number in range(MAX_PROBLEMS + 3):
            await wallet.pay(f"b{number}", (address_of("many problems payee"), GLM))
        await wallet.engine.step()
        problems = wallet.engine.problems()
        assert len(problems) == MAX_PROBLEMS + 1
        assert problems[-1].detail.startswith("3 more")


@trio_test
async def test_a_payment_that_waits_says_the_same_once_and_its_trace_keeps_how_it_began(lab: Lab, tmp_path: Path) -> None:
    key, payee = lab.rich("long wait"), address_of("long wait payee")
    wire = Blind(lab.url, key)
    async with payer(lab, key, tmp_path / "chain.db", transport=wire, rpc_urls=urls(2)) as wallet:
        await wire.set(HOSTS[1], "stale-counts")
        await wallet.pay("b1", (payee, GLM))
        await wallet.engine.step()
        await wire.set(HOSTS[0], "blank")
        wire.faults[HOSTS[1]] = "counts-and-no-receipts"
        await steps(wallet, 20)
        assert len([event for event in wallet.told(TransferDelayed) if "payment decide" in event.reason]) == 1
        (tx,) = wallet.engine.store.open()
        for number in range(MAX_SEEN + 1):
            wallet.engine.store.note(tx.id, HOSTS[0], f"request {number} failed", 0.0)
        seen = wallet.engine.store.seen(tx.id)
        assert len([each for each in seen if each.teller == HOSTS[0]]) == MAX_SEEN
        assert seen[0].text.startswith("signed")


class Counting(Blind):
    """Counts who is asked for the first block."""

    first_blocks: list[str]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        call = json.loads(request.content)
        if (call["method"], call["params"][:1]) == ("eth_getBlockByNumber", ["0x0"]):
            self.first_blocks.append(request.url.host)
        return await super().handle_async_request(request)


@trio_test
async def test_a_silent_rpc_is_named_and_the_others_are_not_asked_again_which_chain_they_serve(lab: Lab, tmp_path: Path) -> None:
    key, payees = lab.rich("silent"), [address_of(f"silent payee {i}") for i in range(3)]
    wire = Counting(lab.url, key)
    wire.first_blocks = []
    await wire.set(HOSTS[1], "down")
    async with payer(lab, key, tmp_path / "chain.db", transport=wire, rpc_urls=urls(2)) as wallet:
        for number, payee in enumerate(payees):
            await wallet.pay(f"b{number}", (payee, GLM))
            await wallet.until(TransferConfirmed, number=number + 1)
        assert wire.first_blocks.count(HOSTS[0]) == 1
        (problem,) = wallet.engine.problems()
        assert "rpc-b has not answered since this node started" in problem.detail
        await wire.set(HOSTS[1], "")
        wallet.engine.rpc.pool.endpoints[1].rests_until = 0
        await wallet.pay("b4", (payees[0], GLM))
        await wallet.until(TransferConfirmed, number=4)
        assert wallet.problems == []
        assert HOSTS[1] in wire.first_blocks


class Mute(Blind):
    """Talks nonsense about one transaction."""

    nonsense = ""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        call = json.loads(request.content)
        if call["method"].startswith("eth_getTransaction") and call["params"][0] == self.nonsense:
            return httpx.Response(200, json={"jsonrpc": "2.0", "id": call["id"], "result": "\x00"})
        return await super().handle_async_request(request)


@trio_test
async def test_what_the_rpcs_do_not_say_of_one_payment_holds_up_no_other(lab: Lab, tmp_path: Path) -> None:
    key, payees = lab.rich("mute"), [address_of(f"mute payee {i}") for i in range(3)]
    wire = Mute(lab.url, key)
    async with payer(lab, key, tmp_path / "chain.db", transport=wire, rpc_urls=urls(1)) as wallet:
        for number in range(2):
            await wallet.pay(f"b{number}", (payees[number], GLM))
        await wallet.engine.step()
        wire.nonsense, later = (event.tx_hash for event in wallet.told(TransferSent))
        lab.call("anvil_dropAllTransactions")
        await wallet.pay("b2", (payees[2], GLM))
        await wallet.engine.step()
        assert lab.call("eth_getTransactionByHash", later), "the second is sent again"
        assert len(wallet.told(TransferSent)) == 3, "and the third is signed"
        assert [problem.batch_id for problem in wallet.engine.problems()] == ["b0"]
        wire.nonsense = ""
        await wallet.until(TransferConfirmed, number=3)
        assert wallet.problems == []
    assert [lab.tokens(payee) for payee in payees] == [GLM] * 3


@trio_test
async def test_a_payment_that_failed_is_made_anew_only_when_its_block_is_deep(lab: Lab, tmp_path: Path) -> None:
    key, payee = lab.rich("deep"), address_of("deep payee")
    async with payer(lab, key, tmp_path / "chain.db", rpc_urls=(lab.url,), depth=2, repeat_depth=12) as wallet:
        await wallet.pay("b1", (payee, GLM))
        await wallet.engine.step()
        lab.call("anvil_dropAllTransactions")
        lab.do(key, address_of("elsewhere"), value=1, gas=21_000)
        await steps(wallet, 8)
        assert wallet.told(TransferFailed) == []
        assert "paid anew when that is 12 blocks deep" in wallet.told(TransferDelayed)[-1].reason
        assert wallet.problems == []
        await steps(wallet, 8)
        assert [event.batch_id for event in wallet.told(TransferFailed)] == ["b1"]


def hold_restored(db: Path, key: Key) -> None:
    """Make the file of an account that was restored, and knows of one transaction."""
    Store(db, "any").close()
    with sqlite3.connect(db) as file:
        file.execute("insert into hold values ('*', 'this node was restored')")
        row = "(account, nonce, kind, recipient, data, gas, total_wei, state) values (?, 0, 'mint', '', x'', 1, '0', 'confirmed')"
        file.execute(f"insert into tx{row}", (f"1337/{key.address}",))


@trio_test
async def test_a_restored_account_waits_until_every_rpc_says_that_it_has_sent_nothing(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One RPC's counts are stale, and the other, which knows of the payment that the backup does not, is silent for a while."""
    key, payee = lab.rich("restored"), address_of("restored payee")
    monkeypatch.setattr(pool, "BACKOFF_S", (0.001, 0.005))
    wire, db = Blind(lab.url, key), tmp_path / "chain.db"
    hold_restored(db, key)
    await wire.set(HOSTS[0], "stale-counts")
    lab.do(key, lab.network.token, token.transfer_call(payee, GLM))
    await wire.set(HOSTS[1], "down")
    async with payer(lab, key, db, transport=wire, rpc_urls=urls(2)) as wallet:
        await wallet.pay("b1", (payee, GLM))
        await steps(wallet, 8)
        assert wallet.told(TransferSent) == []
        assert f"of every RPC: {HOSTS[1]} does not answer" in str(wallet.engine.problems())
        await wire.set(HOSTS[1], "")
        while "1 transactions have left its account" not in str(wallet.engine.problems()):  # it rests for a moment
            await steps(wallet, 1)
        assert wallet.told(TransferSent) == []
    assert lab.tokens(payee) == GLM


@trio_test
async def test_a_restored_account_is_not_told_free_by_an_rpc_that_shows_the_past(lab: Lab, tmp_path: Path) -> None:
    """The only RPC stands still: it does not know of the payment that the backup does not know either, and comes back later."""
    key, payee = lab.rich("restored, one RPC"), address_of("restored payee, one RPC")
    wire, db = Blind(lab.url, key), tmp_path / "chain.db"
    hold_restored(db, key)
    await wire.set(HOSTS[0], "stale-head")
    lab.do(key, lab.network.token, token.transfer_call(payee, GLM))
    now = int(lab.call("eth_getBlockByNumber", "latest", False)["timestamp"], 16) + 1
    async with payer(lab, key, db, transport=wire, rpc_urls=urls(1), now=now, simulated_by=None) as wallet:
        await wallet.pay("another", (address_of("not paid yet"), GLM))
        await steps(wallet, 8)
        assert "has shown no block since this node started" in str(wallet.engine.problems())
        await wallet.pay("b1", (payee, GLM))
        await wire.set(HOSTS[0], "")
        await steps(wallet, 8)
        assert "1 transactions have left its account" in str(wallet.engine.problems())
        assert wallet.told(TransferSent) == []
    assert lab.tokens(payee) == GLM
