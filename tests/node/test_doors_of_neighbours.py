"""What other users of the machine may have prepared, and what our own children may ask of the node."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
import trio
from worlds.node_in_test import node_in_test
from worlds.support import trio_test

from golem.bus.client import open_client, open_stream
from golem.bus.wire import BusError
from golem.cli.client import call
from golem.config import Config, ConfigError, config_from
from golem.daemon import open_node
from golem.net.types import RemoteError
from golem.node.app_keys import AUTOCONF
from golem.node.identity import KEYSTORE, PLAIN_KEY, IdentityError, open_identity
from golem.provider.agent import AgentError, _lock

STRANGER = 54321


@contextmanager
def proxy_in_test(seen: list[str]) -> Iterator[str]:
    """An HTTP proxy that notes what it is asked for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(f"GET {self.path}")
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
KEY = "11" * 32


def config_at(folder: Path, **flags: object) -> Config:
    return config_from({}, data_dir=folder, chain_url="http://127.0.0.1:9", mdns=False, listen=("127.0.0.1:0",), **flags)


# -- folders and keys of others
@as_root
def test_a_folder_that_another_user_made_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "node"
    folder.mkdir(mode=0o755)
    (folder / PLAIN_KEY).write_text(KEY)
    os.chown(folder, STRANGER, STRANGER)
    with pytest.raises(ConfigError, match=f"belongs to user {STRANGER}"):
        trio.run(start, config_at(folder, plain_key=True))
    with pytest.raises(AgentError, match=f"belongs to user {STRANGER}"):
        _lock(folder, AsyncExitStack())
    assert sorted(os.listdir(folder)) == [PLAIN_KEY], "no trace is left"


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702])
def test_a_folder_that_all_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "node"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigError, match="others may write"):
        trio.run(start, config_at(folder, plain_key=True))
    assert os.listdir(folder) == []


async def start(config: Config) -> None:
    async with open_node(config):
        pass


@as_root
@pytest.mark.parametrize("name", [PLAIN_KEY, KEYSTORE])
def test_a_key_of_another_user_does_not_become_the_wallet(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(KEY)
    os.chown(tmp_path / name, STRANGER, STRANGER)
    with pytest.raises(IdentityError, match=f"belongs to user {STRANGER}"):
        open_identity(config_at(tmp_path, plain_key=True))


# -- passwords
def test_a_password_is_not_ignored_beside_a_plain_key(tmp_path: Path) -> None:
    plain = open_identity(config_at(tmp_path, plain_key=True))
    with pytest.raises(IdentityError, match="contradict"):
        open_identity(config_at(tmp_path, plain_key=True, password="long enough"))
    with pytest.raises(IdentityError, match="at least 8"):
        open_identity(config_at(tmp_path, password="short"))
    assert (tmp_path / PLAIN_KEY).exists()
    found = open_identity(config_at(tmp_path, password="long enough"))
    assert (found.node_id, found.encrypted) == (plain.node_id, True)
    assert not (tmp_path / PLAIN_KEY).exists()
    assert stat.S_IMODE((tmp_path / KEYSTORE).stat().st_mode) == 0o600
    crypto = json.loads((tmp_path / KEYSTORE).read_text())["crypto"]
    assert (crypto["kdf"], crypto["kdfparams"]["n"]) == ("scrypt", 262144)
    (tmp_path / PLAIN_KEY).write_text(KEY)
    with pytest.raises(IdentityError, match="two keys"):
        open_identity(config_at(tmp_path, password="long enough"))


@pytest.mark.parametrize("password", ["x", "1234567"])
def test_short_passwords_protect_nothing(tmp_path: Path, password: str) -> None:
    for config, ask in ((config_at(tmp_path, password=password), None), (config_at(tmp_path), lambda prompt, twice: password)):
        with pytest.raises(IdentityError, match="at least 8"):
            open_identity(config, ask)
    assert os.listdir(tmp_path) == []


# -- keys
@trio_test
async def test_an_autoconfigured_key_ends_with_its_variable(tmp_path: Path) -> None:
    async with node_in_test(tmp_path) as node:
        assert node.app_keys.named(AUTOCONF) is not None
        kept = node.app_keys.create("mine", node.node_id)
    async with open_node(config_at(tmp_path / "node", plain_key=True)) as node:
        assert [one.key for one in node.app_keys.all()] == [kept.key]


def test_no_key_goes_to_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def ask(command: str, **_: object) -> dict[str, str]:
        return {"url": "http://127.0.0.1:9", "key": "secret"}

    monkeypatch.setattr("golem.cli.client.ask_node", ask)
    with proxy_in_test(seen) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy)
        with pytest.raises(Exception, match="did not answer"):
            call("GET", "/me")
        httpx.get("http://192.0.2.1/", timeout=5)
    assert seen == ["GET http://192.0.2.1/"], "the proxy is there, and was not asked"


# -- exe-units
@trio_test
async def test_an_exe_unit_reaches_no_keys(tmp_path: Path) -> None:
    async with node_in_test(tmp_path) as node:
        assert stat.S_IMODE(node.config.units_path.stat().st_mode) == 0o600
        for path in (node.config.bus_path, node.config.units_path):
            async with open_client(path, "exeunit:" + "a" * 32, "exe-unit") as unit:
                for target in ("cli:status", "cli:rest_access", "cli:shutdown", "market", "exeunit:" + "b" * 32, "exeunit-x", ""):
                    for where in ("", node.node_id, "0x" + "b" * 40):
                        with pytest.raises(RemoteError, match="not for exe-units"):
                            await unit.call(where, target, b"{}", 5)
                with pytest.raises(RemoteError, match="not for exe-units"):
                    await unit.call("0x" + "b" * 40, "unit:nearness", b"", 5)
                assert await unit.call("", "unit:nearness", ("0x" + "b" * 40).encode(), 5) == b"far"
                assert await unit.call("", "unit:nearness", node.node_id.encode(), 5) == b"machine"
        for name in ("cli:x", "gftp:x", "x"):
            with pytest.raises(BusError, match="for exe-units"):
                async with open_client(node.config.units_path, name, "cli") as client:
                    await client.call("", "cli:rest_access", b"{}", 5)
        with pytest.raises((BusError, RemoteError), match="for exe-units"):
            await open_stream(node.config.units_path, node.node_id, "exeunit")
        async with open_client(node.config.bus_path, "cli:x", "cli") as client:
            assert b"key" in await client.call("", "cli:rest_access", b"{}", 5)
