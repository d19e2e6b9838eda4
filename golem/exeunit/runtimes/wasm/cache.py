"""Compiled modules by content: machine code that only this supervisor's own compiler child has written.

The name holds the SHA3-256 of the module, the version of wasmtime and of its configuration, so code is never loaded by
an engine that did not make it; and a digest of the code itself, which is compared at each use: no flipped bit is run. A
module that subverts the compiler can spoil its own entry only, which then runs in the same sandbox as the module would.
Files arrive by rename, are readable by the unprivileged run child through a descriptor alone (the directory is closed to
it), and the oldest go when the cache is over its size. Neighbour: `wasm`.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import tempfile
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger("golem.exeunit")

SUFFIX = ".cwasm"


class CompiledCache:
    """A directory of `<key>.<digest>.cwasm` files."""

    def __init__(self, directory: Path, engine_tag: str, max_bytes: int) -> None:
        """`engine_tag` names wasmtime's version and configuration. Makes the directory, closed to others."""
        self._directory = directory
        self._engine_tag = engine_tag
        self._max_bytes = max_bytes
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def key(self, module: BinaryIO) -> str:
        """Name of the compiled form of an open module file, which is read from its start."""
        module.seek(0)
        digest = hashlib.sha3_256()
        while chunk := module.read(1 << 20):
            digest.update(chunk)
        module.seek(0)
        return f"{digest.hexdigest()}-{self._engine_tag}"

    def open(self, key: str) -> int | None:
        """Read-only descriptor of a compiled module, or None; the caller closes it. Eviction does not disturb it."""
        for path in self._directory.glob(f"{glob.escape(key)}.*{SUFFIX}"):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
            if path.name == f"{key}.{_digest(descriptor)}{SUFFIX}":
                os.utime(descriptor)
                return descriptor
            log.warning("a compiled module in the cache is damaged: it is compiled anew")
            os.close(descriptor)
            path.unlink(missing_ok=True)
        return None

    def new_file(self) -> BinaryIO:
        """A file for a compiler's output, to be kept with `keep` or simply closed."""
        return tempfile.NamedTemporaryFile(dir=self._directory, suffix=".part")  # type: ignore[return-value]

    def keep(self, key: str, file: BinaryIO) -> None:
        """Put a finished `new_file` under its key and make room."""
        file.flush()
        os.fchmod(file.fileno(), 0o444)
        path = self._directory / f"{key}.{_digest(file.fileno())}{SUFFIX}"
        os.link(file.name, temporary := f"{file.name}.ready")
        os.rename(temporary, path)
        self._evict(spare=path)

    def _evict(self, spare: Path) -> None:
        found = []
        for path in self._directory.glob(f"*{SUFFIX}"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another activity evicts as well
                continue
            found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._max_bytes:
                return
            if path != spare:
                path.unlink(missing_ok=True)
                total -= size


def _digest(descriptor: int) -> str:
    """Return the digest of an open file; its position stays."""
    found, offset = hashlib.blake2b(digest_size=16), 0
    while chunk := os.pread(descriptor, 1 << 20, offset):
        found.update(chunk)
        offset += len(chunk)
    return found.hexdigest()
