"""`golem activity`: what runs, and a hand inside what runs.

Ids may be shortened as long as they fit one activity. Neighbours: `golem/control/activity.py` answers over the bus;
`terminal.py` holds the user's end of a program; REST does the rest.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

from golem.cli.client import ask_node, call
from golem.cli.output import console, done, fail, table, text, value, wants_json

WATCH_S = 10.0


@click.group()
def activity() -> None:
    """What runs, and a hand inside it."""


@activity.command("list")
@click.option("-a", "--all", "everything", is_flag=True, help="Those that have ended, too.")
def activity_list(everything: bool) -> None:
    """List the activities that run, of both roles."""
    found = ask_node("activity_list", all=everything)
    columns = ["id", "role", "state", "runtime", "age", "usage", "cost", "peer"]
    rows = [
        [one["id"], one["role"], one["state"], one["runtime"], _age(one["age_s"]), _usage(one["usage"]), one["cost"], one["peer"]]
        for one in found
    ]
    table(columns, rows, "" if rows else "No activities." if everything else "No activities run (--all shows those that ended).")


@activity.command("status")
def activity_status() -> None:
    """Count the activities by state, of the last hour and in all."""
    value(ask_node("activity_counts"))


@activity.command("show")
@click.argument("activity_id", metavar="ID")
def activity_show(activity_id: str) -> None:
    """Show an activity and its batches."""
    found = ask_node("activity_show", id=activity_id)
    value(found if wants_json() else {name: item for name, item in found.items() if item not in (None, [], {})})


@activity.command("watch")
@click.argument("activity_id", metavar="ID")
def activity_watch(activity_id: str) -> None:
    """Tell what happens in an activity.

    Commands, their output and the progress of transfers, from the beginning (as far as it is kept) until it ends.
    """
    from golem.cli.watch import Watcher

    found = ask_node("activity_find", id=activity_id)
    after = -1
    with Watcher(console(), plain=not sys.stdout.isatty()) as watcher:
        while True:
            news = ask_node("activity_watch", id=found["id"], after=after, wait_s=WATCH_S)
            for event in news["events"]:
                after = max(after, event["number"])
                text(json.dumps(event)) if wants_json() else watcher.tell(event)
            state = news["activity"]
            if not wants_json():
                watcher.state(state["state"], state["reason"], state["error"], news["problem"])
            if state["state"] == "Terminated":
                if wants_json():
                    text(json.dumps({"activity": state}))
                return
            if news["problem"]:
                watcher.pause()


@activity.command("shell", options_metavar="")
@click.argument("activity_id", metavar="ID")
@click.argument("command", nargs=-1, metavar="[-- COMMAND...]")
def activity_shell(activity_id: str, command: tuple[str, ...]) -> None:
    """Open a shell in an activity.

    Or run COMMAND, at this terminal. Every key goes there, Ctrl-C too; ~. at the beginning of a line hangs up. The exit
    status is the program's.
    """
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    env = {"TERM": os.environ["TERM"]} if terminal and os.environ.get("TERM") else {}
    _run(activity_id, command, env, terminal=terminal, stdin=True)


@activity.command("exec", options_metavar="")
@click.option("-e", "--env", "pairs", multiple=True, metavar="NAME=VALUE", help="Environment variable; repeatable.")
@click.option("-i", "--interactive", is_flag=True, help="Hand standard input on.")
@click.argument("activity_id", metavar="ID")
@click.argument("command", nargs=-1, required=True, metavar="[OPTIONS] -- COMMAND...")
def activity_exec(pairs: tuple[str, ...], interactive: bool, activity_id: str, command: tuple[str, ...]) -> None:
    """Run a command in an activity.

    Its output, errors and exit status are this command's own. Ctrl-C kills it.
    """
    env = {}
    for pair in pairs:
        name, equals, content = pair.partition("=")
        if not name or not equals:
            raise fail(f"--env {pair}: expected NAME=VALUE")
        env[name] = content
    _run(activity_id, command, env, terminal=False, stdin=interactive)


def _run(activity_id: str, command: tuple[str, ...], env: dict[str, str], *, terminal: bool, stdin: bool) -> None:
    from golem.cli.terminal import run_program

    found = ask_node("activity_find", id=activity_id)
    status = run_program(found, found["id"], command, env, terminal=terminal, stdin=stdin)
    sys.stdout.flush()
    raise SystemExit(status)


@activity.command("destroy")
@click.argument("activity_id", metavar="ID")
@click.option("--timeout", "timeout_s", type=click.FloatRange(0, 3600), default=15.0, show_default=True, help="Seconds to wait.")
def activity_destroy(activity_id: str, timeout_s: float) -> None:
    """End an activity (as its requestor)."""
    found = ask_node("activity_find", id=activity_id)
    call("DELETE", f"/activity-api/v1/activity/{found['id']}", timeout=timeout_s)
    done(f"Activity {found['id']} is ended.")


def _age(seconds: float) -> str | float:
    if wants_json():
        return seconds
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _usage(counters: dict[str, float]) -> Any:
    if wants_json():
        return counters
    return ", ".join(f"{name.removeprefix('golem.usage.')} {amount:.4g}" for name, amount in counters.items())


def register(main: click.Group) -> None:
    main.add_command(activity)
