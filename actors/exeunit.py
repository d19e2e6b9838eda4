"""What an exe-unit does with scripts: one command at a time, batches one after another, in the order the states allow.

The machine runs in the exe-unit's own process, on a kernel with its own journal. Neighbours: the requestor's
`actors/activity/machine.py` sends batches and gets results; the provider's gets states; port `runtime` (`golem/exeunit`) does
the work. A command is handed out once: when the process dies in the middle, the next one ends the activity instead.

    state        allowed                     leads to
    Initialized  deploy, terminate           Deployed
    Deployed     start, terminate            Ready
    Ready        run, transfer, terminate    Ready
    any          terminate                   Initialized
"""

from __future__ import annotations

from typing import Any

import msgspec

from actors.kernel.draft import Draft
from actors.kernel.grammar import EDGE, ITSELF, Looked, On, Table, TableMachine
from actors.kernel.machine import Meta, Rows
from protocol.activity import MAX_OUTPUT_BYTES, CommandResult, StateReported, UsageReported, fit_output
from protocol.codec import Decoder
from protocol.exeunit import (
    CancelCommand,
    CommandFinished,
    Execute,
    RunBatch,
    ScriptError,
    ShutDown,
    UnitStarted,
    UsageMeasured,
    exeunit_name,
    parse_command,
    parse_script,
)
from protocol.states import ActivityState
from protocol.types import Message, Undelivered, Violation, address

MAX_QUEUED = 64  # batches that wait
REPORT_DEADLINE_S = 24 * 3600.0
USAGE_DEADLINE_S = 60.0  # then there is a newer one
_TARGETS = {"deploy": ActivityState.DEPLOYED, "start": ActivityState.READY}
_ALLOWED = {
    ActivityState.INITIALIZED: ("deploy", "terminate"),
    ActivityState.DEPLOYED: ("start", "terminate"),
    ActivityState.READY: ("run", "transfer", "terminate"),
}
_EXPECTED = {
    ActivityState.INITIALIZED: "Activity is initialized - deploy() command is expected now",
    ActivityState.DEPLOYED: "Activity is deployed - start() command is expected now",
    ActivityState.READY: "Activity is ready - run(), transfer() or terminate() command is expected now",
}

_sent = Decoder[Any](Execute | CancelCommand | CommandResult | StateReported | UsageReported)  # what `Undelivered` may hold


class UnitRow(Message, frozen=True):
    """The unit itself: its state, the batch at work (`current`, its command number `index`) and those that wait."""

    instance: str = ""
    state: ActivityState = ActivityState.NEW
    current: str | None = None
    index: int = 0
    queue: tuple[str, ...] = ()


class ScriptRow(Message, frozen=True):
    """A batch that is not over: the JSON text of each command."""

    batch_id: str
    commands: tuple[str, ...]


class UnitDraft(Draft):
    """A step of an exe-unit: its activity, its own row, and the addresses of both sides."""

    def __init__(self, rows: Rows, meta: Meta, machine: ExeUnit) -> None:
        super().__init__(rows, meta, machine.node)
        self.activity_id, self.requestor, self.provider = machine.activity_id, machine.requestor, machine.provider

    @property
    def unit(self) -> UnitRow:
        return self.row(UnitRow, "unit") or UnitRow()

    def change(self, **values: Any) -> UnitRow:
        """Write the unit's row with some values changed."""
        unit = msgspec.structs.replace(self.unit, **values)
        self.put("unit", unit)
        return unit

    def script(self, batch_id: str) -> ScriptRow:
        found = self.row(ScriptRow, f"batch/{batch_id}")
        assert found is not None, batch_id
        return found

    def report(self, state: ActivityState, pending: ActivityState | None = None, usage: list[float] | None = None) -> None:
        """Tell the provider's node the state."""
        self.send(self.provider, StateReported(self.activity_id, state, pending, usage=usage, at=self.now), REPORT_DEADLINE_S)

    def fail(self, batch_id: str, text: str) -> None:
        """Tell the requestor that a batch did not run."""
        result = CommandResult(self.activity_id, batch_id, 0, False, None, None, text, self.now, is_last=True)
        self.send(self.requestor, result, REPORT_DEADLINE_S)


# -- the unit's own life
def _started(draft: UnitDraft, message: UnitStarted) -> None:
    unit = draft.unit
    if unit.instance == message.instance or unit.state == ActivityState.TERMINATED:
        return
    if unit.instance:  # the process before this one took the runtime with it
        text = "the exe-unit's process was restarted; its runtime is lost"
        _end(draft, "execution interrupted", text, None)
        return
    draft.change(instance=message.instance, state=ActivityState.INITIALIZED)
    draft.report(ActivityState.INITIALIZED)
    if unit.queue:  # a batch was faster than this message
        _next_batch(draft)


def _shut_down(draft: UnitDraft, message: ShutDown) -> None:
    if draft.unit.state != ActivityState.TERMINATED:
        _end(draft, message.reason, message.error_message, message.usage)


def _end(draft: UnitDraft, reason: str, error_message: str | None, usage: list[float] | None) -> None:
    draft.change(state=ActivityState.TERMINATED, current=None, queue=())
    report = StateReported(draft.activity_id, ActivityState.TERMINATED, None, reason, error_message, usage, draft.now)
    draft.send(draft.provider, report, REPORT_DEADLINE_S)


def _usage_measured(draft: UnitDraft, message: UsageMeasured) -> None:
    if draft.unit.state not in (ActivityState.NEW, ActivityState.TERMINATED):
        draft.send(draft.provider, UsageReported(draft.activity_id, message.usage, draft.now), USAGE_DEADLINE_S)


def _undelivered(draft: UnitDraft, message: Undelivered) -> None:
    """A command that the runtime did not take ends the activity: nobody knows what of it was done."""
    lost, unit = _sent(message.body), draft.unit
    if not isinstance(lost, Execute) or (unit.current, unit.index) != (lost.batch_id, lost.index):
        return  # the requestor or our node was away for a day: nobody is left to be told
    if unit.state != ActivityState.TERMINATED:
        _end(draft, "execution interrupted", f"the runtime did not take a command: {message.reason}", None)


# -- batches
def _run_batch(draft: UnitDraft, message: RunBatch) -> None:
    unit = draft.unit
    if draft.meta.sender != draft.requestor:
        raise Violation(f"{draft.meta.sender} is not the requestor of this activity")
    if message.activity_id != draft.activity_id:
        raise Violation("a batch for another activity")
    if draft.get(f"batch/{message.batch_id}") is not None or len(message.batch_id) > 64:
        return
    if unit.state == ActivityState.TERMINATED or len(unit.queue) >= MAX_QUEUED:
        why = "the activity is over" if unit.state == ActivityState.TERMINATED else f"{MAX_QUEUED} batches wait already"
        draft.fail(message.batch_id, f"batch refused: {why}")
        return
    try:
        commands = parse_script(message.script)
    except ScriptError as error:
        draft.fail(message.batch_id, f"Bad request: {error}")
        return
    draft.put(f"batch/{message.batch_id}", ScriptRow(message.batch_id, tuple(command.text for command in commands)))
    if commands[0].kind == "terminate":
        for waiting in unit.queue:
            draft.fail(waiting, "stopped by a terminate command")
            draft.put(f"batch/{waiting}", None)
        unit = draft.change(queue=())
        if unit.current is not None:
            draft.send("runtime", CancelCommand(unit.current, unit.index))
    unit = draft.change(queue=(*unit.queue, message.batch_id))
    if unit.current is None and unit.state != ActivityState.NEW:
        _next_batch(draft)


def _next_batch(draft: UnitDraft) -> None:
    """Begin the first batch of the queue."""
    queue = draft.unit.queue
    draft.change(current=queue[0], index=0, queue=queue[1:])
    _execute(draft, draft.script(queue[0]))


def _execute(draft: UnitDraft, script: ScriptRow) -> None:
    """Hand out the command at `index`, or say why it may not run now."""
    unit = draft.unit
    text = script.commands[unit.index]
    kind = parse_command(text).kind
    if kind == "sign":
        refusal: str | None = "Local service error: signing is offered by enclaves only"
    elif kind not in _ALLOWED[unit.state]:
        refusal = f"Local service error: State error: {_EXPECTED[unit.state]}"
    else:
        refusal = None
    draft.send("runtime", Execute(script.batch_id, unit.index, text, refusal))
    if refusal is None and kind in _TARGETS:
        draft.report(unit.state, _TARGETS[kind])


def _finished(draft: UnitDraft, message: CommandFinished) -> None:
    unit = draft.unit
    if unit.current != message.batch_id or unit.index != message.index or unit.state == ActivityState.TERMINATED:
        return
    script = draft.script(message.batch_id)
    is_last = not message.ok or message.index + 1 == len(script.commands)
    stdout, stderr, text = fit_output(message.stdout, message.stderr, message.message, MAX_OUTPUT_BYTES)
    state, changed = _after(unit, parse_command(script.commands[unit.index]).kind, message.ok)
    result = CommandResult(
        draft.activity_id, script.batch_id, message.index, message.ok, stdout, stderr, text, message.at, is_last, state
    )
    draft.send(draft.requestor, result, REPORT_DEADLINE_S)
    if changed:
        draft.report(state, usage=message.usage)
    if not is_last:
        draft.change(state=state, index=unit.index + 1)
        _execute(draft, script)
        return
    draft.change(state=state, current=None, index=0)
    if not changed:
        draft.send(draft.provider, UsageReported(draft.activity_id, message.usage, message.at))
    if unit.queue:
        _next_batch(draft)
    draft.put(f"batch/{message.batch_id}", None)


def _after(unit: UnitRow, kind: str, ok: bool) -> tuple[ActivityState, bool]:
    """Return the state after a command of this kind, and whether it is one that is to be reported."""
    if kind == "terminate" and ok:
        return ActivityState.INITIALIZED, True
    if kind in _TARGETS and kind in _ALLOWED[unit.state]:
        return (_TARGETS[kind] if ok else unit.state), True
    return unit.state, False


class ExeUnit(TableMachine):
    """The machine of one activity. `agreement_requestor` and `provider` are node ids."""

    rows = UnitRow | ScriptRow
    table = Table(
        On(UnitStarted, EDGE, _started),
        On(UsageMeasured, EDGE, _usage_measured),
        On(ShutDown, EDGE, _shut_down),
        On(RunBatch, Looked("the requestor's activity"), _run_batch),
        On(CommandFinished, "runtime", _finished),
        On(Undelivered, ITSELF, _undelivered),
    )

    def __init__(self, activity_id: str, agreement_requestor: str, provider: str) -> None:
        super().__init__(provider)
        self.name = exeunit_name(activity_id)
        self.activity_id = activity_id
        self.requestor = address(agreement_requestor, "activity")
        self.provider = address(provider, "activity")

    def draft(self, rows: Rows, meta: Meta) -> UnitDraft:
        """Return the step to be."""
        return UnitDraft(rows, meta, self)
