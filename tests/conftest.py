"""Shared fixtures."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import engine_for_tests

from golem.local_engine import LocalEngine


@pytest.fixture(autouse=True)
def _recursion_limit() -> None:
    """Python's own limit in every test: py-evm and py_ecc raise it when they are imported, and a node must not."""
    sys.setrecursionlimit(1000)


@pytest.fixture(scope="session")
def engine() -> Iterator[LocalEngine]:
    """A Docker Engine with remapped user ids, one for the whole session; name containers and images uniquely."""
    with tempfile.TemporaryDirectory(prefix="engine-") as folder, engine_for_tests(Path(folder) / "e", userns=True) as one:
        yield one


@pytest.fixture(scope="session")
def plain_engine() -> Iterator[LocalEngine]:
    """A Docker Engine whose containers' root is the machine's root."""
    with tempfile.TemporaryDirectory(prefix="engine-") as folder, engine_for_tests(Path(folder) / "e", userns=False) as one:
        yield one


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs root where we are not root, and say so."""
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root (namespaces, setuid)"))
