"""What is said to and inside an exe-unit: the script language and the messages of `actors/exeunit.py`.

A script is a JSON array of single-key objects, `[{"deploy": {}}, {"start": {}}, {"run": {"entry_point": "x"}}]`. Both
nodes read it with `parse_script`: the requestor's to refuse nonsense at once, the exe-unit to run it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from protocol.activity import Output
from protocol.types import Message

MAX_SCRIPT_BYTES = 768 * 1024  # a script travels in one message
MAX_COMMANDS = 1000
EXEUNIT = "exeunit:"  # how the names of exe-units begin, as actors and on the bus

Format = Literal["str", "string", "bin", "binary"]


class _Args(msgspec.Struct, frozen=True, omit_defaults=True):
    """Base of commands' arguments; unknown keys are ignored."""


class Progress(_Args, frozen=True, rename="camel"):
    """How often to tell of progress."""

    update_interval: str | None = None
    update_step: int | None = None


class VirtualNetwork(_Args, frozen=True, rename="camel"):
    """A virtual network the activity joins. `nodes`: node id by address."""

    id: str
    ip: str
    node_ip: str
    mask: str | None = None
    gateway: str | None = None
    nodes: dict[str, str] = {}


class Sign(_Args, frozen=True):
    """Sign the results so far (enclaves only)."""


class Deploy(_Args, frozen=True):
    """Fetch the package and lay out volumes. `volumes` is a list of paths or a map of path to kind."""

    net: list[VirtualNetwork] | None = None
    hosts: dict[str, str] | None = None
    hostname: str | None = None
    volumes: list[str] | dict[str, Any] | None = None
    env: dict[str, str] | None = None
    progress: Progress | None = None


class Start(_Args, frozen=True):
    """Make ready to run commands."""

    args: list[str] | None = None


class AtEnd(_Args, frozen=True, rename="camel"):
    """Keep all output, or its first or last bytes, or half of each."""

    head: int | None = None
    tail: int | None = None
    head_tail: int | None = None
    format: Format | None = None


class Stream(_Args, frozen=True):
    """Keep all output or its first bytes, and tell of it as it comes."""

    limit: int | None = None
    format: Format | None = None


class CaptureMode(_Args, frozen=True, rename="camel"):
    """One of the two."""

    at_end: AtEnd | None = None
    stream: Stream | None = None


class Capture(_Args, frozen=True):
    """What to keep of a program's output; a missing side is thrown away."""

    stdout: CaptureMode | None = None
    stderr: CaptureMode | None = None


class Run(_Args, frozen=True):
    """Run a program in the runtime."""

    entry_point: str
    args: list[str] | None = None
    capture: Capture | None = None
    env: dict[str, str] | None = None


class CopyFile(_Args, frozen=True):
    """Copy a file between the runtime's volumes and the outside."""

    source: str = msgspec.field(name="from")
    to: str
    format: Any = None
    depth: Any = None
    fileset: Any = None
    progress: Progress | None = None


class Terminate(_Args, frozen=True):
    """Stop other batches and the runtime; the activity is then as new."""


Arguments = Sign | Deploy | Start | Run | CopyFile | Terminate
_KINDS: dict[str, type[Arguments]] = {
    "sign": Sign,
    "deploy": Deploy,
    "start": Start,
    "run": Run,
    "transfer": CopyFile,
    "terminate": Terminate,
}


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a script: its kind (`run`), its arguments, and its JSON text as it was written."""

    kind: str
    args: Arguments
    text: str


class ScriptError(ValueError):
    """A script that cannot be run; the text is for its author."""


_split = msgspec.json.Decoder(list[msgspec.Raw]).decode
_single = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def parse_script(text: str) -> tuple[Command, ...]:
    """Return the commands of a script, at least one. Raises `ScriptError`."""
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raise ScriptError("the script is not valid Unicode") from None
    if len(raw) > MAX_SCRIPT_BYTES:
        raise ScriptError(f"a script of {len(raw)} bytes is over the limit of {MAX_SCRIPT_BYTES}")
    try:
        parts = _split(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ScriptError(f"not a JSON array of commands: {error}") from None
    if not 1 <= len(parts) <= MAX_COMMANDS:
        raise ScriptError(f"a script has 1 to {MAX_COMMANDS} commands, not {len(parts)}")
    return tuple(_command(index, bytes(part)) for index, part in enumerate(parts))


def parse_command(text: str) -> Command:
    """Return one command from its JSON text. Raises `ScriptError`."""
    return _command(0, text.encode())


def _command(index: int, raw: bytes) -> Command:
    try:
        body = _single(raw)
        if len(body) != 1:
            raise ScriptError(f"command {index}: expected an object with one key, the command's name")
        ((kind, args),) = body.items()
        if kind not in _KINDS:
            raise ScriptError(f"command {index}: unknown command {kind[:64]!r}, expected one of {', '.join(_KINDS)}")
        data = bytes(args)
        parsed = msgspec.json.decode(b"{}" if data.strip() == b"null" else data, type=_KINDS[kind])
        _check(parsed)
    except ScriptError:
        raise
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise ScriptError(f"command {index}: {str(error)[:300]}") from None
    return Command(kind, parsed, raw.decode())


def _check(args: Arguments) -> None:
    if not isinstance(args, Run) or args.capture is None:
        return
    for mode in (args.capture.stdout, args.capture.stderr):
        if mode is None:
            continue
        if (mode.at_end is None) == (mode.stream is None):
            raise ValueError("a capture mode is one of atEnd and stream")
        sizes = [mode.stream.limit] if mode.stream else []
        if mode.at_end:
            sizes = [mode.at_end.head, mode.at_end.tail, mode.at_end.head_tail]
        if any(size is not None and size < 0 for size in sizes) or sum(size is not None for size in sizes) > 1:
            raise ValueError("capture takes one of head, tail and headTail, and no negative sizes")


# -- from the requestor's node
class RunBatch(Message, frozen=True):
    """activity@R -> exe-unit: run a script after those before it."""

    activity_id: str
    batch_id: str
    script: str


# -- inside the exe-unit's process
class UnitStarted(Message, frozen=True):
    """process -> exe-unit: a process with this name has begun; a second one has lost the runtime of the first."""

    instance: str


class Execute(Message, frozen=True):
    """exe-unit -> runtime port: run a command, or with `refusal` only tell that it failed so."""

    batch_id: str
    index: int
    command: str  # JSON
    refusal: str | None = None


class CancelCommand(Message, frozen=True):
    """exe-unit -> runtime port: stop this command, if it is still running."""

    batch_id: str
    index: int


class CommandFinished(Message, frozen=True):
    """runtime port -> exe-unit: a command has ended; `usage` are the counters then."""

    batch_id: str
    index: int
    ok: bool
    stdout: Output
    stderr: Output
    message: str | None
    at: float
    usage: list[float]


class UsageMeasured(Message, frozen=True):
    """process -> exe-unit: the counters now; told on, so that a process that is killed costs the provider little."""

    usage: list[float]


class ShutDown(Message, frozen=True):
    """process -> exe-unit: the activity is over, for this reason."""

    reason: str
    error_message: str | None
    usage: list[float]


def exeunit_name(activity_id: str) -> str:
    """Return the name of an activity's exe-unit, as an actor of the provider's node and as a client of its bus."""
    return EXEUNIT + activity_id
