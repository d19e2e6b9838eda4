"""What is said about paying out: ledger -> wallet -> chain port and back. Handled by `actors/wallet/machine.py`.

All of it stays on the node; what the payee is told is in `protocol/ledger.py`. Amounts are decimal strings in GLM.
A batch is told apart by its id. Nonces are the chain port's alone: nobody else knows what an account has sent.
"""

from __future__ import annotations

from protocol.types import Message


# -- ledger <-> wallet
class PayOut(Message, frozen=True):
    """ledger -> wallet: pay this, once. A repeat of `order_id` changes nothing."""

    order_id: str
    platform: str  # "erc20-holesky-tglm"
    payer: str
    payee: str
    amount: str


class PaidBefore(Message, frozen=True):
    """ledger -> wallet: do not pay these orders; a payment did so that this node's journal had forgotten."""

    order_ids: tuple[str, ...]


class PaidOut(Message, frozen=True):
    """wallet -> ledger: these orders are paid, final at the network's confirmation depth."""

    order_ids: tuple[str, ...]
    platform: str
    payer: str
    payee: str
    amount: str  # the sum
    tx_hash: str  # 0x + 64 hex


class PayOutDelayed(Message, frozen=True):
    """wallet -> ledger: why orders wait (no gas, no token, network down ...). Shown to people; they stay queued."""

    order_ids: tuple[str, ...]
    reason: str


# -- wallet <-> chain port
class Transfer(Message, frozen=True):
    """wallet -> chain: pay this batch, once. A repeat of `batch_id` changes nothing, and is answered by the last word on it.

    `orders` says for each payee which orders of the ledger it is paid for: the chain port pays no order in two batches.
    """

    batch_id: str
    platform: str
    payer: str
    payees: tuple[tuple[str, str], ...]  # (address, amount), 1 to 50
    orders: tuple[tuple[str, ...], ...] = ()


class KnownBatch(Message, frozen=True):
    """A batch as the chain port has it."""

    batch_id: str
    payees: tuple[tuple[str, str], ...]
    orders: tuple[tuple[str, ...], ...]


class OrdersKnown(Message, frozen=True):
    """chain -> wallet: `batch_id` is not taken, and pays nothing: some of its orders are in these batches already."""

    batch_id: str
    batches: tuple[KnownBatch, ...]


class TransferSent(Message, frozen=True):
    """chain -> wallet: broadcast for the first time, or with a higher fee. Not final."""

    batch_id: str
    tx_hash: str


class TransferMined(Message, frozen=True):
    """chain -> wallet: in a block. Not final: the block may be lost yet."""

    batch_id: str
    tx_hash: str
    block: int


class TransferConfirmed(Message, frozen=True):
    """chain -> wallet: paid; final at the network's confirmation depth."""

    batch_id: str
    tx_hash: str
    block: int
    gas_used: int
    fee: str  # in the network's coin


class TransferFailed(Message, frozen=True):
    """chain -> wallet: nothing was paid and, for this batch, never will be. Final.

    Its transaction was reverted, another one took the nonce, or none can be made. `refused`: the payees whose fault it is,
    where that is known; the others can be paid together.
    """

    batch_id: str
    reason: str
    refused: tuple[str, ...] = ()


class TransferDelayed(Message, frozen=True):
    """chain -> wallet: not sent or not final yet, and why; the chain port goes on by itself when the cause is gone."""

    batch_id: str
    reason: str


#: What an engine tells of a batch.
TransferNews = TransferSent | TransferMined | TransferConfirmed | TransferFailed | TransferDelayed


# -- ledger <-> chain port (the payee's side)
class VerifyTransfer(Message, frozen=True):
    """ledger -> chain: does this transaction pay `amount` beyond what it already settled?"""

    claim_id: str
    platform: str
    tx_hash: str
    payer: str
    payee: str
    amount: str
    already_claimed: str
    not_before: float = 0.0  # a transfer in an older block does not pay this: it was made for something else


class TransferVerified(Message, frozen=True):
    """chain -> ledger: yes, at the confirmation depth."""

    claim_id: str
    tx_hash: str


class TransferRejected(Message, frozen=True):
    """chain -> ledger: no, and why."""

    claim_id: str
    reason: str


# -- payment cycles: commands of the node's edges, answered by `CycleSet` or `Refused`
class SetCycle(Message, frozen=True):
    """Pay what is queued on a platform every `interval_s` seconds; None leaves a value as it is."""

    platform: str
    interval_s: float | None
    extra_pay_time_s: float | None = None
    next_at: float | None = None


class ResumePayments(Message, frozen=True):
    """edge -> wallet, when the node starts: batches under way are asked for again, and cycles run."""


class RunCycle(Message, frozen=True):
    """Pay what is queued on a platform now, given-up orders included."""

    platform: str


class CycleSet(Message, frozen=True):
    """It is done; the next run is due at `next_at`."""

    platform: str
    next_at: float


# -- the wallet's own timer
class CycleDue(Message, frozen=True):
    """Time to gather what is queued on a platform."""

    platform: str
