"""Work that the port took on is brought back after a kill, and negotiations hold up nobody's money."""

from __future__ import annotations

import sqlite3
from itertools import count
from typing import Any

import httpx
import trio
from test_provider_port import META, Node, Outbox
from worlds.playbook import playbook
from worlds.support import mock_trio_test

from actors.kernel.journal import Journal
from actors.kernel.machine import Emit, Meta, Rows, Send, Step
from actors.kernel.records import Commit
from actors.kernel.system import System
from actors.provider.machine import Provider
from actors.provider.rows import TaskRow
from actors.provider.turn import ProviderConfig
from golem.provider.agent import NoTransport
from golem.provider.port import MAX_PROPOSALS, ProposalPort, RestPort
from protocol.provider import (
    AgentStarted,
    AnswerProposal,
    Capacity,
    NoteSent,
    ReadNote,
    RefuseAgreement,
    RefuseProposal,
    SendNote,
    TaskEnded,
    port_of,
    task_key,
)
from protocol.types import Message

KEPT = (
    AnswerProposal("o1", "p1", "{}", "()"),
    RefuseProposal("o1", "p2", '{"message": "no"}'),
    RefuseAgreement("a1", '{"message": "no"}'),
    ReadNote("x1", 3, "n3", "accept"),
)


def test_what_was_asked_of_the_port_is_asked_again_at_start_until_it_is_over() -> None:
    play = playbook(Provider("agent", ProviderConfig("run-2")))
    for message in KEPT:
        play.rows[f"task/{task_key(message)}"] = TaskRow(message, "run-1")
    play.ask(AgentStarted("session", (), Capacity()))
    asked = [one for port in ("proposals", "rest") for one in play.sent(port) if isinstance(one, KEPT_TYPES)]
    assert sorted(asked, key=task_key) == sorted(KEPT, key=task_key)
    for message in KEPT:
        play.tell(TaskEnded(task_key(message)), "agent/rest")
    assert not [key for key in play.rows if key.startswith("task/")]
    for port in ("proposals", "rest"):
        play.take_sent(port)
    play.ask(AgentStarted("session", (), Capacity()))
    assert not [one for port in ("proposals", "rest") for one in play.sent(port) if isinstance(one, KEPT_TYPES)]


KEPT_TYPES = tuple(type(one) for one in KEPT)


@mock_trio_test
async def test_a_debit_note_leaves_though_hundreds_of_proposals_wait() -> None:
    node, outbox = Node(), Outbox()
    slow = trio.Event()

    async def handle(request: Any) -> Any:
        if "/proposals/" in request.url.path:
            await slow.wait()
        return httpx.Response(200, json="new")

    node.handle = handle  # type: ignore[method-assign]
    port = RestPort(node.client(), outbox, "run-1")  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(port.run)
        with trio.fail_after(5):
            for number in range(3 * MAX_PROPOSALS):
                await port.handle(AnswerProposal("o1", f"p{number}", "{}", "()"), META)
            await port.handle(SendNote("x1", 1, "n1", 2e9), META)
            assert await outbox.receive.receive() == NoteSent("x1", 1, True)
        slow.set()
        ended = {await outbox.receive.receive() for _ in range(3 * MAX_PROPOSALS)}
        assert all(isinstance(one, TaskEnded) for one in ended)
        assert len(ended) == 3 * MAX_PROPOSALS
        nursery.cancel_scope.cancel()


class Flood(Message, frozen=True):
    """A command: send so many counter-proposals, then a debit note."""

    proposals: int


class Mouth:
    """A machine that sends as the provider's does."""

    name = "provider"
    local = Flood | NoteSent | TaskEnded
    peer = None
    rows = Flood

    def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
        if not isinstance(message, Flood):
            return Step({}, [Emit("told", message)])
        talk = [AnswerProposal("o1", f"p{number}", "{}", "()") for number in range(message.proposals)]
        return Step({}, [Send(port_of(one), one) for one in (*talk, SendNote("x1", 1, "n1", 2e9))])


class SlowJournal(Journal):
    """A disk that takes 20 ms for a transaction."""

    async def _store(self, commits: list[Commit], acks: Any) -> None:
        await trio.sleep(0.02)
        await super()._store(commits, acks)


@mock_trio_test
async def test_a_debit_note_behind_600_proposals_is_sent_at_once() -> None:
    """The port commits message by message: on one link the note would wait for 600 transactions."""
    node, sent_at = Node(), list[float]()

    async def handle(request: Any) -> Any:
        if "/debitNotes/" in request.url.path:
            sent_at.append(trio.current_time())
        return httpx.Response(200, json="new")

    node.handle = handle  # type: ignore[method-assign]
    journal = SlowJournal.over(sqlite3.connect(":memory:", isolation_level=None), lambda: "e" * 16)
    numbers = count()
    system = System("agent", journal, NoTransport(), clock=trio.current_time, new_trace=lambda: f"t{next(numbers)}")
    port = RestPort(node.client(), system, "run-1")
    system.add(Mouth())
    system.add_port(port)
    system.add_port(ProposalPort(port))
    async with trio.open_nursery() as nursery:
        await nursery.start(port.run)
        await nursery.start(system.run)
        await system.ask("provider", Flood(600), timeout_s=60)
        began = trio.current_time()
        with trio.move_on_after(60):
            while not sent_at:
                await trio.sleep(0.01)
        assert sent_at, "it waits behind proposals"
        assert sent_at[0] - began < 2, "it waits behind proposals"
        nursery.cancel_scope.cancel()


@mock_trio_test
async def test_a_task_that_is_cut_short_is_not_said_to_be_over() -> None:
    node, outbox = Node(), Outbox()

    async def never(request: Any) -> Any:
        await trio.sleep_forever()

    node.handle = never  # type: ignore[method-assign]
    port = RestPort(node.client(), outbox, "run-1")  # type: ignore[arg-type]
    with trio.move_on_after(5):
        async with trio.open_nursery() as nursery:
            await nursery.start(port.run)
            for message in KEPT:
                await port.handle(message, META)
            await trio.sleep_forever()
    assert outbox.receive.statistics().current_buffer_used == 0
