"""`golem market`: offers, demands and agreements of this node, and why things match or do not.

Ids may be shortened as long as they fit one object.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import click

from golem.cli.client import ask_node, get
from golem.cli.output import say, table, text, value, wants_json
from protocol.property_names import MEM_GIB

API = "/market-api/v1"
SHORT = 12  # digits of an id in tables for people: enough to name it again


@click.group()
def market() -> None:
    """Offers, demands and agreements."""


def _filters(function: Any) -> Any:
    limit = click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="At most so many, the newest.")
    constraints = click.option("--constraints", metavar="TEXT", help=f"Only what satisfies these: '({MEM_GIB}>=2)'.")
    subnet = click.option("--subnet", help="Only of a subnet.")
    return limit(constraints(subnet(function)))


@market.command("offers")
@click.option("--own/--others", default=None, help="Only this node's own offers, or those of other nodes. [all]")
@click.option("--provider", metavar="ID", help="Only of a provider; the first digits of its id will do.")
@click.option("--runtime", metavar="NAME", help="Only of a runtime.")
@_filters
def offers(own: bool | None, provider: str | None, runtime: str | None, subnet: str | None, constraints: str | None,
           limit: int) -> None:  # fmt: skip
    """List the offers that this node sees, its own among them."""
    found = ask_node(
        "market_list", kind="offer", own=own, owner=provider, runtime=runtime, subnet=subnet, constraints=constraints
    )
    rows = found["rows"][-limit:]
    if wants_json():
        value(rows)
        return
    columns = ["offer", "provider", "own", "name", "subnet", "runtime", "prices per unit (GLM)", "expires (UTC)"]
    note = _more(found["total"], rows) or ("" if rows else "No such offers are known here.")
    table(columns, [
        [row["id"][:SHORT], row["owner"][:SHORT], "yes" if row["own"] else "no", row["name"], row["subnet"], row["runtime"],
         _prices(row["prices"]), _time(row["expires"])]
        for row in rows
    ], note)  # fmt: skip


@market.command("demands")
@_filters
def demands(subnet: str | None, constraints: str | None, limit: int) -> None:
    """List the demands of this node. Those of other nodes do not come here: providers hear of a demand by its first proposal."""
    found = ask_node("market_list", kind="demand", subnet=subnet, constraints=constraints)
    rows = found["rows"][-limit:]
    if wants_json():
        value(rows)
        return
    columns = ["demand", "name", "subnet", "since (UTC)", "expires (UTC)", "constraints"]
    note = _more(found["total"], rows) or ("" if rows else "This node has no demands on the market.")
    table(columns, [
        [row["id"][:SHORT], row["name"], row["subnet"], _time(row["created"]), _time(row["expires"]), row["constraints"]]
        for row in rows
    ], note)  # fmt: skip


@market.command("show")
@click.argument("kind", type=click.Choice(["offer", "demand"]))
@click.argument("wanted", metavar="ID")
def show(kind: str, wanted: str) -> None:
    """Show an offer or a demand with all of its properties."""
    value(ask_node("market_show", kind=kind, id=wanted))


@market.command("explain")
@click.argument("demand_id")
@click.argument("offer_id", required=False)
def explain(demand_id: str, offer_id: str | None) -> None:
    """Say why a demand and offers do not match.

    For one offer, or for all that are known: which clause failed on which value.
    """
    demand_id = ask_node("whole", kind="demand", id=demand_id)
    if offer_id is None:
        found = get(f"{API}/demands/{quote(demand_id, safe='')}/explain")
        value(found) if wants_json() else _overview(found)
        return
    found = get(f"{API}/explain", demand=demand_id, offer=ask_node("whole", kind="offer", id=offer_id))
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
    if found["answers"]:
        columns = ["matching offer", "provider", "state", "why", "since (UTC)"]
        table(columns, [
            [one["offerId"][:SHORT], one["providerId"][:SHORT], one["state"], one["message"], _time(one["at"])]
            for one in found["answers"]
        ])  # fmt: skip
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
@click.option("--before", metavar="TIME", help="Only those made before, such as 2026-01-31T12:00:00Z.")
@click.option("--after", metavar="TIME", help="Only those made after.")
@click.option("--app-session-id", metavar="ID", help="Only those of an agent's session.")
def agreements_list(state: str | None, before: str | None, after: str | None, app_session_id: str | None) -> None:
    """List the agreements: with whom, about what, since when, and how they are."""
    query = {"state": state, "beforeDate": before, "afterDate": after, "appSessionId": app_session_id}
    found = get(f"{API}/agreements", **{name: given for name, given in query.items() if given})
    if wants_json():
        table(["id", "role", "created", "approved", "state", "peer", "runtime", "valid to"], [
            [a["id"], a["role"], a["timestamp"], a["approvedDate"], a["state"], a["peerId"], a["runtime"], a["validTo"]]
            for a in found
        ])  # fmt: skip
        return
    table(["agreement", "this node is", "with", "runtime", "state", "since (UTC)", "valid to (UTC)"], [
        [a["id"][:SHORT], a["role"], a["peerId"][:SHORT], a["runtime"], a["state"], _time(a["approvedDate"] or a["timestamp"]),
         _time(a["validTo"])]
        for a in found
    ], "" if found else "No agreements.")  # fmt: skip


@agreements.command("get")
@click.option("--id", "agreement_id", required=True)
@click.option("--role", hidden=True)
def agreements_get(agreement_id: str, role: str | None) -> None:
    """Show an agreement."""
    wanted = agreement_id[2:] if agreement_id[:2].upper() in ("R-", "P-") else agreement_id
    value(get(f"{API}/agreements/{quote(ask_node('whole', kind='agreement', id=wanted), safe='')}"))


def _more(total: int, rows: list[Any]) -> str:
    return f"The newest {len(rows)} of {total} (--limit shows more)." if total > len(rows) else ""


def _time(stamp: str) -> str:
    """Return a time as people read it, in UTC."""
    return f"{stamp[:10]} {stamp[11:19]}"


def _prices(prices: dict[str, Any]) -> str:
    return ", ".join(f"{name.removeprefix('golem.usage.')} {price}" for name, price in prices.items() if price)


def register(main: click.Group) -> None:
    main.add_command(market)
