"""`golem provider`: sell computing power. `run` is the agent itself; the other commands read and write its files."""

from __future__ import annotations

import logging
import sys
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from golem.cli.client import ask_node, config_of
from golem.cli.output import fail, nothing, table, text, value, wants_json
from golem.config import load_environment

if TYPE_CHECKING:
    from golem.provider.presets import Presets

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


@provider.command("run")
@_data_dir_option
@click.option("--name", "--node-name", help="What requestors see. [NODE_NAME, or golem-<host name>; kept]")
@click.option("--subnet", help="Only requestors of the same subnet are served. [SUBNET, or public; kept]")
@click.option("--node-url", metavar="URL", help="REST API of the node. [YAGNA_API_URL, or the node of this data directory]")
@click.option("--runtime", "runtimes", multiple=True, metavar="NAME", help="Offer only this runtime (repeatable). [active ones]")
@click.option("--max-agreements", type=click.IntRange(1, 1000),
              help="Requestors at once. [MAX_SIMULTANEOUS_AGREEMENTS, or threads of the hardware profile]")
@click.option("--payment-network", "networks", multiple=True,
              help="Be paid only on this network or platform (repeatable). [YA_PAYMENT_NETWORK, or all]")
@click.option("--idle-timeout", "idle_s", type=click.FloatRange(1, 86400),
              help="Seconds without an activity that end an agreement. [IDLE_AGREEMENT_TIMEOUT, or 90]")
@click.option("--debug", is_flag=True, help="Log much.")
def run(agent_dir: Path | None, name: str | None, subnet: str | None, node_url: str | None, runtimes: tuple[str, ...],
        max_agreements: int | None, networks: tuple[str, ...], idle_s: float | None, debug: bool) -> None:  # fmt: skip
    """Run the provider agent until it is told to stop.

    The first Ctrl-C (or SIGTERM) withdraws the offers, ends the agreements and sends the invoices; a second stops at once.
    """
    import trio

    from actors.kernel.journal import JournalError
    from actors.kernel.machine import ActorFailed, AskTimeout, NodeFailed
    from golem.provider.agent import AgentError, run_agent
    from golem.provider.client import NodeError
    from golem.provider.environment import read_environment
    from golem.provider.settings import Settings, SettingsError, names

    known_errors = (AgentError, NodeError, SettingsError, JournalError, ActorFailed, AskTimeout, NodeFailed)
    config, env = config_of(), load_environment()
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(message)s"
    )
    for noisy in ("httpx", "httpcore", "trio", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    key = env.get("YAGNA_APPKEY") or ask_node("app_key_create", name=APP_KEY_NAME)["key"]
    folder = _agent_dir(agent_dir)
    try:
        found, net = names(env, folder, name, subnet)
        given = read_environment(env)
        settings = Settings(
            data_dir=folder, node_file=config.status_path, node_url=node_url or env.get("YAGNA_API_URL", ""), app_key=key,
            name=found, subnet=net, runtimes=runtimes, max_agreements=max_agreements or given.max_agreements,
            networks=networks or given.networks, idle_s=idle_s or given.idle_s, approve_timeout_s=given.approve_timeout_s,
            terms=given.terms, most=given.most,
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
    from golem.provider.status import read_status

    try:
        found = read_status(_agent_dir(agent_dir))
    except SettingsError as error:
        raise fail(str(error)) from None
    if wants_json():
        value(found)
        return
    text(f"{found['name']} ({found['nodeId']}) on subnet {found['subnet']}: {found['state']}")
    sections = (
        ("Offers", ["preset", "offer", "state"], "offers"),
        ("Agreements", ["agreement", "requestor", "state", "activities", "amount", "invoice", "reason"], "agreements"),
        ("Activities", ["activity", "agreement", "state", "pid", "amount", "notes"], "activities"),
        ("Unpaid", ["document", "kind", "agreement", "amount", "state"], "unpaid"),
        ("Refused negotiations (last 20)", ["at", "requestor", "preset", "final", "reason"], "refused"),
    )
    for title, columns, key in sections:
        text(f"\n{title}")
        table(columns, [[row[column] for column in columns] for row in found[key]], "" if found[key] else "none")


provider.add_command(status, "show")


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


def _change(given: Path | None, change: Any) -> None:
    """Replace the presets by what `change` makes of them."""
    from golem.provider.presets import save_presets
    from golem.provider.settings import SettingsError

    folder = _agent_dir(given)
    try:
        save_presets(folder, change(_presets(folder)))
    except SettingsError as error:
        raise fail(str(error)) from None
    nothing()


@preset.command("list")
@_data_dir_option
def preset_list(agent_dir: Path | None) -> None:
    """List the presets."""
    from golem.provider.presets import preset_json

    found = _presets(_agent_dir(agent_dir))
    if wants_json():
        value([preset_json(one) | {"active": one.name in found.active} for one in found.all])
        return
    rows = [
        [one.name, one.runtime, "yes" if one.name in found.active else "no", _plain(one.initial_price),
         ", ".join(f"{counter.removeprefix('golem.usage.')} {_plain(price)}" for counter, price in sorted(one.coeffs.items()))]
        for one in found.all
    ]  # fmt: skip
    table(["name", "runtime", "active", "start price", "prices per unit (GLM)"], rows)


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
    from golem.provider.presets import Preset, check_name
    from golem.provider.settings import SettingsError

    def change(found: Presets) -> Presets:
        new = check_name(name or preset_name)
        if any(one.name == new for one in found.all):
            raise SettingsError(f"there is a preset {new!r} already; change it with `preset update`")
        base = Preset(new, check_name(runtime), {}) if prices else Preset(new, check_name(runtime))
        return found.with_preset(_priced(base, prices))

    _change(agent_dir, change)


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
        one = replace(one, runtime=check_name(runtime)) if runtime else one
        return found.with_preset(_priced(one, prices))

    _change(agent_dir, change)


@preset.command("remove")
@click.argument("name")
@_data_dir_option
def preset_remove(name: str, agent_dir: Path | None) -> None:
    """Delete a preset."""
    _change(agent_dir, lambda found: found.without(name))


@preset.command("activate")
@click.argument("name")
@_data_dir_option
def preset_activate(name: str, agent_dir: Path | None) -> None:
    """Offer a preset."""
    _change(agent_dir, lambda found: found.activated(name, True))


@preset.command("deactivate")
@click.argument("name")
@_data_dir_option
def preset_deactivate(name: str, agent_dir: Path | None) -> None:
    """Offer a preset no more."""
    _change(agent_dir, lambda found: found.activated(name, False))


def register(main: click.Group) -> None:
    main.add_command(provider)
