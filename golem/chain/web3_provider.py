"""AsyncWeb3 under Trio: a provider whose input and output is `rpc.Pool`. Imported late, by `rpc.Rpc.web3` alone."""

from __future__ import annotations

from typing import Any

from web3 import AsyncWeb3
from web3.exceptions import BlockNotFound, TransactionNotFound, Web3Exception
from web3.middleware import ExtraDataToPOAMiddleware
from web3.providers.async_base import AsyncJSONBaseProvider
from web3.types import RPCEndpoint, RPCResponse

from golem.chain.rpc import Pool, RpcError

__all__ = ["PoolProvider", "Web3Exception", "make_web3"]


class PoolProvider(AsyncJSONBaseProvider):
    """Errors pass through AsyncWeb3 as the pool's own `RpcError`."""

    global_ccip_read_enabled = False  # it would fetch by aiohttp, and on a contract's command

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool

    async def make_request(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        return {"jsonrpc": "2.0", "id": 1, "result": await self.pool.call(method, params)}

    async def is_connected(self, show_traceback: bool = False) -> bool:
        try:
            await self.pool.call("web3_clientVersion")
        except RpcError:
            return False
        return True


def make_web3(pool: Pool) -> AsyncWeb3[PoolProvider]:
    """An AsyncWeb3 whose attribute `golem_not_found` holds the exceptions for what a node does not know."""
    web3 = AsyncWeb3(PoolProvider(pool))
    web3.middleware_onion.inject(ExtraDataToPOAMiddleware, layer=0)  # Polygon's blocks carry long extra data
    web3.golem_not_found = (BlockNotFound, TransactionNotFound)  # type: ignore[attr-defined]
    return web3
