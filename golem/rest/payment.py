"""Payment API: accounts, payments, payment cycles; allocations, documents and overviews are in the modules beside.

Amounts come in as texts or JSON numbers and go out as texts; a number never passes through a float.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import trio
from quart import Blueprint, Response

from actors.wallet.rows import CycleRow
from golem.chain.networks import DRIVER
from golem.chain.rpc import RpcError
from golem.rest import allocations, calculation, payment_documents, payment_lists
from golem.rest.edge import (
    ApiError,
    ask,
    caller,
    member,
    null,
    object_body,
    query_float,
    query_int,
    query_text,
    query_time,
    respond_json,
    until,
)
from golem.rest.payment_forms import EVENT_TIMEOUT_S, MAX_EVENTS, body_time, render_payment, scan
from protocol.codec import Decoder
from protocol.ledger import PaymentEvent
from protocol.types import amount_text, from_wei, node_id, timestamp_text
from protocol.wallet import RunCycle, SetCycle

if TYPE_CHECKING:
    from golem.node.node import Node

FUNDS_S = 8.0  # for the chain to say what an account holds
NEEDED = {"InsufficientGas": "neededGasEst", "InsufficientToken": "neededTokenEst"}
_payment_event = Decoder[PaymentEvent](PaymentEvent)


def blueprint(node: Node) -> Blueprint:
    """Return the payment API of `node`."""
    api = Blueprint("payment", __name__, url_prefix="/payment-api/v1")
    _accounts(api, node)
    _payments(api, node)
    _cycles(api, node)
    allocations.register(api, node)
    payment_documents.register(api, node)
    calculation.register(api, node)
    payment_lists.register(api, node)
    return api


def _accounts(api: Blueprint, node: Node) -> None:
    @api.get("/requestorAccounts")
    async def accounts() -> Response:
        caller()
        return respond_json(node.chain.accounts())

    @api.get("/providerAccounts")
    async def provider_accounts() -> Response:
        """As above, with the dev chain's name where a platform is on one: the provider agent puts it into its offers."""
        caller()
        chain = await allocations.local_chain(node)
        paid_at = {"address": node.payout.address} if node.payout else {}
        rows = node.chain.accounts()
        return respond_json([row | paid_at | ({"chain": chain} if row.get("simulatedBy") else {}) for row in rows])

    @api.get("/payers/<address>/funds")
    async def funds(address: str) -> Response:
        """What an account has to pay with on a platform, as the chain says: provider agents ask before they work."""
        caller()
        try:
            account, network = node_id(address), node.chain.networks.by_platform(query_text("platform") or "")
        except (ValueError, KeyError) as error:
            raise ApiError(400, str(error)) from None
        try:
            with trio.fail_after(FUNDS_S):
                held = await node.chain.balances(network.name, account)
        except (RpcError, trio.TooSlowError) as error:
            raise ApiError(503, f"no endpoint of {network.name} says what {account} holds: {error}") from None
        amount = amount_text(from_wei(held.token_wei))
        return respond_json({"address": account, "platform": network.platform, "amount": amount})

    @api.get("/payments/status")
    async def status() -> Response:
        driver, network = query_text("driver"), query_text("network")
        problems = [
            {
                "kind": problem.kind,
                "driver": DRIVER,
                "network": row.name,
                "address": problem.address,
                "message": problem.detail,
                **_needed(problem),
            }
            for row in node.chain.networks
            if network in (None, row.name) and driver in (None, DRIVER)
            for problem in node.chain.problems(row.name)
        ]
        return respond_json(problems)


def _needed(problem: Any) -> dict[str, Any]:
    if problem.kind == "InvalidChainId":
        return {"chainId": problem.chain_id}
    name = NEEDED.get(problem.kind)
    return {name: amount_text(from_wei(problem.needed_wei))} if name else {}


def _payments(api: Blueprint, node: Node) -> None:
    @api.get("/payments")
    async def payments() -> Response:
        fits = payment_filter()
        probe = scan(
            node, "payments", query_time("afterTimestamp"), query_int("maxEvents", 100, 1, MAX_EVENTS), _payment_event,
            lambda event, at: render_event(node, event, at) if fits(event) else None,
        )  # fmt: skip
        found = await until(node, ["payments"], probe, query_float("timeout", EVENT_TIMEOUT_S))
        return respond_json(found or [])

    @api.get("/payments/<payment_id>")
    async def payment(payment_id: str) -> Response:
        row = node.system.rows("ledger").get(f"payment/{payment_id}")
        if row is None:
            raise ApiError(404, None)
        return respond_json(render_payment(node, row))


def payment_filter() -> Callable[[PaymentEvent], bool]:
    """Return the test that the query of the request at hand puts payments to."""
    session, network, driver = query_text("appSessionId"), query_text("network"), query_text("driver")

    def fits(event: PaymentEvent) -> bool:
        their_driver, their_network, _ = event.platform.split("-")
        return session in (None, *event.app_session_ids) and network in (None, their_network) and driver in (None, their_driver)

    return fits


def render_event(node: Node, event: PaymentEvent, at: float) -> dict[str, Any] | None:
    """Return a payment as of its event; its time is when this node learned of it, so that a cursor misses none."""
    row = node.system.rows("ledger").get(f"payment/{event.payment_id}")
    return render_payment(node, row, at) if row is not None else None


def _cycles(api: Blueprint, node: Node) -> None:
    def cycle_of(platform: str) -> CycleRow:
        from golem.chain.cycles import cycles_of

        paces = cycles_of(node.config, node.chain)
        if platform not in paces:
            raise ApiError(404, f"payment platform {platform[:80]!r} is not served")
        row: CycleRow | None = node.system.rows("wallet").get(f"cycle/{platform}")
        return row or CycleRow(platform, paces[platform], 0.0)

    def render(cycle: CycleRow) -> dict[str, Any]:
        next_at = cycle.next_at if cycle.next_at is not None else node.clock() + cycle.interval_s
        return {
            "nodeId": node.node_id,
            "platform": cycle.platform,
            "intervalSec": cycle.interval_s,
            "cron": None,
            "extraPayTimeSec": cycle.extra_pay_time_s,
            "maxIntervalSec": None,
            "nextProcess": timestamp_text(next_at),
            "lastProcess": timestamp_text(cycle.last_at) if cycle.last_at is not None else None,
        }

    @api.get("/batchCycles")
    @api.get("/batchCycle")
    async def cycles() -> Response:
        return respond_json([render(cycle_of(row.platform)) for row in node.chain.networks])

    @api.get("/batchCycle/<platform>")
    async def cycle(platform: str) -> Response:
        return respond_json(render(cycle_of(platform)))

    @api.post("/batchCycle")
    async def set_cycle() -> Response:
        body = await object_body()
        platform = cycle_of(member(body, "platform", str)).platform
        if member(body, "cron", str, None) is not None:
            raise ApiError(400, "cron schedules are not supported: give intervalSec")
        interval_s = member(body, "intervalSec", (int, float), None)
        extra_s = member(body, "extraPayTimeSec", (int, float), None)
        next_at = body_time(body, "nextUpdate")
        if interval_s is None and extra_s is None and next_at is None:
            raise ApiError(400, "give intervalSec, extraPayTimeSec or nextUpdate")
        await ask(node, "wallet", SetCycle(platform, _float(interval_s), _float(extra_s), next_at))
        return respond_json(render(cycle_of(platform)))

    @api.post("/batchCycle/<platform>/now")
    async def run_cycle(platform: str) -> Response:
        await ask(node, "wallet", RunCycle(cycle_of(platform).platform))
        return null()


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)
