"""The `gftp` command: publishes files of this machine to other nodes, and moves files from and to them.

`gftp server` speaks JSON-RPC 2.0, one object per line on stdin and stdout, to a requestor's agent; the other sub-commands
do one thing each. The node serves the files itself (`golem/files/server.py`); this process tells it of them over the bus, and
what it published ends with it. Hashing and reading of uploads happen here.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import stat
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec
import trio

from golem.base.printing import guard_stderr, quoted
from golem.bus.client import BusClient
from golem.bus.wire import BusError
from golem.config import VERSION, data_dir_from
from golem.files.client import GftpPeer
from golem.files.outgoing import FileIdentity, OutgoingFile, identity_of
from golem.files.wire import part_name
from golem.net.types import RemoteError, Unreachable
from protocol.gftp import FileFault, parse_url, sha3_of

VERSION_TEXT = f"{VERSION} (golem-node)"
PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS, SERVER_ERROR = -32700, -32600, -32601, -32602, -32000
PUBLISH, RECEIVE, CLOSE = "gftp:publish", "gftp:receive", "gftp:close"
MAX_LINE_BYTES = 4 << 20
CONNECT_TIMEOUT_S = 5.0
SHUTDOWN_S = 1.0
RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0)  # after failures that may pass; anew whenever something came over


class CallError(Exception):
    """A JSON-RPC error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def bus_path_from(env: dict[str, str]) -> Path:
    """Return the bus of the node to use: a `unix:` GSB_URL, else the socket in the data directory."""
    url = env.get("GSB_URL", "")
    if url.startswith("unix:"):
        return Path(url.removeprefix("unix:").removeprefix("//"))
    return data_dir_from(env) / "bus.sock"  # tcp: addresses are the reference daemon's bus, not ours


class Gftp:
    """One session with the node: what it published is published until it ends, also over a restart of the node."""

    def __init__(self, bus_path: Path) -> None:
        self._peer = GftpPeer(bus_path)
        self._published: dict[str, tuple[str, Path, tuple[Any, ...]]] = {}  # by name: what was called, the file, what else
        self._bus_path = bus_path
        self._bus = BusClient(bus_path, f"gftp:{secrets.token_hex(8)}", "gftp", on_connect=self._on_connect)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Stay on the bus until cancelled."""
        try:
            await self._bus.run(task_status=task_status)
        finally:
            self.clean_up()

    async def _on_connect(self) -> None:
        """The node may be a new one: tell it again."""
        for target, path, more in list(self._published.values()):
            with suppress(Unreachable, RemoteError):
                await self._bus.call("", target, _encode([str(path), *more]))

    async def _call(self, target: str, *args: Any) -> str:
        with trio.move_on_after(CONNECT_TIMEOUT_S):
            await self._bus.wait_connected()
        try:
            return (await self._bus.call("", target, _encode(list(args)))).decode()
        except Unreachable as error:
            raise CallError(SERVER_ERROR, f"no node at {self._bus_path} ({error}): is it running?") from None
        except RemoteError as error:
            raise CallError(SERVER_ERROR, str(error)) from None

    async def publish(self, files: list[str]) -> list[dict[str, str]]:
        """Publish files; the same content has the same URL."""
        done = []
        for file in files:
            path = Path(os.path.realpath(file))
            sha3, identity = await trio.to_thread.run_sync(_sha3_of, path, abandon_on_cancel=True)
            name = await self._call(PUBLISH, str(path), sha3, identity)
            self._published[name] = (PUBLISH, path, (sha3, identity))
            done.append({"file": file, "url": f"gftp://{self._bus.node_id}/{name}"})
        return done

    async def close(self, urls: list[str]) -> list[str]:
        """Withdraw URLs of this session: "ok" or "error" for each."""
        done = []
        for url in urls:
            try:
                name = parse_url(url)[1]
            except FileFault:
                done.append("error")
                continue
            self._published.pop(name, None)
            done.append(await self._call(CLOSE, name))
        return done

    async def receive(self, output_file: str, max_bytes: int | None = None) -> dict[str, str]:
        """Open a slot that others upload one file into, of `max_bytes` at most."""
        path = _absolute(output_file)
        more = () if max_bytes is None else (max_bytes,)
        name = await self._call(RECEIVE, str(path), "", *more)
        self._published[name] = (RECEIVE, path, (name, *more))
        return {"file": output_file, "url": f"gftp://{self._bus.node_id}/{name}"}

    async def download(self, url: str, output_file: str) -> dict[str, str]:
        """Fetch a file; the output appears when it is whole, and has the hash that it is named by."""
        path = _absolute(output_file)
        part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.part")
        try:
            with part.open("wb", buffering=0) as file:
                sha3 = hashlib.sha3_256()

                def store(block: bytes | bytearray) -> None:
                    view = memoryview(block)
                    while view:
                        view = view[file.write(view) :]
                    sha3.update(block)

                async def fetch() -> None:
                    await self._peer.download(url, file.tell(), partial(trio.to_thread.run_sync, store))  # type: ignore[arg-type]

                await _persist(fetch, file.tell)
            if sha3_of(parse_url(url)[1]) not in ("", sha3.hexdigest()):
                raise FileFault("IntegrityError", f"{url}: the content has another hash")
            part.replace(path)
        except OSError as error:
            raise CallError(SERVER_ERROR, f"cannot write {path}: {error.strerror}") from None
        except FileFault as fault:
            raise CallError(SERVER_ERROR, f"{fault.variant}: {fault}") from None
        finally:
            part.unlink(missing_ok=True)
        return {"file": output_file, "url": url}

    async def upload(self, url: str, file: str) -> dict[str, str]:
        """Send a file into a slot."""
        path = _absolute(file)
        try:
            with path.open("rb") as source:
                outgoing = OutgoingFile(source.fileno(), os.fstat(source.fileno()).st_size)

                async def send() -> None:
                    await self._peer.upload(url, outgoing)

                await _persist(send, lambda: outgoing.kept)
        except OSError as error:
            raise CallError(SERVER_ERROR, f"cannot read {path}: {error.strerror}") from None
        except FileFault as fault:
            raise CallError(SERVER_ERROR, f"{fault.variant}: {fault}") from None
        return {"file": file, "url": url}

    def clean_up(self) -> None:
        """Remove what uploads that broke off have left in our slots; for the end."""
        for name, (target, path, _) in self._published.items():
            if target == RECEIVE:
                with suppress(OSError):
                    path.with_name(part_name(path.name, name)).unlink(missing_ok=True)


async def _persist(attempt: Callable[[], Awaitable[None]], reached: Callable[[], int]) -> None:
    """Make attempts until one goes through. Raises the `FileFault` of the last one."""
    delays, best = iter(RETRY_DELAYS_S), 0
    while True:
        try:
            return await attempt()
        except FileFault as fault:
            if reached() > best:
                delays, best = iter(RETRY_DELAYS_S), reached()
            delay_s = next(delays, None) if fault.passing else None
            if delay_s is None:
                raise
        await trio.sleep(delay_s)


def _encode(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(path))


def _sha3_of(path: Path) -> tuple[str, FileIdentity]:
    """Return the SHA3-256 of a regular file, and which file that was. Raises `CallError`."""
    try:
        if not path.is_file():
            raise CallError(SERVER_ERROR, f"not a regular file: {path}")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            before = os.fstat(descriptor)
            if not stat.S_ISREG(before.st_mode):
                raise CallError(SERVER_ERROR, f"not a regular file: {path}")
            digest = hashlib.file_digest(file, "sha3_256").hexdigest()
            if identity_of(os.fstat(descriptor)) != identity_of(before):
                raise CallError(SERVER_ERROR, f"{path} changed while it was read")
            return digest, identity_of(before)
    except OSError as error:
        raise CallError(SERVER_ERROR, f"cannot read {path}: {error.strerror}") from None


# -- JSON-RPC
class StdioServer:
    """Answers requests of stdin in the order they came; only answers are ever written to stdout."""

    def __init__(self, gftp: Gftp, write: Callable[[bytes], None]) -> None:
        self._gftp, self._write = gftp, write
        self.stopped = False
        self._methods: dict[str, tuple[dict[str, type], Callable[..., Awaitable[Any]]]] = {
            "version": ({}, self._version),
            "publish": ({"files": list}, gftp.publish),
            "close": ({"urls": list}, gftp.close),
            "download": ({"url": str, "output_file": str}, gftp.download),
            "receive": ({"output_file": str}, gftp.receive),
            "upload": ({"url": str, "file": str}, gftp.upload),
            "shutdown": ({}, self._shutdown),
        }

    async def _version(self) -> str:
        return VERSION_TEXT

    async def _shutdown(self) -> str:
        self.stopped = True
        return "ok"

    async def line(self, line: bytes) -> None:
        """Answer one line."""
        request: Any = None
        number: Any = None
        try:
            try:
                request = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CallError(PARSE_ERROR, f"not JSON: {error}") from None
            if not isinstance(request, dict):
                raise CallError(INVALID_REQUEST, "expected a request object")
            number = request.get("id")
            answer: dict[str, Any] = {"result": await self._call(request)}
        except CallError as error:
            answer = {"error": {"code": error.code, "message": str(error)}}
        if isinstance(request, dict) and "method" in request and "id" not in request:
            return  # a notification has no answer
        self._write(json.dumps({"jsonrpc": "2.0", "id": number, **answer}).encode() + b"\r\n")

    async def _call(self, request: dict[str, Any]) -> Any:
        method = request.get("method")
        if not isinstance(method, str):
            raise CallError(INVALID_REQUEST, "expected a method")
        if method not in self._methods:
            raise CallError(METHOD_NOT_FOUND, f"no such method: {method[:64]}")
        wanted, call = self._methods[method]
        params = request.get("params") or {}
        if isinstance(params, list) and len(params) <= len(wanted):
            params = dict(zip(wanted, params, strict=False))
        if not isinstance(params, dict):
            raise CallError(INVALID_PARAMS, "expected parameters by name")
        arguments = {}
        for name, kind in wanted.items():
            value = params.get(name)
            texts = value if isinstance(value, list) else [value]
            if not isinstance(value, kind) or not all(isinstance(text, str) and "\0" not in text for text in texts):
                raise CallError(INVALID_PARAMS, f"{method} needs {name}: {'texts' if kind is list else 'a text'}")
            arguments[name] = value
        if method == "receive" and (most := params.get("max_bytes")) is not None:
            if not isinstance(most, int) or isinstance(most, bool) or most < 0:
                raise CallError(INVALID_PARAMS, "receive takes max_bytes: a number of bytes")
            arguments["max_bytes"] = most
        return await call(**arguments)


async def _lines(receive: Callable[[int], Awaitable[bytes]]) -> Any:
    """Yield lines of a byte stream; a line without end is given up."""
    held = bytearray()
    while data := await receive(1 << 16):
        held += data
        while (end := held.find(b"\n")) >= 0:
            line = bytes(held[:end]).strip()
            del held[: end + 1]
            if line:
                yield line
        if len(held) > MAX_LINE_BYTES:
            return


def _write_stdout(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


async def serve(bus_path: Path) -> None:
    """Run `gftp server` until stdin ends, `shutdown`, or a signal."""
    gftp = Gftp(bus_path)
    server = StdioServer(gftp, _write_stdout)
    with _open_stdin() as receive:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_until_signal, nursery.cancel_scope)
            nursery.start_soon(gftp.run)
            async for line in _lines(receive):
                await server.line(line)
                if server.stopped:
                    await trio.sleep(SHUTDOWN_S)
                    break
            nursery.cancel_scope.cancel()


@contextmanager
def _open_stdin() -> Iterator[Callable[[int], Awaitable[bytes]]]:
    """Yield a reader of stdin. A pipe is waited for, without changing the mode of what others may share; a file is read."""
    descriptor = sys.stdin.fileno()

    async def read(most: int) -> bytes:
        try:
            await trio.lowlevel.wait_readable(descriptor)
        except OSError:  # a regular file cannot be waited for, and is always readable
            await trio.lowlevel.checkpoint()
        return os.read(descriptor, most)

    yield read


async def _until_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            scope.cancel()
            return


async def _once(act: Callable[[Gftp], Awaitable[Any]], stay: bool) -> None:
    gftp = Gftp(bus_path_from(dict(os.environ)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(gftp.run)
        _write_stdout(json.dumps({"result": await act(gftp)}).encode() + b"\n")
        if stay:
            await _until_signal(nursery.cancel_scope)
        nursery.cancel_scope.cancel()


def _run_once(act: Callable[[Gftp], Awaitable[Any]], stay: bool) -> None:
    """Run one command; its failure is a line on stderr and status 1."""
    failure: BaseException | None = None
    try:
        trio.run(_once, act, stay)
    except* (CallError, BusError) as errors:  # what is raised in here leaves in a group, in some versions of Python
        failure = errors.exceptions[0]
    if failure is not None:
        click.echo(f"gftp: {quoted(str(failure))}", err=True)
        sys.exit(1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION_TEXT, message="%(version)s")
def main() -> None:
    """Publish files to other nodes, and move files from and to them."""
    guard_stderr()


@main.command("server")
def server_command() -> None:
    """Speak JSON-RPC on stdin and stdout."""
    trio.run(serve, bus_path_from(dict(os.environ)))


@main.command("publish")
@click.argument("files", nargs=-1, required=True)
def publish_command(files: tuple[str, ...]) -> None:
    """Publish FILES until interrupted."""
    _run_once(lambda gftp: gftp.publish(list(files)), stay=True)


@main.command("download")
@click.argument("url")
@click.argument("output_file")
def download_command(url: str, output_file: str) -> None:
    """Fetch URL into OUTPUT_FILE."""
    _run_once(lambda gftp: gftp.download(url, output_file), stay=False)


@main.command("receive")
@click.argument("output_file")
@click.option("--max-bytes", type=click.IntRange(0), help="Of what is taken. [what the disk has room for]")
def receive_command(output_file: str, max_bytes: int | None) -> None:
    """Open a slot for an upload into OUTPUT_FILE until interrupted."""
    _run_once(lambda gftp: gftp.receive(output_file, max_bytes), stay=True)


@main.command("upload")
@click.argument("file")
@click.argument("url")
def upload_command(file: str, url: str) -> None:
    """Send FILE into the slot at URL."""
    _run_once(lambda gftp: gftp.upload(url, file), stay=False)


@main.command("version")
def version_command() -> None:
    """Print the version."""
    click.echo(VERSION_TEXT)


if __name__ == "__main__":
    main()
