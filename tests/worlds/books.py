"""The auditor's look at the books of a `money.World`: those of each node, and those of every two against each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from decimal import Decimal
from typing import TYPE_CHECKING

from actors.auditor.audit import audit
from actors.auditor.books import contradictions
from actors.auditor.report import Finding, Moved, Report
from protocol.amounts import total_of
from protocol.states import Party

if TYPE_CHECKING:
    from worlds.money import Node, World


def moved_by(transfers: Iterable[tuple[str, str, str, Decimal]], payer: str) -> Moved:
    """Return what a chain moved from an account, of (hash, payer, payee, amount)."""
    found: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
    for tx_hash, account, payee, amount in transfers:
        if account == payer:
            found[tx_hash, payee] += amount
    return found


def report_of(world: World, node: Node) -> Report:
    """Audit a node. One whose disk went back in time does not know of all that the chain moved for it."""
    moved = None if node.id in world.restored else moved_by(world.transfers, node.id)
    return audit(node.rows["ledger"], node.rows["wallet"], moved)


def findings(world: World) -> list[Finding]:
    """Return all that does not add up anywhere."""
    found: list[Finding] = []
    for node in world.nodes:
        report = report_of(world, node)
        found += report.findings
        for sums in () if report.findings else report.sums:
            assert sums.issued == total_of((sums.accepted, sums.open, sums.rejected)), sums
            if sums.role == Party.PAYER and node.id not in world.restored:
                assert sums.accepted == total_of((sums.settled, sums.queued, sums.in_flight)), sums
    whole = [node for node in world.nodes if node.id not in world.restored]
    for payer in whole:
        for payee in whole:
            if payer is not payee:
                found += contradictions(payer.rows["ledger"], payee.rows["ledger"])
    return found


def check_books(world: World) -> None:
    """Raise where something does not add up."""
    found = findings(world)
    assert not found, "\n".join(f"{one.subject} {one.words}" for one in found)
