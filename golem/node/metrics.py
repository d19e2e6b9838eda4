"""What a node counts and times, in Prometheus' words: the reference's names where it counts the same, `golem_` for what is ours.

Steps of machines are looked at when they are decided; the few that a dying disk takes back are counted all the same.
prometheus_client writes the text. It is imported when somebody first asks for it: a node that nobody watches starts without.
"""

from __future__ import annotations

import importlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import trio

from actors.activity.rows import ActivityRow, BatchRow
from actors.kernel.journal import Journal
from actors.kernel.machine import Emit, Step
from actors.kernel.system import System
from actors.ledger.rows import PaymentDocumentRow, PaymentRow
from actors.negotiation.rows import AgreementRow, ProposalRow
from golem.config import VERSION
from golem.net.types import Session
from protocol.activity import ActivityChanged
from protocol.ledger import DocumentEvent, PaymentEvent
from protocol.negotiation import (
    AgreementApprovedEvent,
    AgreementCancelledEvent,
    AgreementRejectedEvent,
    AgreementTerminatedEvent,
)
from protocol.states import ActivityState, DocumentKind, DocumentStatus, Party, Role

if TYPE_CHECKING:
    from prometheus_client import Metric

FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SLOW = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0)
#: What an edge or a peer said, and what the reference calls it; `{}` is our role.
SAID = {
    ("market", "PublishOffer"): "market.offers.subscribed",
    ("market", "PublishDemand"): "market.demands.subscribed",
    ("negotiation", "Matched"): "market.proposals.requestor.generated",
    ("negotiation", "ProposalOpened"): "market.proposals.provider.init-negotiation",
    ("negotiation", "CounterProposal"): "market.proposals.{}.countered",
    ("negotiation", "ProposalCountered"): "market.proposals.{}.received",
    ("negotiation", "RejectProposal"): "market.proposals.{}.rejected.by-us",
    ("negotiation", "ProposalRejected"): "market.proposals.{}.rejected.by-them",
    ("negotiation", "CreateAgreement"): "market.agreements.requestor.created",
    ("negotiation", "ConfirmAgreement"): "market.agreements.requestor.confirmed",
    ("negotiation", "AgreementProposed"): "market.agreements.provider.proposed",
    ("activity", "Exec"): "activity.requestor.run-exescript",
    ("ledger", "IssueDebitNote"): "payment.debit_notes.provider.issued",
    ("ledger", "IssueInvoice"): "payment.invoices.provider.issued",
}
GONE = {("Withdraw", "offer"): "market.offers.unsubscribed", ("Withdraw", "demand"): "market.demands.unsubscribed",
        ("ExpiryDue", "offer"): "market.offers.expired", ("ExpiryDue", "demand"): "market.demands.expired"}  # fmt: skip
AGREED: dict[type, str] = {
    AgreementApprovedEvent: "approved",
    AgreementRejectedEvent: "rejected",
    AgreementCancelledEvent: "cancelled",
    AgreementTerminatedEvent: "terminated",
}
LIVED = {
    ActivityState.NEW: "created",
    ActivityState.TERMINATED: "destroyed",
    ActivityState.UNRESPONSIVE: "unresponsive",
}
BILLED: dict[str, str] = {
    DocumentStatus.ACCEPTED: "accepted",
    DocumentStatus.REJECTED: "rejected",
    DocumentStatus.CANCELLED: "cancelled",
    DocumentStatus.SETTLED: "paid",
}
PLURAL = {DocumentKind.DEBIT_NOTE: "debit_notes", DocumentKind.INVOICE: "invoices"}


async def load_prometheus() -> None:
    """Import prometheus_client in a thread; `Metrics.text` needs it."""
    await trio.to_thread.run_sync(importlib.import_module, "prometheus_client.core")


class Times:
    """How often something took how long: a histogram, without the library that shows it."""

    def __init__(self, name: str, what: str, bounds_s: tuple[float, ...]) -> None:
        self.name, self._what, self._bounds_s = name, what, bounds_s
        self._counts = [0] * (len(bounds_s) + 1)
        self._sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect_left(self._bounds_s, seconds)] += 1
        self._sum_s += seconds

    def metric(self) -> Metric:
        """Return it as Prometheus knows it."""
        from prometheus_client.core import HistogramMetricFamily

        reached, buckets = 0, []
        for bound, count in zip((*map(str, self._bounds_s), "+Inf"), self._counts, strict=True):
            reached += count
            buckets.append((bound, float(reached)))
        return HistogramMetricFamily(self.name, self._what, buckets=buckets, sum_value=self._sum_s)


class Metrics:
    """The counters and histograms of one node."""

    def __init__(self, journal: Journal | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self.amounts: dict[tuple[str, str], float] = {}  # (name, platform) -> GLM
        self.times: list[Times] = []
        self._proposal = self._histogram("proposal", "From a proposal to its answer", SLOW)
        self._agreement = self._histogram("agreement", "From an agreement's creation to its approval by both", SLOW)
        self._create = self._histogram("create", "From an activity's creation to Initialized", SLOW)
        self._exec = self._histogram("exec", "From a script's start to its last result, at the requestor", SLOW)
        self._settle = self._histogram("settle", "From a bill's issue to its payment, final on chain", SLOW)
        commit = self._histogram("journal_commit", "Writing one batch of commits to the journal", FAST)
        if journal is not None:
            journal.on_commit = commit.observe

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Times:
        self.times.append(Times(f"golem_{name}_seconds", f"{what}, in seconds.", buckets))
        return self.times[-1]

    def step(self, actor: str, now: float, tag: str, step: Step) -> None:
        """A machine has decided. `tag` names the message, `now` is in seconds since the epoch."""
        if not step.rows:
            return  # declined, or nothing to do
        rows = [row for row in step.rows.values() if row is not None]
        if name := SAID.get((actor, tag)):
            role = next((row.role.lower() for row in rows if isinstance(row, ProposalRow | AgreementRow)), "")
            self.counts[name.format(role)] += 1
        if actor == "market":
            for key, row in step.rows.items():
                if row is None and (name := GONE.get((tag, key.partition("/")[0]))):
                    self.counts[name] += 1
        depth = _DEPTH.get(actor)
        events = [effect.message for effect in step.effects if isinstance(effect, Emit) and effect.feed.count("/") == depth]
        if actor == "negotiation":
            self._negotiated(rows, events)
        elif actor == "activity":
            self._lived(rows, events, now)
        elif actor == "ledger":
            self._paid(rows, events, now)

    def _negotiated(self, rows: list[Any], events: list[Any]) -> None:
        proposals = {row.proposal_id: row for row in rows if isinstance(row, ProposalRow)}
        for row in proposals.values():
            if (previous := proposals.get(row.previous_id)) is not None and not row.answer_id:
                self._proposal.observe(max(0.0, row.created - previous.created))
        for row in rows:
            if isinstance(row, AgreementRow):
                for event in events:
                    if (what := AGREED.get(type(event))) is not None:
                        self.counts[f"market.agreements.{row.role.lower()}.{what}"] += 1
                        if what == "approved" and row.approved_at is not None:
                            self._agreement.observe(max(0.0, row.approved_at - row.created))

    def _lived(self, rows: list[Any], events: list[Any], now: float) -> None:
        row = next((row for row in rows if isinstance(row, ActivityRow)), None)
        for event in events:
            if row is None or not isinstance(event, ActivityChanged):
                continue
            if event.state == ActivityState.UNRESPONSIVE and row.role == Role.REQUESTOR:
                continue  # it says so in steps, and the reference has no such name
            if what := LIVED.get(event.state):
                self.counts[f"activity.{row.role.lower()}.{what}"] += 1
            elif event.state == ActivityState.INITIALIZED:
                self._create.observe(max(0.0, now - row.created_at))
        for batch in rows:
            if isinstance(batch, BatchRow) and batch.finished and batch.begun_at:
                self._exec.observe(max(0.0, now - batch.begun_at))

    def _paid(self, rows: list[Any], events: list[Any], now: float) -> None:
        documents = {row.document_id: row for row in rows if isinstance(row, PaymentDocumentRow)}
        payments = {row.payment_id: row for row in rows if isinstance(row, PaymentRow)}
        for event in events:
            if isinstance(event, DocumentEvent) and (row := documents.get(event.document_id)) is not None:
                whose = Role.PROVIDER if event.role == Party.PAYEE else Role.REQUESTOR
                received = "sent" if event.role == Party.PAYEE else "received"
                what = received if event.what == DocumentStatus.RECEIVED else BILLED.get(event.what)
                if what is not None:
                    self.counts[f"payment.{PLURAL[row.kind]}.{whose.lower()}.{what}"] += 1
                if event.what == DocumentStatus.SETTLED:
                    self._settle.observe(max(0.0, now - row.issued_at))
            elif isinstance(event, PaymentEvent) and (payment := payments.get(event.payment_id)) is not None:
                name = "payment.amount.received" if event.role == Party.PAYEE else "payment.amount.sent"
                key = (name, payment.platform)
                self.amounts[key] = self.amounts.get(key, 0.0) + float(payment.amount)

    def text(self, system: System, sessions: Sequence[Session], more: Mapping[str, float], begins: str = "") -> str:
        """Return all in Prometheus' text format, or what has a name that begins so. `more`: values by name."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry()
        registry.register(_Now(self, system, sessions, more))
        found = generate_latest(registry).decode()
        if not begins:
            return found
        named = begins.replace(".", "_").replace("-", "_")
        lines = found.splitlines(keepends=True)
        return "".join(line for line in lines if line.removeprefix("# HELP ").removeprefix("# TYPE ").startswith(named))


_DEPTH = {"negotiation": 0, "activity": 1, "ledger": 0}  # slashes in the one feed that has each event once


class _Now:
    """What is read when somebody asks."""

    def __init__(self, metrics: Metrics, system: System, sessions: Sequence[Session], more: Mapping[str, float]) -> None:
        self._metrics, self._system, self._sessions, self._more = metrics, system, sessions, more

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily, Metric

        system, sessions = self._system, self._sessions
        major, minor, patch = map(int, VERSION.split("."))
        values = {
            "golem_sessions": len(sessions),
            "golem_bytes_in_total": sum(one.bytes_in for one in sessions),
            "golem_bytes_out_total": sum(one.bytes_out for one in sessions),
            "golem_journal_commits_total": system.journal.commits,
            "golem_links_stuck": len(system.troubles()),
            "golem_quarantined_messages": len(system.quarantined()),
            "golem_damaged_rows": len(system.damaged()),
            "golem_failing_timers": len(system.alarms.failing()),
            "golem_protocol_violations": len(system.violations),
            "golem_protocol_violations_total": system.counts["violations"],
            "golem_crashes_total": system.counts["crashes"],
            **self._more,
            "net_connections_p2p": len(sessions),
            "yagna_service_up": 1,
            "yagna_version_major": major,
            "yagna_version_minor": minor,
            "yagna_version_patch": patch,
        }
        for name, value in values.items():
            yield _one(name, value, "counter" if name.endswith("_total") else "gauge")
        for name, count in sorted(self._metrics.counts.items()):
            yield _one(name.replace(".", "_").replace("-", "_"), count, "unknown")
        for name in sorted({name for name, _ in self._metrics.amounts}):
            metric = Metric(name.replace(".", "_"), "Amounts in GLM.", "unknown")
            for (other, platform), amount in sorted(self._metrics.amounts.items()):
                if other == name:
                    metric.add_sample(metric.name, {"platform": platform}, amount)
            yield metric
        waiting = GaugeMetricFamily("golem_mailbox_messages", "Messages that wait for an actor.", labels=["actor"])
        restarts = GaugeMetricFamily("golem_actor_restarts", "Restarts of an actor since the start.", labels=["actor"])
        for actor, length, count in system.queues():
            waiting.add_metric([actor], length)
            restarts.add_metric([actor], count)
        yield from (waiting, restarts)
        yield from (times.metric() for times in self._metrics.times)


def _one(name: str, value: float, kind: str) -> Metric:
    from prometheus_client import Metric

    metric = Metric(name.removesuffix("_total"), name.replace("_", " "), kind)
    metric.add_sample(name, {}, value)
    return metric
