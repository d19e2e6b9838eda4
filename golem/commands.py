"""The node's side of the command line: `cli:<command>` calls of the bus, JSON in, JSON out.

Only processes of this machine that may open the bus (the user's own) reach these.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from actors.kernel.records import RowDamaged
from golem.backup import BackupError, write_backup
from golem.bus import BusPeer
from golem.chain.networks import DRIVER, Network
from golem.chain.rpc import RpcError
from golem.config import VERSION
from golem.identity import AppKey, IdentityError
from golem.net import NetError, RemoteError
from golem.outgoing import FileIdentity
from golem.registry import PushOrder, StoredImage, normal_hash, normal_tag
from protocol.types import amount_text, from_wei, node_id, timestamp_text

if TYPE_CHECKING:
    from golem.node import Node

Command = Callable[["Node", dict[str, Any]], Awaitable[Any]]
COMMANDS: dict[str, Command] = {}


def command(function: Command) -> Command:
    """Register `function` under its name."""
    COMMANDS[function.__name__] = function
    return function


def serve_commands(node: Node) -> None:
    """Answer the command line on the node's bus."""
    import golem.activity_commands  # they register their own
    import golem.market_commands
    import golem.payment_commands
    import golem.quarantine_commands  # noqa: F401

    def handler(run: Command) -> Callable[[BusPeer, bytes], Awaitable[bytes]]:
        async def answer(client: BusPeer, payload: bytes) -> bytes:
            try:
                return json.dumps(await run(node, json.loads(payload))).encode()
            except (BackupError, IdentityError, NetError, RpcError, RowDamaged, ValueError) as error:
                raise RemoteError(str(error)) from None
            except (sqlite3.Error, OSError) as error:  # a full disk, for one: no bug of ours
                raise RemoteError(f"the node could not do it: {error}") from None
            except LookupError as error:
                raise RemoteError(str(error.args[0] if error.args else error)) from None  # its text would be quoted

        return answer

    for name, run in COMMANDS.items():
        node.router.serve_local(f"cli:{name}", handler(run))


@command
async def status(node: Node, args: dict[str, Any]) -> Any:
    """What this node is and does."""
    from golem.quarantine_commands import waiting

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
    wanted = args.get("id")
    if wanted and wanted != node.name and node_id(wanted) != node.node_id:
        raise LookupError(f"this node has one identity, {node.node_id}; {wanted} is not it")
    return {"alias": node.name, "nodeId": node.node_id, "isLocked": False, "isDefault": True, "deleted": False,
            "encrypted": node.identity.encrypted}  # fmt: skip


def _app_key(key: AppKey) -> dict[str, Any]:
    return {"name": key.name, "key": key.key, "role": key.role, "identity": key.identity, "createdDate": key.created,
            "allowOrigins": list(key.allow_origins)}  # fmt: skip


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
    if found := node.app_keys.named(args["name"]):
        return _app_key(found)
    raise LookupError(f"no app-key named {args['name']!r}")


@command
async def app_key_drop(node: Node, args: dict[str, Any]) -> Any:
    """Forget an app-key."""
    node.app_keys.drop(args["name"])


# -- network
@command
async def net_status(node: Node, args: dict[str, Any]) -> Any:
    """Addresses, sessions and traffic."""
    sessions = node.network.sessions()
    mib_in, mib_out = (round(sum(one) / 2**20, 3) for one in zip(*((s.bytes_in, s.bytes_out) for s in sessions), strict=True)) \
        if sessions else (0.0, 0.0)  # fmt: skip
    uptime_s = max(time.time() - node.started_at, 1.0)
    addresses = node.network.addresses
    return {
        "nodeId": node.node_id, "listenAddress": addresses[0] if addresses else None, "publicAddress": None,
        "addresses": addresses, "sessions": len(sessions),
        "bandwidth": {"outKiBps": 0.0, "outAvgKiBps": round(mib_out * 1024 / uptime_s, 3), "outMib": mib_out,
                      "inKiBps": 0.0, "inAvgKiBps": round(mib_in * 1024 / uptime_s, 3), "inMib": mib_in},
    }  # fmt: skip


@command
async def net_sessions(node: Node, args: dict[str, Any]) -> Any:
    """Live sessions."""
    return [
        {"nodeId": one.node_id, "address": one.address, "type": one.type, "seen": timestamp_text(one.seen.timestamp()),
         "time": round(one.duration_s, 1), "ping": None if one.rtt_ms is None else round(one.rtt_ms, 3),
         "in": round(one.bytes_in / 2**20, 3), "out": round(one.bytes_out / 2**20, 3)}
        for one in node.network.sessions()
    ]  # fmt: skip


@command
async def net_ping(node: Node, args: dict[str, Any]) -> Any:
    """Round-trip times, of one peer or of all with a session."""
    from golem.market_commands import peers, whole_id

    targets = [node_id(whole_id(args["id"], peers(node)))] if args.get("id") else [one.node_id for one in node.network.sessions()]
    rows = []
    for target in targets:
        try:
            rows.append({"nodeId": target, "ping": round(await node.network.ping(target), 3), "error": None})
        except NetError as error:
            rows.append({"nodeId": target, "ping": None, "error": str(error)})
    return rows


@command
async def net_connect(node: Node, args: dict[str, Any]) -> Any:
    """Open a session with a node id or multiaddr."""
    from golem.market_commands import peers, whole_id

    return await node.network.connect(whole_id(args["target"], peers(node)))


@command
async def net_disconnect(node: Node, args: dict[str, Any]) -> Any:
    """Close the session with a node."""
    from golem.market_commands import peers, whole_id

    wanted = node_id(whole_id(args["id"], peers(node)))
    await node.network.disconnect(wanted)
    return wanted


# -- payments
@command
async def payment_accounts(node: Node, args: dict[str, Any]) -> Any:
    """Platforms this node can pay and be paid on."""
    return node.chain.accounts()


@command
async def payment_networks(node: Node, args: dict[str, Any]) -> Any:
    """Networks that this node serves, and their platforms."""
    return [
        {"driver": DRIVER, "network": row.name, "token": row.symbol, "platform": row.platform,
         "simulatedBy": row.simulated_by, "default": row.name == node.chain.default_network}
        for row in node.chain.networks
    ]  # fmt: skip


@command
async def payment_status(node: Node, args: dict[str, Any]) -> Any:
    """Balances and sums of one network."""
    network = node.chain.networks.by_name(args.get("network") or node.chain.default_network)
    totals = node.chain.totals(network.platform)
    purse, trouble = await _purse(node, network)
    head = await node.chain.head(network.name) if not trouble else None
    chain = {"chain": await node.chain.local_chain(), "chainUrl": node.chain.dev_url} if network.simulated_by and head else {}
    found = [problem for problem in node.chain.problems(network.name) if not _is_said(problem.detail, trouble)]
    problems = [f"{problem.kind}: {problem.detail}" for problem in found]
    if trouble and not any(problem.partition(": ")[2] in trouble for problem in problems):
        problems.append(f"RpcError: {trouble}")
    return {
        "amount": purse.pop("amount"), "reserved": totals["reserved"],
        "outgoing": totals["outgoing"], "incoming": totals["incoming"], "driver": DRIVER, "network": network.name,
        "token": network.symbol, "platform": network.platform, "simulatedBy": network.simulated_by, **chain,
        "gas": {"currency_short_name": network.coin, "currency_long_name": network.coin, "balance": purse.pop("gas")}, **purse,
        "block_number": head.number if head else None,
        "block_datetime": timestamp_text(head.timestamp) if head else None, "address": node.node_id, "problems": problems,
    }  # fmt: skip


def _is_said(detail: str, trouble: str) -> bool:
    """Is an endpoint's silence told by `trouble` already, which has more to say?"""
    _, silent, why = detail.partition(" has not answered ")
    return bool(silent) and why.partition(": ")[2] in trouble


@command
async def payment_resume(node: Node, args: dict[str, Any]) -> Any:
    """Sign payments again after a restore; returns whether any were held."""
    return node.chain.release(args.get("network") or node.chain.default_network)


async def _purse(node: Node, network: Network) -> tuple[dict[str, Any], str]:
    """Tokens and coins of the account as now or as last known, None where nobody knows; and why they are not of now."""
    try:
        held = await node.chain.held(network.name)
    except RpcError as error:
        return {"amount": None, "gas": None}, str(error)
    wei = {"amount": held.balances.token_wei, "gas": held.balances.gas_wei}
    as_of = {} if held.is_fresh else {"balance_datetime": timestamp_text(held.at)}
    return {name: amount_text(from_wei(value)) for name, value in wei.items()} | as_of, held.trouble


@command
async def payment_fund(node: Node, args: dict[str, Any]) -> Any:
    """Test coins and tokens for this node."""
    network = node.chain.networks.by_name(args.get("network") or node.chain.default_network)
    balances = await node.chain.fund(network.name)
    return {"network": network.name, "simulatedBy": network.simulated_by, "token": network.symbol, "coin": network.coin,
            "amount": amount_text(from_wei(balances.token_wei)), "gas": amount_text(from_wei(balances.gas_wei))}  # fmt: skip


@command
async def payment_init(node: Node, args: dict[str, Any]) -> Any:
    """Accounts need no registration here: every platform of the profile is ready. Unknown networks are refused."""
    network = node.chain.networks.by_name(args.get("network") or node.chain.default_network)
    return {"network": network.name, "platform": network.platform, "token": network.symbol, "simulatedBy": network.simulated_by}


# -- images
def _image(node: Node, image: StoredImage) -> dict[str, Any]:
    return {
        "sha3": image.sha3, "size": image.size, "format": image.format, "source": image.source, "tags": list(image.tags),
        "aliases": list(image.aliases), "created": timestamp_text(image.created), "url": image.url(node.node_id),
        "link": image.link(node.api_url), "registry": node.api_url,
    }  # fmt: skip


@command
async def image_store(node: Node, args: dict[str, Any]) -> Any:
    """Where images lie and how much room there is, in bytes. Names for an image to come are checked."""
    for tag in args.get("tags", ()):
        normal_tag(tag)
    for alias in args.get("aliases", ()):
        normal_hash(alias)
    return {"folder": str(node.registry.folder), "used": node.registry.total_bytes(), "limit": node.registry.max_bytes}


@command
async def image_push(node: Node, args: dict[str, Any]) -> Any:
    """Begin to take in a file; `image_progress` tells how it goes."""
    path = Path(args["path"])
    if not path.is_absolute():
        raise ValueError(f"not an absolute path: {path}")
    given = args.get("identity")
    identity = None if given is None else msgspec.convert(given, FileIdentity)
    order = PushOrder(path, tuple(args["tags"]), tuple(args["aliases"]), args["format"], args["source"], identity)
    node.registry.begin(order, args["push"])


@command
async def image_progress(node: Node, args: dict[str, Any]) -> Any:
    """How far a push is, in bytes, after a while; its image at the end."""
    push = node.registry.push(args["push"])
    with trio.move_on_after(min(args.get("wait_s", 0.0), 10.0)):
        await push.ended.wait()
    if push.failure:
        raise ValueError(push.failure)
    image = _image(node, push.image) if push.image else None
    return {"done": push.done_bytes, "total": push.total_bytes, "image": image}


@command
async def image_cancel(node: Node, args: dict[str, Any]) -> Any:
    """Give up a push; whether nothing of it stays."""
    return node.registry.cancel(args["push"])


@command
async def image_list(node: Node, args: dict[str, Any]) -> Any:
    """All images."""
    return [_image(node, image) for image in node.registry.images()]


@command
async def image_show(node: Node, args: dict[str, Any]) -> Any:
    """One image."""
    return _image(node, node.registry.named(args["name"]))


@command
async def image_remove(node: Node, args: dict[str, Any]) -> Any:
    """Remove a tag, or an image; the image as it was."""
    return _image(node, await node.registry.remove(args["name"]))
