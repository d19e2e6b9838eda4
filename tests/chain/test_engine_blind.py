"""Histories in which an RPC does not know, or does not say, what became of a payment. What the payee holds on the true
chain is the judge: never more than was owed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from blind import HOSTS, Blind
from chain_support import GLM, GWEI, Lab, Payer, address_of, anvil, devchain, find_anvil, payer
from support import trio_test

from golem.chain.store import TransferBatch
from protocol.wallet import TransferConfirmed, TransferFailed


@pytest.fixture(scope="module", params=["devchain", "anvil"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if request.param == "devchain":
        with devchain(tmp_path_factory.mktemp("chain")) as url:
            yield Lab(url, "devchain")
    else:
        path = find_anvil()
        if path is None:
            pytest.skip("no anvil (Debian: apt-get install npm)")
        with anvil(path) as url:
            yield Lab(url, "anvil")


@pytest.fixture(autouse=True)
def _calm(lab: Lab) -> None:
    lab.call("anvil_dropAllTransactions")
    lab.base_fee(GWEI)


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
