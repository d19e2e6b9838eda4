"""The node's side of `golem status`, `backup`, `id` and `app-key`."""

from __future__ import annotations

import base64
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from golem.config import VERSION
from golem.control.command import command
from golem.node.app_keys import AppKey
from golem.node.backup import write_backup
from golem.node.identity import IdentityError
from protocol.types import node_id

if TYPE_CHECKING:
    from golem.node.node import Node


@command
async def status(node: Node, args: dict[str, Any]) -> Any:
    """What this node is and does."""
    from golem.control.quarantine import waiting

    chain: dict[str, Any] = {}
    if node.config.profile == "local":
        own = None if node.config.chain_url else str(node.config.chain_dir)
        chain = {"chainUrl": node.chain.dev_url, "chainDir": own}
    return {
        "nodeId": node.node_id, "apiUrl": node.api_url, "profile": node.config.profile, **chain,
        "dataDir": str(node.config.data_dir),
        "version": VERSION, "uptime_s": round(time.time() - node.started_at, 1), "sessions": len(node.network.sessions()),
        "problem": node.health_problem() or node.chain.silence(), **waiting(node),
    }  # fmt: skip


@command
async def backup(node: Node, args: dict[str, Any]) -> Any:
    """Write a backup while the node runs."""
    path = Path(args["path"])
    async with node.system.journal.stopped():
        return await trio.to_thread.run_sync(write_backup, node.config.data_dir, path, node.node_id)


@command
async def shutdown(node: Node, args: dict[str, Any]) -> Any:
    """Stop the node."""
    node.stopping.set()
    return None


@command
async def rest_access(node: Node, args: dict[str, Any]) -> Any:
    """REST address and key for commands that use the API like any agent."""
    return {"url": node.api_url, "key": node.app_keys.open_session(node.node_id).key}


# -- identity and app-keys
@command
async def id_show(node: Node, args: dict[str, Any]) -> Any:
    """The node's identity."""
    _own(node, args.get("id"))
    return {"alias": node.name, "nodeId": node.node_id, "isLocked": False, "isDefault": True, "deleted": False,
            "encrypted": node.identity.encrypted}  # fmt: skip


def _app_key(key: AppKey) -> dict[str, Any]:
    return {"name": key.name, "key": key.key, "role": key.role, "identity": key.identity, "createdDate": key.created,
            "allowOrigins": list(key.allow_origins)}  # fmt: skip


def _own(node: Node, given: str | None) -> None:
    """Raise `LookupError` where `given` names another identity than the node's."""
    if given and given != node.name and node_id(given) != node.node_id:
        raise LookupError(f"this node has one identity, {node.node_id}; {given} is not it")


@command
async def id_public_key(node: Node, args: dict[str, Any]) -> Any:
    """The public key, in hex."""
    _own(node, args.get("id"))
    return node.identity.public_key.hex()


@command
async def id_sign(node: Node, args: dict[str, Any]) -> Any:
    """Sign a message of a person (EIP-191); the signature in hex."""
    _own(node, args.get("id"))
    message = base64.b64decode(args["message"], validate=True)
    return (await trio.to_thread.run_sync(node.identity.sign_message, message)).hex()


@command
async def app_key_create(node: Node, args: dict[str, Any]) -> Any:
    """Make an app-key, or return the one of this name."""
    identity = node_id(args["id"]) if args.get("id") else node.node_id
    if identity != node.node_id:
        raise IdentityError(f"this node has one identity, {node.node_id}")
    return _app_key(node.app_keys.create(args["name"], identity, allow_origins=tuple(args.get("allow_origins", ()))))


@command
async def app_key_list(node: Node, args: dict[str, Any]) -> Any:
    """All app-keys."""
    return [_app_key(key) for key in node.app_keys.all()]


@command
async def app_key_show(node: Node, args: dict[str, Any]) -> Any:
    """One app-key."""
    _own(node, args.get("id"))
    if found := node.app_keys.named(args["name"]):
        return _app_key(found)
    raise LookupError(f"no app-key named {args['name']!r}")


@command
async def app_key_drop(node: Node, args: dict[str, Any]) -> Any:
    """Forget an app-key."""
    _own(node, args.get("id"))
    node.app_keys.drop(args["name"])
