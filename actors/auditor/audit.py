"""Do the books add up? Reads the rows of ledger and wallet, and names each document at which they do not; pure.

To the wei, for each agreement: issued = accepted + open + rejected, and accepted = settled + queued + in flight; for each
allocation: paid + reserved + free = total; for each batch: what its orders come to = what its payees get = what the chain
moved, where that is known. Each side of an equation is read from rows of its own: documents as they were signed, sums of
the ledger, orders of the wallet, payments as they were signed.

Bills are running totals: a set of documents comes to its highest invoice or, where there is none, to the highest debit
note of each activity. After a restore, payments that the payee gave back do not name all their orders (`recalled`): the sums of
their agreements are then bounded by them, and not equal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from decimal import Decimal

from actors.auditor.books import OPEN, OWED, Books, name_of
from actors.auditor.report import ZERO, Charged, Finding, Moved, Report, Sums
from actors.ledger.audit import signed_total
from actors.ledger.rows import (
    HasPrefix,
    LedgerActivityRow,
    LedgerAgreementRow,
    OrderRow,
    PaymentDocumentRow,
    PaymentRow,
    PaymentState,
)
from actors.wallet.rows import OrderState, PayBatchRow, PayBatchState
from protocol.amounts import minus, total_of
from protocol.ledger import PaymentBody, decode_body
from protocol.states import DocumentKind, DocumentStatus, Party
from protocol.types import Violation, amount_text


def audit(ledger: HasPrefix, wallet: HasPrefix, moved: Moved | None = None, known: Container[str] | None = None) -> Report:
    """Audit one node's books. `ledger` and `wallet` are of one moment.

    `moved` is what the chain says, not older than they are, if anybody asked it; `known`: the batches of which it can say
    something, all where it is None.
    """
    return _Audit(Books(ledger, wallet), moved, known).report()


class _Audit:
    """One audit. Each method holds one kind of rows against the others."""

    def __init__(self, books: Books, moved: Moved | None, known: Container[str] | None) -> None:
        self.books, self.moved, self.known = books, moved, known
        self.found = Report()
        self.documents: dict[str, list[PaymentDocumentRow]] = defaultdict(list)  # by agreement
        self.notes: dict[str, list[PaymentDocumentRow]] = defaultdict(list)  # accepted ones, by activity
        self.orders: dict[str, list[OrderRow]] = defaultdict(list)  # by agreement
        self.parts: dict[str, Decimal] = defaultdict(Decimal)  # booked for an agreement or activity, by its id
        self.recalled: dict[str, Decimal] = defaultdict(Decimal)  # of it, given back by the payee after a restore
        self.claimed: dict[str, Decimal] = defaultdict(Decimal)  # being verified
        self.paid_by: dict[str, list[str]] = defaultdict(list)  # order -> payments

    def say(self, subject: str, words: str) -> None:
        self.found.findings.append(Finding(subject, words))

    def report(self) -> Report:
        for row in self.books.documents.values():
            self.documents[row.agreement_id].append(row)
            if row.activity_id and row.status in OWED:
                self.notes[row.activity_id].append(row)
        for order in self.books.orders.values():
            self.orders[order.agreement_id].append(order)
        self._payments()
        self._claims()
        self._document_rows()
        self._agreements()
        self._orders()
        self._owed()
        self._allocations()
        self._batches()
        return self.found

    # -- payments
    def _payments(self) -> None:
        for payment in self.books.payments.values():
            for order_id in payment.order_ids:
                self.paid_by[order_id].append(payment.payment_id)
            if payment.instead or payment.digest or (payment.role == Party.PAYEE and payment.state == PaymentState.REFUSED):
                continue
            if payment.role == Party.PAYER:
                self._is_whole(payment)
            parts = self._parts(payment)
            if parts is None:
                continue
            if total_of(one for _, _, one in parts) != Decimal(payment.amount):
                self.say(f"payment {payment.payment_id}", f"is of {payment.amount}, and its parts are not")
            for agreement_id, activity_id, amount in parts:
                for subject in (agreement_id, activity_id) if activity_id else (agreement_id,):
                    self._book(payment, subject, amount)

    def _is_whole(self, payment: PaymentRow) -> None:
        """What a payment comes to is what its orders come to."""
        orders = [self.books.orders[one] for one in payment.order_ids if one in self.books.orders]
        ordered = total_of(order.amount for order in orders)
        if ordered > Decimal(payment.amount) or (ordered < Decimal(payment.amount) and not payment.recalled):
            told = f"payment {payment.payment_id} is of {payment.amount}, and its orders come to {amount_text(ordered)}"
            self.say(_these(payment.order_ids) or f"payment {payment.payment_id}", told)

    def _book(self, payment: PaymentRow, subject: str, amount: Decimal) -> None:
        verifying = payment.state == PaymentState.VERIFYING
        sums = [self.claimed if verifying else self.parts]
        if payment.recalled:
            sums.append(self.recalled)
        for one in sums:
            one[subject] = total_of((one[subject], amount))

    def _parts(self, payment: PaymentRow) -> list[tuple[str, str, Decimal]] | None:
        """Return (agreement, activity or "", amount) of each part of a payment."""
        subject = f"payment {payment.payment_id}"
        try:
            body = decode_body(PaymentBody, payment.body)
        except Violation as error:
            self.say(subject, f"cannot be read: {error}")
            return None
        parts = [(part.agreement_id, "", Decimal(part.amount)) for part in body.agreement_payments]
        for part in body.activity_payments:
            activity = self.books.activities.get(part.activity_id)
            if activity is None:
                self.say(subject, f"pays activity {part.activity_id}, which is not known here")
                return None
            parts.append((activity.agreement_id, part.activity_id, Decimal(part.amount)))
        return parts

    def _claims(self) -> None:
        """Each payment that is verified, or being verified, is claimed of its transaction once."""
        standing = {
            row.payment_id: row.amount for row in self.books.payments.values()
            if row.role == Party.PAYEE and row.state in (PaymentState.VERIFYING, PaymentState.VERIFIED)
        }  # fmt: skip
        for key, row in self.books.claims.items():
            for payment_id, amount in row.claims:
                if standing.pop(payment_id, None) != amount:
                    self.say(
                        f"payment {payment_id}", f"is claimed of {key.partition('/')[0]} for {amount}, and not as it is noted"
                    )
        for payment_id in standing:
            self.say(f"payment {payment_id}", "is booked, and claimed of no transaction")

    # -- documents and the sums of their agreements
    def _document_rows(self) -> None:
        waiting = set(self.books.open)
        for key, row in self.books.documents.items():
            try:
                signed = signed_total(row)
            except (Violation, ValueError) as error:
                self.say(name_of(row), f"cannot be read: {error}")
                continue
            if signed != Decimal(row.amount):
                self.say(name_of(row), f"is signed for {amount_text(signed)}, and noted with {row.amount}")
            index = f"{row.agreement_id}/{row.kind}/{row.document_id}"
            if (row.status == DocumentStatus.ACCEPTED) != (index in waiting):
                self.say(
                    name_of(row), f"is {row.status}, and {'is' if index in waiting else 'is not'} listed as waiting for money"
                )
            waiting.discard(index)
            if row.status in OWED and not row.acceptance:
                self.say(name_of(row), f"is {row.status} without the payer's signature")
            if key in self.books.orders and (row.status not in OWED or row.role != Party.PAYER):
                self.say(name_of(row), f"is {row.status}, and its payment is ordered")
            self._is_covered(row)
        for index in waiting:
            self.say(index.partition("/")[2].replace("/", " "), "is listed as waiting for money, and is not known here")

    def _is_covered(self, row: PaymentDocumentRow) -> None:
        """A document is settled as soon as payments cover its total, and not before."""
        of = row.activity_id if row.kind == DocumentKind.DEBIT_NOTE else row.agreement_id
        paid, due = self.parts[of], Decimal(row.amount)
        if row.status == DocumentStatus.SETTLED and paid < due:
            self.say(name_of(row), f"is settled for {row.amount}, and payments cover {amount_text(paid)} of it")
        if row.status == DocumentStatus.ACCEPTED and paid >= due:
            self.say(name_of(row), f"is not settled, and payments of {amount_text(paid)} cover its {row.amount}")

    def _agreements(self) -> None:
        sums: dict[tuple[str, Party], Sums] = {}
        for agreement_id, row in self.books.agreements.items():
            into = sums.setdefault((row.platform, row.role), Sums(row.platform, row.role))
            self._agreement(row, into, self.documents.pop(agreement_id, []))
        for rows in self.documents.values():
            for document in rows:
                self.say(name_of(document), f"is of agreement {document.agreement_id}, which is not known here")
        for activity_id, activity in self.books.activities.items():
            self._activity(activity_id, activity)
        self.found.sums = [sums[key] for key in sorted(sums)]

    def _agreement(self, row: LedgerAgreementRow, into: Sums, documents: list[PaymentDocumentRow]) -> None:
        accepted, settled = Decimal(row.accepted), Decimal(row.paid)
        owed = [one for one in documents if one.status in OWED]
        standing = _come_to(one for one in documents if one.status in (*OWED, *OPEN) and not one.refused)
        issued, recalled = _come_to(documents), self.recalled[row.agreement_id]
        bounds = _bounds(owed)
        if not bounds[0] <= accepted <= total_of((bounds[1], recalled)):
            told = f"{row.accepted} is noted as accepted for agreement {row.agreement_id}"
            self.say(_last(owed, row), f"{told}, and its accepted documents come to {amount_text(bounds[1])}")
        if settled != self.parts[row.agreement_id]:
            told = f"{row.paid} is noted as paid for agreement {row.agreement_id}"
            self.say(_last(owed, row), f"{told}, and its payments come to {amount_text(self.parts[row.agreement_id])}")
        if row.invoice_accepted != any(one.kind == DocumentKind.INVOICE for one in owed):
            self.say(_last(owed, row), f"agreement {row.agreement_id} and its invoices differ in whether one is accepted")
        queued = in_flight = ZERO
        if row.role == Party.PAYER:
            queued, in_flight = self._under_way(row, owed)
        else:
            in_flight = min(self.claimed[row.agreement_id], max(minus(accepted, settled), ZERO))
            queued = max(minus(minus(accepted, settled), in_flight), ZERO)
        into.documents += len(documents)
        into.issued = total_of((into.issued, max(issued, accepted)))
        into.open = total_of((into.open, max(minus(max(standing, accepted), accepted), ZERO)))
        into.rejected = total_of((into.rejected, minus(max(issued, accepted), max(standing, accepted))))
        into.accepted = total_of((into.accepted, accepted))
        into.settled = total_of((into.settled, settled))
        into.queued, into.in_flight = total_of((into.queued, queued)), total_of((into.in_flight, in_flight))

    def _under_way(self, row: LedgerAgreementRow, owed: list[PaymentDocumentRow]) -> tuple[Decimal, Decimal]:
        """Return what the payer has queued and what is in flight for an agreement: with what is settled, all that is accepted."""
        queued, in_flight, orders = ZERO, ZERO, self.orders[row.agreement_id]
        for order in orders:
            if not order.payment_id:
                known = self.books.pay_orders.get(f"{order.kind}:{order.document_id}")
                if known is None or known.state in (OrderState.QUEUED, OrderState.GIVEN_UP):
                    queued = total_of((queued, order.amount))
                else:
                    in_flight = total_of((in_flight, order.amount))
        accepted, recalled = Decimal(row.accepted), self.recalled[row.agreement_id]
        ordered = total_of(order.amount for order in orders)
        if not ordered <= accepted <= total_of((ordered, recalled)):
            told = f"{row.accepted} is noted as accepted for agreement {row.agreement_id}"
            self.say(_last(owed, row), f"{told}, and {amount_text(ordered)} is ordered")
        way = total_of((row.paid, queued, in_flight))
        if not accepted <= way <= total_of((accepted, recalled)):
            told = f"of {row.accepted} accepted for agreement {row.agreement_id}, {row.paid} is settled"
            self.say(_last(owed, row), f"{told}, {amount_text(queued)} queued and {amount_text(in_flight)} in flight")
        return queued, in_flight

    def _activity(self, activity_id: str, row: LedgerActivityRow) -> None:
        if Decimal(row.paid) != self.parts[activity_id]:
            told = f"{row.paid} is noted as paid for activity {activity_id}"
            self.say(f"agreement {row.agreement_id}", f"{told}, and its payments come to {amount_text(self.parts[activity_id])}")
        notes = self.notes[activity_id]
        highest = max((Decimal(one.amount) for one in notes), default=ZERO)
        agreement = self.books.agreements.get(row.agreement_id)
        over = minus(row.accepted, highest)
        invoiced = agreement is not None and agreement.invoice_accepted  # from then on notes are owed as a part of it
        if over > self.recalled[activity_id] or (over < 0 and not invoiced):
            told = f"{row.accepted} is noted as accepted for activity {activity_id}"
            subject = name_of(max(notes, key=lambda one: Decimal(one.amount))) if notes else f"activity {activity_id}"
            self.say(subject, f"{told}, and its accepted debit notes come to {amount_text(highest)}")

    # -- orders
    def _orders(self) -> None:
        for order_id, order in self.books.orders.items():
            document = self.books.documents.get(order_id)
            if document is None:
                self.say(name_of(order), "is ordered to be paid, and not known here")
            elif Decimal(order.amount) > Decimal(document.amount):
                self.say(name_of(order), f"is of {document.amount}, and {order.amount} is ordered for it")
            if f"{order.agreement_id}/{order_id}" not in self.books.ordered:
                self.say(name_of(order), "is ordered, and not listed among the orders of its agreement")
            self._order(order_id, order)
        for order_id, payments in self.paid_by.items():
            if len(payments) > 1 or order_id not in self.books.orders:
                subject = order_id.replace(":", " ", 1)
                self.say(
                    subject,
                    f"is paid {len(payments)} times: {', '.join(payments)}"
                    if len(payments) > 1
                    else "is paid, and was never ordered",
                )
        for order_id in self.books.pay_orders.keys() - self.books.orders.keys():
            self.say(order_id.replace(":", " ", 1), "is paid by the wallet, and the ledger never ordered it")

    def _order(self, order_id: str, order: OrderRow) -> None:
        payments, known = self.paid_by.get(order_id, []), self.books.pay_orders.get(order_id)
        paid = self.books.payments.get(order.payment_id)
        if order.payment_id and (paid is None or order.payment_id not in payments):
            self.say(name_of(order), f"is noted as paid by {order.payment_id}, which does not pay it")
        elif payments and not order.payment_id:
            self.say(name_of(order), f"is paid by {payments[0]}, and noted as not paid")
        if known is None:
            if order.payment_id and not order.covered:
                self.say(name_of(order), "is noted as paid, and the wallet never had it")
            return
        terms = (order.platform, order.payer_addr, order.payee_addr, Decimal(order.amount))
        if terms != (known.platform, known.payer, known.payee, Decimal(known.amount)):
            self.say(name_of(order), f"is ordered with {order.amount}, and the wallet has {known.amount} to {known.payee}")
        if order.payment_id and known.state != OrderState.PAID:
            self.say(name_of(order), f"is noted as paid, and the wallet has it as {known.state}")
        batch = self.books.batches.get(known.batch_id)
        queued = f"{known.platform}/{known.payer}/{order_id}" in self.books.queue
        if queued != (known.state == OrderState.QUEUED):
            self.say(name_of(order), f"is {known.state} at the wallet, and {'is' if queued else 'is not'} in its queue")
        wanted = {OrderState.BATCHED: PayBatchState.SENDING, OrderState.PAID: PayBatchState.CONFIRMED}.get(known.state)
        if order.covered:  # by a transfer of a time that this node's disk has forgotten
            return
        if wanted and (batch is None or (batch.state != wanted and not batch.recalled)):
            state = batch.state if batch else "unknown"
            self.say(name_of(order), f"is {known.state} at the wallet, and its batch {known.batch_id} is {state}")
        if paid is not None and batch is not None and paid.tx_hash != batch.tx_hash:
            self.say(name_of(order), f"is paid by {paid.tx_hash}, and its batch by {batch.tx_hash or 'nothing'}")

    def _owed(self) -> None:
        unpaid: dict[str, Decimal] = defaultdict(Decimal)
        for order in self.books.orders.values():
            if not order.payment_id:
                unpaid[order.platform] = total_of((unpaid[order.platform], order.amount))
        for platform in unpaid.keys() | self.books.owed.keys():
            noted = self.books.owed[platform].amount if platform in self.books.owed else "0"
            if Decimal(noted) != unpaid[platform]:
                told = f"{noted} is noted as owed on {platform}"
                self.say(f"platform {platform}", f"{told}, and its unpaid orders come to {amount_text(unpaid[platform])}")

    # -- allocations
    def _allocations(self) -> None:
        charged: dict[str, list[OrderRow]] = defaultdict(list)
        for order in self.books.orders.values():
            charged[order.allocation_id].append(order)
        for allocation_id, row in self.books.allocations.items():
            orders = charged.pop(allocation_id, [])
            paid = total_of(order.amount for order in orders if order.payment_id)
            reserved = total_of(order.amount for order in orders if not order.payment_id)
            free = minus(row.total, row.spent)
            self.found.allocations.append(Charged(row, paid, reserved, free))
            if free < 0 or total_of((paid, reserved, free)) != Decimal(row.total):
                names = ", ".join(name_of(order) for order in orders[-3:]) or "nothing"
                told = f"{amount_text(paid)} paid + {amount_text(reserved)} reserved + {amount_text(free)} free"
                self.say(f"allocation {allocation_id}", f"{told} is not its total of {row.total}; charged last: {names}")
        for allocation_id, orders in charged.items():
            for order in orders if allocation_id else ():  # "": owed again after a restore, whatever is allocated
                self.say(name_of(order), f"is charged to allocation {allocation_id}, which is not known here")

    # -- batches and the chain
    def _batches(self) -> None:
        paid: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
        for payment in self.books.payments.values():
            if payment.role == Party.PAYER and (orders := [self.books.orders.get(one) for one in payment.order_ids]):
                to = next((order.payee_addr for order in orders if order is not None), "")
                paid[payment.tx_hash, to] = total_of((paid[payment.tx_hash, to], payment.amount))
        known: dict[tuple[str, str], str] = {}
        seen: dict[str, str] = {}  # order -> the batch that pays it, or may do so
        for batch in self.books.batches.values():
            for payee in batch.payees:
                covered = [self.books.pay_orders.get(one) for one in payee.order_ids]
                summed = total_of(one.amount for one in covered if one is not None)
                if summed > Decimal(payee.amount) or (summed < Decimal(payee.amount) and not batch.recalled):
                    told = f"pays {payee.amount} to {payee.payee}, and its orders come to {amount_text(summed)}"
                    self.say(f"batch {batch.batch_id}", f"{told} ({_these(payee.order_ids)})")
                if batch.state == PayBatchState.FAILED:
                    continue
                for order_id in payee.order_ids:
                    if other := seen.get(order_id):
                        self.say(order_id.replace(":", " ", 1), f"is in two batches that pay: {other} and {batch.batch_id}")
                    seen[order_id] = batch.batch_id
                if batch.state != PayBatchState.CONFIRMED:
                    continue
                known[batch.tx_hash, payee.payee] = batch.batch_id
                if paid[batch.tx_hash, payee.payee] > Decimal(payee.amount):
                    told = f"{amount_text(paid[batch.tx_hash, payee.payee])} is noted as paid by {batch.tx_hash}"
                    self.say(_these(payee.order_ids), f"{told}, which moved {payee.amount} to {payee.payee}")
                self._moved(batch, payee.payee, payee.amount, payee.order_ids)
        for (tx_hash, address), amount in paid.items():
            if amount and (tx_hash, address) not in known:
                subjects = [one for row in self.books.payments.values() if row.tx_hash == tx_hash for one in row.order_ids]
                if all(one in self.books.orders and self.books.orders[one].covered for one in subjects):
                    continue
                self.say(_these(subjects), f"is noted as paid by {tx_hash}, which is the transfer of no batch of this wallet")
        self._strays(known)

    def _moved(self, batch: PayBatchRow, payee: str, amount: str, order_ids: tuple[str, ...]) -> None:
        if self.moved is None or (self.known is not None and batch.batch_id not in self.known):
            self.found.unproved += 1
            return
        self.found.transfers += 1
        moved = self.moved.get((batch.tx_hash, payee), ZERO)
        if moved != Decimal(amount):
            told = f"{amount} to {payee} is noted as paid by {batch.tx_hash or 'no transaction'}"
            self.say(_these(order_ids), f"{told}, and the chain moved {amount_text(moved)}")

    def _strays(self, known: Mapping[tuple[str, str], str]) -> None:
        """What the chain moved belongs to a batch that is paid, or that waits for the news of it."""
        sending = {
            payee.payee for batch in self.books.batches.values() if batch.state == PayBatchState.SENDING for payee in batch.payees
        }
        told = {row.tx_hash for row in self.books.payments.values() if row.role == Party.PAYER}  # also by payees, after a restore
        for (tx_hash, payee), amount in (self.moved or {}).items():
            if (tx_hash, payee) not in known and tx_hash not in told and payee not in sending:
                self.say(
                    f"transaction {tx_hash}", f"moved {amount_text(amount)} to {payee}, and no batch of this wallet is paid by it"
                )


def _these(order_ids: Iterable[str]) -> str:
    ids = [order_id.replace(":", " ", 1) for order_id in order_ids]
    return ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")


def _last(owed: list[PaymentDocumentRow], row: LedgerAgreementRow) -> str:
    """Name the document that an agreement's sums were last changed for."""
    return (
        name_of(max(owed, key=lambda one: (one.changed_at, one.kind, Decimal(one.amount))))
        if owed
        else f"agreement {row.agreement_id}"
    )


def _bounds(documents: Iterable[PaymentDocumentRow]) -> tuple[Decimal, Decimal]:
    """Return the least and the most that accepted documents come to.

    They differ for a payee alone, whose payer accepted notes beside an invoice that says less."""
    notes: dict[str, Decimal] = {}
    invoices: list[Decimal] = []
    for row in documents:
        if row.kind == DocumentKind.INVOICE:
            invoices.append(Decimal(row.amount))
        else:
            notes[row.activity_id] = max(notes.get(row.activity_id, ZERO), Decimal(row.amount))
    noted = total_of(notes.values())
    return (max(invoices), max(noted, *invoices)) if invoices else (noted, noted)


def _come_to(documents: Iterable[PaymentDocumentRow]) -> Decimal:
    return _bounds(documents)[1]
