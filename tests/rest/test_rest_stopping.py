"""A node that stops: requests that wait are answered, streams and websockets end, and nobody holds it up."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import trio
import trio_websocket
from test_rest_activity import pair
from worlds.node_in_test import APP_KEY, HEADERS, node_in_test
from worlds.patience import patience, within
from worlds.support import trio_test

from golem.base import open_files
from golem.daemon import serve_rest
from golem.node.node import Node

SOON_S = 1.5


class Served:
    """A node's REST server; `ended` is set when it has stopped."""

    def __init__(self, node: Node, client: httpx.AsyncClient, nursery: trio.Nursery) -> None:
        self.node, self.client, self.nursery = node, client, nursery
        self.ended = trio.Event()

    async def stop(self) -> float:
        """Stop as `golem.daemon.run_node` does; returns how many seconds it took."""
        began = time.monotonic()
        self.node.stopping.set()
        self.node.system.feeds.close()
        with within(15):
            await self.ended.wait()
        return time.monotonic() - began


@asynccontextmanager
async def served(node: Node) -> AsyncIterator[Served]:
    async with trio.open_nursery() as nursery:
        sock = socket.create_server(("127.0.0.1", 0))

        async def serve(task_status: trio.TaskStatus[None]) -> None:
            await serve_rest(node, sock, task_status=task_status)
            found.ended.set()

        async with httpx.AsyncClient(headers=HEADERS, timeout=patience(30)) as client:
            found = Served(node, client, nursery)
            await nursery.start(serve)
            client.base_url = httpx.URL(node.api_url)
            yield found
            nursery.cancel_scope.cancel()


class Silent:
    """A file that is there and not there."""

    async def size(self) -> int:
        await trio.sleep_forever()
        raise AssertionError

    async def read(self, offset: int, size: int) -> bytes:
        raise AssertionError


def address(node: Node) -> tuple[str, int]:
    host, _, port = node.api_url.removeprefix("http://").rpartition(":")
    return host, int(port)


@trio_test
async def test_a_stop_waits_for_nobody(tmp_path: Path) -> None:
    """Open at the same time: an idle connection, a long-poll, the monitor's event stream, a websocket."""
    async with node_in_test(tmp_path) as node, served(node) as rest:
        answers: list[int] = []
        monitored = trio.Event()

        async def poll() -> None:
            answers.append((await rest.client.get("/payment-api/v1/invoiceEvents?timeout=60")).status_code)

        async def monitor() -> None:
            async with rest.client.stream("GET", "/activity-api/v1/_monitor") as response:
                async for _ in response.aiter_lines():
                    monitored.set()

        body = {"listen": {"on": "/public/gftp/x", "components": ["GetMetadata", "GetChunk"]}}
        service = (await rest.client.post("/gsb-api/v1/services", json=body)).json()["servicesId"]
        rest.nursery.start_soon(poll)
        rest.nursery.start_soon(monitor)
        url = f"{node.api_url.replace('http', 'ws', 1)}/gsb-api/v1/services/{service}?authToken={APP_KEY}"
        async with trio_websocket.open_websocket_url(url):
            await monitored.wait()
            assert await rest.stop() < patience(SOON_S)
        assert answers == [200]


@trio_test
async def test_a_stop_ends_the_event_stream_of_a_batch_that_runs(tmp_path: Path) -> None:
    async with pair(tmp_path) as both, served(both.r.node) as rest:
        node = both.r.node
        both.nursery.start_soon(both.agent)
        activity = await both.create()
        node.files.offer("x", Silent(), "test")
        transfer = {"from": f"gftp://{node.node_id}/x", "to": "container:/golem/work/x"}
        commands = [{"deploy": {}}, {"start": {}}, {"transfer": transfer}]
        status, batch = await both.r("POST", f"/activity/{activity}/exec", {"text": json.dumps(commands)})
        assert status == 200
        following, ended = trio.Event(), trio.Event()

        async def follow() -> None:
            path = f"/activity-api/v1/activity/{activity}/exec/{batch}"
            async with rest.client.stream("GET", path, headers={"Accept": "text/event-stream"}) as response:
                async for line in response.aiter_lines():
                    if '"transfer"' in line:
                        following.set()
            ended.set()

        rest.nursery.start_soon(follow)
        with within(20):
            await following.wait()
        assert await rest.stop() < patience(SOON_S)
        with within(1):
            await ended.wait()


@trio_test
async def test_who_takes_nothing_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("golem.daemon.GRACE_S", 0.5)
    async with node_in_test(tmp_path) as node, served(node) as rest:
        async with await trio.open_tcp_stream(*address(node)) as stream:
            question = b"GET /version/get HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000
            with trio.move_on_after(1) as scope:
                while True:
                    await stream.send_all(question)
            assert scope.cancelled_caught, "the server does not read on while its answers are not taken"
            assert await rest.stop() < patience(SOON_S)


@trio_test
async def test_a_connection_ends_when_its_last_answer_has(tmp_path: Path) -> None:
    async with node_in_test(tmp_path, max_rest_timeout_s=0.3) as node, served(node):
        for more in ("Connection: close\r\n", ""):  # without it: idle for longer than is allowed
            async with await trio.open_tcp_stream(*address(node)) as stream:
                await stream.send_all(f"GET /version/get HTTP/1.1\r\nHost: localhost\r\n{more}\r\n".encode())
                answer = b""
                with within(3):
                    while data := await stream.receive_some(4096):
                        answer += data
                assert answer.startswith(b"HTTP/1.1 200")


@trio_test
async def test_a_client_that_is_gone_leaves_no_socket_behind(tmp_path: Path) -> None:
    """Answers may end after their client has: then nobody counts the connection's idle time, and it is closed at once."""

    def ask_and_leave(where: tuple[str, int]) -> None:
        for _ in range(100):
            with socket.create_connection(where) as client:
                client.sendall(b"GET /version/get HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")

    async with node_in_test(tmp_path) as node, served(node):
        port = address(node)[1]

        def is_left(one: Any) -> bool:
            return one.status == "CLOSE_WAIT" and one.laddr.port == port

        await trio.to_thread.run_sync(ask_and_leave, address(node))
        with within(60):
            while waiting := [one for one in psutil.Process().net_connections("tcp") if is_left(one)]:
                assert node.config.max_rest_timeout_s > 60, "else they would end by themselves"
                await trio.sleep(0.05)
        assert not waiting


@trio_test
async def test_idle_strangers_make_room_for_who_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections need no key: where all places are taken, the one that is idle for longest goes."""
    monkeypatch.setattr(open_files, "for_strangers", lambda: 8)
    async with node_in_test(tmp_path) as node, served(node) as rest, AsyncExitStack() as stack:
        long_poll = "/payment-api/v1/invoiceEvents?timeout=40"
        with within(60):
            polls = [trio.Event() for _ in range(3)]

            async def poll(done: trio.Event) -> None:
                assert (await rest.client.get(long_poll)).status_code == 200
                done.set()

            for done in polls:
                rest.nursery.start_soon(poll, done)
            await trio.sleep(0.5)  # the polls are under way first; later ones would be let in as well
            strangers = []
            for _ in range(40):
                stranger = await trio.open_tcp_stream(*address(node))
                strangers.append(await stack.enter_async_context(stranger))
                assert (await rest.client.get("/me")).status_code == 200
            for stranger in strangers[:20]:
                assert await stranger.receive_some(1) == b"", "closed"
            assert not any(done.is_set() for done in polls), "who has asked is served"
            node.stopping.set()
            node.system.feeds.close()
            for done in polls:
                await done.wait()
