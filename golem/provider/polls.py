"""Long polls of the node: what comes in is given to the machine, one event at a time, and the cursor moves with it."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import trio

from actors.kernel.machine import ActorFailed, AskTimeout, Busy
from actors.kernel.system import System
from golem.provider.client import ACTIVITY, MARKET, PAYMENT, NodeApiError, NodeAway, NodeClient, part
from protocol.provider import AgreementArrived, EventArrived, OfferLost, ProposalArrived, WatchOffer
from protocol.types import Message, Violation, timestamp, timestamp_text

log = logging.getLogger("golem.provider")

MAX_EVENTS = 50
FIRST_PAUSE_S, LAST_PAUSE_S = 0.25, 5.0  # 0.25, 0.5, 1, 2, 4, 5, 5 ...
CACHED_PROPOSALS = 1000
_NONSENSE = (KeyError, TypeError, ValueError, AttributeError)  # JSON of another form than agreed


class ProposalCache:
    """Properties (JSON) and constraints of our own last counter-proposals by their id, which spares a look-up each."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[str, str]] = OrderedDict()

    def put(self, proposal_id: str, properties: str, constraints: str) -> None:
        self._known[proposal_id] = properties, constraints
        if len(self._known) > CACHED_PROPOSALS:
            self._known.popitem(last=False)

    def get(self, proposal_id: str) -> tuple[str, str] | None:
        return self._known.get(proposal_id)


async def watch_offer(
    client: NodeClient, system: System, cache: ProposalCache, offer: WatchOffer, seen: Collection[str] = ()
) -> OfferLost:
    """Give the events of an offer to the machine until the node does not know it any more; not those of proposals `seen`."""
    path = f"{MARKET}/offers/{part(offer.offer_id)}"
    pause_s = FIRST_PAUSE_S
    while True:
        started_at = trio.current_time()
        try:
            events = await client.poll(f"{path}/events", {"maxEvents": MAX_EVENTS})
            pause_s = FIRST_PAUSE_S
        except NodeApiError as error:
            if error.status in (404, 410):
                log.info("offer %s is over at the node", offer.offer_id[:12])
                return OfferLost(offer.preset, offer.offer_id)
            pause_s = await _pause("events of the offer", error, pause_s)
            continue
        except NodeAway as error:
            pause_s = await _pause("events of the offer", error, pause_s)
            continue
        for event in events:
            if _proposal_id(event) not in seen:
                await _give_offer_event(client, system, cache, offer, event)
        await _not_too_fast(events, started_at)


async def _give_offer_event(client: NodeClient, system: System, cache: ProposalCache, offer: WatchOffer, event: Any) -> None:
    """Give an event to the machine, which the node hands out but once: only what makes no sense is left out."""
    path, pause_s = f"{MARKET}/offers/{part(offer.offer_id)}", FIRST_PAUSE_S
    while True:
        try:
            message = await _offer_event(client, cache, path, offer, event)
            if message is not None:
                await system.ask("provider", message)
            return
        except (NodeApiError, NodeAway, AskTimeout, Busy, ActorFailed, Violation, *_NONSENSE) as error:
            if not isinstance(error, NodeAway | AskTimeout | Busy) and not (isinstance(error, NodeApiError) and error.passing):
                log.warning("an event of offer %s is left out: %r", offer.offer_id[:12], error)
                return
            pause_s = await _pause(f"an event of offer {offer.offer_id[:12]} waits", error, pause_s)


async def pick_up_proposals(client: NodeClient, system: System, cache: ProposalCache, offer: WatchOffer) -> set[str]:
    """Give the machine the proposals that nobody has answered: their events went to a run that did not live to act."""
    try:
        found = await client.persist(
            "looking for proposals that wait",
            partial(client.call, "GET", f"{MARKET}/offers/{part(offer.offer_id)}/proposals"),
        )
    except NodeApiError as error:
        log.debug("no proposals of offer %s that wait: %s", offer.offer_id[:12], error)
        return set()
    waiting = found if isinstance(found, list) else []
    for proposal in waiting:
        await _give_offer_event(client, system, cache, offer, {"eventType": "ProposalEvent", "proposal": proposal})
    return {str(proposal.get("proposalId")) for proposal in waiting if isinstance(proposal, dict)}


def _proposal_id(event: Any) -> str:
    """Return the id of an event's proposal, empty if it has none."""
    proposal = event.get("proposal") if isinstance(event, dict) else None
    return str(proposal.get("proposalId")) if isinstance(proposal, dict) else ""


async def _offer_event(client: NodeClient, cache: ProposalCache, path: str, offer: WatchOffer, event: Any) -> Message | None:
    """Return what an event of an offer means to the machine. Raises `NodeApiError`, `NodeAway` and `KeyError` and the like."""
    kind = event["eventType"]
    if kind == "AgreementEvent":
        return AgreementArrived(offer.preset, offer.offer_id, json.dumps(event["agreement"]))
    if kind == "ProposalRejectedEvent":
        why = event.get("reason") or {}
        log.info("the requestor rejected proposal %s: %s", str(event["proposalId"])[:14], str(why.get("message"))[:200])
        return None
    if kind != "ProposalEvent":
        return None
    proposal = event["proposal"]
    previous_id = str(proposal["prevProposalId"])
    ours = cache.get(previous_id)
    if ours is None:
        found = await client.call("GET", f"{path}/proposals/{part(previous_id)}")
        ours = json.dumps(found["properties"]), str(found["constraints"])
    demand = json.dumps(proposal["properties"])
    names = str(proposal["proposalId"]), str(proposal["issuerId"])
    return ProposalArrived(offer.preset, offer.offer_id, *names, demand, *ours, origin=str(proposal.get("origin", ""))[:100])


async def follow(client: NodeClient, system: System, feed: str, session_id: str, since: float) -> None:
    """Give the events of a durable feed to the machine, for ever, from where it stands.

    At first, or where that was lost, it is from `since` on.
    """
    path, read = FEEDS[feed]
    session = {"appSessionId": session_id} if session_id else {}  # all events, where the agent has lost its session
    cursor = system.sound("provider", f"cursor/{feed}")  # without it the events come once more, which changes nothing
    after = since if cursor is None else cursor.at
    pause_s = FIRST_PAUSE_S
    while True:
        params = {"afterTimestamp": timestamp_text(after), "maxEvents": MAX_EVENTS} | session
        started_at = trio.current_time()
        try:
            events = await client.poll(path, params)
            for event in events:
                at = timestamp(event["eventDate"])
                await _give(system, feed, read, event, at)
                after = max(after, at)
            pause_s = FIRST_PAUSE_S
        except (NodeApiError, NodeAway, AskTimeout, Busy, *_NONSENSE) as error:
            pause_s = await _pause(f"events ({feed})", error, pause_s)
            continue
        await _not_too_fast(events, started_at)


async def _give(
    system: System, feed: str, read: Callable[[Mapping[str, Any], float], EventArrived], event: Any, at: float
) -> None:
    """Give one event to the machine. One that makes no sense is left out: it would not make more the next time."""
    try:
        await system.ask("provider", read(event, at))
    except (ActorFailed, Violation, *_NONSENSE) as error:
        log.error("an event (%s) is left out: %r", feed, error)


async def _pause(what: str, error: Exception, pause_s: float) -> float:
    """Wait after a failure; return the next pause."""
    quiet = isinstance(error, NodeAway) and not LAST_PAUSE_S / 2 < pause_s < LAST_PAUSE_S  # a node that is away: once
    level = logging.DEBUG if quiet else logging.WARNING
    log.log(level, "%s: %s", what, repr(error) if isinstance(error, _NONSENSE) else error)
    await trio.sleep(pause_s)
    return min(pause_s * 2, LAST_PAUSE_S)


async def _not_too_fast(events: list[Any], started_at: float) -> None:
    """A node that answers empty polls at once is not asked in a busy loop."""
    if not events and trio.current_time() - started_at < FIRST_PAUSE_S:
        await trio.sleep(FIRST_PAUSE_S)


def _agreement_event(event: Mapping[str, Any], at: float) -> EventArrived:
    why = event.get("reason") or {}
    text = str(why.get("message", "")) if isinstance(why, dict) else ""
    log.info("agreement %s: %s %s", str(event["agreementId"])[:12], event["eventType"], text[:200])
    return EventArrived(
        "agreements", at, str(event["eventType"]), str(event["agreementId"]), str(event.get("terminator", "")), text[:300]
    )


def _activity_event(event: Mapping[str, Any], at: float) -> EventArrived:
    raw = event["eventType"]
    kind = str(next(iter(raw))) if isinstance(raw, dict) else str(raw)
    log.info("activity %s: %s", str(event["activityId"])[:8], kind)
    return EventArrived("activities", at, kind, str(event["activityId"]), str(event["agreementId"]))


def _document_event(feed: str, key: str) -> Callable[[Mapping[str, Any], float], EventArrived]:
    def read(event: Mapping[str, Any], at: float) -> EventArrived:
        log.info("%s: %s", str(event[key])[:8], event["eventType"])
        return EventArrived(feed, at, str(event["eventType"]), str(event[key]))

    return read


FEEDS: dict[str, tuple[str, Callable[[Mapping[str, Any], float], EventArrived]]] = {
    "agreements": (f"{MARKET}/agreementEvents", _agreement_event),
    "activities": (f"{ACTIVITY}/events", _activity_event),
    "debit-notes": (f"{PAYMENT}/debitNoteEvents", _document_event("debit-notes", "debitNoteId")),
    "invoices": (f"{PAYMENT}/invoiceEvents", _document_event("invoices", "invoiceId")),
}
