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

from actors.kernel.machine import NOTHING, Effect, Meta, Rows, Send, Step
from actors.kernel.sources import EDGE
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
    parse_command,
    parse_script,
)
from protocol.types import Message, Undelivered, Violation, address, node_of

MAX_QUEUED = 64  # batches that wait
REPORT_DEADLINE_S = 24 * 3600.0
USAGE_DEADLINE_S = 60.0  # then there is a newer one
_TARGETS = {"deploy": "Deployed", "start": "Ready"}
_ALLOWED = {
    "Initialized": ("deploy", "terminate"),
    "Deployed": ("start", "terminate"),
    "Ready": ("run", "transfer", "terminate"),
}
_EXPECTED = {
    "Initialized": "Activity is initialized - deploy() command is expected now",
    "Deployed": "Activity is deployed - start() command is expected now",
    "Ready": "Activity is ready - run(), transfer() or terminate() command is expected now",
}

#: Who alone in this process may say what ("": the unit itself). Other exe-units have an address on the node, too.
_SOURCES: dict[type, str] = {
    **dict.fromkeys((UnitStarted, UsageMeasured, ShutDown), EDGE),
    CommandFinished: "runtime",
    Undelivered: "",
}
_SENT: Decoder[Any] = Decoder(Execute | CancelCommand | CommandResult | StateReported | UsageReported)


class UnitRow(Message, frozen=True):
    """The unit itself: its state, the batch at work (`current`, its command number `index`) and those that wait."""

    instance: str = ""
    state: str = "New"
    current: str | None = None
    index: int = 0
    queue: tuple[str, ...] = ()


class ScriptRow(Message, frozen=True):
    """A batch that is not over: the JSON text of each command."""

    batch_id: str
    commands: tuple[str, ...]


class ExeUnit:
    """The machine of one activity. `agreement_requestor` and `provider` are node ids."""

    local = UnitStarted | CommandFinished | UsageMeasured | ShutDown | Undelivered
    peer = RunBatch
    rows = UnitRow | ScriptRow

    def __init__(self, activity_id: str, agreement_requestor: str, provider: str) -> None:
        self.name = f"exeunit:{activity_id}"
        self._activity_id = activity_id
        self._requestor = address(agreement_requestor, "activity")
        self._provider = address(provider, "activity")

    def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
        """Decide on one message."""
        source = _SOURCES.get(type(message))
        if source is not None and meta.sender != address(node_of(self._provider), source or self.name):
            raise Violation(f"a {type(message).__name__} from {meta.sender}, which is not of this exe-unit")
        unit: UnitRow = rows.get("unit") or UnitRow()
        match message:
            case UnitStarted(instance):
                return self._started(rows, unit, instance, meta)
            case RunBatch():
                return self._run_batch(rows, unit, message, meta)
            case CommandFinished():
                return self._finished(rows, unit, message, meta)
            case UsageMeasured(usage):
                if unit.state in ("New", "Terminated"):
                    return NOTHING
                return Step(effects=[Send(self._provider, UsageReported(self._activity_id, usage, meta.now), USAGE_DEADLINE_S)])
            case ShutDown(reason, error_message, usage):
                return self._shut_down(unit, reason, error_message, usage, meta)
            case Undelivered(_, body):
                return self._undelivered(unit, body, message.reason, meta)
            case _:
                raise Violation(f"no message for an exe-unit: {type(message).__name__}")

    # -- its own life
    def _started(self, rows: Rows, unit: UnitRow, instance: str, meta: Meta) -> Step:
        if unit.instance == instance or unit.state == "Terminated":
            return NOTHING
        if unit.instance:  # the process before this one took the runtime with it
            text = "the exe-unit's process was restarted; its runtime is lost"
            return self._shut_down(unit, "execution interrupted", text, None, meta)
        unit = msgspec.structs.replace(unit, instance=instance, state="Initialized")
        effects: list[Effect] = [self._report("Initialized", None, None, meta)]
        if unit.queue:  # a batch was faster than this message
            unit, more = self._next_batch(unit, rows[f"batch/{unit.queue[0]}"], meta)
            effects += more
        return Step({"unit": unit}, effects)

    def _shut_down(self, unit: UnitRow, reason: str, error_message: str | None, usage: list[float] | None, meta: Meta) -> Step:
        if unit.state == "Terminated":
            return NOTHING
        over = msgspec.structs.replace(unit, state="Terminated", current=None, queue=())
        report = StateReported(self._activity_id, "Terminated", None, reason, error_message, usage, meta.now)
        return Step({"unit": over}, [Send(self._provider, report, REPORT_DEADLINE_S)])

    def _undelivered(self, unit: UnitRow, body: bytes, reason: str, meta: Meta) -> Step:
        """A command that the runtime did not take ends the activity: nobody knows what of it was done."""
        lost = _SENT(body)
        if not isinstance(lost, Execute) or (unit.current, unit.index) != (lost.batch_id, lost.index):
            return NOTHING  # the requestor or our node was away for a day: nobody is left to be told
        return self._shut_down(unit, "execution interrupted", f"the runtime did not take a command: {reason}", None, meta)

    def _report(self, state: str, pending: str | None, usage: list[float] | None, meta: Meta) -> Send:
        report = StateReported(self._activity_id, state, pending, usage=usage, at=meta.now)
        return Send(self._provider, report, REPORT_DEADLINE_S)

    # -- batches
    def _run_batch(self, rows: Rows, unit: UnitRow, message: RunBatch, meta: Meta) -> Step:
        if meta.sender != self._requestor:
            raise Violation(f"{meta.sender} is not the requestor of this activity")
        if message.activity_id != self._activity_id:
            raise Violation("a batch for another activity")
        if f"batch/{message.batch_id}" in rows or len(message.batch_id) > 64:
            return NOTHING
        if unit.state == "Terminated" or len(unit.queue) >= MAX_QUEUED:
            why = "the activity is over" if unit.state == "Terminated" else f"{MAX_QUEUED} batches wait already"
            return Step(effects=[self._fail(message.batch_id, 0, f"batch refused: {why}", meta)])
        try:
            commands = parse_script(message.script)
        except ScriptError as error:
            return Step(effects=[self._fail(message.batch_id, 0, f"Bad request: {error}", meta)])
        script = ScriptRow(message.batch_id, tuple(command.text for command in commands))
        changed: dict[str, Message | None] = {f"batch/{message.batch_id}": script}
        effects: list[Effect] = []
        if commands[0].kind == "terminate":
            for waiting in unit.queue:
                effects.append(self._fail(waiting, 0, "stopped by a terminate command", meta))
                changed[f"batch/{waiting}"] = None
            unit = msgspec.structs.replace(unit, queue=())
            if unit.current is not None:
                effects.append(Send("runtime", CancelCommand(unit.current, unit.index)))
        unit = msgspec.structs.replace(unit, queue=(*unit.queue, message.batch_id))
        if unit.current is None and unit.state != "New":
            unit, more = self._next_batch(unit, script, meta)
            effects += more
        changed["unit"] = unit
        return Step(changed, effects)

    def _next_batch(self, unit: UnitRow, script: ScriptRow, meta: Meta) -> tuple[UnitRow, list[Effect]]:
        """Begin the first batch of the queue, which `script` is."""
        unit = msgspec.structs.replace(unit, current=unit.queue[0], index=0, queue=unit.queue[1:])
        return unit, self._execute(unit, script, meta)

    def _execute(self, unit: UnitRow, script: ScriptRow, meta: Meta) -> list[Effect]:
        """Hand out the command at `unit.index`, or say why it may not run now."""
        text = script.commands[unit.index]
        kind = parse_command(text).kind
        if kind == "sign":
            refusal: str | None = "Local service error: signing is offered by enclaves only"
        elif kind not in _ALLOWED[unit.state]:
            refusal = f"Local service error: State error: {_EXPECTED[unit.state]}"
        else:
            refusal = None
        effects: list[Effect] = [Send("runtime", Execute(script.batch_id, unit.index, text, refusal))]
        if refusal is None and kind in _TARGETS:
            effects.append(self._report(unit.state, _TARGETS[kind], None, meta))
        return effects

    def _finished(self, rows: Rows, unit: UnitRow, message: CommandFinished, meta: Meta) -> Step:
        if unit.current != message.batch_id or unit.index != message.index or unit.state == "Terminated":
            return NOTHING
        key = f"batch/{message.batch_id}"
        script: ScriptRow = rows[key]
        is_last = not message.ok or message.index + 1 == len(script.commands)
        stdout, stderr, text = fit_output(message.stdout, message.stderr, message.message, MAX_OUTPUT_BYTES)
        unit, reports = self._after(unit, parse_command(script.commands[unit.index]).kind, message, meta)
        result = CommandResult(
            self._activity_id, script.batch_id, message.index, message.ok, stdout, stderr, text, message.at, is_last,
            unit.state,
        )  # fmt: skip
        effects: list[Effect] = [Send(self._requestor, result, REPORT_DEADLINE_S), *reports]
        if not is_last:
            unit = msgspec.structs.replace(unit, index=unit.index + 1)
            return Step({"unit": unit}, effects + self._execute(unit, script, meta))
        unit = msgspec.structs.replace(unit, current=None, index=0)
        if not reports:
            effects.append(Send(self._provider, UsageReported(self._activity_id, message.usage, message.at)))
        if unit.queue:
            unit, more = self._next_batch(unit, rows[f"batch/{unit.queue[0]}"], meta)
            effects += more
        return Step({"unit": unit, key: None}, effects)

    def _after(self, unit: UnitRow, kind: str, message: CommandFinished, meta: Meta) -> tuple[UnitRow, list[Effect]]:
        """Return the unit and what to report after a command of this kind."""
        if kind == "terminate" and message.ok:
            unit = msgspec.structs.replace(unit, state="Initialized")
        elif kind in _TARGETS and kind in _ALLOWED[unit.state]:
            if message.ok:
                unit = msgspec.structs.replace(unit, state=_TARGETS[kind])
        else:
            return unit, []
        return unit, [self._report(unit.state, None, message.usage, meta)]

    def _fail(self, batch_id: str, index: int, text: str, meta: Meta) -> Send:
        result = CommandResult(self._activity_id, batch_id, index, False, None, None, text, meta.now, is_last=True)
        return Send(self._requestor, result, REPORT_DEADLINE_S)
