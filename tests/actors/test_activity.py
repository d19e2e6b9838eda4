"""The activity machine, both roles, and with the exe-unit's machine in between, in any order of delivery."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest
from worlds.playbook import START, Nodes, Playbook, playbook

from actors.activity.machine import Activity
from actors.activity.moves import GIVE_UP_S, INACTIVITY_S, KEEP_AGREEMENT_S, KEEP_S, REPORT_S, UNRESPONSIVE_S
from actors.activity.provider import MAX_HELD, MAX_HELD_PER_NODE
from actors.activity.requestor import MAX_UNFINISHED
from actors.activity.rows import batch_key, result_key
from actors.exeunit import ExeUnit
from protocol.activity import (
    LEAST_OUTPUT_BYTES,
    MAX_OUTPUT_BYTES,
    Accepted,
    ActivityEvent,
    ActivityKnown,
    ActivityRequested,
    CommandResult,
    CreateActivity,
    DestroyActivity,
    DestroyRequested,
    Exec,
    StateChanged,
    StateReported,
    UsageChanged,
    UsageReported,
    cut_output,
    fit_output,
)
from protocol.codec import encode
from protocol.exeunit import CommandFinished, Execute, RunBatch, ShutDown, UnitStarted
from protocol.negotiation import AgreementApproved, AgreementEnded
from protocol.states import ActivityEnd
from protocol.types import Refused, Undelivered, Violation

R, P, X = "0x" + "1" * 40, "0x" + "2" * 40, "0x" + "3" * 40
AGREEMENT, ACTIVITY, BATCH = "a" * 64, "c" * 32, "b" * 32
UNIT = f"{P}/exeunit:{ACTIVITY}"
SCRIPT = '[{"deploy":{}},{"start":{}}]'


def approved(role: str, requestor: str = R) -> AgreementApproved:
    offer = json.dumps({"golem.runtime.name": "wasmtime"})
    return AgreementApproved(AGREEMENT, role, requestor, P, "{}", offer, START, f"session-{role}")


def requestor() -> Playbook:
    play = playbook(Activity(R), R)
    play.tell(approved("Requestor"), f"{R}/negotiation")
    return play


def provider() -> Playbook:
    play = playbook(Activity(P), P)
    play.tell(approved("Provider"), f"{P}/negotiation")
    return play


def created(play: Playbook) -> Playbook:
    assert play.ask(CreateActivity(ACTIVITY, AGREEMENT, 5.0)) == Accepted(ACTIVITY)
    return play


def running(play: Playbook) -> Playbook:
    """A requestor's activity that is initialized and has one batch under way."""
    created(play).tell(StateChanged(ACTIVITY, "Initialized", at=play.now), P)
    assert play.ask(Exec(BATCH, ACTIVITY, SCRIPT)) == Accepted(BATCH)
    return play


def state(play: Playbook) -> tuple[str, str | None, str | None]:
    row = play.rows[f"activity/{ACTIVITY}"]
    return row.state, row.pending, row.reason


def result(index: int, ok: bool = True, **changes: Any) -> CommandResult:
    fields = {"stdout": None, "stderr": None, "message": None, "at": START, "is_last": False} | changes
    return CommandResult(ACTIVITY, BATCH, index, ok, **fields)


# -- the requestor's side
def test_create_asks_the_provider_and_tells_the_ledger() -> None:
    play = created(requestor())
    assert play.sent(f"{P}/activity") == [ActivityRequested(ACTIVITY, AGREEMENT, 5.0)]
    assert play.sent("ledger") == [ActivityKnown(ACTIVITY, AGREEMENT, play.now)]
    assert state(play) == ("New", None, None)
    play.sends.clear()
    created(play)
    assert play.sends == []


@pytest.mark.parametrize(("role", "ended", "code"), [("Provider", False, "forbidden"), ("Requestor", True, "bad_request")])
def test_create_refusals(role: str, ended: bool, code: str) -> None:
    node = R if role == "Requestor" else P
    play = playbook(Activity(node), node)
    assert play.ask(CreateActivity(ACTIVITY, AGREEMENT, 5.0)).code == "bad_request"
    play.tell(approved(role))
    if ended:
        play.tell(AgreementEnded(AGREEMENT, "Provider", ""))
    assert play.ask(CreateActivity(ACTIVITY, AGREEMENT, 5.0)).code == code
    assert play.sends == []


def test_states_come_from_the_provider_alone() -> None:
    play = created(requestor())
    for sender in (X, f"{P}/ledger", UNIT):
        with pytest.raises(Violation):
            play.tell(StateChanged(ACTIVITY, "Ready"), sender)
    with pytest.raises(Violation):
        play.tell(StateChanged(ACTIVITY, "Flying"), P)
    for usage in ([float("nan")], [-1.0], [1.0] * 65):
        with pytest.raises(Violation):
            play.tell(StateChanged(ACTIVITY, "Ready", usage=usage), P)
    play.tell(StateChanged(ACTIVITY, "Initialized", usage=[1.0], at=START, usage_at=START), P)
    assert state(play) == ("Initialized", None, None)
    assert play.rows[f"activity/{ACTIVITY}"].usage == [1.0]
    assert play.tell(StateChanged("d" * 32, "Ready"), P) == []


def test_results_are_stored_in_order_once_and_from_the_exe_unit_alone() -> None:
    play = running(requestor())
    assert play.sent(UNIT) == [RunBatch(ACTIVITY, BATCH, SCRIPT)]
    for sender in (P, X, f"{P}/exeunit:{'d' * 32}"):
        with pytest.raises(Violation):
            play.tell(result(0), sender)
    with pytest.raises(Violation):
        play.tell(result(1), UNIT)
    with pytest.raises(Violation):
        play.tell(result(0, stdout=[1]), UNIT)
    play.tell(result(0, stdout="out", stderr=b"\xff"), UNIT)
    play.tell(result(0, stdout="other"), UNIT)  # a repeat changes nothing
    row = play.rows[result_key(BATCH, 0)]
    assert (row.stdout, row.stderr, row.batch_finished) == ("out", b"\xff", False)
    play.tell(result(1), UNIT)
    assert play.rows[result_key(BATCH, 1)].batch_finished
    assert play.rows[batch_key(ACTIVITY, BATCH)].finished
    assert play.rows[f"activity/{ACTIVITY}"].unfinished == ()
    assert [event.index for event in play.feed(f"batch/{BATCH}")] == [0, 1]
    play.tell(result(2), UNIT)  # beyond the end of a finished batch: no more than noise
    assert len(play.feed(f"batch/{BATCH}")) == 2


def test_a_failure_finishes_a_batch_early() -> None:
    play = running(requestor())
    play.tell(result(0, ok=False, message="ExeScript command exited with code 2"), UNIT)
    assert play.rows[batch_key(ACTIVITY, BATCH)].finished
    assert play.rows[result_key(BATCH, 0)].batch_finished


def test_a_result_carries_the_state_and_an_older_report_does_not_undo_it() -> None:
    play = running(requestor())
    play.tell(result(1 - 1, at=START + 2, state="Deployed"), UNIT)
    assert state(play) == ("Deployed", None, None)
    play.tell(StateChanged(ACTIVITY, "Initialized", "Deployed", at=START + 1), P)
    assert state(play) == ("Deployed", None, None)
    play.tell(StateChanged(ACTIVITY, "Deployed", "Ready", at=START + 3), P)
    assert state(play) == ("Deployed", "Ready", None)
    play.tell(StateChanged(ACTIVITY, "Terminated", reason="over", at=START), P)
    assert state(play) == ("Terminated", None, "over")


def test_exec_refusals() -> None:
    play = requestor()
    assert play.ask(Exec(BATCH, ACTIVITY, SCRIPT)).code == "unknown"
    created(play)
    reply = play.ask(Exec(BATCH, ACTIVITY, '[{"fly":{}}]'))
    assert reply.code == "bad_request"
    assert reply.message.startswith("Bad request: command 0: unknown command 'fly'")
    for number in range(MAX_UNFINISHED):
        assert play.ask(Exec(f"{number:032x}", ACTIVITY, SCRIPT)) == Accepted(f"{number:032x}")
    assert play.ask(Exec(BATCH, ACTIVITY, SCRIPT)).code == "busy"
    play.tell(StateChanged(ACTIVITY, "Terminated"), P)
    assert play.ask(Exec(BATCH, ACTIVITY, SCRIPT)).code == "unreachable"
    other = playbook(Activity(P), P)
    other.tell(approved("Provider"), f"{P}/negotiation")
    other.tell(ActivityRequested(ACTIVITY, AGREEMENT, 5.0), R)
    assert other.ask(Exec(BATCH, ACTIVITY, SCRIPT)).code == "forbidden"
    assert other.ask(DestroyActivity(ACTIVITY)).code == "forbidden"


def test_the_end_of_an_activity_gives_every_batch_a_last_result() -> None:
    play = running(requestor())
    assert play.ask(Exec("d" * 32, ACTIVITY, SCRIPT)) == Accepted("d" * 32)
    play.tell(result(0), UNIT)
    play.tell(StateChanged(ACTIVITY, "Terminated", reason="Usage limit exceeded", error_message="memory"), P)
    for batch, index in ((BATCH, 1), ("d" * 32, 0)):
        row = play.rows[result_key(batch, index)]
        assert (row.ok, row.batch_finished) == (False, True)
        assert row.message == "activity terminated: Usage limit exceeded: memory"
        assert play.feed(f"batch/{batch}")[-1].finished
    assert play.rows[f"activity/{ACTIVITY}"].unfinished == ()
    play.tell(result(1), UNIT)  # too late
    assert not play.rows[result_key(BATCH, 1)].ok


def test_a_provider_that_cannot_be_reached_ends_the_activity() -> None:
    for lost in (ActivityRequested(ACTIVITY, AGREEMENT, 5.0), RunBatch(ACTIVITY, BATCH, SCRIPT), DestroyRequested(ACTIVITY)):
        play = running(requestor())
        play.sends.clear()
        play.tell(Undelivered(f"{P}/activity", encode(lost), "no route"), f"{R}/activity")
        row = play.rows[f"activity/{ACTIVITY}"]
        assert (row.state, row.reason, row.error_message) == ("Terminated", ActivityEnd.UNREACHABLE, "no route")
        assert play.rows[batch_key(ACTIVITY, BATCH)].finished
        told = [] if isinstance(lost, DestroyRequested) else [DestroyRequested(ACTIVITY)]
        assert play.sent(f"{P}/activity") == told


def test_a_silent_provider_ends_the_activity_in_the_end() -> None:
    play = created(requestor())
    play.at(20)
    assert play.sent(f"{P}/activity")[-1] == DestroyRequested(ACTIVITY)
    play.at(1000)
    assert state(play) == ("Terminated", None, "destroyed")
    play.at(2 * KEEP_S)
    assert play.feed(f"activity/{ACTIVITY}") == []
    assert play.timers == {}


def test_results_are_forgotten_after_a_day_and_the_activity_is_not() -> None:
    play = running(requestor())
    play.tell(result(0, ok=False), UNIT)
    play.at(KEEP_S - 1)
    assert result_key(BATCH, 0) in play.rows
    play.at(2)
    assert sorted(play.rows) == [f"activity/{ACTIVITY}", f"agreement/{AGREEMENT}"]
    assert play.feed(f"batch/{BATCH}") == []
    play.tell(result(1), UNIT)


# -- the provider's side
def test_a_request_becomes_an_event_once() -> None:
    play = provider()
    for _ in range(2):
        play.tell(ActivityRequested(ACTIVITY, AGREEMENT, 5.0), R)
    assert play.feed("activities") == [ActivityEvent(ACTIVITY, AGREEMENT, "CreateActivity", "session-Provider")]
    assert play.sent("ledger") == [ActivityKnown(ACTIVITY, AGREEMENT, play.now)]
    assert play.rows[f"agreement/{AGREEMENT}"].exe_unit == "wasmtime"


def test_only_the_requestor_of_the_agreement_may_create_and_destroy() -> None:
    play = provider()
    with pytest.raises(Violation):
        play.tell(ActivityRequested(ACTIVITY, AGREEMENT, 5.0), X)
    with pytest.raises(Violation):
        play.tell(ActivityRequested("../../etc", AGREEMENT, 5.0), R)
    play.tell(ActivityRequested(ACTIVITY, AGREEMENT, 5.0), R)
    for message in (ActivityRequested(ACTIVITY, AGREEMENT, 5.0), DestroyRequested(ACTIVITY)):
        with pytest.raises(Violation):
            play.tell(message, X)
    assert len(play.feed("activities")) == 1


def test_a_request_may_come_before_the_news_of_its_agreement() -> None:
    play = playbook(Activity(P), P)
    play.tell(ActivityRequested(ACTIVITY, AGREEMENT, 5.0), R)
    play.tell(ActivityRequested("d" * 32, AGREEMENT, 5.0), X)
    assert play.feed("activities") == []
    play.tell(approved("Provider"), f"{P}/negotiation")
    assert [event.activity_id for event in play.feed("activities")] == [ACTIVITY]
    assert not any(key.startswith("held/") for key in play.rows)


def test_a_request_without_agreement_is_turned_down_and_strangers_cannot_fill_the_disk() -> None:
    play = playbook(Activity(P), P)
    for number in range(200):
        play.tell(ActivityRequested(f"{number:032x}", AGREEMENT, 5.0), X)
    assert len(play.rows) == MAX_HELD_PER_NODE  # one stranger leaves room for others
    assert len(play.take_sent(f"{X}/activity")) == 200 - MAX_HELD_PER_NODE
    for number in range(200, 400):
        play.tell(ActivityRequested(f"{number:032x}", AGREEMENT, 5.0), f"0x{number:040x}")
    assert len(play.rows) == MAX_HELD
    play.at(11)
    assert play.rows == {}
    assert {(told.state, told.reason) for told in play.sent(f"{X}/activity")} == {("Terminated", "agreement not approved")}


def test_reports_go_on_to_the_requestor_and_come_from_the_unit_or_the_agent() -> None:
    play = provider()
    play.tell(ActivityRequested(ACTIVITY, AGREEMENT, 5.0), R)
    for sender in (f"{P}/exeunit:{'d' * 32}", f"{P}/market"):
        with pytest.raises(Violation):
            play.tell(StateReported(ACTIVITY, "Initialized"), sender)
    with pytest.raises(Violation):
        play.tell(StateReported(ACTIVITY, "Initialized"), f"{R}/exeunit:{ACTIVITY}")
    play.tell(StateReported(ACTIVITY, "Initialized", usage=[0.0], at=START), UNIT)
    play.tell(UsageReported(ACTIVITY, [2.0], START + 1), UNIT)
    assert list(play.timers) == [f"silence/{ACTIVITY}"]
    assert play.ask(StateReported(ACTIVITY, "Terminated", reason="execution aborted")) == Accepted(ACTIVITY)
    play.tell(StateReported(ACTIVITY, "Ready"), UNIT)  # over is over
    told = play.sent(f"{R}/activity")
    assert [getattr(one, "state", "usage") for one in told] == ["Initialized", "usage", "Terminated"]
    assert told[-1].usage == [2.0]
    assert play.ask(StateReported("d" * 32, "Ready")) == Refused("unknown", f"no such activity: {'d' * 32}")


def test_destroy_is_one_event_and_ends_even_if_nobody_confirms() -> None:
    play = provider()
    play.tell(ActivityRequested(ACTIVITY, AGREEMENT, 5.0), R)
    for _ in range(3):
        play.tell(DestroyRequested(ACTIVITY), R)
    assert [event.kind for event in play.feed("activities")] == ["CreateActivity", "DestroyActivity"]
    play.at(61)
    assert state(play) == ("Terminated", None, "destroyed")
    play.take_sent(f"{R}/activity")
    play.tell(DestroyRequested(ACTIVITY), R)
    assert [told.state for told in play.take_sent(f"{R}/activity")] == ["Terminated"]
    play.tell(DestroyRequested("d" * 32), R)
    assert [told.reason for told in play.take_sent(f"{R}/activity")] == ["no such activity"]


def test_a_unit_that_falls_silent_is_unresponsive_until_its_next_word_or_its_end() -> None:
    play = provider()
    play.tell(ActivityRequested(ACTIVITY, AGREEMENT, 5.0), R)
    play.tell(StateReported(ACTIVITY, "Ready", at=START), UNIT)
    for _ in range(5):  # it speaks every ten seconds
        play.at(10)
        play.tell(UsageReported(ACTIVITY, [1.0], play.now), UNIT)
    assert state(play)[0] == "Ready"
    play.at(UNRESPONSIVE_S)
    assert state(play)[0] == "Unresponsive"
    told = play.sent(f"{R}/activity")[-1]
    assert (told.state, told.error_message) == ("Unresponsive", "nothing was heard of the exe-unit for 30 s")
    play.tell(UsageReported(ACTIVITY, [2.0], play.now), UNIT)
    assert state(play)[0] == "Ready"
    told = play.sent(f"{R}/activity")[-1]
    assert (told.state, told.error_message, told.usage) == ("Ready", None, [2.0])
    play.at(INACTIVITY_S - 1)
    assert [event.kind for event in play.feed("activities")] == ["CreateActivity"]
    play.at(2)
    assert [event.kind for event in play.feed("activities")] == ["CreateActivity", "DestroyActivity"]
    play.ask(StateReported(ACTIVITY, "Terminated", reason="execution aborted"))
    assert state(play) == ("Terminated", None, "execution aborted")
    assert play.rows[f"activity/{ACTIVITY}"].error_message == "nothing was heard of the exe-unit for 30 s"
    assert not any(key.startswith("silence/") for key in play.timers)


def reported(play: Playbook, seconds: float) -> None:
    """Let time pass in which the provider's node passes on the exe-unit's reports."""
    for _ in range(int(seconds // 10)):
        play.at(10)
        play.tell(UsageChanged(ACTIVITY, [1.0], play.now), P)


def test_the_requestor_notices_that_nothing_is_heard_any_more() -> None:
    """`Unresponsive` after 30 s, gone after 60 s without the report that was due, ended after five minutes."""
    play = running(requestor())
    play.tell(StateChanged(ACTIVITY, "Ready", at=START), P)
    reported(play, 1200)
    assert state(play)[0] == "Ready"
    play.sends.clear()
    play.at(UNRESPONSIVE_S - 1)
    assert state(play)[0] == "Ready"
    play.at(1)
    row = play.rows[f"activity/{ACTIVITY}"]
    assert (row.state, row.error_message, row.is_gone) == ("Unresponsive", "nothing was heard of the exe-unit for 30 s", False)
    play.at(INACTIVITY_S + REPORT_S - UNRESPONSIVE_S)
    assert play.rows[f"activity/{ACTIVITY}"].is_gone
    assert play.ask(Exec("e" * 32, ACTIVITY, SCRIPT)).code == "unreachable"
    assert play.sends == []
    play.at(GIVE_UP_S - INACTIVITY_S - REPORT_S)
    row = play.rows[f"activity/{ACTIVITY}"]
    assert (row.state, row.reason, row.error_message) == (
        "Terminated", ActivityEnd.UNREACHABLE, "nothing was heard of the exe-unit for 300 s",
    )  # fmt: skip
    assert not row.is_gone
    last = play.rows[result_key(BATCH, 0)]
    assert not last.ok
    assert last.message == "activity terminated: provider unreachable: nothing was heard of the exe-unit for 300 s"
    assert play.sent(f"{P}/activity") == [DestroyRequested(ACTIVITY)]
    play.tell(UsageChanged(ACTIVITY, [1.0], play.now), P)  # it is back, and is told again: it bills nobody for nothing
    assert play.sent(f"{P}/activity") == [DestroyRequested(ACTIVITY)] * 2
    play.tell(StateChanged(ACTIVITY, "Terminated", at=play.now), P)
    assert len(play.sent(f"{P}/activity")) == 2
    assert not any(key.startswith("silence/") for key in play.timers)


@pytest.mark.parametrize("silence_s", [31.0, 71.0, 299.0])
@pytest.mark.parametrize("word", ["usage", "state", "result"])
def test_any_word_of_the_exe_unit_undoes_its_silence(silence_s: float, word: str) -> None:
    play = running(requestor())
    play.tell(StateChanged(ACTIVITY, "Deployed", at=play.now + 100.0), P)  # by its own clock, which is ahead
    play.at(silence_s)
    assert state(play)[0] == "Unresponsive"
    if word == "usage":
        play.tell(UsageChanged(ACTIVITY, [1.0], play.now), P)
    elif word == "state":
        play.tell(StateChanged(ACTIVITY, "Deployed", "Ready", at=START + 100.0), P)
    else:
        play.tell(result(0, state="Deployed"), UNIT)
    row = play.rows[f"activity/{ACTIVITY}"]
    assert (row.state, row.error_message, row.is_gone, row.silent_from) == ("Deployed", None, False, "")
    reported(play, 600)
    assert state(play)[0] == "Deployed"


@pytest.mark.parametrize("partition_s", [45, 60])
def test_a_partition_is_no_end(partition_s: int) -> None:
    """Whatever the moment at which it begins, and though the first report after it takes some seconds."""
    for begins_s in range(10):
        play = running(requestor())
        play.tell(StateChanged(ACTIVITY, "Ready", at=START), P)
        play.at(begins_s + partition_s - 0.5)
        assert state(play)[0] == "Unresponsive"
        assert not play.rows[f"activity/{ACTIVITY}"].is_gone
        play.tell(UsageChanged(ACTIVITY, [1.0], play.now), P)
        assert state(play)[0] == "Ready"


def test_who_says_that_an_exe_unit_is_silent_does_not_keep_it_alive() -> None:
    play = running(requestor())
    for _ in range(40):
        play.at(9)
        play.tell(StateChanged(ACTIVITY, "Unresponsive", error_message="wait", at=play.now), P)
    assert state(play) == ("Terminated", None, ActivityEnd.UNREACHABLE)


def test_an_agent_that_lets_go_of_an_activity_that_is_gone_does_not_wait() -> None:
    play = running(requestor())
    play.at(71)
    play.ask(DestroyActivity(ACTIVITY))
    assert state(play) == ("Terminated", None, ActivityEnd.UNREACHABLE)
    assert play.sent(f"{P}/activity")[-1] == DestroyRequested(ACTIVITY)
    play = running(requestor())
    play.ask(DestroyActivity(ACTIVITY))  # it is silent only then
    play.at(71)
    assert state(play) == ("Terminated", None, ActivityEnd.UNREACHABLE)


def test_an_agent_that_calls_its_own_activity_unresponsive_is_no_trap() -> None:
    play = provider()
    play.tell(ActivityRequested(ACTIVITY, AGREEMENT, 5.0), R)
    play.tell(StateReported(ACTIVITY, "Ready", at=START), UNIT)
    play.ask(StateReported(ACTIVITY, "Unresponsive", at=play.now))
    play.tell(UsageReported(ACTIVITY, [1.0], play.now), UNIT)
    assert state(play)[0] == "Unresponsive"
    play.tell(StateReported(ACTIVITY, "Ready", at=play.now), UNIT)
    assert state(play)[0] == "Ready"


def test_silence_says_nothing_when_the_node_itself_was_away() -> None:
    play = provider()
    play.tell(ActivityRequested(ACTIVITY, AGREEMENT, 5.0), R)
    play.tell(StateReported(ACTIVITY, "Ready", at=START), UNIT)
    play.now += 3600.0
    play.at(0)
    assert state(play)[0] == "Ready"
    play.at(UNRESPONSIVE_S + 1)
    assert state(play)[0] == "Unresponsive"


def test_what_ended_long_ago_is_forgotten_and_what_did_not_end_is_not() -> None:
    play = created(requestor())
    play.tell(StateChanged(ACTIVITY, "Ready", at=play.now), P)
    play.tell(AgreementEnded(AGREEMENT, "Requestor", ""), f"{R}/negotiation")
    assert play.timers[f"agreement/{AGREEMENT}"][0] == play.now + KEEP_AGREEMENT_S
    live = msgspec.structs.replace(play.rows[f"activity/{ACTIVITY}"])
    play.at(KEEP_AGREEMENT_S - 1)
    assert state(play)[0] == "Terminated"
    ended, play.rows[f"activity/{ACTIVITY}"] = play.rows[f"activity/{ACTIVITY}"], live
    play.at(2)
    assert sorted(play.rows) == [f"activity/{ACTIVITY}", f"agreement/{AGREEMENT}"]
    play.rows[f"activity/{ACTIVITY}"] = ended
    play.at(KEEP_S)
    assert play.rows == {}
    assert play.feeds.keys() <= {f"activity/{ACTIVITY}"}
    assert play.timers == {}


def test_a_unit_that_does_not_start_is_destroyed() -> None:
    play = provider()
    play.tell(ActivityRequested(ACTIVITY, AGREEMENT, 5.0), R)
    play.at(11)
    assert [event.kind for event in play.feed("activities")] == ["CreateActivity", "DestroyActivity"]


def test_the_end_of_the_agreement_ends_its_activities_on_both_sides() -> None:
    play = provider()
    play.tell(ActivityRequested(ACTIVITY, AGREEMENT, 5.0), R)
    play.tell(AgreementEnded(AGREEMENT, "Requestor", ""), f"{P}/negotiation")
    assert [event.kind for event in play.feed("activities")] == ["CreateActivity", "DestroyActivity"]
    play.tell(ActivityRequested("d" * 32, AGREEMENT, 5.0), R)
    assert play.sent(f"{R}/activity")[-1].reason == "agreement terminated"
    asking = created(requestor())
    asking.tell(AgreementEnded(AGREEMENT, "Provider", ""), f"{R}/negotiation")
    assert asking.sent(f"{P}/activity")[-1] == DestroyRequested(ACTIVITY)


# -- outputs
def test_outputs_are_cut_to_what_a_message_holds() -> None:
    big = "ä" * MAX_OUTPUT_BYTES
    out, err, text = fit_output(big, big.encode(), "done", MAX_OUTPUT_BYTES)
    assert isinstance(out, str)
    assert isinstance(err, bytes)
    assert MAX_OUTPUT_BYTES - 2 <= len(out.encode()) + len(err) <= MAX_OUTPUT_BYTES
    assert text == f"done (output cut to {MAX_OUTPUT_BYTES} bytes of {4 * MAX_OUTPUT_BYTES})"
    assert fit_output("a", None, None, 10) == ("a", None, None)
    assert fit_output("a" * 9, "b" * 9, None, 10)[:2] == ("aaaaa", "bbbbb")
    assert fit_output("a" * 2, "b" * 9, None, 10)[:2] == ("aa", "b" * 8)
    assert cut_output("aä", 2) == "a"
    assert cut_output("abcdefgh", 6, "!") == "abcgh!"
    assert cut_output(b"abcdefgh", 6, "!") == b"abcfgh"
    assert cut_output("abcdefgh", 6, "!" * 20) == "!" * 20, "what is left for the output is nothing, not less"


def test_a_batch_does_not_outgrow_the_journal() -> None:
    play = requestor()
    created(play).tell(StateChanged(ACTIVITY, "Ready", at=START), P)
    play.ask(Exec(BATCH, ACTIVITY, json.dumps([{"run": {"entry_point": "x"}}] * 40)))
    for index in range(40):
        play.tell(result(index, stdout=f"{index} begins" + "x" * (MAX_OUTPUT_BYTES - 20) + "ends\n"), UNIT)
    texts = [play.rows[result_key(BATCH, index)].stdout for index in range(40)]
    assert sum(map(len, texts)) <= (16 << 20) + 40 * LEAST_OUTPUT_BYTES
    assert texts[0].endswith("xends\n")
    for index, text in enumerate(texts[18:], 18):  # none is empty, and its last line says what there was
        assert text.startswith(f"{index} begins")
        assert "xends\n\n[cut by the requestor's node: the output had 98" in text
        assert "16 MiB" in text.splitlines()[-1]
    assert "output cut" in play.rows[result_key(BATCH, 39)].message


def test_after_much_output_a_little_is_kept_as_it_is() -> None:
    play = requestor()
    created(play).tell(StateChanged(ACTIVITY, "Ready", at=START), P)
    play.ask(Exec(BATCH, ACTIVITY, json.dumps([{"run": {"entry_point": "x"}}] * 40)))
    for index in range(20):
        play.tell(result(index, stdout=b"x" * MAX_OUTPUT_BYTES), UNIT)
    play.tell(result(20, stdout="the answer", stderr="e" * 200), UNIT)
    play.tell(result(21, stdout=b"\0" * 40_000, stderr=b"\1" * 40_000), UNIT)
    row = play.rows[result_key(BATCH, 20)]
    assert (row.stdout, row.stderr, row.message) == ("the answer", "e" * 200, None)
    row = play.rows[result_key(BATCH, 21)]
    assert (len(row.stdout), len(row.stderr)) == (LEAST_OUTPUT_BYTES // 2,) * 2


# -- all three machines
class Market:
    """Requestor, provider and exe-unit, with a runtime that counts what it was told to run."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.r, self.p = requestor(), provider()
        self.unit = playbook(ExeUnit(ACTIVITY, R, P), P)
        self.nodes = Nodes(self.r, self.p, self.unit)
        self.executed: list[tuple[str, int]] = []
        self.waiting: list[Execute] = []

    def step(self) -> bool:
        links = self.nodes.waiting()
        for send in self.nodes.unlinked:
            if isinstance(send.message, Execute):
                self.executed.append((send.message.batch_id, send.message.index))
                self.waiting.append(send.message)
        self.nodes.unlinked.clear()
        choices: list[Any] = [*links, *self.waiting]
        if not choices:
            return False
        choice = self.rng.choice(choices)
        if not isinstance(choice, Execute):
            self.nodes.deliver(choice)
            return True
        self.waiting.remove(choice)
        ok = choice.refusal is None and self.rng.random() < 0.9
        finished = CommandFinished(
            choice.batch_id, choice.index, ok, "out", None, choice.refusal, self.unit.now, [float(len(self.executed))]
        )
        self.unit.tell(finished, f"{P}/runtime")
        return True


@pytest.mark.parametrize("seed", range(30))
def test_any_order_of_delivery_gives_every_command_one_result_in_order(seed: int) -> None:
    m = Market(seed)
    m.unit.tell(UnitStarted("process"), f"{P}/edge")
    created(m.r)
    batches: list[tuple[str, int]] = []
    for number in range(400):
        if number < 60 and m.rng.random() < 0.2 and state(m.r)[0] != "Terminated":
            kinds = [{"deploy": {}}, {"start": {}}, {"run": {"entry_point": "x"}}, {"terminate": {}}]
            commands = [m.rng.choice(kinds) for _ in range(3)]
            batches.append((f"{number:032x}", len(commands)))
            m.r.ask(Exec(batches[-1][0], ACTIVITY, json.dumps(commands)))
        for play in (m.r, m.p, m.unit):
            play.at(0.001)
        if number == 350:
            m.unit.tell(ShutDown("destroyed", None, [99.0]), f"{P}/edge")
        m.step()
    while m.step():
        pass
    assert len(m.executed) == len(set(m.executed)), "a command ran twice"
    for batch_id, size in batches:
        row = m.r.rows[batch_key(ACTIVITY, batch_id)]
        results = [m.r.rows[result_key(batch_id, index)] for index in range(row.have)]
        assert row.finished
        assert 1 <= row.have <= size
        assert [one.batch_finished for one in results] == [False] * (row.have - 1) + [True]
        assert all(one.ok for one in results[:-1])
    assert state(m.r) == state(m.p) == ("Terminated", None, "destroyed")
    assert m.r.rows[f"activity/{ACTIVITY}"].usage == [99.0]
    assert m.r.violations == m.p.violations == m.unit.violations == []
