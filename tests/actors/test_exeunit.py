"""The exe-unit's machine and the script language."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from worlds.playbook import START, Playbook, playbook

from actors.exeunit import MAX_QUEUED, ExeUnit
from protocol.activity import CommandResult, StateReported, UsageReported
from protocol.codec import encode
from protocol.exeunit import (
    MAX_COMMANDS,
    MAX_SCRIPT_BYTES,
    CancelCommand,
    CommandFinished,
    CopyFile,
    Deploy,
    Execute,
    Run,
    RunBatch,
    ScriptError,
    ShutDown,
    Stream,
    UnitStarted,
    UsageMeasured,
    parse_command,
    parse_script,
)
from protocol.types import Undelivered, Violation

R, P = "0x" + "1" * 40, "0x" + "2" * 40
ACTIVITY = "c" * 32
UNIT = f"{P}/exeunit:{ACTIVITY}"
DEPLOY, START_UP, RUN = {"deploy": {}}, {"start": {}}, {"run": {"entry_point": "x"}}
TRANSFER, TERMINATE, SIGN = {"transfer": {"from": "a", "to": "b"}}, {"terminate": {}}, {"sign": {}}


def unit(started: bool = True) -> Playbook:
    play = playbook(ExeUnit(ACTIVITY, R, P), P)
    if started:
        play.tell(UnitStarted("process"))
        play.sends.clear()
    return play


def send(play: Playbook, batch: str, *commands: dict[str, Any], sender: str = f"{R}/activity") -> None:
    play.tell(RunBatch(ACTIVITY, batch, json.dumps(commands)), sender)


def finish(play: Playbook, batch: str, index: int, ok: bool = True, message: str | None = None) -> None:
    play.tell(CommandFinished(batch, index, ok, "out", b"err", message, START, [1.0]), f"{P}/runtime")


def executes(play: Playbook) -> list[Execute]:
    return play.take_sent("runtime")


def results(play: Playbook) -> list[CommandResult]:
    return play.take_sent(f"{R}/activity")


def reports(play: Playbook) -> list[tuple[str, str | None]]:
    return [(one.state, one.pending) for one in play.take_sent("activity") if isinstance(one, StateReported)]


def perform(play: Playbook, *commands: dict[str, Any]) -> None:
    """Run a batch of commands that all succeed."""
    send(play, "p", *commands)
    for index in range(len(commands)):
        finish(play, "p", index)
    play.sends.clear()


def test_it_reports_initialized_and_then_waits() -> None:
    play = unit(started=False)
    play.tell(UnitStarted("process"))
    assert reports(play) == [("Initialized", None)]
    play.tell(UnitStarted("process"))
    assert play.sends == []


def test_a_batch_runs_one_command_at_a_time_and_states_are_reported() -> None:
    play = unit()
    send(play, "b", DEPLOY, START_UP, RUN)
    assert executes(play) == [Execute("b", 0, '{"deploy": {}}')]
    assert reports(play) == [("Initialized", "Deployed")]
    finish(play, "b", 0)
    assert executes(play) == [Execute("b", 1, '{"start": {}}')]
    assert reports(play) == [("Deployed", None), ("Deployed", "Ready")]
    finish(play, "b", 1)
    assert reports(play) == [("Ready", None)]
    finish(play, "b", 1)  # a repeat
    finish(play, "b", 5)
    finish(play, "other", 2)
    assert [one.index for one in executes(play)] == [2]
    finish(play, "b", 2)
    assert play.take_sent("activity") == [UsageReported(ACTIVITY, [1.0], START)]
    told = results(play)
    assert [(one.index, one.ok, one.is_last, one.state) for one in told] == [
        (0, True, False, "Deployed"),
        (1, True, False, "Ready"),
        (2, True, True, "Ready"),
    ]
    assert (told[0].stdout, told[0].stderr) == ("out", b"err")
    assert list(play.rows) == ["unit"]


def test_a_batch_stops_at_the_first_failure_and_the_next_one_begins() -> None:
    play = unit()
    send(play, "b1", DEPLOY, START_UP)
    send(play, "b2", DEPLOY)
    assert [one.batch_id for one in executes(play)] == ["b1"]
    finish(play, "b1", 0, ok=False, message="no such image")
    [failure] = results(play)
    assert (failure.ok, failure.is_last, failure.message, failure.state) == (False, True, "no such image", "Initialized")
    assert reports(play) == [("Initialized", "Deployed"), ("Initialized", None), ("Initialized", "Deployed")]
    assert executes(play) == [Execute("b2", 0, '{"deploy": {}}')]


@pytest.mark.parametrize(
    ("before", "allowed", "expected"),
    [
        ((), {"deploy", "terminate"}, "initialized - deploy()"),
        ((DEPLOY,), {"start", "terminate"}, "deployed - start()"),
        ((DEPLOY, START_UP), {"run", "transfer", "terminate"}, "ready - run(), transfer() or terminate()"),
        ((DEPLOY, START_UP, TERMINATE), {"deploy", "terminate"}, "initialized - deploy()"),
    ],
)
def test_order_rules(before: tuple[dict[str, Any], ...], allowed: set[str], expected: str) -> None:
    for command in (DEPLOY, START_UP, RUN, TRANSFER, TERMINATE):
        play = unit()
        if before:
            perform(play, *before)
        send(play, "b", command, RUN)
        [told] = executes(play)
        if set(command) <= allowed:
            assert told.refusal is None
        else:
            text = f"Local service error: State error: Activity is {expected} command is expected now"
            assert told.refusal == text
            state = play.rows["unit"].state
            finish(play, "b", 0, ok=False, message=text)
            assert [(one.ok, one.message) for one in results(play)] == [(False, text)]
            assert play.rows["unit"].state == state
            assert executes(play) == []


def test_sign_is_refused() -> None:
    play = unit()
    send(play, "b", SIGN)
    assert "enclaves" in (executes(play)[0].refusal or "")


def test_terminate_stops_what_runs_and_what_waits() -> None:
    play = unit()
    perform(play, DEPLOY, START_UP)
    send(play, "b1", RUN, RUN)
    send(play, "b2", RUN)
    play.sends.clear()
    send(play, "t", TERMINATE)
    assert play.take_sent("runtime") == [CancelCommand("b1", 0)]
    [failed] = results(play)
    assert (failed.batch_id, failed.ok, failed.message) == ("b2", False, "stopped by a terminate command")
    finish(play, "b1", 0, ok=False, message="stopped by a terminate command")
    assert [one.batch_id for one in executes(play)] == ["t"]
    finish(play, "t", 0)
    assert reports(play) == [("Initialized", None)]
    assert list(play.rows) == ["unit"]


def test_only_the_requestor_sends_batches_for_this_activity_once() -> None:
    play = unit()
    for sender in (f"{P}/activity", f"{R}/ledger", f"{'0x' + '3' * 40}/activity"):
        with pytest.raises(Violation):
            send(play, "b", DEPLOY, sender=sender)
    with pytest.raises(Violation):
        play.tell(RunBatch("d" * 32, "b", "[]"), f"{R}/activity")
    for _ in range(2):
        send(play, "b", DEPLOY)
    assert len(executes(play)) == 1
    play.tell(RunBatch(ACTIVITY, "bad", '[{"fly":{}}]'), f"{R}/activity")
    assert "unknown command" in (results(play)[0].message or "")
    for number in range(MAX_QUEUED + 1):
        send(play, f"q{number}", DEPLOY)
    assert [one.batch_id for one in results(play)] == [f"q{MAX_QUEUED}"]


def test_a_batch_that_is_faster_than_the_start() -> None:
    play = unit(started=False)
    send(play, "b", DEPLOY)
    assert executes(play) == []
    play.tell(UnitStarted("process"))
    assert len(executes(play)) == 1


def test_the_next_process_ends_the_activity_and_runs_nothing() -> None:
    play = unit()
    send(play, "b", DEPLOY)
    play.sends.clear()
    play.tell(UnitStarted("second"))
    [report] = play.sent("activity")
    assert (report.state, report.reason) == ("Terminated", "execution interrupted")
    assert executes(play) == []
    finish(play, "b", 0)
    send(play, "late", DEPLOY)
    assert [one.batch_id for one in results(play)] == ["late"]
    play.tell(UnitStarted("third"))
    assert len(play.sent("activity")) == 1


def test_a_command_that_the_runtime_did_not_take_ends_the_activity_with_words() -> None:
    play = unit()
    send(play, "b", DEPLOY)
    (execute,) = executes(play)
    play.sends.clear()
    play.tell(Undelivered("runtime", encode(StateReported(ACTIVITY, "Initialized")), "late"), UNIT)
    play.tell(Undelivered("runtime", encode(msgspec.structs.replace(execute, index=7)), "another one"), UNIT)
    assert play.sends == []
    play.tell(Undelivered("runtime", encode(execute), "it crashed there"), UNIT)
    (over,) = play.take_sent("activity")
    assert (over.state, over.reason, over.usage) == ("Terminated", "execution interrupted", None)
    assert over.error_message == "the runtime did not take a command: it crashed there"


def test_the_last_report_has_reason_and_usage_and_is_the_last() -> None:
    play = unit()
    send(play, "b", DEPLOY)
    play.sends.clear()
    for reason in ("Usage limit exceeded", "destroyed"):
        play.tell(ShutDown(reason, "storage", [7.0]))
    [report] = play.sent("activity")
    assert (report.state, report.reason, report.error_message, report.usage) == (
        "Terminated", "Usage limit exceeded", "storage", [7.0],
    )  # fmt: skip


def test_usage_is_told_on_while_the_activity_lives() -> None:
    play = unit()
    play.tell(UsageMeasured([3.0]))
    assert play.take_sent("activity") == [UsageReported(ACTIVITY, [3.0], START)]
    play.tell(ShutDown("destroyed", None, [4.0]))
    play.take_sent("activity")
    play.tell(UsageMeasured([5.0]))
    assert play.sends == []


# -- scripts
def test_a_script_becomes_typed_commands() -> None:
    text = json.dumps(
        [
            {"deploy": {"net": [{"id": "n", "ip": "10.0.0.0", "nodeIp": "10.0.0.2", "nodes": {"10.0.0.1": R}}], "x": 1}},
            {"run": {"entry_point": "/bin/sh", "args": ["-c"], "capture": {"stdout": {"stream": {"limit": 5}}}}},
            {"transfer": {"from": "a", "to": "b", "format": "zip", "depth": 3}},
            {"terminate": None},
        ]
    )
    deploy, run, transfer, terminate = parse_script(text)
    assert isinstance(deploy.args, Deploy)
    assert deploy.args.net is not None
    assert deploy.args.net[0].node_ip == "10.0.0.2"
    assert isinstance(run.args, Run)
    assert run.args.capture is not None
    assert run.args.capture.stdout is not None
    assert run.args.capture.stdout.stream == Stream(5)
    assert isinstance(transfer.args, CopyFile)
    assert transfer.args.source == "a"
    assert terminate.kind == "terminate"
    assert parse_command(run.text) == run


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "not a JSON array"),
        ("{}", "not a JSON array"),
        ("[]", "1 to 1000 commands"),
        ("[1]", "command 0: Expected `object`"),
        ("[{}]", "one key"),
        ('[{"deploy":{},"start":{}}]', "one key"),
        ('[{"deploy":{}},{"fly":{}}]', "command 1: unknown command 'fly'"),
        ('[{"run":{}}]', "entry_point"),
        ('[{"run":{"entry_point":1}}]', "Expected `str`"),
        ('[{"run":{"entry_point":"a","args":"x"}}]', "Expected `array"),
        ('[{"run":{"entry_point":"a","capture":{"stdout":{}}}}]', "one of atEnd and stream"),
        ('[{"run":{"entry_point":"a","capture":{"stdout":{"atEnd":{"head":1,"tail":1}}}}}]', "capture takes one"),
        ('[{"run":{"entry_point":"a","capture":{"stdout":{"stream":{"limit":-1}}}}}]', "no negative"),
        ('[{"run":{"entry_point":"a","capture":{"stdout":{"stream":{"format":"xml"}}}}}]', "xml"),
        ('[{"transfer":{"from":"a"}}]', "`to`"),
        ("[" * 100_000, "not a JSON array"),
        (json.dumps([DEPLOY] * (MAX_COMMANDS + 1)), "1 to 1000"),
        (" " * (MAX_SCRIPT_BYTES + 1), "over the limit"),
        ('[{"deploy":{}}]\ud800', "not valid Unicode"),
    ],
)
def test_a_script_that_cannot_be_run_is_explained(text: str, error: str) -> None:
    with pytest.raises(ScriptError, match=error):
        parse_script(text)
