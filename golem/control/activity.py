"""The node's side of `golem activity`: what there is, what it costs, and what is happening in it.

Registered with `golem/control/command.py`, as every `cli:` call of the bus. Neighbours: `golem/cli/activity.py` is the other end.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from actors.activity.rows import ActivityRow, BatchRow, ResultRow, result_key
from golem.control.command import COMMANDS, command
from golem.exeunit.terms import flat
from golem.net import RemoteError, Unreachable
from protocol.amounts import cost
from protocol.live import AskRunning, WatchAll, WatchedEvent, decode_running, decode_watched
from protocol.property_names import COEFFS, VECTOR
from protocol.states import ActivityState, Role
from protocol.types import Violation, timestamp_text

if TYPE_CHECKING:
    from golem.node.node import Node

LIVE_TIMEOUT_S = 2.0
WATCH_MARGIN_S = 5.0
MAX_EVENT_CHARS = 1 << 20
COUNTED_S = 3600.0  # what `golem activity status` calls recent


def _named(node: Node, args: dict[str, Any]) -> ActivityRow:
    """Return the activity whose id begins with what was given. Raises `LookupError`."""
    wanted = str(args["id"]).lower()
    if not wanted:
        raise LookupError("which activity?")
    rows = node.system.rows("activity")
    exact: ActivityRow | None = rows.get(f"activity/{wanted}")
    if exact is not None:
        return exact
    found: list[ActivityRow] = [row for _, row in node.system.listed("activity", f"activity/{wanted}")[0]]
    if not found:
        raise LookupError(f"no activity {wanted[:40]!r} (golem activity list shows them)")
    if len(found) > 1:
        listed = ", ".join(row.activity_id[:12] for row in found[:5])
        raise LookupError(f"{wanted[:40]!r} fits {len(found)} activities: {listed}{', ...' if len(found) > 5 else ''}")
    return found[0]


def _terms(node: Node, agreement_id: str) -> tuple[list[str], list[float]]:
    """Return the usage counters of an agreement and their prices (one more: the start); empty where not known."""
    agreement = node.system.rows("negotiation").get(f"agreement/{agreement_id}")
    try:
        properties = flat(json.loads(agreement.body)["offer"]["properties"]) if agreement else {}
        names, prices = properties[VECTOR], properties[COEFFS]
        return [str(name) for name in names], [float(price) for price in prices]
    except (KeyError, TypeError, ValueError):
        return [], []


def _form(node: Node, row: ActivityRow) -> dict[str, Any]:
    agreement = node.system.rows("activity").get(f"agreement/{row.agreement_id}")
    names, prices = _terms(node, row.agreement_id)
    usage = row.usage or []
    try:
        price = cost(prices, usage) if usage and prices else None
    except ValueError:
        price = None
    counters = names if len(names) == len(usage) else [str(number) for number in range(len(usage))]
    return {
        "id": row.activity_id, "role": row.role, "state": row.state, "runtime": agreement.exe_unit if agreement else "",
        "agreementId": row.agreement_id, "peer": row.provider if row.role == Role.REQUESTOR else row.requestor,
        "created": timestamp_text(row.created_at), "age_s": round(max(0.0, node.clock() - row.created_at), 1),
        "usage": dict(zip(counters, usage, strict=True)), "cost": price, "reason": row.reason, "error": row.error_message,
    }  # fmt: skip


@command
async def activity_list(node: Node, args: dict[str, Any]) -> Any:
    """All activities of this node, the newest last."""
    rows = [row for _, row in node.system.listed("activity", "activity/")[0]]
    return [_form(node, row) for row in sorted(rows, key=lambda row: row.created_at) if args.get("all") or not row.ended]


@command
async def activity_counts(node: Node, args: dict[str, Any]) -> Any:
    """How many activities are in which state: all that are kept, and those in which something happened within an hour."""
    rows: list[ActivityRow] = [row for _, row in node.system.listed("activity", "activity/")[0]]
    at = [max(row.created_at, row.state_at, row.usage_at) for row in rows]
    recent = [row for row, moment in zip(rows, at, strict=True) if node.clock() - moment <= COUNTED_S]
    return {"last1h": dict(Counter(row.state.value for row in recent)), "total": dict(Counter(row.state.value for row in rows)),
            "lastActivityTs": timestamp_text(max(at)) if at else None}  # fmt: skip


@command
async def activity_find(node: Node, args: dict[str, Any]) -> Any:
    """The whole id of an activity, and the way to the REST API."""
    return {"id": _named(node, args).activity_id, **await COMMANDS["rest_access"](node, {})}


@command
async def activity_show(node: Node, args: dict[str, Any]) -> Any:
    """One activity, with its batches and the command that runs."""
    row = _named(node, args)
    batches = []
    kept: list[BatchRow] = [one for _, one in node.system.listed("activity", f"batch/{row.activity_id}/")[0]]
    for batch in sorted(kept, key=lambda one: (one.begun_at, one.batch_id)):
        begun = timestamp_text(batch.begun_at) if batch.begun_at else None  # a row of before this was kept
        batches.append({"id": batch.batch_id, "begun": begun, "commands": batch.size,
                        "results": batch.have, "finished": batch.finished, "failed": _failure(node, batch)})  # fmt: skip
    running = None
    if not row.ended and row.state != ActivityState.NEW:
        try:
            running = decode_running(await node.ask_exeunit(row, AskRunning(), LIVE_TIMEOUT_S))
        except (Unreachable, RemoteError, Violation):
            running = None
    return _form(node, row) | {"running": running, "batches": batches}


def _failure(node: Node, batch: BatchRow) -> str | None:
    """Return why a batch failed, None if it did not."""
    for index in range(batch.have):
        result: ResultRow | None = node.system.rows("activity").get(result_key(batch.batch_id, index))
        if result is not None and not result.ok:
            return result.message or "failed"
    return None


@command
async def activity_watch(node: Node, args: dict[str, Any]) -> Any:
    """What has happened in an activity behind event `after`, waiting `wait_s` for something; and how it is now."""
    row = _named(node, args)
    events: list[WatchedEvent] = []
    problem = None
    if not row.ended and row.state != ActivityState.NEW:
        wait_s = min(float(args.get("wait_s", 0.0)), 20.0)
        try:
            question = WatchAll(int(args["after"]), wait_s)
            events = decode_watched(await node.ask_exeunit(row, question, wait_s + WATCH_MARGIN_S))
        except (Unreachable, RemoteError, Violation) as error:
            problem = str(error)
    shown = [
        {"number": one.number, "batch": one.batch_id, "index": one.index, "at": one.at, "kind": _kind(one.kind)} for one in events
    ]
    return {"activity": _form(node, _named(node, {"id": row.activity_id})), "events": shown, "problem": problem}


def _kind(text: str) -> dict[str, Any]:
    try:
        kind = json.loads(text[:MAX_EVENT_CHARS])
    except (ValueError, RecursionError):
        kind = None
    return kind if isinstance(kind, dict) else {"stderr": "(malformed event)"}
