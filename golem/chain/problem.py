"""The problems that payments wait for, as the payment status shows them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """Why payments wait. `kind` as in the payment status of the REST API; `needed_wei` of coins or tokens."""

    kind: str  # InsufficientGas InsufficientToken InvalidChainId CantSign TxStuck RpcError
    detail: str
    address: str
    needed_wei: int = 0
    chain_id: int = 0
    batch_id: str = ""  # whose alone it is
