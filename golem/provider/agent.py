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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import trio

from actors._provider_turn import ProviderConfig
from actors.kernel.journal import Journal
from actors.kernel.machine import ActorFailed, LinkDown
from actors.kernel.system import System
from actors.provider import Provider
from golem.exeunit.runtimes import runtime_names
from golem.provider.client import MARKET, PAYMENT, ApiError, NodeAway, NodeClient, NodeError, part
from golem.provider.hardware import HARDWARE, Profile, load_profile
from golem.provider.offer import Template, ask_runtime, offer_spec, wanted_accounts
from golem.provider.polls import FEEDS, follow
from golem.provider.port import RestPort
from golem.provider.presets import PRESETS, Preset, load_presets, save_presets
from golem.provider.processes import Processes
from golem.provider.settings import JOURNAL, LOCK, Settings, SettingsError, read_json, read_rules
from golem.provider.status import write_status
from protocol.provider import AgentStarted, AgreementArrived, OffersChanged, OfferSpec, SessionNamed, StopAgent
from protocol.types import Violation

log = logging.getLogger("golem.provider")

NODE_PATIENCE_S = 30.0  # at the start
STOP_S = 20.0
MAX_PICKED_UP = 20
LOOK_S = 2.0  # at the files
ACCOUNTS_S = 15.0  # between looks at the accounts: their dev chain may be made anew


class AgentError(Exception):
    """The agent cannot run; the text says why and what to do."""


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
        offers = Offers(settings, client)
        specs = await offers.current()
        instance = secrets.token_hex(6)
        journal = Journal(str(settings.data_dir / JOURNAL), lambda: secrets.token_hex(8))
        stack.callback(journal.close)
        system = System(
            "agent", journal, NoTransport(), clock=time.time, new_trace=lambda: secrets.token_hex(6),
            jitter=partial(random.uniform, 0.8, 1.2),
        )  # fmt: skip
        system.add(Provider("agent", ProviderConfig(instance, offers.terms, settings.idle_s, settings.approve_timeout_s)))
        port = RestPort(client, system, instance)
        processes = Processes(system, settings.data_dir, partial(_bus_path, settings))
        system.add_port(port)
        system.add_port(processes)
        nursery = await stack.enter_async_context(trio.open_nursery())
        signals = stack.enter_context(trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT))
        await _take_back_offers(system, client, settings.name)
        await nursery.start(port.run)
        await nursery.start(processes.run)
        await nursery.start(system.run)
        session_id = await _begin(system, client, settings, specs)
        log.info("%s sells as %s on subnet %s; session %s", settings.name, node_id, settings.subnet, session_id)
        since = system.rows("provider")["agent"].since
        for feed in FEEDS:
            nursery.start_soon(follow, client, system, feed, session_id, since)
        nursery.start_soon(write_status, system, settings, node_id)
        nursery.start_soon(offers.watch, system)
        await _until_stopped(system, signals, processes)
        nursery.cancel_scope.cancel()


async def _begin(system: System, client: NodeClient, settings: Settings, specs: tuple[OfferSpec, ...]) -> str:
    """Start the machine and show it what the last run of the agent may have missed; return the session id."""
    answer = await system.ask("provider", AgentStarted(f"{settings.name}-{secrets.token_hex(4)}", specs))
    assert isinstance(answer, SessionNamed)
    try:
        await _pick_up_agreements(system, client)
    except (ApiError, NodeAway, ActorFailed, Violation, KeyError, TypeError, AttributeError) as error:
        log.warning("looking for agreements that wait: %r", error)
    return answer.session_id


async def _take_back_offers(system: System, client: NodeClient, name: str) -> None:
    """Withdraw offers of this name that nobody knows of: published just when the agent was killed.

    Before the machine runs: from then on there may be new ones that it does not know of yet.
    """
    known = {row.offer_id for _, row in system.rows("provider").prefix("offer/")}
    try:
        for offer in await client.call("GET", f"{MARKET}/offers") or ():
            if offer["offerId"] not in known and offer["properties"].get("golem.node.id.name") == name:
                await client.call("DELETE", f"{MARKET}/offers/{part(offer['offerId'])}")
    except (ApiError, NodeAway, KeyError, TypeError, AttributeError) as error:
        log.warning("looking for offers that were left over: %r", error)


async def _pick_up_agreements(system: System, client: NodeClient) -> None:
    """Show the machine agreements that wait for approval: their event was read by a run that did not live to act."""
    waiting = await client.call("GET", f"{MARKET}/agreements", params={"state": "Pending"}) or ()
    for one in [one for one in waiting if one.get("role") == "Provider"][:MAX_PICKED_UP]:
        agreement = await client.call("GET", f"{MARKET}/agreements/{part(one['id'])}")
        offer_id = agreement["offer"]["offerId"]
        offers = {row.offer_id: row.preset for _, row in system.rows("provider").prefix("offer/")}
        if offer_id in offers and agreement["state"] == "Pending":
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
    rows = system.rows("provider")
    active = sum(1 for _ in rows.prefix("active/"))
    unsent = sum(1 for _, row in rows.prefix("agreement/") if row.invoice in ("", "Issuing", "Sending"))
    return f"{active} agreements, {unsent} invoices not sent" if active or unsent else ""


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

    So a node that comes back on another port is found again.
    """
    given = settings.node_url.rstrip("/")
    if given not in ("", _node_file(settings).get("apiUrl")):
        return lambda: given
    return lambda: str(_node_file(settings).get("apiUrl") or given or "http://127.0.0.1:7465")


def _bus_path(settings: Settings) -> Path:
    return Path(str(_node_file(settings).get("bus") or settings.node_file.with_name("bus.sock")))


async def _node_id(client: NodeClient) -> str:
    """Return the node's identity, waiting for a node that is just starting. Raises `AgentError`."""
    call = partial(client.call, "GET", "/me")
    try:
        found = await client.persist("asking the node who it is", call, until=trio.current_time() + NODE_PATIENCE_S, last_s=2)
        return str(found["identity"])
    except (NodeError, KeyError, TypeError) as error:
        if isinstance(error, ApiError) and error.status == 401:
            raise AgentError("the node does not know this app-key (YAGNA_APPKEY)") from None
        raise AgentError(f"the node cannot be used: {error}") from None


def _lock(data_dir: Path, stack: AsyncExitStack) -> None:
    """Make the data directory and hold its lock until the stack unwinds. Raises `AgentError`."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(data_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise AgentError(f"cannot use the data directory {data_dir}: {error}") from None
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise AgentError(f"another provider agent runs on {data_dir} (choose another with --data-dir)") from None


# -- the offers
class Offers:
    """What is to be offered now, by presets, hardware, runtimes and payment accounts."""

    def __init__(self, settings: Settings, client: NodeClient) -> None:
        self._settings, self._client = settings, client
        self._templates: dict[str, Template | str] = {}
        self._accounts: list[Any] = []
        self._agreements = settings.max_agreements or self._profile().cpu_threads
        rules = read_rules(settings.data_dir)
        self.terms = replace(
            settings.terms, max_agreements=self._agreements, blacklist=rules.blacklist, allow_only=rules.allow_only
        )

    def _profile(self) -> Profile:
        return load_profile(self._settings.data_dir).at_most(*self._settings.most)

    async def current(self) -> tuple[OfferSpec, ...]:
        """Return the offers of all presets that can be offered. Raises `AgentError`, `SettingsError` where none can."""
        raw = await self._client.persist(
            "asking for payment accounts", partial(self._client.call, "GET", f"{PAYMENT}/providerAccounts"),
            until=trio.current_time() + NODE_PATIENCE_S,
        )  # fmt: skip
        self._accounts = list(wanted_accounts(raw, self._settings.networks))
        if not self._accounts:
            wanted = f" on {', '.join(self._settings.networks)}" if self._settings.networks else ""
            raise AgentError(f"the node has no account to be paid{wanted}")
        found, problems = await self._specs()
        if not found:
            raise AgentError("there is nothing to offer: " + ("; ".join(problems) or "no preset is active"))
        for problem in problems:
            log.warning("not offered: %s", problem)
        return found

    async def _specs(self) -> tuple[tuple[OfferSpec, ...], list[str]]:
        settings = self._settings
        share = self._profile().share(self._agreements)
        found, problems = [], []
        for preset in self._presets():
            if preset.runtime not in self._templates:
                self._templates[preset.runtime] = await ask_runtime(preset.runtime)
            template = self._templates[preset.runtime]
            if isinstance(template, str):
                problems.append(f"preset {preset.name}: runtime {preset.runtime}: {template}")
                continue
            try:
                found.append(offer_spec(preset, template, share, self._accounts, settings.name, settings.subnet, self.terms))
            except ValueError as error:
                problems.append(str(error))
        return tuple(found), problems

    def _presets(self) -> list[Preset]:
        """Return the active presets, or those of the runtimes asked for (made with default prices where there is none)."""
        presets, wanted = load_presets(self._settings.data_dir), self._settings.runtimes
        if not wanted:
            return presets.offered()
        for runtime in wanted:
            if runtime not in runtime_names():
                raise AgentError(f"unknown runtime {runtime!r}: this provider has {', '.join(runtime_names())}")
            if not any(one.runtime == runtime for one in presets.all):
                presets = presets.with_preset(Preset(runtime, runtime)).activated(runtime, True)
                save_presets(self._settings.data_dir, presets)
        chosen = [one for one in presets.offered() if one.runtime in wanted]
        return chosen or [one for one in presets.all if one.runtime in wanted]

    async def watch(self, system: System) -> None:
        """Take up changes of presets, hardware and accounts until cancelled."""
        seen, asked_at = self._stamp(), trio.current_time()
        while True:
            await trio.sleep(LOOK_S)
            other_accounts = False
            if trio.current_time() - asked_at >= ACCOUNTS_S:
                other_accounts, asked_at = await self._accounts_changed(), trio.current_time()
            if (stamp := self._stamp()) == seen and not other_accounts:
                continue
            seen = stamp
            try:
                found, problems = await self._specs()
            except SettingsError as error:
                log.warning("%s (the offers stay as they are)", error)
                continue
            log.info("presets, hardware or accounts changed: %d offers", len(found))
            for problem in problems:
                log.warning("not offered: %s", problem)
            await system.ask("provider", OffersChanged(found))

    async def _accounts_changed(self) -> bool:
        """Ask for the accounts again; while the node or its chain does not say, they stay as they are."""
        try:
            raw = await self._client.call("GET", f"{PAYMENT}/providerAccounts")
        except (ApiError, NodeAway):
            return False
        found = list(wanted_accounts(raw, self._settings.networks))
        if not found or found == self._accounts:
            return False
        self._accounts = found
        return True

    def _stamp(self) -> tuple[int, ...]:
        files = (self._settings.data_dir / name for name in (PRESETS, HARDWARE))
        return tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in files)
