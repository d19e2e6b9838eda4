"""Rows of the ledger and the pure readings of them that edges use too.

Keys: `allocation/<id>`, `agreement/<id>`, `activity/<id>`, `debit-note/<id>`, `invoice/<id>`, `order/<kind>:<id>`,
`payment/<id>`, `tx/<hash>/<payer>/<payee>` (several platforms may be one chain, so none is named), `owed/<platform>`,
`forgotten/<kind>/<id>`, and the indexes `open/<agreement>/<kind>/<id>` of accepted documents that are not settled,
`ordered/<agreement>/<kind>:<id>` of orders and `made/<hash>/<peer>/<payee>` of the payments that tell of a transfer. The payer's
own: `pricing/<agreement>`, `refused/<agreement>`, and `clock`. On both sides: `told/<peer>`, and the index
`in/<agreement>/<activity>`. All amounts are decimal text in GLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Context, Decimal, Inexact
from enum import StrEnum
from typing import Any, Protocol

from protocol.amounts import minus, total_of
from protocol.ledger import AcceptanceBody, encode_body
from protocol.payment_terms import address_key
from protocol.property_names import LOCAL_CHAIN, PAYMENT_VERSION
from protocol.states import DocumentKind, DocumentStatus, Party
from protocol.types import Message, digest

FEEDS = {DocumentKind.DEBIT_NOTE: "debit-notes", DocumentKind.INVOICE: "invoices"}
_EXACT = Context(prec=120, traps=[Inexact])


class PaymentState(StrEnum):
    """Of a payment made (payer) or claimed (payee)."""

    SIGNING = "SIGNING"  # payer: final on chain, not signed yet
    SENT = "SENT"  # payer: on its way to the payee
    ACKNOWLEDGED = "ACKNOWLEDGED"  # payer: the payee has booked it
    VERIFYING = "VERIFYING"  # payee: the transaction is being looked at
    VERIFIED = "VERIFIED"  # payee: booked
    REFUSED = "REFUSED"  # either: the payee does not take it, with the reason


class AllocationRow(Message, frozen=True, tag="Allocation"):
    """Money set aside. What is left is `total` - `spent` while it lives and nothing after its release."""

    allocation_id: str
    address: str
    platform: str
    total: str
    spent: str
    created_at: float
    updated_at: float
    timeout_at: float
    extend_timeout_s: float | None = None
    released_at: float | None = None
    agent: str = ""  # the name of the app-key by which it was made


class LedgerAgreementRow(Message, frozen=True, tag="Agreement"):
    """The payment terms of an agreement and its sums. `fault` says why it cannot be billed, "" if it can."""

    agreement_id: str
    role: Party  # ours
    peer: str
    platform: str
    payee_addr: str
    payer_addr: str
    approved_at: float
    app_session_id: str | None
    fault: str = ""
    ended: bool = False
    accepted: str = "0"  # owed altogether
    paid: str = "0"  # final on chain (and, for the payee, verified)
    invoice_id: str = ""  # the newest that is neither rejected nor cancelled
    invoice_accepted: bool = False
    documents: int = 0  # notes and invoices received
    payments: int = 0  # claims of payment received
    document_bytes: int = 0  # of the documents received
    payment_bytes: int = 0  # of the claims


class LedgerActivityRow(Message, frozen=True, tag="Activity"):
    """Sums of one activity. `due` is the highest running total seen in a debit note."""

    activity_id: str
    agreement_id: str
    due: str = "0"
    accepted: str = "0"
    paid: str = "0"
    last_debit_note_id: str | None = None
    created_at: float = 0.0
    ended_at: float | None = None
    set_back_s: float = 0.0  # of the node's clock altogether, when the activity was created and when it ended
    ended_set_back_s: float = 0.0


class PricingRow(Message, frozen=True, tag="Pricing"):
    """What an agreement costs, as its payer checks it. `coeffs`: a price for each counter, last the start price."""

    agreement_id: str
    coeffs: tuple[float, ...]
    vector: tuple[str, ...]
    threads: float
    mem_gib: float | None
    storage_gib: float | None
    cost_cap: float | None
    fault: str = ""  # why the prices cannot be used


class ClockRow(Message, frozen=True):
    """The wall clock and one that nobody sets, read together; `set_back_s`: what the first has lost against the other."""

    boot_id: str
    boot_s: float
    wall_s: float
    set_back_s: float = 0.0


class InRow(Message, frozen=True, tag="In"):
    """Index: an activity of an agreement."""


class RefusedDocument(Message, frozen=True):
    """A document that the payer did not take."""

    at: float
    kind: DocumentKind
    document_id: str
    amount: str
    reason: str


class RefusedDocumentsRow(Message, frozen=True, tag="RefusedDocuments"):
    """The last ones of an agreement, newest last."""

    documents: tuple[RefusedDocument, ...] = ()


class PaymentDocumentRow(Message, frozen=True, tag="PaymentDocument"):
    """A debit note or an invoice, as signed. `waiting` says in words what is to happen next, or why it does not."""

    kind: DocumentKind
    document_id: str
    role: Party
    agreement_id: str
    activity_id: str  # "" for an invoice
    amount: str
    status: DocumentStatus
    body: bytes
    signature: bytes
    issued_at: float
    changed_at: float
    waiting: str = ""
    refused: bool = False  # the peer would not take it
    rejection: str = ""
    acceptance: bytes = b""  # the payer's signature over the acceptance
    most: str = ""  # the highest amount that the payer would have taken, where it refused this one
    cancelling: bool = False  # the payer is asked to agree: what is sent behind that question would come after its answer


class OrderRow(Message, frozen=True, tag="Order"):
    """What accepting a document added to the debt; named by the document, so there is at most one."""

    kind: DocumentKind
    document_id: str
    agreement_id: str
    activity_id: str
    allocation_id: str
    platform: str
    peer: str
    payer_addr: str
    payee_addr: str
    amount: str
    ordered_at: float
    payment_id: str = ""  # set once it is paid
    covered: bool = False  # by a payment of a time that this node's disk had forgotten: nobody pays it again


class PaymentRow(Message, frozen=True, tag="Payment"):
    """A payment made (payer) or claimed (payee). States: SIGNING SENT ACKNOWLEDGED REFUSED | VERIFYING VERIFIED REFUSED."""

    payment_id: str
    role: Party
    peer: str
    state: PaymentState
    body: bytes
    signature: bytes
    tx_hash: str
    platform: str
    amount: str
    recorded_at: float
    order_ids: tuple[str, ...] = ()
    reason: str = ""
    tries: int = 0
    digest: str = ""  # of the body where only the head of it is kept: the payment was refused for good
    unbooked: tuple[str, ...] = ()  # agreements and activities of it that this node's disk does not know (any more)
    recalled: bool = False  # payer: given back by the payee after a restore; `order_ids` may not be all that it paid
    instead: str = ""  # payer: the payment that tells of the same transfer, and counts; this one does not


class ForgottenRow(Message, frozen=True, tag="Forgotten"):
    """A document that this node has signed, and whose agreement its disk has forgotten."""

    agreement_id: str
    peer: str


class TxClaimsRow(Message, frozen=True, tag="TxClaims"):
    """What has been claimed of one transaction for one payee, in order: (payment id, amount), verified or in question."""

    claims: tuple[tuple[str, str], ...]


class MadeRow(Message, frozen=True, tag="Made"):
    """The payer's payments that tell a payee of one transfer: more than one where its disk went back in time."""

    payment_ids: tuple[str, ...] = ()


class OpenRow(Message, frozen=True, tag="Open"):
    """An entry of an index: an accepted document that waits for its money, or one that was ordered."""

    kind: DocumentKind
    document_id: str


class StoredRow(Message, frozen=True, tag="Stored"):
    """`stored/<peer>`: how many bytes of a peer's documents were kept, less what its allowance of each day has made good."""

    size: float
    at: float


class ToldRow(Message, frozen=True, tag="Told"):
    """When a peer was last told everything again. There is one for each peer of an agreement."""

    at: float = 0.0


class OwedRow(Message, frozen=True, tag="Owed"):
    """The sum of a platform's orders that are not paid yet: this money is still in the account, and not free."""

    amount: str = "0"


LedgerRow = (
    AllocationRow
    | LedgerAgreementRow
    | LedgerActivityRow
    | PricingRow
    | ClockRow
    | InRow
    | RefusedDocumentsRow
    | PaymentDocumentRow
    | OrderRow
    | PaymentRow
    | TxClaimsRow
    | ForgottenRow
    | MadeRow
    | OpenRow
    | OwedRow
    | StoredRow
    | ToldRow
)


def remaining(allocation: AllocationRow) -> Decimal:
    """Return what an allocation still holds."""
    return Decimal(0) if allocation.released_at is not None else minus(allocation.total, allocation.spent)


class HasPrefix(Protocol):
    """Committed rows or a draft of them."""

    def prefix(self, prefix: str) -> Iterator[tuple[str, Any]]: ...


def reserved(rows: HasPrefix, platform: str, besides: str = "") -> Decimal:
    """Return what live allocations hold on a platform, leaving out the one with id `besides`."""
    return total_of(
        remaining(row) for _, row in rows.prefix("allocation/") if row.platform == platform and row.allocation_id != besides
    )


def owed(rows: HasPrefix, platform: str) -> Decimal:
    """Return what was accepted on a platform and is not paid yet."""
    key = f"owed/{platform}"
    return total_of(row.amount for found, row in rows.prefix(key) if found == key)


def paid_since(rows: HasPrefix, platform: str, since: float) -> Decimal:
    """Return what this node's payments on a platform come to which became final at `since` or later."""
    return total_of(
        row.amount
        for _, row in rows.prefix("payment/")
        if row.role == Party.PAYER and row.platform == platform and row.recorded_at >= since and not row.instead
    )


def acceptance_of(document: PaymentDocumentRow) -> bytes:
    """Return the body that the payer signs to accept `document`."""
    return encode_body(
        AcceptanceBody(
            kind=document.kind,
            document_id=document.document_id,
            digest=digest(document.body),
            total_amount_accepted=document.amount,
        )
    )


def decorations(allocations: Sequence[AllocationRow], local_chain: str | None = None) -> dict[str, list[object]]:
    """Return the demand properties and constraints by which a provider and these allocations find a common platform.

    A single allocation gives a bare constraint: SDKs split every string at its operator and choke on a compound one.
    `local_chain` names the dev chain where the money is on one: a provider on another would never see it.
    """
    pairs = list(dict.fromkeys((address_key(a.platform), a.address) for a in allocations))
    tests = [f"({key}=*)" for key in dict.fromkeys(key for key, _ in pairs)]
    platforms = tests[0] if len(tests) == 1 else "(|\n  " + "\n  ".join(tests) + "\n)"
    return {
        "properties": [
            *({"key": key, "value": value} for key, value in pairs),
            {"key": PAYMENT_VERSION, "value": "3"},
            *([{"key": LOCAL_CHAIN, "value": local_chain}] if local_chain else []),
        ],
        "constraints": [
            platforms,
            f"({PAYMENT_VERSION}>1)",
            *([f"({LOCAL_CHAIN}={local_chain})"] if local_chain else []),
        ],
    }
