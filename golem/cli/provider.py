"""`golem provider`: sell computing power. `run` is the agent itself; the other commands read and write its files."""

from __future__ import annotations

import json
import logging
import os
import sys
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from golem.base.dotenv_file import dot_env, load_environment
from golem.base.printing import set_up_logs
from golem.cli.client import ask_node, config_of
from golem.cli.output import done, fail, table, text, value, wants_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from golem.config import Config
    from golem.provider.presets import Preset, Presets

APP_KEY_NAME = "provider"


@click.group()
def provider() -> None:
    """Sell computing power."""


def _data_dir_option(function: Any) -> Any:
    kind = click.Path(path_type=Path, file_okay=False)
    text = "Where the agent keeps its state. [GOLEM_PROVIDER_DIR, or `provider` in the node's data directory]"
    return click.option("--data-dir", "agent_dir", type=kind, metavar="DIR", help=text)(function)


def _agent_dir(given: Path | None) -> Path:
    from golem.provider.settings import agent_dir

    return agent_dir(load_environment(), config_of().data_dir, given)


def _places_option(function: Any) -> Any:
    help_text = "Descriptors of more runtimes: files, directories, patterns. [EXE_UNIT_PATH, or `plugins` in --data-dir, ...]"
    return click.option("--exe-unit-path", "places", metavar="PATHS", help=help_text)(function)


def _interaction_options(function: Any) -> Any:
    shell = click.option("--shell/--no-shell", default=None,
                         help="Whether requestors may open shells in what they rent. [yes; kept]")  # fmt: skip
    proxy = click.option("--proxy-http/--no-proxy-http", default=None,
                         help="Whether requestors may reach services inside. [yes; kept]")  # fmt: skip
    return shell(proxy(function))


@provider.command("run")
@_data_dir_option
@click.option("--name", "--node-name", help="What requestors see. [NODE_NAME, or golem- and random digits; kept]")
@click.option("--subnet", help="Only requestors of the same subnet are served. [SUBNET, or public; kept]")
@click.option("--node-url", metavar="URL", help="REST API of the node. [YAGNA_API_URL, or the node of this data directory]")
@click.option("--runtime", "runtimes", multiple=True, metavar="NAME", help="Offer only this runtime (repeatable). [active ones]")
@click.option(
    "--max-agreements",
    type=click.IntRange(1, 1000),
    help="Requestors at once. [MAX_SIMULTANEOUS_AGREEMENTS, or threads of the hardware profile]",
)
@click.option(
    "--payment-network",
    "networks",
    multiple=True,
    help="Be paid only on this network or platform (repeatable). [YA_PAYMENT_NETWORK, or all]",
)
@click.option(
    "--idle-timeout",
    "idle_s",
    type=click.FloatRange(1, 86400),
    help="Seconds without an activity that end an agreement. [IDLE_AGREEMENT_TIMEOUT, or 90]",
)
@_places_option
@_interaction_options
@click.option("--debug", is_flag=True, help="Log much.")
def run(agent_dir: Path | None, name: str | None, subnet: str | None, node_url: str | None, runtimes: tuple[str, ...],
        max_agreements: int | None, networks: tuple[str, ...], idle_s: float | None, places: str | None, shell: bool | None,
        proxy_http: bool | None, debug: bool) -> None:  # fmt: skip
    """Run the provider agent until it is told to stop.

    The first Ctrl-C (or SIGTERM) withdraws the offers, ends the agreements and sends the invoices; a second stops at once.
    """
    import trio

    from actors.kernel.machine import ActorFailed, AskTimeout, NodeFailed
    from actors.kernel.records import JournalError
    from golem.provider.agent import run_agent
    from golem.provider.client import NodeError
    from golem.provider.environment import kept_settings, read_environment
    from golem.provider.offering import AgentError
    from golem.provider.settings import Settings, SettingsError, keep_interactions, names

    known_errors = (AgentError, NodeError, SettingsError, JournalError, ActorFailed, AskTimeout, NodeFailed)
    config, env = config_of(), load_environment()
    set_up_logs(logging.DEBUG if debug else logging.INFO, "%(asctime)s %(levelname)-7s %(message)s")
    for noisy in ("httpx", "httpcore", "trio", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if note := dot_env().note():
        logging.getLogger("golem.config").warning("%s", note)
    if not node_url:
        _check_file_url(config)
    key = env.get("YAGNA_APPKEY") or ask_node("app_key_create", name=APP_KEY_NAME)["key"]
    folder = _agent_dir(agent_dir)
    try:
        found, net = names(env, folder, name, subnet)
        keep_interactions(folder, shell=shell, proxy_http=proxy_http)
        given = read_environment(env, kept_settings(folder))
        settings = Settings(
            data_dir=folder, node_file=config.status_path, node_url=node_url or env.get("YAGNA_API_URL", ""), app_key=key,
            name=found, subnet=net, runtimes=runtimes, max_agreements=max_agreements or given.max_agreements,
            networks=networks or given.networks, idle_s=idle_s or given.idle_s, approve_timeout_s=given.approve_timeout_s,
            terms=given.terms, most=given.most, exe_unit_path=places or given.exe_unit_path,
            test_interval_s=given.test_interval_s, transfers=given.transfers,
        )  # fmt: skip
        trio.run(partial(run_agent, settings), restrict_keyboard_interrupt_to_checkpoints=True)
    except BaseExceptionGroup as group:
        known, rest = group.split((*known_errors, KeyboardInterrupt))
        if known is None or rest is not None:
            raise
        if known.subgroup(KeyboardInterrupt):
            sys.exit(130)
        raise fail("; ".join(str(error) for error in leaves(known))) from None
    except known_errors as error:
        raise fail(str(error)) from None
    except KeyboardInterrupt:
        sys.exit(130)


def _check_file_url(config: Config) -> None:
    """End the command where a `.env` names the node, but holds no key for it: ours is not for whom such a file names."""
    found = dot_env()
    if "YAGNA_API_URL" not in found.given or "YAGNA_APPKEY" in found.given:
        return
    url = os.environ["YAGNA_API_URL"].rstrip("/")
    try:
        own = str(json.loads(config.status_path.read_text())["apiUrl"]).rstrip("/")
    except (OSError, ValueError, KeyError, TypeError):
        own = ""
    if url != own:
        raise fail(f"{found.path} names the node {url} in YAGNA_API_URL, but no YAGNA_APPKEY for it: no other key is sent there")


def leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    """Return the exceptions of a group, without the groups in it."""
    return [leaf for one in group.exceptions for leaf in (leaves(one) if isinstance(one, BaseExceptionGroup) else [one])]


@provider.command("status")
@_data_dir_option
def status(agent_dir: Path | None) -> None:
    """What the agent is doing.

    Offers, agreements, activities, unpaid documents, and negotiations it refused, with the reasons.
    """
    from golem.provider.settings import SettingsError
    from golem.provider.status import SECTIONS, read_status

    try:
        found = read_status(_agent_dir(agent_dir))
    except SettingsError as error:
        raise fail(str(error)) from None
    if wants_json():
        value(found)
        return
    text(f"{found['name']} ({found['nodeId']}) on subnet {found['subnet']}: {found['state']}")
    text(f"serves {found.get('serves') or 'whom its rules say'}")
    for title, columns, key in SECTIONS:
        if key == "damaged" and not found.get(key):
            continue
        text("", title)
        rows = [[_cell(row[column]) for column in columns] for row in found.get(key, [])]
        table(columns, rows, "" if rows else "none")


def _cell(value: Any) -> Any:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


provider.add_command(status, "show")


# -- runtimes
@provider.group("exe-unit")
def exe_unit() -> None:
    """Runtimes: what an activity can run in."""


@exe_unit.command("list")
@_data_dir_option
@_places_option
def exe_unit_list(agent_dir: Path | None, places: str | None) -> None:
    """List the runtimes, built in and of descriptors.

    Which are offered, and why the others are not.

    A running agent is asked; without one each runtime is tested now.
    """
    import trio

    from golem.provider.environment import read_environment
    from golem.provider.presets import load_presets
    from golem.provider.runtimes import catalogue, search_places, survey
    from golem.provider.settings import SettingsError
    from golem.provider.status import read_status, runs

    folder = _agent_dir(agent_dir)
    try:
        where = search_places(places or read_environment(load_environment()).exe_unit_path, folder)
        if runs(folder):
            found = read_status(folder).get("runtimes", [])
        else:
            sold: dict[str, list[str]] = {}
            for one in load_presets(folder).offered():
                sold.setdefault(one.runtime, []).append(one.name)
            found = trio.run(survey, where, sold)
    except SettingsError as error:
        raise fail(str(error)) from None
    problems = catalogue(where).problems
    if wants_json():
        value({"runtimes": found, "problems": list(problems)})
        return
    columns = ["name", "version", "from", "presets", "works", "offered", "reason"]
    table(columns, [[_cell(", ".join(row[one]) if one == "presets" else row[one]) for one in columns] for row in found])
    for problem in problems:
        text(f"not usable: {problem}")


# -- settings
@provider.group(invoke_without_command=True)
@click.pass_context
def settings(context: click.Context) -> None:
    """What rules the agent, and where each value came from."""
    if context.invoked_subcommand is None:
        context.invoke(settings_show, agent_dir=None)


@settings.command("show")
@_data_dir_option
def settings_show(agent_dir: Path | None) -> None:
    """Show every setting, its value and where that came from."""
    _show_settings(_agent_dir(agent_dir))


@settings.command("set")
@click.argument("assignments", nargs=-1, metavar="[NAME=VALUE]...")
@_data_dir_option
@click.option("--node-name", "--name", help="What requestors see; from the agent's next start on.")
@click.option("--subnet", help="Only requestors of the same subnet are served; from the agent's next start on.")
@_interaction_options
def settings_set(
    assignments: tuple[str, ...], agent_dir: Path | None, node_name: str | None, subnet: str | None, shell: bool | None,
    proxy_http: bool | None,
) -> None:  # fmt: skip
    """Change what is kept; an empty VALUE goes back to the default. Variables of the environment count more.

    A running agent takes --shell and --proxy-http up within a minute, for new activities; all else at its next start.
    """
    from golem.provider.environment import keep_settings
    from golem.provider.settings import SettingsError, keep_interactions, names

    folder = _agent_dir(agent_dir)
    try:
        if wrong := [one for one in assignments if "=" not in one]:
            raise SettingsError(f"expected NAME=VALUE, not {wrong[0][:100]!r}")
        keep_settings(folder, {name: text for name, _, text in (one.partition("=") for one in assignments)})
        names({}, folder, node_name, subnet)
        keep_interactions(folder, shell=shell, proxy_http=proxy_http)
    except SettingsError as error:
        raise fail(str(error)) from None
    _show_settings(folder)


def _show_settings(folder: Path) -> None:
    from golem.provider.environment import describe, kept_settings
    from golem.provider.settings import SWITCHES, SettingsError, interactions, names

    env = load_environment()
    try:
        name, subnet = names({}, folder, None, None)
        allowed = interactions(folder)
        described = describe(env, kept_settings(folder), dot_env().given)
    except SettingsError as error:
        raise fail(str(error)) from None
    found = {"node_name": name, "subnet": subnet, **{key: kind in allowed for key, kind in SWITCHES.items()}}
    if wants_json():
        value({**found, "settings": described})
        return
    table(["setting", "value"], [[key, _cell(one)] for key, one in found.items()])
    text("")
    rows = [[one["name"], "" if one["value"] is None else f"{one['value']} {one['unit']}".strip(), one["from"], one["what"]]
            for one in described]  # fmt: skip
    table(["setting", "value", "from", "what it is"], rows)


# -- presets
@provider.group()
def preset() -> None:
    """Prices: an active preset is an offer. A running agent takes changes up at once."""


def _presets(folder: Path) -> Presets:
    from golem.provider.presets import load_presets
    from golem.provider.settings import SettingsError

    try:
        return load_presets(folder)
    except SettingsError as error:
        raise fail(str(error)) from None


def _change(given: Path | None, change: Callable[[Presets], Presets], name: str) -> None:
    """Replace the presets by what `change` makes of them, and say how the one of this name is now."""
    from golem.provider.presets import save_presets
    from golem.provider.settings import SettingsError

    folder = _agent_dir(given)
    try:
        found = change(_presets(folder))
        save_presets(folder, found)
    except SettingsError as error:
        raise fail(str(error)) from None
    one = next((one for one in found.all if one.name == name), None)
    if one is None:
        done(f"There is no preset {name!r} any more.")
        return
    active = "an agent that runs offers it" if name in found.active else f"not offered: golem provider preset activate {name}"
    prices = f"GLM a unit: {_prices(one)}, once at the start: {_plain(one.initial_price)}"
    done(f"Preset {name!r} sells {one.runtime}; {prices} ({active}).")


def _prices(one: Preset) -> str:
    return ", ".join(f"{counter.removeprefix('golem.usage.')} {_plain(price)}" for counter, price in sorted(one.coeffs.items()))


def _check_runtime(folder: Path, runtime: str) -> None:
    """Raises `SettingsError` for a runtime that this provider does not have."""
    from golem.exeunit.runtimes import runtime_names
    from golem.provider.environment import read_environment
    from golem.provider.runtimes import catalogue, search_places
    from golem.provider.settings import SettingsError

    known = [*runtime_names(), *catalogue(search_places(read_environment(load_environment()).exe_unit_path, folder)).runtimes]
    if runtime not in known:  # one that is known and does not work is another matter, which `exe-unit list` tells
        raise SettingsError(f"unknown runtime {runtime!r}: this provider has {', '.join(known)} (golem provider exe-unit list)")


@preset.command("list")
@_data_dir_option
def preset_list(agent_dir: Path | None) -> None:
    """List the presets, and whether a running agent offers them."""
    from golem.provider.presets import preset_json

    folder = _agent_dir(agent_dir)
    found = _presets(folder)
    offered = _offered(folder)
    if wants_json():
        value([preset_json(one) | {"active": one.name in found.active, "offered": offered(one)} for one in found.all])
        return
    rows = [
        [one.name, one.runtime, _cell(one.name in found.active), offered(one), _plain(one.initial_price), _prices(one)]
        for one in found.all
    ]  # fmt: skip
    table(["name", "runtime", "active", "offered", "start price", "prices per unit (GLM)"], rows)


def _offered(folder: Path) -> Callable[[Preset], str]:
    """Return what says whether the agent of a directory offers a preset: yes, or why not."""
    from golem.provider.settings import SettingsError
    from golem.provider.status import read_status, runs

    try:
        found = read_status(folder) if runs(folder) else {}
    except SettingsError:
        found = {}
    published = {one["preset"] for one in found.get("offers", [])}
    reasons = {one["name"]: one["reason"] for one in found.get("runtimes", [])}

    def answer(preset: Preset) -> str:
        if preset.name in published:
            return "yes"
        return f"no: {reasons.get(preset.runtime) or 'not active'}" if found else "no agent runs"

    return answer


def _plain(price: float) -> str:
    """Return a price without an exponent."""
    return format(Decimal(repr(price)), "f")


def _price_options(function: Any) -> Any:
    prices = click.option("--price", "prices", multiple=True, metavar="COUNTER=GLM",
                          help="Price of a unit: CPU= and Duration= (s), Memory= and Storage= (GiB), 'Init price='.")  # fmt: skip
    hidden = click.option("--no-interactive", is_flag=True, hidden=True)
    pricing = click.option("--pricing", type=click.Choice(["linear"]), hidden=True)
    return prices(hidden(pricing(_data_dir_option(function))))


def _priced(one: Any, prices: tuple[str, ...]) -> Any:
    from dataclasses import replace

    from golem.provider.presets import parse_price

    coeffs, initial = dict(one.coeffs), one.initial_price
    for counter, price in map(parse_price, prices):
        if counter is None:
            initial = price
        else:
            coeffs[counter] = price
    return replace(one, coeffs=coeffs, initial_price=initial)


@preset.command("create")
@click.argument("name", required=False)
@click.option("--preset-name", hidden=True)
@click.option("--exe-unit", "--runtime", "runtime", default="wasmtime", show_default=True, help="The runtime it sells.")
@_price_options
def preset_create(
    name: str | None, preset_name: str | None, runtime: str, prices: tuple[str, ...], agent_dir: Path | None, **_: Any
) -> None:
    """Make a preset (not yet active). Without --price it has the default prices."""
    from golem.provider.presets import Preset, check_name, default_preset
    from golem.provider.settings import SettingsError

    def change(found: Presets) -> Presets:
        new = check_name(name or preset_name)
        if any(one.name == new for one in found.all):
            raise SettingsError(f"there is a preset {new!r} already; change it with `preset update`")
        _check_runtime(_agent_dir(agent_dir), check_name(runtime))
        base = Preset(new, runtime, {} if prices else default_preset(runtime).coeffs)
        return found.with_preset(_priced(base, prices))

    _change(agent_dir, change, name or preset_name or "")


@preset.command("update")
@click.argument("name", required=False)
@click.option("--preset-name", hidden=True)
@click.option("--exe-unit", "--runtime", "runtime", help="The runtime it sells.")
@_price_options
def preset_update(
    name: str | None, preset_name: str | None, runtime: str | None, prices: tuple[str, ...], agent_dir: Path | None, **_: Any
) -> None:
    """Change prices or runtime of a preset."""
    from dataclasses import replace

    from golem.provider.presets import check_name

    def change(found: Presets) -> Presets:
        one = found.named(name or preset_name or "")
        if runtime:
            _check_runtime(_agent_dir(agent_dir), check_name(runtime))
            one = replace(one, runtime=runtime)
        return found.with_preset(_priced(one, prices))

    _change(agent_dir, change, name or preset_name or "")


@preset.command("remove")
@click.argument("name")
@_data_dir_option
def preset_remove(name: str, agent_dir: Path | None) -> None:
    """Delete a preset."""
    _change(agent_dir, lambda found: found.without(name), name)


@preset.command("activate")
@click.argument("name")
@_data_dir_option
def preset_activate(name: str, agent_dir: Path | None) -> None:
    """Offer a preset."""
    _change(agent_dir, lambda found: found.activated(name, True), name)


@preset.command("deactivate")
@click.argument("name")
@_data_dir_option
def preset_deactivate(name: str, agent_dir: Path | None) -> None:
    """Offer a preset no more."""
    _change(agent_dir, lambda found: found.activated(name, False), name)


def register(main: click.Group) -> None:
    main.add_command(provider)
