"""Another process with our key: what a copy of `chain.db` has paid is not paid again by this one.

A copy of a data directory knows the same orders, and signs for the same account. What it has sent is known here by nothing but
a nonce that the chain has used and this file did not. Where there is such a nonce, the chain is asked whether any
transaction that was not made here has moved tokens from our account to a payee, and who got some waits for a person; but
what payees have told since, the ledger knows, and does not order again. So it is with what was paid since a backup.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from golem.chain.draft import Wait
from golem.chain.evidence import MAX_LOG_BLOCKS, TOLD, Evidence, View, newest
from golem.chain.networks import Network
from golem.chain.problem import Problem
from golem.chain.rows import TransferBatch
from golem.chain.store import Store

Told = Callable[[], Collection[str]]  # transactions that payments known to the ledger name
LOOK_BACK_BLOCKS = MAX_LOG_BLOCKS // 4  # more than a day of fast chains: an order does not wait longer while two are at work


class PaidElsewhere(Wait):
    """A payee may have been paid by another process with our key."""


class Copies:
    """Looks for payments of one account that were not made here."""

    def __init__(self, network: Network, store: Store, evidence: Evidence, address: str, told: Told) -> None:
        self._told = told
        self._network, self._store, self._evidence, self._address = network, store, evidence, address
        self._seen: dict[tuple[str, str], tuple[int, dict[str, int]]] = {}  # RPC, payee -> last block looked at, what moved
        self._count = 0  # nonces that the chain has used
        self.waiting: set[str] = set()  # batches

    def look(self, views: Sequence[View]) -> None:
        """Where the chain stands."""
        self._count = max(view.count for view in views)

    async def mind(self, batch: TransferBatch, views: Sequence[View]) -> None:
        """Before a batch is signed. Raises `PaidElsewhere`, `RpcError`."""
        self.waiting.discard(batch.batch_id)
        nonce, since = self._store.first_unknown(self._count)
        if nonce < 0:
            return
        first = max(since, newest(views).number - LOOK_BACK_BLOCKS, 0)
        found: dict[str, tuple[str, int]] = {}
        told = self._told()
        for view in views:
            for payee, _ in batch.payees:
                moved = await self._moved(view, payee, first)
                found |= {tx: (payee, block) for tx, block in moved.items() if tx not in told and not self._store.made(tx)}
        if not found:
            return
        self.waiting.add(batch.batch_id)
        said = ", ".join(f"{tx} in block {block} to {payee}" for tx, (payee, block) in list(found.items())[:TOLD])
        text = "another process with this node's key is or was at work (a copy, or this node after the backup): since nonce "
        text += f"{nonce} its account has sent what this one does not know, and tokens went by {said}. Payment {batch.batch_id} "
        text += "may be paid by that already. Stop one of two processes for good, wait until the payees have told what they got, "
        text += "look at the transaction; golem payment resume pays what still waits then"
        raise PaidElsewhere(Problem("CantSign", text, self._address, batch_id=batch.batch_id))

    async def _moved(self, view: View, payee: str, first: int) -> dict[str, int]:
        """Transactions that moved tokens to a payee, and their blocks: only blocks that were not looked at are asked for."""
        key, last = (view.name, payee), view.head.number
        known, moved = self._seen.get(key, (first - 1, {}))
        start = max(first, known + 1 - self._network.repeat_depth)  # younger blocks may have been exchanged
        if start <= last:
            moved = moved | await view.witness.transfers(self._network, self._address, [payee], start, last)
            self._seen[key] = last, moved
        return moved

    def resume(self) -> bool:
        """A person, who was told by what, says that it paid nothing that waits here. Returns whether anything waited."""
        waited, self.waiting = bool(self.waiting), set()
        if waited:
            self._store.accept(self._count)
        return waited
