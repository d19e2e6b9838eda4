"""Who pays whom under an agreement, as its properties say; the same reading for ledgers and for agents that negotiate.

The payer's address in the demand must be the requestor's own: else anybody could claim a stranger's transfers as his.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from protocol.property_names import CHOSEN_PLATFORM, PLATFORM_ADDRESS, PLATFORM_PREFIX
from protocol.types import Message, node_id

#: Networks whose transfers cost so much that requestors pay once a day, whatever is owed; elsewhere soon (see `wallet`).
PAID_DAILY = frozenset({"erc20-mainnet-glm"})
DAILY_S = 25 * 3600.0  # a day, and an hour for the transfer
SOON_GLM = "0.005"  # half of the least credit that providers give: who is owed this is paid within minutes
LEAST_PAYMENT_GLM = "0.000001"  # less is dust: it costs nobody a transfer, and nobody is held to it
NOBODY = "0x" + 40 * "0"  # tokens refuse to go there


class PaymentTerms(Message, frozen=True):
    """Platform and addresses of an agreement. `fault` says why nothing could be billed under it, "" if it can."""

    platform: str
    payer_addr: str
    payee_addr: str
    fault: str = ""


def address_key(platform: str) -> str:
    """Return the property that holds an address on a platform, in demands the payer's, in offers the payee's."""
    return f"{PLATFORM_PREFIX}{platform}{PLATFORM_ADDRESS}"


def payment_terms(demand: Mapping[str, Any], offer: Mapping[str, Any], requestor: str, provider: str) -> PaymentTerms:
    """Read the terms of an agreement between two nodes; `provider` may be "" where it is not known."""
    platform = str(demand.get(CHOSEN_PLATFORM) or "")
    payer_addr = str(demand.get(address_key(platform)) or requestor)
    payee_addr = str(offer.get(address_key(platform)) or provider)
    return PaymentTerms(platform, payer_addr, payee_addr, _fault(platform, requestor, provider, payer_addr, payee_addr))


def _fault(platform: str, requestor: str, provider: str, payer_addr: str, payee_addr: str) -> str:
    if not platform:
        return f"the demand has no {CHOSEN_PLATFORM}"
    if requestor == provider:
        return "both sides of the agreement are one node"
    if payer_addr.lower() != requestor:
        return f"the demand would pay from {payer_addr[:64]}, which is not the requestor's own account"
    try:
        payable = node_id(payee_addr) != NOBODY
    except ValueError:
        payable = False
    return "" if payable else f"the offer's payment address is none: {payee_addr[:64]}"
