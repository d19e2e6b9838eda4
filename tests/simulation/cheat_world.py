"""Strangers at one provider, on a mock clock: its real agent, negotiation, activity and ledger against nodes that cheat.

Each stranger has a node of real machines, so that ids and signatures are in order, a script that behaves as an SDK does,
and a `Cheat` that stands on its wire: it may omit, delay, repeat or change whatever the node would send. Exe-units work all
the time on all their threads. `exposure()` is what a provider has worked for a stranger and was not paid.
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any

from worlds.market_world import KEYS, demand, offer
from worlds.money import PLATFORM
from worlds.playbook import START, Playbook, playbook

from actors.activity.machine import Activity
from actors.kernel.machine import Send
from actors.ledger.machine import Ledger, acceptance_of
from actors.negotiation.machine import Negotiation
from actors.provider.machine import Provider
from actors.provider.rules import Terms
from actors.provider.turn import ProviderConfig
from golem.node.market_forms import agreement_form
from protocol import activity as act
from protocol import ledger as money
from protocol import negotiation as talk
from protocol import provider as agent
from protocol.amounts import cost
from protocol.market import Matched, Rematch, SubscriptionOpened, canonical
from protocol.signing import node_id_of, sign
from protocol.types import Message, Refused, Undelivered, Violation, actor_of, digest, node_of
from protocol.wallet import PaidOut, PayOut, TransferRejected, TransferVerified, VerifyTransfer

ADDRESS = f"golem.com.payment.platform.{PLATFORM}.address"
COEFFS, VECTOR = "golem.com.pricing.model.linear.coeffs", "golem.com.usage.vector"
ACCEPT, INTERVAL, TIMEOUT = (
    "golem.com.payment.debit-notes.accept-timeout?", "golem.com.scheme.payu.debit-note.interval-sec?",
    "golem.com.scheme.payu.payment-timeout-sec?",
)  # fmt: skip
THREADS = 4
PRICES = [0.00001, 0.00002, 0.0]  # GLM: a second, a second of a thread, the start
SECOND = Decimal("0.00001") + Decimal("0.00002") * THREADS  # what a second of work costs
DAY_S = 24 * 3600.0
PROVIDER_KEY = KEYS[0]
PROVIDER = node_id_of(PROVIDER_KEY)
REASON = '{"message":"done"}'
TICK_S = 25.0  # an exe-unit may be silent for 30 s
AWAY_S = 0.02  # the way of a message between nodes


class Cheat:
    """What a modified node does to what it sends; an honest one nothing. Yields (delay, message)."""

    def says(self, world: CheatWorld, to: str, message: Message) -> Iterable[tuple[float, Message]]:
        yield 0.0, message

    def hears(self, world: CheatWorld, message: Message) -> bool:
        """Return whether the node takes notice of a message."""
        return True


class Stranger:
    """A requestor: a node and a script that negotiates, rents without end, and accepts and pays what it owes."""

    def __init__(self, world: CheatWorld, key: bytes, cheat: Cheat, demanded: dict[str, Any], pace_s: float) -> None:
        self.world, self.key, self.id, self.cheat, self.pace_s = world, key, node_id_of(key), cheat, pace_s
        self.plays = {
            name: quick(playbook(machine(self.id), self.id, world.now))  # type: ignore[arg-type]
            for name, machine in (("negotiation", Negotiation), ("activity", Activity), ("ledger", Ledger))
        }
        self.demanded = demanded
        self.agreement_id = self.activity_id = ""
        self.accepts, self.pays, self.rents, self.again = True, True, True, True
        self.rent_s = DAY_S
        self.count, self.owed, self.agreements, self.rejections = 0, Decimal(0), 0, []  # type: ignore[var-annotated]
        self.timeout_s: float | None = None
        self.funds: str | None = "1000"  # what the chain says of its account; None: it does not answer

    def start(self) -> None:
        """Publish a demand and counter the offer."""
        now = self.world.now
        chosen = {"golem.com.payment.chosen-platform": PLATFORM, ADDRESS: self.id}
        expires = {"golem.srv.comp.expiration": int((now + self.rent_s) * 1000), "golem.srv.caps.multi-activity": True}
        self.count += 1
        self.demand_id, self.document = demand(
            now, self.key, self.count, constraints="(golem.runtime.name=vm)", **{**chosen, **expires, **self.demanded}
        )
        play = self.plays["negotiation"]
        play.tell(SubscriptionOpened(self.demand_id, self.document))
        play.tell(Matched(self.demand_id, self.world.offer_id, self.document, self.world.offer), f"{self.id}/market")
        self.world.pump()

    def negotiate(self) -> None:
        """Answer what the provider's proposals say, as an SDK does."""
        play = self.plays["negotiation"]
        for event in play.feeds.pop(f"demand/{self.demand_id}", []):
            if isinstance(event, talk.ProposalRejectedEvent):
                self.rejections.append(json.loads(event.reason)["message"])
            if not isinstance(event, talk.ProposalEvent):
                continue
            proposal = play.rows[f"proposal/{event.proposal_id}"]
            body = json.loads(self.document.body)
            if proposal.state == "Initial":
                text = json.dumps(body["properties"], separators=(",", ":"))
                play.ask(talk.CounterProposal(self.demand_id, proposal.proposal_id, text, body["constraints"]))
                continue
            reply = play.ask(talk.CreateAgreement(proposal.proposal_id, self.world.now + 3600))
            if not isinstance(reply, Refused):
                raw = play.rows[f"agreement/{reply.id}"].body
                play.ask(talk.ConfirmAgreement(reply.id, sign(self.key, "agreement", raw), "app"))

    def work(self) -> None:
        """One look at what there is to do."""
        self.negotiate()
        for event in self.plays["negotiation"].feeds.pop("agreements", []):
            if isinstance(event, talk.AgreementApprovedEvent):
                self.agreement_id, self.activity_id = event.agreement_id, ""
                self.agreements += 1
                if self.rents:
                    self._rent()
            elif isinstance(event, talk.AgreementTerminatedEvent | talk.AgreementRejectedEvent | talk.AgreementCancelledEvent):
                self.rejections.append(json.loads(event.reason or "{}").get("message", ""))
                self.agreement_id = self.activity_id = ""
                if self.again:
                    self.world.later(30.0, self.start)
        for feed, kind in (("debit-notes", "debit-note"), ("invoices", "invoice")):
            for event in self.plays["ledger"].feeds.pop(feed, []):
                if self.accepts and event.what == "RECEIVED":
                    self._accept(kind, event.document_id)

    def _rent(self) -> None:
        self.activity_id = digest(self.agreement_id, str(self.count))[:32]
        self.count += 1
        self.plays["activity"].ask(act.CreateActivity(self.activity_id, self.agreement_id, 30.0))

    def _accept(self, kind: str, document_id: str) -> None:
        row = self.plays["ledger"].rows[f"{kind}/{document_id}"]
        if "allocation/all" not in self.plays["ledger"].rows:
            self.plays["ledger"].ask(money.CreateAllocation("all", self.id, PLATFORM, "1000000", None))
        signed = sign(self.key, "acceptance", acceptance_of(row))
        self.plays["ledger"].ask(money.AcceptDocument(kind, document_id, row.amount, "all", signed))

    def pay(self, order: PayOut) -> None:
        """The wallet's order: it is final after the pace of the platform."""
        if self.pays:
            self.world.later(self.pace_s, lambda: self._paid(order))

    def _paid(self, order: PayOut) -> None:
        tx = "0x" + digest(order.order_id, self.id)
        self.world.transfers[tx, order.payer, order.payee] = Decimal(order.amount)
        self.plays["ledger"].tell(PaidOut((order.order_id,), PLATFORM, order.payer, order.payee, order.amount, tx))
        self.world.pump()


class Unit:
    """An exe-unit that works on all threads from its start to its end."""

    def __init__(self, started_at: float) -> None:
        self.started_at, self.ended_at = started_at, None  # type: float, float | None

    def usage(self, now: float) -> list[float]:
        time_s = (self.ended_at or now) - self.started_at
        return [round(time_s, 3), round(time_s * THREADS, 3)]


class Timers(dict[str, tuple[float, Message]]):
    """The timers of a machine; which is next is found once for each change."""

    next: tuple[float, str] | None = None

    def __setitem__(self, key: str, value: tuple[float, Message]) -> None:
        self.next = None
        super().__setitem__(key, value)

    def pop(self, key: str, *default: Any) -> Any:
        self.next = None
        return super().pop(key, *default)


def _next_at(play: Playbook) -> tuple[float, str]:
    timers = play.timers
    assert isinstance(timers, Timers)
    if timers.next is None:
        timers.next = min((at, key) for key, (at, _) in timers.items())
    return timers.next


def quick(play: Playbook) -> Playbook:
    """Give a machine timers that are quick to ask."""
    play.timers = Timers(play.timers)
    return play


class CheatWorld:
    """One provider and its strangers."""

    def __init__(self, terms: Terms | None = None, **config: Any) -> None:
        self.now = START
        self.config = ProviderConfig("run", terms or Terms(), **config)
        self.offer_id, self.offer = offer(
            START, PROVIDER_KEY, lifetime_s=30 * DAY_S, constraints="(golem.srv.comp.expiration>1)",
            **{ADDRESS: PROVIDER, COEFFS: PRICES, VECTOR: ["golem.usage.duration_sec", "golem.usage.cpu_sec"],
               "golem.inf.cpu.threads": THREADS, INTERVAL: self.config.terms.interval_s,
               ACCEPT: self.config.terms.accept_timeout_s, TIMEOUT: self.config.terms.payment_timeout_s},
        )  # fmt: skip
        self.plays: dict[str, Playbook] = {
            name: quick(playbook(machine(PROVIDER), PROVIDER, START))  # type: ignore[arg-type]
            for name, machine in (("negotiation", Negotiation), ("activity", Activity), ("ledger", Ledger))
        }
        self.agent = quick(playbook(Provider("agent", self.config), "agent", START))
        self.strangers: dict[str, Stranger] = {}
        self.units: dict[str, Unit] = {}
        self.owner: dict[str, str] = {}  # activity -> stranger
        self.chain_s = 0.01  # until the chain has answered
        self.held_units: set[str] = set()
        self.ever_held, self.asked_funds = False, 0
        self.transfers: dict[tuple[str, str, str], Decimal] = {}
        self.approving: dict[str, float] = {}
        self.sending: dict[tuple[str, str], tuple[Any, float | None]] = {}
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self.violations: list[str] = []
        properties = json.dumps(json.loads(self.offer.body)["properties"])
        self.agent.ask(agent.AgentStarted("session", (agent.OfferSpec("vm", "vm", properties, "public"),)))
        self.pump()
        self.later(TICK_S, self._tick)

    def stranger(
        self, cheat: Cheat | None = None, pace_s: float = 2.0, rent_s: float = DAY_S, again: bool = True, **demanded: Any
    ) -> Stranger:
        """A new node comes."""
        key = bytes([10 + len(self.strangers) // 200, 1 + len(self.strangers) % 200]) * 16
        found = Stranger(self, key, cheat or Cheat(), demanded, pace_s)
        self.strangers[found.id] = found
        found.rent_s, found.again = rent_s, again
        found.start()
        return found

    # -- figures
    def worked(self, stranger: Stranger) -> Decimal:
        """What the work for a stranger costs until now."""
        units = [unit for name, unit in self.units.items() if self.owner.get(name) == stranger.id]
        return sum((Decimal(cost(PRICES, unit.usage(self.now))) for unit in units), Decimal(0))

    def paid(self, stranger: Stranger) -> Decimal:
        """What the provider's node has verified on chain."""
        rows = self.plays["ledger"].rows
        return sum((Decimal(row.paid) for _, row in rows.prefix("agreement/") if row.peer == stranger.id), Decimal(0))

    def exposure(self, stranger: Stranger) -> Decimal:
        return self.worked(stranger) - self.paid(stranger)

    def refusals(self) -> list[str]:
        row = self.agent.rows.get("refusals")
        return [one.reason for one in row.refusals] if row else []

    def held(self) -> int:
        """How many places are taken."""
        return len(list(self.agent.rows.prefix("active/")))

    # -- time
    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + delay_s, next(self._numbers), action))

    def _all(self) -> list[Playbook]:
        return [self.agent, *self.plays.values(), *(play for one in self.strangers.values() for play in one.plays.values())]

    def run(self, seconds: float) -> None:
        """Let time pass; whatever comes due happens in order."""
        until = self.now + seconds
        while True:
            first = min((play for play in self._all() if play.timers), key=_next_at, default=None)
            head = self._queue[0][0] if self._queue else None
            times = [at for at in (_next_at(first)[0] if first else None, head) if at is not None]
            if not times or min(times) > until:
                self._set(until)
                return
            self._set(max(self.now, min(times)))
            if head is not None and head <= min(times):
                heapq.heappop(self._queue)[2]()
            else:
                assert first is not None
                _, message = first.timers.pop(_next_at(first)[1])
                first.tell(message, f"{first.node}/{first.machine.name}")
            self.pump()

    def _set(self, now: float) -> None:
        self.now = now
        for play in self._all():
            play.now = now

    def _tick(self) -> None:
        """Exe-units tell their usage; whoever waits for an answer looks."""
        for name, unit in self.units.items():
            if unit.ended_at is None:
                self.plays["activity"].tell(act.UsageReported(name, unit.usage(self.now), self.now), f"{PROVIDER}/exeunit:{name}")
        self.later(TICK_S, self._tick)

    # -- moving messages
    def pump(self) -> None:
        """Deliver everything that is under way on one node, and put into the queue what goes between nodes."""
        moved = True
        while moved:
            moved = False
            for name, play in self.plays.items():
                moved |= self._send_all(PROVIDER, name, play)
            for one in self.strangers.values():
                for name, play in one.plays.items():
                    moved |= self._send_all(one.id, name, play)
                one.work()
            moved |= self._feeds() | self._ports() | any(play.sends for play in self._all())

    def _send_all(self, node: str, name: str, play: Playbook) -> bool:
        sends, play.sends = play.sends, []
        play.published.clear()
        for send in sends:
            self._send(node, name, send)
        return bool(sends)

    def _send(self, node: str, name: str, send: Send) -> None:
        to = send.to if "/" in send.to else f"{node}/{send.to}"
        actor, sender = actor_of(to), f"{node}/{name}"
        if node_of(to) == node:
            plays = self.plays if node == PROVIDER else self.strangers[node].plays
            if actor in plays:
                plays[actor].tell(send.message, sender)
            else:
                self._outside(node, send.message)
        elif node == PROVIDER:
            one = self.strangers[node_of(to)]
            if actor in one.plays and one.cheat.hears(self, send.message):
                self.later(AWAY_S, lambda: self._arrive(one.plays[actor], send.message, sender))
            elif isinstance(send.message, money.DocumentSent | talk.AgreementTerminated):
                pass  # it stays in the outbox of the node until its deadline
        elif actor in self.plays:
            for delay_s, message in self.strangers[node].cheat.says(self, to, send.message):
                self.later(AWAY_S + delay_s, lambda message=message: self._arrive(self.plays[actor], message, sender))

    def _arrive(self, play: Playbook, message: Message, sender: str) -> None:
        try:
            play.tell(message, sender)
        except Violation as violation:
            self.violations.append(str(violation))

    def _outside(self, node: str, message: Message) -> None:
        """Wallet, signer, chain and market of a node."""
        if isinstance(message, PayOut):
            self.strangers[node].pay(message)
        elif isinstance(message, money.SignPayment):
            one = self.strangers[node]
            signed = sign(one.key, "payment", message.body)
            one.plays["ledger"].tell(money.PaymentSigned(message.payment_id, signed))
        elif isinstance(message, VerifyTransfer):
            moved = self.transfers.get((message.tx_hash, message.payer, message.payee), Decimal(0))
            enough = moved - Decimal(message.already_claimed) >= Decimal(message.amount)
            claim = message.claim_id
            answer = TransferVerified(claim, message.tx_hash) if enough else TransferRejected(claim, "no such transfer")
            self.later(0.5, lambda: self.plays["ledger"].tell(answer))
        elif isinstance(message, Rematch | Undelivered):
            pass

    # -- the agent's polls and ports
    def _feeds(self) -> bool:
        found: list[Message] = []
        for event in self.plays["negotiation"].feeds.pop(f"offer/{self.offer_id}", []):
            found += self._offer_event(event)
        for event in self.plays["negotiation"].feeds.pop("agreements", []):
            kind, by = type(event).__name__, getattr(event, "terminator", "")
            text = json.loads(getattr(event, "reason", "") or "{}").get("message", "")
            found.append(self._event("agreements", kind, event.agreement_id, by, text))  # type: ignore[attr-defined]
        for event in self.plays["activity"].feeds.pop("activities", []):
            found.append(self._event("activities", event.kind, event.activity_id, event.agreement_id))  # type: ignore[attr-defined]
        for feed, prefix in (("debit-notes", "DebitNote"), ("invoices", "Invoice")):
            for event in self.plays["ledger"].feeds.pop(feed, []):
                if event.what in ("ACCEPTED", "REJECTED", "CANCELLED", "SETTLED"):  # type: ignore[attr-defined]
                    kind = f"{prefix}{event.what.capitalize()}Event"  # type: ignore[attr-defined]
                    found.append(self._event(feed, kind, event.document_id))  # type: ignore[attr-defined]
        for message in found:
            self.agent.tell(message)
        return bool(found)

    def _event(self, feed: str, kind: str, subject: str, related: str = "", text: str = "") -> Message:
        at = self.now + next(self._numbers) * 1e-6 % 1e-3
        cursor = self.agent.rows.get(f"cursor/{feed}")
        return agent.EventArrived(feed, max(at, (cursor.at if cursor else 0) + 1e-6), kind, subject, related, text[:300])

    def _offer_event(self, event: Message) -> list[Message]:
        rows = self.plays["negotiation"].rows
        if isinstance(event, talk.AgreementEvent):
            form = json.dumps(agreement_form(rows[f"agreement/{event.agreement_id}"], self.now))
            return [agent.AgreementArrived("vm", self.offer_id, form)]
        if not isinstance(event, talk.ProposalEvent):
            return []
        proposal = rows[f"proposal/{event.proposal_id}"]
        before = rows[f"proposal/{proposal.previous_id}"]
        return [agent.ProposalArrived("vm", self.offer_id, proposal.proposal_id, proposal.issuer, proposal.properties,
                                      before.properties, before.constraints)]  # fmt: skip

    def _ports(self) -> bool:
        sends, self.agent.sends = self.agent.sends, []
        for send in sends:
            (self._processes if send.to == "processes" else self._rest)(send.message)
        return self._answers() or bool(sends)

    def _answers(self) -> bool:
        """What the agent's calls came to by now."""
        answers: list[Message] = []
        rows = self.plays["negotiation"].rows
        for agreement_id in list(self.approving):
            row = rows[f"agreement/{agreement_id}"]
            if row.state not in ("Pending", "Approving"):
                del self.approving[agreement_id]
                answers.append(agent.ApprovalEnded(agreement_id, row.state == "Approved", row.state))
        for (kind, document_id), (message, give_up_at) in list(self.sending.items()):
            document = self.plays["ledger"].rows[f"{kind}/{document_id}"]
            sent, over = document.status != "ISSUED", give_up_at is not None and self.now >= give_up_at
            if not (sent or over or document.refused):
                continue
            del self.sending[kind, document_id]
            error, most = ("" if sent else document.waiting), ("" if sent else document.most)
            if kind == "invoice":
                answers.append(agent.InvoiceSent(message.agreement_id, error, most))
            else:
                answers.append(agent.NoteSent(message.activity_id, message.number, sent, error, most))
        for answer in answers:
            self.agent.tell(answer)
        return bool(answers)

    def _processes(self, message: Message) -> None:
        match message:
            case agent.StartUnit(activity_id):
                self.units[activity_id] = Unit(self.now)
                self.owner[activity_id] = self.plays["activity"].rows[f"activity/{activity_id}"].requestor
                self.agent.tell(agent.UnitRunning(activity_id, 7, 7))
                ready = act.StateReported(activity_id, "Initialized", at=self.now)
                self.plays["activity"].tell(ready, f"{PROVIDER}/exeunit:{activity_id}")
            case agent.HoldUnit(activity_id, _, held):
                (self.held_units.add if held else self.held_units.discard)(activity_id)
                self.ever_held |= held
            case agent.StopUnit(activity_id) if self.units[activity_id].ended_at is None:
                self.units[activity_id].ended_at = self.now
                self.held_units.discard(activity_id)
                self.agent.tell(agent.UnitExited(activity_id, 0))

    def _rest(self, message: Any) -> None:
        negotiation, ledger = self.plays["negotiation"], self.plays["ledger"]
        match message:
            case agent.PlaceOffer(preset, serial):
                negotiation.tell(SubscriptionOpened(self.offer_id, self.offer))
                self.agent.tell(agent.OfferPublished(preset, serial, self.offer_id))
            case agent.AnswerProposal(offer_id, proposal_id, properties, constraints):
                text = canonical(json.loads(properties)).decode()
                reply = negotiation.ask(talk.CounterProposal(offer_id, proposal_id, text, constraints))
                assert not isinstance(reply, Refused), reply
            case agent.RefuseProposal(offer_id, proposal_id, reason):
                negotiation.ask(talk.RejectProposal(offer_id, proposal_id, reason))
            case agent.AcceptAgreement(agreement_id, session):
                raw = negotiation.rows[f"agreement/{agreement_id}"].body
                negotiation.ask(talk.ApproveAgreement(agreement_id, sign(PROVIDER_KEY, "approval", raw), session))
                self.approving[agreement_id] = self.now
            case agent.RefuseAgreement(agreement_id, reason):
                negotiation.ask(talk.RejectAgreement(agreement_id, reason))
            case agent.EndAgreement(agreement_id, reason):
                negotiation.ask(talk.TerminateAgreement(agreement_id, reason))
                self.agent.tell(agent.TerminationEnded(agreement_id))
            case agent.CloseActivity(activity_id, reason, error):
                self.plays["activity"].ask(act.StateReported(activity_id, "Terminated", None, reason, error or None))
                unit = self.units.get(activity_id)
                self.agent.tell(agent.ActivityClosed(activity_id, unit.usage(self.now) if unit else None))
            case agent.ReadUsage(activity_id):
                self.agent.tell(agent.UsageRead(activity_id, self.units[activity_id].usage(self.now)))
            case agent.AskFunds(requestor, platform):
                known = agent.FundsKnown(requestor, platform, self.strangers[requestor].funds)
                self.asked_funds += 1
                self.later(self.chain_s, lambda: self.agent.tell(known))
            case agent.IssueNote():
                self._issue_note(message)
            case agent.WriteInvoice():
                self._issue_invoice(message)
            case agent.SendNote(note_id=note_id):
                self._send_document("debit-note", note_id, message, message.give_up_at)
            case agent.SendInvoice(invoice_id=invoice_id):
                self._send_document("invoice", invoice_id, message, None)
            case agent.ReadNote(activity_id, number, note_id, deadline):
                status = ledger.rows[f"debit-note/{note_id}"].status
                self.agent.tell(agent.NoteRead(activity_id, number, deadline, status))

    def _issue_note(self, message: agent.IssueNote) -> None:
        note_id = f"note-{message.activity_id}-{message.number}"
        command = money.IssueDebitNote(note_id, message.activity_id, message.amount, tuple(message.usage), message.due_at)
        reply = self.plays["ledger"].ask(command)
        error = reply.message if isinstance(reply, Refused) else ""
        self.agent.tell(agent.NoteIssued(message.activity_id, message.number, "" if error else note_id, error))

    def _issue_invoice(self, message: agent.WriteInvoice) -> None:
        invoice_id = f"invoice-{message.agreement_id[:40]}{'-again' * bool(message.refused_id)}"
        command = money.IssueInvoice(invoice_id, message.agreement_id, message.activity_ids, message.amount, message.due_at)
        reply = self.plays["ledger"].ask(command)
        error = reply.message if isinstance(reply, Refused) else ""
        self.agent.tell(agent.InvoiceIssued(message.agreement_id, "" if error else invoice_id, error))

    def _send_document(self, kind: str, document_id: str, message: Any, give_up_at: float | None) -> None:
        signed = sign(PROVIDER_KEY, kind, self.plays["ledger"].rows[f"{kind}/{document_id}"].body)
        self.plays["ledger"].ask(money.SendDocument(kind, document_id, signed, 15.0))
        self.sending[kind, document_id] = message, give_up_at
        if give_up_at is not None:
            self.later(max(0.0, give_up_at - self.now) + 0.1, lambda: None)
