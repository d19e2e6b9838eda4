"""Claims of payments that the chain port still has to check, on disk beside the engines' rows, and whose turn it is.

What a payer claims may be false, and there may be thousands of it: that delays nobody else by more than one look.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

from golem.chain.schema import connect

log = logging.getLogger("golem.chain")

FEW = 20  # claims of one payer on one platform that are looked at in the same time; the others come after them
REST = 0.25  # of a claim's age passes before the next look at it: what does not show for long is asked ever more rarely
MAX_REST_S = 300.0


@dataclass(frozen=True, slots=True)
class Claim:
    """A claimed payment whose check is not finished. `created` and `not_before` in seconds of the epoch."""

    claim_id: str
    platform: str
    tx_hash: str
    payer: str
    payee: str
    amount_wei: int
    claimed_wei: int
    created: float
    not_before: float = 0.0  # an older block does not pay it


class Claims:
    """The claims that wait for an answer; in the same file, whatever their network."""

    def __init__(self, path: Path | str) -> None:
        self._sql = connect(path)

    def close(self) -> None:
        self._sql.close()

    def add(self, claim: Claim) -> None:
        """A repeat replaces the first and keeps its age: who asks again and again does not make a claim young."""
        where = "where id=? and platform=? and tx_hash=? and payer=? and payee=?"
        same = (claim.claim_id, claim.platform, claim.tx_hash, claim.payer, claim.payee)
        first = self._sql.execute(f"select created from claim {where}", same).fetchone()
        if first is not None and isinstance(first[0], float):
            claim = replace(claim, created=min(first[0], claim.created))
        row = texts(claim)
        self._sql.execute("insert or replace into claim values(?,?,?,?,?,?,?,?,?,?)", (*row, checksum(row)))

    def remove(self, claim_id: str) -> None:
        self._sql.execute("delete from claim where id=?", (claim_id,))

    def all(self) -> list[Claim]:
        """Oldest first. One that does not fit its checksum is dropped: the ledger asks again until it is answered."""
        found = []
        for rowid, *row, check in self._sql.execute("select rowid, * from claim order by created, id").fetchall():
            if checksum(row) == check:
                found.append(claim_of(row))
            else:
                log.error("a claim in chain.db is damaged (%s); it is forgotten, and asked for again", str(row[0])[:80])
                self._sql.execute("delete from claim where rowid=?", (rowid,))
        return found


class Turns:
    """Say which claim is looked at next. Payers take turns, each with its claim that has waited longest."""

    def __init__(self) -> None:
        self._due: dict[str, float] = {}  # claim -> when it may be looked at again, by a clock that nobody sets
        self._turns: dict[tuple[str, str], int] = {}  # payer and platform -> number of its last turn
        self._count = 0

    def next(self, claims: Iterable[Claim], now: float) -> Claim | float:
        """Return the claim to look at, or the time when one will be due (`inf`: never). `claims`: all, oldest first."""
        few: dict[tuple[str, str], list[Claim]] = {}
        for claim in claims:
            mine = few.setdefault((claim.payer.lower(), claim.platform), [])
            if len(mine) < FEW:
                mine.append(claim)
        open_ids = {claim.claim_id for mine in few.values() for claim in mine}
        self._due = {claim_id: at for claim_id, at in self._due.items() if claim_id in open_ids}
        self._turns = {payer: turn for payer, turn in self._turns.items() if payer in few}
        ready: list[tuple[int, tuple[str, str], Claim]] = []
        wake_at = float("inf")
        for payer, mine in few.items():
            at, _, first = min((self._due.get(one.claim_id, float("-inf")), i, one) for i, one in enumerate(mine))
            wake_at = min(wake_at, at)
            if at <= now:
                ready.append((self._turns.get(payer, 0), payer, first))
        if not ready:
            return wake_at
        _, payer, claim = min(ready, key=lambda one: one[0])
        self._count += 1
        self._turns[payer] = self._count
        return claim

    def rest(self, claim: Claim, now: float, poll_s: float, age_s: float) -> None:
        """Leave a claim alone for a poll at least, and longer the older it is."""
        self._due[claim.claim_id] = now + max(poll_s, min(age_s * REST, MAX_REST_S))


def texts(claim: Claim) -> tuple[Any, ...]:
    """A claim as the columns of a row."""
    c = claim
    return (c.claim_id, c.platform, c.tx_hash, c.payer, c.payee, str(c.amount_wei), str(c.claimed_wei), c.created, c.not_before)


def claim_of(row: Sequence[Any]) -> Claim:
    """The claim that `texts` was made of."""
    i, p, h, r, e, a, c, t, b = row
    return Claim(i, p, h, r, e, int(a), int(c), t, b)


def checksum(row: Sequence[Any]) -> int:
    """What tells a row from a damaged one."""
    return crc32(repr(tuple(row)).encode())
