"""The matrix of blind RPCs (`matrix.py`), and mutants of the engine that it has to catch.

MATRIX_SEEDS runs more seeds of all of it. A seed that fails is named with its case and replays.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from chain_support import GWEI, Lab, anvil, devchain, find_anvil
from matrix import Case, History, PaidTwice, Torn, cases
from worlds.support import trio_test

from golem.chain import engine, pool
from golem.chain.bodies import BodyTx
from golem.chain.engine import Engine
from golem.chain.evidence import Evidence, Payment, Use, View, Witness
from golem.chain.rows import TxRow

SEEDS = int(os.environ.get("MATRIX_SEEDS", "0"))
SAMPLES = {"devchain": 12, "anvil": 6}  # cases of each pool size in an ordinary run
LOSSES = {"devchain": 3, "anvil": 8}  # and those in which blocks are lost as well


class Scene(NamedTuple):
    """The true chain, and one of the same id that is another."""

    lab: Lab
    other_url: str


@pytest.fixture(scope="module", params=["devchain", "anvil"])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with devchain(tmp_path_factory.mktemp("other")) as other_url:
        if request.param == "devchain":
            with devchain(tmp_path_factory.mktemp("chain")) as url:
                yield Scene(Lab(url, "devchain"), other_url)
        else:
            path = find_anvil()
            if path is None:
                pytest.skip("no anvil (Debian: apt-get install npm)")
            with anvil(path) as url:
                yield Scene(Lab(url, "anvil"), other_url)


@pytest.fixture(autouse=True)
def _short_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """An RPC that failed is asked again soon: a step here is a poll of seconds there."""
    monkeypatch.setattr(pool, "BACKOFF_S", (0.001, 0.005))
    monkeypatch.setattr(engine, "WATCH_S", 0.0)  # and a look of each minute comes with each step


def run(scene: Scene, tmp_path: Path, chosen: list[Case], kind: type[History] = History) -> None:
    """All of them, whatever one of them says; then what they said."""
    failures: list[AssertionError] = []

    @trio_test
    async def body() -> None:
        for case in chosen:
            scene.lab.call("anvil_dropAllTransactions")
            scene.lab.base_fee(GWEI)
            try:
                await kind(scene.lab, scene.other_url, case, tmp_path).run()
            except AssertionError as failure:
                if not SEEDS:
                    raise
                print(f"FAILED {type(failure).__name__}: {failure}", flush=True)
                failures.append(failure)

    body()
    assert not failures, f"{len(failures)} of {len(chosen)} histories failed, the first: {failures[0]}"


def sample(scene: Scene, size: int, seed: int, samples: dict[str, int] = SAMPLES) -> list[Case]:
    """A few of the cases; all of them where more seeds were asked for."""
    found = cases(size, seed)
    return found if SEEDS else random.Random(seed).sample(found, samples[scene.lab.kind])


@pytest.mark.parametrize("seed", range(max(SEEDS, 1)))
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.timeout(3600)
def test_whatever_the_rpcs_hide_each_debt_is_paid_once(scene: Scene, tmp_path: Path, size: int, seed: int) -> None:
    run(scene, tmp_path, sample(scene, size, seed))


@pytest.mark.parametrize("seed", range(max(SEEDS, 1)))
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.timeout(3600)
def test_whatever_blocks_are_lost_each_debt_is_paid_once(scene: Scene, tmp_path: Path, size: int, seed: int) -> None:
    run(scene, tmp_path, sample(scene, size, seed, LOSSES), Torn)


FOUND = [  # cases that failed once
    Case(2, ((1, "other-chain"),), 268979133),
    Case(2, ((1, "flapping"),), 106046331),
]


@pytest.mark.parametrize("case", FOUND, ids=str)
def test_a_case_that_failed_once(scene: Scene, tmp_path: Path, case: Case) -> None:
    run(scene, tmp_path, [case])


# -- mutants: each forgets one part of the rule


async def _old_rule(engine: Engine, tx: TxRow, views: list[View]) -> None:
    """A nonce that is used and a receipt that is missing, three looks in a row: the payment is lost."""
    await engine._moneyless_taken(tx, views)


def old_rule(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Engine, "_nonce_taken", _old_rule)
    receipts = Evidence.receipts
    patch.setattr(Evidence, "receipts", lambda self, views, hashes: receipts(self, views[:1], hashes))


def no_block_evidence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Engine, "_nonce_taken", _old_rule)  # but the receipts of all RPCs count


def one_endpoint(patch: pytest.MonkeyPatch) -> None:
    witnesses = Evidence.witnesses
    patch.setattr(Evidence, "witnesses", lambda self: witnesses(self)[:1])


def no_logs(patch: pytest.MonkeyPatch) -> None:
    async def transfers(*_: Any) -> dict[str, int]:
        return {}

    patch.setattr(Witness, "transfers", transfers)


def silence_agrees(patch: pytest.MonkeyPatch) -> None:
    each = Evidence.each

    async def heard(self: Evidence, witnesses: Any, question: Any) -> Any:
        return (await each(self, witnesses, question))[0], []

    patch.setattr(Evidence, "each", heard)


def unsigned_bodies(patch: pytest.MonkeyPatch) -> None:
    """What took the nonce need not be shown: an empty block is believed as well."""
    use = Evidence._use

    async def believed(self: Evidence, view: View, payment: Payment) -> Any:
        found = await use(self, view, payment)
        if isinstance(found, Use) or view.count <= payment.nonce:
            return found
        block = max(0, view.head.number - self._network.depth)
        other = BodyTx("0x" + "0" * 64, self._address, payment.nonce, "", b"", 0, True)
        return Use(view, block, await view.witness.block_hash(block) or "", other)

    patch.setattr(Evidence, "_use", believed)
    no_logs(patch)


#: mutant -> size of the pool, and the faults, all of one set, that the RPCs must have in the cases that hunt it
HUNTS: dict[Callable[[pytest.MonkeyPatch], None], tuple[int, tuple[set[str], ...]]] = {
    old_rule: (2, ({"null-both"}, {"null-receipts"})),
    no_block_evidence: (1, ({"null-both"}, {"null-receipts"})),
    one_endpoint: (2, ({"fork"},)),
    no_logs: (1, ({"forged-bodies"},)),
    silence_agrees: (2, ({"fork", "down"},)),
    unsigned_bodies: (1, ({"blank"},)),
}
HUNTERS = 30  # cases at most, until one catches the mutant


@pytest.mark.parametrize("scene", ["devchain"], indirect=True)  # one is enough to see that the matrix can fail
@pytest.mark.parametrize("mutant", HUNTS, ids=lambda mutant: mutant.__name__)
def test_the_matrix_catches_a_mutant(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    size, wanted = HUNTS[mutant]
    mutant(monkeypatch)
    found = ((case, {fault for _, fault in case.blind}) for seed in range(300) for case in cases(size, seed))
    hunting = [case for case, faults in found if any(each <= faults for each in wanted)]
    with pytest.raises(PaidTwice):
        run(scene, tmp_path, hunting[:HUNTERS])
