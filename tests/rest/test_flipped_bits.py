"""A flipped bit is not paid: an amount is changed at each station between an accepted invoice and its transaction."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from test_rpcs_away import get, node_on
from worlds.support import tell, trio_test

from actors.kernel.records import sealed, unsealed
from actors.ledger.machine import acceptance_of
from golem.chain.devchain import ensure_devchain, stop_devchain
from golem.node.node import Node
from protocol.codec import Envelope, decode_ack, encode, encode_batch
from protocol.ledger import AcceptDocument, CreateAllocation, DocumentSent, InvoiceBody, encode_body
from protocol.negotiation import AgreementApproved
from protocol.signing import node_id_of, sign
from protocol.types import Done, address

PLATFORM = "erc20-holesky-tglm"
PAYEE_KEY = bytes([7]) * 32
PAYEE = node_id_of(PAYEE_KEY)
OWED, MORE = b"0.001", b"0.003"

Tamper = Callable[[Path], None]


def journal(actor: str, prefix: str, *, is_sealed: bool = True, old: bytes = OWED, new: bytes = MORE) -> Tamper:
    """Change rows of a journal; with a right checksum, as no flipped bit would have it, unless told otherwise."""

    def tamper(folder: Path) -> None:
        with sqlite3.connect(folder / "node.db") as db:
            query = "select key, body from row where actor=? and key like ?"
            found = db.execute(query, (actor, prefix + "%")).fetchall()
            assert found
            for key, stored in found:
                body = unsealed(actor, key, stored)
                assert old in body
                changed = body.replace(old, new)
                whole = sealed(actor, key, changed) if is_sealed else changed + stored[-4:]
                db.execute("update row set body=? where actor=? and key=?", (whole, actor, key))

    return tamper


def several(*tampers: Tamper) -> Tamper:
    def tamper(folder: Path) -> None:
        for each in tampers:
            each(folder)

    return tamper


def chain_db(folder: Path) -> None:
    with sqlite3.connect(folder / "chain.db") as db:
        changed = db.execute("update batch set payees=replace(payees, '1000000000000000', '3000000000000000')").rowcount
        assert changed == 1


WALLET, LEDGER = ("wallet", "order/"), ("ledger", "order/")
TAMPERS: dict[str, tuple[Tamper, str]] = {
    "a bit of the wallet's order": (journal(*WALLET, is_sealed=False), "row order/"),
    "a bit of the wallet's batch": (journal("wallet", "batch/", is_sealed=False), "row batch/"),
    "a bit of the ledger's order": (journal(*LEDGER, is_sealed=False), "row order/"),
    "a bit of the invoice": (journal("ledger", "invoice/", is_sealed=False), "row invoice/"),
    "the wallet's order": (journal(*WALLET), "the wallet has 0.003 GLM"),
    "the wallet's batch": (journal("wallet", "batch/"), "does not pay what the wallet batched"),
    "the engine's batch": (chain_db, "does not pay what the wallet batched"),
    "the wallet and the engine": (several(journal(*WALLET), journal("wallet", "batch/"), chain_db), "the ledger ordered 0.001"),
    "the ledger's order": (journal(*LEDGER), "the ledger ordered 0.003"),
    "all but the invoice": (
        several(journal(*WALLET), journal("wallet", "batch/"), chain_db, journal(*LEDGER)), "0.001 signed and accepted"
    ),
    "all rows": (
        several(journal(*WALLET), journal("wallet", "batch/"), chain_db, journal(*LEDGER), journal("ledger", "invoice/")),
        f"is not what {PAYEE} signed",
    ),
    "the payee": (
        several(*(journal(*row, old=PAYEE.encode(), new=b"0x" + b"12" * 20)
                  for row in (WALLET, ("wallet", "batch/"), LEDGER))),
        "does not pay what the wallet batched",
    ),
}  # fmt: skip


async def owing(node: Node) -> None:
    """The node owes 0.001 for an invoice that it accepted, and its wallet has given the batch to the chain."""
    demand = json.dumps({"golem.com.payment.chosen-platform": PLATFORM})
    fact = AgreementApproved("a1", "Requestor", node.node_id, PAYEE, demand, "{}", node.clock(), "s")
    await tell(node.system, "negotiation", "ledger", fact)
    stamp = "2026-01-01T00:00:00Z"
    body = InvoiceBody("i1", PAYEE, node.node_id, PAYEE, node.node_id, PLATFORM, stamp, "a1", (), "0.001", stamp)
    sent = DocumentSent(sign(PAYEE_KEY, "invoice", encode_body(body)))
    ledgers = address(PAYEE, "ledger"), address(node.node_id, "ledger")
    frame = encode_batch([Envelope(*ledgers, "e1", 1, 0, "t", encode(sent), "1-b")])
    assert decode_ack(await node.system.deliver(frame, PAYEE)).have == 1
    ledger = node.system.rows("ledger")
    assert await node.system.ask("ledger", CreateAllocation("al", node.node_id, PLATFORM, "1", None)) == Done()
    accept = AcceptDocument("invoice", "i1", "0.001", "al", node.identity.sign("acceptance", acceptance_of(ledger["invoice/i1"])))
    assert await node.system.ask("ledger", accept) == Done()
    with trio.fail_after(20):
        while not node.chain._engines["1337"].store.queued():
            await trio.sleep(0.01)


async def prepared(folder: Path, url: str) -> None:
    """A node's folder with a batch that is not signed yet."""
    async with node_on(folder, chain_url=url) as (node, _):
        await node.chain.fund("holesky")
    async with node_on(folder, chain_url=url, connected=False) as (node, _):
        await owing(node)


async def held(node: Node) -> int:
    return (await node.chain.balances("holesky", PAYEE)).token_wei


@pytest.mark.integration
@trio_test
async def test_nothing_is_paid_that_was_not_signed_and_accepted(tmp_path: Path) -> None:
    chain_dir = tmp_path / "chain"
    try:
        url = await ensure_devchain(chain_dir)
        await prepared(tmp_path / "true", url)
        for number, (name, (tamper, words)) in enumerate(TAMPERS.items()):
            folder = tmp_path / f"copy{number}"
            shutil.copytree(tmp_path / "true", folder, ignore=shutil.ignore_patterns("*.sock", "bus*"))
            tamper(folder / "node")
            async with node_on(folder, chain_url=url) as (node, client):
                problems: Any = []
                with trio.move_on_after(20):
                    while not problems:
                        _, problems = await get(client, "/payment-api/v1/payments/status?network=holesky")
                        await trio.sleep(0.02)
                said = [f"{each['kind']}: {each['message']}" for each in problems]
                assert [(each["kind"], words in each["message"]) for each in problems] == [("CantSign", True)], (name, said)
                assert await held(node) == 0, name
        async with node_on(tmp_path / "true", chain_url=url) as (node, client):
            with trio.fail_after(30):
                while node.system.rows("ledger")["invoice/i1"].status != "SETTLED":
                    await trio.sleep(0.02)
            assert await held(node) == 10**15
            assert (await get(client, "/payment-api/v1/payments/status"))[1] == []
    finally:
        await stop_devchain(chain_dir)
