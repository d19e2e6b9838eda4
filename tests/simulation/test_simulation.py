"""The kernel in a world of faults: 500 seeds, each with a workload and a fault mix of its own.

A failing seed is printed; `pytest tests/simulation --seed N` (or SIM_SEED=N) replays it exactly.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from sim_seeds import share
from sim_world import World, simulate

SEEDS, CHUNK = 500, 50
LOOKED_AT = 60  # seeds whose worlds are looked at as a whole
SEEN: dict[int, World] = {}  # those of them that ran already


def chosen_seed(config: pytest.Config) -> int | None:
    """Return the one seed to replay, if one is asked for."""
    seed = config.getoption("--seed", default=None)
    return int(os.environ["SIM_SEED"]) if seed is None and "SIM_SEED" in os.environ else seed


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_nothing_is_lost_doubled_or_disordered(first: int, pytestconfig: pytest.Config) -> None:
    seed = chosen_seed(pytestconfig)
    seeds = share(range(first, first + CHUNK)) if seed is None else [seed] * (first == 0)
    for number in seeds:
        try:
            world = simulate(number)
            if number < LOOKED_AT:
                SEEN[number] = world
        except BaseException as error:
            pytest.fail(f"seed {number} fails (replay: pytest tests/simulation --seed {number}): {first_cause(error)}")


def first_cause(error: BaseException) -> str:
    """Return what the first leaf of a group of exceptions says."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return repr(error)[:2000]


def test_shares_together_are_all_seeds() -> None:
    assert list(share(range(5), "1/1")) == list(range(5))
    assert sorted([*share(range(5), "1/2"), *share(range(5), "2/2")]) == list(range(5))
    assert list(share(range(5), "2/2")) == [1, 3]


def test_the_same_seed_gives_the_same_history() -> None:
    histories = [[simulate(seed).history.hexdigest() for seed in range(1, 9)] for _ in range(2)]
    assert histories[0] == histories[1]
    assert len(set(histories[0])) == 8  # and another seed another one


def test_another_process_with_other_hashes_gives_the_same_history() -> None:
    here = Path(__file__).parent
    program = "import sim_world; print(*(sim_world.simulate(s).history.hexdigest() for s in (3, 7)))"
    path = os.pathsep.join(map(str, (here, here.parent, here.parents[1])))
    found = [
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONPATH": path, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert found[0] == found[1] == [simulate(seed).history.hexdigest().encode() for seed in (3, 7)]


def test_the_faults_happen() -> None:
    worlds = [SEEN.pop(seed, None) or simulate(seed) for seed in range(LOOKED_AT)]
    assert sum(world.crashes for world in worlds) > 50
    reached = sum((world.reached for world in worlds), Counter())
    often = (
        "whim", "failed alarm", "told", "disk full", "damaged row", "clock step", "ack: all", "ack: gap", "ack: busy",
        "disk outlasted", "Lower", "tiny bounds", "copied disk", "big message", "landed in a step",
    )  # fmt: skip
    assert min(reached[state] for state in often) > 5, reached
    assert min(reached[state] for state in ("read error", "Relink", "ack: retired epoch", "ack: fork", "runs twice")) > 0, reached
    losing = [world.hosts["C"] for world in worlds if world.faults.lose_disk]
    assert sum(host.restored for host in losing) > 20
    assert sum(host.disks - 1 - host.restored for host in losing) > 5
