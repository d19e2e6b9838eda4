"""The audit of this node's books (`actors/auditor/`), in a thread: on a copy of one moment, while the node works on."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from actors.auditor.audit import audit
from actors.auditor.report import Charged, Finding, Report, Sums
from actors.kernel.reading import JournalReader
from actors.kernel.records import RowDamaged
from actors.kernel.row_view import RowView, row_decoder
from actors.ledger.rows import LedgerRow
from actors.wallet.rows import WalletRow
from golem.chain.moved import moved
from protocol.types import amount_text, timestamp_text

if TYPE_CHECKING:
    from golem.node.node import Node

_TABLES = {"ledger": row_decoder(LedgerRow), "wallet": row_decoder(WalletRow)}


class _Copy(JournalReader):
    """The journal as of the first read, on a connection of its own."""

    def __init__(self, reader: sqlite3.Connection) -> None:
        self._reader, self._looks = reader, False
        reader.execute("begin")


class _Rows:
    """An actor's rows; those that are damaged are left out and named."""

    def __init__(self, copy: _Copy, actor: str, damaged: list[Finding]) -> None:
        self._view, self._damaged = RowView(copy, actor, _TABLES[actor]), damaged  # type: ignore[arg-type]

    def prefix(self, prefix: str) -> Iterator[tuple[str, Any]]:
        """Yield (key, row)."""
        yield from self._view.readable(prefix, [])
        self._damaged += [Finding(f"row {one.actor} {one.key}", _words(one)) for one in self._view.damage]
        self._view.damage.clear()


def _words(error: RowDamaged) -> str:
    return f"is damaged, so that nothing can be proved by it: {error}"


async def audit_books(node: Node) -> dict[str, Any]:
    """Audit; see `render`. Raises `sqlite3.Error` where a file cannot be read."""
    report = await trio.to_thread.run_sync(_audit, node.config.data_dir)
    return {"at": timestamp_text(node.clock()), **render(report)}


def _audit(data_dir: Path) -> Report:
    damaged: list[Finding] = []
    with closing(sqlite3.connect(f"file:{data_dir / 'node.db'}?mode=ro", uri=True, timeout=10.0)) as sql:
        sql.isolation_level = None
        copy = _Copy(sql)
        rows = _Rows(copy, "ledger", damaged), _Rows(copy, "wallet", damaged)
        copy.row("ledger", "clock")  # the copy is of now; the chain port's file is read after it, and may know more
        found, known, unread = moved(data_dir / "chain.db")
        report = audit(*rows, found, known)
    damaged += [Finding("chain.db", words) for words in unread]
    if damaged:  # what is missing makes sums wrong: they would accuse documents that are in order
        report = Report(findings=damaged)
    return report


def render(report: Report) -> dict[str, Any]:
    """Return a report for people and programs: `addsUp`, sums of each platform and role, allocations, findings. In GLM."""
    return {
        "addsUp": not report.findings, "sums": [_sums(one) for one in report.sums],
        "allocations": [_charged(one) for one in report.allocations],
        "transfersCompared": report.transfers, "transfersUnknown": report.unproved,
        "findings": [{"subject": one.subject, "words": one.words} for one in report.findings],
    }  # fmt: skip


def _sums(one: Sums) -> dict[str, Any]:
    names = ("issued", "accepted", "open", "rejected", "settled", "queued", "in_flight")
    amounts = {name.replace("_f", "F"): amount_text(getattr(one, name)) for name in names}
    return {"paymentPlatform": one.platform, "role": one.role, "documents": one.documents, **amounts}


def _charged(one: Charged) -> dict[str, Any]:
    released = one.row.released_at is not None
    return {
        "allocationId": one.row.allocation_id, "paymentPlatform": one.row.platform, "total": one.row.total,
        "paid": amount_text(one.paid), "reserved": amount_text(one.reserved), "free": amount_text(one.free),
        "released": released,
    }  # fmt: skip
