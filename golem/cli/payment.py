"""`golem payment`: accounts, balances, test funds."""

from __future__ import annotations

from decimal import Decimal
from typing import Any
from urllib.parse import quote

import click

from golem.cli import bills
from golem.cli.client import ask_node, get
from golem.cli.output import done, say, table, text, value, wants_json


def _network_options(function: Any) -> Any:
    function = click.option("--network", help="Name of the network. [hoodi; polygon on mainnet]")(function)
    function = click.option("--driver", default="erc20", hidden=True)(function)
    return click.option("--account", hidden=True)(function)


def _simulated(found: dict[str, Any]) -> str:
    return f"{found['network']} is simulated by the {found['simulatedBy']}: no real money." if found.get("simulatedBy") else ""


@click.group()
def payment() -> None:
    """Balances, accounts and test funds."""


@payment.command("fund")
@_network_options
@click.option("--mint-only", is_flag=True, hidden=True)
def fund(network: str | None, **_: Any) -> None:
    """Get test coins and tokens, and wait for them."""
    found = ask_node("payment_fund", 300, network=network)
    if wants_json():
        value(found)
        return
    text(f"This node has {found['amount']} {found['token']} and {found['gas']} {found['coin']} on {found['network']}.")
    if note := _simulated(found):
        say(note)


@payment.command("init")
@_network_options
@click.option("--sender", is_flag=True)
@click.option("--receiver", is_flag=True)
def init(network: str | None, **_: Any) -> None:
    """Check that a network can be used.

    Every platform of the profile is ready by itself: nothing has to be set up.
    """
    found = ask_node("payment_init", network=network)
    done(f"This node can pay and be paid on {found['network']}, as {found['platform']}: nothing has to be set up. "
         f"golem payment fund gets test {found['token']}.")  # fmt: skip


@payment.command("resume")
@_network_options
def resume(network: str | None, **_: Any) -> None:
    """Sign payments again after a restore.

    A restored node holds its payments where its account has sent transactions since the backup: they may have paid what it
    would pay now. Peers tell it what was paid; see `golem payment status` before. So do payments wait whose payees another
    process with this node's key may have paid.
    """
    held = ask_node("payment_resume", network=network)
    if wants_json():
        value(held)
        return
    text("Payments go on." if held else "Nothing was held back.")


@payment.command("status")
@_network_options
@click.option("--last", hidden=True)
@click.option("--precise", is_flag=True, hidden=True)
def status(network: str | None, **_: Any) -> None:
    """Balance, reserved and outstanding amounts.

    What is owed and due, what is in flight (nonce, fee, confirmations), what holds payments up, and what to do about it.
    """
    found = ask_node("payment_status", network=network)
    if wants_json():
        value(found)
        return
    token = found["token"]
    age = f" (as last known, {found['balance_datetime']})" if found.get("balance_datetime") else ""
    amount, gas, coin = found["amount"] or "unknown", found["gas"]["balance"] or "unknown", found["gas"]["currency_short_name"]
    rows = [
        ["address", found["address"]], ["platform", found["platform"]], ["balance", f"{amount} {token}{age}"],
        ["gas", f"{gas} {coin}"], ["reserved", f"{found['reserved']} {token}"],
    ]  # fmt: skip
    for held in found["heldBy"]:
        agent = f" of {held['agent']}" if held["agent"] else ""
        rows.append(
            ["held by", f"{held['amount']} by {held['allocationId']}{agent}, {held['paymentPlatform']}, {held['created']}"]
        )
    if found.get("chain"):
        rows.append(["chain", f"{found['chain']} at {found['chainUrl']}"])
    for way in ("outgoing", "incoming"):
        for stage, sums in found[way].items():
            rows.append([f"{way} {stage}", f"{sums['totalAmount']} {token} in {sums['agreementsCount']} agreements"])
    rows += [["owed", f"{found['owed']} {token} accepted and not paid"], ["due", f"{found['due']} {token} of it past its date"]]
    for batch in found["inFlight"]:
        rows.append(
            [
                "in flight",
                f"{batch['amount']} {token} to {batch['payees']} payee{'s' if batch['payees'] != 1 else ''}{_because(batch)}",
            ]
        )
        rows += [["", _flight(tx)] for tx in batch["transactions"]]
    rows += [["problem", problem] for problem in found["problems"]]
    rows += [["what to do", advice] for advice in found["advice"]]
    table(["", ""], rows, _simulated(found))


def _flight(tx: dict[str, Any]) -> str:
    fee = f", up to {tx['maxFeeGwei']:.3g} gwei" if tx["maxFeeGwei"] is not None else ""
    deep = f", {tx['confirmations']} of {tx['depth']} confirmations" if tx["confirmations"] is not None else ""
    return f"nonce {tx['nonce']}: {tx['state']}{fee}{deep}{', ' + tx['hash'] if tx['hash'] else ''}"


@payment.command("audit")
def audit() -> None:
    """Prove that the books add up, to the wei.

    Issued = accepted + open + rejected; accepted = settled + queued + in flight; an allocation's total = paid + reserved +
    free; and each transfer is that of settled documents. What does not add up names its document; the status is 1 then.
    """
    found = ask_node("payment_audit", 600)
    if wants_json():
        value(found)
    else:
        _show_audit(found)
    if not found["addsUp"]:
        raise click.exceptions.Exit(1)


def _show_audit(found: dict[str, Any]) -> None:
    names = ["issued", "accepted", "open", "rejected", "settled", "queued", "inFlight"]
    rows = [[row["paymentPlatform"], row["role"], row["documents"], *(row[name] for name in names)] for row in found["sums"]]
    if rows:
        table(["platform", "as", "documents", *names[:-1], "in flight"], rows)
    kept = [row for row in found["allocations"] if not row["released"] or Decimal(row["reserved"])]
    if kept:
        columns = ["total", "paid", "reserved", "free"]
        table(["allocation", *columns], [[row["allocationId"], *(row[column] for column in columns)] for row in kept])
    for one in found["findings"]:
        text(f"{one['subject']}: {one['words']}")
    if found["addsUp"]:
        unknown = f"; {found['transfersUnknown']} more are not known to this node's chain.db" if found["transfersUnknown"] else ""
        count = len(found["allocations"])
        text(f"The books add up: {sum(row['documents'] for row in found['sums'])} documents, {count} allocations, "
             f"{found['transfersCompared']} transfers compared with the chain{unknown}.")  # fmt: skip
    else:
        say(f"{len(found['findings'])} things do not add up. golem payment trace ID tells the story of a document; "
            "golem backup keeps the books as they are now for whoever looks into it.")  # fmt: skip


@payment.command("release-allocations")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--older-than", metavar="DURATION", help="Only those made longer ago than this: 30min, 12h, or seconds.")
def release_allocations(ids: tuple[str, ...], older_than: str | None) -> None:
    """Free the money that allocations hold.

    Those of these ids (the first characters are enough), or all. What was accepted is paid all the same; an agent that
    works with one of them cannot accept more. `golem payment status` lists what holds the money.
    """
    from golem.config import ConfigError, read_duration

    try:
        older_than_s = read_duration({"--older-than": older_than or ""}, "--older-than", 0.0)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    _release(ids, older_than_s)


def _release(ids: tuple[str, ...], older_than_s: float) -> None:
    found = ask_node("payment_release_allocations", ids=list(ids), older_than_s=older_than_s)
    if wants_json():
        value(found)
        return
    table(["allocation", "agent", "freed", "platform"],
          [[row["allocationId"], row["agent"] or "", row["amount"], row["paymentPlatform"]] for row in found])  # fmt: skip
    if not found:
        say("No allocation was released.")


@payment.command("release")
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
def release(ids: tuple[str, ...]) -> None:
    """Free the money that these allocations hold.

    The first characters of an id are enough. As release-allocations does, which frees all of them where none is named.
    """
    _release(ids, 0.0)


@payment.command("trace")
@click.argument("debt")
def trace(debt: str) -> None:
    """Tell what became of a debt.

    Name an invoice, debit note, order, batch, payment or transaction. You see its orders and batches, each signed
    transaction, and what this node and every RPC said of it, and when; of what is owed to this node, how it was paid.
    """
    found = ask_node("payment_trace", id=ask_node("whole", kind="debt", id=debt))
    if wants_json():
        value(found)
        return
    for order in found["orders"]:
        text(f"order {order['orderId']}: {order['amount']} to {order['payee']} on {order['platform']}, {order['state']}")
        text(f"  {order['queuedAt']}  queued{_because(order)}")
    for batch in found["batches"]:
        chain = batch["chain"] or {"transactions": [], "payees": []}
        text(f"batch {batch['batchId']} on {batch['platform']}: {batch['state']}{_because(batch)}")
        text(f"  {batch['createdAt']}  gathered")
        for tx in chain["transactions"]:
            text(f"  nonce {tx['nonce']}: {tx['state']}{', ' + tx['hash'] if tx['hash'] else ''}")
            for attempt in tx["attempts"]:
                fee, sent = f"{attempt['maxFeeGwei']:.3g}", attempt["sent"]
                text(f"    {attempt['at']}  {attempt['hash']}, up to {fee} gwei, sent {sent} times")
            for seen in tx["seen"]:
                text(f"    {seen['at']}  {seen['by']}: {seen['what']}")
    for paid in found["received"]:
        text(f"payment {paid['paymentId']} of {paid['amount']} from {paid['from']} on {paid['platform']}: {paid['state']}")
        text(f"  {paid['at']}  {paid['hash']}{_because(paid)}")
        if paid["lost"]:
            text(f"  {paid['lost']}")


def _because(row: dict[str, Any]) -> str:
    return f" ({row['reason']})" if row["reason"] else ""


@payment.command("decide")
@click.argument("batch")
@click.option("--paid", "paid_by", metavar="TRANSACTION", help="This transaction paid it: looked up under every RPC.")
@click.option("--unseen", is_flag=True, help="With --paid: count it though no RPC shows that it paid.")
@click.option("--unpaid", is_flag=True, help="Nothing paid it, and nothing will: pay it anew.")
def decide(batch: str, paid_by: str | None, unseen: bool, unpaid: bool) -> None:
    """Say what became of an unclear payment.

    It is one of ours that the RPCs do not prove, or one to this node whose block the chain has lost.
    `golem payment status` names such payments, `golem payment trace` tells what each RPC says. Look at the payer's and the
    payee's accounts in an explorer that you trust: a payment that is called unpaid, and is not, is paid twice; one that is
    called paid, and is not, is never paid.
    """
    if unpaid == (paid_by is not None) or (unseen and paid_by is None):
        raise click.UsageError("say either --paid TRANSACTION (and --unseen where no RPC shows it) or --unpaid")
    whole = ask_node("whole", kind="payment", id=batch)
    said = ask_node("payment_decide", batch=whole, paid_by=paid_by, unseen=unseen)
    if wants_json():
        value(said)
        return
    text(said)


@payment.group()
def driver() -> None:
    """What payments are made with."""


@driver.command("list")
def driver_list() -> None:
    """List networks and their tokens."""
    found: dict[str, Any] = {}
    networks = {row["network"]: row for row in ask_node("payment_networks")}
    for name, row in networks.items():
        one = found.setdefault(row["driver"], {"default_network": "", "networks": {}, "recv_init_required": False})
        one["default_network"] = name if row["default"] else one["default_network"]
        one["networks"][name] = {"default_token": row["token"], "tokens": {row["token"]: row["platform"]}}
    if wants_json():
        value(found)
        return
    rows = [[row["driver"], name, row["token"], row["platform"], "X" if row["default"] else ""] for name, row in networks.items()]
    simulated = sorted(name for name, row in networks.items() if row["simulatedBy"])
    note = f"{', '.join(simulated)}: simulated by a dev chain, no real money." if simulated else ""
    table(["driver", "network", "token", "platform", "default"], rows, note)


@payment.command("explain")
@click.argument("document_id", metavar="ID")
def explain(document_id: str) -> None:
    """Say how a bill is judged.

    ID is a debit note, an invoice or an agreement: price, usage, what this node's clock allows, and what it refused.
    """
    whole = ask_node("whole", kind="bill", id=document_id)
    value(get(f"/payment-api/v1/explain/{quote(whole, safe='')}"))


@payment.command("accounts")
def accounts() -> None:
    """Platforms on which this node can pay and be paid."""
    found = ask_node("payment_accounts")
    if wants_json():
        value(found)
        return
    columns = ["platform", "address", "driver", "network", "token", "send", "receive"]
    simulated = {row["network"]: row["simulatedBy"] for row in found if row.get("simulatedBy")}
    note = f"{', '.join(simulated)}: simulated by the {next(iter(simulated.values()))}, no real money." if simulated else ""
    shown = [{**row, **{way: "yes" if row[way] else "no" for way in ("send", "receive")}} for row in found]
    table(columns, [[row[column] for column in columns] for row in shown], note)


def register(main: click.Group) -> None:
    bills.register(payment)
    main.add_command(payment)
