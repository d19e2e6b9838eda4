"""A hand inside an activity over REST: shell and services, with two real nodes and a guest that is this machine."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import hypercorn.config
import hypercorn.trio
import pytest
import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, open_websocket_url
from worlds.hand_world import HandWorld, hand_world, listening
from worlds.node_in_test import APP_KEY
from worlds.patience import within
from worlds.support import trio_test

from golem.node.app_keys import AppKey
from golem.node.node import Node
from protocol.interaction import OpenTerminal

pytestmark = pytest.mark.integration

STRANGER = "0x00000000000000000000000000000000000000aa"


class Service:
    """An HTTP service in the guest; `seen` are the requests it got."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.go_on = trio.Event()
        self.left = trio.Event()
        self.port = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            raise ValueError("no lifespan")  # the server goes on without
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        self.seen.append({
            "path": scope["raw_path"].decode(), "query": scope["query_string"].decode(), "headers": headers,
            "method": scope.get("method"),
        })  # fmt: skip
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
            return
        handler = getattr(self, "_" + scope["path"].strip("/").partition("/")[0], None)
        if handler is None:
            await self._send(send, 404, b"nothing here")
        else:
            await handler(receive, send)

    async def _send(self, send: Any, status: int, body: bytes, *more: tuple[bytes, bytes]) -> None:
        headers = [*more, (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _body(self, receive: Any) -> AsyncIterator[bytes]:
        while True:
            message = await receive()
            yield message.get("body", b"")
            if not message.get("more_body"):
                return

    async def _hash(self, receive: Any, send: Any) -> None:
        sha = hashlib.sha256()
        async for piece in self._body(receive):
            sha.update(piece)
        await self._send(send, 200, sha.hexdigest().encode(), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"))

    async def _download(self, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})  # chunked
        for _ in range(64):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        await send({"type": "http.response.body", "body": b"end"})

    async def _events(self, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"data: one\n\n", "more_body": True})
        await self.go_on.wait()
        await send({"type": "http.response.body", "body": b"data: two\n\n", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left.set()

    async def _login(self, receive: Any, send: Any) -> None:
        await self._send(send, 302, b"", (b"location", b"/home"))

    async def _away(self, receive: Any, send: Any) -> None:
        await self._send(send, 307, b"", (b"location", b"/../../../../../../payment-api/v1/allocations"), (b"set-cookie", b"a=1"))

    async def _elsewhere(self, receive: Any, send: Any) -> None:
        await self._send(send, 302, b"", (b"location", b"http://example.com/x"))

    async def _websocket(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        if scope["path"] == "/closed":
            await send({"type": "websocket.close"})
            return
        await send({"type": "websocket.accept", "subprotocol": (scope["subprotocols"] or [None])[0]})
        while (message := await receive())["type"] == "websocket.receive":
            if message["text"] == "bye":
                await send({"type": "websocket.close", "code": 4001, "reason": "as you wish"})
                return
            await send({"type": "websocket.send", "text": message["text"], "bytes": message["bytes"]})
        self.left.set()


@asynccontextmanager
async def service(world: HandWorld) -> AsyncIterator[Service]:
    made, sock = Service(), listening()
    made.port = sock.getsockname()[1]
    config = hypercorn.config.Config()
    config.bind = [f"fd://{sock.detach()}"]
    config.loglevel = "ERROR"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hypercorn.trio.serve, made, config)  # type: ignore[arg-type]
        yield made
        nursery.cancel_scope.cancel()


@trio_test
async def test_requests_reach_the_service_and_the_key_does_not(tmp_path: Path) -> None:
    async with hand_world(tmp_path) as w, service(w) as s, w.http() as http:
        answer = await http.get(f"{s.port}/a%2Fb//c?x=1&authToken={APP_KEY}&y=%20", headers={"X-Mine": "1", "TE": "trailers"})
        assert (answer.status_code, answer.text) == (404, "nothing here")
        assert "sandbox" in answer.headers["content-security-policy"]
        seen = s.seen[-1]
        assert (seen["path"], seen["query"], seen["method"]) == ("/a%2Fb//c", "x=1&y=%20", "GET")
        assert seen["headers"]["host"] == f"localhost:{s.port}"
        assert seen["headers"]["x-mine"] == "1"
        assert APP_KEY not in json.dumps(s.seen)
        assert "authorization" not in seen["headers"]
        assert "te" not in seen["headers"]
        body = os.urandom(3 << 20)
        sha = hashlib.sha256(body).hexdigest()

        async def pieces() -> AsyncIterator[bytes]:
            for at in range(0, len(body), 100_000):
                yield body[at : at + 100_000]

        for data in (body, pieces()):  # with its length, and chunked
            answer = await http.request("PATCH", f"{w.base}/proxy-http/http://localhost:{s.port}/hash", content=data)
            assert (answer.status_code, answer.text) == (200, sha)
            mine = f"; Path={w.path}/proxy-http/{s.port}"
            assert answer.headers.get_list("set-cookie") == ["a=1" + mine, "b=2" + mine]
        answer = await http.get(f"{s.port}/login")
        assert (answer.status_code, answer.headers["location"]) == (302, f"{w.path}/proxy-http/{s.port}/home")
        answer = await http.head(f"{s.port}/login")
        assert (answer.status_code, answer.content) == (302, b"")
        assert (await http.get(f"{s.port}/download")).content == b"x" * 65536 * 64 + b"end"
        w.runtime.ports = (s.port,)
        assert (await http.get("")).status_code in (404, 502)
        assert (await http.request("OPTIONS", f"{s.port}/x")).text == "nothing here"
        # without a header, as a browser's page or an image would
        answer = await trio_get(f"{w.base}/proxy-http/{s.port}/x?authToken={APP_KEY}")
        assert answer.endswith(b"nothing here")


async def trio_get(url: str) -> bytes:
    """A GET as bare as can be; returns all of the answer."""
    _, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    stream = await trio.open_tcp_stream("127.0.0.1", int(host.rpartition(":")[2]))
    async with stream:
        await stream.send_all(f"GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return b"".join([chunk async for chunk in stream])


@trio_test
async def test_a_page_does_not_learn_the_key(tmp_path: Path) -> None:
    page = {"Sec-Fetch-Mode": "navigate", "Authorization": "", "Accept": "text/html,*/*"}
    async with hand_world(tmp_path) as w, service(w) as s, w.http() as http:
        opened = await http.get(f"{s.port}/x?a=1&authToken={APP_KEY}", headers=page)
        assert (opened.status_code, s.seen) == (307, [])
        address = opened.headers["location"]
        assert APP_KEY not in str(opened.headers)
        assert address.startswith(f"{w.path}/proxy-http/{s.port}/x?a=1&authToken=page-")
        shown = await http.get(w.r.api_url + address, headers=page)
        assert (shown.status_code, s.seen[-1]["query"]) == (404, "a=1")
        ticket = address.rpartition("=")[2]
        async with httpx.AsyncClient(base_url=w.r.api_url) as bare:  # the ticket opens nothing else
            for other in (f"{w.path}/state", f"/activity-api/v1/activity/{'2' * 32}/proxy-http/{s.port}/x", "/me"):
                assert (await bare.get(f"{other}?authToken={ticket}")).status_code == 401
        assert await rejected(shell_url(w, key=ticket)) == (401, '{"message": "Invalid application key"}')
        older = {"Authorization": "", "Accept": "text/html"}
        assert (await http.get(f"{s.port}/x?authToken={APP_KEY}", headers=older)).status_code == 307
        assert (await http.get(f"{s.port}/away", headers={"Sec-Fetch-Site": "none"})).headers.get("set-cookie") is None


@trio_test
async def test_a_client_with_the_key_is_led_to_no_other_machine(tmp_path: Path) -> None:
    async with hand_world(tmp_path) as w, service(w) as s, w.http() as http:
        answer = await http.get(f"{s.port}/elsewhere")
        assert (answer.status_code, answer.headers.get("location")) == (302, None)
        assert answer.headers["x-golem-location"] == "http://example.com/x"
        in_url = await http.get(f"{s.port}/elsewhere?authToken={APP_KEY}", headers={"Authorization": ""})
        assert (in_url.status_code, in_url.headers.get("location")) == (302, "http://example.com/x"), "it takes no key along"


@trio_test
async def test_a_redirection_cannot_use_the_key_against_the_node(tmp_path: Path) -> None:
    async with hand_world(tmp_path) as w, service(w) as s, w.http(follow_redirects=True) as http:
        answer = await http.post(f"{s.port}/away", json={"totalAmount": "1"})
        assert (answer.status_code, answer.text) == (404, "nothing here")
        assert s.seen[-1]["path"] == "/payment-api/v1/allocations"


@trio_test
async def test_events_come_as_they_happen_and_a_client_that_leaves_is_noticed(tmp_path: Path) -> None:
    async with hand_world(tmp_path) as w, service(w) as s, w.http() as http:
        with within(15):
            async with http.stream("GET", f"{s.port}/events") as answer:
                assert answer.headers["content-type"] == "text/event-stream"
                chunks = answer.aiter_raw()
                assert await anext(chunks) == b"data: one\n\n"
                s.go_on.set()
                assert await anext(chunks) == b"data: two\n\n"
            await http.aclose()
            await s.left.wait()
            assert w.unit is not None
            await w.until(lambda: not w.unit.interactions._open)


@trio_test
async def test_a_service_that_does_not_read_holds_the_sender_and_not_memory(tmp_path: Path) -> None:
    async with hand_world(tmp_path) as w:
        held: list[trio.SocketStream] = []

        async def hold(stream: trio.SocketStream) -> None:
            held.append(stream)
            await trio.sleep_forever()

        listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
        w.nursery.start_soon(trio.serve_listeners, hold, [listener])
        port = listener.socket.getsockname()[1]
        api = int(w.r.api_url.rpartition(":")[2])
        stream = await trio.open_tcp_stream("127.0.0.1", api)
        head = f"POST {w.path}/proxy-http/{port}/ HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {APP_KEY}\r\n"
        await stream.send_all(f"{head}Content-Length: {1 << 30}\r\n\r\n".encode())
        sent = 0
        while True:
            with trio.move_on_after(0.7) as patience:
                await stream.send_all(bytes(1 << 20))
                sent += 1 << 20
            if patience.cancelled_caught:
                break
        assert held
        assert sent < 64 << 20
        await stream.aclose()


@trio_test
async def test_services_that_fail_are_502_with_a_reason(tmp_path: Path) -> None:
    async with hand_world(tmp_path) as w, w.http() as http:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            dead = unused.getsockname()[1]
            answer = await http.get(f"{dead}/")
        assert answer.status_code == 502
        assert f"port {dead} of the activity: " in answer.json()["message"]
        for said, text in (
            (b"SSH-2.0-OpenSSH\r\n\r\n", "is not HTTP"), (b"", "without an answer"),
            (b"HTTP/1.1 200 OK\r\n", "without an answer"), (b"HTTP/1.1 200 OK\r\nA: " + b"x" * 200_000, "is not HTTP"),
        ):  # fmt: skip
            listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]

            async def serve(stream: trio.SocketStream, said: bytes = said) -> None:
                await stream.receive_some()
                await stream.send_all(said)
                await stream.aclose()

            w.nursery.start_soon(trio.serve_listeners, serve, [listener])
            answer = await http.get(f"{listener.socket.getsockname()[1]}/")
            assert (answer.status_code, text in answer.json()["message"]) == (502, True), answer.text
        for url in ("http://10.0.0.1/x", "https://localhost/x"):
            answer = await http.get(f"{w.base}/proxy-http/{url}")
            assert answer.status_code == 400
        assert (await http.get("0/x")).status_code == 400


@trio_test
async def test_an_answer_that_breaks_off_does_not_look_whole(tmp_path: Path) -> None:
    async with hand_world(tmp_path) as w:
        listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]

        async def serve(stream: trio.SocketStream) -> None:
            await stream.receive_some()
            await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
            await stream.aclose()

        w.nursery.start_soon(trio.serve_listeners, serve, [listener])
        raw = await trio_get(f"{w.base}/proxy-http/{listener.socket.getsockname()[1]}/?authToken={APP_KEY}")
        assert b"hello" in raw
        assert not raw.endswith(b"0\r\n\r\n")


@trio_test
async def test_a_page_of_an_origin_that_may(tmp_path: Path) -> None:
    async with hand_world(tmp_path) as w, service(w) as s, w.http() as http:
        key = w.r.app_keys.create("page", w.r.node_id, allow_origins=("http://page",)).key
        asked = {"Origin": "http://page", "Access-Control-Request-Method": "PUT", "Authorization": ""}
        answer = await http.options(f"{s.port}/x", headers=asked)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "http://page")
        assert (await http.options(f"{s.port}/x", headers={**asked, "Origin": "http://other"})).status_code == 401
        assert not s.seen
        for where, status in ((f"{s.port}/x", 404), ("1/x", 502)):  # also errors can be read
            answer = await http.get(where, headers={"Origin": "http://page", "Authorization": f"Bearer {key}"})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, "http://page")
        answer = await http.get(f"{s.port}/x", headers={"Origin": "http://other"})
        assert "access-control-allow-origin" not in answer.headers


@trio_test
async def test_a_body_that_waits_to_be_asked_for(tmp_path: Path) -> None:
    async with hand_world(tmp_path) as w, service(w) as s:
        stream = await trio.open_tcp_stream("127.0.0.1", int(w.r.api_url.rpartition(":")[2]))
        async with stream:
            head = f"POST {w.path}/proxy-http/{s.port}/hash HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {APP_KEY}\r\n"
            await stream.send_all(f"{head}Content-Length: 3\r\nExpect: 100-continue\r\n\r\n".encode())
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 100")
            await stream.send_all(b"abc")
            seen = b""
            while hashlib.sha256(b"abc").hexdigest().encode() not in seen:
                data = await stream.receive_some()
                assert data
                seen += data


@trio_test
async def test_who_is_answered_before_all_is_said_is_not_kept(tmp_path: Path) -> None:
    async with hand_world(tmp_path) as w:
        listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]

        async def refuse(stream: trio.SocketStream) -> None:
            await stream.receive_some()
            await stream.send_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nno!")
            await trio.sleep_forever()  # and reads no more of it

        w.nursery.start_soon(trio.serve_listeners, refuse, [listener])
        port = listener.socket.getsockname()[1]
        for where, key, status in ((f"{port}/", APP_KEY, b"413"), (f"{port}/", "f" * 32, b"401"), ("1/", APP_KEY, b"502")):
            stream = await trio.open_tcp_stream("127.0.0.1", int(w.r.api_url.rpartition(":")[2]))
            head = f"POST {w.path}/proxy-http/{where} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
            await stream.send_all(f"{head}Content-Length: {1 << 30}\r\n\r\n".encode())
            seen = bytearray()

            async def flood(stream: trio.SocketStream = stream) -> None:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    while True:
                        await stream.send_all(bytes(1 << 20))

            with within(15), suppress(trio.BrokenResourceError):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(flood)
                    async for data in stream:
                        seen += data
                    nursery.cancel_scope.cancel()
            assert seen.startswith(b"HTTP/1.1 " + status)
            await stream.aclose()
            assert w.unit is not None
            await w.until(lambda: not w.unit.interactions._open)


def shell_url(world: HandWorld, node: Node | None = None, key: str | None = APP_KEY, activity: str = "", **query: Any) -> str:
    base = (node or world.r).api_url.replace("http", "ws", 1)
    query = {**query, **({"authToken": key} if key else {})}
    return f"{base}/activity-api/v1/activity/{activity or world.activity_id}/shell?{urlencode(query, doseq=True)}"


@trio_test
async def test_a_shell_over_a_websocket(tmp_path: Path) -> None:
    async with hand_world(tmp_path) as w:
        with within(15):
            async with open_websocket_url(shell_url(w, rows=31, cols=71)) as ws:
                await ws.send_message(b"stty size\n")
                seen = b""
                while b"31 71" not in seen:
                    if isinstance(message := await ws.get_message(), bytes):
                        seen += message
                await ws.send_message(json.dumps({"resize": [41, 91]}))
                await ws.send_message(b"stty size; exit 3\n")
                while not isinstance(message, str) or "exit" not in json.loads(message):
                    message = await ws.get_message()
                    seen += message if isinstance(message, bytes) else b""
                assert b"41 91" in seen
                assert json.loads(message) == {"exit": 3, "reason": None}
                with pytest.raises(ConnectionClosed) as closed:
                    await ws.get_message()
                assert closed.value.reason.code == 1000
            async with open_websocket_url(shell_url(w, tty=0, cmd=["sh", "-c", "cat; echo $A >&2"], env="A=b=c")) as ws:
                await ws.send_message(b"in")
                await ws.send_message('{"end": true}')
                found = {b"\1": b"", b"\2": b""}
                while not isinstance(message := await ws.get_message(), str) or "taken" in message:
                    if isinstance(message, bytes):
                        found[message[:1]] += message[1:]
                assert (json.loads(message)["exit"], found) == (0, {b"\1": b"in", b"\2": b"b=c\n"})


@trio_test
async def test_closing_the_websocket_kills_and_nonsense_ends_it(tmp_path: Path) -> None:
    async with hand_world(tmp_path) as w:
        with within(15):
            async with open_websocket_url(shell_url(w, cmd=["sleep", "1000"])):
                await w.until(lambda: w.runtime.terminals)
            await w.runtime.terminals[0].process.wait()
            for nonsense in ("[", '{"dance": 1}', '{"resize": [0, 0]}'):
                async with open_websocket_url(shell_url(w, cmd=["sleep", "1000"])) as ws:
                    await ws.send_message(nonsense)
                    assert json.loads(await ws.get_message())["code"] == "bad_request"
                    with pytest.raises(ConnectionClosed):
                        await ws.get_message()
            async with open_websocket_url(shell_url(w, cmd=["sleep", "1000"])) as ws:
                w.nursery.start_soon(w.destroy)
                said = json.loads(await ws.get_message())
                assert said == {"error": "the activity has ended: destroyed", "code": "gone"}
            assert all(terminal.process.returncode is not None for terminal in w.runtime.terminals)
            assert (await rejected(shell_url(w)))[0] == 410
            async with w.http() as http:
                assert (await http.get("80/")).status_code == 410


async def rejected(url: str) -> tuple[int, str]:
    with pytest.raises(ConnectionRejected) as caught:
        async with open_websocket_url(url):
            pass
    return caught.value.status_code, (caught.value.body or b"").decode()


@trio_test
async def test_who_may_not(tmp_path: Path) -> None:
    async with hand_world(tmp_path, start=False) as w:
        assert (await rejected(shell_url(w)))[0] == 409  # not started
        await w.start()
        assert (await rejected(shell_url(w, key=None)))[0] == 401
        assert (await rejected(shell_url(w, key="f" * 32)))[0] == 401
        foreign = AppKey("old", "e" * 32, STRANGER, "manager", "2024-01-01T00:00:00Z")
        w.r.app_keys._by_key[foreign.key] = foreign
        status, text = await rejected(shell_url(w, key=foreign.key))
        assert (status, "acts for" in text) == (403, True)
        status, text = await rejected(shell_url(w, node=w.p))  # the provider has no hand in it
        assert (status, "only the requestor" in text) == (403, True)
        assert (await rejected(shell_url(w, activity="2" * 32)))[0] == 500
        for query in ({"tty": "maybe"}, {"rows": "x"}, {"rows": 0}, {"cols": 70000}, {"env": "A"}):
            assert (await rejected(shell_url(w, **query)))[0] == 400
        assert (await rejected(shell_url(w, cmd="/none/such")))[0] == 502
        for key, status in ((None, 401), ("f" * 32, 401), (foreign.key, 403)):
            async with w.http() as http:
                headers = {"Authorization": f"Bearer {key}"} if key else {"Authorization": ""}
                assert (await http.get("80/", headers=headers)).status_code == status
        raw = await trio_get(f"{w.p.api_url}{w.path}/proxy-http/80/?authToken={APP_KEY}")
        assert raw.startswith(b"HTTP/1.1 403")
        raw = await trio_get(f"{w.r.api_url}/activity-api/v1/activity/{'2' * 32}/proxy-http/80/?authToken={APP_KEY}")
        assert raw.startswith(b"HTTP/1.1 500")
        assert b"DAO error" in raw


@trio_test
async def test_a_provider_that_has_switched_it_off(tmp_path: Path) -> None:
    async with hand_world(tmp_path, interaction="") as w:
        assert await rejected(shell_url(w)) == (403, '{"message": "the provider does not allow shells"}')
        async with w.http() as http:
            answer = await http.get("80/")
            assert (answer.status_code, "does not allow connections" in answer.text) == (403, True)
    other = tmp_path / "other"
    other.mkdir()
    async with hand_world(other, has=()) as w:
        assert await rejected(shell_url(w)) == (501, '{"message": "runtime host has no shell"}')


@trio_test
async def test_websockets_through_the_proxy(tmp_path: Path) -> None:
    async with hand_world(tmp_path) as w, service(w) as s:
        base = f"{w.base.replace('http', 'ws', 1)}/proxy-http/{s.port}"
        with within(15):
            async with open_websocket_url(f"{base}/chat?q=1&authToken={APP_KEY}", subprotocols=["one", "two"]) as ws:
                assert ws.subprotocol == "one"
                for message in ("text", b"bytes", "x" * 100_000):
                    await ws.send_message(message)
                    assert await ws.get_message() == message
                await ws.send_message("bye")
                with pytest.raises(ConnectionClosed) as closed:
                    await ws.get_message()
                assert (closed.value.reason.code, closed.value.reason.reason) == (4001, "as you wish")
            assert (s.seen[0]["path"], s.seen[0]["query"]) == ("/chat", "q=1")
            assert APP_KEY not in json.dumps(s.seen)
            async with open_websocket_url(f"{base}/chat?authToken={APP_KEY}"):
                pass
            await s.left.wait()
            assert (await rejected(f"{base}/closed?authToken={APP_KEY}"))[0] == 403
            assert (await rejected(f"{base}/chat"))[0] == 401


@trio_test
async def test_a_requestor_that_never_hangs_up_is_not_waited_for(tmp_path: Path) -> None:
    async with hand_world(tmp_path) as w:
        row = w.r.activity(w.activity_id)
        assert row is not None
        before = trio.lowlevel.current_statistics().tasks_living
        held = [await w.r.interactions.open_terminal(row, OpenTerminal(["true"])) for _ in range(20)]
        with within(15):
            while trio.lowlevel.current_statistics().tasks_living >= before + len(held):
                await trio.sleep(0.1)
        for terminal in held:
            await terminal.aclose()
