"""JSON-RPC over HTTP for one dev chain: h11 on Trio, on loopback unless told otherwise, everything bounded.

Web pages can post to loopback, too, so whatever a page may send is refused: an `Origin`, a `Host` that is not this
machine's, a body that does not say it is JSON. The developer's methods (time, blocks, reorganisations) are for those who
can read the token in `chain.json` (`Authorization: Bearer TOKEN`); all others have the play money and no more.

The chain is synchronous, so requests are served one at a time; a block of 200 transactions holds the loop for about
two seconds, an ordinary request for milliseconds.
"""

from __future__ import annotations

import json
import logging
import re
import sqlite3
from hmac import compare_digest
from typing import Any

import h11
import trio
from eth.exceptions import PyEVMError
from eth_utils.exceptions import ValidationError

from golem.base.hosts import is_of_this_machine
from golem.chain.devchain import LOOPBACK
from golem.chain.devchain.chain import ChainError, DevChain
from golem.chain.devchain.methods import Methods

log = logging.getLogger(__name__)

BODY_LIMIT = 1 << 20  # bytes; a block's worth of raw transactions in a batch fits
BATCH_LIMIT = 100
CONNECTION_LIMIT = 256
DEPTH_LIMIT = 16
BRACKETS = re.compile(rb"[\[{\]}]")
IDLE_S = 120.0  # a silent connection is closed
DEVELOPERS = ("evm_", "anvil_")
FORBIDDEN = -32001
PARSE_ERROR = {"jsonrpc": "2.0", "id": None, "error": {"code": -32700, "message": "parse error"}}


class Server:
    """Serves `chain` until cancelled."""

    def __init__(self, chain: DevChain, block_time_s: float, token: str) -> None:
        self.chain, self.block_time_s, self._token = chain, block_time_s, token
        self.methods = Methods(chain)
        self.last_request = trio.current_time()
        self._connections = 0

    async def listen(self, port: int, host: str = LOOPBACK) -> list[trio.SocketListener]:
        """Bind `host` (an IP address), and loopback, where this machine's nodes look; port 0 picks one. OSError."""
        listeners = list(await trio.open_tcp_listeners(port, host=host))
        if host not in (LOOPBACK, "0.0.0.0"):
            try:
                listeners += await trio.open_tcp_listeners(listeners[0].socket.getsockname()[1], host=LOOPBACK)
            except OSError:
                await listeners[0].aclose()
                raise
        return listeners

    async def run(self, listeners: list[trio.SocketListener], idle_exit_s: float = 0.0) -> None:
        """Serve and mine. Returns after `idle_exit_s` seconds without a request (0: never)."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._mine)
            nursery.start_soon(trio.serve_listeners, self._connection, listeners)
            if idle_exit_s:
                await self._quiet_for(idle_exit_s)
                nursery.cancel_scope.cancel()

    async def _quiet_for(self, seconds: float) -> None:
        """Return once no request has come for `seconds`."""
        while (rest_s := self.last_request + seconds - trio.current_time()) > 0:
            await trio.sleep(rest_s)

    async def _mine(self) -> None:
        while True:
            await trio.sleep(self.chain.interval_s or self.block_time_s)
            self.chain.tick()

    # -- HTTP

    async def _connection(self, stream: trio.SocketStream) -> None:
        if self._connections >= CONNECTION_LIMIT:
            await trio.aclose_forcefully(stream)
            return
        self._connections += 1
        http = h11.Connection(h11.SERVER)
        try:
            while await self._exchange(http, stream):
                http.start_next_cycle()
        except (trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError, trio.TooSlowError):
            pass  # the client's fault or its end: the connection is all there is to clean up
        finally:
            self._connections -= 1
            await trio.aclose_forcefully(stream)

    async def _exchange(self, http: h11.Connection, stream: trio.SocketStream) -> bool:
        """One request and its answer. False when the connection is to be closed."""
        body, request = bytearray(), None
        with trio.fail_after(IDLE_S):
            while True:
                event = http.next_event()
                if event is h11.NEED_DATA:
                    http.receive_data(await stream.receive_some(65_536))
                elif isinstance(event, h11.Request):
                    request = event
                elif isinstance(event, h11.Data):
                    body += event.data
                    if len(body) > BODY_LIMIT:
                        await self._send(http, stream, 413, b'{"error": "body too large"}', close=True)
                        return False
                elif isinstance(event, h11.EndOfMessage):
                    break
                else:  # ConnectionClosed
                    return False
        assert request is not None, "a message ends behind its beginning"
        refusal = _refusal(request)
        if refusal is not None:
            status, words = refusal
            await self._send(http, stream, status, json.dumps({"error": words}).encode())
        else:
            given = _header(request, b"authorization").removeprefix(b"Bearer ")
            await self._send(http, stream, 200, self.answer(bytes(body), compare_digest(given, self._token.encode())))
        return http.our_state is h11.DONE and http.their_state is h11.DONE

    async def _send(self, http: h11.Connection, stream: trio.SocketStream, status: int, body: bytes, close: bool = False) -> None:
        headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
        if close:
            headers.append(("connection", "close"))
        parts = [h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()]
        with trio.fail_after(IDLE_S):
            await stream.send_all(b"".join(http.send(part) or b"" for part in parts))

    # -- JSON-RPC

    def answer(self, body: bytes, is_developer: bool) -> bytes:
        """The answer to a request body: one call or a batch."""
        self.last_request = trio.current_time()
        try:
            if _depth(body) > DEPTH_LIMIT:
                raise ValueError("nested too deep")
            asked = json.loads(body)
        except ValueError:
            return json.dumps(PARSE_ERROR).encode()
        if not isinstance(asked, list):
            return json.dumps(self._one(asked, is_developer)).encode()
        if not 0 < len(asked) <= BATCH_LIMIT:
            return json.dumps(_failure(None, -32600, f"a batch has 1 to {BATCH_LIMIT} calls")).encode()
        return json.dumps([self._one(each, is_developer) for each in asked]).encode()

    def _one(self, asked: Any, is_developer: bool) -> dict[str, Any]:
        if not isinstance(asked, dict) or not isinstance(asked.get("method"), str):
            return _failure(None, -32600, "invalid request")
        ident, params = asked.get("id"), asked.get("params") or []
        if not isinstance(params, list):
            return _failure(ident, -32602, "parameters by position are expected")
        if asked["method"].startswith(DEVELOPERS) and not is_developer:
            return _failure(ident, FORBIDDEN, f"{asked['method'][:80]} is for who sends the token in chain.json")
        try:
            return {"jsonrpc": "2.0", "id": ident, "result": self.methods.call(asked["method"], params)}
        except ChainError as error:
            return _failure(ident, error.code, str(error), error.data)
        except (PyEVMError, ValidationError, ValueError, TypeError, KeyError, sqlite3.OperationalError) as error:
            # py-evm's own checks of a strange input, or a full disk: this call fails, the chain lives on
            log.exception("%s failed", asked["method"])
            self.chain.store.forget()
            return _failure(ident, -32603, f"{type(error).__name__}: {str(error)[:200]}")


def _header(request: h11.Request, name: bytes) -> bytes:
    return next((value for key, value in request.headers if key == name), b"")


def _refusal(request: h11.Request) -> tuple[int, str] | None:
    """Status and words for a request that is no program's call: one that a web page can send."""
    host = _header(request, b"host")
    if any(key == b"origin" for key, _ in request.headers):
        return 403, "not for web pages"
    if not is_of_this_machine(host):
        return 403, "the Host header names another machine: call this chain by its address"
    if request.method != b"POST":
        return 405, "POST JSON-RPC here"
    if _header(request, b"content-type").partition(b";")[0].strip().lower() != b"application/json":
        return 415, "the Content-Type of JSON-RPC is application/json"
    return None


def _depth(body: bytes) -> int:
    """How deep brackets nest. py-evm raises Python's recursion limit so far that the JSON parser would crash first."""
    depth = deepest = 0
    for bracket in BRACKETS.findall(body):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _failure(ident: Any, code: int, message: str, data: str | None = None) -> dict[str, Any]:
    error = {"code": code, "message": message} | ({} if data is None else {"data": data})
    return {"jsonrpc": "2.0", "id": ident, "error": error}
