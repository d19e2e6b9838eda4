"""The dev chain itself: py-evm blocks over `store.Store`, a mempool with geth's rules and words, mining and rewinding.

Synchronous and single-threaded; `server` is its only user, `methods` turns JSON-RPC into calls on it.

Mining: *automine* (a block as soon as a transaction is ready), *interval* (blocks at a period) or *manual*. In the
first two, up to `tail` empty blocks follow the last busy one, a `tick` apart, so that confirmations advance while
somebody may wait for them and an idle chain does not grow for ever.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from eth.chains.base import MiningChain
from eth.constants import (
    BLANK_ROOT_HASH,
    GENESIS_PARENT_HASH,
    POST_MERGE_DIFFICULTY,
    POST_MERGE_MIX_HASH,
    POST_MERGE_NONCE,
    ZERO_ADDRESS,
)
from eth.db.atomic import AtomicDB
from eth.exceptions import CanonicalHeadNotFound, PyEVMError
from eth.vm.forks.prague import PragueVM
from eth_keys.exceptions import BadSignature
from eth_utils.exceptions import ValidationError
from rlp.exceptions import RLPException  # type: ignore[import-untyped]

from golem.chain.devchain import genesis
from golem.chain.devchain.store import DevChainStore, LogRow, TxRow
from golem.chain.signer import Key, Transaction, address_bytes, checksum, sign

BLOCK_TRANSACTIONS = 200  # keeps one block under about three seconds of this machine's time
POOL_LIMIT = 5_000
SENDER_LIMIT = 1_024
SNAPSHOT_LIMIT = 1_000

MALFORMED = (RLPException, ValidationError, BadSignature, PyEVMError, ValueError, TypeError, IndexError)


class ChainError(Exception):
    """What a JSON-RPC caller is told: message, code and, for a revert, the returned data as hex."""

    def __init__(self, message: str, code: int = -32000, data: str | None = None) -> None:
        super().__init__(message)
        self.code, self.data = code, data


def hexed(raw: bytes) -> str:
    return "0x" + bytes(raw).hex()


class DevChain:
    """One chain in one directory. Times in seconds."""

    def __init__(self, directory: Path, *, chain_id: int = genesis.CHAIN_ID, tail: int = 12) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.store = DevChainStore(directory / "chain.sqlite")
        self.chain_id, self.tail = chain_id, tail
        self.automine, self.interval_s = True, 0.0
        self.time_offset = 0
        self.next_base_fee: int | None = None  # for the next block only: a simulated fee spike
        self.pool: dict[bytes, dict[int, Any]] = {}  # sender -> nonce -> transaction
        self.snapshots: list[bytes] = []  # block hashes
        self._chain_class: Any = self._make_class()  # py-evm's types stop here: NewTypes of bytes and int
        self.chain: Any
        self._open()
        self.last_busy = self.store.last_busy_block()
        for raw in self.store.pooled():
            tx = self._decode(raw)
            self.pool.setdefault(tx.sender, {})[tx.nonce] = tx

    def _make_class(self) -> type[MiningChain]:
        outer = self

        class DevVM(PragueVM):
            @classmethod
            def validate_header(cls, header: Any, parent_header: Any) -> None:
                if outer.next_base_fee is None:  # a header with a dictated base fee is invalid by design
                    super().validate_header(header, parent_header)

        class Chain(MiningChain):
            chain_id = outer.chain_id
            vm_configuration = ((0, DevVM),)  # type: ignore[assignment]

            def create_header_from_parent(self, parent_header: Any, **params: Any) -> Any:
                params["gas_limit"] = parent_header.gas_limit
                params["timestamp"] = max(parent_header.timestamp + 1, outer.now())
                header = super().create_header_from_parent(parent_header, **params)
                fee = outer.next_base_fee
                return header if fee is None else header.copy(base_fee_per_gas=fee)

        return Chain

    def _open(self) -> None:
        """(Re)build the py-evm object from disk; on an empty disk make the genesis block and deploy the contracts."""
        database = AtomicDB(self.store)
        try:
            self.chain = self._chain_class(database)
            return
        except CanonicalHeadNotFound:
            pass  # an empty disk
        rich = {
            address_bytes(address): {"balance": genesis.GENESIS_BALANCE_WEI, "nonce": 0, "code": b"", "storage": {}}
            for address in (genesis.FAUCET_ADDRESS, genesis.DEPLOYER_ADDRESS)
        }
        params = {
            "coinbase": ZERO_ADDRESS,
            "difficulty": POST_MERGE_DIFFICULTY,
            "extra_data": b"golem dev chain " + os.urandom(16),  # no two chains have the same genesis hash
            "gas_limit": genesis.GAS_LIMIT,
            "mix_hash": POST_MERGE_MIX_HASH,
            "nonce": POST_MERGE_NONCE,
            "receipt_root": BLANK_ROOT_HASH,
            "timestamp": int(time.time()) - 2,
            "transaction_root": BLANK_ROOT_HASH,
        }
        self.chain = self._chain_class.from_genesis(database, params, rich)
        # genesis commits together with block 1: the chain is never seen without its contracts
        self._mine([self._decode(signed.raw) for signed in genesis.deploy_transactions(self.chain_id)])

    # -- state

    def now(self) -> int:
        return int(time.time()) + self.time_offset

    @property
    def head(self) -> Any:
        return self.chain.get_canonical_head()

    def next_header(self) -> Any:
        return self.chain.create_header_from_parent(self.head)

    def state(self, header: Any = None) -> Any:
        """State after block `header`, or after the head."""
        child = self.chain.create_header_from_parent(header or self.head)
        return self.chain.get_vm(child).state

    # -- mempool

    def _decode(self, raw: bytes) -> Any:
        try:
            tx = self.chain.get_vm_class_for_block_number(1).get_transaction_builder().decode(raw)
            tx.validate()
            tx.check_signature_validity()
            _ = tx.sender  # recovers the key; cached by py-evm
        except MALFORMED as error:
            raise ChainError(f"invalid transaction: {str(error)[:200]}") from error
        return tx

    def add(self, raw: bytes) -> bytes:
        """Take a signed transaction into the mempool and return its hash; ChainError in geth's words otherwise."""
        tx = self._decode(raw)
        if tx.chain_id != self.chain_id:
            raise ChainError(f"invalid chain id for signer: have {tx.chain_id} want {self.chain_id}")
        slot: Any = self.pool.get(tx.sender, {})
        old = slot.get(tx.nonce)
        if (old and old.hash == tx.hash) or self.store.place(tx.hash):
            raise ChainError("already known")
        self._check(tx, old, len(slot))
        self.pool.setdefault(tx.sender, {})[tx.nonce] = tx
        if self.automine:
            self.mine()
        if tx.nonce in self.pool.get(tx.sender, {}):  # not mined at once: keep it over a crash
            replaced = [("delete from pool where hash=?", [(old.hash,)])] if old else []
            row = (tx.hash, tx.encode(), time.time_ns())
            self.store.commit([*replaced, ("insert or replace into pool values(?,?,?)", [row])])
        return bytes(tx.hash)

    def _check(self, tx: Any, old: Any, queued: int) -> None:
        state = self.state()
        nonce, balance = state.get_nonce(tx.sender), state.get_balance(tx.sender)
        cost = tx.value + tx.gas * tx.max_fee_per_gas
        if tx.nonce < nonce:
            raise ChainError(f"nonce too low: next nonce {nonce}, tx nonce {tx.nonce}")
        if tx.intrinsic_gas > tx.gas:
            raise ChainError(f"intrinsic gas too low: gas {tx.gas}, minimum needed {tx.intrinsic_gas}")
        if tx.gas > self.head.gas_limit:
            raise ChainError("exceeds block gas limit")
        if balance < cost:
            raise ChainError(
                f"insufficient funds for gas * price + value: balance {balance}, tx cost {cost}, overshot {cost - balance}"
            )
        if old is not None and (
            tx.max_fee_per_gas * 10 < old.max_fee_per_gas * 11
            or tx.max_priority_fee_per_gas * 10 < old.max_priority_fee_per_gas * 11
        ):
            raise ChainError("replacement transaction underpriced")
        if queued >= SENDER_LIMIT or sum(map(len, self.pool.values())) >= POOL_LIMIT:
            raise ChainError("txpool is full")

    def ready(self) -> list[Any]:
        """Transactions that the next block may carry: no nonce gap, fee at or over the base fee, balance suffices."""
        if not any(self.pool.values()):
            return []
        state, base_fee = self.state(), self.next_header().base_fee_per_gas
        chosen = []
        for sender, slot in self.pool.items():
            nonce, balance = state.get_nonce(sender), state.get_balance(sender)
            while (tx := slot.get(nonce)) is not None and tx.max_fee_per_gas >= base_fee:
                balance -= tx.value + tx.gas * tx.max_fee_per_gas
                if balance < 0:
                    break
                chosen.append(tx)
                nonce += 1
        return chosen

    def waiting(self) -> bool:
        """Is somebody served by another empty block: confirmations outstanding, or a fee above the base fee soon?"""
        if self.head.block_number - self.last_busy < self.tail:
            return True
        state, base_fee = self.state(), self.next_header().base_fee_per_gas
        heads = [slot.get(state.get_nonce(sender)) for sender, slot in self.pool.items()]
        # an idle base fee falls to 7 wei and no further
        return any(tx is not None and 8 < tx.max_fee_per_gas < base_fee for tx in heads)

    def drop(self, tx_hash: bytes | None) -> bool:
        """Remove one transaction (or all, None) from the mempool, as a forgetful peer would."""
        found = False
        for sender, slot in list(self.pool.items()):
            for nonce, tx in list(slot.items()):
                if tx_hash is None or tx.hash == tx_hash:
                    del slot[nonce]
                    found = True
            if not slot:
                del self.pool[sender]
        self.store.commit([self._pool_clear(), self._pool_fill()])
        return found

    def _pool_clear(self) -> tuple[str, list[tuple[Any, ...]]]:
        return "delete from pool where seq >= ?", [(0,)]

    def _pool_fill(self) -> tuple[str, list[tuple[Any, ...]]]:
        txs = [tx for slot in self.pool.values() for tx in slot.values()]
        return "insert into pool values(?,?,?)", [(tx.hash, tx.encode(), i) for i, tx in enumerate(txs)]

    # -- mining

    def mine(self, *, empty: bool = False) -> None:
        """Mine what is ready; with `empty`, exactly one block, be it empty."""
        while True:
            gas, batch = 0, []
            for tx in self.ready()[:BLOCK_TRANSACTIONS]:
                if gas + tx.gas > self.head.gas_limit:
                    break
                gas += tx.gas
                batch.append(tx)
            if not batch and not empty:
                return
            try:
                self._mine(batch)
            except (ValidationError, PyEVMError):
                if not batch:
                    raise
                self._mine_singly(batch)
            if empty or self.interval_s:
                return

    def _mine_singly(self, batch: list[Any]) -> None:
        """A transaction that looked ready is invalid after all: find it and drop it, keep the others."""
        for tx in batch:
            try:
                self._mine([tx])
            except (ValidationError, PyEVMError):
                self.drop(tx.hash)

    def _mine(self, txs: list[Any]) -> None:
        try:
            result, receipts, computations = self.chain.mine_all(txs, parent_header=self.head)
        except (ValidationError, PyEVMError):
            self.store.forget()
            self._open()
            raise
        header = result.imported_block.header
        rows, logs = self._index(header, txs, receipts, computations)
        self.store.commit(
            [
                ("insert into tx values(?,?,?,?)", rows),
                ("insert into log values(?,?,?,?,?,?,?,?)", logs),
                ("delete from pool where hash=?", [(tx.hash,) for tx in txs]),
            ]
        )
        self.next_base_fee = None
        if txs:
            self.last_busy = header.block_number
        for tx in txs:
            slot = self.pool.get(tx.sender, {})
            slot.pop(tx.nonce, None)
            if not slot:
                self.pool.pop(tx.sender, None)

    def _index(self, header: Any, txs: list[Any], receipts: Any, computations: Any) -> tuple[list[TxRow], list[LogRow]]:
        rows: list[TxRow] = []
        logs: list[LogRow] = []
        gas_before = 0
        for place, (tx, receipt, computation) in enumerate(zip(txs, receipts, computations, strict=True)):
            common = {
                "blockHash": hexed(header.hash),
                "blockNumber": hex(header.block_number),
                "transactionHash": hexed(tx.hash),
                "transactionIndex": hex(place),
            }
            mine: list[dict[str, Any]] = []
            for log in receipt.logs:
                topics = [int(topic).to_bytes(32, "big") for topic in log.topics]
                body = {
                    **common,
                    "address": checksum(hexed(log.address)),
                    "topics": [hexed(topic) for topic in topics],
                    "data": hexed(log.data),
                    "logIndex": hex(len(logs)),
                    "removed": False,
                }
                mine.append(body)
                t0, t1, t2, t3 = (*topics, None, None, None, None)[:4]
                logs.append((header.block_number, len(logs), log.address, t0, t1, t2, t3, json.dumps(body)))
            created = not tx.to and not computation.is_error
            price = min(tx.max_fee_per_gas, header.base_fee_per_gas + tx.max_priority_fee_per_gas)
            document = {
                **common,
                "from": checksum(hexed(tx.sender)),
                "to": checksum(hexed(tx.to)) if tx.to else None,
                "status": hex(0 if computation.is_error else 1),
                "type": hex(getattr(tx, "type_id", None) or 0),
                "gasUsed": hex(receipt.gas_used - gas_before),
                "cumulativeGasUsed": hex(receipt.gas_used),
                "effectiveGasPrice": hex(price),
                "logs": mine,
                "logsBloom": f"0x{receipt.bloom:0512x}",
                "contractAddress": checksum(hexed(computation.msg.storage_address)) if created else None,
            }
            gas_before = receipt.gas_used
            rows.append((tx.hash, header.block_number, place, json.dumps(document)))
        return rows, logs

    def tick(self) -> None:
        """What the clock does: mine what is ready, or a block of the empty tail."""
        if not (self.automine or self.interval_s):
            return
        if self.ready():
            self.mine()
        elif self.waiting():
            self.mine(empty=True)

    # -- the developer's hand

    def rewind(self, number: int) -> None:
        """Make block `number` the head again; the transactions after it are gone."""
        if not 1 <= number <= self.head.block_number:
            raise ChainError(f"cannot rewind to block {number}")
        chaindb = self.chain.chaindb
        header = chaindb.get_canonical_block_header_by_number(number)
        chaindb._set_as_canonical_chain_head(chaindb.db, header, GENESIS_PARENT_HASH)
        over = [(number,)]
        self.store.commit([("delete from tx where block>?", over), ("delete from log where block>?", over)])
        self._open()
        self.last_busy = self.store.last_busy_block()

    def reorg(self, depth: int) -> None:
        """Replace the last `depth` blocks by empty ones."""
        number = self.head.block_number
        if not 1 <= depth < number:
            raise ChainError(f"reorg of depth {depth} at block {number}")
        waiting, self.pool = self.pool, {}
        self.time_offset += 1  # other time stamps, hence other hashes
        self.rewind(number - depth)
        for _ in range(depth):
            self.mine(empty=True)
        self.pool = waiting
        self.last_busy = number  # let confirmations advance over the new branch

    def snapshot(self) -> int:
        if len(self.snapshots) >= SNAPSHOT_LIMIT:
            raise ChainError("too many snapshots")
        self.snapshots.append(self.head.hash)
        return len(self.snapshots)

    def revert(self, snapshot: int) -> bool:
        """Back to a snapshot, which is used up together with the later ones; the mempool is emptied."""
        if not 1 <= snapshot <= len(self.snapshots):
            return False
        block_hash = self.snapshots[snapshot - 1]
        del self.snapshots[snapshot - 1 :]
        header = self.chain.chaindb.get_block_header_by_hash(block_hash)
        if header.block_number > self.head.block_number or (
            self.chain.get_canonical_block_header_by_number(header.block_number).hash != block_hash
        ):
            return False
        self.rewind(header.block_number)
        self.drop(None)
        return True

    def faucet(self, address: bytes, amount_wei: int) -> bytes:
        """Send test ether from the genesis account; here and not in the callers, who would race for its nonce."""
        key = Key(genesis.FAUCET_SECRET)
        sender = address_bytes(key.address)
        nonce = self.pending_nonce(sender)
        fee = 2 * self.next_header().base_fee_per_gas + 10**9
        tx = Transaction(self.chain_id, nonce, 21_000, fee, 10**9, hexed(address), b"", amount_wei)
        return self.add(sign(key, tx).raw)

    def pending_nonce(self, sender: bytes) -> int:
        nonce: int = self.state().get_nonce(sender)
        slot = self.pool.get(sender, {})
        while nonce in slot:
            nonce += 1
        return nonce
