"""Negotiations of the provider agent: proposals and agreements are looked at by the rules of `rules`."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from actors.kernel.crowd import Occupant, by_crowd
from actors.provider import agreements, credit, places
from actors.provider.agreements import approved
from actors.provider.rows import DealState, ProviderAgreementRow, ProviderOfferRow, RejectedRow
from actors.provider.rules import MAX_PRICE, Agreed, TurnedDown, negotiate, share_of, whole_number
from actors.provider.turn import Turn, json_object, json_text, reason
from protocol.properties import expiration_s
from protocol.property_names import (
    ACCEPT_TIMEOUT,
    CHOSEN_PLATFORM,
    COEFFS,
    INTERVAL,
    MULTI_ACTIVITY,
    PAYMENT_TIMEOUT,
    RUNTIME_NAME,
    VECTOR,
)
from protocol.provider import (
    AcceptAgreement,
    AgreementArrived,
    AnswerProposal,
    ApprovalEnded,
    PatienceDue,
    ProposalArrived,
    RefuseAgreement,
    RefuseProposal,
)
from protocol.types import Violation, amount_text, node_id

MAX_REJECTED = 200  # remembered proposals
STANDS_OUT = 10  # of one requestor
IS_FINAL = "golem.proposal.rejection.is-final"


def proposal_arrived(turn: Turn, message: ProposalArrived) -> None:
    """Counter a requestor's proposal, or reject it.

    One that there is no room for waits a moment: a requestor whose agreement has just ended asks again at once, before we
    have heard of the end, and takes a rejection for good.
    """
    row = RejectedRow(**{name: getattr(message, name) for name in message.__struct_fields__}, at=turn.now)
    found = _negotiate(turn, row)
    if isinstance(found, TurnedDown) and found.full:
        _remember(turn, replace(row, waits=True))
        turn.wake(f"patience/{row.proposal_id}", turn.now + turn.config.patience_s, PatienceDue(row.proposal_id))
    else:
        _answer(turn, row, found)


def patience_due(turn: Turn, message: PatienceDue) -> None:
    """Answer a proposal that waits for room."""
    row: RejectedRow | None = turn.get(f"rejected/{message.proposal_id}")
    if row is not None and row.waits:
        turn.put(f"rejected/{row.proposal_id}", None)
        _answer(turn, row, _negotiate(turn, row))


def _negotiate(turn: Turn, row: RejectedRow) -> Agreed | TurnedDown:
    found = negotiate(turn.terms, turn.situation(row.issuer), json_object(row.demand), json_object(row.previous))
    if isinstance(found, TurnedDown):
        return found
    if (no_place := places.judge(turn, row.issuer)) is not None:
        return no_place
    demand = json_object(row.demand)
    if credit.rate_of(found.offer) > 0:
        credit.ask_funds(turn, row.issuer, str(demand.get(CHOSEN_PLATFORM)))
    judged = credit.judge(turn, row.issuer, demand, found.offer)
    return judged if isinstance(judged, TurnedDown) else found


def _answer(turn: Turn, row: RejectedRow, found: Agreed | TurnedDown) -> None:
    """Counter or reject; what is not rejected for good is remembered."""
    if not isinstance(found, TurnedDown):
        _counter(turn, row, found.offer)
        return
    _reject(turn, row, found)
    if not found.final and not turn.agent.stopping:
        _remember(turn, replace(row, waits=False))


def _counter(turn: Turn, row: RejectedRow, offer: dict[str, Any]) -> None:
    turn.rest(AnswerProposal(row.offer_id, row.proposal_id, json_text(offer), row.constraints))


def _reject(turn: Turn, row: RejectedRow, why: TurnedDown) -> None:
    turn.rest(RefuseProposal(row.offer_id, row.proposal_id, reason(why.message, **{IS_FINAL: why.final})))
    turn.refuse(row.issuer, row.preset, why.message, final=why.final)


def _remember(turn: Turn, row: RejectedRow) -> None:
    """Keep a proposal for when there is room.

    Where there are too many, the oldest goes of who has most (a node, then a network address), with the answer that it
    waits for: nobody pushes others out.
    """
    turn.put(f"rejected/{row.proposal_id}", row)
    kept: list[RejectedRow] = [one for _, one in turn.prefix("rejected/")]
    if len(kept) > MAX_REJECTED:
        entries = (Occupant(one.at, one.proposal_id, one.issuer, one.origin) for one in kept)
        first = next(by_crowd(entries, STANDS_OUT))
        oldest = next(one for one in kept if one.proposal_id == first.key)
        turn.put(f"rejected/{oldest.proposal_id}", None)
        if oldest.waits:
            turn.unwake(f"patience/{oldest.proposal_id}")
            _reject(turn, oldest, TurnedDown("No capacity available.", False))


def renegotiate(turn: Turn) -> None:
    """Look again at what was rejected for lack of capacity or the like, or waits: an agreement has ended."""
    if turn.agent.stopping:
        return
    rows: list[tuple[str, RejectedRow]] = sorted(turn.prefix("rejected/"), key=lambda pair: pair[1].at)
    for key, row in rows:
        offer: ProviderOfferRow | None = turn.get(f"offer/{row.preset}")
        over = turn.now - row.at > turn.config.reject_memory_s or offer is None or offer.offer_id != row.offer_id
        found = TurnedDown("The offer is over.", True) if over else _negotiate(turn, row)
        if not isinstance(found, TurnedDown):
            turn.put(key, None)
            turn.unwake(f"patience/{row.proposal_id}")
            _counter(turn, row, found.offer)
        elif found.final and not row.waits:
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
    found = negotiate(turn.terms, turn.situation(requestor), demand, offer)
    refusal = found if isinstance(found, TurnedDown) else None
    if refusal is None and not isinstance(found, TurnedDown) and found.changed:
        refusal = TurnedDown("Negotiations aren't finished.", False)
    granted = credit.Grant()
    if refusal is None:
        refusal = places.judge(turn, requestor)
    if refusal is None:
        if credit.rate_of(offer) > 0:
            credit.ask_funds(turn, requestor, str(demand.get(CHOSEN_PLATFORM)))
        judged = credit.judge(turn, requestor, demand, offer)
        if isinstance(judged, TurnedDown):
            refusal = judged
        else:
            granted = judged
    if refusal is None:
        try:
            row = _row(turn, message, agreement, demand, offer, requestor)
        except ValueError as error:
            refusal = TurnedDown(f"The agreement is not in order: {error}"[:300], True)
    if refusal is not None:
        turn.rest(RefuseAgreement(agreement_id, reason(refusal.message, **{IS_FINAL: refusal.final})))
        turn.refuse(requestor, message.preset, f"agreement rejected: {refusal.message}", final=refusal.final)
        return
    row = replace(
        row,
        rate=credit.rate_of(offer),
        credit=amount_text(granted.added),
        raw_credit=amount_text(granted.raw),
        needed=amount_text(granted.needed),
        unproven=amount_text(granted.unproven) if granted.unproven > 0 else "",
    )
    turn.save(row)
    credit.begin(turn, row)
    turn.occupy(agreement_id, share_of(offer))
    ask_approval(turn, row)


def ask_approval(turn: Turn, row: ProviderAgreementRow) -> None:
    turn.rest(AcceptAgreement(row.agreement_id, turn.agent.session_id, turn.config.approve_timeout_s))


def _row(
    turn: Turn,
    message: AgreementArrived,
    agreement: dict[str, Any],
    demand: dict[str, Any],
    offer: dict[str, Any],
    requestor: str,
) -> ProviderAgreementRow:
    """Return the row of a new agreement. Raises `ValueError` where its terms cannot be kept."""
    coeffs, vector = offer.get(COEFFS), offer.get(VECTOR)
    if not isinstance(coeffs, list) or not isinstance(vector, list) or len(coeffs) != len(vector) + 1:
        raise ValueError("prices do not fit the usage vector")
    if not all(isinstance(one, int | float) and not isinstance(one, bool) and 0 <= one <= MAX_PRICE for one in coeffs):
        raise ValueError("prices are not numbers")
    accept, payment = whole_number(offer.get(ACCEPT_TIMEOUT)), whole_number(offer.get(PAYMENT_TIMEOUT))
    return ProviderAgreementRow(
        agreement_id=str(agreement["agreementId"]),
        preset=message.preset,
        runtime=str(offer.get(RUNTIME_NAME, "")),
        requestor=requestor,
        document=message.agreement,
        state=DealState.APPROVING,
        platform=str(demand.get(CHOSEN_PLATFORM)),
        interval_agreed=whole_number(offer.get(INTERVAL)) is not None,
        at=turn.now,
        expires_at=expiration_s(demand) or turn.now,
        multi_activity=demand.get(MULTI_ACTIVITY) is True,
        coeffs=tuple(float(one) for one in coeffs),
        interval_s=float(whole_number(offer.get(INTERVAL)) or turn.config.terms.interval_s),
        accept_timeout_s=None if accept is None else float(accept),
        payment_timeout_s=None if payment is None else float(payment),
        payable_at=turn.now,
    )


def approval_ended(turn: Turn, message: ApprovalEnded) -> None:
    """The requestor has committed the agreement, or it came to nothing."""
    row = turn.agreement(message.agreement_id)
    if row is None or row.state != DealState.APPROVING:
        return
    if message.approved:
        approved(turn, row)
        return
    turn.refuse(row.requestor, row.preset, f"agreement not approved: {message.reason}"[:300], final=False)
    agreements.never_made(turn, row)
