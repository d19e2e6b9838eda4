"""Allocations: the part of the ledger that sets money aside and charges it.

Invariant after every step: 0 <= spent <= total, and nothing is charged to an allocation that is released.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from msgspec.structs import replace

from actors.kernel.draft import Declined, Draft
from actors.ledger.rows import AllocationRow, owed, remaining, reserved
from protocol.amounts import minus, total_of
from protocol.ledger import AllocationTimeout, AmendAllocation, CreateAllocation, ReleaseAllocation
from protocol.types import Done, amount, amount_text, node_id

TEN_YEARS_S = 3652 * 24 * 3600.0


def amount_of(text: str) -> Decimal:
    """Return a command's amount; declines what is none."""
    try:
        return amount(text)
    except ValueError as error:
        raise Declined("bad_request", str(error)) from None


def create(draft: Draft, command: CreateAllocation) -> None:
    """Set money aside if the wallet has it beyond what other live allocations hold and what is to be paid."""
    key = f"allocation/{command.allocation_id}"
    if draft.row(AllocationRow, key):
        draft.reply(Done())
        return
    total = amount_of(command.total)
    try:
        own = node_id(command.address) == draft.me
    except ValueError as error:
        raise Declined("bad_request", str(error)) from None
    if not own:
        raise Declined("forbidden", f"account {command.address} is not one of this node")
    timeout_at = command.timeout_at if command.timeout_at is not None else draft.now + TEN_YEARS_S
    if timeout_at <= draft.now:
        raise Declined("bad_request", "the timeout of the allocation has passed already")
    _check_funds(draft, command.platform, total, command.balance, besides="")
    _store(
        draft,
        AllocationRow(
            allocation_id=command.allocation_id,
            address=command.address,
            platform=command.platform,
            total=amount_text(total),
            spent="0",
            created_at=draft.now,
            updated_at=draft.now,
            timeout_at=timeout_at,
            extend_timeout_s=command.extend_timeout_s,
            agent=command.agent,
        ),
    )
    draft.reply(Done())


def amend(draft: Draft, command: AmendAllocation) -> None:
    """Change total (never below what is spent) or timeout."""
    row = _live(draft, command.allocation_id)
    total = amount_of(command.total) if command.total is not None else Decimal(row.total)
    timeout_at = command.timeout_at if command.timeout_at is not None else row.timeout_at
    if total < Decimal(row.spent):
        raise Declined("bad_request", f"{row.spent} of the allocation is spent: it cannot shrink to {amount_text(total)}")
    if timeout_at <= draft.now:
        raise Declined("bad_request", "the timeout of the allocation has passed already")
    if total > Decimal(row.total):
        _check_funds(draft, row.platform, minus(total, row.spent), command.balance, besides=row.allocation_id)
    _store(draft, row, total=amount_text(total), timeout_at=timeout_at)
    draft.reply(Done())


def release(draft: Draft, command: ReleaseAllocation) -> None:
    """Free the remainder. What was charged before stays owed and gets paid."""
    row = draft.row(AllocationRow, f"allocation/{command.allocation_id}")
    if row is None:
        raise Declined("unknown", f"there is no allocation {command.allocation_id}")
    if row.released_at is not None:
        raise Declined("gone", f"Allocation {row.allocation_id} has been already released")
    _store(draft, row, released_at=draft.now)
    draft.reply(Done())


def timeout(draft: Draft, timer: AllocationTimeout) -> None:
    """Release at the timeout; an amended one has set a timer of its own."""
    row = draft.row(AllocationRow, f"allocation/{timer.allocation_id}")
    if row is not None and row.released_at is None and row.timeout_at <= draft.now:
        _store(draft, row, released_at=draft.now)


def usable(draft: Draft, allocation_id: str, payer_addr: str, platform: str) -> AllocationRow:
    """Return a live allocation that may pay from this account on this platform; declines otherwise."""
    row = draft.row(AllocationRow, f"allocation/{allocation_id}")
    if row is None:
        raise Declined("bad_request", f"Allocation {allocation_id} not found")
    if row.released_at is not None or row.timeout_at <= draft.now:
        raise Declined("bad_request", f"Allocation {allocation_id} has been released")
    if row.platform != platform:
        raise Declined("bad_request", f"the allocation is on {row.platform}, the document on {platform}")
    if row.address.lower() != payer_addr.lower():
        raise Declined("bad_request", f"the allocation pays from {row.address}, the document asks {payer_addr}")
    return row


def charge(draft: Draft, row: AllocationRow, sum_due: Decimal) -> None:
    """Spend `sum_due` of an allocation; declines where it holds less."""
    left = remaining(row)
    if sum_due > left:
        raise Declined("unfunded", f"Not enough funds. Allocated: {amount_text(left)} Needed: {amount_text(sum_due)}")
    timeout_at = row.timeout_at
    if row.extend_timeout_s is not None:
        timeout_at = max(timeout_at, draft.now + row.extend_timeout_s)
    _store(draft, row, spent=amount_text(total_of((row.spent, sum_due))), timeout_at=timeout_at)


def _live(draft: Draft, allocation_id: str) -> AllocationRow:
    row = draft.row(AllocationRow, f"allocation/{allocation_id}")
    if row is None or row.released_at is not None:
        raise Declined("unknown", f"there is no live allocation {allocation_id}")
    return row


def _check_funds(draft: Draft, platform: str, wanted: Decimal, balance: str | None, besides: str) -> None:
    if balance is None:
        return
    held, debt = reserved(draft, platform, besides), owed(draft, platform)
    free = max(minus(amount_of(balance), total_of((held, debt))), Decimal(0))
    if wanted > free:
        raise Declined(
            "unfunded",
            f"Insufficient funds to make allocation. Top up your account or release all existing allocations "
            f"to unlock the funds. Requested: {amount_text(wanted)}, available: {amount_text(free)}, "
            f"reserved: {amount_text(held)}, accepted and not paid yet: {amount_text(debt)}",
        )


def _store(draft: Draft, row: AllocationRow, **changes: Any) -> None:
    row = replace(row, updated_at=draft.now, **changes)
    assert 0 <= Decimal(row.spent) <= Decimal(row.total), row
    key, live = f"allocation/{row.allocation_id}", row.released_at is None
    draft.put(key, row)
    draft.wake(key, row.timeout_at if live else None, AllocationTimeout(row.allocation_id) if live else None)
