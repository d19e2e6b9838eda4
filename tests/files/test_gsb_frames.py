"""FlexBuffers: what we write, the library reads; what others write, we read; what nobody should write does no harm."""

from __future__ import annotations

import array
import random
import resource
import struct
import time
from typing import Any

import pytest
from flatbuffers.flexbuffers import Builder, Dumps, Loads

from golem.files.flexbuffers import MAX_INTEGER, FrameFault, decode, encode

MESSAGES: list[Any] = [
    None, {}, "", b"", "text ü", b"\0\1", 7, {"id": "1", "component": "GetMetadata", "payload": None},
    {"id": "12", "component": "GetChunk", "payload": {"offset": 70_000, "size": 2**31}},
    {"id": "3", "component": "UploadChunk", "payload": {"chunk": {"offset": 0, "content": random.Random(1).randbytes(300_000)}}},
    {"id": "4", "component": "UploadFinished", "payload": {"hash": "ab" * 32}},
]  # fmt: skip
OTHERS: list[Any] = [
    [1, -2, "x", [1.5, True, None]], {"a": -5, "b": -(2**40), "c": [1, 2, 3], "d": {"e": b"xx" * 400}}, -7, 1.25, True,
    {"id": "1", "error": {"ReadError": "gone"}}, {"x": [{"y": "z"}] * 5}, [[], {}], ["a", "b"],
]  # fmt: skip


def flex(value: Any) -> bytes:
    return bytes(Dumps(value))


@pytest.mark.parametrize("value", MESSAGES)
def test_the_library_reads_what_we_write_and_so_do_we(value: Any) -> None:
    assert Loads(encode(value)) == decode(encode(value)) == value


@pytest.mark.parametrize("value", OTHERS)
def test_we_read_what_the_library_writes(value: Any) -> None:
    assert decode(flex(value)) == value


def test_vectors_of_one_type() -> None:
    for typecode, elements in (("b", [1, -2]), ("H", [1, 2, 65535]), ("d", [1.5, -2.5])):
        builder = Builder()
        builder.TypedVectorFromElements(array.array(typecode, elements))
        assert decode(bytes(builder.Finish())) == elements
    for elements in ([1, -2], [1.5, 2.5, 3.5], [1, 2, 3, 4]):
        builder = Builder()
        builder.FixedTypedVectorFromElements(elements)
        assert decode(bytes(builder.Finish())) == elements
    builder = Builder()
    builder.TypedVectorFromElements(["one", "two"], element_type=None)
    assert decode(bytes(builder.Finish())) == ["one", "two"]


def test_no_integer_of_ours_has_eight_bytes() -> None:
    """JavaScript reads an 8-byte integer as a BigInt, and adding that to a number throws."""
    for offset in (2**31 - 1, 2**31, 2**32 - 1, 2**32, 5 << 40, MAX_INTEGER):
        frame = encode({"payload": {"offset": offset, "size": 262_144}})
        found = decode(frame)["payload"]
        assert found == {"offset": offset, "size": 262_144}
        assert type(found["offset"]) is (float if offset >= 2**32 else int)
        assert type(found["size"]) is int
        assert struct.pack("<Q", 262_144) not in frame, "size stands in a vector of 8-byte elements"
    for bad in (-1, MAX_INTEGER + 1):
        with pytest.raises(FrameFault, match="out of range"):
            encode(bad)
    with pytest.raises(TypeError):
        encode(1.5)


def nested(depth: int) -> bytes:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return flex(value)


def many_references() -> bytes:
    """A vector of 900 pointers to one text of 200 kB: 180 MB if they were followed."""
    builder = Builder(share_strings=True)
    with builder.Vector():
        for _ in range(900):
            builder.String("x" * 200_000)
    return bytes(builder.Finish())


def self_reference() -> bytes:
    # a vector of one vector: itself. Size 1, then the element: its pointer leads nowhere further back than itself
    return bytes([1, 0, 40, 2, 40, 1])


@pytest.mark.parametrize(("frame", "reason"), [
    (b"", "shorter"), (b"\0\0", "shorter"), (b"\0\0\3", "width of a root"), (b"\0\0\x08", "width of a root"),
    (nested(20), "deeper"), (flex(list(range(2000))), "values"), (flex([[0] * 40] * 40), "values"),
    (many_references(), "again and again"), (self_reference(), "deeper"),
    (b"\x05\x28\x01", "leads out"), (b"\x05\x14\x01", "leads out"), (bytes([255, 0, 100, 1]), "leads out"),
    (bytes([0, 0xFF << 2 & 0xFF, 1]), "no type"), (b"\0\x0c\x01", "no float"),
    (flex({"a" * 300: 1}), "key without an end"), (flex(b"\xff").replace(b"\x64", b"\x14"), "UTF-8"),
    (bytes(flex({"aa": 1, "bb": 2})).replace(b"bb", b"aa"), "twice"),
])  # fmt: skip
def test_hostile_frames_are_refused(frame: bytes, reason: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FrameFault, match=reason):
        decode(frame)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000, "KiB"


def test_bent_frames_are_read_or_refused_and_nothing_else() -> None:
    dice = random.Random(4711)
    frames = [*map(flex, OTHERS), *map(encode, MESSAGES)]
    slowest_s, read = 0.0, 0
    for _ in range(15_000):
        frame = bytearray(dice.choice(frames)[-400:] if dice.random() < 0.9 else dice.randbytes(dice.randrange(64)))
        for _ in range(dice.randrange(6)):
            if frame:
                frame[-1 - min(int(dice.expovariate(0.05)), len(frame) - 1)] = dice.randrange(256)
        began = time.perf_counter()
        try:
            decode(bytes(frame))
            read += 1
        except FrameFault:
            pass
        slowest_s = max(slowest_s, time.perf_counter() - began)
    assert read > 500
    assert slowest_s < 0.2
