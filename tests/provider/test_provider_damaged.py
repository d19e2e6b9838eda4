"""Damaged rows of the provider agent: each costs what it tells of, is named, and never ends the agent."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from test_provider_polls import node
from worlds.patience import within
from worlds.support import trio_test

from actors.kernel.journal import Journal
from actors.kernel.records import sealed
from actors.kernel.system import System
from actors.provider.machine import Provider
from actors.provider.rows import AgentRow, CapacityRow, CursorRow, ProviderAgreementRow, RefusalsRow, ServedRow
from actors.provider.turn import ProviderConfig
from golem.provider.agent import NoTransport, expected_units, open_business
from golem.provider.polls import follow
from golem.provider.settings import Settings
from golem.provider.status import status_of
from protocol.codec import encode
from protocol.provider import AgentStarted, Capacity, EventArrived, OfferSpec, SessionNamed, StopAgent

AGREEMENT = ProviderAgreementRow(
    "a1", "wasmtime", "wasmtime", "0x1", "{}", "Approved", 5.0, 9e9, True, (0.0, 0.0, 0.0), 120.0, None, None, 5.0, ("x1",)
)
ROWS: dict[str, Any] = {
    "agent": AgentRow("prov-1", 5.0, "run-0"),
    "capacity": CapacityRow(Capacity(4, 4.0, 4.0)),
    "served": ServedRow(("0x9",), None),
    "refusals": RefusalsRow(),
    "cursor/activities": CursorRow(1_700_000_000.0),
    "agreement/a1": AGREEMENT,
    "activity/x1": None, "active/a1": None, "offer/wasmtime": None, "task/t": None, "note/x1/00000001": None,
    "debt/0x1/a1": None,
}  # fmt: skip
SPEC = OfferSpec("wasmtime", "wasmtime", "{}", "public")


def agent_on(path: Path) -> System:
    journal = Journal(str(path), lambda: "e" * 16)
    system = System("agent", journal, NoTransport(), clock=lambda: 1_800_000_000.0, new_trace=lambda: "t")
    system.add(Provider("agent", ProviderConfig("run-1")))
    return system


@pytest.mark.parametrize("key", ROWS)
@trio_test
async def test_a_damaged_row_of_the_agent_is_named_and_ends_nothing(tmp_path: Path, key: str) -> None:
    agent_on(path := tmp_path / "provider.db").journal.close()
    db = sqlite3.connect(path)
    for name, row in ROWS.items():
        if row is not None:
            db.execute("insert into row values ('provider', ?, ?)", (name, sealed("provider", name, encode(row))))
    db.execute("replace into row values ('provider', ?, x'93a4426f6f6d')", (key,))
    db.commit()
    db.close()
    system = agent_on(path)
    event = {"eventDate": "2026-01-01T00:00:01Z", "activityId": "x2", "agreementId": "a9", "eventType": {"DestroyActivity": {}}}
    async with trio.open_nursery() as nursery:
        await nursery.start(system.run)
        expected_units(system)
        answer = await system.ask("provider", AgentStarted("prov-new", (SPEC,)))
        assert answer == SessionNamed("" if key == "agent" else "prov-1")
        calls: list[httpx.URL] = []
        nursery.start_soon(follow, node([httpx.Response(200, json=[event])], calls), system, "activities", "", 0.0)
        with within(20):
            while system.listed("provider", "cursor/activities")[0] != [("cursor/activities", CursorRow(1_767_225_601.0))]:
                await trio.sleep(0.01)
        found = status_of(system, Settings(tmp_path, tmp_path / "node.json", "", "key", "prov"), "0x2", [])
        if key in ("agreement/a1", "activity/x1", "note/x1/00000001", "task/t"):  # others are written anew, or asked by nobody
            assert [one["row"] for one in found["damaged"]] == [key]
        await system.ask("provider", EventArrived("agreements", 1_800_000_000.0, "AgreementTerminatedEvent", "a9"))
        open_business(system)
        await system.ask("provider", StopAgent())
        nursery.cancel_scope.cancel()
    system.journal.close()
