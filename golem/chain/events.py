"""What an engine tells: events of its batches, and the problems that payments wait for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sent:
    """Broadcast for the first time, or with a higher fee. Not final."""

    batch_id: str
    tx_hash: str


@dataclass(frozen=True, slots=True)
class Mined:
    """In a block, not final yet."""

    batch_id: str
    tx_hash: str
    block: int


@dataclass(frozen=True, slots=True)
class Confirmed:
    """Paid, final. `fee_wei` in the network's coin."""

    batch_id: str
    tx_hash: str
    block: int
    gas_used: int
    fee_wei: int


@dataclass(frozen=True, slots=True)
class Failed:
    """Final: the transaction was mined and reverted, or none can be made. Nothing was paid.

    `refused`: the payees whose fault it is, where that is known.
    """

    batch_id: str
    reason: str
    refused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NonceLost:
    """Final: another transaction of this account took the nonce. Nothing was paid."""

    batch_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Stuck:
    """Waiting, and for what. The engine goes on by itself when the cause is gone."""

    batch_id: str
    reason: str


Event = Sent | Mined | Confirmed | Failed | NonceLost | Stuck


@dataclass(frozen=True, slots=True)
class Problem:
    """Why payments wait. `kind` as in the payment status of the REST API; `needed_wei` of coins or tokens."""

    kind: str  # InsufficientGas InsufficientToken InvalidChainId CantSign TxStuck RpcError
    detail: str
    address: str
    needed_wei: int = 0
    chain_id: int = 0
    batch_id: str = ""  # whose alone it is
