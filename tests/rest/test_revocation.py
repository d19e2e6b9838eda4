"""An app-key that is removed ends what it has open, and nothing of other keys."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import trio
import trio_websocket
from test_gsb import PROTOCOL
from test_rest_stopping import address, served
from worlds.node_in_test import HEADERS, node_in_test
from worlds.patience import within
from worlds.support import trio_test

POLL = "/payment-api/v1/invoiceEvents?timeout=3000"


@trio_test
async def test_long_polls_and_websockets_end_with_their_key(tmp_path: Path) -> None:
    async with (
        node_in_test(tmp_path) as node,
        served(node),
        httpx.AsyncClient(timeout=None) as client,
        trio.open_nursery() as polls,
    ):
        key = node.app_keys.create("leaving", node.node_id).key
        answers: dict[str, httpx.Response] = {}

        async def poll(name: str, headers: dict[str, str]) -> None:
            answers[name] = await client.get(f"{node.api_url}{POLL}", headers=headers)

        gone = {"Authorization": f"Bearer {key}"}
        host, port = address(node)
        services = f"{node.api_url}/gsb-api/v1/services"
        with within(60):
            body = {"listen": {"on": "/public/gftp/x", "components": ["GetMetadata", "GetChunk"]}}
            made = await client.post(services, json=body, headers=gone)
            assert made.status_code == 201, made.text
            path = f"/gsb-api/v1/services/{made.json()['servicesId']}?authToken={key}"
            async with trio_websocket.open_websocket(host, port, path, use_ssl=False, subprotocols=[PROTOCOL]) as socket:
                polls.start_soon(poll, "leaving", gone)
                polls.start_soon(poll, "staying", dict(HEADERS))
                while len(node.app_keys._open) < 2 or len(node.app_keys._open[key]) < 2:
                    await trio.sleep(0.01)
                node.app_keys.drop("leaving")
                with pytest.raises(trio_websocket.ConnectionClosed) as closed:
                    await socket.get_message()
                assert closed.value.reason.code == 1008
                assert closed.value.reason.reason == "the app-key was removed"
            while "leaving" not in answers:
                await trio.sleep(0.01)
            assert (answers["leaving"].status_code, answers["leaving"].json()) == (401, {"message": "the app-key was removed"})
            assert "staying" not in answers
            assert key not in node.app_keys._open
            assert (await client.get(f"{node.api_url}/me", headers=gone)).status_code == 401
            polls.cancel_scope.cancel()
