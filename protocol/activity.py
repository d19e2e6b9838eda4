"""What is said about activities, between the two nodes and with the exe-unit. Handled by `actors/activity/machine.py`.

An activity is one run of an exe-unit under an approved agreement. Its requestor's node and its provider's node each
hold a row of it; the exe-unit reports to the provider's node and sends results straight to the requestor's.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from protocol.states import ActivityState
from protocol.types import Message, Violation

MAX_USAGE_COUNTERS = 64
MAX_TEXT = 4000  # characters of a reason, an error message or a command's message
MAX_OUTPUT_BYTES = 960 * 1024  # of one command, both sides together: a result is one message of at most 1 MiB
MAX_BATCH_OUTPUT_BYTES = 16 * 1024 * 1024  # of all results of a batch that are kept
LEAST_OUTPUT_BYTES = 16 * 1024  # of one command, however much its batch has said before
BATCH_NOTE = (
    "\n[cut by the requestor's node: the output had {} bytes, and the results of a batch take "
    f"{MAX_BATCH_OUTPUT_BYTES >> 20} MiB; what follows keeps its beginning and its end only]\n"
)
#: Captured output: text, bytes where the capture asked for binary, None for nothing. MessagePack tells them apart, a msgspec
#: union may not hold both. A peer's is left as it came until `check_output` has looked at it: read as whatever it is, a
#: million empty arrays would hold the event loop for a quarter of a second.
Output = Any
if TYPE_CHECKING:
    RawOutput = Any
else:
    RawOutput = msgspec.Raw
Usage = Annotated[list[float], msgspec.Meta(max_length=MAX_USAGE_COUNTERS)]
_ID = re.compile(r"[0-9a-f]{32}\Z")
_OUTPUT_STARTS = re.compile(rb"[\xa0-\xbf\xc0\xc4-\xc6\xd9-\xdb]")  # MessagePack: nil, text, bytes


# -- to other actors of the node
class ActivityKnown(Message, frozen=True):
    """activity -> ledger: this activity belongs to this agreement, and was created at `at`."""

    activity_id: str
    agreement_id: str
    at: float = 0.0  # 0: now


class ActivityOver(Message, frozen=True):
    """activity -> ledger: this activity ended, as far as this node knows."""

    activity_id: str
    at: float


# -- from edges of the node
class CreateActivity(Message, frozen=True):
    """edge -> activity at the requestor: begin an activity under an approved agreement. Answer: `Accepted` or `Refused`."""

    activity_id: str
    agreement_id: str
    timeout_s: float  # how long the requestor will wait for `Initialized`


class DestroyActivity(Message, frozen=True):
    """edge -> activity at the requestor: end an activity; harmless when it has ended. Answer: `Accepted` or `Refused`."""

    activity_id: str


class Exec(Message, frozen=True):
    """edge -> activity at the requestor: run a script. Answer: `Accepted` or `Refused`."""

    batch_id: str
    activity_id: str
    script: str


class StateReported(Message, frozen=True):
    """exe-unit (or the provider agent, through an edge) -> activity at the provider: the state is now this."""

    activity_id: str
    state: ActivityState
    pending: ActivityState | None = None
    reason: str | None = None
    error_message: str | None = None
    usage: Usage | None = None  # in the order of the agreement's usage vector
    at: float = 0.0  # when it was so, by the reporter's clock


class UsageReported(Message, frozen=True):
    """exe-unit -> activity at the provider: the counters at the end of a batch."""

    activity_id: str
    usage: Usage
    at: float


class Accepted(Message, frozen=True, tag="Done"):
    """Answer to an edge: taken, under this id."""

    id: str


# -- between the nodes
class ActivityRequested(Message, frozen=True):
    """activity@R -> activity@P: begin this activity."""

    activity_id: str
    agreement_id: str
    timeout_s: float


class DestroyRequested(Message, frozen=True):
    """activity@R -> activity@P: end this activity."""

    activity_id: str


class StateChanged(Message, frozen=True):
    """activity@P -> activity@R: the state (and the last known usage) of an activity."""

    activity_id: str
    state: ActivityState
    pending: ActivityState | None = None
    reason: str | None = None
    error_message: str | None = None
    usage: Usage | None = None
    at: float = 0.0  # since when, by the exe-unit's clock
    usage_at: float = 0.0


class UsageChanged(Message, frozen=True):
    """activity@P -> activity@R: the counters at the end of a batch."""

    activity_id: str
    usage: Usage
    at: float


class CommandResult(Message, frozen=True):
    """exe-unit -> activity@R: a command of a batch has ended; `index` counts from 0 without gaps."""

    activity_id: str
    batch_id: str
    index: int
    ok: bool
    stdout: RawOutput
    stderr: RawOutput
    message: str | None
    at: float
    is_last: bool  # no further result of this batch follows
    state: str = ""  # of the activity after the command; it is here sooner than by way of the provider's node


# -- timers
class CreateExpired(Message, frozen=True):
    """The exe-unit should have been up by now."""

    activity_id: str


class DestroyExpired(Message, frozen=True):
    """The activity should have ended by now."""

    activity_id: str


class HeldExpired(Message, frozen=True):
    """A request for an activity waited in vain for its agreement."""

    activity_id: str


class BatchExpired(Message, frozen=True):
    """The results of a batch have been kept long enough."""

    activity_id: str
    batch_id: str


class FeedExpired(Message, frozen=True):
    """Nobody waits for changes of this ended activity any more."""

    activity_id: str


class UnitSilent(Message, frozen=True):
    """Nothing was heard of the exe-unit until `due`."""

    activity_id: str
    due: float


class AgreementForgotten(Message, frozen=True):
    """An agreement has been over for so long that its activities need not be readable any more."""

    agreement_id: str


# -- in feeds
class ActivityEvent(Message, frozen=True):
    """In feed `activities` of the provider's node, for the agent. `kind`: CreateActivity or DestroyActivity."""

    activity_id: str
    agreement_id: str
    kind: str
    app_session_id: str | None


class ActivityChanged(Message, frozen=True):
    """In feed `activity/<id>`: its row changed."""

    state: ActivityState


class ResultArrived(Message, frozen=True):
    """In feed `batch/<id>`: the results up to `index` are there."""

    index: int
    finished: bool


def check_id(text: str) -> str:
    """Return `text` if it is an id of 32 lower-case hex digits. Raises `Violation`."""
    if not _ID.match(text):
        raise Violation(f"not an id (32 hex digits): {text[:64]!r}")
    return text


def check_usage(usage: list[float]) -> list[float]:
    """Return a usage vector of finite, non-negative numbers. Raises `Violation`."""
    if len(usage) > MAX_USAGE_COUNTERS or not all(math.isfinite(value) and value >= 0 for value in usage):
        raise Violation("a usage vector has at most 64 finite, non-negative numbers")
    return usage


def check_output(output: Any) -> str | bytes | None:
    """Return `output`, as it came or as it was made, if it is one. Raises `Violation`."""
    if isinstance(output, msgspec.Raw):
        first = bytes(memoryview(output)[:1])
        if not first or not _OUTPUT_STARTS.match(first):
            raise Violation("captured output is text or bytes")
        try:
            output = msgspec.msgpack.decode(output)
        except (msgspec.DecodeError, ValueError) as error:
            raise Violation(f"captured output cannot be read: {str(error)[:100]}") from None
    if output is None or isinstance(output, str | bytes):
        return output
    raise Violation(f"captured output is text or bytes, not {type(output).__name__}")


def output_size(output: str | bytes | None) -> int:
    """Return the size of a captured output in bytes, as it is stored."""
    if output is None:
        return 0
    return len(output) if isinstance(output, bytes) else len(output.encode("utf-8", "surrogatepass"))


def cut_output(output: str | bytes | None, max_bytes: int, note: str = "") -> str | bytes | None:
    """Return the first `max_bytes` bytes of an output, as whole characters if it is text.

    With a `note` beginning and end of the output stay, and the note (with the output's size) is the last line of a text.
    """
    if output is None or output_size(output) <= max_bytes:
        return output
    data = output if isinstance(output, bytes) else output.encode("utf-8", "surrogatepass")
    said = b"" if isinstance(output, bytes) else note.format(len(data)).encode()
    room = max(0, max_bytes - len(said))
    tail = room // 2 if note else 0
    cut = data[: room - tail] + data[len(data) - tail :]
    return cut if isinstance(output, bytes) else (cut + said).decode("utf-8", "ignore")


def fit_output(
    stdout: str | bytes | None, stderr: str | bytes | None, message: str | None, max_bytes: int, note: str = ""
) -> tuple[str | bytes | None, str | bytes | None, str | None]:
    """Return both sides and the message of a command, cut to `max_bytes` together; a cut is said in the message.

    `note`: as `cut_output` has it.
    """
    out, err = output_size(stdout), output_size(stderr)
    if out + err > max_bytes:
        err_max = min(err, max(max_bytes // 2, max_bytes - out))
        stdout, stderr = cut_output(stdout, max_bytes - err_max, note), cut_output(stderr, err_max, note)
        said = f"output cut to {max_bytes} bytes of {out + err}"
        message = f"{message} ({said})" if message else said
    return stdout, stderr, message[:MAX_TEXT] if message else message
