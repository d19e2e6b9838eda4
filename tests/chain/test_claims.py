"""The payee's check of a claimed payment: every false claim that we could think of, and the true ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from blind import HOSTS, Blind
from chain_support import GLM, Lab, address_of, anvil, devchain, find_anvil, key_of
from worlds.support import trio_test

from golem.chain import contracts, token
from golem.chain.devchain.genesis import deploy_transactions
from golem.chain.networks import Network
from golem.chain.rpc import Rpc
from golem.chain.verify import NotYet, Rejected, Verified, verify_transfer

INDIRECT_PACKED = bytes.fromhex("04f9153b")


class Scene:
    """One payer, one payee, and one good payment of 1 tGLM between them."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.payer, self.payee = lab.rich("claim payer"), address_of("claim payee")
        self.good = self.pay(GLM)
        lab.mine(2)

    def pay(self, amount_wei: int) -> str:
        call = token.transfer_call(self.payee, amount_wei)
        return str(self.lab.do(self.payer, self.lab.network.token, call)["transactionHash"])

    async def claim(
        self,
        tx_hash: str = "",
        *,
        network: Network | None = None,
        payer: str = "",
        payee: str = "",
        amount: int = GLM,
        claimed: int = 0,
        not_before: float = 0.0,
    ) -> Verified | NotYet | Rejected:
        row = network or self.lab.network
        async with Rpc(row) as rpc:
            return await verify_transfer(
                rpc,
                row,
                tx_hash or self.good,
                payer or self.payer.address,
                payee or self.payee,
                amount,
                claimed,
                not_before,
            )


@pytest.fixture(scope="module", params=["devchain", "anvil"])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    if request.param == "devchain":
        with devchain(tmp_path_factory.mktemp("chain")) as url:
            yield Scene(Lab(url, "devchain"))
    else:
        path = find_anvil()
        if path is None:
            pytest.skip("no anvil (Debian: apt-get install npm)")
        with anvil(path) as url:
            yield Scene(Lab(url, "anvil"))


@trio_test
async def test_the_true_payment_is_verified_once(scene: Scene) -> None:
    assert await scene.claim() == Verified(GLM)
    assert await scene.claim(amount=GLM // 2, claimed=GLM // 2) == Verified(GLM), "two invoices, half each"
    second = await scene.claim(claimed=GLM)
    assert isinstance(second, Rejected)
    assert "settled before" in second.reason


@trio_test
async def test_money_that_moved_before_the_agreement_does_not_pay_it(scene: Scene) -> None:
    receipt = scene.lab.call("eth_getTransactionReceipt", scene.good)
    moved_at = int(scene.lab.call("eth_getBlockByNumber", receipt["blockNumber"], False)["timestamp"], 16)
    assert await scene.claim(not_before=moved_at) == Verified(GLM)
    assert await scene.claim(not_before=moved_at - 0.5) == Verified(GLM)
    old = await scene.claim(not_before=moved_at + 1)
    assert isinstance(old, Rejected)
    assert "older than what it is to pay" in old.reason


@trio_test
async def test_claims_about_the_wrong_thing_are_rejected(scene: Scene) -> None:
    stranger = address_of("stranger")
    assert isinstance(await scene.claim(payee=stranger), Rejected)
    assert isinstance(await scene.claim(payer=stranger), Rejected)
    assert isinstance(await scene.claim(amount=GLM + 1), Rejected)
    assert isinstance(await scene.claim("0x1234"), Rejected)
    assert isinstance(await scene.claim(payer="nobody"), Rejected)
    assert isinstance(await scene.claim(amount=0), Rejected)


@trio_test
async def test_an_unknown_transaction_may_still_come(scene: Scene) -> None:
    unknown = await scene.claim("0x" + "12" * 32)
    assert isinstance(unknown, NotYet)
    assert unknown.unknown
    assert "not known" in unknown.reason


@trio_test
async def test_another_chain_cannot_be_asked(scene: Scene) -> None:
    answer = await scene.claim(network=replace(scene.lab.network, chain_id=1))
    assert isinstance(answer, NotYet)
    assert "expected 1" in answer.reason


@trio_test
async def test_depth_is_waited_for_and_a_reorganisation_takes_it_back(scene: Scene) -> None:
    pending = scene.lab.send(scene.payer, scene.lab.network.token, token.transfer_call(scene.payee, GLM))
    waiting = await scene.claim(pending)
    assert isinstance(waiting, NotYet)
    assert "not in a block" in waiting.reason
    scene.lab.mine()
    assert await scene.claim(pending) == NotYet("0 of 2 confirmations")
    scene.lab.call("anvil_reorg", 1, [])
    assert isinstance(await scene.claim(pending), NotYet)
    scene.lab.call("anvil_dropAllTransactions")
    again = scene.pay(2 * GLM)
    scene.lab.mine(2)
    assert await scene.claim(again) == Verified(2 * GLM)


@trio_test
async def test_a_worthless_token_with_the_same_event_is_rejected(scene: Scene) -> None:
    creation = contracts.load("TestToken").bytecode + _constructor_of_token()
    receipt = scene.lab.do(scene.payer, None, creation, gas=3_000_000)
    fake = receipt["contractAddress"].lower()
    scene.lab.do(scene.payer, fake, token.CREATE)
    paid = scene.lab.do(scene.payer, fake, token.transfer_call(scene.payee, GLM))
    scene.lab.mine(2)
    assert scene.lab.tokens(scene.payee, fake) == GLM
    answer = await scene.claim(paid["transactionHash"])
    assert isinstance(answer, Rejected)
    assert "moves no tGLM" in answer.reason


def _constructor_of_token() -> bytes:
    """The argument words, as the genesis deployment carries them at the end of its creation code."""
    code = contracts.load("TestToken").bytecode
    raw = deploy_transactions()[0].raw
    start = raw.index(code) + len(code)
    return raw[start : start + 7 * 32]


@trio_test
async def test_a_reverted_transaction_is_rejected(scene: Scene) -> None:
    receipt = scene.lab.do(scene.payer, scene.lab.network.token, token.transfer_call(scene.payee, 10**9 * GLM))
    assert receipt["status"] == "0x0"
    scene.lab.mine(2)
    answer = await scene.claim(receipt["transactionHash"])
    assert isinstance(answer, Rejected)
    assert "reverted" in answer.reason


@trio_test
async def test_all_logs_of_a_batch_are_summed(scene: Scene) -> None:
    multi = scene.lab.network.multi_transfer
    assert multi is not None
    scene.lab.do(scene.payer, scene.lab.network.token, token.approve_call(multi))
    others = [(address_of(f"batch {i}"), GLM) for i in range(3)]
    call = token.packed_call((others[0], (scene.payee, GLM), others[1], (scene.payee, 2 * GLM), others[2]))
    tx_hash = scene.lab.do(scene.payer, multi, call, gas=900_000)["transactionHash"]
    scene.lab.mine(2)
    assert await scene.claim(tx_hash, amount=3 * GLM) == Verified(3 * GLM)
    assert isinstance(await scene.claim(tx_hash, amount=3 * GLM, claimed=1), Rejected)


@trio_test
async def test_the_indirect_call_counts_through_the_known_contract_only(scene: Scene) -> None:
    multi = scene.lab.network.multi_transfer
    assert multi is not None
    scene.lab.do(scene.payer, scene.lab.network.token, token.approve_call(multi))
    packed = token.packed_call(((scene.payee, GLM), (address_of("indirect"), GLM)))[4 + 32 :]
    call = INDIRECT_PACKED + (64).to_bytes(32, "big") + (2 * GLM).to_bytes(32, "big") + packed
    tx_hash = scene.lab.do(scene.payer, multi, call, gas=900_000)["transactionHash"]
    scene.lab.mine(2)
    assert await scene.claim(tx_hash) == Verified(GLM)
    assert isinstance(await scene.claim(tx_hash, payer=key_of("free rider").address), Rejected)
    unknown = replace(scene.lab.network, multi_transfer=None)
    assert isinstance(await scene.claim(tx_hash, network=unknown), Rejected)


@trio_test
async def test_a_dead_node_means_not_yet(scene: Scene) -> None:
    dead = replace(scene.lab.network, rpc_urls=("http://127.0.0.1:1",))
    assert isinstance(await scene.claim(network=dead), NotYet)


@trio_test
@pytest.mark.parametrize("fault", ["null-both", "down", "other-id", "stale-head", "empty-bodies"])
async def test_what_one_rpc_does_not_know_another_one_shows(scene: Scene, fault: str) -> None:
    row = replace(scene.lab.network, rpc_urls=tuple(f"http://{host}/" for host in HOSTS[:2]))
    wire = Blind(scene.lab.url, scene.payer)
    await wire.set(HOSTS[0], fault)
    tx_hash = scene.pay(GLM)
    scene.lab.mine(3)

    async def claim() -> Verified | NotYet | Rejected:
        async with Rpc(row, transport=wire) as rpc:
            return await verify_transfer(rpc, row, tx_hash, scene.payer.address, scene.payee, GLM)

    assert await claim() == Verified(GLM)
    await wire.set(HOSTS[1], "null-both")
    found = await claim()
    if fault == "empty-bodies":
        assert found == Verified(GLM)
    else:
        assert isinstance(found, NotYet)
        assert found.unknown is (fault in ("null-both", "stale-head")), "who is silent has not said that it is unknown"
