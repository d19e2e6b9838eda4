"""Shared fixtures."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from order import longest_first, shuffle
from skips import what_to_install
from worlds.engine import engine_for_tests

from golem.exeunit.storage import unmount_all
from golem.lab.engine import LocalEngine


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


@pytest.fixture(scope="session", autouse=True)
def _no_mounts_stay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Exe-units that tests kill leave their storage mounted, since no provider sweeps after them."""
    yield
    if os.geteuid() == 0:
        unmount_all(tmp_path_factory.getbasetemp().resolve())


# -- the order of tests, and who runs them
def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", metavar="SEED", help="run files, and the tests of each, in an order by a seed; `any` takes one")


def pytest_configure(config: pytest.Config) -> None:
    """Choose the seed of the order; a worker takes that of the process that started it."""
    if hasattr(config, "workerinput"):
        config.option.shuffle = config.workerinput["shuffle"]
    elif config.getoption("shuffle") == "any":
        config.option.shuffle = str(random.SystemRandom().randrange(1 << 32))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker the seed."""
    node.workerinput["shuffle"] = node.config.getoption("shuffle")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker for each processor that we may use, within reason: each starts nodes and Engines of its own."""
    return min(4, len(os.sched_getaffinity(0)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the tests; skip what needs root where we are not root, and say so."""
    if seed := config.getoption("shuffle"):
        shuffle(items, seed)
    else:
        longest_first(items)
    for item in items:
        if os.geteuid() != 0 and item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root (namespaces, setuid)"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> Iterator[None]:
    """Say, after the reasons of skips, what to install to run them, and how to have the same order again."""
    yield
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])]
    if line := what_to_install(reasons):
        terminalreporter.write_line(line)
    if seed := config.getoption("shuffle"):
        terminalreporter.write_line(f"the order was that of --shuffle={seed}")
