"""The node's side of the command line: `cli:<command>` calls of the bus, JSON in, JSON out.

Only processes of this machine that may open the bus (the user's own) reach these.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from golem.node.node import Node

Command = Callable[["Node", dict[str, Any]], Awaitable[Any]]
COMMANDS: dict[str, Command] = {}


def command(function: Command) -> Command:
    """Register `function` under its name, which no other has."""
    assert function.__name__ not in COMMANDS, f"two commands are called {function.__name__}"
    COMMANDS[function.__name__] = function
    return function
