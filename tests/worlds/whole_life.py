"""A whole agreement, from offer to settled invoice, played by the real machines of several nodes without a kernel.

`live()` returns what every machine's rows were after each step of it, and every message that went between nodes: what
a hostile peer may have overheard, and the states it may meet.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from worlds.market_world import demand, offer
from worlds.money import PLATFORM
from worlds.playbook import Nodes, Playbook, playbook

from actors.activity.machine import Activity
from actors.exeunit import ExeUnit
from actors.kernel.machine import Machine
from actors.ledger.machine import Ledger, acceptance_of
from actors.market.machine import Market
from actors.negotiation.machine import Negotiation
from actors.negotiation.rows import ProposalRow
from actors.wallet.machine import Wallet
from protocol.activity import CreateActivity, DestroyActivity, Exec
from protocol.exeunit import CommandFinished, Execute, ShutDown, UnitStarted
from protocol.ledger import (
    AcceptDocument,
    CreateAllocation,
    IssueDebitNote,
    IssueInvoice,
    PaymentSigned,
    Recall,
    SendDocument,
    SignPayment,
)
from protocol.market import Announced, PublishDemand, PublishOffer
from protocol.negotiation import ApproveAgreement, ConfirmAgreement, CounterProposal, CreateAgreement, TerminateAgreement
from protocol.signing import node_id_of, sign
from protocol.types import Message, actor_of, digest, node_of
from protocol.wallet import Transfer, TransferConfirmed, TransferVerified, VerifyTransfer

ADDRESS = f"golem.com.payment.platform.{PLATFORM}.address"
SCRIPT = '[{"deploy":{}},{"start":{}},{"run":{"entry_point":"x","args":["y"]}}]'


def offer_of(key: bytes, now: float, number: int = 0) -> Any:
    """Return the id and document of an offer that can be paid for."""
    return offer(now, key, number, **{ADDRESS: node_id_of(key)})


def demand_of(key: bytes, now: float, number: int = 0) -> Any:
    """Return the id and document of a demand that says how it pays."""
    terms = {"golem.com.payment.chosen-platform": PLATFORM, ADDRESS: node_id_of(key)}
    return demand(now, key, number, **terms)


def counter_of(subscription_id: str, proposal_id: str, document: Any) -> CounterProposal:
    """Return the command that answers a proposal with an offer or demand as it is."""
    body = json.loads(document.body)
    properties = json.dumps(body["properties"], separators=(",", ":"))
    return CounterProposal(subscription_id, proposal_id, properties, body["constraints"])


class Life(Nodes):
    """The machines of some nodes; ports answer at once."""

    def __init__(self, keys: list[bytes]) -> None:
        self.keys = {node_id_of(key): key for key in keys}
        self.machines: dict[str, Machine] = {}
        plays = [
            playbook(machine, node)
            for node in self.keys
            for machine in (Market(node), Negotiation(node), Activity(node), Ledger(node), Wallet(node, {PLATFORM: 2.0}))
        ]
        super().__init__(*plays)
        self.states: dict[str, list[dict[str, Any]]] = defaultdict(list)  # address -> rows after each step
        self.said: list[tuple[str, str, Message]] = []  # sender, recipient, message: between nodes
        self._overheard = 0

    def play(self, node: str, actor: str) -> Playbook:
        return self.plays[f"{node}/{actor}"]

    def ask(self, node: str, actor: str, message: Message) -> Any:
        """Give a command, let everything that follows from it happen, take down the states."""
        reply = self.play(node, actor).ask(message)
        self.rest()
        return reply

    def rest(self) -> None:
        """Deliver until nothing is left to do."""
        while True:
            for link in self.waiting():
                sender, to = link
                if node_of(sender) != node_of(to):
                    self.said.append((sender, to, self.links[link][0].message))
                self.note(sender)
                self.deliver(link)
                self.note(to)
            for address, play in self.plays.items():
                for gossip in play.published:
                    for other, heard in self.plays.items():
                        if actor_of(other) == "market" and other != address:
                            heard.tell(Announced(node_of(address), gossip.message))  # type: ignore[arg-type]
                play.published = []
            if not self.waiting() and not self._ports():
                break
        for address in self.plays:
            self.note(address)

    def note(self, address: str) -> None:
        """Take down a state of a machine, if it is another one than before."""
        states, rows = self.states[address], self.plays[address].rows
        if not states or states[-1] != rows:
            states.append(dict(rows))

    def _ports(self) -> bool:
        """Let chain, signer and runtime answer; return whether there was something to answer."""
        waiting, self.unlinked = self.unlinked, []
        before = self._overheard
        for address, play in self.plays.items():
            for send in waiting:
                if send.to in ("chain", "signer", "runtime") and self._mine(play, address, send.message):
                    self._overheard += 1
        return self._overheard > before

    def _mine(self, play: Playbook, address: str, message: Message) -> bool:
        node, actor = node_of(address), actor_of(address)
        match message:
            case Transfer(batch_id) if actor == "wallet" and f"batch/{batch_id}" in play.rows:
                play.tell(TransferConfirmed(batch_id, "0x" + digest(batch_id), 7, 21000, "0.001"))
            case SignPayment(payment_id, body) if actor == "ledger" and f"payment/{payment_id}" in play.rows:
                if play.rows[f"payment/{payment_id}"].role != "payer":
                    return False
                play.tell(PaymentSigned(payment_id, sign(self.keys[node], "payment", body)))
            case VerifyTransfer(claim_id, tx_hash=tx_hash) if actor == "ledger" and f"payment/{claim_id}" in play.rows:
                if play.rows[f"payment/{claim_id}"].role != "payee":
                    return False
                play.tell(TransferVerified(claim_id, tx_hash))
            case Execute(batch_id, index) if f"batch/{batch_id}" in play.rows and actor.startswith("exeunit:"):
                done = CommandFinished(batch_id, index, True, "out", b"err", None, play.now, [1.0, 2.0])
                play.tell(done, f"{node}/runtime")
            case _:
                return False
        return True

    def pass_time(self, seconds: float) -> None:
        for play in self.plays.values():
            play.at(seconds)
        self.rest()


def trade(life: Life, requestor: str, provider: str, number: int = 0) -> None:
    """Play one agreement from the market to its end, with an activity, a debit note and an invoice."""
    now = life.play(requestor, "market").now
    r_key, p_key = life.keys[requestor], life.keys[provider]
    demand_id, demand_document = demand_of(r_key, now, number)
    offer_id, offer_document = offer_of(p_key, now, number)
    life.ask(provider, "market", PublishOffer(offer_document))
    life.ask(requestor, "market", PublishDemand(demand_document))
    r, p = life.play(requestor, "negotiation"), life.play(provider, "negotiation")
    initial = next(
        row.proposal_id
        for row in r.rows.values()
        if isinstance(row, ProposalRow) and (row.demand_id, row.offer_id, row.state) == (demand_id, offer_id, "Initial")
    )
    first = life.ask(requestor, "negotiation", counter_of(demand_id, initial, demand_document)).id
    second = life.ask(provider, "negotiation", counter_of(offer_id, first, offer_document)).id
    agreement_id = life.ask(requestor, "negotiation", CreateAgreement(second, now + 3000)).id
    body = r.rows[f"agreement/{agreement_id}"].body
    life.ask(requestor, "negotiation", ConfirmAgreement(agreement_id, sign(r_key, "agreement", body), "app"))
    life.ask(provider, "negotiation", ApproveAgreement(agreement_id, sign(p_key, "approval", body), "app"))
    assert r.rows[f"agreement/{agreement_id}"].state == p.rows[f"agreement/{agreement_id}"].state == "Approved"
    activity_id = digest(agreement_id, "activity")[:32]
    life.ask(requestor, "activity", CreateActivity(activity_id, agreement_id, 30.0))
    unit = playbook(ExeUnit(activity_id, requestor, provider), provider, now)
    life.plays[f"{provider}/{unit.machine.name}"] = unit
    life.ask(provider, unit.machine.name, UnitStarted("process"))
    batch_id = digest(activity_id, "batch")[:32]
    life.ask(requestor, "activity", Exec(batch_id, activity_id, SCRIPT))
    assert life.play(requestor, "activity").rows[f"batch/{activity_id}/{batch_id}"].finished
    life.ask(requestor, "ledger", CreateAllocation(f"allocation-{number}-{provider[:6]}", requestor, PLATFORM, "100", None))
    allocation_id = f"allocation-{number}-{provider[:6]}"
    note = IssueDebitNote(f"note-{activity_id}", activity_id, "0.5")
    bill(life, requestor, provider, "debit-note", note.debit_note_id, note, allocation_id)
    life.ask(provider, unit.machine.name, ShutDown("done", None, [1.0, 2.0]))
    life.ask(requestor, "activity", DestroyActivity(activity_id))
    life.ask(requestor, "negotiation", TerminateAgreement(agreement_id, '{"message":"done"}'))
    invoice = IssueInvoice(f"invoice-{activity_id}", agreement_id, (activity_id,), "1.25", now + 60)
    bill(life, requestor, provider, "invoice", f"invoice-{activity_id}", invoice, allocation_id)


def bill(life: Life, requestor: str, provider: str, kind: str, document_id: str, command: Message, allocation_id: str) -> None:
    """Issue, send, accept, pay and settle one document."""
    payee, payer, key = life.play(provider, "ledger"), life.play(requestor, "ledger"), f"{kind}/{document_id}"
    life.ask(provider, "ledger", command)
    document = sign(life.keys[provider], kind, payee.rows[key].body)
    life.ask(provider, "ledger", SendDocument(kind, document_id, document, 15.0))
    row = payer.rows[key]
    acceptance = sign(life.keys[requestor], "acceptance", acceptance_of(row))
    life.ask(requestor, "ledger", AcceptDocument(kind, document_id, row.amount, allocation_id, acceptance))
    life.pass_time(2.5)
    assert payer.rows[key].status == payee.rows[key].status == "SETTLED", (payer.rows[key], payee.rows[key])


def live(keys: list[bytes]) -> Life:
    """Play trades of the first node with the second, of the third with the second, and of the first with the third.

    In the end all ask one another what was signed.
    """
    life = Life(keys)
    first, second, third = list(life.keys)[:3]
    trade(life, first, second, 1)
    trade(life, third, second, 2)
    trade(life, first, third, 3)
    for node in life.keys:  # their disks were restored, says somebody
        life.ask(node, "ledger", Recall())
    life.pass_time(700.0)
    return life
