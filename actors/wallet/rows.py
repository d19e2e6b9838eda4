"""Rows of the wallet, and the states of orders and batches."""

from __future__ import annotations

from enum import StrEnum

from protocol.types import Message


class OrderState(StrEnum):
    """Of an order of the ledger."""

    QUEUED = "QUEUED"
    BATCHED = "BATCHED"
    PAID = "PAID"
    GIVEN_UP = "GIVEN_UP"


class PayBatchState(StrEnum):
    """Of a transfer to several payees."""

    SENDING = "SENDING"
    CONFIRMED = "CONFIRMED"
    FAILED = "FAILED"


class PayOrderRow(Message, frozen=True, tag="PayOrder"):
    """One order of the ledger. `batch_id` is the last batch it was in."""

    order_id: str
    platform: str
    payer: str
    payee: str
    amount: str
    state: OrderState
    queued_at: float
    batch_id: str = ""
    tries: int = 0
    reason: str = ""


class Payee(Message, frozen=True):
    """What a batch pays one payee, and for which orders."""

    payee: str
    amount: str
    order_ids: tuple[str, ...]


class PayBatchRow(Message, frozen=True, tag="Batch"):
    """One transfer to several payees."""

    batch_id: str
    platform: str
    payer: str
    number: int  # of the payer's batches on this platform
    payees: tuple[Payee, ...]
    state: PayBatchState
    created_at: float
    tx_hash: str = ""
    reason: str = ""
    block: int = 0
    gas_used: int = 0
    fee: str = "0"
    recalled: bool = False  # by the chain port: this journal may not know all its orders


class BatchesRow(Message, frozen=True, tag="Batches"):
    """How many batches a payer has had on a platform: no two have one id, though they pay the same orders."""

    count: int


class QueuedRow(Message, frozen=True, tag="Queued"):
    """An order that waits for a batch. `told`: its row is damaged, and that was said."""

    order_id: str
    told: bool = False


class CycleRow(Message, frozen=True, tag="Cycle"):
    """When a platform's orders are gathered. `next_at` None: with the first order that comes, one interval later."""

    platform: str
    interval_s: float
    extra_pay_time_s: float
    next_at: float | None = None
    last_at: float | None = None


WalletRow = PayOrderRow | PayBatchRow | BatchesRow | QueuedRow | CycleRow
