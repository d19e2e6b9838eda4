"""The order of the suite, and that all workers have the same."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from order import LONGEST, longest_first, shuffle

ROOT = Path(__file__).resolve().parents[2]


def items() -> list[Any]:
    names = ("a.py", LONGEST[1], "b.py", LONGEST[0])
    return [SimpleNamespace(nodeid=f"tests/{name}::test_{number}") for name in names for number in range(9)]


def files(found: list[Any]) -> list[str]:
    return [name for name, _ in groupby(item.nodeid.partition("::")[0] for item in found)]


def test_the_longest_files_come_first_and_the_others_stay() -> None:
    found = items()
    longest_first(found)
    assert files(found) == [f"tests/{name}" for name in (LONGEST[0], LONGEST[1], "a.py", "b.py")]
    assert all((ROOT / "tests" / name).exists() for name in LONGEST)


def test_a_seed_decides_and_files_stay_together() -> None:
    one, same, other = items(), items(), items()
    shuffle(one, "1")
    shuffle(same, "1")
    shuffle(other, "2")
    assert one == same != other
    assert len(files(one)) == 4
    assert sorted(item.nodeid for item in one) == sorted(item.nodeid for item in items())


@pytest.mark.integration
def test_workers_have_one_seed_and_it_is_told() -> None:
    pytest.importorskip("xdist")
    options = ["-n", "2", "-p", "no:cacheprovider", "--shuffle=any", "-k", "not workers"]
    line = [sys.executable, "-m", "pytest", *options, "tests/house/test_order.py"]
    ran = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
    assert re.search(r"^the order was that of --shuffle=\d+$", ran.stdout, re.M)
