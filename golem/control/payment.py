"""The node's side of `golem payment`; debts have a file of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from golem.chain.networks import DRIVER, Network
from golem.chain.rpc import RpcError
from golem.control.command import command
from golem.node.bills import in_flight, outstanding
from golem.node.books import audit_books
from golem.node.holds import MAX_SHOWN, allocations_on, platforms_of, render_hold, reserved_on
from protocol.ledger import ReleaseAllocation
from protocol.types import amount_text, from_wei, timestamp_text

if TYPE_CHECKING:
    from actors.ledger.machine import AllocationRow
    from golem.node.node import Node


# -- payments
@command
async def payment_accounts(node: Node, args: dict[str, Any]) -> Any:
    """Platforms this node can pay and be paid on."""
    return node.chain.accounts()


@command
async def payment_networks(node: Node, args: dict[str, Any]) -> Any:
    """Networks that this node serves, and their platforms."""
    return [
        {"driver": DRIVER, "network": row.name, "token": row.symbol, "platform": row.platform,
         "simulatedBy": row.simulated_by, "default": row.name == node.chain.default_network}
        for row in node.chain.networks
    ]  # fmt: skip


@command
async def payment_status(node: Node, args: dict[str, Any]) -> Any:
    """Balances and sums of one network."""
    network = node.chain.networks.by_name(args.get("network") or node.chain.default_network)
    totals, ledger = node.chain.totals(network.platform), node.system.rows("ledger")
    alike = platforms_of(node.chain.networks, network)
    purse, trouble = await _purse(node, network)
    head = await node.chain.head(network.name) if not trouble else None
    chain = {"chain": await node.chain.local_chain(), "chainUrl": node.chain.dev_url} if network.simulated_by and head else {}
    found = [problem for problem in node.chain.problems(network.name) if not _is_said(problem.detail, trouble)]
    problems = [f"{problem.kind}: {problem.detail}" for problem in found]
    if trouble and not any(problem.partition(": ")[2] in trouble for problem in problems):
        problems.append(f"RpcError: {trouble}")
    return {
        "amount": purse.pop("amount"), "reserved": amount_text(reserved_on(ledger, alike)),
        **outstanding(node, network.platform), "inFlight": _in_flight(node, network, head.number if head else None),
        "advice": [_advice(kind, network, node.node_id) for kind in dict.fromkeys(problem.kind for problem in found)
                   if kind in ("InsufficientGas", "InsufficientToken")],
        "heldBy": [render_hold(row) for row in allocations_on(ledger, alike)[:MAX_SHOWN]],
        "outgoing": totals["outgoing"], "incoming": totals["incoming"], "driver": DRIVER, "network": network.name,
        "token": network.symbol, "platform": network.platform, "simulatedBy": network.simulated_by, **chain,
        "gas": {"currency_short_name": network.coin, "currency_long_name": network.coin, "balance": purse.pop("gas")}, **purse,
        "block_number": head.number if head else None,
        "block_datetime": timestamp_text(head.timestamp) if head else None, "address": node.node_id, "problems": problems,
    }  # fmt: skip


def _in_flight(node: Node, network: Network, head: int | None) -> list[dict[str, Any]]:
    found = in_flight(node, network.platform)
    for tx in (tx for batch in found for tx in batch["transactions"]):
        mined = tx["block"] is not None and head is not None
        tx["confirmations"], tx["depth"] = max(head - tx["block"], 0) if mined else None, network.depth
    return found


def _advice(kind: str, network: Network, address: str) -> str:
    what = network.coin if kind == "InsufficientGas" else network.symbol
    fund = f", or golem payment fund --network {network.name}" if network.is_test else ""
    return f"send {what} to {address} on {network.name}{fund}: payments go on by themselves, and none is made twice"


def _is_said(detail: str, trouble: str) -> bool:
    """Is an endpoint's silence told by `trouble` already, which has more to say?"""
    _, silent, why = detail.partition(" has not answered ")
    return bool(silent) and why.partition(": ")[2] in trouble


@command
async def payment_audit(node: Node, args: dict[str, Any]) -> Any:
    """Do the books add up?"""
    return await audit_books(node)


@command
async def payment_resume(node: Node, args: dict[str, Any]) -> Any:
    """Sign payments again after a restore; returns whether any were held."""
    return node.chain.release(args.get("network") or node.chain.default_network)


@command
async def payment_release_allocations(node: Node, args: dict[str, Any]) -> Any:
    """Release allocations: those named by (the first characters of) their ids, or all; of these what is old enough.

    Raises `LookupError` for a name that fits none or several; nothing is released then.
    """
    live = [row for _, row in node.system.rows("ledger").prefix("allocation/") if row.released_at is None]
    names = [str(name) for name in args.get("ids") or ()]
    chosen = [_named(name, live) for name in names] if names else live
    before = node.clock() - float(args.get("older_than_s") or 0)
    found = {row.allocation_id: row for row in chosen if row.created_at <= before}
    for allocation_id in found:
        await node.system.ask("ledger", ReleaseAllocation(allocation_id))
    return [render_hold(row) for row in found.values()]


def _named(name: str, live: list[AllocationRow]) -> AllocationRow:
    found = [row for row in live if name and row.allocation_id.startswith(name)]
    if len(found) != 1:
        raise LookupError(
            f"{name[:40]!r} is no living allocation" if not found else f"{name[:40]!r} fits {len(found)} allocations"
        )
    return found[0]


async def _purse(node: Node, network: Network) -> tuple[dict[str, Any], str]:
    """Tokens and coins of the account as now or as last known, None where nobody knows; and why they are not of now."""
    try:
        held = await node.chain.held(network.name)
    except RpcError as error:
        return {"amount": None, "gas": None}, str(error)
    wei = {"amount": held.balances.token_wei, "gas": held.balances.gas_wei}
    as_of = {} if held.is_fresh else {"balance_datetime": timestamp_text(held.at)}
    return {name: amount_text(from_wei(value)) for name, value in wei.items()} | as_of, held.trouble


@command
async def payment_fund(node: Node, args: dict[str, Any]) -> Any:
    """Test coins and tokens for this node."""
    network = node.chain.networks.by_name(args.get("network") or node.chain.default_network)
    balances = await node.chain.fund(network.name)
    return {"network": network.name, "simulatedBy": network.simulated_by, "token": network.symbol, "coin": network.coin,
            "amount": amount_text(from_wei(balances.token_wei)), "gas": amount_text(from_wei(balances.gas_wei))}  # fmt: skip


@command
async def payment_init(node: Node, args: dict[str, Any]) -> Any:
    """Accounts need no registration here: every platform of the profile is ready. Unknown networks are refused."""
    network = node.chain.networks.by_name(args.get("network") or node.chain.default_network)
    return {"network": network.name, "platform": network.platform, "token": network.symbol, "simulatedBy": network.simulated_by}
