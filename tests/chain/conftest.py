"""What the tests of engines share: each chain once a file, without what an earlier test left, and a file for the engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chain_support import GWEI, Lab, anvil, devchain, find_anvil


@pytest.fixture(scope="module", params=["devchain", "anvil"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The dev chain, then anvil where it is installed; files for the dev chain alone have a fixture of their own."""
    if request.param == "devchain":
        with devchain(tmp_path_factory.mktemp("chain")) as url:
            yield Lab(url, "devchain")
    else:
        path = find_anvil()
        if path is None:
            pytest.skip("no anvil (Debian: apt-get install npm)")
        with anvil(path) as url:
            yield Lab(url, "anvil")


@pytest.fixture
def calm(lab: Lab) -> None:
    """No test inherits the fees or the mempool of another."""
    lab.call("anvil_dropAllTransactions")
    lab.base_fee(GWEI)


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "chain.db"
