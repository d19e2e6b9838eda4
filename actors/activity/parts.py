"""Small parts of `actors/activity/machine.py`: refusals, forgetting, and what is made of other people's numbers."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from actors.activity.rows import batch_key
from actors.kernel.machine import DropFeed, Reply, Rows, Step
from protocol.types import Message, Refused

MAX_CREATE_S = 300.0
KEEP_S = 24 * 3600.0  # results after their batch, feeds after their activity


def refuse(code: str, message: str) -> Step:
    return Step(effects=[Reply(Refused(code, message))])


def runtime_name(offer_properties: str) -> str:
    """Return the name of the runtime in an offer's properties, "" if there is none."""
    try:
        name = msgspec.json.decode(offer_properties, type=dict[str, Any]).get("golem.runtime.name")
    except (msgspec.DecodeError, RecursionError):
        return ""
    return name[:100] if isinstance(name, str) else ""


def bounded_timeout(timeout_s: float) -> float:
    return min(max(timeout_s, 1.0), MAX_CREATE_S) if math.isfinite(timeout_s) else MAX_CREATE_S


def sane(at: float, now: float) -> float:
    """Return a reporter's time, or ours where its clock is far off."""
    return round(at, 6) if math.isfinite(at) and abs(at - now) < KEEP_S else now


def forget_batch(rows: Rows, activity_id: str, batch_id: str) -> Step:
    """Delete a batch, its results and its feed."""
    gone: dict[str, Message | None] = {key: None for key, _ in rows.prefix(f"result/{batch_id}/")}
    gone[batch_key(activity_id, batch_id)] = None
    return Step(gone, [DropFeed(f"batch/{batch_id}")])
