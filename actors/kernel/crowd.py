"""Who makes room where a bounded collection is full: whoever takes most of it, so that nobody closes it for others.

Identities are free, so two questions are asked in turn. While a node stands out, it gives up its oldest. Once none does,
all nodes that come by one network address count as one: that which has most gives up the oldest of its largest node.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple


class Occupant(NamedTuple):
    """One of a collection: whose it is, since when, and how much it takes. `origin`: its network address, "" if not known."""

    at: float
    key: str
    node: str
    origin: str
    size: int = 1


def by_crowd(entries: Iterable[Occupant], stands_out: int) -> Iterator[Occupant]:
    """Yield all entries in the order in which they make room. A node stands out with more than `stands_out`."""
    left = sorted(entries)
    gone = set()
    for one in _from_largest(_by(left, lambda entry: entry.node), iter, stands_out):
        gone.add(one.key)
        yield one
    rest = _by((one for one in left if one.key not in gone), lambda entry: entry.origin or entry.node)
    yield from _from_largest(rest, _of_nodes, 0)


def _of_nodes(entries: list[Occupant]) -> Iterator[Occupant]:
    return _from_largest(_by(entries, lambda entry: entry.node), iter, 0)


def _by(entries: Iterable[Occupant], name: Callable[[Occupant], str]) -> dict[str, list[Occupant]]:
    groups: dict[str, list[Occupant]] = {}
    for entry in entries:
        groups.setdefault(name(entry), []).append(entry)
    return groups


def _from_largest(
    groups: Mapping[str, list[Occupant]], order: Callable[[list[Occupant]], Iterator[Occupant]], least: int
) -> Iterator[Occupant]:
    """Take from the group that is largest at the moment (of equals, the oldest) while one has more than `least`."""
    heap = [(-sum([entry.size for entry in group]), group[0].at, name) for name, group in groups.items()]
    heapq.heapify(heap)
    begun: dict[str, Iterator[Occupant]] = {}  # most groups are never touched
    while heap and -heap[0][0] > least:
        size, at, name = heap[0]
        following = begun.get(name) or begun.setdefault(name, order(groups[name]))
        entry = next(following, None)
        if entry is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (size + entry.size, max(at, entry.at), name))
            yield entry
