"""The node: the wiring of one daemon, and no logic. Read it to see what there is and who talks to whom.

Order of starting: lock, identity, journal, bus, actors, REST; the network and the chain come up behind it, so that agents
are answered within a second. Order of stopping: REST, five seconds of grace, everything else; a crash needs no order.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import random
import secrets
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any

import trio

from actors.activity.machine import Activity
from actors.creations import Creations
from actors.kernel.clock import Steady
from actors.kernel.grammar import EDGE
from actors.kernel.journal import Journal
from actors.kernel.machine import JournalWaits, Send
from actors.kernel.system import System
from actors.ledger.machine import Ledger
from actors.market.machine import Market
from actors.negotiation.machine import Negotiation
from actors.wallet.machine import Wallet
from golem.base import open_files
from golem.base.boot import boot_id, boot_time
from golem.base.clock import watch_clock
from golem.bus.router import Router
from golem.bus.server import Bus
from golem.chain.cycles import cycles_of
from golem.chain.port import open_chain
from golem.config import Config, ConfigError
from golem.control.serve import serve_commands
from golem.files.server import FileServer
from golem.images.store import IMAGES, Registry
from golem.net import NetConfig, check_network, open_network
from golem.node.app_keys import AUTOCONF, AppKeys
from golem.node.backup import (
    CHAIN,
    DATABASES,
    JOURNAL,
    BackupError,
    bind_generations,
    compare_generations,
    hold_payments,
    peers_asked,
    refuse_half,
    restored_at,
)
from golem.node.data_dir import lock_data_dir, make_folder, step_log
from golem.node.gossip import MarketGossip
from golem.node.identity import APP_KEYS, KEYSTORE, PLAIN_KEY, AskPassword, Identity, open_identity
from golem.node.integrity import check_databases
from golem.node.listen import bind_api, notify_systemd
from golem.node.metrics import Metrics
from golem.node.nearness import serve_nearness
from golem.node.node import Node
from golem.node.owner import settle_journal
from golem.node.payout import GIVEN_KEY, OLD_KEY, read_payout, warn
from golem.node.reserve import Reserve
from golem.node.signer import SignerPort
from golem.private_files import write_private
from protocol.ledger import Recall
from protocol.wallet import ResumePayments

log = logging.getLogger("golem.node")

GRACE_S = 5.0
DAY_S = 86400.0


@asynccontextmanager
async def open_node(config: Config, ask: AskPassword | None = None, meet: trio.Event | None = None) -> AsyncIterator[Node]:
    """Run all of a node but REST (`serve_rest`) for the length of the block. It meets peers once `meet`, if given, is set.

    Raises `ConfigError`, `IdentityError`, `JournalError`.
    """
    async with AsyncExitStack() as stack:
        take_data_dir(config, stack)
        net_config = network_of(config)
        await trio.to_thread.run_sync(check_databases, config.data_dir, DATABASES)
        known_key = key_before(config)
        identity = await trio.to_thread.run_sync(open_identity, config, ask)
        try:
            payout = read_payout(config.data_dir)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        app_keys = open_app_keys(config, identity)
        await trio.to_thread.run_sync(settle_journal, config.data_dir, identity.node_id)
        older = compare_generations(config.data_dir)
        new_journal = "" if (config.data_dir / "node.db").exists() else known_key
        journal, reserve = open_journal(config, stack)
        try:
            network = await stack.enter_async_context(open_network(identity.secret(), net_config, meet))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        bus = Bus(config.bus_path, identity.node_id, config.units_path)
        router = Router(identity.node_id, network, bus)
        gossip = MarketGossip(network)
        metrics = Metrics(journal)
        system = System(
            identity.node_id, journal, router, clock=time.time, steady=Steady(boot_time, boot_id()),
            new_trace=lambda: secrets.token_hex(6), jitter=partial(random.uniform, 0.8, 1.2), publish=gossip.publish,
            origin=network.origin, step_log=step_log(config.data_dir), observe=metrics.step,
        )  # fmt: skip
        for machine in (Market, Negotiation, Ledger, Creations):
            system.add(machine(identity.node_id))
        system.add(Activity(identity.node_id, config.unresponsive_s, config.inactivity_s))
        try:
            if older == CHAIN:
                hold_payments(config.data_dir, "chain.db is older than node.db, or was lost")
            chain = await stack.enter_async_context(open_chain(config, identity, system))
            bind_generations(config.data_dir, journal.boot, identity.node_id)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        least = format(config.least_payment_glm, ".18f")
        system.add(Wallet(identity.node_id, cycles_of(config, chain), minimum=least, payees=chain.batch_sizes()))
        system.add_port(SignerPort(identity.node_id, identity.sign))
        files = FileServer(router, identity.derived("names of published files"))
        registry = await trio.to_thread.run_sync(open_registry, config, files)
        node = Node(config, identity, app_keys, router, system, network, bus, chain, files, registry, metrics)
        node.payout = payout
        for said in warn(payout, identity.node_id, system.listed("market", "offer/")[0], new_journal):
            log.warning("%s", said)
        serve_commands(node)
        serve_nearness(node)
        nursery = await stack.enter_async_context(trio.open_nursery())
        await nursery.start(bus.run)
        await nursery.start(system.run)
        await system.post(EDGE, [Send("wallet", ResumePayments())])
        await come_back(system, config, older)
        await nursery.start(registry.run)
        nursery.start_soon(forget_events, system, config)
        nursery.start_soon(reserve.keep, journal)
        nursery.start_soon(watch_clock, system)
        nursery.start_soon(node.services.run, node.stopping)
        router.attach(system.deliver)
        gossip.attach(system)
        nursery.start_soon(gossip.run)
        network.on_peer(gossip.peer)
        yield node
        nursery.cancel_scope.cancel()


def network_of(config: Config) -> NetConfig:
    """Return the network's part of the settings. Raises `ConfigError`."""
    net_config = NetConfig(data_dir=config.data_dir, listen=config.listen, bootstrap=config.bootstrap, mdns=config.mdns,
                           network_name=config.network_name)  # fmt: skip
    try:
        check_network(net_config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return net_config


def key_before(config: Config) -> str:
    """Return the words for a key that was there before this start, "" for one that it makes."""
    stored = any((config.data_dir / name).exists() for name in (KEYSTORE, PLAIN_KEY))
    return GIVEN_KEY if config.autoconf_id_secret else OLD_KEY if stored else ""


def open_app_keys(config: Config, identity: Identity) -> AppKeys:
    """Return the app-keys, among them that of `YAGNA_AUTOCONF_APPKEY` for as long as it is given."""
    app_keys = AppKeys(config.data_dir / APP_KEYS)
    if config.autoconf_app_key:
        app_keys.drop_foreign(AUTOCONF, identity.node_id)
        app_keys.create(AUTOCONF, identity.node_id, key=config.autoconf_app_key)
    elif app_keys.named(AUTOCONF) is not None:
        app_keys.drop(AUTOCONF)
    return app_keys


def take_data_dir(config: Config, stack: AsyncExitStack) -> None:
    """Hold the lock of the data directory until the stack unwinds; no half of a restore is started on. Raises `ConfigError`."""
    lock_data_dir(config.data_dir, stack)
    try:
        refuse_half(config.data_dir)
    except BackupError as error:
        raise ConfigError(str(error)) from None
    if config.profile == "local" and not config.chain_url:
        make_folder(config.chain_dir, "chain")


def open_journal(config: Config, stack: AsyncExitStack) -> tuple[Journal, Reserve]:
    """Open the journal until the stack unwinds, and the reserve for when its disk is full. Raises `JournalError`."""
    reserve = Reserve(config.data_dir)
    journal = Journal(str(config.data_dir / "node.db"), lambda: secrets.token_hex(8))
    stack.callback(journal.close)
    journal.outlast()
    journal.make_room = reserve.spend
    return journal, reserve


async def come_back(system: System, config: Config, older: str) -> None:
    """After a restore: ask the peers what was signed since. `older` names the file that is older than the other."""
    if older:
        log.error("%s was put back without the other file of the node: what it forgot is asked of peers and chain", older)
    if at := restored_at(config.data_dir):
        log.warning("restored from a backup of %s: peers are asked what was signed since", at)
    if at or older == JOURNAL:
        await system.ask("ledger", Recall())
        peers_asked(config.data_dir)


async def forget_events(system: System, config: Config) -> None:
    """Delete old events from the feeds, forget silent links, give the room back, now and again and again.

    Rows have timers of their own, events and links have not.
    """
    while True:
        with suppress(JournalWaits):  # on a disk that takes nothing: it is done the next time
            deleted = await system.journal.prune(system.now() - config.event_store_days * DAY_S)
            if deleted:
                log.info("deleted %d events older than %g days", deleted, config.event_store_days)
            await system.forget_links()
            await system.journal.give_back()
        await trio.sleep(config.cleanup_interval_s)


def open_registry(config: Config, files: FileServer) -> Registry:
    """Return the node's store of images. Raises `ConfigError`."""
    folder = config.data_dir / IMAGES
    try:
        return Registry(folder, files, time.time, int(config.images_max_gib * 2**30))
    except OSError as error:
        raise ConfigError(f"cannot use the images in {folder}: {error.strerror or error}") from None


async def serve_rest(node: Node, sock: socket.socket, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
    """Serve the REST API on a listening socket until the node stops, then end open requests within the grace."""
    import hypercorn.trio

    from golem.rest.app import create_app
    from golem.rest.server import server_settings

    settings = server_settings(GRACE_S, node.config.max_rest_timeout_s, open_files.for_strangers())
    host, port = sock.getsockname()[:2]
    node.api_url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    settings.bind = [f"fd://{sock.detach()}"]  # the server closes it
    app = create_app(node)
    task_status.started()
    await hypercorn.trio.serve(app, settings, shutdown_trigger=node.stopping.wait)


async def run_node(config: Config, ask_password: AskPassword | None = None, ready: Any = None) -> None:
    """Run a whole node until `SIGTERM` or `SIGINT`. `ready(node)` is called when REST answers."""
    import signal

    open_files.raise_limit()
    os.umask(0o077)  # what a node writes is its user's alone
    sock = bind_api(config)
    importlib.import_module("golem.rest.app")  # now, while nothing else runs
    importlib.import_module("hypercorn.trio")
    meet = trio.Event()  # agents are served before libp2p is imported: the import, in a thread, takes half of the processor
    async with AsyncExitStack() as stack:
        stack.callback(sock.close)
        node = await stack.enter_async_context(open_node(config, ask_password, meet))
        trio.lowlevel.add_instrument(node.loop)
        nursery = await stack.enter_async_context(trio.open_nursery())
        rest_ended = await nursery.start(_rest_until_stopped, node, sock)
        status = {"pid": os.getpid(), "nodeId": node.node_id, "apiUrl": node.api_url, "bus": str(config.bus_path),
                  "units": str(config.units_path), "profile": config.profile, "startedAt": node.started_at}  # fmt: skip
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            nursery.start_soon(_stop_on_signal, node, signals)
            write_private(config.status_path, json.dumps(status, indent=1))
            stack.callback(config.status_path.unlink, missing_ok=True)
            notify_systemd("READY=1")
            if ready:
                ready(node)
            meet.set()
            gc.collect()
            gc.freeze()  # what is there for good: to look through all of it holds the loop for longer than anybody may
            nursery.start_soon(node.chain.connect)
            await node.stopping.wait()
        notify_systemd("STOPPING=1")
        node.system.feeds.close()
        with trio.move_on_after(GRACE_S):
            await rest_ended.wait()
        nursery.cancel_scope.cancel()


async def _rest_until_stopped(node: Node, sock: socket.socket, *, task_status: Any) -> None:
    ended = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_rest, node, sock)
        task_status.started(ended)
        await node.stopping.wait()
    ended.set()


async def _stop_on_signal(node: Node, signals: Any) -> None:
    async for number in signals:
        log.info("signal %s: stopping", number)
        node.stopping.set()
        return
