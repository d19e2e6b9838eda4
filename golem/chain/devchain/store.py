"""The dev chain's disk: one SQLite file with trie nodes and headers as key-value pairs, and three indexes.

Everything a block changes (state, headers, receipts, logs, mempool) commits in ONE transaction, so that `kill -9` never
leaves half a block. WAL with synchronous=FULL: what was acknowledged is on disk, so that a power cut loses no block either.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eth.db.backends.base import BaseDB

CACHE_LIMIT = 200_000  # entries; about 60 MB

SCHEMA = """
create table if not exists kv(k blob primary key, v blob) without rowid;
create table if not exists tx(hash blob primary key, block int, idx int, receipt text) without rowid;
create index if not exists tx_block on tx(block);
create table if not exists log(block int, idx int, address blob, t0 blob, t1 blob, t2 blob, t3 blob, body text,
  primary key(block, idx)) without rowid;
create index if not exists log_topics on log(address, t0, t1, t2, block);
create table if not exists pool(hash blob primary key, raw blob, seq integer);
"""

TxRow = tuple[bytes, int, int, str]
LogRow = tuple[int, int, bytes, bytes | None, bytes | None, bytes | None, bytes | None, str]


class DevChainStore(BaseDB):
    """A write-back key-value cache (what py-evm sees) and the indexes (what JSON-RPC reads)."""

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.execute("pragma journal_mode=wal")
        self.connection.execute("pragma synchronous=full")
        self.connection.executescript(SCHEMA)
        self._cache: dict[bytes, bytes | None] = {}
        self._dirty: dict[bytes, bytes | None] = {}  # None: deleted

    def __getitem__(self, key: bytes) -> bytes:
        if key not in self._cache:
            row = self.connection.execute("select v from kv where k=?", (key,)).fetchone()
            if row is None:
                raise KeyError(key)
            self._cache[key] = row[0]
        value = self._cache[key]
        if value is None:
            raise KeyError(key)
        return value

    def __setitem__(self, key: bytes, value: bytes) -> None:
        self._cache[key] = self._dirty[key] = value

    def _exists(self, key: bytes) -> bool:
        try:
            self[key]
        except KeyError:
            return False
        return True

    def __delitem__(self, key: bytes) -> None:
        self._cache[key] = self._dirty[key] = None

    def forget(self) -> None:
        """Drop what was written and not committed."""
        self._dirty.clear()
        self._cache.clear()

    def commit(self, statements: Iterable[tuple[str, list[tuple[Any, ...]]]] = ()) -> None:
        """Write the pending pairs and run `statements` (SQL, rows) in one transaction."""
        self.connection.execute("begin immediate")
        try:
            for sql, rows in statements:
                self.connection.executemany(sql, rows)
            self.connection.executemany("insert or replace into kv values(?,?)", list(self._dirty.items()))
            self.connection.execute("commit")
        except BaseException:
            self.connection.execute("rollback")
            self.forget()
            raise
        self._dirty.clear()
        if len(self._cache) > CACHE_LIMIT:
            self._cache.clear()

    # -- indexes

    def receipt(self, tx_hash: bytes) -> str | None:
        row = self.connection.execute("select receipt from tx where hash=?", (tx_hash,)).fetchone()
        return row[0] if row else None

    def place(self, tx_hash: bytes) -> tuple[int, int] | None:
        """(block number, index in it) of a mined transaction."""
        row = self.connection.execute("select block, idx from tx where hash=?", (tx_hash,)).fetchone()
        return (row[0], row[1]) if row else None

    def last_busy_block(self) -> int:
        """Number of the newest block with a transaction."""
        return int(self.connection.execute("select coalesce(max(block), 0) from tx").fetchone()[0])

    def pooled(self) -> list[bytes]:
        """Raw transactions of the mempool in order of arrival."""
        return [row[0] for row in self.connection.execute("select raw from pool order by seq")]

    def logs(self, first: int, last: int, addresses: list[bytes], topics: list[list[bytes]], limit: int) -> list[str]:
        """JSON bodies of the logs in blocks first..last; an empty list at a place matches anything there."""
        clauses, values = ["block between ? and ?"], [first, last]  # type: list[str], list[Any]
        for column, wanted in [("address", addresses), *((f"t{i}", topic) for i, topic in enumerate(topics))]:
            if wanted:
                clauses.append(f"{column} in ({','.join('?' * len(wanted))})")
                values += wanted
        sql = f"select body from log where {' and '.join(clauses)} order by block, idx limit ?"
        return [row[0] for row in self.connection.execute(sql, [*values, limit])]
