"""`golem market`: why things match, or do not."""

from __future__ import annotations

import click

from golem.cli.client import ask_node
from golem.cli.output import table, text, value, wants_json


@click.group()
def market() -> None:
    """Offers, demands and agreements."""


@market.command("explain")
@click.argument("demand_id")
@click.argument("offer_id", required=False)
def explain(demand_id: str, offer_id: str | None) -> None:
    """Say why a demand and an offer (or any offer) do not match: which clause failed on which value."""
    found = ask_node("market_explain", demand=demand_id, offer=offer_id)
    if wants_json() or offer_id is None:
        value(found)
    elif found["matches"]:
        text("They match.")
    else:
        rows = [[r["side"], r["clause"], r["found"], r["message"]] for r in found["reasons"]]
        table(["whose constraint", "clause", "found", "why"], rows)


@market.group("agreements")
def agreements() -> None:
    """Agreements of this node."""


@agreements.command("list")
@click.option("--state")
def agreements_list(state: str | None) -> None:
    """List agreements."""
    rows = [[a["id"], a["role"], a["peer"], a["state"], a["created"]] for a in ask_node("agreements_list", state=state)]
    table(["id", "role", "peer", "state", "created"], rows)


def register(main: click.Group) -> None:
    main.add_command(market)
