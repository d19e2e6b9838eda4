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

from typing import Any

from actors.kernel.draft import Draft
from actors.kernel.grammar import EDGE, ITSELF, PEER, On, Table, TableMachine
from actors.ledger import allocations, ceiling, documents, payee, payer, payments
from actors.ledger import recall as recalls
from actors.ledger.audit import objection
from actors.ledger.rows import (
    AllocationRow,
    LedgerActivityRow,
    LedgerAgreementRow,
    LedgerRow,
    OpenRow,
    OrderRow,
    PaymentDocumentRow,
    PaymentRow,
    TxClaimsRow,
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
    TakeBackDocument,
    TellAgain,
    VerifyAgain,
)
from protocol.negotiation import AgreementApproved, AgreementEnded
from protocol.types import PeerLost, Undelivered
from protocol.wallet import PaidBefore, PaidOut, PayOut, PayOutDelayed, TransferRejected, TransferVerified, VerifyTransfer

__all__ = [
    "AllocationRow",
    "Ledger",
    "LedgerActivityRow",
    "LedgerAgreementRow",
    "OpenRow",
    "OrderRow",
    "PaymentDocumentRow",
    "PaymentRow",
    "TxClaimsRow",
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

RESEND = (DocumentAccepted, InvoiceRejected, InvoiceCancelRequested, PaidBefore, PayOut, SignPayment, VerifyTransfer)


def _undelivered(draft: Draft, fact: Undelivered) -> None:
    """What carries a duty is sent again; a document and a payment say that they could not be delivered."""
    message = _sent(fact.body)
    if isinstance(message, DocumentSent):
        payee.undelivered(draft, message.document, fact.reason)
    elif isinstance(message, PaymentSent):
        payments.undelivered(draft, message.payment, fact.reason)
    elif isinstance(message, RESEND):
        draft.send(fact.to, message)


TABLE = Table(
    On(AgreementApproved, "negotiation", documents.agreement_approved),
    On(AgreementEnded, "negotiation", documents.agreement_ended),
    On(ActivityKnown, "activity", documents.activity_known),
    On(ActivityOver, "activity", documents.activity_over),
    On(ClockSeen, "clock", ceiling.clock_seen),
    On(CreateAllocation, EDGE, allocations.create),
    On(AmendAllocation, EDGE, allocations.amend),
    On(ReleaseAllocation, EDGE, allocations.release),
    On(AllocationTimeout, ITSELF, allocations.timeout),
    On(IssueDebitNote, EDGE, payee.issue_debit_note),
    On(IssueInvoice, EDGE, payee.issue_invoice),
    On(SendDocument, EDGE, payee.send_document),
    On(CancelInvoice, EDGE, payee.cancel_invoice),
    On(TakeBackDocument, EDGE, payee.take_back),
    On(AcceptDocument, EDGE, payer.accept),
    On(RejectInvoice, EDGE, payer.reject_invoice),
    On(DocumentSent, PEER, payer.document_sent),
    On(InvoiceCancelRequested, PEER, payer.cancel_requested),
    On(DocumentReceived, PEER, payee.document_received),
    On(DocumentRefused, PEER, payee.document_refused),
    On(DocumentAccepted, PEER, payee.document_accepted),
    On(InvoiceRejected, PEER, payee.invoice_rejected),
    On(InvoiceCancelled, PEER, payee.invoice_cancelled),
    On(PaidOut, "wallet", payments.paid_out),
    On(PayOutDelayed, "wallet", payments.pay_out_delayed),
    On(PaymentSigned, "signer", payments.payment_signed),
    On(PaymentAcknowledged, PEER, payments.payment_acknowledged),
    On(SendPaymentAgain, ITSELF, payments.send_payment_again),
    On(PaymentSent, PEER, payments.payment_sent),
    On(TransferVerified, "chain", payments.transfer_verified),
    On(TransferRejected, "chain", payments.transfer_rejected),
    On(VerifyAgain, ITSELF, payments.verify_again),
    On(Recall, EDGE, recalls.recall),
    On(TellAgain, ITSELF, recalls.tell_again),
    On(AskAgain, PEER, recalls.ask_again),
    On(Recalled, PEER, recalls.recalled),
    On(PeerLost, ITSELF, recalls.peer_lost),
    On(Undelivered, ITSELF, _undelivered),
)
#: What `Undelivered` may hold: ledgers say to one another what they hear, and ask the ports.
_sent = Decoder[Any](TABLE.peer | PaidBefore | PayOut | SignPayment | VerifyTransfer)


class Ledger(TableMachine):
    """The machine; see the module's docstring."""

    name = "ledger"
    table = TABLE
    rows = LedgerRow
