"""Work that the port took on is brought back after a kill, and negotiations hold up nobody's money."""

from __future__ import annotations

from typing import Any

import httpx
import trio
from playbook import playbook
from support import mock_trio_test
from test_provider_port import META, Node, Outbox

from actors._provider_rows import TaskRow
from actors._provider_turn import ProviderConfig
from actors.provider import Provider
from golem.provider.port import MAX_PROPOSALS, RestPort
from protocol.provider import (
    AgentStarted,
    Capacity,
    CounterProposal,
    NoteSent,
    ReadNote,
    RejectAgreement,
    RejectProposal,
    SendNote,
    TaskEnded,
    task_key,
)

KEPT = (
    CounterProposal("o1", "p1", "{}", "()"),
    RejectProposal("o1", "p2", '{"message": "no"}'),
    RejectAgreement("a1", '{"message": "no"}'),
    ReadNote("x1", 3, "n3", "accept"),
)


def test_what_was_asked_of_the_port_is_asked_again_at_start_until_it_is_over() -> None:
    play = playbook(Provider("agent", ProviderConfig("run-2")))
    for message in KEPT:
        play.rows[f"task/{task_key(message)}"] = TaskRow(message, "run-1")
    play.ask(AgentStarted("session", (), Capacity()))
    assert [one for one in play.sent("rest") if isinstance(one, KEPT_TYPES)] == sorted(KEPT, key=task_key)
    for message in KEPT:
        play.tell(TaskEnded(task_key(message)), "agent/rest")
    assert not [key for key in play.rows if key.startswith("task/")]
    play.take_sent("rest")
    play.ask(AgentStarted("session", (), Capacity()))
    assert not [one for one in play.sent("rest") if isinstance(one, KEPT_TYPES)]


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
                await port.handle(CounterProposal("o1", f"p{number}", "{}", "()"), META)
            await port.handle(SendNote("x1", 1, "n1", 2e9), META)
            assert await outbox.receive.receive() == NoteSent("x1", 1, True)
        slow.set()
        ended = {await outbox.receive.receive() for _ in range(3 * MAX_PROPOSALS)}
        assert all(isinstance(one, TaskEnded) for one in ended)
        assert len(ended) == 3 * MAX_PROPOSALS
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
