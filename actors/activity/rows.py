"""Rows of `actors/activity/machine.py`, and their keys."""

from __future__ import annotations

from protocol.activity import Output
from protocol.states import ActivityState, Role
from protocol.types import Message

HEARD, QUIET, GONE = range(3)  # quiet: `Unresponsive`; gone: agents hear that it cannot be reached


class ActivityAgreementRow(Message, frozen=True, tag="AgreementRow"):
    """An approved agreement, as far as activities care."""

    agreement_id: str
    role: Role
    requestor: str
    provider: str
    app_session_id: str | None
    ended: bool = False
    activities: tuple[str, ...] = ()
    exe_unit: str = ""  # name of the runtime in the offer


class ActivityRow(Message, frozen=True):
    """An activity. `unfinished`: batches that wait for results, at the requestor."""

    activity_id: str
    agreement_id: str
    role: Role
    requestor: str
    provider: str
    created_at: float
    state: ActivityState = ActivityState.NEW
    state_at: float = 0.0  # since when, by the exe-unit's clock
    pending: ActivityState | None = None
    reason: str | None = None
    error_message: str | None = None
    usage: list[float] | None = None
    usage_at: float = 0.0
    destroying: bool = False
    unfinished: tuple[str, ...] = ()
    silent_from: str = ""  # the state before it became `Unresponsive`
    silence: int = HEARD  # at the requestor: how long nothing has been heard of the exe-unit

    @property
    def ended(self) -> bool:
        return self.state == ActivityState.TERMINATED

    @property
    def is_gone(self) -> bool:
        """Whether the requestor's node has heard nothing for so long that its agent should take another provider."""
        return self.silence == GONE and not self.ended


class BatchRow(Message, frozen=True):
    """A batch at the requestor: `have` of `size` results are there, with `stored_bytes` of output."""

    batch_id: str
    activity_id: str
    size: int
    have: int = 0
    finished: bool = False
    stored_bytes: int = 0
    begun_at: float = 0.0


class ResultRow(Message, frozen=True):
    """How a command of a batch ended."""

    index: int
    ok: bool
    stdout: Output
    stderr: Output
    message: str | None
    at: float
    batch_finished: bool


class HeldRow(Message, frozen=True):
    """A request that came before the news of its agreement."""

    activity_id: str
    agreement_id: str
    requestor: str
    timeout_s: float


def batch_key(activity_id: str, batch_id: str) -> str:
    """Return the key of a batch's row."""
    return f"batch/{activity_id}/{batch_id}"


def result_key(batch_id: str, index: int) -> str:
    """Return the key of a result's row; keys sort by index."""
    return f"result/{batch_id}/{index:06d}"
