"""Agreements: the second half of the machine `negotiation`.

    Proposal --confirm--> Pending --approve--> (Approving) --commit--> Approved --terminate--> Terminated
        Proposal, Pending, Approving -> Cancelled | Rejected | Expired

The requestor's node decides. `Approving` exists on the provider only: its approval counts once the requestor has
committed, which its node does by itself when the approval arrives in time. An approval has an end of its own, by the
provider's clock alone: what is not committed by then is withdrawn, and a commit that comes later is answered with a
termination, so nobody holds a provider's capacity for nothing. Whatever the provider says that crosses a
decision of the requestor is answered with that decision (`AgreementClosed`), and the provider takes it over, so both
sides end in the same state in whatever order messages cross. Where both terminate at once, the requestor's reason
stands on both. Each command is committed here before it is replied to; the durable link delivers, and what cannot be
delivered becomes an event with a reason: nobody waits for ever.

Both sides sign the same bytes, the requestor when it confirms, the provider when it approves; the requestor's commit
stands under the signature it proposed with.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from actors.kernel.draft import Declined, Draft
from actors.kernel.machine import Emit, Send, Wake
from actors.negotiation import moves
from actors.negotiation.proposals import IS_FINAL, why_over
from actors.negotiation.rows import OPEN, AgreementRow, BelongsRow, ProposalRow, ends_at, lapsed, state_error
from protocol import strict_json
from protocol.market import Rematch
from protocol.negotiation import (
    AgreementApproval,
    AgreementClosed,
    AgreementCommitted,
    AgreementDue,
    AgreementEvent,
    AgreementExpired,
    AgreementProposed,
    AgreementRejected,
    AgreementTerminated,
    ApproveAgreement,
    CancelAgreement,
    ConfirmAgreement,
    CreateAgreement,
    Created,
    ForgetAgreement,
    RejectAgreement,
    TerminateAgreement,
    agreement_body,
    check_hash,
    check_reason,
    read_properties,
    reason_text,
)
from protocol.signing import verify
from protocol.states import AgreementState, DocumentKind, ProposalState, Role
from protocol.types import MAX_CLOCK_SKEW_S, Done, Violation, address, node_of, timestamp_text

DELIVERY_S = 60.0  # to bring a confirmed agreement to the provider
COMMIT_DELIVERY_S = 3600.0  # to bring the commit to the provider; after that the agreement is terminated
ANSWER_S = 3600.0  # to bring our word about an agreement that we do not keep
LAST_APPROVAL_S = 0.03  # an approval this close to `validTo` could not arrive in time
MAX_VALID_S = 366 * 24 * 3600.0 * 100


# -- what our agent says
def create(draft: Draft, message: CreateAgreement) -> None:
    """Make an agreement of the last proposals of both sides."""
    proposal: ProposalRow | None = draft.get(f"proposal/{message.proposal_id}")
    label = f"Proposal [R-{message.proposal_id}]"
    code, why = "bad_request", ""
    if proposal is None or proposal.role != Role.REQUESTOR:
        why = "not found."
    elif proposal.issuer == draft.me:
        why = "is your own: only the provider's can become an agreement."
    elif proposal.state == ProposalState.INITIAL or not proposal.previous_id:
        why = "is initial. No negotiation with Provider took place, so there is nothing to agree on."
    elif proposal.agreement_id:
        code, why = "conflict", f"has an agreement already: [{proposal.agreement_id}]."
    elif proposal.answer_id:
        why = "was already countered."
    elif proposal.state == ProposalState.REJECTED:
        why = "was rejected."
    elif proposal.expires <= draft.now:
        code, why = "gone", "has expired."
    elif not draft.now < message.valid_to < draft.now + MAX_VALID_S:
        why = "cannot become an agreement: validTo is in the past or too far ahead."
    mine: ProposalRow | None = draft.get(f"proposal/{proposal.previous_id}") if proposal else None
    if not why and mine is None:
        why = "not found."
    if why or proposal is None or mine is None:
        raise Declined(code, f"{label} {why}")
    agreement = _from_proposals(proposal, mine, round(draft.now, 6), round(message.valid_to, 6), AgreementState.PROPOSAL)
    _accept(draft, proposal, agreement)
    draft.reply(Created(agreement.agreement_id))


def _from_proposals(
    proposal: ProposalRow, mine: ProposalRow, created: float, valid_to: float, state: AgreementState
) -> AgreementRow:
    """Return the agreement of a provider's proposal and the requestor's one that it answers."""
    demand = {
        "demandId": proposal.demand_id,
        "requestorId": proposal.requestor,
        "properties": read_properties(mine.properties),
        "constraints": mine.constraints,
    }
    offer = {
        "offerId": proposal.offer_id,
        "providerId": proposal.provider,
        "properties": read_properties(proposal.properties),
        "constraints": proposal.constraints,
    }
    agreement_id, body = agreement_body(proposal.proposal_id, created, valid_to, demand, offer)
    return AgreementRow(
        agreement_id, proposal.role, proposal.requestor, proposal.provider, proposal.proposal_id, proposal.demand_id,
        proposal.offer_id, body, state, created, valid_to,
    )  # fmt: skip


def _accept(draft: Draft, proposal: ProposalRow, agreement: AgreementRow) -> None:
    """Write a new agreement, which takes its proposal."""
    agreement_id = agreement.agreement_id
    draft.put(f"proposal/{proposal.proposal_id}", replace(proposal, state=ProposalState.ACCEPTED, agreement_id=agreement_id))
    draft.put(f"agreement/{agreement_id}", agreement)
    draft.do(Wake(f"due/{agreement_id}", agreement.valid_to, AgreementDue(agreement_id)))


def confirm(draft: Draft, message: ConfirmAgreement) -> None:
    """Send the agreement to the provider."""
    agreement = moves.find(draft, message.agreement_id, Role.REQUESTOR)
    if agreement.state != AgreementState.PROPOSAL:
        raise moves.wrong_state(draft, agreement, AgreementState.PENDING)
    try:
        verify(message.agreement, DocumentKind.AGREEMENT, draft.me)
        if message.agreement.body != agreement.body:
            raise Violation("the signature is of another agreement")
    except Violation as error:
        raise Declined("bad_request", str(error)) from None
    signature = message.agreement.signature.hex()
    moves.put(draft, agreement, state=AgreementState.PENDING, app_session_id=message.app_session_id, proposed_signature=signature)
    moves.tell_peer(draft, agreement, AgreementProposed(message.agreement), min(DELIVERY_S, agreement.valid_to - draft.now))
    draft.reply(Done())


def cancel(draft: Draft, message: CancelAgreement) -> None:
    """Take back an agreement that we have not committed to; the provider follows, even if it has approved."""
    agreement = moves.find(draft, message.agreement_id, Role.REQUESTOR)
    if agreement.state not in (AgreementState.PROPOSAL, AgreementState.PENDING):
        raise moves.wrong_state(draft, agreement, AgreementState.CANCELLED)
    _close(draft, agreement, check_reason(message.reason))
    draft.reply(Done())


def _close(draft: Draft, agreement: AgreementRow, reason: str) -> None:
    if agreement.state == AgreementState.PENDING:
        moves.tell_peer(draft, agreement, AgreementClosed(agreement.agreement_id, AgreementState.CANCELLED, reason))
    moves.cancelled(draft, agreement, reason)


def approve(draft: Draft, message: ApproveAgreement) -> None:
    """Send our approval; the agreement is made when the requestor's commit comes back."""
    agreement = moves.find(draft, message.agreement_id, Role.PROVIDER)
    if agreement.state == AgreementState.APPROVING:  # asked again while the requestor decides
        draft.reply(Done())
        return
    if agreement.state != AgreementState.PENDING:
        raise moves.wrong_state(draft, agreement, AgreementState.APPROVED, early="conflict")
    if agreement.valid_to - draft.now <= LAST_APPROVAL_S:
        raise Declined("gone", f"Agreement [{agreement.agreement_id}] expires before an approval can arrive.")
    try:
        verify(message.approval, DocumentKind.APPROVAL, draft.me)
        if message.approval.body != agreement.body:
            raise Violation("the signature is of another agreement")
    except Violation as error:
        raise Declined("bad_request", str(error)) from None
    signature = message.approval.signature.hex()
    until = draft.now + moves.APPROVAL_S
    moves.put(
        draft, agreement, state=AgreementState.APPROVING, app_session_id=message.app_session_id, approved_signature=signature,
        approval_until=until,
    )  # fmt: skip
    approval = AgreementApproval(agreement.agreement_id, message.approval)
    moves.tell_peer(draft, agreement, approval, min(agreement.valid_to, until) - draft.now)
    draft.do(Wake(f"due/{agreement.agreement_id}", until, AgreementDue(agreement.agreement_id)))
    draft.reply(Done())


def reject(draft: Draft, message: RejectAgreement) -> None:
    """Do not agree."""
    agreement = moves.find(draft, message.agreement_id, Role.PROVIDER)
    if agreement.state != AgreementState.PENDING:
        raise moves.wrong_state(draft, agreement, AgreementState.REJECTED, early="conflict")
    reason = check_reason(message.reason)
    moves.refused(draft, agreement, reason)
    moves.tell_peer(draft, agreement, AgreementRejected(agreement.agreement_id, reason))
    draft.reply(Done())


def terminate(draft: Draft, message: TerminateAgreement) -> None:
    """End an approved agreement, from either side."""
    agreement = moves.find(draft, message.agreement_id, "")
    if agreement.state != AgreementState.APPROVED:
        raise moves.wrong_state(draft, agreement, AgreementState.TERMINATED, early="conflict")
    reason = check_reason(message.reason)
    moves.terminated_by(draft, agreement, agreement.role, reason)
    moves.tell_peer(draft, agreement, AgreementTerminated(agreement.agreement_id, agreement.role, reason))
    draft.reply(Done())


# -- what the other side says
def proposed(draft: Draft, message: AgreementProposed) -> None:
    """Provider: a requestor sends an agreement. It must be, to the byte, what the last proposals say."""
    requestor = node_of(draft.meta.sender)
    verify(message.agreement, DocumentKind.AGREEMENT, requestor)
    try:
        body = strict_json.loads(message.agreement.body)
        agreement_id, proposal_id = check_hash(body["agreementId"]), check_hash(body["proposalId"])
        created, valid_to = body["created"], body["validTo"]
        if not isinstance(created, float) or not isinstance(valid_to, float) or not 0 <= created < 1e11:
            raise Violation("malformed agreement: created or validTo")
    except (ValueError, KeyError, TypeError) as error:
        raise Violation(f"malformed agreement: {error!r}"[:200]) from None
    if draft.get(f"agreement/{agreement_id}"):
        return
    proposal: ProposalRow | None = draft.get(f"proposal/{proposal_id}")
    mine = draft.get(f"proposal/{proposal.previous_id}") if proposal else None
    why, later = "", dict[str, Any]()
    if proposal is None or mine is None or proposal.requestor != requestor or proposal.issuer != draft.me:
        why = "it is about a proposal that is not known here."
    elif proposal.agreement_id or proposal.answer_id or proposal.state != ProposalState.DRAFT:
        state = "countered" if proposal.answer_id else proposal.state
        why = f"its proposal is {state} here."
    elif proposal.expires <= draft.now or not draft.now < valid_to < draft.now + MAX_VALID_S:
        why = "it has expired."
    elif over := why_over(draft, proposal):
        why, later = f"{over}.", {IS_FINAL: False}
    elif not proposal.created - MAX_CLOCK_SKEW_S <= created <= draft.now + MAX_CLOCK_SKEW_S:
        why = f"it says that it was made at {timestamp_text(created)}, and here it is {timestamp_text(draft.now)}."
    else:
        agreement = _from_proposals(proposal, mine, created, valid_to, AgreementState.PENDING)
        if agreement.body == message.agreement.body:
            draft.put(moves.waiting_key(agreement), BelongsRow())
            agreement = replace(agreement, proposed_signature=message.agreement.signature.hex())
            _accept(draft, proposal, agreement)
            draft.do(Emit(f"offer/{proposal.offer_id}", AgreementEvent(agreement_id)))
            return
        why = "it is not what the last proposals say."
    reason = reason_text(f"Agreement not taken: {why}", **later)
    draft.do(Send(address(requestor, "negotiation"), AgreementRejected(agreement_id, reason), ANSWER_S))


def _from_peer(draft: Draft, agreement_id: str, role: str) -> AgreementRow | None:
    """Return an agreement of the sender with us in which it has `role` (any if ""); raises `Violation` otherwise."""
    agreement: AgreementRow | None = draft.get(f"agreement/{agreement_id}")
    if agreement is None:
        return None  # forgotten
    if agreement.counterpart != node_of(draft.meta.sender) or agreement.role == role:
        raise Violation(f"agreement {agreement_id} does not allow the sender to say this")
    return agreement


def approval(draft: Draft, message: AgreementApproval) -> None:
    """Requestor: the provider agrees. In time, that makes the agreement; else it hears what we decided before."""
    agreement = _from_peer(draft, message.agreement_id, Role.PROVIDER)
    if not agreement:
        check_hash(message.agreement_id)
        closed_message = AgreementClosed(
            message.agreement_id, AgreementState.EXPIRED, reason_text("The agreement is not known here.")
        )
        draft.do(Send(draft.meta.sender, closed_message, ANSWER_S))
        return
    if lapsed(agreement, draft.now):
        agreement = moves.lapse(draft, agreement)
    if agreement.state in (AgreementState.APPROVED, AgreementState.TERMINATED):
        return
    if agreement.state != AgreementState.PENDING:
        _insist(draft, agreement)
        return
    verify(message.approval, DocumentKind.APPROVAL, agreement.provider)
    if message.approval.body != agreement.body:
        raise Violation("the approval is of another agreement")
    agreement = replace(agreement, approved_signature=message.approval.signature.hex())
    at = round(draft.now, 6)
    moves.made(draft, agreement, at)
    moves.tell_peer(draft, agreement, AgreementCommitted(agreement.agreement_id, at), COMMIT_DELIVERY_S)


def _insist(draft: Draft, agreement: AgreementRow) -> None:
    """Tell the provider what we had decided when its word crossed ours."""
    if agreement.state in (AgreementState.CANCELLED, AgreementState.EXPIRED, AgreementState.REJECTED):
        moves.tell_peer(draft, agreement, AgreementClosed(agreement.agreement_id, agreement.state, agreement.reason))


def rejected(draft: Draft, message: AgreementRejected) -> None:
    """Requestor: the provider does not agree.

    If it may do so later (another requestor was faster), there is a fresh Initial proposal: agents that do not counter the
    last proposal once more would never hear of this provider again.
    """
    agreement = _from_peer(draft, message.agreement_id, Role.PROVIDER)
    if not agreement:
        return
    if lapsed(agreement, draft.now):
        agreement = moves.lapse(draft, agreement)
    if agreement.state == AgreementState.PENDING:
        reason = check_reason(message.reason)
        moves.refused(draft, agreement, reason)
        if strict_json.loads(reason).get(IS_FINAL) is False:
            draft.do(Send("market", Rematch(agreement.demand_id, agreement.offer_id)))
    elif agreement.state in (AgreementState.CANCELLED, AgreementState.EXPIRED):
        _insist(draft, agreement)
    elif agreement.state == AgreementState.PROPOSAL:
        raise Violation(state_error(agreement, AgreementState.REJECTED, draft.now))
    # else the withdrawal of an approval crosses our commit, which is answered with a termination


def committed(draft: Draft, message: AgreementCommitted) -> None:
    """Provider: the agreement is made; or, if our approval was withdrawn meanwhile, it ends at once."""
    agreement = _from_peer(draft, message.agreement_id, Role.REQUESTOR)
    if not agreement or agreement.state in (AgreementState.APPROVED, AgreementState.TERMINATED):
        return
    if not agreement.approved_signature and message.approval is not None and agreement.state == AgreementState.PENDING:
        verify(message.approval, DocumentKind.APPROVAL, agreement.provider)  # we did approve, and forgot it with our disk
        if message.approval.body != agreement.body:
            raise Violation("the approval is of another agreement")
        signature = message.approval.signature.hex()
        agreement = replace(
            agreement, state=AgreementState.APPROVING, approved_signature=signature, approval_until=agreement.valid_to
        )
    if not agreement.approved_signature:
        raise Violation("a commit to an agreement that was not approved")
    if not 0 <= message.approved_at < 1e11:
        raise Violation("the time of the approval is not in seconds since the epoch")
    if lapsed(agreement, draft.now):
        agreement = moves.withdraw(draft, agreement)
    if agreement.state == AgreementState.APPROVING:
        plausible = agreement.created - MAX_CLOCK_SKEW_S <= message.approved_at <= draft.now + MAX_CLOCK_SKEW_S
        moves.made(draft, agreement, message.approved_at if plausible else draft.now)
    elif agreement.state == AgreementState.REJECTED:
        moves.terminated_by(draft, agreement, Role.PROVIDER, agreement.reason)
        moves.tell_peer(draft, agreement, AgreementTerminated(agreement.agreement_id, Role.PROVIDER, agreement.reason))
    else:
        raise Violation(f"a commit to an agreement that the requestor itself has {agreement.state.lower()}")


def closed(draft: Draft, message: AgreementClosed) -> None:
    """Provider: the requestor decided that there will be no agreement; what we thought of it meanwhile gives way."""
    agreement = _from_peer(draft, message.agreement_id, Role.REQUESTOR)
    if not agreement or agreement.state == message.state:
        return
    reason = check_reason(message.reason) if message.reason else ""
    if (
        agreement.state == AgreementState.APPROVED and message.state == AgreementState.EXPIRED
    ):  # it had committed, and lost the disk that knew it
        moves.terminated_by(draft, agreement, Role.REQUESTOR, reason)
        return
    if agreement.state in (AgreementState.APPROVED, AgreementState.TERMINATED) or message.state not in (
        AgreementState.CANCELLED,
        AgreementState.EXPIRED,
        AgreementState.REJECTED,
    ):
        raise Violation(state_error(agreement, message.state[:20], draft.now))
    if message.state == AgreementState.CANCELLED:
        moves.cancelled(draft, agreement, reason)
    elif message.state == AgreementState.EXPIRED:
        draft.do(Emit(f"agreement/{agreement.agreement_id}", AgreementExpired(agreement.agreement_id)))
        moves.end(draft, agreement, AgreementState.EXPIRED, reason)
    else:
        moves.refused(draft, agreement, reason)


def terminated(draft: Draft, message: AgreementTerminated) -> None:
    """The other side ends the agreement; of two at once the requestor's reason stands."""
    agreement = _from_peer(draft, message.agreement_id, "")
    if not agreement:
        return
    if message.terminator != (Role.PROVIDER if agreement.role == Role.REQUESTOR else Role.REQUESTOR):
        raise Violation("who terminates says so of itself")
    reason = check_reason(message.reason)
    if (
        agreement.state == AgreementState.PENDING and not agreement.approved_signature
    ):  # approved once, and forgotten here with a disk
        (moves.refused if agreement.role == Role.REQUESTOR else moves.cancelled)(draft, agreement, reason)
        return
    if agreement.state == AgreementState.APPROVED or (
        agreement.role == Role.PROVIDER and agreement.state != AgreementState.TERMINATED
    ):
        if not agreement.approved_signature:
            raise Violation(state_error(agreement, AgreementState.TERMINATED, draft.now))
        moves.terminated_by(draft, agreement, message.terminator, reason)
    elif agreement.state != AgreementState.TERMINATED:
        raise Violation(state_error(agreement, AgreementState.TERMINATED, draft.now))
    elif agreement.terminator == Role.PROVIDER and message.terminator == Role.REQUESTOR:
        moves.put(draft, agreement, terminator=Role.REQUESTOR, reason=reason)


# -- time, and what did not arrive
def due(draft: Draft, message: AgreementDue) -> None:
    """The time for the approval, of the approval, or of the agreement itself is over."""
    agreement: AgreementRow | None = draft.get(f"agreement/{message.agreement_id}")
    if agreement and agreement.state == AgreementState.APPROVED:
        moves.end_by_term(draft, agreement)
    if (
        agreement
        and agreement.state == AgreementState.PENDING
        and agreement.role == Role.PROVIDER
        and not lapsed(agreement, draft.now)
    ):
        _refuse_of_old_offer(draft, agreement)
        return
    if not agreement or agreement.state not in OPEN:
        return
    if lapsed(agreement, draft.now):
        moves.lapse(draft, agreement)
    else:
        draft.do(Wake(f"due/{agreement.agreement_id}", ends_at(agreement), message))


def _refuse_of_old_offer(draft: Draft, agreement: AgreementRow) -> None:
    """Refuse an agreement that came before its offer was over, and that no agent has answered since."""
    proposal: ProposalRow | None = draft.get(f"proposal/{agreement.proposal_id}")
    over = why_over(draft, proposal) if proposal else "the offer is not known any more"
    if over:
        reason = reason_text(f"Agreement not answered: {over}.", **{IS_FINAL: False})
        moves.tell_peer(draft, agreement, AgreementRejected(agreement.agreement_id, reason))
        moves.refused(draft, agreement, reason)


def forget(draft: Draft, message: ForgetAgreement) -> None:
    """Delete an agreement that is long over."""
    agreement: AgreementRow | None = draft.get(f"agreement/{message.agreement_id}")
    if agreement and agreement.state not in (*OPEN, AgreementState.APPROVED):
        draft.put(f"agreement/{message.agreement_id}", None)


MustArrive = (
    AgreementProposed | AgreementApproval | AgreementCommitted | AgreementClosed | AgreementRejected | AgreementTerminated
)  # fmt: skip


def undelivered(draft: Draft, message: MustArrive, why: str) -> None:
    """Something that the other side had to know did not arrive, or nobody said that it did.

    An end is told again, as long as we remember the agreement ourselves: the other side must not think it goes on. An
    approval is not: its time is over, and the withdrawal is told.
    """
    if isinstance(message, AgreementProposed):
        agreement_id = strict_json.loads(message.agreement.body)["agreementId"]
    else:
        agreement_id = message.agreement_id
    agreement: AgreementRow | None = draft.get(f"agreement/{agreement_id}")
    if not agreement:
        return
    other = Role.PROVIDER if agreement.role == Role.REQUESTOR else Role.REQUESTOR
    reason = reason_text(f"{other} {agreement.counterpart} could not be reached: {why}")
    if isinstance(message, AgreementProposed) and agreement.state == AgreementState.PENDING:
        _close(draft, agreement, reason)
    elif isinstance(message, AgreementCommitted) and agreement.state == AgreementState.APPROVED:
        moves.terminated_by(draft, agreement, agreement.role, reason)
        moves.tell_peer(draft, agreement, AgreementTerminated(agreement.agreement_id, agreement.role, reason))
    elif isinstance(message, AgreementClosed | AgreementRejected | AgreementTerminated):
        moves.tell_peer(draft, agreement, message)
