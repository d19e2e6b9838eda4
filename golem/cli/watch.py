"""How `golem activity watch` shows what happens: a line for what has happened, a bar for what is happening."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from golem.base.printing import printable, quoted

MAX_LINE_CHARS = 160
MAX_BYTES = 1 << 63  # no honest count is higher, and longer numbers do not divide or print
PAUSE_S = 1.0


class Watcher:
    """Tells of events. `plain`: the output is no terminal, so progress becomes lines."""

    def __init__(self, console: Console, plain: bool) -> None:
        self._console, self._plain = console, plain
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=console,
            transient=True, disable=plain,
        )  # fmt: skip
        self._names: dict[tuple[str, int], str] = {}
        self._tasks: dict[tuple[str, int], TaskID] = {}
        self._state: tuple[Any, ...] = ()

    def __enter__(self) -> Watcher:
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()

    def state(self, state: str, reason: str | None, error: str | None, problem: str | None) -> None:
        """Say the activity's state where it is another than before."""
        now = (state, reason, error, problem)
        if now != self._state:
            self._state = now
            why = ": ".join(part for part in (reason, error) if part)
            self._line(f"[bold]{escape(state)}[/bold]{' - ' + escape(why) if why else ''}")
            if problem:
                self._line(f"[yellow]the exe-unit cannot be asked: {escape(problem)}[/yellow]")

    def pause(self) -> None:
        """Wait before the next question to an exe-unit that cannot be asked."""
        time.sleep(PAUSE_S)

    def tell(self, event: dict[str, Any]) -> None:
        """Show one event of `activity_watch`."""
        key = (event["batch"], event["index"])
        match event["kind"]:
            case {"started": {"command": dict() as command}}:
                self._names[key] = name = describe(command)
                self._line(f"[cyan]>[/cyan] {escape(name)}")
            case {"finished": {"return_code": code, **rest}}:
                self._end(key, code == 0, rest.get("message"))
            case {"progress": {"progress": [int() as done, total], **rest}} if 0 <= done < MAX_BYTES:
                known = isinstance(total, int) and 0 <= total < MAX_BYTES
                self._progress(key, done, total if known else None, rest.get("message"))
            case {"stdout": output}:
                self._output(output, "")
            case {"stderr": output}:
                self._output(output, "red")

    def _end(self, key: tuple[str, int], ok: bool, message: Any) -> None:
        if (task := self._tasks.pop(key, None)) is not None:
            self._bars.remove_task(task)
        name = self._names.pop(key, f"command {key[1]}")
        mark = "[green]ok[/green]" if ok else "[red]failed[/red]"
        self._line(f"{mark} {escape(name)}{escape(f': {message}') if message else ''}")

    def _progress(self, key: tuple[str, int], done: int, total: int | None, message: Any) -> None:
        name = self._names.get(key, f"command {key[1]}")
        if message:
            self._line(f"  {escape(name)}: {escape(str(message))}")
        if self._plain:
            share = f" of {total} ({done / total:.0%})" if total else ""
            if not message:
                self._line(f"  {escape(name)}: {done}{share} bytes")
            return
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(escape(quoted(name[:40])), total=total)
        self._bars.update(self._tasks[key], completed=done, total=total)

    def _output(self, output: Any, style: str) -> None:
        try:
            shown = bytes(output).decode(errors="replace") if isinstance(output, list) else str(output)
        except (TypeError, ValueError, OverflowError):
            shown = "(malformed output)\n"
        self._console.print(printable(shown), end="", style=style or None, markup=False)

    def _line(self, line: str) -> None:
        self._console.print(quoted(line))


def describe(command: dict[str, Any]) -> str:
    """Return a command of a script as a line for people."""
    ((kind, args),) = command.items() if len(command) == 1 else (("command", None),)
    args = args if isinstance(args, dict) else {}
    words = [str(kind)]
    if kind == "run":
        words += [str(args.get("entry_point", "")), *map(str, args.get("args") or ())]
    elif kind == "transfer":
        words += [str(args.get("from", "")), "->", str(args.get("to", ""))]
    line = quoted(" ".join(words).replace("\n", " "))
    return line if len(line) <= MAX_LINE_CHARS else line[: MAX_LINE_CHARS - 3] + "..."
