"""Every endpoint against bad input: a clear 4xx with `{"message"}`, never a 5xx; no key is 401."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio
from worlds.node_in_test import HEADERS, rest_in_test
from worlds.patience import patience
from worlds.support import trio_test

OPEN = ("/version/get", "/metrics-api", "/v1/image/", "/image.<sha3>.link")
#: What each kind of path parameter is filled with: nothing that exists.
FILLINGS = (
    "nonsense", "0" * 32, "R-" + "0" * 64, "a" * 32 + "-" + "b" * 64, "00000000-0000-4000-8000-000000000000", "%00", "é" * 300,
)  # fmt: skip
BODIES = (
    b"{", b"[]", b"null", b"17", b'"text"', b'{"a":1,"a":2}', b"\xff\xfe", b"[" * 10_000, b'{"totalAmount": NaN}', b"{}",
    b'{"properties": 5, "constraints": []}', b'{"properties": {}, "constraints": "(("}', b'{"proposalId": 7, "validTo": "soon"}',
    b'{"totalAmount": {"$": 1}, "paymentPlatform": 3}', b'{"text": "not json"}', b'{"text": 4}', b'{"agreementId": []}',
    b'{"totalAmountAccepted": "-1", "allocationId": 5}', b'{"activityId": 1, "totalAmountDue": "x"}', b'{"state": "Ready"}',
    b'{"message": 3}', b'{"type": "lies"}', b'"\\ud800"', b'{"listen": {"on": 4}}',
    b'{"properties": {"a": ["\\ud800"]}, "constraints": "()"}', b'["\\udfff"]', b'{"properties": {"a": "\xed\xa0\x80"}}',
)  # fmt: skip
PROFILE = "testnet"  # has no dev chain, for which some answers wait
QUERIES = (
    "timeout=soon", "timeout=-1&maxEvents=100000", "maxEvents=-3", "afterTimestamp=yesterday", "maxItems=x", "commandIndex=a",
)  # fmt: skip


def endpoints(app: Any) -> list[tuple[str, str]]:
    """Return (method, rule) of everything the application serves except websockets."""
    found = []
    for rule in app.url_map.iter_rules():
        if not rule.websocket and not rule.rule.endswith(("/_monitor", "/healthcheck")):  # an endless stream; no input
            found += [(method, rule.rule) for method in sorted(rule.methods - {"HEAD", "OPTIONS"})]
    return sorted(found)


def fill(rule: str, value: str) -> str:
    """Return the rule with each parameter replaced."""
    parts = []
    for part in rule.split("/"):
        parts.append(value if part.startswith("<") else part)
    return "/".join(parts)


async def answer(client: Any, method: str, path: str, **arguments: Any) -> tuple[int, bytes, str]:
    """Return status, body and content type."""
    with trio.move_on_after(patience(20)):
        response = await client.open(path, method=method, **arguments)
        return response.status_code, await response.get_data(), response.headers.get("Content-Type", "")
    raise AssertionError(f"{method} {path} {arguments} did not answer")


@trio_test
async def test_every_endpoint_wants_a_key(tmp_path: Path) -> None:
    async with rest_in_test(tmp_path) as (_, client):
        for method, rule in endpoints(client.app):
            if rule.startswith(OPEN):
                continue
            status, body, kind = await answer(client, method, fill(rule, "nonsense"))
            assert (status, json.loads(body)) == (401, {"message": "Missing application key"}), (method, rule)
            assert kind == "application/json"  # yapapi reads the message of each error so
            bad = {"Authorization": "Bearer 00000000000000000000000000000000"}
            status, body, _ = await answer(client, method, fill(rule, "nonsense"), headers=bad)
            assert (status, json.loads(body)) == (401, {"message": "Invalid application key"}), (method, rule)


@trio_test
async def test_another_identitys_key_reaches_no_object(tmp_path: Path) -> None:
    async with rest_in_test(tmp_path) as (node, client):
        stranger = "0x" + "ab" * 20
        headers = {"Authorization": f"Bearer {node.app_keys.create('stranger', stranger).key}"}
        assert json.loads((await answer(client, "GET", "/me", headers=headers))[1])["identity"] == stranger
        for method, rule in endpoints(client.app):
            if rule.startswith(OPEN) or rule == "/me":
                continue
            status, text, _ = await answer(client, method, fill(rule, "nonsense"), headers=headers, data=b"{}")
            assert status == 403, (method, rule, status, text[:200])
            assert stranger in json.loads(text)["message"]
        status, text, _ = await answer(client, "GET", "/market-api/v1/offers", headers=HEADERS)
        assert (status, text) == (200, b"[]")


@trio_test
async def test_no_input_is_our_fault(tmp_path: Path) -> None:
    async with rest_in_test(tmp_path, profile=PROFILE) as (_, client):
        for method, rule in endpoints(client.app):
            bodies = BODIES if method in ("POST", "PUT") else (b"",)
            for value in FILLINGS if "<" in rule else FILLINGS[:1]:
                for body in bodies:
                    path = fill(rule, value) + "?timeout=0"
                    status, text, kind = await answer(client, method, path, data=body, headers=HEADERS)
                    where = (method, path, body[:60], status, text[:300])
                    assert status < 500 or (status == 501 and b"message" in text) or _unknown_activity(rule, text), where
                    if status >= 400:
                        assert kind in ("application/json", "application/problem+json"), where
                        assert "message" in json.loads(text), where


def _unknown_activity(rule: str, text: bytes) -> bool:
    """Agents expect a 500 of this text for an activity that nobody knows (the reference's words)."""
    return "/activity" in rule and b"Not found" in text


@trio_test
async def test_malformed_queries_are_refused(tmp_path: Path) -> None:
    async with rest_in_test(tmp_path, profile=PROFILE) as (_, client):
        for method, rule in endpoints(client.app):
            for query in QUERIES:
                status, text, _ = await answer(client, method, f"{fill(rule, 'nonsense')}?{query}&timeout=0", headers=HEADERS)
                where = (method, rule, query, status, text[:200])
                assert status < 500 or (status == 501 and b"message" in text) or _unknown_activity(rule, text), where


@trio_test
async def test_an_endpoint_that_is_none(tmp_path: Path) -> None:
    async with rest_in_test(tmp_path) as (_, client):
        status, text, _ = await answer(client, "GET", "/market-api/v1/nothing", headers=HEADERS)
        assert status == 404
        assert json.loads(text)["message"].startswith("no such endpoint")
        status, text, _ = await answer(client, "POST", "/market-api/v1/demands", headers=HEADERS, data=b"x" * (5 << 20))
        assert status == 413
        assert "message" in json.loads(text)


@trio_test
async def test_errors_of_every_part_are_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no endpoint says itself: an unknown path, a wrong method, a body too long, and a bug of ours."""
    async with rest_in_test(tmp_path) as (node, client):
        rules: dict[str, set[str]] = {}
        for method, rule in endpoints(client.app):
            rules.setdefault(rule, set()).add(method)
        roots = sorted({"/".join(rule.split("/")[:3]) for rule in rules if rule.count("/") > 2})
        assert len(roots) > 5
        for root in roots:
            status, text, kind = await answer(client, "GET", f"{root}/no/such/thing/there", headers=HEADERS)
            assert (status, kind) == (404, "application/json"), root
            assert json.loads(text)["message"].startswith(("no such endpoint", "this node has no image")), root
        for rule, methods in rules.items():
            response = await client.open(fill(rule, "nonsense"), method="PATCH", headers=HEADERS)
            text = await response.get_data()
            assert (response.status_code, response.headers["Content-Type"]) == (405, "application/json"), (rule, text)
            assert json.loads(text)["message"]
            assert methods <= set(response.headers["Allow"].split(", ")), rule
        for rule, methods in rules.items():
            for method in methods & {"POST", "PUT"}:
                where = f"{fill(rule, 'nonsense')}?timeout=0"
                status, text, kind = await answer(client, method, where, headers=HEADERS, data=b"x" * (5 << 20))
                assert (status < 400) or ("json" in kind and "message" in json.loads(text)), (rule, status, text[:200])
        monkeypatch.setattr(type(node.app_keys), "find", lambda *_: 1 / 0)
        for root in roots:
            if f"{root}/".startswith(OPEN):
                continue
            status, text, kind = await answer(client, "GET", f"{root}/x", headers=HEADERS)
            assert (status, kind) == (500, "application/json"), root
            assert json.loads(text)["message"].startswith("internal error (trace "), root
