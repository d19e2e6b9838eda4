"""Who may say what to a machine: not everybody who has an address may speak for everybody.

An exe-unit has an address on its node, too, and a peer may write any name behind its own node id. So a message of this
node counts from the one actor that states such facts, and a message between nodes from the actor of the same trade.
"""

from __future__ import annotations

from collections.abc import Mapping

from actors.kernel.machine import Meta
from protocol.types import Message, Violation, address, node_of

EDGE = "edge"  # REST, command line, and what else asks on behalf of people


def check_source(message: Message, meta: Meta, me: str, name: str, sources: Mapping[type, str]) -> None:
    """Raise `Violation` unless `meta.sender` may say this to the actor `name` of node `me`.

    `sources` names the actor of this node that alone says a message; whatever is not in it is said between nodes, by
    the actor of the same name on another one.
    """
    source = sources.get(type(message))
    if source is None:
        sender_node = node_of(meta.sender)
        if sender_node == me or meta.sender != address(sender_node, name):
            raise Violation(f"a {type(message).__name__} from {meta.sender[:200]}, which is no {name} of another node")
    elif meta.sender != address(me, source):
        raise Violation(f"a {type(message).__name__} from {meta.sender[:200]}, which is not the {source} of this node")
