"""A small world for ledger and wallet: several nodes in memory, a chain, and a network that keeps what the kernel promises.

Between actors messages arrive once and in order per link; ports see and say things again and in any order. Every message
and every row goes through the codec. `World.check` holds after every step.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from actors.kernel.machine import Emit, Meta, Reply, Send, Wake
from actors.ledger.machine import (
    AllocationRow,
    Ledger,
    LedgerAgreementRow,
    OrderRow,
    PaymentDocumentRow,
    acceptance_of,
    objection,
    total_of,
)
from actors.wallet.machine import Wallet
from protocol.activity import ActivityKnown
from protocol.codec import Decoder, encode
from protocol.ledger import (
    AcceptDocument,
    CreateAllocation,
    IssueDebitNote,
    IssueInvoice,
    PaymentSigned,
    SendDocument,
    SignPayment,
)
from protocol.negotiation import AgreementApproved
from protocol.signing import Document, node_id_of, sign
from protocol.types import Done, PeerLost, Violation, actor_of, digest, node_of
from protocol.wallet import (
    KnownBatch,
    OrdersKnown,
    Transfer,
    TransferConfirmed,
    TransferDelayed,
    TransferFailed,
    TransferMined,
    TransferRejected,
    TransferSent,
    TransferVerified,
    VerifyTransfer,
)

PLATFORM = "erc20-local-tglm"
KEYS = [bytes([number]) * 32 for number in range(1, 6)]


class MemoryRows:
    """Rows as bytes, decoded at each read."""

    def __init__(self, kind: Any) -> None:
        self._decode = Decoder[Any](kind)
        self.raw: dict[str, bytes] = {}

    def __getitem__(self, key: str) -> Any:
        return self._decode(self.raw[key])

    def __contains__(self, key: str) -> bool:
        return key in self.raw

    def get(self, key: str, default: Any = None) -> Any:
        return self._decode(self.raw[key]) if key in self.raw else default

    def prefix(self, prefix: str) -> Iterator[tuple[str, Any]]:
        for key in sorted(key for key in self.raw if key.startswith(prefix)):
            yield key, self[key]


@dataclass
class Node:
    """One node: its key, machines, rows, timers and feeds."""

    key: bytes
    wallet_minimum: str = "0"
    feeds: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    wakes: dict[tuple[str, str], tuple[float, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = node_id_of(self.key)
        self.machines: dict[str, Any] = {
            "ledger": Ledger(self.id),
            "wallet": Wallet(self.id, {PLATFORM: 2.0}, minimum=self.wallet_minimum),
        }
        self.rows = {name: MemoryRows(machine.rows) for name, machine in self.machines.items()}
        self.decoders = {
            name: (Decoder[Any](machine.local | (machine.peer or type(None))), Decoder[Any](machine.peer or type(None)))
            for name, machine in self.machines.items()
        }

    def sign(self, kind: str, body: bytes) -> Document:
        return sign(self.key, kind, body)

    def all(self, kind: type, prefix: str) -> list[Any]:
        return [row for _, row in self.rows["ledger"].prefix(prefix) if isinstance(row, kind)]


_chain_messages = Decoder[Any](Transfer | VerifyTransfer)
_signer_messages = Decoder[Any](SignPayment)


class World:
    """Nodes, links, chain. `rng` None means a kind world: no repeats, no failures."""

    def __init__(self, nodes: int, rng: random.Random | None = None) -> None:
        self.nodes = [Node(key) for key in KEYS[:nodes]]
        self.by_id = {node.id: node for node in self.nodes}
        self.rng, self.now, self.faults = rng, 1_000_000.0, rng is not None
        self.links: dict[tuple[str, str], deque[bytes]] = defaultdict(deque)
        self.pool: list[tuple[str, str, bytes]] = []  # from and to ports: any order, perhaps again
        self.outcomes: dict[str, tuple[str, str]] = {}  # batch id -> ("mined", hash) | ("failed", reason)
        self.transfers: list[tuple[str, str, str, Decimal]] = []  # hash, payer, payee, amount
        self.mined_at: dict[str, float] = {}  # transfer's hash -> time of its block
        self.down: set[str] = set()  # nodes that cannot be reached
        self.batches: dict[str, Transfer] = {}  # what the chain port has; it keeps an order to one batch that may pay
        self.restored: set[str] = set()  # nodes whose disk went back in time
        self.violations: list[str] = []
        self.history: list[tuple[Node, str, str, bytes, bool]] = []

    # -- disks that go back in time
    def backup(self, node: Node) -> Any:
        """Return the node's disk as it is now."""
        return {name: dict(rows.raw) for name, rows in node.rows.items()}, dict(node.wakes)

    def restore(self, node: Node, backup: Any) -> None:
        """Put a backup back. What was under way to and from the node is gone, and its ledger and its peers' hear of it."""
        raw, wakes = backup
        for name, rows in node.rows.items():
            rows.raw = dict(raw[name])
        node.wakes = dict(wakes)
        self.restored.add(node.id)
        self.pool = [one for one in self.pool if node.id not in (node_of(one[0]), node_of(one[1]))]
        for (sender, to), queue in self.links.items():
            if node.id in (node_of(sender), node_of(to)):
                queue.clear()
        for peer in self.nodes:
            if peer is not node:
                self.tell(node, PeerLost(f"{peer.id}/ledger", 1, 2, here=True), f"{node.id}/ledger")
                self.tell(peer, PeerLost(f"{node.id}/ledger", 1, 2), f"{peer.id}/ledger")

    # -- running machines
    def ask(self, node: Node, message: Any, actor: str = "ledger") -> Any:
        replies = self._step(node, actor, f"{node.id}/edge", encode(message), local=True)
        assert len(replies) == 1, (message, replies)
        return replies[0]

    def tell(self, node: Node, message: Any, sender: str, actor: str = "ledger") -> None:
        self._step(node, actor, sender, encode(message), local=node_of(sender) == node.id)

    def _step(self, node: Node, actor: str, sender: str, body: bytes, local: bool) -> list[Any]:
        self.history.append((node, actor, sender, body, local))
        message = node.decoders[actor][0 if local else 1](body)
        rows = node.rows[actor]
        step = node.machines[actor].handle(rows, message, Meta(sender, self.now, "t"))
        for key, row in step.rows.items():
            if row is None:
                rows.raw.pop(key, None)
            else:
                rows.raw[key] = encode(row)
        replies = []
        for effect in step.effects:
            match effect:
                case Send(to, out, _):
                    self._post(f"{node.id}/{actor}", to if "/" in to else f"{node.id}/{to}", encode(out))
                case Emit(feed, out):
                    node.feeds[feed].append(out)
                case Wake(key, at, out):
                    if at is None:
                        node.wakes.pop((actor, key), None)
                    else:
                        node.wakes[actor, key] = (at, encode(out))
                case Reply(out):
                    replies.append(out)
        self.check()
        return replies

    def _post(self, sender: str, to: str, body: bytes) -> None:
        if actor_of(to) in ("chain", "signer"):
            self.pool += [(sender, to, body)] * self._copies()
        else:
            self.links[sender, to].append(body)

    def _copies(self) -> int:
        return self.rng.choice((1, 1, 1, 2, 3)) if self.faults and self.rng else 1

    # -- moving things
    def step(self) -> bool:
        """Deliver one message, or fire one timer; False when nothing is left to do."""
        choices: list[Any] = [link for link, queue in self.links.items() if queue and node_of(link[1]) not in self.down]
        choices += ["pool"] * bool(self.pool)
        if not choices:
            return self._tick()
        pick = self.rng.choice(choices) if self.rng else choices[0]
        if pick == "pool":
            index = self.rng.randrange(len(self.pool)) if self.rng else 0
            self._port(*self.pool.pop(index))
        else:
            sender, to = pick
            body = self.links[pick].popleft()
            node = self.by_id[node_of(to)]
            try:
                self._step(node, actor_of(to), sender, body, local=node_of(sender) == node.id)
            except Violation as violation:
                self.violations.append(str(violation))
        return True

    def say_again(self) -> None:
        """Every message that any actor has ever had comes once more, in order."""
        for step in list(self.history):
            self._step(*step)

    def _tick(self) -> bool:
        """Fire the next timer within the next ten days."""
        due = sorted((at, node.id, *key) for node in self.nodes for key, (at, _) in node.wakes.items())
        if not due or due[0][0] > self.now + 10 * 86400:
            return False
        at, node_id, actor, key = due[0]
        self.now = max(self.now, at)
        node = self.by_id[node_id]
        _, body = node.wakes.pop((actor, key))
        self._step(node, actor, f"{node_id}/{actor}", body, local=True)
        return True

    def run(self, steps: int = 100_000) -> None:
        """Go on until nothing is left to do."""
        for _ in range(steps):
            if not self.step():
                return
        raise AssertionError("the world does not come to rest")

    # -- ports
    def _port(self, sender: str, to: str, body: bytes) -> None:
        node = self.by_id[node_of(to)]
        if to.endswith(("/ledger", "/wallet")):  # news from a port
            self._step(node, actor_of(to), sender, body, local=True)
        elif actor_of(to) == "signer":
            message = _signer_messages(body)
            self._say(to, sender, PaymentSigned(message.payment_id, node.sign("payment", message.body)))
        else:
            message = _chain_messages(body)
            answers = self._transfer(message) if isinstance(message, Transfer) else self._verify(message)
            for answer in answers:
                self._say(to, sender, answer)

    def _say(self, port: str, to: str, message: Any) -> None:
        self.pool += [(port, to, encode(message))] * self._copies()

    def _transfer(self, m: Transfer) -> list[Any]:
        if m.batch_id not in self.outcomes:
            if known := self.batches_of(m):
                batches = tuple(KnownBatch(b.batch_id, b.payees, b.orders) for b in known)
                return [OrdersKnown(m.batch_id, batches)]
            self.batches[m.batch_id] = m
            self._check_owed(m)
            tx_hash = "0x" + digest(m.batch_id)
            if self.faults and self.rng and self.rng.random() < 0.25:
                self.outcomes[m.batch_id] = ("failed", "reverted")
            else:
                self.outcomes[m.batch_id] = ("mined", tx_hash)
                self.mined_at[tx_hash] = self.now
                self.transfers += [(tx_hash, m.payer, payee, Decimal(amount)) for payee, amount in m.payees]
        kind, text = self.outcomes[m.batch_id]
        if kind == "failed":
            return [TransferFailed(m.batch_id, text)]
        if self.faults and self.rng and self.rng.random() < 0.5:
            return [
                TransferDelayed(m.batch_id, "no gas"),
                TransferSent(m.batch_id, text),
                TransferMined(m.batch_id, text, 7),
                TransferConfirmed(m.batch_id, text, 7, 21000, "0.001"),
            ]
        return [TransferConfirmed(m.batch_id, text, 7, 21000, "0.001")]

    def batches_of(self, m: Transfer) -> list[Transfer]:
        """Return the batches that paid, or may pay, orders of this one."""
        orders = {order_id for ids in m.orders for order_id in ids}
        return [
            other for other in self.batches.values()
            if (other.platform, other.payer) == (m.platform, m.payer) and self.outcomes[other.batch_id][0] != "failed"
            and orders & {order_id for ids in other.orders for order_id in ids}
        ]  # fmt: skip

    def _check_owed(self, m: Transfer) -> None:
        """What the chain port looks at before it signs: signed documents bear out each order of the batch."""
        node = self.by_id[m.payer]
        batch = node.rows["wallet"][f"batch/{m.batch_id}"]
        for order_id in (order_id for payee in batch.payees for order_id in payee.order_ids):
            assert objection(node.rows["ledger"], node.id, order_id) == ""

    def _verify(self, m: VerifyTransfer) -> list[Any]:
        if self.faults and self.rng and self.rng.random() < 0.3:
            return []  # forgotten: the node was restarted
        if self.mined_at.get(m.tx_hash, self.now) < m.not_before:
            return [TransferRejected(m.claim_id, f"older than {m.not_before}")]
        moved = total_of(a for h, payer, payee, a in self.transfers if (h, payer, payee) == (m.tx_hash, m.payer, m.payee))
        if moved - Decimal(m.already_claimed) >= Decimal(m.amount):
            return [TransferVerified(m.claim_id, m.tx_hash)]
        return [TransferRejected(m.claim_id, f"{moved} moved, {m.already_claimed} claimed before")]

    # -- what must hold after every step
    def check(self) -> None:
        for node in self.nodes:
            orders = node.all(OrderRow, "order/")
            for allocation in node.all(AllocationRow, "allocation/"):
                spent = total_of(o.amount for o in orders if o.allocation_id == allocation.allocation_id)
                assert spent == Decimal(allocation.spent) <= Decimal(allocation.total), allocation
            for agreement in node.all(LedgerAgreementRow, "agreement/"):
                ordered = total_of(o.amount for o in orders if o.agreement_id == agreement.agreement_id)
                if agreement.role == "payer" and node.id not in self.restored:
                    assert ordered == Decimal(agreement.accepted), agreement
                    assert Decimal(agreement.accepted) == self._agreed(node, agreement.agreement_id), agreement
                    assert Decimal(agreement.paid) <= Decimal(agreement.accepted), agreement
            for payee in {order.payee_addr for order in orders if node.id not in self.restored}:
                sent = total_of(a for _, payer, to, a in self.transfers if (payer, to) == (node.id, payee))
                owed = total_of(order.amount for order in orders if order.payee_addr == payee)
                assert sent <= owed, f"{sent} went to {payee}, {owed} is owed"

    def _agreed(self, node: Node, agreement_id: str) -> Decimal:
        """What the accepted documents of an agreement come to: the highest invoice, else the highest note per activity."""
        rows = [*node.all(PaymentDocumentRow, "debit-note/"), *node.all(PaymentDocumentRow, "invoice/")]
        rows = [r for r in rows if r.agreement_id == agreement_id and r.status in ("ACCEPTED", "SETTLED")]
        invoices = [Decimal(row.amount) for row in rows if row.kind == "invoice"]
        notes: dict[str, Decimal] = {}
        for row in rows:
            if row.kind == "debit-note":
                notes[row.activity_id] = max(notes.get(row.activity_id, Decimal(0)), Decimal(row.amount))
        return max(invoices) if invoices else total_of(notes.values())

    # -- shorthands of what REST does
    def agree(
        self,
        payer: Node,
        payee: Node,
        agreement_id: str,
        activities: tuple[str, ...] = (),
        payee_addr: str = "",
        payer_addr: str = "",
        platform: str = PLATFORM,
        demanded: dict[str, Any] | None = None,
        offered: dict[str, Any] | None = None,
    ) -> None:
        def properties(address: str, more: dict[str, Any] | None) -> str:
            return json.dumps({f"golem.com.payment.platform.{platform}.address": address, **(more or {})})

        chosen = {"golem.com.payment.chosen-platform": platform}
        demand = properties(payer_addr or payer.id, {**chosen, **(demanded or {})})
        offer = properties(payee_addr or payee.id, offered)
        for node, role in ((payer, "Requestor"), (payee, "Provider")):
            fact = AgreementApproved(agreement_id, role, payer.id, payee.id, demand, offer, self.now, f"app-{role}")
            self.tell(node, fact, f"{node.id}/negotiation")
            for activity_id in activities:
                self.tell(node, ActivityKnown(activity_id, agreement_id, self.now), f"{node.id}/activity")

    def allocate(self, node: Node, allocation_id: str, total: str, balance: str | None = "1000") -> Any:
        return self.ask(node, CreateAllocation(allocation_id, node.id, PLATFORM, total, balance))

    def note(self, node: Node, note_id: str, activity_id: str, total: str) -> Any:
        return self.ask(node, IssueDebitNote(note_id, activity_id, total, (1, 2.5)))

    def invoice(self, node: Node, invoice_id: str, agreement_id: str, total: str, activities: tuple[str, ...] = ()) -> Any:
        return self.ask(node, IssueInvoice(invoice_id, agreement_id, activities, total, self.now + 60))

    def send(self, node: Node, kind: str, document_id: str) -> Any:
        row = node.rows["ledger"][f"{kind}/{document_id}"]
        return self.ask(node, SendDocument(kind, document_id, node.sign(kind, row.body), 15.0))

    def accept(self, node: Node, kind: str, document_id: str, allocation_id: str, amount: str | None = None) -> Any:
        row = node.rows["ledger"].get(f"{kind}/{document_id}")
        body = acceptance_of(row) if row else b""
        amount = amount or (row.amount if row else "1")
        acceptance = node.sign("acceptance", body)
        return self.ask(node, AcceptDocument(kind, document_id, amount, allocation_id, acceptance))

    def document(self, node: Node, kind: str, document_id: str) -> PaymentDocumentRow:
        row = node.rows["ledger"][f"{kind}/{document_id}"]
        assert isinstance(row, PaymentDocumentRow)
        return row


__all__ = ["KEYS", "PLATFORM", "Done", "MemoryRows", "Node", "World"]
