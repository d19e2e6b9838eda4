"""Test money: coins from the dev chain's faucet or whoever sends some, tokens from the contract that mints them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from golem.chain import token
from golem.chain.draft import Wait
from golem.chain.evidence import Unclear
from golem.chain.rows import TransferState, TxKind
from golem.chain.rpc import RpcError

if TYPE_CHECKING:
    from golem.chain.engine import Engine

FUND_S = 120.0


class FundError(RpcError):
    """Test money could not be had, and why."""


async def fund(engine: Engine) -> token.Balances:
    """Get test coins and tokens; what the account holds then. The engine must be running. FundError."""
    network, rpc, address = engine.network, engine.rpc, engine.address
    if not network.is_test or network.mint is None:
        wanted = f"send {network.coin} and {network.symbol} to {address}"
        raise FundError(f"there is no faucet for {network.name}: {wanted}")
    try:
        if network.dev_faucet:
            await rpc.dev("dev_faucet", address)
        with trio.move_on_after(FUND_S):
            while not await rpc.balance(address):
                await trio.sleep(network.poll_s)
        await _mint(engine, network.mint)
        return await token.balances(rpc, network, address)
    except RpcError as error:
        raise FundError(f"{network.name}: {error}") from error


async def _mint(engine: Engine, contract: str) -> None:
    try:
        tx_id = await engine.send_call(TxKind.MINT, contract, token.CREATE)
    except (Wait, Unclear) as wait:
        if "Cannot acquire more funds" in str(wait):
            return  # it holds plenty
        raise FundError(f"no test tokens: {wait}") from wait
    with trio.move_on_after(FUND_S):
        while (tx := engine.store.tx(tx_id)).state in (TransferState.SIGNED, TransferState.SENT):
            await trio.sleep(engine.network.poll_s / 3)
        if tx.state in (TransferState.MINED, TransferState.CONFIRMED):
            return
        raise FundError(f"create() did not succeed: {tx.state}")
    raise FundError(f"create() was not mined within {FUND_S:.0f} s")
