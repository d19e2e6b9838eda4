"""The node as a service: what it tells systemd, and that no secret of its owner is in what it writes and says."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from worlds.patience import patience

pytestmark = [pytest.mark.integration]

PASSWORD = "correct horse battery staple"


def test_systemd_hears_of_it_and_no_log_holds_a_secret(tmp_path: Path) -> None:
    data, log = tmp_path / "data", tmp_path / "node.log"
    app_key, wrong_key, identity = "AppKey" + secrets.token_hex(12), "WrongKey" + secrets.token_hex(12), secrets.token_hex(32)
    environment = {
        **os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "YAGNA_AUTOCONF_APPKEY": app_key,
        "YAGNA_AUTOCONF_ID_SECRET": identity, "GOLEM_PASSWORD": PASSWORD,
    }  # fmt: skip
    line = [sys.executable, "-m", "golem.cli", "--data-dir", str(data), "run", "--debug", "--no-mdns", "--listen", "127.0.0.1:0",
            "--api-url", "http://127.0.0.1:0", "--chain-url", "http://127.0.0.1:9",
            "--chain-dir", str(tmp_path / "chain")]  # fmt: skip
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, log.open("wb") as output:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(patience(20))
        process = subprocess.Popen(line, env=environment, stdout=output, stderr=output)
        try:
            assert notify.recv(100) == b"READY=1"
            url = json.loads((data / "node.json").read_text())["apiUrl"]
            with httpx.Client(base_url=url, timeout=patience(20)) as client:
                assert client.get("/me", params={"authToken": app_key}).is_success
                assert client.get("/me", params={"authToken": wrong_key}).status_code == 401
                assert client.get("/market-api/v1/nothing", params={"authToken": app_key}).status_code == 404
                headers = {"Authorization": f"Bearer {app_key}"}
                assert client.post("/market-api/v1/demands", content=b"{", headers=headers).status_code == 400
                offer = {"properties": {"golem.node.id.name": "x"}, "constraints": "()"}
                assert client.post("/market-api/v1/offers", json=offer, headers=headers).is_success
                assert client.get("/payment-api/v1/requestorAccounts", headers=headers).status_code < 599
            with socket.create_connection((url.split("/")[2].split(":")[0], int(url.rpartition(":")[2]))) as broken:
                broken.sendall(f"GET /me?authToken={wrong_key} nonsense\r\n\r\n".encode())
                broken.recv(100)
            made = subprocess.run(
                [*line[:5], "app-key", "create", "other"], env=environment, capture_output=True, text=True, check=True
            ).stdout.strip()
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait(patience(20))
        assert (status, notify.recv(100)) == (0, b"STOPPING=1")
    written = {path.name: path.read_bytes() for path in (log, *data.glob("steps.log*"))}
    assert b"PublishOffer" in written["steps.log"]
    assert written["node.log"]
    for secret in (app_key, wrong_key, made, identity, PASSWORD):
        found = [name for name, content in written.items() if secret.encode() in content or secret[-20:].encode() in content]
        assert not found, "a secret is in a log"
        stored = [path.name for path in data.iterdir() if path.is_file() and secret.encode() in path.read_bytes()]
        assert stored in ([], ["app-keys.json"]), "app-keys have one file, and it is ours alone"
    assert (data / "app-keys.json").stat().st_mode & 0o077 == 0
    assert not (data / "node.json").exists()
