"""`/gsb-api/v1`: files that an agent serves over a real websocket of a real node, to a reader on another node."""

from __future__ import annotations

import base64
import hashlib
import math
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
import trio_websocket
from files.test_gftp import fetch, send
from flatbuffers.flexbuffers import Dumps
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection
from worlds.node_in_test import APP_KEY, HEADERS, node_in_test
from worlds.patience import patience, within
from worlds.support import mock_trio_test, trio_test

from golem.daemon import serve_rest
from golem.files import agents as gsb
from golem.files.agents import ANSWER_TIMEOUT_S, CHUNK_BYTES, IN_FLIGHT, AgentUpload, Conversation, Download
from golem.files.client import GftpPeer
from golem.files.flexbuffers import decode, encode
from golem.node.node import Node
from protocol.gftp import FileFault

READ, TAKE = ["GetMetadata", "GetChunk"], ["UploadChunk", "UploadFinished"]
PROTOCOL = "gsb+flexbuffers"


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


class Agent:
    """An application in front of a node: REST and websockets."""

    def __init__(self, node: Node, client: httpx.AsyncClient) -> None:
        self.node, self.client = node, client

    async def post(self, on: Any, components: Any) -> httpx.Response:
        return await self.client.post("/gsb-api/v1/services", json={"listen": {"on": on, "components": components}})

    async def open(self, name: str, components: list[str]) -> str:
        response = await self.post(f"/public/gftp/{name}", components)
        assert response.status_code == 201, response.text
        return str(response.json()["servicesId"])

    @asynccontextmanager
    async def connect(self, service_id: str, key: str = APP_KEY, **options: Any) -> AsyncIterator[WebSocketConnection]:
        url = f"{self.node.api_url.replace('http', 'ws', 1)}/gsb-api/v1/services/{service_id}?authToken={key}"
        async with trio_websocket.open_websocket_url(url, **({"subprotocols": [PROTOCOL]} | options)) as socket:
            yield socket

    async def raw(self) -> trio.SocketStream:
        """Return a connection without any protocol."""
        host, port = self.node.api_url.removeprefix("http://").split(":")
        return await trio.open_tcp_stream(host, int(port))

    def handshake(self, service_id: str) -> bytes:
        return (
            f"GET /gsb-api/v1/services/{service_id}?authToken={APP_KEY} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
            f"Upgrade: websocket\r\nSec-WebSocket-Key: {base64.b64encode(bytes(16)).decode()}\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n"
        ).encode()

    @asynccontextmanager
    async def serve(self, service_id: str, answer: Callable[[str, Any], Any]) -> AsyncIterator[WebSocketConnection]:
        """Answer every question with the payload (or the error, where it is an exception) that `answer` returns."""

        async def run() -> None:
            try:
                while True:
                    question = decode(await socket.get_message())
                    payload = answer(question["component"], question["payload"])
                    reply = {"error": payload.args[0]} if isinstance(payload, ValueError) else {"payload": payload}
                    await socket.send_message(encode({"id": question["id"], **reply}))
            except ConnectionClosed:
                pass

        async with self.connect(service_id) as socket, trio.open_nursery() as nursery:
            nursery.start_soon(run)
            yield socket
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def agent_in_test(folder: Path, **flags: Any) -> AsyncIterator[Agent]:
    """A node that serves REST as in earnest, and its agent."""
    async with node_in_test(folder, **flags) as node, trio.open_nursery() as nursery:
        sock = socket.create_server(("127.0.0.1", 0))
        await nursery.start(serve_rest, node, sock)
        async with httpx.AsyncClient(base_url=node.api_url, headers=HEADERS, timeout=patience(20)) as client:
            yield Agent(node, client)
        node.stopping.set()


def answer_from(data: bytes) -> Callable[[str, Any], Any]:
    """Return what an honest agent answers for a published text."""

    def answer(component: str, payload: Any) -> Any:
        if component == "GetMetadata":
            assert payload is None
            return {"fileSize": len(data)}
        assert 0 < payload["size"] <= CHUNK_BYTES
        return {"offset": payload["offset"], "content": data[payload["offset"] :][: payload["size"]]}

    return answer


def source(agent: Agent, name: str) -> Any:
    """Return what the node has published under a name."""
    return agent.node.files._source(name)


async def read_all(download: Any) -> bytes:
    return bytes(await download.read(0, await download.size()))


@trio_test
async def test_services_are_opened_and_closed(tmp_path: Path) -> None:
    async with agent_in_test(tmp_path) as agent:
        on = "/public/gftp/3f2c1d70-9f3a-4f5e-8c1d-0123456789ab"
        response = await agent.post(on, READ)
        service_id = base64.urlsafe_b64encode(on.encode()).decode().rstrip("=")
        assert response.status_code == 201
        assert response.json() == {"listen": {"on": on, "components": READ}, "servicesId": service_id}
        assert response.headers["Location"] == f"/{service_id}"
        assert "3f2c1d70-9f3a-4f5e-8c1d-0123456789ab" in agent.node.files.published()
        for bad_on, components in (
            (on, READ), (on + "2", []), (on + "2", ["GetChunk"]), (on + "2", ["GetMetadata", "UploadChunk"]), (on + "2", [1, 2]),
            ("/public/market", READ), ("/public/gftp/", READ), ("/public/gftp/a/b", READ), ("x" * 2000, READ), (1, READ),
            (on + "2", "GetChunk"), (on + "2", None),
        ):  # fmt: skip
            refused = await agent.post(bad_on, components)
            assert refused.status_code == 400, (bad_on, components)
            assert refused.json()["message"]
        assert (await agent.client.post("/gsb-api/v1/services", json={})).status_code == 400
        path = f"/gsb-api/v1/services/{service_id}"
        other = agent.node.app_keys.create("other", agent.node.node_id).key
        assert (await agent.client.delete(path, headers={"Authorization": f"Bearer {other}"})).status_code == 404
        done = await agent.client.delete(path)
        assert (done.status_code, done.text, done.headers["content-type"]) == (200, "null", "application/json")
        assert (await agent.client.delete(path)).status_code == 404
        assert agent.node.files.published() == []


@trio_test
async def test_who_may_connect(tmp_path: Path) -> None:
    async with agent_in_test(tmp_path) as agent:
        service_id = await agent.open("x", READ)
        other = agent.node.app_keys.create("other", agent.node.node_id).key
        bad = [(service_id, "wrong", 401), (service_id, "", 401), (service_id, other, 404), ("eA", APP_KEY, 404)]
        for name, key, status in bad:
            with pytest.raises(ConnectionRejected) as caught:
                async with agent.connect(name, key):
                    pass
            assert caught.value.status_code == status
        with pytest.raises(ConnectionRejected) as caught:
            async with agent.connect(service_id, subprotocols=["gsb+json"]):
                pass
        assert caught.value.status_code == 400
        async with agent.connect(service_id) as socket:
            assert socket.subprotocol == PROTOCOL
        async with agent.connect(service_id, "", extra_headers=[("Authorization", f"Bearer {APP_KEY}")]) as socket:
            assert socket.subprotocol == PROTOCOL
        async with agent.connect(service_id, subprotocols=[]) as socket:
            assert socket.subprotocol is None
        offer = [("Sec-WebSocket-Extensions", "permessage-deflate; client_max_window_bits")]
        async with agent.connect(service_id, extra_headers=offer) as socket:
            assert "sec-websocket-extensions" not in dict(socket.handshake_headers), "no compression"


@trio_test
async def test_a_download_asks_for_several_chunks_at_once_and_puts_them_in_order(tmp_path: Path) -> None:
    data = content(3_000_000)
    async with agent_in_test(tmp_path) as agent:
        service_id = await agent.open("x", READ)
        got: list[bytes] = []
        together = 0

        async def read() -> None:
            got.append(await read_all(source(agent, "x")))
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            async with agent.connect(service_id) as socket:  # it has been asked before
                honest = answer_from(data)
                while True:
                    batch = [decode(await socket.get_message())]
                    with trio.move_on_after(patience(0.05)):  # all that comes without an answer
                        while len(batch) < IN_FLIGHT:
                            batch.append(decode(await socket.get_message()))
                    with trio.move_on_after(0.02):  # and no more
                        batch.append(decode(await socket.get_message()))
                    together = max(together, len(batch))
                    for question in reversed(batch):
                        payload = honest(question["component"], question["payload"])
                        await socket.send_message(encode({"id": question["id"], "payload": payload}))
        assert got == [data]
        assert together == IN_FLIGHT


@trio_test
async def test_an_upload_goes_chunk_by_chunk(tmp_path: Path) -> None:
    data = content(1_000_000)
    async with agent_in_test(tmp_path) as agent:
        service_id = await agent.open("x", TAKE)
        sink = agent.node.files._find("x")
        taken, finished = bytearray(), []

        async def take(socket: WebSocketConnection) -> None:
            while not finished:
                question = decode(await socket.get_message())
                with trio.move_on_after(0.03):
                    raise AssertionError(f"asked before the answer: {decode(await socket.get_message())['component']}")
                if question["component"] == "UploadFinished":
                    finished.append(question["payload"])
                else:
                    chunk = question["payload"]["chunk"]
                    assert chunk["offset"] == len(taken)
                    taken.extend(chunk["content"])
                await socket.send_message(encode({"id": question["id"], "payload": None}))

        async with agent.connect(service_id) as socket, trio.open_nursery() as nursery:
            nursery.start_soon(take, socket)
            await upload(sink, data, 700_000)
        assert bytes(taken) == data
        assert finished == [{"hash": hashlib.sha3_256(data).hexdigest()}]


async def upload(sink: Any, data: bytes, piece: int) -> None:
    await sink.begin()
    for offset in range(0, len(data), piece):
        await sink.write(offset, data[offset : offset + piece])
    await sink.finish(hashlib.sha3_256(data).hexdigest())


@trio_test
async def test_another_node_reads_and_writes(tmp_path: Path) -> None:
    """Over libp2p, as an exe-unit does it."""
    data = content(2_500_000)
    (tmp_path / "far").mkdir()
    async with agent_in_test(tmp_path) as agent, node_in_test(tmp_path / "far") as far:
        with within(30):
            while not (far.network.is_up and agent.node.network.is_up):
                await trio.sleep(0.02)
            await far.network.connect(agent.node.network.addresses[0])
        peer = GftpPeer(far.config.bus_path)
        taken = bytearray()

        def take(component: str, payload: Any) -> None:
            if component == "UploadChunk":
                taken.extend(payload["chunk"]["content"])
            elif payload["hash"] != hashlib.sha3_256(taken).hexdigest():
                raise AssertionError("another hash")

        url = f"gftp://{agent.node.node_id}"
        source_id, slot_id, broken_id = await agent.open("in", READ), await agent.open("out", TAKE), await agent.open("bad", READ)
        with within(30):
            async with agent.serve(source_id, answer_from(data)), agent.serve(slot_id, take):
                assert await fetch(peer, f"{url}/in") == data
                assert await fetch(peer, f"{url}/in", 2_499_990) == data[-10:]
                await send(peer, f"{url}/out", data)
                assert taken == data
                await send(peer, f"{url}/out", data)
                assert taken == data, "a repeated upload is not taken twice"
                with pytest.raises(FileFault, match="cannot be read"):
                    await fetch(peer, f"{url}/out")
                with pytest.raises(FileFault, match="not an upload slot"):
                    await send(peer, f"{url}/in", b"x")
            async with agent.serve(broken_id, lambda *_: ValueError({"ReadError": "the disk is gone"})):
                with pytest.raises(FileFault, match="the disk is gone") as caught:
                    await fetch(peer, f"{url}/bad")
                assert caught.value.variant == "ReadError"
            await agent.client.delete(f"/gsb-api/v1/services/{source_id}")
            with pytest.raises(FileFault, match="no such file"):
                await fetch(peer, f"{url}/in")


@trio_test
async def test_what_an_agent_may_not_answer(tmp_path: Path) -> None:
    honest = answer_from(b"x" * 100)
    cases: list[tuple[Any, Any, str, str]] = [
        ({"fileSize": 100}, {"offset": 0, "content": b"x" * 101}, "InternalError", "101 bytes at 0, 100 were asked for"),
        ({"fileSize": 100}, {"offset": 0, "content": b"x" * 99}, "ReadError", "1 bytes early"),
        ({"fileSize": 100}, {"offset": 1, "content": b"x" * 100}, "InternalError", "nonsense"),
        ({"fileSize": 100}, {"content": b"x" * 100}, "InternalError", "nonsense"),
        ({"fileSize": 100}, {"offset": 0, "content": "x" * 100}, "InternalError", "nonsense"),
        ({"fileSize": 100}, None, "InternalError", "nonsense"),
        ({"fileSize": "100"}, None, "InternalError", "no file size"),
        ({}, None, "InternalError", "no file size"),
        (None, None, "InternalError", "no file size"),
        (ValueError({"ReadError": "the disk is gone"}), None, "ReadError", "the disk is gone"),
        (ValueError({"IntegrityError": None}), None, "IntegrityError", "IntegrityError"),
        (ValueError("WriteError"), None, "WriteError", "WriteError"),
        (ValueError({"Nonsense": "what"}), None, "InternalError", "Nonsense: what"),
    ]
    async with agent_in_test(tmp_path) as agent:
        for number, (metadata, chunk, variant, text) in enumerate(cases):
            service_id = await agent.open(f"x{number}", READ)
            answers = {"GetMetadata": metadata, "GetChunk": chunk}
            async with agent.serve(service_id, lambda component, _, answers=answers: answers[component]) as socket:
                with pytest.raises(FileFault, match=text) as caught:
                    await read_all(source(agent, f"x{number}"))
                assert caught.value.variant == variant
                assert socket.closed is None, "a wrong answer ends the question, not the websocket"
        service_id = await agent.open("good", READ)
        async with agent.serve(service_id, honest):
            assert await read_all(source(agent, "good")) == b"x" * 100


async def closed_with(socket: WebSocketConnection) -> tuple[int, str]:
    with within(5):
        while True:
            try:
                await socket.get_message()
            except ConnectionClosed as closed:
                return closed.reason.code, closed.reason.reason


@trio_test
async def test_how_a_websocket_is_closed(tmp_path: Path) -> None:
    async with agent_in_test(tmp_path) as agent:
        service_id = await agent.open("x", READ)
        dice = random.Random(8)
        bent = [dice.randbytes(dice.randrange(1, 60)) for _ in range(10)]
        for message, code in (
            ("text", 1003), ("", 1003), (b"", 1008), (b"garbage", 1008), (encode("text"), 1008), (encode({"id": "1"}), 1008),
            (encode({"payload": None}), 1008), (encode({"id": 1, "payload": None}), 1008), *((frame, 1008) for frame in bent),
        ):  # fmt: skip
            async with agent.connect(service_id) as socket:
                await socket.send_message(message)
                found, reason = await closed_with(socket)
                assert found == code, (message, reason)
                assert reason
        async with agent.connect(service_id) as socket:
            await socket.send_message(encode({"id": "17", "payload": None}))  # an answer to nothing is let pass
            await socket.send_message(bytes(1 << 20) + b"x")
            assert (await closed_with(socket))[0] == 1009
        async with agent.connect(service_id) as socket:
            assert (await agent.client.delete(f"/gsb-api/v1/services/{service_id}")).status_code == 200
            assert (await closed_with(socket))[0] == 1000


@trio_test
async def test_a_message_too_long_is_not_kept(tmp_path: Path) -> None:
    """An agent that goes on and on after the limit, without a word of its own."""
    async with agent_in_test(tmp_path) as agent:
        service_id = await agent.open("x", READ)
        async with await agent.raw() as stream:
            await stream.send_all(agent.handshake(service_id))
            assert (await stream.receive_some(4096)).startswith(b"HTTP/1.1 101")
            await stream.send_all(b"\x82\xff" + (1 << 40).to_bytes(8, "big") + bytes(4))  # a frame of a tebibyte
            before = rss_bytes()
            for _ in range(200):
                await stream.send_all(bytes(1 << 20))
            with within(5):
                assert (await stream.receive_some(4096))[:4] == b"\x88\x02" + (1009).to_bytes(2, "big")
            assert rss_bytes() - before < 50 << 20
        async with agent.serve(service_id, answer_from(b"as before")):
            assert await read_all(source(agent, "x")) == b"as before"


@trio_test
async def test_bytes_that_are_no_protocol_end_their_connection_and_nothing_else(tmp_path: Path) -> None:
    async with agent_in_test(tmp_path) as agent:
        service_id = await agent.open("x", READ)
        dice = random.Random(271)
        handshake, answered = agent.handshake(service_id), 0
        for number in range(150):
            async with await agent.raw() as stream:
                if number % 3 == 0:  # a bent handshake
                    bent = bytearray(handshake)
                    for _ in range(3):
                        bent[dice.randrange(len(bent))] = dice.randrange(256)
                    await stream.send_all(bent)
                elif number % 3 == 1:  # frames before the handshake has an answer
                    await stream.send_all(handshake + dice.randbytes(20))
                    answered += bool(await stream.receive_some(4096))
                else:
                    await stream.send_all(handshake)
                    assert (await stream.receive_some(4096)).startswith(b"HTTP/1.1 101")
                    await stream.send_all(bytes([dice.randrange(256), dice.randrange(256)]) + dice.randbytes(40))
                    if dice.random() < 0.5:
                        await stream.send_eof()
                with trio.move_on_after(0.02):
                    await stream.receive_some(4096)
        assert answered == 50
        async with agent.serve(service_id, answer_from(b"as before")):
            assert await read_all(source(agent, "x")) == b"as before"


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@trio_test
async def test_a_second_websocket_takes_the_place_of_the_first_and_is_asked_anew(tmp_path: Path) -> None:
    async with agent_in_test(tmp_path) as agent:
        service_id = await agent.open("x", READ)
        got: list[bytes] = []

        async def read() -> None:
            got.append(await read_all(source(agent, "x")))

        async with trio.open_nursery() as nursery, agent.connect(service_id) as first:
            nursery.start_soon(read)
            asked = decode(await first.get_message())
            async with agent.serve(service_id, answer_from(b"from the second")):
                code, reason = await closed_with(first)
                assert (code, "place" in reason) == (1008, True)
                with within(5):
                    while not got:
                        await trio.sleep(0.01)
        assert asked["component"] == "GetMetadata"
        assert got == [b"from the second"]


@trio_test
async def test_a_node_that_stops_says_so_at_once(tmp_path: Path) -> None:
    async with agent_in_test(tmp_path) as agent:
        service_id = await agent.open("x", READ)
        async with agent.connect(service_id) as socket:
            with within(3):
                agent.node.stopping.set()
                assert (await closed_with(socket))[0] == 1001


class Line:
    """A websocket in memory; `asked` are the questions on it."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self._give, self._take = trio.open_memory_channel[bytes | str](math.inf)

    async def send(self, frame: bytes) -> None:
        self.asked.append(decode(frame))

    async def receive(self) -> bytes | str:
        return await self._take.receive()

    def answer(self, payload: Any, number: int = -1) -> None:
        self._give.send_nowait(bytes(Dumps({"id": self.asked[number]["id"], "payload": payload})))

    async def wait(self, count: int) -> Any:
        while len(self.asked) < count:
            await trio.sleep(0.001)
        return self.asked[count - 1]


@mock_trio_test
async def test_a_question_has_a_deadline() -> None:
    conversation, line = Conversation(), Line()
    with pytest.raises(FileFault, match="has not opened its websocket"):
        await conversation.ask("GetMetadata", None)
    assert trio.current_time() == pytest.approx(ANSWER_TIMEOUT_S)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conversation.serve, line)
        with pytest.raises(FileFault, match="does not answer"):
            await conversation.ask("GetMetadata", None)
        line.answer({"fileSize": 1})  # too late, and let pass
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert len(line.asked) == 1, "the question of before had passed away"


@mock_trio_test
async def test_questions_beyond_the_bound_wait() -> None:
    conversation, line = Conversation(), Line()
    failed = []

    async def ask() -> None:
        try:
            await conversation.ask("GetMetadata", None)
        except FileFault:
            failed.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(conversation.serve, line)
        for _ in range(IN_FLIGHT + 5):
            nursery.start_soon(ask)
        await trio.sleep(1)
        assert len(line.asked) == IN_FLIGHT
        line.answer(None)
        await trio.sleep(1)
        assert len(line.asked) == IN_FLIGHT + 1
        await trio.sleep(ANSWER_TIMEOUT_S * 3)
        nursery.cancel_scope.cancel()
    assert len(failed) == IN_FLIGHT + 4


@mock_trio_test
async def test_an_upload_that_is_repeated_leaves_out_what_the_agent_has() -> None:
    data = content(3 * CHUNK_BYTES)
    conversation, line = Conversation(), Line()
    sink = AgentUpload(conversation)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conversation.serve, line)
        with trio.CancelScope() as broken:

            async def break_off() -> None:
                await line.wait(1)
                line.answer(None)
                await line.wait(2)
                broken.cancel()  # the sender's stream breaks while the agent has a chunk before it
                await trio.sleep(5)
                line.answer(None)

            nursery.start_soon(break_off)
            await sink.begin()
            await sink.write(0, data)
        assert broken.cancelled_caught
        assert trio.current_time() >= 5, "what became of the chunk is waited for"

        async def answer_rest() -> None:
            for number in range(3, 7):
                await line.wait(number)
                line.answer(None)

        nursery.start_soon(answer_rest)
        await upload(sink, data, 100_000)
        chunks = [one["payload"]["chunk"] for one in line.asked[:-1]]
        assert [chunk["offset"] for chunk in chunks] == [0, CHUNK_BYTES, 2 * CHUNK_BYTES, 600_000, 700_000]
        assert b"".join(chunk["content"] for chunk in chunks) == data
        assert line.asked[-1]["component"] == "UploadFinished"
        await upload(sink, data, CHUNK_BYTES)  # its end was not heard of: again, without the agent
        for other in (data[:-1], data + b"x", b"y" + data[1:]):
            with pytest.raises(FileFault, match=r"other content|all that it waited for"):
                await upload(sink, other, CHUNK_BYTES)
        assert len(line.asked) == 6
        nursery.cancel_scope.cancel()


@mock_trio_test
async def test_after_a_chunk_without_an_answer_no_upload_is_begun() -> None:
    conversation, line = Conversation(), Line()
    sink = AgentUpload(conversation)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conversation.serve, line)
        with pytest.raises(FileFault, match="does not answer"):
            await upload(sink, b"content", 100)
        with pytest.raises(FileFault, match="is not known"):
            await upload(sink, b"content", 100)
        assert len(line.asked) == 1
        nursery.cancel_scope.cancel()


@mock_trio_test
async def test_a_large_offset_reaches_the_agent_as_a_number() -> None:
    conversation, line = Conversation(), Line()
    download = Download(conversation)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(conversation.serve, line)

        async def answer() -> None:
            await line.wait(1)
            line.answer({"fileSize": 5 << 40})
            asked = await line.wait(2)
            line.answer({"offset": int(asked["payload"]["offset"]), "content": b"end"})

        nursery.start_soon(answer)
        assert await download.read((5 << 40) - 3, 1000) == b"end"
        assert line.asked[1]["payload"] == {"offset": float((5 << 40) - 3), "size": 3}
        nursery.cancel_scope.cancel()


@trio_test
async def test_services_of_agents_that_are_gone_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gsb, "SWEEP_S", 0.02)
    monkeypatch.setattr(gsb, "ABANDONED_S", 0.3)
    async with agent_in_test(tmp_path) as agent:
        stays, goes = await agent.open("stays", READ), await agent.open("goes", READ)
        async with agent.serve(stays, answer_from(b"here")):
            async with agent.connect(goes):
                pass
            with within(5):
                while "goes" in agent.node.files.published():
                    await trio.sleep(0.01)
            await trio.sleep(0.4)
            assert await read_all(source(agent, "stays")) == b"here"
        assert await agent.open("goes", READ) == goes
