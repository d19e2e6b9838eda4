"""Serves the commands of this package on the node's bus."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from actors.kernel.machine import Busy
from actors.kernel.records import RowDamaged
from golem.bus.server import BusPeer
from golem.chain.rpc import RpcError
from golem.control import activity, debts, image, net, node, payment, quarantine  # noqa: F401 - they register
from golem.control.command import COMMANDS, Command
from golem.net import NetError, RemoteError
from golem.node.backup import BackupError
from golem.node.identity import IdentityError

if TYPE_CHECKING:
    from golem.node.node import Node


def serve_commands(served: Node) -> None:
    """Answer the command line on the node's bus."""
    import golem.control.activity  # they register their own
    import golem.control.debts
    import golem.control.market
    import golem.control.quarantine  # noqa: F401

    def handler(run: Command) -> Callable[[BusPeer, bytes], Awaitable[bytes]]:
        async def answer(client: BusPeer, payload: bytes) -> bytes:
            try:
                return json.dumps(await run(served, json.loads(payload))).encode()
            except (BackupError, IdentityError, NetError, RpcError, RowDamaged, ValueError) as error:
                raise RemoteError(str(error)) from None
            except (sqlite3.Error, OSError, Busy) as error:  # a full disk, for one: no bug of ours
                raise RemoteError(f"the node could not do it: {error}") from None
            except LookupError as error:
                raise RemoteError(str(error.args[0] if error.args else error)) from None  # its text would be quoted

        return answer

    for name, run in COMMANDS.items():
        served.router.serve_local(f"cli:{name}", handler(run))
