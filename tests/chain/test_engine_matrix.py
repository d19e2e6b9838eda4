"""The matrix of blind RPCs (`matrix.py`), and mutants of the engine that it has to catch.

MATRIX_SEEDS runs more seeds of all of it. A seed that fails is named with its case and replays.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from chain_support import GWEI, Lab, anvil, devchain, find_anvil
from matrix import Case, History, cases
from support import trio_test

from golem.chain import pool

SEEDS = int(os.environ.get("MATRIX_SEEDS", "0"))
SAMPLE = 30  # cases of each pool size in an ordinary run


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


def run(scene: Scene, tmp_path: Path, chosen: list[Case]) -> None:
    @trio_test
    async def body() -> None:
        for case in chosen:
            scene.lab.call("anvil_dropAllTransactions")
            scene.lab.base_fee(GWEI)
            await History(scene.lab, scene.other_url, case, tmp_path).run()

    body()


def sample(size: int, seed: int) -> list[Case]:
    """Every case in some run: each seed has others of them."""
    found = cases((size,), seed)
    return found if SEEDS else random.Random(seed).sample(found, min(SAMPLE, len(found)))


@pytest.mark.parametrize("seed", range(max(SEEDS, 1)))
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.timeout(3600)
def test_whatever_the_rpcs_hide_each_debt_is_paid_once(scene: Scene, tmp_path: Path, size: int, seed: int) -> None:
    run(scene, tmp_path, sample(size, seed))
