"""What is said about proposals and agreements. Handled by `actors/negotiation/machine.py`.

Proposals have the same id on both nodes, a hash of their content and of the proposal they answer; only the `Initial`
one, which each node makes for itself, has an id of its own on each. An agreement is canonical JSON that the requestor
signs when it confirms (kind `agreement`) and the provider when it approves (kind `approval`).
Properties travel as JSON text: MessagePack would be free to change the form of a number.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from protocol import strict_json
from protocol.market import (
    MAX_DOCUMENT_BYTES,
    REMEMBERED_BYTES,
    REMEMBERED_LARGE,
    SubscriptionEnded,
    canonical,
)
from protocol.properties import MAX_VALUES, TermsError, flatten
from protocol.signing import Document
from protocol.states import Role
from protocol.terms import MAX_CONSTRAINT_BYTES, Reason, explain
from protocol.types import Message, Violation, digest, timestamp_text

MAX_REASON_BYTES = 16 * 1024
MAX_SESSION_CHARS = 256
MAX_SHOWN_REASONS = 5
_HASH = re.compile(r"[0-9a-f]{64}\Z")


# -- between nodes
class ProposalOpened(Message, frozen=True):
    """Requestor -> provider: the first proposal of a negotiation, in answer to what its own node made of the offer."""

    proposal_id: str
    initial_id: str  # the requestor's own id of the Initial proposal
    offer_id: str
    demand: Document
    properties: str  # JSON, flat
    constraints: str
    created: float


class ProposalCountered(Message, frozen=True):
    """Either way: a proposal in answer to `previous_id`, which the receiver issued."""

    proposal_id: str
    previous_id: str
    properties: str  # JSON, flat
    constraints: str
    created: float


class ProposalRejected(Message, frozen=True):
    """Either way: no to a proposal that the receiver issued. `reason` is JSON of a Reason."""

    proposal_id: str
    reason: str


class AgreementProposed(Message, frozen=True):
    """Requestor -> provider: do you agree to this?"""

    agreement: Document


class AgreementApproval(Message, frozen=True):
    """Provider -> requestor: I agree. It counts once the requestor has committed to it."""

    agreement_id: str
    approval: Document


class AgreementRejected(Message, frozen=True):
    """Provider -> requestor: I do not agree."""

    agreement_id: str
    reason: str


class AgreementCommitted(Message, frozen=True):
    """Requestor -> provider: the agreement is made. `approval` is the provider's own, where its disk may have lost it."""

    agreement_id: str
    approved_at: float
    approval: Document | None = None


class AgreementClosed(Message, frozen=True):
    """Requestor -> provider: there will be no agreement. `state` is `Cancelled`, `Expired` or `Rejected`."""

    agreement_id: str
    state: str
    reason: str


class AgreementTerminated(Message, frozen=True):
    """Either way: the agreement is over."""

    agreement_id: str
    terminator: str
    reason: str


# -- to other actors of the node
class AgreementApproved(Message, frozen=True):
    """negotiation -> activity, ledger: both sides have committed to an agreement."""

    agreement_id: str
    role: Role  # ours
    requestor: str  # node id
    provider: str  # node id
    demand_properties: str  # JSON, flat
    offer_properties: str  # JSON, flat
    approved_at: float
    app_session_id: str | None


class AgreementEnded(Message, frozen=True):
    """negotiation -> activity, ledger: an approved agreement was terminated."""

    agreement_id: str
    terminator: str  # a `Role`
    reason: str  # JSON of the Reason, "" if none was given


# -- from the edge
class CounterProposal(Message, frozen=True):
    """Answer a proposal with another one. Replies `Created`."""

    subscription_id: str
    proposal_id: str
    properties: str  # JSON, flat
    constraints: str


class RejectProposal(Message, frozen=True):
    """Say no to a proposal. Replies `Done`."""

    subscription_id: str
    proposal_id: str
    reason: str


class CreateAgreement(Message, frozen=True):
    """Make an agreement of the provider's last proposal; nothing is sent yet. Replies `Created`."""

    proposal_id: str
    valid_to: float


class ConfirmAgreement(Message, frozen=True):
    """Send an agreement, signed, to the provider. Replies `Done`."""

    agreement_id: str
    agreement: Document
    app_session_id: str | None = None


class CancelAgreement(Message, frozen=True):
    """Take back an agreement that is not approved. Replies `Done`."""

    agreement_id: str
    reason: str


class ApproveAgreement(Message, frozen=True):
    """Agree, with a signature; made once the requestor commits (feed `agreement/<id>`). Replies `Done`."""

    agreement_id: str
    approval: Document
    app_session_id: str | None = None


class RejectAgreement(Message, frozen=True):
    """Do not agree. Replies `Done`."""

    agreement_id: str
    reason: str


class TerminateAgreement(Message, frozen=True):
    """End an approved agreement. Replies `Done`."""

    agreement_id: str
    reason: str


# -- replies to the edge
class Created(Message, frozen=True):
    """A proposal or agreement was made; `id` is 64 hex digits."""

    id: str


# -- in feeds `demand/<id>` and `offer/<id>`; `SubscriptionEnded` is the last one
class ProposalEvent(Message, frozen=True):
    """A proposal from the other side."""

    proposal_id: str


class ProposalRejectedEvent(Message, frozen=True):
    """The reader's own proposal was rejected."""

    proposal_id: str
    reason: str


class AgreementEvent(Message, frozen=True):
    """A requestor proposes an agreement."""

    agreement_id: str


# -- in feeds `agreements` and `agreement/<id>`
class AgreementApprovedEvent(Message, frozen=True):
    """Both sides have committed."""

    agreement_id: str
    app_session_id: str | None


class AgreementRejectedEvent(Message, frozen=True):
    """The provider does not agree."""

    agreement_id: str
    app_session_id: str | None
    reason: str


class AgreementCancelledEvent(Message, frozen=True):
    """The requestor took the agreement back, or the other side could not be reached."""

    agreement_id: str
    app_session_id: str | None
    reason: str


class AgreementTerminatedEvent(Message, frozen=True):
    """An approved agreement is over."""

    agreement_id: str
    app_session_id: str | None
    terminator: str
    reason: str


class AgreementExpired(Message, frozen=True):
    """In feed `agreement/<id>` only: no approval came in time."""

    agreement_id: str


# -- the machine's timers
class AgreementDue(Message, frozen=True):
    """The time for an agreement's approval, or of the agreement itself, is over."""

    agreement_id: str


class ForgetAgreement(Message, frozen=True):
    """An agreement has been over for long enough."""

    agreement_id: str


class ForgetProposals(Message, frozen=True):
    """A subscription has been over for long enough."""

    subscription_id: str


#: Events of a demand's or offer's feed.
SubscriptionEvents = ProposalEvent | ProposalRejectedEvent | AgreementEvent | SubscriptionEnded
#: Events about agreements.
AgreementEvents = (
    AgreementApprovedEvent | AgreementRejectedEvent | AgreementCancelledEvent | AgreementTerminatedEvent | AgreementExpired
)  # fmt: skip


# -- content
def read_properties(text: str) -> Mapping[str, Any]:
    """Return flat properties; the mapping is shared, do not change it. Raises `Violation`."""
    return (_remembered if len(text) <= REMEMBERED_BYTES else _remembered_large)(text)


def _read_properties(text: str) -> Mapping[str, Any]:
    if len(text) > MAX_DOCUMENT_BYTES:
        raise Violation(f"properties of {len(text)} characters are over the limit of {MAX_DOCUMENT_BYTES}")
    try:
        properties = strict_json.loads(text, most=MAX_VALUES)
        if not isinstance(properties, dict) or flatten(properties) != properties:
            raise Violation("the properties are not flat")
        if len(text.encode()) > MAX_DOCUMENT_BYTES or canonical(properties).decode() != text:
            raise Violation("the properties are too long or not canonical JSON")
    except (ValueError, TermsError) as error:
        raise Violation(f"the properties are not in order: {str(error)[:200]}") from None
    return properties


_remembered = functools.lru_cache(maxsize=1024)(_read_properties)
_remembered_large = functools.lru_cache(maxsize=REMEMBERED_LARGE)(_read_properties)


def check_hash(text: Any) -> str:
    """Return `text` if it is the id of a proposal or agreement: 64 hex digits. Raises `Violation`."""
    if not isinstance(text, str) or not _HASH.match(text):
        raise Violation("the id of a proposal or agreement has 64 hex digits")
    return text


def check_constraints(constraints: str) -> None:
    """Raises `Violation` for a text that is too long; whether it parses is the matching's business."""
    if len(constraints) > MAX_CONSTRAINT_BYTES or len(constraints.encode(errors="replace")) > MAX_CONSTRAINT_BYTES:
        raise Violation(f"the constraints are over the limit of {MAX_CONSTRAINT_BYTES} bytes")


def proposal_id(
    demand_id: str, offer_id: str, previous_id: str, issuer: str, properties: str, constraints: str, created: float
) -> str:
    """Return the id of a proposal: 64 hex digits, a hash of all there is to it."""
    return digest("proposal", demand_id, offer_id, previous_id, issuer, properties, constraints, timestamp_text(created))


def reason_text(message: str, **extra: Any) -> str:
    """Return the JSON of a Reason."""
    return canonical({"message": message, **extra}).decode()


def check_reason(reason: str) -> str:
    """Return a Reason from a peer in a form that agents can read: JSON object with text `message`, bounded."""
    if len(reason) > MAX_REASON_BYTES:
        raise Violation(f"a reason has at most {MAX_REASON_BYTES} characters")
    try:
        value = strict_json.loads(reason) if reason else {}
        if not isinstance(value, dict):
            raise Violation("a reason is a JSON object")
        if not isinstance(value.get("message"), str):
            value = {**value, "message": "no reason given"}
        return canonical(value).decode()
    except ValueError:
        raise Violation("a reason is a JSON object") from None


def agreement_body(
    proposal: str, created: float, valid_to: float, demand: Mapping[str, Any], offer: Mapping[str, Any]
) -> tuple[str, bytes]:
    """Return the id and the JSON that both sides sign.

    `demand` is {"demandId", "requestorId", "properties", "constraints"}, `offer` {"offerId", "providerId", ...}.
    """
    rest = {"proposalId": proposal, "created": created, "validTo": valid_to, "demand": demand, "offer": offer}
    agreement_id = digest("agreement", canonical(rest))
    return agreement_id, canonical({"agreementId": agreement_id, **rest})


def mismatch_text(demand: tuple[str, str], offer: tuple[str, str]) -> str:
    """Return why (properties, constraints) of a demand and of an offer do not match; nothing if they do."""
    reasons = explain(read_properties(demand[0]), demand[1], read_properties(offer[0]), offer[1])
    return summary(reasons)


def summary(reasons: list[Reason]) -> str:
    """Return the first reasons in a line, and how many more there are."""
    more = [f"and {len(reasons) - MAX_SHOWN_REASONS} more"] if len(reasons) > MAX_SHOWN_REASONS else []
    return "; ".join([reason.message for reason in reasons[:MAX_SHOWN_REASONS]] + more)
