"""Payment API: overviews for dashboards, straight from the rows of ledger and wallet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quart import Blueprint, Response

from actors.ledger.machine import LedgerActivityRow, LedgerAgreementRow, OrderRow
from actors.wallet.rows import PayBatchRow
from golem.node.books import audit_books
from golem.rest.edge import ApiError, caller, listed, query_int, respond_json
from golem.rest.payment_forms import MAX_ITEMS
from protocol.states import Party
from protocol.types import timestamp_text

if TYPE_CHECKING:
    from golem.node.node import Node


def register(api: Blueprint, node: Node) -> None:
    """Add the endpoints that only show."""

    def rows(actor: str, prefix: str) -> list[Any]:
        limit = query_int("maxItems", MAX_ITEMS, 1, MAX_ITEMS)
        return listed(node, actor, prefix)[-limit:]

    def one(actor: str, key: str) -> Any:
        row = node.system.rows(actor).get(key)
        if row is None:
            raise ApiError(404, None)
        return row

    @api.get("/audit")
    async def audit() -> Response:
        caller()
        return respond_json(await audit_books(node))

    @api.get("/payAgreements")
    async def agreements() -> Response:
        return respond_json([_agreement(row) for row in rows("ledger", "agreement/")])

    @api.get("/payAgreements/<agreement_id>")
    async def agreement(agreement_id: str) -> Response:
        return respond_json(_agreement(one("ledger", f"agreement/{agreement_id}")))

    @api.get("/payAgreements/<agreement_id>/activities")
    async def agreement_activities(agreement_id: str) -> Response:
        one("ledger", f"agreement/{agreement_id}")
        return respond_json([_activity(row) for row in rows("ledger", "activity/") if row.agreement_id == agreement_id])

    @api.get("/payAgreements/<agreement_id>/orders")
    async def agreement_orders(agreement_id: str) -> Response:
        one("ledger", f"agreement/{agreement_id}")
        return respond_json([_order(row) for row in rows("ledger", "order/") if row.agreement_id == agreement_id])

    @api.get("/payActivities")
    async def activities() -> Response:
        return respond_json([_activity(row) for row in rows("ledger", "activity/")])

    @api.get("/payActivities/<activity_id>")
    async def activity(activity_id: str) -> Response:
        return respond_json(_activity(one("ledger", f"activity/{activity_id}")))

    @api.get("/payActivities/<activity_id>/orders")
    async def activity_orders(activity_id: str) -> Response:
        one("ledger", f"activity/{activity_id}")
        return respond_json([_order(row) for row in rows("ledger", "order/") if row.activity_id == activity_id])

    @api.get("/allocations/<allocation_id>/orders")
    @api.get("/allocations/<allocation_id>/expenditures")
    async def expenditures(allocation_id: str) -> Response:
        one("ledger", f"allocation/{allocation_id}")
        return respond_json([_order(row) for row in rows("ledger", "order/") if row.allocation_id == allocation_id])

    @api.get("/batchOrders")
    async def batches() -> Response:
        return respond_json([_batch(row) for row in sorted(rows("wallet", "batch/"), key=lambda row: row.created_at)])

    @api.get("/batchOrders/<batch_id>")
    async def batch(batch_id: str) -> Response:
        return respond_json(_batch(one("wallet", f"batch/{batch_id}")))

    @api.get("/batchOrders/<batch_id>/items")
    async def items(batch_id: str) -> Response:
        return respond_json(_batch(one("wallet", f"batch/{batch_id}"))["items"])


def _agreement(row: LedgerAgreementRow) -> dict[str, Any]:
    return {
        "id": row.agreement_id,
        "role": "P" if row.role == Party.PAYEE else "R",
        "peerId": row.peer,
        "payeeAddr": row.payee_addr,
        "payerAddr": row.payer_addr,
        "paymentPlatform": row.platform,
        "totalAmountAccepted": row.accepted,
        "totalAmountPaid": row.paid,
        "appSessionId": row.app_session_id,
        "createdTs": timestamp_text(row.approved_at),
        "terminated": row.ended,
    }


def _activity(row: LedgerActivityRow) -> dict[str, Any]:
    return {
        "id": row.activity_id,
        "agreementId": row.agreement_id,
        "totalAmountDue": row.due,
        "totalAmountAccepted": row.accepted,
        "totalAmountPaid": row.paid,
    }


def _order(row: OrderRow) -> dict[str, Any]:
    return {
        "documentId": row.document_id,
        "documentType": row.kind,
        "agreementId": row.agreement_id,
        "activityId": row.activity_id or None,
        "allocationId": row.allocation_id,
        "payeeAddr": row.payee_addr,
        "payerAddr": row.payer_addr,
        "paymentPlatform": row.platform,
        "amount": row.amount,
        "createdTs": timestamp_text(row.ordered_at),
        "paymentId": row.payment_id or None,
        "paid": bool(row.payment_id),
    }


def _batch(row: PayBatchRow) -> dict[str, Any]:
    return {
        "id": row.batch_id,
        "platform": row.platform,
        "payerAddr": row.payer,
        "number": row.number,
        "state": row.state,
        "reason": row.reason or None,
        "transaction": row.tx_hash or None,
        "block": row.block or None,
        "gasUsed": row.gas_used or None,
        "fee": row.fee,
        "createdTs": timestamp_text(row.created_at),
        "items": [{"payeeAddr": payee.payee, "amount": payee.amount, "orders": list(payee.order_ids)} for payee in row.payees],
    }
