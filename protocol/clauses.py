"""What one clause says of one property: the lower half of `protocol.terms`.

Properties are JSON values and an operand is bare text, so the property's type decides how the operand is read: as text,
number, boolean or list; `$d`, `$v` and `$t` references read a *string* property as a decimal, a semantic version or an
RFC 3339 moment. All is pure and takes bounded time, linear where operands have wildcards, whatever a peer writes.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from protocol.patterns import Pattern

MAX_LIST_DEPTH: Final = 16
MAX_LIST_ITEMS: Final = 256
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


Usable = str | float | bool | list[Any]
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


_is_decimal = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE]([+-]?[0-9]{1,5}))?").fullmatch


def read_decimal(text: str) -> decimal.Decimal | None:
    """An exact decimal of bounded length and exponent, else None."""
    found = _is_decimal(text) if len(text) <= MAX_DECIMAL_CHARS else None
    if found is None or abs(int(found[1] or 0)) > MAX_DECIMAL_EXPONENT:
        return None
    return decimal.Decimal(text)


_NUMERIC = r"0|[1-9][0-9]*"
_IDENTIFIERS = r"[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*"
_is_version = re.compile(rf"({_NUMERIC})\.({_NUMERIC})\.({_NUMERIC})(?:-({_IDENTIFIERS}))?(?:\+{_IDENTIFIERS})?").fullmatch
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
Test = Callable[[Mapping[str, Any]], Truth]
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
