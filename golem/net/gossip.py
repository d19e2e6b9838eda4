"""Gossip: best-effort broadcast of small payloads on topics, over gossipsub 1.1.

A message is MessagePack [expires_at, node record of the origin, [payload, ...]]: what is published within a moment goes
out as one message. It is signed by the origin's key (gossipsub's strict signing), so the origin is who it says, and the
record tells receivers where to dial it. Delivery happens in the validator, so that what a handler finds invalid is not
forwarded; handlers run in tasks of their own and the validator itself never raises.
Neighbours: `host.py` owns the pubsub service, `network.py` the queue of what is to be published.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from typing import Any

import msgpack
import trio
from libp2p.peer.id import ID

from golem.net.host import Libp2pHost
from golem.net.peerid import MAX_RECORD_BYTES, NodeRecord, node_id_of, pubkey_of, read_record
from golem.net.types import MAX_GOSSIP_BYTES
from protocol.types import MAX_CLOCK_SKEW_S

log = logging.getLogger(__name__)

LIFE_S = 300
MAX_MESSAGE_BYTES = MAX_GOSSIP_BYTES + MAX_RECORD_BYTES + 1024
MAX_BATCH = 256  # payloads in a message
MAX_QUEUE = 1024  # payloads waiting to go out; above, the oldest are dropped
MAX_SEEN = 8192
MAX_RUNNING = 64  # handlers at a time; above, messages are forwarded unread
BATCH_WINDOW_S = 0.005
RATE_PER_S = 20.0
BURST = 20.0
VERDICT_TIMEOUT_S = 4.0  # gossipsub gives a validator five

TopicHandler = Callable[[str, bytes], Awaitable[bool]]


class Outbox:
    """What waits to be published; outlives a restart of the host."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[str, bytes, float]] = deque(maxlen=MAX_QUEUE)
        self.wake = trio.Event()

    def put(self, topic: str, payload: bytes) -> None:
        """Never waits; drops the oldest when full."""
        self._waiting.append((topic, payload, time.time() + LIFE_S))
        self.wake.set()

    def take(self) -> tuple[str, list[bytes], float] | None:
        """The next batch: one topic, payloads, seconds since the epoch when the first expires. None when empty."""
        now = time.time()
        while self._waiting and self._waiting[0][2] <= now:
            self._waiting.popleft()
        if not self._waiting:
            self.wake = trio.Event()
            return None
        topic, first, expires_at = self._waiting.popleft()
        batch, size, rest = [first], len(first), []
        for item in self._waiting:
            if item[0] == topic and len(batch) < MAX_BATCH and size + len(item[1]) + 8 <= MAX_GOSSIP_BYTES:
                batch.append(item[1])
                size += len(item[1]) + 8
            else:
                rest.append(item)
        self._waiting.clear()
        self._waiting.extend(rest)
        return topic, batch, expires_at


class _Verdict:
    def __init__(self) -> None:
        self.done = trio.Event()
        self.valid = True


class Gossip:
    """Gossip on one running host."""

    def __init__(
        self,
        host: Libp2pHost,
        network: str,
        outbox: Outbox,
        handlers: dict[str, TopicHandler],
        record: Callable[[], NodeRecord],
        on_record: Callable[[NodeRecord], None],
    ) -> None:
        self._host = host
        self._pubsub = host.pubsub
        self._network = network
        self._outbox = outbox
        self._handlers = handlers
        self._record = record
        self._on_record = on_record
        self._seen: OrderedDict[bytes, _Verdict] = OrderedDict()
        self._running = 0
        self._nursery: trio.Nursery | None = None
        self._joined: set[str] = set()

    async def run(self) -> None:
        """Publish and deliver until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                for topic in list(self._handlers):
                    await self.join(topic)
                await self._publish_loop()
        finally:
            self._nursery = None

    async def join(self, topic: str) -> None:
        """Take part in a topic that has a handler. No-op when we do."""
        if self._nursery is None or topic in self._joined:
            return
        self._joined.add(topic)
        wire_topic = f"{self._network}/{topic}"

        async def validate(forwarder: Any, message: Any) -> bool:
            try:
                return forwarder == self._pubsub.my_id or await self._accept(topic, message)
            except ValueError as error:
                log.debug("gossip that %s forwarded: %s", forwarder, error)
            except Exception:
                # A validator that raises is our bug, and upstream it can cost the process.
                log.exception("gossip on %s", topic)
            return False

        self._pubsub.set_topic_validator(wire_topic, validate, True)
        subscription = await self._pubsub.subscribe(wire_topic)
        self._nursery.start_soon(self._drain, subscription)

    # outgoing

    async def _publish_loop(self) -> None:
        tokens, last = BURST, trio.current_time()
        while True:
            await self._outbox.wake.wait()
            await trio.sleep(BATCH_WINDOW_S)
            while (batch := self._outbox.take()) is not None:
                now = trio.current_time()
                tokens, last = min(BURST, tokens + (now - last) * RATE_PER_S), now
                if tokens < 1:
                    await trio.sleep((1 - tokens) / RATE_PER_S)
                tokens -= 1
                topic, payloads, expires_at = batch
                data = msgpack.packb([int(expires_at), self._record().raw, payloads])
                await self._pubsub.publish(f"{self._network}/{topic}", data)

    # incoming

    @staticmethod
    async def _drain(subscription: Any) -> None:
        """Messages were delivered by the validator; here they are only taken away, or the library warns of each."""
        while True:
            await subscription.get()

    async def _accept(self, topic: str, message: Any) -> bool:
        data: bytes = message.data
        if len(data) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {len(data)} bytes")
        origin = node_id_of(pubkey_of(str(ID(message.from_id))))
        digest = hashlib.sha256(topic.encode() + b"\0" + origin.encode() + data).digest()
        verdict = self._seen.get(digest)
        if verdict is None:
            payloads = self._open(origin, data)
            verdict = self._seen[digest] = _Verdict()
            while len(self._seen) > MAX_SEEN:
                self._seen.popitem(last=False)
            self._start(topic, origin, payloads, verdict)
        with trio.move_on_after(VERDICT_TIMEOUT_S):
            await verdict.done.wait()
        return verdict.valid

    def _open(self, origin: str, data: bytes) -> list[bytes]:
        try:
            expires_at, raw_record, payloads = msgpack.unpackb(data, max_array_len=MAX_BATCH, max_map_len=0)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise ValueError(f"a malformed message of {origin}") from error
        if type(expires_at) is not int or not time.time() < expires_at <= time.time() + LIFE_S + MAX_CLOCK_SKEW_S:
            raise ValueError(f"a message of {origin} that is too old or from the future")
        record = read_record(raw_record, self._network)
        if record.node_id != origin:
            raise ValueError(f"a message of {origin} with the record of {record.node_id}")
        if not isinstance(payloads, list) or not all(isinstance(payload, bytes) for payload in payloads):
            raise ValueError(f"a malformed message of {origin}")
        self._on_record(record)
        return payloads

    def _start(self, topic: str, origin: str, payloads: list[bytes], verdict: _Verdict) -> None:
        if self._nursery is None or self._running >= MAX_RUNNING:
            log.debug("gossip of %s on %s passes unread: too much at once", origin, topic)
            verdict.done.set()
            return
        self._running += 1
        self._nursery.start_soon(self._deliver, topic, origin, payloads, verdict)

    async def _deliver(self, topic: str, origin: str, payloads: list[bytes], verdict: _Verdict) -> None:
        try:
            for payload in payloads:
                verdict.valid = await self._handlers[topic](origin, payload) and verdict.valid
        except Exception:
            # A handler that raises is our own bug: it must not stop the gossip, nor be spread by it.
            log.exception("handler of gossip on %s", topic)
            verdict.valid = False
        finally:
            self._running -= 1
            verdict.done.set()
