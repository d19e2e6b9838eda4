"""What the chain port's file says that this node's account has paid: for the audit, read in a thread."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from contextlib import closing
from decimal import Decimal
from pathlib import Path

from golem.chain.rows import batch_of
from golem.chain.schema import StoreDamaged
from protocol.types import from_wei

_WINNER = "select winner from tx where tx.batch=batch.id and tx.state='confirmed' order by tx.id desc limit 1"


def moved(path: Path) -> tuple[dict[tuple[str, str], Decimal], set[str], list[str]]:
    """Return (transaction, payee) -> GLM of all batches that are confirmed; the batches that the file knows, however they
    stand; and what of it cannot be read. Raises `sqlite3.Error`."""
    found: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
    known, damaged = set[str](), list[str]()
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10.0)) as sql:
        sql.text_factory = lambda raw: raw.decode(errors="replace")
        for *row, winner in sql.execute(f"select id, payees, state, reason, refused, ({_WINNER}) from batch").fetchall():
            try:
                batch = batch_of(row)
            except StoreDamaged as error:
                damaged.append(str(error))
                continue
            known.add(batch.batch.batch_id)
            if winner and batch.state == "confirmed":
                for payee, wei in batch.batch.payees:
                    found[str(winner), payee] += from_wei(wei)
    return dict(found), known, damaged
