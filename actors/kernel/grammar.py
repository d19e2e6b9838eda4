"""The one grammar of machines: a table says what may be said to a machine, by whom, and what carries it out.

    class Wallet(TableMachine):
        name, rows = "wallet", WalletRow
        table = Table(
            On(PayOut, "ledger", pay_out),
            On(SetCycle, EDGE, set_cycle),
            On(CycleDue, ITSELF, cycle_due),
        )

From it derive the unions that the kernel decodes, the check of who speaks, the dispatch, and the message map of
docs/architecture.md. A handler takes a draft and the message. It raises `Declined` for an expected no, and `Violation`
where the sender broke the protocol; either takes back the whole step.

Not everybody who has an address may speak for everybody: an exe-unit has an address on its node, too, and a peer may
write any name behind its own node id. So a message of this node counts from the one actor that states such facts, and a
message between nodes from the actor of the same trade.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Union

from actors.kernel.draft import Declined, Draft
from actors.kernel.machine import Meta, Reply, Rows, Step
from protocol.types import Message, Violation, address, node_of

EDGE = "edge"  # REST, command line, and what else asks on behalf of people
ITSELF = "itself"  # timers, and what the kernel says about the machine's own messages
PEER = "peer"  # the actor of the same name on another node

Handler = Callable[[Any, Any], None]


@dataclass(frozen=True, slots=True)
class Looked:
    """Several may say it, and the handler looks at the sender itself: `who` tells people. Of this node, or of others."""

    who: str
    here: bool = False


@dataclass(frozen=True, slots=True)
class On:
    """A message, who alone may say it (`EDGE`, `ITSELF`, `PEER`, or the name of an actor of this node), what it does."""

    message: type[Message]
    source: str | Looked
    handler: Handler

    @property
    def here(self) -> bool:
        """Return whether it is said on this node."""
        return self.source.here if isinstance(self.source, Looked) else self.source != PEER


class Table:
    """All that may be said to a machine."""

    def __init__(self, *entries: On) -> None:
        self.entries = {on.message: on for on in entries}
        assert len(self.entries) == len(entries), "a message stands twice"
        self.handlers: dict[type[Message], Handler] = {on.message: on.handler for on in entries}
        self._speakers = {on.message: on.source for on in entries}
        self.local = union_of(on.message for on in entries if on.here)
        self.peer = union_of(on.message for on in entries if not on.here)

    def check(self, message: Message, meta: Meta, me: str, name: str) -> None:
        """Raise `Violation` unless `meta.sender` may say this to the actor `name` of node `me`."""
        source = self._speakers.get(type(message), "")
        if source == PEER:
            node = node_of(meta.sender)
            if node == me or meta.sender != address(node, name):
                raise Violation(f"a {type(message).__name__} from {meta.sender[:200]}, which is no {name} of another node")
        elif not source:
            raise Violation(f"no message for {name}: {type(message).__name__}")
        elif not isinstance(source, Looked):
            actor = name if source == ITSELF else source
            if meta.sender != address(me, actor):
                raise Violation(f"a {type(message).__name__} from {meta.sender[:200]}, which is not the {actor} of this node")

    def speaker(self, message: type[Message], name: str) -> str | None:
        """Return the actor of this node that alone says a message to the actor `name`; None where there is no such one."""
        source = self._speakers.get(message)
        return name if source == ITSELF else source if isinstance(source, str) and source != PEER else None


def union_of(messages: Iterable[type[Message]]) -> Any:
    """Return the type that a decoder takes for any of these messages; None for no message."""
    found = tuple(messages)
    return Union[found] if found else None  # noqa: UP007


class TableMachine:
    """A machine whose decisions are the handlers of its table. `node` is ours."""

    name: str
    table: ClassVar[Table]
    rows: ClassVar[Any]
    local: ClassVar[Any]
    peer: ClassVar[Any]

    def __init_subclass__(cls) -> None:
        cls.local, cls.peer = cls.table.local, cls.table.peer

    def __init__(self, node: str) -> None:
        self.node = node

    def draft(self, rows: Rows, meta: Meta) -> Draft:
        """Return the step to be, before anything is decided."""
        return Draft(rows, meta, self.node)

    def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
        """Carry out a message. An expected no is the reply, and as a rule changes nothing. Raises `Violation`."""
        self.table.check(message, meta, self.node, self.name)
        draft = self.draft(rows, meta)
        try:
            self.carry_out(draft, message)
        except Declined as no:
            if not no.keep:
                return Step(effects=(Reply(no.refusal),))
            draft.reply(no.refusal)
        return draft.step()

    def carry_out(self, draft: Any, message: Any) -> None:
        """Let the message's handler decide."""
        self.table.handlers[type(message)](draft, message)
