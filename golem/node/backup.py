"""Backup and restore: the journal, the chain port's file and the keys, as they were at one moment, in one file.

A backup is a tar file for its owner alone (mode 0600): it holds the node's key as the data directory does, in the clear where
that has it in the clear. It is taken while the node runs, under one stop of the journal's committer: the chain port's file
is copied behind the journal, so it knows of every payment that the journal knows.

A restored node remembers that it is one: it asks its peers what was signed since (`actors/ledger/recall.py`), its links
find out by themselves (`actors/kernel/lineage.py`), and it signs no payment before the chain says that none was made since,
or a person says so. `docs/operate.md` tells people what can and cannot come back.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Container
from contextlib import closing
from pathlib import Path
from typing import Any

from actors.kernel.tables import MIGRATIONS
from golem.chain.schema import SCHEMA_NUMBER, connect
from golem.config import VERSION
from golem.node.app_keys import AppKeys
from golem.node.identity import APP_KEYS, KEYSTORE, PLAIN_KEY, IdentityError, stored_node_id
from golem.node.payout import PAYOUT
from golem.private_files import write_private
from protocol.types import Violation, timestamp, timestamp_text

FORMAT = 1
KEYS = (KEYSTORE, PLAIN_KEY)
HALF = "restore-under-way"
JOURNAL, CHAIN, ABOUT = "node.db", "chain.db", "backup.json"
DATABASES = (JOURNAL, CHAIN)
FILES = (KEYSTORE, PLAIN_KEY, APP_KEYS, "networks.json", PAYOUT)
MAX_ABOUT_BYTES = 1 << 16
CHUNK_BYTES = 1 << 20


class BackupError(Exception):
    """A backup cannot be made or used; the text says why."""


# -- making one
def write_backup(data_dir: Path, path: Path, node_id: str) -> dict[str, Any]:
    """Write a backup of `data_dir` to `path`, whole or not at all; return what is in it. Nothing may commit meanwhile.

    Raises `BackupError`.
    """
    if path.exists():
        raise BackupError(f"{path} exists already")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            names = [name for name in DATABASES if (data_dir / name).exists()]
            for name in names:
                _copy_database(data_dir / name, Path(folder) / name)
            for name in FILES:
                if (data_dir / name).exists():
                    shutil.copyfile(data_dir / name, Path(folder) / name)
                    names.append(name)
            about = {
                "format": FORMAT,
                "version": VERSION,
                "nodeId": node_id or stored_node_id(data_dir) or "(not running)",
                "at": timestamp_text(time.time()),
                "files": {name: _digest(Path(folder) / name) for name in names},
            }
            _pack(Path(folder), names, about, part := Path(folder) / "part")
            os.link(part, path)  # unlike a rename, this never replaces what somebody else put there meanwhile
            _sync_folder(path.parent)
    except (OSError, sqlite3.Error) as error:
        raise BackupError(f"cannot write {path}: {error}") from None
    return about


def _copy_database(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True)) as one, closing(sqlite3.connect(target)) as other:
        one.backup(other)


def _pack(folder: Path, names: list[str], about: dict[str, Any], path: Path) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        text = json.dumps(about, indent=1).encode()
        _add(tar, ABOUT, len(text), io.BytesIO(text))
        for name in names:
            with (folder / name).open("rb") as content:
                _add(tar, name, (folder / name).stat().st_size, content)
        tar.close()
        file.flush()
        os.fsync(file.fileno())


def _add(tar: tarfile.TarFile, name: str, size: int, content: Any) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = size, 0o600, int(time.time())
    tar.addfile(entry, content)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- putting one back
def restore(data_dir: Path, path: Path) -> dict[str, Any]:
    """Put a backup into a data directory that no node uses; what is there is kept in a folder beside it.

    A directory with the key of another node is left alone. A key that the backup does not hold stays where it is.
    Returns what the backup says of itself, and `kept`, the folder's name. Raises `BackupError`, and then changes nothing.
    """
    try:
        if not path.is_file():
            raise BackupError(f"{path} is no file")
        with tempfile.TemporaryDirectory(prefix=".restore.", dir=data_dir) as folder:
            about = _unpack(path, Path(folder))
            there, comes = stored_node_id(data_dir), _check_owner(Path(folder), path, about)
            if there and comes and there != comes:
                whose = f"{data_dir} is of the node {there}, and {path} of {comes}"
                raise BackupError(f"{whose}: restore into another directory (golem --data-dir DIR restore ...)")
            _mark(Path(folder), about)
            write_private(data_dir / HALF, path.name + "\n")  # a node that found half of a restore would make a new key
            kept = _keep(data_dir, about["files"])
            for name in about["files"]:
                os.replace(Path(folder) / name, data_dir / name)
            _sync_folder(data_dir)
            (data_dir / HALF).unlink()
    except (OSError, sqlite3.Error, tarfile.TarError) as error:
        raise BackupError(f"cannot restore {path}: {error}") from None
    return about | {"kept": kept}


def check(path: Path) -> dict[str, Any]:
    """Unpack a backup into a folder of its own, and look at it as `restore` does. Returns what it says of itself, and `owner`,
    "" where nothing says whose it is. Raises `BackupError`."""
    try:
        with tempfile.TemporaryDirectory(prefix="golem-backup-check.") as folder:
            about = _unpack(path, Path(folder))
            return about | {"owner": _check_owner(Path(folder), path, about)}
    except (OSError, sqlite3.Error, tarfile.TarError) as error:
        raise BackupError(f"cannot read {path}: {error}") from None


def refuse_half(data_dir: Path) -> None:
    """Raise `BackupError` where a restore was cut short."""
    if (data_dir / HALF).exists():
        kept = f"what was there before is in {data_dir}/before-restore-*"
        raise BackupError(f"a restore into {data_dir} was cut short: run golem restore again with the same file ({kept})")


def _check_owner(folder: Path, path: Path, about: dict[str, Any]) -> str:
    """Return whose backup it is, "" where that is not known: what says so must agree. Raises `BackupError`."""
    holds_key = any((folder / name).exists() for name in KEYS)
    owner = stored_node_id(folder)
    if holds_key and not owner:
        raise BackupError(f"{path} is damaged: the key in it cannot be read")
    said = str(about["nodeId"])
    if owner and said.startswith("0x") and said != owner:
        raise BackupError(f"{path} is damaged: it says that it is of {said}, and its key is that of {owner}")
    try:
        AppKeys(folder / APP_KEYS)
    except IdentityError as error:
        raise BackupError(f"{path} is damaged: {error}") from None
    return owner or (said if said.startswith("0x") else "")


def _unpack(path: Path, folder: Path) -> dict[str, Any]:
    """Unpack and check a backup. Nothing in the archive names a place but by the names that we know."""
    with tarfile.open(path, "r:") as tar:
        first = tar.next()
        if first is None or first.name != ABOUT or not first.isfile() or first.size > MAX_ABOUT_BYTES:
            raise BackupError(f"{path} is no backup of a node")
        about = _about(tar.extractfile(first).read(), path)  # type: ignore[union-attr]
        for entry in iter(tar.next, None):
            if entry.name not in about["files"] or not entry.isfile():
                raise BackupError(f"{path} holds {entry.name[:80]!r}, which is no part of a backup")
            handle = os.open(folder / entry.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                shutil.copyfileobj(tar.extractfile(entry), file, CHUNK_BYTES)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
    for name, digest in about["files"].items():
        if not (folder / name).exists() or _digest(folder / name) != digest:
            raise BackupError(f"{path} is damaged: {name} is not what was written")
    for name, newest in ((JOURNAL, len(MIGRATIONS)), (CHAIN, SCHEMA_NUMBER)):
        _check_database(folder / name, newest, path)
    return about


def _check_database(file: Path, newest: int, path: Path) -> None:
    with closing(sqlite3.connect(file)) as db:
        (found,) = db.execute("pragma quick_check(1)").fetchone()
        (number,) = db.execute("pragma user_version").fetchone()
        strange = db.execute("select name from sqlite_master where type in ('trigger', 'view')").fetchone()
    if strange:
        found = f"{strange[0]!r} is none of its tables"
    if found != "ok":
        raise BackupError(f"{path} is damaged: {file.name}: {found}")
    if number != newest and (file.name == CHAIN or number > newest):
        raise BackupError(
            f"{path} was made by another version: {file.name} has schema {number}, this version ({VERSION}) works with {newest}: "
            "restore it with the version that made it, and bring that up then"
        )


def _about(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads(raw)
        files, known = about["files"], {*DATABASES, *FILES}
        good = about["format"] == FORMAT and known >= set(files) >= set(DATABASES) and timestamp(about["at"]) > 0
        good = good and all(isinstance(digest, str) for digest in files.values()) and isinstance(about["nodeId"], str)
    except (ValueError, KeyError, TypeError, AttributeError, Violation, RecursionError):
        good = False
    if not good:
        raise BackupError(f"{path} is no backup that this version ({VERSION}) can read")
    return about


def _keep(data_dir: Path, comes: Container[str]) -> str:
    """Put what is there aside, but a key in whose place none comes; return the folder's name, "" where nothing was there."""
    stays = () if any(name in comes for name in KEYS) else KEYS
    found = [name for name in (*DATABASES, *FILES) if name not in stays and (data_dir / name).exists()]
    if not found:
        return ""
    folder = Path(tempfile.mkdtemp(prefix=f"before-restore-{time.strftime('%Y%m%d-%H%M%S')}-", dir=data_dir))
    for name in (*found, *(f"{name}{end}" for name in DATABASES for end in ("-wal", "-shm"))):
        if (data_dir / name).exists():
            os.replace(data_dir / name, folder / name)
    return folder.name


# -- what a restored node, or half of one, remembers of it
def _mark(folder: Path, about: dict[str, Any]) -> None:
    with closing(sqlite3.connect(folder / JOURNAL, isolation_level=None)) as db:
        db.execute("replace into meta values ('restored', ?)", (str(about["at"]),))
    if (folder / CHAIN).exists():
        hold_payments(folder, f"this node was restored from a backup of {about['at']}")


def hold_payments(data_dir: Path, reason: str) -> None:
    """Have no payment signed, on any account, until it is known that none was made since."""
    with closing(connect(data_dir / CHAIN)) as db:
        db.execute("delete from hold")
        db.execute("insert into hold values ('*', ?)", (reason,))


def compare_generations(data_dir: Path) -> str:
    """Return "" if journal and chain port's file belong together, else which of them is older. Before either is opened.

    Each start of the node writes its name into both: first into the chain port's file, then, as `bound`, into the journal.
    """
    if not (data_dir / JOURNAL).exists():
        return ""
    with closing(sqlite3.connect(data_dir / JOURNAL)) as db:
        try:
            meta = dict(db.execute("select key, value from meta where key in ('boot', 'bound', 'node')").fetchall())
        except sqlite3.OperationalError:  # not one of ours yet
            return ""
    if not (data_dir / CHAIN).exists():
        return CHAIN if "bound" in meta else ""  # it was there, and is lost
    with closing(sqlite3.connect(data_dir / CHAIN)) as db:
        try:
            found = db.execute("select boot from generation where one=?", (_slot(meta.get("node", "")),)).fetchone()
        except sqlite3.OperationalError:
            return ""
    if found is None or "bound" not in meta or found[0] in (meta["bound"], meta["boot"]):
        return ""
    return CHAIN if _number(str(found[0])) < _number(str(meta["bound"])) else JOURNAL


def bind_generations(data_dir: Path, boot: str, node_id: str = "") -> None:
    """Write the name of this start into both files, and whose journal it is."""
    with closing(sqlite3.connect(data_dir / CHAIN, isolation_level=None, timeout=10)) as db:
        db.execute("replace into generation values (?, ?)", (_slot(node_id), boot))
    with closing(sqlite3.connect(data_dir / JOURNAL, isolation_level=None, timeout=10)) as db:
        db.execute("begin immediate")
        db.execute("replace into meta values ('bound', ?)", (boot,))
        if node_id:
            db.execute("replace into meta values ('node', ?)", (node_id,))
        db.execute("commit")


def _slot(node_id: str) -> int:
    """Return where the generation of a node's journal stands in `chain.db`, which serves the journals of all its keys."""
    return int(node_id[2:14], 16) if node_id else 1


def restored_at(data_dir: Path) -> str:
    """Return of when the backup was that the journal comes from, "" once the peers were asked what happened since."""
    with closing(sqlite3.connect(data_dir / JOURNAL)) as db:
        found = db.execute("select value from meta where key='restored'").fetchone()
    return str(found[0]) if found else ""


def peers_asked(data_dir: Path) -> None:
    """The peers were asked, durably."""
    with closing(sqlite3.connect(data_dir / JOURNAL, isolation_level=None, timeout=10)) as db:
        db.execute("delete from meta where key='restored'")


def _number(boot: str) -> int:
    digits = boot.partition("-")[0]
    return int(digits) if digits.isdigit() else 0
