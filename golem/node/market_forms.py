"""The market API's JSON: how offers, demands, proposals, agreements and their events look to agents."""

from __future__ import annotations

import json
from typing import Any

from actors.kernel.machine import Rows
from actors.kernel.records import Event
from actors.negotiation.rows import AgreementRow, ProposalRow, state_at
from protocol.codec import Decoder
from protocol.market import SubscriptionEnded, read_subscription
from protocol.negotiation import (
    AgreementApprovedEvent,
    AgreementCancelledEvent,
    AgreementEvent,
    AgreementEvents,
    AgreementExpired,
    AgreementRejectedEvent,
    AgreementTerminatedEvent,
    ProposalEvent,
    ProposalRejectedEvent,
    SubscriptionEvents,
)
from protocol.properties import flatten
from protocol.property_names import RUNTIME_NAME
from protocol.signing import Document
from protocol.states import DocumentKind, ProposalState, Role
from protocol.types import timestamp_text

decode_subscription_event = Decoder[SubscriptionEvents](SubscriptionEvents)
decode_agreement_event = Decoder[AgreementEvents](AgreementEvents)


def subscription_form(document: Document) -> dict[str, Any]:
    """Return an Offer or Demand."""
    content = read_subscription(document.body)
    id_name, owner_name = ("offerId", "providerId") if document.kind == DocumentKind.OFFER else ("demandId", "requestorId")
    return {
        "properties": content.properties,
        "constraints": content.constraints,
        id_name: content.subscription_id,
        owner_name: content.owner,
        "timestamp": timestamp_text(content.created),
    }


def proposal_form(proposal: ProposalRow) -> dict[str, Any]:
    """Return a Proposal; its ids carry the letter of our role."""
    prefix = proposal.role[0]
    form = {
        "properties": json.loads(proposal.properties),
        "constraints": proposal.constraints,
        "proposalId": f"{prefix}-{proposal.proposal_id}",
        "issuerId": proposal.issuer,
        "state": proposal.state,
        "timestamp": timestamp_text(proposal.created),
    }
    if proposal.previous_id:
        form["prevProposalId"] = f"{prefix}-{proposal.previous_id}"
    if proposal.origin and proposal.role != Role.REQUESTOR:
        form["origin"] = proposal.origin  # ours: by it the provider's agent tells a crowd from many
    return form


def is_unanswered(proposal: ProposalRow, now: float) -> bool:
    """Return whether a proposal is the other side's, and waits for our answer."""
    theirs = proposal.issuer == proposal.counterpart and proposal.state in (ProposalState.INITIAL, ProposalState.DRAFT)
    return theirs and not proposal.answer_id and not proposal.agreement_id and proposal.expires > now


def agreement_form(agreement: AgreementRow, now: float) -> dict[str, Any]:
    """Return an Agreement as of time `now`."""
    body = json.loads(agreement.body) if agreement.body else _gone(agreement)
    created = timestamp_text(agreement.created)
    form: dict[str, Any] = {
        "agreementId": agreement.agreement_id,
        "demand": {**body["demand"], "timestamp": created},
        "offer": {**body["offer"], "timestamp": created},
        "validTo": timestamp_text(agreement.valid_to),
        "state": state_at(agreement, now),
        "timestamp": created,
    }
    if agreement.approved_at is not None:
        form["approvedDate"] = timestamp_text(agreement.approved_at)
    optional = {
        "appSessionId": agreement.app_session_id,
        "proposedSignature": agreement.proposed_signature,
        "approvedSignature": agreement.approved_signature,
        "committedSignature": agreement.committed_signature,
    }
    return form | {name: value for name, value in optional.items() if value}


def _gone(agreement: AgreementRow) -> dict[str, Any]:
    """Return what is kept of the terms of an agreement that was never made."""
    nothing = {"properties": {}, "constraints": "()"}
    return {
        "demand": {"demandId": agreement.demand_id, "requestorId": agreement.requestor, **nothing},
        "offer": {"offerId": agreement.offer_id, "providerId": agreement.provider, **nothing},
    }


def reason_form(reason: str) -> dict[str, Any]:
    """Return a Reason; `message` is always there, for agents read it without asking."""
    value = json.loads(reason) if reason else {}
    return value if "message" in value else {**value, "message": "no reason given"}


def subscription_event_form(event: Event, negotiation: Rows, now: float) -> dict[str, Any] | None:
    """Return an event of a demand or an offer; None for one whose object is not there any more."""
    message = decode_subscription_event(event.body)
    form: dict[str, Any] = {"eventType": type(message).__name__, "eventDate": timestamp_text(event.at)}
    match message:
        case SubscriptionEnded():
            return None
        case ProposalEvent(proposal_id):
            proposal = negotiation.get(f"proposal/{proposal_id}")
            return form | {"proposal": proposal_form(proposal)} if proposal else None
        case ProposalRejectedEvent(proposal_id, reason):
            proposal = negotiation.get(f"proposal/{proposal_id}")
            prefix = proposal.role[0] if proposal else "R"
            return form | {"proposalId": f"{prefix}-{proposal_id}", "reason": reason_form(reason)}
        case AgreementEvent(agreement_id):
            agreement = negotiation.get(f"agreement/{agreement_id}")
            return form | {"agreement": agreement_form(agreement, now)} if agreement else None


def agreement_event_form(at: float, message: AgreementEvents) -> dict[str, Any] | None:
    """Return an agreement event; None for one that agents do not see."""
    form: dict[str, Any] = {
        "eventDate": timestamp_text(at),
        "agreementId": message.agreement_id,
        "eventType": type(message).__name__,
    }
    match message:
        case AgreementApprovedEvent():
            return form
        case AgreementRejectedEvent() | AgreementCancelledEvent():
            return form | {"reason": reason_form(message.reason)}
        case AgreementTerminatedEvent():
            return form | {"terminator": message.terminator, "signature": "", "reason": reason_form(message.reason)}
        case AgreementExpired():
            return None


def agreement_summary(agreement: AgreementRow, now: float) -> dict[str, Any]:
    """Return an agreement's line in the list of agreements. `state`, `peerId`, `runtime` and `validTo` are ours."""
    approved = agreement.approved_at
    return {
        "id": agreement.agreement_id,
        "timestamp": timestamp_text(agreement.created),
        "approvedDate": None if approved is None else timestamp_text(approved),
        "role": Role.REQUESTOR if agreement.role == Role.REQUESTOR else Role.PROVIDER,
        "state": state_at(agreement, now),
        "peerId": agreement.counterpart,
        "runtime": _runtime(agreement),
        "validTo": timestamp_text(agreement.valid_to),
    }


def _runtime(agreement: AgreementRow) -> str:
    found = flatten(json.loads(agreement.body)["offer"]["properties"]).get(RUNTIME_NAME)
    return found if isinstance(found, str) else ""
