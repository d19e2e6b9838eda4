"""Whoever breaks the protocol waits for it, ever longer, and a person can see why."""

from __future__ import annotations

from itertools import pairwise

import trio
from test_kernel_limits import Doer, Text, disk, frame, running, system_on
from worlds.support import mock_trio_test

from actors.kernel.complaints import FORGIVEN_S, LAST_WAIT_S, Violators
from actors.kernel.machine import NOTHING
from protocol.codec import decode_ack, encode

BAD, GOOD = encode("no message at all"), encode(Text("good"))


async def pause_after(system_frames: object, seq: int) -> float:
    """Send a frame that breaks the protocol; return how long the next one, which does not, is kept waiting."""
    deliver = system_frames.deliver  # type: ignore[attr-defined]
    assert decode_ack(await deliver(frame(seq, body=BAD), "B")).have == seq
    began = trio.current_time()
    while (ack := decode_ack(await deliver(frame(seq + 1, body=GOOD), "B"))).have == seq:
        assert ack.note == "busy"
        await trio.sleep(0.01)
    assert ack.have == seq + 1
    return trio.current_time() - began


@mock_trio_test
async def test_a_violator_waits_ever_longer_and_no_one_else_does() -> None:
    system = system_on(disk(), Doer(text=lambda rows, meta: NOTHING))
    async with running(system):
        pauses = [await pause_after(system, seq) for seq in range(1, 27, 2)]
        assert pauses[0] < 0.2
        for before, after in pairwise(pauses):
            assert after >= min(1.8 * before, LAST_WAIT_S - 0.1)
        assert LAST_WAIT_S - 0.1 <= pauses[-1] < LAST_WAIT_S + 1, "never longer than that"
        await system.deliver(frame(27, body=BAD), "B")
        assert decode_ack(await system.deliver(frame(28, body=GOOD), "B")).note == "busy"
        assert decode_ack(await system.deliver(frame(1, "C/doer", body=GOOD), "C")).have == 1, "another peer is not meant"
        [(peer, why)] = system.violators.words(system.now())
        assert peer == "B"
        assert "broke the protocol 14 times" in why
        assert "what it sends waits" in why
        await trio.sleep(FORGIVEN_S + 1)
        assert system.violators.words(system.now()) == []
        assert await pause_after(system, 28) < 0.2, "it is forgiven"


def test_who_is_remembered_is_bounded_and_a_frame_counts_once() -> None:
    violators = Violators()
    for number in range(64):
        violators.broke("B", "x", 1.0 + number / 1e6)
    assert not violators.waits("B", 1.2)
    for number in range(5000):
        violators.broke(f"N{number}", "x", 2.0)
    assert len(violators.words(2.0)) == 1024
