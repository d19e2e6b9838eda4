"""Activity API, HTTP services inside a running activity: `/activity-api/v1/activity/{id}/proxy-http/{url}`, any method.

`{url}` names the service by its port and the path there: `8080/items?all=1` or `http://localhost:8080/items?all=1`.
Where it begins with neither, all of it is the path, and the port is the only one that the image exposes, or 80.

Bodies stream both ways as fast as the slower side takes them (chunked answers and server-sent events work), and so do
websockets. What is of one connection only is not passed on. The guest never sees the app-key: `Authorization: Bearer`,
`authToken` of the query and a `Referer` with one are taken out; `Authorization` of other schemes belongs to the service.
The provider is a stranger to the user's browser: pages get a sandbox of their own (Content-Security-Policy), and a
browser's cookies stay here, since they are those of every program at this address. A page opened with `authToken` is
opened with a ticket in its place (`proxy_tickets.py`): its scripts can read their address. `Location` leads back through
here, never to the node's own API.
Failures of the service are 502 with a reason.

This is an ASGI application before Quart's, which keeps bodies in memory. Neighbours: `golem/interaction/broker.py` opens the
connection, `proxy_rules.py` says which headers pass, `golem/rest/app.py` who may ask.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import h11
import trio
from quart import Response

from golem.interaction.broker import ServiceStream
from golem.rest.activity import find
from golem.rest.edge import ApiError, Caller
from golem.rest.interaction import api_error
from golem.rest.proxy_rules import Header, Target, cross_origin, forwarded, has_key, header, is_from_browser, key_of, returned
from golem.rest.proxy_socket import relay_websocket
from golem.rest.proxy_tickets import Tickets, opens_page, with_ticket
from protocol.interaction import InteractionFault
from protocol.states import Role

if TYPE_CHECKING:
    from golem.node.node import Node

log = logging.getLogger("golem.rest")

Asgi = Callable[[Any, Any, Any], Awaitable[None]]
Admit = Callable[[str, str, str], Caller | Response]

MAX_HEAD_BYTES = 64 << 10  # of an answer's status line and headers
_PATH = re.compile(rb"(/activity-api/v1/activity/([^/]{1,64})/proxy-http)(?:/(.*))?\Z", re.DOTALL)


class Proxy:
    """The application; what is not for it goes to `inner`.

    `admit(authorization, token, path)` returns who asks, or the answer to one who may not.
    """

    def __init__(self, node: Node, inner: Asgi, admit: Admit) -> None:
        self._node, self._inner, self._admit = node, inner, admit
        self._tickets = Tickets()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        match = None
        if scope["type"] in ("http", "websocket"):
            match = _PATH.match(scope.get("raw_path") or quote(scope["path"]).encode())
        if match is None or (scope.get("method") == "OPTIONS" and header(scope["headers"], b"access-control-request-method")):
            await self._inner(scope, receive, send)  # what browsers ask before they ask is the application's to answer
            return
        trace = secrets.token_hex(6)
        more: list[Header] = [(b"x-trace-id", trace.encode())]
        begun = False

        async def tell(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        source = _Source(receive)
        try:
            refusal = await self._serve(match, scope, source, tell, more)
        except InteractionFault as fault:
            refusal = api_error(fault).response()
        except ApiError as error:
            refusal = error.response()
        except Exception as error:
            # a bug of ours is this request's end, not the server's
            log.error("proxy-http failed (trace %s)", trace, exc_info=error)
            refusal = ApiError(500, f"internal error (trace {trace})").response()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.drain)
            if refusal is not None and not begun:
                await answer(scope, send, refusal, more)
                nursery.cancel_scope.cancel()

    async def _serve(self, match: re.Match[bytes], scope: Any, source: _Source, send: Any, more: list[Header]) -> Response | None:
        """Serve one request; returns the refusal to one who may not ask. `more`: headers that every answer gets."""
        headers, query = scope["headers"], scope["query_string"]
        authorization, token = header(headers, b"authorization").decode("latin-1"), key_of(query)
        activity_id = match[2].decode("latin-1")
        app_key = self._tickets.app_key(token, activity_id)
        who = self._admit(authorization, app_key or token, scope["path"])
        if isinstance(who, Response):
            return who
        more += cross_origin(headers, {*self._node.config.allow_origins, *who.allow_origins})
        row = find(self._node, activity_id, Role.REQUESTOR)
        if token and app_key is None and scope["type"] == "http" and opens_page(headers):
            more.append((b"referrer-policy", b"no-referrer"))
            here = with_ticket(match[0], query, self._tickets.issue(activity_id, token))
            return Response(b"", 307, {"Location": here, "Cache-Control": "no-store"})
        target = Target(match[1], match[3] or b"", query, header(headers, b"host"))
        if scope.get("method") == "CONNECT":
            raise ApiError(405, "CONNECT is not for services")
        service = await self._node.interactions.connect(row, target.port)
        try:
            # a page's requests bear a ticket in place of the key: they end with it, as those that bear the key (`revocation`)
            with trio.CancelScope() as whole, self._node.app_keys.holding(app_key or "", whole.cancel):
                if scope["type"] == "websocket":
                    await relay_websocket(service, target, forwarded(headers, target), scope, source.receive, send)
                else:
                    await _Exchange(service, target, source.receive, send, more).run(scope, self._node.stopping)
        finally:
            with trio.CancelScope(shield=True):
                await service.aclose()
        return None


class _Source:
    """What comes from the client.

    All of it must be taken, answered or not: Hypercorn cannot end a connection while what it has read waits for us.
    """

    def __init__(self, receive: Any) -> None:
        self._receive, self._ended = receive, False

    async def receive(self) -> Any:
        message = await self._receive()
        kind = message["type"]
        self._ended = kind.endswith(".disconnect") or (kind == "http.request" and not message.get("more_body"))
        return message

    async def drain(self) -> None:
        """Take what still comes, to the end of the body or until the client leaves."""
        while not self._ended:
            await self.receive()


class _Exchange:
    """One request and its answer."""

    def __init__(self, service: ServiceStream, target: Target, receive: Any, send: Any, more: list[Header]) -> None:
        self._service, self._target, self._receive, self._send, self._more = service, target, receive, send, more
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._fault: ApiError | None = None
        self._writing = trio.CancelScope()
        self._to_browser = self._keyed = False

    async def run(self, scope: Any, stopping: trio.Event) -> None:
        """Raises `ApiError`; an answer that has begun then ends before its end, and the server breaks the connection."""
        self._to_browser, self._keyed = is_from_browser(scope["headers"]), has_key(scope["headers"])
        headers = forwarded(scope["headers"], self._target)
        names = {name for name, _ in headers}
        with_body = b"content-length" in names or b"transfer-encoding" in names
        if scope["http_version"] not in ("1.0", "1.1") and not with_body and scope["method"] not in ("GET", "HEAD"):
            headers.append((b"transfer-encoding", b"chunked"))  # HTTP/2 tells the end of a body by itself
            with_body = True
        try:
            request = h11.Request(method=scope["method"], target=self._target.path, headers=headers)
            head = self._http.send(request) or b""
            if not with_body:
                head += self._http.send(h11.EndOfMessage()) or b""
        except h11.LocalProtocolError as error:
            raise ApiError(400, f"the request cannot be passed on: {error}") from None
        try:
            await self._service.send_all(head)
        except InteractionFault as error:
            raise ApiError(502, f"the service does not take the request: {error}") from None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._upload, with_body, nursery.cancel_scope)
            nursery.start_soon(self._download, nursery.cancel_scope)
            nursery.start_soon(self._watch_node, stopping, nursery.cancel_scope)
        if self._fault is not None:
            log.info("proxy-http: %s", self._fault)
            raise self._fault

    async def _watch_node(self, stopping: trio.Event, scope: trio.CancelScope) -> None:
        await stopping.wait()
        self._fault = ApiError(503, "the node is stopping")
        scope.cancel()

    async def _upload(self, with_body: bool, scope: trio.CancelScope) -> None:
        """Pass the body on, and see to it that a client that leaves ends it all."""
        writing = with_body
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                scope.cancel()
                return
            if not writing or self._writing.cancel_called:
                continue
            try:
                data = self._http.send(h11.Data(message["body"])) if message.get("body") else b""
                if not message.get("more_body"):
                    writing = False
                    data = (data or b"") + (self._http.send(h11.EndOfMessage()) or b"")
                if data:
                    with self._writing:
                        await self._service.send_all(data)
                    self._writing = trio.CancelScope() if not self._writing.cancel_called else self._writing
            except InteractionFault:
                writing = False  # who receives hears why
            except h11.LocalProtocolError as error:
                self._fault = ApiError(400, f"the body is not what its headers say: {error}")
                scope.cancel()
                return

    async def _download(self, scope: trio.CancelScope) -> None:
        try:
            while not await self._one_event():
                pass
        except ApiError as error:
            self._fault = error
        except h11.RemoteProtocolError as error:
            self._fault = ApiError(502, f"the service's answer is not HTTP: {error}")
        except InteractionFault as fault:
            self._fault = ApiError(502, f"the connection to the service broke: {fault}")
        scope.cancel()

    async def _one_event(self) -> bool:
        """Pass on what came next; returns whether that was the end."""
        match self._http.next_event():
            case h11.NEED_DATA:
                data = await self._service.receive_some()
                if not data and self._http.their_state is h11.SEND_RESPONSE:
                    raise ApiError(502, "the service closed the connection without an answer")
                self._http.receive_data(data)
            case h11.Response() as response:
                found = list(response.headers)
                headers = returned(found, self._target, to_browser=self._to_browser, keyed=self._keyed) + self._more
                await self._send({"type": "http.response.start", "status": response.status_code, "headers": headers})
            case h11.Data(data=data):
                await self._send({"type": "http.response.body", "body": bytes(data), "more_body": True})
            case h11.EndOfMessage():
                self._writing.cancel()  # what it did not read before it answered, it does not want
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})
                return True
            case h11.ConnectionClosed() | h11.PAUSED:
                raise ApiError(502, "the service's answer came before its time")
        return False


async def answer(scope: Any, send: Any, response: Response, more: list[Header]) -> None:
    """Send an answer of our own, to a request or to the handshake of a websocket."""
    body: Any = await response.get_data(as_text=False)
    headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in response.headers.items()] + more
    kind = "http.response" if scope["type"] == "http" else "websocket.http.response"
    await send({"type": f"{kind}.start", "status": response.status_code, "headers": headers})
    await send({"type": f"{kind}.body", "body": body, "more_body": False})
