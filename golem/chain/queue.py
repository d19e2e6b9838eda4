"""Batches that wait for a transaction, oldest first, and why one is passed over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import trio

from golem.chain.copies import Copies, PaidElsewhere
from golem.chain.draft import Drafts, Unowed, Wait, WouldFail
from golem.chain.evidence import View
from golem.chain.lost import Lost
from golem.chain.networks import Network
from golem.chain.news import News
from golem.chain.problem import Problem
from golem.chain.rows import TransferBatch
from golem.chain.rpc import Rpc, RpcError
from golem.chain.sender import MAY_COME, Sender
from golem.chain.store import Store


class Queue:
    """Has a transaction signed for each batch of one account that may be paid now."""

    def __init__(
        self,
        network: Network,
        rpc: Rpc,
        store: Store,
        drafts: Drafts,
        lost: Lost,
        sender: Sender,
        news: News,
        clock: Callable[[], float],
        copies: Copies,
    ) -> None:
        self._copies = copies
        self._network, self._rpc, self._store, self._drafts, self._lost = network, rpc, store, drafts, lost
        self._sender, self._news, self._clock, self._address = sender, news, clock, drafts.address
        self._refused: dict[str, tuple[float, Problem]] = {}  # batch that the token refuses -> when to try again
        self.unowed: dict[str, str] = {}  # batch that is not what is owed -> why

    async def assign(self, views: Sequence[View], problems: list[Problem]) -> None:
        for row in self._store.queued():
            if await self._paid_already(row.batch, problems):
                continue
            again_at, problem = self._refused.get(row.batch.batch_id, (0.0, None))
            if problem and self._clock() < again_at:
                problems.append(problem)
                continue
            try:
                await self._copies.mind(row.batch, views)
                tx_id = await self._drafts.payment(row.batch, views)
            except PaidElsewhere as wait:
                problems.append(wait.problem)
                await self._news.stuck(row.batch.batch_id, wait.problem.detail)
                continue
            except WouldFail as wait:
                await self._single_out(row.batch, wait, problems)
                continue
            except Unowed as wait:  # our own fault, and of this one alone
                await self._not_owed(row.batch.batch_id, wait.problem, problems)
                continue
            except Wait as wait:
                if wait.first is None:
                    problems.append(wait.problem)
                elif wait.first:
                    await self._sender.broadcast(self._store.tx(wait.first), self._store.attempts(wait.first)[0], [])
                await self._news.stuck(row.batch.batch_id, wait.problem.detail)
                return  # later batches must not overtake: the oldest is paid first
            except RpcError as error:
                await self.not_told(row.batch.batch_id, error, problems)
                continue
            self._refused.pop(row.batch.batch_id, None)
            self.unowed.pop(row.batch.batch_id, None)
            try:
                await self._sender.broadcast(self._store.tx(tx_id), self._store.attempts(tx_id)[0], problems)
            except RpcError as error:
                await self.not_told(row.batch.batch_id, error, problems)

    async def _not_owed(self, batch_id: str, problem: Problem, problems: list[Problem]) -> None:
        """Nothing is signed for it until that is mended, or a person takes it back."""
        detail = f"{problem.detail}. If that is not mended, `golem payment decide {batch_id} --unpaid` takes it back: "
        detail += "nothing was signed, and those of its orders that this node knows are gathered anew"
        self.unowed[batch_id] = problem.detail
        problems.append(replace(problem, detail=detail))
        await self._news.stuck(batch_id, problems[-1].detail)

    async def _paid_already(self, batch: TransferBatch, problems: list[Problem]) -> bool:
        """What was signed for its orders before comes first: it may yet be mined, or was mined after all."""
        if any(rival.void for rival in self._store.rivals(batch.batch_id)):
            await self._news.stuck(batch.batch_id, MAY_COME)
            return True
        if (payer := self._lost.paid_by(batch.batch_id)) is None:
            return False
        reason = f"payment {payer.batch_id}, which had failed, has paid orders of it after all: {payer.winner}"
        if not self._store.txs_of_batch(batch.batch_id):
            self._store.refuse(batch.batch_id, reason, ())
        elif left := self._lost.unpaid(batch.batch_id, payer):  # it was told to be paid
            text = f"payment {batch.batch_id}: {reason}, but not {', '.join(left[:5])}: see to these, and say "
            text += f"`golem payment decide {batch.batch_id} --paid {payer.winner} --unseen`"
            problems.append(Problem("TxStuck", text, self._address, batch_id=batch.batch_id))
        else:
            self._store.batch_paid(batch.batch_id)
        return True

    async def not_told(self, batch_id: str, error: RpcError, problems: list[Problem]) -> None:
        """What the RPCs do not say of one payment holds up no other, unless they say nothing at all: then RpcError."""
        now = trio.current_time()
        if error.kind != "answer" and all(each.rests_until > now or each.stranger for each in self._rpc.pool.endpoints):
            raise error
        if str(error) not in [problem.detail for problem in problems]:
            problems.append(Problem("RpcError", str(error), self._address, batch_id=batch_id))
        await self._news.stuck(batch_id, str(error))

    async def _single_out(self, batch: TransferBatch, wait: WouldFail, problems: list[Problem]) -> None:
        """A payee to whom the token moves nothing holds up nobody else: the batch goes back, and names him."""
        refused = await self._drafts.refused(batch)
        detail = wait.problem.detail
        if refused:
            named = ", ".join(f"{payee} ({words[:100]})" for payee, words in list(refused.items())[:5])
            detail = f"{self._network.symbol} refuses a transfer to {named}"
        if refused and len(refused) < len(batch.payees):
            self._store.refuse(batch.batch_id, detail, tuple(refused))
            return
        problems.append(Problem("TxStuck", detail, self._address, batch_id=batch.batch_id))
        self._refused[batch.batch_id] = self._clock() + self._network.stuck_s, problems[-1]
        await self._news.stuck(batch.batch_id, detail)
