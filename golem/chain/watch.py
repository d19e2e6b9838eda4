"""Is the money that this node was paid still there? Verified payments are looked at again while a chain may lose their blocks.

A reorganisation deeper than `depth` undoes what both sides call SETTLED. The payer's node sends it again, byte for byte
(`golem.chain.lost`), if it runs and if it is honest; so the payee's node says what is gone, who owes it and what to do, until
it is paid again or a person has taken note. It concludes nothing: books stay as they are.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from golem.chain.claims import Claim, checksum, claim_of, texts
from golem.chain.engine import PATIENT_LOOKS, WATCH_BLOCKS, WATCH_S
from golem.chain.evidence import Evidence, View, newest
from golem.chain.networks import Network, Networks
from golem.chain.problem import Problem
from golem.chain.rpc import Rpc, RpcError
from golem.chain.schema import OwnDisk, connect
from golem.chain.verify import NotYet, Rejected, Verified, verify_transfer, when
from protocol.types import amount_text, from_wei

log = logging.getLogger("golem.chain")

COLUMNS = "id, platform, tx_hash, payer, payee, amount_wei, claimed_wei, created, not_before, block, block_hash, lost_at, trouble"
FEW = 50  # blocks asked for in one look
KEPT = 50  # of those that are deep, the newest of each platform: what a look after the next start begins with
TOLD = 20  # lost payments named one by one


@dataclass(frozen=True, slots=True)
class Received:
    """A payment that was verified in a block. `lost_at`, in seconds of the epoch: since when the chain has it no more."""

    claim: Claim
    block: int
    block_hash: str
    lost_at: float | None = None
    trouble: str = ""  # what the chain says of it since


class Vigil:
    """Looks at the payments that were verified; rows in the file of the claims."""

    def __init__(self, path: Path | str, clock: Callable[[], float]) -> None:
        self._sql, self._clock = connect(path), clock
        self.disk = OwnDisk("watching payments to this node")
        self._looks: dict[str, int] = {}  # payment -> looks in a row at which its block was gone
        self._looked: dict[str, int] = {}  # payment -> number of the last look at it: those that waited longest come first
        self._count = 0
        self._wake = trio.Event()

    def close(self) -> None:
        self._sql.close()

    # -- rows

    def add(self, claim: Claim, found: Verified) -> None:
        """A payment was verified: watch it from now on."""
        self._put(Received(claim, found.block, found.block_hash))
        self._wake.set()

    def forget(self, payment_id: str) -> Received | None:
        """A person knows that it is lost. None when it is not."""
        held = next((row for row in self.lost() if row.claim.claim_id == payment_id), None)
        if held is not None:
            self._sql.execute("delete from verified where id=?", (payment_id,))
        return held

    def lost(self, platform: str = "") -> list[Received]:
        """What the chain has lost, oldest first; of one platform or of all."""
        rows = self._rows("lost_at is not null order by lost_at, id")
        return [row for row in rows if platform in ("", row.claim.platform)]

    def problems(self, network: Network) -> list[Problem]:
        """What is lost on a network, who owes it, and what to do."""
        rows = self.lost(network.platform)
        found = [Problem("TxStuck", _words(row, network), row.claim.payee, batch_id=row.claim.claim_id) for row in rows[:TOLD]]
        if len(rows) > TOLD:
            found.append(Problem("TxStuck", f"{len(rows) - TOLD} more payments like these are lost", rows[0].claim.payee))
        return found

    def words(self, row: Received, network: Network) -> str:
        """What is lost, who owes it, and what to do."""
        return _words(row, network)

    # -- looks

    async def run(self, networks: Networks, rpcs: Mapping[str, Rpc]) -> None:
        """Look until cancelled: now, and every `WATCH_S` while something is young or lost, however many payments come."""
        while True:
            try:
                is_calm = await self._look_at_all(networks, rpcs)
            except (sqlite3.Error, OSError) as error:
                await self.disk.wait(error)
                continue
            self.disk.well()
            if is_calm:
                await self._wake.wait()
            await trio.sleep(WATCH_S)

    async def _look_at_all(self, networks: Networks, rpcs: Mapping[str, Rpc]) -> bool:
        """Look once at every network; return whether nothing is young or lost."""
        for platform in sorted({row.claim.platform for row in self._rows()} & set(networks.platforms)):
            row = networks.by_platform(platform)
            try:
                await self.look(row, rpcs[row.chain])
            except RpcError as error:
                log.info("%s: whether payments are still there cannot be seen: %s", row.name, error)
        self._wake = trio.Event()
        return not self._rows("deep=0")

    async def look(self, network: Network, rpc: Rpc) -> None:
        """One look at the payments of a network: all that are lost, those that are young, the newest of the others."""
        if network.dev_faucet:
            self._mind_genesis(network, await rpc.genesis_hash())
        rows = self._rows("platform=? and deep=0 order by block desc", network.platform)
        rows += self._rows("platform=? and deep=1 order by block desc limit 1", network.platform)
        rows.sort(key=lambda row: (row.lost_at is None, self._looked.get(row.claim.claim_id, 0)))
        evidence = Evidence(rpc, network, network.token, lambda tx_hash: True)
        views = await evidence.views()
        seen: dict[tuple[int, str], bool | None] = {}
        for row in rows:
            if (row.block, row.block_hash) not in seen and len(seen) == FEW:
                continue
            self._looked[row.claim.claim_id] = self._count = self._count + 1
            key = row.block, row.block_hash
            if key not in seen:
                seen[key] = await _is_there(evidence, views, *key)
            await self._judge(row, seen[key], newest(views).number, network, rpc)

    async def _judge(self, row: Received, is_there: bool | None, head: int, network: Network, rpc: Rpc) -> None:
        payment_id = row.claim.claim_id
        if is_there and row.lost_at is None:
            self._looks.pop(payment_id, None)
            if head - row.block >= max(WATCH_BLOCKS, network.repeat_depth):
                self._rest(row)
            return
        if row.lost_at is None:
            self._looks[payment_id] = self._looks.get(payment_id, 0) + (is_there is False)
            if self._looks[payment_id] < PATIENT_LOOKS:
                return
        found = await _verified(row.claim, network, rpc)
        if isinstance(found, Verified):
            self._put(replace(row, block=found.block, block_hash=found.block_hash, lost_at=None, trouble=""))
            if row.lost_at is not None:
                log.warning("%s is there again, in block %d", _money(row, network), found.block)
        elif row.lost_at is None or row.trouble != found.reason:
            self._put(replace(row, lost_at=row.lost_at or self._clock(), trouble=found.reason))
            if row.lost_at is None:
                log.error("%s", _words(replace(row, lost_at=self._clock(), trouble=found.reason), network))
                self._sql.execute("update verified set deep=0 where platform=?", (row.claim.platform,))  # and those before it?

    def _mind_genesis(self, network: Network, genesis: str) -> None:
        """What was paid on a dev chain that was made anew is gone with it, and nobody is to mind."""
        self._sql.execute("update verified set genesis=? where platform=? and genesis=''", (genesis, network.platform))
        self._sql.execute("delete from verified where platform=? and genesis<>?", (network.platform, genesis))

    # -- rows

    def _rest(self, row: Received) -> None:
        """It is deep: it is looked at no more, unless one after it is lost."""
        platform = row.claim.platform
        self._sql.execute("update verified set deep=1 where id=?", (row.claim.claim_id,))
        self._sql.execute(
            "delete from verified where platform=? and deep=1 and id not in"
            " (select id from verified where platform=? and deep=1 order by block desc limit ?)", (platform, platform, KEPT),
        )  # fmt: skip

    def _put(self, row: Received) -> None:
        values = (*texts(row.claim), row.block, row.block_hash, row.lost_at, row.trouble)
        self._sql.execute(
            f"insert or replace into verified({COLUMNS}, checksum) values({','.join('?' * (len(values) + 1))})",
            (*values, checksum(values)),
        )

    def _rows(self, where: str = "1", *values: object) -> list[Received]:
        """One that does not fit its checksum is dropped: nothing hangs on it but that its loss is noticed."""
        found = []
        for *row, check in self._sql.execute(f"select {COLUMNS}, checksum from verified where {where}", values).fetchall():
            if checksum(row) == check:
                found.append(Received(claim_of(row[:9]), *row[9:]))
            else:
                log.error("a verified payment in chain.db is damaged (%s); its block is not watched any more", str(row[0])[:80])
                self._sql.execute("delete from verified where id=?", (row[0],))
        return found


async def _is_there(evidence: Evidence, views: Sequence[View], block: int, block_hash: str) -> bool | None:
    """Does an RPC have this block? None where they do not say; False where they have another one, or fewer blocks."""
    answers, _ = await evidence.each([view.witness for view in views], lambda witness: witness.block_hash(block))
    hashes = {seen for _, seen in answers if seen is not None}
    if block_hash in hashes:
        return True
    return False if hashes or (answers and newest(views).number < block) else None


async def _verified(claim: Claim, network: Network, rpc: Rpc) -> Verified | NotYet | Rejected:
    c = claim
    return await verify_transfer(
        rpc, network, c.tx_hash, c.payer, c.payee, c.amount_wei, c.claimed_wei, c.not_before
    )  # fmt: skip


def _money(row: Received, network: Network) -> str:
    claim = row.claim
    amount = f"{amount_text(from_wei(claim.amount_wei))} {network.symbol}"
    return f"payment {claim.claim_id} of {amount} from {claim.payer}, transaction {claim.tx_hash} on {network.name}"


def _words(row: Received, network: Network) -> str:
    text = f"{_money(row, network)}, was verified in block {row.block}, and the chain has lost that block ({row.trouble}); seen "
    text += f"{when(row.lost_at or 0.0)}. Its documents stay SETTLED meanwhile. The payer's node sends it again by itself, and "
    text += "this goes when it is there. If it lasts, ask the payer: until then this is owed to you. "
    return text + f"`golem payment decide {row.claim.claim_id} --unpaid` says that you know, and it is not named any more"
