"""The node's side of `golem payment trace` and `golem payment decide`: the life of a debt, and a person's word on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from actors.ledger.rows import PaymentRow
from golem.control.command import command
from golem.node.paid import lost_of, payments_of
from golem.node.payout import payout_of, write_payout
from protocol.states import DocumentKind, Party
from protocol.types import timestamp_text

if TYPE_CHECKING:
    from golem.node.node import Node


@command
async def wallet_payout(node: Node, args: dict[str, Any]) -> Any:
    """Where this node is paid; with `target` it is chosen first."""
    if target := args.get("target"):
        chosen = None if target == "own" else payout_of(str(target), node.node_id, args.get("index"))
        await trio.to_thread.run_sync(write_payout, node.config.data_dir, chosen)
        node.payout = chosen
    chosen = node.payout
    of = "this node" if chosen is None else "the operator's key" if chosen.path else "whoever has its key"
    return {"address": chosen.address if chosen else node.node_id, "path": chosen.path if chosen else "", "of": of}


@command
async def payment_trace(node: Node, args: dict[str, Any]) -> Any:
    """What became of a debt, by its invoice, debit note, order, batch or payment: orders, batches and transactions of this
    node's own, and payments made to it."""
    wanted = str(args["id"])
    wallet = node.system.rows("wallet")
    names = [wanted, f"{DocumentKind.INVOICE}:{wanted}", f"{DocumentKind.DEBIT_NOTE}:{wanted}"]
    orders = [row for name in names if (row := wallet.get(f"order/{name}")) is not None]
    known, _ = node.system.listed("wallet", "batch/")
    batches = [row for _, row in known if _concerns(row, wanted, {order.order_id for order in orders})]
    ledger = node.system.rows("ledger")
    document = ledger.get(f"{DocumentKind.INVOICE}/{wanted}") or ledger.get(f"{DocumentKind.DEBIT_NOTE}/{wanted}")
    claims = [row for _, row in node.system.listed("ledger", "payment/")[0]]
    claims = payments_of(node, document.agreement_id, claims) if document is not None else claims
    claims = [row for row in claims if row.role == Party.PAYEE and (document or wanted in (row.payment_id, row.tx_hash))]
    if not orders and not batches and not claims:
        raise ValueError(f"no debt of this node is known as {wanted[:80]}: name an invoice, debit note, order or batch")
    documents = {order.order_id: ledger.get(f"order/{order.order_id}") for order in orders}
    return {
        "orders": [
            {"orderId": order.order_id, "amount": order.amount, "platform": order.platform, "payee": order.payee,
             "state": order.state, "reason": order.reason, "queuedAt": timestamp_text(order.queued_at), "tries": order.tries,
             "paymentId": getattr(documents[order.order_id], "payment_id", "") or None}
            for order in orders
        ],
        "batches": [
            {"batchId": batch.batch_id, "platform": batch.platform, "state": batch.state, "reason": batch.reason,
             "createdAt": timestamp_text(batch.created_at), "hash": batch.tx_hash or None,
             "chain": node.chain.story(batch.platform, batch.batch_id)}
            for batch in sorted(batches, key=lambda each: each.created_at)
        ],
        "received": [_received(node, row) for row in claims],
    }  # fmt: skip


def _received(node: Node, row: PaymentRow) -> dict[str, Any]:
    """A payment to this node, and what its chain says of it."""
    lost = lost_of(node, [row]).get(row.tx_hash, "")
    return {"paymentId": row.payment_id, "from": row.peer, "amount": row.amount, "platform": row.platform, "hash": row.tx_hash,
            "state": row.state, "reason": row.reason, "at": timestamp_text(row.recorded_at), "lost": lost}  # fmt: skip


def _concerns(batch: Any, wanted: str, order_ids: set[str]) -> bool:
    if wanted in (batch.batch_id, batch.tx_hash):
        return True
    return any(order_id in order_ids for payee in batch.payees for order_id in payee.order_ids)


@command
async def payment_decide(node: Node, args: dict[str, Any]) -> Any:
    """A person's word on a payment that the RPCs do not prove."""
    row = node.system.rows("wallet").get(f"batch/{args['batch']}")
    if row is None and args["paid_by"] is None and (words := node.chain.forget(str(args["batch"]))):
        return words
    if row is None:
        raise ValueError(f"no payment {str(args['batch'])[:64]} is known here")
    return await node.chain.decide(row.platform, row.batch_id, args["paid_by"], bool(args.get("unseen")))
