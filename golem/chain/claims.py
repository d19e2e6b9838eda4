"""Claims of payments that the chain port still has to check, on disk beside the engines' rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from golem.chain.store import connect

log = logging.getLogger("golem.chain")


@dataclass(frozen=True, slots=True)
class Claim:
    """A claimed payment whose check is not finished. `created` in seconds of the epoch."""

    claim_id: str
    platform: str
    tx_hash: str
    payer: str
    payee: str
    amount_wei: int
    claimed_wei: int
    created: float


class Claims:
    """The claims that wait for an answer; in the same file, whatever their network."""

    def __init__(self, path: Path | str) -> None:
        self._sql = connect(path)

    def close(self) -> None:
        self._sql.close()

    def add(self, claim: Claim) -> None:
        """A repeat replaces the first."""
        row = _texts(claim)
        self._sql.execute("insert or replace into claim values(?,?,?,?,?,?,?,?,?)", (*row, _checksum(row)))

    def remove(self, claim_id: str) -> None:
        self._sql.execute("delete from claim where id=?", (claim_id,))

    def all(self) -> list[Claim]:
        """Oldest first. One that does not fit its checksum is dropped: the ledger asks again until it is answered."""
        found = []
        for rowid, *row, checksum in self._sql.execute("select rowid, * from claim order by created, id").fetchall():
            if _checksum(row) == checksum:
                i, p, h, r, e, a, c, t = row
                found.append(Claim(i, p, h, r, e, int(a), int(c), t))
            else:
                log.error("a claim in chain.db is damaged (%s); it is forgotten, and asked for again", str(row[0])[:80])
                self._sql.execute("delete from claim where rowid=?", (rowid,))
        return found


def _texts(claim: Claim) -> tuple[Any, ...]:
    c = claim
    return (c.claim_id, c.platform, c.tx_hash, c.payer, c.payee, str(c.amount_wei), str(c.claimed_wei), c.created)


def _checksum(row: Sequence[Any]) -> int:
    return crc32(repr(tuple(row)).encode())
