"""Capture modes, byte for byte."""

from __future__ import annotations

import msgspec
import pytest

from golem.exeunit.capture import CAPTURE_ALL, Collector, Output, fit_sides
from protocol.activity import output_size
from protocol.codec import MAX_BODY_BYTES, encode
from protocol.exeunit import CaptureMode, CommandFinished

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
        assert collector.fitted(60) == "x" * 60
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


MODES = ('{"atEnd": {}}', '{"atEnd": {"head": 900000}}', '{"atEnd": {"tail": 900000}}', '{"atEnd": {"headTail": 900000}}',
         '{"stream": {}}', '{"stream": {"format": "bin"}}', '{"atEnd": {"format": "bin"}}', None)  # fmt: skip


@pytest.mark.parametrize("out", MODES)
@pytest.mark.parametrize("err", MODES)
def test_both_sides_fit_into_one_message(out: str | None, err: str | None) -> None:
    """As encoded: a byte that is no UTF-8 becomes two."""
    for number, (first, second) in enumerate(((600_000, 600_000), (800_000, 10), (0, 2_000_000), (300_000, 300_000))):
        sides = [Collector(mode(text) if text else None) for text in (out, err)]
        for side, size, byte in zip(sides, (first, second), ((b"a", b"b"), (b"\xff", b"\xfe"))[number % 2], strict=True):
            for at in range(0, size, 65536):
                side.feed(byte * min(65536, size - at))
        found = fit_sides(*sides)
        encoded = encode(CommandFinished("b" * 32, 0, True, *found, "x" * 4000, 0.0, [0.0] * 64))
        assert len(encoded) < MAX_BODY_BYTES
        for side, text, value, size in zip(sides, (out, err), found, (first, second), strict=True):
            if text is None:
                assert value is None
            elif size and isinstance(value, str) and output_size(value) < min(side.size(), size):
                assert value.endswith(f"[cut by the provider: the output had {size} bytes, of which a result takes less]\n")
            elif not size:
                assert value is None


def test_what_is_cut_is_what_the_mode_asks_for_least() -> None:
    data = b"".join(b"%07d\n" % number for number in range(200_000))
    for text, first, last in (
        ('{"atEnd": {"head": 1500000}}', True, False), ('{"atEnd": {"tail": 1500000}}', False, True),
        ('{"atEnd": {"headTail": 1500000}}', True, True),
    ):  # fmt: skip
        side = Collector(mode(text))
        side.feed(data)
        value = fit_sides(side, Collector(None))[0]
        assert isinstance(value, str)
        assert (value.startswith("0000000\n"), "0199999\n" in value) == (first, last)
        assert "[cut by the provider" in value[-100:]


def test_streams_go_on_for_ever() -> None:
    """A service that logs for a week is heard for a week; the result keeps the beginning and says so."""
    side = Collector(mode('{"stream": {}}'), max_bytes=300)
    heard = "".join(str(side.feed(b"line\n")) for _ in range(1000))
    assert heard == "line\n" * 1000
    value = side.result()
    assert isinstance(value, str)
    assert value.startswith("line\n" * 20)
    assert value.endswith("[cut by the provider: the output had 5000 bytes, of which a result takes less]\n")
    bounded = Collector(mode('{"stream": {"limit": 7}}'), max_bytes=3)
    assert [bounded.feed(b"abcd") for _ in range(3)] == ["abcd", "abc", None]
