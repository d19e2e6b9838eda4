"""Port `rest`: what may not happen twice happens once, whatever answers get lost; and the exe-unit processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from worlds.patience import patience, within
from worlds.support import mock_trio_test, trio_test

from actors.kernel.machine import Meta, Send
from golem.exeunit.supervisor import HOLD, start_ticks
from golem.provider.client import MAX_ANSWER_BYTES, NodeApiError, NodeAway, NodeClient
from golem.provider.leftovers import Leftovers
from golem.provider.port import RestPort
from golem.provider.processes import Processes
from golem.provider.runtimes import ExeUnits
from golem.provider.units import find_unit, is_unit, unit_environment
from protocol.provider import (
    AcceptAgreement,
    ApprovalEnded,
    AskFunds,
    CloseActivity,
    FindUnit,
    FundsKnown,
    HoldUnit,
    InvoiceIssued,
    IssueNote,
    NoteIssued,
    NoteSent,
    SendNote,
    StopUnit,
    UnitExited,
    WriteInvoice,
)

META = Meta("agent/provider", 0.0, "trace")
NOTE = IssueNote("x1", 2, "0.5", [1.0, 2.0], None, "n1", 1_800_000_000.0, "run-1")
INVOICE = WriteInvoice("a1", ("x1",), "0.5", 1_800_000_100.0, 1_800_000_000.0, "run-1")


class Outbox:
    """Stands for the kernel: takes what a port posts."""

    def __init__(self) -> None:
        self.send, self.receive = trio.open_memory_channel[Any](100)

    async def post(self, sender: str, sends: Sequence[Send], trace: str | None = None) -> None:
        for one in sends:
            await self.send.send(one.message)


class Node:
    """The REST API as far as a test needs it. `fail` makes an answer get lost, after the request was done."""

    def __init__(self) -> None:
        self.documents: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.lose = 0
        self.state = "Pending"
        self.handlers: dict[str, Callable[[httpx.Request], httpx.Response]] = {}

    async def handle(self, request: httpx.Request) -> httpx.Response:
        name = f"{request.method} {request.url.path}"
        self.calls.append(name)
        if name in self.handlers:
            return self.handlers[name](request)
        if name.startswith("GET"):
            return httpx.Response(200, json=self.documents)
        body = json.loads(request.content)
        ids = {"debitNoteId": f"new-{len(self.calls)}", "invoiceId": f"new-{len(self.calls)}"}
        self.documents.append({**body, **ids, "status": "ISSUED", "previousDebitNoteId": "n1"})
        if self.lose:
            self.lose -= 1
            raise httpx.ReadTimeout("lost", request=request)
        return httpx.Response(201, json=self.documents[-1])

    def client(self) -> NodeClient:
        return NodeClient(lambda: "http://node", "key", httpx.MockTransport(self.handle))


async def outcome_of(node: Node, message: Any, instance: str = "run-1") -> Any:
    """Give a message to a port in front of `node`; return what it tells the machine."""
    outbox = Outbox()
    port = RestPort(node.client(), outbox, instance)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(port.run)
        await port.handle(message, META)
        await port.handle(message, META)  # again while it is worked on
        found = await outbox.receive.receive()
        nursery.cancel_scope.cancel()
    return found


@pytest.mark.parametrize(("message", "kind"), [(NOTE, NoteIssued), (INVOICE, InvoiceIssued)])
@pytest.mark.parametrize("lose", [0, 1])
def test_a_document_is_issued_once_though_answers_get_lost(message: Any, kind: type, lose: int) -> None:
    @mock_trio_test
    async def body() -> None:
        node = Node()
        node.lose = lose
        found = await outcome_of(node, message)
        assert isinstance(found, kind)
        assert len(node.documents) == 1
        assert len([call for call in node.calls if call.startswith("GET")]) == lose, "it looks only where it may be there"

    body()


@pytest.mark.parametrize("message", [NOTE, INVOICE])
def test_a_document_of_an_earlier_run_is_found(message: Any) -> None:
    @mock_trio_test
    async def body() -> None:
        node = Node()
        first = await outcome_of(node, message)
        second = await outcome_of(node, message, instance="run-2")
        assert first == second
        assert len(node.documents) == 1

    body()


@mock_trio_test
async def test_another_note_of_the_same_activity_is_not_taken_for_this_one() -> None:
    node = Node()
    node.documents.append({"activityId": "x1", "previousDebitNoteId": None, "debitNoteId": "n1", "status": "RECEIVED"})
    await outcome_of(node, NOTE, instance="run-2")
    assert len(node.documents) == 2


@mock_trio_test
async def test_a_refused_note_is_reported() -> None:
    node = Node()
    node.handlers["POST /payment-api/v1/debitNotes"] = lambda request: httpx.Response(400, json={"message": "too low"})
    assert await outcome_of(node, NOTE) == NoteIssued("x1", 2, "", "400: too low")


@mock_trio_test
async def test_the_chain_is_asked_what_a_payer_has() -> None:
    node, payer = Node(), "0x" + "7" * 40
    path, asked = f"GET /payment-api/v1/payers/{payer}/funds", AskFunds(payer, "erc20-local-tglm")
    node.handlers[path] = lambda request: httpx.Response(200, json={"amount": "1.50"})
    assert await outcome_of(node, asked) == FundsKnown(payer, "erc20-local-tglm", "1.5")
    for answer in (httpx.Response(503, json={"message": "no endpoint"}), httpx.Response(200, json={"amount": "much"}),
                   httpx.Response(200, json=[])):  # fmt: skip
        node.handlers[path] = lambda request, answer=answer: answer
        assert await outcome_of(node, asked) == FundsKnown(payer, "erc20-local-tglm", None)


@mock_trio_test
async def test_a_note_is_sent_until_patience_ends() -> None:
    node = Node()
    node.handlers["POST /payment-api/v1/debitNotes/n2/send"] = lambda request: httpx.Response(504, json={"message": "timeout"})
    found = await outcome_of(node, SendNote("x1", 2, "n2", 5.0))  # long ago
    assert found == NoteSent("x1", 2, False, "504: timeout")


@pytest.mark.parametrize(("state", "approved"), [("Approved", True), ("Cancelled", False), ("Expired", False)])
def test_a_failed_approval_is_looked_into(state: str, approved: bool) -> None:
    @mock_trio_test
    async def body() -> None:
        node = Node()
        node.handlers["POST /market-api/v1/agreements/a1/approve"] = lambda request: httpx.Response(500, text="timeout")
        node.handlers["GET /market-api/v1/agreements/a1"] = lambda request: httpx.Response(200, json={"state": state})
        found = await outcome_of(node, AcceptAgreement("a1", "s", 10.0))
        assert found == ApprovalEnded("a1", approved, "500: timeout")

    body()


@mock_trio_test
async def test_an_approval_that_hangs_is_rejected() -> None:
    node = Node()

    def reject(request: httpx.Request) -> httpx.Response:
        node.state = "Rejected"
        return httpx.Response(200)

    path = "/market-api/v1/agreements/a1"
    node.handlers[f"POST {path}/approve"] = lambda request: httpx.Response(500, text="timeout")
    node.handlers[f"GET {path}"] = lambda request: httpx.Response(200, json={"state": node.state})
    node.handlers[f"POST {path}/reject"] = reject
    assert (await outcome_of(node, AcceptAgreement("a1", "s", 10.0))).approved is False
    assert node.state == "Rejected"


@pytest.mark.parametrize("usage", [None, "x", [1, -1], [float("inf")], {}])
def test_nonsense_usage_counts_as_none(usage: Any) -> None:
    @mock_trio_test
    async def body() -> None:
        node = Node()
        path = "/activity-api/v1/activity/x1"
        text = json.dumps({"currentUsage": usage, "timestamp": 1})
        node.handlers[f"PUT {path}/state"] = lambda request: httpx.Response(200, text="null")
        node.handlers[f"GET {path}/usage"] = lambda request: httpx.Response(200, text=text)
        found = await outcome_of(node, CloseActivity("x1", "finished", ""))
        assert found.usage is None

    body()


@mock_trio_test
async def test_answers_are_bounded_and_typed() -> None:
    node = Node()
    node.handlers["GET /big"] = lambda request: httpx.Response(200, content=b" " * (MAX_ANSWER_BYTES + 1))
    node.handlers["GET /text"] = lambda request: httpx.Response(200, content=b"hello")
    node.handlers["GET /nothing"] = lambda request: httpx.Response(204)
    client = node.client()
    assert await client.call("GET", "/nothing") is None
    for path in ("/big", "/text"):
        with pytest.raises(NodeApiError):
            await client.call("GET", path)


@mock_trio_test
async def test_the_node_is_looked_for_again_when_it_is_away() -> None:
    urls = iter(["http://old", "http://new"])

    async def answer(request: httpx.Request) -> httpx.Response:
        if request.url.host == "old":
            raise httpx.ConnectError("refused", request=request)
        return httpx.Response(200, json=1)

    client = NodeClient(lambda: next(urls), "secret-key", httpx.MockTransport(answer))
    with pytest.raises(NodeAway) as failure:
        await client.call("GET", "/me")
    assert "secret-key" not in str(failure.value)
    assert await client.call("GET", "/me") == 1


@mock_trio_test
async def test_the_node_is_looked_for_again_when_another_one_answers() -> None:
    urls = iter(["http://other", "http://ours"])

    async def answer(request: httpx.Request) -> httpx.Response:
        refused = request.url.host == "other"
        return httpx.Response(401, json={"message": "Invalid application key"}) if refused else httpx.Response(200, json=1)

    client = NodeClient(lambda: next(urls), "secret-key", httpx.MockTransport(answer))
    with pytest.raises(NodeApiError, match="401"):
        await client.call("GET", "/me")
    assert await client.call("GET", "/me") == 1


# -- processes
ACTIVITY = "ab" * 16
SLEEPER = """
import signal, time
if {stubborn}: signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(60)
"""


def exe_unit_like(stubborn: bool) -> subprocess.Popen[bytes]:
    """A process whose command line is that of an exe-unit, and that sleeps."""
    code = SLEEPER.format(stubborn=stubborn)
    line = [sys.executable, "-c", code, "-m", "golem.exeunit", "--activity", ACTIVITY]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_process_of_an_earlier_run_is_found_watched_and_ended(tmp_path: Path, stubborn: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr("golem.provider.processes.TERMINATION_S", 0.3)
    process = exe_unit_like(stubborn)
    ticks = start_ticks(process.pid)

    @trio_test
    async def body() -> None:
        outbox = Outbox()
        port = Processes(outbox, tmp_path, lambda: tmp_path / "bus.sock", ExeUnits, nothing_left(tmp_path))  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            await nursery.start(port.run)
            assert not await port.handle(FindUnit(ACTIVITY, process.pid, ticks), META)
            await port.handle(StopUnit(ACTIVITY, process.pid, ticks + 1), META)  # another process of the same id
            assert is_unit(process.pid, ACTIVITY)
            await port.handle(StopUnit(ACTIVITY, process.pid, ticks), META)
            with within(10):
                assert await outbox.receive.receive() == UnitExited(ACTIVITY, None)
            nursery.cancel_scope.cancel()

    try:
        assert find_unit(ACTIVITY) == process.pid
        body()
        assert process.wait(patience(5)) == -(signal.SIGKILL if stubborn else signal.SIGTERM)
    finally:
        process.kill()
        process.wait()


IMPOSTOR = """
import ctypes, subprocess, sys
if {unshare} and ctypes.CDLL(None).unshare(0x20000000) != 0: sys.exit(1)  # CLONE_NEWPID
user = {{"user": 65534}} if not {unshare} else {{}}
child = subprocess.Popen(["golem.exeunit", sys.stdin.readline().strip()], executable="/bin/cat", stdin=subprocess.PIPE, **user)
print("up", flush=True)
sys.stdin.read()
child.kill()
"""


@pytest.mark.root
@pytest.mark.parametrize("unshare", [True, False])
def test_a_guest_that_calls_itself_an_exe_unit_is_none(unshare: bool) -> None:
    command = [sys.executable, "-c", IMPOSTOR.format(unshare=unshare)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{ACTIVITY}\n".encode())
        process.stdin.flush()
        assert process.stdout.readline() == b"up\n"
        found = find_unit(ACTIVITY)
        process.stdin.close()
        assert found == 0


@trio_test
async def test_an_exe_unit_is_held_back_by_a_mark_in_its_folder(tmp_path: Path) -> None:
    port = Processes(Outbox(), tmp_path, Path, ExeUnits, nothing_left(tmp_path))  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(port.run)
        mark = tmp_path / "exe-unit/work/a1" / ("cd" * 16) / HOLD
        for held in (True, True, False, False):
            await port.handle(HoldUnit("cd" * 16, "a1", held), META)
            assert mark.exists() is held
        nursery.cancel_scope.cancel()


@trio_test
async def test_a_process_that_is_gone_or_another_one_counts_as_lost() -> None:
    port = Processes(Outbox(), Path("/nonexistent"), Path, ExeUnits, nothing_left(Path("/nonexistent")))  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(port.run)
        for pid in (0, os.getpid(), 2**22 - 1):
            (lost,) = await port.handle(FindUnit("cd" * 16, pid, start_ticks(os.getpid())), META)
            assert lost.message == UnitExited("cd" * 16, None)
        nursery.cancel_scope.cancel()


def test_exe_units_get_no_secrets(monkeypatch: Any) -> None:
    for name in ("YAGNA_APPKEY", "GOLEM_PASSWORD", "YAGNA_AUTOCONF_ID_SECRET", "GOLEM_PASSWORD_FILE", "SOME_TOKEN"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("GOLEM_LOG", "debug")
    env = unit_environment()
    assert not {"YAGNA_APPKEY", "GOLEM_PASSWORD", "YAGNA_AUTOCONF_ID_SECRET", "GOLEM_PASSWORD_FILE", "SOME_TOKEN"} & env.keys()
    assert env["GOLEM_LOG"] == "debug"


def nothing_left(data_dir: Path) -> Leftovers:
    return Leftovers(data_dir, ExeUnits, lambda: ())


@trio_test
async def test_work_of_a_finished_activity_is_removed(tmp_path: Path) -> None:
    work = tmp_path / "exe-unit" / "work"
    for activity in ("x1", "x2"):
        deep = work / "a1" / activity
        deep.mkdir(parents=True)
        for _ in range(100):
            deep /= "d" * 200
            os.mkdir(deep) if len(str(deep)) < 4000 else None
    logs = tmp_path / "exe-unit" / "logs"
    logs.mkdir()
    for number in range(105):
        (logs / f"{number}.log").touch()
    (work / "a1" / "agreement.json").write_text("{}")
    leftovers = nothing_left(tmp_path)
    await leftovers.clean("x1", None, 0)
    assert sorted(path.name for path in (work / "a1").iterdir()) == ["agreement.json", "x2"]
    await leftovers.clean("x2", None, None)
    assert not list(work.iterdir())
    assert len(list(logs.iterdir())) == 100


@trio_test
async def test_what_an_engine_that_was_away_keeps_is_removed_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [("the Docker Engine does not answer", ""), ("the Docker Engine does not answer", ""), (None, "removed container x")]

    async def exe_unit(*_: Any) -> tuple[str | None, str]:
        await trio.lowlevel.checkpoint()
        return asked.pop(0)

    monkeypatch.setattr("golem.provider.leftovers.exe_unit", exe_unit)
    monkeypatch.setattr("golem.provider.leftovers.FIRST_PAUSE_S", 0.01)
    (tmp_path / "exe-unit" / "work" / "a1" / "x1").mkdir(parents=True)
    with within(5):
        await Leftovers(tmp_path, ExeUnits, lambda: ("vm",)).clean("x1", "vm", 1)
    assert asked == []


@trio_test
async def test_what_an_earlier_run_left_is_removed_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    process = exe_unit_like(False)  # the exe-unit of ACTIVITY lives on
    try:
        work = tmp_path / "exe-unit" / "work"
        for name in (ACTIVITY, "0" * 32, "1" * 32):
            (work / "agreement" / name / "deployment-1").mkdir(parents=True)
        (work / "other" / ("2" * 32)).mkdir(parents=True)
        (work / "other" / "agreement.json").write_text("{}")
        leftovers = Leftovers(tmp_path, ExeUnits, lambda: ("wasmtime",))
        stale = leftovers.find_stale(["1" * 32])
        (work / "agreement" / ("3" * 32)).mkdir()  # of an activity that starts meanwhile
        with caplog.at_level("INFO"):
            await leftovers.remove_stale(stale)
        assert {path.name for path in work.glob("*/*")} == {ACTIVITY, "1" * 32, "3" * 32}
        assert not (work / "other").exists()
        assert [record.message for record in caplog.records if "22222222" in record.message]
    finally:
        process.kill()
        process.wait()
