"""Where things lie on this machine, which is nobody's business elsewhere: of a place only the file's name crosses.

Texts for requestors are made in many rooms, and by the Engine and the system, whose words name folders. So they pass here
once more on their way out. Paths inside a container are the requestor's own, and stay.
Neighbours: `work` and `process`, from which texts leave.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

_REST = r"(?:/[^\s'\":,;()]*)?"
_ENGINE = re.compile(
    r"(?<![:/\w.-])/[^\s'\":,;()]*/"
    r"(?:overlay2/[0-9a-z]{20,}|vfs/dir/[0-9a-z]{20,}|(?:overlay-)?containers/[0-9a-f]{20,}|volumes/golem-[\w-]+)[^\s'\":,;()]*"
)
_MERGED = "/merged/"  # what follows is the container's own


_ours: set[str] = set()  # folders of this process's activity, the cache, and the Engine's socket


def remember(*places: Path) -> None:
    """Note folders or files of this machine that no text names from now on."""
    shared = {"/", tempfile.gettempdir()}
    _ours.update(str(found) for path in places for found in (path, path.resolve()) if str(found) not in shared)


def hidden(text: str) -> str:
    """Return a text without the folders of this machine."""
    text = _ENGINE.sub(lambda match: _name(match[0]), text)
    for place in sorted(_ours, key=len, reverse=True):
        text = re.sub(re.escape(place) + _REST, lambda match: _name(match[0]), text)
    return text


def _name(path: str) -> str:
    _, inside, rest = path.partition(_MERGED)
    return f"/{rest}" if inside else path.rstrip("/").rpartition("/")[2]
