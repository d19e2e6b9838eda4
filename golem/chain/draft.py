"""What is signed: the transaction of a batch, with nonce, gas, fees and a signature; and why none can be made now."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from golem.chain import token
from golem.chain.evidence import Story, Unclear, View, newest
from golem.chain.networks import Network
from golem.chain.problem import Problem
from golem.chain.rows import Attempt, TransferBatch, TransferState, TxKind, TxRow
from golem.chain.rpc import Receipt, Rpc, RpcError
from golem.chain.signer import Key, Signed, Transaction, sign
from golem.chain.store import FILL_GAS, Store
from golem.chain.vouch import Vouch

GAS_SPARE = 20_000  # per payee over the estimate: a payee that emptied its purse meanwhile costs 17,100 more
NO_FUNDS = ("insufficient funds",)


class Wait(Exception):
    """Nothing further can be signed now: the problem says why.

    `first`: the transaction that was signed instead, and must come first: then nothing is wrong.
    """

    def __init__(self, problem: Problem, *, first: int | None = None) -> None:
        super().__init__(problem.detail)
        self.problem, self.first = problem, first


class WouldFail(Wait):
    """The chain refuses just this call, whatever is the matter with it."""


class Unowed(Wait):
    """What would be signed is not what is owed: a fault of ours, which a person has to look at."""


def held_back(
    reason: str, unknown: int, silent: Sequence[str], old: Sequence[str], looks: int, address: str, network: Network
) -> Wait:
    """Why a restored account waits. If it has sent nothing since, there is nothing to know. `silent` RPCs do not answer, `old`
    ones have shown no block since the node started."""
    text = f"{reason}; whether its account has sent anything since is asked {looks} times, of every RPC"
    if silent:
        text += f": {', '.join(silent)} does not answer; leave it out of {network.name.upper()}_GETH_ADDR if it is gone for good"
    elif old:
        text += f": {', '.join(old)} has shown no block since this node started; if that lasts, look at this machine's clock"
    if unknown > 0:
        text = f"{reason}, and {unknown} transactions have left its account since, which may have paid what is to be paid now: "
        text += "see that peers have told what was paid (golem payment status), then golem payment resume"
    return Wait(Problem("CantSign", text, address, chain_id=network.chain_id))


class Drafts:
    """Makes and stores signed transactions of one account; they are on disk when a method returns their row's id."""

    def __init__(
        self, network: Network, rpc: Rpc, key: Key, store: Store, clock: Callable[[], float],
        checkpoint: Callable[[str], None], vouch: Vouch,
    ) -> None:  # fmt: skip
        self._network, self._rpc, self._key, self.address = network, rpc, key, key.address
        self._store, self._clock, self._checkpoint, self._vouch = store, clock, checkpoint, vouch

    async def payment(self, batch: TransferBatch, views: Sequence[View]) -> int:
        """That of a batch; if it needs an allowance first, that of the approval, and `Wait`."""
        multi = self._network.multi_transfer
        reserved = sum(tx.total_wei for tx in self._store.open() if tx.state != TransferState.MINED)
        missing = batch.total_wei + reserved
        missing -= await token.tokens(self._rpc, self._network, self.address, enough_wei=missing)
        if missing > 0:
            text = f"{missing / 1e18:.6g} {self._network.symbol} too little on {self.address}"
            raise Wait(Problem("InsufficientToken", text, self.address, needed_wei=missing))
        if len(batch.payees) == 1 or multi is None:
            ((payee, amount_wei),) = batch.payees
            return await self.call(TxKind.PAY, self._network.token, token.transfer_call(payee, amount_wei), views, batch)
        if await token.allowance(self._rpc, self._network, self.address, multi) < batch.total_wei + reserved:
            wait = Problem("TxStuck", "the multi-transfer contract is being approved", self.address)
            if any(tx.kind == TxKind.APPROVE for tx in self._store.open()):
                raise Wait(wait, first=0)
            raise Wait(wait, first=await self.call(TxKind.APPROVE, self._network.token, token.approve_call(multi), views))
        return await self.call(TxKind.PAY, multi, token.packed_call(batch.payees), views, batch)

    async def refused(self, batch: TransferBatch) -> dict[str, str]:
        """Payees to whom the token moves nothing, and its words. Empty when a transfer to ourselves fails as well: then it
        is not the payees' fault."""
        if await self._objection(self.address, 1):
            return {}
        found = {payee: await self._objection(payee, amount_wei) for payee, amount_wei in batch.payees}
        return {payee: words for payee, words in found.items() if words}

    async def _objection(self, payee: str, amount_wei: int) -> str:
        try:
            await self._rpc.estimate_gas(self.address, self._network.token, token.transfer_call(payee, amount_wei))
        except RpcError as error:
            if error.kind != "answer":
                raise
            return str(error)
        return ""

    async def call(
        self, kind: TxKind, recipient: str, call: bytes, views: Sequence[View], batch: TransferBatch | None = None,
        nonce: int | None = None,
    ) -> int:  # fmt: skip
        """Nonce, fees, gas, signature, disk. `Wait` when it cannot be paid for now."""
        payees = len(batch.payees) if batch else 1
        priority_fee, max_fee = self._fees(views)
        gas = await self._gas(recipient, call, payees)
        nonce = self._free_nonce(views) if nonce is None else nonce
        if kind == TxKind.PAY:
            await self._check_owed(batch.batch_id if batch else "", recipient, call)
        signed = self._sign(nonce, gas, max_fee, priority_fee, recipient, call)
        await self._afford(gas * max_fee, signed)
        self._checkpoint("signed")
        total_wei = batch.total_wei if batch else 0
        batch_id = batch.batch_id if batch else ""
        tx = TxRow(0, nonce, kind, batch_id, recipient, call, gas, total_wei, TransferState.SIGNED, 0, "", "", 0, 0)
        oldest = min(view.head.number for view in views)  # whichever RPC is right, it is in no earlier block
        attempt = Attempt(signed.hash, 0, signed.raw, max_fee, priority_fee, self._clock(), oldest, 0)
        tx_id = self._store.add_tx(tx, attempt)
        self._store.note(tx_id, "this node", f"signed {signed.hash} with nonce {nonce} at block {oldest}", self._clock())
        self._checkpoint("stored")
        return tx_id

    async def cause(self, tx: TxRow, receipt: Receipt) -> str:
        """Why a transaction failed."""
        if receipt.gas_used >= tx.gas:
            return f"transaction {receipt.hash} ran out of gas ({tx.gas})"
        try:
            await self._rpc.call(tx.recipient, tx.data, self.address)
        except RpcError as error:
            return f"transaction {receipt.hash} failed: {error}"
        return f"transaction {receipt.hash} was reverted"

    def nothing(self, tx: TxRow, views: Sequence[View]) -> Attempt:
        """An empty transaction with the nonce of one that must not be mined any more, at a higher fee. `Unowed`."""
        last = self._store.attempts(tx.id)[0]
        priority_fee = last.priority_fee * 9 // 8 + 1
        max_fee = max(last.max_fee * 9 // 8 + 1, 2 * newest(views).base_fee + priority_fee)
        self._check_same(tx, last)
        signed = self._empty(tx.nonce, max_fee, priority_fee)
        oldest = min(view.head.number for view in views)
        attempt = Attempt(signed.hash, tx.id, signed.raw, max_fee, priority_fee, self._clock(), oldest, 0, empty=True)
        self._store.add_attempt(attempt)
        self._store.note(tx.id, "this node", f"signed the empty {signed.hash} with nonce {tx.nonce}", self._clock())
        return attempt

    async def again(self, tx: TxRow, last: Attempt, max_fee: int, priority_fee: int) -> Signed:
        """The same once more, with other fees. `Unowed`."""
        self._check_same(tx, last)
        if last.empty:
            return self._empty(tx.nonce, max_fee, priority_fee)
        if tx.kind == TxKind.PAY:
            await self._check_owed(tx.batch_id, tx.recipient, tx.data)
        return self._sign(tx.nonce, tx.gas, max_fee, priority_fee, tx.recipient, tx.data)

    def _empty(self, nonce: int, max_fee: int, priority_fee: int) -> Signed:
        return self._sign(nonce, FILL_GAS, max_fee, priority_fee, self.address, b"")

    def _check_same(self, tx: TxRow, last: Attempt) -> None:
        """What was signed before tells what the row said then, for a signature follows from the fields: if it were with
        another nonce, or to another payee, both could be mined."""
        fees = last.max_fee, last.priority_fee
        try:
            raw = (self._empty(tx.nonce, *fees) if last.empty else self._sign(tx.nonce, tx.gas, *fees, tx.recipient, tx.data)).raw
        except ValueError:
            raw = b""
        if raw != last.raw:
            raise self._unowed(f"chain.db is damaged: nonce {tx.nonce} is not what was signed as {last.hash}", tx.batch_id or "-")

    async def _check_owed(self, batch_id: str, recipient: str, call: bytes) -> None:
        try:
            payees = token.payees_of(call)
        except ValueError as error:
            raise self._unowed(f"batch {batch_id}: {error}", batch_id) from None
        if recipient not in (self._network.token, self._network.multi_transfer):
            text = f"batch {batch_id} would be paid through {recipient}, which is none of the network's contracts"
            raise self._unowed(text, batch_id)
        if reason := await self._vouch(batch_id, payees):
            raise self._unowed(f"batch {batch_id} is not signed: {reason}", batch_id)

    def _unowed(self, words: str, batch_id: str) -> Unowed:
        return Unowed(Problem("CantSign", words, self.address, batch_id=batch_id))

    def _sign(self, nonce: int, gas: int, max_fee: int, priority_fee: int, recipient: str, call: bytes) -> Signed:
        return sign(self._key, Transaction(self._network.chain_id, nonce, gas, max_fee, priority_fee, recipient, call))

    def _fees(self, views: Sequence[View]) -> tuple[int, int]:
        """(priority fee, maximum fee) in wei per gas, with room for the base fee to double."""
        base_fee = newest(views).base_fee
        priority_fee = 0 if self._network.fee_model == "zk" else self._network.priority_fee
        if base_fee + priority_fee > self._network.fee_cap:
            text = f"the base fee is {base_fee / 1e9:.3g} gwei per gas, over the cap of "
            raise Wait(Problem("TxStuck", text + f"{self._network.fee_cap / 1e9:g} gwei: waiting", self.address))
        return priority_fee, min(2 * base_fee + priority_fee, self._network.fee_cap)

    async def _gas(self, recipient: str, call: bytes, payees: int) -> int:
        try:
            estimate = await self._rpc.estimate_gas(self.address, recipient, call)
        except RpcError as error:
            if error.kind != "answer":
                raise
            text = f"the transaction would fail: {error}"
            if any(words in str(error).lower() for words in NO_FUNDS):
                raise Wait(Problem("InsufficientGas", text, self.address)) from error
            raise WouldFail(Problem("TxStuck", text, self.address)) from error
        # on zk chains the estimate holds the cost of data already and grows with nothing we know
        return estimate if self._network.fee_model == "zk" else estimate * 6 // 5 + GAS_SPARE * payees

    async def _afford(self, cost_wei: int, signed: Signed) -> None:
        if self._network.fee_model == "op":
            cost_wei += await token.l1_fee(self._rpc, signed.raw) * 5 // 4  # it may rise until the block
        for tx in self._store.open():
            if tx.state != TransferState.MINED:
                cost_wei += tx.gas * self._store.attempts(tx.id)[0].max_fee
        missing = cost_wei - await token.coins(self._rpc, self.address, enough_wei=cost_wei)
        if missing > 0:
            text = f"{missing / 1e18:.6g} {self._network.coin} too little for gas on {self.address}"
            raise Wait(Problem("InsufficientGas", text, self.address, needed_wei=missing))

    def _free_nonce(self, views: Sequence[View]) -> int:
        """Ours, or a higher one that the RPCs agree on: a nonce beyond the next one would never be mined."""
        own = self._store.next_nonce()
        counts = {view.count for view in views}
        if max(counts) > own and len(counts) > 1:
            raise Unclear([Story(view.name, f"our next nonce is {view.count}") for view in views], contradiction=True)
        return max(*counts, own)
