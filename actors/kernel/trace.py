"""One line a step: what came, from whom, what it changed. `golem trace <id>` prints the lines of one trace as a story."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from actors.kernel.machine import Emit, Meta, Publish, Reply, Send, Step, Wake
from protocol.types import Refused, actor_of, timestamp_text

_LONG_HEX = re.compile(r"(0x)?[0-9a-f]{24,}")  # ids, which are known by their beginning
StepLog = Callable[["Line"], None]


@dataclass(frozen=True, slots=True)
class Line:
    """A step, violation or crash of an actor."""

    at: float
    trace: str
    actor: str
    sender: str
    message: str
    outcome: tuple[str, ...]
    kind: str = "step"  # step | violation | crash | lost

    def json(self) -> str:
        """Return the line as one JSON object."""
        return json.dumps(
            {"at": self.at, "trace": self.trace, "actor": self.actor, "from": self.sender, "message": self.message,
             "kind": self.kind, "outcome": list(self.outcome)},
            separators=(",", ":"),
        )  # fmt: skip


def describe(step: Step) -> tuple[str, ...]:
    """Return what a step does, in words without contents (keys and documents never reach a log)."""
    words = [f"{'-' if row is None else '='}{key[:80]}" for key, row in step.rows.items()]
    for effect in step.effects:
        match effect:
            case Send(to, message):
                words.append(f"->{actor_of(to) or to}:{type(message).__name__}")
            case Reply(Refused(code, text)):
                words.append(f"refused {code}: {text[:160]}")
            case Reply(message):
                words.append(f"reply {type(message).__name__}")
            case Emit(feed, message):
                words.append(f"event {feed[:80]}:{type(message).__name__}")
            case Publish(topic, message):
                words.append(f"gossip {topic}:{type(message).__name__}")
            case Wake(key, at):
                words.append(f"wake {key[:80]}" if at is not None else f"no wake {key[:80]}")
            case _:
                words.append(type(effect).__name__)
    return tuple(words)


def step_line(actor: str, meta: Meta, tag: str, step: Step) -> Line:
    """Return the line of a step."""
    return Line(meta.now, meta.trace, actor, meta.sender, tag, describe(step))


def story(lines: Iterable[str], trace: str, me: str = "") -> list[str]:
    """Return the readable lines of one trace (all whose trace id starts with `trace`) from JSON lines, in order of time."""
    found = []
    for raw in lines:
        if f'"trace":"{trace}' not in raw:
            continue
        try:
            found.append(json.loads(raw))
        except ValueError:
            continue
    out = []
    for line in sorted(found, key=lambda one: one["at"]):
        sender = line["from"].removeprefix(f"{me}/") if me else line["from"]
        mark = "" if line["kind"] == "step" else f" [{line['kind']}]"
        out.append(f"{timestamp_text(line['at'])[11:23]}  {sender} -> {line['actor']}  {line['message']}{mark}")
        out += [f"{'':14}{word}" for word in line["outcome"]]
    return [_LONG_HEX.sub(lambda found: f"{found[0][:10]}…", line) for line in out]
