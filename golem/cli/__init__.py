"""The command line, `golem` (alias `yagna`). Commands talk to the running node over its bus; see `golem/control/command.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from golem.base.printing import guard_stderr, quoted
from golem.cli.client import ask_node
from golem.cli.output import table, text, value, wants_json
from golem.config import VERSION

#: What `golem status` says of things that wait: name in the answer, title, columns.
MODULES = (
    "run", "identity", "net", "payment", "market", "activity", "provider", "image", "chain", "quarantine", "backup", "trace",
    "wallet", "reference",
)  # fmt: skip
WAITING = {
    "links": ("Messages that are not delivered yet:", ["actor", "waits for", "why"]),
    "restarts": ("Actors that crashed and were started again, since this node started:", ["actor", "times"]),
    "queues": ("Messages that wait for an actor:", ["actor", "messages"]),
    "timers": ("Timers that could not be handled, and come again:", ["actor", "what", "error", "tries", "next try"]),
    "damagedRows": ("Stored rows that cannot be read; what needs them waits:", ["actor", "row", "why"]),
    "clocks": ("Peers whose clocks and ours differ: no session with them:", ["peer", "why"]),
    "olderPeers": ("Peers that spoke from an older or copied journal, and were not heard:", ["peer", "what is amiss"]),
    "wentBack": ("Disks that were lost or put back since this node started (agreements and payments are compared again):",
                 ["when", "peer", "what is forgotten"]),
    "violators": ("Peers that broke the protocol within the last hour:", ["peer", "how often, and what comes of it"]),
    "quarantine": ("Messages set aside, since they crashed their actor (golem quarantine --help):",
                   ["number", "actor", "sender", "error"]),
}  # fmt: skip
HELP = {"help_option_names": ["-h", "--help"]}


class _Failure(click.ClickException):
    """An error as programs read it: one line of JSON on standard error, like the REST API's bodies."""

    def __init__(self, error: click.ClickException) -> None:
        super().__init__(error.format_message())
        self.exit_code = error.exit_code  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        click.echo(json.dumps({"message": quoted(self.message), "status": self.exit_code}), err=True, file=file)


class _Commands(click.Group):
    """The root of all commands. With `--json` an error is JSON, too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with _failing(lambda: "--json" in args):
            return super().parse_args(ctx, [*args])

    def invoke(self, ctx: click.Context) -> Any:
        words = [*ctx._protected_args, *ctx.args]  # of a command that cannot be read its own `--json` counts as well
        asked = "--json" in words[: words.index("--") if "--" in words else len(words)]
        with _failing(lambda: asked or bool(ctx.params.get("as_json"))):
            return super().invoke(ctx)


@contextmanager
def _failing(as_json: Callable[[], bool]) -> Iterator[None]:
    try:
        yield
    except click.ClickException as error:
        if not as_json():
            raise
        raise _Failure(error) from None


@click.group(cls=_Commands, context_settings=HELP)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.option("-d", "--data-dir", "--datadir", "datadir", metavar="DIR", help="Where the node keeps its state. [GOLEM_DATA_DIR]")
@click.option("-g", "--gsb-url", hidden=True, help="Accepted for scripts; the bus is a socket in the data directory.")
@click.option("--accept-terms", is_flag=True, hidden=True)
@click.version_option(VERSION, prog_name="golem")
def main(**_: Any) -> None:
    """A node of the Golem network: buy and sell computing power.

    `golem run` starts the node; the other commands talk to it.
    """
    guard_stderr()


@main.command()
def status() -> None:
    """What the node is doing, and what is stuck."""
    found = ask_node("status")
    if wants_json():
        value(found)
        return
    waiting = {name: found.pop(name) for name in WAITING}
    value(found)
    for name, (title, columns) in WAITING.items():
        if waiting[name]:
            text("", title)
            table(columns, waiting[name])


def _register() -> None:
    """Commands that live in modules of their own."""
    for name in MODULES:
        import_module(f"golem.cli.{name}").register(main)


def _json_anywhere(command: click.Command) -> None:
    """Let `--json` stand behind a command's name as well, as in the reference."""

    def ask_for_json(context: click.Context, _: click.Parameter, given: bool) -> None:
        if given:
            context.find_root().params["as_json"] = True

    for one in command.commands.values() if isinstance(command, click.Group) else ():
        if any("--json" in parameter.opts for parameter in one.params):  # a command with two names
            continue
        option = click.Option(["--json"], is_flag=True, hidden=True, expose_value=False, is_eager=True, callback=ask_for_json)
        one.params.append(option)
        _json_anywhere(one)


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def complete(shell: str) -> None:
    """Print a shell's completion script.

    \b
    bash, zsh:  eval "$(golem complete bash)"
    fish:       golem complete fish | source
    """
    from click.shell_completion import get_completion_class

    name = Path(sys.argv[0]).name
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(main, {}, name, f"_{name.upper().replace('-', '_')}_COMPLETE").source())


_register()
_json_anywhere(main)
