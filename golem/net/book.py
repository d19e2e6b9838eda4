"""The address book: every peer we ever heard of, with every address, on disk, so that peers are found after a restart.

Held in memory and written through to SQLite. Bounded: the peers not seen for longest are dropped first.
A peer is its node id here; records are the signed ones of `peerid.py`, hints are addresses that anybody may have told.
A false hint does no harm: the Noise handshake shows whether the wanted peer answers.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from dataclasses import dataclass, field
from pathlib import Path

from golem.net.peerid import MAX_ADDRESSES, NodeRecord, is_tcp_address, node_id_of, pubkey_of, read_record
from golem.net.types import NetError

log = logging.getLogger(__name__)

MAX_PEERS = 4096
_SCHEMA = """
CREATE TABLE IF NOT EXISTS peers (
    peer_id TEXT PRIMARY KEY, record BLOB, hints TEXT NOT NULL, good TEXT NOT NULL, seen_at REAL NOT NULL
)"""


@dataclass
class Entry:
    """What is known of one peer."""

    node_id: str
    peer_id: str
    record: NodeRecord | None = None
    hints: list[str] = field(default_factory=list)
    good: str = ""  # the address that answered last
    seen_at: float = 0.0  # seconds since the epoch of the last session; 0: never met


class Book:
    """The address book of one network. Not for use from threads other than the one that opened it."""

    def __init__(self, path: Path, network: str) -> None:
        self._network = network
        self._entries: dict[str, Entry] = {}
        self._db = self._open(path)
        self._db.text_factory = lambda raw: raw.decode(errors="replace")
        for row in self._db.execute("SELECT * FROM peers"):
            if all(isinstance(value, kind) for value, kind in zip(row, (str, bytes | None, str, str, float), strict=True)):
                self._load(*row)
            else:
                log.warning("a peer in the address book is damaged, and forgotten")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __contains__(self, node_id: str) -> bool:
        return node_id in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def add_record(self, record: NodeRecord) -> None:
        """Keep a checked record if it is the newest of its node."""
        entry = self._entry(record.peer_id, record.node_id)
        if entry.record is None or entry.record.issued_at < record.issued_at:
            entry.record = record
            self._save(entry)

    def add_hint(self, peer_id: str, address: str) -> str:
        """Remember that a peer may listen at an address. Gives its node id."""
        node_id = node_id_of(pubkey_of(peer_id))
        entry = self._entry(peer_id, node_id)
        if address not in entry.hints and is_tcp_address(address):
            entry.hints = [address, *entry.hints][:MAX_ADDRESSES]
            self._save(entry)
        return node_id

    def mark_met(self, node_id: str, peer_id: str, address: str | None) -> None:
        """A session with the peer is up; `address` is the one that we dialled, if we did."""
        entry = self._entry(peer_id, node_id)
        entry.seen_at = time.time()
        entry.good = address or entry.good
        self._save(entry)

    def find(self, node_id: str) -> Entry | None:
        """What is known of a node."""
        return self._entries.get(node_id)

    def addresses(self, node_id: str) -> list[str]:
        """Every address of a node, the likeliest first."""
        entry = self._entries.get(node_id)
        if entry is None:
            return []
        known = [entry.good] if entry.good else []
        known += entry.record.addresses if entry.record else ()
        return list(dict.fromkeys(known + entry.hints))[:MAX_ADDRESSES]

    def recent(self) -> list[Entry]:
        """All peers, the last met first."""
        return sorted(self._entries.values(), key=lambda entry: -entry.seen_at)

    # below: memory and disk

    def _entry(self, peer_id: str, node_id: str) -> Entry:
        entry = self._entries.get(node_id)
        if entry is None:
            if len(self._entries) >= MAX_PEERS:
                oldest = min(self._entries.values(), key=lambda other: other.seen_at)
                del self._entries[oldest.node_id]
                self._write("DELETE FROM peers WHERE peer_id = ?", oldest.peer_id)
            entry = self._entries[node_id] = Entry(node_id, peer_id)
        return entry

    def _save(self, entry: Entry) -> None:
        row = (entry.peer_id, entry.record.raw if entry.record else None, json.dumps(entry.hints), entry.good)
        self._write("INSERT OR REPLACE INTO peers VALUES (?, ?, ?, ?, ?)", *row, entry.seen_at)

    def _write(self, statement: str, *values: object) -> None:
        try:
            self._db.execute(statement, values)
        except sqlite3.Error as error:
            log.warning("the address book is not saved: %s", error)  # a full disk must not stop the network

    def _load(self, peer_id: str, raw: bytes | None, hints: str, good: str, seen_at: float) -> None:
        try:
            known = [one for one in json.loads(hints) if isinstance(one, str)]
            entry = Entry(node_id_of(pubkey_of(peer_id)), peer_id, None, known, good, seen_at)
        except (ValueError, TypeError) as error:
            log.warning("a peer in the address book is damaged, and forgotten: %s", error)
            return
        if raw is not None:
            try:
                entry.record = read_record(raw, self._network)
            except ValueError as error:
                log.debug("its record is dropped from the address book: %s", error)  # expired, or of another network
        self._entries[entry.node_id] = entry

    @staticmethod
    def _open(path: Path) -> sqlite3.Connection:
        path.parent.mkdir(parents=True, exist_ok=True)
        for attempt in (1, 2):
            try:
                db = sqlite3.connect(path, isolation_level=None, timeout=1)
            except sqlite3.OperationalError as error:
                raise NetError(f"cannot open the address book {path}: {error}") from None
            try:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = NORMAL")
                db.execute(_SCHEMA)
                return db
            except sqlite3.DatabaseError as error:
                db.close()
                if attempt == 2 or isinstance(error, sqlite3.OperationalError):
                    raise NetError(f"cannot open the address book {path}: {error}") from None
                log.warning("the address book %s is damaged (%s): starting a new one", path, error)
                path.replace(path.with_suffix(".damaged"))
        raise AssertionError("unreachable")
