"""Backup and restore: one moment of both files and the keys, checked, and put back as a node that knows what it is."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sqlite3
import stat
import tarfile
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner
from worlds.node_in_test import node_in_test
from worlds.support import trio_test

from golem.chain.rows import TransferBatch
from golem.chain.store import OrdersTaken, Store
from golem.cli import main
from golem.config import ConfigError
from golem.node import backup
from golem.node.backup import BackupError, bind_generations, compare_generations, restore, write_backup
from golem.node.identity import Identity, save_encrypted
from golem.private_files import write_private
from protocol.ledger import CreateAllocation
from protocol.types import Done

PAYEE = "0x" + "aa" * 20


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def allocate(node: Any, name: str) -> None:
    command = CreateAllocation(name, node.node_id, "erc20-local-tglm", "1", None)
    assert await node.system.ask("ledger", command) == Done()


def allocations(node: Any) -> list[str]:
    return [row.allocation_id for _, row in node.system.rows("ledger").prefix("allocation/")]


async def taken(folder: Path) -> Path:
    """Run a node, take a backup in the middle of its life, and return the backup."""
    path = folder / "backup.tar"
    async with node_in_test(folder) as node:
        await allocate(node, "before")
        store = Store(node.config.data_dir / "chain.db", "chain/account")
        store.add_batch(TransferBatch("batch", ((PAYEE, 7),), (("order",),)))
        store.close()
        async with node.system.journal.stopped():
            await trio.to_thread.run_sync(write_backup, node.config.data_dir, path, node.node_id)
        await allocate(node, "after")
        assert allocations(node) == ["after", "before"]
    return path


@trio_test
async def test_a_backup_is_of_one_moment_and_for_its_owner_alone(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    path = await taken(tmp_path / "one")
    assert mode(path) == 0o600
    with tarfile.open(path) as tar:
        names = tar.getnames()
        about = json.load(tar.extractfile("backup.json"))  # type: ignore[arg-type]
    assert names[0] == "backup.json"
    assert set(about["files"]) == {"node.db", "chain.db", "identity.key", "app-keys.json"} == set(names[1:])
    (tmp_path / "two" / "node").mkdir(parents=True)
    told = restore(tmp_path / "two" / "node", path)
    assert told["kept"] == ""
    assert [mode(tmp_path / "two" / "node" / name) for name in about["files"]] == [0o600] * 4
    async with node_in_test(tmp_path / "two") as node:
        assert node.node_id == about["nodeId"]
        assert allocations(node) == ["before"]
        store = Store(node.config.data_dir / "chain.db", "chain/account")
        with pytest.raises(OrdersTaken):
            store.add_batch(TransferBatch("x", ((PAYEE, 7),), (("order",),)))
        assert "restored from a backup" in store.held()
        assert backup.restored_at(node.config.data_dir) == "", "the peers were asked"


@trio_test
async def test_commits_wait_for_a_backup_and_go_on(tmp_path: Path) -> None:
    async with node_in_test(tmp_path) as node, trio.open_nursery() as nursery:
        await allocate(node, "before")
        async with node.system.journal.stopped():
            before = node.system.journal.commits
            nursery.start_soon(allocate, node, "while")
            await trio.sleep(0.3)
            assert node.system.journal.commits == before
        while allocations(node) != ["before", "while"]:
            await trio.sleep(0.01)


@trio_test
async def test_what_was_there_is_kept(tmp_path: Path) -> None:
    path = await taken(tmp_path)
    told = restore(tmp_path / "node", path)
    kept = tmp_path / "node" / told["kept"]
    assert mode(kept) == 0o700
    with closing(sqlite3.connect(kept / "node.db")) as db:
        assert {key for (key,) in db.execute("select key from row where key like 'allocation/%'")} == {
            "allocation/after", "allocation/before",
        }  # fmt: skip
    async with node_in_test(tmp_path) as node:
        assert allocations(node) == ["before"]


@pytest.mark.parametrize("file", ["identity.key", "keystore.json"])
@trio_test
async def test_another_node_is_not_replaced(tmp_path: Path, file: str) -> None:
    (tmp_path / "one").mkdir()
    path = await taken(tmp_path / "one")
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    key = bytes(31) + b"\x05"
    if file == "identity.key":
        write_private(other / file, key.hex())
    else:
        save_encrypted(other / file, key, "a long password")
    node_id = Identity(key, encrypted=False).node_id
    with pytest.raises(BackupError, match=f"is of the node {node_id}, and .* restore into another directory"):
        restore(other, path)
    assert os.listdir(other) == [file]


@trio_test
async def test_what_is_no_backup_changes_nothing(tmp_path: Path) -> None:
    path = await taken(tmp_path)
    data_dir = tmp_path / "node"
    before = {name: (data_dir / name).read_bytes() for name in ("node.db", "chain.db", "identity.key")}

    def packed(name: str, change: Any) -> Path:
        bad = tmp_path / name
        with tarfile.open(path) as tar, tarfile.open(bad, "w") as out:
            for entry in tar:
                content = tar.extractfile(entry).read()  # type: ignore[union-attr]
                change(out, entry, content)
        return bad

    def add(out: tarfile.TarFile, entry: tarfile.TarInfo, content: bytes) -> None:
        entry.size = len(content)
        out.addfile(entry, io.BytesIO(content))

    def flipped(out: tarfile.TarFile, entry: tarfile.TarInfo, content: bytes) -> None:
        add(out, entry, content[:-1] + bytes([content[-1] ^ 1]) if entry.name == "node.db" else content)

    def outside(out: tarfile.TarFile, entry: tarfile.TarInfo, content: bytes) -> None:
        entry.name = "../identity.key" if entry.name == "identity.key" else entry.name
        add(out, entry, content)

    def without(out: tarfile.TarFile, entry: tarfile.TarInfo, content: bytes) -> None:
        if entry.name != "chain.db":
            add(out, entry, content)

    def newer(out: tarfile.TarFile, entry: tarfile.TarInfo, content: bytes) -> None:
        add(out, entry, content.replace(b'"format": 1', b'"format": 9') if entry.name == "backup.json" else content)

    text = tmp_path / "text"
    text.write_text("no archive")
    short = tmp_path / "short"
    short.write_bytes(path.read_bytes()[:20_000])
    for bad in (packed("a", flipped), packed("b", outside), packed("c", without), packed("d", newer), text, short):
        with pytest.raises(BackupError):
            restore(data_dir, bad)
    assert {name: (data_dir / name).read_bytes() for name in before} == before
    assert not [name for name in os.listdir(data_dir) if "restore" in name]


@trio_test
async def test_a_backup_replaces_nothing_and_leaves_nothing_half_made(tmp_path: Path) -> None:
    path = await taken(tmp_path)
    content = path.read_bytes()
    with pytest.raises(BackupError, match="exists already"):
        write_backup(tmp_path / "node", path, "x")
    with pytest.raises(BackupError, match="cannot write"):
        write_backup(tmp_path / "node", tmp_path / "nowhere" / "x.tar", "x")
    assert path.read_bytes() == content
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


@trio_test
async def test_either_file_put_back_alone_is_noticed(tmp_path: Path) -> None:
    data_dir = tmp_path / "node"

    async def live(*, expect: str) -> None:
        assert compare_generations(data_dir) == expect
        async with node_in_test(tmp_path):
            pass

    def kept(name: str) -> bytes:
        for database in (data_dir / "node.db", data_dir / "chain.db"):
            with closing(sqlite3.connect(database)) as db:
                db.execute("pragma wal_checkpoint(truncate)")
        return (data_dir / name).read_bytes()

    def put_back(name: str, content: bytes) -> None:
        for end in ("-wal", "-shm"):
            (data_dir / f"{name}{end}").unlink(missing_ok=True)
        (data_dir / name).write_bytes(content)

    def held() -> str:
        with closing(Store(data_dir / "chain.db", "chain/account")) as store:
            return store.held()

    await live(expect="")
    await live(expect="")
    old = {name: kept(name) for name in ("node.db", "chain.db")}
    await live(expect="")
    put_back("node.db", old["node.db"])
    await live(expect="node.db")
    await live(expect="")
    assert held() == ""  # no order is paid twice: nothing has to wait
    put_back("chain.db", old["chain.db"])
    await live(expect="chain.db")
    assert held() == "chain.db is older than node.db, or was lost"
    await live(expect="")
    for name, content in old.items():  # both together
        put_back(name, content)
    await live(expect="")


@trio_test
async def test_a_start_that_died_between_the_two_files_is_no_restore(tmp_path: Path) -> None:
    async with node_in_test(tmp_path) as node:
        data_dir, boot = node.config.data_dir, node.system.journal.boot
    with closing(sqlite3.connect(data_dir / "node.db", isolation_level=None)) as db:
        db.execute("replace into meta values ('boot', '2-next')")
    assert compare_generations(data_dir) == ""  # the journal was opened, and no more
    with closing(sqlite3.connect(data_dir / "chain.db", isolation_level=None)) as db:
        db.execute("replace into generation values (1, '2-next')")
    assert compare_generations(data_dir) == ""  # and the other file was written to
    bind_generations(data_dir, boot)
    assert compare_generations(data_dir) == ""


def test_the_command_line_without_a_node(tmp_path: Path) -> None:
    async def life() -> None:
        async with node_in_test(tmp_path) as node:
            await allocate(node, "before")

    trio.run(life)

    def golem(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["--data-dir", str(tmp_path / "node"), *arguments])

    made = golem("backup", str(tmp_path / "b.tar"))
    assert made.exit_code == 0, made.output
    assert "node.db" in made.output
    assert mode(tmp_path / "b.tar") == 0o600
    again = golem("backup", str(tmp_path / "b.tar"))
    assert again.exit_code == 1
    assert "exists already" in again.output
    back = golem("restore", str(tmp_path / "b.tar"))
    assert back.exit_code == 0, back.output
    assert "before-restore-" in back.output
    nothing = CliRunner().invoke(main, ["--data-dir", str(tmp_path / "none"), "backup", str(tmp_path / "c.tar")])
    assert nothing.exit_code == 1
    assert "no node" in nothing.output


@trio_test
async def test_a_running_node_is_backed_up_and_not_restored_into(tmp_path: Path) -> None:
    async with node_in_test(tmp_path) as node:
        await allocate(node, "before")
        path, arguments = tmp_path / "b.tar", ["--data-dir", str(node.config.data_dir)]

        def golem(*more: str) -> Any:
            return CliRunner().invoke(main, [*arguments, *more])

        made = await trio.to_thread.run_sync(golem, "backup", str(path))
        assert made.exit_code == 0, made.output
        assert mode(path) == 0o600
        back = await trio.to_thread.run_sync(golem, "restore", str(path))
        assert back.exit_code == 1
        assert "another node runs" in back.output
        held = await trio.to_thread.run_sync(golem, "payment", "resume")
        assert "Nothing was held back" in held.output


def rebuilt(path: Path, target: Path, change: Any) -> Path:
    """Write an archive anew: `change(about, contents)` may change what it says and holds; checksums are right after it."""
    with tarfile.open(path) as tar:
        contents = {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]
    about = json.loads(contents.pop("backup.json"))
    change(about, contents)
    if isinstance(about.get("files"), dict):
        about["files"] = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    with tarfile.open(target, "w") as tar:
        for name, content in {"backup.json": json.dumps(about).encode(), **contents}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return target


def with_database(contents: dict[str, bytes], name: str, script: str, folder: Path) -> None:
    (file := folder / "changed.db").write_bytes(contents[name])
    with closing(sqlite3.connect(file)) as db:
        db.executescript(script)
    contents[name] = file.read_bytes()
    file.unlink()


def renumbered(name: str, number: int, folder: Path, about: dict[str, Any], contents: dict[str, bytes]) -> None:
    with_database(contents, name, f"pragma user_version={number}", folder)


@trio_test
async def test_an_archive_that_is_none_of_this_version_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = await taken(tmp_path)
    data_dir = tmp_path / "node"
    before = {name: (data_dir / name).read_bytes() for name in ("node.db", "chain.db", "identity.key", "app-keys.json")}

    def refuses(words: str, change: Any) -> None:
        with pytest.raises(BackupError, match=words):
            restore(data_dir, rebuilt(path, tmp_path / "bad.tar", change))

    refuses("no backup that this version", lambda about, contents: about.pop("at"))
    refuses("no backup that this version", lambda about, contents: about.update(at="\x1b[31m"))
    refuses("no backup that this version", lambda about, contents: about.update(files=["node.db"]))
    refuses("no backup that this version", lambda about, contents: about.update(nodeId=7))
    refuses("no backup that this version", lambda about, contents: contents.pop("chain.db"))  # payments would be made again
    refuses("it says that it is of 0x1111", lambda about, contents: about.update(nodeId="0x" + "11" * 20))
    refuses("the key in it cannot be read", lambda about, contents: contents.update({"identity.key": b"zz"}))
    refuses("cannot use the app-keys", lambda about, contents: contents.update({"app-keys.json": b"zz"}))
    for name, number in (("node.db", 99), ("chain.db", 99), ("chain.db", 3)):
        refuses(f"made by another version: {name} has schema {number}", partial(renumbered, name, number, tmp_path))
    trap = "create trigger trap after insert on row begin delete from row; end"
    refuses("'trap' is none of its tables", lambda about, contents: with_database(contents, "node.db", trap, tmp_path))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BackupError, match="is no file"):
        restore(data_dir, tmp_path / "fifo")
    assert {name: (data_dir / name).read_bytes() for name in before} == before


@trio_test
async def test_a_key_that_the_backup_does_not_hold_stays(tmp_path: Path) -> None:
    path = await taken(tmp_path)
    keyless = rebuilt(path, tmp_path / "keyless.tar", lambda about, contents: contents.pop("identity.key"))
    key = (tmp_path / "node" / "identity.key").read_text()
    restore(tmp_path / "node", keyless)
    assert (tmp_path / "node" / "identity.key").read_text() == key
    async with node_in_test(tmp_path) as node:
        assert allocations(node) == ["before"]
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    write_private(other / "identity.key", (bytes(31) + b"\x05").hex())
    with pytest.raises(BackupError, match="restore into another directory"):
        restore(other, keyless)


@trio_test
async def test_a_restore_that_was_cut_short_is_no_new_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = await taken(tmp_path)

    def cut(data_dir: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(backup, "_sync_folder", cut)
        with pytest.raises(KeyboardInterrupt):
            restore(tmp_path / "node", path)
    (tmp_path / "node" / "identity.key").unlink()  # it had not come so far
    with pytest.raises(ConfigError, match="was cut short: run golem restore again"):
        async with node_in_test(tmp_path):
            pass
    assert not (tmp_path / "node" / "identity.key").exists()
    restore(tmp_path / "node", path)
    async with node_in_test(tmp_path) as node:
        assert allocations(node) == ["before"]


@trio_test
async def test_a_lost_chain_file_has_payments_wait(tmp_path: Path) -> None:
    async with node_in_test(tmp_path):
        pass
    for end in ("", "-wal", "-shm"):
        (tmp_path / "node" / f"chain.db{end}").unlink(missing_ok=True)
    async with node_in_test(tmp_path) as node:
        with closing(Store(node.config.data_dir / "chain.db", "chain/account")) as store:
            assert store.held() == "chain.db is older than node.db, or was lost"
