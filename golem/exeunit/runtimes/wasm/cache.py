"""Compiled modules by content: machine code that only this supervisor's own compiler child has written.

The name holds the SHA3-256 of the module, the version of wasmtime and of its configuration, so code is never loaded by
an engine that did not make it. A module that subverts the compiler can spoil its own entry only, which then runs in
the same sandbox as the module would. Files arrive by rename, are readable by the unprivileged run child through a
descriptor alone (the directory is closed to it), and the oldest go when the cache is over its size. Neighbour: `wasm`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import BinaryIO


class CompiledCache:
    """A directory of `<key>.cwasm` files."""

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
        path = self._path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        os.utime(descriptor)
        return descriptor

    def new_file(self) -> BinaryIO:
        """A file for a compiler's output, to be kept with `keep` or simply closed."""
        return tempfile.NamedTemporaryFile(dir=self._directory, suffix=".part")  # type: ignore[return-value]

    def keep(self, key: str, file: BinaryIO) -> None:
        """Put a finished `new_file` under its key and make room."""
        file.flush()
        os.fchmod(file.fileno(), 0o444)
        os.link(file.name, temporary := f"{file.name}.ready")
        os.rename(temporary, self._path(key))
        self._evict(spare=self._path(key))

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}.cwasm"

    def _evict(self, spare: Path) -> None:
        found = []
        for path in self._directory.glob("*.cwasm"):
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
