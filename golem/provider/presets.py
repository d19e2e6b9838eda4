"""Presets: what a runtime costs. One active preset is one offer.

`presets.json`: `{"ver":"V1","active":["wasmtime"],"presets":[{"name","exeunit-name","pricing-model":"linear",
"initial-price":0.0,"usage-coeffs":{"golem.usage.cpu_sec":0.0001}}],"given":["vm","wasmtime"]}`. Prices are GLM per unit: a
second, or a GiB. `given` are the runtimes whose default preset was made once: one that was removed then stays away.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from golem.provider.settings import SettingsError, check_keys, read_json, write_json
from protocol.property_names import USAGE_CPU, USAGE_DURATION, USAGE_MEM, USAGE_STORAGE

PRESETS = "presets.json"
DEFAULT_COEFFS = {USAGE_CPU: 0.0001, USAGE_DURATION: 0.00005}  # 0.36 and 0.18 GLM an hour
_HOUR_GLM = 0.025  # of a thread at work
DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "wasmtime": DEFAULT_COEFFS,
    "vm": {USAGE_CPU: _HOUR_GLM / 3600, USAGE_DURATION: _HOUR_GLM / 3600 / 5},
}
COUNTERS = {
    "cpu": USAGE_CPU,
    "duration": USAGE_DURATION,
    "memory": USAGE_MEM,
    "storage": USAGE_STORAGE,
}
INIT_PRICE = "init price"
PRESET_KEYS = ("name", "exeunit-name", "pricing-model", "initial-price", "usage-coeffs")
MAX_PRESETS = 32
MAX_PRICE = 1e6
_NAME = re.compile(r"[\w.-]{1,64}\Z")


@dataclass(frozen=True, slots=True)
class Preset:
    """Prices of one runtime: GLM per unit of each counter, and once per activity."""

    name: str
    runtime: str
    coeffs: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_COEFFS))
    initial_price: float = 0.0

    def vector(self) -> list[str]:
        """Return the counters in the order of the offer (sorted by name)."""
        return sorted(self.coeffs)

    def prices(self) -> list[float]:
        """Return the coefficients in the order of `vector`, the fixed price last."""
        return [*(self.coeffs[name] for name in self.vector()), self.initial_price]


@dataclass(frozen=True, slots=True)
class Presets:
    """All presets of an agent, and which of them it offers."""

    all: tuple[Preset, ...]
    active: tuple[str, ...]
    given: tuple[str, ...] = tuple(sorted(DEFAULTS))

    def named(self, name: str) -> Preset:
        """Raises `SettingsError`."""
        for preset in self.all:
            if preset.name == name:
                return preset
        raise SettingsError(f"no preset named {name!r}; there is {', '.join(one.name for one in self.all) or 'none'}")

    def offered(self) -> list[Preset]:
        return [preset for preset in self.all if preset.name in self.active]

    def with_preset(self, preset: Preset) -> Presets:
        """Return these with `preset` in the place of the one of its name, or at the end."""
        others = [one for one in self.all if one.name != preset.name]
        if len(others) >= MAX_PRESETS:
            raise SettingsError(f"at most {MAX_PRESETS} presets")
        if len(others) == len(self.all):
            return replace(self, all=(*self.all, preset))
        return replace(self, all=tuple(preset if one.name == preset.name else one for one in self.all))

    def without(self, name: str) -> Presets:
        """Raises `SettingsError`."""
        self.named(name)
        others = tuple(one for one in self.all if one.name != name)
        return replace(self, all=others, active=tuple(one for one in self.active if one != name))

    def activated(self, name: str, active: bool) -> Presets:
        """Raises `SettingsError`."""
        self.named(name)
        others = tuple(one for one in self.active if one != name)
        return replace(self, active=(*others, name) if active else others)


def default_preset(runtime: str) -> Preset:
    return Preset(runtime, runtime, dict(DEFAULTS.get(runtime, DEFAULT_COEFFS)))


def load_presets(data_dir: Path) -> Presets:
    """Return the presets of an agent, with the default ones that were never given, which are written. Raises `SettingsError`."""
    path = data_dir / PRESETS
    raw = read_json(path, "presets file")
    found = Presets((), (), ()) if raw is None else _presets(raw, path)
    if set(DEFAULTS) <= set(found.given):
        return found
    for runtime in DEFAULTS:
        if runtime not in found.given and not any(runtime in (one.name, one.runtime) for one in found.all):
            found = found.with_preset(default_preset(runtime)).activated(runtime, True)
    found = replace(found, given=tuple(sorted({*found.given, *DEFAULTS})))
    save_presets(data_dir, found)
    return found


def _presets(raw: Any, path: Path) -> Presets:
    check_keys(raw, ("ver", "active", "presets", "given"), f"presets file {path}")
    try:
        presets = tuple(_preset(one) for one in _list(raw, "presets"))
        active = tuple(check_name(name) for name in _list(raw, "active"))
        # Before there were several defaults this one alone was given, and whoever removed it meant it.
        given = tuple(check_name(name) for name in _list(raw, "given", ["wasmtime"]))
    except (KeyError, TypeError, AttributeError, ValueError, SettingsError) as error:
        raise SettingsError(f"the presets file {path} is not in order: {error if str(error) else repr(error)}") from None
    if len(presets) > MAX_PRESETS or len({one.name for one in presets}) < len(presets):
        raise SettingsError(f"the presets file {path} holds two presets of one name, or more than {MAX_PRESETS}")
    if unknown := sorted(set(active) - {one.name for one in presets}):
        raise SettingsError(f"the presets file {path}: there is no preset {unknown[0]!r} to be active")
    return Presets(presets, active, given)


def _list(raw: Mapping[str, Any], key: str, default: list[Any] | None = None) -> list[Any]:
    found = raw[key] if default is None else raw.get(key, default)
    if not isinstance(found, list):
        raise TypeError(f"{key}: expected a list")
    return found


def save_presets(data_dir: Path, presets: Presets) -> None:
    """Raises `SettingsError`."""
    raw = {
        "ver": "V1",
        "active": list(presets.active),
        "presets": [preset_json(one) for one in presets.all],
        "given": list(presets.given),
    }
    write_json(data_dir / PRESETS, raw)


def preset_json(preset: Preset) -> dict[str, Any]:
    return {
        "name": preset.name,
        "exeunit-name": preset.runtime,
        "pricing-model": "linear",
        "initial-price": preset.initial_price,
        "usage-coeffs": dict(preset.coeffs),
    }


def _preset(raw: Any) -> Preset:
    check_keys(raw, PRESET_KEYS, "presets file, in a preset")
    if raw.get("pricing-model", "linear") != "linear":
        raise ValueError(f"pricing model {raw['pricing-model']!r}: only linear is known")
    given = {"initial": raw["initial-price"], **raw["usage-coeffs"]}
    if wrong := [name for name, value in given.items() if not isinstance(value, int | float) or isinstance(value, bool)]:
        raise TypeError(f"the price of {wrong[0][:100]}: expected a number")
    coeffs = {name: check_price(name, value) for name, value in raw["usage-coeffs"].items()}
    return Preset(check_name(raw["name"]), check_name(raw["exeunit-name"]), coeffs, check_price("initial", raw["initial-price"]))


def check_name(name: Any) -> str:
    """Return a preset's or runtime's name. Raises `SettingsError`."""
    if not isinstance(name, str) or not _NAME.match(name):
        raise SettingsError(f"the name {name!r}: expected 1 to 64 letters, digits, '.', '_' or '-'")
    return name


def check_price(what: str, value: Any) -> float:
    """Return a price as a float. Raises `SettingsError`."""
    try:
        price = float(value)
    except (TypeError, ValueError):
        price = math.nan
    if not 0 <= price <= MAX_PRICE:
        raise SettingsError(f"the price of {what}, {value!r}: expected a number from 0 to {MAX_PRICE:g}")
    return price + 0.0  # no negative zero


def parse_price(text: str) -> tuple[str | None, float]:
    """Return the counter (`None` = once per activity) and price of `CPU=0.0001`. Raises `SettingsError`."""
    name, separator, value = text.partition("=")
    key = name.strip().lower()
    if not separator:
        raise SettingsError(f"the price {text!r}: expected COUNTER=GLM, for example CPU=0.0001")
    if key == INIT_PRICE:
        return None, check_price(name, value)
    counter = COUNTERS.get(key, name.strip() if key.startswith("golem.usage.") else None)
    if counter is None:
        raise SettingsError(f"unknown counter {name.strip()!r}: expected one of CPU, Duration, Memory, Storage, 'Init price'")
    return counter, check_price(name, value)
