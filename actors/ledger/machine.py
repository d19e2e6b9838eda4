"""The ledger: allocations, debit notes, invoices and payments, for both sides of an agreement.

Facts come from negotiation (`AgreementApproved`) and activity (`ActivityKnown`), commands from REST, documents from the
ledger of the peer, `PaidOut` from the wallet, `TransferVerified` from the chain port. What it orders of the wallet is
named by the accepted document, so nothing is paid twice; what a payer claims is checked on chain against everything
claimed before of the same transaction.

Flow of one invoice (payee P, payer R): P issues and signs -> `DocumentSent` -> R stores, receipt -> R accepts: document,
allocation and order in one step -> `DocumentAccepted`; `PayOut` to the wallet -> `PaidOut` -> settled at R, payment
signed -> `PaymentSent` -> P asks the chain -> settled at P -> `PaymentAcknowledged`.

The machine has its parts in `allocations`, `documents` (`_payee`, `_payer`), `payments`,
`recall`, its rows in `rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from actors.kernel.machine import Meta, Reply, Rows, Step
from actors.kernel.sources import EDGE, check_source
from actors.kernel.typed_draft import Declined, MoneyDraft
from actors.ledger import allocations, ceiling, documents, payee, payer, payments
from actors.ledger import recall as recalls
from actors.ledger.audit import objection
from actors.ledger.rows import (
    Activity,
    Agreement,
    Allocation,
    LedgerRow,
    Open,
    Order,
    Payment,
    PaymentDocument,
    TxClaims,
    acceptance_of,
    decorations,
    owed,
    paid_since,
    remaining,
    reserved,
)
from protocol.activity import ActivityKnown, ActivityOver
from protocol.amounts import minus, total_of
from protocol.codec import Decoder
from protocol.ledger import (
    AcceptDocument,
    AllocationTimeout,
    AmendAllocation,
    AskAgain,
    CancelInvoice,
    ClockSeen,
    CreateAllocation,
    DocumentAccepted,
    DocumentReceived,
    DocumentRefused,
    DocumentSent,
    InvoiceCancelled,
    InvoiceCancelRequested,
    InvoiceRejected,
    IssueDebitNote,
    IssueInvoice,
    PaymentAcknowledged,
    PaymentSent,
    PaymentSigned,
    Recall,
    Recalled,
    RejectInvoice,
    ReleaseAllocation,
    SendDocument,
    SendPaymentAgain,
    SignPayment,
    TellAgain,
    VerifyAgain,
)
from protocol.negotiation import AgreementApproved, AgreementEnded
from protocol.types import PeerLost, Undelivered
from protocol.wallet import PaidOut, PayOut, PayOutDelayed, TransferRejected, TransferVerified, VerifyTransfer

__all__ = [
    "Activity",
    "Agreement",
    "Allocation",
    "Ledger",
    "Open",
    "Order",
    "Payment",
    "PaymentDocument",
    "TxClaims",
    "acceptance_of",
    "decorations",
    "minus",
    "objection",
    "owed",
    "paid_since",
    "remaining",
    "reserved",
    "total_of",
]

RESEND = (DocumentAccepted, InvoiceRejected, InvoiceCancelRequested, PayOut, SignPayment, VerifyTransfer)
_sent = Decoder[Any](
    DocumentSent
    | DocumentReceived
    | DocumentRefused
    | DocumentAccepted
    | InvoiceRejected
    | InvoiceCancelRequested
    | InvoiceCancelled
    | PaymentSent
    | PaymentAcknowledged
    | PayOut
    | SignPayment
    | VerifyTransfer
    | AskAgain
    | Recalled
)


def _undelivered(draft: MoneyDraft, me: str, fact: Undelivered) -> None:
    """What carries a duty is sent again; a document and a payment say that they could not be delivered."""
    message = _sent(fact.body)
    if isinstance(message, DocumentSent):
        payee.undelivered(draft, message.document, fact.reason)
    elif isinstance(message, PaymentSent):
        payments.undelivered(draft, message.payment, fact.reason)
    elif isinstance(message, RESEND):
        draft.send(fact.to, message)


_Handler = Callable[[MoneyDraft, str, Any], None]

_HANDLERS: dict[type, _Handler] = {
    AgreementApproved: documents.agreement_approved,
    AgreementEnded: documents.agreement_ended,
    ActivityKnown: documents.activity_known,
    ActivityOver: documents.activity_over,
    ClockSeen: ceiling.clock_seen,
    CreateAllocation: allocations.create,
    AmendAllocation: allocations.amend,
    ReleaseAllocation: allocations.release,
    AllocationTimeout: allocations.timeout,
    IssueDebitNote: payee.issue_debit_note,
    IssueInvoice: payee.issue_invoice,
    SendDocument: payee.send_document,
    CancelInvoice: payee.cancel_invoice,
    AcceptDocument: payer.accept,
    RejectInvoice: payer.reject_invoice,
    DocumentSent: payer.document_sent,
    InvoiceCancelRequested: payer.cancel_requested,
    DocumentReceived: payee.document_received,
    DocumentRefused: payee.document_refused,
    DocumentAccepted: payee.document_accepted,
    InvoiceRejected: payee.invoice_rejected,
    InvoiceCancelled: payee.invoice_cancelled,
    PaidOut: payments.paid_out,
    PayOutDelayed: payments.pay_out_delayed,
    PaymentSigned: payments.payment_signed,
    PaymentAcknowledged: payments.payment_acknowledged,
    SendPaymentAgain: payments.send_payment_again,
    PaymentSent: payments.payment_sent,
    TransferVerified: payments.transfer_verified,
    TransferRejected: payments.transfer_rejected,
    VerifyAgain: payments.verify_again,
    Recall: recalls.recall,
    TellAgain: recalls.tell_again,
    AskAgain: recalls.ask_again,
    Recalled: recalls.recalled,
    PeerLost: recalls.peer_lost,
    Undelivered: _undelivered,
}

#: Who alone on this node may say what; the rest is said by ledgers of other nodes.
_SOURCES: dict[type, str] = {
    AgreementApproved: "negotiation",
    AgreementEnded: "negotiation",
    ActivityKnown: "activity",
    ActivityOver: "activity",
    ClockSeen: "clock",
    CreateAllocation: EDGE,
    AmendAllocation: EDGE,
    ReleaseAllocation: EDGE,
    IssueDebitNote: EDGE,
    IssueInvoice: EDGE,
    SendDocument: EDGE,
    CancelInvoice: EDGE,
    AcceptDocument: EDGE,
    RejectInvoice: EDGE,
    PaidOut: "wallet",
    PayOutDelayed: "wallet",
    PaymentSigned: "signer",
    TransferVerified: "chain",
    TransferRejected: "chain",
    AllocationTimeout: "ledger",
    VerifyAgain: "ledger",
    SendPaymentAgain: "ledger",
    Undelivered: "ledger",
    PeerLost: "ledger",
    TellAgain: "ledger",
    Recall: EDGE,
}


class Ledger:
    """The machine; see the module's docstring."""

    name = "ledger"
    local = (
        AgreementApproved
        | AgreementEnded
        | ActivityKnown
        | ActivityOver
        | ClockSeen
        | CreateAllocation
        | AmendAllocation
        | ReleaseAllocation
        | AllocationTimeout
        | IssueDebitNote
        | IssueInvoice
        | SendDocument
        | CancelInvoice
        | AcceptDocument
        | RejectInvoice
        | PaidOut
        | PayOutDelayed
        | PaymentSigned
        | SendPaymentAgain
        | TransferVerified
        | TransferRejected
        | VerifyAgain
        | Recall
        | TellAgain
        | Undelivered
        | PeerLost
    )
    peer = (
        DocumentSent
        | InvoiceCancelRequested
        | DocumentReceived
        | DocumentRefused
        | DocumentAccepted
        | InvoiceRejected
        | InvoiceCancelled
        | PaymentSent
        | PaymentAcknowledged
        | AskAgain
        | Recalled
    )
    rows = LedgerRow
    sources = _SOURCES

    def __init__(self, node_id: str) -> None:
        self._me = node_id

    def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
        """Carry out a message. An expected no changes nothing and is the reply. Raises `Violation`."""
        check_source(message, meta, self._me, self.name, self.sources)
        draft = MoneyDraft(rows, meta)
        try:
            _HANDLERS[type(message)](draft, self._me, message)
        except Declined as no:
            return Step(effects=[Reply(no.refusal)])
        return draft.step()
