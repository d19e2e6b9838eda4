"""The node as edges use it: what `golem.daemon` puts together."""

from __future__ import annotations

import time
import uuid

import trio

from actors.activity.rows import ActivityRow
from actors.kernel.system import System
from golem.base.loop_watch import LoopWatch
from golem.bus.router import Router
from golem.bus.server import Bus
from golem.chain.port import Chain
from golem.config import Config
from golem.files.agents import Services
from golem.files.server import FileServer
from golem.images.store import Registry
from golem.interaction.broker import Interactions
from golem.net import PeerNetwork
from golem.node.app_keys import AppKeys
from golem.node.identity import Identity
from golem.node.metrics import Metrics
from golem.node.payout import Payout
from protocol.codec import encode
from protocol.exeunit import exeunit_name
from protocol.live import Question


class Node:
    """What edges use. Built by `open_node`."""

    def __init__(self, config: Config, identity: Identity, app_keys: AppKeys, router: Router, system: System,
                 network: PeerNetwork, bus: Bus, chain: Chain, files: FileServer, registry: Registry,
                 metrics: Metrics) -> None:  # fmt: skip
        self.config, self.identity, self.app_keys = config, identity, app_keys
        self.router, self.calls, self.system = router, router.calls, system
        self.network, self.bus, self.chain, self.files, self.registry = network, bus, chain, files, registry
        self.services = Services(files)
        self.node_id = identity.node_id
        self.interactions = Interactions(self.node_id, router, self.activity)
        self.name = identity.node_id[:10]
        self.metrics = metrics
        self.payout: Payout | None = None  # where it is paid, if not at its own address
        self.started_at = time.time()
        self.loop = LoopWatch()
        self.api_url = ""
        self.stopping = trio.Event()

    def clock(self) -> float:
        """Return the time in seconds since the epoch."""
        return self.system.now()

    def activity(self, activity_id: str) -> ActivityRow | None:
        """Return the row of an activity that this node is a party of."""
        row: ActivityRow | None = self.system.rows("activity").get(f"activity/{activity_id}")
        return row

    async def ask_exeunit(self, row: ActivityRow, question: Question, timeout_s: float) -> bytes:
        """Return what the exe-unit of an activity answers to a live question. Raises `NetError`."""
        return await self.calls.call(row.provider, exeunit_name(row.activity_id), encode(question), timeout_s)

    def new_id(self) -> str:
        """Return 32 random hex digits."""
        return uuid.uuid4().hex

    def health_problem(self) -> str | None:
        """Return what is wrong with this node, `None` if nothing is."""
        if self.system.journal.trouble:
            return self.system.journal.trouble
        if not self.network.is_up:
            return "the peer-to-peer host is not running (yet)"
        return self.chain.fault() or self.chain.death() or self._debt()

    def _debt(self) -> str | None:
        """Return what of this node's own work is held up by our own fault; strangers' poison makes nobody unwell."""
        own = sum(one.local for one in self.system.quarantined())
        for count, what in ((own, "messages are set aside (golem quarantine list)"),
                            (len(self.system.damaged()), "stored rows cannot be read (golem status)"),
                            (len(self.system.alarms.failing()), "timers cannot be handled (golem status)")):  # fmt: skip
            if count:
                return f"{count} {what}"
        return None

    def metrics_text(self, begins: str = "") -> str:
        """Return the node's counters in Prometheus' text format, or those whose names begin so."""
        more = {
            "golem_loop_long_steps_total": self.loop.long,
            "golem_loop_longest_step_seconds": round(self.loop.longest_s, 4),
            "golem_uptime_seconds": round(time.time() - self.started_at, 1),
        }
        return self.metrics.text(self.system, self.network.sessions(), more, begins)
