"""The exe-unit's process from outside: real processes and kernels, a real bus and runtime, two nodes in one test."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from worlds.patience import patience, within
from worlds.support import tell, trio_test
from worlds.wire import A, B, Node, two_nodes

from actors.activity.machine import Activity
from actors.activity.rows import ActivityRow, BatchRow, ResultRow, batch_key
from actors.exeunit import ExeUnit
from actors.kernel.journal import Journal
from actors.kernel.machine import LinkDown, Meta, Send
from actors.kernel.system import System
from golem.exeunit.process import Unit, UnitSettings
from golem.exeunit.runtime import (
    GIB,
    Deployment,
    DeployOptions,
    ExitStatus,
    ImageFormat,
    Interaction,
    OutputSink,
    RuntimeFault,
    Terminal,
    Usage,
)
from golem.exeunit.supervisor import HOLD
from golem.exeunit.terms import read_terms
from golem.exeunit.transfer.spool import TransferPolicy
from golem.files.on_disk import FileSink, FileSource
from golem.files.server import FileServer
from golem.net.types import RemoteError
from protocol.activity import Accepted, ActivityKnown, CreateActivity, DestroyActivity, Exec, StateReported
from protocol.codec import Envelope, encode, encode_batch
from protocol.exeunit import RunBatch, UnitStarted
from protocol.negotiation import AgreementApproved

pytestmark = pytest.mark.integration

HELLO = Path(__file__).resolve().parents[2] / "examples" / "hello" / "hello.wasm"
AGREEMENT, ACTIVITY = "a" * 40, "1" * 32
PROVIDER, REQUESTOR = A, B


class Ledger:
    name = "ledger"
    local = ActivityKnown
    peer = type(None)

    async def handle(self, message: Any, meta: Meta) -> Sequence[Send]:
        return []


class World:
    """A provider's and a requestor's node with kernel and activity actors, and the exe-unit's process."""

    def __init__(self, tmp_path: Path, provider: Node, requestor: Node, nursery: trio.Nursery) -> None:
        self.tmp_path, self.nursery, self.node = tmp_path, nursery, requestor
        self.provider = self._system(PROVIDER, provider)
        self.requestor = self._system(REQUESTOR, requestor)
        self.calls = requestor.router.calls
        self.files = FileServer(requestor.router, b"secret")
        self.provider_files = FileServer(provider.router, b"secret")
        self.package_url = ""

    def _system(self, node_id: str, node: Node) -> System:
        journal = Journal(str(self.tmp_path / f"{node_id[2]}.db"), lambda: secrets.token_hex(8))
        system = System(node_id, journal, node.router, clock=time.time, new_trace=lambda: secrets.token_hex(4))
        system.add(Activity(node_id))
        system.add_port(Ledger())
        node.router.attach(system.deliver)
        return system

    async def begin(self, package_file: Path = HELLO) -> None:
        for system, role in ((self.provider, "Provider"), (self.requestor, "Requestor")):
            await self.nursery.start(system.run)
            approved = AgreementApproved(AGREEMENT, role, REQUESTOR, PROVIDER, "{}", "{}", time.time(), None)
            await tell(system, "negotiation", "activity", approved)
        self.files.offer("package", FileSource(package_file), "test")
        digest = hashlib.sha3_224(package_file.read_bytes()).hexdigest()
        package = f"hash:sha3:{digest}:gftp://{REQUESTOR}/package"
        agreement = {
            "agreementId": AGREEMENT,
            "demand": {"requestorId": REQUESTOR, "properties": {"golem": {"srv": {"comp": {"task_package": package}}}}},
            "offer": {
                "providerId": PROVIDER,
                "properties": {
                    "golem.inf.mem.gib": 0.5,
                    "golem.inf.storage.gib": 0.1,
                    "golem.com.usage.vector": ["golem.usage.cpu_sec", "golem.usage.duration_sec"],
                },
            },
        }
        (self.tmp_path / "agreement.json").write_text(json.dumps(agreement))
        assert await self.requestor.ask("activity", CreateActivity(ACTIVITY, AGREEMENT, 30.0)) == Accepted(ACTIVITY)
        await self.until(lambda: self.provider.feeds.read("activities"))

    async def start(self, runtime: str = "wasmtime", docker_host: str = "") -> trio.Process:
        command = [sys.executable, "-m", "golem.exeunit", "--runtime", runtime, "--activity", ACTIVITY]
        for name in ("agreement.json", "work", "cache"):
            command += [f"--{name.partition('.')[0]}", str(self.tmp_path / name)]
        command += ["--bus", str(self.tmp_path / "a.sock")]
        return await trio.lowlevel.open_process(command, env={**os.environ, "DOCKER_HOST": docker_host})

    async def until(self, condition: Callable[[], Any], timeout_s: float = 30) -> None:
        with within(timeout_s):
            while not condition():
                await trio.sleep(0.01)

    def row(self, system: System) -> ActivityRow:
        return system.rows("activity")[f"activity/{ACTIVITY}"]

    async def state(self, state: str) -> None:
        await self.until(lambda: self.row(self.requestor).state == state)

    async def exec(self, *commands: dict[str, Any], wait: bool = True) -> str:
        batch_id = secrets.token_hex(16)
        script = json.dumps(commands)
        assert await self.requestor.ask("activity", Exec(batch_id, ACTIVITY, script)) == Accepted(batch_id)
        if wait:
            await self.until(lambda: self.batch(batch_id).finished, 60)
        return batch_id

    def batch(self, batch_id: str) -> BatchRow:
        return self.requestor.rows("activity")[batch_key(ACTIVITY, batch_id)]

    def results(self, batch_id: str) -> list[ResultRow]:
        return [row for _, row in self.requestor.rows("activity").prefix(f"result/{batch_id}/")]

    async def live(self, *question: Any) -> Any:
        payload = msgspec.msgpack.encode(question)
        return msgspec.msgpack.decode(await self.calls.call(PROVIDER, f"exeunit:{ACTIVITY}", payload))


@asynccontextmanager
async def world(tmp_path: Path) -> AsyncIterator[tuple[World, trio.Process]]:
    async with two_nodes(tmp_path) as (a, b, nursery):
        made = World(tmp_path, a, b, nursery)
        await made.begin()
        process = await made.start()
        try:
            yield made, process
        finally:
            if process.returncode is None:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()
        nursery.cancel_scope.cancel()


STREAM = {"stdout": {"stream": {}}, "stderr": {"stream": {}}}


def hello(*args: str) -> dict[str, Any]:
    return {"run": {"entry_point": "hello", "args": list(args), "capture": STREAM}}


@trio_test
async def test_while_it_is_held_back_no_new_command_starts(tmp_path: Path) -> None:
    """What runs goes on, and what ends work may begin."""
    async with world(tmp_path) as (w, _):
        await w.exec({"deploy": {}}, {"start": {}})
        mark = tmp_path / "work" / HOLD
        mark.touch()
        batch = await w.exec(hello("first"), wait=False)
        watched: list[Any] = []
        with within(30):
            while "held back" not in str(watched):
                watched = await w.live("watch", 0, 1.0)
        assert not w.results(batch)
        mark.unlink()
        await w.until(lambda: w.batch(batch).finished)
        assert [row.ok for row in w.results(batch)] == [True]
        mark.touch()
        batch = await w.exec(hello("never"), wait=False)
        await w.exec({"terminate": {}})
        assert [row.ok for row in w.results(batch)] == [False]


@trio_test
async def test_a_whole_activity(tmp_path: Path) -> None:
    began = time.monotonic()
    async with world(tmp_path) as (w, process):
        await w.state("Initialized")
        print(f"Initialized after {time.monotonic() - began:.2f} s")
        batch = await w.exec({"deploy": {}}, {"start": {}})
        assert [(row.ok, row.message) for row in w.results(batch)] == [(True, None), (True, None)]
        await w.state("Ready")
        (tmp_path / "in").write_bytes(b"letter")
        w.files.offer("in", FileSource(tmp_path / "in"), "test")
        w.files.offer("slot", FileSink(tmp_path / "out"), "test")
        batch = await w.exec(
            {"transfer": {"from": f"gftp://{REQUESTOR}/in", "to": "container:/in"}},
            hello("World", "/in", "/out"),
            {"transfer": {"from": "container:/out", "to": f"gftp://{REQUESTOR}/slot"}},
        )
        results = w.results(batch)
        assert [(row.ok, row.message) for row in results] == [(True, None)] * 3
        assert results[1].stdout == "Hello World\n"
        assert (tmp_path / "out").read_bytes() == b"Hello World\nletter"
        events = await w.live("follow", batch, -1, 0)
        assert [event[0] for event in events] == list(range(len(events)))
        kinds = [(event[1], *json.loads(event[3])) for event in events]
        assert list(dict.fromkeys(kinds)) == [
            (0, "started"), (0, "finished"), (1, "started"), (1, "stdout"), (1, "finished"), (2, "started"), (2, "finished"),
        ]  # fmt: skip
        assert await w.live("follow", batch, events[-1][0], 0) == []
        values, at = await w.live("usage")
        assert len(values) == 2
        assert 0 < values[0] < values[1]
        assert abs(at - time.time()) < 5
        with pytest.raises(RemoteError, match="no such question"):
            await w.live("password")
        await w.requestor.ask("activity", DestroyActivity(ACTIVITY))
        await w.until(lambda: len(w.provider.feeds.read("activities")) == 2)
        process.send_signal(signal.SIGTERM)
        with within(5):
            assert await process.wait() == 0
        await w.state("Terminated")
        row = w.row(w.requestor)
        assert row.reason == "destroyed"
        assert row.usage is not None
        assert row.usage[1] >= values[1]
        assert w.results(batch) == results


@trio_test
async def test_failures_are_told_and_the_order_of_commands_is_kept(tmp_path: Path) -> None:
    async with world(tmp_path) as (w, _):
        batch = await w.exec({"run": {"entry_point": "hello"}}, {"deploy": {}})
        [row] = w.results(batch)
        assert row.message == ("Local service error: State error: Activity is initialized - deploy() command is expected now")
        await w.exec({"deploy": {}}, {"start": {}})
        batch = await w.exec(hello("a", "b"), hello("never"))
        [row] = w.results(batch)
        assert row.message == "ExeScript command exited with code 2"
        [row] = w.results(await w.exec({"transfer": {"from": "container:/none", "to": f"gftp://{REQUESTOR}/none"}}))
        assert not row.ok
        [row] = w.results(await w.exec({"transfer": {"from": f"gftp://{REQUESTOR}/none", "to": "container:/x"}}))
        assert row.message == "gftp InternalError: no such file is published here"
        await w.exec({"terminate": {}})
        await w.state("Initialized")
        assert [row.ok for row in w.results(await w.exec({"deploy": {}}, {"start": {}}, hello("again")))] == [True] * 3


@trio_test
async def test_a_killed_process_is_reported_by_the_next_one(tmp_path: Path) -> None:
    async with world(tmp_path) as (w, process):
        await w.exec({"deploy": {}}, {"start": {}})
        process.kill()
        await process.wait()
        batch = await w.exec(hello("late"), wait=False)
        second = await w.start()
        with within(20):
            assert await second.wait() == 1
        await w.state("Terminated")
        assert w.row(w.requestor).reason == "execution interrupted"
        [row] = w.results(batch)
        assert not row.ok
        assert "over" in (row.message or "") or "terminated" in (row.message or "")


@trio_test
async def test_the_agent_reports_a_unit_that_never_came(tmp_path: Path) -> None:
    async with world(tmp_path) as (w, process):
        await w.state("Initialized")
        process.kill()
        await process.wait()
        gone = StateReported(ACTIVITY, "Terminated", reason="execution aborted", error_message="exit code -9")
        assert await w.provider.ask("activity", gone) == Accepted(ACTIVITY)
        await w.state("Terminated")
        assert w.row(w.requestor).reason == "execution aborted"


class Stub:
    """A runtime whose commands do what their entry point says; for what no real program does on demand."""

    name, version, formats = "stub", "1", frozenset(ImageFormat)
    interactions: frozenset[Interaction] = frozenset()

    def __init__(self) -> None:
        self.now = Usage()
        self.dead = trio.Event()
        self.options: DeployOptions | None = None
        self.runs: list[str] = []
        self.stops = self.deploys = 0

    async def self_test(self) -> str | None:
        return None

    def offer_properties(self) -> dict[str, Any]:
        return {}

    async def deploy(self, image: Path, options: DeployOptions) -> Deployment:
        self.deploys += 1
        self.options = options
        return Deployment(())

    async def start(self, args: Sequence[str]) -> None:
        pass

    async def run(self, entry_point: str, args: Sequence[str], output: OutputSink, env: Any = None) -> ExitStatus:
        self.runs.append(entry_point)
        if entry_point == "hang":
            await output("stdout", b"hanging")
            await trio.sleep_forever()
        if entry_point == "crash":
            raise KeyError("a bug")
        if entry_point == "flood":
            await output("stdout", b"x" * (900 << 10))
        if entry_point in ("both", "noise"):
            for _ in range(10):
                await output("stdout", b"x" * 60_000 if entry_point == "both" else bytes(range(256)) * 320)
                await output("stderr", b"y" * 60_000 if entry_point == "both" else b"")
        if entry_point == "nap":
            await trio.sleep(0.05)
        if entry_point == "eat":
            self.now = Usage(cpu_sec=3.0, storage_gib=0.2)
        return ExitStatus(0)

    async def stop(self) -> None:
        self.stops += 1

    def usage(self) -> Usage:
        return self.now

    async def failure(self) -> str:
        await self.dead.wait()
        return "the container died (out of memory)"

    async def open_terminal(self, argv: Sequence[str], **options: Any) -> Terminal:
        raise RuntimeFault("no shell")

    async def connect(self, port: int) -> trio.abc.HalfCloseableStream:
        raise RuntimeFault("no network")

    async def sweep(self, work_root: Path) -> list[str]:
        return []


@asynccontextmanager
async def stub_world(tmp_path: Path) -> AsyncIterator[tuple[World, Stub, Unit, Node, list[int]]]:
    """A unit with a stub runtime, in this process; the list gets its exit status."""
    async with two_nodes(tmp_path) as (a, b, nursery):
        made, stub = World(tmp_path, a, b, nursery), Stub()
        await made.begin()
        (tmp_path / "work").mkdir()
        settings = UnitSettings(
            "stub", ACTIVITY, tmp_path / "a.sock", tmp_path / "agreement.json", tmp_path / "work", tmp_path / "cache",
            TransferPolicy(),
        )  # fmt: skip
        journal = Journal(str(tmp_path / "work" / "unit.db"), lambda: secrets.token_hex(8))
        unit = Unit(settings, read_terms(settings.agreement), stub, journal)
        ended: list[int] = []

        async def run() -> None:
            ended.append(await unit.run())

        nursery.start_soon(run)
        await made.exec({"deploy": {}}, {"start": {}})
        yield made, stub, unit, a, ended
        nursery.cancel_scope.cancel()


def run(entry_point: str) -> dict[str, Any]:
    return {"run": {"entry_point": entry_point, "capture": STREAM}}


@trio_test
async def test_terminate_stops_a_command_that_hangs(tmp_path: Path) -> None:
    async with stub_world(tmp_path) as (w, stub, _, _, _):
        first = await w.exec(run("hang"), wait=False)
        second = await w.exec(run("never"), wait=False)
        with within(5):
            events = []
            while len(events) < 2:  # live output comes while the command runs
                events += await w.live("follow", first, len(events) - 1, 5.0)
        assert json.loads(events[1][3]) == {"stdout": "hanging"}
        assert json.loads(await w.live("running")) == run("hang")
        [row] = w.results(await w.exec({"terminate": {}}))
        assert row.ok
        assert [row.message for row in w.results(first)] == ["stopped by a terminate command"]
        assert [row.message for row in w.results(second)] == ["stopped by a terminate command"]
        assert stub.runs == ["hang"]
        assert await w.live("running") is None
        await w.state("Initialized")


async def hand_out(journal: Journal, script: str) -> None:
    """Leave a journal as a process does that dies right after it has handed out a command."""

    class Nowhere:
        async def exchange(self, node: str, frame: bytes) -> bytes:
            raise LinkDown(node)

    system = System(PROVIDER, journal, Nowhere(), clock=time.time, new_trace=lambda: secrets.token_hex(4))
    system.add(ExeUnit(ACTIVITY, REQUESTOR, PROVIDER))
    name = f"exeunit:{ACTIVITY}"
    async with trio.open_nursery() as nursery:
        await nursery.start(system.run)
        await system.ask(name, UnitStarted("the process before"))
        batch = encode(RunBatch(ACTIVITY, "b" * 32, script))
        envelope = Envelope(f"{REQUESTOR}/activity", f"{PROVIDER}/{name}", "epoch", 1, 0, "t", batch)
        await system.deliver(encode_batch([envelope]), REQUESTOR)
        nursery.cancel_scope.cancel()
    assert any(recipient.endswith("/runtime") for _, recipient in journal.links())


@trio_test
async def test_a_command_that_another_process_was_given_is_not_run_again(tmp_path: Path) -> None:
    async with two_nodes(tmp_path) as (a, b, nursery):
        made, stub = World(tmp_path, a, b, nursery), Stub()
        await made.begin()
        (tmp_path / "work").mkdir()
        settings = UnitSettings(
            "stub", ACTIVITY, tmp_path / "a.sock", tmp_path / "agreement.json", tmp_path / "work", tmp_path / "cache",
            TransferPolicy(),
        )  # fmt: skip
        journal = Journal(str(tmp_path / "work" / "unit.db"), lambda: secrets.token_hex(8))
        await hand_out(journal, '[{"deploy":{}}]')
        journal = Journal(str(tmp_path / "work" / "unit.db"), lambda: secrets.token_hex(8))
        unit = Unit(settings, read_terms(settings.agreement), stub, journal)
        with within(20):
            assert await unit.run() == 1
        assert stub.deploys == 0
        nursery.cancel_scope.cancel()


@trio_test
async def test_a_limit_ends_the_activity_with_its_reason_and_final_usage(tmp_path: Path) -> None:
    async with stub_world(tmp_path) as (w, stub, _, _, ended):
        await w.exec(run("eat"))
        hanging = await w.exec(run("hang"), wait=False)
        await w.state("Terminated")
        row = w.row(w.requestor)
        assert (row.reason, row.error_message) == ("Usage limit exceeded", "storage: 0.200 GiB used of 0.1")
        assert row.usage is not None
        assert row.usage[0] == 3.0
        await w.until(lambda: w.batch(hanging).finished)
        assert "Usage limit exceeded" in (w.results(hanging)[-1].message or "")
        await w.until(lambda: ended)
        assert ended == [1]
        assert stub.stops == 1


@trio_test
async def test_a_runtime_that_dies_ends_the_activity_and_the_command_with_the_reason(tmp_path: Path) -> None:
    async with stub_world(tmp_path) as (w, stub, _, _, ended):
        assert stub.options is not None
        assert stub.options.activity_id == ACTIVITY
        hanging = await w.exec(run("hang"), wait=False)
        await w.until(lambda: stub.runs)
        began = time.monotonic()
        stub.dead.set()
        await w.state("Terminated")
        row = w.row(w.requestor)
        assert (row.reason, row.error_message) == ("Runtime lost", "the container died (out of memory)")
        await w.until(lambda: w.batch(hanging).finished)
        assert "Runtime lost: the container died (out of memory)" in (w.results(hanging)[-1].message or "")
        await w.until(lambda: ended)
        assert time.monotonic() - began < patience(10)
        assert (ended, stub.stops) == ([1], 1)


@trio_test
async def test_a_runtime_that_was_terminated_is_not_missed(tmp_path: Path) -> None:
    async with stub_world(tmp_path) as (w, stub, unit, _, ended):
        await w.exec({"terminate": {}})
        await w.state("Initialized")
        stub.dead.set()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not ended
        assert not unit._ending.is_set()


@trio_test
async def test_a_bug_of_a_runtime_fails_its_command_and_nothing_else(tmp_path: Path) -> None:
    async with stub_world(tmp_path) as (w, _, _, _, _):
        [row] = w.results(await w.exec(run("crash")))
        assert row.message == "internal error of the exe-unit: KeyError"
        assert [row.ok for row in w.results(await w.exec(run("fine")))] == [True]


@trio_test
async def test_a_deploy_into_a_network_is_refused_and_one_without_works(tmp_path: Path) -> None:
    async with stub_world(tmp_path) as (w, stub, _, _, _):
        deployed = stub.deploys
        network = {"id": "n", "ip": "192.168.0.0", "nodeIp": "192.168.0.2", "nodes": {}}
        [_, row] = w.results(await w.exec({"terminate": {}}, {"deploy": {"net": [network]}}))
        assert not row.ok
        assert "virtual networks are not there yet" in str(row.message)
        assert stub.deploys == deployed
        assert [row.ok for row in w.results(await w.exec({"deploy": {"net": []}}, {"start": {}}, run("fine")))] == [True] * 3


@pytest.mark.parametrize("entry_point", ["both", "noise"])
@trio_test
async def test_no_amount_of_output_ends_the_exe_unit(tmp_path: Path, entry_point: str) -> None:
    """More than a message takes, as it is encoded: it is cut, which its last line says, and the activity goes on."""
    async with stub_world(tmp_path) as (w, _, _, _, ended):
        everything = {"stdout": {"atEnd": {}}, "stderr": {"atEnd": {}}}
        [row] = w.results(await w.exec({"run": {"entry_point": entry_point, "capture": everything}}))
        assert row.ok
        size = 600_000 if entry_point == "both" else 819_200
        assert f"[cut by the provider: the output had {size} bytes" in str(row.stdout)[-200:]
        assert "cut to what a result takes" in str(row.message)
        assert [row.ok for row in w.results(await w.exec(run("fine")))] == [True]
        assert not ended


@trio_test
async def test_results_that_nobody_takes_hold_up_the_next_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("golem.exeunit.work.MAX_WAITING_BYTES", 4 << 20)
    flood = {"run": {"entry_point": "flood", "capture": {"stdout": {"atEnd": {}}}}}

    async def deaf(frame: bytes, sender: str) -> bytes:
        raise RemoteError("not now")

    async with stub_world(tmp_path) as (w, stub, unit, _, ended):
        batch = await w.exec(*[flood] * 12, wait=False)
        await w.until(lambda: stub.runs)
        w.node.router.attach(deaf)
        with within(20):
            while not any("are taken" in event.kind for event in await unit.live.watch(-1, 30.0)):
                await trio.sleep(0.01)
        assert unit.port._usage_with_journal().storage_gib > (4 << 20) / GIB
        await trio.sleep(0.5)
        assert 4 <= len(stub.runs) <= 7  # what was under way may have been taken
        w.node.router.attach(w.requestor.deliver)
        await w.until(lambda: w.batch(batch).finished, 60)
        assert (len(stub.runs), [row.ok for row in w.results(batch)], ended) == (12, [True] * 12, [])


@trio_test
async def test_a_journal_that_nobody_empties_ends_the_activity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals wait like results, and no command is held up by them."""
    monkeypatch.setattr("golem.exeunit.process.LEAST_JOURNAL_BYTES", 0)
    async with stub_world(tmp_path) as (w, _, unit, _, ended):
        unit.terms = replace(unit.terms, limits=replace(unit.terms.limits, storage_gib=1e-4))
        await w.until(lambda: unit._ending.is_set())
        assert unit._reason[0] == "Usage limit exceeded"
        assert "messages that the requestor does not take" in (unit._reason[1] or "")
        await w.until(lambda: ended)


@trio_test
async def test_commands_run_once_while_the_bus_comes_and_goes(tmp_path: Path) -> None:
    async with stub_world(tmp_path) as (w, stub, _, node, _):
        batches = [await w.exec(*[run("nap")] * 5, wait=False) for _ in range(4)]
        for _ in range(8):
            await trio.sleep(0.1)
            for peer in node.bus.peers():
                peer.connection.close()
        await w.until(lambda: all(w.batch(batch).finished for batch in batches))
        assert stub.runs == ["nap"] * 20
        assert [[row.ok for row in w.results(batch)] for batch in batches] == [[True] * 5] * 4


def test_bad_command_lines(tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "agreement.json").write_text("{}")
    common = [sys.executable, "-m", "golem.exeunit"]
    full = ["--activity", ACTIVITY, "--bus", "b", "--work", str(tmp_path / "w"), "--cache", str(tmp_path / "c")]
    for args, text in (
        ([], "missing"),
        (["--runtime", "abacus", *full, "--agreement", str(tmp_path / "agreement.json")], "agreement"),
        ([*full, "--agreement", str(tmp_path / "none")], "cannot read"),
        (["--runtime", "abacus", "test"], "unknown runtime"),
    ):
        done = subprocess.run([*common, *args], capture_output=True, text=True, env=os.environ.copy(), timeout=patience(30))
        assert done.returncode == 2
        assert text in done.stderr
        assert "Traceback" not in done.stderr
