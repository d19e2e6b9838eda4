"""The provider agent: the wiring. Lock, node, offers, journal, machine, ports, polls; then it waits for signals.

The first SIGTERM or SIGINT withdraws the offers, ends the agreements and sends the invoices, for 20 seconds at most; a
second one stops at once. What is left open then is taken up at the next start, as after a crash.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import random
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import trio

from actors.kernel.clock import Steady
from actors.kernel.journal import Journal
from actors.kernel.machine import ActorFailed, LinkDown
from actors.kernel.system import System
from actors.provider.machine import Provider
from actors.provider.rows import ALIVE, UnitState
from actors.provider.turn import ProviderConfig
from golem.base.boot import boot_id, boot_time
from golem.base.ports import may_hear_keys, of_others
from golem.config import DEFAULT_API_URL, parse_api_url
from golem.private_files import check_ours, make_private
from golem.provider.client import MARKET, NodeApiError, NodeAway, NodeClient, NodeError, part
from golem.provider.leftovers import Leftovers
from golem.provider.offering import AgentError, Offering
from golem.provider.polls import FEEDS, follow
from golem.provider.port import ProposalPort, RestPort
from golem.provider.processes import Processes
from golem.provider.settings import JOURNAL, LOCK, Settings, SettingsError, read_json
from golem.provider.status import write_status
from protocol.property_names import NODE_NAME
from protocol.provider import AgentStarted, AgreementArrived, SessionNamed, StopAgent
from protocol.states import AgreementState, Role
from protocol.types import Violation

log = logging.getLogger("golem.provider")

NODE_PATIENCE_S = 30.0  # at the start
STOP_S = 20.0
MAX_PICKED_UP = 20


class NoTransport:
    """This kernel talks to no other one."""

    async def exchange(self, node: str, frame: bytes) -> bytes:
        raise LinkDown("an agent has no peers")


async def run_agent(settings: Settings) -> None:
    """Run the agent until a signal ends it. Raises `AgentError`, `NodeError`, `SettingsError`."""
    async with AsyncExitStack() as stack:
        _lock(settings.data_dir, stack)
        client = await stack.enter_async_context(NodeClient(node_url(settings), settings.app_key))
        node_id = await _node_id(client)
        offering = Offering(settings, client)
        offers = await offering.current()
        instance = secrets.token_hex(6)
        journal = Journal(str(settings.data_dir / JOURNAL), lambda: secrets.token_hex(8))
        stack.callback(journal.close)
        system = System(
            "agent", journal, NoTransport(), clock=time.time, steady=Steady(boot_time, boot_id()),
            new_trace=lambda: secrets.token_hex(6),
            jitter=partial(random.uniform, 0.8, 1.2),
        )  # fmt: skip
        system.add(Provider("agent", ProviderConfig(instance, offering.terms, settings.idle_s, settings.approve_timeout_s)))
        port = RestPort(client, system, instance)
        leftovers = Leftovers(settings.data_dir, offering.units, offering.runtimes.known)
        processes = Processes(system, settings.data_dir, partial(_bus_path, settings), offering.units, leftovers, offering.doubt)
        system.add_port(port)
        system.add_port(ProposalPort(port))
        system.add_port(processes)
        nursery = await stack.enter_async_context(trio.open_nursery())
        signals = stack.enter_context(trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT))
        await _take_back_offers(system, client, settings.name)
        nursery.start_soon(leftovers.remove_stale, leftovers.find_stale(expected_units(system)))
        await nursery.start(port.run)
        await nursery.start(processes.run)
        await nursery.start(system.run)
        session_id = await _begin(system, client, settings, AgentStarted("", offers, offering.capacity))
        log.info("%s sells as %s on subnet %s; session %s", settings.name, node_id, settings.subnet, session_id)
        agent = system.sound("provider", "agent")
        since = agent.since if agent else 0.0
        for feed in FEEDS:
            nursery.start_soon(follow, client, system, feed, session_id, since)
        nursery.start_soon(write_status, system, settings, node_id, offering.report, lambda: offering.rules.words())
        nursery.start_soon(offering.watch, system)
        await _until_stopped(system, signals, processes)
        nursery.cancel_scope.cancel()


async def _begin(system: System, client: NodeClient, settings: Settings, started: AgentStarted) -> str:
    """Start the machine and show it what the last run of the agent may have missed; return the session id."""
    session_id = f"{settings.name}-{secrets.token_hex(4)}"
    answer = await system.ask("provider", msgspec.structs.replace(started, session_id=session_id))
    assert isinstance(answer, SessionNamed)
    try:
        await _pick_up_agreements(system, client)
    except (NodeApiError, NodeAway, ActorFailed, Violation, KeyError, TypeError, AttributeError) as error:
        log.warning("looking for agreements that wait: %r", error)
    return answer.session_id


async def _take_back_offers(system: System, client: NodeClient, name: str) -> None:
    """Withdraw offers of this name that nobody knows of: published just when the agent was killed.

    Before the machine runs: from then on there may be new ones that it does not know of yet.
    """
    known = {row.offer_id for _, row in system.listed("provider", "offer/")[0]}  # that of a damaged row is published anew
    try:
        for offer in await client.call("GET", f"{MARKET}/offers") or ():
            if offer["offerId"] not in known and offer["properties"].get(NODE_NAME) == name:
                await client.call("DELETE", f"{MARKET}/offers/{part(offer['offerId'])}")
    except (NodeApiError, NodeAway, KeyError, TypeError, AttributeError) as error:
        log.warning("looking for offers that were left over: %r", error)


async def _pick_up_agreements(system: System, client: NodeClient) -> None:
    """Show the machine agreements that wait for approval: their event was read by a run that did not live to act."""
    waiting = await client.call("GET", f"{MARKET}/agreements", params={"state": AgreementState.PENDING}) or ()
    for one in [one for one in waiting if one.get("role") == Role.PROVIDER][:MAX_PICKED_UP]:
        agreement = await client.call("GET", f"{MARKET}/agreements/{part(one['id'])}")
        offer_id = agreement["offer"]["offerId"]
        offers = {row.offer_id: row.preset for _, row in system.listed("provider", "offer/")[0]}
        if offer_id in offers and agreement["state"] == AgreementState.PENDING:
            await system.ask("provider", AgreementArrived(offers[offer_id], offer_id, json.dumps(agreement)))


async def _until_stopped(system: System, signals: AsyncIterator[int], processes: Processes) -> None:
    """Wait for a signal, then for all to be wound up, a second signal, or 20 seconds."""
    await anext(signals)
    log.info("stopping: offers are withdrawn, agreements ended, invoices sent (once more to stop at once)")
    await system.ask("provider", StopAgent())
    async with trio.open_nursery() as nursery:

        async def at_once() -> None:
            await anext(signals)
            log.info("stopping at once")
            nursery.cancel_scope.cancel()

        nursery.start_soon(at_once)
        with trio.move_on_after(STOP_S) as patience:
            while left := open_business(system):
                log.debug("still open: %s", left)
                await trio.sleep(0.05)
        if patience.cancelled_caught:
            log.warning("not everything could be wound up in %g s: %s; the next start goes on with it", STOP_S, left)
        nursery.cancel_scope.cancel()
    processes.terminate_all()
    log.info("stopped")


def open_business(system: System) -> str:
    """Return what is still to be done for agreements, empty if nothing is."""
    rows, unreadable = system.listed("provider", "active/")
    active = len(rows) + len(unreadable)
    agreements, damaged = system.listed("provider", "agreement/")
    unsent = len(damaged) + sum(1 for _, row in agreements if row.invoice in ("", "Issuing", "Sending"))
    return f"{active} agreements, {unsent} invoices not sent" if active or unsent else ""


def expected_units(system: System) -> list[str]:
    """Return the activities whose process is there, or will be looked for or started."""
    rows, damaged = system.listed("provider", "activity/")
    return [row.activity_id for _, row in rows if row.state in (UnitState.WAITING, *ALIVE)] + [
        key.partition("/")[2] for key in damaged
    ]


# -- the node
def _node_file(settings: Settings) -> dict[str, Any]:
    """Return the running node's `node.json`, empty where no node runs."""
    try:
        found = read_json(settings.node_file, "node's status file")
    except SettingsError:
        return {}
    return found if isinstance(found, dict) else {}


def node_url(settings: Settings) -> Callable[[], str]:
    """Return what finds the node's URL: the one given; but where `node.json` says the same (or none was given), the file.

    So a node that comes back on another port is found again. A file may be of a node that is gone: what it says counts
    while our own user has the port. While a node that was found by its file is away, no other one is asked: the usual
    port may be that of another node. The function raises `NodeAway`.
    """
    given = settings.node_url.rstrip("/")
    by_file = bool(_node_file(settings))
    if given not in ("", _node_file(settings).get("apiUrl")):
        return lambda: given

    def find() -> str:
        url = str(_node_file(settings).get("apiUrl") or given or ("" if by_file else DEFAULT_API_URL))
        if not url:
            raise NodeAway(f"no node is running on {settings.node_file.parent}")
        return _own(url)

    return find


def _own(url: str) -> str:
    """Return a node's URL, if nobody else would hear the app-key there. Raises `NodeAway`."""
    host, port = parse_api_url(url)
    if not may_hear_keys(host, port):
        whose = "another user listens there" if of_others(host, port) else "nobody listens there"
        raise NodeAway(f"no node of this user at {url}: {whose}")
    return url


def _bus_path(settings: Settings) -> Path:
    return Path(str(_node_file(settings).get("units") or settings.node_file.with_name("units.sock")))


async def _node_id(client: NodeClient) -> str:
    """Return the node's identity, waiting for a node that is just starting. Raises `AgentError`."""
    call = partial(client.call, "GET", "/me")
    try:
        found = await client.persist("asking the node who it is", call, until=trio.current_time() + NODE_PATIENCE_S, last_s=2)
        return str(found["identity"])
    except (NodeError, KeyError, TypeError) as error:
        if isinstance(error, NodeApiError) and error.status == 401:
            raise AgentError("the node does not know this app-key (YAGNA_APPKEY)") from None
        raise AgentError(f"the node cannot be used: {error}") from None


def _lock(data_dir: Path, stack: AsyncExitStack) -> None:
    """Make the data directory and hold its lock until the stack unwinds. Raises `AgentError`."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        check_ours(data_dir)
        make_private(data_dir)
        handle = os.open(data_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except (OSError, ValueError) as error:
        raise AgentError(f"cannot use the data directory {data_dir}: {error}") from None
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise AgentError(f"another provider agent runs on {data_dir} (choose another with golem --data-dir DIR)") from None
