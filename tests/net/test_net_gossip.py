"""Gossip between whole nodes: delivery, validation, batches, limits, forgeries, restarts."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio
from net_helpers import KEYS, config, eventually, nodes
from worlds.patience import within
from worlds.support import trio_test

from golem.net import NetError, PeerNetwork, open_network
from golem.net.gossip import Outbox
from golem.net.peerid import sign_record

WARM = b"warm"  # begins what is published until the mesh is there; it may come late, and does not count


class Ear:
    """Hears a topic; says "invalid" to what begins with "bad"."""

    def __init__(self, network: PeerNetwork, topic: str = "news") -> None:
        self.heard: list[tuple[str, bytes]] = []
        self.warm: set[bytes] = set()
        network.subscribe(topic, self._hear)

    async def _hear(self, origin: str, payload: bytes) -> bool:
        if payload.startswith(WARM):
            self.warm.add(payload)
        else:
            self.heard.append((origin, payload))
        await trio.lowlevel.checkpoint()
        if payload.startswith(b"crash"):
            raise KeyError("a bug")
        return not payload.startswith(b"bad")

    def payloads(self) -> list[bytes]:
        return [payload for _, payload in self.heard]


async def until_heard(sender: PeerNetwork, ear: Ear, payload: bytes = WARM) -> None:
    """Publish again and again until the mesh is there."""
    with within(10):
        while payload not in ear.warm:
            sender.publish("news", payload)
            await trio.sleep(0.1)


@trio_test
async def test_a_line_of_three_hears_everything_once_and_learns_addresses(tmp_path: Path) -> None:
    async with nodes(tmp_path, 3, target_sessions=0) as (one, two, three):
        one_ear, two_ear, three_ear = Ear(one), Ear(two), Ear(three)
        await two.connect(one.addresses[0])
        await three.connect(two.addresses[0])
        await until_heard(one, three_ear)
        messages = [b"m%03d" % number for number in range(300)]
        for message in messages:
            one.publish("news", message)
        await eventually(lambda: len(three_ear.heard) >= 300 and len(two_ear.heard) >= 300)
        await trio.sleep(0.3)
        assert sorted(three_ear.payloads()) == sorted(two_ear.payloads()) == messages
        assert {origin for origin, _ in three_ear.heard} == {one.node_id}
        assert one_ear.heard == []  # not our own
        assert one.node_id in three.known_peers()
        three.serve("late", _echo)
        assert await one.request(three.node_id, "late", b"x") == b"x" if three.node_id in one.known_peers() else True


async def _echo(sender: str, payload: bytes) -> bytes:
    return payload


@trio_test
async def test_invalid_messages_are_not_forwarded_and_bugs_are_contained(tmp_path: Path) -> None:
    async with nodes(tmp_path, 3, target_sessions=0) as (one, two, three):
        two_ear, three_ear = Ear(two), Ear(three)
        Ear(one)
        await two.connect(one.addresses[0])
        await three.connect(two.addresses[0])
        await until_heard(one, three_ear)
        for payload in (b"bad one", b"crash", b"good"):
            one.publish("news", payload)
            await trio.sleep(0.1)
        await eventually(lambda: b"good" in three_ear.payloads())
        await trio.sleep(0.3)
        assert two_ear.payloads() == [b"bad one", b"crash", b"good"]
        assert three_ear.payloads() == [b"good"]


@trio_test
async def test_size_limit(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (one, two):
        ear = Ear(two)
        await two.connect(one.addresses[0])
        await until_heard(one, ear)
        with pytest.raises(NetError, match="limit is 65536"):
            one.publish("news", bytes(65537))
        big = os.urandom(65536)
        one.publish("news", big)
        await eventually(lambda: big in ear.payloads())


@trio_test
async def test_a_restarted_node_is_heard_at_once(tmp_path: Path) -> None:
    """Sequence numbers of the stock library start at the second, so a restarted node is taken for its own echo."""
    async with open_network(KEYS[0], config(tmp_path / "0")) as one:
        ear = Ear(one)
        await one.wait_up()
        for life in (1, 2):
            async with open_network(KEYS[1], config(tmp_path / "1")) as two:
                await two.connect(one.addresses[0])
                await until_heard(two, ear, b"warm %d" % life)
                assert two._sessions is not None
                assert two._sessions._host.pubsub.counter > 10**18  # nanoseconds: beyond anything sent before
                for number in range(30):
                    two.publish("news", b"%d/%d" % (life, number))
                    await trio.sleep(0.021)
                await eventually(lambda wanted=30 * life: len(ear.heard) == wanted)


@trio_test
async def test_gossip_survives_the_death_of_one_of_two_connections(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (one, two):
        one_ear, two_ear = Ear(one), Ear(two)
        await two.connect(one.addresses[0])
        await until_heard(one, two_ear)
        sessions = two._sessions
        assert sessions is not None
        peer = sessions._peers[one.node_id]
        for death in range(3):
            await sessions._dial(peer)
            await trio.sleep(0.1)
            peer.conns[0].kill("test")
            await eventually(two.sessions)
            await until_heard(one, two_ear, b"warm there %d" % death)
            await until_heard(two, one_ear, b"warm and back %d" % death)


@trio_test
async def test_forged_and_stale_messages_are_dropped(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (one, two):
        ear = Ear(two)
        await two.connect(one.addresses[0])
        await until_heard(one, ear)
        gossip = one._gossip
        assert gossip is not None
        now = int(time.time())
        mine = sign_record(KEYS[0], "golem", []).raw
        foreign = sign_record(KEYS[5], "golem", []).raw
        for data in (
            b"",
            b"\xc1",
            msgpack.packb([now + 60, foreign, [b"foreign record"]]),
            msgpack.packb([now - 1, mine, [b"expired"]]),
            msgpack.packb([now + 100_000, mine, [b"from the future"]]),
            msgpack.packb([now + 60, mine, "text"]),
            msgpack.packb([now + 60, mine, [1]]),
            msgpack.packb([now + 60, mine[:-1] + b"x", [b"bad signature"]]),
            msgpack.packb({"a": 1}),
        ):
            await gossip._pubsub.publish("golem/news", data)
            await trio.sleep(0.05)
        one.publish("news", b"good")
        await eventually(lambda: ear.heard)
        assert ear.payloads() == [b"good"]


@trio_test
async def test_a_flood_of_gossip_is_cut_before_signatures_are_checked(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (one, two):
        Ear(two)
        await two.connect(one.addresses[0])
        host = two._sessions._host  # type: ignore[union-attr]
        seen: list[Any] = []
        host.pubsub._is_msg_seen = lambda message: seen.append(message) or True
        from libp2p.peer.id import ID
        from libp2p.pubsub.pb import rpc_pb2

        message = rpc_pb2.Message(data=b"x", topicIDs=["golem/news"], from_id=b"y", seqno=b"z")
        for _ in range(1000):
            await host.pubsub.push_msg(ID.from_base58(one.peer_id), message)
        assert 0 < len(seen) <= 400  # at most two seconds' worth


@trio_test
async def test_a_slow_handler_does_not_stop_the_others(tmp_path: Path) -> None:
    gate = trio.Event()

    async def stuck(origin: str, payload: bytes) -> bool:
        await gate.wait()
        return True

    async with nodes(tmp_path) as (one, two):
        ear = Ear(two)
        two.subscribe("slow", stuck)
        await two.connect(one.addresses[0])
        await until_heard(one, ear)
        for number in range(5):
            one.publish("slow", b"%d" % number)
            await trio.sleep(0.03)
        one.publish("news", b"still")
        await eventually(lambda: ear.payloads() == [b"still"], 2)


def test_the_outbox_batches_by_topic_and_is_bounded() -> None:
    async def body() -> None:
        outbox = Outbox()
        for number in range(2000):
            outbox.put("a" if number % 2 else "b", b"%d" % number)
        assert outbox.wake.is_set()
        taken: dict[str, list[bytes]] = {"a": [], "b": []}
        while (batch := outbox.take()) is not None:
            topic, payloads, expires_at = batch
            assert len(payloads) <= 256
            assert expires_at > time.time()
            taken[topic] += payloads
        assert not outbox.wake.is_set()
        assert len(taken["a"]) + len(taken["b"]) == 1024  # the newest
        assert taken["a"][-1] == b"1999"
        outbox.put("a", bytes(40_000))
        outbox.put("a", bytes(40_000))
        assert len(outbox.take()[1]) == 1  # type: ignore[index]
        assert len(outbox.take()[1]) == 1  # type: ignore[index]

    trio.run(body)
