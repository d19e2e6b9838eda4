"""Objects belong to the identity that made them; and a key that has changed on the disk is no other identity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from worlds.node_in_test import APP_KEY, node_in_test
from worlds.support import trio_test

from golem.config import config_from
from golem.daemon import open_node
from golem.node.backup import compare_generations
from golem.node.identity import IdentityError, open_identity, plain_text, save_encrypted
from golem.private_files import write_private
from protocol.ledger import CreateAllocation
from protocol.types import Done

KEYS = [(bytes(31) + bytes([number])).hex() for number in (5, 6)]


def node_of(folder: Path, key: str = "") -> Any:
    if not key:
        return node_in_test(folder)
    environment = {"YAGNA_AUTOCONF_APPKEY": APP_KEY, "YAGNA_DEV_SKIP_ALLOCATION_VALIDATION": "1", "YAGNA_AUTOCONF_ID_SECRET": key}
    settings: dict[str, Any] = {
        "data_dir": folder / "node", "chain_dir": folder / "chain", "plain_key": True, "mdns": False,
        "listen": ("127.0.0.1:0",), "network_name": "in-test",
    }  # fmt: skip
    return open_node(config_from(environment, **settings))


async def names(folder: Path, key: str, new: str = "") -> list[str]:
    """Start a node with this key, set money aside as `new`, and return its allocations."""
    assert compare_generations(folder / "node") == ""
    async with node_of(folder, key) as node:
        if new:
            command = CreateAllocation(new, node.node_id, "erc20-local-tglm", "1", None)
            assert await node.system.ask("ledger", command) == Done()
        assert not node.chain._engines[next(iter(node.chain.networks)).chain].store.held()
        return [row.allocation_id for _, row in node.system.rows("ledger").prefix("allocation/")]


@trio_test
async def test_another_key_sees_nothing_of_the_former_ones_and_each_finds_its_own_again(tmp_path: Path) -> None:
    assert await names(tmp_path, KEYS[0], "first") == ["first"]
    assert await names(tmp_path, KEYS[1]) == []
    assert await names(tmp_path, KEYS[1], "second") == ["second"]
    assert await names(tmp_path, "", "third") == ["third"]
    assert await names(tmp_path, KEYS[0]) == ["first"]
    assert await names(tmp_path, KEYS[1]) == ["second"]
    assert await names(tmp_path, "") == ["third"]
    assert len(list((tmp_path / "node").glob("node-0x*.db"))) == 2


@pytest.mark.parametrize("bit", range(0, 8 * 64, 37))
def test_no_flipped_bit_of_a_key_starts_another_node(tmp_path: Path, bit: int) -> None:
    raw = bytearray(plain_text(bytes.fromhex(KEYS[0])).encode())
    raw[bit // 8] ^= 1 << bit % 8
    write_private(tmp_path / "identity.key", "")
    (tmp_path / "identity.key").write_bytes(raw)
    with pytest.raises(IdentityError, match=r"identity\.key"):
        open_identity(config_from({}, data_dir=tmp_path, plain_key=True))


def test_a_key_of_an_older_version_gets_its_address(tmp_path: Path) -> None:
    write_private(tmp_path / "identity.key", KEYS[0] + "\n")
    identity = open_identity(config_from({}, data_dir=tmp_path, plain_key=True))
    assert (tmp_path / "identity.key").read_text() == f"{KEYS[0]} {identity.node_id}\n"


def test_a_keystore_whose_address_is_anothers_is_damaged(tmp_path: Path) -> None:
    save_encrypted(path := tmp_path / "keystore.json", bytes.fromhex(KEYS[0]), "a long password")
    content = json.loads(path.read_text()) | {"address": "11" * 20}
    path.write_text(json.dumps(content))
    with pytest.raises(IdentityError, match="is said to hold the key of 0x1111"):
        open_identity(config_from({"GOLEM_PASSWORD": "a long password"}, data_dir=tmp_path))
