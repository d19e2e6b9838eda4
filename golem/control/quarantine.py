"""The node's side of `golem quarantine`, and what `golem status` says about things that wait."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from actors.kernel.machine import ActorFailed, AskTimeout, Busy
from actors.kernel.records import SetAside
from golem.control.command import command
from protocol.types import Violation, timestamp_text

if TYPE_CHECKING:
    from golem.node.node import Node

SHOWN_CHARS = 20_000  # of a message's content


def _form(one: SetAside) -> dict[str, Any]:
    return {
        "number": one.number, "at": timestamp_text(one.at), "actor": one.actor, "sender": one.sender, "trace": one.trace,
        "error": one.error,
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """Return a decoded message as JSON can hold it."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    return value


def _content(body: bytes) -> tuple[str, str]:
    """Return a message's kind and its content as text."""
    try:
        found = msgspec.msgpack.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return "?", body.hex()[:SHOWN_CHARS]
    kind = str(found[0]) if isinstance(found, list) and found else "?"
    return kind, msgspec.json.encode(_plain(found)).decode()[:SHOWN_CHARS]


@command
async def quarantine_list(node: Node, args: dict[str, Any]) -> Any:
    """Messages that crashed their actor and were set aside."""
    return [_form(one) for one in node.system.quarantined()]


@command
async def quarantine_show(node: Node, args: dict[str, Any]) -> Any:
    """One of them, with its content."""
    one = node.system.journal.set_aside(int(args["number"]))
    if one is None:
        raise LookupError(f"no message with number {args['number']} is in quarantine")
    kind, content = _content(one.body)
    return _form(one) | {"message": kind, "size": len(one.body), "content": content}


@command
async def quarantine_release(node: Node, args: dict[str, Any]) -> Any:
    """Have it handled after all."""
    try:
        await node.system.release(int(args["number"]))
    except (ActorFailed, AskTimeout, Busy, Violation) as error:
        raise ValueError(str(error)) from None


@command
async def quarantine_drop(node: Node, args: dict[str, Any]) -> Any:
    """Forget it."""
    await node.system.discard(int(args["number"]))


def waiting(node: Node) -> dict[str, list[list[Any]]]:
    """Return what waits and why: links, timers, rows that cannot be read, older peers, messages that were set aside."""
    system = node.system
    return {
        "links": [list(link) for link in system.troubles()],
        "restarts": [[name, count] for name, _, count in system.queues() if count],
        "queues": [[name, length] for name, length, _ in system.queues() if length],
        "timers": [[one.actor, one.what, one.error, one.times, timestamp_text(one.again)] for one in system.alarms.failing()],
        "damagedRows": [list(row) for row in system.damaged()],
        "clocks": [list(one) for one in node.network.clocks().items()],
        "olderPeers": [list(one) for one in system.older.items()],
        "wentBack": [[timestamp_text(at), peer, what] for peer, (at, what) in system.went_back.items()],
        "violators": [list(one) for one in system.violators.words(system.now())],
        "quarantine": [[one.number, one.actor, one.sender, one.error] for one in system.quarantined()],
    }
