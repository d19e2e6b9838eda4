"""The bus: a Unix socket in the data directory, by which exe-units, `gftp` and the command line reach their node.

File permission (0600) is its authentication. Frames are MessagePack arrays. A connection begins with `["hello", 1, name,
role]` and then carries requests in both directions, answered in any order:

    ["mail", id, batch]                 a batch of kernel envelopes; the reply is the acknowledgement
    ["call", id, node, target, payload] a live call; node is whom to ask (from a client) or who asks (from the node)
    ["reply", id, bytes]  ["error", id, code, text]      code: down | refused

or with `["stream", 1, node, name]`; after `["welcome", node id]` such a connection is a plain byte stream to a stream
handler of that node. Neighbours: `golem/bus/router.py` decides where mail, calls and streams go; `BusClient` is the other end.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import stat
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio

from actors.kernel.machine import LinkDown
from golem.base.printing import sayable
from golem.bus.wire import (
    MAX_BUS_FRAME_BYTES,
    UNIT_STREAMS,
    VERSION,
    BusError,
    Connection,
    first_frame,
    frame_of,
    short_path,
)
from golem.net.types import RemoteError, Unreachable
from protocol.codec import Framer
from protocol.exeunit import EXEUNIT
from protocol.types import Violation

log = logging.getLogger("golem.bus")

MAX_CLIENTS = 1024
_NAME = re.compile(r"[A-Za-z0-9:_.\-]{1,120}\Z")


def _listen(path: Path) -> trio.SocketListener:
    """Bind the socket, for this user alone. A socket that a dead node left behind is replaced."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise BusError(f"{path} is in the way: not a socket")
        path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        with short_path(path) as name:
            sock.bind(name)
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise BusError(f"cannot listen at {path}: {error.strerror or error}") from None
    finally:
        os.umask(mask)
    sock.setblocking(False)
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


class BusPeer:
    """A client as the node sees it: its `name` (`exeunit:<id>`, `gftp:<random>`), `role`, and calls to it."""

    def __init__(self, name: str, role: str, connection: Connection) -> None:
        self.name, self.role, self.connection = name, role, connection

    @property
    def gone(self) -> trio.Event:
        """Set when the connection has ended."""
        return self.connection.closed


class Bus:
    """The node's side. Whoever wires it sets `on_mail`, `on_call` and `on_stream`; see `golem/bus/router.py`."""

    def __init__(self, path: Path, node_id: str, units_path: Path | None = None) -> None:
        """`units_path`: a second socket, for exe-units: they name themselves so, and reach `UNIT_STREAMS` alone."""
        self._path, self._node_id, self._units_path = path, node_id, units_path
        self._peers: dict[str, BusPeer] = {}
        self._connections = 0
        self.on_mail: Callable[[BusPeer, bytes], Awaitable[bytes]] = not_ready
        self.on_call: Callable[[BusPeer, str, str, bytes], Awaitable[bytes]] = not_ready
        self.on_stream: Callable[[str, str], Awaitable[Any]] = not_ready
        self.on_leave: list[Callable[[BusPeer], None]] = []  # called when a client's connection has ended

    def peers(self) -> list[BusPeer]:
        """Return the clients that are connected."""
        return list(self._peers.values())

    async def mail(self, name: str, frame: bytes) -> bytes:
        """Give a batch of envelopes to a client; returns its acknowledgement. Raises `LinkDown`."""
        peer = self._peers.get(name)
        if peer is None:
            raise LinkDown("endpoint address not found")
        try:
            return await peer.connection.request("mail", frame)
        except (Unreachable, RemoteError) as error:
            raise LinkDown(str(error)) from None

    async def call(self, name: str, sender: str, target: str, payload: bytes, timeout_s: float = 10) -> bytes:
        """Ask a client on behalf of node `sender`. Raises `Unreachable`, `RemoteError`."""
        peer = self._peers.get(name)
        if peer is None:
            raise Unreachable("endpoint address not found")
        return await peer.connection.request("call", sender, target, payload, timeout_s=timeout_s)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. Raises `BusError` if the socket cannot be had."""
        async with AsyncExitStack() as stack:
            listeners = []
            for path, narrow in ((self._path, False), (self._units_path, True)):
                if path is not None:
                    listeners.append((await stack.enter_async_context(_listen(path)), narrow))
                    stack.callback(path.unlink, missing_ok=True)
            async with trio.open_nursery() as nursery:
                for listener, narrow in listeners:
                    nursery.start_soon(trio.serve_listeners, partial(self._serve, narrow), [listener])
                task_status.started()

    async def _serve(self, narrow: bool, stream: trio.SocketStream) -> None:
        if self._connections >= MAX_CLIENTS:
            await trio.aclose_forcefully(stream)
            return
        self._connections += 1
        framer = Framer(MAX_BUS_FRAME_BYTES)
        try:
            async with stream:
                match await first_frame(stream, framer):
                    case ["hello", 1, str() as name, str()] if narrow and not name.startswith(EXEUNIT):
                        await stream.send_all(frame_of("refused", "this socket is for exe-units"))
                    case ["stream", 1, str(), str() as name] if narrow and name not in UNIT_STREAMS:
                        await stream.send_all(frame_of("refused", "this socket is for exe-units"))
                    case ["hello", 1, str() as name, str() as role] if _NAME.match(name):
                        await self._serve_client(stream, framer, name, role)
                    case ["stream", 1, str() as node, str() as name]:
                        await self._serve_stream(stream, node, name)
                    case _:
                        await stream.send_all(frame_of("refused", f"expected a hello of version {VERSION}"))
        except (Violation, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            log.debug("bus connection: %s", error)
        finally:
            self._connections -= 1

    async def _serve_client(self, stream: trio.SocketStream, framer: Framer, name: str, role: str) -> None:
        async def answer(kind: str, args: list[Any]) -> bytes:
            match kind, args:
                case "mail", [bytes() as frame]:
                    return await self.on_mail(peer, frame)
                case "call", [str() as node, str() as target, bytes() as payload]:
                    return await self.on_call(peer, node, target, payload)
            raise Violation("malformed bus request")

        peer = BusPeer(name, role[:40], Connection(stream, framer, answer))
        if (former := self._peers.get(name)) is not None:
            former.connection.close()  # the client came back before its old connection was seen to be dead
        self._peers[name] = peer
        try:
            await stream.send_all(frame_of("welcome", self._node_id))
            await peer.connection.run()
        finally:
            if self._peers.get(name) is peer:
                del self._peers[name]
            for callback in self.on_leave:
                callback(peer)

    async def _serve_stream(self, stream: trio.SocketStream, node: str, name: str) -> None:
        try:
            serve = await self.on_stream(node, name)
        except (Unreachable, RemoteError) as error:
            await stream.send_all(frame_of("refused", sayable(error, 2000)))
            return
        try:
            await serve(stream)
        except Unreachable as error:
            log.debug("stream %s of %s: %s", name, node, error)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise
        except Exception:
            # a bug in a stream handler of ours ends its stream, not the bus
            log.exception("stream %s failed", name)


async def not_ready(*_: Any) -> Any:
    """What answers before the node does. Raises `Unreachable`."""
    raise Unreachable("the node is not ready")
