"""A look at the node's databases before they are used: damaged pages are told at start, with what to do about them.

What a page's content says is another matter: rows have checksums. Here it is whether SQLite can find its way at all: it would
read on for days, and fail, or not find what is there, in the middle of something.
"""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from pathlib import Path
from threading import Timer

from golem.config import ConfigError

log = logging.getLogger("golem.node")

LOOK_S = 2.0  # for both files: some hundred megabytes; a larger journal is looked at in part


def check_databases(data_dir: Path, names: tuple[str, ...]) -> None:
    """Look through the databases of a data directory that nobody uses. Raises `ConfigError` for one that is damaged."""
    for name in names:
        if not (data_dir / name).exists():
            continue
        if fault := _fault(data_dir / name, LOOK_S / len(names)):
            raise ConfigError(
                f"{data_dir / name} is damaged ({fault}): look after the disk, then put the last backup back with `golem restore "
                "FILE`, which keeps what is there. Without a backup move the file away: its node starts anew, payments wait "
                "until `golem payment resume`, and peers keep what they have signed"
            )


def _fault(file: Path, seconds: float) -> str:
    """Return what is wrong with a database, "" for nothing that was found in time."""
    try:
        with closing(sqlite3.connect(file, timeout=1.0, check_same_thread=False)) as db:
            timer = Timer(seconds, db.interrupt)
            timer.daemon = True
            timer.start()
            try:
                (found,) = db.execute("pragma quick_check(1)").fetchone()
            finally:
                timer.cancel()
                timer.join()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT:
            log.info("%s is large: a part of it was looked through for damage", file.name)
        return ""  # a locked or full disk is no damage: whoever opens the file says so
    except sqlite3.DatabaseError as error:
        return str(error)
    return "" if found == "ok" else " ".join(str(found).split())[:200]
