"""`--seed N` (or SIM_SEED=N) replays one seed of the simulation."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="replay one seed of the kernel's simulation")
