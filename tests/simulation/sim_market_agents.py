"""The agents of the simulated market: scripted edges that look at committed rows and give the next command.

A command may have been carried out though its answer was lost, so an agent never trusts its memory: it looks again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import trio
from worlds.money import PLATFORM

from actors.activity.rows import ActivityRow, BatchRow
from actors.kernel.machine import ActorFailed, AskTimeout, Busy
from actors.kernel.records import JournalError, RowDamaged
from actors.ledger.machine import AllocationRow, PaymentDocumentRow, acceptance_of
from actors.negotiation.rows import OPEN, AgreementRow, ProposalRow, lapsed
from actors.wallet.rows import PayOrderRow
from protocol.activity import CreateActivity, DestroyActivity, Exec
from protocol.exeunit import ShutDown
from protocol.ledger import (
    AcceptDocument,
    CancelInvoice,
    CreateAllocation,
    IssueDebitNote,
    IssueInvoice,
    RejectInvoice,
    SendDocument,
)
from protocol.market import PublishDemand, PublishOffer, Withdraw
from protocol.negotiation import (
    ApproveAgreement,
    CancelAgreement,
    ConfirmAgreement,
    CounterProposal,
    CreateAgreement,
    RejectAgreement,
    RejectProposal,
    TerminateAgreement,
)
from protocol.signing import sign
from protocol.types import Refused, digest
from protocol.wallet import RunCycle

if TYPE_CHECKING:
    from sim_market import MarketHost, MarketSystem, MarketWorld

REASON = '{"message":"enough"}'
SCRIPTS = ('[{"deploy":{}},{"start":{}}]', '[{"run":{"entry_point":"x"}},{"run":{"entry_point":"y"}}]', '[{"terminate":{}}]')
MAX_AGREEMENTS = 8


class Agent:
    """What both roles have in common. `publication` makes the documents of the market."""

    def __init__(self, world: MarketWorld, host: MarketHost, publication: Callable[..., Any]) -> None:
        self.world, self.host, self.publication = world, host, publication
        self.name = host.name
        self.published: dict[str, Any] = {}

    async def run(self) -> None:
        """Look, act, wait, until the world ends."""
        while True:
            world = self.world
            await trio.sleep(world.pace_s if world.closing else world.rng.uniform(0.3, 4))
            try:
                await self.turn()
            except (AskTimeout, Busy, ActorFailed, JournalError, RowDamaged):
                pass  # the next look is soon

    async def turn(self) -> None:
        raise AssertionError

    @property
    def system(self) -> MarketSystem:
        """The node's system. Raises `AskTimeout` while it is down."""
        if self.host.system is None:
            raise AskTimeout("the node is down")
        return self.host.system

    async def ask(self, actor: str, message: Any) -> Any:
        """Give a command."""
        reply = await self.system.ask(actor, message, timeout_s=self.world.rng.choice((0.2, 10)))
        self.world.note("said", self.name, type(message).__name__, type(reply).__name__)
        return reply

    def decide(self, what: str, probability: float) -> bool:
        """Return a decision that stays the same however often it is asked for."""
        return random.Random(f"{self.world.seed} {self.name} {what}").random() < probability

    def rows(self, actor: str, prefix: str, kind: type) -> Iterator[Any]:
        return iter([row for _, row in self.system.listed(actor, prefix)[0] if isinstance(row, kind)])

    def now(self) -> float:
        return self.system.now()

    async def publish(self, command: type, number: int) -> None:
        """Be in the market with some offers or demands, and negotiate; at the end leave it."""
        if not self.published:
            self.published = dict(self.publication(self.host.key, self.now(), one) for one in range(number))
        for subscription_id, document in self.published.items():
            if self.world.closing or self.decide(f"withdraw {subscription_id} {self.now() // 60}", 0.1):
                await self.ask("market", Withdraw(subscription_id))
            else:
                await self.ask("market", command(document))
        if not self.world.closing:
            await self.negotiate()

    async def negotiate(self) -> None:
        """Answer the other side's open proposals with our own terms, or with a no."""
        for proposal in self.rows("negotiation", "proposal/", ProposalRow):
            open_ = proposal.state in ("Initial", "Draft") and not proposal.answer_id and not proposal.agreement_id
            if proposal.issuer == self.name or not open_ or proposal.expires <= self.now():
                continue
            await self.answer(proposal)

    async def answer(self, proposal: ProposalRow) -> None:
        raise AssertionError

    async def counter(self, proposal: ProposalRow) -> None:
        body = json.loads(self.published[proposal.own_subscription].body)
        properties = json.dumps(body["properties"], separators=(",", ":"))
        command = CounterProposal(proposal.own_subscription, proposal.proposal_id, properties, body["constraints"])
        await self.ask("negotiation", command)

    def sign(self, kind: str, body: bytes) -> Any:
        return sign(self.host.key, kind, body)


class RequestorAgent(Agent):
    """Buys: agreements with whoever offers, activities under them, and it pays what it accepts."""

    allocations = 0

    async def turn(self) -> None:
        await self.publish(PublishDemand, 3)
        for agreement in self.rows("negotiation", "agreement/", AgreementRow):
            await self.carry_on(agreement)
        for kind in ("debit-note", "invoice"):
            for row in self.rows("ledger", f"{kind}/", PaymentDocumentRow):
                if row.status == "RECEIVED":
                    await self.judge(row)
        if self.world.closing and any(order.state == "GIVEN_UP" for order in self.rows("wallet", "order/", PayOrderRow)):
            await self.ask("wallet", RunCycle(PLATFORM))

    async def answer(self, proposal: ProposalRow) -> None:
        agreements = list(self.rows("negotiation", "agreement/", AgreementRow))
        if len(agreements) >= MAX_AGREEMENTS:
            return
        if proposal.state == "Initial" or self.decide(proposal.proposal_id, 0.2):
            await self.counter(proposal)
        else:
            valid_s = self.world.rng.choice((8.0, 60.0, 600.0))
            await self.ask("negotiation", CreateAgreement(proposal.proposal_id, self.now() + valid_s))

    async def carry_on(self, agreement: AgreementRow) -> None:
        """Take an agreement through its life."""
        agreement_id, now = agreement.agreement_id, self.now()
        if agreement.state in OPEN and lapsed(agreement, now):
            return
        if agreement.state == "Proposal":
            if self.world.closing or self.decide(f"cancel {agreement_id}", 0.1):
                await self.ask("negotiation", CancelAgreement(agreement_id, REASON))
            else:
                document = self.sign("agreement", agreement.body)
                await self.ask("negotiation", ConfirmAgreement(agreement_id, document, "app"))
        elif agreement.state == "Pending" and (self.world.closing or self.decide(f"regret {agreement_id} {now // 5}", 0.05)):
            await self.ask("negotiation", CancelAgreement(agreement_id, REASON))
        elif agreement.state == "Approved":
            over = [await self.work(agreement_id, number) for number in range(2)]
            if self.world.closing or all(over) or self.decide(f"terminate {agreement_id} {now // 10}", 0.03):
                await self.ask("negotiation", TerminateAgreement(agreement_id, REASON))

    async def work(self, agreement_id: str, number: int) -> bool:
        """Have an activity run its scripts; return whether it is over."""
        activity_id = digest(agreement_id, str(number))[:32]
        row: ActivityRow | None = self.system.rows("activity").get(f"activity/{activity_id}")
        if row is None:
            if not self.world.closing and self.decide(f"activity {activity_id}", 0.8):
                await self.ask("activity", CreateActivity(activity_id, agreement_id, self.world.rng.choice((5.0, 60.0))))
                return False
            return True
        if row.ended:
            return True
        finished = 0
        for index, script in enumerate(SCRIPTS[: 3 if self.decide(f"reset {activity_id}", 0.3) else 2]):
            batch_id = digest(activity_id, str(index))[:32]
            batch: BatchRow | None = self.system.rows("activity").get(f"batch/{activity_id}/{batch_id}")
            if batch is None:
                await self.ask("activity", Exec(batch_id, activity_id, script))
                return False
            finished += batch.finished
        if self.world.closing or finished >= 2:
            await self.ask("activity", DestroyActivity(activity_id))
        return False

    async def judge(self, row: PaymentDocumentRow) -> None:
        """Accept, reject or leave a document."""
        if row.kind == "debit-note" and not self.decide(f"note {row.document_id}", 0.7):
            return
        if row.kind == "invoice" and self.decide(f"reject {row.document_id}", 0.15):
            rejection = '{"rejectionReason":"UNSOLICITED_SERVICE","totalAmountAccepted":"0","message":"no"}'
            await self.ask("ledger", RejectInvoice(row.document_id, rejection))
            return
        allocation_id = f"allocation-{self.allocations}"
        if not any(one.allocation_id == allocation_id for one in self.rows("ledger", "allocation/", AllocationRow)):
            await self.ask("ledger", CreateAllocation(allocation_id, self.name, PLATFORM, "4", None))
        acceptance = self.sign("acceptance", acceptance_of(row))
        command = AcceptDocument(row.kind, row.document_id, row.amount, allocation_id, acceptance)
        reply = await self.ask("ledger", command)
        if isinstance(reply, Refused) and reply.code == "unfunded":
            self.allocations += 1


class ProviderAgent(Agent):
    """Sells: answers proposals, approves agreements, runs exe-units, and bills."""

    async def turn(self) -> None:
        await self.publish(PublishOffer, 2)
        for agreement in self.rows("negotiation", "agreement/", AgreementRow):
            if agreement.state == "Pending" and not lapsed(agreement, self.now()) and not self.world.closing:
                await self.consider(agreement)
            if agreement.state == "Approved" and self.decide(f"leave {agreement.agreement_id} {self.now() // 10}", 0.02):
                await self.ask("negotiation", TerminateAgreement(agreement.agreement_id, REASON))
        for row in self.rows("activity", "activity/", ActivityRow):
            await self.serve(row)
        for agreement in self.rows("negotiation", "agreement/", AgreementRow):
            if agreement.state in ("Approved", "Terminated"):
                await self.bill(agreement)

    async def answer(self, proposal: ProposalRow) -> None:
        if proposal.state != "Draft":
            return
        if self.decide(f"no {proposal.proposal_id}", 0.1):
            await self.ask("negotiation", RejectProposal(proposal.own_subscription, proposal.proposal_id, REASON))
        else:
            await self.counter(proposal)

    async def consider(self, agreement: AgreementRow) -> None:
        agreement_id = agreement.agreement_id
        if self.decide(f"reject {agreement_id}", 0.1):
            await self.ask("negotiation", RejectAgreement(agreement_id, REASON))
        elif not self.decide(f"ignore {agreement_id}", 0.1):
            await self.ask("negotiation", ApproveAgreement(agreement_id, self.sign("approval", agreement.body), "app"))

    async def serve(self, row: ActivityRow) -> None:
        """Start the exe-unit of an activity, and end it when it is to be destroyed."""
        if row.ended:
            return
        if self.decide(f"idle {row.activity_id}", 0.1):
            return  # an agent that does nothing: the nodes end it
        unit = self.world.start_unit(row.activity_id, row.provider, row.requestor)
        if row.destroying and unit.system is not None:
            await unit.system.ask(unit.actor, ShutDown("done", None, [1.0, 2.0]), timeout_s=5)

    async def bill(self, agreement: AgreementRow) -> None:
        """Debit notes while it runs, an invoice at its end."""
        agreement_id, total = agreement.agreement_id, 0.0
        running = agreement.state == "Approved"
        activities = [row for row in self.rows("activity", "activity/", ActivityRow) if row.agreement_id == agreement_id]
        for row in activities:
            notes = [n for n in self.rows("ledger", "debit-note/", PaymentDocumentRow) if n.activity_id == row.activity_id]
            if running and not row.ended and len(notes) < 4 and self.decide(f"{row.activity_id} {self.now() // 10}", 0.3):
                number = len(notes) + 1
                command = IssueDebitNote(f"note-{row.activity_id}-{number}", row.activity_id, f"{0.1 * number:.1f}", (1.0, 2.5))
                await self.ask("ledger", command)
            total += 0.1 * len(notes)
            for note in notes:
                await self.send(note)
        invoice_id = f"invoice-{agreement_id}"
        invoice: PaymentDocumentRow | None = self.system.rows("ledger").get(f"invoice/{invoice_id}")
        if invoice is not None:
            await self.send(invoice)
            if invoice.status in ("ISSUED", "RECEIVED") and self.decide(f"cancel {invoice_id}", 0.1):
                await self.ask("ledger", CancelInvoice(invoice_id))
        elif not running and all(row.ended for row in activities):
            ids = tuple(row.activity_id for row in activities)
            await self.ask("ledger", IssueInvoice(invoice_id, agreement_id, ids, f"{total + 0.5:.1f}", self.now() + 60))

    async def send(self, row: PaymentDocumentRow) -> None:
        """Send a document until there is a receipt."""
        waiting = row.waiting == "sent; no receipt yet"
        if row.status == "ISSUED" and not waiting and not row.cancelling:
            document = self.sign(row.kind, row.body)
            await self.ask("ledger", SendDocument(row.kind, row.document_id, document, 15.0))
