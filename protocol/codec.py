"""The one file that knows how messages become bytes.

Wire and disk are MessagePack: msgspec encodes and validates typed messages; `msgpack.Unpacker` frames byte streams with
a hard buffer limit. Whatever the bytes are, decoding ends in a message or in `Violation`, in bounded time and memory.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Annotated, Any, Generic, TypeVar

import msgpack
import msgspec

from protocol.types import Message, Violation

MAX_FRAME_BYTES = 4 * 1024 * 1024  # a batch of envelopes, or one call, on any pipe or socket
MAX_BODY_BYTES = 1024 * 1024  # one message
MAX_BATCH = 64  # envelopes in a frame
MAX_ADDRESS_CHARS, MAX_TRACE_CHARS = 200, 64
MAX_MARKS = 8  # in an acknowledgement
MAX_UNDER_WAY = 320  # messages of a link that were sent and not acknowledged: a window, and a frame
MAX_ACK_BYTES = 4096
_NAME = re.compile(r"[A-Za-z0-9_.\-]{0,64}\Z")  # of an epoch, or of a start of a process
_ADDRESS = re.compile(r"[A-Za-z0-9_.:\-]{1,100}/[A-Za-z0-9_.:\-]{1,100}\Z")  # of an actor: it stands in logs and on terminals
_TRACE = re.compile(r"[A-Za-z0-9_.:/\-]*\Z")
_MARK = re.compile(r"\d{1,19}:[A-Za-z0-9_.\-]{0,64}\Z")
T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """A message on a link. `seq` counts the link's messages; `after` is the sequence number of the one before it.

    The two differ by more than one where messages in between passed their deadline and were given up. The first
    envelope under way comes after the last one that was acknowledged. `epoch` names this numbering of the link, which
    begins anew where a disk was lost or went back in time. `boot` names the start of the sender's process that numbered
    the message, `after_boot` the one that numbered `after`: see `actors/kernel/lineage.py`.
    """

    sender: str
    to: str
    epoch: str
    seq: int
    after: int
    trace: str
    body: bytes
    boot: str = ""
    after_boot: str = ""


class Ack(msgspec.Struct, frozen=True, array_like=True):
    """All messages of the link up to `have` are committed. `note` says why there may be no progress (`busy`, `gap`).

    Of the last ones up to `have`, `refused` were set aside, since they crashed their recipient: the sender hears of them.
    `boots` tells which starts of the sender numbered what is committed: the sender sees whether that was itself.
    """

    have: int
    note: str = ""
    boots: tuple[str, ...] = ()
    refused: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_UNDER_WAY + 1)] = ()


class Decoder(Generic[T]):
    """Decodes one type (or union of message types) and turns every failure into `Violation`."""

    def __init__(self, kind: Any, max_bytes: int = MAX_BODY_BYTES) -> None:
        self._decode = msgspec.msgpack.Decoder(kind).decode
        self._max_bytes = max_bytes

    def __call__(self, data: bytes) -> T:
        """Raises `Violation` for bytes that are no such message, or too many."""
        if len(data) > self._max_bytes:
            raise Violation(f"message of {len(data)} bytes is over the limit of {self._max_bytes}")
        try:
            return self._decode(data)  # type: ignore[no-any-return]
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, OverflowError, ValueError) as error:
            raise Violation(f"malformed message: {str(error)[:200]}") from None


def encode(value: Any) -> bytes:
    """Return the MessagePack form of a message, row or envelope."""
    return _encoder.encode(value)


# The length is checked before the first envelope is decoded: a frame of half a million empty ones costs nothing.
_batch = Decoder[list[Envelope]](Annotated[list[Envelope], msgspec.Meta(min_length=1, max_length=MAX_BATCH)], MAX_FRAME_BYTES)
_ack = Decoder[Ack](Ack, MAX_ACK_BYTES)


def encode_batch(envelopes: list[Envelope]) -> bytes:
    """Return a frame of envelopes, all of one link, in order."""
    return _encoder.encode(envelopes)


def decode_batch(frame: bytes) -> list[Envelope]:
    """Return 1 to 64 envelopes of one link in rising order. Raises `Violation`."""
    batch = _batch(frame)
    first, seq, boot = batch[0], 0, None
    if not (_ADDRESS.match(first.sender) and _ADDRESS.match(first.to)):
        raise Violation("an address is none")
    if not (_NAME.match(first.epoch) and _NAME.match(first.after_boot)):
        raise Violation("an epoch, or the name of a start, is none")
    for e in batch:
        if (e.sender, e.to, e.epoch) != (first.sender, first.to, first.epoch):
            raise Violation("a batch belongs to one link")
        if boot is not None and e.after_boot != boot:
            raise Violation("the starts of a batch do not follow one another")
        if e.boot != boot and not _NAME.match(e.boot):
            raise Violation("the name of a start is none")
        if not (0 <= e.after < e.seq < 2**63 and e.seq > seq and (not seq or e.after == seq)):
            raise Violation("sequence numbers of a batch do not rise one by one")
        if len(e.trace) > MAX_TRACE_CHARS or not _TRACE.match(e.trace):
            raise Violation("the name of a trace is none")
        if len(e.body) > MAX_BODY_BYTES:
            raise Violation("a message of the batch is too long")
        seq, boot = e.seq, e.boot
    return batch


def encode_ack(ack: Ack) -> bytes:
    """Return the bytes of an acknowledgement."""
    return _encoder.encode(ack)


def decode_ack(data: bytes) -> Ack:
    """Raises `Violation`."""
    ack = _ack(data)
    if not 0 <= ack.have < 2**63:
        raise Violation("acknowledged number out of range")
    if len(ack.boots) > MAX_MARKS or not all(map(_MARK.match, ack.boots)):
        raise Violation("an acknowledgement names no starts")
    return ack


class Framer:
    """Cuts a byte stream into MessagePack values of bounded size (pipes and Unix sockets of this machine)."""

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._unpacker = msgpack.Unpacker(
            max_buffer_size=max_bytes, strict_map_key=False, raw=False, max_ext_len=0, max_array_len=1 << 16, max_map_len=1 << 12
        )

    def feed(self, data: bytes | bytearray) -> Iterator[Any]:
        """Yield the values completed by `data`. Raises `Violation`."""
        try:
            self._unpacker.feed(data)
            yield from self._unpacker
        except (msgpack.exceptions.UnpackException, ValueError, TypeError, RecursionError, UnicodeDecodeError) as error:
            # TypeError: a map with a map or an array for a key, which no Python dict can hold
            raise Violation(f"malformed frame: {str(error)[:200] or type(error).__name__}") from None


def length_prefixed(frame: bytes) -> bytes:
    """Return `frame` behind its length as four bytes, big-endian (the framing between nodes)."""
    return struct.pack(">I", len(frame)) + frame


__all__ = [
    "MAX_BATCH",
    "MAX_BODY_BYTES",
    "MAX_FRAME_BYTES",
    "Ack",
    "Decoder",
    "Envelope",
    "Framer",
    "Message",
    "decode_ack",
    "decode_batch",
    "encode",
    "encode_ack",
    "encode_batch",
    "length_prefixed",
]
