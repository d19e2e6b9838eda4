"""Properties, nested as in JSON or flat as in constraints: the two forms, within bounds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from protocol.property_names import EXPIRATION

MAX_PROPERTIES: Final = 4096
MAX_PROPERTIES_BYTES: Final = 256 * 1024
MAX_VALUES: Final = 8192  # those of lists included: what is signed and matched takes some 10 ms at most
MAX_KEY_DEPTH: Final = 64
TAG: Final = "@tag"
Flat = dict[str, Any]


class TermsError(ValueError):
    """Properties that no node would accept: not JSON, too deep, too large, or two values for one key."""


def flatten(properties: Mapping[str, Any]) -> Flat:
    """Properties, nested or dotted or both, as dotted keys in the order written; floats stay floats and ints ints.

    A segment `@tag` stands for the prefix before it, an empty object stays `{}`, lists are copied and never flattened.
    Raises TermsError; stays within MAX_PROPERTIES, MAX_PROPERTIES_BYTES, MAX_VALUES and MAX_KEY_DEPTH.
    """
    if not isinstance(properties, Mapping):
        raise TermsError(f"properties must be an object, not {type(properties).__name__}")
    flat: Flat = {}
    size = values = 0
    pending: list[tuple[tuple[str, ...], Any]] = [((), properties)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, Mapping) and (value or not path):
            children: list[tuple[tuple[str, ...], Any]] = []
            for key, child in value.items():
                if not isinstance(key, str):
                    raise TermsError(f"a property name must be text, not {type(key).__name__}")
                children.append((_join(path, key), child))
            pending.extend(reversed(children))
            if len(pending) > MAX_PROPERTIES:
                raise TermsError(f"more than {MAX_PROPERTIES} properties")
            continue
        values += _values_in(value, MAX_VALUES - values)
        if values > MAX_VALUES:
            raise TermsError(f"more than {MAX_VALUES} values, those of lists included")
        key = ".".join(path)
        leaf, leaf_bytes = _leaf(key, value, len(path))
        if key in flat and json.dumps(flat[key]) != json.dumps(leaf):
            raise TermsError(f"property {key[:80]!r} has two values")
        flat[key] = leaf
        size += leaf_bytes + _text_bytes(key)
        if len(flat) > MAX_PROPERTIES:
            raise TermsError(f"more than {MAX_PROPERTIES} properties")
        if size > MAX_PROPERTIES_BYTES:
            raise TermsError(f"properties exceed {MAX_PROPERTIES_BYTES} bytes")
    return flat


def _values_in(value: Any, most: int) -> int:
    """Return how many values there are in one, itself included; counting ends above `most`."""
    count, pending = 1, [value]
    while pending and count <= most:
        inner = pending.pop()
        if isinstance(inner, Mapping):
            count += len(inner)
            pending += [one for one in inner.values() if isinstance(one, list | tuple | Mapping)]
        elif isinstance(inner, list | tuple):
            count += len(inner)
            pending += [one for one in inner if isinstance(one, list | tuple | Mapping)]
    return count


def _join(path: tuple[str, ...], key: str) -> tuple[str, ...]:
    if key.count(".") >= MAX_KEY_DEPTH:
        raise TermsError(f"property {key[:80]!r} is more than {MAX_KEY_DEPTH} levels deep")
    for segment in key.split("."):
        if segment != TAG or not path:  # at the very top there is no prefix to tag
            path = (*path, segment)
    if len(path) > MAX_KEY_DEPTH:
        raise TermsError(f"property {'.'.join(path)[:80]!r} is more than {MAX_KEY_DEPTH} levels deep")
    return path


def _text_bytes(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise TermsError("properties hold text that is not valid Unicode (a lone surrogate)") from None


def _leaf(key: str, value: Any, depth: int) -> tuple[Any, int]:
    """A checked copy of one value that is no non-empty object at the top, and its size in bytes."""
    kind = type(value)
    if kind is str:
        return value, _text_bytes(value)
    if value is None or kind is bool:
        return value, 8
    if kind is int:
        if not -(2**63) <= value < 2**64:
            raise TermsError(f"property {key[:80]!r}: an integer must fit 64 bits, write a larger number as a float")
        return value, 8
    if kind is float:
        if not -float("inf") < value < float("inf"):
            raise TermsError(f"property {key[:80]!r}: {value} is not a JSON number")
        return value, 8
    if depth > MAX_KEY_DEPTH:
        raise TermsError(f"property {key[:80]!r} is more than {MAX_KEY_DEPTH} levels deep")
    size = 8
    if isinstance(value, list | tuple):
        elements = []
        for element in value:
            copy, copy_bytes = _leaf(key, element, depth + 1)
            elements.append(copy)
            size += copy_bytes
        return elements, size
    if isinstance(value, Mapping):  # {} itself, or objects inside a list, which stay as they are
        members: dict[str, Any] = {}
        for name, member in value.items():
            if not isinstance(name, str):
                raise TermsError(f"a property name must be text, not {type(name).__name__}")
            members[name], member_bytes = _leaf(key, member, depth + 1)
            size += member_bytes + _text_bytes(name)
        return members, size
    raise TermsError(f"property {key[:80]!r}: {kind.__name__} is not a JSON value")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested tree of flat properties; a key that is also a prefix of others keeps its value under `@tag`.

    `flatten(unflatten(flat)) == flat` for every result of `flatten`. Values are shared, not copied. Raises TermsError
    where a key is too deep or stands for two values.
    """
    tree: dict[str, Any] = {}
    branches: dict[tuple[str, ...], dict[str, Any]] = {(): tree}  # a dict in the tree may also be the value {}
    for key, value in flat.items():
        path = _join((), key)
        branch = tree
        for depth in range(1, len(path)):
            prefix = path[:depth]
            deeper = branches.get(prefix)
            if deeper is None:
                deeper = branches[prefix] = {}
                if path[depth - 1] in branch:
                    deeper[TAG] = branch[path[depth - 1]]
                branch[path[depth - 1]] = deeper
            branch = deeper
        branch, name = (branches[path], TAG) if path in branches else (branch, path[-1])
        if name in branch:
            raise TermsError(f"property {key[:80]!r} has two values")
        branch[name] = value
    return tree


def expiration_s(demand: Mapping[str, Any]) -> float | None:
    """Return when the agreement is to end (seconds since the epoch); None unless the demand says so in integer ms."""
    value = demand.get(EXPIRATION)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**53:
        return None
    return value / 1000
