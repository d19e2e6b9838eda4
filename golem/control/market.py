"""The node's side of `golem market`: what is on the market as this node sees it; and whole ids for shortened ones.

Registered with `golem/control/command.py`, as every `cli:` call of the bus. Neighbours: `golem/cli/market.py` is the other end;
`golem/rest/market.py` serves the same rows to agents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import trio

from golem.control.command import command
from golem.node.market_forms import subscription_form
from protocol.market import Subscription, read_subscription
from protocol.property_names import COEFFS, NODE_NAME, RUNTIME_NAME, SUBNET, VECTOR
from protocol.states import DocumentKind
from protocol.terms import compile_constraint
from protocol.types import timestamp_text

if TYPE_CHECKING:
    from golem.node.node import Node

MOST_LISTED = 5000


def whole_id(wanted: str, known: Iterable[str]) -> str:
    """Return the id that begins with `wanted`, which may be whole; `wanted` itself where there is none.

    Whoever is asked next says in its own words that it does not know it. Raises `LookupError` where several begin so.
    """
    lowered = wanted.strip().lower()
    found = sorted({one for one in known if lowered and one.lower().startswith(lowered)})
    if wanted in found:
        return wanted
    exact = [one for one in found if one.lower() == lowered]
    if exact or len(found) == 1:
        return (exact or found)[0]
    if not found:
        return wanted
    listed = ", ".join(one[: len(lowered) + 8] for one in found[:5])
    raise LookupError(f"{wanted[:40]!r} fits {len(found)} ids: {listed}{', ...' if len(found) > 5 else ''}: give more of it")


def peers(node: Node) -> list[str]:
    """Return the node ids that this node has met."""
    return [*node.network.known_peers(), *(one.node_id for one in node.network.sessions())]


def _known(node: Node, kind: str) -> list[str]:
    """Return the ids of a kind that this node knows. Raises `LookupError`."""

    def keys(actor: str, *prefixes: str) -> list[str]:
        found = [node.system.listed(actor, f"{prefix}/") for prefix in prefixes]
        return [key.partition("/")[2] for rows, damaged in found for key in (*dict(rows), *damaged)]

    match kind:
        case "offer" | "demand":
            return keys("market", kind)
        case "agreement":
            return keys("negotiation", kind)
        case "bill":
            return keys("ledger", "agreement", DocumentKind.DEBIT_NOTE, DocumentKind.INVOICE)
        case "payment":
            return keys("wallet", "batch") + keys("ledger", "payment")
        case "debt":
            orders = keys("wallet", "order")
            hashes = [row.tx_hash for _, row in node.system.listed("wallet", "batch/")[0] if row.tx_hash]
            hashes += [row.tx_hash for _, row in node.system.listed("ledger", "payment/")[0]]
            known = (
                orders
                + keys("wallet", "batch")
                + keys("ledger", "payment", DocumentKind.DEBIT_NOTE, DocumentKind.INVOICE)
                + hashes
            )
            return list(dict.fromkeys([*(one.partition(":")[2] or one for one in orders), *known]))
    raise LookupError(f"ids of what? Not of {kind!r}")


@command
async def whole(node: Node, args: dict[str, Any]) -> Any:
    """The whole id of something that was named by its first digits."""
    return whole_id(str(args["id"]), _known(node, str(args["kind"])))


@command
async def market_list(node: Node, args: dict[str, Any]) -> Any:
    """Offers or demands that are alive: this node's own, and offers of others as far as they are known here."""
    kind = DocumentKind.DEMAND if args["kind"] == DocumentKind.DEMAND else DocumentKind.OFFER
    test = compile_constraint(args.get("constraints") or "()")
    now = node.clock()
    found = []
    for _, row in node.system.rows("market").readable(f"{kind}/", []):
        await trio.lowlevel.checkpoint()  # there may be many thousands
        if row.expires <= now:
            continue
        content = read_subscription(row.document.body)
        own = content.owner == node.node_id
        if args.get("own") not in (None, own) or not content.owner.startswith(str(args.get("owner") or "").lower()):
            continue
        if args.get("runtime") not in (None, content.properties.get(RUNTIME_NAME)):
            continue
        if args.get("subnet") not in (None, content.properties.get(SUBNET)):
            continue
        if test.evaluate(content.properties):
            found.append(_line(content, own))
    found.sort(key=lambda line: line["created"])
    return {"total": len(found), "rows": found[-MOST_LISTED:]}


def _line(content: Subscription, own: bool) -> dict[str, Any]:
    properties = content.properties
    return {
        "id": content.subscription_id, "owner": content.owner, "own": own, "name": properties.get(NODE_NAME),
        "subnet": properties.get(SUBNET), "runtime": properties.get(RUNTIME_NAME), "prices": _prices(properties),
        "constraints": content.constraints, "created": timestamp_text(content.created),
        "expires": timestamp_text(content.expires),
    }  # fmt: skip


def _prices(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return the price of a unit of each counter, and that of a start; nothing for another model of prices."""
    names, prices = properties.get(VECTOR), properties.get(COEFFS)
    if not isinstance(names, list) or not isinstance(prices, list) or len(prices) != len(names) + 1:
        return {}
    return {**{str(name): price for name, price in zip(names, prices, strict=False) if price}, "start": prices[-1]}


@command
async def market_show(node: Node, args: dict[str, Any]) -> Any:
    """One offer or demand, whole."""
    kind = DocumentKind.DEMAND if args["kind"] == DocumentKind.DEMAND else DocumentKind.OFFER
    wanted = whole_id(str(args["id"]), _known(node, kind))
    row = node.system.rows("market").get(f"{kind}/{wanted}")
    if row is None:
        raise LookupError(f"no {kind} {wanted[:80]!r} is known here (golem market {kind}s lists them)")
    return subscription_form(row.document) | {"expires": timestamp_text(row.expires)}
