"""App-keys: whose they are when the identity changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from golem.node.app_keys import AppKeys
from golem.node.identity import IdentityError

MINE, OTHER = "0x" + "11" * 20, "0x" + "22" * 20


def test_a_name_belongs_to_one_identity(tmp_path: Path) -> None:
    keys = AppKeys(tmp_path / "keys.json")
    made = keys.create("a", MINE)
    assert keys.create("a", MINE) == made
    with pytest.raises(IdentityError, match="another identity"):
        keys.create("a", OTHER)


def test_the_environments_key_follows_the_identity(tmp_path: Path) -> None:
    keys = AppKeys(tmp_path / "keys.json")
    keys.create("autoconfigured", OTHER, key="k" * 32)
    keys.drop_foreign("autoconfigured", MINE)
    assert keys.create("autoconfigured", MINE, key="k" * 32).identity == MINE
    keys.drop_foreign("autoconfigured", MINE)
    assert [key.identity for key in AppKeys(tmp_path / "keys.json").all()] == [MINE]
