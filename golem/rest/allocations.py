"""Payment API: allocations and the demand decorations made from them."""

from __future__ import annotations

from decimal import ROUND_CEILING, Decimal
from typing import TYPE_CHECKING, Any

import trio
from quart import Blueprint, Response, request

from actors.ledger.machine import AllocationRow, decorations, minus, paid_since, remaining, total_of
from golem.chain.networks import DRIVER, Network, parse_platform
from golem.chain.rpc import RpcError
from golem.node.holds import MAX_SHOWN, allocations_on, owed_on, platforms_of, render_hold, reserved_on, words
from golem.rest.edge import (
    ApiError,
    ask,
    caller,
    created,
    listed,
    member,
    null,
    query_int,
    query_time,
    respond_json,
)
from golem.rest.payment_forms import MAX_ITEMS, body_amount, body_time, exact_body
from golem.rest.repeatable import fresh_uuid, repeatable, undone_if_unheard
from protocol.ledger import AmendAllocation, CreateAllocation, ReleaseAllocation
from protocol.types import amount_text, from_wei, timestamp_text

if TYPE_CHECKING:
    from golem.node.node import Node

DEFAULT_PLATFORM = "erc20-holesky-tglm"
TOKEN_NETWORK = {"glm": "polygon", "tglm": "holesky"}  # of a platform that names its token only
UNFUNDED = 402  # on the way from the ledger to the answer, which is a 400 with figures
MAX_EXTEND_S = 10 * 366 * 24 * 3600.0


def register(api: Blueprint, node: Node) -> None:
    """Add the endpoints about allocations."""
    one_at_a_time = trio.Lock()  # between the look at the balance and the ledger's word, also on twin platforms

    @api.post("/allocations")
    @repeatable(node)
    async def create() -> Response:
        body = await exact_body()
        platform = _platform(node, body)
        address = member(body, "address", str, None) or caller().identity
        total = body_amount(body, "totalAmount", ROUND_CEILING)
        if body.get("makeDeposit") is True or body.get("deposit") is not None:
            raise _problem(400, "unsupported", "allocations from deposits are not supported by this node")
        extend = member(body, "extendTimeout", (int, Decimal), None)
        if extend is not None and not 0 <= extend <= MAX_EXTEND_S:
            raise ApiError(400, "field `extendTimeout`: expected seconds, up to ten years")
        row = _served(node, platform, address)
        allocation_id = fresh_uuid(node)
        timeout_at = body_time(body, "timeout")
        extend_s = None if extend is None else float(extend)
        async with one_at_a_time:
            balance, known = await _balance(node, row)
            command = CreateAllocation(
                allocation_id, address, platform, amount_text(total), balance, timeout_at, extend_s, caller().name
            )
            undone_if_unheard("ledger", ReleaseAllocation(allocation_id))
            await _ask(node, command, row, address, total, balance, body)
        return created(render(_live(node, allocation_id)) | known)

    @api.get("/allocations")
    async def listing() -> Response:
        after = query_time("afterTimestamp")
        limit = query_int("maxItems", MAX_ITEMS, 1, MAX_ITEMS)
        rows = [row for row in listed(node, "ledger", "allocation/") if row.released_at is None]
        rows = [row for row in rows if after is None or row.timeout_at > after]  # compared with the timeout, as ever
        return respond_json([render(row) for row in sorted(rows, key=lambda row: row.created_at)[:limit]])

    @api.get("/allocations/<allocation_id>")
    async def get(allocation_id: str) -> Response:
        return respond_json(render(_live(node, allocation_id)))

    @api.put("/allocations/<allocation_id>")
    async def amend(allocation_id: str) -> Response:
        body = await exact_body()
        row = _live(node, allocation_id)
        if body.get("deposit") is not None:
            raise _problem(400, "unsupported", "allocations from deposits are not supported by this node")
        total = body_amount(body, "totalAmount", ROUND_CEILING) if body.get("totalAmount") is not None else None
        text = None if total is None else amount_text(total)
        wanted = minus(total, row.spent) if total is not None else Decimal(0)
        timeout_at = body_time(body, "timeout")
        async with one_at_a_time:
            network = _served(node, row.platform, row.address)
            balance, known = await _balance(node, network)
            command = AmendAllocation(allocation_id, text, timeout_at, balance)
            await _ask(node, command, network, row.address, wanted, balance, body, besides=allocation_id)
        return respond_json(render(_live(node, allocation_id)) | known)

    @api.delete("/allocations/<allocation_id>")
    async def release(allocation_id: str) -> Response:
        await ask(node, "ledger", ReleaseAllocation(allocation_id))
        return null()

    _decorations(api, node)


def _decorations(api: Blueprint, node: Node) -> None:
    @api.get("/demandDecorations")
    async def demand_decorations() -> Response:
        ids = [each for text in request.args.getlist("allocationIds") for each in text.split(",") if each]
        if not ids:
            raise ApiError(400, "query parameter allocationIds is missing")
        rows = [_live(node, each) for each in ids[:MAX_ITEMS]]
        simulated = {network.platform for network in node.chain.networks if network.simulated_by}
        chain = await local_chain(node) if any(row.platform in simulated for row in rows) else None
        return respond_json(decorations(rows, chain))


async def local_chain(node: Node) -> str | None:
    """Return the name of the dev chain that this node's money is on, `None` on real networks. 503 while it is away."""
    try:
        return await node.chain.local_chain()
    except RpcError as error:
        raise _problem(503, "chain-unknown", f"it is not known which dev chain this is: {error}") from None


def render(row: AllocationRow) -> dict[str, Any]:
    """Return an allocation in the form of the API."""
    extend = {} if row.extend_timeout_s is None else {"extendTimeout": int(row.extend_timeout_s)}
    return {
        "allocationId": row.allocation_id,
        "address": row.address,
        "paymentPlatform": row.platform,
        "totalAmount": row.total,
        "spentAmount": row.spent,
        "remainingAmount": amount_text(remaining(row)),
        "timestamp": timestamp_text(row.created_at),
        "timeout": timestamp_text(row.timeout_at),
        "createdTs": timestamp_text(row.created_at),
        "updatedTs": timestamp_text(row.updated_at),
        "makeDeposit": False,
        **extend,
    }


def _live(node: Node, allocation_id: str) -> AllocationRow:
    row: AllocationRow | None = node.system.rows("ledger").get(f"allocation/{allocation_id}")
    if row is None or row.released_at is not None:
        raise ApiError(404, None)
    return row


def _platform(node: Node, body: dict[str, Any]) -> str:
    """The platform that a request names, in full, in parts or not at all."""
    given = body.get("paymentPlatform")
    if given is None or given == "":
        known = node.chain.networks.platforms
        default = node.chain.networks.by_name(node.chain.default_network).platform
        return DEFAULT_PLATFORM if DEFAULT_PLATFORM in known else default
    if isinstance(given, dict):
        given = _assembled(node, given)
    if not isinstance(given, str):
        raise _problem(400, "bad-platform", "field `paymentPlatform`: expected a text or an object")
    try:
        return str(parse_platform(given))
    except ValueError as error:
        raise _problem(400, "bad-platform", str(error)) from None


def _assembled(node: Node, given: dict[str, Any]) -> str:
    parts = {name: given.get(name) for name in ("driver", "network", "token")}
    if any(part is not None and not isinstance(part, str) for part in parts.values()):
        raise _problem(400, "bad-platform", "field `paymentPlatform`: driver, network and token are texts")
    rows = node.chain.networks.rows
    network = parts["network"] or TOKEN_NETWORK.get(parts["token"] or "tglm")
    if network is None:
        raise _problem(400, "bad-platform", f"no network is known for the token {str(parts['token'])[:40]!r}")
    token = parts["token"] or (rows[network].symbol.lower() if network in rows else "tglm")
    return f"{parts['driver'] or DRIVER}-{network}-{token}"


def _served(node: Node, platform: str, address: str) -> Network:
    """The network of an account of this node."""
    try:
        row = node.chain.networks.by_platform(platform)
    except KeyError as error:
        raise _problem(500, "account-not-registered", f"Account not registered: {error.args[0]}",
                       paymentPlatform=platform, address=address) from None  # fmt: skip
    if address.lower() != node.node_id:
        raise _problem(500, "account-not-registered", f"Account not registered: {address[:64]} is not one of this node",
                       paymentPlatform=platform, address=address[:64])  # fmt: skip
    return row


async def _balance(node: Node, row: Network) -> tuple[str | None, dict[str, Any]]:
    """What the account may reserve on a platform: its tokens less what other platforms of the same chain reserve or owe.

    While no endpoint answers, the last known balance counts, less what was paid since; then the answer's extra fields say
    of when it is, and why.
    """
    if node.config.skip_allocation_validation:
        return None, {}
    try:
        held = await node.chain.held(row.name)
    except RpcError as error:
        raise _problem(500, "balance-unknown", f"the balance cannot be read: {error}", paymentPlatform=row.platform) from None
    rows = node.system.rows("ledger")
    alike = platforms_of(node.chain.networks, row)
    gone = [reserved_on(rows, alike[1:]), owed_on(rows, alike[1:])]
    if held.is_fresh:
        known = {}
    else:
        gone += [paid_since(rows, twin, held.at) for twin in alike]
        known = {"balanceTimestamp": timestamp_text(held.at), "balanceNote": f"the last known balance counts: {held.trouble}"}
    free = minus(from_wei(held.balances.token_wei), total_of(gone))
    return amount_text(max(free, Decimal(0))), known


async def _ask(
    node: Node, command: CreateAllocation | AmendAllocation, network: Network, address: str, wanted: Decimal,
    balance: str | None, body: dict[str, Any], besides: str = ""
) -> None:  # fmt: skip
    """Ask the ledger; what it declines for want of funds is told with all figures."""
    try:
        await ask(node, "ledger", command, statuses={"unfunded": UNFUNDED})
    except ApiError as error:
        if error.status != UNFUNDED:
            raise
        rows, own = node.system.rows("ledger"), [network.platform]
        gone = total_of((reserved_on(rows, own, besides), owed_on(rows, own)))  # `balance` is without that of the twins
        alike = platforms_of(node.chain.networks, network)
        holding = [row for row in allocations_on(rows, alike) if row.allocation_id != besides]
        free, held, debt = max(minus(balance or "0", gone), Decimal(0)), reserved_on(rows, alike, besides), owed_on(rows, alike)
        said = (
            f"Insufficient funds to make allocation. Top up your account or release existing allocations to unlock the funds. "
            f"Requested: {amount_text(wanted)}, available: {amount_text(free)}, reserved: {amount_text(held)}, "
            f"accepted and not paid yet: {amount_text(debt)}"
        )
        raise _problem(
            400,
            "insufficient-funds",
            "; ".join(filter(None, (said, words(holding)))),
            requestedFunds=amount_text(wanted),
            availableFunds=amount_text(free),
            reservedFunds=amount_text(held),
            heldBy=[render_hold(row) for row in holding[:MAX_SHOWN]],
            paymentPlatform=network.platform,
            address=address,
            requestBody={name: str(value) if isinstance(value, Decimal) else value for name, value in body.items()},
        ) from None


def _problem(status: int, kind: str, detail: str, **extra: Any) -> ApiError:
    facts = {"type": f"/payment-api/v1/problems/{kind}", "title": kind.replace("-", " "), "status": status,
             "detail": detail, "instance": request.path, **extra}  # fmt: skip
    return ApiError(status, detail, facts, "application/problem+json")
