"""Market API, ours: why do an offer and a demand not match, and why does a demand get no proposals?"""

from __future__ import annotations

import heapq
import json
from typing import TYPE_CHECKING, Any

import trio
from quart import Blueprint, Response

from actors.market.rows import OfferRefusal, StatsRow
from actors.negotiation.rows import ProposalRow, state_at
from golem.rest.edge import ApiError, query_text, respond_json
from protocol.market import SUBSCRIPTION_ID, Subscription, read_subscription
from protocol.negotiation import reason_text
from protocol.states import ProposalState
from protocol.terms import Reason, explain
from protocol.types import timestamp_text

if TYPE_CHECKING:
    from golem.node.node import Node

NEAREST = 10
MAX_REASONS = 50
PART = 500  # proposals that are looked at in one go


def register(api: Blueprint, node: Node) -> None:
    """Add the endpoints of explanations to the market API."""

    @api.get("/explain")
    async def pair() -> Response:
        demand_id, offer_id = _id("demand"), _id("offer")
        rows = node.system.rows("market")
        demand_row, offer_row = rows.get(f"demand/{demand_id}"), rows.get(f"offer/{offer_id}")
        reasons = []
        if demand_row is None:
            reasons.append(_fact("demand", f"demand {demand_id} is not known here: withdrawn, expired, or another node's"))
        if offer_row is None:
            reasons.append(_fact("offer", _missing_offer(node, offer_id)))
        if demand_row is not None and offer_row is not None:
            demand, offer = read_subscription(demand_row.document.body), read_subscription(offer_row.document.body)
            reasons = _between(demand, offer)
        return respond_json({"matches": not reasons, "reasons": reasons[:MAX_REASONS]})

    @api.get("/demands/<wanted>/explain")
    async def overview(wanted: str) -> Response:
        demand_id = wanted.lower()
        row = node.system.rows("market").get(f"demand/{demand_id}") if SUBSCRIPTION_ID.match(demand_id) else None
        if row is None:
            raise ApiError(404, f"Demand [{demand_id[:120]}] not found.")
        return respond_json(await _overview(node, demand_id, read_subscription(row.document.body)))


def _id(name: str) -> str:
    text = (query_text(name) or "").lower()
    if not SUBSCRIPTION_ID.match(text):
        raise ApiError(400, f"query parameter {name}={text[:120]!r}: expected 32 hex digits, '-', 64 hex digits")
    return text


def _fact(side: str, message: str) -> dict[str, Any]:
    """Return a reason that no clause is behind."""
    return {"side": side, "clause": "", "property": "", "found": None, "message": message}


def _form(reason: Reason) -> dict[str, Any]:
    return {
        "side": reason.side,
        "clause": reason.clause,
        "property": reason.name,
        "found": reason.value,
        "message": reason.message,
    }


def _between(demand: Subscription, offer: Subscription) -> list[dict[str, Any]]:
    """Return why the two do not match; nothing if they do."""
    own = [_fact("offer", "offer and demand belong to the same node: these never match")] if demand.owner == offer.owner else []
    found = explain(demand.properties, demand.constraints, offer.properties, offer.constraints)
    return own + [_form(reason) for reason in found]


def _missing_offer(node: Node, offer_id: str) -> str:
    """Return why an offer is not on the market as this node sees it."""
    rows = node.system.rows("market")
    if ended := rows.get(f"ended/{offer_id}"):
        return f"offer {offer_id} of {ended.owner} is over: {ended.reason} at {timestamp_text(ended.at)}"
    if asked := rows.get(f"asked/{offer_id}"):
        return f"offer {offer_id} was announced by {asked.node}, which has not sent it yet"
    stats = rows.get("stats") or StatsRow()
    for refusal in reversed(stats.refused):
        if refusal.offer_id == offer_id:
            return f"offer {offer_id} came and was not kept: {refusal.reason}"
    return f"offer {offer_id} has not been heard of by this node: no peer announced it, or it is over"


def _refused(refusal: OfferRefusal) -> dict[str, Any]:
    return {"offerId": refusal.offer_id or None, "reason": refusal.reason, "at": timestamp_text(refusal.at)}


def _reason_text(reason: str) -> str:
    return str((json.loads(reason) if reason else {}).get("message", ""))


async def _answers(node: Node, demand_id: str) -> list[dict[str, Any]]:
    """Return where the negotiation with each matching offer stands, and what its provider said, the newest first."""
    rows = node.system.rows("negotiation")
    last: dict[str, ProposalRow] = {}
    for number, (key, _) in enumerate(rows.prefix(f"of/{demand_id}/")):
        if number % PART == 0:
            await trio.lowlevel.checkpoint()
        proposal = rows.get("proposal/" + key.rpartition("/")[2])
        if proposal is not None and proposal.created >= (last[proposal.offer_id].created if proposal.offer_id in last else 0):
            last[proposal.offer_id] = proposal
    newest = heapq.nlargest(NEAREST, last.values(), key=lambda proposal: proposal.created)
    return [_answer(node, proposal) for proposal in newest]


def _answer(node: Node, proposal: ProposalRow) -> dict[str, Any]:
    agreement = node.system.rows("negotiation").get(f"agreement/{proposal.agreement_id}") if proposal.agreement_id else None
    state: str = proposal.state
    reason = proposal.reason
    if agreement is not None:
        state, reason = f"Agreement {state_at(agreement, node.clock())}", agreement.reason
    elif state == ProposalState.REJECTED:
        state = f"Rejected by {'the provider' if proposal.issuer == node.node_id else 'this node'}"
    elif not reason:
        waits = "the provider" if proposal.issuer == node.node_id else "the agent of this node"
        reason = reason_text(f"waits for {waits}")
    return {
        "offerId": proposal.offer_id, "providerId": proposal.provider, "state": state, "message": _reason_text(reason),
        "at": timestamp_text(proposal.created),
    }  # fmt: skip


async def _overview(node: Node, demand_id: str, demand: Subscription) -> dict[str, Any]:
    """Return how many offers are known and match, what the nearest others lack, and which offers were not kept."""
    counts = {"known": 0, "own": 0, "matching": 0, "notMatching": 0}
    clauses: dict[str, int] = {}
    nearest: list[tuple[int, str, list[dict[str, Any]], str]] = []
    for shard in range(256):  # part by part: a large market must not hold up the node
        await trio.lowlevel.checkpoint()
        for _, row in node.system.listed("market", f"offer/{shard:02x}")[0]:
            offer = read_subscription(row.document.body)
            counts["known"] += 1
            if offer.owner == node.node_id:
                counts["own"] += 1
                continue
            reasons = _between(demand, offer)
            if not reasons:
                counts["matching"] += 1
                continue
            counts["notMatching"] += 1
            for clause in {f"{reason['side']}: {reason['clause']}" for reason in reasons}:
                if clause in clauses or len(clauses) < 1000:
                    clauses[clause] = clauses.get(clause, 0) + 1
            nearest.append((len(reasons), offer.subscription_id, reasons, offer.owner))
        nearest = heapq.nsmallest(NEAREST, nearest, key=lambda one: one[:2])
    stats = node.system.rows("market").get("stats") or StatsRow()
    frequent = sorted(clauses.items(), key=lambda item: (-item[1], item[0]))[:NEAREST]
    return {
        "demandId": demand_id,
        "offers": counts,
        "failingClauses": [{"clause": clause, "offers": count} for clause, count in frequent],
        "nearest": [
            {"offerId": offer_id, "providerId": owner, "reasons": reasons[:MAX_REASONS]}
            for _, offer_id, reasons, owner in nearest
        ],
        "answers": await _answers(node, demand_id),
        "refused": [_refused(refusal) for refusal in stats.refused],
    }
