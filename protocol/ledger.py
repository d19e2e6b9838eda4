"""What is said about allocations, debit notes, invoices and payments. Handled by `actors/ledger/machine.py`.

Debit notes, invoices, acceptances and payments are signed documents whose bodies are the JSON forms below: the issuer
signs notes and invoices, the payer signs acceptances and payments. Amounts are decimal strings in GLM, times in bodies
are RFC 3339, times in commands are seconds since the epoch. `kind` is "debit-note" or "invoice" throughout.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec

from protocol.signing import Document
from protocol.states import Party
from protocol.types import Message, Violation, amount, timestamp

MAX_USAGE_COUNTERS = 64
MAX_ACTIVITIES = 1000  # of one invoice
MAX_ID_CHARS = 80
MAX_MESSAGE_CHARS = 2000  # of a rejection
MAX_COUNTER = 1e300  # whatever a counter counts, sums of it stay finite
MAX_DOCUMENT_BYTES = 256 * 1024
REJECTION_REASONS = ("UNSOLICITED_SERVICE", "BAD_SERVICE", "INCORRECT_AMOUNT")

Id = Annotated[str, msgspec.Meta(pattern=rf"^[0-9A-Za-z_-]{{1,{MAX_ID_CHARS}}}\Z")]
Short = Annotated[str, msgspec.Meta(max_length=100)]  # addresses, platforms, amounts, times: what they hold is checked besides


# -- bodies of signed documents
class DebitNoteBody(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True, omit_defaults=True):
    """A running total for one activity. `status` is no part of what is signed."""

    debit_note_id: Id
    issuer_id: Short
    recipient_id: Short
    payee_addr: Short
    payer_addr: Short
    payment_platform: Short
    timestamp: Short
    agreement_id: Id
    activity_id: Id
    total_amount_due: Short
    previous_debit_note_id: Id | None = None
    usage_counter_vector: Annotated[tuple[int | float, ...], msgspec.Meta(max_length=MAX_USAGE_COUNTERS)] | None = None
    payment_due_date: Short | None = None


class InvoiceBody(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """The total of an agreement."""

    invoice_id: Id
    issuer_id: Short
    recipient_id: Short
    payee_addr: Short
    payer_addr: Short
    payment_platform: Short
    timestamp: Short
    agreement_id: Id
    activity_ids: Annotated[tuple[Id, ...], msgspec.Meta(max_length=MAX_ACTIVITIES)]
    amount: Short
    payment_due_date: Short


class AcceptanceBody(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """The payer's word that it owes what a document says; `digest` names the very bytes that were accepted."""

    kind: Short
    document_id: Id
    digest: Short
    total_amount_accepted: Short


class AgreementPayment(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """The part of a payment that is for an agreement as such (its invoice)."""

    agreement_id: Id
    amount: Short


class ActivityPayment(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """The part of a payment that is for an activity (its debit notes)."""

    activity_id: Id
    amount: Short


class PaymentBody(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """The payer's statement of what a transaction pays. `details` is the base64 of the 32 bytes of the hash."""

    payment_id: Id
    payer_id: Short
    payee_id: Short
    payer_addr: Short
    payee_addr: Short
    payment_platform: Short
    amount: Short
    timestamp: Short
    agreement_payments: tuple[AgreementPayment, ...]
    activity_payments: tuple[ActivityPayment, ...]
    details: Short


class RejectionBody(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True, omit_defaults=True):
    """Why an invoice is not paid; unsigned."""

    rejection_reason: Short
    total_amount_accepted: Short
    message: Annotated[str, msgspec.Meta(max_length=MAX_MESSAGE_CHARS)] | None = None


Body = DebitNoteBody | InvoiceBody | AcceptanceBody | PaymentBody | RejectionBody
B = TypeVar("B", DebitNoteBody, InvoiceBody, AcceptanceBody, PaymentBody, RejectionBody)


def encode_body(body: Body) -> bytes:
    """Return the JSON that gets signed."""
    return msgspec.json.encode(body)


def decode_body(kind: type[B], raw: bytes) -> B:
    """Return the typed body of a document: every member known, bounded, finite, and fit to be shown again.

    Raises `Violation` for bytes that are none.
    """
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise Violation(f"a document of {len(raw)} bytes is over the limit of {MAX_DOCUMENT_BYTES}")
    try:
        body = msgspec.json.decode(raw, type=kind)
        _check(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise Violation(f"malformed {kind.__name__}: {str(error)[:200]}") from None
    return body


def json_form(body: Body) -> dict[str, Any]:
    """Return a body as JSON objects for agents, with their names."""
    form: dict[str, Any] = msgspec.to_builtins(body)
    return form


def _check(body: Body) -> None:
    """Raises `ValueError` for amounts, times and numbers that are none."""
    moments: tuple[str | None, ...] = ()
    match body:
        case DebitNoteBody():
            amounts: tuple[str, ...] = (body.total_amount_due,)
            moments = (body.timestamp, body.payment_due_date)
            if any(not -MAX_COUNTER <= number <= MAX_COUNTER for number in body.usage_counter_vector or ()):
                raise ValueError(f"a usage counter is not between -{MAX_COUNTER:g} and {MAX_COUNTER:g}")
        case InvoiceBody():
            amounts, moments = (body.amount,), (body.timestamp, body.payment_due_date)
        case PaymentBody():
            amounts, moments = (body.amount, *(part.amount for part in body.agreement_payments)), (body.timestamp,)
            amounts += tuple(part.amount for part in body.activity_payments)
        case AcceptanceBody():
            amounts = (body.total_amount_accepted,)
        case RejectionBody():
            amounts = (body.total_amount_accepted,)
            if body.rejection_reason not in REJECTION_REASONS:
                raise ValueError(f"a rejection's reason is none of {', '.join(REJECTION_REASONS)}")
    for text in amounts:
        amount(text)
    for moment in moments:
        if moment is not None:
            timestamp(moment)


# -- commands of the node's edges; answered by `Done` or `Refused`
class CreateAllocation(Message, frozen=True):
    """Set money aside. `balance` is the wallet's on the platform as just read; None where it is not to be checked."""

    allocation_id: str
    address: str  # as the caller wrote it; SDKs compare it as text
    platform: str
    total: str
    balance: str | None
    timeout_at: float | None = None  # None: ten years
    extend_timeout_s: float | None = None  # each use moves the timeout at least this far ahead
    agent: str = ""  # whose it is: the name of an app-key


class AmendAllocation(Message, frozen=True):
    """Change total or timeout; None leaves it. `balance` as in `CreateAllocation`."""

    allocation_id: str
    total: str | None
    timeout_at: float | None
    balance: str | None


class ReleaseAllocation(Message, frozen=True):
    """Free what is left of an allocation, for good."""

    allocation_id: str


class IssueDebitNote(Message, frozen=True):
    """Write a debit note, not sent yet."""

    debit_note_id: str
    activity_id: str
    total: str
    usage: tuple[int | float, ...] | None = None
    due_at: float | None = None


class IssueInvoice(Message, frozen=True):
    """Write an invoice, not sent yet."""

    invoice_id: str
    agreement_id: str
    activity_ids: tuple[str, ...]
    amount: str
    due_at: float


class TakeBackDocument(Message, frozen=True):
    """Undo an issued document that nobody heard of: as if it had never been. Nothing happens to one that was sent."""

    kind: str
    document_id: str


class SendDocument(Message, frozen=True):
    """Send an issued document; `document` is its body signed by this node. The peer's receipt changes its status."""

    kind: str
    document_id: str
    document: Document
    timeout_s: float


class AcceptDocument(Message, frozen=True):
    """Accept a received document; `acceptance` is the matching `AcceptanceBody`, signed by this node."""

    kind: str
    document_id: str
    amount: str
    allocation_id: str
    acceptance: Document


class RejectInvoice(Message, frozen=True):
    """Refuse to pay an invoice; `rejection` is JSON: rejectionReason, totalAmountAccepted, message."""

    invoice_id: str
    rejection: str


class CancelInvoice(Message, frozen=True):
    """Withdraw an invoice; if it was sent, the payer must agree."""

    invoice_id: str


class Recall(Message, frozen=True):
    """This node was restored from a backup: ask all peers what was signed since."""


# -- payee -> payer
class DocumentSent(Message, frozen=True):
    """A debit note or an invoice."""

    document: Document


class InvoiceCancelRequested(Message, frozen=True):
    """The payee withdraws an invoice; an acceptance that is under way wins."""

    invoice_id: str


class PaymentAcknowledged(Message, frozen=True):
    """The payee has looked at a payment: found on chain and booked, or refused and why."""

    payment_id: str
    verified: bool
    reason: str = ""


# -- payer -> payee
class DocumentReceived(Message, frozen=True):
    """Receipt for a document."""

    kind: str
    document_id: str


class DocumentRefused(Message, frozen=True):
    """The payer does not take the document, and why. `most`: the highest amount that it would take, if it is about that."""

    kind: str
    document_id: str
    reason: str
    most: str = ""


class DocumentAccepted(Message, frozen=True):
    """The signed acceptance of a document."""

    acceptance: Document


class InvoiceRejected(Message, frozen=True):
    """The payer will not pay."""

    invoice_id: str
    rejection: str  # JSON


class InvoiceCancelled(Message, frozen=True):
    """The payer agrees that an invoice is withdrawn."""

    invoice_id: str


class PaymentSent(Message, frozen=True):
    """What a transaction paid, signed by the payer."""

    payment: Document


# -- between ledgers, where a disk went back in time
class AskAgain(Message, frozen=True):
    """Tell me again what we have signed to each other: I may have forgotten some of it."""


class TellAgain(Message, frozen=True):
    """A ledger's timer: a peer may be told everything again."""

    peer: str


class Recalled(Message, frozen=True):
    """A note, invoice, acceptance or payment that the recipient itself has signed, given back to it."""

    document: Document


# -- ledger <-> signer port
class SignPayment(Message, frozen=True):
    """ledger -> signer: sign this `PaymentBody` with the node's key. A repeat gives the same answer."""

    payment_id: str
    body: bytes


class PaymentSigned(Message, frozen=True):
    """signer -> ledger: the signed document."""

    payment_id: str
    payment: Document


# -- clock -> ledger
class ClockSeen(Message, frozen=True):
    """What a clock says that nobody sets (`CLOCK_BOOTTIME`), since which start of the machine, and the wall clock."""

    boot_id: str
    boot_s: float
    wall_s: float


# -- the ledger's own timers
class AllocationTimeout(Message, frozen=True):
    """An allocation may be at its end."""

    allocation_id: str


class VerifyAgain(Message, frozen=True):
    """The chain port has not answered about a payment (it may have been restarted): ask again."""

    payment_id: str


class SendPaymentAgain(Message, frozen=True):
    """The payee has refused a payment or could not be reached: try again."""

    payment_id: str


# -- events of the feeds "debit-notes", "invoices", "payments"
class DocumentEvent(Message, frozen=True):
    """Something happened to a document: RECEIVED ACCEPTED REJECTED CANCELLED SETTLED, or REFUSED, seen by nobody outside."""

    document_id: str
    what: str
    role: Party  # ours: "payee" | "payer"
    app_session_id: str | None
    detail: str = ""  # the rejection, as JSON


class PaymentEvent(Message, frozen=True):
    """A payment is final: sent by us, or verified."""

    payment_id: str
    role: str
    platform: str
    app_session_ids: tuple[str, ...]
