"""What an audit says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from actors.ledger.rows import AllocationRow
from protocol.states import Party

ZERO = Decimal(0)
#: (transaction hash, payee) -> what the chain moved there from this node's account
Moved = Mapping[tuple[str, str], Decimal]


@dataclass(frozen=True, slots=True)
class Finding:
    """What does not add up. `subject` names a document ("invoice <id>"), an allocation, an order, a batch or a payment."""

    subject: str
    words: str


@dataclass(slots=True)
class Sums:
    """What one side of the agreements of a platform comes to, in GLM. Queued and in flight are the payer's; of what a payee
    is owed, `in_flight` is claimed to be paid and being verified, `queued` is not paid as far as it knows."""

    platform: str
    role: Party
    documents: int = 0
    issued: Decimal = ZERO
    open: Decimal = ZERO
    rejected: Decimal = ZERO
    accepted: Decimal = ZERO
    settled: Decimal = ZERO
    queued: Decimal = ZERO
    in_flight: Decimal = ZERO


@dataclass(frozen=True, slots=True)
class Charged:
    """What became of an allocation, in GLM: `paid` on chain, `reserved` for orders that are not paid yet, `free` or, once it
    is released, given back."""

    row: AllocationRow
    paid: Decimal
    reserved: Decimal
    free: Decimal


@dataclass(slots=True)
class Report:
    """What an audit found; the books add up where `findings` is empty."""

    sums: list[Sums] = field(default_factory=list)
    allocations: list[Charged] = field(default_factory=list)
    transfers: int = 0  # payees of batches that were held against the chain
    unproved: int = 0  # those of paid batches that the chain port does not know
    findings: list[Finding] = field(default_factory=list)
