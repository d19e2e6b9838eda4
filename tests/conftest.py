"""Shared fixtures."""

from __future__ import annotations

import os
import sys

import pytest


@pytest.fixture(autouse=True)
def _recursion_limit() -> None:
    """Python's own limit in every test: py-evm and py_ecc raise it when they are imported, and a node must not."""
    sys.setrecursionlimit(1000)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs root where we are not root, and say so."""
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root (namespaces, setuid)"))
