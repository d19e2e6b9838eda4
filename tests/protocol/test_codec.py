"""Bytes from strangers: golden vectors, a second decoder, and every kind of malice, each of which ends in `Violation`."""

from __future__ import annotations

import functools
import importlib
import json
import pkgutil
import tracemalloc
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import actors
import protocol
from protocol import codec
from protocol.activity import CommandResult
from protocol.codec import (
    MAX_BATCH,
    MAX_BODY_BYTES,
    MAX_FRAME_BYTES,
    Ack,
    Decoder,
    Envelope,
    Framer,
    decode_ack,
    decode_batch,
    encode,
    encode_ack,
    encode_batch,
    length_prefixed,
)
from protocol.signing import Document
from protocol.types import Message, Refused, Undelivered, Violation

GOLDEN = Path(__file__).parent / "golden"
MEMORY_LIMIT = 8 << 20  # bytes that decoding a hostile frame may take at its peak


class Pair(Message, frozen=True):
    """A message with most kinds of fields."""

    id: str
    count: int
    amount: float
    raw: bytes
    words: tuple[str, ...] = ()
    inner: Refused | None = None


class Other(Message, frozen=True):
    name: str


decode: Decoder[Any] = Decoder(Pair | Other)
ENVELOPE = Envelope("0x" + "1" * 40 + "/market", "0x" + "2" * 40 + "/market", "e1", 7, 6, "trace", encode(Other("x")))


# -- golden vectors: what was once on the wire stays readable
def golden() -> list[Any]:
    return [(path.stem, entry) for path in sorted(GOLDEN.glob("*.json")) for entry in json.loads(path.read_text())]


def built(kind: str, value: Any) -> Any:
    """Return the object that a golden vector describes."""
    if kind == "batch":
        return [Envelope(*fields[:6], bytes.fromhex(fields[6]), *fields[7:]) for fields in value]
    if kind == "ack":
        return Ack(*value[:2], *map(tuple, value[2:]))
    if kind == "document":
        return Document(value[0], bytes.fromhex(value[1]), bytes.fromhex(value[2]))
    return {"Refused": Refused, "Undelivered": Undelivered}[kind](
        *(bytes.fromhex(v[4:]) if isinstance(v, str) and v.startswith("hex:") else v for v in value)
    )


@pytest.mark.parametrize(("file", "entry"), golden(), ids=lambda one: one if isinstance(one, str) else one["name"])
def test_golden(file: str, entry: dict[str, Any]) -> None:
    raw, value = bytes.fromhex(entry["hex"]), built(entry["kind"], entry["value"])
    decoders: dict[str, Callable[[bytes], Any]] = {"batch": decode_batch, "ack": decode_ack, "document": Decoder(Document)}
    found = decoders.get(entry["kind"], Decoder(Refused | Undelivered))(raw)
    assert found == value
    assert encode(value) == raw
    # An independent decoder reads the same.
    assert msgpack.unpackb(raw) == msgpack.unpackb(msgpack.packb(msgspec.to_builtins(value, builtin_types=(bytes,))))


def test_new_fields_go_last_and_old_ones_stay_readable() -> None:
    class Old(Message, frozen=True, tag="Grown"):
        a: int

    class New(Message, frozen=True, tag="Grown"):
        a: int
        b: str = "default"

    assert Decoder[Any](New)(encode(Old(1))) == New(1)
    assert Decoder[Any](Old)(encode(New(1, "x"))) == Old(1)


# -- malice
def refuses(read: Callable[[bytes], Any], raw: bytes) -> None:
    """Assert that `raw` ends in `Violation`, within `MEMORY_LIMIT`."""
    tracemalloc.start()
    try:
        with pytest.raises(Violation):
            read(raw)
        assert tracemalloc.get_traced_memory()[1] < MEMORY_LIMIT
    finally:
        tracemalloc.stop()


READERS: dict[str, Callable[[bytes], Any]] = {"message": decode, "batch": decode_batch, "ack": decode_ack}


def test_truncated_at_every_length() -> None:
    pair = encode(Pair("id", 1, 2.5, b"raw", ("a", "b"), Refused("busy", "later")))
    for read, raw in ((decode, pair), (decode_batch, encode_batch([ENVELOPE])), (decode_ack, encode_ack(Ack(3, "gap")))):
        for length in range(len(raw)):
            with pytest.raises(Violation):
                read(raw[:length])
        with pytest.raises(Violation):
            read(raw + b"\x00")


@pytest.mark.parametrize("head", [b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"], ids=["array", "map", "bin", "str", "ext"])
@pytest.mark.parametrize("reader", READERS)
def test_four_gigabytes_claimed(reader: str, head: bytes) -> None:
    claim = head + b"\xff\xff\xff\xff"
    for raw in (claim, b"\x91" + claim, b"\x97" + claim, b"\x92\xa5Other" + claim, b"\x92\x01" + claim, claim + b"\x01" * 900):
        refuses(READERS[reader], raw)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("level", [b"\x91", b"\x81\xa1a", b"\x81\x81"], ids=["array", "map", "map as key"])
@pytest.mark.parametrize("depth", [10_000, 300_000])
def test_depth(reader: str, level: bytes, depth: int) -> None:
    deep = level * depth + b"\x01"
    for raw in (deep, b"\x92\xa5Other" + deep, b"\x97" + deep, b"\x92" + deep + deep):
        refuses(READERS[reader], raw)


@pytest.mark.parametrize("level", [b"\x91", b"\x81\xa1a", b"\x81\x81"], ids=["array", "map", "map as key"])
def test_deep_fields_that_nobody_reads(level: bytes) -> None:
    """A newer peer may send more fields than we know; what is in them is skipped, in bounded depth."""
    fields = b"\xa1a\xa1b\xa1c\x01\x00\xa0\xc4\x00"
    assert decode(b"\x93\xa5Other\xa1x" + b"\x91" * 50 + b"\x01") == Other("x")
    for head, read in ((b"\x93\xa5Other\xa1x", decode), (b"\x91\x98" + fields, decode_batch), (b"\x93\x01\xa0", decode_ack)):
        refuses(read, head + level * 300_000 + b"\x01")


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"\xc1", b"\xc0", b"\x01", b"\x90", b"\x91\xa5Nobod", b"\x92\xa6Nobody\xa1x", b"\x92\x01\xa1x", b"\x91\xa5Other",
        b"\x92\xa5Other\x01", b"\x92\xa5Other\xc4\x01x", b"\x92\xa5Other\xa2\xff\xfe", b"\x92\xa2\xff\xfe\xa1x",
        b"\x82\xa4type\xa5Other\xa4name\xa1x", b"\x82\xa4type\xa5Other\xa4type\xa5Other", b"\x92\xa5Other\xc7\x00\x05",
        encode(["Pair", "id", 2**64 - 1, 1.0, b"", [], None, "more"])[:-9], encode(["Pair", "id", "1", 1.0, b""]),
        encode(["Pair", "id", 1.5, 1.0, b""]), encode(["Pair", "id", 1, "x", b""]), encode(["Pair", 1, 1, 1.0, b""]),
        encode(["Pair", "id", True, 1.0, b""]), encode(["Pair", "id", 1, 1.0, b"", {"a": 1}]),
        encode(["Pair", "id", 1, 1.0, b"", [], ["Other", "x"]]),
    ],
)  # fmt: skip
def test_wrong_shapes(raw: bytes) -> None:
    refuses(decode, raw)


def test_messages_are_arrays_so_no_key_can_come_twice() -> None:
    """The form with names is not taken at all, whether its keys are unique or not."""
    refuses(Decoder[Any](Envelope), msgpack.packb({"sender": "a", "to": "b"}))
    refuses(decode, b"\x83\xa4type\xa5Other\xa4name\xa1x\xa4name\xa1y")


def change(**fields: Any) -> bytes:
    return encode_batch([msgspec.structs.replace(ENVELOPE, **fields)])


@pytest.mark.parametrize(
    "raw",
    [
        encode([]), encode_batch([ENVELOPE] * 2), change(seq=0), change(seq=-1), change(after=-1), change(after=7),
        change(seq=2**63), change(sender="x" * 201), change(to="x" * 201), change(epoch="x" * 65),
        change(trace="x" * 65),
        change(body=b"x" * (MAX_BODY_BYTES + 1)),
        encode_batch([ENVELOPE, msgspec.structs.replace(ENVELOPE, seq=9, after=8)]),
        encode_batch([ENVELOPE, msgspec.structs.replace(ENVELOPE, seq=8, after=7, epoch="e2")]),
        encode_batch([ENVELOPE, msgspec.structs.replace(ENVELOPE, seq=8, after=7, sender="0x3/market")]),
        encode_batch([msgspec.structs.replace(ENVELOPE, seq=i + 1, after=i) for i in range(MAX_BATCH + 1)]),
    ],
)  # fmt: skip
def test_batches_that_are_none(raw: bytes) -> None:
    refuses(decode_batch, raw)


def test_a_batch_of_half_a_million_envelopes_costs_nothing() -> None:
    one = encode(Envelope("", "", "", 1, 0, "", b""))
    refuses(decode_batch, b"\xdd" + (450_000).to_bytes(4, "big") + one * 450_000)


def test_sizes() -> None:
    refuses(decode_batch, b"\x91" + b"\xc0" * MAX_FRAME_BYTES)
    refuses(decode, b"\xc0" * (MAX_BODY_BYTES + 1))
    refuses(decode_ack, encode_ack(Ack(1, "x" * 4096)))
    refuses(decode_ack, encode_ack(Ack(99, "", (), tuple(range(1, 400)))))
    for have in (-1, 2**63):
        refuses(decode_ack, encode_ack(Ack(have)))
    full = [msgspec.structs.replace(ENVELOPE, seq=i + 1, after=i) for i in range(MAX_BATCH)]
    assert decode_batch(encode_batch(full)) == full
    assert length_prefixed(b"abc") == b"\x00\x00\x00\x03abc"


MUTABLE = [encode(Pair("id", 1, 2.5, b"raw", ("a", "b"), Refused("busy", "later"))), encode_batch([ENVELOPE]), encode_ack(Ack(3))]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from(MUTABLE), st.lists(st.tuples(st.integers(0, 200), st.binary(max_size=6)), min_size=1, max_size=4))
def test_mutations(raw: bytes, changes: list[tuple[int, bytes]]) -> None:
    """Whatever is changed, each decoder returns a value of its type or raises `Violation`."""
    for at, replacement in changes:
        at %= len(raw) + 1
        raw = raw[:at] + replacement + raw[at + max(len(replacement) - 1, 0) :]
    for read in READERS.values():
        try:
            read(raw)
        except Violation:
            continue


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.binary(max_size=300))
@example(b"\xdd\x00\xff\xff\xff" + b"\x91" * 300)
def test_noise(raw: bytes) -> None:
    for read in (*READERS.values(), lambda data: list(Framer(4096).feed(data))):
        try:
            read(raw)
        except Violation:
            continue


# -- streams
@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(-(2**63), 2**64 - 1) | st.text(max_size=20) | st.binary(max_size=20), max_size=10), st.data())
def test_a_stream_cut_anywhere_gives_the_same_values(values: list[Any], data: st.DataObject) -> None:
    raw = b"".join(encode(value) for value in values)
    framer, found = Framer(), []
    while raw:
        cut = data.draw(st.integers(1, len(raw)))
        found += list(framer.feed(raw[:cut]))
        raw = raw[cut:]
    assert found == values


@pytest.mark.parametrize(
    "raw",
    [
        b"\xc1", b"\xc6\x00\x10\x00\x00" + b"x" * 2000, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff",
        b"\xc9\x00\x00\x00\x01\x05x", b"\x91" * 10_000, b"\x81\x90\x00", b"\xa2\xff\xfe",
    ],
)  # fmt: skip
def test_streams_that_are_none(raw: bytes) -> None:
    refuses(lambda data: list(Framer(1000).feed(data)), raw)


def test_a_stream_is_buffered_up_to_its_limit_and_no_further() -> None:
    framer = Framer(100_000)

    def endless(_: bytes) -> None:
        list(framer.feed(b"\xc6\xff\xff\xff\xff"))
        for _ in range(1000):
            list(framer.feed(b"x" * 1000))

    refuses(endless, b"")


# -- what peers may send at all
def modules(package: types.ModuleType) -> Iterator[types.ModuleType]:
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not found.ispkg:
            yield importlib.import_module(found.name)


def message_classes() -> set[type]:
    return {
        kind for module in modules(protocol) for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__module__.startswith("protocol.")
    }  # fmt: skip


def peer_classes() -> set[type]:
    """Return the messages of all machines' `peer` unions, and the structs inside of them."""
    unions = [
        kind.peer for module in modules(actors) for kind in vars(module).values()
        if isinstance(kind, type) and kind.__module__ == module.__name__ and hasattr(kind, "peer") and hasattr(kind, "handle")
    ]  # fmt: skip
    return {part for union in unions for part in parts(union) if isinstance(part, type) and issubclass(part, msgspec.Struct)}


@functools.cache
def parts(annotation: Any) -> frozenset[Any]:
    """Return a type and all types it is made of."""
    found = {annotation, typing.get_origin(annotation)}
    for inner in typing.get_args(annotation):
        found |= parts(inner)
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        for field in typing.get_type_hints(annotation).values():
            found |= parts(field)
    return frozenset(found)


#: Captured output is text or bytes, which a typed field cannot say; the receiver checks it (`check_output`).
CHECKED_BY_HAND = {CommandResult}


def test_peers_send_no_maps_and_nothing_of_unknown_shape() -> None:
    """Maps may repeat keys, and values of any shape nest: documents travel as JSON text instead."""
    kinds = peer_classes()
    assert len(kinds) > 10
    for kind in kinds - CHECKED_BY_HAND:
        for part in parts(kind):
            open_shape = part is Any or part is object or (isinstance(part, type) and issubclass(part, Mapping | msgspec.Raw))
            assert not open_shape, f"{kind.__name__} carries {part}"


RENAMED = {  # classes that had another name once: journals hold messages with the tag of then
    "AcceptAgreement": "ApproveAgreement", "Accepted": "Done", "AnswerProposal": "CounterProposal",
    "EndAgreement": "TerminateAgreement", "PlaceOffer": "PublishOffer", "RefuseAgreement": "RejectAgreement",
    "RefuseProposal": "RejectProposal", "WriteInvoice": "IssueInvoice",
}  # fmt: skip


def test_messages_are_frozen_tagged_arrays() -> None:
    names: dict[str, type] = {}
    for kind in message_classes():
        if issubclass(kind, Message):
            config = kind.__struct_config__
            assert config.frozen, kind
            assert config.array_like, kind
            assert config.tag == RENAMED.get(kind.__name__, kind.__name__) or kind is Message, kind
            names[kind.__name__] = kind
    assert len(names) > 30


def test_the_codec_says_what_it_offers() -> None:
    for name in codec.__all__:
        assert hasattr(codec, name)
