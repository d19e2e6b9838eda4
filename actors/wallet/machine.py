"""The wallet: pays each order of the ledger exactly once.

    order  QUEUED -> BATCHED -> PAID;   BATCHED -> QUEUED when the batch failed;   -> GIVEN_UP after `MAX_TRIES`
    batch  SENDING -> CONFIRMED | FAILED

A payment cycle per (platform, payer) gathers queued orders, sums them by payee and puts up to 50 payees into a batch.
The batch, with its number, is in its row before anything leaves; its id is made of that number and its orders, and the
chain port takes an id once, and an order too: where this journal is older than the chain port's, the port says in which
batch an order is (`OrdersKnown`). So whatever is repeated, nothing is paid twice. Only the chain port's final word frees an
order for another batch: `TransferFailed` says that the batch paid nothing and never will.

Rows: `order/<id>`, `batch/<id>`, `batches/<platform>/<payer>`, `cycle/<platform>`, and the index
`queue/<platform>/<payer>/<order id>`. The ledger hears `PaidOut` and why things wait (`PayOutDelayed`). Nonces are the
chain port's alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal
from itertools import islice
from typing import Any

from msgspec.structs import replace

from actors.kernel.draft import Declined, Draft
from actors.kernel.grammar import EDGE, ITSELF, On, Table, TableMachine
from actors.kernel.machine import Meta, Rows
from actors.wallet.rows import (
    BatchesRow,
    CycleRow,
    OrderState,
    PayBatchRow,
    PayBatchState,
    Payee,
    PayOrderRow,
    QueuedRow,
    WalletRow,
)
from protocol.amounts import total_of
from protocol.codec import Decoder
from protocol.payment_terms import PAID_DAILY, SOON_GLM
from protocol.types import Undelivered, amount_text, digest
from protocol.wallet import (
    CycleDue,
    CycleSet,
    KnownBatch,
    OrdersKnown,
    PaidBefore,
    PaidOut,
    PayOut,
    PayOutDelayed,
    ResumePayments,
    RunCycle,
    SetCycle,
    Transfer,
    TransferConfirmed,
    TransferDelayed,
    TransferFailed,
    TransferMined,
    TransferSent,
)

MAX_PAYEES = 50  # of a batch: one transaction
MAX_BATCH_ORDERS = 1000
MAX_RUN_ORDERS = 20_000  # gathered in one step; the rest follows a second later
MAX_TRIES = 5
SOON_S = 60.0  # until a payee who is owed much is paid, whatever the cycle
INTERVALS_S = (0.5, 30 * 24 * 3600.0)


class WalletDraft(Draft):
    """A step of the wallet, which knows how the wallet is set."""

    def __init__(self, rows: Rows, meta: Meta, wallet: Wallet) -> None:
        super().__init__(rows, meta, wallet.node)
        self.interval_s, self.minimum, self.payees = wallet.interval_s, wallet.minimum, wallet.payees


# -- orders and cycles
def _pay_out(draft: WalletDraft, order: PayOut) -> None:
    key = f"order/{order.order_id}"
    if draft.row(PayOrderRow, key) is not None:
        return
    assert Decimal(order.amount) > 0, order
    row = PayOrderRow(
        order_id=order.order_id,
        platform=order.platform,
        payer=order.payer,
        payee=order.payee,
        amount=order.amount,
        state=OrderState.QUEUED,
        queued_at=draft.now,
    )
    _queue(draft, row)
    at = _schedule(draft, order.platform)
    if at > draft.now + SOON_S and order.platform not in PAID_DAILY and _is_much(draft, row):
        _schedule(draft, order.platform, draft.now + SOON_S)


def _paid_before(draft: WalletDraft, fact: PaidBefore) -> None:
    """This journal is older than a payment: what it paid is not paid again, whether it waits or stands in a batch."""
    reason = "paid by a payment that this node's journal had forgotten"
    for order_id in fact.order_ids:
        order = draft.row(PayOrderRow, f"order/{order_id}")
        if order is None or order.state == OrderState.PAID:
            continue
        draft.put(f"order/{order_id}", replace(order, state=OrderState.PAID, reason=reason))
        draft.put(f"queue/{order.platform}/{order.payer}/{order_id}", None)
        if order.state == OrderState.BATCHED and (batch := _batch(draft, order.batch_id)):
            draft.put(f"batch/{batch.batch_id}", replace(batch, recalled=True))


def _is_much(draft: WalletDraft, order: PayOrderRow) -> bool:
    """Return whether a payee is owed so much that it would not work on for long: it is paid before the cycle."""
    queue = islice(draft.readable(f"queue/{order.platform}/{order.payer}/"), MAX_RUN_ORDERS)
    rows = (draft.sound(f"order/{one.order_id}") for _, one in queue)
    theirs = (row.amount for row in rows if isinstance(row, PayOrderRow) and row.payee == order.payee)
    return total_of(theirs) >= Decimal(SOON_GLM)


def _queue(draft: WalletDraft, row: PayOrderRow) -> None:
    draft.put(f"order/{row.order_id}", row)
    draft.put(f"queue/{row.platform}/{row.payer}/{row.order_id}", QueuedRow(row.order_id))


def _cycle(draft: WalletDraft, platform: str) -> CycleRow:
    row = draft.row(CycleRow, f"cycle/{platform}")
    return row or CycleRow(platform, draft.interval_s(platform), 0.0)


def _schedule(draft: WalletDraft, platform: str, at: float | None = None) -> float:
    """Make sure that the platform's next run is set; `at` moves it. Returns its time."""
    cycle = _cycle(draft, platform)
    if at is None and cycle.next_at is not None:
        draft.wake(f"cycle/{platform}", cycle.next_at, CycleDue(platform), keep=True)
        return cycle.next_at
    next_at = draft.now + cycle.interval_s if at is None else at
    draft.put(f"cycle/{platform}", replace(cycle, next_at=next_at))
    draft.wake(f"cycle/{platform}", next_at, CycleDue(platform))
    return next_at


def _set_cycle(draft: WalletDraft, command: SetCycle) -> None:
    cycle = _cycle(draft, command.platform)
    interval_s = cycle.interval_s if command.interval_s is None else command.interval_s
    extra_s = cycle.extra_pay_time_s if command.extra_pay_time_s is None else command.extra_pay_time_s
    if not INTERVALS_S[0] <= interval_s <= INTERVALS_S[1] or not 0 <= extra_s <= INTERVALS_S[1]:
        raise Declined("bad_request", f"an interval is {INTERVALS_S[0]:g} to {INTERVALS_S[1]:g} seconds")
    draft.put(f"cycle/{command.platform}", replace(cycle, interval_s=interval_s, extra_pay_time_s=extra_s))
    at = command.next_at if command.next_at is not None else draft.now + interval_s
    draft.reply(CycleSet(command.platform, _schedule(draft, command.platform, max(at, draft.now))))


def _run_cycle(draft: WalletDraft, command: RunCycle) -> None:
    for _, row in list(draft.prefix("order/")):
        if row.platform == command.platform and row.state == OrderState.GIVEN_UP:
            _queue(draft, replace(row, state=OrderState.QUEUED, tries=0))
    draft.reply(CycleSet(command.platform, _schedule(draft, command.platform, draft.now)))


def _cycle_due(draft: WalletDraft, timer: CycleDue) -> None:
    cycle = replace(_cycle(draft, timer.platform), next_at=None, last_at=draft.now)
    draft.put(f"cycle/{timer.platform}", cycle)
    queue = list(islice(draft.readable(f"queue/{timer.platform}/"), MAX_RUN_ORDERS + 1))
    more = len(queue) > MAX_RUN_ORDERS
    queued = _waiting(draft, queue[:MAX_RUN_ORDERS])
    by_payer: dict[str, list[PayOrderRow]] = {}
    for row in sorted(queued, key=lambda row: (row.queued_at, row.order_id)):
        by_payer.setdefault(row.payer, []).append(row)
    for payer, orders in by_payer.items():
        for payees in _batches(orders, draft.minimum, draft.payees.get(timer.platform, MAX_PAYEES)):
            _send_batch(draft, timer.platform, payer, payees)
    # of a rest that can be read nobody is owed enough: the next order sets a run
    if more or draft.left_out or len(queued) < len(queue):
        _schedule(draft, timer.platform, draft.now + 1.0 if more else None)


def _waiting(draft: WalletDraft, queue: list[tuple[str, QueuedRow]]) -> list[PayOrderRow]:
    """Return the orders of a piece of the queue. One that cannot be read waits alone, and its document says why."""
    found: list[PayOrderRow] = []
    for key, queued in queue:
        row = draft.sound(f"order/{queued.order_id}")
        if isinstance(row, PayOrderRow):
            found.append(row)
        elif not queued.told:
            draft.put(key, replace(queued, told=True))
            text = "the wallet's row of this order is damaged on this node's disk: it is not paid before a person has looked"
            draft.send("ledger", PayOutDelayed((queued.order_id,), text))
    return found


# -- batches
def _send_batch(draft: WalletDraft, platform: str, payer: str, payees: list[list[PayOrderRow]]) -> None:
    counter = f"batches/{platform}/{payer}"
    number = (draft.row(BatchesRow, counter) or BatchesRow(0)).count
    order_ids = [order.order_id for orders in payees for order in orders]
    batch_id = digest("batch", platform, payer, str(number), *order_ids)[:32]  # unlike any of a journal that was lost
    assert draft.row(PayBatchRow, f"batch/{batch_id}") is None, f"number {number} of {payer} is used twice"
    batch = PayBatchRow(
        batch_id=batch_id,
        platform=platform,
        payer=payer,
        number=number,
        payees=tuple(
            Payee(
                orders[0].payee,
                amount_text(total_of(order.amount for order in orders)),
                tuple(order.order_id for order in orders),
            )
            for orders in payees
        ),
        state=PayBatchState.SENDING,
        created_at=draft.now,
    )
    draft.put(counter, BatchesRow(number + 1))
    draft.put(f"batch/{batch_id}", batch)
    for order in (order for orders in payees for order in orders):
        assert order.state == OrderState.QUEUED, order
        draft.put(f"order/{order.order_id}", replace(order, state=OrderState.BATCHED, batch_id=batch_id, reason=""))
        draft.put(f"queue/{platform}/{payer}/{order.order_id}", None)
    draft.send("chain", _transfer(batch))


def _transfer_sent(draft: WalletDraft, fact: TransferSent) -> None:
    batch = _batch(draft, fact.batch_id)
    if batch and batch.state == PayBatchState.SENDING and batch.tx_hash != fact.tx_hash:
        reason = f"transaction {fact.tx_hash} sent; waiting for its confirmation"
        _explain(draft, replace(batch, tx_hash=fact.tx_hash), reason)


def _transfer_delayed(draft: WalletDraft, fact: TransferDelayed) -> None:
    batch = _batch(draft, fact.batch_id)
    if batch and batch.state == PayBatchState.SENDING and batch.reason != fact.reason:
        _explain(draft, batch, fact.reason)


def _explain(draft: WalletDraft, batch: PayBatchRow, reason: str) -> None:
    draft.put(f"batch/{batch.batch_id}", replace(batch, reason=reason))
    order_ids = tuple(order.order_id for payee in batch.payees for order in _orders(draft, batch, payee))
    if order_ids:
        draft.send("ledger", PayOutDelayed(order_ids, reason))


def _orders(draft: WalletDraft, batch: PayBatchRow, payee: Payee) -> list[PayOrderRow]:
    """Return the orders that a batch pays a payee for; those that this journal has forgotten are not among them."""
    found = []
    for order_id in payee.order_ids:
        order = draft.row(PayOrderRow, f"order/{order_id}")
        assert batch.recalled or (order and (order.state, order.batch_id) == (OrderState.BATCHED, batch.batch_id)), order_id
        if order is not None and (order.state, order.batch_id) == (OrderState.BATCHED, batch.batch_id):
            found.append(order)
    return found


def _transfer_mined(draft: WalletDraft, fact: TransferMined) -> None:
    reason = f"transaction {fact.tx_hash} is in block {fact.block}; waiting until that is final"
    if (batch := _batch(draft, fact.batch_id)) and batch.state == PayBatchState.SENDING and batch.reason != reason:
        _explain(draft, replace(batch, tx_hash=fact.tx_hash), reason)


def _transfer_confirmed(draft: WalletDraft, fact: TransferConfirmed) -> None:
    batch = _batch(draft, fact.batch_id)
    if batch is None or (batch.state == PayBatchState.CONFIRMED and not batch.recalled):
        return
    assert batch.state != PayBatchState.FAILED, f"batch {batch.batch_id} was final as failed, and now is confirmed"
    draft.put(
        f"batch/{batch.batch_id}",
        replace(
            batch,
            state=PayBatchState.CONFIRMED,
            tx_hash=fact.tx_hash,
            reason="",
            block=fact.block,
            gas_used=fact.gas_used,
            fee=fact.fee,
        ),
    )
    for payee in batch.payees:
        orders = _orders(draft, batch, payee)
        for order in orders:
            draft.put(f"order/{order.order_id}", replace(order, state=OrderState.PAID, reason=""))
        if orders:
            paid = amount_text(total_of(order.amount for order in orders))
            order_ids = tuple(order.order_id for order in orders)
            draft.send("ledger", PaidOut(order_ids, batch.platform, batch.payer, payee.payee, paid, fact.tx_hash))


def _orders_known(draft: WalletDraft, fact: OrdersKnown) -> None:
    """The chain port has orders of a batch in others: this journal is older. Hear what became of them there."""
    batch = _batch(draft, fact.batch_id)
    if batch is None or batch.state != PayBatchState.SENDING:
        return
    reason = "some of its orders are in other batches of a time that this node's journal has forgotten"
    draft.put(f"batch/{batch.batch_id}", replace(batch, state=PayBatchState.FAILED, reason=reason))
    known_in: dict[str, str] = {}
    for known in fact.batches:
        row = draft.row(PayBatchRow, f"batch/{known.batch_id}") or _recalled(batch, known, draft.now)
        state = (
            PayBatchState.CONFIRMED if row.state == PayBatchState.CONFIRMED else PayBatchState.SENDING
        )  # one that failed here has not failed there
        draft.put(f"batch/{known.batch_id}", replace(row, recalled=True, state=state))
        draft.send("chain", _transfer(row))  # it is there; its end is told again
        known_in |= {order_id: known.batch_id for orders in known.orders for order_id in orders}
    for order in (order for payee in batch.payees for order in _orders(draft, batch, payee)):
        if order.order_id in known_in:
            draft.put(f"order/{order.order_id}", replace(order, batch_id=known_in[order.order_id]))
        else:
            _queue(draft, replace(order, state=OrderState.QUEUED))
            _schedule(draft, batch.platform)


def _recalled(like: PayBatchRow, known: KnownBatch, now: float) -> PayBatchRow:
    payees = tuple(Payee(*payee, orders) for payee, orders in zip(known.payees, known.orders, strict=True))
    return PayBatchRow(
        known.batch_id, like.platform, like.payer, 0, payees, PayBatchState.SENDING, now
    )  # its number is not known any more


def _transfer_failed(draft: WalletDraft, fact: TransferFailed) -> None:
    batch = _batch(draft, fact.batch_id)
    if batch is None or batch.state == PayBatchState.FAILED:
        return
    assert batch.state == PayBatchState.SENDING, f"batch {batch.batch_id} was final as confirmed, and now has failed"
    draft.put(f"batch/{batch.batch_id}", replace(batch, state=PayBatchState.FAILED, reason=fact.reason))
    given_up: list[str] = []
    queued: list[str] = []
    for order in (order for payee in batch.payees for order in _orders(draft, batch, payee)):
        order_id = order.order_id
        at_fault = not fact.refused or order.payee in fact.refused
        order = replace(order, tries=order.tries + at_fault, reason=fact.reason)
        if order.tries < MAX_TRIES:
            _queue(draft, replace(order, state=OrderState.QUEUED))
            queued.append(order_id)
        else:
            draft.put(f"order/{order_id}", replace(order, state=OrderState.GIVEN_UP))
            given_up.append(order_id)
    if queued:
        draft.send("ledger", PayOutDelayed(tuple(queued), f"a transfer failed, to be repeated: {fact.reason}"))
        _schedule(draft, batch.platform)
    if given_up:
        text = f"given up after {MAX_TRIES} transfers failed, until a payment cycle is run by hand: {fact.reason}"
        draft.send("ledger", PayOutDelayed(tuple(given_up), text))


def _undelivered(draft: WalletDraft, fact: Undelivered) -> None:
    """Money messages stay on this node: whatever kept them back, they are sent again."""
    message = _sent(fact.body)
    if isinstance(message, Transfer):
        batch = _batch(draft, message.batch_id)
        reason = f"{fact.to.rpartition('/')[2]} did not take the transfer, which is asked for again: {fact.reason}"
        if batch and batch.state == PayBatchState.SENDING and batch.reason != reason:
            _explain(draft, batch, reason)
    draft.send(fact.to, message)


def _resume(draft: WalletDraft, command: ResumePayments) -> None:
    """The chain port repeats its last word on what it knows, and takes on what it does not."""
    for _, batch in draft.readable("batch/"):
        if batch.state == PayBatchState.SENDING:
            draft.send("chain", _transfer(batch))
    for _, cycle in draft.readable("cycle/"):
        if cycle.next_at is not None:
            _schedule(draft, cycle.platform)


def _batch(draft: WalletDraft, batch_id: str) -> PayBatchRow | None:
    """Return a batch; None for one of a time that this journal has forgotten, which is heard of with its orders."""
    return draft.row(PayBatchRow, f"batch/{batch_id}")


_sent = Decoder[Any](Transfer | PaidOut | PayOutDelayed)


def _transfer(batch: PayBatchRow) -> Transfer:
    payees = tuple((payee.payee, payee.amount) for payee in batch.payees)
    orders = tuple(payee.order_ids for payee in batch.payees)
    return Transfer(batch.batch_id, batch.platform, batch.payer, payees, orders)


def _batches(orders: list[PayOrderRow], minimum: Decimal, max_payees: int) -> Iterator[list[list[PayOrderRow]]]:
    """Yield lists of payees, each a list of its orders: bounded numbers of payees and orders, every order once.

    A payee who made a batch fail gets one of his own: one whom no token can be sent to must not sink the others.
    """
    by_payee: dict[str, list[PayOrderRow]] = {}
    for order in orders:
        by_payee.setdefault(order.payee, []).append(order)
    batch: list[list[PayOrderRow]] = []
    size = 0
    for theirs in by_payee.values():
        if total_of(order.amount for order in theirs) < minimum:
            continue
        for start in range(0, len(theirs), MAX_BATCH_ORDERS):
            part = theirs[start : start + MAX_BATCH_ORDERS]
            if any(order.tries for order in part):
                yield [part]
                continue
            if batch and (len(batch) == max_payees or size + len(part) > MAX_BATCH_ORDERS):
                yield batch
                batch, size = [], 0
            batch.append(part)
            size += len(part)
    if batch:
        yield batch


class Wallet(TableMachine):
    """The machine; see the module's docstring.

    `intervals_s` gives cycle lengths of platforms, `default_interval_s` that of all others; a payee's sum below
    `minimum` (GLM) waits for more. `payees` bounds a batch per platform where a network takes fewer than 50.
    """

    name = "wallet"
    rows = WalletRow
    table = Table(
        On(PayOut, "ledger", _pay_out),
        On(PaidBefore, "ledger", _paid_before),
        On(SetCycle, EDGE, _set_cycle),
        On(RunCycle, EDGE, _run_cycle),
        On(ResumePayments, EDGE, _resume),
        On(CycleDue, ITSELF, _cycle_due),
        On(TransferSent, "chain", _transfer_sent),
        On(TransferMined, "chain", _transfer_mined),
        On(TransferConfirmed, "chain", _transfer_confirmed),
        On(TransferFailed, "chain", _transfer_failed),
        On(TransferDelayed, "chain", _transfer_delayed),
        On(OrdersKnown, "chain", _orders_known),
        On(Undelivered, ITSELF, _undelivered),
    )

    def __init__(
        self,
        node: str,
        intervals_s: Mapping[str, float] | None = None,
        default_interval_s: float = 300.0,
        minimum: str = "0",
        payees: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(node)
        self._intervals_s = dict(intervals_s or {})
        self._default_interval_s = default_interval_s
        self.minimum = Decimal(minimum)
        self.payees = dict(payees or {})

    def draft(self, rows: Rows, meta: Meta) -> WalletDraft:
        """Return the step to be."""
        return WalletDraft(rows, meta, self)

    def interval_s(self, platform: str) -> float:
        """Return how often a platform pays, unless a person set it."""
        return self._intervals_s.get(platform, self._default_interval_s)
