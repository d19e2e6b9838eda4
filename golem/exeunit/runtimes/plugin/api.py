"""Messages between an exe-unit and a runtime that is a service: length-delimited Protocol Buffers, encoded by hand.

    Request   id 1, one of: hello 2 {version 1}, run 10 {bin 1, args 2*}, kill 11 {pid 1, signal 2}, shutdown 12 {}
    Response  event 1, id 2, one of: error 3 {code 1, message 2}, hello 4 {version 1}, run 10 {pid 1}, kill 11 {},
              shutdown 12 {}, status 20 {pid 1, running 2, return_code 3, stdout 4, stderr 5},
              rt_status 21 {state 1 {name 1, value 2}, counter 2 {name 1, value 2}}

Two dozen lines of wire format spare a generated module and its library. What comes in is bounded and checked; unknown
fields are skipped, as the format asks for. Neighbour: `service`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MAX_FRAME_BYTES = 4 << 20
MAX_FIELDS = 10_000
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_HELLO, _RUN, _KILL, _SHUTDOWN = 2, 10, 11, 12


class ProtocolFault(Exception):
    """What came is no message of this protocol."""


@dataclass(frozen=True)
class ServiceFailed:
    """The service says no."""

    code: int
    message: str


@dataclass(frozen=True)
class Hello:
    """The service is there and speaks this version."""

    version: str


@dataclass(frozen=True)
class Started:
    """A command runs, under a number of the service's choosing."""

    pid: int


@dataclass(frozen=True)
class ServiceDone:
    """A kill or shutdown was carried out."""


@dataclass(frozen=True)
class Status:
    """News of a command: output, and whether it still runs."""

    pid: int
    running: bool
    return_code: int
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True)
class ServiceClaim:
    """What the service says of itself: a state, or a counter's value."""

    name: str
    value: bytes | float


@dataclass(frozen=True)
class Response:
    """An answer to request `id`, or an event of its own; `body` None: of a kind we do not know."""

    event: bool
    id: int
    body: ServiceFailed | Hello | Started | ServiceDone | Status | ServiceClaim | None


# -- out
def hello(number: int, version: str) -> bytes:
    return _request(number, _HELLO, _field(1, version.encode()))


def run(number: int, program: str, args: Sequence[str]) -> bytes:
    """`args[0]` is the command's own name."""
    return _request(number, _RUN, _field(1, program.encode()) + b"".join(_field(2, word.encode()) for word in args))


def kill(number: int, pid: int, signal: int) -> bytes:
    return _request(number, _KILL, _number(1, pid) + _number(2, signal))


def shutdown(number: int) -> bytes:
    return _request(number, _SHUTDOWN, b"")


def _request(number: int, tag: int, body: bytes) -> bytes:
    message = _number(1, number) + _field(tag, body)
    return varint(len(message)) + message


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _number(tag: int, value: int) -> bytes:
    return varint(tag << 3 | _VARINT) + varint(value)


def _field(tag: int, value: bytes) -> bytes:
    return varint(tag << 3 | _BYTES) + varint(len(value)) + value


# -- in
class Frames:
    """Cuts a stream into messages."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Take what arrived; yield the messages that are whole now. Raises `ProtocolFault`."""
        self._data += chunk
        while self._data:
            try:
                size, start = _read_varint(self._data, 0)
            except ProtocolFault:
                if len(self._data) < 10:
                    return  # the length itself is still on its way
                raise
            if size > MAX_FRAME_BYTES:
                raise ProtocolFault(f"a message of {size} bytes, at most {MAX_FRAME_BYTES}")
            if len(self._data) < start + size:
                return
            frame = bytes(self._data[start : start + size])
            del self._data[: start + size]
            yield frame


def _read_varint(data: bytes | bytearray, at: int) -> tuple[int, int]:
    """Return a number of at most 64 bits and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ProtocolFault("a number is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 1 << 64:
                break
            return value, at
    raise ProtocolFault("a number of more than 64 bits")


def _fields(data: bytes) -> dict[int, int | bytes]:
    """Return the last value of each field: an integer, or bytes (also of fixed width). Raises `ProtocolFault`."""
    found: dict[int, int | bytes] = {}
    at = 0
    for _ in range(MAX_FIELDS):
        if at == len(data):
            return found
        key, at = _read_varint(data, at)
        tag, kind = key >> 3, key & 7
        if kind == _VARINT:
            found[tag], at = _read_varint(data, at)
            continue
        if kind == _BYTES:
            size, at = _read_varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ProtocolFault(f"wire type {kind}")
        if size > len(data) - at:
            raise ProtocolFault("a field is cut off")
        found[tag] = data[at : at + size]
        at += size
    raise ProtocolFault(f"more than {MAX_FIELDS} fields")


class _Message:
    """Typed access to fields; a missing one is zero or empty, as the format has it."""

    def __init__(self, data: bytes) -> None:
        self.fields = _fields(data)

    def number(self, tag: int) -> int:
        value = self.fields.get(tag, 0)
        if not isinstance(value, int):
            raise ProtocolFault(f"field {tag} is no number")
        return value

    def signed(self, tag: int) -> int:
        """An int32: negative ones are sent as 64 bits."""
        value = self.number(tag) & 0xFFFFFFFF
        return value - (1 << 32) if value >= 1 << 31 else value

    def data(self, tag: int) -> bytes:
        value = self.fields.get(tag, b"")
        if not isinstance(value, bytes):
            raise ProtocolFault(f"field {tag} is no text")
        return value

    def text(self, tag: int) -> str:
        try:
            return self.data(tag).decode()
        except UnicodeDecodeError:
            raise ProtocolFault(f"field {tag} is not UTF-8") from None

    def message(self, tag: int) -> _Message:
        return _Message(self.data(tag))


def read_response(frame: bytes) -> Response:
    """Raises `ProtocolFault`."""
    whole = _Message(frame)
    return Response(bool(whole.number(1)), whole.number(2), _body(whole))


def _body(whole: _Message) -> ServiceFailed | Hello | Started | ServiceDone | Status | ServiceClaim | None:
    tags = [tag for tag in whole.fields if tag in (3, 4, 10, 11, 12, 20, 21)]
    if not tags:
        return None
    inner = whole.message(tags[-1])
    match tags[-1]:
        case 3:
            return ServiceFailed(inner.number(1), inner.text(2))
        case 4:
            return Hello(inner.text(1))
        case 10:
            return Started(inner.number(1))
        case 20:
            return Status(inner.number(1), bool(inner.number(2)), inner.signed(3), inner.data(4), inner.data(5))
        case 21:
            return _claim(inner)
    return ServiceDone()


def _claim(status: _Message) -> ServiceClaim | None:
    if 2 in status.fields:
        counter = status.message(2)
        value = counter.data(2)
        if len(value) not in (0, 8):
            raise ProtocolFault("a counter's value has no 64 bits")
        return ServiceClaim(counter.text(1), struct.unpack("<d", value)[0] if value else 0.0)
    if 1 in status.fields:
        state = status.message(1)
        return ServiceClaim(state.text(1), state.data(2))
    return None
