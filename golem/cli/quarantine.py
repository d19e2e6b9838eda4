"""`golem quarantine`: messages that crashed their actor and were set aside."""

from __future__ import annotations

import click

from golem.cli.client import ask_node
from golem.cli.output import done, table, value

EMPTY = "Nothing is set aside."
NUMBER = click.argument("number", type=click.IntRange(min=1))


@click.group()
def quarantine() -> None:
    """Messages that crashed their actor and were set aside.

    Their senders were told. A message can be handled after all (release) or forgotten (drop).
    """


@quarantine.command("list")
def quarantine_list() -> None:
    """List them."""
    keys = ("number", "at", "actor", "sender", "error", "trace")
    rows = [[one[key] for key in keys] for one in ask_node("quarantine_list")]
    table(keys, rows, "" if rows else EMPTY)


@quarantine.command("show")
@NUMBER
def quarantine_show(number: int) -> None:
    """Show one, with its content."""
    value(ask_node("quarantine_show", number=number))


@quarantine.command("release")
@NUMBER
def quarantine_release(number: int) -> None:
    """Have its actor handle it after all.

    It stays when that fails again.
    """
    ask_node("quarantine_release", number=number)
    done(f"Message {number} was handled.")


@quarantine.command("drop")
@NUMBER
def quarantine_drop(number: int) -> None:
    """Forget it."""
    ask_node("quarantine_drop", number=number)
    done(f"Message {number} is forgotten.")


def register(main: click.Group) -> None:
    main.add_command(quarantine)
