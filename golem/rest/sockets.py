"""Websockets of the REST API: how one is closed.

Hypercorn speaks the protocol within the bounds of `golem/rest/server.py`, and Quart hands messages over; a route is
`@blueprint.websocket(...)`, asks `golem.rest.app`'s rules like any other, and is cancelled when its client is gone.
"""

from __future__ import annotations

import trio
from quart import websocket
from wsproto.frame_protocol import CloseReason

from golem.rest.server import MAX_MESSAGE_BYTES

QUIET_S = 2.0
_MAX_REASON_BYTES = 123  # of a close frame


async def close_websocket(code: CloseReason, reason: str = "") -> None:
    """Close the websocket at hand and take what is still under way, so that its client gets to read why."""
    await websocket.close(int(code), reason.encode()[:_MAX_REASON_BYTES].decode(errors="ignore"))
    while True:  # Quart cancels us when the client has closed
        with trio.move_on_after(QUIET_S):
            await websocket.receive()
            continue
        return


__all__ = ["MAX_MESSAGE_BYTES", "close_websocket"]
