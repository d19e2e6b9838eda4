"""Files and folders for their owner alone."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from itertools import islice
from pathlib import Path

MAX_FILES = 10_000  # of a folder


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


def strangers_in(folder: Path) -> list[str]:
    """Return the names of what stands in a folder and is somebody else's, or leads there, as user ids tell. Raises `OSError`."""
    found = []
    with os.scandir(folder) as entries:
        for entry in islice(entries, MAX_FILES):
            owners = {entry.stat(follow_symlinks=False).st_uid}
            with suppress(FileNotFoundError):  # a link that leads nowhere is looked at by who needs the file
                owners.add(entry.stat().st_uid)
            if owners != {os.geteuid()}:
                found.append(entry.name)
    return sorted(found)


def make_private(folder: Path) -> list[str]:
    """Take from others what they may do with a folder of ours and with the files in it.

    Returns the names of what was open to them, the folder's first. What is somebody else's, or a link, stays as it is.
    Raises `OSError`.
    """
    opened = []
    with os.scandir(folder) as entries:
        files = [Path(entry.path) for entry in islice(entries, MAX_FILES) if entry.is_file(follow_symlinks=False)]
    for path in (folder, *sorted(files)):
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(handle)
            if found.st_mode & 0o077 and found.st_uid == os.geteuid():
                os.fchmod(handle, stat.S_IMODE(found.st_mode) & 0o700)
                opened.append(path.name)
        finally:
            os.close(handle)
    return opened


def is_open_to_others(path: Path) -> bool:
    """Return whether other users may read a file. Raises `OSError`."""
    return bool(path.stat().st_mode & 0o077)
