"""Payment API: debit notes and invoices, their events, and why one of them waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal
from typing import TYPE_CHECKING, Any

from quart import Blueprint, Response, request

from actors.ledger.audit import body_of
from actors.ledger.machine import LedgerAgreementRow, PaymentDocumentRow, acceptance_of
from golem.node.paid import lost_of, payments_of
from golem.rest.calculation import waiting
from golem.rest.edge import (
    ApiError,
    ask,
    created,
    listed,
    member,
    null,
    query_float,
    query_int,
    query_text,
    query_time,
    respond_json,
    until,
)
from golem.rest.payment_forms import (
    EVENT_TIMEOUT_S,
    MAX_EVENTS,
    MAX_ITEMS,
    body_amount,
    body_time,
    exact_body,
    render_payment,
    scan,
)
from golem.rest.repeatable import fresh_uuid, repeatable, undone_if_unheard
from protocol.codec import Decoder
from protocol.ledger import (
    MAX_COUNTER,
    MAX_MESSAGE_CHARS,
    MAX_USAGE_COUNTERS,
    REJECTION_REASONS,
    AcceptDocument,
    CancelInvoice,
    DebitNoteBody,
    DocumentEvent,
    InvoiceBody,
    IssueDebitNote,
    IssueInvoice,
    RejectInvoice,
    RejectionBody,
    SendDocument,
    TakeBackDocument,
    decode_body,
    encode_body,
    json_form,
)
from protocol.states import DocumentKind, DocumentStatus, Party
from protocol.types import amount_text, timestamp, timestamp_text

if TYPE_CHECKING:
    from golem.node.node import Node

ACK_TIMEOUT_S = 15.0
EVENTS: dict[str, str] = {
    DocumentStatus.RECEIVED: "ReceivedEvent",
    DocumentStatus.ACCEPTED: "AcceptedEvent",
    DocumentStatus.REJECTED: "RejectedEvent",
    DocumentStatus.CANCELLED: "CancelledEvent",
    DocumentStatus.SETTLED: "SettledEvent",
}
FILTERS = {*EVENTS, "PAYMENT_EVENT", "PAYMENT_OK"}
DEFAULTS: dict[str, str] = {Party.PAYER: "RECEIVED,CANCELLED", Party.PAYEE: "ACCEPTED,REJECTED,SETTLED,CANCELLED"}
HEADERS: dict[str, str] = {Party.PAYER: "X-Requestor-Events", Party.PAYEE: "X-Provider-Events"}
_event = Decoder[DocumentEvent](DocumentEvent)


@dataclass(frozen=True, slots=True)
class DocumentNames:
    """The names that debit notes and invoices go by."""

    kind: str
    path: str
    id_field: str
    prefix: str  # of event types
    feed: str


NOTE = DocumentNames(DocumentKind.DEBIT_NOTE, "debitNotes", "debitNoteId", "DebitNote", "debit-notes")
INVOICE = DocumentNames(DocumentKind.INVOICE, "invoices", "invoiceId", "Invoice", "invoices")


def register(api: Blueprint, node: Node) -> None:
    """Add the endpoints about documents."""
    for kind in (NOTE, INVOICE):
        _reading(api, node, kind)
        _moving(api, node, kind)
    _issuing(api, node)
    _invoices_only(api, node)
    _not_there(api)


def _reading(api: Blueprint, node: Node, kind: DocumentNames) -> None:
    async def listing() -> Response:
        after = query_time("afterTimestamp")
        limit = query_int("maxItems", MAX_ITEMS, 1, MAX_ITEMS)
        read = [(timestamp(body.timestamp), row, body) for row, body in listed(node, "ledger", f"{kind.kind}/", _with_body)]
        found = [each for each in read if after is None or each[0] > after]
        found.sort(key=lambda each: (each[0], each[1].document_id))
        return respond_json([_form(row, body) for _, row, body in found[:limit]])

    async def get(document_id: str) -> Response:
        return respond_json(render(_document(node, kind, document_id)))

    async def explain(document_id: str) -> Response:
        return respond_json(explained(node, kind, _document(node, kind, document_id)))

    async def events() -> Response:
        wanted, session = _wanted(), query_text("appSessionId")

        def pick(event: DocumentEvent, at: float) -> dict[str, Any] | None:
            if event.what not in wanted[event.role] or session not in (None, event.app_session_id):
                return None
            return event_form(kind, event, at)

        limit = query_int("maxEvents", 100, 1, MAX_EVENTS)
        probe = scan(node, kind.feed, query_time("afterTimestamp"), limit, _event, pick)
        found = await until(node, [kind.feed], probe, query_float("timeout", EVENT_TIMEOUT_S))
        return respond_json(found or [])

    _get(api, f"/{kind.path}", listing)
    _get(api, f"/{kind.path}/<document_id>", get)
    _get(api, f"/{kind.path}/<document_id>/explain", explain)
    _get(api, f"/{kind.path[:-1]}Events", events)


def _moving(api: Blueprint, node: Node, kind: DocumentNames) -> None:
    async def send(document_id: str) -> Response:
        timeout_s = query_float("timeout", ACK_TIMEOUT_S)
        row = _document(node, kind, document_id)
        if row.role != Party.PAYEE:
            raise ApiError(400, f"only the issuer of a {kind.kind} sends it")
        signed = node.identity.sign(kind.kind, row.body)
        await ask(node, "ledger", SendDocument(kind.kind, document_id, signed, max(timeout_s, 0.1)))

        def answered() -> PaymentDocumentRow | None:
            now = _document(node, kind, document_id)
            return now if now.status != DocumentStatus.ISSUED or now.refused else None

        done = await until(node, [kind.feed], answered, timeout_s)
        if done is None:
            raise ApiError(504, f"no receipt from {_agreement(node, row).peer} within {timeout_s:g} s")
        if done.refused and done.status == DocumentStatus.ISSUED:
            raise ApiError(400, done.waiting, {"highestAmount": done.most} if done.most else None)
        return null()

    async def accept(document_id: str) -> Response:
        query_float("timeout", ACK_TIMEOUT_S)
        body = await exact_body()
        accepted = body_amount(body, "totalAmountAccepted")
        allocation_id = member(body, "allocationId", str)
        row = _document(node, kind, document_id)
        signed = node.identity.sign(DocumentKind.ACCEPTANCE, acceptance_of(row))
        command = AcceptDocument(kind.kind, document_id, amount_text(accepted), allocation_id, signed)
        await ask(node, "ledger", command, statuses={"forbidden": 400})
        return null()

    _post(api, f"/{kind.path}/<document_id>/send", send)
    _post(api, f"/{kind.path}/<document_id>/accept", accept)


def _issuing(api: Blueprint, node: Node) -> None:
    @api.post("/debitNotes")
    @repeatable(node)
    async def issue_debit_note() -> Response:
        body = await exact_body()
        usage = _usage(body)
        command = IssueDebitNote(
            fresh_uuid(node),
            member(body, "activityId", str),
            amount_text(body_amount(body, "totalAmountDue", ROUND_FLOOR)),
            usage,
            body_time(body, "paymentDueDate"),
        )
        undone_if_unheard("ledger", TakeBackDocument(NOTE.kind, command.debit_note_id))
        await ask(node, "ledger", command, statuses={"forbidden": 400})
        return created(render(_document(node, NOTE, command.debit_note_id)))

    @api.post("/invoices")
    @repeatable(node)
    async def issue_invoice() -> Response:
        body = await exact_body()
        activities = member(body, "activityIds", list, [])
        if not all(isinstance(activity_id, str) for activity_id in activities):
            raise ApiError(400, "field `activityIds`: expected an array of texts")
        due_at = body_time(body, "paymentDueDate")
        if due_at is None:
            raise ApiError(400, "missing field `paymentDueDate`")
        command = IssueInvoice(
            fresh_uuid(node),
            member(body, "agreementId", str),
            tuple(activities),
            amount_text(body_amount(body, "amount", ROUND_FLOOR)),
            due_at,
        )
        undone_if_unheard("ledger", TakeBackDocument(INVOICE.kind, command.invoice_id))
        await ask(node, "ledger", command, statuses={"forbidden": 400})
        return created(render(_document(node, INVOICE, command.invoice_id)))


def _invoices_only(api: Blueprint, node: Node) -> None:
    @api.post("/invoices/<invoice_id>/cancel")
    async def cancel(invoice_id: str) -> Response:
        timeout_s = query_float("timeout", ACK_TIMEOUT_S)
        row = _document(node, INVOICE, invoice_id)
        await ask(node, "ledger", CancelInvoice(invoice_id), statuses={"forbidden": 400})

        def ended() -> str | None:
            status = _document(node, INVOICE, invoice_id).status
            return status if status not in (DocumentStatus.ISSUED, DocumentStatus.RECEIVED) else None

        status = await until(node, [INVOICE.feed], ended, timeout_s)
        if status is None:
            raise ApiError(504, f"no answer from {_agreement(node, row).peer} within {timeout_s:g} s")
        if status in (DocumentStatus.ACCEPTED, DocumentStatus.SETTLED):
            raise ApiError(409, f"the invoice is {status.lower()} already")
        return null()

    @api.post("/invoices/<invoice_id>/reject")
    async def reject(invoice_id: str) -> Response:
        query_float("timeout", ACK_TIMEOUT_S)
        body = await exact_body()
        reason = member(body, "rejectionReason", str)
        if reason not in REJECTION_REASONS:
            raise ApiError(400, f"field `rejectionReason`: expected one of {', '.join(REJECTION_REASONS)}")
        accepted = amount_text(body_amount(body, "totalAmountAccepted"))
        text = member(body, "message", str, None)
        rejection = RejectionBody(reason, accepted, text[:MAX_MESSAGE_CHARS] if text else None)
        _document(node, INVOICE, invoice_id)
        command = RejectInvoice(invoice_id, encode_body(rejection).decode())
        await ask(node, "ledger", command, statuses={"forbidden": 400})
        return null()

    @api.get("/invoices/<invoice_id>/payments")
    async def invoice_payments(invoice_id: str) -> Response:
        row = _document(node, INVOICE, invoice_id)
        return respond_json(
            [render_payment(node, payment) for payment in payments_of(node, row.agreement_id, listed(node, "ledger", "payment/"))]
        )


def _not_there(api: Blueprint) -> None:
    @api.post("/debitNotes/<document_id>/cancel")
    @api.post("/debitNotes/<document_id>/reject")
    @api.get("/debitNotes/<document_id>/payments")
    async def not_there(document_id: str) -> Response:
        raise ApiError(501, None)


def _usage(body: dict[str, Any]) -> tuple[int | float, ...] | None:
    """Return the counters of a debit note's body. Raises `ApiError` 400."""
    usage = member(body, "usageCounterVector", list, None)
    if usage is None:
        return None
    if len(usage) > MAX_USAGE_COUNTERS or any(isinstance(x, bool) or not isinstance(x, int | Decimal) for x in usage):
        raise ApiError(400, f"field `usageCounterVector`: expected an array of at most {MAX_USAGE_COUNTERS} numbers")
    if any(not -MAX_COUNTER <= x <= MAX_COUNTER for x in usage):
        raise ApiError(400, f"field `usageCounterVector`: expected numbers between -{MAX_COUNTER:g} and {MAX_COUNTER:g}")
    return tuple(x if isinstance(x, int) and abs(x) < 2**63 else float(x) for x in usage)  # messages hold 64 bits


def render(row: PaymentDocumentRow) -> dict[str, Any]:
    """Return a debit note or an invoice in the form of the API."""
    return _form(*_with_body(row))


def _with_body(row: PaymentDocumentRow) -> tuple[PaymentDocumentRow, DebitNoteBody | InvoiceBody]:
    return row, body_of(row)


def _form(row: PaymentDocumentRow, body: DebitNoteBody | InvoiceBody) -> dict[str, Any]:
    form = json_form(body)
    for name in ("timestamp", "paymentDueDate"):
        if name in form:
            form[name] = timestamp_text(timestamp(form[name]))
    return {**form, "status": row.status}


def explained(node: Node, kind: DocumentNames, row: PaymentDocumentRow) -> dict[str, Any]:
    """Return where a document stands and, in words, what it waits for."""
    agreement = _agreement(node, row)
    order = node.system.rows("ledger").get(f"order/{row.kind}:{row.document_id}")
    payments = payments_of(node, row.agreement_id, listed(node, "ledger", "payment/"))
    lost = lost_of(node, payments)
    return {
        kind.id_field: row.document_id,
        "role": row.role,
        "status": row.status,
        "amount": row.amount,
        "waiting": waiting(node.system.rows("ledger"), row) or "; ".join(lost.values()),
        "changed": timestamp_text(row.changed_at),
        "agreement": {"agreementId": row.agreement_id, "accepted": agreement.accepted, "paid": agreement.paid},
        "ordered": order.amount if order is not None else None,
        "payments": [
            {"paymentId": p.payment_id, "state": p.state, "transaction": p.tx_hash, "amount": p.amount,
             "reason": lost.get(p.tx_hash, p.reason)}
            for p in payments
        ],
    }  # fmt: skip


def event_form(kind: DocumentNames, event: DocumentEvent, at: float) -> dict[str, Any]:
    """Return an event of a debit note or an invoice in the form of the API. Raises `Violation` for a damaged one."""
    rejection = {}
    if event.what == DocumentStatus.REJECTED and event.detail:
        rejection = {"rejection": json_form(decode_body(RejectionBody, event.detail.encode()))}
    return {
        kind.id_field: event.document_id,
        "eventDate": timestamp_text(at),
        "eventType": kind.prefix + EVENTS[event.what],
        **rejection,
    }


def _wanted() -> dict[str, set[str]]:
    """The event types that the request wants to see, by our role in the document."""
    wanted = {}
    for role, header in HEADERS.items():
        names = {name.strip().upper() for name in request.headers.get(header, DEFAULTS[role]).split(",") if name.strip()}
        if strange := names - FILTERS:
            raise ApiError(400, f"header {header}: {sorted(strange)[0][:40]!r} is none of {', '.join(sorted(FILTERS))}")
        wanted[role] = names & set(EVENTS)
    return wanted


def _document(node: Node, kind: DocumentNames, document_id: str) -> PaymentDocumentRow:
    row: PaymentDocumentRow | None = node.system.rows("ledger").get(f"{kind.kind}/{document_id}")
    if row is None:
        raise ApiError(404, None)
    return row


def _agreement(node: Node, row: PaymentDocumentRow) -> LedgerAgreementRow:
    agreement: LedgerAgreementRow = node.system.rows("ledger")[f"agreement/{row.agreement_id}"]
    return agreement


def _get(api: Blueprint, path: str, handler: Callable[..., Any]) -> None:
    api.add_url_rule(path, f"get {path}", handler, methods=["GET"])


def _post(api: Blueprint, path: str, handler: Callable[..., Any]) -> None:
    api.add_url_rule(path, f"post {path}", handler, methods=["POST"])
