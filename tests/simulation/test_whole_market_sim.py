"""The real machines in a world of faults: they converge, and money moves exactly once.

A failing seed is printed; SIM_SEED=N (or `pytest tests/simulation --seed N`) replays it exactly. MARKET_SEEDS=N runs
more of them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
import sim_market
import sim_market_checks as checks
from msgspec.structs import replace
from sim_market import PORT_ERRORS, MarketWorld, simulate_market
from sim_seeds import share
from test_simulation import chosen_seed, first_cause

from actors.activity import moves
from actors.activity.machine import Activity
from actors.ledger import documents as _ledger_documents
from actors.ledger import payer as _ledger_payer
from actors.ledger import payments as _ledger_payments
from actors.ledger.machine import Ledger
from actors.negotiation import agreements
from actors.negotiation.machine import Negotiation
from actors.wallet import machine as wallet
from actors.wallet.machine import Wallet
from actors.wallet.rows import PayBatchState
from protocol.activity import DestroyExpired
from protocol.ledger import VerifyAgain
from protocol.negotiation import AgreementClosed, AgreementTerminated
from protocol.wallet import TransferConfirmed, TransferFailed

SEEDS = int(os.environ.get("MARKET_SEEDS", "80"))
CHUNK = max(20, SEEDS // 4)


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_the_market_converges_and_pays_exactly_once(first: int, pytestconfig: pytest.Config) -> None:
    seed = chosen_seed(pytestconfig)
    seeds = share(range(first, min(first + CHUNK, SEEDS))) if seed is None else [seed] * (first == 0)
    for number in seeds:
        try:
            simulate_market(number).close()
        except BaseException as error:
            pytest.fail(f"seed {number} fails (replay: SIM_SEED={number} pytest {__file__}): {first_cause(error)}")


def test_the_same_seed_gives_the_same_market() -> None:
    histories = [[simulate_market(seed).history.hexdigest() for seed in (1, 2, 3)] for _ in range(2)]
    assert histories[0] == histories[1]
    assert len(set(histories[0])) == 3


def test_everything_happens() -> None:
    """The seeds reach all ends of agreements and documents, crashes, failed transfers and lost exe-units."""
    worlds = [simulate_market(seed) for seed in range(12)]
    states = {row.state for world in worlds for row in checks.agreements(world.requestor.host).values()}
    statuses = {row.status for world in worlds for row in checks.documents(world.requestor.host, "payer").values()}
    assert states == {"Terminated", "Cancelled", "Rejected", "Expired"}
    assert statuses >= {"SETTLED", "REJECTED", "CANCELLED", "RECEIVED"}
    assert sum(world.crashes for world in worlds) > 50
    assert any(unit.starts > 1 for world in worlds for unit in world.units.values())
    assert sum(len(world.transfers) for world in worlds) > 20
    reached = sum((world.reached for world in worlds), Counter())
    assert reached["damaged row met"] > 5, reached
    assert reached["clock step"] > 5, reached
    assert reached["audit of an account in use"] > 500, reached
    assert sum(reached[f"port raises {type(one).__name__}"] for one in PORT_ERRORS) > 5, reached
    for world in worlds:
        world.close()


# -- mutants: a fault in a machine that no seed finds would be a hole in this world
def caught(seed: int) -> str:
    """Return what a seed that fails says; "" where it does not."""
    world: MarketWorld | None = None
    try:
        world = simulate_market(seed)
    except BaseException as error:
        return first_cause(error)
    finally:
        if world is not None:
            world.close()
    return ""


def ignore(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""


def owe_all(owe: Callable[..., Any]) -> Callable[..., Any]:
    def mutant(draft: Any, row: Any) -> Any:
        owe(draft, row)
        return Decimal(row.amount)

    return mutant


def confirmed_twice(handler: Any) -> Any:
    """A wallet that hears of an end twice and takes it for two."""

    def mutant(draft: Any, fact: Any) -> None:
        batch = draft.get(f"batch/{fact.batch_id}")
        if batch.state == PayBatchState.CONFIRMED:
            for payee in batch.payees:
                for order_id in payee.order_ids:
                    wallet._queue(draft, replace(draft.get(f"order/{order_id}"), state="QUEUED"))
            wallet._schedule(draft, batch.platform)
            return
        handler(draft, fact)

    return mutant


MUTANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the provider ignores the requestor's decision": lambda m: m.setitem(Negotiation.table.handlers, AgreementClosed, ignore),
    "the requestor does not insist on its decision": lambda m: m.setattr(agreements, "_insist", ignore),
    "an approved agreement never hears of its end": lambda m: m.setitem(Negotiation.table.handlers, AgreementTerminated, ignore),
    "batches stay open when the activity ends": lambda m: m.setattr(moves, "wind_up", ignore),
    "the silent provider is waited for": lambda m: m.setitem(Activity.table.handlers, DestroyExpired, ignore),
    "the chain is not asked again": lambda m: m.setitem(Ledger.table.handlers, VerifyAgain, ignore),
    "a refused payment is not offered again": lambda m: m.setattr(_ledger_payments, "_offer_later", ignore),
    "documents are owed in full": lambda m: m.setattr(_ledger_payer, "owe", owe_all(_ledger_documents.owe)),
    "allocations are not charged": lambda m: m.setattr(_ledger_payer, "charge", ignore),
    "acceptances are not told": lambda m: m.setattr(_ledger_payer, "DocumentAccepted", _ledger_payer.DocumentReceived),
    "a batch that is confirmed again is paid again": lambda m: m.setitem(
        Wallet.table.handlers, TransferConfirmed, confirmed_twice(Wallet.table.handlers[TransferConfirmed])
    ),
    "failed batches are forgotten": lambda m: m.setitem(Wallet.table.handlers, TransferFailed, ignore),
    "a command runs again in a new exe-unit": lambda m: m.setattr(
        sim_market, "Runtime", lambda unit, lost: _Runtime(unit, lost=False)
    ),
}
_Runtime = sim_market.Runtime
MUTANTS_CONVERGE_S = 3 * 3600.0  # what does not converge costs time; honest seeds with rare faults may take longer


@pytest.mark.parametrize("name", share(list(MUTANTS)))
def test_a_fault_in_a_machine_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim_market, "CONVERGE_S", MUTANTS_CONVERGE_S)
    with pytest.MonkeyPatch.context() as mutant:
        MUTANTS[name](mutant)
        seed = next((seed for seed in range(40) if caught(seed)), None)
    assert seed is not None, f"nobody found out that {name}"
    assert not caught(seed), f"seed {seed} fails without the mutant, too"
