"""Properties: nested and dotted forms, `@tag`, numbers kept as they are, bounds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.properties import MAX_KEY_DEPTH, MAX_PROPERTIES, MAX_PROPERTIES_BYTES, TermsError, flatten, unflatten


@pytest.mark.parametrize(
    ("properties", "flat"),
    [
        ({}, {}),
        ({"golem": {"node": {"id": {"name": "x"}}}}, {"golem.node.id.name": "x"}),
        ({"golem.node": {"id.name": "x"}, "golem": {"a": 1}}, {"golem.node.id.name": "x", "golem.a": 1}),
        ({"a": {"@tag": "linear", "linear": {"coeffs": [0.1]}}}, {"a": "linear", "a.linear.coeffs": [0.1]}),
        ({"a": {"b": {"@tag": {"c": 1}}}, "a.@tag": 2}, {"a.b.c": 1, "a": 2}),
        ({"@tag": 1, "b": 2}, {"@tag": 1, "b": 2}),
        ({"a": {}, "b": {"c": {}}}, {"a": {}, "b.c": {}}),
        ({"a": [1, {"b": {"c": 2}}, [3, None]]}, {"a": [1, {"b": {"c": 2}}, [3, None]]}),
        ({"a": None, "b": True, "c": 1.0, "d": 1}, {"a": None, "b": True, "c": 1.0, "d": 1}),
        ({"a": {"b": 1}, "a.b": 1}, {"a.b": 1}),
        ({"": {"": 1}, "x.": 2}, {".": 1, "x.": 2}),
    ],
)
def test_flatten(properties: dict[str, Any], flat: dict[str, Any]) -> None:
    result = flatten(properties)
    assert list(result.items()) == list(flat.items())
    assert flatten(result) == result
    assert flatten(unflatten(result)) == result


def test_numbers_keep_their_kind() -> None:
    text = '{"golem.srv.comp.expiration":1700000000000,"mem":4.0,"coeffs":[0.0,1.0,2],"max":18446744073709551615}'
    assert json.dumps(flatten(json.loads(text)), separators=(",", ":")) == text
    assert json.dumps(unflatten(flatten(json.loads('{"a":{"b":4.0}}')))) == '{"a": {"b": 4.0}}'


@pytest.mark.parametrize(
    ("flat", "tree"),
    [
        ({"a.b.c": 1, "a.b.d": 2}, {"a": {"b": {"c": 1, "d": 2}}}),
        ({"m": "linear", "m.linear.coeffs": [1.0]}, {"m": {"@tag": "linear", "linear": {"coeffs": [1.0]}}}),
        ({"m.linear.coeffs": [1.0], "m": "linear"}, {"m": {"linear": {"coeffs": [1.0]}, "@tag": "linear"}}),
        ({"a": {}, "a.b": 1}, {"a": {"@tag": {}, "b": 1}}),
        ({}, {}),
    ],
)
def test_unflatten(flat: dict[str, Any], tree: dict[str, Any]) -> None:
    assert unflatten(flat) == tree


def deep(levels: int) -> dict[str, Any]:
    tree: dict[str, Any] = {"x": 1}
    for _ in range(levels - 1):
        tree = {"x": tree}
    return tree


def nest(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("properties", "said"),
    [
        ([], "must be an object, not list"),
        ({1: 2}, "name must be text"),
        ({"a": {1: 2}}, "name must be text"),
        ({"a": [{1: 2}]}, "name must be text"),
        ({"a": object()}, "object is not a JSON value"),
        ({"a": float("nan")}, "not a JSON number"),
        ({"a": [float("inf")]}, "not a JSON number"),
        ({"a": 2**64}, "must fit 64 bits"),
        ({"a": -(2**63) - 1}, "must fit 64 bits"),
        ({"a": "\ud800"}, "surrogate"),
        ({"\ud800": 1}, "surrogate"),
        ({"a": 1, "b": 2, "a.@tag": 3}, "'a' has two values"),
        ({"a": {"b": 1}, "a.b": 1.0}, "'a.b' has two values"),
        (deep(MAX_KEY_DEPTH + 1), "levels deep"),
        (deep(50_000), "levels deep"),
        ({"x." * MAX_KEY_DEPTH: 1}, "levels deep"),
        ({"." * 10**6: 1}, "levels deep"),
        ({"a": nest(MAX_KEY_DEPTH + 1)}, "levels deep"),
        ({"a": nest(50_000)}, "more than 8192 values"),
        ({str(number): 1 for number in range(MAX_PROPERTIES + 1)}, "more than 4096 properties"),
        ({"a": {str(number): {"b": 1, "c": 1} for number in range(MAX_PROPERTIES // 2 + 1)}}, "more than 4096"),
        ({"a": "é" * (MAX_PROPERTIES_BYTES // 2)}, "bytes"),
        ({"a": ["x" * 100] * (MAX_PROPERTIES_BYTES // 100 + 1)}, "bytes"),
        ({"a": [1] * 8192}, "more than 8192 values"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(properties: Any, said: str) -> None:
    with pytest.raises(TermsError, match=re_escape(said)):
        flatten(properties)


def re_escape(text: str) -> str:
    return text.replace("(", r"\(").replace(".", r"\.")


def test_what_is_just_allowed() -> None:
    assert flatten(deep(MAX_KEY_DEPTH)) == {".".join("x" * MAX_KEY_DEPTH): 1}
    assert unflatten(flatten(deep(MAX_KEY_DEPTH))) == deep(MAX_KEY_DEPTH)
    assert len(flatten({str(number): 1 for number in range(MAX_PROPERTIES)})) == MAX_PROPERTIES


def test_unflatten_refuses_two_values_and_deep_keys() -> None:
    with pytest.raises(TermsError, match="two values"):
        unflatten({"a": 1, "a.@tag": 2})
    with pytest.raises(TermsError, match="two values"):
        unflatten({"a": 1, "a.b": 2, "a.@tag": 3})
    with pytest.raises(TermsError, match="deep"):
        unflatten({"x." * MAX_KEY_DEPTH: 1})


def test_the_input_is_not_shared() -> None:
    source = {"a": [1, [2]]}
    flat = flatten(source)
    source["a"].append(3)
    assert flat == {"a": [1, [2]]}


numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | st.text(max_size=5)
leaves = scalars | st.lists(scalars, max_size=3)
keys = st.text(st.sampled_from("ab.@"), max_size=4) | st.sampled_from(["@tag", "a.@tag", "a", "b"])
trees = st.recursive(leaves, lambda inner: st.dictionaries(keys, inner, max_size=4), max_leaves=12)


@given(st.dictionaries(keys, trees, max_size=5))
@settings(max_examples=300, deadline=None)
def test_flat_properties_survive_the_tree(properties: dict[str, Any]) -> None:
    try:
        flat = flatten(properties)
    except TermsError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert "two values" in said
        return
    assert all(not isinstance(value, dict) or value == {} for value in flat.values())
    assert flatten(flat) == flat
    assert flatten(unflatten(flat)) == flat
    over_the_wire = flatten(json.loads(json.dumps(unflatten(flat))))
    assert json.dumps(over_the_wire, sort_keys=True) == json.dumps(flat, sort_keys=True)
