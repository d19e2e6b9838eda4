"""Files and folders for their owner alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def check_ours(path: Path) -> None:
    """Check that nobody else can have put things into a directory, or this file there. Raises `ValueError`, `OSError`."""
    found = path.stat()
    if found.st_uid != os.geteuid():
        raise ValueError(f"it belongs to user {found.st_uid}, whose key and settings would be ours (chown it, or choose another)")
    others = found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and found.st_gid != os.getegid())
    if others:
        raise ValueError("others may write there (chmod go-w)")
