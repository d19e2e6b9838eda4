"""Payments: the part of the ledger that turns final transfers into settled documents, on both nodes.

Payer: `PaidOut` -> documents settled, a `PaymentRow` signed and sent to the payee until it acknowledges.
Payee: `PaymentSent` -> the claim is reserved on the transaction's row, checked on chain, then booked. The reservation
comes before the question, so that two claims on one transaction cannot both be granted the same money.
"""

from __future__ import annotations

import base64
import binascii
import uuid
from collections.abc import Callable, Iterable
from decimal import Decimal

from msgspec.structs import replace

from actors.kernel.draft import Draft
from actors.ledger.documents import explain, keep, no_room, settle
from actors.ledger.parts import ids_of, known_parts, part_of
from actors.ledger.rows import (
    LedgerActivityRow,
    LedgerAgreementRow,
    MadeRow,
    OrderRow,
    OwedRow,
    PaymentRow,
    PaymentState,
    TxClaimsRow,
)
from protocol.amounts import minus, total_of
from protocol.ledger import (
    ActivityPayment,
    AgreementPayment,
    PaymentAcknowledged,
    PaymentBody,
    PaymentEvent,
    PaymentSent,
    PaymentSigned,
    SendPaymentAgain,
    SignPayment,
    VerifyAgain,
    decode_body,
    encode_body,
)
from protocol.signing import Document, verify
from protocol.states import DocumentKind, Party
from protocol.types import MAX_CLOCK_SKEW_S, Violation, address, amount, amount_text, digest, node_of, timestamp_text
from protocol.wallet import PaidOut, PayOutDelayed, TransferRejected, TransferVerified, VerifyTransfer

VERIFY_AGAIN_S, VERIFY_LAST_S = 60.0, 3600.0  # the chain port has it on disk: ever more rarely
RESEND_FIRST_S, RESEND_TRIES = 60.0, 7  # a refused payment is offered again after 1 min, 6 min, 36 min ...
MAX_PARTS = 5000  # agreements and activities of one payment
MAX_PAYMENTS = 50_000  # claimed for one agreement
MAX_PAYMENTS_BYTES = 16 * 1024 * 1024  # and of all of them together
MAX_CLAIMS = 100  # of one transaction
ANSWER_S = 24 * 3600.0  # to bring our word about a payment that is for nothing here


# -- the payer
def paid_out(draft: Draft, fact: PaidOut) -> None:
    """Orders are paid, final: settle what they cover and tell each payee. A repeat finds nothing left to do."""
    by_peer: dict[str, list[tuple[str, OrderRow]]] = {}
    for order_id in dict.fromkeys(fact.order_ids):
        order = draft.row(OrderRow, f"order/{order_id}")
        assert order is not None, f"the wallet paid {order_id}, which the ledger never ordered"
        if order.payment_id:
            continue
        assert (order.platform, order.payer_addr, order.payee_addr) == (fact.platform, fact.payer, fact.payee), order
        by_peer.setdefault(order.peer, []).append((order_id, order))
    for peer, orders in by_peer.items():
        _record_payment(draft, fact, peer, orders)


def _record_payment(draft: Draft, fact: PaidOut, peer: str, orders: list[tuple[str, OrderRow]]) -> None:
    if _told_before(draft, fact, peer, orders):
        return
    agreements = _sums((order.agreement_id, order.amount) for _, order in orders if not order.activity_id)
    activities = _sums((order.activity_id, order.amount) for _, order in orders if order.activity_id)
    total = amount_text(total_of(order.amount for _, order in orders))
    order_ids = tuple(order_id for order_id, _ in orders)
    payment_id = str(uuid.UUID(hex=digest("payment", fact.tx_hash, peer, fact.payee, *order_ids)[:32]))
    body = PaymentBody(
        payment_id=payment_id,
        payer_id=draft.me,
        payee_id=peer,
        payer_addr=fact.payer,
        payee_addr=fact.payee,
        payment_platform=fact.platform,
        amount=total,
        timestamp=timestamp_text(draft.now),
        agreement_payments=tuple(AgreementPayment(*pair) for pair in agreements),
        activity_payments=tuple(ActivityPayment(*pair) for pair in activities),
        details=base64.b64encode(bytes.fromhex(fact.tx_hash.removeprefix("0x"))).decode(),
    )
    raw = encode_body(body)
    row = PaymentRow(
        payment_id=payment_id,
        role=Party.PAYER,
        peer=peer,
        state=PaymentState.SIGNING,
        body=raw,
        signature=b"",
        tx_hash=fact.tx_hash,
        platform=fact.platform,
        amount=total,
        recorded_at=draft.now,
        order_ids=order_ids,
    )
    draft.put(f"payment/{payment_id}", row)
    made(draft, fact.tx_hash, peer, fact.payee, payment_id)
    mark_paid(draft, payment_id, orders)
    book(draft, body)
    draft.emit("payments", payment_event(draft, row))  # in one step with what it settles: who hears of that looks for the payment
    draft.send("signer", SignPayment(payment_id, raw))


def _told_before(draft: Draft, fact: PaidOut, peer: str, orders: list[tuple[str, OrderRow]]) -> bool:
    """After a restore the payee may have told of this transfer before the wallet does: its payment is not booked twice."""
    for payment in payments_of(draft, fact.tx_hash, peer, fact.payee):
        known = [draft.row(OrderRow, f"order/{order_id}") for order_id in payment.order_ids]
        rest = minus(payment.amount, total_of(order.amount for order in known if order is not None))
        if total_of(order.amount for _, order in orders) <= rest:
            order_ids = (*payment.order_ids, *(order_id for order_id, _ in orders))
            draft.put(f"payment/{payment.payment_id}", replace(payment, order_ids=order_ids))
            mark_paid(draft, payment.payment_id, orders)
            return True
    return False


def mark_paid(draft: Draft, payment_id: str, orders: list[tuple[str, OrderRow]]) -> None:
    """Note which payment pays these orders: they are owed no longer."""
    for order_id, order in orders:
        draft.put(f"order/{order_id}", replace(order, payment_id=payment_id))
        debt = draft.row(OwedRow, f"owed/{order.platform}") or OwedRow()
        draft.put(f"owed/{order.platform}", OwedRow(amount_text(max(minus(debt.amount, order.amount), Decimal(0)))))


def made(draft: Draft, tx_hash: str, peer: str, payee_addr: str, payment_id: str) -> None:
    """Note that a payment of ours tells of a transfer."""
    key = f"made/{tx_hash}/{peer}/{payee_addr}"
    known = draft.row(MadeRow, key) or MadeRow()
    draft.put(key, MadeRow(tuple(dict.fromkeys((*known.payment_ids, payment_id)))))


def payments_of(draft: Draft, tx_hash: str, peer: str, payee_addr: str) -> list[PaymentRow]:
    """Return the payments that tell of a transfer, and count."""
    known = draft.row(MadeRow, f"made/{tx_hash}/{peer}/{payee_addr}") or MadeRow()
    rows = (draft.row(PaymentRow, f"payment/{payment_id}") for payment_id in known.payment_ids)
    return [row for row in rows if row is not None and not row.instead]


def payment_signed(draft: Draft, fact: PaymentSigned) -> None:
    """Send the payment to its payee."""
    row = draft.row(PaymentRow, f"payment/{fact.payment_id}")
    assert row is not None, f"a payment was signed that the ledger does not know: {fact.payment_id}"
    if row.state != PaymentState.SIGNING:
        return
    assert fact.payment.body == row.body, f"the signer signed something else than payment {fact.payment_id}"
    verify(fact.payment, DocumentKind.PAYMENT, draft.me)
    row = replace(row, state=PaymentState.SENT, signature=fact.payment.signature)
    draft.put(f"payment/{row.payment_id}", row)
    draft.send(address(row.peer, "ledger"), PaymentSent(fact.payment))


def payment_acknowledged(draft: Draft, message: PaymentAcknowledged) -> None:
    """The payee's word on a payment. A refusal is shown, and the payment offered again a bounded number of times."""
    row = draft.row(PaymentRow, f"payment/{message.payment_id}")
    if row is None or row.role != Party.PAYER or row.peer != node_of(draft.meta.sender):
        raise Violation(f"about a payment that was not made to {draft.meta.sender}")
    if row.state not in (PaymentState.SENT, PaymentState.REFUSED):
        return
    if message.verified:
        draft.put(f"payment/{row.payment_id}", replace(row, state=PaymentState.ACKNOWLEDGED, reason=""))
        draft.wake(f"resend/{row.payment_id}", None)
    else:
        _offer_later(draft, row, f"the payee refused the payment: {message.reason[:500]}")


def undelivered(draft: Draft, document: Document, reason: str) -> None:
    """A payment did not reach its payee: the money is there, so only the news is repeated."""
    row = draft.row(PaymentRow, f"payment/{decode_body(PaymentBody, document.body).payment_id}")
    if row is not None and row.state == PaymentState.SENT:
        _offer_later(draft, row, f"the payee could not be told: {reason[:300]}")


def send_payment_again(draft: Draft, timer: SendPaymentAgain) -> None:
    """Offer a refused payment once more."""
    row = draft.row(PaymentRow, f"payment/{timer.payment_id}")
    if row is not None and row.role == Party.PAYER and row.state == PaymentState.REFUSED:
        draft.put(f"payment/{row.payment_id}", replace(row, state=PaymentState.SENT))
        draft.send(address(row.peer, "ledger"), PaymentSent(Document(DocumentKind.PAYMENT, row.body, row.signature)))


def _offer_later(draft: Draft, row: PaymentRow, reason: str) -> None:
    draft.put(f"payment/{row.payment_id}", replace(row, state=PaymentState.REFUSED, reason=reason, tries=row.tries + 1))
    if row.tries < RESEND_TRIES:
        draft.wake(f"resend/{row.payment_id}", draft.now + RESEND_FIRST_S * 6**row.tries, SendPaymentAgain(row.payment_id))


def book_rest(draft: Draft, row: PaymentRow, book: Callable[[Draft, PaymentBody], None]) -> None:
    """Book the parts of a payment whose agreements were not known before, and are now."""
    if not row.unbooked or row.state not in (PaymentState.ACKNOWLEDGED, PaymentState.VERIFIED):
        return
    body = decode_body(PaymentBody, row.body)
    known, unbooked = known_parts(draft, part_of(body, row.unbooked), row.role, row.peer)
    if unbooked != row.unbooked:
        draft.put(f"payment/{row.payment_id}", replace(row, unbooked=unbooked))
        book(draft, known)


def pay_out_delayed(draft: Draft, fact: PayOutDelayed) -> None:
    """Say on the documents why their money does not move."""
    for order_id in fact.order_ids:
        order = draft.row(OrderRow, f"order/{order_id}")
        if order is not None and not order.payment_id:
            explain(draft, order.kind, order.document_id, f"accepted; payment ordered: {fact.reason}")


# -- the payee
def payment_sent(draft: Draft, message: PaymentSent) -> None:
    """Check a payment's form and parties, then ask the chain. Repeats are answered by what is known already."""
    sender, document = node_of(draft.meta.sender), message.payment
    verify(document, DocumentKind.PAYMENT, sender)
    body = decode_body(PaymentBody, document.body)
    if (body.payer_id, body.payee_id) != (sender, draft.me):
        raise Violation("a payment of other parties")
    if len(body.agreement_payments) + len(body.activity_payments) > MAX_PARTS:
        raise Violation("a payment of too many parts")
    tx_hash = tx_hash_of(body.details)
    total = _positive(body.amount)
    parts = [_positive(part.amount) for part in body.agreement_payments]
    parts += [_positive(part.amount) for part in body.activity_payments]
    if total_of(parts) != total:
        raise Violation("the parts of the payment do not make its amount")
    row = draft.row(PaymentRow, f"payment/{body.payment_id}")
    said = (Party.PAYEE, sender, PaymentState.VERIFIED, tx_hash, amount_text(total))
    if row is not None and (row.role, row.peer, row.state, row.tx_hash, row.amount) == said:
        book_rest(draft, row, book)
        draft.send(draft.meta.sender, PaymentAcknowledged(body.payment_id, True))  # perhaps in new words: its disk went back
        return
    known = row is not None and (row.body == document.body or row.digest == digest(document.body))
    if row is not None and (row.role != Party.PAYEE or not known):
        raise Violation(f"another payment with the id {body.payment_id} exists")
    if row is not None and row.state == PaymentState.VERIFYING:
        return
    if row is not None and row.tries > RESEND_TRIES:
        draft.send(draft.meta.sender, PaymentAcknowledged(body.payment_id, False, row.reason))
        return
    known_body, unbooked = known_parts(draft, body, Party.PAYEE, sender)
    if not known_body.agreement_payments and not known_body.activity_payments:
        known_body = body  # it is for nothing that is known here: the objection says so
    if objection := _objection(draft, sender, known_body, 0 if row else len(document.body)):
        draft.send(draft.meta.sender, PaymentAcknowledged(body.payment_id, False, objection), ANSWER_S)
        return
    if row is None:
        _count_payment(draft, known_body, len(document.body))
        keep(draft, sender, len(document.body))
    row = PaymentRow(
        payment_id=body.payment_id,
        role=Party.PAYEE,
        peer=sender,
        state=PaymentState.VERIFYING,
        body=document.body,
        signature=document.signature,
        tx_hash=tx_hash,
        platform=body.payment_platform,
        amount=amount_text(total),
        recorded_at=draft.now,
        tries=row.tries if row else 0,
        unbooked=unbooked,
    )
    draft.put(f"payment/{row.payment_id}", row)
    key = _claims_key(body, tx_hash)
    claims = draft.row(TxClaimsRow, key) or TxClaimsRow(())
    draft.put(key, TxClaimsRow((*claims.claims, (row.payment_id, row.amount))))
    _ask(draft, row)


def _objection(draft: Draft, sender: str, body: PaymentBody, size: int) -> str:
    """Why a well-formed payment is not for anything here; "" if it is."""
    agreement_ids = [part.agreement_id for part in body.agreement_payments]
    for part in body.activity_payments:
        activity = draft.row(LedgerActivityRow, f"activity/{part.activity_id}")
        if activity is None:
            return f"activity {part.activity_id[:80]} is not known here"
        if Decimal(part.amount) > Decimal(activity.accepted):
            return _not_accepted(f"activity {part.activity_id}", activity.accepted, part.amount)
        agreement_ids.append(activity.agreement_id)
    for agreement_id in dict.fromkeys(agreement_ids):
        agreement = draft.row(LedgerAgreementRow, f"agreement/{agreement_id}")
        if agreement is None or agreement.role != Party.PAYEE or agreement.peer != sender:
            return f"agreement {agreement_id[:80]} is not known here"
        addresses = agreement.payer_addr.lower(), agreement.payee_addr.lower()
        if agreement.platform != body.payment_platform or addresses != (body.payer_addr, body.payee_addr):
            return f"platform or addresses are not those of agreement {agreement_id}"
        if agreement.payments >= MAX_PAYMENTS:
            return f"{MAX_PAYMENTS} payments were claimed for agreement {agreement_id}, and no more are looked at"
    for agreement_part in body.agreement_payments:
        agreement = draft.row(LedgerAgreementRow, f"agreement/{agreement_part.agreement_id}")
        assert agreement is not None, agreement_part
        if Decimal(agreement_part.amount) > Decimal(agreement.accepted):
            return _not_accepted(f"agreement {agreement.agreement_id}", agreement.accepted, agreement_part.amount)
    first = draft.row(LedgerAgreementRow, f"agreement/{agreement_ids[0]}")
    if first is not None and first.payment_bytes >= MAX_PAYMENTS_BYTES:
        return f"{first.payment_bytes} bytes of payments were claimed for agreement {first.agreement_id} already"
    if full := no_room(draft, sender, size):
        return full
    claims = draft.row(TxClaimsRow, _claims_key(body, tx_hash_of(body.details)))
    if claims is not None and len(claims.claims) >= MAX_CLAIMS:
        return f"{MAX_CLAIMS} payments were claimed of this transaction, and no more are looked at"
    return ""


def _not_accepted(what: str, accepted: str, claimed: str) -> str:
    return f"{accepted} GLM were accepted for {what}, and {claimed} are claimed to be paid: the acceptance comes first"


def _count_payment(draft: Draft, body: PaymentBody, size: int) -> None:
    """Note on an agreement that one more payment is claimed for it."""
    if body.agreement_payments:
        agreement_id = body.agreement_payments[0].agreement_id
    else:
        activity = draft.row(LedgerActivityRow, f"activity/{body.activity_payments[0].activity_id}")
        assert activity is not None, body
        agreement_id = activity.agreement_id
    agreement = draft.row(LedgerAgreementRow, f"agreement/{agreement_id}")
    assert agreement is not None, body
    draft.put(f"agreement/{agreement_id}", replace(
        agreement, payments=agreement.payments + 1, payment_bytes=agreement.payment_bytes + size
    ))  # fmt: skip


def transfer_verified(draft: Draft, fact: TransferVerified) -> None:
    """The chain confirms a claim: book it, settle, thank the payer."""
    row = draft.row(PaymentRow, f"payment/{fact.claim_id}")
    if row is None or row.state != PaymentState.VERIFYING or row.tx_hash != fact.tx_hash:
        return
    row = replace(row, state=PaymentState.VERIFIED, reason="", recorded_at=draft.now)
    draft.put(f"payment/{row.payment_id}", row)
    draft.wake(f"verify/{row.payment_id}", None)
    body = decode_body(PaymentBody, row.body)
    book(draft, part_of(body, [each for each in ids_of(body) if each not in row.unbooked]))
    draft.send(address(row.peer, "ledger"), PaymentAcknowledged(row.payment_id, True))
    draft.emit("payments", payment_event(draft, row))


def transfer_rejected(draft: Draft, fact: TransferRejected) -> None:
    """The chain denies a claim: give the reservation back and say why."""
    row = draft.row(PaymentRow, f"payment/{fact.claim_id}")
    if row is None or row.state != PaymentState.VERIFYING:
        return
    draft.put(f"payment/{row.payment_id}", replace(row, state=PaymentState.REFUSED, reason=fact.reason, tries=row.tries + 1))
    draft.wake(f"verify/{row.payment_id}", None)
    key = _claims_key(decode_body(PaymentBody, row.body), row.tx_hash)
    if row.tries >= RESEND_TRIES:  # it is never looked at again: its id, the reason and its digest are enough
        rest = encode_body(replace(decode_body(PaymentBody, row.body), agreement_payments=(), activity_payments=()))
        dead = replace(row, state=PaymentState.REFUSED, reason=fact.reason, tries=row.tries + 1, signature=b"")
        draft.put(f"payment/{row.payment_id}", replace(dead, body=rest, digest=digest(row.body)))
    claims = draft.row(TxClaimsRow, key)
    assert claims is not None, key
    left = tuple(claim for claim in claims.claims if claim[0] != row.payment_id)
    draft.put(key, TxClaimsRow(left) if left else None)
    draft.send(address(row.peer, "ledger"), PaymentAcknowledged(row.payment_id, False, fact.reason))


def verify_again(draft: Draft, timer: VerifyAgain) -> None:
    """No answer about a claim so far: ask again (the chain port forgets its questions when the node restarts)."""
    row = draft.row(PaymentRow, f"payment/{timer.payment_id}")
    if row is not None and row.state == PaymentState.VERIFYING:
        _ask(draft, row)


def _ask(draft: Draft, row: PaymentRow) -> None:
    body = decode_body(PaymentBody, row.body)
    claims = draft.row(TxClaimsRow, _claims_key(body, row.tx_hash))
    assert claims is not None, row
    ids = [claim[0] for claim in claims.claims]
    before = total_of(claim[1] for claim in claims.claims[: ids.index(row.payment_id)])
    draft.send(
        "chain",
        VerifyTransfer(
            claim_id=row.payment_id,
            platform=row.platform,
            tx_hash=row.tx_hash,
            payer=body.payer_addr,
            payee=body.payee_addr,
            amount=row.amount,
            already_claimed=amount_text(before),
            not_before=_not_before(draft, body),
        ),
    )
    pause_s = max(VERIFY_AGAIN_S, min((draft.now - row.recorded_at) / 4, VERIFY_LAST_S))
    draft.wake(f"verify/{row.payment_id}", draft.now + pause_s, VerifyAgain(row.payment_id))


def _not_before(draft: Draft, body: PaymentBody) -> float:
    """When the youngest of the agreements that are paid was made: money that moved earlier was for something else."""
    agreements = (draft.row(LedgerAgreementRow, f"agreement/{agreement_id}") for agreement_id in agreements_of(draft, body))
    return max((row.approved_at for row in agreements if row is not None), default=0.0) - MAX_CLOCK_SKEW_S


def agreements_of(draft: Draft, body: PaymentBody) -> list[str]:
    """The agreements that a payment is for, by itself or by their activities."""
    found = [part.agreement_id for part in body.agreement_payments]
    for part in body.activity_payments:
        if activity := draft.row(LedgerActivityRow, f"activity/{part.activity_id}"):
            found.append(activity.agreement_id)
    return list(dict.fromkeys(found))


# -- both
def book(draft: Draft, body: PaymentBody) -> None:
    """Add a payment to the sums of agreements and activities, and settle what they cover."""
    touched: list[str] = []
    for agreement_part in body.agreement_payments:
        _add_paid(draft, agreement_part.agreement_id, agreement_part.amount)
        touched.append(agreement_part.agreement_id)
    for part in body.activity_payments:
        activity = draft.row(LedgerActivityRow, f"activity/{part.activity_id}")
        assert activity is not None, part
        paid = amount_text(total_of((activity.paid, part.amount)))
        draft.put(f"activity/{part.activity_id}", replace(activity, paid=paid))
        _add_paid(draft, activity.agreement_id, part.amount)
        touched.append(activity.agreement_id)
    for agreement_id in dict.fromkeys(touched):
        settle(draft, agreement_id)


def take_back(draft: Draft, body: PaymentBody) -> None:
    """Take a payment off the sums again: another one tells of the same transfer, and is booked next."""
    for agreement_part in body.agreement_payments:
        _add_paid(draft, agreement_part.agreement_id, minus("0", agreement_part.amount))
    for part in body.activity_payments:
        activity = draft.row(LedgerActivityRow, f"activity/{part.activity_id}")
        assert activity is not None, part
        draft.put(f"activity/{part.activity_id}", replace(activity, paid=amount_text(minus(activity.paid, part.amount))))
        _add_paid(draft, activity.agreement_id, minus("0", part.amount))


def _add_paid(draft: Draft, agreement_id: str, paid: str | Decimal) -> None:
    agreement = draft.row(LedgerAgreementRow, f"agreement/{agreement_id}")
    assert agreement is not None, agreement_id
    total = amount_text(total_of((agreement.paid, paid)))
    draft.put(f"agreement/{agreement_id}", replace(agreement, paid=total))


def payment_event(draft: Draft, row: PaymentRow) -> PaymentEvent:
    agreement_ids = agreements_of(draft, decode_body(PaymentBody, row.body))
    agreements = (draft.row(LedgerAgreementRow, f"agreement/{agreement_id}") for agreement_id in agreement_ids)
    sessions = dict.fromkeys(a.app_session_id for a in agreements if a is not None and a.app_session_id)
    return PaymentEvent(row.payment_id, row.role, row.platform, tuple(s for s in sessions if s))


def _sums(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    sums: dict[str, Decimal] = {}
    for key, value in pairs:
        sums[key] = total_of((sums.get(key, Decimal(0)), value))
    return [(key, amount_text(value)) for key, value in sums.items()]


def _claims_key(body: PaymentBody, tx_hash: str) -> str:
    return f"tx/{tx_hash}/{body.payer_addr}/{body.payee_addr}"


def tx_hash_of(details: str) -> str:
    try:
        raw = base64.b64decode(details, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Violation(f"details of a payment are no base64: {error}") from None
    if len(raw) != 32:
        raise Violation(f"details of a payment hold {len(raw)} bytes, a transaction hash has 32")
    return "0x" + raw.hex()


def _positive(text: str) -> Decimal:
    value = amount(text)  # which it is: `decode_body` has looked
    if value == 0:
        raise Violation("a payment, or a part of one, of zero")
    return value
