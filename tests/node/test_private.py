"""What a node keeps is its user's alone, also in a directory that was there before, and whoever opened it is told."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest
from worlds.node_in_test import node_in_test
from worlds.support import trio_test

from golem.config import ConfigError, config_from
from golem.node.identity import open_identity
from golem.private_files import make_private


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@trio_test
async def test_a_directory_that_was_open_is_closed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "node"
    async with node_in_test(tmp_path):
        pass
    folder.chmod(0o755)
    names = ("node.db", "chain.db", "identity.key")
    for name in names:
        (folder / name).chmod(0o644)
    with caplog.at_level(logging.WARNING, "golem.node"):
        async with node_in_test(tmp_path):
            assert mode(folder) == 0o700
            assert {mode(folder / name) for name in names} == {0o600}
    (said,) = [record.getMessage() for record in caplog.records if "open to other users" in record.getMessage()]
    assert str(folder) in said
    assert {folder.name, *names} <= set(said.partition("closed now: ")[2].split(", "))


def test_links_and_strangers_files_stay_as_they_are(tmp_path: Path) -> None:
    other, folder = tmp_path / "other", tmp_path / "folder"
    folder.mkdir(mode=0o700)
    other.write_text("")
    other.chmod(0o644)
    (folder / "link").symlink_to(other)
    os.mkfifo(folder / "pipe", 0o644)
    (folder / "mine").write_text("")
    (folder / "mine").chmod(0o664)
    assert make_private(folder) == ["mine"]
    assert (mode(other), mode(folder / "mine")) == (0o644, 0o600)
    assert make_private(folder) == []


def test_a_password_file_that_others_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    password, data = tmp_path / "password", tmp_path / "node"
    password.write_text("a long password")
    data.mkdir(mode=0o700)
    for allowed, told in ((0o640, True), (0o600, False)):
        caplog.clear()
        password.chmod(allowed)
        open_identity(config_from({}, data_dir=data, password_file=password))
        assert ("other users may read the password file" in caplog.text) is told


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
@pytest.mark.parametrize("name", ["app-keys.json", "networks.json", "node.db", "chain.db", "peers.db"])
@trio_test
async def test_what_another_user_has_put_into_the_directory_is_not_used(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "node"
    folder.mkdir(mode=0o700)
    (folder / name).touch(0o600)
    os.chown(folder / name, 65534, 65534)
    with pytest.raises(ConfigError, match=f"{name} in the data directory .* belongs to another user"):
        async with node_in_test(tmp_path):
            pass
    assert sorted(os.listdir(folder)) == sorted({name, "lock"})
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "nowhere")
    os.chown(folder / name, 65534, 65534, follow_symlinks=False)
    with pytest.raises(ConfigError, match=f"{name} in the data directory .* belongs to another user"):
        async with node_in_test(tmp_path):
            pass
