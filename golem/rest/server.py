"""Hypercorn, the HTTP server of the REST API, with what it lacks: bounds for websockets, and an end for every connection.

Each amendment has its reason beside it; `tests/rest/test_gsb.py` and `tests/rest/test_rest_stopping.py` fail without them.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

import hypercorn.trio
import hypercorn.trio.run
import trio
from hypercorn.config import Config
from hypercorn.events import Event, Updated
from hypercorn.protocol import ws_stream
from hypercorn.trio.tcp_server import TCPServer
from wsproto.events import Message

log = logging.getLogger("golem.http")

MAX_MESSAGE_BYTES = 1 << 20  # of a websocket: a file's chunk is a quarter of it; a connection queues up to 20 messages
MAX_HEADERS_BYTES = 64 << 10
BACKLOG = 1024  # connections that the kernel keeps until they are accepted; Hypercorn sets the listening socket's anew


class _Places:
    """The open connections of a server: where there are more than `most`, the one that is idle for longest is closed."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0
        self._idle: dict[_Connection, None] = {}  # since the longest first

    def idle(self, connection: _Connection, is_idle: bool) -> None:
        self._idle.pop(connection, None)
        if is_idle:
            self._idle[connection] = None

    async def make_room(self) -> None:
        if self.taken > self.most and self._idle:
            oldest = next(iter(self._idle))
            del self._idle[oldest]
            log.info("%d connections are open, %d may be: an idle one is closed", self.taken, self.most)
            await trio.aclose_forcefully(oldest.stream)


class ServerSettings(Config):
    """Hypercorn's settings, and the places of this server."""

    places = _Places(1 << 30)


class _Connection(TCPServer):
    """A client's connection that ends when it should.

    At the end of an answer Hypercorn tells the application that the exchange is over, and Quart then cancels the task that says
    so: without a shield it gets neither to closing the connection nor to counting its idle time. A client may be gone before
    its answer is over: then the idle time would begin when nobody reads any more, and keep the socket to its end.
    """

    is_read = True

    @property
    def _places(self) -> _Places:
        """Those of its server; a server with plain settings (tests have some) has no bound."""
        return self.config.places if isinstance(self.config, ServerSettings) else ServerSettings.places

    async def run(self) -> None:
        places = self._places
        places.taken += 1
        places.idle(self, True)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end_with_server)
                await places.make_room()
                await super().run()
                nursery.cancel_scope.cancel()
        except* Exception as failed:  # bytes that Hypercorn stumbles over end their connection, not the node
            log.info("a connection failed: %s", "; ".join(map(repr, failed.exceptions)))
        finally:
            places.taken -= 1
            places.idle(self, False)

    async def _end_with_server(self) -> None:
        """Close on those who take nothing of what is sent: sending is under a shield, and would hold up the stop."""
        await self.context.terminated.wait()
        await trio.sleep(self.config.graceful_timeout * 0.9)
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(self.stream)

    async def _read_data(self) -> None:
        try:
            await super()._read_data()
        finally:
            self.is_read = False
            await self.idle_task.stop()

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, Updated):
            if not self.is_read:
                return
            self._places.idle(self, event.idle)
        # busy: another task is just closing it, so that nobody reads what is said now
        with trio.CancelScope(shield=True), suppress(trio.BusyResourceError):
            await super().protocol_send(event)

    async def _close(self) -> None:
        with trio.CancelScope(shield=True):
            await super()._close()


class _Buffer(ws_stream.WebsocketBuffer):
    """What has come of a message. Hypercorn's own notices that it is too long after keeping it, and keeps what follows."""

    def extend(self, event: Message[Any]) -> None:
        if self.length + len(event.data) > self.max_length:
            raise ws_stream.FrameTooLargeError
        super().extend(event)


class _Handshake(ws_stream.Handshake):
    """Declines compression: it would cost more than loopback does, and let 64 KiB received become 64 MiB."""

    def accept(self, subprotocol: str | None, additional_headers: Any) -> Any:
        self.extensions = None
        return super().accept(subprotocol, additional_headers)


def server_settings(grace_s: float, keep_alive_s: float, most_connections: int) -> ServerSettings:
    """Return Hypercorn's settings: at a stop, open requests have `grace_s`; idle connections are kept for `keep_alive_s`,
    while no more than `most_connections` are open.

    No pings on websockets: Hypercorn does not look for their answers, and its task of pings outlives the connection. TCP
    keep-alive (see `golem.node.listen.bind_api`) finds clients that are gone.
    """
    hypercorn.trio.run.TCPServer = _Connection  # type: ignore[attr-defined]
    ws_stream.WebsocketBuffer = _Buffer  # type: ignore[misc]
    ws_stream.Handshake = _Handshake  # type: ignore[misc]
    settings = ServerSettings()
    settings.places = _Places(most_connections)
    settings.backlog = BACKLOG
    settings.graceful_timeout = settings.shutdown_timeout = grace_s
    settings.keep_alive_timeout = keep_alive_s
    settings.h11_max_incomplete_size = MAX_HEADERS_BYTES
    settings.websocket_max_message_size = MAX_MESSAGE_BYTES
    settings.websocket_ping_interval = None
    settings.loglevel = "WARNING"
    settings.errorlog = log
    return settings
