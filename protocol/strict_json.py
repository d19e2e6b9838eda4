"""JSON from outside, read once and strictly: what it gives can be kept, signed and shown again by every JSON library.

The standard library's parser takes `NaN`, turns `1e400` into infinity and lets the last of two equal keys win; msgspec's
knows typed members only. So the rules are hooks of the former. How much there is to read is counted before it is read.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal, InvalidOperation
from typing import Any

MAX_VALUES = 50_000  # arrays, objects and members of one text: some 10 ms of work
MAX_DEPTH = 100
MAX_INTEGER_DIGITS = 40  # as many as an amount has
MAX_EXPONENT_DIGITS = 4  # of an exact fraction: what has more is no amount, and costs memory to write out
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_HALF = re.compile("[\ud800-\udfff]")
_MARKS = (b",", b"[", b"{")
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
RECOUNTED_BYTES = 256 * 1024  # a text up to this size may have any number of commas in its strings


class _Wrong:
    """Stands for a number that cannot be kept, until it is known where it stands."""

    def __init__(self, text: str) -> None:
        self.text = text if len(text) <= 40 else f"{text[:20]}... of {len(text)} characters"


def loads(data: bytes | str, *, exact: bool = False, most: int = MAX_VALUES) -> Any:
    """Return the value of a JSON text; with `exact` fractions are `Decimal`, else `float`.

    Raises `ValueError`, whose text names the member, for what is no JSON (RFC 8259), for numbers that are not finite or
    have more than 40 digits, for a key that stands twice, for half a surrogate pair, and for more than `most` values or
    100 levels.
    """
    raw = data.encode() if isinstance(data, str) else data
    if _is_crowded(raw, most) and (len(raw) > RECOUNTED_BYTES or _is_crowded(_STRING.sub(b"", raw), most)):
        raise ValueError(f"more than {most} values (or commas and brackets) in one text")
    wrong: list[_Wrong] = []

    def noted(text: str) -> _Wrong:
        wrong.append(_Wrong(text))
        return wrong[-1]

    def integer(text: str) -> Any:
        return int(text) if len(text) <= MAX_INTEGER_DIGITS else noted(text)

    def fraction(text: str) -> Any:
        number = _decimal(text) if exact else float(text)
        return noted(text) if number is None or abs(number) == float("inf") else number

    try:
        value = json.loads(raw.decode(), object_pairs_hook=_once, parse_constant=noted, parse_float=fraction, parse_int=integer)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    if wrong:
        raise ValueError(
            f"field `{_path_of(value, lambda one: isinstance(one, _Wrong))}`: {wrong[0].text} is not a number that can be kept"
        )
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _is_deep(value):
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    if _ESCAPED_SURROGATE.search(raw):
        _check_text(value)
    return value


def _is_crowded(raw: bytes, most: int) -> bool:
    return sum(raw.count(mark) for mark in _MARKS) > most


def _decimal(text: str) -> Decimal | None:
    exponent = re.search(r"[eE][+-]?(\d+)\Z", text)
    if exponent and len(exponent[1]) > MAX_EXPONENT_DIGITS:
        return None
    try:
        return Decimal(text)
    except InvalidOperation:
        return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"a key appears twice: {twice[:80]!r}")
    return found


def _check_text(value: Any) -> None:
    def is_half(one: Any) -> bool:
        names = [one] if isinstance(one, str) else one if isinstance(one, dict) else []
        return any(_HALF.search(name) for name in names)

    if (path := _path_of(value, is_half)) is not None:
        raise ValueError(f"field `{path}`: half of a surrogate pair is no text")


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list):
        yield from ((str(index), member) for index, member in enumerate(value))


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [member for one in level for _, member in _members(one) if isinstance(member, dict | list)]
        if not level:
            return False
    return True


def _path_of(value: Any, is_wrong: Callable[[Any], bool]) -> str | None:
    """Return where the first value that is wrong stands, `a.b.0`; None if there is none. Nothing behind it is looked at."""
    if is_wrong(value):
        return "."
    trail = [("", _members(value))]
    while trail:
        for name, member in trail[-1][1]:
            if is_wrong(member):
                path = ".".join(one[:80] for one in (*(above for above, _ in trail[1:]), name))
                return path.encode(errors="replace").decode()[:200] or "."
            if isinstance(member, dict | list):
                trail.append((name, _members(member)))
                break
        else:
            trail.pop()
    return None
