"""Every settings file in every odd form: it is refused with its name, at once, and nothing passes for a file that is missing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from golem.base.settings_file import MAX_BYTES, BadSettingsFile, is_there, read_json, read_text
from golem.chain.networks import load as load_networks
from golem.config import config_from
from golem.node.app_keys import AppKeys
from golem.node.identity import IdentityError, open_identity
from golem.node.payout import read_payout
from golem.provider.environment import kept_settings
from golem.provider.hardware import load_profile
from golem.provider.presets import load_presets
from golem.provider.settings import SettingsError, interactions, names, read_rules

KEY = "0123456789abcdef" * 2
APP_KEY = {"name": "a", "key": KEY, "identity": "0x" + "a" * 40, "role": "manager", "created": "2026-01-01T00:00:00Z"}
PRESET = {"name": "a", "exeunit-name": "vm", "initial-price": 0, "usage-coeffs": {"golem.usage.cpu_sec": 0.1}}
PROFILE = {"cpu_threads": 1, "mem_gib": 1, "storage_gib": 1}


def identity(folder: Path) -> Any:
    encrypted = is_there(folder / "keystore.json")
    return open_identity(
        config_from({"GOLEM_PASSWORD": "12345678"} if encrypted else {"GOLEM_PLAIN_KEY": "yes"}, data_dir=folder)
    )


def networks(folder: Path) -> Any:
    return load_networks("testnet", environ={}, extra=folder / "networks.json")


FILES: dict[str, tuple[Callable[[Path], Any], type[Exception]]] = {
    "rules.json": (read_rules, SettingsError),
    "globals.json": (interactions, SettingsError),
    "hardware.json": (load_profile, SettingsError),
    "presets.json": (load_presets, SettingsError),
    "app-keys.json": (lambda folder: AppKeys(folder / "app-keys.json"), IdentityError),
    "payout.json": (read_payout, ValueError),
    "networks.json": (networks, ValueError),
    "identity.key": (identity, IdentityError),
    "keystore.json": (identity, IdentityError),
}


def make(path: Path, form: str) -> None:
    """Put something odd there."""
    texts = {
        "null": "null", "number": "7", "text": '"x"', "empty": "", "spaces": " \n", "half": "{", "twice": '{"a": 1, "a": 1}',
        "infinite": '[1e400]', "not a number": "[NaN]", "deep": "[" * 5000 + "]" * 5000,
    }  # fmt: skip
    raw = {"bom": b"\xef\xbb\xbf{}", "latin": b'{"n": "\xe9"}', "wide": "{}".encode("utf-16"), "huge": b" " * (9 << 20)}
    match form:
        case "link to nowhere":
            path.symlink_to("/nowhere/at/all")
        case "link to itself":
            path.symlink_to(path.name)
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "endless":
            path.symlink_to("/dev/zero")
        case _:
            path.write_bytes(raw.get(form) or texts[form].encode())


FORMS = (
    "link to nowhere", "link to itself", "fifo", "folder", "endless", "null", "number", "text", "empty", "spaces", "half",
    "twice", "infinite", "not a number", "deep", "bom", "latin", "wide", "huge",
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FILES)
def test_odd_files_are_refused(tmp_path: Path, name: str, form: str) -> None:
    read, error = FILES[name]
    make(tmp_path / name, form)
    with pytest.raises(error, match=name.partition(".")[0]):
        read(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_no_fault(tmp_path: Path, name: str) -> None:
    FILES[name][0](tmp_path)


WRONG: list[tuple[str, Any]] = [
    *(("app-keys.json", one) for one in (
        {}, "", 0, False, {"a": APP_KEY}, [APP_KEY | {"allow_origins": "*"}], [APP_KEY | {"allow_origins": {"*": 1}}],
        [APP_KEY | {"allow_origins": [1]}], [APP_KEY | {"name": None}], [APP_KEY | {"key": 7}], [APP_KEY | {"key": ""}],
        [APP_KEY | {"identity": []}], [APP_KEY | {"x": 1}], [APP_KEY, APP_KEY | {"name": "b"}], [None], [[]],
        [{"name": "a", "key": KEY}],
    )),
    *(("payout.json", one) for one in (
        {}, [], {"address": "0x" + "a" * 40}, {"address": "0x" + "a" * 40, "path": None, "key": ""},
        {"address": "0x" + "a" * 40, "path": "", "key": "", "x": ""}, {"address": "0x1", "path": "", "key": ""},
    )),
    *(("presets.json", {"active": active, "presets": presets} | more) for active, presets, more in (
        ("a", [PRESET], {}), (["b"], [PRESET], {}), ([1], [PRESET], {}), ({"a": 1}, [PRESET], {}), (["a"], {"a": PRESET}, {}),
        (["a"], [PRESET | {"initial-price": True}], {}), (["a"], [PRESET | {"initial-price": "0"}], {}),
        (["a"], [PRESET | {"usage-coeffs": {"golem.usage.cpu_sec": "0.1"}}], {}), (["a"], [PRESET], {"given": "vm"}),
        (["a"], [PRESET | {"usage-coeffs": {"golem.usage.cpu_sec": False}}], {}), (["a"], [PRESET | {"usage-coeffs": []}], {}),
        (["a"], [PRESET], {"given": None}), (["a"], [PRESET | {"name": ["a"]}], {}),
    )),
    *(("hardware.json", {"active": "a", "profiles": {"a": PROFILE | one}}) for one in (
        {"cpu_threads": "1"}, {"cpu_threads": True}, {"cpu_threads": 1.5}, {"cpu_threads": None}, {"mem_gib": "inf"},
        {"storage_gib": "Infinity"}, {"storage_gib": [1]}, {"mem_gib": True}, {"cpu_threads": 0}, {"mem_gib": -1},
    )),
    ("hardware.json", {"active": ["a"], "profiles": {"a": PROFILE}}), ("hardware.json", {"active": "a", "profiles": []}),
    ("hardware.json", {"active": "a", "profiles": "a"}),
    ("networks.json", {}), ("networks.json", [{}]), ("networks.json", [1]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"), WRONG, ids=lambda value: value if isinstance(value, str) else json.dumps(value)[:60]
)
def test_wrong_types_set_nothing(tmp_path: Path, name: str, content: Any) -> None:
    read, error = FILES[name]
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(error, match=name.partition(".")[0]) as caught:
        read(tmp_path)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("content", [
    {"node_name": False}, {"node_name": None}, {"node_name": 0}, {"node_name": ""}, {"node_name": "a\u202eb"},
    {"node_name": "\x9b"}, {"node_name": ["x"]}, {"subnet": None}, {"subnet": False}, {"subnet": ""}, {"subnet": 7},
    {"account": 7},
])  # fmt: skip
def test_names_that_are_none(tmp_path: Path, content: dict[str, Any]) -> None:
    (tmp_path / "globals.json").write_text(json.dumps(content))
    with pytest.raises(SettingsError, match="globals"):
        names({}, tmp_path, None, None)


@pytest.mark.parametrize("content", [None, [], "x", {"YA_RT_CORES": 2}, {"YA_RT_CORES": None}, {"x": "1"}])
def test_kept_settings_that_are_none(tmp_path: Path, content: Any) -> None:
    (tmp_path / "globals.json").write_text(json.dumps({"settings": content}))
    with pytest.raises(SettingsError):
        kept_settings(tmp_path)


def test_good_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "app-keys.json"
    path.write_text(json.dumps([APP_KEY | {"allow_origins": ["http://a"]}]))
    found = AppKeys(path).find(KEY)
    assert found is not None
    assert found.allow_origins == ("http://a",)
    assert KEY not in repr(found)


def test_the_reader_itself(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert (read_text(path), read_json(path)) == (None, None)
    path.write_text("a" * MAX_BYTES)
    assert read_text(path) == "a" * MAX_BYTES
    path.write_text("a" * (MAX_BYTES + 1))
    with pytest.raises(BadSettingsFile, match="is over"):
        read_text(path)
