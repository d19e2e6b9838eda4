"""What an exe-unit says to a Docker Engine while a command runs: Trio all the way, so that everything can be cancelled.

A small HTTP client on the Engine's socket, one connection a request: programs started in containers with their streams,
waiting for a container's end, and a few questions on the way. All else is `admin`'s business, on the Docker SDK, whose
streams block a thread for as long as they last.

Nothing is read ahead: while nobody calls `ExecStream.receive`, pipes fill up and the program waits. Leaving a stream does
not end its program.
Errors of every call, as in `admin`: EngineGone, NoSuch, InUse, RuntimeFault.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, cast
from urllib.parse import quote, urlencode

import h11
import trio

from golem.exeunit.runtime import RuntimeFault, Side
from golem.exeunit.runtimes.vm.admin import OLDEST_API, EngineGone, InUse, NoSuch

CHUNK_BYTES = 64 << 10
MAX_BODY_BYTES = 4 << 20
MAX_HEADER_BYTES = 64 << 10
_FRAME = struct.Struct(">BxxxI")  # side, bytes that follow
_SIDES: dict[int, Side] = {0: "stdout", 1: "stdout", 2: "stderr"}
_FAULTS = {HTTPStatus.NOT_FOUND: NoSuch, HTTPStatus.CONFLICT: InUse}


@dataclass(frozen=True)
class ExecState:
    """A program in a container. `pid` is the machine's number of its process while it runs, else 0."""

    running: bool
    exit_code: int | None
    pid: int


class EngineClient:
    """An Engine by its socket; holds nothing open between calls. `api`: what it is to be spoken to, as `Admin` found out."""

    def __init__(self, path: Path, api: str = OLDEST_API) -> None:
        self.path, self.api = path, api

    # -- containers
    async def ping(self) -> None:
        """Return if the Engine answers at all."""
        await self._ask("GET", "/_ping")

    async def inspect(self, container: str) -> dict[str, Any]:
        """Return what the Engine knows of a container."""
        found: dict[str, Any] = await self._ask("GET", f"/containers/{quote(container)}/json")
        return found

    async def layer_bytes(self, container: str) -> int:
        """Return what a container wrote over its image, which the Engine walks through to find out."""
        found = await self._ask("GET", f"/containers/{quote(container)}/json?size=1")
        return int(found.get("SizeRw") or 0)

    async def wait_exit(self, container: str) -> int:
        """Wait for the end of a container that runs, or was created and not started yet; returns its exit code."""
        answer = await self._ask("POST", f"/containers/{quote(container)}/wait?condition=next-exit")
        if not isinstance(answer, dict) or "StatusCode" not in answer:
            raise EngineGone("the Docker Engine broke off while the container ran")
        return int(answer["StatusCode"])

    # -- programs in containers
    async def create_exec(
        self,
        container: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        tty: bool = False,
        stdin: bool = False,
        attached: bool = True,
    ) -> str:
        """Prepare a program with the container's own user, directory and environment plus `env`; returns its id."""
        body = {
            "Cmd": list(argv),
            "Env": [f"{name}={value}" for name, value in (env or {}).items()],
            "Tty": tty,
            "AttachStdin": stdin,
            "AttachStdout": attached,
            "AttachStderr": attached and not tty,
        }
        answer = await self._ask("POST", f"/containers/{quote(container)}/exec", body)
        return str(answer["Id"])

    async def start_exec(self, exec_id: str, *, tty: bool = False) -> ExecStream:
        """Start a prepared program and return its streams; close them."""
        connection = await _open(self.path)
        try:
            body = {"Detach": False, "Tty": tty}
            await connection.send("POST", f"/v{self.api}/exec/{exec_id}/start", body, upgrade=True)
            status = await connection.status()
            if status not in (HTTPStatus.SWITCHING_PROTOCOLS, HTTPStatus.OK):
                raise _fault(status, await connection.body())
            return ExecStream(exec_id, connection.stream, connection.rest(), tty)
        except BaseException:
            await trio.aclose_forcefully(connection.stream)
            raise

    async def start_exec_detached(self, exec_id: str) -> None:
        """Start a prepared program and leave it alone."""
        await self._ask("POST", f"/exec/{exec_id}/start", {"Detach": True, "Tty": False})

    async def inspect_exec(self, exec_id: str) -> ExecState:
        """Return how a program is."""
        found = await self._ask("GET", f"/exec/{exec_id}/json")
        running = bool(found["Running"])
        return ExecState(running, None if running else found.get("ExitCode"), int(found.get("Pid") or 0))

    async def resize_exec(self, exec_id: str, rows: int, cols: int) -> None:
        """Set the size of a program's terminal."""
        await self._ask("POST", f"/exec/{exec_id}/resize?{urlencode({'h': rows, 'w': cols})}")

    async def _ask(self, method: str, target: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return the answer's JSON, None if it has none."""
        connection = await _open(self.path)
        try:
            await connection.send(method, f"/v{self.api}{target}", body)
            status = await connection.status()
            data = await connection.body()
        finally:
            await trio.aclose_forcefully(connection.stream)
        if status >= HTTPStatus.BAD_REQUEST:
            raise _fault(status, data)
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            return None


class ExecStream:
    """The streams of a program that was started: one reader, one writer."""

    def __init__(self, exec_id: str, stream: trio.SocketStream, first: bytes, tty: bool) -> None:
        self.id = exec_id
        self._stream, self._buffer, self._tty = stream, bytearray(first), tty
        self._side: Side = "stdout"
        self._left = 0  # bytes of the frame at hand

    async def receive(self) -> tuple[Side, bytes] | None:
        """Return the next bytes and where they were written to, or None when both sides are closed."""
        while True:
            if self._buffer and (part := self._take()) is not None:
                return part
            try:
                data = await self._stream.receive_some(CHUNK_BYTES)
            except trio.BrokenResourceError:
                data = b""
            if not data:
                return None
            self._buffer += data

    def _take(self) -> tuple[Side, bytes] | None:
        if self._tty:
            data = bytes(self._buffer)
            self._buffer.clear()
            return "stdout", data
        while not self._left:
            if len(self._buffer) < _FRAME.size:
                return None
            number, self._left = _FRAME.unpack_from(self._buffer)
            if number not in _SIDES:
                raise EngineGone("the Docker Engine sent no stream of output")
            self._side = _SIDES[number]
            del self._buffer[: _FRAME.size]
        data = bytes(self._buffer[: self._left])
        del self._buffer[: self._left]
        self._left -= len(data)
        return (self._side, data) if data else None

    async def send(self, data: bytes) -> None:
        """Write to the program's input; once it has ended, nothing happens."""
        with suppress(trio.BrokenResourceError):
            await self._stream.send_all(data)

    async def end_input(self) -> None:
        """Close the program's input."""
        with suppress(trio.BrokenResourceError, OSError):
            await self._stream.send_eof()

    async def aclose(self) -> None:
        """Let go of the streams; the program runs on."""
        await trio.aclose_forcefully(self._stream)

    async def __aenter__(self) -> ExecStream:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        await self.aclose()


class _Connection:
    """One request and its answer."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEADER_BYTES)

    async def send(self, method: str, target: str, body: Mapping[str, Any] | None, upgrade: bool = False) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        headers = [("Host", "docker"), ("Content-Type", "application/json"), ("Content-Length", str(len(data)))]
        headers += [("Connection", "Upgrade"), ("Upgrade", "tcp")] if upgrade else [("Connection", "close")]
        events = (h11.Request(method=method, target=target, headers=headers), h11.Data(data=data), h11.EndOfMessage())
        with _gone():
            await self.stream.send_all(b"".join(self._http.send(event) or b"" for event in events))

    async def status(self) -> int:
        while True:
            event = await self._next()
            if isinstance(event, h11.Response) or (
                isinstance(event, h11.InformationalResponse) and event.status_code == HTTPStatus.SWITCHING_PROTOCOLS
            ):
                return event.status_code

    async def body(self) -> bytes:
        data = bytearray()
        while not isinstance(event := await self._next(), h11.EndOfMessage):
            if isinstance(event, h11.Data):
                data += event.data
            if len(data) > MAX_BODY_BYTES:
                raise RuntimeFault("Docker Engine: the answer is too long")
        return bytes(data)

    def rest(self) -> bytes:
        """Return what came behind the header of an answer that hands the connection over."""
        return self._http.trailing_data[0]

    async def _next(self) -> h11.Event | type[h11.PAUSED]:
        with _gone():
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(await self.stream.receive_some(CHUNK_BYTES))
        if isinstance(event, h11.ConnectionClosed):
            raise EngineGone("the Docker Engine closed the connection")
        return cast("h11.Event | type[h11.PAUSED]", event)


class _gone:
    """Turns a connection that breaks into EngineGone."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, h11.RemoteProtocolError | trio.BrokenResourceError):
            raise EngineGone("the Docker Engine broke the connection off") from None


async def _open(path: Path) -> _Connection:
    try:
        return _Connection(await trio.open_unix_socket(path))
    except OSError as error:
        raise EngineGone(f"the Docker Engine at {path} does not answer: {error.strerror or error}") from None


def _fault(status: int, data: bytes) -> RuntimeFault:
    try:
        text = str(json.loads(data)["message"])
    except (ValueError, TypeError, KeyError, RecursionError):
        text = f"status {status}"
    return _FAULTS.get(HTTPStatus(status), RuntimeFault)(f"Docker Engine: {text[:500]}")
