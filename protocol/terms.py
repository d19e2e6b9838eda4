"""The terms of a deal: properties, constraints over them, and whether an offer and a demand match.

Both sides publish properties (JSON) and a constraint (text in the manner of LDAP filters) over the other side's
properties. The market actor compiles a demand once and tries it against every offer; REST flattens what agents send and
unflattens what the exe-unit reads; the CLI shows `explain`. What a single clause says is in `protocol.clauses`.

    filter = "()" | "(&" filter* ")" | "(|" filter* ")" | "(!" filter ")" | "(" name "=*)" | "(" name op value ")"

`op` is one of `= < <= > >=`. The name runs up to the first of `= < > ~` and the value up to the first `)`, spaces
included; nothing can be escaped. White space is free before a filter, after its parenthesis and after `& | !`, but `()`
(always true) must stand glued to what is before it. Text after the first filter is ignored.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from protocol.clauses import FALSE, READERS, TRUE, UNDEFINED, Test, Truth, clause_test, split_name, usable

__all__ = [
    "And",
    "Clause",
    "Compiled",
    "Constraint",
    "ConstraintSyntaxError",
    "MatchResult",
    "Not",
    "Or",
    "Reason",
    "Truth",
    "compile_constraint",
    "explain",
    "match",
    "parse",
    "print_constraint",
]
MAX_CONSTRAINT_BYTES: Final = 64 * 1024
MAX_CONSTRAINT_DEPTH: Final = 128
MAX_FILTERS: Final = 1024
MAX_PATTERNS: Final = 64
CACHED_CONSTRAINT_CHARS: Final = 4096


class ConstraintSyntaxError(ValueError):
    """A constraint text that does not parse; `position` counts characters from 0."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(f"{message} (at character {position})")
        self.message = message
        self.position = position


Op = Literal["=*", "=", "<", "<=", ">", ">="]


@dataclass(frozen=True, slots=True)
class Clause:
    """One test of one property. The name may end in `$d`, `$v` or `$t`; `=*` tests presence and has no value."""

    name: str
    op: Op
    value: str = ""


@dataclass(frozen=True, slots=True)
class And:
    """True if all are; `(&)` is always true."""

    items: tuple[Constraint, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """True if any is; `(|)` is always false."""

    items: tuple[Constraint, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """True if the item is false; undefined stays undefined."""

    item: Constraint


Constraint = Clause | And | Or | Not
_WHITE_SPACE: Final = " \t\r\n"
_NAME_END: Final = "=<>~"


def parse(text: str) -> Constraint:
    """The first filter of a text of at most MAX_CONSTRAINT_BYTES, MAX_CONSTRAINT_DEPTH and MAX_FILTERS.

    Raises ConstraintSyntaxError and nothing else. `()` reads as the empty conjunction.
    """
    if len(text) > MAX_CONSTRAINT_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_CONSTRAINT_BYTES:
        raise ConstraintSyntaxError(f"a constraint must stay within {MAX_CONSTRAINT_BYTES} bytes", 0)
    return _Parser(text).parse()


class _Parser:
    """Reads left to right with a stack of open groups instead of recursion."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.filters = self.patterns = 0

    def parse(self) -> Constraint:
        open_groups: list[tuple[str, int, list[Constraint]]] = []
        while True:
            done = self._open_filter(open_groups)
            while done is not None:  # a finished filter goes into its group, which may end there too
                if not open_groups:
                    return done
                open_groups[-1][2].append(done)
                done = self._close_group(open_groups)

    def _open_filter(self, open_groups: list[tuple[str, int, list[Constraint]]]) -> Constraint | None:
        """One whole clause, `()` or empty group; None after the start of a group that waits for filters."""
        text = self.text
        if text.startswith("()", self.at):
            self.at += 2
            self._count()
            return And(())
        self._skip_white_space()
        start = self.at
        if not text.startswith("(", start):
            raise ConstraintSyntaxError("expected '('", start)
        self.at += 1
        self._count()
        self._skip_white_space()
        kind = text[self.at : self.at + 1]
        if kind not in ("&", "|", "!"):
            return self._clause()
        self.at += 1
        if len(open_groups) >= MAX_CONSTRAINT_DEPTH:
            raise ConstraintSyntaxError(f"filters are nested more than {MAX_CONSTRAINT_DEPTH} deep", start)
        open_groups.append((kind, start, []))
        return self._close_group(open_groups)

    def _close_group(self, open_groups: list[tuple[str, int, list[Constraint]]]) -> Constraint | None:
        """The innermost group if it ends here, else None."""
        kind, start, items = open_groups[-1]
        after = self.at
        self._skip_white_space()
        if not self.text.startswith(")", self.at):
            if kind == "!" and items:
                raise ConstraintSyntaxError("'!' takes one filter, expected ')'", self.at)
            if self.at >= len(self.text):
                raise ConstraintSyntaxError("the text ends inside a group, expected '(' or ')'", self.at)
            self.at = after  # white space matters before `()`
            return None
        if kind == "!" and not items:
            raise ConstraintSyntaxError("'!' needs a filter", start)
        self.at += 1
        open_groups.pop()
        if kind == "!":
            return Not(items[0])
        return And(tuple(items)) if kind == "&" else Or(tuple(items))

    def _clause(self) -> Clause:
        text, start = self.text, self.at
        end = start
        while end < len(text) and text[end] not in _NAME_END:
            end += 1
        if end >= len(text):
            raise ConstraintSyntaxError("a filter needs an operator: = < <= > >=", start)
        if end == start or text[start] == ")":
            raise ConstraintSyntaxError("a filter needs a property name", start)
        op = text[end : end + 2] if text[end : end + 2] in ("<=", ">=") else text[end]
        if op == "~":
            raise ConstraintSyntaxError("'~' is no operator", end)
        value_start = end + len(op)
        close = text.find(")", value_start)
        if close < 0:
            raise ConstraintSyntaxError("a filter needs a closing ')'", start)
        value = text[value_start:close]
        self.at = close + 1
        if op == "=" and value.startswith("*"):
            if value != "*":
                raise ConstraintSyntaxError("a value must not start with '*'", value_start)
            op, value = "=*", ""
        elif op == "=" and "*" in value:
            self.patterns += 1 + value.count(",")  # each item of a list operand may be one
            if self.patterns > MAX_PATTERNS:
                raise ConstraintSyntaxError(f"more than {MAX_PATTERNS} wildcards", value_start)
        return Clause(text[start:end], op, value)  # type: ignore[arg-type]

    def _count(self) -> None:
        self.filters += 1
        if self.filters > MAX_FILTERS:
            raise ConstraintSyntaxError(f"more than {MAX_FILTERS} filters", self.at)

    def _skip_white_space(self) -> None:
        while self.at < len(self.text) and self.text[self.at] in _WHITE_SPACE:
            self.at += 1


def print_constraint(constraint: Constraint) -> str:
    """Canonical text without white space; `parse(print_constraint(c)) == c` for whatever `parse` returned."""
    if isinstance(constraint, Clause):
        return f"({constraint.name}{constraint.op}{constraint.value})"
    if isinstance(constraint, Not):
        return f"(!{print_constraint(constraint.item)})"
    sign = "&" if isinstance(constraint, And) else "|"
    return f"({sign}{''.join(print_constraint(item) for item in constraint.items)})"


_OPPOSITE: Final = {TRUE: FALSE, FALSE: TRUE, UNDEFINED: UNDEFINED}


class Compiled:
    """A constraint ready to be tried against many flat property sets; immutable and safe to share."""

    __slots__ = ("constraint", "evaluate", "parts")

    constraint: Constraint
    evaluate: Test
    parts: tuple[Compiled, ...]

    def __init__(self, constraint: Constraint) -> None:
        self.constraint = constraint
        if isinstance(constraint, Clause):
            self.parts = ()
            self.evaluate = clause_test(constraint.name, constraint.op, constraint.value)
            return
        items = (constraint.item,) if isinstance(constraint, Not) else constraint.items
        self.parts = tuple(Compiled(item) for item in items)
        tests = tuple(part.evaluate for part in self.parts)
        if isinstance(constraint, Not):
            self.evaluate = _not_test(tests[0])
        else:
            self.evaluate = _group_test(tests, FALSE if isinstance(constraint, And) else TRUE)


def compile_constraint(text: str) -> Compiled:
    """Parse and compile; the results for texts of ordinary length are kept. Raises ConstraintSyntaxError."""
    return _compile_cached(text) if len(text) <= CACHED_CONSTRAINT_CHARS else Compiled(parse(text))


@functools.lru_cache(maxsize=512)
def _compile_cached(text: str) -> Compiled:
    return Compiled(parse(text))


def _not_test(test: Test) -> Test:
    return lambda properties: _OPPOSITE[test(properties)]


def _group_test(tests: tuple[Test, ...], decisive: Truth) -> Test:
    """And stops at the first FALSE, Or at the first TRUE; without one, a single UNDEFINED makes the whole undefined."""
    neutral = _OPPOSITE[decisive]

    def test(properties: Mapping[str, Any]) -> Truth:
        result = neutral
        for part in tests:
            truth = part(properties)
            if truth is decisive:
                return decisive
            if truth is UNDEFINED:
                result = UNDEFINED
        return result

    return test


Side = Literal["demand", "offer"]


@dataclass(frozen=True, slots=True)
class MatchResult:
    """What each side's constraint says of the other side's properties; as a `bool`, whether the pair matches."""

    demand: Truth
    offer: Truth

    def __bool__(self) -> bool:
        return self.demand is TRUE and self.offer is TRUE


@dataclass(frozen=True, slots=True)
class Reason:
    """One clause that keeps a pair from matching."""

    side: Side
    """Whose constraint it is; the property is looked up on the other side."""
    clause: str
    truth: Truth
    name: str
    """The property, without type suffix; "" if the constraint does not parse or an empty group failed."""
    present: bool
    value: Any
    """As published; None if absent."""
    message: str


def match(
    demand_properties: Mapping[str, Any],
    demand_constraints: str | Compiled,
    offer_properties: Mapping[str, Any],
    offer_constraints: str | Compiled,
) -> MatchResult:
    """Try both constraints on the other side's flat properties; a text that does not parse is UNDEFINED: no match."""
    return MatchResult(_truth(demand_constraints, offer_properties), _truth(offer_constraints, demand_properties))


def _truth(constraints: str | Compiled, properties: Mapping[str, Any]) -> Truth:
    try:
        compiled = constraints if isinstance(constraints, Compiled) else compile_constraint(constraints)
    except ConstraintSyntaxError:
        return UNDEFINED
    return compiled.evaluate(properties)


def explain(
    demand_properties: Mapping[str, Any],
    demand_constraints: str | Compiled,
    offer_properties: Mapping[str, Any],
    offer_constraints: str | Compiled,
) -> list[Reason]:
    """The clauses that keep a pair from matching, the demand's first; empty exactly if `match` is true.

    Of an `&` the items that failed are listed, of an `|` all its items, below `!` the ones that held or were undefined.
    """
    reasons: list[Reason] = []
    sides: tuple[tuple[Side, str | Compiled, Mapping[str, Any]], ...] = (
        ("demand", demand_constraints, offer_properties),
        ("offer", offer_constraints, demand_properties),
    )
    for side, constraints, properties in sides:
        try:
            compiled = constraints if isinstance(constraints, Compiled) else compile_constraint(constraints)
        except ConstraintSyntaxError as error:
            message = f"{side} constraint does not parse: {error}"
            reasons.append(Reason(side, _shorten(str(constraints)), UNDEFINED, "", False, None, message))
            continue
        _blame(side, compiled, properties, TRUE, reasons)
    return reasons


def _blame(side: Side, part: Compiled, properties: Mapping[str, Any], wanted: Truth, reasons: list[Reason]) -> None:
    """Add the clauses that keep the part from being what is wanted of it, TRUE or (below a `!`) FALSE."""
    truth = part.evaluate(properties)
    if truth is wanted:
        return
    if isinstance(part.constraint, Not):
        _blame(side, part.parts[0], properties, _OPPOSITE[wanted], reasons)
    elif part.parts:
        for item in part.parts:
            _blame(side, item, properties, wanted, reasons)
    else:
        reasons.append(_reason(side, part.constraint, properties, truth, wanted))


def _reason(side: Side, part: Constraint, properties: Mapping[str, Any], truth: Truth, wanted: Truth) -> Reason:
    clause = print_constraint(part)
    wants = f"{side} {'wants' if wanted is TRUE else 'does not want'} "
    if not isinstance(part, Clause):
        always = "never" if truth is FALSE else "always"
        return Reason(side, clause, truth, "", False, None, f"{side} constraint holds {clause}, which is {always} true")
    other = "offer" if side == "demand" else "demand"
    name, kind = split_name(part.name)
    present = name in properties
    value = properties.get(name)
    shown = _shorten(_json(value))
    if not present:
        tail = f"but the {other} has no such property"
    elif usable(value) is None:
        tail = f"but the {other} has {shown}, which no constraint can read"
    elif truth is UNDEFINED and kind:
        tail = f"but the {other} has {shown}, which is not {READERS[kind][1]}"
    else:
        tail = f"{'but' if wanted is TRUE else 'and'} the {other} has {shown}"
    return Reason(side, clause, truth, name, present, value, f"{wants}{_shorten(clause[1:-1])} {tail}")


def _json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # explaining must not fail over what was never checked
        return f"a {type(value).__name__}"


def _shorten(text: str, limit_chars: int = 120) -> str:
    return text if len(text) <= limit_chars else text[: limit_chars - 3] + "..."
