"""The bus as processes of this machine use it: exe-units, `gftp`, the command line."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from actors.kernel.machine import LinkDown
from golem.bus.server import not_ready
from golem.bus.wire import MAX_BUS_FRAME_BYTES, VERSION, BusError, Connection, connect, first_frame, frame_of
from golem.net.types import RemoteError, Unreachable
from protocol.codec import Framer
from protocol.types import Violation

log = logging.getLogger("golem.bus")

FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.05, 2.0


class BusClient:
    """A process of this machine on its node's bus: a kernel `Transport`, live calls and byte streams.

    `run` keeps it connected, with back-off while the node is away. `on_mail(frame, sender node is inside)` takes batches
    for this process, `on_call(sender node, target, payload)` answers live calls, `on_connect` runs after each hello.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        role: str,
        *,
        on_mail: Callable[[bytes], Awaitable[bytes]] = not_ready,
        on_call: Callable[[str, str, bytes], Awaitable[bytes]] = not_ready,
        on_connect: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._path, self._name, self._role = path, name, role
        self._on_mail, self._on_call, self._on_connect = on_mail, on_call, on_connect
        self._connection: Connection | None = None
        self._up = trio.Event()
        self.node_id = ""  # of the node, once connected

    @property
    def connected(self) -> bool:
        return self._connection is not None

    async def wait_connected(self) -> None:
        """Return as soon as there is a connection."""
        while self._connection is None:
            await self._up.wait()

    async def exchange(self, node: str, frame: bytes) -> bytes:
        """Kernel transport: give a batch to the node, for itself or another one. Raises `LinkDown`."""
        if self._connection is None:
            raise LinkDown("not on the bus")
        try:
            return await self._connection.request("mail", frame)
        except (Unreachable, RemoteError) as error:
            raise LinkDown(str(error)) from None

    async def call(self, node: str, target: str, payload: bytes, timeout_s: float = 10) -> bytes:
        """Make a live call to a node ("" is our own). Raises `Unreachable`, `RemoteError`."""
        if self._connection is None:
            raise Unreachable("not on the bus")
        return await self._connection.request("call", node, target, payload, timeout_s=timeout_s)

    async def open_stream(self, node: str, name: str, timeout_s: float = 10) -> trio.SocketStream:
        """Open a byte stream to a handler of a node. Raises `Unreachable`, `RemoteError`."""
        return await open_stream(self._path, node, name, timeout_s)

    async def run(self, *, once: bool = False, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Stay connected until cancelled. With `once` the first attempt must succeed and the end of it is the end.

        Raises `BusError` when `once` and there is no node.
        """
        backoff_s = FIRST_BACKOFF_S
        task = task_status
        while True:
            try:
                started_at = trio.current_time()
                await self._session(task)
                task = trio.TASK_STATUS_IGNORED
                if trio.current_time() - started_at > LAST_BACKOFF_S:
                    backoff_s = FIRST_BACKOFF_S
            except BusError as error:
                if once:
                    raise
                log.debug("%s", error)
            if once:
                return
            await trio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, LAST_BACKOFF_S)

    async def _session(self, task_status: trio.TaskStatus[None]) -> None:
        stream = await connect(self._path)
        async with stream:
            framer = Framer(MAX_BUS_FRAME_BYTES)
            try:
                await stream.send_all(frame_of("hello", VERSION, self._name, self._role))
                self.node_id = _welcome(await first_frame(stream, framer))
            except (Violation, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise BusError(f"the node at {self._path} does not answer: {error}") from None
            connection = Connection(stream, framer, self._answer)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_run_and_cancel, connection, nursery.cancel_scope)
                    self._connection = connection
                    self._up.set()
                    task_status.started()
                    if self._on_connect is not None:
                        await self._on_connect()
            finally:
                self._connection, self._up = None, trio.Event()

    async def _answer(self, kind: str, args: list[Any]) -> bytes:
        match kind, args:
            case "mail", [bytes() as frame]:
                return await self._on_mail(frame)
            case "call", [str() as sender, str() as target, bytes() as payload]:
                return await self._on_call(sender, target, payload)
        raise Violation("malformed bus request")


async def _run_and_cancel(connection: Connection, scope: trio.CancelScope) -> None:
    await connection.run()
    scope.cancel()


def _welcome(frame: list[Any]) -> str:
    match frame:
        case ["welcome", str() as node_id]:
            return node_id
        case ["refused", str() as text]:
            raise BusError(text)
    raise Violation("no welcome")


async def open_stream(path: Path, node: str, name: str, timeout_s: float = 10) -> trio.SocketStream:
    """Open a byte stream through the bus at `path`. Raises `Unreachable`, `RemoteError`."""
    try:
        stream = await connect(path)
    except BusError as error:
        raise Unreachable(str(error)) from None
    opened = False
    try:
        with trio.move_on_after(timeout_s):
            await stream.send_all(frame_of("stream", VERSION, node, name))
            framer = Framer(4096)
            while not opened:
                byte = await stream.receive_some(1)  # what follows the frame belongs to the stream
                if not byte:
                    break
                for frame in framer.feed(byte):
                    _welcome(frame)
                    opened = True
        if not opened:
            raise Unreachable(f"no stream {name!r} to {node or 'our node'}")
        return stream
    except BusError as error:
        raise RemoteError(str(error)) from None
    except (Violation, trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise Unreachable(f"no stream {name!r} to {node or 'our node'}: {error}") from None
    finally:
        if not opened:
            await trio.aclose_forcefully(stream)


@asynccontextmanager
async def open_client(path: Path, name: str, role: str) -> AsyncIterator[BusClient]:
    """Join a bus for a while, once. Raises `BusError` when no node is there."""
    client = BusClient(path, name, role)
    failure: Exception | None = None

    async def run(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await client.run(once=True, task_status=task_status)

    async with trio.open_nursery() as nursery:
        try:
            await nursery.start(run)
        except BusError as error:
            failure = error
        else:
            try:
                yield client
            except Exception as error:
                failure = error  # whatever the block raised leaves as itself, not in the group of our nursery
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
