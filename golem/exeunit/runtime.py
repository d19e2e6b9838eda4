"""The port between an exe-unit and the thing that runs its commands.

A runtime is one package in `runtimes/` (which says how to add one) with one class that implements `Runtime`; nothing else
of the exe-unit knows which one it is. An instance serves one activity: deploy, start, any number of runs, stop, and perhaps
all of it again; `usage` goes on counting through that. Neighbours:
`golem.exeunit.transfer.packages` brings the image file, `golem.exeunit.transfer.transfers` moves files in and out of a
deployment's volumes, `golem.exeunit.usage` adds up what `usage` tells.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import trio

Side = Literal["stdout", "stderr"]
OutputSink = Callable[[Side, bytes], Awaitable[None]]
Interaction = Literal["shell", "proxy-http"]  # what a requestor may do to a running activity beside commands

GIB = 1 << 30
MAX_ARGUMENTS = 4096
MAX_ARGUMENT_BYTES = 1 << 20


class ImageFormat(Enum):
    """What a task package can be, told by its content; the value is the name used in messages."""

    WASM_MODULE = "WebAssembly module"
    WASI_PACKAGE = "WASI package (zip with manifest.json)"
    GVMI = "GVMI image (squashfs)"
    DOCKER_ARCHIVE = "Docker archive (tar with manifest.json)"
    OCI_ARCHIVE = "OCI layout (tar with index.json)"
    ROOTFS_ARCHIVE = "root file system (tar)"
    OTHER = "a file of another format"  # only runtimes of a descriptor take these: what they make of them is theirs
    NOTHING = "no task package"  # the agreement may name none; `deploy` is given an empty file then


class RuntimeFault(Exception):
    """A runtime refused or failed; the text is for the requestor."""


@dataclass(frozen=True)
class Limits:
    """What one activity may use. The first three are what the agreement grants."""

    cpu_threads: int = 1
    mem_gib: float = 0.5
    storage_gib: float = 1.0
    run_time_s: float | None = None  # wall clock of one command
    cpu_time_s: float | None = None  # CPU time of one command
    output_bytes: int = 1 << 30  # of one command, both sides together
    files: int = 100_000  # in all volumes together

    @property
    def mem_bytes(self) -> int:
        return int(self.mem_gib * GIB)

    @property
    def storage_bytes(self) -> int:
        return int(self.storage_gib * GIB)


@dataclass(frozen=True)
class VolumeRequest:
    """A volume the requestor asks for at deploy: a guest path, where it lives, and its size if given."""

    path: str
    kind: Literal["host", "ram", "storage"] = "host"
    size_bytes: int | None = None


@dataclass(frozen=True)
class DeployOptions:
    """`work_dir` exists, is empty and belongs to the supervisor alone; `limits` bind every later command."""

    work_dir: Path
    limits: Limits = field(default_factory=Limits)
    env: Mapping[str, str] = field(default_factory=dict)
    volumes: tuple[VolumeRequest, ...] = ()
    hostname: str | None = None
    hosts: Mapping[str, str] = field(default_factory=dict)
    activity_id: str = ""  # 32 hex digits; what the runtime leaves on the machine is marked with it
    notice: Callable[[str], None] = lambda text: None  # told of what takes long at deploy


@dataclass(frozen=True)
class Volume:
    """A directory of the host that the guest sees at `container_path`.

    `read_only` binds the guest, not transfers (it is how input gets in); a `private` one takes no transfers.
    """

    container_path: str
    host_dir: Path
    read_only: bool = False
    private: bool = False


@dataclass(frozen=True)
class Deployment:
    """`start_mode` "empty": start is a one-shot and each run its own process; "blocking": start keeps a service up."""

    volumes: tuple[Volume, ...]
    start_mode: Literal["empty", "blocking"] = "empty"
    ports: tuple[int, ...] = ()  # TCP ports that the image says its services listen on


@dataclass(frozen=True)
class ExitStatus:
    """How a command ended: the guest's exit code, or one above 123 with the `reason` why it has none of its own."""

    code: int
    reason: str | None = None

    @property
    def ok(self) -> bool:
        return self.code == 0 and self.reason is None


@dataclass(frozen=True)
class Usage:
    """Running totals of one activity: CPU seconds, peak memory and storage in GiB."""

    cpu_sec: float = 0.0
    gib: float = 0.0
    storage_gib: float = 0.0


class Terminal(Protocol):
    """A program inside the activity with somebody at its keyboard; one reader and one writer at a time.

    Errors of every method: RuntimeFault when the runtime is gone.
    """

    async def send(self, data: bytes) -> None:
        """Hand bytes to the program's input; waits while it does not read. After the program's end it does nothing."""

    async def receive(self) -> tuple[Side, bytes] | None:
        """Return the next output (with a terminal, all of it is stdout), or None when there will be no more."""

    async def resize(self, rows: int, cols: int) -> None:
        """Tell the program that its window has changed; without a terminal it does nothing."""

    async def end_input(self) -> None:
        """Close the program's input: it reads end of file. A terminal is sent 0x04, as from the keyboard."""

    async def wait(self) -> ExitStatus:
        """Wait for the program's end; `receive` has to be called on, or it may never come."""

    async def aclose(self) -> None:
        """Kill what runs and let go of everything; may be repeated."""


@runtime_checkable
class Runtime(Protocol):
    """What an exe-unit asks of a runtime.

    Errors: RuntimeFault when a command cannot be carried out; OSError when this host fails (disk full, no processes).
    """

    name: str
    version: str
    formats: frozenset[ImageFormat]
    interactions: frozenset[Interaction]  # those of `open_terminal` and `connect` that work

    async def self_test(self) -> str | None:
        """None if this runtime works here, else why it is not to be offered."""

    def offer_properties(self) -> dict[str, Any]:
        """Properties this runtime adds to an offer."""

    async def deploy(self, image: Path, options: DeployOptions) -> Deployment:
        """Check the image and lay out volumes."""

    async def start(self, args: Sequence[str]) -> None:
        """Make ready to run commands."""

    async def run(
        self, entry_point: str, args: Sequence[str], output: OutputSink, env: Mapping[str, str] | None = None
    ) -> ExitStatus:
        """Run one command to its end, handing output on as it comes; a slow `output` slows the guest.

        Cancelling it kills the guest.
        """

    async def stop(self) -> None:
        """Kill whatever runs and remove the volumes; may be repeated, and followed by another deploy."""

    def usage(self) -> Usage:
        """Totals so far; cheap, and also right while a command runs."""

    async def failure(self) -> str:
        """Wait until what keeps a deployment alive has died by itself, and return why; for ever where nothing can die.

        To be called after `deploy`; `stop` is not a failure. A command that is cut short by one fails with the same text.
        """

    async def open_terminal(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None, tty: bool, rows: int, cols: int
    ) -> Terminal:
        """Start a program with live input, beside whatever runs; `argv` () is the image's shell.

        Errors: RuntimeFault, also where `interactions` has no "shell".
        """

    async def connect(self, port: int) -> trio.abc.HalfCloseableStream:
        """Open a TCP connection to a service on the activity's own loopback address.

        Errors: RuntimeFault, also where `interactions` has no "proxy-http".
        """

    async def sweep(self, work_root: Path) -> list[str]:
        """Remove what exe-units that died without cleaning up left on this machine, below `work_root` and elsewhere.

        Returns a line for each thing removed. What living exe-units use stays.
        """


def check_arguments(words: Sequence[str]) -> None:
    """Refuse arguments that no program could be given: NUL bytes, lone surrogates, too many or too long."""
    if len(words) > MAX_ARGUMENTS:
        raise RuntimeFault(f"too many arguments: {len(words)}, at most {MAX_ARGUMENTS}")
    total = 0
    for word in words:
        if "\0" in word:
            raise RuntimeFault("an argument holds a NUL byte")
        try:
            total += len(word.encode("utf-8")) + 1
        except UnicodeEncodeError:
            raise RuntimeFault("an argument is not valid Unicode") from None
    if total > MAX_ARGUMENT_BYTES:
        raise RuntimeFault(f"arguments are too long: {total} bytes, at most {MAX_ARGUMENT_BYTES}")


def environment_words(environment: Mapping[str, str]) -> list[str]:
    """Return `name=value` of each variable. Errors: RuntimeFault on names that no environment can hold."""
    for name in environment:
        if not name or "=" in name:
            raise RuntimeFault(f"not a name of an environment variable: {name!r}"[:200])
    return [f"{name}={value}" for name, value in environment.items()]


_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}{tail}": 1000 ** (n + 1) for n, letter in enumerate("kmgtp") for tail in ("", "b")}
_UNITS |= {f"{letter}i{tail}": 1024 ** (n + 1) for n, letter in enumerate("kmgtp") for tail in ("", "b")}


def parse_size(text: str | int) -> int:
    """Bytes of a size such as `512`, `1g` (10^9) or `1.5 GiB` (2^30).

    Errors: RuntimeFault.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([a-z]*)\s*", str(text).lower())
    if match is None or match[2] not in _UNITS:
        raise RuntimeFault(f"not a size: {text!r} (for example 512m, 1g, 2gib)")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_volumes(raw: object) -> tuple[VolumeRequest, ...]:
    """Read the `volumes` of a deploy command: a list of paths, or a map of path to host, ram or storage.

    Errors: RuntimeFault.
    """
    if raw is None:
        return ()
    if isinstance(raw, Mapping):
        return tuple(_volume(path, body) for path, body in raw.items())
    if isinstance(raw, Sequence) and not isinstance(raw, str | bytes):
        return tuple(VolumeRequest(guest_path(path)) for path in raw)
    raise RuntimeFault("volumes must be a list of paths or a map of paths")


def _volume(path: object, body: object) -> VolumeRequest:
    if not isinstance(body, Mapping) or len(body) != 1:
        raise RuntimeFault(f"volume {path!r} must name one of host, ram and storage")
    ((kind, details),) = body.items()
    if kind not in ("host", "ram", "storage"):
        raise RuntimeFault(f"volume {path!r}: unknown kind {kind!r}")
    size = details.get("size") if isinstance(details, Mapping) else None
    return VolumeRequest(guest_path(path), kind, None if size is None else parse_size(size))


def guest_path(raw: object) -> str:
    """An absolute, clean path inside the guest; a missing leading slash is put in front.

    Errors: RuntimeFault on `.` or `..` parts, NUL bytes and anything that is not a text.
    """
    if not isinstance(raw, str) or not raw or "\0" in raw or len(raw) > 4096:
        raise RuntimeFault(f"not a path: {raw!r}"[:200])
    parts = [part for part in raw.split("/") if part]
    if "." in parts or ".." in parts:
        raise RuntimeFault(f"a path may not hold . or .. parts: {raw!r}")
    return "/" + "/".join(parts)
