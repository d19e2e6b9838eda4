"""What is to be offered now: by presets, hardware, room on the disk, payment accounts, and which runtimes work.

All of it may change while the agent runs: files are looked at, accounts asked for, runtimes tested again. The machine is
told of every change, with what this provider sells in all, which its agreements together never pass.
Neighbours: `offer` (one offer), `runtimes`, `presets`, `hardware`, `storage`; `agent` puts them together.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from functools import partial
from typing import Any

import trio

from actors.kernel.system import System
from golem.provider.client import PAYMENT, NodeApiError, NodeAway, NodeClient
from golem.provider.hardware import HARDWARE, Profile, load_profile
from golem.provider.offer import offer_spec, wanted_accounts
from golem.provider.presets import PRESETS, Preset, default_preset, load_presets, save_presets
from golem.provider.runtimes import Ask, ExeUnits, Runtimes, ask_runtime, check_known, search_places
from golem.provider.settings import Rules, Settings, SettingsError, interactions, read_rules
from golem.provider.storage import Disk, StorageForSale
from protocol.provider import Capacity, OffersChanged, OfferSpec, RulesChanged

log = logging.getLogger("golem.provider")

NODE_PATIENCE_S = 30.0
LOOK_S = 2.0  # at the files
ACCOUNTS_S = 15.0  # between looks at the accounts: their dev chain may be made anew


class AgentError(Exception):
    """The agent cannot run; the text says why and what to do."""


class Offering:
    """The offers of one agent. Errors of the constructor: AgentError, SettingsError."""

    def __init__(self, settings: Settings, client: NodeClient, ask: Ask = ask_runtime, disk: Disk | None = None) -> None:
        self._settings, self._client = settings, client
        self._accounts: list[Any] = []
        self._units = self._read_units()
        self.runtimes = Runtimes(self.units, ask, settings.test_interval_s)
        self.storage = StorageForSale(disk or Disk(settings.data_dir))
        self._agreements = settings.max_agreements or self._promised().cpu_threads
        self._presets_by_runtime: dict[str, list[str]] = {}
        self.capacity = self._capacity(self._promised())
        self.rules = rules = read_rules(settings.data_dir)
        self.terms = replace(
            settings.terms, max_agreements=self._agreements, blacklist=rules.blacklist, allow_only=rules.allow_only
        )

    def units(self) -> ExeUnits:
        """Return how exe-units are started now; a settings file that got damaged changes nothing."""
        try:
            self._units = self._read_units()
        except SettingsError as error:
            log.debug("%s (exe-units are started as before)", error)
        return self._units

    def _read_units(self) -> ExeUnits:
        data_dir, transfers = self._settings.data_dir, self._settings.transfers
        if not transfers:  # where money is play money, the market is on this machine or in one laboratory
            transfers = "local" if self._accounts and all("chain" in one for one in self._accounts) else "public"
        return ExeUnits(search_places(self._settings.exe_unit_path, data_dir), interactions(data_dir), transfers)

    def _promised(self) -> Profile:
        """Return what the owner wants to sell of this machine; what the disk can give may be less."""
        return load_profile(self._settings.data_dir).at_most(*self._settings.most)

    def doubt(self, runtime: str) -> None:
        """See soon whether a runtime still works and its storage is there: an exe-unit of it has ended badly."""
        self.runtimes.doubt(runtime)
        self.storage.doubt()

    def _capacity(self, profile: Profile) -> Capacity:
        """Return what all agreements together may use. More agreements than threads is the owner's wish: they share time."""
        return Capacity(max(profile.cpu_threads, self._agreements), profile.mem_gib, profile.storage_gib)

    async def current(self) -> tuple[OfferSpec, ...]:
        """Return the offers of all presets that can be offered, which may be none yet. Raises `AgentError`, `SettingsError`."""
        raw = await self._client.persist(
            "asking for payment accounts", partial(self._client.call, "GET", f"{PAYMENT}/providerAccounts"),
            until=trio.current_time() + NODE_PATIENCE_S,
        )  # fmt: skip
        self._accounts = list(wanted_accounts(raw, self._settings.networks))
        if not self._accounts:
            wanted = f" on {', '.join(self._settings.networks)}" if self._settings.networks else ""
            raise AgentError(f"the node has no account to be paid{wanted}")
        if problem := check_known(self._settings.runtimes, self._units.places):
            raise AgentError(problem)
        found, problems = await self._specs()
        if not self._presets_by_runtime:
            raise AgentError("there is nothing to offer: no preset is active (`golem provider preset activate NAME`)")
        for problem in problems:
            log.warning("not offered: %s", problem)
        if not found:
            log.warning("nothing can be offered now; runtimes are tested again every %g s", self._settings.test_interval_s)
        return found

    async def _specs(self) -> tuple[tuple[OfferSpec, ...], list[str]]:
        settings, promised, presets = self._settings, self._promised(), self._presets()
        await self.storage.look(promised.storage_gib)
        await self.runtimes.test(preset.runtime for preset in presets)
        self._presets_by_runtime = {}
        found, problems = [], []
        profile = promised.at_most(math.inf, math.inf, self.storage.gib)
        for preset in presets:
            self._presets_by_runtime.setdefault(preset.runtime, []).append(preset.name)
            template = self.runtimes.answer(preset.runtime)
            if isinstance(template, str):
                problems.append(f"preset {preset.name}: runtime {preset.runtime}: {template}")
                continue
            if self.storage.reason:
                problems.append(f"preset {preset.name}: {self.storage.reason}")
                continue
            try:
                share = profile.share(self._agreements)
                found.append(offer_spec(preset, template, share, self._accounts, settings.name, settings.subnet, self.terms))
            except ValueError as error:
                problems.append(str(error))
        self.capacity = self._capacity(profile)
        return tuple(found), problems

    def _presets(self) -> list[Preset]:
        """Return the active presets, or those of the runtimes asked for (made with default prices where there is none)."""
        presets, wanted = load_presets(self._settings.data_dir), self._settings.runtimes
        if not wanted:
            return presets.offered()
        for runtime in wanted:
            if not any(one.runtime == runtime for one in presets.all):
                presets = presets.with_preset(default_preset(runtime)).activated(runtime, True)
                save_presets(self._settings.data_dir, presets)
        chosen = [one for one in presets.offered() if one.runtime in wanted]
        return chosen or [one for one in presets.all if one.runtime in wanted]

    def report(self) -> list[dict[str, Any]]:
        """Return what people are told of each runtime."""
        rows, reason = self.runtimes.report(self._presets_by_runtime), self.storage.reason
        return [{**row, "offered": False, "reason": reason} if reason and row["offered"] else row for row in rows]

    async def watch(self, system: System) -> None:
        """Take up changes of presets, hardware, disk, accounts and runtimes until cancelled."""
        async with trio.open_nursery() as nursery:
            self.runtimes.watch(nursery, self._presets_by_runtime)
            seen, asked_at = self._stamp(), trio.current_time()
            while True:
                await trio.sleep(LOOK_S)
                await self._look_at_rules(system)
                other_accounts = False
                if trio.current_time() - asked_at >= ACCOUNTS_S:
                    other_accounts, asked_at = await self._accounts_changed(), trio.current_time()
                other_storage = await self.storage.look()
                if (stamp := self._stamp()) == seen and not (other_accounts or other_storage):
                    continue
                seen = stamp
                try:
                    found, problems = await self._specs()
                except SettingsError as error:
                    log.warning("%s (the offers stay as they are)", error)
                    continue
                self.runtimes.watch(nursery, self._presets_by_runtime)
                log.info("presets, hardware, disk, accounts or runtimes changed: %d offers", len(found))
                for problem in problems:
                    log.warning("not offered: %s", problem)
                await system.ask("provider", OffersChanged(found, self.capacity))

    async def _look_at_rules(self, system: System) -> None:
        """Have whom we serve follow the rules file; while that is not in order, nobody new is."""
        try:
            found = read_rules(self._settings.data_dir)
        except SettingsError as error:
            found = Rules(allow_only=frozenset(), problem=str(error))
        if found != self.rules:
            self.rules = found
            log.warning("the rules changed: this provider serves %s", found.words())
            allowed = None if found.allow_only is None else tuple(sorted(found.allow_only))
            await system.ask("provider", RulesChanged(tuple(sorted(found.blacklist)), allowed))

    async def _accounts_changed(self) -> bool:
        """Ask for the accounts again; while the node or its chain does not say, they stay as they are."""
        try:
            raw = await self._client.call("GET", f"{PAYMENT}/providerAccounts")
        except (NodeApiError, NodeAway):
            return False
        found = list(wanted_accounts(raw, self._settings.networks))
        if not found or found == self._accounts:
            return False
        self._accounts = found
        return True

    def _stamp(self) -> tuple[int, ...]:
        files = (self._settings.data_dir / name for name in (PRESETS, HARDWARE))
        return (*(path.stat().st_mtime_ns if path.exists() else 0 for path in files), self.runtimes.changes)
