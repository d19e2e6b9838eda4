"""How commands print: tables, objects and texts for people, or JSON with `--json` (tables keyed by column title).

Much of what is printed comes from other nodes: nothing of it commands the terminal, counts as markup, or makes a line of
its own (`golem/base/printing.py`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import click

from golem.base.printing import printable as printable
from golem.base.printing import quoted

if TYPE_CHECKING:
    from rich.console import Console

MARGIN = 4  # beside a column, at most
MOST_CHARS = 1000  # of a cell


@cache
def console() -> Console:
    """Return the terminal to print tables on. (rich is imported where something is drawn: it takes longer than most commands.)"""
    from rich.console import Console

    return Console(soft_wrap=True, highlight=False)


def wants_json() -> bool:
    """Return whether the user asked for machine output."""
    context = click.get_current_context(silent=True)
    return bool(context and context.find_root().params.get("as_json"))


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> None:
    """Print rows under titled columns. `note` is a line for people below the table."""
    if wants_json():
        click.echo(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=2))
        return
    if note and not rows:
        text(note)
        return
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = [["" if cell is None else quoted(_cut(str(cell))) for cell in row] for row in rows]
    is_wide = not sys.stdout.isatty()
    view = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", show_header=any(columns))
    for number, title in enumerate(columns):  # a cell that is wrapped begins lines, which must not look like rows
        view.add_column(title, no_wrap=is_wide or not number, overflow="fold" if number else "ellipsis")
    for row in shown:
        view.add_row(*map(Text, row))
    if not is_wide:
        console().print(view)
    else:  # a pipe has no width: never cut or wrap what a script reads
        widths = (max(map(cell_len, column), default=0) for column in zip_longest(columns, *shown, fillvalue=""))
        wide = Console(width=sum(widths) + MARGIN * len(columns), highlight=False, color_system=None)
        with wide.capture() as captured:
            wide.print(view)
        text(*(line.rstrip() for line in captured.get().splitlines() if line.strip()))
    if note:
        console().print(quoted(note), style="dim", markup=False)


def _cut(cell: str) -> str:
    return cell if len(cell) <= MOST_CHARS else f"{cell[:MOST_CHARS]}... of {len(cell)} characters"


def value(found: Any) -> None:
    """Print an object like YAML, or as JSON."""
    if wants_json():
        click.echo(json.dumps(found, indent=2))
    elif isinstance(found, Mapping | list):
        text(*(_lines(found, 0) or ["{}"]))
    elif found is not None:
        text(str(found))


def _lines(found: Any, depth: int) -> list[str]:
    indent = "  " * depth
    lines: list[str] = []
    pairs = found.items() if isinstance(found, Mapping) else ((None, item) for item in found)
    for key, item in pairs:
        head = f"{indent}- " if key is None else f"{indent}{quoted(str(key))}: "
        if isinstance(item, Mapping | list) and item:
            nested = _lines(item, depth + 1)
            if key is None:
                lines += [head + nested[0].strip(), *nested[1:]]
            else:
                lines += [head.rstrip(), *nested]
        else:
            shown = {None: "~", True: "true", False: "false"}.get(item) if isinstance(item, bool | None) else quoted(str(item))
            lines.append(head + str(shown))
    return lines


def done(line: str) -> None:
    """A command without a result: for people a line that says what is true now, `null` for machines."""
    text("null" if wants_json() else line)


def text(*lines: str) -> None:
    """Print lines of plain text."""
    for line in lines:
        click.echo(quoted(line))


def say(line: str, *, end: str = "\n") -> None:
    """Tell a person something beside the result (standard error). `end`: of the line, which a raw terminal wants whole."""
    click.echo(quoted(line) + end, nl=False, err=True)


def fail(message: str) -> click.ClickException:
    """Return the error that ends a command with a message and a non-zero status."""
    return click.ClickException(quoted(message))
