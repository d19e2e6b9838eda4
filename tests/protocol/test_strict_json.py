"""JSON from outside: what is refused, and how the refusal names it."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from protocol.strict_json import MAX_DEPTH, MAX_VALUES, loads


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a":NaN}', "field `a`: NaN"), ('{"a":[1,-Infinity]}', "field `a.1`"), ('{"a":1e400}', "field `a`: 1e400"),
        ('{"a":{"b":' + "9" * 400 + "}}", r"field `a.b`: 9+\.\.\. of 400 characters"), ("1e999", r"field `\.`"),
        ('{"a":1,"b":2,"a":3}', "key appears twice: 'a'"), ('"\\ud800"', "half of a surrogate pair"),
        ('{"\\udfff":1}', "half of a surrogate pair"), ("[" * 101 + "]" * 101, f"more than {MAX_DEPTH} levels"),
        ("[" * 20_000 + "]" * 20_000, f"more than {MAX_DEPTH} levels"),
        ("[" + "1," * MAX_VALUES + "1]", f"more than {MAX_VALUES}"),
        ("", "Expecting value"), ("{", "Expecting property name"), ("[1] x", "Extra data"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_by_name(text: str, words: str) -> None:
    for data in (text, text.encode()):
        with pytest.raises(ValueError, match=words):
            loads(data)


@pytest.mark.parametrize("data", [b"\xff\xfe", b"\xef\xbb\xbf{}", '"\ud800"', "{}".encode("utf-16")])
def test_what_is_no_utf_8_is_refused(data: bytes | str) -> None:
    with pytest.raises(ValueError, match=r"."):
        loads(data)


def test_what_is_sound_is_as_the_standard_library_reads_it() -> None:
    text = '{"a":[1,2.5,-3e2,null,true,"\\ud83d\\ude00é"],"b":{"c":' + "9" * 40 + "}}"
    assert loads(text) == json.loads(text)
    assert loads("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    assert len(loads("[" + "1," * (MAX_VALUES - 2) + "1]")) == MAX_VALUES - 1


def test_exact_fractions_keep_their_digits() -> None:
    assert loads('{"a":0.10000000000000000555}', exact=True) == {"a": Decimal("0.10000000000000000555")}
    assert loads("[0.0,-0.0]", exact=True) == [0, 0]
    with pytest.raises(ValueError, match="field `0`"):
        loads("[1e99999]", exact=True)
