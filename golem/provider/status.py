"""What the agent is doing, for people: `status.json` in its data directory, written by the agent each second it changes."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from actors.kernel.system import System
from actors.provider.rows import BillState
from golem.provider.settings import LOCK, STATUS, Settings, SettingsError, read_json, write_json
from protocol.types import timestamp_text

log = logging.getLogger("golem.provider")

INTERVAL_S = 1.0
MAX_LISTED = 200
SECTIONS = (  # of what people see: title, columns, and under which name they stand in the status
    ("Runtimes", ["name", "version", "offered", "reason"], "runtimes"),
    ("Offers", ["preset", "offer", "state"], "offers"),
    ("Agreements", ["agreement", "requestor", "state", "activities", "amount", "invoice", "reason"], "agreements"),
    ("Activities", ["activity", "agreement", "state", "pid", "amount", "notes"], "activities"),
    ("Unpaid", ["document", "kind", "agreement", "amount", "state"], "unpaid"),
    ("Refused negotiations (last 20)", ["at", "requestor", "preset", "final", "reason"], "refused"),
    ("Stored rows that cannot be read; what needs them waits", ["row", "reason"], "damaged"),
)
Report = Callable[[], list[dict[str, Any]]]  # of each runtime: name, version, presets, offered, reason


def status_of(
    system: System, settings: Settings, node_id: str, runtimes: list[dict[str, Any]], serves: str = ""
) -> dict[str, Any]:
    """Return what `golem provider status` shows, read from the machine's rows; `runtimes` as reported, `serves`: whom."""
    agent = system.sound("provider", "agent")
    agreements, activities, notes, offers = (
        [row for _, row in system.listed("provider", prefix)[0]] for prefix in ("agreement/", "activity/", "note/", "offer/")
    )
    refusals = system.sound("provider", "refusals")
    # an invoice stands for all notes of its agreement, whether they were accepted or not
    invoiced = {
        row.agreement_id
        for row in agreements
        if row.invoice in (BillState.SENDING, BillState.SENT, BillState.ACCEPTED, BillState.SETTLED)
    }
    unpaid = [
        {"document": note.note_id, "kind": "debit note", "agreement": _agreement_of(activities, note.activity_id),
         "amount": note.amount, "state": note.state}
        for note in notes
        if note.state in (BillState.SENDING, BillState.SENT) and _agreement_of(activities, note.activity_id) not in invoiced
    ] + [
        {"document": row.invoice_id, "kind": "invoice", "agreement": row.agreement_id, "amount": row.amount, "state": row.invoice}
        for row in agreements if row.invoice in (BillState.SENDING, BillState.SENT, BillState.ACCEPTED)
    ]  # fmt: skip
    return {
        "name": settings.name, "nodeId": node_id, "subnet": settings.subnet, "pid": os.getpid(),
        "session": agent.session_id if agent else "", "state": "stopping" if agent and agent.stopping else "running",
        "serves": serves, "runtimes": runtimes,
        "offers": [
            {"preset": row.preset, "offer": row.offer_id, "state": "published" if row.offer_id else "being published"}
            for row in offers
        ],
        "agreements": [
            {"agreement": row.agreement_id, "requestor": row.requestor, "state": row.state, "activities": len(row.activities),
             "amount": row.amount, "invoice": row.invoice, "reason": row.reason, "since": timestamp_text(row.at)}
            for row in sorted(agreements, key=lambda row: row.at)[-MAX_LISTED:]
        ],
        "activities": [
            {"activity": row.activity_id, "agreement": row.agreement_id, "state": row.state, "pid": row.pid,
             "amount": row.amount, "notes": row.notes, "usage": list(row.usage), "since": timestamp_text(row.created_at)}
            for row in sorted(activities, key=lambda row: row.created_at)[-MAX_LISTED:]
        ],
        "unpaid": unpaid[-MAX_LISTED:],
        "damaged": [{"row": key, "reason": reason} for _, key, reason in system.damaged()],
        "refused": [
            {"at": timestamp_text(one.at), "requestor": one.requestor, "preset": one.preset, "final": one.final,
             "reason": one.reason}
            for one in (refusals.refusals if refusals else ())
        ],
    }  # fmt: skip


def _agreement_of(activities: list[Any], activity_id: str) -> str:
    return next((row.agreement_id for row in activities if row.activity_id == activity_id), "")


async def write_status(
    system: System, settings: Settings, node_id: str, report: Report, serves: Callable[[], str] = lambda: ""
) -> None:
    """Write the status whenever it changed, until cancelled."""
    last: dict[str, Any] = {}
    seen: object = None
    while True:
        runtimes, whom = report(), serves()
        if (system.journal.commits, runtimes, whom) != seen:
            seen = (system.journal.commits, runtimes, whom)
            found = status_of(system, settings, node_id, runtimes, whom)
            if found != last:
                try:
                    write_json(settings.data_dir / STATUS, found)
                    last = found
                except SettingsError as error:
                    log.warning("%s", error)
        await trio.sleep(INTERVAL_S)


def read_status(data_dir: Path) -> dict[str, Any]:
    """Return the status of the agent of a data directory; `state` says whether it runs. Raises `SettingsError`."""
    found = read_json(data_dir / STATUS, "status file")
    if not isinstance(found, dict):
        raise SettingsError(f"no provider agent has run on {data_dir} yet (start one with `golem provider run`)")
    if not runs(data_dir):
        found["state"] = "not running"
    return found


def runs(data_dir: Path) -> bool:
    """Return whether an agent holds the lock of a data directory."""
    try:
        handle = os.open(data_dir / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
