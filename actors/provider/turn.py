"""One decision of the provider agent in the making, and what its parts share: looking rows up, telling the ports."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from actors.kernel.draft import Draft
from actors.kernel.machine import Meta, Rows, Send, Wake
from actors.provider.rows import (
    ALIVE,
    ActiveRow,
    AgentRow,
    CapacityRow,
    NoteRow,
    ProviderActivityRow,
    ProviderAgreementRow,
    Refusal,
    RefusalsRow,
    ServedRow,
    TaskRow,
)
from actors.provider.rules import Situation, Terms
from protocol.provider import Capacity, Kept, ToProcesses, ToRest, port_of, task_key
from protocol.types import Violation

MAX_REFUSALS = 20
DAY_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class ProviderConfig:
    """Settings of the machine. `instance` names this run of the process."""

    instance: str
    terms: Terms = field(default_factory=Terms)
    idle_s: float = 90.0
    approve_timeout_s: float = 10.0
    patience_s: float = 2.0  # with a proposal that there is no room for; SDKs await an answer for 5 s
    invoice_due_s: float = DAY_S  # where the agreement has no payment timeout
    reject_memory_s: float = 3600.0  # a proposal is as old as its offer at most
    keep_s: float = 7 * DAY_S  # agreements after their invoice
    remember_debts_s: float = 90 * DAY_S  # of agreements that are not paid


class Turn(Draft):
    """A step of the agent, which knows its settings."""

    def __init__(self, rows: Rows, meta: Meta, me: str, config: ProviderConfig) -> None:
        super().__init__(rows, meta, me)
        self.config = config
        self.vacated = False  # capacity became free

    # -- rows
    @property
    def agent(self) -> AgentRow:
        return self.get("agent") or AgentRow("", self.now, "")

    @property
    def terms(self) -> Terms:
        """The terms that count now."""
        served: ServedRow | None = self.get("served")
        if served is None:
            return self.config.terms
        allowed = None if served.allow_only is None else frozenset(served.allow_only)
        return replace(self.config.terms, blacklist=frozenset(served.blacklist), allow_only=allowed)

    def agreement(self, agreement_id: str) -> ProviderAgreementRow | None:
        found: ProviderAgreementRow | None = self.get(f"agreement/{agreement_id}")
        return found

    def activity(self, activity_id: str) -> ProviderActivityRow | None:
        found: ProviderActivityRow | None = self.get(f"activity/{activity_id}")
        return found

    def note(self, activity_id: str, number: int) -> NoteRow | None:
        found: NoteRow | None = self.get(note_key(activity_id, number))
        return found

    def save(self, row: ProviderAgreementRow | ProviderActivityRow | NoteRow) -> None:
        """Write a row under its own key."""
        match row:
            case ProviderAgreementRow():
                self.put(f"agreement/{row.agreement_id}", row)
            case ProviderActivityRow():
                self.put(f"activity/{row.activity_id}", row)
            case NoteRow():
                self.put(note_key(row.activity_id, row.number), row)

    def activities(self, agreement: ProviderAgreementRow) -> list[ProviderActivityRow]:
        found = (self.activity(one) for one in agreement.activities)
        return [row for row in found if row is not None]

    def alive(self, agreement: ProviderAgreementRow) -> bool:
        """Return whether a process of this agreement is (or may be) there."""
        return any(one.state in ALIVE for one in self.activities(agreement))

    def occupy(self, agreement_id: str, share: Capacity) -> None:
        """This agreement takes up capacity from now on."""
        self.put(f"active/{agreement_id}", ActiveRow(agreement_id, share))

    def vacate(self, agreement_id: str) -> None:
        """This agreement takes up no capacity any more."""
        key = f"active/{agreement_id}"
        if self.sound(key) is not None or key in self.left_out:
            self.put(key, None)
            self.vacated = True

    def situation(self, requestor: str) -> Situation:
        active: list[ActiveRow] = [row for _, row in self.prefix("active/")]
        return Situation(requestor, self.now, len(active), self.agent.stopping, self._room([row.share for row in active]))

    def _room(self, taken: list[Capacity]) -> Capacity | None:
        row: CapacityRow | None = self.get("capacity")
        if row is None or row.capacity == Capacity():
            return None
        return Capacity(
            row.capacity.cpu_threads - sum(one.cpu_threads for one in taken),
            row.capacity.mem_gib - sum(one.mem_gib for one in taken),
            row.capacity.storage_gib - sum(one.storage_gib for one in taken),
        )

    def refuse(self, requestor: str, preset: str, reason: str, *, final: bool) -> None:
        """Remember why a negotiation came to nothing, for people."""
        row: RefusalsRow = self.sound("refusals") or RefusalsRow()
        refusal = Refusal(self.now, requestor, preset, reason, final)
        self.put("refusals", RefusalsRow((*row.refusals, refusal)[-MAX_REFUSALS:]))

    # -- effects
    def rest(self, message: ToRest) -> None:
        """Ask the port; what nothing else would bring back after a kill is kept until it is over."""
        if isinstance(message, Kept):
            self.put(f"task/{task_key(message)}", TaskRow(message, self.config.instance))
        self.do(Send(port_of(message), message))

    def processes(self, message: ToProcesses) -> None:
        self.do(Send("processes", message))

    def unwake(self, *keys: str) -> None:
        self.do(*(Wake(key, None) for key in keys))


def note_key(activity_id: str, number: int) -> str:
    """Return the key of a debit note; keys sort by number."""
    return f"note/{activity_id}/{number:08d}"


def json_object(text: str) -> dict[str, Any]:
    """Return a JSON object; numbers keep their kind. Raises `Violation`."""
    try:
        found = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise Violation(f"not JSON: {str(error)[:100]}") from None
    if not isinstance(found, dict):
        raise Violation("not a JSON object")
    return found


def json_text(value: object) -> str:
    return msgspec.json.encode(value).decode()


def reason(message: str, **extra: object) -> str:
    """Return a Reason as JSON text; underscores of keyword names mean nothing, use `**{"golem.x": 1}`."""
    return json_text({"message": message, **extra})
