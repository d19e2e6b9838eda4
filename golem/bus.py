"""The bus: a Unix socket in the data directory, by which exe-units, `gftp` and the command line reach their node.

File permission (0600) is its authentication. Frames are MessagePack arrays. A connection begins with `["hello", 1, name,
role]` and then carries requests in both directions, answered in any order:

    ["mail", id, batch]                 a batch of kernel envelopes; the reply is the acknowledgement
    ["call", id, node, target, payload] a live call; node is whom to ask (from a client) or who asks (from the node)
    ["reply", id, bytes]  ["error", id, code, text]      code: down | refused

or with `["stream", 1, node, name]`; after `["welcome", node id]` such a connection is a plain byte stream to a stream
handler of that node. Neighbours: `golem/router.py` decides where mail, calls and streams go; `BusClient` is the other end.
"""

from __future__ import annotations

import logging
import math
import os
import re
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio

from actors.kernel.machine import LinkDown
from golem.net.types import RemoteError, Unreachable
from golem.printing import sayable
from protocol.codec import MAX_FRAME_BYTES, Framer, encode
from protocol.types import Violation

log = logging.getLogger("golem.bus")

VERSION = 1
UNIT = "exeunit:"  # how the names of exe-units begin
UNIT_STREAMS = ("gftp", "exeunit-back")  # files, and what a requestor has in an activity
MAX_BUS_FRAME_BYTES = MAX_FRAME_BYTES + (1 << 16)
MAX_CLIENTS = 1024
MAX_IN_FLIGHT = 256  # requests of one side of a connection
OUTGOING_FRAMES = 64  # that wait to be written; then requests wait
HELLO_TIMEOUT_S = 5.0
FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.05, 2.0
READ_BYTES = 1 << 16
_NAME = re.compile(r"[A-Za-z0-9:_.\-]{1,120}\Z")
_MAX_SOCKET_PATH_BYTES = 107

Replier = Callable[[str, list[Any]], Awaitable[bytes]]


class BusError(Exception):
    """The bus cannot be opened or joined; the text says why."""


@contextmanager
def _short_path(path: Path) -> Any:
    """Yield a name of `path` that fits a socket address: a long directory is reached through a descriptor."""
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH_BYTES:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


async def connect(path: Path) -> trio.SocketStream:
    """Open a connection to a bus. Raises `BusError`."""
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short_path(path) as name:
            await sock.connect(name)
    except OSError as error:
        sock.close()
        raise BusError(f"no node at {path}: {error.strerror or error}") from None
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)


def _listen(path: Path) -> trio.SocketListener:
    """Bind the socket, for this user alone. A socket that a dead node left behind is replaced."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise BusError(f"{path} is in the way: not a socket")
        path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        with _short_path(path) as name:
            sock.bind(name)
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise BusError(f"cannot listen at {path}: {error.strerror or error}") from None
    finally:
        os.umask(mask)
    sock.setblocking(False)
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


class Connection:
    """One established connection: requests out, requests in. `run` it; `answer(kind, args)` serves the other side.

    `answer` raises `Unreachable` or `LinkDown` (code down), or `RemoteError` or `Violation` (code refused).
    """

    def __init__(self, stream: trio.abc.Stream, framer: Framer, answer: Replier) -> None:
        self._stream, self._framer, self._answer = stream, framer, answer
        self._out_send, self._out_receive = trio.open_memory_channel[bytes](OUTGOING_FRAMES)
        self._waiting: dict[int, tuple[trio.Event, list[Any]]] = {}
        self._last_id = 0
        self._serving = 0
        self.closed = trio.Event()

    async def request(self, kind: str, *args: Any, timeout_s: float = math.inf) -> bytes:
        """Ask the other side. Raises `Unreachable` (also when the connection ends) and `RemoteError`."""
        if self.closed.is_set():
            raise Unreachable("the bus connection is closed")
        if len(self._waiting) >= MAX_IN_FLIGHT:
            raise Unreachable("too many requests under way on the bus connection")
        self._last_id = number = self._last_id + 1
        answered = trio.Event()
        answer: list[Any] = []
        self._waiting[number] = (answered, answer)
        try:
            with trio.move_on_after(timeout_s):
                await self._out_send.send(_frame(kind, number, *args))
                await answered.wait()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise Unreachable("the bus connection is closed") from None
        finally:
            self._waiting.pop(number, None)
        match answer:
            case []:
                raise Unreachable("no answer in time" if not self.closed.is_set() else "the bus connection is closed")
            case ["reply", bytes() as payload]:
                return payload
            case ["error", "refused", str() as text]:
                raise RemoteError(text)
            case _:
                raise Unreachable(str(answer[-1])[:500])

    async def run(self) -> None:
        """Serve until either side closes. The other side's nonsense ends the connection."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, nursery.cancel_scope)
                await self._read(nursery)
                nursery.cancel_scope.cancel()
        finally:
            self.closed.set()
            self._out_receive.close()
            for answered, _ in self._waiting.values():
                answered.set()
            await trio.aclose_forcefully(self._stream)

    def close(self) -> None:
        """End the connection; `run` returns soon."""
        self._out_send.close()

    async def _write(self, scope: trio.CancelScope) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for frame in self._out_receive:
                await self._stream.send_all(frame)
        scope.cancel()

    async def _read(self, nursery: trio.Nursery) -> None:
        try:
            while data := await self._stream.receive_some(READ_BYTES):
                for frame in self._framer.feed(data):
                    self._take(frame, nursery)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except Violation as error:
            log.warning("bus connection ended: %s", error)

    def _take(self, frame: Any, nursery: trio.Nursery) -> None:
        match frame:
            case ["reply" | "error" as kind, int() as number, *rest]:
                if waiting := self._waiting.get(number):
                    waiting[1][:] = [kind, *rest]
                    waiting[0].set()
            case ["mail" | "call" as kind, int() as number, *args]:
                nursery.start_soon(self._serve, kind, number, args)
            case _:
                raise Violation("not a bus frame")

    async def _serve(self, kind: str, number: int, args: list[Any]) -> None:
        if self._serving >= MAX_IN_FLIGHT:
            reply = _frame("error", number, "down", "busy")
        else:
            self._serving += 1
            try:
                reply = _frame("reply", number, await self._answer(kind, args))
            except (RemoteError, Violation) as error:
                reply = _frame("error", number, "refused", sayable(error, 2000))
            except (Unreachable, LinkDown) as error:
                reply = _frame("error", number, "down", sayable(error, 2000))
            except Exception:
                # a bug in a handler of ours must not end the connection with everything else on it
                log.exception("bus request %s failed", kind)
                reply = _frame("error", number, "refused", "internal error")
            finally:
                self._serving -= 1
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._out_send.send(reply)


def _frame(*parts: Any) -> bytes:
    frame = encode(parts)
    if len(frame) > MAX_BUS_FRAME_BYTES:
        raise RemoteError(f"a bus frame of {len(frame)} bytes is over the limit of {MAX_BUS_FRAME_BYTES}")
    return frame


async def _first_frame(stream: trio.abc.Stream, framer: Framer) -> list[Any]:
    """Return the first frame of a connection; it comes alone. Raises `Violation`."""
    with trio.move_on_after(HELLO_TIMEOUT_S):
        while data := await stream.receive_some(READ_BYTES):
            frames = list(framer.feed(data))
            if len(frames) > 1 or (frames and not isinstance(frames[0], list)):
                raise Violation("a connection begins with one frame, and waits")
            if frames:
                return frames[0]  # type: ignore[no-any-return]
    raise Violation("no hello")


class BusPeer:
    """A client as the node sees it: its `name` (`exeunit:<id>`, `gftp:<random>`), `role`, and calls to it."""

    def __init__(self, name: str, role: str, connection: Connection) -> None:
        self.name, self.role, self.connection = name, role, connection

    @property
    def gone(self) -> trio.Event:
        """Set when the connection has ended."""
        return self.connection.closed


class Bus:
    """The node's side. Whoever wires it sets `on_mail`, `on_call` and `on_stream`; see `golem/router.py`."""

    def __init__(self, path: Path, node_id: str, units_path: Path | None = None) -> None:
        """`units_path`: a second socket, for exe-units: they name themselves so, and reach `UNIT_STREAMS` alone."""
        self._path, self._node_id, self._units_path = path, node_id, units_path
        self._peers: dict[str, BusPeer] = {}
        self._connections = 0
        self.on_mail: Callable[[BusPeer, bytes], Awaitable[bytes]] = _nobody
        self.on_call: Callable[[BusPeer, str, str, bytes], Awaitable[bytes]] = _nobody
        self.on_stream: Callable[[str, str], Awaitable[Any]] = _nobody
        self.on_leave: list[Callable[[BusPeer], None]] = []  # called when a client's connection has ended

    def peers(self) -> list[BusPeer]:
        """Return the clients that are connected."""
        return list(self._peers.values())

    def has(self, name: str) -> bool:
        """Return whether a client of this name is connected."""
        return name in self._peers

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
                match await _first_frame(stream, framer):
                    case ["hello", 1, str() as name, str()] if narrow and not name.startswith(UNIT):
                        await stream.send_all(_frame("refused", "this socket is for exe-units"))
                    case ["stream", 1, str(), str() as name] if narrow and name not in UNIT_STREAMS:
                        await stream.send_all(_frame("refused", "this socket is for exe-units"))
                    case ["hello", 1, str() as name, str() as role] if _NAME.match(name):
                        await self._serve_client(stream, framer, name, role)
                    case ["stream", 1, str() as node, str() as name]:
                        await self._serve_stream(stream, node, name)
                    case _:
                        await stream.send_all(_frame("refused", f"expected a hello of version {VERSION}"))
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
            await stream.send_all(_frame("welcome", self._node_id))
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
            await stream.send_all(_frame("refused", sayable(error, 2000)))
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


async def _nobody(*_: Any) -> Any:
    raise Unreachable("the node is not ready")


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
        on_mail: Callable[[bytes], Awaitable[bytes]] = _nobody,
        on_call: Callable[[str, str, bytes], Awaitable[bytes]] = _nobody,
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
                await stream.send_all(_frame("hello", VERSION, self._name, self._role))
                self.node_id = _welcome(await _first_frame(stream, framer))
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
            await stream.send_all(_frame("stream", VERSION, node, name))
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
