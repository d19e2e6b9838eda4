"""Agreements between nodes one of which went back in time: both end in one state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from test_negotiation import REASON, Pair
from worlds.market_world import PROVIDER_ID, REQUESTOR_ID
from worlds.playbook import Playbook

from protocol.negotiation import CancelAgreement, RejectAgreement, TerminateAgreement
from protocol.types import Done, PeerLost


def restore(pair: Pair, play: Playbook, rows: dict[str, object]) -> None:
    """Put a disk back; both sides hear of it."""
    play.rows.clear()
    play.rows.update(rows)
    pair.r.tell(PeerLost(f"{PROVIDER_ID}/negotiation", 1, 2, here=play is pair.r), f"{REQUESTOR_ID}/negotiation")
    pair.p.tell(PeerLost(f"{REQUESTOR_ID}/negotiation", 1, 2, here=play is pair.p), f"{PROVIDER_ID}/negotiation")
    pair.settle()


def approve(pair: Pair, agreement_id: str) -> None:
    assert pair.approve(agreement_id) == Done()


def terminate_r(pair: Pair, agreement_id: str) -> None:
    approve(pair, agreement_id)
    pair.settle()
    assert pair.r.ask(TerminateAgreement(agreement_id, REASON)) == Done()


def terminate_p(pair: Pair, agreement_id: str) -> None:
    approve(pair, agreement_id)
    pair.settle()
    assert pair.p.ask(TerminateAgreement(agreement_id, REASON)) == Done()


def cancel(pair: Pair, agreement_id: str) -> None:
    assert pair.r.ask(CancelAgreement(agreement_id, REASON)) == Done()


def reject(pair: Pair, agreement_id: str) -> None:
    assert pair.p.ask(RejectAgreement(agreement_id, REASON)) == Done()


@pytest.mark.parametrize("side", ["requestor", "provider"])
@pytest.mark.parametrize("move", [approve, terminate_r, terminate_p, cancel, reject])
def test_a_pending_agreement_that_went_on_since_the_backup(move: Callable[[Pair, str], None], side: str) -> None:
    pair = Pair()
    agreement_id = pair.pending()
    play = pair.r if side == "requestor" else pair.p
    backup = dict(play.rows)
    move(pair, agreement_id)
    pair.settle()
    before = pair.states(agreement_id)
    assert before[0] == before[1]
    restore(pair, play, backup)
    after = pair.states(agreement_id)
    if move is approve:
        assert after == ("Approved", "Approved")
    else:  # over on both sides, though the lost disk alone knew by what name
        assert set(after) <= {"Terminated", "Cancelled", "Rejected"}
    assert not pair.r.violations
    assert not pair.p.violations


def test_an_approved_agreement_that_the_requestor_forgot_altogether_ends() -> None:
    pair = Pair()
    backup = dict(pair.r.rows)
    agreement_id = pair.approved()
    restore(pair, pair.r, backup)
    assert f"agreement/{agreement_id}" not in pair.r.rows
    assert pair.p.rows[f"agreement/{agreement_id}"].state == "Terminated"
    assert not pair.p.violations
    assert not pair.r.violations


def test_nobody_is_told_anything_that_it_does_not_know_already() -> None:
    pair = Pair()
    agreement_id = pair.approved()
    before = {play: dict(play.rows) for play in (pair.r, pair.p)}
    restore(pair, pair.r, dict(pair.r.rows))
    assert {play: dict(play.rows) for play in (pair.r, pair.p)} == before
    assert pair.states(agreement_id) == ("Approved", "Approved")
