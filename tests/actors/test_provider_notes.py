"""The provider agent's machine: which debit notes it makes, and which it does not."""

from __future__ import annotations

from test_provider import noted

from protocol.provider import IssueNote, NoteDue, ReadUsage, StopUnit, UsageRead


def test_no_note_falls_due_while_the_exe_unit_is_being_stopped() -> None:
    agent = noted()
    agent.event("activities", "DestroyActivity", "x1", "a1")
    assert len(agent.processes(StopUnit)) == 1
    agent.play.at(120)
    assert not agent.rest(ReadUsage)
    agent.exited(usage=[2.0, 240.0])
    last = agent.issue()
    assert (last.number, last.usage) == (2, [2.0, 240.0])


def test_usage_that_is_read_late_makes_no_note_beside_the_last_one() -> None:
    agent = noted()
    agent.play.at(120)
    assert len(agent.rest(ReadUsage)) == 1
    agent.event("activities", "DestroyActivity", "x1", "a1")
    agent.tell(UsageRead("x1", [2.0, 240.0]))  # the exe-unit has told its last usage, its process is still there
    assert not agent.rest(IssueNote)
    agent.exited(usage=[2.0, 240.0])
    assert agent.issue().number == 2


def test_a_note_is_made_each_interval_even_if_nothing_was_used() -> None:
    agent = noted()
    before = agent.play.rows["activity/x1"].amount
    agent.play.at(120)
    assert len(agent.rest(ReadUsage)) == 1
    agent.tell(UsageRead("x1", [1.0, 120.0]))
    again = agent.issue()
    assert (again.number, again.amount) == (2, before)
    assert isinstance(agent.play.timers["note/x1"][1], NoteDue)
