"""Chains that lose blocks which were final: a reorganisation deeper than `depth`, a dev chain put back from a backup.

Whatever was signed can be mined on the new branch, by whoever kept a copy: a payment that had failed as well, whose orders
another one has paid meanwhile. The invariant: *of all that was ever signed for an order, we send one thing at a time.*

  What had paid goes out again, byte for byte. What had paid nothing must not pay now: an empty transaction with a higher fee
  takes its nonce. Until the nonce of that is final, nothing else that was signed for one of its orders is sent, or signed.
  Where the old one has paid after all, the newer one gives way in the same manner; its batch counts as paid by the old one, or
  fails if nobody was told that it paid. Where it pays other orders as well, and was told to have paid, a person decides.

What strangers send is not in our hands: where both were mined, the payment is named as paid twice. Against that stands
`Network.repeat_depth`: a payment that failed is made anew only when its block is so deep that a chain does not lose it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from golem.chain.evidence import TOLD, Evidence, Story, Unclear, View, newest
from golem.chain.networks import Network
from golem.chain.problem import Problem
from golem.chain.rows import TransferState, TxKind, TxRow
from golem.chain.store import Store
from protocol.types import amount_text, from_wei


class Lost:
    """Looks whether the chain still has what was final, for one account."""

    def __init__(self, network: Network, store: Store, evidence: Evidence, address: str, clock: Callable[[], float]) -> None:
        self._network, self._store, self._evidence = network, store, evidence
        self._address, self._clock = address, clock

    # -- what was final

    async def find(self, views: Sequence[View]) -> tuple[list[TxRow], int]:
        """Final transactions whose blocks are gone, newest first; and the block after the last that is still there."""
        count = max(view.count for view in views)
        lost: list[TxRow] = []
        doubtful: list[TxRow] = []  # of which no block is known: they share the fate of older ones
        tx = self._store.final()
        while tx is not None:
            if tx.nonce >= count:
                lost += [*doubtful, tx]
                doubtful = []
            elif not tx.block_hash:
                doubtful.append(tx)
            else:
                answers, _ = await self._evidence.each(
                    [view.witness for view in views],
                    lambda witness, number=tx.block: witness.block_hash(number),  # type: ignore[misc]
                )
                seen = {block_hash for _, block_hash in answers if block_hash is not None}
                if tx.block_hash in seen:
                    return lost, tx.block + 1
                if not seen and newest(views).number >= tx.block:
                    return lost, 0  # they have the block, and do not say which
                lost += [*doubtful, tx]
                doubtful = []
            tx = self._store.final(before=tx.nonce)
        return lost, 0

    def reopen(self, lost: Sequence[TxRow], since: int) -> None:
        """What had paid is on its way again, what had not must not be."""
        for tx in reversed(lost):
            self._store.reopen(tx.id, tx.kind == TxKind.PAY and tx.state != TransferState.CONFIRMED, since)
            self._store.note(tx.id, "this node", "the chain lost its block", self._clock())

    # -- what must not pay

    def waits_for(self, tx: TxRow) -> TxRow | None:
        """An older payment of the same orders that may yet be mined."""
        return next((rival for rival in self._store.rivals(tx.batch_id, tx.id) if rival.void), None)

    def paid_by(self, batch_id: str, tx_id: int = 0) -> TxRow | None:
        """Another transaction that has paid orders of a batch after all."""
        if any(tx.sure for tx in self._store.txs_of_batch(batch_id)):
            return None  # a person said that it pays all the same
        rivals = self._store.rivals(batch_id, tx_id)
        return next((rival for rival in rivals if not rival.void), None)

    def give_way(self, tx: TxRow) -> bool:
        """Before it is sent: False for what has to wait. One whose orders were paid after all becomes an empty transaction.
        `Unclear` where that leaves some unpaid."""
        if tx.kind != TxKind.PAY or tx.void:
            return True
        if self.waits_for(tx):
            return False
        if (payer := self.paid_by(tx.batch_id, tx.id)) is None:
            return True
        if tx.reopened and (left := self.unpaid(tx.batch_id, payer)):
            text = f"payment {payer.batch_id} had failed, and was mined after all as {payer.winner}: it paid orders that payment "
            text += f"{tx.batch_id} had paid as well, but not {named(left)}. Either {tx.batch_id} is sent again, and pays what "
            text += f"the other one paid a second time: `golem payment decide {tx.batch_id} --unpaid`; or it pays nothing, and "
            text += f"you see to the rest: `golem payment decide {tx.batch_id} --paid {payer.winner} --unseen`"
            raise Unclear([Story("this node", text)])
        self._store.avoid(tx.id)
        self._store.note(tx.id, "this node", f"pays nothing any more: {payer.winner} has paid instead", self._clock())
        return True

    def unpaid(self, batch_id: str, payer: TxRow) -> list[str]:
        """Orders of a batch that another transaction has not paid."""
        return [] if payer.batch_id == batch_id else sorted(self._store.orders(batch_id) - self._store.orders(payer.batch_id))

    # -- telling

    def problem(self, unnoticed: bool) -> list[Problem]:
        """What is on its way again, and what a person has to know of it."""
        again = [tx for tx in self._store.open() if tx.reopened and tx.state != TransferState.MINED]
        if not again and not unnoticed:
            return []
        text = "the chain has lost blocks that were final"
        if unnoticed and not again:
            return [Problem("TxStuck", f"{text}: it is looked again, before anything new is sent, what is gone", self._address)]
        paying = [tx for tx in again if tx.kind == TxKind.PAY and not tx.void]
        void = [tx for tx in again if tx.void]
        if paying:
            debts = [f"{tx.batch_id} ({self._debts(tx)})" for tx in paying]
            text += f": payments {named(debts)} are sent again, byte for byte; their documents stay SETTLED meanwhile"
        if void:
            text += f"; payments {named([tx.batch_id for tx in void])} had paid nothing, and empty transactions take their "
            text += "nonces, so that they do not pay beside what was paid instead"
        text += f". There is nothing to do but to keep coins for the fees on {self._address}"
        text += " (`golem payment fund`)" if self._network.is_test else ""
        first = (paying or void or again)[0]
        text += f"; `golem payment trace {first.batch_id}` tells how far it is" if first.batch_id else ""
        return [Problem("TxStuck", text, self._address)]

    def twice(self) -> list[Problem]:
        """Payments of the same orders that were both mined, since the chain lost blocks and somebody had kept the bytes."""
        problems = []
        for older, newer in self._store.doubled():
            both = sorted(self._store.orders(older.batch_id) & self._store.orders(newer.batch_id))
            text = f"paid twice: payment {older.batch_id} ({older.winner}) had failed, its orders {named(both)} were paid anew "
            text += f"by {newer.batch_id} ({newer.winner}); then the chain lost blocks, and both are mined now. Ask for it "
            text += f"back: {newer.batch_id} was {self._debts(newer)}. That you know of it says "
            text += f"`golem payment decide {newer.batch_id} --paid {newer.winner}`"
            problems.append(Problem("TxStuck", text, self._address, batch_id=newer.batch_id))
        return problems

    def _debts(self, tx: TxRow) -> str:
        row = self._store.batch(tx.batch_id)
        payees = row.batch.payees if row else ()
        return named([f"{amount_text(from_wei(wei))} {self._network.symbol} to {payee}" for payee, wei in payees])


def named(things: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(things) - TOLD} more" if len(things) > TOLD else ""
    return ", ".join(things[:TOLD]) + more
