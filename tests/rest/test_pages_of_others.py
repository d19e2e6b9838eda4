"""What any web page may send to a node's REST API: every endpoint, in every form that needs nobody's leave.

A page has no app-key. It chooses a method, the body, one of three content types, the query and subprotocols of a websocket;
`Origin`, `Host` and what browsers say of themselves it cannot choose. The dev chain's part: `tests/chain/test_hostile_pages.py`.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from quart.testing.connections import WebsocketResponseError
from worlds.node_in_test import APP_KEY, HEADERS, rest_in_test
from worlds.support import trio_test

OPEN = ("/version/get", "/metrics-api/v1/expose", "/v1/image/info?tag=x", "/image.00.link", f"/v1/image/{'a' * 56}")
SIMPLE_TYPES = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None)
ORIGINS = ("https://evil.example", "null", "http://127.0.0.1:7466", None)
KEYS = ("", "page-" + "0" * 32, "undefined", "*", "null", APP_KEY[:-1], APP_KEY.upper())


def filled(rule: Any) -> str:
    """Return a path of a rule with something in each place."""
    return str(rule.rule).replace("<", "{").replace(">", "}").format_map(_Any())


class _Any(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return "a" * 32


def page(origin: str | None, kind: str | None, host: str = "127.0.0.1:7465") -> dict[str, str]:
    given = {"Host": host, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "User-Agent": "Mozilla/5.0"}
    return given | ({"Origin": origin} if origin else {}) | ({"Content-Type": kind} if kind else {})


def is_unknown(error: WebsocketResponseError) -> bool:
    return error.response.status_code == 401


@trio_test
async def test_no_endpoint_does_anything_for_a_page(tmp_path: Path) -> None:
    async with rest_in_test(tmp_path) as (node, client):
        app = client.app
        rules = [rule for rule in app.url_map.iter_rules() if not rule.websocket]
        assert len(rules) > 50
        for rule, origin, kind in itertools.product(rules, ORIGINS, SIMPLE_TYPES):
            for method in sorted(set(rule.methods or ()) & {"GET", "POST", "HEAD"}) or ["POST"]:
                answer = await client.open(filled(rule), method=method, headers=page(origin, kind), data=b'{"x": 1}')
                assert answer.status_code in (401, 403, 405), (method, rule.rule, answer.status_code)
                assert "Access-Control-Allow-Origin" not in answer.headers
        for rule in rules:  # what a page must ask for first it is not allowed
            asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
            answer = await client.open(filled(rule), method="OPTIONS", headers=page("null", None) | asked)
            assert answer.status_code in (401, 403), rule.rule
            assert "Access-Control-Allow-Origin" not in answer.headers
        assert node.system.listed("market", "") == ([], [])
        assert (await client.get("/me", headers=page(None, None) | HEADERS)).status_code == 200, "with the key they answer"


@trio_test
async def test_keys_that_a_page_may_guess(tmp_path: Path) -> None:
    async with rest_in_test(tmp_path) as (_, client):
        for key in KEYS:
            answer = await client.get("/me", query_string={"authToken": key}, headers=page(None, None))
            assert answer.status_code == 401, key


@trio_test
async def test_websockets_know_no_origin_and_so_want_a_key(tmp_path: Path) -> None:
    async with rest_in_test(tmp_path) as (_, client):
        rules = [rule for rule in client.app.url_map.iter_rules() if rule.websocket]
        assert rules
        for rule, origin, key in itertools.product(rules, ORIGINS, KEYS):
            headers = page(origin, None) | {"Sec-Fetch-Mode": "websocket"}
            with pytest.RaisesGroup(pytest.RaisesExc(WebsocketResponseError, check=is_unknown), flatten_subgroups=True):
                async with client.websocket(filled(rule), headers=headers, query_string={"authToken": key}) as socket:
                    await socket.receive()


@trio_test
async def test_what_needs_no_key_is_not_for_pages_either(tmp_path: Path) -> None:
    """Their reader is the user's machine: a page could keep the places of its downloads."""
    own = "http://mine.example"
    async with rest_in_test(tmp_path, allow_origins=(own,)) as (_, client):
        for path in OPEN:
            for headers in (page("https://evil.example", None), page("null", None), page(None, None)):
                assert (await client.get(path, headers=headers)).status_code == 403
            for headers in (page(own, None), page(None, None) | {"Sec-Fetch-Mode": "navigate"}, {"Host": "127.0.0.1:7465"},
                            page(None, None) | {"Sec-Fetch-Site": "none"}):  # fmt: skip
                assert (await client.get(path, headers=headers)).status_code in (200, 400, 404)
