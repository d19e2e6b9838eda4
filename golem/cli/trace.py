"""`golem trace`: the story of one command, as this node's actors lived it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from actors.kernel.trace import story
from golem.cli.client import config_of
from golem.cli.output import fail, text


def _lines(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("steps.log*"), reverse=True):
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from file


@click.command()
@click.argument("trace_id")
def trace(trace_id: str) -> None:
    """Print the story of a command.

    Each answer of the REST API has a trace id in its header X-Trace-Id; messages of internal errors and log lines name it.
    """
    folder = config_of().data_dir
    found = story(_lines(folder), trace_id)
    if not found:
        raise fail(f"nothing in {folder}/steps.log under trace {trace_id}")
    text(*found)


def register(main: click.Group) -> None:
    main.add_command(trace)
