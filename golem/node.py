"""The node: the wiring of one daemon, and no logic. Read it to see what there is and who talks to whom.

Order of starting: lock, identity, journal, bus, actors, REST; the network and the chain come up behind it, so that agents
are answered within a second. Order of stopping: REST, five seconds of grace, everything else; a crash needs no order.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import logging
import os
import random
import secrets
import socket
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import trio

from actors.activity import Activity, ActivityRow
from actors.kernel.journal import Journal
from actors.kernel.machine import Send
from actors.kernel.system import System
from actors.kernel.trace import Line
from actors.ledger import Ledger
from actors.market import Market
from actors.negotiation import Negotiation
from actors.sources import EDGE
from actors.wallet import Wallet
from golem.backup import CHAIN, JOURNAL, bind_generations, compare_generations, hold_payments, peers_asked, restored_at
from golem.bus import Bus
from golem.chain.port import Chain, open_chain
from golem.clock import watch_clock
from golem.commands import serve_commands
from golem.config import Config, ConfigError
from golem.files import FileServer
from golem.gossip import Gossip
from golem.gsb import Services
from golem.identity import (
    APP_KEYS,
    AUTOCONF,
    KEYSTORE,
    PLAIN_KEY,
    AppKeys,
    AskPassword,
    Identity,
    check_ours,
    open_identity,
    write_private,
)
from golem.interaction import Interactions
from golem.nearness import serve_nearness
from golem.net import NetConfig, Network, check_network, open_network
from golem.payout import Payout, read_payout, warn
from golem.ports import is_our_node, of_others
from golem.registry import IMAGES, Registry
from golem.router import Router
from golem.signer_port import SignerPort
from protocol.ledger import Recall
from protocol.wallet import ResumePayments

log = logging.getLogger("golem.node")

GRACE_S = 5.0
DAY_S = 86400.0
STEP_LOG_BYTES, STEP_LOG_FILES = 16 * 1024 * 1024, 4


class Node:
    """What edges use. Built by `open_node`."""

    def __init__(self, config: Config, identity: Identity, app_keys: AppKeys, router: Router, system: System,
                 network: Network, bus: Bus, chain: Chain, files: FileServer, registry: Registry) -> None:  # fmt: skip
        self.config, self.identity, self.app_keys = config, identity, app_keys
        self.router, self.calls, self.system = router, router.calls, system
        self.network, self.bus, self.chain, self.files, self.registry = network, bus, chain, files, registry
        self.services = Services(files)
        self.node_id = identity.node_id
        self.interactions = Interactions(self.node_id, router, self.activity)
        self.name = identity.node_id[:10]
        self.payout: Payout | None = None  # where it is paid, if not at its own address
        self.started_at = time.time()
        self.api_url = ""
        self.stopping = trio.Event()

    def clock(self) -> float:
        """Return the time in seconds since the epoch."""
        return self.system.now()

    def activity(self, activity_id: str) -> ActivityRow | None:
        """Return the row of an activity that this node is a party of."""
        row: ActivityRow | None = self.system.rows("activity").get(f"activity/{activity_id}")
        return row

    def new_id(self) -> str:
        """Return 32 random hex digits."""
        return uuid.uuid4().hex

    def health_problem(self) -> str | None:
        """Return what is wrong with this node, `None` if nothing is."""
        if not self.network.is_up:
            return "the peer-to-peer host is not running (yet)"
        return self.chain.fault() or self._debt()

    def _debt(self) -> str | None:
        """Return what of this node's own work is held up by our own fault; strangers' poison makes nobody unwell."""
        own = sum(one.local for one in self.system.quarantined())
        for count, what in ((own, "messages are set aside (golem quarantine list)"),
                            (len(self.system.damaged()), "stored rows cannot be read (golem status)"),
                            (len(self.system.alarms.failing()), "timers cannot be handled (golem status)")):  # fmt: skip
            if count:
                return f"{count} {what}"
        return None

    def metrics_text(self) -> str:
        """Return the node's counters in Prometheus' text format."""
        sessions = self.network.sessions()
        lines = [
            ("golem_sessions", "gauge", len(sessions)),
            ("golem_bytes_in_total", "counter", sum(one.bytes_in for one in sessions)),
            ("golem_bytes_out_total", "counter", sum(one.bytes_out for one in sessions)),
            ("golem_journal_commits_total", "counter", self.system.journal.commits),
            ("golem_links_stuck", "gauge", len(self.system.troubles())),
            ("golem_quarantined_messages", "gauge", len(self.system.quarantined())),
            ("golem_damaged_rows", "gauge", len(self.system.damaged())),
            ("golem_failing_timers", "gauge", len(self.system.alarms.failing())),
            ("golem_protocol_violations", "gauge", len(self.system.violations)),
            ("golem_uptime_seconds", "gauge", round(time.time() - self.started_at, 1)),
        ]
        return "".join(f"# TYPE {name} {kind}\n{name} {value}\n" for name, kind, value in lines)


@asynccontextmanager
async def open_node(config: Config, ask_password: AskPassword | None = None) -> AsyncIterator[Node]:
    """Run a node's actors, bus, network and chain for the length of the block; REST is `serve_rest`.

    Raises `ConfigError`, `IdentityError`, `JournalError`.
    """
    async with AsyncExitStack() as stack:
        lock_data_dir(config.data_dir, stack)
        if config.profile == "local" and not config.chain_url:
            make_folder(config.chain_dir, "chain")
        net_config = NetConfig(data_dir=config.data_dir, listen=config.listen, bootstrap=config.bootstrap, mdns=config.mdns,
                               network_name=config.network_name)  # fmt: skip
        try:
            check_network(net_config)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        old_key = any((config.data_dir / name).exists() for name in (KEYSTORE, PLAIN_KEY))
        identity = await trio.to_thread.run_sync(open_identity, config, ask_password)
        try:
            payout = read_payout(config.data_dir)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        app_keys = AppKeys(config.data_dir / APP_KEYS)
        if config.autoconf_app_key:
            app_keys.drop_foreign(AUTOCONF, identity.node_id)
            app_keys.create(AUTOCONF, identity.node_id, key=config.autoconf_app_key)
        elif app_keys.named(AUTOCONF) is not None:
            app_keys.drop(AUTOCONF)  # it was given for as long as its variable
        older = compare_generations(config.data_dir)
        new_journal = old_key and not (config.data_dir / "node.db").exists()
        journal = Journal(str(config.data_dir / "node.db"), lambda: secrets.token_hex(8))
        stack.callback(journal.close)
        try:
            network = await stack.enter_async_context(open_network(identity.secret(), net_config))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        bus = Bus(config.bus_path, identity.node_id, config.units_path)
        router = Router(identity.node_id, network, bus)
        gossip = Gossip(network)
        system = System(
            identity.node_id, journal, router, clock=time.time, new_trace=lambda: secrets.token_hex(6),
            jitter=partial(random.uniform, 0.8, 1.2), publish=gossip.publish, step_log=step_log(config.data_dir),
        )  # fmt: skip
        for machine in (Market, Negotiation, Ledger):
            system.add(machine(identity.node_id))
        system.add(Activity(identity.node_id, config.unresponsive_s, config.inactivity_s))
        try:
            if older == CHAIN:
                hold_payments(config.data_dir, "chain.db is older than node.db")
            chain = await stack.enter_async_context(open_chain(config, identity, system))
            bind_generations(config.data_dir, journal.boot)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        least = format(config.least_payment_glm, ".18f")
        system.add(Wallet(identity.node_id, cycles_of(config, chain), minimum=least, payees=chain.batch_sizes()))
        system.add_port(SignerPort(identity.node_id, identity.sign))
        files = FileServer(router, identity.derived("names of published files"))
        registry = await trio.to_thread.run_sync(open_registry, config, files)
        node = Node(config, identity, app_keys, router, system, network, bus, chain, files, registry)
        node.payout = payout
        for said in warn(payout, identity.node_id, system.rows("market").prefix("offer/"), new_journal):
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
        nursery.start_soon(watch_clock, system)
        nursery.start_soon(node.services.run, node.stopping)
        router.attach(system.deliver)
        gossip.attach(system)
        nursery.start_soon(gossip.run)
        network.on_peer(gossip.peer)
        yield node
        nursery.cancel_scope.cancel()


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
        deleted = await system.journal.prune(system.now() - config.event_store_days * DAY_S)
        if deleted:
            log.info("deleted %d events older than %g days", deleted, config.event_store_days)
        await system.forget_links()
        await system.journal.give_back()
        await trio.sleep(config.cleanup_interval_s)


def cycles_of(config: Config, chain: Chain) -> dict[str, float]:
    """Return how often each platform pays out, in seconds: what the user set, else the network's own pace."""
    paces = {row.platform: 1.0 if row.simulated_by else 300.0 if row.is_test else 86400.0 for row in chain.networks}
    return {platform: config.payment_cycle_s or pace for platform, pace in paces.items()}


def open_registry(config: Config, files: FileServer) -> Registry:
    """Return the node's store of images. Raises `ConfigError`."""
    folder = config.data_dir / IMAGES
    try:
        return Registry(folder, files, time.time, int(config.images_max_gib * 2**30))
    except OSError as error:
        raise ConfigError(f"cannot use the images in {folder}: {error.strerror or error}") from None


def make_folder(path: Path, use: str) -> None:
    """Make a private directory if it is not there. Raises `ConfigError`."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        check_ours(path)
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise ConfigError(f"cannot use the {use} directory {path}: {reason}") from None
    except ValueError as error:
        raise ConfigError(f"cannot use the {use} directory {path}: {error}") from None


def lock_data_dir(data_dir: Path, stack: AsyncExitStack) -> None:
    """Make the data directory and hold its lock until the stack unwinds. Raises `ConfigError`."""
    make_folder(data_dir, "data")
    try:
        handle = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot use the data directory {data_dir}: {error.strerror}") from None
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(f"another node runs on {data_dir} (choose another with golem --data-dir DIR)") from None


def step_log(data_dir: Path) -> Any:
    """Return the sink of trace lines: `<data_dir>/steps.log`, rotated, read by `golem trace`."""
    handler = RotatingFileHandler(data_dir / "steps.log", maxBytes=STEP_LOG_BYTES, backupCount=STEP_LOG_FILES)
    handler.setFormatter(logging.Formatter("%(message)s"))

    def begin_anew(_record: logging.LogRecord) -> None:
        """A full disk: the journal has the say. What is in the buffer is dropped, the next line opens the file again."""
        stream: TextIOWrapper | None = handler.stream
        handler.stream = None  # type: ignore[assignment]
        with suppress(OSError):
            if stream is not None:
                stream.close()

    handler.handleError = begin_anew  # type: ignore[method-assign]
    logger = logging.Logger("golem.steps", logging.INFO)
    logger.addHandler(handler)

    def write(line: Line) -> None:
        logger.info(line.json())

    return write


def bind_api(config: Config) -> socket.socket:
    """Return the socket of the REST API. Raises `ConfigError`.

    Another free port stands for the default one only where a node of our own user has that: agents bring their keys to it.
    """
    host, port, by_default = config.api_host, config.api_port, not config.api_port_fixed
    try:
        sock = _listening(host, port)
    except OSError as error:
        if not by_default or not is_our_node(host, port):
            advice = "" if isinstance(error, socket.gaierror) else _whose(host, port)
            raise ConfigError(f"cannot serve REST on {host}:{port}: {error.strerror or error}{advice}") from None
        sock = _listening(host, 0)
    if port and (strangers := of_others(host, sock.getsockname()[1])):
        sock.close()
        beside = ", ".join(str(one.address) for one in strangers)
        raise ConfigError(f"cannot serve REST on {host}:{port}: the port is another user's at {beside}{_whose(host, port)}")
    return sock


def _listening(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _notice_lost_clients(sock)
        sock.bind((host, port))
        sock.listen(256)
    except OSError:
        sock.close()
        raise
    return sock


def _whose(host: str, port: int) -> str:
    """Return what to do about a port that somebody has."""
    holders = {one.uid for one in of_others(host, port)}
    who = f" (user {', '.join(map(str, sorted(holders)))} has it, and would get the app-keys of your agents)" if holders else ""
    return f"{who}; end what listens there, or choose with --api-url (http://127.0.0.1:0 is any free port)"


def _notice_lost_clients(sock: socket.socket) -> None:
    """Have connections end whose client is gone without a word, or takes nothing any more; accepted ones inherit it."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 60_000)):
        if (number := getattr(socket, option, None)) is not None:
            sock.setsockopt(socket.IPPROTO_TCP, number, value)


async def serve_rest(node: Node, sock: socket.socket, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
    """Serve the REST API on a listening socket until the node stops, then end open requests within the grace."""
    import hypercorn.trio

    from golem.rest.app import create_app
    from golem.rest.server import server_settings

    settings = server_settings(GRACE_S, node.config.max_rest_timeout_s)
    host, port = sock.getsockname()[:2]
    node.api_url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    settings.bind = [f"fd://{sock.detach()}"]  # the server closes it
    app = create_app(node)
    task_status.started()
    await hypercorn.trio.serve(app, settings, shutdown_trigger=node.stopping.wait)


async def run_node(config: Config, ask_password: AskPassword | None = None, ready: Any = None) -> None:
    """Run a whole node until `SIGTERM` or `SIGINT`. `ready(node)` is called when REST answers."""
    import signal

    sock = bind_api(config)
    importlib.import_module("golem.rest.app")  # now, while nothing else runs: beside the import of libp2p it takes
    importlib.import_module("hypercorn.trio")  # several times as long
    async with AsyncExitStack() as stack:
        stack.callback(sock.close)
        node = await stack.enter_async_context(open_node(config, ask_password))
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


def notify_systemd(state: str) -> None:
    """Tell systemd, where it started us, of a state (`READY=1`)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            try:
                sock.connect("\0" + address[1:] if address.startswith("@") else address)
                sock.send(state.encode())
            except OSError as error:
                log.warning("cannot notify systemd: %s", error)
