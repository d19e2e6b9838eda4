"""Requests that make something, and what becomes of it where nobody hears of it.

With an `Idempotency-Key` an agent may send such a request again: the same key and body get the same answer and make
nothing new, whatever became of the first one (`actors/creations.py`); the same key with another body is refused. Without
one, what was made for a client that has left is taken back: nobody was told its id.
Our own, since the libraries for this keep answers in a cache beside the data: a crash between the two makes a thing twice.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import secrets
import uuid
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import trio
from quart import Response, g, request
from werkzeug.exceptions import RequestEntityTooLarge

from actors.kernel.machine import ActorFailed, AskTimeout, Busy
from golem.rest.edge import BODY_LIMIT, ApiError, ask, caller
from golem.rest.revocation import Receive, Scope, Send
from protocol.creations import BeginCreation, Creation, EndCreation
from protocol.types import Message

if TYPE_CHECKING:
    from golem.node.node import Node

HEADER = "Idempotency-Key"
MAX_KEY_CHARS = 255
ANSWER_TYPE = "application/json"
UNDO_S = 10.0
UNHEARD = "golem.unheard"  # in the scope of a request: what to say to whom if its client leaves

log = logging.getLogger("golem.rest")

Handler = Callable[[], Awaitable[Response]]


def repeatable(node: Node) -> Callable[[Handler], Handler]:
    """Return a decorator for a handler whose ids come from `fresh_id` or `fresh_uuid`, and its time from `creation_time`."""
    under_way: set[tuple[str, str]] = set()

    def decorate(handler: Handler) -> Handler:
        @functools.wraps(handler)
        async def wrapped() -> Response:
            sent = request.headers.get(HEADER)
            if sent is None:
                return await handler()
            owner, key = _digest(caller().identity, caller().name), _digest(caller().name, _checked(sent))
            if (owner, key) in under_way:
                raise ApiError(409, f"a request with this {HEADER} is being answered")
            under_way.add((owner, key))
            try:
                return await _once(node, handler, owner, key)
            finally:
                under_way.discard((owner, key))

        return wrapped

    return decorate


async def _once(node: Node, handler: Handler, owner: str, key: str) -> Response:
    try:
        sent = await request.get_data()
    except RequestEntityTooLarge:
        raise ApiError(413, f"the body is larger than {BODY_LIMIT} bytes") from None
    digest = hashlib.sha256(
        f"{request.method} {request.path}\n".encode() + (sent if isinstance(sent, bytes) else sent.encode())
    ).hexdigest()
    begin = BeginCreation(owner, key, digest, secrets.token_hex(16))
    known: Creation = await ask(node, "creations", begin, statuses={"conflict": 422})
    if known.status:
        return Response(known.answer, status=known.status, content_type=ANSWER_TYPE)
    g.creation, g.creation_key, g.made = known, (owner, key), 0
    try:
        response = await handler()
    except ApiError as error:
        if error.status < 500:  # nothing was made: the next one may be right
            await ask(node, "creations", EndCreation(owner, key, 0, b""))
        raise
    answer = await response.get_data(as_text=False)
    await ask(node, "creations", EndCreation(owner, key, response.status_code, answer))
    return response


def _checked(key: str) -> str:
    if not 1 <= len(key) <= MAX_KEY_CHARS or not key.isascii() or not key.isprintable():
        raise ApiError(400, f"header {HEADER}: expected 1 to {MAX_KEY_CHARS} printable ASCII characters")
    return key


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:40]


# -- what handlers take
def fresh_id(node: Node) -> str:
    """Return 32 hex digits: random ones, or those that the request's key stands for."""
    known: Creation | None = g.get("creation")
    if known is None:
        return node.new_id()
    g.made += 1
    return hashlib.sha256(f"{known.seed} {g.made}".encode()).hexdigest()[:32]


def fresh_uuid(node: Node) -> str:
    """Return the same as a UUID."""
    return str(uuid.UUID(fresh_id(node), version=4))


def creation_time(node: Node) -> float:
    """Return the time at which the thing was asked for first."""
    known: Creation | None = g.get("creation")
    return node.clock() if known is None else known.at


def undone_if_unheard(actor: str, undo: Message, *, always: bool = False) -> None:
    """Have `undo` said to an actor if the client of the request at hand leaves before it has the answer.

    With an Idempotency-Key what was made stays, since the client may come back for it; unless it costs by the second
    (`always`): then its key is forgotten as well.
    """
    scope: Any = request.scope
    undone: list[tuple[str, Message]] = scope.setdefault(UNHEARD, [])
    if g.get("creation") is None:
        undone.append((actor, undo))
    elif always:
        owner, key = g.creation_key
        undone += [(actor, undo), ("creations", EndCreation(owner, key, 0, b""))]


class Unheard:
    """An ASGI application around another: it takes back what was made for a client that left before it had the answer."""

    def __init__(self, node: Node, app: Any) -> None:
        self._node, self._app = node, app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        heard = False

        async def noting(event: Any) -> None:
            nonlocal heard
            await send(event)
            heard = heard or event["type"] == "http.response.start"

        try:
            await self._app(scope, receive, noting)
        finally:
            if not heard and (undone := scope.get(UNHEARD)):
                with trio.CancelScope(shield=True, deadline=trio.current_time() + UNDO_S):
                    for actor, message in undone:  # behind what the request itself has said to this actor
                        await self._undo(actor, message)

    async def _undo(self, actor: str, message: Message) -> None:
        try:
            await self._node.system.ask(actor, message, UNDO_S)
        except (Busy, AskTimeout, ActorFailed) as error:
            log.warning("%s was not told to take back what nobody heard of: %s", actor, error)
