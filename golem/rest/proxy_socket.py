"""Websockets to a service inside an activity: a handshake with the service, then messages both ways.

Neighbour: `proxy.py`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Message,
    Ping,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import ProtocolError

from golem.interaction.broker import ServiceStream
from golem.rest.edge import ApiError
from golem.rest.proxy_rules import Header, Target
from golem.rest.sockets import MAX_MESSAGE_BYTES
from protocol.interaction import InteractionFault

HANDSHAKE_S = 30.0
_MAX_HEAD_BYTES = 64 << 10


async def relay_websocket(
    stream: ServiceStream, target: Target, headers: list[Header], scope: Any, receive: Any, send: Any
) -> None:
    """Join a client's websocket and a service's until one of them ends. Raises `ApiError` before the handshake is done."""
    await receive()  # websocket.connect
    relay = _Relay(stream, receive, send)
    with trio.move_on_after(HANDSHAKE_S) as limit:
        await relay.shake_hands(target, headers, scope["subprotocols"])
    if limit.cancelled_caught:
        raise ApiError(502, f"the service did not answer within {HANDSHAKE_S:g} s")
    await relay.run()


class _Relay:
    """The two ends. What the service sends in pieces goes on whole, within the bound of a message."""

    def __init__(self, stream: ServiceStream, receive: Any, send: Any) -> None:
        self._stream, self._receive, self._send = stream, receive, send
        self._service = WSConnection(ConnectionType.CLIENT)
        self._text: list[str] = []
        self._bytes = bytearray()
        self._size = 0
        self._sending = trio.Lock()  # both ways write to the service, and a frame goes in pieces

    async def shake_hands(self, target: Target, headers: list[Header], subprotocols: list[str]) -> None:
        passing = [(name, value) for name, value in headers if name not in (b"host", b"content-length", b"transfer-encoding")]
        request = Request(
            host=target.host.decode(), target=target.path.decode("latin-1"), subprotocols=subprotocols, extra_headers=passing
        )
        try:
            await self._stream.send_all(self._service.send(request))
            got = 0
            while True:
                for event in self._service.events():
                    match event:
                        case AcceptConnection(subprotocol=subprotocol):
                            await self._send({"type": "websocket.accept", "subprotocol": subprotocol, "headers": []})
                            return
                        case RejectConnection(status_code=status):
                            raise ApiError(status if 400 <= status < 600 else 502, f"the service answers with status {status}")
                        case RejectData():
                            pass
                data = await self._stream.receive_some()
                got += len(data)
                if not data or got > _MAX_HEAD_BYTES:
                    raise ApiError(502, "the service does not speak websocket")
                self._service.receive_data(data)
        except InteractionFault as error:
            raise ApiError(502, f"the connection to the service broke: {error}") from None
        except ProtocolError as error:
            raise ApiError(502, f"the service does not speak websocket: {error}") from None

    async def _tell_service(self, event: Any) -> None:
        async with self._sending:
            await self._stream.send_all(self._service.send(event))

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._until_end, self._from_client, nursery.cancel_scope)
            nursery.start_soon(self._until_end, self._from_service, nursery.cancel_scope)

    async def _until_end(self, way: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
        try:
            await way()
        except (InteractionFault, ProtocolError) as error:
            await self._close(CloseReason.INTERNAL_ERROR, f"the service's websocket broke: {error}")
        scope.cancel()

    async def _close(self, code: int, reason: str) -> None:
        await self._send({"type": "websocket.close", "code": code, "reason": reason.encode()[:120].decode(errors="ignore")})

    async def _from_client(self) -> None:
        while (message := await self._receive())["type"] == "websocket.receive":
            text = message.get("text")
            event: Message[Any] = TextMessage(text) if text is not None else BytesMessage(message["bytes"])
            await self._tell_service(event)
        code = message.get("code") or CloseReason.NORMAL_CLOSURE
        code = code if code not in (CloseReason.ABNORMAL_CLOSURE, CloseReason.NO_STATUS_RCVD) else CloseReason.GOING_AWAY
        await self._tell_service(CloseConnection(code=code))

    async def _from_service(self) -> None:
        while True:
            for event in self._service.events():
                match event:
                    case TextMessage() | BytesMessage():
                        if not await self._pass_on(event):
                            return
                    case Ping():
                        await self._tell_service(event.response())
                    case CloseConnection(code=code, reason=reason):
                        sayable = code if code != CloseReason.NO_STATUS_RCVD else CloseReason.NORMAL_CLOSURE
                        await self._close(sayable, reason or "")
                        return
            data = await self._stream.receive_some()
            if not data:
                await self._close(CloseReason.GOING_AWAY, "the service went away")
                return
            self._service.receive_data(data)

    async def _pass_on(self, event: TextMessage | BytesMessage) -> bool:
        """Pass a whole message on; returns False for one over the bound, which ends it all."""
        self._size += len(event.data)
        if self._size > MAX_MESSAGE_BYTES:
            await self._close(CloseReason.MESSAGE_TOO_BIG, f"the service sends a message over {MAX_MESSAGE_BYTES} bytes")
            return False
        if isinstance(event, TextMessage):
            if event.data:  # pieces without anything in them may come for ever
                self._text.append(event.data)
        else:
            self._bytes += event.data
        if event.message_finished:
            if isinstance(event, TextMessage):
                await self._send({"type": "websocket.send", "text": "".join(self._text)})
            else:
                await self._send({"type": "websocket.send", "bytes": bytes(self._bytes)})
            self._text, self._bytes, self._size = [], bytearray(), 0
        return True
