"""What one clause says of one property: the lower half of `protocol.terms`.

Properties are JSON values and an operand is bare text, so the property's type decides how the operand is read: as text,
number, boolean or list; `$d`, `$v` and `$t` references read a *string* property as a decimal, a semantic version or an
RFC 3339 moment. All is pure and takes bounded time, linear where operands have wildcards, whatever a peer writes.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import functools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

MAX_LIST_DEPTH: Final = 16
"""Nesting of lists, in values and in operands; a deeper value is unusable, a deeper operand is no list."""

MAX_LIST_ITEMS: Final = 256
"""Items of a `[x,y]` operand: comparing lists costs items times elements."""

MAX_PATTERN_CHARS: Final = 256
MAX_PATTERN_TEXT_CHARS: Final = 1024
MAX_NUMBER_CHARS: Final = 1024
MAX_DECIMAL_CHARS: Final = 128
MAX_DECIMAL_EXPONENT: Final = 1000
MAX_VERSION_CHARS: Final = 256


class Truth(enum.Enum):
    """Three-valued logic; as a `bool` only TRUE counts, since an undefined constraint does not match."""

    TRUE = "true"
    FALSE = "false"
    UNDEFINED = "undefined"

    def __bool__(self) -> bool:
        return self is Truth.TRUE


# ---- values ----

Usable = str | float | bool | list[Any]
"""A property as constraints see it: escaped text, f64, boolean, or a list of these."""

_find_special = re.compile(r'[\x00-\x1f"\\]').search
_find_unusable = re.compile(r"[\x00-\x08\x0b-\x1f]").search


def escape_text(text: str) -> str | None:
    """The text as it stands between the quotes of its JSON form, which is what constraints compare.

    None if JSON would need an escape other than `\\"`, `\\\\`, `\\n` and `\\t`: constraints do not see such a property.
    """
    if _find_special(text) is None:
        return text
    if _find_unusable(text) is not None:
        return None
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")


def usable(value: object, depth: int = 0) -> Usable | None:
    """The value as constraints see it, or None where they see nothing: null, objects, unsupported escapes."""
    kind = type(value)
    if kind is str:
        return escape_text(value)  # type: ignore[arg-type]
    if kind is float or kind is bool:
        return value  # type: ignore[return-value]
    if kind is int:
        try:
            return float(value)  # type: ignore[arg-type]
        except OverflowError:
            return None
    if not isinstance(value, list | tuple) or depth >= MAX_LIST_DEPTH:
        return None
    elements: list[Usable] = []
    for element in value:
        seen = usable(element, depth + 1)
        if seen is None:  # one unusable element hides the whole list
            return None
        elements.append(seen)
    return elements


# ---- operands ----


class Operand:
    """The value part of a clause, read once in every way a property may ask for it."""

    __slots__ = ("items", "number", "pattern", "text")

    def __init__(self, text: str, depth: int = 0) -> None:
        self.text = text
        self.number = read_number(text)
        self.pattern = Pattern(text) if "*" in text else None
        self.items = _read_items(text, depth)


def equals(value: Usable, operand: Operand) -> bool:
    """The `=` of the value's own type; an operand that the type cannot read is simply not equal."""
    if type(value) is str:
        return operand.text == value if operand.pattern is None else operand.pattern.matches(value)
    if type(value) is float:
        return value == operand.number  # no number reads as None, which equals nothing
    if type(value) is bool:
        return operand.text == ("true" if value else "false")
    assert isinstance(value, list)
    if operand.items is None:
        return any(equals(element, operand) for element in value)
    if len(value) != len(operand.items):
        return False
    return all(any(equals(element, item) for element in value) for item in operand.items)


Comparison = Callable[[Any, Any], bool]

COMPARISONS: Final[dict[str, Comparison]] = {
    "=": operator.eq,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def ordered(value: Usable, operand: Operand, comparison: Comparison) -> bool:
    """`< <= > >=`: text by its bytes, numbers by size; booleans and lists have no order."""
    if type(value) is str:
        return comparison(value, operand.text)  # code point order is UTF-8 byte order
    if type(value) is float:
        return operand.number is not None and comparison(value, operand.number)
    return False


def _read_items(text: str, depth: int) -> Sequence[Operand] | None:
    """The items of `[x,y,...]`, or None if the operand is no list. Nothing is trimmed: spaces belong to the item."""
    if depth >= MAX_LIST_DEPTH or len(text) < 2 or text[0] != "[" or text[-1] != "]":
        return None
    inner = text[1:-1]
    if not inner:
        return ()
    parts: list[str] = []
    level = start = 0
    for at, char in enumerate(inner):
        if char == "[":
            level += 1
        elif char == "]":
            level -= 1
        elif char == "," and level == 0:
            parts.append(inner[start:at])
            start = at + 1
    parts.append(inner[start:])
    if len(parts) > MAX_LIST_ITEMS:
        return None
    return tuple(Operand(part, depth + 1) for part in parts)


_is_number = re.compile(
    r"[+-]?(?:inf|infinity|nan|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)", re.IGNORECASE | re.ASCII
).fullmatch


def read_number(text: str) -> float | None:
    """An f64 from `1`, `.5`, `5.`, `-1e3`, `inf`, `infinity`, `nan` (any case, ASCII digits only), else None."""
    if len(text) > MAX_NUMBER_CHARS or not text.isascii() or _is_number(text) is None:
        return None
    return float(text)


# ---- typed references ----

_is_decimal = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE]([+-]?[0-9]{1,5}))?").fullmatch


def read_decimal(text: str) -> decimal.Decimal | None:
    """An exact decimal of bounded length and exponent, else None."""
    found = _is_decimal(text) if len(text) <= MAX_DECIMAL_CHARS else None
    if found is None or abs(int(found[1] or 0)) > MAX_DECIMAL_EXPONENT:
        return None
    return decimal.Decimal(text)


_NUMERIC = r"0|[1-9][0-9]*"
_IDENTIFIERS = r"[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*"
_is_version = re.compile(
    rf"({_NUMERIC})\.({_NUMERIC})\.({_NUMERIC})(?:-({_IDENTIFIERS}))?(?:\+{_IDENTIFIERS})?"
).fullmatch

Version = tuple[int, int, int, bool, tuple[tuple[bool, int, str], ...]]


def read_version(text: str) -> Version | None:
    """A semantic version (`1.2.3-rc.1+build`) as a key in order of precedence, where build metadata does not count."""
    found = _is_version(text) if len(text) <= MAX_VERSION_CHARS else None
    if found is None:
        return None
    identifiers: list[tuple[bool, int, str]] = []
    for identifier in found[4].split(".") if found[4] else ():
        if not identifier.isdigit():
            identifiers.append((True, 0, identifier))  # words rank above numbers
        elif identifier[0] == "0" and identifier != "0":
            return None
        else:
            identifiers.append((False, int(identifier), ""))
    numbers = int(found[1]), int(found[2]), int(found[3])
    if max(numbers) >= 2**64:
        return None
    return (*numbers, not identifiers, tuple(identifiers))  # a release ranks above its pre-releases


_is_moment = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt]([01][0-9]|2[0-3]):([0-5][0-9]):([0-5][0-9]|60)(?:\.([0-9]{1,9}))?"
    r"(?:[Zz]|([+-])([01][0-9]|2[0-3]):([0-5][0-9]))"
).fullmatch


def read_moment(text: str) -> int | None:
    """An RFC 3339 moment (offset required, at most nine fraction digits) as nanoseconds on the UTC line, else None."""
    found = _is_moment(text)
    if found is None:
        return None
    try:
        days = datetime.date(int(found[1]), int(found[2]), int(found[3])).toordinal()
    except ValueError:
        return None
    minutes = (days * 24 + int(found[4])) * 60 + int(found[5])
    if found[8]:
        offset = int(found[9]) * 60 + int(found[10])
        minutes += offset if found[8] == "-" else -offset
    return (minutes * 60 + int(found[6])) * 10**9 + int((found[7] or "").ljust(9, "0"))


READERS: Final[dict[str, tuple[Callable[[str], Any], str]]] = {
    "d": (read_decimal, "a decimal"),
    "v": (read_version, "a version"),
    "t": (read_moment, "an RFC 3339 time"),
}


# ---- wildcard patterns ----

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
        "_accept", "_any", "_block_ends", "_block_starts", "_cache",
        "_classes", "_literals", "_repeat", "_skip", "_start",
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


# ---- one clause ----

Test = Callable[[Mapping[str, Any]], Truth]
"""Flat properties -> Truth; never raises, whatever the values are."""

TRUE, FALSE, UNDEFINED = Truth.TRUE, Truth.FALSE, Truth.UNDEFINED


def split_name(name: str) -> tuple[str, str]:
    """Property name and type letter, "" if the reference has no type."""
    return (name[:-2], name[-1]) if name[-2:-1] == "$" and name[-1] in READERS else (name, "")


def clause_test(full_name: str, op: str, text: str) -> Test:
    """The test that a clause makes: `op` is `=*` (presence) or one of COMPARISONS, `text` the operand as written."""
    name, kind = split_name(full_name)
    if name.endswith("]") and "[" in name:  # an aspect: JSON properties have none
        truth = FALSE if op == "=*" else UNDEFINED
        return lambda properties: truth
    if op == "=*":
        return lambda properties: TRUE if usable(properties.get(name)) is not None else FALSE
    comparison = COMPARISONS[op]
    if kind:
        return _typed_test(name, READERS[kind][0], comparison, text)
    operand = Operand(text)

    def is_equal(properties: Mapping[str, Any]) -> Truth:
        value = usable(properties.get(name))
        if value is None:
            return UNDEFINED
        return TRUE if equals(value, operand) else FALSE

    def is_ordered(properties: Mapping[str, Any]) -> Truth:
        value = usable(properties.get(name))
        if value is None:
            return UNDEFINED
        return TRUE if ordered(value, operand, comparison) else FALSE

    return is_equal if op == "=" else is_ordered


def _typed_test(name: str, read: Callable[[str], Any], comparison: Comparison, text: str) -> Test:
    operand = read(text)

    def test(properties: Mapping[str, Any]) -> Truth:
        value = usable(properties.get(name))
        typed = read(value) if isinstance(value, str) else None
        if typed is None:
            return UNDEFINED
        return TRUE if operand is not None and comparison(typed, operand) else FALSE

    return test
