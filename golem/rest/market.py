"""Market API: offers and demands, their events, proposals. Agreements, scans and explanations are in modules of their own."""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import TYPE_CHECKING, Any

import trio
from quart import Blueprint, Response

from golem.node.market_forms import is_unanswered, proposal_form, subscription_event_form, subscription_form
from golem.rest import agreements, explain, scan
from golem.rest.agreements import reason_json
from golem.rest.edge import (
    ApiError,
    ask,
    created,
    json_body,
    listed,
    member,
    no_content,
    object_body,
    query_float,
    query_int,
    respond_json,
    until,
)
from golem.rest.repeatable import creation_time, fresh_id, repeatable, undone_if_unheard
from protocol.market import SUBSCRIPTION_ID, PublishDemand, PublishOffer, Withdraw, subscription_body
from protocol.negotiation import CounterProposal, RejectProposal
from protocol.properties import TermsError, flatten
from protocol.states import DocumentKind

if TYPE_CHECKING:
    from golem.node.node import Node

DEFAULT_TIMEOUT_S = 5.0
MAX_WAITING = 1000  # proposals in one answer
PROPOSAL_ID = re.compile(r"(R|P)-([0-9a-f]{64})\Z")


def blueprint(node: Node) -> Blueprint:
    """Return the market API of `node`."""
    api = Blueprint("market", __name__, url_prefix="/market-api/v1")
    for kind in (DocumentKind.OFFER, DocumentKind.DEMAND):
        _subscriptions(api, node, kind)
        _events(api, node, kind)
        _proposals(api, node, kind)
    agreements.register(api, node)
    scan.register(api, node)
    explain.register(api, node)
    return api


# -- parsing
def subscription_id(text: str) -> str:
    """Return the id of an offer or demand. Raises `ApiError` 400."""
    lowered = text.lower()
    if not SUBSCRIPTION_ID.match(lowered):
        raise ApiError(400, f"Invalid subscription id '{text[:120]}': expected 32 hex digits, '-', 64 hex digits.")
    return lowered


async def terms_body() -> tuple[dict[str, Any], str]:
    """Return flat properties and constraints of a body. Constraints are not parsed here. Raises `ApiError` 400."""
    body = await object_body()
    properties = member(body, "properties", dict)
    try:
        return flatten(properties), member(body, "constraints", str)
    except TermsError as error:
        raise ApiError(400, str(error)) from None


# -- offers and demands
def _alive(node: Node, kind: str, wanted_id: str) -> bool:
    """Return whether an offer or demand of ours is on the market."""
    row = node.system.rows("market").get(f"{kind}/{wanted_id}")
    return row is not None and row.expires > node.clock() and (kind == DocumentKind.DEMAND or row.owner == node.node_id)


def _subscriptions(api: Blueprint, node: Node, kind: str) -> None:
    @repeatable(node)
    async def publish() -> Response:
        properties, constraints = await terms_body()
        now = round(creation_time(node), 6)
        new_id, body = subscription_body(
            fresh_id(node), node.node_id, properties, constraints, now, now + node.config.subscription_ttl_s
        )
        document = node.identity.sign(kind, body)
        undone_if_unheard("market", Withdraw(new_id))
        await ask(node, "market", PublishOffer(document) if kind == DocumentKind.OFFER else PublishDemand(document))
        return created(new_id)

    async def own() -> Response:
        now = node.clock()
        if kind == DocumentKind.OFFER:
            known = node.system.rows("market").get("own")
            found = [row for offer_id in (known.offers if known else ()) for row in listed(node, "market", f"offer/{offer_id}")]
        else:
            found = listed(node, "market", "demand/")
        return respond_json([subscription_form(row.document) for row in found if row.expires > now])

    async def withdraw(wanted: str) -> Response:
        wanted_id = subscription_id(wanted)
        rows = node.system.rows("market")
        if (kind == DocumentKind.DEMAND) != (f"demand/{wanted_id}" in rows) or (
            kind == DocumentKind.DEMAND and not _alive(node, kind, wanted_id)
        ):
            raise ApiError(404, f"{kind.capitalize()} [{wanted_id}] not found.")
        await ask(node, "market", Withdraw(wanted_id))
        return no_content()

    api.post(f"/{kind}s", endpoint=f"publish_{kind}")(publish)
    api.get(f"/{kind}s", endpoint=f"own_{kind}s")(own)
    api.delete(f"/{kind}s/<wanted>", endpoint=f"withdraw_{kind}")(withdraw)


# -- their events
def _events(api: Blueprint, node: Node, kind: str) -> None:
    async def events(wanted: str) -> Response:
        wanted_id = subscription_id(wanted)
        limit = query_int("maxEvents", node.config.max_events_default, 1, node.config.max_events)
        timeout_s = query_float("timeout", DEFAULT_TIMEOUT_S)
        feed, deadline = f"{kind}/{wanted_id}", trio.current_time() + timeout_s

        def probe() -> str | None:
            if not _alive(node, kind, wanted_id):
                return "gone"
            return "news" if node.system.feeds.read(feed, 0, 1) else None

        while True:
            found = await until(node, [feed], probe, deadline - trio.current_time())
            if found == "gone":
                raise ApiError(404, f"Subscription [{wanted_id}] not found: it was never there, unsubscribed or has expired.")
            taken = await node.system.feeds.take(feed, limit) if found else []
            rows, now = node.system.rows("negotiation"), node.clock()
            forms = [form for event in taken if (form := subscription_event_form(event, rows, now))]
            if forms or not found:  # another poll may have been faster
                return respond_json(sorted(forms, key=lambda form: form["eventType"] == "ProposalEvent"))

    api.get(f"/{kind}s/<wanted>/events", endpoint=f"{kind}_events")(events)


# -- proposals
def _proposals(api: Blueprint, node: Node, kind: str) -> None:
    role = "R" if kind == DocumentKind.DEMAND else "P"

    def parse(wanted: str, proposal: str) -> tuple[str, str]:
        wanted_id = subscription_id(wanted)
        match = PROPOSAL_ID.match(proposal[:2].upper() + proposal[2:].lower())
        if not match:
            raise ApiError(400, f"Invalid proposal id '{proposal[:80]}': expected {role}- and 64 hex digits.")
        if match[1] != role:
            raise ApiError(404, f"Proposal [{proposal}] not found for subscription [{wanted_id}].")
        return wanted_id, match[2]

    async def get(wanted: str, proposal: str) -> Response:
        wanted_id, wanted_hash = parse(wanted, proposal)
        row = node.system.rows("negotiation").get(f"proposal/{wanted_hash}")
        if row is None or row.own_subscription != wanted_id:
            raise ApiError(404, f"Proposal [{proposal}] not found for subscription [{wanted_id}].")
        return respond_json(proposal_form(row))

    async def waiting(wanted: str) -> Response:
        """Proposals of the other side that were not answered yet: an agent that was killed may have had their events."""
        wanted_id = subscription_id(wanted)
        rows, now = node.system.rows("negotiation"), node.clock()
        if not _alive(node, kind, wanted_id):
            raise ApiError(404, f"Subscription [{wanted_id}] not found.")
        keys = (key.rpartition("/")[2] for key, _ in rows.prefix(f"of/{wanted_id}/"))
        found = (row for key in keys if (row := rows.get(f"proposal/{key}")) is not None and is_unanswered(row, now))
        return respond_json([proposal_form(row) for row in islice(found, MAX_WAITING)])

    async def counter(wanted: str, proposal: str) -> Response:
        wanted_id, wanted_hash = parse(wanted, proposal)
        properties, constraints = await terms_body()
        text = json.dumps(properties, separators=(",", ":"), ensure_ascii=False)
        message = CounterProposal(wanted_id, wanted_hash, text, constraints)
        reply = await ask(node, "negotiation", message, statuses={"busy": 400})
        return respond_json(f"{role}-{reply.id}")

    async def reject(wanted: str, proposal: str) -> Response:
        wanted_id, wanted_hash = parse(wanted, proposal)
        reason = reason_json(await json_body())
        await ask(node, "negotiation", RejectProposal(wanted_id, wanted_hash, reason))
        return no_content()

    path = f"/{kind}s/<wanted>/proposals/<proposal>"
    api.get(f"/{kind}s/<wanted>/proposals", endpoint=f"waiting_{kind}_proposals")(waiting)
    api.get(path, endpoint=f"get_{kind}_proposal")(get)
    api.post(path, endpoint=f"counter_{kind}_proposal")(counter)
    api.post(f"{path}/reject", endpoint=f"reject_{kind}_proposal")(reject)
