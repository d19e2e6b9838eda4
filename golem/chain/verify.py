"""The payee's side: does this transaction really pay what is claimed of it? Nothing that the payer says is trusted.

The answer is asked of our own RPCs: chain id (checked by the pool), success, a canonical block deep enough, and the sum
of the token's own Transfer logs from payer to payee, less what the same transaction has settled before. Its block is not
older than what is paid: money that moved before an agreement was made was for something else. A receipt under any
of them counts; that one of them knows of none proves nothing, and RPCs that contradict one another are asked again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from golem.chain.contracts import TRANSFER_TOPIC
from golem.chain.evidence import Evidence, Unclear
from golem.chain.networks import Network
from golem.chain.rpc import Receipt, Rpc, RpcError
from golem.chain.signer import address_bytes

_HASH = re.compile(r"0x[0-9a-fA-F]{64}\Z")


@dataclass(frozen=True, slots=True)
class Verified:
    """Paid and final. `transferred_wei`: all that the transaction moves from payer to payee; and the block that holds it."""

    transferred_wei: int
    block: int = field(default=0, compare=False)
    block_hash: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class NotYet:
    """Cannot be said now: not mined, not deep enough, or the node does not answer. Ask again.

    `unknown`: all our RPCs answer and have never heard of the transaction, which for an honest claim passes soon.
    """

    reason: str
    unknown: bool = False


@dataclass(frozen=True, slots=True)
class Rejected:
    """Final: the claim is false."""

    reason: str


async def verify_transfer(
    rpc: Rpc,
    network: Network,
    tx_hash: str,
    payer: str,
    payee: str,
    amount_wei: int,
    already_claimed_wei: int = 0,
    not_before: float = 0.0,
) -> Verified | NotYet | Rejected:
    """Does `tx_hash` pay `payee` at least `amount_wei` beyond `already_claimed_wei`, in no older block? Never raises."""
    if not _HASH.match(tx_hash):
        return Rejected(f"not a transaction hash: {tx_hash[:80]!r}")
    try:
        address_bytes(payer), address_bytes(payee)
    except ValueError as error:
        return Rejected(str(error))
    if amount_wei <= 0 or already_claimed_wei < 0:
        return Rejected(f"amount out of range: {amount_wei} wei, {already_claimed_wei} claimed before")
    try:
        return await _verify(rpc, network, tx_hash, payer, payee, amount_wei, already_claimed_wei, not_before)
    except RpcError as error:
        return NotYet(f"{network.name}: {error}")


async def _verify(
    rpc: Rpc,
    network: Network,
    tx_hash: str,
    payer: str,
    payee: str,
    amount_wei: int,
    already_claimed_wei: int,
    not_before: float,
) -> Verified | NotYet | Rejected:
    evidence = Evidence(rpc, network, payer, lambda tx_hash: True)
    shown = await evidence.receipts(await evidence.views(), [tx_hash])
    if not shown:
        return await _missing(evidence, network, tx_hash)
    try:
        found = await evidence.final(shown)
    except Unclear as unclear:
        return NotYet(str(unclear))
    final, times = [receipt for (_, receipt), _ in found], {seconds for _, seconds in found}
    if not final:
        depth = max(view.head.number - receipt.block for view, receipt in shown)
        if depth < network.depth:
            return NotYet(f"{max(depth, 0)} of {network.depth} confirmations")
        return NotYet("its block is not on the canonical chain")
    try:
        await evidence.agreed(final[0].block, final[0].block_hash)
    except Unclear as unclear:
        return NotYet(f"RPCs contradict one another: {unclear}")
    if len(times) > 1:
        return NotYet(f"RPCs contradict one another: block {final[0].block} is of {' or of '.join(map(str, sorted(times)))}")
    if max(times) < not_before:
        return Rejected(
            f"transaction {tx_hash} is older than what it is to pay: its block is of {when(max(times))}, "
            f"and the money may have moved since {when(not_before)}"
        )
    # only now is the outcome final: a reorganisation may turn failure into success and the reverse
    if not any(receipt.succeeded for receipt in final):
        return Rejected(f"transaction {tx_hash} was reverted")
    moved = max(transferred(receipt, network, payer, payee) for receipt in final if receipt.succeeded)
    if moved == 0:
        return Rejected(f"transaction {tx_hash} moves no {network.symbol} from {payer} to {payee}")
    if moved - already_claimed_wei < amount_wei:
        return Rejected(
            f"transaction {tx_hash} moves {moved} wei, {already_claimed_wei} of it settled before: "
            f"less than the {amount_wei} claimed"
        )
    return Verified(moved, final[0].block, final[0].block_hash)


def when(seconds: float) -> str:
    """A time of the epoch in words."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


async def _missing(evidence: Evidence, network: Network, tx_hash: str) -> NotYet:
    """No RPC shows a receipt. Only where all of them answer, and none has heard of it, is it unknown."""
    answers, silent = await evidence.each(evidence.witnesses(), lambda witness: witness.knows(tx_hash))
    if any(known for _, known in answers):
        return NotYet(f"transaction {tx_hash} is not in a block yet")
    if silent:
        names = ", ".join(witness.name for witness, _ in silent)
        return NotYet(f"transaction {tx_hash} is not known on {network.name}, and {names} does not answer")
    return NotYet(f"transaction {tx_hash} is not known on {network.name} (yet)", unknown=True)


def shortfall(receipt: Receipt, network: Network, payer: str, payees: Iterable[tuple[str, int]]) -> str:
    """Say what a payment that succeeded has not moved, by its logs; "" if it moved all."""
    due: dict[str, int] = {}
    for payee, amount_wei in payees:
        due[payee] = due.get(payee, 0) + amount_wei
    for payee, amount_wei in due.items():
        moved = transferred(receipt, network, payer, payee)
        if moved < amount_wei:
            return f"{receipt.hash} succeeded, and its logs move {moved} of {amount_wei} wei to {payee}"
    return ""


def transferred(receipt: Receipt, network: Network, payer: str, payee: str) -> int:
    """Tokens in wei that a transaction moves from payer to payee: the sum over its logs.

    A multi-transfer's direct call logs the true payer. Its indirect call logs the contract as sender: that counts when
    the payer itself called the known contract, which passes on nothing but what its caller gave.
    """
    senders = {payer.lower()}
    multi = (network.multi_transfer or "").lower()
    if multi and receipt.to == multi and receipt.sender == payer.lower():
        senders.add(multi)
    moved = 0
    for log in receipt.logs:
        if log.address != network.token.lower() or len(log.topics) != 3 or log.topics[0] != TRANSFER_TOPIC:
            continue  # another contract may emit the same event
        sender, receiver = ("0x" + topic[-40:] for topic in log.topics[1:])
        if sender in senders and receiver == payee.lower() and len(log.data) == 32:
            moved += int.from_bytes(log.data, "big")
    return moved
