"""What the provider agent is told: flags, environment and `globals.json`, `rules.json` of its data directory."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.provider.rules import Terms
from golem.base import settings_file
from golem.private_files import write_private
from protocol.types import node_id

GLOBALS, RULES, STATUS, LOCK, JOURNAL = "globals.json", "rules.json", "status.json", "provider.lock", "provider.db"
GLOBAL_KEYS: Mapping[str, type] = {
    "node_name": str, "subnet": str, "account": str, "shell": bool, "proxy_http": bool, "settings": dict,
}  # fmt: skip
SWITCHES = {"shell": "shell", "proxy_http": "proxy-http"}  # key in globals.json -> the exe-unit's word for it
_KINDS = {str: "a text", bool: "true or false", dict: "an object of texts"}


class SettingsError(Exception):
    """A setting or file that cannot be used; the text says which and why."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one agent. `node_url` empty: wherever `node_file` (the node's `node.json`) says it serves."""

    data_dir: Path
    node_file: Path
    node_url: str
    app_key: str
    name: str
    subnet: str = "public"
    runtimes: tuple[str, ...] = ()  # offer these only; empty = every active preset
    max_agreements: int | None = None  # None = one per thread of the hardware profile
    networks: tuple[str, ...] = ()  # names of networks or platforms to be paid on; empty = all that the node has
    idle_s: float = 90.0
    approve_timeout_s: float = 10.0
    terms: Terms = field(default_factory=Terms)
    most: tuple[float, float, float] = (math.inf, math.inf, math.inf)  # threads, GiB of memory and storage to offer
    exe_unit_path: str | None = None  # where descriptors of runtimes are; None = the default places
    test_interval_s: float = 60.0  # between self-tests of a runtime
    transfers: str = ""  # what transfers may reach, "public" or "local"; empty: "local" where only dev chains pay

    def __repr__(self) -> str:
        return f"Settings({self.data_dir}, {self.name!r})"  # never the key


def agent_dir(env: Mapping[str, str], node_dir: Path, given: Path | None) -> Path:
    """Return the agent's data directory: as given, else `GOLEM_PROVIDER_DIR`, else `provider` below the node's."""
    named = given or (Path(env["GOLEM_PROVIDER_DIR"]) if env.get("GOLEM_PROVIDER_DIR") else node_dir / "provider")
    return named.expanduser().absolute()


def read_json(path: Path, what: str) -> Any:
    """Return the content of a JSON file, `None` if there is no such file. Raises `SettingsError`."""
    try:
        return settings_file.read_json(path)
    except settings_file.BadSettingsFile as fault:
        raise SettingsError(f"the {what}: {fault}") from None


def check_keys(raw: Any, known: Collection[str], what: str) -> None:
    """Check that an object of a settings file has no keys but those: one with a slip would set nothing, in silence.

    Raises `SettingsError`.
    """
    if not isinstance(raw, dict):
        raise SettingsError(f"the {what}: expected a JSON object")
    if unknown := [name for name in raw if name not in known]:
        raise SettingsError(f"the {what}: unknown key {unknown[0][:100]!r}; known: {', '.join(sorted(known))}")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all. Raises `SettingsError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(path, json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror or error}") from None


def names(env: Mapping[str, str], data_dir: Path, name: str | None, subnet: str | None) -> tuple[str, str]:
    """Return the agent's name and subnet: flag, then environment, then `globals.json`, then defaults.

    The whole market reads the name, so it is not the machine's unless its owner says so. What a flag says is kept in
    `globals.json`. Raises `SettingsError`.
    """
    kept = read_globals(data_dir)
    found = name or env.get("NODE_NAME") or kept.get("node_name") or f"golem-{secrets.token_hex(3)}"
    net = subnet or env.get("SUBNET") or kept.get("subnet") or "public"
    _check_name(found)
    if not re.fullmatch(r"[\w.-]{1,100}", net):
        raise SettingsError(f"the subnet {net!r}: expected letters, digits, '.', '_' and '-'")
    if name or subnet or "node_name" not in kept:
        write_json(data_dir / GLOBALS, {**kept, "node_name": found, "subnet": net})
    return found, net


def read_globals(data_dir: Path) -> dict[str, Any]:
    """Return what is kept in `globals.json`. Raises `SettingsError`."""
    kept = read_json(data_dir / GLOBALS, "settings file")
    if kept is None:
        return {}
    check_keys(kept, GLOBAL_KEYS, f"settings file {data_dir / GLOBALS}")
    for name, found in kept.items():
        if not isinstance(found, GLOBAL_KEYS[name]) or found == "":
            raise SettingsError(f"the settings file {data_dir / GLOBALS}: {name} must be {_KINDS[GLOBAL_KEYS[name]]}")
    if "node_name" in kept:
        _check_name(kept["node_name"], f"the settings file {data_dir / GLOBALS}: ")
    return dict(kept)


def _check_name(name: str, where: str = "") -> None:
    if not 1 <= len(name) <= 100 or not name.isprintable():
        raise SettingsError(f"{where}the name {name[:200]!r}: expected 1 to 100 printable characters")


def keep_interactions(data_dir: Path, **switches: bool | None) -> None:
    """Keep the owner's word on `shell` and `proxy_http`; None leaves it as it is. Raises `SettingsError`."""
    told = {name: value for name, value in switches.items() if value is not None}
    if told:
        write_json(data_dir / GLOBALS, {**read_globals(data_dir), **told})


def interactions(data_dir: Path) -> tuple[str, ...]:
    """Return what a requestor may do to a running activity beside commands: all, unless the owner has switched it off.

    Raises `SettingsError`.
    """
    kept, found = read_globals(data_dir), []
    for name, kind in SWITCHES.items():
        found += [kind] if kept.get(name, True) else []
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Rules:
    """Whom this provider serves: nobody of `blacklist`, and nobody but `allow_only` (None: everybody else)."""

    blacklist: frozenset[str] = frozenset()
    allow_only: frozenset[str] | None = None
    problem: str = ""  # why nobody is served

    def words(self) -> str:
        """Return whom it serves, for people."""
        if self.problem:
            return f"nobody: {self.problem}"
        if self.allow_only is not None:
            left = len(self.allow_only - self.blacklist)
            return f"{left} nodes of {RULES} alone" if left else f"nobody: allow-only of {RULES} leaves none"
        return f"everybody but {len(self.blacklist)} nodes of {RULES}" if self.blacklist else "everybody"


def read_rules(data_dir: Path) -> Rules:
    """Return the rules of `rules.json` (`{"blacklist": [node ids], "allow-only": [node ids]}`). Raises `SettingsError`.

    Without the file everybody is served; an empty `allow-only` serves nobody.
    """
    raw = read_json(data_dir / RULES, "rules file")
    if raw is None:
        return Rules()
    check_keys(raw, ("blacklist", "allow-only"), f"rules file {data_dir / RULES}")
    blacklist, allow_only = _nodes(data_dir, raw, "blacklist"), _nodes(data_dir, raw, "allow-only")
    return Rules(blacklist or frozenset(), allow_only)


def _nodes(data_dir: Path, raw: dict[str, Any], key: str) -> frozenset[str] | None:
    if key not in raw:
        return None
    try:
        if not isinstance(raw[key], list):
            raise TypeError("expected a list of node ids")
        return frozenset(node_id(one) for one in raw[key])
    except (AttributeError, TypeError, ValueError) as error:
        raise SettingsError(f"the rules file {data_dir / RULES} is not in order: {key}: {error}") from None


def threads() -> int:
    """Return how many threads of this machine the process may use."""
    return max(1, len(os.sched_getaffinity(0)))
