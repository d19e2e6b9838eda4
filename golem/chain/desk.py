"""What people ask an engine about a payment, and what they decide: where RPCs do not prove what became of it."""

from __future__ import annotations

import re
from typing import Any

from golem.chain.engine import Engine
from golem.chain.evidence import Story
from golem.chain.store import Attempt, BatchRow, TxRow
from golem.chain.verify import shortfall
from protocol.types import amount_text, from_wei, timestamp_text

_HASH = re.compile(r"0x[0-9a-f]{64}\Z")


def story(engine: Engine, batch_id: str) -> dict[str, Any] | None:
    """A batch, its transactions, and what this node and each RPC said of them; None when it is not known here."""
    row = engine.store.batch(batch_id)
    if row is None:
        return None
    return {
        "batchId": batch_id, "state": row.state, "reason": row.reason,
        "payees": [{"address": payee, "amount": amount_text(from_wei(wei))} for payee, wei in row.batch.payees],
        "transactions": [_told(engine, tx) for tx in engine.store.txs_of_batch(batch_id)],
    }  # fmt: skip


def _told(engine: Engine, tx: TxRow) -> dict[str, Any]:
    return {
        "nonce": tx.nonce, "state": tx.state, "hash": tx.winner or None, "block": tx.block or None,
        "attempts": [_attempt(each) for each in reversed(engine.store.attempts(tx.id))],
        "seen": [
            {"at": timestamp_text(each.at), "by": each.teller, "what": each.text} for each in engine.store.seen(tx.id)
        ],
    }  # fmt: skip


def _attempt(attempt: Attempt) -> dict[str, Any]:
    gwei = attempt.max_fee / 1e9
    return {"at": timestamp_text(attempt.created), "hash": attempt.hash, "maxFeeGwei": gwei, "sent": attempt.sends}


async def decide(engine: Engine, batch_id: str, tx_hash: str | None) -> str:
    """A person says what the RPCs do not prove: that transaction `tx_hash` paid a batch, or (None) that nothing did.

    What was decided, in words. ValueError where nothing is to be decided, or an RPC shows that what is called unpaid was
    paid; RpcError when no RPC answers.
    """
    async with engine.turn:
        tx = _undecided(engine, batch_id)
        if tx_hash is not None:
            if not _HASH.match(tx_hash.lower()):
                raise ValueError(f"not a transaction hash: {tx_hash[:80]!r}")
            engine.store.mark_mined(tx.id, tx.block, tx.block_hash, tx_hash.lower())
            engine.end(tx, "confirmed", f"a person decided that {tx_hash.lower()} paid it")
            words = f"payment {batch_id} counts as paid by {tx_hash.lower()}"
        else:
            if max(view.count for view in await engine.evidence.views()) <= tx.nonce:
                raise ValueError(f"nonce {tx.nonce} is free: the transaction of payment {batch_id} is sent again by itself")
            if shows := [*await _shown(engine, tx), *await engine.evidence.moved(engine.payment(tx))]:
                said = "; ".join(f"{story.teller} {story.text}" for story in shows)
                raise ValueError(
                    f"payment {batch_id} would be paid twice: {said}. If that is a lie, leave this RPC out "
                    f"({engine.network.name.upper()}_GETH_ADDR names those to use) and decide again"
                )
            engine.end(tx, "nonce_lost", "a person decided that it paid nothing")
            words = f"payment {batch_id} counts as not paid, and is paid anew"
        engine.unclear.pop(tx.id, None)
    engine.wake()
    return words


async def _shown(engine: Engine, tx: TxRow) -> list[Story]:
    """Which RPCs show a receipt by which it paid, final or not."""
    evidence = engine.evidence
    shown = await evidence.receipts(await evidence.views(), engine.store.hashes(tx))
    paid = [(view, receipt) for view, receipt in shown if receipt.succeeded]
    return [
        Story(view.name, f"shows that {receipt.hash} paid it, in block {receipt.block}") for view, receipt in paid
        if not shortfall(receipt, engine.network, engine.address, engine.payees(tx))
    ]  # fmt: skip


def _undecided(engine: Engine, batch_id: str) -> TxRow:
    row: BatchRow | None = engine.store.batch(batch_id)
    if row is None:
        raise ValueError(f"no payment {batch_id[:64]} is known here")
    tx = next((tx for tx in engine.store.open() if tx.batch_id == batch_id), None)
    if tx is None or tx.id not in engine.unclear:
        state = row.state if tx is None else tx.state
        raise ValueError(f"payment {batch_id} ({state}) is in doubt nowhere: there is nothing to decide")
    return tx
