"""What waits for other nodes because they asked for it: bounded per node, whatever they acknowledge.

A question of a few bytes may have an answer of megabytes. Messages to a node that its own messages caused are counted
until they are acknowledged or given up; past the bound the node's frames are "busy". Answers have deadlines, so that two
nodes which are busy for each other do not stay so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from protocol.types import node_of

MAX_BYTES = 4 << 20  # that wait for one node
MAX_MESSAGES = 1024

Link = tuple[str, str]


class Answers:
    """The answers under way, by node."""

    def __init__(self) -> None:
        self._links: dict[Link, deque[tuple[int, int]]] = {}  # number and size of each
        self._nodes: dict[str, list[int]] = {}  # messages and bytes

    def is_full(self, node: str, more: Sequence[tuple[str, int, int]] = ()) -> bool:
        """Return whether so much waits for a node, with `more` that is not on disk yet, that it gets nothing further."""
        messages, size = self._nodes.get(node, (0, 0))
        for recipient, _, length in more:
            if node_of(recipient) == node:
                messages, size = messages + 1, size + length
        return size >= MAX_BYTES or messages >= MAX_MESSAGES

    def add(self, actor: str, recipient: str, seq: int, size: int) -> None:
        """An answer is on disk."""
        self._links.setdefault((actor, recipient), deque()).append((seq, size))
        count = self._nodes.setdefault(node_of(recipient), [0, 0])
        count[0] += 1
        count[1] += size

    def done(self, actor: str, recipient: str, seq: int) -> None:
        """A link's messages up to `seq` are acknowledged."""
        waiting = self._links.get((actor, recipient))
        while waiting and waiting[0][0] <= seq:
            self._forget(recipient, waiting.popleft()[1])
        if waiting is not None and not waiting:
            del self._links[actor, recipient]

    def expired(self, actor: str, recipient: str, seq: int) -> None:
        """One message was given up."""
        waiting = self._links.get((actor, recipient), deque())
        for one in waiting:
            if one[0] == seq:
                waiting.remove(one)
                self._forget(recipient, one[1])
                break
        self.done(actor, recipient, 0)

    def renumbered(self, actor: str, recipient: str) -> None:
        """A link began anew: what waits on it is counted no more."""
        for _, size in self._links.pop((actor, recipient), ()):
            self._forget(recipient, size)

    def _forget(self, recipient: str, size: int) -> None:
        node = node_of(recipient)
        count = self._nodes[node]
        count[0] -= 1
        count[1] -= size
        if not count[0]:
            del self._nodes[node]
