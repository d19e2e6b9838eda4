"""Nodes' buses and routers in one process, joined by a network that is a dictionary."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from golem.bus.router import Router
from golem.bus.server import Bus
from golem.net.types import NetRefusal, RemoteError, Unreachable
from protocol.codec import Ack, encode_ack

A, B = "0x" + "a" * 40, "0x" + "b" * 40


class Wire:
    """Two or more nodes in one process: requests and streams as `golem.net.Network` offers them."""

    def __init__(self, node: str, world: dict[str, Wire], nursery: trio.Nursery) -> None:
        self.node, self.world, self.nursery = node, world, nursery
        self.services: dict[str, Callable[[str, bytes], Awaitable[bytes]]] = {}
        self.streams: dict[str, Callable[[str, Any], Awaitable[None]]] = {}
        world[node] = self

    def serve(self, service: str, handler: Callable[[str, bytes], Awaitable[bytes]]) -> None:
        self.services[service] = handler

    async def request(self, node_id: str, service: str, payload: bytes, timeout_s: float = 10) -> bytes:
        if node_id not in self.world:
            raise Unreachable("no route")
        try:
            return await self.world[node_id].services[service](self.node, payload)
        except NetRefusal as refusal:
            raise RemoteError(str(refusal)) from None

    def serve_stream(self, name: str, handler: Callable[[str, Any], Awaitable[None]]) -> None:
        self.streams[name] = handler

    async def open_stream(self, node_id: str, name: str, timeout_s: float = 10) -> Any:
        if node_id not in self.world or name not in self.world[node_id].streams:
            raise RemoteError("unknown stream")
        left, right = socket.socketpair()
        ends = [trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in (left, right)]

        async def serve() -> None:
            async with ends[1]:
                await self.world[node_id].streams[name](self.node, ends[1])

        self.nursery.start_soon(serve)
        return ends[0]


class Node:
    def __init__(self, node: str, path: Path, wire: Wire) -> None:
        self.bus = Bus(path, node)
        self.router = Router(node, wire, self.bus)
        self.delivered: list[tuple[bytes, str]] = []
        self.router.attach(self._deliver)

    async def _deliver(self, frame: bytes, peer: str) -> bytes:
        self.delivered.append((frame, peer))
        return encode_ack(Ack(1))


@asynccontextmanager
async def two_nodes(tmp_path: Path) -> AsyncIterator[tuple[Node, Node, trio.Nursery]]:
    async with trio.open_nursery() as nursery:
        world: dict[str, Wire] = {}
        nodes = [Node(node, tmp_path / f"{node[2]}.sock", Wire(node, world, nursery)) for node in (A, B)]
        for node in nodes:
            await nursery.start(node.bus.run)
        yield nodes[0], nodes[1], nursery
        nursery.cancel_scope.cancel()
