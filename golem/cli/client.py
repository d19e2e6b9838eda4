"""How a command reaches the running node: a call over the bus, JSON in, JSON out."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import click
import trio

from golem.base.dotenv_file import load_environment
from golem.cli.output import fail
from golem.config import Config, ConfigError, config_from


def config_of(context: click.Context | None = None, **flags: Any) -> Config:
    """Return the configuration of the command at hand. Ends the command where it cannot be used."""
    root = (context or click.get_current_context()).find_root()
    try:
        return config_from(load_environment(), data_dir=root.params.get("datadir"), **flags)
    except ConfigError as error:
        raise fail(str(error)) from None


def ask_node(command: str, timeout_s: float = 60.0, **args: Any) -> Any:
    """Return the running node's answer to `command`. Ends the command with a plain message when there is none."""
    config = config_of()
    try:
        # at checkpoints only: elsewhere, in a callback of the interpreter for one, an exception would be lost
        return trio.run(partial(_ask, config, command, args, timeout_s), restrict_keyboard_interrupt_to_checkpoints=True)
    except BaseExceptionGroup as group:  # Ctrl-C inside a nursery
        if group.subgroup(KeyboardInterrupt) is None:
            raise
        raise KeyboardInterrupt from None


async def _ask(config: Config, command: str, args: dict[str, Any], timeout_s: float) -> Any:
    from golem.bus.client import open_client
    from golem.bus.wire import BusError
    from golem.net.types import RemoteError, Unreachable

    try:
        async with open_client(config.bus_path, f"cli:{command}", "cli") as client:
            return json.loads(await client.call("", f"cli:{command}", json.dumps(args).encode(), timeout_s))
    except (BusError, OSError):
        raise fail(
            f"no node is running on {config.data_dir} (start one with `golem run`, or name another with golem --data-dir DIR)"
        ) from None
    except RemoteError as error:
        raise fail(str(error)) from None
    except Unreachable as error:
        raise fail(f"the node did not answer: {error}") from None


def get(path: str, **query: Any) -> Any:
    """Return what the node's REST API answers to a GET. Ends the command with the API's message when it refuses."""
    return call("GET", path, **query)


def call(method: str, path: str, **query: Any) -> Any:
    """Return what the node's REST API answers. Ends the command with the API's message when it refuses."""
    import httpx

    access = ask_node("rest_access")
    headers = {"Authorization": f"Bearer {access['key']}"}
    try:
        answer = httpx.request(method, access["url"] + path, params=query, headers=headers, timeout=60, trust_env=False)
    except httpx.HTTPError as error:
        raise fail(f"the node's REST API did not answer: {error}") from None
    if answer.status_code > 299:
        try:
            message = answer.json()["message"]
        except (ValueError, KeyError, TypeError):
            message = answer.text[:300]
        raise fail(f"{message} ({answer.status_code})")
    return answer.json()
