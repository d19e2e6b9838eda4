"""Rows of the engine's file, and how they are read: what cannot have been written is named, and never believed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from golem.chain.schema import StoreDamaged, typed


class TransferState(StrEnum):
    """How far a batch is, or a transaction that pays one."""

    QUEUED = "queued"  # a batch that has no transaction
    ASSIGNED = "assigned"  # a batch that has one
    SIGNED = "signed"  # a transaction, from here on
    SENT = "sent"
    MINED = "mined"
    CONFIRMED = "confirmed"  # both
    FAILED = "failed"
    NONCE_LOST = "nonce_lost"  # another transaction took the nonce


class TxKind(StrEnum):
    """What a transaction is for."""

    PAY = "pay"
    APPROVE = "approve"
    MINT = "mint"
    FILL = "fill"  # it uses up a nonce


@dataclass(frozen=True, slots=True)
class TransferBatch:
    """Pay these, once: (address, wei), 1 to 50.

    `orders` names the orders that each payee is paid for: no order is ever in two batches that may both pay.
    """

    batch_id: str
    payees: tuple[tuple[str, int], ...]
    orders: tuple[tuple[str, ...], ...] = ()

    @property
    def total_wei(self) -> int:
        return sum(amount_wei for _, amount_wei in self.payees)


@dataclass(frozen=True, slots=True)
class ChainBatchRow:
    """A batch and how far it is."""

    batch: TransferBatch
    state: TransferState
    reason: str
    refused: tuple[str, ...] = ()  # payees to whom the token moves nothing


@dataclass(frozen=True, slots=True)
class TxRow:
    """One nonce."""

    id: int
    nonce: int
    kind: TxKind
    batch_id: str
    recipient: str
    data: bytes
    gas: int
    total_wei: int
    state: TransferState
    block: int
    block_hash: str
    winner: str
    gas_used: int
    fee_wei: int
    reopened: bool = False  # it was final once, and the chain lost its block
    void: bool = False  # it must not pay any more: an empty transaction is to take its nonce
    sure: bool = False  # a person said that it is to pay, whatever an older one paid


@dataclass(frozen=True, slots=True)
class Seen:
    """What somebody said of a transaction: an RPC, this node or a person. `at` in seconds of the epoch."""

    teller: str
    text: str
    at: float


@dataclass(frozen=True, slots=True)
class Attempt:
    """One signed form of a transaction. Fees in wei per gas; `created` in seconds of the epoch; `head` then."""

    hash: str
    tx_id: int
    raw: bytes
    max_fee: int
    priority_fee: int
    created: float
    head: int
    sends: int
    empty: bool = False  # it pays nothing, and takes the nonce of one that must not pay


TX_COLUMNS = (
    "id, coalesce(nonce,-1), kind, coalesce(batch,''), recipient, data, gas, total_wei, state, coalesce(block,0),"
    " coalesce(block_hash,''), coalesce(winner,''), coalesce(gas_used,0), coalesce(fee_wei,'0'), reopened, void, sure"
)


_TX_NAMES = tuple(field.name for field in fields(TxRow))
_TX_KINDS = (int, int, str, str, str, bytes, int, str, str, int, str, str, int, str, int, int, int)
_ATTEMPT_NAMES = tuple(field.name for field in fields(Attempt))
_ATTEMPT_KINDS = (str, int, bytes, str, str, float, int, int, int)


def _wei(what: str, text: str) -> int:
    if not text.isdecimal():
        raise StoreDamaged(f"{what} in chain.db cannot be read: {text[:40]!r} is no amount")
    return int(text)


def _state(what: str, text: str) -> TransferState:
    try:
        return TransferState(text)
    except ValueError:
        raise StoreDamaged(f"{what} in chain.db cannot be read: {text[:40]!r} is no state") from None


def _kind(what: str, text: str) -> TxKind:
    try:
        return TxKind(text)
    except ValueError:
        raise StoreDamaged(f"{what} in chain.db cannot be read: {text[:40]!r} is no kind") from None


def tx_of(row: tuple[object, ...]) -> TxRow:
    """Raises `StoreDamaged`."""
    typed(what := f"transaction {row[0]}", row, _TX_KINDS, _TX_NAMES)
    values = list(row)
    values[7], values[13] = _wei(what, str(values[7])), _wei(what, str(values[13]))
    values[2], values[8] = _kind(what, str(values[2])), _state(what, str(values[8]))
    values[14:] = map(bool, values[14:])
    return TxRow(*values)  # type: ignore[arg-type]


def attempt_of(row: Sequence[Any]) -> Attempt:
    """Raises `StoreDamaged`."""
    typed(what := f"the signed form {row[0]} of transaction {row[1]}", row, _ATTEMPT_KINDS, _ATTEMPT_NAMES)
    h, t, raw, most, priority, created, head, sends, empty = row
    return Attempt(h, t, raw, _wei(what, most), _wei(what, priority), created, head, sends, bool(empty))


def batch_of(row: Sequence[Any]) -> ChainBatchRow:
    """Raises `StoreDamaged`."""
    typed(what := f"batch {row[0]}", row, (str,) * 5, ("id", "payees", "state", "reason", "refused"))
    batch_id, payees, state, reason, refused = row
    try:
        found = tuple((str(payee), int(wei)) for payee, wei in json.loads(payees))
    except (ValueError, TypeError):
        raise StoreDamaged(f"{what} in chain.db cannot be read: its payees are {payees[:60]!r}") from None
    return ChainBatchRow(TransferBatch(batch_id, found), _state(what, state), reason, tuple(refused.split()))
