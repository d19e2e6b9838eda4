"""Wildcard operands: what they match, compared with the standard library's engine, and how much work they can cause."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.patterns import MAX_PATTERN_CHARS, MAX_PATTERN_TEXT_CHARS, Pattern


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("v*", ["v", "vm", "v.m"], ["", "wm", "xv"]),
        ("a*b*c", ["abc", "axxbyyc", "abbcc"], ["ab", "acb", "abcd"]),
        ("a.c*", ["abc", "a.c", "axcd"], ["ac", "abd"]),
        (r"a\.c*", ["a.c", "a.cd"], ["abc"]),
        ("colou?r*", ["color", "colours"], ["colouur"]),
        ("ab+c*", ["abc", "abbbcd"], ["ac"]),
        ("[a-c0-9_]x*", ["ax", "9xy", "_x"], ["dx", "x", "aax"]),
        ("[^a-c]x*", ["dx", "-x"], ["ax", "x"]),
        (r"[\d-]+x*", ["1-2x", "-x"], ["ax"]),
        ("[]a]*", ["]", "abc"], ["b"]),
        (r"\d+\.\d+*", ["1.2", "10.22rc"], ["1.", "a.b"]),
        (r"\w+\s\W*", ["ab -", "_ ."], ["ab", "a b"]),
        ("vm|wasm*", ["vm", "wasm", "wasmtime"], ["vmx", "xwasm"]),
        ("^vm$|^wasm*$", ["vm", "wasmtime"], ["vmx", "^vm$"]),
        ("a?b?c?*", ["", "abc", "x"], []),
        ("x+?y??*", ["x", "xxy", "xz"], ["y"]),
        ("x?+y*", ["y", "xxxy"], ["z"]),
        ("x+??y*", ["y", "xy"], ["zy"]),
        ("żó*", ["żółw"], ["zo"]),
        ("a**", ["a", "abc"], ["b"]),
        ("a*|", ["", "abc"], ["b"]),
        ("x}]*", ["x}]"], ["x"]),
    ],
)
def test_understood_patterns(pattern: str, matching: list[str], other: list[str]) -> None:
    compiled = Pattern(pattern)
    assert [text for text in matching if not compiled.matches(text)] == []
    assert [text for text in other if compiled.matches(text)] == []


@pytest.mark.parametrize(
    "pattern",
    [
        "[a*", "(a*", "a{3}*", "?a*", "+*", "a|?b*", "a^b*", "^?a*", "a*\\", r"\ba*", r"(?i:a*", "[[:alpha:]]*",
        "[a&&b]*",
        "[z-a]*", r"[a-\d]*", r"\1*", r"\p*", "\\é*", "[]*", "a" * MAX_PATTERN_CHARS + "*", "$a*",
    ],
)  # fmt: skip
def test_broken_patterns_match_nothing(pattern: str) -> None:
    compiled = Pattern(pattern)
    for text in ("", "a", "aaa", pattern, "a" * MAX_PATTERN_CHARS + "b"):
        assert not compiled.matches(text)


# ---- against an independent engine ----

pieces = st.sampled_from(
    ["a", "b", "*", ".", "a?", "b+", "a??", "[ab]", "[^a]", "|", r"\.", r"\w", r"\W", "[b-c.]", "c", "?", "-"]
)
patterns = st.lists(pieces, max_size=9).map("".join).map(lambda text: text.lstrip("?") + "*")


@given(patterns, st.lists(st.text("abc.-", max_size=8), min_size=1, max_size=8))
@settings(max_examples=400, deadline=None)
def test_agrees_with_the_standard_library(pattern: str, texts: list[str]) -> None:
    expression = pattern.replace("*", ".*")
    try:
        # possessive quantifiers and nested repeats are the standard library's own reading: not compared
        if re.search(r"[?+*][+*]|\?\?\?", expression) or re.search(r"[?+*]\?\?|(?:^|\|)\?", expression):
            return
        reference = re.compile(expression, re.DOTALL)
    except re.error:
        return
    compiled = Pattern(pattern)
    assert [compiled.matches(text) for text in texts] == [reference.fullmatch(text) is not None for text in texts]


# ---- work ----


class Counting(Pattern):
    """A pattern that counts the steps of its simulation and the widest set of positions."""

    __slots__ = ("steps", "width")

    def __init__(self, operand: str) -> None:
        super().__init__(operand)
        self.steps = self.width = 0

    def step(self, states: int, char: str) -> int:
        self.steps += 1
        self.width = max(self.width, states.bit_length())
        return super().step(states, char)


@pytest.mark.parametrize(
    "pattern",
    [
        "a?" * 100 + "a*",
        "a*" * 127 + "b",
        "a+" * 100 + "*b",
        "[ab]?" * 50 + "*c",
        "a*a?" * 60 + "|" + "b?*",
        ".?" * 100 + "*z",
    ],
)
@pytest.mark.parametrize("length", [10, 100, MAX_PATTERN_TEXT_CHARS])
def test_one_step_a_character_whatever_the_pattern(pattern: str, length: int) -> None:
    compiled = Counting(pattern)
    compiled.matches("a" * length)
    assert 0 < compiled.steps <= length
    assert compiled.width <= 2 * len(pattern) + 2
    assert len(compiled._cache) <= MAX_PATTERN_CHARS


def test_texts_over_the_bound_do_not_match() -> None:
    compiled = Counting("a*")
    assert compiled.matches("a" * MAX_PATTERN_TEXT_CHARS)
    assert not compiled.matches("a" * (MAX_PATTERN_TEXT_CHARS + 1))
    assert compiled.steps == MAX_PATTERN_TEXT_CHARS


def test_known_characters_stay_bounded() -> None:
    compiled = Counting("[^a]+*")
    assert compiled.matches("".join(chr(0x4E00 + number) for number in range(1000)))
    assert len(compiled._cache) <= MAX_PATTERN_CHARS
