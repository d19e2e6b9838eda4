"""The node's side of `golem payment invoices`, `export` and `debtors`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from golem.control.command import command
from golem.node.bills import bills, csv_of, debtors

if TYPE_CHECKING:
    from golem.node.node import Node


@command
async def payment_bills(node: Node, args: dict[str, Any]) -> Any:
    """All invoices and debit notes, oldest first, and the same as CSV."""
    rows = bills(node)
    return {"bills": rows, "csv": csv_of(rows)}


@command
async def payment_debtors(node: Node, args: dict[str, Any]) -> Any:
    """Who owes this node what, since when, and how late."""
    return debtors(node)
