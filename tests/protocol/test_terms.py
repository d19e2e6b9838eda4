"""Constraints: syntax, three-valued evaluation, matching and its explanation."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocol.terms import (
    MAX_CONSTRAINT_BYTES,
    MAX_CONSTRAINT_DEPTH,
    MAX_FILTERS,
    MAX_PATTERNS,
    And,
    Clause,
    Compiled,
    Constraint,
    ConstraintSyntaxError,
    Not,
    Or,
    Truth,
    compile_constraint,
    explain,
    match,
    parse,
    print_constraint,
)

T, F, U = Truth.TRUE, Truth.FALSE, Truth.UNDEFINED

PROPERTIES: dict[str, Any] = {
    "mem": 4.0,
    "cores": 2,
    "name": "vm",
    "ver": "0.3.0",
    "caps": ["vpn", "inet"],
    "pub": True,
    "n?": 120,
    "s": "a.c",
}

# What the property language says of these properties, case by case.
CORPUS: list[tuple[str, Truth]] = [
    ("()", T),
    ("(&)", T),
    ("(|)", F),
    ("(mem>=0.5)", T),
    ("(mem>4)", F),
    ("(mem=4)", T),
    ("(mem>=abc)", F),
    ("(disk>=2)", U),
    ("(!(disk>=2))", U),
    ("(disk=*)", F),
    ("(!(disk=*))", T),
    ("(mem=*)", T),
    ("(caps=*)", T),
    ("(!(mem=*))", F),
    ("(name=vm)", T),
    ("(name=v*)", T),
    ("(name=VM)", F),
    ("(name=)", F),
    ("(s=a.c)", T),
    ("(s=a.c*)", T),
    ("(s=abc)", F),
    ("(s=a..*)", T),
    ("(caps=vpn)", T),
    ("(caps=gpu)", F),
    ("(caps=[inet,vpn])", T),
    ("(caps=[vpn])", F),
    ("(caps=[vpn,vpn])", T),
    ("(caps=[vpn, inet])", F),
    ("(caps=[])", F),
    ("(caps=[v*,inet])", T),
    ("(caps=v*)", T),
    ("(caps>a)", F),
    ("(pub=true)", T),
    ("(pub=True)", F),
    ("(pub=false)", F),
    ("(pub>=true)", F),
    ("(pub=*)", T),
    ("(ver>0.10.0)", T),
    ("(ver$v<0.10.0)", T),
    ("(mem$v>1.0.0)", U),
    ("(name$v>1.0.0)", U),
    ("(ver$v>=0.3)", F),
    ("(disk$v>=0.3)", U),
    ("(ver$v=*)", T),
    ("(disk$v=*)", F),
    ("(ver$x=0.3.0)", U),
    ("(n?=120)", T),
    ("(&(mem>1)(disk>1))", U),
    ("(|(mem>1)(disk>1))", T),
    ("(&(mem>9)(disk>1))", F),
    ("(|(mem>9)(disk>1))", U),
    ("(name=vm)(mem>9)", T),
    ("()garbage", T),
    ("(name=vm)garbage)", T),
    ("( name = vm )", U),
    ("(name= vm)", F),
    ("( name=vm)", T),
    ("(a<>b)", U),
    ("(ver<>a)", T),
    ("(name<>a)", F),
    ("(mem<>4)", F),
    ("(name[x]=vm)", U),
    ("(name[x]=*)", F),
    ("(name[x]$v=1.0.0)", U),
    ("(&() (name=vm))", T),
    ("(&()(mem>9))", F),
    ("(!())", F),
    ("(|())", T),
    ("(& (name=vm)\n\t(mem>=1) )", T),
    ("( &  (name=vm)  (mem>=1) )", T),
    ("( !   (name=wasm))", T),
    ("(! (name=vm) )", F),
    ("(&\n  (name=vm)\n  (mem>=1)\n)", T),
    ("(&(name=vm)\n\t(mem>=1))", T),
    ("(&\r\n(name=vm)\r\n)", T),
]

BROKEN: list[tuple[str, int]] = [
    ("", 0),
    ("x", 0),
    (" ()", 2),
    ("( )", 2),
    ("(", 1),
    ("(a", 1),
    ("(a)", 1),
    ("(a=b", 1),
    ("(=b)", 1),
    ("(name=*m)", 6),
    ("(a=**)", 3),
    ("(a~=b)", 2),
    ("(a~b)", 2),
    ("(a!=b", 1),
    ("(& () (a=b))", 4),
    ("(!(x)(y))", 3),
    ("(!(x=1)(y=1))", 7),
    ("(!)", 0),
    ("(&", 2),
    ("(&(a=b)", 7),
    ("(!(a=b)", 7),
    ("(& x)", 3),
    ("(|(a=b) y)", 8),
]


@pytest.mark.parametrize(("text", "truth"), CORPUS)
def test_corpus(text: str, truth: Truth) -> None:
    assert compile_constraint(text).evaluate(PROPERTIES) is truth


@pytest.mark.parametrize(("text", "position"), BROKEN)
def test_broken_text_is_an_error_with_a_position(text: str, position: int) -> None:
    with pytest.raises(ConstraintSyntaxError) as caught:
        parse(text)
    assert caught.value.position == position
    assert str(position) in str(caught.value)


def test_parse_gives_the_tree() -> None:
    assert parse("(&(a>=1)(!(b=*))\t(|(c=x y)))trailing") == And(
        (Clause("a", ">=", "1"), Not(Clause("b", "=*")), Or((Clause("c", "=", "x y"),)))
    )
    assert parse("(a<=*)") == Clause("a", "<=", "*")
    assert parse("(a==b)") == Clause("a", "=", "=b")
    assert parse("()") == parse("(&)") == And(())


def test_only_true_counts_as_true() -> None:
    assert [bool(truth) for truth in (T, F, U)] == [True, False, False]


@pytest.mark.parametrize(
    ("value", "text", "truth"),
    [
        # numbers: both kinds are f64, the operand follows the syntax of a Rust f64
        (2, "(p=2.0)", T), (2.0, "(p=2)", T), (1000, "(p=1e3)", T), (0.5, "(p=.5)", T), (5, "(p=5.)", T),
        (1, "(p=+1)", T),
        (1, "(p<inf)", T), (1, "(p<INFINITY)", T), (1, "(p>-inf)", T), (1, "(p=nan)", F), (1, "(p<nan)", F),
        (1, "(p>NaN)", F),
        (1000, "(p=1_000)", F), (1, "(p= 1)", F), (1, "(p=1 )", F), (1, "(p=0x1)", F), (1, "(p=)", F), (1, "(p=.)", F),
        (1, "(p=e1)", F), (1, "(p=1e)", F), (1, "(p=١)", F), (1, "(p=1*)", F), (1, "(p=true)", F),
        (2**53 + 1, f"(p={2**53})", T), (18446744073709551615, "(p>1e19)", T), (-1, "(p<-0.5)", T),
        (1, "(p>=" + "1" * 2000 + ")", F),
        # text: the escaped form, bytes in order
        ("a", "(p<b)", T), ("b", "(p<=b)", T), ("10", "(p<9)", T), ("é", "(p>z)", T), ("\ue000", "(p<\U00010000)", T),
        ('say "x"', '(p=say \\"x\\")', T), ('say "x"', '(p=say "x")', F), ("a\\b", "(p=a\\\\b)", T),
        ("a\nb\t", "(p=a\\nb\\t)", T),
        ("żółw", "(p=żółw)", T), ("\x7f", "(p=\x7f)", T), ("", "(p=)", T), ("4", "(p=4.0)", F), ("true", "(p=true)", T),
        ("a\x01", "(p=a)", U), ("a\r", "(p=*)", F), ("\x00", "(p=*)", F), ("\b", "(!(p=x))", U), ("\f", "(p<x)", U),
        # what is not seen at all
        (None, "(p=*)", F), (None, "(p=)", U), ({}, "(p=*)", F), ({}, "(p={})", U), ({"a": 1}, "(p=*)", F),
        (["a", None], "(p=a)", U), (["a", {}], "(p=*)", F), (["a", "\x01"], "(p=a)", U), ([["a", None]], "(p=*)", F),
        # lists
        ([], "(p=[])", T), ([], "(p=x)", F), ([], "(p=*)", T), ([1, 2.5], "(p=2.5)", T), ([1, 2], "(p=[2.0,1])", T),
        ([True, "x"], "(p=true)", T), (["a", "a"], "(p=[a,a])", T), (["a", "b"], "(p=[a,a])", T), (["a"], "(p=[a])", T),
        ([["a", "b"], ["c"]], "(p=c)", T), ([["a", "b"], "c"], "(p=[c,[b,a]])", T),
        ([["a", "b"], "c"], "(p=[[a],c])", F),
        (["[a"], "(p=[a)", T), (["a,b"], "(p=a,b)", T), (["a", "b"], "(!(p=[a]))", T), (["vpn"], "(p<=vpn)", F),
        (list("ab") * 200, "(p=[" + ",".join("ab" * 200) + "])", F),  # more items than a list operand may have
        # typed references
        ("0.1", "(p$d<0.2)", T), ("10", "(p$d>9)", T), ("1.10", "(p$d=1.1)", T), ("1e2", "(p$d=100)", T),
        ("x", "(p$d>1)", U),
        ("0.10000000000000000001", "(p$d>0.1)", T), ("1", "(p$d>x)", F), ("1", "(p$d=1*)", F),
        ("1e99999", "(p$d>1)", U),
        ("1" * 200, "(p$d>1)", U), ("nan", "(p$d=nan)", U), (1, "(p$d=1)", U), (["1"], "(p$d=1)", U),
        (None, "(p$d=1)", U),
        ("1.0.0-rc.1", "(p$v<1.0.0)", T), ("1.0.0-alpha", "(p$v<1.0.0-alpha.1)", T),
        ("1.0.0-alpha.1", "(p$v<1.0.0-alpha.beta)", T),
        ("1.0.0-beta.2", "(p$v<1.0.0-beta.11)", T), ("1.0.0-beta.11", "(p$v<1.0.0-rc.1)", T),
        ("1.0.0+a", "(p$v=1.0.0+b)", T),
        ("0.10.0", "(p$v>0.9.9)", T), ("1.0", "(p$v>0.1.0)", U), ("01.0.0", "(p$v>0.1.0)", U),
        ("1.0.0-01", "(p$v>0.1.0)", U),
        ("v1.0.0", "(p$v>0.1.0)", U), (f"{2**64}.0.0", "(p$v>0.1.0)", U), ("1.0.0", "(p$v>=1)", F),
        ("1.0.0-", "(p$v<2.0.0)", U),
        ("2024-01-01T00:00:00Z", "(p$t=2024-01-01T01:00:00+01:00)", T),
        ("2024-01-01T00:00:00Z", "(p$t<2024-01-01T00:00:00.000000001Z)", T),
        ("2024-01-01T00:00:00.5Z", "(p$t=2024-01-01T00:00:00.500000000Z)", T),
        ("2023-12-31T23:30:00-01:00", "(p$t>2024-01-01T00:00:00Z)", T),
        ("2024-02-30T00:00:00Z", "(p$t>2024-01-01T00:00:00Z)", U),
        ("2024-01-01T00:00:00", "(p$t>2023-01-01T00:00:00Z)", U),
        ("2024-01-01", "(p$t>2023-01-01T00:00:00Z)", U),
        ("2024-01-01T00:00:00.0000000001Z", "(p$t>2023-01-01T00:00:00Z)", U),
        ("2024-01-01T00:00:00Z", "(p$t>2023)", F), ("2016-12-31T23:59:60Z", "(p$t>2016-12-31T23:59:59.9Z)", T),
        ("2024-01-01T24:00:00Z", "(p$t>2023-01-01T00:00:00Z)", U),
        ("0000-01-01T00:00:00Z", "(p$t<2023-01-01T00:00:00Z)", U),
    ],
)  # fmt: skip
def test_one_value(value: object, text: str, truth: Truth) -> None:
    assert compile_constraint(text).evaluate({"p": value}) is truth


def test_values_that_no_json_holds_are_invisible() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    for value in (deep, 10**400, object(), b"x"):
        assert compile_constraint("(p=*)").evaluate({"p": value}) is F
        assert compile_constraint("(p=x)").evaluate({"p": value}) is U


# ---- bounds ----


def test_bounds_on_text_depth_filters_and_wildcards() -> None:
    def nested(depth: int) -> str:
        return "(!" * depth + "(a=b)" + ")" * depth

    assert compile_constraint(nested(MAX_CONSTRAINT_DEPTH)).evaluate({"a": "b"}) is T
    assert print_constraint(parse(nested(MAX_CONSTRAINT_DEPTH))) == nested(MAX_CONSTRAINT_DEPTH)
    parse("(&" + "(a=b)" * (MAX_FILTERS - 1) + ")")
    parse("(&" + "(a=b*)" * MAX_PATTERNS + ")")
    parse("(a=" + "b" * (MAX_CONSTRAINT_BYTES - 4) + ")")
    for text in (
        nested(MAX_CONSTRAINT_DEPTH + 1),
        "(!" * 20_000,
        "(&" + "(a=b)" * MAX_FILTERS + ")",
        "(&" + "()" * MAX_FILTERS + ")",
        "(&" + "(a=b*)" * (MAX_PATTERNS + 1) + ")",
        "(a=[" + "b*," * MAX_PATTERNS + "])",
        "(a=" + "b" * (MAX_CONSTRAINT_BYTES - 3) + ")",
        "(a=" + "é" * (MAX_CONSTRAINT_BYTES // 2) + ")",
    ):
        with pytest.raises(ConstraintSyntaxError):
            compile_constraint(text)


@given(st.text(st.sampled_from("()&|!=<>~* \n\tab[],$v\ud800é"), max_size=40) | st.text(max_size=40))
@example("(\ud800=\ud800)")
@settings(max_examples=400, deadline=None)
def test_any_text_parses_or_is_a_syntax_error(text: str) -> None:
    try:
        constraint = parse(text)
    except ConstraintSyntaxError as error:
        position: int | None = error.position
    else:
        position = None
    if position is not None:
        assert 0 <= position <= len(text)
        return
    assert parse(print_constraint(constraint)) == constraint
    assert Compiled(constraint).evaluate({"a": "b", "b": ["a", 1.0]}) in Truth


# ---- laws ----

names = st.sampled_from(["a", "b", "c", "a.b-c", "n?", "x$v", "golem.!exp.y", "name "])
values = st.text(st.characters(exclude_characters=")", exclude_categories=["Cs"]), max_size=5)
clauses = st.one_of(
    st.builds(Clause, names, st.just("=*")),
    st.builds(Clause, names, st.just("="), values.filter(lambda value: not value.startswith("*"))),
    st.builds(Clause, names, st.sampled_from(["<=", ">="]), values),
    # `a<` followed by `=` would read as `<=`
    st.builds(Clause, names, st.sampled_from(["<", ">"]), values.filter(lambda value: not value.startswith("="))),
)


def grow(inner: st.SearchStrategy[Constraint]) -> st.SearchStrategy[Constraint]:
    items = st.lists(inner, max_size=4).map(tuple)
    return st.builds(And, items) | st.builds(Or, items) | st.builds(Not, inner)


constraints: st.SearchStrategy[Constraint] = st.recursive(clauses, grow, max_leaves=12)

# For the logic itself: clauses that are TRUE, FALSE and UNDEFINED in WORLD, and one more that stays undefined.
known = st.sampled_from([Clause("t", "=", "1"), Clause("t", "=", "0"), Clause("u", "=", "1"), Clause("v", "=", "1")])
formulas: st.SearchStrategy[Constraint] = st.recursive(known, grow, max_leaves=12)
WORLD = {"t": "1"}


def truth_of(constraint: Constraint, properties: dict[str, Any] = WORLD) -> Truth:
    return Compiled(constraint).evaluate(properties)


@given(constraints)
@settings(deadline=None)
def test_print_and_parse_are_inverse(constraint: Constraint) -> None:
    text = print_constraint(constraint)
    assert parse(text) == constraint
    assert parse(text + "(junk") == constraint
    assert print_constraint(parse(text)) == text


@given(formulas, formulas)
@settings(deadline=None)
def test_logic_laws(x: Constraint, y: Constraint) -> None:
    assert truth_of(Not(Not(x))) is truth_of(x)
    assert truth_of(Not(And((x, y)))) is truth_of(Or((Not(x), Not(y))))
    assert truth_of(Not(Or((x, y)))) is truth_of(And((Not(x), Not(y))))
    assert truth_of(And((x, y))) is truth_of(And((y, x)))
    assert truth_of(Or((x, y))) is truth_of(Or((y, x)))
    assert truth_of(And((x, x))) is truth_of(Or((x,))) is truth_of(x)
    assert truth_of(And((x, Or((x, y))))) is truth_of(x)


@pytest.mark.parametrize("x", list(Truth))
@pytest.mark.parametrize("y", list(Truth))
def test_truth_tables(x: Truth, y: Truth) -> None:
    clause = {T: Clause("t", "=", "1"), F: Clause("t", "=", "0"), U: Clause("u", "=", "1")}
    rank = {F: 0, U: 1, T: 2}
    both, either = truth_of(And((clause[x], clause[y]))), truth_of(Or((clause[x], clause[y])))
    assert rank[both] == min(rank[x], rank[y])
    assert rank[either] == max(rank[x], rank[y])
    assert rank[truth_of(Not(clause[x]))] == 2 - rank[x]


@given(formulas, st.sampled_from(["0", "1"]))
@settings(deadline=None)
def test_knowing_more_never_changes_a_decision(formula: Constraint, value: str) -> None:
    before = truth_of(formula)
    after = truth_of(formula, {**WORLD, "u": value})
    assert before is U or after is before


# ---- matching ----


def test_match_needs_both_sides() -> None:
    demand, offer = {"budget": 3}, {"mem": 4.0}
    assert match(demand, "(mem>=4)", offer, "(budget>1)")
    assert not match(demand, "(mem>=8)", offer, "(budget>1)")
    assert not match(demand, "(mem>=4)", offer, "(budget>5)")
    assert not match(demand, "(mem>=4)", offer, "(absent>5)")
    assert match(demand, "(mem>=4)", offer, "(absent>5)").offer is U
    assert not match(demand, "(mem>=4", offer, "()")
    assert not match(demand, "()", offer, "")
    assert match(demand, compile_constraint("(mem=*)"), offer, compile_constraint("()"))


def messages(constraint: str, properties: dict[str, Any]) -> list[str]:
    return [reason.message for reason in explain({}, constraint, properties, "()")]


def test_explain_says_what_is_wrong() -> None:
    offer = {"golem.inf.mem.gib": 4.0, "name": "vm", "ver": "x", "odd": None}
    assert messages("(golem.inf.mem.gib>=8)", offer) == ["demand wants golem.inf.mem.gib>=8 but the offer has 4.0"]
    assert messages("(&(name=vm)(disk>=2))", offer) == ["demand wants disk>=2 but the offer has no such property"]
    assert messages("(!(name=vm))", offer) == ['demand does not want name=vm and the offer has "vm"']
    assert messages("(ver$v>=1.0.0)", offer) == ['demand wants ver$v>=1.0.0 but the offer has "x", which is not a version']
    assert messages("(odd=1)", offer) == ["demand wants odd=1 but the offer has null, which no constraint can read"]
    assert messages("(|)", offer) == ["demand constraint holds (|), which is never true"]
    assert messages("(!(&))", offer) == ["demand constraint holds (&), which is always true"]
    (broken,) = explain({}, "()", offer, "(a=b")
    assert broken.message == "offer constraint does not parse: a filter needs a closing ')' (at character 1)"
    (reason,) = explain({"x": 1}, "()", offer, "(x$d>2)")
    assert (reason.side, reason.clause, reason.truth, reason.name, reason.present, reason.value) == (
        "offer", "(x$d>2)", U, "x", True, 1,
    )  # fmt: skip
    assert all(len(message) < 400 for message in messages(f"(name={'x' * 5000})", {"name": "y" * 5000}))


def test_explain_lists_only_what_made_it_fail() -> None:
    def blamed(constraint: str) -> list[str]:
        return [reason.clause for reason in explain({}, constraint, {"a": "1"}, "()")]

    assert blamed("(&(a=1)(|(a=2)(a=3))(!(a=2)))") == ["(a=2)", "(a=3)"]
    assert blamed("(&(|(a=1)(a=2))(b=1))") == ["(b=1)"]
    assert blamed("(!(&(a=1)(!(a=2))))") == ["(a=1)", "(a=2)"]
    assert blamed("(!(|(a=1)(a=2)))") == ["(a=1)"]
    assert blamed("(|(a=1)(b=1))") == []


property_values = st.text(max_size=3) | st.floats() | st.lists(st.text(max_size=2))


@given(constraints, constraints, st.dictionaries(names, property_values))
@settings(deadline=None)
def test_explanation_is_empty_exactly_if_it_matches(x: Constraint, y: Constraint, properties: dict[str, Any]) -> None:
    sides = properties, print_constraint(x), properties, print_constraint(y)
    assert bool(match(*sides)) == (not explain(*sides))


def test_explain_changes_nothing_when_a_blamed_clause_is_repaired() -> None:
    constraint = "(&(a=1)(b>=2)(!(c=3)))"
    offer: dict[str, Any] = {"a": "0", "b": 1, "c": "3"}
    repairs = {"a": "1", "b": 2, "c": "4"}
    while reasons := explain({}, constraint, offer, "()"):
        assert not match({}, constraint, offer, "()")
        offer[reasons[0].name] = repairs.pop(reasons[0].name)
    assert match({}, constraint, offer, "()")
