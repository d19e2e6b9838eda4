"""The last look before a payment is signed: is it what the wallet batched, the ledger ordered and both sides signed?

On the way from an accepted invoice to a transaction an amount stands in two journals and in `chain.db`. Here the call that
is about to be signed is held against all of them, and the ledger's orders against the signed documents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from actors.kernel.records import RowDamaged
from actors.kernel.system import System
from actors.ledger import machine as ledger
from actors.wallet.rows import OrderState, PayBatchRow, PayOrderRow
from golem.chain.networks import Network, Networks
from protocol.states import Party
from protocol.types import amount, to_wei

Payees = tuple[tuple[str, int], ...]  # address and wei
Vouch = Callable[[str, Payees], Awaitable[str]]  # batch id and payees -> why this must not be signed, "" if it may be


async def vouch_nothing(batch_id: str, payees: Payees) -> str:
    """Where nothing is known of orders: an engine by itself."""
    return ""


def told(system: System) -> set[str]:
    """Return the transactions of all payments that the ledger knows to have been made here, whatever this disk forgot."""
    return {row.tx_hash for _, row in system.listed("ledger", "payment/")[0] if row.role == Party.PAYER}


def voucher(system: System, networks: Networks, network: Network) -> Vouch:
    """Return the look at the rows of `system` for the engine of a chain."""

    async def vouch(batch_id: str, payees: Payees) -> str:
        try:
            return await _objection(system, networks, network, batch_id, payees)
        except RowDamaged as error:
            return str(error)

    return vouch


async def _objection(system: System, networks: Networks, network: Network, batch_id: str, payees: Payees) -> str:
    wallet: Any = system.rows("wallet")
    batch = wallet.get(f"batch/{batch_id}")
    if not isinstance(batch, PayBatchRow):
        return f"the wallet has no batch {batch_id}"
    if networks.by_platform(batch.platform).chain != network.chain:
        return f"batch {batch_id} is for {batch.platform}, and would be paid on {network.name}"
    batched = Counter({payee.payee.lower(): to_wei(amount(payee.amount)) for payee in batch.payees})
    if Counter(dict(payees)) != batched or len(payees) != len(batch.payees):
        return f"the transaction of batch {batch_id} does not pay what the wallet batched"
    for payee in batch.payees:
        total_wei = 0
        for order_id in payee.order_ids:
            await trio.lowlevel.checkpoint()
            order = wallet.get(f"order/{order_id}")
            if not isinstance(order, PayOrderRow) or (order.batch_id, order.payee) != (batch_id, payee.payee):
                return f"order {order_id} is not one of batch {batch_id}"
            if order.state not in (OrderState.BATCHED, OrderState.PAID):
                return f"order {order_id} of batch {batch_id} is {order.state.lower()}"
            if reason := _unlike_ordered(system, order):
                return reason
            total_wei += to_wei(amount(order.amount))
        if total_wei != batched[payee.payee.lower()]:
            return f"batch {batch_id} pays {payee.payee} another sum than its orders come to"
    return ""


def _unlike_ordered(system: System, order: PayOrderRow) -> str:
    rows: Any = system.rows("ledger")
    found = rows.get(f"order/{order.order_id}")
    if not isinstance(found, ledger.OrderRow):
        return f"the ledger has no order {order.order_id}"
    ours = order.platform, order.payer, order.payee, order.amount
    if ours != (found.platform, found.payer_addr, found.payee_addr, found.amount):
        return f"order {order.order_id}: the wallet has {order.amount} GLM to {order.payee}, the ledger ordered {found.amount} " \
               f"to {found.payee_addr}"  # fmt: skip
    return ledger.objection(rows, system.node, order.order_id)
