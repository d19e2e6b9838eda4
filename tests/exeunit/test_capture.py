"""Capture modes, byte for byte."""

from __future__ import annotations

import msgspec
import pytest

from golem.exeunit.capture import CAPTURE_ALL, Collector, Output
from protocol.exeunit import CaptureMode

ABC = b"abcdefghij"


def mode(text: str) -> CaptureMode:
    return msgspec.json.decode(text, type=CaptureMode)


def collect(text: str, *chunks: bytes, max_bytes: int = 1 << 20) -> tuple[Output | None, list[Output]]:
    """Final value and live events."""
    collector = Collector(mode(text), max_bytes)
    events = [collector.feed(chunk) for chunk in chunks] + [collector.finish()]
    return collector.result(), [event for event in events if event is not None]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"atEnd": {}}', "abcdefghij"),
        ('{"atEnd": {"head": 4}}', "abcd"),
        ('{"atEnd": {"head": 0}}', None),
        ('{"atEnd": {"tail": 4}}', "ghij"),
        ('{"atEnd": {"tail": 99}}', "abcdefghij"),
        ('{"atEnd": {"headTail": 5}}', "abcij"),
        ('{"atEnd": {"headTail": 4}}', "abij"),
        ('{"atEnd": {"headTail": 1}}', "a"),
        ('{"atEnd": {"headTail": 99}}', "abcdefghij"),
        ('{"atEnd": {"head": 3, "format": "bin"}}', b"abc"),
        ('{"atEnd": {"tail": 2, "format": "binary"}}', b"ij"),
        ('{"stream": {"limit": 3, "format": "string"}}', "abc"),
        ('{"stream": {}}', "abcdefghij"),
    ],
)
@pytest.mark.parametrize("step", [1, 3, 10])
def test_final_value(text: str, expected: Output | None, step: int) -> None:
    chunks = [ABC[at : at + step] for at in range(0, len(ABC), step)]
    assert collect(text, *chunks)[0] == expected


def test_missing_side_and_silence_are_null() -> None:
    collector = Collector(None)
    assert (collector.feed(b"x"), collector.finish(), collector.result()) == (None, None, None)
    assert not collector.truncated
    assert collect('{"atEnd": {}}') == (None, [])
    assert collect('{"stream": {"format": "bin"}}', b"") == (None, [])


def test_at_end_emits_nothing_live() -> None:
    assert collect('{"atEnd": {}}', b"abc")[1] == []


def test_stream_emits_what_it_keeps() -> None:
    assert collect('{"stream": {"limit": 5}}', b"abc", b"def", b"ghi") == ("abcde", ["abc", "de"])
    assert collect('{"stream": {"format": "bin"}}', b"ab", b"c") == (b"abc", [b"ab", b"c"])


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_stream_never_splits_a_character(step: int) -> None:
    text = "aß€😀z"
    data = text.encode()
    final, events = collect('{"stream": {}}', *(data[at : at + step] for at in range(0, len(data), step)))
    assert final == text
    assert "".join(str(event) for event in events) == text
    assert all("\ufffd" not in str(event) and "Ã" not in str(event) for event in events)


def test_bytes_that_are_not_utf8_are_mapped_one_to_one() -> None:
    assert collect('{"stream": {}}', b"\xff\xfe", b"ok") == ("\xff\xfeok", ["\xff\xfe", "ok"])
    assert collect('{"atEnd": {}}', b"\xc3") == ("\xc3", [])
    # A character that never ends is told when the output does.
    assert collect('{"stream": {}}', b"a\xe2\x82") == ("a\xe2\x82", ["a", "\xe2\x82"])


def test_memory_is_bounded_whatever_the_mode() -> None:
    for text in ('{"atEnd": {}}', '{"stream": {}}', '{"atEnd": {"headTail": 1000000}}', '{"atEnd": {"tail": 1000000}}'):
        collector = Collector(mode(text), max_bytes=100)
        for _ in range(50):
            collector.feed(b"x" * 1000)
        assert len(str(collector.result())) == 100
        assert collector.truncated
        assert collector.total_bytes == 50_000


def test_truncated_tells_only_of_the_bound() -> None:
    collector = Collector(mode('{"atEnd": {"head": 2}}'), max_bytes=100)
    collector.feed(b"abc")
    assert not collector.truncated


def test_default_of_other_commands_streams_everything() -> None:
    collector = Collector(CAPTURE_ALL)
    assert collector.feed(b"x") == "x"
    assert collector.result() == "x"


@pytest.mark.parametrize(
    "text", ["{}", '{"atEnd": {"head": 1, "tail": 2}}', '{"atEnd": {"head": -1}}', '{"stream": {"limit": -5}}',
             '{"atEnd": {}, "stream": {}}'],
)  # fmt: skip
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="capture"):
        Collector(mode(text))
