"""Serves the commands of this package on the node's bus."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Awaitable, Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

import golem.control
from actors.kernel.machine import Busy
from actors.kernel.records import RowDamaged
from golem.bus.server import BusPeer
from golem.chain.rpc import RpcError
from golem.control.command import COMMANDS, Command
from golem.net import NetError, RemoteError
from golem.node.backup import BackupError
from golem.node.identity import IdentityError

if TYPE_CHECKING:
    from golem.node.node import Node


def serve_commands(served: Node) -> None:
    """Answer the command line on the node's bus."""
    for module in iter_modules(golem.control.__path__):  # they register their own
        import_module(f"golem.control.{module.name}")

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
