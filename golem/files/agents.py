"""Files that an agent serves itself, over a websocket of `/gsb-api/v1`: golem-js's own way of transfer.

An agent opens a service for one published name and answers what others ask of it: for a download `GetMetadata` and `GetChunk`,
for an upload `UploadChunk` and `UploadFinished`. To `golem/files/server.py` a service is a `Source` or a `Sink` like any file, so
providers find it at `gftp://<node>/<name>`. Questions wait for a websocket, each until its deadline; a new websocket takes the
place of the former and is asked anew what that one has not answered. Frames are FlexBuffers (`golem/files/flexbuffers.py`):

    to the agent    {"id", "component", "payload"}
    from it         {"id", "payload"} or {"id", "error": {"<variant>": "<text>"}}

Neighbours: `golem/rest/gsb.py` has the endpoints.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import logging
import math
import re
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio
from wsproto.frame_protocol import CloseReason

from golem.files.flexbuffers import MAX_INTEGER, FrameFault, decode, encode
from golem.files.server import FileServer
from protocol.gftp import FileFault

log = logging.getLogger("golem.files.agents")

CHUNK_BYTES = 256 << 10
IN_FLIGHT = 8  # questions to one agent at once; further ones wait
ANSWER_TIMEOUT_S = 45.0  # below the time after which a reader or writer of a file gives up, so that it hears the reason
ABANDONED_S = 900.0  # without a websocket: the agent is gone
SWEEP_S = 60.0
MAX_SERVICES = 10_000
DOWNLOAD = frozenset({"GetMetadata", "GetChunk"})
UPLOAD = frozenset({"UploadChunk", "UploadFinished"})
VARIANTS = frozenset({"ReadError", "WriteError", "InternalError", "IntegrityError"})
_ADDRESS = re.compile(r"/public/gftp/([A-Za-z0-9._\-]{1,200})\Z")

Closing = tuple[CloseReason, str]


class ServiceRefused(Exception):
    """A service that cannot be opened; the text says why."""


class AgentSocket(Protocol):
    """An accepted websocket."""

    async def send(self, frame: bytes) -> None:
        """Send a binary frame."""

    async def receive(self) -> bytes | str | None:
        """Return the next message: bytes (or None for no bytes), str for a text frame."""


@dataclass(eq=False)
class _Question:
    frame: bytes
    answered: trio.Event = field(default_factory=trio.Event)
    carrier: Any = None  # the websocket that it was sent on
    payload: Any = None
    fault: FileFault | None = None

    def answer(self, payload: Any, fault: FileFault | None = None) -> None:
        self.payload, self.fault = payload, fault
        self.answered.set()


@dataclass(eq=False)
class _Carrier:
    """One websocket for as long as it serves."""

    connection: AgentSocket
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    closing: Closing | None = None

    def close(self, code: CloseReason, reason: str) -> None:
        self.closing = self.closing or (code, reason)
        self.scope.cancel()


class Conversation:
    """Questions to an agent and its answers, over one websocket after the other."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._unanswered: dict[str, _Question] = {}  # in the order of asking
        self._room = trio.Semaphore(IN_FLIGHT)
        self._news = trio.Event()  # something to send
        self._carrier: _Carrier | None = None
        self._ended = False
        self._left_at = trio.current_time()

    @property
    def alone_since(self) -> float:
        """When (on Trio's clock) the last websocket went; infinite while one is there."""
        return math.inf if self._carrier else self._left_at

    async def ask(self, component: str, payload: dict[str, Any] | None) -> Any:
        """Return the payload of the agent's answer. Raises `FileFault`: its own, or that there is none in time."""
        with trio.move_on_after(ANSWER_TIMEOUT_S):
            async with self._room:
                if self._ended:
                    raise _withdrawn()
                number = str(next(self._numbers))
                question = _Question(encode({"id": number, "component": component, "payload": payload}))
                self._unanswered[number] = question
                self._news.set()
                try:
                    await question.answered.wait()
                finally:
                    self._unanswered.pop(number, None)
            if question.fault is not None:
                raise question.fault
            return question.payload
        what = "does not answer" if self._carrier else "has not opened its websocket"
        text = f"the requestor's application {what}: {component} after {ANSWER_TIMEOUT_S:g} s"
        raise FileFault("InternalError", text, passing=True)

    async def serve(self, connection: AgentSocket) -> Closing:
        """Ask over a websocket until it ends (then we are cancelled) or is to be closed; returns with what."""
        if self._ended:
            return CloseReason.NORMAL_CLOSURE, "the service has ended"
        if self._carrier is not None:
            self._carrier.close(CloseReason.POLICY_VIOLATION, "another connection took this one's place")
        carrier = self._carrier = _Carrier(connection)
        try:
            with carrier.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._send, carrier)
                    await self._receive(carrier)
        finally:
            if self._carrier is carrier:
                self._carrier, self._left_at = None, trio.current_time()
        return carrier.closing or (CloseReason.NORMAL_CLOSURE, "")

    def end(self, code: CloseReason, reason: str) -> None:
        """Answer nothing any more: what is asked fails, the websocket is closed."""
        self._ended = True
        for question in list(self._unanswered.values()):
            question.answer(None, _withdrawn())
        if self._carrier is not None:
            self._carrier.close(code, reason)

    async def _send(self, carrier: _Carrier) -> None:
        while True:
            self._news = trio.Event()
            for question in list(self._unanswered.values()):
                if question.carrier is not carrier:
                    question.carrier = carrier
                    await carrier.connection.send(question.frame)
            await self._news.wait()

    async def _receive(self, carrier: _Carrier) -> None:
        while True:
            message = await carrier.connection.receive()
            if isinstance(message, str):
                return carrier.close(CloseReason.UNSUPPORTED_DATA, "expected binary frames")
            try:
                self._take(decode(message or b""))
            except FrameFault as fault:
                log.info("a websocket of /gsb-api is closed: %s", fault)
                return carrier.close(CloseReason.POLICY_VIOLATION, f"undecodable frame: {fault}")

    def _take(self, message: Any) -> None:
        match message:
            case {"id": str() as number, "error": error} if error is not None:
                fault: FileFault | None = _fault(error)
            case {"id": str() as number, "payload": _}:
                fault = None
            case _:
                raise FrameFault("neither an id and a payload nor an id and an error")
        question = self._unanswered.get(number)
        if question is None:
            log.debug("an answer too late, or to no question")
        elif not question.answered.is_set():
            question.answer(message.get("payload"), fault)


def _withdrawn() -> FileFault:
    return FileFault("InternalError", "the requestor's application has withdrawn it")


def _fault(error: Any) -> FileFault:
    """Return the fault that an agent tells: a variant with a text, or the variant alone."""
    variant, text = next(iter(error.items()), ("", None)) if isinstance(error, dict) else (error, None)
    if variant not in VARIANTS:
        variant, text = "InternalError", f"{str(variant)[:40]}: {text}"
    return FileFault(variant, f"the requestor's application: {str(text or variant)[:500]}")


def _nonsense(what: str) -> FileFault:
    return FileFault("InternalError", f"the requestor's application answers nonsense: {what}")


class Download:
    """What an agent publishes, as a `Source`."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._size: int | None = None

    async def size(self) -> int:
        if self._size is None:
            answer = await self._conversation.ask("GetMetadata", None)
            match answer:
                case {"fileSize": int() as size} if 0 <= size <= MAX_INTEGER and not isinstance(size, bool):
                    self._size = size
                case _:
                    raise _nonsense("no file size")
        return self._size

    async def read(self, offset: int, size: int) -> bytes:
        end = min(offset + size, await self.size())
        starts = range(offset, end, CHUNK_BYTES)
        chunks: dict[int, bytes] = {}
        failure: FileFault | None = None

        async def fetch(start: int) -> None:
            nonlocal failure
            try:
                chunks[start] = await self._chunk(start, min(CHUNK_BYTES, end - start))
            except FileFault as fault:
                failure = fault
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for start in starts:
                nursery.start_soon(fetch, start)
        if failure is not None:
            raise failure
        return b"".join(chunks[start] for start in starts)

    async def _chunk(self, offset: int, size: int) -> bytes:
        answer = await self._conversation.ask("GetChunk", {"offset": offset, "size": size})
        match answer:
            case {"content": bytes() as content, "offset": int(at) | float(at)} if at == offset:
                if len(content) > size:  # as when golem-js sends the whole memory behind a Node Buffer
                    raise _nonsense(f"{len(content)} bytes at {offset}, {size} were asked for")
                if len(content) < size:
                    raise FileFault("ReadError", f"the requestor's application ends {size - len(content)} bytes early")
                return content
        raise _nonsense("no chunk of the offset that was asked for")


class AgentUpload:
    """Where an agent takes an upload, as a `Sink`.

    Chunks go strictly in order, one after the other's answer: golem-js writes them as they come. It cannot be told to begin
    again either: of an upload that is repeated after a failure, what it has already is compared (by SHA-256) and left out.
    """

    hash_name = "sha3_256"  # what agents check

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._hash = hashlib.sha256()  # of what the agent has
        self._has = 0
        self._doubt = False  # whether it may have a chunk more than we know
        self._finished = False
        self._at = 0  # of the upload that is under way
        self._repeated = hashlib.sha256()  # of its beginning, as far as the agent has it

    async def begin(self) -> None:
        if self._doubt:
            raise FileFault("WriteError", "the requestor's application did not answer before: what it has is not known")
        self._at, self._repeated = 0, hashlib.sha256()

    async def write(self, offset: int, content: bytes) -> None:
        if offset != self._at:
            raise FileFault("WriteError", f"expected offset {self._at}, got {offset}")
        known = max(0, min(len(content), self._has - offset))
        if known:
            self._repeated.update(content[:known])
        if offset + known == self._has and self._repeated is not self._hash:
            self._check_repeated()
        for start in range(known, len(content), CHUNK_BYTES):
            await self._add(bytes(content[start : start + CHUNK_BYTES]))
        self._at = offset + len(content)

    def _check_repeated(self) -> None:
        """The point is reached up to which the agent has content."""
        if self._repeated.digest() != self._hash.digest():
            raise FileFault("WriteError", "the requestor's application has begun to take other content")
        self._repeated = self._hash

    async def _add(self, chunk: bytes) -> None:
        if self._finished:
            raise FileFault("WriteError", "the requestor's application has taken all that it waited for")
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True):
            await self._tell("UploadChunk", {"chunk": {"offset": self._has, "content": chunk}})
            self._hash.update(chunk)
            self._has += len(chunk)

    async def _tell(self, component: str, payload: dict[str, Any]) -> None:
        """Ask, under a shield (bounded by the answer's deadline): afterwards it is known whether the agent has it, or a doubt."""
        try:
            await self._conversation.ask(component, payload)
        except FileFault as fault:
            self._doubt = fault.passing
            raise

    async def finish(self, digest: str) -> None:
        if self._at != self._has:
            raise FileFault("WriteError", "the requestor's application has begun to take other content")
        if not self._finished:
            with trio.CancelScope(shield=True):
                await self._tell("UploadFinished", {"hash": digest})
                self._finished = True

    async def abort(self) -> None:
        """Nothing to take back: see the class."""


@dataclass(eq=False)
class Service:
    """A published name that an agent answers for. `owner` is the app-key that opened it."""

    id: str
    on: str
    name: str
    components: tuple[str, ...]
    owner: str
    conversation: Conversation


class Services:
    """The services of all agents. To be made and used within Trio."""

    def __init__(self, files: FileServer) -> None:
        self._files = files
        self._by_id: dict[str, Service] = {}

    def open(self, on: str, components: list[str], owner: str) -> Service:
        """Publish a name for an agent. Raises `ServiceRefused`."""
        match = _ADDRESS.match(on)
        if match is None:
            raise ServiceRefused(f"listen.on {on[:120]!r}: expected /public/gftp/<name> (letters, digits, . _ -)")
        if set(components) not in (DOWNLOAD, UPLOAD):
            raise ServiceRefused("listen.components: expected GetMetadata and GetChunk, or UploadChunk and UploadFinished")
        service_id = base64.urlsafe_b64encode(on.encode()).decode().rstrip("=")
        if service_id in self._by_id:
            raise ServiceRefused(f"{on} is served already")
        if len(self._by_id) >= MAX_SERVICES:
            raise ServiceRefused(f"more than {MAX_SERVICES} services")
        conversation = Conversation()
        service = Service(service_id, on, match[1], tuple(components), owner, conversation)
        what: Download | AgentUpload = Download(conversation) if set(components) == DOWNLOAD else AgentUpload(conversation)
        try:
            self._files.offer(service.name, what, service)
        except FileFault as fault:
            raise ServiceRefused(str(fault)) from None
        self._by_id[service_id] = service
        return service

    def find(self, service_id: str, owner: str) -> Service | None:
        """Return an app-key's service."""
        found = self._by_id.get(service_id.rstrip("="))
        return found if found is not None and found.owner == owner else None

    def close(self, service: Service, code: CloseReason = CloseReason.NORMAL_CLOSURE, reason: str = "") -> None:
        """Withdraw a service and close its websocket."""
        if self._by_id.pop(service.id, None) is not None:
            self._files.withdraw(service.name, service)
            service.conversation.end(code, reason)

    async def run(self, stopping: trio.Event) -> None:
        """Close what has been without a websocket for long, and everything when the node stops."""
        try:
            while not stopping.is_set():
                with trio.move_on_after(SWEEP_S):
                    await stopping.wait()
                for service in list(self._by_id.values()):
                    if trio.current_time() - service.conversation.alone_since >= ABANDONED_S:
                        log.info("%s is withdrawn: its application has been away for %g s", service.on, ABANDONED_S)
                        self.close(service)
        finally:
            for service in list(self._by_id.values()):
                self.close(service, CloseReason.GOING_AWAY, "the node is stopping")
