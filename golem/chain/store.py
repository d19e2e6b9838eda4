"""The engine's disk: batches, transactions and their signed attempts, in one SQLite file with synchronous=FULL.

A *batch* is what the wallet asked for. A *transaction* is one nonce of one account. An *attempt* is one signed form of
it; several differ in their fees only, and at most one can ever be mined. What is here is on disk before it is sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from golem.chain.rows import (
    TX_COLUMNS,
    Attempt,
    ChainBatchRow,
    Seen,
    TransferBatch,
    TransferState,
    TxKind,
    TxRow,
    attempt_of,
    batch_of,
    tx_of,
)
from golem.chain.schema import StoreDamaged, connect

OPEN = (TransferState.SIGNED, TransferState.SENT, TransferState.MINED)
_OPEN = "('" + "','".join(OPEN) + "')"
MAX_NONCE = 2**63 - 1
FILL_GAS = 21_000
MAX_SEEN = 200  # remarks of one teller kept on a transaction


class OrdersTaken(Exception):
    """Some orders of a batch are in others already, which paid them or may do so: `batches`, with all their orders."""

    def __init__(self, batches: tuple[TransferBatch, ...]) -> None:
        super().__init__(f"orders that are in other batches already: {', '.join(batch.batch_id for batch in batches)}")
        self.batches = batches


def _batch_ends(tx: TxRow, state: TransferState, before: TransferState) -> TransferState | None:
    """How a batch stands that was `before` when one of its transactions has ended; None: as it did."""
    if not tx.void:
        return TransferState.QUEUED if tx.reopened and state != TransferState.CONFIRMED else state
    if state == TransferState.CONFIRMED:
        return state
    return state if before == TransferState.ASSIGNED and not tx.reopened else None  # else another one is to pay it, or has


class Store:
    """Rows of one account (a chain and an address)."""

    def __init__(self, path: Path | str, account: str) -> None:
        self.account = account
        self._sql = connect(path)
        self.damaged: dict[Any, str] = {}  # batch that cannot be read -> why

    def close(self) -> None:
        self._sql.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._sql.execute("begin immediate")
        try:
            yield
            self._sql.execute("commit")
        except BaseException:
            if self._sql.in_transaction:  # a full disk may have rolled it back already
                self._sql.execute("rollback")
            raise

    def bind_genesis(self, chain: str, genesis: str) -> str:
        """Remember which chain this is; returns the genesis hash first seen under this id."""
        self._sql.execute("insert or ignore into chain values(?,?)", (chain, genesis))
        row = self._sql.execute("select genesis from chain where id=?", (chain,)).fetchone()
        return str(row[0])

    def change_chain(self, chain: str, genesis: str) -> None:
        """Another chain has come under this id. Transactions of the old one are put aside, those of the new one come back
        where it was here before. Batches whose end nobody has heard of stand as the new chain's transactions say, and are
        queued again where it has none."""
        with self._transaction():
            (old,) = self._sql.execute("select genesis from chain where id=?", (chain,)).fetchone()
            self._sql.execute("update tx set account=? where account=?", (f"{self.account}@{old}", self.account))
            self._sql.execute("update tx set account=? where account=?", (self.account, f"{self.account}@{genesis}"))
            self._sql.execute(
                f"update batch set state=coalesce((select case when tx.state in {_OPEN} then 'assigned' else tx.state end"
                " from tx where tx.account=batch.account and tx.batch=batch.id order by tx.id desc limit 1), 'queued')"
                " where account=? and announced=0",
                (self.account,),
            )
            self._sql.execute("update chain set genesis=? where id=?", (genesis, chain))

    # -- batches

    def add_batch(self, batch: TransferBatch) -> bool:
        """False when the id is there already; then a finished batch will be announced again. ValueError when the same
        id was given with other payees, OrdersTaken when an order is in another batch that has not failed for good."""
        payees = json.dumps(batch.payees)
        with self._transaction():
            row = self._sql.execute(
                "select payees from batch where account=? and id=?", (self.account, batch.batch_id)
            ).fetchone()
            if row is None:
                self._take_orders(batch)
                self._sql.execute(
                    "insert into batch(account, id, payees, state, reason, announced) values(?,?,?,'queued','',0)",
                    (self.account, batch.batch_id, payees),
                )
                return True
            if row[0] != payees and self.batch(batch.batch_id) is not None:  # which raises where it is damaged
                raise ValueError(f"batch {batch.batch_id} was submitted before with other payees")
            self._sql.execute("update batch set announced=0 where account=? and id=?", (self.account, batch.batch_id))
            return False

    def _take_orders(self, batch: TransferBatch) -> None:
        """Note the orders of a new batch. An order that paid, or may pay, in another one stays there."""
        order_ids = [order_id for orders in batch.orders for order_id in orders]
        find = (
            "select batch.id from ordered join batch on batch.account=ordered.account and batch.id=ordered.batch"
            " where ordered.account=? and ordered.id=? and batch.state not in ('failed','nonce_lost')"
        )
        found = [self._sql.execute(find, (self.account, order_id)).fetchone() for order_id in order_ids]
        if taken := dict.fromkeys(str(row[0]) for row in found if row):
            raise OrdersTaken(tuple(self._with_orders(batch_id) for batch_id in taken))
        rows = [(self.account, order_id, batch.batch_id, payee) for payee, ids in enumerate(batch.orders) for order_id in ids]
        self._sql.executemany("insert or replace into ordered values(?,?,?,?)", rows)

    def _with_orders(self, batch_id: str) -> TransferBatch:
        row = self.batch(batch_id)
        assert row is not None, batch_id
        orders: list[list[str]] = [[] for _ in row.batch.payees]
        query = "select payee, id from ordered where account=? and batch=? order by payee, id"
        for payee, order_id in self._sql.execute(query, (self.account, batch_id)):
            orders[payee].append(order_id)
        return replace(row.batch, orders=tuple(map(tuple, orders)))

    def batches(self, where: str) -> list[ChainBatchRow]:
        """Batches in order of arrival; `where` is one of this module's own conditions. One that is damaged is left out, and
        named: it holds up no other."""
        query = f"select id, payees, state, reason, refused from batch where account=? and {where} order by seq"
        found = []
        for row in self._sql.execute(query, (self.account,)).fetchall():
            try:
                found.append(batch_of(row))
                self.damaged.pop(row[0], None)
            except StoreDamaged as error:
                self.damaged[row[0]] = str(error)
        return found

    def queued(self) -> list[ChainBatchRow]:
        return self.batches("state='queued'")

    def unannounced(self) -> list[ChainBatchRow]:
        """Finished batches whose end nobody has taken note of."""
        return self.batches("announced=0 and state in ('confirmed','failed','nonce_lost')")

    def batch(self, batch_id: str) -> ChainBatchRow | None:
        rows = self._sql.execute("select seq from batch where account=? and id=?", (self.account, batch_id)).fetchone()
        if rows is None:
            return None
        if not (found := self.batches(f"seq={int(rows[0])}")):
            raise StoreDamaged(self.damaged[batch_id])
        return found[0]

    def refuse(self, batch_id: str, reason: str, payees: tuple[str, ...]) -> None:
        """No transaction can be made of a queued batch, since these cannot be paid: final, nothing was signed."""
        sql = "update batch set state='failed', reason=?, refused=? where account=? and id=? and state='queued'"
        self._sql.execute(sql, (reason, " ".join(payees), self.account, batch_id))

    def announced(self, batch_id: str) -> None:
        self._sql.execute("update batch set announced=1 where account=? and id=?", (self.account, batch_id))

    # -- transactions

    def open(self) -> list[TxRow]:
        """Transactions that are not final, in nonce order."""
        rows = self._sql.execute(
            f"select {TX_COLUMNS} from tx where account=? and state in {_OPEN} order by nonce", (self.account,)
        )
        return [tx_of(row) for row in rows]

    def tx_of_batch(self, batch_id: str) -> TxRow | None:
        """Its last transaction, on this chain if there is one."""
        row = self._sql.execute(
            f"select {TX_COLUMNS} from tx where batch=? and (account=? or account like ?) order by account, id desc",
            (batch_id, self.account, f"{self.account}@%"),
        ).fetchone()
        return tx_of(row) if row else None

    def txs_of_batch(self, batch_id: str) -> list[TxRow]:
        """All that were ever signed for it, on this chain."""
        rows = self._sql.execute(
            f"select {TX_COLUMNS} from tx where +account=? and batch=? order by id", (self.account, batch_id)
        )
        return [tx_of(row) for row in rows]

    def final(self, before: int | None = None) -> TxRow | None:
        """The final transaction with the highest nonce, or the highest before one."""
        row = self._sql.execute(
            f"select {TX_COLUMNS} from tx where account=? and nonce<? and state not in {_OPEN} order by nonce desc limit 1",
            (self.account, MAX_NONCE if before is None else before),
        ).fetchone()
        return tx_of(row) if row else None

    def last_block(self) -> int:
        """The newest block that holds what is final; far below all others where none does."""
        row = self._sql.execute(f"select max(block) from tx where account=? and state not in {_OPEN}", (self.account,)).fetchone()
        return -MAX_NONCE if row[0] is None else int(row[0])

    def rivals(self, batch_id: str, tx_id: int = 0) -> list[TxRow]:
        """Other transactions that were signed for some order of a batch, and have paid it or may do so."""
        query = (
            "select ? union select theirs.batch from ordered ours cross join ordered theirs"
            " on theirs.account=ours.account and theirs.id=ours.id where ours.account=? and ours.batch=?"
        )
        batches = [str(row[0]) for row in self._sql.execute(query, (batch_id, self.account, batch_id)).fetchall()]
        txs = [tx for each in batches for tx in self.txs_of_batch(each) if tx.id != tx_id and tx.kind == TxKind.PAY]
        return [tx for tx in txs if (tx.void and tx.state in OPEN) or (not tx.void and tx.state == TransferState.CONFIRMED)]

    def orders(self, batch_id: str) -> set[str]:
        """The orders that a batch pays; none where the wallet named none."""
        rows = self._sql.execute("select id from ordered where account=? and batch=?", (self.account, batch_id))
        return {str(row[0]) for row in rows}

    def doubled(self) -> list[tuple[TxRow, TxRow]]:
        """Payments that have both paid one order, older first: but those of which a person knows."""
        reopened = self._sql.execute(
            "select id, batch from tx where account=? and state='confirmed' and reopened and not void", (self.account,)
        ).fetchall()
        rows = [(tx_id, rival.id) for tx_id, batch_id in reopened for rival in self.rivals(batch_id or "", tx_id)]
        rows = [pair for pair in rows if not self.tx(pair[1]).void]
        pairs = {(min(pair, key=self._nonce), max(pair, key=self._nonce)) for pair in rows}
        found = [(self.tx(older), self.tx(newer)) for older, newer in sorted(pairs)]
        return [(older, newer) for older, newer in found if not newer.sure]

    def _nonce(self, tx_id: int) -> int:
        return self.tx(tx_id).nonce

    def made(self, tx_hash: str) -> bool:
        """Was this transaction signed here, or found to be one of ours?"""
        return self.owner(tx_hash) is not None

    def owner(self, tx_hash: str) -> int | None:
        """The transaction that this is a signed form of, or that it has paid."""
        sql = "select tx from attempt where hash=? union select id from tx where winner=? limit 1"
        row = self._sql.execute(sql, (tx_hash, tx_hash)).fetchone()
        return int(row[0]) if row else None

    def tx(self, tx_id: int) -> TxRow:
        return tx_of(self._sql.execute(f"select {TX_COLUMNS} from tx where id=?", (tx_id,)).fetchone())

    def next_nonce(self) -> int:
        """One over the highest nonce ever used here; 0 at first."""
        row = self._sql.execute("select max(nonce) from tx where account=?", (self.account,)).fetchone()
        return 0 if row[0] is None else int(row[0]) + 1

    def ever_signed(self) -> bool:
        """Was any transaction of the account made here, on this chain or on one that was here before?"""
        sql = "select 1 from tx where account=? or account like ?"
        return self._sql.execute(sql, (self.account, f"{self.account}@%")).fetchone() is not None

    def first_unknown(self, count: int) -> tuple[int, int]:
        """Of `count` used nonces the first that no transaction of this file took, -1 if there is none, and a block that all of
        these come after. Those before our first one, and those that a person knows of, do not count."""
        known = self._sql.execute("select reason from hold where account=?", (f"{self.account}#known",)).fetchone()
        since = int(known[0]) if known and str(known[0]).isdecimal() else 0
        row = self._sql.execute(
            "select min(nonce) from (select nonce+1 as nonce from tx where account=?1 union select nonce from tx where"
            " account=?1 and state='nonce_lost' union select ?2) where nonce>=?2 and nonce<?3"
            " and nonce>=(select min(nonce) from tx where account=?1)"
            " and nonce not in (select nonce from tx where account=?1 and state!='nonce_lost')",
            (self.account, since, count),
        ).fetchone()
        if row[0] is None:
            return -1, 0
        block, head = self._sql.execute(
            "select max(case when nonce<?2 and state!='nonce_lost' then block end),"
            " (select min(head) from attempt join tx on tx.id=attempt.tx where account=?1) from tx where account=?1",
            (self.account, row[0]),
        ).fetchone()
        return int(row[0]), int(block or head or 0)

    def accept(self, count: int) -> None:
        """A person knows what was sent with the first `count` nonces."""
        self._sql.execute("replace into hold values(?, ?)", (f"{self.account}#known", str(count)))

    def has_nonce(self, nonce: int) -> bool:
        """Was a transaction with this nonce ever made here?"""
        sql = "select 1 from tx where account=? and nonce=?"
        return self._sql.execute(sql, (self.account, nonce)).fetchone() is not None

    def add_tx(self, tx: TxRow, attempt: Attempt) -> int:
        """Store a signed transaction and assign its batch, all or nothing. IntegrityError when the nonce is taken."""
        with self._transaction():
            cursor = self._sql.execute(
                "insert into tx(account, nonce, kind, batch, recipient, data, gas, total_wei, state)"
                " values(?,?,?,?,?,?,?,?,'signed')",
                (self.account, tx.nonce, tx.kind, tx.batch_id or None, tx.recipient, tx.data, tx.gas, str(tx.total_wei)),
            )
            tx_id = int(cursor.lastrowid or 0)
            self._insert(attempt, tx_id)
            if tx.batch_id:
                self._sql.execute("update batch set state='assigned' where account=? and id=?", (self.account, tx.batch_id))
        return tx_id

    def add_attempt(self, attempt: Attempt) -> None:
        with self._transaction():
            self._insert(attempt, attempt.tx_id)

    def _insert(self, attempt: Attempt, tx_id: int) -> None:
        values = (attempt.hash, tx_id, attempt.raw, str(attempt.max_fee), str(attempt.priority_fee))
        self._sql.execute(
            "insert into attempt values(?,?,?,?,?,?,?,0,?)", (*values, attempt.created, attempt.head, attempt.empty)
        )

    def attempts(self, tx_id: int) -> list[Attempt]:
        """Newest first."""
        rows = self._sql.execute(
            "select hash, tx, raw, max_fee, priority_fee, created, head, sends, empty from attempt where tx=?"
            " order by created desc, rowid desc",
            (tx_id,),
        )
        return [attempt_of(row) for row in rows]

    def hashes(self, tx: TxRow) -> tuple[str, ...]:
        """Under which its receipt may be found: the likeliest first."""
        found = [attempt.hash for attempt in self.attempts(tx.id)]
        return tuple(dict.fromkeys([*([tx.winner] if tx.winner else []), *found]))

    def count_send(self, tx_hash: str) -> None:
        self._sql.execute("update attempt set sends=sends+1 where hash=?", (tx_hash,))

    def mark_sent(self, tx_id: int) -> None:
        """Broadcast, or thrown back out of the chain by a reorganisation."""
        self._sql.execute("update tx set state='sent', block=null, block_hash=null where id=?", (tx_id,))

    def mark_mined(self, tx_id: int, block: int, block_hash: str, winner: str) -> None:
        self._sql.execute(
            "update tx set state='mined', block=?, block_hash=?, winner=? where id=?", (block, block_hash, winner, tx_id)
        )

    def mark_taken(self, tx_id: int, block: int, block_hash: str) -> None:
        """What took its nonce is in this block."""
        self._sql.execute("update tx set block=?, block_hash=? where id=?", (block, block_hash, tx_id))

    def reopen(self, tx_id: int, void: bool, since: int) -> None:
        """It was final, and the chain lost its block: it is on its way again; or, `void`, must not be. It may be mined
        in any block from `since` on."""
        with self._transaction():
            self._sql.execute(
                "update tx set state='sent', reopened=1, void=max(void, ?), block=null, block_hash=null where id=?", (void, tx_id)
            )
            self._sql.execute("update attempt set head=min(head, ?) where tx=?", (since, tx_id))

    def avoid(self, tx_id: int) -> None:
        """It must not pay any more, since another one has."""
        self._sql.execute("update tx set void=1 where id=?", (tx_id,))

    def assure(self, tx_id: int) -> None:
        """A person said that it is to pay, or may have paid, whatever an older one paid."""
        self._sql.execute("update tx set sure=1 where id=?", (tx_id,))

    def finish(self, tx: TxRow, state: TransferState, reason: str = "", gas_used: int = 0, fee_wei: int = 0) -> None:
        """Final: the transaction and its batch together. A batch that was told to be paid is never told to have failed:
        it is queued again here, under its id. One that was told to have failed, and paid, says so when it is asked for."""
        with self._transaction():
            self._sql.execute("update tx set state=?, gas_used=?, fee_wei=? where id=?", (state, gas_used, str(fee_wei), tx.id))
            row = self.batch(tx.batch_id) if tx.batch_id else None
            ends = _batch_ends(tx, state, row.state) if row else None
            if ends is not None:
                self._sql.execute(
                    "update batch set state=?, reason=?, announced=announced*? where account=? and id=?",
                    (ends, reason, ends != TransferState.QUEUED, self.account, tx.batch_id),
                )
            if state == TransferState.CONFIRMED and self._is_own(tx.id):
                self._sql.execute("update tx set void=0 where id=?", (tx.id,))

    def _is_own(self, tx_id: int) -> bool:
        """Did it pay by itself, and not another transaction instead of it?"""
        sql = "select 1 from tx join attempt on attempt.tx=tx.id and attempt.hash=tx.winner where tx.id=? and not attempt.empty"
        return self._sql.execute(sql, (tx_id,)).fetchone() is not None

    def batch_paid(self, batch_id: str) -> None:
        """An earlier transaction of a queued batch has paid it after all."""
        sql = "update batch set state='confirmed', reason='', announced=1 where account=? and id=? and state='queued'"
        self._sql.execute(sql, (self.account, batch_id))

    # -- after a restore

    def held(self) -> str:
        """Why nothing may be signed, "" if it may: this file may not know of all payments that were made."""
        query = "select reason from hold where account in (?, '*') order by account desc limit 1"
        row = self._sql.execute(query, (self.account,)).fetchone()
        return str(row[0]) if row else ""

    def release(self) -> None:
        """It is known what was paid."""
        self._sql.execute("replace into hold values(?, '')", (self.account,))

    # -- what was seen

    def note(self, tx_id: int, teller: str, text: str, at: float) -> None:
        """Remember what is said of a transaction, when it is news. The oldest of a teller's are dropped."""
        last = self._sql.execute(
            "select text from seen where tx=? and teller=? order by id desc limit 1", (tx_id, teller)
        ).fetchone()
        if last is not None and last[0] == text:
            return
        with self._transaction():
            self._sql.execute("insert into seen(tx, teller, text, at) values(?,?,?,?)", (tx_id, teller, text, at))
            self._sql.execute(
                "delete from seen where tx=? and teller=?"
                " and id not in (select id from seen where tx=? and teller=? order by id desc limit ?)",
                (tx_id, teller, tx_id, teller, MAX_SEEN),
            )

    def seen(self, tx_id: int) -> list[Seen]:
        """Oldest first."""
        rows = self._sql.execute("select teller, text, at from seen where tx=? order by id", (tx_id,))
        return [Seen(*row) for row in rows]
