"""`golem payment invoices|export|debtors`: the documents of this node for people who keep books."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from golem.cli.client import ask_node
from golem.cli.output import fail, say, table, text, value, wants_json

MOST_SHOWN = 200
ENDED = ("SETTLED", "REJECTED", "CANCELLED")


@click.command("invoices")
@click.option("--notes", is_flag=True, help="Debit notes, too.")
@click.option("--unpaid", is_flag=True, help="Only those that are not settled, rejected or cancelled.")
@click.option("--all", "everything", is_flag=True, help=f"Not only the newest {MOST_SHOWN}.")
def invoices(notes: bool, unpaid: bool, everything: bool) -> None:
    """List invoices, the newest last.

    `in` is what this node is paid, `out` what it pays. `golem payment trace ID` tells the story of one.
    """
    rows = _bills(notes)
    rows = [row for row in rows if not unpaid or row["status"] not in ENDED]
    shown = rows if everything or wants_json() else rows[-MOST_SHOWN:]
    if wants_json():
        value(rows)
        return
    what = "documents" if notes else "invoices"
    if not rows:
        say(f"No {what}{' that wait' if unpaid else ''}.")
        return
    columns = ["invoice", "date", "way", "amount", "platform", "peer", "status", "what happens next"]
    table(
        [*columns[:1], *(["kind"] if notes else []), *columns[1:]],
        [[row["document"], *([row["kind"]] if notes else []), row["date"], row["direction"], row["amount"],
          row["paymentPlatform"], row["peer"], row["status"], row["waiting"]] for row in shown],
        f"{len(rows) - len(shown)} older {what} are not shown (--all)." if len(shown) < len(rows) else "",
    )  # fmt: skip


def _bills(notes: bool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ask_node("payment_bills", 300)["bills"]
    return [row for row in found if notes or row["kind"] == "invoice"]


@click.command("export")
@click.option("--csv", "as_csv", is_flag=True, help="As comma-separated values. [this is the default]")
@click.option("--output", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write this file. [standard output]")
def export(as_csv: bool, path: Path | None) -> None:
    """Write a line for each invoice and debit note.

    For bookkeeping: date, kind, ids, peer, direction, amount, platform, status, due date, transactions. Debit notes and
    invoices are running totals of one agreement: add up the invoices alone. A cell that begins with = + - or @ gets an
    apostrophe before it, so that no spreadsheet computes what another node wrote.
    """
    if wants_json() and not as_csv:
        found = _bills(notes=True)
        if path is None:
            value(found)
            return
    content = ask_node("payment_bills", 300)["csv"]
    if path is None:
        click.echo(content, nl=False)
        return
    try:
        path.write_text(content, newline="")
    except OSError as error:
        raise fail(f"cannot write {path}: {error}") from None
    text(f"{path}: {max(content.count(chr(10)) - 1, 0)} documents")


@click.command("debtors")
def debtors() -> None:
    """Say who owes this node, and since when.

    golem provider run serves a debtor as far as its credit goes, and makes no new agreement above it (docs/trust.md).
    Nobody is reminded: a payer knows what it accepted, and its node tells it what holds its payments up.
    """
    found = ask_node("payment_debtors")
    if wants_json():
        value(found)
        return
    if not found:
        say("Nobody owes this node anything.")
        return
    rows = [[row["peer"], row["owed"], row["paymentPlatform"], row["agreements"], row["since"], _late(row["lateS"])]
            for row in found]  # fmt: skip
    table(["debtor", "owes", "platform", "agreements", "since", "late"], rows)


def _late(seconds: float) -> str:
    if not seconds:
        return "not yet"
    for unit, size in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:g} {unit}"
    return f"{seconds:g} s"


def register(payment: click.Group) -> None:
    for command in (invoices, export, debtors):
        payment.add_command(command)
