"""The counters and histograms of a node: a whole agreement, from offer to settled invoice, by the reference's names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Histogram
from trio.testing import trio_test
from worlds.money import KEYS
from worlds.node_in_test import node_in_test
from worlds.whole_life import live

from actors.kernel.grammar import TableMachine
from golem.node.metrics import SLOW, Metrics, Times


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Metrics]:
    """What each node of a whole life has counted."""
    found: dict[str, Metrics] = {}
    handle = TableMachine.handle

    def watched(self: TableMachine, rows: Any, message: Any, meta: Any) -> Any:
        step = handle(self, rows, message, meta)
        found.setdefault(self.node, Metrics()).step(self.name, meta.now, type(message).__name__, step)
        return step

    monkeypatch.setattr(TableMachine, "handle", watched)
    live(KEYS[:3])
    return found


def samples(metrics: Metrics) -> dict[str, float]:
    return {sample.name: sample.value for times in metrics.times for sample in times.metric().samples}


def test_a_life_is_counted_by_the_names_of_the_reference(nodes: dict[str, Metrics]) -> None:
    together = SimpleNamespace(requestor={}, provider={})
    for metrics in nodes.values():
        for name, count in metrics.counts.items():
            for role in ("requestor", "provider"):
                if role in name.split(".") and count:
                    getattr(together, role)[name] = count
    assert {
        "market.proposals.requestor.generated", "market.proposals.requestor.countered", "market.proposals.requestor.received",
        "market.agreements.requestor.created", "market.agreements.requestor.confirmed", "market.agreements.requestor.approved",
        "market.agreements.requestor.terminated", "activity.requestor.created", "activity.requestor.destroyed",
        "activity.requestor.run-exescript", "payment.debit_notes.requestor.received", "payment.debit_notes.requestor.accepted",
        "payment.invoices.requestor.received", "payment.invoices.requestor.accepted", "payment.invoices.requestor.paid",
    } <= together.requestor.keys()  # fmt: skip
    assert {
        "market.proposals.provider.init-negotiation", "market.proposals.provider.countered",
        "market.agreements.provider.proposed", "market.agreements.provider.approved", "market.agreements.provider.terminated",
        "activity.provider.created", "activity.provider.destroyed", "payment.debit_notes.provider.issued",
        "payment.debit_notes.provider.sent", "payment.invoices.provider.issued", "payment.invoices.provider.sent",
        "payment.invoices.provider.paid",
    } <= together.provider.keys()  # fmt: skip
    assert any(metrics.amounts for metrics in nodes.values())


def test_latencies_are_observed_once_for_each_thing(nodes: dict[str, Metrics]) -> None:
    for what in ("proposal", "agreement", "create", "exec", "settle"):
        assert sum(samples(metrics)[f"golem_{what}_seconds_count"] for metrics in nodes.values()) >= 1, what
    for metrics in nodes.values():
        found = samples(metrics)
        agreed = sum(metrics.counts[f"market.agreements.{role}.approved"] for role in ("requestor", "provider"))
        assert found["golem_agreement_seconds_count"] == agreed


@trio_test
async def test_a_node_tells_its_queues_restarts_and_commits(tmp_path: Path) -> None:
    async with node_in_test(tmp_path) as node:
        assert samples(node.metrics)["golem_journal_commit_seconds_count"] >= 1, "a start posts something"
        text = node.metrics_text()
        for line in ("yagna_service_up 1.0", "yagna_version_minor 17.0", "golem_links_stuck 0.0",
                     'golem_mailbox_messages{actor="ledger"} 0.0', 'golem_actor_restarts{actor="market"} 0.0',
                     "golem_protocol_violations_total 0.0"):  # fmt: skip
            assert f"\n{line}\n" in text, line
        chosen = [line for line in node.metrics_text("golem.journal").splitlines() if not line.startswith("#")]
        assert chosen
        assert all(line.startswith("golem_journal") for line in chosen)
        assert node.metrics_text("no.such") == ""


def test_a_histogram_reads_as_one_of_the_library() -> None:
    registry = CollectorRegistry()
    theirs, ours = (
        Histogram("golem_x_seconds", "What, in seconds.", buckets=SLOW, registry=registry),
        Times("golem_x_seconds", "", SLOW),
    )
    for seconds in (0.0, 0.05, 0.0500001, 7.0, 7200.0, 1e9):
        theirs.observe(seconds)
        ours.observe(seconds)

    def values(metric: Any) -> list[Any]:
        return [(one.name, one.labels, one.value) for one in metric.samples if not one.name.endswith("_created")]

    (theirs_metric,) = registry.collect()
    assert sorted(map(str, values(ours.metric()))) == sorted(map(str, values(theirs_metric)))
