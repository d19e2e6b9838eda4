"""Negotiations of the provider agent: proposals and agreements are looked at by the rules of `_provider_negotiators`."""

from __future__ import annotations

from typing import Any

from actors._provider_agreements import approved
from actors._provider_negotiators import (
    ACCEPT_TIMEOUT,
    COEFFS,
    INTERVAL,
    MAX_PRICE,
    MULTI_ACTIVITY,
    PAYMENT_TIMEOUT,
    VECTOR,
    Rejected,
    expiration_s,
    negotiate,
    whole_number,
)
from actors._provider_rows import APPROVING, AgreementRow, OfferRow, RejectedRow
from actors._provider_turn import Turn, json_object, json_text, reason
from protocol.provider import (
    AgreementArrived,
    ApprovalEnded,
    ApproveAgreement,
    CounterProposal,
    ProposalArrived,
    RejectAgreement,
    RejectProposal,
)
from protocol.types import Violation, node_id, timestamp

MAX_REJECTED = 200  # remembered proposals
IS_FINAL = "golem.proposal.rejection.is-final"


def proposal_arrived(turn: Turn, message: ProposalArrived) -> None:
    """Counter a requestor's proposal, or reject it."""
    demand, previous = json_object(message.demand), json_object(message.previous)
    found = negotiate(turn.config.terms, turn.situation(message.issuer), demand, previous)
    if not isinstance(found, Rejected):
        _counter(turn, message, found.offer)
        return
    text = reason(found.message, **{IS_FINAL: found.final})
    turn.rest(RejectProposal(message.offer_id, message.proposal_id, text))
    turn.refuse(message.issuer, message.preset, found.message, final=found.final)
    if not found.final and not turn.agent.stopping:
        _remember(turn, message)


def _counter(turn: Turn, proposal: ProposalArrived | RejectedRow, offer: dict[str, Any]) -> None:
    turn.rest(CounterProposal(proposal.offer_id, proposal.proposal_id, json_text(offer), proposal.constraints))


def _remember(turn: Turn, message: ProposalArrived) -> None:
    row = RejectedRow(**{name: getattr(message, name) for name in message.__struct_fields__}, at=turn.now)
    others = [(one.at, key) for key, one in turn.prefix("rejected/")]
    for _, key in sorted(others)[: max(0, len(others) + 1 - MAX_REJECTED)]:
        turn.put(key, None)
    turn.put(f"rejected/{row.proposal_id}", row)


def renegotiate(turn: Turn) -> None:
    """Look again at what was rejected for lack of capacity or the like: an agreement has ended."""
    if turn.agent.stopping:
        return
    rows: list[tuple[str, RejectedRow]] = sorted(turn.prefix("rejected/"), key=lambda pair: pair[1].at)
    for key, row in rows:
        offer: OfferRow | None = turn.get(f"offer/{row.preset}")
        over = turn.now - row.at > turn.config.reject_memory_s or offer is None or offer.offer_id != row.offer_id
        if over:
            turn.put(key, None)
            continue
        situation = turn.situation(row.issuer)
        found = negotiate(turn.config.terms, situation, json_object(row.demand), json_object(row.previous))
        if not isinstance(found, Rejected):
            turn.put(key, None)
            _counter(turn, row, found.offer)
        elif found.final:
            turn.put(key, None)


def agreement_arrived(turn: Turn, message: AgreementArrived) -> None:
    """Approve an agreement if everything is as negotiated, else reject it."""
    agreement = json_object(message.agreement)
    try:
        agreement_id = str(agreement["agreementId"])[:100]
        demand, offer = agreement["demand"]["properties"], agreement["offer"]["properties"]
        requestor = node_id(agreement["demand"]["requestorId"])
        if not isinstance(demand, dict) or not isinstance(offer, dict):
            raise TypeError("properties are no object")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Violation(f"not an agreement: {error!r}"[:300]) from None
    if turn.agreement(agreement_id) is not None:
        return
    found = negotiate(turn.config.terms, turn.situation(requestor), demand, offer)
    refusal = found if isinstance(found, Rejected) else None
    if refusal is None and not isinstance(found, Rejected) and found.changed:
        refusal = Rejected("Negotiations aren't finished.", False)
    if refusal is None:
        try:
            row = _row(turn, message, agreement, demand, offer, requestor)
        except ValueError as error:
            refusal = Rejected(f"The agreement is not in order: {error}"[:300], True)
    if refusal is not None:
        turn.rest(RejectAgreement(agreement_id, reason(refusal.message, **{IS_FINAL: refusal.final})))
        turn.refuse(requestor, message.preset, f"agreement rejected: {refusal.message}", final=refusal.final)
        return
    turn.save(row)
    turn.occupy(agreement_id)
    ask_approval(turn, row)


def ask_approval(turn: Turn, row: AgreementRow) -> None:
    turn.rest(ApproveAgreement(row.agreement_id, turn.agent.session_id, turn.config.approve_timeout_s))


def _row(
    turn: Turn,
    message: AgreementArrived,
    agreement: dict[str, Any],
    demand: dict[str, Any],
    offer: dict[str, Any],
    requestor: str,
) -> AgreementRow:
    """Return the row of a new agreement. Raises `ValueError` where its terms cannot be kept."""
    coeffs, vector = offer.get(COEFFS), offer.get(VECTOR)
    if not isinstance(coeffs, list) or not isinstance(vector, list) or len(coeffs) != len(vector) + 1:
        raise ValueError("prices do not fit the usage vector")
    if not all(isinstance(one, int | float) and not isinstance(one, bool) and 0 <= one <= MAX_PRICE for one in coeffs):
        raise ValueError("prices are not numbers")
    made_at = timestamp(str(agreement.get("timestamp")))
    accept, payment = whole_number(offer.get(ACCEPT_TIMEOUT)), whole_number(offer.get(PAYMENT_TIMEOUT))
    return AgreementRow(
        agreement_id=str(agreement["agreementId"]),
        preset=message.preset,
        runtime=str(offer.get("golem.runtime.name", "")),
        requestor=requestor,
        document=message.agreement,
        state=APPROVING,
        at=made_at,
        expires_at=expiration_s(demand) or turn.now,
        multi_activity=demand.get(MULTI_ACTIVITY) is True,
        coeffs=tuple(float(one) for one in coeffs),
        interval_s=float(whole_number(offer.get(INTERVAL)) or turn.config.terms.interval_s),
        accept_timeout_s=None if accept is None else float(accept),
        payment_timeout_s=None if payment is None else float(payment),
        payable_at=made_at,
    )


def approval_ended(turn: Turn, message: ApprovalEnded) -> None:
    """The requestor has committed the agreement, or it came to nothing."""
    row = turn.agreement(message.agreement_id)
    if row is None or row.state != APPROVING:
        return
    if message.approved:
        approved(turn, row)
        return
    turn.refuse(row.requestor, row.preset, f"agreement not approved: {message.reason}"[:300], final=False)
    turn.put(f"agreement/{row.agreement_id}", None)  # it never was one
    turn.vacate(row.agreement_id)
