"""The sender: pays each batch exactly once, over crashes, dropped transactions, fee spikes, reorganisations and blind RPCs.

    batch  queued -> assigned -> confirmed | failed | nonce_lost
    tx     signed -> sent -> mined -> confirmed (status 1, `depth` blocks deep) | failed (status 0)
           mined -> sent               its block was reorganised away
           sent -> nonce_lost          another transaction took the nonce, shown in a block and `depth` blocks deep
           final -> sent               the chain lost its block after all: see `golem.chain.lost`

The rule that makes it exact: nonce and signed bytes are on disk before the first broadcast, and a transaction ends only
when it is final. So whatever dies, the next step can at most send the identical bytes again, and recovery after a crash
is nothing but the next step. A fee bump is another attempt at the same nonce: at most one of them can be mined.

A receipt under any RPC is good news. Bad news, after which the wallet pays anew, needs the proof of `golem.chain.evidence`;
what is unclear waits, and a person may `decide` it. RPCs that contradict one another stop all that is not signed yet.

Nonces are the engine's alone. One is taken in the transaction that stores the signed bytes: the larger of the chain's count
and our own highest plus one. A batch is told apart by its id. `golem.chain.store` is the disk, `golem.chain.rpc` the wire,
`golem.chain.queue` chooses what is paid next, `draft` signs it, `sender` brings it out, and the wallet's port, which submits,
hears the `news`, at least once each.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import trio

from golem.chain import token
from golem.chain.copies import Copies, Told
from golem.chain.draft import Drafts, Unowed, Wait, held_back
from golem.chain.evidence import Evidence, Payment, Shown, Story, Unclear, View, newest
from golem.chain.genesis import check_genesis
from golem.chain.lost import Lost
from golem.chain.networks import Network
from golem.chain.news import News
from golem.chain.problem import Problem
from golem.chain.queue import Queue
from golem.chain.rows import TransferBatch, TransferState, TxKind, TxRow
from golem.chain.rpc import Receipt, Rpc, RpcError
from golem.chain.schema import OwnDisk
from golem.chain.sender import Sender
from golem.chain.signer import Key, address_bytes
from golem.chain.store import Store
from golem.chain.verify import shortfall
from golem.chain.vouch import Vouch, vouch_nothing
from protocol.wallet import TransferMined, TransferNews

PATIENT_LOOKS = 3  # in a row that must find the same before a nonce is given up or filled, or a person is bothered
MAX_PROBLEMS = 100  # told at once
WATCH_S = 60.0  # between looks whether the chain still has what was final, while that is so young that it may be lost
WATCH_BLOCKS = 96  # is that young at least: a dev chain is `repeat_depth` deep in a moment


FAULTS = {"chain_id": "InvalidChainId", "token": "CantSign"}  # of an endpoint -> as the payment status calls it


class Engine:
    """Sends for one account on one chain. `run` works until cancelled; news goes to `notify`.

    Wherever several networks are one chain (see `Network.chain`), one engine must serve them all.
    `checkpoint` is called with "signed", "stored", "sent" and "mined" as these are reached: where tests let it die.
    `vouch` has the last word before a payment is signed; `told` are transactions of payments that the ledger knows.
    """

    def __init__(
        self,
        network: Network,
        rpc: Rpc,
        key: Key,
        db_path: Path | str,
        notify: Callable[[TransferNews], Awaitable[None]],
        *,
        clock: Callable[[], float] = time.time,
        checkpoint: Callable[[str], None] = lambda point: None,
        vouch: Vouch = vouch_nothing,
        told: Told = tuple,
    ) -> None:
        self.network, self.rpc, self.key, self.address = network, rpc, key, key.address
        self.store = Store(db_path, f"{network.chain}/{key.address}")
        self.evidence = Evidence(rpc, network, key.address, self.store.made)
        self.drafts = Drafts(network, rpc, key, self.store, clock, checkpoint, vouch)
        self.lost = Lost(network, self.store, self.evidence, key.address, clock)
        self._news = News(network, self.store, notify, clock)
        self._sender = Sender(network, rpc, self.store, self.drafts, self.lost, self._news, clock, checkpoint)
        self._copies = Copies(network, self.store, self.evidence, key.address, told)
        self.queue = Queue(network, rpc, self.store, self.drafts, self.lost, self._sender, self._news, clock, self._copies)
        self._clock, self._checkpoint = clock, checkpoint
        self._disk = OwnDisk(f"payments on {network.name}")
        self.turn = trio.Lock()  # one step, or one internal transaction, at a time
        self._wake = trio.Event()
        self._checked = False
        self._problems: list[Problem] = []
        self._reviewed = False  # has the chain, since the start, still what was final?
        self._young = False  # may it lose that yet?
        self._review_at = 0.0  # on trio's clock: then it is looked again
        self._opened_at = clock()  # who shows no later block shows the chain as it was before, perhaps long before
        self._looks: dict[str, int] = {}  # what was found, and how often in a row
        self.unclear: dict[int, Unclear] = {}  # transaction that waits for a person -> what the RPCs say of it
        self._gap = (-1, 0)  # a nonce before our first open one that nobody uses, and looks in a row that saw it

    # -- what the wallet's port calls

    @property
    def max_payees(self) -> int:
        return token.MAX_PAYEES if self.network.multi_transfer else 1

    async def submit(self, batch: TransferBatch) -> None:
        """Take a batch, durably; a repeat changes nothing (a finished one is announced again). ValueError if wrong,
        OrdersTaken if an order in it is, or may be, paid by another batch."""
        if self.store.batch(batch.batch_id) is None and not 1 <= len(batch.payees) <= self.max_payees:
            raise ValueError(f"{len(batch.payees)} payees: {self.network.name} takes 1 to {self.max_payees} a batch")
        if batch.orders and len(batch.orders) != len(batch.payees):
            raise ValueError(f"orders for {len(batch.orders)} of {len(batch.payees)} payees")
        for payee, amount_wei in batch.payees:
            address_bytes(payee)
            if not 0 < amount_wei <= token.MAX_PACKED_WEI:
                raise ValueError(f"amount out of range: {amount_wei} wei")
        self.store.add_batch(batch)
        self._wake.set()

    def problems(self) -> tuple[Problem, ...]:
        """What the last step found wrong, and what is wrong with the endpoints; empty is healthy."""
        pool, chain_id = self.rpc.pool, self.network.chain_id
        told = [Problem(FAULTS[fault.kind], fault.words, self.address, chain_id=chain_id) for fault in pool.faults()]
        told += [Problem("RpcError", words, self.address) for words in pool.contradictions()]
        told += [Problem("TxStuck", words, self.address) for words in (self._disk.trouble, *self.store.damaged.values()) if words]
        said = " ".join(problem.detail for problem in self._problems)
        silent = [(words, trouble) for words, trouble in pool.silent() if trouble not in said]
        told += [Problem("RpcError", f"{words}: {trouble}", self.address) for words, trouble in silent]
        return (*self._problems, *(problem for problem in told if problem.detail not in said))

    async def run(self) -> None:
        """Work until cancelled: at the network's poll interval while anything is open, else when something comes; and now
        and then while the chain may yet lose what was final."""
        while True:
            self._wake = trio.Event()
            try:
                await self.step()
                busy = self.store.open() or self.store.queued() or self.store.unannounced() or not self._reviewed
            except (sqlite3.Error, OSError) as error:  # chain.db is locked, full or damaged: nothing is signed meanwhile
                await self._disk.wait(error)
                continue
            self._disk.well()
            idle_s = max(self._review_at - trio.current_time(), 0.0) if self._young else float("inf")
            with trio.move_on_after(self.network.poll_s if busy else idle_s):
                await self._wake.wait()

    def wake(self) -> None:
        """Have `run` take its next step now, and look whether the chain is still the one that it was."""
        self._checked = self._reviewed = False
        for endpoint in self.rpc.pool.endpoints:
            endpoint.genesis = ""
        self._wake.set()

    def resume(self) -> bool:
        """Sign payments again after a restore, or beside a copy: a person says that it is known what was paid. Returns whether
        any were held."""
        waited = self._copies.resume()
        held = bool(self.store.held())
        self.store.release()
        self.wake()
        return held or waited

    @property
    def disk_trouble(self) -> str:
        """What this node's own disk does to the payments; "" is healthy."""
        return "; ".join(filter(None, (self._disk.trouble, *self.store.damaged.values())))

    def close(self) -> None:
        """Close the store. After `run` has ended."""
        self.store.close()

    async def step(self) -> None:
        """One look at everything that is not final. Never raises RpcError: that becomes a problem.

        With nothing to do it asks the chain nothing, but after the start whether all is still there, and every `WATCH_S`
        while the last payment is young, so that an idle node leaves public endpoints alone.
        """
        problems: list[Problem] = []
        async with self.turn:
            if self._young and trio.current_time() >= self._review_at:
                self._reviewed = False
            if self.store.open() or self.store.queued() or not self._reviewed:
                await self._look(problems)
            problems += self.lost.twice()
        if (more := len(problems) - MAX_PROBLEMS) > 0:
            problems.sort(key=lambda problem: bool(problem.batch_id))
            problems[MAX_PROBLEMS:] = [Problem("TxStuck", f"{more} more like these", self.address)]
        self._problems = problems
        await self._news.announce()

    async def _look(self, problems: list[Problem]) -> None:
        try:
            if not self._reviewed and not self.store.next_nonce() and not self.store.queued():
                self._reviewed = True  # nothing was ever sent
                return
            await self._check_chain(problems)
            views = [view for view in await self.evidence.views() if view.witness.endpoint.genesis]
            if not views:
                raise RpcError(f"{self.network.name}: no RPC that answers has shown yet which chain it serves", "down")
            self._copies.look(views)
            complete = await self._review(views)
            agreed = await self._advance(views, problems, complete)
            problems += self.lost.problem(not complete)
            if self.store.queued() and complete and agreed:
                await self.evidence.one_chain(views)
                self._mind_hold(views)
                await self.queue.assign(views, problems)
        except Wait as wait:
            problems.append(wait.problem)
        except Unclear as unclear:
            problems.append(self._contradicted(unclear))
        except RpcError as error:
            kind = FAULTS.get(error.kind, "RpcError")
            problems.append(Problem(kind, str(error), self.address, chain_id=self.network.chain_id))
            self._checked = False  # who knows what answers next
        if general := [problem.detail for problem in problems if not problem.batch_id]:
            oldest = [tx.batch_id for tx in self.store.open()][:1] + [row.batch.batch_id for row in self.store.queued()][:1]
            for batch_id in oldest:
                await self._news.stuck(batch_id, general[-1])

    def _mind_hold(self, views: Sequence[View]) -> None:
        """A restored file may not know what was paid since. Raises Wait."""
        if reason := self.store.held():
            unknown = max(view.count for view in views) - self.store.next_nonce()
            heard = [view.witness.endpoint for view in views]
            silent = [each.host for each in self.rpc.pool.endpoints if each not in heard and not each.stranger]
            old = [] if self.network.simulated_by else [view.name for view in views if view.head.timestamp < self._opened_at]
            if self._again("nothing sent since", unknown <= 0 and not silent and not old):
                self.store.release()
            else:
                raise held_back(reason, unknown, silent, old, PATIENT_LOOKS, self.address, self.network)

    def _contradicted(self, unclear: Unclear) -> Problem:
        out = f"name those that are right in {self.network.name.upper()}_GETH_ADDR or networks.json if this lasts"
        return Problem("RpcError", f"RPCs contradict one another, nothing is sent: {unclear}; {out}", self.address)

    def _again(self, what: str, found: bool = True) -> bool:
        """Has this been found `PATIENT_LOOKS` times in a row?"""
        self._looks[what] = self._looks.get(what, 0) + 1 if found else 0
        if not self._looks[what]:
            del self._looks[what]
        return self._looks.get(what, 0) >= PATIENT_LOOKS

    # -- the chain under us

    async def _check_chain(self, problems: list[Problem]) -> None:
        if not self._checked or not all(endpoint.genesis for endpoint in self.rpc.pool.endpoints):
            found, self._checked = await check_genesis(self.evidence, self.rpc, self.store, self.network, self.address)
            problems += found

    async def _review(self, views: Sequence[View]) -> bool:
        """Has the chain still what was final? False while it seems not to, and is looked again."""
        lost, since = await self.lost.find(views)
        if self._again("lost blocks", bool(lost)):
            self.lost.reopen(lost, since)
            lost = []
        self._reviewed = not lost
        age = newest(views).number - self.store.last_block()
        self._young = age < max(WATCH_BLOCKS, self.network.repeat_depth)
        self._review_at = trio.current_time() + WATCH_S
        return self._reviewed

    # -- transactions that are not final

    async def _advance(self, views: Sequence[View], problems: list[Problem], complete: bool) -> bool:
        """False when RPCs contradict one another. Nothing is sent unless the chain is `complete`."""
        open_txs = self.store.open()
        if not open_txs:
            return True
        await self._mind_gap(views, open_txs[0].nonce)
        agreed = True
        for tx in open_txs:
            try:
                await self._advance_one(self.store.tx(tx.id), views, problems, complete)
                self._again(f"unclear {tx.id}", False)
                self.unclear.pop(tx.id, None)
            except RpcError as error:
                await self.queue.not_told(tx.batch_id, error, problems)
            except Unowed as wait:
                problems.append(wait.problem)
            except Unclear as unclear:
                agreed = agreed and not unclear.contradiction
                await self._tell_unclear(tx, unclear, problems)
        return agreed

    async def _advance_one(self, tx: TxRow, views: Sequence[View], problems: list[Problem], complete: bool) -> None:
        count = max(view.count for view in views)
        shown = await self.evidence.receipts(views, self.store.hashes(tx))
        taken = not shown and count > tx.nonce
        if not taken:
            self._again(f"taken {tx.id}", False)
        if shown:
            await self._mined(tx, shown)
        elif taken:
            await self._nonce_taken(tx, views)
        elif complete:
            await self._sender.push(tx, views, tx.nonce == count, problems)

    async def _mind_gap(self, views: Sequence[View], first: int) -> None:
        """A foreign transaction before ours was reorganised away for good: nothing of ours can move until its nonce is
        used. After some looks use it for nothing, a transfer of 0 to ourselves."""
        count = max(view.count for view in views)
        if count >= first or await self.rpc.transaction_count(self.address, "pending") > count:
            self._gap = (-1, 0)
            return
        nonce, looks = self._gap
        self._gap = (count, looks + 1 if nonce == count else 1)
        if self._gap[1] >= PATIENT_LOOKS and not self.store.has_nonce(count):
            tx_id = await self.drafts.call(TxKind.FILL, self.address, b"", views, nonce=count)
            await self._sender.broadcast(self.store.tx(tx_id), self.store.attempts(tx_id)[0], [])

    async def _mined(self, tx: TxRow, shown: Sequence[Shown]) -> None:
        view, receipt = shown[0]
        for each in shown:
            told = "success" if each.receipt.succeeded else "failure"
            text = f"receipt of {each.receipt.hash}, {told}, in block {each.receipt.block} {each.receipt.block_hash}"
            self.store.note(tx.id, each.view.name, text, self._clock())
        if tx.state != TransferState.MINED or (tx.block_hash, tx.winner) != (receipt.block_hash, receipt.hash):
            self.store.mark_mined(tx.id, receipt.block, receipt.block_hash, receipt.hash)
            await self._news.tell(tx, TransferMined(tx.batch_id, receipt.hash, receipt.block))
            self._checkpoint("mined")
        for (view, receipt), _ in await self.evidence.final(shown):
            await self._final(tx, view, receipt, shown)
            return

    async def _final(self, tx: TxRow, view: View, receipt: Receipt, shown: Sequence[Shown]) -> None:
        """A deep receipt ends a transaction, unless another RPC contradicts; one that ends it badly needs more."""
        if len({each.receipt.succeeded for each in shown}) > 1:
            said = [(each.view.name, "success" if each.receipt.succeeded else "failure") for each in shown]
            raise Unclear([Story(name, f"{word} of {tx.nonce}") for name, word in said], contradiction=True)
        await self.evidence.agreed(receipt.block, receipt.block_hash)
        if receipt.succeeded and tx.void and receipt.hash in self._empties(tx):
            await self.evidence.unpaid(self.payment(tx), receipt.block, receipt.block_hash)
            self._gave_way(tx, receipt)
            return
        if receipt.succeeded:
            # a token that says yes and moves nothing is no payment; nor is it a proof that nothing was moved
            if missing := shortfall(receipt, self.network, self.address, self.payees(tx)):
                raise Unclear([Story(view.name, missing)])
            self.end(tx, TransferState.CONFIRMED, "", receipt.gas_used, receipt.fee_wei)
            return
        if tx.kind == TxKind.PAY:
            if self.evidence.is_young(receipt.block, view.head):
                await self._news.young(tx, f"transaction {receipt.hash} failed", receipt.block)
                return
            await self.evidence.unpaid(self.payment(tx), receipt.block, receipt.block_hash)
        self.end(tx, TransferState.FAILED, await self.drafts.cause(tx, receipt), receipt.gas_used, receipt.fee_wei)

    def _empties(self, tx: TxRow) -> set[str]:
        return {attempt.hash for attempt in self.store.attempts(tx.id) if attempt.empty}

    def _gave_way(self, tx: TxRow, receipt: Receipt) -> None:
        """An empty transaction took the nonce of one that must not pay. What others were told to be paid by it was paid by
        an older one."""
        row, payer = self.store.batch(tx.batch_id), self.lost.paid_by(tx.batch_id, tx.id)
        if row and row.state == TransferState.CONFIRMED and payer:
            self.store.mark_mined(tx.id, payer.block, payer.block_hash, payer.winner)
            self.end(tx, TransferState.CONFIRMED, f"paid by {payer.winner}", receipt.gas_used, receipt.fee_wei)
        else:
            self.end(tx, TransferState.NONCE_LOST, f"the empty {receipt.hash} took its nonce", receipt.gas_used, receipt.fee_wei)

    def now(self) -> float:
        """Seconds of the epoch."""
        return self._clock()

    def payees(self, tx: TxRow) -> tuple[tuple[str, int], ...]:
        """Whom a payment owes how many wei; nobody for what is none."""
        row = self.store.batch(tx.batch_id) if tx.kind == TxKind.PAY else None
        return row.batch.payees if row else ()

    def payment(self, tx: TxRow) -> Payment:
        """What has to be known to find it."""
        attempts = self.store.attempts(tx.id)
        payees = tuple(payee for payee, _ in self.payees(tx))
        since = min(attempt.head for attempt in attempts)
        return Payment(tx.nonce, tx.recipient, tx.data, payees, self.store.hashes(tx), since)

    def end(self, tx: TxRow, state: TransferState, reason: str, gas_used: int = 0, fee_wei: int = 0) -> None:
        """A transaction is final. `turn` is held."""
        self._young = True
        self.store.note(tx.id, "this node", f"{state}{': ' if reason else ''}{reason}", self._clock())
        self.store.finish(tx, state, reason, gas_used, fee_wei)

    async def _nonce_taken(self, tx: TxRow, views: Sequence[View]) -> None:
        """The nonce is used, and no RPC shows a receipt of ours. That proves nothing: what used it has to be found."""
        if tx.kind != TxKind.PAY:
            await self._moneyless_taken(tx, views)
            return
        payment = self.payment(tx)
        use = await self.evidence.user(payment)
        self.store.note(tx.id, use.view.name, f"block {use.block} {use.block_hash} holds {use.tx.hash}", self._clock())
        if use.tx.hash in payment.hashes or use.tx.pays(tx.recipient, tx.data):
            if (tx.state, tx.block_hash, tx.winner) != (TransferState.MINED, use.block_hash, use.tx.hash):
                self.store.mark_mined(tx.id, use.block, use.block_hash, use.tx.hash)
            raise Unclear([Story(use.view.name, f"block {use.block} holds our {use.tx.hash}, and no RPC shows its receipt")])
        if self.evidence.is_young(use.block, use.view.head):
            await self._news.young(tx, f"{use.tx.hash}, another transaction of {self.address}, took nonce {tx.nonce}", use.block)
        elif self._again(f"taken {tx.id}"):
            self.store.mark_taken(tx.id, use.block, use.block_hash)
            reason = f"another transaction of {self.address}, {use.tx.hash} in block {use.block}, took nonce {tx.nonce}"
            self.end(tx, TransferState.NONCE_LOST, reason)

    async def _moneyless_taken(self, tx: TxRow, views: Sequence[View]) -> None:
        """An approval, test money or an empty transaction: a mistake costs a fee."""
        if self._again(f"taken {tx.id}", await self.evidence.used(views, tx.nonce)):
            self.end(tx, TransferState.NONCE_LOST, f"another transaction of {self.address} took nonce {tx.nonce}")

    # -- what waits for a person

    async def _tell_unclear(self, tx: TxRow, unclear: Unclear, problems: list[Problem]) -> None:
        """An unclear payment, once it is no mere moment: to the trace, to the problems and to its order."""
        patient = self._again(f"unclear {tx.id}")
        for story in unclear.stories:
            self.store.note(tx.id, story.teller, story.text, self._clock())
        if unclear.contradiction:
            problems.append(self._contradicted(unclear))
        if patient and tx.batch_id:
            self.unclear[tx.id] = unclear
            text = f"it is not clear what became of payment {tx.batch_id}, nonce {tx.nonce}. {unclear}. It is not paid "
            text += "anew before the RPCs agree or a person says so (`golem payment decide`; what was seen: "
            text += f"`golem payment trace {tx.batch_id}`)"
            problems.append(Problem("TxStuck", text, self.address, batch_id=tx.batch_id))
            await self._news.stuck(tx.batch_id, text)

    # -- test money

    async def send_call(self, kind: TxKind, recipient: str, call: bytes) -> int:
        """Sign and send a call that pays nobody; its row's id. RpcError, `Wait` or `Unclear` say why not."""
        async with self.turn:
            await self._check_chain([])
            tx_id = await self.drafts.call(kind, recipient, call, await self.evidence.views())
            await self._sender.broadcast(self.store.tx(tx_id), self.store.attempts(tx_id)[0], [])
        self._wake.set()
        return tx_id
