"""Gossip and peers' comings and goings, brought from the network to the market."""

from __future__ import annotations

import logging

import trio

from actors.kernel.machine import ActorFailed, AskTimeout, Busy, Send
from actors.kernel.system import System
from golem.net import PeerNetwork
from protocol.codec import Decoder, encode
from protocol.market import Announced, OffersAnnounced, PeerUp
from protocol.types import Message, Violation

log = logging.getLogger("golem.node.gossip")

OFFERS = "offers"
MAX_GOSSIP_BYTES = 64 * 1024


class MarketGossip:
    """The market's ear and mouth on the network."""

    def __init__(self, network: PeerNetwork) -> None:
        self._network = network
        self._system: System | None = None
        self._decode: Decoder[OffersAnnounced] = Decoder(OffersAnnounced, MAX_GOSSIP_BYTES)
        self._came_up = trio.Event()
        self._up: list[str] = []
        network.subscribe(OFFERS, self._heard)

    def attach(self, system: System) -> None:
        """From now on, tell `system`."""
        self._system = system

    def publish(self, topic: str, message: Message) -> None:
        """The kernel's way out for `Publish`."""
        self._network.publish(topic, encode(message))

    async def _heard(self, origin: str, payload: bytes) -> bool:
        """Validate gossip before it is passed on; give it to the market."""
        try:
            announcement = self._decode(payload)
        except Violation as violation:
            log.info("gossip of %s dropped: %s", origin, violation)
            return False
        if self._system is not None:
            try:
                await self._system.ask("market", Announced(origin, announcement), timeout_s=5)
            except (Busy, AskTimeout):
                log.info("gossip of %s dropped: the market is busy; the offers will be announced again", origin)
            except ActorFailed as error:  # a full disk, for one: it says nothing about who spoke
                log.info("gossip of %s dropped: %s; the offers will be announced again", origin, error)
            except Violation as violation:
                log.info("gossip of %s dropped: %s", origin, violation)
                return False
        return True

    def peer(self, node: str, up: bool) -> None:
        """A session came up or went down (called in the event loop)."""
        if up and self._system is not None:
            self._system.peer_up(node)
            self._up.append(node)
            self._came_up.set()

    async def run(self) -> None:
        """Tell the market of peers that came up."""
        while True:
            await self._came_up.wait()
            self._came_up = trio.Event()
            nodes, self._up = list(dict.fromkeys(self._up)), []
            if self._system is not None and nodes:
                await self._system.post("network", [Send("market", PeerUp(node), 60.0) for node in nodes])
