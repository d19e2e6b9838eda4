"""In which order the suite runs: the longest files first, so that two workers end at the same time; or shuffled by a seed."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

LONGEST = (  # an order that is out of date costs time and nothing else; `make test ARGS=--durations=50` shows what is long
    "simulation/test_whole_market_sim.py",
    "integration/test_whole_market.py",
    "simulation/test_simulation.py",
    "integration/test_gone_provider.py",
    "provider/test_provider_runtimes.py",
    "integration/test_docker_demo.py",
    "integration/test_golem_js.py",
    "provider/test_provider_agent.py",
    "cli/test_cli.py",
    "exeunit/test_hostile_modules.py",
    "integration/test_lan.py",
    "integration/test_transfer_breaks.py",
    "integration/test_two_chains.py",
    "exeunit/test_vm_runtime.py",
    "kernel/test_forgetting.py",
    "chain/test_kill.py",
    "simulation/test_kernel_mutants.py",
    "integration/test_hand_in_vm.py",
    "cli/test_cli_image.py",
    "cli/test_cli_activity.py",
    "integration/test_vm_files.py",
    "exeunit/test_hostile_guests.py",
    "integration/test_vm_killed.py",
    "rest/test_interaction_rest.py",
    "actors/test_ledger_and_wallet.py",
)


def _files(items: list[pytest.Item]) -> list[list[pytest.Item]]:
    """Return the tests by file, files in the order of their first test."""
    by_file: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        by_file[item.nodeid.partition("::")[0]].append(item)
    return list(by_file.values())


def longest_first(items: list[pytest.Item]) -> None:
    """Put the files that take longest first; all else stays as it is."""
    rank = {f"tests/{name}": number for number, name in enumerate(LONGEST)}
    files = sorted(_files(items), key=lambda file: rank.get(file[0].nodeid.partition("::")[0], len(rank)))
    items[:] = [item for file in files for item in file]


def shuffle(items: list[pytest.Item], seed: str) -> None:
    """Put files in an order that a seed decides, and the tests of each file (they stay together: they share fixtures)."""
    dice = random.Random(seed)
    files = _files(items)
    dice.shuffle(files)
    for file in files:
        dice.shuffle(file)
    items[:] = [item for file in files for item in file]
