"""Patterns of the constraint language: wildcards and a safe subset of regular expressions, matched in linear time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

MAX_PATTERN_CHARS: Final = 256
MAX_PATTERN_TEXT_CHARS: Final = 1024
Belongs = Callable[[str], bool]


class _BrokenPatternError(Exception):
    """The operand is no pattern that we support."""


class Pattern:
    """An operand with `*`: every `*` stands for `.*`, the rest is a regular expression over the whole text.

    Understood: literals, `.`, classes (`[a-z]`, `[^...]`, `\\d \\w \\s` and their opposites), escaped punctuation,
    `\\n \\t \\r`, `?`, `+`, `|`, `^` at the start and `$` at the end of an alternative. Groups cannot occur, as an
    operand ends at the first `)`. All else (`{n}`, nested classes, `\\b`, back references, over 256 characters ...) is
    a broken pattern and matches nothing, as does a text of over 1024 characters.

    The pattern is a row of positions, each a character set that may be optional, repeated or both. The set of positions
    where the text read so far may stand is one integer, and a character moves it by a fixed number of integer
    operations: work is proportional to the text, with no backtracking and no way to make it more.
    """

    __slots__ = (
        "_accept",
        "_any",
        "_block_ends",
        "_block_starts",
        "_cache",
        "_classes",
        "_literals",
        "_repeat",
        "_skip",
        "_start",
    )

    def __init__(self, operand: str) -> None:
        self._any = self._repeat = self._skip = self._block_starts = self._block_ends = self._start = self._accept = 0
        self._literals: dict[str, int] = {}
        self._classes: list[tuple[Belongs, int]] = []
        self._cache: dict[str, int] = {}
        try:
            if len(operand) > MAX_PATTERN_CHARS:
                raise _BrokenPatternError
            alternatives = _Reader(operand.replace("*", ".*")).alternatives()
        except _BrokenPatternError:
            return  # no start position: matches nothing
        at = 0
        for alternative in alternatives:
            at = self._lay_out(alternative, at)
        self._start = self._closure(self._start)

    def _lay_out(self, items: list[_Item], at: int) -> int:
        """Give the items of one alternative the positions from `at` on; the position after the last item accepts."""
        self._start |= 1 << at
        in_block = False
        for item in items:
            here = 1 << at
            if item.belongs is None:
                self._any |= here
            elif isinstance(item.belongs, str):
                self._literals[item.belongs] = self._literals.get(item.belongs, 0) | here
            else:
                self._classes.append((item.belongs, here))
            if item.repeated:
                self._repeat |= here
            if item.optional:
                self._block_starts |= 0 if in_block else here
                self._skip |= here << 1
            elif in_block:
                self._block_ends |= here
            in_block = item.optional
            at += 1
        if in_block:
            self._block_ends |= 1 << at
        self._accept |= 1 << at
        return at + 1

    def _closure(self, states: int) -> int:
        """Add what is reachable by skipping optional positions.

        Positions that may be skipped stand in blocks. Subtracting a block's first bit from the states with its end set
        borrows up to the lowest active position, so the bits left unchanged are those above it: they become active.
        """
        ended = states | self._block_ends
        return states | (self._skip & (~(ended - self._block_starts) ^ ended))

    def _positions(self, char: str) -> int:
        """The positions whose set holds the character."""
        known = self._cache.get(char)
        if known is None:
            known = self._any | self._literals.get(char, 0)
            for belongs, here in self._classes:
                if belongs(char):
                    known |= here
            if len(self._cache) >= MAX_PATTERN_CHARS:
                self._cache.clear()
            self._cache[char] = known
        return known

    def step(self, states: int, char: str) -> int:
        """The positions after one more character: called at most once for each character of a text."""
        hit = states & self._positions(char)
        return self._closure(hit << 1 | hit & self._repeat)

    def matches(self, text: str) -> bool:
        """Whether the pattern covers the whole text."""
        if len(text) > MAX_PATTERN_TEXT_CHARS:
            return False
        states = self._start
        for char in text:
            if not states:
                return False
            states = self.step(states, char)
        return bool(states & self._accept)


class _Item:
    """One position of a pattern: its character set (None = any, a string = that character) and quantifier."""

    __slots__ = ("belongs", "optional", "repeated")

    def __init__(self, belongs: Belongs | str | None) -> None:
        self.belongs = belongs
        self.optional = self.repeated = False


_CLASS_ESCAPES: Final[dict[str, Belongs]] = {
    "d": str.isdecimal,
    "D": lambda char: not char.isdecimal(),
    "w": lambda char: char.isalnum() or char == "_",
    "W": lambda char: not (char.isalnum() or char == "_"),
    "s": str.isspace,
    "S": lambda char: not char.isspace(),
}
_CHAR_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r"}


class _Reader:
    """Reads the pattern text, left to right and once, into alternatives of items."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def _next(self) -> str:
        if self.at >= len(self.text):
            raise _BrokenPatternError
        char = self.text[self.at]
        self.at += 1
        return char

    def _peek(self, ahead: int = 0) -> str:
        return self.text[self.at + ahead : self.at + ahead + 1]

    def alternatives(self) -> list[list[_Item]]:
        found: list[list[_Item]] = [[]]
        # what may stand here: an anchor, a quantifier, or a `?` that only asks a quantifier for its shortest match
        # (which changes nothing where the whole text must match)
        at_start, after_item, after_quantifier = True, False, False
        while self.at < len(self.text):
            char = self._next()
            if char in "?+*":
                if not after_item:
                    raise _BrokenPatternError
                if char == "?" and after_quantifier:
                    after_quantifier = False
                    continue
                found[-1][-1].optional |= char != "+"
                found[-1][-1].repeated |= char != "?"
                after_quantifier = True
                continue
            after_item = after_quantifier = False
            if char == "|":
                found.append([])
                at_start = True
            elif not (char == "^" and at_start) and not (char == "$" and self._peek() in ("", "|")):
                found[-1].append(_Item(self._atom(char)))
                at_start, after_item = False, True
        return found

    def _atom(self, char: str) -> Belongs | str | None:
        if char == ".":
            return None  # escaped text holds no line break, the one character that a dot would refuse
        if char == "\\":
            return self._escape()
        if char == "[":
            return self._char_class()
        if char in "({^$":
            raise _BrokenPatternError
        return char

    def _escape(self) -> Belongs | str:
        char = self._next()
        if char in _CLASS_ESCAPES:
            return _CLASS_ESCAPES[char]
        if char in _CHAR_ESCAPES:
            return _CHAR_ESCAPES[char]
        if not char.isascii() or char.isalnum() or char.isspace():
            raise _BrokenPatternError
        return char

    def _char_class(self) -> Belongs:
        negated = self._peek() == "^"
        self.at += negated
        members: set[str] = set()
        tests: list[Belongs] = []
        first = True
        while first or self._peek() != "]":
            pair = self.text[self.at : self.at + 2]
            if pair[:1] == "[" or pair in ("&&", "--", "~~"):  # class arithmetic
                raise _BrokenPatternError
            first = False
            low = self._class_member()
            if self._peek() == "-" and self._peek(1) not in ("]", ""):
                self.at += 1
                high = self._class_member()
                if not isinstance(low, str) or not isinstance(high, str) or low > high:
                    raise _BrokenPatternError
                tests.append(functools.partial(_in_range, low, high))
            elif isinstance(low, str):
                members.add(low)
            else:
                tests.append(low)
        self.at += 1
        return lambda char: negated != (char in members or any(test(char) for test in tests))

    def _class_member(self) -> Belongs | str:
        char = self._next()
        return self._escape() if char == "\\" else char


def _in_range(low: str, high: str, char: str) -> bool:
    return low <= char <= high
