"""The files by which an image's user is known, `/etc/passwd` and `/etc/group`: an Engine reads them from the guest's own root.

It reads them whole, so an image whose are large costs the Engine a hundred times their size: `Accounts` finds them, by
whatever links, while an image is converted. And it opens them without a look at what they are, at each command of an image
that names a user: `secure` sees to it that this user cannot put anything else in their place. (Images of root name nobody, and
then the Engine does not look.)
Neighbours: `archives` (in the sandboxed child); `golem.exeunit.runtimes.vm.runtime`.
"""

from __future__ import annotations

import errno
import os
import stat
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from golem.exeunit.transfer.beneath import open_in_root
from golem.exeunit.unpack.inflate import BadImage
from golem.exeunit.unpack.tarball import OPAQUE, WHITEOUT, Kind, Member, shown, write_all

_Found = TypeVar("_Found")

FILES = ("/etc/passwd", "/etc/group")
MAX_BYTES = 1 << 20
MAX_LINKS = 64
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Accounts:
    """What all layers of an image together make of the files: told of every member, in order."""

    def __init__(self) -> None:
        self._layer = 0
        self._links: dict[bytes, tuple[int, bytes]] = {}  # layer and target
        self._large: dict[bytes, tuple[int, int]] = {}  # layer and size
        self._deleted: dict[bytes, int] = {}  # the layer that hides what those below it have
        self._emptied: dict[bytes, int] = {}

    def next_layer(self) -> None:
        """What follows lies over what there was."""
        self._layer += 1

    def see(self, member: Member) -> None:
        """Note a member under its plain name."""
        name = member.name.rstrip(b"/")
        parent, slash, base = name.rpartition(b"/")
        if base == OPAQUE:
            self._emptied[parent] = self._layer
            return
        if base.startswith(WHITEOUT):
            self._deleted[parent + slash + base[len(WHITEOUT) :]] = self._layer
            return
        same = member.link if member.kind is Kind.HARD_LINK else name
        link, large = (self._links.get(same), self._large.get(same)) if same != name else (None, None)
        if member.kind is Kind.SYMLINK:
            link = (self._layer, member.link)
        elif member.size > MAX_BYTES:
            large = (self._layer, member.size)
        _remember(self._links, name, link)
        _remember(self._large, name, large)

    def _seen(self, name: bytes, layer: int) -> bool:
        """Whether a name of a layer is still there under all that came after it."""
        if self._deleted.get(name, 0) > layer:
            return False
        while name:
            name = name.rpartition(b"/")[0]
            if self._deleted.get(name, 0) > layer or self._emptied.get(name, 0) > layer:
                return False
        return True

    def check(self) -> None:
        """Errors: BadImage where one of the files is too large."""
        for path in FILES:
            found = self._resolve(path.encode())
            layer, size = self._large.get(found, (0, 0))
            if size and self._seen(found, layer):
                raise BadImage(f"{path} ({shown(found)}) has {size} bytes, at most {MAX_BYTES}")

    def _resolve(self, path: bytes) -> bytes:
        """Follow links as an Engine does, which never leaves the image."""
        done: list[bytes] = []
        waiting = [part for part in reversed(path.split(b"/")) if part]
        left = MAX_LINKS
        while waiting and left:
            part = waiting.pop()
            if part == b"..":
                del done[-1:]
                continue
            layer, link = self._links.get(name := b"/".join([*done, part]), (0, b""))
            if not link or not self._seen(name, layer):
                done.append(part)
                continue
            left -= 1
            if link.startswith(b"/"):
                done = []
            waiting += [one for one in reversed(link.split(b"/")) if one not in (b"", b".")]
        return b"/".join(done)


def _remember(of: dict[bytes, _Found], name: bytes, found: _Found | None) -> None:
    of.pop(name, None)
    if found is not None:
        of[name] = found


def secure(init_pid: int, root_id: int) -> None:
    """Have the files of a container stay what they are, of which nothing has run yet but its first process, of ours.

    Its user is not root: then root's own files, in folders of root, are out of his reach; in a folder that was his he may
    make names as before, and not take others' away. `root_id`: root in the container, as the machine numbers it.
    Takes root's rights. Raises OSError where the image leaves no place for them.
    """
    top = os.open(f"/proc/{init_pid}/root", _FOLDER & ~os.O_NOFOLLOW)
    try:
        _take(top, root_id)
        with suppress(FileExistsError):
            os.mkdir("etc", 0o755, dir_fd=top)
            os.chown("etc", root_id, root_id, dir_fd=top, follow_symlinks=False)
        folder = os.open("etc", _FOLDER, dir_fd=top)
        try:
            # The Engine reads what lies beneath a volume, and there a link may lead to a file of this user's.
            if os.fstat(folder).st_dev != os.fstat(top).st_dev:
                raise OSError(errno.EXDEV, "a volume lies on /etc")
            _take(folder, root_id)
            for path in FILES:
                _take_file(top, folder, path, root_id)
        finally:
            os.close(folder)
    finally:
        os.close(top)


def _take(folder: int, root_id: int) -> None:
    found = os.fstat(folder)
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid != root_id:
        mode |= 0o002
        os.fchown(folder, root_id, -1)
    if mode & 0o022:
        mode |= stat.S_ISVTX
    if mode != stat.S_IMODE(found.st_mode):
        os.fchmod(folder, mode)


def _take_file(top: int, folder: int, path: str, root_id: int) -> None:
    """See to it that there is a file of root's, a copy of what the image has there if that is another's."""
    name = path.rpartition("/")[2]
    with suppress(FileNotFoundError):
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISREG(found.st_mode) and found.st_uid == root_id and not found.st_mode & 0o022 and found.st_nlink == 1:
            return
    content, fresh = _content(top, path), f".{name}-{uuid.uuid4().hex}"
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        write_all(descriptor, content)
        os.fchown(descriptor, root_id, root_id)
        os.fchmod(descriptor, 0o644)
    finally:
        os.close(descriptor)
    os.rename(fresh, name, src_dir_fd=folder, dst_dir_fd=folder)


def _content(top: int, path: str) -> bytes:
    """Return what a path leads to within a root, b"" where that is no file."""
    try:
        descriptor = open_in_root(top, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return b""
    try:
        return os.read(descriptor, MAX_BYTES) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
    finally:
        os.close(descriptor)


def user_id(init_pid: int) -> int:
    """Return the user that a process is, as the machine numbers it. Raises OSError."""
    lines = Path(f"/proc/{init_pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Uid:"))
