"""Plays messages into pure machines and shows what they decide.

    play = playbook(Market(NODE))
    play.ask(PublishOffer(document))           # an edge's message; returns the reply
    play.tell(GetOffers(ids), PEER)            # a peer's message; returns the step's effects
    play.at(+60)                               # lets time pass; due timers fire in order
    play.rows["offer/..."], play.feed("demand/..."), play.sent("negotiation"), play.published

Everything goes through the codec on its way, with the unions that the machine declares, as in a running node.
`Nodes` links several machines: messages between them wait in ordered links until the test (or a seed) delivers them.
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right, insort
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from actors.kernel.grammar import Table
from actors.kernel.machine import DropFeed, Effect, Emit, Machine, Meta, Publish, Reply, Send, Step, Wake
from protocol.codec import Decoder, encode
from protocol.types import Message, Undelivered, Violation, node_of

START = 1_800_000_000.0


class TableRows(dict[str, Any]):
    """Rows over a dict; its keys are kept in order, for long histories ask for prefixes all the time."""

    def __init__(self, rows: Mapping[str, Any] | None = None) -> None:
        super().__init__(rows or {})
        self._ordered: list[str] = sorted(self)

    def __setitem__(self, key: str, row: Any) -> None:
        if key not in self:
            insort(self._ordered, key)
        super().__setitem__(key, row)

    def __delitem__(self, key: str) -> None:
        self.pop(key)

    def pop(self, key: str, *default: Any) -> Any:
        if key in self:
            del self._ordered[bisect_left(self._ordered, key)]
        return super().pop(key, *default)

    def clear(self) -> None:
        self._ordered.clear()
        super().clear()

    def update(self, rows: Mapping[str, Any]) -> None:  # type: ignore[override]
        for key, row in rows.items():
            self[key] = row

    def prefix(self, prefix: str) -> Iterator[tuple[str, Any]]:
        assert len(self._ordered) == len(self), "rows are set one by one"
        first, last = bisect_left(self._ordered, prefix), bisect_right(self._ordered, prefix + chr(0x10FFFF))
        for key in self._ordered[first:last]:
            yield key, self[key]


class Playbook:
    """One machine, its rows, and all it ever asked for."""

    def __init__(self, machine: Machine, node: str, now: float = START) -> None:
        self.machine, self.node, self.now = machine, node, now
        self.rows = TableRows()
        self.sends: list[Send] = []
        self.published: list[Publish] = []
        self.feeds: dict[str, list[Message]] = defaultdict(list)
        self.timers: dict[str, tuple[float, Message]] = {}
        self.violations: list[str] = []
        self._local = Decoder[Message](machine.local | machine.peer, 1 << 26)
        self._peer = Decoder[Message](machine.peer | type(None), 1 << 26)
        self._row = Decoder[Message](machine.rows, 1 << 26)

    def ask(self, message: Message) -> Any:
        """Give an edge's message; return the reply (None if there is none)."""
        return next((effect.message for effect in self.tell(message) if isinstance(effect, Reply)), None)

    def tell(self, message: Message, sender: str = "", origin: str = "") -> Sequence[Effect]:
        """Give a message of node or address `sender` (default: whoever of this node says it); return the effects.

        Raises `Violation`.
        """
        if sender and "/" not in sender:
            sender = f"{sender}/{self.machine.name}"
        table: Table | None = getattr(self.machine, "table", None)
        speaker = table.speaker(type(message), self.machine.name) if table else None
        sender = sender or f"{self.node}/{speaker or 'edge'}"
        decode = self._local if node_of(sender) == self.node else self._peer
        step = self.machine.handle(self.rows, decode(encode(message)), Meta(sender, self.now, "trace", origin))
        self._apply(step)
        return step.effects

    def _apply(self, step: Step) -> None:
        for key, row in step.rows.items():
            if row is None:
                self.rows.pop(key, None)
            else:
                self.rows[key] = self._row(encode(row))
                assert self.rows[key] == row, "a row changes when it is stored"
        for effect in step.effects:
            match effect:
                case Send():
                    self.sends.append(effect)
                case Publish():
                    self.published.append(effect)
                case Emit(feed, message):
                    self.feeds[feed].append(message)
                case DropFeed(feed):
                    self.feeds.pop(feed, None)
                case Wake(key, None):
                    self.timers.pop(key, None)
                case Wake(key, at, message):
                    assert at is not None
                    assert message is not None
                    self.timers[key] = (at, message)

    def at(self, seconds: float) -> None:
        """Let time pass; timers that come due on the way fire in order, at their time."""
        until = self.now + seconds
        for _ in range(100_000):
            due = sorted((at, key) for key, (at, _) in self.timers.items() if at <= until)
            if not due:
                self.now = until
                return
            at, key = due[0]
            self.now = max(self.now, at)
            _, message = self.timers.pop(key)
            self.tell(message, f"{self.node}/{self.machine.name}")
        raise AssertionError("timers never come to rest")

    def sent(self, to: str) -> list[Any]:
        """Return the messages sent so far to an actor of this node (`ledger`) or an address (`0x…/market`)."""
        return [send.message for send in self.sends if send.to in (to, f"{self.node}/{to}")]

    def take_sent(self, to: str) -> list[Any]:
        """The same, and forget them."""
        found = self.sent(to)
        self.sends = [send for send in self.sends if send.to not in (to, f"{self.node}/{to}")]
        return found

    def feed(self, name: str) -> list[Any]:
        """Return the events of a feed."""
        return list(self.feeds.get(name, ()))

    def take(self, name: str) -> list[Any]:
        """Return the events of a feed and delete them, as a poll does."""
        return self.feeds.pop(name, [])


def playbook(machine: Machine, node: str | None = None, now: float = START) -> Playbook:
    """Return a playbook for a machine; `node` is its node's id (default: `machine.node`)."""
    return Playbook(machine, node or machine.node, now)  # type: ignore[attr-defined]


class Nodes:
    """Several machines of several nodes, with ordered links in between."""

    def __init__(self, *plays: Playbook) -> None:
        self.plays = {f"{play.node}/{play.machine.name}": play for play in plays}
        self.links: dict[tuple[str, str], deque[Send]] = defaultdict(deque)
        self.unlinked: list[Send] = []

    def collect(self) -> None:
        """Put what the machines sent into the links; what is for nobody here stays in `unlinked`."""
        for address, play in self.plays.items():
            for send in play.sends:
                to = send.to if "/" in send.to else f"{play.node}/{send.to}"
                if to in self.plays:
                    self.links[address, to].append(send)
                else:
                    self.unlinked.append(send)
            play.sends = []

    def waiting(self) -> list[tuple[str, str]]:
        """Return the links that have a message waiting, in a fixed order."""
        self.collect()
        return sorted(link for link, messages in self.links.items() if messages)

    def deliver(self, link: tuple[str, str]) -> Message:
        """Deliver the first message of a link; a violation is noted at the receiver, as the kernel does."""
        sender, to = link
        send = self.links[link].popleft()
        try:
            self.plays[to].tell(send.message, sender)
        except Violation as violation:
            self.plays[to].violations.append(str(violation))
        return send.message

    def lose(self, link: tuple[str, str], *, arrived: bool = False) -> Message:
        """The first message of a link passes its deadline: its sender gets `Undelivered` (it may have arrived after all)."""
        sender, to = link
        message = self.deliver(link) if arrived else self.links[link].popleft().message
        self.plays[sender].tell(Undelivered(to, encode(message)), sender)
        return message

    def settle(self, rng: random.Random | None = None, limit: int = 10_000) -> None:
        """Deliver until nothing waits, link by link or as the dice say."""
        for _ in range(limit):
            waiting = self.waiting()
            if not waiting:
                return
            self.deliver(rng.choice(waiting) if rng else waiting[0])
        raise AssertionError("messages never come to rest")
