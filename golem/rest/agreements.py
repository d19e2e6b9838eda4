"""Market API: agreements and their events."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import trio
from quart import Blueprint, Response

from actors.negotiation.rows import AgreementRow, state_at
from golem.node.market_forms import agreement_event_form, agreement_form, agreement_summary, decode_agreement_event
from golem.rest.edge import (
    ApiError,
    ask,
    empty,
    json_body,
    listed,
    member,
    no_content,
    object_body,
    query_float,
    query_int,
    query_text,
    query_time,
    respond_json,
    until,
)
from protocol.market import canonical
from protocol.negotiation import (
    MAX_REASON_BYTES,
    MAX_SESSION_CHARS,
    AgreementTerminatedEvent,
    ApproveAgreement,
    CancelAgreement,
    ConfirmAgreement,
    CreateAgreement,
    RejectAgreement,
    TerminateAgreement,
)
from protocol.states import AgreementState, DocumentKind, Role
from protocol.types import timestamp

if TYPE_CHECKING:
    from golem.node.node import Node

DEFAULT_TIMEOUT_S = 5.0
PAGE = 200
NEWS_S, NEWS_STEP_S = 2.0, 0.005  # an approval's way to the other actors of this node takes a commit or two
STATES = (
    AgreementState.PROPOSAL,
    AgreementState.PENDING,
    AgreementState.CANCELLED,
    AgreementState.REJECTED,
    AgreementState.APPROVED,
    AgreementState.EXPIRED,
    AgreementState.TERMINATED,
)
AGREEMENT_ID = re.compile(r"(?:[RP]-)?([0-9a-f]{64})\Z")
PROVIDERS_PROPOSAL = re.compile(r"R-([0-9a-f]{64})\Z")
DECIDED = (
    AgreementState.APPROVED,
    AgreementState.REJECTED,
    AgreementState.CANCELLED,
    AgreementState.EXPIRED,
    AgreementState.TERMINATED,
)
SINCE_EVER = timestamp("2016-11-11T15:12:00Z")


def register(api: Blueprint, node: Node) -> None:
    """Add the endpoints of agreements to the market API."""
    _reading(api, node)
    _requestor(api, node)
    _provider(api, node)
    _ending(api, node)
    _events(api, node)


# -- parsing
def agreement_id(text: str) -> str:
    """Return the id of an agreement, without the letter that may stand before it. Raises `ApiError` 400."""
    match = AGREEMENT_ID.match(text[:2].upper() + text[2:].lower() if text[1:2] == "-" else text.lower())
    if not match:
        raise ApiError(400, f"Invalid agreement id '{text[:80]}': expected 64 hex digits.")
    return match[1]


def find(node: Node, wanted: str, role: str = "") -> AgreementRow:
    """Return an agreement in which this node has `role` (any if ""). Raises `ApiError` 400 or 404."""
    wanted_id = agreement_id(wanted)
    agreement: AgreementRow | None = node.system.rows("negotiation").get(f"agreement/{wanted_id}")
    if agreement is None or role not in ("", agreement.role):
        raise ApiError(404, f"Agreement [{wanted_id}] not found{role and f' with this node as {role}'}.")
    return agreement


def reason_json(value: Any) -> str:
    """Return a Reason (object or null) as JSON text. Raises `ApiError` 400."""
    if value is None:
        return ""
    if not isinstance(value, dict):
        raise ApiError(400, "a reason is a JSON object or null")
    if not isinstance(value.get("message", ""), str):
        raise ApiError(400, "field `message`: expected a text")
    raw = canonical(value)
    if len(raw) > MAX_REASON_BYTES:
        raise ApiError(400, f"a reason has at most {MAX_REASON_BYTES} bytes")
    return raw.decode()


def session_id() -> str | None:
    """Return the query's `appSessionId`. Raises `ApiError` 400."""
    return query_text("appSessionId", limit=MAX_SESSION_CHARS) or None


# -- reading
def _reading(api: Blueprint, node: Node) -> None:
    @api.get("/agreements")
    async def listing() -> Response:
        state, session = query_text("state"), session_id()
        after, before = query_time("afterDate"), query_time("beforeDate")
        if state and state not in STATES:
            raise ApiError(400, f"query parameter state={state[:40]!r}: expected one of {', '.join(STATES)}")
        now = node.clock()
        found = [
            agreement
            for agreement in listed(node, "negotiation", "agreement/")
            if (not state or state_at(agreement, now) == state)
            and (after is None or agreement.created > after)
            and (before is None or agreement.created < before)
            and (session is None or agreement.app_session_id == session)
        ]
        return respond_json([agreement_summary(agreement, now) for agreement in sorted(found, key=lambda one: one.created)])

    @api.get("/agreements/<wanted>")
    async def get(wanted: str) -> Response:
        return respond_json(agreement_form(find(node, wanted), node.clock()))

    @api.get("/agreements/<wanted>/terminate/reason")
    async def terminate_reason(wanted: str) -> Response:
        agreement = find(node, wanted)
        if agreement.state != AgreementState.TERMINATED or agreement.ended_at is None:
            raise ApiError(400, f"Agreement [{agreement.agreement_id}] is not terminated.")
        event = AgreementTerminatedEvent(agreement.agreement_id, agreement.app_session_id, agreement.terminator, agreement.reason)
        return respond_json(agreement_event_form(agreement.ended_at, event))


# -- requestor
def _requestor(api: Blueprint, node: Node) -> None:
    @api.post("/agreements")
    async def create() -> Response:
        body = await object_body()
        wanted, valid_to = member(body, "proposalId", str), member(body, "validTo", str)
        match = PROVIDERS_PROPOSAL.match(wanted[:2].upper() + wanted[2:].lower())
        if not match:
            raise ApiError(400, f"Invalid proposal id '{wanted[:80]}': expected R- and 64 hex digits.")
        try:
            valid_to_s = timestamp(valid_to)
        except (ValueError, OverflowError) as error:
            raise ApiError(400, f"field `validTo`: {error}") from None
        reply = await ask(node, "negotiation", CreateAgreement(match[1], valid_to_s))
        return respond_json(reply.id)

    @api.post("/agreements/<wanted>/confirm")
    async def confirm(wanted: str) -> Response:
        session, agreement = session_id(), find(node, wanted, Role.REQUESTOR)
        document = node.identity.sign(DocumentKind.AGREEMENT, agreement.body)
        await ask(node, "negotiation", ConfirmAgreement(agreement.agreement_id, document, session))
        return no_content()

    @api.post("/agreements/<wanted>/wait")
    async def wait(wanted: str) -> Response:
        timeout_s, agreement = query_float("timeout", DEFAULT_TIMEOUT_S), find(node, wanted)
        if state_at(agreement, node.clock()) == AgreementState.PROPOSAL:
            raise ApiError(400, f"Agreement [{agreement.agreement_id}] is not confirmed yet: there is nothing to wait for.")
        state = await _decision(node, agreement.agreement_id, timeout_s)
        if state is None:
            raise ApiError(408, f"Agreement [{agreement.agreement_id}] was not decided within {timeout_s:g} seconds.")
        if state == AgreementState.TERMINATED:
            raise ApiError(400, f"Agreement [{agreement.agreement_id}] is terminated.")
        if state != AgreementState.APPROVED:
            raise ApiError(410, state)
        return no_content()

    @api.post("/agreements/<wanted>/cancel")
    async def cancel(wanted: str) -> Response:
        agreement, reason = find(node, wanted, Role.REQUESTOR), reason_json(await json_body(default=None))
        await ask(node, "negotiation", CancelAgreement(agreement.agreement_id, reason))
        return empty()


async def _decision(node: Node, wanted_id: str, timeout_s: float) -> str | None:
    """Return the state of an agreement once it is decided; None if it is not within the time."""

    def probe() -> str | None:
        agreement = node.system.rows("negotiation").get(f"agreement/{wanted_id}")
        state = state_at(agreement, node.clock()) if agreement else AgreementState.EXPIRED
        return state if state in DECIDED else None

    state = await until(node, [f"agreement/{wanted_id}"], probe, timeout_s)
    if state == AgreementState.APPROVED:
        with trio.move_on_after(NEWS_S):  # who hears of success goes on at once: activities must know of the agreement
            while f"agreement/{wanted_id}" not in node.system.rows("activity"):
                await trio.sleep(NEWS_STEP_S)
    return state


# -- provider
def _provider(api: Blueprint, node: Node) -> None:
    @api.post("/agreements/<wanted>/approve")
    async def approve(wanted: str) -> Response:
        session, timeout_s = session_id(), query_float("timeout", DEFAULT_TIMEOUT_S)
        agreement = find(node, wanted, Role.PROVIDER)
        if agreement.state == AgreementState.CANCELLED:
            raise ApiError(410, AgreementState.CANCELLED)
        document = node.identity.sign(DocumentKind.APPROVAL, agreement.body)
        await ask(node, "negotiation", ApproveAgreement(agreement.agreement_id, document, session))
        state = await _decision(node, agreement.agreement_id, timeout_s)
        if state is None:
            text = f"the requestor did not commit to agreement [{agreement.agreement_id}] within {timeout_s:g} seconds"
            raise ApiError(500, f"Protocol timeout: {text}.")
        if state not in (
            AgreementState.APPROVED,
            AgreementState.TERMINATED,
        ):  # a commit may be followed by a termination before we look
            raise ApiError(410, state)
        return no_content()

    @api.post("/agreements/<wanted>/reject")
    async def reject(wanted: str) -> Response:
        agreement, reason = find(node, wanted, Role.PROVIDER), reason_json(await json_body(default=None))
        await ask(node, "negotiation", RejectAgreement(agreement.agreement_id, reason))
        return empty()


def _ending(api: Blueprint, node: Node) -> None:
    @api.post("/agreements/<wanted>/terminate")
    async def terminate(wanted: str) -> Response:
        agreement, reason = find(node, wanted), reason_json(await json_body(default=None))
        await ask(node, "negotiation", TerminateAgreement(agreement.agreement_id, reason))
        return empty()


# -- events
def _events(api: Blueprint, node: Node) -> None:
    @api.get("/agreementEvents")
    async def events() -> Response:
        timeout_s, session = query_float("timeout", DEFAULT_TIMEOUT_S), session_id()
        limit = query_int("maxEvents", node.config.max_events_default, 1, node.config.max_events)
        after = query_time("afterTimestamp")
        cursor = SINCE_EVER if after is None else after

        def probe() -> list[dict[str, Any]] | None:
            nonlocal cursor  # what was looked at and belongs to another session is not looked at again
            forms: list[dict[str, Any]] = []
            while page := node.system.feeds.read_after("agreements", cursor, PAGE):
                for event in page:
                    cursor = event.at
                    message = decode_agreement_event(event.body)
                    form = agreement_event_form(event.at, message)
                    if form and (session is None or getattr(message, "app_session_id", None) == session):
                        forms.append(form)
                        if len(forms) == limit:
                            return forms
            return forms or None

        return respond_json(await until(node, ["agreements"], probe, timeout_s) or [])
