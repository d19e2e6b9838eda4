"""The file that all parts of the chain port share: its tables, their number, and how it is opened (synchronous=FULL)."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

log = logging.getLogger("golem.chain")

FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 30.0
BUSY_MS = 50  # the event loop waits no longer for a lock; whoever works on the file waits it out (see `OwnDisk`)
SCHEMA_NUMBER = 7  # with each change of the tables one more
SCHEMA = """
create table batch(
  account text, id text, payees text, state text, reason text, announced int, seq integer primary key,
  refused text not null default '', unique(account, id));
create table ordered(
  account text, id text, batch text, payee int, primary key(account, id, batch)) without rowid;
create index ordered_batch on ordered(account, batch);
create table tx(
  id integer primary key, account text, nonce int, kind text, batch text, recipient text, data blob, gas int,
  total_wei text, state text, block int, block_hash text, winner text, gas_used int, fee_wei text,
  reopened int not null default 0, void int not null default 0, sure int not null default 0, unique(account, nonce));
create index tx_state on tx(account, state);
create index tx_batch on tx(batch);
create table seen(
  id integer primary key, tx int, teller text, text text, at real);
create index seen_tx on seen(tx, teller);
create table attempt(
  hash text, tx int, raw blob, max_fee text, priority_fee text, created real, head int, sends int,
  empty int not null default 0, primary key(hash, tx));
create index attempt_tx on attempt(tx);
create table hold(account text primary key, reason text);
create table generation(one int primary key, boot text);
create table chain(id text primary key, genesis text);
create table claim(
  id text primary key, platform text, tx_hash text, payer text, payee text, amount_wei text, claimed_wei text,
  created real, not_before real, checksum int);
create table verified(
  id text primary key, platform text, tx_hash text, payer text, payee text, amount_wei text, claimed_wei text,
  created real, not_before real, block int, block_hash text, lost_at real, trouble text, checksum int,
  genesis text not null default '', deep int not null default 0);
create table purse(chain text, address text, gas_wei text, token_wei text, at real, primary key(chain, address));
"""


def connect(path: Path | str) -> sqlite3.Connection:
    """Open the file, or make it. ValueError when it is none, or has another schema."""
    try:
        sql = sqlite3.connect(path, isolation_level=None, timeout=10.0)
        sql.text_factory = lambda raw: raw.decode(errors="replace")  # a text that is none any more is no name of anything
        sql.execute("pragma journal_mode=wal")
        sql.execute("pragma synchronous=full")
        _bring_up(sql, path)
        sql.execute(f"pragma busy_timeout={BUSY_MS}")
    except sqlite3.DatabaseError as error:
        raise ValueError(f"cannot open {path}: {error}") from None
    return sql


def _bring_up(sql: sqlite3.Connection, path: Path | str) -> None:
    """Make the tables in a new file; in another one they have to be these."""
    (number,) = sql.execute("pragma user_version").fetchone()
    if number == SCHEMA_NUMBER:
        return
    if number or sql.execute("select 1 from sqlite_master").fetchone():
        sql.close()
        raise ValueError(
            f"{path} has schema {number}, this version of the program works with schema {SCHEMA_NUMBER}: payments under way "
            "are known to that file alone, so use the version that wrote it until they are through, then move the file away"
        )
    sql.executescript(f"begin immediate; {SCHEMA} pragma user_version={SCHEMA_NUMBER}; commit;")


class StoreDamaged(sqlite3.DataError):
    """What stands in a row of the file cannot be what was written; the text names the row."""


def typed(what: str, row: Sequence[Any], kinds: Sequence[type], names: Sequence[str]) -> None:
    """See that the values of a row are of the kinds that were written. Raises `StoreDamaged`."""
    for value, kind, name in zip(row, kinds, names, strict=True):
        if not isinstance(value, kind):
            raise StoreDamaged(f"{what} in chain.db cannot be read: {name} is {type(value).__name__}, not {kind.__name__}")


class OwnDisk:
    """What the node's own disk does to a lasting work: the work waits it out, with growing pauses, and says so."""

    def __init__(self, what: str) -> None:
        self._what, self._pause_s = what, FIRST_PAUSE_S
        self.trouble = ""  # for people

    def well(self) -> None:
        """The work was done."""
        if self.trouble:
            log.info("%s goes on", self._what)
        self.trouble, self._pause_s = "", FIRST_PAUSE_S

    async def wait(self, error: Exception) -> None:
        """The work has failed: say why, and wait."""
        words = f"{self._what} waits: {error}"
        if words != self.trouble:
            log.error("%s", words)
        self.trouble = words
        await trio.sleep(self._pause_s)
        self._pause_s = min(self._pause_s * 2, LAST_PAUSE_S)
