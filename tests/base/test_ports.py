"""Who has the port of a node gets the app-keys of its agents: nobody but our own user may have it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from golem.base.ports import is_our_node, listeners, may_hear_keys, of_others
from golem.chain.devchain import INFO_NAME, client_version, url_of
from golem.config import Config, ConfigError, config_from
from golem.node.listen import bind_api
from golem.provider.agent import node_url
from golem.provider.client import NodeAway
from golem.provider.settings import Settings

STRANGER = 54321
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
HOLD = """
import os, socket, sys
os.setuid(int(sys.argv[3]))
s = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET)
if sys.argv[1] == '::': s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind((sys.argv[1], int(sys.argv[2]))); s.listen(); print(s.getsockname()[1], flush=True); sys.stdin.read()
"""


@contextmanager
def held(address: str, port: int = 0, *, uid: int | None = None, words: tuple[str, ...] = ()) -> Iterator[int]:
    """A program that listens; `words` are on its command line, too."""
    line = [sys.executable, "-I", "-c", HOLD, address, str(port), str(os.geteuid() if uid is None else uid), *words]
    process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        if not said and ":" in address:
            pytest.skip("no IPv6 here")
        yield int(said)
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


def config_at(tmp_path: Path, port: int, host: str = "127.0.0.1") -> Config:
    """A configuration whose default port is another."""
    return replace(config_from({}, data_dir=tmp_path), api_host=host, api_port=port, api_port_fixed=False)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


@as_root
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::"])
def test_another_users_port_is_not_stepped_aside_from(tmp_path: Path, address: str) -> None:
    with held(address, uid=STRANGER) as port:
        with pytest.raises(ConfigError, match=rf"user {STRANGER} has it.*--api-url"):
            bind_api(config_at(tmp_path, port))
        assert [one.uid for one in of_others("127.0.0.1", port)] == [STRANGER]
        assert not may_hear_keys("127.0.0.1", port)


@as_root
@pytest.mark.parametrize("address", ["::1", "127.0.0.2"])
def test_who_listens_beside_us_for_localhost_is_seen(tmp_path: Path, address: str) -> None:
    with held(address, uid=STRANGER) as port, pytest.raises(ConfigError, match="another user's at"):
        bind_api(config_at(tmp_path, port))


@pytest.mark.parametrize("words", [(), ("golem-not", "run")])
def test_a_program_of_ours_that_is_no_node_is_not_stepped_aside_from(tmp_path: Path, words: tuple[str, ...]) -> None:
    with held("127.0.0.1", words=words) as port, pytest.raises(ConfigError, match="--api-url"):
        bind_api(config_at(tmp_path, port))


def test_beside_our_own_node_there_is_another_port(tmp_path: Path) -> None:
    with held("127.0.0.1", words=("/usr/bin/golem", "run")) as port:
        assert is_our_node("127.0.0.1", port)
        with bind_api(config_at(tmp_path, port)) as sock:
            assert sock.getsockname()[1] != port
    with bind_api(config_at(tmp_path, free_port())) as first, bind_api(config_at(tmp_path, first.getsockname()[1])) as second:
        assert first.getsockname() != second.getsockname()


def test_a_free_port_that_was_asked_for(tmp_path: Path) -> None:
    with bind_api(config_from({}, data_dir=tmp_path, api_url="http://127.0.0.1:0")) as sock:
        found = listeners(sock.getsockname()[1])
        assert [(str(one.address), one.uid) for one in found] == [("127.0.0.1", os.geteuid())]
    port = free_port()
    with held("127.0.0.1", port, words=("golem",)), pytest.raises(ConfigError, match="in use"):
        bind_api(config_from({}, data_dir=tmp_path, api_url=f"http://127.0.0.1:{port}"))


def settings_of(tmp_path: Path, node_url: str = "") -> Settings:
    return Settings(tmp_path, tmp_path / "node.json", node_url, "key", "name")


@pytest.mark.parametrize("uid", [pytest.param(STRANGER, marks=as_root), None])
def test_an_agent_brings_its_key_to_nobody_else(tmp_path: Path, uid: int | None) -> None:
    """A node died and left its `node.json`; somebody took the port."""
    with held("127.0.0.1", uid=uid) as port:
        url = f"http://127.0.0.1:{port}"
        for given in ("", url):
            (tmp_path / "node.json").write_text(json.dumps({"apiUrl": url}))
            find = node_url(settings_of(tmp_path, given))
            if uid is None:
                assert find() == url
            else:
                with pytest.raises(NodeAway, match="another user listens there"):
                    find()
            (tmp_path / "node.json").unlink()
        assert node_url(settings_of(tmp_path, url))() == url, "who names it, means it"
    (tmp_path / "node.json").write_text(json.dumps({"apiUrl": url}))
    with pytest.raises(NodeAway, match="nobody listens there"):
        node_url(settings_of(tmp_path))()


def test_an_agent_whose_node_is_away_asks_no_other_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second node of a machine is started again: the first one, at the usual port, is not meant."""
    with held("127.0.0.1") as first, held("127.0.0.1") as second, held("127.0.0.1") as again:
        monkeypatch.setattr("golem.provider.agent.DEFAULT_API_URL", f"http://127.0.0.1:{first}")
        file = tmp_path / "node.json"
        file.write_text(json.dumps({"apiUrl": f"http://127.0.0.1:{second}"}))
        find = node_url(settings_of(tmp_path))
        assert find() == f"http://127.0.0.1:{second}"
        file.unlink()
        with pytest.raises(NodeAway, match=f"no node is running on {tmp_path}"):
            find()
        file.write_text(json.dumps({"apiUrl": f"http://127.0.0.1:{again}"}))
        assert find() == f"http://127.0.0.1:{again}"
        file.unlink()
        assert node_url(settings_of(tmp_path))() == f"http://127.0.0.1:{first}", "where none was ever seen, the usual port"


def test_what_a_dead_chain_left_is_not_believed(tmp_path: Path) -> None:
    """Whoever takes its port can say what it said."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    import trio

    class Liar(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.dumps({"result": client_version(77)}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Liar)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    info = {"port": server.server_address[1], "pid": 77, "chain_id": 1337}
    (tmp_path / INFO_NAME).write_text(json.dumps(info))
    assert trio.run(url_of, tmp_path) is None
    server.shutdown()
    server.server_close()
