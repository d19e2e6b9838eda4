"""Where mail, live calls and byte streams go: to this node's system, over the network, or down the bus to a process.

An address or call target `exeunit:<activity>` belongs to the process of that name on the bus of the activity's node.
Neighbours: `actors/kernel` (whose `Transport` the router is), `golem/net`, `golem/bus/server.py`; `golem/daemon.py` wires them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec
import trio

from actors.kernel.machine import LinkDown
from golem.bus.server import Bus, BusPeer
from golem.net.types import NetRefusal, PeerStream, RemoteError, Unreachable
from protocol.codec import MAX_FRAME_BYTES, Decoder, decode_batch, encode
from protocol.exeunit import EXEUNIT
from protocol.types import Violation, actor_of, node_id, node_of

log = logging.getLogger("golem.bus.router")

MAIL, CALL = "mail", "call"
UNIT_CALLS = ("gftp:", "unit:")  # what an exe-unit may ask of its own node; `cli:` calls give keys away
MAIL_TIMEOUT_S = 10.0
MAX_CALL_S = 60.0
SPLICE_BYTES = 1 << 18

CallHandler = Callable[[str, bytes], Awaitable[bytes]]
LocalHandler = Callable[[BusPeer, bytes], Awaitable[bytes]]
StreamHandler = Callable[[str, Any], Awaitable[None]]
Deliver = Callable[[bytes, str], Awaitable[bytes]]


class Net(Protocol):
    """What the router needs of `golem.net.Network`."""

    def serve(self, service: str, handler: Callable[[str, bytes], Awaitable[bytes]]) -> None: ...

    async def request(self, node_id: str, service: str, payload: bytes, timeout_s: float = 10) -> bytes: ...

    def serve_stream(self, name: str, handler: Callable[[str, PeerStream], Awaitable[None]]) -> None: ...

    async def open_stream(self, node_id: str, name: str, timeout_s: float = 10) -> PeerStream: ...


class _CallFrame(msgspec.Struct, frozen=True, array_like=True):
    target: str
    timeout_s: float
    payload: bytes


_call_frame = Decoder[_CallFrame](_CallFrame, MAX_FRAME_BYTES)


class Calls:
    """Live calls: question and answer without a journal. They may be lost, and then the caller hears of it."""

    def __init__(self, me: str, network: Net, bus: Bus) -> None:
        self._me, self._network, self._bus = me, network, bus
        self._handlers: dict[str, CallHandler] = {}
        network.serve(CALL, self._incoming)

    def serve(self, target: str, handler: CallHandler) -> None:
        """Answer calls to `target`: `handler(sender node, payload)`. It refuses by raising `RemoteError`."""
        self._handlers[target] = handler

    async def call(self, node: str, target: str, payload: bytes, timeout_s: float = 10) -> bytes:
        """Call a target of a node, which may be ours. Raises `Unreachable` and `RemoteError` (the callee's no)."""
        if node == self._me:
            return await self.local(self._me, target, payload, timeout_s)
        frame = encode(_CallFrame(target, timeout_s, payload))
        try:
            return await self._network.request(node, CALL, frame, timeout_s)
        except RemoteError as error:
            if str(error).startswith(_DOWN):
                raise Unreachable(str(error).removeprefix(_DOWN)) from None
            raise

    async def local(self, sender: str, target: str, payload: bytes, timeout_s: float = 10) -> bytes:
        """Bring a call of node `sender` to its target here. Raises `Unreachable`, `RemoteError`."""
        if target.startswith(EXEUNIT):
            return await self._bus.call(target, sender, target, payload, min(timeout_s, MAX_CALL_S))
        handler = self._handlers.get(target)
        if handler is None:
            raise RemoteError(f"no such call: {target[:80]}")
        with trio.move_on_after(min(timeout_s, MAX_CALL_S)):
            return await handler(sender, payload)
        raise Unreachable(f"{target[:80]} took longer than {timeout_s:g} s")

    async def _incoming(self, sender: str, frame: bytes) -> bytes:
        try:
            call = _call_frame(frame)
            if not 0 < call.timeout_s <= MAX_CALL_S * 2:
                raise Violation("a call's time limit is out of range")
            return await self.local(sender, call.target, call.payload, call.timeout_s)
        except Unreachable as error:
            raise NetRefusal(_DOWN + str(error)) from None
        except (RemoteError, Violation) as error:
            raise NetRefusal(str(error)) from None


_DOWN = "down: "  # marks a refusal that says: the target is not there now


class Router:
    """The kernel's transport, and the other end of the bus. Make the system with it, then `attach` the system."""

    def __init__(self, me: str, network: Net, bus: Bus) -> None:
        self._me, self._network, self._bus = me, network, bus
        self.calls = Calls(me, network, bus)
        self._deliver: Deliver | None = None
        self._local: dict[str, LocalHandler] = {}
        self._streams: dict[str, StreamHandler] = {}
        network.serve(MAIL, self._mail_from_network)
        bus.on_mail, bus.on_call, bus.on_stream = self._mail_from_bus, self._call_from_bus, self._stream_from_bus

    def attach(self, deliver: Deliver) -> None:
        """`deliver(frame, peer)` is the system's."""
        self._deliver = deliver

    def serve_local(self, target: str, handler: LocalHandler) -> None:
        """Answer calls of bus clients alone, never of other nodes: `handler(client, payload)` (`cli:status`)."""
        self._local[target] = handler

    def on_leave(self, callback: Callable[[BusPeer], None]) -> None:
        """Have `callback(client)` called when the connection of a bus client has ended."""
        self._bus.on_leave.append(callback)

    def serve_stream(self, name: str, handler: StreamHandler) -> None:
        """Serve byte streams of a name, from other nodes and from the bus: `handler(sender node, stream)`."""
        self._streams[name] = handler
        self._network.serve_stream(name, handler)

    async def open_stream(self, node: str, name: str) -> PeerStream:
        """Open a byte stream to a handler of another node. Raises `Unreachable`, `RemoteError`."""
        return await self._network.open_stream(_checked(node), name)

    # -- mail
    async def exchange(self, node: str, frame: bytes) -> bytes:
        """Kernel transport. Raises `LinkDown`."""
        if node == self._me:
            return await self._bus.mail(actor_of(decode_batch(frame)[0].to), frame)
        try:
            return await self._network.request(node, MAIL, frame, MAIL_TIMEOUT_S)
        except (Unreachable, RemoteError) as error:
            raise LinkDown(str(error)) from None

    async def _mail_from_network(self, sender: str, frame: bytes) -> bytes:
        try:
            first = decode_batch(frame)[0]
            if node_of(first.sender) != sender:
                raise Violation(f"{sender} sends in the name of {first.sender}")
            return await self._to_here(first.to, frame, sender)
        except (LinkDown, Violation) as error:
            raise NetRefusal(str(error)) from None

    async def _mail_from_bus(self, client: BusPeer, frame: bytes) -> bytes:
        first = decode_batch(frame)[0]
        if not client.name.startswith(EXEUNIT) or first.sender != f"{self._me}/{client.name}":
            raise Violation(f"{client.name} sends in the name of {first.sender}")
        if node_of(first.to) == self._me:
            return await self._to_here(first.to, frame, first.sender)
        return await self.exchange(_checked(node_of(first.to)), frame)

    async def _to_here(self, to: str, frame: bytes, peer: str) -> bytes:
        if node_of(to) != self._me:
            raise Violation(f"not for this node: {to}")
        if actor_of(to).startswith(EXEUNIT):
            return await self._bus.mail(actor_of(to), frame)
        if self._deliver is None:
            raise LinkDown("the node is starting")
        return await self._deliver(frame, peer)

    # -- calls and streams of the bus
    async def _call_from_bus(self, client: BusPeer, node: str, target: str, payload: bytes) -> bytes:
        if client.name.startswith(EXEUNIT) and not (node in ("", self._me) and target.startswith(UNIT_CALLS)):
            raise RemoteError(f"not for exe-units: {target[:80]}")
        if node in ("", self._me):
            if (handler := self._local.get(target)) is not None:
                return await handler(client, payload)
            return await self.calls.local(self._me, target, payload, MAX_CALL_S)
        return await self.calls.call(_checked(node), target, payload, MAX_CALL_S)

    async def _stream_from_bus(self, node: str, name: str) -> Callable[[trio.SocketStream], Awaitable[None]]:
        """Return who serves a stream of a bus client. Raises `Unreachable`, `RemoteError`."""
        if node in ("", self._me):
            handler = self._streams.get(name)
            if handler is None:
                raise RemoteError(f"unknown stream {name[:80]!r}")

            async def serve(stream: trio.SocketStream) -> None:
                await _welcome(stream, self._me)
                await handler(self._me, stream)

            return serve
        far = await self._network.open_stream(_checked(node), name)

        async def carry(stream: trio.SocketStream) -> None:
            try:
                await _welcome(stream, self._me)
                await splice(stream, far)
            finally:
                with trio.CancelScope(shield=True):
                    await far.aclose()

        return carry


def _checked(node: str) -> str:
    try:
        return node_id(node)
    except ValueError as error:
        raise RemoteError(str(error)) from None


async def _welcome(stream: trio.SocketStream, node_id: str) -> None:
    await stream.send_all(encode(["welcome", node_id]))


async def splice(near: Any, far: Any, linger_s: float = math.inf) -> None:
    """Carry bytes both ways between two streams until both have ended, or one broke.

    `linger_s`: how long `near` may keep its way open when `far` has ended its own.
    """

    async def carry(source: Any, sink: Any, scope: trio.CancelScope) -> None:
        try:
            while data := await source.receive_some(SPLICE_BYTES):
                await sink.send_all(data)
            await sink.send_eof()
            if source is far:
                scope.deadline = trio.current_time() + linger_s
        except (Unreachable, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            log.debug("spliced stream ended: %s", error)
            scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(carry, near, far, nursery.cancel_scope)
        nursery.start_soon(carry, far, near, nursery.cancel_scope)
