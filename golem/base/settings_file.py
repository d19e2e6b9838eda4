"""A file in which a person, or we for one, keep settings: read whole, strictly and at once, or refused with the reason.

That there is no file means the defaults, so nothing else may pass for it: a link that leads nowhere (a disk that is not
mounted) is a fault, as are a FIFO that would hold us up, a folder, and what is longer than settings are.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from protocol import strict_json

MAX_BYTES = 1 << 20


class BadSettingsFile(ValueError):
    """A file that cannot be used; the text names it and says why."""


def is_there(path: Path) -> bool:
    """Return whether anything has this name, were it a link that leads nowhere."""
    return os.path.lexists(path)


def read_text(path: Path, most_bytes: int = MAX_BYTES) -> str | None:
    """Return the text of a file, None where nothing has its name. Raises `BadSettingsFile`."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise BadSettingsFile(f"{path} is no ordinary file")
            data = file.read(most_bytes + 1)
    except FileNotFoundError:
        if not is_there(path):
            return None
        raise BadSettingsFile(f"{path} is a link that leads nowhere") from None
    except OSError as error:
        raise BadSettingsFile(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) > most_bytes:
        raise BadSettingsFile(f"{path} is over {most_bytes} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise BadSettingsFile(f"{path} is no text in UTF-8") from None


def read_json(path: Path, most_bytes: int = MAX_BYTES) -> Any:
    """Return what a JSON file holds, None where nothing has its name. Raises `BadSettingsFile`, also for one of mere null."""
    text = read_text(path, most_bytes)
    if text is None:
        return None
    try:
        found = strict_json.loads(text)
    except ValueError as error:
        raise BadSettingsFile(f"{path} is not JSON: {error}") from None
    if found is None:
        raise BadSettingsFile(f"{path} holds nothing but null")
    return found
