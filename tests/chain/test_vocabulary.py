"""The chain's words: what the real one, the simulated ones and their listeners know is one set."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from actors.ledger.machine import Ledger
from actors.wallet.machine import Wallet

ROOT = Path(__file__).resolve().parents[2]
REAL = ("golem/chain/engine.py", "golem/chain/news.py", "golem/chain/sender.py", "golem/chain/queue.py", "golem/chain/port.py")
SIMULATED = ("tests/worlds/money.py", "tests/simulation/sim_market.py")


def heard() -> set[str]:
    """The messages that wallet and ledger take from a chain."""
    return {kind.__name__ for machine in (Wallet, Ledger) for kind, on in machine.table.entries.items() if on.source == "chain"}


def said(*files: str) -> set[str]:
    """The messages of those above that the code of these files makes."""
    calls = (node for file in files for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.Call))
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)} & heard()


def test_the_real_chain_says_all_that_is_listened_to() -> None:
    assert said(*REAL) == heard()
    assert {"TransferSent", "TransferMined", "TransferConfirmed", "TransferFailed", "TransferDelayed"} <= heard()


@pytest.mark.parametrize("file", SIMULATED)
def test_a_simulated_chain_says_exactly_what_the_real_one_says(file: str) -> None:
    assert said(file) == said(*REAL)
