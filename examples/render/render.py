#!/usr/bin/env python3
"""Render an image on the market with the unmodified yapapi 0.13: one task a tile, any number of providers.

    YAGNA_APPKEY=... python render.py --scene scenes/room.txt --subnet demo --out room.png

What happens: the module `render.wasm` is published with the node's `gftp` (or taken from --image-url), a demand asks
for the runtime `wasmtime` and that module, every worker gets the scene once and then renders tiles; each finished
tile goes into the PNG at once, a tile whose provider fails is given to another one. Invoices are accepted by yapapi.
With `--image-tag NAME` it is a Docker image instead (`make_image.py` makes it, `golem image push` stores it at the node):
the demand is yapapi's own `vm.repo(image_tag=NAME, repository_url=...)`.
`--summary FILE` writes what it took as JSON: tiles by provider, agreements, invoices, total. yapapi's own log goes to
`--log`. Ctrl-C ends agreements and waits for invoices; a second one stops at once.

Needs `gftp` on PATH and the app-key in YAGNA_APPKEY; the node's address may be set with YAGNA_API_URL.
Exit status: 0 the image is complete, 1 it is not, 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from image import Canvas, Tile, cut
from yapapi import Golem, Task, WorkContext, events
from yapapi.log import log_event_repr
from yapapi.payload import Payload, vm
from yapapi.props import inf
from yapapi.props.base import constraint, prop
from yapapi.rest.activity import CommandExecutionError
from yapapi.script import Script
from yapapi.storage import gftp

HERE = Path(__file__).resolve().parent
SCENE_AT_PROVIDER = "/golem/input/scene.txt"
TILE_AT_PROVIDER = "/golem/output/tile.ppm"
MAX_ATTEMPTS = 5  # of one tile: what fails as often as that fails everywhere
MAX_STDERR = 2000  # characters of it that a failure shows
PREVIEW_COLUMNS = 72


@dataclass
class WasmPayload(Payload):
    """Providers that run a single WASI module; `package` is hash:sha3:<SHA3-224 of the file>:<url>."""

    package: str = prop("golem.srv.comp.task_package")
    runtime: str = constraint(inf.INF_RUNTIME_NAME, default="wasmtime")


class Screen:
    """Progress on stderr: one line an event and, on a colour terminal, the image below while it grows."""

    def __init__(self, canvas: Canvas, preview: str) -> None:
        self._canvas = canvas
        self._draws = preview == "always" or (preview == "auto" and sys.stderr.isatty())
        self._drawn_lines = 0
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line above the picture."""
        if self._drawn_lines:
            sys.stderr.write(f"\x1b[{self._drawn_lines}A\x1b[J")  # up to the picture's first line, and clear it
        sys.stderr.write(f"{time.monotonic() - self._started:6.1f} s  {text}\n")
        if self._draws:
            columns = min(PREVIEW_COLUMNS, shutil.get_terminal_size().columns - 1)
            picture = self._canvas.preview(columns)
            sys.stderr.write("\n".join(picture) + "\n")
            self._drawn_lines = len(picture)
        sys.stderr.flush()


class Rendering:
    """One run: what was asked for, what has been done, by whom and for how much."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        columns, rows = options.tiles
        self.tiles = cut(options.width, options.height, columns, rows)
        self.canvas = Canvas(options.width, options.height)
        self.screen = Screen(self.canvas, options.preview)
        self.done: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        self.agreements: dict[str, dict[str, Any]] = {}
        self.stderr: dict[str, str] = {}  # of the last command, by agreement: with --stream it comes apart from the failure
        self.attempts = dict.fromkeys(range(len(self.tiles)), 0)
        self.error: str | None = None
        self.started = time.monotonic()

    @property
    def complete(self) -> bool:
        return len(self.done) == len(self.tiles)

    async def run(self, payload: Payload) -> None:
        """Render every tile on the market; returns when invoices are settled, complete or not."""
        options = self.options
        async with Golem(
            budget=options.budget,
            subnet_tag=options.subnet,
            payment_driver=options.driver,
            payment_network=options.network,
            event_consumer=self.on_event,
            stream_output=options.stream,
        ) as golem:
            golem.add_event_consumer(log_event_repr)
            self.screen.say(f"{len(self.tiles)} tiles to render; looking for providers in subnet {golem.subnet_tag}")
            with tempfile.TemporaryDirectory(prefix="render-") as folder:
                async for task in golem.execute_tasks(
                    lambda ctx, tasks: self.work(ctx, tasks, Path(folder)),
                    [Task(data=tile) for tile in self.tiles],
                    payload=payload,
                    max_workers=options.max_workers,
                    timeout=timedelta(seconds=options.timeout),
                ):
                    self.show(task.data, task.result)
            self.screen.say("waiting for invoices")
        if not self.complete and not self.error:
            self.error = f"{len(self.tiles) - len(self.done)} tiles are missing after {options.timeout} s"

    async def work(
        self, ctx: WorkContext, tasks: AsyncIterator[Task[Tile, dict[str, Any]]], folder: Path
    ) -> AsyncIterator[Script]:
        """What one provider does: the scene is sent with the first tile; an error ends the worker, not the job."""
        scene_sent = False
        async for task in tasks:
            tile = task.data
            self.attempts[tile.index] += 1
            local = folder / f"{tile.index}-{self.attempts[tile.index]}.ppm"
            script = ctx.new_script(timeout=timedelta(seconds=self.options.tile_timeout))
            if not scene_sent:
                script.upload_file(str(self.options.scene), SCENE_AT_PROVIDER)
            script.run("/bin/render" if self.options.image_tag else "render", *self.arguments(tile))
            script.download_file(TILE_AT_PROVIDER, str(local))
            started = time.monotonic()
            try:
                yield script
                self.canvas.paste(tile, local.read_bytes())
            except Exception as failure:  # whatever it is, yapapi decides: the tile goes to another worker
                self.note_failure(tile, ctx, failure)
                raise
            finally:
                local.unlink(missing_ok=True)
            scene_sent = True
            task.accept_result(
                asdict(tile)
                | {
                    "provider_id": ctx.provider_id,
                    "provider_name": ctx.provider_name,
                    "agreement_id": ctx._agreement.id,
                    "activity_id": ctx.id,
                    "seconds": round(time.monotonic() - started, 3),
                    "attempts": self.attempts[tile.index],
                }
            )

    def arguments(self, tile: Tile) -> list[str]:
        """The command line of the renderer for one tile."""
        options = self.options
        numbers = (tile.x, tile.y, tile.w, tile.h, options.width, options.height, options.samples, options.seed)
        return [SCENE_AT_PROVIDER, TILE_AT_PROVIDER, *map(str, numbers)]

    def note_failure(self, tile: Tile, ctx: WorkContext, failure: Exception) -> None:
        text = f"{type(failure).__name__}: {failure}"
        if isinstance(failure, CommandExecutionError):  # whose text has the whole command line
            stderr = failure.stderr or self.stderr.get(ctx._agreement.id, "")
            text = ": ".join(filter(None, [failure.message, stderr.strip()]))
        self.failures.append({"tile": tile.index, "provider_name": ctx.provider_name, "error": text})
        self.screen.say(f"tile {tile.index} failed at {ctx.provider_name}: {text}")
        if self.attempts[tile.index] >= MAX_ATTEMPTS and not self.error:
            self.error = f"tile {tile.index} failed {MAX_ATTEMPTS} times"
            self.options.cancel()

    def show(self, tile: Tile, result: dict[str, Any]) -> None:
        self.done.append(result)
        self.canvas.save(self.options.out)
        self.screen.say(
            f"tile {len(self.done)}/{len(self.tiles)} at {tile.x},{tile.y} by {result['provider_name']}"
            f" in {result['seconds']:.1f} s"
        )

    def on_event(self, event: events.Event) -> None:
        """Keep the books: yapapi's own events say who was hired, what was invoiced and what was accepted."""
        if isinstance(event, events.AgreementConfirmed):
            name = event.provider_info.name
            self.agreements[event.agr_id] = {
                "agreement_id": event.agr_id,
                "provider_id": event.provider_id,
                "provider_name": name,
                "invoice_id": None,
                "amount": None,
                "accepted": False,
            }
            self.screen.say(f"agreement with {name} ({event.provider_id})")
        elif isinstance(event, events.InvoiceReceived) and event.agr_id in self.agreements:
            self.agreements[event.agr_id] |= {"invoice_id": event.invoice.invoice_id, "amount": event.amount}
        elif isinstance(event, events.InvoiceAccepted) and event.agr_id in self.agreements:
            self.agreements[event.agr_id]["accepted"] = True
            self.screen.say(f"invoice of {event.provider_info.name} accepted: {event.amount} GLM")
        elif isinstance(event, events.CommandStarted):
            self.stderr.pop(event.agr_id, None)
        elif isinstance(event, events.CommandStdErr):
            self.stderr[event.agr_id] = (self.stderr.get(event.agr_id, "") + event.output)[-MAX_STDERR:]
        elif isinstance(event, events.NoProposalsConfirmed):
            self.screen.say("no provider has answered yet")
        elif isinstance(event, (events.SubscriptionFailed, events.PaymentFailed, events.ActivityCreateFailed)):
            self.screen.say(f"{type(event).__name__}: {event.exception or getattr(event, 'reason', '')}")

    def summary(self) -> dict[str, Any]:
        """The run as JSON-ready data; amounts are decimal strings, in GLM."""
        for agreement in self.agreements.values():
            mine = [tile for tile in self.done if tile["agreement_id"] == agreement["agreement_id"]]
            agreement |= {"tiles": len(mine), "seconds": round(sum(tile["seconds"] for tile in mine), 3)}
        amounts = (Decimal(agreement["amount"]) for agreement in self.agreements.values() if agreement["accepted"])
        options = self.options
        return {
            "ok": self.complete,
            "error": self.error,
            "image": str(options.out),
            "scene": str(options.scene),
            "width": options.width,
            "height": options.height,
            "samples": options.samples,
            "seconds": round(time.monotonic() - self.started, 3),
            "tiles": sorted(self.done, key=lambda tile: tile["index"]),
            "agreements": list(self.agreements.values()),
            "failures": self.failures,
            "total": f"{sum(amounts, Decimal(0)):f}",
        }


@contextlib.asynccontextmanager
async def published(options: argparse.Namespace) -> AsyncIterator[Payload]:
    """What providers shall run: the module, published for as long as the context lasts unless its URL is given, or an image."""
    if options.image_tag:
        yield await vm.repo(image_tag=options.image_tag, repository_url=options.registry)
    elif options.image_url:
        yield WasmPayload(package=f"hash:sha3:{options.digest}:{options.image_url}")
    else:
        async with gftp.provider() as storage:
            source = await storage.upload_file(options.module)
            yield WasmPayload(package=f"hash:sha3:{options.digest}:{source.download_url}")
            await storage.release_source(source)


def tile_grid(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"[1-9]\d?x[1-9]\d?", text):
        raise argparse.ArgumentTypeError("columns x rows wanted, such as 6x4")
    columns, rows = text.split("x")
    return int(columns), int(rows)


def bounded(low: int, high: int) -> Any:
    """An argparse type: an integer from low to high."""

    def integer(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"an integer from {low} to {high} wanted")
        return int(text)

    return integer


def amount(text: str) -> Decimal:
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise argparse.ArgumentTypeError("an amount wanted, such as 1.5") from None
    if not (value.is_finite() and value > 0):
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Render an image on a Golem market, tile by tile.")
    add = parser.add_argument
    add("--scene", type=Path, default=HERE / "scenes" / "room.txt", help="default: the room")
    add("--out", type=Path, default=Path("render.png"), help="the PNG to write (default: %(default)s)")
    add("--width", type=bounded(1, 16384), default=480)
    add("--height", type=bounded(1, 16384), default=320)
    add("--samples", type=bounded(1, 65536), default=81, help="a pixel, best a square (default: %(default)s)")
    add("--seed", type=bounded(0, 2**31 - 1), default=1, help="of the random numbers; same seed, same image")
    add("--tiles", type=tile_grid, default=(6, 4), metavar="COLUMNSxROWS", help="default: 6x4")
    add("--subnet", default=None, help="default: YAGNA_SUBNET, else public")
    add("--driver", default="erc20", help="payment driver (default: %(default)s)")
    add("--network", default="holesky", help="payment network (default: %(default)s)")
    add("--budget", type=amount, default=Decimal(1), help="GLM at most (default: %(default)s)")
    add("--max-workers", type=bounded(1, 100), default=2, help="providers at a time (default: %(default)s)")
    add("--timeout", type=bounded(1, 86400), default=600, help="seconds for all tiles (default: %(default)s)")
    add("--tile-timeout", type=bounded(1, 86400), default=300, help="seconds for one tile (default: %(default)s)")
    add("--image-url", default=None, help="where providers find render.wasm; without it gftp publishes the file")
    add("--image-tag", default=None, metavar="NAME", help="a Docker image in the registry, run instead of the module")
    node = os.environ.get("YAGNA_API_URL") or "http://127.0.0.1:7465"
    add("--registry", default=node, metavar="URL", help="where to ask for --image-tag (default: the node, %(default)s)")
    add("--module", type=Path, default=HERE / "render.wasm", help=argparse.SUPPRESS)
    add("--stream", action="store_true", help="take results by event stream instead of polling")
    add("--preview", choices=("auto", "always", "never"), default="auto", help="draw the image in the terminal")
    add("--summary", type=Path, default=None, metavar="FILE", help="write a JSON summary; - for stdout")
    add("--log", type=Path, default=None, metavar="FILE", help="yapapi's log (default: beside the image)")
    options = parser.parse_args(arguments)
    for path in (options.scene, options.module):
        if not path.is_file():
            parser.error(f"no such file: {path}")
    if options.image_url is None and shutil.which("gftp") is None:
        parser.error("no gftp on PATH: it belongs to the node; or give --image-url")
    columns, rows = options.tiles
    if columns > options.width or rows > options.height:
        parser.error("more tiles than pixels")
    options.digest = hashlib.sha3_224(options.module.read_bytes()).hexdigest()
    options.log = options.log or options.out.with_suffix(".log")
    return options


def log_to(path: Path) -> None:
    """yapapi's log into a file and nowhere else."""
    handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("[%(asctime)s %(levelname)s %(name)s] %(message)s"))
    logger = logging.getLogger("yapapi")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logging.getLogger("asyncio").addHandler(handler)


def report(rendering: Rendering) -> None:
    """The last lines on the screen, and the JSON summary where it was asked for."""
    summary = rendering.summary()
    for agreement in summary["agreements"]:
        cost = f"{agreement['amount']} GLM" if agreement["accepted"] else "no invoice accepted"
        print(
            f"  {agreement['provider_name']}: {agreement['tiles']} tiles, {agreement['seconds']:.1f} s, {cost}",
            file=sys.stderr,
        )
    outcome = f"{summary['image']} in {summary['seconds']:.1f} s for {summary['total']} GLM"
    print(outcome if summary["ok"] else f"incomplete: {summary['error']}", file=sys.stderr)
    target = rendering.options.summary
    if target is not None:
        text = json.dumps(summary, indent=2) + "\n"
        if str(target) == "-":
            sys.stdout.write(text)
        else:
            target.write_text(text, encoding="utf-8")


async def main(options: argparse.Namespace) -> int:
    loop, this_task = asyncio.get_running_loop(), asyncio.current_task()
    assert this_task is not None
    options.cancel = this_task.cancel

    def interrupted(number: signal.Signals) -> None:
        loop.remove_signal_handler(number)  # the next one takes its usual effect
        rendering.error = rendering.error or f"interrupted ({number.name})"
        rendering.screen.say("stopping: agreements end, invoices are waited for; once more to stop at once")
        this_task.cancel()

    rendering = Rendering(options)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted, number)
    status = 130
    try:
        async with published(options) as payload:
            await rendering.run(payload)
        status = 0 if rendering.complete else 1
    except asyncio.CancelledError:
        if not (rendering.error or "").startswith("interrupted"):
            status = 1
    except Exception as error:  # the node is not there, refuses the key, ...: say it, the rest is in the log
        logging.getLogger("yapapi").exception("the run failed")
        rendering.error = f"{type(error).__name__}: {error} (see {options.log})"
        status = 1
    report(rendering)
    return status


if __name__ == "__main__":
    chosen = parse_arguments()
    log_to(chosen.log)
    sys.exit(asyncio.run(main(chosen)))
