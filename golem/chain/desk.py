"""What people ask an engine about a payment, and what they decide: where RPCs do not prove what became of it."""

from __future__ import annotations

import re
from typing import Any

from golem.chain.engine import Engine
from golem.chain.evidence import Story, Unclear
from golem.chain.lost import named
from golem.chain.rows import Attempt, ChainBatchRow, TransferState, TxRow
from golem.chain.rpc import Receipt
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


async def decide(engine: Engine, batch_id: str, tx_hash: str | None, *, unseen: bool = False) -> str:
    """A person says what the RPCs do not prove: that transaction `tx_hash` paid a batch, or (None) that nothing did.

    `unseen`: though no RPC shows that transaction. What was decided, in words. ValueError where nothing is to be decided, or
    an RPC shows otherwise; RpcError when no RPC answers.
    """
    if tx_hash is not None and not _HASH.match(tx_hash := tx_hash.lower()):
        raise ValueError(f"not a transaction hash: {tx_hash[:80]!r}")
    async with engine.turn:
        row = engine.store.batch(batch_id)
        if row is None:
            raise ValueError(f"no payment {batch_id[:64]} is known here")
        txs = [tx for tx in engine.store.open() if tx.batch_id == batch_id and (not tx.void or tx.id in engine.unclear)]
        tx = next(iter(txs), None)
        if twice := [newer for _, newer in engine.store.doubled() if newer.batch_id == batch_id]:
            words = _known(engine, twice[0], tx_hash)
        elif row.state == TransferState.QUEUED:
            words = _unsigned(engine, row, tx_hash, unseen)
        elif tx is None or tx.id not in engine.unclear:
            state = tx.state if tx else row.state
            raise ValueError(f"payment {batch_id} ({state}) is in doubt nowhere: there is nothing to decide")
        elif (payer := engine.lost.paid_by(batch_id, tx.id)) and await _is_free(engine, tx):
            words = await _instead(engine, tx, payer, tx_hash, unseen)
        else:
            words = await (_unpaid(engine, tx) if tx_hash is None else _paid(engine, tx, tx_hash, unseen))
        if tx:
            engine.unclear.pop(tx.id, None)
    engine.wake()
    return words


async def _is_free(engine: Engine, tx: TxRow) -> bool:
    return max(view.count for view in await engine.evidence.views()) <= tx.nonce


def _known(engine: Engine, newer: TxRow, tx_hash: str | None) -> str:
    """A person knows that a debt was paid twice."""
    if tx_hash != newer.winner:
        raise ValueError(f"payment {newer.batch_id} was paid by {newer.winner}: --paid {newer.winner} says that you know")
    engine.store.assure(newer.id)
    engine.store.note(newer.id, "a person", "knows that it was paid twice", engine.now())
    return f"payment {newer.batch_id} is not named any more; its payee owes you what was paid twice"


def _unsigned(engine: Engine, row: ChainBatchRow, tx_hash: str | None, unseen: bool) -> str:
    """A batch for which nothing was signed, since it is not what is owed: it goes back, or was paid by an older one."""
    batch_id, payer = row.batch.batch_id, engine.lost.paid_by(row.batch.batch_id)
    if payer and payer.winner == tx_hash and unseen:
        engine.store.batch_paid(batch_id)
        return f"payment {batch_id} counts as paid by {tx_hash}"
    if batch_id not in engine.queue.unowed:
        raise ValueError(f"payment {batch_id} is not signed yet, and in no doubt: `golem payment status` tells what it waits for")
    if tx_hash is not None:
        raise ValueError(f"nothing was ever signed for payment {batch_id}: say --unpaid, and it goes back to be gathered anew")
    if engine.store.txs_of_batch(batch_id):
        raise ValueError(f"payment {batch_id} was told to be paid once: {engine.queue.unowed[batch_id]}")
    engine.store.refuse(batch_id, f"a person took it back: {engine.queue.unowed[batch_id]}", ())
    return f"payment {batch_id} is taken back: nothing was signed for it; the orders in it that this node knows are paid anew"


async def _instead(engine: Engine, tx: TxRow, payer: TxRow, tx_hash: str | None, unseen: bool) -> str:
    """An older transaction has paid orders of one whose nonce is free again (`golem.chain.lost`)."""
    if tx_hash is None:
        engine.store.assure(tx.id)
        engine.store.note(tx.id, "a person", f"decided that it pays beside {payer.winner}", engine.now())
        return f"payment {tx.batch_id} is sent again, beside {payer.winner}"
    if tx_hash != payer.winner:
        raise ValueError(f"payment {tx.batch_id} is in doubt because of {payer.winner}: --paid takes no other transaction")
    due, paid = dict(engine.payees(tx)), dict(engine.payees(payer))
    short = [f"{paid.get(payee, 0)} wei to {payee}, less than {wei}" for payee, wei in due.items() if paid.get(payee, 0) < wei]
    if short and not unseen:
        raise ValueError(f"{payer.winner} paid {', '.join(short)}: --unseen says that you see to the rest")
    engine.store.avoid(tx.id)
    engine.store.note(tx.id, "a person", f"decided that {payer.winner} pays instead", engine.now())
    return f"payment {tx.batch_id} counts as paid by {payer.winner}; an empty transaction takes its nonce"


async def _unpaid(engine: Engine, tx: TxRow) -> str:
    if await _is_free(engine, tx):
        raise ValueError(f"nonce {tx.nonce} is free: the transaction of payment {tx.batch_id} is sent again by itself")
    if shows := [*await _shown(engine, tx), *await engine.evidence.moved(engine.payment(tx))]:
        raise ValueError(f"payment {tx.batch_id} would be paid twice: {_told_by(shows)}. {_leave_out(engine)}")
    engine.end(tx, TransferState.NONCE_LOST, "a person decided that it paid nothing")
    return f"payment {tx.batch_id} counts as not paid, and is paid anew"


async def _paid(engine: Engine, tx: TxRow, tx_hash: str, unseen: bool) -> str:
    """Does the chain show that this transaction paid it? Every RPC is asked; what none shows takes a person's word."""
    batch_id, evidence = tx.batch_id, engine.evidence
    if (owner := engine.store.owner(tx_hash)) not in (None, tx.id):
        other = engine.store.tx(owner or 0).batch_id or "of another kind"
        raise ValueError(f"{tx_hash} is the transaction of payment {other}, not of {batch_id}")
    answers, silent = await evidence.each(evidence.witnesses(), lambda witness: witness.receipt(tx_hash))
    found = [(witness.name, receipt) for witness, receipt in answers if receipt is not None]
    wrong = [Story(name, words) for name, receipt in found if (words := _lacks(engine, tx, receipt))]
    if wrong:
        raise ValueError(f"{tx_hash} did not pay {batch_id}: {_told_by(wrong)}. {_leave_out(engine)}")
    if found:
        await _check_final(engine, found[0][1])
        engine.store.mark_mined(tx.id, found[0][1].block, found[0][1].block_hash, tx_hash)
        names = ", ".join(name for name, _ in found)
        engine.end(tx, TransferState.CONFIRMED, f"a person decided that {tx_hash} paid it, shown by {names}")
        return f"payment {batch_id} counts as paid by {tx_hash}, in block {found[0][1].block}"
    if not unseen:
        blind = [Story(witness.name, "does not know it") for witness, _ in answers]
        blind += [Story(witness.name, f"does not answer ({error})") for witness, error in silent]
        sums = [f"{amount_text(from_wei(wei))} {engine.network.symbol} to {payee}" for payee, wei in engine.payees(tx)]
        raise ValueError(
            f"no RPC shows {tx_hash}: {_told_by(blind)}. Either it paid, and they are blind; or it did not, and what is called "
            f"paid now is never paid: {named(sums)}. Where an explorer that you trust shows that it moved this from "
            f"{engine.address}, add --unseen"
        )
    engine.store.mark_mined(tx.id, 0, "", tx_hash)
    engine.end(tx, TransferState.CONFIRMED, f"a person decided that {tx_hash} paid it, which no RPC shows")
    return f"payment {batch_id} counts as paid by {tx_hash}, which no RPC shows"


def _lacks(engine: Engine, tx: TxRow, receipt: Receipt) -> str:
    """Why this receipt shows no payment of a transaction's payees; "" if it does."""
    since = engine.payment(tx).since
    if not receipt.succeeded:
        return f"shows that {receipt.hash} has failed"
    if receipt.block < since:
        return f"shows {receipt.hash} in block {receipt.block}, which is older than the payment, signed at block {since}"
    return shortfall(receipt, engine.network, engine.address, engine.payees(tx))


async def _check_final(engine: Engine, receipt: Receipt) -> None:
    evidence = engine.evidence
    try:
        shown = await evidence.receipts(await evidence.views(), [receipt.hash])
        if not await evidence.final([each for each in shown if each.receipt.block == receipt.block]):
            deep = f"decide when it is {engine.network.depth} blocks deep"
            raise ValueError(f"{receipt.hash} is in block {receipt.block}, which is not final: {deep}")
        await evidence.agreed(receipt.block, receipt.block_hash)
    except Unclear as unclear:
        words = f"RPCs contradict one another about {receipt.hash}: {unclear}. {_leave_out(engine)}"
        raise ValueError(words) from None


async def _shown(engine: Engine, tx: TxRow) -> list[Story]:
    """Which RPCs show a receipt by which it paid, final or not."""
    evidence = engine.evidence
    shown = await evidence.receipts(await evidence.views(), engine.store.hashes(tx))
    paid = [(view, receipt) for view, receipt in shown if receipt.succeeded]
    return [
        Story(view.name, f"shows that {receipt.hash} paid it, in block {receipt.block}") for view, receipt in paid
        if not shortfall(receipt, engine.network, engine.address, engine.payees(tx))
    ]  # fmt: skip


def _told_by(stories: list[Story]) -> str:
    return "; ".join(f"{story.teller} {story.text}" for story in stories)


def _leave_out(engine: Engine) -> str:
    name = f"{engine.network.name.upper()}_GETH_ADDR"
    return f"If that is a lie, leave this RPC out ({name} names those to use) and decide again"
