"""Websockets of the REST API: the limits that the HTTP server lacks, and how one is closed.

Hypercorn speaks the protocol and Quart hands messages over; a route is `@blueprint.websocket(...)`, asks `golem.rest.app`'s
rules like any other, and is cancelled when its client is gone.
"""

from __future__ import annotations

from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.protocol import ws_stream
from quart import websocket
from wsproto.events import Message
from wsproto.frame_protocol import CloseReason

MAX_MESSAGE_BYTES = 1 << 20  # a file's chunk is a quarter of it; a connection queues up to 20 messages
QUIET_S = 2.0
_MAX_REASON_BYTES = 123  # of a close frame


class _Buffer(ws_stream.WebsocketBuffer):
    """What has come of a message. Hypercorn's own notices that it is too long after keeping it, and keeps what follows."""

    def extend(self, event: Message) -> None:
        if self.length + len(event.data) > self.max_length:
            raise ws_stream.FrameTooLargeError
        super().extend(event)


class _Handshake(ws_stream.Handshake):
    """Declines compression: it would cost more than loopback does, and let 64 KiB received become 64 MiB."""

    def accept(self, subprotocol: str | None, additional_headers: Any) -> Any:
        self.extensions = None
        return super().accept(subprotocol, additional_headers)


def limit_websockets(settings: Config) -> None:
    """Set the server's limits.

    No pings: Hypercorn does not look for their answers, and its task of pings outlives the connection. TCP keep-alive (see
    `golem.node.bind_api`) finds clients that are gone.
    """
    settings.websocket_max_message_size = MAX_MESSAGE_BYTES
    settings.websocket_ping_interval = None
    ws_stream.WebsocketBuffer = _Buffer  # type: ignore[misc]
    ws_stream.Handshake = _Handshake  # type: ignore[misc]


async def close_websocket(code: CloseReason, reason: str = "") -> None:
    """Close the websocket at hand and take what is still under way, so that its client gets to read why."""
    await websocket.close(int(code), reason.encode()[:_MAX_REASON_BYTES].decode(errors="ignore"))
    while True:  # Quart cancels us when the client has closed
        with trio.move_on_after(QUIET_S):
            await websocket.receive()
            continue
        return
