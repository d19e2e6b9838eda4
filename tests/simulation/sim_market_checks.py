"""What must hold in the simulated market: always, and at its end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from sim_world import Broken

from actors.activity.machine import Activity
from actors.activity.rows import ActivityRow, BatchRow, ResultRow
from actors.auditor.audit import audit
from actors.auditor.books import contradictions
from actors.kernel.records import unsealed
from actors.ledger.machine import Ledger, OrderRow, PaymentDocumentRow, PaymentRow, total_of
from actors.ledger.machine import LedgerAgreementRow as Terms
from actors.market.machine import Market
from actors.negotiation.machine import Negotiation
from actors.negotiation.rows import AgreementRow
from actors.wallet.machine import Wallet
from actors.wallet.rows import PayOrderRow
from protocol.codec import Decoder
from protocol.types import MAX_CLOCK_SKEW_S

if TYPE_CHECKING:
    from sim_market import MarketHost, MarketWorld

_decode = {machine.name: Decoder[Any](machine.rows, 1 << 26) for machine in (Market, Negotiation, Activity, Ledger, Wallet)}
NOT_TAKEN = "Agreement not taken"
OVER = ("Rejected", "Cancelled", "Expired", "Terminated")


def rows(host: MarketHost, actor: str, prefix: str, kind: type) -> Iterator[Any]:
    """Yield the rows on a disk without the kernel's help."""
    return (row for _, row in keyed(host, actor, prefix) if isinstance(row, kind))


def keyed(host: MarketHost, actor: str, prefix: str) -> Iterator[tuple[str, Any]]:
    query = "select key, body from row where actor=? and key>=? and key<? order by key"
    for key, body in host.db.execute(query, (actor, prefix, prefix + "\U0010ffff")).fetchall():
        bad, good = host.world.bad_rows.get((host.name, actor, key), (b"", b""))
        yield key, _decode[actor](unsealed(actor, key, good if body == bad else body))


def agreements(host: MarketHost) -> dict[str, AgreementRow]:
    return {row.agreement_id: row for row in rows(host, "negotiation", "agreement/", AgreementRow)}


def documents(host: MarketHost, role: str) -> dict[tuple[str, str], PaymentDocumentRow]:
    found = (*rows(host, "ledger", "debit-note/", PaymentDocumentRow), *rows(host, "ledger", "invoice/", PaymentDocumentRow))
    return {(row.kind, row.document_id): row for row in found if row.role == role}


def ready(host: MarketHost) -> bool:
    return host.db.execute("select count(*) from sqlite_master where name='row'").fetchone()[0] == 1


def paid(world: MarketWorld, payer: str, payee: str) -> Decimal:
    """Return what the chain moved between two in all."""
    return total_of(amount for _, one, other, amount in world.transfers if (one, other) == (payer, payee))


def check_always(world: MarketWorld) -> None:
    """Money: never more than was allowed, never more than was accepted, never twice."""
    for host in world.hosts.values():
        if not ready(host):
            continue  # before its first start
        orders = list(rows(host, "ledger", "order/", OrderRow))
        for terms in rows(host, "ledger", "agreement/", Terms):
            # a payee may hear of a payment before it hears of the acceptance: `check_end` holds its sums together
            if Decimal(terms.paid) > Decimal(terms.accepted) and terms.role == "payer":
                raise Broken(f"more is paid than accepted: {terms}")
        for other in world.hosts:
            owed = total_of(order.amount for order in orders if order.peer == other)
            if paid(world, host.name, other) > owed:
                raise Broken(f"{host.name} paid {other} {paid(world, host.name, other)} and owes {owed}")
    audit_all(world)


@dataclass(frozen=True)
class Books:
    """An actor's rows on a disk, as the auditor reads them."""

    host: MarketHost
    actor: str

    def prefix(self, prefix: str) -> Iterator[tuple[str, Any]]:
        return keyed(self.host, self.actor, prefix)


def audit_all(world: MarketWorld) -> None:
    """The books of every node add up, to the wei, and those of no two contradict each other."""
    hosts = [host for host in world.hosts.values() if ready(host)]
    for host in hosts:
        moved: dict[tuple[str, str], Decimal] = {}
        for tx_hash, payer, payee, amount in world.transfers:
            if payer == host.name:
                moved[tx_hash, payee] = moved.get((tx_hash, payee), Decimal(0)) + amount
        report = audit(Books(host, "ledger"), Books(host, "wallet"), moved)
        found = [*report.findings]
        for other in hosts:
            if other is not host:
                found += contradictions(Books(host, "ledger"), Books(other, "ledger"))
        for sums in report.sums:
            if sums.issued != total_of((sums.accepted, sums.open, sums.rejected)):
                raise Broken(f"{host.name}: issued is not accepted + open + rejected: {sums}")
            if sums.role == "payer" and sums.accepted != total_of((sums.settled, sums.queued, sums.in_flight)):
                raise Broken(f"{host.name}: accepted is not settled + queued + in flight: {sums}")
        world.reached["audit of an account in use"] += bool(report.sums)
        if found:
            raise Broken(f"the books of {host.name} do not add up: {found[:3]}")


def unsettled(world: MarketWorld) -> list[str]:
    """Return what is still under way."""
    waits: list[str] = []
    for host in (*world.hosts.values(), *world.units.values()):
        if host.system is None:
            waits.append(f"{host.name} is down")
        for link in host.db.execute("select actor, recipient, count(*) from outbox group by 1, 2"):
            waits.append(f"{host.name}: outbox {link}")
    for host in world.hosts.values():
        short = host.name[:6]
        for agreement in agreements(host).values():
            if agreement.state not in OVER:
                waits.append(f"{short}: agreement {agreement.agreement_id[:8]} is {agreement.state}")
        for row in rows(host, "activity", "activity/", ActivityRow):
            if not row.ended:
                waits.append(f"{short}: activity {row.activity_id[:8]} is {row.state} (destroying: {row.destroying})")
        for (kind, own_id), document in documents(host, "payee").items():
            if document.status in ("ISSUED", "ACCEPTED") and not document.refused:  # a refused one stays ISSUED, and says so
                waits.append(f"{short}: {kind} {own_id} is {document.status}: {document.waiting}")
            if kind == "invoice" and document.status == "RECEIVED":  # debit notes may be left unjudged, and are settled by it
                waits.append(f"{short}: invoice {own_id} is {document.status}: {document.waiting}")
        accepted = [document for document in documents(host, "payer").values() if document.status == "ACCEPTED"]
        waits += [f"{short}: {document.document_id} is accepted: {document.waiting}" for document in accepted]
        for payment in rows(host, "ledger", "payment/", PaymentRow):
            if payment.state not in ("ACKNOWLEDGED", "VERIFIED"):
                waits.append(f"{short}: {payment.role}'s payment {payment.payment_id[:8]} is {payment.state}: {payment.reason}")
        unpaid = [order for order in rows(host, "wallet", "order/", PayOrderRow) if order.state != "PAID"]
        waits += [f"{short}: order {order.order_id} is {order.state}" for order in unpaid]
    providers = [agent.host for agent in world.providers]
    for provider in providers:
        billed = {d.agreement_id for d in documents(provider, "payee").values() if d.kind == "invoice"}
        ended = {a.agreement_id for a in agreements(provider).values() if a.state == "Terminated" and a.approved_at}
        waits += [f"no invoice for {one[:8]}" for one in ended - billed]
    return waits


def check_end(world: MarketWorld) -> None:
    """Both sides say the same of everything, and the chain moved exactly what was accepted."""
    check_always(world)
    requestor, providers = world.requestor.host, [agent.host for agent in world.providers]
    mine = agreements(requestor)
    for provider in providers:
        theirs = agreements(provider)
        for agreement_id in mine.keys() | theirs.keys():
            left, right = mine.get(agreement_id), theirs.get(agreement_id)
            if left is not None and left.provider != provider.name:
                continue
            if right is None and left is not None and left.state in ("Proposal", "Cancelled", "Expired"):
                continue  # it was never sent, or never arrived
            if right is None and left is not None and left.state == "Rejected" and NOT_TAKEN in str(left.reason):
                continue  # the provider's node itself turned it down: that leaves no row there
            if left is None or right is None:
                raise Broken(f"agreement {agreement_id} is {left and left.state} here and {right and right.state} there")
            # A commit that passed its deadline is not made up for: the provider hears of the end alone, and nothing began.
            same_time = right.approved_at in (left.approved_at, None) or (
                # Where clocks were set, the provider may not believe the requestor's: it takes the time of its own.
                world.clock_steps_every_s and abs(right.approved_at - (left.approved_at or 0)) > MAX_CLOCK_SKEW_S
            )
            if (left.state, left.terminator) != (right.state, right.terminator) or not same_time:
                raise Broken(f"agreement {agreement_id} is {left} here and {right} there")
        payer, payee = documents(requestor, "payer"), documents(provider, "payee")
        for key, document in payer.items():
            if document.agreement_id in theirs and payee[key].status != document.status:
                raise Broken(f"{key} is {document.status} here and {payee[key].status} there")
        for key, document in payee.items():
            if document.status in ("ACCEPTED", "SETTLED", "RECEIVED") and key not in payer:
                raise Broken(f"{key} is {document.status} there and unknown here")
        _check_money(world, requestor, provider)
    _check_activities(requestor, providers)


def _check_money(world: MarketWorld, requestor: MarketHost, provider: MarketHost) -> None:
    terms = [row for row in rows(requestor, "ledger", "agreement/", Terms) if row.peer == provider.name]
    sums = {row.agreement_id: row for row in rows(provider, "ledger", "agreement/", Terms)}
    for row in terms:
        other = sums.get(row.agreement_id)
        if other is None:  # the commit never arrived
            if Decimal(row.accepted):
                raise Broken(f"the provider does not know what {row} is about")
        elif not Decimal(row.accepted) == Decimal(row.paid) == Decimal(other.paid) == Decimal(other.accepted):
            raise Broken(f"sums differ: {row} {other}")
        if Decimal(row.accepted) != agreed(requestor, row.agreement_id):
            raise Broken(f"{row.accepted} is owed, but {agreed(requestor, row.agreement_id)} was agreed to: {row}")
    accepted = total_of(row.accepted for row in terms)
    if paid(world, requestor.name, provider.name) != accepted:
        raise Broken(f"the chain moved {paid(world, requestor.name, provider.name)}, accepted was {accepted}")


def agreed(host: MarketHost, agreement_id: str) -> Decimal:
    """Return what the accepted documents of an agreement come to: the invoice, else the highest note of each activity."""
    found = [row for row in documents(host, "payer").values() if row.agreement_id == agreement_id]
    found = [row for row in found if row.status in ("ACCEPTED", "SETTLED")]
    notes: dict[str, Decimal] = {}
    for row in found:
        if row.kind == "debit-note":
            notes[row.activity_id] = max(notes.get(row.activity_id, Decimal(0)), Decimal(row.amount))
    invoices = [Decimal(row.amount) for row in found if row.kind == "invoice"]
    return max(invoices) if invoices else total_of(notes.values())


def _check_activities(requestor: MarketHost, providers: list[MarketHost]) -> None:
    for batch in rows(requestor, "activity", "batch/", BatchRow):
        results = list(rows(requestor, "activity", f"result/{batch.batch_id}/", ResultRow))
        if not batch.finished or [result.index for result in results] != list(range(batch.have)) or not results:
            raise Broken(f"batch {batch} has {results}")
        if not results[-1].batch_finished or (len(results) < batch.size and (results[-1].ok or not results[-1].message)):
            raise Broken(f"batch {batch} ended without a reason: {results[-1]}")
    there = {row.activity_id: row for host in providers for row in rows(host, "activity", "activity/", ActivityRow)}
    for row in rows(requestor, "activity", "activity/", ActivityRow):
        if not row.ended or (row.activity_id in there and not there[row.activity_id].ended):  # else the request never came
            raise Broken(f"activity {row} goes on on one side")
