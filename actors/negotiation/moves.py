"""Moves of agreements that commands, messages of the other side and time have in common.

Each writes the agreement's row and tells whoever has to know: our agent, the other side, activities and money.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from actors.kernel.draft import Declined, Draft
from actors.kernel.machine import Emit, Send, Wake
from actors.negotiation.proposals import IS_FINAL
from actors.negotiation.rows import AgreementRow, lapsed, state_error
from protocol import strict_json
from protocol.market import Rematch, canonical
from protocol.negotiation import (
    AgreementApproved,
    AgreementApprovedEvent,
    AgreementCancelledEvent,
    AgreementDue,
    AgreementEnded,
    AgreementExpired,
    AgreementRejected,
    AgreementRejectedEvent,
    AgreementTerminated,
    AgreementTerminatedEvent,
    ForgetAgreement,
    reason_text,
)
from protocol.properties import expiration_s
from protocol.states import AgreementState, Role
from protocol.types import Message, address, timestamp_text

END_MARGIN_S = 30.0  # for the agents, who end an agreement themselves when its term is over
KEEP_ENDED_S = 90 * 24 * 3600.0
APPROVAL_S = 30.0  # a requestor's node commits at once; its agent gives up after 15 s


def find(draft: Draft, agreement_id: str, role: str) -> AgreementRow:
    """Return an agreement in which we have `role` (any if ""), expired if its time is over. Raises `Declined`."""
    agreement: AgreementRow | None = draft.get(f"agreement/{agreement_id}")
    if agreement is None or role not in ("", agreement.role):
        raise Declined("unknown", f"Agreement [{agreement_id}] not found{role and f' with us as {role}'}.")
    return lapse(draft, agreement) if lapsed(agreement, draft.now) else agreement


def put(draft: Draft, agreement: AgreementRow, **changes: Any) -> AgreementRow:
    if agreement.role == Role.PROVIDER and agreement.state == AgreementState.PENDING != changes.get(
        "state", AgreementState.PENDING
    ):
        draft.put(waiting_key(agreement), None)
    agreement = replace(agreement, **changes)
    draft.put(f"agreement/{agreement.agreement_id}", agreement)
    return agreement


def waiting_key(agreement: AgreementRow) -> str:
    """Return the key of the index of agreements that wait for the agent of their offer."""
    return f"waiting/{agreement.offer_id}/{agreement.agreement_id}"


def end(draft: Draft, agreement: AgreementRow, state: str, reason: str = "", **changes: Any) -> AgreementRow:
    """Put a final state, which is forgotten after a long time.

    Of what a requestor proposed to us and what was never made, the terms go at once; its id is their digest.
    """
    if agreement.role == Role.PROVIDER and state in (AgreementState.CANCELLED, AgreementState.REJECTED, AgreementState.EXPIRED):
        changes["body"] = b""
    draft.do(
        Wake(f"due/{agreement.agreement_id}", None),
        Wake(f"forget/{agreement.agreement_id}", draft.now + KEEP_ENDED_S, ForgetAgreement(agreement.agreement_id)),
    )
    return put(draft, agreement, state=state, reason=reason, ended_at=draft.now, **changes)


def tell_agent(draft: Draft, agreement_id: str, event: Message) -> None:
    draft.do(Emit("agreements", event), Emit(f"agreement/{agreement_id}", event))


def tell_peer(draft: Draft, agreement: AgreementRow, message: Message, deadline_s: float | None = None) -> None:
    to = address(agreement.counterpart, "negotiation")
    draft.do(Send(to, message) if deadline_s is None else Send(to, message, max(deadline_s, 1.0)))


def lapse(draft: Draft, agreement: AgreementRow) -> AgreementRow:
    """End an agreement whose time is over."""
    return withdraw(draft, agreement) if agreement.state == AgreementState.APPROVING else expire(draft, agreement)


def withdraw(draft: Draft, agreement: AgreementRow) -> AgreementRow:
    """Take back our approval, which the requestor has not committed to."""
    reason = reason_text(f"The approval was withdrawn: there was no commit within {APPROVAL_S:g} s.", **{IS_FINAL: False})
    tell_peer(draft, agreement, AgreementRejected(agreement.agreement_id, reason))
    return refused(draft, agreement, reason)


def end_by_term(draft: Draft, agreement: AgreementRow) -> None:
    """End an approved agreement whose term is over, where no agent has done so; the other node does it by itself as well."""
    over = expiration_s(strict_json.loads(agreement.body)["demand"]["properties"])
    if over is None or draft.now < over + END_MARGIN_S:
        return
    code = {f"golem.{agreement.role.lower()}.code": "Expired"}
    reason = reason_text(f"Agreement expired: its term was over at {timestamp_text(over)}.", **code)
    terminated_by(draft, agreement, agreement.role, reason)
    tell_peer(draft, agreement, AgreementTerminated(agreement.agreement_id, agreement.role, reason))


def expire(draft: Draft, agreement: AgreementRow) -> AgreementRow:
    draft.do(Emit(f"agreement/{agreement.agreement_id}", AgreementExpired(agreement.agreement_id)))
    return end(draft, agreement, AgreementState.EXPIRED)


def wrong_state(draft: Draft, agreement: AgreementRow, new: str, early: str = "gone") -> Declined:
    """Return the refusal; `early` is its code where the agreement was never sent. That a time was over stays."""
    code = early if agreement.state == AgreementState.PROPOSAL else "gone"
    return Declined(code, state_error(agreement, new, draft.now), keep=True)


def made(draft: Draft, agreement: AgreementRow, at: float) -> AgreementRow:
    """Both sides have committed: tell the agent, and whoever deals with activities and money."""
    agreement = put(
        draft, agreement, state=AgreementState.APPROVED, approved_at=at, reason="", ended_at=None,
        committed_signature=agreement.proposed_signature,
    )  # fmt: skip
    body = strict_json.loads(agreement.body)
    over = expiration_s(body["demand"]["properties"])  # no provider agrees to a demand that does not say it
    at_end = Wake(f"due/{agreement.agreement_id}", over and over + END_MARGIN_S, AgreementDue(agreement.agreement_id))
    draft.do(at_end, Wake(f"forget/{agreement.agreement_id}", None))
    news = AgreementApproved(
        agreement.agreement_id,
        agreement.role,
        agreement.requestor,
        agreement.provider,
        canonical(body["demand"]["properties"]).decode(),
        canonical(body["offer"]["properties"]).decode(),
        at,
        agreement.app_session_id,
    )
    draft.do(Send("activity", news), Send("ledger", news))
    tell_agent(draft, agreement.agreement_id, AgreementApprovedEvent(agreement.agreement_id, agreement.app_session_id))
    return agreement


def terminated_by(draft: Draft, agreement: AgreementRow, terminator: str, reason: str) -> None:
    was_approved = agreement.state == AgreementState.APPROVED
    end(draft, agreement, AgreementState.TERMINATED, reason, terminator=terminator)
    if was_approved:
        ended = AgreementEnded(agreement.agreement_id, terminator, reason)
        draft.do(Send("activity", ended), Send("ledger", ended))
        if agreement.role == Role.REQUESTOR:
            draft.do(Send("market", Rematch(agreement.demand_id, agreement.offer_id)))
    event = AgreementTerminatedEvent(agreement.agreement_id, agreement.app_session_id, terminator, reason)
    tell_agent(draft, agreement.agreement_id, event)


def cancelled(draft: Draft, agreement: AgreementRow, reason: str) -> None:
    end(draft, agreement, AgreementState.CANCELLED, reason)
    event = AgreementCancelledEvent(agreement.agreement_id, agreement.app_session_id, reason)
    tell_agent(draft, agreement.agreement_id, event)


def refused(draft: Draft, agreement: AgreementRow, reason: str) -> AgreementRow:
    event = AgreementRejectedEvent(agreement.agreement_id, agreement.app_session_id, reason)
    tell_agent(draft, agreement.agreement_id, event)
    return end(draft, agreement, AgreementState.REJECTED, reason)
