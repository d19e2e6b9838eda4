"""Port `rest` of the provider agent: does at the node what the machine decided, and tells how it went.

Each message is worked on in a task of its own, so that a slow requestor holds nobody up; a message that comes again while
its task runs is ignored. Proposals come to port `proposals`, which hands them on: their link is another one, so that no
debit note waits behind them. What must not happen twice (debit notes, invoices) is looked for at the node first whenever the
message comes from an earlier run of the agent, or after an answer that got lost.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import trio

from actors.kernel.machine import Meta, Send
from actors.kernel.system import System
from golem.provider.client import ACTIVITY, MARKET, PAYMENT, NodeApiError, NodeAway, NodeClient, part
from golem.provider.offer import constraints
from golem.provider.polls import ProposalCache, pick_up_proposals, watch_offer
from protocol.property_names import LOCAL_CHAIN
from protocol.provider import (
    AcceptAgreement,
    ActivityClosed,
    AnswerProposal,
    ApprovalEnded,
    AskFunds,
    CloseActivity,
    EndAgreement,
    FundsKnown,
    InvoiceIssued,
    InvoiceSent,
    IssueNote,
    Kept,
    NoteIssued,
    NoteRead,
    NoteSent,
    OfferPublished,
    OfStrangers,
    PlaceOffer,
    ReadNote,
    ReadUsage,
    RefuseAgreement,
    RefuseProposal,
    SendInvoice,
    SendNote,
    Talk,
    TaskEnded,
    TerminationEnded,
    ToRest,
    UsageRead,
    WatchOffer,
    WithdrawOffer,
    WriteInvoice,
    task_key,
)
from protocol.states import AgreementState, DocumentStatus
from protocol.types import Message, amount_text, timestamp_text
from protocol.types import amount as parse_amount

log = logging.getLogger("golem.provider")

MAX_PROPOSALS, MAX_WAITING = 256, 4096  # answered at the same time; those and the ones that wait for it
TERMINATE_FIRST_S, TERMINATE_LAST_S = 5.0, 3600.0
ISSUE_LAST_S = 5.0
FINAL_USAGE_S = 60.0  # patience for the last usage of an activity
MAX_ASKING = 8  # payers whose accounts are looked at together: anybody may cause that
FUNDS_S = 10.0  # for the chain to answer
NEGOTIATION_S = 60.0  # a proposal is not worth more
MARGIN_S = 5.0
APPROVAL_LOOK_S = 1.0
LISTED = 1000


class RestPort:
    """The port; `run` must be running for its tasks to work."""

    name = "rest"
    local = ToRest
    peer = None

    def __init__(self, client: NodeClient, system: System, instance: str) -> None:
        self._client, self._system, self._instance = client, system, instance
        self._room = trio.Semaphore(MAX_PROPOSALS)
        self._running: set[str] = set()
        self._asking = 0  # for funds
        self._negotiating = 0  # proposals that are answered, or wait for it
        self._watches: dict[str, trio.CancelScope] = {}
        self._proposals = ProposalCache()
        self._nursery: trio.Nursery | None = None
        self._up = trio.Event()
        self._do: dict[type, Callable[[Any], Awaitable[Message | None]]] = {
            PlaceOffer: self._publish,
            WithdrawOffer: self._withdraw,
            AnswerProposal: self._counter,
            RefuseProposal: self._reject_proposal,
            AcceptAgreement: self._approve,
            RefuseAgreement: self._reject_agreement,
            EndAgreement: self._terminate,
            CloseActivity: self._close_activity,
            ReadUsage: self._read_usage,
            IssueNote: self._issue_note,
            SendNote: self._send_note,
            ReadNote: self._read_note,
            AskFunds: self._ask_funds,
            WriteInvoice: self._issue_invoice,
            SendInvoice: self._send_invoice,
        }

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work until cancelled."""
        async with trio.open_nursery() as self._nursery:
            self._up.set()
            task_status.started()
            await trio.sleep_forever()

    async def handle(self, message: ToRest, meta: Meta) -> Sequence[Send]:
        """Take a message on; its outcome is sent when it is there."""
        await self._up.wait()
        assert self._nursery is not None
        if isinstance(message, WatchOffer):
            if message.offer_id not in self._watches:
                self._watches[message.offer_id] = trio.CancelScope()
                self._nursery.start_soon(self._watch, message)
            return ()
        key = task_key(message)
        if key in self._running:
            return ()
        if isinstance(message, Talk):  # anybody may cause these; all else is bounded by our agreements
            if self._negotiating >= MAX_WAITING:
                log.warning("%s is not done: %d others wait", key[:40], self._negotiating)
                return [Send("provider", TaskEnded(key))]
            self._negotiating += 1
        if isinstance(message, AskFunds):
            if self._asking >= MAX_ASKING:
                return [Send("provider", FundsKnown(message.requestor, message.platform, None))]
            self._asking += 1
        self._running.add(key)
        self._nursery.start_soon(self._work, key, message, meta.trace)
        return ()

    async def _work(self, key: str, message: ToRest, trace: str) -> None:
        """Do a task and tell its outcome. Where the agent is killed meanwhile, its machine brings the task back."""
        try:
            async with self._room if isinstance(message, Talk) else nullcontext():  # they hold up one another alone
                outcome = await self._outcome(key, message)
            facts = [outcome, TaskEnded(key) if isinstance(message, Kept) else None]
            if sends := [Send("provider", fact) for fact in facts if fact is not None]:
                await self._system.post(self.name, sends, trace)
        finally:
            self._running.discard(key)
            self._negotiating -= isinstance(message, Talk)
            self._asking -= isinstance(message, AskFunds)

    async def _outcome(self, key: str, message: ToRest) -> Message | None:
        try:
            return await self._do[type(message)](message)
        except (NodeApiError, NodeAway) as error:
            log.warning("%s: %s", key[:40], error)
        except (KeyError, TypeError, ValueError, AttributeError):
            # an answer of another form than agreed; one document must not take the agent's other work with it
            log.exception("%s: the node's answer makes no sense", key[:40])
        return None

    async def _watch(self, message: WatchOffer) -> None:
        try:
            with self._watches[message.offer_id]:
                seen = await pick_up_proposals(self._client, self._system, self._proposals, message)
                lost = await watch_offer(self._client, self._system, self._proposals, message, seen)
                await self._system.post(self.name, [Send("provider", lost)])
        finally:
            del self._watches[message.offer_id]

    # -- offers and negotiation
    async def _publish(self, message: PlaceOffer) -> Message:
        properties = json.loads(message.properties)
        text = constraints(message.subnet, time.time(), properties.get(LOCAL_CHAIN))
        body = {"properties": properties, "constraints": text}
        offer_id = await self._client.persist(
            "publishing the offer", partial(self._client.call, "POST", f"{MARKET}/offers", body=body)
        )
        log.info("offer %s (preset %s) is published", str(offer_id)[:12], message.preset)
        return OfferPublished(message.preset, message.serial, str(offer_id))

    async def _withdraw(self, message: WithdrawOffer) -> None:
        if scope := self._watches.get(message.offer_id):
            scope.cancel()
        try:
            await self._until(15, "withdrawing an offer", "DELETE", f"{MARKET}/offers/{part(message.offer_id)}")
            log.info("offer %s is withdrawn", message.offer_id[:12])
        except NodeApiError as error:
            if error.status not in (404, 410):
                raise

    async def _counter(self, message: AnswerProposal) -> None:
        path = f"{MARKET}/offers/{part(message.offer_id)}/proposals/{part(message.proposal_id)}"
        properties = json.loads(message.properties)
        body = {"properties": properties, "constraints": message.constraints}
        new_id = await self._until(NEGOTIATION_S, "countering a proposal", "POST", path, body)
        self._proposals.put(str(new_id), message.properties, message.constraints)
        log.info("proposal %s countered", message.proposal_id[:14])

    async def _reject_proposal(self, message: RefuseProposal) -> None:
        path = f"{MARKET}/offers/{part(message.offer_id)}/proposals/{part(message.proposal_id)}/reject"
        log.info("proposal %s rejected: %s", message.proposal_id[:14], _text(message.reason))
        await self._until(NEGOTIATION_S, "rejecting a proposal", "POST", path, json.loads(message.reason))

    async def _until(self, patience_s: float, what: str, method: str, path: str, body: Any = ...) -> Any:
        call = partial(self._client.call, method, path, body=body)
        return await self._client.persist(what, call, until=trio.current_time() + patience_s)

    # -- agreements
    async def _approve(self, message: AcceptAgreement) -> Message:
        """Approve, and be sure of what came of it: an answer may be lost while the requestor commits all the same."""
        path = f"{MARKET}/agreements/{part(message.agreement_id)}"
        params = {"appSessionId": message.session_id, "timeout": message.timeout_s}
        why = ""
        try:
            await self._client.call("POST", f"{path}/approve", params=params, timeout_s=message.timeout_s + MARGIN_S)
            state: str = AgreementState.APPROVED
        except (NodeApiError, NodeAway) as error:
            why = str(error)
            state = await self._state(path)
        if state == AgreementState.PENDING:  # nobody waits for it that long: no, then, unless it is approved meanwhile
            with suppress(NodeApiError, NodeAway):
                await self._client.call("POST", f"{path}/reject", body={"message": f"The approval failed: {why}"})
        while state == AgreementState.PENDING:
            state = await self._state(path)
            await trio.sleep(APPROVAL_LOOK_S)
        approved = state == AgreementState.APPROVED
        log.info("agreement %s is %s", message.agreement_id[:12], "approved" if approved else f"not approved: {why}")
        return ApprovalEnded(message.agreement_id, approved, why)

    async def _state(self, path: str) -> str:
        try:
            found = await self._client.persist("reading an agreement", partial(self._client.call, "GET", path))
        except NodeApiError as error:
            return str(error)
        return str(found["state"])

    async def _reject_agreement(self, message: RefuseAgreement) -> None:
        path = f"{MARKET}/agreements/{part(message.agreement_id)}/reject"
        log.info("agreement %s rejected: %s", message.agreement_id[:12], _text(message.reason))
        await self._until(NEGOTIATION_S, "rejecting an agreement", "POST", path, json.loads(message.reason))

    async def _terminate(self, message: EndAgreement) -> Message:
        path = f"{MARKET}/agreements/{part(message.agreement_id)}/terminate"
        log.info("agreement %s ends: %s", message.agreement_id[:12], _text(message.reason))
        call = partial(self._client.call, "POST", path, body=json.loads(message.reason))
        try:
            await self._client.persist("terminating an agreement", call, first_s=TERMINATE_FIRST_S, last_s=TERMINATE_LAST_S)
        except NodeApiError as error:
            level = logging.DEBUG if error.status in (404, 409, 410) else logging.WARNING  # those mean: it is over already
            log.log(level, "terminating agreement %s: %s", message.agreement_id[:12], error)
        return TerminationEnded(message.agreement_id)

    # -- activities
    async def _close_activity(self, message: CloseActivity) -> Message:
        path = f"{ACTIVITY}/activity/{part(message.activity_id)}"
        state: dict[str, Any] = {"state": [AgreementState.TERMINATED, None], "reason": message.reason}
        if message.error_message:
            state["errorMessage"] = message.error_message
        log.info("activity %s ended: %s", message.activity_id[:8], f"{message.reason} {message.error_message}".strip())
        try:
            await self._until(FINAL_USAGE_S, "reporting the end of an activity", "PUT", f"{path}/state", state)
        except (NodeApiError, NodeAway) as error:
            log.warning("the end of activity %s could not be reported: %s", message.activity_id[:8], error)
        try:
            usage = _usage(await self._until(FINAL_USAGE_S, "reading the last usage", "GET", f"{path}/usage"))
        except (NodeApiError, NodeAway) as error:
            log.warning("the last usage of activity %s could not be read: %s", message.activity_id[:8], error)
            usage = None
        return ActivityClosed(message.activity_id, usage)

    async def _read_usage(self, message: ReadUsage) -> Message:
        path = f"{ACTIVITY}/activity/{part(message.activity_id)}/usage"
        try:
            return UsageRead(message.activity_id, _usage(await self._client.call("GET", path)))
        except (NodeApiError, NodeAway) as error:
            log.warning("usage of activity %s: %s", message.activity_id[:8], error)
            return UsageRead(message.activity_id, None)

    async def _ask_funds(self, message: AskFunds) -> Message:
        path, params = f"{PAYMENT}/payers/{part(message.requestor)}/funds", {"platform": message.platform}
        amount: str | None = None
        try:
            found = await self._client.call("GET", path, params=params, timeout_s=FUNDS_S)
            amount = amount_text(parse_amount(str(found["amount"])))
        except (NodeApiError, NodeAway, KeyError, TypeError, ValueError) as error:
            log.warning("what %s can pay on %s is not known: %s", message.requestor, message.platform[:40], error)
        return FundsKnown(message.requestor, message.platform, amount)

    # -- debit notes
    async def _issue_note(self, message: IssueNote) -> Message:
        body = {
            "activityId": message.activity_id,
            "totalAmountDue": message.amount,
            "usageCounterVector": list(message.usage),
            "paymentDueDate": None if message.due_at is None else timestamp_text(message.due_at),
        }

        def same(one: Any) -> bool:
            return one["activityId"] == message.activity_id and (one.get("previousDebitNoteId") or "") == message.previous_id

        try:
            found = await self._once("debitNotes", body, same, message.since, message.instance)
        except NodeApiError as error:
            log.error("debit note %d of activity %s was refused: %s", message.number, message.activity_id[:8], error)
            return NoteIssued(message.activity_id, message.number, "", str(error))
        return NoteIssued(message.activity_id, message.number, str(found["debitNoteId"]))

    async def _once(self, path: str, body: Any, same: Callable[[Any], bool], since: float, instance: str) -> Any:
        """Create a document that does not exist yet, or return the one that does. Raises `NodeApiError`."""
        look_first = instance != self._instance

        async def attempt() -> Any:
            nonlocal look_first
            if look_first:
                params = {"afterTimestamp": timestamp_text(since - MARGIN_S), "maxItems": LISTED}
                listed = await self._client.call("GET", f"{PAYMENT}/{path}", params=params)
                for one in listed if isinstance(listed, list) else ():
                    if same(one) and one.get("status") != DocumentStatus.CANCELLED:
                        return one
            look_first = True  # an answer may get lost
            return await self._client.call("POST", f"{PAYMENT}/{path}", body=body)

        return await self._client.persist(f"issuing ({path})", attempt, last_s=ISSUE_LAST_S)

    async def _send_note(self, message: SendNote) -> Message:
        path = f"{PAYMENT}/debitNotes/{part(message.note_id)}/send"
        call = partial(self._client.call, "POST", path, params={"timeout": 15}, timeout_s=15 + MARGIN_S)
        try:
            await self._client.persist("sending a debit note", call, until=message.give_up_at, now=time.time)
        except (NodeApiError, NodeAway) as error:
            log.warning("debit note %d of activity %s could not be sent: %s", message.number, message.activity_id[:8], error)
            most = error.highest_amount if isinstance(error, NodeApiError) else ""
            return NoteSent(message.activity_id, message.number, False, str(error), most)
        log.info("debit note %d of activity %s is sent", message.number, message.activity_id[:8])
        return NoteSent(message.activity_id, message.number, True)

    async def _read_note(self, message: ReadNote) -> Message:
        call = partial(self._client.call, "GET", f"{PAYMENT}/debitNotes/{part(message.note_id)}")
        found = await self._client.persist("reading a debit note", call)
        return NoteRead(message.activity_id, message.number, message.deadline, str(found["status"]))

    # -- invoices
    async def _issue_invoice(self, message: WriteInvoice) -> Message:
        body = {
            "agreementId": message.agreement_id,
            "activityIds": list(message.activity_ids),
            "amount": message.amount,
            "paymentDueDate": timestamp_text(message.due_at),
        }

        def same(one: Any) -> bool:
            return bool(one["agreementId"] == message.agreement_id and one["invoiceId"] != message.refused_id)

        try:
            found = await self._once("invoices", body, same, message.since, message.instance)
        except NodeApiError as error:
            log.error("the invoice of agreement %s was refused: %s", message.agreement_id[:12], error)
            return InvoiceIssued(message.agreement_id, "", str(error))
        log.info("invoice of agreement %s: %s GLM", message.agreement_id[:12], message.amount)
        return InvoiceIssued(message.agreement_id, str(found["invoiceId"]))

    async def _send_invoice(self, message: SendInvoice) -> Message:
        path = f"{PAYMENT}/invoices/{part(message.invoice_id)}/send"
        call = partial(self._client.call, "POST", path, params={"timeout": 15}, timeout_s=15 + MARGIN_S)
        try:
            await self._client.persist("sending an invoice", call)
        except NodeApiError as error:
            log.error("the invoice of agreement %s cannot be sent: %s", message.agreement_id[:12], error)
            return InvoiceSent(message.agreement_id, str(error), error.highest_amount)
        log.info("invoice of agreement %s is sent", message.agreement_id[:12])
        return InvoiceSent(message.agreement_id)


class ProposalPort:
    """The port for what strangers cause; `RestPort` does it."""

    name = "proposals"
    local = OfStrangers
    peer = None

    def __init__(self, rest: RestPort) -> None:
        self._rest = rest

    async def handle(self, message: ToRest, meta: Meta) -> Sequence[Send]:
        """Take a message on."""
        return await self._rest.handle(message, meta)


def _usage(answer: Any) -> list[float] | None:
    """Return the usage vector of an answer; None where there is none (yet)."""
    raw = answer.get("currentUsage") if isinstance(answer, dict) else None
    if not isinstance(raw, list) or not all(isinstance(one, int | float) and 0 <= one < 1e15 for one in raw):
        return None
    return [float(one) for one in raw]


def _text(reason: str) -> str:
    return str(json.loads(reason).get("message", ""))
