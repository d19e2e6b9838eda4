"""App-keys: what lets an agent use the node, in a private file of the data directory."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from golem.base.settings_file import read_json
from golem.node.identity import IdentityError
from golem.private_files import write_private
from protocol.types import timestamp_text

MAX_FILE_BYTES = 8 << 20
AUTOCONF = "autoconfigured"  # name of the app-key that YAGNA_AUTOCONF_APPKEY gives


class AppKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The right of an agent to use this node's API."""

    name: str
    key: str
    identity: str
    role: str
    created: str
    allow_origins: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"AppKey({self.name!r})"  # never the key


class AppKeys:
    """The node's app-keys, in a private JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._by_key: dict[str, AppKey] = {}
        self._open: dict[str, set[Callable[[], object]]] = {}  # by key: what ends when it is removed
        self.session: AppKey | None = None
        try:
            entries = read_json(path, MAX_FILE_BYTES)
            # msgspec's errors name a member and its type, never what it holds
            for found in [] if entries is None else msgspec.convert(entries, list[AppKey]):
                if not found.key or self._by_key.setdefault(found.key, found) is not found:
                    raise ValueError("a key that is empty, or stands twice")
        except ValueError as error:
            raise IdentityError(f"cannot use the app-keys of {path}: {error}") from None

    def find(self, key: str) -> AppKey | None:
        return self._by_key.get(key) or (self.session if self.session and self.session.key == key else None)

    @contextmanager
    def holding(self, key: str, end: Callable[[], object]) -> Iterator[None]:
        """Meanwhile something is open in the name of a key: `end` is called when the key is removed."""
        held = self._open.setdefault(key, set())
        held.add(end)
        try:
            yield
        finally:
            held.discard(end)
            if not held and self._open.get(key) is held:
                del self._open[key]

    def open_session(self, identity: str) -> AppKey:
        """Return the key of this run's command line: never written, never listed, gone with the process."""
        if self.session is None:
            self.session = AppKey("command line", secrets.token_hex(16), identity, "manager", timestamp_text(time.time()))
        return self.session

    def named(self, name: str) -> AppKey | None:
        return next((one for one in self._by_key.values() if one.name == name), None)

    def all(self) -> list[AppKey]:
        return sorted(self._by_key.values(), key=lambda one: (one.created, one.name))

    def create(self, name: str, identity: str, *, key: str = "", allow_origins: tuple[str, ...] = ()) -> AppKey:
        """Return the app-key of this name, making it if there is none. Raises `IdentityError` for another identity's."""
        if not name or len(name) > 100:
            raise IdentityError("an app-key's name has 1 to 100 characters")
        existing = self.named(name)
        if existing and existing.identity != identity:
            raise IdentityError(f"app-key {name!r} belongs to another identity ({existing.identity})")
        if existing and (not key or existing.key == key):
            return existing
        made = AppKey(name, key or secrets.token_hex(16), identity, "manager", timestamp_text(time.time()), allow_origins)
        kept = {one.key: one for one in self._by_key.values() if one is not existing}
        self._save(kept | {made.key: made})
        return made

    def drop_foreign(self, name: str, identity: str) -> None:
        """Delete the app-key of this name if it belongs to another identity: the environment's word is newer."""
        if (existing := self.named(name)) and existing.identity != identity:
            self.drop(name)

    def drop(self, name: str) -> None:
        """Raises `IdentityError` where there is no such key."""
        existing = self.named(name)
        if existing is None:
            raise IdentityError(f"no app-key named {name!r}")
        self._save({one.key: one for one in self._by_key.values() if one is not existing})

    def _save(self, keys: dict[str, AppKey]) -> None:
        """Write the keys, and only then let them count."""
        entries: list[dict[str, Any]] = [msgspec.to_builtins(one) for one in keys.values()]
        try:
            write_private(self._path, json.dumps(entries, indent=1))
        except OSError as error:
            raise IdentityError(f"cannot write {self._path}: {error.strerror}") from None
        gone = self._by_key.keys() - keys.keys()
        self._by_key = keys
        for key in gone:
            for end in tuple(self._open.get(key, ())):
                end()
