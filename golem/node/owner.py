"""Whose journal it is: objects belong to the identity that made them.

A key may be replaced (`YAGNA_AUTOCONF_ID_SECRET`). The journal of the former one is put aside then, under its name, and comes
back with its key. `chain.db` serves all: its rows name their accounts.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from actors.kernel.records import JournalError
from golem.node.backup import JOURNAL

log = logging.getLogger("golem.node")


def settle_journal(data_dir: Path, node_id: str) -> None:
    """Have `node.db` be the journal of this node, or not be there, before it is opened. Raises `JournalError`."""
    journal, ours = data_dir / JOURNAL, aside(data_dir, node_id)
    try:
        if journal.exists() and (owner := _owner(journal)) not in ("", node_id):
            _put_aside(journal, theirs := aside(data_dir, owner))
            log.warning("%s is the journal of %s: it is kept in %s, and comes back with its key", journal, owner, theirs.name)
        if not journal.exists() and ours.exists():
            os.rename(ours, journal)
            log.warning("the journal of %s is back", node_id)
    except (OSError, sqlite3.Error) as error:
        raise JournalError(f"cannot open the journal {journal}: {error}") from None


def aside(data_dir: Path, node_id: str) -> Path:
    """Return where the journal of another key of this directory is."""
    return data_dir / f"node-{node_id}.db"


def _owner(journal: Path) -> str:
    """Return who made a journal, "" where it does not say."""
    with closing(sqlite3.connect(journal, timeout=10)) as db:
        if not db.execute("select 1 from sqlite_master where name='meta'").fetchone():
            return ""
        found = db.execute("select value from meta where key='node'").fetchone()
    return str(found[0]) if found else ""


def _put_aside(journal: Path, target: Path) -> None:
    """Give a journal another name, with all that was committed."""
    with closing(sqlite3.connect(journal, isolation_level=None, timeout=10)) as db:
        db.execute("pragma wal_checkpoint(truncate)")  # the log's file goes with the last connection
    if target.exists():
        raise OSError(f"{target} is there already")
    for end in ("-wal", "-shm"):
        if (left := journal.with_name(journal.name + end)).exists():
            if end == "-wal" and left.stat().st_size:
                raise OSError(f"{left} could not be written into it: is another process at work?")
            left.unlink()
    os.rename(journal, target)
