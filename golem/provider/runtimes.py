"""Which runtimes this provider has, and whether each works here: its self-test decides, again and again.

A runtime that fails is not offered, and says why (`golem provider status`, `exe-unit list`, the log); when it works later,
because a Docker Engine was started or a kernel module loaded, it is offered then. One that fails twice in a row is
withdrawn. Built-in runtimes are those of `golem.exeunit.runtimes`, more come by descriptor files.
Neighbours: `agent` (which turns the answers into offers), `processes` (which starts exe-units in the same environment).
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import subprocess
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from golem.base.children import CWD, python_line
from golem.exeunit.runtimes import runtime_names
from golem.exeunit.runtimes.plugin.descriptors import Catalogue, DescriptorError, default_places, find_descriptors
from golem.provider.units import unit_environment
from protocol.property_names import RUNTIME_VERSION

log = logging.getLogger("golem.provider")

TEMPLATE_S, SELF_TEST_S = 30.0, 120.0
START_S = 20.0  # that the agent's start waits for self-tests
TEST_INTERVAL_S = 60.0
RETRY_S = 5.0  # after a first failure of a runtime that worked
DOUBT_S = 10.0  # between tests of a runtime whose exe-units end badly: its requestors can bring that about too
MAX_TOLD = 100
_TOLD: set[tuple[str, str]] = set()
NOT_TESTED = "not tested yet"


@dataclass(frozen=True, slots=True)
class Template:
    """What a runtime contributes to an offer."""

    runtime: str
    properties: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ExeUnits:
    """How exe-units are started: where descriptors are, and what the provider allows of shell, proxy-http and transfers."""

    places: str | None = None
    interactions: tuple[str, ...] | None = None  # None: all that the runtime has
    transfers: str = "public"  # see `golem.exeunit.transfer.spool.TransferPolicy`

    def flags(self) -> list[str]:
        allowed = [] if self.interactions is None else ["--interaction", ",".join(self.interactions)]
        return [*allowed, "--transfer-policy", self.transfers]


Ask = Callable[[str, ExeUnits], Awaitable[Template | str]]


def search_places(given: str | None, data_dir: Path) -> str:
    """Return where an agent's descriptors are: as given, else the default places that there are."""
    if given:  # relative to where the agent stands; its children stand elsewhere
        return os.pathsep.join(os.path.abspath(os.path.expanduser(place)) for place in given.split(os.pathsep) if place)
    return os.pathsep.join(place for place in default_places(data_dir) if os.path.isdir(place))


def catalogue(places: str | None) -> Catalogue:
    """Return the runtimes that descriptors add to the built-in ones."""
    return find_descriptors(places, taken=runtime_names()) if places else Catalogue({}, ())


async def ask_runtime(runtime: str, units: ExeUnits = ExeUnits()) -> Template | str:
    """Return the template of a runtime that works here, or why it is not to be offered."""
    problem, _ = await exe_unit("test", runtime, units, SELF_TEST_S)
    if problem is not None:
        return problem
    problem, text = await exe_unit("offer-template", runtime, units, TEMPLATE_S, *units.flags())
    if problem is not None:
        return problem
    try:
        properties = json.loads(text)["properties"]
        if not isinstance(properties, dict):
            raise TypeError("properties are no object")
    except (ValueError, KeyError, TypeError) as error:
        return f"its offer template is not in order: {error!r}"
    return Template(runtime, properties)


async def exe_unit(command: str, runtime: str, units: ExeUnits, timeout_s: float, *flags: str) -> tuple[str | None, str]:
    """Run a short command of the exe-unit; return its problem (or None) and its output."""
    arguments = python_line("golem.exeunit", command, "--runtime", runtime, *flags)
    with trio.move_on_after(timeout_s):
        done = await trio.run_process(
            arguments, capture_stdout=True, capture_stderr=True, check=False, stdin=subprocess.DEVNULL, cwd=CWD,
            env=unit_environment(units.places),
        )  # fmt: skip
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        if done.returncode == 0:
            _tell(runtime, said)
            return None, done.stdout.decode("utf-8", "replace")
        return (said[-1] if said else f"status {done.returncode}").removeprefix("exe-unit: ")[:500], ""
    return f"no answer to `{command}` within {timeout_s:g} s", ""


def _tell(runtime: str, said: Sequence[str]) -> None:
    """Log what an exe-unit warns of, each of it once."""
    for line in said:
        warning = line.partition(" WARNING ")[2].partition(" ")[2]
        if warning and (runtime, warning) not in _TOLD and len(_TOLD) < MAX_TOLD:
            _TOLD.add((runtime, warning))
            log.warning("runtime %s: %s", runtime, warning[:500])


class Runtimes:
    """What is known of each runtime that somebody wants to sell. `watch` keeps it fresh."""

    def __init__(self, units: Callable[[], ExeUnits], ask: Ask = ask_runtime, interval_s: float = TEST_INTERVAL_S) -> None:
        self._units, self._ask, self._interval_s = units, ask, interval_s
        self.changes = 0  # how often a runtime became or ceased to be one that can be offered
        self._answers: dict[str, Template | str] = {}
        self._asked_with: dict[str, tuple[ExeUnits, object]] = {}
        self._watched: dict[str, trio.CancelScope] = {}
        self._fresh: set[str] = set()
        self._doubted: set[str] = set()

    def answer(self, runtime: str) -> Template | str:
        """Return the template of a runtime, or why it is not to be offered."""
        return self._answers.get(runtime, NOT_TESTED)

    def known(self) -> tuple[str, ...]:
        """Return the names of all runtimes, built-in ones first."""
        return (*runtime_names(), *catalogue(self._units().places).runtimes)

    def doubt(self, runtime: str) -> None:
        """Test a runtime soon: an exe-unit of it has ended badly."""
        self._doubted.add(runtime)

    async def test(self, runtimes: Iterable[str]) -> None:
        """Test those that were not tested yet, all at once, for START_S at most; who needs longer is tested on later."""
        with trio.move_on_after(START_S):
            async with trio.open_nursery() as nursery:
                for runtime in set(runtimes) - set(self._answers):
                    nursery.start_soon(self._first, runtime)

    async def _first(self, runtime: str) -> None:
        await self._look(runtime)
        self._fresh.add(runtime)

    async def _look(self, runtime: str) -> None:
        """Ask a runtime once; what worked a moment ago is given a second chance."""
        units, described = self._units(), self._description(runtime)
        found = await self._ask(runtime, units)
        if isinstance(found, str) and self._same(runtime, units, described) and not isinstance(self.answer(runtime), str):
            log.warning("runtime %s does not work any more: %s (tested once more in %g s)", runtime, found, RETRY_S)
            await trio.sleep(RETRY_S)
            found = await self._ask(runtime, units)
        self._asked_with[runtime] = (units, described)
        before = self._answers.get(runtime)
        if found != before:
            self._answers[runtime] = found
            self.changes += 1
            if isinstance(found, Template) and isinstance(before, str):
                log.info("runtime %s works now", runtime)

    def _same(self, runtime: str, units: ExeUnits, described: object) -> bool:
        return self._asked_with.get(runtime) == (units, described)

    def _description(self, runtime: str) -> object:
        """Return what a descriptor says of a runtime, for comparison."""
        return None if runtime in runtime_names() else catalogue(self._units().places).runtimes.get(runtime)

    def watch(self, nursery: trio.Nursery, runtimes: Iterable[str]) -> None:
        """Test these again from now on, in tasks of `nursery`, and no others."""
        wanted = set(runtimes)
        for gone in set(self._watched) - wanted:
            self._watched.pop(gone).cancel()
            self._answers.pop(gone, None)
        for runtime in wanted - set(self._watched):
            self._watched[runtime] = trio.CancelScope()
            nursery.start_soon(self._keep_testing, runtime, self._watched[runtime])

    async def _keep_testing(self, runtime: str, scope: trio.CancelScope) -> None:
        with scope:
            if runtime in self._fresh:
                await self._pause(runtime)
            while True:
                await self._look(runtime)
                await self._pause(runtime)

    async def _pause(self, runtime: str) -> None:
        """Wait for the next test; not for long once descriptor or settings are others, or the runtime is doubted."""
        step_s = min(2.0, self._interval_s)
        since = trio.current_time()
        while self._same(runtime, self._units(), self._description(runtime)):
            waited_s = trio.current_time() - since
            if waited_s >= (min(DOUBT_S, self._interval_s) if runtime in self._doubted else self._interval_s):
                break
            await trio.sleep(step_s)
        self._doubted.discard(runtime)

    def report(self, presets: Mapping[str, list[str]]) -> list[dict[str, Any]]:
        """Return what people are told of each runtime: `presets` are the names of those that sell it."""
        return [describe(name, self._units().places, self._answers.get(name), presets.get(name, [])) for name in self.known()]


def describe(name: str, places: str | None, answer: Template | str | None, presets: list[str]) -> dict[str, Any]:
    """Return one line of `exe-unit list`: name, version, kind, presets, whether it works, and why it is not offered."""
    one = catalogue(places).runtimes.get(name)
    version = one.version if one else ""
    if isinstance(answer, Template):
        version = str(answer.properties.get(RUNTIME_VERSION, version))
        reason = "" if presets else "no active preset sells it"
    else:
        reason = answer or ("no active preset sells it" if not presets else NOT_TESTED)
        version = version or _built_in_version(name)
    works = isinstance(answer, Template)
    return {
        "name": name, "version": version, "from": str(one.file) if one else "built in", "presets": presets,
        "works": works if answer else None, "offered": works and bool(presets), "reason": reason,
    }  # fmt: skip


def _built_in_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


async def survey(places: str | None, presets: Mapping[str, list[str]], ask: Ask = ask_runtime) -> list[dict[str, Any]]:
    """Test every runtime now and describe it, for a provider whose agent does not run. `presets`: active ones by runtime."""
    found = catalogue(places)
    answers: dict[str, Template | str] = {}

    async def look(name: str) -> None:
        answers[name] = await ask(name, ExeUnits(places))

    async with trio.open_nursery() as nursery:
        for name in (*runtime_names(), *found.runtimes):
            nursery.start_soon(look, name)
    rows = [describe(name, places, answers[name], presets.get(name, [])) for name in (*runtime_names(), *found.runtimes)]
    return [{**row, "offered": False, "reason": row["reason"] or "no agent runs"} for row in rows]


def check_known(runtimes: Iterable[str], places: str | None) -> str | None:
    """Return what is wrong with names of runtimes, None if there is each of them and its descriptor can be used."""
    found = catalogue(places)
    for runtime in runtimes:
        if runtime in runtime_names():
            continue
        if runtime not in found.runtimes:
            known = ", ".join([*runtime_names(), *found.runtimes])
            return "; ".join([f"unknown runtime {runtime!r}: this provider has {known}", *found.problems])
        try:
            found.runtimes[runtime].command()
        except DescriptorError as error:
            return str(error)
    return None
