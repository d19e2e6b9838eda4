"""What holds the money of an account: allocations, and what was accepted and is not paid yet.

Several platforms may be one account (the test networks of a dev chain are): money that one of them holds is not free on
the others, and whoever is told of too little money is told where it is.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from actors.ledger.machine import AllocationRow, owed, remaining, reserved, total_of
from actors.ledger.rows import HasPrefix
from golem.chain.networks import Network, Networks
from protocol.types import amount_text, timestamp_text

MAX_SHOWN = 20


def platforms_of(networks: Networks, network: Network) -> list[str]:
    """Return the platforms whose money is that of `network`, itself first."""
    alike = [row.platform for row in networks if (row.chain, row.token) == (network.chain, network.token)]
    return [network.platform, *(platform for platform in alike if platform != network.platform)]


def reserved_on(rows: HasPrefix, platforms: list[str], besides: str = "") -> Decimal:
    """Return what live allocations hold on these platforms, leaving out the one with id `besides`."""
    return total_of(reserved(rows, platform, besides) for platform in platforms)


def owed_on(rows: HasPrefix, platforms: list[str]) -> Decimal:
    """Return what was accepted on these platforms and is not paid yet."""
    return total_of(owed(rows, platform) for platform in platforms)


def allocations_on(rows: HasPrefix, platforms: list[str]) -> list[AllocationRow]:
    """Return the live allocations that hold something on these platforms, the largest first."""
    live = [row for _, row in rows.prefix("allocation/") if row.platform in platforms and remaining(row) > 0]
    return sorted(live, key=lambda row: (-remaining(row), row.created_at))


def render_hold(row: AllocationRow) -> dict[str, Any]:
    """Return what an allocation holds, for people: how much, since when, made by which agent (its app-key's name)."""
    return {
        "allocationId": row.allocation_id, "agent": row.agent or None, "amount": amount_text(remaining(row)),
        "paymentPlatform": row.platform, "created": timestamp_text(row.created_at), "timeout": timestamp_text(row.timeout_at),
    }  # fmt: skip


def words(found: list[AllocationRow]) -> str:
    """Return in a clause which allocations hold the money; "" where none does."""
    parts = [
        f"{amount_text(remaining(row))} by {row.allocation_id}{f' of {row.agent}' if row.agent else ''} on {row.platform}"
        for row in found[:3]
    ]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"held: {', '.join(parts)}{more} (golem payment release-allocations frees them)" if parts else ""
