"""What the REST API of a real node says of itself, and to which web pages it speaks."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import trio
from worlds.node_in_test import HEADERS, rest_in_test
from worlds.patience import within
from worlds.support import trio_test

OWN, OTHERS = "https://mine.example", "https://keys.example"


async def get(client: Any, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, Any]:
    answer = await client.open(path, method=method, headers=headers)
    return answer.status_code, await answer.get_data(), answer.headers


@trio_test
async def test_who_am_i_and_which_version(tmp_path: Path) -> None:
    async with rest_in_test(tmp_path) as (node, client):
        status, body, _ = await get(client, "/me", **HEADERS)
        assert (status, json.loads(body)) == (200, {"identity": node.node_id, "name": "autoconfigured", "role": "manager"})
        status, body, _ = await get(client, "/version/get")  # agents ask without a key
        current = json.loads(body)["current"]
        assert (status, json.loads(body)["pending"]) == (200, None)
        assert tuple(map(int, current["version"].split("."))) >= (0, 15, 2), "what SDKs want at least"
        assert "Z" not in current["releaseTs"]
        with within(20):
            while (await get(client, "/healthcheck", **HEADERS))[0] != 200:
                await trio.sleep(0.05)
        status, body, headers = await get(client, "/metrics-api/v1/expose")
        assert status == 200
        assert b"golem_journal_commits_total" in body
        assert headers["Content-Type"].startswith("text/plain")


@trio_test
async def test_web_pages_of_allowed_origins_only(tmp_path: Path) -> None:
    async with rest_in_test(tmp_path, allow_origins=(OWN,)) as (node, client):
        key = node.app_keys.create("page", node.node_id, allow_origins=(OTHERS,)).key
        asked = {"Access-Control-Request-Method": "DELETE", "Access-Control-Request-Headers": "authorization,x-y"}
        for origin in (OWN, OTHERS):  # before a page sends its key, that of any key will do
            status, _, headers = await get(client, "/market-api/v1/demands", "OPTIONS", Origin=origin, **asked)
            assert (status, headers["Access-Control-Allow-Origin"]) == (200, origin)
            assert headers["Access-Control-Allow-Methods"] == "DELETE"
            assert headers["Access-Control-Allow-Headers"] == "authorization,x-y"
            assert headers["Access-Control-Max-Age"] == "3600"
        status, _, headers = await get(client, "/market-api/v1/demands", "OPTIONS", Origin="https://evil.example", **asked)
        assert (status, "Access-Control-Allow-Origin" in headers) == (401, False)
        for bearer, origin, allowed in ((HEADERS["Authorization"], OWN, True), (HEADERS["Authorization"], OTHERS, False),
                                        (f"Bearer {key}", OTHERS, True), (f"Bearer {key}", "null", False)):  # fmt: skip
            status, _, headers = await get(client, "/me", Authorization=bearer, Origin=origin)
            assert status == 200, "an origin that is not allowed blocks nothing: the browser does"
            assert (headers.get("Access-Control-Allow-Origin") == origin) is allowed


FOREIGN = (
    "rebound.example:7465", "127.0.0.1.rebound.example", "localhost.rebound.example", "localhost.", "", "x y", "node.lan:7466",
    "localhost:7465@rebound.example", "127.0.0.1:7465.rebound.example", "127.1:7465", "127.0.0.1:07465",
)  # fmt: skip


@trio_test
async def test_a_website_whose_name_leads_here_learns_nothing(tmp_path: Path) -> None:
    browser = {"User-Agent": "Mozilla/5.0", "Sec-Fetch-Site": "same-origin"}
    async with rest_in_test(tmp_path, allow_origins=("http://node.lan:7465",)) as (_, client):
        for path in ("/version/get", "/metrics-api/v1/expose", "/v1/image/info?tag=render", "/image.00.link", "/dashboard"):
            for sign in (browser, {}, {"User-Agent": "curl/8"}):  # what a page says of itself counts for nothing
                for host in FOREIGN:
                    status, body, _ = await get(client, path, **sign, Host=host)
                    assert (status, b"not for web pages" in body) == (403, True), host
        for host in ("127.0.0.1:7465", "localhost:7465", "[::1]:7465", "192.168.1.2:7465", "node.lan:7465", socket.gethostname()):
            assert (await get(client, "/version/get", **browser, Host=host))[0] == 200
