"""Who loses its app-key loses what it has open: long-polls, event streams, websockets, and services in containers."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from golem.node.app_keys import AppKeys
from golem.rest.proxy_rules import header, key_of

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

POLICY_VIOLATION = 1008  # RFC 6455
REASON = "the app-key was removed"


def key_in(authorization: str, token: str) -> str:
    """Return the app-key of a request, by its header or by the query's `authToken`; "" for none."""
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key else token.strip()  # browsers can set no header of a websocket


class Revocable:
    """An ASGI application around another: it ends requests whose app-key is removed while they are open."""

    def __init__(self, keys: AppKeys, app: App) -> None:
        self._keys, self._app = keys, app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = _key_of(scope) if scope["type"] in ("http", "websocket") else ""
        if not key:  # whether it is one of ours the application says
            await self._app(scope, receive, send)
            return
        begun = False

        async def noting(event: Any) -> None:
            nonlocal begun
            begun = begun or event["type"] != "websocket.http.response.body"
            await send(event)

        with trio.CancelScope() as whole, self._keys.holding(key, whole.cancel):
            await self._app(scope, receive, noting)
        if not whole.cancelled_caught:
            return
        if not begun:
            await _refuse(scope, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": REASON})
        # an answer that has begun ends in the middle: the server closes the connection


def _key_of(scope: Scope) -> str:
    return key_in(header(scope["headers"], b"authorization").decode("latin-1"), key_of(scope["query_string"]))


async def _refuse(scope: Scope, send: Send) -> None:
    kind = "http.response" if scope["type"] == "http" else "websocket.http.response"
    body = json.dumps({"message": REASON}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": f"{kind}.start", "status": 401, "headers": headers})
    await send({"type": f"{kind}.body", "body": body, "more_body": False})
