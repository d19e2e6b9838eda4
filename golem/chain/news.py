"""What the wallet's port hears of its transfers: each thing once, and each end at least once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from golem.chain.networks import Network
from golem.chain.rows import ChainBatchRow, TransferState, TxRow
from golem.chain.schema import StoreDamaged
from golem.chain.store import Store
from protocol.types import amount_text, from_wei
from protocol.wallet import TransferConfirmed, TransferDelayed, TransferFailed, TransferNews


class News:
    """Tells `notify` how the payments of one account go."""

    def __init__(
        self,
        network: Network,
        store: Store,
        notify: Callable[[TransferNews], Awaitable[None]],
        clock: Callable[[], float],
    ) -> None:
        self._network, self._store, self._notify, self._clock = network, store, notify, clock
        self._told: dict[str, str] = {}  # batch id -> reason last said, so that each is said once

    async def tell(self, tx: TxRow, news: TransferNews) -> None:
        """How far a payment is; nothing of what pays nobody."""
        if tx.batch_id and not tx.void:
            await self._notify(news)

    async def stuck(self, batch_id: str, reason: str) -> None:
        """Why a payment waits, when that is news."""
        if batch_id and self._told.get(batch_id) != reason:
            self._told[batch_id] = reason
            await self._notify(TransferDelayed(batch_id, reason))

    async def young(self, tx: TxRow, what: str, block: int) -> None:
        """Bad news of a payment that a chain may yet take back."""
        depth = max(self._network.depth, self._network.repeat_depth)
        text = f"{what} in block {block}: it is paid anew when that is {depth} blocks deep, since a chain may lose younger ones"
        self._store.note(tx.id, "this node", text, self._clock())
        if not tx.void:
            await self.stuck(tx.batch_id, text)

    async def announce(self) -> None:
        """Tell the end of each finished batch; noted only when the listener has returned, so at least once."""
        for row in self._store.unannounced():
            await self._notify(self._ending(row))
            self._store.announced(row.batch.batch_id)
            self._told.pop(row.batch.batch_id, None)

    def _ending(self, row: ChainBatchRow) -> TransferNews:
        batch_id = row.batch.batch_id
        if row.state in (TransferState.FAILED, TransferState.NONCE_LOST):
            return TransferFailed(batch_id, row.reason, row.refused)
        tx = self._store.tx_of_batch(batch_id)
        if tx is None:
            raise StoreDamaged(f"batch {row.batch.batch_id} in chain.db is confirmed, and no transaction of it is there")
        return TransferConfirmed(batch_id, tx.winner, tx.block, tx.gas_used, amount_text(from_wei(tx.fee_wei)))
