"""What the modules of the payment API share: exact bodies, pages of events, the form of a payment."""

from __future__ import annotations

import logging
from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from actors.ledger.machine import OrderRow, PaymentRow
from golem.rest.edge import ApiError, member, object_body
from protocol.ledger import PaymentBody, decode_body, json_form
from protocol.types import Violation, amount, timestamp, timestamp_text

if TYPE_CHECKING:
    from golem.node.node import Node

MAX_ITEMS = 5000
MAX_EVENTS = 1000
EVENT_TIMEOUT_S = 5.0
logger = logging.getLogger(__name__)


async def exact_body() -> dict[str, Any]:
    """Return the request's JSON object with fractions as `Decimal`. Raises `ApiError` 400."""
    return await object_body(exact=True)


def body_amount(body: dict[str, Any], name: str, rounding: str = "") -> Decimal:
    """Return an amount of a body, given as text or number. Raises `ApiError` 400.

    `rounding`: to whole wei, where agents compute amounts (a third of a budget); "" where they repeat one of ours.
    """
    value = body.get(name)
    if value is None:
        raise ApiError(400, f"missing field `{name}`")
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal):
        raise ApiError(400, f"field `{name}`: expected an amount as a text or a number")
    try:
        return amount(value, rounding)
    except ValueError as error:
        raise ApiError(400, f"field `{name}`: {error}") from None


def body_time(body: dict[str, Any], name: str) -> float | None:
    """Return a time of a body in seconds since the epoch; None for one that is missing, null or "". ApiError 400."""
    text = member(body, name, str, None)
    if not text:
        return None
    try:
        return timestamp(text)
    except (ValueError, OverflowError) as error:
        raise ApiError(400, f"field `{name}`: {error}") from None


def scan(
    node: Node, feed: str, after: float | None, limit: int, decode: Callable[[bytes], Any],
    pick: Callable[[Any, float], Any]
) -> Callable[[], list[Any] | None]:  # fmt: skip
    """Return a probe for `until`: the first `limit` events of a feed later than `after` that `pick` makes something of.

    Events that were looked at are not looked at again by the same probe. The probe returns None while there are none.
    An event that cannot be shown is passed over, and logged: those after it are what the agent waits for.
    """
    cursor = after or 0.0

    def probe() -> list[Any] | None:
        nonlocal cursor
        found: list[Any] = []
        while len(found) < limit and (page := node.system.feeds.read_after(feed, cursor, 100)):
            for event in page:
                cursor = event.at
                try:
                    picked = pick(decode(event.body), event.at)
                except (Violation, ValueError, LookupError) as error:
                    logger.warning("the event of %s on feed %s cannot be shown: %s", timestamp_text(event.at), feed, error)
                    continue
                if picked is not None:
                    found.append(picked)
                    if len(found) == limit:
                        break
        return found or None

    return probe


def render_payment(node: Node, row: PaymentRow, at: float | None = None) -> dict[str, Any]:
    """Return a payment in the form of the API."""
    body = json_form(decode_body(PaymentBody, row.body))
    rows = node.system.rows("ledger")
    sources: dict[tuple[str, str], str] = {}
    for order_id in row.order_ids:
        order: OrderRow = rows[f"order/{order_id}"]
        kind, own_id = ("activityId", order.activity_id) if order.activity_id else ("agreementId", order.agreement_id)
        sources[kind, own_id] = order.allocation_id
    for parts, kind in (("agreementPayments", "agreementId"), ("activityPayments", "activityId")):
        for part in body[parts]:
            if allocation_id := sources.get((kind, part[kind])):
                part["allocationId"] = allocation_id
    moment = at if at is not None else row.recorded_at
    signed = {"signature": list(row.signature), "signedBytes": list(row.body)} if row.signature else {}
    return {**body, "timestamp": timestamp_text(moment), **signed}
