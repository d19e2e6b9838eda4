"""What a person sees of a node with a message in quarantine, a timer that fails and a row that cannot be read."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import httpx
import pytest
import trio
from cli.test_cli import golem, run_json, run_text, until

from actors.kernel.records import sealed
from actors.wallet.rows import CycleRow
from golem.lab.localnet import LocalNet, LocalNode
from protocol.codec import encode
from protocol.negotiation import AgreementApproved
from protocol.wallet import CycleDue

pytestmark = pytest.mark.integration

PLATFORM = "erc20-local-tglm"
KEY = f"cycle/{PLATFORM}"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalNode]:
    """A node whose ledger hears of an agreement in words that are no JSON, and whose disk spoiled a row."""
    net = LocalNet(tmp_path_factory.mktemp("sick"))
    try:
        node = trio.run(net.start_node, "sick")
        trio.run(node.process.stop)
        with sqlite3.connect(node.data_dir / "node.db") as db:
            peer = "0x" + 40 * "1"
            poison = AgreementApproved("no-such-deal", "Provider", peer, node.node_id, "spoilt", "{}", 1.0, None)
            link = ("negotiation", f"{node.node_id}/ledger")
            db.execute("insert into outbox values (?,?,1,9e9,'tracepoison',?)", (*link, sealed(*link, encode(poison))))
            db.execute("insert into sent (actor, recipient, seq, epoch) values (?,?,1,'e')", link)
            db.execute("insert into mark values (?,?,'1-aa',1)", link)
            row = encode(CycleRow(PLATFORM, 1.0, 0.0, 1.0))
            db.execute("replace into row (actor, key, body) values ('wallet',?,?)", (KEY, row[:-2]))
            db.execute("replace into timer values ('wallet',?,1.0,'t',?)", (KEY, encode(CycleDue(PLATFORM))))
        node.process.start()
        trio.run(node.wait_ready)
        until(lambda: run_json(node, "status")["quarantine"], "the poison is set aside")
        yield node
    finally:
        trio.run(net.stop)


def test_what_waits_is_named_with_its_reason_shown_released_and_dropped(node: LocalNode) -> None:
    status = run_json(node, "status")
    [(number, actor, sender, error)] = status["quarantine"]
    assert (actor, sender) == ("ledger", f"{node.node_id}/negotiation")
    assert "JSONDecodeError" in error
    assert [row[:2] for row in status["damagedRows"]] == [["wallet", KEY]]
    assert [timer[:2] for timer in status["timers"]] == [["wallet", f"timer {KEY}"]]
    text = run_text(node, "status")
    for words in ("Messages set aside", "JSONDecodeError", "Stored rows that cannot be read", "Timers that could not be handled"):
        assert words in text
    problem = "problem: 1 messages are set aside (golem quarantine list)"
    until(lambda: problem in run_text(node, "status"), "the node says what is wrong")  # once its host is up
    assert str(number) in run_text(node, "quarantine", "list")
    [one] = run_json(node, "quarantine", "list")
    shown = run_json(node, "quarantine", "show", str(one["number"]))
    assert (shown["message"], shown["trace"]) == ("AgreementApproved", "tracepoison")
    assert "no-such-deal" in shown["content"]
    refused = golem(node, "quarantine", "release", str(one["number"]))
    assert refused.exit_code == 1
    assert "ledger failed on it again" in refused.stderr
    assert golem(node, "quarantine", "show", "4711").stderr == "Error: no message with number 4711 is in quarantine\n"
    assert golem(node, "quarantine", "drop", str(one["number"])).exit_code == 0
    assert "Nothing is set aside" in run_text(node, "quarantine", "list")


def test_health_and_metrics_tell_of_it(node: LocalNode) -> None:
    headers = {"Authorization": f"Bearer {node.app_key}"}
    aside = run_json(node, "quarantine", "list")  # what is set aside is named before rows, until somebody drops it
    problem = "messages are set aside (golem quarantine list)" if aside else "stored rows cannot be read (golem status)"
    told: list[httpx.Response] = []

    def says_so() -> bool:
        told.append(httpx.get(f"{node.api_url}/healthcheck", headers=headers))
        return str(told[-1].json()["detail"]).endswith(problem)

    until(says_so, "the node says what is wrong")  # once its host is up
    assert told[-1].status_code == 500
    metrics = httpx.get(f"{node.api_url}/metrics-api/v1/expose", headers=headers).text
    assert "golem_damaged_rows 1" in metrics
    assert "golem_failing_timers 1" in metrics
    assert f"golem_quarantined_messages {len(aside)}\n" in metrics
    answer = httpx.get(f"{node.api_url}/payment-api/v1/batchCycle/{PLATFORM}", headers=headers)
    assert (answer.status_code, KEY in answer.json()["message"]) == (500, True)
