"""Settings of the provider agent: each is declared once, in `SETTINGS`, under the name of its variable.

What counts is the environment, then a `.env`, then what `golem provider settings set` keeps in `globals.json`, then the
default. Names without `GOLEM_` are the reference's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from actors.provider.rules import Terms
from golem.config import ConfigError, read_choice, read_duration, read_list, read_number
from golem.exeunit.runtimes.plugin.descriptors import SEARCH
from golem.provider.settings import GLOBALS, SettingsError, read_globals, write_json

DAY_S = 24 * 3600.0
CENTURY_S = 100 * 365.25 * DAY_S
KEPT = "settings"  # in globals.json
SECONDS, NUMBER, LIST, REACH = "s", "", "names", "public or local"


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. `field` is that of `Terms`, or of `Given`. `unit` is `s`, `GLM`, ..., `names` for a list, or words."""

    name: str
    field: str
    unit: str
    default: float | str
    low: float
    high: float
    what: str


def _of_terms(name: str, field: str, unit: str, low: float, high: float, what: str) -> Setting:
    return Setting(name, field, unit, getattr(Terms(), field), low, high, what)


SETTINGS = (
    _of_terms("GOLEM_CREDIT_FLOOR", "credit_floor", "GLM", 0, 1e9, "unpaid work that a stranger gets at least"),
    _of_terms("GOLEM_CREDIT_FACTOR", "credit_factor", NUMBER, 0, 1e6, "of what an honest payer's delays leave open"),
    _of_terms("GOLEM_CREDIT_GROWTH", "credit_growth", NUMBER, 0, 1e6, "of what was paid, which is credit beside"),
    _of_terms("GOLEM_PAY_PACE", "pay_pace_s", SECONDS, 0, 30 * DAY_S, "from an acceptance to a payment that is final"),
    _of_terms("DEBIT_NOTE_INTERVAL", "interval_s", SECONDS, 1, DAY_S, "between debit notes, unless the demand says another"),
    _of_terms("MIN_DEBIT_NOTE_INTERVAL", "min_interval_s", SECONDS, 1, DAY_S, "the shortest interval of a demand"),
    _of_terms("MAX_DEBIT_NOTE_INTERVAL", "max_interval_s", SECONDS, 1, DAY_S, "the longest interval of a demand"),
    _of_terms("DEBIT_NOTE_ACCEPTANCE_DEADLINE", "accept_timeout_s", SECONDS, Terms().min_accept_timeout_s, DAY_S,
              "the longest time to accept a debit note"),
    _of_terms("PAYMENT_TIMEOUT_REQUIRED_DURATION", "payment_timeout_required_s", SECONDS, 0, CENTURY_S,
              "demands of this length need a payment timeout"),
    _of_terms("MIN_AGREEMENT_EXPIRATION", "min_expiration_s", SECONDS, 0, CENTURY_S, "the shortest agreement"),
    _of_terms("MAX_AGREEMENT_EXPIRATION", "max_expiration_s", SECONDS, 1, CENTURY_S, "the longest agreement"),
    _of_terms("MAX_AGREEMENT_EXPIRATION_WITHOUT_DEADLINE", "max_expiration_without_deadline_s", SECONDS, 0, CENTURY_S,
              "the longest agreement without a time to accept debit notes"),
    Setting("MAX_SIMULTANEOUS_AGREEMENTS", "max_agreements", NUMBER, 0, 1, 1000, "places; 0: one for each thread"),
    Setting("IDLE_AGREEMENT_TIMEOUT", "idle_s", SECONDS, 90.0, 1, DAY_S, "an agreement without an activity"),
    Setting("AGREEMENT_APPROVE_TIMEOUT", "approve_timeout_s", SECONDS, 10.0, 1, 300, "for an approval to be committed"),
    Setting("YA_PAYMENT_NETWORK", "networks", LIST, "", 0, 0, "networks to be paid on; none: all of the node"),
    Setting("YA_RT_CORES", "cores", "threads", math.inf, 1, 1e6, "the most to sell"),
    Setting("YA_RT_MEM", "mem", "GiB", math.inf, 0.0625, 1e6, "the most to sell"),
    Setting("YA_RT_STORAGE", "storage", "GiB", math.inf, 0.0625, 1e9, "the most to sell"),
    Setting("GOLEM_TRANSFER_POLICY", "transfers", REACH, "", 0, 0, "what transfers may reach: public addresses alone, or for "
            "requestors that are there this machine and its networks too; none: local where only dev chains pay"),
    Setting("RUNTIME_TEST_INTERVAL", "test_interval_s", SECONDS, 60.0, 1, DAY_S, "between self-tests of a runtime"),
)  # fmt: skip
NAMES = {one.name: one for one in SETTINGS}


@dataclass(frozen=True, slots=True)
class Given:
    """What the settings say. `most`: threads, memory and storage in GiB."""

    terms: Terms
    idle_s: float
    approve_timeout_s: float
    max_agreements: int | None
    networks: tuple[str, ...]
    most: tuple[float, float, float]
    exe_unit_path: str | None
    test_interval_s: float
    transfers: str


def read_environment(env: Mapping[str, str], kept: Mapping[str, str] | None = None) -> Given:
    """Return the settings of an environment, and below it those `kept`. Raises `SettingsError` that names the variable."""
    values = {one.field: _value(one, env, kept or {})[0] for one in SETTINGS}
    of_terms = {one.name: type(one.default) for one in fields(Terms()) if one.name in values and one.name != "max_agreements"}
    terms = Terms(**{name: kind(values[name]) for name, kind in of_terms.items()})  # type: ignore[misc]
    return Given(
        terms,
        values["idle_s"],
        values["approve_timeout_s"],
        int(values["max_agreements"]) or None,
        read_list(values["networks"]),
        (values["cores"], values["mem"], values["storage"]),
        env.get(SEARCH) or None,
        values["test_interval_s"],
        values["transfers"],
    )


def describe(env: Mapping[str, str], kept: Mapping[str, str], of_file: frozenset[str] = frozenset()) -> list[dict[str, Any]]:
    """Return each setting with its value, unit, what it is, and where the value came from. Raises `SettingsError`.

    `of_file`: names that a `.env` has set.
    """
    found = []
    for one in SETTINGS:
        value, source = _value(one, env, kept)
        source = ".env" if source == "environment" and one.name in of_file else source
        shown = None if value in (math.inf, "") else int(value) if isinstance(value, float) and value.is_integer() else value
        found.append({"name": one.name, "value": shown, "unit": one.unit, "from": source, "what": one.what})
    return found


def _value(one: Setting, env: Mapping[str, str], kept: Mapping[str, str]) -> tuple[Any, str]:
    """Return the value of a setting and where it came from. Raises `SettingsError`."""
    for source, table in (("environment", env), ("settings", kept)):
        if table.get(one.name, "").strip():
            try:
                return _parse(one, table), source
            except ConfigError as error:
                raise SettingsError(str(error) if source == "environment" else f"{GLOBALS}: {error}") from None
    return one.default, "default"


def _parse(one: Setting, table: Mapping[str, str]) -> Any:
    if one.unit == LIST:
        return table[one.name]
    if one.unit == REACH:
        return read_choice(table, one.name, REACH.split(" or "))
    read = read_duration if one.unit == SECONDS else read_number
    return read(table, one.name, 0.0, one.low, one.high)


def kept_settings(data_dir: Path) -> dict[str, str]:
    """Return what `golem provider settings set` has kept. Raises `SettingsError`."""
    kept: dict[str, str] = read_globals(data_dir).get(KEPT, {})
    if not all(isinstance(value, str) for value in kept.values()):
        raise SettingsError(f"the settings file {data_dir / GLOBALS}: {KEPT} must be an object of texts")
    _check_names(kept)
    return kept


def keep_settings(data_dir: Path, changes: Mapping[str, str]) -> None:
    """Keep settings; one that is empty goes back to its default. Raises `SettingsError`, and then nothing has changed."""
    if not changes:
        return
    _check_names(changes)
    kept = {name: text for name, text in {**kept_settings(data_dir), **changes}.items() if text.strip()}
    read_environment({}, kept)
    write_json(data_dir / GLOBALS, {**read_globals(data_dir), KEPT: kept})


def _check_names(names: Mapping[str, str]) -> None:
    if unknown := [name for name in names if name not in NAMES]:
        raise SettingsError(f"there is no setting {unknown[0][:100]!r}; known: {', '.join(NAMES)}")
