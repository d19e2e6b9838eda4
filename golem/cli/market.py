"""`golem market`: why things match or do not, and the agreements of this node."""

from __future__ import annotations

from typing import Any

import click

from golem.cli.client import get
from golem.cli.output import say, table, text, value, wants_json

API = "/market-api/v1"


@click.group()
def market() -> None:
    """Offers, demands and agreements."""


@market.command("explain")
@click.argument("demand_id")
@click.argument("offer_id", required=False)
def explain(demand_id: str, offer_id: str | None) -> None:
    """Say why a demand and offers do not match.

    For one offer, or for all that are known: which clause failed on which value.
    """
    if offer_id is None:
        found = get(f"{API}/demands/{demand_id}/explain")
        value(found) if wants_json() else _overview(found)
        return
    found = get(f"{API}/explain", demand=demand_id, offer=offer_id)
    if wants_json():
        value(found)
    elif found["matches"]:
        text("They match.")
    else:
        _reasons(found["reasons"])


def _reasons(reasons: list[dict[str, Any]]) -> None:
    table(["whose constraint", "clause", "found", "why"], [[r["side"], r["clause"], r["found"], r["message"]] for r in reasons])


def _overview(found: dict[str, Any]) -> None:
    counts = found["offers"]
    text(f"Offers known here: {counts['known']} (this node's own: {counts['own']}); matching: {counts['matching']}.")
    if counts["own"]:
        say("Offers and demands of one node never match: the other side is another node, on this machine or elsewhere.")
    for offer in found["nearest"]:
        text("", f"Offer {offer['offerId']} of {offer['providerId']}:")
        _reasons(offer["reasons"])
    for refused in found["refused"]:
        say(f"not kept: {refused['reason']}")


@market.group("agreements")
def agreements() -> None:
    """Agreements of this node."""


@agreements.command("list")
@click.option("--state", help="Only those in a state, such as Approved.")
@click.option("--before")
@click.option("--after")
@click.option("--app-session-id")
def agreements_list(state: str | None, before: str | None, after: str | None, app_session_id: str | None) -> None:
    """List agreements."""
    query = {"state": state, "beforeDate": before, "afterDate": after, "appSessionId": app_session_id}
    found = get(f"{API}/agreements", **{name: given for name, given in query.items() if given})
    table(["id", "role", "created", "approved"], [[a["id"], a["role"], a["timestamp"], a["approvedDate"]] for a in found])


@agreements.command("get")
@click.option("--id", "agreement_id", required=True)
@click.option("--role", hidden=True)
def agreements_get(agreement_id: str, role: str | None) -> None:
    """Show an agreement."""
    value(get(f"{API}/agreements/{agreement_id}"))


def register(main: click.Group) -> None:
    main.add_command(market)
