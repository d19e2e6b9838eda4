"""What is signed goes out: to all RPCs, again while none knows it, and with a higher fee when blocks pass it by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from golem.chain.draft import NO_FUNDS, Drafts, Unowed
from golem.chain.evidence import View, newest
from golem.chain.lost import Lost
from golem.chain.networks import Network
from golem.chain.news import News
from golem.chain.problem import Problem
from golem.chain.rows import Attempt, TransferState, TxRow
from golem.chain.rpc import Head, Rpc, RpcError
from golem.chain.store import Store
from protocol.wallet import TransferSent

STUCK_BLOCKS = 6  # blocks that passed a well-paid transaction by, before it gets a higher fee
MAY_COME = "the chain has lost blocks: what was signed for its orders before may yet be mined, and is used up first"
TOO_LOW = ("nonce too low", "nonce is too low")
UNDERPRICED = ("underpriced", "less than block base fee", "fee too low", "fee cap less than")


class Sender:
    """Brings the stored bytes of one account into the network's memory pools."""

    def __init__(
        self,
        network: Network,
        rpc: Rpc,
        store: Store,
        drafts: Drafts,
        lost: Lost,
        news: News,
        clock: Callable[[], float],
        checkpoint: Callable[[str], None],
    ) -> None:
        self._network, self._rpc, self._store, self._drafts, self._lost = network, rpc, store, drafts, lost
        self._news, self._clock, self._checkpoint = news, clock, checkpoint
        self._address = drafts.address

    async def push(self, tx: TxRow, views: Sequence[View], is_next: bool, problems: list[Problem]) -> None:
        """Not in a block: make sure that the network has it, and that it pays enough."""
        if tx.state == TransferState.MINED:
            self._store.mark_sent(tx.id)  # reorganised away
        if not self._lost.give_way(tx):
            await self._news.stuck(tx.batch_id, MAY_COME)
            return
        tx, head = self._store.tx(tx.id), newest(views)
        attempt = self._store.attempts(tx.id)[0]
        if tx.void and not attempt.empty:
            attempt = self._drafts.nothing(tx, views)
        too_cheap = head.base_fee + attempt.priority_fee > attempt.max_fee
        if not await self._rpc.knows(attempt.hash):
            too_cheap = await self.broadcast(tx, attempt, problems) or too_cheap
        elif tx.state == TransferState.SIGNED:
            self._store.mark_sent(tx.id)
        old = self._clock() - attempt.created > self._network.stuck_s
        if is_next and old and (too_cheap or head.number - attempt.head >= STUCK_BLOCKS):
            await self._bump(tx, attempt, head, problems)

    async def broadcast(self, tx: TxRow, attempt: Attempt, problems: list[Problem]) -> bool:
        """Send the stored bytes to all. True when those who refuse find the fee too low. RpcError when nobody answers."""
        self._store.count_send(attempt.hash)
        try:
            await self._rpc.send_raw(attempt.raw)
        except RpcError as error:
            text = str(error).lower()
            if error.kind != "answer":
                raise
            if any(words in text for words in UNDERPRICED):
                return True
            if any(words in text for words in NO_FUNDS):
                problems.append(Problem("InsufficientGas", str(error), self._address, needed_wei=tx.gas * attempt.max_fee))
                return False
            if not all(any(words in said.lower() for words in TOO_LOW) for said in error.refusals):
                problems.append(Problem("TxStuck", f"nonce {tx.nonce} refused: {error}", self._address))
                return False  # else all say that the nonce is used: look for the receipt, at the next step
        self._checkpoint("sent")
        if tx.state == TransferState.SIGNED or attempt.sends == 0:
            self._store.mark_sent(tx.id)
            await self._news.tell(tx, TransferSent(tx.batch_id, attempt.hash))
        return False

    async def _bump(self, tx: TxRow, last: Attempt, head: Head, problems: list[Problem]) -> None:
        """Another attempt at the same nonce: fees at least an eighth higher (nodes ask for a tenth), up to the cap."""
        priority_fee = min(last.priority_fee * 9 // 8 + 1, self._network.fee_cap)
        wanted = max(last.max_fee * 9 // 8 + 1, 2 * head.base_fee + priority_fee)
        max_fee = min(wanted, self._network.fee_cap)
        if max_fee * 10 < last.max_fee * 11:
            text = f"nonce {tx.nonce} waits: its fee is at the cap of {self._network.fee_cap / 1e9:g} gwei per gas, "
            text += f"the base fee is {head.base_fee / 1e9:.3g} gwei"
            problems.append(Problem("TxStuck", text, self._address))
            await self._news.stuck(tx.batch_id, text)
            return
        try:
            signed = await self._drafts.again(tx, last, max_fee, priority_fee)
        except Unowed as wait:
            problems.append(wait.problem)
            await self._news.stuck(tx.batch_id, wait.problem.detail)
            return
        attempt = Attempt(signed.hash, tx.id, signed.raw, max_fee, priority_fee, self._clock(), head.number, 0, last.empty)
        self._store.add_attempt(attempt)
        self._store.note(tx.id, "this node", f"signed {signed.hash} with a higher fee", self._clock())
        await self.broadcast(tx, attempt, problems)
