"""`make demo`: a market on this machine. Two providers render a picture for an unmodified yapapi script and are paid.

With `--runtime vm` the renderer is a Docker image: made without a registry, pushed to the requestor's node by
`golem image push`, found by the script by its tag, and run by the providers in containers.

All parts are real processes that talk over libp2p; the chain is the embedded dev chain (no real money). What is printed at
the end is read back from the nodes and the chain: each invoice on both sides, each transaction, and that the balances
before and after add up to the last wei.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import click
import trio
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from golem.lab.engine import LocalEngine, LocalEngineError
from golem.lab.localnet import LocalNet, LocalNetError, LocalNode, Process, open_localnet
from protocol.types import amount, amount_text, to_wei

ROOT = Path(__file__).resolve().parents[2]
YAPAPI_PYTHON = ROOT / ".venv-yapapi" / "bin" / "python"
EXAMPLE = ROOT / "examples" / "render"
IMAGE_TAG = "render:demo"
PROVIDER_SHARE = {"YA_RT_STORAGE": "4", "YA_RT_MEM": "2"}  # GiB: the providers are on one machine, and storage is set aside
SETTLE_TIMEOUT_S = 60.0
out = Console(highlight=False, soft_wrap=True, markup=True, width=None if sys.stdout.isatty() else 200)


@dataclass(frozen=True)
class Options:
    """What the demo was asked for."""

    providers: int
    scene: Path
    output: Path
    width: int
    height: int
    samples: int
    tiles: str
    timeout_s: int
    keep: bool
    runtime: str = "wasmtime"
    stream: bool = True


@dataclass(frozen=True)
class Bill:
    """One agreement's invoice as both sides and the chain have it."""

    provider: str
    tiles: int
    seconds: float
    amount: Decimal
    invoice: str
    states: tuple[str, str]
    transactions: tuple[str, ...]


class Clock:
    """Seconds since the demo began, for its log lines."""

    def __init__(self) -> None:
        self._begin = time.monotonic()

    def say(self, text: str) -> None:
        out.print(f"[dim]{time.monotonic() - self._begin:6.1f} s[/dim]  {text}")


async def balance(node: LocalNode) -> Decimal:
    """Return the token balance of a node as its chain has it."""
    return amount((await node.command("payment", "status"))["amount"])


@asynccontextmanager
async def docker_engine(clock: Clock) -> AsyncIterator[str]:
    """The Docker Engine for the length of the block, as `DOCKER_HOST` wants it: this machine's if it will do, else our own."""
    usual = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    problem = await engine_problem(usual)
    if problem is None:
        clock.say(f"containers run on the Docker Engine at {usual}")
        yield usual
        return
    with tempfile.TemporaryDirectory(prefix="golem-engine-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o711)  # remapped users pass through to what is theirs
        engine = LocalEngine(Path(folder) / "e")
        try:
            try:
                await trio.to_thread.run_sync(engine.start)
            except LocalEngineError as error:
                raise LocalNetError(f"no Docker Engine for the containers. {usual}: {problem}. An own one: {error}") from None
            if problem := await engine_problem(engine.host):
                raise LocalNetError(f"containers cannot be run here: {problem}")
            clock.say("containers run on a Docker Engine of the demo's own")
            yield engine.host
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(engine.stop)
                await trio.to_thread.run_sync(engine.remove)


async def engine_problem(host: str) -> str | None:
    """Return why the runtime `vm` does not work on an Engine, None if it does."""
    if not host.startswith("unix://") or not Path(host.removeprefix("unix://")).exists():
        return "there is none"
    line = [sys.executable, "-m", "golem.exeunit", "test", "--runtime", "vm"]
    result = await trio.run_process(line, env={**os.environ, "DOCKER_HOST": host}, capture_stderr=True, check=False)
    said = result.stderr.decode(errors="replace").strip().splitlines() or [f"status {result.returncode}"]
    return None if result.returncode == 0 else said[-1].removeprefix("exe-unit: ")


async def push_image(net: LocalNet, requestor: LocalNode, clock: Clock) -> None:
    """Make the renderer's image and store it at the requestor's node."""
    archive = net.folder / "render.tar"
    line = [sys.executable, str(EXAMPLE / "make_image.py"), str(archive)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    result = await trio.run_process(line, env={**os.environ, "PYTHONPATH": path}, capture_stderr=True, check=False)
    if result.returncode:
        raise LocalNetError(result.stderr.decode(errors="replace").strip())
    image = await requestor.command("image", "push", str(archive), "--tag", IMAGE_TAG)
    clock.say(f"golem image push: {IMAGE_TAG} is {image['sha3'][:12]}…, {image['size'] / 2**20:.1f} MiB, at {image['url'][:30]}…")


async def start_market(
    net: LocalNet, options: Options, clock: Clock, environment: Mapping[str, str]
) -> tuple[LocalNode, list[LocalNode]]:
    """Start the nodes, fund the requestor, start the agents with `environment`."""
    names = ["requestor", *(f"provider-{number}" for number in range(1, options.providers + 1))]
    nodes = [await net.start_node(name, wait=False) for name in names]
    async with trio.open_nursery() as nursery:
        for node in nodes:
            nursery.start_soon(node.wait_ready)
    for node in nodes:
        clock.say(f"{node.name:12} {node.node_id}  {node.api_url}")
    for node in nodes[1:]:
        node.environment |= environment
        net.start_agent(node, subnet=net.name)
    funds = await nodes[0].command("payment", "fund")
    clock.say(f"the faucet gave the requestor {funds['amount']} {funds['token']} (on the {funds['simulatedBy']}: no real money)")
    return nodes[0], nodes[1:]


async def render(net: LocalNet, requestor: LocalNode, options: Options) -> dict[str, Any]:
    """Run the requestor's script, its progress on our screen; return its summary."""
    summary = net.folder / "summary.json"
    script = Process("render", [
        str(YAPAPI_PYTHON), str(EXAMPLE / "render.py"), "--scene", str(options.scene), "--out", str(options.output),
        "--width", str(options.width), "--height", str(options.height), "--samples", str(options.samples),
        "--tiles", options.tiles, "--max-workers", str(options.providers), "--subnet", net.name,
        "--timeout", str(options.timeout_s), "--summary", str(summary), "--log", str(net.folder / "yapapi.log"),
        *(("--stream",) if options.stream else ()),
        *(("--image-tag", IMAGE_TAG, "--registry", requestor.api_url) if options.runtime == "vm" else ()),
    ], dict(requestor.environment), net.folder / "render.log")  # fmt: skip
    environment = {**os.environ, **script.environment}
    process = await trio.lowlevel.open_process(script.arguments, env=environment, stdin=None)
    try:
        await process.wait()
    finally:
        with trio.CancelScope(shield=True), suppress(ProcessLookupError):
            if process.returncode is None:
                process.send_signal(signal.SIGINT)
                with trio.move_on_after(10):
                    await process.wait()
                process.kill()
    if not summary.exists():
        raise LocalNetError(f"the requestor's script ended with status {process.returncode} and no summary")
    found: dict[str, Any] = json.loads(summary.read_text())
    return found


async def settled(requestor: LocalNode, providers: list[LocalNode], summary: dict[str, Any], clock: Clock) -> list[Bill]:
    """Wait until every invoice is SETTLED on both sides; return the bills."""
    bills: list[Bill] = []
    by_id = {node.node_id: node for node in providers}
    deadline = trio.current_time() + SETTLE_TIMEOUT_S
    async with requestor.client() as payer:
        for agreement in summary["agreements"]:
            invoice = agreement["invoice_id"]
            if not invoice:
                raise LocalNetError(f"{agreement['provider_name']} sent no invoice for agreement {agreement['agreement_id']}")
            async with by_id[agreement["provider_id"]].client() as payee:
                while True:
                    both = [(await side.get(f"/payment-api/v1/invoices/{invoice}")).json()["status"] for side in (payer, payee)]
                    if both == ["SETTLED", "SETTLED"]:
                        break
                    if trio.current_time() > deadline:
                        why = (await payer.get(f"/payment-api/v1/invoices/{invoice}/explain")).json()
                        raise LocalNetError(f"invoice {invoice} is {both} after {SETTLE_TIMEOUT_S:g} s: {why}")
                    await trio.sleep(0.2)
                hashes = await transactions(payee, agreement["agreement_id"])
            bills.append(Bill(agreement["provider_name"], agreement["tiles"], agreement["seconds"],
                              Decimal(agreement["amount"]), invoice, (both[0], both[1]), hashes))  # fmt: skip
            clock.say(f"{agreement['provider_name']} was paid {agreement['amount']} tGLM, verified on chain")
    return bills


async def transactions(payee: Any, agreement_id: str) -> tuple[str, ...]:
    """Return the hashes of the transactions that paid an agreement, as its payee knows them."""
    import base64

    payments = (await payee.get("/payment-api/v1/payments")).json()
    activities = (await payee.get("/activity-api/v1/activity", params={"agreementId": agreement_id})).json()
    mine = [
        payment for payment in payments
        if any(part["agreementId"] == agreement_id for part in payment["agreementPayments"])
        or any(part["activityId"] in activities for part in payment["activityPayments"])
    ]  # fmt: skip
    return tuple(dict.fromkeys("0x" + base64.b64decode(payment["details"]).hex() for payment in mine))


def show(bills: list[Bill]) -> None:
    """Print the table of what was done and paid."""
    table = Table(title="What was done, and what was paid for it", title_justify="left", box=SIMPLE_HEAD)
    for title in ("provider", "tiles", "seconds", "cost in tGLM", "invoice", "transaction", "state"):
        table.add_column(title, justify="right" if title in ("tiles", "seconds", "cost in tGLM") else "left")
    for bill in bills:
        numbers = ", ".join(f"{number[:8]}…" for number in bill.transactions)
        table.add_row(bill.provider, str(bill.tiles), f"{bill.seconds:.1f}", amount_text(bill.amount), f"{bill.invoice[:6]}…",
                      numbers, bill.states[0] if len(set(bill.states)) == 1 else " / ".join(bill.states))  # fmt: skip
    out.print(table)
    out.print("The requestor's and the provider's node say so both. In full:")
    for bill in bills:
        out.print(f"  {bill.provider}: invoice {bill.invoice}, transaction {', '.join(bill.transactions)}")


def to_wei_signed(value: Decimal) -> int:
    """Return a signed amount in wei."""
    return to_wei(value) if value >= 0 else -to_wei(-value)


def check_books(before: dict[str, Decimal], after: dict[str, Decimal], bills: list[Bill]) -> bool:
    """Print balances before and after; return whether they add up to the last wei."""
    table = Table(title="Balances in tGLM, read from the chain", title_justify="left", box=SIMPLE_HEAD)
    for title in ("node", "before", "after", "change"):
        table.add_column(title, justify="left" if title == "node" else "right")
    for name in before:
        change = after[name] - before[name]
        table.add_row(name, amount_text(before[name]), amount_text(after[name]), f"{change:+f}")
    out.print(table)
    owed = {name: sum((bill.amount for bill in bills if bill.provider == name), Decimal(0)) for name in before}
    total = sum(owed.values(), Decimal(0))
    owed["requestor"] = -total
    right = all(to_wei(after[name]) - to_wei(before[name]) == to_wei_signed(owed[name]) for name in before)
    if right:
        moved = f"{amount_text(total)} tGLM left the requestor and reached the providers"
        out.print(f"[green]The books add up to the last wei: {moved}.[/green]")
    else:
        out.print("[red]The books do not add up.[/red]")
    return right


async def demo(options: Options, folder: Path) -> bool:
    """Run the whole of it; return whether everything went right."""
    clock = Clock()
    async with AsyncExitStack() as stack:
        environment = {}
        if options.runtime == "vm":
            host = await stack.enter_async_context(docker_engine(clock))
            environment = {"DOCKER_HOST": host, **PROVIDER_SHARE}
        net = await stack.enter_async_context(open_localnet(folder))
        requestor, providers = await start_market(net, options, clock, environment)
        if options.runtime == "vm":
            await push_image(net, requestor, clock)
        before = {node.name: await balance(node) for node in (requestor, *providers)}
        clock.say("the requestor's script (unmodified yapapi 0.13.1) starts")
        summary = await render(net, requestor, options)
        if not summary["ok"]:
            clock.say(f"[red]the picture is not complete: {summary['error'] or summary['failures']}[/red]")
        else:
            clock.say(f"the picture is complete after {summary['seconds']:.1f} s: {options.output}")
        bills = await settled(requestor, providers, summary, clock)
        after = {node.name: await balance(node) for node in (requestor, *providers)}
        show(bills)
        right = check_books(before, after, bills)
        clock.say("stopping the market")
    clock.say("everything is stopped")
    return bool(summary["ok"]) and right


@asynccontextmanager
async def until_interrupted() -> Any:
    """Cancel the block on Ctrl-C or SIGTERM, once, so that it can clean up behind itself."""
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                async for _ in signals:
                    out.print("\ninterrupted: stopping everything (a few seconds)")
                    nursery.cancel_scope.cancel()
                    break

        nursery.start_soon(watch)
        yield
        nursery.cancel_scope.cancel()


async def _main(options: Options) -> bool | None:
    result: bool | None = None
    with tempfile.TemporaryDirectory(prefix="golem-demo-", ignore_cleanup_errors=True) as temporary:
        folder = ROOT / ".demo" if options.keep else Path(temporary)
        async with until_interrupted():
            result = await demo(options, folder)
    return result


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--providers", type=click.IntRange(1, 8), default=2, help="Provider nodes.")
@click.option("--scene", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=EXAMPLE / "scenes" / "room.txt")
@click.option("--out", "output", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "render.png")
@click.option("--width", type=click.IntRange(16, 4096), default=480)
@click.option("--height", type=click.IntRange(16, 4096), default=320)
@click.option("--samples", type=click.IntRange(1, 10000), default=100, help="Light paths a pixel.")
@click.option("--tiles", default="6x4", help="COLUMNSxROWS, one task each.")
@click.option("--timeout", "timeout_s", type=click.IntRange(300, 86400), default=600,
              help="Seconds for the picture; providers take nothing shorter than 300.")  # fmt: skip
@click.option("--runtime", type=click.Choice(["wasmtime", "vm"]), default="wasmtime",
              help="Runtime that the job asks for: a WebAssembly module, or a Docker image.")  # fmt: skip
@click.option("--stream/--poll", default=True,
              help="How the script takes results: when they are there, or when it asks again (yapapi's default).")  # fmt: skip
@click.option("--keep", is_flag=True, help="Keep the nodes' data and logs in .demo/.")
def main(**flags: Any) -> None:
    """Start a market on this machine, render a picture on it, pay for it, and clean up."""
    options = Options(**flags)
    if not YAPAPI_PYTHON.exists():
        raise click.ClickException("the requestor's environment is missing: run `make demo`, which makes it")
    begin = time.monotonic()
    try:
        result = trio.run(_main, options)
    except BaseExceptionGroup as group:
        known, rest = group.split(LocalNetError)
        if known is None or rest is not None:
            raise
        raise click.ClickException("; ".join(str(error) for error in known.exceptions)) from None
    if result is None:
        sys.exit(130)
    verdict = "Done" if result else "[red]Failed[/red]"
    out.print(f"{verdict} after {time.monotonic() - begin:.0f} s. The picture: {options.output}")
    sys.exit(0 if result else 1)


if __name__ == "__main__":
    main()
