"""The sender: pays each batch exactly once, over crashes, dropped transactions, fee spikes and reorganisations.

    batch  queued -> assigned -> confirmed | failed | nonce_lost
    tx     signed -> sent -> mined -> confirmed (status 1, `depth` blocks deep) | failed (status 0)
           mined -> sent               its block was reorganised away
           sent -> nonce_lost          another transaction took the nonce, `depth` blocks deep

The rule that makes it exact: nonce and signed bytes are on disk before the first broadcast, and a transaction ends only
when it is final. So whatever dies, the next step can at most send the identical bytes again, and recovery after a crash
is nothing but the next step. A fee bump is another attempt at the same nonce: at most one of them can be mined.

The nonce is taken in the transaction that stores the signed bytes: the larger of the chain's count and our own highest
plus one. It is the wallet's number unless an approval, another platform of the same chain or a foreign wallet with this
key came between; a batch is told apart by its id. `golem.chain.store` is the disk, `golem.chain.rpc` the wire; the
wallet's port submits and hears the events, at least once each.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from golem.chain import token
from golem.chain.events import Confirmed, Event, Failed, Mined, NonceLost, Problem, Sent, Stuck
from golem.chain.networks import Network
from golem.chain.rpc import Head, Receipt, Rpc, RpcError
from golem.chain.signer import Key, Signed, Transaction, address_bytes, sign
from golem.chain.store import Attempt, BatchRow, Store, TransferBatch, TxRow

GAS_SPARE = 20_000  # per payee over the estimate: a payee that emptied its purse meanwhile costs 17,100 more
STUCK_BLOCKS = 6  # blocks that passed a well-paid transaction by, before it gets a higher fee
PATIENT_LOOKS = 3  # in a row that must find the same before a nonce is given up or filled
FUND_S = 120.0

TOO_LOW = ("nonce too low", "nonce is too low")
UNDERPRICED = ("underpriced", "less than block base fee", "fee too low", "fee cap less than")
NO_FUNDS = ("insufficient funds",)
FAULTS = {"chain_id": "InvalidChainId", "token": "CantSign"}  # of an endpoint -> as the payment status calls it


class FundError(RpcError):
    """Test money could not be had, and why."""


class _Wait(Exception):
    """Nothing further can be signed now: the problem says why. `ordinary`: it is none, only a step before the step."""

    def __init__(self, problem: Problem, *, ordinary: bool = False) -> None:
        super().__init__(problem.detail)
        self.problem, self.ordinary = problem, ordinary


class Engine:
    """Sends for one account on one chain. `run` works until cancelled; events go to `notify`.

    Wherever several networks are one chain (see `Network.chain`), one engine must serve them all.
    `checkpoint` is called with "signed", "stored", "sent" and "mined" as these are reached: where tests let it die.
    """

    def __init__(
        self,
        network: Network,
        rpc: Rpc,
        key: Key,
        db_path: Path | str,
        notify: Callable[[Event], Awaitable[None]],
        *,
        clock: Callable[[], float] = time.time,
        checkpoint: Callable[[str], None] = lambda point: None,
    ) -> None:
        self.network, self.rpc, self.key, self.address = network, rpc, key, key.address
        self.store = Store(db_path, f"{network.chain}/{key.address}")
        self._notify, self._clock, self._checkpoint = notify, clock, checkpoint
        self._turn = trio.Lock()  # one step, or one internal transaction, at a time
        self._wake = trio.Event()
        self._checked = False
        self._problems: list[Problem] = []
        self._lost: dict[int, int] = {}  # transaction -> looks in a row that found its nonce gone
        self._gap = (-1, 0)  # a nonce before our first open one that nobody uses, and looks in a row that saw it
        self._told: dict[str, str] = {}  # batch id -> reason last said, so that each is said once

    # -- what the wallet's port calls

    @property
    def max_payees(self) -> int:
        return token.MAX_PAYEES if self.network.multi_transfer else 1

    async def submit(self, batch: TransferBatch) -> None:
        """Take a batch, durably; a repeat changes nothing (a finished one is announced again). ValueError if wrong."""
        if not 1 <= len(batch.payees) <= self.max_payees:
            raise ValueError(f"{len(batch.payees)} payees: {self.network.name} takes 1 to {self.max_payees} a batch")
        for payee, amount_wei in batch.payees:
            address_bytes(payee)
            if not 0 < amount_wei <= token.MAX_PACKED_WEI:
                raise ValueError(f"amount out of range: {amount_wei} wei")
        self.store.add_batch(batch)
        self._wake.set()

    async def next_nonce(self) -> int:
        """The nonce that the next batch will most likely get. RpcError when the chain does not answer."""
        return max(await self.rpc.transaction_count(self.address), self.store.next_nonce())

    def problems(self) -> tuple[Problem, ...]:
        """What the last step found wrong, and what is wrong with the endpoints; empty is healthy."""
        pool, chain_id = self.rpc.pool, self.network.chain_id
        told = [Problem(FAULTS[fault.kind], fault.words, self.address, chain_id=chain_id) for fault in pool.faults()]
        told += [Problem("RpcError", words, self.address) for words in pool.contradictions()]
        said = " ".join(problem.detail for problem in self._problems)
        return (*self._problems, *(problem for problem in told if problem.detail not in said))

    async def run(self) -> None:
        """Work until cancelled: at the network's poll interval while anything is open, else when something comes."""
        while True:
            self._wake = trio.Event()
            await self.step()
            busy = self.store.open() or self.store.queued() or self.store.unannounced()
            with trio.move_on_after(self.network.poll_s if busy else float("inf")):
                await self._wake.wait()

    def close(self) -> None:
        """Close the store. After `run` has ended."""
        self.store.close()

    async def step(self) -> None:
        """One look at everything that is not final. Never raises RpcError: that becomes a problem.

        With nothing to do it asks the chain nothing, so that an idle node leaves public endpoints alone.
        """
        problems: list[Problem] = []
        async with self._turn:
            if self.store.open() or self.store.queued():
                await self._look(problems)
        self._problems = problems
        await self._announce()

    async def _look(self, problems: list[Problem]) -> None:
        try:
            await self._check_chain()
            head = await self.rpc.head()
            await self._advance(head, problems)
            await self._assign(head, problems)
        except _Wait as wait:
            problems.append(wait.problem)
        except RpcError as error:
            kind = FAULTS.get(error.kind, "RpcError")
            problems.append(Problem(kind, str(error), self.address, chain_id=self.network.chain_id))
            self._checked = False  # who knows what answers next
        if problems:
            oldest = [tx.batch_id for tx in self.store.open()][:1] + [row.batch.batch_id for row in self.store.queued()][:1]
            for batch_id in oldest:
                await self._tell_stuck(batch_id, problems[-1].detail)

    # -- the chain under us

    async def _check_chain(self) -> None:
        """Is this the chain that our rows are about? A dev chain made anew has the same id and another genesis."""
        if self._checked:
            return
        genesis = await self.rpc.genesis_hash()
        known = self.store.bind_genesis(self.network.chain, genesis)
        if known != genesis and self.network.dev_faucet:
            self.store.forget_chain(self.network.chain, genesis)  # play money of a chain that is gone: begin again
        elif known != genesis:
            text = f"the chain behind {self.network.name} was replaced by another one: its genesis is {genesis[:18]}..., "
            text += f"the payments in this node's chain.db were made on {known[:18]}..."
            raise _Wait(Problem("InvalidChainId", text, self.address, chain_id=self.network.chain_id))
        self._checked = True

    # -- transactions that are not final

    async def _advance(self, head: Head, problems: list[Problem]) -> None:
        open_txs = self.store.open()
        if not open_txs:
            return
        chain_nonce = await self.rpc.transaction_count(self.address)
        await self._mind_gap(chain_nonce, open_txs[0].nonce, head)
        for tx in open_txs:
            receipt = await self._receipt(tx)
            if receipt is not None:
                self._lost.pop(tx.id, None)
                await self._mined(tx, receipt, head)
            elif chain_nonce > tx.nonce:
                await self._nonce_taken(tx, head)
            else:
                await self._push(tx, head, tx.nonce == chain_nonce, problems)

    async def _mind_gap(self, chain_nonce: int, first: int, head: Head) -> None:
        """A foreign transaction before ours was reorganised away for good: nothing of ours can move until its nonce is
        used. After some looks use it for nothing, a transfer of 0 to ourselves."""
        if chain_nonce >= first or await self.rpc.transaction_count(self.address, "pending") > chain_nonce:
            self._gap = (-1, 0)
            return
        nonce, looks = self._gap
        self._gap = (chain_nonce, looks + 1 if nonce == chain_nonce else 1)
        if self._gap[1] >= PATIENT_LOOKS and not self.store.has_nonce(chain_nonce):
            tx_id = await self._sign_and_store("fill", self.address, b"", head, nonce=chain_nonce)
            await self._broadcast(self.store.tx(tx_id), self.store.attempts(tx_id)[0], [])

    async def _receipt(self, tx: TxRow) -> Receipt | None:
        hashes = [attempt.hash for attempt in self.store.attempts(tx.id)]
        for tx_hash in sorted(hashes, key=lambda each: each != tx.winner):
            if (receipt := await self.rpc.receipt(tx_hash)) is not None:
                return receipt
        return None

    async def _mined(self, tx: TxRow, receipt: Receipt, head: Head) -> None:
        if tx.state != "mined" or (tx.block_hash, tx.winner) != (receipt.block_hash, receipt.hash):
            self.store.mark_mined(tx.id, receipt.block, receipt.block_hash, receipt.hash)
            await self._tell(tx, Mined(tx.batch_id, receipt.hash, receipt.block))
            self._checkpoint("mined")
        if head.number - receipt.block < self.network.depth:
            return
        if await self.rpc.block_hash(receipt.block) != receipt.block_hash:
            return  # the node's receipts lag behind its chain: look again at the next step
        state, reason = ("confirmed", "") if receipt.succeeded else ("failed", await self._cause(tx, receipt))
        self.store.finish(tx, state, reason, receipt.gas_used, receipt.fee_wei)

    async def _cause(self, tx: TxRow, receipt: Receipt) -> str:
        if receipt.gas_used >= tx.gas:
            return f"transaction {receipt.hash} ran out of gas ({tx.gas})"
        try:
            await self.rpc.call(tx.recipient, tx.data, self.address)
        except RpcError as error:
            return f"transaction {receipt.hash} failed: {error}"
        return f"transaction {receipt.hash} was reverted"

    async def _nonce_taken(self, tx: TxRow, head: Head) -> None:
        """Another transaction has our nonce. Only when that is final can ours never be mined.

        A wrong conclusion here would pay twice, and behind one URL there may be several nodes, one of which has not seen
        our receipt yet. So one endpoint has to say both things, and several looks in a row have to find the same.
        """
        if head.number < self.network.depth:
            return
        with self.rpc.pool.pinned():
            final_nonce = await self.rpc.transaction_count(self.address, head.number - self.network.depth)
            lost = final_nonce > tx.nonce and await self._receipt(tx) is None
        self._lost[tx.id] = self._lost.get(tx.id, 0) + 1 if lost else 0
        if self._lost[tx.id] < PATIENT_LOOKS:
            return
        del self._lost[tx.id]
        self.store.finish(tx, "nonce_lost", f"another transaction of {self.address} took nonce {tx.nonce}")

    async def _push(self, tx: TxRow, head: Head, is_next: bool, problems: list[Problem]) -> None:
        """Not in a block: make sure that the network has it, and that it pays enough."""
        if tx.state == "mined":
            self.store.mark_sent(tx.id)  # reorganised away
        attempt = self.store.attempts(tx.id)[0]
        too_cheap = head.base_fee + attempt.priority_fee > attempt.max_fee
        if not await self.rpc.knows(attempt.hash):
            too_cheap = await self._broadcast(tx, attempt, problems) or too_cheap
        elif tx.state == "signed":
            self.store.mark_sent(tx.id)
        old = self._clock() - attempt.created > self.network.stuck_s
        if is_next and old and (too_cheap or head.number - attempt.head >= STUCK_BLOCKS):
            await self._bump(tx, attempt, head, problems)

    async def _broadcast(self, tx: TxRow, attempt: Attempt, problems: list[Problem]) -> bool:
        """Send the stored bytes to all. True when those who refuse find the fee too low. RpcError when nobody answers."""
        self.store.count_send(attempt.hash)
        try:
            await self.rpc.send_raw(attempt.raw)
        except RpcError as error:
            text = str(error).lower()
            if error.kind != "answer":
                raise
            if any(words in text for words in UNDERPRICED):
                return True
            if any(words in text for words in NO_FUNDS):
                problems.append(
                    Problem("InsufficientGas", str(error), self.address, needed_wei=tx.gas * attempt.max_fee)
                )
                return False
            if not all(any(words in said.lower() for words in TOO_LOW) for said in error.refusals):
                problems.append(Problem("TxStuck", f"nonce {tx.nonce} refused: {error}", self.address))
                return False  # else all say that the nonce is used: look for the receipt, at the next step
        self._checkpoint("sent")
        if tx.state == "signed" or attempt.sends == 0:
            self.store.mark_sent(tx.id)
            await self._tell(tx, Sent(tx.batch_id, attempt.hash))
        return False

    async def _bump(self, tx: TxRow, last: Attempt, head: Head, problems: list[Problem]) -> None:
        """Another attempt at the same nonce: fees at least an eighth higher (nodes ask for a tenth), up to the cap."""
        priority_fee = min(last.priority_fee * 9 // 8 + 1, self.network.fee_cap)
        wanted = max(last.max_fee * 9 // 8 + 1, 2 * head.base_fee + priority_fee)
        max_fee = min(wanted, self.network.fee_cap)
        if max_fee * 10 < last.max_fee * 11:
            text = f"nonce {tx.nonce} waits: its fee is at the cap of {self.network.fee_cap / 1e9:g} gwei per gas, "
            text += f"the base fee is {head.base_fee / 1e9:.3g} gwei"
            problems.append(Problem("TxStuck", text, self.address))
            await self._tell_stuck(tx.batch_id, text)
            return
        signed = self._sign(tx.nonce, tx.gas, max_fee, priority_fee, tx.recipient, tx.data)
        attempt = Attempt(signed.hash, tx.id, signed.raw, max_fee, priority_fee, self._clock(), head.number, 0)
        self.store.add_attempt(attempt)
        await self._broadcast(tx, attempt, problems)

    # -- batches that wait for a transaction

    async def _assign(self, head: Head, problems: list[Problem]) -> None:
        for row in self.store.queued():
            try:
                tx_id = await self._make(row.batch, head)
            except _Wait as wait:
                if not wait.ordinary:
                    problems.append(wait.problem)
                await self._tell_stuck(row.batch.batch_id, wait.problem.detail)
                return  # later batches must not overtake: the oldest is paid first
            await self._broadcast(self.store.tx(tx_id), self.store.attempts(tx_id)[0], problems)

    async def _make(self, batch: TransferBatch, head: Head) -> int:
        """Sign and store the transaction of a batch; if it needs an allowance first, that of the approval and wait."""
        multi = self.network.multi_transfer
        reserved = sum(tx.total_wei for tx in self.store.open() if tx.state != "mined")
        missing = batch.total_wei + reserved
        missing -= await token.tokens(self.rpc, self.network, self.address, enough_wei=missing)
        if missing > 0:
            text = f"{missing / 1e18:.6g} {self.network.symbol} too little on {self.address}"
            raise _Wait(Problem("InsufficientToken", text, self.address, needed_wei=missing))
        if len(batch.payees) == 1 or multi is None:
            ((payee, amount_wei),) = batch.payees
            call = token.transfer_call(payee, amount_wei)
            return await self._sign_and_store("pay", self.network.token, call, head, batch)
        if await token.allowance(self.rpc, self.network, self.address, multi) < batch.total_wei + reserved:
            if not any(tx.kind == "approve" for tx in self.store.open()):
                tx_id = await self._sign_and_store("approve", self.network.token, token.approve_call(multi), head)
                await self._broadcast(self.store.tx(tx_id), self.store.attempts(tx_id)[0], [])
            raise _Wait(Problem("TxStuck", "the multi-transfer contract is being approved", self.address), ordinary=True)
        return await self._sign_and_store("pay", multi, token.packed_call(batch.payees), head, batch)

    async def _sign_and_store(
        self, kind: str, recipient: str, call: bytes, head: Head, batch: TransferBatch | None = None,
        nonce: int | None = None,
    ) -> int:
        """Nonce, fees, gas, signature, disk. Returns the row's id; _Wait when it cannot be paid for now."""
        payees = len(batch.payees) if batch else 1
        priority_fee, max_fee = await self._fees(head)
        gas = await self._gas(recipient, call, payees)
        nonce = await self._free_nonce() if nonce is None else nonce
        signed = self._sign(nonce, gas, max_fee, priority_fee, recipient, call)
        await self._afford(gas * max_fee, signed)
        self._checkpoint("signed")
        total_wei = batch.total_wei if batch else 0
        batch_id = batch.batch_id if batch else ""
        tx = TxRow(0, nonce, kind, batch_id, recipient, call, gas, total_wei, "signed", 0, "", "", 0, 0)
        attempt = Attempt(signed.hash, 0, signed.raw, max_fee, priority_fee, self._clock(), head.number, 0)
        tx_id = self.store.add_tx(tx, attempt)
        self._checkpoint("stored")
        return tx_id

    async def _fees(self, head: Head) -> tuple[int, int]:
        """(priority fee, maximum fee) in wei per gas, with room for the base fee to double."""
        priority_fee = 0 if self.network.fee_model == "zk" else self.network.priority_fee
        if head.base_fee + priority_fee > self.network.fee_cap:
            text = f"the base fee is {head.base_fee / 1e9:.3g} gwei per gas, over the cap of "
            raise _Wait(Problem("TxStuck", text + f"{self.network.fee_cap / 1e9:g} gwei: waiting", self.address))
        return priority_fee, min(2 * head.base_fee + priority_fee, self.network.fee_cap)

    async def _gas(self, recipient: str, call: bytes, payees: int) -> int:
        try:
            estimate = await self.rpc.estimate_gas(self.address, recipient, call)
        except RpcError as error:
            if error.kind != "answer":
                raise
            kind = "InsufficientGas" if any(words in str(error).lower() for words in NO_FUNDS) else "TxStuck"
            raise _Wait(Problem(kind, f"the transaction would fail: {error}", self.address)) from error
        # on zk chains the estimate holds the cost of data already and grows with nothing we know
        return estimate if self.network.fee_model == "zk" else estimate * 6 // 5 + GAS_SPARE * payees

    async def _afford(self, cost_wei: int, signed: Signed) -> None:
        if self.network.fee_model == "op":
            cost_wei += await token.l1_fee(self.rpc, signed.raw) * 5 // 4  # it may rise until the block
        for tx in self.store.open():
            if tx.state != "mined":
                cost_wei += tx.gas * self.store.attempts(tx.id)[0].max_fee
        missing = cost_wei - await token.coins(self.rpc, self.address, enough_wei=cost_wei)
        if missing > 0:
            text = f"{missing / 1e18:.6g} {self.network.coin} too little for gas on {self.address}"
            raise _Wait(Problem("InsufficientGas", text, self.address, needed_wei=missing))

    async def _free_nonce(self) -> int:
        chain_nonce, own = await self.rpc.transaction_count(self.address), self.store.next_nonce()
        if chain_nonce < own and not any(tx.nonce >= chain_nonce for tx in self.store.open()):
            text = f"the node says nonce {chain_nonce}, we have used {own - 1}: it is behind, nothing is sent through it"
            raise _Wait(Problem("RpcError", text, self.address))
        return max(chain_nonce, own)

    def _sign(self, nonce: int, gas: int, max_fee: int, priority_fee: int, recipient: str, call: bytes) -> Signed:
        return sign(self.key, Transaction(self.network.chain_id, nonce, gas, max_fee, priority_fee, recipient, call))

    # -- telling

    async def _tell(self, tx: TxRow, event: Event) -> None:
        if tx.batch_id:
            await self._notify(event)

    async def _tell_stuck(self, batch_id: str, reason: str) -> None:
        if batch_id and self._told.get(batch_id) != reason:
            self._told[batch_id] = reason
            await self._notify(Stuck(batch_id, reason))

    async def _announce(self) -> None:
        """Tell the end of each finished batch; noted only when the listener has returned, so at least once."""
        for row in self.store.unannounced():
            await self._notify(self._ending(row))
            self.store.announced(row.batch.batch_id)
            self._told.pop(row.batch.batch_id, None)

    def _ending(self, row: BatchRow) -> Event:
        batch_id = row.batch.batch_id
        if row.state == "failed":
            return Failed(batch_id, row.reason)
        if row.state == "nonce_lost":
            return NonceLost(batch_id, row.reason)
        tx = self.store.tx_of_batch(batch_id)
        assert tx is not None, "a confirmed batch has a transaction"
        return Confirmed(batch_id, tx.winner, tx.block, tx.gas_used, tx.fee_wei)

    # -- test money

    async def fund(self) -> token.Balances:
        """Get test ether and test tokens; returns what the account holds then. `run` must be running. FundError."""
        if not self.network.is_test or self.network.mint is None:
            wanted = f"send {self.network.coin} and {self.network.symbol} to {self.address}"
            raise FundError(f"there is no faucet for {self.network.name}: {wanted}")
        try:
            if self.network.dev_faucet:
                await self.rpc.dev("dev_faucet", self.address)
            with trio.move_on_after(FUND_S):
                while not await self.rpc.balance(self.address):
                    await trio.sleep(self.network.poll_s)
            await self._mint(self.network.mint)
            return await token.balances(self.rpc, self.network, self.address)
        except RpcError as error:
            raise FundError(f"{self.network.name}: {error}") from error

    async def _mint(self, mint: str) -> None:
        async with self._turn:
            try:
                await self._check_chain()
                head = await self.rpc.head()
                tx_id = await self._sign_and_store("mint", mint, token.CREATE, head)
            except _Wait as wait:
                if "Cannot acquire more funds" in str(wait):
                    return  # it holds plenty
                raise FundError(f"no test tokens: {wait}") from wait
            await self._broadcast(self.store.tx(tx_id), self.store.attempts(tx_id)[0], [])
        self._wake.set()
        with trio.move_on_after(FUND_S):
            while (tx := self.store.tx(tx_id)).state in ("signed", "sent"):
                await trio.sleep(self.network.poll_s / 3)
            if tx.state in ("mined", "confirmed"):
                return
            raise FundError(f"create() did not succeed: {tx.state}")
        raise FundError(f"create() was not mined within {FUND_S:.0f} s")
