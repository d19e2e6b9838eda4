"""`golem wallet export`, `import` and `backup-check`, without a node that runs."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from eth_account import Account
from test_backup import taken
from worlds.support import trio_test

from golem.cli import main
from golem.node.identity import plain_text
from golem.private_files import write_private
from protocol.signing import node_id_of

KEY = bytes([7]) * 32
PASSWORD = "a long password"


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("golem.node.identity.SCRYPT_N", 2)


def golem(folder: Path, *arguments: str, typed: str = "", as_json: bool = False) -> Any:
    flags = ["--json"] if as_json else []
    return CliRunner().invoke(main, [*flags, "--data-dir", str(folder), "wallet", *arguments], input=typed)


@pytest.fixture
def node(tmp_path: Path) -> Path:
    (tmp_path / "node").mkdir(mode=0o700)
    write_private(tmp_path / "node" / "identity.key", plain_text(KEY))
    return tmp_path / "node"


def test_a_key_goes_out_as_wallets_read_it_and_comes_into_a_new_node(node: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "key.json", tmp_path / "other"
    done = golem(node, "export", str(file), typed=f"{PASSWORD}\n{PASSWORD}\n")
    assert done.exit_code == 0, done.output
    assert node_id_of(KEY) in done.stdout
    assert KEY.hex() not in done.output
    assert PASSWORD not in done.output
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert bytes(Account.decrypt(file.read_text(), PASSWORD)) == KEY
    assert "exists already" in golem(node, "export", str(file), typed=f"{PASSWORD}\n{PASSWORD}\n").output
    assert "wrong password" in golem(other, "import", str(file), typed="something else\n").output
    assert not (other / "keystore.json").exists()
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    done = golem(other, "import", str(file), "--password-file", str(tmp_path / "password"), as_json=True)
    assert json.loads(done.stdout)["address"] == node_id_of(KEY)
    again = tmp_path / "again.json"
    assert golem(other, "export", str(again)).exit_code == 0, "an encrypted key keeps its password"
    assert bytes(Account.decrypt(again.read_text(), PASSWORD)) == KEY


def test_a_key_comes_into_no_directory_of_another_node(node: Path, tmp_path: Path) -> None:
    file = tmp_path / "key.json"
    file.write_text(json.dumps(Account.encrypt(bytes([8]) * 32, PASSWORD, kdf="scrypt", iterations=2)))
    before = sorted(path.name for path in node.iterdir() if path.name != "lock")
    assert f"is of the node {node_id_of(KEY)}" in golem(node, "import", str(file), typed=f"{PASSWORD}\n").output
    (tmp_path / "used").mkdir(mode=0o700)
    (tmp_path / "used" / "node.db").touch()
    assert "has been used by a node" in golem(tmp_path / "used", "import", str(file), typed=f"{PASSWORD}\n").output
    assert sorted(path.name for path in node.iterdir() if path.name != "lock") == before
    (tmp_path / "strange.json").write_text("{}")
    assert "is no keystore" in golem(tmp_path / "new", "import", str(tmp_path / "strange.json"), typed="x\n").output
    assert "there is no key" in golem(tmp_path / "new", "export", str(tmp_path / "x.json")).output


def test_a_short_password_is_refused(node: Path, tmp_path: Path) -> None:
    done = golem(node, "export", str(tmp_path / "key.json"), typed="short\nshort\n")
    assert (done.exit_code, "at least 8 characters" in done.output) == (1, True)
    assert not (tmp_path / "key.json").exists()


@trio_test
async def test_a_backup_is_looked_at_without_being_put_back(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    path = await taken(tmp_path / "one")
    (tmp_path / "none").mkdir()
    done = golem(tmp_path / "none", "backup-check", str(path), as_json=True)
    found = json.loads(done.stdout)
    assert found["address"].startswith("0x")
    assert set(found["files"]) == {"node.db", "chain.db", "identity.key", "app-keys.json"}
    assert "is whole" in golem(tmp_path / "none", "backup-check", str(path)).stdout
    assert list((tmp_path / "none").iterdir()) == []
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    done = golem(tmp_path / "none", "backup-check", str(path))
    assert (done.exit_code, "is damaged" in done.output) == (1, True), done.output
