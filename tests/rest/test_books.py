"""The books of real nodes: audited, listed, exported, and who owes what; money on the dev chain."""

from __future__ import annotations

import csv
import io
import sqlite3
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import trio
from msgspec.structs import replace
from test_rest_payment import DUE, PLATFORM, Agent, two
from worlds.support import trio_test

from actors.kernel.records import sealed
from golem.chain.devchain import stop_devchain
from golem.control import bills as _registers_its_commands  # noqa: F401
from golem.control import payment as _registers_too  # noqa: F401
from golem.control.command import COMMANDS
from golem.node.bills import COLUMNS, harmless, outstanding
from protocol.codec import encode


async def command(agent: Agent, name: str, **args: Any) -> Any:
    return await COMMANDS[name](agent.node, args)


async def bill(requestor: Agent, provider: Agent, amount: str, due: str = DUE) -> str:
    """Return an invoice that the requestor has accepted."""
    body = {"agreementId": "a1", "activityIds": ["act"], "amount": amount, "paymentDueDate": due}
    invoice_id = str((await provider.made("/invoices", body))["invoiceId"])
    assert (await provider.post(f"/invoices/{invoice_id}/send"))[0] == 200
    allocation = await requestor.allocation("5")
    accept = {"totalAmountAccepted": amount, "allocationId": allocation["allocationId"]}
    assert (await requestor.post(f"/invoices/{invoice_id}/accept", accept))[0] == 200
    return invoice_id


@trio_test
async def test_the_books_of_two_nodes_add_up_before_and_after_a_real_transfer(tmp_path: Path) -> None:
    try:
        async with two(tmp_path) as (requestor, provider), trio.open_nursery() as nursery:
            invoice_id = await bill(requestor, provider, "1.5", "2020-01-01T00:00:00Z")
            await provider.event("invoice", "AcceptedEvent")
            await _unpaid(requestor, provider)
            for node in (requestor.node, provider.node):
                nursery.start_soon(node.chain.connect)
            await requestor.node.chain.fund("holesky")
            await provider.event("invoice", "SettledEvent", 60)
            await _paid(requestor, provider, invoice_id)
            nursery.cancel_scope.cancel()
    finally:
        await stop_devchain(tmp_path / "chain")


async def _unpaid(requestor: Agent, provider: Agent) -> None:
    """The chain is not there yet."""
    found = await requestor.get("/audit")
    [sums] = found["sums"]
    assert found["addsUp"], found["findings"]
    assert (sums["role"], sums["accepted"], sums["settled"]) == ("payer", "1.5", "0")
    assert Decimal(sums["queued"]) + Decimal(sums["inFlight"]) == Decimal("1.5")
    assert outstanding(requestor.node, PLATFORM) == {"owed": "1.5", "due": "1.5"}
    [debt] = await command(provider, "payment_debtors")
    assert (debt["peer"], debt["owed"], debt["documents"]) == (requestor.node.node_id, "1.5", 1)
    assert debt["lateS"] > 86400, "it was due years ago"


async def _paid(requestor: Agent, provider: Agent, invoice_id: str) -> None:
    found = await command(requestor, "payment_audit")
    [sums] = found["sums"]
    assert found["addsUp"], found["findings"]
    assert (sums["settled"], sums["queued"], sums["inFlight"]) == ("1.5", "0", "0")
    assert (found["transfersCompared"], found["transfersUnknown"]) == (1, 0)
    [held] = found["allocations"]
    assert (held["total"], held["paid"], held["reserved"], held["free"]) == ("5", "1.5", "0", "3.5")
    assert (await provider.get("/audit"))["addsUp"]
    assert await command(provider, "payment_debtors") == []
    status = await command(requestor, "payment_status", network="holesky")
    assert (status["owed"], status["due"], status["inFlight"], status["advice"]) == ("0", "0", [], [])
    ours, theirs = await command(requestor, "payment_bills"), await command(provider, "payment_bills")
    [sent], [received] = ours["bills"], theirs["bills"]
    assert (sent["direction"], received["direction"], sent["status"]) == ("out", "in", "SETTLED")
    assert sent["transaction"] == received["transaction"]
    assert sent["transaction"].startswith("0x")
    header, line = csv.reader(io.StringIO(theirs["csv"]))
    assert tuple(header) == COLUMNS
    assert dict(zip(header, line, strict=True))["document"] == invoice_id


@trio_test
async def test_a_settled_invoice_without_a_transfer_is_named_in_the_books_of_a_node(tmp_path: Path) -> None:
    async with two(tmp_path) as (requestor, provider):
        invoice_id = await bill(requestor, provider, "1.5")
        journal = requestor.node.config.data_dir / "node.db"
        row = requestor.node.system.rows("ledger")[f"invoice/{invoice_id}"]
        key, body = f"invoice/{invoice_id}", encode(replace(row, status="SETTLED"))
        with closing(sqlite3.connect(journal, timeout=5, isolation_level=None)) as sql:
            sql.execute("update row set body=? where actor='ledger' and key=?", (sealed("ledger", key, body), key))
        found = await requestor.get("/audit")
        assert not found["addsUp"]
        assert {"subject": f"invoice {invoice_id}", "words": "is settled for 1.5, and payments cover 0 of it"} in found[
            "findings"
        ]
        with closing(sqlite3.connect(journal, timeout=5, isolation_level=None)) as sql:
            sql.execute("update row set body=x'00' where actor='ledger' and key=?", (key,))
        found = await requestor.get("/audit")
        assert [one["subject"] for one in found["findings"]] == [f"row ledger {key}"]
        with closing(sqlite3.connect(journal, timeout=5, isolation_level=None)) as sql:
            sql.execute("update row set body=? where actor='ledger' and key=?", (sealed("ledger", key, encode(row)), key))


def test_no_cell_is_a_formula() -> None:
    for cell in ("=1+1", "+1", "-1", "@A1", "\t=1", "\r=1"):
        assert harmless(cell) == f"'{cell}"
    assert harmless("0x12") == "0x12"
