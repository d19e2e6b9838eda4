"""FlexBuffers, the encoding of frames on the websocket of `/gsb-api/v1` (see `golem/files/agents.py`).

A schema-less format in which every value points backwards to its parts. The PyPI library writes it here; its reader follows
any pointer, so what comes from outside is read by our own: within bounds, to a depth, a number of values and a number of bytes.
"""

from __future__ import annotations

import struct
from typing import Any

from flatbuffers.flexbuffers import Builder, Type

MAX_DEPTH = 8  # the deepest message has 3
MAX_VALUES = 1000
MAX_KEY_BYTES = 256
MAX_INTEGER = (1 << 53) - 1  # beyond it JavaScript's numbers are not exact

_SIGNED = {1: "<b", 2: "<h", 4: "<i", 8: "<q"}
_FLOATS = {4: "<f", 8: "<d"}
_INDIRECT = {Type.INDIRECT_INT: Type.INT, Type.INDIRECT_UINT: Type.UINT, Type.INDIRECT_FLOAT: Type.FLOAT}


class FrameFault(ValueError):
    """Not a FlexBuffers message, or one over the limits."""


def encode(value: Any) -> bytes:
    """Return the message of a value made of dict, str, int, bytes and None.

    An integer over 32 bits is written as a float: an 8-byte integer becomes a BigInt in JavaScript, which cannot be added
    to a number. Raises `FrameFault` for integers under 0 or over `MAX_INTEGER`.
    """
    builder = Builder()
    _write(builder, value)
    return bytes(builder.Finish())


def _write(builder: Builder, value: Any) -> None:
    match value:
        case None:
            builder.Null()
        case str():
            builder.String(value)
        case bytes():
            builder.Blob(value)
        case int() if not 0 <= value <= MAX_INTEGER:
            raise FrameFault(f"{value} is out of range")
        case int() if value >> 32:
            builder.IndirectFloat(float(value), 8)  # inline it would widen its neighbours to 8 bytes
        case int():
            builder.UInt(value)
        case dict():
            with builder.Map():
                for key, member in value.items():
                    builder.Key(key)
                    _write(builder, member)
        case _:
            raise TypeError(f"no message holds a {type(value).__name__}")


def decode(data: bytes) -> Any:
    """Return the value of a message: dict, list, str, int, float, bool, bytes or None. Raises `FrameFault`."""
    if len(data) < 3:
        raise FrameFault("shorter than any message")
    width = data[-1]
    if width not in _SIGNED or len(data) < width + 2:
        raise FrameFault(f"{width} is not the width of a root")
    return _Reader(data).value(len(data) - 2 - width, width, data[-2], 0)


class _Reader:
    """One message. `at` is the position of a value or a pointer, `width` its size in bytes; a kind also tells a width."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._values_left = MAX_VALUES
        self._bytes_left = len(data) + 4096  # parts may be shared, but not to make much of little

    def value(self, at: int, width: int, packed: int, depth: int) -> Any:
        """Return the value whose type, and whose parts' width, `packed` tells."""
        self._take_values(1)
        if depth > MAX_DEPTH:
            raise FrameFault(f"deeper than {MAX_DEPTH}")
        kind, inner = packed >> 2, 1 << (packed & 3)
        if kind == Type.NULL:
            return None
        if kind <= Type.FLOAT or kind == Type.BOOL:
            return self._number(kind, at, width)
        target = self._follow(at, width)
        match kind:
            case Type.KEY:
                return self._key(target)
            case Type.STRING:
                return self._text(self._sized(target, inner))
            case Type.BLOB:
                return self._sized(target, inner)
            case Type.MAP:
                return self._map(target, inner, depth)
            case Type.VECTOR:
                size = self._size(target, inner)
                return [self._element(target, inner, size, number, depth) for number in range(size)]
            case Type.INDIRECT_INT | Type.INDIRECT_UINT | Type.INDIRECT_FLOAT:
                return self._number(_INDIRECT[Type(kind)], target, inner)
        return self._typed_vector(kind, target, inner)

    # -- parts
    def _take_values(self, count: int) -> None:
        self._values_left -= count
        if self._values_left < 0:
            raise FrameFault(f"more than {MAX_VALUES} values")

    def _raw(self, at: int, size: int) -> bytes:
        if at < 0 or at + size > len(self._data):
            raise FrameFault("a pointer or size leads out of the message")
        return self._data[at : at + size]

    def _unsigned(self, at: int, width: int) -> int:
        return int.from_bytes(self._raw(at, width), "little")

    def _follow(self, at: int, width: int) -> int:
        """Return where a pointer leads: back, or (to what is empty) nowhere."""
        distance = self._unsigned(at, width)
        if distance > at:
            raise FrameFault("a pointer or size leads out of the message")
        return at - distance

    def _size(self, target: int, width: int) -> int:
        """Return the number of elements of a vector, which stands before it."""
        size = self._unsigned(target - width, width)
        if size > self._values_left:
            raise FrameFault(f"more than {MAX_VALUES} values")
        return size

    def _number(self, kind: int, at: int, width: int) -> int | float | bool:
        raw = self._raw(at, width)
        if kind == Type.FLOAT:
            if width not in _FLOATS:
                raise FrameFault(f"no float has {width} bytes")
            number: float = struct.unpack(_FLOATS[width], raw)[0]
            return number
        if kind == Type.BOOL:
            return any(raw)
        return int.from_bytes(raw, "little", signed=kind == Type.INT)

    def _sized(self, target: int, width: int) -> bytes:
        """Return the bytes behind their length."""
        size = self._unsigned(target - width, width)
        self._take_bytes(size)
        return self._raw(target, size)

    def _take_bytes(self, size: int) -> None:
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise FrameFault("the same bytes again and again")

    def _key(self, target: int) -> str:
        end = self._data.find(0, target, target + MAX_KEY_BYTES + 1)
        if end < 0:
            raise FrameFault(f"a key without an end within {MAX_KEY_BYTES} bytes")
        self._take_bytes(end - target)
        return self._text(self._data[target:end])

    @staticmethod
    def _text(raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise FrameFault("a text is not UTF-8") from None

    # -- vectors
    def _element(self, target: int, width: int, size: int, number: int, depth: int) -> Any:
        packed = self._raw(target + size * width + number, 1)[0]
        return self.value(target + number * width, width, packed, depth + 1)

    def _map(self, target: int, width: int, depth: int) -> dict[str, Any]:
        size = self._size(target, width)
        keys = self._follow(target - 3 * width, width)
        keys_width = self._unsigned(target - 2 * width, width)
        if keys_width not in _SIGNED or self._unsigned(keys - keys_width, keys_width) != size:
            raise FrameFault("a map without the keys of its values")
        found = {}
        for number in range(size):
            key = self._key(self._follow(keys + number * keys_width, keys_width))
            found[key] = self._element(target, width, size, number, depth)
        if len(found) != size:
            raise FrameFault("a key appears twice")
        return found

    def _typed_vector(self, kind: int, target: int, width: int) -> list[Any]:
        """Return a vector of one type: without a table of types, and with 2 to 4 elements also without its size."""
        if Type.VECTOR_INT <= kind <= Type.VECTOR_STRING_DEPRECATED or kind == Type.VECTOR_BOOL:
            size, element = self._size(target, width), kind - Type.VECTOR_INT + Type.INT
        elif Type.VECTOR_INT2 <= kind <= Type.VECTOR_FLOAT4:
            size, element = (kind - Type.VECTOR_INT2) // 3 + 2, (kind - Type.VECTOR_INT2) % 3 + Type.INT
        else:
            raise FrameFault(f"there is no type {kind}")
        self._take_values(size)
        places = range(target, target + size * width, width)
        if element in (Type.KEY, Type.STRING):
            return [self._key(self._follow(at, width)) for at in places]
        return [self._number(element, at, width) for at in places]
