"""What this node's account was last known to hold, on disk: what may be reserved while no endpoint answers."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from golem.chain.schema import connect
from golem.chain.token import Balances

MAX_AGE_S = 24 * 3600.0  # an older balance says nothing any more


class Held(NamedTuple):
    """A balance and when it was read, in seconds of the epoch. `is_fresh`: just now, else `trouble` says why not."""

    balances: Balances
    at: float
    trouble: str = ""

    @property
    def is_fresh(self) -> bool:
        return not self.trouble


class Purses:
    """The last known balances, one a chain and account; in the file of the engines."""

    def __init__(self, path: Path | str) -> None:
        self._sql = connect(path)

    def close(self) -> None:
        self._sql.close()

    def note(self, chain: str, address: str, balances: Balances, at: float) -> None:
        """Remember what was read."""
        row = (chain, address, str(balances.gas_wei), str(balances.token_wei), at)
        self._sql.execute("insert or replace into purse values(?,?,?,?,?)", row)

    def last(self, chain: str, address: str) -> tuple[Balances, float] | None:
        """What was read last, and when."""
        query = "select gas_wei, token_wei, at from purse where chain=? and address=?"
        row = self._sql.execute(query, (chain, address)).fetchone()
        try:
            return (Balances(int(row[0]), int(row[1])), float(row[2])) if row else None
        except (ValueError, TypeError):
            return None  # damaged: the next look writes it anew
