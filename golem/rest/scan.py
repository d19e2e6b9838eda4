"""Market API: scans, for who looks at the offers of the market without a demand."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import trio
from quart import Blueprint, Response, request

from actors.kernel.machine import AskTimeout, Busy
from golem.node.market_forms import subscription_form
from golem.rest.edge import (
    ApiError,
    ask,
    caller,
    created,
    listed,
    member,
    no_content,
    object_body,
    query_float,
    query_int,
    query_text,
    respond_json,
    until,
)
from golem.rest.repeatable import undone_if_unheard
from protocol.codec import Decoder
from protocol.market import CloseScan, OfferSeen, OpenScan, ScanEnded, TouchScan
from protocol.states import DocumentKind
from protocol.terms import compile_constraint
from protocol.types import node_id

if TYPE_CHECKING:
    from golem.node.node import Node

DEFAULT_SCAN_S = 300.0
MAX_EVENTS = 500
HEARTBEAT_S = 15.0
_decode = Decoder[OfferSeen | ScanEnded](OfferSeen | ScanEnded)


def register(api: Blueprint, node: Node) -> None:
    """Add the endpoints of scans to the market API."""

    @api.post("/scan")
    async def begin() -> Response:
        body = await object_body()
        kind = member(body, "type", str, DocumentKind.OFFER)
        if kind not in (DocumentKind.OFFER, DocumentKind.DEMAND):
            raise ApiError(400, f"field `type`: expected offer or demand, not {kind[:40]!r}")
        timeout_s = member(body, "timeout", (int, float), DEFAULT_SCAN_S)
        if not 0 < timeout_s < 1e9:
            raise ApiError(400, "field `timeout`: expected seconds above 0")
        constraints = member(body, "constraints", str, "()") or "()"
        with trio.CancelScope(shield=True):  # else nobody would know the id of what is to be taken back; it waits 10 s at most
            reply = await ask(node, "market", OpenScan(kind, constraints, float(timeout_s), caller().identity))
        undone_if_unheard("market", CloseScan(reply.scan_id))
        await trio.lowlevel.checkpoint()  # here the request of a client that has left ends
        return created(reply.scan_id)

    @api.get("/scan/<scan_id>/events")
    async def collect(scan_id: str) -> Response:
        scan = _find(node, scan_id)
        peer = _peer()
        if peer is not None:
            return respond_json(_offers_of(node, peer, scan.constraints))
        await ask(node, "market", TouchScan(scan_id))
        if "text/event-stream" in request.headers.get("Accept", ""):
            response = Response(_stream(node, scan_id), content_type="text/event-stream")
            response.timeout = None
            response.headers["Cache-Control"] = "no-cache"
            return response
        timeout_s, limit = query_float("timeout", 5.0), query_int("maxEvents", MAX_EVENTS, 1, MAX_EVENTS)
        deadline = trio.current_time() + timeout_s
        while True:
            found, ended = await _next(node, scan_id, deadline - trio.current_time(), limit)
            if ended:
                raise ApiError(404, f"Scan [{scan_id}] was closed.")
            if found or trio.current_time() >= deadline or node.system.feeds.closed:
                return respond_json(found)

    @api.delete("/scan/<scan_id>", endpoint="close_scan")
    @api.delete("/scan/<scan_id>/events", endpoint="close_scan_events")
    async def close(scan_id: str) -> Response:
        _find(node, scan_id)
        await ask(node, "market", CloseScan(scan_id))
        return no_content()


def _find(node: Node, scan_id: str) -> Any:
    """Return a scan's row. Raises `ApiError` 404 or 403."""
    scan = node.system.rows("market").get(f"scan/{scan_id[:40]}")
    if scan is None:
        raise ApiError(404, f"Scan [{scan_id[:40]}] not found: it was closed, or not read for too long.")
    if scan.owner != caller().identity:
        raise ApiError(403, f"Scan [{scan_id[:40]}] belongs to another identity.")
    return scan


def _peer() -> str | None:
    text = query_text("peerId")
    try:
        return node_id(text) if text else None
    except ValueError as error:
        raise ApiError(400, f"query parameter peerId: {error}") from None


def _offers_of(node: Node, owner: str, constraints: str) -> list[dict[str, Any]]:
    """Return the offers of one node that we know; each node tells its own to everybody, so there is nothing to ask it for."""
    test = compile_constraint(constraints)
    forms = [
        subscription_form(row.document)
        for row in listed(node, "market", "offer/")
        if row.owner == owner and row.expires > node.clock()
    ]
    return [form for form in forms if test.evaluate(form["properties"])]


async def _next(node: Node, scan_id: str, timeout_s: float, limit: int) -> tuple[list[dict[str, Any]], bool]:
    """Return the next offers of a scan (none at the deadline), and whether it has ended."""
    feed = f"scan/{scan_id}"

    def probe() -> bool | None:
        return True if feed not in node.system.rows("market") or node.system.feeds.read(feed, 0, 1) else None

    await until(node, [feed], probe, timeout_s)
    if feed not in node.system.rows("market"):
        return [], True
    events = [_decode(event.body) for event in await node.system.feeds.take(feed, limit)]
    rows, now = node.system.rows("market"), node.clock()
    found = [rows.get(f"offer/{event.offer_id}") for event in events if isinstance(event, OfferSeen)]
    return [subscription_form(row.document) for row in found if row and row.expires > now], False


async def _stream(node: Node, scan_id: str) -> AsyncIterator[bytes]:
    """Yield server-sent events as offers come, and a comment now and then so that the line is known to live."""
    yield b": scan\n\n"
    while not node.system.feeds.closed:
        found, ended = await _next(node, scan_id, HEARTBEAT_S, MAX_EVENTS)
        if ended:
            return
        for form in found:
            data = json.dumps(form, ensure_ascii=False, separators=(",", ":"))
            yield f"event: offer\ndata: {data}\n\n".encode()
        if not found:
            yield b": ping\n\n"
        with contextlib.suppress(Busy, AskTimeout):  # the next round tells the market that somebody reads
            await node.system.ask("market", TouchScan(scan_id))
