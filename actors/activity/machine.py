"""What happens to activities: created, told to run scripts, destroyed. One machine for both roles.

Requestor's side: `CreateActivity`, `Exec` and `DestroyActivity` come from edges; the provider's node tells the state
(`StateChanged`), the exe-unit tells results (`CommandResult`). Provider's side: a request of the agreement's requestor
becomes an event for the agent in feed `activities`; the exe-unit reports states, which go on to the requestor.
An activity always ends: where the other side stays silent, a timer or an undelivered message ends it here, with a reason.
An exe-unit that falls silent makes its activity `Unresponsive`; its next word undoes that, a longer silence ends it. Both
nodes watch for that, each by what arrives there: a lost session alone says nothing.

Rows: `agreement/<id>`, `activity/<id>`, `batch/<activity>/<batch>`, `result/<batch>/<index>`, and `held/<activity>` for
a request that came before the news of its agreement. Feeds: `activities`, `activity/<id>`, `batch/<id>`. The sides have
their parts in `requestor` and `provider`, what they share in `moves`.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from actors.activity import moves, provider, requestor
from actors.activity.moves import (
    GIVE_UP_S,
    INACTIVITY_S,
    KEEP_AGREEMENT_S,
    KEEP_S,
    LATE_S,
    REPORT_S,
    UNRESPONSIVE_S,
    ActivityDraft,
)
from actors.activity.rows import ActivityAgreementRow, ActivityRow, BatchRow, HeldRow, ResultRow
from actors.kernel.grammar import EDGE, ITSELF, PEER, Looked, On, Table, TableMachine
from actors.kernel.machine import DropFeed, Meta, Rows
from protocol.activity import (
    ActivityKnown,
    ActivityOver,
    ActivityRequested,
    AgreementForgotten,
    BatchExpired,
    CommandResult,
    CreateActivity,
    CreateExpired,
    DestroyActivity,
    DestroyExpired,
    DestroyRequested,
    Exec,
    FeedExpired,
    HeldExpired,
    StateChanged,
    StateReported,
    UnitSilent,
    UsageChanged,
    UsageReported,
)
from protocol.codec import Decoder
from protocol.exeunit import RunBatch
from protocol.negotiation import AgreementApproved, AgreementEnded
from protocol.states import ActivityEnd, Role
from protocol.types import PeerLost, Undelivered, node_of


# -- agreements
def _approved(draft: ActivityDraft, message: AgreementApproved) -> None:
    key = f"agreement/{message.agreement_id}"
    if draft.get(key) is not None:
        return
    exe_unit = moves.runtime_name(message.offer_properties)
    row = ActivityAgreementRow(
        message.agreement_id, message.role, message.requestor, message.provider, message.app_session_id, exe_unit=exe_unit
    )
    draft.put(key, row)
    for held_key, held in list(draft.prefix("held/")):
        if held.agreement_id == message.agreement_id:
            draft.put(held_key, None)
            draft.wake(f"held/{held.activity_id}", None)
            if message.role == Role.PROVIDER and held.requestor == message.requestor:
                provider.begin(draft, held.activity_id, held.agreement_id, held.timeout_s)


def _agreement_ended(draft: ActivityDraft, message: AgreementEnded) -> None:
    agreement = draft.agreement(message.agreement_id)
    if agreement is None or agreement.ended:
        return
    draft.put(f"agreement/{message.agreement_id}", replace(agreement, ended=True))
    for activity_id in agreement.activities:
        moves.ask_to_end(draft, activity_id)
    _keep(draft, message.agreement_id, draft.keep_agreement_s)


def _keep(draft: ActivityDraft, agreement_id: str, time_s: float) -> None:
    draft.wake(f"agreement/{agreement_id}", draft.now + time_s, AgreementForgotten(agreement_id))


def _forget(draft: ActivityDraft, message: AgreementForgotten) -> None:
    """Delete an agreement that is long over, and its activities; their results went before."""
    agreement = draft.agreement(message.agreement_id)
    if agreement is None:
        return
    activities = [draft.activity(activity_id) for activity_id in agreement.activities]
    if any(row is not None and not row.ended for row in activities):
        _keep(draft, message.agreement_id, KEEP_S)
        return
    draft.put(f"agreement/{message.agreement_id}", None)
    for activity_id in agreement.activities:
        draft.put(f"activity/{activity_id}", None)


def _feed_expired(draft: ActivityDraft, message: FeedExpired) -> None:
    draft.do(DropFeed(f"activity/{message.activity_id}"))


def _silent(draft: ActivityDraft, message: UnitSilent) -> None:
    """Nothing was heard of an exe-unit for long; how long may be too long, each side knows for itself."""
    row = draft.activity(message.activity_id)
    if row is None or row.ended:
        return
    if draft.now - message.due > LATE_S:
        draft.listen(row.activity_id, draft.unresponsive_s)
    elif row.role == Role.PROVIDER:
        provider.silent(draft, row)
    else:
        requestor.silent(draft, row)


# -- what did not arrive, and what was forgotten
def _undelivered(draft: ActivityDraft, message: Undelivered) -> None:
    lost = _sent(message.body)
    if not isinstance(lost, ActivityRequested | DestroyRequested | RunBatch):
        return
    row = draft.activity(lost.activity_id)
    if row is None or row.ended or row.role != Role.REQUESTOR:
        return
    if isinstance(lost, RunBatch | ActivityRequested):
        # it may have arrived all the same, or its exe-unit is gone while the node is there: let go of it there too
        draft.ask(row.provider, DestroyRequested(row.activity_id))
    moves.end(draft, row, ActivityEnd.UNREACHABLE, message.reason)


def _tell_again(draft: ActivityDraft, message: PeerLost) -> None:
    """A disk went back in time, here or there: say again how activities stand, and which are to end."""
    peer = node_of(message.to)
    for _, row in list(draft.prefix("activity/")):
        if row.role == Role.PROVIDER and row.requestor == peer:
            moves.tell_requestor(draft, row)
        elif row.role == Role.REQUESTOR and row.provider == peer and row.destroying and not row.ended:
            draft.ask(peer, DestroyRequested(row.activity_id))


class Activity(TableMachine):
    """The machine, on either side."""

    name = moves.NAME
    rows = ActivityAgreementRow | ActivityRow | BatchRow | ResultRow | HeldRow
    table = Table(
        On(AgreementApproved, "negotiation", _approved),
        On(AgreementEnded, "negotiation", _agreement_ended),
        On(CreateActivity, EDGE, requestor.create),
        On(DestroyActivity, EDGE, requestor.destroy),
        On(Exec, EDGE, requestor.run),
        On(ActivityRequested, PEER, provider.requested),
        On(DestroyRequested, PEER, provider.destroy_requested),
        On(StateChanged, PEER, requestor.state_changed),
        On(UsageChanged, PEER, requestor.usage_changed),
        On(CommandResult, Looked("the exe-unit"), requestor.result),
        On(StateReported, Looked("the exe-unit, edge", here=True), provider.reported),
        On(UsageReported, Looked("the exe-unit", here=True), provider.usage_reported),
        On(CreateExpired, ITSELF, moves.create_expired),
        On(DestroyExpired, ITSELF, moves.destroy_expired),
        On(HeldExpired, ITSELF, provider.held_expired),
        On(BatchExpired, ITSELF, moves.forget_batch),
        On(FeedExpired, ITSELF, _feed_expired),
        On(UnitSilent, ITSELF, _silent),
        On(AgreementForgotten, ITSELF, _forget),
        On(Undelivered, ITSELF, _undelivered),
        On(PeerLost, ITSELF, _tell_again),
    )

    def __init__(
        self, node: str, unresponsive_s: float = UNRESPONSIVE_S, inactivity_s: float = INACTIVITY_S,
        give_up_s: float = GIVE_UP_S, keep_agreement_s: float = KEEP_AGREEMENT_S,
    ) -> None:  # fmt: skip
        super().__init__(node)
        inactivity_s = max(inactivity_s, unresponsive_s)
        self._patience = unresponsive_s, inactivity_s, max(give_up_s, inactivity_s + 2 * REPORT_S), keep_agreement_s

    def draft(self, rows: Rows, meta: Meta) -> ActivityDraft:
        """Return the step to be."""
        return ActivityDraft(rows, meta, self.node, self._patience)


#: What `Undelivered` may hold.
_sent = Decoder[Any](Activity.peer | ActivityKnown | ActivityOver | RunBatch)
